"""Backbones and heads: text in, one hidden vector per token out, and small heads on top.

Read in this order:

    attend                       attention over a ragged batch (ragged.py): every token sees its own sequence, both ways
    Decoder, ModernBert, Bert    the backbones; parameter names are the Hugging Face names of each architecture
    EditFlowModel, MEDLMModel    backbone + the heads of the two methods
    weighted_nll                 cross-entropy through a wide vocabulary without ever holding [T, V] floats
    build, load, save            new models from presets; checkpoints as config.json + safetensors

A language model that edits must look both ways, so decoder-only checkpoints (Llama, Qwen, ...) run here without their
causal mask. Both models return hidden states [T, D]; the heads are then applied only to the rows that are needed.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ragged import Ragged

SHORT = 192  # up to this length one padded softmax trains faster than a call per sequence on CPU (`bench.py attention`)


# ---------------------------------------------------------------------------------------------------- attention


def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None = None) -> Tensor:
    """Bidirectional attention inside each sequence of a ragged batch.

    q [T, H, hd]; k, v [T, KV, hd] with H a multiple of KV; returns [T, H, hd].
    window: None for full attention, else token i sees the tokens j with |i - j| <= window.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # norms on the way may have made them float32 (Qwen3 under autocast on CUDA)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        side = -1 if window is None else window
        groups = q.shape[1] // k.shape[1]  # expanded here: torch 2.11 has no enable_gqa
        k, v = (z.repeat_interleave(groups, dim=1) if groups > 1 else z for z in (k, v))
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(side, side))
    if max_seqlen <= SHORT and torch.is_grad_enabled():
        return _attend_padded(q, k, v, cu_seqlens, max_seqlen, window)
    fences = cu_seqlens.tolist()
    rows = [_attend_one(q[a:b], k[a:b], v[a:b], window) for a, b in zip(fences[:-1], fences[1:]) if b > a]
    return torch.cat(rows)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    mask = None
    if window is not None and len(q) > window + 1:
        i = torch.arange(len(q), device=q.device)
        mask = (i[:, None] - i).abs() <= window
    q, k, v = (z.transpose(0, 1)[None] for z in (q, k, v))  # [1, H, L, hd]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, L: int, window: int | None) -> Tensor:
    """One softmax over all heads of all sequences, [B, H, L, L]. Keys beyond a sequence's end are hidden, so that the
    padding may hold anything; here, copies of the sequence's last token."""
    T, H, hd = q.shape
    B, groups = len(cu_seqlens) - 1, H // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    start, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    column, head = torch.arange(L, device=q.device), torch.arange(H, device=q.device)
    token = torch.minimum(start + lengths - 1, start + column[:, None]).clamp_min(0).T  # [B, L]: which token sits there
    source = (token[:, None] * H + head[:, None]).flatten()  # [B * H * L] into the rows of q.reshape(T * H, hd)
    slot = torch.arange(T, device=q.device) + (torch.arange(B, device=q.device) * (H * L) - start).repeat_interleave(
        lengths, output_size=T
    )
    slot = (slot[:, None] + head * L).flatten()  # [T * H] into the rows of the padded ones: the inverse of `source`
    q, k, v = (_Pad.apply(z.reshape(T * H, hd), source, slot).view(B * H, L, hd) for z in (q * hd**-0.5, k, v))

    hidden = (column >= lengths[:, None])[:, None, None]  # [B, 1, 1, L]
    if window is not None:
        hidden = hidden | ((column[:, None] - column).abs() > window)
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, L, L)
    # a finite floor: a padding row may see nothing at all, and softmax over -inf alone is NaN
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).to(v.dtype)
    out = torch.bmm(weights.view(B * H, L, L), v)
    return _Unpad.apply(out.view(B * H * L, hd), slot).view(T, H, hd)


class _Pad(torch.autograd.Function):
    """Rows of x in a padded order. The padding gets no gradient, so the backward pass is a gather, not a sum."""

    @staticmethod
    def forward(ctx, x, source, slot):
        ctx.save_for_backward(slot)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, d_out):
        return d_out.index_select(0, *ctx.saved_tensors), None, None


class _Unpad(torch.autograd.Function):
    """The rows that are no padding, in their old order."""

    @staticmethod
    def forward(ctx, x, slot):
        ctx.save_for_backward(slot)
        ctx.rows = len(x)
        return x.index_select(0, slot)

    @staticmethod
    def backward(ctx, d_out):
        return d_out.new_zeros(ctx.rows, d_out.shape[1]).index_copy_(0, *ctx.saved_tensors, d_out), None


def rotary(positions: Tensor, head_dim: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (RoPE, Su et al. 2021): cos and sin, each float32 [T, 1, head_dim / 2].

    scaling: a config's `rope_scaling`; types default, linear and llama3. Raises ValueError for others.
    """
    inv_freq = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind == "linear":
        inv_freq = inv_freq / scaling["factor"]
    elif kind == "llama3":  # slow frequencies are stretched, fast ones kept, the band between interpolated
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = inv_freq * (keep + (1 - keep) / scaling["factor"])
    elif kind != "default":
        raise ValueError(f"config.json: rope_scaling type {kind!r} is not supported (default, linear, llama3 are)")
    angles = positions[:, None, None].float() * inv_freq  # [T, 1, hd / 2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [T, H, hd]; the pairs are (i, i + hd / 2), as in all checkpoints we read. Computed in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------- decoder family


class DecoderAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=c.attention_bias)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=c.attention_out_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, h, rope, x: Ragged):
        q, k, v = (proj(h).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        return self.o_proj(attend(q, k, v, x.cu_seqlens, x.max_seqlen).flatten(1))


class SwiGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, h):
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = DecoderAttention(c)
        self.mlp = SwiGLU(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, h, rope, x: Ragged):
        h = h + self.self_attn(self.input_layernorm(h), rope, x)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    """Llama, Qwen2, Qwen3, Dream and LLaDA, run in both directions. [T] token ids -> [T, D]."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Ragged, extra: Tensor | None = None) -> Tensor:
        c = self.config
        h = self.embed_tokens(x.ids)
        h = h if extra is None else h + extra
        rope = rotary(x.positions, c.head_dim, c.rope_theta, c.rope_scaling)
        for layer in self.layers:
            h = run(self, layer, h, rope, x)
        return self.norm(h)


def run(backbone: nn.Module, layer: nn.Module, *inputs):
    """One block; under gradient checkpointing its activations are recomputed in the backward pass."""
    if backbone.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


def hidden_states(backbone: nn.Module, x: Ragged, extra: Tensor | None = None) -> Tensor:
    """backbone(x, extra), [T, D].

    In bf16 on CPUs, oneDNN compiles a kernel for every new matrix shape, and the number of tokens is new at every step
    (measured on a linear layer of 704 x 256 at 1500 tokens: 16 ms a step instead of 6). So there the row is filled up
    to a multiple of 64 tokens with sequences of its own, which no other sequence can see; their rows are dropped.
    """
    T = len(x.ids)
    filler = -T % 64
    if x.ids.is_cuda or not torch.is_autocast_enabled("cpu") or not filler or not T:
        return backbone(x, extra)
    fences = [*range(T + x.max_seqlen, T + filler, x.max_seqlen), T + filler]
    filled = Ragged(F.pad(x.ids, (0, filler)), torch.cat([x.cu_seqlens, x.cu_seqlens.new_tensor(fences)]), x.max_seqlen)
    return backbone(filled, None if extra is None else F.pad(extra, (0, 0, 0, filler)))[:T]


# ---------------------------------------------------------------------------------------------------- ModernBERT


class ModernBertLayer(nn.Module):
    def __init__(self, c, is_first: bool):
        super().__init__()
        bias = c.attention_bias
        self.heads = c.num_attention_heads
        # the embeddings are normalised already, so the first block has no attention norm
        self.attn_norm = nn.Identity() if is_first else nn.LayerNorm(c.hidden_size, c.norm_eps, bias=c.norm_bias)
        self.attn = nn.ModuleDict(
            {
                "Wqkv": nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=bias),
                "Wo": nn.Linear(c.hidden_size, c.hidden_size, bias=bias),
            }
        )
        self.mlp_norm = nn.LayerNorm(c.hidden_size, c.norm_eps, bias=c.norm_bias)
        self.mlp = nn.ModuleDict(
            {
                "Wi": nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias),
                "Wo": nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias),
            }
        )

    def forward(self, h, rope, x: Ragged, window):
        qkv = self.attn["Wqkv"](self.attn_norm(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.unbind(1)  # each [T, H, hd]
        mixed = attend(rotate(q, *rope), rotate(k, *rope), v, x.cu_seqlens, x.max_seqlen, window)
        h = h + self.attn["Wo"](mixed.flatten(1))
        value, gate = self.mlp["Wi"](self.mlp_norm(h)).chunk(2, dim=-1)
        return h + self.mlp["Wo"](F.gelu(value) * gate)


class ModernBert(nn.Module):
    """ModernBERT with its prediction head: local attention, every third block global. [T] token ids -> [T, D]."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.gradient_checkpointing = False
        norm = {"eps": c.norm_eps, "bias": c.norm_bias}
        self.embeddings = nn.ModuleDict(
            {
                "tok_embeddings": nn.Embedding(c.vocab_size, c.hidden_size),
                "norm": nn.LayerNorm(c.hidden_size, **norm),
            }
        )
        self.layers = nn.ModuleList(ModernBertLayer(c, is_first=i == 0) for i in range(c.num_hidden_layers))
        self.final_norm = nn.LayerNorm(c.hidden_size, **norm)
        self.head = nn.ModuleDict(
            {
                "dense": nn.Linear(c.hidden_size, c.hidden_size, bias=c.classifier_bias),
                "norm": nn.LayerNorm(c.hidden_size, **norm),
            }
        )

    def forward(self, x: Ragged, extra: Tensor | None = None) -> Tensor:
        c = self.config
        h = self.embeddings["tok_embeddings"](x.ids)
        h = self.embeddings["norm"](h if extra is None else h + extra)
        head_dim = c.hidden_size // c.num_attention_heads
        full, local = (
            rotary(x.positions, head_dim, c.global_rope_theta),
            rotary(x.positions, head_dim, c.local_rope_theta),
        )
        for i, layer in enumerate(self.layers):
            is_global = c.layer_types[i] == "full_attention"
            h = run(self, layer, h, full if is_global else local, x, None if is_global else c.local_attention // 2)
        return self.head["norm"](F.gelu(self.head["dense"](self.final_norm(h))))


# ---------------------------------------------------------------------------------------------------- BERT, RoBERTa


class BertLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, eps = c.hidden_size, c.layer_norm_eps
        self.heads = c.num_attention_heads
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(D, D) for name in ("query", "key", "value")}),
                "output": nn.ModuleDict({"dense": nn.Linear(D, D), "LayerNorm": nn.LayerNorm(D, eps)}),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, c.intermediate_size)})
        self.output = nn.ModuleDict({"dense": nn.Linear(c.intermediate_size, D), "LayerNorm": nn.LayerNorm(D, eps)})

    def forward(self, h, x: Ragged):
        q, k, v = (
            self.attention["self"][name](h).unflatten(-1, (self.heads, -1)) for name in ("query", "key", "value")
        )
        out = self.attention["output"]
        h = out["LayerNorm"](h + out["dense"](attend(q, k, v, x.cu_seqlens, x.max_seqlen).flatten(1)))
        return self.output["LayerNorm"](h + self.output["dense"](F.gelu(self.intermediate["dense"](h))))


class Bert(nn.Module):
    """BERT and RoBERTa with their prediction transform: absolute positions, post-norm. [T] token ids -> [T, D]."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.gradient_checkpointing = False
        D, eps = c.hidden_size, c.layer_norm_eps
        self.max_positions = max_positions(c)
        self.first_position = c.max_position_embeddings - self.max_positions  # RoBERTa: pad_token_id + 1
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(c.vocab_size, D),
                "position_embeddings": nn.Embedding(c.max_position_embeddings, D),
                "token_type_embeddings": nn.Embedding(c.type_vocab_size, D),
                "LayerNorm": nn.LayerNorm(D, eps),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(c) for _ in range(c.num_hidden_layers))})
        self.transform = nn.ModuleDict({"dense": nn.Linear(D, D), "LayerNorm": nn.LayerNorm(D, eps)})

    @property
    def layers(self):
        return self.encoder["layer"]

    def forward(self, x: Ragged, extra: Tensor | None = None) -> Tensor:
        if x.max_seqlen > self.max_positions:
            raise ValueError(f"a sequence of {x.max_seqlen} tokens exceeds the model's {self.max_positions} positions")
        e = self.embeddings
        h = e["word_embeddings"](x.ids) + e["position_embeddings"](x.positions + self.first_position)
        h = h + e["token_type_embeddings"].weight[0]
        h = e["LayerNorm"](h if extra is None else h + extra)
        for layer in self.layers:
            h = run(self, layer, h, x)
        return self.transform["LayerNorm"](F.gelu(self.transform["dense"](h)))


# ---------------------------------------------------------------------------------------------------- architectures

_DECODER = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None,
    "attention_bias": False, "attention_out_bias": False, "mlp_bias": False, "qk_norm": False,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "vocab_bias": False,
}  # fmt: skip
_BERT = {
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "vocab_bias": True,
}

# model_type -> backbone, defaults for what a config may leave out, and (our prefix, prefix on disk) where names differ
ARCHITECTURES = {
    "llama": (Decoder, _DECODER, []),
    "llada": (Decoder, _DECODER | {"rope_theta": 500000.0, "rms_norm_eps": 1e-5}, []),
    "qwen2": (Decoder, _DECODER | {"attention_bias": True}, []),
    "dream": (Decoder, _DECODER | {"attention_bias": True}, []),
    "qwen3": (Decoder, _DECODER | {"qk_norm": True}, []),
    "modernbert": (
        ModernBert,
        {
            "norm_eps": 1e-5, "norm_bias": False, "attention_bias": False, "mlp_bias": False, "classifier_bias": False,
            "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "local_attention": 128,
            "global_attn_every_n_layers": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
            "vocab_bias": True,
        },
        [("model.head.", "head.")],
    ),
    "bert": (Bert, _BERT, [("model.transform.", "cls.predictions.transform."), ("model.", "bert.")]),
    "roberta": (
        Bert,
        _BERT | {"layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1},
        [
            ("model.transform.dense.", "lm_head.dense."),
            ("model.transform.LayerNorm.", "lm_head.layer_norm."),
            ("model.", "roberta."),
        ],
    ),
}  # fmt: skip

# LLaDA's own names, of checkpoints whose config speaks of d_model: (our part of a name, theirs)
LLADA_NAMES = [
    ("model.embed_tokens.", "model.transformer.wte."), ("model.norm.", "model.transformer.ln_f."),
    ("lm_head.", "model.transformer.ff_out."), ("model.layers.", "model.transformer.blocks."),
    (".self_attn.q_proj.", ".q_proj."), (".self_attn.k_proj.", ".k_proj."), (".self_attn.v_proj.", ".v_proj."),
    (".self_attn.o_proj.", ".attn_out."), (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ff_norm."), (".mlp.gate_proj.", ".ff_proj."), (".mlp.up_proj.", ".up_proj."),
    (".mlp.down_proj.", ".ff_out."),
]  # fmt: skip

# Sizes for models trained from scratch, all of the Llama kind. The last two are the shapes reported for Edit Flows
# (280M: D 1024, 12 layers, 16 / 8 heads; 1.3B: D 2048, 16 layers, 32 / 8 heads) with a vocabulary of about 128k.
PRESETS = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 352},
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 704},
    "medium": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1408},
    "280m": {
        "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 8,
        "intermediate_size": 3072,
    },
    "1.3b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
}  # fmt: skip


OPTIONAL_SIZES = (
    "num_key_value_heads", "head_dim", "local_attention", "global_attn_every_n_layers", "type_vocab_size",
)  # fmt: skip
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", *OPTIONAL_SIZES,
)  # fmt: skip
SCALES = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "rope_theta", "global_rope_theta", "local_rope_theta")


def complete_config(raw: dict) -> SimpleNamespace:
    """A Hugging Face config.json with its gaps filled, so that backbones can read every field they need.

    Raises ValueError for an unsupported `model_type` or a missing size.
    """
    raw = dict(raw)
    kind = str(raw.get("model_type", "")).lower().removeprefix("editflow-")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type {raw.get('model_type')!r} is not supported; these are: {', '.join(ARCHITECTURES)}"
        )
    if "d_model" in raw:
        raw |= llada_config(raw)
    rope = raw.get("rope_parameters") or {}  # as transformers 5 writes it: theta and scaling, for ModernBERT twice
    parts = [rope.get(key, {}) for key in ("full_attention", "sliding_attention")] if isinstance(rope, dict) else [rope]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"config.json: field 'rope_parameters' must be an object, found {rope!r}")
    if "rope_theta" in rope:
        raw |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope}
    if "full_attention" in rope:
        raw |= {
            "global_rope_theta": rope["full_attention"]["rope_theta"],
            "local_rope_theta": rope["sliding_attention"]["rope_theta"],
        }
    c = SimpleNamespace(**ARCHITECTURES[kind][1] | raw | {"model_type": kind})
    c.nanoedit = raw.get("nanoedit", {})
    if not isinstance(c.nanoedit, dict):
        raise ValueError(f"config.json: field 'nanoedit' must be an object, found {c.nanoedit!r}")
    c.nanoedit = dict(c.nanoedit)
    if c.nanoedit.get("method", "medlm") not in list(METHODS):
        raise ValueError(f"config.json: method {c.nanoedit['method']!r} is not known; one of {', '.join(METHODS)}")
    for field in ("schedule", "x0_sampler"):
        if not isinstance(c.nanoedit.get(field, ""), str):
            raise ValueError(f"config.json: {field} must be text, found {c.nanoedit[field]!r}")
    if str(raw["model_type"]).lower().startswith("editflow-"):
        c.published_as = raw["model_type"]  # written back by `save`
    for field in SIZES:
        size = getattr(c, field, None)
        if (type(size) is not int or size < 1) and not (size is None and field in OPTIONAL_SIZES):
            raise ValueError(f"config.json: field {field!r} must be a positive integer, found {size!r}")
    for field in SCALES:
        scale = getattr(c, field, 1.0)
        if type(scale) not in (int, float) or not 0 < scale < math.inf:
            raise ValueError(f"config.json: field {field!r} must be a number above 0, found {scale!r}")
    if c.hidden_size % c.num_attention_heads and not getattr(c, "head_dim", None):
        heads = f"num_attention_heads {c.num_attention_heads}"
        raise ValueError(f"config.json: hidden_size {c.hidden_size} must be a multiple of {heads}")
    if not isinstance(getattr(c, "rope_scaling", None), dict | None):
        raise ValueError(f"config.json: field 'rope_scaling' must be an object, found {c.rope_scaling!r}")
    is_decoder = ARCHITECTURES[kind][0] is Decoder
    for field in ("hidden_act", "hidden_activation"):
        if raw.get(field, "silu" if is_decoder else "gelu") != ("silu" if is_decoder else "gelu"):
            raise ValueError(f"config.json: {field} {raw[field]!r} is not supported for {kind}")
    if is_decoder:
        c.num_key_value_heads = c.num_key_value_heads or c.num_attention_heads
        c.head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
        if c.head_dim % 2:
            raise ValueError(f"config.json: head_dim {c.head_dim} must be even: positions turn pairs of numbers")
        try:
            rotary(torch.zeros(1), c.head_dim, c.rope_theta, c.rope_scaling)
        except (LookupError, TypeError, ZeroDivisionError):
            raise ValueError(f"config.json: rope_scaling {c.rope_scaling!r} lacks a number of its type") from None
        if c.num_attention_heads % c.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads {c.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{c.num_key_value_heads}"
            )
        if kind in ("llama", "qwen3"):  # their one switch is for all four projections
            c.attention_out_bias = c.attention_bias
    if kind == "modernbert" and not raw.get("layer_types"):  # transformers 5 writes the list, older configs the period
        c.layer_types = [
            "sliding_attention" if i % c.global_attn_every_n_layers else "full_attention"
            for i in range(c.num_hidden_layers)
        ]
    return c


def llada_config(raw: dict) -> dict:
    """The fields of LLaDA's own config under the names of Llama's. Raises ValueError for another kind of block."""
    for field, value in {"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu"}.items():
        if raw.get(field, value) != value:
            raise ValueError(f"config.json: {field} {raw[field]!r} is not supported, only {value!r}")
    heads = raw.get("n_heads")
    return {
        "vocab_size": raw.get("embedding_size") or raw.get("vocab_size"),
        "hidden_size": raw["d_model"],
        "num_hidden_layers": raw.get("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("n_kv_heads") or (1 if raw.get("multi_query_attention") else heads),
        "intermediate_size": raw.get("mlp_hidden_size") or raw.get("mlp_ratio", 4) * raw["d_model"],
        "max_position_embeddings": raw.get("max_sequence_length", 4096),
        "rope_theta": raw.get("rope_theta", 500000.0),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-5),
        "tie_word_embeddings": bool(raw.get("weight_tying", False)),
    }


def max_positions(c) -> int:
    """The longest sequence that a backbone was made for. RoBERTa's first positions are never used."""
    return c.max_position_embeddings - (c.pad_token_id + 1 if c.model_type == "roberta" else 0)


# ---------------------------------------------------------------------------------------------------- heads


class EditFlowModel(nn.Module):
    """Backbone + the heads of Edit Flows: three rates and two token distributions per token.

    rate_heads  D -> 3, softplus   normalised rates; columns: substitute, delete, insert (to the right)
    sub_logits  D -> V             what a substituted token becomes
    ins_logits  D -> V             what an insertion inserts
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, V = config.hidden_size, config.vocab_size
        self.model = ARCHITECTURES[config.model_type][0](config)
        self.rate_heads = nn.Sequential(nn.Linear(D, 3), nn.Softplus())
        self.sub_logits = nn.Linear(D, V, bias=config.vocab_bias)
        self.ins_logits = nn.Linear(D, V, bias=config.vocab_bias)
        if config.nanoedit.get("time_conditioned"):
            self.time_embed = nn.Sequential(nn.Linear(TIME_FEATURES, D), nn.SiLU(), nn.Linear(D, D))
        if str(config.nanoedit.get("x0_sampler")).startswith("uniform"):
            self.set_unigram(torch.ones(V) / V)

    def set_unigram(self, frequencies: Tensor) -> None:
        """Token frequencies [V] of the training data: where the source `uniform` draws x0 from. Kept in checkpoints."""
        self.register_buffer("unigram", frequencies)

    def forward(self, x: Ragged, t: Tensor | None = None) -> Tensor:
        """Hidden states [T, D]. t float [B] is read by time-conditioned models only."""
        extra = self.time_embed(time_features(t))[x.batch] if hasattr(self, "time_embed") else None
        return hidden_states(self.model, x, extra)


class MEDLMModel(nn.Module):
    """Backbone + the heads of ME-DLM: what a token should become, and what should stand right after it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = ARCHITECTURES[config.model_type][0](config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.vocab_bias)
        self.next_token_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.vocab_bias)

    def forward(self, x: Ragged, t: Tensor | None = None) -> Tensor:
        """Hidden states [T, D]. ME-DLM is not conditioned on t; the argument keeps the two models interchangeable."""
        return hidden_states(self.model, x)


METHODS = {"editflow": EditFlowModel, "medlm": MEDLMModel}
TIME_FEATURES = 128


def time_features(t: Tensor) -> Tensor:
    """Sinusoids of t in [0, 1] at 64 frequencies from 1 to 1000 rad: [B] -> [B, 128]."""
    freq = torch.logspace(0, 3, TIME_FEATURES // 2, device=t.device)
    return torch.cat([(t[:, None] * freq).cos(), (t[:, None] * freq).sin()], dim=1).float()


class _WeightedNLL(torch.autograd.Function):
    """The gradient is computed chunk by chunk in the forward pass, while the logits of the chunk are at hand."""

    @staticmethod
    def forward(ctx, hidden, W, bias, row, token, weight):
        N, V = len(hidden), len(W)
        need_grad = any(ctx.needs_input_grad[:3])
        # the caller's autocast decides the precision of the products; sums and softmax are float32
        kind = (
            torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else W.dtype
        )
        H, W_ = hidden.to(kind), W.to(kind)
        row_weight = hidden.new_zeros(N, dtype=torch.float32).index_add_(0, row, weight)
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden, d_W, d_bias = torch.zeros_like(hidden), torch.zeros_like(W) if need_grad else None, None
        if need_grad and bias is not None:
            d_bias = torch.zeros_like(bias)
        order = row.argsort()
        row, token, weight = row[order], token[order], weight[order]
        step = max(1, CHUNK_FLOATS // V)
        fences = torch.searchsorted(row, torch.arange(0, N + step, step, device=row.device)).tolist()
        for i, start in enumerate(range(0, N, step)):
            rows, edits = slice(start, start + step), slice(fences[i], fences[i + 1])
            logits = F.linear(H[rows], W_).float()  # [n, V]
            logits = logits if bias is None else logits.add_(bias.float())
            lse = logits.logsumexp(1)
            r, tok, w = row[edits] - start, token[edits], weight[edits]
            loss += (row_weight[rows] * lse).sum() - (w * logits[r, tok]).sum()
            if need_grad:  # d logits = row_weight * softmax - sum of weighted one-hots
                grad = logits.sub_(lse[:, None]).exp_().mul_(row_weight[rows, None])
                grad.index_put_((r, tok), -w, accumulate=True)
                if d_bias is not None:
                    d_bias += grad.sum(0)
                grad = grad.to(kind)
                d_hidden[rows] = grad @ W_
                d_W += grad.T @ H[rows]
        ctx.grads = d_hidden, d_W, d_bias
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        grads = [None if g is None else g.mul_(d_loss.to(g.dtype)) for g in ctx.grads]  # ours alone: no copy
        ctx.grads = None
        return *grads, None, None, None


CHUNK_FLOATS = 1 << 24  # logits held at a time: 64 MB in float32


def weighted_nll(hidden: Tensor, head: nn.Linear, row: Tensor, token: Tensor, weight: Tensor) -> Tensor:
    """Sum over e of  weight_e * -log softmax(head(hidden[row_e]))[token_e],  without [N, V] floats.

    hidden [N, D]; row, token int64 [E]; weight float [E]. Several e may share a row (many insertions in one gap): each
    row is projected once. E and N may be 0; the head then still takes part in the graph, with a zero gradient.
    Returns a float32 scalar.
    """
    used, row = row.unique(return_inverse=True)
    if len(used) and not hidden.is_cuda:
        used = F.pad(used, (0, -len(used) % 64))  # rows of weight 0: see hidden_states
    return _WeightedNLL.apply(hidden[used], head.weight, head.bias, row, token, weight.float())


# ---------------------------------------------------------------------------------------------------- checkpoints


def preset_sizes(preset: str) -> dict:
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset!r} is not known; choose from {', '.join(PRESETS)}")
    return PRESETS[preset]


def build(method: str, preset: str, vocab_size: int, *, time_conditioned=False, seed=0, **nanoedit) -> nn.Module:
    """A new model with random weights. preset: a key of PRESETS. `nanoedit` goes into the checkpoint's config."""
    nanoedit = {"method": method, "time_conditioned": time_conditioned} | nanoedit
    config = complete_config(
        {"model_type": "llama", "vocab_size": vocab_size} | preset_sizes(preset) | {"nanoedit": nanoedit}
    )
    model = METHODS[method](config)
    generator = torch.Generator().manual_seed(seed)
    init_weights(model, generator)
    return model


def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Linear layers N(0, 1 / fan_in), embeddings N(0, 1 / D); then the heads that start otherwise."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=m.in_features**-0.5, generator=generator)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Embedding):
            nn.init.normal_(m.weight, std=m.embedding_dim**-0.5, generator=generator)
    init_new_heads(module, generator)


def init_new_heads(model: nn.Module, generator: torch.Generator) -> None:
    """What no pretrained checkpoint has: small rates to begin with, and a time embedding that adds exactly nothing."""
    if isinstance(model, EditFlowModel):
        nn.init.normal_(model.rate_heads[0].weight, std=0.02, generator=generator)
        nn.init.constant_(model.rate_heads[0].bias, -2.0)  # softplus(-2) = 0.13 edits per token
        if hasattr(model, "time_embed"):
            nn.init.zeros_(model.time_embed[2].weight)
            nn.init.zeros_(model.time_embed[2].bias)


CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def local_path(path_or_hub_id: str, patterns=CHECKPOINT_FILES, revision: str | None = None) -> Path:
    """A local directory (of a run: its final or newest checkpoint), or a hub repository fetched into the hub's cache.

    Downloads are resumed. Raises OSError saying what was tried.
    """
    directory = Path(path_or_hub_id)
    if directory.is_dir() and not (directory / "config.json").is_file():
        runs = [file.parent for file in directory.glob("checkpoint-*/config.json")]
        return max(runs, key=checkpoint_step, default=directory)
    if directory.is_dir():
        return directory
    if Path(path_or_hub_id).is_absolute() or str(path_or_hub_id).count("/") != 1 or str(path_or_hub_id).startswith("."):
        raise OSError(f"{path_or_hub_id}: no such directory, and not of the form owner/name of a hub repository")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=list(patterns), revision=revision))
    except Exception as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise OSError(f"{path_or_hub_id}: no such directory, and the hub did not deliver it ({reason})") from e


def checkpoint_step(directory: Path) -> float:
    """How far a checkpoint-* directory of a run is trained; -1 where nothing tells."""
    try:
        return json.loads((directory / "train_state.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        name = directory.name.removeprefix("checkpoint-")
        return math.inf if name == "final" else int(name) if name.isdecimal() else -1


def read_config(directory: Path) -> dict:
    """config.json as a dict. Raises OSError when it is absent, ValueError when it is no JSON object."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise OSError(
            f"{file}: missing; a checkpoint directory holds config.json, model.safetensors and tokenizer files"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON ({e})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(raw).__name__}")
    return raw


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it. Raises OSError for missing, ValueError for corrupt files."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return indexed_files(index, "a safetensors index")
    single = directory / "model.safetensors"
    if not single.is_file():
        raise OSError(
            f"{directory}: no model.safetensors and no model.safetensors.index.json; convert.py reads other formats"
        )
    with open_tensors(single) as f:
        return {name: single for name in f.keys()}  # noqa: SIM118


def indexed_files(index: Path, what: str) -> dict[str, Path]:
    """Tensor name -> the file beside `index` that holds it. Raises ValueError / OSError; `what` is for the message."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / file for name, file in names.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{index}: not {what} ({e})") from None
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise OSError(f"{file}: missing, although {index.name} names it")
    return files


def open_tensors(file: Path):
    """safetensors' memory map of one file, with errors that name it."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: truncated or corrupt safetensors file ({e})") from None


def disk_name(model_type: str, name: str) -> str:
    """Our parameter name -> its name in a checkpoint. They differ for encoders with a prediction head, and in LLaDA's
    own checkpoints (`naming`)."""
    return rename(name, LLADA_NAMES if model_type == "llada original" else ARCHITECTURES[model_type][2])


def rename(name: str, pairs) -> str:
    """Replaces beginnings of a name, and inner parts (they start with a dot): pairs of (old, new)."""
    for old, new in pairs:
        if name.startswith(old) or (old.startswith(".") and old in name):
            name = name.replace(old, new, 1)
    return name


def naming(config) -> str:
    """The key of `disk_name` for a checkpoint with this config."""
    return "llada original" if hasattr(config, "d_model") else config.model_type


def load(path: str, device="cpu", dtype=torch.float32, method: str | None = None) -> nn.Module:
    """An Edit Flows or ME-DLM checkpoint, from a directory or a hub id. The model is built on the meta device and its
    tensors are read from the memory map one by one. LoRA adapters are merged into their base model.

    method: when given, a checkpoint of the other method is refused. Raises OSError / ValueError naming the file.
    """
    directory = local_path(path)
    if (directory / "adapter_config.json").is_file():
        import lora  # lora.py builds on this file, so it is imported here and not at the top

        return lora.merge(lora.load(directory, device, dtype, method))
    raw = read_config(directory)
    config = complete_config(raw)
    files = tensor_files(directory)
    found = config.nanoedit.get("method") or (
        "editflow" if "rate_heads.0.weight" in files else "medlm" if "next_token_head.weight" in files else None
    )
    if found not in METHODS:
        raise ValueError(
            f"{directory}: no Edit Flows or ME-DLM heads in this checkpoint; add them with "
            f"`convert.py --to {method or 'medlm'} --model_name_or_path {path} --output_dir OUT`"
            + " (or --to editflow)" * (method is None)
        )
    if method and found != method:
        hint = "convert.py makes one from the other"
        raise ValueError(f"{directory}: this is a checkpoint of method {found!r}, but {method!r} is asked for; {hint}")
    config.nanoedit["method"] = found
    with torch.device("meta"):
        model = METHODS[found](config)
    state = {}
    for name, parameter in model.state_dict().items():
        source = disk_name(naming(config), name)
        if source not in files:
            hint = "; `convert.py --to medlm` adds it" if source == "next_token_head.weight" else ""
            raise ValueError(f"{directory}: tensor {source!r} is missing{hint}")
        state[name] = read_tensor(files[source], source, parameter.shape).to(device=device, dtype=dtype)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def check_rows(model: nn.Module, tokenizer, directory) -> None:
    """Raises ValueError where the tokenizer of a checkpoint knows more tokens than its model has rows."""
    known, rows = tokenizer.vocab_size, model.config.vocab_size
    if known > rows:
        raise ValueError(f"{directory}: the tokenizer has {known} tokens, but the model only {rows} rows for them")


def read_tensor(file: Path, name: str, shape) -> Tensor:
    """One tensor from a safetensors file. Raises ValueError when it is absent or has another shape."""
    with open_tensors(file) as f:
        if name not in f.keys():  # noqa: SIM118
            raise ValueError(f"{file}: tensor {name!r} is missing, although the index names this file for it")
        tensor = f.get_tensor(name)
    if tensor.shape != shape:
        raise ValueError(f"{file}: tensor {name!r} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
    return tensor


def save(model: nn.Module, directory: str, state: dict | None = None) -> None:
    """config.json and model.safetensors, each written to a temporary name and then renamed.

    state: the full state dict where the model itself holds only shards of it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kind = naming(model.config)
    state = {disk_name(kind, k): v.detach().cpu().contiguous() for k, v in (state or model.state_dict()).items()}
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as tmp:
        save_file(state, f"{tmp}/model.safetensors", metadata={"format": "pt"})
        config = dict(vars(model.config))
        config["model_type"] = config.pop("published_as", config["model_type"])
        Path(tmp, "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        for name in ("model.safetensors", "config.json"):
            os.replace(f"{tmp}/{name}", directory / name)
