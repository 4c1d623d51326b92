"""Objectives side by side: any grid of losses x updates x lr x seeds x tasks, and what each does to which tokens.

    python experiments/compare.py --quick --jobs 2            # a taste, in minutes, into runs/quick
    python experiments/compare.py --grid common --jobs 2      # one of the named grids below; `--grid all`: hours
    python experiments/compare.py --losses grpo "kl3 delta=0.05" --updates 2 16 --lrs 3e-4 --seeds 0 1 2 --flags "--steps 50"
    python experiments/plot.py                                # every figure and table, from the lines alone

One line of JSON per run is appended to experiments/results/compare.jsonl; a run whose line is there is not run again, so
that a sweep may be killed and repeated. train.py runs unchanged in a child process and is watched from outside: its
`policy_loss`, `ppo` and `learn` are wrapped. Every probability bin is one of the probability WHEN SAMPLED, which no
update moves, except those of ACPO's own band.
"""
import argparse
import copy
import dataclasses
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch._dynamo  # noqa: F401  torch and transformers import late: once here, not seconds in every child
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast  # noqa: F401

import experiments.curves
import losses
import train

RESULTS = Path(__file__).parent / "results/compare.jsonl"
KEY = ("task", "loss", "updates", "lr", "seed", "flags", "measure")
CURVES = ("reward", "entropy", "clip_low", "clip_high", "ratio_std", "approx_kl", "grad_norm", "length")
EARLY, BINS = 12, 5  # the mechanism is measured in the first steps: later the model is nearly deterministic
LADDER = (1, 2, 4, 16, 32)  # updates per rollout
CELLS = ("pos_peak", "pos_valley", "neg_peak", "neg_valley")


# ---- Objectives for these experiments alone --------------------------------------------------------------------------

@losses.objective("seq-mean-token-mean")
def unclipped(x):
    """No trust region at all: -rA."""
    return -x.r * x.A

@losses.objective("seq-mean-token-mean")
def trust(x, kind="ratio", delta=0.2):
    """One trust region, four constraints: the token keeps its gradient while |r - 1|, KL3 = r - 1 - log r, the KL of the two
    outcomes {this token, any other} or TV = |p - q| stays below delta, or while A pushes it back."""
    p, q = x.p.clamp(max=1 - 1e-6), x.q.clamp(max=1 - 1e-6)
    far = {"ratio": (x.r - 1).abs(), "kl3": x.r - 1 - x.d, "tv": (p - q).abs(),
           "kl": q * (q / p.clamp(min=1e-30)).log() + (1 - q) * ((1 - q) / (1 - p)).log()}[kind].detach() > delta
    low, high = far & (x.A < 0) & (x.r < 1), far & (x.A > 0) & (x.r > 1)
    x.metrics.update(clip_low=x.mean(low), clip_high=x.mean(high))
    return -x.r * x.A * ~(low | high)

def cells_of(p, sum_p2, A):  # WAPO's taxonomy (2606.16154): is the token likelier than two draws agree, has it won
    peak, won = p >= sum_p2, A >= 0
    return [won & peak, won & ~peak, ~won & peak, ~won & ~peak]

@losses.objective("seq-mean-token-mean")
def cells(x, only="1111", eps=0.2):
    """GRPO on some cells alone: one digit each for winners' peaks and valleys, losers' peaks and valleys; 1: learn."""
    bits = f"{only:04d}" if isinstance(only, int) else only
    some = cells_of(x.p, torch.zeros_like(x.p) if x.sum_p2 is None else x.sum_p2, x.A)
    x.A = x.A * sum(c for c, bit in zip(some, bits) if bit == "1")
    return losses.ppo(x, 1 - eps, 1 + eps)


# ---- What is measured ------------------------------------------------------------------------------------------------

def in_bins(q, mask, *values):
    """(1 + len(values), BINS) sums over the tokens of each bin of q, the first their number."""
    rows = torch.stack([torch.ones_like(q), *values]).double() * mask
    return rows.new_zeros(len(rows), BINS).scatter_add_(
        1, losses.bins_of(q, BINS).flatten().expand(len(rows), -1), rows.flatten(1))


def gradient_bins(grad, full, q, p, sum_p2, mask):
    """Sums per bin: tokens, clipped ones, |d loss/d logits| of all if none were clipped, the same as it is.

    grad, full (B,T): d loss/d logp, and that of -rA under the same aggregation. Their L2 norm over the logits is
    |grad| |d logp/d z| with |d logp/d z|^2 = (1-p)^2 + sum_p2 - p^2."""
    norm = ((1 - p) ** 2 + (sum_p2 - p**2).clamp(min=0)).sqrt()
    return in_bins(q, mask, ((grad == 0) & (full != 0)).float(), full.abs() * norm, grad.abs() * norm)


def spread_bins(q, d, sum_p2, mask):
    """Sums per bin: tokens, r - 1, (r-1)^2, log r, (log r)^2, (1-q)^2 + sum_{j != k} q_j^2: first order says the fourth over
    the first is proportional to the fifth."""
    r = d.clamp(-20, 20).expm1()
    return in_bins(q, mask, r, r**2, d, d**2, (1 - q) ** 2 + (sum_p2 - q**2).clamp(min=0))


def watch(seen, run):
    """Wrap train.py's functions, in this process for good, so that `seen` collects: per-bin sums of the first EARLY steps,
    the mean band width (objectives that clip by `ppo`), and what run["measure"] asks for."""
    loss_of, ppo, learn, new_model = losses.policy_loss, losses.ppo, train.learn, train.new_model
    parent = os.getppid()

    def watched_ppo(x, low, high, dual_clip=None, r=None):
        width = torch.as_tensor(high - low).expand_as(x.mask) / 2
        seen["width"] += (width * x.mask).sum().item()
        seen["width_tokens"] += x.mask.sum().item()
        return ppo(x, low, high, dual_clip, r)

    def watched_loss(name, logp, old, A, mask, **kw):
        loss, metrics = loss_of(name, logp, old, A, mask, **kw)
        if 1 <= seen["step"] <= EARLY and logp.requires_grad:  # step 0: train.py tries the flags
            leaf = logp.detach().requires_grad_()
            plain = {k: kw.get(k) for k in ("group_size", "max_len", "totals")}
            full, _ = loss_of("unclipped", leaf, old, A, mask, agg=kw.get("agg") or losses.OBJECTIVES[name].agg, **plain)
            grads = torch.autograd.grad(loss, logp, retain_graph=True)[0], torch.autograd.grad(full, leaf)[0]
            seen["gradient"] += gradient_bins(*grads, old.exp(), leaf.detach().exp(), kw["sum_p2"], mask)
        return loss, metrics

    def watched_learn(model, reference, optimizer, rows, cfg):
        if os.getppid() != parent:
            os._exit(1)  # the sweep was killed
        seen["step"] += 1
        if run["measure"] == "cells" and seen["step"] in (1, 4, 8, 16):
            seen["cells"].append({"step": seen["step"], **cell_entropies(model, rows, cfg)})
        early = seen["step"] <= EARLY
        if run["measure"] == "ladder" and early:
            ladder(seen, model, optimizer, rows, cfg, watched)
        return watched(model, reference, optimizer, rows, cfg, early)

    def watched(model, reference, optimizer, rows, cfg, early=True):
        with torch.no_grad():
            before = train.token_stats(model, rows, cfg) if early else None
        out = learn(model, reference, optimizer, rows, cfg)
        if early:
            with torch.no_grad():
                after = train.token_stats(model, rows, cfg)
            seen["spread"] += spread_bins(before[2].exp(), after[2] - before[2], before[4], before[0])
        return out

    losses.policy_loss, losses.ppo, train.learn = watched_loss, watched_ppo, watched_learn
    train.new_model = lambda cfg, *a, **kw: new_model(dataclasses.replace(cfg, seed=SHARED.get(cfg.data, cfg.seed)), *a, **kw)
    train.save, experiments.curves.draw = lambda *a: lambda: None, lambda *a: None  # no checkpoints, no pictures


def ladder(seen, model, optimizer, rows, cfg, learn):
    """The per-bin sums of 1 to 32 updates on one and the same rollout, from the same weights and optimizer state, which are
    put back: with GRPO's band and with ACPO's."""
    weights, state, sums = [p.detach().clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict()), seen.copy()
    for loss, k in ((loss, k) for loss in ("grpo", "acpo") for k in LADDER):
        zeros = {"gradient": torch.zeros(4, BINS), "spread": torch.zeros(6, BINS), "band": [0.0] * BINS}
        got = seen["ladder"].setdefault(f"{loss} {k}", zeros)
        seen.update(gradient=got["gradient"], spread=got["spread"])
        out = learn(model, None, optimizer, rows, dataclasses.replace(cfg, loss=loss, updates=k))
        got |= {"gradient": seen["gradient"], "spread": seen["spread"],
                "band": [v + out.get(f"eps_bin{b}", 0.2) / EARLY for b, v in enumerate(got["band"])]}
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights):
                p.copy_(w)
        optimizer.load_state_dict(copy.deepcopy(state))  # it keeps the tensors that it is given
    seen.update(gradient=sums["gradient"], spread=sums["spread"], width=sums["width"], width_tokens=sums["width_tokens"])


def entropy_slope(logits, token, A):
    """First-order change of the entropy of softmax(logits) when a step on A log p(token) moves the logits by A (e - p)."""
    logp = logits.log_softmax(-1)
    p, H = logp.exp(), -(logp.exp() * logp).sum(-1)
    pa, la = p.gather(-1, token[..., None])[..., 0], logp.gather(-1, token[..., None])[..., 0]
    return -A * (pa * (la + H) - (p**2 * (logp + H[..., None])).sum(-1))


def cell_entropies(model, rows, cfg, norm=0.02):
    """One plain gradient step on each cell alone, from the same weights, all with the learning rate that moves the weights
    by `norm` when every token learns: the cells' shares of tokens, the change of the mean entropy over the rollout's
    own contexts (measured), and the sum of entropy_slope (predicted for free logits, up to one constant)."""
    reward = torch.tensor([r.score for r in rows])
    A = losses.advantages(reward, cfg.samples)[:, None]
    mask, old, logp, entropy, sum_p2 = train.token_stats(model, rows, cfg)
    A = A.expand_as(logp) * mask
    n, params = mask.sum(), [p for p in model.parameters() if p.requires_grad]
    some = [c & mask & (A != 0) for c in cells_of(logp.detach().exp(), sum_p2, A)] + [mask]
    grads = [torch.autograd.grad(-(logp * A * c).sum() / n, params, retain_graph=True) for c in some]
    rate = norm / math.sqrt(sum(g.square().sum() for g in grads[-1])) if A.any() else 0.0

    longest = max(len(r.tokens) for r in rows)
    with torch.no_grad():
        ids = torch.tensor([r.tokens + [0] * (2 * longest - len(r.tokens)) for r in rows])
        logits = model(ids[:, :longest]).float()
        place = torch.tensor([r.prompt_len for r in rows])[:, None] + torch.arange(mask.shape[1])
        token = ids.gather(1, place)
        place = (place - 1).clamp(max=longest - 1)[..., None].expand(-1, -1, logits.shape[-1])
        slope = entropy_slope(logits.gather(1, place), token, A)
        out = defaultdict(list)
        for c, grad in zip(some, grads):
            for p, g in zip(params, grad):
                p.sub_(g, alpha=rate)
            now = train.token_stats(model, rows, cfg)[3]
            for p, g in zip(params, grad):
                p.add_(g, alpha=rate)
            out["share"].append((c.sum() / n).item())
            out["measured"].append(((now - entropy)[mask].mean()).item())
            out["predicted"].append(((slope * c).sum() / n).item())
    return {k: [short(v) for v in vs] for k, vs in out.items()} | {"reward": short(reward.mean().item())}


# ---- One run ---------------------------------------------------------------------------------------------------------

def short(x, digits=4):
    return None if x is None else float(f"{x:.{digits}g}")


def collapsed(reward) -> bool:
    """The mean reward of the last three steps is less than 0.8 of the best three in a row."""
    means = [sum(reward[i:i + 3]) / 3 for i in range(len(reward) - 2)] or [0.0]
    return means[-1] < 0.8 * max(means)


def command(run, out):
    name, *args = run["loss"].split()
    return ["compare.py", "--loss", name, *(["--loss_args", *args] if args else []), "--data", run["task"], "--updates",
            str(run["updates"]), "--lr", str(run["lr"]), "--seed", str(run["seed"]), *run["flags"].split(), "--eval_every", "100000",
            "--out", str(out)]


def one_run(run, commit, results, errors):
    """In a process of its own: train, measure, append the line. A run that breaks off before its end leaves none."""
    parent, began = os.getppid(), time.time()
    seen = defaultdict(float, gradient=torch.zeros(4, BINS), spread=torch.zeros(6, BINS), cells=[], ladder={})
    with tempfile.TemporaryDirectory() as tmp, open(errors, "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.argv = command(run, Path(tmp) / "run")
        watch(seen, run)
        failed = None
        try:
            train.main()
        except SystemExit as e:  # train.py's one line
            failed = str(e.code)
        path = Path(tmp) / "run/metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        steps = json.loads((Path(tmp) / "run/config.json").read_text())["steps"] if lines else 0
    if not lines or (len(lines) < steps and "not finite" not in (failed or "")):
        sys.exit(failed or "interrupted")
    reward, rows = [m["reward"] for m in lines], lambda t: [[short(v) for v in row] for row in t.tolist()]
    line = {**run, "commit": commit, "cpu_seconds": round(time.process_time(), 1), "wall_seconds": round(time.time() - began, 1),
            "failed": failed, "first": short(lines[0]["eval"]), "final": 0.0 if failed else short(lines[-1]["eval"]),
            "auc": short(sum(reward) / steps), "entropy_end": short(lines[-1]["entropy"]),
            "collapsed": bool(failed) or collapsed(reward), "width": short(seen["width"] / max(1, seen["width_tokens"])),
            "gradient": rows(seen["gradient"]), "spread": rows(seen["spread"]), "cells": seen["cells"],
            "ladder": {k: {"gradient": rows(v["gradient"]), "spread": rows(v["spread"]), "band": [short(b) for b in v["band"]]}
                       for k, v in seen["ladder"].items()},
            "band": "eps_bin0" in lines[0] and [short(sum(m[f"eps_bin{b}"] for m in lines[:EARLY]) / EARLY) for b in range(BINS)],
            **{c: short(sum(m[c] for m in lines) / len(lines)) for c in CELLS},
            "curves": {k: [short(m[k], 3) for m in lines] for k in CURVES}}
    if os.getppid() == parent:  # else the sweep was killed, and another may be at work
        append(line, results)


def append(line, results):
    data = (json.dumps(line, separators=(",", ":")) + "\n").encode()
    fd = os.open(results, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, data)  # one write: whole or absent
    os.close(fd)


def key(run):
    return tuple(run[k] for k in KEY)


def load(results=RESULTS):
    """The lines of finished runs, one per configuration; a broken last line (the machine died) is no line."""
    text = Path(results).read_text() if Path(results).is_file() else ""
    lines = [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]
    return list({key(line): line for line in reversed(lines)}.values())[::-1]


# ---- The grids -------------------------------------------------------------------------------------------------------

TASKS = {"chainsum": "--prompts 32 --samples 8 --steps 24",
         "countdown": "--prompts 32 --samples 8 --steps 40 --skill_steps 3000 --habit_steps 0"}
SHARED = {"countdown": 100}  # all seeds start from the warm start of this one: it costs ten times a run
TABLE = ["grpo", "dapo", "cispo", "gspo", "acpo", "kl3", "etr", "wapo", "sapo", "gppo"]
# raft, and GRPO on winners alone, without losers' valleys, on losers alone
WINNERS = ["raft", "cells only=1100", "cells only=1110", "cells only=0011"]
WITHOUT = {"losers learn too": ("unclipped", "--agg winning-groups --advantage mean"), "clipped at 1.2": ("wapo eps=0.2", ""),
           "divided by the std": ("wapo", "--advantage grpo"), "mean per response": ("wapo", "--agg seq-mean-token-mean")}
EXTRA = ["unclipped", "gspo eps_low=0.03 eps_high=0.04"]  # GSPO's constants are for responses of thousands of tokens
WIDE = "grpo eps_low=0.45 eps_high=0.45"  # clips about as often as ACPO and is as wide as KL3
LRS = {"chainsum": {2: (3e-4, 1e-3, 3e-3), 16: (1e-4, 3e-4, 1e-3, 3e-3)},  # by updates per rollout
       "countdown": {2: (1e-4, 3e-4, 1e-3), 16: (3e-5, 1e-4, 3e-4)}}
COMMON = {"chainsum": 3e-4, "countdown": 1e-4}  # the learning rate of controls: all alike, 16 updates
SEEDS, TUNING = range(8), (100, 101)  # no tuning seed is in a table
WIDTHS = (0.1, 0.2, 0.3, 0.45, 0.7, 1.0)
DELTAS = {"kl3": (0.01, 0.02, 0.04, 0.1), "kl": (0.0005, 0.002, 0.008, 0.03), "tv": (0.01, 0.03, 0.06, 0.12)}


def grid(specs, updates=(16,), lrs=(3e-4,), seeds=range(5), task="chainsum", flags="", measure=""):
    flags = f"{TASKS[task]} {flags}".strip()
    return [dict(task=task, loss=loss, updates=k, lr=lr, seed=s, flags=flags, measure=measure)
            for s in seeds for k in updates for lr in lrs for loss in specs]


def mean(lines, what):
    """Mean over lines of a field, or of a whole run's clip rate ("clip") or KL of new and old policy ("kl")."""
    def value(line):
        c = line["curves"]
        total = {"clip": ("clip_low", "clip_high"), "kl": ("approx_kl",)}.get(what)
        return sum(sum(c[k]) for k in total) / len(c["reward"]) if total else line[what]
    return sum(map(value, lines)) / len(lines)


def match(scan, what, target):
    """The parameter at which `what` comes nearest to target, between the points of scan {parameter: lines}, straight in
    log-log; points without any `what` do not count."""
    points = sorted((math.log(mean(lines, what)), math.log(x)) for x, lines in scan.items() if mean(lines, what) > 0)
    y = math.log(max(target, 1e-12))
    y = min(max(y, points[0][0]), points[-1][0])
    (y0, x0), (y1, x1) = next((a, b) for a, b in zip(points, points[1:]) if a[0] <= y <= b[0])
    return short(math.exp(x0 + (x1 - x0) * (y - y0) / (y1 - y0)), 3)


def pick(lines, **want):
    return [line for line in lines if all(line[k] == v for k, v in want.items())]


def tuning(lines, spec, updates, lr, task="chainsum"):
    """The lines of `spec` on the tuning seeds, or the one line that says which grid is missing."""
    some = [x for x in pick(lines, task=task, loss=spec, updates=updates, lr=lr, flags=TASKS[task]) if x["seed"] in TUNING]
    if len(some) < len(TUNING):
        first = "--grid lr, --grid scan" if task == "chainsum" else "--grid second_lr, --grid second_scan"
        sys.exit(f"compare.py: {task}, {spec} at {updates} updates and lr {lr:g} lacks tuning seeds: first {first}")
    return some


def tuned(lines, spec, updates, task="chainsum"):
    """The learning rate with the largest mean area under the reward curve on the tuning seeds."""
    return max(LRS[task][updates], key=lambda lr: mean(tuning(lines, spec, updates, lr, task), "auc"))


def matched(lines, task="chainsum"):
    """{name: spec} of the controls: fixed bands that clip as often, are as wide, or move as far (KL) as an adaptive or
    asymmetric one, and (chainsum) the four constraints at the clip rate of GRPO; all from the tuning seeds."""
    at = lambda spec: tuning(lines, spec, 16, COMMON[task], task)
    fixed = {w: at(f"grpo eps_low={w:g} eps_high={w:g}") for w in WIDTHS}
    band = lambda w, dual="": f"grpo eps_low={w:g} eps_high={w:g}{dual}"
    out = {}
    for name in ("acpo", "etr", "kl3"):
        dual = " dual_clip=3" if name == "acpo" else ""
        out[f"{name}: same clip rate"] = band(match(fixed, "clip", mean(at(name), "clip")), dual)
        out[f"{name}: same width"] = band(short(mean(at(name), "width"), 3), dual)
    out["kl3: same KL"] = band(match(fixed, "kl", mean(at("kl3"), "kl")))
    goal = mean(at(band(0.2)), "clip")
    for kind, deltas in DELTAS.items() if task == "chainsum" else ():
        scan = {d: at(f"trust kind={kind} delta={d:g}") for d in deltas}
        out[f"constraint: {kind}"] = f"trust kind={kind} delta={match(scan, 'clip', goal):g}"
    return out


def named(name, lines):
    """The runs of a named grid, second_* on the second task. Those of main, controls, second, second_controls follow from
    the tuning seeds' lines."""
    task = "countdown" if name.startswith("second") else "chainsum"
    if name == "quick":
        return grid(["grpo", "acpo", "cispo", WIDE], (2, 16), seeds=range(2))
    if name == "common":  # one learning rate for all
        return grid(TABLE + EXTRA + WINNERS, seeds=SEEDS)
    if name in ("lr", "second_lr"):
        return [r for k, lrs in LRS[task].items() for r in grid(TABLE, (k,), lrs, TUNING, task)]
    if name in ("scan", "second_scan"):
        constraints = [f"trust kind={k} delta={d:g}" for k, ds in DELTAS.items() for d in ds] if name == "scan" else []
        return grid([f"grpo eps_low={w:g} eps_high={w:g}" for w in WIDTHS] + constraints, lrs=(COMMON[task],), seeds=TUNING, task=task)
    if name in ("main", "second"):  # each at its own
        return [r for s in (SEEDS if name == "main" else range(5)) for k in (2, 16) for spec in TABLE
                for r in grid([spec], (k,), (tuned(lines, spec, k, task),), [s], task)]
    if name in ("controls", "second_controls"):
        return grid([*TABLE, *matched(lines, task).values()] if name != "controls" else list(matched(lines).values()),
                    lrs=(COMMON[task],), seeds=SEEDS if name == "controls" else range(5), task=task)
    if name == "acpo":
        return grid(["grpo", "acpo"], LADDER)
    if name == "ladder":
        return grid(["grpo"], (4,), measure="ladder")
    if name == "second_ladder":
        return grid(["grpo"], (4,), (COMMON[task],), range(3), task=task, measure="ladder")
    if name == "hot":  # a learning rate that is too high for 16 updates: who holds out?
        return grid(["grpo", "dapo", "cispo", "acpo", "kl3", "wapo", "gppo", *WINNERS[1:3], WIDE, "unclipped"], lrs=(1e-3,))
    if name == "second_hot":  # too high for 16 updates there
        return grid(["grpo", "acpo", "kl3", "wapo", "cispo", WINNERS[1]], task=task)
    if name == "wapo":  # which of its changes helps: each taken back alone; the first brings the losers back
        return [r for lr, seeds in ((3e-4, SEEDS), (1e-3, range(5))) for loss, flags in WITHOUT.values()
                for r in grid([loss], lrs=(lr,), seeds=seeds, flags=flags)]
    if name == "cells":
        return grid(["grpo"], (2,), seeds=SEEDS, measure="cells")
    raise KeyError(name)


NAMED = ("quick", "common", "lr", "scan", "main", "controls", "acpo", "ladder", "cells", "hot", "wapo", "second_lr", "second_scan",
         "second", "second_controls", "second_hot", "second_ladder")


# ---- The sweep -------------------------------------------------------------------------------------------------------

def git_commit():
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True).stdout.strip()
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":(top,glob)*.py")  # what is compared, not this file
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if dirty else "")


def start(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)  # torch is imported once, here
    process.start()
    return process


def warm(run, errors):
    """One step for nothing, so that the warm start of this task and seed lies in the cache."""
    one_run({**run, "flags": f"{run['flags']} --steps 1 --prompts 1 --samples 1 --eval_problems 1", "updates": 1, "loss": "grpo"},
            "", os.devnull, errors)


def sweep(runs, jobs, results):
    """Every run without a line yet, `jobs` at a time; the failures are named at the end."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if results.is_file() and not results.read_bytes().endswith(b"\n"):  # the machine died while it wrote
        data = results.read_bytes()
        os.truncate(results, data.rfind(b"\n") + 1)
    have = {key(line) for line in load(results)}
    todo = list({key(r): r for r in runs if key(r) not in have}.values())
    recipe = lambda r: (r["task"], SHARED.get(r["task"], r["seed"]), *(f for f in r["flags"].split("--") if "_steps" in f))
    starts = {recipe(r): r for r in todo}
    commit, bad = git_commit(), []
    with tempfile.TemporaryDirectory() as tmp:
        for work, what in ((starts.values(), "warm starts"), (todo, "runs")):
            queue, running = list(work)[::-1], {}
            with tqdm(total=len(queue), desc=what, unit="run", smoothing=0.05) as bar:
                while queue or running:
                    while queue and len(running) < jobs:
                        run, log = queue.pop(), Path(tmp) / str(time.time_ns())
                        args = (run, log) if what == "warm starts" else (run, commit, results, log)
                        running[start(warm if what == "warm starts" else one_run, *args)] = run, log
                        bar.set_postfix_str(f"{run['task']} {run['loss']} K={run['updates']} lr {run['lr']:g} seed {run['seed']}")
                    multiprocessing.connection.wait([p.sentinel for p in running])
                    for p in [p for p in running if not p.is_alive()]:
                        run, log = running.pop(p)
                        bar.update()
                        if p.exitcode:
                            bad.append(f"{run['loss']}: {(log.read_text().strip().splitlines() or ['killed'])[-1]}")
    if bad:
        sys.exit(f"compare.py: {len(bad)} of {len(todo)} runs left no line; the last: {bad[-1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"compare.py: {message}; --help lists every flag")
    parser.add_argument("--grid", choices=NAMED, help="a named grid: the runs of one question")
    parser.add_argument("--quick", action="store_true", help="the same as --grid quick")
    parser.add_argument("--losses", nargs="+", default=[], help='a grid of your own: "name" or "name parameter=value"')
    parser.add_argument("--updates", nargs="+", type=int, default=[16])
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["chainsum"])
    parser.add_argument("--flags", default="", help="further flags of train.py, in one string")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--results", type=Path, help="the lines (default: experiments/results/compare.jsonl, quick: runs/quick)")
    args = parser.parse_args()
    name = "quick" if args.quick else args.grid
    args.results = args.results or (Path("runs/quick/compare.jsonl") if name == "quick" else RESULTS)
    if bool(name) == bool(args.losses):
        parser.error("give either --grid (or --quick) or --losses")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    for spec in args.losses:
        if spec.split()[:1] == [] or spec.split()[0] not in losses.OBJECTIVES:
            parser.error(f"--losses: there is no objective {spec!r}")
    torch.set_num_threads(1)
    runs = named(name, load(args.results)) if name else [
        r for task in args.tasks for r in grid(args.losses, args.updates, args.lrs, args.seeds, task, args.flags)]
    sweep(runs, args.jobs, args.results.resolve())


if __name__ == "__main__":
    main()
