"""ACPO's band per probability bin on real rollouts of the default task: python experiments/acpo_band.py

Runs the default task with 4 and with 16 updates per rollout (three seeds each, 40 steps) and draws, from metrics.jsonl,
the standard deviation of the importance ratio in each of the five bins of current probability, and the band
1 -+ (0.2 + 3 std) that follows from it. About six minutes; `--draw` draws experiments/results/acpo_band.json again.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, FIGURE = HERE / "results/acpo_band.json", HERE / "figures/acpo_band.png"
KEYS = [f"{k}_bin{b}" for k in ("std", "eps") for b in range(5)]


def measure():
    runs = []
    with tempfile.TemporaryDirectory() as cwd:  # one directory: the warm start of a seed is shared
        for seed in range(3):
            for updates in (4, 16):
                out = f"{updates}-{seed}"
                subprocess.run([sys.executable, HERE.parent / "train.py", "--seed", str(seed), "--updates", str(updates), "--steps",
                                "40", "--out", out], cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                lines = [json.loads(line) for line in (Path(cwd) / out / "metrics.jsonl").read_text().splitlines()]
                runs.append({"updates": updates, "seed": seed, **{k: [round(m[k], 5) for m in lines] for k in KEYS + ["reward"]}})
                print(out, "reward", runs[-1]["reward"][-1], flush=True)
    RESULTS.write_text(json.dumps(runs))


def draw():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = json.loads(RESULTS.read_text())
    names, colors = ["p < 0.2", "0.2 to 0.4", "0.4 to 0.6", "0.6 to 0.8", "p > 0.8"], plt.cm.viridis([0.0, 0.22, 0.45, 0.68, 0.9])
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    for ax, updates in zip(axes, (4, 16)):
        some = [r for r in runs if r["updates"] == updates]
        for b in range(5):
            band = [sum(r[f"eps_bin{b}"][t] for r in some) / len(some) for t in range(40)]
            ax.plot(range(1, 41), band, color=colors[b], lw=2, label=names[b])
            for r in some:
                ax.plot(range(1, 41), r[f"eps_bin{b}"], color=colors[b], lw=0.6, alpha=0.5)
        ax.axhline(0.2, color="gray", ls=":", lw=1)
        ax.text(40, 0.196, "fixed band of GRPO", ha="right", va="top", fontsize=9, color="gray")
        ax.set_title(f"{updates} updates per rollout", fontsize=12)
        ax.set_xlabel("step")
        ax.set_yscale("log")
        ax.set_ylim(0.17, 1.5)
        ax.set_yticks([0.2, 0.3, 0.5, 1.0], ["0.2", "0.3", "0.5", "1"])
        ax.minorticks_off()
        ax.grid(alpha=0.25, which="major")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("half width of ACPO's band")
    axes[0].legend(frameon=False, title="token probability")
    fig.tight_layout()
    fig.savefig(FIGURE, dpi=100)


if __name__ == "__main__":
    if "--draw" not in sys.argv:
        measure()
    draw()
