"""The dry run's numbers against what a process really takes, and that they move as they must."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from experiments import dry_run

ROOT = Path(__file__).parent.parent
SMALL = dict(model_type="qwen2", vocab_size=8192, hidden_size=256, intermediate_size=1024,
             num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
             max_position_embeddings=8192, tie_word_embeddings=False)

# Two updates of a model sharded over one real rank, as dry_run counts them; the second micro-batch
# meets gradients.
REAL = """
import json, re, sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, {root!r})
import model as network
import train
from model import Config, Model, pack
network.ONEDNN = False  # its matmul takes a scratch pad of its own, which no GPU has
torch.set_num_threads(1)
raw, tokens, prompt, length, recompute, lora = json.loads(sys.argv[1])
def resident(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
def passes(raw, tokens):
    with torch.device("meta"):
        model = Model(Config.from_dict(raw))
    if lora:
        model.add_lora(lora, 32, "")
    model = train.shard(model, mesh).to_empty(device="cpu")
    model.recompute = recompute
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    sequences = torch.randint(0, raw["vocab_size"], (tokens // length, length)).tolist()
    for k in range(2):
        model(*pack(sequences, [prompt] * len(sequences), "cpu"))[0].sum().backward()
        if k == 0:
            optimizer.step()
passes(dict(raw, hidden_size=64, intermediate_size=64, vocab_size=64), length)  # loads libraries
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
passes(raw, tokens)
print(json.dumps(resident("VmHWM") - before))
dist.destroy_process_group()
"""


def flags(gpus=1, *more):
    argv = ["--model", "Qwen/Qwen2.5-0.5B", "--max_prompt_tokens", "64", "--max_new_tokens", "192",
            "--prompts", "16", "--samples", "4", "--tokens_per_microbatch", "2048", *more]
    return dry_run.parse(gpus, argv)


class Norm:
    """RMSNorm as a CPU computes it, in the place of a GPU's kernel."""
    @staticmethod
    def apply(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's accounts")
@pytest.mark.parametrize("case", [
    dict(recompute=False, tokens=1024),
    pytest.param(dict(recompute=False, lora=8), marks=pytest.mark.slow),
    pytest.param(dict(recompute=True, vocab_size=65536, tokens=1024), marks=pytest.mark.slow),
    pytest.param(dict(recompute=True), marks=pytest.mark.slow),
    pytest.param(dict(recompute=True, hidden_size=768, tokens=512), marks=pytest.mark.slow)])
def test_the_peak_is_what_a_process_takes(case):
    """Everything a dry run says rests on the tracker's sums. Here they stand against the resident
    memory of a process that does the same for real, in float32 on this CPU: activations lead,
    then the head, then weights and optimizer."""
    tokens, recompute = case.pop("tokens", 2048), case.pop("recompute")
    lora = case.pop("lora", 0)
    raw = SMALL | case
    counted = flags(1, "--tokens_per_microbatch", str(tokens), "--recompute", str(recompute),
                    "--lora", str(lora))
    kernel = dry_run.Kernel

    def attention(_, q, k, v, *__):  # SDPA repeats no keys and values here
        return kernel.apply(q, k, v)
    with pytest.MonkeyPatch.context() as as_on_a_cpu:
        as_on_a_cpu.setattr(dry_run, "attention", attention)
        as_on_a_cpu.setattr(dry_run, "Kernel", Norm)
        said = dry_run.measure(raw, 1, counted, dtype=torch.float32)["update"]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    argv = json.dumps([raw, tokens, 64, 256, recompute, lora])
    run = subprocess.run([sys.executable, "-c", REAL.format(root=str(ROOT)), argv],
                         capture_output=True, text=True, env=env, check=True)
    took = float(run.stdout.splitlines()[-1])  # torch 2.9's Gloo prints before it
    print(f"{case} recompute={recompute}: tracker {said:.3f} GiB, process {took:.3f} GiB")
    assert said == pytest.approx(took, rel=0.05)


def test_numbers_move_as_they_must():
    base = dry_run.measure(SMALL, 4, flags(4))
    parts, name = base["categories"], "weights, this card's shard"
    assert base["update"] == pytest.approx(sum(parts.values()), rel=1e-6)
    assert parts[name] * 2**30 == pytest.approx(base["parameters"], rel=0.01)  # 4 bytes, 4 ranks
    assert parts["optimizer"] == pytest.approx(2 * parts[name], rel=0.01)
    again = dry_run.measure(SMALL, 4, flags(4, "--recompute", "--offload"))
    assert again["categories"]["activations"] < 0.7 * parts["activations"]
    assert again["host"] == pytest.approx(4 * parts[name], rel=0.01)  # Adam has two
    assert again["categories"]["optimizer"] == 0 and again["resident"] < base["resident"]
    hsdp = dry_run.measure(SMALL, 8, flags(8, "--shards_per_replica", "4", "--kl_beta", "0.1"))
    assert hsdp["categories"][name] == parts[name]  # a replica's ranks share, replicas do not
    assert hsdp["categories"]["frozen weights, reference"] == pytest.approx(parts[name])
    one = dry_run.measure(SMALL, 1, flags())
    lora = dry_run.measure(SMALL, 1, flags(1, "--lora", "8", "--kl_beta", "0.1"))
    adapters = lora["parameters"] - one["parameters"]
    assert 0 < adapters < 0.05 * one["parameters"]
    assert lora["categories"]["gradients"] * 2**30 == pytest.approx(4 * adapters, rel=0.01)
    assert lora["categories"]["optimizer"] * 2**30 == pytest.approx(8 * adapters, rel=0.01)
    # the weights once, in bfloat16, for update, rollout and reference
    assert lora["categories"]["frozen weights, reference"] * 2**30 == 2 * one["parameters"]
    assert lora["resident"] * 2**30 == pytest.approx(2 * one["parameters"], rel=0.2)
    assert not dist.is_initialized()


def test_what_fits_where():
    """Two moments decide: the peak of the update, and the cache beside the weights in a rollout."""
    m = {"update": 20.0, "resident": 10.0, "prefill": 1.0}
    left, sequences = dry_run.fit(SMALL, 1, flags(), m, 40)
    assert left == pytest.approx(0.4 * (0.96 * 40 - 1 - 10) - 1)  # what the cache left, a prefill
    assert sequences == 64  # all of them
    assert dry_run.fit(SMALL, 1, flags(), m, 21)[0] < 0  # the update does not fit
    assert dry_run.fit(SMALL, 1, flags(), m | {"resident": 37.5}, 40)[1] == 0  # no cache
    few = flags(1, "--kv_tokens", "600")
    left, sequences = dry_run.fit(SMALL, 1, few, m, 100)
    assert sequences == 2 and left == pytest.approx(0.96 * 100 - 1 - 20)


def test_the_report_says_what_to_turn(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    asked = flags(2, "--model", str(tmp_path))

    def measure(raw, gpus, flags):
        low = 0.4 if flags.recompute else 0.8
        low = 0.2 if flags.tokens_per_microbatch == 256 else low
        return {"update": low, "categories": {}, "resident": 0.1, "prefill": 0.01, "host": 0.0,
                "parameters": 10**9}
    monkeypatch.setattr(dry_run, "measure", measure)
    assert all(dry_run.report(2, asked)["fits"].values())
    said = capsys.readouterr().out
    assert "What to turn" not in said and "0.80" in said and "Assumed" in said
    monkeypatch.setattr(dry_run, "CARDS", {"80 GB": 3.3 / 0.96})
    assert not any(dry_run.report(2, asked)["fits"].values())
    said = capsys.readouterr().out.split("What to turn")[1]
    assert "--recompute: update 0.4 GiB\n" in said
    assert "and --tokens_per_microbatch 256: update 0.2 GiB, fits" in said
    assert "--offload" not in said  # no more than it takes


@pytest.mark.parametrize("args, words", [
    (["--gpus", "0"], "at least 1"), (["--model", "nonsense"], "no config.json"),
    ([], "--model is missing"), (["--gpus", "x"], "invalid int"), (["--nonsense"], "--nonsense"),
    (["--model", "Qwen/Qwen2.5-7B", "--shards_per_replica", "3"], "--shards_per_replica 3"),
    (["--model", "Qwen/Qwen2.5-7B", "--max_new_tokens", "999999"], "context")])
def test_nonsense_is_one_line(args, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dry_run.py", *args])
    with pytest.raises(SystemExit) as e:
        dry_run.main()
    assert words in str(e.value) and "\n" not in str(e.value)


def test_published_shapes_have_their_published_size():
    sizes = {"0.5B": 0.494, "1.5B": 1.544, "3B": 3.086, "7B": 7.616}
    for name, billions in sizes.items():
        c = dry_run.Config.from_dict(dry_run.architecture(f"Qwen/Qwen2.5-{name}"))
        with torch.device("meta"):
            count = sum(p.numel() for p in dry_run.Model(c).parameters())
        assert count / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.slow
def test_seven_billion_on_eight():
    """The known range: 23.5 GiB at 16k tokens with recomputation for the first micro-batch (the
    same tracker, another script), and the sharded gradients that wait beside the second."""
    asked = dry_run.parse(8, ["--model", "Qwen/Qwen2.5-7B", "--max_new_tokens", "3072",
                              "--recompute"])
    m = dry_run.measure(dry_run.architecture("Qwen/Qwen2.5-7B"), 8, asked)
    assert 23.5 < m["update"] < 28 and 20 < m["resident"] < 28


def commands():
    """(card, GPUs, flags) of every command in README.md and docs/ that trains a named model. The
    comment above it names the card, if not 80 GB."""
    found = []
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for block in re.findall(r"```[a-z]*\n(.*?)```", page.read_text(), re.S):
            card = "80 GB"
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("#"):
                    card = (re.findall(r"\d+ GB", line) or ["80 GB"])[0]
                elif "train.py" in line and "--model" in line:
                    gpus = int((re.findall(r"nproc_per_node[= ](\d+)", line) or ["1"])[0])
                    argv = shlex.split(line.split("train.py")[1], comments=True)
                    found.append((card, gpus, argv))
    return found


@pytest.mark.slow
def test_every_printed_command_fits():
    assert len(commands()) >= 4
    for card, gpus, argv in commands():
        shape = re.sub("-Instruct|Math-", "", argv[argv.index("--model") + 1])  # the same sizes
        asked = dry_run.parse(gpus, [*argv, "--model", shape])
        raw = dry_run.architecture(shape)
        m = dry_run.measure(raw, gpus, asked)
        left, sequences = dry_run.fit(raw, gpus, asked, m, dry_run.CARDS[card])
        print(card, gpus, argv, f"{m['update']:.1f} GiB, {left:.1f} left, {sequences} at once")
        assert left >= 0 and sequences, (card, gpus, argv)
