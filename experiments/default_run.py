"""The default run, five seeds, as a newcomer types it, and two controls: README's first picture.

    python experiments/default_run.py          # one after the other, 10 to 15 minutes
    python experiments/default_run.py --draw   # the figure again, from results/default_run.json

Every run is a fresh process in a directory of its own: wall times include imports and warm start.
"""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from eval import read_rows  # noqa: E402
from experiments.plot import plt  # noqa: E402

RESULTS = HERE / "results/default_run.json"
RUNS = {  # flags: (name, color, seeds)
    "": ("default run", "#1f5a99", 5),
    "--skill_steps 1": ("warm start on guesses only", "#c98a1b", 2),
    "--skill_steps 0": ("no warm start", "#b0413e", 2)}
KEPT = ("step", "reward", "eval", "length", "entropy", "sampler_kl", "sampler_max")


def one_run(flags, seed) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        began = time.time()
        subprocess.run([sys.executable, HERE.parent / "train.py", "--seed", str(seed),
                        "--eval_every", "5", *flags.split()], cwd=directory, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall = time.time() - began
        metrics = read_rows(Path(directory) / "runs/default/metrics.jsonl")
    curve = [{key: m[key] for key in KEPT} for m in metrics]
    return {"flags": flags, "seed": seed, "wall_seconds": round(wall, 1),
            "first": curve[0]["eval"], "last": curve[-1]["eval"], "curve": curve}


def curves(groups, panels):
    """A figure with a line for each run. `groups`: (name, color, runs); `panels`: (key of a step's
    numbers, title, top of the axis)."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    for axis, (key, title, top) in zip(axes, panels):
        for name, color, runs in groups:
            axis.plot([], [], color=color, label=f"{name}, {len(runs)} seeds")
            for run in runs:
                measured = [m for m in run["curve"] if m[key] is not None]
                # the first line's accuracy is measured before its update
                steps = [m["step"] - (key == "eval" and m["step"] == 1) for m in measured]
                axis.plot(steps, [m[key] for m in measured], color=color, lw=1.2, alpha=0.7)
        axis.set_title(title)
        axis.set_xlabel("step: 512 responses, 4 updates")
        axis.set_ylim(0, top)
    return figure, axes


def mark(axis, height, text, text_height):
    """A dotted line, with its text at the right end."""
    axis.axhline(height, color="gray", lw=0.8, ls=":")
    axis.text(0.95, text_height, text, ha="right", fontsize=9, color="gray",
              transform=axis.get_yaxis_transform())


def draw(runs) -> None:
    groups = [(name, color, [run for run in runs if run["flags"] == flags])
              for flags, (name, color, _) in RUNS.items()]
    figure, axes = curves(groups, [("eval", "held-out accuracy (sampled)", 1.02),
                                   ("length", "response length (tokens)", 12),
                                   ("entropy", "entropy per token (nats)", None)])
    mark(axes[1], 3, "a guess: #3$", 3.2)
    mark(axes[1], 10, "step by step: >348943#3$", 10.2)
    axes[0].legend(fontsize=10, loc="center right")
    figure.tight_layout()
    figure.savefig(HERE / "figures/default_run.png", dpi=100)


def main():
    if "--draw" not in sys.argv:
        runs = []
        for flags, (_, _, seeds) in RUNS.items():
            for seed in range(seeds):
                run = one_run(flags, seed)
                runs.append(run)
                print(f"{flags:16s} seed {seed}: {run['first']:.3f} -> {run['last']:.3f}  "
                      f"{run['wall_seconds']:.0f} s", flush=True)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
        found = {"cpus": os.cpu_count(), "peak_memory_MiB": memory, "runs": runs}
        RESULTS.write_text(json.dumps(found))
    draw(json.loads(RESULTS.read_text())["runs"])


if __name__ == "__main__":
    main()
