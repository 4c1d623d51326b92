"""Every objective as what it is, a weight on the policy gradient, drawn, timed and checked from the code itself.

    python experiments/objectives.py            the figure, experiments/figures/objectives.png: w/A against the ratio r
    python experiments/objectives.py --cost     forward + backward on 64 x 2048 tokens, as a ratio to grpo
    python experiments/objectives.py --errors   distance from the official numbers and from the weight table

All curves come from autograd: grad loss = -w grad log pi at one token, with A = +1 and A = -1. An objective of your own
appears in the figure by itself; ../README.md explains the families.
"""
import argparse
import json
import math
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


# ---- The figure ----------------------------------------------------------------------------------------------

by_probability = [(f"{q}", dict(q=q)) for q in (0.1, 0.5, 0.9)]
LINES = {  # objectives that look at more than r: one line, light to dark, for each value of what they look at
    "acpo": by_probability, "dcpo": by_probability, "dppo_tv": by_probability, "dppo_kl": by_probability,
    "ar_lopti": by_probability,
    "etr": [("1 of 8 right", dict(pass_rate=1 / 8)), ("4 of 8 right", dict(pass_rate=1 / 2))],
    "gapo": [("7 of 8 right", dict(pass_rate=7 / 8)), ("1 of 8 right", dict(pass_rate=1 / 8))],
    "bapo": [("7 of 10 have A > 0", dict(positive=0.7)), ("3 of 10 have A > 0", dict(positive=0.3))],
    "m2po": [("noisy: std log r 0.5", dict(std=0.5)), ("calm: std log r 0.1", dict(std=0.1))],
    "aspo": [("certain token", {}), ("uncertain token", dict(eps=0.4))],
    "clip_cov": [("drawn: 0 everywhere", dict(k=1.0, cov_low=-1e9, cov_high=1e9)), ("others", dict(cov_low=1e9))],
    "kl_cov": [("others", dict(beta=0.0)), ("high covariance", dict(k=1.0))],
}
NOTES = {"acpo": "std r = 0.3 (1 - p)", "entropy_top": "top fifth; others 0", "entropy_bottom": "lowest 80%; others 0",
         "ctpo": "its first token", "psr_nsr": "A > 0 weighs 0.1"}
NOTES |= {name: "r of the response" for name in ("gspo", "gmpo", "vespo", "topr")}


def background(n=60_000, std=0.3, positive=0.5, equal=False):
    """A batch for objectives that look at it: any old probability; the noise shrinks as that grows, unless `equal`."""
    rng = torch.Generator().manual_seed(0)
    q = torch.rand(n, 1, generator=rng, dtype=torch.float64) * 0.98 + 0.01
    d = torch.randn(n, 1, generator=rng, dtype=torch.float64) * std * (1 if equal else 1 - q)
    adv = torch.where(torch.rand(n, 1, generator=rng) < positive, 1.0, -1.0).double()
    return (q.log() + d).clamp(max=-1e-4), q.log(), adv


def weight(name, ratio, A, q=0.05, pass_rate=0.5, std=None, positive=None, **hyperparameters):
    """w/A at each ratio, for one-token responses; nan where the new probability would be above 1."""
    old = torch.full_like(ratio, q).log()[:, None]
    logp, adv = old + ratio.log()[:, None], torch.full_like(old, A)
    totals = {"tokens": 1}  # token-mean "over one token" is a sum: each gradient is the token's own weight
    if name == "acpo":
        totals["moments"] = ratio_moments(*background()[:2], torch.ones(60_000, 1))
    if std or positive:
        others = background(std=std or 0.3, positive=positive or 0.5, equal=bool(std))
        logp, old, adv = (torch.cat([a, b]) for a, b in zip((logp, old, adv), others))
    logp = logp.requires_grad_()
    loss, _ = policy_loss(name, logp, old, adv, torch.ones_like(old), agg="token-mean", totals=totals, group_size=8,
                          entropy=torch.ones_like(old), pass_rate=torch.full((len(old),), pass_rate), **hyperparameters)
    w = -torch.autograd.grad(loss, logp)[0][:len(ratio), 0] / A
    return w.masked_fill(q * ratio > 1, torch.nan)


def edges(name, ratio, w, A):
    """The ratios at which the weight jumps, each found again on a fine grid between its two neighbours."""
    found = []
    for i in ((w[1:] - w[:-1]).abs() > 0.15).nonzero().flatten().tolist():
        fine = torch.linspace(ratio[i].item(), ratio[i + 1].item(), 2001, dtype=torch.float64)
        jump = weight(name, fine, A).diff().abs()
        if jump.max() > 0.1:  # a steep line has no jump when looked at closely
            found.append(fine[jump.argmax()].item())
    return found


def layout(columns=6):
    """Panels in reading order, (row, column, name, (family, its width) at its first); short families share a row."""
    cells, row, column = [], 0, 0
    for title, names in families().items():
        for i, name in enumerate(names):
            if column and column + (len(names) if i == 0 else 1) > columns:
                row, column = row + 1, 0
            cells.append((row, column, name, (title, min(len(names), columns)) if i == 0 else None))
            column += 1
    return cells, row + 1, columns


def panel(ax, name, ratio, blues, reds):
    lines = LINES.get(name, [("", {})])
    tones = [0.85] if len(lines) == 1 else torch.linspace(0.42, 0.98, len(lines)).tolist()
    ax.plot(ratio, ratio, color="0.72", lw=1, zorder=1)
    ax.axvline(1, color="0.87", lw=0.8, zorder=0)
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    lowest = 0.0
    for (_, given), tone in zip(lines, tones):
        for A, colors, style in ((1.0, blues, "-"), (-1.0, reds, (0, (4, 1.6)))):
            w = weight(name, ratio, A, **given)
            lowest = min(lowest, w[w.isfinite()].min().item())
            ax.plot(ratio, w, color=colors(tone), lw=2.2, ls=style, zorder=3)
            for x in edges(name, ratio, w, A) if len(lines) == 1 else ():
                ax.annotate(f"{round(x, 4):g}", (x, 0), xytext=(3 if x > 1 and x < 5 else -3, 5), color=colors(0.85),
                            textcoords="offset points", ha="left" if x > 1 and x < 5 else "right", fontsize=10)
    signed = lowest < -0.05  # some penalties push against A
    ax.set(xscale="log", xlim=(ratio[0], ratio[-1]), xticks=[0.1, 1, 10], xticklabels=["0.1", "1", "10"])
    ax.set_yscale("symlog", linthresh=0.1, linscale=0.35)
    ax.set(ylim=(-10 if signed else -0.03, ratio[-1]), yticks=[-10, -1, 0, 1, 10] if signed else [0, 0.1, 1, 10])
    ax.set_yticklabels([f"{v:g}" for v in ax.get_yticks()])
    ax.minorticks_off()
    ax.tick_params(labelsize=10, labelbottom=True, length=2.5, pad=2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(name, fontsize=13.5, family="monospace", weight="bold", pad=4)
    across = lines is by_probability  # side by side
    notes = [(0.28 + 0.17 * i if across else 0.03, 0 if across else i, text, str(0.68 - 0.68 * tone))
             for i, ((text, _), tone) in enumerate(zip(lines, tones)) if text]
    notes += [(0.03, 0, "old p", "0.35")] if across else []
    notes += [(0.03, 1 if across else 0, NOTES[name], "0.35")] if name in NOTES else []
    for x, line, text, grey in notes:
        x, y, side = (0.97, 0.24, "right") if signed else (x, 0.985, "left")
        ax.text(x, y - 0.1 * line, text, transform=ax.transAxes, fontsize=10, va="top", ha=side, color=grey)


def draw(path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    cells, rows, columns = layout()
    blues, reds = plt.cm.Blues, plt.cm.Reds
    inches = 2.6 * rows + 0.75
    fig, axes = plt.subplots(rows, columns, figsize=(14, inches), sharex=True, squeeze=False)
    fig.subplots_adjust(left=0.034, right=0.992, top=1 - 1.27 / inches, bottom=0.3 / inches, hspace=0.58, wspace=0.19)
    ratio = torch.logspace(math.log10(0.08), math.log10(12.5), 801, dtype=torch.float64)
    for ax in axes.flat:
        ax.set_visible(False)
    for row, column, name, family in cells:
        axes[row, column].set_visible(True)
        panel(axes[row, column], name, ratio, blues, reds)
        if family:
            first, last = (axes[row, c].get_position() for c in (column, min(column + family[1], columns) - 1))
            y = first.y1 + 0.36 / inches
            fig.add_artist(plt.Line2D([first.x0, last.x1], [y, y], color="0.25", lw=1.2))
            fig.text(first.x0, y + 0.04 / inches, family[0], fontsize=15, va="bottom")
    fig.text(0.012, 1 - 0.13 / inches, "What each objective makes of the ratio r = new / old probability: "
             "the weight w/A on grad log p", fontsize=16.5, va="top", weight="bold")
    handles = [plt.Line2D([], [], color=blues(0.85), lw=2.4, label="A > 0: to become likelier"),
               plt.Line2D([], [], color=reds(0.85), lw=2.4, ls=(0, (4, 1.6)), label="A < 0: to become less likely"),
               plt.Line2D([], [], color="0.72", lw=1.4, label="w = r A: no clip")]
    fig.legend(handles=handles, loc="upper right", ncols=3, fontsize=12.5, frameon=False, handlelength=2.2,
               columnspacing=1.2, bbox_to_anchor=(0.77, 1 - 0.4 / inches))
    fig.text(0.992, 1 - 0.515 / inches, "a line ends where the new p is 1", fontsize=12.5, va="top", ha="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=105)
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=96).save(path, optimize=True)  # smaller
    print(f"{path}: {path.stat().st_size // 1024} kB, {len(cells)} objectives")


# ---- Cost ----------------------------------------------------------------------------------------------------

def cost(path, repeats=42):
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
        pairs = [(seconds("grpo"), seconds(name)) for _ in range(repeats)][2:]  # the first two warm up
        ratio, grpo = statistics.median(t / g for g, t in pairs), statistics.median(g for g, _ in pairs)
        table[name] = dict(ratio=round(ratio, 2), grpo_ms=round(grpo * 1000, 1))
        print(f"{name:15s} {ratio:5.2f} x grpo ({grpo * 1000:.1f} ms)", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = "CPU time of forward + backward, 64 x 2048 float32 tokens, one thread, median, against grpo in alternation"
    path.write_text(json.dumps({"about": about, "torch": torch.__version__, "objectives": table}, indent=1) + "\n")


# ---- Errors --------------------------------------------------------------------------------------------------

def errors():
    """The largest deviations, over all golden cases of an objective and over 100 random batches of the weight table."""
    from tests.test_losses import GOLDEN, TABLE, golden_error, table_error
    print(f"{'':15s} official: loss  gradient (L1 norm)   weight table: loss  gradient (largest)")
    for name in OBJECTIVES:
        official = [golden_error(*case)[0][:2] for case in GOLDEN if case[0] == name]
        official = "{:14.0e} {:9.0e}".format(*map(max, zip(*official))) if official else f"{'-':>14s} {'-':>9s}"
        table = [max(e) for e in zip(*(table_error(name, seed) for seed in range(100)))] if name in TABLE else None
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
