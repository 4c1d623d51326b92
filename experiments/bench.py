"""Speed as a ratio, in one process, alternating, against transformers on the same random weights and the same lengths.

    python experiments/bench.py model      # forward + backward of a training batch: tokens/s and peak memory
    python experiments/bench.py rollout    # sampling, uniform and RL-shaped lengths: useful tokens/s [shape ...]
    python experiments/bench.py mismatch   # log-probs of the sampler against those of the trainer, float32 and bfloat16
    python experiments/bench.py train      # a whole GRPO step against TRL's GRPOTrainer, CPU (experiments/requirements.txt) [shape ...]
    python experiments/bench.py rewards    # graders: milliseconds a response, responses/s of the pool (no peer)

On a CPU: one thread (two beside a busy neighbour measure the neighbour), small Qwen2 shapes. On a GPU: 3B and 7B shapes
with random weights in bfloat16, and the share of the roofline. Results go to experiments/results/bench_<what>_<device>.json.
"""
import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

from model import Config, Model, attention_kernel, pack
import rollout
from rollout import generate

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
SHAPES = {  # hidden, mlp, layers, heads, kv heads, vocabulary
    "h64v32": (64, 192, 2, 4, 2, 32), "h128v64": (128, 384, 4, 4, 2, 64), "h256v4096": (256, 768, 4, 4, 2, 4096)}
GPU_SHAPES = {"3B": (2048, 11008, 36, 16, 2, 151936), "7B": (3584, 18944, 28, 28, 4, 152064)}


def pair(shape, std=0.1):
    """(ours, theirs): one Qwen2 of random weights, twice; at std 0.1 sharp enough that sampling is not uniform."""
    hidden, mlp, layers, heads, kv, vocab = shape
    config = transformers.Qwen2Config(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, vocab_size=vocab,
                                      num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True,
                                      max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, pad_token_id=0,
                                      initializer_range=0.02 if CUDA else std)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
        ours = Model(Config.from_dict(config.to_dict())).to(DTYPE)
    ours.load_state_dict({k.removeprefix("model."): v for k, v in theirs.state_dict().items() if k != "lm_head.weight"})
    return ours, theirs


def clock():
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    if torch.get_num_threads() > 1:
        return time.perf_counter()
    return time.process_time()  # CPU seconds: other jobs on the machine do not count


def alternate(runs, repeats):
    """{name: [seconds]} of the functions `runs`, one warm-up, then in turn."""
    seconds = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, f in runs.items():
            t = clock()
            f()
            if i:
                seconds[name].append(clock() - t)
    return seconds


def row(name, seconds, tokens, mine="ours"):
    """Median tokens/s of each, and the ratio pair by pair: median, min, max."""
    rate = {k: statistics.median(tokens / t for t in v) for k, v in seconds.items()}
    best = max((k for k in seconds if k != mine), key=rate.get)
    ratios = [b / a for a, b in zip(seconds[mine], seconds[best])]
    out = {"case": name, **{k: round(v) for k, v in rate.items()}, "against": best,
           "ratio": round(statistics.median(ratios), 2), "spread": [round(min(ratios), 2), round(max(ratios), 2)]}
    print(f"{name:26s} " + "  ".join(f"{k} {v:,.0f} tok/s" for k, v in rate.items()) + f"  ratio {out['ratio']} {out['spread']}",
          flush=True)
    return out


CASES = {"uniform": [80] * 32, "ragged": [16 + 3 * k for k in range(32)] + [208] * 2}
if CUDA:  # theirs holds all logits of the padded batch in float32, thrice: 30 GB
    CASES = {"uniform": [512] * 8, "ragged": [2**k for k in range(4, 12)]}


def training_passes(shape, lengths):
    """{name: forward and backward of one batch}: packed log-probs of ours, padded logits and log_softmax of theirs."""
    ours, theirs = pair(shape)
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, shape[-1], (n,), generator=g).to(DEVICE) for n in lengths]
    batch = pack([i.tolist() for i in ids], [1] * len(ids), DEVICE)
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)

    def run_ours():
        ours.zero_grad()
        ours(*batch)[0].sum().backward()

    def run_theirs():
        theirs.zero_grad()
        z = theirs(padded, attention_mask=mask).logits[:, :-1].float()
        logp = z.log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0]
        (logp * mask[:, 1:]).sum().backward()
    return {"ours": run_ours, "transformers": run_theirs}


def peak(name, case, who):
    """MiB that one pass of `who` needs on top of the models. On a CPU in a process of its own: its high-water mark."""
    if CUDA:
        run = training_passes(GPU_SHAPES[name], CASES[case])[who]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) // 2**20
    return int(subprocess.run([sys.executable, __file__, "peak", name, case, who], capture_output=True, text=True,
                              check=True).stdout)


def peak_here(name, case, who):
    run = training_passes(SHAPES[name], CASES[case])[who]
    before = high_water()
    run()
    return high_water() - before


def high_water():
    """MiB this process had at most (Linux; ru_maxrss would start at the parent's)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def bench_model():
    """Training passes with equal and with ragged lengths: tokens/s and peak memory."""
    rows = []
    shapes = {"3B": GPU_SHAPES["3B"]} if CUDA else SHAPES  # of 7B, two with gradients are 60 GB
    for name, shape in shapes.items():
        for case, lengths in CASES.items():
            seconds = alternate(training_passes(shape, lengths), 3 if CUDA else 7)
            out = row(f"{name} {case}", seconds, sum(lengths))
            out["peak_MiB"] = {who: peak(name, case, who) for who in seconds}
            print(f"{'':26s} peak memory of a pass, MiB: {out['peak_MiB']}", flush=True)
            if CUDA:  # 6 FLOPs a weight and token, and the attention's; against the matmul rate of this very card
                hidden, mlp, layers, heads, kv, vocab = shape
                weights = layers * (2 * hidden * hidden + 2 * hidden * hidden * kv // heads + 3 * hidden * mlp) + vocab * hidden
                flops = sum(6 * weights * n + 6 * layers * hidden * n * n for n in lengths)
                out["mfu"] = round(flops / statistics.median(seconds["ours"]) / matmul_rate(), 3)
                out["kernel"] = attention_kernel(torch.device(DEVICE), DTYPE)
            rows.append(out)
    return rows


def matmul_rate():
    a = torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE)
    seconds = alternate({"mm": lambda: a @ a}, 10)["mm"]
    return 2 * 8192**3 / statistics.median(seconds)


def roofline(shape, rows, context):
    """Tokens/s of decoding if a step did nothing but read weights, cache and logits, or multiply, at the H200's measured
    4.3 TB/s and 790 TFLOP/s; production engines reach 73 % of it."""
    hidden, mlp, layers, heads, kv, vocab = shape
    weights = layers * (2 * hidden * hidden + 2 * hidden * hidden * kv // heads + 3 * hidden * mlp) + vocab * hidden
    cache = 2 * layers * hidden * kv // heads * 2  # bytes a token
    seconds = max(2 * weights * rows / 790e12, 2 * weights / 4.3e12) + rows * (context * cache + vocab * 16) / 4.3e12
    return rows / seconds


def time_shares(run):
    """Where the time of one run goes: {part: share}. Attention includes the writes to the cache, sampling ends with the
    token's log-prob; other is norms, rotary, activations, bookkeeping and the calls themselves."""
    from torch.profiler import ProfilerActivity, profile, record_function
    real_draw, real_decode = rollout.draw, rollout.Cache.decode

    def draw(*args):
        with record_function("sampling"):
            return real_draw(*args)

    def decode(*args):
        inner = real_decode(*args)

        def attend(*qkv):
            with record_function("attention"):
                return inner(*qkv)
        return attend
    try:
        rollout.draw, rollout.Cache.decode = draw, decode
        with profile(activities=[ProfilerActivity.CPU]) as p:
            t = clock()
            run()
            t = clock() - t
    finally:
        rollout.draw, rollout.Cache.decode = real_draw, real_decode
    events = {e.key: e for e in p.key_averages()}
    parts = {"matmul": sum(events[k].self_cpu_time_total for k in ("aten::mm", "aten::addmm") if k in events),
             **{k: events[k].cpu_time_total for k in ("attention", "sampling")}}
    return {k: round(v / 1e6 / t, 2) for k, v in parts.items()} | {"other": round(1 - sum(parts.values()) / 1e6 / t, 2)}


def bench_rollout(*only):
    """P prompts x 8 samples. Uniform: as many tokens each. RL-shaped: an EOS that makes lengths geometric, the cap 4 to 8
    times the mean; only tokens up to the EOS count. transformers draws its own samples: same distribution, other numbers.
    It runs with each of its caches, and the ratio is against the best of them."""
    rows = []
    P, length, uniform, cap, mean, repeats = (20, 512, 1024, 2048, 400, 1) if CUDA else (32, 16, 64, 192, 32, 3)
    for name, shape in (GPU_SHAPES if CUDA else SHAPES).items():
        if only and name not in only:
            continue
        ours, theirs = pair(shape)
        vocab, g = shape[-1], torch.Generator().manual_seed(0)
        prompts = torch.randint(1, vocab, (P, length), generator=g)
        batch = prompts.repeat_interleave(8, 0).to(DEVICE)
        useful = {}

        def mine(cap, eos):
            out = generate(ours, prompts.tolist(), 8, cap, eos_ids=eos, seed=1)
            useful["ours"] = sum(len(r.logp) for r in out)

        def count(name, responses, eos):  # tokens up to and with the first EOS
            useful[name] = sum(next((t + 1 for t, x in enumerate(r) if x in eos), len(r)) for r in responses)

        def hf(cap, eos, cache):
            torch.manual_seed(1)
            out = theirs.generate(batch, attention_mask=torch.ones_like(batch), do_sample=True, max_new_tokens=cap,
                                  top_k=0, eos_token_id=eos or None, pad_token_id=0, cache_implementation=cache)
            count(cache or "dynamic", out[:, length:].tolist(), set(eos))

        def hf_continuous(cap, eos):
            config = transformers.GenerationConfig(do_sample=True, max_new_tokens=cap, top_k=0, eos_token_id=eos or -1,
                                                   pad_token_id=0)
            out = theirs.generate_batch(batch.tolist(), generation_config=config, progress_bar=False)
            count("continuous", [r.generated_tokens for r in out.values()], set(eos))
        some = list(range(1, 1 + max(1, round(vocab / mean))))  # one word in `mean` ends it
        for case, cap, eos in ((f"uniform {uniform}", uniform, []), (f"RL-shaped, cap {cap}", cap, some)):
            runs = {"ours": lambda: mine(cap, eos), "dynamic": lambda: hf(cap, eos, None),
                    "static": lambda: hf(cap, eos, "static")}
            if CUDA:
                runs["continuous"] = lambda: hf_continuous(cap, eos)
            seconds = alternate(runs, repeats)
            seconds = {k: [t / useful[k] for t in v] for k, v in seconds.items()}  # per useful token
            out = row(f"{name} {case}", seconds, 1) | {"useful": dict(useful), "mean_length": round(useful["ours"] / P / 8, 1)}
            if CUDA:
                out["roofline"] = round(out["ours"] / roofline(shape, P * 8, length + useful["ours"] / P / 16), 3)
                print(f"{'':26s} share of the decode roofline {out['roofline']}", flush=True)
            else:
                out["time"] = time_shares(runs["ours"])
                print(f"{'':26s} our time: {out['time']}", flush=True)
            rows.append(out)
        del ours, theirs
    return rows


PUBLIC_MISMATCH = {  # sampler against trainer, bfloat16, as the sources report it
    "vLLM vs FSDP, Qwen3-8B (torchtitan docs/bitwise_parity.md)": "KL up to 0.0084, worst token 1.56",
    "SGLang vs trainer (slime, Miles recipes)": "mean 0.02 is normal",
    "engines vs trainers, dense models (literature)": "KL 4e-4 to 1e-2",
    "vLLM vs FSDP, Qwen2.5-32B (Yao et al. 2025)": "worst difference of a probability 1.0"}


def bench_mismatch(*only):
    """log p of every sampled token, as the sampler recorded it (cached decoding) and as the trainer computes it (packed)."""
    rows = []
    for name, shape in (GPU_SHAPES if CUDA else SHAPES).items():
        for dtype in () if only and name not in only else (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16):
            model = pair(shape)[0].to(dtype)
            prompts = torch.randint(1, shape[-1], (32, 16), generator=torch.Generator().manual_seed(0)).tolist()
            rollouts = generate(model, prompts, 8, 64, eos_ids=[], seed=1)
            trainer = []
            for i in range(0, len(rollouts), 64):
                batch = rollouts[i:i + 64]
                ids = torch.tensor([t for r in batch for t in r.tokens], device=DEVICE)
                targets = torch.tensor([t for r in batch for t in [-1] * (r.prompt_len - 1) + r.tokens[r.prompt_len:] + [-1]])
                with torch.no_grad():
                    trainer.append(model(ids, [len(r.tokens) for r in batch], targets.to(DEVICE))[0].double().cpu())
            theirs, mine = torch.cat(trainer), torch.tensor([x for r in rollouts for x in r.logp], dtype=torch.double)
            d = theirs - mine
            out = {"case": f"{name} {str(dtype).removeprefix('torch.')}", "tokens": len(d), "mean": d.abs().mean().item(),
                   "worst": d.abs().max().item(), "worst_p": (theirs.exp() - mine.exp()).abs().max().item(),
                   "k3_kl": (d.exp() - 1 - d).mean().item(), "entropy": -mine.mean().item()}
            print("  ".join(f"{k} {v:.2g}" if isinstance(v, float) else str(v) for k, v in out.items()), flush=True)
            rows.append(out)
    for source, figures in PUBLIC_MISMATCH.items():
        print(f"{source}: {figures}")
    return rows + [{"case": k, "public": v} for k, v in PUBLIC_MISMATCH.items()]


TRAIN_CASES = [  # shape, longest response, whether a word ends it, our tokens in a micro-batch, TRL's rows in one, TRL's cache
    ("h64v32", 48, False, 4096, 256, "dynamic"),
    ("h128v64", 48, False, 2048, 64, "static"), ("h128v64", 48, False, 2048, 256, "dynamic"),
    ("h256v4096", 48, False, 2048, 32, "dynamic"), ("h256v4096", 48, False, 2048, 256, "dynamic"),
    ("h64v32", 192, True, 4096, 64, "dynamic"), ("h64v32", 192, True, 4096, 256, "dynamic"),
    ("h128v64", 256, True, 2048, 64, "dynamic"), ("h128v64", 256, True, 2048, 256, "dynamic")]


def bench_train(*only, steps=3):
    """Seconds of a step of 32 prompts x 8 samples: rollout, reward, one update with grpo and AdamW, beta 0. Ours is
    train.sample and train.learn as they stand; theirs is TRL's GRPOTrainer.train(), step by step in turn with ours, from the
    same weights, without evaluation, logging, saving, gradient checkpointing, bf16 or a second log-prob pass, with all 256
    rows generated at once; trained on in one micro-batch of 256, as one would type it first, and in smaller ones, whose number
    and whose kind of cache were the fastest in trials with 32, 64 and 256 rows. RL-shaped: one word in V ends a
    response, lengths are geometric with mean V. Each samples for itself, from the same distribution: `length` has the mean
    lengths, `per_token` the ratio per sampled token."""
    import tempfile
    import warnings

    import datasets
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    import data
    import train
    warnings.filterwarnings("ignore", category=FutureWarning)
    P, n, out = 32, 8, []

    def grade(text):  # of no use, and the same for both: there is something to learn from in every group
        return len(set(text.split())) % 7 / 6

    for name, cap, ends, budget, micro, cache in TRAIN_CASES:
        if only and name not in only:
            continue
        case = f"{name} {f'RL-shaped, cap {cap}' if ends else f'{cap} tokens'}, TRL with {micro} rows"
        vocab = SHAPES[name][-1]
        ours, theirs = pair(SHAPES[name], 0.02)
        eos = 1 if ends else vocab  # the model cannot say `vocab`: both sides run to the cap
        ours.config.raw["eos_token_id"] = theirs.generation_config.eos_token_id = eos
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab + 1)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token=f"w{eos}")
        prompts = torch.randint(2, vocab, (P * (steps + 1), 16), generator=torch.Generator().manual_seed(0)).tolist()
        problems = [(data.Problem(text, {}, ""), text, p) for p, text in zip(prompts, tokenizer.batch_decode(prompts))]
        seconds, length = {"ours": [], "TRL": []}, {"ours": [], "TRL": []}
        cfg = train.Config(loss="grpo", prompts=P, samples=n, updates=1, max_new_tokens=cap, lr=1e-6,
                           tokens_per_microbatch=budget)
        optimizer = torch.optim.AdamW(ours.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

        def our_step(i):
            rows = train.sample(ours, problems[i * P:(i + 1) * P], range(i * P, (i + 1) * P), n, cfg, tokenizer,
                                lambda items: [(grade(text), "ok") for _, text, _ in items])
            train.learn(ours, None, optimizer, rows, cfg)
            length["ours"].append(statistics.mean(r.length for r in rows))

        def reward(completions, completion_ids, **_):
            length["TRL"].append(statistics.mean(map(len, completion_ids)))
            return [grade(text) for text in completions]

        class Turns(transformers.TrainerCallback):
            def on_step_begin(self, *args, **kwargs):  # of the first step: TRL is set up by now
                self.t = self.t if seconds["TRL"] else clock()

            def on_step_end(self, args, state, control, **kwargs):
                seconds["TRL"].append(clock() - self.t)
                t = clock()
                our_step(state.global_step - 1)
                seconds["ours"].append(clock() - t)
                self.t = clock()

        with tempfile.TemporaryDirectory() as aside:
            config = GRPOConfig(
                aside, max_steps=steps + 1, per_device_train_batch_size=micro, gradient_accumulation_steps=P * n // micro,
                num_generations=n, max_completion_length=cap, beta=0.0, num_iterations=1, loss_type="grpo", temperature=1.0,
                learning_rate=cfg.lr, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.01, shuffle_dataset=False,
                gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[], logging_strategy="no", eval_strategy="no",
                save_strategy="no", disable_tqdm=True, cache_implementation=None if cache == "dynamic" else cache)
            texts = datasets.Dataset.from_dict({"prompt": [text for _, text, _ in problems]})
            trainer = GRPOTrainer(theirs, reward, config, texts, processing_class=tokenizer, callbacks=[Turns()])
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        assert len(seconds["TRL"]) == len(length["TRL"]) == steps + 1, "TRL made other steps than it was asked for"
        median = {k: round(statistics.median(v[1:]), 3) for k, v in seconds.items()}  # without the warm-up
        length = {k: round(statistics.mean(v[1:]), 1) for k, v in length.items()}
        ratios = [b / a for a, b in zip(seconds["ours"][1:], seconds["TRL"][1:])]
        ratio = statistics.median(ratios)
        out.append({"case": case, **median, "ratio": round(ratio, 2), "spread": [round(min(ratios), 2), round(max(ratios), 2)],
                    "length": length, "per_token": round(ratio * length["ours"] / length["TRL"], 2),
                    "TRL_cache": cache, "trl": trl.__version__})
        print(out[-1], flush=True)
    return out


def bench_rewards():
    """The hard cases of tests/test_rewards.py, one by one and through the pool, and the plain numbers most rollouts end with."""
    from rewards import Scorer, grade
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from test_rewards import MATH
    hard = [("math", rf"\boxed{{{text}}}", {"answer": gold}) for gold, right, wrong in MATH for text in right + wrong]
    plain = [("math", rf"so the answer is \boxed{{{i % 50}}}.", {"answer": str(i % 40)}) for i in range(2000)]
    rows = []
    for case, items in (("hard math cases", hard), ("plain numbers", plain)):
        seconds = []
        for task, response, problem in items:
            t = time.perf_counter()
            grade(task, response, **problem)
            seconds.append(time.perf_counter() - t)
        with Scorer(workers=2) as scorer:
            scorer(hard[:4])  # start the workers
            t = time.perf_counter()
            scorer(items)
            t = time.perf_counter() - t
        rows.append({"case": case, "responses": len(items), "median_ms": round(1000 * statistics.median(seconds), 3),
                     "p90_ms": round(1000 * sorted(seconds)[int(0.9 * len(items))], 1), "max_s": round(max(seconds), 2),
                     "pool_per_second": round(len(items) / t)})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    benches = {"model": bench_model, "rollout": bench_rollout, "mismatch": bench_mismatch, "train": bench_train, "rewards": bench_rewards}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*benches, "peak"])
    parser.add_argument("only", nargs="*", help="of rollout, mismatch, train: these shapes alone, printed and not written down")
    parser.add_argument("--threads", type=int, default=1, help="more than one: wall time instead of CPU seconds")
    args = parser.parse_intermixed_args()
    if args.what == "peak":
        print(peak_here(*args.only))
        sys.exit()
    shapes = {"rollout", "mismatch", "train"} & {args.what} and (GPU_SHAPES if CUDA else SHAPES)
    if unknown := [name for name in args.only if name not in shapes]:
        parser.error(f"{args.what} knows no shape {unknown[0]!r}" + (f"; one of {', '.join(shapes)}" if shapes else ""))
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    rows = benches[args.what](*args.only)
    if not args.only:
        path = Path(__file__).parent / f"results/bench_{args.what}_{DEVICE}{'' if args.threads == 1 else f'_{args.threads}_threads'}.json"
        machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU, {args.threads} thread{'s' * (args.threads > 1)}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "transformers": transformers.__version__,
                                    "rows": rows}, indent=1))
