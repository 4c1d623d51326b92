"""losses.py held against three things: the numbers that the official code prints, the weight that each paper puts on
the policy gradient (written down here a second time, in numpy), and what must hold for every objective, yours included.

    python -m pytest tests/test_losses.py
"""
import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from decimal import Decimal, getcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import losses  # noqa: E402
from losses import AGGREGATIONS, OBJECTIVES, advantages, aggregate, correction_weight, k3, policy_loss  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("losses", deadline=None, derandomize=True, database=None, max_examples=12)
settings.load_profile("losses")
INF = math.inf


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


# ---- 1. Golden numbers: the official functions, run in float64 on four responses of up to six tokens ----

Q = f64([[.90, .50, .10, .30, .70, .05], [.60, .20, .95, .40, .02, .80], [.99, .15, .55, .25, .45, .35],
         [.08, .85, .65, .12, .33, .75]])
R = f64([[1, 1.35, .70, 1.10, .95, 6], [1.05, .60, 1.01, 1.50, 3.5, .90], [1, 1.25, .75, 2, 1.02, .98],
         [.50, 1.10, .92, 4, 1.28, 1]])
MASK = f64([[1] * 6, [1] * 5 + [0], [1] * 4 + [0] * 2, [1] * 6])
ADV = f64([1, -1, .5, -.5])
ENTROPY = f64([[.3, .9, 2.1, 1.2, .5, 3], [.8, 1.9, .1, 1.3, 3.3, .4], [.05, 2.2, 1, 1.6, 1.1, 1.4],
               [2.6, .45, .75, 2.4, 1.5, .6]])

# name, arguments, loss, sum of |d loss / d logp|, d loss / d logp of the first response
GOLDEN = [
    ("dapo", dict(eps_high=.3, dual_clip=3, agg="seq-mean-token-mean"), .1377916667, .5175833333,
     "-0.041667 0 -0.029167 -0.045833 -0.039583 0"),
    ("acpo", {}, -.0149166667, .6767500000, "-0.041667 -0.056250 -0.029167 -0.045833 -0.039583 0"),
    ("acpo", dict(alpha=1, eps_min=.05, eps_max=.5), .1048750000, .6038333333,
     "-0.041667 -0.056250 -0.029167 -0.045833 -0.039583 0"),
    ("cispo_masked", {}, -.0833453258, .6177916667, "-0.041667 0 -0.029167 -0.045833 -0.039583 0"),
    ("entropy_top", {}, .3687500000, .1562500000, "0 0 0 0 0 0"),
    ("entropy_bottom", {}, .0079166667, .6204166667, "-0.062500 0 0 -0.068750 -0.059375 0"),
    ("ar_lopti", dict(part="low"), .1238316667, .1403066667, "0 0 -0.021292 -0.036208 0 0"),
    ("dapo", dict(dual_clip=3), .1409523810, .5219047619, "-0.047619 0 -0.033333 -0.052381 -0.045238 0"),
    ("dapo", {}, .1885714286, .7838095238, "-0.047619 0 -0.033333 -0.052381 -0.045238 0"),
    ("dapo", dict(dual_clip=3, agg="seq-mean-token-mean"), .1400833331, .5175833323,
     "-0.041667 0 -0.029167 -0.045833 -0.039583 0"),
    ("dapo", dict(dual_clip=3, agg="seq-mean-token-sum"), .74, 2.74, "-0.25 0 -0.175 -0.275 -0.2375 0"),
    ("dapo", dict(dual_clip=3, agg="seq-mean-token-sum-norm"), .1233333333, .4566666667,
     "-0.041667 0 -0.029167 -0.045833 -0.039583 0"),
    ("gspo", {}, .0895448256, .4646948248, "0 0 0 0 0 0"),
    ("gspo", dict(eps_low=.5, eps_high=.5), -.0178740679, .9472637175,
     "-0.056050 -0.056050 -0.056050 -0.056050 -0.056050 -0.056050"),
    ("sapo", {}, -.0283774654, .7162209581, "-0.041667 -0.054562 -0.028520 -0.045719 -0.039559 -0.006648"),
    ("gpg", {}, -.0536174165, .7619047619, "-0.047619 -0.047619 -0.047619 -0.047619 -0.047619 -0.047619"),
    ("gmpo", {}, .0765500360, .7126385100, "-0.044446 -0.044446 -0.044446 -0.044446 -0.044446 0"),
    ("cispo", dict(eps_low=10, eps_high=.2), -.0254728259, .7735714286,
     "-0.047619 -0.057143 -0.033333 -0.052381 -0.045238 -0.057143"),
    ("dppo_tv", dict(agg="token-mean"), -.4836648301, .8242857143, "-0.047619 0 -0.033333 -0.052381 -0.045238 0"),
    ("dppo_kl", dict(agg="token-mean"), -.4836648301, .8242857143, "-0.047619 0 -0.033333 -0.052381 -0.045238 0"),
    ("kl_cov", dict(k=.1), .0106470758, 1.26, "-0.047619 -0.064286 -0.033333 -0.052381 -0.045238 -0.285714"),
    ("dro", {}, -.0333105483, .7607155434, "-0.047619 -0.046190 -0.049317 -0.047165 -0.047863 -0.039087"),
    ("gppo", {}, .1885714285, .9933333329, "-0.047619 -0.060952 -0.033333 -0.052381 -0.045238 -0.060952"),
    ("ce_gppo", {}, .1849999999, .9683333329, "-0.047619 -0.057143 -0.033333 -0.052381 -0.045238 -0.057143"),
    ("aspo", {}, -.4852371508, .7698552655, "-0.047619 0 -0.068027 -0.043290 -0.050125 0"),
    ("ctpo", {}, -.0029501857, .3307250000, "-0.047619 0 -0.045000 -0.049500 -0.047025 0"),
    ("bapo", {}, .0457142857, .6338095238, "-0.047619 -0.064286 -0.033333 -0.052381 -0.045238 0"),
    ("dgpo", {}, .0800206938, 1.0453364491, "-0.047619 -0.062597 -0.033333 -0.052381 -0.045238 -0.131966"),
    ("wapo", dict(group_size=4, max_len=8), -.425, .425,
     "-0.031250 -0.042188 -0.021875 -0.034375 -0.029687 -0.187500"),
    ("vespo", {}, -.1732522519, .2096764681, "-0.000001 -0.000001 -0.000001 -0.000001 -0.000001 -0.000001"),
]


def golden_error(name, arguments, loss, grad_sum, first_row):
    """How far we are from the official loss, from its gradient's L1 norm, and from its first row (printed to 1e-6)."""
    logp = (Q.log() + R.log()).requires_grad_()
    ours, metrics = policy_loss(name, logp, Q.log(), ADV, MASK, entropy=ENTROPY, **arguments)
    grad, = torch.autograd.grad(ours, logp)
    row = f64([float(v) for v in first_row.split()])
    errors = ours.item() - loss, grad.abs().sum().item() - grad_sum, (grad[0] - row).abs().max().item()
    return [abs(e) for e in errors], metrics


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c[0]}-{c[2]:.4f}")
def test_official_loss_and_gradient(case):
    (loss, grad, row), _ = golden_error(*case)
    assert loss < 1e-7 and grad < 1e-7 and row < 1e-6


def test_official_bin_stds_of_acpo():
    _, m = golden_error(*GOLDEN[1])
    assert [round(m[f"std_bin{b}"].item(), 6) for b in range(5)] == [1.125344, 2.45, 1.185479, 0.21587, 0.042057]
    width = [m[f"eps_bin{b}"].item() for b in (4, 3, 0, 1, 3, 1)]  # the bins of the first response's tokens
    np.testing.assert_allclose(width, [.32617, .847611, 3, 3, .847611, 3], atol=1e-6)


def test_official_bounds_of_dcpo():
    """Found from outside: the ratio at which the gradient ends, by bisection on either side of 1."""
    def learns(q, A, r):
        logp = f64([[math.log(q * r)]]).requires_grad_()
        loss, _ = policy_loss("dcpo", logp, f64([[math.log(q)]]), f64([A]), f64([[1]]))
        return torch.autograd.grad(loss, logp)[0] != 0

    def edge(q, A, inside, outside):
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if learns(q, A, middle) else (inside, middle)
        return inside

    low = [edge(q, -1, 1, 1e-9) for q in Q[0].tolist()]
    high = [edge(q, 1, 1, 30) for q in Q[0].tolist()]
    np.testing.assert_allclose(low, [.768742, .5, .5, .5, .646385, .5], atol=1e-6)
    np.testing.assert_allclose(high, [1.187184, 1.306226, 2, 1.457427, 1.231925, 2.561553], atol=1e-6)


def test_official_choice_of_bapo():
    _, m = golden_error(*next(c for c in GOLDEN if c[0] == "bapo"))
    low, high = m["band_low"].item(), m["band_high"].item()
    A, mask, r = np.broadcast_to(ADV[:, None], R.shape), MASK.numpy() > 0, R.numpy()
    pos, neg = (A > 0) & mask, (A < 0) & mask
    assert (round(low, 9), round(high, 9)) == (.9, 3.0)
    share = (np.minimum(r, high) * A)[pos].sum() / (np.maximum(r, low) * -A)[neg].sum()
    assert abs(share - .8439490439) < 1e-9


@pytest.mark.parametrize("delta", [1e-6, .005, .01, .02, .03, .05, .1, .2, 1.0, 5.0])
def test_kl3_bounds_to_1e_12(delta):
    """Against bisection in 50-digit decimals on w - 1 - ln w = delta."""
    getcontext().prec = 50
    def root(a, b):  # the divergence is above delta at a, below at b
        a, b = Decimal(a), Decimal(b)
        for _ in range(120):
            m = (a + b) / 2
            a, b = (m, b) if m - 1 - m.ln() > Decimal(delta) else (a, m)
        return float(b)
    low, high = losses.kl3_bounds(delta)
    assert abs(low - root("1e-30", 1)) < 1e-12 and abs(high - root(1000, 1)) < 1e-12 * high


def test_kl3_bounds_of_the_notes():
    np.testing.assert_allclose(losses.kl3_bounds(.1), (.616817, 1.516221), atol=1e-6)
    np.testing.assert_allclose(losses.kl3_bounds(.005), (.903305, 1.103361), atol=1e-6)
    assert losses.kl3_bounds(0) == (1, 1)


# ---- 2. The weight table: grad loss = -Agg(w grad log pi), one row per objective, in numpy ----

def K(x, A, low, high, c=INF):
    """1 where PPO's rule lets a token with ratio x learn."""
    return ~(((A > 0) & (x > high)) | ((A < 0) & (x < low)) | ((A < 0) & (x > c)))


def band(b, low, high, c=INF, x=None, A=None):
    """Weight and loss of a clip: w = x A inside; outside no weight, and the value of the bound."""
    x, A = b.r if x is None else x, b.A if A is None else A
    low, high, c = (np.broadcast_to(v, x.shape) for v in (low, high, c))
    keep = K(x, A, low, high, c)
    value = np.where(keep, x, np.where(A > 0, high, np.where(x < low, low, np.where(np.isinf(c), 0, c))))
    return x * A * keep, -value * A


def constant(b, h):  # a stop-gradient weight on log pi
    return h * b.A, -h * b.A * b.logp


def response_sum(b, t):
    return (t * b.m).sum(1, keepdims=True) + 0 * t


def response_mean(b, t):
    return response_sum(b, t) / np.maximum(b.m.sum(1, keepdims=True), 1)


def kl3(b):
    def root(a, c):
        for _ in range(200):
            m = (a + c) / 2
            a, c = (m, c) if m - 1 - math.log(m) > .1 else (a, m)
        return c
    return band(b, root(1e-9, 1.0), root(50.0, 1.0))


def acpo(b):
    width = np.zeros_like(b.r)
    for k in range(5):
        inside = (b.p >= k / 5) & ((b.p < (k + 1) / 5) | (k == 4)) & (b.m > 0)
        if inside.any():
            width[inside] = np.clip(.2 + 3 * math.sqrt(np.var(b.r[inside]) + 1e-8), 0, 3)
    return band(b, 1 - width, 1 + width, 3)


def etr(b):
    width = .2 * (1 + .5 * np.tanh(np.abs(b.A))) * (1 + .5 * 4 * b.c * (1 - b.c))
    return band(b, 1 - width, 1 + width)


def gmpo(b):
    stopped = ((b.A > 0) & (b.d > .4)) | ((b.A < 0) & (b.d < -.4))
    clipped = np.where(stopped, np.sign(b.A) * .4, b.d)
    rho = np.exp(response_mean(b, clipped))
    return b.A * rho * ~stopped, -b.A * rho


def chosen_by_entropy(b, ratio, sign):
    """The share of each response's tokens, one response after the other."""
    chosen = np.zeros_like(b.m)
    for i, row in enumerate(b.m > 0):
        n = int(row.sum())
        order = sorted(np.flatnonzero(row), key=lambda t: -sign * b.H[i, t])
        chosen[i, order[:max(1, int(n * ratio))] if n else []] = 1
    return chosen


def ar_lopti(b):
    return band(b, .8, 1.24, 3, A=(.3 * b.q + .7) * b.A)


def ce_gppo(b, beta_low=.75, beta_high=1.0, eps_low=.2, eps_high=.2):
    low, high = (b.A < 0) & (b.r < 1 - eps_low), (b.A > 0) & (b.r > 1 + eps_high)
    w = np.where(low, beta_low * (1 - eps_low), np.where(high, beta_high * (1 + eps_high), b.r))
    dropped = (b.A < 0) & (b.r > 10)
    return w * b.A * ~dropped, -np.where(dropped, 10, w) * b.A


def sapo(b):
    tau = np.where(b.A > 0, 1.0, 1.05)
    return b.A * b.r / np.cosh(tau * (b.r - 1) / 2) ** 2, -4 / tau / (1 + np.exp(-tau * (b.r - 1))) * b.A


def dcpo(b):
    low = .5 + .5 * np.sqrt(np.maximum(1 - 4 * .16 / b.q, 0))
    return band(b, low, np.minimum(.5 + .5 * np.sqrt(1 + 4 * .2 / b.q), 10), 10)


def gapo(b):  # c right answers of k
    k, c = b.G, b.c * b.G
    return band(b, .8, 1 + np.where(b.A > 0, .2 + .08 * (k - c) / (k - 1), .2))


def bapo_walk(b, target=1.0):
    """The walk as the paper tells it, one step at a time."""
    low, high, pos, neg = .6, 1.2, (b.A >= 0) & (b.m > 0), (b.A < 0) & (b.m > 0)
    while (np.minimum(b.r, high) * b.A)[pos].sum() < target * (np.maximum(b.r, low) * -b.A)[neg].sum():
        if low < .9 - 1e-9:
            low += .05
        elif high < 3 - 1e-9:
            high += .05
        else:
            break
    return low, high


def m2po(b):
    d2 = b.d[(b.A * b.d > 0) & (b.m > 0)] ** 2
    t, top = 0.0, 20.0  # 20: no clip
    for _ in range(200):
        middle = (t + top) / 2
        t, top = (middle, top) if np.minimum(d2, middle**2).mean() <= .04 else (t, middle)
    return band(b, 1 - max(1 - math.exp(-t), .3), 1 + max(math.exp(t) - 1, .5))


def ctpo(b):
    prefix, low, high, c = (np.ones_like(b.r) for _ in range(4))
    for i, row in enumerate(b.m > 0):
        total, t = 0.0, 0
        for j in np.flatnonzero(row):
            total, t = total + b.d[i, j], t + 1
            prefix[i, j] = math.exp(min(total, 10))
            low[i, j], high[i, j], c[i, j] = (math.exp(v * math.sqrt(t)) for v in (-.025, .05, .05))
    return band(b, low, high, c, x=prefix)


def vespo(b):
    log_w = np.clip(response_sum(b, b.d), math.log(1e-8), 20)
    k, lam = np.where(b.A >= 0, 2, 3), np.where(b.A >= 0, 3, 2)
    return constant(b, np.exp(lam + k * log_w - lam * np.exp(log_w)))


def aspo(b):
    eps = np.zeros_like(b.r)
    for i, row in enumerate(b.m > 0):
        if row.any():
            eps[i] = np.where(b.H[i] > np.quantile(b.H[i][row], .8), .4, .2)
    x = np.where(b.A > 0, 1 / b.r, b.r)
    keep = K(b.r, b.A, 1 - eps, 1 + eps)
    value = np.where(x > 3, 3 * b.logp, x)
    value = np.where(keep, value, np.where(b.A > 0, 1 / (1 + eps), 1 - eps))
    return b.A * np.minimum(x, 3) * keep, -b.A * value


def dgpo(b):
    low, high = (b.A < 0) & (b.r < .8), (b.A > 0) & (b.r > 1.28)
    w = np.where(low, b.r**2 / .8, np.where(high, np.sqrt(b.r * 1.28), b.r))
    return w * b.A, -w * b.A


def covariance(b):
    n = b.m.sum()
    return (b.A - (b.A * b.m).sum() / n) * (b.logp - (b.logp * b.m).sum() / n)


def clip_cov(b):  # with k=1: every candidate is drawn
    drawn = (covariance(b) > 1) & (covariance(b) < 5) & K(b.r, b.A, .8, 1.2)
    w, loss = band(b, .8, 1.2)
    return w * ~drawn, loss * ~drawn


def kl_cov(b):  # with k=0.1
    chosen = np.zeros(b.m.size, bool)
    cov = np.where(b.m > 0, covariance(b), -INF).ravel()
    chosen[np.argsort(-cov)[:max(1, int(b.m.sum() * .1))]] = True
    chosen = chosen.reshape(b.m.shape)
    return b.r * b.A - np.sign(b.d) * chosen, -b.r * b.A + np.abs(b.d) * chosen


def dppo(b, kl):
    if kl:
        moved = b.q * np.log(b.q / b.p) + (1 - b.q) * np.log((1 - b.q + 1e-8) / (1 - b.p + 1e-8)) > .05
    else:
        moved = np.abs(b.p - b.q) > .15
    outward = np.where(b.A > 0, b.p > b.q, b.p < b.q)
    return constant(b, np.minimum(b.r, 20) * ~(moved & outward))


SMTM, TM = "seq-mean-token-mean", "token-mean"
TABLE = {  # name: (aggregation, advantage of the published run, (weight, loss))
    "grpo": (SMTM, "grpo", lambda b: band(b, .8, 1.2)),
    "dr_grpo": ("seq-mean-token-sum-norm", "mean", lambda b: band(b, .8, 1.2)),
    "dapo": (TM, "grpo", lambda b: band(b, .8, 1.28, 10)),
    "kl3": (SMTM, "grpo", kl3),
    "raft": (SMTM, "reward", lambda b: (np.maximum(b.A, 0), -np.maximum(b.A, 0) * b.logp)),
    "wapo": ("winning-groups", "mean", lambda b: band(b, 0, 10, A=np.maximum(b.A, 0))),
    "acpo": (SMTM, "grpo", acpo),
    "etr": (SMTM, "grpo", etr),
    "gspo": (SMTM, "grpo", lambda b: band(b, 1 - 3e-4, 1 + 4e-4, x=np.exp(np.minimum(response_mean(b, b.d), 10)))),
    "cispo": (TM, "grpo", lambda b: constant(b, np.clip(b.r, 0, 1.3))),
    "cispo_masked": (SMTM, "grpo", lambda b: constant(b, np.clip(b.r, 0, 1.45) * K(b.r, b.A, .8, 1.3))),
    "sapo": (SMTM, "grpo", sapo),
    "entropy_top": (SMTM, "grpo", lambda b: band(b, .8, 1.3, 3)),
    "entropy_bottom": (SMTM, "grpo", lambda b: band(b, .8, 1.3, 3)),
    "ar_lopti": (SMTM, "grpo", ar_lopti),
    "gpg": (TM, "gpg", lambda b: constant(b, 1)),
    "rloo": ("seq-mean-token-sum", "rloo", lambda b: constant(b, 1)),
    "dcpo": (TM, "grpo", dcpo),
    "gapo": (SMTM, "grpo", gapo),
    "bapo": (TM, "grpo", lambda b: band(b, *bapo_walk(b), 3)),
    "m2po": (TM, "grpo", m2po),
    "gmpo": (SMTM, "grpo", gmpo),
    "ctpo": (TM, "grpo", ctpo),
    "vespo": (TM, "grpo", vespo),
    "topr": ("seq-mean-token-sum", "signed", lambda b: constant(
        b, np.where(b.A > 0, 1, np.minimum(np.exp(response_sum(b, b.d)), 1)))),
    "gppo": (TM, "grpo", lambda b: ce_gppo(b, 1, 1, .2, .28)),
    "ce_gppo": (TM, "grpo", ce_gppo),
    "aspo": (TM, "grpo", aspo),
    "dgpo": (TM, "grpo", dgpo),
    "r2vpo": (SMTM, "grpo", lambda b: (b.r * (b.A - 2 * .04 * (b.r - 1)), -b.r * b.A + .04 * (b.r - 1) ** 2)),
    "dro": (TM, "grpo", lambda b: (b.A - .1 * b.d, -b.A * b.logp + .05 * b.d**2)),
    "clip_cov": (TM, "grpo", clip_cov),
    "kl_cov": (TM, "grpo", kl_cov),
    "psr_nsr": (TM, "signed", lambda b: band(b, .8, 1.2, A=np.where(b.A > 0, .1 * b.A, b.A))),
    "dppo_tv": ("seq-mean-token-sum-norm", "grpo", lambda b: dppo(b, kl=False)),
    "dppo_kl": ("seq-mean-token-sum-norm", "grpo", lambda b: dppo(b, kl=True)),
}
SELECTS = {"entropy_top": lambda b: chosen_by_entropy(b, .2, 1),
           "entropy_bottom": lambda b: chosen_by_entropy(b, .8, -1)}
ARGUMENTS = {"clip_cov": dict(k=1.0), "kl_cov": dict(k=.1)}  # where the default would choose one token of so few
BATCH_STATISTICS = {"bapo", "m2po", "clip_cov", "kl_cov"}  # and acpo, unless it is given the moments of the mini-batch


def random_batch(seed, groups=3, group=4, T=8, dtype=torch.float64):
    """Responses of 0 to T tokens, some with a hole; odd seeds are far off policy; all probabilities are below 1."""
    rng = np.random.default_rng(seed)
    B = groups * group
    mask = (np.arange(T) < rng.integers(0, T + 1, B)[:, None]) & (rng.random((B, T)) > .1)
    mask[0] = True
    logq = -rng.exponential(2, (B, T)) - .02
    spread = rng.choice([.1, .5, 3.] if seed % 2 else [.02, .05, .1, .1, .6], (B, T))
    logp = np.minimum(logq + rng.normal(0, 1, (B, T)) * spread, -rng.uniform(.01, .02, (B, T)))  # no ties at the top
    reward = rng.integers(0, 2, B).astype(float)
    A = rng.normal(0, 1.5, B)
    batch = dict(logp=logp, old_logp=logq, adv=A, mask=mask.astype(float), entropy=rng.exponential(1, (B, T)),
                 sum_p2=rng.random((B, T)), reward=reward)
    return {k: torch.tensor(v, dtype=dtype) for k, v in batch.items()} | dict(group_size=group, max_len=T + 3)


def numpy_view(batch):
    n = {k: v.detach().numpy() for k, v in batch.items() if isinstance(v, torch.Tensor)}
    m, G = n["mask"], batch["group_size"]
    d = n["logp"] - n["old_logp"]
    c = np.repeat(n["reward"].reshape(-1, G).mean(1), G)[:, None]
    return SimpleNamespace(logp=n["logp"] * m, d=d * m, r=np.exp(d * m), p=np.exp(n["logp"] * m),
                           q=np.exp(n["old_logp"] * m), A=n["adv"][:, None] * m, m=m, H=n["entropy"], c=c, G=G)


def loss_and_grad(name, batch, **arguments):
    batch = dict(batch)
    logp = batch.pop("logp").clone().requires_grad_()
    loss, metrics = policy_loss(name, logp, **batch, **{**ARGUMENTS.get(name, {}), **arguments})
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics


def coefficients(agg, m, A, G, max_len):
    """What one token counts in the mean, by loops."""
    c, rows = np.zeros_like(m), [i for i in range(len(m)) if m[i].sum() > 0]
    winners = sum(any(A[i].sum() > 0 for i in range(g, g + G)) for g in range(0, len(m), G))
    for i in rows:
        for t in range(m.shape[1]):
            if m[i, t]:
                c[i, t] = {"token-mean": 1 / m.sum(), "seq-mean-token-mean": 1 / m[i].sum() / len(rows),
                           "seq-mean-token-sum": 1 / len(rows), "seq-mean-token-sum-norm": 1 / len(rows) / max_len,
                           "winning-groups": 1 / max(winners, 1) / max_len / G}[agg]
    return c


def table_error(name, seed):
    """Largest deviation of loss and gradient from the table, on random tokens, under the published aggregation."""
    batch = random_batch(seed)
    b = numpy_view(batch)
    agg, _, row = TABLE[name]
    w, value = row(b)
    chosen = SELECTS.get(name, lambda b: b.m)(b)
    c = coefficients(agg, chosen, b.A, b.G, batch["max_len"])
    loss, grad, _ = loss_and_grad(name, batch)
    return abs(loss.item() - (c * value).sum()), np.abs(grad.numpy() + c * w).max()


@pytest.mark.parametrize("name", TABLE)
def test_weight_table(name):
    for seed in range(12):
        loss, grad = table_error(name, seed)
        assert loss < 1e-10 and grad < 1e-10, f"seed {seed}"


@pytest.mark.parametrize("name", TABLE)
def test_weight_per_token(name):
    """Sum over tokens, no mean: the gradient is the weight itself, also where two mistakes in a mean would cancel."""
    for seed in (20, 21, 22):
        batch = random_batch(seed)
        b = numpy_view(batch)
        _, grad, _ = loss_and_grad(name, batch, agg="token-mean", totals={"tokens": 1})
        w = TABLE[name][2](b)[0] * SELECTS.get(name, lambda b: b.m)(b)
        np.testing.assert_allclose(-grad.numpy(), w, atol=1e-10)


@pytest.mark.parametrize("name", TABLE)
def test_published_aggregation_and_advantage(name):
    assert (OBJECTIVES[name].agg, OBJECTIVES[name].advantage) == TABLE[name][:2]


def test_the_random_tokens_reach_every_case():
    """A table is only as good as its rows: both signs, inside, below, above, beyond the dual clips, every bin."""
    b = [numpy_view(random_batch(s)) for s in range(12)]
    r, A, p, m = (np.concatenate([getattr(x, k).ravel() for x in b]) for k in ("r", "A", "p", "m"))
    for low, high in ((0, .5), (.5, .8), (.8, 1.2), (1.2, 1.5), (1.5, 3), (3, 10), (10, INF)):
        for sign in (-1, 1):
            assert ((r > low) & (r < high) & (A * sign > 0) & (m > 0)).any(), (low, high, sign)
    assert set((p[m > 0] * 5).astype(int)) == set(range(5))
    chosen = [loss_and_grad("m2po", random_batch(s))[2] for s in range(12)]  # a band that the batch chooses
    assert all(len({round(c[k].item(), 6) for c in chosen}) > 3 for k in ("band_low", "band_high"))


def test_names_and_hyperparameters_of_the_contract():
    assert set(TABLE) <= set(OBJECTIVES)
    contract = dict(
        grpo=dict(eps_low=.2, eps_high=.2, dual_clip=None), dr_grpo=dict(eps_low=.2, eps_high=.2, dual_clip=None),
        dapo=dict(eps_low=.2, eps_high=.28, dual_clip=10), cispo=dict(eps_low=1.0, eps_high=.3),
        cispo_masked=dict(is_low=1.0, is_high=.45, eps_low=.2, eps_high=.3), gspo=dict(eps_low=3e-4, eps_high=4e-4),
        acpo=dict(alpha=3, eps=.2, eps_min=0, eps_max=3, bins=5, dual_clip=3), kl3=dict(delta=.1, dual_clip=None),
        etr=dict(eps=.2, micro=.5, macro=.5), wapo=dict(eps=9), ar_lopti=dict(alpha=.3, eta=.5, part=None),
        entropy_top=dict(ratio=.2, eps_low=.2, eps_high=.3, dual_clip=3), entropy_bottom=dict(ratio=.8),
        ce_gppo=dict(beta_low=.75, beta_high=1.0), sapo=dict(tau_pos=1.0, tau_neg=1.05),
        gmpo=dict(eps_low=.4, eps_high=.4), dppo_tv=dict(delta_low=.15, delta_high=.15, cap=20),
        dppo_kl=dict(delta_low=.05, delta_high=.05, cap=20), kl_cov=dict(k=.002, beta=1.0), dro=dict(beta=.1))
    for name, hyperparameters in contract.items():
        parameters = inspect.signature(OBJECTIVES[name]).parameters
        assert {h: parameters[h].default for h in hyperparameters} == hyperparameters, name
    for name in TABLE:
        doc = OBJECTIVES[name].__doc__
        assert doc and len(doc.splitlines()) <= 2, f"{name}: the docstring is the idea and the formula, in two lines"


@pytest.mark.parametrize("name", [n for n in TABLE if "dual_clip" in inspect.signature(OBJECTIVES[n]).parameters])
def test_dual_clip_is_a_switch(name):
    """None lets losers push without bound; a number ends (aspo: caps) their gradient at that ratio."""
    batch = dict(logp=f64([[-1.0]]), old_logp=f64([[-2.5]]), adv=f64([-1]), mask=f64([[1]]), entropy=f64([[1]]))
    free, stopped = (loss_and_grad(name, batch, dual_clip=c)[1].item() for c in (None, .05 if name == "ctpo" else 2.0))
    shape = .3 * math.exp(-2.5) + .7 if name == "ar_lopti" else 1
    np.testing.assert_allclose([free, stopped], [shape * math.exp(1.5), 2 if name == "aspo" else 0], rtol=1e-12)


# ---- 3. What holds for every objective, on random batches of random shape ----

ON_POLICY = {  # the weight at ratio 1, where it is not A
    "raft": lambda b: np.maximum(b.A, 0), "wapo": lambda b: np.maximum(b.A, 0),
    "ar_lopti": lambda b: (.3 * b.q + .7) * b.A, "psr_nsr": lambda b: np.where(b.A > 0, .1, 1) * b.A,
    "entropy_top": lambda b: b.A * SELECTS["entropy_top"](b),
    "entropy_bottom": lambda b: b.A * SELECTS["entropy_bottom"](b),
    "clip_cov": lambda b: b.A * ~((covariance(b) > 1) & (covariance(b) < 5)),
}
shapes = given(seed=st.integers(0, 2**31), groups=st.integers(1, 3), group=st.integers(1, 4), T=st.integers(1, 6))


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def check_on_policy(name, batch):
    batch = batch | dict(old_logp=batch["logp"].clone())
    _, grad, _ = loss_and_grad(name, batch, agg="token-mean", totals={"tokens": 1})
    b = numpy_view(batch)
    np.testing.assert_allclose(-grad.numpy(), ON_POLICY.get(name, lambda b: b.A)(b) * b.m, atol=1e-9)


def check_garbage(name, batch, seed):
    """What lies outside the mask, and more of it to the right, changes nothing, whatever it is."""
    loss, grad, metrics = loss_and_grad(name, batch)
    T, out = batch["mask"].shape[1], batch["mask"] == 0
    junk = torch.tensor([INF, -INF, math.nan, 1e30, 3.0], dtype=torch.float64)
    pick = torch.Generator().manual_seed(seed)
    dirty = {}
    for k in ("logp", "old_logp", "entropy", "sum_p2"):
        t = batch[k].clone()
        t[out] = junk[torch.randint(5, (int(out.sum()),), generator=pick)]
        dirty[k] = torch.cat([t, junk[torch.randint(5, (len(t), 2), generator=pick)]], 1)
    dirty["mask"] = torch.cat([batch["mask"], torch.zeros(len(out), 2)], 1)
    loss2, grad2, metrics2 = loss_and_grad(name, batch | dirty)
    close(loss2, loss), close(grad2[:, :T], grad)
    assert (grad2[:, T:] == 0).all() and (grad2[:, :T][out] == 0).all()
    for k in metrics:
        close(metrics2[k], metrics[k], 1e-7)


def check_order(name, batch, seed):
    """Groups, responses in a group and tokens in a response (not for a prefix ratio) may stand in any order."""
    pick, G, (B, T) = torch.Generator().manual_seed(seed), batch["group_size"], batch["mask"].shape
    groups = torch.randperm(B // G, generator=pick).tolist()
    rows = torch.cat([g * G + torch.randperm(G, generator=pick) for g in groups])
    if name == "kl_cov" and np.abs(covariance(numpy_view(batch)) * batch["mask"].numpy()).max() < 1e-9:
        return  # one response: every token ties for the highest covariance
    cols = torch.arange(T) if name == "ctpo" else torch.randperm(T, generator=pick)
    loss, grad, _ = loss_and_grad(name, batch)
    moved = {k: v[rows][:, cols] if v.dim() == 2 else v[rows] for k, v in batch.items() if isinstance(v, torch.Tensor)}
    loss2, grad2, _ = loss_and_grad(name, batch | moved)
    close(loss2, loss), close(grad2, grad[rows][:, cols])


def check_split(name, batch, cut):
    """Micro-batches of any rows, even across groups, add up to the mini-batch if they know its counts."""
    b, G = batch, batch["group_size"]
    totals = {"tokens": b["mask"].sum(), "sequences": (b["mask"].sum(1) > 0).sum(),
              "winning_groups": ((b["adv"][:, None] * b["mask"]).sum(1) > 0).view(-1, G).any(1).sum()}
    rate, parts = b["reward"].view(-1, G).mean(1).repeat_interleave(G), (slice(cut), slice(cut, None))
    if name == "acpo":
        totals["moments"] = sum(losses.ratio_moments(b["logp"][s], b["old_logp"][s], b["mask"][s]) for s in parts)
    whole = loss_and_grad(name, b)[:2]
    loss, grads = 0, []
    for s in parts:
        part = {k: v[s] if isinstance(v, torch.Tensor) else v for k, v in b.items()}
        if len(part["logp"]):
            one, grad, _ = loss_and_grad(name, part, totals=totals, pass_rate=rate[s])
            loss, grads = loss + one, grads + [grad]
    return max((loss - whole[0]).abs().item(), (torch.cat(grads) - whole[1]).abs().max().item())


@pytest.mark.parametrize("name", OBJECTIVES)
@shapes
def test_ratio_one_has_weight_A(name, seed, groups, group, T):
    check_on_policy(name, random_batch(seed, groups, group, T))


@pytest.mark.parametrize("name", OBJECTIVES)
@shapes
def test_padding_never_counts(name, seed, groups, group, T):
    check_garbage(name, random_batch(seed, groups, group, T), seed)


@pytest.mark.parametrize("name", OBJECTIVES)
@shapes
def test_order_never_counts(name, seed, groups, group, T):
    check_order(name, random_batch(seed, groups, group, T), seed)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in BATCH_STATISTICS])
@given(seed=st.integers(0, 2**31), cut=st.integers(1, 11))
def test_micro_batches_add_up(name, seed, cut):
    assert check_split(name, random_batch(seed), cut) < 1e-10


@pytest.mark.parametrize("name", sorted(BATCH_STATISTICS))
def test_batch_statistics_do_not_add_up(name):
    """The list of exceptions is honest: these depend on what shares the micro-batch."""
    assert max(check_split(name, random_batch(seed), 5) for seed in range(6)) > 1e-4


def test_moments_count_what_the_mask_counts():
    batch = random_batch(1)
    clean = losses.ratio_moments(batch["logp"], batch["old_logp"], batch["mask"], 4)
    out = batch["mask"] == 0
    dirty = [batch[k].masked_fill(out, v) for k, v in (("logp", math.nan), ("old_logp", -INF))]
    assert torch.equal(losses.ratio_moments(*dirty, batch["mask"], 4), clean) and clean[0].sum() == batch["mask"].sum()
    b = numpy_view(batch)
    for k in range(4):
        x = b.r[(b.m > 0) & (b.p >= k / 4) & (b.p < (k + 1) / 4)] - 1
        np.testing.assert_allclose(clean[:, k], [len(x), x.sum(), (x * x).sum()], rtol=1e-12)


def test_acpo_without_the_moments_depends_on_the_micro_batch():
    batch = random_batch(3)
    half = {k: v[:6] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    whole, part = (loss_and_grad("acpo", x)[2]["std_bin0"] for x in (batch, half))
    moments = losses.ratio_moments(batch["logp"], batch["old_logp"], batch["mask"])
    known = loss_and_grad("acpo", half, totals={"moments": moments})[2]["std_bin0"]
    assert abs(whole - part) > .01 and abs(whole - known) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_always_finite(name, dtype):
    """Ratios of e^+-30 and e^+-120, probabilities of exactly 1, no token at all, a single token, a group of one."""
    t = lambda rows: torch.tensor(rows, dtype=dtype)  # noqa: E731
    logp, old = [0, -30, -1e-3, -60, 0, -90, -.1, 0, -120], [-30, 0, -30, -.5, 0, -60, -.1, -120, 0]
    ones, none = [1] * len(logp), [0] * len(logp)
    cases = [  # logp, old_logp, adv, mask, group size
        ([logp] * 5, [old] * 5, [1, -1, 0, 1, -1], [ones, ones, ones, none, none], 5),
        ([logp] * 2, [old] * 2, [1, -1], [none] * 2, 2),
        ([[v] for v in logp + logp], [[v] for v in old + old], ones + [-1] * 9, [[1]] * 18, 1),
        ([[-.3]], [[-.3]], [0], [[1]], 1), ([[0.0]], [[-30.0]], [1], [[1]], 1), ([[-30.0]], [[0.0]], [-1], [[1]], 1),
        ([logp] * 4, [old] * 4, [0] * 4, [ones] * 4, 4),
    ]
    for logp, old, adv, mask, group in cases:
        logp, old, mask = t(logp), t(old), t(mask)
        batch = dict(logp=logp, old_logp=old, adv=t(adv), mask=mask, entropy=-logp, sum_p2=logp.exp(), group_size=group,
                     reward=(t(adv) > 0).to(dtype), sampler_logp=old - .1, ref_logp=old, kl_beta=.1)
        loss, grad, metrics = loss_and_grad(name, batch)
        assert loss.isfinite() and grad.isfinite().all() and loss.dtype == grad.dtype == dtype
        assert all(v.isfinite() and not v.requires_grad and v.dim() == 0 for v in metrics.values()), metrics


@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_is_computed_in_float32_and_inputs_stay(name):
    batch = random_batch(1)
    low = {k: v.bfloat16() if k in ("logp", "old_logp") else v.float() if isinstance(v, torch.Tensor) else v
           for k, v in batch.items()}
    before = {k: v.clone() for k, v in low.items() if isinstance(v, torch.Tensor)}
    loss, grad, _ = loss_and_grad(name, low)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert all(torch.equal(low[k], v) for k, v in before.items())
    up = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in low.items()}
    close(loss, loss_and_grad(name, up)[0], 1e-6)


def test_beyond_a_log_ratio_of_20_the_gradient_ends():
    """As in verl: without a dual clip, A < 0 would otherwise put a weight of e^25 on one token."""
    for d, w in ((19.9, math.exp(19.9)), (25.0, 0.0)):
        batch = dict(logp=f64([[-.1]]), old_logp=f64([[-.1 - d]]), adv=f64([-1]), mask=f64([[1]]))
        np.testing.assert_allclose(loss_and_grad("grpo", batch)[1].item(), w, rtol=1e-9)


def same(first, second, seeds=range(6)):
    for seed in seeds:
        batch = random_batch(seed)
        a, b = (loss_and_grad(name, batch, **kw) for name, kw in (first, second))
        close(a[0], b[0], 1e-12), close(a[1], b[1], 1e-12)


def test_objectives_that_are_the_same_under_another_name():
    low, high = losses.kl3_bounds(.1)
    same(("kl3", {}), ("dapo", dict(eps_low=1 - low, eps_high=high - 1, dual_clip=None, agg=SMTM)))
    same(("acpo", dict(alpha=0)), ("grpo", dict(dual_clip=3)))
    same(("ce_gppo", dict(beta_low=1, beta_high=1, eps_high=.28)), ("gppo", {}))
    same(("etr", dict(micro=0, macro=0)), ("grpo", {}))
    same(("gapo", dict(eps_high=.2)), ("grpo", {}))
    same(("entropy_top", dict(ratio=1.0, eps_high=.2)), ("grpo", dict(dual_clip=3)))
    same(("cispo_masked", dict(eps_low=INF, eps_high=INF, is_high=.3)), ("cispo", dict(agg=SMTM)))
    same(("dppo_tv", dict(delta_low=2, delta_high=2, cap=1.3)), ("cispo", dict(agg="seq-mean-token-sum-norm")))
    same(("dro", dict(beta=0)), ("gpg", {}))
    same(("rloo", dict(agg=TM)), ("gpg", {}))


def test_cispo_without_a_cap_has_the_gradient_of_the_unclipped_ratio():
    batch = random_batch(4)
    a = loss_and_grad("cispo", batch, eps_high=INF)[1]
    close(a, loss_and_grad("grpo", batch, agg=TM, eps_low=INF, eps_high=INF)[1], 1e-12)


@pytest.mark.parametrize("eps", [(3e-4, 4e-4), (.3, .4)])
def test_gspo_in_token_form_is_gspo(eps):
    """The sequence form as the paper writes it: s through all tokens, one clip and one term per response."""
    batch = random_batch(5, T=12)
    logp, m = batch["logp"].clone().requires_grad_(), batch["mask"]
    rows = m.sum(1) > 0
    s = (((logp - batch["old_logp"]) * m).sum(1)[rows] / m.sum(1)[rows]).exp()
    A = batch["adv"][rows]
    loss = -torch.minimum(s * A, s.clamp(1 - eps[0], 1 + eps[1]) * A).mean()
    ours = loss_and_grad("gspo", batch, eps_low=eps[0], eps_high=eps[1])
    close(ours[0], loss.detach(), 1e-12), close(ours[1], torch.autograd.grad(loss, logp)[0], 1e-12)


def test_the_two_passes_of_lopti_add_up_to_one():
    batch = random_batch(6)
    whole, low, high = (loss_and_grad("ar_lopti", batch, part=p)[1] for p in (None, "low", "high"))
    close(low + high, whole, 1e-12)
    assert not (low * high).any() and (low[batch["old_logp"].exp() >= .5] == 0).all() and low.any() and high.any()


def test_bapo_stops_where_the_walk_stops():
    """At targets that end the walk at its start, at each step of its way, and never."""
    seen = set()
    for seed in (3, 5, 7):
        batch = random_batch(seed)
        b = numpy_view(batch)
        losers = (np.maximum(b.r, .9) * np.minimum(b.A, 0)).sum()
        easy, hard = ((np.minimum(b.r, high) * np.maximum(b.A, 0)).sum() / -losers for high in (1.2, 3))
        for target in np.linspace(.9 * easy, 1.02 * hard, 60):
            m = loss_and_grad("bapo", batch, target=float(target))[2]
            walk = bapo_walk(b, target)
            np.testing.assert_allclose((m["band_low"], m["band_high"]), walk, atol=1e-9)
            seen.add(round(walk[1], 6))
    assert {1.2, 3.0} < seen and len(seen) > 30


def test_clip_cov_drops_as_many_as_it_says():
    batch = random_batch(7, groups=8, T=30)
    b = numpy_view(batch)
    plain = loss_and_grad("grpo", batch, agg=TM)[1]
    candidate = torch.tensor((covariance(b) > 1) & (covariance(b) < 5) & (b.m > 0)) & (plain != 0)
    for k, n in ((2e-4, 1), (.05, int(.05 * b.m.sum()))):
        grad = loss_and_grad("clip_cov", batch, k=k)[1]
        dropped = grad != plain
        assert dropped.sum() == n < candidate.sum() and candidate[dropped].all() and (grad[dropped] == 0).all()
    draws = {tuple(loss_and_grad("clip_cov", batch, k=2e-4, seed=s)[1].eq(0).flatten().tolist()) for s in range(5)}
    assert len(draws) > 1 and torch.equal(grad, loss_and_grad("clip_cov", batch, k=.05)[1])


def test_psr_and_nsr_leave_the_other_half_out_of_the_mean():
    batch = random_batch(8)
    batch["adv"] = batch["adv"].sign()
    for kw, kept in ((dict(psr=1.0, nsr=0.0), batch["adv"] > 0), (dict(psr=0.0), batch["adv"] < 0)):
        half = {k: v[kept] if isinstance(v, torch.Tensor) else v for k, v in batch.items()} | dict(group_size=1)
        a, b = loss_and_grad("psr_nsr", batch, **kw), loss_and_grad("grpo", half, agg=TM)
        close(a[0], b[0], 1e-12), close(a[1][kept], b[1], 1e-12)


# ---- 4. Advantages, aggregation, corrections ----

REWARD = f64([1, 0, 0, 1, .1, .1, .1, .1, 0, .3, .9, .3])


@pytest.mark.parametrize("kind", losses.ADVANTAGES)
def test_advantages_by_loops(kind):
    length, out = f64([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]), []
    groups = [REWARD[i:i + 4].tolist() for i in (0, 4, 8)]
    for g in groups:
        mean = sum(g) / 4
        std = math.sqrt(sum((v - mean) ** 2 for v in g) / 3)  # Bessel
        for i, v in enumerate(g):
            others = [u for j, u in enumerate(g) if j != i]
            out.append({"grpo": (v - mean) / (std + 1e-6), "mean": v - mean, "rloo": v - sum(others) / 3, "reward": v,
                        "maxrl": (v - mean) / (mean + 1e-6), "gpg": (v - mean) * 3 / 2,  # 2 of 3 groups carry signal
                        "signed": 2 * v - 1, "reinforce_pp": v - mean}[kind])
    if kind == "reinforce_pp":  # a mean and a Bessel variance over tokens: each response as often as it has tokens
        tokens = np.repeat(out, length.int().tolist())
        out = (np.array(out) - tokens.mean()) / math.sqrt(tokens.var(ddof=1) + 1e-8)
    flat = range(4, 8) if kind not in ("reward", "signed") else []
    expected = [0.0 if i in flat else v for i, v in enumerate(out)]
    np.testing.assert_allclose(advantages(REWARD, 4, kind, length).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["grpo", "mean", "rloo", "maxrl", "gpg", "reinforce_pp"])
def test_a_group_without_spread_has_no_advantage(kind, dtype):
    """0.1 eight times has a mean that is not 0.1; divided by std + 1e-6 the difference would be a gradient."""
    for value in (.1, .7, 1 / 3, 1.0, 0.0):
        reward = torch.tensor([value] * 8 + [1.0, 0.0] * 4, dtype=dtype)
        A = advantages(reward, 8, kind, torch.arange(16) % 5 + 1)
        assert (A[:8] == 0).all() and (A[8:] != 0).any() and A.isfinite().all() and A.dtype == dtype
        assert (advantages(reward[:3], 1, kind, torch.ones(3)) == 0).all()  # a group of one
        assert (advantages(reward[:8], 8, kind, torch.ones(8)) == 0).all()  # nothing but such groups


@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_aggregations_by_loops(agg):
    rng = np.random.default_rng(0)
    for trial in range(5):
        loss = rng.normal(size=(6, 5))
        mask = (rng.random((6, 5)) < .6).astype(float)
        mask[[1, 4]] = 0  # empty rows
        A = rng.normal(size=(6, 5))
        expected = (coefficients(agg, mask, A * mask, 3, 9) * loss).sum()
        winners = sum(((A * mask)[g:g + 3].sum(1) > 0).any() for g in (0, 3))
        got = aggregate(f64(loss), f64(mask), agg, totals={"winning_groups": winners}, max_len=9, group_size=3)
        assert abs(got.item() - expected) < 1e-12
        assert aggregate(f64(loss), f64(mask * 0), agg, totals={"winning_groups": 0}, max_len=9) == 0


def test_every_aggregation_takes_any_objective_and_counts_from_outside():
    batch = random_batch(9)
    for agg in AGGREGATIONS:
        one = loss_and_grad("grpo", batch, agg=agg, totals=dict(tokens=10, sequences=10, winning_groups=10))[0]
        two = loss_and_grad("grpo", batch, agg=agg, totals=dict(tokens=20, sequences=20, winning_groups=20))[0]
        close(one, 2 * two, 1e-12)


def test_corrections_multiply_every_objective():
    old, rho = f64([[-1, -1, -1, -1, -1]]), f64([[.4, .5, 1.5, 4.0, 6.0]])
    close(correction_weight(old, old - rho.log(), "tis"), f64([[.4, .5, 1.5, 2, 2]]), 1e-12)
    close(correction_weight(old, old - rho.log() + 1e-12, "icepop"), f64([[0, .5, 1.5, 4, 0]]) * (rho > .5), 1e-9)
    assert correction_weight(old, old - 1e4, "tis").isfinite().all()
    for name in ("grpo", "acpo", "gspo", "dro"):
        batch = random_batch(2)
        sampler = batch["old_logp"] - f64([.1]) * torch.arange(8)
        for kind in ("tis", "icepop"):
            plain = loss_and_grad(name, batch)[1]
            weighed = loss_and_grad(name, batch, sampler_logp=sampler, correction=kind)[1]
            close(weighed, plain * correction_weight(batch["old_logp"], sampler, kind), 1e-12)


def test_k3_is_the_kl_by_enumeration():
    """E_pi[k3] = KL(pi || ref) exactly; with the two policies swapped (a known bug of peers) it is another number."""
    pi, ref = f64(np.random.default_rng(0).normal(size=(2, 3, 50))).log_softmax(-1)
    true = (pi.exp() * (pi - ref)).sum(-1)
    close((pi.exp() * k3(pi, ref)).sum(-1), true, 1e-12)
    assert (k3(pi, ref) >= 0).all() and ((pi.exp() * k3(ref, pi)).sum(-1) - true).abs().min() > .01


def test_kl_to_a_reference_is_added_with_its_weight():
    batch = random_batch(2)
    ref = batch["old_logp"] - .3
    plain, with_kl = (loss_and_grad("grpo", batch, agg=TM, ref_logp=ref, kl_beta=beta) for beta in (0, .04))
    m, d = batch["mask"], ref - batch["logp"]
    close(with_kl[0] - plain[0], (.04 * k3(batch["logp"], ref) * m).sum() / m.sum(), 1e-12)
    close(with_kl[1] - plain[1], .04 * (1 - d.exp()) * m / m.sum(), 1e-12)


# ---- 5. The interface ----

@pytest.mark.parametrize("call, nearest", [
    (lambda b: policy_loss("dpao", **b), "dapo"), (lambda b: policy_loss("gspoo", **b), "gspo"),
    (lambda b: policy_loss("dapo", **b, eps_hihg=.3), "eps_high"),
    (lambda b: policy_loss("acpo", **b, alhpa=1), "alpha"),
    (lambda b: policy_loss("grpo", **b, agg="tokenmean"), "token-mean"),
    (lambda b: policy_loss("ar_lopti", **b, part="hihg"), "high"), (lambda b: policy_loss("gpg", **b, eps=1), "none"),
    (lambda b: policy_loss("grpo", **b, sampler_logp=b["logp"], correction="icepopp"), "icepop"),
    (lambda b: advantages(REWARD, 4, "rlo"), "rloo"),
    (lambda b: policy_loss("entropy_top", **{**b, "entropy": None}), "entropy"),
    (lambda b: policy_loss("etr", **{**b, "group_size": 5, "reward": None}), "pass_rate")])
def test_a_misspelt_name_is_answered_with_the_nearest(call, nearest):
    with pytest.raises(ValueError, match=nearest):
        call(random_batch(0))


def test_advantage_of_any_shape():
    batch = random_batch(3)
    column = batch["adv"][:, None]
    for adv in (column, column.expand(-1, 8), column.expand(-1, 8).contiguous().requires_grad_()):
        close(loss_and_grad("grpo", batch | dict(adv=adv))[1], loss_and_grad("grpo", batch)[1], 0)


def test_pass_rate_comes_from_the_rewards_of_each_group():
    batch = random_batch(5)
    rate = batch["reward"].view(-1, 4).mean(1).repeat_interleave(4)
    assert len(set(rate.tolist())) > 1
    for name in ("etr", "gapo"):
        given_rate = loss_and_grad(name, batch | dict(reward=None), pass_rate=rate)
        close(given_rate[1], loss_and_grad(name, batch)[1], 0)


def test_clip_fractions_count_only_the_side_that_ppo_stops():
    """Four tokens below the band, three above, one inside; A > 0 is stopped above, A < 0 below."""
    r, old = f64([[.5, .6, .7, .79, 1.3, 1.5, 2.5, 1.0]]), f64([[-2.0] * 8])
    for A, low, high in ((1.0, 0, 3), (-1.0, 4, 0), (0.0, 0, 0)):
        for name in ("grpo", "gppo", "dgpo", "aspo", "cispo_masked"):
            kw = dict(eps_low=.2, eps_high=.2) if name != "aspo" else {}
            _, m = policy_loss(name, old + r.log(), old, f64([A]), torch.ones(1, 8), **kw)
            assert (m["clip_low"] * 8, m["clip_high"] * 8) == (low, high), name
    _, m = policy_loss("grpo", old + r.log(), old, f64([-1]), torch.ones(1, 8), dual_clip=2)
    assert m["clip_low"] * 8 == 5  # the dual clip stops one more


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics(name):
    batch = random_batch(5)
    _, _, m = loss_and_grad(name, batch)
    b = numpy_view(batch)
    r, inside, peak = b.r[b.m > 0], b.m > 0, b.p >= batch["sum_p2"].numpy()
    np.testing.assert_allclose(m["ratio_mean"], r.mean())
    np.testing.assert_allclose(m["ratio_std"], r.std())
    np.testing.assert_allclose(m["approx_kl"], (r - 1 - np.log(r)).mean())
    cells = {"pos_peak": (b.A >= 0) & peak, "pos_valley": (b.A >= 0) & ~peak,
             "neg_peak": (b.A < 0) & peak, "neg_valley": (b.A < 0) & ~peak}
    for k, cell in cells.items():
        np.testing.assert_allclose(m[k], cell[inside].mean())
    assert abs(sum(m[k] for k in cells) - 1) < 1e-12
    assert all(0 <= m[k] <= 1 for k in ("clip_low", "clip_high"))


def test_ties_of_the_peaks_and_valleys():
    """The taxonomy's own conventions: p equal to sum p^2 is a peak, A = 0 is positive."""
    logp = f64([[-1.0]])
    _, m = policy_loss("grpo", logp, logp, f64([0]), f64([[1]]), sum_p2=logp.exp())
    assert m["pos_peak"] == 1


def test_gradient_flows_to_logp_alone():
    batch = random_batch(2)
    watched = {k: v.clone().requires_grad_() for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "mask"}
    for name in OBJECTIVES:
        old = watched["old_logp"]
        loss, _ = policy_loss(name, **(batch | watched), sampler_logp=old, ref_logp=old, kl_beta=.1)
        grads = dict(zip(watched, torch.autograd.grad(loss, watched.values(), allow_unused=True)))
        assert grads.pop("logp") is not None and all(g is None for g in grads.values()), name


# ---- 6. An objective of your own, in ten lines ----

README = (ROOT / "README.md").read_text()
MINE = re.search(r"### Your own in ten lines.*?```python\n(.*?)```", README, re.S).group(1) + "\n"  # as the README says it
FIND_IT = '''
import losses, torch
from experiments.objectives import families
t = torch.full((2, 3), -1.0)
loss, metrics = losses.policy_loss("tanh_gate", t, t, torch.ones(2), torch.ones(2, 3), width=0.4)
assert loss == -1 and "tanh_gate" in losses.OBJECTIVES
assert any("tanh_gate" in names for names in families().values())
'''


def test_your_own_objective_in_ten_lines(tmp_path):
    """It is in OBJECTIVES, hence in --loss, in the figure, and in every property above, without another line."""
    skip = shutil.ignore_patterns("__pycache__", "*.png", "*.json*")
    for folder in ("experiments", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skip)
    text = (ROOT / "losses.py").read_text()
    place = text.index("# ---- From token losses")
    for file in (*ROOT.glob("*.py"), ROOT / "README.md"):
        shutil.copy(file, tmp_path)
    (tmp_path / "losses.py").write_text(text[:place] + MINE + text[place:])
    assert MINE.count("\n") <= 10

    def run(*command):
        env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-c", FIND_IT)
    report = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_losses.py", "-k", "tanh_gate")
    assert "8 passed" in report, report
    run("train.py", *"--loss tanh_gate --steps 1 --skill_steps 0 --width 16 --layers 1 --eval_problems 8".split())
