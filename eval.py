"""A checkpoint in, a table of benchmark scores out.

    python eval.py runs/default                    # a run's newest checkpoint, on its own task
    python eval.py Qwen/Qwen2.5-7B --suite math --template qwen_math --max_new_tokens 3072
    torchrun --nproc_per_node=8 -- eval.py ckpt/ --tasks math500,aime24 --n 32 --k 1,8,32

(The lone -- keeps torchrun from taking --n for an abbreviation of a flag of its own.)
Writes results.json, samples_<task>.jsonl (n responses per question) and greedy_<task>.jsonl (one).
The sample files grow as the work goes on: killed and started again, it continues; responses are
kept, grades are always made anew. Response j to question i is a function of (weights, prompt,
--seed, i, j): batches and ranks do not change it, up to rounding (exact in float32 as far as was
seen; bfloat16 rounds differently in batches of different shape).
"""
import argparse
import hashlib
import json
import math
import os
import re
import shlex
import sys
import time
from collections import Counter, defaultdict, namedtuple
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean as mean

import torch
import torch.distributed as dist

import data
import rewards
import tools
from model import Model, Progress, read_json, write_text
from rollout import converse, generate

SUITES = {"math": "math500 aime24 aime25 amc23 minerva olympiadbench gsm8k".split(),
          "logic": "countdown_hub kk_hub hitab".split(),
          "gym": """rg:chain_sum rg:gcd rg:prime_factorization rg:letter_counting
                    rg:spell_backward rg:word_sorting rg:number_sorting rg:calendar_arithmetic
                    rg:knights_knaves rg:mini_sudoku rg:leg_counting rg:syllogism""".split(),
          "offline": list(data.TASKS)}
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
MAIN = RANK == 0
CUDA = torch.cuda.is_available()
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
BATCH = 4096 if CUDA else 256  # responses per rank between two writes to disk


def evaluate(args):
    began = time.time()
    run = origin(args)
    tasks = known_tasks(args, run)
    problems = {name: load_problems(task, args, run) for name, task in tasks.items()}
    job = load(args, list(tasks.values()))
    longest = job.model.config.max_position_embeddings - args.max_new_tokens
    variables = data.parse_args(args.template_args, "--template_args")
    questions = {name: data.encode(some, args.template, job.tokenizer, longest, variables)
                 for name, some in problems.items()}
    job.total = sum(map(len, questions.values())) * (args.n + (args.temperature > 0))
    args.out.mkdir(parents=True, exist_ok=True)  # after all that may be wrong with the flags
    if MAIN:
        flags = ", ".join(f"{name} {value}" for name, value in vars(args).items() if value)
        print(f"{job.model.source}: {DTYPE} on {WORLD} x {DEVICE.type}; {flags}")

    results = {}
    with rewards.Scorer(workers=2) as scorer:
        for name, asked in questions.items():
            path = args.out / f"samples_{name}.jsonl"
            sampling = Sampling(args.n, args.temperature, args.top_p, args.seed)
            rows = greedy = collect(path, asked, sampling, job, scorer)
            if args.temperature:
                sampling = Sampling(1, 0.0, 1.0, 0)
                greedy = collect(args.out / f"greedy_{name}.jsonl", asked, sampling, job, scorer)
            hub = data.SOURCES.get(tasks[name], {}).get("test")
            results[name] = score_rows(rows, args.n, args.k) | {
                "greedy": mean(row["score"] for row in greedy),
                "source": hub and f"{hub.hub}@{hub.revision}"}
    if MAIN:
        target = args.out / "results.json"
        grader = hashlib.sha256(Path(rewards.__file__).read_bytes()).hexdigest()[:12]
        seconds = time.time() - began
        record = {"results": results, "config": vars(args), "checkpoint": job.model.source,
                  "dtype": DTYPE, "versions": {"torch": torch.__version__, "rewards.py": grader},
                  "date": round(began), "seconds": round(seconds)}
        write_text(target, json.dumps(record, indent=1, default=str))
        print("\n" + report(results, args.n, args.k))
        print(f"\n{seconds:.0f} s. {target}, and the responses beside it; to read them: "
              f"python experiments/microscope.py {shlex.quote(str(path))}")


# ---- Questions -----------------------------------------------------------------------------------

USUAL = {  # of flags that the run decides where they are not given; max_new_tokens: see load()
    "template": "auto", "template_args": [], "data_args": [], "tool": "none", "search_url": "",
    "turns": 10, "turn_tokens": 0, "max_new_tokens": 0}


def origin(args):
    """The flags of the train.py run that the checkpoint belongs to, or the usual ones; they become
    those of `args` that were not given."""
    path = Path(args.checkpoint)
    run = USUAL
    for directory in (path, *path.resolve().parents[:2]):  # step-000100/adapter: its run
        file = directory / "config.json"
        found = read_json(file) if path.is_dir() and file.is_file() else {}
        if "save_every" in found:  # that of a model has no such key
            run = USUAL | found
            break
    for name, usual in USUAL.items():
        value = getattr(args, name) or run[name] or usual
        if type(value) is not type(usual):  # a stranger's
            raise ValueError(f"{file}: {name} cannot be {value!r}")
        setattr(args, name, value)
    hub = Path("runs") / f"eval-{args.checkpoint.replace('/', '--')}"
    args.out = args.out or (path if path.is_dir() else hub)
    return run


def known_tasks(args, run):
    """{name in the results: task}."""
    asked = [task for task in args.tasks.split(",") if task] + SUITES.get(args.suite, [])
    if not asked:
        asked = [str(run.get("eval_data") or run["data"])] if "data" in run else SUITES["offline"]
    names = {}
    for task in dict.fromkeys(asked):
        name = Path(task.replace(":", "-")).stem  # of a file, or of rg:NAME
        if name in names:
            raise ValueError(f"--tasks {task}: samples_{name}.jsonl is another task's")
        names[name] = task
    return names


def load_problems(task, args, run):
    """Of the test split; of a run's own data, what it did not train on."""
    few = 128 if task.startswith("rg:") else 512 if task in data.TASKS else None
    config = data.parse_args(args.data_args, "--data_args") if task.startswith("rg:") else {}
    if not (args.tasks or args.suite or run.get("eval_data")):
        problems = data.held_out(task, args.limit or few, config)
    else:
        problems = data.load(task, "test", args.limit or few, args=config)
    data.check_golds(problems, rewards.check_gold)
    return problems


@dataclass
class Job:
    model: Model
    tokenizer: object
    end_ids: list      # of ids that end a response
    tool: object       # of tools.py, or None
    args: object       # the flags
    progress: Progress
    done: int = 0      # responses of all tasks that all ranks have sampled since the start
    total: int = 0


def load(args, tasks):
    """Model and tokenizer, and the flags that depend on them and on the tasks."""
    model = Model.from_pretrained(args.checkpoint, DTYPE, DEVICE)
    model.check_finite()
    tokenizer = data.load_tokenizer(model.source)
    args.template = data.choose_template(args.template, tokenizer)
    hub = any(task in data.SOURCES for task in tasks)
    args.max_new_tokens = args.max_new_tokens or (3072 if hub else 1024)
    end_ids = data.end_ids(tokenizer, model.eos_ids, model.config.vocab_size)
    task, *others = tasks
    if args.tool != "none" and others:
        raise ValueError(f"--tool {args.tool}: give one of --tasks, or --tool none")
    tool = tools.make(args.tool, data.facts_of(task), args.search_url,
                      partial(data.passages, task))
    return Job(model, tokenizer, end_ids, tool, args, Progress())


# ---- Sampling and grading ------------------------------------------------------------------------

Sampling = namedtuple("Sampling", "n temperature top_p seed")


def collect(path, questions, sampling, job, scorer):
    """n graded responses to each question, question-major, on every rank; rank 0 appends them to
    `path` batch by batch."""
    n = sampling.n
    run = fingerprint(sampling, job)
    heads = []  # of the rows: what is known before the response
    for problem, text, _ in questions:
        for j in range(n):
            heads.append({"id": problem.id, "sample": j, "group": problem.group, "run": run,
                          "task": problem.task, "answer": problem.answer, "prompt": text})
    rows = []
    if MAIN:
        had, beyond = stored(path, heads, n)
        rows = graded(had, scorer, job.args)  # by today's graders
        write_text(path, as_lines(rows + beyond))
        if rows:
            print(f"{path.name}: {len(rows)} of {len(heads)} responses are there already")
    rows = gather(rows)
    job.total -= len(rows)
    step = max(1, BATCH // n) * WORLD
    for at in range(len(rows) // n, len(questions), step):
        block = range(at, min(at + step, len(questions)))
        share = math.ceil(len(block) / WORLD)
        mine = block[RANK * share:(RANK + 1) * share]
        new = gather(graded(respond(mine, questions, heads, sampling, job), scorer, job.args))
        rows += new
        if MAIN:
            with path.open("a") as file:
                file.write(as_lines(new))
        job.done += len(new)
        score = mean(row["score"] for row in rows)
        job.progress.show(job.done / job.total, f"{path.stem}: score {score:.3f}; "
                          f"{job.total - job.done:,} responses of all tasks are left")
    return rows


def respond(mine, questions, heads, sampling, job):
    """n rows for each of the questions number `mine`, a range, not graded yet."""
    n, temperature, top_p, seed = sampling
    args = job.args
    draw = generate
    if job.tool:
        draw = partial(converse, tool=job.tool, turns=args.turns, turn_tokens=args.turn_tokens)
    rollouts = draw(job.model, [questions[i].ids for i in mine], n, args.max_new_tokens,
                    temperature, top_p, [seed * 2**40 + i for i in mine], job.end_ids,
                    stop=data.TEMPLATES[args.template].stop, tokenizer=job.tokenizer,
                    progress=MAIN)
    rows = []
    for head, rollout in zip(heads[mine.start * n:], rollouts):
        tokens = rollout.tokens[rollout.prompt_len:]
        text = data.response_text(rollout.own(tokens), job.tokenizer, job.end_ids)
        row = head | {"response": text, "finished": rollout.finished, "length": rollout.length}
        if job.tool:  # `response` is graded, `turns` is for people: what the tool said is in it
            row |= {"turns": data.response_text(tokens, job.tokenizer, job.end_ids),
                    "calls": rollout.calls, "failed_calls": rollout.failed_calls}
        rows.append(row)
    return rows


def graded(rows, scorer, args):
    asked = []
    for row in rows:
        rule = {"acpo_compat": args.acpo_compat} if row["task"] == "math" else {}
        asked.append((row["task"], row["response"], row["answer"] | rule))
    return [row | {"score": score, "status": status}
            for row, (score, status) in zip(rows, scorer(asked))]


def fingerprint(sampling, job):
    """12 hex digits of what decides a response besides prompt and number: the flags of sampling,
    and the sum of some thousand numbers of every tensor of the model."""
    args = job.args
    how = [*sampling, args.max_new_tokens, data.TEMPLATES[args.template].stop, job.end_ids,
           args.tool, args.search_url, args.turns, args.turn_tokens, str(DTYPE)]
    for p in job.model.parameters():
        some = p.detach().flatten()[::p.numel() // 4096 + 1]
        how.append(math.fsum(some.tolist()))
    return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:12]


def stored(path, heads, n):
    """(rows that answer these questions, whole questions only; rows beyond a smaller --limit).
    Golds and grades need not agree, they are made anew. What does not fit is set aside."""
    rows = read_rows(path)
    if not all(map(fits, rows, heads)):
        number = 1
        while os.path.lexists(f"{path}.{number}"):
            number += 1
        path.rename(f"{path}.{number}")
        print(f"{path} has responses of other questions, flags or weights: it is kept as "
              f"{path.name}.{number}")
        rows = []
    whole = rows[:len(rows) // n * n]
    return [row | head for row, head in zip(whole, heads)], rows[len(heads):]


def fits(row, head):
    """Whether what a line of a file holds is a response to that question."""
    return isinstance(row, dict) and all(row.get(key) == head[key]
                                         for key in ("run", "prompt", "sample"))


def read_rows(path):
    """What the lines of a .jsonl hold, None for what is no JSON; not a last line that a killed run
    left half-written."""
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    rows = []
    for line in text.split("\n")[:-1]:
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        rows.append(row)
    return rows


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def gather(items):
    """The lists of all ranks, one after the other, on every rank."""
    parts = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, items)
    return sum(parts, [])


# ---- Statistics: all shares are fractions, the table prints percent ------------------------------

def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them right, hold a right one: 1 - C(n-c,k) / C(n,k),
    unbiased, as a product that cannot overflow (HumanEval, arXiv 2107.03374)."""
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def standard_error(values, groups):
    """Of the mean over Q questions. Those of one group are a cluster ("": of none), and the error
    is sqrt(C / (C-1) * sum over the C clusters of (sum of deviations)^2) / Q (Miller, arXiv
    2411.00640, with the usual small-sample factor); clusters of one question give
    std(values, ddof=1) / sqrt(Q). None if there is one cluster only."""
    middle = mean(values)
    clusters = defaultdict(float)
    for i, value in enumerate(values):
        clusters[groups[i] or i] += value - middle
    C = len(clusters)
    if C == 1:
        return None
    squares = math.fsum(deviation**2 for deviation in clusters.values())
    return math.sqrt(C / (C - 1) * squares) / len(values)


def score_rows(rows, n, ks=(1,)):
    """All numbers of one task; rows are question-major, n each."""
    blocks = [rows[i:i + n] for i in range(0, len(rows), n)]
    scores = [mean(row["score"] for row in block) for block in blocks]
    status = Counter(row["status"] for row in rows)
    result = {"questions": len(blocks), "n": n, f"avg@{n}": mean(scores),
              "se": standard_error(scores, [block[0]["group"] for block in blocks]),
              "truncated": mean(not row["finished"] for row in rows),
              "no_answer": status["no_answer"] / len(rows), "status": dict(status),
              "length": mean(row["length"] for row in rows), "run": rows[0]["run"]}
    right = [sum(row["score"] == 1 for row in block) for block in blocks]
    for k in ks:
        result[f"pass@{k}"] = mean(pass_at_k(n, c, k) for c in right)
    for key in ("calls", "failed_calls"):  # per response, where there is a tool
        if key in rows[0]:
            result[key] = mean(row[key] for row in rows)
    return result


def report(results, n, ks):
    """Scores and shares in percent, length in tokens."""
    shares = [*(f"pass@{k}" for k in ks), "greedy", "truncated", "no_answer"]
    lines = [["task", f"avg@{n} ± SE", *shares, "length", "questions"]]
    for name, r in results.items():
        lines.append([name, percent(r[f"avg@{n}"], r["se"]), *(percent(r[s]) for s in shares),
                      f"{r['length']:.1f}", str(r["questions"])])
    return table(lines)


def table(lines):
    """Rows of strings, the header first, as aligned text."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def percent(value, error=None):
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


# ---- Plumbing ------------------------------------------------------------------------------------

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("checkpoint", help="run directory (newest checkpoint), checkpoint or hub id")
    add("--tasks", default="", help="a,b: of --list, files, rg:NAME (default: the run's own)")
    add("--suite", choices=list(SUITES), help="several tasks; --list shows which")
    add("--n", type=count, default=8, help="responses per question (8)")
    add("--k", help="of pass@k, as 1,4,8 (default: 1 and n)")
    add("--temperature", type=float, default=1.0, help="of sampling (1.0)")
    add("--top_p", type=float, default=1.0, help="of sampling (1.0)")
    add("--greedy", action="store_true", help="the greedy response alone: n 1, temperature 0")
    add("--max_new_tokens", type=count,
        help="longest response (default: the run's; or 3072 for hub sets, else 1024)")
    add("--template", help=f"auto, {', '.join(data.TEMPLATES)} (default: the run's, or auto)")
    add("--template_args", nargs="*", help="for chat templates, as enable_thinking=false")
    add("--data_args", nargs="*", help="configuration of rg: tasks, as size=4")
    add("--tool", help=f"{', '.join(tools.KINDS)} (default: the run's, or none)")
    add("--search_url", help="for --tool search: a server, as in train.py (default: the run's)")
    add("--turns", type=count, help="with a tool: the policy's turns (default: the run's, or 10)")
    add("--turn_tokens", type=count, help="longest turn (default: the run's, or any)")
    add("--limit", type=count,
        help="questions per task (default: 512 of a procedural task, 128 of rg:, else all)")
    add("--seed", type=int, default=0, help="of sampling (0); the questions are always the same")
    add("--out", type=Path, help="directory of the results (default: run or checkpoint)")
    add("--acpo_compat", action="store_true", help="grade math by the ACPO paper's rule")
    add("--threads", type=count, default=1, help="CPU threads (1): more than free cores is slower")
    suites = [f"suite {suite}: {' '.join(tasks)}" for suite, tasks in SUITES.items()]
    more = [task for task in data.SOURCES if "test" in data.SOURCES[task]]
    add("--list", action="version", help="print suites and tasks, and stop",
        version="\n".join([*suites, f"also: {' '.join(more)} rg:NAME"]))
    return parser


def parse(argv):
    parser = arguments()
    args, rest = parser.parse_known_args(argv)
    if rest:
        known = re.findall("--[a-z_]+", parser.format_usage())
        raise ValueError(data.nearest(rest[0].split("=")[0], known, "flag"))
    if args.greedy:
        args.n = 1
        args.temperature = 0.0
        args.top_p = 1.0
    ks = (args.k or f"1,{args.n}").split(",")
    if not all(k.isdecimal() and 1 <= int(k) <= args.n for k in ks):
        raise ValueError(f"--k {args.k}: numbers from 1 to --n {args.n}, with commas; pass@k needs "
                         "k responses")
    args.k = sorted({int(k) for k in ks})
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise ValueError(f"--temperature {args.temperature} must be at least 0, --top_p "
                         f"{args.top_p} in (0, 1]")
    if args.temperature == 0 and args.n > 1:
        raise ValueError(f"--temperature 0 gives the same response {args.n} times: say --greedy")
    return args


def count(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def fail(message):
    """One line, and none of it moves the cursor: it may quote what a stranger wrote."""
    sys.exit(f"eval.py: {data.first_line(message)}")


def main():
    try:
        args = parse(sys.argv[1:])
        torch.set_num_threads(args.threads)
        if CUDA:
            torch.cuda.set_device(DEVICE)
        if WORLD > 1:
            dist.init_process_group("nccl" if CUDA else "gloo", timeout=timedelta(hours=2))
        evaluate(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        fail(e)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on where it was")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
