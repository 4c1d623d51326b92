"""The default run, ten seeds, as a newcomer types it, and two controls: makes README's first picture.

    python experiments/default_run.py                 # ten seeds, two controls of three; one after the other, 15 to 25 minutes
    python experiments/default_run.py --draw          # the figure again, from experiments/results/default_run.json

Every run is a fresh process in a directory of its own, so the wall time includes imports and the warm start.
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
RESULTS, FIGURE = HERE / "results/default_run.json", HERE / "figures/default_run.png"
CONTROLS = {(): ("default run", "#1f5a99"), ("--skill_steps", "1"): ("warm start on guesses only", "#c98a1b"),
            ("--skill_steps", "0"): ("no warm start", "#b0413e")}
KEEP = ("step", "reward", "eval", "length", "entropy", "sampler_kl", "sampler_max")


def one_run(seed, *flags):
    with tempfile.TemporaryDirectory() as cwd:
        began = time.time()
        subprocess.run([sys.executable, HERE.parent / "train.py", "--seed", str(seed), "--eval_every", "5", *flags], cwd=cwd,
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall = time.time() - began
        lines = [json.loads(line) for line in (Path(cwd) / "runs/default/metrics.jsonl").read_text().splitlines()]
    return {"seed": seed, "flags": list(flags), "wall_seconds": round(wall, 1), "first": lines[0]["eval"], "last": lines[-1]["eval"],
            "curve": [{k: round(m[k], 16) if m[k] is not None else None for k in KEEP} for m in lines]}


def draw(runs):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    for run in runs:
        style = dict(color=CONTROLS[tuple(run["flags"])][1], lw=1.2, alpha=0.7)
        step = [m["step"] for m in run["curve"]]
        seen = [(m["step"] - (m["step"] == 1), m["eval"]) for m in run["curve"] if m["eval"] is not None]
        axes[0].plot(*zip(*seen), **style)
        axes[1].plot(step, [m["length"] for m in run["curve"]], **style)
        axes[2].plot(step, [m["entropy"] for m in run["curve"]], **style)
    for ax, title in zip(axes, ("held-out accuracy (sampled)", "response length (tokens)", "entropy per token (nats)")):
        ax.set_title(title, fontsize=12)
        ax.set_xlabel("step: 512 responses, 4 updates")
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1.02)
    axes[1].set_ylim(0, 12)
    axes[1].axhline(3, color="gray", lw=0.8, ls=":")
    axes[1].axhline(10, color="gray", lw=0.8, ls=":")
    axes[1].text(98, 2.3, "a guess: #3$", ha="right", fontsize=9, color="gray")
    axes[1].text(98, 10.3, "step by step: >348943#3$", ha="right", fontsize=9, color="gray")
    for flags, (name, color) in CONTROLS.items():
        n = sum(tuple(r["flags"]) == flags for r in runs)
        axes[0].plot([], [], color=color, label=f"{name}, {n} seeds")
    axes[0].legend(frameon=False, loc="center right")
    fig.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    fig.savefig(FIGURE, dpi=100)


def main():
    if "--draw" not in sys.argv:
        runs = []
        for seed, flags in [(s, flags) for flags in CONTROLS for s in range(3 if flags else 10)]:
            runs.append(one_run(seed, *flags))
            print(f"seed {seed} {' '.join(flags):18s} {runs[-1]['first']:.3f} -> {runs[-1]['last']:.3f}  {runs[-1]['wall_seconds']:.0f} s",
                  flush=True)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"cpus": os.cpu_count(), "peak_memory_MiB": memory, "runs": runs}))
    draw(json.loads(RESULTS.read_text())["runs"])


if __name__ == "__main__":
    main()
