"""Advantages, every clipping objective of the field side by side, and how token losses become one
number. It needs torch and no other file of ours: copy it.

    A = advantages(reward, group_size=8)                          # rewards (B,) to advantages (B,)
    loss, metrics = policy_loss("acpo", logp, old_logp, A, mask)  # logp, old_logp, mask (B,T)
    loss.backward()

The field argues over one line: what to do with the importance ratio, pi / pi_old, of a token. An
objective takes a Batch `b` and returns a loss per token, (B,T), as its paper writes it; autograd
does the rest. Each is a weight w on the policy gradient, grad loss = -mean(w grad log pi), and they
differ in w alone; without a clip, w = ratio A. Every family, from the top, changes one thing.
(sg[..]: a number without gradient. docs/objectives.md: official code.)
"""
import difflib
import inspect
import math
import torch

OBJECTIVES = {}  # name -> function, in reading order
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum",
                "seq-mean-token-sum-norm", "winning-groups")
ADVANTAGES = "grpo mean rloo maxrl gpg opo passk batch reinforce_pp reward signed".split()
def objective(agg, advantage="grpo", passes=({},), statistics=None, minibatch="groups"):
    """Register a function with what its published run needs. passes: hyper-parameters added in each
    pass over a rollout ({}: none); statistics(logp, old_logp, mask, **hyper): sums over the mini-
    batch, all ranks; minibatch: of whole "groups", or of some "samples" of every group."""
    def register(f):
        OBJECTIVES[f.__name__] = f
        f.agg, f.advantage, f.passes = agg, advantage, passes
        f.statistics, f.minibatch = statistics, minibatch
        return f
    return register
def advantages(reward, group_size, kind="grpo", length=None):
    """Rewards (B,), group after group of `group_size` samples of one prompt, to advantages (B,).
    length (B,): the tokens of each response, for opo and reinforce_pp."""
    check("advantage", kind, ADVANTAGES)
    if kind in ("reward", "signed"):  # no baseline; signed: 1 and 0 become 1 and -1
        return reward if kind == "reward" else 2 * reward - 1
    R = reward.view(-1, group_size)  # (groups, group_size)
    mean = R.mean(1, keepdim=True)
    A = R - mean  # kind "mean" (Dr. GRPO, 2503.20783) is done
    flat = R.amax(1, keepdim=True) == R.amin(1, keepdim=True)  # groups without signal
    tokens = torch.ones_like(R) if length is None else length.view_as(R).to(R)
    if kind == "grpo":  # 2402.03300
        A = A / (R.std(1, keepdim=True, correction=min(1, group_size - 1)) + 1e-6)
    elif kind == "rloo":  # 2402.14740: the mean of the OTHER samples is the baseline
        A = A * group_size / max(1, group_size - 1)
    elif kind == "maxrl":  # 2602.02710
        A = A / (mean + 1e-6)
    elif kind == "gpg":  # 2504.02546: make up for the groups without signal
        A = A * len(R) / (~flat).sum().clamp(min=1)
    elif kind == "opo":  # 2505.23585: long responses weigh more in the baseline, as in the gradient
        A = R - (tokens * R).sum(1, keepdim=True) / tokens.sum(1, keepdim=True)
    elif kind == "passk":  # 2503.19595: the best response alone, by what it adds to the second best
        second = R.topk(min(2, group_size), 1).values[:, -1:]
        A = (R - second).clamp(min=0)
    elif kind == "batch":  # 2508.08221: over the std of all rewards, not of the group's
        A = A / (R.std(correction=min(1, len(reward) - 1)) + 1e-6)
    elif kind == "reinforce_pp":  # 2501.03262: whitened over all tokens: long responses weigh more
        A = A - (tokens * A).sum() / tokens.sum()
        variance = (tokens * A**2).sum() / (tokens.sum() - 1).clamp(min=1)
        A = A / (variance + 1e-8).sqrt()
    return A.masked_fill(flat, 0).flatten()  # no signal: exactly 0, not rounding / 1e-6

def policy_loss(name, logp, old_logp, adv, mask, *, agg=None, entropy=None, sum_p2=None,
                pass_rate=None, group_size=None, max_len=None, totals=None, ref_logp=None,
                kl_beta=0.0, sampler_logp=None, correction=None, correction_args={}, **hyper):
    """Objective `name` on B responses of up to T tokens: (scalar loss, dict of detached metrics).
    logp (B,T) with gradient, old_logp (B,T): log pi of each token, now and when it was sampled
    adv (B,), (B,1) or (B,T);  pass_rate (B,): share of right answers in the row's group
    mask (B,T): 1 where a token counts; entropy, sum_p2 (B,T): of p over the vocabulary, now
    agg: one of AGGREGATIONS; group_size, max_len: what wapo and dr_grpo divide by, else B and T
    totals: "tokens", "sequences", "winning_groups" (of a cut group its part), "statistics" of the
        whole mini-batch of which these are some rows, so that micro-batches and ranks add up
    ref_logp (B,T), kl_beta: a penalty on the KL to a reference
    sampler_logp (B,T), of a sampler that is not pi_old; correction: one of CORRECTIONS, see there
    A NaN at a token that counts makes the loss NaN. Misuse raises ValueError or TypeError."""
    check("loss", name, OBJECTIVES)
    f = OBJECTIVES[name]
    for key in hyper:
        check(f"hyper-parameter of {name}", key, list(inspect.signature(f).parameters)[1:])
    if hyper.get("dual_clip") is not None and hyper["dual_clip"] <= 0:
        raise ValueError(f"dual_clip {hyper['dual_clip']} is not above 0; None switches it off")
    agg, group_size = agg or f.agg, group_size or len(mask)
    b = Batch(logp, old_logp, adv, mask, pass_rate=pass_rate, entropy=entropy, sum_p2=sum_p2,
              ref_logp=ref_logp, sampler_logp=sampler_logp)
    totals = dict(totals or {})  # what is not given is counted in these rows
    if f.statistics and "statistics" not in totals:
        totals["statistics"] = f.statistics(b.logp, b.old_logp, b.mask, **hyper)
    if agg == "winning-groups" and "winning_groups" not in totals:
        won = (b.seq_sum(b.A) > 0).view(-1, group_size)
        totals["winning_groups"] = won.any(1).sum()
    b.statistics = totals.get("statistics")
    loss = f(b, **hyper)  # (B,T)
    if correction is not None:
        check("correction", correction, CORRECTIONS)
        log_rho = b.old_logp - b.need("sampler_logp")
        weight = CORRECTIONS[correction](b, log_rho, **correction_args)
        b.metrics["masked"] = b.mean(weight == 0)
        loss = loss * torch.where(log_rho.isnan(), log_rho, weight)
    if ref_logp is not None:  # Schulman's k3, an estimate of KL(pi || reference), never negative
        to_ref = (b.ref_logp - b.logp).clamp(-20, 20)
        loss = loss + kl_beta * (to_ref.exp() - 1 - to_ref)
    loss = torch.where(b.log_ratio.isnan(), b.log_ratio, loss)  # NaN shows in any case
    loss = aggregate(loss, b.chosen, agg, totals, max_len or mask.shape[1], group_size)
    return loss, {key: value.detach() for key, value in b.metrics.items()}

class Batch:
    """What an objective sees: (B,T), outside the mask 0 (ratio, p, p_old: 1); None if not given.
    logp, log_ratio and ratio have a gradient. It may set A, ratio, `chosen`, add to `metrics`."""
    def __init__(self, logp, old_logp, adv, mask, **optional):
        self.keep = mask.bool()
        self.mask = self.keep.to(torch.promote_types(logp.dtype, torch.float32))
        self.chosen = self.mask  # the tokens that the loss is a mean of: a part of the mask
        self.logp = self.clean("logp", logp)
        self.old_logp = self.clean("old_logp", old_logp.detach())
        self.log_ratio = self.logp - self.old_logp
        # Within +-20 the ratio stays finite; beyond, its gradient ends, as in verl.
        self.ratio = self.log_ratio.clamp(-20, 20).exp()
        with torch.no_grad():
            self.p, self.p_old = self.logp.exp(), self.old_logp.exp()
            self.A = self.clean("adv", adv)
            for name, t in optional.items():  # pass_rate, entropy, sum_p2, ref_logp, sampler_logp
                setattr(self, name, None if t is None else self.clean(name, t))
            self.metrics = general_metrics(self)
    def clean(self, name, t):
        if name in ("adv", "pass_rate") and t.numel() == len(self.keep):  # (B,) or (B,1)
            t = t.reshape(-1, 1).expand(self.keep.shape)
        if t.shape != self.keep.shape:
            raise ValueError(f"{name} {tuple(t.shape)} does not fit mask {tuple(self.keep.shape)}")
        # Before any exp or product: padding may hold anything, and inf * 0 is nan.
        return torch.where(self.keep, t.to(self.mask.dtype), 0)
    def mean(self, t):  # over all tokens
        return (t * self.mask).sum() / self.mask.sum().clamp(min=1)
    def seq_sum(self, t):  # over each response: (B,1)
        return (t * self.mask).sum(1, keepdim=True)
    def seq_mean(self, t):
        return self.seq_sum(t) / self.mask.sum(1, keepdim=True).clamp(min=1)
    def as_ratio(self, w):  # value w, gradient w grad log pi, as exp(x - sg[x]) is 1
        return w.detach() * (self.logp - self.logp.detach()).exp()
    def by_sign(self, winner, loser):  # one number where A > 0, another elsewhere
        return torch.full_like(self.A, loser).masked_fill(self.A > 0, winner)
    def need(self, name):
        if getattr(self, name) is None:
            raise ValueError(f"this loss needs {name}=; policy_loss says what that is")
        return getattr(self, name)
def outside(b, low, high, dual_clip=None, value=None):
    """The tokens that PPO stops: losers below the band or beyond the dual clip, winners above.
    Their shares go into the metrics. value: what is compared with the band, the ratio as a rule."""
    value = b.ratio if value is None else value
    most = math.inf if dual_clip is None else dual_clip
    stop = (value < low) | (value > most)
    losers, winners = (b.A < 0) & stop, (b.A > 0) & (value > high)
    b.metrics["clip_low"] = b.mean(losers * b.chosen)
    b.metrics["clip_high"] = b.mean(winners * b.chosen)
    return losers, winners
def clip(b, low, high, dual_clip=None):
    """PPO (1707.06347): -min(ratio A, clamp(ratio, low, high) A). Outside the band the ratio stops
    paying, in the direction in which A pushes it. low and high: both numbers or both tensors.
    Dual clip c (1912.09729): a loser costs c |A| at most, so beyond c its gradient ends as well."""
    outside(b, low, high, dual_clip)  # for the metrics
    loss = -torch.minimum(b.ratio * b.A, b.ratio.clamp(low, high) * b.A)
    return loss if dual_clip is None else torch.minimum(loss, dual_clip * b.A.abs())
# ---- 1. A fixed band around ratio 1 --------------------------------------------------------------
@objective("seq-mean-token-mean")
def grpo(b, eps_low=0.2, eps_high=0.2, dual_clip=None, delta=math.inf):
    """GRPO (2402.03300): PPO's clip, the group as baseline; every response counts the same."""
    b.ratio = b.ratio.clamp(max=delta)  # a cap for winners and losers (2505.07291)
    return clip(b, 1 - eps_low, 1 + eps_high, dual_clip)
@objective("seq-mean-token-sum-norm", advantage="mean")
def dr_grpo(b, eps_low=0.2, eps_high=0.2, dual_clip=None):
    """Dr. GRPO (2503.20783): GRPO not divided by the group's std, nor by the response's length."""
    return clip(b, 1 - eps_low, 1 + eps_high, dual_clip)
@objective("token-mean")
def dapo(b, eps_low=0.2, eps_high=0.28, dual_clip=10.0, delta=math.inf):
    """DAPO (2503.14476): clip higher, room for unlikely tokens to grow; all tokens count alike."""
    return grpo(b, eps_low, eps_high, dual_clip, delta)
@objective("seq-mean-token-mean")
def kl3(b, delta=0.1, dual_clip=None):
    """KL3 / ATR-GRPO (2602.05494): the band where ratio - 1 - log ratio, a KL, is below delta."""
    return clip(b, *kl3_bounds(delta), dual_clip)
def kl3_bounds(delta):  # both roots of ratio - 1 - log ratio = delta, by Newton in log ratio
    roots = [-1 - delta, 1 + math.sqrt(2 * delta)]  # both start too far out
    for _ in range(60):
        roots = [x - (math.expm1(x) - x - delta) / math.expm1(x) for x in roots]
    return [math.exp(x) for x in roots]
@objective("token-mean", advantage="signed")
def psr_nsr(b, psr=0.1, nsr=1.0, eps_low=0.2, eps_high=0.2):
    """W-REINFORCE (2506.01347): winners times psr, losers times nsr; 0: not in the mean."""
    b.A = b.A * b.by_sign(psr, nsr)
    b.chosen = b.mask if psr and nsr else b.mask * (b.A != 0)
    return clip(b, 1 - eps_low, 1 + eps_high)
@objective("winning-groups", advantage="mean", minibatch="samples")
def wapo(b, eps=9.0):
    """WAPO (2606.16154): winners only, clipped above only. -min(ratio, 1 + eps) A"""
    b.A = b.A * (b.seq_mean(b.A) > 0)  # whole responses win or do not
    return clip(b, 0.0, 1 + eps)  # no ratio is below 0
# ---- 2. A band that adapts: to the probability, to the group, to the batch -----------------------
def bin_of(p, bins):  # which of equal bins, the last one closed; NaN must not become an index
    return (p * bins).nan_to_num(0).clamp(0, bins - 1).long()
@torch.no_grad()
def ratio_moments(logp, old_logp, mask, bins=5, **_):
    """(3, bins as in acpo) by exp(logp): tokens, sum of ratio - 1 (more digits), of its square."""
    log_ratio = torch.where(mask.bool(), logp.double() - old_logp.double(), 0)
    excess = log_ratio.clamp(-20, 20).expm1()
    values = torch.stack([mask.double(), excess, excess**2]).flatten(1)  # (3, B T)
    return values.new_zeros(3, bins).index_add_(1, bin_of(logp.exp(), bins).flatten(), values)
@objective("seq-mean-token-mean", statistics=ratio_moments)
def acpo(b, alpha=3.0, eps=0.2, eps_min=0.0, eps_max=3.0, bins=5, dual_clip=3.0):
    """ACPO (2606.22570): unlikely tokens have noisier ratios and get more room. The band is
    1 +- clamp(eps + alpha std(ratio), eps_min, eps_max), the std by bins of current probability."""
    mean, square = b.statistics[1:] / b.statistics[0].clamp(min=1)  # of ratio - 1, by bins
    std = ((square - mean**2).clamp(min=0) + 1e-8).sqrt().to(b.mask)
    width = (eps + alpha * std).clamp(eps_min, eps_max)  # (bins,)
    for i in range(bins):
        b.metrics.update({f"std_bin{i}": std[i], f"eps_bin{i}": width[i]})
    width = width[bin_of(b.p, bins)]  # (B,T)
    return clip(b, 1 - width, 1 + width, dual_clip)
@objective("seq-mean-token-mean")
def etr(b, eps=0.2, micro=0.5, macro=0.5):
    """ETR (2601.03723; form and constants OURS): a band by |A| and the variance of the group."""
    c = b.need("pass_rate")
    width = eps * (1 + macro * 4 * c * (1 - c)) * (1 + micro * b.A.abs().tanh())
    return clip(b, 1 - width, 1 + width)
@objective("token-mean")
def dcpo(b, eps_low=0.16, eps_high=0.20, dual_clip=10.0):
    """DCPO (2509.02333): |ratio - 1| ratio p_old <= eps, solved for the ratio: wide if unlikely."""
    low = (1 + (1 - 4 * eps_low / b.p_old).clamp(min=0).sqrt()) / 2
    high = (1 + (1 + 4 * eps_high / b.p_old).sqrt()) / 2  # ends at 10, or at a larger dual clip
    return clip(b, low, high.clamp(max=max(dual_clip or 0, 10.0)), dual_clip)
@objective("token-mean")
def bapo(b, low=(0.6, 0.9), high=(1.2, 3.0), step=0.05, target=1.0, dual_clip=3.0):
    """BAPO (2510.18927): raise a band's lower, then upper end until winners outweigh losers."""
    steps = round((high[1] - high[0]) / step)  # low at once, as that only adds to the losers
    walk = [(low[0], high[0])] + [(low[1], high[0] + step * i) for i in range(steps + 1)]
    for lower, upper in walk:
        won = (b.ratio.clamp(max=upper) * b.A.clamp(min=0)).sum()
        lost = (b.ratio.clamp(min=lower) * b.A.clamp(max=0)).sum()
        if won >= -target * lost:
            break
    b.metrics.update(band_low=b.mask.new_tensor(lower), band_high=b.mask.new_tensor(upper))
    return clip(b, lower, upper, dual_clip)
@objective("token-mean")
def m2po(b, budget=0.04, eps_low=0.3, eps_high=0.5):
    """M2PO (2510.01161): the widest band e^-t .. e^t with mean min(|log ratio|, t)^2 <= budget."""
    outward = b.mask * (b.A * b.log_ratio > 0)  # where A pushes on: the mean is over these tokens
    square = b.log_ratio.detach().clamp(-20, 20) ** 2 * outward  # (B,T)
    t, end = b.mask.new_tensor([0.0, 20.0])  # no |log ratio| is larger: at 20 nothing is clipped
    for _ in range(50):  # halve the interval that holds t
        middle = (t + end) / 2
        fits = square.clamp(max=middle**2).sum() <= budget * outward.sum()
        t, end = torch.where(fits, middle, t), torch.where(fits, end, middle)
    low = (-t).exp().clamp(max=1 - eps_low)  # the band is at least 1 - eps_low .. 1 + eps_high
    high = t.exp().clamp(min=1 + eps_high)
    b.metrics.update(band_low=low, band_high=high)
    return clip(b, low, high)
# ---- 3. The ratio of the whole response, or of its prefix, instead of the token's ----------------
@objective("seq-mean-token-mean")
def gspo(b, eps_low=3e-4, eps_high=4e-4):
    """GSPO (2507.18071): clip whole responses, by s = exp(mean log ratio); here in token form."""
    b.ratio = b.as_ratio(b.seq_mean(b.log_ratio).clamp(max=10).exp())  # finite
    return clip(b, 1 - eps_low, 1 + eps_high)
@objective("seq-mean-token-sum")
def luspo(b, eps_low=0.2, eps_high=0.2):
    """LUSPO (2602.05261): GSPO times the length, or long responses would learn less per token."""
    return gspo(b, eps_low, eps_high)
@objective("seq-mean-token-mean")
def gmpo(b, eps_low=0.4, eps_high=0.4):
    """GMPO (2507.20673): PPO's clip in log space, then the geometric mean of the response."""
    losers, winners = outside(b, math.exp(-eps_low), math.exp(eps_high))
    clipped = b.log_ratio.masked_fill(losers, -eps_low).masked_fill(winners, eps_high)
    return -b.A * b.seq_mean(clipped).clamp(max=20).exp()
@objective("token-mean")
def ctpo(b, eps_low=0.025, eps_high=0.05, dual_clip=0.05, power=0.5):
    """CTPO (2605.07331): the ratio of the prefix up to token t, in a band of exp(+-eps t^power)."""
    b.ratio = b.as_ratio(b.log_ratio.cumsum(1).clamp(max=10).exp())  # finite as in gspo
    walk = b.mask.cumsum(1).clamp(min=1) ** power  # as far as t random steps lead
    low, high = (-eps_low * walk).exp(), (eps_high * walk).exp()
    if dual_clip is not None:  # given as an eps, for a loser's upper bound
        dual_clip = (dual_clip * walk).exp()
    return clip(b, low, high, dual_clip)
@objective("token-mean")
def vespo(b, k_pos=2.0, lam_pos=3.0, k_neg=3.0, lam_neg=2.0):
    """VESPO (2602.10693): -sg[W^k exp(lam (1 - W))] A log pi, W the product of all ratios."""
    log_w = b.seq_sum(b.log_ratio.detach().clamp(-20, 20)).clamp(math.log(1e-8), 20)
    k, lam = b.by_sign(k_pos, k_neg), b.by_sign(lam_pos, lam_neg)
    return -(k * log_w + lam * (1 - log_w.exp())).exp() * b.A * b.logp
@objective("seq-mean-token-sum", advantage="signed")
def topr(b):
    """TOPR (2503.14286): winners as plain REINFORCE, losers times min(product of ratios, 1)."""
    w = b.seq_sum(b.log_ratio.detach()).clamp(max=0).exp()  # (B,1), never above 1
    return -torch.where(b.A > 0, 1, w) * b.A * b.logp
# ---- 4. Another weight: capped, bent or smooth, and by another measure than the ratio ------------
@objective("token-mean")
def cispo(b, eps_low=1.0, eps_high=0.3):
    """CISPO (2506.13585): -sg[clamp(ratio)] A log pi. Clips the weight and drops no token."""
    outside(b, 1 - eps_low, 1 + eps_high)  # for the metrics
    return -b.ratio.detach().clamp(1 - eps_low, 1 + eps_high) * b.A * b.logp
@objective("seq-mean-token-mean")
def cispo_masked(b, is_low=1.0, is_high=0.45, eps_low=0.2, eps_high=0.3):
    """CISPO with its eq. 7, as ACPO's baseline: what PPO stops is dropped, the rest capped."""
    losers, winners = outside(b, 1 - eps_low, 1 + eps_high)
    return -b.ratio.detach().clamp(1 - is_low, 1 + is_high) * ~(losers | winners) * b.A * b.logp
@objective("token-mean")
def gppo(b, eps_low=0.2, eps_high=0.28, dual_clip=10.0):
    """GPPO (2508.07629): DAPO's value, but a clipped token keeps the gradient of its bound."""
    return ce_gppo(b, 1.0, 1.0, eps_low, eps_high, dual_clip)
@objective("token-mean")
def ce_gppo(b, beta_low=0.75, beta_high=1.0, eps_low=0.2, eps_high=0.2, dual_clip=10.0):
    """CE-GPPO (2509.20712): GPPO, that gradient times beta_low below the band, beta_high above."""
    losers, winners = outside(b, 1 - eps_low, 1 + eps_high)
    bound = b.as_ratio(b.by_sign(beta_high * (1 + eps_high), beta_low * (1 - eps_low)))
    ratio = torch.where(losers | winners, bound, b.ratio)  # what PPO would stop keeps learning
    if dual_clip is not None:
        ratio = ratio.masked_fill((b.A < 0) & (b.ratio > dual_clip), dual_clip)
    return -ratio * b.A
@objective("token-mean")
def dgpo(b, eps_low=0.2, eps_high=0.28, n=1.0, m=2.0):
    """DGPO (2603.14389): at the band the weight bends instead of breaking off."""
    losers, winners = outside(b, 1 - eps_low, 1 + eps_high)
    below = b.ratio * (b.ratio / (1 - eps_low)) ** n
    above = b.ratio ** (1 - 1 / m) * (1 + eps_high) ** (1 / m)
    w = torch.where(losers, below, torch.where(winners, above, b.ratio))
    return -b.as_ratio(w) * b.A
@objective("token-mean")
def aspo(b, eps=0.2, eps_entropy=0.4, quantile=0.8, dual_clip=3.0):
    """ASPO (2510.06062): for winners the ratio upside down: unlikely tokens learn faster."""
    eps = torch.full_like(b.A, eps)  # eps_entropy: of each response's most uncertain tokens
    if b.entropy is not None:
        seen = b.entropy.masked_fill(~b.keep, torch.nan)
        eps[seen > seen.nanquantile(quantile, dim=1, keepdim=True)] = eps_entropy
    losers, winners = outside(b, 1 - eps, 1 + eps)
    w = torch.where(b.A > 0, 1 / b.ratio, b.ratio).detach()
    ratio = b.as_ratio(w)
    if dual_clip is not None:  # official code: beyond it the gradient is dual_clip A
        ratio = torch.where(w > dual_clip, dual_clip * b.logp, ratio)
    return -b.A * torch.where(winners, 1 / (1 + eps), torch.where(losers, 1 - eps, ratio))
@objective("seq-mean-token-sum-norm")
def dppo_tv(b, delta_low=0.15, delta_high=0.15, cap=20.0):
    """DPPO-TV (2602.04879): drop a token once A has moved its PROBABILITY by more than delta."""
    return dppo(b, b.p - b.p_old, delta_low, delta_high, cap)
@objective("seq-mean-token-sum-norm")
def dppo_kl(b, delta_low=0.05, delta_high=0.05, cap=20.0):
    """DPPO-KL (2602.04879): the same by the KL of two outcomes, this token or any other."""
    others = ((1 - b.p_old + 1e-8) / (1 - b.p + 1e-8)).log()  # 1e-8: p may round to 1
    kl = (1 - b.p_old) * others - b.p_old * b.log_ratio.detach()
    return dppo(b, kl * (b.p - b.p_old).sign(), delta_low, delta_high, cap)
def dppo(b, moved, delta_low, delta_high, cap):  # moved: negative where p went down
    losers, winners = outside(b, -delta_low, delta_high, value=moved)
    return -b.ratio.detach().clamp(max=cap) * ~(losers | winners) * b.A * b.logp
@objective("token-mean")
def ipo(b, eps=0.1, k=1e-3):
    """IPO (prime-rl): -ratio A, 0 where |p - p_old| > eps either way; k (log ratio)^2 anywhere."""
    far = (b.p - b.p_old).abs() > eps
    b.metrics["clip_low"] = b.mean(far & (b.A < 0))
    b.metrics["clip_high"] = b.mean(far & (b.A > 0))
    return -b.ratio * ~far * b.A + k * b.log_ratio**2
@objective("seq-mean-token-mean")
def sapo(b, tau_pos=1.0, tau_neg=1.05):
    """SAPO (2511.20347): -4/tau sigmoid(tau (ratio - 1)) A, whose w falls off smoothly."""
    tau = b.by_sign(tau_pos, tau_neg)
    return -4 / tau * torch.sigmoid(tau * (b.ratio - 1)) * b.A
@objective("token-mean")
def cfpo(b, eps=0.2):
    """CFPO (2601.22801): a spring, not a clip. -ratio A + |A| (ratio - 1)^2 / (2 eps)"""
    return -b.ratio * b.A + b.A.abs() * ((b.ratio - 1) ** 2 / (2 * eps))
@objective("token-mean")
def dro(b, beta=0.1):
    """DRO (2501.12599): REINFORCE on a leash. -A log pi + beta/2 (log ratio)^2"""
    return -b.A * b.logp + beta / 2 * b.log_ratio**2
# ---- 5. Which tokens may learn, and how much -----------------------------------------------------
def top(score, mask, share):  # True at that share of each row's largest scores, at least at one
    n = (mask.sum(1, keepdim=True).double() * share).floor().clamp(min=1)  # next: ranks, from 0
    rank = score.masked_fill(mask == 0, -math.inf).argsort(-1, descending=True).argsort(-1)
    return (rank < n) & (mask > 0)
def top_of_batch(b, score, share):
    return top(score.view(1, -1), b.mask.view(1, -1), share).view_as(score)
@objective("seq-mean-token-mean")
def entropy_top(b, ratio=0.2, eps_low=0.2, eps_high=0.3, dual_clip=3.0):
    """80/20 (2506.01939), as ACPO's baseline: only each response's tokens with the most entropy."""
    b.chosen = b.mask * top(b.need("entropy"), b.mask, ratio)  # ratio: that share, not pi / pi_old
    return clip(b, 1 - eps_low, 1 + eps_high, dual_clip)
@objective("seq-mean-token-mean")
def entropy_bottom(b, ratio=0.8, eps_low=0.2, eps_high=0.3, dual_clip=3.0):
    """Its control: the tokens with the least entropy."""
    b.chosen = b.mask * top(-b.need("entropy"), b.mask, ratio)
    return clip(b, 1 - eps_low, 1 + eps_high, dual_clip)
@objective("seq-mean-token-mean", passes=({"part": "low"}, {"part": "high"}))
def ar_lopti(b, alpha=0.3, eta=0.5, part=None, eps_low=0.2, eps_high=0.24, dual_clip=3.0):
    """AR-Lopti (2505.12929): A scaled by alpha p_old + 1 - alpha; first the tokens below eta."""
    b.A = b.A * (alpha * b.p_old + 1 - alpha)
    if part is not None:
        check("part", part, ("low", "high"))
        b.A = b.A * ((b.p_old < eta) == (part == "low"))
    return clip(b, 1 - eps_low, 1 + eps_high, dual_clip)
@objective("token-mean")
def fipo(b, eps_low=0.2, eps_high=0.28, half_life=32.0, most=1.2, safe=4.0):
    """FIPO (2603.19835): DAPO, a token weighted by how the rest of its response has moved."""
    # Each token's log ratio + those of the next n - 1, of which half is left per half_life tokens.
    future, n = b.log_ratio.detach().clone(), 1  # (B,T)
    while n < future.shape[1]:  # n doubles: its own sum + that of the token n further on
        future[:, :-n] += 2 ** (-n / half_life) * future[:, n:]
        n = 2 * n
    w = future.exp().clamp(1, most)
    return dapo(b, eps_low, eps_high) * w.masked_fill((b.A < 0) & (b.ratio > safe), 1)
def covariance(b):  # how fast raising the token lowers the entropy
    return (b.A - b.mean(b.A)) * (b.logp - b.mean(b.logp)).detach()
@objective("token-mean")
def clip_cov(b, k=2e-4, cov_low=1.0, cov_high=5.0, eps_low=0.2, eps_high=0.2, seed=0):
    """Clip-Cov (2505.22617): PPO, but a random few of the tokens of high covariance drop out."""
    losers, winners = outside(b, 1 - eps_low, 1 + eps_high)
    cov = covariance(b)
    candidate = (cov > cov_low) & (cov < cov_high) & ~(losers | winners) & b.keep
    seed = seed + int(b.old_logp.nan_to_num(0, 0, 0).abs().sum() * 1000)  # each batch its draw
    lot = torch.rand(cov.shape, generator=torch.Generator().manual_seed(seed)).to(cov.device)
    drawn = candidate & top_of_batch(b, lot.masked_fill(~candidate, -1), k)
    return clip(b, 1 - eps_low, 1 + eps_high).masked_fill(drawn, 0)
@objective("token-mean")
def kl_cov(b, k=0.002, beta=1.0):
    """KL-Cov (2505.22617): no clip; the share k with the highest covariance pays |log ratio|."""
    return -b.ratio * b.A + beta * b.log_ratio.abs() * top_of_batch(b, covariance(b), k)
# ---- 6. No clip, or no ratio ---------------------------------------------------------------------
@objective("token-mean")
def reinforce(b):
    """REINFORCE with an importance weight, as of tinker and SkyRL; no clip. -ratio A"""
    return -b.ratio * b.A
@objective("token-mean")
def up_grpo(b, eps_low=0.2, dual_clip=3.0):
    """UP-GRPO (2607.06987): winners as in REINFORCE, without ratio or bound; losers as in PPO."""
    b.ratio = torch.where(b.A > 0, b.as_ratio(b.mask), b.ratio)
    return clip(b, 1 - eps_low, math.inf, dual_clip)
@objective("token-mean", advantage="gpg")
def gpg(b):
    """GPG (2504.02546): plain policy gradient, A made up for groups without signal. -A log pi"""
    return -b.A * b.logp
@objective("seq-mean-token-sum", advantage="rloo")
def rloo(b):
    """RLOO (2402.14740): REINFORCE, the other samples' mean as baseline. -A log pi"""
    return -b.A * b.logp
@objective("seq-mean-token-mean", advantage="reward")
def raft(b):
    """RAFT (2504.11343): maximum likelihood of the winners. -max(A, 0) log pi"""
    return -b.A.clamp(min=0) * b.logp
# ---- The sampler is not the trainer: a weight for any loss, from rho = pi_old / pi_sampler -------
# f(b, log_rho (B,T), bounds): (B,T) or (B,1). A token of weight 0 stays in the mean, not in verl's.
def tis(b, log_rho, high=2.0):  # truncated importance sampling, verl's bound
    return log_rho.exp().clamp(max=high)
def icepop(b, log_rho, low=0.5, high=5.0):  # IcePop (2510.18855): dropped outside a band
    rho = log_rho.exp()
    return rho.masked_fill((rho < low) | (rho > high), 0)
def seq_tis(b, log_rho, high=2.0):  # by the response's product of rho, verl's bound again
    return tis(b, b.seq_sum(log_rho), high)
def seq_mis(b, log_rho, low=0.0, high=3.0):  # the same, dropped outside: TRL's default
    return icepop(b, b.seq_sum(log_rho), low, high)
def geo_mis(b, log_rho, low=0.99, high=1.01):  # a mask by the geometric mean of rho, SkyRL's
    return icepop(b, b.seq_mean(log_rho), low, high) > 0
def opsm(b, log_rho, delta=1e-4):  # OPSM (2512.02556) drops losers that pi has left; slime
    return (b.A >= 0) | (b.seq_mean(log_rho + b.log_ratio) >= -delta)
CORRECTIONS = {f.__name__: f for f in (tis, icepop, seq_tis, seq_mis, geo_mis, opsm)}
# ---- From token losses to one number, and metrics ------------------------------------------------
def aggregate(loss, mask, agg, totals, max_len, group_size):
    """(B,T) to a scalar; `totals`: see policy_loss. Empty responses do not count."""
    check("agg", agg, AGGREGATIONS)
    tokens = mask.sum(1)  # (B,)
    loss = (loss * mask).sum(1)  # (B,)
    scale = totals.get("sequences", (tokens > 0).sum())  # as it stays for seq-mean-token-sum
    if agg == "token-mean":
        scale = totals.get("tokens", tokens.sum())
    elif agg == "seq-mean-token-mean":
        loss = loss / tokens.clamp(min=1)
    elif agg == "seq-mean-token-sum-norm":  # Dr. GRPO: a constant length favours no response
        scale = scale * max_len
    elif agg == "winning-groups":  # WAPO
        scale = (totals["winning_groups"] or 1) * max_len * group_size
    return loss.sum() / torch.as_tensor(scale).clamp(min=1)
def general_metrics(b):
    """Means over tokens, which parts can merge; ratio_std merges by way of ratio_sq."""
    mean, zero = b.mean(b.ratio), b.mask.new_zeros(())
    metrics = {"clip_low": zero, "clip_high": zero, "ratio_mean": mean,
               "approx_kl": b.mean(b.ratio - 1 - b.log_ratio.clamp(-20, 20)),
               "ratio_sq": b.mean((b.ratio - 1)**2), "ratio_std": b.mean((b.ratio - mean)**2)**0.5}
    if b.sum_p2 is not None:  # WAPO's cells. A peak is likelier than a draw is on average, sum p^2
        peak, won = b.p >= b.sum_p2, b.A >= 0
        metrics |= {"pos_peak": b.mean(won & peak), "pos_valley": b.mean(won & ~peak),
                    "neg_peak": b.mean(~won & peak), "neg_valley": b.mean(~won & ~peak)}
    return metrics
def check(what, name, known):  # a misspelt name is answered with those that resemble it
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 3, 0.4) or known
        raise ValueError(f"unknown {what} {name!r}; nearest: {', '.join(near) or 'there are none'}")
