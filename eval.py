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
import shlex
import sys
import time
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import data
import rewards
import tools
from model import Model, Progress
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
    run, out = origin(args.checkpoint)
    args.out = args.out or out
    tasks = known_tasks(args, run)
    job = load(args, run, tasks)
    questions = {name: load_questions(task, job) for name, task in tasks.items()}
    job.left = sum(map(len, questions.values())) * (args.n + (args.temperature > 0))
    args.out.mkdir(parents=True, exist_ok=True)  # after all that may be wrong with the flags
    if MAIN:
        flags = ", ".join(f"{name} {value}" for name, value in vars(args).items() if value)
        print(f"{job.model.source}: {DTYPE} on {WORLD} x {DEVICE.type}; {flags}")

    results = {}
    with rewards.Scorer(workers=2) as scorer:
        for name, asked in questions.items():
            sampling = Sampling(args.n, args.temperature, args.top_p, args.seed)
            path = args.out / f"samples_{name}.jsonl"
            rows = collect(path, asked, sampling, job, scorer)
            greedy = rows
            if args.temperature:
                sampling = Sampling(1, 0.0, 1.0, 0)
                greedy = collect(args.out / f"greedy_{name}.jsonl", asked, sampling, job, scorer)
            hub = data.SOURCES.get(name, {}).get("test")
            results[name] = score_rows(rows, args.n, args.k) | calls_of(rows) | {
                "greedy": mean([row["score"] for row in greedy]),
                "source": hub and f"{hub.hub}@{hub.revision}"}
    if MAIN:
        target = args.out / "results.json"
        write(target, json.dumps(record(results, job, began), indent=1, default=str))
        print("\n" + report(results, args.n, args.k))
        responses = shlex.quote(str(args.out / f"samples_{name}.jsonl"))
        print(f"\n{time.time() - began:.0f} s. {target}, and the responses beside it; to read "
              f"them: python experiments/microscope.py {responses}")


# ---- Questions -----------------------------------------------------------------------------------

@dataclass
class Job:
    model: Model
    tokenizer: object
    end_ids: list      # of ids that end a response
    tool: object       # of tools.py, or None
    args: object       # the flags
    progress: Progress
    done: int = 0      # responses of all tasks, sampled by this process
    left: int = 0


def load(args, run, tasks):
    """Model and tokenizer, and the flags that depend on them and on the run."""
    model = Model.from_pretrained(args.checkpoint, DTYPE, DEVICE)
    model.check_finite()
    tokenizer = data.load_tokenizer(model.source)
    hub = any(task in data.SOURCES for task in tasks.values())
    usual = {"template": "auto", "template_args": [], "data_args": [], "tool": "none",
             "search_url": "", "turns": 10, "turn_tokens": 0,
             "max_new_tokens": 3072 if hub else 1024}
    for name, value in usual.items():
        setattr(args, name, getattr(args, name) or run.get(name) or value)
    args.template = data.choose_template(args.template, tokenizer)
    end_ids = data.end_ids(tokenizer, model.eos_ids, model.config.vocab_size)
    task = next(iter(tasks.values()))  # a tool needs it alone
    if args.tool != "none" and len(tasks) > 1:
        raise ValueError(f"--tool {args.tool}: give one of --tasks, or --tool none")
    tool = tools.make(args.tool, data.facts_of(task), args.search_url,
                      partial(data.passages, task))
    return Job(model, tokenizer, end_ids, tool, args, Progress())


def origin(name):
    """(flags of the train.py run that a checkpoint belongs to, or {}; directory of the results)."""
    path = Path(name)
    if not path.is_dir():
        return {}, Path("runs") / f"eval-{name.replace('/', '--')}"
    for directory in (path, *path.resolve().parents[:2]):  # step-000100/adapter: its run
        flags = read_json(directory / "config.json")
        if is_run(flags):
            if directory == path and not (path / "latest").is_file():
                raise ValueError(f"{path}: no checkpoint yet; this run writes one every "
                                 f"{flags['save_every']} steps")
            return flags, path
    return {}, path


def is_run(flags):
    """Whether a config.json is that of train.py, not of a model, and fit to be used."""
    kinds = {"data": str, "eval_data": str, "save_every": int, "max_new_tokens": int,
             "template": str, "template_args": list, "data_args": list, "tool": str,
             "search_url": str, "turns": int, "turn_tokens": int}
    return "save_every" in flags and all(type(flags.get(name, kind())) is kind
                                         for name, kind in kinds.items())


def known_tasks(args, run):
    """{name in the results: task of data.load}."""
    asked = [task for task in args.tasks.split(",") if task]
    if args.suite:
        asked += SUITES[args.suite]
    if not asked:
        asked = [run.get("eval_data") or run.get("data")] if run else SUITES["offline"]
    names = {}
    for task in dict.fromkeys(asked):
        name = Path(task).stem if Path(task).suffix in data.FILES else task.replace(":", "-")
        if name == task:  # neither a file nor of reasoning-gym
            data.check(task, [*data.TASKS, *data.SOURCES], "task (--list shows all)")
        if name in names:
            raise ValueError(f"--tasks {names[name]},{task}: both would write samples_{name}.jsonl")
        names[name] = task
    return names


def load_questions(task, job):
    """[Question] of a task's test split."""
    args = job.args
    few = 512 if task in data.TASKS else 128 if task.startswith("rg:") else None
    config = data.parse_args(args.data_args, "--data_args") if task.startswith("rg:") else {}
    variables = data.parse_args(args.template_args, "--template_args")
    problems = data.load(task, "test", n=args.limit or few, args=config)
    longest = job.model.config.max_position_embeddings - args.max_new_tokens
    try:
        data.check_golds(problems, rewards.check_gold)
        return data.encode(problems, args.template, job.tokenizer, longest, variables)
    except ValueError as e:
        raise ValueError(f"{task}: {e} (--max_new_tokens {args.max_new_tokens})") from None


# ---- Sampling and grading ------------------------------------------------------------------------

Sampling = namedtuple("Sampling", "n temperature top_p seed")


def collect(path, questions, sampling, job, scorer):
    """n graded responses to each question, question-major, on every rank; rank 0 appends them to
    `path` batch by batch."""
    n = sampling.n
    run = fingerprint(sampling, job)
    place = {question.problem.id: i for i, question in enumerate(questions)}
    heads = []  # of the rows: what is known before the response
    for problem, text, _ in questions:
        for j in range(n):
            heads.append({"id": problem.id, "sample": j, "group": problem.group, "run": run,
                          "task": problem.task, "answer": problem.answer, "prompt": text})
    rows = []
    if MAIN:
        had, beyond = stored(path, heads, n)
        rows = graded(had, scorer, job.args)  # by today's graders
        write(path, as_lines(rows + beyond))
        if rows:
            print(f"{path.name}: {len(rows)} of {len(heads)} responses are there already")
    rows = gather(rows)
    step = max(1, BATCH // n) * WORLD
    job.left -= len(rows)
    with open(path if MAIN else os.devnull, "a", encoding="utf-8") as file:
        for at in range(len(rows) // n, len(questions), step):
            mine = range(at + RANK, min(at + step, len(questions)), WORLD)
            answered = respond(mine, questions, heads, sampling, job)
            new = gather(graded(answered, scorer, job.args))
            new.sort(key=lambda row: place[row["id"]])  # stable: samples stay in order
            rows += new
            if MAIN:
                file.write(as_lines(new))
                file.flush()
            job.done += len(new)
            job.left -= len(new)
            score = mean([row["score"] for row in rows])
            job.progress.show(job.done / (job.done + job.left), f"{path.stem}: score {score:.3f}; "
                              f"{job.left:,} responses of all tasks are left")
    return rows


def respond(mine, questions, heads, sampling, job):
    """n rows for each of the questions number `mine`, not graded yet."""
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
    for i, rollout in enumerate(rollouts):
        head = heads[mine[i // n] * n + i % n]
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
    and 4096 numbers of every tensor of the model."""
    args = job.args
    how = [*sampling, args.max_new_tokens, data.TEMPLATES[args.template].stop, job.end_ids]
    if job.tool:
        how += [args.tool, args.search_url, args.turns, args.turn_tokens]
    digest = hashlib.sha256(json.dumps(how).encode())
    for name, p in job.model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        some = p.detach().flatten()[::p.numel() // 4096 + 1]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


# ---- Statistics: all shares are fractions, the table prints percent ------------------------------

def mean(values):
    return math.fsum(values) / len(values)


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
    scores = [mean([row["score"] for row in block]) for block in blocks]
    status = Counter(row["status"] for row in rows)
    result = {"questions": len(blocks), "n": n, f"avg@{n}": mean(scores),
              "se": standard_error(scores, [block[0]["group"] for block in blocks]),
              "truncated": mean([not row["finished"] for row in rows]),
              "no_answer": status["no_answer"] / len(rows), "status": dict(status),
              "length": mean([row["length"] for row in rows]), "run": rows[0]["run"]}
    right = [sum(row["score"] == 1 for row in block) for block in blocks]
    for k in ks:
        result[f"pass@{k}"] = mean([pass_at_k(n, c, k) for c in right])
    return result


def calls_of(rows):
    """Of a tool, per response: all, and those that failed."""
    return {key: mean([row.get(key, 0) for row in rows])
            for key in ("calls", "failed_calls") if key in rows[0]}


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
    shown = []
    for line in lines:
        cells = map(str.rjust, line[1:], widths[1:])
        shown.append("  ".join([line[0].ljust(widths[0]), *cells]))
    return "\n".join(shown)


def percent(value, error=None):
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


# ---- Storage -------------------------------------------------------------------------------------

def stored(path, heads, n):
    """(rows that answer these questions, whole questions only; rows beyond a smaller --limit).
    Golds and grades need not agree, they are made anew. What does not fit is set aside."""
    rows = read_rows(path)
    fit = 0
    while fit < min(len(rows), len(heads)) and fits(rows[fit], heads[fit]):
        fit += 1
    if fit < min(len(rows), len(heads)):
        print(f"{path} has responses of other questions, flags or weights: it is kept as "
              f"{set_aside(path).name}, and {fit} of its {len(rows)} responses are used")
    answered = []
    for head, row in zip(heads, rows[:fit // n * n]):
        kept = [key for key in (*RESPONSE, *HEARD) if key in row]
        answered.append(head | {key: row[key] for key in kept})
    return answered, rows[len(heads):] if fit == len(heads) else []


RESPONSE = {"response": str, "finished": bool, "length": int}
HEARD = {"turns": str, "calls": int, "failed_calls": int}  # where there is a tool


def fits(row, head):
    """Whether a stored row, which may hold anything, is a response to that question."""
    return (isinstance(row, dict)
            and all(row.get(key) == head[key] for key in ("run", "prompt", "sample"))
            and all(type(row.get(key)) is kind for key, kind in RESPONSE.items())
            and all(type(row.get(key, kind())) is kind for key, kind in HEARD.items()))


def set_aside(path):
    """Renames a file to the first name of path.1, path.2, ... that is free."""
    number = 1
    while os.path.lexists(f"{path}.{number}"):
        number += 1
    return path.rename(f"{path}.{number}")


def read_rows(path):
    """What the lines of a .jsonl hold, None for what is no JSON; not a last line that a killed run
    left half-written."""
    rows = []
    if path.is_file():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                rows.append(None)
    if rows and rows[-1] is None:
        rows.pop()
    return rows


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, text):
    """Writes a file at one stroke: killed at any moment, either the old one or the new is there."""
    aside = path.with_name(f".{path.name}")
    aside.unlink(missing_ok=True)
    with open(aside, "x", encoding="utf-8") as file:  # x: never through a link
        file.write(text)
    aside.replace(path)


def read_json(path):
    """The object in a file, {} if there is no such file."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None
    return found if isinstance(found, dict) else {}


def record(results, job, began):
    """What results.json holds."""
    grader = hashlib.sha256(Path(rewards.__file__).read_bytes()).hexdigest()[:12]
    return {"results": results, "config": vars(job.args), "checkpoint": job.model.source,
            "dtype": DTYPE, "versions": {"torch": torch.__version__, "rewards.py": grader},
            "date": round(began), "seconds": round(time.time() - began)}


# ---- Plumbing ------------------------------------------------------------------------------------

def gather(items):
    """The lists of all ranks, one after the other, on every rank."""
    parts = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, items)
    return sum(parts, [])


def arguments():
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("checkpoint", nargs="?", help="run directory (newest checkpoint), checkpoint or hub id")
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
    add("--list", action="store_true", help="print suites and tasks, and stop")
    return parser


def parse(argv):
    args, rest = arguments().parse_known_args(argv)
    if rest:
        flags = [f"--{name}" for name in vars(args) if name != "checkpoint"]
        fail(data.nearest(rest[0].split("=")[0], flags, "flag"))
    if not args.checkpoint and not args.list:
        fail("which checkpoint? give a run directory, a checkpoint directory or a hub id")
    if args.greedy:
        args.n = 1
        args.temperature = 0.0
        args.top_p = 1.0
    ks = (args.k or f"1,{args.n}").split(",")
    if not all(k.isdecimal() and 1 <= int(k) <= args.n for k in ks):
        fail(f"--k {args.k}: numbers from 1 to --n {args.n}, with commas; pass@k needs k responses")
    args.k = sorted({int(k) for k in ks})
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        fail(f"--temperature {args.temperature} must be at least 0, --top_p {args.top_p} in (0, 1]")
    if args.temperature == 0 and args.n > 1:
        fail(f"--temperature 0 gives the same response {args.n} times: say --greedy")
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
        if args.list:
            for suite, tasks in SUITES.items():
                print(f"suite {suite}: {' '.join(tasks)}")
            more = [task for task in data.SOURCES if "test" in data.SOURCES[task]]
            print(f"also: {' '.join(more)} rg:NAME")
            return
        torch.set_num_threads(args.threads)
        if CUDA:
            torch.cuda.set_device(DEVICE)
        if WORLD > 1:
            dist.init_process_group("nccl" if CUDA else "gloo", timeout=timedelta(hours=2))
        evaluate(args)
    except (ValueError, OSError) as e:
        fail(e)
    except torch.OutOfMemoryError as e:
        fail(f"out of GPU memory ({e})")
    except KeyboardInterrupt:
        fail("stopped; the same command goes on where it was")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
