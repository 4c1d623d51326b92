"""Advantages, the clipping objectives of the field side by side, and how token losses become one number.

The field argues over one line: what to do with the importance ratio r = pi/pi_old. Every objective below takes a
Batch `x` and returns a loss per token, (B,T), as its paper writes it; autograd does the rest. Each of them is a weight
w on the policy gradient,  grad loss = -Agg(w grad log pi),  and they differ only in what w makes of r, A, p, ...

    loss, metrics = policy_loss("acpo", logp, old_logp, adv, mask)

Read downwards: each family changes one thing. README.md has the table of papers, official code and where the two
disagree; tests/test_losses.py has the official numbers; experiments/more_objectives.py has the rest of the field.
"""
import difflib
import inspect
import math
from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor

OBJECTIVES: dict[str, Callable] = {}  # name -> objective, in reading order
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "winning-groups")
ADVANTAGES = ("grpo", "mean", "rloo", "maxrl", "gpg", "reinforce_pp", "reward", "signed")


def objective(agg, advantage="grpo"):
    """Register the function below under its own name, with the aggregation and the advantage of its published run."""
    def register(f):
        f.agg, f.advantage = agg, advantage
        OBJECTIVES[f.__name__] = f
        return f
    return register


def check(what, name, known):  # a misspelt name is answered with those it resembles
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 3, 0.4) or known
        raise ValueError(f"unknown {what} {name!r}; nearest: {', '.join(near) or 'there are none'}")


def advantages(reward: Tensor, group_size: int, kind: str = "grpo", length: Tensor | None = None) -> Tensor:
    """Rewards (B,), group after group of `group_size` samples of one prompt, to advantages (B,). With a baseline, a
    group of equal rewards gets exactly 0 (rounding / 1e-6 would not be). `length` (B,) is for reinforce_pp alone."""
    check("advantage", kind, ADVANTAGES)
    R = reward.view(-1, group_size)
    mean, flat = R.mean(1, keepdim=True), R.amax(1, keepdim=True) == R.amin(1, keepdim=True)
    A = (R - mean).masked_fill(flat, 0)
    if kind == "grpo":  # 2402.03300; one sample has no spread: flat
        A = A / (R.std(1, keepdim=True) + 1e-6) if group_size > 1 else A
    elif kind == "rloo":  # 2402.14740: the mean of the OTHER samples is the baseline
        A = A * group_size / max(1, group_size - 1)
    elif kind == "maxrl":  # 2602.02710
        A = A / (mean + 1e-6)
    elif kind == "gpg":  # 2504.02546: make up for the groups that carry no signal
        A = A * len(R) / (~flat).sum().clamp(min=1)
    elif kind == "reinforce_pp":  # 2501.03262: whitened over all tokens, so that long responses weigh more
        n = length.view_as(R).to(R)
        A = A - (n * A).sum() / n.sum()
        A = (A / ((n * A * A).sum() / (n.sum() - 1).clamp(min=1) + 1e-8).sqrt()).masked_fill(flat, 0)
    elif kind in ("reward", "signed"):  # no baseline
        A = R if kind == "reward" else 2 * R - 1
    return A.flatten()  # mean: Dr. GRPO, 2503.20783


@dataclass
class Batch:
    """What an objective sees: (B,T) tensors, zero outside the mask, unless said otherwise."""
    logp: Tensor  # log pi of the sampled token, the only one with gradient
    old_logp: Tensor
    d: Tensor  # log ratio, logp - old_logp
    r: Tensor  # importance ratio e^d; d within +-20 keeps it finite and, as in verl, ends the gradient beyond
    p: Tensor  # probability of the token now, no gradient ...
    q: Tensor  # ... and when it was sampled
    one: Tensor  # value 1, gradient grad log pi: w * one has value w and weight w
    A: Tensor
    mask: Tensor
    entropy: Tensor | None
    sum_p2: Tensor | None
    pass_rate: Tensor | None  # (B,1), the share of right answers in the row's group
    group_size: int
    totals: dict
    metrics: dict = field(default_factory=dict)

    def seq_sum(self, t):  # over a response: (B,1)
        return (t * self.mask).sum(1, keepdim=True)

    def seq_mean(self, t):
        return self.seq_sum(t) / self.mask.sum(1, keepdim=True).clamp(min=1)

    def mean(self, t):  # over all tokens
        return (t * self.mask).sum() / self.mask.sum().clamp(min=1)

    def need(self, name):
        if getattr(self, name) is None:
            raise ValueError(f"this loss needs {name}=: policy_loss says what that is")
        return getattr(self, name)

    def outside(self, eps_low, eps_high):  # where A pushes the ratio further out of the band: what PPO stops
        low, high = (self.A < 0) & (self.r < 1 - eps_low), (self.A > 0) & (self.r > 1 + eps_high)
        self.metrics.update(clip_low=self.mean(low), clip_high=self.mean(high))
        return low, high


def ppo(x, low, high, dual_clip=None, r=None):
    """max(-rA, -clamp(r, low, high) A): outside the band the ratio stops paying, in the direction in which A pushes it.
    Dual clip c (1912.09729): min(that, -cA) where A < 0, so that r > c ends the gradient there too."""
    r = x.r if r is None else r
    loss = torch.maximum(-r * x.A, -r.clamp(min=low).clamp(max=high) * x.A)
    stop = r < low
    if dual_clip is not None:
        loss = torch.minimum(loss, dual_clip * x.A.abs())  # where A > 0 the loss is below 0 anyway
        stop = stop | (r > dual_clip)
    x.metrics.update(clip_low=x.mean((x.A < 0) & stop), clip_high=x.mean((x.A > 0) & (r > high)))
    return loss


# ---- 1. A fixed band around ratio 1 --------------------------------------------------------------------------

@objective("seq-mean-token-mean")
def grpo(x, eps_low=0.2, eps_high=0.2, dual_clip=None):
    """GRPO (2402.03300): PPO's clip with the group as baseline; every response counts the same."""
    return ppo(x, 1 - eps_low, 1 + eps_high, dual_clip)

@objective("seq-mean-token-sum-norm", advantage="mean")
def dr_grpo(x, eps_low=0.2, eps_high=0.2, dual_clip=None):
    """Dr. GRPO (2503.20783): GRPO without two biases, division by the group's std and by the response's length."""
    return ppo(x, 1 - eps_low, 1 + eps_high, dual_clip)

@objective("token-mean")
def dapo(x, eps_low=0.2, eps_high=0.28, dual_clip=10.0):
    """DAPO (2503.14476): clip higher, so that unlikely tokens have room to grow; every token counts the same."""
    return ppo(x, 1 - eps_low, 1 + eps_high, dual_clip)

def kl3_bounds(delta):
    """The two roots (l, u) of w - 1 - log w = delta >= 0, by Newton in log w: l < 1 < u, and u - 1 > 1 - l."""
    def root(y):
        for _ in range(60):
            y -= (math.expm1(y) - y - delta) / math.expm1(y)
        return math.exp(y)
    return (root(-1 - delta), root(math.sqrt(2 * delta))) if delta > 0 else (1.0, 1.0)

@objective("seq-mean-token-mean")
def kl3(x, delta=0.1, dual_clip=None):
    """KL3 / ATR-GRPO (2602.05494): the band where the KL estimate r - 1 - log r <= delta; wider above than below."""
    return ppo(x, *kl3_bounds(delta), dual_clip)

@objective("seq-mean-token-mean", advantage="reward")
def raft(x):
    """RAFT (2504.11343): maximum likelihood on the winners. -max(A, 0) log pi"""
    return -x.A.clamp(min=0) * x.logp

@objective("winning-groups", advantage="mean")
def wapo(x, eps=9.0):
    """WAPO (2606.16154): winners only, clipped above only. -min(rA, min(r, 1+eps) A) where A > 0, else 0"""
    x.A = x.A * (x.seq_mean(x.A) > 0)
    return ppo(x, 0.0, 1 + eps)


# ---- 2. A band that adapts -----------------------------------------------------------------------------------

def bins_of(p, bins):  # [b/K, (b+1)/K), the last one closed
    return (p * bins).clamp(max=bins - 1).long()

def moments_of(bin, excess, mask, bins):  # excess: r - 1, zero outside the mask
    values = torch.stack([mask, excess, excess**2]).double().flatten(1)
    return values.new_zeros(3, bins).scatter_add_(1, bin.flatten().expand(3, -1), values)

@torch.no_grad()
def ratio_moments(logp, old_logp, mask, bins=5):
    """(3, bins) float64: count, sum of r - 1 and of (r - 1)^2 over the tokens in each of `bins` equal bins of the
    current probability. Sums of micro-batches and ranks add up; centred at 1, so that the variance keeps its digits."""
    logp, old_logp = (torch.where(mask.bool(), t, 0) for t in (logp, old_logp))
    excess = (logp - old_logp).clamp(-20, 20).expm1()
    return moments_of(bins_of(logp.exp(), bins), excess, mask.to(excess), bins)

@objective("seq-mean-token-mean")
def acpo(x, alpha=3.0, eps=0.2, eps_min=0.0, eps_max=3.0, bins=5, dual_clip=3.0):
    """ACPO (2606.22570): unlikely tokens have noisier ratios. Band 1 -+ clip(eps + alpha std(r), eps_min, eps_max), the
    std per bin of current probability, from totals["moments"] if given, else over these rows (official)."""
    bin, moments = bins_of(x.p, bins), x.totals.get("moments")
    if moments is None:
        moments = moments_of(bin, (x.r.detach() - 1) * x.mask, x.mask, bins)
    mean, square = moments[1:] / moments[0].clamp(min=1)
    std = ((square - mean**2).clamp(min=0) + 1e-8).sqrt().to(x.r)
    width = (eps + alpha * std).clamp(eps_min, eps_max)
    x.metrics |= {f"std_bin{b}": std[b] for b in range(bins)} | {f"eps_bin{b}": width[b] for b in range(bins)}
    width = width.take(bin)  # (B,T)
    return ppo(x, 1 - width, 1 + width, dual_clip)

@objective("seq-mean-token-mean")
def etr(x, eps=0.2, micro=0.5, macro=0.5):
    """ETR (2601.03723): the band grows with |A| and with the variance of the group's pass rate c. Form and
    constants are OURS, from the abstract: eps (1 + micro tanh|A|) (1 + macro 4c(1-c)); at 0 and 0 it is GRPO."""
    c = x.need("pass_rate")
    width = eps * (1 + micro * x.A.abs().tanh()) * (1 + macro * 4 * c * (1 - c))
    return ppo(x, 1 - width, 1 + width)


# ---- 3. The ratio of the whole response instead of the token's -----------------------------------------------

@objective("seq-mean-token-mean")
def gspo(x, eps_low=3e-4, eps_high=4e-4, dual_clip=None):
    """GSPO (2507.18071): clip whole responses by s = exp(mean log r); in its token form, value s and weight s."""
    return ppo(x, 1 - eps_low, 1 + eps_high, dual_clip, r=x.seq_mean(x.d).detach().clamp(max=10).exp() * x.one)


# ---- 4. Cap the weight and keep the token; or a smooth gate --------------------------------------------------

@objective("token-mean")
def cispo(x, eps_low=1.0, eps_high=0.3):
    """CISPO (2506.13585): clip the weight, not the token, so that none loses its gradient. -sg[clamp(r)] A log pi"""
    x.outside(eps_low, eps_high)
    return -x.r.detach().clamp(1 - eps_low, 1 + eps_high) * x.A * x.logp

@objective("seq-mean-token-mean")
def cispo_masked(x, is_low=1.0, is_high=0.45, eps_low=0.2, eps_high=0.3):
    """CISPO with its eq. 7, as ACPO's baseline: what PPO stops is dropped after all, the rest is capped."""
    low, high = x.outside(eps_low, eps_high)
    return -x.r.detach().clamp(1 - is_low, 1 + is_high) * ~(low | high) * x.A * x.logp

@objective("seq-mean-token-mean")
def sapo(x, tau_pos=1.0, tau_neg=1.05):
    """SAPO (2511.20347): a sigmoid instead of a clip. -4/tau sigmoid(tau (r-1)) A, so w = r sech^2(tau (r-1) / 2) A"""
    tau = torch.full_like(x.A, tau_neg).masked_fill(x.A > 0, tau_pos)
    return -torch.sigmoid(tau * (x.r - 1)) * 4 / tau * x.A


# ---- 5. Selection: which tokens may learn --------------------------------------------------------------------

def top(score, k):
    """True at the `k` largest of `score` along the last dimension; k may be a tensor that broadcasts. Sorts."""
    order = score.argsort(-1, descending=True)
    rank = torch.arange(score.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, rank) < k

def share(x, score, ratio):
    """1 at the `ratio` of each response's tokens with the highest score, at least one."""
    n = x.mask.sum(1, keepdim=True).double()
    return x.mask * top(score.masked_fill(x.mask == 0, -math.inf), (n * ratio).floor().clamp(min=1))

@objective("seq-mean-token-mean")
def entropy_top(x, ratio=0.2, eps_low=0.2, eps_high=0.3, dual_clip=3.0):
    """80/20 (2506.01939), as ACPO's baseline: only the `ratio` of each response's tokens with the most entropy."""
    x.mask = share(x, x.need("entropy"), ratio)  # before aggregation: the mean is over the chosen tokens
    return ppo(x, 1 - eps_low, 1 + eps_high, dual_clip)

@objective("seq-mean-token-mean")
def entropy_bottom(x, ratio=0.8, eps_low=0.2, eps_high=0.3, dual_clip=3.0):
    """The control of entropy_top: the tokens with the least entropy."""
    x.mask = share(x, -x.need("entropy"), ratio)
    return ppo(x, 1 - eps_low, 1 + eps_high, dual_clip)

@objective("seq-mean-token-mean")
def ar_lopti(x, alpha=0.3, eta=0.5, part=None, eps_low=0.2, eps_high=0.24, dual_clip=3.0):
    """AR-Lopti (2505.12929): A becomes (alpha q + 1 - alpha) A, so that unlikely tokens do not drown the likely; and
    the rollout is passed twice, first the tokens with q < eta (part="low"), then the others (part="high")."""
    x.A = (alpha * x.q + 1 - alpha) * x.A
    if part is not None:
        check("part", part, ("low", "high"))
        x.A = x.A * ((x.q < eta) == (part == "low"))
    return ppo(x, 1 - eps_low, 1 + eps_high, dual_clip)


# ---- 6. No ratio ---------------------------------------------------------------------------------------------

@objective("token-mean", advantage="gpg")
def gpg(x):
    """GPG (2504.02546): plain policy gradient, A rescaled for the groups without signal. -A log pi"""
    return -x.A * x.logp

@objective("seq-mean-token-sum", advantage="rloo")
def rloo(x):
    """RLOO (2402.14740): REINFORCE on whole responses, the other samples' mean as baseline. -A log pi"""
    return -x.A * x.logp


# ---- From token losses to one number -------------------------------------------------------------------------

def aggregate(loss, mask, agg, *, totals=None, max_len=None, group_size=None):
    """(B,T) to a scalar. `totals` are counts over the whole optimizer mini-batch (tokens, sequences, winning_groups),
    so that the losses of micro-batches and ranks simply add up; None: over these rows. Empty rows do not count."""
    check("agg", agg, AGGREGATIONS)
    totals, n = totals or {}, mask.sum(1)
    loss, scale = (loss * mask).sum(1), totals.get("sequences", (n > 0).sum())
    if agg == "token-mean":
        scale = totals.get("tokens", n.sum())
    elif agg == "seq-mean-token-mean":
        loss = loss / n.clamp(min=1)
    elif agg == "seq-mean-token-sum-norm":  # a constant length: long responses are not favoured (2503.20783)
        scale = scale * (max_len or mask.shape[1])
    elif agg == "winning-groups":  # WAPO: group size x length budget x groups with a winner
        scale = max(totals["winning_groups"], 1) * (max_len or mask.shape[1]) * (group_size or len(n))
    return loss.sum() / torch.as_tensor(scale).clamp(min=1)


def k3(logp, ref_logp):
    """Schulman's estimate of KL(pi || ref) per token of pi, never negative: ref/pi - 1 - log(ref/pi)."""
    d = (ref_logp - logp).clamp(-20, 20)
    return d.exp() - 1 - d


def correction_weight(old_logp, sampler_logp, kind):
    """pi_old/pi_sampler, detached, for a sampler that is not the trainer: truncated at 2 (tis) or zero outside [0.5, 5]
    (icepop, 2510.18855). Multiplies any objective; has no place where old_logp already is the sampler's."""
    check("correction", kind, ("tis", "icepop"))
    rho = (old_logp - sampler_logp).detach().clamp(-20, 20).exp()
    return rho.clamp(max=2.0) if kind == "tis" else rho * ((rho >= 0.5) & (rho <= 5.0))


def policy_loss(name, logp, old_logp, adv, mask, *, agg=None, entropy=None, sum_p2=None, reward=None, group_size=None,
                max_len=None, totals=None, sampler_logp=None, correction="tis", ref_logp=None, kl_beta=0.0,
                pass_rate=None, **hyperparameters):
    """Objective `name` on B responses of up to T tokens: (scalar loss with gradient to logp, dict of detached metrics).

    logp (B,T) with grad; old_logp (B,T); adv (B,), (B,1) or (B,T); mask (B,T), 1 where a response token counts;
    entropy, sum_p2 (B,T) of the current policy; reward (B,), group after group of `group_size` rows, or pass_rate (B,)
    where rows are not whole groups. What lies outside the mask is never used. Unknown names raise ValueError."""
    check("loss", name, OBJECTIVES)
    f, keep = OBJECTIVES[name], mask.bool()
    for h in hyperparameters:
        check(f"hyper-parameter of {name}", h, list(inspect.signature(f).parameters)[1:])
    dtype = torch.promote_types(logp.dtype, torch.float32)

    def clean(t):  # masked before any exp: inf * 0 is nan
        return None if t is None else torch.where(keep, t.to(dtype), 0)

    A = clean((adv if adv.dim() == 2 else adv[:, None]).detach().expand_as(keep))
    mask, agg, group, totals = keep.to(dtype), agg or f.agg, group_size or len(keep), dict(totals or {})
    wins = (A * mask).sum(1) > 0
    if pass_rate is None and len(keep) % group == 0:  # from the rewards of whole groups, else from the sign of A
        pass_rate = (wins if reward is None else reward).to(dtype).view(-1, group).mean(1).repeat_interleave(group)
    if agg == "winning-groups" and "winning_groups" not in totals:
        totals["winning_groups"] = wins.view(-1, group).any(1).sum()
    logp, old_logp = clean(logp), clean(old_logp.detach())
    d = logp - old_logp
    x = Batch(logp, old_logp, d, r=d.clamp(-20, 20).exp(), p=logp.detach().exp(), q=old_logp.exp(),
              one=(logp - logp.detach()).exp(), A=A, mask=mask, entropy=clean(entropy), sum_p2=clean(sum_p2),
              pass_rate=None if pass_rate is None else pass_rate.detach().to(dtype).view(-1, 1), group_size=group,
              totals=totals)
    loss = f(x, **hyperparameters)
    if sampler_logp is not None:
        loss = loss * correction_weight(x.old_logp, clean(sampler_logp), correction)
    if ref_logp is not None:
        loss = loss + kl_beta * k3(x.logp, clean(ref_logp.detach()))
    loss = aggregate(loss, x.mask, agg, totals=totals, max_len=max_len, group_size=group)

    x.mask = mask  # these metrics are over every response token, also where an objective selects
    with torch.no_grad():
        mean, zero = x.mean(x.r), torch.zeros_like(loss)
        metrics = {"clip_low": zero, "clip_high": zero, "approx_kl": x.mean(x.r - 1 - x.d.clamp(-20, 20)),
                   "ratio_mean": mean, "ratio_std": x.mean((x.r - mean) ** 2).sqrt()}
        if sum_p2 is not None:  # WAPO's cells: p above or below the collision probability sum p^2, times the sign of A
            peak, pos = x.p >= x.sum_p2, A >= 0
            metrics |= {"pos_peak": x.mean(pos & peak), "pos_valley": x.mean(pos & ~peak),
                        "neg_peak": x.mean(~pos & peak), "neg_valley": x.mean(~pos & ~peak)}
    return loss, {k: v.detach() for k, v in {**metrics, **x.metrics}.items()}


import experiments.more_objectives  # noqa: E402,F401  the rest of the field registers itself: same names, same tests
