"""train.py as people run it: it learns, resumes bit for bit, splits work without changing it, and
says what is wrong. Runs that are compared carry signal: see `same_runs`."""
import datetime
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import losses
import train
from model import Model, pack
from rollout import Rollout

ROOT = Path(__file__).parent.parent
# The smallest model that guesses in the right form: one group of eight in two carries signal.
TINY = """--width 16 --layers 1 --skill_steps 10 --habit_steps 70 --prompts 6 --samples 8
--updates 2 --eval_problems 8 --steps 2 --max_new_tokens 6 --lr 0.003 --warmup 3""".split()
TIMING = {"rollout_tps", "update_tps", "seconds"}


@pytest.fixture(scope="module", autouse=True)
def few_questions():
    """512 instead of 8192, which cost half a second in each run."""
    real = data.load

    def load(name, split="train", n=None, **kw):
        few = 512 if name in data.TASKS else None
        return real(name, split, n or few, **kw)
    data.load = load
    yield
    data.load = real


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A directory with the warm start of TINY in runs/warmstart, made once."""
    cwd = tmp_path_factory.mktemp("warm")
    before = os.getcwd()
    os.chdir(cwd)
    data.load_tokenizer(train.small_model(train.parse(TINY)))  # imports what every child needs
    os.chdir(before)
    return cwd


@pytest.fixture(scope="module")
def whole(warm):
    """Four steps that nothing happens to: every run that is stopped, hurt or cut must repeat it."""
    finish(start(warm, *TINY, "--steps", 4, "--save_every", 1, "--out", "whole"), cwd=warm)
    assert_learned(warm / "whole")
    return warm / "whole"


@pytest.fixture
def half(run, warm, whole):
    """Its first two steps, as directory r."""
    if not (warm / "half").exists():
        finish(start(warm, *TINY, "--save_every", 1, "--out", "half"), cwd=warm)
    shutil.copytree(warm / "half", "r")


@pytest.fixture
def run(tmp_path, monkeypatch, warm):
    """run(*flags): train.main() in this process, in a directory of its own."""
    shutil.copytree(warm / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)  # a second each; `learned` draws

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()
    return call


def metrics(run_dir):
    lines = Path(run_dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def untimed(run_dir):
    rows = metrics(run_dir)
    for row in rows:
        for key in TIMING:
            row.pop(key, None)
    return rows


def weights(run_dir):
    run_dir = Path(run_dir)
    return load_file(run_dir / (run_dir / "latest").read_text() / "model.safetensors")


def assert_same_runs(a, b):
    """Every metric and every weight, bit for bit, of runs whose gradients are not zero."""
    assert untimed(a) == untimed(b)
    assert_learned(a)
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_learned(run_dir):
    assert max(m["grad_norm"] for m in metrics(run_dir)) > 1e-3


def assert_close_runs(a, b, tolerance):
    """The same up to rounding; sampled tokens, and so the rewards, exactly."""
    assert_learned(a)
    for one, other in zip(untimed(a), untimed(b), strict=True):
        assert one["reward"] == other["reward"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=tolerance)
        assert one["ratio_std"] == pytest.approx(other["ratio_std"], rel=tolerance, abs=1e-6)
        assert one["entropy"] == pytest.approx(other["entropy"], rel=tolerance)
    a, b = weights(a), weights(b)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance), name


# ---- It learns ---------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """The default run as a command, cut to half of the warm start and 15 steps."""
    cwd = tmp_path_factory.mktemp("learned")
    command = [sys.executable, ROOT / "train.py", *"--steps 15 --eval_problems 128".split(),
               *"--skill_steps 250 --habit_steps 50".split()]
    out = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    return cwd, out


def test_the_default_run_learns_from_the_reward_alone(learned):
    cwd, out = learned
    lines = metrics(cwd / "runs/default")
    assert lines[0]["eval"] <= 0.40
    assert lines[-1]["eval"] >= 0.7
    assert lines[0]["length"] < 5
    assert lines[-1]["length"] > 9  # it learned to work things out
    assert all(m["sampler_kl"] < 1e-6 for m in lines)
    assert "held-out accuracy" in out.stdout.splitlines()[-1]
    files = "config.json curves.png latest step-000015/model.safetensors step-000015/tokenizer.json"
    for file in files.split():
        assert (cwd / "runs/default" / file).is_file(), file


def test_metrics_have_every_key_in_every_line(learned):
    lines = metrics(learned[0] / "runs/default")
    assert [m["step"] for m in lines] == list(range(1, 16))
    assert len({tuple(m) for m in lines}) == 1
    required = """step reward eval length entropy clip_low clip_high ratio_std grad_norm zero_groups
    truncated sampler_kl sampler_ess masked rollout_tps update_tps seconds"""
    assert set(required.split()) <= set(lines[0])
    assert [m["step"] for m in lines if m["eval"] is not None] == [1, 10, 15]
    for m in lines:  # rollout and update are parts of a step
        tokens = 512 * m["length"]
        assert tokens / m["rollout_tps"] + tokens / m["update_tps"] <= m["seconds"] + 1e-6


def test_a_second_run_takes_the_next_name_and_the_cached_warm_start(run, warm):
    """An empty directory, as a setup that was killed leaves it, does not take a name."""
    Path("runs/default").mkdir()
    before = {p: p.stat().st_mtime_ns for p in Path("runs/warmstart").rglob("*")}
    run(*TINY)
    run(*TINY)
    assert {p.parent.name for p in Path("runs").glob("*/latest")} == {"default", "default-2"}
    assert {p: p.stat().st_mtime_ns for p in Path("runs/warmstart").rglob("*")} == before


def test_the_checkpoint_loads_in_transformers(learned):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = learned[0] / "runs/default/step-000015"
    theirs = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("314159=", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        ours = Model.from_pretrained(path)(ids)
        assert torch.allclose(theirs(ids).logits, ours, atol=1e-5)
    out = theirs.generate(ids, do_sample=False, max_new_tokens=20)
    assert tokenizer.decode(out[0, 7:]).endswith("$")


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_every_loss_runs(run, name):
    run(*TINY, "--steps", 1, "--loss", name, "--out", "r")
    assert all(m["skipped"] == 0 for m in metrics("r"))
    assert_learned("r")


@pytest.mark.parametrize("flags", [
    "--samples 1 --advantage signed",
    "--prompts 1 --samples 16 --steps 3",
    "--max_new_tokens 3",
    "--updates 48",
    "--updates 5",
    "--tokens_per_microbatch 99",
    "--epochs 2",
    "--temperature 0.7",
    "--kl_beta 0.1",
    "--recompute",
    "--loss_args alpha=2 dual_clip=None",
    "--acpo_stats micro --tokens_per_microbatch 40",
    "--old_logp trainer",
    "--clip_norm 0",
    "--correction opsm",
    "--correction seq_mis --old_logp trainer",
    "--rollout_dtype float32",
    "--loss wapo --advantage rloo --agg token-mean",
    "--dynamic_sampling 2",
    "--overlong_buffer 3",
    "--mask_truncated",
])
def test_edges_run(run, flags):
    run(*TINY, "--steps", 1, *flags.split(), "--out", "r")
    assert all(m["sampler_kl"] < 1e-6 and m["skipped"] == 0 for m in metrics("r"))
    assert_learned("r")


@pytest.mark.parametrize("task", data.TASKS)
def test_every_procedural_task_runs(run, task):
    """From its own tokenizer, written and read back, to sampling and grading."""
    run(*TINY, "--data", task, "--skill_steps", 1, "--habit_steps", 1, "--steps", 1, "--out", "r")
    assert all(m["skipped"] == 0 for m in metrics("r"))
    tokenizer = data.load_tokenizer(Path("r") / Path("r/latest").read_text())
    text = data.load(task, "train", 1)[0].prompt
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_equal_rewards_change_nothing(run):
    """Nobody can be right within one token: the gradient is exactly 0, weights stay, no nan."""
    run(*TINY, "--max_new_tokens", 1, "--weight_decay", 0, "--out", "r")
    for m in metrics("r"):
        assert (m["reward"], m["grad_norm"], m["zero_groups"]) == (0, 0, 1)
    start = load_file(next(Path("runs/warmstart").glob("*/model.safetensors")))
    assert all(torch.equal(value, start[name]) for name, value in weights("r").items())


# ---- Stopping and going on ---------------------------------------------------------------------

def child(rank, world, port, cwd, flags, setup):
    """train.main() in a forked process: rank `rank` of `world`; its words go to cwd/said-<rank>."""
    os.chdir(cwd)
    said = os.open(f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
                      WORLD_SIZE=str(world))
    train.RANK, train.WORLD, train.MAIN = rank, world, rank == 0
    train.draw_curves = lambda *_: None
    sys.argv = ["train.py", *map(str, flags)]
    setup()
    train.main()


def start(cwd, *flags, world=1, setup=lambda: None):
    """The processes of a run, forked from this one: an import of torch less each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(world):
        ranks.append(fork.Process(target=child, args=(rank, world, port, cwd, flags, setup)))
        ranks[-1].start()
    return ranks


def finish(ranks, code=0, cwd="."):
    """Wait for all of them; the limit is for a test that hangs, not for a slow machine."""
    for p in ranks:
        p.join(300)
    codes = [p.exitcode for p in ranks]
    for p in ranks:
        p.kill()
    assert codes == [code] * len(ranks), last_line(cwd)


def last_line(cwd, rank=0):
    return (Path(cwd) / f"said-{rank}").read_text().strip().splitlines()[-1]


def wait_for_step(run_dir, step):
    """Until metrics.jsonl has the line of `step`."""
    path = Path(run_dir) / "metrics.jsonl"
    for _ in range(6000):
        if path.is_file() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never got {step} lines")


FILE_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def die_before(count):
    """A setup for start(): SIGKILL before the process's file operation number `count` in run r."""
    def setup():
        left = [count]

        def hook(event, args):
            written = event == "open" and isinstance(args[1], str) and args[1] != "r"
            if (written or event in FILE_EVENTS) and str(args[0]).startswith("r"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
    return setup


def test_two_and_two_steps_are_four(run, half, whole):
    run("--out", "r", "--resume", "--steps", 4)  # the run's own flags need not be repeated
    assert_same_runs("r", whole)


def test_evaluation_does_not_touch_training(run):
    run(*TINY, "--steps", 4, "--eval_every", 1, "--out", "often")
    run(*TINY, "--steps", 4, "--eval_every", 100, "--out", "seldom")
    often, seldom = weights("often"), weights("seldom")
    assert_learned("often")
    assert all(torch.equal(often[name], seldom[name]) for name in often)


def test_killed_before_file_operations_and_still_the_same_run(run, tmp_path, whole):
    """One attempt after the other, killed before file operation 1, 8, 15, ... of it, in saves and
    between them. experiments/torture.py tries every one."""
    flags = [*TINY, "--steps", 4, "--save_every", 1]
    for count in range(1, 99, 7):
        more = ["--resume"] if Path("r/config.json").is_file() else flags
        p, = start(tmp_path, *more, "--out", "r", setup=die_before(count))
        p.join()
        if p.exitcode == 0:
            break
        assert p.exitcode == -signal.SIGKILL, last_line(tmp_path)
    assert count > 20
    if p.exitcode:
        run("--out", "r", "--resume")
    assert_same_runs("r", whole)
    assert len(list(Path("r").glob("step-*"))) == 2
    assert {p.name for p in Path("r").glob(".*")} == {".lock"}  # nothing is left behind


def test_a_resume_that_is_killed_can_be_repeated(run, tmp_path, warm, half, whole):
    for count in range(0, 99, 11):
        p, = start(tmp_path, "--out", "r", "--resume", "--steps", 4, setup=die_before(count))
        p.join()
        if p.exitcode == 0:
            break
        try:
            run("--out", "r", "--resume", "--steps", 4)
        except SystemExit as e:
            assert e.code == 0  # it was complete
        assert_same_runs("r", whole)
        shutil.rmtree("r")
        shutil.copytree(warm / "half", "r")
    assert count > 30


def test_resume_of_a_complete_run_says_so_and_changes_nothing(run, half, capsys):
    before = {p: p.read_bytes() for p in Path("r").rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as e:
        run("--out", "r", "--resume")
    assert e.value.code == 0
    assert "complete" in capsys.readouterr().out
    del before[Path("r/.lock")]
    assert all(p.read_bytes() == content for p, content in before.items())


def test_a_signal_finishes_the_step_on_every_rank_and_saves_it(run, tmp_path):
    """Rank 1 alone is told, twice within a moment, as launchers do."""
    def told_at_step_3():
        real = train.update

        def update(run, *args, **kw):
            if train.RANK == 1 and run.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                while not run.stop.told:
                    time.sleep(0.01)
            return real(run, *args, **kw)
        train.update = update
    flags = [*TINY, "--steps", 5]
    finish(start(tmp_path, *flags, "--out", "r", world=2, setup=told_at_step_3))
    assert len(metrics("r")) == 3
    assert Path("r/latest").read_text() == "step-000003"
    assert "python train.py --out r --resume" in (tmp_path / "said-0").read_text()
    finish(start(tmp_path, "--out", "r", "--resume", world=2))
    finish(start(tmp_path, *flags, "--out", "whole", world=2))
    assert_same_runs("r", "whole")


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup does with SIGHUP: the run must outlive the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            while not stop.told:
                time.sleep(0.01)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_a_run_that_waits_for_a_rank_that_hangs(run, tmp_path):
    def hang_at_step_2():
        real = train.update

        def update(run, *args, **kw):
            while train.RANK == 1 and run.step == 2:
                time.sleep(1)
            return real(run, *args, **kw)
        train.update = update
    ranks = start(tmp_path, *TINY, "--steps", 9, "--out", "r", world=2, setup=hang_at_step_2)
    wait_for_step("r", 1)
    while ranks[0].is_alive():  # the first sets a flag, one a second later ends
        ranks[0].terminate()
        ranks[0].join(0.5)
    assert "second signal" in last_line(tmp_path)
    ranks[1].kill()


def test_a_rank_that_does_not_come_is_named(run, tmp_path):
    """Within the time of a flag; here seconds instead of minutes."""
    def hang_at_step_2():
        train.timedelta = lambda minutes: datetime.timedelta(seconds=5)
        real = train.sample

        def sample(run, *args, **kw):
            while train.RANK == 1 and run.step == 2:
                time.sleep(1)
            return real(run, *args, **kw)
        train.sample = sample
    ranks = start(tmp_path, *TINY, "--out", "r", world=2, setup=hang_at_step_2)
    ranks[0].join(120)
    ranks[1].kill()
    assert ranks[0].exitcode == 1
    assert "Rank 1 failed" in last_line(tmp_path)


def test_a_rank_that_dies_ends_the_others_with_a_line(run, tmp_path):
    ranks = start(tmp_path, *TINY, "--steps", 5000, "--save_every", 2, "--out", "r", world=2)
    wait_for_step("r", 3)
    ranks[1].kill()
    finish(ranks[:1], code=1)
    assert last_line(tmp_path).startswith("train.py: rank 0: ")
    assert "--resume" in last_line(tmp_path)
    assert (Path("r") / Path("r/latest").read_text() / "model.safetensors").is_file()


def test_a_full_disk_loses_nothing(run, tmp_path, half, whole):
    """A limit on the size of a file stands for the disk."""
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError instead
    finish(start(tmp_path, "--out", "r", "--resume", "--steps", 4, setup=small_disk), code=1)
    assert last_line(tmp_path).startswith("train.py: ")
    assert "--resume" in last_line(tmp_path)
    assert Path("r/latest").read_text() == "step-000002"
    run("--out", "r", "--resume", "--steps", 4)
    assert_same_runs("r", whole)
    assert {p.name for p in Path("r").glob(".*")} == {".lock"}


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(run, half, monkeypatch):
    """The order that a power cut cannot break: every file is flushed, then the directory is
    renamed, then `latest` is written; the old checkpoint goes last."""
    events = []

    def record(where, name):
        real = getattr(where, name)

        def recorded(*args, **kw):
            if name == "fsync":
                args_said = os.readlink(f"/proc/self/fd/{args[0]}")
            else:
                args_said = " ".join(map(str, args[:2]))
            events.append(f"{name} {args_said}")
            return real(*args, **kw)
        monkeypatch.setattr(where, name, recorded)
    for where, name in ((os, "fsync"), (Path, "replace"), (shutil, "rmtree")):
        record(where, name)
    run("--out", "r", "--resume", "--steps", 3, "--keep", 1)

    def when(*words):
        """The last time."""
        found = [i for i, e in enumerate(events) if all(word in e for word in words)]
        assert found, (words, events)
        return found[-1]
    named = max(i for i, e in enumerate(events) if e.endswith("r/step-000003"))
    for file in ("model.safetensors", "state.json", "checksums.json", "tokenizer.json"):
        flushed = [i for i, e in enumerate(events) if e.startswith("fsync") and file in e]
        assert flushed and min(flushed) < named, file
    assert when("fsync", "metrics.jsonl") < named
    assert named < when("r/.latest", "r/latest") < when("rmtree", "r/step-000002")


@pytest.mark.parametrize("file", [
    "model.safetensors", "resume/model.safetensors", "resume/state.json", "resume/checksums.json",
    "tokenizer.json", "config.json"])
def test_damage_is_refused_and_the_way_back_is_named(run, half, file):
    """A flipped bit, a cut file, a missing file."""
    path = Path("r/step-000002") / file
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    for damaged in (flipped, content[:len(content) // 2], None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(SystemExit, match=rf"step-000002/.*--resume_from step-000001"):
            run("--out", "r", "--resume", "--steps", 4)


def test_going_back_to_an_earlier_checkpoint_can_be_repeated_too(run, tmp_path, half, whole):
    """Killed on the way, a plain --resume does not fall back into the later, damaged one."""
    Path("r/step-000002/model.safetensors").unlink()
    back = ["--out", "r", "--resume", "--resume_from", "step-000001", "--steps", 4]
    p, = start(tmp_path, *back, setup=die_before(12))
    p.join()
    assert p.exitcode == -signal.SIGKILL
    run("--out", "r", "--resume", "--steps", 4)
    assert_same_runs("r", whole)


def test_resume_removes_nothing_that_is_not_its_own(run, half, whole):
    """Without `latest` the newest whole checkpoint counts; copies of other names stay."""
    shutil.copytree("r/step-000001", "r/step-best")
    shutil.copytree("r/step-000001", "r/.my-step-1")
    for name in ("step-0", ".config", ".metrics", ".latest", "..step-000004.x"):
        Path("r", name).mkdir()
    for left in (".step-000004", "..step-000004.17", ".step-000004.old.17", ".config.json.17"):
        Path("r", left).mkdir()  # by a killed run
    Path("r/latest").unlink()
    run("--out", "r", "--resume", "--steps", 4)
    assert_same_runs("r", whole)
    mine = "step-best .my-step-1 step-0 .config .metrics .latest ..step-000004.x".split()
    assert all(Path("r", name).is_dir() for name in mine)
    assert not list(Path("r").glob(".*17")) and not Path("r/.step-000004").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "step-000009", "/etc", "step-000001/resume"])
def test_latest_cannot_point_elsewhere(run, half, name):
    shutil.copytree("r/step-000002", "elsewhere")
    Path("r/latest").write_text(name)
    with pytest.raises(SystemExit, match="--resume_from"):
        run("--out", "r", "--resume", "--steps", 3)
    Path("r/latest").write_text("step-000002\n")  # a line feed is no fault
    run("--out", "r", "--resume", "--steps", 3)


def test_nothing_that_resume_reads_is_unpickled(run, half, tmp_path):
    """A pickle that touches a file, in every place where torch's own checkpoints have one."""
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'touched'}",)
    for name in (".metadata", "state.pt", "optimizer.bin", "__0_0.distcp"):
        Path("r/step-000002/resume", name).write_bytes(pickle.dumps(Attack()))
    run("--out", "r", "--resume", "--steps", 3)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("file, text, said", [
    ("config.json", "[]", "config.json"),
    ("config.json", '{"lr": null}', "--lr"),
    ("config.json", '{"recompute": []}', "--recompute"),
    ("config.json", '{"steps": {"a": 1}}', "--steps"),
    ("config.json", '{"lr": Infinity}', "--lr"),
    ("config.json", '{"loss": "\\u001b[31m"}', "unknown loss"),
    ("metrics.jsonl", "{}\n{}\n", "line 1"),
    ("metrics.jsonl", "[[[", "line 1"),
    ("latest", "\x1b[31m", "--resume_from"),
    ("latest", "a\nb", "--resume_from"),
    ("step-000002/resume/state.json", '{"step": 3, "position": 12}', "state.json"),
    ("step-000002/resume/state.json", '{"step": [], "position": 12}', "state.json"),
    ("step-000002/resume/state.json", '{"step": 2, "position": -1}', "state.json"),
    ("step-000002/resume/state.json", '{"step": 2, "position": "9"}', "state.json"),
])
def test_a_strange_run_directory_is_one_printable_line(run, half, file, text, said):
    Path("r", file).write_text(text)
    sums = train.checksums(Path("r/step-000002"))  # a stranger's are right
    Path("r/step-000002/resume/checksums.json").write_text(json.dumps(sums))
    before = {p: p.read_bytes() for p in Path("r").rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as e:
        run("--out", "r", "--resume", "--steps", 4)
    assert e.value.code.startswith("train.py: ") and said in e.value.code
    assert e.value.code.isprintable()
    assert all(p.read_bytes() == content for p, content in before.items() if p.name != ".lock")


def test_weights_of_another_model_are_refused_without_advice_that_cannot_help(run, half):
    save_file({"weight.norm.weight": torch.ones(8)}, "r/step-000002/resume/model.safetensors")
    sums = train.checksums(Path("r/step-000002"))
    Path("r/step-000002/resume/checksums.json").write_text(json.dumps(sums))
    with pytest.raises(SystemExit, match="^train.py: .*norm.weight.*") as e:
        run("--out", "r", "--resume", "--steps", 4)
    assert "go on with" not in e.value.code


def test_metrics_of_the_past_are_read_with_care(run, half):
    """A number that no picture can draw, a line that is gone; what stands after the checkpoint's
    step is of no interest."""
    path = Path("r/metrics.jsonl")
    first, second = path.read_text().splitlines()
    huge = json.dumps(json.loads(first) | {"reward": 10**400})
    for lines in (
        [huge, second],
        [first],
        [second, first],
        [first, second[:50]],
    ):
        path.write_text("\n".join(lines))
        with pytest.raises(SystemExit, match=r"metrics.jsonl line [12] is not"):
            run("--out", "r", "--resume", "--steps", 3)
    path.write_bytes(f"{first}\n{second}\n".encode() + b"\0\xff" * 50)  # as a power cut leaves it
    run("--out", "r", "--resume", "--steps", 3)
    assert [m["step"] for m in metrics("r")] == [1, 2, 3]


@pytest.mark.parametrize("name", [".lock", ".latest", ".config.json", "metrics.jsonl"])
def test_nothing_is_written_through_a_link(run, half, tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    link = Path("r", name if name in (".lock", "metrics.jsonl") else f"{name}.{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(victim)
    with suppress(SystemExit):
        run("--out", "r", "--resume", "--steps", 3)
    assert victim.read_text() == "mine"


def test_a_new_run_takes_no_directory_that_holds_checkpoints(run, half):
    for name in ("config.json", "metrics.jsonl", "latest"):
        Path("r", name).unlink()
    before = sorted(Path("r").rglob("*"))
    with pytest.raises(SystemExit, match="holds a run already"):
        run(*TINY, "--out", "r")
    assert sorted(Path("r").rglob("*")) == before


def test_first_runs_at_once_make_one_warm_start(run, tmp_path):
    """One makes it and the others wait; what a killed one left goes; none sees half of it."""
    shutil.rmtree("runs/warmstart")
    flags = [*TINY, "--skill_steps", 2, "--habit_steps", 2, "--steps", 1, "--out"]
    made = tmp_path / "made"

    def count():
        real = train.warm_start

        def warm_start(*args):
            with open(made, "a") as file:
                file.write("once ")
            real(*args)
        train.warm_start = warm_start
    runs = [start(tmp_path, *flags, name, setup=count)[0] for name in "abc"]
    finish(runs)
    assert made.read_text() == "once "
    assert untimed("a") == untimed("b") == untimed("c")
    path = next(Path("runs/warmstart").glob("*.lock")).with_suffix("")
    for left in (f".{path.name}", f"..{path.name}.17"):  # of a run that was killed in it
        (path.parent / left).mkdir()
    shutil.rmtree(path)
    run(*flags, "d")
    assert untimed("a") == untimed("d")
    assert not list(path.parent.glob(".*"))


def test_two_runs_never_share_a_directory(run, tmp_path):
    """The second one gets a line that names the first one's process, and the first is unharmed."""
    p, = start(tmp_path, *TINY, "--steps", 5000, "--out", "r")
    wait_for_step("r", 1)
    for flags in ([*TINY, "--out", "r"], ["--out", "r", "--resume", "--steps", 9999]):
        with pytest.raises(SystemExit) as e:
            run(*flags)
        assert "holds a run already" in e.value.code or str(p.pid) in e.value.code
    p.terminate()
    finish([p])
    steps = [m["step"] for m in metrics("r")]
    assert steps == list(range(1, len(steps) + 1))


def test_resume_takes_what_is_typed_now(run, half, monkeypatch):
    """The optimizer's numbers come back; flags that are typed go before the run's."""
    seen, real = [], train.save

    def save(run):
        seen.extend((g["betas"], g["weight_decay"], g["lr"]) for g in run.optimizer.param_groups)
        real(run)
    monkeypatch.setattr(train, "save", save)
    run("--out", "r", "--resume", "--steps", 3, "--beta2", 0.5, "--weight_decay", 0.3, "--lr", 1e-5)
    assert seen == [((0.9, 0.5), 0.3, 1e-5), ((0.9, 0.5), 0.0, 1e-5)]


def test_a_run_killed_before_its_first_checkpoint_starts_over(run, whole):
    Path("early").mkdir()
    shutil.copy(whole / "config.json", "early")
    first = (whole / "metrics.jsonl").read_text().splitlines()[0]
    Path("early/metrics.jsonl").write_text(first + '\n{"step": 2, "rew')
    run("--out", "early", "--resume")
    assert_same_runs("early", whole)


def test_a_run_that_fails_in_its_first_step_goes_on_with_another_flag(run):
    with pytest.raises(SystemExit, match="raise kv_tokens.*--resume --out r$"):
        run(*TINY, "--kv_tokens", 5, "--out", "r")
    run("--out", "r", "--resume", "--kv_tokens", 500)
    assert [m["step"] for m in metrics("r")] == [1, 2]


def test_the_same_command_resumes_a_run_that_began_with_another_ones_checkpoint(run, half):
    """config.json names the checkpoint, the command the run that it is of."""
    run(*TINY, "--model", "r", "--steps", 1, "--out", "s")
    run(*TINY, "--model", "r", "--steps", 2, "--out", "s", "--resume")
    assert [m["step"] for m in metrics("s")] == [1, 2]


def test_an_objective_that_fails_says_where(run, monkeypatch, capsys):
    began = train.begin

    def begin(*args):  # the flags are checked by now
        monkeypatch.setattr(losses, "outside", lambda *_: (1, 2, 3))
        return began(*args)
    monkeypatch.setattr(train, "begin", begin)
    with pytest.raises(SystemExit, match="^train.py: too many values to unpack"):
        run(*TINY, "--loss", "cispo_masked", "--out", "r")
    assert re.search(r"losses.py., line \d+, in cispo_masked", capsys.readouterr().err)


def test_resume_cannot_poison_a_run(run):
    """Refused flags leave config.json as it was; recorded evaluations survive another rhythm."""
    run(*TINY, "--steps", 4, "--eval_every", 2, "--out", "r")
    before = Path("r/config.json").read_text()
    for flags, said in (("--width 32", "--width was 16"), ("--data countdown", "--data was")):
        with pytest.raises(SystemExit, match=said):
            run("--out", "r", "--resume", *flags.split())
        assert Path("r/config.json").read_text() == before

    def evaluated():
        return [m["step"] for m in metrics("r") if m["eval"] is not None]

    run("--out", "r", "--resume", "--steps", 5, "--eval_every", 50)
    assert evaluated() == [1, 2, 4, 5]
    run("--out", "r", "--resume", "--steps", 6, "--keep", 1)
    assert evaluated() == [1, 2, 4, 6]  # that of step 5 was made only because a run ended there
    assert [p.name for p in Path("r").glob("step-*")] == ["step-000006"]


# ---- The same numbers, however the work is split -----------------------------------------------

RANKS = ["--steps", 2, "--loss", "acpo"]


@pytest.fixture(scope="module")
def one_process(warm):
    """The run that every split must repeat."""
    flags = [*TINY, *RANKS, "--out", "one"]
    finish(start(warm, *flags), cwd=warm)
    return warm / "one"


@pytest.mark.parametrize("world, flags", [
    (1, "--tokens_per_microbatch 60"),
    (2, ""),
    (3, "--tokens_per_microbatch 60"),
    (2, "--recompute"),
    (2, "--offload"),
    pytest.param(4, "--shards_per_replica 2 --tokens_per_microbatch 60", marks=pytest.mark.slow),
])
def test_ranks_and_micro_batches_change_nothing(run, tmp_path, one_process, world, flags):
    finish(start(tmp_path, *TINY, *RANKS, *flags.split(), "--out", "r", world=world))
    assert_close_runs(one_process, "r", 2e-4)


def test_totals_count_the_tokens_of_all_ranks(run, tmp_path):
    flags = [*TINY, "--steps", 1, "--agg", "token-mean"]
    for world in (1, 2):
        finish(start(tmp_path, *flags, "--out", f"r{world}", world=world))
    assert_close_runs("r1", "r2", 2e-4)


def test_resume_with_another_number_of_ranks(run, tmp_path, one_process):
    finish(start(tmp_path, *TINY, *RANKS, "--steps", 1, "--out", "r", world=2))
    finish(start(tmp_path, "--out", "r", "--resume", "--steps", 2))
    assert_close_runs(one_process, "r", 2e-4)


# ---- LoRA --------------------------------------------------------------------------------------

LORA = [*TINY, "--lora", 4, "--lora_alpha", 8, "--lr", 0.01, "--kl_beta", 0.1]


def tensors_in(run_dir, pattern):
    """Of the newest checkpoint."""
    run_dir = Path(run_dir)
    file, = (run_dir / (run_dir / "latest").read_text()).glob(pattern)
    return load_file(file)


def as_on_one_card():
    """FSDP with a single rank: the frozen weights stay out of it, or they would be there twice."""
    def start_ranks(flags):
        train.dist.init_process_group("gloo", store=train.dist.HashStore(), rank=0, world_size=1)
    real = train.shard

    def shard(model, *how):
        sharded = real(model, *how)
        names = {name for name, p in model.named_parameters() if hasattr(p, "placements")}
        assert names == {name for name, _ in model.named_parameters() if ".lora_" in name}
        return sharded
    train.start_ranks, train.shard = start_ranks, shard


def test_lora_trains_saves_resumes_and_is_shared_by_ranks(run, tmp_path, warm):
    run(*LORA, "--steps", 4, "--out", "whole")
    assert_learned("whole")
    assert all(".lora_" in name for name in tensors_in("whole", "resume/*.safetensors"))

    run(*LORA, "--steps", 2, "--out", "r")
    run("--out", "r", "--resume", "--steps", 4)
    assert_same_runs("whole", "r")
    with pytest.raises(SystemExit, match="--lora_alpha was 8"):
        run("--out", "r", "--resume", "--steps", 5, "--lora_alpha", 16)

    finish(start(tmp_path, *LORA, "--steps", 4, "--out", "two", world=2))
    assert_close_runs("whole", "two", 2e-4)
    finish(start(tmp_path, *LORA, "--steps", 4, "--out", "card", setup=as_on_one_card))
    assert_close_runs("whole", "card", 2e-4)
    one, two = [tensors_in(out, "adapter/*.safetensors") for out in ("whole", "two")]
    assert max(t.abs().max() for name, t in one.items() if "lora_B" in name) > 1e-2
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name


def test_a_lora_run_leaves_a_whole_model_and_an_adapter(run, warm):
    """The merged checkpoint is the base plus B A, and both are what the run evaluated."""
    run(*LORA, "--out", "r")
    assert_learned("r")
    assert metrics("r")[-1]["sampler_max"] < 1e-4  # the sampler runs the adapters, too
    base, = warm.glob("runs/warmstart/*/model.safetensors")
    before, after = load_file(base), weights("r")
    adapter = tensors_in("r", "adapter/*.safetensors")
    for name, W in before.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in adapter:
            A, B = adapter[f"{stem}.lora_A.weight"], adapter[f"{stem}.lora_B.weight"]
            assert torch.allclose(after[name], W + 8 / 4 * B @ A, atol=1e-6), name
            assert not torch.equal(after[name], W), name
        else:
            assert torch.equal(after[name], W), name
    step = Path("r") / Path("r/latest").read_text()
    ids = torch.randint(0, 10, (1, 20))
    merged, adapted = Model.from_pretrained(step), Model.from_pretrained(step / "adapter")
    assert torch.allclose(merged(ids), adapted(ids), atol=1e-5)
    with pytest.raises(SystemExit, match="a LoRA adapter; merge it"):
        run(*TINY, "--model", step / "adapter")


def test_the_reference_is_the_model_without_its_adapters(monkeypatch):
    """No second copy: at first the KL is 0 and so is its gradient, later it is that to a copy of
    the initial model."""
    def adapted():
        model = small_net()
        model.add_lora(2, 4, "")
        g = torch.Generator().manual_seed(0)
        for p in model.adapters().values():
            torch.nn.init.normal_(p, std=0.3, generator=g)
        return model

    def gradients(model, reference, **flags):
        flags = train.Flags(loss="grpo", samples=4, clip_norm=0, tokens_per_microbatch=30,
                            max_new_tokens=16, **flags)
        rollouts = rollouts_for(12)
        train.assign_advantages(rollouts, flags)
        optimizer = KeepGradients(model)
        run = SimpleNamespace(flags=flags, model=model, reference=reference, step=1,
                              optimizer=optimizer)
        assert train.update(run, rollouts, {}, train.Meter()) > 1e-3
        return optimizer.seen

    model = adapted()
    with torch.no_grad():
        for name, p in model.adapters().items():
            if "lora_B" in name:
                p.zero_()  # nothing to pay for
    free = gradients(model, model, kl_beta=0.0)
    paid = gradients(model, model, kl_beta=5.0)
    assert all(torch.allclose(paid[name], free[name], atol=1e-6) for name in free)

    model = adapted()
    ours = gradients(model, model, kl_beta=5.0)
    copied = gradients(model, small_net(), kl_beta=5.0)
    without = gradients(model, None)
    for name, gradient in ours.items():
        assert torch.allclose(gradient, copied[name], rtol=1e-4, atol=1e-6), name
        assert (gradient - without[name]).abs().max() > 1e-3, name


def rollouts_for(count, samples=4, seed=0):
    """Ragged rollouts of made-up tokens; every third response is right."""
    g = torch.Generator().manual_seed(seed)
    rollouts = []
    for i in range(count):
        length = int(torch.randint(1, 12, (1,), generator=g))
        prompt_len = int(torch.randint(1, 6, (1,), generator=g))
        tokens = torch.randint(0, 16, (prompt_len + length,), generator=g).tolist()
        logp = -3 * torch.rand(length, generator=g)
        rollouts.append(Rollout(tokens, prompt_len, logp.tolist(), True,
                                score=float(i % 3 == 0), group=i // samples))
    return rollouts


def talks_for(count):
    """The same, with a tool's tokens among them; a policy has the first word."""
    rollouts = rollouts_for(count)
    for r in rollouts:
        after_the_first = r.tokens[r.prompt_len + 1:]
        r.drawn = [True] + [token % 3 > 0 for token in after_the_first]
        r.logp = [logp if own else 0.0 for logp, own in zip(r.logp, r.drawn)]
    assert sum(r.length for r in rollouts) < sum(len(r.logp) for r in rollouts) - 10
    return rollouts


def small_net(seed=1, **more):
    config = dict(model_type="qwen2", vocab_size=16, hidden_size=16, intermediate_size=32,
                  num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3)
    return Model.from_scratch(config | more, seed)


class KeepGradients:
    """Stands for an optimizer: takes the gradients, changes nothing."""

    def __init__(self, model):
        self.model, self.param_groups = model, [{}]

    def step(self):
        self.seen = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                self.seen[name] = p.grad.clone()

    def zero_grad(self):
        self.model.zero_grad()


def gradients(name, budget, **flags):
    flags = train.Flags(loss=name, samples=4, tokens_per_microbatch=budget, max_new_tokens=16,
                        clip_norm=0, **flags)
    model, rollouts = small_net(), rollouts_for(12)
    optimizer = KeepGradients(model)
    train.assign_advantages(rollouts, flags)
    run = SimpleNamespace(flags=flags, model=model, reference=None, optimizer=optimizer, step=1)
    meter = train.Meter()
    norm = train.update(run, rollouts, {}, meter)
    assert norm > 1e-3
    return optimizer.seen, meter.means()


BATCH_STATISTICS = {"bapo", "m2po", "clip_cov", "kl_cov"}  # over the rows of a call, they say


@pytest.mark.parametrize("name", sorted(set(losses.OBJECTIVES) - BATCH_STATISTICS))
def test_micro_batches_change_neither_gradients_nor_metrics(name):
    """One pass over 12 ragged responses, and passes of at most 30 tokens and of 1."""
    whole, metrics_whole = gradients(name, 10**6)
    for budget in (30, 1):
        parts, metrics_parts = gradients(name, budget)
        for key, value in whole.items():
            assert torch.allclose(value, parts[key], rtol=1e-5, atol=1e-6), (budget, key)
        assert metrics_parts == pytest.approx(metrics_whole, rel=1e-4, abs=1e-6), budget


@pytest.mark.parametrize("rollouts", [rollouts_for(12), talks_for(12)])
def test_an_update_is_the_gradient_of_the_loss_over_the_mini_batch(rollouts):
    """Against one padded forward pass: temperature, mask, reference and scale are right, also where
    a tool speaks: its tokens are in no denominator."""
    flags = train.Flags(loss="grpo", samples=4, tokens_per_microbatch=30, max_new_tokens=16,
                        clip_norm=0, temperature=0.7, kl_beta=0.1)
    model, reference = small_net(), small_net(seed=2)
    train.assign_advantages(rollouts, flags)
    optimizer = KeepGradients(model)
    run = SimpleNamespace(flags=flags, model=model, reference=reference, step=1,
                          optimizer=optimizer)
    train.update(run, rollouts, {}, train.Meter())

    width = max(len(r.tokens) for r in rollouts)
    ids = torch.zeros(12, width, dtype=torch.long)
    mask, old_logp = torch.zeros(12, width - 1), torch.zeros(12, width - 1)
    for i, r in enumerate(rollouts):
        ids[i, :len(r.tokens)] = torch.tensor(r.tokens)
        response = slice(r.prompt_len - 1, len(r.tokens) - 1)
        mask[i, response] = torch.tensor(r.drawn or [1] * r.length)
        old_logp[i, response] = torch.tensor(r.logp)

    def logp(net):
        z = (net(ids)[:, :-1] / 0.7).log_softmax(-1)
        return z.gather(2, ids[:, 1:, None])[..., 0]
    advantage = torch.tensor([r.advantage for r in rollouts])
    loss, _ = losses.policy_loss("grpo", logp(model), old_logp, advantage, mask, kl_beta=0.1,
                                 ref_logp=logp(reference).detach())
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 1e-4, name
        assert torch.allclose(optimizer.seen[name], p.grad, rtol=1e-4, atol=1e-6), name


def test_official_acpo_depends_on_the_cut():
    """--acpo_stats micro is the official run, whose algorithm changes with the micro-batch."""
    whole, _ = gradients("acpo", 10**6, acpo_stats="micro")
    parts, _ = gradients("acpo", 30, acpo_stats="micro")
    differences = [(whole[name] - parts[name]).abs().max() for name in whole]
    assert max(differences) > 1e-4


def test_no_statistics_pass_before_the_first_update(monkeypatch):
    """Before anything is updated the ratio is 1, and the extra forward pass is spared: unless a
    copy of the weights has sampled."""
    passes = []
    flags = train.Flags(samples=4, tokens_per_microbatch=30, max_new_tokens=16)
    model, rollouts = small_net(), rollouts_for(12)
    train.assign_advantages(rollouts, flags)
    run = SimpleNamespace(flags=flags, model=model, reference=None, step=1,
                          optimizer=KeepGradients(model))
    real = train.token_stats

    def counted(*args):
        passes.append(1)
        return real(*args)
    monkeypatch.setattr(train, "token_stats", counted)
    parts = len(train.microbatches(rollouts, 30))
    for first, dtype, expected in [
        (True, "", parts),
        (False, "", 2 * parts),
        (True, "bfloat16", 2 * parts),
    ]:
        passes.clear()
        flags.rollout_dtype = dtype
        train.update(run, rollouts, {}, train.Meter(), first=first)
        assert len(passes) == expected


# ---- The sampler is not the trainer ------------------------------------------------------------

BOUNDS = {  # so narrow that the gap of bfloat16 reaches them
    "tis": "high=1.0",
    "icepop": "low=0.999 high=1.001",
    "seq_tis": "high=1.0",
    "seq_mis": "high=1.001",
    "geo_mis": "low=0.9995 high=1.0005",
    "opsm": "delta=0.0001",
}


def test_a_sampler_in_bfloat16_is_measured_and_corrected(run):
    """The same seeds sample the same responses; their weight is another, and so are the updates."""
    gap = [*TINY, "--old_logp", "trainer", "--loss", "grpo", "--rollout_dtype", "bfloat16"]
    run(*TINY, "--old_logp", "trainer", "--loss", "grpo", "--out", "same")
    for m in metrics("same"):
        assert m["sampler_ess"] > 1 - 1e-9
        assert m["masked"] is None
    run(*gap, "--out", "plain")
    for m in metrics("plain"):
        assert m["sampler_kl"] > 1e-7
        assert m["sampler_max"] > 1e-3
        assert m["sampler_ess"] < 1 - 1e-7
    assert_learned("plain")
    for name, bounds in BOUNDS.items():
        run(*gap, "--correction", name, "--correction_args", *bounds.split(), "--out", name)
        assert_learned(name)
        first, plain = metrics(name)[0], metrics("plain")[0]
        assert first["sampler_kl"] == plain["sampler_kl"]  # before any correction
        assert (first["masked"] == 0) == name.endswith("tis")
        assert first["grad_norm"] != plain["grad_norm"]


def test_a_copy_samples_on_one_cpu_alone(monkeypatch):
    for world, device in ((2, "cpu"), (1, "cuda")):
        monkeypatch.setattr(train, "WORLD", world)
        monkeypatch.setattr(train, "DEVICE", torch.device(device))
        dtype = "bfloat16" if device == "cpu" else "float32"
        with pytest.raises(ValueError, match=f"--rollout_dtype {dtype}: sharded weights"):
            train.parse(["--rollout_dtype", dtype])
    assert train.parse(["--rollout_dtype", "bfloat16"])  # as the trainer computes on CUDA


def test_the_loss_sees_three_policies_and_nothing_of_what_a_tool_said(monkeypatch):
    """pi_old of the trainer, the sampler's own log-probs, in each response's own places."""
    flags = train.Flags(loss="grpo", samples=4, correction="tis", old_logp="trainer",
                        max_new_tokens=20, tokens_per_microbatch=1000)
    model, rollouts = small_net(), rollouts_for(12)
    for r in rollouts:
        r.drawn = [j % 3 != 1 for j in range(len(r.logp))]
    train.assign_advantages(rollouts, flags)
    run = SimpleNamespace(flags=flags, model=model, reference=None, step=1,
                          optimizer=KeepGradients(model))
    meter = train.Meter()
    train.assign_old_logp(run, rollouts, meter)
    seen, real = [], losses.policy_loss

    def spy(name, logp, old_logp, adv, mask, **how):
        seen.append((logp.detach(), old_logp, mask, how["sampler_logp"]))
        return real(name, logp, old_logp, adv, mask, **how)
    monkeypatch.setattr(losses, "policy_loss", spy)
    assert train.update(run, rollouts, {}, meter, first=True) > 1e-3
    (logp, old_logp, mask, sampler_logp), = seen
    recorded = [torch.tensor(r.own(r.logp)).tolist() for r in rollouts]  # in float32
    given = [row[counts].tolist() for row, counts in zip(sampler_logp, mask)]
    assert sorted(given) == sorted(recorded)
    assert torch.equal(logp[mask], old_logp[mask])
    assert not torch.equal(old_logp, sampler_logp)


def test_the_gap_is_summed_over_parts_and_taken_from_rho_before_any_bound():
    g = torch.Generator().manual_seed(0)
    sampler, trainer = -3 * torch.rand(2, 60, generator=g)
    meter = train.Meter()
    for part in (slice(0, 13), slice(13, 60)):
        mask = torch.ones(len(sampler[part]), dtype=torch.bool)
        meter.compare(train.TokenStats(mask, sampler[part], trainer[part], None, None))
    means, rho = meter.means(), (trainer - sampler).double().exp()
    k3 = rho - 1 - rho.log()
    assert means["sampler_kl"] == pytest.approx(k3.mean().item())
    ess = rho.sum()**2 / (60 * (rho**2).sum())
    assert means["sampler_ess"] == pytest.approx(ess.item())
    assert means["sampler_max"] == pytest.approx(rho.log().abs().max().item())


def test_temperature_scales_the_trained_log_probs():
    flags, rollouts = train.Flags(temperature=0.5), rollouts_for(1)
    model, rollout = small_net(), rollouts[0]
    logits = model(torch.tensor([rollout.tokens]))[0] / 0.5
    targets = torch.tensor(rollout.tokens[1:])[:, None]
    expected = logits.log_softmax(-1)[:-1].gather(1, targets)
    got = train.token_stats(model, rollouts, flags).logp
    assert torch.allclose(got[0], expected[rollout.prompt_len - 1:, 0], atol=1e-5)


def test_the_stop_token_is_trained_and_token_values_decide_nothing():
    """Peers drop the stop token's gradient, or mask by the value of the padding id: here a pad id
    inside a response, or as its end, counts like any other token."""
    model = small_net(pad_token_id=3, eos_token_id=3)
    long = Rollout([5, 6, 3, 7, 3], 2, [-1.0] * 3, True)
    short = Rollout([5, 6, 8], 2, [-1.0], True)
    tokens = train.token_stats(model, [long, short], train.Flags(samples=2))
    assert tokens.mask.tolist() == [[True] * 3, [True, False, False]]
    z = model(torch.tensor([long.tokens]))[0].log_softmax(-1)
    expected = z[[1, 2, 3], [3, 7, 3]]
    assert torch.allclose(tokens.logp[0], expected, atol=1e-5)
    adv = torch.tensor([1.0, -1.0])
    loss, _ = losses.policy_loss("gpg", tokens.logp, tokens.old_logp, adv, tokens.mask)
    loss.backward()
    assert model.lm_head.weight.grad[3].abs().max() > 0


def gradient_by_token(rollouts):
    """For each response token, the largest entry of the loss's gradient at the hidden state that
    predicts it: all that its log-prob can teach goes through there."""
    flags = train.Flags(loss="grpo", samples=4, tokens_per_microbatch=10**6, max_new_tokens=16,
                        kl_beta=0.1)
    model, seen = small_net(), []
    run = SimpleNamespace(flags=flags, model=model, reference=small_net(seed=2), step=1,
                          optimizer=KeepGradients(model))
    train.assign_advantages(rollouts, flags)

    def keep_gradient(norm, inputs, hidden):
        hidden.register_hook(seen.append)
    model.norm.register_forward_hook(keep_gradient)
    rollouts, = train.microbatches(rollouts, 10**6)
    assert train.update(run, rollouts, {}, train.Meter()) > 1e-3
    sequences = [r.tokens for r in rollouts]
    _, rows, _ = pack(sequences, [r.prompt_len for r in rollouts], "cpu")
    largest = seen[0].abs().amax(-1)
    at = [row[r.prompt_len - 1:] for r, row in zip(rollouts, rows)]
    return rollouts, [[largest[place].item() for place in places] for places in at]


def test_what_a_tool_says_has_no_gradient():
    """Exactly none; and a single token of it that were taken for the policy's own would have."""
    rollouts, gradient = gradient_by_token(talks_for(12))
    for r, values in zip(rollouts, gradient, strict=True):
        assert [value > 0 for value in values] == r.drawn
        assert max(values) > 1e-4
    forged = talks_for(12)
    r = next(r for r in forged if not all(r.drawn))
    place = r.drawn.index(False)
    r.drawn[place] = True
    rollouts, gradient = gradient_by_token(forged)
    assert gradient[rollouts.index(r)][place] > 1e-4


def test_the_trainers_own_log_probs_take_the_places_of_the_policys_tokens():
    """--old_logp trainer: as many as the policy drew, and each at its own token."""
    rollouts, model = talks_for(12), small_net()
    run = SimpleNamespace(flags=train.Flags(tokens_per_microbatch=30), model=model)
    train.assign_old_logp(run, rollouts, train.Meter())
    for r in rollouts:
        z = model(torch.tensor([r.tokens]))[0].log_softmax(-1)
        places = [i for i, own in enumerate(r.drawn, r.prompt_len) if own]
        expected = torch.stack([z[i - 1, r.tokens[i]] for i in places])
        assert torch.allclose(torch.tensor(r.old_logp), expected, atol=1e-5)
    _, old_logp = train.recorded(rollouts)
    assert old_logp[0, :rollouts[0].length].tolist() == pytest.approx(rollouts[0].old_logp)


def test_replies_count_towards_too_long_and_not_towards_length():
    one = Rollout([1, 2, 3, 4], 1, [-1.0, 0.0, 0.0], True)
    one.drawn = [True, False, False]
    two = Rollout([1, 2], 1, [-1.0], True)
    flags = train.Flags(samples=2, max_new_tokens=4, overlong_buffer=2, advantage="reward",
                        loss="gpg")
    train.assign_advantages([one, two], flags)
    assert (one.length, two.length) == (1, 1)
    assert (one.advantage, two.advantage) == (-0.5, 0.0)
    flags.max_tokens = 3  # 2 for a response, both of which cost
    train.assign_advantages([one, two], flags)
    assert (one.advantage, two.advantage) == (-1.5, -0.5)


TALKING = """--data hops --width 32 --layers 1 --skill_steps 80 --habit_steps 0 --prompts 6
--samples 8 --updates 2 --eval_problems 8 --lr 0.003 --warmup 3 --max_new_tokens 60""".split()


def test_a_policy_with_a_tool_resumes_and_is_shared_by_ranks(run, tmp_path):
    run(*TALKING, "--steps", 2, "--out", "whole")
    assert_learned("whole")
    for m in metrics("whole"):
        assert m["calls"] > 0.5 and m["failed_calls"] == 0
        assert m["sampler_kl"] < 1e-9 and m["sampler_max"] < 5e-5
    run(*TALKING, "--steps", 1, "--out", "r")
    run("--out", "r", "--resume", "--steps", 2)
    assert_same_runs("whole", "r")
    finish(start(tmp_path, *TALKING, "--steps", 2, "--out", "two", world=2))
    assert_close_runs("whole", "two", 2e-4)
    for one, other in zip(metrics("whole"), metrics("two")):
        assert (one["calls"], one["length"]) == (other["calls"], other["length"])


def test_the_warm_start_does_not_learn_what_a_tool_says(monkeypatch):
    """It would learn the facts by heart: the wrong lesson, and a lower loss."""
    packed, tokenizer = [], data.char_tokenizer("hops")

    def noted(*args):
        packed.append(args)
        return pack(*args)
    monkeypatch.setattr(train, "pack", noted)
    flags = train.Flags(data="hops", skill_steps=1, habit_steps=1)
    train.warm_start(small_net(vocab_size=len(tokenizer)), tokenizer, flags)
    (sequences, lens, _, drawn), habit = packed
    for tokens, prompt_len, own in zip(sequences, lens, drawn, strict=True):
        whole = tokenizer.decode(tokens[prompt_len:])
        trained = "".join(c if mine else "-" for c, mine in zip(whole, own, strict=True))
        without_replies = re.sub(r"\([^)]*\)", lambda reply: "-" * len(reply[0]), whole)
        assert trained == without_replies != whole
    assert any(all(own) for own in habit[3])


def test_what_a_tool_says_is_not_graded():
    """Not even a reply that is the answer in its right form."""
    tokenizer, graded = data.char_tokenizer("hops"), []
    tool = train.tools.Tool(lambda calls: ["#7$"] * len(calls),
                            "a", "]", "(", ")", marks="")

    def scorer(items):
        graded.extend(text for _, text, _ in items)
        return [(0.0, "ok")] * len(items)
    flags = train.Flags(template="none", max_new_tokens=60)
    model = small_net(vocab_size=len(tokenizer), initializer_range=0.1)
    run = SimpleNamespace(flags=flags, scorer=scorer, model=model, tokenizer=tokenizer,
                          end_ids=[], tool=tool)
    problems = data.load("hops", "test", 16)
    questions = data.encode(problems, "none", tokenizer, 99)
    rollouts = train.sample(run, questions, range(16), 4)
    whole = [tokenizer.decode(r.tokens[r.prompt_len:]) for r in rollouts]
    assert sum(text.count("](#7$)") for text in whole) > 3
    assert graded == [text.replace("](#7$)", "]") for text in whole]


def test_groups_never_mix(run, monkeypatch):
    """Each group is one prompt's, with its own problem's reward and its own baseline."""
    seen, real = [], train.minibatches

    def spy(rollouts, flags):
        seen.append(rollouts)
        return real(rollouts, flags)
    monkeypatch.setattr(train, "minibatches", spy)
    run(*TINY, "--out", "r", "--loss", "grpo")
    answers = {p.prompt: p.answer["answer"] for p in data.load("chainsum", "train")}
    tokenizer = data.load_tokenizer(Path("r/step-000002"))
    for group in train.groups_of(sum(seen, []), 8):
        assert len({tuple(r.tokens[:r.prompt_len]) for r in group}) == 1
        scores = torch.tensor([r.score for r in group])
        advantage = torch.tensor([r.advantage for r in group])
        assert torch.allclose(advantage, losses.advantages(scores, 8, "grpo"))
        prompt = tokenizer.decode(group[0].tokens[:group[0].prompt_len])
        for r in group:
            text = tokenizer.decode(r.tokens[r.prompt_len:])
            right = text.count("#") == 1 and text.endswith(f"#{answers[prompt]}$")
            assert r.score == right


def test_minibatches_partition_the_rollout():
    for prompts, samples, updates in [
        (5, 4, 2),
        (5, 4, 5),
        (5, 4, 7),
        (3, 1, 3),
        (1, 6, 4),
    ]:
        flags = train.Flags(prompts=prompts, samples=samples, updates=updates)
        rollouts = [Rollout([1, 2], 1, [0.0], True) for _ in range(prompts * samples)]
        batches = train.minibatches(rollouts, flags)
        assert len(batches) == updates
        dealt = [id(r) for batch in batches for r in batch]
        assert dealt == [id(r) for r in rollouts]
        if updates <= prompts:
            assert all(len(batch) % samples == 0 for batch in batches)  # whole groups


def test_minibatches_by_samples_hold_the_same_samples_of_every_group():
    """WAPO's: rows are sample-major there, so a mini-batch has n / K samples of all prompts."""
    def sampled(flags):
        """[[(group, sample)]]: the mini-batches."""
        rollouts = [Rollout([g, j], 1, [0.0], True, group=g)
                    for g in range(flags.prompts) for j in range(flags.samples)]
        return [[tuple(r.tokens) for r in batch] for batch in train.minibatches(rollouts, flags)]
    flags = train.Flags(loss="wapo", prompts=3, samples=8, updates=4)
    _, second, _, _ = sampled(flags)
    assert second == [(g, j) for j in (2, 3) for g in range(3)]
    groups = train.Flags(loss="wapo", minibatch="groups", prompts=4, samples=2, updates=4)
    assert sampled(groups)[1] == [(1, 0), (1, 1)]
    many = train.Flags(loss="grpo", minibatch="samples", prompts=3, samples=2, updates=6)
    assert sampled(many) == [[(g, j)] for j in range(2) for g in range(3)]


@pytest.mark.parametrize("winners", [0, 1, 3])
def test_wapo_is_its_repositorys(winners):
    """Four updates of layer6ai-labs/wapo ca70250, typed again: orchestrator.py makes advantages,
    weights and the normaliser, trainer.py the loss of each mini-batch. Some mini-batches hold no
    sample that won, and in all there may be fewer winning groups than mini-batches."""
    P, n, K, budget = 5, 8, 4, 40
    flags = train.Flags(loss="wapo", prompts=P, samples=n, updates=K, max_tokens=budget,
                        max_new_tokens=16, clip_norm=0, tokens_per_microbatch=60)
    rollouts, model = rollouts_for(P * n, samples=n), small_net()
    for i, r in enumerate(rollouts):
        r.score = float(r.group < winners and i % 3 == 0)
    train.assign_advantages(rollouts, flags)
    optimizer = KeepGradients(model)
    run = SimpleNamespace(flags=flags, model=model, reference=None, optimizer=optimizer, step=1)
    ours = []
    for minibatch in train.minibatches(rollouts, flags):
        train.update(run, minibatch, {}, train.Meter())
        ours.append(optimizer.seen)

    rows = [rollouts[p * n + k] for k in range(n) for p in range(P)]  # sample-major
    rewards = [r.score for r in rows]
    advantages = [0.0] * len(rows)
    for p in range(P):
        mean = sum(rewards[p::P]) / n
        for k in range(n):
            advantages[p + k * P] = rewards[p + k * P] - mean
    won = [any(a > 0 for a in advantages[p::P]) for p in range(P)]
    normalizer = max(sum(won), 1)
    size = len(rows) // K
    for k in range(K):
        model.zero_grad()
        total = torch.zeros(())
        for i in range(k * size, (k + 1) * size):
            r = rows[i]
            logits = model(torch.tensor([r.tokens]))[0, r.prompt_len - 1:-1]
            response = r.tokens[r.prompt_len:]
            logp = logits.log_softmax(-1)[range(len(response)), response]
            ratio = (logp - torch.tensor(r.logp)).exp()
            if advantages[i] > 0:  # mask_negative_advantages
                clipped = ratio.clamp(max=1 + 9.0)
                loss = -torch.min(ratio * advantages[i], clipped * advantages[i])
                total = total + loss.sum() / (n * budget)
        if total.requires_grad:
            (total * K / normalizer).backward()
        for name, p in model.named_parameters():
            theirs = torch.zeros_like(p) if p.grad is None else p.grad
            assert torch.allclose(ours[k][name], theirs, rtol=1e-4, atol=1e-7), (k, name)
    largest = max(g.abs().max() for seen in ours for g in seen.values())
    assert winners == 0 or largest > 1e-3


def test_a_budget_of_prompt_and_response(run, monkeypatch):
    """A long prompt leaves room for a shorter response; the run goes through."""
    without, budget = train.Flags(max_new_tokens=6), train.Flags(max_new_tokens=6, max_tokens=10)
    assert train.longest_response(without, 100) == 6
    longest = [train.longest_response(budget, prompt) for prompt in (2, 4, 7, 9)]
    assert longest == [6, 6, 3, 1]
    seen, real = [], train.sample

    def sample(*args):
        seen.extend(real(*args))
        return seen[-len(args[1]) * args[3]:]
    monkeypatch.setattr(train, "sample", sample)
    run(*TINY, "--loss", "wapo", "--max_tokens", 11, "--out", "r")  # prompts have 7 tokens
    assert_learned("r")
    assert max(r.length for r in seen) == 4
    with pytest.raises(SystemExit, match="allowed: 1 to 6"):
        run(*TINY, "--max_tokens", 7)
    with pytest.raises(SystemExit, match="--max_tokens 4096: the model's context is 2048"):
        run(*TINY, "--max_tokens", 4096)


def test_microbatches_respect_the_budget(monkeypatch):
    lengths = (3, 50, 7, 7, 9, 30, 2, 2, 2, 41)
    rollouts = [Rollout([0] * n, 1, [], True) for n in lengths]
    for world in (1, 2, 3):
        monkeypatch.setattr(train, "WORLD", world)
        for budget in (1, 20, 60, 1000):
            bins = train.microbatches(rollouts, budget)
            assert len(bins) % world == 0
            dealt = [id(r) for microbatch in bins for r in microbatch]
            assert sorted(dealt) == sorted(map(id, rollouts))
            for microbatch in bins:
                tokens = sum(len(r.tokens) for r in microbatch)
                assert len(microbatch) == 1 or tokens <= budget


# ---- Trackers ----------------------------------------------------------------------------------

TRACKER = """
import pathlib, threading
def called(name, *said):
    with open("called", "a") as file:
        print(name, *said, file=file)
    if "{fails}" == name:
        raise {error}("no \\n\x1b[2J network")
    if "{fails}" == "hang in " + name:
        threading.Event().wait()
def init(**how): called("init", how["name"], how["config"]["loss"], how["resume"])
def log(values, step): called("log", step, *(f"{{k}}={{v}}" for k, v in values.items()))
def finish(): called("finish")
def Image(path): return pathlib.Path(path).stat().st_size > 0
"""


def track_with(directory, monkeypatch, fails="", error="ConnectionError"):
    """A made-up trackio, which fails in one of its functions."""
    (directory / "trackio.py").write_text(TRACKER.format(fails=fails, error=error))
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr(train, "draw_curves", lambda out, *_: (out / "curves.png").write_text("p"))
    monkeypatch.setattr(train, "TRACKER_PATIENCE", 0.1 if "hang" in fails else 60)
    return [*TINY, "--track", "trackio", "--out", "r"]


def test_a_tracker_gets_config_metrics_and_picture_also_of_a_resumed_run(
        run, tmp_path, monkeypatch):
    run(*track_with(tmp_path, monkeypatch), "--save_every", 1)
    run("--out", "r", "--resume", "--steps", 3)
    called = [line.split() for line in Path("called").read_text().splitlines()]
    assert [line[0] for line in called] == "init log log log finish init log log finish".split()
    assert called[0] == called[5] == ["init", called[0][1], "acpo", "allow"]
    steps = [line[1] for line in called if line[0] == "log"]
    assert steps == ["1", "2", "2", "3", "3"]
    assert f"reward={metrics('r')[0]['reward']}" in called[1]
    assert called[3][2:] == called[7][2:] == ["curves=True"]
    assert not any("None" in word for line in called for word in line)


@pytest.mark.parametrize("fails", ["init", "log", "finish", "hang in init", "hang in log"])
def test_a_tracker_that_fails_or_hangs_stops_nothing(run, tmp_path, monkeypatch, capsys, fails):
    error = "SystemExit" if fails == "log" else "OSError"
    run(*track_with(tmp_path, monkeypatch, fails, error))
    assert Path("r/latest").read_text() == "step-000002"
    assert len(metrics("r")) == 2
    said, = [line for line in capsys.readouterr().out.splitlines() if "--track" in line]
    assert ("left behind" in said) == ("hang" in fails)
    assert "\x1b" not in said


def test_a_tracker_that_is_not_installed_is_one_line(run, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--track wandb: .*; pip install wandb$"):
        run(*TINY, "--track", "wandb")


def copy_a_picture(out, *_):
    shutil.copy(ROOT / "experiments/figures/objectives.png", out / "curves.png")


def test_wandb_offline(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(train, "draw_curves", copy_a_picture)
    run(*TINY, "--steps", 1, "--track", "wandb", "--out", "r")
    file, = Path("r/wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    entropy = json.dumps(metrics("r")[0]["entropy"])
    assert b"entropy" in content and entropy.encode() in content
    assert b"skill_steps" in content
    assert list(file.parent.glob("files/media/images/curves_*.png"))


def test_tensorboard(run, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(train, "draw_curves", copy_a_picture)
    run(*TINY, "--save_every", 1, "--track", "tensorboard", "--out", "r")
    shutil.rmtree("r/step-000002")  # step 2 is made again
    Path("r/latest").write_text("step-000001")
    run("--out", "r", "--resume", "--steps", 3)
    board = reader.EventAccumulator("r/tensorboard").Reload()
    for name in ("reward", "grad_norm", "eval"):
        written = {m["step"]: m[name] for m in metrics("r") if m[name] is not None}
        assert {e.step: e.value for e in board.Scalars(name)} == pytest.approx(written)
    assert "skill_steps" in str(board.Tensors("config/text_summary")[0].tensor_proto)
    assert board.Images("curves")[-1].width > 100


# ---- What is wrong, in one line ----------------------------------------------------------------

@pytest.mark.parametrize("flags, said", [
    ("--loss acpoo", "acpo"),
    ("--los acpo", "--loss"),
    ("--data chainsun", "chainsum"),
    ("--steps many", "--steps"),
    ("--prompts 0", "--prompts"),
    ("--updates 100", "--updates 100"),
    ("--loss_args alhpa=2", "alpha"),
    ("--loss_args alpha", "name=value"),
    ("--loss_args alpha=abc", "acpo cannot use that"),
    ("--agg mean", "token-mean"),
    ("--loss_args dual_clip=-3", "dual_clip"),
    ("--advantage gae", "gae"),
    ("--model no/where/at/all", "no such directory"),
    ("--model .", "model.safetensors"),
    ("--template orzz", "orz"),
    ("--data noanswer.jsonl", "needs --model"),
    ("--eval_data missing.jsonl", "missing.jsonl"),
    ("--eval_data empty.jsonl", "empty.jsonl"),
    ("--eval_data noanswer.jsonl", "noanswer.jsonl line 2"),
    ("--lr 0", "--lr"),
    ("--lr nan", "--lr"),
    ("--steps 1000000", "--steps"),
    ("--timeout 1e30", "--timeout"),
    ("--clip_norm nan", "--clip_norm"),
    ("--clip_norm inf", "--clip_norm"),
    ("--beta2 1", "--beta2"),
    ("--temperature inf", "--temperature"),
    ("--clip_norm -1", "--clip_norm"),
    ("--weight_decay -5", "--weight_decay"),
    ("--temperature 1e-40", "--temperature"),
    ("--max_prompt_tokens 3", "--max_prompt_tokens 3"),
    ("--out full", "--resume"),
    ("--out blocked/x", "blocked"),
    ("--resume --out never", "no run to continue"),
    ("--acpo_stats all", "--acpo_stats"),
    ("--old_logp engine", "--old_logp"),
    ("--correction tis", "nothing is left to correct"),
    ("--rollout_dtype int8", "--rollout_dtype"),
    ("--correction tsi --old_logp trainer", "nearest: tis"),
    ("--correction_args high=3", "high=3"),
    ("--correction tis --old_logp trainer --correction_args hihg=3", "--correction_args hihg=3"),
    ("--correction tis --old_logp trainer --correction_args high=big",
     "--correction_args high=big"),
    ("--shards_per_replica 2", "--shards_per_replica 2"),
    ("--offload", "--offload"), ("--shards_per_replica 1", "--shards_per_replica"),
    ("--tool serch", "--tool"),
    ("--tool facts", "--tool facts: this --data has no facts"),
    ("--tool search", "chainsum has no passages"),
    ("--turns 0", "--turns"),
    ("--tool search --search_url file:///etc/passwd", "--search_url file:///etc/passwd"),
    ("--width 20", "multiple of 8"),
    ("--dynamic_sampling -1", "--dynamic_sampling"),
    ("--overlong_buffer 99", "--overlong_buffer 99"),
])
def test_bad_input_is_one_line_and_nothing_is_lost(run, tmp_path, flags, said):
    question = '{"prompt": "1", "answer": "2", "task": "chainsum"}\n'
    (tmp_path / "noanswer.jsonl").write_text(question + '{"prompt": "1"}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blocked").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/config.json").write_text("{}")
    with pytest.raises(SystemExit) as e:
        run(*TINY, *flags.split())
    assert e.value.code.startswith("train.py: ")
    assert said in e.value.code
    assert "\n" not in e.value.code
    assert (tmp_path / "full/config.json").read_text() == "{}"
    assert (tmp_path / "blocked").read_text() == "a file"
    assert not Path("runs/default/config.json").exists()


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run(run, monkeypatch):
    real = Model.forward

    def forward(self, ids, rows=None, targets=None, temperature=1.0):
        out = real(self, ids, rows, targets, temperature)
        if torch.is_grad_enabled():
            out = out[0] * float("nan"), *out[1:]
        return out
    run(*TINY, "--out", "fine")
    monkeypatch.setattr(Model, "forward", forward)
    for loss in ("acpo", "clip_cov"):
        with pytest.raises(SystemExit, match="not finite"):
            run(*TINY, "--steps", 9, "--out", loss, "--loss", loss)
        assert [m["skipped"] for m in metrics(loss)] == [2, 2, 2]
        assert "NaN" not in Path(loss, "metrics.jsonl").read_text()


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_bar_on_a_terminal_a_line_a_step_elsewhere(run, monkeypatch, capsys, on_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    run(*TINY, "--out", "r")
    printed = capsys.readouterr()
    assert ("step 2/2 reward" in printed.out) != on_terminal
    assert ("| 2/2 [" in printed.err) == on_terminal


def test_the_first_lines_say_what_comes(run, capsys):
    run(*TINY, "--steps", 1, "--kl_beta", 0.1, "--out", "r")
    model, work, memory = capsys.readouterr().out.splitlines()[:3]
    count = sum(t.numel() for t in weights("r").values())
    assert f"a new small model: {count:,} parameters on 1 x cpu" in model
    assert "6 x 8 responses of up to 6 tokens, 288 at most" in work
    assert "before the first" in work
    said = float(memory.split()[4]) * 2**20
    # float32: weights, gradient, two moments, the start
    assert said == pytest.approx(5 * 4 * count, abs=2**20 / 20)
    assert "KV cache of up to 2 GiB, forward passes over 4,096 tokens" in memory


def test_long_updates_show_where_they_are(run, monkeypatch, capsys):
    """Here every look at the clock takes four seconds."""
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    run(*TINY, "--steps", 1, "--tokens_per_microbatch", 60, "--out", "r")
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("updates: ")]
    tokens = round(metrics("r")[0]["length"] * 48)
    assert said and all(f" of {tokens} tokens, about " in line for line in said)


def test_curves_cost_a_short_run_one_picture(run, monkeypatch):
    drawn = []

    def draw(out, title, history):
        drawn.append(history[-1]["step"])
    monkeypatch.setattr(train, "draw_curves", draw)
    run(*TINY, "--out", "r")
    assert drawn == [2]


def test_an_objective_may_use_all_that_a_batch_has(monkeypatch):
    """Also in the trial at the start."""
    def peaks(b):
        return -b.ratio * b.A * b.sum_p2 * b.entropy * b.pass_rate
    monkeypatch.setitem(losses.OBJECTIVES, "peaks", peaks)
    losses.objective("seq-mean-token-sum-norm")(peaks)
    assert train.parse(["--loss", "peaks"]).loss == "peaks"


def test_help_names_every_flag():
    command = [sys.executable, ROOT / "train.py", "--help"]
    out = subprocess.run(command, capture_output=True, text=True).stdout
    assert all(f"--{name}" in out for name in train.Flags.__dataclass_fields__)
    assert "torchrun" in out


def test_a_local_file_is_trained_on_and_a_tenth_held_out(run, tmp_path, monkeypatch):
    """--data FILE --model DIR: the path for people's own problems."""
    model = next(Path("runs/warmstart").glob("*/config.json")).parent
    with open(tmp_path / "mine.jsonl", "w") as file:
        for i in range(20):
            row = {"prompt": f"{i:06d}=", "answer": str(i % 10), "task": "chainsum"}
            print(json.dumps(row), file=file)
    asked, real = [], train.sample

    def sample(run, questions, numbers, n):
        asked.append((n, {q.problem.id for q in questions}))
        return real(run, questions, numbers, n)
    monkeypatch.setattr(train, "sample", sample)
    run("--model", model, "--data", "mine.jsonl", "--max_new_tokens", 8, "--prompts", 4,
        "--samples", 2, "--steps", 9, "--out", "r")
    held_out = [ids for n, ids in asked if n == 1]
    trained = set().union(*(ids for n, ids in asked if n == 2))
    assert held_out == [{"mine-2", "mine-12"}] * 2  # before the first update, after the last
    assert len(trained) == 18  # 36 draws: two epochs of the rest
    assert not trained & held_out[0]


def test_a_failed_start_takes_no_name(run):
    with pytest.raises(SystemExit):
        run(*TINY, "--eval_data", "nowhere.jsonl")
    assert not Path("runs/default").exists()
    run(*TINY, "--steps", 1)
    assert {p.parent.name for p in Path("runs").glob("*/latest")} == {"default"}
