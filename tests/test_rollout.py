"""rollout.py against a loop without cache, against the trainer's forward pass, and against the
distribution itself."""
import gc
import math
import random
import sys
import time
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import data
import rollout
from model import Model, pack
from rollout import draw, generate, uniforms

EOS = 3
V = 29
BASE = dict(vocab_size=V, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.25,
            eos_token_id=EOS, max_position_embeddings=256)
ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16)
FAMILIES = {
    "qwen2": dict(BASE, model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(BASE, model_type="qwen3", head_dim=24, tie_word_embeddings=False),
    "llama3": dict(BASE, model_type="llama", num_key_value_heads=4, rope_scaling=ROPE),
}
LARGEST = 1 - 2**-23  # of the uniform numbers
every_family = pytest.mark.parametrize("family", FAMILIES)


def build(family="qwen2", seed=0, **more):
    return Model.from_scratch(FAMILIES[family] | more, seed)


def some_prompts(count, longest=20, seed=0):
    rng = random.Random(seed)
    lengths = [rng.randint(1, longest) for _ in range(count)]
    return [rng.choices(range(4, V), k=length) for length in lengths]


def tokens_of(rollouts):
    return [r.tokens for r in rollouts]


@torch.no_grad()
def reference(model, prompt, seed, sample, limit, temperature):
    """The whole forward pass again for every token: no cache, no batch, no slots."""
    ids = list(prompt)
    for u in uniforms(prompt, seed, sample, limit):
        z = model(torch.tensor([ids]))[0, -1]
        if temperature == 0:
            token = z.argmax().item()
        else:
            cdf = (z / temperature).softmax(-1).cumsum(-1)
            token = int((cdf <= u * cdf[-1]).sum())
        ids.append(token)
        if token == EOS:
            break
    return ids


def gaps(model, rollouts, temperature=1.0):
    """|log p of the trainer - log p of the sampler| of every response token."""
    packed = pack([r.tokens for r in rollouts], [r.prompt_len for r in rollouts], "cpu")
    with torch.no_grad():
        trainer = model(*packed, temperature)[0]
    recorded = [logp for r in rollouts for logp in r.logp]
    return (trainer - torch.tensor(recorded)).abs()


# ---- What is sampled ----


@every_family
@pytest.mark.parametrize("temperature", [0, 1.0, 0.6])
def test_same_tokens_as_without_a_cache(family, temperature):
    model, prompts = build(family), some_prompts(6)
    got = generate(model, prompts, 2, 30, temperature, seed=7, slots=5)
    expected = [reference(model, p, 7, j, 30, temperature) for p in prompts for j in range(2)]
    assert tokens_of(got) == expected


@torch.no_grad()
def at_an_edge(model, a, b, seed, sample):
    """Whether the first token in which a and b differ was drawn within 1e-5 of a CDF edge."""
    t = 0
    while a.tokens[t] == b.tokens[t]:
        t += 1
    u = uniforms(a.tokens[:a.prompt_len], seed, sample, a.length)[t - a.prompt_len]
    z = model(torch.tensor([a.tokens[:t]]))[0, -1].double()
    return (z.softmax(-1).cumsum(-1) - u).abs().min() < 1e-5


def test_every_slot_count_and_order_draws_the_same(monkeypatch):
    """A response is a function of (weights, prompt, seed, sample index). Other batch shapes round
    differently: a response may differ only where its number lies within 1e-5 of a CDF edge (0 of
    500 here). Memory that was never written holds nan, so that none of it is ever looked at."""
    fresh = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty",
                        lambda *size, **kw: fresh(*size, **kw).fill_(math.nan))
    model, prompts = build(), some_prompts(40)

    def sampled(which, n=4, **how):
        """{(prompt, sample): response}."""
        some = [prompts[i] for i in which]
        seeds = [100 + i for i in which]
        rollouts = generate(model, some, n, 40, seed=seeds, **how)
        keys = [(i, j) for i in which for j in range(n)]
        return dict(zip(keys, rollouts))
    whole = sampled(range(40))
    assert sum(r.length for r in whole.values()) > 2000
    shuffled = random.Random(1).sample(range(40), 40)
    others = [
        sampled(range(5), slots=1),
        sampled(range(20), slots=7),
        sampled(range(40), slots=64),
        sampled(range(40), n=2),
        sampled(shuffled),
    ]
    differing = []
    for other in others:
        for (i, j), r in other.items():
            if r.tokens != whole[i, j].tokens:
                differing.append((i, j, r))
    print(f"{len(differing)} of {sum(map(len, others))} responses differ")
    assert len(differing) <= 2
    for i, j, r in differing:
        assert at_an_edge(model, whole[i, j], r, 100 + i, j)


def test_every_prompt_has_its_own_limit():
    """A shorter one cuts a response and changes none of its tokens, whoever shares the batch."""
    model, prompts, limits = build(), some_prompts(6), [1, 30, 7, 30, 2, 19]
    long = generate(model, prompts, 2, 30, seed=5, eos_ids=[])
    short = generate(model, prompts, 2, limits, seed=5, eos_ids=[], slots=5)
    for i, (a, b) in enumerate(zip(long, short)):
        assert b.length == limits[i // 2]
        assert a.tokens[:len(b.tokens)] == b.tokens


def test_a_recycled_slot_forgets_its_last_sequence():
    """A short prompt in a slot that held a long one, while its neighbour is still far ahead: keys
    beyond its own position must not be seen."""
    model = build()
    prompts = [p * 3 for p in some_prompts(6)] + [[7], [8], [9]]
    alone = [generate(model, [p], 1, 60, seed=9)[0].tokens for p in prompts]
    assert tokens_of(generate(model, prompts, 1, 60, seed=9, slots=2)) == alone


@every_family
def test_the_trainer_computes_the_recorded_logp(family):
    """Mean |difference| below 5e-6, worst below 5e-5, also at a temperature that is not 1."""
    model = build(family)
    for temperature in (1.0, 0.7):
        rollouts = generate(model, some_prompts(10), 4, 80, temperature, seed=3)
        assert all(r.length == len(r.logp) for r in rollouts)
        gap = gaps(model, rollouts, temperature)
        assert len(gap) > 500
        assert gap.mean() < 5e-6 and gap.max() < 5e-5


def test_the_recorded_logp_is_that_of_the_whole_distribution():
    """top-p chooses among fewer tokens; the log-prob stays that which the trainer differentiates.
    Greedy decoding records that of temperature 1."""
    model = build()
    for how in (dict(top_p=0.5), dict(temperature=0)):
        rollouts = generate(model, some_prompts(5), 2, 20, seed=1, **how)
        assert gaps(model, rollouts).max() < 5e-5


def test_distribution_is_softmax():
    """Chi-square of 20,000 first tokens against softmax on 29 words; the 1e-6 quantile at 28
    degrees of freedom is 81."""
    model, n, prompt = build(), 20_000, [5, 6, 7]
    first = [r.tokens[3] for r in generate(model, [prompt], n, 1, seed=11)]
    counts = torch.bincount(torch.tensor(first), minlength=V)
    with torch.no_grad():
        p = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 81


def test_uniforms_are_uniform_and_unrelated():
    rows = [uniforms([1, 2], seed, 0, 500) for seed in range(200)]
    u = torch.stack(rows)
    assert u.min() >= 0 and u.max() <= LARGEST
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert (torch.corrcoef(u) - torch.eye(200)).abs().max() < 0.25
    same = uniforms([1, 2], 7, 0, 20)
    assert torch.equal(same, u[7, :20])  # does not depend on how many are drawn
    assert not torch.equal(same, uniforms([1, 3], 7, 0, 20))
    assert not torch.equal(same, uniforms([1, 2], 8, 0, 20))
    assert not torch.equal(same, uniforms([1, 2], 7, 1, 20))


# ---- One token ----


def test_draw_edges():
    """u = 0 never gives a token of probability 0, and the largest u never runs off the end."""
    z = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for u, expected in [
        (0.0, 1),
        (0.49, 1),
        (0.51, 2),
        (LARGEST, 2),
    ]:
        token, logp = draw(z, torch.tensor([u]))
        assert token.item() == expected
        assert abs(logp.item() - math.log(0.5)) < 1e-6
    wide = torch.randn(50, 150_000, generator=torch.Generator().manual_seed(0))
    wide[:, 100_000:] = -math.inf
    token, _ = draw(wide, torch.full((50,), LARGEST))
    assert token.max() < 100_000


def test_the_coldest_temperature_is_sampled():
    coldest = generate(build(), [[5, 6]], 2, 10, rollout.COLDEST, seed=1)
    assert tokens_of(coldest) == tokens_of(generate(build(), [[5, 6]], 2, 10, 0))


def test_draw_keeps_the_likeliest():
    """top-p is the smallest set that holds so much, at least one token; temperature 0 is it."""
    z = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    p = z.softmax(-1)[0].tolist()  # 0.64 0.09 0.24 0.03
    u = torch.linspace(0, LARGEST, 500)

    def seen(**how):
        return set(draw(z.expand(500, 4), u, **how)[0].tolist())
    assert seen() == {0, 1, 2, 3} == seen(top_p=1.0)
    assert seen(top_p=1e-9) == {0} == seen(temperature=0)
    assert seen(top_p=p[0] + p[2] - 1e-3) == {0, 2}
    assert seen(top_p=p[0] + p[2] + 1e-3) == {0, 1, 2}
    assert seen(temperature=rollout.COLDEST) == {0}
    with pytest.raises(AssertionError, match="1e-40"):
        seen(temperature=1e-40)
    shares = draw(z.expand(500, 4), u, top_p=0.8)[0].bincount() / 500
    assert abs(shares[0] - p[0] / (p[0] + p[2])) < 0.01  # the rest is scaled up


@pytest.mark.parametrize("vocab", [7, 2000])
def test_probabilities_that_are_nan_draw_some_token_of_the_vocabulary(vocab):
    """A run that diverged must reach the update, which counts it, skips it and saves its data."""
    logits = torch.randn(3, vocab)
    logits[1] = torch.nan
    logits[2, 0] = torch.inf
    token, _ = draw(logits, torch.tensor([0.5, 0.0, 0.9999]))
    assert all(0 <= t < vocab for t in token.tolist())


# ---- How a response ends ----


def test_eos_at_once_never_and_several():
    model, prompt = build(), [4, 9, 13]
    first = generate(model, [prompt], 1, 5, 0)[0].tokens[3]
    at_once = generate(model, [prompt], 1, 5, 0, eos_ids=[first])[0]
    assert at_once.tokens == prompt + [first]  # the EOS is part of it
    assert at_once.finished
    never = generate(model, [prompt] * 3, 4, 25, eos_ids=[])
    assert all(r.length == 25 and not r.finished for r in never)
    ends = {3, 8, 11}
    unknown = [None, V, -1, 10**9]  # as configs of real checkpoints have them
    rollouts = generate(model, [prompt], 64, 25, seed=2, eos_ids=[*ends, *unknown])
    for r in rollouts:
        assert not ends & set(r.tokens[3:-1])
        assert r.finished == (r.tokens[-1] in ends)
        assert r.finished or r.length == 25
    assert {r.tokens[-1] for r in rollouts if r.finished} == ends
    own = [r for r in generate(model, [prompt], 64, 25, seed=2) if r.finished]  # the model's
    assert own and all(r.tokens[-1] == EOS for r in own)


def test_eos_exactly_at_the_limit_counts_as_finished():
    model, prompts = build(), some_prompts(20)
    ended = [r for r in generate(model, prompts, 4, 60, seed=5) if r.finished]
    length = max(r.length for r in ended)
    again = generate(model, prompts, 4, length, seed=5)
    assert max(r.length for r in again if r.finished) == length


def test_stop_strings():
    """A response ends with the token that completes a stop string, as the text of the same
    response without it says; one that spans several tokens, and one that is over already."""
    tokenizer = data.char_tokenizer("chainsum")
    model = build(seed=1, vocab_size=len(tokenizer))
    prompts = [tokenizer.encode("12")]
    free = generate(model, prompts, 64, 40, seed=4)
    stop = ("123", "9>", "7")
    stopped = generate(model, prompts, 64, 40, seed=4, stop=stop, tokenizer=tokenizer, slots=9)
    lengths = set()
    for a, b in zip(free, stopped):
        text = tokenizer.decode(a.tokens[2:])
        ends = [text.find(s) + len(s) for s in stop if s in text]
        assert tokenizer.decode(b.tokens[2:]) == text[:min(ends, default=len(text))]
        assert b.finished == (a.finished or bool(ends))
        if ends:
            lengths.add(b.length)
    assert len(lengths) > 8 and max(lengths) > 20


def test_one_prompt_one_token_and_many_samples():
    model = build()
    assert generate(model, [], 3) == []
    assert generate(model, [[5]], 1, 1)[0].length == 1
    prompts = [[5], [6, 7]]
    many = generate(model, prompts, 64, 8, seed=1, slots=10)
    assert all(r.tokens[:r.prompt_len] == prompts[k // 64] for k, r in enumerate(many))
    assert len({tuple(r.tokens) for r in many[:64]}) > 30  # samples differ
    twins = generate(model, [[5], [5]], 2, 20, seed=[1, 2])
    assert twins[0].tokens != twins[2].tokens


# ---- Memory and work ----


def test_a_prompt_is_computed_once(monkeypatch):
    """Its samples copy it, also those that are admitted much later, when other prompts want the
    slot; and prompts are packed up to PREFILL_TOKENS."""
    model, seen = build(), []
    prompts = some_prompts(9) + [[4]]
    prefill = rollout.Decoder.prefill

    def noted(self, new):
        seen.append([prompt for _, prompt in new])
        return prefill(self, new)
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 45)
    monkeypatch.setattr(rollout.Decoder, "prefill", noted)
    expected = tokens_of(generate(model, prompts, 5, 12, seed=2))
    assert max(map(len, seen)) > 1
    assert max(sum(map(len, part)) for part in seen) <= 45
    for slots in (2, 3, 45):
        seen.clear()
        assert tokens_of(generate(model, prompts, 5, 12, seed=2, slots=slots)) == expected
        computed = [prompt for part in seen for prompt in part]
        assert computed == [prompt for prompt in prompts if len(prompt) > 1]


def test_memory_is_what_was_asked_for(monkeypatch):
    """The cache is allocated once, within kv_tokens; more requests wait; one that cannot fit is
    refused before any work."""
    model, made = build(), []
    init = rollout.Cache.__init__

    def watched(self, *args):
        init(self, *args)
        made.append(self.kv.shape)
    monkeypatch.setattr(rollout.Cache, "__init__", watched)
    got = generate(model, some_prompts(12, 10), 3, 20, seed=1, kv_tokens=100)
    assert made == [(2, 2, 3, 30, 2, 12)]  # (layers, 2, slots, length, Hkv, h)
    assert tokens_of(got) == tokens_of(generate(model, some_prompts(12, 10), 3, 20, seed=1))
    long = [5] * 24
    fits = generate(model, [long, [5]], 2, 20, eos_ids=[], kv_tokens=44)  # to the last token
    assert all(r.length == 20 for r in fits)
    monkeypatch.setattr(rollout, "CPU_CACHE_BYTES", 100 * 4 * 2 * 2 * 2 * 12)  # 100 tokens
    generate(model, some_prompts(12, 10), 3, 20)
    assert made[-1][2] == 3
    monkeypatch.setattr(model, "body", None)  # any work would raise
    with pytest.raises(ValueError, match="need 45 cache tokens, the budget is 44"):
        generate(model, [[*long, 5]], 1, 20, kv_tokens=44)


def test_nothing_is_left_of_a_rollout(monkeypatch):
    """The update needs the memory: no reference, not even a cycle, keeps the cache or the graphs.
    Prefill keeps none of the tensors in which it computed keys and values."""
    model, left, computed = build(), [], []
    init, store = rollout.Decoder.__init__, rollout.Cache.store

    def made(self, *args, **how):
        init(self, *args, **how)
        left.extend(weakref.ref(x) for x in (self, self.cache, self.cache.kv))

    def stored(self, layer, slot, position, k, v):
        store(self, layer, slot, position, k, v)
        computed.extend(StorageWeakRef(x.untyped_storage()) for x in (k, v))

    def decode(self):
        assert computed and all(storage.expired() for storage in computed)
        monkeypatch.undo()
        self.decode()
    monkeypatch.setattr(rollout.Decoder, "__init__", made)
    monkeypatch.setattr(rollout.Cache, "store", stored)
    monkeypatch.setattr(rollout.Batch, "decode", decode)
    gc.collect()
    gc.disable()
    try:
        generate(model, some_prompts(5), 2, 10)
        assert len(left) == 3
        assert all(reference() is None for reference in left)
    finally:
        gc.enable()


def test_interrupt_leaves_a_clean_state(monkeypatch):
    """Ctrl-C in the middle: nothing is held, the next call sees weights as they are then."""
    model, prompts, calls = build(), some_prompts(5), []
    expected = tokens_of(generate(model, prompts, 2, 20, seed=1))
    body = model.body

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return body(*args)
    with monkeypatch.context() as patch:
        patch.setattr(model, "body", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(model, prompts, 2, 20, seed=1)
    assert tokens_of(generate(model, prompts, 2, 20, seed=1)) == expected
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(1.5)
    changed = generate(model, prompts, 2, 20, seed=1)
    assert tokens_of(changed) != expected
    assert gaps(model, changed).max() < 5e-5


@pytest.mark.parametrize("call, named", [
    (dict(prompts=[[]]), "prompt 0 is empty"),
    (dict(prompts=[[4], [V]]), "prompt 1 .* a token id outside the vocabulary of 29"),
    (dict(prompts=[[-1]]), "prompt 0"),
    (dict(n=0), "n=0"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(max_new_tokens=[5, 5]), "2 values of max_new_tokens for 1 prompts"),
    (dict(top_p=0.0), "top_p=0.0"),
    (dict(top_p=1.1), "top_p=1.1"),
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(temperature=1e-30), "temperature=1e-30"),
    (dict(temperature=math.nan), "temperature=nan"),
    (dict(seed=[1, 2]), "2 seeds and 1 values of max_new_tokens for 1 prompts"),
    (dict(stop=("x",)), "tokenizer"),
    (dict(stop=("x", ""), tokenizer="some"), "a stop string is empty")])
def test_bad_requests_name_the_value(call, named, monkeypatch):
    model = build()
    monkeypatch.setattr(model, "body", None)  # any work would raise
    with pytest.raises(ValueError, match=named):
        generate(model, **{"prompts": [[4]], **call})


@pytest.mark.parametrize("on_terminal", [True, False])
def test_progress(on_terminal, monkeypatch, capsys):
    """Nothing for 5 s; then tokens/s, rows and time left, one line over the other on a terminal,
    else one line a minute. Here every step takes a second."""
    clock = [0]

    def decode(self):
        clock[0] += 1
        self.decoder.run(1, int(self.decoder.position[0]) + 1)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    monkeypatch.setattr(rollout.Batch, "decode", decode)
    generate(build(), [[5]], 1, 4, eos_ids=[], slots=1, progress=True)
    assert capsys.readouterr().err == ""
    generate(build(), [[5]], 2, 40, eos_ids=[], slots=1, progress=True)
    err = capsys.readouterr().err
    assert err.lstrip("\r").startswith("rollout: 0 of 2 rows, 5 tokens, at most 75 s left")
    assert "rollout: 1 of 2 rows" in err
    assert err.count("\r") == (2 * 76 if on_terminal else 0)
    assert err.count("\n") == (0 if on_terminal else 2)


# ---- The quick look ----


@pytest.fixture
def checkpoint(tmp_path):
    tokenizer = data.char_tokenizer("chainsum")
    model = build(seed=1, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "ckpt")
    tokenizer.save_pretrained(tmp_path / "ckpt")
    return tmp_path / "ckpt"


def run_main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["rollout.py", *map(str, args)])
    rollout.main()


def test_quick_look_prints_the_sample(checkpoint, monkeypatch, capfd):
    run_main(monkeypatch, checkpoint, "123456=", "--max_new_tokens", 12, "--seed", 3)
    tokenizer = data.load_tokenizer(checkpoint)
    ids = tokenizer.encode("123456=", add_special_tokens=False)
    expected = generate(Model.from_pretrained(checkpoint), [ids], 1, 12, seed=3,
                        eos_ids=[tokenizer.eos_token_id])[0]
    assert capfd.readouterr().out == tokenizer.decode(expected.tokens[7:]) + "\n"


@pytest.mark.parametrize("args, named", [
    (("nowhere", "1"), "no such directory"),
    (("ckpt", "12=", "--temperature", -1), "temperature=-1"),
    (("ckpt", "12=", "--stop", ""), "a stop string is empty"),
    (("ckpt", "half \ud83d"), "surrogates not allowed")])
def test_quick_look_says_in_one_line_what_is_wrong(args, named, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, *args)
    message = str(e.value.code)
    assert message.startswith("rollout.py: ") and named in message
    assert "\n" not in message


def test_quick_look_refuses_weights_that_are_nan(checkpoint, monkeypatch):
    model = Model.from_pretrained(checkpoint)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(checkpoint)
    with pytest.raises(SystemExit, match="up_proj.weight holds inf or nan"):
        run_main(monkeypatch, checkpoint, "1=")


def test_a_response_does_not_steer_the_terminal():
    text = "a\x1b[2J\x07\u202eb\x9bé 🦙\n\tc"
    assert rollout.visible(text) == "a\\x1b[2J\\x07\\u202eb\\x9bé 🦙\n\tc"


# ---- The captured step, with a stand-in for CUDA graphs ----


class Recorded(TorchDispatchMode):
    """A graph as CUDA records it: every kernel with the very tensors and numbers of that one run.
    replay() runs them again on the same memory, so whatever a step takes from Python between
    replays is frozen."""

    def __init__(self, step):
        super().__init__()
        self.calls = []
        with self:
            step()
        self.just_run = True  # CUDA records without running, this ran: the first replay is that

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result

    def replay(self):
        if self.just_run:
            self.just_run = False
            return
        for op, args, kwargs, result in self.calls:
            again = op(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again)):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)  # neither in place nor a view


def tensors(result):
    results = result if isinstance(result, (tuple, list)) else [result]
    return [x for x in results if isinstance(x, torch.Tensor)]


@pytest.fixture
def graphs(monkeypatch):
    """generate() as on a GPU, with recordings instead of graphs: the list of them."""
    recorded = []
    init = rollout.Decoder.__init__

    def on_gpu(self, *args, **how):
        init(self, *args, **how)
        self.on_gpu = True

    def capture(step, pool):
        recorded.append(Recorded(step))
        return recorded[-1]
    monkeypatch.setattr(rollout.Decoder, "__init__", on_gpu)
    monkeypatch.setattr(rollout, "capture", capture)
    return recorded


@every_family
def test_a_captured_step_draws_the_same(family, request):
    """As on CUDA: bucketed row counts, each shape captured at its fourth step, replays that see
    static buffers alone."""
    model, prompts = build(family), some_prompts(15)
    ways = [dict(), dict(slots=7)]
    if family == "qwen2":
        ways += [dict(top_p=0.9), dict(temperature=0)]
    expected = [tokens_of(generate(model, prompts, 3, 40, seed=2, **how)) for how in ways]
    graphs = request.getfixturevalue("graphs")
    for how, tokens in zip(ways, expected):
        before = len(graphs)
        assert tokens_of(generate(model, prompts, 3, 40, seed=2, **how)) == tokens
        assert len(graphs) > before


def test_a_step_never_waits_for_the_host_and_has_fixed_shapes(monkeypatch):
    """What a CUDA graph cannot hold: reads of a value by the host, and results whose size depends
    on values."""
    called = set()
    run = rollout.Decoder.run

    def watched(self, n, longest):
        run(self, n, longest)
        recorded = Recorded(lambda: self.step(n, longest))
        called.update(op.overloadpacket.__name__ for op, *_ in recorded.calls)
    monkeypatch.setattr(rollout.Decoder, "run", watched)
    for how in (dict(), dict(top_p=0.9), dict(temperature=0)):
        with torch.no_grad():  # in inference mode composite operations hide what they consist of
            generate.__wrapped__(build(), some_prompts(3), 2, 5, **how)
    assert {"mm", "baddbmm", "_softmax", "scatter_", "searchsorted", "sort", "argmax"} <= called
    reads = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
    sizes_by_value = {"nonzero", "masked_select", "unique", "_unique2"}
    assert not called & (reads | sizes_by_value)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 0.9), (0, 1.0)])
def test_a_step_takes_nothing_from_the_cpu(temperature, top_p):
    """On CUDA a number of Python becomes part of a kernel or a tensor on the CPU, which cannot be
    copied while a graph is recorded. The meta device shows which; it takes no memory either."""
    config = build().config
    with torch.device("meta"):
        decoder = rollout.Decoder(Model(config), 8, 40, 20, [EOS],
                                  temperature=temperature, top_p=top_p)
    for op, args, kwargs, _ in Recorded(lambda: decoder.step(5, 24)).calls:
        given = tensors([*args, *kwargs.values()])
        assert all(x.device.type == "meta" for x in given), op


def test_graph_shapes_are_few():
    rows = [rollout.graph_rows(n) for n in range(1, 2049)]
    assert rows == sorted(rows)
    for n, captured in enumerate(rows, 1):
        assert 0 <= captured - n < max(64, n)
    assert len(set(rows)) <= 5 + 15 + 28
    assert rollout.graph_rows(17) == 32
    assert rollout.graph_rows(257) == 320


def test_shapes_of_a_long_rollout_are_few(graphs, monkeypatch):
    """Rows that end one by one, over hundreds of places: rows in steps, places in steps of 256."""
    shapes = set()
    step = rollout.Decoder.step

    def noted(self, n, length):
        shapes.add((n, length))
        return step(self, n, length)
    monkeypatch.setattr(rollout.Decoder, "step", noted)
    generate(build(), some_prompts(100), 1, 300, seed=2, eos_ids=[3, 4])
    assert {length for _, length in shapes} <= {256, 320}
    assert len({n for n, _ in shapes}) <= 11  # 1 2 4 8 16 32 48 64 80 96 100


# ---- Kernels of the GPU, with plain-torch stand-ins of their documented signatures ----


def attended(q, K, V):
    """q (H,h) over K, V (n,Hkv,h): (H,h)."""
    repeat = len(q) // K.shape[1]
    K = K.repeat_interleave(repeat, 1).transpose(0, 1)  # (H,n,h)
    V = V.repeat_interleave(repeat, 1).transpose(0, 1)
    scores = q[:, None] @ K.transpose(1, 2) * q.shape[-1] ** -0.5  # (H,1,n)
    return (scores.softmax(-1) @ V)[:, 0]


def fake_with_kvcache(q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, causal=False):
    """flash_attn_with_kvcache: appends k, v at cache_seqlens in place, then attends to
    cache_seqlens + 1 places."""
    assert cache_seqlens.dtype == torch.int32
    assert q.shape[1] == 1 and len(k_cache) == len(q)
    out = torch.empty_like(q)
    for b, n in enumerate(cache_seqlens.tolist()):
        k_cache[b, n] = k[b, 0]
        v_cache[b, n] = v[b, 0]
        K, V = k_cache[b, :n + 1], v_cache[b, :n + 1]
        out[b, 0] = attended(q[b, 0], K, V)
    return out


def fake_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
                     window_size=(-1, -1), enable_gqa=False, seqused_k=None):
    """torch.nn.attention.varlen.varlen_attn from 2.12 on: sequence b's keys start at cu_seq_k[b],
    seqused_k[b] of them count."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == seqused_k.dtype == torch.int32
    assert max_q == 1 and cu_seq_q.tolist() == list(range(len(query) + 1))
    assert max_k == cu_seq_k[1] and seqused_k.max() <= max_k
    assert key.is_contiguous() and cu_seq_k[-1] == len(key)
    assert enable_gqa or query.shape[1] == key.shape[1]
    out = torch.empty_like(query)
    for b, n in enumerate(seqused_k.tolist()):
        places = slice(cu_seq_k[b], cu_seq_k[b] + n)
        out[b] = attended(query[b], key[places], value[places])
    return out


@every_family
@pytest.mark.parametrize("kernel", ["flash-attn", "torch varlen"])
def test_the_kernels_of_a_gpu_give_the_same(family, kernel, monkeypatch):
    model, prompts = build(family), some_prompts(8)
    plain = tokens_of(generate(model, prompts, 3, 25, seed=2, slots=7))
    monkeypatch.setattr(rollout, "decode_kernel", lambda *_: kernel)
    monkeypatch.setattr(rollout, "flash_attn_with_kvcache", fake_with_kvcache)
    monkeypatch.setattr(rollout, "varlen_attn", fake_varlen_attn)
    assert tokens_of(generate(model, prompts, 3, 25, seed=2, slots=7)) == plain


def test_the_kernel_is_one_that_can(monkeypatch):
    """flash-attn first; PyTorch's kernel reads a part of each sequence from 2.12 on, and takes head
    sizes in steps of 8."""
    def chosen(packed, version="2.13.0", head_dim=64):
        monkeypatch.setattr(rollout, "attention_kernel", lambda *_: packed)
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        return rollout.decode_kernel("cuda", torch.bfloat16, head_dim)
    assert chosen("sdpa") == "matmul"
    assert chosen("flash-attn", "2.9.0+cu128") == "flash-attn"
    assert chosen("torch varlen") == "torch varlen"
    assert chosen("torch varlen", "2.12.0+cu130") == "torch varlen"
    assert chosen("torch varlen", "2.11.1") == "matmul"
    assert chosen("torch varlen", head_dim=12) == "matmul"


# ---- On a GPU ----


@pytest.mark.gpu
def test_gpu_graphs_draw_what_eager_steps_draw(monkeypatch):
    """bfloat16, same kernels and shapes with and without capture: the same tokens."""
    model, prompts = build(head_dim=16).to("cuda", torch.bfloat16), some_prompts(40)
    graphs = generate(model, prompts, 4, 100, seed=2)
    monkeypatch.setattr(rollout, "GRAPH_AFTER", 10**9)
    assert tokens_of(generate(model, prompts, 4, 100, seed=2)) == tokens_of(graphs)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [12, 16])
def test_gpu_decoding_kernel_against_float32(head_dim):
    """Whatever attends to the cache on this machine: recorded log-probs against the trainer's in
    float32 on the CPU."""
    model = build(head_dim=head_dim)
    on_gpu = build(head_dim=head_dim).to("cuda", torch.bfloat16)
    rollouts = generate(on_gpu, some_prompts(20), 4, 100, seed=3)
    assert gaps(model, rollouts).mean() < 0.05


@pytest.mark.gpu
def test_gpu_memory_is_let_go():
    model = build(head_dim=16).to("cuda", torch.bfloat16)
    before = torch.cuda.memory_allocated()
    generate(model, some_prompts(40), 4, 100, seed=2)
    assert torch.cuda.memory_allocated() < before + 2**20
