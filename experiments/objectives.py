"""Every objective as what it is, a weight on the policy gradient: drawn, and checked.

    python experiments/objectives.py             draws experiments/figures/objectives.png
    python experiments/objectives.py --errors    distance from the official code and from the table

The curves come from the code itself, by autograd: grad loss = -w grad log pi at one token, with
A = +1 and A = -1. An objective of your own appears by itself.
"""
import argparse
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from losses import OBJECTIVES, policy_loss  # noqa: E402

COLUMNS = 6
DASHED = (0, (4, 1.6))
FAMILIES = {  # the sections of losses.py
    "A fixed band around ratio 1": ["grpo", "dr_grpo", "dapo", "kl3", "psr_nsr", "wapo"],
    "A band that adapts": ["acpo", "etr", "dcpo", "bapo", "m2po"],
    "The ratio of the response or of its prefix": ["gspo", "luspo", "gmpo", "ctpo", "vespo",
                                                   "topr"],
    "Another weight": ["cispo", "cispo_masked", "gppo", "ce_gppo", "dgpo", "aspo", "dppo_tv",
                       "dppo_kl", "ipo", "sapo", "cfpo", "dro"],
    "Which tokens may learn, and how much": ["entropy_top", "entropy_bottom", "ar_lopti", "fipo",
                                             "clip_cov", "kl_cov"],
    "No clip, or no ratio": ["reinforce", "up_grpo", "gpg", "rloo", "raft"],
}

# Objectives that look at more than the ratio: a line, from light to dark, for each value of that.
BY_PROBABILITY = {f"old p {p_old}": dict(p_old=p_old) for p_old in (0.1, 0.5, 0.9)}
LINES = {
    "acpo": BY_PROBABILITY, "dcpo": BY_PROBABILITY, "ar_lopti": BY_PROBABILITY,
    "dppo_tv": BY_PROBABILITY, "dppo_kl": BY_PROBABILITY, "ipo": BY_PROBABILITY,
    "etr": {"1 of 8 right": dict(pass_rate=1 / 8), "4 of 8 right": dict(pass_rate=1 / 2)},
    "bapo": {"7 of 10 win": dict(winners=0.7), "3 of 10 win": dict(winners=0.3)},
    "m2po": {"noisy: std log r 0.5": dict(std=0.5), "calm: std log r 0.1": dict(std=0.1)},
    "aspo": {"certain token": {}, "uncertain token": dict(eps=0.4)},
    "clip_cov": {"drawn: 0 everywhere": dict(k=1.0, cov_low=-1e9, cov_high=1e9),
                 "others": dict(cov_low=1e9)},
    "kl_cov": {"others": dict(beta=0.0), "high covariance": dict(k=1.0)},
}
NOTES = {"acpo": "std .3(1-p)", "ctpo": "its first token", "fipo": "its last token",
         "psr_nsr": "A > 0 weighs 0.1",
         "entropy_top": "top fifth; others 0", "entropy_bottom": "lowest 80%; others 0"}
for name in ("gspo", "luspo", "gmpo", "vespo", "topr"):
    NOTES[name] = "r of the response"


def families():
    """FAMILIES, and whatever else is registered: yours."""
    shown = sum(FAMILIES.values(), [])
    own = [name for name in OBJECTIVES if name not in shown]
    return FAMILIES | ({"Your own": own} if own else {})


def background(std=0.3, winners=0.5, equal=False, n=60_000):
    """Other tokens, (n,1), for objectives with a statistic of the batch: any old probability; the
    noise of the ratio shrinks as that grows, unless `equal`."""
    rng = torch.Generator().manual_seed(0)
    p_old = torch.rand(n, 1, generator=rng, dtype=torch.float64) * 0.98 + 0.01
    noise = torch.randn(n, 1, generator=rng, dtype=torch.float64) * std
    logp = p_old.log() + (noise if equal else noise * (1 - p_old))
    won = torch.rand(n, 1, generator=rng) < winners
    adv = torch.where(won, 1.0, -1.0).double()
    return logp.clamp(max=-1e-4), p_old.log(), adv


def weight(name, ratio, A, p_old=0.05, pass_rate=0.5, std=None, winners=None, **hyper):
    """w/A at each ratio (N,), for one-token responses; nan where the new probability is above 1."""
    old_logp = torch.full_like(ratio, p_old).log()[:, None]  # (N,1)
    logp = old_logp + ratio.log()[:, None]
    adv = torch.full_like(old_logp, A)
    totals = {"tokens": 1}  # so that token-mean is a sum, and each gradient the token's own weight
    if OBJECTIVES[name].statistics is not None:
        other_logp, other_old, _ = background()
        totals["statistics"] = OBJECTIVES[name].statistics(
            other_logp, other_old, torch.ones_like(other_logp), **hyper)
    if std or winners:
        others = background(std or 0.3, winners or 0.5, equal=std is not None)
        logp, old_logp, adv = (torch.cat(pair) for pair in zip((logp, old_logp, adv), others))
    logp.requires_grad_()
    ones = torch.ones_like(old_logp)
    loss, _ = policy_loss(name, logp, old_logp, adv, ones, agg="token-mean", totals=totals,
                          entropy=ones, pass_rate=ones * pass_rate, **hyper)
    w = -torch.autograd.grad(loss, logp)[0][:len(ratio), 0] / A
    return w.masked_fill(p_old * ratio > 1, torch.nan)


def jumps(name, ratio, w, A):
    """The ratios at which the weight jumps, each found again on a fine grid."""
    found = []
    for i in (w.diff().abs() > 0.15).nonzero().flatten().tolist():
        left, right = ratio[i:i + 2].tolist()
        fine = torch.linspace(left, right, 2001, dtype=torch.float64)
        values = weight(name, fine, A)
        steps = values.diff().abs()
        if steps.max() > 0.2 * values.abs().max():  # a steep line has none, seen closely
            found.append(fine[steps.argmax()].item())
    return found


def panel(ax, name, ratio, colors):
    """One objective: its lines, where they jump, and what tells them apart."""
    lines = LINES.get(name, {"": {}})
    ax.plot(ratio, ratio, color="0.72", lw=1)
    ax.axvline(1, color="0.87", lw=0.8)
    ax.axhline(0, color="0.6", lw=0.8)
    lowest = 0.0
    for i, given in enumerate(lines.values()):
        tone = 0.85 if len(lines) == 1 else 0.42 + 0.56 * i / (len(lines) - 1)
        for A, style in ((1.0, "-"), (-1.0, DASHED)):
            w = weight(name, ratio, A, **given)
            lowest = min(lowest, w[w.isfinite()].min().item())
            ax.plot(ratio, w, color=colors[A](tone), lw=2.2, ls=style)
            for x in jumps(name, ratio, w, A) if len(lines) == 1 else []:
                right = 1 < x < 5
                ax.annotate(f"{round(x, 4):g}", (x, 0), xytext=(3 if right else -3, 5),
                            textcoords="offset points", ha="left" if right else "right",
                            color=colors[A](0.85), fontsize=10)
    signed = lowest < -0.05  # some penalties push against A
    ax.set(xscale="log", xlim=(ratio[0], ratio[-1]))
    ax.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    ax.set_yscale("symlog", linthresh=0.1, linscale=0.35)
    ticks = [-10, -1, 0, 1, 10] if signed else [0, 0.1, 1, 10]
    ax.set_ylim(-10 if signed else -0.03, ratio[-1])
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(name, fontsize=13, family="monospace", weight="bold", pad=4)
    x, y, side = (0.97, 0.22, "right") if signed else (0.03, 0.985, "left")
    for i, label in enumerate([*lines, NOTES.get(name, "")]):
        grey = 0.35
        if i < len(lines) > 1:  # as light or dark as its line
            grey = 0.6 * (1 - i / (len(lines) - 1))
        ax.text(x, y - 0.1 * i, label, transform=ax.transAxes, fontsize=10,
                color=str(grey), va="top", ha=side)


def draw(path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    colors = {1.0: plt.cm.Blues, -1.0: plt.cm.Reds}
    ratio = torch.logspace(math.log10(0.08), math.log10(12.5), 801, dtype=torch.float64)
    rows = []  # (title, names): one row of panels each, a long family has several
    for title, names in families().items():
        for start in range(0, len(names), COLUMNS):
            rows.append((title if start == 0 else "", names[start:start + COLUMNS]))

    figure = plt.figure(figsize=(14, 2.4 * len(rows) + 0.9))
    heights = [0.3] + [1] * len(rows)
    head, *strips = figure.subfigures(len(heights), 1, height_ratios=heights)
    head.text(0.012, 0.95, "What each objective makes of the ratio r = new / old probability: "
              "the weight w/A on grad log p", fontsize=16, va="top", weight="bold")
    kinds = {"A > 0: to become likelier": dict(color=plt.cm.Blues(0.85), lw=2.4),
             "A < 0: to become less likely": dict(color=plt.cm.Reds(0.85), lw=2.4, ls=DASHED),
             "w = r A: no clip": dict(color="0.72", lw=1.4),
             "a line ends where the new p is 1": dict(lw=0)}
    handles = [plt.Line2D([], [], label=label, **style) for label, style in kinds.items()]
    head.legend(handles=handles, loc="lower left", ncols=4, fontsize=12, frameon=False)
    for strip, (title, names) in zip(strips, rows):
        strip.suptitle(title, x=0.012, y=1.0, ha="left", fontsize=15)
        strip.subplots_adjust(left=0.034, right=0.992, top=0.77, bottom=0.16, wspace=0.19)
        for ax, name in zip(strip.subplots(1, COLUMNS), names + [None] * COLUMNS):
            if name is None:
                ax.set_visible(False)
            else:
                panel(ax, name, ratio, colors)
    figure.savefig(path, dpi=105)
    image = Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=96)
    image.save(path, optimize=True)  # a third of the size
    print(f"{path}: {path.stat().st_size // 1024} kB, {len(OBJECTIVES)} objectives")


def errors():
    """The largest deviations over all golden cases, and over 100 random batches of the table."""
    import test_losses as tests
    print(f"{'':15s}{'official: loss   gradient':>27s}{'table: gradient':>20s}")
    for name in OBJECTIVES:
        official = []
        for _, case, arguments, loss, grad_sum in tests.GOLDEN:
            if case == name:
                ours, grad, _ = tests.golden_run(name, arguments)
                size = grad.abs().sum().item()
                official.append((abs(ours.item() - loss), abs(size - grad_sum)))
        table = "-"
        if name in tests.TABLE:
            table = f"{max(tests.table_error(name, seed) for seed in range(100)):.0e}"
        largest = [f"{max(column):.0e}" for column in zip(*official)] or ["-", "-"]
        print(f"{name:15s}{largest[0]:>16s}{largest[1]:>11s}{table:>20s}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", action="store_true", help="print the deviations instead")
    if parser.parse_args().errors:
        errors()
    else:
        draw(ROOT / "experiments" / "figures" / "objectives.png")
