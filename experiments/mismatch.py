"""The sampler is not the trainer: what breaks as the gap grows, and what a correction repairs.

    python experiments/mismatch.py           # 232 runs, then table and figure: half an hour
    python experiments/mismatch.py --draw    # table and figure of the lines that are there

The default task, GRPO, 16 updates a rollout. A worse copy of the weights samples: in bfloat16
(--rollout_dtype), rounded to 8, 4 or 3 bits, or as they were one or four steps ago. pi_old is the
trainer's (--old_logp trainer) and --correction weighs the loss by pi_old / pi_sampler; "two" has
two policies instead of three, the ratio to the sampler (--old_logp sampler). The held-out accuracy
is that of the trainer's own weights, every third step. One warm start for all; seeds differ in data
and sampling. A run leaves a line in experiments/results/mismatch.jsonl; a grid goes on from there.
"""
import argparse
import copy
import json
import sys
import time
from collections import deque
from pathlib import Path
from statistics import fmean

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from experiments.compare import WARM_START, load, pick, rounded, train_here  # noqa: E402
from experiments.plot import delta_pm, markdown, mean_pm, paired, plt  # noqa: E402

RESULTS = ROOT / "experiments/results/mismatch.jsonl"
FIGURE = ROOT / "experiments/figures/mismatch.png"
FLAGS = "--loss grpo --steps 24 --prompts 32 --samples 8 --updates 16 --lr 3e-4 --eval_every 3"
CURVES = ("eval", "reward", "sampler_kl", "sampler_max", "sampler_ess", "masked", "grad_norm")
REPAIRS = ("none", "two", "tis", "icepop", "seq_mis", "geo_mis")
GRID = {  # gap -> corrections; where the ratio is nearly 1 only the narrowest can do anything
    "none": ("none",), "bfloat16": ("none", "geo_mis"), "8 bits": ("none", "geo_mis"),
    "4 bits": REPAIRS, "3 bits": REPAIRS, "1 step": REPAIRS, "4 steps": REPAIRS}
SEEDS = range(8)
COLORS = "#555555 #1f5a99 #d95f0e #e6ab02 #1b9e77 #b0413e".split()


# ---- What samples ------------------------------------------------------------------------------

class Sampler:
    """In the place of train.sampling_model: a worse copy of the weights draws what is trained on,
    the trainer's own weights are evaluated."""

    def __init__(self, gap):
        self.gap, self.training = gap, False
        self.past = deque(maxlen=int(gap[0]) + 1 if "step" in gap else 1)  # one model a step
        self.plain_collect, self.plain_model = train.collect, train.sampling_model

    def collect(self, run):
        self.training = True
        rollouts = self.plain_collect(run)
        self.training = False
        return rollouts

    def model(self, run):
        if not self.training:
            return run.model
        if "step" in self.gap:
            self.past.append(copy.deepcopy(run.model))
            return self.past[0]
        if "bits" in self.gap:
            return in_bits(copy.deepcopy(run.model), int(self.gap[0]))
        return self.plain_model(run)


@torch.no_grad()
def in_bits(model, bits):
    """Every weight rounded to one of 2^bits - 1 values, evenly spaced in its row."""
    for p in model.parameters():
        largest = p.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        step = largest / (2 ** (bits - 1) - 1)
        p.copy_((p / step).round() * step)
    return model


# ---- One run -----------------------------------------------------------------------------------

def one_run(gap, correction, seed) -> dict:
    began, sampler = time.process_time(), Sampler(gap)
    argv = [*FLAGS.split(), *WARM_START.split(), "--seed", str(seed)]
    argv += ["--rollout_dtype", "bfloat16"] if gap == "bfloat16" else []
    argv += ["--old_logp", "sampler" if correction == "two" else "trainer"]
    argv += [] if correction in ("none", "two") else ["--correction", correction]
    run, failed = train_here(argv, 0, collect=sampler.collect, sampling_model=sampler.model)
    if failed:
        raise ValueError(failed)
    curves = {key: [m[key] for m in run.log.history] for key in CURVES}
    return {"gap": gap, "correction": correction, "seed": seed, "flags": FLAGS,
            "cpu_seconds": time.process_time() - began, "curves": curves}


def sweep(runs):
    """Every run that has no line yet."""
    done = {(line["gap"], line["correction"], line["seed"]) for line in load(RESULTS)}
    with open(RESULTS, "a") as file:
        for run in runs:
            if run not in done:
                line = rounded(one_run(*run))
                file.write(json.dumps(line) + "\n")
                file.flush()
                print(*run, f"{accuracy(line):.1f} %, {line['cpu_seconds']} s", flush=True)


# ---- What the lines say ------------------------------------------------------------------------

def accuracy(line) -> float:
    """Mean held-out accuracy over the run, without the one before it, in percent."""
    return 100 * fmean(e for e in line["curves"]["eval"][1:] if e is not None)


def final(line) -> float:
    return 100 * line["curves"]["eval"][-1]


def over_steps(lines, key) -> float:
    """Mean over runs and steps; from the second on, as the first has no older weights."""
    return fmean(fmean(line["curves"][key][1:]) for line in lines)


def table(lines) -> str:
    """Markdown. The gap alone against no gap, then each correction against none, paired by seed."""
    rows = []
    exact = pick(lines, gap="none", correction="none")
    for gap in GRID:
        plain = pick(lines, gap=gap, correction="none")
        if not plain:
            continue
        row = [gap, *(f"{over_steps(plain, key):.2g}" for key in ("sampler_kl", "sampler_ess"))]
        for value in (accuracy, final):
            row.append(mean_pm(plain, value) if gap == "none" else delta_pm(plain, exact, value))
        for name in REPAIRS[1:]:
            row.append(delta_pm(pick(lines, gap=gap, correction=name), plain, accuracy))
        rows.append(row)
    head = ["gap", "KL", "ESS", "accuracy", "final", *(f"`{name}`" for name in REPAIRS[1:])]
    return markdown(head, rows)


def draw(lines) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(2, 1))
    left, right = axes
    exact = pick(lines, gap="none", correction="none")
    gaps = list(GRID)[1:]
    for i, (name, color) in enumerate(zip(REPAIRS, COLORS)):
        cells = {place: pick(lines, gap=gap, correction=name)
                 for place, gap in enumerate(gaps, start=1)}
        cells = {place: cell for place, cell in cells.items() if cell}
        means, halves = zip(*(paired(cell, exact, accuracy) for cell in cells.values()))
        left.errorbar([place + 0.11 * (i - 2.5) for place in cells], means, halves,
                      fmt="o", ms=5, capsize=2, color=color, label=name)
        if name in ("icepop", "seq_mis", "geo_mis"):
            shares = [100 * over_steps(cell, "masked") for cell in cells.values()]
            right.plot(list(cells), shares, "o-", color=color)
    left.axhline(0, color="0.4", lw=1)
    left.set_title("Held-out accuracy over the run, against no gap (points, 95 %)")
    right.set_title("Tokens of weight 0 (%)")
    for axis in axes:
        axis.set_xticks(range(1, len(GRID)), gaps)
    left.legend(title="correction", ncols=2, loc="lower left")
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="no runs")
    torch.set_num_threads(1)
    if not parser.parse_args().draw:
        sweep([(gap, correction, seed) for seed in SEEDS
               for gap, corrections in GRID.items() for correction in corrections])
    lines = load(RESULTS)
    draw(lines)
    print(table(lines))


if __name__ == "__main__":
    main()
