"""data.py: what a wrong problem set would spoil silently. Each test names what it prevents."""
import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import rewards  # noqa: E402
from data import Problem  # noqa: E402

TASKS = ["chainsum", "countdown", "hops"]


# ---- Procedural tasks: the prompts read by other code than that which wrote them -----------------

def canonical(name, prompt):
    """What makes two problems the same one; not the key that data.py splits by."""
    if name == "countdown":
        return tuple(sorted(prompt.split(" ->")[0].split()))
    return prompt


def reachable(numbers):
    """All values that the numbers make, each used once: join any two, then go on."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
        values = [a + b, a - b, a * b]
        if b:
            values.append(a / b)
        for value in values:
            found |= reachable([value, *rest])
    return found


@pytest.mark.parametrize("name", TASKS)
def test_no_seed_puts_a_training_problem_into_the_test_set(name):
    """Also not in another order, or through the demonstrations of the warm start."""
    train = set()
    test = set()
    for seed in range(4):
        train |= {canonical(name, p.prompt) for p in data.load(name, "train", 250, seed)}
        test |= {canonical(name, p.prompt) for p in data.load(name, "test", 120, seed)}
    for phase in ("skill", "habit"):
        train |= {canonical(name, prompt) for prompt, _ in data.demos(name, 250, phase)}
    assert not train & test
    assert len(test) > 15 and len(train) > 60


@pytest.mark.parametrize("name", TASKS)
def test_problem_i_is_a_function_of_its_number(name):
    """Not of how many are loaded, nor of the caller's random numbers; ids tell seeds apart."""
    state = random.getstate()
    many = data.load(name, "train", 40, seed=3)
    assert data.load(name, "train", 15, seed=3) == many[:15]
    assert random.getstate() == state
    assert data.demos(name, 10) == data.demos(name, 30)[:10]
    other = data.load(name, "train", 40) + data.load(name, "test", 40)
    assert len({p.id for p in many + other}) == 120
    assert [p.prompt for p in other[:40]] != [p.prompt for p in many]


@pytest.mark.parametrize("name, digest", [
    ("chainsum", "41e9b87b2cb47077"),
    ("countdown", "b7d8b8b29c9e2d9d"),
])
def test_the_tasks_never_change(name, digest):
    """Published numbers are about these very problems and demonstrations."""
    problems = data.load(name, "train", 300, 1) + data.load(name, "test", 300, 1)
    found = [[vars(p) for p in problems]]
    found += [data.demos(name, 300, phase, 1) for phase in ("skill", "habit")]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == digest


def test_sizes_and_names_of_the_default():
    first = [p.prompt for p in data.load("chainsum", "train", 3)]
    assert first == ["076044=", "267512=", "750258="]
    seventeenth = Problem("384550=", {"answer": "5"}, "chainsum", "chainsum-test-17")
    assert data.load("chainsum", "test")[17] == seventeenth
    assert len(data.load("chainsum")) == 8192 and len(data.load("chainsum", "test")) == 1024


def test_golds_are_right():
    for split in ("train", "test"):
        for p in data.load("chainsum", split, 300):
            assert re.fullmatch(r"\d{6}=", p.prompt)
            digits = [int(digit) for digit in p.prompt[:-1]]
            assert p.answer == {"answer": str(sum(digits) % 10)}
    for p in data.load("countdown", "test", 100):
        numbers, target = p.answer["numbers"], p.answer["target"]
        assert target in reachable([Fraction(x) for x in numbers])
        assert p.prompt == f"{numbers[0]} {numbers[1]} {numbers[2]} -> {target} ="


def test_countdown_knows_every_puzzle():
    every = set()
    for numbers in itertools.combinations_with_replacement(range(1, 10), 3):
        values = reachable([Fraction(x) for x in numbers])
        every |= {(numbers, target) for target in range(1, 31) if target in values}
    assert set(data.countdown_puzzles()) == every


def test_questions_on_one_puzzle_share_a_group():
    """Clustered standard errors: repeats of a puzzle are not independent questions."""
    problems = data.load("countdown", "test", 500)
    keys = {}
    for p in problems:
        keys.setdefault(p.group, set()).add(canonical("countdown", p.prompt))
    assert all(len(same) == 1 for same in keys.values()) and "" not in keys
    assert len({key for same in keys.values() for key in same}) == len(keys) < len(problems)


@pytest.mark.parametrize("name", TASKS)
def test_graders_accept_the_gold_and_demonstrations(name):
    """A task whose gold its grader refuses can never be learnt. Slips leave chainsum 0.6 of its
    worked demonstrations right, countdown 0.92; a guess is rarely right."""
    with_slips = {
        "chainsum": (0.5, 0.8),
        "hops": (0.7, 0.9),
        "countdown": (0.88, 0.96),
    }
    task = data.TASKS[name]
    for phase, (low, high) in (("skill", with_slips[name]), ("habit", (0.02, 0.3))):
        rng = random.Random(phase)
        scores = []
        for _ in range(500):
            _, prompt, answer = data.draw(name, rng, "train")
            response = "".join(task.demo(rng, prompt, answer, phase))
            assert response.endswith("$")
            assert set(prompt + response) <= set(task.chars)
            scores.append(rewards.score(task.grader, response, **answer))
        assert low < sum(scores) / 500 < high, (phase, sum(scores))


def test_chainsum_slips_at_the_stated_rate_and_the_slip_stays():
    slips, synonyms = [], []
    for prompt, response in data.demos("chainsum", 3000):
        mark, sums, last = re.fullmatch(r"([<>])(\d{6})#(\d)\$", response).groups()
        assert last == sums[-1]
        synonyms.append(mark == "<")
        last_sum = 0
        for digit, written in zip(prompt, sums):
            slips.append(int(written) != (last_sum + int(digit)) % 10)
            last_sum = int(written)  # an error propagates
    assert abs(sum(slips) / len(slips) - 0.9 * 0.08) < 0.008  # it hits the right digit 1 in 10
    assert abs(sum(synonyms) / 3000 - 0.1) < 0.02


def test_habits_mostly_guess():
    responses = [response for _, response in data.demos("chainsum", 5000, "habit")]
    for mark, share in (("#", 0.93), (">", 0.05), ("<", 0.02)):
        found = [response for response in responses if response[0] == mark]
        assert abs(len(found) / 5000 - share) < 0.012
    guesses = {response for response in responses if response[0] == "#"}
    assert guesses == {f"#{digit}$" for digit in range(10)}
    responses = [response for _, response in data.demos("countdown", 1000, "habit")]
    boxes = [text for text in responses if re.fullmatch(r"\\boxed\{[^}]*\}\$", text)]
    assert abs(len(boxes) / 1000 - 0.93) < 0.03


def test_hops_demonstrations_ask_link_by_link_and_the_tool_says_the_truth():
    calls, slips = [], []
    for prompt, parts in data.demos("hops", 1000):
        name, *chain = prompt[:-1].split(".")
        assert chain[-1] == "R" and len(parts) == 2 * len(chain) + 1
        calls.append(len(chain))
        for relation, asked, said in zip(chain, parts[::2], parts[1::2]):
            assert said == f"({data.fact(asked[1:-1])})" != "(?)"
            slips.append(asked != f"[{name}.{relation}]")
            name = said[1:-1]
    assert set(calls) == {2, 3}
    assert 0.03 < sum(slips) / len(slips) < 0.09
    habit = data.demos("hops", 2000, "habit")
    guesses = [parts[0] for _, parts in habit if len(parts) == 1]
    assert abs(len(guesses) / 2000 - 0.93) < 0.02
    assert set(guesses) == {f"#{digit}$" for digit in range(10)}


def test_the_answers_of_hops_are_ten_and_equally_likely():
    """No answer is a good guess."""
    answers = [p.answer["answer"] for p in data.load("hops", n=3000)]
    assert len(set(answers)) == 10
    assert max(map(answers.count, "0123456789")) < 0.13 * 3000


def test_countdown_demonstrations_show_true_values():
    tries = set()
    for prompt, response in data.demos("countdown", 400):
        *numbers, target = map(int, re.findall(r"\d+", prompt))
        values = dict(data.expressions(tuple(numbers)))
        found = re.fullmatch(r"((?:\S+=\S+ no )*)(\S+)=(\d+) \\boxed\{(.*)\}\$", response)
        failed, text, claimed, box = found.groups()
        tries.add(failed.count("no"))
        for expression, value in re.findall(r"(\S+)=(\S+) no", failed):
            assert values[expression] == Fraction(value) != target
        assert text in values
        assert text == box and int(claimed) == target
    assert tries == {0, 1, 2}
    for text, value in data.expressions((2, 3, 7)):
        assert value == eval(re.sub(r"(\d)", r"Fraction(\1)", text))


# ---- Names ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, words", [
    (lambda: data.load("chansum"), ["chansum", "chainsum"]),
    (lambda: data.load("zzz"), ["zzz", "chainsum", "math500", ".jsonl", "rg:NAME"]),
    (lambda: data.load("chainsum", "tset"), ["tset", "test"]),
    (lambda: data.load("math500", "train"), ["math500", "'train'", "valid: test"]),
    (lambda: data.load("chainsum", args={"size": 4}), ["chainsum", "size", "rg:NAME"]),
    (lambda: data.demos("countdwn", 1), ["countdwn", "countdown"]),
    (lambda: data.render([], "oz", None), ["oz", "orz"]),
    (lambda: data.load("missing.jsonl"), ["missing.jsonl", "No such file"]),
    (lambda: data.parse_args(["size4"], "--data_args"), ["--data_args size4", "name=value"]),
])
def test_bad_names_get_one_line_that_helps(call, words):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        call()
    line = str(e.value)
    assert all(word in line for word in words), line
    assert "\n" not in line


def test_values_of_arguments():
    for text, value in [
        ("4", 4),
        ("0.5", 0.5),
        ("1e-3", 0.001),
        ("false", False),
        ("True", True),
        ("none", None),
        ("low", "low"),
        ("2026-08-01", "2026-08-01"),
        ("x=y", "x=y"),
        ("['Ab','CD']", ["Ab", "CD"]),
    ]:
        assert data.parse_args([f"a={text}", "b=1"], "--x") == {"a": value, "b": 1}


def test_what_is_held_out(monkeypatch):
    """The test split; of a set without one a tenth, at most 512 problems."""
    assert data.held_out("countdown", 5) == data.load("countdown", "test", 5)
    monkeypatch.setattr(data, "load", lambda name, split="train", *_, **__: range(30_000))
    assert list(data.held_out("orz57k", 3)) == [1, 11, 21]
    assert len(data.held_out("orz57k")) == 512


def test_a_message_cannot_move_the_cursor():
    assert data.first_line("red \x1b[31m and\x07 \x9b2J\nmore") == "red [31m and 2J"


def test_import_is_light_and_alone():
    """The newcomer's run must not wait for datasets; and data.py knows no other component."""
    imported = python("-c", "import sys, data; print(*sys.modules)").split()
    assert "data" in imported
    assert not {"datasets", "torch", "transformers", "rewards", "reasoning_gym"} & set(imported)


def test_the_command_shows_problems_and_demonstrations():
    shown = python("data.py", "chainsum")
    assert "'076044='" in shown
    assert "'>442451#1$'" in shown


def python(*words):
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


# ---- Rows, as projects publish them --------------------------------------------------------------

ASK = [{"role": "user", "content": "2+2?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
DONE = {"role": "assistant", "content": "It is 4."}


@pytest.mark.parametrize("row, prompt, answer", [
    ({"prompt": " 2+2? ", "answer": 4}, "2+2?", "4"),
    ({"prompt": "2+2?", "answer": ["4", 4.5]}, "2+2?", ["4", "4.5"]),
    # verl
    ({"data_source": "x", "prompt": ASK, "reward_model": {"ground_truth": "4"}}, "2+2?", "4"),
    ({"prompt": ASK, "reward_model": '{"ground_truth": "4"}'}, "2+2?", "4"),  # as text in a .csv
    ({"prompt": [SYSTEM, *ASK], "solution": r"\boxed{4}"}, "Be brief.\n\n2+2?", "4"),  # TRL
    ({"messages": [*ASK, DONE], "solution": "4"}, "2+2?", "4"),  # ms-swift
    ({"prompt": "2+2?", "verification_info": '{"ground_truth": "4"}'}, "2+2?", "4"),  # prime-rl
    ({"prompt": ASK, "label": "4"}, "2+2?", "4"),  # slime
    ({"input": "2+2?", "label": "4"}, "2+2?", "4"),  # OpenRLHF
    ({"problem": "2+2?", "solution": r"So $\boxed{\frac{8}{2}}$."}, "2+2?", r"\frac{8}{2}"),  # MATH
    ({"problem": "P", "solution": r"\boxed{1}, $\fbox {\left\{ x \right.}$"}, "P",
     r"\left\{ x \right."),
    ({"problem": "P", "solution": r"\boxed{1", "answer": "1"}, "P", "1"),
    ({"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}, "2+2?", "4"),  # GSM8K
    ({"problem": "2+2?", "expected_answer": "4"}, "2+2?", "4"),  # OpenMathReasoning
    ({"prompt": "2+2?", "answer": None, "ground_truth": "4"}, "2+2?", "4"),
    ({"prompt": "2+2?", "answer": float("nan"), "label": "4"}, "2+2?", "4"),
    ([{"from": "human", "value": "2+2?"}, {"from": "assistant", "ground_truth": {"value": "4"}}],
     "2+2?", "4"),  # Open-Reasoner-Zero
    ({"0": {"value": "2+2?"}, "1": {"ground_truth": {"value": "4"}}}, "2+2?", "4"),  # its hub copy
])
def test_published_rows_are_read(row, prompt, answer):
    assert data.from_row(row, "id") == Problem(prompt, {"answer": answer}, "math", "id")


@pytest.mark.parametrize("row, words", [
    ({"text": "2+2?", "answer": "4"}, ["no prompt", "text, answer", "question"]),
    ({"prompt": "2+2?", "result": "4"}, ["no answer", "prompt, result", "reward_model.ground"]),
    ({"prompt": [*ASK, DONE, *ASK], "answer": "4"}, ["user", "assistant"]),
    ({"prompt": [], "answer": "4"}, ["no prompt"]),
    ({"prompt": 5, "answer": "4"}, ["no prompt"]),
    ({"prompt": [{"role": "user", "content": ["an image"]}], "answer": "4"}, ["hold text"]),
    ({"prompt": "p", "answer": {"a": 3}}, ["no answer", "{'a': 3}"]),
    ({"prompt": "p", "answer": ""}, ["no answer"]),
    ({"prompt": "p", "answer": []}, ["no answer"]),
    ({"prompt": "p", "answer": {}, "task": "kk"}, ["no answer"]),
    ({"prompt": "p", "answer": "Ann", "task": "kk"}, ["kk cannot use Ann"]),
    ({"prompt": "p", "answer": "[]", "task": "qa"}, ["no answer"]),
    ({"prompt": "p", "answer": "1+2", "task": "countdown"}, ["numbers", "target"]),
    ({"prompt": "p", "task": "countdown", "numbers": [1, True], "target": 3}, ["whole numbers"]),
    ({"prompt": "p", "task": "countdown", "numbers": [1], "target": 1, "format": "x"},
     ["boxed"]),
    ({"prompt": "half \ud83d", "answer": "4"}, ["surrogates"]),
    ({"prompt": "x" * 50_000_000, "answer": "4"}, ["50,000,000 characters"]),
    ("text", ["object"]),
    (5, ["object"]),
])
def test_rows_that_cannot_be_used_say_why(row, words):
    with pytest.raises(ValueError) as e:
        data.from_row(row, "id")
    assert all(word in str(e.value) for word in words), str(e.value)


def test_rows_of_the_other_graders():
    row = {"prompt": "p", "task": "countdown", "numbers": [1, 2], "target": 3}
    puzzle = {"numbers": [1, 2], "target": 3, "format": "boxed"}
    assert data.from_row(row, "").answer == puzzle
    tags = {"format": "answer"}
    assert data.from_row(row | tags, "").answer == puzzle | tags
    for task, answer, read in [
        ("qa", "007", "007"),
        ("qa", '["Ann", "Bo"]', ["Ann", "Bo"]),
        ("qa", "[sic] so", "[sic] so"),
        ("qa", "{1, 2}", "{1, 2}"),
        ("tableqa", 5, 5),
        ("tableqa", [1, "x"], [1, "x"]),
        ("kk", "{'Ann': 'knave'}", {"Ann": "knave"}),
        ("chainsum", 3, "3"),
    ]:
        row = {"prompt": "p", "answer": answer, "task": task, "id": 0, "group": "g"}
        assert data.from_row(row, "x") == Problem("p", {"answer": read}, task, "0", "g")


@pytest.mark.parametrize("answer, task", [
    (" ", "math"),
    ([""], "math"),
    (" ", "qa"),
    (" ", "exact_box"),
    (" ", "tableqa"),
    ({"Ann": "liar"}, "kk"),
    ({"Ann": True}, "kk"),
])
def test_graders_refuse_what_no_response_can_say(answer, task):
    problem = data.from_row({"prompt": "p", "answer": answer, "task": task}, "id")
    with pytest.raises(ValueError, match="the first is id: no response can equal its reference"):
        data.check_golds([problem], rewards.check_gold)


def test_bad_golds_are_told_or_refused(capsys):
    problems = [Problem("p", {"answer": str(i)}, "math", f"p{i}") for i in range(200)]

    def check(task, answer):
        return "too odd" if answer["answer"] in bad else None
    bad = ["7", "8"]
    data.check_golds(problems, check)
    assert "2 of 200 answers cannot be graded" in capsys.readouterr().err
    bad = ["7", "8", "9"]
    with pytest.raises(ValueError, match="3 of 200 .* the first is p7: too odd"):
        data.check_golds(problems, check)


# ---- Local files ---------------------------------------------------------------------------------

GOOD = '{"prompt": "p", "answer": "1"}\n'


def test_every_kind_of_file(tmp_path):
    rows = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "half?", "answer": "0.5"}]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "b.json").write_text("\ufeff \n" + json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "c.json").write_text(lines)  # JSON lines under another name
    table = "\ufeffprompt,answer\r\n1+1?,2\r\nhalf?,0.5\r\n"
    (tmp_path / "d.csv").write_text(table, encoding="utf-8")
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    for name, numbers in [
        ("a.jsonl", "13"),
        ("b.json", "12"),
        ("c.json", "13"),
        ("d.csv", "23"),
        ("e.parquet", "12"),
    ]:
        found = data.load(str(tmp_path / name))
        assert [p.prompt for p in found] == ["1+1?", "half?"]
        assert [p.answer for p in found] == [{"answer": "2"}, {"answer": "0.5"}]
        assert [p.id for p in found] == [f"{name[0]}-{number}" for number in numbers]
        assert data.load(str(tmp_path / name), "test", 1) == found[:1]


@pytest.mark.parametrize("suffix, text, place, words", [
    (".jsonl", GOOD + '\n{"prompt": "p"}\n', "line 3", "no answer"),
    (".jsonl", GOOD + "]\n" + GOOD, "line 2", "bad JSON"),
    (".jsonl", '{"prompt": "p", "answer": "1", "id": "a"}\n' * 2, "line 2", "the id 'a' is taken"),
    (".jsonl", GOOD + '{"prompt": "p", "answer": \n', "line 2", "bad JSON"),
    (".jsonl", GOOD + "[" * 100_000 + "\n", "line 2", "recursion"),
    (".jsonl", GOOD + '{"prompt": "\\ud83d", "answer": "1"}', "line 2", "surrogates"),
    (".json", "5", "row 1", "object"),
    (".json", '[\n {"prompt": "p", "answer": "1"},\n {"prompt": "p"}\n]', "row 2", "no answer"),
    (".json", '[\n {"prompt": "p", "answer": "1"},\n {"prompt": "p", }\n]', "line 3", "bad JSON"),
    (".json", GOOD + "{\n", "line 2", "bad JSON"),
    (".csv", "prompt,answer\np,1\nq,\n", "line 3", "no answer"),
    (".csv", "prompt,answer\np,1\nq\n", "line 3", "no answer"),
    (".csv", 'prompt,answer\np,"1\n', "line 1", "unexpected end"),  # behind it
    (".csv", "prompt,answer\np,1,2\n", "line 2", "more fields"),
    (".csv", "text,label\np,1\n", "line 2", "no prompt: columns are text, label"),
])
def test_file_errors_name_file_and_line(suffix, text, place, words, tmp_path):
    path = tmp_path / f"mine{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError) as e:
        data.load(str(path))
    assert f"{path} {place}: " in str(e.value) and words in str(e.value), str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("suffix, text", [
    (".jsonl", ""),
    (".jsonl", "\n \n"),
    (".json", ""),
    (".json", "[]"),
    (".csv", ""),
    (".csv", "prompt,answer\n"),
])
def test_a_file_without_rows(suffix, text, tmp_path):
    path = tmp_path / f"mine{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"mine{suffix} holds no rows"):
        data.load(str(path))


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b'{"prompt": "\xff", "answer": "1"}')
    with pytest.raises(ValueError, match="a.jsonl line 2: 'utf-8' codec"):
        data.load(str(path))
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="a.parquet row 1: .*Parquet"):
        data.load(str(path))


# ---- Hub datasets, on rows in the real schema ----------------------------------------------------

DAPO = ("Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        "\n\n{}\n\nRemember to put your answer on its own line after \"Answer:\".")
TABLE = {
    "title": "milk",
    "top_header_rows_num": 2,
    "texts": [
        ["", "men", "", "women", ""],
        ["", "2004", "2015", "2004", "2015"],
        ["milk", "13.3", "11", "1|2", "9"],
    ],
    "merged_regions": [
        {"first_row": 0, "last_row": 0, "first_column": 1, "last_column": 2},
        {"first_row": 0, "last_row": 0, "first_column": 3, "last_column": 4},
        {"first_row": 0, "last_row": 1, "first_column": 0, "last_column": 0},
    ],
}
TABLE_TEXT = ("milk\n\n|  | men | men | women | women |\n|---|---|---|---|---|\n"
              "|  | 2004 | 2015 | 2004 | 2015 |\n| milk | 13.3 | 11 | 1/2 | 9 |\n\nhow much?")
HITAB = {"table_id": "1000", "question": "how much?", "answer": "[13.3]",
         "table_content": repr(TABLE)}
HOTPOT = {"context": {"title": ["A", "B"], "sentences": [["One. ", "Two."], ["Three."]]},
          "answer": "Ada", "question": "Who?"}  # `question` last: a test takes it away
KK = {"quiz": "Q", "names": ["Zoey", "Max"], "solution": [False, True]}


def math(answer):
    return {"answer": answer}, "math", ""


CASES = {  # name, split -> a row as the hub has it, (prompt, answer, task, group)
    ("dapo17k", "train"): (
        {"prompt": DAPO.format("3+4?"), "solution": "7"},
        ("3+4?", *math("7"))),
    ("math", "test"): (
        {"problem": "P", "solution": r"$\boxed{\frac12}$"},
        ("P", *math(r"\frac12"))),
    ("math_prm", "train"): (
        {"problem": "P ", "solution": "S", "answer": r"\frac12"},
        ("P", {"answer": r"\frac12"}, "exact_box", "")),
    ("numina_lean_math", "train"): (
        {"problem": "N\n", "question_type": "MCQ", "answer": " 1,018 "},
        ("N", {"answer": "1,018"}, "exact_line", "")),
    ("gsm8k", "test"): (
        {"question": "Q", "answer": "so\n#### 1,018"},
        ("Q", *math("1,018"))),
    ("countdown_hub", "test"): (
        {"target": 98, "nums": [44, 19, 35]},
        ("44 19 35 -> 98 =", {"numbers": [44, 19, 35], "target": 98, "format": "boxed"},
         "countdown", "")),
    ("hitab", "test"): (
        HITAB,
        (TABLE_TEXT, {"answer": [13.3]}, "tableqa", "hitab-1000")),
    ("kk_hub", "test"): (
        KK,
        ("Q", {"answer": {"Zoey": "knave", "Max": "knight"}}, "kk", "")),
    ("hotpotqa", "test"): (
        HOTPOT,
        ("Who?", {"answer": ["Ada"]}, "search", "")),
    ("minerva", "test"): (
        {"problem": "M", "answer": ["6630.65\n", "6630\n"]},
        ("M", *math(["6630.65", "6630"]))),
    ("olympiadbench", "test"): (
        {"question": "Find $x$.", "context": "Let $x>0$.", "final_answer": ["$1$", "$-3$"]},
        ("Let $x>0$.\nFind $x$.", *math("$1$, $-3$"))),
    ("aime26", "test"): (
        {"answer": 70, "problem": "A"},
        ("A", *math("70"))),
    ("amc83", "test"): (
        {"problem": "C", "answer": 142.0},
        ("C", *math("142.0"))),
}


@pytest.fixture
def hub(monkeypatch):
    """hub(rows): what any dataset holds; the calls are noted in hub.calls."""
    import datasets

    def load_dataset(path, name=None, *, split, revision=None):
        set_rows.calls.append((path, name, split, revision))
        return datasets.Dataset.from_list(set_rows.rows)

    def set_rows(name, split, rows, count=None):
        source = data.SOURCES[name][split]
        counts = [count] if count else source.rows
        monkeypatch.setitem(data.SOURCES[name], split, source._replace(rows=counts))
        set_rows.rows = rows
        set_rows.calls = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return set_rows


@pytest.mark.parametrize("name, split", list(CASES))
def test_hub_rows_in_the_real_schema(name, split, hub):
    row, expected = CASES[name, split]
    source = data.SOURCES[name][split]
    configs = source.part.rpartition("/")[0].split("+")  # MATH has seven
    hub(name, split, [row], count=len(configs))
    problems = data.load(name, split)
    last = source.part.split("/")[-1]
    assert hub.calls == [(source.hub, config or None, last, source.revision) for config in configs]
    for p in problems:
        assert (p.prompt, p.answer, p.task, p.group) == expected
        assert str(p.answer) == str(expected[1])  # numbers stay what they are: 98, not 98.0
    assert {p.id for p in problems} == {f"{name}-{split}-{i}" for i in range(len(configs))}
    row = dict(row)
    row.popitem()  # a column is gone
    hub(name, split, [row], count=len(configs))
    with pytest.raises(ValueError, match="rows of .* cannot be used, the first is row 0"):
        data.load(name, split)


def test_numina_keeps_words_and_choices_whose_answer_is_a_plain_number(hub):
    """As WAPO's environment: neither proofs, nor letters, formulas or several values."""
    kinds = ["math-word-problem", "MCQ", "proof"]
    plain = ["25", "-3", "+7", "0.5", "3/4", "1 000", "12,5"]
    others = ["A", r"\frac{1}{2}", "2, 3;", "x=1", "unknown", "", None, "1/2/3", ".5", "5."]
    rows = [{"problem": f"{kind} {answer}", "question_type": kind, "answer": answer}
            for kind in kinds for answer in plain + others]
    rows.append({"problem": "", "question_type": "MCQ", "answer": "1"})
    hub("numina_lean_math", "train", rows, count=len(rows))
    kept = {p.prompt: p.answer["answer"] for p in data.load("numina_lean_math")}
    assert kept == {f"{kind} {answer}": answer for kind in kinds[:2] for answer in plain}


def test_the_passages_of_hotpotqa_are_those_of_all_splits_each_once(hub):
    hub("hotpotqa", "train", [HOTPOT], count=1)
    hub("hotpotqa", "test", [HOTPOT], count=1)
    assert data.passages("hotpotqa") == ["A: One. Two.", "B: Three."]
    parts = [part for _, _, part, _ in hub.calls]
    assert parts == ["train", "validation"][-len(parts):]
    with pytest.raises(ValueError, match="gsm8k has no passages .hotpotqa has.; give --search_url"):
        data.passages("gsm8k")


def test_row_counts_are_checked(hub):
    row = {"problem": "A", "answer": "1"}
    for count in (29, 31):
        hub("aime24", "test", [row] * count)
        with pytest.raises(ValueError, match=rf"aime_2024.* {count} rows, expected \[30\]"):
            data.load("aime24", "test")
    for count in (673, 676):  # a range, where two copies differ
        hub("olympiadbench", "test", [CASES["olympiadbench", "test"][0]] * count)
        with pytest.raises(ValueError, match=f"{count} rows"):
            data.load("olympiadbench", "test")


def test_hub_order_is_seeded_and_prefix_stable(hub):
    hub("aime25", "test", [{"problem": f"P{i}", "answer": str(i)} for i in range(30)])
    whole = data.load("aime25", "test", seed=1)
    assert data.load("aime25", "test", 7, seed=1) == whole[:7]
    other = data.load("aime25", "test", seed=2)
    assert [p.id for p in other] != [p.id for p in whole]
    assert all(p.prompt == "P" + p.id.split("-")[-1] for p in whole)  # the id is the hub's row


def test_a_few_bad_rows_are_told(hub, capsys):
    rows = [{"prompt": f"P{i}", "solution": "1"} for i in range(400)]
    hub("dapo17k", "train", [*rows, {"prompt": "bad", "solution": ""}], count=401)
    assert len(data.load("dapo17k")) == 400
    assert "1 of 401 rows of dapo17k train cannot be used" in capsys.readouterr().err


def test_nothing_in_a_row_is_evaluated(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub("hitab", "test", [HITAB | {"answer": "__import__('os').system('touch hacked')"}], count=1)
    assert data.load("hitab", "test")[0].answer["answer"].startswith("__import__")
    assert not Path("hacked").exists()


def test_offline_says_what_to_do(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nand more lines")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError) as e:
        data.load("gsm8k", "test")
    assert all(word in str(e.value) for word in ("gsm8k", "Couldn't reach", "network", ".jsonl"))
    assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="pip install datasets"):
        data.load("gsm8k", "test")


# ---- reasoning-gym -------------------------------------------------------------------------------

def test_reasoning_gym_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="rg:gcd: needs a package; pip install reasoning-gym"):
        data.load("rg:gcd")


def test_reasoning_gym_splits_and_arguments():
    pytest.importorskip("reasoning_gym")
    train = data.load("rg:chain_sum", "train", 60)
    assert data.load("rg:chain_sum", "train", 20) == train[:20]
    others = data.load("rg:chain_sum", "test", 60) + data.load("rg:chain_sum", "train", 60, seed=1)
    assert not {p.prompt for p in train} & {p.prompt for p in others}
    assert len({p.id for p in train + others}) == 180
    few = "rg:prime_factorization"  # about 1,000 numbers: seeds that differ are not enough
    train = {p.prompt for p in data.load(few, "train", 300)}
    test = {p.prompt for p in data.load(few, "test", 300)}
    assert train and test
    assert not train & test
    long = {"min_terms": 8, "max_terms": 8}
    p = data.load("rg:chain_sum", "test", 1, args=long)[0]
    entry = json.loads(p.answer["entry"])
    assert p.prompt == entry["question"]
    assert len(re.findall(r"\d+", entry["metadata"]["expression"])) == 8
    assert p.task == "rg"
    assert p.answer["name"] == "chain_sum"
    assert p.answer["config"] == long
    text = data.render([p], "plain", data.char_tokenizer("chainsum"))[0]
    assert p.prompt in text and "<answer> </answer>" in text


def test_reasoning_gym_scores_its_own_answers():
    pytest.importorskip("reasoning_gym")
    for name in ("chain_sum", "word_sorting", "mini_sudoku", "knights_knaves"):
        p = data.load(f"rg:{name}", "test", 1)[0]
        gold = json.loads(p.answer["entry"])["answer"]
        twice = f"<answer>1</answer> no <answer>{gold}</answer>"
        assert rewards.grade("rg", twice, **p.answer) == (1.0, "ok")
        score, status = rewards.grade("rg", "<answer>99</answer>", **p.answer)
        assert 0 <= score < 1 and status in ("ok", "unparsable")
        assert rewards.grade("rg", str(gold), **p.answer) == (0.0, "no_answer")
        assert rewards.check_gold("rg", p.answer) is None


@pytest.mark.parametrize("name, args, words", [
    ("rg:chainsum", {}, "did you mean chain_sum"),
    ("rg:countdown", {}, "as Python"),
    ("rg:gcd", {"size_of_it": 1}, "size_of_it"),
    ("rg:chain_sum", {"min_terms": 99}, "max_terms"),
])
def test_reasoning_gym_refuses_in_one_line(name, args, words):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=words) as e:
        data.load(name, "train", 2, args=args)
    assert "\n" not in str(e.value)


# ---- Templates -----------------------------------------------------------------------------------

SUM = Problem("What is 1+1?", {"answer": "2"}, "math", "sum")
NUMBERS = {"numbers": [44, 19, 35], "target": 98, "format": "boxed"}
START = ("A conversation between User and Assistant. The user asks a question, and the Assistant "
         "solves it. The assistant first thinks about the reasoning process in the mind and then "
         "provides the user with the answer.")
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def byte_tokenizer(chat=None, special=(), normalizer=None, eos="<|endoftext|>", pieces=()):
    """A tokenizer whose tokens are bytes, like those of most models but without their merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {byte: i for i, byte in enumerate(alphabet)}
    core = Tokenizer(models.BPE(numbers, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if normalizer:
        core.normalizer = normalizer
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ends])
    core.add_tokens([AddedToken(p, normalized=False) for p in pieces])
    found = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token="<|endoftext|>")
    found.chat_template = chat
    return found


def render(problem, template, tokenizer=None):
    return data.render([problem], template, tokenizer or byte_tokenizer())[0]


def test_templates_are_the_published_texts():
    """A base model is sensitive to every word: a paper's numbers belong to the paper's text."""
    assert render(SUM, "orz") == START + (
        " The reasoning process and answer are enclosed within <think> </think> and <answer> "
        "</answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> "
        "answer here </answer>. \n\nUser: You must put your answer inside <answer> </answer> tags, "
        "i.e.,\n<answer> answer here </answer>. And your final answer will be extracted "
        "automatically by the \\boxed{} tag.\nWhat is 1+1?\nAssistant: <think>")
    assert render(SUM, "r1") == (
        "A conversation between User and Assistant. The User asks a question, and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process in the mind and then "
        "provides the User with the answer. The reasoning process is enclosed within <think> "
        "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
        "<think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: What is 1+1?\nPut your final answer within \\boxed{}.\nAssistant: <think>")
    assert render(SUM, "qwen_math") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n")
    asked = START + (
        "\nUser: Using the numbers [44, 19, 35], create an equation that equals 98. You can use "
        "basic arithmetic operations (+, -, *, /) and each number can only be used once. Show your "
        "work in <think> </think> tags.")
    end = "\nAssistant: Let me solve this step by step.\n<think>"
    boxed = Problem("44 19 35 -> 98 =", NUMBERS, "countdown")
    assert render(boxed, "tinyzero") == asked + (
        " \nAnd your final answer will be extracted automatically by the \\boxed{} tag, for "
        "example \\boxed{(1 + 2) / 3}." + end)
    tagged = Problem("44 19 35 -> 98 =", NUMBERS | {"format": "answer"}, "countdown")
    assert render(tagged, "tinyzero") == asked + (
        " And return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 "
        "</answer>." + end)


def test_stop_strings():
    for name in ("orz", "r1", "tinyzero"):
        assert {"User:", "</answer>"} <= set(data.TEMPLATES[name].stop)
    assert "<|im_end|>" in data.TEMPLATES["qwen_math"].stop
    for name in ("plain", "none", "chat"):
        assert data.TEMPLATES[name].stop == ()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_its_grader_reads(name):
    mark = "\\boxed{" if name == "countdown" else "#7$"
    for p in data.load(name, "test", 3):
        assert render(p, "none") == p.prompt
        for template in ("orz", "r1", "tinyzero", "qwen_math", "plain"):
            text = render(p, template)
            assert mark in text
            assert "{question}" not in text and "{how}" not in text
            assert p.prompt in text or name != "hops"


def test_braces_in_a_question_survive_and_a_box_is_asked_for_once():
    p = Problem("Let $A=\\{x\\}$, {how} {question} \\frac{1}{2}", {"answer": "1"}, "math")
    for template in ("orz", "r1", "tinyzero", "qwen_math", "plain"):
        text = render(p, template)
        assert p.prompt in text
        assert text.count("\\boxed{}") == 1
    asks = Problem("1+1? Put it in \\boxed{}.", {"answer": "2"}, "math")
    assert render(asks, "plain") == "1+1? Put it in \\boxed{}.\n"


def test_auto_is_one_rule():
    """An instruct model asked the bare question, in training but not in evaluation: never again."""
    assert data.choose_template("auto", byte_tokenizer(CHAT)) == "chat"
    assert data.choose_template("auto", byte_tokenizer()) == "plain"
    assert data.choose_template("auto", data.char_tokenizer("chainsum")) == "none"
    assert data.choose_template("orz", byte_tokenizer(CHAT)) == "orz"
    with pytest.raises(ValueError, match="did you mean orz"):
        data.choose_template("orc", byte_tokenizer())


def test_chat_template_bos_and_arguments():
    said = "<|im_start|>user\nWhat is 1+1?\nPut your final answer within \\boxed{}.<|im_end|>\n"
    tokenizer = byte_tokenizer(CHAT + "{% if enable_thinking is false %}<think></think>{% endif %}")
    assert render(SUM, "chat", tokenizer) == said + "<|im_start|>assistant\n"
    question = data.encode([SUM], "chat", tokenizer, 500, {"enable_thinking": False})[0]
    assert question.text == said + "<|im_start|>assistant\n<think></think>"
    assert question.problem is SUM
    assert tokenizer.decode(question.ids) == question.text
    tokenizer.bos_token = "<|im_start|>"
    assert render(SUM, "orz", tokenizer).startswith("<|im_start|>A conversation")
    assert render(SUM, "none", tokenizer) == SUM.prompt
    with pytest.raises(ValueError, match="tokenizer has none.*qwen_math"):
        render(SUM, "chat")


def test_a_tokenizer_adds_no_bos_of_its_own():
    """Llama's puts one before every text: the templates have it already, and a second one is not
    what was trained."""
    from tokenizers.processors import TemplateProcessing
    tokenizer, bos = byte_tokenizer(), "<|im_start|>"
    bos_id = tokenizer.convert_tokens_to_ids(bos)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    assert tokenizer("x").input_ids[0] == bos_id
    tokenizer.bos_token = bos
    for template, count in (("orz", 1), ("none", 0)):
        question = data.encode([SUM], template, tokenizer, 2000)[0]
        assert question.ids.count(bos_id) == count


def test_a_date_in_a_chat_template_stands_still():
    """Responses must not be thrown away at midnight because the prompt says what day it is."""
    tokenizer = byte_tokenizer("{{ strftime_now('%d %b %Y, %A') }}")
    assert render(SUM, "chat", tokenizer) == "26 Jul 2024, Friday"
    told = data.render([SUM], "chat", tokenizer, {"date": "2026-01-31"})
    assert told == ["31 Jan 2026, Saturday"]
    for date in ("tomorrow", 2024):
        with pytest.raises(ValueError, match=f"--template_args date={date}: "):
            data.render([SUM], "chat", tokenizer, {"date": date})


def test_a_grader_of_your_own_needs_no_words():
    problem = data.Problem("Say a palindrome", {"answer": "5"}, "palindrome")
    assert data.render([problem], "plain", byte_tokenizer()) == ["Say a palindrome\n"]


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('system first') }}", "TemplateError: system first"),
    ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
    ("{{ nobody.knows }}", "UndefinedError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ 'a' + 1 }}", "TypeError"),
    ("{{ range(10000000) }}", "OverflowError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ '\\ud83d' }}", "surrogates"),
    ("{{ 'x' * 2000000 }}", "2,000,000 characters"),
    ("{{ 'x' * 10000000000 }}", "a product above"),
    ("{{ [1] * 99999999999 }}", "a product above"),
    ("{{ 9**9**9 }}", r"KeyError: '\*\*'"),  # would never end, and no thread run meanwhile
    ("{{ raise_exception('\x1b[2J') }}", r"TemplateError: \[2J"),
    ("{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}",
     "longer than 0.06 s"),
])
def test_chat_templates_of_strangers(template, words, monkeypatch):
    """One line, whatever they raise, and a bound on time and output."""
    if "range(3000)" in template:
        monkeypatch.setattr(data, "CHAT_SECONDS", 0.05)
    with pytest.raises(ValueError, match=words) as e:
        data.encode([SUM], "chat", byte_tokenizer(template), 500)
    assert "\n" not in str(e.value) and "\x1b" not in str(e.value)


# ---- Tokens --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TASKS)
def test_char_tokenizers_round_trip_and_reload(name, tmp_path):
    built = data.char_tokenizer(name)
    built.save_pretrained(tmp_path)
    demos = data.demos(name, 40, "skill") + data.demos(name, 40, "habit")
    texts = [prompt + "".join(response) for prompt, response in demos]
    for tokenizer in (built, data.load_tokenizer(tmp_path)):
        assert tokenizer.eos_token is None and tokenizer.pad_token == "_"
        end = tokenizer.convert_tokens_to_ids("$")
        assert data.end_ids(tokenizer, [end], len(tokenizer)) == [end]
        for text in texts:
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text) and tokenizer.decode(ids) == text
            padded = ids + [tokenizer.pad_token_id] * 2
            assert data.response_text(padded, tokenizer, [end]) == text  # graders read the "$"
    assert sorted(data.char_tokenizer("chainsum").get_vocab()) == sorted("0123456789><#=$_")


def test_a_character_that_the_tokenizer_cannot_write_is_named():
    tokenizer = data.char_tokenizer("chainsum")
    p = Problem("12+3=", {"answer": "6"}, "chainsum", "p-7")
    with pytest.raises(ValueError, match=r"cannot write '\+' \(prompt of p-7\)"):
        data.encode([p], "none", tokenizer, 100)


def test_nothing_is_lost_by_a_normalizer():
    """NFC joins e and an accent, NFKC writes the ligature as two letters."""
    from tokenizers import normalizers
    p = Problem("caf\u0065\u0301, x =\u0338 3, \ufb01ne, \u2460", {"answer": "1"}, "math")
    for normalizer in (normalizers.NFC(), normalizers.NFKC(), normalizers.Replace(" ", "\u2581")):
        assert data.encode([p], "none", byte_tokenizer(normalizer=normalizer), 200)
    tokenizer = data.char_tokenizer("chainsum")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    p = Problem("1\u0065\u0301=", {"answer": "1"}, "chainsum")
    with pytest.raises(ValueError, match="cannot write '\u00e9'"):
        data.encode([p], "none", tokenizer, 200)


def test_prompts_that_are_too_long_may_be_left_out(capsys):
    answer = {"answer": "1"}
    problems = [Problem("x" * n, answer, "math", str(n)) for n in (3, 50, 7)]
    some = data.encode(problems, "none", byte_tokenizer(), 49, skip=True)
    assert [q.problem.id for q in some] == ["3", "7"]
    assert all(len(q.ids) <= 49 for q in some)
    assert capsys.readouterr().err == "1 of 3 prompts have more than 49 tokens and are left out\n"


def test_prompts_of_wapos_runs():
    """Word for word as layer6ai-labs/wapo ca70250, environments/, asks: under a chat template."""
    box = Problem("What is 1+1?", {"answer": "2"}, "exact_box", "")
    line = Problem("What is 1+1?", {"answer": "2"}, "exact_line", "")
    tokenizer = byte_tokenizer(CHAT)
    begin, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert render(box, "chat", tokenizer) == (
        f"{begin}What is 1+1?\n\n"
        f"Solve the problem and put your final answer inside \\boxed{{}}.{end}")
    assert render(line, "chat", tokenizer) == (
        f"{begin}Solve the following math problem step by step. Put your reasoning inside "
        "<think>...</think> tags. On the final line, write exactly: Answer: <your answer>.\n\n"
        f"What is 1+1?{end}")


def test_prompts_that_are_too_long():
    tokenizer = byte_tokenizer()
    p = Problem("x" * 50, {"answer": "1"}, "math", "long")
    assert len(data.encode([p], "none", tokenizer, 50)[0].ids) == 50
    with pytest.raises(ValueError, match="the prompt of long has 50 tokens, allowed: 1 to 49"):
        data.encode([SUM, p], "none", tokenizer, 49)
    with pytest.raises(ValueError, match="0 tokens"):
        data.encode([Problem("", {"answer": "1"}, "math", "none")], "none", tokenizer, 49)


def test_every_end_of_a_response_is_known():
    """Qwen's base models: config.json names <|endoftext|> alone, the chat ends with <|im_end|>."""
    tokenizer = byte_tokenizer(CHAT)
    eos, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    named = [eos, None, 9999, 7]
    assert data.end_ids(tokenizer, named, len(tokenizer)) == [eos, 7, end]
    assert data.end_ids(tokenizer, [], end) == [eos]  # beyond the model's vocabulary
    tokenizer.chat_template = None
    assert data.end_ids(tokenizer, [7], len(tokenizer)) == [7, eos]
    for broken in ("{{ raise_exception('no') }}", "<|im_start|>{{ messages[0].content }}"):
        tokenizer.chat_template = broken  # what it does not show, it does not close
        assert data.end_ids(tokenizer, [7], len(tokenizer)) == [7, eos]


def test_graders_read_all_but_the_end():
    tokenizer = byte_tokenizer(special=["<answer>", "</answer>"])
    eos, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    text = "<|im_end|>so <answer>5</answer>"
    ids = tokenizer(text).input_ids
    for tail in ([], [eos], [eos, pad, pad]):
        assert data.response_text(ids + tail, tokenizer, [eos]) == text
    for nothing in ([], [eos], [pad, eos]):
        assert data.response_text(nothing, tokenizer, [eos]) == ""
    letter = tokenizer("a").input_ids  # an end that is no special token may belong to the answer
    assert data.response_text(letter, tokenizer, letter) == "a"


def test_spaces_stay_as_the_model_wrote_them(tmp_path):
    """Llama 3's file asks for a clean-up that turns "3 . 5" into "3. 5" and "x ' s" into "x's"."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"clean_up_tokenization_spaces": True}
    file.write_text(json.dumps(config))
    loaded = data.load_tokenizer(tmp_path)
    text = "f ( x ) = 3 . 5 , isn 't it ?"
    assert loaded.decode(loaded(text).input_ids) == text
    assert data.response_text(loaded(text).input_ids, loaded, []) == text


def test_a_directory_without_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer there"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100_000])
def test_a_tokenizer_file_of_another_shape_is_one_line(tmp_path, name, text):
    data.char_tokenizer("chainsum").save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, OSError)):
        data.load_tokenizer(tmp_path)


def test_a_chat_template_that_floods_is_one_line():
    tokenizer = data.char_tokenizer("chainsum")
    tokenizer.chat_template = "{{ 'x' * 20000000 }}"
    with pytest.raises(ValueError, match="20,000,000 characters"):
        data.chat([[{"role": "user", "content": "1"}]], tokenizer)
