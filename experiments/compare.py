"""Objectives side by side: a grid of losses, updates, learning rates and seeds, a line a run.

    python experiments/compare.py --grid quick --jobs 2        # a taste, minutes, into runs/quick
    python experiments/compare.py --losses grpo "kl3 delta=0.05" --updates 2 16 --seeds 0 1 2
    python experiments/compare.py --grid lr --task countdown   # a part of FINDINGS.md: hours
    python experiments/plot.py                                 # figures and tables from the lines

A run whose line is there is not run again, so a sweep may be killed and repeated. train.py runs as
it is, without its pictures. Two grids look inside it, at two places that are wrapped here:
train.collect, where a step's rollouts are there and nothing is updated yet, and losses.policy_loss.
"""
import argparse
import copy
import dataclasses
import io
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm

import losses
import train
from eval import read_rows
from experiments.microscope import logit_norm

RESULTS = Path(__file__).parent / "results/compare.jsonl"
KEY = ("task", "loss", "updates", "lr", "seed", "flags", "measure")
CURVES = ("reward", "entropy", "clip_low", "clip_high")

# ---- The grids ---------------------------------------------------------------------------------

TASKS = {"chainsum": "--prompts 32 --samples 8 --steps 24",
         "countdown": "--prompts 32 --samples 8 --steps 40 --skill_steps 3000 --habit_steps 0"}
WARM_START = "--skill_steps 500 --habit_steps 100"  # where the task names no other
ONE_START = {"countdown": 100}  # all start from this seed's warm start: it costs ten times a run
TABLE = ("grpo", "dapo", "cispo", "gspo", "acpo", "kl3", "etr", "wapo", "sapo", "gppo")
GSPO_WIDE = "gspo eps_low=0.03 eps_high=0.04"  # its own band is for thousands of tokens
WINNERS = ("raft", "cells only=1100", "cells only=1110", "cells only=0011")
WAPO_BUT = {"losers learn too": ("unclipped", "--agg winning-groups --advantage mean"),
            "clipped at 1.2": ("wapo eps=0.2", ""),
            "divided by the std": ("wapo", "--advantage grpo"),
            "mean per response": ("wapo", "--agg seq-mean-token-mean")}
LRS = {"chainsum": {2: (3e-4, 1e-3, 3e-3), 16: (1e-4, 3e-4, 1e-3, 3e-3)},  # by updates
       "countdown": {2: (1e-4, 3e-4, 1e-3), 16: (3e-5, 1e-4, 3e-4)}}
COMMON = {"chainsum": 3e-4, "countdown": 1e-4}  # learning rate where all have the same
SEEDS = {"chainsum": range(8), "countdown": range(5)}
TUNING = (100, 101)  # seeds that are in no other table
LADDER = (1, 2, 4, 16, 32)  # updates per rollout
EARLY = 12  # steps in which the ladder is climbed: later the model is nearly deterministic
BINS = 5


def band(width, more=""):
    return f"grpo eps_low={width:g} eps_high={width:g}{more}"


WIDE = band(0.45)  # clips about as often as ACPO and is as wide as KL3
MATCHED = {  # fixed bands: what clips as often, or is as wide on average, on the tuning seeds
    "chainsum": {"acpo": {"same clip rate": band(0.458, " dual_clip=3"),
                          "same width": band(0.234, " dual_clip=3")},
                 "etr": {"same clip rate": band(0.368), "same width": band(0.282)},
                 "kl3": {"same clip rate": band(0.4), "same width": WIDE}},
    "countdown": {"acpo": {"same clip rate": band(0.707, " dual_clip=3"),
                           "same width": band(0.277, " dual_clip=3")},
                  "etr": {"same clip rate": band(0.349)},
                  "kl3": {"same clip rate": band(0.402)}}}


def grid(specs, updates=(16,), lrs=None, seeds=range(5),
         task="chainsum", flags="", measure=""):
    """Every combination; None: the learning rate that is common to all."""
    same = {"task": task, "flags": f"{TASKS[task]} {flags}".strip(), "measure": measure}
    combinations = product(seeds, updates, lrs or (COMMON[task],), specs)
    return [{**same, "loss": loss, "updates": k, "lr": lr, "seed": seed}
            for seed, k, lr, loss in combinations]


def named(name, task, lines) -> list[dict]:
    """The runs of a named grid. `main` follows from the lines of `lr`."""
    seeds = SEEDS[task]
    if name == "quick":
        specs = ("grpo", "acpo", "cispo", WIDE)
        return grid(specs, (2, 16), seeds=range(2), task=task)
    if name == "lr":
        return [run for updates, lrs in LRS[task].items()
                for run in grid(TABLE, (updates,), lrs, TUNING, task)]
    if name == "main":  # each at the learning rate that suits it
        runs = []
        for updates, spec in product(LRS[task], TABLE):
            lr = tuned(lines, spec, updates, task)
            runs += grid((spec,), (updates,), (lr,), seeds, task)
        return runs
    if name == "common":  # all at one
        specs = (*TABLE, "unclipped", GSPO_WIDE, *WINNERS)
        return grid(specs, seeds=seeds, task=task)
    if name == "controls":
        specs = {spec for bands in MATCHED[task].values() for spec in bands.values()}
        return grid((*MATCHED[task], *sorted(specs)), seeds=seeds, task=task)
    if name == "hot":  # a learning rate that is too high: who holds out?
        specs = (*TABLE, *WINNERS, WIDE, "unclipped")
        return grid(specs, lrs=(LRS[task][16][2],), task=task)
    if name == "acpo":
        return grid(("grpo", "acpo"), LADDER, task=task)
    if name == "ladder":
        return grid(("grpo",), (4,), task=task, measure="ladder")
    if name == "cells":
        return grid(("grpo",), (2,), seeds=seeds, task=task, measure="cells")
    runs = []  # wapo
    for loss, flags in WAPO_BUT.values():
        runs += grid((loss,), lrs=(3e-4, 1e-3), seeds=seeds, task=task, flags=flags)
    return runs


GRIDS = "quick lr main common controls hot acpo ladder cells wapo".split()


def tuned(lines, spec, updates, task) -> float:
    """The learning rate with the largest mean area under the reward curve on the tuning seeds."""
    areas = {}
    for lr in LRS[task][updates]:
        some = pick(lines, task=task, loss=spec, updates=updates, lr=lr, flags=TASKS[task])
        some = [line for line in some if line["seed"] in TUNING]
        if not some:
            raise ValueError(f"{task}, {spec}, {updates} updates: no lines of the tuning seeds at "
                             f"lr {lr:g}; first --grid lr --task {task}")
        areas[lr] = sum(line["auc"] for line in some)
    return max(areas, key=areas.get)


def pick(lines, **want):
    return [line for line in lines if all(line[key] == value for key, value in want.items())]


# ---- Objectives for these experiments alone ----------------------------------------------------

@losses.objective("seq-mean-token-mean")
def unclipped(b):
    """No trust region at all: -ratio A."""
    return -b.ratio * b.A


@losses.objective("seq-mean-token-mean")
def cells(b, only="1111", eps=0.2):
    """GRPO on some of WAPO's cells, one digit each, 1: learn."""
    sum_p2 = 0 if b.sum_p2 is None else b.sum_p2  # train.py tries the flags without it
    for cell, bit in zip(cells_of(b.p, sum_p2, b.A), f"{int(only):04d}"):
        if bit == "0":
            b.A = b.A * ~cell
    return losses.clip(b, 1 - eps, 1 + eps)


def cells_of(p, sum_p2, A):
    """WAPO's taxonomy (2606.16154): winners' peaks and valleys, losers' peaks and valleys. A peak
    is likelier than what the model draws on average."""
    peak, won = p >= sum_p2, A >= 0
    return [won & peak, won & ~peak, ~won & peak, ~won & ~peak]


# ---- One run -----------------------------------------------------------------------------------

def one_run(run, commit) -> dict:
    """Train, in this process, and return the line. ValueError if a flag is wrong."""
    began = time.process_time()
    name, *hyper = run["loss"].split()
    argv = ["--loss", name, "--loss_args", *hyper, "--data", run["task"], "--lr", str(run["lr"]),
            "--updates", str(run["updates"]), "--seed", str(run["seed"]), "--eval_every", "100000",
            *WARM_START.split(), *run["flags"].split()]
    look = {"ladder": Ladder, "cells": Cells}.get(run["measure"], lambda: None)()
    instead = {"collect": looking(train.collect, look)} if look else {}
    start = ONE_START.get(run["task"], run["seed"])
    trained, failed = train_here(argv, start, **instead)
    history = trained.log.history
    reward = [m["reward"] for m in history]
    line = {**run, "commit": commit, "failed": failed,
            "cpu_seconds": round(time.process_time() - began, 1),
            "first": history[0]["eval"], "final": 0.0 if failed else history[-1]["eval"],
            "auc": sum(reward) / trained.flags.steps, "entropy_end": history[-1]["entropy"],
            "collapsed": bool(failed) or collapsed(reward),
            "curves": {key: [m[key] for m in history] for key in CURVES}}
    if look:
        line[run["measure"]] = look.found
    return line


def train_here(argv, start, **instead) -> tuple[train.Run, str | None]:
    """train.py in this process, unheard, from the warm start of seed `start`, with other functions
    `instead` of its own: the run, and why it ended early, if it did."""
    unheard = io.StringIO()
    with (tempfile.TemporaryDirectory() as out,
          redirect_stdout(unheard), redirect_stderr(unheard),
          patch.multiple(train, draw_curves=nothing, **instead)):
        flags = train.parse([*argv, "--out", f"{out}/run"])
        flags.model = str(train.small_model(dataclasses.replace(flags, seed=start)))
        run = train.set_up(flags)
        failed = None
        with run.scorer:
            try:
                train.train(run)
            except ValueError as e:  # the loss was not finite in three steps running
                failed = str(e)
        run.log.close()
        while train.LOCKS:
            train.LOCKS.pop().close()
    return run, failed


def nothing(*_):
    """In the place of draw_curves: a third of a run."""


def collapsed(reward) -> bool:
    """The mean reward of the last three steps is less than 0.8 of the best three in a row."""
    means = [sum(three) / 3 for three in zip(reward, reward[1:], reward[2:])]
    return bool(means) and means[-1] < 0.8 * max(means)


def looking(collect, look):
    """train.collect, with a look at the rollouts."""
    def collect_and_look(run):
        rollouts, sampled = collect(run)
        train.assign_advantages(rollouts, run.flags)
        look(run, rollouts)
        return rollouts, sampled
    return collect_and_look


# ---- A look inside: the ladder -----------------------------------------------------------------

class Ladder:
    """1 to 32 updates on the same rollout from the same weights and optimizer state, which are put
    back. Sums over tokens, by bins of the probability when sampled, which no update moves:
    {"4" (updates): {"tokens": [of each bin], ...}}."""

    def __init__(self):
        self.found = {}

    def __call__(self, run, rollouts):
        if run.step > EARLY:
            return
        weights = [p.detach().clone() for p in run.model.parameters()]
        state = copy.deepcopy(run.optimizer.state_dict())
        for updates in LADDER:
            flags = dataclasses.replace(run.flags, updates=updates)
            sums = self.found.setdefault(str(updates), {})
            climb(dataclasses.replace(run, flags=flags), rollouts, sums)
            with torch.no_grad():
                for p, before in zip(run.model.parameters(), weights):
                    p.copy_(before)
            run.optimizer.load_state_dict(copy.deepcopy(state))  # it keeps what it is given


def climb(run, rollouts, sums):
    """Update on `rollouts` and add to `sums`: the size of the gradient, |d loss / d logits|, at
    each update; how far the ratio is in the end."""
    policy_loss = losses.policy_loss

    def watched(name, logp, old_logp, adv, mask, **how):
        loss, metrics = policy_loss(name, logp, old_logp, adv, mask, **how)
        (grad,) = torch.autograd.grad(loss, logp, retain_graph=True)
        size = grad.abs() * logit_norm(logp.detach().exp(), how["sum_p2"])
        clipped = (grad == 0) & (adv[:, None] != 0)
        add(sums, old_logp.exp(), mask, clipped=clipped, kept=size)
        return loss, metrics
    before = stats(run, rollouts)
    with patch.object(losses, "policy_loss", watched):
        for i, minibatch in enumerate(train.minibatches(rollouts, run.flags)):
            train.update(run, minibatch, {}, train.Meter(), first=i == 0)
    moved = (stats(run, rollouts).logp - before.logp).clamp(-20, 20).expm1()
    add(sums, before.logp.exp(), before.mask, tokens=torch.ones_like(moved), moved=moved,
        moved_sq=moved**2)


@torch.no_grad()
def stats(run, rollouts):
    return train.token_stats(run.model, rollouts, run.flags)


def add(sums, p, mask, **values):
    """Adds to the lists in `sums`, by BINS bins of p, what `values` (B,T) hold inside the mask."""
    bins = losses.bin_of(p, BINS)[mask]
    for name, value in values.items():
        total = torch.tensor(sums.get(name, [0.0] * BINS), dtype=torch.double)
        sums[name] = total.index_add(0, bins, value[mask].double()).tolist()


# ---- A look inside: WAPO's cells ---------------------------------------------------------------

class Cells:
    """One plain gradient step on each cell alone, from the same weights, with the learning rate at
    which all tokens together move the weights by `norm`: how the mean entropy over the rollout's
    own contexts changes."""

    def __init__(self, steps=(1, 4, 8, 16), norm=0.02):
        self.steps, self.norm, self.found = steps, norm, []

    def __call__(self, run, rollouts):
        if run.step not in self.steps:
            return
        tokens = train.token_stats(run.model, rollouts, run.flags)
        A = train.per_rollout(rollouts, "advantage")[:, None] * tokens.mask
        found = cells_of(tokens.logp.exp(), tokens.sum_p2, A)
        parts = [cell & (A != 0) for cell in found]
        params = list(run.model.parameters())
        count = tokens.mask.sum()
        loss = -tokens.logp * A / count
        total, *grads = [torch.autograd.grad((loss * part).sum(), params, retain_graph=True)
                         for part in (tokens.mask, *parts)]
        size = math.sqrt(sum(g.square().sum() for g in total))
        rate = self.norm / size if size else 0.0
        changes = []
        for grad in grads:
            with torch.no_grad():
                torch._foreach_add_(params, grad, alpha=-rate)
                after = stats(run, rollouts)
                torch._foreach_add_(params, grad, alpha=rate)
            change = (after.entropy - tokens.entropy)[tokens.mask]
            changes.append(change.mean().item())
        reward = sum(r.score for r in rollouts) / len(rollouts)
        shares = [(part.sum() / count).item() for part in parts]
        self.found.append({"step": run.step, "reward": reward, "share": shares,
                           "measured": changes})


# ---- The sweep ---------------------------------------------------------------------------------

def key(run):
    return tuple(run[k] for k in KEY)


def load(path=RESULTS) -> list[dict]:
    """The lines of finished runs. A last line without its end (the machine died) is none."""
    return read_rows(path)


def sweep(runs, jobs, path):
    """Every run that has no line yet, `jobs` at a time. ValueError, at the end, if some failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {key(line) for line in load(path)}
    todo = list({key(run): run for run in runs if key(run) not in done}.values())
    commit, bad = git_commit(), []
    fork = multiprocessing.get_context("fork")  # torch is imported once, here
    with open(path, "a+b") as file, ProcessPoolExecutor(jobs, fork) as pool:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # the machine may have died in a line
        results = [pool.submit(one_run, run, commit) for run in todo]
        for result in tqdm(as_completed(results), total=len(todo), unit="run"):
            try:
                file.write(json.dumps(rounded(result.result())).encode() + b"\n")
                file.flush()
            except (ValueError, OSError, BrokenProcessPool) as e:
                bad.append(str(e))
    if bad:
        raise ValueError(f"{len(bad)} of {len(todo)} runs left no line; the last: {bad[-1]}")


def rounded(value):
    """Four digits are enough, and keep the file small."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def git_commit() -> str:
    """Of what is compared: the top-level files."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--", ":(top,glob)*.py"],
                             capture_output=True, text=True)
    return (head.stdout.strip() or "unknown") + ("-dirty" if changed.stdout.strip() else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"compare.py: {message}; --help lists every flag")
    parser.add_argument("--grid", choices=GRIDS, help="the runs of one question of FINDINGS.md")
    parser.add_argument("--losses", nargs="+", default=[], help='or: "name" "name parameter=value"')
    parser.add_argument("--updates", nargs="+", type=int, default=[16])
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--task", choices=TASKS, default="chainsum")
    parser.add_argument("--flags", default="", help="further flags of train.py, in one string")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--results", type=Path, help="default: experiments/results/compare.jsonl")
    args = parser.parse_args()
    if bool(args.grid) == bool(args.losses):
        parser.error("give either --grid or --losses")
    quick = args.grid == "quick"
    path = args.results or (Path("runs/quick/compare.jsonl") if quick else RESULTS)
    torch.set_num_threads(1)
    try:
        if args.grid:
            runs = named(args.grid, args.task, load(path))
        else:
            runs = grid(args.losses, args.updates, args.lrs, args.seeds, args.task,
                        flags=args.flags)
        sweep(runs, args.jobs, path)
    except ValueError as e:
        sys.exit(f"compare.py: {e}")


if __name__ == "__main__":
    main()
