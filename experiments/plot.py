"""Every figure and table of experiments/compare.py, from its lines alone: python experiments/plot.py [LINES.jsonl]

Means with 95 % t-intervals over seeds; differences are paired by seed. Tables go to experiments/results/compare.md, figures
to experiments/figures/ (beside the lines, if others are named). What no line speaks of yet is left out.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
                     "legend.frameon": False, "legend.fontsize": 9, "axes.titlesize": 12})

from experiments.compare import (BINS, CELLS, COMMON, EARLY, EXTRA, LADDER, LRS, RESULTS, SEEDS, TABLE, TASKS, TUNING, WIDE, WINNERS, WITHOUT,
                                 load, matched, mean, pick, tuned)

OUT = {"figures": Path(__file__).parent / "figures"}
T95 = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
       2.101, 2.093, 2.086)  # by degrees of freedom
BIN_NAMES = ("p < 0.2", "0.2–0.4", "0.4–0.6", "0.6–0.8", "p > 0.8")
COLORS = {"grpo": "#555555", "dapo": "#8c6bb1", "cispo": "#d95f0e", "gspo": "#a6761d", "acpo": "#1f5a99", "kl3": "#1b9e77",
          "etr": "#66a61e", "wapo": "#b0413e", "sapo": "#e7298a", "gppo": "#e6ab02", "unclipped": "#bbbbbb",
          "gspo eps_low=0.03 eps_high=0.04": "#d8b365"}
VALUES = {"final": lambda x: 100 * x["final"], "auc": lambda x: 100 * x["auc"], "entropy": lambda x: x["entropy_end"],
          "at80": lambda x: entropy_at(x, 0.8)}


def interval(values):
    """Mean and half width of the 95 % interval; one value has none."""
    n, m = len(values), sum(values) / len(values)
    if n < 2:
        return m, math.nan
    return m, T95[min(n - 1, len(T95) - 1)] * math.sqrt(sum((v - m) ** 2 for v in values) / (n - 1) / n)


def paired(a, b, value):
    """Interval of value(a) - value(b) over the seeds that both have, and their number."""
    other = {x["seed"]: value(x) for x in b}
    d = [value(x) - other[x["seed"]] for x in a if x["seed"] in other]
    d = [v for v in d if not math.isnan(v)]
    return (*interval(d), len(d)) if d else (math.nan, math.nan, 0)


def entropy_at(line, level):
    """Entropy where the reward first reaches `level`, between the two steps around it; nan if it never does."""
    r, h = line["curves"]["reward"], line["curves"]["entropy"]
    for i in range(1, len(r)):
        if r[i - 1] < level <= r[i]:
            return h[i - 1] + (h[i] - h[i - 1]) * (level - r[i - 1]) / (r[i] - r[i - 1])
    return math.nan


def pm(m, half, digits=1, sign=False):
    text = f"{m:{'+' if sign else ''}.{digits}f}"
    if math.isnan(m):  # no seed has it
        return ""
    if math.isnan(half):  # one seed
        return text
    return f"**{text} ± {half:.{digits}f}**" if sign and abs(m) > half else f"{text} ± {half:.{digits}f}"


def ci(lines, what, digits=1):
    return pm(*interval([VALUES[what](x) for x in lines]), digits)


def vs(a, b, what, digits=1):
    return pm(*paired(a, b, VALUES[what])[:2], digits, True)


def fallen(lines):
    return f"{sum(x['collapsed'] for x in lines)} / {len(lines)}"


def table(title, head, rows):
    return "\n".join([f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
                      *("| " + " | ".join(map(str, r)) + " |" for r in rows), ""])


def runs(lines, loss, updates=16, lr=3e-4, task="chainsum", flags="", seeds=SEEDS, measure=""):
    flags = f"{TASKS[task]} {flags}".strip()
    some = pick(lines, loss=loss, updates=updates, lr=lr, task=task, flags=flags, measure=measure)
    return [x for x in some if x["seed"] in seeds]


def pooled(lines, what):  # rows of per-bin sums, added up over runs
    return [[sum(x[what][i][b] for x in lines) for b in range(BINS)] for i in range(len(lines[0][what]))]


def finish(fig, name):
    fig.tight_layout()
    fig.savefig(OUT["figures"] / f"compare_{name}.png", dpi=100)
    plt.close(fig)


def forest(ax, rows, digits=1):
    """Rows of (label, mean, half, color), first on top; intervals that exclude zero are filled."""
    for y, (label, m, half, color) in enumerate(rows):
        ax.errorbar(m, -y, xerr=half, fmt="o", color=color, capsize=3, ms=7, mfc=color if abs(m) > half else "white")
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks([-y for y in range(len(rows))], [r[0] for r in rows])
    ax.set_ylim(-len(rows) + 0.4, 0.6)


# ---- The table ---------------------------------------------------------------------------------------------------------

def scores(lines, title, settings, updates, task="chainsum"):
    """A table of one row per (objective, learning rate), with differences to grpo, paired by seed; nothing without grpo."""
    found = [(spec, lr, runs(lines, spec, updates, lr, task)) for spec, lr in settings]
    base = next((some for spec, _, some in found if spec == "grpo"), [])
    rows = []
    for spec, lr, some in found if base else []:
        if some:
            delta = ["", ""] if spec == "grpo" else [vs(some, base, v) for v in ("auc", "final")]
            rows.append([f"`{spec}`", f"{lr:g}", *(ci(some, v) for v in ("auc", "final")), *delta,
                         ci(some, "entropy", 3), fallen(some)])
    head = ("objective", "lr", "area under curve", "final", "Δ area vs grpo", "Δ final vs grpo", "entropy at end", "collapsed / n")
    return [table(title, head, rows)] if rows else []


def main_table(lines):
    out, panels = [], []
    for task, updates in ((task, k) for task in TASKS for k in LRS[task]):
        try:
            settings = [(spec, tuned(lines, spec, updates, task)) for spec in TABLE]
        except SystemExit as e:  # compare.py's line about a grid that is not complete
            out.append(f"({e})\n")
            continue
        title = f"{task}, {updates} updates per rollout, each objective at its own learning rate"
        out += scores(lines, title, settings, updates, task)
        found = {spec: runs(lines, spec, updates, lr, task) for spec, lr in settings}
        if all(found.values()):
            panels.append((f"{task}, {updates} updates per rollout, n = {min(map(len, found.values()))}",
                           [(f"{spec}, lr {lr:g}", *paired(found[spec], found["grpo"], VALUES["auc"])[:2], COLORS[spec])
                            for spec, lr in settings[1:]]))
    if panels:
        fig, ax = panes(len(panels), 4.2)
        for a, (title, rows) in zip(ax, panels):
            forest(a, [(label if m > -12 else f"{label}\n(outside, at {m:.0f})", m, *rest) for label, m, *rest in rows])
            a.set_xlim(left=max(-10, a.get_xlim()[0]))
            a.set_title(title)
            a.set_xlabel("area under the reward curve, difference to grpo (points)")
        finish(fig, "table")
    return out


def panes(n, height):
    """A figure of n panels, two in a row."""
    fig, ax = plt.subplots(-(-n // 2), min(2, n), figsize=(6.5 * min(2, n), height * -(-n // 2)), squeeze=False)
    for a in ax.flat[n:]:
        a.set_axis_off()
    return fig, ax.flat[:n]


def smooth(lines, what, reach=0):
    """The mean curve over runs, averaged over `reach` steps to either side."""
    c = [sum(v) / len(v) for v in zip(*(x["curves"][what] for x in lines))]
    return [sum(c[max(0, i - reach):i + reach + 1]) / len(c[max(0, i - reach):i + reach + 1]) for i in range(len(c))]


def curves(lines, panels, name, reach=0):
    """A column per (title, updates, lr, task): reward above, entropy below, a line per objective."""
    fig, grid = plt.subplots(2, len(panels), figsize=(5 * len(panels) + 1, 7.4), sharey="row", sharex="col", squeeze=False)
    for column, (title, *setting) in zip(grid.T, panels):
        for a, what in zip(column, ("reward", "entropy")):
            for spec in (s for s in COLORS if runs(lines, s, *setting)):
                c = smooth(runs(lines, spec, *setting), what, reach)
                a.plot(range(1, len(c) + 1), c, color=COLORS[spec], lw=1.8, ls="--" if spec in EXTRA else "-",
                       label=spec.replace("eps_low=0.03 eps_high=0.04", "× 100"))
        column[0].set_title(title)
        column[1].set_xlabel("step: 256 responses")
    grid[0, 0].set_ylabel("reward")
    grid[1, 0].set_ylabel("entropy per token (nats)")
    labels = {line.get_label(): line for a in grid[0] for line in a.lines}  # no panel need have them all
    grid[0, min(1, len(panels) - 1)].legend(labels.values(), labels, ncols=2)
    finish(fig, name)


def common_table(lines):
    """Everything at one learning rate: both tasks, every setting that has lines of five objectives (of all, if there are fewer)."""
    out, least = [], max(1, min(5, len({x["loss"] for x in lines} & set(TABLE))))
    for task, reach in (("chainsum", 0), ("countdown", 2)):
        panels = []
        settings = {(x["updates"], x["lr"]) for x in pick(lines, task=task, measure="")}
        for updates, lr in sorted(settings):
            if sum(bool(runs(lines, spec, updates, lr, task)) for spec in TABLE) < least:
                continue
            title = f"{task}, {updates} updates per rollout, learning rate {lr:g}"
            if (task, updates) != ("chainsum", 2):  # that is the first table again
                out += scores(lines, f"{title}, for all", [(spec, lr) for spec in TABLE + EXTRA + WINNERS + [WIDE]],
                              updates, task)
            n = [len(runs(lines, spec, updates, lr, task)) for spec in COLORS]
            panels.append((f"{task}, {updates} updates, lr {lr:g}, n = {min(filter(None, n))}", updates, lr, task))
        if panels:
            curves(lines, panels, f"curves_{task}", reach)
    return out


def lr_table(lines):
    every, rows, panels = sorted({x for lrs in LRS.values() for some in lrs.values() for x in some}), [], []
    for task, updates, lrs in ((task, *item) for task in TASKS for item in LRS[task].items()):
        found = {spec: {lr: runs(lines, spec, updates, lr, task, seeds=TUNING) for lr in lrs} for spec in TABLE}
        found = {spec: some for spec, some in found.items() if all(len(x) == len(TUNING) for x in some.values())}
        if found:
            panels.append((f"{task}, {updates} updates per rollout, {len(TUNING)} tuning seeds", lrs, found))
        for spec, some in found.items():
            rows.append([f"`{spec}`", task, updates,
                         *(f"{100 * mean(some[lr], 'auc'):.1f} / {100 * mean(some[lr], 'final'):.1f} / "
                           f"{sum(x['collapsed'] for x in some[lr])}" if lr in some else "" for lr in every),
                         f"{tuned(lines, spec, updates, task):g}"])
    if not rows:
        return []
    fig, ax = panes(len(panels), 4.2)
    for a, (title, lrs, found) in zip(ax, panels):
        for spec, some in found.items():
            a.plot(lrs, [100 * mean(x, "final") for x in some.values()], "o-", color=COLORS[spec], label=spec, lw=1.6)
        a.set_xscale("log")
        a.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        a.minorticks_off()
        a.set_title(title)
        a.set_xlabel("learning rate")
        a.set_ylabel("final held-out accuracy (%)")
    ax[-1].legend(ncols=2)
    finish(fig, "lr")
    return [table(f"Learning rates, tuning seeds {TUNING}: area / final / collapsed",
                  ("objective", "task", "updates", *(f"{x:g}" for x in every), "chosen"), rows)]


# ---- 1. ACPO -----------------------------------------------------------------------------------------------------------

def stds(n, total, square):  # per bin, from sums
    return [math.sqrt(max(q / c - (t / c) ** 2, 0)) if c else math.nan for c, t, q in zip(n, total, square)]


def share(row):
    return [v / sum(row) for v in row]


def first_order(spread):
    """Std of log r per bin, and what s sqrt((1-p)^2 + sum_{j != k} p_j^2) makes of it with the one s that fits all tokens."""
    n, log_std = spread[0], stds(spread[0], *spread[3:5])
    s = math.sqrt(sum(c * v * v for c, v in zip(n, log_std) if c) / sum(spread[5]))
    return log_std, [s * math.sqrt(v / c) if c else math.nan for c, v in zip(n, spread[5])]


def acpo(lines):
    out = []
    for task in TASKS:
        some = runs(lines, "grpo", 4, COMMON[task], task, measure="ladder")
        if not some:
            continue
        at = {(loss, k): [x["ladder"][f"{loss} {k}"] for x in some] for loss in ("grpo", "acpo") for k in LADDER}
        sums = {key: {what: pooled(v, what) for what in ("gradient", "spread")} for key, v in at.items()}
        rows = []
        for k in LADDER:
            g, spread = sums["grpo", k]["gradient"], sums["grpo", k]["spread"]
            low = [interval([100 * share(x["gradient"][i])[0] for x in at["grpo", k]]) for i in (3, 2)]
            ratio = [a / b for a, b in zip(*first_order(spread))]
            rows.append([k, " ".join(f"{v:.3f}" for v in stds(*spread[:3])), f"{100 * sum(g[1]) / sum(g[0]):.2f}",
                         " ".join(f"{100 * c / n:.1f}" for n, c in zip(*g[:2])), " ".join(f"{100 * v:.0f}" for v in share(g[3])),
                         *(pm(*v) for v in low), " ".join(f"{v:.2f}" for v in ratio),
                         " ".join(f"{sum(x['band'][b] for x in at['acpo', k]) / len(some):.2f}" for b in range(BINS))])
        tokens = " / ".join(f"{100 * v:.1f}" for v in share(sums["grpo", 1]["spread"][0]))
        out.append(table(f"ACPO 1: {task}, 1 to 32 updates from the same weights on the same rollout, at each of {EARLY} steps, "
                         f"n = {len(some)}; five bins of the probability when sampled, p < 0.2 first, which hold {tokens} % of the tokens",
                         ("updates", "std of r", "clipped (%)", "clipped per bin (%)", "share of the kept gradient (%)", "of which p < 0.2",
                          "p < 0.2 if nothing were clipped", "std of log r / first order", "ACPO's half width"), rows))
        acpo_figure(some, at, sums, task)
    rows = []
    for k in LADDER:
        a, b = runs(lines, "acpo", k), runs(lines, "grpo", k)
        if a and b:
            d = [paired(a, b, VALUES[v]) for v in ("auc", "final")]
            rows.append([k, ci(b, "auc"), *(pm(*v[:2], sign=True) for v in d), d[0][2]])
    if rows:
        out.append(table("ACPO 2: acpo − grpo on chainsum, lr 3e-4", ("updates", "area of grpo", "Δ area", "Δ final", "n"), rows))
    return out


def acpo_figure(some, at, sums, task):
    colors = plt.cm.viridis([0.0, 0.22, 0.45, 0.68, 0.9])
    fig, grid = plt.subplots(2, 3, figsize=(14, 8))
    ax = list(grid.flat)
    tokens = share(sums["grpo", 1]["spread"][0])
    for b in range(BINS):
        spread, g = [sums["grpo", k]["spread"] for k in LADDER], [sums["grpo", k]["gradient"] for k in LADDER]
        ax[0].plot(LADDER, [stds(*s[:3])[b] for s in spread], "o-", color=colors[b],
                   label=f"{BIN_NAMES[b]} ({100 * tokens[b]:.0f} % of tokens)")
        measured, predicted = zip(*(first_order(s) for s in spread))
        ax[1].plot([v[b] for v in predicted], [v[b] for v in measured], "o-", color=colors[b], lw=1)
        ax[2].plot(LADDER, [100 * v[1][b] / v[0][b] for v in g], "o-", color=colors[b])
        ax[3].plot(LADDER, [100 * share(v[3])[b] for v in g], "o-", color=colors[b])
        ax[3].plot(LADDER, [100 * share(v[2])[b] for v in g], "o--", color=colors[b], mfc="white", lw=1)
        ax[4].plot(LADDER, [share(v[3])[b] / share(v[0])[b] for v in g], "o-", color=colors[b])
        ax[5].plot(LADDER, [sum(x["band"][b] for x in at["acpo", k]) / len(some) for k in LADDER], "o-", color=colors[b])
    low, high = ax[1].get_xlim()
    ax[1].plot([max(low, 1e-3), high], [max(low, 1e-3), high], color="gray", lw=1, ls=":")
    ax[5].axhline(0.2, color="gray", ls=":", lw=1)
    ax[5].text(32, 0.195, "grpo", ha="right", va="top", color="gray", fontsize=9)
    for a, title in zip(ax, ("std of the ratio after the updates", "std of log r: measured against first order",
                             "clipped by ±0.2 (% of the bin's tokens)", "share of the gradient (%): clipped (solid), not (dashed)",
                             "gradient per token, relative to the mean", "half width of ACPO's band")):
        a.set_title(title)
        if a is not ax[1]:
            a.set_xscale("log", base=2)
            a.set_xticks(LADDER, LADDER)
            a.set_xlabel("updates per rollout")
    for a in (ax[0], ax[1], ax[4]):
        a.set_yscale("log")
    ax[1].set_xscale("log")
    ax[1].set_xlabel("s · sqrt((1−p)² + Σ p_j²), one s per number of updates")
    ax[0].legend()
    fig.suptitle(f"{task}: 1 to 32 updates from the same weights on the same rollout, first {EARLY} steps, n = {len(some)}, "
                 f"lr {some[0]['lr']:g}")
    finish(fig, f"acpo_{task}")


# ---- 2. and 3. Bands against their controls ----------------------------------------------------------------------------

def controls(lines):
    out, forests = [], []
    for task in TASKS:
        try:
            specs = matched(lines, task)
        except SystemExit:
            continue
        rows, lr = [], COMMON[task]
        for name, others in {"acpo": ("same clip rate", "same width"), "etr": ("same clip rate", "same width"),
                             "kl3": ("same width", "same KL", "same clip rate")}.items():
            for label, spec in [("grpo ±0.2", "grpo"), *((o, specs[f"{name}: {o}"]) for o in others)]:
                a, b = runs(lines, name, 16, lr, task), runs(lines, spec, 16, lr, task)
                if not a or not b:
                    continue
                d = {v: paired(a, b, f) for v, f in VALUES.items()}
                rows.append([f"`{name}`", label + ("" if spec == "grpo" else f": `{spec.split(' ', 1)[1]}`"),
                             f"{100 * mean(a, 'clip'):.2f} / {100 * mean(b, 'clip'):.2f}", f"{mean(a, 'width'):.3f} / {mean(b, 'width'):.3f}",
                             f"{mean(a, 'kl'):.4f} / {mean(b, 'kl'):.4f}", pm(*d["auc"][:2], sign=True), pm(*d["final"][:2], sign=True),
                             pm(*d["entropy"][:2], 3, True), pm(*d["at80"][:2], 3, True), d["auc"][2]])
                forests.append((f"{name} − {label}" + ("" if task == "chainsum" else f", {task}"), d, COLORS[name]))
        if rows:
            out.append(table(f"Adaptive and asymmetric bands against fixed ones, {task}, 16 updates, lr {lr:g}: differences paired by seed",
                             ("objective", "against", "clip rate (%)", "half width", "KL", "Δ area", "Δ final", "Δ entropy at end",
                              "Δ entropy at reward 0.8", "n"), rows))
    rows, wide = [], runs(lines, WIDE, lr=1e-3)
    for name in ("acpo", "kl3", "grpo", "unclipped"):
        a = runs(lines, name, lr=1e-3)
        if a and wide:
            rows.append([f"`{name}`", f"{100 * mean(a, 'clip'):.2f} / {100 * mean(wide, 'clip'):.2f}",
                         *(vs(a, wide, v) for v in ("auc", "final")),
                         f"{sum(x['collapsed'] for x in a)} / {sum(x['collapsed'] for x in wide)} of {len(a)} / {len(wide)}"])
    if rows:
        out.append(table(f"Against the fixed band of ±0.45 at learning rate 1e-3, 16 updates, n = {len(wide)}",
                         ("objective", "clip rate (%)", "Δ area", "Δ final", "collapsed"), rows))
    try:
        specs = matched(lines)
    except SystemExit:
        specs = {}
    some = {"ratio": "grpo", **{k: specs.get(f"constraint: {k}", "") for k in ("kl3", "kl", "tv")}}
    same = [(k, runs(lines, s)) for k, s in some.items() if runs(lines, s)]
    if len(same) == 4:  # the goal is met on the tuning seeds; the table says what came out on these
        out.append(table("One-line constraints at the clip rate of ±0.2",
                         ("constraint", "delta", "clip rate (%)", "area", "final", "entropy at end", "Δ area vs ratio",
                          "Δ entropy at reward 0.8", "n"), [[k, some[k].split("=")[-1] if k != "ratio" else 0.2, f"{100 * mean(s, 'clip'):.2f}",
                           *(ci(s, v) for v in ("auc", "final")),
                           ci(s, "entropy", 3),
                           "" if k == "ratio" else vs(s, same[0][1], "auc"),
                           "" if k == "ratio" else vs(s, same[0][1], "at80", 3), len(s)] for k, s in same]))
        forests += [(f"{k} − ratio, equal clip rate", {v: paired(s, same[0][1], f) for v, f in VALUES.items()}, "#888888")
                    for k, s in same[1:]]
    if forests:
        fig, ax = plt.subplots(1, 3, figsize=(14, 0.42 * len(forests) + 1.2), sharey=True)
        for a, (v, title) in zip(ax, (("auc", "area under the curve (points)"), ("final", "final accuracy (points)"),
                                      ("at80", "entropy at reward 0.8 (nats)"))):
            forest(a, [(label, *d[v][:2], color) for label, d, color in forests])
            a.set_title(f"Δ {title}")
        finish(fig, "controls")
    return out


# ---- 4. WAPO -----------------------------------------------------------------------------------------------------------

NAMES = {"grpo": "grpo, all cells", "cells only=1110": "grpo without losers' valleys", "cells only=1100": "grpo, winners only",
         "wapo": "wapo", "raft": "raft", "cells only=0011": "grpo, losers only"}
NAME_COLORS = dict(zip(NAMES, ("#555555", "#66a61e", "#1f5a99", "#b0413e", "#d95f0e", "#bbbbbb")))
LONG = ("chainsum", 1e-3, ""), ("countdown", 3e-4, "")


def wapo(lines):
    out, some = [], runs(lines, "grpo", 2, measure="cells")
    if not some:
        return []
    names = [c.replace("pos_", "winner ").replace("neg_", "loser ") for c in CELLS]
    colors = ["#2c7fb8", "#7fcdbb", "#d95f0e", "#b0413e"]
    steps, rows = [int(c["step"]) for c in some[0]["cells"]], []
    fig, ax = plt.subplots(1, 3, figsize=(15, 4.4))
    for i, step in enumerate(steps):
        at = [x["cells"][i] for x in some]
        pairs = [(m, p) for a in at for m, p in zip(a["measured"], a["predicted"])]
        scale = sum(m * p for m, p in pairs) / sum(p * p for _, p in pairs)
        for c in range(4):
            m, half = interval([1e3 * a["measured"][c] for a in at])
            predicted = 1e3 * scale * sum(a["predicted"][c] for a in at) / len(at)
            agree = sum(a["measured"][c] * a["predicted"][c] > 0 for a in at)
            rows.append([step, f"{sum(a['reward'] for a in at) / len(at):.2f}", names[c],
                         f"{100 * sum(a['share'][c] for a in at) / len(at):.1f}", pm(m, half, 2, True), f"{predicted:+.2f}", f"{agree} / {len(at)}"])
            ax[0].bar(i + 0.2 * (c - 1.5), m, 0.18, yerr=half, color=colors[c], capsize=2, label=names[c] if not i else None)
            ax[0].plot(i + 0.2 * (c - 1.5), predicted, "kD", ms=4, label="predicted, free logits" if not i and not c else None)
    ax[0].axhline(0, color="black", lw=0.8)
    ax[0].set_xticks(range(len(steps)), [f"step {s}\nreward {sum(x['cells'][i]['reward'] for x in some) / len(some):.2f}"
                                         for i, s in enumerate(steps)])
    ax[0].set_title(f"entropy change by one step on one cell\n(millinats, chainsum, n = {len(some)})", fontsize=11)
    ax[0].set_ylim(top=25)
    ax[0].legend(ncols=2, loc="upper left")
    out.append(table(f"WAPO 1: mean entropy change (millinats) of one plain gradient step on one cell, n = {len(some)}",
                     ("step", "reward", "cell", "tokens (%)", "measured", "predicted", "same sign"), rows))
    rows = []
    for a, (task, lr, flags) in zip(ax[1:], LONG):
        base, sizes = runs(lines, "grpo", 16, lr, task, flags), set()
        for spec in NAMES:
            s = runs(lines, spec, 16, lr, task, flags)
            if not s:
                continue
            sizes.add(len(s))
            curve = smooth(s, "reward", 1)
            a.plot(range(1, len(curve) + 1), curve, color=NAME_COLORS[spec], lw=1.8, label=NAMES[spec])
            late = paired(s, base, lambda x: 100 * sum(x["curves"]["reward"][-5:]) / 5)
            rows.append([f"{task}, lr {lr:g}", NAMES[spec], ci(s, "auc"),
                         ci(s, "final"), *(["", ""] if spec == "grpo" else [
                             vs(s, base, "final"), pm(*late[:2], sign=True)]),
                         ci(s, "entropy", 3), fallen(s)])
        a.set_title(f"reward: {task}, learning rate {lr:g}\n(16 updates, n = {' to '.join(map(str, sorted(sizes)))}, three-step means)", fontsize=11)
        a.set_xlabel("step")
        a.legend()
    finish(fig, "wapo")
    changes = []
    for lr in (3e-4, 1e-3):
        whole, base = runs(lines, "wapo", lr=lr), runs(lines, "grpo", lr=lr)
        for what, (loss, flags) in ({"": ("wapo", "")} | WITHOUT).items():
            s = runs(lines, loss, lr=lr, flags=flags)
            if s and whole and base:
                changes.append([f"{lr:g}", f"but {what}" if what else "wapo", ci(s, "auc"), ci(s, "final"), vs(s, base, "auc"), vs(s, base, "final"),
                                *((vs(s, whole, "auc"), vs(s, whole, "final")) if what else ("", "")), fallen(s)])
    if len(changes) > 2:
        out.append(table("WAPO 3: each of its changes taken back alone, chainsum, 16 updates",
                         ("lr", "run", "area", "final", "Δ area vs grpo", "Δ final vs grpo", "Δ area vs wapo", "Δ final vs wapo",
                          "collapsed / n"), changes))
    return out + [table("WAPO 2: who learns, where the learning rate is too high for 16 updates",
                        ("run", "what learns", "area", "final", "Δ final vs grpo", "Δ reward of the last 5 steps", "entropy at end",
                         "collapsed / n"), rows)]


def main():
    source = Path(sys.argv[1]) if sys.argv[1:] else RESULTS
    if not source.is_file():
        sys.exit(f"plot.py: {source} does not exist: experiments/compare.py writes it")
    OUT["figures"] = OUT["figures"] if source == RESULTS else source.parent
    lines = load(source)
    hours = sum(x["cpu_seconds"] for x in lines) / 3600
    parts = [f"{len(lines)} runs, {hours:.1f} CPU-hours. Mean ± half width of the 95 % interval over seeds; differences are "
             "paired by seed, bold where the interval excludes zero. Made by experiments/plot.py.\n"]
    for part in (main_table, common_table, lr_table, acpo, controls, wapo):
        try:
            parts += part(lines)
        except SystemExit as e:  # compare.py's line about a grid that is not complete
            parts.append(f"({part.__name__}: {e})\n")
    (source.parent / "compare.md").write_text("\n".join(parts))
    print("\n".join(parts))


if __name__ == "__main__":
    main()
