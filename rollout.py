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
sample index) alone, so slots, batch order and number of processes do not change a response but by
the rounding of other shapes.
"""
import argparse
import hashlib
import sys
from collections import Counter, deque
from dataclasses import dataclass
from functools import partial

import torch

from model import Model, Progress, attention_kernel, causal, known_ids, pack, varlen_attn

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

PREFILL_TOKENS = 16384  # prompt tokens prefilled at once
CPU_CACHE_BYTES = 2 * 2**30
GPU_CACHE_SHARE = 0.6  # of the memory that is free
GRAPH_AFTER = 3  # steps of one shape before it is captured: they warm it up, rare shapes never pay
COLDEST = 1e-4  # smallest temperature but 0: logits / temperature must not overflow


@dataclass
class Rollout:
    """One response. The sampler fills in the first four fields, where there is a tool the last
    three, too, and train.py the others."""
    tokens: list[int]  # prompt + response, with the EOS if there is one
    prompt_len: int
    logp: list[float]  # of each response token: at the temperature, before top-p, as trained on
    finished: bool  # by itself: EOS or stop string, no call that is open; False: cut
    score: float = 0.0
    status: str = ""  # how grading went
    group: int = 0  # the prompt it answers
    advantage: float = 0.0
    pass_rate: float = 0.0  # mean score of its group
    group_won: bool = False  # whether any advantage in it is above 0
    old_logp: list[float] | None = None  # where the ratio's denominator is not the sampler's
    drawn: list[bool] | None = None  # of each response token: the policy's, not a tool's; None: all
    calls: int = 0  # that a tool was asked
    failed_calls: int = 0

    @property
    def length(self):
        """Tokens that the policy drew."""
        return len(self.own(self.logp))

    def own(self, values):
        """Those of `values` (one per response token) that belong to what the policy drew."""
        if self.drawn is None:
            return values
        return [value for value, drawn in zip(values, self.drawn) if drawn]


@torch.inference_mode()  # cheaper calls than under no_grad: views are not tracked
def generate(model, prompts, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, seed=0,
             eos_ids=None, *, stop=(), tokenizer=None, slots=None, kv_tokens=None,
             progress=False) -> list[Rollout]:
    """n samples of each of `prompts` (lists of token ids), prompt-major.

    max_new_tokens, seed: one int, or one per prompt. temperature: 0 is greedy. eos_ids: None is
    the model's own, [] is none. stop: strings that end a response and stay in it (need
    `tokenizer`). slots: rows decoded at once (default: all that fit). kv_tokens: tokens the cache
    may hold (default: 60 % of the free GPU memory, 2 GiB on a CPU). progress: show rollouts of
    over 5 s on stderr.
    Raises ValueError, one line, before any work if a request is wrong or cannot fit."""
    if not prompts:
        return []
    seeds, limits = per_prompt(prompts, seed), per_prompt(prompts, max_new_tokens)
    check(model, prompts, seeds, n, limits, temperature, top_p, stop, tokenizer)
    requests = [Request(*request, sample)
                for request in zip(prompts, limits, seeds) for sample in range(n)]
    length = max(len(request.prompt) + request.limit for request in requests)
    fit = slots_that_fit(model, length, kv_tokens)
    slots = min(fit, len(requests), slots or fit)

    ends = known_ids(list(model.eos_ids if eos_ids is None else eos_ids), model.config)
    decoder = Decoder(model, slots, length, max(limits), ends,
                      temperature=temperature, top_p=top_p)
    batch = Batch(decoder, requests, ends, stop, tokenizer)
    batch.refill([])
    while batch.live:
        batch.decode()  # some steps for all rows,
        over = batch.harvest()  # what ended becomes results,
        batch.refill(over)  # waiting requests and the last rows take its place
        if progress:
            batch.report()
    return [request.result for request in requests]  # cache and graphs die with this frame


# ---- Turns: a policy that calls a tool ----------------------------------------------------------


@dataclass
class Talk:
    """A response that is still being written."""
    rollout: Rollout
    room: int  # for so many more tokens, those of replies included
    seed: str  # of its later turns
    call: str | None = None  # with which the last turn ended

    def add(self, tokens, logp, drawn):
        self.room -= len(tokens)
        self.rollout.tokens += tokens
        self.rollout.logp += logp
        self.rollout.drawn += [drawn] * len(tokens)


def converse(model, prompts, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, seed=0,
             eos_ids=None, *, tool, turns=10, turn_tokens=0, stop=(), tokenizer=None,
             **how) -> list[Rollout]:
    """generate() with a tool (tools.Tool). A turn that ends in a call is answered: the reply goes
    behind it as tokens that the policy did not draw (`drawn` False, `logp` 0), and the policy goes
    on, for at most `turns` turns of `turn_tokens` tokens (0: any) and max_new_tokens in all,
    replies included. finished: the last turn ended by itself, in no call.

    Every turn is a generate() of its own. It prefills the conversation anew: a little compute for a
    sampler that need not know of tools."""
    how |= {"temperature": temperature, "top_p": top_p, "eos_ids": eos_ids, "tokenizer": tokenizer,
            "stop": (*stop, *tool.ends, tool.call_close)}
    seeds, budgets = per_prompt(prompts, seed), per_prompt(prompts, max_new_tokens)
    talks = [Talk(Rollout(list(prompt), len(prompt), [], False, drawn=[]), budget, f"{seed} {i}")
             for prompt, budget, seed in zip(prompts, budgets, seeds) for i in range(n)]
    rollouts = [talk.rollout for talk in talks]
    for turn in range(turns):
        if turn:
            talks = hear([talk for talk in talks if talk.call is not None], tool, tokenizer)
        limits = [min(turn_tokens or talk.room, talk.room) for talk in talks]
        if turn:
            said = generate(model, [talk.rollout.tokens for talk in talks], 1, limits,
                            seed=[f"{talk.seed} {turn}" for talk in talks], **how)
        else:  # the samples of a prompt share its prefill
            said = generate(model, prompts, n, limits[::n], seed=seeds, **how)
        for talk, new in zip(talks, said):
            tokens = new.tokens[new.prompt_len:]
            talk.add(tokens, new.logp, drawn=True)
            talk.call = tool.call_in(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
            talk.rollout.finished = new.finished and talk.call is None
    return rollouts


def hear(talks, tool, tokenizer):
    """Puts the tool's replies behind the calls, and returns the talks that have room to go on.
    What looks like a special token in a reply is mere text."""
    before, after = [tokenizer.encode(tag, add_special_tokens=False)
                     for tag in (tool.reply_open, tool.reply_close)]
    going = []
    for talk, (text, failed) in zip(talks, tool.ask([talk.call for talk in talks])):
        talk.rollout.calls += 1
        talk.rollout.failed_calls += failed
        text = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        reply = before + text + after
        if len(reply) < talk.room:
            talk.add(reply, [0.0] * len(reply), drawn=False)
            going.append(talk)
    return going


def per_prompt(prompts, value):
    return [value] * len(prompts) if isinstance(value, int) else list(value)


# ---- The host's side: which request has which slot ---------------------------------------------


@dataclass
class Request:
    prompt: list[int]
    limit: int  # tokens of the response
    seed: int | str
    sample: int
    result: Rollout | None = None


class Batch:
    """Requests in the slots [0, live). Some may be over already, until harvest() takes them."""

    def __init__(self, decoder, requests, ends, stop, tokenizer):
        self.decoder = decoder
        self.requests = requests
        self.ends = ends
        self.stop = stop
        self.tokenizer = tokenizer
        self.waiting = deque(requests)  # all samples of a prompt, then those of the next
        self.live = 0
        self.made = 0  # tokens of the requests that are over
        self.request = {}  # slot -> its request
        self.stopped = set()  # slots that a stop string ended
        self.prefilled = None  # the prompt that was prefilled last
        self.source = 0  # a slot that holds its keys and values
        self.patience = 8 if decoder.on_gpu or stop else 1  # steps between looks: a look costs
        self.progress = Progress()

    def decode(self):
        """At most 64 steps; fewer if over a sixteenth of the rows is over, as taking rows out is
        not free either."""
        d = self.decoder
        longest = int(d.position[:self.live].max())
        for steps in range(1, 65):
            d.run(self.live, longest + steps)
            if steps % self.patience == 0:
                if self.stop:
                    self.cut_at_stop_strings()
                if int(d.alive[:self.live].sum()) < self.live - self.live // 16:
                    return

    def cut_at_stop_strings(self):
        """Rows whose text holds a stop string since the last look end where it is complete."""
        d = self.decoder
        drawn = d.tokens[:self.live].cpu()
        tail = self.patience + 4 * max(map(len, self.stop))  # a character is at most 4 tokens
        for row, made in enumerate(d.made[:self.live].tolist()):
            start = max(0, made - tail)
            tokens = drawn[row, start:made].tolist()
            if not self.holds_stop(tokens):
                continue
            end = 1
            while not self.holds_stop(tokens[:end]):
                end += 1
            d.made[row] = start + end
            d.alive[row] = 0
            self.stopped.add(row)

    def holds_stop(self, tokens):
        text = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return any(s in text for s in self.stop)

    def harvest(self):
        """The rows that are over; what they hold becomes their requests' results."""
        d = self.decoder
        made, alive = d.state[2:4, :self.live].tolist()
        over = [row for row in range(self.live) if not alive[row]]
        for row in over:
            self.made += made[row]
            request = self.request[row]
            response = d.tokens[row, :made[row]].tolist()
            logp = d.logp[row, :made[row]].tolist()
            finished = response[-1] in self.ends or row in self.stopped
            request.result = Rollout(request.prompt + response, len(request.prompt), logp,
                                     finished)
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
        holes = set(over[len(taken):])
        self.live = rows - len(holes)
        dst = [row for row in holes if row < self.live]
        src = [row for row in range(self.live, rows) if row not in holes]
        if dst:
            self.decoder.move(dst, src)
            self.request.update({to: self.request[source] for to, source in zip(dst, src)})

    def admit(self, slots):
        """The next waiting requests into `slots`. A prompt is prefilled into the slot of its
        first sample; the other samples copy from there, also those admitted later."""
        # Samples of the last prompt may wait for a slot still, and are the next then. The slot that
        # they copy from goes to the first of them, not to another prompt: a copy onto itself.
        slots = sorted(slots, key=lambda slot: slot != self.source)
        requests = [self.waiting.popleft() for _ in slots]
        new = []  # (slot, prompt)
        sources = []
        for slot, request in zip(slots, requests):
            self.request[slot] = request
            if request.prompt is not self.prefilled:
                self.prefilled = request.prompt
                self.source = slot
                if len(request.prompt) > 1:
                    new.append((slot, request.prompt))
            sources.append(self.source)
        longest = max(len(r.prompt) for r in requests)
        at_once = max(1, PREFILL_TOKENS // longest)
        for i in range(0, len(new), at_once):
            self.decoder.prefill(new[i:i + at_once])
        self.decoder.cache.copy(slots, sources, longest - 1)
        self.decoder.start(slots, requests)

    def report(self):
        """Requests finished, tokens made, the time left if all go on to the longest limit."""
        rows = len(self.requests)
        finished = rows - len(self.waiting) - self.live
        made = self.made + int(self.decoder.made[:self.live].sum())
        most = self.made + (rows - finished) * self.decoder.max_new_tokens
        self.progress.show(made / most, f"rollout: {finished} of {rows} rows, {made:,} tokens",
                           "at most")


# ---- The device's side: step, graphs, cache ----------------------------------------------------


class Decoder:
    """The state of all slots, in place, and one decoding step over the first n of them: forward,
    draw, write down. A step reads and writes these buffers alone, never waits for the host and
    has no shape that depends on data, so that on CUDA it is replayed as a graph, one per shape.
    Weights move at every FSDP unshard and the cache must make room for the update: a Decoder
    with all its graphs lives for one generate()."""

    def __init__(self, model, slots, length, max_new_tokens, ends, **how):
        self.model = model
        self.cache = Cache(model, slots, length)
        self.slots = slots
        self.max_new_tokens = max_new_tokens
        self.how = how  # temperature, top_p
        device = model.embed_tokens.weight.device
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.goes_on = torch.ones(model.config.vocab_size, dtype=torch.long, device=device)
        self.goes_on[ends] = 0  # (V,) 0 for tokens that end a response
        # per slot: the token that is fed next, its place in the sequence, response tokens drawn,
        # 1 while the sequence goes on, the most tokens that may be drawn
        self.state = torch.zeros(5, slots, dtype=torch.long, device=device)
        _, self.position, self.made, self.alive, _ = self.state
        # by slot and number in the response; the last column is for rows that are full
        self.u = torch.zeros(slots, max_new_tokens + 1, device=device)
        self.logp = torch.zeros_like(self.u)
        self.tokens = torch.zeros_like(self.u, dtype=torch.long)
        self.rope = model.rope(torch.arange(length, device=device))
        self.graphs = {}
        self.uses = Counter()
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None

    def step(self, n, length):
        """Feed one token of each of the slots [0, n), all at places < length, and draw the next.
        A sequence that is over stays where it is and overwrites what lies beyond its end."""
        token, position, made, alive, limit = self.state[:, :n]
        rope = [table[position] for table in self.rope]
        attend = self.cache.decode(position, length)
        hidden = self.model.body(token, position, attend, rope)  # (n,D)
        column = made[:, None]
        u = self.u[:n].gather(1, column)[:, 0]
        new, logp = draw(self.model.logits(hidden), u, **self.how)
        self.tokens[:n].scatter_(1, column, new[:, None])
        self.logp[:n].scatter_(1, column, logp[:, None])
        token.copy_(new)
        position += alive
        made += alive
        alive *= self.goes_on[new] * (made < limit)

    def run(self, n, longest):
        """step() over at least n slots and `longest` places; on CUDA a known shape is a graph."""
        if self.on_gpu:
            n = graph_rows(n)
            longest = round_up(longest, 256)
            if self.cache.kernel != "matmul":  # it stops at each row's end by itself
                longest = self.cache.length
        n = min(n, self.slots)
        length = min(round_up(longest, 8), self.cache.length)
        self.cache.grow(n, length)
        shape = n, length
        self.uses[shape] += 1
        if not self.on_gpu or self.uses[shape] <= GRAPH_AFTER:
            return self.step(n, length)
        if shape not in self.graphs:
            self.graphs[shape] = capture(partial(self.step, n, length), self.pool)
        self.graphs[shape].replay()

    def prefill(self, new):
        """Keys and values of the prompts of `new`, (slot, prompt), packed end to end: without the
        last tokens, which are fed by the first step."""
        prompts = [prompt for _, prompt in new]
        ids, rows, _ = pack(prompts, [1] * len(prompts), self.device)
        positions, attend_prompts = causal(rows, self.device, self.cache.kv.dtype)
        slot = torch.tensor([slot for (slot, _), row in zip(new, rows) for _ in row],
                            device=self.device)  # (N,) of each token
        self.cache.grow(self.slots, max(map(len, rows)))

        def attend(layer, q, k, v):
            self.cache.store(layer, slot, positions, k, v)
            return attend_prompts(layer, q, k, v)
        self.model.body(ids, positions, attend)

    def start(self, slots, requests):
        """`requests` begin in `slots`, whose cache holds their prompts but for the last tokens."""
        last = [[r.prompt[-1], len(r.prompt) - 1, 0, 1, r.limit] for r in requests]
        self.state[:, slots] = torch.tensor(last, device=self.device).T
        u = torch.stack([uniforms(r.prompt, r.seed, r.sample, self.max_new_tokens)
                         for r in requests])
        self.u[slots, :-1] = u.to(self.device)

    def move(self, dst, src):
        """What slots `src` hold over what `dst` hold."""
        self.cache.copy(dst, src, int(self.position[src].max()))
        self.state[:, dst] = self.state[:, src]
        for buffer in (self.u, self.logp, self.tokens):
            buffer[dst] = buffer[src]


class Cache:
    """Keys and values of `slots` sequences of up to `length` tokens, allocated once:
    kv (layers, 2, slots, length, Hkv, h)."""

    def __init__(self, model, slots, length):
        c = model.config
        weight = model.embed_tokens.weight
        self.kernel = decode_kernel(weight.device, weight.dtype, c.head_dim)
        self.length = length
        tokens = length, c.num_key_value_heads
        if self.kernel == "matmul":  # in memory the tokens of a head lie together
            tokens = tokens[::-1]
        self.kv = weight.new_empty(c.num_hidden_layers, 2, slots, *tokens, c.head_dim)
        if self.kernel == "matmul":
            self.kv = self.kv.transpose(3, 4)
        self.clean = 0  # places [0, clean) hold numbers

    def grow(self, n, length):
        """Zeros in the places < length of n slots, where nothing was written yet: masked or not,
        nan would spread. So memory is taken when sequences get there. n never grows: all slots
        are live until no request waits, and from then on fewer and fewer."""
        if length > self.clean:
            self.kv[:, :, :n, self.clean:length] = 0
            self.clean = length

    def store(self, layer, slot, position, k, v):
        """k, v (M,Hkv,h) of M tokens at `position` (M,) of `slot` (M,)."""
        self.kv[layer, 0][slot, position] = k
        self.kv[layer, 1][slot, position] = v

    def copy(self, dst, src, length):
        """The first `length` tokens of slots `src` over those of slots `dst`."""
        for kv in self.kv:  # a layer at a time, as the right side is a copy
            kv[:, dst, :length] = kv[:, src, :length]

    def decode(self, position, length):
        """attend(layer, q, k, v) for one new token in each of the first n slots, at `position`
        (n,) < length: q (n,H,h), k and v (n,Hkv,h) -> (n,H,h)."""
        n, device = len(position), position.device
        slot = torch.arange(n, device=device)

        if self.kernel == "flash-attn":
            before = position.int()

            def attend(layer, q, k, v):  # it stores k and v itself
                K, V = self.kv[layer, :, :n]
                o = flash_attn_with_kvcache(q[:, None], K, V, k[:, None], v[:, None],
                                            cache_seqlens=before, causal=True)
                return o[:, 0]
            return attend

        if self.kernel == "torch varlen":  # sequences of self.length places, of which some count
            border = torch.arange(n + 1, device=device, dtype=torch.int32)
            border_k = border * self.length
            used = position.int() + 1

            def attend(layer, q, k, v):
                self.store(layer, slot, position, k, v)
                K, V = self.kv[layer, :, :n].flatten(1, 2)
                return varlen_attn(q, K, V, border, border_k, 1, self.length, seqused_k=used,
                                   enable_gqa=True)
            return attend

        heads, h = self.kv.shape[-2:]
        unseen = torch.arange(length, device=device) > position[:, None]  # (n,length)
        mask = self.kv.new_zeros(n, length).masked_fill_(unseen, -torch.inf)
        mask = mask.repeat_interleave(heads, 0)[:, None]  # (n*Hkv,1,length)

        def attend(layer, q, k, v):
            self.store(layer, slot, position, k, v)
            K, V = self.kv[layer, :, :n, :length].transpose(2, 3).flatten(1, 2)
            q = q.reshape(n * heads, -1, h)  # the query heads of one KV head together
            scores = torch.baddbmm(mask, q, K.transpose(1, 2), alpha=h**-0.5)
            return scores.softmax(-1).bmm(V).view(n, -1, h)
        return attend


def decode_kernel(device, dtype, head_dim) -> str:
    """What attends to the cache: flash-attn if installed, else PyTorch's copy of it where that can
    read a part of each sequence (from 2.12 on) and heads of that size, else two batched matmuls."""
    kernel = attention_kernel(device, dtype)
    if kernel == "flash-attn":
        return kernel
    can = torch.__version__ >= (2, 12) and head_dim % 8 == 0
    return kernel if kernel == "torch varlen" and can else "matmul"


def capture(step, pool):
    """A CUDA graph of step(): recorded, not run."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # thread_local: other threads, as NCCL's watchdog, may call CUDA meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph


# ---- One token ----------------------------------------------------------------------------------


def draw(logits, u, temperature=1.0, top_p=1.0):
    """(tokens, their log-probs), both (n,): one token per row of logits (n,V) by inverse CDF at
    u (n,) in [0, 1 - 2^-23]. The log-prob is that of the whole distribution at `temperature`,
    float32. temperature 0 is greedy, its log-prob that of temperature 1."""
    assert temperature == 0 or temperature >= COLDEST, f"temperature {temperature}"
    whole = (logits / (temperature or 1)).softmax(-1)
    p = whole
    if top_p < 1:  # the smallest set of likeliest tokens that holds top_p; at least one
        ordered, index = p.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        p = p.scatter(-1, index, ordered.masked_fill(outside, 0))
    if temperature == 0:
        token = p.argmax(-1, keepdim=True)
    else:
        cdf = p.cumsum(-1)
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
        token = token.clamp(max=p.shape[1] - 1)  # where p is nan: some token of the vocabulary
    return token[:, 0], whole.gather(1, token)[:, 0].log()


def uniforms(prompt, seed, sample, count):
    """(count,) float32 in [0, 1 - 2^-23], so that u times a sum rounds to less than the sum."""
    digest = hashlib.blake2b(f"{seed} {sample} {prompt}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))  # takes 32 bits
    return torch.rand(count, generator=generator).clamp(max=1 - 2**-23)


# ---- Plumbing -----------------------------------------------------------------------------------


def check(model, prompts, seeds, n, limits, temperature, top_p, stop, tokenizer):
    """ValueError, one line that names the value, where generate() cannot do what it is asked."""
    def need(right, what):
        if not right:
            raise ValueError(f"generate: {what}")
    need(len(seeds) == len(limits) == len(prompts),
         f"{len(seeds)} seeds and {len(limits)} values of max_new_tokens for {len(prompts)} "
         "prompts; give one, or one per prompt")
    need(min(n, *limits) >= 1, f"n={n} and max_new_tokens={min(limits)} must be at least 1")
    need(temperature == 0 or temperature >= COLDEST,
         f"temperature={temperature} must be 0 (greedy) or at least {COLDEST}")
    need(0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]")
    need(all(stop), "a stop string is empty; leave it out")
    need(tokenizer or not stop, "stop strings need tokenizer=")
    for i, prompt in enumerate(prompts):
        need(prompt and 0 <= min(prompt) and max(prompt) < model.config.vocab_size,
             f"prompt {i} is empty, or has a token id outside the vocabulary of "
             f"{model.config.vocab_size}")


def slots_that_fit(model, length, kv_tokens):
    """Sequences of `length` tokens that the cache may hold; ValueError if not one."""
    if kv_tokens is None:
        c = model.config
        weight = model.embed_tokens.weight
        room = CPU_CACHE_BYTES
        if weight.device.type == "cuda":  # what PyTorch holds but does not use is free too
            idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            room = GPU_CACHE_SHARE * (torch.cuda.mem_get_info()[0] + idle)
        numbers = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # of a token
        kv_tokens = int(room) // (numbers * weight.element_size())
    if kv_tokens < length:
        raise ValueError(f"generate: the longest prompt and max_new_tokens need {length} cache "
                         f"tokens, the budget is {kv_tokens}; raise kv_tokens or shorten them")
    return kv_tokens // length


def graph_rows(n):
    """n rounded up to few numbers, as recording a graph takes 30 to 60 ms; free slots idle along:
    powers of two, from 16 on multiples of 16, from 256 on of 64."""
    if n <= 16:
        return 1 << (n - 1).bit_length()
    return round_up(n, 16 if n <= 256 else 64)


def round_up(count, step):
    return -(-count // step) * step


def visible(text):
    """`text` with control characters spelled out: no response shall steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def main():
    parser = argparse.ArgumentParser(description="One response to one prompt, printed.")
    parser.add_argument("model", help="checkpoint or run directory, or hub id")
    parser.add_argument("prompt", help="fed as it is: no chat template, no BOS")
    parser.add_argument("--stop", nargs="*", default=(), help="texts that end the response")
    numbers = {"max_new_tokens": 256, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    for name, usual in numbers.items():
        parser.add_argument(f"--{name}", type=type(usual), default=usual)
    how = vars(parser.parse_args())
    source, prompt = how.pop("model"), how.pop("prompt")
    sys.stdout.reconfigure(errors="backslashreplace")  # terminals that are not UTF-8
    import data  # only here: the same tokens and ends of a response as train.py and eval.py
    on_gpu = torch.cuda.is_available()
    try:
        data.sound(prompt)  # else a tokenizer panics
        model = Model.from_pretrained(source, torch.bfloat16 if on_gpu else torch.float32,
                                      "cuda" if on_gpu else "cpu")
        model.check_finite()
        tokenizer = data.load_tokenizer(model.source)
        ends = data.end_ids(tokenizer, model.eos_ids, model.config.vocab_size)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        rollout = generate(model, [ids], eos_ids=ends, tokenizer=tokenizer, **how)[0]
        print(visible(tokenizer.decode(rollout.tokens[len(ids):])))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"rollout.py: {data.first_line(error)}")


if __name__ == "__main__":
    main()
