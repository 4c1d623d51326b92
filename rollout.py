"""Prompts in, sampled tokens and their log-probs out: continuous batching over one KV cache.

    rollouts = generate(model, prompts, n=8, max_new_tokens=1024, seed=0)  # list[Rollout]
    python rollout.py MODEL "prompt"                                       # a quick look

The rows of the batch are slots of the cache, and the live ones are always the first of them. When
a sequence ends, the hole is filled by the next waiting request or, when none waits, by the last
live row: every tensor of a step is a plain prefix view, and no step pays for what is over. Each
prompt is prefilled once and its keys and values are copied to the slots of its samples: that
costs one pass over the prompt, and decoding reads contiguous memory (pages would save the copies
and turn every later read into a gather).

Every token is drawn by inverse CDF from its own uniform number. These come from (prompt, seed,
sample index) alone, so slots, batch order and number of processes do not change a response.
"""
import argparse
import hashlib
import inspect
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from model import Model, attention_kernel, causal

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.9
    varlen_attn = None

PREFILL_TOKENS = 16384  # prompt tokens prefilled at once
CPU_CACHE_BYTES = 2 * 2**30
GPU_CACHE_SHARE = 0.6  # of the memory that is free
GRAPH_AFTER = 3  # steps of one shape before it is captured: they warm it up, rare shapes never pay
COLDEST = 1e-4  # smallest temperature but 0: logits / temperature must not overflow
LONGEST_TEXT = 10**6  # characters of a prompt on the command line: tokenizers die of more


@dataclass
class Rollout:
    """One response. The sampler fills in the first four fields, train.py the others."""
    tokens: list[int]  # prompt + response, with the EOS if there is one
    prompt_len: int
    logp: list[float]  # of each response token: at the temperature, before top-p, as trained on
    finished: bool  # ended by itself (EOS or stop string); False: cut at max_new_tokens
    score: float = 0.0
    status: str = ""  # how grading went
    group: int = 0  # the prompt it answers
    advantage: float = 0.0
    pass_rate: float = 0.0  # mean score of its group
    old_logp: list[float] | None = None  # where the ratio's denominator is not the sampler's

    @property
    def length(self):
        return len(self.tokens) - self.prompt_len


@torch.inference_mode()  # cheaper calls than under no_grad: views are not tracked
def generate(model: Model, prompts: list[list[int]], n: int = 1, max_new_tokens: int = 256,
             temperature: float = 1.0, top_p: float = 1.0, seed: int | list[int] = 0,
             eos_ids: list[int] | None = None, *, stop: tuple[str, ...] = (), tokenizer=None,
             slots: int | None = None, kv_tokens: int | None = None,
             progress: bool = False) -> list[Rollout]:
    """n samples of each prompt (token ids), prompt-major.

    temperature: 0 is greedy. seed: one int, or one per prompt. eos_ids: None is the model's own,
    [] is none. stop: strings that end a response and stay in it (need `tokenizer`). slots: rows
    decoded at once (default: all that fit). kv_tokens: tokens the cache may hold (default: 60 %
    of the free GPU memory, 2 GiB on a CPU). progress: show rollouts of over 5 s on stderr.
    Raises ValueError, one line, before any work if a request is wrong or cannot fit."""
    if not prompts:
        return []
    seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
    check(model, prompts, seeds, n, max_new_tokens, temperature, top_p, stop, tokenizer, slots)
    fit = slots_that_fit(model, prompts, max_new_tokens, kv_tokens)
    slots = min(fit, len(prompts) * n, slots or fit)

    eos = model.eos_ids if eos_ids is None else eos_ids
    goes_on = torch.ones(model.config.vocab_size, dtype=torch.long)  # 0 for what ends a response
    goes_on[[e for e in eos if e is not None and 0 <= e < len(goes_on)]] = 0
    may_stop = stop_tokens(stop, tokenizer, len(goes_on)) if stop else None
    length = max(map(len, prompts)) + max_new_tokens
    decoder = Decoder(model, slots, length, max_new_tokens, temperature, top_p, goes_on, may_stop)

    batch = Batch(decoder, prompts, seeds, n, stop, tokenizer)
    bar = Progress(batch, progress)
    batch.refill([])
    while batch.live:
        batch.decode()  # some steps for all rows,
        over = batch.harvest()  # what ended becomes results,
        batch.refill(over)  # waiting requests and the last rows take its place
        bar.show()
    bar.clear()
    return batch.results  # nothing else is left: cache and graphs die with this frame


# ---- The host's side: which request has which slot --------------------------------------------


class Batch:
    """Requests, each a (prompt, sample), in the slots [0, live); some may be over already."""

    def __init__(self, decoder, prompts, seeds, n, stop, tokenizer):
        self.decoder = decoder
        self.prompts = prompts
        self.seeds = seeds
        self.n = n
        self.stop = stop
        self.tokenizer = tokenizer
        self.waiting = deque((i, j) for i in range(len(prompts)) for j in range(n))
        self.results: list[Rollout | None] = [None] * len(self.waiting)
        self.live = 0
        self.request = {}  # slot -> (prompt, sample)
        self.stopped = set()  # slots that a stop string ended
        self.prefilled = None  # the prompt that was prefilled last,
        self.source = 0  # and a slot that holds its keys and values
        self.patience = 8 if decoder.on_gpu else 1  # steps between looks: each waits for the GPU

    def harvest(self) -> list[int]:
        """The rows that are over; what they hold goes into the results."""
        d = self.decoder
        alive = d.alive[:self.live].tolist()
        made = d.made[:self.live].tolist()
        over = [row for row in range(self.live) if not alive[row]]
        for row in over:
            i, j = self.request[row]
            response = d.drawn[row, :made[row]].tolist()
            logp = d.logp[row, :made[row]].tolist()
            finished = row in self.stopped or not d.goes_on[response[-1]]
            tokens = self.prompts[i] + response
            self.results[i * self.n + j] = Rollout(tokens, len(self.prompts[i]), logp, finished)
        self.stopped.clear()
        return over

    def refill(self, over):
        """Waiting requests into the rows that are `over`, then into free slots; where none
        waits, the last live rows close the holes."""
        free = over + list(range(self.live, self.decoder.slots))
        taken = free[:len(self.waiting)]
        if taken:
            self.admit(taken)
        rows = self.live + max(0, len(taken) - len(over))
        holes = over[len(taken):]
        self.live = rows - len(holes)
        dst = [row for row in holes if row < self.live]
        src = [row for row in range(self.live, rows) if row not in holes]
        if dst:
            self.decoder.move(dst, src)
            self.request.update({d: self.request[s] for d, s in zip(dst, src)})

    def admit(self, slots):
        """The next waiting requests into `slots`. A prompt is prefilled into the slot of its
        first sample; the other samples copy from there, also those admitted later."""
        # Prompts wait in order. While samples of the last one wait, no other prompt may get the
        # slot they copy from: it comes first, so that one of them does.
        slots = sorted(slots, key=lambda slot: slot != self.source)
        first = []
        sources = []
        for slot in slots:
            self.request[slot] = self.waiting.popleft()
            i, _ = self.request[slot]
            if i != self.prefilled:
                self.prefilled = i
                self.source = slot
                first.append(slot)
            sources.append(self.source)
        prompts = {slot: self.prompts[self.request[slot][0]] for slot in slots}
        longest = max(map(len, prompts.values()))
        at_once = max(1, PREFILL_TOKENS // longest)
        for k in range(0, len(first), at_once):
            some = first[k:k + at_once]
            self.decoder.prefill(some, [prompts[slot] for slot in some])
        self.decoder.cache.copy(slots, sources, longest - 1)
        u = [uniforms(self.prompts[i], self.seeds[i], j, self.decoder.max_new_tokens)
             for i, j in map(self.request.get, slots)]
        self.decoder.start(slots, list(prompts.values()), torch.stack(u))

    def decode(self):
        """Steps until a sixteenth of the rows is over (taking rows out is not free either), or
        64 of them."""
        d = self.decoder
        longest = int(d.position[:self.live].max()) + 1
        for steps in range(64):
            d.run(self.live, longest + steps)
            if (steps + 1) % self.patience == 0:
                if self.stop:
                    self.cut_at_stop_strings()
                if int(d.alive[:self.live].sum()) < self.live - self.live // 16:
                    return

    def cut_at_stop_strings(self):
        """Look at the rows that drew a token which may end a stop string since the last look;
        cut them where the text first holds one."""
        d = self.decoder
        for row in d.hint[:self.live].nonzero()[:, 0].tolist():
            made = int(d.made[row])
            response = d.drawn[row, :made].tolist()
            for end in range(max(1, made - self.patience + 1), made + 1):
                text = self.tokenizer.decode(response[:end])
                if any(s in text for s in self.stop):
                    d.made[row] = end
                    d.alive[row] = 0
                    self.stopped.add(row)
                    break
        d.hint.zero_()


# ---- The device's side: cache, step, graphs ---------------------------------------------------


class Decoder:
    """The state of all slots, in place, and one decoding step over the first n of them: forward,
    draw, write down. A step reads and writes these buffers alone, never waits for the host and
    has no shape that depends on data, so that on CUDA it is replayed as a graph, one per shape.
    Weights move at every FSDP unshard and the cache must make room for the update: a Decoder
    with all its graphs lives for one generate()."""

    def __init__(self, model, slots, length, max_new_tokens, temperature, top_p, goes_on, may_stop):
        self.device = model.embed_tokens.weight.device
        self.on_gpu = self.device.type == "cuda"
        self.model = model
        self.cache = Cache(model, slots, length)
        self.slots = slots
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.goes_on = goes_on.to(self.device)  # (V,) 0 for a token that ends a response
        self.may_stop = may_stop  # (V,) 1 for a token that may end a stop string
        # per slot: the token that is fed next, its place in the sequence, response tokens drawn,
        # 1 while the sequence goes on, 1 once it drew a token that may end a stop string
        self.state = torch.zeros(5, slots, dtype=torch.long, device=self.device)
        self.token, self.position, self.made, self.alive, self.hint = self.state
        # by slot and number in the response, with room for what a row writes after its end
        self.u = torch.zeros(slots, max_new_tokens + 1, device=self.device)
        self.logp = torch.zeros_like(self.u)
        self.drawn = torch.zeros_like(self.u, dtype=torch.long)
        self.rope = model.rope(torch.arange(length, device=self.device))
        self.graphs = {}
        self.uses = Counter()
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None

    def step(self, n, length):
        """Feed one token of each of the slots [0, n), all at places < length, and draw the next.
        A sequence that is over stays where it is and overwrites what lies beyond its end."""
        token, position, made, alive, hint = self.state[:, :n]
        rope = [table[position] for table in self.rope]
        hidden = self.model.body(token, position, self.cache.decode(position, length), rope)
        at = made[:, None]  # (n,1)
        u = self.u[:n].gather(1, at)[:, 0]
        new, logp = draw(self.model.logits(hidden), u, self.temperature, self.top_p)
        self.drawn[:n].scatter_(1, at, new[:, None])
        self.logp[:n].scatter_(1, at, logp[:, None])
        if self.may_stop is not None:
            hint |= self.may_stop[new] & alive
        token.copy_(new)
        position += alive
        made += alive
        alive *= self.goes_on[new] * (made < self.max_new_tokens)

    def run(self, n, longest):
        """step() over at least n slots and `longest` places; as a graph once the shape is known."""
        n, length = self.shape(n, longest)
        self.cache.grow(n, length)
        if not self.on_gpu:
            return self.step(n, length)
        self.uses[n, length] += 1
        if self.uses[n, length] <= GRAPH_AFTER:
            return self.step(n, length)
        if (n, length) not in self.graphs:
            self.graphs[n, length] = capture(partial(self.step, n, length), self.pool)
        self.graphs[n, length].replay()

    def shape(self, n, longest):
        """(rows, places) of a step. On CUDA few different ones, as a graph takes 30 to 60 ms:
        free slots idle along, and a kernel that stops at each row's length gets them all."""
        if not self.on_gpu:
            return n, min(round_up(longest, 8), self.cache.length)
        if n <= 16:
            n = 1 << (n - 1).bit_length()
        n = min(round_up(n, 64 if n > 256 else 16 if n > 16 else 1), self.slots)
        if self.cache.kernel != "matmul":
            return n, self.cache.length
        return n, min(round_up(longest, 256), self.cache.length)

    def prefill(self, slots, prompts):
        """Keys and values of `prompts`, packed end to end, into `slots`: without their last
        tokens, which are fed by the first step."""
        prefixes = [p[:-1] for p in prompts]
        ids = torch.tensor([t for p in prefixes for t in p], dtype=torch.long, device=self.device)
        if not len(ids):
            return
        ends = list(accumulate(map(len, prefixes)))
        rows = [list(range(end - len(p), end)) for p, end in zip(prefixes, ends) if p]
        self.cache.grow(self.slots, max(map(len, prefixes)))
        positions, inner = causal(rows, self.device, self.cache.kv.dtype)
        lengths = torch.tensor([len(p) for p in prefixes])
        slot = torch.tensor(slots).repeat_interleave(lengths).to(self.device)  # of each token

        def attend(layer, q, k, v):
            self.cache.store(layer, slot, positions, k, v)  # copies: k may be a part of a larger tensor
            return inner(layer, q, k, v)
        self.model.body(ids, positions, attend)

    def start(self, slots, prompts, u):
        """Sequences of `prompts` begin in `slots`, whose cache holds all but the last tokens;
        u (len(slots), max_new_tokens) are their uniform numbers."""
        self.token[slots] = torch.tensor([p[-1] for p in prompts], device=self.device)
        self.position[slots] = torch.tensor([len(p) - 1 for p in prompts], device=self.device)
        self.made[slots] = 0
        self.alive[slots] = 1
        self.hint[slots] = 0
        self.u[slots, :-1] = u.to(self.device)

    def move(self, dst, src):
        """What slots `src` hold over what `dst` hold."""
        self.cache.copy(dst, src, int(self.position[src].max()))
        self.state[:, dst] = self.state[:, src]
        for buffer in (self.u, self.logp, self.drawn):
            buffer[dst] = buffer[src]


class Cache:
    """Keys and values of `slots` sequences of up to `length` tokens, allocated once:
    kv (layers, 2, slots, length, Hkv, h)."""

    def __init__(self, model, slots, length):
        c = model.config
        weight = model.embed_tokens.weight
        self.kernel = decode_kernel(weight.device, weight.dtype, c.head_dim)
        self.length = length
        shape = c.num_hidden_layers, 2, slots, length, c.num_key_value_heads, c.head_dim
        if self.kernel == "matmul":  # in memory the tokens of a head lie together
            self.kv = weight.new_empty([shape[k] for k in (0, 1, 2, 4, 3, 5)]).transpose(3, 4)
        else:
            self.kv = weight.new_empty(shape)
        self.clean = 0  # places that were set to 0 or written

    def grow(self, n, length):
        """The first `length` places of n slots are finite from here on, also where nothing was
        written. n never grows again: so memory is only taken as sequences get longer."""
        if length > self.clean:
            self.kv[:, :, :n, self.clean:length] = 0
            self.clean = length

    def store(self, layer, slot, position, k, v):
        """k, v (M,Hkv,h) of M tokens at `position` (M,) of `slot` (M,)."""
        self.kv[layer, 0][slot, position] = k
        self.kv[layer, 1][slot, position] = v

    def copy(self, dst, src, length):
        """The first `length` tokens of slots `src` over those of slots `dst`."""
        for kv in self.kv:  # one layer at a time: the right side is a copy
            kv[:, dst, :length] = kv[:, src, :length]

    def decode(self, position, length):
        """attend(layer, q, k, v) for one new token in each of the first n slots, at `position`
        (n,) < length: q (n,H,h), k and v (n,Hkv,h) -> (n,H,h)."""
        n = len(position)
        used = position.int()  # tokens that were there before
        slot = torch.arange(n, device=position.device)

        if self.kernel == "flash-attn":
            def attend(layer, q, k, v):  # stores k and v itself
                K, V = self.kv[layer, :, :n]
                o = flash_attn_with_kvcache(q[:, None], K, V, k[:, None], v[:, None],
                                            cache_seqlens=used, causal=True)
                return o[:, 0]
            return attend

        if self.kernel == "torch varlen":  # packed sequences of self.length places, the first used
            queries = torch.arange(n + 1, device=position.device, dtype=torch.int32)
            keys = queries * self.length
            used = used + 1

            def attend(layer, q, k, v):
                self.store(layer, slot, position, k, v)
                K, V = self.kv[layer, :, :n].flatten(1, 2)
                return varlen_attn(q, K, V, queries, keys, 1, self.length, seqused_k=used,
                                   enable_gqa=q.shape[1] != k.shape[1])
            return attend

        heads, h = self.kv.shape[-2:]
        seen = torch.arange(length, device=position.device) <= position[:, None]  # (n,length)
        seen = seen.repeat_interleave(heads, 0)[:, None]
        mask = torch.zeros_like(seen, dtype=self.kv.dtype).masked_fill_(~seen, -torch.inf)

        def attend(layer, q, k, v):
            self.store(layer, slot, position, k, v)
            K, V = self.kv[layer, :, :n, :length].transpose(2, 3).flatten(1, 2)  # (n*Hkv,length,h)
            q = q.reshape(n * heads, -1, h)  # the query heads of one KV head together
            scores = torch.baddbmm(mask, q, K.transpose(1, 2), alpha=h**-0.5)
            return scores.softmax(-1).bmm(V).view(n, -1, h)
        return attend


def decode_kernel(device, dtype, head_dim) -> str:
    """What attends to the cache: flash-attn if installed, else PyTorch's copy of it where that
    can read a part of each sequence, else two batched matmuls."""
    kernel = attention_kernel(device, dtype)
    if kernel == "flash-attn":
        return kernel
    if kernel == "torch varlen" and "seqused_k" in inspect.signature(varlen_attn).parameters:
        return kernel if head_dim % 8 == 0 else "matmul"  # it takes no other sizes
    return "matmul"


def capture(step, pool):
    """A CUDA graph of step(): recorded, not run."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # thread_local: a checkpoint may be copying in another thread
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph


# ---- One token ----------------------------------------------------------------------------------


def draw(logits: Tensor, u: Tensor, temperature=1.0, top_p=1.0) -> tuple[Tensor, Tensor]:
    """(tokens, their log-probs), both (n,): one token per row of logits (n,V) by inverse CDF at
    u (n,) in [0, 1 - 2^-23]. The log-prob is that of the whole distribution at `temperature`,
    float32. temperature 0 is greedy, its log-prob that of temperature 1."""
    assert temperature == 0 or temperature >= COLDEST, f"temperature {temperature}"
    z = logits if temperature in (0, 1) else logits / temperature
    whole = z.softmax(-1)
    if temperature == 0:
        token = whole.argmax(-1, keepdim=True)
    else:
        p = whole
        if top_p < 1:  # the smallest set of likeliest tokens that holds top_p; at least one
            ordered, index = p.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p
            p = p.scatter(-1, index, ordered.masked_fill(outside, 0))
        cdf = p.cumsum(-1)
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
        token.clamp_(max=p.shape[1] - 1)  # where a probability is nan, any token of the vocabulary
    return token[:, 0], whole.gather(1, token)[:, 0].log()


def uniforms(prompt: list[int], seed: int, sample: int, count: int) -> Tensor:
    """(count,) float32 in [0, 1 - 2^-23], so that u times a sum rounds to less than the sum."""
    digest = hashlib.blake2b(f"{seed} {sample} {prompt}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))  # 32 bits count
    return torch.rand(count, generator=generator).clamp_(max=1 - 2**-23)


# ---- Plumbing -----------------------------------------------------------------------------------


def check(model, prompts, seeds, n, max_new_tokens, temperature, top_p, stop, tokenizer, slots):
    """ValueError, one line that names the value, where generate() cannot do what it is asked."""
    def need(ok, what):
        if not ok:
            raise ValueError(f"generate: {what}")
    need(n >= 1, f"n={n} must be at least 1")
    need(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    need(slots is None or slots >= 1, f"slots={slots} must be at least 1")
    need(temperature == 0 or temperature >= COLDEST,
         f"temperature={temperature} must be 0 (greedy) or at least {COLDEST}")
    need(0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]")
    need(len(seeds) == len(prompts),
         f"{len(seeds)} seeds for {len(prompts)} prompts; give one, or one per prompt")
    need(not stop or tokenizer is not None, "stop strings need tokenizer=")
    need(all(stop), "a stop string is empty; leave it out")
    vocab = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        need(prompt, f"prompt {i} is empty")
        need(0 <= min(prompt) and max(prompt) < vocab,
             f"prompt {i} has a token id outside the vocabulary of {vocab}")


def slots_that_fit(model, prompts, max_new_tokens, kv_tokens) -> int:
    """Sequences of the longest prompt and response that the cache may hold; ValueError if none."""
    c = model.config
    weight = model.embed_tokens.weight
    if kv_tokens is None:
        room = CPU_CACHE_BYTES
        if weight.device.type == "cuda":  # what PyTorch holds but does not use is free too
            idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            room = GPU_CACHE_SHARE * (torch.cuda.mem_get_info()[0] + idle)
        heads = 2 * c.num_hidden_layers * c.num_key_value_heads
        kv_tokens = int(room) // (heads * c.head_dim * weight.element_size())
    longest = max(map(len, prompts))
    length = longest + max_new_tokens
    if kv_tokens < length:
        raise ValueError(
            f"generate: the longest prompt ({longest} tokens) + max_new_tokens ({max_new_tokens}) "
            f"needs {length} cache tokens, the budget is {kv_tokens}; raise kv_tokens or shorten "
            "the request")
    return kv_tokens // length


def stop_tokens(stop, tokenizer, vocab_size) -> Tensor:
    """(V,) 1 for the tokens whose text may complete a stop string: only they cost a look at the
    text. Vocabularies spell printable ASCII as it is; of another last character any may be."""
    texts = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    ends = {s[-1] for s in stop}
    plain = all(end.isascii() and end.isprintable() and end != " " for end in ends)
    table = torch.zeros(vocab_size, dtype=torch.long)
    for i, text in enumerate(texts):
        table[i] = not plain or any(end in text for end in ends)
    return table


class Progress:
    """Rollouts of over 5 s on stderr: rows finished, tokens/s, time left at most. On a terminal
    a line that is written again, elsewhere one line a minute."""

    def __init__(self, batch, wanted):
        self.batch = batch
        self.wanted = wanted
        self.terminal = sys.stderr.isatty()
        self.began = time.monotonic()
        self.due = self.began + 5

    def show(self):
        now = time.monotonic()
        if not self.wanted or now < self.due:
            return
        self.due = now + (0.5 if self.terminal else 60)
        b = self.batch
        done = [r for r in b.results if r]
        going = int(b.decoder.made[:b.live].sum())
        rate = (going + sum(r.length for r in done)) / (now - self.began)
        limit = b.decoder.max_new_tokens
        left = ((len(b.results) - len(done)) * limit - going) / rate
        text = (f"rollout: {len(done)} of {len(b.results)} rows, {rate:,.0f} tok/s, "
                f"at most {left:.0f} s left")
        print(f"\r{text}\x1b[K" if self.terminal else text, file=sys.stderr,
              end="" if self.terminal else "\n", flush=True)

    def clear(self):
        if self.wanted and self.terminal and self.due > self.began + 5:
            print("\r\x1b[K", file=sys.stderr, end="", flush=True)


def round_up(count, step):
    return -(-count // step) * step


def visible(text):
    """`text` with control characters spelled out: a response must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def main():
    parser = argparse.ArgumentParser(description="One response to one prompt, printed.")
    parser.add_argument("model", help="checkpoint or run directory, or hub id")
    parser.add_argument("prompt", help="fed as it is: no chat template, no BOS")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--stop", nargs="*", default=(), help="texts that end the response")
    parser.add_argument("--kv_tokens", type=int, help="tokens the cache may hold")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import data  # only here: the tokenizer and the ends of a response as train.py and eval.py see them
    on_gpu = torch.cuda.is_available()
    sys.stdout.reconfigure(errors="backslashreplace")  # terminals that are not UTF-8
    try:
        if len(args.prompt) > LONGEST_TEXT:
            raise ValueError(f"the prompt has {len(args.prompt):,} characters, at most {LONGEST_TEXT:,}")
        args.prompt.encode()  # half a surrogate: a ValueError that names it
        model = Model.from_pretrained(args.model, torch.bfloat16 if on_gpu else torch.float32,
                                      "cuda" if on_gpu else "cpu")
        model.check_finite()
        tokenizer = data.load_tokenizer(model.source)
        ids = tokenizer.encode(args.prompt, add_special_tokens=False)
        ends = data.end_ids(tokenizer, model.eos_ids, model.config.vocab_size)
        rollout = generate(model, [ids], max_new_tokens=args.max_new_tokens,
                           temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                           eos_ids=ends, stop=tuple(args.stop), tokenizer=tokenizer,
                           kv_tokens=args.kv_tokens, progress=True)[0]
        print(visible(tokenizer.decode(rollout.tokens[rollout.prompt_len:])))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"rollout.py: {visible(str(error)).splitlines()[0]}")


if __name__ == "__main__":
    main()
