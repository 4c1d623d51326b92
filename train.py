"""The loop, top to bottom: rollout -> reward -> advantage -> K updates -> log, save, eval.

    python train.py                                                                   # a laptop: minutes, no GPU, no network
    torchrun --nproc_per_node=8 train.py --loss acpo --model Qwen/Qwen2.5-7B --data orz57k --template orz \\
        --prompts 128 --samples 10 --updates 2 --max_new_tokens 3072 --lr 1e-6 --tokens_per_microbatch 16384
    python train.py --out runs/mine --resume --steps 300                              # go on where it stopped

Without --model a small Qwen2 is built for a procedural task and warm-started on demonstrations, so that the reward has
something to select from. Every rank holds all rollouts of a step (token ids are small) and computes the same plan of
mini-batches and micro-batches from them, so no rank ever waits for a decision of another.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import losses
from model import Model, attention_kernel, replace_directory
from rewards import Scorer
from rollout import generate


def flag(default, text):
    kw = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": text}, **kw)


@dataclass
class Config:
    """RLVR with any clipping objective. Defaults: the laptop run, one to two minutes on 2 CPU cores."""
    loss: str = flag("acpo", "objective, by its name in losses.py")
    loss_args: list[str] = flag([], "its hyper-parameters, as alpha=2 eps=0.1")
    advantage: str = flag("", "grpo, mean, rloo, maxrl, gpg, reinforce_pp, reward, signed (default: the objective's own)")
    agg: str = flag("", "token-mean, seq-mean-token-mean, seq-mean-token-sum[-norm] (default: the objective's own)")
    acpo_stats: str = flag("batch", "ACPO's ratio statistics: over the whole mini-batch and all ranks, or micro (official code)")

    model: str = flag("", "checkpoint directory or hub id (default: a new small model, warm-started on demonstrations)")
    data: str = flag("chainsum", "training problems: a procedural task, a hub dataset or a .jsonl/.json/.csv/.parquet file")
    eval_data: str = flag("", "held-out problems (default: the test split of --data)")
    template: str = flag("none", "prompt template: none, orz, r1, tinyzero, qwen_math, chat")

    steps: int = flag(100, "rollouts; each is followed by --updates gradient steps")
    prompts: int = flag(32, "prompts per step")
    samples: int = flag(16, "responses per prompt: the group")
    updates: int = flag(4, "gradient steps per rollout: mini-batches of whole groups, each used once")
    epochs: int = flag(1, "passes over each rollout")
    max_prompt_tokens: int = flag(1024, "a longer prompt is an error")
    max_new_tokens: int = flag(0, "longest response (default: 1024 with --model, else twice the longest demonstration)")
    temperature: float = flag(1.0, "of sampling, and of the log-probs that are trained")

    lr: float = flag(3e-4, "learning rate; 1e-6 is usual for 3B to 7B")
    warmup: int = flag(0, "steps of linear warm-up; then the rate is constant, whatever --steps is")
    weight_decay: float = flag(0.01, "of matrices; norms and biases have none")
    clip_norm: float = flag(1.0, "largest gradient norm")
    kl_beta: float = flag(0.0, "weight of a k3 KL penalty to the initial model")
    tokens_per_microbatch: int = flag(16384, "packed tokens per forward pass: lower it when memory runs out")
    recompute: bool = flag(False, "activation checkpointing: far less memory, a third more compute")

    width: int = flag(64, "hidden size of the new small model")
    layers: int = flag(2, "layers of the new small model")
    skill_steps: int = flag(500, "warm start: steps on demonstrations that work things out (0: no warm start at all)")
    habit_steps: int = flag(100, "warm start: steps on demonstrations that mostly guess")

    seed: int = flag(0, "of data order, sampling and the new model")
    out: str = flag("", "run directory (default: runs/default, or the next free runs/default-N)")
    resume: bool = flag(False, "continue the run in --out from its last checkpoint, bit for bit")
    eval_every: int = flag(10, "steps between held-out evaluations")
    eval_problems: int = flag(512, "held-out problems, one sampled response each")
    save_every: int = flag(50, "steps between checkpoints; the last step is always saved")
    keep: int = flag(2, "newest checkpoints kept")
    threads: int = flag(1, "CPU threads: more than the free cores is many times slower than one")


# ---- Setting up --------------------------------------------------------------------------------------------------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
MAIN = RANK == 0
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
METRICS = """step reward eval length entropy clip_low clip_high ratio_mean ratio_std approx_kl grad_norm zero_groups truncated
no_answer unparsable timeout error skipped pos_peak pos_valley neg_peak neg_valley sampler_kl sampler_max rollout_tps
update_tps seconds""".split()


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it stands, and every flag's default."""


def parse() -> Config:
    from transformers import HfArgumentParser
    parser = HfArgumentParser(Config, description=__doc__, allow_abbrev=False, formatter_class=Help)
    parser.error = lambda message: sys.exit(f"train.py: {message}; --help lists every flag")
    known = parser.parse_known_args()[0]
    if known.resume:  # the run's own flags are the defaults; what is typed now goes before
        runs = sorted(Path("runs").glob("default*/config.json"), key=lambda p: p.stat().st_mtime)
        out = Path(known.out or (runs[-1].parent if runs else "runs/default"))
        if not (out / "config.json").is_file():
            raise ValueError(f"--resume: {out / 'config.json'} does not exist: there is no run to continue in {out}")
        saved = json.loads((out / "config.json").read_text()) | {"out": str(out)}
        parser.set_defaults(**{k: v for k, v in saved.items() if k in Config.__dataclass_fields__})
    cfg, rest = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    for name in ("model", "data", "width", "layers", "seed") if known.resume else ():
        if getattr(cfg, name) != saved.get(name, getattr(cfg, name)):
            raise ValueError(f"--resume: --{name} was {saved[name]!r} in this run and cannot become {getattr(cfg, name)!r}")
    if rest:
        names = ["--" + f for f in Config.__dataclass_fields__]
        raise ValueError(data.nearest("--" + rest[0].split("=")[0].lstrip("-").replace("-", "_"), names, "flag"))
    for name in ("steps", "prompts", "samples", "updates", "epochs", "tokens_per_microbatch", "eval_every", "eval_problems",
                 "save_every", "keep", "threads", "max_prompt_tokens", "width", "layers"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name} {getattr(cfg, name)}: must be at least 1")
    if cfg.lr <= 0 or cfg.temperature <= 0:
        raise ValueError(f"--lr {cfg.lr} and --temperature {cfg.temperature} must be above 0")
    if cfg.updates > cfg.prompts * cfg.samples:
        raise ValueError(f"--updates {cfg.updates}: more mini-batches than the {cfg.prompts} x {cfg.samples} responses of a step")
    if cfg.acpo_stats not in ("batch", "micro"):
        raise ValueError(f"--acpo_stats {cfg.acpo_stats}: batch or micro")
    probe = torch.zeros(1, 1, requires_grad=True)  # let losses.py itself say what is wrong with a name
    try:
        losses.policy_loss(cfg.loss, probe, torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1), agg=cfg.agg or None,
                           entropy=torch.zeros(1, 1), **hyperparameters(cfg))
    except (TypeError, RuntimeError, IndexError) as e:
        raise ValueError(f"--loss_args {' '.join(cfg.loss_args)}: {cfg.loss} cannot use that ({str(e).splitlines()[0]})") from None
    losses.advantages(torch.zeros(1), 1, cfg.advantage or "grpo", torch.ones(1))
    if not cfg.max_new_tokens:
        demos = data.demos(cfg.data, 256, "skill") + data.demos(cfg.data, 256, "habit") if cfg.data in data.TASKS else []
        cfg.max_new_tokens = 1024 if cfg.model or not demos else 2 * max(len(r) for _, r in demos)
    return cfg


def hyperparameters(cfg) -> dict:
    """--loss_args alpha=2 eps=0.1 to {"alpha": 2, "eps": 0.1}."""
    out = {}
    for arg in cfg.loss_args:
        name, eq, value = arg.partition("=")
        if not eq:
            raise ValueError(f"--loss_args {arg}: write name=value")
        try:
            out[name] = None if value == "None" else int(value) if value.isdigit() else float(value)
        except ValueError:
            out[name] = value
    return out


def open_run(cfg) -> Path:
    """The run directory: new (or to be resumed) and writable, or the line that says why not. Nothing is overwritten."""
    out = Path(cfg.out)
    if not cfg.out:
        names = (Path(f"runs/default{'' if i == 1 else f'-{i}'}") for i in range(1, 10**6))
        out = next(p for p in names if claim(p))
    elif not cfg.resume and ((out / "config.json").exists() or (out / "metrics.jsonl").exists()):
        raise ValueError(f"--out {out} holds a run already: choose another directory, or continue it with --resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".probe").touch()
        (out / ".probe").unlink()
    except OSError as e:
        raise ValueError(f"--out {out}: cannot write there ({e.strerror})") from None
    return out


def claim(path) -> bool:
    """Make directory `path`; False if it is there already, also if another process was a moment faster."""
    try:
        path.mkdir(parents=True)
        return True
    except FileExistsError:
        return False


def new_model(cfg) -> Path:
    """The checkpoint of a small Qwen2 for a procedural task, warm-started on its demonstrations; cached by its recipe."""
    if cfg.data not in data.TASKS:
        raise ValueError(f"--data {cfg.data} needs --model: a new small model is built for {', '.join(data.TASKS)} alone")
    tokenizer = data.char_tokenizer(cfg.data)
    eos = tokenizer.convert_tokens_to_ids(data.END)
    raw = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=len(tokenizer), hidden_size=cfg.width,
               intermediate_size=3 * cfg.width, num_hidden_layers=cfg.layers, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=True, hidden_act="silu",
               rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}, initializer_range=0.1,
               eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    recipe = [raw, cfg.data, cfg.seed, cfg.skill_steps, cfg.habit_steps, tokenizer.get_vocab(), "v1"]
    path = Path("runs/warmstart") / hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    if path.is_dir() or not MAIN:
        return path
    model = Model.from_scratch(raw, cfg.seed, DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    phases = [("skill", cfg.skill_steps), ("habit", cfg.habit_steps if cfg.skill_steps else 0)]
    with tqdm(total=sum(n for _, n in phases), desc="warm start on demonstrations", mininterval=0.5) as bar:
        for phase, steps in phases:
            texts = list(zip(*data.demos(cfg.data, 128 * steps, phase, cfg.seed))) or [(), ()]
            demos = list(zip(*(tokenizer(list(some)).input_ids if some else () for some in texts)))
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
                rows = demos[128 * step:128 * (step + 1)]
                logp, _, _ = forward(model, [p + r for p, r in rows], [len(p) for p, _ in rows])
                (-logp.mean()).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                bar.set_postfix(nll=f"{-logp.mean().item():.3f}", phase=phase, refresh=False)
                bar.update()
    with tempfile.TemporaryDirectory() as aside:
        tokenizer.save_pretrained(aside)
        model.source = Path(aside)
        model.save_pretrained(path)
    return path


def load_problems(cfg, model, tokenizer):
    """Two lists of (Problem, prompt, prompt ids): to train on and held out. A set without test split gives a tenth away."""
    problems = data.load(cfg.data, "train", seed=cfg.seed if cfg.data in data.TASKS else 0)
    if cfg.eval_data or cfg.data in data.TASKS or "test" in data.SOURCES.get(cfg.data, ()):
        held_out = data.load(cfg.eval_data or cfg.data, "test", n=cfg.eval_problems)
    else:
        every = 10 if len(problems) >= 10 else 2  # spread over the file, which may be sorted; the same for every --seed
        held_out = problems[every - 1::every][:cfg.eval_problems]
        problems = [p for i, p in enumerate(problems) if (i + 1) % every or i >= every * len(held_out)]
        if not held_out:
            raise ValueError(f"--data {cfg.data}: one problem alone cannot be trained on and held out; give --eval_data")
    longest = min(cfg.max_prompt_tokens, model.config.max_position_embeddings - cfg.max_new_tokens)
    try:
        return [data.encode(some, cfg.template, tokenizer, longest) for some in (problems, held_out)]
    except ValueError as e:
        raise ValueError(f"--data {cfg.data}: {e} (--max_prompt_tokens {cfg.max_prompt_tokens}, --max_new_tokens "
                         f"{cfg.max_new_tokens})") from None


def shard(model: Model) -> Model:
    """FSDP2: one unit per block, float32 masters and gradients, bfloat16 compute on CUDA. Applied from outside: model.py
    knows nothing of it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    half = torch.bfloat16 if DEVICE.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(DEVICE.type, (WORLD,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def load_model(source) -> Model:
    """Float32 weights, sharded over the ranks, or whole on a single CPU."""
    model = Model.from_config(source)
    if dist.is_initialized():
        model = shard(model)
    model = model.to_empty(device=DEVICE).load_weights()
    if dist.is_initialized():
        with torch.no_grad():
            forward(model, [], [])  # FSDP learns which module is the root from the first that runs
        model.reshard()  # the root stays gathered after a forward; an optimizer must see the shards
    return model


@contextmanager
def whole_weights(model):
    """Under FSDP, keep every block's weights gathered inside: sampling takes thousands of forwards, of different number on
    every rank, none of which may wait for a collective."""
    units = [m for m in model.modules() if hasattr(m, "unshard")]
    for m in units:
        m.unshard()
        m.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for m in units:
            m.set_reshard_after_forward(m is not model, recurse=False)
            m.reshard()


def gather(rows: list) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    if WORLD == 1:
        return rows
    parts = [None] * WORLD
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


# ---- One step ------------------------------------------------------------------------------------------------------------

@dataclass
class Row:
    """One sampled response and what the update needs to know of it."""
    tokens: list[int]
    prompt_len: int
    logp: list[float]  # the sampler's
    finished: bool
    score: float
    status: str
    group: int = 0
    A: float = 0.0
    pass_rate: float = 0.0  # mean score of its group

    @property
    def length(self):
        return len(self.tokens) - self.prompt_len


def sample(model, problems, seeds, n, cfg, tokenizer, scorer) -> list[Row]:
    """n scored responses to each of `problems`, (Problem, text, ids), problem-major, on every rank; the prompts are spread
    over the ranks."""
    mine = range(RANK, len(problems), WORLD)
    with whole_weights(model):
        rollouts = generate(model, [problems[i][2] for i in mine], n, cfg.max_new_tokens, cfg.temperature,
                            seed=[seeds[i] for i in mine], stop=data.TEMPLATES[cfg.template].stop, tokenizer=tokenizer,
                            progress=MAIN and cfg.max_new_tokens > 256)
    texts = tokenizer.batch_decode([r.tokens[r.prompt_len:] for r in rollouts], skip_special_tokens=True)
    which = [i for i in mine for _ in range(n)]
    grades = scorer([(problems[i][0].task, text, problems[i][0].answer) for i, text in zip(which, texts)])
    rows = gather([Row(r.tokens, r.prompt_len, r.logp, r.finished, *g, group=i) for i, r, g in zip(which, rollouts, grades)])
    return sorted(rows, key=lambda row: row.group)  # stable: a group's samples stay in order, whoever drew them


def minibatches(rows, cfg):
    """K lists of rows: whole groups, or whole responses where K exceeds the prompts; each row in exactly one."""
    unit = cfg.samples if cfg.updates <= cfg.prompts else 1
    units = [rows[i:i + unit] for i in range(0, len(rows), unit)]
    cut = [round(k * len(units) / cfg.updates) for k in range(cfg.updates + 1)]
    return [sum(units[a:b], []) for a, b in zip(cut, cut[1:])]


def microbatches(rows, budget):
    """Rows sorted by length and cut into bins of equal tokens, at most `budget` unless one row alone is longer. Their
    number is a multiple of the ranks, rank r takes bins r, r + WORLD, ...: equal work; a bin may be empty."""
    rows = sorted(rows, key=lambda r: len(r.tokens))
    size = sum(len(r.tokens) for r in rows)
    m = WORLD * math.ceil(size / budget / WORLD)
    while True:
        bins, seen = [[] for _ in range(m)], 0
        for row in rows:
            bins[int((seen + len(row.tokens) / 2) / size * m)].append(row)
            seen += len(row.tokens)
        if all(len(b) < 2 or sum(len(r.tokens) for r in b) <= budget for b in bins):
            return bins
        m += WORLD


def forward(model, sequences, prompt_lens, temperature=1.0):
    """(logp, entropy, sum p^2) of the response tokens of `sequences`, end to end. The model sees no padding; an empty list
    runs one token for nothing, because under FSDP every rank must take part in every pass."""
    if not sequences:
        nothing = model(torch.zeros(1, dtype=torch.long, device=DEVICE), [1], torch.zeros(1, dtype=torch.long, device=DEVICE))
        return [t[:0] for t in nothing]
    ids = torch.tensor([t for s in sequences for t in s[:-1]], device=DEVICE)
    targets = torch.tensor([t for s, p in zip(sequences, prompt_lens) for t in [-1] * (p - 1) + s[p:]], device=DEVICE)
    return model(ids, [len(s) - 1 for s in sequences], targets, temperature)


def token_stats(model, rows, cfg):
    """What policy_loss wants of `rows`, padded on the right: mask, the sampler's log-probs, and the model's logp, entropy and
    sum p^2: (B,T) each."""
    lengths = torch.tensor([r.length for r in rows], dtype=torch.long, device=DEVICE)
    mask = torch.arange(max((r.length for r in rows), default=1), device=DEVICE) < lengths[:, None]
    flat = [torch.tensor([x for r in rows for x in r.logp], device=DEVICE),
            *forward(model, [r.tokens for r in rows], [r.prompt_len for r in rows], cfg.temperature)]
    return mask, *(torch.zeros(mask.shape, device=DEVICE, dtype=x.dtype).masked_scatter(mask, x) for x in flat)


def update(model, reference, optimizer, rows, cfg, part, sums, on_policy) -> float:
    """One gradient step on the mini-batch `rows`, which every rank holds whole; each takes its own micro-batches. Adds
    token-weighted metrics to `sums`; returns the gradient norm (not finite: the step was skipped)."""
    bins = microbatches(rows, cfg.tokens_per_microbatch)
    hyper = hyperparameters(cfg) | ({"part": part} if part else {})
    totals = {"tokens": sum(r.length for r in rows), "sequences": len(rows),
              "winning_groups": len({r.group for r in rows if r.A > 0})}
    if cfg.loss == "acpo" and cfg.acpo_stats == "batch" and len(bins) > 1:  # one more forward pass, without gradient
        totals["moments"] = torch.zeros(3, int(hyper.get("bins", 5)), dtype=torch.float64, device=DEVICE)
        for micro in bins[RANK::WORLD]:
            with torch.no_grad():
                mask, old, logp, _, _ = token_stats(model, micro, cfg)
            totals["moments"] += losses.ratio_moments(logp, old, mask, totals["moments"].shape[1])
        if WORLD > 1:
            dist.all_reduce(totals["moments"])

    for micro in bins[RANK::WORLD]:
        mask, old, logp, entropy, sum_p2 = token_stats(model, micro, cfg)
        if not micro:
            logp.sum().backward()
            continue
        extra = {}
        if reference is not None:
            with torch.no_grad():
                extra = {"ref_logp": token_stats(reference, micro, cfg)[2], "kl_beta": cfg.kl_beta}
        loss, metrics = losses.policy_loss(
            cfg.loss, logp, old, torch.tensor([r.A for r in micro], device=DEVICE), mask, agg=cfg.agg or None, entropy=entropy,
            sum_p2=sum_p2, group_size=cfg.samples, max_len=cfg.max_new_tokens, totals=totals,
            pass_rate=torch.tensor([r.pass_rate for r in micro], device=DEVICE), **extra, **hyper)
        (loss * WORLD).backward()  # FSDP averages over ranks, `totals` count all of them
        metrics["entropy"] = entropy[mask].mean()
        for name, value in zip(metrics, torch.stack(list(metrics.values())).tolist()):
            sums[name] += value * int(mask.sum())
        sums["tokens"] += int(mask.sum())
        if on_policy:  # nothing has been updated since: the sampler's own log-probs must come out again
            gap = (old - logp.detach())[mask].double()
            sums["sampler_kl"] += (gap.expm1() - gap).sum().item()  # k3, without cancellation
            sums["sampler_tokens"] += len(gap)
            sums["max_gap"] = max(sums["max_gap"], gap.abs().max().item())

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def learn(model, reference, optimizer, rows, cfg) -> dict:
    """Advantages, then `epochs` x `updates` gradient steps on the rows of one rollout; the metrics of it all."""
    reward = torch.tensor([r.score for r in rows])
    kind = cfg.advantage or losses.OBJECTIVES[cfg.loss].advantage
    A = losses.advantages(reward, cfg.samples, kind, torch.tensor([r.length for r in rows]))
    groups = reward.view(-1, cfg.samples)
    for row, a, c in zip(rows, A.tolist(), groups.mean(1).repeat_interleave(cfg.samples).tolist()):
        row.A, row.pass_rate = a, c
    sums, norms = defaultdict(float), []
    for _ in range(cfg.epochs):
        for part in ("low", "high") if cfg.loss == "ar_lopti" else (None,):  # AR-Lopti goes over the rollout twice
            for batch in minibatches(rows, cfg):
                norms.append(update(model, reference, optimizer, batch, cfg, part, sums, on_policy=not norms))
    parts = gather([sums])
    sums = {k: sum(p[k] for p in parts) for k in sorted({k for p in parts for k in p})}
    finite = [n for n in norms if math.isfinite(n)]
    mean = {k: v / sums["tokens"] for k, v in sums.items() if k not in ("tokens", "sampler_kl", "sampler_tokens", "max_gap")}
    return mean | {"sampler_kl": sums["sampler_kl"] / sums["sampler_tokens"], "sampler_max": max(p["max_gap"] for p in parts),
                   "grad_norm": sum(finite) / len(finite) if finite else None, "skipped": len(norms) - len(finite),
                   "zero_groups": (groups.amax(1) == groups.amin(1)).float().mean().item()}


# ---- Keeping what was learned ----------------------------------------------------------------------------------------------

def save(out, step, model, optimizer, cfg):
    """out/step-000120: a Hugging Face checkpoint, and in resume/ what else it takes to go on. Whole or absent; `latest` is
    written last."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    name = f"step-{step:06d}"
    aside = out / f".{name}"
    model.save_pretrained(aside, torch.bfloat16 if DEVICE.type == "cuda" else None, write=MAIN)
    barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=aside / "resume", no_dist=WORLD == 1)
    barrier()
    if MAIN:
        replace_directory(aside, out / name)
        (out / ".latest").write_text(name)
        (out / ".latest").rename(out / "latest")
        for old in sorted(out.glob("step-*"))[:-cfg.keep]:
            shutil.rmtree(old)


def restore(out, model, optimizer) -> int:
    """Load the latest checkpoint of `out` into model and optimizer; the step it was taken after."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    name = (out / "latest").read_text()
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=out / name / "resume", no_dist=WORLD == 1)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(name.removeprefix("step-"))


def rewind(out, step):
    """Drop the lines of metrics.jsonl after `step`, and evaluations that were made only because a shorter run ended there."""
    path, every = out / "metrics.jsonl", json.loads((out / "config.json").read_text())["eval_every"]
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
    lines = [m | {"eval": m["eval"] if m["step"] == 1 or m["step"] % every == 0 else None}
             for m in lines if m["step"] <= step]
    (out / ".metrics").write_text("".join(json.dumps(m) + "\n" for m in lines))
    (out / ".metrics").rename(path)
    return lines


def barrier():
    if WORLD > 1:
        dist.barrier()


# ---- The loop --------------------------------------------------------------------------------------------------------------

def train(cfg: Config):
    began = time.time()
    out = open_run(cfg) if MAIN else None
    out = gather([out])[0]
    cfg.out = str(out)
    source = cfg.model or new_model(cfg)
    barrier()
    model = load_model(source)
    reference = load_model(source).requires_grad_(False) if cfg.kl_beta else None
    model.recompute = cfg.recompute
    tokenizer = data.load_tokenizer(model.source)
    problems, held_out = load_problems(cfg, model, tokenizer)
    optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": cfg.weight_decay},
                                   {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}],
                                  lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    first, history = 1, []
    if cfg.resume:
        first = restore(out, model, optimizer) + 1 if (out / "latest").is_file() else 1
        history = rewind(out, first - 1) if MAIN and first <= cfg.steps else []
    if first > cfg.steps:
        raise ValueError(f"--steps {cfg.steps}: the run in {out} has done {first - 1} already; give a larger --steps")
    if MAIN:  # from here on the directory holds a run
        (out / "config.json").write_text(json.dumps({**dataclasses.asdict(cfg), "out": str(out), "resume": False}, indent=1))
        tqdm.write(f"{sum(p.numel() for p in model.parameters()):,} parameters on {WORLD} x {DEVICE.type}, attention: "
                   f"{attention_kernel(DEVICE, torch.bfloat16 if DEVICE.type == 'cuda' else torch.float32)}; "
                   f"loss {cfg.loss}; run directory {out}")

        if cfg.samples == 1 and (cfg.advantage or losses.OBJECTIVES[cfg.loss].advantage) not in ("reward", "signed"):
            tqdm.write("--samples 1: a group of one has no baseline, every advantage is 0; try --advantage signed")

    stop = []
    for s in (signal.SIGINT, signal.SIGTERM):  # finish the step, save, say how to go on; a second one breaks off at once
        signal.signal(s, lambda *a: signal.default_int_handler(*a) if stop else stop.append(1))
    scorer, bad, drawn = Scorer(workers=2), 0, 0.0

    def evaluate():
        rows = sample(model, held_out, [-1 - i for i in range(len(held_out))], 1, cfg, tokenizer, scorer)
        return sum(r.score for r in rows) / len(rows)

    with open(out / "metrics.jsonl" if MAIN else os.devnull, "a") as log, \
            tqdm(total=cfg.steps, initial=first - 1, desc=cfg.loss, unit="step", disable=not MAIN, mininterval=0.5) as bar:
        for step in range(first, cfg.steps + 1):
            t0 = time.time()
            metrics = dict.fromkeys(METRICS) | {"step": step}
            if step == 1:
                metrics["eval"] = evaluate()
            t1 = time.time()
            batch, seeds = draw_problems(problems, step, cfg)
            rows = sample(model, batch, seeds, cfg.samples, cfg, tokenizer, scorer)
            t2 = time.time()
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1.0, step / max(1, cfg.warmup))
            learned = learn(model, reference, optimizer, rows, cfg)
            t3 = time.time()
            if step > 1 and (step == cfg.steps or step % cfg.eval_every == 0):
                metrics["eval"] = evaluate()
            tokens = sum(r.length for r in rows)
            metrics |= {k: v for k, v in learned.items() if k in metrics or "_bin" in k} | {
                "reward": sum(r.score for r in rows) / len(rows), "length": tokens / len(rows),
                "truncated": sum(not r.finished for r in rows) / len(rows), "rollout_tps": tokens / (t2 - t1),
                "update_tps": tokens * cfg.epochs / (t3 - t2), "seconds": time.time() - t0,
                **{s: sum(r.status == s for r in rows) / len(rows) for s in ("no_answer", "unparsable", "timeout", "error")}}
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            history.append(metrics)
            evals = [m["eval"] for m in history if m["eval"] is not None]
            bar.set_postfix_str(f"reward {metrics['reward']:.2f} eval {evals[-1] if evals else math.nan:.2f} "
                                f"len {metrics['length']:.1f} H {metrics['entropy']:.2f} "
                                f"clip {100 * (metrics['clip_low'] + metrics['clip_high']):.1f}% "
                                f"{metrics['rollout_tps'] / 1000:.1f}k tok/s", refresh=False)
            bar.update()
            stopping = any(gather([bool(stop)]))
            bad = bad + 1 if learned["skipped"] else 0
            if bad == 3:
                if MAIN:
                    (out / f"nonfinite-{step}.json").write_text(json.dumps([dataclasses.asdict(r) for r in rows]))
                raise ValueError(f"loss or gradient not finite in three steps running; rollouts in {out}/nonfinite-{step}.json; "
                                 "lower --lr, or look at --loss")
            if step == cfg.steps or step % cfg.save_every == 0 or stopping:
                save(out, step, model, optimizer, cfg)
            if MAIN and (time.time() - drawn > 15 or step == cfg.steps or stopping):
                from experiments.curves import draw
                try:
                    draw(out)
                except (OSError, RuntimeError, ValueError) as e:  # no picture is worth a run
                    tqdm.write(f"curves.png not drawn: {e}")
                drawn = time.time()
            if stopping:
                break
    scorer.close()
    if MAIN:
        done = history[-1]["step"]
        again = "" if done == cfg.steps else f" Stopped; go on with: python train.py --out {out} --resume"
        print(f"held-out accuracy {evals[0]:.2f} -> {evals[-1]:.2f} after {done} steps, {time.time() - began:.0f} s. "
              f"{out}: curves.png, metrics.jsonl, step-{done:06d}. Score it: python eval.py {out}{again}")


def draw_problems(problems, step, cfg):
    """The step's problems, from a reshuffle of all of them per epoch, and a sampling seed for each: functions of the flags
    and the step alone, so that a resumed run needs no random state."""
    batch, seeds = [], []
    for g in range((step - 1) * cfg.prompts, step * cfg.prompts):
        epoch, i = divmod(g, len(problems))
        batch.append(problems[shuffled(len(problems), cfg.seed, epoch)[i]])
        seeds.append(cfg.seed * 2**40 + g)
    return batch, seeds


@lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    order = list(range(n))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return order


def main():
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves its checkpoints alone, on purpose
    try:
        cfg = parse()
        torch.set_num_threads(cfg.threads)
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        if WORLD > 1:
            dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        elif DEVICE.type == "cuda":  # FSDP on one GPU too: it is what keeps float32 masters under bfloat16 compute
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        train(cfg)
    except (ValueError, OSError) as e:
        with suppress(OSError, NameError):
            Path(cfg.out or ".").rmdir()  # nothing in it yet: leave no empty run behind (fails if there is something)
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; --resume goes on from the last checkpoint")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
