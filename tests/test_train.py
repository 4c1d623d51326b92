"""train.py as people run it: it learns, resumes bit for bit, splits work without changing it, and says what is wrong."""
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
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
        assert torch.allclose(theirs(ids).logits, Model.from_pretrained(path)(ids), atol=1e-5)
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


def child(rank, world, port, cwd, flags, setup):
    """train.main() in a forked process: as rank `rank` of `world`, its words in cwd/said-<rank>."""
    os.chdir(cwd)
    for fd in (1, 2):
        os.dup2(os.open(f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    train.RANK, train.WORLD, train.MAIN = rank, world, rank == 0
    import experiments.curves
    experiments.curves.draw = lambda out: None
    sys.argv = ["train.py", *map(str, flags)]
    setup()
    train.main()


def start(cwd, *flags, world=1, setup=lambda: None):
    """The processes of a run, forked from this one: an import of torch less each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=child, args=(r, world, port, cwd, flags, setup)) for r in range(world)]
    for p in ranks:
        p.start()
    return ranks


def finish(ranks, code=0, seconds=120):
    for p in ranks:
        p.join(seconds)
    codes = [p.exitcode for p in ranks]
    for p in ranks:
        p.kill()
    assert all(c == code for c in codes), codes


def last_line(cwd, rank=0):
    return (Path(cwd) / f"said-{rank}").read_text().strip().splitlines()[-1]


def wait_for_lines(path, count):
    for _ in range(600):
        if path.is_file() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never got {count} lines")


def test_killed_ten_times_and_still_the_same_run(run, tmp_path):
    """SIGKILL at ten random moments, in saves and between them: every metric and every weight of the run that was not."""
    flags, r, begun, kills = [*TINY, "--steps", 30, "--save_every", 2], random.Random(0), tmp_path / "killed/config.json", 0
    run(*flags, "--out", "whole")
    while kills < 10:
        kills += begun.is_file()  # before that there is nothing to lose
        p, = start(tmp_path, *(("--resume",) if begun.is_file() else flags), "--out", "killed")
        p.join(r.uniform(0.05, 0.9))
        assert p.is_alive(), "the run was over before it was killed ten times"
        p.kill()
        p.join()
    run("--out", "killed", "--resume")
    assert untimed("killed") == untimed("whole") and same_weights("killed", "whole")
    assert len(list(Path("killed").glob("step-*"))) == 2 and not list(Path("killed").glob(".*step*"))


def test_sigterm_in_an_update_finishes_the_step_and_saves_it(run, tmp_path):
    flags = [*TINY, "--steps", 400, "--save_every", 300]
    p, = start(tmp_path, *flags, "--out", "r")
    wait_for_lines(tmp_path / "r/metrics.jsonl", 3)
    p.terminate()
    finish([p])
    done = len(metrics("r"))
    assert 3 <= done < 400 and Path("r/latest").read_text() == f"step-{done:06d}" and "--resume" in last_line(tmp_path)
    run("--out", "r", "--resume", "--steps", done + 2)
    run(*flags, "--steps", done + 2, "--out", "whole")
    assert untimed("r") == untimed("whole") and same_weights("r", "whole")


def test_a_signal_while_sampling_drops_the_step_on_every_rank(run, tmp_path):
    """Only rank 1 is told, while it samples step 3: nobody waits for the rest of the rollout, the state after step 2 is saved,
    and the run that goes on is the run that was not stopped."""
    def told_while_sampling():
        real, calls = train.generate, []

        def generate(*args, **kw):
            calls.append(1)
            if train.RANK == 1 and len(calls) == 4:  # evaluation, steps 1, 2, 3
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kw)
        train.generate = generate
    flags = [*TINY, "--steps", 5]
    finish(start(tmp_path, *flags, "--out", "r", world=2, setup=told_while_sampling))
    assert len(metrics("r")) == 2 and Path("r/latest").read_text() == "step-000002"
    assert "Stopped; go on with: python train.py --out r --resume" in last_line(tmp_path)
    finish(start(tmp_path, "--out", "r", "--resume", world=2))
    finish(start(tmp_path, *flags, "--out", "whole", "--save_every", 1, world=2, setup=lambda: setattr(train, "ASYNC", True)))
    assert untimed("r") == untimed("whole") and same_weights("r", "whole")


def test_the_same_signal_twice_is_one_signal(run, tmp_path):
    """Launchers and schedulers both pass a SIGTERM on: the second must not break off the save."""
    p, = start(tmp_path, *TINY, "--steps", 400, "--out", "r")
    wait_for_lines(tmp_path / "r/metrics.jsonl", 2)
    p.terminate()
    time.sleep(0.01)
    p.terminate()
    finish([p])
    assert Path("r/latest").read_text() == f"step-{len(metrics('r')):06d}"


def test_resume_takes_what_is_typed_now(run, monkeypatch):
    """The optimizer's own settings come back with its states; flags that are typed go before them."""
    run(*TINY, "--out", "r")
    seen, real = [], train.save
    monkeypatch.setattr(train, "save", lambda out, step, position, model, optimizer, cfg: (
        seen.extend((g["betas"], g["weight_decay"], g["lr"]) for g in optimizer.param_groups),
        real(out, step, position, model, optimizer, cfg))[1])
    run("--out", "r", "--resume", "--steps", 3, "--beta2", 0.5, "--weight_decay", 0.3, "--lr", 1e-5)
    assert seen == [((0.9, 0.5), 0.3, 1e-5), ((0.9, 0.5), 0.0, 1e-5)]


def test_a_rank_that_dies_ends_the_others_with_a_line(tmp_path):
    ranks = start(tmp_path, *TINY, "--steps", 500, "--save_every", 2, "--out", "r", world=2)
    wait_for_lines(tmp_path / "r/metrics.jsonl", 3)
    ranks[1].kill()
    finish(ranks[:1], code=1, seconds=60)
    assert last_line(tmp_path).startswith("train.py: rank 0: ") and "--resume" in last_line(tmp_path)
    assert (tmp_path / "r" / (tmp_path / "r/latest").read_text() / "model.safetensors").is_file()


def test_a_full_disk_loses_nothing(run, tmp_path):
    """A limit on the size of a file stands for the disk: the save fails with one line, the last checkpoint stays, and with room
    again the run goes on as if nothing had been."""
    run(*TINY, "--steps", 2, "--out", "r")
    (tmp_path / "r/.step-000009").mkdir()  # and what a killed save left behind goes
    p = start(tmp_path, "--out", "r", "--resume", "--steps", 4,
              setup=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)))
    finish(p, code=1)
    assert last_line(tmp_path).startswith("train.py: ") and "File too large" in last_line(tmp_path), last_line(tmp_path)
    assert Path("r/latest").read_text() == "step-000002"
    run("--out", "r", "--resume", "--steps", 4)
    assert not list(Path("r").glob(".*step*"))
    run(*TINY, "--steps", 4, "--out", "whole")
    assert untimed("r") == untimed("whole") and same_weights("r", "whole")


def test_saving_beside_the_next_step_saves_what_was(run, monkeypatch):
    """What CUDA runs do, here on CPU: the checkpoint written while the next step changes the weights is the one of its step."""
    run(*TINY, "--steps", 6, "--out", "whole")
    monkeypatch.setattr(train, "ASYNC", True)
    run(*TINY, "--steps", 5, "--save_every", 2, "--out", "r")
    Path("r/latest").write_text("step-000004")  # written while step 5 ran
    run("--out", "r", "--resume", "--steps", 6)
    assert untimed("r") == untimed("whole") and same_weights("r", "whole")


# ---- the same numbers, however the work is split ---------------------------------------------------------------------------

def test_more_ranks_than_prompts(run, tmp_path):
    """A rank without a prompt samples nothing, and takes part in every collective all the same."""
    flags = [*TINY, "--loss", "grpo", "--prompts", 2, "--updates", 1, "--steps", 3]
    run(*flags, "--out", "one")
    finish(start(tmp_path, *flags, "--out", "many", world=3), seconds=60)
    assert_equal_runs("one", "many", 1e-3)


SPLIT = [*TINY, "--steps", 3, "--prompts", 5, "--tokens_per_microbatch", 60]


def assert_equal_runs(a, b, weight_gap=1e-5):
    for x, y in zip(untimed(a), untimed(b), strict=True):
        for k in x:
            assert x[k] == y[k] or x[k] == pytest.approx(y[k], rel=1e-4, abs=1e-6), (x["step"], k)
    x, y = weights(a), weights(b)
    assert max((x[k] - y[k]).abs().max() for k in x) < weight_gap


def test_two_processes_equal_one(run, tmp_path):
    """Same rollouts, same metrics, parameters after 3 steps equal to 1e-5: FSDP2 over gloo, 5 prompts on 2 ranks, by torchrun."""
    run(*SPLIT, "--out", "one")
    out = shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *SPLIT, "--out", "two",
                cwd=tmp_path)
    assert out.returncode == 0, out.stderr[-3000:]
    assert_equal_runs("one", "two")
    assert out.stdout.count("held-out accuracy") == 1  # rank 0 speaks
    run("--out", "two", "--resume", "--steps", 4)  # on another number of ranks
    assert [m["step"] for m in metrics("two")] == [1, 2, 3, 4]


@pytest.mark.parametrize("world, flags, both", [
    (2, ("--shards_per_replica", 1), ()), (2, ("--offload",), ()), (3, (), ()),
    (2, (), ("--kl_beta", 0.1, "--prompts", 1, "--updates", 4)),
    pytest.param(4, ("--shards_per_replica", 2), ("--old_logp", "trainer"), marks=pytest.mark.slow)])
def test_other_splits_equal_one_process_too(run, tmp_path, world, flags, both):
    """HSDP, weights in CPU memory, 3 ranks with uneven work, a rank without rows beside a reference model (mini-batches of one
    response), 4 ranks as two replicas of two shards."""
    run(*SPLIT, *both, "--out", "one")
    finish(start(tmp_path, *SPLIT, *flags, *both, "--out", "many", world=world))
    assert_equal_runs("one", "many", 1e-5 if world == 2 else 1e-3)  # Adam turns rounding noise on unused rows into steps
    run("--out", "many", "--resume", "--steps", 4, "--shards_per_replica", 0, *(["--offload", "False"] if "--offload" in flags else ()))
    assert len(metrics("many")) == 4


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients(run):
    """--compile: the update's blocks alone; few recompilations, the numbers of the plain run."""
    torch._dynamo.reset()
    run(*TINY, "--out", "plain")
    run(*TINY, "--out", "compiled", "--compile")
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert_equal_runs("plain", "compiled", 1e-3)


# ---- what to train on ------------------------------------------------------------------------------------------------------

def test_old_logp_of_the_trainer_is_that_of_the_sampler(run):
    """One forward pass: computing pi_old again changes nothing but rounding; the mismatch is still measured."""
    run(*TINY, "--steps", 3, "--out", "sampler")
    run(*TINY, "--steps", 3, "--old_logp", "trainer", "--out", "trainer", "--tokens_per_microbatch", 70)
    assert_equal_runs("sampler", "trainer", 1e-3)
    assert all(0 <= m["sampler_kl"] < 1e-10 and m["sampler_max"] > 0 for m in metrics("trainer"))


def fake_sampler(monkeypatch, score):
    """Rollouts of `length` tokens with the scores score(number of the problem, sample): train.sample without a model."""
    def sample(model, problems, seeds, n, cfg, tokenizer, scorer, droppable=False):
        return [train.Row([1] * (2 + (7 * s + j) % 5), 1, [-1.0] * (1 + (7 * s + j) % 5), (s + j) % 3 > 0, score(s, j), "ok", i)
                for i, s in enumerate(seeds) for j in range(n)]
    monkeypatch.setattr(train, "sample", sample)


def test_dynamic_sampling_replaces_groups_without_signal(monkeypatch):
    """DAPO: problems 0, 3, 6, ... have mixed scores, the others all 0. The batch has as many groups as ever, each problem is
    drawn once, refills are bounded, and without the flag nothing is replaced."""
    fake_sampler(monkeypatch, lambda s, j: float(s % 3 == 0 and j == 0))
    problems = [None] * 100
    for refills, first, informative in ((0, 4, 2), (1, 6, 2), (2, 8, 3), (9, 10, 4)):
        cfg = train.Config(prompts=4, samples=2, dynamic_sampling=refills)
        rows, seen, at = train.collect(None, problems, 0, cfg, None, None)
        assert len(rows) == 8 and at == first == len(seen) // 2
        assert [r.group for r in seen[::2]] == list(range(at))
        groups = [rows[i:i + 2] for i in range(0, 8, 2)]
        assert all(a.group == b.group for a, b in groups) and sorted({r.group for r in rows}) == [g[0].group for g in groups]
        assert sum(a.score != b.score for a, b in groups) == informative
        assert train.describe(seen, cfg)["refills"] == at - 4
    rows, _, at = train.collect(None, problems, at, train.Config(prompts=4, samples=2), None, None)
    assert at == 14 and rows[0].group == 10  # the next step goes on after the last problem drawn


def test_dynamic_sampling_resumes_at_its_problem(run):
    flags = [*TINY, "--dynamic_sampling", 2, "--max_new_tokens", 3]
    run(*flags, "--steps", 4, "--out", "whole")
    run(*flags, "--steps", 2, "--out", "parts")
    run("--out", "parts", "--resume", "--steps", 4)
    assert untimed("parts") == untimed("whole") and same_weights("parts", "whole")
    assert all(m["refills"] > 0 for m in metrics("whole"))


def learned_rows(monkeypatch, **kw):
    """The rows that reach update(), with their advantages, of one learn() over four responses."""
    seen = []
    monkeypatch.setattr(train, "update", lambda m, ref, o, rows, *a, **k: seen.extend(rows) or 0.0)
    rows = [train.Row([1] * (1 + n), 1, [-1.0] * n, n < 10, s, "ok") for n, s in ((4, 1.0), (8, 1.0), (9, 0.0), (10, 0.0))]
    train.learn(None, None, None, rows, train.Config(prompts=1, samples=4, updates=1, loss="dr_grpo", max_new_tokens=10, **kw))
    return seen


def test_overlong_shaping_is_daposs_ramp(monkeypatch):
    """DAPO's soft punishment: nothing up to max - buffer, then linear down to -1 at the limit."""
    assert [r.A for r in learned_rows(monkeypatch)] == [0.5, 0.5, -0.5, -0.5]
    shaped = torch.tensor([1.0, 1 - 0.5, 0 - 0.75, 0 - 1.0])  # 6 tokens are free, the other 4 cost a quarter each
    rows = learned_rows(monkeypatch, overlong_buffer=4)
    assert torch.allclose(torch.tensor([r.A for r in rows]), shaped - shaped.mean())
    assert [r.score for r in rows] == [1, 1, 0, 0] and {r.pass_rate for r in rows} == {0.5}  # what is reported stays the score


def test_truncated_responses_stay_out_of_the_loss(monkeypatch, run):
    rows = learned_rows(monkeypatch, mask_truncated=True)
    assert [r.length for r in rows] == [4, 8, 9] and [r.A for r in rows] == [0.5, 0.5, -0.5]  # it still counts in the baseline
    monkeypatch.undo()


def test_a_step_of_truncated_responses_alone_changes_nothing(run):
    cwd = run(*TINY, "--max_new_tokens", 1, "--mask_truncated", "--out", "r")
    start = load_file(next((cwd / "runs/warmstart").iterdir()) / "model.safetensors")
    if all(m["truncated"] == 1 for m in metrics("r")):
        assert all(torch.equal(v, start[k]) for k, v in weights("r").items())
    assert all(m["sampler_kl"] is not None for m in metrics("r"))


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


def test_a_prompt_is_computed_once_for_all_its_samples():
    """Samples of a prompt share it inside a forward pass: same log-probs, entropy and gradients as one by one, in any order, with
    prompts of one token and prompts that occur once; and fewer tokens go through the model."""
    from model import Model
    model = Model.from_scratch(dict(model_type="qwen3", vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3), 1)
    r = random.Random(0)
    prompts = [[5], [6, 7, 8, 9, 1], [2, 3], [6, 7, 8, 9, 2], [4, 4, 4]]  # the second and the fourth differ in the last token only
    which = [0, 1, 1, 3, 2, 1, 4, 0, 3, 1]
    sequences = [prompts[i] + [r.randrange(16) for _ in range(r.randint(1, 9))] for i in which]
    lens, seen = [len(prompts[i]) for i in which], []
    real = Model.forward
    model.forward = lambda ids, *a: (seen.append(len(ids)), real(model, ids, *a))[1]

    def run(parts):
        out = [train.forward(model, [sequences[i] for i in part], [lens[i] for i in part], 0.7) for part in parts]
        logp, entropy, sum_p2 = (torch.cat(x) for x in zip(*out))
        model.zero_grad()
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
        return logp, entropy, sum_p2, *(p.grad.clone() for p in model.parameters())
    alone, together = run([[i] for i in range(10)]), run([range(10)])
    assert sum(seen[:10]) - seen[10] == 5 * 4  # of six prompts that begin alike, five times four tokens
    for a, b in zip(alone, together):
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kernel", ["flash-attn", "torch varlen"])
def test_shared_prompts_through_the_packed_kernels(monkeypatch, kernel):
    """The call sites of flash-attn and PyTorch's varlen, with a plain stand-in: queries are the last of a sequence's keys."""
    import model
    lengths, after = [3, 2, 4, 1, 5], [-1, 0, 0, -1, 3]
    q, k, v = (torch.randn(15, h, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    expected = model.causal(lengths, "cpu", after=after)
    monkeypatch.setattr(model, "attention_kernel", lambda *a: kernel)

    def stand_in(kernel, q, k, v, cu_q, cu_k, longest_q, longest_k):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and longest_q == 5 and longest_k == 7 and len(k) == cu_k[-1] == 22
        out = []
        for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            x, y, z = (t.transpose(0, 1) for t in (q[a:b], k[c:d].repeat_interleave(2, 1), v[c:d].repeat_interleave(2, 1)))
            out.append(((x @ y.transpose(1, 2) * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ z).transpose(0, 1))
        return torch.cat(out)
    monkeypatch.setattr(model, "varlen", stand_in)
    got = model.causal(lengths, "cpu", after=after)
    assert got[0].tolist() == expected[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]
    assert torch.allclose(got[1](0, q, k, v), expected[1](0, q, k, v), atol=1e-6)


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
    (("--resume", "--out", "never"), "no run to continue"), (("--acpo_stats", "all"), "--acpo_stats"),
    (("--old_logp", "engine"), "--old_logp"), (("--shards_per_replica", 2), "--shards_per_replica 2"), (("--offload",), "--offload"), (("--width", 20), "multiple of 8"),
    (("--dynamic_sampling", -1), "--dynamic_sampling -1"), (("--overlong_buffer", 99), "--overlong_buffer 99"),
    (("--kv_tokens", 5), "kv_tokens")])
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
    monkeypatch.setattr(train, "sample", lambda m, problems, *a, **k: (seen.append({p.id for p, _, _ in problems}),
                                                                 real(m, problems, *a, **k))[1])
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
    Path("r/step-000009").mkdir()  # of a run that was killed before `latest` said so, and is made again now
    run("--out", "r", "--resume", "--steps", 6, "--keep", 1)
    assert [m["step"] for m in metrics("r") if m["eval"] is not None] == [1, 2, 4, 6]  # 5 was one only because it ended there
    assert [p.name for p in Path("r").glob("step-*")] == [Path("r/latest").read_text()] == ["step-000006"]


def test_a_failed_start_leaves_no_run_behind(run):
    with pytest.raises(SystemExit):
        run(*TINY, "--eval_data", "nowhere.jsonl")
    assert not Path("runs/default").exists()
    run(*TINY)
    run(*TINY)
    assert Path("runs/default/latest").is_file() and Path("runs/default-2/latest").is_file()
