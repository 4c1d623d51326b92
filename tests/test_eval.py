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
from model import Model, pack  # noqa: E402


RAW = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 32,
       "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
       "tie_word_embeddings": True, "hidden_act": "silu", "initializer_range": 0.1,
       "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run directory as train.py leaves it. Its model guesses: one response in ten is right."""
    directory = tmp_path_factory.mktemp("runs") / "default"
    tokenizer = data.char_tokenizer("chainsum")
    end = tokenizer.convert_tokens_to_ids(data.END)
    model = Model.from_scratch(RAW | {"vocab_size": len(tokenizer), "eos_token_id": end}, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    demos = data.demos("chainsum", 60 * 32, "habit")
    for step in range(60):
        some = demos[32 * step:32 * (step + 1)]
        sequences = [tokenizer.encode(prompt + response) for prompt, response in some]
        logp = model(*pack(sequences, [len(prompt) for prompt, _ in some], "cpu"))[0]
        (-logp.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory / "step-000003")
    tokenizer.save_pretrained(directory / "step-000003")
    (directory / "latest").write_text("step-000003")
    flags = train.Flags(max_new_tokens=12, template="none", out=str(directory))
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(flags)))
    return directory


@pytest.fixture
def call(run, monkeypatch, capsys):
    """call("--n", 4, ...): eval.py in this process; what it printed."""
    def go(*flags, checkpoint=run):
        words = [checkpoint, *flags] if checkpoint else flags
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
        evaluation.main()
        printed = capsys.readouterr()
        return printed.out + printed.err
    return go


@pytest.fixture
def refused(call):
    """refused(flags): the one line with which it stops."""
    def go(*flags, **kw):
        with pytest.raises(SystemExit) as stop:
            call(*flags, **kw)
        line = stop.value.code
        assert isinstance(line, str) and line.startswith("eval.py: "), line
        assert "\n" not in line, line
        return line
    return go


def rows_of(directory, name="samples_chainsum"):
    lines = (directory / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def results_of(directory):
    return json.loads((directory / "results.json").read_text())["results"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(id="a", sample=0, score=0.0, group="", status="ok", **more):
    return {"id": id, "sample": sample, "group": group, "task": "chainsum", "prompt": "12=",
            "answer": {"answer": "7"}, "run": "r", "response": "#7$", "finished": True, "length": 3,
            "score": score, "status": status, **more}


# ---- With a tool ---------------------------------------------------------------------------------

@pytest.fixture
def talking(tmp_path):
    """The run of a policy with random weights, some of whose nonsense is a call."""
    tokenizer = data.char_tokenizer("hops")
    config = dict(model_type="qwen2", vocab_size=len(tokenizer), hidden_size=32,
                  intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                  num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=512,
                  eos_token_id=tokenizer.convert_tokens_to_ids("$"))
    step = tmp_path / "talking/step-000001"
    Model.from_scratch(config, 5).save_pretrained(step)
    tokenizer.save_pretrained(step)
    (tmp_path / "talking/latest").write_text(step.name)
    flags = train.Flags(data="hops", tool="facts", turns=3, max_new_tokens=99, template="none")
    (tmp_path / "talking/config.json").write_text(json.dumps(dataclasses.asdict(flags)))
    return tmp_path / "talking"


def test_the_runs_tool_is_there_and_its_calls_are_counted(talking, call, tmp_path):
    how = ("--limit", 24, "--n", 4)
    call(*how, checkpoint=talking)
    rows = rows_of(talking, "samples_hops")
    found = results_of(talking)["hops"]
    assert sum(row["calls"] for row in rows) / len(rows) == pytest.approx(found["calls"])
    assert found["calls"] > 0
    assert max(row["calls"] for row in rows) <= 2  # three turns
    assert found["failed_calls"] == 0
    for r in rows:  # graded is what the policy wrote, people see what the tool said
        assert len(r["response"]) == r["length"]
        assert (r["response"] == r["turns"]) == (r["calls"] == 0)
    before = (talking / "samples_hops.jsonl").read_text()
    call(*how, checkpoint=talking)  # all of it is there already
    assert (talking / "samples_hops.jsonl").read_text() == before
    call(*how, "--tool", "none", "--out", tmp_path / "none", checkpoint=talking)
    assert "calls" not in results_of(tmp_path / "none")["hops"]
    assert "calls" not in rows_of(tmp_path / "none", "samples_hops")[0]
    call(*how, "--turns", 1, "--out", tmp_path / "one", checkpoint=talking)
    assert results_of(tmp_path / "one")["hops"]["calls"] == 0


def test_a_tool_is_for_one_task(talking, refused):
    for flags, said in [
        ("--tasks hops,chainsum", "--tool facts: give one of --tasks"),
        ("--tasks chainsum", "--tool facts: this --data has no facts"),
        ("--tool fats", "--tool fats"),
    ]:
        assert said in refused(*flags.split(), checkpoint=talking)


# ---- Statistics ----------------------------------------------------------------------------------

@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, draw):
    c = draw.draw(st.integers(0, n))
    k = draw.draw(st.integers(1, n))
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    share = sum(any(s) for s in subsets) / len(subsets)
    assert evaluation.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_does_not_overflow():
    """C(5000, 2500) is no float: a quotient of binomials would be inf / inf."""
    exact = 1 - Fraction(math.comb(4990, 2500), math.comb(5000, 2500))
    assert evaluation.pass_at_k(5000, 10, 2500) == pytest.approx(float(exact), abs=1e-12)


some_scores = st.lists(st.floats(0, 1), min_size=2, max_size=30)


@given(some_scores)
def test_standard_error_is_over_questions_with_ddof_1(scores):
    expected = statistics.stdev(scores) / math.sqrt(len(scores))
    found = evaluation.standard_error(scores, [""] * len(scores))
    assert found == pytest.approx(expected, abs=1e-9)


in_groups = st.tuples(st.floats(0, 1), st.sampled_from("abcd"))


@given(st.lists(in_groups, min_size=2, max_size=20))
def test_clustered_error_is_the_double_sum_over_pairs_of_one_cluster(pairs):
    scores, groups = zip(*pairs)
    found = evaluation.standard_error(scores, groups)
    clusters = len(set(groups))
    if clusters == 1:
        assert found is None
        return
    mean = sum(scores) / len(scores)
    total = 0
    for (score, group), (other, others_group) in itertools.product(pairs, repeat=2):
        if group == others_group:
            total += (score - mean) * (other - mean)
    variance = max(0, total) * clusters / (clusters - 1)
    assert found == pytest.approx(math.sqrt(variance) / len(scores), abs=1e-6)


@given(some_scores)
def test_asking_every_question_twice_does_not_shrink_the_error(scores):
    """Naive errors would fall by sqrt(2), although nothing new was measured."""
    groups = [str(i) for i in range(len(scores))]
    once = evaluation.standard_error(scores, groups)
    twice = evaluation.standard_error(scores + scores, groups + groups)
    assert twice == pytest.approx(once, abs=1e-9)


four_scores = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4)


@settings(max_examples=30)
@given(st.lists(four_scores, min_size=2, max_size=8))
def test_score_rows_against_plain_loops(scores):
    rows = []
    for question, block in enumerate(scores):
        for sample, score in enumerate(block):
            status = "ok" if score else "no_answer"
            rows.append(row(f"q{question}", sample, score, status=status, finished=score > 0,
                            length=sample))
    result = evaluation.score_rows(rows, 4, (1, 3))
    means = [sum(block) / 4 for block in scores]
    assert result["avg@4"] == pytest.approx(statistics.mean(means))
    assert result["se"] == pytest.approx(statistics.stdev(means) / math.sqrt(len(means)))
    for k in (1, 3):  # a half-right response is no pass
        passes = [1 in subset for block in scores for subset in itertools.combinations(block, k)]
        assert result[f"pass@{k}"] == pytest.approx(statistics.mean(passes))
    zeros = sum(scores, []).count(0)
    assert result["truncated"] == result["no_answer"] == pytest.approx(zeros / len(rows))
    assert result["questions"] == len(scores)
    assert result["n"] == 4
    assert result["length"] == 1.5
    assert result["status"].get("no_answer", 0) == zeros


# ---- A whole evaluation --------------------------------------------------------------------------

def test_defaults_are_those_of_the_run(run, call, tmp_path):
    """A run directory needs no flags: its task, template and length; the numbers add up."""
    out = call("--out", tmp_path, "--limit", 40)
    record = json.loads((tmp_path / "results.json").read_text())
    result, rows = record["results"]["chainsum"], rows_of(tmp_path)
    assert record["checkpoint"].endswith("step-000003")
    assert record["config"]["template"] == "none"
    assert "n 8, k [1, 8], temperature 1.0, top_p 1.0, max_new_tokens 12, template none" in out
    asked = [p for p in data.load("chainsum", "test", n=40) for _ in range(8)]
    assert [r["sample"] for r in rows] == list(range(8)) * 40
    for r, problem in zip(rows, asked, strict=True):
        assert r["id"] == problem.id
        assert r["prompt"] == problem.prompt
        graded = rewards.grade("chainsum", r["response"], **problem.answer)
        assert (r["score"], r["status"]) == graded
        assert r["length"] == len(r["response"])
        assert r["finished"] == r["response"].endswith("$")
    scores = [r["score"] for r in rows]
    assert result["avg@8"] == pytest.approx(sum(scores) / len(scores))
    assert result["pass@1"] == pytest.approx(result["avg@8"])
    assert 0.02 < result["avg@8"] < 0.3
    assert result["pass@8"] > result["avg@8"]
    greedy = [r["score"] for r in rows_of(tmp_path, "greedy_chainsum")]
    assert len(greedy) == 40
    assert result["greedy"] == sum(greedy) / 40
    shown = re.search(r"chainsum +(\S+) ± (\S+) +(\S+) +(\S+) +(\S+)", out)
    numbers = [100 * result[key] for key in ("avg@8", "se", "pass@1", "pass@8", "greedy")]
    assert [float(text) for text in shown.groups()] == pytest.approx(numbers, abs=0.051)


def edited(run, tmp_path, **flags):
    """A copy of the run, with other flags in its config.json."""
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | flags))
    return tmp_path / "run"


def test_length_and_task_of_the_run_are_the_defaults(run, call, refused, tmp_path):
    copy = edited(run, tmp_path, max_new_tokens=2)
    call("--limit", 5, "--n", 2, checkpoint=copy)
    assert max(r["length"] for r in rows_of(copy)) == 2  # and the results lie in the run
    assert not list(copy.glob(".*"))  # nothing half-written is left behind
    shutil.rmtree(copy)
    copy = edited(run, tmp_path, eval_data="countdown")
    assert "countdown-test-0" in refused("--template", "none", checkpoint=copy)
    shutil.rmtree(copy)
    assert "this tokenizer has none" in refused(checkpoint=edited(run, tmp_path, template="chat"))


def test_a_run_on_a_file_is_asked_what_it_was_not_trained_on(run, call, tmp_path):
    """A file has no test split: train.py holds a tenth back. By name, the file is asked whole."""
    rows = [{"prompt": f"{i:06d}=", "answer": i % 10, "task": "chainsum"} for i in range(30)]
    file = write(tmp_path / "chainsum.jsonl", rows)
    copy = edited(run, tmp_path, data=str(file))
    call("--n", 1, checkpoint=copy)
    assert [r["id"] for r in rows_of(copy)] == ["chainsum-2", "chainsum-12", "chainsum-22"]
    assert results_of(copy)["chainsum"]["source"] is None
    call("--n", 1, "--tasks", file, "--out", tmp_path / "whole", checkpoint=copy)
    assert len(rows_of(tmp_path / "whole")) == 30


@pytest.mark.parametrize("flags, says", [
    ({"data": ["x"]}, "unknown dataset"),
    ({"template_args": 5}, "template_args cannot be 5"),
    ({"turns": "12"}, "config.json: turns cannot be '12'"),
])
def test_a_run_of_a_stranger(run, refused, tmp_path, flags, says):
    """Flags of the wrong kind are one line: no traceback, and no task that nobody asked for."""
    assert says in refused("--max_new_tokens", 9, checkpoint=edited(run, tmp_path, **flags))


def test_a_model_of_the_hub_has_nothing_to_do_with_the_directory_we_are_in(run, monkeypatch):
    monkeypatch.chdir(run)
    args = evaluation.parse(["owner/name"])
    assert evaluation.origin(args) is evaluation.USUAL
    assert args.template == "auto" and args.out == Path("runs/eval-owner--name")


def test_a_checkpoint_inside_a_run_is_evaluated_like_the_run(run, call, tmp_path):
    call("--out", tmp_path / "a", "--limit", 5)
    call("--out", tmp_path / "b", "--limit", 5, checkpoint=run / "step-000003")
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


def test_a_lora_adapter_is_evaluated_like_the_merged_checkpoint(run, call, tmp_path):
    """Each is asked the run's own questions, under its template."""
    model = Model.from_config(run)
    model.add_lora(4, 8, model.source)
    model.to_empty(device="cpu").load_weights()
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for p in model.adapters().values():
            p.normal_(std=0.2, generator=g)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    step = tmp_path / "run/step-000004"
    model.save_pretrained(step)
    call("--out", tmp_path / "base", "--limit", 5)
    for name, checkpoint in (("merged", step), ("adapter", step / "adapter")):
        call("--out", tmp_path / name, "--limit", 5, checkpoint=checkpoint)

    def responses(name):
        return [r["response"] for r in rows_of(tmp_path / name)]
    assert responses("base") != responses("merged") == responses("adapter")


@pytest.fixture
def whole(call, tmp_path, monkeypatch):
    """A finished evaluation of 24 questions with 4 responses each."""
    monkeypatch.setattr(evaluation, "BATCH", 16)
    call("--out", tmp_path / "whole", "--limit", 24, "--n", 4)
    return tmp_path / "whole"


def same(a, b):
    for file in ("samples_chainsum.jsonl", "greedy_chainsum.jsonl"):
        assert (a / file).read_bytes() == (b / file).read_bytes()
    assert results_of(a) == results_of(b)


@pytest.mark.parametrize("batch", [1, 16, 1000])
def test_batches_change_no_token(call, whole, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(evaluation, "BATCH", batch)
    call("--out", tmp_path / "b", "--limit", 24, "--n", 4)
    same(whole, tmp_path / "b")


def test_another_seed_is_another_sample(call, whole, tmp_path):
    call("--out", tmp_path / "b", "--limit", 24, "--n", 4, "--seed", 1)
    a, b = rows_of(whole), rows_of(tmp_path / "b")
    assert [r["response"] for r in a] != [r["response"] for r in b]
    assert rows_of(whole, "greedy_chainsum") == rows_of(tmp_path / "b", "greedy_chainsum")


def test_stopped_in_the_middle_and_started_again(call, refused, whole, tmp_path, monkeypatch):
    """Ctrl-C in the third batch: two are on disk, the second call samples the rest only."""
    asked = []
    real = evaluation.generate

    def generate(model, prompts, *args, **kw):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return real(model, prompts, *args, **kw)
    monkeypatch.setattr(evaluation, "generate", generate)
    flags = ("--out", tmp_path / "b", "--limit", 24, "--n", 4)
    assert "the same command goes on" in refused(*flags)
    assert len(rows_of(tmp_path / "b")) == 32
    assert not (tmp_path / "b" / "results.json").exists()

    def counted(model, prompts, *args, **kw):
        asked.append(len(prompts))
        return real(model, prompts, *args, **kw)
    monkeypatch.setattr(evaluation, "generate", counted)
    assert "samples_chainsum.jsonl: 32 of 96 responses are there already" in call(*flags)
    assert sum(asked[2:]) == 24 - 8 + 24  # sixteen questions, and the greedy pass
    same(whole, tmp_path / "b")


@pytest.mark.parametrize("keep", [0.03, 0.5, 0.99])
def test_a_half_written_line_is_dropped(call, whole, tmp_path, keep):
    """kill -9 while a line is written; a question with some of its samples is sampled anew."""
    (tmp_path / "b").mkdir()
    for file in ("samples_chainsum.jsonl", "greedy_chainsum.jsonl"):
        text = (whole / file).read_bytes()
        (tmp_path / "b" / file).write_bytes(text[:int(keep * len(text))])
    out = call("--out", tmp_path / "b", "--limit", 24, "--n", 4)
    same(whole, tmp_path / "b")
    assert "kept as" not in out
    assert len(list((tmp_path / "b").iterdir())) == 3


def nothing_is_sampled(*args, **kw):
    raise AssertionError("sampled again")


def test_responses_are_kept_and_graded_anew(call, whole, monkeypatch):
    """Neither a repaired grader nor a corrected answer costs a second sampling."""
    rows = rows_of(whole)
    right = rows[5]["answer"]["answer"]
    rows[5] |= {"response": f"#{right}$", "score": 0.0, "status": "error"}
    for r in rows[8:12]:
        r["answer"] = {"answer": "corrected since"}
    write(whole / "samples_chainsum.jsonl", rows)
    monkeypatch.setattr(evaluation, "generate", nothing_is_sampled)
    call("--out", whole, "--limit", 24, "--n", 4)
    again = rows_of(whole)
    assert (again[5]["score"], again[5]["status"]) == (1.0, "ok")
    assert again[8]["answer"] != {"answer": "corrected since"}
    assert [r["response"] for r in again] == [r["response"] for r in rows]


def test_a_smaller_limit_loses_nothing_a_larger_one_continues(call, whole, tmp_path, monkeypatch):
    before = rows_of(whole)
    with monkeypatch.context() as m:
        m.setattr(evaluation, "generate", nothing_is_sampled)
        call("--out", whole, "--limit", 10, "--n", 4)
    assert results_of(whole)["chainsum"]["questions"] == 10
    assert rows_of(whole) == before
    call("--out", whole, "--limit", 30, "--n", 4)
    call("--out", tmp_path / "b", "--limit", 30, "--n", 4)
    same(whole, tmp_path / "b")


@pytest.mark.parametrize("flags", [
    ("--temperature", 0.7),
    ("--top_p", 0.5),
    ("--max_new_tokens", 5),
    ("--seed", 3),
])
def test_responses_of_other_flags_are_set_aside_not_mixed_and_not_lost(call, whole, flags):
    old = (whole / "samples_chainsum.jsonl").read_bytes()
    flags = ("--out", whole, "--limit", 24, "--n", 4, *flags)
    out = call(*flags)
    assert "kept as samples_chainsum.jsonl.1" in out
    assert (whole / "samples_chainsum.jsonl.1").read_bytes() == old
    assert rows_of(whole)[0]["run"] not in old.decode()
    call("--out", whole, "--limit", 24, "--n", 4)  # back again: the second one does not go either
    assert (whole / "samples_chainsum.jsonl.1").read_bytes() == old
    assert (whole / "samples_chainsum.jsonl.2").exists()
    assert (whole / "samples_chainsum.jsonl").read_bytes() == old


def test_responses_of_other_weights_are_set_aside(run, call, tmp_path):
    """The run went on training: same directory, same flags, other model."""
    copy = edited(run, tmp_path)
    call("--limit", 3, checkpoint=copy)
    old = rows_of(copy)
    model = Model.from_pretrained(copy / "step-000003")
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-4
    model.save_pretrained(copy / "step-000006")
    (copy / "latest").write_text("step-000006")
    assert "kept as samples_chainsum.jsonl.1" in call("--limit", 3, checkpoint=copy)
    assert rows_of(copy)[0]["run"] != old[0]["run"]


def test_other_questions_under_the_same_name_cost_no_response(call, tmp_path):
    """The third question of a file was reworded: all responses are kept, under another name."""
    questions = [{"prompt": f"12345{i}=", "answer": "1", "task": "chainsum"} for i in range(4)]
    file = write(tmp_path / "mine.jsonl", questions)
    call("--tasks", file, "--out", tmp_path, "--n", 2)
    old = (tmp_path / "samples_mine.jsonl").read_text()
    questions[2]["prompt"] = "777777="
    write(file, questions)
    out = call("--tasks", file, "--out", tmp_path, "--n", 2)
    assert "kept as samples_mine.jsonl.1" in out
    assert "kept as greedy_mine.jsonl.1" in out
    assert (tmp_path / "samples_mine.jsonl.1").read_text() == old
    assert rows_of(tmp_path, "samples_mine")[4]["prompt"] == "777777="


@pytest.mark.parametrize("line", [
    "5",
    "[1]",
    "null",
    "no JSON",
    '{"run": "x/../../victim"}',
    '{"run": 7}',
    "[" * 99_999,
])
def test_sample_files_of_strangers(call, whole, line):
    """Whatever stands there is set aside: a `run` once named a file outside that was replaced."""
    file = whole / "samples_chainsum.jsonl"
    good = file.read_text()
    lines = good.splitlines()
    if line.startswith("{"):
        line = json.dumps(json.loads(lines[1]) | json.loads(line))
    lines[1] = line
    file.write_text("\n".join(lines))
    call("--out", whole, "--limit", 24, "--n", 4)
    assert file.read_text() == good
    assert (whole / "samples_chainsum.jsonl.1").exists()
    assert not list(whole.parent.glob("*victim*"))


def test_nothing_is_written_through_a_link(call, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("results.json", "samples_chainsum.jsonl", "greedy_chainsum.jsonl"):
        (out / name).symlink_to(victim)
        (out / f".{name}").symlink_to(victim)
    call("--out", out, "--limit", 2, "--n", 2)
    assert victim.read_text() == "precious"
    assert not (out / "results.json").is_symlink()
    assert len(rows_of(out)) == 4


def test_greedy_alone_is_the_greedy_pass(call, whole, tmp_path):
    assert "n 1, k [1], top_p 1.0" in call("--greedy", "--out", tmp_path / "g", "--limit", 24)
    a, b = rows_of(tmp_path / "g"), rows_of(whole, "greedy_chainsum")
    assert [r["response"] for r in a] == [r["response"] for r in b]
    result = results_of(tmp_path / "g")["chainsum"]
    assert result["avg@1"] == result["greedy"] == results_of(whole)["chainsum"]["greedy"]
    assert not (tmp_path / "g" / "greedy_chainsum.jsonl").exists()


def test_repeated_questions_are_sampled_apart(call, tmp_path):
    """Two questions of one text must not get the same responses: errors would be too small."""
    question = {"prompt": "123456=", "answer": "1", "task": "chainsum", "group": "g"}
    file = write(tmp_path / "mine.jsonl", [question | {"id": "a"}, question | {"id": "b"}])
    call("--tasks", f"{file},chainsum", "--limit", 2, "--out", tmp_path, "--temperature", 3)
    rows, result = rows_of(tmp_path, "samples_mine"), results_of(tmp_path)
    assert list(result) == ["mine", "chainsum"]
    assert result["mine"]["se"] is None  # one cluster
    responses = [r["response"] for r in rows]
    assert responses[:8] != responses[8:]


def test_acpo_compat_reaches_the_grader_of_math_only():
    answer = {"answer": "4"}
    rows = [row(response="4", answer=answer, task=task) for task in ("math", "chainsum")]
    for flags, scores in (([], [0, 0]), (["--acpo_compat"], [1, 0])):
        args = evaluation.parse(["x", *flags])
        with rewards.Scorer(workers=1) as scorer:
            assert [r["score"] for r in evaluation.graded(rows, scorer, args)] == scores


def test_list_names_every_task_of_every_suite(call, capsys):
    with pytest.raises(SystemExit) as stop:
        call("--list", checkpoint=None)
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for name in sum(evaluation.SUITES.values(), []):
        assert name in out
        assert name.startswith("rg:") or name in data.TASKS or "test" in data.SOURCES[name]


# ---- A model that answers like a chat model ------------------------------------------------------

CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{{ mark|default('say') }}{% endif %}")


@pytest.fixture
def chatty(tmp_path):
    """A checkpoint that always says <answer>4</answer><|im_end|> and goes on; its config.json
    calls <|endoftext|> the end, and the tags are special tokens."""
    from safetensors.torch import load_file, save_file
    from test_data import byte_tokenizer
    tokenizer = byte_tokenizer(CHAT, special=["<answer>", "</answer>"])
    words = ["y", "<answer>", "4", "</answer>", "<|im_end|>", "!", "!"]
    says = tokenizer.convert_tokens_to_ids(words)
    raw = RAW | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
                 "tie_word_embeddings": False, "max_position_embeddings": 512}
    Model.from_scratch(raw, 0).save_pretrained(tmp_path / "chatty")
    tokenizer.save_pretrained(tmp_path / "chatty")
    weights = load_file(tmp_path / "chatty" / "model.safetensors")
    for name in weights:
        if any(part in name for part in ("o_proj", "down_proj", "embed_tokens", "lm_head")):
            weights[name].zero_()  # the next token is a function of the last one alone
    for i, (now, then) in enumerate(zip(says, says[1:])):
        weights["model.embed_tokens.weight"][now, i] = 1
        weights["lm_head.weight"][then, i] = 30
    save_file(weights, tmp_path / "chatty" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "chatty"


def test_ends_and_tags_of_chat_models(call, chatty, tmp_path):
    """It ends at <|im_end|>, which config.json does not name; its tags reach the grader."""
    file = write(tmp_path / "q.jsonl", [{"question": "2+2?", "answer": "4", "task": "qa"}])
    flags = ("--tasks", file, "--n", 2, "--max_new_tokens", 9)
    assert "template chat" in call(*flags, checkpoint=chatty)
    for r in rows_of(chatty, "samples_q"):
        assert r["response"] == "<answer>4</answer>"
        assert r["finished"] and r["score"] == 1.0
        assert r["length"] == 4
        assert r["prompt"].startswith("<|im_start|>user\n2+2?")
    out = call(*flags, "--template_args", "mark=x", checkpoint=chatty)
    assert rows_of(chatty, "samples_q")[0]["prompt"].endswith("<|im_start|>x")
    assert "template_args ['mark=x']" in out
    assert "kept as samples_q.jsonl.1" in out


def test_reasoning_gym_as_a_task(call, chatty):
    pytest.importorskip("reasoning_gym")
    call("--tasks", "rg:chain_sum", "--data_args", "min_terms=2", "max_terms=2", "--limit", 3,
         "--n", 1, "--max_new_tokens", 9, checkpoint=chatty)
    rows = rows_of(chatty, "samples_rg-chain_sum")
    assert len(rows) == 3
    for r in rows:
        assert r["status"] == "ok"
        assert r["prompt"].count(" + ") + r["prompt"].count(" - ") == 1
    assert list(results_of(chatty)) == ["rg-chain_sum"]


# ---- Bad input: one line, before any sampling ----------------------------------------------------

@pytest.mark.parametrize("flags, says", [
    (["--tasks", "chainsm"], "did you mean chainsum?"),
    (["--tasks", "chainsum,countdwn"], "mean countdown"),
    (["--suite", "maths"], "choose from"),
    (["--temprature", "1"], "did you mean --temperature"),
    (["--checkpoint", "other"], "unknown flag '--checkpoint'"),
    (["--lisst"], "mean --list"),
    (["--n", "0"], "0 must be at least 1"),
    (["--n", "many"], "argument --n"),
    (["--limit", "-3"], "at least 1"),
    (["--k", "9"], "--k 9"),
    (["--k", "1,x"], "--k 1,x"),
    (["--k", "0"], "--k 0"),
    (["--max_new_tokens", "0"], "--max_new_tokens"),
    (["--threads", "0"], "--threads"),
    (["--temperature", "-1"], "--temperature -1"),
    (["--temperature", "nan"], "--temperature nan"),
    (["--temperature", "0"], "say --greedy"),
    (["--top_p", "0"], "--top_p"),
    (["--top_p", "1.5"], "--top_p 1.5"),
    (["--template", "orc"], "did you mean orz"),
    (["--template", "chat"], "this tokenizer has none"),
    (["--template_args", "thinking"], "--template_args thinking: write name=value"),
    (["--tasks", "countdown"], "(prompt of countdown-test-0)"),
    (["--max_new_tokens", "255"], "the prompt of chainsum-test-0 has 7 tokens, allowed: 1 to 1"),
    (["--tasks", "no/such.jsonl"], "No such file"),
])
def test_bad_flags(refused, tmp_path, monkeypatch, flags, says):
    monkeypatch.setattr(evaluation, "generate", nothing_is_sampled)
    assert says in refused("--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_no_checkpoint_at_all(refused, run, tmp_path):
    assert "required: checkpoint" in refused(checkpoint=None)
    assert "no such directory" in refused(checkpoint=tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: no model.safetensors here" in refused(checkpoint=empty)
    shutil.copy(run / "config.json", empty)
    (empty / "latest").write_text("step-000009")  # deleted by the run, meanwhile
    assert "step-000009: no such directory" in refused(checkpoint=empty)
    (empty / "config.json").write_text("{")
    assert "config.json: JSONDecodeError" in refused(checkpoint=empty)


@pytest.mark.parametrize("lost, says", [
    ("tokenizer", "no tokenizer there"),
    ("model", "safetensors"),
    ("config", "config.json"),
])
def test_a_checkpoint_that_lacks_a_part(refused, run, tmp_path, lost, says):
    shutil.copytree(run / "step-000003", tmp_path / "ckpt")
    for file in (tmp_path / "ckpt").glob(f"{lost}*"):
        file.unlink()
    assert says in refused("--tasks", "chainsum", checkpoint=tmp_path / "ckpt")


def test_weights_that_are_not_finite(refused, run, tmp_path):
    model = Model.from_pretrained(run / "step-000003")
    with torch.no_grad():
        model.embed_tokens.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "ckpt")
    assert "embed_tokens" in refused("--tasks", "chainsum", checkpoint=tmp_path / "ckpt")


def test_bad_files(refused, tmp_path):
    (tmp_path / "gap.jsonl").write_text('{"prompt": "1=", "answer": "1"}\n{"prompt": "2="}')
    assert "gap.jsonl line 2: no answer" in refused("--tasks", tmp_path / "gap.jsonl")
    write(tmp_path / "bad.jsonl", [{"prompt": "1=", "answer": "x" * 5000}])
    assert "1 of 1 answers cannot be graded" in refused("--tasks", tmp_path / "bad.jsonl")
    write(tmp_path / "two.json", [{"prompt": "1=", "answer": "1", "task": "chainsum"}])
    shutil.copy(tmp_path / "two.json", tmp_path / "two.jsonl")
    twins = f"{tmp_path / 'two.json'},{tmp_path / 'two.jsonl'}"
    assert "samples_two.jsonl is another task's" in refused("--tasks", twins)
    (tmp_path / "results.json").write_text("{}")
    assert "results.json" in refused("--out", tmp_path / "results.json" / "sub")


# ---- The real command ----------------------------------------------------------------------------

def command(flags, directory, launcher=()):
    words = [sys.executable, *launcher, ROOT / "eval.py", *flags]
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(word) for word in words], cwd=directory, env=environment,
                          capture_output=True, text=True)


def test_the_command_itself(run, tmp_path):
    """From another directory; and no bar in a log file."""
    done = command([run, "--limit", 4, "--out", tmp_path], tmp_path)
    assert done.returncode == 0 and "pass@8" in done.stdout, done.stderr
    assert f"microscope.py {tmp_path}/samples_chainsum.jsonl" in done.stdout
    assert "%|" not in done.stderr


def test_an_error_cannot_move_the_cursor(refused):
    assert refused("--k", "9\x1b[2J\r\nx").startswith("eval.py: --k 9[2J")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(call, run, whole, tmp_path):
    """torchrun spreads the questions; also it continues what one process began."""
    text = (whole / "samples_chainsum.jsonl").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "samples_chainsum.jsonl").write_bytes(text[:len(text) // 3])
    for out in ("a", "b"):
        launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 --".split()
        flags = [run, "--limit", 24, "--n", 4, "--out", tmp_path / out]
        done = command(flags, tmp_path, launcher)
        assert done.returncode == 0 and done.stdout.count("pass@4") == 1, done.stderr
        same(whole, tmp_path / out)
