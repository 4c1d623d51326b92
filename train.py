"""The loop, top to bottom: rollout -> reward -> advantage -> K updates -> log, save, eval.

    python train.py                                                                   # a laptop: minutes, no GPU, no network
    torchrun --nproc_per_node=8 train.py --loss acpo --model Qwen/Qwen2.5-7B --data orz57k --template orz \\
        --prompts 128 --samples 10 --updates 2 --max_new_tokens 3072 --lr 1e-6 --tokens_per_microbatch 16384
    python train.py --out runs/mine --resume --steps 300                              # go on where it stopped
    python train.py --dry_run 8 --model Qwen/Qwen2.5-7B ...                           # does it fit? Memory of a rank; no GPU needed

Without --model a small Qwen2 is built for a procedural task and warm-started on demonstrations, so that the reward has
something to select from. Every rank holds all rollouts of a step (token ids are small) and computes the same plan of
mini-batches and micro-batches from them, so that nobody has to hand out work.
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
import time
import traceback
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

import data
import losses
from experiments.warm_start import new_model
from model import Model, attention_kernel, replace_directory
from rewards import Scorer
from rollout import Cancelled, generate


def flag(default, text):
    kw = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": text}, **kw)


@dataclass
class Config:
    """Every flag. Defaults: the laptop run, one to two minutes on 2 CPU cores."""
    loss: str = flag("acpo", "objective, by its name in losses.py")
    loss_args: list[str] = flag([], "its hyper-parameters, as alpha=2 eps=0.1")
    advantage: str = flag("", "grpo, mean, rloo, maxrl, gpg, reinforce_pp, reward, signed (default: the objective's own)")
    agg: str = flag("", "token-mean, seq-mean-token-mean, seq-mean-token-sum[-norm] (default: the objective's own)")
    acpo_stats: Literal["batch", "micro"] = flag("batch", "ACPO's ratio statistics: over the whole mini-batch and all ranks, or micro (official code)")

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
    dynamic_sampling: int = flag(0, "DAPO: up to so many more rollouts a step, to replace groups whose scores are all equal")
    overlong_buffer: int = flag(0, "DAPO: each of the last so many tokens before --max_new_tokens costs reward, 1 in all")
    mask_truncated: bool = flag(False, "responses cut at --max_new_tokens stay out of the loss (their scores still count in the group)")
    old_logp: Literal["sampler", "trainer"] = flag("sampler", "pi_old: as the sampler recorded it, or trainer: one more forward pass over the rollout")

    lr: float = flag(3e-4, "learning rate; 1e-6 is usual for 3B to 7B")
    beta2: float = flag(0.95, "of Adam; verl's default, and so ACPO's run, is 0.999")
    warmup: int = flag(0, "steps of linear warm-up; then the rate is constant, whatever --steps is")
    weight_decay: float = flag(0.01, "of matrices; norms and biases have none")
    clip_norm: float = flag(1.0, "largest gradient norm")
    kl_beta: float = flag(0.0, "weight of a k3 KL penalty to the initial model")
    tokens_per_microbatch: int = flag(0, "packed tokens per forward pass: lower it when memory runs out (0: 16384 on CUDA, 4096 on CPU)")
    recompute: bool = flag(False, "activation checkpointing: far less memory, a third more compute")
    compile: bool = flag(False, "torch.compile the blocks for the update; sampling stays as it is")
    offload: bool = flag(False, "keep sharded weights, gradients and Adam states in CPU memory between passes (more than one rank, or CUDA)")
    shards_per_replica: int = flag(0, "HSDP: ranks that share one copy of the weights, as the 8 of a node; 0: all of them")
    kv_tokens: int = flag(0, "tokens a rank's KV cache may hold (0: 60 %% of the free GPU memory, 2 GiB on CPU)")
    dry_run: int = flag(0, "print the memory that a rank would need with so many GPUs, and stop")

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

    def __post_init__(self):
        on_gpu = DEVICE.type == "cuda" or self.dry_run
        self.tokens_per_microbatch = self.tokens_per_microbatch or (16384 if on_gpu else 4096)
        if self.model and (Path(self.model) / "latest").is_file():  # a run directory: the checkpoint that is its newest now, also after a resume
            self.model = str(Path(self.model) / (Path(self.model) / "latest").read_text())


# ---- Setting up --------------------------------------------------------------------------------------------------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
MAIN = RANK == 0
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
KERNEL = attention_kernel(DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
METRICS = """step reward eval length entropy clip_low clip_high ratio_mean ratio_std approx_kl grad_norm zero_groups truncated
no_answer unparsable timeout error skipped refills pos_peak pos_valley neg_peak neg_valley sampler_kl sampler_max
rollout_tps update_tps seconds""".split()


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
    for name in ("model", "data", "width", "layers", "skill_steps", "habit_steps", "seed") if known.resume else ():
        if getattr(cfg, name) != saved.get(name, getattr(cfg, name)):
            raise ValueError(f"--resume: --{name} was {saved[name]!r} in this run and cannot become {getattr(cfg, name)!r}")
    if rest:
        names = ["--" + f for f in Config.__dataclass_fields__]
        raise ValueError(data.nearest("--" + rest[0].split("=")[0].lstrip("-").replace("-", "_"), names, "flag"))
    for f in dataclasses.fields(Config):  # whole numbers start at 1, unless 0 is the default or means "none of it"
        value, least = getattr(cfg, f.name), 0 if f.default == 0 or f.name in ("skill_steps", "habit_steps") else 1
        if type(value) is int and value < least:
            raise ValueError(f"--{f.name} {value}: must be at least {least}")
    if cfg.lr <= 0 or cfg.temperature <= 0 or not 0 <= cfg.beta2 < 1:
        raise ValueError(f"--lr {cfg.lr} and --temperature {cfg.temperature} must be above 0, --beta2 {cfg.beta2} in [0, 1)")
    if cfg.updates > cfg.prompts * cfg.samples:
        raise ValueError(f"--updates {cfg.updates}: more mini-batches than the {cfg.prompts} x {cfg.samples} responses of a step")
    if cfg.width % 8:
        raise ValueError(f"--width {cfg.width}: must be a multiple of 8 (four heads of even size)")
    world = cfg.dry_run or WORLD
    if cfg.shards_per_replica and world % cfg.shards_per_replica:
        raise ValueError(f"--shards_per_replica {cfg.shards_per_replica}: {world} ranks cannot be split into such groups; "
                         f"{math.gcd(world, cfg.shards_per_replica)} would do, or 0")
    if cfg.offload and WORLD == 1 and DEVICE.type == "cpu" and not cfg.dry_run:
        raise ValueError("--offload: one process on a CPU has nothing to offload from; --offload False")
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
    if cfg.overlong_buffer > cfg.max_new_tokens:
        raise ValueError(f"--overlong_buffer {cfg.overlong_buffer}: longer than a response, --max_new_tokens {cfg.max_new_tokens}")
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


def shard(model: Model, mesh, dtype=None, offload=False) -> Model:
    """FSDP2: one unit per block, float32 masters and gradients, compute in `dtype`. A mesh of two dimensions (replicas,
    shards) is HSDP. Applied from outside: model.py knows nothing of it."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    how = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False))
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=DEVICE.type == "cuda")
    for layer in model.layers:
        fully_shard(layer, **how)
    return fully_shard(model, reshard_after_forward=False, **how)


def load_model(source, cfg) -> Model:
    """Float32 weights, sharded over the ranks, or whole on a single CPU."""
    model = Model.from_config(source)
    model.recompute = cfg.recompute
    for layer in model.layers if cfg.compile else ():
        layer.compile(dynamic=True)
    if not dist.is_initialized():
        return model.to_empty(device=DEVICE).load_weights()
    n = cfg.shards_per_replica or WORLD
    mesh = dist.init_device_mesh(DEVICE.type, (WORLD // n, n), mesh_dim_names=("replica", "shard"))
    mesh = mesh if n < WORLD else mesh["shard"]
    shard(model, mesh, torch.bfloat16 if DEVICE.type == "cuda" else None, cfg.offload)
    model.to_empty(device="cpu" if cfg.offload else DEVICE).load_weights()
    with torch.no_grad():
        forward(model, [], [])  # FSDP learns which module is the root from the first that runs
    model.reshard()  # the root stays gathered after a forward; an optimizer must see the shards
    return model


@contextmanager
def whole_weights(model):
    """Under FSDP, keep every block's weights gathered inside and call the blocks past its hooks: sampling takes thousands of
    forwards, of different number on every rank, none of which may wait for a collective or leave a trace of its order."""
    units = [m for m in model.modules() if hasattr(m, "unshard")]
    for m in units:
        m.unshard()
    model.whole = True
    try:
        yield
    finally:
        model.whole = False
        for m in units:
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
    old_logp: list[float] | None = None  # where the ratio's denominator is not the sampler's

    @property
    def length(self):
        return len(self.tokens) - self.prompt_len


def sample(model, problems, seeds, n, cfg, tokenizer, scorer, droppable=False) -> list[Row]:
    """n scored responses to each of `problems`, (Problem, text, ids), problem-major, on every rank; the prompts are spread
    over the ranks. Raises Cancelled, if `droppable`, on every rank once one of them was told to stop."""
    mine = range(RANK, len(problems), WORLD)
    stopping = lambda: droppable and bool(TOLD_TO_STOP)
    with whole_weights(model), suppress(Cancelled):
        rollouts = generate(model, [problems[i][2] for i in mine], n, cfg.max_new_tokens, cfg.temperature,
                            seed=[seeds[i] for i in mine], stop=data.TEMPLATES[cfg.template].stop, tokenizer=tokenizer,
                            kv_tokens=cfg.kv_tokens or None, progress=MAIN and cfg.max_new_tokens > 256, cancel=stopping)
    if any(gather([stopping()])):
        raise Cancelled
    texts = tokenizer.batch_decode([r.tokens[r.prompt_len:] for r in rollouts], skip_special_tokens=True)
    which = [i for i in mine for _ in range(n)]
    grades = scorer([(problems[i][0].task, text, problems[i][0].answer) for i, text in zip(which, texts)])
    rows = gather([Row(r.tokens, r.prompt_len, r.logp, r.finished, *g, group=i) for i, r, g in zip(which, rollouts, grades)])
    return sorted(rows, key=lambda row: row.group)  # stable: a group's samples stay in order, whoever drew them


TOLD_TO_STOP = []  # when


def on_signal(*args):
    """Drop the step that is sampling, or finish it, save, say how to go on. A second signal breaks off at once, unless it comes
    within 5 s: launchers and schedulers pass on one and the same SIGTERM twice."""
    TOLD_TO_STOP.append(time.time())
    if TOLD_TO_STOP[-1] - TOLD_TO_STOP[0] > 5:
        signal.default_int_handler(*args)


def draw_problems(problems, at, count, cfg):
    """`count` problems from number `at` of an endless series, reshuffled every epoch, and a sampling seed for each: functions
    of the flags and the number alone, so that a resumed run needs no random state."""
    batch, seeds = [], []
    for g in range(at, at + count):
        epoch, i = divmod(g, len(problems))
        batch.append(problems[shuffled(len(problems), cfg.seed, epoch)[i]])
        seeds.append(cfg.seed * 2**40 + g)
    return batch, seeds


@lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    order = list(range(n))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return order


def collect(model, problems, at, cfg, tokenizer, scorer):
    """(rows to train on, all rows that were sampled, number of the next problem): cfg.prompts groups. Dynamic sampling (DAPO,
    2503.14476) replaces groups whose scores are all equal; after so many refills they are taken as they are."""
    useful, flat, seen = [], [], []
    for _ in range(1 + cfg.dynamic_sampling):
        missing = cfg.prompts - len(useful)
        rows = sample(model, *draw_problems(problems, at, missing, cfg), cfg.samples, cfg, tokenizer, scorer,
                      droppable=True)
        for i in range(0, len(rows), cfg.samples):
            group = rows[i:i + cfg.samples]
            for row in group:
                row.group += at
            (flat if len({row.score for row in group}) == 1 else useful).append(group)
        seen, at = seen + rows, at + missing
        if len(useful) == cfg.prompts:
            break
    chosen = useful + flat[:cfg.prompts - len(useful)]
    return sum(sorted(chosen, key=lambda group: group[0].group), []), seen, at


def minibatches(rows, cfg):
    """K lists of rows: whole groups, or whole responses where K exceeds the prompts; each row in exactly one."""
    unit = cfg.samples if cfg.updates <= cfg.prompts else 1
    units = [rows[i:i + unit] for i in range(0, len(rows), unit)]
    cut = [round(k * len(units) / cfg.updates) for k in range(cfg.updates + 1)]
    return [sum(units[a:b], []) for a, b in zip(cut, cut[1:])]


def microbatches(rows, budget):
    """Rows cut into bins of equal tokens, at most `budget` unless one row alone is longer. Their number is a multiple of the
    ranks, rank r takes bins r, r + WORLD, ...: equal work; a bin may be empty. Neighbours are of like length, for padded
    attention; where nothing is padded, samples of a prompt stay together, so that it is computed once."""
    longest = {r.group: len(r.tokens) for r in sorted(rows, key=lambda r: len(r.tokens))}
    rows = sorted(rows, key=lambda r: (longest[r.group] if KERNEL != "sdpa" else len(r.tokens), r.group))
    size = sum(len(r.tokens) for r in rows)
    m = WORLD * math.ceil(size / (budget * WORLD))
    while True:
        bins, seen = [[] for _ in range(m)], 0
        for row in rows:
            bins[int((seen + len(row.tokens) / 2) / size * m)].append(row)
            seen += len(row.tokens)
        if all(len(b) < 2 or sum(len(r.tokens) for r in b) <= budget for b in bins):
            return bins
        m += WORLD


def forward(model, sequences, prompt_lens, temperature=1.0):
    """(logp, entropy, sum p^2) of the response tokens of `sequences`, end to end. The model sees no padding, and what several
    sequences have before the last token of their prompts only once. An empty list runs one token for nothing, because under
    FSDP every rank must take part in every pass."""
    if not sequences:
        nothing = model(torch.zeros(1, dtype=torch.long, device=DEVICE), [1], torch.zeros(1, dtype=torch.long, device=DEVICE))
        return [t[:0] for t in nothing]
    ids, targets, lengths, after, place = [], [], [], [], {}

    def pack(tokens, wanted, parent):
        ids.extend(tokens)
        targets.extend(wanted)
        lengths.append(len(tokens))
        after.append(parent)
    prefixes = [tuple(s[:p - 1]) for s, p in zip(sequences, prompt_lens)]
    times = Counter(prefixes)
    for prefix, s in zip(prefixes, sequences):
        k = len(prefix) if times[prefix] > 1 else 0  # tokens that it shares
        if k and prefix not in place:
            place[prefix] = len(lengths)
            pack(prefix, [-1] * k, -1)
        pack(s[k:-1], [-1] * (len(prefix) - k) + s[len(prefix) + 1:], place[prefix] if k else -1)
    return model(torch.tensor(ids, device=DEVICE), lengths, torch.tensor(targets, device=DEVICE), temperature, after)


def token_stats(model, rows, cfg):
    """What policy_loss wants of `rows`, padded on the right: mask, old log-probs, and the model's logp, entropy and sum p^2:
    (B,T) each."""
    lengths = torch.tensor([r.length for r in rows], dtype=torch.long, device=DEVICE)
    mask = torch.arange(max((r.length for r in rows), default=1), device=DEVICE) < lengths[:, None]
    flat = [torch.tensor([x for r in rows for x in r.old_logp or r.logp], device=DEVICE),
            *forward(model, [r.tokens for r in rows], [r.prompt_len for r in rows], cfg.temperature)]
    return mask, *(torch.zeros(mask.shape, device=DEVICE, dtype=x.dtype).masked_scatter(mask, x) for x in flat)


def add_mismatch(sums, sampler_logp, logp, mask):
    """Sampler against trainer, before anything was updated: k3 KL, without cancellation, and the worst token."""
    gap = (sampler_logp - logp.detach())[mask].double()
    sums["sampler_kl"] += (gap.expm1() - gap).sum().item()
    sums["sampler_tokens"] += len(gap)
    sums["max_gap"] = max(sums["max_gap"], gap.abs().max().item())


@torch.no_grad()
def recompute_old_logp(model, rows, cfg, sums):
    """Put the trainer's own log-probs in the place of the sampler's, on every rank."""
    where, mine = {id(row): i for i, row in enumerate(rows)}, []
    for micro in microbatches(rows, cfg.tokens_per_microbatch)[RANK::WORLD]:
        mask, sampler_logp, logp, _, _ = token_stats(model, micro, cfg)
        if micro:
            add_mismatch(sums, sampler_logp, logp, mask)
        mine += [(where[id(row)], logp[i, :row.length].tolist()) for i, row in enumerate(micro)]
    for i, logp in gather(mine):
        rows[i].old_logp = logp


@torch.no_grad()
def ratio_moments(model, bins, cfg, count):
    """ACPO's statistics over a whole mini-batch and all ranks, by one more forward pass: see losses.ratio_moments."""
    moments = torch.zeros(3, count, dtype=torch.float64, device=DEVICE)
    for micro in bins[RANK::WORLD]:
        mask, old, logp, _, _ = token_stats(model, micro, cfg)
        moments += losses.ratio_moments(logp, old, mask, count)
    if WORLD > 1:
        dist.all_reduce(moments)
    return moments


def update(model, reference, optimizer, rows, cfg, part, sums, on_policy) -> float:
    """One gradient step on the mini-batch `rows`, which every rank holds whole; each takes its own micro-batches. Adds
    token-weighted metrics to `sums`; returns the gradient norm (not finite: the step was skipped)."""
    bins = microbatches(rows, cfg.tokens_per_microbatch)
    hyper = hyperparameters(cfg) | ({"part": part} if part else {})
    totals = {"tokens": sum(r.length for r in rows), "sequences": len(rows),
              "winning_groups": len({r.group for r in rows if r.A > 0})}
    if cfg.loss == "acpo" and cfg.acpo_stats == "batch" and len(bins) > 1:
        totals["moments"] = ratio_moments(model, bins, cfg, int(hyper.get("bins", 5)))

    for micro in bins[RANK::WORLD]:
        mask, old, logp, entropy, sum_p2 = token_stats(model, micro, cfg)
        extra = {}
        if reference is not None:
            with torch.no_grad():
                extra = {"ref_logp": token_stats(reference, micro, cfg)[2], "kl_beta": cfg.kl_beta}
        if not micro:  # this rank has taken part in every pass
            logp.sum().backward()
            continue
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
            add_mismatch(sums, old, logp, mask)

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def learn(model, reference, optimizer, rows, cfg) -> dict:
    """Advantages, then `epochs` x `updates` gradient steps on the rows of one rollout; the metrics of it all."""
    score, free = torch.tensor([r.score for r in rows]), cfg.max_new_tokens - cfg.overlong_buffer
    over = torch.tensor([max(0, r.length - free) for r in rows])  # DAPO's soft punishment of what is nearly too long
    kind = cfg.advantage or losses.OBJECTIVES[cfg.loss].advantage
    A = losses.advantages(score - over / max(1, cfg.overlong_buffer), cfg.samples, kind, torch.tensor([r.length for r in rows]))
    for row, a, c in zip(rows, A.tolist(), score.view(-1, cfg.samples).mean(1).repeat_interleave(cfg.samples).tolist()):
        row.A, row.pass_rate = a, c
    sums, norms = defaultdict(float), []
    if cfg.old_logp == "trainer":
        recompute_old_logp(model, rows, cfg, sums)
    for _ in range(cfg.epochs):
        for part in ("low", "high") if cfg.loss == "ar_lopti" else (None,):  # AR-Lopti goes over the rollout twice
            for batch in minibatches(rows, cfg):
                if batch := [row for row in batch if row.finished or not cfg.mask_truncated]:
                    norms.append(update(model, reference, optimizer, batch, cfg, part, sums,
                                        on_policy=cfg.old_logp == "sampler" and not norms))
    parts = gather([sums])
    sums = {k: sum(p[k] for p in parts) for k in sorted({k for p in parts for k in p})}
    finite = [n for n in norms if math.isfinite(n)]
    tokens, compared = sums.pop("tokens", 0), sums.pop("sampler_tokens", 0)
    kl = sums.pop("sampler_kl", 0.0)
    return {k: v / tokens for k, v in sums.items() if k != "max_gap"} | {
        "sampler_kl": kl / max(1, compared), "sampler_max": max(p["max_gap"] for p in parts), "skipped": len(norms) - len(finite),
        "grad_norm": sum(finite) / len(finite) if finite else None}


# ---- Keeping what was learned ----------------------------------------------------------------------------------------------

ASYNC = DEVICE.type == "cuda"  # there the state is copied to the CPU in any case, and written while the next step samples


def save(out, step, position, model, optimizer, cfg):
    """Begin out/step-000120: a Hugging Face checkpoint, and in resume/ what else it takes to go on. Returns the function that
    ends it: the directory is whole or absent, `latest` is written last, only the newest cfg.keep stay."""
    name, written = f"step-{step:06d}", None
    aside = out / f".{name}"
    model.save_pretrained(aside, torch.bfloat16 if DEVICE.type == "cuda" else None, write=MAIN)
    barrier()
    weights, moments = get_state_dict(model, optimizer)
    state, where = {"model": weights, "optimizer": moments}, aside / "resume"
    if ASYNC:
        written = dcp.async_save(state, checkpoint_id=where, process_group=async_group() if WORLD > 1 else None, no_dist=WORLD == 1)
    else:
        dcp.save(state, checkpoint_id=where, no_dist=WORLD == 1)

    def finish():
        if written:
            written.result()
        barrier()
        if MAIN:
            (where / "state.json").write_text(json.dumps({"step": step, "position": position, "seed": cfg.seed}))
            replace_directory(aside, out / name)
            (out / ".latest").write_text(name)
            (out / ".latest").rename(out / "latest")
            for old in sorted(out.glob("step-*"))[:-cfg.keep]:
                shutil.rmtree(old)
    return finish


@lru_cache(maxsize=1)
def async_group():  # of its own: its collectives run beside those of the next step
    return dist.new_group(backend="gloo")


def restore(out, model, optimizer):
    """Load the latest checkpoint of `out` into model and optimizer; (the step it was taken after, the next problem's number)."""
    path = out / (out / "latest").read_text() / "resume"
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=path, no_dist=WORLD == 1)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    state = json.loads((path / "state.json").read_text())
    return state["step"], state["position"]


def rewind(out, step):
    """Drop what a killed run was still saving, the lines of metrics.jsonl after `step`, and its evaluation if it was made only
    because a shorter run ended there."""
    for unfinished in [*out.glob(".*step-*"), *(p for p in out.glob("step-*") if p.name > f"step-{step:06d}")]:
        shutil.rmtree(unfinished)
    path, every = out / "metrics.jsonl", json.loads((out / "config.json").read_text())["eval_every"]
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
    lines = [m | ({"eval": None} if m["step"] == step > 1 and step % every else {}) for m in lines if m["step"] <= step]
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
    source = cfg.model or new_model(cfg, forward, DEVICE, write=MAIN)
    barrier()
    model = load_model(source, cfg)
    reference = load_model(source, cfg).requires_grad_(False) if cfg.kl_beta else None
    tokenizer = data.load_tokenizer(model.source)
    problems, held_out = load_problems(cfg, model, tokenizer)
    optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": cfg.weight_decay},
                                   {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}],
                                  lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    done, saved, position, history = 0, 0, 0, []
    if cfg.resume:
        if (out / "latest").is_file():
            done, position = restore(out, model, optimizer)
            for group, decay in zip(optimizer.param_groups, (cfg.weight_decay, 0.0)):  # the checkpoint brought its own
                group.update(betas=(0.9, cfg.beta2), weight_decay=decay)
            saved = done
        if done >= cfg.steps:
            raise ValueError(f"--steps {cfg.steps}: the run in {out} has done {done} already; give a larger --steps")
        if MAIN:
            history = rewind(out, done)
    if MAIN:  # from here on the directory holds a run
        (out / "config.json").write_text(json.dumps({**dataclasses.asdict(cfg), "out": str(out), "resume": False}, indent=1))
        tqdm.write(f"{sum(p.numel() for p in model.parameters()):,} parameters on {WORLD} x {DEVICE.type}, attention: {KERNEL}; "
                   f"loss {cfg.loss}; run directory {out}")
        if cfg.samples == 1 and (cfg.advantage or losses.OBJECTIVES[cfg.loss].advantage) not in ("reward", "signed"):
            tqdm.write("--samples 1: a group of one has no baseline, every advantage is 0; try --advantage signed")

    TOLD_TO_STOP.clear()
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, on_signal)
    scorer, bad, drawn, finish = Scorer(workers=2), 0, 0.0, None

    def evaluate(droppable=False):
        rows = sample(model, held_out, [-1 - i for i in range(len(held_out))], 1, cfg, tokenizer, scorer, droppable)
        return sum(r.score for r in rows) / len(rows)

    with open(out / "metrics.jsonl" if MAIN else os.devnull, "a") as log, \
            tqdm(total=cfg.steps, initial=done, desc=cfg.loss, unit="step", disable=not MAIN, mininterval=0.5) as bar:
        for step in range(done + 1, cfg.steps + 1):
            t0 = time.time()
            metrics = dict.fromkeys(METRICS) | {"step": step}
            try:
                if step == 1:
                    metrics["eval"] = evaluate(droppable=True)
                t1 = time.time()
                rows, seen, position = collect(model, problems, position, cfg, tokenizer, scorer)
            except Cancelled:  # nothing has changed yet
                break
            if finish:
                finish = finish()  # what was saved while this step sampled
            t2 = time.time()
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1.0, step / max(1, cfg.warmup))
            learned = learn(model, reference, optimizer, rows, cfg)
            t3 = time.time()
            if step > 1 and (step == cfg.steps or step % cfg.eval_every == 0):
                metrics["eval"] = evaluate()
            metrics |= {k: v for k, v in learned.items() if k in metrics or "_bin" in k} | describe(seen, cfg) | {
                "rollout_tps": sum(r.length for r in seen) / (t2 - t1),
                "update_tps": sum(r.length for r in rows) * cfg.epochs / (t3 - t2), "seconds": time.time() - t0}
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            history.append(metrics)
            done = step
            show(bar, history)
            stopping = any(gather([bool(TOLD_TO_STOP)]))
            bad = bad + 1 if learned["skipped"] else 0
            if bad == 3:
                if MAIN:
                    (out / f"nonfinite-{step}.json").write_text(json.dumps([dataclasses.asdict(r) for r in rows]))
                raise ValueError(f"loss or gradient not finite in three steps running; rollouts in {out}/nonfinite-{step}.json; "
                                 "lower --lr, or look at --loss")
            if step == cfg.steps or step % cfg.save_every == 0:
                finish, saved = save(out, step, position, model, optimizer, cfg), step
                if not ASYNC:
                    finish = finish()
            if MAIN and (time.time() - drawn > 15 or step == cfg.steps or stopping):
                from experiments.curves import draw
                try:
                    draw(out)
                except (OSError, RuntimeError, ValueError) as e:  # no picture is worth a run
                    tqdm.write(f"curves.png not drawn: {e}")
                drawn = time.time()
            if stopping:
                break
    if finish:
        finish()
    if done > saved:  # stopped between two saves
        save(out, done, position, model, optimizer, cfg)()
    scorer.close()
    if MAIN:
        again = f"go on with: python train.py --out {out} --resume"
        evals = [m["eval"] for m in history if m["eval"] is not None]
        print(f"Stopped before the first step was done; {again}" if not done else
              f"held-out accuracy {evals[0]:.2f} -> {evals[-1]:.2f} after {done} steps, {time.time() - began:.0f} s. {out}: "
              f"curves.png, metrics.jsonl, step-{done:06d}. Score it: python eval.py {out}"
              + ("" if done == cfg.steps else f" Stopped; {again}"))


def describe(rows, cfg) -> dict:
    """Metrics of everything that was sampled in a step."""
    groups = [rows[i:i + cfg.samples] for i in range(0, len(rows), cfg.samples)]
    return {"reward": sum(r.score for r in rows) / len(rows), "length": sum(r.length for r in rows) / len(rows),
            "truncated": sum(not r.finished for r in rows) / len(rows), "refills": len(groups) - cfg.prompts,
            "zero_groups": sum(len({r.score for r in g}) == 1 for g in groups) / len(groups),
            **{s: sum(r.status == s for r in rows) / len(rows) for s in ("no_answer", "unparsable", "timeout", "error")}}


def show(bar, history):
    now, evals = history[-1], [m["eval"] for m in history if m["eval"] is not None]
    H, low, high = (math.nan if now[k] is None else now[k] for k in ("entropy", "clip_low", "clip_high"))
    bar.set_postfix_str(f"reward {now['reward']:.2f} eval {evals[-1] if evals else math.nan:.2f} len {now['length']:.1f} H {H:.2f} "
                        f"clip {100 * (low + high):.1f}% {now['rollout_tps'] / 1000:.1f}k tok/s", refresh=False)
    bar.update()


def main():
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves its checkpoints alone, on purpose
    cfg = None
    try:
        cfg = parse()
        torch.set_num_threads(cfg.threads)
        if cfg.dry_run:
            from experiments.dry_run import report
            return report(cfg, cfg.dry_run)
        if DEVICE.type == "cuda":  # FSDP on one GPU too: it is what keeps float32 masters under bfloat16 compute
            torch.cuda.set_device(DEVICE)
            alone = {} if WORLD > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(minutes=30), **alone)
        elif WORLD > 1:
            dist.init_process_group("gloo", timeout=timedelta(minutes=30))
        train(cfg)
    except (ValueError, OSError, SafetensorError, CheckpointException) as e:
        leave_no_empty_run(cfg)
        fail(str(e) or type(e).__name__)
    except torch.OutOfMemoryError as e:
        fail(f"out of GPU memory ({str(e).splitlines()[0]}); lower --tokens_per_microbatch or --kv_tokens, add --recompute or --offload")
    except RuntimeError as e:  # most often a collective whose other side is gone
        traceback.print_exc()
        leave_no_empty_run(cfg)
        saved = cfg and (Path(cfg.out) / "latest").is_file()
        fail((str(e) or type(e).__name__).splitlines()[0] + (f". What was saved is whole: go on with --resume --out {cfg.out}" if saved else ""))
    except KeyboardInterrupt:
        leave_no_empty_run(cfg)
        fail("interrupted; --resume goes on from the last checkpoint, if there is one")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def leave_no_empty_run(cfg):
    with suppress(OSError, AttributeError):
        Path(cfg.out or ".").rmdir()  # fails if there is something in it


def fail(why):
    sys.exit(f"train.py: {f'rank {RANK}: ' if WORLD > 1 else ''}{why}")


if __name__ == "__main__":
    main()
