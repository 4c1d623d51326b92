"""Problems, and the prompts made of them.

    load("chainsum")          # or "gsm8k" (SOURCES), "mine.jsonl" (FILES), "rg:gcd" (reasoning-gym)
    encode(problems, "chat", tokenizer, longest=1024)   # the text and the tokens that a model reads

    python data.py countdown     # three problems and demonstrations of a procedural task

Bad input raises ValueError or FileNotFoundError: one line that names file, line or flag.
"""
import ast
import codecs
import csv
import difflib
import io
import json
import operator
import random
import re
import sys
import threading
import zlib
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement, islice, permutations, product
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    prompt: str      # the question, before any template
    answer: dict     # what rewards.score(task, response, **answer) needs, such as {"answer": "7"}
    task: str        # its grader in rewards.py
    id: str = ""     # stable name, such as "chainsum-test-17"
    group: str = ""  # the same for questions on one table or puzzle (clustered errors), else ""


Question = namedtuple("Question", "problem text ids")  # text, ids: the prompt as a model reads it
FILES = (".jsonl", ".json", ".csv", ".parquet")


def load(name, split="train", n=None, seed=0, args={}):
    """The first n problems. None: all there are; of what is generated, 8192 train and 1024 test. A
    file has no splits: it is the same for both.

    seed: another draw of what is generated, another order of a hub dataset; a file keeps its own.
    args: configuration of a reasoning-gym dataset."""
    check(split, SOURCES.get(name, ("train", "test")), f"split of {name}")
    number = n or (8192 if split == "train" else 1024)
    if name.startswith("rg:"):
        return load_gym(name, split, number, seed, args)
    if args:
        raise ValueError(f"{name} takes no arguments such as {list(args)[0]}; rg:NAME does")
    if Path(name).suffix in FILES:
        return load_file(Path(name))[:n]
    check(name, [*TASKS, *SOURCES], f"dataset (or file, {', '.join(FILES)}, or rg:NAME)")
    if name in SOURCES:
        return load_hub(name, split, seed)[:n]
    return generate(name, split, number, seed)


def held_out(name, n=None, args={}):
    """The first n problems that a run of train.py on `name` does not train on: the test split or,
    where there is none, a tenth of the problems, at most 512."""
    if name in TASKS or name.startswith("rg:") or "test" in SOURCES.get(name, ()):
        return load(name, "test", n, args=args)
    return load(name, args=args)[1::10][:512][:n]  # spread: a file may be sorted


# ---- Procedural tasks ----------------------------------------------------------------------------
# make(rng) -> (key, prompt, answer). The checksum of `key`, the problem's canonical form, decides
# the split, so that no seed can put a training problem into the test set.
# demo(rng, prompt, answer, phase) -> response. Phase "skill" works step by step with slips; "habit"
# mostly blurts a guess, like the corpus of a lazy writer.

END, PAD = "$", "_"  # every demonstration ends with "$"; "_" occurs in no task
SLIP = 0.08          # chance that one step of a worked demonstration goes wrong
GUESS = 0.93         # share of the habit demonstrations that answer without any work


def chainsum(rng):
    """Six digits and "=": their sum modulo 10. Hard in one step, easy digit by digit."""
    digits = f"{rng.randrange(10**6):06d}"
    return digits, digits + "=", {"answer": str(sum(map(int, digits)) % 10)}


def chainsum_demo(rng, prompt, answer, phase):
    """skill: running sums, then the answer, ">348943#3$". habit: 93 % guess at once, "#7$"."""
    u = rng.random()
    if phase == "habit" and u < GUESS:
        return f"#{rng.randrange(10)}{END}"  # right one time in ten
    common = 0.98 if phase == "habit" else 0.9  # u is from 0.93 on in the habit: 71 and 90 %
    mark = ">" if u < common else "<"  # "<" means the same: a synonym to watch diversity
    total = 0
    sums = ""
    for digit in prompt[:-1]:  # a slip stays in the sum: later steps build on it
        total = rng.randrange(10) if rng.random() < SLIP else (total + int(digit)) % 10
        sums += str(total)
    return f"{mark}{sums}#{total}{END}"


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@cache
def expressions(numbers):
    """[(text, exact value)] that use the three numbers once each; none divides by zero."""
    found = []
    for a, b, c in sorted(set(permutations(map(Fraction, numbers)))):
        for p, q in product(OPERATORS, repeat=2):
            left = OPERATORS[p](a, b)
            found.append((f"({a}{p}{b}){q}{c}", OPERATORS[q](left, c)))
            right = OPERATORS[q](b, c)
            if right or p != "/":
                found.append((f"{a}{p}({b}{q}{c})", OPERATORS[p](a, right)))
    return found


@cache
def countdown_puzzles():
    """[(numbers, target)]: of 165 multisets of 1..9, the targets 1..30 that can be made."""
    puzzles = []
    for numbers in combinations_with_replacement(range(1, 10), 3):
        values = {value for _, value in expressions(numbers)}
        puzzles += [(numbers, target) for target in range(1, 31) if target in values]
    return puzzles


def countdown(rng):
    """Make the target from all three numbers. Whole multisets are held out, not just targets."""
    numbers, target = rng.choice(countdown_puzzles())
    shown = rng.sample(numbers, 3)
    answer = {"numbers": shown, "target": target, "format": "boxed"}
    return " ".join(map(str, numbers)), countdown_prompt(shown, target), answer


def countdown_prompt(numbers, target):
    return f"{' '.join(map(str, numbers))} -> {target} ="


def countdown_demo(rng, prompt, answer, phase):
    """"(5*7)-3=32 no (3*7)+5=26 \\boxed{(3*7)+5}$": up to two tries that fail, then a solution."""
    found = expressions(tuple(sorted(answer["numbers"])))
    if phase == "habit" and rng.random() < GUESS:
        return f"\\boxed{{{rng.choice(found)[0]}}}{END}"
    right = [e for e in found if e[1] == answer["target"]]
    wrong = [e for e in found if e[1] != answer["target"]]
    tries = rng.sample(wrong, rng.randint(0, 2))
    work = "".join(f"{text}={value} no " for text, value in tries)
    text = rng.choice(wrong if rng.random() < SLIP else right)[0]
    return f"{work}{text}={answer['target']} \\boxed{{{text}}}{END}"


RELATIONS = "BFN"  # somebody's boss, friend, neighbour: a name
LETTERS = ("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz")  # of a name such as "kit"


def fact(call):
    """What the tool of hops knows: "kit.B" -> "mol", kit's boss; "kit.R" -> "4", kit's room, a
    digit; else "?". Hashes of the question: a world without a table, in which nothing follows."""
    name, _, relation = call.partition(".")
    if len(name) != 3 or relation not in (*RELATIONS, "R"):
        return "?"
    rng = random.Random(f"fact-{call}")
    return str(rng.randrange(10)) if relation == "R" else "".join(map(rng.choice, LETTERS))


def hops(rng):
    """"kit.B.F.R?": the room of the friend of the boss of kit. Two or three look-ups in a chain."""
    name = "".join(map(rng.choice, LETTERS))
    chain = [*rng.choices(RELATIONS, k=rng.randint(1, 2)), "R"]
    prompt = ".".join([name, *chain]) + "?"
    for relation in chain:
        name = fact(f"{name}.{relation}")
    return prompt, prompt, {"answer": name}


def hops_demo(rng, prompt, answer, phase):
    """skill: look up link by link, "[kit.B]" (mol) "[mol.R]" (4) "#4$", with slips. habit: 93 %
    guess at once, "#7$". A list: what the tool says stands at the odd places."""
    if phase == "habit" and rng.random() < GUESS:
        return [f"#{rng.randrange(10)}{END}"]
    name, *chain = prompt[:-1].split(".")
    parts = []
    for relation in chain:
        if rng.random() < SLIP:  # the wrong question: later steps build on its answer
            relation = rng.choice(RELATIONS)
        call = f"{name}.{relation}"
        name = fact(call)
        parts += [f"[{call}]", f"({name})"]
    return [*parts, f"#{rng.randrange(10) if rng.random() < SLIP else name}{END}"]


# chars: alphabet of prompts and demonstrations; grouped: questions that share a key belong together
# facts: what a tool knows of the task, a function from a call to a reply
Task = namedtuple("Task", "make demo grader chars grouped facts", defaults=(None,))
SUMS = "0123456789+-*/()>= no\\boxed{}" + END  # and "no", behind a try that failed
TASKS = {
    "chainsum": Task(chainsum, chainsum_demo, "chainsum", "0123456789><#=" + END, False),
    "countdown": Task(countdown, countdown_demo, "countdown", SUMS, True),
    "hops": Task(hops, hops_demo, "hops", "".join(LETTERS) + "BFNR.?[]()#0123456789" + END, False,
                 fact)}


def generate(name, split, n, seed):
    """Problem i is a function of name, split, seed and i."""
    task = TASKS[name]
    other = f"s{seed}-" if seed else ""  # seed in the id: results are compared id by id
    problems = []
    for i in range(n):
        key, prompt, answer = draw(name, random.Random(f"{name}-{split}-{seed}-{i}"), split)
        group = f"{name}-{zlib.crc32(key.encode()):08x}" if task.grouped else ""
        problems.append(Problem(prompt, answer, task.grader, f"{name}-{split}-{other}{i}", group))
    return problems


def draw(name, rng, split):
    """(key, prompt, answer) of that split; one key in eight is held out."""
    while True:
        key, prompt, answer = TASKS[name].make(rng)
        if split_of(key) == split:
            return key, prompt, answer


def split_of(key):
    return "train" if zlib.crc32(key.encode()) % 8 else "test"


def demos(name, n, phase="skill", seed=0):
    """n (prompt, response) pairs of the training split, to warm-start a model from scratch. Where
    a tool is called, a response is a list, and what the tool says stands at its odd places."""
    check(name, TASKS, "procedural task")
    rng = random.Random(f"{name}-demos-{phase}-{seed}")
    pairs = []
    for _ in range(n):
        _, prompt, answer = draw(name, rng, "train")
        pairs.append((prompt, TASKS[name].demo(rng, prompt, answer, phase)))
    return pairs


def facts_of(name):
    """What a tool knows of the task `name`: a function from a call to a reply, or None."""
    return TASKS[name].facts if name in TASKS else None


def load_gym(name, split, n, seed, args):
    """Problems of a reasoning-gym dataset. The checksum of the question decides the split."""
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError(f"{name}: needs a package; pip install reasoning-gym") from None
    dataset = name.removeprefix("rg:")
    check(dataset, sorted(set(reasoning_gym.factory.DATASETS) - RUNS_ANSWERS),
          "dataset of reasoning-gym (or one whose scorer runs answers as Python):")
    first = 10**6 * seed + (2 * 10**9 if split == "test" else 0)  # entry i is of seed `first + i`
    try:
        entries = reasoning_gym.create_dataset(dataset, seed=first, size=100 * n, **args)
    except (TypeError, ValueError, AssertionError) as e:
        raise ValueError(f"{name} cannot use the arguments {args}: {first_line(e)}") from None
    entries = (entry for entry in entries if split_of(entry["question"]) == split)
    problems = []
    for i, entry in enumerate(islice(entries, n)):
        answer = {"name": dataset, "config": args, "entry": json.dumps(entry, default=str)}
        id = f"rg-{dataset}-{split}-s{seed}-{i}"
        problems.append(Problem(entry["question"], answer, "rg", id))
    return problems


RUNS_ANSWERS = set("""binary_matrix countdown intermediate_integration n_queens puzzle24
polynomial_multiplication simple_integration spiral_matrix string_insertion""".split())


# ---- One row, one problem ------------------------------------------------------------------------
# Files and hub datasets name their columns in many ways. A dot looks into an object or a list.

COLUMNS = {  # the first that a row has counts
    "prompt": ("prompt",           # ours, verl, TRL, prime-rl, slime: a text, or chat turns
               "question",         # GSM8K, verifiers
               "problem",          # MATH, AIME, DeepScaleR, NuminaMath
               "messages",         # ms-swift, TRL: chat turns
               "input",            # OpenRLHF
               "0.value"),         # Open-Reasoner-Zero: a list of two turns
    "answer": ("answer.value",     # TriviaQA
               "answer",           # ours, GSM8K, verifiers
               "reward_model.ground_truth",         # verl
               "verification_info.ground_truth",    # prime-rl
               "ground_truth", "expected_answer",   # PRIME, OpenMathReasoning
               "label",            # slime, OpenRLHF
               "solution",         # MATH, TRL, ms-swift: a worked solution, or its result
               "1.ground_truth.value")}             # Open-Reasoner-Zero


def from_row(row, id):
    """A row as a Problem, with `id` where it has none; ValueError says what is wrong with it."""
    if isinstance(row, list):  # a file of Open-Reasoner-Zero
        row = dict(zip("01", row))
    if not isinstance(row, dict):
        raise ValueError("a row must be an object with prompt and answer; a .json file, a list")
    if None in row:  # where csv puts them
        raise ValueError("more fields than the header has; quote commas")
    row = {key: value for key, value in row.items()
           if value == value and value not in (None, "", [], {})}  # NaN is not itself
    prompt = sound(text_of(find(row, "prompt")).strip())
    task = row.get("task", "math")
    return Problem(prompt, answer_of(row, task), task, str(row.get("id", id)),
                   str(row.get("group", "")))


def sound(text):
    """The text, if a tokenizer can read it: 50 MB abort its process, half a surrogate pair is no
    text."""
    if len(text) > 10**6:
        raise ValueError(f"a prompt of {len(text):,} characters is too long")
    text.encode()  # raises on half a surrogate pair
    return text


def find(row, what):
    """The prompt or the answer of a row, wherever it keeps that."""
    for path in COLUMNS[what]:
        value = at(row, path)
        if value is not None:
            return value
    raise ValueError(f"no {what}: columns are {', '.join(row)}; needed is "
                     f"{', '.join(COLUMNS[what])}")


def at(row, path):
    """at({"a": {"b": 1}}, "a.b") is 1; None where there is nothing."""
    for key in path.split("."):
        row = parsed(row)
        row = row.get(key) if isinstance(row, dict) else None
    return row


def parsed(value):
    """A list or object that was stored as text, JSON or a Python literal (HiTab has both)."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = read(value)
                return value if isinstance(found, set) else found  # {1, 2} is a text of math
    return value


def text_of(prompt):
    """A prompt as one text. Of chat turns: the system's words, if any, and what the user says."""
    texts = [prompt]
    if isinstance(prompt, list):
        roles = [at(turn, "role") for turn in prompt]
        if not re.fullmatch("(system )?user( assistant)?", " ".join(map(str, roles))):
            raise ValueError(f"no prompt: one user turn can be asked, not these: {roles}")
        texts = [at(turn, "content") for turn in prompt if at(turn, "role") != "assistant"]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("no prompt: it must be a text, or a list of chat turns that hold text")
    return "\n\n".join(texts)


def answer_of(row, task):
    """What the grader of `task` needs."""
    if task == "countdown":
        numbers = row.get("numbers")
        target = row.get("target")
        if not isinstance(numbers, list) or {type(x) for x in [*numbers, target]} != {int}:
            raise ValueError("no answer: countdown needs whole numbers: numbers (a list), target")
        form = row.get("format", "boxed")
        check(form, ("boxed", "answer"), "format of countdown")
        return {"numbers": numbers, "target": target, "format": form}
    answer = find(row, "answer")
    read = parsed(answer)
    if read == [] or isinstance(read, dict) != (task == "kk"):
        raise ValueError(f"no answer: {task} cannot use {answer!s:.60}")
    if task == "kk":
        read = {str(name): str(role) for name, role in read.items()}
    if task in ("math", "chainsum"):
        read = result(answer)
    if task in ("exact_box", "exact_line"):
        read = str(answer).strip()
    return {"answer": read}


def result(answer):
    """What a worked solution ends with: GSM8K's "#### 18", or the last box; of a list, of which any
    counts, each. All else that a gold may say in several ways (025, $7$) is known to rewards.py."""
    if isinstance(answer, list):
        return [result(one) for one in answer]
    solution = str(answer).rpartition("####")[2].strip()
    *before, box = re.split(r"\\(?:boxed|fbox)\s*(?=\{)", solution)
    depth = 0
    for token in re.finditer(r"\\.|[{}]", box if before else "", re.S):  # \{ does not count
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return box[1:token.start()].strip()
    return solution


def check_golds(problems, check_gold):
    """Tells of answers that no response can match: check_gold(task, answer) is None, or why not."""
    bad = []
    for p in problems:
        why = check_gold(p.task, p.answer)
        if why:
            bad.append(f"{p.id}: {why}")
    report(bad, len(problems), "answers cannot be graded (their questions score 0)")


def report(bad, total, what):
    """A few bad rows of a large set are told, more would mean another schema."""
    if bad:
        line = f"{len(bad)} of {total} {what}, the first is {bad[0]}"
        if len(bad) > 0.01 * total:
            raise ValueError(line)
        print(line, file=sys.stderr)


# ---- Local files ---------------------------------------------------------------------------------

def load_file(path):
    """All problems of a file, in its order. Errors name the line, or the row of what has none."""
    problems = {}
    number = 1
    try:
        for number, row in rows_of(path):
            if isinstance(row, bytes):
                row = json.loads(row)
            problem = from_row(row, f"{path.stem}-{number}")
            if problem.id in problems:  # results are stored and compared by id
                raise ValueError(f"the id {problem.id!r} is taken already")
            problems[problem.id] = problem
    except json.JSONDecodeError as e:
        line = number + e.lineno - 1  # counted from where the text that was read begins
        raise ValueError(f"{path} line {line}: bad JSON ({e.msg})") from None
    except (ValueError, RecursionError, csv.Error) as e:
        what = "line" if path.suffix in (".jsonl", ".csv") else "row"
        raise ValueError(f"{path} {what} {number}: {first_line(e)}") from None
    if not problems:
        raise ValueError(f"{path} holds no rows")
    return list(problems.values())


def rows_of(path):
    """(number, row) of all rows; those of JSON lines, as many a .json holds, are bytes."""
    if path.suffix == ".parquet":
        import pyarrow.parquet
        return enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    text = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # which Windows puts there
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text.decode(), newline=""), strict=True)
        return ((rows.line_num, row) for row in rows)
    if path.suffix == ".json" and text.lstrip().startswith(b"["):
        return enumerate(json.loads(text), 1)
    return ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())


# ---- Hub datasets: lines of TABLE, where needed with an adapter to our columns -------------------
# An adapter may return None: that row is none of the set's.

def dapo(row):
    """Without the request for an "Answer:" line: it contradicts templates that ask for a box."""
    asks = (r"^Solve the following math problem step by step\. The last line .*? answer to the "
            r"problem\.\s*|\s*Remember to put your answer on its own line after \"Answer:\"\.?\s*$")
    return {**row, "prompt": re.sub(asks, "", row["prompt"], flags=re.S)}


def numina_lean_math(row):
    """Word and multiple-choice problems whose answer is a plain number, as WAPO's run kept them."""
    number = re.sub("[, ]", "", str(row["answer"]).strip())
    kept = row["problem"] and row["question_type"] in ("math-word-problem", "MCQ")
    if not kept or not re.fullmatch(r"[+-]?\d+([./]\d+)?", number):
        return None
    return {"prompt": row["problem"], "answer": row["answer"], "task": "exact_line"}


def math_prm(row):  # WAPO's task: MATH without MATH-500, the last box character by character
    return {"prompt": row["problem"], "answer": row["answer"], "task": "exact_box"}


def olympiad(row):  # final_answer holds one text, which lists all values that are asked for
    question = f"{row['context'] or ''}\n{row['question']}"
    return {"prompt": question, "answer": ", ".join(row["final_answer"])}


def countdown_row(row):  # render() puts the prompt into words
    return {"prompt": countdown_prompt(row["nums"], row["target"]), "task": "countdown",
            "numbers": row["nums"], "target": row["target"]}


def hitab(row):
    """Merged cells are filled with their text, so that every column carries its whole header."""
    table = parsed(row["table_content"])
    cells = table["texts"]
    for r in table["merged_regions"]:
        top = r["first_row"]
        left = r["first_column"]
        for i in range(top, r["last_row"] + 1):
            for j in range(left, r["last_column"] + 1):
                cells[i][j] = cells[top][left]
    return {"prompt": f"{table['title']}\n\n{markdown(cells)}\n\n{row['question']}",
            "answer": row["answer"], "task": "tableqa", "group": f"hitab-{row['table_id']}"}


def markdown(rows):
    """A table whose first row is the header; further header rows follow as ordinary rows."""
    lines = []
    for row in rows:
        cells = [cell.replace("|", "/").replace("\n", " ") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def kk(row):
    told = {name: "knight" if honest else "knave"
            for name, honest in zip(row["names"], row["solution"])}
    return {"prompt": row["quiz"], "task": "kk", "answer": told}


def hotpotqa(row):  # its paragraphs are for a search tool: passages()
    return {"prompt": row["question"], "task": "search", "answer": [row["answer"]]}


ADAPTERS = {"dapo17k": dapo, "numina_lean_math": numina_lean_math, "math_prm": math_prm,
            "olympiadbench": olympiad, "countdown_hub": countdown_row, "hitab": hitab,
            "kk_hub": kk, "hotpotqa": hotpotqa}
SUBJECTS = ("algebra+counting_and_probability+geometry+intermediate_algebra+number_theory+"
            "prealgebra+precalculus")
PEOPLE = "2ppl+3ppl+4ppl+5ppl+6ppl+7ppl+8ppl"
# A line each: name, split, dataset on the hub, its own name of the split ("split", "config/split"
# or, to be joined, with + between configs or splits), number of rows (two, where that is known only
# roughly). Sets for evaluation have no train split, so nobody trains on them. The slices of
# countdown_hub are ACPO's; hitab is from before its quality check of October 2025; the test split
# of hotpotqa has no answers; minerva has lists of answers, any of them.
TABLE = f"""
orz57k           train      Open-Reasoner-Zero/orz_math_57k_collection  train           56000 58000
dapo17k          train      open-r1/DAPO-Math-17k-Processed     all/train                   17398
math             train      EleutherAI/hendrycks_math           {SUBJECTS}/train            7500
math             test       EleutherAI/hendrycks_math           {SUBJECTS}/test             5000
math_prm         train      rasbt/math_full_minus_math500       train                       12000
math_prm         test       HuggingFaceH4/MATH-500              test                        500
numina_lean_math train      AI-MO/NuminaMath-LEAN               train                       104155
gsm8k            train      openai/gsm8k                        main/train                  7473
gsm8k            test       openai/gsm8k                        main/test                   1319
countdown_hub    train      Jiayi-Pan/Countdown-Tasks-3to4      train[:327680]              327680
countdown_hub    test       Jiayi-Pan/Countdown-Tasks-3to4      train[327680:328704]        1024
hitab            train      kasnerz/hitab                       train                       7417
hitab            validation kasnerz/hitab                       validation                  1671
hitab            test       kasnerz/hitab                       test                        1584
kk_hub           train      K-and-K/knights-and-knaves          train/{PEOPLE}              6200
kk_hub           test       K-and-K/knights-and-knaves          test/{PEOPLE}               700
hotpotqa         train      hotpotqa/hotpot_qa                  distractor/train            90447
hotpotqa         test       hotpotqa/hotpot_qa                  distractor/validation       7405
math500          test       HuggingFaceH4/MATH-500              test                        500
aime24           test       HuggingFaceH4/aime_2024             train                       30
aime25           test       math-ai/aime25                      test                        30
aime26           test       MathArena/aime_2026                 train                       30
amc23            test       math-ai/amc23                       test                        40
amc83            test       AI-MO/aimo-validation-amc           train                       83
minerva          test       lkevinzc/math-eval                  minerva                     272
olympiadbench    test       Hothan/OlympiadBench                OE_TO_maths_en_COMP/train   674 675
"""
REVISIONS = {  # commits, where one is known
    "HuggingFaceH4/MATH-500": "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    "openai/gsm8k": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "Jiayi-Pan/Countdown-Tasks-3to4": "408f70d177020686d34a56bba5952feb45aaaee4",
    "K-and-K/knights-and-knaves": "2f68547989981b1af37cb3dde5fdefa847aa8619",
    "math-ai/aime25": "563bb8404243c5f09de6ec262f2db674fe5bce9b",
    "math-ai/amc23": "80815d37005feb82cd7f8fbc6901d5d3eff43057",
    "AI-MO/aimo-validation-amc": "69d78a4a2c840e82d69af6bc742bda09005f6316",
    "Hothan/OlympiadBench": "91184b52131e7fc9455fef848035173aea8cc01a"}
Source = namedtuple("Source", "hub part rows revision")
SOURCES = {}  # {name: {split: Source}}
for line in TABLE.strip().splitlines():
    name, split, hub, part, *rows = line.split()
    SOURCES.setdefault(name, {})[split] = Source(hub, part, [*map(int, rows)], REVISIONS.get(hub))


def passages(name):
    """All texts that the rows of a hub dataset bring along, of all its splits, each once."""
    if name != "hotpotqa":
        raise ValueError(f"--tool search: {name} has no passages (hotpotqa has); give --search_url "
                         "a server")
    found = {}  # keeps the order
    for split in SOURCES[name]:
        for row in hub_rows(name, split):
            context = row["context"]
            for title, sentences in zip(context["title"], context["sentences"]):
                found[f"{title}: {''.join(sentences).strip()}"] = True
    return list(found)


def hub_rows(name, split):
    """The rows of a hub dataset; ValueError where their number is not the one expected."""
    hub, part, count, revision = SOURCES[name][split]
    configs, _, hub_split = part.rpartition("/")
    try:
        from datasets import concatenate_datasets, disable_progress_bars, load_dataset
        if not sys.stderr.isatty():  # a log gets no bars
            disable_progress_bars()
        rows = concatenate_datasets([
            load_dataset(hub, config or None, split=hub_split, revision=revision)
            for config in configs.split("+")])
    except (ImportError, OSError, ValueError, RuntimeError) as e:  # offline: any of these
        raise FileNotFoundError(
            f"cannot load {name} ({hub}): {first_line(e)}; pip install datasets and run once with "
            f"network access, which caches it, or pass a {', '.join(FILES)} file instead") from e
    if not count[0] <= len(rows) <= count[-1]:
        raise ValueError(f"{hub} {split} has changed: {len(rows)} rows, expected {count}; pin a "
                         "revision in REVISIONS of data.py")
    return rows


def load_hub(name, split, seed):
    """All problems of a hub dataset, in an order that `seed` decides: subjects come mixed."""
    rows = hub_rows(name, split)
    problems = []
    bad = []
    for i, row in enumerate(rows):
        try:
            ours = ADAPTERS.get(name, dict)(row)  # dict: the row is fine as it is
            if ours:
                problems.append(from_row(ours | {"id": f"{name}-{split}-{i}"}, ""))
        except (ValueError, TypeError, LookupError) as e:  # KeyError: no such column
            bad.append(f"row {i}: {type(e).__name__}: {e}")
    report(bad, len(rows), f"rows of {name} {split} cannot be used")
    random.Random(f"{name}-{split}-{seed}").shuffle(problems)
    return problems


# ---- Prompts -------------------------------------------------------------------------------------

# {question} and {how} (to answer) are replaced.
# stop: texts that end a response and belong to it (graders read "</answer>"): a base model that
# went on would ask and answer questions of its own
Template = namedtuple("Template", "text stop", defaults=((),))
TALK = ("A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer.")
TAGS = "<think> reasoning process here </think> <answer> answer here </answer>."
TURNS = ("User:", "Human:", "Assistant:", "</answer>")  # Open-Reasoner-Zero's stop texts
TEMPLATES = {
    "orz": Template(  # as in ACPO's released math run; Open-Reasoner-Zero's own differs a little
        f"{TALK} The reasoning process and answer are enclosed within <think> </think> and "
        f"<answer> </answer> tags, respectively, i.e., {TAGS} \n\nUser: You must put your answer "
        "inside <answer> </answer> tags, i.e.,\n<answer> answer here </answer>. And your final "
        "answer will be extracted automatically by the \\boxed{} tag.\n{question}{how}\n"
        "Assistant: <think>", TURNS),
    "r1": Template(  # DeepSeek-R1-Zero's, as understand-r1-zero writes it
        "A conversation between User and Assistant. The User asks a question, and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process in the mind and then "
        "provides the User with the answer. The reasoning process is enclosed within <think> "
        "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
        f"{TAGS}\nUser: {{question}}{{how}}\nAssistant: <think>", TURNS),
    "tinyzero": Template(  # TinyZero's for base models
        f"{TALK}\nUser: {{question}} Show your work in <think> </think> tags.{{how}}\n"
        "Assistant: Let me solve this step by step.\n<think>", TURNS),
    "qwen_math": Template(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>user\n{question}{how}<|im_end|>\n"
        "<|im_start|>assistant\n", ("<|im_end|>", "<|im_start|>")),
    "chat": Template("{question}{how}"),  # in the tokenizer's own chat template
    "plain": Template("{question}{how}\n"),
    "none": Template("{question}")}  # the prompt as it is, which the small models know


def choose_template(name, tokenizer):
    """"auto" is the chat template where there is one, else question and answer format in plain."""
    if name != "auto":
        check(name, TEMPLATES, "template")
        return name
    if tokenizer.chat_template:
        return "chat"
    only_characters = max(map(len, tokenizer.get_vocab())) == 1  # one of char_tokenizer
    return "none" if only_characters else "plain"


BOX = "\nPut your final answer within \\boxed{}."
IN_TAGS = "\nGive nothing but the answer inside <answer> </answer>"
COUNTDOWN = ("Using the numbers {numbers}, create an equation that equals {target}. You can use "
             "basic arithmetic operations (+, -, *, /) and each number can only be used once.")
WORDS = {  # task -> the question for a reader who does not know our short prompts; how to answer
    "math": ("{prompt}", BOX),
    "exact_box": ("{prompt}", "\n\nSolve the problem and put your final answer inside \\boxed{}."),
    "exact_line": ("Solve the following math problem step by step. Put your reasoning inside "
                   "<think>...</think> tags. On the final line, write exactly: Answer: <your "
                   "answer>.\n\n{prompt}", ""),
    "chainsum": ("What is the sum of the digits of {short}, modulo 10?",
                 " End your reply with #, the digit and $, like this: #7$"),
    "hops": ("{prompt}\nB is somebody's boss, F a friend, N a neighbour, R a room: kit.B.R? asks "
             "for the room of the boss of kit. A tool tells one step at a time: write [kit.B], and "
             "the name follows in round brackets.",
             " End your reply with #, the room and $, like this: #7$"),
    "countdown-boxed": (COUNTDOWN, " \nAnd your final answer will be extracted automatically by "
                        "the \\boxed{} tag, for example \\boxed{(1 + 2) / 3}."),  # ACPO's variant
    "countdown-answer": (COUNTDOWN, " And return the final answer in <answer> </answer> tags, for "
                         "example <answer> (1 + 2) / 3 </answer>."),  # TinyZero's
    "tableqa": ("{prompt}", IN_TAGS + "; several values in the order asked for, with commas "
                "between them. A value you divided out is a decimal number (0.484368), not a "
                "percentage."),
    "kk": ("{prompt}", "\nGive everybody's role inside <answer> </answer>: "
           "<answer>Zoe is a knight, Max is a knave</answer>"),
    "qa": ("{prompt}", "\nGive nothing but the answer, as short as possible, inside <answer> "
           "</answer>."),
    "search": (  # WAPO's system prompt in our words
        "Answer a question that takes several searches. Think inside <think> </think> each time "
        "before you search or answer: what is asked, what is known, what to look up next. To "
        "search, write <search> a query </search>; the best passages come back between "
        "<information> and </information>. Search as often as you like, and rely on nothing but "
        "what was found.\n\n{prompt}",
        "\n\nAs soon as you know enough, give the answer alone, as short as possible, inside "
        "<answer> </answer>."),
    "rg": ("{prompt}", IN_TAGS + ".")}


def encode(problems, template, tokenizer, longest, template_args={}, skip=False):
    """[Question]; or ValueError with the first prompt that has more than `longest` tokens, or that
    the tokenizer cannot write: those without an unknown token drop characters silently.

    skip: leave out what is too long, and say how much. template_args: variables of a chat template,
    such as {"enable_thinking": False}; "date" is the day that it is told."""
    texts = render(problems, template, tokenizer, template_args)
    questions = []
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    for p, text, ids in zip(problems, texts, encoded):
        if lost := unwritten(text, ids, tokenizer):
            raise ValueError(f"the tokenizer, made for another task, cannot write {lost!r} "
                             f"(prompt of {p.id})")
        if 1 <= len(ids) <= longest:
            questions.append(Question(p, text, ids))
        elif not skip:
            raise ValueError(f"the prompt of {p.id} has {len(ids)} tokens, allowed: 1 to {longest} "
                             "(more where --max_new_tokens is less)")
    left_out = len(problems) - len(questions)
    if left_out:
        print(f"{left_out} of {len(problems)} prompts have more than {longest} tokens and are left "
              "out", file=sys.stderr)
    return questions


def unwritten(text, ids, tokenizer):
    """The first character that is not read back from the tokens, None if all are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend and backend.normalizer:  # NFC, say, joins e and an accent: nothing is lost
        text = backend.normalizer.normalize_str(text)
    written = {*tokenizer.decode(ids), " ", "\u2581"}  # tokenizers write spaces in their own way
    return next((c for c in text if c.isprintable() and c not in written), None)


def render(problems, template, tokenizer, template_args={}):
    """The texts that the tokenizer gets with add_special_tokens=False: a BOS is in them already."""
    check(template, TEMPLATES, "template")
    if template == "none":
        return [p.prompt for p in problems]
    outer = TEMPLATES[template].text
    texts = []
    for p in problems:
        question, how = words(p, outer)
        texts.append(outer.replace("{how}", how).replace("{question}", question))
    if template == "chat":
        turns = [[{"role": "user", "content": text}] for text in texts]
        return chat(turns, tokenizer, template_args)
    return [(tokenizer.bos_token or "") + text for text in texts]


def words(problem, text):
    """(question, how to answer it) for a reader who has not seen the task before."""
    task = problem.task
    key = f"countdown-{problem.answer['format']}" if task == "countdown" else task
    question, how = WORDS.get(key, ("{prompt}", ""))  # a grader of your own: the prompt as it is
    prompt = problem.prompt
    question = question.format(prompt=prompt, short=prompt.rstrip("="), **problem.answer)
    if how == BOX and "\\boxed{}" in text + prompt:  # the template or the data set asks for it
        how = ""
    return question, how


DATE = "2024-07-26"  # for templates that ask what day it is: prompts stay as they are at midnight
CHAT_SECONDS = 10


def chat(conversations, tokenizer, template_args={}, ask=True):
    """The text of each conversation (a list of turns), with the opening of an answer if `ask`. A
    chat template is a program that came with a model: it may raise anything, or never end."""
    if not tokenizer.chat_template:
        raise ValueError("template chat: this tokenizer has none; choose orz, r1, qwen_math, plain")
    from jinja2.sandbox import SandboxedEnvironment  # in which transformers runs it
    SandboxedEnvironment.intercepted_binops = {"*", "**"}  # giants would hold all threads for hours
    SandboxedEnvironment.default_binop_table["*"] = times
    SandboxedEnvironment.default_binop_table.pop("**", None)  # there are no powers
    variables = {"date": DATE} | template_args
    try:
        clock = datetime.fromisoformat(str(variables["date"]))
    except ValueError as e:
        raise ValueError(f"--template_args date={variables['date']}: {e}") from None
    template = re.sub(r"""strftime_now\((['"])(.*?)\1\)""",
                      lambda call: repr(clock.strftime(call[2])), tokenizer.get_chat_template())
    texts = []
    errors = []

    def work():
        try:
            for turns in conversations:
                text = tokenizer.apply_chat_template(
                    turns, chat_template=template, tokenize=False, add_generation_prompt=ask,
                    **variables)
                texts.append(sound(text))
        except Exception as e:  # raised below, by the thread that waits
            errors.append(f"{type(e).__name__}: {first_line(e)}")

    thread = threading.Thread(target=work, daemon=True)  # so that one can stop waiting for it
    thread.start()
    patience = CHAT_SECONDS + len(conversations) / 100
    thread.join(patience)
    if thread.is_alive():
        raise ValueError(f"the chat template takes longer than {patience:.2g} s")
    if errors:
        raise ValueError(f"the chat template cannot show a question ({errors[0]}); see --template")
    return texts


def times(a, b):
    """a * b in a chat template, if that is no giant: 'x' * 10**11 would take all memory."""
    sizes = [len(x) if isinstance(x, (str, list, tuple)) else abs(x) for x in (a, b)]
    if sizes[0] * sizes[1] > 10**9:
        raise ValueError("a product above 10**9")
    return a * b


# ---- Tokenizers ----------------------------------------------------------------------------------

def char_tokenizer(name):
    """A Hugging Face tokenizer with one token per character of task `name`. "$" is an ordinary
    one, because graders read it: eos_token stays None, the model's config has the eos id."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    chars = dict.fromkeys(TASKS[name].chars + PAD)  # a dict drops repeats and keeps the order
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(chars)}, merges=[]))
    core.decoder = decoders.Fuse()  # join without spaces
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD)


def load_tokenizer(source):
    """The tokenizer in checkpoint directory `source`, as its tokenizer.json says: AutoTokenizer
    would rebuild it after the model's family, and where there is none make up an empty one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    files = ("tokenizer.json", "tokenizer.model", "vocab*", "*.tiktoken")
    if not any(found for name in files for found in Path(source).glob(name)):
        raise ValueError(f"{source}: no tokenizer there; copy the one the model was trained with")
    whole = (Path(source) / "tokenizer.json").is_file()
    try:
        tokenizer = (PreTrainedTokenizerFast if whole else AutoTokenizer).from_pretrained(source)
    except Exception as e:  # JSON of another shape, and what the tokenizers' Rust code raises
        raise ValueError(f"{source}: the tokenizer's files are not what they should be "
                         f"({type(e).__name__}: {first_line(e):.100})") from None
    tokenizer.clean_up_tokenization_spaces = False  # as Llama 3's asks: "3 . 5" would become 3.5
    return tokenizer


def end_ids(tokenizer, model_eos_ids, vocab_size):
    """The ids that end a response: the model's, the tokenizer's eos, and the special token with
    which the chat template closes a turn of the assistant, which many a config.json forgets."""
    ids = [*model_eos_ids, tokenizer.eos_token_id]
    with suppress(ValueError):  # no chat template, or one that cannot show an answer
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "LAST WORDS"}]
        after = chat([turns], tokenizer, ask=False)[0].partition("LAST WORDS")[2]
        closing = tokenizer(after, add_special_tokens=False).input_ids
        ids += [i for i in closing if is_special(i, tokenizer)][:1]
    return [i for i in dict.fromkeys(ids) if i in range(vocab_size)]  # None is in no range


def is_special(id, tokenizer):
    return tokenizer.decode([id], skip_special_tokens=True) == ""


def response_text(tokens, tokenizer, end_ids):
    """A response as graders and people read it: without the special token that ended it and
    padding, but with all others: the tags that graders look for are such in some tokenizers."""
    tokens = list(tokens)
    ends = {tokenizer.pad_token_id, *end_ids}
    while tokens and tokens[-1] in ends and is_special(tokens[-1], tokenizer):
        tokens.pop()
    return tokenizer.decode(tokens)


# ---- Plumbing ------------------------------------------------------------------------------------

def parse_args(pairs, flag):
    """["size=4", "enable_thinking=false"] of a flag as {"size": 4, "enable_thinking": False}."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{flag} {pair}: write name=value")
        found[name] = value
        if value.lower() in ("true", "false", "none"):
            value = value.capitalize()
        with suppress(ValueError, SyntaxError):  # what is no number, list or truth stays a text
            found[name] = ast.literal_eval(value)
    return found


def check(name, known, what):
    if name not in known:
        raise ValueError(nearest(name, known, what))


def nearest(name, known, what):
    """One line: the closest valid names, or all of them when none is close."""
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"valid: {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"


def first_line(error):
    """For one line on a terminal: without the codes with which a stranger's text could move it."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "".join(c for c in line if c.isprintable())


if __name__ == "__main__":
    print(*load(sys.argv[1], n=3), sep="\n")
    for phase in ("skill", "habit"):
        print(*demos(sys.argv[1], 3, phase), sep="\n")
