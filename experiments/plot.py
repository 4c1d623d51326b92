"""Every figure and table of compare.py's lines: python experiments/plot.py [LINES.jsonl]

Means with 95 % t-intervals over seeds; differences are paired by seed. Tables go to compare.md
beside the lines, figures to experiments/figures (beside the lines, if others are named). What no
line speaks of is left out.
"""
import math
import sys
from itertools import product
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.compare import (BINS, COMMON, EARLY, GSPO_WIDE, LADDER, LRS, MATCHED, RESULTS,
                                 TABLE, TASKS, TUNING, WAPO_BUT, WIDE, WINNERS, load, pick, tuned)

plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.titlesize": 12,
                     "axes.spines.top": False, "axes.spines.right": False,
                     "legend.frameon": False, "legend.fontsize": 9})
T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
COLORS = {"grpo": "#555555", "dapo": "#8c6bb1", "cispo": "#d95f0e", "gspo": "#a6761d",
          "acpo": "#1f5a99", "kl3": "#1b9e77", "etr": "#66a61e", "wapo": "#b0413e",
          "sapo": "#e7298a", "gppo": "#e6ab02", "unclipped": "#bbbbbb", GSPO_WIDE: "#d8b365"}
CELLS = ("winner peak", "winner valley", "loser peak", "loser valley")


class Lines:
    """The lines of one results file, and where its figures go."""

    def __init__(self, path):
        self.all = load(path)
        self.figures = path.parent
        if path == RESULTS:
            self.figures = Path(__file__).parent / "figures"

    def runs(self, loss, updates=16, lr=3e-4, task="chainsum", tuning=False, **more):
        flags = f"{TASKS[task]} {more.get('flags', '')}".strip()
        some = pick(self.all, loss=loss, updates=updates, lr=lr, task=task, flags=flags,
                    measure=more.get("measure", ""))
        return [line for line in some if (line["seed"] in TUNING) == tuning]

    def save(self, figure, name):
        figure.tight_layout()
        figure.savefig(self.figures / f"compare_{name}.png", dpi=100)
        plt.close(figure)


# ---- Numbers -----------------------------------------------------------------------------------

def area(line):
    return 100 * line["auc"]


def final(line):
    return 100 * line["final"]


def clip_rate(line):
    curves = line["curves"]
    return 100 * sum(curves["clip_low"] + curves["clip_high"]) / len(curves["reward"])


def entropy_at(line, level=0.8):
    """Entropy where the reward first reaches `level`, between two steps; nan if it never does."""
    points = list(zip(line["curves"]["reward"], line["curves"]["entropy"]))
    for (r0, h0), (r1, h1) in zip(points, points[1:]):
        if r0 < level <= r1:
            return h0 + (h1 - h0) * (level - r0) / (r1 - r0)
    return math.nan


def interval(values):
    """Mean and half width of the 95 % interval; of one value nan."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean)**2 for v in values) / max(1, n - 1)
    return mean, T95[min(n - 1, len(T95) - 1)] * math.sqrt(variance / n)


def paired(a, b, value):
    """Interval of value(a) - value(b) over the seeds of both."""
    other = {line["seed"]: value(line) for line in b}
    both = [value(line) - other[line["seed"]] for line in a if line["seed"] in other]
    both = [v for v in both if not math.isnan(v)]
    return interval(both) if both else (math.nan, math.nan)


def pm(mean, half, digits=1, sign=False):
    if math.isnan(mean):
        return ""
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    if math.isnan(half):
        return text
    text += f" ± {half:.{digits}f}"
    return f"**{text}**" if sign and abs(mean) > half else text


def mean_pm(lines, value, digits=1):
    return pm(*interval([*map(value, lines)]), digits)


def delta_pm(a, b, value, digits=1):
    return pm(*paired(a, b, value), digits, sign=True)


def fallen(lines):
    return f"{sum(line['collapsed'] for line in lines)} / {len(lines)}"


def markdown(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def table(title, head, rows) -> list[str]:
    return [f"**{title}**", "", markdown(head, rows), ""] if rows else []


# ---- Scores ------------------------------------------------------------------------------------

def scores(lines, title, settings, updates, task) -> list[str]:
    """A row for each (objective, learning rate), differences against grpo."""
    found = {spec: (lr, lines.runs(spec, updates, lr, task)) for spec, lr in settings}
    base = found["grpo"][1]
    rows = []
    for spec, (lr, some) in found.items():
        if some and base:
            deltas = [delta_pm(some, base, value) for value in (area, final)]
            rows.append([f"`{spec}`", f"{lr:g}", mean_pm(some, area), mean_pm(some, final),
                         *(deltas if spec != "grpo" else ["", ""]),
                         mean_pm(some, lambda line: line["entropy_end"], 3), fallen(some)])
    head = ("objective", "lr", "area under curve", "final", "Δ area", "Δ final", "entropy at end",
            "collapsed / n")
    return table(f"{task}, {updates} updates per rollout, {title}; Δ is against grpo", head, rows)


def at_own_rates(lines) -> list[str]:
    """Each objective at the learning rate that suits it, and the picture of the differences."""
    text, panels = [], []
    for task, updates in product(TASKS, (2, 16)):
        try:
            settings = [(spec, tuned(lines.all, spec, updates, task)) for spec in TABLE]
        except ValueError as e:  # the grid is not complete
            text += [f"({e})", ""]
            continue
        text += scores(lines, "each at its own learning rate", settings, updates, task)
        found = {spec: lines.runs(spec, updates, lr, task) for spec, lr in settings}
        if all(found.values()):
            rows = [(f"{spec}, lr {lr:g}", paired(found[spec], found["grpo"], area), COLORS[spec])
                    for spec, lr in settings[1:]]
            panels.append((f"{task}, {updates} updates, n = {len(found['grpo'])}", rows))
    if panels:
        figure, axes = plt.subplots(2, 2, figsize=(13, 8.4))
        for axis, (title, rows) in zip(axes.flat, panels):
            forest(axis, title, rows)
            axis.set_xlim(left=max(-10, axis.get_xlim()[0]))
            axis.set_xlabel("area under the reward curve, difference to grpo (points)")
        lines.save(figure, "table")
    return text


def forest(axis, title, rows):
    """Rows of (label, (mean, half), color); intervals that exclude zero are filled."""
    for y, (_, (mean, half), color) in enumerate(rows):
        fill = color if abs(mean) > half else "white"
        axis.errorbar(mean, y, xerr=half, fmt="o", color=color, capsize=3, mfc=fill)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    axis.set_title(title)


def at_one_rate(lines) -> list[str]:
    """All objectives at one learning rate: tables for both tasks, and chainsum's curves."""
    specs = (*TABLE, "unclipped", GSPO_WIDE, *WINNERS, WIDE)
    text, panels = [], []
    settings = {(line["task"], line["updates"], line["lr"]) for line in lines.all}
    for task, updates, lr in sorted(settings):
        there = [spec for spec in COLORS if lines.runs(spec, updates, lr, task)]
        if len(there) < 4 or "grpo" not in there:
            continue
        if updates == 16:  # the others are in the tables above
            rates = [(spec, lr) for spec in specs]
            text += scores(lines, f"learning rate {lr:g} for all", rates, updates, task)
        if task == "chainsum":
            panels.append((updates, lr))
    if panels:
        draw_curves(lines, panels)
    return text


def draw_curves(lines, panels):
    size = (5 * len(panels) + 1, 7.4)
    figure, axes = plt.subplots(2, len(panels), figsize=size, sharey="row", squeeze=False)
    for column, (updates, lr) in zip(axes.T, panels):
        for axis, what in zip(column, ("reward", "entropy")):
            for spec, color in COLORS.items():
                curves = [line["curves"][what] for line in lines.runs(spec, updates, lr)]
                means = [fmean(step) for step in zip(*curves)]
                label = spec.replace("eps_low=0.03 eps_high=0.04", "× 100")
                axis.plot(range(1, len(means) + 1), means, color=color, label=label)
        column[0].set_title(f"chainsum, {updates} updates, lr {lr:g}")
        column[1].set_xlabel("step: 256 responses")
    axes[0, 0].set_ylabel("reward")
    axes[1, 0].set_ylabel("entropy per token (nats)")
    axes[0, -1].legend(ncols=2)
    lines.save(figure, "curves_chainsum")


def learning_rates(lines) -> list[str]:
    rates = sorted({lr for of_task in LRS.values() for lrs in of_task.values() for lr in lrs})
    rows = []
    for task, updates, spec in product(TASKS, (2, 16), TABLE):
        cells = []
        for lr in rates:
            some = lines.runs(spec, updates, lr, task, tuning=True)
            means = [f"{fmean(map(value, some)):.1f}" for value in (area, final) if some]
            cells.append(" / ".join(means))
        if any(cells):
            rows.append([f"`{spec}`", task, updates, *cells])
    head = ("objective", "task", "updates", *(f"{lr:g}" for lr in rates))
    return table("Learning rates, tuning seeds: area / final", head, rows)


# ---- ACPO --------------------------------------------------------------------------------------

def ladder(lines) -> list[str]:
    """1 to 32 updates on the same rollout: what happens to tokens of which probability?"""
    some = lines.runs("grpo", 4, COMMON["chainsum"], measure="ladder")
    if not some:
        return []
    rungs = {k: pooled(some, str(k)) for k in LADDER}
    rows = []
    for k, sums in rungs.items():
        unlikely = [kept(line["ladder"][str(k)])[0] for line in some]
        rows.append([k, spaced(ratio_std(sums), 3), spaced(clipped(sums), 1),
                     spaced(kept(sums), 0), pm(*interval(unlikely))])
    panels = {"std of the ratio": ratio_std, "clipped by ±0.2 (% of the bin's tokens)": clipped,
              "share of the gradient (%)": kept}
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4))
    colors = plt.cm.viridis([0.0, 0.22, 0.45, 0.68, 0.9])
    for axis, (title, value) in zip(axes, panels.items()):
        for b, color in enumerate(colors):
            curve = [value(sums)[b] for sums in rungs.values()]
            axis.plot(LADDER, curve, "o-", color=color, label=f"p from {b / BINS:g}")
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_xticks(LADDER, LADDER)
        axis.set_xlabel("updates per rollout")
    axes[0].legend(title="probability when sampled")
    lines.save(figure, "acpo_chainsum")
    head = ("updates", "std of the ratio", "clipped (%)", "share of the gradient (%)",
            "of which p < 0.2")
    tokens = spaced(share(rungs[1]["tokens"]), 1)
    return table(f"1 to 32 updates from the same weights on the same rollout, first {EARLY} steps, "
                 f"n = {len(some)}; bins of the probability when sampled, p < 0.2 first: "
                 f"{tokens} % of the tokens", head, rows)


def pooled(some, rung) -> dict:
    """The rung's sums per bin, added up over runs."""
    found = [line["ladder"][rung] for line in some]
    return {name: [sum(bins) for bins in zip(*(sums[name] for sums in found))]
            for name in found[0]}


def ratio_std(sums):
    return [math.sqrt(max(0.0, q / n - (s / n)**2))
            for n, s, q in zip(sums["tokens"], sums["moved"], sums["moved_sq"])]


def clipped(sums):
    return [100 * c / n for c, n in zip(sums["clipped"], sums["tokens"])]


def kept(sums):
    return share(sums["kept"])


def share(values):
    return [100 * v / sum(values) for v in values]


def spaced(values, digits):
    return " ".join(f"{v:.{digits}f}" for v in values)


def by_updates(lines) -> list[str]:
    rows = []
    for k in LADDER:
        a, b = lines.runs("acpo", k), lines.runs("grpo", k)
        if a and b:
            deltas = [delta_pm(a, b, value) for value in (area, final)]
            rows.append([k, mean_pm(b, area), *deltas, len(a)])
    head = ("updates", "area of grpo", "Δ area", "Δ final", "n")
    return table("acpo − grpo, chainsum, lr 3e-4", head, rows)


# ---- Bands against their controls --------------------------------------------------------------

def controls(lines) -> list[str]:
    text, forests = [], []
    for task, bands in MATCHED.items():
        rows = []
        for name, others in bands.items():
            for label, spec in {"grpo ±0.2": "grpo", **others}.items():
                a, b = (lines.runs(s, 16, COMMON[task], task) for s in (name, spec))
                if not a or not b:
                    continue
                rates = [f"{fmean(map(clip_rate, some)):.2f}" for some in (a, b)]
                rows.append([f"`{name}`", f"{label}: `{spec}`", " / ".join(rates),
                             delta_pm(a, b, area), delta_pm(a, b, final),
                             delta_pm(a, b, entropy_at, 3), len(b)])
                forests.append((f"{name} − {label}, {task}", a, b, COLORS[name]))
        head = ("objective", "against", "clip rate (%)", "Δ area", "Δ final",
                "Δ entropy at reward 0.8", "n")
        text += table(f"Adaptive and asymmetric bands against fixed ones, {task}, 16 updates, "
                      f"lr {COMMON[task]:g}", head, rows)
    if forests:
        size = (14, 0.42 * len(forests) + 1.2)
        figure, axes = plt.subplots(1, 3, figsize=size, sharey=True)
        titles = {"Δ area (points)": area, "Δ final accuracy (points)": final,
                  "Δ entropy at reward 0.8 (nats)": entropy_at}
        for axis, (title, value) in zip(axes, titles.items()):
            rows = [(label, paired(a, b, value), color) for label, a, b, color in forests]
            forest(axis, title, rows)
        lines.save(figure, "controls")
    return text


# ---- WAPO --------------------------------------------------------------------------------------

def cells(lines) -> list[str]:
    """One plain gradient step on each cell alone: does the entropy rise or fall?"""
    some = lines.runs("grpo", 2, measure="cells")
    rows = []
    for stage in zip(*(line["cells"] for line in some)):
        reward = fmean(at["reward"] for at in stage)
        for c, name in enumerate(CELLS):
            changes = [1e3 * at["measured"][c] for at in stage]
            rise = sum(change > 0 for change in changes)
            tokens = 100 * fmean(at["share"][c] for at in stage)
            rows.append([f"{stage[0]['step']:.0f}", f"{reward:.2f}", name, f"{tokens:.1f}",
                         pm(*interval(changes), 2, True), f"{rise} / {len(changes)}"])
    head = ("step", "reward", "cell", "tokens (%)", "entropy change (millinats)", "runs it rose in")
    return table("One plain gradient step on one of WAPO's cells", head, rows)


def wapo_changes(lines) -> list[str]:
    rows = []
    for lr in (3e-4, 1e-3):
        whole = lines.runs("wapo", lr=lr)
        for change, (loss, flags) in WAPO_BUT.items():
            some = lines.runs(loss, lr=lr, flags=flags)
            if some and whole:
                rows.append([f"{lr:g}", change, mean_pm(some, area), mean_pm(some, final),
                             delta_pm(some, whole, area), delta_pm(some, whole, final),
                             fallen(some)])
    head = ("lr", "wapo, but", "area", "final", "Δ area vs wapo", "Δ final", "collapsed / n")
    return table("WAPO's changes taken back one by one, chainsum, 16 updates", head, rows)


def main():
    path = Path(sys.argv[1]) if sys.argv[1:] else RESULTS
    if not path.is_file():
        sys.exit(f"plot.py: {path} does not exist: experiments/compare.py writes it")
    lines = Lines(path)
    hours = sum(line["cpu_seconds"] for line in lines.all) / 3600
    text = [f"{len(lines.all)} runs, {hours:.1f} CPU-hours. Mean ± half width of the 95 % interval "
            "over seeds; differences are paired by seed, bold where the interval excludes zero. "
            "Made by experiments/plot.py.", ""]
    for part in (at_own_rates, at_one_rate, learning_rates, ladder, by_updates, controls, cells,
                 wapo_changes):
        text += part(lines)
    (path.parent / "compare.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
