"""rollout.py against a loop without cache, against the trainer's forward pass, and against the distribution itself."""
import math
import random

import pytest
import torch

import rollout
from model import Model, causal
from rollout import draw, generate, request_key, uniforms

EOS = 3
BASE = dict(vocab_size=29, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.25, eos_token_id=EOS, max_position_embeddings=256)
FAMILIES = {
    "qwen2": dict(BASE, model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(BASE, model_type="qwen3", head_dim=24, tie_word_embeddings=False),
    "llama3": dict(BASE, model_type="llama", num_key_value_heads=4, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
}


def build(family="qwen2", seed=0):
    return Model.from_scratch(FAMILIES[family], seed)


def some_prompts(count, longest=20, seed=0):
    r = random.Random(seed)
    return [[r.randrange(4, 29) for _ in range(r.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def reference(model, prompt, seed, index, limit, temperature, eos=(EOS,)):
    """The whole forward pass again for every token: no cache, no batch, no slots."""
    ids, u = list(prompt), uniforms([request_key(prompt, seed, index)], limit)[0]
    for t in range(limit):
        z = model(torch.tensor([ids]))[0, -1]
        if temperature == 0:
            token = z.argmax().item()
        else:
            cdf = (z / temperature).softmax(-1).cumsum(-1)
            token = int((cdf <= u[t] * cdf[-1]).sum())
        ids.append(token)
        if token in eos:
            break
    return ids


@torch.no_grad()
def trainer_logp(model, r, temperature=1.0):
    hidden = model.body(torch.tensor(r.tokens), *causal([len(r.tokens)], "cpu"))
    z = (model.logits(hidden) / temperature).log_softmax(-1)
    return z[r.prompt_len - 1:-1].gather(1, torch.tensor(r.tokens[r.prompt_len:])[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0, 1.0, 0.6])
def test_same_tokens_as_without_a_cache(family, temperature):
    model, prompts = build(family), some_prompts(6)
    got = generate(model, prompts, 2, 30, temperature, seed=7, slots=5)
    for i, p in enumerate(prompts):
        for j in range(2):
            assert got[2 * i + j].tokens == reference(model, p, 7, j, 30, temperature)


def test_every_slot_count_and_order_draws_the_same():
    """A response is a function of (weights, prompt, seed, sample index). Other batch shapes round differently, so a token
    may differ only where its uniform number lies within 1e-5 of a CDF edge; the count is printed and here it is 0."""
    model, prompts = build(), some_prompts(40)
    seeds = list(range(100, 140))
    all_at_once = generate(model, prompts, 4, 60, seed=seeds)
    tokens, differing = sum(len(r.logp) for r in all_at_once), 0
    assert tokens > 2000
    for slots, some in ((1, 5), (7, 20), (64, 40)):
        other = generate(model, prompts[:some], 4, 60, seed=seeds[:some], slots=slots)
        differing += sum(a.tokens != b.tokens for a, b in zip(all_at_once, other))
    order = list(range(40))
    random.Random(1).shuffle(order)
    shuffled = generate(model, [prompts[i] for i in order], 4, 60, seed=[seeds[i] for i in order])
    for k, i in enumerate(order):
        differing += sum(a.tokens != b.tokens for a, b in zip(all_at_once[4 * i:4 * i + 4], shuffled[4 * k:4 * k + 4]))
    print(f"{differing} responses differ over {tokens} tokens a run")
    assert differing == 0
    fewer = generate(model, prompts, 2, 60, seed=seeds)  # sample j does not depend on n
    assert [r.tokens for r in fewer] == [all_at_once[4 * i + j].tokens for i in range(40) for j in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_computes_the_recorded_logp(family):
    """Mean |difference| below 5e-6, worst below 5e-5, also at a temperature that is not 1."""
    model, gaps = build(family), []
    for temperature in (1.0, 0.7):
        for r in generate(model, some_prompts(10), 4, 80, temperature, seed=3):
            assert len(r.logp) == len(r.tokens) - r.prompt_len
            gaps.append((trainer_logp(model, r, temperature) - torch.tensor(r.logp)).abs())
    gaps = torch.cat(gaps)
    assert gaps.mean() < 5e-6 and gaps.max() < 5e-5


def test_the_recorded_logp_is_that_of_the_whole_distribution():
    """top-p and top-k choose among fewer tokens; the log-prob stays that which the trainer differentiates."""
    model = build()
    for kw in (dict(top_p=0.5), dict(top_k=2), dict(min_new_tokens=10)):
        for r in generate(model, some_prompts(5), 2, 20, seed=1, **kw):
            assert (trainer_logp(model, r) - torch.tensor(r.logp)).abs().max() < 5e-5


def test_distribution_is_softmax():
    """Chi-square of 40,000 first tokens against softmax on 29 words; the 1e-6 quantile at 28 degrees of freedom is 81."""
    model, n = build(), 40_000
    prompt = [5, 6, 7]
    counts = torch.bincount(torch.tensor([r.tokens[3] for r in generate(model, [prompt], n, 1, seed=11)]), minlength=29)
    with torch.no_grad():
        p = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 81


def test_uniforms_are_uniform_and_unrelated():
    u = uniforms([request_key([1, 2], s, 0) for s in range(200)], 500)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert len(u.unique()) > 0.98 * u.numel()
    correlation = torch.corrcoef(u)
    assert (correlation - torch.eye(200)).abs().max() < 0.25
    assert torch.equal(uniforms([42], 7), uniforms([7, 42], 100)[1:, :7])


def test_draw_edges():
    """u = 0 never gives a token of probability 0, the largest u never runs off the end, ties and tiny top-p keep one."""
    z = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for u, expected in ((0.0, 1), (0.49, 1), (0.51, 2), (1 - 2**-23, 2)):
        token, logp = draw(z, torch.tensor([u]))
        assert token.item() == expected and abs(logp.item() - math.log(0.5)) < 1e-6
    wide = torch.randn(1, 150_000, generator=torch.Generator().manual_seed(0))
    assert draw(wide, torch.tensor([1 - 2**-23]))[0].item() < 150_000
    z = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    us = torch.linspace(0, 1 - 2**-23, 500)
    seen = lambda **kw: set(draw(z.expand(500, 4), us, **kw)[0].tolist())
    assert seen() == {0, 1, 2, 3} == seen(top_p=1.0)
    assert seen(top_p=1e-9) == {0} and seen(top_k=1) == {0} and seen(temperature=0) == {0}
    p = z.softmax(-1)[0].tolist()  # 0.64 0.09 0.24 0.03
    assert seen(top_p=p[0] + p[2] - 1e-3) == {0, 2} and seen(top_p=p[0] + p[2] + 1e-3) == {0, 1, 2} and seen(top_k=2) == {0, 2}
    token, logp = draw(z, torch.tensor([0.5]), temperature=0)
    assert abs(logp.item() - math.log(p[0])) < 1e-6


def test_eos_at_once_never_and_several():
    model, prompt = build(), [4, 9, 13]
    first = generate(model, [prompt], 1, 5, 0)[0].tokens[3]
    at_once = generate(model, [prompt], 1, 5, 0, eos_ids=[first])[0]
    assert at_once.tokens == prompt + [first] and at_once.finished and len(at_once.logp) == 1  # the EOS is part of it
    never = generate(model, [prompt] * 3, 4, 25, eos_ids=[])
    assert all(len(r.logp) == 25 and not r.finished for r in never)
    any_of = generate(model, [prompt], 64, 25, seed=2, eos_ids=[3, 8, 11])
    for r in any_of:
        body, last = r.tokens[3:-1], r.tokens[-1]
        assert not {3, 8, 11} & set(body) and r.finished == (last in (3, 8, 11)) and (r.finished or len(r.logp) == 25)
    assert {r.tokens[-1] for r in any_of if r.finished} == {3, 8, 11}
    own = generate(model, [prompt], 64, 25, seed=2)  # None: the model's own
    assert any(r.finished for r in own) and all(r.tokens[-1] == EOS for r in own if r.finished)


def test_eos_exactly_at_the_limit_counts_as_finished():
    model = build()
    r = next(r for r in generate(model, some_prompts(20), 4, 60, seed=5) if r.finished and len(r.logp) > 2)
    again = next(x for x in generate(model, some_prompts(20), 4, len(r.logp), seed=5) if x.tokens == r.tokens)
    assert again.finished


def test_min_new_tokens():
    model = build()
    lengths = [len(r.logp) for r in generate(model, some_prompts(10), 8, 40, seed=1, min_new_tokens=6)]
    assert min(lengths) >= 7 and max(lengths) < 41  # six tokens without EOS, then it may come
    assert min(len(r.logp) for r in generate(model, some_prompts(10), 8, 40, seed=1)) < 6


def test_stop_strings():
    """A response ends with the token that completes a stop string, as the text of the same response without it says."""
    import data
    tokenizer = data.char_tokenizer("add")
    model = Model.from_scratch(dict(BASE, model_type="qwen2", vocab_size=len(tokenizer)), seed=1)
    prompts = [tokenizer.encode("12+3")]
    free = generate(model, prompts, 64, 40, seed=4, eos_ids=[])
    stopped = generate(model, prompts, 64, 40, seed=4, eos_ids=[], stop=("1+", "9"), tokenizer=tokenizer, slots=9)
    hits = 0
    for a, b in zip(free, stopped):
        text = tokenizer.decode(a.tokens[4:])
        ends = [text.find(s) + len(s) for s in ("1+", "9") if s in text]
        end = min(ends) if ends else 40
        assert tokenizer.decode(b.tokens[4:]) == text[:end] and b.finished == bool(ends)
        hits += bool(ends)
    assert 10 < hits < 64


def test_one_prompt_one_token_and_many_samples():
    model = build()
    assert generate(model, [], 3) == []
    assert len(generate(model, [[5]], 1, 1)[0].tokens) == 2
    many = generate(model, [[5], [6, 7]], 64, 8, seed=1, slots=10)
    assert len(many) == 128 and all(r.tokens[0] == 5 for r in many[:64]) and all(r.tokens[:2] == [6, 7] for r in many[64:])
    assert len({tuple(r.tokens) for r in many[:64]}) > 30  # samples differ
    twins = generate(model, [[5], [5]], 2, 20, seed=[1, 2])
    assert twins[0].tokens != twins[2].tokens


def test_memory_is_what_was_asked_for(monkeypatch):
    """The cache is allocated once, within kv_tokens; more requests wait; one that cannot fit is refused before any work."""
    model, made = build(), []
    real = rollout.Cache.__init__
    monkeypatch.setattr(rollout.Cache, "__init__", lambda self, m, slots, length: (made.append((slots, length)),
                                                                                  real(self, m, slots, length))[1])
    got = generate(model, some_prompts(12, 10), 3, 20, seed=1, kv_tokens=100)
    assert len(got) == 36 and len(made) == 1 and made[0][0] * made[0][1] <= 100
    assert [r.tokens for r in got] == [r.tokens for r in generate(model, some_prompts(12, 10), 3, 20, seed=1)]
    monkeypatch.setattr(model, "body", None)  # any work would raise
    with pytest.raises(ValueError, match="needs 45 cache tokens, the budget is 44"):
        generate(model, [[5] * 25], 1, 20, kv_tokens=44)


@pytest.mark.parametrize("call, named", [
    (dict(prompts=[[]]), "prompt 0 is empty"), (dict(prompts=[[4], [29]]), "prompt 1"), (dict(n=0), "n=0"),
    (dict(max_new_tokens=0), "max_new_tokens=0"), (dict(top_p=0.0), "top_p"), (dict(temperature=-1.0), "temperature"),
    (dict(seed=[1, 2]), "2 seeds for 1 prompts"), (dict(stop=("x",)), "tokenizer")])
def test_bad_requests_name_the_value(call, named):
    with pytest.raises(ValueError, match=named):
        generate(build(), **{"prompts": [[4]], **call})


def test_interrupt_leaves_a_clean_state(monkeypatch):
    """Ctrl-C in the middle: nothing is held, the next call gives what it would have given."""
    model, prompts, calls = build(), some_prompts(5), []
    expected = generate(model, prompts, 2, 20, seed=1)
    real = model.body

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(model, "body", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts, 2, 20, seed=1, progress=True)
    monkeypatch.undo()
    assert [r.tokens for r in generate(model, prompts, 2, 20, seed=1)] == [r.tokens for r in expected]


def test_a_recycled_slot_forgets_its_last_sequence():
    """A short prompt in a slot that held a long one: keys beyond its own position must not be seen."""
    model = build()
    long, short = some_prompts(1, 20)[0] * 2, [7]
    alone = generate(model, [short], 1, 30, seed=9)[0].tokens
    assert generate(model, [long, short], 1, 30, seed=9, slots=1)[1].tokens == alone


def test_quick_look_prints_the_sample(tmp_path):
    import subprocess
    import sys
    import data
    tokenizer = data.char_tokenizer("chainsum")
    model = Model.from_scratch(dict(BASE, model_type="qwen2", vocab_size=len(tokenizer)), seed=1)
    tokenizer.save_pretrained(tmp_path / "tok")
    model.source = tmp_path / "tok"
    model.save_pretrained(tmp_path / "ckpt")
    say = lambda *a: subprocess.run([sys.executable, "rollout.py", *a], capture_output=True, text=True)
    out = say(str(tmp_path / "ckpt"), "123456=", "--max_new_tokens", "12", "--seed", "3")
    expected = generate(Model.from_pretrained(tmp_path / "ckpt"), [tokenizer.encode("123456=")], 1, 12, seed=3)[0]
    assert out.stdout == tokenizer.decode(expected.tokens[7:]) + "\n"
    bad = say(str(tmp_path / "nowhere"), "1")
    assert bad.returncode != 0 and bad.stderr.strip().count("\n") == 0 and "no such directory" in bad.stderr


# ---- flash-attn's call sites, with a plain-torch stand-in of its documented signatures and semantics ----

def fake_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False):
    """flash_attn_varlen_func: (total,H,d) with int32 borders, GQA by repeating KV heads, scale d^-0.5."""
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q[-1] == len(q) and causal and dropout_p == 0
    assert max_seqlen_q == (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max()
    out, repeat = torch.empty_like(q), q.shape[1] // k.shape[1]
    for a, b in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:]):
        x, y, z = q[a:b].transpose(0, 1), k[a:b].repeat_interleave(repeat, 1), v[a:b].repeat_interleave(repeat, 1)
        s = x @ y.transpose(0, 1).transpose(1, 2) * q.shape[-1] ** -0.5
        s = s.masked_fill(torch.ones(b - a, b - a, dtype=torch.bool).triu(1), -torch.inf)
        out[a:b] = (s.softmax(-1) @ z.transpose(0, 1)).transpose(0, 1)
    return out


def fake_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
                      cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False):
    """flash_attn_with_kvcache: appends k, v at cache_seqlens in place, then attends to cache_seqlens + 1 places."""
    assert cache_seqlens.dtype == torch.int32 and q.shape[1] == 1 and k_cache.shape[0] == len(q)
    out, repeat = torch.empty_like(q), q.shape[2] // k.shape[2]
    for b, n in enumerate(cache_seqlens.tolist()):
        k_cache[b, n], v_cache[b, n] = k[b, 0], v[b, 0]
        K, V = (c[b, :n + 1].repeat_interleave(repeat, 1).transpose(0, 1) for c in (k_cache, v_cache))
        s = q[b].transpose(0, 1) @ K.transpose(1, 2) * q.shape[-1] ** -0.5
        out[b] = (s.softmax(-1) @ V).transpose(0, 1)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_flash_attn_paths_give_the_same(family, monkeypatch):
    """Same samples, same packed log-probs and gradients, through the code that calls flash-attn on a GPU."""
    import model as model_py
    model, prompts = build(family), some_prompts(12)
    lengths, ids = [9, 1, 20], torch.randint(0, 29, (30,), generator=torch.Generator().manual_seed(0))

    def everything():
        model.zero_grad()
        logp = model(ids, lengths, ids.roll(-1))[0]
        logp.sum().backward()
        return (generate(model, prompts, 3, 40, seed=2, slots=7), logp.detach(), [p.grad.clone() for p in model.parameters()])
    plain = everything()
    monkeypatch.setattr(model_py, "attention_kernel", lambda *_: "flash-attn")
    monkeypatch.setattr(rollout, "attention_kernel", lambda *_: "flash-attn")
    monkeypatch.setattr(model_py, "flash_attn_varlen_func", fake_varlen)
    monkeypatch.setattr(rollout, "flash_attn_with_kvcache", fake_with_kvcache)
    flash = everything()
    assert [r.tokens for r in plain[0]] == [r.tokens for r in flash[0]]
    assert torch.allclose(plain[1], flash[1], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain[2], flash[2]))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_gpu_kernels_against_float32(heads):
    """Whatever packed kernel this machine chose, forward and backward, against SDPA in float32 on the CPU."""
    H, K = heads
    lengths = [70, 1, 33, 128]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), n, 64, generator=g) for n in (H, K, K))
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        x = [t.to(device, dtype).requires_grad_() for t in (q, k, v)]
        o = causal(lengths, device, dtype)[1](0, *x)
        o.float().square().sum().backward()
        results.append([t.detach().float().cpu() for t in (o, *(t.grad for t in x))])
    for a, b in zip(*results):
        assert (a - b).abs().max() < 0.02 * a.abs().max()
