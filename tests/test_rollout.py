"""rollout.py against a loop without cache, against the trainer's forward pass, and against the distribution itself."""
import math
import random
import signal

import pytest
import torch

from torch.utils._python_dispatch import TorchDispatchMode

import rollout
from model import Model, causal, exact_logits
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
    z = (exact_logits(hidden, model.head_weight) / temperature).log_softmax(-1)
    return z[r.prompt_len - 1:-1].gather(1, torch.tensor(r.tokens[r.prompt_len:])[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0, 1.0, 0.6])
def test_same_tokens_as_without_a_cache(family, temperature):
    model, prompts = build(family), some_prompts(6)
    got = generate(model, prompts, 2, 30, temperature, seed=7, slots=5)
    for i, p in enumerate(prompts):
        for j in range(2):
            assert got[2 * i + j].tokens == reference(model, p, 7, j, 30, temperature)


@torch.no_grad()
def at_an_edge(model, a, b, seed, index):
    """Whether the first token in which a and b differ was drawn within 1e-5 of a CDF edge: rounding decided."""
    t = next((t for t, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), None)
    if t is None:
        return False
    u = uniforms([request_key(a.tokens[:a.prompt_len], seed, index)], t + 1)[0, t - a.prompt_len]
    cdf = model(torch.tensor([a.tokens[:t]]))[0, -1].double().softmax(-1).cumsum(-1)
    return (cdf - u).abs().min() < 1e-5


def test_a_prompt_of_one_token_joins_a_longer_one_that_waits():
    model, prompts = build(), [[5, 6, 7], [4], [9]]
    got = generate(model, prompts, 3, 4, seed=2, slots=2, eos_ids=[])
    assert [r.tokens for r in got] == [r.tokens for r in generate(model, prompts, 3, 4, seed=2, eos_ids=[])]


@pytest.mark.parametrize("vocab", [7, 2000])
def test_probabilities_that_are_nan_draw_some_token_of_the_vocabulary(vocab):
    """A run that diverged must reach the update, which counts it, skips it and saves its data."""
    logits = torch.randn(3, vocab)
    logits[1] = torch.nan
    logits[2, 0] = torch.inf
    token, _ = draw(logits, torch.tensor([0.5, 0.0, 0.9999]))
    assert all(0 <= t < vocab for t in token.tolist())


def test_every_slot_count_and_order_draws_the_same():
    """A response is a function of (weights, prompt, seed, sample index). Other batch shapes round differently, so a response
    may differ only where its uniform number lies within 1e-5 of a CDF edge; the count is printed (0 of 420 here)."""
    model, prompts = build(), some_prompts(40)
    seeds = list(range(100, 140))
    all_at_once = generate(model, prompts, 4, 60, seed=seeds)
    tokens, pairs = sum(len(r.logp) for r in all_at_once), []
    assert tokens > 2000
    for slots, some in ((1, 5), (7, 20), (64, 40)):
        other = generate(model, prompts[:some], 4, 60, seed=seeds[:some], slots=slots)
        pairs += [(a, b, k) for k, (a, b) in enumerate(zip(all_at_once, other))]
    order = list(range(40))
    random.Random(1).shuffle(order)
    shuffled = generate(model, [prompts[i] for i in order], 4, 60, seed=[seeds[i] for i in order])
    for k, i in enumerate(order):
        pairs += [(all_at_once[4 * i + j], shuffled[4 * k + j], 4 * i + j) for j in range(4)]
    differing = [(a, b, k) for a, b, k in pairs if a.tokens != b.tokens]
    print(f"{len(differing)} of {len(pairs)} responses differ, {tokens} tokens a run")
    assert len(differing) <= 2 and all(at_an_edge(model, a, b, seeds[k // 4], k % 4) for a, b, k in differing)
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


def test_a_large_vocabulary_is_searched_by_blocks():
    """The same token as a running sum over all of it, in float64, up to rounding at an edge; never one of probability 0."""
    g = torch.Generator().manual_seed(0)
    for V in (1025, 4096, 5000):
        p = torch.randn(300, V, generator=g).mul(4).softmax(-1)
        p[:, ::3] = 0
        p[:50, 100:900] = 0  # whole blocks
        p[50:80, :-1] = 0  # all of it in the last token
        p[50:80, -1] = 0.5
        u = torch.rand(300, 1, generator=g)
        u[::10], u[1::10] = 0, 1 - 2**-23
        token = rollout.inverse_cdf(p, u)
        assert (p.gather(1, token) > 0).all()
        blocks = torch.nn.functional.pad(p[100:], (0, -V % 64)).view(200, -1, 64).clone()
        blocks[:, :, 0] = 0  # at the border of two blocks rounding must not step into the next one's first token
        last = blocks.sum(-1).cumsum(-1)
        q = blocks.flatten(1)[:, :V]
        for b in range(last.shape[1] - 1):
            assert (q.gather(1, rollout.inverse_cdf(q, (last[:, b] / last[:, -1]).nextafter(torch.tensor(0.0))[:, None])) > 0).all()
        cdf = p.double().cumsum(-1)
        x = u.double() * cdf[:, -1:]
        right = cdf.gather(1, token) + 1e-6 > x
        assert (right & (cdf.gather(1, token) - p.gather(1, token) <= x + 1e-6)).all()
        assert (token == torch.searchsorted(cdf, x, right=True).clamp(max=V - 1)).float().mean() > 0.97


def test_a_banned_token_that_has_all_the_probability():
    """The rest has probability 0 in float32; it is drawn from all the same, with its true log-prob."""
    z = torch.tensor([[300.0, 1.0, 1.0]])
    banned = torch.tensor([[True, False, False]])
    token, logp = draw(z, torch.tensor([0.7]), banned=banned)
    assert token.item() == 2 and logp.item() == -299


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
    assert len(generate(model, [[5] * 24, [5]], 2, 20, eos_ids=[], kv_tokens=44)[1].logp) == 20  # fits to the last token
    monkeypatch.setattr(model, "body", None)  # any work would raise
    with pytest.raises(ValueError, match="needs 45 cache tokens, the budget is 44"):
        generate(model, [[5] * 25], 1, 20, kv_tokens=44)


@pytest.mark.parametrize("call, named", [
    (dict(prompts=[[]]), "prompt 0 is empty"), (dict(prompts=[[4], [29]]), "prompt 1"), (dict(n=0), "n=0"),
    (dict(max_new_tokens=0), "max_new_tokens=0"), (dict(slots=0), "slots=0"), (dict(top_k=-1), "top_k=-1"), (dict(top_p=0.0), "top_p"), (dict(temperature=-1.0), "temperature"),
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
    assert model.fused is None  # no copy of the weights is left behind
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(1.5), model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    changed = generate(model, prompts, 2, 20, seed=1)
    assert [r.tokens for r in changed] != [r.tokens for r in expected]  # the next call sees weights as they are then
    assert (trainer_logp(model, changed[0]) - torch.tensor(changed[0].logp)).abs().max() < 5e-5
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.div_(1.5), model.layers[0].self_attn.k_proj.weight.div_(1.5)
    assert [r.tokens for r in generate(model, prompts, 2, 20, seed=1)] == [r.tokens for r in expected]


def test_a_recycled_slot_forgets_its_last_sequence():
    """A short prompt in a slot that held a long one, while its neighbour is still far ahead: keys beyond its own position
    must not be seen."""
    model, prompts = build(), [p * 3 for p in some_prompts(6)] + [[7], [8], [9]]
    alone = [generate(model, [p], 1, 60, seed=9)[0].tokens for p in prompts]
    assert [r.tokens for r in generate(model, prompts, 1, 60, seed=9, slots=2)] == alone


def test_quick_look_prints_the_sample(tmp_path, monkeypatch):
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
    for bad, named in ((("nowhere", "1"), "no such directory"), (("ckpt", "12=", "--kv-tokens", "20"), "the budget is 20"),
                       (("ckpt", "12=", "--temperature", "-1"), "temperature=-1")):
        monkeypatch.setattr(sys, "argv", ["rollout.py", str(tmp_path / bad[0]), *bad[1:]])
        with pytest.raises(SystemExit) as e:
            rollout.main()
        message = str(e.value.code)
        assert message.startswith("rollout.py: ") and named in message and "\n" not in message
    # streaming, and Ctrl-C: the first characters come while it still samples, then it ends without a traceback
    long = subprocess.Popen([sys.executable, "rollout.py", str(tmp_path / "ckpt"), "1=", "--max_new_tokens", "200000",
                             "--kv-tokens", "300000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert long.stdout.read(3)
        long.send_signal(signal.SIGINT)
        _, err = long.communicate(timeout=60)
    finally:
        long.kill()
    assert long.returncode == 130 and not err


# ---- The captured step, with a stand-in for CUDA graphs ----

class Recorded(TorchDispatchMode):
    """A graph as CUDA records it: every kernel with the very tensors and numbers of that one run. replay() runs them again
    on the same memory, so whatever a step takes from Python between replays is frozen."""

    def __init__(self, step):
        super().__init__()
        self.ops = []
        with self:
            step()
        self.just_run = True  # CUDA records without running, this ran: the first replay is that run

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.ops.append((op, args, kwargs or {}, result))
        return result

    def replay(self):
        if not self.just_run:
            for op, args, kwargs, result in self.ops:
                for old, new in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (result, op(*args, **kwargs)))):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # neither in place nor a view
                        old.copy_(new)
        self.just_run = False


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_step_draws_the_same(family, monkeypatch):
    """As on CUDA: bucketed row counts, each shape captured at its fourth step, replays that see only static buffers."""
    model, prompts, graphs = build(family), some_prompts(30), []
    for kw in (dict(), dict(slots=7), dict(top_p=0.9, min_new_tokens=3), dict(temperature=0, top_k=3)):
        expected = generate(model, prompts, 3, 60, seed=2, **kw)
        with monkeypatch.context() as m:
            real = rollout.Decoder.__init__
            m.setattr(rollout.Decoder, "__init__", lambda self, *a: (real(self, *a), setattr(self, "pool", "pool"))[0])
            m.setattr(rollout, "capture", lambda step, pool: (graphs.append(Recorded(step)), graphs[-1])[1])
            assert [r.tokens for r in generate(model, prompts, 3, 60, seed=2, **kw)] == [r.tokens for r in expected]
    assert len(graphs) > 8


def test_a_step_never_waits_for_the_host_and_has_fixed_shapes(monkeypatch):
    """What a CUDA graph cannot hold: reads of a value by the host, and results whose size depends on values."""
    seen = set()
    monkeypatch.setattr(rollout.Decoder, "run", lambda self, n, longest, slots: seen.update(
        op[0].overloadpacket.__name__ for op in Recorded(lambda: self.step(n, longest)).ops))
    for kw in (dict(), dict(top_p=0.9, top_k=4, min_new_tokens=3), dict(temperature=0)):
        with pytest.raises(RuntimeError, match="enough"):
            steps = iter(range(5))
            real = rollout.Decoder.run
            monkeypatch.setattr(rollout.Decoder, "run", lambda *a: next(steps, None) is None and enough() or real(*a))
            with torch.no_grad():  # in inference mode composite operations would hide what they are made of
                generate.__wrapped__(build(), some_prompts(6), 2, 30, **kw)
    assert {"mm", "baddbmm", "_softmax", "put_"} <= seen
    assert not seen & {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal"}


def enough():
    raise RuntimeError("enough")


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


def fake_torch_flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, seqused_k):
    """aten._flash_attention_forward: packed (total,H,d), sequence b's keys start at cu_k[b], seqused_k[b] of them count."""
    assert cu_q.dtype == cu_k.dtype == seqused_k.dtype == torch.int32 and max_q == 1 and not is_causal and dropout_p == 0
    assert k.is_contiguous() and len(cu_q) == len(cu_k) == len(q) + 1 == len(seqused_k) + 1 and cu_k[-1] == len(k)
    assert max_k == cu_k[1] and seqused_k.max() <= max_k
    out, repeat = torch.empty_like(q), q.shape[1] // k.shape[1]
    for b, n in enumerate(seqused_k.tolist()):
        K, V = (x[cu_k[b]:cu_k[b] + n].repeat_interleave(repeat, 1).transpose(0, 1) for x in (k, v))
        s = q[b][:, None] @ K.transpose(1, 2) * q.shape[-1] ** -0.5
        out[b] = (s.softmax(-1) @ V)[:, 0]
    return out, None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_path_through_pytorchs_own_flash_kernel_gives_the_same(family, monkeypatch):
    model, prompts = build(family), some_prompts(12)
    plain = generate(model, prompts, 3, 40, seed=2, slots=7)
    monkeypatch.setattr(rollout, "decode_kernel", lambda *_: "torch flash")
    monkeypatch.setattr(rollout, "torch_flash", fake_torch_flash)
    assert [r.tokens for r in generate(model, prompts, 3, 40, seed=2, slots=7)] == [r.tokens for r in plain]


@pytest.mark.gpu
def test_gpu_graphs_draw_what_eager_steps_draw(monkeypatch):
    """bfloat16 on CUDA, same kernels and shapes with and without capture: the same tokens."""
    model, prompts = build().to("cuda", torch.bfloat16), some_prompts(40)
    graphs = generate(model, prompts, 4, 100, seed=2)
    monkeypatch.setattr(rollout, "GRAPH_AFTER", 10**9)
    assert [r.tokens for r in generate(model, prompts, 4, 100, seed=2)] == [r.tokens for r in graphs]


@pytest.mark.gpu
def test_gpu_decoding_kernel_against_float32():
    """Whatever attends to the cache on this machine: recorded log-probs against the trainer's in float32 on the CPU."""
    model = build("qwen2")
    on_gpu, gaps = build("qwen2").to("cuda", torch.bfloat16), []
    for r in generate(on_gpu, some_prompts(20), 4, 100, seed=3):
        gaps.append((trainer_logp(model, r) - torch.tensor(r.logp)).abs())
    assert torch.cat(gaps).mean() < 0.05


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
