"""Does it fit? The peak memory of one GPU, measured on a laptop before anything is rented.

    python train.py --dry_run 8 --model Qwen/Qwen2.5-7B --prompts 128 --samples 10 --updates 2 --max_new_tokens 3072
    python experiments/dry_run.py --model Qwen/Qwen2.5-7B --gpus 8 --recompute    # the same, with ACPO's sizes as defaults
    python experiments/dry_run.py --table              # 3B and 7B on 8 GPUs, ACPO's lengths: experiments/results/dry_run.json

The real model, FSDP and AdamW run as rank 0 of a process group that pretends, on tensors that have shapes and no data;
PyTorch's FSDPMemTracker adds up what lives. The peak is that of a micro-batch that meets the gradients of one before it.
The tensors claim to be on a CPU, as FSDP wants a device that exists: bfloat16 compute is set by hand, as CUDA has it.
Attention is PyTorch's varlen; flash-attn takes less, it repeats no keys and values. Not seen: CUDA context, NCCL, workspaces,
fragmentation (RESERVE), the next block's weights where communication overlaps. Times are a roofline, not measured.
"""
import json
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from huggingface_hub import hf_hub_download
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import HfArgumentParser

import model as network
import train
from model import Config, Model

GIB, RESERVE = 2**30, 6.0  # GiB of a card that are not ours: CUDA context, NCCL buffers, workspaces, fragmentation
CARDS = {"H100 80 GB": (79.1, 3.0e12), "H200 141 GB": (139.8, 4.3e12)}  # GiB that CUDA reports, bytes/s of a copy
MATMUL, NVLINK = 790e12, 300e9  # bfloat16 FLOP/s, as read on an H200 (an H100 SXM is the same chip); bytes/s within a node
MFU, DECODE, GAP = 0.40, 0.70, 1e-3  # share of MATMUL in the update; of the roofline in decoding; idle seconds a step
MEAN, KV_SHARE = 0.25, 0.6  # assumed mean length, as a share of the longest; what generate() takes of the free memory
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


def architecture(name: str) -> dict:
    """config.json of a directory, a built-in published shape, or fetched from the hub; ValueError or FileNotFoundError."""
    if (path := Path(name) / "config.json").is_file():
        return json.loads(path.read_text())
    if name in SHAPES:
        kind, hidden, mlp, layers, heads, kv, vocab, tied, context = SHAPES[name]
        return dict(model_type=kind, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, vocab_size=vocab,
                    num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied,
                    head_dim=128 if kind == "qwen3" else hidden // heads, max_position_embeddings=context)
    try:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ValueError("not owner/name")
        return json.loads(Path(hf_hub_download(name, "config.json")).read_text())
    except (OSError, ValueError) as e:  # what huggingface_hub raises is one of these
        raise FileNotFoundError(f"--model {name}: no config.json there, and none from the hub ({str(e).splitlines()[0]}); "
                                f"offline, pass a directory with one, or one of {', '.join(SHAPES)}") from None


# ---- Measuring -----------------------------------------------------------------------------------------------------------

@contextmanager
def pretended(gpus, shards, kernel):
    """The device mesh of rank 0 of `gpus`, all in this process: collectives do nothing, tensors made inside have no data, and
    packed attention is the GPU's `kernel`, logits come as on a GPU, whatever this machine has."""
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        mesh = dist.init_device_mesh("cpu", (gpus // shards, shards), mesh_dim_names=("replica", "shard"))
        mesh = mesh if shards < gpus else mesh["shard"]  # as train.load_model; needs tensors that have data
        with FakeTensorMode(), patch.object(network, "attention_kernel", lambda *_: kernel), \
                patch.object(network, "exact_logits", lambda h, W: torch.mm(h, W.T, out_dtype=torch.float32)):
            yield mesh
    finally:
        dist.destroy_process_group()


def measure(raw, gpus, tokens, prompt, response, recompute=False, offload=False, shards=0, reference=False,
            dtype=torch.bfloat16, kernel="torch varlen") -> dict:
    """GiB on a GPU: {"update": peak in a micro-batch of `tokens`, sequences of prompt + response; "categories": its parts;
    "rollout": with whole weights, before the cache; "host": moved to CPU memory by offload}, and "parameters"."""
    full, rest = divmod(tokens, prompt + response)
    lengths = [prompt + response] * full + [rest] * bool(rest)
    with pretended(gpus, shards or gpus, kernel) as mesh:
        model, *frozen = (train.shard(Model(Config.from_dict(raw)), mesh, dtype) for _ in range(1 + reference))
        model.recompute = recompute
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids, others = torch.zeros(tokens, dtype=torch.long), tuple(p for m in frozen for p in m.parameters())
        where = torch.zeros(sum(max(0, n - prompt) for n in lengths), 1, dtype=torch.long)  # the nonzero places of no data

        def micro_batch():
            with patch.object(torch.Tensor, "nonzero", lambda _: where):
                logp = model(ids, lengths, ids)[0]
                with torch.no_grad():
                    for other in frozen:
                        other(ids, lengths, ids)
            logp.sum().backward()

        def tracked(which):  # {category: bytes} on the one device
            return {getattr(k, "value", k): n for d in tracker.get_tracker_snapshot(which).values() for k, n in d.items()}
        micro_batch()
        optimizer.step()  # outside the tracker, which would count the full-size tensors of DTensor's sharding propagation
        with FSDPMemTracker(model, optimizer) as tracker:
            tracker.track_inputs(others)
            micro_batch()
        peak = tracked("peak")
        optimizer.zero_grad()
        with FSDPMemTracker(model, optimizer) as tracker, train.whole_weights(model):
            tracker.track_inputs(others)
            rollout = tracked("current")["Total"] / GIB
    parts, host = {name: sum(peak[k] for k in keys) / GIB for name, keys in CATEGORIES.items()}, 0.0
    update = sum(parts.values())
    if offload:  # the same pass; these live on the other side of the bus
        shard, grad, states = (peak[k] / GIB for k in ("Sharded Param", "Sharded Grad", "OptState"))
        host, update, rollout = shard + grad + states, update - shard - grad - states, rollout - shard - states
        parts |= {"weights, float32 shard": 0.0, "optimizer": 0.0, "gradients": parts["gradients"] - grad}
    return {"update": update, "categories": parts, "rollout": rollout, "host": host,
            "parameters": sum(p.numel() for p in model.parameters())}


def run(cfg, raw, gpus):
    """measure() of a configuration. Raises ValueError, one line, for what makes no sense."""
    context, longest = Config.from_dict(raw).max_position_embeddings, cfg.max_prompt_tokens + cfg.max_new_tokens
    if min(gpus, cfg.tokens_per_microbatch, cfg.max_prompt_tokens, cfg.max_new_tokens, cfg.prompts, cfg.samples) < 1:
        raise ValueError("GPUs, lengths, --tokens_per_microbatch, --prompts, --samples: all must be at least 1")
    if cfg.shards_per_replica < 0 or cfg.shards_per_replica and gpus % cfg.shards_per_replica:
        raise ValueError(f"--shards_per_replica {cfg.shards_per_replica} does not divide {gpus} GPUs")
    if longest > context:
        raise ValueError(f"{longest} tokens of prompt and response: the model's context is {context}")
    return measure(raw, gpus, max(cfg.tokens_per_microbatch, longest), cfg.max_prompt_tokens, cfg.max_new_tokens,
                   cfg.recompute, cfg.offload, cfg.shards_per_replica, bool(cfg.kl_beta))


# ---- What it means -------------------------------------------------------------------------------------------------------

def fit(c, cfg, m, card):
    """(GiB left beside the peak, tokens of KV cache that generate() would take, whole sequences in it)."""
    room, kv = CARDS[card][0] - RESERVE, 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim / GIB
    tokens = cfg.kv_tokens or int(KV_SHARE * max(0.0, room - m["rollout"]) / kv)
    return (room - max(m["update"], m["rollout"] + cfg.kv_tokens * kv), tokens,
            tokens // (cfg.max_prompt_tokens + cfg.max_new_tokens))


def seconds(c, cfg, gpus, count, fits, bandwidth):
    """Estimated (rollout, update, communication) seconds of a step: roofline formulas, nothing measured. Responses end at a
    constant rate, mean MEAN of the cap, and one per GPU reaches it; slots are refilled until nothing waits."""
    read = count - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    rows, prompt, mean = math.ceil(cfg.prompts / gpus) * cfg.samples, MEAN * cfg.max_prompt_tokens, MEAN * cfg.max_new_tokens

    def decode(live, context):  # one token of each live row: matmul or its weights; cache; sampling
        traffic = live * (context * 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim + 16 * c.vocab_size)
        return (max(2 * read * live / MATMUL, 2 * read / bandwidth) + traffic / bandwidth) / DECODE + GAP
    slots, grid = min(rows, fits), 64
    rollout = (rows - slots) * mean / slots * decode(slots, prompt + mean)
    for t in ((i + 0.5) / grid * cfg.max_new_tokens for i in range(grid)):
        rollout += decode(max(1.0, slots * math.exp(-t / mean)), prompt + t) * cfg.max_new_tokens / grid
    more = cfg.recompute, cfg.loss == "acpo" and cfg.acpo_stats == "batch", cfg.old_logp == "trainer", cfg.kl_beta > 0
    tokens = rows * (prompt + mean) * cfg.epochs
    flops = 2 * (3 + sum(more)) * tokens * (read + c.num_hidden_layers * c.num_attention_heads * c.head_dim * (prompt + mean))
    passes = max(cfg.updates * cfg.epochs, math.ceil(tokens / cfg.tokens_per_microbatch))
    wire = (8 * passes + 2) * count * (1 - 1 / (cfg.shards_per_replica or gpus))  # a pass: bfloat16 twice, float32 once
    return rollout, flops / (MATMUL * MFU), wire / NVLINK


def remedies(cfg, gpus):
    """What to turn, one after the other, as (flags, configuration, GPUs); each keeps the changes before it."""
    least = min(cfg.tokens_per_microbatch, cfg.max_prompt_tokens + cfg.max_new_tokens)
    for flags, change in (("--recompute", {"recompute": True}),
                          (f"and --tokens_per_microbatch {least}", {"tokens_per_microbatch": least}),
                          ("and --offload (weights, gradients, Adam in CPU memory: slower)", {"offload": True})):
        if (turned := replace(cfg, **change)) != cfg:
            yield flags, (cfg := turned), gpus
    yield f"and {4 * gpus} GPUs", replace(cfg, shards_per_replica=0), 4 * gpus


def report(cfg, gpus: int) -> dict:
    """Print what a rank of `gpus` needs for the run `cfg` (train.Config) and whether it fits; returns the numbers. Raises
    ValueError or FileNotFoundError, one line."""
    if dist.is_initialized() or train.WORLD > 1:
        raise ValueError("a dry run pretends all ranks itself: start it with python, without torchrun")
    if not cfg.model:
        raise ValueError("a dry run needs --model; the small default model fits anywhere")
    began, raw, fits = time.time(), architecture(cfg.model), {}
    c, m, needed = Config.from_dict(raw), run(cfg, raw, gpus), math.ceil(cfg.prompts / gpus) * cfg.samples
    print(f"{cfg.model}: {m['parameters'] / 1e9:.2f}B parameters on {gpus} GPUs, {cfg.tokens_per_microbatch:,} tokens a "
          f"micro-batch, {'' if cfg.recompute else 'no '}--recompute.\nGiB per GPU, measured by running it without data:\n")
    for name, size in {**m["categories"], "PEAK OF THE UPDATE": m["update"], "in CPU memory": m["host"],
                       "ROLLOUT (whole bfloat16 weights, no KV cache yet)": m["rollout"]}.items():
        if size:
            print(f"  {name:52s}{size:8.2f}")
    print(f"\nOf each card {RESERVE:.0f} GiB are left for CUDA context, NCCL and fragmentation. Seconds are estimates.")
    for card, (_, bandwidth) in CARDS.items():
        left, tokens, sequences = fit(c, cfg, m, card)
        fits[card] = left >= 0 < sequences
        print(f"  {card}: {'fits' if fits[card] else 'does NOT fit'}, {left:+.1f} GiB; KV cache {tokens:,} tokens = "
              f"{sequences:,} sequences of full length, {needed:,} are sampled")
        if fits[card]:
            rollout, update, wire = seconds(c, cfg, gpus, m["parameters"], sequences, bandwidth)
            print(f"    a step: about {rollout:.0f} s rollout + {update:.0f} s update; communication not counted, "
                  f"{wire:.1f} s at {NVLINK / 1e9:.0f} GB/s if nothing overlaps")
    print(f"  Assumed: mean lengths {MEAN:.0%} of the longest; decoding at {DECODE:.0%} of the roofline + {1e3 * GAP:.0f} ms "
          f"a step;\n  update at {MFU:.0%} of {MATMUL / 1e12:.0f} TFLOP/s. Not counted: prefill, rewards, evaluation, saves.")
    card = min(CARDS, key=CARDS.get)
    print(f"What to turn for an {card}, measured:\n" * (not fits[card]), end="")
    for flags, other, n in () if fits[card] else remedies(cfg, gpus):
        got = run(other, raw, n)
        left, _, sequences = fit(c, other, got, card)
        print(f"  {flags}: {max(got['update'], got['rollout']):.1f} GiB{', fits' * (left >= 0 < sequences)}", flush=True)
        if left >= 0 < sequences:
            break
    print(f"({time.time() - began:.0f} s on this machine)")
    return m | {"fits": fits}


def table():
    """1024 + 3072 tokens on 8 GPUs by micro-batch and recomputation, and what else README names: experiments/results/dry_run.json."""
    cases = list(product(("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-7B"), (8,), (8192, 16384, 32768), (True, False), (False,)))
    rows, path = [], Path(__file__).parent / "results/dry_run.json"
    for name, gpus, tokens, recompute, offload in [*cases, ("Qwen/Qwen2.5-7B", 4, 8192, True, False),
                                                   ("Qwen/Qwen2.5-7B", 8, 16384, True, True)]:
        m = measure(architecture(name), gpus, tokens, 1024, 3072, recompute, offload)
        rows.append({"model": name, "gpus": gpus, "tokens": tokens, "recompute": recompute, "offload": offload,
                     "update_GiB": round(m["update"], 1), "rollout_GiB": round(m["rollout"], 1), "host_GiB": round(m["host"], 1),
                     **{k: round(v, 2) for k, v in m["categories"].items() if v}})
        print(rows[-1], flush=True)
    path.write_text(json.dumps({"torch": torch.__version__, "prompt": 1024, "response": 3072, "rows": rows}, indent=1) + "\n")


def main():
    parser = HfArgumentParser(train.Config, description=__doc__, formatter_class=train.Help, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"dry_run.py: {message}; --help lists every flag")
    parser.add_argument("--gpus", type=int, default=8, help="ranks in all")
    parser.add_argument("--table", action="store_true", help="write experiments/results/dry_run.json")
    parser.set_defaults(model="Qwen/Qwen2.5-7B", prompts=128, samples=10, updates=2, max_new_tokens=3072,
                        tokens_per_microbatch=16384)
    torch.set_num_threads(1)
    try:
        cfg, args = parser.parse_args_into_dataclasses()
        table() if args.table else report(cfg, args.gpus)
    except (ValueError, OSError) as e:
        sys.exit(f"dry_run.py: {e}")


if __name__ == "__main__":
    main()
