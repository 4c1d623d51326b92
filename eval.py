"""A checkpoint in, a table of benchmark scores out.

    python eval.py runs/default                                  # a run's newest checkpoint, on what it was trained for
    python eval.py Qwen/Qwen2.5-7B --suite math --template qwen_math --max_new_tokens 3072
    torchrun --nproc_per_node=8 -- eval.py ckpt/ --tasks math500,aime24 --n 32 --k 1,8,32
    python eval.py ckpt/ --compare other/results.json            # paired difference, and whether it is noise

(The lone -- keeps torchrun from taking --n for an abbreviation of a flag of its own.)
Writes results.json, samples_<task>.jsonl (n responses per question) and greedy_<task>.jsonl (one). The sample files are
written as the work goes on: killed and started again, it continues; responses are kept, grades are always made anew.
Response j to question i is a function of (weights, prompt, --seed, i, j), so batches and ranks do not change it, up to
rounding: exact in float32 as far as was seen, while bfloat16 rounds differently in batches of different shape.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import Model
from rewards import Scorer
from rollout import generate

SUITES = {"math": "math500 aime24 aime25 amc23 minerva olympiadbench gsm8k".split(),
          "logic": "countdown_hub kk_hub hitab".split(), "offline": list(data.TASKS)}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
MAIN = RANK == 0
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


# ---- Statistics: all shares are fractions, the table prints percent --------------------------------------------------

def mean(values):
    return math.fsum(values) / len(values)

def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them right, hold a right one: 1 - C(n-c,k) / C(n,k), unbiased, as a product that
    cannot overflow (HumanEval, arXiv 2107.03374)."""
    return 1.0 if n - c < k else 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))

def standard_error(values, groups=None):
    """Of the mean over Q questions: std(values, ddof=1) / sqrt(Q). Where questions share a group, clustered:
    sqrt(C / (C-1) * sum over the C clusters of (sum of deviations)^2) / Q (Miller, arXiv 2411.00640, with the usual
    small-sample factor, so that clusters of one give the first formula). None if there is one cluster only."""
    middle, clusters = mean(values), defaultdict(list)
    for i, value in enumerate(values):
        clusters[groups[i] if groups and groups[i] else i].append(value - middle)
    C, total = len(clusters), math.fsum(math.fsum(c)**2 for c in clusters.values())
    return math.sqrt(C / (C - 1) * total) / len(values) if C > 1 else None

def score_rows(rows, n, ks=(1,)):
    """All numbers of one task; rows are question-major, n samples each. Keys are lm-eval's where it has them."""
    blocks, status = [rows[i:i + n] for i in range(0, len(rows), n)], Counter(r["status"] for r in rows)
    right, groups = [sum(r["score"] == 1 for r in b) for b in blocks], [b[0]["group"] for b in blocks]
    values = {"exact_match": [mean([r["score"] for r in b]) for b in blocks],
              **{f"pass@{k}": [pass_at_k(n, c, k) for c in right] for k in ks}}
    result = {}
    for name, v in values.items():
        result |= {f"{name},none": mean(v), f"{name}_stderr,none": standard_error(v, groups)}
    return result | {
        f"avg@{n}": result["exact_match,none"], "se": result["exact_match_stderr,none"], "n": n, "k": list(ks),
        "questions": len(blocks), "clusters": len({g or i for i, g in enumerate(groups)}),
        "truncated": mean([not r["finished"] for r in rows]), "no_answer": status["no_answer"] / len(rows),
        "length": mean([r["length"] for r in rows]), "status": dict(sorted(status.items()))}


# ---- What to evaluate ------------------------------------------------------------------------------------------------

def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None

def read_results(path):
    if "results" not in (found := read_json(path)):
        raise ValueError(f"{path}: not a results.json of eval.py")
    return found["results"]

def locate(name):
    """(checkpoint, flags of the train.py run it belongs to or {}, directory of the results)."""
    def flags(directory):
        found = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
        return found if {"data", "eval_data", "save_every"} <= set(found) else {}
    path = Path(name)
    if not path.is_dir():
        return name, {}, Path("runs") / f"eval-{name.strip('/').replace('/', '--')}"
    run = flags(path)
    if not run:
        return name, flags(path.resolve().parent), path
    if not (path / "latest").is_file():
        raise ValueError(f"{path}: this run has no checkpoint yet; train.py writes one every {run['save_every']} steps")
    return str(path / (path / "latest").read_text().strip()), run, path

def known_tasks(args, run):
    """{name in the results: task of data.load}."""
    tasks = [t for t in args.tasks.split(",") if t] + SUITES.get(args.suite, [])
    tasks = list(dict.fromkeys(tasks or ([run["eval_data"] or run["data"]] if run else SUITES["offline"])))
    names = {Path(t).stem if Path(t).suffix in data.FILES else t: t for t in tasks}
    for name, task in names.items():
        if name == task and task not in data.TASKS and task not in data.SOURCES:
            raise ValueError(data.nearest(task, [*data.TASKS, *data.SOURCES], "task") + "; --list shows all")
    if len(names) < len(tasks):
        raise ValueError(f"--tasks {','.join(tasks)}: two have the same name, and would write the same files")
    return names

def load_questions(task, args, tokenizer, longest):
    """[(Problem, prompt text, prompt ids)] of a task's test split."""
    problems = data.load(task, "test", n=args.limit or (512 if task in data.TASKS else None))
    try:
        return data.encode(problems, args.template, tokenizer, longest)
    except ValueError as e:
        raise ValueError(f"{task}: {e}; --max_new_tokens is {args.max_new_tokens}, other tasks: --tasks") from None


# ---- Sampling and grading --------------------------------------------------------------------------------------------

def replace(path, text):
    """Writes a file at one stroke: killed at any moment, either the old one or the new one is there."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    aside.rename(path)

def gather(thing):
    """[thing of rank 0, thing of rank 1, ...] on every rank."""
    parts = [thing] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, thing)
    return parts

def fingerprint(model, args, how):
    """12 hex digits of what decides a response besides prompt and index: flags, and 4096 numbers of every tensor."""
    digest = hashlib.sha256(json.dumps([how, args.max_new_tokens, args.template, model.eos_ids]).encode())
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(p.detach().flatten()[::p.numel() // 4096 + 1].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]

def graded(rows, scorer, acpo_compat):
    how = {"math": {"acpo_compat": acpo_compat}}
    grades = scorer([(r["task"], r["response"], r["answer"] | how.get(r["task"], {})) for r in rows])
    return [r | {"score": score, "status": status} for r, (score, status) in zip(rows, grades)]

def read_rows(path):
    """The rows of a .jsonl, as far as they go: a killed run may have stopped in the middle of a line."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows

def stored(path, heads, n):
    """The rows in `path` that are whole questions of this evaluation, and after them those beyond its --limit. A file
    of other flags or weights is renamed."""
    rows = read_rows(path)
    if rows and rows[0].get("run") != heads[0]["run"]:
        aside = path.rename(f"{path}.{rows[0].get('run')}")
        tqdm.write(f"{path} was of other flags or weights, and is now {aside.name}")
        return []
    same = [row | head == row for row, head in zip(rows, heads)] + [True] * (len(rows) - len(heads))
    return rows[:(same + [False]).index(False) // n * n]

def collect(path, questions, how, model, tokenizer, scorer, args):
    """n graded responses to each question, question-major, on rank 0, which appends them to `path` batch by batch."""
    n, temperature, top_p, seed = how
    run = fingerprint(model, args, how)
    heads = [{"id": p.id, "sample": j, "group": p.group, "task": p.task, "answer": p.answer, "prompt": text, "run": run}
             for p, text, _ in questions for j in range(n)]
    had = stored(path, heads, n) if MAIN else []
    rows = graded(had[:len(heads)], scorer, args.acpo_compat)
    if MAIN:  # without a half-written line, and with today's grades
        replace(path, "".join(json.dumps(r) + "\n" for r in rows + had[len(heads):]))
    done, step = gather(len(rows))[0] // n, max(1, args.batch_size // n) * WORLD
    with open(path if MAIN else os.devnull, "a") as file, \
            tqdm(total=len(heads), initial=done * n, desc=path.stem, unit=" responses", disable=not MAIN) as bar:
        for at in range(done, len(questions), step):
            mine = range(at + RANK, min(at + step, len(questions)), WORLD)
            rollouts = generate(model, [questions[i][2] for i in mine], n, args.max_new_tokens, temperature, top_p,
                                seed=[seed * 2**40 + i for i in mine], stop=data.TEMPLATES[args.template].stop,
                                tokenizer=tokenizer, progress=MAIN and args.max_new_tokens > 256)
            texts = tokenizer.batch_decode([r.tokens[r.prompt_len:] for r in rollouts], skip_special_tokens=True)
            where = [i * n + j for i in mine for j in range(n)]
            new = graded([heads[w] | {"response": text, "finished": r.finished, "length": len(r.logp)}
                          for w, r, text in zip(where, rollouts, texts)], scorer, args.acpo_compat)
            new = sorted(sum(gather(list(zip(where, new))), []), key=lambda pair: pair[0])
            rows += [row for _, row in new]
            file.write("".join(json.dumps(row) + "\n" for _, row in new))
            file.flush()
            bar.update(len(new))
            bar.set_postfix_str(f"score {mean([r['score'] for r in rows]):.3f}")
    return rows


# ---- The table, and the comparison of two ----------------------------------------------------------------------------

def table(lines):
    """Rows of strings, the header first, as aligned text."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
                     for row in lines)

def percent(value, error=None):
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")

def report(results, n, ks):
    """Scores and shares in percent, length in tokens."""
    return table([["task", f"avg@{n} ± SE", *(f"pass@{k}" for k in ks), "greedy", "truncated", "no answer", "length",
                   "questions"]] + [
        [name, percent(r[f"avg@{n}"], r["se"]), *(percent(r[f"pass@{k},none"]) for k in ks), percent(r["greedy"]),
         percent(r["truncated"]), percent(r["no_answer"]), f"{r['length']:.1f}", str(r["questions"])]
        for name, r in results.items()])

def scores_by_id(path, task):
    """{question id: (mean score, group, answer)} of one task of a results.json, from the samples beside it."""
    result, file = read_results(path)[task], path.parent / f"samples_{task}.jsonl"
    n, count = result["n"], result["n"] * result["questions"]
    rows = read_rows(file)[:count]
    if len(rows) < count or any(r["run"] != result["run"] for r in rows):
        raise ValueError(f"{file}: not the {count} samples that {path} was made of; evaluate that checkpoint again")
    return {rows[i]["id"]: (mean([r["score"] for r in rows[i:i + n]]), rows[i]["group"], rows[i]["answer"])
            for i in range(0, count, n)}

def compare(ours, other):
    """{task: the paired difference ours - other over the questions that both results.json have}: Q differences, their
    mean and its standard error; noise if the mean is below two of these."""
    differences = {}
    for task in (t for t in read_results(ours) if t in read_results(other)):
        a, b = scores_by_id(ours, task), scores_by_id(other, task)
        pairs = [(a[i], b[i]) for i in a if i in b]
        if not pairs or any(x[2] != y[2] for x, y in pairs):
            raise ValueError(f"--compare {other}: its {task} holds other questions; nothing can be paired")
        d = [x[0] - y[0] for x, y in pairs]
        se = standard_error(d, [x[1] for x, _ in pairs])
        noise = se is None or mean(d) == 0 or abs(mean(d)) < 2 * se
        differences[task] = {
            "ours": mean([x[0] for x, _ in pairs]), "other": mean([y[0] for _, y in pairs]), "difference": mean(d),
            "se": se, "questions": len(d),
            "verdict": "noise (below 2 SE)" if noise else "better" if mean(d) > 0 else "worse"}
    return differences

def report_difference(differences):
    return table([["task", "this", "other", "difference ± SE", "questions", "verdict"]] + [
        [name, percent(d["ours"]), percent(d["other"]), percent(d["difference"], d["se"]), str(d["questions"]),
         d["verdict"]] for name, d in differences.items()])


# ---- The command -----------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"eval.py: {message}; --help lists every flag")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="run directory of train.py (newest checkpoint), checkpoint directory or hub id")
    add("--tasks", default="", help="a,b: names of --list, or files (default: what the run was trained on, or offline)")
    add("--suite", choices=list(SUITES), help="; ".join(f"{name}: {' '.join(tasks)}" for name, tasks in SUITES.items()))
    add("--n", type=int, default=8, help="responses per question (8)")
    add("--k", help="of pass@k, as 1,4,8 (default: 1 and n)")
    add("--temperature", type=float, default=1.0, help="of sampling (1.0)")
    add("--top_p", type=float, default=1.0, help="of sampling (1.0)")
    add("--greedy", action="store_true", help="nothing but the greedy response to each question: n 1, temperature 0")
    add("--max_new_tokens", type=int, help="longest response (default: the run's; or 3072 for hub sets, else 1024)")
    add("--template", help=f"{', '.join(data.TEMPLATES)} (default: the run's; or the tokenizer's chat, else none)")
    add("--limit", type=int, help="questions per task (default: 512 of a procedural task, all of a data set)")
    add("--seed", type=int, default=0, help="of sampling (0); the questions are always the same")
    add("--out", type=Path, help="directory of the results (default: the run or checkpoint directory)")
    add("--compare", type=Path, metavar="RESULTS", help="results.json of another evaluation: the paired difference")
    add("--acpo_compat", action="store_true", help="grade math by the ACPO paper's rule (see rewards.py), to compare")
    add("--batch_size", type=int, default=4096 if DEVICE.type == "cuda" else 256,
        help="responses per rank between two writes to disk (4096 on CUDA, 256 on CPU)")
    add("--threads", type=int, default=1, help="CPU threads (1): more than there are free cores is far slower than one")
    add("--list", action="store_true", help="print suites and tasks, and stop")
    args, rest = parser.parse_known_args(argv)
    if rest:
        raise ValueError(data.nearest(rest[0].split("=")[0], [f"--{name}" for name in vars(args)][1:], "flag"))
    if not args.checkpoint and not args.list:
        parser.error("which checkpoint? give a run directory, a checkpoint directory or a hub id")
    if args.greedy:
        args.n, args.temperature, args.top_p = 1, 0.0, 1.0
    for name in ("n", "limit", "max_new_tokens", "batch_size", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    ks = (args.k or f"1,{args.n}").split(",")
    if not all(k.isdecimal() and 1 <= int(k) <= args.n for k in ks):
        raise ValueError(f"--k {args.k}: numbers from 1 to --n {args.n}, with commas; pass@k needs k responses")
    args.k = sorted(set(map(int, ks)))
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise ValueError(f"--temperature {args.temperature} must be at least 0, and --top_p {args.top_p} in (0, 1]")
    if args.temperature == 0 and args.n > 1:
        raise ValueError(f"--temperature 0 gives the same response {args.n} times: say --greedy")
    return args

def evaluate(args):
    began, dtype = time.time(), torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    checkpoint, run, out = locate(args.checkpoint)
    tasks, args.out = known_tasks(args, run), args.out or out
    target = args.out / "results.json"
    if args.compare and args.compare.resolve() == target.resolve():
        raise ValueError(f"--compare {args.compare}: this evaluation would overwrite it; give another --out")
    if args.compare and not any(t in read_results(args.compare) for t in tasks):
        raise ValueError(f"--compare {args.compare}: it holds no result of {', '.join(tasks)}")
    model = Model.from_pretrained(checkpoint, dtype, DEVICE)
    tokenizer = data.load_tokenizer(model.source)
    args.template = args.template or run.get("template") or ("chat" if tokenizer.chat_template else "none")
    args.max_new_tokens = args.max_new_tokens or run.get("max_new_tokens") or (
        3072 if any(t in data.SOURCES for t in tasks.values()) else 1024)
    longest = model.config.max_position_embeddings - args.max_new_tokens
    questions = {name: load_questions(task, args, tokenizer, longest) for name, task in tasks.items()}
    args.out.mkdir(parents=True, exist_ok=True)  # after all that may be wrong with the flags
    (args.out / ".results.json").touch()
    protocol = "n temperature top_p max_new_tokens template seed acpo_compat".split()
    protocol = {name: getattr(args, name) for name in protocol}
    if MAIN:
        print(f"{checkpoint}: {sum(p.numel() for p in model.parameters()):,} parameters, {str(dtype)[6:]} on {WORLD} x "
              f"{DEVICE.type}; {', '.join(f'{name} {value}' for name, value in protocol.items())}")

    results, notes = {}, {}
    with Scorer(workers=2) as scorer:
        for name, asked in questions.items():
            how, tools = (args.n, args.temperature, args.top_p, args.seed), (model, tokenizer, scorer, args)
            greedy = rows = collect(args.out / f"samples_{name}.jsonl", asked, how, *tools)
            if args.temperature:
                greedy = collect(args.out / f"greedy_{name}.jsonl", asked, (1, 0.0, 1.0, 0), *tools)
            if not MAIN:
                continue
            once = score_rows(greedy, 1)
            results[name] = {"alias": name, **score_rows(rows, args.n, args.k), "run": rows[0]["run"],
                             "greedy": once["avg@1"], "greedy_se": once["se"]}
            hub = data.SOURCES.get(tasks[name], {}).get("test")
            any_of = sum(p.task == "math" and isinstance(p.answer["answer"], list) for p, _, _ in asked)
            notes[name] = {"task": tasks[name], "grader": asked[0][0].task, "any_of": any_of, "hub": hub and hub.hub,
                           "revision": hub and hub.revision}
    if not MAIN:
        return
    grader = hashlib.sha256(Path(__file__).with_name("rewards.py").read_bytes()).hexdigest()[:12]
    record = {"results": results, "configs": notes, "n-shot": dict.fromkeys(results, 0),
              "config": protocol | {"k": args.k, "limit": args.limit, "model": args.checkpoint,
                                    "checkpoint": checkpoint, "dtype": str(dtype)[6:]},
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "rewards.py": grader},
              "date": round(began), "total_evaluation_time_seconds": round(time.time() - began, 1)}
    replace(target, json.dumps(record, indent=1))
    print("\n" + report(results, args.n, args.k))
    for name, note in notes.items():
        if note["hub"]:
            print(f"{name}: {note['hub']}, {note['any_of']} questions where any one of several answers counts")
    if args.compare:
        print(f"\nagainst {args.compare}:\n{report_difference(compare(target, args.compare))}")
    print(f"\n{time.time() - began:.0f} s. {target}, and the responses beside it; to read them: "
          f"python experiments/samples_page.py {args.out}")

def main():
    try:
        args = parse(sys.argv[1:])
        if args.list:
            lines = [f"suite {suite}: {' '.join(tasks)}" for suite, tasks in SUITES.items()]
            return print(*lines, *(f"{t}: {s['test'].hub}" for t, s in data.SOURCES.items() if "test" in s), sep="\n")
        torch.set_num_threads(args.threads)
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        if WORLD > 1:
            dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", timeout=timedelta(hours=2))
        evaluate(args)
    except (ValueError, OSError) as e:
        sys.exit(f"eval.py: {e}")
    except torch.OutOfMemoryError as e:
        sys.exit(f"eval.py: out of GPU memory ({str(e).splitlines()[0]})")
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped; the same command goes on where it was")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
