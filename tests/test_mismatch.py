"""experiments/mismatch.py: the sampler is as far from the trainer as it says, and the trainer's own
weights are evaluated. Its runs are train.py's (tests/test_train.py)."""
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from experiments import mismatch  # noqa: E402
from model import Model  # noqa: E402


@pytest.fixture
def run(monkeypatch):
    config = dict(model_type="qwen2", vocab_size=16, hidden_size=16, intermediate_size=32,
                  num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3)
    monkeypatch.setattr(train, "collect", lambda run: train.sampling_model(run))
    return SimpleNamespace(model=Model.from_scratch(config, 1), flags=train.Flags())


def first(model):
    return model.embed_tokens.weight.detach().clone()


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_weights_are_rounded_to_their_bits(run, bits):
    before, after = first(run.model), first(mismatch.in_bits(run.model, bits))
    assert max(len(row.unique()) for row in after) <= 2**bits - 1
    step = before.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (after - before).abs()
    assert error.max() > 0 and (error <= step / 2 + 1e-6).all()


@pytest.mark.parametrize("gap, behind", [("1 step", 1), ("4 steps", 4)])
def test_old_weights_sample_and_the_trainers_own_are_evaluated(run, monkeypatch, gap, behind):
    sampler = mismatch.Sampler(gap)
    monkeypatch.setattr(train, "sampling_model", sampler.model)
    past = []
    for step in range(7):
        past.append(first(run.model))
        assert torch.equal(first(sampler.collect(run)), past[max(0, step - behind)])
        assert train.sampling_model(run) is run.model  # outside of collect
        with torch.no_grad():
            run.model.embed_tokens.weight.add_(0.01)


def line(gap, correction, seed, accuracy):
    curves = {key: [0.5, 0.5] for key in mismatch.CURVES} | {"eval": [0.1, accuracy]}
    return dict(gap=gap, correction=correction, seed=seed, curves=curves)


def test_the_table_pairs_runs_by_their_seed():
    lines = [line("none", "none", 0, .5), line("none", "none", 1, .7),
             line("3 bits", "none", 1, .6), line("3 bits", "none", 0, .4),
             line("3 bits", "tis", 0, .6), line("3 bits", "tis", 1, .7)]
    row = mismatch.table(lines).splitlines()[3].split(" | ")
    assert row[0] == "| 3 bits" and row[3].startswith("**-10.0 ± 0.0")
    assert row[5 + mismatch.REPAIRS[1:].index("tis")].startswith("+15.0 ±")
