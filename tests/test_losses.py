"""losses.py held against three things: numbers that the official code prints, the weight that each
paper puts on grad log pi (written down here a second time, in numpy), and what must hold for every
objective, yours included.

    python -m pytest tests/test_losses.py
"""
import inspect
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import losses  # noqa: E402
from losses import (ADVANTAGES, AGGREGATIONS, CORRECTIONS, OBJECTIVES, advantages,  # noqa: E402
                    policy_loss)

torch.set_num_threads(1)
INF = math.inf
TOKEN, SEQ = "token-mean", "seq-mean-token-mean"
SEQ_SUM, NORM = "seq-mean-token-sum", "seq-mean-token-sum-norm"

def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)

def equal(a, b, tolerance=1e-10):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance,
                               atol=tolerance, check_dtype=False)

def each_tensor(batch, change):
    """The batch with change(t) for every tensor t in it."""
    out = dict(batch)
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            out[key] = change(value)
    return out

# ---- 1. Golden numbers: the official functions, run in float64 on one fixed batch ----------------

P_OLD = f64([
    [.90, .50, .10, .30, .70, .05],
    [.60, .20, .95, .40, .02, .80],
    [.99, .15, .55, .25, .45, .35],
    [.08, .85, .65, .12, .33, .75],
])
# The 1.28 is DAPO's bound: right there, clamp has gradient 1 up to torch 2.13, 0 from 2.14 on.
RATIO = f64([
    [1.00, 1.35, .70, 1.10, .95, 6.00],
    [1.05, .60, 1.01, 1.50, 3.50, .90],
    [1.00, 1.25, .75, 2.00, 1.02, .98],
    [.50, 1.10, .92, 4.00, 1.28 - 1e-9, 1],
])
MASK = f64([
    [1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 0],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1, 1],
])
ADV = f64([1, -1, .5, -.5])
RHO = f64([  # the trainer's old probability / the sampler's
    [1.0, 1.2, .90, 2.5, 1.00, .3],
    [1.1, 1.0, .95, 1.0, 1.02, 1],
    [.40, 1.3, 1.0, 1.1, 1.00, 1],
    [1.0, 6.0, 1.2, 1.0, .800, 1],
])
SAMPLER_LOGP = P_OLD.log() - RHO.log()
ENTROPY = f64([
    [.30, .90, 2.1, 1.2, .50, 3.0],
    [.80, 1.9, .10, 1.3, 3.3, .40],
    [.05, 2.2, 1.0, 1.6, 1.1, 1.4],
    [2.6, .45, .75, 2.4, 1.5, .60],
])

# Where the numbers come from. `python experiments/golden.py` prints verl's and TRL's again.
VERL = "verl 0.9.1, verl/trainer/ppo/core_algos.py"
TRL = "TRL 1.16.0, trl/trainer/grpo_trainer.py"
ACPO = "Control-derek/ACPO cfcd73d, verl/trainer/ppo/core_algos.py: compute_policy_loss"
KLEAR = "suu990901/KlearReasoner, compute_gppo_loss"
CE_GPPO = "Kwai-Klear/CE-GPPO, compute_gppo_loss_general_beta"
ARCHER = "wizard-III/Archer2.0, compute_policy_loss_archer"
CTPO = "horizon-llm/CTPO, cum-token-cumprod-la"
BAPO = "WooooDyy/BAPO, recipe/bapo/policy_loss.py"
DGPO = "VenomRose-Juri/DGPO-RL"
WAPO = "layer6ai-labs/wapo ca70250, verifiers/rl/trainer/trainer.py, its operations typed again"
SWIFT = "ms-swift 4.6.0, swift/rlhf_trainers/grpo_trainer.py: _compute_fipo_influence"
PRIME_RL = "PrimeIntellect-ai/prime-rl 559b4477, src/prime_rl/trainer/rl/loss.py: ipo_loss_fn"
CFPO = "asparius/verl 18bd5cde (verl's PR 5252), compute_policy_loss_cfpo"

GOLDEN = [  # source, name, arguments, loss, sum of |d loss / d logp|
    (ACPO, "dapo", dict(eps_high=0.3, dual_clip=3, agg=SEQ), 0.1377916667, 0.5175833333),
    (ACPO, "acpo", {}, -0.0149166667, 0.6767500000),
    (ACPO, "acpo", dict(alpha=1, eps_min=0.05, eps_max=0.5), 0.1048750000, 0.6038333333),
    (ACPO, "cispo_masked", {}, -0.0833453258, 0.6177916667),
    (ACPO, "entropy_top", {}, 0.3687500000, 0.1562500000),
    (ACPO, "entropy_bottom", {}, 0.0079166667, 0.6204166667),
    (ACPO, "ar_lopti", dict(part='low'), 0.1238316667, 0.1403066667),
    (VERL, "dapo", dict(dual_clip=3), 0.1409523810, 0.5219047619),
    (VERL, "dapo", {}, 0.1885714286, 0.7838095238),
    (VERL, "dapo", dict(dual_clip=3, agg=SEQ), 0.1400833331, 0.5175833323),
    (VERL, "dapo", dict(dual_clip=3, agg=SEQ_SUM), 0.7400000000, 2.7400000000),
    (VERL, "dapo", dict(dual_clip=3, agg=NORM), 0.1233333333, 0.4566666667),
    (VERL, "gspo", {}, 0.0895448256, 0.4646948248),
    (VERL, "gspo", dict(eps_low=0.5, eps_high=0.5), -0.0178740679, 0.9472637175),
    (VERL, "sapo", {}, -0.0283774654, 0.7162209581),
    (VERL, "gpg", {}, -0.0536174165, 0.7619047619),
    (VERL, "gmpo", {}, 0.0765500360, 0.7126385100),
    (VERL, "cispo", dict(eps_low=10, eps_high=0.2), -0.0254728259, 0.7735714286),
    (VERL, "dppo_tv", dict(agg=TOKEN), -0.4836648301, 0.8242857143),
    (VERL, "dppo_kl", dict(agg=TOKEN), -0.4836648301, 0.8242857143),
    (VERL, "kl_cov", dict(k=0.1), 0.0106470758, 1.2600000000),
    (VERL, "dro", {}, -0.0333105483, 0.7607155434),
    (VERL, "clip_cov", dict(k=1.0, cov_low=0.2), 0.1492857143, 0.4707142857),
    (TRL, "grpo", {}, 0.1966458333, 0.7368541667),
    (TRL, "dr_grpo", dict(max_len=9), 0.1162500000, 0.4398611111),
    (TRL, "vespo", {}, -0.1732522519, 0.2096764681),
    (TRL, "luspo", {}, 0.0848791360, 3.0550527957),
    (TRL, "grpo", dict(delta=2.0), 0.0799791667, 0.4785208333),
    (TRL, "grpo", dict(correction="opsm", correction_args=dict(delta=-.3)), -0.1963541667,
     0.3838541667),
    (VERL, "dapo", dict(correction="tis"), 0.2027142857, 0.8579047619),
    (VERL, "dapo", dict(correction="icepop"), 0.1519523810, 0.8221904762),
    (VERL, "dapo", dict(correction="seq_tis"), 0.5306092381, 0.9390835238),
    (SWIFT, "fipo", {}, 0.2215238095, 0.9358095238),
    (PRIME_RL, "ipo", {}, 0.1758823278, 0.6402685987),
    (CFPO, "cfpo", {}, 4.3460119048, 11.7135714286),
    (KLEAR, "gppo", {}, 0.1885714285, 0.9933333329),
    (CE_GPPO, "ce_gppo", {}, 0.1849999999, 0.9683333329),
    (ARCHER, "aspo", {}, -0.4852371508, 0.7698552655),
    (CTPO, "ctpo", {}, -0.0029501857, 0.3307250000),
    (BAPO, "bapo", {}, 0.0457142857, 0.6338095238),
    (DGPO, "dgpo", {}, 0.0800206938, 1.0453364491),
    (WAPO, "wapo", dict(group_size=4, max_len=8), -0.4250000000, 0.4250000000),
]

def golden_run(name, arguments):
    """Loss, gradient and metrics of ours on the fixed batch."""
    logp = (P_OLD.log() + RATIO.log()).requires_grad_()
    loss, metrics = policy_loss(name, logp, P_OLD.log(), ADV, MASK, entropy=ENTROPY,
                                sampler_logp=SAMPLER_LOGP, **arguments)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics

@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case[1]} {case[3]:.3f}")
def test_the_official_code_has_the_same_loss_and_gradient(case):
    _, name, arguments, loss, grad_sum = case
    ours, grad, _ = golden_run(name, arguments)
    equal(ours, f64(loss), 1e-7)  # verl adds 1e-8 to denominators
    equal(grad.abs().sum(), f64(grad_sum), 1e-7)

def test_acpo_has_the_official_std_and_band_of_each_bin():
    _, _, m = golden_run("acpo", {})
    std = [m[f"std_bin{i}"].item() for i in range(5)]
    width = [m[f"eps_bin{i}"].item() for i in range(5)]
    np.testing.assert_allclose(std, [1.125344, 2.45, 1.185479, .21587, .042057], atol=1e-6)
    np.testing.assert_allclose(width, [3, 3, 3, .847611, .32617], atol=1e-6)

def test_bapo_chooses_the_official_band():
    _, _, m = golden_run("bapo", {})
    equal([m["band_low"].item(), m["band_high"].item()], [.9, 3.0])

@pytest.mark.parametrize("delta, low, high", [
    (.005, .903305, 1.103361),
    (.1, .616817, 1.516221),
    (.2, .493239, 1.772250),
])
def test_kl3_bounds_are_the_roots(delta, low, high):
    """By the two branches of Lambert's W, in double precision, and by the equation itself."""
    roots = losses.kl3_bounds(delta)
    np.testing.assert_allclose(roots, (low, high), atol=1e-6)
    for root in roots:
        assert abs(root - 1 - math.log(root) - delta) < 1e-14

# ---- 2. The weight w of each objective, grad loss = -mean(w grad log pi), once more in numpy -----

def ppo(t, low, high, c=INF, x=None, A=None):
    """x A, but 0 where the rule K(x; low, high, c) stops the token."""
    x = t.ratio if x is None else x
    A = t.A if A is None else A
    too_high = (A > 0) & (x > high)
    too_low = (A < 0) & (x < low)
    beyond_c = (A < 0) & (x > c)
    return x * A * ~(too_high | too_low | beyond_c)

def response_sum(t, values):
    return (values * t.mask).sum(1, keepdims=True)

def response_mean(t, values):
    return response_sum(t, values) / np.maximum(t.mask.sum(1, keepdims=True), 1)

def acpo(t):
    width = np.zeros_like(t.ratio)
    for k in range(5):
        start, end = k / 5, (k + 1) / 5
        inside = (t.p >= start) & (t.p < end) & (t.mask > 0)
        if inside.any():
            std = math.sqrt(np.var(t.ratio[inside]) + 1e-8)
            width[inside] = min(.2 + 3 * std, 3)
    return ppo(t, 1 - width, 1 + width, 3)

def etr(t):
    strength = np.tanh(np.abs(t.A))
    spread = 4 * t.pass_rate * (1 - t.pass_rate)
    width = .2 * (1 + .5 * strength) * (1 + .5 * spread)
    return ppo(t, 1 - width, 1 + width)

def dcpo(t):
    low = .5 + .5 * np.sqrt(np.maximum(1 - 4 * .16 / t.p_old, 0))
    high = .5 + .5 * np.sqrt(1 + 4 * .2 / t.p_old)
    return ppo(t, low, np.minimum(high, 10), 10)

def bapo_walk(t, target=1.0):
    """The walk as the paper tells it, one bound one step at a time."""
    low, high = .6, 1.2
    while True:
        gain = np.minimum(t.ratio, high) * t.A
        cost = np.maximum(t.ratio, low) * -t.A
        won, lost = gain[t.A > 0].sum(), cost[t.A < 0].sum()
        if won >= target * lost or high > 3 - 1e-9:
            return low, high
        if low < .9 - 1e-9:
            low += .05
        else:
            high += .05

def m2po(t):
    square = t.log_ratio[t.A * t.log_ratio > 0] ** 2
    limit, end = 0.0, 20.0
    for _ in range(100):
        middle = (limit + end) / 2
        if np.minimum(square, middle**2).mean() <= .04:
            limit = middle
        else:
            end = middle
    below = max(1 - math.exp(-limit), .3)
    above = max(math.exp(limit) - 1, .5)
    return ppo(t, 1 - below, 1 + above)

def gspo(t):
    s = np.exp(np.minimum(response_mean(t, t.log_ratio), 10))
    return ppo(t, 1 - 3e-4, 1 + 4e-4, x=s)

def luspo(t):
    s = np.exp(response_mean(t, t.log_ratio))
    return ppo(t, .8, 1.2, x=s)

def gmpo(t):
    too_high = (t.A > 0) & (t.log_ratio > .4)
    too_low = (t.A < 0) & (t.log_ratio < -.4)
    stopped = too_high | too_low
    clipped = np.where(stopped, np.sign(t.A) * .4, t.log_ratio)
    rho = np.exp(response_mean(t, clipped))
    return t.A * rho * ~stopped

def ctpo(t):
    prefix, low, high, c = np.ones((4, *t.ratio.shape))
    for i, row in enumerate(t.mask > 0):
        log_prefix = 0.0
        for n, j in enumerate(np.flatnonzero(row), start=1):
            log_prefix += t.log_ratio[i, j]
            prefix[i, j] = math.exp(min(log_prefix, 10))
            low[i, j] = math.exp(-.025 * math.sqrt(n))
            high[i, j] = c[i, j] = math.exp(.05 * math.sqrt(n))
    return ppo(t, low, high, c, x=prefix)

def fipo(t):
    """Every token's sum over the rest of its response, one by one."""
    w = np.ones_like(t.ratio)
    for i, row in enumerate(t.mask > 0):
        for j in np.flatnonzero(row):
            rest = 0.0
            for k in range(j, len(row)):
                rest += .5 ** ((k - j) / 32) * t.log_ratio[i, k]
            if not (t.A[i, j] < 0 and t.ratio[i, j] > 4):
                w[i, j] = min(max(math.exp(rest), 1), 1.2)
    return w * ppo(t, .8, 1.28, 10)

def vespo(t):
    log_w = np.clip(response_sum(t, t.log_ratio), math.log(1e-8), 20)
    winner = np.exp(3 + 2 * log_w - 3 * np.exp(log_w))
    loser = np.exp(2 + 3 * log_w - 2 * np.exp(log_w))
    return np.where(t.A > 0, winner, loser) * t.A

def topr(t):
    product = np.exp(response_sum(t, t.log_ratio))
    return np.where(t.A > 0, 1, np.minimum(product, 1)) * t.A

def stopped_by_ppo(t, low, high):
    """Those of negative advantage below the band, those of positive advantage above it."""
    below = (t.A < 0) & (t.ratio < low)
    above = (t.A > 0) & (t.ratio > high)
    return below, above

def cispo_masked(t):
    below, above = stopped_by_ppo(t, .8, 1.3)
    return np.clip(t.ratio, 0, 1.45) * ~(below | above) * t.A

def ce_gppo(t, beta_low=.75, beta_high=1, eps_high=.2):
    below, above = stopped_by_ppo(t, .8, 1 + eps_high)
    w = np.where(below, beta_low * .8, t.ratio)
    w = np.where(above, beta_high * (1 + eps_high), w)
    beyond_c = (t.A < 0) & (t.ratio > 10)
    return w * t.A * ~beyond_c

def dgpo(t):
    below, above = stopped_by_ppo(t, .8, 1.28)
    w = np.where(below, t.ratio**2 / .8, t.ratio)
    w = np.where(above, np.sqrt(t.ratio * 1.28), w)
    return t.A * w

def aspo(t):
    eps = np.full_like(t.ratio, .2)
    for i, row in enumerate(t.mask > 0):
        if row.any():
            limit = np.quantile(t.entropy[i][row], .8)
            eps[i][t.entropy[i] > limit] = .4
    below, above = stopped_by_ppo(t, 1 - eps, 1 + eps)
    x = np.where(t.A > 0, 1 / t.ratio, t.ratio)
    return t.A * np.minimum(x, 3) * ~(below | above)

def dppo(t, moved):
    outward = np.where(t.A > 0, t.p > t.p_old, t.p < t.p_old)
    return np.minimum(t.ratio, 20) * ~(moved & outward) * t.A

def dppo_tv(t):
    distance = np.abs(t.p - t.p_old)
    return dppo(t, distance > .15)

def dppo_kl(t):
    rest = (1 - t.p_old + 1e-8) / (1 - t.p + 1e-8)
    kl_drawn = t.p_old * np.log(t.p_old / t.p)
    kl_rest = (1 - t.p_old) * np.log(rest)
    return dppo(t, kl_drawn + kl_rest > .05)

def cfpo(t):
    penalty = np.abs(t.A) * (t.ratio - 1) / .2
    return t.ratio * (t.A - penalty)

def ipo(t):
    near = np.abs(t.p - t.p_old) <= .1
    return near * t.ratio * t.A - 2 * .001 * t.log_ratio

def sapo(t):
    tau = np.where(t.A > 0, 1.0, 1.05)
    return t.A * t.ratio / np.cosh(tau * (t.ratio - 1) / 2) ** 2

def by_entropy(t, share, sign):
    """The chosen tokens, one response after the other."""
    chosen = np.zeros_like(t.mask)
    for i, row in enumerate(t.mask > 0):
        order = sorted(np.flatnonzero(row), key=lambda j: -sign * t.entropy[i, j])
        chosen[i, order[:max(1, int(len(order) * share))]] = 1
    return chosen

def covariance(t):
    n = t.mask.sum()
    A = t.A - t.A.sum() / n
    logp = t.logp - t.logp.sum() / n
    return A * logp

def clip_cov(t):  # with k = 1 every candidate is drawn
    score = covariance(t)
    candidate = (score > 1) & (score < 5)
    return ppo(t, .8, 1.2) * ~candidate

def kl_cov(t):  # with k = 0.1
    score = np.where(t.mask > 0, covariance(t), -INF)
    n = max(1, int(t.mask.sum() * .1))
    paying = score >= np.sort(score, axis=None)[-n]
    return t.ratio * t.A - np.sign(t.log_ratio) * paying

def psr_nsr(t):
    A = np.where(t.A > 0, .1, 1) * t.A
    return ppo(t, .8, 1.2, A=A)

def wapo(t):
    winners = np.maximum(t.A, 0)
    return ppo(t, 0, 10, A=winners)

def up_grpo(t):
    losers = ppo(t, .8, INF, 3)
    return np.where(t.A > 0, t.A, losers)

def ar_lopti(t):
    A = (.3 * t.p_old + .7) * t.A
    return ppo(t, .8, 1.24, 3, A=A)

TABLE = {  # name: (aggregation and advantage of the published run, weight)
    "grpo": (SEQ, "grpo", lambda t: ppo(t, .8, 1.2)),
    "dr_grpo": (NORM, "mean", lambda t: ppo(t, .8, 1.2)),
    "dapo": (TOKEN, "grpo", lambda t: ppo(t, .8, 1.28, 10)),
    "kl3": (SEQ, "grpo", lambda t: ppo(t, *losses.kl3_bounds(.1))),  # tested above
    "psr_nsr": (TOKEN, "signed", psr_nsr),
    "wapo": ("winning-groups", "mean", wapo),
    "up_grpo": (TOKEN, "grpo", up_grpo),
    "acpo": (SEQ, "grpo", acpo),
    "etr": (SEQ, "grpo", etr),
    "dcpo": (TOKEN, "grpo", dcpo),
    "bapo": (TOKEN, "grpo", lambda t: ppo(t, *bapo_walk(t), 3)),
    "m2po": (TOKEN, "grpo", m2po),
    "gspo": (SEQ, "grpo", gspo),
    "fipo": (TOKEN, "grpo", fipo),
    "ipo": (TOKEN, "grpo", ipo),
    "luspo": (SEQ_SUM, "grpo", luspo),
    "gmpo": (SEQ, "grpo", gmpo),
    "ctpo": (TOKEN, "grpo", ctpo),
    "vespo": (TOKEN, "grpo", vespo),
    "topr": (SEQ_SUM, "signed", topr),
    "cispo": (TOKEN, "grpo", lambda t: np.clip(t.ratio, 0, 1.3) * t.A),
    "cispo_masked": (SEQ, "grpo", cispo_masked),
    "gppo": (TOKEN, "grpo", lambda t: ce_gppo(t, 1, 1, .28)),
    "ce_gppo": (TOKEN, "grpo", ce_gppo),
    "dgpo": (TOKEN, "grpo", dgpo),
    "aspo": (TOKEN, "grpo", aspo),
    "dppo_tv": (NORM, "grpo", dppo_tv),
    "dppo_kl": (NORM, "grpo", dppo_kl),
    "sapo": (SEQ, "grpo", sapo),
    "cfpo": (TOKEN, "grpo", cfpo),
    "dro": (TOKEN, "grpo", lambda t: t.A - .1 * t.log_ratio),
    "reinforce": (TOKEN, "grpo", lambda t: t.ratio * t.A),
    "entropy_top": (SEQ, "grpo", lambda t: ppo(t, .8, 1.3, 3)),
    "entropy_bottom": (SEQ, "grpo", lambda t: ppo(t, .8, 1.3, 3)),
    "ar_lopti": (SEQ, "grpo", ar_lopti),
    "clip_cov": (TOKEN, "grpo", clip_cov),
    "kl_cov": (TOKEN, "grpo", kl_cov),
    "gpg": (TOKEN, "gpg", lambda t: t.A),
    "rloo": (SEQ_SUM, "rloo", lambda t: t.A),
    "raft": (SEQ, "reward", lambda t: np.maximum(t.A, 0)),
}
CHOSEN = {"entropy_top": lambda t: by_entropy(t, .2, 1),
          "entropy_bottom": lambda t: by_entropy(t, .8, -1)}
ARGUMENTS = {"clip_cov": dict(k=1.0), "kl_cov": dict(k=.1)}  # the default takes 1 token of so few
# Their result depends on the rows that share the call; acpo's statistics travel in `totals`.
BATCH_STATISTICS = {"bapo", "m2po", "clip_cov", "kl_cov"}

def random_batch(seed, groups=3, group_size=4, T=8, dtype=torch.float64):
    """Responses of 0 to T tokens, some with a hole; odd seeds are far off policy."""
    rng = np.random.default_rng(seed)
    B = groups * group_size
    length = rng.integers(0, T + 1, B)
    no_hole = rng.random((B, T)) > .1
    mask = (np.arange(T) < length[:, None]) & no_hole
    mask[0] = True
    old_logp = -rng.exponential(2, (B, T)) - .02
    spreads = [.1, .5, 3.] if seed % 2 else [.02, .05, .1, .1, .6]
    spread = rng.choice(spreads, (B, T))
    moved = old_logp + rng.normal(size=(B, T)) * spread
    logp = np.minimum(moved, -rng.uniform(.01, .02, (B, T)))  # a probability stays below 1
    pass_rate = rng.integers(0, 2, (groups, group_size)).mean(1)
    arrays = dict(
        logp=logp,
        old_logp=old_logp,
        adv=rng.normal(0, 1.5, B),
        mask=mask,
        entropy=rng.exponential(1, (B, T)),
        sum_p2=rng.random((B, T)),
        pass_rate=pass_rate.repeat(group_size),
    )
    batch = {key: torch.tensor(value, dtype=dtype) for key, value in arrays.items()}
    return batch | dict(group_size=group_size, max_len=T + 3)

def table_view(batch):
    """The batch as the table's formulas read it: (B,T) arrays, 0 outside the mask."""
    array = each_tensor(batch, torch.Tensor.numpy)
    mask = array["mask"]
    log_ratio = (array["logp"] - array["old_logp"]) * mask
    return SimpleNamespace(
        mask=mask,
        logp=array["logp"] * mask,
        log_ratio=log_ratio,
        ratio=np.exp(log_ratio),
        p=np.exp(array["logp"]),
        p_old=np.exp(array["old_logp"]),
        A=array["adv"][:, None] * mask,
        entropy=array["entropy"],
        pass_rate=array["pass_rate"][:, None],
    )

def run(name, batch, **arguments):
    """(loss, gradient, metrics) of ours."""
    batch = batch | ARGUMENTS.get(name, {}) | arguments
    logp = batch.pop("logp").clone().requires_grad_()
    loss, metrics = policy_loss(name, logp, **batch)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics

def gradient(name, batch, **arguments):
    return run(name, batch, **arguments)[1]

def share_in_mean(agg, mask, A, group_size, max_len):
    """What each token counts in the mean, by loops. (B,T)"""
    share = np.zeros_like(mask)
    rows = [i for i in range(len(mask)) if mask[i].any()]
    won = 0
    for start in range(0, len(mask), group_size):
        won += A[start:start + group_size].sum(1).max() > 0
    for i in rows:
        per_token = {
            TOKEN: 1 / mask.sum(),
            SEQ: 1 / mask[i].sum() / len(rows),
            SEQ_SUM: 1 / len(rows),
            NORM: 1 / len(rows) / max_len,
            "winning-groups": 1 / max(1, won) / max_len / group_size,
        }
        share[i] = mask[i] * per_token[agg]
    return share

def table_error(name, seed):
    """The largest deviation of the gradient from the table, under the published mean."""
    batch = random_batch(seed)
    t = table_view(batch)
    agg, _, weight = TABLE[name]
    chosen = CHOSEN[name](t) if name in CHOSEN else t.mask
    share = share_in_mean(agg, chosen, t.A, batch["group_size"], batch["max_len"])
    expected = -share * weight(t)
    return np.abs(gradient(name, batch).numpy() - expected).max()

@pytest.mark.parametrize("name", TABLE)
def test_the_gradient_is_the_weight_of_the_table(name):
    for seed in range(25):
        assert table_error(name, seed) < 1e-10, f"seed {seed}"
    assert OBJECTIVES[name].advantage == TABLE[name][1]

def test_the_random_tokens_reach_every_case_of_the_table():
    """A table is only as good as its rows: both signs in every stretch of the ratio, every bin."""
    views = [table_view(random_batch(seed)) for seed in range(25)]

    def all_tokens(key):
        return np.concatenate([getattr(t, key)[t.mask > 0] for t in views])

    ratio, A, p = all_tokens("ratio"), all_tokens("A"), all_tokens("p")
    edges = [0, .5, .8, 1.2, 1.5, 3, 10, 20, INF]
    for low, high in zip(edges, edges[1:]):
        inside = (ratio > low) & (ratio < high)
        assert (inside & (A > 0)).any(), (low, high)
        assert (inside & (A < 0)).any(), (low, high)
    assert set((p * 5).astype(int)) == set(range(5))

# ---- 3. What holds for every objective, yours included -------------------------------------------

BAD = f64([INF, -INF, math.nan, 1e30, 3.0])

def dirty(batch, seed):
    """The batch with anything at all outside the mask, and two more columns of it."""
    rng = torch.Generator().manual_seed(seed)

    def anything(*shape):
        return BAD[torch.randint(5, shape, generator=rng)]

    outside = batch["mask"] == 0
    two_columns = torch.zeros(len(outside), 2)
    out = dict(batch, mask=torch.cat([batch["mask"], two_columns], 1))
    for key in ("logp", "old_logp", "entropy", "sum_p2"):
        t = batch[key].clone()
        t[outside] = anything(int(outside.sum()))
        out[key] = torch.cat([t, anything(len(t), 2)], 1)
    return out

@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_never_counts_whatever_it_holds(name):
    for seed in range(6):
        batch = random_batch(seed)
        loss, grad, metrics = run(name, batch)
        loss2, grad2, metrics2 = run(name, dirty(batch, seed))
        assert grad.abs().max() > 1e-6
        equal(loss2, loss)
        equal(grad2[:, :8], grad)
        assert not grad2[:, 8:].any()
        assert not grad2[:, :8][batch["mask"] == 0].any()
        for key in metrics:
            equal(metrics2[key], metrics[key])

@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("key", ["logp", "old_logp"])
def test_nan_at_one_token_gives_a_nan_loss_and_no_exception(name, key):
    """A NaN that becomes an index (a bin, a seed) would end the run, not skip the step."""
    for row in (0, 1, 2, 3, 4):
        batch = random_batch(1)
        if batch["mask"][row].any():
            first = batch["mask"][row].argmax()
            batch[key][row, first] = math.nan
            assert run(name, batch)[0].isnan()
            batch[key][row, first] = -INF  # a token of probability 0
            run(name, batch)

EXTREMES = [  # logp, old_logp
    (0, -30),
    (-30, 0),
    (-1e-3, -30),
    (-60, -.5),
    (0, 0),
    (-90, -60),
    (-.1, -.1),
    (0, -120),
    (-120, 0),
]

@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_and_empty_responses_stay_finite(name, dtype):
    pairs = torch.tensor(EXTREMES, dtype=dtype)
    logp = pairs[:, 0].repeat(5, 1)
    old_logp = pairs[:, 1].repeat(5, 1)
    mask = torch.ones(5, 9)
    mask[3:] = 0
    adv = torch.tensor([1, -1, 0, 1, -1], dtype=dtype)
    full = dict(logp=logp, old_logp=old_logp, adv=adv, mask=mask, entropy=-logp,
                sum_p2=logp.exp(), pass_rate=adv.abs(), ref_logp=old_logp, kl_beta=.1)
    no_tokens = full | dict(mask=mask * 0)
    no_advantage = full | dict(adv=adv * 0)
    for batch in (full, no_tokens, no_advantage):
        loss, grad, metrics = run(name, batch)
        assert loss.isfinite() and grad.isfinite().all()
        assert loss.dtype == grad.dtype == dtype
        for value in metrics.values():
            assert value.isfinite() and value.dim() == 0 and not value.requires_grad

CUTS = [  # anywhere, also through groups; and dealt out in turn, as to ranks
    [slice(0, 5), slice(5, 12)],
    [slice(0, 12, 2), slice(1, 12, 2)],
]

def split_runs(name, batch, parts):
    """Loss, gradient and token-weighted metrics of micro-batches, and those of the whole batch."""
    tokens = batch["mask"].sum(1)
    wins = (batch["adv"] > 0) & (tokens > 0)
    totals = {"tokens": tokens.sum(), "sequences": (tokens > 0).sum(),
              "winning_groups": wins.view(-1, batch["group_size"]).any(1).sum()}
    statistics = OBJECTIVES[name].statistics
    if statistics is not None:
        totals["statistics"] = sum(
            statistics(batch["logp"][rows], batch["old_logp"][rows], batch["mask"][rows])
            for rows in parts)
    loss, grad, metrics = 0, torch.zeros_like(batch["logp"]), {}
    for rows in parts:
        part = each_tensor(batch, lambda t: t[rows])
        part_loss, grad[rows], part_metrics = run(name, part, totals=totals)
        loss = loss + part_loss
        weight = tokens[rows].sum() / tokens.sum()
        for key, value in part_metrics.items():
            metrics[key] = metrics.get(key, 0) + value * weight
    return (loss, grad, metrics), run(name, batch)

@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in BATCH_STATISTICS])
def test_micro_batches_and_ranks_add_up(name):
    """Without the totals the gradient would be another."""
    for seed in (1, 2, 3):
        batch = random_batch(seed)
        for parts in CUTS:
            (loss, grad, metrics), (loss2, grad2, metrics2) = split_runs(name, batch, parts)
            assert grad2.abs().max() > 1e-4
            equal(loss, loss2)
            equal(grad, grad2)
            mean = metrics["ratio_mean"] - 1
            metrics["ratio_std"] = (metrics["ratio_sq"] - mean**2).sqrt()
            for key in metrics2:
                equal(metrics[key], metrics2[key], 1e-7)

@pytest.mark.parametrize("name", sorted(BATCH_STATISTICS))
def test_objectives_with_a_statistic_of_the_batch_are_known(name):
    """Those that the test above leaves out do depend on the cut; else it should have them."""
    changes = []
    for seed in range(8):
        parts, whole = split_runs(name, random_batch(seed), CUTS[0])
        changes.append((parts[1] - whole[1]).abs().max().item())
    assert max(changes) > 1e-4

def test_acpo_without_totals_takes_the_statistics_of_its_own_rows():
    batch = random_batch(4)
    own = losses.ratio_moments(batch["logp"], batch["old_logp"], batch["mask"])
    grad = gradient("acpo", batch)
    given = gradient("acpo", batch, totals={"statistics": own})
    other = gradient("acpo", batch, totals={"statistics": own * 0})  # std 0
    equal(grad, given)
    assert not torch.equal(grad, other)

@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_is_computed_in_float32_and_inputs_stay_as_they_are(name):
    batch = random_batch(1, dtype=torch.float32)
    half = batch | {key: batch[key].bfloat16() for key in ("logp", "old_logp")}
    full = batch | {key: half[key].float() for key in ("logp", "old_logp")}
    before = each_tensor(half, torch.clone)
    loss, grad, _ = run(name, half)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    equal(loss, run(name, full)[0], 1e-6)
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(half[key], value)

@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_flows_to_logp_alone(name):
    batch = random_batch(2)
    batch["sampler_logp"] = batch["old_logp"] - .01
    for key in ("logp", "old_logp", "adv", "entropy", "sum_p2", "sampler_logp"):
        batch[key] = batch[key].clone().requires_grad_()
    loss, _ = policy_loss(name, **batch, ref_logp=batch["old_logp"], kl_beta=.1, correction="tis")
    loss.backward()
    reached = [key for key, t in batch.items() if getattr(t, "grad", None) is not None]
    assert reached == ["logp"]

# ---- 4. Single objectives ------------------------------------------------------------------------

def one_token(log_ratio, adv):
    one = f64([[1]])
    logp = -.1 * one
    return dict(logp=logp, old_logp=logp - log_ratio, adv=f64([adv]),
                mask=one, entropy=one, pass_rate=f64([.5]))

@pytest.mark.parametrize("name", [name for name in TABLE if "dual_clip" in
                                  inspect.signature(OBJECTIVES[name]).parameters])
def test_dual_clip_none_lets_losers_push_without_bound(name):
    batch = one_token(1.5, -1)
    free = gradient(name, batch, dual_clip=None).item()
    stopped = gradient(name, batch, dual_clip=.05 if name == "ctpo" else 2.0).item()
    scale = .3 * math.exp(-1.6) + .7 if name == "ar_lopti" else 1
    equal(free, scale * math.exp(1.5))
    equal(stopped, 2.0 if name == "aspo" else 0.0)  # aspo caps the weight and keeps the token

def test_beyond_a_log_ratio_of_20_the_gradient_ends():
    """As in verl: else A < 0 without a dual clip puts a weight of e^25 on one token."""
    near, far, farther = (one_token(log_ratio, -1) for log_ratio in (12.0, 19.9, 25.0))
    equal(gradient("grpo", far).item(), math.exp(19.9))
    assert gradient("grpo", farther).item() == 0
    equal(gradient("gspo", near).item(), math.exp(10))  # of responses: 10, capped
    equal(gradient("ctpo", near, dual_clip=None).item(), math.exp(10))
    equal(run("gmpo", farther)[0].item(), math.exp(20))

def test_the_passes_of_lopti_share_the_tokens_between_them():
    batch = random_batch(6)
    whole = gradient("ar_lopti", batch)
    low, high = (gradient("ar_lopti", batch, **extra) for extra in OBJECTIVES["ar_lopti"].passes)
    equal(low + high, whole)
    assert low.any() and high.any()
    assert not (low * high).any()
    likely = batch["old_logp"].exp() >= .5
    assert not low[likely].any()

def test_bapo_stops_where_the_walk_stops():
    """At targets that end the walk at its start, on its way, and never."""
    seen = set()
    for seed in (3, 5, 7):
        batch = random_batch(seed)
        for target in np.geomspace(.1, 10, 30).tolist():
            m = run("bapo", batch, target=target)[2]
            walk = bapo_walk(table_view(batch), target)
            equal([m["band_low"].item(), m["band_high"].item()], list(walk))
            seen.add(round(walk[1], 6))
    assert {1.2, 3.0} < seen and len(seen) > 3

def test_m2po_clips_nothing_while_the_budget_lasts():
    batch = random_batch(3)
    _, grad, m = run("m2po", batch, budget=1e9)
    equal(m["band_high"].item() / math.exp(20), 1.0)
    equal(grad, gradient("grpo", batch, agg=TOKEN, eps_low=9, eps_high=1e9))

def test_clip_cov_drops_as_many_candidates_as_it_says():
    batch = random_batch(7, groups=8, T=30)
    t = table_view(batch)
    plain = gradient("grpo", batch, agg=TOKEN)
    score = covariance(t)
    inside = (score > 1) & (score < 5) & (t.mask > 0)
    candidate = torch.tensor(inside) & (plain != 0)
    twentieth = int(.05 * t.mask.sum())
    for share, n in ((2e-4, 1), (.05, twentieth)):
        grad = gradient("clip_cov", batch, k=share)
        dropped = grad != plain
        assert dropped.sum() == n < candidate.sum()
        assert candidate[dropped].all() and not grad[dropped].any()
    equal(gradient("clip_cov", batch, k=.05), grad)  # the same batch, the same draw
    draws = set()
    for seed in range(5):
        dropped = gradient("clip_cov", batch, k=2e-4, seed=seed) == 0
        draws.add(tuple(dropped.flatten().tolist()))
    assert len(draws) > 1

def test_psr_and_nsr_leave_the_other_half_out_of_the_mean():
    batch = random_batch(8)
    batch["adv"] = batch["adv"].sign()
    cases = [
        (dict(psr=1.0, nsr=0.0), batch["adv"] > 0),
        (dict(psr=0.0), batch["adv"] < 0),
    ]
    for arguments, kept in cases:
        half = each_tensor(batch, lambda t: t[kept])
        loss, grad, _ = run("psr_nsr", batch, **arguments)
        loss2, grad2, _ = run("grpo", half, agg=TOKEN)
        equal(loss, loss2)
        equal(grad[kept], grad2)

def test_penalty_on_the_kl_is_the_kl_by_enumeration():
    """E_pi[k3] = KL(pi || ref); with the two swapped, as peers had it, it is another number."""
    logits = f64(np.random.default_rng(0).normal(size=(2, 50)))
    pi, ref = logits.log_softmax(-1)
    true_kl = (pi.exp() * (pi - ref)).sum()
    loss, grad = torch.zeros_like(pi), torch.zeros_like(pi)
    mask = f64([[1]])
    for i in range(50):
        logp, ref_logp = pi[i] * mask, ref[i] * mask  # (1,1)
        token = dict(logp=logp, old_logp=logp, adv=f64([0]), mask=mask)
        loss[i], one_grad, _ = run("grpo", token, ref_logp=ref_logp, kl_beta=.5)
        grad[i] = one_grad.item()
    assert (loss >= 0).all()
    equal((pi.exp() * loss).sum(), .5 * true_kl)
    equal(grad, .5 * (1 - (ref - pi).exp()))

# ---- 5. The sampler is not the trainer -----------------------------------------------------------

def with_sampler(batch, seed=0):
    """The batch, sampled by another policy: near for some responses, far for others."""
    rng = np.random.default_rng(seed)
    B, T = batch["logp"].shape
    noise = rng.normal(size=(B, T))
    spread = rng.choice([.003, .1, 1.], (B, 1))
    gap = torch.tensor(noise * spread).to(batch["logp"])
    return batch | dict(sampler_logp=batch["old_logp"] - gap)

def weight_by_loops(name, batch):
    """(B,T): what each framework multiplies a token's loss with, response by response."""
    t = table_view(batch)
    weight = np.ones_like(t.mask)
    for i, row in enumerate(t.mask > 0):
        if not row.any():
            continue
        sampler = batch["sampler_logp"].numpy()[i, row]
        rho = np.exp(batch["old_logp"].numpy()[i, row] - sampler)
        product = rho.prod()
        mean = product ** (1 / len(rho))
        left = (sampler - t.logp[i, row]).mean()
        by_name = {
            "tis": np.minimum(rho, 2),
            "icepop": rho * (rho >= .5) * (rho <= 5),
            "seq_tis": min(product, 2),
            "seq_mis": product * (product <= 3),
            "geo_mis": .99 <= mean <= 1.01,
            "opsm": not (batch["adv"][i] < 0 and left > 1e-4),
        }
        weight[i, row] = by_name[name]
    return weight

WEIGHTS = {  # those that the random batches must show: 0 drops a token, 1 keeps it, else "other"
    "tis": {"other"},
    "icepop": {0, "other"},
    "seq_tis": {"other"},
    "seq_mis": {0, "other"},
    "geo_mis": {0, 1},
    "opsm": {0, 1},
}

@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gpg", "cispo", "ipo"])
def test_a_correction_is_a_weight_and_what_it_drops_still_counts_in_the_mean(name, loss):
    """So the gradient is that without it, token by token, times the weight: no new denominator."""
    seen = set()
    for seed in range(8):
        batch = with_sampler(random_batch(seed), seed)
        plain = gradient(loss, batch)
        expected = torch.tensor(weight_by_loops(name, batch))
        _, grad, metrics = run(loss, batch, correction=name)
        assert plain.abs().max() > 1e-4
        equal(grad, plain * expected)
        weights = expected[batch["mask"] > 0]
        dropped = (weights == 0).sum() / len(weights)
        equal(metrics["masked"], dropped, 1e-6)
        seen |= {w if w in (0, 1) else "other" for w in weights.tolist()}
    assert seen >= WEIGHTS[name]

@pytest.mark.parametrize("name, arguments", [
    ("tis", dict(high=1.05)),
    ("icepop", dict(low=.9, high=1.1)),
    ("seq_tis", dict(high=1.1)),
    ("seq_mis", dict(high=1.1)),
    ("geo_mis", dict(low=.5, high=2.0)),
    ("opsm", dict(delta=-1.)),
])
def test_the_bounds_of_a_correction_are_arguments(name, arguments):
    batch = with_sampler(random_batch(3), 3)
    usual = gradient("grpo", batch, correction=name)
    other = gradient("grpo", batch, correction=name, correction_args=arguments)
    assert not torch.equal(other, usual)

@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_without_a_gap_changes_nothing(name):
    batch = random_batch(2)
    batch["sampler_logp"] = batch["old_logp"].clone()
    arguments = dict(delta=99.) if name == "opsm" else {}  # opsm sees the updates as well
    _, grad, metrics = run("grpo", batch, correction=name, correction_args=arguments)
    equal(grad, gradient("grpo", batch))
    assert metrics["masked"] == 0

@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_are_safe_from_padding_nan_and_extremes(name):
    batch = with_sampler(random_batch(1))
    loss, grad, metrics = run("dapo", batch, correction=name)
    worse = dirty(batch, 1)
    worse["sampler_logp"] = torch.full_like(worse["logp"], math.nan)
    worse["sampler_logp"][:, :8] = torch.where(batch["mask"] > 0, batch["sampler_logp"], INF)
    loss2, grad2, metrics2 = run("dapo", worse, correction=name)
    equal(loss2, loss)
    equal(grad2[:, :8], grad)
    equal(metrics2["masked"], metrics["masked"])
    single = each_tensor(batch, torch.Tensor.float)
    for far in (-300.0, 300.0):  # float32 cannot hold e^300
        single["sampler_logp"] = single["old_logp"] + far
        loss, grad, _ = run("dapo", single, correction=name)
        assert loss.isfinite() and grad.isfinite().all()
    batch["sampler_logp"][0, 0] = math.nan
    assert run("dapo", batch, correction=name)[0].isnan()

@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrected_micro_batches_add_up(name):
    for loss in ("grpo", "dapo", "gspo", "acpo"):
        batch = with_sampler(random_batch(3)) | dict(correction=name)
        for parts in CUTS:
            (loss1, grad1, metrics1), (loss2, grad2, metrics2) = split_runs(loss, batch, parts)
            assert grad2.abs().max() > 1e-4
            equal(loss1, loss2)
            equal(grad1, grad2)
            equal(metrics1["masked"], metrics2["masked"])

def test_a_correction_leaves_the_penalty_on_the_kl_alone():
    batch = with_sampler(random_batch(3))
    batch["adv"] *= 0
    batch |= dict(ref_logp=batch["old_logp"], kl_beta=.1)
    plain = gradient("grpo", batch)
    assert plain.abs().max() > 1e-4
    equal(gradient("grpo", batch, correction="tis"), plain)

def test_opsm_drops_losers_alone():
    """Without an advantage some losses still have a gradient: DRO's leash, IPO's penalty."""
    batch = with_sampler(random_batch(3))
    batch["adv"] *= 0
    _, grad, metrics = run("dro", batch, correction="opsm", correction_args=dict(delta=-9.))
    equal(grad, gradient("dro", batch))
    assert metrics["masked"] == 0
    assert grad.abs().max() > 1e-4

def test_the_geometric_mean_is_not_the_mean_of_the_ratios():
    """A peer took the mean of exp for the exp of the mean: here 1.25 and 1."""
    logp, mask = f64([[-1.0, -1.0]]), torch.ones(1, 2)
    batch = dict(logp=logp, old_logp=logp, adv=f64([1]), mask=mask)
    for rho, masked in (((2, .5), 0), ((1.3, .7), 1)):
        batch["sampler_logp"] = logp - f64([rho]).log()
        _, _, metrics = run("grpo", batch, correction="geo_mis")
        assert metrics["masked"] == masked

# ---- 6. Advantages, aggregation, metrics ---------------------------------------------------------

REWARD = f64([
    1, 0, 0, 1,
    .1, .1, .1, .1,  # a group without a signal
    0, .3, .9, .3,
])
LENGTH = f64([
    3, 1, 4, 1,
    5, 9, 2, 6,
    5, 3, 5, 8,
])

@pytest.mark.parametrize("kind", ADVANTAGES)
def test_advantages_by_loops(kind):
    out = []
    for start in (0, 4, 8):
        group = REWARD[start:start + 4].tolist()
        lengths = LENGTH[start:start + 4].tolist()
        mean = sum(group) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        by_length = sum(n * r for n, r in zip(lengths, group)) / sum(lengths)
        for i, r in enumerate(group):
            others = group[:i] + group[i + 1:]
            by_kind = {
                "grpo": (r - mean) / (std + 1e-6),
                "mean": r - mean,
                "reward": r,
                "opo": r - by_length,
                "passk": max(r - max(others), 0),
                "batch": (r - mean) / (REWARD.std().item() + 1e-6),
                "rloo": r - sum(others) / 3,
                "maxrl": (r - mean) / (mean + 1e-6),
                "gpg": (r - mean) * 3 / 2,  # 2 groups of 3 have a signal
                "signed": 2 * r - 1,
                "reinforce_pp": r - mean,
            }
            out.append(by_kind[kind])
    if kind == "reinforce_pp":  # each response as often as it has tokens
        tokens = np.repeat(out, LENGTH.int().tolist())
        std = math.sqrt(tokens.var(ddof=1) + 1e-8)
        out = (np.array(out) - tokens.mean()) / std
    if kind not in ("reward", "signed"):
        out[4:8] = [0] * 4
    ours = advantages(REWARD, 4, kind, LENGTH)
    np.testing.assert_allclose(ours.numpy(), out, atol=1e-12)

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [k for k in ADVANTAGES if k not in ("reward", "signed")])
def test_a_group_without_spread_has_exactly_no_advantage(kind, dtype):
    """0.1 eight times has a mean that is not 0.1; the difference over 1e-6 would be a gradient."""
    for value in (.1, .7, 1 / 3, 1.0, 0.0):
        reward = torch.tensor([value] * 8 + [1.0] + [0.0] * 7, dtype=dtype)
        A = advantages(reward, 8, kind, torch.arange(16) % 5 + 1)
        assert not A[:8].any()
        assert A[8:].any()
        assert A.isfinite().all() and A.dtype == dtype
        assert not advantages(reward[:3], 1, kind, torch.ones(3)).any()  # groups of one
        assert not advantages(reward[:8], 8, kind, torch.ones(8)).any()  # nothing but such groups

@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_aggregations_by_loops_and_by_counts_from_outside(agg):
    for seed in range(5):
        batch = random_batch(seed)
        t = table_view(batch)
        share = share_in_mean(agg, t.mask, t.A, 4, batch["max_len"])
        expected = (share * -t.A * t.logp).sum()
        equal(run("gpg", batch, agg=agg)[0], f64(expected))
    counts = dict(tokens=10, sequences=10, winning_groups=10)
    twice = dict(tokens=20, sequences=20, winning_groups=20)
    half = run("gpg", batch, agg=agg, totals=twice)[0]
    equal(run("gpg", batch, agg=agg, totals=counts)[0], 2 * half)
    del batch["max_len"], batch["group_size"]  # then T and B: here 8 for 11, and 12 for 4
    longer = {NORM: 11 / 8, "winning-groups": 11 / 8 * 4 / 12}.get(agg, 1)
    equal(run("gpg", batch, agg=agg, totals=counts)[0], 2 * half * longer)

@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_by_loops(name):
    batch = random_batch(5)
    m = run(name, batch)[2]
    t = table_view(batch)
    inside = t.mask > 0
    ratio, loser = t.ratio[inside], t.A[inside] < 0
    peak = (t.p >= batch["sum_p2"].numpy())[inside]
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std(),
        "ratio_sq": ((ratio - 1) ** 2).mean(),
        "approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "pos_peak": (~loser & peak).mean(),
        "pos_valley": (~loser & ~peak).mean(),
        "neg_peak": (loser & peak).mean(),
        "neg_valley": (loser & ~peak).mean(),
    }
    for key, value in expected.items():
        equal(m[key], f64(value))
    assert 0 <= m["clip_low"] <= 1 and 0 <= m["clip_high"] <= 1

def test_clip_fractions_count_only_the_side_that_ppo_stops():
    """Four tokens below the band, three above, one inside."""
    ratio = f64([[.5, .6, .7, .79, 1.3, 1.5, 2.5, 1.0]])
    old_logp = torch.full_like(ratio, -2.0)
    logp, mask = old_logp + ratio.log(), torch.ones(1, 8)

    def stopped(name, A, **arguments):
        """How many of the eight tokens, below the band and above it."""
        _, metrics = policy_loss(name, logp, old_logp, f64([A]), mask, **arguments)
        return metrics["clip_low"] * 8, metrics["clip_high"] * 8

    for A, below, above in [(1.0, 0, 3), (-1.0, 4, 0), (0.0, 0, 0)]:
        for name in ("grpo", "gppo", "dgpo", "aspo", "cispo_masked"):
            band = dict(eps=.2) if name == "aspo" else dict(eps_low=.2, eps_high=.2)
            assert stopped(name, A, **band) == (below, above), name
    for A, below, above in [(1.0, 0, 6), (-1.0, 6, 0), (0.0, 0, 0)]:
        assert stopped("ipo", A, eps=.03) == (below, above)  # of six tokens p moves more than .03
    below, _ = stopped("grpo", -1, dual_clip=2)
    assert below == 5  # the dual clip stops one more
    below, _ = stopped("entropy_top", -1, entropy=f64([range(8)]), ratio=.8)
    assert below == 2  # of all tokens: else micro-batches could not merge it

def test_a_peak_is_p_of_at_least_sum_p2_and_a_zero_advantage_is_no_loser():
    logp, mask = f64([[-1.0]]), f64([[1]])
    _, m = policy_loss("grpo", logp, logp, f64([0]), mask, sum_p2=logp.exp())
    assert m["pos_peak"] == 1

# ---- 7. The interface ----------------------------------------------------------------------------

@pytest.mark.parametrize("name, change, words", [
    ("dpao", {}, "dapo"),
    ("dapo", dict(eps_hihg=.3), "eps_high"),
    ("gpg", dict(eps=1), "there are none"),
    ("ar_lopti", dict(part="hihg"), "high"),
    ("grpo", dict(agg="tokenmean"), "token-mean"),
    ("entropy_top", dict(entropy=None), "entropy="),
    ("etr", dict(pass_rate=None), "pass_rate="),
    ("grpo", dict(dual_clip=0), "dual_clip 0"),
    ("acpo", dict(dual_clip=-1), "dual_clip -1"),
    ("grpo", dict(logp=torch.zeros(12)), "logp"),
    ("grpo", dict(adv=torch.zeros(11)), "adv"),
    ("grpo", dict(old_logp=torch.zeros(12, 7)), "old_logp"),
    ("grpo", dict(ref_logp=torch.zeros(12, 9)), "ref_logp"),
    ("etr", dict(pass_rate=torch.zeros(3)), "pass_rate"),
    ("grpo", dict(correction="tsi", sampler_logp=torch.zeros(12, 8)), "tis"),
    ("grpo", dict(correction="tis"), "sampler_logp="),
    ("grpo", dict(correction="tis", sampler_logp=torch.zeros(12, 7)), "sampler_logp"),
])
def test_misuse_is_answered_with_one_line_that_names_it(name, change, words):
    with pytest.raises(ValueError, match=words) as error:
        policy_loss(name, **(random_batch(0) | change))
    assert "\n" not in str(error.value)

def test_pass_at_k_rewards_the_one_that_is_ahead():
    A = advantages(f64([.2, .9, .5, .9, .2, .7, .5, .5]), 4, "passk")
    equal(A, f64([0, 0, 0, 0, 0, .2, 0, 0]))  # two are best: neither is ahead

def test_a_misspelt_advantage_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="rloo"):
        advantages(REWARD, 4, "rlo")

def test_advantage_of_any_shape_is_the_same():
    batch = random_batch(3)
    column = batch["adv"][:, None]
    wide = column.expand(-1, 8)
    for adv in (column, wide, wide.contiguous()):
        equal(gradient("grpo", batch | dict(adv=adv)), gradient("grpo", batch))

ALONE = """
import losses, torch
logp = torch.zeros(2, 3, requires_grad=True)
adv = torch.tensor([1.0, -1.0])
loss, metrics = losses.policy_loss("acpo", logp, logp.detach(), adv, torch.ones(2, 3))
loss.backward()
assert logp.grad.abs().sum() == 1 and losses.__file__.startswith(%r), losses.__file__
"""

def test_losses_py_can_be_copied_away_alone_also_beside_another_experiments(tmp_path):
    shutil.copy(ROOT / "losses.py", tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("raise SystemExit('not ours')")
    done = subprocess.run([sys.executable, "-c", ALONE % str(tmp_path)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
