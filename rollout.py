"""Prompts in, sampled tokens and their log-probs out: continuous batching over one preallocated KV cache.

    rollouts = generate(model, prompts, n=8, max_new_tokens=1024, seed=0)        # list[Rollout], prompt-major
    python rollout.py MODEL "prompt"                                            # a quick look, printed as it is sampled

The rows of the batch are slots; the live ones are always the first of them. When a sequence ends, the hole is filled by
the next waiting request or, when none waits, by the last live row, so that every tensor below is a plain prefix view
and no step pays for sequences that are over. Each prompt is prefilled once and its keys and values are copied to the
slots of its samples: copies cost one pass over the prompt and leave decoding a contiguous read; pages would save that
memory but turn every later read into a gather.

Every token is drawn by inverse CDF from its own uniform number, a function of (prompt, seed, sample index, position)
alone, so slots, batch order and number of processes do not change a response.
"""
import argparse
import hashlib
import math
import mmap
import sys
from collections import Counter, deque
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import Model, attention_kernel, causal, exact_logits

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None
torch_flash = torch.ops.aten._flash_attention_forward  # the same kernels; with a cache where it knows `seqused_k`

PREFILL_TOKENS = 16384  # prompt tokens prefilled at once
CPU_CACHE_BYTES = 2 * 2**30
CDF_BLOCK = 64  # tokens summed first, so that only one block of the vocabulary needs a running sum
GRAPH_AFTER = 3  # eager steps of one shape before it is captured: they warm it up, and a shape used less is not worth it


class Cancelled(Exception):
    """generate() was told to stop; nothing of it is left."""


@dataclass
class Rollout:
    tokens: list[int]  # prompt + response, with the EOS if there is one
    prompt_len: int
    logp: list[float]  # of each response token, float32: temperature applied, before top-k/top-p, as the trainer sees it
    finished: bool  # ended by itself (EOS or stop string); False: cut at max_new_tokens


def uniforms(keys: list[int], count: int) -> Tensor:
    """(len(keys), count) float32 in [0, 1): number t of a key is a hash of (key, t), whatever else is drawn (splitmix64,
    23 bits, so that u < 1 also after rounding)."""
    def shift(z, k):  # logical, on signed 64 bits
        return (z >> k) & ((1 << (64 - k)) - 1)
    z = torch.tensor(keys)[:, None] + torch.arange(1, count + 1) * -7046029254386353131
    z = (z ^ shift(z, 30)) * -4658895280553007687
    z = (z ^ shift(z, 27)) * -7723592293110705685
    return shift(z ^ shift(z, 31), 41).float() / 2**23


def request_key(prompt: list[int], seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed} {index} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def draw(logits: Tensor, u: Tensor, temperature=1.0, top_k=0, top_p=1.0, banned: Tensor | None = None):
    """One token per row of logits (n,V) by inverse CDF at u (n,): (tokens (n,), their log-probs (n,) float32).
    temperature 0 is greedy, its log-prob that of temperature 1. `banned` (n,V) bool never comes out."""
    z = logits.float() if temperature in (0, 1) else logits.float() / temperature
    whole = p = z.softmax(-1)
    if banned is not None:
        p = z.masked_fill(banned, -torch.inf).softmax(-1)
    if temperature == 0:
        token = p.argmax(-1, keepdim=True)
    else:
        if top_k and top_k < p.shape[-1]:
            p = p.masked_fill(p < p.topk(top_k).values[:, -1:], 0)
        if top_p < 1:  # the smallest set of likeliest tokens that holds top_p; at least one
            ordered, index = p.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p * ordered.sum(-1, keepdim=True)
            p = p.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), 0)
        token = inverse_cdf(p, u[:, None])
    if banned is not None:  # what is left may have been so unlikely that its probability is rounded to 0
        return token[:, 0], z.log_softmax(-1).gather(1, token)[:, 0]
    return token[:, 0], whole.gather(1, token)[:, 0].log()


def inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """The first place (n,1) where the running sum of p (n,V) exceeds u (n,1) times its total. A large vocabulary in two
    steps: which block of tokens, then which token in it, as running sums are slow and sums are fast."""
    n, V = p.shape
    if V <= 16 * CDF_BLOCK:
        cdf = p.cumsum(-1)
        return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=V - 1)
    blocks = (F.pad(p, (0, -V % CDF_BLOCK)) if V % CDF_BLOCK else p).view(n, -1, CDF_BLOCK)
    mass = blocks.sum(-1)
    cdf = mass.cumsum(-1)
    x = u * cdf[:, -1:]
    b = torch.searchsorted(cdf, x, right=True).clamp_(max=cdf.shape[1] - 1)
    inside = blocks.gather(1, b[..., None].expand(n, 1, CDF_BLOCK))[:, 0].cumsum(-1)
    x = (x - (cdf - mass).gather(1, b)).clamp_(min=0)  # rounding must not leave the block, nor reach a token of probability 0
    x = torch.minimum(x, inside[:, -1:].nextafter(torch.zeros_like(x)))
    return (torch.searchsorted(inside, x, right=True) + b * CDF_BLOCK).clamp_(max=V - 1)  # a probability that is nan stays inside


def decode_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """What attends to the cache: flash-attn if installed, else PyTorch's copy of it on CUDA, else two batched matmuls."""
    if attention_kernel(device, dtype) == "flash-attn":
        return "flash-attn"
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and "seqused_k" in str(torch_flash.default._schema):
        return "torch flash"
    return "bmm"


class Cache:
    """Keys and values of `slots` sequences of up to `length` tokens, allocated once: kv (layers, 2, slots, ...), a slot being
    (length, Hkv, h) for the flash kernels and (Hkv, length, h) for batched matmuls."""

    def __init__(self, model: Model, slots: int, length: int):
        c, w = model.config, model.embed_tokens.weight
        self.kernel, self.heads, self.length, h = decode_kernel(w.device, w.dtype), c.num_key_value_heads, length, c.head_dim
        shape = (self.heads, length, h) if self.kernel == "bmm" else (length, self.heads, h)
        shape = c.num_hidden_layers, 2, slots, *shape
        if w.device.type == "cpu":  # a page of memory is taken when it is first written; huge ones, as numpy's, took 0.3 s a run
            private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
            self.kv = torch.frombuffer(mmap.mmap(-1, math.prod(shape) * w.element_size(), **private), dtype=w.dtype).view(shape)
        else:
            self.kv = w.new_zeros(shape)  # zeros: never nan where nothing was written
        groups, self.width = (self.heads, h) if self.kernel == "bmm" else (1, self.heads * h)  # `width` numbers of a token lie together
        self.flat = [layer.view(-1, self.width) for layer in self.kv]
        start = torch.arange(2 * slots * groups, device=w.device) * length  # in flat: of (keys or values, slot, group)
        self.start = start.view(2, slots, groups).transpose(0, 1).flatten(1).contiguous()  # (slots, 2 * groups): a slot's, keys first
        self.views = None, None  # of the last step: made again only when its shape changes
        # 0 where a slot holds a key, -inf where it does not, a copy per KV head as batched matmuls want it
        self.unseen = w.new_full((slots, self.heads, 1, length), -torch.inf) if self.kernel == "bmm" else None

    def where(self, rows, at):
        """Indices in `flat` of places `at` (M,) of slots `rows` (M,): of the keys, then of the values."""
        return self.start[rows] + at[:, None]

    def store(self, layer, where, k, v):
        """k, v (M,Hkv,h) of M tokens at `where`."""
        self.flat[layer].index_copy_(0, where.flatten(), torch.cat((k, v), 1).view(-1, self.width))

    def see(self, where):
        if self.unseen is not None:
            self.unseen.view(-1).index_fill_(0, where[:, :self.heads].flatten(), 0)

    def admit(self, rows, where):
        """New sequences in slots `rows`, whose keys are those at `where`: what the slots held before is not looked at."""
        if self.unseen is not None:
            self.unseen[rows] = -torch.inf
        self.see(where)

    def move(self, dst, src, length):
        """The first `length` tokens of slots `src` over those of slots `dst`."""
        kv = self.kv[:, :, :, :, :length] if self.kernel == "bmm" else self.kv[:, :, :, :length]
        kv[:, :, dst] = kv[:, :, src]
        if self.unseen is not None:
            self.unseen[dst] = self.unseen[src]

    def decode(self, n: int, position: Tensor, length: int):
        """attend() for one new token in each of the first n slots, at `position` (n,) < length. No step allocates or copies
        what grows with the cache: keys and values are prefix views, and the query heads of one KV head go together."""
        if self.kernel == "flash-attn":
            used = position.int()

            def attend(layer, q, k, v):
                K, V = self.kv[layer, :, :n]
                return flash_attn_with_kvcache(q[:, None], K, V, k[:, None], v[:, None], cache_seqlens=used, causal=True)[:, 0]
            return attend
        where = self.where(slice(n), position)
        if self.kernel == "torch flash":  # packed sequences of self.length places, of which the first position + 1 count
            border, used = torch.arange(n + 1, device=position.device, dtype=torch.int32), (position + 1).int()

            def attend(layer, q, k, v):
                self.store(layer, where, k, v)
                K, V = self.kv[layer, :, :n].flatten(1, 2)
                return torch_flash(q, K, V, border, border * self.length, 1, self.length, 0.0, False, False, seqused_k=used)[0]
            return attend
        self.see(where)
        if self.views[0] != (n, length):
            K, V = self.kv[:, :, :n, :, :length].flatten(2, 3).unbind(1)  # (layers, n*Hkv, length, h)
            self.views = (n, length), self.unseen[:n, :, :, :length].flatten(0, 1), K.transpose(2, 3).unbind(), V.unbind()
        _, mask, K, V = self.views

        def attend(layer, q, k, v):
            self.store(layer, where, k, v)
            h = q.shape[-1]
            scores = torch.baddbmm(mask, q.reshape(len(mask), -1, h), K[layer], alpha=h**-0.5)
            return scores.softmax(-1).bmm(V[layer]).view_as(q)
        return attend


def capture(step, pool):
    """A CUDA graph of step(); it is recorded, not run."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # a checkpoint may be copying in another thread
        step()
    return graph


class Decoder:
    """The state of all slots, in place, and one decoding step over the first n of them: forward, draw, write down. A step
    reads and writes these buffers alone, never waits for the host and has no shape that depends on data, so that on CUDA it
    is replayed as a graph, one per (rows, length). Weights move at every FSDP unshard: a Decoder lives for one generate()."""

    def __init__(self, model, slots, length, goes_on, sampling, min_new_tokens, watched):
        device = goes_on.device
        self.model, self.cache, self.length, self.device = model, Cache(model, slots, length), length, device
        self.goes_on, self.watched = goes_on, watched  # (V,) int64: 0 for an EOS; 1 for a token that may end a stop string
        self.sampling, self.min_new_tokens = sampling, min_new_tokens
        # per slot: the token to be fed next and its place; places of the last prompt token and past the last allowed one;
        # 1 while the sequence goes on; 1 once it drew a watched token
        self.state = torch.zeros(6, slots, dtype=torch.long, device=device)
        self.token, self.position, self.first, self.last, self.alive, self.hint = self.state
        self.u, self.logp = (torch.zeros(slots, length, device=device) for _ in range(2))  # of the token drawn at a place
        self.drawn = torch.zeros(slots, length, dtype=torch.long, device=device)
        self.base = torch.arange(slots, device=device) * length
        self.rope = model.rope(torch.arange(length, device=device))
        self.graphs, self.uses = {}, Counter()
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def step(self, n, length):
        """Feed the next token of slots [0, n), all at places < length. A sequence that is over stays where it is and
        writes beyond its end."""
        token, position, first, last, alive, hint = self.state[:, :n].unbind()
        rope = [table.index_select(0, position) for table in self.rope]
        hidden = self.model.body(token, position, self.cache.decode(n, position, length), rope)
        logits, at, banned = exact_logits(hidden, self.model.head_weight), self.base[:n] + position, None
        if self.min_new_tokens:
            banned = (position - first < self.min_new_tokens)[:, None] & (self.goes_on == 0)
        new, logp = draw(logits, self.u.take(at), *self.sampling, banned)
        token.copy_(new)
        self.drawn.put_(at, new)
        self.logp.put_(at, logp)
        if self.watched is not None:
            hint.bitwise_or_(self.watched.take(new) * alive)
        position.add_(alive)
        alive.mul_(self.goes_on.take(new)).mul_(position < last)

    def run(self, n, longest, slots):
        """step() over at least n slots and places < longest; as a graph from the fourth time that a shape comes."""
        if self.pool is None:
            return self.step(n, min(self.length, -(-longest // 8) * 8))
        n = min(slots, 1 << (n - 1).bit_length() if n <= 16 else -(-n // 16) * 16)  # few shapes; free slots idle along
        longest = min(self.length, -(-longest // 256) * 256) if self.cache.kernel == "bmm" else self.length
        self.uses[n, longest] += 1
        if self.uses[n, longest] <= GRAPH_AFTER:
            return self.step(n, longest)
        if (n, longest) not in self.graphs:
            self.graphs[n, longest] = capture(lambda: self.step(n, longest), self.pool)
        self.graphs[n, longest].replay()

    def admit(self, slots, prompts, keys, prefix, max_new_tokens):
        """`prompts` into `slots` with the uniform numbers of `keys`; prefix[i][layer] are the keys and values (p-1,Hkv,h) of
        prompt i without its last token, which is the first to be fed; prefix[i] may be empty where p = 1."""
        rows = torch.tensor(slots, device=self.device)
        first = torch.tensor([len(p) - 1 for p in prompts], device=self.device)
        at = torch.cat([torch.arange(len(p) - 1) for p in prompts]).to(self.device)
        where = self.cache.where(rows.repeat_interleave(first), at)
        self.cache.admit(rows, where)
        for layer in range(len(self.cache.kv) if len(at) else 0):
            self.cache.store(layer, where, *(torch.cat([kv[layer][x] for kv in prefix if kv]) for x in (0, 1)))
        ids = torch.tensor([p[-1] for p in prompts], device=self.device)
        self.state[:, rows] = torch.stack((ids, first, first, first + max_new_tokens, torch.ones_like(ids), torch.zeros_like(ids)))
        places = (self.base[rows] + first)[:, None] + torch.arange(max_new_tokens, device=self.device)
        self.u.view(-1)[places] = uniforms(keys, max_new_tokens).to(self.device)

    def move(self, dst, src, longest):
        dst, src = (torch.tensor(x, device=self.device) for x in (dst, src))
        self.cache.move(dst, src, longest)
        self.state[:, dst] = self.state[:, src]
        for t in (self.u, self.logp, self.drawn):
            t[dst] = t[src]


def prefill(model: Model, prompts: list[list[int]]):
    """[[(k, v) per layer] per prompt], each (p-1,Hkv,h), of all prompts but their last tokens, packed end to end."""
    device, lengths, kv = model.embed_tokens.weight.device, [len(p) - 1 for p in prompts], []
    some = [n for n in lengths if n]
    if not some:
        return [[] for _ in prompts]
    where, inner = causal(some, device, model.embed_tokens.weight.dtype)

    def attend(layer, q, k, v):
        kv.append((k.split(lengths), v.split(lengths)))
        return inner(layer, q, k, v)
    model.body(torch.tensor([t for p in prompts for t in p[:-1]], device=device), where, attend)
    return [[(k[i], v[i]) for k, v in kv] for i in range(len(prompts))]


def stop_tokens(stop, tokenizer, vocab_size):
    """(V,) int64, 1 for the tokens whose text may complete a stop string, so that only they cost a look at the text."""
    texts = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    ends = {s[-1] for s in stop}
    hit = [not e.isascii() or e.isspace() or e in (t or "") for e in ends for t in texts]
    table = torch.zeros(vocab_size, dtype=torch.long)
    table[:len(texts)] = torch.tensor(hit).view(len(ends), -1).any(0).long()
    return table


@torch.inference_mode()  # cheaper calls than under no_grad: views are not tracked
def generate(model: Model, prompts: list[list[int]], n: int = 1, max_new_tokens: int = 256, temperature: float = 1.0,
             top_p: float = 1.0, seed: int | list[int] = 0, eos_ids: list[int] | None = None, *, top_k: int = 0,
             min_new_tokens: int = 0, stop: tuple[str, ...] = (), tokenizer=None, slots: int | None = None,
             kv_tokens: int | None = None, progress: bool = False, on_token=None, cancel=lambda: False) -> list[Rollout]:
    """n samples of each prompt (token ids), prompt-major. `seed`: one int, or one per prompt. `eos_ids`: None is the
    model's own, [] is none. `stop` strings (need `tokenizer`) end a response and stay in it. `kv_tokens` bounds the cache
    (default: 60 % of free GPU memory, 2 GiB on CPU), `slots` the rows decoded at once. Raises ValueError before any work
    if a request cannot fit. on_token(request, token) is called for each token: for streaming. cancel() is asked at least
    every 64 steps; where it says True, Cancelled is raised."""
    device, c = model.embed_tokens.weight.device, model.config
    if not prompts:
        return []
    if n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or (slots is not None and slots < 1):
        raise ValueError(f"generate: n={n}, max_new_tokens={max_new_tokens}, slots={slots} must be >= 1, temperature={temperature}, "
                         f"top_k={top_k} >= 0, top_p={top_p} in (0, 1]")
    for i, p in enumerate(prompts):
        if not p or not all(0 <= t < c.vocab_size for t in p):
            raise ValueError(f"generate: prompt {i} is empty" if not p else
                             f"generate: prompt {i} has a token id outside the vocabulary of {c.vocab_size}")
    if stop and tokenizer is None:
        raise ValueError("generate: stop strings need tokenizer=")
    eos = {e for e in (model.eos_ids if eos_ids is None else eos_ids) if 0 <= e < c.vocab_size}
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"generate: {len(seeds)} seeds for {len(prompts)} prompts; give one, or one per prompt")

    length = max(map(len, prompts)) + max_new_tokens
    token_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.embed_tokens.weight.element_size()
    if kv_tokens is None:
        free = CPU_CACHE_BYTES
        if device.type == "cuda":  # what PyTorch holds but does not use is free too
            free = 0.6 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
        kv_tokens = int(free) // token_bytes
    if kv_tokens < length:
        raise ValueError(f"generate: the longest prompt ({length - max_new_tokens} tokens) + max_new_tokens ({max_new_tokens}) "
                         f"needs {length} cache tokens, the budget is {kv_tokens}; raise kv_tokens or shorten the request")
    slots = min(slots or len(prompts) * n, kv_tokens // length, len(prompts) * n)

    goes_on = torch.ones(c.vocab_size, dtype=torch.long)
    goes_on[list(eos)] = 0
    watched = stop_tokens(stop, tokenizer, c.vocab_size).to(device) if stop else None
    with model.for_sampling():
        decoder = Decoder(model, slots, length, goes_on.to(device), (temperature, top_k, top_p), min_new_tokens, watched)
        return run(decoder, prompts, seeds, n, max_new_tokens, eos, stop, tokenizer, progress, on_token, cancel)


def run(decoder, prompts, seeds, n, max_new_tokens, eos, stop, tokenizer, progress, on_token, cancel) -> list[Rollout]:
    """The host's side: requests into slots, steps, results out of slots."""
    waiting = deque((i, j) for i in range(len(prompts)) for j in range(n))
    results: list[Rollout | None] = [None] * len(waiting)
    request, stopped = {}, set()  # slot -> (prompt, sample); slots that a stop string ended
    prefix = {}  # keys and values of the one prompt that was prefilled and not yet admitted with all its samples
    patience = 8 if decoder.device.type == "cuda" and not on_token else 1  # steps between looks: each waits for the GPU

    def admit(free):
        """Waiting requests into slots `free`, each prompt prefilled once for all its samples; the number admitted."""
        nonlocal prefix
        took, new = [], []
        while waiting and len(took) < len(free):
            i = waiting[0][0]
            if i not in prefix and i not in new:
                if new and sum(len(prompts[k]) for k in new) + len(prompts[i]) > PREFILL_TOKENS:
                    break
                new.append(i)
            took.append(waiting.popleft())
        prefix.update(zip(new, prefill(decoder.model, [prompts[i] for i in new])))
        decoder.admit(free[:len(took)], [prompts[i] for i, _ in took], [request_key(prompts[i], seeds[i], j) for i, j in took],
                      [prefix[i] for i, _ in took], max_new_tokens)
        request.update(zip(free, took))
        prefix = {i: prefix[i] for i, _ in list(waiting)[:1] if i in prefix}
        return len(took)

    def refill(over, live):
        """Waiting requests into the rows that are `over`, then into free slots; where none waits, the last rows close the holes.
        The number of rows that are live now."""
        free, admitted = over + list(range(live, slots)), 0
        while waiting and admitted < len(free):
            admitted += admit(free[admitted:])
        live, holes = live + max(0, admitted - len(over)), over[admitted:]
        left, gone = live - len(holes), set(holes)
        dst, src = [h for h in holes if h < left], [r for r in range(left, live) if r not in gone]
        if dst:
            decoder.move(dst, src, int(decoder.position[src].max()))
            request.update({d: request[s] for d, s in zip(dst, src)})
        return left

    def decode(live):
        """Steps, until a sixteenth of the rows is over (taking rows out is not free either), or 64."""
        longest = int(decoder.position[:live].max()) + 1
        for steps in count(1):
            going = decoder.alive[:live].tolist() if on_token else ()
            decoder.run(live, min(longest, decoder.length), slots)
            longest += 1
            for row, token in enumerate(decoder.token[:live].tolist() if on_token else ()):
                if going[row]:
                    on_token(request[row], token)
            if steps % patience == 0:
                if stop:
                    end_at_stop_strings(live)
                if steps == 64 or live - int(decoder.alive[:live].sum()) > live // 16:
                    return

    def end_at_stop_strings(live):
        """Rows that drew a token which may end a stop string since the last look: cut where the text first holds one."""
        for row in decoder.hint[:live].nonzero()[:, 0].tolist():
            first, end = decoder.first[row].item(), decoder.position[row].item()
            tokens = decoder.drawn[row, first:end].tolist()
            for k in range(max(1, len(tokens) - patience + 1), len(tokens) + 1):
                text = tokenizer.decode(tokens[:k])
                if any(s in text for s in stop):
                    decoder.position[row], decoder.alive[row] = first + k, 0
                    stopped.add(row)
                    break
        decoder.hint[:live] = 0

    def harvest(live):
        """The rows that are over; what they hold goes into the results."""
        _, position, first, _, alive, _ = decoder.state[:, :live].tolist()
        over = [row for row in range(live) if not alive[row]]
        for row in over:
            (i, j), at = request[row], slice(first[row], position[row])
            drawn = decoder.drawn[row, at].tolist()
            results[i * n + j] = Rollout(prompts[i] + drawn, len(prompts[i]), decoder.logp[row, at].tolist(),
                                         drawn[-1] in eos or row in stopped)
            stopped.discard(row)
        if progress and bar.format_dict["elapsed"]:
            going = sum(position[row] - first[row] for row in range(live) if alive[row])
            tokens = going + sum(len(r.logp) for r in results if r)
            bar.set_postfix_str(f"{tokens / bar.format_dict['elapsed']:.0f} tok/s", refresh=False)
        bar.update(len(over))
        return over

    slots, live = len(decoder.base), 0  # slots [0, live) hold sequences
    with tqdm(total=len(results), desc="rollout", unit="seq", disable=not progress, leave=False) as bar:
        while waiting or live:
            if cancel():
                raise Cancelled
            live = refill(harvest(live), live)
            if live:
                decode(live)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="One prompt, printed as it is sampled.")
    parser.add_argument("model", help="checkpoint directory or hub id")
    parser.add_argument("prompt")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=0, help="0 is off")
    parser.add_argument("--min_new_tokens", type=int, default=0)
    parser.add_argument("--stop", nargs="*", default=(), help="texts that end the response")
    parser.add_argument("--kv_tokens", "--kv-tokens", type=int, help="tokens the cache may hold")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from transformers import PreTrainedTokenizerFast
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = Model.from_pretrained(args.model, torch.bfloat16 if device == "cuda" else torch.float32, device)
        tokenizer, said = PreTrainedTokenizerFast.from_pretrained(model.source), []

        def show(_, token):  # decode from the start: a token may be half a character
            before = tokenizer.decode(said)
            said.append(token)
            sys.stdout.write(tokenizer.decode(said)[len(before):])
            sys.stdout.flush()
        generate(model, [tokenizer.encode(args.prompt)], max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                 top_p=args.top_p, seed=args.seed, top_k=args.top_k, min_new_tokens=args.min_new_tokens, stop=tuple(args.stop),
                 tokenizer=tokenizer, kv_tokens=args.kv_tokens, on_token=show)
        print()
    except KeyboardInterrupt:
        print(flush=True)
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"rollout.py: {str(e).splitlines()[0]}")


if __name__ == "__main__":
    main()
