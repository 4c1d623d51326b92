"""experiments/compare.py and plot.py: what is measured is what autograd says, and a sweep survives
being killed."""
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import compare, plot
from model import Model
from rollout import Rollout

ROOT = Path(__file__).parent.parent
TINY = ("--steps 2 --prompts 4 --samples 4 --skill_steps 20 --habit_steps 2 --width 16 --layers 1 "
        "--eval_problems 8")


def lines(directory):
    return compare.load(directory / "lines.jsonl")


def test_a_sweep_is_killed_and_goes_on(tmp_path, monkeypatch):
    """Killed after its first line; again: all four, none twice, nothing half-written. And plot.py
    takes lines of any grid."""
    monkeypatch.chdir(tmp_path)
    argv = [str(ROOT / "experiments/compare.py"), "--results", "lines.jsonl", "--losses", "grpo",
            "acpo alpha=1", "--updates", "2", "4", "--seeds", "3", "--flags", TINY]
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not lines(tmp_path):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the workers too, as when a machine dies
    process.communicate()
    path = tmp_path / "lines.jsonl"
    before = path.read_text()
    path.write_text(before + '{"task": "cha')
    monkeypatch.setattr(sys, "argv", argv)
    compare.main()
    after = path.read_text()
    assert after.startswith(before)
    assert len({compare.key(line) for line in lines(tmp_path)}) == after.count("\n") == 4
    compare.main()
    assert path.read_text() == after  # nothing left to do
    monkeypatch.setattr(sys, "argv", ["plot.py", str(path)])
    plot.main()
    assert (tmp_path / "compare.md").read_text().startswith("4 runs")
    for line in lines(tmp_path):
        assert len(line["curves"]["reward"]) == 2 and line["cpu_seconds"] > 0


@pytest.mark.parametrize("args, word", [
    (["--grid", "none"], "none"), ([], "--grid"), (["--grid", "main"], "--grid lr"),
    (["--losses", "gpro"], "gpro"), (["--losses", "grpo eps=1"], "eps")])
def test_bad_input_is_one_line(args, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--results", "lines.jsonl", *args])
    with pytest.raises(SystemExit) as e:
        compare.main()
    assert str(e.value).startswith("compare.py: ") and word in str(e.value)
    assert "\n" not in str(e.value) and not lines(tmp_path)


def small_run(samples=4):
    """A random model and rollouts of two groups, one with signal, as train.py has them."""
    raw = dict(model_type="qwen2", vocab_size=16, hidden_size=16, intermediate_size=32,
               num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
               max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.5)
    model, rng = Model.from_scratch(raw, 0, "cpu"), random.Random(0)
    rollouts = []
    for i, length in enumerate((5, 9, 7, 4, 8, 6, 5, 7)):
        tokens = [rng.randrange(16) for _ in range(length)]
        rollout = Rollout(tokens, 3, [-1.0] * (length - 3), True, group=i // samples)
        rollout.score = float(i % 3 == 0)
        rollouts.append(rollout)
    flags = compare.train.parse(["--loss", "grpo", "--samples", str(samples), "--prompts", "2",
                                 "--updates", "2", "--lr", "0.01", "--max_new_tokens", "16"])
    compare.train.assign_advantages(rollouts, flags)
    optimizer = torch.optim.AdamW(model.parameters())
    run = compare.train.Run(flags, None, model, None, None, [], None, [], [],
                            optimizer, None, None, step=1)
    return run, rollouts


def test_the_ladder_puts_everything_back_and_counts_every_token():
    run, rollouts = small_run()
    compare.climb(run, rollouts, {})  # so that there is a state of the optimizer to put back
    weights = [p.clone() for p in run.model.parameters()]
    state = [s["exp_avg"].clone() for s in run.optimizer.state.values()]
    look = compare.Ladder()
    look(run, rollouts)
    for p, before in zip(run.model.parameters(), weights):
        assert torch.equal(p, before)
    for s, before in zip(run.optimizer.state.values(), state):
        assert torch.equal(s["exp_avg"], before) and before.abs().max() > 0
    tokens = sum(r.length for r in rollouts)
    assert all(sum(rung["tokens"]) == tokens for rung in look.found.values())
    spread = [sum(look.found[k]["moved_sq"]) for k in ("1", "4")]
    assert 0 < spread[0] < spread[1]  # more updates move the ratio further
    kept = [sum(look.found[k]["kept"]) for k in ("1", "4")]
    assert min(kept) > 0 and 0 < sum(look.found["4"]["clipped"]) < tokens


def test_the_gradient_is_that_with_respect_to_the_logits():
    """Kept and full gradient against autograd's d loss / d logits, token by token."""
    torch.manual_seed(0)
    logits = torch.randn(6, 5, 7, dtype=torch.float64).mul(2).requires_grad_()
    lengths = torch.tensor([5, 4, 3, 5, 1, 2])
    mask = torch.arange(5) < lengths[:, None]
    token = torch.randint(7, (6, 5, 1))
    adv = torch.tensor([1.2, -0.7, 0.4, -1.0, 0.9, -0.2]).double()
    logp = logits.log_softmax(-1).gather(-1, token)[..., 0]
    old = (logp + 0.4 * torch.randn(6, 5)).detach().clamp(max=-0.01)
    sum_p2 = logits.softmax(-1).square().sum(-1).detach()
    size = compare.logit_norm(logp.detach().exp(), sum_p2)
    for name in ("grpo", "unclipped"):
        loss, _ = compare.losses.policy_loss(name, logp, old, adv, mask)
        norm = torch.autograd.grad(loss, logits, retain_graph=True)[0].norm(dim=-1)
        grad = torch.autograd.grad(loss, logp, retain_graph=True)[0]
        assert torch.allclose(grad.abs() * size, norm) and norm.max() > 0.01
    sums = {}
    compare.add(sums, old.exp(), mask, norm=norm)
    compare.add(sums, old.exp(), mask, norm=norm)
    for b in range(5):
        inside = mask & ((5 * old.exp()).long() == b)
        assert sums["norm"][b] == pytest.approx(2 * norm[inside].sum().item())


def test_cells_keep_their_own_tokens_and_all_cells_are_grpo():
    torch.manual_seed(3)
    old = torch.rand(4, 6).clamp(0.05).log()
    A = torch.tensor([1.0, -1.0, 0.5, -0.5])
    mask, sum_p2 = torch.ones(4, 6), torch.rand(4, 6)
    new = old + 0.1 * torch.randn(4, 6)

    def grad(name, **hyper):
        logp = new.clone().requires_grad_()
        loss, _ = compare.losses.policy_loss(name, logp, old, A, mask, sum_p2=sum_p2, **hyper)
        loss.backward()
        return logp.grad
    parts = [grad("cells", only=only) for only in ("1000", "0100", "0010", "0001")]
    assert torch.allclose(sum(parts), grad("grpo"))
    assert (sum((part != 0).int() for part in parts) <= 1).all()
    losers = parts[2]
    assert not losers[::2].any() and losers.abs().max() > 0.01  # winners have the even rows


def test_entropy_changes_of_the_cells_add_up_and_the_weights_come_back():
    run, rollouts = small_run()
    before = run.model.embed_tokens.weight.clone()
    look = compare.Cells(norm=1e-2)
    look(run, rollouts)
    whole = compare.Cells(norm=1e-2)
    with pytest.MonkeyPatch.context() as patched:  # one cell that holds everything
        patched.setattr(compare, "cells_of", lambda p, sum_p2, A: [torch.ones_like(p, dtype=bool)])
        whole(run, rollouts)
    (all_together,) = whole.found[0]["measured"]
    assert sum(look.found[0]["measured"]) == pytest.approx(all_together, rel=0.1)
    assert abs(all_together) > 1e-4
    assert torch.allclose(run.model.embed_tokens.weight, before, atol=1e-6)


def test_collapse_is_a_fifth_below_the_best():
    assert not compare.collapsed([0.1, 0.2, 0.5, 0.9, 0.9, 0.9, 0.9])
    assert compare.collapsed([0.1, 0.9, 0.9, 0.9, 0.5, 0.5, 0.6])
    assert not compare.collapsed([0.9, 0.9, 0.9, 0.73, 0.73, 0.73])
    assert compare.collapsed([0.9, 0.9, 0.9, 0.71, 0.71, 0.71])


def test_every_run_of_the_findings_is_in_a_grid():
    """The lines that FINDINGS.md speaks of can be made again by the named grids."""
    every = compare.load()
    known = {compare.key(run) for task in compare.TASKS for name in compare.GRIDS[1:]
             for run in compare.named(name, task, every)}
    left = [line for line in every if compare.key(line) not in known]
    assert not left, left[0]["loss"]


def test_intervals_by_brute_force():
    """t quantiles by integrating the density; pairing removes what seeds share."""
    for df in (1, 4, 7, 9):
        def density(t):
            gammas = math.gamma((df + 1) / 2) / math.gamma(df / 2)
            return gammas / math.sqrt(df * math.pi) * (1 + t * t / df)**(-(df + 1) / 2)
        n, T = 20000, plot.T95[df]
        middles = [-T + 2 * T * (i + 0.5) / n for i in range(n)]
        assert 2 * T / n * sum(map(density, middles)) == pytest.approx(0.95, abs=2e-4)
    rng = random.Random(0)
    a = [{"seed": s, "auc": rng.gauss(0, 10)} for s in range(8)]
    b = [line | {"auc": line["auc"] - 1 + rng.gauss(0, 0.1)} for line in a]
    mean, half = plot.paired(a[::-1], b[1:], plot.area)
    gaps = [plot.area(a[s]) - plot.area(b[s]) for s in range(1, 8)]
    assert mean == pytest.approx(statistics.mean(gaps)) and half < 20
    assert half == pytest.approx(2.447 * statistics.stdev(gaps) / 7**0.5)


def test_entropy_where_the_reward_crosses_a_level():
    line = {"curves": {"reward": [0.2, 0.6, 1.0], "entropy": [1.0, 0.8, 0.4]}}
    assert plot.entropy_at(line) == pytest.approx(0.6) and math.isnan(plot.entropy_at(line, 0.1))
