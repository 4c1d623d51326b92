"""README.md: its three "your own" examples work as printed, its links and line counts are true."""
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(after, kind=""):
    """The first fenced block behind the words `after`."""
    return re.search(rf"```{kind}\n(.*?)```", README[README.index(after):], re.S)[1]


@pytest.fixture
def copy(tmp_path):
    """A copy of the files at the top, and a way to run Python in it."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)

    def run(code):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout
    return tmp_path, run


def test_your_own_objective_works_as_printed(copy):
    directory, run = copy
    with open(directory / "losses.py", "a") as file:
        file.write("\n" + block("**An objective**", "python"))
    said = run("""
import torch, losses
old = torch.full((2, 3), -1.0)
logp = (old + 0.5).requires_grad_()
loss, metrics = losses.policy_loss("tanh_gate", logp, old, torch.tensor([1.0, -1.0]), old * 0 + 1)
loss.backward()
print(logp.grad[0, 0].item(), logp.grad[1, 0].item(), metrics["clip_high"].item())
""")
    up, down, clipped = map(float, said.split())
    ratio = math.exp(0.5)  # the gradient is ratio sech^2((ratio - 1) / width) A / tokens
    expected = ratio / math.cosh((ratio - 1) / 0.5) ** 2 / 6
    assert (-up, down, clipped) == pytest.approx((expected, expected, 0.5), rel=1e-5)


def test_your_own_reward_and_dataset_work_as_printed(copy):
    directory, run = copy
    with open(directory / "rewards.py", "a") as file:
        file.write("\n" + block("**A reward**", "python"))
    row = block("**A dataset**")
    (directory / "mine.jsonl").write_text(row + row.replace("7", "5"))
    said = run("""
import json, data, rewards
problems = data.load("mine.jsonl")
data.check_golds(problems, rewards.check_gold)
for text in ("<answer>abcdcba</answer>", "<answer>abcdefg</answer>", "abcdcba"):
    p = problems[0]
    print(json.dumps(rewards.grade(p.task, text, **p.answer)))
""")
    assert [json.loads(line) for line in said.splitlines()] == [
        [1.0, "ok"], [0.0, "ok"], [0.0, "no_answer"]]


def test_links_and_line_counts_are_true():
    texts = [README] + [p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md")]
    folders = [ROOT] + [ROOT / "docs"] * (len(texts) - 1)
    for folder, text in zip(folders, texts):
        text = re.sub(r"```.*?```", "", text, flags=re.S)  # "[kit.B](mol)" is no link
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (folder / link).exists(), link
    for name, lines in re.findall(r"\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README):
        assert int(lines) == len((ROOT / name).read_text(encoding="utf-8").splitlines()), name


def test_what_it_shows_of_losses_py_stands_there():
    code = (ROOT / "losses.py").read_text(encoding="utf-8")
    for line in block("no framework", "python").splitlines():
        assert line.split("  #")[0] in code, line
