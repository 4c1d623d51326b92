"""experiments/gpu_check.py runs whole at toy size, and measures what it says."""
import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import dry_run, gpu_check

SCRIPT = Path(gpu_check.__file__)
NUMBERS = {"card": ["name", "TFLOP/s", "TB/s"], "fit": ["shape", "GiB"], "tests": ["result"],
           "train": ["update tok/s a card", "% of matmul rate", "rollout tok/s a card",
                     "k3 sampler to trainer"],
           "decode": ["decode tok/s a card", "% of roofline"], "mismatch": ["mean", "worst", "k3"]}


def start(tmp_path, *argv, python=(sys.executable,)):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*python, SCRIPT, "--out", tmp_path / "found.json", *argv], env=env,
                         cwd=tmp_path, capture_output=True, text=True)
    found = json.loads((tmp_path / "found.json").read_text())
    return ran.returncode, ran.stdout.strip().splitlines(), found


@pytest.mark.slow
def test_the_command_at_toy_size(tmp_path):
    code, said, found = start(tmp_path)
    assert (code, found["failed"]) == (0, {}), said[-1]
    check_numbers(said, found)


def in_this_process(name, number, args):
    """gpu_check.child(), without the seconds that a process takes to start."""
    if name == "tests":
        return {"result": "not run"}, ""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu_check.py", "--part", *name.split(), *args])
        gpu_check.main()
    return json.loads(said.getvalue().splitlines()[-1]), ""


def test_the_whole_of_it_at_toy_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_check, "child", in_this_process)
    found = gpu_check.check(tmp_path / "found.json", [])
    check_numbers(capsys.readouterr().out.splitlines(), found)


def check_numbers(said, found):
    assert said[-1].endswith("failed: nothing")
    for name, keys in NUMBERS.items():
        assert set(keys) <= set(found[name])
        beginning = [name, keys[0].split()[0]]
        assert any(line.split()[:2] == beginning for line in said)
    numbers = [v for part in found.values() for v in part.values() if isinstance(v, float)]
    assert all(map(math.isfinite, numbers))
    assert found["train"]["grad_norm"] > 1e-3  # it learned from something
    assert 0 < found["mismatch"]["mean"] < found["mismatch"]["worst"] < 1
    assert found["decode"]["rows"] == gpu_check.PROMPTS * gpu_check.SAMPLES


CHILD = """
import json, sys
part = sys.argv[2]
if part == "decode":
    sys.exit("a line before\\nOutOfMemoryError: decode")
print("something else")
print(json.dumps({"name": part, "GiB": 1.0}))
"""


def test_what_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    """With children that say numbers, or fail as decoding here."""
    script = tmp_path / "experiments/gpu_check.py"
    script.parent.mkdir()
    script.write_text(CHILD)
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    found = gpu_check.check(tmp_path / "found.json", [])
    assert set(found["failed"]) == {"decode"}
    assert found["failed"]["decode"] == "OutOfMemoryError: decode" and found["decode"] == {}
    assert found["mismatch"] == {"name": "mismatch", "GiB": 1.0}
    assert json.loads((tmp_path / "found.json").read_text()) == found
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("failed: decode (OutOfMemoryError: decode)")


@pytest.mark.slow
def test_two_ranks(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    code, said, found = start(tmp_path, python=torchrun)
    assert code == 0 and found["failed"] == {}
    assert sum(line.startswith("decode ") for line in said) == len(found["decode"])  # one speaks


def test_the_worst_of_all_ranks():
    one = {"name": "A", "decode tok/s a card": 10.0, "% of roofline": 70.0, "worst": 0.1}
    two = {"name": "A", "decode tok/s a card": 9.0, "% of roofline": 71.0, "worst": 0.2}
    assert gpu_check.worst([one, two]) == {"name": "A", "decode tok/s a card": 9.0,
                                           "% of roofline": 70.0, "worst": 0.2}


def test_rooflines_by_hand():
    """7B, 160 rows at 1,024 tokens on 4.3 TB/s and 790 TFLOP/s: weights 3.3 ms, cache 2.2 ms."""
    raw = dry_run.architecture("Qwen/Qwen2.5-7B")
    weights = 7615616512 - 152064 * 3584
    assert gpu_check.matmul_weights(raw) == weights
    card = {"TFLOP/s": 790, "TB/s": 4.3}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(gpu_check, "CONTEXT", 1024)
        rate = gpu_check.decode_roofline(raw, card, 160)
        kv = 2 * 28 * 4 * 128 * 2 * 1024
        seconds = 2 * weights / 4.3e12 + 160 * (kv + 16 * 152064) / 4.3e12
        assert rate == pytest.approx(160 / seconds, rel=1e-3)
        assert gpu_check.decode_roofline(raw, card, 1024) < 1024 / (2 * weights * 1024 / 790e12)
        attention = 28 * 28 * 128 * 1024
        assert gpu_check.update_flops(raw, False) == pytest.approx(6 * (weights + attention))
        assert gpu_check.update_flops(raw, True) == pytest.approx(8 * (weights + attention))


def test_random_weights_are_about_as_sure_as_a_language_model():
    raw = dict(gpu_check.TOY, hidden_size=896, vocab_size=8192, num_attention_heads=14)
    model = gpu_check.randomise(gpu_check.meta_model(raw).to_empty(device="cpu"))
    ids = torch.tensor([gpu_check.random_prompt(0, 8192)])
    logits = model(ids)[0].detach()
    assert 0.1 < torch.distributions.Categorical(logits=logits).entropy().mean() < 3
