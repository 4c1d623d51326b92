"""eval.py: scores that can be printed. Each test names the failure that it prevents."""
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import rewards  # noqa: E402
import train  # noqa: E402
from model import Model  # noqa: E402


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run directory as train.py leaves it, whose model has learned to guess: about one response in ten is right."""
    directory = tmp_path_factory.mktemp("runs") / "default"
    tokenizer = data.char_tokenizer("chainsum")
    raw = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=len(tokenizer), hidden_size=32,
               intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=True, hidden_act="silu",
               initializer_range=0.1, eos_token_id=tokenizer.convert_tokens_to_ids(data.END),
               rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
    model = Model.from_scratch(raw, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    demos = [(tokenizer.encode(p), tokenizer.encode(r)) for p, r in data.demos("chainsum", 60 * 32, "habit")]
    for step in range(60):
        rows = demos[32 * step:32 * (step + 1)]
        ids = torch.tensor([t for p, r in rows for t in (p + r)[:-1]])
        targets = torch.tensor([t for p, r in rows for t in [-1] * (len(p) - 1) + r])
        (-model(ids, [len(p + r) - 1 for p, r in rows], targets)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    aside = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(aside)
    model.source = aside
    model.save_pretrained(directory / "step-000003")
    (directory / "latest").write_text("step-000003")
    config = train.Config(max_new_tokens=12, out=str(directory))  # train.py's own fields: eval.py must know their names
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return directory


@pytest.fixture
def call(run, monkeypatch, capsys):
    """call("--n", 4, ...): eval.py in this process; what it printed. SystemExit carries its last line."""
    def go(*flags, checkpoint=run):
        monkeypatch.setattr(sys, "argv", ["eval.py", *([str(checkpoint)] if checkpoint else []), *map(str, flags)])
        evaluation.main()
        return capsys.readouterr().out
    return go


def rows_of(directory, name="samples_chainsum"):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def results_of(directory):
    return json.loads((directory / "results.json").read_text())["results"]


def row(id="a", sample=0, score=0.0, group="", status="ok", run="r", **more):
    return {"id": id, "sample": sample, "group": group, "task": "chainsum", "answer": {"answer": "7"}, "prompt": "12=",
            "run": run, "response": "#7$", "finished": True, "length": 3, "score": score, "status": status, **more}


# ---------------------------------------------------------------- statistics

@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(nck):
    n, c, k = nck
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_does_not_overflow():
    """C(5000, 2500) is no float: a quotient of binomials would be inf / inf."""
    exact = 1 - Fraction(math.comb(4990, 2500), math.comb(5000, 2500))
    assert evaluation.pass_at_k(5000, 10, 2500) == pytest.approx(float(exact), abs=1e-12)


values = st.lists(st.floats(0, 1), min_size=2, max_size=30)


@given(values)
def test_standard_error_is_over_questions_with_ddof_1(v):
    assert evaluation.standard_error(v) == pytest.approx(statistics.stdev(v) / math.sqrt(len(v)), abs=1e-9)
    assert evaluation.standard_error(v, [""] * len(v)) == evaluation.standard_error(v)  # no group is not a group


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from("abcd")), min_size=2, max_size=20))
def test_clustered_error_is_the_double_sum_over_pairs_of_one_cluster(pairs):
    v, groups = zip(*pairs)
    Q, C, mean = len(v), len(set(groups)), sum(v) / len(v)
    se = evaluation.standard_error(v, groups)
    if C == 1:
        assert se is None
        return
    total = sum((v[i] - mean) * (v[j] - mean) for i in range(Q) for j in range(Q) if groups[i] == groups[j])
    assert se == pytest.approx(math.sqrt(max(0, total) * C / (C - 1)) / Q, abs=1e-6)


@given(values)
def test_asking_every_question_twice_about_one_table_does_not_shrink_the_error(v):
    """Naive errors would fall by sqrt(2), although nothing new was measured."""
    twice, groups = v + v, [str(i) for i in range(len(v))] * 2
    assert evaluation.standard_error(twice, groups) == pytest.approx(evaluation.standard_error(v), abs=1e-9)


@settings(max_examples=50)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4), min_size=2, max_size=8))
def test_score_rows_against_plain_loops(scores):
    rows = [row(f"q{i}", j, s, status="ok" if s else "no_answer", finished=s > 0, length=j)
            for i, block in enumerate(scores) for j, s in enumerate(block)]
    result, flat, Q = evaluation.score_rows(rows, 4, (1, 3)), sum(scores, []), len(scores)
    means = [sum(b) / 4 for b in scores]
    assert result["avg@4"] == result["exact_match,none"] == pytest.approx(sum(means) / Q)
    assert result["se"] == result["exact_match_stderr,none"] == pytest.approx(statistics.stdev(means) / math.sqrt(Q))
    for k in (1, 3):  # a half-right response is not a pass
        chance = [sum(any(x == 1 for x in s) for s in itertools.combinations(b, k)) / math.comb(4, k) for b in scores]
        assert result[f"pass@{k},none"] == pytest.approx(sum(chance) / Q)
    zeros = sum(s == 0 for s in flat)
    assert result["truncated"] == result["no_answer"] == pytest.approx(zeros / len(flat))
    assert (result["questions"], result["clusters"], result["n"], result["length"]) == (Q, Q, 4, 1.5)
    assert result["status"].get("no_answer", 0) == zeros and sum(result["status"].values()) == 4 * Q


# ---------------------------------------------------------------- a whole evaluation

def test_defaults_are_those_of_the_run(run, call, tmp_path):
    """A run directory needs no flags: its task, template, response length; n 8; a greedy pass; the numbers add up."""
    out = call("--out", tmp_path, "--limit", 40)
    result, rows = results_of(tmp_path)["chainsum"], rows_of(tmp_path)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["config"]["max_new_tokens"] == 12 and record["config"]["template"] == "none"
    assert record["config"]["checkpoint"].endswith("step-000003") and result["n"] == 8 and result["k"] == [1, 8]
    assert "n 8, temperature 1.0, top_p 1.0, max_new_tokens 12, template none, seed 0" in out
    assert all(column in out for column in ("avg@8 ± SE", "pass@1", "pass@8", "greedy", "truncated", "no answer"))
    problems = data.load("chainsum", "test", n=40)
    assert [(r["id"], r["sample"]) for r in rows] == [(p.id, j) for p in problems for j in range(8)]
    for r, p in zip(rows, (p for p in problems for _ in range(8))):
        assert (r["score"], r["status"]) == rewards.grade("chainsum", r["response"], **p.answer)
        assert r["prompt"] == p.prompt and r["length"] == len(r["response"])
        assert r["finished"] == r["response"].endswith("$")
    assert result["avg@8"] == pytest.approx(sum(r["score"] for r in rows) / len(rows)) and 0.02 < result["avg@8"] < 0.3
    assert result["pass@1,none"] == pytest.approx(result["avg@8"]) and result["pass@8,none"] > result["avg@8"]
    greedy = rows_of(tmp_path, "greedy_chainsum")
    assert result["greedy"] == pytest.approx(sum(r["score"] for r in greedy) / 40)
    percent = re.search(r"chainsum +(\S+) ± (\S+) ", out)
    assert float(percent[1]) == pytest.approx(100 * result["avg@8"], abs=0.051)
    assert float(percent[2]) == pytest.approx(100 * result["se"], abs=0.051)


def test_the_length_of_the_run_is_the_default(run, call, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"max_new_tokens": 2}))
    call("--limit", 5, "--n", 4, "--out", tmp_path, checkpoint=tmp_path / "run")
    assert max(r["length"] for r in rows_of(tmp_path)) == 2


def test_the_template_and_the_held_out_set_of_the_run_are_the_defaults(run, call, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"template": "chat"}))
    assert "template chat needs" in line_of(call, checkpoint=tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"eval_data": "add"}))
    assert "add-test-0" in line_of(call, checkpoint=tmp_path / "run")


def test_a_checkpoint_inside_a_run_is_evaluated_like_the_run(run, call, tmp_path):
    call("--out", tmp_path / "a", "--limit", 5)
    call("--out", tmp_path / "b", "--limit", 5, checkpoint=run / "step-000003")
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


def test_results_lie_in_the_run_directory_by_default(run, call, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    call("--limit", 2, "--n", 2, checkpoint=tmp_path / "run")
    assert results_of(tmp_path / "run")["chainsum"]["questions"] == 2 and len(rows_of(tmp_path / "run")) == 4
    assert not list((tmp_path / "run").glob(".*"))  # nothing half-written is left behind


@pytest.fixture
def whole(call, tmp_path):
    call("--out", tmp_path / "whole", "--limit", 24, "--n", 4, "--batch_size", 16)
    return tmp_path / "whole"


def same(a, b):
    for file in ("samples_chainsum.jsonl", "greedy_chainsum.jsonl"):
        assert (a / file).read_bytes() == (b / file).read_bytes()
    assert results_of(a) == results_of(b)


def test_twice_the_same_and_another_seed_another_sample(call, whole, tmp_path):
    call("--out", tmp_path / "again", "--limit", 24, "--n", 4, "--batch_size", 16)
    same(whole, tmp_path / "again")
    call("--out", tmp_path / "seed", "--limit", 24, "--n", 4, "--seed", 1)
    assert [r["response"] for r in rows_of(whole)] != [r["response"] for r in rows_of(tmp_path / "seed")]
    assert rows_of(whole, "greedy_chainsum") == rows_of(tmp_path / "seed", "greedy_chainsum")


@pytest.mark.parametrize("batch", [1, 1000])
def test_batch_size_changes_no_token(call, whole, tmp_path, batch):
    call("--out", tmp_path / "b", "--limit", 24, "--n", 4, "--batch_size", batch)
    same(whole, tmp_path / "b")


def test_stopped_in_the_middle_and_started_again(call, whole, tmp_path, monkeypatch):
    """Ctrl-C in the third batch: two batches are on disk, the second call samples the rest only."""
    asked, real = [], evaluation.generate

    def generate(model, prompts, *args, **kw):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return real(model, prompts, *args, **kw)
    monkeypatch.setattr(evaluation, "generate", generate)
    flags = ("--out", tmp_path / "b", "--limit", 24, "--n", 4, "--batch_size", 16)
    with pytest.raises(SystemExit, match="stopped; the same command goes on"):
        call(*flags)
    assert len(rows_of(tmp_path / "b")) == 32 and not (tmp_path / "b" / "results.json").exists()
    monkeypatch.setattr(evaluation, "generate", lambda m, p, *a, **k: asked.append(len(p)) or real(m, p, *a, **k))
    call(*flags)
    assert sum(asked[2:]) == 24 - 8 + 24  # sixteen questions and the greedy pass
    same(whole, tmp_path / "b")


@pytest.mark.parametrize("keep", [0.03, 0.5, 0.99])
def test_a_half_written_line_is_dropped(call, whole, tmp_path, keep):
    """kill -9 while a line is written: also a question of which only some samples are there is sampled anew."""
    (tmp_path / "b").mkdir()
    for file in ("samples_chainsum.jsonl", "greedy_chainsum.jsonl"):
        text = (whole / file).read_bytes()
        (tmp_path / "b" / file).write_bytes(text[:int(keep * len(text))])
    call("--out", tmp_path / "b", "--limit", 24, "--n", 4, "--batch_size", 16)
    same(whole, tmp_path / "b")


def test_stored_responses_are_kept_and_graded_anew(call, whole, monkeypatch):
    """A repaired grader must not leave yesterday's scores in the table, nor cost a second sampling."""
    rows = rows_of(whole)
    rows[5] |= {"response": f"#{rows[5]['answer']['answer']}$", "score": 0.0, "status": "error"}
    (whole / "samples_chainsum.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(evaluation, "generate", None)  # it must not be called
    call("--out", whole, "--limit", 24, "--n", 4)
    assert (rows_of(whole)[5]["score"], rows_of(whole)[5]["status"]) == (1.0, "ok")
    assert results_of(whole)["chainsum"]["status"].get("error", 0) == 0


def test_a_smaller_limit_loses_nothing_and_a_larger_one_continues(call, whole, tmp_path, monkeypatch):
    before = rows_of(whole)
    with monkeypatch.context() as m:
        m.setattr(evaluation, "generate", None)
        call("--out", whole, "--limit", 10, "--n", 4)
    assert results_of(whole)["chainsum"]["questions"] == 10 and rows_of(whole) == before
    call("--out", whole, "--limit", 30, "--n", 4)
    call("--out", tmp_path / "b", "--limit", 30, "--n", 4)
    same(whole, tmp_path / "b")


@pytest.mark.parametrize("flags", [("--temperature", 0.7), ("--top_p", 0.5), ("--max_new_tokens", 5), ("--seed", 3)])
def test_samples_of_other_flags_are_set_aside_not_mixed_and_not_lost(call, whole, flags):
    old = rows_of(whole)
    out = call("--out", whole, "--limit", 24, "--n", 4, *flags)
    aside = whole / f"samples_chainsum.jsonl.{old[0]['run']}"
    assert aside.name in out and [json.loads(line) for line in aside.read_text().splitlines()] == old
    assert len({r["run"] for r in rows_of(whole)}) == 1 and rows_of(whole)[0]["run"] != old[0]["run"]
    assert [r["response"] for r in rows_of(whole)] != [r["response"] for r in old]


def test_samples_of_other_weights_are_set_aside(run, call, tmp_path):
    """The run went on training: same directory, same flags, other model."""
    shutil.copytree(run, tmp_path / "run")
    call("--limit", 3, checkpoint=tmp_path / "run")
    old = rows_of(tmp_path / "run")[0]["run"]
    model = Model.from_pretrained(run / "step-000003")
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-4
    model.save_pretrained(tmp_path / "run" / "step-000006")
    (tmp_path / "run" / "latest").write_text("step-000006")
    assert old in call("--limit", 3, checkpoint=tmp_path / "run")
    assert rows_of(tmp_path / "run")[0]["run"] != old


def test_greedy_alone_is_the_greedy_pass(call, whole, tmp_path):
    assert "n 1, temperature 0.0" in call("--greedy", "--out", tmp_path / "g", "--limit", 24)
    a, b = rows_of(tmp_path / "g"), rows_of(whole, "greedy_chainsum")
    assert [r["response"] for r in a] == [r["response"] for r in b]
    result = results_of(tmp_path / "g")["chainsum"]
    assert result["avg@1"] == result["greedy"] == results_of(whole)["chainsum"]["greedy"]
    assert not (tmp_path / "g" / "greedy_chainsum.jsonl").exists()


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_file_as_a_task_and_repeated_questions_are_sampled_apart(call, tmp_path):
    """Two questions of one text must not get the same responses: their errors would be counted as independent."""
    question = {"prompt": "123456=", "answer": "1", "task": "chainsum", "group": "g"}
    file = write(tmp_path / "mine.jsonl", question | {"id": "a"}, question | {"id": "b"})
    call("--tasks", f"{file},chainsum", "--limit", 2, "--out", tmp_path, "--temperature", 3)
    rows, result = rows_of(tmp_path, "samples_mine"), results_of(tmp_path)
    assert list(result) == ["mine", "chainsum"] and result["mine"]["clusters"] == 1 and result["mine"]["se"] is None
    assert [r["response"] for r in rows[:8]] != [r["response"] for r in rows[8:]]


def test_questions_with_several_answers_are_counted(call, tmp_path):
    """Minerva with any of its answers scores higher than with its first: a table must say which it is."""
    file = write(tmp_path / "m.jsonl", {"prompt": "12=", "answer": ["3", "4"]}, {"prompt": "13=", "answer": "5"})
    call("--tasks", file, "--out", tmp_path, "--n", 1)
    assert json.loads((tmp_path / "results.json").read_text())["configs"]["m"]["any_of"] == 1


def test_acpo_compat_reaches_the_grader_of_math_only():
    rows = [row(response="4", answer={"answer": "4"}, task=task) for task in ("math", "chainsum")]
    with rewards.Scorer(workers=0) as scorer:
        assert [r["score"] for r in evaluation.graded(rows, scorer, acpo_compat=False)] == [0, 0]
        assert [r["score"] for r in evaluation.graded(rows, scorer, acpo_compat=True)] == [1, 0]


def test_list_names_every_task_of_every_suite(call):
    out = call("--list", checkpoint=None)
    for name in sum(evaluation.SUITES.values(), []):
        assert name in out and (name in data.TASKS or "test" in data.SOURCES[name])


# ---------------------------------------------------------------- comparison

def fake(directory, scores, n=2, groups=None, ids=None, answer="7"):
    """results.json and samples of one task with the given scores, question by question."""
    directory.mkdir(exist_ok=True)
    rows = [row((ids or range(len(scores)))[i], j, s, (groups or [""] * len(scores))[i], run=directory.name,
                answer={"answer": answer}) for i, block in enumerate(scores) for j, s in enumerate(block)]
    write(directory / "samples_t.jsonl", *rows)
    result = evaluation.score_rows(rows, n) | {"run": directory.name}
    (directory / "results.json").write_text(json.dumps({"results": {"t": result}}))
    return directory / "results.json"


def test_the_paired_difference_and_its_error(tmp_path):
    """Pairing by id, in any order, over the questions that both have; the error is that of the differences."""
    a = fake(tmp_path / "a", [[1, 1], [0, 1], [0, 0], [1, 1]], ids="wxyz")
    b = fake(tmp_path / "b", [[0, 0], [0, 0], [1, 0], [1, 1]], ids="zyxv")
    found = evaluation.compare(a, b)["t"]
    d = [0.5 - 0.5, 0 - 0, 1 - 0]  # x, y, z
    assert found["difference"] == pytest.approx(sum(d) / 3) and found["questions"] == 3
    assert found["se"] == pytest.approx(statistics.stdev(d) / math.sqrt(3))
    assert found["ours"] - found["other"] == pytest.approx(found["difference"])


def test_the_verdict_is_noise_below_two_standard_errors(tmp_path):
    def verdict(x, y, groups=None):
        a, b = fake(tmp_path / "a", x, 1, groups), fake(tmp_path / "b", y, 1, groups)
        return evaluation.compare(a, b)["t"]["verdict"]
    no, up = [[0]] * 12, [[1]] * 6 + [[0]] * 6
    assert verdict(up, no) == "better" and verdict(no, up) == "worse"
    assert verdict(up, up).startswith("noise")
    assert verdict([[1]] * 2 + [[0]] * 10, no).startswith("noise")  # 0.17 +- 0.11
    assert verdict(up, no, ["table 1"] * 6 + ["table 2"] * 6).startswith("noise")  # two tables prove nothing
    assert verdict([[1]], [[0]]).startswith("noise")  # nor does one question


def test_compare_on_the_command_line(call, whole, tmp_path):
    flags = ("--limit", 24, "--n", 4, "--seed", 5, "--out", tmp_path / "b")
    out = call(*flags, "--compare", whole / "results.json")
    a, b = (results_of(d)["chainsum"]["avg@4"] for d in (tmp_path / "b", whole))
    line = re.search(r"against .*\n.*\nchainsum +(\S+) +(\S+) +(\S+) ± (\S+) +24  (.*)", out)
    assert float(line[3]) == pytest.approx(100 * (a - b), abs=0.051) and a != b
    assert line[5].startswith("noise")  # two seeds of the same model
    with pytest.raises(SystemExit, match="would overwrite it"):
        call(*flags, "--compare", tmp_path / "b" / "results.json")


def test_compare_refuses_what_cannot_be_paired(tmp_path):
    a, b = fake(tmp_path / "a", [[1, 1]] * 3), fake(tmp_path / "b", [[1, 1]] * 3, ids="xyz")
    with pytest.raises(ValueError, match="other questions"):
        evaluation.compare(a, b)
    with pytest.raises(ValueError, match="other questions"):  # the same ids in another file
        evaluation.compare(a, fake(tmp_path / "c", [[1, 1]] * 3, answer="8"))
    text = (tmp_path / "b" / "samples_t.jsonl").read_text()
    (tmp_path / "b" / "samples_t.jsonl").write_text(text.replace('"run": "b"', '"run": "other"'))
    with pytest.raises(ValueError, match="not the 6 samples"):
        evaluation.scores_by_id(b, "t")
    (tmp_path / "b" / "samples_t.jsonl").unlink()
    with pytest.raises(ValueError, match="not the 6 samples"):
        evaluation.scores_by_id(b, "t")


# ---------------------------------------------------------------- bad input: one line, before any sampling

def line_of(call, *flags, **kw):
    with pytest.raises(SystemExit) as stop:
        call(*flags, **kw)
    line = stop.value.code
    assert isinstance(line, str) and line.startswith("eval.py: ") and "\n" not in line, line
    return line


@pytest.mark.parametrize("flags, says", [
    (["--tasks", "chainsm"], "unknown task 'chainsm'; did you mean chainsum?"),
    (["--tasks", "chainsum,countdwn"], "did you mean countdown"),
    (["--suite", "maths"], "choose from"), (["--temprature", "1"], "did you mean --temperature"),
    (["--n", "0"], "--n 0: must be at least 1"), (["--n", "many"], "argument --n"),
    (["--k", "9"], "--k 9"), (["--k", "1,x"], "--k 1,x"), (["--k", "0"], "--k 0"), (["--limit", "0"], "--limit 0"),
    (["--limit", "-3"], "--limit -3"), (["--max_new_tokens", "0"], "--max_new_tokens 0"),
    (["--threads", "0"], "--threads"), (["--batch_size", "0"], "--batch_size 0"),
    (["--temperature", "-1"], "--temperature -1"), (["--temperature", "nan"], "--temperature nan"),
    (["--temperature", "0"], "say --greedy"), (["--top_p", "0"], "--top_p"),
    (["--top_p", "1.5"], "--top_p 1.5"), (["--template", "orc"], "did you mean orz"),
    (["--tasks", "add"], "cannot write '+' (prompt of add-test-0)"), (["--template", "chat"], "chat template"),
    (["--max_new_tokens", "255"], "the prompt of chainsum-test-0 has 7 tokens, allowed are 1 to 1"),
    (["--tasks", "no/such.jsonl"], "no such file"), (["--compare", "no/results.json"], "no/results.json")])
def test_bad_flags(call, tmp_path, monkeypatch, flags, says):
    monkeypatch.setattr(evaluation, "generate", None)
    assert says in line_of(call, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_no_checkpoint_at_all(call, run, tmp_path):
    assert "which checkpoint?" in line_of(call, checkpoint=None)
    assert "no such directory" in line_of(call, checkpoint=tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in line_of(call, checkpoint=tmp_path / "empty")
    shutil.copy(run / "config.json", tmp_path / "empty")
    assert "no checkpoint yet" in line_of(call, checkpoint=tmp_path / "empty")
    (tmp_path / "empty" / "latest").write_text("step-000009")
    assert "step-000009" in line_of(call, checkpoint=tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "not JSON" in line_of(call, checkpoint=tmp_path / "empty")


@pytest.mark.parametrize("lost, says", [("tokenizer", "no tokenizer there"), ("model", "no *.safetensors here"),
                                        ("config", "no config.json here")])
def test_a_checkpoint_that_lacks_a_part(call, run, tmp_path, lost, says):
    shutil.copytree(run / "step-000003", tmp_path / "ckpt")
    for file in (tmp_path / "ckpt").glob(f"{lost}*"):
        file.unlink()
    assert says in line_of(call, "--tasks", "chainsum", checkpoint=tmp_path / "ckpt")


def test_bad_files(call, tmp_path):
    for name, text, says in [("empty.jsonl", "", "line 1: the file holds no rows"),
                             ("bad.jsonl", "{", "line 1: bad JSON"),
                             ("gap.jsonl", '{"prompt": "1=", "answer": "1"}\n{"prompt": "2="}', "line 2: no answer"),
                             ("long.jsonl", json.dumps({"prompt": "1" * 400, "answer": "1"}), "400 tokens")]:
        (tmp_path / name).write_text(text)
        assert says in line_of(call, "--tasks", tmp_path / name, "--out", tmp_path)
    shutil.copy(tmp_path / "gap.jsonl", tmp_path / "empty.csv")
    twins = f"{tmp_path / 'empty.jsonl'},{tmp_path / 'empty.csv'}"
    assert "two have the same name" in line_of(call, "--tasks", twins, "--out", tmp_path)
    (tmp_path / "results.json").write_text("{}")
    assert "not a results.json" in line_of(call, "--compare", tmp_path / "results.json", "--out", tmp_path / "b")
    (tmp_path / "results.json").write_text('{"results": {"aime24": {}}}')
    assert "no result of chainsum" in line_of(call, "--compare", tmp_path / "results.json", "--out", tmp_path / "b")
    assert f"'{tmp_path}/results.json" in line_of(call, "--out", tmp_path / "results.json" / "sub")


# ---------------------------------------------------------------- the real command

ENVIRONMENT = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}


def test_the_command_itself(run, tmp_path):
    """From another directory, with a progress bar, exit status 0; the wrong way, exit status 1 and one line."""
    command = [sys.executable, str(ROOT / "eval.py"), str(run), "--limit", "4", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "samples_chainsum: 100%" in done.stderr and "pass@8" in done.stdout, done.stderr
    done = subprocess.run([*command, "--k", "99"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("eval.py: --k 99") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_two_processes_write_what_one_writes(run, call, whole, tmp_path):
    """torchrun spreads the questions; also it continues what one process began."""
    text = (whole / "samples_chainsum.jsonl").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "samples_chainsum.jsonl").write_bytes(text[:len(text) // 3])
    for out in ("a", "b"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                   str(ROOT / "eval.py"), str(run), "--limit", "24", "--n", "4", "--batch_size", "20",
                   "--out", str(tmp_path / out)]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("pass@4") == 1, done.stderr
        same(whole, tmp_path / out)
