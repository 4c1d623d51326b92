"""What a run survives: kills, power cuts, flipped bits, full disks, other runs, strangers' files.

    python experiments/torture.py              # all of it; the table goes into docs/reliability.md
    python experiments/torture.py bits ranks   # some of it, printed

Each attack is made on a copy of one small run. Then the run is resumed and compared with one that
nothing happened to. There are three outcomes:
    survived   every metric and every weight is the same, bit for bit
    refused    it ends with one line that names what is wrong
    silent     anything else: other numbers, a traceback, a hang, a file outside that was touched
Processes are forked from this one, which has imported torch, so that a run takes a second.
"""
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import data  # noqa: E402
import rewards  # noqa: E402
import train  # noqa: E402
from eval import read_rows  # noqa: E402

SMALL = """--width 16 --layers 1 --skill_steps 10 --habit_steps 70 --prompts 6 --samples 8
--updates 2 --eval_problems 4 --max_new_tokens 6 --lr 0.003 --save_every 1""".split()
TIMING = {"rollout_tps", "update_tps", "seconds"}
TOP = Path(tempfile.mkdtemp(prefix="torture-"))
ATTACKS = {}  # name: (what is done, generator of outcomes)


def attack(what):
    def register(function):
        ATTACKS[function.__name__] = what, function
        return function
    return register


# ---- A run, and what became of it --------------------------------------------------------------

def nothing(*_):
    """The setup of a process that is left alone."""


def child(cwd, flags, setup, rank, world, port):
    """train.main() in a forked process; what it says goes to cwd/said-<rank>."""
    os.chdir(cwd)
    said = os.open(f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
                      WORLD_SIZE=str(world))
    train.RANK, train.WORLD, train.MAIN = rank, world, rank == 0
    sys.argv = ["train.py", "--out", "r", *map(str, flags)]
    setup()
    train.main()


def start(cwd, *flags, setup=nothing, world=1):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=child, args=(cwd, flags, setup, rank, world, port))
             for rank in range(world)]
    for p in ranks:
        p.start()
    return ranks


def end(ranks, seconds=300):
    """Exit codes; "hang" for a process that does not end."""
    codes = []
    for p in ranks:
        p.join(seconds)
        codes.append("hang" if p.is_alive() else p.exitcode)
    for p in ranks:
        p.kill()
        p.join()
    return codes


def go(cwd, steps, *flags, setup=nothing, world=1):
    """Resumes run r, or begins it, and takes it to so many steps. Returns the exit codes."""
    how = ["--resume"] if (cwd / "r/config.json").exists() else SMALL
    return end(start(cwd, *how, "--steps", steps, *flags, setup=setup, world=world))


def has_line(cwd, rank=0):
    """Whether the process ended with one line of train.py and without a traceback."""
    said = (cwd / f"said-{rank}").read_text()
    lines = said.strip().splitlines() or [""]
    return lines[-1].startswith("train.py: ") and "Traceback" not in said and "\x1b" not in said


def resumed(cwd, steps, *flags, world=1):
    """The outcome, after a resume that nothing happens to."""
    code = go(cwd, steps, *flags, world=world)[0]
    return judge(cwd, code, undisturbed(steps, world))


def judge(cwd, code, whole=None):
    """The outcome; `whole` is the run to compare with, where there is one."""
    if code == 0:
        return "survived" if whole is None or same(cwd / "r", whole) else "silent"
    return "refused" if code == 1 and has_line(cwd) else "silent"


def same(run_dir, whole):
    name = (whole / "latest").read_text()
    if (run_dir / "latest").read_text() != name or metrics(run_dir) != metrics(whole):
        return False
    ours = load_file(run_dir / name / "model.safetensors")
    theirs = load_file(whole / name / "model.safetensors")
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


def metrics(run_dir):
    lines = read_rows(run_dir / "metrics.jsonl")
    return [{key: line[key] for key in line.keys() - TIMING} for line in lines]


def place(steps=0, world=1):
    """A new directory with the warm start, and with a run r of so many steps."""
    cwd = Path(tempfile.mkdtemp(dir=TOP))
    shutil.copytree(TOP / "runs", cwd / "runs")
    if steps:
        shutil.copytree(undisturbed(steps, world), cwd / "r", symlinks=True)
    return cwd


def undisturbed(steps, world=1):
    """A run of so many steps, made once: TOP/whole-<steps>-<world>."""
    path = TOP / f"whole-{steps}-{world}"
    if not path.exists():
        cwd = place()
        codes = go(cwd, steps, world=world)
        assert codes == [0] * world, (cwd / "said-0").read_text()
        assert max(m["grad_norm"] for m in metrics(cwd / "r")) > 1e-3
        (cwd / "r").rename(path)
    return path


# ---- Kills -------------------------------------------------------------------------------------

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def changes_files(event, args):
    """Whether an audit event is a file operation that changes something in the run directory."""
    changes = event in CHANGES
    if event == "open":
        _, mode, how = args  # a mode, or None and the flags of os.open
        changes = set(mode) & set("wax+") if mode else how & (os.O_WRONLY | os.O_RDWR)
    return bool(changes) and str(args[0]).split("/")[0] == "r"


def die_before(count):
    """A setup: SIGKILL before file operation number `count`."""
    def setup():
        numbers = itertools.count()

        def hook(event, args):
            if changes_files(event, args) and next(numbers) == count:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
    return setup


@attack("SIGKILL before every file operation of two steps with saves")
def kill():
    return killed(0, 2)


@attack("SIGKILL before every file operation of a `--resume` of two steps")
def kill_resume():
    return killed(2, 4)


def killed(base, steps):
    for count in itertools.count():
        cwd = place(base)
        if go(cwd, steps, setup=die_before(count)) == [0]:
            return
        yield f"before operation {count}", resumed(cwd, steps)


# ---- Power cuts --------------------------------------------------------------------------------

class Recorder:
    """Notes before each file operation of its process what a disk may hold if the power fails
    there. Contents: what a file had when it was last flushed (empty if never), or zeros in the
    length it has now. Names: any state since the last one that an fsync of a directory fixed."""

    def __init__(self, images):
        self.images = images
        self.seen = set()  # hashes of images
        self.open_files = {}  # inode: descriptor; kept, so that no inode's number is used again
        self.flushed = {}  # inode: content
        self.names = [self.tree()]  # after each operation on names
        self.fixed = 0  # names[fixed] is the oldest that a power cut can bring back
        self.flushed |= {i: self.content(i) for i in self.open_files}  # the base is on the disk

    def setup(self):
        real = os.fsync

        def fsync(descriptor):
            real(descriptor)
            self.note()
            info = os.fstat(descriptor)
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if info.st_ino in self.open_files:
                self.flushed[info.st_ino] = self.content(info.st_ino)
            elif os.path.isdir(path):
                self.fix(os.path.relpath(path))
        os.fsync = fsync
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if changes_files(event, args):
            self.note()

    def tree(self):
        """{path: inode, or None for a directory} of the run as it is now."""
        found = {}
        for path in (Path("r"), *sorted(Path("r").rglob("*"))):
            if path.is_dir():
                found[str(path)] = None
            elif path.exists():
                inode = path.stat().st_ino
                found[str(path)] = inode
                if inode not in self.open_files:
                    self.open_files[inode] = os.open(path, os.O_RDONLY)
        return found

    def content(self, inode):
        descriptor = self.open_files[inode]
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)

    def note(self):
        """A power cut here: an image for every state of the names that is still possible."""
        now = self.tree()
        if now != self.names[-1]:
            self.names.append(now)
        for names in self.names[self.fixed:]:
            for zeros in (False, True):
                self.write_image(names, zeros)

    def fix(self, directory):
        """After fsync of a directory the names in it, and all that came before them, are kept."""
        def names_in(tree):
            return {path: inode for path, inode in tree.items()
                    if os.path.dirname(path) in (directory, "")}
        for i in range(len(self.names) - 1, self.fixed, -1):
            if names_in(self.names[i]) != names_in(self.names[i - 1]):
                self.fixed = i
                return

    def write_image(self, names, zeros):
        contents = {}
        for path, inode in names.items():
            content = self.flushed.get(inode, b"")
            if zeros and inode:
                content = content.ljust(os.fstat(self.open_files[inode]).st_size, b"\0")
            contents[path] = None if inode is None else content
        key = hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()
        if key in self.seen:
            return
        self.seen.add(key)
        image = self.images / f"{len(self.seen):04d}"
        image.mkdir(parents=True)
        for path, content in contents.items():
            if content is None:
                (image / path).mkdir(parents=True, exist_ok=True)
            else:
                (image / path).write_bytes(content)


def record():
    """A setup: images of the disk go to ../<cwd>-images."""
    Recorder(Path("..") / f"{Path.cwd().name}-images").setup()


@attack("power cut at any moment of two steps with saves, every state the disk may have")
def power_cut():
    for base, steps in ((0, 2), (2, 4)):
        cwd = place(base)
        assert go(cwd, steps, setup=record) == [0], (cwd / "said-0").read_text()
        for image in sorted((TOP / f"{cwd.name}-images").iterdir()):
            shutil.copytree(TOP / "runs", image / "runs")
            yield f"image {image}", resumed(image, steps)


# ---- Damage ------------------------------------------------------------------------------------

def files_of_checkpoint():
    run = undisturbed(2)
    paths = sorted((run / "step-000002").rglob("*"))
    return [path.relative_to(run) for path in paths if path.is_file()]


@attack("one flipped bit, at random places of every file of a checkpoint")
def bits():
    rng = random.Random(0)
    for file, _ in itertools.product(files_of_checkpoint(), range(5)):
        cwd = place(2)
        path = cwd / "r" / file
        content = bytearray(path.read_bytes())
        where = rng.randrange(len(content) * 8)
        content[where // 8] ^= 1 << where % 8
        path.write_bytes(content)
        yield f"{file}, bit {where}", resumed(cwd, 4)


@attack("every file of a checkpoint missing, empty, or cut in half; then back to the one before")
def cut():
    for file, share in itertools.product(files_of_checkpoint(), (None, 0, 0.5)):
        cwd = place(2)
        path = cwd / "r" / file
        content = path.read_bytes()
        path.unlink()
        if share is not None:
            path.write_bytes(content[:int(share * len(content))])
        yield f"{file}, share {share}", resumed(cwd, 4)
        if share == 0.5:
            yield f"{file}, back", resumed(cwd, 4, "--resume_from", "step-000001")


# ---- Full disks --------------------------------------------------------------------------------

def files_at_most(size):
    def setup():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError instead of death
    return setup


@attack("no file larger than N bytes (12 sizes), then room again")
def full_disk():
    for size in (0, 1, 100, 500, 1000, 1500, 2000, 3000, 5000, 8000, 14000, 30000):
        cwd = place(2)
        code, = go(cwd, 4, setup=files_at_most(size))
        fine = code == 0 or size < 300 or has_line(cwd)  # the line itself must fit
        yield f"{size} bytes", resumed(cwd, 4) if fine else "silent"


@attack("a real file system with N KB free (10 sizes; needs root), then room again")
def full_file_system():
    sizes = [path.stat().st_size for path in undisturbed(2).rglob("*")]
    used = 4 * sum(1 + size // 4096 for size in sizes)  # KB, in whole pages
    for free in (0, 4, 8, 16, 24, 40, 60, 80, 100, 150):
        cwd = place()
        (cwd / "r").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={used + free}k", "torture", cwd / "r"]
        if subprocess.run(mount, capture_output=True).returncode:
            return
        try:
            shutil.copytree(undisturbed(2), cwd / "r", dirs_exist_ok=True)
            code, = go(cwd, 4)
            fine = code == 0 or has_line(cwd)
            subprocess.run(["mount", "-o", "remount,size=10m", cwd / "r"], check=True)
            yield f"{free} KB", resumed(cwd, 4) if fine else "silent"
        finally:
            subprocess.run(["umount", cwd / "r"], check=True)


# ---- Others at the same time -------------------------------------------------------------------

def rooms(cwd, names):
    """Directories in cwd that share its warm start."""
    for name in names:
        (cwd / name).mkdir()
        (cwd / name / "runs").symlink_to(cwd / "runs")
        yield cwd / name


@attack("two processes at once in one `--out`: two runs, two resumes, a run and a resume")
def two_at_once():
    new, resume = SMALL, ["--resume"]
    kinds = [(0, new, new), (2, resume, resume), (2, new, resume)]
    for steps, *pair in kinds * 4:
        cwd = place(steps)
        both = list(rooms(cwd, "ab"))
        processes = []
        for room, flags in zip(both, pair):
            processes += start(room, *flags, "--steps", 4, "--out", cwd / "r")
        codes = end(processes)
        lines = all(code == 0 or has_line(room) for room, code in zip(both, codes))
        fine = lines and 0 in codes and same(cwd / "r", undisturbed(4))
        yield f"{codes}", "survived" if fine else "silent"


@attack("six first runs at once that share the warm start; then the same with one killed in it")
def six_first_runs():
    for killed in (False, True):
        cwd = place()
        shutil.rmtree(cwd / "runs/warmstart")
        six = list(rooms(cwd, "abcdef"))
        runs = []
        for room in six:
            runs += start(room, *SMALL, "--steps", 2)
        if killed:
            os.kill(owner_of_lock(cwd / "runs/warmstart"), signal.SIGKILL)
        for room, code in zip(six, end(runs)):
            if killed and code == -signal.SIGKILL:
                outcome = resumed(room, 2)
            else:
                outcome = judge(room, code, undisturbed(2))
            yield f"{room.name} {code}", outcome
        left = [p for p in (cwd / "runs/warmstart").iterdir() if p.name.startswith(".")]
        yield f"left behind {left}", "silent" if left else "survived"


def owner_of_lock(directory) -> int:
    """Its process, as soon as there is one."""
    while True:
        for lock in directory.glob("*.lock"):
            if owner := lock.read_text():
                return int(owner)
        time.sleep(0.01)


# ---- Ranks -------------------------------------------------------------------------------------

def at(function, rank, action):
    """A setup: in step 3, rank `rank` does `action` before train.py's `function`."""
    def setup():
        train.timedelta = lambda minutes: timedelta(seconds=10)  # for --timeout
        real = getattr(train, function)

        def instead(run, *args, **kw):
            if train.RANK == rank and run.step == 3:
                action()
            return real(run, *args, **kw)
        setattr(train, function, instead)
    return setup


def send(which):
    signal.raise_signal(which)
    time.sleep(0.2)  # until the thread has read it


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(10**6)


@attack("one of two ranks killed or hanging, in sampling, update and save")
def ranks():
    for rank, function, action in itertools.product((0, 1), ("sample", "update", "save"),
                                                    (die, hang)):
        cwd = place(2, world=2)
        setup = at(function, rank, action)
        both = start(cwd, "--resume", "--steps", 4, setup=setup, world=2)
        other = both[1 - rank]
        code, = end([other], 120)
        end(both, 0)
        said = (cwd / f"said-{1 - rank}").read_text().strip().splitlines()
        ended_well = code == 1 and said[-1].startswith("train.py: rank")
        outcome = resumed(cwd, 4, world=2)
        yield f"{action.__name__} rank {rank} in {function}", outcome if ended_well else "silent"


@attack("SIGINT, SIGTERM or SIGHUP to one of two ranks")
def signals():
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for rank, which in itertools.product((0, 1), kinds):
        cwd = place(2, world=2)
        codes = go(cwd, 4, setup=at("save", rank, partial(send, which)), world=2)
        outcome = resumed(cwd, 4, world=2)
        yield f"{which.name} to rank {rank}", outcome if codes == [0, 0] else "silent"


def reader_that_dies():
    """A setup: standard output and error go into a pipe that nobody reads any more."""
    end_to_read, end_to_write = os.pipe()
    for stream in (1, 2):
        os.dup2(end_to_write, stream)
    os.close(end_to_read)


def terminal_that_closes():
    """A setup: nohup's, and the terminal closes in the middle."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at("update", 0, partial(send, signal.SIGHUP))()


@attack("the reader of the output dies (`head -1`); the terminal closes under `nohup`")
def output():
    for setup in (reader_that_dies, terminal_that_closes):
        cwd = place(2)
        code, = go(cwd, 4, setup=setup)
        yield setup.__name__, judge(cwd, code, undisturbed(4))


@attack("graders at work whose parent is killed")
def graders():
    for answer in ("x+1", "(x+1)^{3000}", r"\int_0^1 \frac{\sin(x^x)}{x^3+1} dx"):
        item = ("math", rf"\boxed{{{answer}}}", {"answer": "x^2 + 1"})
        fork = multiprocessing.get_context("fork")
        parent = fork.Process(target=rewards.Scorer(workers=1), args=([item] * 99,))
        parent.start()
        seen = set()
        while parent.is_alive() and not seen:
            seen |= children_of(parent.pid)
            time.sleep(0.01)
        time.sleep(5)  # it imports SymPy, and begins
        parent.kill()
        parent.join()
        for _ in range(600):
            alive = [pid for pid in seen if Path(f"/proc/{pid}").exists()]
            if not alive:
                break
            time.sleep(0.1)
        assert seen, f"{answer} was graded without a process of its own"
        yield answer, "silent" if alive else "survived"


def children_of(pid):
    """Of all its threads."""
    found = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has just ended
            found |= set(children.read_text().split())
    return found


# ---- Strangers ---------------------------------------------------------------------------------

class Attack:
    """A pickle that touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


WRONG = (None, [], {"a": 1}, "\x1b[31mx", "../..",
         1e999, 10**30, -1, True, [["--out", "victim"]])
TEXTS = ("", "[]", "{}", "{", "null", "\xff", "[" * 100_000, '{"checksums": "x"}')


def write(name, text, r):
    (r / name).write_text(text, encoding="latin-1")


def edit(name, key, value, r):
    found = json.loads((r / name).read_text()) | {key: value}
    (r / name).write_text(json.dumps(found))


def edit_state(key, value, r):
    """With checksums that fit, as a stranger's would."""
    edit("step-000002/resume/state.json", key, value, r)
    sums = train.checksums(r / "step-000002")
    write("step-000002/resume/checksums.json", json.dumps(sums), r)


def spoil_metrics(line, r):
    """Another first line."""
    lines = (r / "metrics.jsonl").read_text().splitlines()
    write("metrics.jsonl", "\n".join([line, *lines[1:], ""]), r)


def edit_metrics(key, value, r):
    first = (r / "metrics.jsonl").read_text().splitlines()[0]
    spoil_metrics(json.dumps(json.loads(first) | {key: value}), r)


def put_pickle(name, r):
    (r / name).write_bytes(pickle.dumps(Attack(r.parent / "touched")))


def put_fifo(name, r):
    os.mkfifo(r / name)


def put_link(name, r):
    (r / name).unlink(missing_ok=True)
    (r / name).symlink_to(r.parent / "victim")


def hostile_files():
    """(name, function of the run directory r): each does one thing that a stranger may do."""
    resume = "step-000002/resume"
    for name in ".metadata state.pt optimizer.bin __0_0.distcp model.safetensors".split():
        yield f"pickle {name}", partial(put_pickle, f"{resume}/{name}")
    yield "fifo", partial(put_fifo, f"{resume}/z.safetensors")
    for text in ("../victim", "/etc", resume, "\x1b[31m", "x\ny", "step-000009", ""):
        yield f"latest {text!r}", partial(write, "latest", text)
    for name in (".lock", ".latest", "metrics.jsonl", "config.json", "step-000003", ".step-000003",
                 "curves.png", ".curves.png"):
        yield f"link {name}", partial(put_link, name)
    for key, value in itertools.product(("step", "position"), WRONG):
        yield f"state.json {key} {value!r}", partial(edit_state, key, value)
    for line in ("", "{", "[]", "1", '{"step": 1}', "\0" * 50, "[" * 100_000, "9" * 5000):
        yield f"metrics.jsonl line {line:.20}", partial(spoil_metrics, line)
    for key, value in itertools.product(("step", "reward"), WRONG):
        yield f"metrics.jsonl {key} {value!r}", partial(edit_metrics, key, value)
    for file, text in itertools.product((f"{resume}/state.json", f"{resume}/checksums.json",
                                         "step-000002/config.json", "config.json"), TEXTS):
        yield f"{file} {text:.20}", partial(write, file, text)
    flags = [name for name in train.Flags.__dataclass_fields__ if name != "compile"]  # minutes
    for name, value in itertools.product(flags, WRONG):
        yield f"config.json {name} {value!r}", partial(edit, "config.json", name, value)


@attack("run directories from strangers: pickles, links, names and numbers of every wrong kind")
def strangers():
    for what, change in hostile_files():
        cwd = place(2)
        (cwd / "victim").write_text("mine")
        change(cwd / "r")
        code, = go(cwd, 3)
        yield what, judge(cwd, code) if unharmed(cwd) else "silent"


def unharmed(cwd):
    return not (cwd / "touched").exists() and (cwd / "victim").read_text() == "mine"


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size",
         "num_attention_heads", "max_position_embeddings")
TEMPLATES = ("{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**9 }}", "{{ 1/0 }}", "{{",
             "{% include 'victim' %}", "{{ raise_exception('a\nb') }}",
             "{{ ''.__class__.__mro__[1].__subclasses__() }}")


def index_to(where, m):
    whole = m / "model.safetensors"
    places = dict.fromkeys(load_file(whole), where)
    whole.unlink()  # else nobody looks at the index
    write("model.safetensors.index.json", json.dumps({"weight_map": places}), m)


def put_template(template, m):
    edit("tokenizer_config.json", "chat_template", template, m)
    write("chat_template.jinja", template, m)


def only_pickle(m):
    (m / "model.safetensors").unlink()
    put_pickle("pytorch_model.bin", m)


def hostile_models():
    """(name, function of the model directory m)."""
    for key, value in itertools.product(SIZES, (10**12, 0, -1, None, "x", 1e999)):
        yield f"config.json {key} {value!r}", partial(edit, "config.json", key, value)
    for name, text in itertools.product(("config.json", "tokenizer.json", "tokenizer_config.json",
                                         "model.safetensors"), TEXTS):
        yield f"{name} {text:.20}", partial(write, name, text)
    for where in ("../victim", "/etc/passwd", "no.safetensors", "", None, 1):
        yield f"index to {where!r}", partial(index_to, where)
    for template in TEMPLATES:
        yield f"template {template}", partial(put_template, template)
    yield "pickle", only_pickle
    yield "link", partial(put_link, "vocab.txt")


@attack("model directories from strangers")
def strange_models():
    for what, change in hostile_models():
        cwd = place()
        shutil.copytree(undisturbed(2) / "step-000002", cwd / "m")
        (cwd / "victim").write_text("mine")
        change(cwd / "m")
        code, = go(cwd, 1, "--model", "m")
        copied = list((cwd / "r").rglob("vocab.txt"))
        yield what, judge(cwd, code) if unharmed(cwd) and not copied else "silent"


# ---- The table ---------------------------------------------------------------------------------

def prepare():
    """The warm start, and in this process what every child would import and make again."""
    sys.stderr.flush()
    train.draw_curves = nothing  # a second each
    whole_load = data.load

    def load(name, split="train", n=None, **kw):
        return whole_load(name, split, n or 512, **kw)  # 8192 take half a second in each run
    data.load = load
    os.chdir(TOP)
    path = train.small_model(train.parse(SMALL))
    data.load_tokenizer(path)


def main():
    torch.set_num_threads(1)
    prepare()
    chosen = sys.argv[1:] or list(ATTACKS)
    rows = []
    for name in chosen:
        what, function = ATTACKS[name]
        counts, began = Counter(), time.time()
        for trial, outcome in function():
            counts[outcome] += 1
            if outcome == "silent":
                print(f"  SILENT {name}: {trial}", flush=True)
        if counts:
            row = [what, counts.total(), *(counts[o] for o in ("survived", "refused", "silent"))]
            rows.append("| " + " | ".join(map(str, row)) + " |")
            print(f"{rows[-1]} {time.time() - began:.0f} s", flush=True)
    if not sys.argv[1:]:
        write_table(rows)
    shutil.rmtree(TOP)


def write_table(rows):
    """Between the two marks in docs/reliability.md."""
    path = ROOT / "docs/reliability.md"
    before, rest = path.read_text().split("<!-- table -->\n")[:2]
    after = rest.split("<!-- end -->\n")[1]
    head = "| attack | tried | survived | refused with a line | silent |\n|---|---|---|---|---|\n"
    table = head + "\n".join(rows) + "\n"
    path.write_text(f"{before}<!-- table -->\n{table}<!-- end -->\n{after}")


if __name__ == "__main__":
    main()
