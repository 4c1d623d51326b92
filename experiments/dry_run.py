"""Does it fit? The peak memory of one GPU, measured on a laptop before anything is rented.

    python train.py --dry_run 8 --model Qwen/Qwen2.5-7B --prompts 128 --samples 10 --updates 2 --max_new_tokens 3072
    python experiments/dry_run.py --model Qwen/Qwen2.5-7B --gpus 8 --tokens_per_microbatch 16384 --recompute
    python experiments/dry_run.py --table              # 3B and 7B on 8 GPUs, ACPO's lengths: experiments/results/dry_run.json

The real model, FSDP and AdamW run as rank 0 of a process group that pretends, on tensors that have shapes and no data;
PyTorch's FSDPMemTracker adds up what lives. Two micro-batches: the second meets the gradients of the first, that is the peak.
Tensors are called "cpu" because FSDP wants a device that exists, so bfloat16 compute is set by hand as CUDA has it.
Attention is PyTorch's varlen (q, k, v, o and a log-sum-exp live; flash-attn needs less: it does not repeat keys and values).
Not seen by the tracker: CUDA context, NCCL, workspaces and fragmentation (RESERVE), and the next block's weights where
communication overlaps. Times are no measurement: a roofline with the efficiencies written below.
"""
import argparse
import json
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

import model as network
from model import Config, Model

GIB = 2**30
RESERVE = 6.0  # GiB of a card that are not ours: CUDA context, NCCL buffers, workspaces, fragmentation
CARDS = {"H100 80 GB": (79.1, 3.0e12), "H200 141 GB": (139.8, 4.3e12)}  # GiB that CUDA reports, bytes/s of a copy
MATMUL = 790e12  # FLOP/s, bfloat16, dense: as read on an H200; an H100 SXM is the same chip
MFU, DECODE, GAP = 0.40, 0.70, 1e-3  # share of MATMUL in the update; of the roofline in decoding; seconds lost per decode step
NVLINK = 300e9  # bytes/s and GPU of an all-gather within a node
MEAN = 0.25  # assumed mean length of prompts and responses, as a share of the longest allowed
KV_SHARE = 0.6  # of the memory that is free in a rollout, generate() takes this for the cache

SHAPES = {  # hidden, mlp, layers, heads, kv heads, vocabulary, tied, context: architectures as published, for use offline
    "Qwen/Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, 151936, True, 32768),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True, 131072),
    "Qwen/Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, 151936, True, 32768),
    "Qwen/Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False, 131072),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 151936, True, 40960),
    "Qwen/Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 151936, False, 40960),
    "meta-llama/Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128256, False, 131072)}
CATEGORIES = {"weights, float32 shard": ("Sharded Param",), "weights, gathered": ("Unsharded Param", "All Gather"),
              "gradients": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter"), "optimizer": ("OptState",),
              "reference model": ("Inputs",), "activations": ("Activation", "Buffer"), "temporary": ("Temp",)}
ON_HOST = "weights, float32 shard", "optimizer"  # with --offload, and the gradients' shard


def architecture(name: str) -> dict:
    """config.json of a directory, a built-in published shape, or fetched from the hub; ValueError or FileNotFoundError."""
    path = Path(name) / "config.json"
    if path.is_file():
        return json.loads(path.read_text())
    known = {k.split("/")[1].lower(): v for k, v in SHAPES.items()}
    short = name.split("/")[-1].lower().removesuffix("-instruct").removesuffix("-base")
    if short in known and not Path(name).is_dir():
        kind, hidden, mlp, layers, heads, kv, vocab, tied, context = known[short]
        return dict(model_type=kind, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, vocab_size=vocab,
                    num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied,
                    head_dim=128 if kind == "qwen3" else hidden // heads, max_position_embeddings=context)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"--model {name}: no config.json there, not a hub id (owner/name), and none of {', '.join(SHAPES)}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return json.loads(Path(hf_hub_download(name, "config.json")).read_text())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise FileNotFoundError(f"--model {name}: the hub did not give its config.json ({type(e).__name__}); offline, pass a "
                                f"directory with one, or one of {', '.join(SHAPES)}") from None


# ---- Measuring -----------------------------------------------------------------------------------------------------------

@contextmanager
def pretended_ranks(gpus, shards):
    """The device mesh of rank 0 of `gpus`, in one process; collectives do nothing. HSDP: (replicas, shards)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        yield dist.init_device_mesh("cpu", (gpus,) if shards == gpus else (gpus // shards, shards))
    finally:
        dist.destroy_process_group()


@contextmanager
def kernel_is(name):
    """Packed attention as it would run on the GPU, whatever this machine has."""
    mine, network.attention_kernel = network.attention_kernel, lambda *_: name
    try:
        yield
    finally:
        network.attention_kernel = mine


class Nonzero(torch.overrides.TorchFunctionMode):
    """Tensors without data do not know where they are nonzero: let it be `count` places."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.nonzero:
            return torch.zeros(self.count, 1, dtype=torch.long)
        return func(*args, **(kwargs or {}))


def measure(raw, gpus, tokens, prompt, response, recompute=False, offload=False, shards=0, reference=False,
            dtype=torch.bfloat16, kernel="torch varlen") -> dict:
    """GiB on a GPU: {"update": peak of a micro-batch of `tokens` in sequences of prompt + response, "categories": its parts,
    "step": at the optimizer's step, "rollout": with whole weights, "host": moved to CPU memory}, and "parameters"."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    import train
    lengths = [prompt + response] * max(1, tokens // (prompt + response))
    lengths += [tokens - sum(lengths)] if tokens > sum(lengths) else []
    # The mesh must be made before tensors lose their data; the optimizer's step stays outside the tracker, which would count
    # the full-size tensors of DTensor's sharding propagation.
    with pretended_ranks(gpus, shards or gpus) as mesh, FakeTensorMode(), kernel_is(kernel):
        models = [train.shard(Model(Config.from_dict(raw)), mesh, dtype) for _ in range(1 + reference)]
        model, frozen = models[0], models[1:]
        model.recompute = recompute
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.zeros(sum(lengths), dtype=torch.long)
        places = sum(max(0, n - prompt) for n in lengths)

        def micro_batch():
            with Nonzero(places):
                logp = model(ids, lengths, ids)[0]
                for other in frozen:
                    with torch.no_grad():
                        other(ids, lengths, ids)
            logp.sum().backward()

        micro_batch()
        optimizer.step()
        with FSDPMemTracker(model, optimizer) as tracker:
            for other in frozen:
                tracker.track_inputs(tuple(other.parameters()))
            step = total(tracker, "current")
            micro_batch()
        peak = {k.value if hasattr(k, "value") else k: v for s in tracker.get_tracker_snapshot("peak").values() for k, v in s.items()}
        optimizer.zero_grad()
        with FSDPMemTracker(model, optimizer) as tracker:
            for other in frozen:
                tracker.track_inputs(tuple(other.parameters()))
            with train.whole_weights(model):
                rollout = total(tracker, "current")
        parts = {name: sum(peak[k] for k in keys) / GIB for name, keys in CATEGORIES.items()}
        host = sum(parts[k] for k in ON_HOST) + peak["Sharded Grad"] / GIB if offload else 0.0
        if offload:
            rollout -= sum(parts[k] for k in ON_HOST)
            parts["gradients"] -= peak["Sharded Grad"] / GIB
            parts |= dict.fromkeys(ON_HOST, 0.0)
        count = sum(p.numel() for p in model.parameters())
    return {"update": peak["Total"] / GIB - host, "categories": parts, "step": step - host, "rollout": rollout, "host": host,
            "parameters": count}


def total(tracker, which):
    return sum(s["Total"] for s in tracker.get_tracker_snapshot(which).values()) / GIB


# ---- What it means -------------------------------------------------------------------------------------------------------

def kv_budget(c, cfg, rollout, card):
    """(GiB, tokens, whole sequences) that generate()'s cache holds beside `rollout` GiB."""
    room = KV_SHARE * max(0.0, card - RESERVE - rollout)
    tokens = int(room * GIB) // (2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2)
    return room, tokens, tokens // (cfg.max_prompt_tokens + cfg.max_new_tokens)


def seconds(c, cfg, gpus, count, fits, bandwidth):
    """Estimated (rollout, update, communication) seconds of a step: the roofline formulas, nothing measured. Responses end
    at a constant rate, mean MEAN of the cap; at least one per GPU reaches it."""
    table = c.vocab_size * c.hidden_size
    read = count - (0 if c.tie_word_embeddings else table)
    rows, prompt, mean = math.ceil(cfg.prompts / gpus) * cfg.samples, MEAN * cfg.max_prompt_tokens, MEAN * cfg.max_new_tokens
    at_once, kv, grid = max(1, min(rows, fits)), 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim, 64

    def decode(live, context):
        gemm = max(2 * read * live / MATMUL, 2 * read / bandwidth)
        return (gemm + live * (context * kv + c.vocab_size * 16) / bandwidth) / DECODE + GAP
    rollout = (rows - at_once) * mean / at_once * decode(at_once, prompt + mean)  # slots are refilled until none waits
    for t in ((i + 0.5) / grid * cfg.max_new_tokens for i in range(grid)):
        rollout += decode(max(1.0, at_once * math.exp(-t / mean)), prompt + t) * cfg.max_new_tokens / grid
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * (prompt + mean)
    extra = (cfg.loss == "acpo" and cfg.acpo_stats == "batch") + (cfg.old_logp == "trainer") + bool(cfg.kl_beta) + cfg.recompute
    flops = (6 + 2 * extra) * (read + attention)
    tokens = rows * (prompt + mean) * cfg.epochs
    micro = max(cfg.updates * cfg.epochs, math.ceil(tokens / cfg.tokens_per_microbatch))
    wire = (8 * micro + 2) * count * (1 - 1 / (cfg.shards_per_replica or gpus))  # per micro-batch bf16 twice, float32 once
    return rollout, tokens * flops / (MATMUL * MFU), wire / NVLINK


def remedies(cfg):
    """What to turn, one after the other, as (flags, changed fields); each keeps the changes before it."""
    longest, changed = cfg.max_prompt_tokens + cfg.max_new_tokens, {}
    if not cfg.recompute:
        changed |= {"recompute": True}
        yield "--recompute", dict(changed)
    for tokens in (8192, 4096):
        if longest <= tokens < cfg.tokens_per_microbatch:
            changed |= {"tokens_per_microbatch": tokens}
            yield f"and --tokens_per_microbatch {tokens}", dict(changed)
    if not cfg.offload:
        changed |= {"offload": True}
        yield "and --offload (weights, gradients, Adam in CPU memory: slower)", dict(changed)
    yield "and twice the GPUs", {**changed, "shards_per_replica": 0, "gpus": 2}


DEFAULTS = dict(loss="acpo", acpo_stats="batch", old_logp="sampler", prompts=128, samples=10, updates=2, epochs=1, kl_beta=0.0,
                max_prompt_tokens=1024, max_new_tokens=3072, tokens_per_microbatch=16384, recompute=False, offload=False,
                shards_per_replica=0)


def run(cfg, gpus):
    """measure() of a configuration. Raises ValueError, one line, for what makes no sense."""
    c = Config.from_dict(cfg.raw)
    shards, longest = cfg.shards_per_replica or gpus, cfg.max_prompt_tokens + cfg.max_new_tokens
    if gpus < 1 or min(cfg.tokens_per_microbatch, cfg.max_prompt_tokens, cfg.max_new_tokens, cfg.prompts, cfg.samples) < 1:
        raise ValueError(f"{gpus} GPUs, lengths, --prompts and --samples must all be at least 1")
    if shards < 1 or gpus % shards:
        raise ValueError(f"--shards_per_replica {shards} does not divide {gpus} GPUs")
    if longest > c.max_position_embeddings:
        raise ValueError(f"{longest} tokens of prompt and response: the model's context is {c.max_position_embeddings}")
    return measure(cfg.raw, gpus, max(cfg.tokens_per_microbatch, longest), cfg.max_prompt_tokens, cfg.max_new_tokens,
                   cfg.recompute, cfg.offload, shards, bool(cfg.kl_beta))


def report(cfg, gpus: int) -> dict:
    """Print what a rank of `gpus` needs for the run `cfg` (train.Config, or anything with some of its fields), and whether it
    fits; returns the numbers. Raises ValueError or FileNotFoundError, one line."""
    if dist.is_initialized():
        raise ValueError("a dry run pretends all ranks itself: start it with python, without torchrun")
    if not cfg.model:
        raise ValueError("a dry run needs --model; the small default model fits anywhere")
    began = time.time()
    cfg = SimpleNamespace(**DEFAULTS | {k: v for k, v in vars(cfg).items() if k in {*DEFAULTS, "model"}})
    cfg.raw = architecture(cfg.model)
    c, m = Config.from_dict(cfg.raw), run(cfg, gpus)
    tokens = max(cfg.tokens_per_microbatch, cfg.max_prompt_tokens + cfg.max_new_tokens)
    print(f"{cfg.model}: {m['parameters'] / 1e9:.2f}B parameters on {gpus} GPUs, micro-batches of {tokens:,} tokens, "
          f"{'with' if cfg.recompute else 'without'} --recompute. GiB per GPU:\n")
    for name, size in m["categories"].items():
        if size or name != "reference model":
            print(f"  {name:26s}{size:8.2f}")
    print(f"  {'peak of the update':26s}{m['update']:8.2f}   (at the optimizer's step {m['step']:.2f})")
    print(f"  {'rollout, before its cache':26s}{m['rollout']:8.2f}   (whole weights in bfloat16 beside the shards)")
    if m["host"]:
        print(f"  {'in CPU memory, a rank':26s}{m['host']:8.2f}")
    rows, peak, fitting = math.ceil(cfg.prompts / gpus) * cfg.samples, max(m["update"], m["rollout"]), {}
    print(f"\n{RESERVE:.0f} GiB of a card are kept for the CUDA context, NCCL and fragmentation. Seconds are estimated.")
    for card, (size, bandwidth) in CARDS.items():
        room, kv_tokens, fits = kv_budget(c, cfg, m["rollout"], size)
        fitting[card] = peak + RESERVE <= size and fits > 0
        verdict = "fits" if fitting[card] else "does NOT fit"
        print(f"  {card}: {verdict}, {size - RESERVE - peak:+.1f} GiB; cache {room:.1f} GiB = {kv_tokens:,} tokens = {fits:,} sequences "
              f"of the longest, {rows} are sampled per GPU")
        if fitting[card]:
            times = seconds(c, cfg, gpus, m["parameters"], fits, bandwidth)
            print(f"      a step about {times[0]:.0f} s of rollout + {times[1]:.0f} s of update; communication left out, {times[2]:.0f} s "
                  f"at {NVLINK / 1e9:.0f} GB/s if nothing overlaps")
    print(f"  Assumed: mean lengths {MEAN:.0%} of the longest, {DECODE:.0%} of the bandwidth roofline + {1e3 * GAP:.0f} ms a step in "
          f"decoding,\n  {MFU:.0%} of {MATMUL / 1e12:.0f} TFLOP/s in the update; prefill, rewards, evaluation and optimizer not counted.")
    smallest = min(CARDS, key=lambda card: CARDS[card][0])
    if not fitting[smallest]:
        print(f"What to turn for an {smallest}, measured:")
        for flags, changed in remedies(cfg):
            n = gpus * changed.pop("gpus", 1)
            other = SimpleNamespace(**{**vars(cfg), **changed})
            got = run(other, n)
            top = max(got["update"], got["rollout"])
            ok = top + RESERVE <= CARDS[smallest][0] and kv_budget(c, other, got["rollout"], CARDS[smallest][0])[2] > 0
            print(f"  {flags}: {top:.1f} GiB{', fits' if ok else ''}")
            if ok:
                break
    print(f"({time.time() - began:.0f} s on this machine)")
    return m | {"fits": fitting}


def table():
    """3B and 7B on 8 GPUs, 1024 + 3072 tokens, by micro-batch and recomputation: experiments/results/dry_run.json."""
    rows = []
    for name in ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-7B"):
        for tokens in (8192, 16384, 32768):
            for recompute in (True, False):
                m = measure(architecture(name), 8, tokens, 1024, 3072, recompute)
                rows.append({"model": name, "gpus": 8, "tokens": tokens, "recompute": recompute, "update_GiB": round(m["update"], 1),
                             "rollout_GiB": round(m["rollout"], 1), **{k: round(v, 2) for k, v in m["categories"].items() if v}})
                print(rows[-1], flush=True)
    path = Path(__file__).parent / "results/dry_run.json"
    path.write_text(json.dumps({"torch": torch.__version__, "prompt": 1024, "response": 3072, "rows": rows}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B", help="directory with a config.json, or hub id; offline: " + ", ".join(SHAPES))
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--table", action="store_true", help="write experiments/results/dry_run.json")
    for name, value in DEFAULTS.items():
        how = {"action": "store_true"} if isinstance(value, bool) else {"type": type(value), "default": value}
        parser.add_argument(f"--{name}", **how, help="as in train.py")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        table() if args.table else report(args, args.gpus)
    except (ValueError, OSError) as e:
        sys.exit(f"dry_run.py: {e}")


if __name__ == "__main__":
    main()
