"""train.py as people run it: it learns, resumes bit for bit, splits work without changing it, and says what is wrong."""
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import losses
import train

ROOT = Path(__file__).parent.parent
TINY = "--width 16 --layers 1 --skill_steps 0 --prompts 4 --samples 4 --updates 2 --eval_problems 8 --steps 2".split()
TIMING = {"rollout_tps", "update_tps", "seconds"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*flags) -> run directory name: train.main() in this process, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.curves.draw", lambda out: None)  # a second each; the runs of `learned` draw
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()
        return tmp_path
    yield call
    for s, h in handlers.items():
        signal.signal(s, h)


def shell(*args, cwd, **kw):
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, **kw)


def metrics(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def untimed(run_dir):
    return [{k: v for k, v in m.items() if k not in TIMING} for m in metrics(run_dir)]


def weights(run_dir):
    run_dir = Path(run_dir)
    return load_file(run_dir / (run_dir / "latest").read_text() / "model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- it learns -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """The default run, cut to 25 steps."""
    cwd = tmp_path_factory.mktemp("learned")
    out = shell(ROOT / "train.py", "--steps", 25, "--eval_problems", 256, cwd=cwd)
    assert out.returncode == 0, out.stderr[-2000:]
    return cwd, out


def test_the_default_run_learns_from_the_reward_alone(learned):
    cwd, out = learned
    lines = metrics(cwd / "runs/default")
    assert lines[0]["eval"] <= 0.40 and lines[-1]["eval"] >= 0.75
    assert lines[0]["length"] < 5 and lines[-1]["length"] > 9  # because it learned to work things out
    assert all(m["sampler_kl"] < 1e-6 and m["reward"] is not None for m in lines)
    assert "held-out accuracy" in out.stdout and "runs/default" in out.stdout.splitlines()[-1]
    for file in ("config.json", "curves.png", "latest", "step-000025/model.safetensors", "step-000025/tokenizer.json"):
        assert (cwd / "runs/default" / file).is_file(), file


def test_metrics_have_every_key_in_every_line(learned):
    lines = metrics(learned[0] / "runs/default")
    assert [m["step"] for m in lines] == list(range(1, 26)) and len({tuple(m) for m in lines}) == 1
    required = ("step reward eval length entropy clip_low clip_high ratio_std grad_norm zero_groups truncated sampler_kl "
                "rollout_tps update_tps seconds")
    assert set(required.split()) <= set(lines[0])
    assert [m["step"] for m in lines if m["eval"] is not None] == [1, 10, 20, 25]


def test_a_second_run_takes_the_next_name_and_the_cached_warm_start(learned):
    cwd, _ = learned
    before = {p: p.stat().st_mtime for p in (cwd / "runs/warmstart").iterdir()}
    out = shell(ROOT / "train.py", "--steps", 1, "--eval_problems", 8, cwd=cwd)
    assert out.returncode == 0 and (cwd / "runs/default-2/metrics.jsonl").is_file()
    assert {p: p.stat().st_mtime for p in (cwd / "runs/warmstart").iterdir()} == before and "warm start" not in out.stderr


def test_the_checkpoint_loads_in_transformers(learned):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from model import Model
    path = learned[0] / "runs/default/step-000025"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = tokenizer("314159=", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, Model.from_pretrained(path)(ids))
    out = theirs.generate(ids, do_sample=False, max_new_tokens=20)
    assert tokenizer.decode(out[0, 7:]).endswith("$")


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_every_loss_runs(run, name):
    cwd = run(*TINY, "--loss", name, "--out", "r")
    lines = metrics(cwd / "r")
    assert len(lines) == 2 and all(m["grad_norm"] is not None and m["skipped"] == 0 for m in lines)


@pytest.mark.parametrize("flags", [
    ("--samples", 1), ("--prompts", 1), ("--prompts", 1, "--samples", 1, "--updates", 1), ("--max_new_tokens", 1),
    ("--updates", 16), ("--updates", 3), ("--tokens_per_microbatch", 1), ("--epochs", 2), ("--temperature", 0.7),
    ("--kl_beta", 0.1), ("--recompute", "True"), ("--steps", 1), ("--warmup", 5), ("--loss_args", "alpha=2", "dual_clip=None"),
    ("--acpo_stats", "micro", "--tokens_per_microbatch", 40), ("--loss", "wapo", "--advantage", "rloo", "--agg", "token-mean")])
def test_edges_run(run, flags):
    cwd = run(*TINY, *flags, "--out", "r")
    assert all(abs(m["sampler_kl"]) < 1e-6 and m["skipped"] == 0 for m in metrics(cwd / "r"))


@pytest.mark.parametrize("task", ["chainsum", "add", "countdown", "minitable", "kk"])
def test_every_procedural_task_runs(run, task):
    """From its own tokenizer, written and read back, through demonstrations, sampling and grading."""
    cwd = run(*TINY, "--data", task, "--skill_steps", 2, "--habit_steps", 1, "--max_new_tokens", 20, "--out", "r")
    import data
    path = next((cwd / "runs/warmstart").iterdir())
    text = data.load(task, "train", 1)[0].prompt
    assert data.load_tokenizer(path).decode(data.load_tokenizer(path).encode(text)) == text
    assert all(m["skipped"] == 0 for m in metrics(cwd / "r"))


def test_equal_rewards_change_nothing(run):
    """A full batch of identical rewards (nobody is right at one token): gradient exactly zero, weights stay, no nan."""
    cwd = run(*TINY, "--max_new_tokens", 1, "--weight_decay", 0, "--out", "r")
    lines = metrics(cwd / "r")
    assert all(m["reward"] == 0 and m["grad_norm"] == 0 and m["zero_groups"] == 1 and m["truncated"] > 0 for m in lines)
    start = load_file(next((cwd / "runs/warmstart").iterdir()) / "model.safetensors")
    assert all(torch.equal(v, start[k]) for k, v in weights(cwd / "r").items())


# ---- stopping and going on -------------------------------------------------------------------------------------------------

def test_two_and_two_steps_are_four(run):
    cwd = run(*TINY, "--steps", 4, "--out", "whole")
    run(*TINY, "--steps", 2, "--out", "parts")
    run("--out", "parts", "--resume", "--steps", 4)  # the run's own flags need not be repeated
    assert untimed(cwd / "parts") == untimed(cwd / "whole") and same_weights(cwd / "parts", cwd / "whole")


def test_evaluation_does_not_touch_training(run):
    cwd = run(*TINY, "--steps", 4, "--eval_every", 1, "--out", "often")
    run(*TINY, "--steps", 4, "--eval_every", 100, "--out", "seldom")
    assert same_weights(cwd / "often", cwd / "seldom")


def start(cwd, *flags):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1"))


def wait_for_lines(path, count):
    for _ in range(600):
        if path.is_file() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never got {count} lines")


def test_killed_and_terminated_runs_go_on_bit_for_bit(run, tmp_path):
    flags = [*TINY, "--steps", 12, "--save_every", 3]
    run(*flags, "--out", "whole")
    p = start(tmp_path, *flags, "--out", "killed")
    wait_for_lines(tmp_path / "killed/metrics.jsonl", 5)
    p.kill()
    p.wait()
    path = tmp_path / "killed/metrics.jsonl"
    inode = path.stat().st_ino
    p = start(tmp_path, "--out", "killed", "--resume")
    while path.stat().st_ino == inode and p.poll() is None:  # until it has been rewound, which replaces the file
        time.sleep(0.02)
    wait_for_lines(path, len(path.read_text().splitlines()) + 1)  # a new line: the loop runs, signals are handled
    p.terminate()  # finishes the step, saves, says how to go on
    said = p.communicate(timeout=60)[0]
    done = len(metrics(tmp_path / "killed"))
    assert p.returncode == 0 and (done == 12 or "--resume" in said.splitlines()[-1])
    if done < 12:
        run("--out", "killed", "--resume")
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole") and same_weights("killed", "whole")
    assert len(list((tmp_path / "killed").glob("step-*"))) == 2 and not list((tmp_path / "killed").glob(".step*"))


# ---- the same numbers, however the work is split ---------------------------------------------------------------------------

def torchrun(cwd, processes, *flags):
    out = shell("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", ROOT / "train.py", *flags, cwd=cwd)
    assert out.returncode == 0, out.stderr[-3000:]
    return out


def test_two_processes_equal_one(run, tmp_path):
    """Same rollouts, same metrics, parameters after 3 steps equal to 1e-5: FSDP2 over gloo, 5 prompts on 2 ranks."""
    flags = [*TINY, "--steps", 3, "--prompts", 5, "--tokens_per_microbatch", 60]
    run(*flags, "--out", "one")
    out = torchrun(tmp_path, 2, *flags, "--out", "two")
    for a, b in zip(untimed("one"), untimed("two")):
        for k in a:
            assert a[k] == b[k] or a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6), (a["step"], k)
    a, b = weights("one"), weights("two")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5
    assert out.stdout.count("held-out accuracy") == 1  # rank 0 speaks
    run("--out", "two", "--resume", "--steps", 4)  # on another number of ranks
    assert [m["step"] for m in metrics("two")] == [1, 2, 3, 4]


def rows_for(cfg, count=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        n, p = int(torch.randint(1, 12, (1,), generator=g)), int(torch.randint(1, 6, (1,), generator=g))
        tokens = torch.randint(0, 16, (p + n,), generator=g).tolist()
        score = float(i % 3 == 0)
        rows.append(train.Row(tokens, p, (-torch.rand(n, generator=g) * 3).tolist(), True, score, "ok", i // cfg.samples))
    return rows


def gradients(name, budget, rows, **kw):
    cfg = train.Config(loss=name, samples=4, tokens_per_microbatch=budget, max_new_tokens=16, clip_norm=1e9, **kw)
    from model import Model
    model = Model.from_scratch(dict(model_type="qwen2", vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                    num_attention_heads=2, initializer_range=0.3, tie_word_embeddings=True), 1)
    seen = {}

    class Keep:  # an optimizer that keeps the gradients and does nothing
        def step(self):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters()})

        def zero_grad(self):
            model.zero_grad()
    scores = torch.tensor([r.score for r in rows])
    for r, a in zip(rows, losses.advantages(scores, 4, "grpo").tolist()):
        r.A, r.pass_rate = a, scores.view(-1, 4).mean(1)[r.group].item()
    train.update(model, None, Keep(), rows, cfg, None, defaultdict(float), True)
    return seen


BATCH_STATISTICS = {"bapo", "m2po", "clip_cov", "kl_cov"}  # say so in their docstrings; acpo is not one of them here


@pytest.mark.parametrize("name", sorted(set(losses.OBJECTIVES) - BATCH_STATISTICS))
def test_micro_batches_change_nothing(name):
    """Gradients of one pass over 12 ragged responses, and of passes of at most 30 and 1 tokens, to 1e-6."""
    cfg = train.Config(samples=4)
    whole = gradients(name, 10**6, rows_for(cfg))
    assert max(g.abs().max() for g in whole.values()) > 0
    for budget in (30, 1):
        split = gradients(name, budget, rows_for(cfg))
        for k in whole:
            assert torch.allclose(whole[k], split[k], rtol=1e-5, atol=1e-6), (budget, k)


def test_official_acpo_depends_on_the_split():
    """--acpo_stats micro is the official run, whose algorithm changes with the micro-batch size: the flag does something."""
    cfg = train.Config(samples=4)
    a, b = (gradients("acpo", n, rows_for(cfg), acpo_stats="micro") for n in (10**6, 30))
    assert max((a[k] - b[k]).abs().max() for k in a) > 1e-4


def test_eos_gets_gradient_and_token_values_do_not_matter():
    """The stop token is trained (peers dropped it), and masks come from lengths: a pad id inside a response or as its EOS
    counts like any other token."""
    cfg = train.Config(loss="gpg", samples=4, max_new_tokens=16)
    from model import Model
    model = Model.from_scratch(dict(model_type="qwen2", vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                    num_attention_heads=2, initializer_range=0.3, pad_token_id=3, eos_token_id=3), 1)
    row = train.Row([5, 6, 3, 7, 3], 2, [-1.0, -1.0, -1.0], True, 1.0, "ok")
    mask, old, logp, _, _ = train.token_stats(model, [row, train.Row([5, 6, 8], 2, [-1.0], True, 0.0, "ok")], cfg)
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    z = model(torch.tensor([[5, 6, 3, 7, 3]]))[0].log_softmax(-1)
    assert torch.allclose(logp[0], torch.stack([z[1, 3], z[2, 7], z[3, 3]]), atol=1e-5)
    losses.policy_loss("gpg", logp, old, torch.tensor([1.0, -1.0]), mask)[0].backward()
    assert model.lm_head.weight.grad[3].abs().max() > 0


def test_groups_never_mix(run, monkeypatch):
    """Rows come back problem-major with their own problem's reward, whatever order they were sampled in."""
    seen = []
    real = train.learn

    def spy(model, reference, optimizer, rows, cfg):
        out = real(model, reference, optimizer, rows, cfg)
        seen.append(rows)
        return out
    monkeypatch.setattr(train, "learn", spy)
    run(*TINY, "--out", "r", "--temperature", "1.5")
    for rows in seen:
        for i in range(0, len(rows), 4):
            group = rows[i:i + 4]
            assert len({tuple(r.tokens[:r.prompt_len]) for r in group}) == 1 and len({r.group for r in group}) == 1
            A = losses.advantages(torch.tensor([r.score for r in group]), 4, "grpo")
            assert torch.allclose(torch.tensor([r.A for r in group]), A)


def test_minibatches_partition_the_rollout():
    for prompts, samples, updates in ((5, 4, 2), (5, 4, 5), (5, 4, 7), (3, 1, 3), (1, 6, 4)):
        cfg = train.Config(prompts=prompts, samples=samples, updates=updates)
        rows = [train.Row([1, 2], 1, [0.0], True, 0.0, "ok", i // samples) for i in range(prompts * samples)]
        batches = train.minibatches(rows, cfg)
        assert len(batches) == updates and all(batches) and [id(r) for b in batches for r in b] == [id(r) for r in rows]
        if updates <= prompts:
            assert all(len(b) % samples == 0 for b in batches)  # whole groups


def test_microbatches_respect_the_budget(monkeypatch):
    rows = [train.Row([0] * n, 1, [], True, 0.0, "ok") for n in (3, 50, 7, 7, 9, 30, 2, 2, 2, 41)]
    for world in (1, 2, 3):
        monkeypatch.setattr(train, "WORLD", world)
        for budget in (1, 20, 60, 1000):
            bins = train.microbatches(rows, budget)
            assert len(bins) % world == 0 and sorted(id(r) for b in bins for r in b) == sorted(map(id, rows))
            assert all(len(b) < 2 or sum(len(r.tokens) for r in b) <= budget for b in bins)


# ---- what is wrong, in one line --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, said", [
    (("--loss", "acpoo"), "acpo"), (("--los", "acpo"), "--loss"), (("--data", "chainsun"), "chainsum"),
    (("--steps", "many"), "--steps"), (("--prompts", 0), "--prompts 0"), (("--updates", 100), "--updates 100"),
    (("--loss_args", "alhpa=2"), "alpha"), (("--loss_args", "alpha"), "name=value"), (("--loss_args", "alpha=abc"), "acpo cannot use that"), (("--agg", "mean"), "token-mean"),
    (("--advantage", "gae"), "gae"), (("--model", "no/where/at/all"), "no such directory"), (("--model", "."), "config.json"),
    (("--template", "orzz"), "orz"), (("--data", "noanswer.jsonl"), "needs --model"), (("--lr", 0), "--lr"), (("--eval_data", "missing.jsonl"), "missing.jsonl"),
    (("--eval_data", "noanswer.jsonl"), "noanswer.jsonl line 2"), (("--eval_data", "empty.jsonl"), "empty.jsonl"),
    (("--max_prompt_tokens", 3), "--max_prompt_tokens 3"), (("--out", "full"), "--resume"), (("--out", "blocked/x"), "blocked"),
    (("--resume", "--out", "never"), "no run to continue"), (("--acpo_stats", "all"), "--acpo_stats")])
def test_bad_input_is_one_line_and_nothing_is_lost(run, tmp_path, capsys, flags, said):
    (tmp_path / "noanswer.jsonl").write_text('{"prompt": "1", "answer": "2"}\n{"prompt": "1"}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blocked").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/config.json").write_text("{}")
    with pytest.raises(SystemExit) as e:
        run(*TINY, *flags)
    message = str(e.value.code)
    assert message.startswith("train.py: ") and said in message and "\n" not in message
    assert (tmp_path / "full/config.json").read_text() == "{}" and (tmp_path / "blocked").read_text() == "a file"


def test_nonfinite_gradients_are_skipped_then_stop_the_run(run, monkeypatch):
    real = losses.policy_loss
    monkeypatch.setattr(losses, "policy_loss", lambda *a, **k: (real(*a, **k)[0] * float("nan"), real(*a, **k)[1])
                        if len(a[1]) > 1 else real(*a, **k))
    with pytest.raises(SystemExit, match="not finite"):
        run(*TINY, "--steps", 9, "--out", "r", "--samples", 8)
    lines = metrics("r")
    assert len(lines) == 3 and all(m["skipped"] == 2 for m in lines) and Path("r/nonfinite-3.json").is_file()


def test_help_reads_well():
    out = shell(ROOT / "train.py", "--help", cwd=ROOT).stdout
    assert all(f"--{f}" in out for f in train.Config.__dataclass_fields__) and "torchrun" in out


def test_a_local_file_is_trained_on_and_a_tenth_held_out(run, tmp_path, monkeypatch):
    """--data FILE --model DIR: the real path for people's own problems."""
    run(*TINY, "--out", "small")
    with open(tmp_path / "mine.jsonl", "w") as f:
        for i in range(20):
            f.write(json.dumps({"prompt": f"{i:06d}=", "answer": str(i % 10), "task": "chainsum"}) + "\n")
    seen = []
    real = train.sample
    monkeypatch.setattr(train, "sample", lambda m, problems, *a: (seen.append({p.id for p, _, _ in problems}),
                                                                 real(m, problems, *a))[1])
    model = f"small/{Path('small/latest').read_text()}"
    run("--model", model, "--data", "mine.jsonl", "--max_new_tokens", 8, "--prompts", 4, "--samples", 2, "--steps", 9, "--out", "r")
    held_out = seen[0]
    assert held_out == {"mine-10", "mine-20"} and sum(s == held_out for s in seen) == 2  # before the first update and after the last
    trained = set().union(*(s for s in seen if s != held_out))
    assert len(trained) == 18 and not trained & held_out  # 36 draws: two epochs of all the others


def test_a_run_killed_before_its_first_checkpoint_starts_over(run):
    run(*TINY, "--steps", 2, "--out", "whole")
    Path("early").mkdir()
    Path("early/config.json").write_text(Path("whole/config.json").read_text())
    Path("early/metrics.jsonl").write_text(Path("whole/metrics.jsonl").read_text().splitlines()[0] + "\n{\"step\": 2, \"rew")
    run("--out", "early", "--resume")
    assert untimed("early") == untimed("whole")


def test_resume_cannot_poison_a_run(run):
    """Refused flags leave the run's config.json as it was; recorded evaluations survive another --eval_every."""
    run(*TINY, "--steps", 4, "--eval_every", 2, "--out", "r")
    before = Path("r/config.json").read_text()
    for flags, said in ((("--steps", 1), "done 4"), (("--width", 32), "--width was 16"), (("--data", "add"), "--data was")):
        with pytest.raises(SystemExit, match=said):
            run("--out", "r", "--resume", *flags)
        assert Path("r/config.json").read_text() == before
    run("--out", "r", "--resume", "--steps", 5, "--eval_every", 50)
    assert [m["step"] for m in metrics("r") if m["eval"] is not None] == [1, 2, 4, 5]


def test_a_failed_start_leaves_no_run_behind(run):
    with pytest.raises(SystemExit):
        run(*TINY, "--eval_data", "nowhere.jsonl")
    assert not Path("runs/default").exists()
    run(*TINY)
    run(*TINY)
    assert Path("runs/default/latest").is_file() and Path("runs/default-2/latest").is_file()
