"""One card plays one rank of eight: measured memory, tokens/s of rollout and update, and what a step would take.

    python experiments/one_rank.py --recompute                               # Qwen2.5-7B as one of 8, ACPO's sizes
    python experiments/one_rank.py --dry_run 4 --model DIR --prompts 8 ...   # of 4; train.py's flags; DIR/config.json is enough

train.py's own load_model, generate and learn run as rank 0 of a process group that pretends (PyTorch's fake backend), with the
real sizes and random weights. Weights, gradients and Adam states are rank 0's share; a gathered weight has its full size and
repeats that share. One word in so many ends a response, so that lengths are geometric; the other ranks' rollouts are copies
of rank 0's after prompts of their own. What it leaves out: communication (a collective copies within the card at most),
graders, saving. Beside the measured peak stands the one that --dry_run predicts; `held` is what PyTorch had taken from the
card. Tokens/s are this rank's, those of the update count prompts too. On CUDA a line is added to
experiments/results/one_rank.jsonl; on a CPU it runs as well, but reports no memory.
"""
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from experiments.dry_run import GIB, MEAN, architecture, run
from model import Model
from rollout import generate

CUDA = train.DEVICE.type == "cuda"


def random_weights(model):
    """In the place of Model.load_weights: this rank's share, normal as from_scratch has it; norms 1, biases 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            share = p.to_local()
            share.normal_(0, 0.02) if p.dim() > 1 else share.fill_(name.endswith("norm.weight") or "layernorm" in name)
    return model


def made_up_gradients(parameters, _):
    """In the place of clip_grad_norm_: what a collective without peers leaves in a gradient is not a number to learn from."""
    for p in parameters:
        p.grad.to_local().fill_(1e-6)
    return torch.tensor(1.0)


def timed(f):
    """(f(), seconds, peak GiB that PyTorch had allocated, peak GiB that it held), the peaks None on a CPU."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    t, out = time.perf_counter(), f()
    if CUDA:
        torch.cuda.synchronize()
    peaks = (torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB) if CUDA else (None, None)
    return out, time.perf_counter() - t, *peaks


def play(cfg, raw, gpus, steps=2) -> dict:
    """Measure the last of `steps` steps (the first ones warm up) of rank 0 of `gpus`."""
    draw, words, length = random.Random(0), raw["vocab_size"], max(1, int(MEAN * cfg.max_new_tokens))
    prompts = [[draw.randrange(words) for _ in range(max(1, int(MEAN * cfg.max_prompt_tokens)))] for _ in range(cfg.prompts)]
    mine = prompts[:-(-cfg.prompts // gpus)]
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        with tempfile.TemporaryDirectory() as source, patch.multiple(train, WORLD=gpus, gather=lambda rows: rows), \
                patch.object(Model, "load_weights", random_weights), patch("torch.nn.utils.clip_grad_norm_", made_up_gradients):
            (Path(source) / "config.json").write_text(json.dumps(raw))
            (Path(source) / "none.safetensors").touch()
            model = train.load_model(source, cfg)
            reference = train.load_model(source, cfg).requires_grad_(False) if cfg.kl_beta else None
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
            for _ in range(steps):
                with train.whole_weights(model):
                    rollouts, *rollout = timed(lambda: generate(
                        model, mine, cfg.samples, cfg.max_new_tokens, eos_ids=list(range(-(-words // length))),
                        kv_tokens=cfg.kv_tokens or None, progress=True))
                rows = [train.Row(prompt + r.tokens[r.prompt_len:], r.prompt_len, r.logp, r.finished, draw.choice((0.0, 1.0)), "ok", g)
                        for g, prompt in enumerate(prompts) for r in rollouts[g % len(mine) * cfg.samples:][:cfg.samples]]
                _, *update = timed(lambda: train.learn(model, reference, optimizer, rows, cfg))
    finally:
        dist.destroy_process_group()
    passes = cfg.epochs * (1 + (cfg.loss == "ar_lopti"))
    sampled, packed = sum(len(r.logp) for r in rollouts), passes * sum(len(r.tokens) for r in rows) / gpus
    return {"parameters": sum(p.numel() for p in model.parameters()), "sequences": len(rollouts),
            "mean_length": sampled / len(rollouts), "step_s": rollout[0] + update[0],
            **{f"rollout_{k}": v for k, v in zip(("s", "GiB", "held_GiB"), rollout)}, "rollout_tokens_per_s": sampled / rollout[0],
            **{f"update_{k}": v for k, v in zip(("s", "GiB", "held_GiB"), update)}, "update_tokens_per_s": packed / update[0]}


def main():
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    sys.argv[1:1] = ("--dry_run 8 --model Qwen/Qwen2.5-7B --prompts 128 --samples 10 --updates 2 --max_new_tokens 3072 "
                     "--tokens_per_microbatch 16384").split()  # what is typed comes after, and goes before
    try:
        cfg = train.parse()
        torch.set_num_threads(cfg.threads)
        raw = architecture(cfg.model)
        expected = run(cfg, raw, cfg.dry_run)
        got = play(cfg, raw, cfg.dry_run)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"one_rank.py: {str(e).splitlines()[0]}")
    flags = {k: v for k, v in asdict(cfg).items() if v != getattr(train.Config(), k)}
    line = {"device": torch.cuda.get_device_name() if CUDA else "CPU", "torch": torch.__version__, "attention": train.KERNEL,
            "update_GiB_by_dry_run": expected["update"], **got}
    line = {"flags": flags, **{k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}}
    print(json.dumps(line, indent=1))
    if CUDA:
        with open(Path(__file__).parent / "results/one_rank.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
