"""Weights in, log-probs out: one forward pass for Qwen2/2.5, Qwen3, Llama 3.x, SmolLM3 and Mistral.

    model = Model.from_pretrained("Qwen/Qwen2.5-0.5B", dtype=torch.bfloat16, device="cuda")
    logits = model(ids)                                     # (B,T) padded on the right -> (B,T,V)
    ids, rows, targets = pack(sequences, prompt_lens, device)             # lists of tokens -> (N,)
    logp, entropy, sum_p2 = model(ids, rows, targets)       # float32, never holds (N,V)
    model.save_pretrained("out/")                           # loads in transformers and vLLM

Tokens are one flat list (N,), without padding. A sequence is a row: the places of its tokens in
that list. Two rows may share places, as the samples of one prompt do; those are computed once.
Who looks at whom is decided by a function attend(layer, q, k, v) that is passed down: whole texts
(causal) and single tokens behind a cache (rollout.py) go through the same blocks.
Parameters have Hugging Face's names, so that checkpoints need no table of renames.
"""
import hashlib
import json
import math
import os
import shutil
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
varlen_attn = None
if torch.cuda.is_available() and torch.__version__ >= (2, 11):  # importing it takes two seconds
    from torch.nn.attention.varlen import varlen_attn

# sums of bfloat16 products stay float32 where a matmul is split: sampler and trainer part less
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


# ---- config.json ----

KINDS = ("qwen2", "qwen3", "llama", "mistral", "smollm3")


@dataclass
class Config:
    """The numbers that the forward pass reads. `raw` is the whole config.json, as it came."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    raw: dict

    def __post_init__(self):
        for field in fields(self):
            x = getattr(self, field.name)
            if type(x) is not field.type or field.type is int and not 0 < x <= 2**20:
                raise ValueError(f"{field.name} = {x!r:.60} is no {field.type.__name__} in range")

    @staticmethod
    def from_dict(raw: dict) -> "Config":
        """ValueError names what this forward pass would compute wrongly; where a number is missing
        or no number, any error."""
        context = raw.get("max_position_embeddings") or 2048
        refuse_unknown(raw, context)
        kind = raw["model_type"]
        heads = raw["num_attention_heads"]
        bias = bool(raw.get("attention_bias"))
        return Config(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=context,
            rms_norm_eps=raw.get("rms_norm_eps") or 1e-6,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", kind == "smollm3")),
            qkv_bias=bias or kind == "qwen2",
            o_bias=bias,
            qk_norm=kind == "qwen3",
            raw=raw,
        )

    def rotary(self, layer) -> bool:
        """Whether that layer knows positions: SmolLM3 leaves some without."""
        if self.raw["model_type"] != "smollm3":
            return True
        listed, every = [self.raw.get(f"no_rope_layer{end}") for end in ("s", "_interval")]
        return bool(listed[layer] if listed else (layer + 1) % (every or 4))


def refuse_unknown(raw, context):
    """ValueError for what this file has no code for and what the weights' names do not show."""
    kind = raw.get("model_type")
    slides = kind == "mistral" or raw.get("use_sliding_window")  # Qwen's have a switch
    known = {
        "model_type": kind in KINDS,
        "num_hidden_layers": raw.get("num_hidden_layers", 0) <= 2**10,  # a million take minutes
        "hidden_act": raw.get("hidden_act", "silu") == "silu",
        "quantization_config": not raw.get("quantization_config"),
        "layer_types": "sliding" not in str(raw.get("layer_types")),
        "sliding_window": not slides or (raw.get("sliding_window") or context) >= context,
    }
    for key in known:
        if not known[key]:
            raise ValueError(f"{key} = {raw.get(key)!r:.60} is not supported (model.py knows dense "
                             f"{', '.join(KINDS)}, without sliding windows)")


def inverse_frequencies(c: Config) -> Tensor:
    """(head_dim/2,) float32 angles per position; llama3 stretches the slow ones (transformers'
    modeling_rope_utils)."""
    raw = c.raw  # published ones have rope_theta at the top, those of transformers 5 do not
    rope = raw | (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or (2e6 if raw["model_type"] == "smollm3" else 1e4)
    powers = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim
    freq = 1.0 / theta ** powers
    if kind == "default":
        return freq
    if kind != "llama3":
        raise ValueError(f"rope type {kind!r:.60} is not supported (default and llama3 are)")
    trained = rope.get("original_max_position_embeddings") or c.max_position_embeddings
    turns = trained * freq / (2 * math.pi)  # in the context that it was trained on
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: left alone, 0: stretched by `factor`
    return keep * freq + (1 - keep) * freq / rope["factor"]


# ---- Who looks at whom ----

def pack(sequences, prompt_lens, device, drawn=None):
    """Token lists (prompt + response) as one batch: (ids (N,), rows, targets (N,)). Each response
    token is the target of the place before it; -1 elsewhere. Sequences with the same
    prompt share it, but for its last token. No sequences: one token without a target, as
    under FSDP every rank must take part in every pass. drawn: of each sequence None, or for each
    response token whether it is a target; a tool's are not.

    pack([[7, 8, 9], [7, 8, 5, 4]], [2, 2]): ids 7 8 8 5, rows [0, 1] [0, 2, 3], targets -1 9 5 4
    """
    ids, rows, targets = [], [], []
    places = {}  # prompt without its last token -> where it stands
    for tokens, n, own in zip(sequences, prompt_lens, drawn or [None] * len(sequences)):
        prefix = tuple(tokens[:n - 1])
        if prefix not in places:
            places[prefix] = range(len(ids), len(ids) + len(prefix))
            ids += prefix
            targets += [-1] * len(prefix)
        start = len(ids)
        ids += tokens[n - 1:-1]  # nothing follows the last token
        own = own or [True] * (len(tokens) - n)
        targets += [token if mine else -1 for token, mine in zip(tokens[n:], own)]
        rows.append([*places[prefix], *range(start, len(ids))])
    if not ids:
        ids, rows, targets = [0], [[0]], [-1]
    return torch.tensor(ids, device=device), rows, torch.tensor(targets, device=device)


def causal(rows, device, dtype=torch.float32):
    """(positions (N,), attend) for sequences whose tokens stand at the places `rows` of the flat
    list: each token sees those before it in its row. Attention runs over the rows end to end: over
    the tokens at `seen`, and `back` says where each token's result is."""
    kernel = attention_kernel(torch.device(device), dtype)
    N = 1 + max(place for row in rows for place in row)
    longest = max(len(row) for row in rows)
    positions = [0] * N
    back = [0] * N
    seen = []
    borders = [0]
    for row in rows:
        for t, place in enumerate(row):
            positions[place] = t
            back[place] = len(seen) + t
        seen += row
        if kernel == "sdpa":  # wants one length: any token will do for padding, on the right
            seen += [0] * (longest - len(row))  # nobody looks there, as the mask is causal
        borders.append(len(seen))
    attend = Causal(kernel, len(rows), longest,
                    torch.tensor(borders, dtype=torch.int32, device=device))
    if seen != list(range(N)):  # something is shared or padded
        attend.seen = torch.tensor(seen, device=device)
        attend.back = torch.tensor(back, device=device)
    return torch.tensor(positions, device=device), attend


@dataclass
class Causal:
    """attend() of causal(). A class whose fields are tensors and numbers, as torch.compile would
    compile again for every list."""
    kernel: str
    sequences: int
    longest: int
    borders: Tensor  # (B+1,) int32, of the rows end to end
    seen: Tensor | None = None
    back: Tensor | None = None

    def __call__(self, layer, q, k, v):
        """q (N,H,h), k and v (N,Hkv,h) -> (N,H,h)"""
        if self.seen is not None:
            q, k, v = q[self.seen], k[self.seen], v[self.seen]
        if self.kernel == "sdpa":
            q, k, v = [x.unflatten(0, (self.sequences, -1)).transpose(1, 2) for x in (q, k, v)]
            grouped = q.shape[1] != k.shape[1]  # (B,H,T,h), (B,Hkv,T,h)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            out = out.transpose(1, 2).flatten(0, 1)
        else:
            out = varlen(self.kernel, q, k, v, self.borders, self.longest)
        return out if self.back is None else out[self.back]


def varlen(kernel, q, k, v, borders, longest):
    """Causal attention over packed sequences by a GPU's kernels, without padding."""
    if kernel == "flash-attn":
        return flash_attn_varlen_func(q, k, v, borders, borders, longest, longest, causal=True)
    k, v = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]  # no GQA in 2.11
    h = q.shape[-1]
    more = -h % 8  # PyTorch's takes head sizes in steps of 8, and scales by the size that it sees
    if more:  # padding by 0 would copy
        q, k, v = [F.pad(x, (0, more)) for x in (q * ((h + more) / h)**0.5, k, v)]
    out = varlen_attn(q, k, v, borders, borders, longest, longest, window_size=(-1, 0))
    return out[..., :h]


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """What packed attention runs on: flash-attn if installed, PyTorch's varlen on CUDA, or SDPA."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        if flash_attn_varlen_func:
            return "flash-attn"
        if varlen_attn:
            return "torch varlen"
    return "sdpa"


# ---- The network ----

# PyTorch's float32 matmul (MKL) keeps to AVX2 on AMD's cores; oneDNN, which comes with PyTorch,
# takes their AVX-512 and is up to twice as fast. On Intel's cores MKL takes it too. A call of
# oneDNN costs 25 us more: it gets products of at least ONEDNN_FROM multiplications. RLVR_ONEDNN=1
# or 0 overrides.
def onednn_is_faster() -> bool:
    if "RLVR_ONEDNN" in os.environ:
        return os.environ["RLVR_ONEDNN"] == "1"
    cpus = Path("/proc/cpuinfo")
    amd = cpus.is_file() and "AuthenticAMD" in cpus.open().read(1000)
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


ONEDNN = onednn_is_faster() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_FROM = 2**21


def product(x, W, bias=None):
    """x (N,K), W (M,K), bias (M,) -> x W^T + bias (N,M)."""
    if (not ONEDNN or torch.compiler.is_compiling() or len(x) * W.numel() < ONEDNN_FROM
            or x.device.type != "cpu" or x.dtype != torch.float32):
        return F.linear(x, W, bias)
    if torch.is_grad_enabled():
        return OneDNN.apply(x, W, bias)
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")


class OneDNN(torch.autograd.Function):
    """product() with its gradients, as oneDNN's operator has none."""

    @staticmethod
    def forward(ctx, x, W, bias):
        ctx.save_for_backward(x, W)
        return product(x, W, bias)  # the operator itself: in here gradients are off

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W = ctx.saved_tensors
        dW = product(grad.T, x.T) if ctx.needs_input_grad[1] else None  # LoRA freezes it
        dbias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return product(grad, W.T), dW, dbias


class Linear(nn.Linear):
    """W x + b; after Model.add_lora(), with A (rank,in) and B (out,rank), (W + scale B A) x + b."""
    scale, lora_on = 0.0, True

    def forward(self, x):
        y = product(x, self.weight, self.bias)
        if self.scale and self.lora_on:
            y = torch.add(y, product(product(x, self.lora_A), self.lora_B), alpha=self.scale)
        return y

    def merged(self):
        """W + scale B A, in float32 at least; whole(), so that all ranks must call it."""
        return whole(self.weight) + self.scale * (whole(self.lora_B) @ whole(self.lora_A))


def rotate(x, cos, sin):
    """x (N,H,h) turned, in the half-split form; cos is (cos, cos), sin is (-sin, sin): (N,1,h)."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((b, a), -1), sin)


class Attention(nn.Module):
    def __init__(self, c: Config, rotary):
        super().__init__()
        self.head_dim = c.head_dim
        self.rotary = rotary
        queries = c.num_attention_heads * c.head_dim
        keys = c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.o_proj = Linear(queries, c.hidden_size, bias=c.o_bias)
        norm = nn.RMSNorm if c.qk_norm else nn.Identity
        self.q_norm = norm(c.head_dim, c.rms_norm_eps)
        self.k_norm = norm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, rope, attend, layer):
        N, h = len(x), self.head_dim
        q = self.q_norm(self.q_proj(x).view(N, -1, h))  # (N,H,h)
        k = self.k_norm(self.k_proj(x).view(N, -1, h))  # (N,Hkv,h)
        v = self.v_proj(x).view(N, -1, h)
        if self.rotary:
            qk = rotate(torch.cat((q, k), 1), *rope)  # one call for both
            q, k = qk.split((q.shape[1], k.shape[1]), 1)
        return self.o_proj(attend(layer, q, k, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config, rotary):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, rotary)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, attend, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- The head ----

LOGITS_CHUNK = 2**26  # float32 logits at once: 256 MB, of which two are alive


def exact_logits(h, W):
    """h (N,D), W (V,D) -> h W^T (N,V) in float32 (float64 stays), for sampler and trainer alike.
    Matmuls sum products of bfloat16 numbers in float32 anyway; rounding that sum would move a logit
    of 20 by up to 0.06. MiniMax-M1 (2506.13585) saw the two part there. No gradient on CUDA."""
    exact = torch.promote_types(h.dtype, torch.float32)
    if h.is_cuda and h.dtype != exact:
        return torch.mm(h, W.T, out_dtype=exact)
    return product(h.to(exact), W.to(exact))


class TokenLogp(torch.autograd.Function):
    """log softmax(h W^T / temperature) at `targets` (N,), with entropy and sum p^2 beside it, in
    float32 (float64 stays). In chunks: (N,V) logits never exist at once; backward computes them
    again, unless one chunk holds them all. Only log p has a gradient."""

    @staticmethod
    def forward(ctx, h, W, targets, temperature):
        logp = h.new_empty(len(h), dtype=torch.promote_types(h.dtype, torch.float32))
        entropy = torch.empty_like(logp)
        sum_p2 = torch.empty_like(logp)
        step = max(1, LOGITS_CHUNK // len(W))
        for i in range(0, len(h), step):
            at = slice(i, i + step)
            z = p = None  # let go of the chunk before, first
            z = log_probs(h[at], W, temperature)  # (n,V)
            p = z.exp()
            logp[at] = z.gather(1, targets[at, None])[:, 0]
            entropy[at] = -torch.linalg.vecdot(p, z)
            sum_p2[at] = torch.linalg.vecdot(p, p)
        kept = [p] if 0 < len(h) <= step else []
        ctx.save_for_backward(h, W, targets, *kept)
        ctx.temperature = temperature
        ctx.step = step
        ctx.mark_non_differentiable(entropy, sum_p2)
        return logp, entropy, sum_p2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        h, W, targets, *kept = ctx.saved_tensors
        grad = grad[:, None] / ctx.temperature
        dh = torch.empty_like(h)
        trained = ctx.needs_input_grad[1]
        # float32: a sum in bfloat16 would be rounded at each chunk
        dW = torch.zeros_like(W, dtype=grad.dtype) if trained else None
        for i in range(0, len(h), ctx.step):
            at = slice(i, i + ctx.step)
            p = dz = None
            p = kept[0] if kept else log_probs(h[at], W, ctx.temperature).exp_()
            # d log p[target] / d logits = one-hot of the target - p
            dz = (p * -grad[at]).scatter_add_(1, targets[at, None], grad[at]).to(h.dtype)
            dh[at] = product(dz, W.T)
            if trained:
                dW += exact_logits(dz.T, h[at].T)
        return dh, dW.to(W.dtype) if trained else None, None, None


def log_probs(h, W, temperature):
    return exact_logits(h, W).div_(temperature).log_softmax(-1)


# ---- The model ----

class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, config.rotary(i))
                                    for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        # a plain attribute: no weight, and never cast to bfloat16
        self.inv_freq = inverse_frequencies(config)
        # FSDP has gathered all weights for sampling: call the blocks past its hooks
        self.gathered = False
        # keep each block's input alone for backward: a third more compute, far less memory
        self.recompute = False
        self.source = None  # the directory (Path) that it came from
        self.lora = {}  # what add_lora() did, as an adapter_config.json says it
        self.files = {}  # name -> bytes: its tokenizer, saved along
        self.eos_ids = known_ids(config.raw.get("eos_token_id"), config)

    @property
    def head_weight(self):
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def rope(self, positions):
        """The rotary embedding at `positions` (N,), as rotate() takes it: (cos, sin), (N,1,h)."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angle = positions[:, None, None].float() * self.inv_freq
        dtype = self.embed_tokens.weight.dtype
        cos = angle.cos().to(dtype)
        sin = angle.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def body(self, ids, positions, attend, rope=None):
        """Final hidden states (N,D) of tokens `ids` (N,) at `positions` (N,); `rope` is
        rope(positions) where the caller has it already."""
        x = self.embed_tokens(ids)  # (N,D)
        rope = rope or self.rope(positions)
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():  # nothing in a block is random
                x = checkpoint(layer, x, rope, attend, i, use_reentrant=False,
                               preserve_rng_state=False)
            else:
                x = (layer.forward if self.gathered else layer)(x, rope, attend, i)
        return self.norm(x)

    def logits(self, hidden):
        """(N,D) -> (N,V) float32, for sampling."""
        return exact_logits(hidden, self.head_weight)

    def forward(self, ids, rows=None, targets=None, temperature=1.0):
        """ids (B,T), padded on the right: logits (B,T,V).
        ids (N,), `rows`: the places that each sequence has in it, and targets (N,), the id to be
        predicted at each place or -1 for none: (logp, entropy, sum p^2) at the places that have
        one, in order; float32, only logp with gradient."""
        if rows is None:
            B, T = ids.shape
            rows = [range(i * T, i * T + T) for i in range(B)]
        dtype = self.embed_tokens.weight.dtype
        hidden = self.body(ids.flatten(), *causal(rows, ids.device, dtype))
        if targets is None:
            return product(hidden, self.head_weight).view(*ids.shape, -1)
        at = (targets >= 0).nonzero()[:, 0]
        return TokenLogp.apply(hidden[at], self.head_weight, targets[at], temperature)

    def weights(self) -> dict[str, Tensor]:
        """Its own, without adapters, by their names in Hugging Face's files."""
        return {name if name.startswith("lm_head") else f"model.{name}": p
                for name, p in self.named_parameters() if ".lora_" not in name}

    def linears(self) -> dict[str, Linear]:
        """The blocks' matrices, by name."""
        return {f"layers.{name}": layer for name, layer in self.layers.named_modules()
                if isinstance(layer, Linear)}

    def add_lora(self, rank, alpha, base):
        """LoRA (2106.09685): freeze all weights, which `base` (path or hub id) has, and make room
        for float32 adapters beside the matrices of the blocks."""
        self.requires_grad_(False)
        for layer in self.linears().values():
            like = {"dtype": torch.float32, "device": layer.weight.device}
            layer.lora_A = nn.Parameter(torch.zeros(rank, layer.in_features, **like))
            layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, **like))
            layer.scale = alpha / rank
        kinds = sorted({name.split(".")[-1] for name in self.linears()})
        self.lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
                     "target_modules": kinds, "base_model_name_or_path": str(base)}

    def adapters(self) -> dict[str, Tensor]:
        """LoRA's tensors, by the names that PEFT gives them."""
        return {f"base_model.model.model.{name}.weight": p
                for name, p in self.named_parameters() if ".lora_" in name}

    def use_lora(self, on):
        """Off: the model as it was before, the reference of a KL penalty."""
        for layer in self.linears().values():
            layer.lora_on = on

    def check_finite(self):
        """ValueError if some weight is inf or nan, as after a step that went wrong."""
        for name, p in self.named_parameters():
            if not whole(p.sum(dtype=torch.float32)).isfinite():  # all ranks agree
                raise ValueError(f"{self.source or 'model'}: {name} holds inf or nan; "
                                 "take an earlier checkpoint")

    @staticmethod
    def from_scratch(raw: dict, seed: int = 0, device="cpu") -> "Model":
        """Random weights (normal, 0.02, as transformers) for a config.json given as a dict."""
        model = Model(Config.from_dict(raw))
        g = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=raw.get("initializer_range", 0.02), generator=g)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return model.to(device)

    @staticmethod
    def from_pretrained(path_or_hub_id, dtype=torch.float32, device="cpu") -> "Model":
        """A checkpoint directory, a run directory of train.py (its newest checkpoint) or a hub id;
        a PEFT adapter (LoRA) is merged into its base. FileNotFoundError or ValueError, one line
        that names the file or tensor."""
        source = find_checkpoint(path_or_hub_id)
        whole_model = any(source.glob("model*.safetensors"))
        if (source / "adapter_config.json").is_file() and not whole_model:
            return merge_adapter(source, dtype, device)
        return Model.from_config(source).to(dtype).to_empty(device=device).load_weights()

    @staticmethod
    def from_config(path_or_hub_id) -> "Model":
        """A checkpoint's model on the meta device: shard it, give it memory, then load_weights().
        Whether the weights fit config.json is known here, before there is memory."""
        source = find_checkpoint(path_or_hub_id)
        found = scan(weight_files(source))
        raw = read_json(source / "config.json")
        with naming(source / "config.json"):
            if Config.from_dict(raw).tie_word_embeddings and has_other_head(found):
                warnings.warn(f"{source}: config.json ties the head to the embedding, but the "
                              "weights hold another head; it is used, untied")
                raw["tie_word_embeddings"] = False
            with torch.device("meta"):
                model = Model(Config.from_dict(raw))
        check_fit(source, found, model.weights())
        model.source = source
        model.files = small_files(source)  # read now: the directory may be gone at the next save
        if "generation_config.json" in model.files:  # chat models name several ends there
            more = read_json(source / "generation_config.json")
            model.eos_ids = known_ids(more.get("eos_token_id"), model.config) or model.eos_ids
        return model

    def load_weights(self, seed=0) -> "Model":
        """Stream the safetensors of `source` in, cast to each parameter's dtype; a rank of a
        sharded model keeps its own slice only. LoRA begins as PEFT's does, from the seed: A uniform
        within 1 / sqrt(in), B zero, so that nothing has changed yet."""
        read_tensors(weight_files(self.source), self.weights())
        g = torch.Generator().manual_seed(seed)
        for name, p in self.adapters().items():
            bound = p.shape[1]**-0.5 if "lora_A" in name else 0.0
            copy_into(p, torch.empty(p.shape).uniform_(-bound, bound, generator=g))
        return self

    def save_pretrained(self, directory, dtype=None, write=True):
        """Write a checkpoint that transformers and vLLM load: config.json, safetensors, tokenizer.
        Written aside and renamed: `directory` is whole or absent, also if killed. Sharded models:
        every rank must call it (each tensor is gathered in turn), one with write=True. LoRA is
        merged into the weights, and adapter/ has it apart, for PEFT."""
        directory = Path(directory)
        aside = directory.with_name(f".{directory.name}.{os.getpid()}")
        if write:
            shutil.rmtree(aside, ignore_errors=True)
        dtype = dtype or self.head_weight.dtype
        adapted = {f"model.{name}.weight": layer for name, layer in self.linears().items()
                   if layer.scale}
        write_tensors(aside, self.weights(), dtype, write, adapted)
        adapter = {name: whole(p).cpu() for name, p in self.adapters().items()}
        if not write:
            return
        if adapter:
            (aside / "adapter").mkdir()
            save_file(adapter, aside / "adapter/adapter_model.safetensors", {"format": "pt"})
            (aside / "adapter/adapter_config.json").write_text(json.dumps(self.lora, indent=1))
        raw = self.config.raw | {"dtype": str(dtype).removeprefix("torch.")}
        raw.pop("torch_dtype", None)  # its old name
        (aside / "config.json").write_text(json.dumps(raw, indent=1))
        for name, content in self.files.items():
            (aside / name).write_bytes(content)
        replace_directory(aside, directory)


# ---- Long work ----

class Progress:
    """Where work is that takes over 5 s, on stderr: on a terminal a line that the next one
    overwrites, elsewhere one line a minute. Of several ranks the first one speaks."""

    def __init__(self):
        self.began = time.monotonic()
        self.next = self.began + 5 if os.environ.get("RANK", "0") == "0" else math.inf

    def show(self, share, text, left="about"):
        """`text` and, judged by the share of the work that is done, the seconds left."""
        now = time.monotonic()
        if now < self.next:
            return
        on_terminal = sys.stderr.isatty()
        self.next = now + (1 if on_terminal else 60)
        if share:
            text += f", {left} {(now - self.began) * (1 / share - 1):,.0f} s left"
        # A bar of tqdm leaves the cursor at its end.
        print(f"\r{text}\x1b[K\r" if on_terminal else text, file=sys.stderr, flush=True,
              end="" if on_terminal else "\n")


# ---- Checkpoints out ----

SHARD_BYTES = 5 * 10**9  # of a safetensors file


def write_tensors(directory, tensors: dict[str, Tensor], dtype, write=True, adapted={}):
    """`tensors` as safetensors in the Path `directory`, in files of 5 GB with an index where one is
    not enough. Sharded ones are gathered one by one: all ranks must call it, one with write=True.
    adapted: for some names, the Linear whose merged() takes the tensor's place."""
    from huggingface_hub import split_torch_state_dict_into_shards
    if write:
        directory.mkdir(parents=True, exist_ok=True)
    sizes = {name: torch.empty(t.shape, dtype=dtype, device="meta") for name, t in tensors.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    files, progress = plan.filename_to_tensors, Progress()
    for done, (file, names) in enumerate(files.items()):
        progress.show(done / len(files), f"saving: {done} of {len(files)} files")
        shard = {}
        for name in names:
            t = adapted[name].merged() if name in adapted else whole(tensors[name])
            if write:
                shard[name] = t.to("cpu", dtype).contiguous()
        if write:
            save_file(shard, directory / file, metadata={"format": "pt"})
    if write and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def whole(t: Tensor) -> Tensor:
    """Without gradient, and all of one that is sharded: all ranks must call it."""
    return t.detach().full_tensor() if hasattr(t, "full_tensor") else t.detach()


def replace_directory(aside: Path, directory: Path):
    """Rename `aside` to `directory`, on the disk before it is seen: whole or absent, also after a
    power cut. One that is there already goes only when the new one stands ready."""
    for path in [*aside.rglob("*"), aside]:
        flush(path)
    old = directory.with_name(f".{directory.name}.old.{os.getpid()}")
    if directory.exists():
        directory.replace(old)
    aside.replace(directory)
    flush(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path, text):
    """A small file, whole or as it was, also after a power cut."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)  # a link planted there would lead to another file
    aside.write_text(text)
    flush(aside)
    aside.replace(path)
    flush(path.parent)


def flush(path):
    """fsync of a file, or of the list of names that a directory is."""
    if os.name == "nt":  # does not do it with files opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checksums(directory) -> dict[str, str]:
    """{path in it: sha256} of every file but checksums.json, which holds them."""
    paths = [path for path in sorted(directory.rglob("*"))
             if path.is_file() and path.name != "checksums.json"]
    found, progress = {}, Progress()
    for path in paths:
        progress.show(len(found) / len(paths), f"checksums: {len(found)} of {len(paths)} files")
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while block := f.read(2**20):
                digest.update(block)
        found[path.relative_to(directory).as_posix()] = digest.hexdigest()
    return found


def damaged(directory) -> str:
    """The first file that is not as resume/checksums.json has it, as a line; "" if all are."""
    try:
        then = read_json(directory / "resume/checksums.json")
    except (ValueError, OSError) as e:
        return str(e)
    now = checksums(directory)
    for name in then:
        if now.get(name) != then[name]:
            return f"{directory / name} is {'damaged' if name in now else 'missing'}"
    return ""


# ---- Checkpoints in: they may come from a stranger, and whatever is wrong is one line ----

WEIGHT_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json",
                "adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
                   "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "chat_template.json", "generation_config.json")


def find_checkpoint(path_or_hub_id) -> Path:
    """The directory of a checkpoint: local, or fetched from the hub or its cache (HF_HUB_OFFLINE is
    respected). FileNotFoundError if there is none."""
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    latest = path / "latest"
    if latest.is_file():  # a run directory of train.py
        found = path / latest.read_text(errors="replace").strip()
        if found.resolve().parent != path.resolve() or not found.is_dir():
            raise FileNotFoundError(f"{found}: no such directory of that run, but {latest} names "
                                    "it; give another checkpoint")
        return found
    if path.is_dir():
        return path
    if name.count("/") != 1:
        raise FileNotFoundError(f"{name}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars
    print(f"{name}: from the hub or its cache", file=sys.stderr)
    if not sys.stderr.isatty():  # in a log this line is enough
        disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=[*WEIGHT_FILES, *TOKENIZER_FILES]))
    except (ValueError, OSError) as e:
        reason = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
        raise FileNotFoundError(f"{name}: no such directory, and the hub did not give it "
                                f"({reason}); offline, pass a directory") from None


@contextmanager
def naming(path):
    """Whatever goes wrong with a file is one line that names it."""
    try:
        yield
    except Exception as e:  # a stranger's file may hold anything
        what = " ".join(str(e).split())
        raise ValueError(f"{path}: {type(e).__name__}: {what:.300}") from None


def read_json(path) -> dict:
    with naming(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found


def known_ids(found, config) -> list[int]:
    """An eos_token_id, which may be a number, a list or null, as a list of tokens."""
    found = found if isinstance(found, list) else [found]
    return [t for t in found if type(t) is int and 0 <= t < config.vocab_size]


def small_files(source) -> dict[str, bytes]:
    """{name: content} of the tokenizer's files. None that is a link out of the directory: a save
    would publish what it points to."""
    files, home = {}, source.resolve()
    homes = home, home.parent.parent / "blobs"  # where the hub's cache has what it links to
    for name in TOKENIZER_FILES:
        path = source / name
        if path.is_file() and path.resolve().parent in homes:
            files[name] = path.read_bytes()
        elif path.exists():
            warnings.warn(f"{path}: no file of this directory; it is not saved along")
    return files


def weight_files(source) -> list[Path]:
    """The safetensors of the model itself, not of adapters or other formats beside it."""
    file, index = source / "model.safetensors", source / "model.safetensors.index.json"
    if file.is_file():
        return [file]
    if not index.is_file():
        raise FileNotFoundError(f"{source}: no model.safetensors here; perhaps .bin weights, which "
                                "are not read, or a LoRA adapter; merge it into its base first")
    listed = read_json(index)
    with naming(index):
        names = {str(name) for name in listed["weight_map"].values()}
    files = sorted(source / name for name in names)
    for file in files:
        if file.parent != source:
            raise ValueError(f"{index}: {str(file)!r:.100} is out of this directory")
    return files


def scan(files) -> dict[str, tuple]:
    """{name: (file, shape)} of all tensors, from the headers."""
    found = {}
    for file in files:
        with naming(file), safe_open(file, framework="pt") as f:
            found |= {name: (file, f.get_slice(name).get_shape()) for name in f.keys()}
    return found


def read_tensor(found, name) -> Tensor:
    file, _ = found[name]
    with naming(file), safe_open(file, framework="pt") as f:
        return f.get_tensor(name)


def has_other_head(found) -> bool:
    """Whether there is an lm_head.weight that is no copy of the embedding."""
    return "lm_head.weight" in found and not torch.equal(
        read_tensor(found, "lm_head.weight"), read_tensor(found, "model.embed_tokens.weight"))


def check_fit(source, found, wanted: dict[str, Tensor]):
    """ValueError if a tensor is missing, unexpected or of another shape."""
    problems = [f"{name} missing" for name in wanted if name not in found]
    for name, (file, shape) in found.items():
        if name not in wanted:  # copies may be there:
            if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
                problems.append(f"{name!r:.100} in {file.name} unexpected")
        elif shape != list(wanted[name].shape):
            problems.append(f"{name} in {file.name} is {shape}, not {list(wanted[name].shape)}")
    if problems:
        raise ValueError(f"{source}: weights do not fit config.json, {len(problems)} in all: "
                         f"{'; '.join(problems[:8])}")


@torch.no_grad()
def read_tensors(files, wanted: dict[str, Tensor]):
    """Stream safetensors into the tensors `wanted`, one at a time; a sharded one (DTensor) takes
    this rank's slice. ValueError names file and tensor."""
    found = scan(files)
    check_fit(files[0].parent if files else "no safetensors", found, wanted)
    for name, local in wanted.items():
        t = read_tensor(found, name)
        if not t.is_floating_point():  # quantized: the numbers alone mean nothing
            raise ValueError(f"{found[name][0]}: {name} holds {t.dtype}, no floats")
        copy_into(local, t)


@torch.no_grad()
def copy_into(local, t):
    """Tensor t into a parameter; where that is sharded (DTensor), this rank's slice."""
    if hasattr(local, "placements"):
        from torch.distributed.tensor import distribute_tensor
        t = distribute_tensor(t.to(local.device), local.device_mesh, local.placements,
                              src_data_rank=None)
    local.copy_(t)


# ---- LoRA adapters in: PEFT's files ----

# what names and shapes of an adapter's tensors do not show, and the values that are merged here
PLAIN_LORA = {"peft_type": ["LORA"], "use_rslora": [None, False], "alpha_pattern": [None, {}],
              "init_lora_weights": [None, True, False, "gaussian"], "revision": [None],
              "alora_invocation_tokens": [None]}


@torch.no_grad()
def merge_adapter(source, dtype, device) -> Model:
    """The base model that the adapter in `source` names, with B A added. ValueError if it is more
    than that beside matrices of the blocks: biases, DoRA, ranks by pattern, whole modules, ..."""
    file = source / "adapter_config.json"
    raw = read_json(file)
    with naming(file):
        for key, plain in PLAIN_LORA.items():
            if raw.get(key) not in plain:
                raise ValueError(f"{key} = {raw.get(key)!r:.60} is not supported (plain LoRA is)")
        model = Model.from_pretrained(raw["base_model_name_or_path"], dtype, device)
        model.add_lora(raw["r"], raw["lora_alpha"], source)
    file = source / "adapter_model.safetensors"
    there = scan([file])
    wanted = {}  # some matrices may have no adapter: theirs stays 0
    for name, p in model.adapters().items():
        pair = name, name.replace("lora_A", "lora_B"), name.replace("lora_B", "lora_A")
        if any(part in there for part in pair):
            wanted[name] = p
    read_tensors([file], wanted)
    for layer in model.linears().values():
        layer.weight.copy_(layer.merged())
        layer.scale = 0.0
        del layer.lora_A, layer.lora_B
    return model.requires_grad_()
