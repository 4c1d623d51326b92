"""model.py against transformers, autograd and float64, on small random checkpoints that transformers itself writes."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import model as model_py
from model import Config, Model, TokenLogp, causal, exact_logits, find_checkpoint

ROOT = Path(__file__).parent.parent
SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, eos_token_id=5)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64,
              rope_theta=5e5)
FAMILIES = {
    "qwen2-tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-untied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=False, rms_norm_eps=1e-5),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),  # head_dim is not hidden/heads
    "llama3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=False),
    "llama-biases": transformers.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=16),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(transformers model, ours, directory): random weights, norms and biases too, so that none is a silent no-op."""
    torch.manual_seed(1)
    hf = transformers.AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    for p in hf.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
    path = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(path)
    return hf, Model.from_pretrained(path), path


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_logits_of_a_right_padded_batch(pair):
    hf, ours, _ = pair
    ids, lengths = torch.randint(0, 97, (3, 200)), [200, 121, 1]  # 200: past the llama3 scaling boundary of 64
    mask = torch.arange(200) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        a, b = ours(ids), hf(ids, attention_mask=mask.long()).logits
    assert relative(a[mask], b[mask]) < 1e-5


def test_the_form_for_sampling_is_the_same_function(pair):
    _, ours, _ = pair
    with torch.no_grad():
        ids, lengths = torch.randint(0, 97, (60,)), [40, 1, 19]
        plain = ours.body(ids, *causal(lengths, "cpu"))
        with ours.for_sampling():
            assert len(ours.fused) == 3
            assert relative(ours.body(ids, *causal(lengths, "cpu")), plain) < 3e-6
        assert ours.fused is None and torch.equal(ours.body(ids, *causal(lengths, "cpu")), plain)


def test_left_padded_batch_of_transformers_is_our_packed_one(pair):
    hf, ours, _ = pair
    lengths = [50, 7, 23]
    rows = [torch.randint(0, 97, (n,)) for n in lengths]
    left = torch.stack([torch.nn.functional.pad(r, (50 - len(r), 0)) for r in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones(len(r)), (50 - len(r), 0)) for r in rows]).long()
    with torch.no_grad():
        b = hf(left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[mask.bool()]
        a = exact_logits(ours.body(torch.cat(rows), *causal(lengths, "cpu")), ours.head_weight)
    assert relative(a, b) < 1e-5


def test_packed_logp_and_every_gradient(pair):
    """Log-probs at temperature 0.7, entropy, sum p^2 and all parameter gradients of a packed batch against transformers."""
    hf, ours, _ = pair
    lengths = [90, 37, 2]
    ids = torch.randint(0, 97, (3, 90))
    flat = torch.cat([ids[i, :n] for i, n in enumerate(lengths)])
    targets = torch.cat([torch.cat([ids[i, 1:n], torch.tensor([-1])]) for i, n in enumerate(lengths)])
    logp, entropy, sum_p2 = ours(flat, lengths, targets, 0.7)
    z = (hf(ids).logits / 0.7).log_softmax(-1)
    z = torch.cat([z[i, :n - 1] for i, n in enumerate(lengths)])
    expected = z.gather(1, targets[targets >= 0][:, None])[:, 0]
    assert (logp - expected).abs().max() < 2e-5
    assert (entropy + (z.exp() * z).sum(-1)).abs().max() < 2e-5
    assert (sum_p2 - (2 * z).exp().sum(-1)).abs().max() < 1e-5
    assert not entropy.requires_grad and not sum_p2.requires_grad
    w = torch.randn(len(logp))
    hf.zero_grad(), ours.zero_grad()
    (logp * w).sum().backward(), (expected * w).sum().backward()
    theirs = {n.removeprefix("model."): p.grad for n, p in hf.named_parameters()}
    assert set(theirs) == {n for n, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        assert relative(p.grad, theirs[name]) < 1e-4, name


def test_neighbours_in_a_pack_do_not_touch(pair):
    """Changing every token of the sequence before and after leaves the middle one's hidden states bit for bit."""
    _, ours, _ = pair
    lengths, mine = [9, 20, 30], torch.randint(0, 97, (20,))
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ids = torch.cat([torch.randint(0, 97, (9,)), mine, torch.randint(0, 97, (30,))])
        with torch.no_grad():
            runs.append(ours.body(ids, *causal(lengths, "cpu"))[9:29])
    assert torch.equal(*runs)


@pytest.mark.parametrize("lengths, after", [
    ([4, 3, 5, 1], [-1, 0, 0, 0]), ([2, 3], [1, -1]), ([3, 2], [-1, 0]), ([1, 1, 6, 2], [2, -1, -1, 2]), ([3, 3], [-1, -1])])
def test_sequences_that_continue_another(lengths, after):
    """Against one sequence at a time with its past written out; also where the past stands later in the list."""
    positions, attend = causal(lengths, "cpu", after=after)
    q, k, v = (torch.randn(sum(lengths), heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    parts, got, where = [x.split(lengths) for x in (q, k, v)], attend(0, q, k, v).split(lengths), positions.split(lengths)
    for i, j in enumerate(after):
        past = lengths[j] if j >= 0 else 0
        K, V = (torch.cat((x[j], x[i])) if past else x[i] for x in parts[1:])
        assert where[i].tolist() == list(range(past, past + lengths[i]))
        for t in range(lengths[i]):
            for head in range(4):
                p = (K[:past + t + 1, head // 2] @ parts[0][i][t, head] / 8**0.5).softmax(0)
                assert torch.allclose(got[i][t, head], p @ V[:past + t + 1, head // 2])


def test_recompute_changes_nothing(pair):
    _, ours, _ = pair
    ids, targets = torch.randint(0, 97, (60,)), torch.randint(0, 97, (60,))
    grads = []
    for ours.recompute in (False, True):
        ours.zero_grad()
        ours(ids, [40, 20], targets)[0].sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    ours.recompute = False
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_save_loads_in_transformers_bit_for_bit(pair, tmp_path, monkeypatch):
    """One file and several; what we write, transformers and we read back exactly, and the tokenizer files come along."""
    hf, ours, source = pair
    (source / "tokenizer_config.json").write_text("{}")
    ids = torch.randint(0, 97, (2, 30))
    for shard_bytes, files in ((5 * 10**9, 1), (40_000, None)):
        monkeypatch.setattr(model_py, "SHARD_BYTES", shard_bytes)
        path = tmp_path / str(shard_bytes)
        ours.save_pretrained(path)
        found = list(path.glob("*.safetensors"))
        assert len(found) == files if files else len(found) > 3 and all(f.stat().st_size < 60_000 for f in found)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(theirs(ids).logits, hf(ids).logits)
            assert torch.equal(Model.from_pretrained(path)(ids), ours(ids))
        assert (path / "tokenizer_config.json").is_file()
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # nothing left aside
    ours.save_pretrained(path)  # over an old one: replaced, not mixed
    assert len(list(path.glob("*.safetensors"))) == len(found)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_logits_are_not_rounded(device):
    g = torch.Generator().manual_seed(0)
    h, W = (torch.randn(n, 64, generator=g).to(device, torch.bfloat16) * 2 for n in (50, 300))
    exact, targets = h.double() @ W.double().T, torch.arange(50, device=device)
    z = exact_logits(h, W)
    assert z.dtype == torch.float32 and exact.abs().max() > 60 and (z - exact).abs().max() < 1e-4  # rounded, it is 0.1 or more
    assert (exact.bfloat16() - exact).abs().max() > 0.1
    logp = TokenLogp.apply(h, W, targets, 1.0)[0]
    assert (logp - exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]).abs().max() < 1e-4
    assert exact_logits(h.double(), W.double()).dtype == torch.float64


def test_bfloat16_is_as_good_as_transformers(pair):
    hf, ours, path = pair
    ids = torch.randint(0, 97, (2, 100))
    with torch.no_grad():
        exact = hf(ids).logits
        mine = Model.from_pretrained(path, dtype=torch.bfloat16)(ids).float()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)(ids).logits.float()
    assert (mine - exact).abs().mean() < 1.1 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_head_is_the_naive_one(chunk, monkeypatch):
    """Any chunk size, float64 and float32: the log-probs and gradients of log_softmax over the whole (N,V)."""
    monkeypatch.setattr(model_py, "LOGITS_CHUNK", chunk * 53)
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        torch.manual_seed(0)
        h, W = torch.randn(20, 16, dtype=dtype, requires_grad=True), torch.randn(53, 16, dtype=dtype, requires_grad=True)
        t, w = torch.randint(0, 53, (20,)), torch.randn(20, dtype=dtype)
        logp, entropy, sum_p2 = TokenLogp.apply(h, W, t, 1.3)
        mine = torch.autograd.grad((logp * w).sum(), (h, W))
        z = (h @ W.T / 1.3).log_softmax(-1)
        naive = torch.autograd.grad((z[torch.arange(20), t] * w).sum(), (h, W))
        assert logp.dtype == dtype and torch.allclose(logp, z[torch.arange(20), t], atol=tol)
        assert torch.allclose(entropy, -(z.exp() * z).sum(-1), atol=10 * tol)
        assert torch.allclose(sum_p2, (2 * z).exp().sum(-1), atol=tol)
        assert all(torch.allclose(a, b, atol=10 * tol) for a, b in zip(mine, naive))


def peak_memory(code, *args):
    """MiB that a fresh process had at most, which runs `code` (ru_maxrss would start at this process's own)."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("reads the high-water mark from /proc")
    code = f"import re, sys, torch, model\ntorch.set_num_threads(1)\n{code}\n" \
           "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    out = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True, cwd=ROOT)
    return int(out.stdout.splitlines()[-1])


def test_head_memory_does_not_grow_with_the_logits():
    """8,192 tokens x 16,384 words are 512 MiB of float32 logits; the head's own peak stays near one chunk."""
    code = """
model.LOGITS_CHUNK = 2**20
h, W = torch.randn(int(sys.argv[1]), 32, requires_grad=True), torch.randn(16384, 32, requires_grad=True)
model.TokenLogp.apply(h, W, torch.zeros(len(h), dtype=torch.long), 1.0)[0].sum().backward()"""
    grown = peak_memory(code, 8192) - peak_memory(code, 64)
    assert grown < 64, f"peak grew by {grown} MiB, the logits are 512 MiB"


@pytest.mark.slow
def test_head_memory_at_full_size():
    """16,384 tokens x 152,064 words, 9.3 GiB of float32 logits: under 1 GB more than the inputs and gradients."""
    code = """
h, W = torch.randn(int(sys.argv[1]), 64, requires_grad=True), torch.randn(152064, 64, requires_grad=True)
model.TokenLogp.apply(h, W, torch.zeros(len(h), dtype=torch.long), 1.0)[0].sum().backward()"""
    grown = peak_memory(code, 16384) - peak_memory(code, 1)
    print(f"{grown} MiB")
    assert grown < 650


def test_loading_streams_one_tensor_at_a_time(tmp_path, monkeypatch):
    """A checkpoint of 12 shards: the peak is the model and about one shard, not the model twice."""
    monkeypatch.setattr(model_py, "SHARD_BYTES", 20_000_000)
    raw = dict(SIZES, model_type="qwen2", hidden_size=512, intermediate_size=2048, num_hidden_layers=14, vocab_size=4096)
    Model.from_scratch(raw).save_pretrained(tmp_path / "big")
    size = sum(f.stat().st_size for f in (tmp_path / "big").glob("*.safetensors")) / 2**20
    assert len(list((tmp_path / "big").glob("*.safetensors"))) > 9 and size > 200
    grown = peak_memory("model.Model.from_pretrained(sys.argv[1])", tmp_path / "big") - peak_memory("")
    assert grown < size + 120 < 2 * size, f"{grown} MiB for a model of {size:.0f} MiB"


# ---- config.json and files that are not what they should be ----

PUBLISHED = {  # the lines that matter of published config.json files, old style
    "Qwen2.5-0.5B": (dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                          num_key_value_heads=2, vocab_size=151936, rope_theta=1e6, tie_word_embeddings=True, rms_norm_eps=1e-6,
                          use_sliding_window=False, sliding_window=32768, max_position_embeddings=32768), 494_032_768),
    "Qwen2.5-7B": (dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                        num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, rope_theta=1e6,
                        tie_word_embeddings=False, use_mrope=False, use_sliding_window=False, sliding_window=131072,
                        max_position_embeddings=131072), 7_615_616_512),
    "Qwen3-8B": (dict(model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                      num_key_value_heads=8, head_dim=128, vocab_size=151936, rope_theta=1e6, rope_scaling=None,
                      tie_word_embeddings=False, attention_bias=False), 8_190_735_360),
    "Llama-3.1-8B": (dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                          num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rope_theta=5e5, mlp_bias=False,
                          rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3",
                                            original_max_position_embeddings=8192)), 8_030_261_248),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    """The parameter count of the real model, from config.json alone, without memory."""
    raw, count = PUBLISHED[name]
    with torch.device("meta"):
        model = Model(Config.from_dict(raw))
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.config.rope["rope_theta"] == raw["rope_theta"]


def test_old_and_new_rope_style_agree():
    raw = PUBLISHED["Llama-3.1-8B"][0]
    new = {k: v for k, v in raw.items() if not k.startswith("rope")}
    new["rope_parameters"] = {**raw["rope_scaling"], "rope_theta": raw["rope_theta"]}
    a, b = (model_py.inverse_frequencies(Config.from_dict(r)) for r in (raw, new))
    assert torch.equal(a, b) and a[-1] < model_py.inverse_frequencies(Config.from_dict({**raw, "rope_scaling": None}))[-1]


@pytest.mark.parametrize("change, named", [
    (dict(model_type="mixtral"), "mixtral"), (dict(num_experts=8), "num_experts"), (dict(hidden_act="gelu"), "gelu"),
    (dict(quantization_config={"bits": 4}), "quantization_config"), (dict(rope_scaling={"type": "yarn", "factor": 4}), "yarn"),
    (dict(use_sliding_window=True, sliding_window=128), "sliding"), (dict(hidden_size=None), "hidden_size"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "sliding")])
def test_what_would_be_computed_wrongly_is_refused_by_name(change, named):
    raw = {k: v for k, v in {**PUBLISHED["Qwen2.5-0.5B"][0], **change}.items() if v is not None}
    with pytest.raises(ValueError, match=named):
        Config.from_dict(raw)


def test_unknown_keys_do_not_matter():
    raw = PUBLISHED["Qwen2.5-0.5B"][0]
    assert Config.from_dict({**raw, "transformers_version": "4.37", "some_new_key": [1]}).hidden_size == 896


@pytest.fixture
def checkpoint(tmp_path):
    raw = dict(SIZES, model_type="qwen2", tie_word_embeddings=True)
    Model.from_scratch(raw, seed=3).save_pretrained(tmp_path / "ckpt")
    return tmp_path / "ckpt"


def tamper(path, **tensors):
    from safetensors.torch import load_file, save_file
    state = load_file(path / "model.safetensors")
    for name, t in tensors.items():
        state[name.replace("__", ".")] = t
    save_file({k: v for k, v in state.items() if v is not None}, path / "model.safetensors")


def test_misfitting_weights_are_listed(checkpoint):
    tamper(checkpoint, model__norm__weight=None, model__extra__weight=torch.zeros(2),
           model__layers__0__mlp__up_proj__weight=torch.zeros(3, 4))
    with pytest.raises(ValueError) as e:
        Model.from_pretrained(checkpoint)
    assert "norm.weight missing" in str(e.value) and "model.extra.weight unexpected" in str(e.value)
    assert "up_proj.weight is [3, 4], expected [96, 64]" in str(e.value) and "\n" not in str(e.value)


def test_broken_files_have_a_name(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])  # a download that broke off
    with pytest.raises(ValueError, match="model.safetensors: not readable"):
        Model.from_pretrained(checkpoint)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors"):
        Model.from_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("{")
    (checkpoint / "x.safetensors").touch()
    with pytest.raises(ValueError, match="config.json"):
        Model.from_pretrained(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        find_checkpoint(checkpoint)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        find_checkpoint("nowhere/to/be/found")


def test_hub_offline_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="offline") as e:
        find_checkpoint("nobody/no-such-model")
    assert "\n" not in str(e.value)


def test_eos_ids_from_generation_config(checkpoint):
    assert Model.from_pretrained(checkpoint).eos_ids == [5]
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Model.from_pretrained(checkpoint).eos_ids == [7, 9]


def test_a_killed_save_leaves_the_old_checkpoint(checkpoint, monkeypatch):
    before = (checkpoint / "model.safetensors").read_bytes()

    def die(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(model_py, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        Model.from_scratch(dict(SIZES, model_type="qwen2"), seed=4).save_pretrained(checkpoint)
    assert (checkpoint / "model.safetensors").read_bytes() == before
    shutil.rmtree(checkpoint)


def test_cuda_without_flash_attn_gets_pytorchs_packed_kernel():
    """In a fresh interpreter: a submodule that nobody imported once made every such run pad."""
    say = ("import sys, torch; sys.modules['flash_attn'] = None; import model; "
           "print(model.attention_kernel(torch.device('cuda'), torch.bfloat16))")
    out = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert out.stdout.strip() == "torch varlen", out.stderr


def test_a_run_directory_stands_for_its_newest_checkpoint(tmp_path):
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002/config.json").write_text("{}")
    (tmp_path / "step-000002/model.safetensors").touch()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "latest").write_text("step-000002")
    assert find_checkpoint(tmp_path) == tmp_path / "step-000002"
