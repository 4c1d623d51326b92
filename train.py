"""The loop, top to bottom: rollout -> reward -> advantage -> K updates -> log, eval, save.

    python train.py                                        # a laptop: no GPU, no network, a minute
    torchrun --nproc_per_node=8 train.py --loss acpo --model Qwen/Qwen2.5-7B --data orz57k \\
        --template orz --prompts 128 --samples 10 --updates 2 --max_new_tokens 3072 --lr 1e-6 \\
        --beta2 0.999 --tokens_per_microbatch 16384 --recompute
    python train.py --out runs/mine --resume --steps 300   # go on where it stopped

Without --model, also under torchrun, a small model is built for a procedural task and warm-started
on demonstrations, so that the reward has something to select from. Every rank holds all rollouts
of a step (token ids are small) and computes the same plan of mini-batches and micro-batches from
them, so nobody has to hand out work. What the loop calls stands below it, in the order of calls.
"""
import argparse
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean as mean
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import data
import losses
import rewards
import tools
from model import (Model, Progress, attention_kernel, checksums, damaged, find_checkpoint, flush,
                   pack, read_json, read_tensors, replace_directory, write_tensors, write_text)
from rollout import CPU_CACHE_BYTES, GPU_CACHE_SHARE, Rollout, converse, generate

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these
WORLD = int(os.environ.get("WORLD_SIZE", 1))
MAIN = RANK == 0  # the rank that writes and speaks
GPU = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
DEVICE = GPU if torch.cuda.is_available() else torch.device("cpu")


def train(run: "Run") -> None:
    """The algorithm. From the second update on, the policy is not the one that sampled any more;
    what to do with the ratio of the two is what the objectives in losses.py differ in."""
    flags = run.flags
    # Passes over a rollout, each a dict of more hyper-parameters, {} as a rule.
    passes = list(losses.OBJECTIVES[flags.loss].passes) * flags.epochs
    while run.step < flags.steps and not run.stopped:
        run.step += 1
        metrics = dict.fromkeys(METRICS) | {"step": run.step}
        if run.step == 1:
            metrics["eval"] = evaluate(run)  # what the model can do before it learns
        began = time.time()

        # Rollout and reward: --samples scored responses to each of --prompts questions.
        rollouts, sampled = collect(run)
        rollout_seconds = time.time() - began

        # Advantage: by how much a response is better than the others of its group.
        assign_advantages(rollouts, flags)

        # Learning: in each pass K = --updates gradient steps, each on a mini-batch of its own.
        batches = minibatches(rollouts, flags)
        tokens = len(passes) * sum(r.length for minibatch in batches for r in minibatch)
        meter, norms = Meter(tokens), []
        if flags.old_logp == "trainer":
            assign_old_logp(run, rollouts, meter)
        for extra in passes:
            for minibatch in batches:
                norms.append(update(run, minibatch, extra, meter, first=not norms))
        update_seconds = time.time() - began - rollout_seconds

        # Log, evaluate, save.
        if run.step > 1 and (run.step % flags.eval_every == 0 or run.step == flags.steps):
            metrics["eval"] = evaluate(run)
        metrics |= describe(sampled, flags) | meter.means() | gradient_norms(norms)
        metrics["rollout_tps"] = sum(r.length for r in sampled) / rollout_seconds
        metrics["update_tps"] = tokens / update_seconds
        metrics["seconds"] = time.time() - began
        run.stopped = any(gather([run.stop.told]))
        run.log.write(metrics)
        give_up_on_nan(run)
        if run.stopped or run.step % flags.save_every == 0 or run.step == flags.steps:
            save(run)


# ---- Flags -------------------------------------------------------------------------------------

def flag(default, text, **limits):
    """A field of Flags. limits: least, most (of a number; usually 999,999), choices."""
    return field(default=default, metadata={"help": text, **limits})


TEMPLATES = ("auto", *data.TEMPLATES)  # in Flags `data` is a field


@dataclass
class Flags:
    """Every flag is a field. The defaults are the laptop run."""
    loss: str = flag("acpo", "objective, by its name in losses.py")
    loss_args: tuple = flag((), "its hyper-parameters, as alpha=2 eps=0.1")
    advantage: str = flag("", f"{', '.join(losses.ADVANTAGES)} (default: the objective's own)",
                          choices=("", *losses.ADVANTAGES))
    agg: str = flag("", f"{', '.join(losses.AGGREGATIONS)} (default: the objective's own)")
    acpo_stats: str = flag("batch", "statistics of acpo, or of your objective: over the mini-batch "
                           "of all ranks, or micro (official code)", choices=("batch", "micro"))

    model: str = flag("", "checkpoint directory or hub id (default: a new small model)")
    data: str = flag("chainsum", "procedural task, hub dataset, rg:NAME or a local file")
    data_args: tuple = flag((), "configuration of an rg: task, as size=4")
    eval_data: str = flag("", "held-out problems (default: the test split of --data)")
    template: str = flag("auto", ", ".join(TEMPLATES), choices=TEMPLATES)
    template_args: tuple = flag((), "for chat templates, as enable_thinking=false")
    tool: str = flag("", "what the policy may call: none, facts (of hops, whose default it is) or "
                     "search", choices=("", *tools.KINDS))
    search_url: str = flag("", "for --tool search: a Search-R1 server, as "
                           "http://127.0.0.1:8000/retrieve (default: BM25 over --data's passages)")
    turns: int = flag(10, "most turns of a policy with a tool; a reply stands between two")
    turn_tokens: int = flag(0, "longest turn (0: what is left of the response, replies included)")

    steps: int = flag(60, "rollouts, each followed by --updates gradient steps")
    prompts: int = flag(32, "questions per step")
    samples: int = flag(16, "responses per question: the group")
    updates: int = flag(4, "gradient steps per pass, each on a mini-batch of its own")
    minibatch: str = flag("", "of whole groups, or of the same number of samples of every group "
                          "(default: the objective's own)", choices=("", "groups", "samples"))
    epochs: int = flag(1, "passes over each rollout")
    max_prompt_tokens: int = flag(1024, "a longer prompt is an error")
    skip_long_prompts: bool = flag(False, "leave out questions with a longer prompt")
    max_new_tokens: int = flag(0, "longest response (0: 1024 with --model, else twice the longest "
                               "demonstration)")
    max_tokens: int = flag(0, "longest prompt + response: a long prompt shortens its responses "
                           "(0: no such limit)")
    temperature: float = flag(1.0, "of sampling, and of the trained log-probs", least=1e-3)
    dynamic_sampling: int = flag(0, "DAPO: up to so many more rollouts a step, to replace groups "
                                 "whose scores are all equal")
    overlong_buffer: int = flag(0, "DAPO: the last so many tokens cost reward, 1 in all")
    mask_truncated: bool = flag(False, "cut responses stay out of the loss")
    old_logp: str = flag("sampler", "pi_old: as the sampler recorded it, or trainer: one more "
                         "forward pass over the rollout", choices=("sampler", "trainer"))
    rollout_dtype: str = flag("", "bfloat16 or float32: sample from a copy of the weights in that "
                              "type, on a CPU (default: what the trainer computes in)",
                              choices=("", "bfloat16", "float32"))
    correction: str = flag("", f"{', '.join(losses.CORRECTIONS)}: a weight on the loss by pi_old / "
                           "pi_sampler; with --old_logp trainer")
    correction_args: tuple = flag((), "its bounds, as high=3")

    lr: float = flag(3e-4, "learning rate; 1e-6 is usual for 3B to 7B", least=1e-12)
    beta2: float = flag(0.95, "of Adam; verl's, and so ACPO's, is 0.999", most=0.999999)
    warmup: int = flag(0, "steps of linear warm-up; then the rate is constant")
    weight_decay: float = flag(0.01, "of matrices; norms and biases have none", most=1)
    clip_norm: float = flag(1.0, "largest gradient norm (0: any)")
    kl_beta: float = flag(0.0, "weight of a k3 KL penalty to the initial model")
    lora: int = flag(0, "rank of LoRA adapters on all matrices of the blocks, which alone are "
                     "trained (0: all weights are)")
    lora_alpha: int = flag(32, "LoRA's B A counts lora_alpha / lora times")
    tokens_per_microbatch: int = flag(0, "packed tokens per forward pass: lower it when memory "
                                      "runs out (0: 16384 on CUDA, 4096 on CPU)")
    recompute: bool = flag(False, "activation checkpointing: less memory, more compute")
    compile: bool = flag(False, "torch.compile the blocks for the update")
    offload: bool = flag(False, "keep weights, gradients and Adam states in CPU memory")
    shards_per_replica: int = flag(0, "HSDP: ranks that share one copy of the weights, as the 8 "
                                   "of a node (0: all)")
    kv_tokens: int = flag(0, "tokens a rank's KV cache may hold (0: most of the free GPU memory, "
                          "some GiB on a CPU)", most=10**12)

    width: int = flag(64, "hidden size of the new small model")
    layers: int = flag(2, "layers of the new small model")
    skill_steps: int = flag(300, "warm start: steps on demonstrations that work things out "
                            "(0: no warm start at all)", least=0)
    habit_steps: int = flag(60, "warm start: steps on demonstrations that guess", least=0)

    seed: int = flag(0, "of data order, sampling and the new model")
    out: str = flag("", "run directory (default: runs/default, or the next free runs/default-N)")
    resume: bool = flag(False, "continue the run in --out from its last checkpoint")
    resume_from: str = flag("", "with --resume: from this checkpoint instead, as step-000100")
    eval_every: int = flag(10, "steps between held-out evaluations")
    eval_problems: int = flag(512, "held-out problems, one sampled response each")
    track: str = flag("", "show the run in wandb, trackio or tensorboard, too",
                      choices=("", "wandb", "trackio", "tensorboard"))
    save_every: int = flag(50, "steps between checkpoints; the last is always saved")
    keep: int = flag(2, "newest checkpoints kept")
    threads: int = flag(1, "CPU threads: more than are free is far slower than one", most=2**10)
    timeout: int = flag(20, "minutes until a rank that hangs ends the others; longer than the "
                        "longest rollout")

    def hyperparameters(self) -> dict:
        return data.parse_args(self.loss_args, "--loss_args")

    def bounds(self) -> dict:
        return data.parse_args(self.correction_args, "--correction_args")


@dataclass
class Run:
    """What a run holds: all state that changes between two steps is here or in the model."""
    flags: Flags
    out: Path
    model: Model
    reference: Model | None  # the initial model, for --kl_beta
    tokenizer: object
    end_ids: list[int]  # tokens that end a response
    scorer: rewards.Scorer
    questions: list[data.Question]
    held_out: list[data.Question]
    optimizer: torch.optim.Optimizer
    log: "Log"
    stop: "StopSignal"
    tool: tools.Tool | None = None  # that the policy may call
    step: int = 0  # the last one that is done, or the one at hand
    position: int = 0  # number of the next question in the endless series
    stopped: bool = False


# ---- Rollout and reward ------------------------------------------------------------------------

def collect(run) -> tuple[list[Rollout], list[Rollout]]:
    """(rollouts to train on, all that were sampled): --prompts groups of --samples each. Dynamic
    sampling (DAPO, 2503.14476) replaces groups whose scores are all equal, as they teach nothing;
    after so many refills they are taken as they are."""
    flags, sampled, useful, flat = run.flags, [], [], []
    for _ in range(1 + flags.dynamic_sampling):
        missing = flags.prompts - len(useful)
        numbers = range(run.position, run.position + missing)
        run.position += missing
        questions = [nth_question(run, number) for number in numbers]
        rollouts = sample(run, questions, numbers, flags.samples)
        sampled += rollouts
        for group in groups_of(rollouts, flags.samples):
            same = len({r.score for r in group}) == 1
            (flat if same else useful).append(group)
        if len(useful) == flags.prompts:
            break
    chosen = useful + flat[:flags.prompts - len(useful)]
    chosen.sort(key=lambda group: group[0].group)
    return [rollout for group in chosen for rollout in group], sampled


def nth_question(run, number) -> data.Question:
    """An endless series, shuffled anew every epoch: a function of the seed and the number alone,
    so that a resumed run needs no random state."""
    epoch, i = divmod(number, len(run.questions))
    return run.questions[shuffled(len(run.questions), run.flags.seed, epoch)[i]]


@lru_cache(maxsize=2)
def shuffled(count, seed, epoch):
    order = list(range(count))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return order


def sample(run, questions, numbers, n) -> list[Rollout]:
    """n scored responses to each question, question-major, on every rank; the questions are spread
    over the ranks. `numbers` (one per question, a range) seed the sampling and name the groups."""
    flags, mine = run.flags, range(RANK, len(questions), WORLD)
    barrier()
    draw = generate
    if run.tool:
        draw = partial(converse, tool=run.tool, turns=flags.turns, turn_tokens=flags.turn_tokens)
    with whole_weights(run.model):
        rollouts = draw(
            sampling_model(run), [questions[i].ids for i in mine], n,
            [longest_response(flags, len(questions[i].ids)) for i in mine],
            temperature=flags.temperature, seed=[flags.seed * 2**40 + numbers[i] for i in mine],
            eos_ids=run.end_ids, stop=data.TEMPLATES[flags.template].stop, tokenizer=run.tokenizer,
            kv_tokens=flags.kv_tokens or None, progress=MAIN)
    asked = [i for i in mine for _ in range(n)]
    to_grade = []
    for i, rollout in zip(asked, rollouts):
        # What a tool said is not graded: it could supply the answer.
        problem, response = questions[i].problem, rollout.own(rollout.tokens[rollout.prompt_len:])
        text = data.response_text(response, run.tokenizer, run.end_ids)
        to_grade.append((problem.task, text, problem.answer))
    for i, rollout, grade in zip(asked, rollouts, run.scorer(to_grade)):
        rollout.group = numbers[i]
        rollout.score, rollout.status = grade
    # The sort is stable: a group's samples stay in order, whichever rank drew them.
    return sorted(gather(rollouts), key=lambda rollout: numbers.index(rollout.group))


def sampling_model(run) -> Model:
    """The model, or its copy in --rollout_dtype: a sampler that is not quite the trainer."""
    dtype = rollout_dtype(run.flags)
    return run.model if dtype == compute_dtype() else copy.deepcopy(run.model).to(dtype)


def rollout_dtype(flags) -> torch.dtype:
    return getattr(torch, flags.rollout_dtype) if flags.rollout_dtype else compute_dtype()


def longest_response(flags, prompt: int) -> int:
    """To a prompt of so many tokens."""
    room = flags.max_tokens - prompt if flags.max_tokens else math.inf
    return min(flags.max_new_tokens, room)


def evaluate(run) -> float:
    """Mean score of one sampled response to each held-out question; their numbers are below 0,
    training's are not, so that no seed serves both."""
    numbers = range(-1, -1 - len(run.held_out), -1)
    return mean(r.score for r in sample(run, run.held_out, numbers, 1))


@contextmanager
def whole_weights(model):
    """Under FSDP, keep all weights gathered inside, and call the blocks past its hooks: sampling
    takes thousands of forward passes, of another number on every rank, and none of them may wait
    for a collective."""
    units = [m for m in model.modules() if hasattr(m, "unshard")]
    for unit in units:
        unit.unshard()
    model.gathered = True
    try:
        yield
    finally:
        model.gathered = False
        for unit in units:
            unit.reshard()
        if DEVICE.type == "cuda":  # else the update would fragment the memory of the KV cache
            torch.cuda.empty_cache()


# ---- Advantage ---------------------------------------------------------------------------------

def assign_advantages(rollouts, flags) -> None:
    """Sets .advantage, .pass_rate and .group_won of every rollout."""
    scores = torch.tensor([r.score for r in rollouts])
    lengths = torch.tensor([r.length for r in rollouts])
    reward = scores
    if flags.overlong_buffer:  # DAPO's soft punishment of what is nearly too long: 1 in all
        whole = torch.tensor([len(r.logp) for r in rollouts])  # replies of a tool count as well
        limits = torch.tensor([longest_response(flags, r.prompt_len) for r in rollouts])
        over = whole - (limits - flags.overlong_buffer)
        reward = scores - over.clamp(min=0) / flags.overlong_buffer
    kind = flags.advantage or losses.OBJECTIVES[flags.loss].advantage
    advantages = losses.advantages(reward, flags.samples, kind, lengths)
    for rollout, advantage in zip(rollouts, advantages.tolist()):
        rollout.advantage = advantage
    for group in groups_of(rollouts, flags.samples):
        for rollout in group:
            rollout.pass_rate = mean(r.score for r in group)
            rollout.group_won = any(r.advantage > 0 for r in group)


# ---- Learning ----------------------------------------------------------------------------------

def groups_of(items, size) -> list[list]:
    return [items[i:i + size] for i in range(0, len(items), size)]


def minibatches(rollouts, flags) -> list[list[Rollout]]:
    """At most K lists, of whole groups or, by samples, of some samples of every group: the first of
    each, then the second of each. With more updates than groups (or samples), of responses."""
    size = flags.samples
    if (flags.minibatch or losses.OBJECTIVES[flags.loss].minibatch) == "samples":
        rollouts = [rollout for j in range(size) for rollout in rollouts[j::size]]
        size = flags.prompts
    units = groups_of(rollouts, size)
    if flags.updates > len(units):
        units = groups_of(rollouts, 1)
    borders = [round(k * len(units) / flags.updates) for k in range(flags.updates + 1)]
    batches = []
    for first, last in zip(borders, borders[1:]):
        batch = [rollout for unit in units[first:last] for rollout in unit]
        if flags.mask_truncated:
            batch = [rollout for rollout in batch if rollout.finished]
        if batch:
            batches.append(batch)
    return batches


def update(run, minibatch, extra, meter, first=False) -> float:
    """One gradient step on a mini-batch, which every rank holds whole; each takes its own
    micro-batches. `extra`: hyper-parameters of this pass. `first`: nothing has been updated since
    the rollout. Returns the gradient norm; where it is not finite, the step was skipped."""
    flags, objective = run.flags, losses.OBJECTIVES[run.flags.loss]
    hyper = flags.hyperparameters() | extra
    mine = microbatches(minibatch, flags.tokens_per_microbatch)[RANK::WORLD]
    barrier()
    # Counts over the whole mini-batch on all ranks: the losses of micro-batches just add up.
    totals = {"tokens": sum(r.length for r in minibatch), "sequences": len(minibatch),
              # a part of a group that is spread over mini-batches, or cut by --mask_truncated
              "winning_groups": sum(r.group_won for r in minibatch) / flags.samples}
    if objective.statistics and flags.acpo_stats == "batch":
        # pi_old is still the policy, but for a sampler in another dtype
        same = first and (flags.old_logp == "trainer" or rollout_dtype(flags) == compute_dtype())
        totals["statistics"] = statistics(run, objective, mine, hyper, same)

    for micro in mine:
        if flags.shards_per_replica:  # HSDP: the replicas' gradients meet once, at the end
            run.model.set_requires_all_reduce(micro is mine[-1])
        ref_logp = None
        if run.reference is not None:
            run.reference.use_lora(False)  # it is run.model itself, if that has adapters
            with torch.no_grad():
                ref_logp = token_stats(run.reference, micro, flags).logp
            run.reference.use_lora(True)
        tokens = token_stats(run.model, micro, flags)
        if not micro:  # an empty bin: under FSDP, this rank too must take part in every pass
            tokens.logp.sum().backward()
            continue
        sampler_logp = padded(tokens.mask, joined([r.own(r.logp) for r in micro]))
        loss, metrics = losses.policy_loss(
            flags.loss, tokens.logp, tokens.old_logp, per_rollout(micro, "advantage"), tokens.mask,
            agg=flags.agg or None, entropy=tokens.entropy, sum_p2=tokens.sum_p2,
            pass_rate=per_rollout(micro, "pass_rate"), group_size=flags.samples,
            max_len=flags.max_tokens or flags.max_new_tokens, totals=totals, ref_logp=ref_logp,
            kl_beta=flags.kl_beta, sampler_logp=sampler_logp,
            correction=flags.correction or None, correction_args=flags.bounds(), **hyper)
        (loss * WORLD).backward()  # FSDP averages over ranks, while `totals` count all of them
        metrics["entropy"] = tokens.entropy[tokens.mask].mean()
        meter.add(metrics, int(tokens.mask.sum()))
        if first and flags.old_logp == "sampler":
            meter.compare(tokens)
    return step_optimizer(run)


def step_optimizer(run) -> float:
    """Clip the gradient's norm and take Adam's step, unless something in it is not finite."""
    flags = run.flags
    for group in run.optimizer.param_groups:
        group["lr"] = flags.lr * min(1.0, run.step / max(1, flags.warmup))
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), flags.clip_norm or math.inf)
    if hasattr(norm, "full_tensor"):  # sharded: each rank has a part of it
        norm = norm.full_tensor()
    norm = norm.item()
    if math.isfinite(norm):
        run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


def microbatches(rollouts, budget) -> list[list[Rollout]]:
    """Bins of nearly equal tokens, at most `budget` unless a rollout alone is longer. Their number
    is a multiple of the ranks, and rank r takes bins r, r + WORLD, ...; a bin may be empty."""
    pads = attention_kernel(DEVICE, compute_dtype()) == "sdpa"
    longest = defaultdict(int)  # of each group
    for rollout in rollouts:
        longest[rollout.group] = max(longest[rollout.group], len(rollout.tokens))

    def order(rollout):
        """Like lengths together where attention pads them; else groups, which share a prompt."""
        length = len(rollout.tokens) if pads else longest[rollout.group]
        return length, rollout.group
    rollouts = sorted(rollouts, key=order)
    size = sum(len(r.tokens) for r in rollouts)
    count = WORLD * math.ceil(size / (budget * WORLD))
    while True:
        bins, seen = [[] for _ in range(count)], 0
        for rollout in rollouts:
            middle = seen + len(rollout.tokens) / 2
            bins[int(middle / size * count)].append(rollout)
            seen += len(rollout.tokens)
        if all(len(b) < 2 or sum(len(r.tokens) for r in b) <= budget for b in bins):
            return bins
        count += WORLD


class TokenStats(NamedTuple):
    """(B,T) tensors of a micro-batch, a row per response, padded on the right with 0. What a tool
    said is context alone: it has no place here."""
    mask: Tensor  # bool: where there is a token that the policy drew
    old_logp: Tensor
    logp: Tensor  # with gradient
    entropy: Tensor
    sum_p2: Tensor


def token_stats(model, rollouts, flags) -> TokenStats:
    """The model's view of the response tokens. The model sees no padding (see model.pack)."""
    mask, old_logp = recorded(rollouts)
    sequences = [r.tokens for r in rollouts]
    prompt_lens = [r.prompt_len for r in rollouts]
    drawn = [r.drawn for r in rollouts]
    now = model(*pack(sequences, prompt_lens, DEVICE, drawn), flags.temperature)
    return TokenStats(mask, old_logp, *(padded(mask, t) for t in now))


def recorded(rollouts) -> tuple[Tensor, Tensor]:
    """(mask, log-probs of pi_old): (B,T) each."""
    lengths = torch.tensor([r.length for r in rollouts], dtype=torch.long, device=DEVICE)
    longest = max((r.length for r in rollouts), default=1)
    mask = torch.arange(longest, device=DEVICE) < lengths[:, None]
    # old_logp is there where the trainer computed it again: --old_logp trainer
    return mask, padded(mask, joined([r.old_logp or r.own(r.logp) for r in rollouts]))


def joined(rows) -> Tensor:
    return torch.tensor([x for row in rows for x in row], device=DEVICE, dtype=torch.float32)


def padded(mask, numbers) -> Tensor:
    """`numbers` (1-D) at the places of the mask, row after row, 0 elsewhere: (B,T)."""
    return torch.zeros_like(mask, dtype=numbers.dtype).masked_scatter(mask, numbers)


def per_rollout(rollouts, name) -> Tensor:
    return torch.tensor([getattr(r, name) for r in rollouts], device=DEVICE)


@torch.no_grad()
def statistics(run, objective, mine, hyper, same) -> Tensor:
    """What an objective must know of the whole mini-batch before its first loss (ACPO: moments of
    the ratio), summed over all ranks: one more forward pass. While the policy is the `same` as
    pi_old, the ratio is 1 but for rounding, and the pass is spared."""
    total = 0
    for micro in mine:
        mask, old_logp = recorded(micro)
        logp = old_logp if same else token_stats(run.model, micro, run.flags).logp
        total = total + objective.statistics(logp, old_logp, mask, **hyper)
    if WORLD > 1:
        dist.all_reduce(total)
    return total


@torch.no_grad()
def assign_old_logp(run, rollouts, meter) -> None:
    """Sets .old_logp to the trainer's own log-probs, on every rank; .logp stays the sampler's."""
    mine = []
    numbered = {id(rollout): i for i, rollout in enumerate(rollouts)}
    for micro in microbatches(rollouts, run.flags.tokens_per_microbatch)[RANK::WORLD]:
        tokens = token_stats(run.model, micro, run.flags)
        meter.compare(tokens)
        for rollout, logp in zip(micro, tokens.logp):
            mine.append((numbered[id(rollout)], logp[:rollout.length].tolist()))
    for i, logp in gather(mine):
        rollouts[i].old_logp = logp


# ---- Metrics -----------------------------------------------------------------------------------

METRICS = """step reward eval length entropy clip_low clip_high ratio_mean ratio_std approx_kl
grad_norm zero_groups truncated calls failed_calls no_answer unparsable timeout error skipped
refills pos_peak pos_valley neg_peak neg_valley sampler_kl sampler_max sampler_ess masked
rollout_tps update_tps seconds""".split()
SHOWN = "reward eval length entropy clip_low clip_high rollout_tps seconds".split()
STATUSES = ("no_answer", "unparsable", "timeout", "error")


class Meter:
    """Means over the tokens of a step, whatever the cut into micro-batches and ranks: sums travel,
    and a root is taken once, in the end."""

    def __init__(self, total=0):
        self.total, self.progress = total, Progress()  # tokens of all updates of the step
        self.sums = Counter()
        self.log_rho = [torch.zeros(0)]  # rho: the trainer's probability of a token / the sampler's

    def add(self, metrics: dict[str, Tensor], tokens: int) -> None:
        values = torch.stack([v.double() for v in metrics.values()]).tolist()  # waits once
        for name, value in zip(metrics, values):
            self.sums[name] += value * tokens
        self.sums["tokens"] += tokens
        if self.total:
            done = WORLD * self.sums["tokens"]  # the other ranks are about as far
            self.progress.show(done / self.total, f"updates: {done:,.0f} of {self.total:,} tokens")

    def compare(self, tokens: TokenStats) -> None:
        """Sampler against trainer, before anything is updated or clipped."""
        log_rho = tokens.logp.detach() - tokens.old_logp
        self.log_rho.append(log_rho[tokens.mask].double().cpu())

    def means(self) -> dict[str, float]:
        """Over all ranks, which must all call it."""
        sums, log_rho = Counter(), []
        for meter in gather([self]):
            sums.update(meter.sums)  # adds
            log_rho += meter.log_rho
        tokens = sums.pop("tokens", 0)
        means = {name: value / tokens for name, value in sums.items()}
        if means:
            variance = means.pop("ratio_sq") - (means["ratio_mean"] - 1)**2
            means["ratio_std"] = math.sqrt(max(0.0, variance))
        log_rho = torch.cat(log_rho)
        if not len(log_rho):
            log_rho = torch.zeros(1)  # nothing was compared: no difference
        k3, rho = log_rho.expm1() - log_rho, log_rho.exp()
        return means | {
            "sampler_kl": k3.mean().item(), "sampler_max": log_rho.abs().max().item(),
            "sampler_ess": (rho.mean()**2 / rho.square().mean()).item()}  # effective sample size


def gradient_norms(norms) -> dict:
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {"grad_norm": mean(finite) if finite else None, "skipped": len(norms) - len(finite)}


def describe(rollouts, flags) -> dict:
    """Metrics of everything that was sampled in a step."""
    groups = groups_of(rollouts, flags.samples)
    shares = {status: mean(r.status == status for r in rollouts) for status in STATUSES}
    counts = {name: mean(getattr(r, name) for r in rollouts)
              for name in ("length", "calls", "failed_calls")}
    return shares | counts | {
        "reward": mean(r.score for r in rollouts),
        "truncated": mean(not r.finished for r in rollouts),
        "zero_groups": mean(len({r.score for r in group}) == 1 for group in groups),
        "refills": len(groups) - flags.prompts}


class Log:
    """metrics.jsonl, curves.png and the terminal. Only the main rank writes."""

    def __init__(self, flags, out, history):
        self.flags, self.out, self.history = flags, out, history
        self.last_draw = time.time()  # not in the first minute: it costs a second
        self.lines, self.tracker = SimpleQueue(), None  # what --track has not seen yet; its thread
        self.path = out / "metrics.jsonl"
        self.bar = tqdm(total=flags.steps, initial=len(history), desc=flags.loss, unit="step",
                        disable=None if MAIN else True)  # None: where stderr is no terminal

    def write(self, metrics) -> None:
        # JSON has no NaN; None, what was not measured, stays.
        metrics = {k: v if math.isfinite(v or 0) else None for k, v in metrics.items()}
        self.history.append(metrics)
        if not MAIN:
            return
        with naming(self.path), open(self.path, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        evals = list(self.evals().values()) or [None]
        shown = metrics | {"eval": evals[-1]}  # the last one made
        text = " ".join(f"{k} {shown[k]:.3g}" for k in SHOWN if shown[k] is not None)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable:
            print(f"step {metrics['step']}/{self.flags.steps} {text}", flush=True)
        if time.time() - self.last_draw > 60:
            self.draw()
        if self.flags.track:
            self.track(metrics)

    def draw(self):
        self.last_draw = time.time()
        try:
            draw_curves(self.out, self.flags.loss, self.history)
        except (OSError, RuntimeError, ValueError) as e:  # no picture is worth a run
            tqdm.write(f"curves.png not drawn: {e}")

    def track(self, metrics):
        known = {k: v for k, v in metrics.items() if v is not None and k != "step"}
        self.lines.put((metrics["step"], known))
        if not self.tracker:
            # Step 1 has times that no other run has: a resumed run finds its name again.
            first = hashlib.sha256(json.dumps(self.history[0]).encode()).hexdigest()
            args = self.flags, f"{self.out.name}-{first[:6]}", metrics["step"], self.lines
            sys.stdin = open(os.devnull)  # wandb would ask for a key, and the run never end
            self.tracker = threading.Thread(target=track, args=args, daemon=True)
            self.tracker.start()

    def close(self):
        self.draw()
        self.bar.close()
        if self.tracker:
            self.lines.put(None)
            self.tracker.join(TRACKER_PATIENCE)
            if self.tracker.is_alive():
                print(f"--track {self.flags.track} does not answer and is left behind")

    def evals(self) -> dict[int, float]:
        """Held-out accuracy after so many steps; the first is measured before any."""
        found = {m["step"]: m["eval"] for m in self.history if m["eval"] is not None}
        return {step if step > 1 else 0: accuracy for step, accuracy in found.items()}


TRACKER_PATIENCE = 60  # seconds that a run waits for it in the end


def track(flags, name, first_step, lines) -> None:
    """The thread of --track: config, `lines` (step, metrics) until None and the last curves go to a
    viewer. It may fail or hang, and no run stops or waits for that."""
    out, lines, config = Path(flags.out), iter(lines.get, None), dataclasses.asdict(flags)
    try:
        if flags.track == "tensorboard":
            from matplotlib.image import imread
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(out / "tensorboard", purge_step=first_step)
            board.add_text("config", json.dumps(config))
            for step, metrics in lines:
                for key, value in metrics.items():
                    board.add_scalar(key, value, step)
            board.add_image("curves", imread(out / "curves.png"), step, dataformats="HWC")
            board.close()
        else:
            board = importlib.import_module(flags.track)
            which = {"id": name, "dir": out} if flags.track == "wandb" else {"name": name}
            board.init(project="rlvr", config=config, resume="allow", **which)
            for step, metrics in lines:
                board.log(metrics, step=step)
            board.log({"curves": board.Image(str(out / "curves.png"))}, step=step)
            board.finish()
    except (Exception, SystemExit) as e:
        tqdm.write(f"--track {flags.track} ends: {type(e).__name__}, {data.first_line(e)}")


@contextmanager
def naming(path):
    """The error of a full disk says which file did not fit."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise OSError(f"{path}: cannot be written ({e})") from None


def give_up_on_nan(run) -> None:
    """Three steps running with an update that was not finite: nothing will come of it any more."""
    last = run.log.history[-3:]
    if len(last) == 3 and all(m["skipped"] for m in last):
        raise ValueError("loss or gradient not finite in three steps running: lower --lr, or look "
                         f"at --loss; {run.out}/metrics.jsonl has what came before")


PANELS = ("reward eval", "length", "entropy", "clip_low clip_high", "ratio_std", "grad_norm")


def draw_curves(out, title, history) -> None:
    """curves.png, drawn aside and renamed, so that a viewer never sees half a picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6))
    for axis, names in zip(axes.flat, PANELS):
        for name in names.split():
            points = [(m["step"], m[name]) for m in history if m[name] is not None]
            axis.plot(*zip(*points), "o-" if name == "eval" else "-", ms=4, label=name)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
    figure.suptitle(f"{title}: by step (rollout)")
    figure.tight_layout()
    figure.savefig(out / ".curves.png", dpi=110)
    pyplot.close(figure)
    (out / ".curves.png").replace(out / "curves.png")


# ---- Keeping what was learned ------------------------------------------------------------------

def save(run) -> None:
    """out/step-000120: a Hugging Face checkpoint, and in resume/ what else it takes to go on. Each
    file is flushed to the disk before the directory gets its name, and `latest` is written last:
    after a kill or a power cut, `latest` names a checkpoint that is whole."""
    name = f"step-{run.step:06d}"
    aside = run.out / f".{name}"
    with naming(run.out / name):
        run.model.save_pretrained(aside, compute_dtype(), write=MAIN)
        if MAIN:
            (aside / "resume").mkdir()
        write_tensors(aside / "resume", trained_state(run), torch.float32, write=MAIN)
        if MAIN:
            flush(run.log.path)  # no checkpoint without the metrics of its steps
            state = {"step": run.step, "position": run.position}
            write_text(aside / "resume/state.json", json.dumps(state))
            write_text(aside / "resume/checksums.json", json.dumps(checksums(aside), indent=1))
            replace_directory(aside, run.out / name)
            write_text(run.out / "latest", name)
            known = [p for p in checkpoints(run.out) if p.name <= name]
            for old in known[:-run.flags.keep]:
                shutil.rmtree(old)
    barrier()


def restore(run, checkpoint) -> None:
    """The inverse of save(), for any number of ranks. Safetensors and JSON alone: the run directory
    of a stranger cannot run code."""
    state = read_json(checkpoint / "resume/state.json")
    step, position = state.get("step"), state.get("position")
    if step != int(checkpoint.name[5:]) or type(position) is not int or position < 0:
        raise ValueError(f"--resume: {checkpoint}/resume/state.json has not the numbers of this "
                         "checkpoint; choose another with --resume_from")
    files = sorted((checkpoint / "resume").glob("*.safetensors"))
    read_tensors([p for p in files if p.is_file()], trained_state(run))  # a pipe would hang
    run.step, run.position = step, position


def trained_state(run) -> dict[str, Tensor]:
    """Trained float32 weights and Adam's numbers by name: what save() writes and restore() fills.
    Frozen weights come from --model again."""
    state = {}
    for name, p in run.model.named_parameters():
        if not p.requires_grad:
            continue
        adam = run.optimizer.state[p]
        if not adam:  # as AdamW itself begins
            adam["step"] = torch.zeros((), device=p.device)
            adam["exp_avg"] = torch.zeros_like(p)
            adam["exp_avg_sq"] = torch.zeros_like(p)
        state[f"weight.{name}"] = p
        state |= {f"{key}.{name}": value for key, value in adam.items()}
    return state


def checkpoints(out) -> list[Path]:
    """The checkpoints of run `out`, oldest first. Directories of any other name are somebody
    else's, and never touched."""
    found = sorted(out.glob("step-" + 6 * "[0-9]"))
    return [p for p in found if (p / "resume").is_dir() and not p.is_symlink()]


def checkpoint_to_resume(out, wanted) -> Path | None:
    """The directory to go on from: --resume_from, or what `latest` names, or the newest there is.
    None where a run was killed before its first checkpoint."""
    names, latest = [p.name for p in checkpoints(out)], out / "latest"
    name = wanted or "".join(names[-1:])
    if latest.is_file() and not wanted:
        name = latest.read_text().strip()
    if not name:
        return None
    if name not in names:
        raise ValueError(f"--resume: {out / name} is no checkpoint of this run, which has "
                         f"{', '.join(names) or 'none'}; choose with --resume_from")
    if broken := damaged(out / name):
        whole = [other for other in names if not damaged(out / other)]
        advice = f"go back with --resume_from {whole[-1]}" if whole else "no other one is whole"
        raise ValueError(f"--resume: {broken}; {advice}")
    return out / name


def history_until(out, step) -> list[dict]:
    """The metrics up to `step`; the lines after it, of steps that will be made again, leave the
    file. The evaluation that was only made because a shorter run ended at `step` goes too."""
    path, every = out / "metrics.jsonl", read_json(out / "config.json").get("eval_every", 1)
    written = path.read_text(errors="replace").splitlines() if path.is_file() else []
    lines = []
    for number in range(1, step + 1):
        try:
            metrics = json.loads(written[number - 1])
            values = [metrics[name] for name in METRICS]
            sane = metrics["step"] == number and all(v is None or abs(v) < 1e30 for v in values)
        except (LookupError, TypeError, ValueError, RecursionError):
            sane = False
        if not sane:
            raise ValueError(f"--resume: {path} line {number} is not what step {number} wrote; put "
                             f"it back, or start a new run with --model {out}")
        lines.append(metrics)
    if step > 1 and step % int(every):
        lines[-1]["eval"] = None
    write_text(path, "".join(json.dumps(m) + "\n" for m in lines))
    return lines


# ---- Setting up --------------------------------------------------------------------------------

def set_up(flags) -> Run:
    out = Path(gather([str(open_run(flags)) if MAIN else ""])[0])  # rank 0 says which
    flags.out = str(out)
    checkpoint = checkpoint_to_resume(out, flags.resume_from) if flags.resume else None
    source = flags.model or small_model(flags)
    model = load_model(source, flags)
    tokenizer = data.load_tokenizer(model.source)
    flags.template = data.choose_template(flags.template, tokenizer)
    questions, held_out = load_questions(flags, model, tokenizer)
    reference = model if flags.kl_beta else None
    if flags.kl_beta and not flags.lora:
        reference = load_model(source, flags).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": flags.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=flags.lr, betas=(0.9, flags.beta2), fused=True)
    end_ids = data.end_ids(tokenizer, model.eos_ids, model.config.vocab_size)
    tool = tools.make(flags.tool, data.facts_of(flags.data), flags.search_url,
                      partial(data.passages, flags.data))
    run = Run(flags, out, model, reference, tokenizer, end_ids, rewards.Scorer(workers=2),
              questions, held_out, optimizer, log=None, stop=StopSignal(), tool=tool)
    if checkpoint:
        restore(run, checkpoint)
    if run.step >= flags.steps:
        if MAIN:
            print(f"the run in {out} has done {run.step} of --steps {flags.steps}: it is complete, "
                  "and a larger --steps goes on from there")
        sys.exit(0)
    barrier()  # all ranks have read what begin() now cuts
    history = []
    if MAIN:
        with naming(out):
            history = begin(run, checkpoint)
        introduce(run)
    history = gather([history] if MAIN else [])[0]  # on every rank
    run.log = Log(flags, out, history)
    return run


def begin(run, checkpoint) -> list[dict]:
    """Makes the directory that of this run, and returns the metrics up to the checkpoint."""
    flags, history = run.flags, []
    if checkpoint:  # a kill from here on must not bring back a later one, as its metrics go now
        write_text(run.out / "latest", checkpoint.name)
    if flags.resume:
        history = history_until(run.out, run.step)
    kept = {**dataclasses.asdict(flags), "resume": False, "resume_from": ""}
    write_text(run.out / "config.json", json.dumps(kept, indent=1))
    return history


def introduce(run) -> None:
    flags, count = run.flags, sum(p.numel() for p in run.model.parameters())
    print(f"{flags.model or 'a new small model'}: {count:,} parameters on {WORLD} x {DEVICE.type}, "
          f"attention {attention_kernel(DEVICE, compute_dtype())}; run directory {run.out}\n"
          f"{flags.data}: {len(run.questions):,} questions, template {flags.template}; a step is "
          f"{flags.prompts} x {flags.samples} responses of up to {flags.max_new_tokens:,} tokens, "
          f"{flags.prompts * flags.samples * flags.max_new_tokens:,} at most, and {flags.updates} "
          f"updates with {flags.loss}; evaluated on {len(run.held_out)} held-out questions before "
          f"the first, every {flags.eval_every} and after the last\n"
          f"{memory_plan(run)}", flush=True)
    kind = flags.advantage or losses.OBJECTIVES[flags.loss].advantage
    if flags.samples == 1 and kind not in ("reward", "signed"):
        print("--samples 1: a group of one has no baseline, every advantage is 0; "
              "try --advantage signed")


def memory_plan(run) -> str:
    flags, size = run.flags, 0
    # float32 each: itself, its gradient, Adam's two numbers, and what it was at the start
    copies = 4 if run.reference in (None, run.model) else 5
    for p in run.model.parameters():
        if p.requires_grad:
            size += 4 * copies * p.numel() / (flags.shards_per_replica or WORLD)
        else:  # frozen ones count whole: a rollout gathers them
            size += p.element_size() * p.numel()
    cache = f"{CPU_CACHE_BYTES / 2**30:g} GiB"
    if DEVICE.type == "cuda":
        cache = f"{GPU_CACHE_SHARE:.0%} of what is free"
    if flags.kv_tokens:
        cache = f"{flags.kv_tokens:,} tokens"
    return (f"memory of a rank: {size / 2**20:,.1f} MiB of weights, gradients and Adam's numbers, "
            f"a KV cache of up to {cache}, forward passes over {flags.tokens_per_microbatch:,} "
            "tokens")


def open_run(flags) -> Path:
    """The run directory, locked. A new run never takes one that holds a run already."""
    out, number = Path(flags.out or "runs/default"), 1
    while True:
        try:
            lock(out, new=not flags.resume)
            return out
        except (BlockingIOError, FileExistsError):  # in use, or holds a run
            if flags.out:
                raise
        number += 1
        out = Path(f"runs/default-{number}")


RUN_FILES = ("config.json", "metrics.jsonl", "latest")
LEFT_BY_KILLED_RUNS = (r"\.{1,2}step-\d{6}(\.(old\.)?\d+)?|\.curves\.png|"
                       r"\.(latest|config\.json|metrics\.jsonl)\.\d+")
LOCKS = []  # open files: a lock goes with its process, however that ends


def lock(out, new) -> None:
    """Claim directory `out` for this process. Raises BlockingIOError where another one has it, and
    FileExistsError where a new run finds a run."""
    with naming(out):
        missing = [p for p in (out, *out.parents) if not p.exists()]
        out.mkdir(parents=True, exist_ok=True)
        for directory in missing:  # a power cut must not take the directory of a flushed checkpoint
            flush(directory.parent)
    file = open_lock(out / ".lock")
    if new and (checkpoints(out) or any(os.path.lexists(out / name) for name in RUN_FILES)):
        raise FileExistsError(f"--out {out} holds a run already: choose another directory, or "
                              "continue it with --resume")
    LOCKS.append(file)
    for left in out.iterdir():
        if re.fullmatch(LEFT_BY_KILLED_RUNS, left.name):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def open_lock(path, wait=False):
    """A file that no other process has locked while this one keeps it open; it says who that is."""
    nofollow = getattr(os, "O_NOFOLLOW", 0)  # a link planted there would empty another file
    file = open(os.open(path, os.O_RDWR | os.O_CREAT | nofollow, 0o644), "r+")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except ImportError:  # Windows: no lock
        pass
    except BlockingIOError:
        raise BlockingIOError(f"--out {path.parent}: process {file.read(20).strip()} is at work "
                              "there; wait for it, or choose another directory") from None
    if not os.fstat(file.fileno()).st_nlink:  # removed by a start that failed
        raise BlockingIOError(f"{path.parent}: another process was at work there")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def load_model(source, flags) -> Model:
    """Float32 weights, sharded over the ranks, or whole on a single CPU."""
    model = Model.from_config(source)
    if flags.lora:  # frozen weights need no float32 masters
        model.to(compute_dtype()).add_lora(flags.lora, flags.lora_alpha, flags.model or source)
    model.recompute = flags.recompute
    if flags.compile:
        for layer in model.layers:
            layer.compile(dynamic=True)
    if not dist.is_initialized():
        return model.to_empty(device=DEVICE).load_weights(flags.seed)
    shards = flags.shards_per_replica or WORLD
    mesh = dist.init_device_mesh(DEVICE.type, (WORLD // shards, shards),
                                 mesh_dim_names=("replica", "shard"))
    shard(model, mesh if shards < WORLD else mesh["shard"], flags.offload)
    model.to_empty(device="cpu" if flags.offload else DEVICE).load_weights(flags.seed)
    with torch.no_grad():  # FSDP learns which module is the root from the first that runs
        model(*pack([], [], DEVICE))
    model.reshard()  # the root stays gathered after a pass; the optimizer must see the shards
    return model


def shard(model, mesh, offload=False) -> Model:
    """FSDP2, a unit per block: float32 masters and gradients, compute in compute_dtype(). A mesh of
    two dimensions (replicas, shards) is HSDP. Applied from outside: model.py knows nothing of it.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    precision = MixedPrecisionPolicy(compute_dtype(), reduce_dtype=torch.float32,
                                     cast_forward_inputs=False)
    how = {"mesh": mesh, "mp_policy": precision}
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=DEVICE.type == "cuda")
    elif mesh.size() == 1:  # gathering LoRA's frozen weights on one card would copy them
        how["ignored_params"] = {p for p in model.parameters() if not p.requires_grad}
    for layer in model.layers:
        fully_shard(layer, **how)
    return fully_shard(model, reshard_after_forward=False, **how)


def compute_dtype() -> torch.dtype:
    return torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def load_questions(flags, model, tokenizer):
    """(questions to train on, held-out questions). A set without a test split gives some up."""
    args = data.parse_args(flags.data_args, "--data_args")
    procedural = flags.data in data.TASKS or flags.data.startswith("rg:")
    seed = flags.seed if procedural else 0
    problems = data.load(flags.data, "train", seed=seed, args=args)
    if flags.eval_data:
        of_gym = flags.eval_data.startswith("rg:")
        held_out = data.load(flags.eval_data, "test", args=args if of_gym else {})
    else:
        held_out = data.held_out(flags.data, args=args)
        kept_back = {p.id for p in held_out}
        problems = [p for p in problems if p.id not in kept_back]
    held_out = held_out[:flags.eval_problems]
    if not held_out:
        raise ValueError(f"--data {flags.data}: one problem alone cannot be trained on and held "
                         "out; give --eval_data")
    context = model.config.max_position_embeddings
    if flags.max_tokens > context:
        raise ValueError(f"--max_tokens {flags.max_tokens}: the model's context is {context}")
    room = flags.max_tokens - 1 if flags.max_tokens else context - flags.max_new_tokens
    longest = min(flags.max_prompt_tokens, room)
    chat_args = data.parse_args(flags.template_args, "--template_args")
    try:
        data.check_golds([*problems, *held_out], rewards.check_gold)
        both = [data.encode(some, flags.template, tokenizer, longest, chat_args,
                            flags.skip_long_prompts) for some in (problems, held_out)]
        if not all(both):
            raise ValueError("every prompt is too long")
        return both
    except ValueError as e:
        limits = f"--max_prompt_tokens {longest}, --max_new_tokens {flags.max_new_tokens}"
        raise ValueError(f"--data {flags.data}: {e} ({limits})") from None


def small_model(flags) -> Path:
    """The checkpoint of the default run's Qwen2, cached by its recipe under runs/warmstart: trained
    to work things out, then mostly to guess, so that the reward has something to bring back."""
    if flags.data not in data.TASKS:
        raise ValueError(f"--data {flags.data} needs --model: a new small model is built for "
                         f"{', '.join(data.TASKS)} alone")
    tokenizer = data.char_tokenizer(flags.data)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "vocab_size": len(tokenizer), "hidden_size": flags.width,
        "intermediate_size": 3 * flags.width, "num_hidden_layers": flags.layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "initializer_range": 0.1,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "eos_token_id": tokenizer.convert_tokens_to_ids(data.END),
        "pad_token_id": tokenizer.pad_token_id}
    recipe = [config, flags.data, flags.seed, flags.skill_steps, flags.habit_steps, "v2"]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = Path("runs/warmstart") / digest
    if MAIN and not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_lock(path.with_suffix(".lock"), wait=True):  # of first runs at once, one makes it
            if not path.is_dir():
                with naming(path):
                    make_small_model(path, config, tokenizer, flags)
    barrier()
    return path


def make_small_model(path, config, tokenizer, flags) -> None:
    for left in path.parent.glob(f".*{path.name}*"):  # by one that was killed
        shutil.rmtree(left)
    model = Model.from_scratch(config, flags.seed, DEVICE)
    if flags.skill_steps:
        warm_start(model, tokenizer, flags)
    aside = path.with_name(f".{path.name}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    replace_directory(aside, path)


def warm_start(model, tokenizer, flags) -> None:
    """Maximum likelihood on demonstrations: first of the skill, then of the lazy habit."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for phase, steps in (("skill", flags.skill_steps), ("habit", flags.habit_steps)):
        demos, progress = data.demos(flags.data, 128 * steps, phase, flags.seed), Progress()
        for step, some in enumerate(groups_of(demos, 128)):
            optimizer.param_groups[0]["lr"] = 1.5e-3 * (1 + math.cos(math.pi * step / steps))
            prompts = tokenizer([prompt for prompt, _ in some]).input_ids
            # Of a list, the odd parts are a tool's: context, not to be learnt.
            parts = [[r] if isinstance(r, str) else r for _, r in some]
            answers = tokenizer(["".join(response) for response in parts]).input_ids
            drawn = [[i % 2 == 0 for i, part in enumerate(response) for _ in part]
                     for response in parts]  # a token is a character
            sequences = [p + r for p, r in zip(prompts, answers)]
            logp, _, _ = model(*pack(sequences, [len(p) for p in prompts], DEVICE, drawn))
            loss = -logp.mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.show(step / steps, f"warm start, {phase}: step {step} of {steps}, "
                          f"loss {loss.item():.3f}")


# ---- Ranks and signals -------------------------------------------------------------------------

HOST = None  # the group in which the ranks' Python sides meet
PATIENCE = None  # for a rank that does not come: --timeout


def start_ranks(flags) -> None:
    global HOST, PATIENCE
    PATIENCE = timedelta(minutes=flags.timeout)
    if DEVICE.type == "cuda":  # FSDP on one GPU too: it keeps float32 masters under bfloat16
        torch.cuda.set_device(DEVICE)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        alone = {} if WORLD > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE, **alone)
    elif WORLD > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
    if WORLD > 1:
        HOST = dist.new_group(backend="gloo", timeout=PATIENCE)


def gather(items: list) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    if WORLD == 1:
        return items
    parts = [None] * WORLD
    dist.monitored_barrier(HOST, PATIENCE)  # says which rank does not come
    dist.all_gather_object(parts, items, group=HOST)
    return [item for part in parts for item in part]


def barrier() -> None:
    gather([])


class StopSignal:
    """SIGINT, SIGTERM or SIGHUP: .told, and the loop ends after this step and saves. Another one,
    a second later or more, ends the process at once (launchers pass one and the same on twice). A
    thread reads them, because Python's handlers do not run while a rank waits for another."""

    def __init__(self):
        self.told = False

    def __enter__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        ends = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]
        heard = [s for s in ends if signal.getsignal(s) != signal.SIG_IGN]  # as by nohup
        # The handler does nothing: the thread does the work.
        self.before = {s: signal.signal(s, lambda *_: None) for s in heard}
        signal.set_wakeup_fd(self.writer)  # a byte for each signal, written at once
        threading.Thread(target=self.wait, daemon=True).start()
        return self

    def wait(self) -> None:
        first = math.inf
        while os.read(self.reader, 1):  # nothing once the writer is closed
            self.told = True
            first = min(first, time.time())
            if time.time() - first > 1:
                os.write(2, b"train.py: ended by a second signal; what was saved is whole\n")
                os._exit(1)

    def __exit__(self, *_):
        signal.set_wakeup_fd(-1)
        for which, handler in self.before.items():
            signal.signal(which, handler)
        os.close(self.writer)


class Pipe:
    """A stream whose reader, terminal or disk may go without costing the run a step."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            return self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


# ---- The command -------------------------------------------------------------------------------

def parse(argv) -> Flags:
    """Raises ValueError, one line that names the flag."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = complain
    for f in dataclasses.fields(Flags):
        usual = f" ({f.default})" if f.default else ""
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"] + usual,
                            choices=f.metadata.get("choices"), metavar=f.name.upper(),
                            **READERS.get(f.type, {"type": f.type}))
    typed, _ = parser.parse_known_args(argv)
    if typed.resume:  # the run's own flags; what is typed now stands behind them, and wins
        argv = flags_of_run(typed.out) + argv
    known, rest = parser.parse_known_args(argv)
    if rest:
        raise ValueError(data.nearest(rest[0], [f"--{name}" for name in vars(known)], "flag"))
    flags = Flags(**vars(known))
    if flags.resume:
        refuse_another_run(flags, parser.parse_args(flags_of_run(flags.out)))
    check_ranges(flags)
    fill_in(flags)
    check(flags)
    return flags


def complain(message):
    raise ValueError(f"{message}; --help lists every flag")


def truth(text):
    return ("false", "true").index(text.lower()) == 1  # anything else is a ValueError


# How argparse reads a flag of these types.
READERS = {tuple: {"nargs": "*"}, bool: {"type": truth, "nargs": "?", "const": True}}


def flags_of_run(out) -> list[str]:
    """The flags of the run in `out` (default: the newest runs/default*) as one would type them."""
    runs = sorted(Path("runs").glob("default*/config.json"), key=lambda p: p.stat().st_mtime)
    out = Path(out or (runs[-1].parent if runs else "runs/default"))
    if not (out / "config.json").is_file():
        raise ValueError(f"--resume: there is no {out / 'config.json'}, so no run to continue")
    saved, argv = read_json(out / "config.json") | {"out": str(out), "resume": True}, []
    for f in dataclasses.fields(Flags):
        if f.name in saved:
            value = saved[f.name]
            values = value if f.type is tuple and isinstance(value, list) else [value]
            argv += [f"--{f.name}", *map(str, values)]
    return argv


def refuse_another_run(flags, saved) -> None:
    if Path(saved.model).parent == Path(flags.model):  # the run that it was a checkpoint of
        flags.model = saved.model
    for name in ("model", "data", "lora", "lora_alpha", "width", "layers", "skill_steps",
                 "habit_steps", "seed"):
        was, now = getattr(saved, name), getattr(flags, name)
        if was != now:
            raise ValueError(f"--resume: --{name} was {was!r} in this run and cannot "
                             f"become {now!r}")


def check_ranges(flags) -> None:
    for f in dataclasses.fields(Flags):
        if f.type in (int, float):
            value = getattr(flags, f.name)
            # A count that is not 0 by default cannot be 0.
            least = f.metadata.get("least", int(f.type is int and f.default > 0))
            most = f.metadata.get("most", 999_999)  # steps have six digits in checkpoints' names
            if not least <= value <= most:  # nor is nan
                raise ValueError(f"--{f.name} {value}: is not from {least:g} to {most:g}")


def check(flags) -> None:
    """Flags that must go together."""
    if flags.updates > flags.prompts * flags.samples:
        raise ValueError(f"--updates {flags.updates}: more mini-batches than the {flags.prompts} x "
                         f"{flags.samples} responses of a step")
    if flags.overlong_buffer > flags.max_new_tokens:
        raise ValueError(f"--overlong_buffer {flags.overlong_buffer}: longer than a response, "
                         f"--max_new_tokens {flags.max_new_tokens}")
    if flags.width % 8:
        raise ValueError(f"--width {flags.width}: must be a multiple of 8 (four even heads)")
    if flags.shards_per_replica and WORLD % flags.shards_per_replica:
        raise ValueError(f"--shards_per_replica {flags.shards_per_replica}: {WORLD} ranks cannot "
                         "be split into such groups; 0 is one group of all")
    for name in ("offload", "shards_per_replica"):
        if getattr(flags, name) and WORLD == 1 and DEVICE.type == "cpu":
            raise ValueError(f"--{name}: one process on a CPU has nothing to shard or to offload")
    if flags.track and not importlib.util.find_spec(flags.track):
        raise ValueError(f"--track {flags.track}: needs a package; pip install {flags.track}")
    if rollout_dtype(flags) != compute_dtype() and (WORLD > 1 or DEVICE.type == "cuda"):
        raise ValueError(f"--rollout_dtype {flags.rollout_dtype}: sharded weights are sampled from "
                         f"as they are gathered, in {str(compute_dtype())[6:]}; only one process "
                         "on a CPU makes a copy")
    if flags.correction_args and not flags.correction:
        raise ValueError(f"--correction_args {' '.join(flags.correction_args)}: of which "
                         "--correction?")
    try_loss(flags)
    if flags.correction not in ("", "opsm") and flags.old_logp == "sampler":
        raise ValueError(f"--correction {flags.correction}: the ratio is to the sampler already, "
                         "and nothing is left to correct; add --old_logp trainer")


def try_loss(flags) -> None:
    """losses.py itself says what it cannot use."""
    one, logp = torch.ones(1, 1), torch.zeros(1, 1, requires_grad=True)
    hyper, bounds = flags.hyperparameters(), flags.bounds()
    try:
        losses.policy_loss(flags.loss, logp, -one, one[0], one, agg=flags.agg or None, entropy=one,
                           sum_p2=one, pass_rate=one[0], max_len=1, sampler_logp=-one,
                           correction=flags.correction or None, correction_args=bounds, **hyper)
    except (TypeError, ArithmeticError, RuntimeError) as e:
        typed = ["--loss_args", *flags.loss_args, "--correction_args", *flags.correction_args]
        raise ValueError(f"{' '.join(typed)}: {flags.loss} cannot use that "
                         f"({data.first_line(e)})") from None


def fill_in(flags) -> None:
    """Defaults that depend on other flags or on the machine."""
    if not flags.tool:
        flags.tool = "facts" if data.facts_of(flags.data) else "none"
    if not flags.tokens_per_microbatch:
        flags.tokens_per_microbatch = 16384 if DEVICE.type == "cuda" else 4096
    if not flags.max_new_tokens and flags.data in data.TASKS and not flags.model:
        demos = data.demos(flags.data, 256, "skill") + data.demos(flags.data, 256, "habit")
        flags.max_new_tokens = 2 * max(len("".join(response)) for _, response in demos)
    flags.max_new_tokens = flags.max_new_tokens or 1024
    if flags.model and (Path(flags.model) / "latest").is_file():
        flags.model = str(find_checkpoint(flags.model))  # kept, so that a resume begins there too


def main() -> None:
    sys.stdout, sys.stderr = Pipe(sys.stdout), Pipe(sys.stderr)
    run = None
    try:
        flags = parse(sys.argv[1:])
        torch.set_num_threads(flags.threads)
        start_ranks(flags)
        run = set_up(flags)
        try:
            with run.scorer, run.stop:
                train(run)
        finally:
            if MAIN:
                run.log.close()
        if MAIN:
            say_goodbye(run)
    except (ValueError, OSError, SafetensorError, RuntimeError, KeyboardInterrupt) as e:
        sys.exit(last_words(e, run))
    finally:
        if LOCKS and run is None:
            leave_nothing(Path(flags.out))
        while LOCKS:
            LOCKS.pop().close()
        if dist.is_initialized():
            dist.destroy_process_group()


def leave_nothing(out) -> None:
    """A start that failed takes the directory away, if there is nothing in it but the lock."""
    with suppress(OSError):
        if os.listdir(out) == [".lock"]:
            (out / ".lock").unlink()
            out.rmdir()


def say_goodbye(run) -> None:
    evals, out = run.log.evals(), run.out
    if run.step < run.flags.steps:
        print(f"stopped; go on with: python train.py --out {out} --resume")
    first, last = list(evals)[0], list(evals)[-1]
    print(f"held-out accuracy {evals[first]:.2f} -> {evals[last]:.2f} after {last} steps. {out}: "
          f"curves.png, metrics.jsonl, step-{run.step:06d}. Score it: python eval.py {out}")


def raised_by_yours(error) -> bool:
    """By an objective or a reward: then file and line are of interest. RuntimeErrors most often
    come of a collective whose other side is gone."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).name in ("losses.py", "rewards.py")


def last_words(error, run) -> str:
    """The last line of a run that failed."""
    why = str(error) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        why = (f"out of GPU memory ({data.first_line(error)}); lower --tokens_per_microbatch or "
               "--kv_tokens, add --recompute")
    elif isinstance(error, RuntimeError) or run and raised_by_yours(error):
        traceback.print_exception(error)
        why = data.first_line(error)
    if run:  # it has begun
        whole = "what was saved is whole: " if checkpoints(run.out) else ""
        why += f"; {whole}go on with --resume --out {run.out}"
    why = "".join(c if c.isprintable() else " " for c in why)  # a stranger's file may hold escapes
    return f"train.py: {f'rank {RANK}: ' if WORLD > 1 else ''}{why:.2000}"


if __name__ == "__main__":
    main()
