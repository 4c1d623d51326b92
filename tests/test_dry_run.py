"""The dry run's numbers against what a process really takes, and that they move as they must."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from experiments import dry_run, one_rank

ROOT = Path(__file__).parent.parent
SMALL = dict(model_type="qwen2", vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
             num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=8192)

# Two updates of a model sharded over one real rank, as dry_run counts them; the second micro-batch meets gradients.
REAL = """
import json, re, sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, {root!r})
import train
from model import Config, Model
torch.set_num_threads(1)
raw, lengths, prompt, recompute = json.loads(sys.argv[1])
def resident(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
def passes(raw, lengths, times):
    with torch.device("meta"):
        model = Model(Config.from_dict(raw))
    model = train.shard(model, mesh).to_empty(device="cpu")
    model.recompute = recompute
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    at = torch.arange(prompt, lengths[0])
    ids = torch.randint(0, raw["vocab_size"], (sum(lengths),))
    targets = torch.cat([torch.full_like(i, -1).index_copy(0, at, i[at]) for i in ids.split(lengths)])
    for k in range(times):
        model(ids, lengths, targets)[0].sum().backward()
        if k == 0:
            optimizer.step()
tiny = dict(raw, hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
passes(tiny, lengths[:1], 2)  # libraries load their code now
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
passes(raw, lengths, 2)
print(json.dumps(resident("VmHWM") - before))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory as Linux tells it")
@pytest.mark.parametrize("case", [
    dict(recompute=False),
    pytest.param(dict(recompute=True, vocab_size=65536, tokens=1024), marks=pytest.mark.slow),
    pytest.param(dict(recompute=True), marks=pytest.mark.slow),
    pytest.param(dict(recompute=True, hidden_size=768, intermediate_size=3072, tokens=512), marks=pytest.mark.slow)])
def test_tracked_peak_is_what_a_process_takes(case):
    """Everything a dry run says rests on the tracker's sums: here they stand against the resident memory of a process that
    does the same for real: activations lead, then the head, then weights and optimizer."""
    tokens, recompute = case.pop("tokens", 4096), case.pop("recompute")
    raw, prompt, response = SMALL | case, 64, 192
    said = dry_run.measure(raw, 1, tokens, prompt, response, recompute, dtype=None, kernel="sdpa")["update"]
    lengths = [prompt + response] * (tokens // (prompt + response))
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # give back what is freed
    run = subprocess.run([sys.executable, "-c", REAL.format(root=str(ROOT)), json.dumps([raw, lengths, prompt, recompute])],
                         capture_output=True, text=True, env=env, check=True)
    took = float(run.stdout)
    print(f"{case} recompute={recompute}: tracker {said:.3f} GiB, process {took:.3f} GiB")
    assert said == pytest.approx(took, rel=0.05)


def measure(gpus=4, tokens=2048, **how):
    return dry_run.measure(SMALL, gpus, tokens, 64, 192, **how)


@pytest.mark.slow
def test_numbers_move_as_they_must():
    base = measure()
    parts = base["categories"]
    assert base["update"] == pytest.approx(sum(parts.values()), rel=1e-6)
    assert measure(tokens=4096)["categories"]["activations"] > 1.8 * parts["activations"]
    again = measure(recompute=True)
    assert again["update"] < base["update"] and again["categories"]["activations"] < parts["activations"] / 2
    wide, name = measure(gpus=8)["categories"], "weights, float32 shard"
    for k in (name, "optimizer"):
        assert wide[k] == pytest.approx(parts[k] / 2, rel=0.01)
    assert measure(gpus=8, shards=4)["categories"][name] == parts[name]  # HSDP: a replica's ranks share, replicas do not
    assert parts[name] * 2**30 * 4 / 4 == pytest.approx(base["parameters"], rel=0.01)  # 4 bytes a weight, 4 ranks
    assert parts["optimizer"] == pytest.approx(2 * parts[name], rel=0.01)
    assert measure(reference=True)["categories"]["reference model"] > 0
    off = measure(offload=True)
    assert off["update"] + off["host"] == pytest.approx(base["update"]) and off["categories"]["optimizer"] == 0
    assert not dist.is_initialized()


def test_report_says_whether_it_fits_and_leaves_nothing_behind(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    cfg = train.Config(model=str(tmp_path), max_prompt_tokens=64, max_new_tokens=192, prompts=16, samples=4)
    got = dry_run.report(cfg, 4)
    said = capsys.readouterr().out
    assert all(got["fits"].values()) and said.count(": fits") == 2 and "What to turn" not in said
    assert "estimates" in said and f"{got['update']:8.2f}" in said and not dist.is_initialized()


def test_what_to_turn_is_measured(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    monkeypatch.setattr(dry_run, "CARDS", {"toy 7 GB": (dry_run.RESERVE + 0.35, 1e12)})
    cfg = train.Config(model=str(tmp_path), max_prompt_tokens=64, max_new_tokens=192, tokens_per_microbatch=4096)
    assert not any(dry_run.report(cfg, 2)["fits"].values())
    said = capsys.readouterr().out
    assert "--recompute: 0.3 GiB, fits" in said, said


def test_one_rank_plays_its_share(monkeypatch):
    real, passes = train.forward, []

    def forward(model, sequences, prompt_lens, temperature=1.0):
        if sequences:
            passes.append((sum(map(len, sequences)), sum(p.to_local().numel() for p in model.parameters())))
        return real(model, sequences, prompt_lens, temperature)
    monkeypatch.setattr(train, "forward", forward)
    cfg = train.Config(loss="grpo", prompts=10, samples=3, updates=2, max_prompt_tokens=40, max_new_tokens=32,
                       tokens_per_microbatch=200)
    small = SMALL | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "num_hidden_layers": 2}
    got = one_rank.play(cfg, small, 4, steps=1)
    tokens, weights = sum(t for t, _ in passes), passes[0][1]
    assert got["sequences"] == 9 and 10 < tokens / 9 < 42  # 3 of 10 prompts; 10 prompt tokens and a response
    assert tokens == pytest.approx(got["update_tokens_per_s"] * got["update_s"], rel=0.2)  # a fourth of all
    assert weights == pytest.approx(got["parameters"] / 4, rel=0.02) and got["update_GiB"] is None
    assert got["rollout_tokens_per_s"] * got["rollout_s"] == pytest.approx(9 * got["mean_length"])
    assert not dist.is_initialized() and train.WORLD == 1


@pytest.mark.parametrize("args, words", [
    (["--gpus", "0"], "at least 1"), (["--model", "nonsense"], "no config.json"), (["--max_new_tokens", "-5"], "at least 1"),
    (["--gpus", "x"], "invalid int"),
    (["--gpus", "8", "--shards_per_replica", "3"], "does not divide"), (["--max_new_tokens", "9999999"], "context")])
def test_nonsense_is_one_line(args, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dry_run.py", *args])
    with pytest.raises(SystemExit) as e:
        dry_run.main()
    assert words in str(e.value) and "\n" not in str(e.value)


def test_published_shapes_have_their_published_size():
    for name, billions in (("0.5B", 0.494), ("1.5B", 1.544), ("3B", 3.086), ("7B", 7.616)):
        c = dry_run.Config.from_dict(dry_run.architecture(f"Qwen/Qwen2.5-{name}"))
        with torch.device("meta"):
            assert sum(p.numel() for p in dry_run.Model(c).parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.slow
def test_seven_billion_on_eight():
    """The known range: 23.5 GiB at 16k tokens with recomputation for the first micro-batch (PyTorch's tracker, another
    script), and the sharded gradients that wait beside the second."""
    m = dry_run.measure(dry_run.architecture("Qwen/Qwen2.5-7B"), 8, 16384, 1024, 3072, recompute=True)
    assert 23.5 < m["update"] < 28 and 20 < m["rollout"] < 28
