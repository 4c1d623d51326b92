"""A policy learns to search: ten seeds of `--data hops` and three controls; the figure of
docs/tools.md.

    python experiments/hops.py           # about 30 minutes of one core; started again, it goes on
    python experiments/hops.py --draw    # figure and table again, from results/hops.json

Controls: no tool; one search (--turns 2: the policy speaks, hears one reply, speaks once more); the
tool's words not masked out of the loss: they are taken for the policy's own, which any framework
does that keeps no mask by position. Their old log-probs are the trainer's there, as nobody drew
them. Runs stand in runs/hops-NAME-SEED, and share the warm starts of their seeds.
"""
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import train  # noqa: E402
from eval import read_rows  # noqa: E402
from experiments.default_run import curves, mark  # noqa: E402
from experiments.plot import interval, pm  # noqa: E402

RESULTS = HERE / "results/hops.json"
FLAGS = "--data hops --skill_steps 500 --habit_steps 100 --steps 40 --eval_every 5"
RUNS = {  # name: (its flags, color, seeds)
    "search": ("", "#1f5a99", 10),
    "no tool": ("--tool none", "#777777", 4),
    "one search": ("--turns 2", "#c98a1b", 4),
    "not masked": ("--old_logp trainer", "#b0413e", 4)}
KEPT = ("step", "reward", "eval", "length", "calls", "entropy", "grad_norm", "sampler_kl",
        "sampler_max")


def train_not_masked(argv) -> None:
    """train.py, but that the trainer takes every token behind the prompt for the policy's own."""
    converse = train.converse

    def unmasked(*args, **how):
        rollouts = converse(*args, **how)
        for rollout in rollouts:
            rollout.drawn = None
        return rollouts
    train.converse = unmasked
    sys.argv = ["train.py", *argv]
    train.main()


def one_run(name, seed) -> dict:
    out = Path(f"runs/hops-{name.replace(' ', '-')}-{seed}")
    flags = f"{FLAGS} {RUNS[name][0]} --seed {seed} --out {out}".split()
    if (out / "config.json").is_file():
        flags.append("--resume")
    program = [HERE.parent / "train.py"]
    if name == "not masked":
        program = [Path(__file__), "--not_masked"]
    began = cpu_seconds()
    subprocess.run([sys.executable, *program, *flags], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    curve = [{key: m[key] for key in KEPT} for m in read_rows(out / "metrics.jsonl")]
    return {"name": name, "seed": seed, "flags": " ".join(flags),
            "first": curve[0]["eval"], "last": curve[-1]["eval"],
            "cpu_seconds": round(cpu_seconds() - began, 1), "curve": curve}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(runs) -> str:
    lines = ["| | seeds | accuracy before | after | lowest | calls per question | own tokens |",
             "|---|---|---|---|---|---|---|"]
    for name in RUNS:
        some = [run for run in runs if run["name"] == name]
        if some:
            last = [run["curve"][-1] for run in some]
            columns = ([run["first"] for run in some], [m["eval"] for m in last],
                       [m["calls"] for m in last], [m["length"] for m in last])
            first, after, calls, length = (pm(*interval(column), 3) for column in columns)
            lowest = min(m["eval"] for m in last)
            lines.append(f"| {name} | {len(some)} | {first} | {after} | {lowest:.3f} | {calls} | "
                         f"{length} |")
    return "\n".join(lines)


def draw(runs) -> None:
    groups = [(name, color, [run for run in runs if run["name"] == name])
              for name, (_, color, _) in RUNS.items()]
    figure, axes = curves(groups, [("eval", "held-out accuracy (sampled)", 1.02),
                                   ("calls", "calls of the tool per question", None),
                                   ("length", "own tokens (not masked: and the tool's)", None)])
    mark(axes[0], 0.1, "a guess", 0.03)
    mark(axes[1], 2.5, "what the questions need", 2.08)
    axes[0].legend(fontsize=10, loc="lower right", bbox_to_anchor=(1, 0.15))
    figure.tight_layout()
    figure.savefig(HERE / "figures/hops.png", dpi=100)


def main():
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.is_file() else []
    done = {(run["name"], run["seed"]) for run in runs}
    for name, (_, _, seeds) in RUNS.items():
        for seed in range(seeds):
            if "--draw" in sys.argv or (name, seed) in done:
                continue
            run = one_run(name, seed)
            runs.append(run)
            print(f"{name:10s} seed {seed}: {run['first']:.3f} -> {run['last']:.3f}  "
                  f"{run['cpu_seconds']:.0f} s of CPU", flush=True)
            RESULTS.write_text(json.dumps({"cpus": os.cpu_count(), "flags": FLAGS, "runs": runs}))
    print(table(runs))
    draw(runs)


if __name__ == "__main__":
    if "--not_masked" in sys.argv:
        train_not_masked([flag for flag in sys.argv[1:] if flag != "--not_masked"])
    else:
        main()
