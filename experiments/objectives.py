"""Every objective as what it is, a weight on the policy gradient, drawn, timed and checked from the code itself.

    python experiments/objectives.py            the figure: w/A against the ratio r  (experiments/figures/objectives.png)
    python experiments/objectives.py --cost     forward + backward on 64 x 2048 tokens, as a ratio to grpo
    python experiments/objectives.py --errors   distance from the official numbers and from the weight table, as measured

All curves come from autograd: grad loss = -w grad log pi at one token, with A = +1 and A = -1. An objective of your own
appears in the figure by itself; ../README.md explains the families.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from losses import OBJECTIVES, policy_loss, ratio_moments  # noqa: E402

FAMILIES = {  # in the order of the figure, six panels a row
    "A fixed band": ["grpo", "dr_grpo", "dapo", "kl3", "wapo", "raft"],
    "A band that adapts": ["acpo", "etr", "dcpo", "gapo", "bapo", "m2po"],
    "The ratio of a response or a prefix": ["gspo", "gmpo", "ctpo", "vespo"],
    "No ratio": ["gpg", "rloo"],
    "A stop-gradient weight": ["cispo", "cispo_masked", "gppo", "ce_gppo", "aspo", "dgpo"],
    "A smooth gate or a penalty": ["sapo", "r2vpo", "dro", "kl_cov"],
    "A divergence instead of the ratio": ["dppo_tv", "dppo_kl"],
    "A selection of tokens": ["entropy_top", "entropy_bottom", "ar_lopti", "clip_cov"],
    "Winners and losers apart": ["psr_nsr", "topr"],
}


def families():
    """FAMILIES, and whatever else is registered: yours."""
    shown = {name for names in FAMILIES.values() for name in names}
    own = [name for name in OBJECTIVES if name not in shown]
    return FAMILIES | ({"Your own": own} if own else {})


# ---- The figure --------------------------------------------------------------------------------------------------------

by_probability = [(f"old p = {q}", dict(q=q)) for q in (0.1, 0.5, 0.9)]
LINES = {  # objectives that look at more than r: one line for each value of what they look at, light to dark
    "acpo": by_probability, "dcpo": by_probability, "dppo_tv": by_probability, "dppo_kl": by_probability,
    "ar_lopti": by_probability,
    "etr": [("1 of 8 right", dict(pass_rate=1 / 8)), ("4 of 8 right", dict(pass_rate=1 / 2))],
    "gapo": [("7 of 8 right", dict(pass_rate=7 / 8)), ("1 of 8 right", dict(pass_rate=1 / 8))],
    "bapo": [("70% of tokens A > 0", dict(positive=0.7)), ("30% of tokens A > 0", dict(positive=0.3))],
    "m2po": [("batch: std log r = 0.5", dict(std=0.5)), ("batch: std log r = 0.1", dict(std=0.1))],
    "aspo": [("certain token", {}), ("uncertain token", dict(eps=0.4))],
    "clip_cov": [("drawn: no gradient", dict(k=1.0, cov_low=-1e9, cov_high=1e9)), ("others", dict(cov_low=1e9))],
    "kl_cov": [("others", dict(beta=0.0)), ("high covariance", dict(k=1.0))],
}
NOTES = {"acpo": "std r = 0.3 (1 - p)", "entropy_top": "chosen fifth; others 0", "entropy_bottom": "chosen 80%; others 0",
         "ctpo": "first token", "gspo": "r: of the response", "gmpo": "r: of the response", "vespo": "r: of the response",
         "topr": "r: of the response"}


def background(n=60_000, std=0.3, positive=0.5):
    """Tokens for the objectives that look at the whole batch: any old probability, unlikely tokens with noisier ratios."""
    rng = torch.Generator().manual_seed(0)
    q = torch.rand(n, 1, generator=rng, dtype=torch.float64) * 0.98 + 0.01
    d = torch.randn(n, 1, generator=rng, dtype=torch.float64) * std * (1 - q)
    logp = (q.log() + d).clamp(max=-1e-4)
    adv = torch.where(torch.rand(n, 1, generator=rng) < positive, 1.0, -1.0).double()
    return logp, q.log(), adv


def weight(name, ratio, A, q=0.05, pass_rate=0.5, std=None, positive=None, **hyperparameters):
    """w/A at each ratio, for one-token responses; nan where the new probability would be above 1."""
    old = torch.full_like(ratio, q).log()[:, None]
    logp, adv = old + ratio.log()[:, None], torch.full_like(old, A)
    totals = {"tokens": 1}  # with token-mean over one token: the sum, so that each gradient is the token's own weight
    if name == "acpo":
        totals["moments"] = ratio_moments(*background()[:2], torch.ones(60_000, 1))
    if std or positive:
        others = background(std=std or 0.3, positive=positive or 0.5)
        if std:  # m2po: the same noise for every token
            others = others[1] + (others[0] - others[1]) / (1 - others[1].exp()), others[1], others[2]
        logp, old, adv = (torch.cat([a, b]) for a, b in zip((logp, old, adv), others))
    logp = logp.requires_grad_()
    loss, _ = policy_loss(name, logp, old, adv, torch.ones_like(old), agg="token-mean", totals=totals, group_size=8,
                          entropy=torch.ones_like(old), pass_rate=torch.full((len(old),), pass_rate), **hyperparameters)
    w = -torch.autograd.grad(loss, logp)[0][:len(ratio), 0] / A
    return w.masked_fill(q * ratio > 1, torch.nan)


def draw(path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    columns, cells, row, column = 6, [], 0, 0  # cells: (row, column, name, title of the family if it starts here, panels)
    for title, names in families().items():
        for i, name in enumerate(names):
            if column + (len(names) if i == 0 else 1) > columns and column:
                row, column = row + 1, 0
            cells.append((row, column, name, (title, min(len(names), columns)) if i == 0 else None))
            column += 1
    ratio = torch.logspace(-1, 1, 801, dtype=torch.float64)
    fig, axes = plt.subplots(row + 1, columns, figsize=(15.5, 2.75 * (row + 1) + 0.75), sharex=True, squeeze=False)
    fig.subplots_adjust(left=0.035, right=0.992, top=1 - 1.25 / (2.75 * (row + 1) + 0.75), bottom=0.032, hspace=0.5, wspace=0.16)
    for ax in axes.flat:
        ax.set_visible(False)
    shades = {1: ["#1f5fbf", "#c8402c"], -1: []}
    blues, reds = plt.cm.Blues, plt.cm.Reds
    for r, c, name, start in cells:
        ax, lines = axes[r, c], LINES.get(name, [("", {})])
        ax.set_visible(True)
        ax.plot(ratio, ratio, color="0.72", lw=1, zorder=1)
        ax.axvline(1, color="0.85", lw=0.8, zorder=0)
        ax.axhline(0, color="0.6", lw=0.8, zorder=0)
        lowest = 0.0
        for i, (label, given) in enumerate(lines):
            tone = 0.85 if len(lines) == 1 else np.linspace(0.42, 0.95, len(lines))[i]
            for A, shade, style in ((1.0, blues, "-"), (-1.0, reds, (0, (4, 1.6)))):
                w = weight(name, ratio, A, **given)
                lowest = min(lowest, w[w.isfinite()].min().item())
                ax.plot(ratio, w, color=shade(tone), lw=2, ls=style, zorder=3, solid_joinstyle="miter")
                edge = ((w[1:] - w[:-1]).abs() > 0.15 * (ratio[1:] * 0 + 1)).nonzero().flatten().tolist()
                if len(lines) == 1:
                    for e in edge[:1] if A > 0 else edge[:2]:
                        x = (ratio[e] * ratio[e + 1]).sqrt().item()
                        ax.annotate(f"{x:.2g}", (x, 0), xytext=(3 if x > 1 else -3, 4), textcoords="offset points",
                                    ha="left" if x > 1 else "right", fontsize=9, color=shade(0.85), zorder=4)
        ax.set(xscale="log", xlim=(0.1, 10), xticks=[0.1, 1, 10], xticklabels=["0.1", "1", "10"])
        ax.set_yscale("symlog", linthresh=0.1, linscale=0.35)
        ax.set_ylim(-0.03 if lowest > -0.05 else -10, 10)
        ax.set_yticks([0, 0.1, 1, 10] if lowest > -0.05 else [-10, -1, 0, 1, 10])
        ax.set_yticklabels([f"{v:g}" for v in ax.get_yticks()])
        ax.minorticks_off()
        ax.tick_params(labelsize=9, labelbottom=True, length=2.5, pad=2)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(name, fontsize=12.5, family="monospace", weight="bold", pad=5)
        notes = [label for label, _ in lines if label] + ([NOTES[name]] if name in NOTES else [])
        tones = list(np.linspace(0.42, 0.95, len(lines))) if len(lines) > 1 else []
        for i, text in enumerate(notes):
            ax.text(0.03, 0.985 - 0.098 * i, text, transform=ax.transAxes, fontsize=9, va="top", zorder=5,
                    color=plt.cm.Greys(0.35 + 0.6 * tones[i]) if i < len(tones) else "0.35")
        if start:
            left, right = ax.get_position(), axes[r, min(c + start[1], columns) - 1].get_position()
            y = left.y1 + 0.36 / fig.get_figheight()
            fig.add_artist(plt.Line2D([left.x0, right.x1], [y, y], color="0.25", lw=1.2))
            fig.text(left.x0, y + 0.045 / fig.get_figheight(), start[0], fontsize=14, va="bottom", ha="left")
    fig.text(0.012, 1 - 0.16 / fig.get_figheight(), "The weight w/A that each objective puts on a token's gradient, against "
             "its ratio r = new / old probability", fontsize=16, va="top", weight="bold")
    handles = [plt.Line2D([], [], color=blues(0.85), lw=2.4, label="A > 0, to become likelier"),
               plt.Line2D([], [], color=reds(0.85), lw=2.4, ls=(0, (4, 1.6)), label="A < 0, to become less likely"),
               plt.Line2D([], [], color="0.72", lw=1.2, label="w = r A, nothing clipped")]
    fig.legend(handles=handles, loc="upper right", ncols=3, fontsize=12, frameon=False, handlelength=2.4,
               bbox_to_anchor=(0.995, 1 - 0.42 / fig.get_figheight()))
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, dpi=100)
    print(f"{path}: {path.stat().st_size // 1024} kB, {len(cells)} objectives")


# ---- Cost ----------------------------------------------------------------------------------------------------------------

def cost(path, repeats=9):
    """CPU time of the process, each objective in turn with grpo, so that whatever else the machine does hits both."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(*shape, generator=rng)  # noqa: E731
    old = -3 * rand(64, 2048) ** 2
    logp = (old + 0.2 * torch.randn(64, 2048, generator=rng)).clamp(max=-1e-4).requires_grad_()
    mask = (torch.arange(2048) < (rand(64, 1) * 1800 + 200)).float()
    batch = dict(old_logp=old, adv=torch.randn(64, generator=rng), mask=mask, entropy=rand(64, 2048), group_size=8,
                 reward=rand(64).round(), max_len=2048)

    def seconds(name):
        start = time.process_time()
        loss, _ = policy_loss(name, logp, **batch)
        torch.autograd.grad(loss, logp)
        return time.process_time() - start

    table = {}
    for name in OBJECTIVES:
        seconds(name), seconds("grpo")  # warm up
        pairs = [(seconds("grpo"), seconds(name)) for _ in range(repeats)]
        base = statistics.median(g for g, _ in pairs)
        table[name] = dict(ratio=round(statistics.median(t for _, t in pairs) / base, 2), grpo_ms=round(base * 1000, 1))
        print(f"{name:15s} {table[name]['ratio']:5.2f} x grpo ({base * 1000:.1f} ms)", flush=True)
    path.parent.mkdir(exist_ok=True)
    about = "CPU time of forward + backward, 64 x 2048 float32 tokens, one thread, median, against grpo in alternation"
    path.write_text(json.dumps({"about": about, "torch": torch.__version__, "objectives": table}, indent=1) + "\n")


# ---- Errors --------------------------------------------------------------------------------------------------------------

def errors():
    """The largest deviations, over all golden cases of an objective and over 50 random batches of the weight table."""
    from tests.test_losses import GOLDEN, TABLE, golden_error, table_error
    print(f"{'':15s} official: loss  gradient (L1 norm)   weight table: loss  gradient (largest)")
    for name in OBJECTIVES:
        official = [golden_error(*case)[0][:2] for case in GOLDEN if case[0] == name]
        official = "{:14.0e} {:9.0e}".format(*map(max, zip(*official))) if official else f"{'-':>14s} {'-':>9s}"
        table = [max(e) for e in zip(*(table_error(name, seed) for seed in range(50)))] if name in TABLE else None
        print(f"{name:15s} {official} {{:29.0e}} {{:9.0e}}".format(*table) if table else f"{name:15s} {official}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true", help="time every objective against grpo")
    parser.add_argument("--errors", action="store_true", help="distance from the official numbers and the weight table")
    flags = parser.parse_args()
    if flags.cost:
        cost(HERE / "results" / "objective_cost.json")
    elif flags.errors:
        errors()
    else:
        draw(HERE / "figures" / "objectives.png")
