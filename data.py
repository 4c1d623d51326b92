"""Problems, and the prompts made of them.

    load("chainsum")        # or "math500" (SOURCES), "mine.jsonl" (FILES), "rg:gcd" (reasoning-gym)
    encode(problems, "chat", tokenizer, longest=1024)   # the text and the tokens that a model reads

    python data.py countdown                            # three problems and demonstrations

Bad input raises ValueError or FileNotFoundError: one line that names file, line or flag.
"""
import ast
import codecs
import csv
import difflib
import json
import operator
import random
import re
import sys
import threading
import zlib
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass, replace
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
    """The first n problems. None: all there are; of what is generated, 8192 train and 1024 test.

    seed: another draw of what is generated, another order of a hub dataset; a file keeps its own.
    args: configuration of a reasoning-gym dataset."""
    if n is not None and n < 1:
        raise ValueError(f"{name}: {n} problems asked for, at least 1 is needed")
    if args and not name.startswith("rg:"):
        raise ValueError(f"{name} takes no arguments such as {list(args)[0]}; rg:NAME does")
    if Path(name).suffix in FILES:
        return load_file(Path(name))[:n]
    if not name.startswith("rg:"):
        check(name, [*TASKS, *SOURCES], f"dataset (or file, {', '.join(FILES)}, or rg:NAME)")
    check(split, SOURCES.get(name, ("train", "test")), f"split of {name}")
    if name in SOURCES:
        return load_hub(name, split, seed)[:n]
    n = n or (8192 if split == "train" else 1024)
    return generate(name, split, n, seed) if name in TASKS else load_gym(name, split, n, seed, args)


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
    rare = 0.98 if phase == "habit" else 0.9
    mark = ">" if u < rare else "<"  # "<" means the same: a synonym to watch diversity
    total = 0
    sums = ""
    for digit in prompt[:-1]:  # a slip stays in the sum: later steps build on it
        total = rng.randrange(10) if rng.random() < SLIP else (total + int(digit)) % 10
        sums += str(total)
    return f"{mark}{sums}#{total}{END}"


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def expressions(numbers):
    """Every (text, exact value) that uses the three numbers once each; none divides by zero."""
    for a, b, c in sorted(set(permutations(map(Fraction, numbers)))):
        for p, q in product(OPERATORS, repeat=2):
            left = OPERATORS[p](a, b)
            yield f"({a}{p}{b}){q}{c}", OPERATORS[q](left, c)
            right = OPERATORS[q](b, c)
            if right or p != "/":
                yield f"{a}{p}({b}{q}{c})", OPERATORS[p](a, right)


@cache
def countdown_puzzles():
    """({numbers: [(text, value)]}, [(numbers, target)]): 165 multisets of 1..9, targets 1..30."""
    table = {}
    puzzles = []
    for numbers in combinations_with_replacement(range(1, 10), 3):
        table[numbers] = list(expressions(numbers))
        values = {value for _, value in table[numbers]}
        puzzles += [(numbers, target) for target in range(1, 31) if target in values]
    return table, puzzles


def countdown(rng):
    """Make the target from all three numbers. Whole multisets are held out, not just targets."""
    numbers, target = rng.choice(countdown_puzzles()[1])
    shown = rng.sample(numbers, 3)
    answer = {"numbers": shown, "target": target, "format": "boxed"}
    return " ".join(map(str, numbers)), countdown_prompt(shown, target), answer


def countdown_prompt(numbers, target):
    return f"{' '.join(map(str, numbers))} -> {target} ="


def countdown_demo(rng, prompt, answer, phase):
    """"(5*7)-3=32 no (3*7)+5=26 \\boxed{(3*7)+5}$": up to two tries that fail, then a solution."""
    found = countdown_puzzles()[0][tuple(sorted(answer["numbers"]))]
    if phase == "habit" and rng.random() < GUESS:
        return f"\\boxed{{{rng.choice(found)[0]}}}{END}"
    right = [e for e in found if e[1] == answer["target"]]
    wrong = [e for e in found if e[1] != answer["target"]]
    tries = rng.sample(wrong, rng.randint(0, 2))
    work = "".join(f"{text}={value} no " for text, value in tries)
    text = rng.choice(wrong if rng.random() < SLIP else right)[0]
    return f"{work}{text}={answer['target']} \\boxed{{{text}}}{END}"


CROPS = "wheat rice maize oats barley rye beans peas lentils cotton wool flax".split()


def minitable(rng):
    """A question on a table of HiTab's shape: two header rows (year, region), merged headers
    repeated, 3-6 rows. The pool of 3,000 tables is fixed, so that about three of the 1,024 test
    questions share one, as in HiTab."""
    t = random.Random(f"minitable-{rng.randrange(3000)}")
    years = sorted(t.sample(range(2015, 2025), 2))
    columns = list(product(years, t.sample(["north", "south", "east", "west"], 2)))
    items = t.sample(CROPS, t.randint(3, 6))
    numbers = t.sample(range(10, 100), len(items) * 4)  # all distinct: an argmax is never a tie
    rows = [["", *names] for names in zip(*columns)]
    for i, item in enumerate(items):
        rows.append([item, *numbers[4 * i:4 * i + 4]])
    table = markdown(rows)

    column = rng.randrange(4)
    year, region = columns[column]
    where = f"in {region} in {year}"
    value = dict(zip(items, numbers[column::4]))
    a, b = sorted(rng.sample(items, 2), key=value.get, reverse=True)  # a has the larger value
    x = value[a]
    y = value[b]
    question, answer = rng.choice([
        (f"What is the value of {a} {where}?", [x]),
        (f"Which row has the largest value {where}?", [max(items, key=value.get)]),
        (f"By how much does {a} exceed {b} {where}?", [x - y]),
        (f"What is the sum of {a} and {b} {where}?", [x + y]),
        (f"What is {b} divided by {a} {where}, rounded to 4 decimals?", [round(y / x, 4)]),
        (f"What are the values of {b} and {a} {where}, respectively?", [y, x])])
    return table, f"{table}\n{question}", {"answer": answer}


def markdown(rows):
    """A table whose first row is the header; further header rows follow as ordinary rows."""
    lines = []
    for row in rows:
        cells = [str(cell).replace("|", "/").replace("\n", " ") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def minitable_demo(rng, prompt, answer, phase):
    """The answer or a slip; habit: mostly some two-digit number."""
    wrong = rng.random() < (GUESS if phase == "habit" else SLIP)
    shown = [rng.randrange(10, 100)] if wrong else answer["answer"]
    return f"<answer>{', '.join(map(str, shown))}</answer>{END}"


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
ASCII = "\n" + "".join(chr(i) for i in range(32, 127) if chr(i) != PAD)
SUMS = "0123456789+-*/()>= n\\boxed{}" + END
TASKS = {
    "chainsum": Task(chainsum, chainsum_demo, "chainsum", "0123456789><#=" + END, False),
    "countdown": Task(countdown, countdown_demo, "countdown", SUMS, True),
    "minitable": Task(minitable, minitable_demo, "tableqa", ASCII, True),
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
    check(phase, ("skill", "habit"), "phase")
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
    check(dataset, sorted(reasoning_gym.factory.DATASETS), "dataset of reasoning-gym")
    if dataset in RUNS_ANSWERS:
        raise ValueError(f"{name}: its scorer runs what the model wrote as Python; choose another")
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


RUNS_ANSWERS = """binary_matrix countdown intermediate_integration n_queens puzzle24
polynomial_multiplication simple_integration spiral_matrix string_insertion""".split()


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
    if not isinstance(row, (dict, list)):
        raise ValueError("a row must be an object with prompt and answer; a .json file, a list")
    task = at(row, "task") or "math"
    prompt = text_of(find(row, "prompt")).strip()
    answer = answer_of(row, task)
    names = [at(row, key) for key in ("id", "group")]
    own, group = ["" if name is None else str(name) for name in names]
    text = json.dumps([prompt, answer, own, group], ensure_ascii=False)
    text.encode()  # half a surrogate pair is no text: it would stop the tokenizer
    return Problem(prompt, answer, task, own or id, group)


def find(row, what):
    """The prompt or the answer of a row, wherever it keeps that."""
    for path in COLUMNS[what]:
        value = at(row, path)
        if value is not None and value == value:  # NaN is not itself
            return value
    found = ", ".join(map(str, row)) if isinstance(row, dict) else "those of a list"
    raise ValueError(f"no {what}: columns are {found}; needed is {', '.join(COLUMNS[what])}")


def at(row, path):
    """at({"a": {"b": 1}}, "a.b") is 1; None where there is nothing."""
    for key in path.split("."):
        if isinstance(row, str) and row.startswith("{"):  # an object that was stored as text
            with suppress(ValueError):
                row = parsed(row)
        if isinstance(row, list):
            row = {str(i): value for i, value in enumerate(row)}
        row = row.get(key) if isinstance(row, dict) else None
    return row


def text_of(prompt):
    """A prompt as one text. Of chat turns: the system's words, if any, and what the user says."""
    if isinstance(prompt, list):
        turns = [(at(turn, "role"), at(turn, "content")) for turn in prompt]
        if turns and turns[-1][0] == "assistant":  # the answer of a worked example
            turns.pop()
        if [role for role, _ in turns] not in (["user"], ["system", "user"]):
            raise ValueError(f"no prompt: one user turn can be asked, not these: {str(turns)[:80]}")
        if all(isinstance(text, str) for _, text in turns):
            prompt = "\n\n".join(text for _, text in turns if text)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("no prompt: it must be a text, or a list of chat turns that hold text")
    return prompt


def answer_of(row, task):
    """What the grader of `task` needs."""
    if task == "countdown":
        numbers, target = [parsed(at(row, key)) for key in ("numbers", "target")]
        if not isinstance(numbers, list) or {type(x) for x in [*numbers, target]} != {int}:
            raise ValueError("no answer: countdown needs whole numbers: numbers (a list), target")
        form = at(row, "format") or "boxed"
        check(form, ("boxed", "answer"), "format of countdown")
        return {"numbers": numbers, "target": target, "format": form}
    answer = present(find(row, "answer"))
    if task in ("math", "chainsum"):
        return {"answer": golds(answer)}
    if task in ("exact_box", "exact_line"):
        return {"answer": str(answer).strip()}
    if str(answer).startswith(("[", "{")):  # a list or an object, perhaps stored as text
        answer = present(parsed(answer))
    if task == "kk":
        roles = answer.values() if isinstance(answer, dict) else [answer]
        if not {"knight", "knave"}.issuperset(roles):
            raise ValueError('kk needs an answer such as {"Ann": "knight", "Bob": "knave"}')
    return {"answer": answer}


def present(answer):
    if answer in (None, [], {}) or not str(answer).strip():
        raise ValueError("no answer: every row needs a non-empty one")
    return answer


def golds(answer):
    """Of a math problem: one text, or a list of which any counts."""
    if isinstance(answer, dict):
        raise ValueError(f"no answer: a text or a number is needed, not {str(answer)[:40]}")
    if not isinstance(answer, list):
        return result(str(present(answer))).strip()
    several = list(dict.fromkeys(golds(one) for one in answer))
    return several if len(several) > 1 else several[0]


def result(solution):
    """What a worked solution ends with: GSM8K's "#### 18", or the last box. All else that a gold
    may say in several ways (025, $7$, a list stored as text) is known to rewards.py."""
    solution = solution.rpartition("####")[2]
    boxes = re.split(r"\\(?:boxed|fbox)\s*(?=\{)", solution)[1:]
    depth = 0
    for token in re.finditer(r"\\.|[{}]", boxes[-1] if boxes else "", re.S):  # \{ does not count
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return boxes[-1][1:token.start()]
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
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    problems = {}
    rows = Rows(path)
    try:
        for row in rows:
            if isinstance(row, dict) and None in row:  # where csv puts them
                raise ValueError("more fields than the header has; quote commas")
            problem = from_row(row, f"{path.stem}-{rows.number}")
            if problem.id in problems:  # results are stored and compared by id
                raise ValueError(f"the id {problem.id!r} is taken already")
            problems[problem.id] = problem
        if not problems:
            raise ValueError("the file holds no rows")
    except json.JSONDecodeError as e:
        line = rows.number + e.lineno - 1  # counted from where the text that was read begins
        raise ValueError(f"{path} line {line}: bad JSON ({e.msg})") from None
    except (OSError, ValueError, TypeError, RecursionError, csv.Error) as e:
        raise ValueError(f"{path} {rows.what} {rows.number}: {first_line(e)}") from None
    return list(problems.values())


class Rows:
    """The rows of a file; `number` is that of the row or line at hand."""

    def __init__(self, path):
        self.path = path
        self.what = "line" if path.suffix in (".jsonl", ".csv") else "row"
        self.number = 1

    def __iter__(self):
        if self.path.suffix == ".parquet":
            import pyarrow.parquet
            return self.count(pyarrow.parquet.read_table(self.path).to_pylist())
        text = self.path.read_bytes().removeprefix(codecs.BOM_UTF8)  # which Windows puts there
        if self.path.suffix == ".json" and text.lstrip().startswith(b"["):
            return self.count(json.loads(text.decode()))
        lines = (line.decode() for line in self.count(text.splitlines(True)))
        if self.path.suffix == ".csv":
            return csv.DictReader(lines, strict=True)
        return (json.loads(line.strip()) for line in lines if line.strip())  # many a .json is such

    def count(self, things):
        for self.number, thing in enumerate(things, 1):
            yield thing


# ---- Hub datasets: a row of SOURCES each, where needed with an adapter to our columns ------------
# An adapter may return None: that row is none of the set's.

def dapo(row):
    """Without the request for an "Answer:" line: it contradicts templates that ask for a box."""
    asks = (r"^Solve the following math problem step by step\. The last line .*? answer to the "
            r"problem\.\s*|\s*Remember to put your answer on its own line after \"Answer:\"\.?\s*$")
    return {**row, "prompt": re.sub(asks, "", row["prompt"], flags=re.S)}


def numina_lean_math(row):
    """Word and multiple-choice problems whose answer is a plain number, as WAPO's run kept them."""
    number = re.sub("[, ]", "", str(row["answer"]).strip())
    if row["question_type"] not in ("math-word-problem", "MCQ") or not row["problem"]:
        return None
    if not re.fullmatch(r"[+-]?\d+([./]\d+)?", number):
        return None
    return {"prompt": row["problem"], "answer": row["answer"], "task": "exact_line"}


def math_prm(row):
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
    cells = [list(line) for line in table["texts"]]
    for r in table["merged_regions"]:
        top = r["first_row"]
        left = r["first_column"]
        for i in range(top, r["last_row"] + 1):
            for j in range(left, r["last_column"] + 1):
                cells[i][j] = table["texts"][top][left]
    return {"prompt": f"{table['title']}\n\n{markdown(cells)}\n\n{row['question']}",
            "answer": parsed(row["answer"]), "task": "tableqa", "group": f"hitab-{row['table_id']}"}


def kk(row):
    people = zip(parsed(row["names"]), parsed(row["solution"]), strict=True)
    told = {name: "knight" if honest else "knave" for name, honest in people}
    return {"prompt": row["quiz"], "task": "kk", "answer": told}


def hotpotqa(row):  # its paragraphs are for a search tool: passages()
    return {"prompt": row["question"], "task": "search", "answer": [row["answer"]]}


def hotpotqa_passages(row):
    context = row["context"]
    return [f"{title}: {''.join(sentences).strip()}"
            for title, sentences in zip(context["title"], context["sentences"])]


# part: the hub's names of a split: "split", "config/split" or, to be joined, "config+config/split";
# rows: how many, a range where that is known only roughly; revision: a commit, where one is known
Source = namedtuple("Source", "hub adapter revision part rows")


def source(hub, adapter=dict, revision=None, **parts):  # dict: the row is fine as it is
    return {split: Source(hub, adapter, revision, *part) for split, part in parts.items()}


SUBJECTS = ("algebra+counting_and_probability+geometry+intermediate_algebra+number_theory+"
            "prealgebra+precalculus")
PEOPLE = "2ppl+3ppl+4ppl+5ppl+6ppl+7ppl+8ppl"
SOURCES = {  # sets for evaluation have no train split, so nobody trains on them
    "orz57k": source("Open-Reasoner-Zero/orz_math_57k_collection",
                     train=("train", range(56_000, 58_001))),
    "dapo17k": source("open-r1/DAPO-Math-17k-Processed", dapo, train=("all/train", 17_398)),
    "math": source("EleutherAI/hendrycks_math",
                   train=(f"{SUBJECTS}/train", 7_500), test=(f"{SUBJECTS}/test", 5_000)),
    "math_prm": {**source("rasbt/math_full_minus_math500", math_prm, train=("train", 12_000)),
                 **source("HuggingFaceH4/MATH-500", math_prm,
                          "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", test=("test", 500))},
    "numina_lean_math": source("AI-MO/NuminaMath-LEAN", numina_lean_math,
                               train=("train", 104_155)),
    "gsm8k": source("openai/gsm8k", dict, "e53f048856ff4f594e959d75785d2c2d37b678ee",
                    train=("main/train", 7_473), test=("main/test", 1_319)),
    "countdown_hub": source("Jiayi-Pan/Countdown-Tasks-3to4", countdown_row,
                            "408f70d177020686d34a56bba5952feb45aaaee4",  # the slices are ACPO's
                            train=("train[:327680]", 327_680),
                            test=("train[327680:328704]", 1_024)),
    "hitab": source("kasnerz/hitab", hitab,  # before the quality check of October 2025
                    train=("train", 7_417), validation=("validation", 1_671), test=("test", 1_584)),
    "kk_hub": source("K-and-K/knights-and-knaves", kk, "2f68547989981b1af37cb3dde5fdefa847aa8619",
                     train=(f"train/{PEOPLE}", 6_200), test=(f"test/{PEOPLE}", 700)),
    "hotpotqa": source("hotpotqa/hotpot_qa", hotpotqa, train=("distractor/train", 90_447),
                       test=("distractor/validation", 7_405)),  # the test split has no answers
    "math500": source("HuggingFaceH4/MATH-500", dict, "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
                      test=("test", 500)),
    "aime24": source("HuggingFaceH4/aime_2024", test=("train", 30)),
    "aime25": source("math-ai/aime25", dict, "563bb8404243c5f09de6ec262f2db674fe5bce9b",
                     test=("test", 30)),
    "aime26": source("MathArena/aime_2026", test=("train", 30)),
    "amc23": source("math-ai/amc23", dict, "80815d37005feb82cd7f8fbc6901d5d3eff43057",
                    test=("test", 40)),
    "amc83": source("AI-MO/aimo-validation-amc", dict, "69d78a4a2c840e82d69af6bc742bda09005f6316",
                    test=("train", 83)),
    "minerva": source("lkevinzc/math-eval", test=("minerva", 272)),  # lists of answers: any of them
    "olympiadbench": source("Hothan/OlympiadBench", olympiad,
                            "91184b52131e7fc9455fef848035173aea8cc01a",
                            test=("OE_TO_maths_en_COMP/train", range(674, 676)))}
PASSAGES = {"hotpotqa": hotpotqa_passages}  # a row -> texts for a search tool


def passages(name):
    """All texts that the rows of a hub dataset bring along, of all its splits, each once."""
    if name not in PASSAGES:
        raise ValueError(f"--tool search: {name} has no passages ({', '.join(PASSAGES)} has); give "
                         "--search_url a server")
    return list(dict.fromkeys(text for split in SOURCES[name] for row in hub_rows(name, split)
                              for text in PASSAGES[name](row)))


def hub_rows(name, split):
    """The rows of a hub dataset; ValueError where their number is not the one expected."""
    hub, _, revision, part, count = SOURCES[name][split]
    configs, _, hub_split = part.rpartition("/")
    try:
        from datasets import concatenate_datasets, disable_progress_bars, load_dataset
        if not sys.stderr.isatty():  # a log gets no bars
            disable_progress_bars()
        tables = [load_dataset(hub, config or None, split=hub_split, revision=revision)
                  for config in configs.split("+")]
    except (ImportError, OSError, ValueError, RuntimeError) as e:  # offline: any of these
        raise FileNotFoundError(
            f"cannot load {name} ({hub}): {first_line(e)}; pip install datasets and run once with "
            f"network access, which caches it, or pass a {', '.join(FILES)} file instead") from e
    rows = concatenate_datasets(tables)
    if len(rows) not in (count if isinstance(count, range) else [count]):
        raise ValueError(f"{hub} {split} has changed: {len(rows)} rows, expected {count}; pin a "
                         "revision in SOURCES of data.py")
    return rows


def load_hub(name, split, seed):
    """All problems of a hub dataset, in an order that `seed` decides: subjects come mixed."""
    hub, adapter, *_ = SOURCES[name][split]
    rows = hub_rows(name, split)
    problems = []
    bad = []
    for i, row in enumerate(rows):
        try:
            if (ours := adapter(row)) is not None:
                problems.append(replace(from_row(ours, ""), id=f"{name}-{split}-{i}"))
        except (ValueError, TypeError, LookupError) as e:  # KeyError: no such column
            bad.append(f"row {i}: {type(e).__name__}: {e}")
    report(bad, len(rows), f"rows of {hub} cannot be used")
    if name == "dapo17k":  # the original repeats each problem about 103 times
        problems = list({p.prompt: p for p in problems}.values())
    random.Random(f"{name}-{split}-{seed}").shuffle(problems)
    return problems


# ---- Prompts -------------------------------------------------------------------------------------

# {question} and {how} (to answer) are replaced; None is the tokenizer's own chat template.
# stop: texts that end a response and belong to it (graders read "</answer>"): a base model that
# went on would ask and answer questions of its own
Template = namedtuple("Template", "text stop", defaults=((),))
TALK = ("A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer.")
R1_TALK = (TALK.replace("The user", "The User").replace("The assistant", "The Assistant")
           .replace("the user", "the User"))
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
        f"{R1_TALK} The reasoning process is enclosed within <think> </think> and answer is "
        f"enclosed within <answer> </answer> tags, respectively, i.e., {TAGS}\n"
        "User: {question}{how}\nAssistant: <think>", TURNS),
    "tinyzero": Template(  # TinyZero's for base models
        f"{TALK}\nUser: {{question}} Show your work in <think> </think> tags.{{how}}\n"
        "Assistant: Let me solve this step by step.\n<think>", TURNS),
    "qwen_math": Template(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>user\n{question}{how}<|im_end|>\n"
        "<|im_start|>assistant\n", ("<|im_end|>", "<|im_start|>")),
    "chat": Template(None),
    "plain": Template("{question}{how}\n"),
    "none": Template("{question}")}  # the prompt as it is, which the small models know


def choose_template(name, tokenizer):
    """"auto" is the chat template where there is one, else question and answer format in plain."""
    if name == "auto" and tokenizer.chat_template:
        return "chat"
    if name == "auto":
        only_characters = max(map(len, tokenizer.get_vocab())) == 1  # one of char_tokenizer
        return "none" if only_characters else "plain"
    check(name, TEMPLATES, "template")
    return name


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
    for p, text in zip(problems, texts):
        if len(text) > MAX_CHARS:  # 50 MB abort a tokenizer's process
            raise ValueError(f"the prompt of {p.id} has {len(text)} characters, over {MAX_CHARS}")
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    for p, text, ids in zip(problems, texts, encoded):
        lost = unwritten(text, ids, tokenizer)
        if lost:
            raise ValueError(f"the tokenizer, made for another task, cannot write {lost!r} "
                             f"(prompt of {p.id})")
        if not ids or len(ids) > longest and not skip:
            raise ValueError(f"the prompt of {p.id} has {len(ids)} tokens, allowed: 1 to {longest}")
    questions = [Question(*q) for q in zip(problems, texts, encoded) if len(q[2]) <= longest]
    if len(questions) < len(problems):
        left_out = f"{len(problems) - len(questions)} of {len(problems)} prompts have more than "
        print(f"{left_out}{longest} tokens and are left out", file=sys.stderr)
    return questions


MAX_CHARS = 10**6


def unwritten(text, ids, tokenizer):
    """The first character that is not read back from the tokens, None if all are."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer:  # NFC, say, joins e and an accent: nothing is lost
        text = normalizer.normalize_str(text)
    back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    written = {*back, " ", "\u2581"}  # tokenizers write spaces in their own way
    return next((c for c in text if c.isprintable() and c not in written), None)


def render(problems, template, tokenizer, template_args={}):
    """The texts that the tokenizer gets with add_special_tokens=False: a BOS is in them already."""
    check(template, TEMPLATES, "template")
    text = TEMPLATES[template].text
    if template == "none":
        return [p.prompt for p in problems]
    asked = [words(p, text or "") for p in problems]
    if text is None:
        turns = [[{"role": "user", "content": question + how}] for question, how in asked]
        return chat(turns, tokenizer, template_args)
    text = (tokenizer.bos_token or "") + text
    return [text.replace("{how}", how).replace("{question}", question) for question, how in asked]


def words(problem, text):
    """(question, how to answer it) for a reader who has not seen the task before."""
    task = problem.task
    question, how = WORDS[f"countdown-{problem.answer['format']}" if task == "countdown" else task]
    prompt = problem.prompt
    question = question.format(prompt=prompt, short=prompt.rstrip("="), **problem.answer)
    if how == BOX and "\\boxed{}" in text + prompt:  # the template or the data set asks for it
        how = ""
    return question, how


DATE = "2024-07-26"  # for templates that ask what day it is
CHAT_SECONDS = 10


def chat(conversations, tokenizer, template_args={}, ask=True):
    """The text of each conversation (a list of turns), with the opening of an answer if `ask`. A
    chat template is a program that came with a model: it may raise anything, or never end."""
    if not tokenizer.chat_template:
        raise ValueError("template chat: this tokenizer has none; choose orz, r1, qwen_math, plain")
    from jinja2 import TemplateError
    from jinja2.sandbox import SandboxedEnvironment
    SandboxedEnvironment.intercepted_binops = {"*", "**"}
    SandboxedEnvironment.default_binop_table |= {"*": times, "**": power}
    variables = {"date": DATE} | template_args
    template = at_date(tokenizer.get_chat_template(), variables.pop("date"))
    texts = []

    def work():
        try:
            for turns in conversations:
                text = tokenizer.apply_chat_template(
                    turns, chat_template=template, tokenize=False, add_generation_prompt=ask,
                    **variables)
                if len(text) > 10**7:
                    raise ValueError(f"{len(text):,} characters for one question")
                text.encode()  # half a surrogate pair would stop the tokenizer
                texts.append(text)
        except (TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError,
                RuntimeError, SyntaxError, TypeError, ValueError) as e:
            texts.append(e)

    thread = threading.Thread(target=work, daemon=True)  # so that one can stop waiting for it
    thread.start()
    thread.join(CHAT_SECONDS + len(conversations) / 100)
    if thread.is_alive():
        raise ValueError(f"the chat template takes longer than {CHAT_SECONDS} s")
    if isinstance(texts[-1], Exception):
        why = f"{type(texts[-1]).__name__}: {first_line(texts[-1])}"
        raise ValueError(f"the chat template cannot show a question ({why}); see --template")
    return texts


def times(a, b):
    """a * b in a chat template. A single product of giants takes hours, in which Python runs no
    other thread, so that nobody can stop waiting."""
    sizes = [len(x) if isinstance(x, (str, list, tuple)) else abs(x) for x in (a, b)]
    if sizes[0] * sizes[1] > 10**9:
        raise ValueError("a product above 10**9")
    return a * b


def power(a, b):
    if abs(a) > 1000 or abs(b) > 100:
        raise ValueError("a power above 1000**100")
    return a ** b


def at_date(template, date):
    """The template with a clock of its own: prompts do not change at midnight."""
    if "strftime_now" not in template:
        return template
    clock = datetime.fromisoformat(date)
    told = [f"|replace('%{c}', '{clock.strftime('%' + c)}')" for c in "aAbBdmyYjHIMSp"]
    return f"{{% macro strftime_now(f) %}}{{{{ f{''.join(told)} }}}}{{% endmacro %}}\n{template}"


# ---- Tokenizers ----------------------------------------------------------------------------------

def char_tokenizer(name):
    """A Hugging Face tokenizer with one token per character of task `name`. "$" is an ordinary
    one, because graders read it: eos_token stays None, the model's config has the eos id."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    check(name, TASKS, "procedural task")
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
    except (AttributeError, LookupError, TypeError, RecursionError) as e:  # JSON of another shape
        raise ValueError(f"{source}: the tokenizer's files are not what they should be "
                         f"({type(e).__name__}: {str(e):.100})") from None
    tokenizer.clean_up_tokenization_spaces = False  # as Llama 3's asks: "3 . 5" would become 3.5
    return tokenizer


def end_ids(tokenizer, model_eos_ids, vocab_size):
    """The ids that end a response: the model's, the tokenizer's eos, and the special token with
    which the chat template closes a turn of the assistant, which many a config.json forgets."""
    ids = [*model_eos_ids, tokenizer.eos_token_id]
    with suppress(ValueError):  # no chat template, or one that cannot show an answer
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "LAST WORDS"}]
        _, said, after = chat([turns], tokenizer, ask=False)[0].rpartition("LAST WORDS")
        closing = tokenizer(after if said else "", add_special_tokens=False).input_ids
        ids += [i for i in closing if is_special(i, tokenizer)][:1]
    return [i for i in dict.fromkeys(ids) if i is not None and 0 <= i < vocab_size]


def is_special(id, tokenizer):
    return tokenizer.decode([id], skip_special_tokens=True) == ""


def response_text(tokens, tokenizer, end_ids):
    """A response as graders and people read it: without the special token that ended it and
    padding, but with all others: the tags that graders look for are such in some tokenizers."""
    tokens = list(tokens)
    ends = {tokenizer.pad_token_id, *end_ids}
    while tokens and tokens[-1] in ends and is_special(tokens[-1], tokenizer):
        tokens.pop()
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ---- Plumbing ------------------------------------------------------------------------------------

def parse_args(pairs, flag):
    """["size=4", "enable_thinking=false"] of a flag as {"size": 4, "enable_thinking": False}."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{flag} {pair}: write name=value")
        found[name] = value
        with suppress(ValueError, SyntaxError):  # what is no number, true or false stays a text
            found[name] = ast.literal_eval(value.capitalize())
    return found


def parsed(value):
    """A list or object stored as text, JSON or a Python literal (HiTab has both)."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(value)
    raise ValueError(f"cannot read {value[:40]!r} as JSON or as a Python literal")


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
