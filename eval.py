"""A checkpoint in, a table of benchmark scores out.

    python eval.py runs/default                                    # a run's newest checkpoint, on what it was trained for
    python eval.py Qwen/Qwen2.5-7B --suite math --template qwen_math --max_new_tokens 3072
    torchrun --nproc_per_node=8 eval.py ckpt/ --tasks math500,aime24 --n 32 --k 1,8,32
    python eval.py ckpt/ --compare other/results.json              # paired difference, and whether it is noise

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
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


# ---- Statistics: all shares are fractions, the table prints percent ----------------------------------------------------

def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them right, include a right one: 1 - C(n-c,k) / C(n,k), unbiased, as a product that
    never overflows (HumanEval, arXiv 2107.03374)."""
    return 1.0 if n - c < k else 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def standard_error(values, groups=None):
    """Standard error of the mean over questions, std(values, ddof=1) / sqrt(Q); clustered where questions share a group:
    sqrt(C/(C-1) * sum over C clusters of (sum of its deviations)^2) / Q (Miller, arXiv 2411.00640, and the usual small
    sample factor, which makes clusters of one give the first formula). None if there is but one cluster."""
    mean, sums = math.fsum(values) / len(values), defaultdict(list)
    for i, value in enumerate(values):
        sums[groups[i] if groups and groups[i] else i].append(value - mean)
    C = len(sums)
    return math.sqrt(C / (C - 1) * math.fsum(math.fsum(s)**2 for s in sums.values())) / len(values) if C > 1 else None


def per_question(rows, n):
    """[(mean score, number of fully right samples, group)] of rows that are question-major, n samples each."""
    blocks = [rows[i:i + n] for i in range(0, len(rows), n)]
    return [(math.fsum(r["score"] for r in b) / n, sum(r["score"] == 1 for r in b), b[0]["group"]) for b in blocks]


def score_rows(rows, n, ks=(1,)):
    """All numbers of one benchmark, for question-major rows of n samples; keys as lm-eval's where it has them."""
    means, right, groups = zip(*per_question(rows, n))
    result = {"exact_match,none": math.fsum(means) / len(means), "exact_match_stderr,none": standard_error(means, groups)}
    for k in ks:
        values = [pass_at_k(n, c, k) for c in right]
        result[f"pass@{k},none"] = math.fsum(values) / len(values)
        result[f"pass@{k}_stderr,none"] = standard_error(values, groups)
    status = Counter(r["status"] for r in rows)
    return result | {
        f"avg@{n}": result["exact_match,none"], "se": result["exact_match_stderr,none"], "n": n, "k": list(ks),
        "questions": len(means), "clusters": len({g or i for i, g in enumerate(groups)}),
        "truncated": sum(not r["finished"] for r in rows) / len(rows), "no_answer": status["no_answer"] / len(rows),
        "length": sum(r["length"] for r in rows) / len(rows), "status": dict(sorted(status.items()))}


# ---- What to evaluate --------------------------------------------------------------------------------------------------

def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None


def locate(name):
    """(checkpoint, flags of the train.py run it belongs to or {}, where results go) for a run, a checkpoint or a hub id."""
    def flags(directory):
        found = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
        return found if "eval_problems" in found and "data" in found else {}
    path = Path(name)
    if not path.is_dir():
        return name, {}, Path("runs") / f"eval-{name.strip('/').replace('/', '--')}"
    run = flags(path)
    if not run:
        return name, flags(path.resolve().parent), path
    if not (path / "latest").is_file():
        raise ValueError(f"{path}: this run has no checkpoint yet; train.py writes one every {run['save_every']} steps and when "
                         "it is stopped with Ctrl-C")
    return str(path / (path / "latest").read_text().strip()), run, path


def load_tokenizer(source):
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{source}: no tokenizer there ({str(e).strip().splitlines()[0]})") from None


def longest_response(run, tasks):
    """--max_new_tokens if it is not given: that of the run (train.py's 0 is resolved as it does), else long enough."""
    if run and (run["max_new_tokens"] or run["model"]):
        return run["max_new_tokens"] or 1024
    if run:
        return 2 * max(len(r) for phase in ("skill", "habit") for _, r in data.demos(run["data"], 256, phase, run["seed"]))
    return 3072 if any(t in data.SOURCES for t in tasks) else 1024


def load_questions(task, args, tokenizer, longest):
    """[(Problem, prompt text, prompt ids)]; ValueError if a prompt is empty, too long, or loses characters on the way."""
    problems = data.load(task, "test", n=args.limit or (512 if task in data.TASKS else None))
    texts = [data.render(p, args.template, tokenizer) for p in problems]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    for i, (problem, text, ids) in enumerate(zip(problems, texts, encoded.input_ids)):
        if not 0 < len(ids) <= longest:
            raise ValueError(f"{task}: the prompt of {problem.id} has {len(ids)} tokens, allowed are 1 to {longest} (the model's "
                             f"positions less --max_new_tokens {args.max_new_tokens}); lower that, or leave the question out")
        if tokenizer.is_fast:  # tokenizers without an unknown token drop a character silently
            read = {at for a, b in encoded.offset_mapping[i] for at in range(a, b)}
            if lost := [c for at, c in enumerate(text) if at not in read and not c.isspace()]:
                raise ValueError(f"{task}: the checkpoint's tokenizer cannot write {lost[0]!r} (prompt of {problem.id}); it was "
                                 "made for another task: choose with --tasks")
    return list(zip(problems, texts, encoded.input_ids))


# ---- Sampling and grading ----------------------------------------------------------------------------------------------

def gather(thing):
    """[thing of rank 0, thing of rank 1, ...] on every rank."""
    parts = [thing] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, thing)
    return parts


def fingerprint(model, args, settings):
    """12 hex digits of all that decides a response besides its prompt and index: weights (at most 4096 numbers of every
    tensor, evenly spread), dtype and sampling flags."""
    digest = hashlib.sha256(json.dumps([settings, args.max_new_tokens, args.template, model.eos_ids]).encode())
    for name, p in model.named_parameters():
        some = p.detach().flatten()[::p.numel() // 4096 + 1].float().cpu()
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:12]


def grade(rows, scorer, args):
    extra = [{"acpo_compat": True} if args.acpo_compat and r["task"] == "math" else {} for r in rows]
    grades = scorer([(r["task"], r["response"], r["answer"] | e) for r, e in zip(rows, extra)])
    return [r | {"score": score, "status": status} for r, (score, status) in zip(rows, grades)]


def stored(path, heads, run, n):
    """The rows in `path` that are whole questions of this evaluation, in order, then those beyond its --limit. A file of
    other flags or weights is set aside under its fingerprint, and one that was set aside is taken back."""
    def read(path):
        rows = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:  # the last line of a killed run is half-written
                break
        return rows
    rows, kept = read(path), Path(f"{path}.{run}")
    if rows and rows[0].get("run") != run:
        aside = path.rename(f"{path}.{rows[0].get('run')}")
        tqdm.write(f"{path} was of other flags or weights: kept as {aside.name}")
        rows = []
    if not rows and kept.is_file():
        rows = read(kept.rename(path))
    good = next((i for i, (row, head) in enumerate(zip(rows, heads)) if any(row.get(k) != head[k] for k in head)), len(rows))
    return rows[:good // n * n]


def collect(path, questions, settings, model, tokenizer, scorer, args):
    """Rows of n graded responses to each question, question-major. Rank 0 has them all and appends them to `path`."""
    n, temperature, top_p, seed = settings
    run = fingerprint(model, args, settings)
    heads = [{"id": p.id, "sample": j, "group": p.group, "task": p.task, "answer": p.answer, "prompt": text, "run": run}
             for p, text, _ in questions for j in range(n)]
    rows = stored(path, heads, run, n) if MAIN else []
    had, rows, beyond = rows, grade(rows[:len(heads)], scorer, args), rows[len(heads):]
    if MAIN:  # without the half-written line, and with today's grades
        aside = path.with_name(f".{path.name}")
        aside.write_text("".join(json.dumps(r) + "\n" for r in rows + beyond))
        aside.rename(path)
        if had:
            tqdm.write(f"{path}: {len(rows)} of {len(heads)} responses are there already")
    done, step = gather(len(rows))[0] // n, max(1, args.batch_size // n) * WORLD
    with open(path if MAIN else os.devnull, "a") as file, \
            tqdm(total=len(heads), initial=done * n, desc=path.stem, unit="response", disable=not MAIN) as bar:
        for at in range(done, len(questions), step):
            mine = range(at + RANK, min(at + step, len(questions)), WORLD)
            rollouts = generate(model, [questions[i][2] for i in mine], n, args.max_new_tokens, temperature, top_p,
                                seed=[seed * 2**40 + i for i in mine], stop=data.TEMPLATES[args.template].stop,
                                tokenizer=tokenizer, progress=MAIN and args.max_new_tokens > 256)
            texts = tokenizer.batch_decode([r.tokens[r.prompt_len:] for r in rollouts], skip_special_tokens=True)
            new = [heads[i * n + j] | {"response": "", "finished": False} for i in mine for j in range(n)]
            for row, rollout, text in zip(new, rollouts, texts):
                row |= {"response": text, "finished": rollout.finished, "length": len(rollout.logp)}
            parts = gather(list(zip([i for i in mine for _ in range(n)], grade(new, scorer, args))))
            new = [row for _, row in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]
            file.write("".join(json.dumps(r) + "\n" for r in new))
            file.flush()
            rows += new
            bar.update(len(new))
            bar.set_postfix_str(f"score {sum(r['score'] for r in rows) / len(rows):.3f}")
    return rows


# ---- The table, and the comparison of two --------------------------------------------------------------------------------

def table(lines):
    """Rows of strings, the first is the header, as aligned text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in lines)


def with_error(value, error):
    return f"{100 * value:.1f} ± " + ("-" if error is None else f"{100 * error:.1f}")


def report(results):
    """The table of a results map; scores and shares in percent, length in tokens."""
    ks = sorted({k for r in results.values() for k in r["k"]})
    n = next(iter(results.values()))["n"]
    extra = ["greedy"] if any("greedy" in r for r in results.values()) else []
    lines = [["task", f"avg@{n} ± SE", *(f"pass@{k}" for k in ks), *extra, "truncated", "no answer", "length", "questions"]]
    for r in results.values():
        lines.append([r["alias"], with_error(r[f"avg@{n}"], r["se"]), *(f"{100 * r[f'pass@{k},none']:.1f}" for k in ks),
                      *(f"{100 * r[e]:.1f}" for e in extra), f"{100 * r['truncated']:.1f}%", f"{100 * r['no_answer']:.1f}%",
                      f"{r['length']:.1f}", str(r["questions"])])
    return table(lines)


def scores_by_id(path, task):
    """{question id: (mean score, answer, group)} of one task of a results.json, from the samples beside it."""
    result, file = read_json(path)["results"][task], path.parent / f"samples_{task}.jsonl"
    count = result["questions"] * result["n"]
    rows = [json.loads(line) for line in file.read_text().splitlines()[:count]] if file.is_file() else []
    if len(rows) < count or any(r["run"] != result["run"] for r in rows):
        raise ValueError(f"{file}: not the {count} samples that {path} was made of; evaluate that checkpoint again")
    return {r["id"]: (q[0], r["answer"], q[2]) for r, q in zip(rows[::result["n"]], per_question(rows, result["n"]))}


def compare(ours, other):
    """{task: paired difference ours - other over the questions both have, its standard error, and the verdict}."""
    differences = {}
    for task in read_json(ours)["results"]:
        if task not in read_json(other)["results"]:
            continue
        a, b = scores_by_id(ours, task), scores_by_id(other, task)
        shared = [i for i in a if i in b]
        if not shared or any(a[i][1] != b[i][1] for i in shared):
            raise ValueError(f"--compare {other}: its {task} holds other questions; nothing can be paired")
        d = [a[i][0] - b[i][0] for i in shared]
        mean, se = math.fsum(d) / len(d), standard_error(d, [a[i][2] for i in shared])
        noise = se is None or mean == 0 or abs(mean) < 2 * se
        differences[task] = {"ours": math.fsum(a[i][0] for i in shared) / len(d), "questions": len(d), "difference": mean,
                             "other": math.fsum(b[i][0] for i in shared) / len(d), "se": se, "noise": noise}
    return differences


def report_difference(differences):
    lines = [["task", "this", "other", "difference ± SE", "questions", "verdict"]]
    for task, d in differences.items():
        verdict = "noise (below 2 SE)" if d["noise"] else "better" if d["difference"] > 0 else "worse"
        lines.append([task, f"{100 * d['ours']:.1f}", f"{100 * d['other']:.1f}", with_error(d["difference"], d["se"]),
                      str(d["questions"]), verdict])
    return table(lines)


# ---- The command -----------------------------------------------------------------------------------------------------------

def parse(argv):
    def counts(text):
        return sorted({int(x) for x in text.split(",")})
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"eval.py: {message}; --help lists every flag")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="run directory of train.py (its newest checkpoint), checkpoint directory, or hub id")
    add("--tasks", default="", help="a,b,c: names of --list, or files (default: what the run was trained on, else offline)")
    add("--suite", choices=list(SUITES), help="; ".join(f"{name}: {' '.join(tasks)}" for name, tasks in SUITES.items()))
    add("--n", type=int, default=8, help="responses per question (8)")
    add("--k", type=counts, help="of pass@k, as 1,4,8 (default: 1 and n)")
    add("--temperature", type=float, default=1.0, help="of sampling (1.0); the greedy pass has none")
    add("--top_p", type=float, default=1.0, help="of sampling (1.0)")
    add("--greedy", action="store_true", help="only the greedy response to each question: n 1, temperature 0")
    add("--max_new_tokens", type=int, help="longest response (default: the run's, else 3072 for hub sets and 1024 without)")
    add("--template", help=f"{', '.join(data.TEMPLATES)} (default: the run's, else chat if the tokenizer has one, else none)")
    add("--limit", type=int, help="questions per task (default: 512 of a procedural task, all of a data set)")
    add("--seed", type=int, default=0, help="of sampling (0); the questions stay the same")
    add("--out", type=Path, help="directory of the results (default: the run or checkpoint directory)")
    add("--compare", type=Path, metavar="RESULTS", help="results.json of another evaluation: paired differences")
    add("--acpo_compat", action="store_true", help="grade math by the ACPO paper's looser rule (rewards.py), for comparison")
    add("--batch_size", type=int, help="responses per rank between two writes (default: 256 on CPU, 4096 on CUDA)")
    add("--threads", type=int, default=1, help="CPU threads (1): more than the free cores is many times slower than one")
    add("--list", action="store_true", help="print tasks and suites, then stop")
    args, rest = parser.parse_known_args(argv)
    if rest:
        raise ValueError(data.nearest(rest[0].split("=")[0], [a.option_strings[-1] for a in parser._actions[1:]
                                                              if a.option_strings], "flag"))
    if not args.checkpoint and not args.list:
        parser.error("which checkpoint? give a run directory, a checkpoint directory or a hub id")
    if args.greedy:
        args.n, args.temperature = 1, 0.0
    args.k, args.batch_size = args.k or sorted({1, args.n}), args.batch_size or (4096 if DEVICE.type == "cuda" else 256)
    for name in ("n", "limit", "max_new_tokens", "batch_size", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.k[0] < 1 or args.k[-1] > args.n:
        raise ValueError(f"--k {','.join(map(str, args.k))}: pass@k needs 1 <= k <= n, and --n is {args.n}")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ValueError(f"--temperature {args.temperature} must be at least 0, --top_p {args.top_p} in (0, 1]")
    if args.temperature == 0 and args.n > 1:
        raise ValueError(f"--temperature 0 would give the same response {args.n} times: say --greedy")
    return args


def known_tasks(args, run):
    """{name in the results: task of data.load}."""
    tasks = [t for t in args.tasks.split(",") if t] + SUITES.get(args.suite, [])
    tasks = tasks or ([run["eval_data"] or run["data"]] if run else SUITES["offline"])
    names = {Path(t).stem if Path(t).suffix in data.FILES else t: t for t in tasks}
    for name, task in names.items():
        if name == task and task not in data.TASKS and task not in data.SOURCES:
            raise ValueError(data.nearest(task, [*data.TASKS, *data.SOURCES], "task") + "; --list shows all")
    if len(names) < len(dict.fromkeys(tasks)):
        raise ValueError(f"--tasks {','.join(tasks)}: two of them have the same name, and would share their files")
    return names


def evaluate(args):
    began = time.time()
    checkpoint, run, out = locate(args.checkpoint)
    tasks = known_tasks(args, run)
    args.out = args.out or out
    if args.compare and args.compare.is_dir():
        args.compare = args.compare / "results.json"
    target = args.out / "results.json"
    if args.compare and not set(read_json(args.compare).get("results", ())) & set(tasks):
        raise ValueError(f"--compare {args.compare}: it has no result of {', '.join(tasks)}")
    if args.compare and args.compare.resolve() == target.resolve():
        raise ValueError(f"--compare {args.compare}: this evaluation would overwrite it; give another --out")
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    model = Model.from_pretrained(checkpoint, dtype, DEVICE)
    tokenizer = load_tokenizer(model.source)
    args.template = args.template or run.get("template") or ("chat" if getattr(tokenizer, "chat_template", None) else "none")
    args.max_new_tokens = args.max_new_tokens or longest_response(run, tasks.values())
    longest = model.config.max_position_embeddings - args.max_new_tokens
    questions = {name: load_questions(task, args, tokenizer, longest) for name, task in tasks.items()}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(args.out / f".{target.name}", "w"):
            pass
    except OSError as e:
        raise ValueError(f"--out {args.out}: cannot write there ({e.strerror})") from None

    protocol = {k: getattr(args, k) for k in ("n", "k", "temperature", "top_p", "max_new_tokens", "template", "limit", "seed",
                                              "acpo_compat")}
    if MAIN:
        print(f"{checkpoint}: {sum(p.numel() for p in model.parameters()):,} parameters, {str(dtype)[6:]} on {WORLD} x "
              f"{DEVICE.type}\nresponses: " + ", ".join(f"{k} {v}" for k, v in protocol.items() if k not in ("k", "limit")))
    results, configs = {}, {}
    with Scorer(workers=2) as scorer:
        for name, asked in questions.items():
            sampled = collect(args.out / f"samples_{name}.jsonl", asked, (args.n, args.temperature, args.top_p, args.seed),
                              model, tokenizer, scorer, args)
            greedy = [] if args.temperature == 0 else collect(args.out / f"greedy_{name}.jsonl", asked, (1, 0.0, 1.0, 0), model,
                                                              tokenizer, scorer, args)
            if MAIN:
                results[name] = {"alias": name} | score_rows(sampled, args.n, args.k) | {"run": sampled[0]["run"]}
                g = score_rows(greedy or sampled, 1)
                results[name] |= {"greedy": g["avg@1"], "greedy_se": g["se"], "greedy_length": g["length"]}
                source = data.SOURCES[tasks[name]]["test"] if tasks[name] in data.SOURCES else None
                several = sum(p.task == "math" and isinstance(p.answer["answer"], list) for p, _, _ in asked)
                configs[name] = {"task": tasks[name], "grader": asked[0][0].task, "any_of": several,
                                 "hub": source and source.hub, "revision": source and source.revision}
    if not MAIN:
        return
    record = {"results": results, "configs": configs, "n-shot": dict.fromkeys(results, 0), "config": protocol | {
                  "model": args.checkpoint, "checkpoint": checkpoint, "dtype": str(dtype)[6:], "device": DEVICE.type},
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "rewards.py": hashlib.sha256(Path(sys.modules["rewards"].__file__).read_bytes()).hexdigest()[:12]},
              "date": round(began), "total_evaluation_time_seconds": round(time.time() - began, 1)}

    def write():
        (args.out / f".{target.name}").write_text(json.dumps(record, indent=1))
        (args.out / f".{target.name}").rename(target)
    write()
    print("\n" + report(results))
    for name, c in configs.items():
        if c["hub"]:
            print(f"{name}: {c['hub']}" + (f"; any of several answers counts in {c['any_of']} questions" if c["any_of"] else ""))
    if args.compare:
        record["compare"] = {"other": str(args.compare), "tasks": compare(target, args.compare)}
        write()
        print(f"\nagainst {args.compare}\n{report_difference(record['compare']['tasks'])}")
    print(f"\nin {time.time() - began:.0f} s: {target}, samples beside it; read them with: "
          f"python experiments/samples_page.py {args.out}")


def main():
    try:
        args = parse(sys.argv[1:])
        if args.list:
            return print(*(f"suite {s}: {' '.join(t)}" for s, t in SUITES.items()), f"offline: {' '.join(data.TASKS)}",
                         *(f"{t}: {s['test'].hub}" for t, s in data.SOURCES.items() if "test" in s), sep="\n")
        torch.set_num_threads(args.threads)
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        if WORLD > 1:
            dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
        evaluate(args)
    except (ValueError, OSError) as e:
        sys.exit(f"eval.py: {e}")
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped; the same command goes on where it was")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
