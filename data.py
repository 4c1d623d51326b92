"""Problems: procedural tasks that need no network, datasets of the Hugging Face hub or a local file, prompt templates.

    python data.py countdown              # look at a few problems and demonstrations
    python data.py math math500           # duplicate prompts, and 13-grams of words that both sets contain

Bad input raises ValueError or FileNotFoundError with one line that names the file, line or flag and what to do.
"""
import ast
import csv
import difflib
import json
import operator
import random
import re
import sys
import zlib
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement, permutations, product
from pathlib import Path

@dataclass(frozen=True)
class Problem:
    prompt: str      # the question, before any template
    answer: dict     # keyword arguments of rewards.score(task, response, **answer), e.g. {"answer": "7"}
    task: str        # grader: chainsum | add | math | countdown | tableqa | kk | qa
    id: str = ""     # stable name, e.g. "chainsum-test-17"
    group: str = ""  # questions that share a table, passage or puzzle (for clustered standard errors), else ""

def nearest(name, known, what):  # one line: the closest valid names, or all of them when none is close
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"valid: {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"

def check(name, known, what):
    if name not in known:
        raise ValueError(nearest(name, known, what))


# ---- Procedural tasks ------------------------------------------------------------------------------------------------
# make(rng) -> (key, prompt, answer): the checksum of `key`, the problem's canonical form, decides the split, so that no
# seed can put a training problem into the test set. demo(rng, prompt, answer, phase) -> response: phase "skill" works
# step by step with slips; "habit" mostly blurts a guess, as the corpus of a lazy writer would.

END, PAD = "$", "_"  # every demonstration ends with "$"; "_" occurs in no task
SLIP = 0.08          # chance that one step of a worked demonstration goes wrong
GUESS = 0.93         # share of the habit demonstrations that answer without any work

def chainsum(rng):  # six digits, "=": their sum modulo 10; nobody can do it in one step, everybody digit by digit
    digits = f"{rng.randrange(10**6):06d}"
    return digits, digits + "=", {"answer": str(sum(map(int, digits)) % 10)}

def chainsum_demo(rng, prompt, answer, phase):
    """skill: running sums, then the answer, ">348943#3$". habit: 93 % guess at once, "#7$"; 5 % ">", 2 % "<" chains."""
    u = rng.random()
    if phase == "habit" and u < GUESS:
        return f"#{rng.randrange(10)}{END}"  # a uniform guess: right one time in ten
    mark = "<" if u >= (0.98 if phase == "habit" else 0.9) else ">"  # "<" means the same: a synonym to watch diversity
    total, sums = 0, ""
    for d in prompt[:-1]:  # a slip stays in the sum: later steps build on it
        total = rng.randrange(10) if rng.random() < SLIP else (total + int(d)) % 10
        sums += str(total)
    return f"{mark}{sums}#{total}{END}"

def add(rng):  # two numbers of the same length, 2 to 6 digits; sorted in the key: 12+34 and 34+12 lie on the same side
    k = rng.randint(2, 6)
    a, b = (rng.randrange(10 ** (k - 1), 10**k) for _ in range(2))
    return f"{min(a, b)}+{max(a, b)}", f"{a}+{b}=", {"answer": str(a + b)}

def add_demo(rng, prompt, answer, phase):  # 57+68= -> "7+8=15 5+6+1=12 \boxed{125}$": columns from the right, carries
    a, b = prompt[:-1].split("+")
    if phase == "habit" and rng.random() < GUESS:
        return f"\\boxed{{{rng.randrange(10 ** (len(a) - 1), 2 * 10 ** len(a))}}}{END}"
    carry, digits, work = 0, "", ""
    for x, y in zip(a[::-1], b[::-1]):
        s = rng.randrange(20) if rng.random() < SLIP else int(x) + int(y) + carry
        work += f"{x}+{y}{'+1' if carry else ''}={s} "
        carry, digits = s // 10, str(s % 10) + digits
    return f"{work}\\boxed{{{int(str(carry) + digits)}}}{END}"

OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

def expressions(numbers):  # every (text, exact value) that uses the three numbers once each; not divided by zero
    for a, b, c in sorted(set(permutations(map(Fraction, numbers)))):
        for p, q in product(OPS, repeat=2):
            yield f"({a}{p}{b}){q}{c}", OPS[q](OPS[p](a, b), c)
            right = OPS[q](b, c)
            if right or p != "/":
                yield f"{a}{p}({b}{q}{c})", OPS[p](a, right)

@cache
def countdown_puzzles():
    """({numbers: [(text, value)]}, [(numbers, target)]): 165 multisets of 1..9, every target in 1..30 they can make."""
    table = {m: list(expressions(m)) for m in combinations_with_replacement(range(1, 10), 3)}
    return table, [(m, t) for m in table for t in range(1, 31) if any(v == t for _, v in table[m])]

def countdown(rng):  # make the target from all three numbers; whole multisets are held out, not just targets or orders
    numbers, target = rng.choice(countdown_puzzles()[1])
    shown = rng.sample(numbers, 3)
    prompt = f"{' '.join(map(str, shown))} -> {target} ="
    return " ".join(map(str, numbers)), prompt, {"numbers": shown, "target": target, "format": "boxed"}

def countdown_demo(rng, prompt, answer, phase):
    """ "(5*7)-3=32 no (3*7)+5=26 \\boxed{(3*7)+5}$": up to two tries that fail, then a solution (or a slip)."""
    found = countdown_puzzles()[0][tuple(sorted(answer["numbers"]))]
    if phase == "habit" and rng.random() < GUESS:
        return f"\\boxed{{{rng.choice(found)[0]}}}{END}"
    right, wrong = ([e for e in found if (e[1] == answer["target"]) == hit] for hit in (True, False))
    work = "".join(f"{text}={value} no " for text, value in rng.sample(wrong, rng.randint(0, 2)))
    text = rng.choice(wrong if rng.random() < SLIP else right)[0]
    return f"{work}{text}={answer['target']} \\boxed{{{text}}}{END}"

def markdown(rows):  # the first row is the header as Markdown has it, further header rows follow as ordinary rows
    lines = ["| " + " | ".join(str(c).replace("|", "/").replace("\n", " ") for c in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])

def minitable(rng):
    """A question on a table of HiTab's shape: two header rows (year, region), merged headers repeated, 3-6 rows.
    The pool of 3,000 tables is fixed, so that about three of the 1,024 test questions share a table, as in HiTab."""
    t = random.Random(f"minitable-{rng.randrange(3000)}")
    years, regions = sorted(t.sample(range(2015, 2025), 2)), t.sample(["north", "south", "east", "west"], 2)
    crops = "wheat rice maize oats barley rye beans peas lentils cotton wool flax".split()
    items = t.sample(crops, t.randint(3, 6))
    columns = [(y, r) for y in years for r in regions]
    cells = iter(t.sample(range(10, 100), len(items) * 4))  # distinct: an argmax is never a tie
    value = {(i, c): next(cells) for i in items for c in columns}
    table = markdown([["", *(y for y, _ in columns)], ["", *(r for _, r in columns)],
                      *([i, *(value[i, c] for c in columns)] for i in items)])
    c = rng.choice(columns)
    a, b = sorted(rng.sample(items, 2), key=lambda i: -value[i, c])  # a has the larger cell
    x, y, where = value[a, c], value[b, c], f"in {c[1]} in {c[0]}"
    question, answer = rng.choice([
        (f"What is the value of {a} {where}?", [x]),
        (f"Which row has the largest value {where}?", [max(items, key=lambda i: value[i, c])]),
        (f"By how much does {a} exceed {b} {where}?", [x - y]),
        (f"What is the sum of {a} and {b} {where}?", [x + y]),
        (f"What is {b} divided by {a} {where}, rounded to 4 decimals?", [round(y / x, 4)]),
        (f"What are the values of {b} and {a} {where}, respectively?", [y, x])])
    return table, f"{table}\n{question}", {"answer": answer}

def minitable_demo(rng, prompt, answer, phase):  # the answer or a slip; habit: mostly some two-digit number
    guess = rng.random() < (GUESS if phase == "habit" else SLIP)
    shown = [rng.randrange(10, 100)] if guess else answer["answer"]
    return f"<answer>{', '.join(map(str, shown))}</answer>{END}"

NAMES = "Ann Bob Cal Dee Eve Fay Gus Hal".split()
CLAIMS = {  # operator -> (truth of the claim, words); p and q are "the person is what the claim says"
    "is": (lambda p, q: p, "{0}"), "and": (operator.and_, "{0} and {1}"), "or": (operator.or_, "{0} or {1}"),
    "iff": (operator.eq, "{0} if and only if {1}"), "implies": (operator.le, "if {0} then {1}")}

def kk_key(claims):  # the same for puzzles that differ only in names, order of the people, or A and B against B and A
    keys = []
    for order in permutations(range(len(claims))):
        new = [(op, [(order.index(i), v) for i, v in atoms]) for op, *atoms in (claims[i] for i in order)]
        keys.append([(op, a[:1] if op == "is" else a if op == "implies" else sorted(a)) for op, a in new])
    return str(min(keys))

def kk(rng):  # knights (always truthful) and knaves (always lying), 2 to 4 people, exactly one solution by brute force
    n, solutions = rng.randint(2, 4), []
    while len(solutions) != 1:
        claims = []
        for speaker in range(n):
            op = rng.choice(list(CLAIMS))
            i, j = rng.sample(range(n), 2)
            if op == "is" and i == speaker:
                i, j = j, i  # "I am a knight" says nothing and "I am a knave" nobody can say
            claims.append((op, (i, rng.random() < 0.5), (j, rng.random() < 0.5)))
        solutions = [roles for roles in product([True, False], repeat=n) if all(  # a knave's claim is false
            CLAIMS[op][0](roles[i] == v, roles[j] == w) == role for (op, (i, v), (j, w)), role in zip(claims, roles))]
    names, role = rng.sample(NAMES, n), {True: "knight", False: "knave"}
    says = [CLAIMS[op][1].format(*(f"{names[i]} is a {role[v]}" for i, v in atoms)) for op, *atoms in claims]
    prompt = " ".join(f"{name} says: {text}." for name, text in zip(names, says))
    return kk_key(claims), prompt, {"answer": {name: role[r] for name, r in zip(names, solutions[0])}}

def kk_demo(rng, prompt, answer, phase):  # the solution, each role with a slip; habit: mostly random roles
    wrong = 0.5 if phase == "habit" and rng.random() < GUESS else SLIP
    flip = {"knight": "knave", "knave": "knight"}
    told = [f"{name} is a {flip[r] if rng.random() < wrong else r}" for name, r in answer["answer"].items()]
    return f"<answer>{', '.join(told)}</answer>{END}"

# chars: alphabet of prompts and demonstrations; grouped: few keys, and questions that share one are not independent
Task = namedtuple("Task", "make demo grader chars grouped")
ASCII = "\n" + "".join(chr(i) for i in range(32, 127) if chr(i) != PAD)
TASKS = {
    "chainsum": Task(chainsum, chainsum_demo, "chainsum", "0123456789><#=" + END, False),
    "add": Task(add, add_demo, "add", "0123456789+= \\boxed{}" + END, False),
    "countdown": Task(countdown, countdown_demo, "countdown", "0123456789+-*/()>= n\\boxed{}" + END, True),
    "minitable": Task(minitable, minitable_demo, "tableqa", ASCII, True),
    "kk": Task(kk, kk_demo, "kk", ASCII, True)}

def draw(name, rng, split):  # until the checksum agrees: one problem in eight is held out
    while True:
        key, prompt, answer = TASKS[name].make(rng)
        if (zlib.crc32(key.encode()) % 8 == 0) == (split == "test"):
            return key, prompt, answer

def demos(name, n, phase="skill", seed=0):
    """n (prompt, response) pairs of the training split, for the warm start of a model built from scratch."""
    check(name, TASKS, "procedural task")
    check(phase, ("skill", "habit"), "phase")
    rng = random.Random(f"{name}-demos-{phase}-{seed}")
    drawn = (draw(name, rng, "train") for _ in range(n))
    return [(prompt, TASKS[name].demo(rng, prompt, answer, phase)) for _, prompt, answer in drawn]


# ---- One row, one problem --------------------------------------------------------------------------------------------
# Local files and hub datasets meet in one row format: prompt (or question, problem), answer and, where there is more to
# say, task (default math), id, group. What the sets have of their own, an adapter brings into it.

def present(answer):
    if answer is None or answer != answer or answer in ([], {}) or not str(answer).strip():  # NaN is not itself
        raise ValueError("no answer: every row needs a non-empty one")
    return answer

def gold(answer):  # a reference answer of a math problem as plain text: "$7$" -> "7", 142.0 -> "142", "025" -> "25"
    text = re.sub(r"(?<!\\)\$", "", str(present(answer))).strip()
    return present(re.sub(r"^(-?)0+(?=\d+$)", r"\1", re.sub(r"^(-?\d+)\.0+$", r"\1", text)))

def parsed(value):  # a list or object stored as text, JSON or a Python literal (HiTab has both); nothing is evaluated
    for read in (json.loads, ast.literal_eval) if isinstance(value, str) else (lambda same: same,):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(value)
    raise ValueError(f"cannot read {value[:40]!r} as JSON or as a Python literal")

def from_row(row, id):
    """A row as a Problem, with `id` where it has none of its own; ValueError says what is wrong with it."""
    match row:
        case [{"value": prompt}, {"ground_truth": {"value": answer}}]:  # Open-Reasoner-Zero's form
            row = {"prompt": prompt, "answer": answer}
    if not isinstance(row, dict):
        raise ValueError("a row must be an object with prompt and answer, and a .json file a list of rows")
    prompt, answer = row.get("prompt") or row.get("question") or row.get("problem"), row.get("answer")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("no prompt: give a text in the field prompt (or question, or problem)")
    task = row.get("task") or "math"
    check(task, ("chainsum", "add", "math", "countdown", "tableqa", "kk", "qa"), "task")
    if task == "countdown":
        numbers, target, form = parsed(row.get("numbers")), parsed(row.get("target")), row.get("format") or "boxed"
        if not isinstance(numbers, list) or not all(isinstance(x, int) for x in [*numbers, target]):
            raise ValueError("no answer: countdown needs the fields numbers (a list) and target, all whole numbers")
        check(form, ("boxed", "answer"), "format of countdown")
        answer = {"numbers": numbers, "target": target, "format": form}
    elif task in ("math", "chainsum", "add"):  # a list of golds means any of them; repeats go
        golds = list(dict.fromkeys(map(gold, present(answer) if isinstance(answer, list) else [answer])))
        answer = {"answer": golds if len(golds) > 1 else golds[0]}
    else:
        if isinstance(present(answer), str) and answer.lstrip()[0] in "[{":  # a .csv cell with a list or an object
            answer = present(parsed(answer))
        if task != "kk":
            answer = [present(a) for a in answer] if isinstance(answer, list) else [answer]
        elif not isinstance(answer, dict) or not {"knight", "knave"}.issuperset(answer.values()):
            raise ValueError('kk needs an answer such as {"Ann": "knight", "Bob": "knave"}')
        answer = {"answer": answer}
    own, group = ("" if row.get(key) is None else str(row[key]) for key in ("id", "group"))
    return Problem(prompt.strip(), answer, task, own or id, group)


# ---- Hub datasets: a row of SOURCES each, and an adapter from the hub's row to ours (None: left out) -----------------

def boxed(solution):  # the last \boxed{...} or \fbox{...} of a worked solution, or the "\boxed 3" that MATH has too
    rest = re.split(r"\\(?:boxed|fbox)\s*", f"$ {solution}")[-1]
    if not rest.startswith("{"):
        return re.split(r"[$\s]", rest)[0].rstrip(".,")
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest, re.S):  # \{ and \} do not count
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return rest[1:token.start()]
    raise ValueError("unterminated \\boxed")

def gsm8k(row):  # 14 of the answers have thousands separators
    return {"prompt": row["question"], "answer": row["answer"].partition("####")[2].replace(",", "")}

def dapo(row):  # the instruction that asks for an "Answer:" line contradicts templates that ask for a box
    asks = (r"^Solve the following math problem step by step\. The last line .*? answer to the problem\.\s*"
            r"|\s*Remember to put your answer on its own line after \"Answer:\"\.?\s*$")
    return {"prompt": re.sub(asks, "", row["prompt"], flags=re.S), "answer": row["solution"]}

def olympiad(row):  # final_answer holds one string, which lists all values that are asked for
    return {"prompt": f"{row['context'] or ''}\n{row['question']}", "answer": ", ".join(row["final_answer"])}

def numina(row):  # WAPO's subset: word problems and multiple choice with a plain numeric answer
    number = re.fullmatch(r"\+?(-?(\d+(\.\d+)?|\d+/\d+))", re.sub(r"[ ,]", "", str(row["answer"])))
    if number and row["question_type"] in ("math-word-problem", "MCQ") and (row["problem"] or "").strip():
        return {"prompt": row["problem"], "answer": number[1]}

def countdown_row(row):  # render() puts the prompt into words
    return {"prompt": f"{' '.join(map(str, row['nums']))} -> {row['target']} =", "task": "countdown",
            "numbers": row["nums"], "target": row["target"]}

def hitab(row):  # merged cells are filled with their text, so that every column carries its whole header
    table = parsed(row["table_content"])
    cells = [list(line) for line in table["texts"]]
    for r in table["merged_regions"]:
        top, left = r["first_row"], r["first_column"]
        for i, j in product(range(top, r["last_row"] + 1), range(left, r["last_column"] + 1)):
            cells[i][j] = table["texts"][top][left]
    return {"prompt": f"{table['title']}\n\n{markdown(cells)}\n\n{row['question']}", "task": "tableqa",
            "answer": parsed(row["answer"]), "group": f"hitab-{row['table_id']}"}

def kk_row(row):
    people = zip(parsed(row["names"]), parsed(row["solution"]), strict=True)
    return {"prompt": row["quiz"], "task": "kk", "answer": {name: "knight" if r else "knave" for name, r in people}}

def hotpotqa(row):
    context = zip(row["context"]["title"], row["context"]["sentences"])
    passages = [f"{title}: {''.join(sentences).strip()}" for title, sentences in context]
    return {"prompt": "\n\n".join([*passages, row["question"]]), "task": "qa", "answer": [row["answer"]]}

# revision: commit of the dataset, if one is known; part: the hub's names for the split, "split", "config/split" or, to
# be joined, "config+config/split"; rows: how many, a range where that is known only roughly
Source = namedtuple("Source", "hub adapter revision part rows")

def source(hub, adapter=dict, revision=None, **parts):  # dict: the row is fine as it is
    return {split: Source(hub, adapter, revision, *part) for split, part in parts.items()}

MATH = "algebra+counting_and_probability+geometry+intermediate_algebra+number_theory+prealgebra+precalculus"
PEOPLE = "2ppl+3ppl+4ppl+5ppl+6ppl+7ppl+8ppl"
SOURCES = {  # name -> split -> where it comes from; sets for evaluation have no train split, so nobody trains on them
    "orz57k": source("Open-Reasoner-Zero/orz_math_57k_collection", lambda r: [r["0"], r["1"]],
                     train=("train", range(56_000, 58_001))),
    "dapo17k": source("open-r1/DAPO-Math-17k-Processed", dapo, train=("all/train", 17_398)),
    "math": source("EleutherAI/hendrycks_math", lambda r: {"prompt": r["problem"], "answer": boxed(r["solution"])},
                   train=(f"{MATH}/train", 7_500), test=(f"{MATH}/test", 5_000)),
    "gsm8k": source("openai/gsm8k", gsm8k, "e53f048856ff4f594e959d75785d2c2d37b678ee",
                    train=("main/train", 7_473), test=("main/test", 1_319)),
    "countdown_hub": source("Jiayi-Pan/Countdown-Tasks-3to4", countdown_row, "408f70d177020686d34a56bba5952feb45aaaee4",
                            train=("train[:327680]", 327_680), test=("train[327680:328704]", 1_024)),  # ACPO's slices
    "hitab": source("kasnerz/hitab", hitab, train=("train", 7_417), validation=("validation", 1_671),
                    test=("test", 1_584)),  # before the quality check of October 2025
    "numina_lean": source("AI-MO/NuminaMath-LEAN", numina, train=("train", range(100_000, 110_001))),
    "hotpotqa": source("hotpotqa/hotpot_qa", hotpotqa, train=("distractor/train", 90_447),
                       test=("distractor/validation", 7_405)),  # the test split is hidden
    "kk_hub": source("K-and-K/knights-and-knaves", kk_row, "2f68547989981b1af37cb3dde5fdefa847aa8619",
                     train=(f"train/{PEOPLE}", 6_200), test=(f"test/{PEOPLE}", 700)),
    "math500": source("HuggingFaceH4/MATH-500", dict, "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", test=("test", 500)),
    "aime24": source("HuggingFaceH4/aime_2024", test=("train", 30)),
    "aime25": source("math-ai/aime25", lambda r: {**r, "answer": r["answer"].removesuffix(r"^\circ")},  # one has it
                     "563bb8404243c5f09de6ec262f2db674fe5bce9b", test=("test", 30)),
    "aime26": source("MathArena/aime_2026", test=("train", 30)),
    "amc23": source("math-ai/amc23", dict, "80815d37005feb82cd7f8fbc6901d5d3eff43057", test=("test", 40)),
    "amc83": source("AI-MO/aimo-validation-amc", dict, "69d78a4a2c840e82d69af6bc742bda09005f6316", test=("train", 83)),
    "minerva": source("lkevinzc/math-eval", test=("minerva", 272)),  # lists of answers: any of them
    "olympiadbench": source("Hothan/OlympiadBench", olympiad, "91184b52131e7fc9455fef848035173aea8cc01a",
                            test=("OE_TO_maths_en_COMP/train", range(674, 676))),
}

def load_hub(name, split, seed):
    """All problems of a hub dataset, in an order that `seed` decides: subjects and difficulties come mixed at any n."""
    hub, adapter, revision, part, count = SOURCES[name][split]
    configs, _, hub_split = part.rpartition("/")
    try:
        from datasets import concatenate_datasets, load_dataset
        rows = concatenate_datasets([load_dataset(hub, config or None, split=hub_split, revision=revision)
                                     for config in configs.split("+")])
    except Exception as e:  # the hub client raises a dozen kinds; offline, not cached and no such revision look alike
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise FileNotFoundError(f"cannot load {name} ({hub}): {why}; pip install datasets and run once with network "
                                f"access, which caches it, or pass a local {', '.join(FILES)} file instead") from e
    problems, bad = [], []
    for i, row in enumerate(rows):
        try:
            row = adapter(row)
            if row is not None:
                problems.append(replace(from_row(row, ""), id=f"{name}-{split}-{i}"))
        except (ValueError, TypeError, LookupError, AttributeError) as e:
            bad.append(f"row {i}: {type(e).__name__}: {e}")  # KeyError: a column that is not there
    report = f"{len(bad)} rows cannot be used, the first is {bad[0]}" if bad else f"{len(rows)} rows, expected {count}"
    if len(rows) not in (count if isinstance(count, range) else [count]) or len(bad) > 0.01 * len(rows):
        raise ValueError(f"{hub} {split} has changed; pin a revision in SOURCES of data.py: {report}")
    if bad:  # a few are the hub's fault, many would mean another schema
        print(f"{name}: left out {report}", file=sys.stderr)
    if name == "dapo17k":  # the original repeats each problem about 103 times
        problems = list({p.prompt: p for p in problems}.values())
    random.Random(f"{name}-{split}-{seed}").shuffle(problems)
    return problems


# ---- Local files -----------------------------------------------------------------------------------------------------

FILES = (".jsonl", ".json", ".csv", ".parquet")

def load_file(path):
    """All problems of a local file, in its order. Ids and errors count lines of .jsonl and .csv, rows of the others."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    what, number, problems = "line" if path.suffix in (".jsonl", ".csv") else "row", 1, {}
    def counted(items):  # `number` is that of the line or row at hand
        nonlocal number
        for number, item in enumerate(items, 1):
            yield item
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            rows = counted(pyarrow.parquet.read_table(path).to_pylist())
        elif path.suffix == ".json":
            rows = counted(json.loads(path.read_text(encoding="utf-8-sig")))
        else:
            lines = (line.decode("utf-8-sig") for line in counted(path.read_bytes().splitlines(True)))
            rows = (csv.DictReader(lines, strict=True) if path.suffix == ".csv" else
                    (json.loads(line) for line in lines if line.strip()))
        for row in rows:
            if path.suffix == ".csv" and None in row:
                raise ValueError("more fields than the header has; quote commas")
            p = from_row(row, f"{path.stem}-{number}")
            if p.id in problems:  # results are stored and compared by id
                raise ValueError(f"the id {p.id!r} is taken already")
            problems[p.id] = p
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} line {e.lineno if what == 'row' else number}: bad JSON ({e.msg})") from None
    except (OSError, ValueError, TypeError, RecursionError, csv.Error) as e:
        raise ValueError(f"{path} {what} {number}: {str(e).splitlines()[0]}") from None
    if not problems:
        raise ValueError(f"{path} {what} 1: the file holds no rows")
    return list(problems.values())

def load(name, split="train", n=None, seed=0):
    """The first n problems (default: 8192 train and 1024 test of procedural tasks, else all there are). seed: another
    draw of a procedural task, another order of a hub dataset. A file keeps its order, whatever split and seed."""
    if n is not None and n < 1:
        raise ValueError(f"{name}: {n} problems asked for, at least 1 is needed")
    if Path(name).suffix in FILES:
        return load_file(Path(name))[:n]
    check(name, [*TASKS, *SOURCES], f"dataset (or file, {', '.join(FILES)})")
    check(split, SOURCES.get(name, ("train", "test")), f"split of {name}")
    if name in SOURCES:
        return load_hub(name, split, seed)[:n]
    problems, s, task = [], f"s{seed}-" if seed else "", TASKS[name]  # seed in the id: results are compared id by id
    for i in range(n or (8192 if split == "train" else 1024)):
        key, prompt, answer = draw(name, random.Random(f"{name}-{split}-{seed}-{i}"), split)
        group = f"{name}-{zlib.crc32(key.encode()):08x}" if task.grouped else ""
        problems.append(Problem(prompt, answer, task.grader, f"{name}-{split}-{s}{i}", group))
    return problems

def overlap(train, test, n=13):
    """repeats: how many training prompts occur more than once; duplicates: (train id, test id) with the same words;
    ngrams: ids of test problems that share n words in a row with some training prompt (13 as in GPT-3's report)."""
    def grams(words):
        return {hash(words[i:i + n]) for i in range(len(words) - n + 1)}  # hashes: 57k problems fit into memory
    train, test = ([(tuple(re.findall(r"\w+", p.prompt.lower())), p.id) for p in side] for side in (train, test))
    first, seen = dict(reversed(train)), set().union(*(grams(words) for words, _ in train))
    return {"repeats": len(train) - len(first), "duplicates": [(first[w], id) for w, id in test if w in first],
            "ngrams": [id for words, id in test if not seen.isdisjoint(grams(words))]}


# ---- Tokenizers ------------------------------------------------------------------------------------------------------

def char_tokenizer(name):
    """A Hugging Face tokenizer with one token per character of task `name`. "$" is an ordinary one, which survives
    decode(skip_special_tokens=True) because graders read it: eos_token stays None, the model's config has the eos id.
    There is no unknown token: a character outside the alphabet raises ("Missing [UNK] token")."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    check(name, TASKS, "procedural task")
    chars = dict.fromkeys(TASKS[name].chars + PAD)  # a dict drops repeats and keeps the order
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(chars)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()  # join without spaces
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, clean_up_tokenization_spaces=False)

def load_tokenizer(source):
    """The tokenizer in checkpoint directory `source`, as its tokenizer.json says: AutoTokenizer would rebuild it after the
    model's family, and where there is none make up an empty one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    if not any(list(source.glob(name)) for name in ("tokenizer.json", "tokenizer.model", "vocab*", "*.tiktoken")):
        raise ValueError(f"{source}: no tokenizer there; copy the one the model was trained with")
    kind = PreTrainedTokenizerFast if (source / "tokenizer.json").is_file() else AutoTokenizer
    return kind.from_pretrained(source)

def encode(problems, template, tokenizer, longest):
    """[(Problem, prompt text, prompt ids)], or ValueError with the first prompt that is too long or that this tokenizer
    cannot write: tokenizers without an unknown token drop characters silently, or raise without a name."""
    texts, vocab = [render(p, template, tokenizer) for p in problems], tokenizer.get_vocab()
    if max(map(len, vocab)) == 1:  # one of char_tokenizer
        for p, c in ((p, c) for p, text in zip(problems, texts) for c in text if c not in vocab):
            raise ValueError(f"the tokenizer, made for another task, cannot write {c!r} (prompt of {p.id})")
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for p, text, ids, spans in zip(problems, texts, encoded.input_ids, encoded.offset_mapping):
        read = {at for span in spans for at in range(*span)}
        lost = [c for at, c in enumerate(text) if at not in read and c.isprintable() and c != " "]
        if lost:
            raise ValueError(f"the tokenizer, made for another task, cannot write {lost[0]!r} (prompt of {p.id})")
        if not 0 < len(ids) <= longest:
            raise ValueError(f"the prompt of {p.id} has {len(ids)} tokens, allowed are 1 to {longest}")
    return list(zip(problems, texts, encoded.input_ids))


# ---- Prompt templates ------------------------------------------------------------------------------------------------

# text: {question} and {how} (to answer) are replaced; None is the tokenizer's own chat template. stop: strings that end
# a response and belong to it (graders read "</answer>"): a base model that went on would be graded on its own questions
Template = namedtuple("Template", "text stop", defaults=((),))
TALK = ("A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer.")
TAGS = "<think> reasoning process here </think> <answer> answer here </answer>."
TURNS = ("User:", "Human:", "Assistant:", "</answer>")  # Open-Reasoner-Zero's stop strings
TEMPLATES = {
    "orz": Template(  # as in ACPO's released math run; Open-Reasoner-Zero's own wording differs a little
        f"{TALK} The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        f"respectively, i.e., {TAGS} \n\nUser: You must put your answer inside <answer> </answer> tags, i.e.,\n"
        "<answer> answer here </answer>. And your final answer will be extracted automatically by the \\boxed{} tag.\n"
        "{question}{how}\nAssistant: <think>", TURNS),
    "r1": Template(  # DeepSeek-R1-Zero's, as understand-r1-zero writes it
        TALK.replace("The user", "The User").replace("The assistant", "The Assistant").replace("the user", "the User")
        + " The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
        f"tags, respectively, i.e., {TAGS}\nUser: {{question}}{{how}}\nAssistant: <think>", TURNS),
    "tinyzero": Template(  # TinyZero's for base models
        f"{TALK}\nUser: {{question}} Show your work in <think> </think> tags.{{how}}\n"
        "Assistant: Let me solve this step by step.\n<think>", TURNS),
    "qwen_math": Template(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n{question}{how}<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>", "<|im_start|>")),
    "chat": Template(None), "none": Template("{question}")}

BOX = "\nPut your final answer within \\boxed{}."
COUNTDOWN = ("Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic "
             "operations (+, -, *, /) and each number can only be used once.")  # TinyZero's; the grader wants every one
WORDS = {  # task -> the question for a reader who does not know our short prompts, and how the grader wants the answer
    "math": ("{prompt}", BOX),
    "add": ("What is {short}?", BOX),
    "chainsum": ("What is the sum of the digits of {short}, modulo 10?",
                 " End your reply with #, the digit and $, like this: #7$"),
    "countdown-boxed": (COUNTDOWN, " \nAnd your final answer will be extracted automatically by the \\boxed{} tag, for "
                        "example \\boxed{(1 + 2) / 3}."),  # ACPO's variant of TinyZero's
    "countdown-answer": (COUNTDOWN, " And return the final answer in <answer> </answer> tags, for example <answer> "
                         "(1 + 2) / 3 </answer>."),
    "tableqa": ("{prompt}", "\nGive nothing but the answer inside <answer> </answer>; several values in the order "
                "asked for, with commas between them. A value you divided out is a decimal number (0.484368), not a "
                "percentage."),
    "kk": ("A knight always tells the truth and a knave always lies. {prompt} Who is what?",
           "\nGive everybody's role inside <answer> </answer>: <answer>Zoe is a knight, Max is a knave</answer>"),
    "qa": ("{prompt}", "\nGive nothing but the answer, as short as possible, inside <answer> </answer>.")}

def render(problem, template, tokenizer=None):
    """The prompt text that is fed to the tokenizer, with add_special_tokens=False: a BOS is already in the text.
    "none" is the prompt as it is. The others put short prompts into words and say what the grader reads."""
    check(template, TEMPLATES, "template")
    text, prompt, task = TEMPLATES[template].text, problem.prompt, problem.task
    if template == "none":
        return prompt
    question, how = WORDS[f"countdown-{problem.answer['format']}" if task == "countdown" else task]
    question = question.format(prompt=prompt, short=prompt.rstrip("="), **problem.answer)
    if task == "kk" and "always" in prompt:  # the hub's puzzles bring the rules along
        question = prompt
    if text is None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("template chat needs a tokenizer with a chat template; else orz, r1, tinyzero, qwen_math")
        turn = [{"role": "user", "content": question + how}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    if how == BOX and "\\boxed{}" in text:  # the template says it itself
        how = ""
    return (getattr(tokenizer, "bos_token", None) or "") + text.replace("{how}", how).replace("{question}", question)


if __name__ == "__main__":
    names = sys.argv[1:]
    try:
        if len(names) == 2:
            print(json.dumps(overlap(load(names[0]), load(names[1], "test")), indent=1))
        elif len(names) == 1:
            print(*load(names[0], next(iter(SOURCES.get(names[0], ["train"]))), 3), sep="\n\n")
            for phase in ("skill", "habit") if names[0] in TASKS else ():
                print(f"\n{phase} demonstrations:", *(a + b for a, b in demos(names[0], 3, phase)), sep="\n")
        else:
            sys.exit(__doc__)
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"data.py: {e}")
