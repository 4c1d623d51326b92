"""Weights in, log-probs out: one forward pass for Qwen2/2.5, Qwen3, Llama 3.x (and Mistral without sliding window).

    model = Model.from_pretrained("Qwen/Qwen2.5-0.5B", dtype=torch.bfloat16, device="cuda")
    logits = model(ids)                                          # (B,T) right-padded -> (B,T,V)
    logp, entropy, sum_p2 = model(ids, lengths, targets)         # packed (N,), never holds (N,V)

Tokens are always one flat list, (N,), of sequences laid end to end; what may look at what is decided by a function
attend(layer, q, k, v) that is passed down. The trainer, the sampler and the eval differ in that function alone; on a CPU the
sampler runs the blocks in a form with fewer calls, see fused().
Parameter names are Hugging Face's, so a checkpoint is read and written without a table of renames.
"""
import inspect
import itertools
import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.9
    varlen_attn = None

SHARD_BYTES = 5 * 10**9  # a safetensors file of a saved checkpoint
LOGITS_CHUNK = 2**26  # elements of a chunk of float32 logits in the head: 256 MB, of which two are alive at once
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
                   "generation_config.json")


# ---- config.json -----------------------------------------------------------------------------------------------------

@dataclass
class Config:
    """The numbers that the forward pass reads. `raw` is the whole config.json, written back as it came."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    rope: dict
    raw: dict

    @staticmethod
    def from_dict(raw: dict) -> "Config":
        """Read config.json in the style of published checkpoints (rope_theta, rope_scaling) or of transformers 5
        (rope_parameters). Raises ValueError that names whatever this forward pass would compute wrongly."""
        kind, get = raw.get("model_type"), raw.get

        def refuse(what):
            raise ValueError(f"config.json: {what} is not supported (model.py knows qwen2, qwen3, llama, mistral; dense)")

        if kind not in ("qwen2", "qwen3", "llama", "mistral"):
            refuse(f"model_type {kind!r}")
        for key in ("quantization_config", "num_experts", "num_local_experts", "mlp_bias", "use_mrope"):
            if get(key):
                refuse(f"{key} = {raw[key]!r}")
        if get("hidden_act", "silu") != "silu":
            refuse(f"hidden_act = {raw['hidden_act']!r}")
        window = get("sliding_window") if kind == "mistral" or get("use_sliding_window") else None
        if "sliding_attention" in (get("layer_types") or ()) or (window and window < get("max_position_embeddings", 0)):
            refuse(f"sliding-window attention (sliding_window = {get('sliding_window')})")
        missing = [k for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
                   if k not in raw]
        if missing:
            raise ValueError(f"config.json: {', '.join(missing)} missing")

        rope = {**(get("rope_scaling") or {}), **(get("rope_parameters") or {})}
        rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        rope["rope_theta"] = rope.get("rope_theta", get("rope_theta", 10000.0))
        if rope["rope_type"] not in ("default", "llama3"):
            refuse(f"rope type {rope['rope_type']!r}")
        bias = bool(get("attention_bias", False))
        return Config(
            vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            rms_norm_eps=get("rms_norm_eps", 1e-6), tie_word_embeddings=get("tie_word_embeddings", False),
            qkv_bias=True if kind == "qwen2" else bias, o_bias=False if kind == "qwen2" else bias,
            qk_norm=kind == "qwen3", max_position_embeddings=get("max_position_embeddings", 2048), rope=rope, raw=raw)


def inverse_frequencies(c: Config) -> Tensor:
    """(head_dim/2,) float32 angles per position; llama3 scaling stretches the slow ones (transformers modeling_rope_utils)."""
    rope = c.rope
    freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim)
    if rope["rope_type"] == "default":
        return freq
    wavelength, context = 2 * math.pi / freq, rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)  # 0: stretched by `factor`, 1: left alone
    return (1 - smooth) * freq / rope["factor"] + smooth * freq


# ---- Who looks at whom --------------------------------------------------------------------------------------------------

def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Which kernel packed attention uses here: flash-attn if installed, else PyTorch's varlen on CUDA, else padded SDPA."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        if flash_attn_varlen_func is not None:
            return "flash-attn"
        if varlen_attn is not None:
            return "torch varlen"
    return "sdpa"


def causal(lengths: list[int], device, dtype=torch.float32, after: list[int] | None = None):
    """(positions (N,), attend) for sequences of `lengths` tokens laid end to end: each token sees its own past only.
    after[i] = j, if not -1: sequence i is read as if j stood before it, as the samples of one prompt do; their common keys and
    values are computed once. j itself continues nothing."""
    kernel, after = attention_kernel(torch.device(device), dtype), after or [-1] * len(lengths)
    assert all(after[j] < 0 for j in after if j >= 0), "a sequence that is continued must not continue another"
    on_device = lambda *arrays: (torch.from_numpy(np.concatenate(a)).to(device) for a in arrays)
    own = [np.arange(end - n, end) for n, end in zip(lengths, itertools.accumulate(lengths))]  # where its tokens stand in the list
    whole = [np.concatenate((own[a], tokens)) if a >= 0 else tokens for a, tokens in zip(after, own)]  # and those it continues
    positions = [np.arange(len(w) - n, len(w)) for w, n in zip(whole, lengths)]
    continued = {a for a in after if a >= 0}
    if kernel != "sdpa":
        cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device) for x in (lengths, map(len, whole)))
        positions, seen = on_device(positions, whole)
        longest = max(map(len, whole))

        def attend(layer, q, k, v):
            return varlen(kernel, q, k[seen] if continued else k, v[seen] if continued else v, cu_q, cu_k, max(lengths), longest)
        return positions, attend

    rows = [w for i, w in enumerate(whole) if i not in continued]  # what is continued comes with those that continue it
    T, back = max(map(len, rows)), np.empty(sum(lengths), dtype=np.int64)
    padded = np.zeros((len(rows), T), dtype=np.int64)  # on the right any token will do: nobody looks there, the mask is causal
    for i, row in enumerate(rows):
        padded[i, :len(row)] = row
        back[row] = np.arange(i * T, i * T + len(row))
    even = np.array_equal(padded.ravel(), np.arange(len(back)))  # nothing to pad, nothing shared
    positions, padded, back = on_device(positions, padded, [back])

    def attend(layer, q, k, v):
        q, k, v = ((x if even else x[padded]).view(len(rows), T, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (B,H,T,h)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        o = o.transpose(1, 2).flatten(0, 1)
        return o if even else o[back]
    return positions, attend


def varlen(kernel, q, k, v, cu_q, cu_k, longest_q, longest_k):
    """Causal attention over packed sequences, (N,H,h); cu_q and cu_k (B+1,) int32 are their borders. Queries are the last
    tokens of a sequence where it has more keys."""
    if kernel == "flash-attn":
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest_q, longest_k, causal=True)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))  # torch 2.11 has no enable_gqa
    new = "window_size" in inspect.signature(varlen_attn).parameters  # torch 2.11 and later
    return varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, **({"window_size": (-1, 0)} if new else {"is_causal": True}))


# ---- The network --------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps
        self.eps_tensor = torch.tensor(eps, device="cpu")

    def forward(self, x):  # float32 inside, whatever the weights are
        if x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu":
            return rms_normalise(x, self.eps_tensor) * self.weight
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rms_normalise(x, eps):  # on a CPU F.rms_norm is twice as many kernels
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt()


def rotate(x, cos, sin):
    """x (N,H,h) in the half-split form; cos is (cos, cos), sin is (-sin, sin), both (N,1,h)."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((b, a), -1), sin)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim, h = c.head_dim, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * h, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * h, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * h, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * h, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(h, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(h, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, attend, layer):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(torch.cat((self.q_norm(q), self.k_norm(k)), 1), *rope).split((q.shape[1], k.shape[1]), 1)
        return self.o_proj(attend(layer, q, k, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, attend, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


def fused(b: Block, c: Config):
    """Block b's forward for sampling on a CPU, in 20 kernels instead of 34: with few rows their number is what costs. Copies of
    the weights: q, k, v and gate, up as one matrix each, the norm's weight multiplied into it; the two halves of a query or
    key interleaved, so that rotating is one complex product (no score depends on their order). Matmuls add the residual."""
    a, h, heads = b.self_attn, c.head_dim, c.num_attention_heads
    interleave = lambda t: t.unflatten(0, (-1, 2, h // 2)).transpose(1, 2).flatten(0, 2)  # (heads * h, ...)
    side_by_side = lambda norm, *weights: (torch.cat(weights) * norm.weight).T.contiguous()
    qkv = side_by_side(b.input_layernorm, interleave(a.q_proj.weight), interleave(a.k_proj.weight), a.v_proj.weight)
    bias = torch.cat([interleave(a.q_proj.bias), interleave(a.k_proj.bias), a.v_proj.bias]) if c.qkv_bias else torch.zeros(1)
    gate_up = side_by_side(b.post_attention_layernorm, b.mlp.gate_proj.weight, b.mlp.up_proj.weight)
    o, down = a.o_proj.weight.T, b.mlp.down_proj.weight.T
    if c.qk_norm:
        qk_norm = torch.cat([interleave(n.weight).expand(k, h) for n, k in ((a.q_norm, heads), (a.k_norm, c.num_key_value_heads))])
    eps = b.input_layernorm.eps_tensor

    def forward(x, rope, attend, layer):
        y = torch.addmm(bias, rms_normalise(x, eps), qkv).view(len(x), -1, h)
        qk, v = y.split((y.shape[1] - c.num_key_value_heads, c.num_key_value_heads), 1)
        if c.qk_norm:
            qk = rms_normalise(qk, eps) * qk_norm
        qk = torch.view_as_real(torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * rope[0]).flatten(-2)
        x = torch.addmm(x + a.o_proj.bias if c.o_bias else x, attend(layer, qk[:, :heads], qk[:, heads:], v).flatten(1), o)
        gate, up = rms_normalise(x, eps).mm(gate_up).chunk(2, -1)
        return torch.addmm(x, F.silu(gate, inplace=True).mul_(up), down)
    return forward


def exact_logits(h, W):
    """h W^T in float32 (float64 stays), for sampler and trainer alike. Matmuls sum products of bfloat16 numbers in float32 in any
    case; rounding that sum would move a logit of 20 by up to 0.06, the head being where MiniMax-M1 (2506.13585) saw the two part."""
    exact = torch.float64 if h.dtype == torch.float64 else torch.float32
    if h.is_cuda and h.dtype != exact:
        return torch.mm(h, W.T, out_dtype=exact)
    return h.to(exact) @ W.to(exact).T


class TokenLogp(torch.autograd.Function):
    """log softmax(h W^T / temperature) at `targets`, with entropy and sum p^2 beside it, in chunks: the (N,V) logits never
    exist at once, and backward computes them again, unless one chunk holds them all. Only logp carries gradient. Float32
    statistics (float64 stays)."""

    @staticmethod
    def log_softmax(h, W, temperature):
        z = exact_logits(h, W)
        return (z if temperature == 1 else z.div_(temperature)).log_softmax(-1)

    @staticmethod
    def forward(ctx, h, W, targets, temperature):
        ctx.temperature, ctx.chunk = temperature, max(1, LOGITS_CHUNK // len(W))
        statistic = torch.promote_types(h.dtype, torch.float32)  # all at once: small tensors between the big ones of the loop
        logp, entropy, sum_p2 = (h.new_empty(len(h), dtype=statistic) for _ in range(3))  # would fragment the memory
        for i in range(0, len(h), ctx.chunk):
            s, z, p = slice(i, i + ctx.chunk), None, None  # let go of the chunk before, first
            z = TokenLogp.log_softmax(h[s], W, temperature)
            p = z.exp()
            logp[s] = z.gather(1, targets[s, None])[:, 0]
            entropy[s] = -(p.unsqueeze(1) @ z.unsqueeze(2)).flatten()
            sum_p2[s] = (p.unsqueeze(1) @ p.unsqueeze(2)).flatten()
        ctx.save_for_backward(h, W, targets, *([p] if 0 < len(h) <= ctx.chunk else []))
        ctx.mark_non_differentiable(entropy, sum_p2)
        return logp, entropy, sum_p2

    @staticmethod
    def backward(ctx, grad, *_):
        h, W, targets, *whole = ctx.saved_tensors
        grad, dh, dW = grad[:, None] / ctx.temperature, torch.empty_like(h), torch.zeros_like(W)
        for i in range(0, len(h), ctx.chunk):
            s, p, dz = slice(i, i + ctx.chunk), None, None
            p = whole[0] if whole else TokenLogp.log_softmax(h[s], W, ctx.temperature).exp_()
            dz = torch.mul(p, -grad[s], out=None if whole else p).scatter_add_(1, targets[s, None], grad[s].to(p.dtype)).to(h.dtype)
            dh[s] = dz @ W
            dW.addmm_(dz.T, h[s])
        return dh, dW, None, None


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.inv_freq = inverse_frequencies(config)  # a plain attribute: no weight, and never cast to bfloat16
        self.whole = False  # True: under FSDP all weights are gathered; call the blocks past its hooks (train.whole_weights)
        self.fused = None  # see for_sampling
        self.recompute = False  # True: keep only each block's input for backward (a third more compute, far less memory)
        self.source: Path | None = None  # the directory it came from, whose tokenizer a save copies along

    @property
    def head_weight(self):
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def eos_ids(self) -> list[int]:
        """End-of-sequence ids: generation_config.json's if there is one (chat models list several), else config.json's."""
        ids = self.config.raw.get("eos_token_id")
        if self.source and (self.source / "generation_config.json").is_file():
            ids = json.loads((self.source / "generation_config.json").read_text()).get("eos_token_id", ids)
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @contextmanager
    def for_sampling(self):
        """Inside, on a CPU in float32, the blocks are fused(): another form of the same function, for inference alone."""
        try:
            W = self.embed_tokens.weight
            if W.device.type == "cpu" and W.dtype == torch.float32:
                with torch.no_grad():
                    self.fused = [fused(b, self.config) for b in self.layers]
            yield
        finally:
            self.fused = None

    def rope(self, positions):
        """The rotary embedding at `positions` (N,): (cos, sin) as rotate() takes them, or as complex numbers for fused()."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angle, dtype = positions[:, None, None].float() * self.inv_freq, self.embed_tokens.weight.dtype
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return (torch.complex(cos, sin),) if self.fused else (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))

    def body(self, ids, positions, attend, rope=None):
        """Final hidden states (N,D) of tokens `ids` (N,) at `positions` (N,); `rope` is rope(positions) if already there."""
        x, rope = self.embed_tokens(ids), rope or self.rope(positions)
        for i, layer in enumerate(self.fused or self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, attend, i, use_reentrant=False)
            else:
                x = (layer.forward if self.whole and not self.fused else layer)(x, rope, attend, i)
        return self.norm(x)

    def forward(self, ids, lengths=None, targets=None, temperature=1.0, after=None):
        """ids (B,T), right-padded: logits (B,T,V).
        ids (N,), packed sequences of `lengths` (`after`: see causal), and targets (N,), the id to be predicted at each place or
        -1 for none: (logp, entropy, sum p^2) at the places that have one, in order; only logp has gradient."""
        if lengths is None:
            B, T = ids.shape
            positions, attend = causal([T] * B, ids.device, self.embed_tokens.weight.dtype)
            return (self.body(ids.flatten(), positions, attend) @ self.head_weight.T).view(B, T, -1)
        hidden = self.body(ids, *causal(lengths, ids.device, self.embed_tokens.weight.dtype, after))
        at = (targets >= 0).nonzero()[:, 0]
        return TokenLogp.apply(hidden[at], self.head_weight, targets[at], temperature)

    # ---- checkpoints ----

    @staticmethod
    def from_scratch(raw: dict, seed: int = 0, device="cpu") -> "Model":
        """A new model with random weights (normal, 0.02, as transformers initialises) for a config.json given as dict."""
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
        """A checkpoint directory, or a hub id (downloaded once into huggingface_hub's cache; HF_HUB_OFFLINE is respected).
        Raises FileNotFoundError or ValueError, one line that names the file or tensor."""
        model = Model.from_config(path_or_hub_id).to(dtype).to_empty(device=device)
        return model.load_weights()

    @staticmethod
    def from_config(path_or_hub_id) -> "Model":
        """The architecture of a checkpoint on the meta device, without weights: shard it, then `load_weights()`."""
        source = find_checkpoint(path_or_hub_id)
        try:
            config = Config.from_dict(json.loads((source / "config.json").read_text()))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{source / 'config.json'}: {e}") from None
        with torch.device("meta"):
            model = Model(config)
        model.source = source
        return model

    def load_weights(self) -> "Model":
        """Stream self.source's safetensors in, one tensor at a time, cast to each parameter's dtype; a rank of a sharded
        model keeps its own slice only."""
        wanted, problems = dict(self.named_parameters()), []
        files = sorted(self.source.glob("*.safetensors"))
        if (index := self.source / "model.safetensors.index.json").is_file():
            files = sorted({self.source / f for f in json.loads(index.read_text())["weight_map"].values()})
        for file in files:
            try:
                with safe_open(file, framework="pt") as f:
                    for key in f.keys():
                        name = key.removeprefix("model.")
                        p = wanted.pop(name, None)
                        if p is not None and tuple(f.get_slice(key).get_shape()) == tuple(p.shape):
                            copy_into(p, f.get_tensor(key))
                        elif p is not None:
                            problems.append(f"{key} is {list(f.get_slice(key).get_shape())}, expected {list(p.shape)}")
                        elif not (name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"):  # tied: a copy
                            problems.append(f"{key} unexpected")
            except (SafetensorError, FileNotFoundError) as e:
                raise ValueError(f"{file}: not readable as safetensors ({e}); download or copy it again") from None
        problems += [f"{name} missing" for name in wanted]
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(f"{self.source}: weights do not fit config.json: {'; '.join(problems[:8])}{more}")
        return self

    @torch.no_grad()
    def save_pretrained(self, directory, dtype=None, write=True) -> None:
        """Write a checkpoint that transformers and vLLM load: config.json, safetensors in shards of 5 GB, and the
        tokenizer files of `self.source`. Written aside and renamed: `directory` is whole or absent, also if killed.
        Sharded models: every rank must call it (each tensor is gathered in turn), one with write=True."""
        directory, tensors = Path(directory), dict(self.named_parameters())
        dtype = dtype or next(iter(tensors.values())).dtype
        aside = directory.with_name(f".{directory.name}.{os.getpid()}")
        if write:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        shards, room = [[]], SHARD_BYTES
        for name, p in tensors.items():
            size = p.numel() * dtype.itemsize
            if size > room and shards[-1]:
                shards, room = shards + [[]], SHARD_BYTES
            shards[-1].append(name)
            room -= size
        where = {}
        for i, names in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            shard = {}
            for name in names:
                t = tensors[name].full_tensor() if hasattr(tensors[name], "full_tensor") else tensors[name]
                if write:
                    key = name if name.startswith("lm_head") else f"model.{name}"
                    shard[key], where[key] = t.detach().to("cpu", dtype).contiguous(), file
            if write:
                save_file(shard, aside / file, metadata={"format": "pt"})
        if not write:
            return
        if len(shards) > 1:
            total = sum(p.numel() for p in tensors.values()) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        raw = {k: v for k, v in self.config.raw.items() if k != "torch_dtype"}
        (aside / "config.json").write_text(json.dumps({**raw, "dtype": str(dtype).removeprefix("torch.")}, indent=1))
        for pattern in TOKENIZER_FILES if self.source else ():
            for file in self.source.glob(pattern):
                shutil.copy(file, aside)
        replace_directory(aside, directory)


def copy_into(p, t):
    """Copy the full tensor `t` into parameter `p`, or this rank's slice of it where p is sharded."""
    with torch.no_grad():
        if hasattr(p, "placements"):
            from torch.distributed.tensor import distribute_tensor
            t = distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local()
            p = p.to_local()
        p.copy_(t)


def replace_directory(aside: Path, directory: Path) -> None:
    """Rename `aside` to `directory`; one that is there already goes away only after the new one stands ready."""
    old = directory.with_name(f".{directory.name}.old.{os.getpid()}")
    if directory.exists():
        directory.rename(old)
    aside.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(path_or_hub_id) -> Path:
    """The directory of a checkpoint: local, or fetched from the hub (or its cache). One clear line if there is none."""
    path = Path(path_or_hub_id)
    if (path / "latest").is_file():  # a run directory of train.py: its newest checkpoint
        path = path / (path / "latest").read_text()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path}: no config.json here; a checkpoint directory holds config.json and *.safetensors")
        if not list(path.glob("*.safetensors")):
            raise FileNotFoundError(f"{path}: no *.safetensors here (pickled .bin weights are not read)")
        return path
    name = str(path_or_hub_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", *TOKENIZER_FILES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise FileNotFoundError(f"{name}: no such directory, and the hub did not give it ({type(e).__name__}: {reason}); "
                                "offline, pass a local directory") from None
