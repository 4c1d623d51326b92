"""The rest of the field, under the same names, tests and flags: losses.py imports this file in its last line.

Here and not there: objectives that need statistics of the batch or a sort (bapo, m2po, clip_cov, kl_cov), and the rarer
relatives of what losses.py already shows. `x` is losses.Batch; each returns a loss per token, (B,T).
"""
import math

import torch

from losses import objective, ppo, top


# ---- Adaptive bands ------------------------------------------------------------------------------------------

@objective("token-mean")
def dcpo(x, eps_low=0.16, eps_high=0.20, dual_clip=10.0):
    """DCPO (2509.02333): bound |r - 1| r q <= eps: the band widens as the old probability q falls."""
    q = x.q.clamp(min=1e-30)
    low, high = (1 + (1 - 4 * eps_low / q).clamp(min=0).sqrt()) / 2, (1 + (1 + 4 * eps_high / q).sqrt()) / 2
    return ppo(x, low, high.clamp(max=max(dual_clip or 0, 10.0)), dual_clip)

@objective("seq-mean-token-mean")
def gapo(x, eps_low=0.2, eps_high=0.28):
    """GAPO (2609.00444): the rarer the right answer (c of k), the higher the upper bound, which only A > 0 meets:
    eps_low + (eps_high - eps_low) (k-c)/(k-1)."""
    rare = (1 - x.need("pass_rate")) * x.group_size / max(1, x.group_size - 1)
    return ppo(x, 1 - eps_low, 1 + eps_low + (eps_high - eps_low) * rare)

@objective("token-mean")
def bapo(x, low=(0.6, 0.9), high=(1.2, 3.0), step=0.05, target=1.0, dual_clip=3.0):
    """BAPO (2510.18927): raise the lower, then the upper bound, step by step, until positive tokens hold their own:
    sum over A >= 0 of min(r, high) A / sum over A < 0 of max(r, low) |A| >= target. Batch statistics."""
    r, up, down = x.r.detach().flatten(), x.A.clamp(min=0).flatten(), -x.A.clamp(max=0).flatten()

    def enough(a, b):
        return r.clamp(max=b) @ up >= target * (r.clamp(min=a) @ down)

    # A higher lower bound only adds to the losers: the walk ends at its start or where the upper bound suffices; bisect
    steps, done = round((high[1] - high[0]) / step), enough(low[0], high[0])
    first, last = r.new_zeros(()), r.new_tensor(float(steps))
    for _ in range(steps.bit_length()):
        middle = ((first + last) / 2).floor()
        ok = enough(low[1], high[0] + step * middle)
        first, last = torch.where(ok, first, middle + 1), torch.where(ok, middle, last)
    band_low, band_high = torch.where(done, *r.new_tensor(low)), high[0] + step * last.masked_fill(done, 0)
    x.metrics |= {"band_low": band_low, "band_high": band_high}
    return ppo(x, band_low, band_high, dual_clip)

@objective("token-mean")
def m2po(x, budget=0.04, eps_low=0.3, eps_high=0.5):
    """M2PO (2510.01161): the widest t with mean min(log r, t)^2 <= budget over the tokens that A pushes outward; band
    [1 - max(1 - e^-t, eps_low), 1 + max(e^t - 1, eps_high)]. Batch statistics; sorts."""
    outward = x.A * x.d > 0
    s = (x.d.detach().clamp(-20, 20) ** 2 * outward).flatten().sort().values  # the n outward tokens come last
    n, above = outward.sum().to(s), torch.arange(s.numel(), 0, -1, device=s.device)
    t2 = (budget * n - (s.cumsum(0) - s)) / above  # spends the budget if the first cut token is this one
    cut = t2 <= s
    t = torch.where(cut.any(), t2[cut.int().argmax()], 20.0**2).sqrt()  # within the budget: |log r| <= 20 is no clip
    band_low, band_high = 1 - (-(-t).expm1()).clamp(min=eps_low), 1 + t.expm1().clamp(min=eps_high)
    x.metrics |= {"band_low": band_low, "band_high": band_high}
    return ppo(x, band_low, band_high)


# ---- Ratios of a prefix, of a whole response -----------------------------------------------------------------

@objective("seq-mean-token-mean")
def gmpo(x, eps_low=0.4, eps_high=0.4):
    """GMPO (2507.20673): geometric mean of token ratios, PPO's clip in log space. -A exp(mean clip(log r))"""
    sign = x.A.sign()
    d = sign * torch.minimum(sign * x.d, sign * x.d.clamp(-eps_low, eps_high))
    x.outside(-math.expm1(-eps_low), math.expm1(eps_high))
    return -x.A * x.seq_mean(d).clamp(max=20).exp()

@objective("token-mean")
def ctpo(x, eps_low=0.025, eps_high=0.05, dual_clip=0.05, power=0.5):
    """CTPO (2605.07331): the ratio of the prefix, c_t = prod_{j<=t} r_j, in the band of a random walk: log c_t within
    [-eps_low, eps_high] t^power, dual clip at exp(dual_clip t^power)."""
    walk = x.mask.cumsum(1).clamp(min=1) ** power
    prefix = (x.d * x.mask).cumsum(1).detach().clamp(max=10).exp() * x.one
    dual_clip = None if dual_clip is None else (dual_clip * walk).exp()
    return ppo(x, (-eps_low * walk).exp(), (eps_high * walk).exp(), dual_clip, r=prefix)

@objective("token-mean")
def vespo(x, k_pos=2.0, lam_pos=3.0, k_neg=3.0, lam_neg=2.0):
    """VESPO (2602.10693): REINFORCE under a bump of the response's W = prod r. -sg[W^k exp(lam (1 - W))] A log pi"""
    log_w = x.seq_sum(x.d.detach().clamp(-20, 20)).clamp(math.log(1e-8), 20)
    k = torch.full_like(x.A, k_neg).masked_fill(x.A >= 0, k_pos)
    lam = torch.full_like(x.A, lam_neg).masked_fill(x.A >= 0, lam_pos)
    return -(k * log_w + lam * (1 - log_w.exp())).exp() * x.A * x.logp

@objective("seq-mean-token-sum", advantage="signed")
def topr(x):
    """TOPR (2503.14286): winners as plain REINFORCE, losers weighted by min(prod r, 1) of their response."""
    w = x.seq_sum(x.d.detach()).clamp(max=0).exp().expand_as(x.A)
    return -w.masked_fill(x.A > 0, 1) * x.A * x.logp


# ---- Stop-gradient weights -----------------------------------------------------------------------------------

@objective("token-mean")
def gppo(x, eps_low=0.2, eps_high=0.28, dual_clip=10.0):
    """GPPO (2508.07629): DAPO's value, but a clipped token keeps the gradient of the bound it hit: w = (1 -+ eps) A"""
    return ce_gppo(x, 1.0, 1.0, eps_low, eps_high, dual_clip)

@objective("token-mean")
def ce_gppo(x, beta_low=0.75, beta_high=1.0, eps_low=0.2, eps_high=0.2, dual_clip=10.0):
    """CE-GPPO (2509.20712): GPPO with the kept gradient times beta_low (below the band) or beta_high (above)."""
    low, high = x.outside(eps_low, eps_high)
    bound = torch.where(low, beta_low * (1 - eps_low) * x.one, beta_high * (1 + eps_high) * x.one)
    loss = -x.A * torch.where(low | high, bound, x.r)
    return loss if dual_clip is None else torch.where((x.A < 0) & (x.r > dual_clip), -dual_clip * x.A, loss)

@objective("token-mean")
def aspo(x, eps=0.2, eps_entropy=0.4, quantile=0.8, dual_clip=3.0):
    """ASPO (2510.06062): for A > 0 the ratio upside down, 1/r, so that unlikely tokens learn faster. Stops where PPO
    stops (eps_entropy: for a response's most uncertain tokens); a weight beyond dual_clip is capped, not dropped."""
    eps = torch.full_like(x.A, eps)
    if x.entropy is not None:
        seen = x.entropy.masked_fill(x.mask == 0, torch.nan)
        eps[x.entropy > seen.nanquantile(quantile, dim=1, keepdim=True)] = eps_entropy
    low, high = x.outside(eps, eps)
    w = torch.where(x.A > 0, 1 / x.r, x.r).detach()
    if dual_clip is None:
        w = w * x.one
    else:  # as the official code: two forms of one gradient
        w = torch.where(w > dual_clip, dual_clip * x.logp, w * x.one)
    return -x.A * torch.where(high, 1 / (1 + eps), torch.where(low, 1 - eps, w))

@objective("token-mean")
def dgpo(x, eps_low=0.2, eps_high=0.28, n=1.0, m=2.0):
    """DGPO (2603.14389): beyond the band the weight bends instead of breaking off: r (r/(1-eps))^n below,
    r^(1-1/m) (1+eps)^(1/m) above."""
    (low, high), r = x.outside(eps_low, eps_high), x.r.detach()
    bent = torch.where(low, r * (r / (1 - eps_low)) ** n, r ** (1 - 1 / m) * (1 + eps_high) ** (1 / m))
    return -torch.where(low | high, bent, r) * x.A * x.one


# ---- Penalties that pull the ratio back ----------------------------------------------------------------------

@objective("seq-mean-token-mean")
def r2vpo(x, lam=0.04):
    """R2VPO (2601.03320): pay for the ratio's variance. -rA + lam (r-1)^2; lam from a third-party re-implementation"""
    return -x.r * x.A + lam * (x.r - 1) ** 2

@objective("token-mean")
def dro(x, beta=0.1):
    """DRO as in verl, Kimi k1.5 (2501.12599): REINFORCE on a leash to the old policy. -A log pi + beta/2 (log r)^2"""
    return -x.A * x.logp + 0.5 * beta * x.d**2


# ---- Selections ----------------------------------------------------------------------------------------------

def covariance(x):
    """(A - mean A) (logp - mean logp) at each token: how fast raising it lowers the entropy (2505.22617)."""
    logp = x.logp.detach()
    return (x.A - x.mean(x.A)) * (logp - x.mean(logp))

@objective("token-mean")
def clip_cov(x, k=2e-4, cov_low=1.0, cov_high=5.0, eps_low=0.2, eps_high=0.2, seed=0):
    """Clip-Cov (2505.22617): PPO, and a random few (the share k of all tokens) of those with covariance within
    (cov_low, cov_high) lose their gradient. Batch statistics; sorts."""
    (low, high), cov = x.outside(eps_low, eps_high), covariance(x)
    candidate = (cov > cov_low) & (cov < cov_high) & ~(low | high) & (x.mask > 0)
    seed = seed + int(x.old_logp.abs().sum() * 1000)  # another draw for every batch, the same one if it is run again
    lot = torch.rand(cov.shape, generator=torch.Generator().manual_seed(seed)).to(cov.device)
    lot = lot.masked_fill(~candidate, -1).flatten()
    drawn = top(lot, (x.mask.sum().double() * k).floor().clamp(min=1)).view_as(candidate) & candidate
    return ppo(x, 1 - eps_low, 1 + eps_high).masked_fill(drawn, 0)

@objective("token-mean")
def kl_cov(x, k=0.002, beta=1.0):
    """KL-Cov (2505.22617): no clip at all; the share k of tokens with the highest covariance pays beta |log r|.
    Batch statistics; sorts."""
    cov = covariance(x).masked_fill(x.mask == 0, -math.inf).flatten()
    chosen = top(cov, (x.mask.sum().double() * k).floor().clamp(min=1)).view_as(x.mask)
    return -x.r * x.A + beta * x.d.abs() * chosen

@objective("token-mean", advantage="signed")
def psr_nsr(x, psr=0.1, nsr=1.0, eps_low=0.2, eps_high=0.2):
    """PSR / NSR (2506.01347): right (A > 0) and wrong responses scaled apart. Default W-REINFORCE; nsr=0 is PSR and
    psr=0 NSR: what has no weight leaves the mean."""
    x.A = x.A * torch.full_like(x.A, nsr).masked_fill(x.A > 0, psr)
    x.mask = x.mask * (x.A != 0) if psr * nsr == 0 else x.mask
    return ppo(x, 1 - eps_low, 1 + eps_high)


# ---- A divergence instead of the ratio -----------------------------------------------------------------------

@objective("seq-mean-token-sum-norm")
def dppo_tv(x, delta_low=0.15, delta_high=0.15, cap=20.0):
    """DPPO-TV (2602.04879): drop a token once its probability has moved by more than delta to where A pushes it."""
    return dppo(x, x.A.sign() * (x.p - x.q), delta_low, delta_high, cap)

@objective("seq-mean-token-sum-norm")
def dppo_kl(x, delta_low=0.05, delta_high=0.05, cap=20.0):
    """DPPO-KL (2602.04879): the same by the binary KL, q log(q/p) + (1-q) log((1-q)/(1-p))."""
    kl = -x.q * x.d.detach() + (1 - x.q) * ((1 - x.q + 1e-8) / (1 - x.p + 1e-8)).log()
    return dppo(x, kl * (x.A * (x.p - x.q) > 0), delta_low, delta_high, cap)

def dppo(x, moved, delta_low, delta_high, cap):
    """-sg[min(r, cap)] A log pi, zero where `moved` (>= 0 outward) is past its delta."""
    low, high = (x.A < 0) & (moved > delta_low), (x.A > 0) & (moved > delta_high)
    x.metrics.update(clip_low=x.mean(low), clip_high=x.mean(high))
    return -x.r.detach().clamp(max=cap) * ~(low | high) * x.A * x.logp
