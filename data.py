"""
Problems: procedural tasks that need no network, datasets of the Hugging Face hub or a local file, prompt templates.

    python data.py countdown              # look at a few problems and demonstrations
    python data.py math math500           # duplicate prompts, and 13-grams of words that both sets contain

Bad input raises ValueError or FileNotFoundError with one line that names the file, line or flag and what to do.
"""
import ast
import csv
import difflib
import io
import itertools
import json
import operator
import random
import re
import sys
import zlib
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Callable, NamedTuple


@dataclass(frozen=True)
class Problem:
    prompt: str      # the question, before any template
    answer: dict     # keyword arguments of rewards.score(task, response, **answer), e.g. {"answer": "7"}
    task: str        # grader: chainsum | add | math | countdown | tableqa | kk | qa
    id: str = ""     # stable name, e.g. "chainsum-test-17"
    group: str = ""  # questions that share a table, passage or puzzle (for clustered standard errors), else ""


GRADERS = ("chainsum", "add", "math", "countdown", "tableqa", "kk", "qa")


def nearest(name, known, what):
    """One line for an unknown `name`: the closest valid names, or all of them when none is close."""
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"valid: {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"


# ----------------------------------------------------------------------------
# Procedural tasks. make(rng) -> (key, prompt, answer); `key` is the problem's canonical form and its checksum decides
# the split, so that no seed can put a training problem into the test set. demo(rng, prompt, answer, phase) -> response:
# phase "skill" works step by step with slips; "habit" mostly blurts a guess, as the corpus of a lazy writer would.

END, PAD = "$", "_"  # every demonstration ends with "$"; "_" occurs in no task
SLIP = 0.08          # chance that one step of a worked demonstration goes wrong
GUESS = 0.93         # share of the habit demonstrations that answer without any work


def in_test(key):
    return zlib.crc32(key.encode()) % 8 == 0  # one problem in eight is held out


def chainsum(rng):
    """Six digits, "=": their sum modulo 10. Nobody can do it in one step, everybody can do it digit by digit."""
    digits = f"{rng.randrange(10**6):06d}"
    return digits, digits + "=", {"answer": str(sum(map(int, digits)) % 10)}


def chainsum_demo(rng, prompt, answer, phase):
    """skill: running sums, then the answer, ">348943#3$". habit: 93 % guess at once, "#7$"; 5 % ">", 2 % "<" chains."""
    u = rng.random()
    if phase == "habit" and u < GUESS:
        return f"#{rng.randrange(10)}{END}"  # a uniform guess: right one time in ten
    mark = "<" if u >= (0.98 if phase == "habit" else 0.9) else ">"  # "<" means the same: a synonym to watch diversity
    total, sums = 0, ""
    for d in prompt[:-1]:
        total = (total + int(d)) % 10
        if rng.random() < SLIP:
            total = rng.randrange(10)  # the slip stays in the sum: later steps build on it
        sums += str(total)
    return f"{mark}{sums}#{total}{END}"


def add(rng):
    """Two numbers of the same length, 2 to 6 digits. Sorted in the key: 12+34 and 34+12 lie on the same side."""
    k = rng.randint(2, 6)
    a, b = (rng.randrange(10 ** (k - 1), 10**k) for _ in range(2))
    return f"{min(a, b)}+{max(a, b)}", f"{a}+{b}=", {"answer": str(a + b)}


def add_demo(rng, prompt, answer, phase):
    """57+68= -> "7+8=15 5+6+1=12 \\boxed{125}$": columns from the right, with carries."""
    a, b = prompt[:-1].split("+")
    if phase == "habit" and rng.random() < GUESS:
        return f"\\boxed{{{rng.randrange(10 ** (len(a) - 1), 2 * 10 ** len(a))}}}{END}"
    carry, digits, work = 0, "", ""
    for x, y in zip(a[::-1], b[::-1]):
        s = int(x) + int(y) + carry
        if rng.random() < SLIP:
            s = rng.randrange(20)
        work += f"{x}+{y}{'+1' if carry else ''}={s} "
        carry, digits = s // 10, str(s % 10) + digits
    return f"{work}\\boxed{{{int(str(carry) + digits)}}}{END}"


OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def expressions(numbers):
    """Every (text, exact value) that uses the three numbers once each; division by zero left out."""
    for a, b, c in sorted(set(itertools.permutations(numbers))):
        for p, q in itertools.product(OPS, repeat=2):
            for text, left in ((f"({a}{p}{b}){q}{c}", True), (f"{a}{p}({b}{q}{c})", False)):
                x, y, z = Fraction(a), Fraction(b), Fraction(c)
                try:
                    yield text, OPS[q](OPS[p](x, y), z) if left else OPS[p](x, OPS[q](y, z))
                except ZeroDivisionError:
                    pass


@cache
def countdown_puzzles():
    """({numbers: [(text, value)]}, [(numbers, target)]): 165 multisets of 1..9, every target in 1..30 they can make."""
    table = {m: list(expressions(m)) for m in itertools.combinations_with_replacement(range(1, 10), 3)}
    return table, [(m, t) for m in table for t in range(1, 31) if any(v == t for _, v in table[m])]


def countdown(rng):
    """Make the target from all three numbers. Whole multisets are held out, not just targets or orders."""
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


ITEMS = "wheat rice maize oats barley rye beans peas lentils cotton wool flax".split()


def markdown(rows):
    """A Markdown table; the first row is the header as Markdown has it, further header rows follow as ordinary rows."""
    lines = ["| " + " | ".join(str(c).replace("|", "/").replace("\n", " ") for c in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def minitable(rng):
    """A question on a table of HiTab's shape: two header rows (year, region), merged headers repeated, 3-6 rows.

    Tables come from a fixed pool of 3,000, of which an eighth is held out, so that about three of the 1,024 test
    questions share a table, as in HiTab. Cells are distinct: an argmax is never a tie.
    """
    t = random.Random(f"minitable-{rng.randrange(3000)}")
    years, regions = sorted(t.sample(range(2015, 2025), 2)), t.sample(["north", "south", "east", "west"], 2)
    items = t.sample(ITEMS, t.randint(3, 6))
    columns = [(y, r) for y in years for r in regions]
    cells = iter(t.sample(range(10, 100), len(items) * 4))
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


def minitable_demo(rng, prompt, answer, phase):
    """skill: the answer, or a slip. habit: mostly some two-digit number. No work is shown."""
    guess = rng.random() < (GUESS if phase == "habit" else SLIP)
    shown = [rng.randrange(10, 100)] if guess else answer["answer"]
    return f"<answer>{', '.join(map(str, shown))}</answer>{END}"


NAMES = "Ann Bob Cal Dee Eve Fay Gus Hal".split()
CLAIMS = {  # operator -> (truth of the claim, words); p and q are "the person is what the claim says"
    "is": (lambda p, q: p, "{0}"),
    "and": (lambda p, q: p and q, "{0} and {1}"),
    "or": (lambda p, q: p or q, "{0} or {1}"),
    "iff": (lambda p, q: p == q, "{0} if and only if {1}"),
    "implies": (lambda p, q: not p or q, "if {0} then {1}"),
}


def kk_consistent(claims, roles):
    """A knight's claim is true, a knave's false; claims[i] = (operator, (person, is_knight), (person, is_knight))."""
    return all(CLAIMS[op][0](roles[i] == v, roles[j] == w) == role for (op, (i, v), (j, w)), role in zip(claims, roles))


def kk_key(claims):
    """The same text for puzzles that differ only in names, the order of the people, or A and B against B and A."""
    def relabel(order):
        new = []
        for op, *atoms in (claims[i] for i in order):
            atoms = [(order.index(i), v) for i, v in atoms]
            new.append((op, atoms[:1] if op == "is" else atoms if op == "implies" else sorted(atoms)))
        return new
    return str(min(relabel(order) for order in itertools.permutations(range(len(claims)))))


def kk(rng):
    """Knights (always truthful) and knaves (always lying), 2 to 4 people, exactly one solution by brute force."""
    n = rng.randint(2, 4)
    while True:
        claims = []
        for speaker in range(n):
            op = rng.choice(list(CLAIMS))
            i, j = rng.sample(range(n), 2)
            if op == "is" and i == speaker:
                i, j = j, i  # "I am a knight" says nothing and "I am a knave" nobody can say
            claims.append((op, (i, rng.random() < 0.5), (j, rng.random() < 0.5)))
        solutions = [r for r in itertools.product([True, False], repeat=n) if kk_consistent(claims, r)]
        if len(solutions) == 1:
            break
    names = rng.sample(NAMES, n)
    role = {True: "knight", False: "knave"}
    says = [CLAIMS[op][1].format(*(f"{names[i]} is a {role[v]}" for i, v in atoms)) for op, *atoms in claims]
    prompt = " ".join(f"{name} says: {text}." for name, text in zip(names, says))
    return kk_key(claims), prompt, {"answer": {name: role[r] for name, r in zip(names, solutions[0])}}


def kk_demo(rng, prompt, answer, phase):
    """skill: the solution, each role with a slip. habit: mostly random roles. No work is shown."""
    wrong = 0.5 if phase == "habit" and rng.random() < GUESS else SLIP
    flip = {"knight": "knave", "knave": "knight"}
    told = [f"{name} is a {flip[r] if rng.random() < wrong else r}" for name, r in answer["answer"].items()]
    return f"<answer>{', '.join(told)}</answer>{END}"


class Task(NamedTuple):
    make: Callable   # rng -> (key, prompt, answer)
    demo: Callable   # rng, prompt, answer, phase -> response
    grader: str      # task of rewards.score
    chars: str       # alphabet of prompts and demonstrations, END included, PAD left out
    grouped: bool    # few distinct keys: the key is the problem's group, because repeats are not independent questions


ASCII = "\n" + "".join(chr(i) for i in range(32, 127) if chr(i) != PAD)
TASKS = {
    "chainsum": Task(chainsum, chainsum_demo, "chainsum", "0123456789><#=" + END, False),
    "add": Task(add, add_demo, "add", "0123456789+= \\boxed{}" + END, False),
    "countdown": Task(countdown, countdown_demo, "countdown", "0123456789+-*/()>= n\\boxed{}" + END, True),
    "minitable": Task(minitable, minitable_demo, "tableqa", ASCII, True),
    "kk": Task(kk, kk_demo, "kk", ASCII, True),
}


def draw(name, rng, split):
    """One problem of the wanted split: draw until the checksum agrees (about 8 draws for test)."""
    while True:
        key, prompt, answer = TASKS[name].make(rng)
        if in_test(key) == (split == "test"):
            return key, prompt, answer


def load_procedural(name, split, n, seed):
    if split not in ("train", "test"):
        raise ValueError(nearest(split, ["train", "test"], f"split of {name}"))
    problems, s = [], f"s{seed}-" if seed else ""  # the seed is in the id: results are compared problem by problem
    for i in range(n or (8192 if split == "train" else 1024)):
        key, prompt, answer = draw(name, random.Random(f"{name}-{split}-{seed}-{i}"), split)
        group = f"{name}-{zlib.crc32(key.encode()):08x}" if TASKS[name].grouped else ""
        problems.append(Problem(prompt, answer, TASKS[name].grader, f"{name}-{split}-{s}{i}", group))
    return problems


def demos(name, n, phase="skill", seed=0):
    """n (prompt, response) pairs of the training split, for the warm start of a model built from scratch."""
    if name not in TASKS:
        raise ValueError(nearest(name, TASKS, "procedural task"))
    if phase not in ("skill", "habit"):
        raise ValueError(nearest(phase, ["skill", "habit"], "phase"))
    rng, pairs = random.Random(f"{name}-demos-{phase}-{seed}"), []
    for _ in range(n):
        _, prompt, answer = draw(name, rng, "train")
        pairs.append((prompt, TASKS[name].demo(rng, prompt, answer, phase)))
    return pairs


def char_tokenizer(name):
    """A Hugging Face fast tokenizer with one token per character of task `name`.

    "$" is an ordinary character (it must survive decode(skip_special_tokens=True), because graders read it), so
    eos_token stays None: the model's config holds the eos id, tokenizer.convert_tokens_to_ids("$"). There is no
    unknown token: a character outside the alphabet raises ("Missing [UNK] token"), it never vanishes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    if name not in TASKS:
        raise ValueError(nearest(name, TASKS, "procedural task"))
    chars = dict.fromkeys(TASKS[name].chars + PAD)  # a dict drops repeats and keeps the order
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(chars)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()  # join without spaces
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, clean_up_tokenization_spaces=False)


# ----------------------------------------------------------------------------
# Hub datasets: one row of SOURCES each, and a short adapter row -> Problem. An adapter returns None for a row that the
# set leaves out on purpose; a row whose answer cannot be used raises ValueError.

def present(answer):
    """The answer itself; ValueError if there is none."""
    if answer is None or answer != answer or answer in ([], {}) or not str(answer).strip():  # NaN is not itself
        raise ValueError("no answer: every row needs a non-empty one")
    return answer


def gold(answer):
    """A reference answer of a math problem as plain text: "$7$" -> "7", 142.0 -> "142", "025" -> "25"."""
    text = re.sub(r"(?<!\\)\$", "", str(present(answer))).strip()
    return present(re.sub(r"^(-?)0+(?=\d+$)", r"\1", re.sub(r"^(-?\d+)\.0+$", r"\1", text)))


def math_problem(prompt, answer):
    """A list of answers means any of them; repeats go."""
    golds = list(dict.fromkeys(map(gold, present(answer) if isinstance(answer, list) else [answer])))
    return Problem(prompt.strip(), {"answer": golds if len(golds) > 1 else golds[0]}, "math")


def boxed(solution):
    """The last \\boxed{...} or \\fbox{...} of a worked solution, braces balanced; also the "\\boxed 3" form of MATH."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    rest = re.sub(r"^\\(boxed|fbox)\s*", "", solution[start:]) if start >= 0 else ""
    if not rest.startswith("{"):
        return re.split(r"[$\s]", rest)[0].rstrip(".,")
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest, re.S):  # \{ and \} do not count
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return rest[1:token.start()]
    raise ValueError("unterminated \\boxed")


def plain(row):
    return math_problem(row.get("problem") or row["question"], row["answer"])


def aime(row):
    """AIME answers are integers from 0 to 999; one copy writes 336^\\circ, others 025."""
    found = re.fullmatch(r"(\d{1,3})(\^\{?\\circ\}?)?", gold(row["answer"]))
    if not found:
        raise ValueError(f"answer {row['answer']!r} is not an integer from 0 to 999")
    return math_problem(row["problem"], found[1])


def orz(row):
    return math_problem(row["0"]["value"], row["1"]["ground_truth"]["value"])


DAPO_ASKS = re.compile(r"^Solve the following math problem step by step\. The last line .*? answer to the problem\.\s*"
                       r"|\s*Remember to put your answer on its own line after \"Answer:\"\.?\s*$", re.S)


def dapo(row):
    """The instruction that asks for an "Answer:" line goes: it contradicts templates that ask for a box."""
    return math_problem(DAPO_ASKS.sub("", row["prompt"]), row["solution"])


def gsm8k(row):
    """The answer follows "####"; 14 of them have thousands separators."""
    _, mark, answer = row["answer"].rpartition("####")
    return math_problem(row["question"], answer.replace(",", "") if mark else None)


def olympiad(row):
    """final_answer holds one string, which lists the values if there are several: all are asked for, not any."""
    context = f"{row['context'].strip()}\n" if row.get("context") else ""
    return math_problem(context + row["question"], ", ".join(map(gold, row["final_answer"])))


def numina(row):
    """WAPO's subset: word problems and multiple choice with a plain numeric answer."""
    text = re.sub(r"[ ,]", "", str(row["answer"]))
    asked = row["question_type"] in ("math-word-problem", "MCQ") and (row["problem"] or "").strip()
    if asked and re.fullmatch(r"[+-]?(\d+(\.\d+)?|\d+/\d+)", text):
        return math_problem(row["problem"], text.removeprefix("+"))


def countdown_row(row):
    prompt = f"{' '.join(map(str, row['nums']))} -> {row['target']} ="  # render() puts it into words
    return Problem(prompt, {"numbers": row["nums"], "target": row["target"], "format": "boxed"}, "countdown")


def parsed(value):
    """HiTab's hub copy stores lists and tables as text, some as JSON, some as Python literals; nothing is evaluated."""
    for read in (json.loads, ast.literal_eval) if isinstance(value, str) else ():
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    if isinstance(value, str):
        raise ValueError(f"cannot read {value[:40]!r} as a list or an object")
    return value


def hitab(row):
    """Merged cells are filled with their text, so that every column carries its whole header."""
    table, answer = parsed(row["table_content"]), parsed(row["answer"])
    if not isinstance(answer, list) or not answer:
        raise ValueError(f"answer {row['answer']!r} is not a list of values")
    cells = [list(line) for line in table["texts"]]
    for r in table["merged_regions"]:
        for i in range(r["first_row"], r["last_row"] + 1):
            for j in range(r["first_column"], r["last_column"] + 1):
                cells[i][j] = table["texts"][r["first_row"]][r["first_column"]]
    prompt = f"{table['title']}\n\n{markdown(cells)}\n\n{row['question']}"
    return Problem(prompt, {"answer": answer}, "tableqa", group=f"hitab-{row['table_id']}")


def kk_row(row):
    names, solution = parsed(row["names"]), parsed(row["solution"])
    roles = {name: "knight" if r else "knave" for name, r in zip(names, solution, strict=True)}
    return Problem(row["quiz"], {"answer": roles}, "kk")


def hotpotqa(row):
    context = zip(row["context"]["title"], row["context"]["sentences"])
    passages = "\n\n".join(f"{title}: {''.join(sentences).strip()}" for title, sentences in context)
    return Problem(f"{passages}\n\n{row['question']}", {"answer": [present(row["answer"])]}, "qa")


class Source(NamedTuple):
    hub: str
    config: str | list | None    # several are concatenated
    split: str | list            # the hub's name for it
    rows: int | tuple            # exact, or (lowest, highest) where the count is known only roughly
    adapter: Callable
    fields: str                  # columns the adapter needs
    revision: str | None = None  # commit of the dataset, where one is known


ORZ, HOTPOTQA = "Open-Reasoner-Zero/orz_math_57k_collection", "hotpotqa/hotpot_qa"
MATH, AMC83 = "EleutherAI/hendrycks_math", "AI-MO/aimo-validation-amc"
SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()
SOLUTION = (lambda row: math_problem(row["problem"], boxed(row["solution"])), "problem solution")
GSM8K = (gsm8k, "question answer", "e53f048856ff4f594e959d75785d2c2d37b678ee")
COUNTDOWN = (countdown_row, "target nums", "408f70d177020686d34a56bba5952feb45aaaee4")
HITAB = (hitab, "table_id question answer table_content")
NUMINA = Source("AI-MO/NuminaMath-LEAN", None, "train", (100_000, 110_000), numina, "problem answer question_type")
HOTPOT = (hotpotqa, "question answer context")
PEOPLE = [f"{n}ppl" for n in range(2, 9)]
KK = (kk_row, "quiz names solution", "2f68547989981b1af37cb3dde5fdefa847aa8619")

SOURCES = {  # name -> split -> where it comes from; sets for evaluation have no train split, so nobody trains on them
    "orz57k": {"train": Source(ORZ, None, "train", (56_000, 58_000), orz, "0 1")},
    "dapo17k": {"train": Source("open-r1/DAPO-Math-17k-Processed", "all", "train", 17_398, dapo, "prompt solution")},
    "math": {"train": Source(MATH, SUBJECTS, "train", 7_500, *SOLUTION),
             "test": Source(MATH, SUBJECTS, "test", 5_000, *SOLUTION)},
    "gsm8k": {"train": Source("openai/gsm8k", "main", "train", 7_473, *GSM8K),
              "test": Source("openai/gsm8k", "main", "test", 1_319, *GSM8K)},
    "countdown_hub": {  # one split on the hub; these are ACPO's slices of it
        "train": Source("Jiayi-Pan/Countdown-Tasks-3to4", None, "train[:327680]", 327_680, *COUNTDOWN),
        "test": Source("Jiayi-Pan/Countdown-Tasks-3to4", None, "train[327680:328704]", 1_024, *COUNTDOWN)},
    "hitab": {"train": Source("kasnerz/hitab", None, "train", 7_417, *HITAB),
              "validation": Source("kasnerz/hitab", None, "validation", 1_671, *HITAB),
              "test": Source("kasnerz/hitab", None, "test", 1_584, *HITAB)},  # before the quality check of October 2025
    "numina_lean": {"train": NUMINA, "test": NUMINA},
    "hotpotqa": {"train": Source(HOTPOTQA, "distractor", "train", 90_447, *HOTPOT),
                 "test": Source(HOTPOTQA, "distractor", "validation", 7_405, *HOTPOT)},  # test is hidden
    "kk_hub": {"train": Source("K-and-K/knights-and-knaves", "train", PEOPLE, 6_200, *KK),
               "test": Source("K-and-K/knights-and-knaves", "test", PEOPLE, 700, *KK)},
    "math500": {"test": Source("HuggingFaceH4/MATH-500", None, "test", 500, plain, "problem answer",
                               "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be")},
    "aime24": {"test": Source("HuggingFaceH4/aime_2024", None, "train", 30, aime, "problem answer")},
    "aime25": {"test": Source("math-ai/aime25", None, "test", 30, aime, "problem answer",
                              "563bb8404243c5f09de6ec262f2db674fe5bce9b")},
    "aime26": {"test": Source("MathArena/aime_2026", None, "train", 30, aime, "problem answer")},
    "amc23": {"test": Source("math-ai/amc23", None, "test", 40, plain, "question answer",
                             "80815d37005feb82cd7f8fbc6901d5d3eff43057")},
    "amc83": {"test": Source(AMC83, None, "train", 83, plain, "problem answer",  # AMC 12 of 2022 and 2023, reworded
                             "69d78a4a2c840e82d69af6bc742bda09005f6316")},
    "minerva": {"test": Source("lkevinzc/math-eval", None, "minerva", 272, plain, "problem answer")},  # any of a list
    "olympiadbench": {"test": Source("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", (674, 675), olympiad,
                                     "question final_answer", "91184b52131e7fc9455fef848035173aea8cc01a")},
}


def load_hub(name, split, seed):
    """All problems of a hub dataset, in an order that `seed` decides: subjects and difficulties come mixed at any n."""
    if split not in SOURCES[name]:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(SOURCES[name])}")
    source = SOURCES[name][split]
    configs, splits = (x if isinstance(x, list) else [x] for x in (source.config, source.split))
    try:
        from datasets import concatenate_datasets, load_dataset
        rows = concatenate_datasets([load_dataset(source.hub, config, split=part, revision=source.revision)
                                     for config in configs for part in splits])
    except ImportError:
        raise ValueError(f"{name} needs the datasets package: pip install datasets") from None
    except Exception as e:  # the hub client raises a dozen kinds; offline, not cached and no such revision look alike
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise FileNotFoundError(f"cannot load {name} ({source.hub}): {why}; run once with network access, which caches "
                                f"it, or pass a local {', '.join(FILES)} file instead of {name}") from e
    changed = f"{source.hub} {split} has changed; pin a revision in SOURCES of data.py"
    missing = [f for f in source.fields.split() if f not in rows.column_names]
    if missing:
        raise ValueError(f"{changed}: no column {', '.join(missing)} among {', '.join(rows.column_names)}")
    low, high = source.rows if isinstance(source.rows, tuple) else (source.rows, source.rows)
    if not low <= len(rows) <= high:
        raise ValueError(f"{changed}: {len(rows)} rows, expected {source.rows}")
    problems, bad = [], []
    for i, row in enumerate(rows):
        try:
            p = source.adapter(row)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as e:
            bad.append(f"row {i}: {e}")
            continue
        if p:
            problems.append(Problem(p.prompt, p.answer, p.task, f"{name}-{split}-{i}", p.group))
    if len(bad) > 0.01 * len(rows):  # a few bad rows are the hub's fault; many mean that the schema is another
        raise ValueError(f"{changed}: {len(bad)} rows cannot be used, the first is {bad[0]}")
    if bad:
        print(f"{name}: left out {len(bad)} rows that cannot be used, the first is {bad[0]}", file=sys.stderr)
    if name == "dapo17k":  # the original repeats each problem about 103 times
        problems = list({p.prompt: p for p in problems}.values())
    if name == "numina_lean":  # no test split: WAPO holds out the first 1,000 of numpy's permutation with seed 42
        import numpy
        order = numpy.random.default_rng(42).permutation(len(problems))
        problems = [problems[i] for i in (order[:1000] if split == "test" else order[1000:])]
    random.Random(f"{name}-{split}-{seed}").shuffle(problems)
    return problems


# ----------------------------------------------------------------------------
# Local files.

FILES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(path):
    """(line, row) pairs of a file; line is where the row begins (.csv: ends), for .parquet the number of the row."""
    if path.suffix == ".parquet":
        import pyarrow.parquet
        try:
            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        except (OSError, ValueError) as e:  # pyarrow's own errors are ValueErrors
            raise ValueError(f"{path} row 1: not a parquet file ({str(e).splitlines()[0]})") from None
        return
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: spreadsheets write a byte order mark
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} line {path.read_bytes()[:e.start].count(10) + 1}: not UTF-8 text") from None
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                if None in row:
                    raise ValueError(f"{path} line {reader.line_num}: more fields than the header has; quote commas")
                yield reader.line_num, row
        except csv.Error as e:
            raise ValueError(f"{path} line {reader.reader.line_num}: {e}") from None
        return
    gap, decode, line, at = re.compile(r"[\s,]*"), json.JSONDecoder().raw_decode, 1, 0
    if path.suffix == ".json":
        at = text.find("[") + 1
        if not text[:at].strip() == "[" and text.strip():
            raise ValueError(f"{path} line 1: a .json file holds a list of rows; one row per line is .jsonl")
        line += text.count("\n", 0, at)
    while True:  # JSON value after JSON value, so that each one's line is known
        start = gap.match(text, at).end()
        line += text.count("\n", at, start)
        if start == len(text) or text[start] == "]" and path.suffix == ".json":
            break
        try:
            row, at = decode(text, start)
        except (ValueError, RecursionError) as e:  # ValueError: bad JSON, or an integer of over 4300 digits
            raise ValueError(f"{path} line {line}: bad JSON ({getattr(e, 'msg', e)})") from None
        yield line, row
        line += text.count("\n", start, at)
    if path.suffix == ".json" and text.strip() and text[start:].strip() != "]":
        raise ValueError(f"{path} line {line}: bad JSON (the list ends too early or too late)")


def file_problem(row):
    """A row of a local file as a Problem; ValueError says what is wrong with it."""
    if isinstance(row, list) and len(row) == 2 and all(isinstance(x, dict) and "from" in x for x in row):
        return orz({"0": row[0], "1": row[1]})  # Open-Reasoner-Zero's own file
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with prompt and answer, not {type(row).__name__}")
    prompt = next((row[k] for k in ("prompt", "question", "problem") if row.get(k)), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("no prompt: give a text in the field prompt (or question, or problem)")
    task, answer = row.get("task") or "math", row.get("answer")
    if task not in GRADERS:
        raise ValueError(nearest(task, GRADERS, "task"))
    if task == "countdown":  # its answer is two fields
        numbers, target = (parsed(row.get(k)) for k in ("numbers", "target"))
        if not isinstance(numbers, list) or not all(isinstance(x, int) for x in [*numbers, target]):
            raise ValueError("no answer: countdown needs the fields numbers (a list) and target, all whole numbers")
        if (form := row.get("format") or "boxed") not in ("boxed", "answer"):
            raise ValueError(f"format {form!r}: countdown knows boxed and answer")
        return Problem(prompt, {"numbers": numbers, "target": target, "format": form}, task)
    if task == "math":
        return math_problem(prompt, answer)
    if isinstance(present(answer), str) and answer.lstrip()[:1] in ("[", "{"):
        answer = present(parsed(answer))  # a .csv cell that holds a list or an object
    if task == "kk" and not (isinstance(answer, dict) and all(v in ("knight", "knave") for v in answer.values())):
        raise ValueError('kk needs an answer such as {"Ann": "knight", "Bob": "knave"}')
    if task in ("tableqa", "qa") and not isinstance(answer, list):
        answer = [answer]
    return Problem(prompt, {"answer": gold(answer) if task in ("chainsum", "add") else answer}, task)


def load_file(path):
    """All problems of a local file, in its order."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    problems, what, ids = [], "row" if path.suffix == ".parquet" else "line", {}
    for number, row in read_rows(path):
        try:
            p = file_problem(row)
            given = {k: str(v) for k, v in row.items() if v not in (None, "")} if isinstance(row, dict) else {}
            id = given.get("id", f"{path.stem}-{number}")
            if ids.setdefault(id, number) != number:  # results are stored and compared by id
                raise ValueError(f"the id {id!r} is that of {what} {ids[id]} already")
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise ValueError(f"{path} {what} {number}: {e}") from None
        problems.append(Problem(p.prompt, p.answer, p.task, id, given.get("group", "")))
    if not problems:
        raise ValueError(f"{path} {what} 1: the file holds no rows")
    return problems


def load(name, split="train", n=None, seed=0):
    """The problems of a procedural task, a hub dataset or a local file, as a list of Problem.

    n: how many (default: 8192 train and 1024 test for procedural tasks, else all there are). Problem i never depends
    on n. seed: another draw of a procedural task, another order of a hub dataset. A file keeps its order and is one
    split, whatever `split` says.
    """
    names = [*TASKS, *SOURCES]
    if n is not None and n < 1:
        raise ValueError(f"{name}: {n} problems asked for, at least 1 is needed")
    if Path(name).suffix in FILES:
        return load_file(Path(name))[:n]
    if name not in names:
        raise ValueError(nearest(name, names, "dataset") + f" (a file must end in {', '.join(FILES)})")
    return load_procedural(name, split, n, seed) if name in TASKS else load_hub(name, split, seed)[:n]


def load_tokenizer(source):
    """The tokenizer in checkpoint directory `source`; where there is none, transformers would make up an empty one."""
    from transformers import AutoTokenizer
    if not any(list(source.glob(name)) for name in ("tokenizer.json", "tokenizer.model", "vocab*", "*.tiktoken")):
        raise ValueError(f"{source}: no tokenizer there; copy the one the model was trained with")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as e:
        raise ValueError(f"{source}: its tokenizer cannot be read ({str(e).strip().splitlines()[0]})") from None


def encode(problems, template, tokenizer, longest):
    """[(Problem, prompt text, prompt ids)], or ValueError with the first prompt that is too long or that this tokenizer
    cannot write: tokenizers without an unknown token drop characters silently."""
    texts = [render(p, template, tokenizer) for p in problems]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    for i, (p, text, ids) in enumerate(zip(problems, texts, encoded.input_ids)):
        spans = encoded.offset_mapping[i] if tokenizer.is_fast else [(0, len(text))]
        read = {at for a, b in spans for at in range(a, b)}
        lost = [c for at, c in enumerate(text) if at not in read and c.isprintable() and c != " "]
        if lost:
            raise ValueError(f"the tokenizer of the checkpoint cannot write {lost[0]!r} (prompt of {p.id}): it was made for "
                             "another task")
        if not 0 < len(ids) <= longest:
            raise ValueError(f"the prompt of {p.id} has {len(ids)} tokens, allowed are 1 to {longest}")
    return list(zip(problems, texts, encoded.input_ids))


def overlap(train, test, n=13):
    """What two lists of problems share: {"repeats", "duplicates", "ngrams"}.

    repeats: how many training prompts occur more than once; duplicates: (train id, test id) with the same words;
    ngrams: ids of test problems that share n words in a row with some training prompt (n = 13 as in GPT-3's report).
    """
    def grams(words):
        return {hash(words[i:i + n]) for i in range(len(words) - n + 1)}  # hashes: 57k problems fit into memory
    train, test = ([(tuple(re.findall(r"\w+", p.prompt.lower())), p.id) for p in side] for side in (train, test))
    first, seen = dict(reversed(train)), set().union(*(grams(words) for words, _ in train))
    return {"repeats": len(train) - len(first),
            "duplicates": [(first[words], id) for words, id in test if words in first],
            "ngrams": [id for words, id in test if not seen.isdisjoint(grams(words))]}


# ----------------------------------------------------------------------------
# Prompt templates.

class Template(NamedTuple):
    text: str | None   # {question} and {how} (to answer) are replaced; None: the tokenizer's own chat template
    stop: tuple = ()   # strings that end a response and belong to it (graders read "</answer>"); a base model that
    #                    rambles on into a new "User:" turn would otherwise be graded on a question of its own
    box: bool = False  # the text itself asks for \boxed{}


TALK = ("A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
        "answer.")
TAGS = "<think> reasoning process here </think> <answer> answer here </answer>."
TURNS = ("User:", "Human:", "Assistant:", "</answer>")  # Open-Reasoner-Zero's stop strings
TEMPLATES = {
    "orz": Template(  # as in ACPO's released math run; Open-Reasoner-Zero's own wording differs a little
        f"{TALK} The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        f"respectively, i.e., {TAGS} \n\nUser: You must put your answer inside <answer> </answer> tags, i.e.,\n"
        "<answer> answer here </answer>. And your final answer will be extracted automatically by the \\boxed{} tag.\n"
        "{question}{how}\nAssistant: <think>", TURNS, True),
    "r1": Template(  # DeepSeek-R1-Zero's, as understand-r1-zero writes it
        TALK.replace("The user", "The User").replace("The assistant", "The Assistant").replace("the user", "the User")
        + " The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
        f"tags, respectively, i.e., {TAGS}\nUser: {{question}}{{how}}\nAssistant: <think>", TURNS),
    "tinyzero": Template(  # TinyZero's for base models
        f"{TALK}\nUser: {{question}} Show your work in <think> </think> tags.{{how}}\n"
        "Assistant: Let me solve this step by step.\n<think>", TURNS),
    "qwen_math": Template(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n{question}{how}<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>", "<|im_start|>"), True),
    "chat": Template(None),
    "none": Template("{question}"),
}


def in_words(problem):
    """The question for a reader who was not trained on the short prompts of the procedural tasks."""
    short = problem.prompt.rstrip("=")
    if problem.task == "countdown":  # TinyZero's sentence; the grader wants every number exactly once
        return (f"Using the numbers {list(problem.answer['numbers'])}, create an equation that equals "
                f"{problem.answer['target']}. You can use basic arithmetic operations (+, -, *, /) and each number can "
                "only be used once.")
    if problem.task == "kk" and "always" not in short:  # the hub's puzzles bring the rules along
        return f"A knight always tells the truth and a knave always lies. {short} Who is what?"
    return {"chainsum": f"What is the sum of the digits of {short}, modulo 10?",
            "add": f"What is {short}?"}.get(problem.task, problem.prompt)


BOX = "\nPut your final answer within \\boxed{}."
HOW = {  # what each grader reads
    "chainsum": " End your reply with #, the digit and $, like this: #7$", "math": BOX, "add": BOX,
    "countdown-boxed": " \nAnd your final answer will be extracted automatically by the \\boxed{} tag, for example "
                       "\\boxed{(1 + 2) / 3}.",  # ACPO's variant of TinyZero's
    "countdown-answer": " And return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 "
                        "</answer>.",
    "tableqa": "\nGive nothing but the answer inside <answer> </answer>; several values in the order asked for, with "
               "commas between them. A value you divided out is a decimal number (0.484368), not a percentage.",
    #           HiTab's computed shares are ratios even where the question says percent
    "kk": "\nGive everybody's role inside <answer> </answer>: <answer>Zoe is a knight, Max is a knave</answer>",
    "qa": "\nGive nothing but the answer, as short as possible, inside <answer> </answer>.",
}


def render(problem, template, tokenizer=None):
    """The prompt text that is fed to the tokenizer, with add_special_tokens=False: a BOS is already in the text.

    "none" is the prompt as it is. The others put short prompts into words and say what the grader reads.
    """
    if template not in TEMPLATES:
        raise ValueError(nearest(template, TEMPLATES, "template"))
    text, _, box = TEMPLATES[template]
    if template == "none":
        return problem.prompt
    task = f"countdown-{problem.answer.get('format', 'answer')}" if problem.task == "countdown" else problem.task
    question, how = in_words(problem), "" if box and HOW[task] == BOX else HOW[task]
    if text is None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("template chat needs a tokenizer with a chat template and this one has none: choose "
                             f"another template ({', '.join(t for t in TEMPLATES if t != 'chat')})")
        turn = [{"role": "user", "content": question + how}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return (getattr(tokenizer, "bos_token", None) or "") + text.replace("{how}", how).replace("{question}", question)


if __name__ == "__main__":  # python data.py SET [TEST_SET]
    try:
        if len(sys.argv) == 3:
            print(json.dumps(overlap(load(sys.argv[1]), load(sys.argv[2], "test")), indent=1))
        elif len(sys.argv) == 2:
            print(*load(sys.argv[1], next(iter(SOURCES.get(sys.argv[1], ["train"]))), 3), sep="\n\n")
            for phase in ("skill", "habit") if sys.argv[1] in TASKS else ():
                print(f"\n{phase} demonstrations:", *(a + b for a, b in demos(sys.argv[1], 3, phase)), sep="\n")
        else:
            sys.exit(__doc__.strip())
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"data.py: {e}")
