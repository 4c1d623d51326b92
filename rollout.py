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
import sys
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from model import Model, attention_kernel, causal

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

PREFILL_TOKENS = 16384  # prompt tokens prefilled at once
CPU_CACHE_BYTES = 2 * 2**30


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
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    p = logp.exp() if banned is None else logp.exp().masked_fill(banned, 0)
    if temperature == 0:
        token = p.argmax(-1)
    else:
        if top_k and top_k < p.shape[-1]:
            p = p.masked_fill(p < p.topk(top_k).values[:, -1:], 0)
        if top_p < 1:  # the smallest set of likeliest tokens that holds top_p; at least one
            ordered, index = p.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p * ordered.sum(-1, keepdim=True)
            p = p.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), 0)
        cdf = p.cumsum(-1)
        token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=p.shape[-1] - 1)
    return token, logp.gather(1, token[:, None])[:, 0]


class Cache:
    """Keys and values of `slots` sequences of up to `length` tokens, per layer: (slots, Hkv, length, head_dim), or
    (slots, length, Hkv, head_dim) where flash-attn decodes."""

    def __init__(self, model: Model, slots: int, length: int):
        c, w = model.config, model.embed_tokens.weight
        self.flash, self.scale = attention_kernel(w.device, w.dtype) == "flash-attn", c.head_dim**-0.5
        shape = (slots, *((length, c.num_key_value_heads) if self.flash else (c.num_key_value_heads, length)), c.head_dim)
        self.kv = [(w.new_zeros(shape), w.new_zeros(shape)) for _ in range(c.num_hidden_layers)]  # no nan where unwritten

    def store(self, layer, rows, at, k, v):
        """k, v (M,Hkv,h) of M tokens into slots `rows` (M,), places `at` (M,)."""
        where = (rows, at) if self.flash else (rows, slice(None), at)
        K, V = self.kv[layer]
        K[where], V[where] = k, v

    def move(self, dst, src, length):
        """The first `length` tokens of slots `src` over those of slots `dst`."""
        used = (slice(length),) if self.flash else (slice(None), slice(length))
        for K, V in self.kv:
            K[(dst, *used)], V[(dst, *used)] = K[(src, *used)], V[(src, *used)]

    def decode(self, position: Tensor, length: int):
        """attend() for one new token in each of the first n slots, at `position` (n,) < length. Without flash-attn: two
        batched matmuls, the query heads of one KV head grouped, so that keys and values are read once, never repeated."""
        n = len(position)
        if self.flash:
            def attend(layer, q, k, v):
                K, V = self.kv[layer]
                return flash_attn_with_kvcache(q[:, None], K[:n], V[:n], k[:, None], v[:, None],
                                               cache_seqlens=position.int(), causal=True)[:, 0]
            return attend
        rows, heads = torch.arange(n, device=position.device), self.kv[0][0].shape[1]
        future = torch.arange(length, device=position.device) > position[:, None]
        mask = torch.zeros_like(future, dtype=torch.float32).masked_fill(future, -torch.inf)
        mask = mask[:, None].expand(n, heads, length).reshape(n * heads, 1, length)

        def attend(layer, q, k, v):
            self.store(layer, rows, position, k, v)
            K, V = (x[:n, :, :length].flatten(0, 1) for x in self.kv[layer])  # views
            scores = q.reshape(n * heads, -1, q.shape[-1]) @ K.transpose(1, 2)
            weights = torch.add(mask, scores, alpha=self.scale).softmax(-1).to(V.dtype)
            return (weights @ V).view_as(q)
        return attend


def stop_tokens(stop, tokenizer, vocab_size):
    """(V,) bool: the tokens whose text may complete a stop string, so that only they cost a look at the text."""
    texts = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    ends = {s[-1] for s in stop}
    hit = [not e.isascii() or e.isspace() or e in (t or "") for e in ends for t in texts]
    table = torch.zeros(vocab_size, dtype=torch.bool)
    table[:len(texts)] = torch.tensor(hit).view(len(ends), -1).any(0)
    return table


@torch.no_grad()
def generate(model: Model, prompts: list[list[int]], n: int = 1, max_new_tokens: int = 256, temperature: float = 1.0,
             top_p: float = 1.0, seed: int | list[int] = 0, eos_ids: list[int] | None = None, *, top_k: int = 0,
             min_new_tokens: int = 0, stop: tuple[str, ...] = (), tokenizer=None, slots: int | None = None,
             kv_tokens: int | None = None, progress: bool = False, on_token=None) -> list[Rollout]:
    """n samples of each prompt (token ids), prompt-major. `seed`: one int, or one per prompt. `eos_ids`: None is the
    model's own, [] is none. `stop` strings (need `tokenizer`) end a response and stay in it. `kv_tokens` bounds the cache
    (default: 60 % of free GPU memory, 2 GiB on CPU), `slots` the rows decoded at once. Raises ValueError before any work
    if a request cannot fit. on_token(request, token) is called for each token: for streaming."""
    device, c = model.embed_tokens.weight.device, model.config
    if not prompts:
        return []
    if n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: n={n}, max_new_tokens={max_new_tokens} must be >= 1, temperature={temperature} >= 0, "
                         f"top_p={top_p} in (0, 1]")
    for i, p in enumerate(prompts):
        if not p or not all(0 <= t < c.vocab_size for t in p):
            raise ValueError(f"generate: prompt {i} is empty" if not p else
                             f"generate: prompt {i} has a token id outside the vocabulary of {c.vocab_size}")
    if stop and tokenizer is None:
        raise ValueError("generate: stop strings need tokenizer=")
    eos = torch.tensor(model.eos_ids if eos_ids is None else eos_ids, dtype=torch.long, device=device)
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
    waiting = deque((i, j) for i in range(len(prompts)) for j in range(n))
    slots = min(slots or len(waiting), kv_tokens // length, len(waiting))

    cache, every_slot = Cache(model, slots, length), torch.arange(slots, device=device)
    token, position, count = (torch.zeros(slots, dtype=torch.long, device=device) for _ in range(3))
    done, ended = (torch.zeros(slots, dtype=torch.bool, device=device) for _ in range(2))  # ended: by EOS or stop string
    u = torch.zeros(slots, max_new_tokens, device=device)
    out = torch.zeros(slots, max_new_tokens + 1, dtype=torch.long, device=device)  # the last column takes what rows
    out_logp = torch.zeros(slots, max_new_tokens + 1, device=device)  # that are over draw until they are taken out
    request = [(0, 0)] * slots  # (prompt, sample) in each slot
    partly = {}  # keys, values, last logits of the one prompt that is prefilled and not yet admitted with all its samples
    suspicious = stop_tokens(stop, tokenizer, c.vocab_size).to(device) if stop else None
    results: list[Rollout | None] = [None] * len(waiting)
    patience = 8 if device.type == "cuda" else 1  # steps between looks at `done`: each look waits for the GPU

    def accept(rows, logits):
        """Draw the next token of `rows` (slots) from their logits, write it down, see which rows are over."""
        at, alive, banned = count[rows], ~done[rows], None
        if min_new_tokens:
            banned = torch.zeros_like(logits, dtype=torch.bool).index_fill(1, eos, True) & (at < min_new_tokens)[:, None]
        new, logp = draw(logits, u[rows, at.clamp(max=max_new_tokens - 1)], temperature, top_k, top_p, banned)
        token[rows], out[rows, at], out_logp[rows, at] = new, new, logp
        count[rows] = at + alive
        end = torch.isin(new, eos)
        if stop:
            for i in (suspicious[new] & alive & ~end).nonzero()[:, 0].tolist():
                text = tokenizer.decode(out[rows[i], :at[i] + 1].tolist())
                end[i] = any(s in text for s in stop)
        ended[rows] |= end & alive
        done[rows] |= end | (at + 1 >= max_new_tokens)
        if on_token:
            for row in rows[alive].tolist():
                on_token(request[row], int(token[row]))

    def admit(free):
        """Waiting requests into the `free` slots: prefill their prompts, copy K and V, draw each first token."""
        nonlocal partly
        new, took = {}, []  # prompts to prefill; (slot, prompt, sample)
        while waiting and len(took) < len(free):
            i = waiting[0][0]
            if i not in new and i not in partly:
                if new and sum(len(prompts[k]) for k in new) + len(prompts[i]) > PREFILL_TOKENS:
                    break
                new[i] = None
            took.append((free[len(took)], *waiting.popleft()))
        ready = dict(partly)
        if new:
            lengths, kv = [len(prompts[i]) for i in new], {}
            where, inner = causal(lengths, device, model.embed_tokens.weight.dtype)

            def attend(layer, q, k, v):
                kv[layer] = k, v
                return inner(layer, q, k, v)
            hidden = model.body(torch.tensor([t for i in new for t in prompts[i]], device=device), where, attend)
            ends = torch.tensor(lengths, device=device).cumsum(0)
            logits, split = model.logits(hidden[ends - 1]), {m: (k.split(lengths), v.split(lengths)) for m, (k, v) in kv.items()}
            for b, i in enumerate(new):
                ready[i] = [(k[b], v[b]) for k, v in split.values()], logits[b]
        rows = torch.tensor([slot for slot, _, _ in took], device=device)
        lens = torch.tensor([len(prompts[i]) for _, i, _ in took], device=device)
        at = torch.cat([torch.arange(len(prompts[i])) for _, i, _ in took]).to(device)
        for layer in range(c.num_hidden_layers):
            k, v = (torch.cat([ready[i][0][layer][x] for _, i, _ in took]) for x in (0, 1))
            cache.store(layer, rows.repeat_interleave(lens), at, k, v)
        position[rows], count[rows], done[rows], ended[rows] = lens, 0, False, False
        u[rows] = uniforms([request_key(prompts[i], seeds[i], j) for _, i, j in took], max_new_tokens).to(device)
        for slot, i, j in took:
            request[slot] = i, j
        partly = {i: ready[i] for i, _ in list(waiting)[:1] if i in ready}
        accept(rows, torch.stack([ready[i][1] for _, i, _ in took]))
        return len(took)

    def close(holes, live):
        """Move the last of the `live` rows into the holes; the number of rows that are left."""
        left, gone = live - len(holes), set(holes)
        dst = torch.tensor([h for h in holes if h < left], dtype=torch.long, device=device)
        src = torch.tensor([r for r in range(left, live) if r not in gone], dtype=torch.long, device=device)
        cache.move(dst, src, int(position[:live].max()))
        for t in (token, position, count, done, ended, u, out, out_logp):
            t[dst] = t[src]
        for d, s in zip(dst.tolist(), src.tolist()):
            request[d] = request[s]
        return left

    live = 0  # slots [0, live) hold sequences
    with tqdm(total=len(results), desc="rollout", unit="seq", disable=not progress, leave=False) as bar:
        while waiting or live:
            over = done[:live].nonzero()[:, 0].tolist()
            for row, k in zip(over, count[over].tolist()):
                i, j = request[row]
                results[i * n + j] = Rollout(prompts[i] + out[row, :k].tolist(), len(prompts[i]), out_logp[row, :k].tolist(),
                                             bool(ended[row]))
            bar.update(len(over))
            free, admitted = over + list(range(live, slots)), 0
            while waiting and admitted < len(free):
                admitted += admit(free[admitted:])
            live += max(0, admitted - len(over))
            if holes := over[admitted:]:
                live = close(holes, live)
            if not live or done[:live].any():  # some are over with their first token
                continue
            rows, longest, drawn = every_slot[:live], int(position[:live].max()) + 1, 0
            while True:  # decode until a sixteenth of the rows is over: taking rows out is not free either
                hidden = model.body(token[:live], position[:live], cache.decode(position[:live], longest))
                position[:live] += ~done[:live]
                accept(rows, model.logits(hidden))
                longest, drawn = min(longest + 1, length), drawn + 1
                if drawn % patience == 0 and int(done[:live].sum()) > live // 16:
                    break
            speed = bar.format_dict["elapsed"]
            if progress and speed:
                bar.set_postfix_str(f"{sum(len(r.logp) for r in results if r) / speed:.0f} tok/s", refresh=False)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="One prompt, printed as it is sampled.")
    parser.add_argument("model", help="checkpoint directory or hub id")
    parser.add_argument("prompt")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
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
                 top_p=args.top_p, seed=args.seed, on_token=show)
        print()
    except (ValueError, OSError) as e:
        sys.exit(f"rollout.py: {e}")


if __name__ == "__main__":
    main()
