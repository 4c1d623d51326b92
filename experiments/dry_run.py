"""Does it fit? The peak memory of one GPU, counted on a laptop before anything is rented.

    python experiments/dry_run.py --gpus 8 --model Qwen/Qwen2.5-7B --recompute   # flags of train.py
    python experiments/dry_run.py --table      # what fits where: the table of docs/gpus.md

The real model, FSDP and AdamW run as rank 0 of a process group that pretends, on tensors that have
shapes and no data, and PyTorch's FSDPMemTracker adds up what lives. The peak is that of a
micro-batch that meets the gradients of one before it. The tensors claim to be on a CPU, as FSDP
wants a device that exists, and Kernel stands for what a GPU's kernels keep.
"""
import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

import model as network
import rollout
import train
from model import Config, Model

GIB = 2**30
CARDS = {"24 GB": 22.0, "48 GB": 44.4, "80 GB": 79.1, "141 GB": 139.7}  # GiB that CUDA reports,
# the least of a size: L4, L40S, H100, H200
ASSUMED = """Assumed, not measured: prompts and responses as long as they may be, no prompt shared;
PyTorch's varlen attention (flash-attn takes less: it repeats no keys and values); 1 GiB for CUDA,
2 GiB for NCCL and the next block's weights where there are several cards, 4 % of a card lost to
fragmentation; generate() fills 60 % of what is free with its KV cache. Not seen: --compile, other
processes on the card."""
SHAPES = {  # as published: kind, hidden, mlp, layers, heads, kv heads, vocabulary, tied, context
    "Qwen/Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, 151936, True, 32768),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True, 131072),
    "Qwen/Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, 151936, True, 32768),
    "Qwen/Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False, 131072)}
MORE = {"HuggingFaceTB/SmolLM3-3B": ("smollm3", 2048, 11008, 36, 16, 4, 128256, True, 65536)}
CATEGORIES = {  # names of PyTorch's tracker
    "weights, this card's shard": ["Sharded Param"],
    "weights, gathered": ["Unsharded Param", "All Gather"],
    "gradients": ["Sharded Grad", "Unsharded Grad", "Reduce Scatter"],
    "optimizer": ["OptState"],
    "frozen weights, reference": ["Inputs"],
    "activations": ["Activation", "Buffer"],
    "temporary": ["Temp"]}


def architecture(name: str) -> dict:
    """config.json of a directory, of SHAPES, or from the hub. FileNotFoundError, one line."""
    path = Path(name) / "config.json"
    if path.is_file():
        return json.loads(path.read_text())
    known = SHAPES | MORE
    if name in known:
        keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings",
                "max_position_embeddings")
        return dict(zip(keys, known[name]))
    from huggingface_hub import hf_hub_download
    try:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ValueError("not owner/name")
        return json.loads(Path(hf_hub_download(name, "config.json")).read_text())
    except (OSError, ValueError) as e:  # what huggingface_hub raises is one of these
        raise FileNotFoundError(
            f"--model {name}: no config.json there, and none from the hub "
            f"({str(e).splitlines()[0]}); offline, give a directory with one, or one of "
            f"{', '.join(known)}") from None


# ---- Counting ----------------------------------------------------------------------------------

class Kernel(torch.autograd.Function):
    """A GPU's kernel as memory sees it: a result like its first input, and kept for backward are
    its inputs and one float32 for each row that it normalises."""

    @staticmethod
    def forward(ctx, *inputs):
        row = inputs[0].new_empty(inputs[0].shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(*inputs, row)
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:-1])


def attention(kernel, q, k, v, borders, longest):
    times = q.shape[1] // k.shape[1]
    return Kernel.apply(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))


def rms_norm(x, shape, weight, eps):
    return Kernel.apply(x, weight)


def exact_logits(h, W):
    return h.new_empty(len(h), len(W), dtype=torch.float32)


@contextmanager
def pretended(gpus, shards, dtype):
    """The device mesh of rank 0 of `gpus`, all in this process: collectives do nothing, tensors
    made inside have no data, and what depends on the device is as on a GPU."""
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    as_on_a_gpu = {"attention_kernel": lambda device, dtype: "torch varlen", "varlen": attention,
                   "exact_logits": exact_logits, "product": F.linear}
    try:
        shape = (gpus // shards, shards)  # as train.load_model has it
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard"))
        with (patch.multiple(network, **as_on_a_gpu), patch.object(F, "rms_norm", rms_norm),
              patch.object(train, "compute_dtype", lambda: dtype),
              FakeTensorMode(allow_non_fake_inputs=True)):
            yield mesh if shards < gpus else mesh["shard"]
    finally:
        dist.destroy_process_group()


def measure(raw, gpus, flags, dtype=torch.bfloat16) -> dict:
    """GiB on a GPU: "update", the peak in a micro-batch, and "categories", its parts; "resident" in
    the rollout, with whole weights; "prefill", what a prefill adds to that; "host", moved to CPU
    memory by --offload. And "parameters"."""
    prompt, longest = flags.max_prompt_tokens, longest_sequence(flags)
    full, rest = divmod(max(flags.tokens_per_microbatch, longest), longest)
    batch = packed([longest] * full + [rest] * (rest > 1), prompt)
    mine = math.ceil(flags.prompts / gpus) * prompt
    prompts = packed([prompt] * math.ceil(min(mine, rollout.PREFILL_TOKENS) / prompt), prompt)
    with pretended(gpus, flags.shards_per_replica or gpus, dtype) as mesh:
        torch.set_default_dtype(dtype if flags.lora else torch.float32)
        model = Model(Config.from_dict(raw))
        torch.set_default_dtype(torch.float32)
        if flags.lora:
            model.add_lora(flags.lora, flags.lora_alpha, flags.model)
        train.shard(model, mesh, flags.offload)
        model.recompute = flags.recompute
        reference = []
        if flags.kl_beta and not flags.lora:  # with it, a smaller pass of the same model
            reference.append(train.shard(Model(Config.from_dict(raw)), mesh))
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [p for m in reference for p in m.parameters()]  # the tracker sees what FSDP has:
        frozen += [p for p in model.parameters() if not hasattr(p, "placements")]  # not all of LoRA
        optimizer = torch.optim.AdamW(trained, fused=True)

        forward_and_backward(model, reference, batch)
        optimizer.step()  # untracked: DTensor tries its sharding on tensors of the full size
        with FSDPMemTracker(model, optimizer) as tracker:
            tracker.track_inputs(tuple(frozen))
            forward_and_backward(model, reference, batch)
        peak = tracked(tracker, "peak")
        optimizer.zero_grad()
        with FSDPMemTracker(model, optimizer) as tracker, train.whole_weights(model):
            tracker.track_inputs(tuple(frozen))
            resident = tracked(tracker, "current")["Total"]
            with torch.no_grad():
                ids, rows, _ = prompts
                model.body(ids, *network.causal(rows, "cpu"))
            prefill = tracked(tracker, "peak")["Total"] - resident

    moved = dict.fromkeys(["Sharded Param", "Sharded Grad", "OptState"], 0.0)
    if flags.offload:  # the same pass; these live on the other side of the bus
        moved = {kind: peak[kind] for kind in moved}
        peak |= dict.fromkeys(moved, 0.0)
    parts = {name: sum(peak[kind] for kind in kinds) for name, kinds in CATEGORIES.items()}
    return {"update": sum(parts.values()), "categories": parts,
            "resident": resident - moved["Sharded Param"] - moved["OptState"],
            "prefill": prefill, "host": sum(moved.values()),
            "parameters": sum(p.numel() for p in model.parameters())}


def longest_sequence(flags) -> int:
    longest = flags.max_prompt_tokens + flags.max_new_tokens
    return min(longest, flags.max_tokens or longest)


def packed(lengths, prompt):
    """model.pack()'s result for sequences of `lengths`, without sharing."""
    rows, N = [], sum(lengths)
    for length in lengths:
        start = rows[-1][-1] + 1 if rows else 0
        rows.append(range(start, start + length))
    responses = sum(max(0, length - prompt) for length in lengths)
    return torch.zeros(N, dtype=torch.long), rows, responses


def forward_and_backward(model, reference, batch):
    ids, rows, responses = batch
    where = torch.zeros(responses, 1, dtype=torch.long)  # tensors without data have no nonzeros
    with patch.object(torch.Tensor, "nonzero", lambda _: where):
        logp = model(ids, rows, ids)[0]
        with torch.no_grad():
            for other in reference:
                other(ids, rows, ids)
    logp.sum().backward()


def tracked(tracker, which) -> dict:
    """{category: GiB}."""
    found = Counter()
    for device in tracker.get_tracker_snapshot(which).values():
        for kind, size in device.items():
            found[getattr(kind, "value", kind)] += size / GIB
    return dict(found)


# ---- What it means -----------------------------------------------------------------------------

def fit(raw, gpus, flags, m, card) -> tuple[float, int]:
    """(GiB left at the tightest moment of a card of so many GiB, or less than 0; sequences that
    are sampled at once)."""
    c = Config.from_dict(raw)
    room = 0.96 * card - (3 if gpus > 1 else 1)
    free = room - m["resident"]
    token = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim / GIB  # bfloat16 k and v
    kv_tokens = flags.kv_tokens or int(rollout.GPU_CACHE_SHARE * max(0.0, free) / token)
    rows = math.ceil(flags.prompts / gpus) * flags.samples
    sequences = min(rows, kv_tokens // longest_sequence(flags))
    logits = 16 * sequences * c.vocab_size / GIB  # and three copies on the way to a token
    left = min(room - m["update"], free - kv_tokens * token - max(m["prefill"], logits))
    return (left, sequences) if sequences else (min(left, -1.0), 0)


def report(gpus, flags) -> dict:
    """Print what a rank of `gpus` needs and on which cards it fits; what would help an 80 GB card,
    if it does not. Returns measure()'s numbers and "fits", {card: sequences at once}."""
    raw = architecture(flags.model)
    m = measure(raw, gpus, flags)
    rows = math.ceil(flags.prompts / gpus) * flags.samples
    print(f"{flags.model}: {m['parameters'] / 1e9:.2f}B parameters on {gpus} GPUs, "
          f"{flags.tokens_per_microbatch:,} tokens a micro-batch, "
          f"{'' if flags.recompute else 'no '}--recompute.   GiB per GPU:")
    for name, size in {**m["categories"], "PEAK OF THE UPDATE": m["update"],
                       "ROLLOUT, before the KV cache": m["resident"],
                       "and in a prefill": m["prefill"], "in CPU memory": m["host"]}.items():
        if size:
            print(f"  {name:40s}{size:8.2f}")
    fits = {}
    for card, size in CARDS.items():
        left, sequences = fit(raw, gpus, flags, m, size)
        fits[card] = sequences if left >= 0 else 0
        verdict = f"fits, {left:.1f} GiB to spare" if fits[card] else "does NOT fit"
        print(f"  {card}: {verdict}; {sequences:,} of {rows:,} responses sampled at once")
    if not fits["80 GB"]:
        print("What to turn for 80 GB:")
        least = min(flags.tokens_per_microbatch, longest_sequence(flags))
        steps = {"--recompute": {"recompute": True},
                 f"and --tokens_per_microbatch {least}": {"tokens_per_microbatch": least},
                 "and --offload (slower)": {"offload": True}}
        for words, change in steps.items():
            turned = dataclasses.replace(flags, **change)
            if turned == flags:
                continue
            flags = turned  # each step keeps those before it
            better = measure(raw, gpus, flags)
            helped = fit(raw, gpus, flags, better, CARDS["80 GB"])[0] >= 0
            print(f"  {words}: update {better['update']:.1f} GiB{', fits' if helped else ''}")
            if helped:
                break
    print(ASSUMED)
    return m | {"fits": fits}


# ---- The table of docs/gpus.md -----------------------------------------------------------------

WORKLOAD = "--prompts 128 --samples 8 --updates 2 --max_new_tokens 3072"
LADDER = ("", "--recompute", "--recompute --tokens_per_microbatch 4096",
          "--recompute --tokens_per_microbatch 4096 --offload")
LORA_LADDER = (*LADDER[:3], "--recompute --tokens_per_microbatch 4096 --kv_tokens 40960")
SIZES = ("update", "resident", "prefill", "host")


def table() -> list[dict]:
    """Of each model on one and eight cards the first of LADDER that fits, and with LoRA on one; as
    Markdown and in experiments/results/dry_run.json."""
    found = []
    for gpus, lora in ((1, ""), (8, ""), (1, "--lora 8")):
        head = f"| {gpus} x {lora}".strip()
        print(f"\n{head} | " + " | ".join(CARDS) + " |\n|---" + "|---" * len(CARDS) + "|")
        for name in SHAPES:
            raw, cells = architecture(name), dict.fromkeys(CARDS)
            for turned in LORA_LADDER if lora else LADDER:
                asked = f"--model {name} {WORKLOAD} {lora} {turned}"
                flags = parse(gpus, asked.split())
                m = measure(raw, gpus, flags)
                said = f"`{turned or 'no flag'}`, {m['update']:.0f} GiB"
                if m["host"]:
                    said += f" and {m['host']:.0f} GiB of CPU memory"
                for card, size in CARDS.items():
                    left, sequences = fit(raw, gpus, flags, m, size)
                    if left >= 0 and not cells[card]:
                        cells[card] = f"{said}, {sequences} at once"
                found.append({"model": name, "gpus": gpus, "flags": f"{lora} {turned}".strip(),
                              **{key: round(m[key], 1) for key in SIZES}})
                if all(cells.values()):
                    break
            print(f"| {name.split('-')[-1]} | "
                  + " | ".join(cell or "no" for cell in cells.values()) + " |", flush=True)
    return found


def parse(gpus, argv) -> train.Flags:
    """train.py's flags as they would be on `gpus` cards. ValueError, one line."""
    if dist.is_initialized() or train.WORLD > 1:
        raise ValueError("a dry run pretends all ranks itself: start it without torchrun")
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: must be at least 1")
    with patch.multiple(train, WORLD=gpus, DEVICE=torch.device("cuda", 0)):
        flags = train.parse(argv)
    if not flags.model:
        raise ValueError("--model is missing; the small default model fits anywhere")
    context = Config.from_dict(architecture(flags.model)).max_position_embeddings
    longest = longest_sequence(flags)
    if longest > context:
        raise ValueError(f"--max_prompt_tokens + --max_new_tokens is {longest}, and the model's "
                         f"context is {context}")
    return flags


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     epilog="All other flags are train.py's.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"dry_run.py: {message}")
    parser.add_argument("--gpus", type=int, default=8, help="ranks in all (8)")
    parser.add_argument("--table", action="store_true", help="write results/dry_run.json")
    args, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    try:
        if args.table:
            path = Path(__file__).parent / "results/dry_run.json"
            rows = [json.dumps(row) for row in table()]
            path.write_text("[" + ",\n ".join(rows) + "]\n")
        else:
            report(args.gpus, parse(args.gpus, rest))
    except (ValueError, OSError) as e:
        sys.exit(f"dry_run.py: {e}")


if __name__ == "__main__":
    main()
