"""experiments/compare.py and plot.py: what is measured is what autograd says, and a sweep survives being killed."""
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import compare, plot
from model import Model

ROOT = Path(__file__).parent.parent
TINY = "--steps 2 --prompts 4 --samples 4 --skill_steps 2 --habit_steps 2 --width 16 --layers 1 --eval_problems 8"


def lines(cwd):
    return [json.loads(line) for line in (cwd / "lines.jsonl").read_text().splitlines()]


def test_a_tiny_grid_runs_is_killed_and_resumes(tmp_path, monkeypatch):
    """Four runs; the sweep is killed after the first line. Again: all four, none twice, nothing half-written."""
    monkeypatch.chdir(tmp_path)
    argv = [str(ROOT / "experiments/compare.py"), "--results", "lines.jsonl", "--jobs", "2", "--losses", "grpo", "acpo alpha=1",
            "--updates", "2", "4", "--seeds", "3", "--flags", TINY]
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "lines.jsonl"
    while not (path.is_file() and lines(tmp_path)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)  # its children notice
    before = path.read_text()
    path.write_text(before + '{"task": "cha')  # as if the machine had died
    monkeypatch.setattr(sys, "argv", argv)
    compare.main()
    assert path.read_text().startswith(before)
    keys = [compare.key(line) for line in lines(tmp_path)]
    assert len(keys) == len(set(keys)) == 4
    after = path.read_text()
    compare.main()
    assert path.read_text() == after  # nothing left to do
    monkeypatch.setattr(sys, "argv", ["plot.py", str(path)])
    plot.main()
    assert (tmp_path / "compare.md").read_text().startswith("4 runs")
    for line in lines(tmp_path):
        assert len(line["curves"]["reward"]) == 2 and line["cpu_seconds"] > 0 and line["collapsed"] in (True, False)
        tokens = [row[0] for row in (line["gradient"], line["spread"])]
        assert sum(tokens[0]) == sum(tokens[1]) == pytest.approx(16 * sum(line["curves"]["length"]), rel=2e-3)
        assert bool(line["band"]) == (line["loss"] != "grpo")


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, word in ((["--losses", "gpro"], "gpro"), (["--grid", "none"], "none"), ([], "--grid"), (["--grid", "main"], "lr"),
                       (["--losses", "grpo eps=1", "--flags", TINY], "eps"), (["--losses", "grpo", "--jobs", "0"], "--jobs")):
        monkeypatch.setattr(sys, "argv", ["compare.py", "--results", "lines.jsonl", *args])
        with pytest.raises(SystemExit) as e:
            compare.main()
        assert e.value.code.startswith("compare.py: ") and word in e.value.code and "\n" not in e.value.code
    assert not (tmp_path / "lines.jsonl").exists()


def test_bins_against_the_gradient_with_respect_to_the_logits():
    """Kept and full gradient per bin: the L2 norm of autograd's d loss / d logits, token by token, of two policy_loss calls."""
    torch.manual_seed(0)
    logits = torch.randn(6, 5, 7, dtype=torch.float64).mul(2).requires_grad_()
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 5, 1, 2])[:, None]
    token, A = torch.randint(7, (6, 5, 1)), torch.tensor([1.2, -0.7, 0.4, -1.0, 0.9, -0.2]).double()
    logp = logits.log_softmax(-1).gather(-1, token)[..., 0]
    old = (logp + 0.4 * torch.randn(6, 5)).detach().clamp(max=-0.01)
    sum_p2 = logits.softmax(-1).square().sum(-1).detach()
    norms, grads = [], []
    for name in ("grpo", "unclipped"):
        loss, _ = compare.losses.policy_loss(name, logp, old, A, mask)
        norms.append(torch.autograd.grad(loss, logits, retain_graph=True)[0].norm(dim=-1))
        grads.append(torch.autograd.grad(loss, logp, retain_graph=True)[0])
    sums = compare.gradient_bins(*grads, old.exp(), logp.detach().exp(), sum_p2, mask)
    clipped = 0
    for b in range(5):
        inside = mask & (old.exp() >= b / 5) & (old.exp() < (b + 1) / 5)
        assert sums[0, b] == inside.sum()
        assert sums[2, b].item() == pytest.approx(norms[1][inside].sum().item())
        assert sums[3, b].item() == pytest.approx(norms[0][inside].sum().item())
        assert sums[1, b] == ((norms[0] == 0) & inside).sum()
        clipped += sums[1, b]
    assert 0 < clipped < mask.sum()


def test_spread_against_plain_python():
    torch.manual_seed(1)
    q, d, s = torch.rand(3, 4).double(), 0.3 * torch.randn(3, 4).double(), torch.ones(3, 4).double()
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    got = compare.spread_bins(q, d, s, mask)
    want = [[0.0] * 5 for _ in range(6)]
    for x, y, m in zip(q.flatten().tolist(), d.flatten().tolist(), mask.flatten().tolist()):
        r = 2.718281828459045**y - 1
        for row, v in zip(want, (1, r, r * r, y, y * y, (1 - x) ** 2 + 1 - x * x)):
            row[min(4, int(5 * x))] += v * m
    assert torch.allclose(got, torch.tensor(want).double())


def test_entropy_slope_is_the_derivative():
    torch.manual_seed(2)
    z, token, A = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 5, 1]), torch.tensor([1.0, -1.0, 0.5, -2.0]).double()
    entropy = lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)
    step = A[:, None] * (torch.nn.functional.one_hot(token, 6) - z.softmax(-1))
    numeric = (entropy(z + 1e-6 * step) - entropy(z - 1e-6 * step)) / 2e-6
    assert torch.allclose(compare.entropy_slope(z, token, A), numeric, atol=1e-7)


@pytest.mark.parametrize("kind, inside, outside", [("ratio", 1.19, 1.21), ("kl3", 1.21, 1.23), ("tv", 1.39, 1.41), ("kl", 1.38, 1.43)])
def test_constraints_end_the_gradient_outside_and_only_on_the_way_out(kind, inside, outside):
    delta = {"ratio": 0.2, "kl3": 0.02, "tv": 0.2, "kl": 0.0808}[kind]  # q = 0.5: binary KL(.5, .7) = 0.0872, (.5, .69) = 0.0779
    q, r = torch.full((1, 4), 0.5).log(), torch.tensor([[inside, outside, outside, 1 / outside]])
    logp = (q + r.log()).requires_grad_()
    A = torch.tensor([[1.0, 1.0, -1.0, 1.0]])
    compare.losses.policy_loss("trust", logp, q, A, torch.ones(1, 4), kind=kind, delta=delta)[0].backward()
    assert (logp.grad != 0).tolist() == [[True, False, True, True]]


def test_cells_keep_their_own_tokens_and_all_cells_are_grpo():
    torch.manual_seed(3)
    old, A = torch.rand(4, 6).clamp(0.05).log(), torch.tensor([1.0, -1.0, 0.5, -0.5])
    mask, sum_p2 = torch.ones(4, 6), torch.rand(4, 6)

    def grad(name, **kw):
        logp = (old + 0.1 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
        compare.losses.policy_loss(name, logp, old, A, mask, sum_p2=sum_p2, **kw)[0].backward()
        return logp.grad
    parts = [grad("cells", only=only) for only in ("1000", "0100", "0010", "0001")]
    assert torch.allclose(sum(parts), grad("grpo")) and (sum((p != 0).int() for p in parts) <= 1).all()
    assert torch.equal(grad("cells", only=1111), grad("grpo")) and not (parts[2][::2] != 0).any()


def test_cells_add_up_to_the_whole_step(tmp_path, monkeypatch):
    """Small steps are linear: the four cells' entropy changes sum to that of all; the free-logit prediction sees the
    same log-probs as the trainer; the weights come back."""
    monkeypatch.chdir(tmp_path)
    cfg = compare.train.Config(samples=4)
    raw = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=16, hidden_size=16, intermediate_size=32,
               num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-6,
               tie_word_embeddings=True, hidden_act="silu", rope_theta=1e4, initializer_range=0.5)
    model, rng = Model.from_scratch(raw, 0, "cpu"), random.Random(0)
    rows = [compare.train.Row([rng.randrange(16) for _ in range(n)], 3, [-1.0] * (n - 3), True, float(i % 3 == 0), "ok")
            for i, n in enumerate((5, 9, 7, 4, 8, 6, 5, 7))]
    before, seen = model.embed_tokens.weight.clone(), []
    slope = compare.entropy_slope
    monkeypatch.setattr(compare, "entropy_slope", lambda logits, token, A: seen.append(
        logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]) or slope(logits, token, A))
    out = compare.cell_entropies(model, rows, cfg, norm=1e-2)
    mask, _, logp, _, _ = compare.train.token_stats(model, rows, cfg)
    assert torch.allclose(seen[0][mask], logp[mask], atol=1e-5)
    assert sum(out["measured"][:4]) == pytest.approx(out["measured"][4], rel=0.1) and sum(out["share"][:4]) == pytest.approx(1, abs=1e-3)
    assert sum(out["predicted"][:4]) == pytest.approx(out["predicted"][4], rel=1e-2)
    assert torch.allclose(model.embed_tokens.weight, before, atol=1e-6)


def test_collapse_is_a_fifth_below_the_best():
    assert not compare.collapsed([0.1, 0.2, 0.5, 0.9, 0.9, 0.9, 0.9])
    assert compare.collapsed([0.1, 0.9, 0.9, 0.9, 0.5, 0.5, 0.6])
    assert not compare.collapsed([0.9, 0.9, 0.9, 0.73, 0.73, 0.73]) and compare.collapsed([0.9, 0.9, 0.9, 0.71, 0.71, 0.71])
    assert not compare.collapsed([0.1, 0.1, 0.1])


def test_matching_finds_the_parameter_between_two_points():
    def line(clip):
        return {"curves": {"reward": [0, 0], "clip_low": [clip, 0], "clip_high": [0, clip]}}
    scan = {0.1: [line(0.04)], 0.4: [line(0.01)], 1.0: [line(0.0)]}
    assert compare.match(scan, "clip", 0.02) == 0.2  # straight in log-log
    assert compare.match(scan, "clip", 0.5) == 0.1 and compare.match(scan, "clip", 1e-9) == 0.4


def test_intervals_and_pairing_by_brute_force():
    """t quantiles by integrating the density; an interval covers the truth 95 times in 100; pairing removes what seeds share."""
    for df in (1, 4, 7, 9, 20):
        density = lambda t: math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi) * (1 + t * t / df) ** (-(df + 1) / 2)
        n, T = 20000, plot.T95[df]
        assert 2 * T / n * sum(density(-T + 2 * T * (i + 0.5) / n) for i in range(n)) == pytest.approx(0.95, abs=2e-4)
    rng = random.Random(0)
    hits = [abs(m - 3) < half for m, half in (plot.interval([rng.gauss(3, 2) for _ in range(5)]) for _ in range(4000))]
    assert 0.935 < sum(hits) / len(hits) < 0.965
    shared = [rng.gauss(0, 10) for _ in range(8)]
    a, b = ([{"seed": s, "auc": x + d + rng.gauss(0, 0.1)} for s, x in enumerate(shared)] for d in (1, 0))
    m, half, n = plot.paired(a[::-1], b[1:], lambda x: x["auc"])
    d = [a[s]["auc"] - b[s]["auc"] for s in range(1, 8)]
    assert n == 7 and m == pytest.approx(sum(d) / 7) and half < 0.2
    assert half == pytest.approx(2.447 * (sum((v - m) ** 2 for v in d) / 6 / 7) ** 0.5)


def test_entropy_where_the_reward_crosses_a_level():
    line = {"curves": {"reward": [0.2, 0.6, 1.0], "entropy": [1.0, 0.8, 0.4]}}
    assert plot.entropy_at(line, 0.8) == pytest.approx(0.6) and math.isnan(plot.entropy_at(line, 0.1))


def test_the_ladder_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    """A run with the ladder of updates beside it is the same run; more updates spread the ratio further."""
    monkeypatch.chdir(tmp_path)
    for measure in ("", "ladder"):
        runs = compare.grid(["grpo"], (4,), seeds=[0], measure=measure)
        runs[0]["flags"] = TINY.replace("--prompts 4 --samples 4", "--prompts 32 --samples 2 --lr 1e-2")
        compare.sweep(runs, 1, tmp_path / "lines.jsonl")
    plain, beside = lines(tmp_path)
    assert {k: plain[k] for k in ("curves", "gradient", "spread", "width")} == {k: beside[k] for k in ("curves", "gradient", "spread", "width")}
    second = [sum(beside["ladder"][f"grpo {k}"]["spread"][2]) for k in compare.LADDER]
    assert second[0] < second[2] < second[4] and len(beside["ladder"]) == 10
    assert beside["ladder"]["grpo 4"]["gradient"] == plain["gradient"]  # the rung that the run itself stands on
