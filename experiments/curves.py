"""Draw a run's metrics.jsonl as curves.png: python experiments/curves.py runs/default"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = [("reward", "reward and held-out accuracy"), ("length", "response length (tokens)"), ("entropy", "entropy (nats)"),
          ("clip_high", "clipped tokens (%)"), ("ratio_std", "std of the importance ratio"), ("grad_norm", "gradient norm")]


def draw(run):
    """Write run/curves.png from run/metrics.jsonl, aside and renamed, so that a viewer never sees half a picture."""
    run = Path(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = json.loads((run / "config.json").read_text())["loss"]
    step = [m["step"] for m in lines]
    fig, axes = plt.subplots(2, 3, figsize=(12, 6))  # no layout engine: it costs more than the drawing
    for ax, (key, title) in zip(axes.flat, PANELS):
        percent = 100 if key == "clip_high" else 1
        ax.plot(step, [percent * (m[key] or 0) for m in lines], lw=1.5, label={"reward": "training reward",
                                                                              "clip_high": "A > 0, ratio above"}.get(key))
        if key == "clip_high":
            ax.plot(step, [percent * (m["clip_low"] or 0) for m in lines], lw=1.5, label="A < 0, ratio below")
        if key == "reward":
            seen = [(m["step"] - (m["step"] == 1), m["eval"]) for m in lines if m["eval"] is not None]
            ax.plot(*zip(*seen), "o-", ms=4, label="held-out accuracy")
            ax.set_ylim(0, 1.02)
        else:
            ax.set_ylim(bottom=0)
        if key in ("reward", "clip_high"):
            ax.legend(frameon=False, fontsize=9)
        ax.set_title(title, fontsize=11)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("step (rollouts)")
    fig.subplots_adjust(left=0.05, right=0.98, bottom=0.08, top=0.89, hspace=0.38, wspace=0.18)
    fig.suptitle(f"{loss}  ({run.name})", fontsize=12)
    fig.savefig(run / ".curves.png", dpi=110)
    plt.close(fig)
    (run / ".curves.png").rename(run / "curves.png")


if __name__ == "__main__":
    draw(sys.argv[1])
