"""data.py: what a wrong problem set would spoil silently. Each test names the failure that it prevents."""
import itertools
import json
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import rewards  # noqa: E402
from data import Problem  # noqa: E402

PROCEDURAL = ["chainsum", "add", "countdown", "minitable", "kk"]


# ---------------------------------------------------------------- independent readers of the procedural prompts

def people_and_claims(prompt):
    """("Ann", "Bob"), [(speaker, operator, (person, is_knight), ...)] parsed from the text of a kk prompt."""
    said = re.findall(r"(\w+) says: ([^.]*)\.", prompt)
    claims = []
    for speaker, text in said:
        atoms = [(name, role == "knight") for name, role in re.findall(r"(\w+) is a (knight|knave)", text)]
        op = ("iff" if "if and only if" in text else "implies" if text.startswith("if ") else
              "and" if " and " in text else "or" if " or " in text else "is")
        claims.append((speaker, op, atoms))
    return [s for s, _ in said], claims


def says_true(op, atoms, roles):
    p, *q = [(roles[name] == "knight") == v for name, v in atoms]
    return {"is": lambda: p, "and": lambda: p and q[0], "or": lambda: p or q[0],
            "iff": lambda: p == q[0], "implies": lambda: q[0] if p else True}[op]()


def kk_solutions(prompt):
    names, claims = people_and_claims(prompt)
    every = [dict(zip(names, r)) for r in itertools.product(["knight", "knave"], repeat=len(names))]
    return [roles for roles in every
            if all(says_true(op, atoms, roles) == (roles[s] == "knight") for s, op, atoms in claims)]


def canonical(name, prompt):
    """What makes two problems the same one, written anew: not the key that data.py splits by."""
    if name == "chainsum":
        return prompt
    if name == "add":
        return tuple(sorted(re.findall(r"\d+", prompt)))
    if name == "countdown":
        return tuple(sorted(prompt.split(" ->")[0].split()))
    if name == "minitable":
        return prompt.rsplit("\n", 1)[0]
    names, claims = people_and_claims(prompt)
    forms = set()
    for order in itertools.permutations(range(len(names))):
        number = dict(zip(names, order))
        forms.add(frozenset((number[s], op, tuple((number[n], v) for n, v in atoms) if op == "implies"
                             else frozenset((number[n], v) for n, v in atoms)) for s, op, atoms in claims))
    return frozenset(forms)


def reachable(numbers):
    """All values that the numbers make, each used once: join any two, then go on. Not data.py's list of shapes."""
    if len(numbers) == 1:
        return set(numbers)
    out = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
        for v in [a + b, a - b, a * b] + ([a / b] if b else []):
            out |= reachable([v, *rest])
    return out


def table_answer(prompt):
    """Answer a minitable question from its text."""
    *lines, question = prompt.split("\n")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    columns = list(zip(rows[0][1:], rows[2][1:]))
    cells = {(r[0], c): int(v) for r in rows[3:] for c, v in zip(columns, r[1:])}
    region, year = re.search(r" in (\w+) in (\d{4})", question).groups()
    value = {r[0]: cells[r[0], (year, region)] for r in rows[3:]}
    names = [w for w in re.findall(r"\w+", question) if w in value]
    if "largest" in question:
        return [max(value, key=value.get)]
    if "exceed" in question:
        return [value[names[0]] - value[names[1]]]
    if "sum" in question:
        return [value[names[0]] + value[names[1]]]
    if "divided" in question:
        return [round(value[names[0]] / value[names[1]], 4)]
    return [value[n] for n in names]


# ---------------------------------------------------------------- procedural tasks

@pytest.mark.parametrize("name", PROCEDURAL)
def test_no_seed_puts_a_training_problem_into_the_test_set(name):
    """Also not in another order, under other names, or through the demonstrations of the warm start."""
    train = {canonical(name, p.prompt) for seed in range(4) for p in data.load(name, "train", 250, seed)}
    train |= {canonical(name, prompt) for phase in ("skill", "habit") for prompt, _ in data.demos(name, 250, phase)}
    test = {canonical(name, p.prompt) for seed in range(4) for p in data.load(name, "test", 120, seed)}
    assert not train & test
    assert len(test) > 15 and len(train) > 60


@pytest.mark.parametrize("name", PROCEDURAL)
def test_problem_i_does_not_depend_on_n(name):
    long = data.load(name, "train", 40, seed=3)
    state = random.getstate()
    assert data.load(name, "train", 15, seed=3) == long[:15]
    assert random.getstate() == state  # nor does loading disturb the caller's random numbers
    assert data.demos(name, 10) == data.demos(name, 30)[:10]
    assert [p.prompt for p in data.load(name, "train", 40, seed=4)] != [p.prompt for p in long]
    both = long + data.load(name, "train", 40) + data.load(name, "test", 40)
    assert len({p.id for p in both}) == len(both)  # ids tell seeds and splits apart


def test_the_default_task_never_changes():
    """Published numbers are about these very problems: a change of the generator must be noticed."""
    assert [p.prompt for p in data.load("chainsum", "train", 3)] == ["076044=", "267512=", "750258="]
    assert data.load("chainsum", "test")[17] == Problem("384550=", {"answer": "5"}, "chainsum", "chainsum-test-17")
    assert data.demos("chainsum", 2) == [("408216=", ">442451#1$"), ("822096=", ">891106#6$")]
    assert len(data.load("chainsum")) == 8192 and len(data.load("chainsum", "test")) == 1024


def test_chainsum_and_add_golds():
    for split in ("train", "test"):
        for p in data.load("chainsum", split, 300):
            assert re.fullmatch(r"\d{6}=", p.prompt) and p.task == "chainsum"
            assert p.answer == {"answer": str(sum(int(d) for d in p.prompt[:-1]) % 10)}
        lengths = set()
        for p in data.load("add", split, 300):
            a, b = re.fullmatch(r"(\d+)\+(\d+)=", p.prompt).groups()
            lengths.add(len(a))
            assert len(a) == len(b) and p.answer == {"answer": str(int(a) + int(b))}
        assert lengths == {2, 3, 4, 5, 6}


def test_every_countdown_puzzle_is_solvable_and_none_is_missing():
    puzzles = set(data.countdown_puzzles()[1])
    brute = {(m, t) for m in itertools.combinations_with_replacement(range(1, 10), 3)
             for t in reachable([Fraction(x) for x in m]) if t in range(1, 31)}
    assert puzzles == brute and len({m for m, _ in brute}) == 165
    for p in data.load("countdown", "test", 200):
        numbers, target = p.answer["numbers"], p.answer["target"]
        assert (tuple(sorted(numbers)), target) in brute and p.answer["format"] == "boxed"
        assert p.prompt == f"{numbers[0]} {numbers[1]} {numbers[2]} -> {target} ="


def test_countdown_expressions_have_the_value_they_claim():
    for text, value in data.expressions((2, 3, 7)):
        assert sorted(re.findall(r"\d", text)) == ["2", "3", "7"]
        assert value == eval(re.sub(r"(\d)", r"Fraction(\1)", text))


def test_kk_puzzles_have_exactly_one_solution():
    sizes = set()
    for p in data.load("kk", "train", 300) + data.load("kk", "test", 300):
        assert kk_solutions(p.prompt) == [p.answer["answer"]], p.prompt
        sizes.add(len(p.answer["answer"]))
        for speaker, op, atoms in people_and_claims(p.prompt)[1]:
            assert op != "is" or atoms[0][0] != speaker  # "I am a knight" tells nothing
    assert sizes == {2, 3, 4}


def test_minitable_golds_and_shapes():
    kinds, rows = set(), set()
    for p in data.load("minitable", "train", 400):
        answer = p.answer["answer"]
        assert answer == table_answer(p.prompt), p.prompt
        kinds.add((len(answer), type(answer[0]).__name__))
        lines = p.prompt.split("\n")[:-1]
        rows.add(len(lines) - 3)
        assert len({line.count("|") for line in lines}) == 1
        years = [c.strip() for c in lines[0].strip("|").split("|")[1:]]
        assert years[0] == years[1] != years[2] == years[3]  # merged headers are repeated, not left empty
    assert kinds == {(1, "int"), (1, "str"), (1, "float"), (2, "int")} and rows == {3, 4, 5, 6}


@pytest.mark.parametrize("name", ["countdown", "minitable", "kk"])
def test_questions_on_one_table_share_a_group(name):
    """Clustered standard errors: repeats of a puzzle are not independent questions."""
    problems = data.load(name, "test", 1024)
    groups = {}
    for p in problems:
        groups.setdefault(p.group, set()).add(canonical(name, p.prompt))
    assert all(len(same) == 1 for same in groups.values()) and "" not in groups
    assert len(groups) < len(problems)


def gold_response(p):
    if p.task == "chainsum":
        return f">012345#{p.answer['answer']}$"
    if p.task == "add":
        return f"\\boxed{{{p.answer['answer']}}}$"
    if p.task == "countdown":
        hits = [t for t, v in data.expressions(p.answer["numbers"]) if v == p.answer["target"]]
        return f"\\boxed{{{hits[0]}}}$"
    if p.task == "tableqa":
        return f"<answer>{', '.join(map(str, p.answer['answer']))}</answer>$"
    return "<answer>" + ", ".join(f"{n} is a {r}" for n, r in p.answer["answer"].items()) + "</answer>$"


@pytest.mark.parametrize("name", PROCEDURAL)
def test_graders_accept_the_gold_and_nothing_else(name):
    """A task whose gold its own grader refuses can never be learnt."""
    wrong = {"chainsum": "#x$", "add": "\\boxed{1}$", "countdown": "\\boxed{1+1}$", "minitable": "<answer>-1</answer>$",
             "kk": "<answer>Nobody is a knight</answer>$"}[name]
    for p in data.load(name, "test", 60):
        assert rewards.score(p.task, gold_response(p), **p.answer) == 1.0, (p, gold_response(p))
        assert rewards.score(p.task, wrong, **p.answer) == 0.0, p


# ---------------------------------------------------------------- demonstrations

def share(hits):
    hits = list(hits)
    return sum(hits) / len(hits)


def test_chainsum_skill_slips_at_the_stated_rate_and_the_slip_stays():
    pairs = data.demos("chainsum", 3000)
    slips, marks = [], []
    for prompt, response in pairs:
        mark, sums, last = re.fullmatch(r"([<>])(\d{6})#(\d)\$", response).groups()
        assert last == sums[-1]
        marks.append(mark == "<")
        before = [0, *map(int, sums[:-1])]  # from the sum as written: an error propagates
        slips += [(b + int(d)) % 10 != int(s) for b, d, s in zip(before, prompt, sums)]
    assert abs(share(slips) - 0.9 * 0.08) < 0.008  # a slip draws the right digit one time in ten
    assert 0.05 < share(marks) < 0.15


def test_chainsum_habit_shares():
    pairs = data.demos("chainsum", 6000, "habit")
    kind = [response[0] for _, response in pairs]
    for mark, expected in (("#", 0.93), (">", 0.05), ("<", 0.02)):
        assert abs(share(k == mark for k in kind) - expected) < 0.012
    direct = [(p, r) for p, r in pairs if r[0] == "#"]
    assert abs(share(int(r[1]) == sum(map(int, p[:-1])) % 10 for p, r in direct) - 0.1) < 0.02  # a guess, not an answer
    assert {r for _, r in direct} == {f"#{d}$" for d in range(10)}


@pytest.mark.parametrize("name, direct", [("add", r"\\boxed\{\d+\}\$"), ("countdown", r"\\boxed\{[^}]*\}\$")])
def test_habit_demonstrations_mostly_guess(name, direct):
    habit = data.demos(name, 2000, "habit")
    assert abs(share(bool(re.fullmatch(direct, r)) for _, r in habit) - 0.93) < 0.03
    assert not any(re.fullmatch(direct, r) for _, r in data.demos("add", 300, "skill"))


def test_add_demonstrations_carry():
    slips = []
    for prompt, response in data.demos("add", 800):
        a, b = prompt[:-1].split("+")
        steps = re.findall(r"(\d)\+(\d)(\+1)?=(\d+) ", response)
        assert [(s[0], s[1]) for s in steps] == list(zip(a[::-1], b[::-1]))
        carry, digits = 0, ""
        for x, y, plus, s in steps:
            assert bool(plus) == bool(carry)
            slips.append(int(x) + int(y) + carry != int(s))
            carry, digits = int(s) // 10, s[-1] + digits
        assert response.endswith(f" \\boxed{{{int(str(carry) + digits)}}}$")
    assert abs(share(slips) - 0.95 * 0.08) < 0.02


def test_countdown_demonstrations_show_true_values_and_slip_at_the_stated_rate():
    right, tries = [], set()
    for prompt, response in data.demos("countdown", 1500):
        *numbers, target = map(int, re.findall(r"\d+", prompt))
        found = re.fullmatch(r"((?:\S+=\S+ no ){0,2})(\S+)=(\d+) \\boxed\{(.*)\}\$", response)
        failed, text, claimed, box = found.groups()
        value = dict(data.expressions(numbers))
        tries.add(failed.count("no"))
        for line in re.findall(r"(\S+)=(\S+) no", failed):
            assert value[line[0]] == Fraction(line[1]) != target
        assert text == box and int(claimed) == target
        right.append(value[text] == target)
    assert abs(share(right) - 0.92) < 0.025 and tries == {0, 1, 2}


@pytest.mark.parametrize("name, skill, habit", [("minitable", (0.90, 0.95), (0.02, 0.15)),
                                                ("kk", (0.72, 0.85), (0.12, 0.32))])
def test_demonstrations_of_the_other_tasks_are_gradable(name, skill, habit):
    """kk: 2 to 4 roles with a slip of 0.08 each are all right 78 % of the time; a guess 15 %."""
    task = data.TASKS[name]
    for phase, (low, high) in (("skill", skill), ("habit", habit)):
        rng, scores = random.Random(phase), []
        for _ in range(700):
            _, prompt, answer = data.draw(name, rng, "train")
            scores.append(rewards.score(task.grader, task.demo(rng, prompt, answer, phase), **answer))
        assert low < share(scores) < high, (phase, share(scores))


# ---------------------------------------------------------------- tokenizer

@pytest.mark.parametrize("name", PROCEDURAL)
def test_tokenizer_round_trip_and_reload(name, tmp_path):
    from transformers import AutoTokenizer
    built = data.char_tokenizer(name)
    built.save_pretrained(tmp_path)
    texts = [p + r for phase in ("skill", "habit") for p, r in data.demos(name, 150, phase)]
    texts += [p.prompt for p in data.load(name, "test", 150)]
    for tok in (built, AutoTokenizer.from_pretrained(tmp_path)):
        assert tok.eos_token is None and tok.pad_token == "_" and len(tok) == len(data.TASKS[name].chars) + 1
        end = tok.convert_tokens_to_ids("$")
        assert end is not None and end != tok.pad_token_id and "$" not in tok.all_special_tokens
        for text in texts:
            ids = tok(text).input_ids
            assert len(ids) == len(text)  # one token per character, nothing added
            assert tok.decode(ids) == text
            assert tok.decode(ids + [tok.pad_token_id] * 2, skip_special_tokens=True) == text
        assert tok(texts[0]).input_ids == built(texts[0]).input_ids
        for stranger in ("é", "_x~é" if name in ("kk", "minitable") else "~"):
            with pytest.raises(Exception, match="UNK"):
                tok(texts[0] + stranger)  # a character outside the alphabet must not vanish


def test_chainsum_alphabet_is_the_documented_one():
    tok = data.char_tokenizer("chainsum")
    assert sorted(tok.get_vocab()) == sorted("0123456789><#=$_")
    assert sorted(tok.get_vocab().values()) == list(range(16))


# ---------------------------------------------------------------- names, splits, counts

@pytest.mark.parametrize("call, words", [
    (lambda: data.load("chansum"), ["chansum", "chainsum"]),
    (lambda: data.load("zzz"), ["zzz", "chainsum", "math500", ".jsonl"]),
    (lambda: data.load("math5000"), ["math500"]),
    (lambda: data.load("chainsum", "tset"), ["tset", "test"]),
    (lambda: data.load("math500", "train"), ["math500", "'train'", "valid: test"]),
    (lambda: data.load("chainsum", n=0), ["chainsum", "0", "at least 1"]),
    (lambda: data.demos("countdwn", 1), ["countdwn", "countdown"]),
    (lambda: data.demos("chainsum", 1, "skil"), ["skil", "skill"]),
    (lambda: data.char_tokenizer("gsm8k"), ["gsm8k", "procedural"]),
    (lambda: data.render(Problem("q", {}, "math"), "oz"), ["oz", "orz"]),
    (lambda: data.load("missing.jsonl"), ["missing.jsonl", "no such file"]),
])
def test_bad_names_get_one_line_that_helps(call, words):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        call()
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_import_is_light_and_alone():
    """The newcomer's run must not need datasets, nor wait for it; and data.py knows no other component."""
    code = "import sys, data; print([m for m in ('datasets', 'torch', 'transformers', 'rewards') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_command_line():
    def run(*args):
        return subprocess.run([sys.executable, "data.py", *args], cwd=ROOT, capture_output=True, text=True)
    assert "408216=>442451#1$" in run("chainsum").stdout
    bad = run("chansum")
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and "chainsum" in bad.stderr
    assert json.loads(run("countdown", "chainsum").stdout)["duplicates"] == []


# ---------------------------------------------------------------- hub datasets, on small fixtures in the real schema

def orz_row(question, answer):
    return {"0": {"from": "human", "value": question},
            "1": {"from": "assistant", "ground_truth": {"value": answer, "pass_at_n": 0.5}}}


def math_row(problem, solution):
    return {"problem": problem, "level": "Level 3", "type": "Algebra", "solution": solution}


DAPO = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
        "Remember to put your answer on its own line after \"Answer:\".")
TABLE = {"title": "milk drunk, by sex", "top_header_rows_num": 2, "left_header_columns_num": 1,
         "texts": [["", "men", "", "women", ""], ["", "2004", "2015", "2004", "2015"],
                   ["milk", "13.3", "11", "1|2", "9"]],
         "merged_regions": [{"first_row": 0, "last_row": 0, "first_column": 1, "last_column": 2},
                            {"first_row": 0, "last_row": 0, "first_column": 3, "last_column": 4},
                            {"first_row": 0, "last_row": 1, "first_column": 0, "last_column": 0}]}
TABLE_TEXT = ("milk drunk, by sex\n\n|  | men | men | women | women |\n|---|---|---|---|---|\n"
              "|  | 2004 | 2015 | 2004 | 2015 |\n| milk | 13.3 | 11 | 1/2 | 9 |\n\nhow much milk?")


def hitab_row(answer, table):
    return {"id": "006e", "table_id": "1000", "table_source": "statcan", "sentence_id": "5757", "sub_sentence_id": "1",
            "sub_sentence": "men drank milk.", "question": "how much milk?", "answer": answer, "aggregation": "['div']",
            "linked_cells": "{}", "answer_formulas": "['=B3']", "reference_cells_map": "{}", "table_content": table}


def kk_hub_row(quiz, names, solution):
    return {"quiz": quiz, "names": names, "knight_knave": {"knight": "a knight"}, "solution": solution,
            "solution_text": "Zoey is a knave", "solution_text_format": "(1) Zoey is a knave", "index": 0}


def olympiad_row(final, context=None):
    return {"id": 1606, "question": "Find $x$.", "solution": ["..."], "final_answer": final, "context": context,
            "image_1": None, "modality": "Text-only", "difficulty": "Competition", "is_multiple_answer": len(final) > 1,
            "unit": None, "answer_type": "Numerical", "error": None, "question_type": "Open-ended",
            "subfield": "Algebra", "subject": "Math", "language": "English"}


def numina_row(problem, answer, kind="math-word-problem"):
    return {"uuid": "u", "problem": problem, "question_type": kind, "answer": answer,
            "formal_statement": "theorem x : True", "author": "human", "rl_data": {"n_proofs": 1}}


HOTPOT = {"id": "5a7a", "question": "Were Scott and Ed both American?", "answer": "yes", "type": "comparison",
          "level": "hard", "supporting_facts": {"title": ["Scott"], "sent_id": [0]},
          "context": {"title": ["Scott", "Ed"],
                      "sentences": [["Scott was born.", " He was American."], ["Ed was too. "]]}}

# name, split -> hub id, rows as the hub has them, [(prompt, answer keywords, task, group)] that must come out
CASES = {
    ("orz57k", "train"): ("Open-Reasoner-Zero/orz_math_57k_collection", [orz_row(" What is $1+1$? ", "$2$")],
                          [("What is $1+1$?", {"answer": "2"}, "math", "")]),
    ("dapo17k", "train"): ("open-r1/DAPO-Math-17k-Processed", [
        {"prompt": DAPO.format("What is 3+4?"), "solution": "7", "data_source": "math_dapo", "ability": "MATH"},
        {"prompt": "What is 3+4?", "solution": "7", "data_source": "math_dapo", "ability": "MATH"},
        {"prompt": "What is 4+4?", "solution": "8", "data_source": "math_dapo", "ability": "MATH"}],
        [("What is 3+4?", {"answer": "7"}, "math", ""), ("What is 4+4?", {"answer": "8"}, "math", "")]),
    ("math", "train"): ("EleutherAI/hendrycks_math", [
        math_row("P1", r"First \boxed{3}, so $\boxed{\frac{1}{2}}$."), math_row("P2", r"It is $\boxed 7$, done."),
        math_row("P3", r"\fbox{\{1,2\}}"), math_row("P4", r"$\boxed{\left\{ x \right.}$ holds.")],
        [("P1", {"answer": r"\frac{1}{2}"}, "math", ""), ("P2", {"answer": "7"}, "math", ""),
         ("P3", {"answer": r"\{1,2\}"}, "math", ""), ("P4", {"answer": r"\left\{ x \right."}, "math", "")]),
    ("gsm8k", "train"): ("openai/gsm8k", [{"question": "How many?", "answer": "9*2=<<9*2=18>>18\n#### 1,018"}],
                         [("How many?", {"answer": "1018"}, "math", "")]),
    ("countdown_hub", "test"): ("Jiayi-Pan/Countdown-Tasks-3to4", [{"target": 98, "nums": [44, 19, 35]}],
                                [("44 19 35 -> 98 =", {"numbers": [44, 19, 35], "target": 98, "format": "boxed"},
                                  "countdown", "")]),
    ("hitab", "test"): ("kasnerz/hitab", [hitab_row("[13.3]", repr(TABLE)), hitab_row('["men", 9]', json.dumps(TABLE))],
                        [(TABLE_TEXT, {"answer": [13.3]}, "tableqa", "hitab-1000"),
                         (TABLE_TEXT, {"answer": ["men", 9]}, "tableqa", "hitab-1000")]),
    ("numina_lean", "train"): ("AI-MO/NuminaMath-LEAN", [
        numina_row("N1", "1,024"), numina_row("N2", "+3/4", "MCQ"), numina_row("N3", "x^2"), numina_row("N4", None),
        numina_row("N5", "5", "proof"), numina_row("", "5"), numina_row("N7", "-0.5")],
        [("N1", {"answer": "1024"}, "math", ""), ("N2", {"answer": "3/4"}, "math", ""),
         ("N7", {"answer": "-0.5"}, "math", "")]),
    ("hotpotqa", "test"): ("hotpotqa/hotpot_qa", [HOTPOT], [(
        "Scott: Scott was born. He was American.\n\nEd: Ed was too.\n\nWere Scott and Ed both American?",
        {"answer": ["yes"]}, "qa", "")]),
    ("kk_hub", "test"): ("K-and-K/knights-and-knaves", [kk_hub_row("Q", ["Zoey", "Max"], [False, True])],
                         [("Q", {"answer": {"Zoey": "knave", "Max": "knight"}}, "kk", "")]),
    ("math500", "test"): ("HuggingFaceH4/MATH-500", [
        {"problem": "P", "solution": r"\boxed{\$5}", "answer": r"\$5", "subject": "Algebra", "level": 2,
         "unique_id": "test/algebra/1.json"}],
        [("P", {"answer": r"\$5"}, "math", "")]),
    ("aime24", "test"): ("HuggingFaceH4/aime_2024", [
        {"id": 60, "problem": "A", "solution": "...", "answer": "025", "url": "u", "year": "2024"}],
        [("A", {"answer": "25"}, "math", "")]),
    ("aime25", "test"): ("math-ai/aime25", [{"problem": "A", "answer": r"336^\circ", "id": "0"}],
                         [("A", {"answer": "336"}, "math", "")]),
    ("aime26", "test"): ("MathArena/aime_2026", [{"problem_idx": 1, "answer": 70, "problem": "A"}],
                         [("A", {"answer": "70"}, "math", "")]),
    ("amc23", "test"): ("math-ai/amc23", [{"id": 0, "question": "C", "answer": "27.0", "url": "u"}],
                        [("C", {"answer": "27"}, "math", "")]),
    ("amc83", "test"): ("AI-MO/aimo-validation-amc", [{"id": 0, "problem": "C", "answer": 142.0, "url": "u"}],
                        [("C", {"answer": "142"}, "math", "")]),
    ("minerva", "test"): ("lkevinzc/math-eval", [
        {"problem": "M1", "answer": ["6630.65\n", "6630\n"]}, {"problem": "M2", "answer": ["10\n", "10"]}],
        [("M1", {"answer": ["6630.65", "6630"]}, "math", ""), ("M2", {"answer": "10"}, "math", "")]),
    ("olympiadbench", "test"): ("Hothan/OlympiadBench", [
        olympiad_row(["$2^{1009}$"]), olympiad_row(["$1$", "$-3$"], "Let $x>0$.")],
        [("Find $x$.", {"answer": "2^{1009}"}, "math", ""),
         ("Let $x>0$.\nFind $x$.", {"answer": "1, -3"}, "math", "")]),
}
CASES["math", "test"] = CASES["math", "train"]
CASES["gsm8k", "test"] = CASES["gsm8k", "train"]
CASES["countdown_hub", "train"] = CASES["countdown_hub", "test"]
CASES["hitab", "train"] = CASES["hitab", "validation"] = CASES["hitab", "test"]
CASES["hotpotqa", "train"] = CASES["hotpotqa", "test"]
CASES["kk_hub", "train"] = CASES["kk_hub", "test"]


@pytest.fixture
def hub(monkeypatch):
    """Puts rows where the hub would be. set_rows(rows, expect=...) also sets the row count that is asserted."""
    import datasets
    calls, rows = [], []

    def load_dataset(path, name=None, *, split, revision=None):  # anything else, such as trust_remote_code, is refused
        calls.append((path, name, split, revision))
        return datasets.Dataset.from_list(list(rows))

    def set_rows(name, split, new, expect=None):
        rows[:] = new
        source = data.SOURCES[name][split]
        if expect is not None:
            monkeypatch.setitem(data.SOURCES[name], split, source._replace(rows=expect))
        calls.clear()
        return calls
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return set_rows


def test_every_source_has_a_fixture():
    assert {(n, s) for n, splits in data.SOURCES.items() for s in splits} == set(CASES)


@pytest.mark.parametrize("name, split", sorted(CASES))
def test_loader_on_the_real_schema(name, split, hub):
    hub_id, rows, expected = CASES[name, split]
    source = data.SOURCES[name][split]
    configs = source.part.rpartition("/")[0].split("+")  # MATH has seven
    calls = hub(name, split, rows, expect=len(rows) * len(configs))
    problems = data.load(name, split)
    assert calls == [(hub_id, c or None, source.part.split("/")[-1], source.revision) for c in configs]
    got = [(p.prompt, p.answer, p.task, p.group) for p in problems]
    assert sorted(map(str, got)) == sorted(map(str, expected * len(configs)))
    assert all(re.fullmatch(rf"{name}-{split}-\d+", p.id) for p in problems)
    assert len({p.id for p in problems}) == len(problems)
    for p in problems:  # every template can show it, and its grader takes its keywords
        for template in set(data.TEMPLATES) - {"chat"}:
            assert data.render(p, template)
        assert rewards.score(p.task, "no answer here", **p.answer) == 0.0
        json.dumps(p.answer)


NEEDED = {"orz57k": "0 1", "dapo17k": "prompt solution", "math": "problem solution", "gsm8k": "question answer",
          "countdown_hub": "target nums", "hitab": "table_id question answer table_content", "amc23": "question answer",
          "numina_lean": "problem answer question_type", "hotpotqa": "question answer context",
          "kk_hub": "quiz names solution", "olympiadbench": "question final_answer context"}


@pytest.mark.parametrize("name, split", sorted(CASES))
def test_loader_demands_its_columns(name, split, hub):
    _, rows, _ = CASES[name, split]
    for column in NEEDED.get(name, "problem answer").split():
        hub(name, split, [{k: v for k, v in row.items() if k != column} for row in rows])
        with pytest.raises(ValueError, match=f"the first is row 0: .*({column}|no prompt|no answer)") as e:
            data.load(name, split)
        assert "pin a revision" in str(e.value) and "\n" not in str(e.value)


def test_row_counts_are_asserted(hub):
    row = CASES["aime24", "test"][1][0]
    hub("aime24", "test", [row] * 30)
    assert len(data.load("aime24", "test")) == 30
    for count in (29, 31):
        hub("aime24", "test", [row] * count)
        with pytest.raises(ValueError, match=f"HuggingFaceH4/aime_2024.*{count} rows, expected 30"):
            data.load("aime24", "test")
    row = CASES["olympiadbench", "test"][1][0]
    for count in (673, 676):  # a range, where two copies differ
        hub("olympiadbench", "test", [row] * count)
        with pytest.raises(ValueError, match=f"{count} rows"):
            data.load("olympiadbench", "test")


def test_expected_row_counts_are_the_published_ones():
    count = {(n, s): source.rows for n, splits in data.SOURCES.items() for s, source in splits.items()}
    test = {"math500": 500, "aime24": 30, "aime25": 30, "aime26": 30, "amc23": 40, "amc83": 83, "minerva": 272,
            "gsm8k": 1319, "hitab": 1584, "math": 5000, "hotpotqa": 7405}
    train = {"math": 7500, "gsm8k": 7473, "hitab": 7417, "dapo17k": 17398, "hotpotqa": 90447}
    assert {name: count[name, "test"] for name in test} == test
    assert {name: count[name, "train"] for name in train} == train
    assert count["kk_hub", "train"] == 6200 and count["kk_hub", "test"] == 700
    slices = [data.SOURCES["countdown_hub"][s].part for s in ("train", "test")]
    assert slices == ["train[:327680]", "train[327680:328704]"] and count["countdown_hub", "test"] == 1024


def test_hub_order_is_seeded_and_prefix_stable(hub):
    rows = [{"problem": f"P{i}", "answer": str(i)} for i in range(30)]
    hub("aime25", "test", rows)
    whole = data.load("aime25", "test", seed=1)
    assert data.load("aime25", "test", 7, seed=1) == whole[:7]
    assert sorted(p.prompt for p in whole) == sorted(r["problem"] for r in rows)
    assert [p.id for p in data.load("aime25", "test", seed=2)] != [p.id for p in whole]
    assert {p.id: p.prompt for p in whole}["aime25-test-4"] == "P4"  # the id is the row, whatever the order


def test_a_few_unusable_rows_are_left_out_aloud_and_many_are_an_error(hub, capsys):
    good, bad = {"question": "Q", "answer": "#### 5"}, {"question": "Q", "answer": "no mark"}
    hub("gsm8k", "train", [good] * 300 + [bad], expect=301)
    assert len(data.load("gsm8k")) == 300
    assert "left out 1 rows" in capsys.readouterr().err
    hub("gsm8k", "train", [good] * 50 + [bad], expect=51)
    with pytest.raises(ValueError, match="1 rows cannot be used, the first is row 50: ValueError: no answer"):
        data.load("gsm8k")


def test_bad_golds_are_refused(hub):
    hub("math", "train", [math_row("P", r"no box, or \boxed{an open one")], expect=7)
    with pytest.raises(ValueError, match="unterminated"):
        data.load("math")
    hub("hitab", "test", [hitab_row("__import__('os').system('touch hacked')", repr(TABLE))], expect=1)
    with pytest.raises(ValueError, match="cannot read"):
        data.load("hitab", "test")
    assert not Path("hacked").exists()
    hub("kk_hub", "test", [kk_hub_row("Q", ["Zoey", "Max"], [True])], expect=1)
    with pytest.raises(ValueError, match="cannot be used"):
        data.load("kk_hub", "test")


def test_offline_says_what_to_do(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nand more lines")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError) as e:
        data.load("gsm8k", "test")
    message = str(e.value)
    assert "\n" not in message and "gsm8k" in message and "network" in message and ".jsonl" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="pip install datasets"):
        data.load("gsm8k", "test")


@pytest.mark.parametrize("value, text", [
    ("$7$", "7"), (142.0, "142"), ("025", "25"), ("-007", "-7"), ("000", "0"), ("0", "0"), ("0.50", "0.50"), (7, "7"),
    (r"\$5", r"\$5"), ("$a$, $b$", "a, b"), (" x\n", "x"), ("10.05", "10.05"), ("00a", "00a"), ("1,234", "1,234")])
def test_gold(value, text):
    assert data.gold(value) == text


# ---------------------------------------------------------------- local files

ROWS = [{"prompt": "What is 1+1?", "answer": "2"},
        {"question": "Who?", "answer": ["Ann", "Bo"], "task": "qa", "id": "w"},
        {"problem": "Half?", "answer": 0.5, "group": "g"}]
READ = [("What is 1+1?", {"answer": "2"}, "math"),
        ("Who?", {"answer": ["Ann", "Bo"]}, "qa"),
        ("Half?", {"answer": "0.5"}, "math")]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_local_json(suffix, tmp_path):
    path = write(tmp_path / f"my{suffix}", ROWS)
    problems = data.load(str(path))
    assert [(p.prompt, p.answer, p.task) for p in problems] == READ
    assert [p.id for p in problems] == ["my-1", "w", "my-3"] and problems[2].group == "g"
    assert data.load(str(path), "test", 2) == problems[:2]


def test_local_csv_and_parquet(tmp_path):
    csv = tmp_path / "my.csv"
    csv.write_text('\ufeffprompt,answer,task\n"1+1,\nso?",2,\nWho?,"[""Ann"", ""Bo""]",qa\n'
                   'Roles?,"{""Ann"": ""knave""}",kk\n', encoding="utf-8")
    assert [(p.prompt, p.answer, p.task) for p in data.load(str(csv))] == [
        ("1+1,\nso?", {"answer": "2"}, "math"), ("Who?", {"answer": ["Ann", "Bo"]}, "qa"),
        ("Roles?", {"answer": {"Ann": "knave"}}, "kk")]
    countdown = tmp_path / "c.csv"
    countdown.write_text('prompt,task,numbers,target,format\n'
                         'make it,countdown,"[1, 2, 3]",6,\nand,countdown,"[1]",1,answer\n')
    assert [p.answer for p in data.load(str(countdown))] == [
        {"numbers": [1, 2, 3], "target": 6, "format": "boxed"}, {"numbers": [1], "target": 1, "format": "answer"}]
    parquet = write(tmp_path / "my.parquet", [{"prompt": "a", "answer": ["1", "2"]}, {"prompt": "b", "answer": ["3"]}])
    assert [p.answer for p in data.load(str(parquet))] == [{"answer": ["1", "2"]}, {"answer": "3"}]


def test_local_file_of_open_reasoner_zero(tmp_path):
    """Their repository's own file: a list of [question, answer] pairs."""
    row = orz_row("What is 2+2?", "4")
    path = write(tmp_path / "orz_math_57k_collected.json", [[row["0"], row["1"]]])
    assert [(p.prompt, p.answer) for p in data.load(str(path))] == [("What is 2+2?", {"answer": "4"})]


def test_local_golds_keep_their_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [
        {"prompt": "p", "answer": "007", "task": "qa"}, {"prompt": "p", "answer": "5", "task": "tableqa"},
        {"prompt": "314159=", "answer": 3, "task": "chainsum"}, {"prompt": "p", "answer": "0", "id": 0}])
    assert data.load(str(path))[3].id == "0"
    assert [p.answer["answer"] for p in data.load(str(path))] == [["007"], ["5"], "3", "0"]


GOOD = '{"prompt": "p", "answer": "1"}\n'


@pytest.mark.parametrize("suffix, text, line, words", [
    (".jsonl", GOOD + '\n{"prompt": "p"}\n', 3, "no answer"),
    (".jsonl", GOOD + '{"prompt": "p", "answer": null}\n', 2, "no answer"),
    (".jsonl", GOOD + '{"prompt": "p", "answer": "  "}\n', 2, "no answer"),
    (".jsonl", GOOD + '{"prompt": "p", "answer": NaN}\n', 2, "no answer"),
    (".jsonl", GOOD + '{"prompt": "p", "answer": "$$"}\n', 2, "no answer"),
    (".jsonl", GOOD + '{"prompt": "p", "answer": []}\n', 2, "no answer"),
    (".jsonl", GOOD + '{"prompt": "p", "answer": {}, "task": "kk"}\n', 2, "no answer"),
    (".jsonl", GOOD + '{"prompt": "p", "answer": "Ann", "task": "kk"}\n', 2, "knight"),
    (".jsonl", GOOD + '{"prompt": "p", "answer": {"Ann": "liar"}, "task": "kk"}\n', 2, "knight"),
    (".jsonl", GOOD + '{"prompt": "p", "task": "countdown", "numbers": [1, "x"], "target": 3}\n', 2, "whole numbers"),
    (".jsonl", GOOD + '{"prompt": "p", "task": "countdown", "answer": "1+2"}\n', 2, "numbers"),
    (".jsonl", GOOD + '{"prompt": "p", "task": "countdown", "numbers": [1], "target": 1, "format": "x"}\n', 2, "boxed"),
    (".jsonl", GOOD + '{"prompt": "p", "answer": "1", "task": "maths"}\n', 2, "did you mean math"),
    (".jsonl", GOOD + '{"answer": "1"}\n', 2, "no prompt"),
    (".jsonl", GOOD + '{"prompt": [{"role": "user"}], "answer": "1"}\n', 2, "no prompt"),
    (".jsonl", GOOD + '"text"\n', 2, "object"),
    (".jsonl", GOOD + '[{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "1"}]\n', 2, "object"),
    (".jsonl", GOOD + "]\n" + GOOD, 2, "bad JSON"),
    (".jsonl", GOOD + '{"prompt": "p", "answer": \n', 2, "bad JSON"),
    (".jsonl", GOOD * 3 + "answer: 3\n", 4, "bad JSON"),
    (".jsonl", GOOD + "[" * 100_000 + "\n", 2, "recursion"),
    (".jsonl", '{"prompt": "p", "answer": "1", "id": "a"}\n' * 2, 2, "id 'a' is taken"),
    (".jsonl", "", 1, "no rows"),
    (".jsonl", "\n \n", 1, "no rows"),
    (".json", "", 1, "bad JSON"),
    (".json", "[]", "row 1", "no rows"),
    (".json", '{"prompt": "p", "answer": "1"}', "row 1", "list of rows"),
    (".json", "5", "row 1", "not iterable"),
    (".json", '[\n {"prompt": "p", "answer": "1"},\n {"prompt": "p"}\n]', "row 2", "no answer"),
    (".json", '[\n {"prompt": "p", "answer": "1"},\n {"prompt": "p", }\n]', 3, "bad JSON"),
    (".json", '[\n {"prompt": "p", "answer": "1"},\n', 3, "bad JSON"),
    (".json", '[\n {"prompt": "p", "answer": "1"}]\n{"prompt": "p", "answer": "1"}', 3, "bad JSON"),
    (".csv", "", 1, "no rows"),
    (".csv", "prompt,answer\n", 1, "no rows"),
    (".csv", "prompt,answer\np,1\nq,\n", 3, "no answer"),
    (".csv", "prompt,answer\np,1\nq\n", 3, "no answer"),
    (".csv", "prompt,answer\np,1,2\n", 2, "more fields"),
    (".csv", 'prompt,answer\np,"1\n', 2, "unexpected end"),
    (".csv", "text,label\np,1\n", 2, "no prompt"),
])
def test_file_errors_name_file_and_line(suffix, text, line, words, tmp_path):
    path = tmp_path / f"mine{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError) as e:
        data.load(str(path))
    message = str(e.value)
    place = line if isinstance(line, str) else f"line {line}"
    assert f"{path} {place}: " in message and words in message and "\n" not in message, message


def test_other_file_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b'{"prompt": "\xff", "answer": "1"}')
    with pytest.raises(ValueError, match="line 2: 'utf-8' codec"):
        data.load(str(path))
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="a.parquet row 1: .*Parquet"):
        data.load(str(path))
    write(path, [{"prompt": "p", "answer": "1"}, {"prompt": "p", "answer": None}])
    with pytest.raises(ValueError, match="a.parquet row 2: no answer"):
        data.load(str(path))
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(FileNotFoundError, match="dir.json: no such file"):
        data.load(str(tmp_path / "dir.json"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(data.FILES),
       st.one_of(st.binary(max_size=200), st.text(alphabet='[]{}",:\n1a ', max_size=60).map(str.encode)))
def test_any_bytes_give_one_clear_line(tmp_path, suffix, content):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content)
    try:
        assert data.load(str(path))
    except ValueError as e:
        assert str(path) in str(e) and re.search(r"(line|row) \d+: ", str(e)) and "\n" not in str(e)


# ---------------------------------------------------------------- overlap

def test_overlap_finds_copies_and_shared_runs_of_words():
    words = [f"w{i}" for i in range(40)]
    def problem(id, text):
        return Problem(text, {"answer": "1"}, "math", id)
    train = [problem("a", "Find X, please!"), problem("b", " ".join(words[:20])), problem("c", "find x please"),
             problem("d", "new")]
    test = [problem("t1", "find (x) PLEASE"), problem("t2", "so " + " ".join(words[5:18])),  # 13 words in a row
            problem("t3", " ".join(words[5:17]) + " else"), problem("t4", "other")]           # only 12
    assert data.overlap(train, test) == {"repeats": 1, "duplicates": [("a", "t1")], "ngrams": ["t2"]}
    assert data.overlap(train, test, n=12)["ngrams"] == ["t2", "t3"]
    assert data.overlap([], test) == {"repeats": 0, "duplicates": [], "ngrams": []}


# ---------------------------------------------------------------- templates

ADD = Problem("What is 1+1?", {"answer": "2"}, "math")
COUNTDOWN = Problem("44 19 35 -> 98 =", {"numbers": [44, 19, 35], "target": 98, "format": "boxed"}, "countdown")
START = ("A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
         "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
         "answer.")


def test_templates_are_the_published_texts():
    """A base model is sensitive to every word of its prompt: a paper's numbers belong to the paper's text."""
    assert data.render(ADD, "orz") == START + (
        " The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. \n\n"
        "User: You must put your answer inside <answer> </answer> tags, i.e.,\n<answer> answer here </answer>. And "
        "your final answer will be extracted automatically by the \\boxed{} tag.\nWhat is 1+1?\nAssistant: <think>")
    assert data.render(ADD, "r1") == (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
        "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: What is 1+1?\nPut your final answer within \\boxed{}.\nAssistant: <think>")
    assert data.render(ADD, "qwen_math") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n")
    tiny = START + (
        "\nUser: Using the numbers [44, 19, 35], create an equation that equals 98. You can use basic arithmetic "
        "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags.")
    end = "\nAssistant: Let me solve this step by step.\n<think>"
    assert data.render(COUNTDOWN, "tinyzero") == tiny + (
        " \nAnd your final answer will be extracted automatically by the \\boxed{} tag, for example "
        "\\boxed{(1 + 2) / 3}." + end)
    tagged = Problem(COUNTDOWN.prompt, {**COUNTDOWN.answer, "format": "answer"}, "countdown")
    assert data.render(tagged, "tinyzero") == tiny + (
        " And return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>." + end)


def test_stop_strings():
    assert set(data.TEMPLATES) == {"orz", "r1", "tinyzero", "qwen_math", "chat", "none"}
    for name in ("orz", "r1", "tinyzero"):
        assert {"User:", "</answer>"} <= set(data.TEMPLATES[name].stop)
    assert "<|im_end|>" in data.TEMPLATES["qwen_math"].stop and data.TEMPLATES["none"].stop == ()


@pytest.mark.parametrize("name", PROCEDURAL)
def test_every_task_in_every_template(name):
    """The prompt as it is for a model from scratch; for others the question in words and what the grader reads."""
    tag = {"chainsum": "#7$", "add": "\\boxed{}", "countdown": "\\boxed{"}.get(name, "<answer>")
    for p in data.load(name, "test", 5):
        assert data.render(p, "none") == p.prompt
        for template in ("orz", "r1", "tinyzero", "qwen_math"):
            text = data.render(p, template)
            assert tag in text and "{question}" not in text and "{how}" not in text
            if name in ("minitable", "kk"):
                assert p.prompt in text
    hub_style = Problem("Knights always tell the truth. Who is who?", {"answer": {"Al": "knight"}}, "kk")
    assert data.render(hub_style, "orz").count("tells the truth") == 0  # the hub's puzzles bring the rules along


def test_braces_in_a_question_survive():
    p = Problem("Let $A=\\{x\\}$, {how} {question} \\frac{1}{2}", {"answer": "1"}, "math")
    for template in ("orz", "r1", "tinyzero", "qwen_math"):
        assert p.prompt in data.render(p, template)


def test_chat_template_and_bos():
    tok = data.char_tokenizer("chainsum")
    with pytest.raises(ValueError, match="chat template") as e:
        data.render(ADD, "chat", tok)
    assert "qwen_math" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="chat template"):
        data.render(ADD, "chat")
    tok.chat_template = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                         "{% if add_generation_prompt %}[assistant]{% endif %}")
    assert data.render(ADD, "chat", tok) == "[user]What is 1+1?\nPut your final answer within \\boxed{}.[assistant]"
    tok.bos_token = "<s>"
    assert data.render(ADD, "orz", tok).startswith("<s>A conversation")
    assert data.render(ADD, "none", tok) == ADD.prompt
