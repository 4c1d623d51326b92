"""Does it run on your card, and how fast? One command, some ten minutes, no network or checkpoint:

    python experiments/gpu_check.py                                # one card
    torchrun --nproc_per_node=8 experiments/gpu_check.py           # the same on all cards
    python experiments/gpu_check.py --tokens_per_microbatch 8192   # flags of train.py, for its run

It runs the gpu tests, two real steps of train.py's loop on the largest of four Qwen2.5 shapes that
fits by dry_run.py (random weights), and measures decoding, update, memory, and how far sampler and
trainer are apart; all of it with and without flash-attn where that is installed. Every measurement
is a child process of its own, so that it survives the failure of the others. Prints one table,
writes experiments/results/gpu_<card>.json, and says in its last line what failed. Without CUDA it
does the same at toy size: that proves this file, and nothing about a card.
"""
import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import data
import model as network
import rollout
import train
from experiments import dry_run
from model import Config, Model, pack
from rollout import generate

CUDA = torch.cuda.is_available()
GIB = 2**30
TOY = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
       "tie_word_embeddings": False, "max_position_embeddings": 4096}
PROMPTS = 16 if CUDA else 2  # a card
SAMPLES = 8 if CUDA else 4
PROMPT = 256 if CUDA else 16  # tokens
RESPONSE = 1024 if CUDA else 16  # tokens at most; half of it on average
CONTEXT = PROMPT + RESPONSE / 2
SMALLEST = next(iter(dry_run.SHAPES))
UNKNOWN = float("nan")
GOALS = {"% of roofline": "73", "% of matmul rate": "45"}


def check(out, train_flags) -> dict:
    """Every measurement in turn: {name: its numbers}, and under "failed" {name: reason}."""
    kernels = ["", " --no_flash"] if network.flash_attn_varlen_func else [""]
    plan = ["card", "fit", "tests"]
    plan += [part + kernel for kernel in kernels for part in ("train", "decode", "mismatch")]
    found, failed = {}, {}
    for number, name in enumerate(plan):
        if name == "tests" and not train.MAIN:
            continue
        numbers, reason = child(name, number, ["--found", json.dumps(found), *train_flags])
        print_part(name, numbers or {"FAILED": reason})
        found[name] = numbers
        if reason:
            failed[name] = reason
    found["failed"] = failed
    if train.MAIN:
        out = out or results_file(found["card"].get("name", "unknown"))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        said = ", ".join(f"{name} ({reason})" for name, reason in failed.items())
        print(f"written to {out}; failed: {said or 'nothing'}")
    return found


def child(name, number, args) -> tuple[dict, str]:
    """(numbers, "") of one measurement in a process of its own, or ({}, why there are none)."""
    part, *kernel = name.split()
    command = [sys.executable, __file__, "--part", part, *kernel, *args]
    env = dict(os.environ)
    if part in ("card", "fit", "tests"):  # without the other ranks
        env = {key: value for key, value in env.items() if key not in ("RANK", "WORLD_SIZE")}
    # The ranks' children meet at a port of their own: torchrun's store remembers those before.
    env["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    env["MASTER_PORT"] = str(int(env.get("MASTER_PORT", 29500)) + 1 + number)
    try:
        ran = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900,
                             cwd=Path(__file__).parent.parent)
    except subprocess.TimeoutExpired:
        return {}, "took more than 15 minutes"
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or ["killed"]
        return {}, said[-1][:300]
    return json.loads(ran.stdout.strip().splitlines()[-1]), ""


def print_part(name, numbers):
    if not train.MAIN:
        return
    for key, value in numbers.items():
        text = f"{value:,.3g}" if isinstance(value, float) else str(value)
        goal = f"   goal: {GOALS[key]}" if key in GOALS else ""
        print(f"{name:20} {key:28} {text}{goal}", flush=True)


def results_file(card) -> Path:
    if not CUDA:
        return Path("runs/gpu_toy.json")
    slug = re.sub(r"[^a-z0-9]+", "_", card.lower())
    return Path(__file__).parent / f"results/gpu_{slug}_x{train.WORLD}.json"


# ---- The measurements, each in a child ---------------------------------------------------------

def card(args) -> dict:
    """What this card can do at most: rates of a matmul and of a copy in its memory."""
    n = 8192 if CUDA else 256
    a = torch.randn(n, n, device=train.DEVICE, dtype=train.compute_dtype())
    big = torch.empty(8, n, n, device=train.DEVICE)
    other = torch.empty_like(big)
    return {"name": torch.cuda.get_device_name() if CUDA else "toy on a CPU",
            "torch": torch.__version__,
            "TFLOP/s": 2e-12 * n**3 / seconds_of(lambda: a @ a),
            "TB/s": 2e-12 * big.nbytes / seconds_of(lambda: other.copy_(big))}


def seconds_of(call, times=20) -> float:
    for _ in range(3):
        call()
    began = now()
    for _ in range(times):
        call()
    return (now() - began) / times


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def fit(args) -> dict:
    """The largest shape whose two steps fit by the dry run, and what that says of them."""
    sizes = reversed(dry_run.SHAPES) if CUDA else ["toy"]
    memory = torch.cuda.get_device_properties(train.DEVICE).total_memory / GIB if CUDA else 8.0
    flags = dry_run.parse(RANKS, [*workload(RANKS), "--model", SMALLEST, *args.train_flags])
    for size in sizes:
        m = dry_run.measure(shape(size), RANKS, flags)
        if dry_run.fit(shape(size), RANKS, flags, m, memory)[0] >= 0:
            return {"shape": size, "GiB": m["update"], "recompute": flags.recompute}
    raise SystemExit(f"by the dry run not even {size} fits into {memory:.1f} GiB")


def shape(size) -> dict:
    """config.json of a random model. Many of its tokens end a response, so that lengths differ as
    real ones do."""
    raw = TOY if size == "toy" else dry_run.architecture(size)
    return raw | {"eos_token_id": list(range(2 * raw["vocab_size"] // RESPONSE))}


def workload(ranks) -> list[str]:
    return (f"--prompts {PROMPTS * ranks} --samples {SAMPLES} --updates 2 --steps 2 --loss grpo "
            f"--max_prompt_tokens {PROMPT} --max_new_tokens {RESPONSE} --lr 1e-6 --recompute "
            f"--eval_problems {ranks} --timeout 10").split()


def gpu_tests(args) -> dict:
    if not CUDA:
        return {"result": "not run, there is no CUDA"}
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"],
                         capture_output=True, text=True)
    result = (ran.stdout.strip().splitlines() or ["killed"])[-1]
    if ran.returncode:
        raise SystemExit(result)
    return {"result": result}


def train_loop(args) -> dict:
    """Two steps of train.py's own loop; the numbers are those of the second. Only the reading of
    weights, the questions, the grading and the saving are others."""
    raw = shape(args.fit["shape"])
    seen = []  # (tokens, seconds, peak bytes) of each update
    real_update = train.update

    def from_config(source):
        model = meta_model(raw)
        model.source = Path(source)
        return model

    def update(run, minibatch, *rest, **more):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        began = now()
        norm = real_update(run, minibatch, *rest, **more)
        seconds = now() - began
        peak = torch.cuda.max_memory_allocated() if CUDA else 0
        seen.append((sum(len(r.tokens) for r in minibatch), seconds, peak))
        return norm
    with (tempfile.TemporaryDirectory() as out,
          patch.multiple(Model, from_config=from_config, load_weights=randomise),
          patch.multiple(train, save=nothing, draw_curves=nothing, update=update)):
        data.char_tokenizer("chainsum").save_pretrained(f"{out}/model")
        flags = train.parse([*workload(train.WORLD), "--model", f"{out}/model",
                             "--out", f"{out}/run", *args.train_flags])
        train.start_ranks(flags)
        run = train.set_up(flags)
        run.scorer.close()
        run.scorer = every_other
        run.questions = [q._replace(ids=random_prompt(i, raw["vocab_size"]))
                         for i, q in enumerate(run.questions)]
        train.train(run)
    last = run.log.history[-1]
    tokens, seconds, peaks = zip(*seen[-flags.updates:])
    rate = sum(tokens) / sum(seconds) / train.WORLD
    used = 1e-12 * rate * update_flops(raw, args.fit["recompute"])
    found = {"update tok/s a card": rate, "% of matmul rate": 100 * used / args.card["TFLOP/s"],
             "rollout tok/s a card": last["rollout_tps"] / train.WORLD,
             "k3 sampler to trainer": last["sampler_kl"], "grad_norm": last["grad_norm"]}
    if CUDA:
        found |= {"update GiB": max(peaks) / GIB, "by the dry run": args.fit["GiB"]}
    return found


def update_flops(raw, recompute) -> float:
    """Of a token forward and backward, twice forward if that is recomputed."""
    c = Config.from_dict(raw)
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * CONTEXT
    return 2 * (4 if recompute else 3) * (matmul_weights(raw) + attention)


def matmul_weights(raw) -> int:
    """Weights that every token is multiplied with: all but an embedding that is no head."""
    model = meta_model(raw)
    count = sum(p.numel() for p in model.parameters())
    return count - (0 if raw["tie_word_embeddings"] else model.embed_tokens.weight.numel())


def meta_model(raw) -> Model:
    with torch.device("meta"):
        return Model(Config.from_dict(raw))


@torch.no_grad()
def randomise(model, seed=0) -> Model:
    """In the place of load_weights(): this rank's share of random weights. The last norm is so
    large that the model is about as sure of its next token as a language model is."""
    torch.manual_seed(seed + train.RANK)
    for name, p in model.named_parameters():
        local = p.to_local() if hasattr(p, "to_local") else p
        if p.dim() == 2:
            local.normal_(0, 0.02)
        else:
            local.fill_(not name.endswith("bias"))
        if name == "norm.weight":
            local.fill_(250 / len(p)**0.5)  # logits of standard deviation 5
    return model


def nothing(*_):
    pass


def every_other(to_grade):
    """In the place of the graders: random weights are never right, and where all scores are equal
    every gradient is 0."""
    return [(float(i % 2), "ok") for i in range(len(to_grade))]


def random_prompt(seed, vocab_size) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(vocab_size) for _ in range(PROMPT)]


def decode(args) -> dict:
    """Sampling alone, all rows to the end, against what memory and matmuls allow."""
    model = random_model(args)
    prompts = [random_prompt(i, model.config.vocab_size) for i in range(PROMPTS)]
    generate(model, prompts, SAMPLES, 8, eos_ids=[])  # wakes the libraries
    began = now()
    rollouts = generate(model, prompts, SAMPLES, RESPONSE, eos_ids=[])
    rate = sum(r.length for r in rollouts) / (now() - began)
    best = decode_roofline(shape(args.fit["shape"]), args.card, len(rollouts))
    return {"decode tok/s a card": rate, "rows": len(rollouts), "% of roofline": 100 * rate / best}


def decode_roofline(raw, card, rows) -> float:
    """Tokens/s where nothing else costs time: a step reads all weights (or, with many rows,
    computes with them), the keys and values of each row, and logits four times."""
    c = Config.from_dict(raw)
    flops = 1e12 * card["TFLOP/s"]
    bandwidth = 1e12 * card["TB/s"]
    weights = 2 * matmul_weights(raw)
    kv = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * CONTEXT
    step = max(weights / bandwidth, weights * rows / flops)
    return rows / (step + rows * (kv + 16 * c.vocab_size) / bandwidth)


def random_model(args) -> Model:
    model = meta_model(shape(args.fit["shape"])).to(torch.bfloat16)
    return randomise(model.to_empty(device=train.DEVICE))


@torch.no_grad()
def mismatch(args) -> dict:
    """The log-probs that the sampler recorded against the trainer's forward pass, both in bfloat16,
    before any update."""
    model = random_model(args)
    prompts = [random_prompt(i, model.config.vocab_size) for i in range(4)]
    rollouts = generate(model, prompts, 4, RESPONSE)
    batch = pack([r.tokens for r in rollouts], [PROMPT] * len(rollouts), train.DEVICE)
    trainer, entropy, _ = model(*batch)
    sampler = torch.tensor([logp for r in rollouts for logp in r.logp], device=train.DEVICE)
    gap = (sampler - trainer).double()
    means = {"mean": gap.abs(), "k3": gap.expm1() - gap, "entropy": entropy}
    found = {name: values.mean().item() for name, values in means.items()}
    return found | {"worst": gap.abs().max().item()}


# ---- The command -------------------------------------------------------------------------------

PARTS = {"card": card, "fit": fit, "tests": gpu_tests, "train": train_loop, "decode": decode,
         "mismatch": mismatch}
RANKS = int(os.environ.get("CHECKED_RANKS", train.WORLD))


def worst(results) -> dict:
    """Of all ranks' numbers, each time the worst."""
    merged = dict(results[0])
    for key, value in merged.items():
        if isinstance(value, float):
            least_is_worst = key.endswith("/s") or "tok/s" in key or key.startswith("%")
            merged[key] = (min if least_is_worst else max)(result[key] for result in results)
    return merged


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON (experiments/results/gpu_<card>.json)")
    parser.add_argument("--part", choices=PARTS, help="this measurement alone, in this process")
    parser.add_argument("--no_flash", action="store_true", help="with --part: without flash-attn")
    parser.add_argument("--found", type=json.loads, default={},
                        help="with --part: what the parts before it have found")
    args, args.train_flags = parser.parse_known_args()
    # The others compare with these.
    args.card = args.found.get("card") or {"TFLOP/s": UNKNOWN, "TB/s": UNKNOWN}
    args.fit = args.found.get("fit") or {"shape": SMALLEST if CUDA else "toy", "GiB": UNKNOWN,
                                         "recompute": True}
    torch.set_num_threads(1)
    if not args.part:
        os.environ["CHECKED_RANKS"] = str(train.WORLD)
        failed = check(args.out, args.train_flags)["failed"]
        sys.exit(1 if failed and train.MAIN else 0)  # torchrun ends all where one rank fails
    if args.no_flash:
        network.flash_attn_varlen_func = rollout.flash_attn_with_kvcache = None
    if train.WORLD > 1 and args.part != "train":  # that one starts them itself
        train.start_ranks(SimpleNamespace(timeout=10))
    result = PARTS[args.part](args)
    print(json.dumps(worst(train.gather([result]))))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
