"""Backbones: token ids in, one hidden vector per token out, [T] -> [T, D].

Read in this order:

    Config                       what a backbone reads, under the names of Hugging Face's config.json
    attend                       attention over a ragged batch (ragged.py): every token sees its own sequence, both ways
    Decoder, ModernBert, Bert    the three families; parameter names are the Hugging Face names of each architecture
    FAMILIES, PRESETS            which checkpoints these can be, and sizes for new models
    init_weights, pad_rows       random weights; a help for bf16 on CPUs

A language model that edits must look both ways, so decoder-only checkpoints (Llama, Qwen, ...) run here without their
causal mask, unless the text asks for it (`Ragged.causal`, for ar.py). What a method adds on top, its heads, stands in
the file of the method; how checkpoints are read and written, in plumbing/checkpoints.py.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ragged import Ragged

# ---------------------------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """What all families have. Each family adds its own below, right above its backbone."""

    model_type: str
    vocab_size: int
    hidden_size: int  # D
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    vocab_bias: bool = False  # whether the vocabulary heads have a bias
    nanoedit: dict = field(default_factory=dict)  # what a checkpoint remembers of its method, e.g. its schedule
    other: dict = field(default_factory=dict)  # fields of config.json that nothing here reads; kept, and saved again

    @property
    def max_positions(self) -> int:
        """The longest sequence, in tokens, that the backbone was made for."""
        return self.max_position_embeddings


# ---------------------------------------------------------------------------------------------------- attention

SHORT = 192  # up to this length one padded call trains faster than a call per sequence on CPU


def attend(q: Tensor, k: Tensor, v: Tensor, x: Ragged, window: int | None = None) -> Tensor:
    """Attention inside each sequence of a ragged batch, in both directions unless x.causal.

    q [T, H, hd]; k, v [T, KV, hd] with H a multiple of KV; returns [T, H, hd].
    window: None for full attention, else token i sees the tokens j with |i - j| <= window.
    """
    cu_seqlens, max_seqlen = x.cu_seqlens, x.max_seqlen
    q, k = q.to(v.dtype), k.to(v.dtype)  # norms on the way may have made them float32 (Qwen3 under autocast on CUDA)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        side = -1 if window is None else window
        groups = q.shape[1] // k.shape[1]  # expanded here: torch 2.11 has no enable_gqa
        k, v = (z.repeat_interleave(groups, dim=1) if groups > 1 else z for z in (k, v))
        sides = side, 0 if x.causal else side
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=sides)
    if max_seqlen <= SHORT and torch.is_grad_enabled():
        return attend_padded(q, k, v, x, window)
    fences = cu_seqlens.tolist()
    rows = [attend_one(q[a:b], k[a:b], v[a:b], x.causal, window) for a, b in zip(fences[:-1], fences[1:]) if b > a]
    return torch.cat(rows)


def sees(length: int, causal: bool, window: int | None, device) -> Tensor | None:
    """bool [L, L]: whether token i sees token j; None where all see all."""
    if not causal and (window is None or length <= window + 1):
        return None
    i = torch.arange(length, device=device)
    distance = i[:, None] - i
    near = distance.abs() <= (length if window is None else window)
    return near & (distance >= 0) if causal else near


def attend_one(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
    """One sequence: q [L, H, hd]; k, v [L, KV, hd]."""
    mask = sees(len(q), causal, window, q.device)
    q, k, v = (z.transpose(0, 1)[None] for z in (q, k, v))  # [1, H, L, hd]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, x: Ragged, window: int | None) -> Tensor:
    """All sequences in one call: scattered into [B, L], attended under a mask, gathered again."""
    filled = torch.arange(x.max_seqlen, device=q.device) < x.cu_seqlens.diff()[:, None]  # [B, L]
    visible, mask = filled[:, None, None, :], sees(x.max_seqlen, x.causal, window, q.device)
    visible = visible if mask is None else visible & mask
    visible = visible | ~filled[:, None, :, None]  # [B, 1, L, L]; padding sees all, or it would be NaN
    q, k, v = (z.new_zeros(*filled.shape, *z.shape[1:]).index_put((filled,), z).transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)[filled]


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


# ---------------------------------------------------------------------------------------------------- decoders


@dataclass
class DecoderConfig(Config):
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: D / attention heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


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
        return self.o_proj(attend(q, k, v, x).flatten(1))


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

    def forward(self, x: Ragged) -> Tensor:
        c = self.config
        h = self.embed_tokens(x.ids)
        rope = rotary(x.positions, c.head_dim, c.rope_theta, c.rope_scaling)
        for layer in self.layers:
            h = run(self, layer, h, rope, x)
        return self.norm(h)


def run(backbone: nn.Module, layer: nn.Module, *inputs):
    """One block; under gradient checkpointing its activations are recomputed in the backward pass (all families)."""
    if backbone.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


# ---------------------------------------------------------------------------------------------------- ModernBERT


@dataclass
class ModernBertConfig(Config):
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    vocab_bias: bool = True
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    classifier_bias: bool = False
    global_rope_theta: float = 160000.0
    local_rope_theta: float = 10000.0
    local_attention: int = 128  # tokens that a local block sees, half of them on either side
    global_attn_every_n_layers: int = 3
    layer_types: list[str] | None = None  # "full_attention" or "sliding_attention"; older files give the period alone

    def __post_init__(self):
        period = self.global_attn_every_n_layers
        kinds = ["sliding_attention" if i % period else "full_attention" for i in range(self.num_hidden_layers)]
        self.layer_types = self.layer_types or kinds


class ModernBertLayer(nn.Module):
    def __init__(self, c, is_first: bool):
        super().__init__()
        D, inner = c.hidden_size, c.intermediate_size
        self.heads = c.num_attention_heads
        # the embeddings are normalised already, so the first block has no attention norm
        self.attn_norm = nn.Identity() if is_first else nn.LayerNorm(D, c.norm_eps, bias=c.norm_bias)
        Wqkv, Wo = nn.Linear(D, 3 * D, bias=c.attention_bias), nn.Linear(D, D, bias=c.attention_bias)
        self.attn = nn.ModuleDict({"Wqkv": Wqkv, "Wo": Wo})
        self.mlp_norm = nn.LayerNorm(D, c.norm_eps, bias=c.norm_bias)
        Wi, Wo = nn.Linear(D, 2 * inner, bias=c.mlp_bias), nn.Linear(inner, D, bias=c.mlp_bias)
        self.mlp = nn.ModuleDict({"Wi": Wi, "Wo": Wo})

    def forward(self, h, rope, x: Ragged, window):
        qkv = self.attn["Wqkv"](self.attn_norm(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.unbind(1)  # each [T, H, hd]
        mixed = attend(rotate(q, *rope), rotate(k, *rope), v, x, window)
        h = h + self.attn["Wo"](mixed.flatten(1))
        value, gate = self.mlp["Wi"](self.mlp_norm(h)).chunk(2, dim=-1)
        return h + self.mlp["Wo"](F.gelu(value) * gate)


class ModernBert(nn.Module):
    """ModernBERT with its prediction head: local attention, every third block global. [T] token ids -> [T, D]."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.gradient_checkpointing = False
        D, norm = c.hidden_size, {"eps": c.norm_eps, "bias": c.norm_bias}
        embedding = nn.Embedding(c.vocab_size, D)
        self.embeddings = nn.ModuleDict({"tok_embeddings": embedding, "norm": nn.LayerNorm(D, **norm)})
        self.layers = nn.ModuleList(ModernBertLayer(c, is_first=i == 0) for i in range(c.num_hidden_layers))
        self.final_norm = nn.LayerNorm(D, **norm)
        dense = nn.Linear(D, D, bias=c.classifier_bias)
        self.head = nn.ModuleDict({"dense": dense, "norm": nn.LayerNorm(D, **norm)})

    def forward(self, x: Ragged) -> Tensor:
        c = self.config
        h = self.embeddings["norm"](self.embeddings["tok_embeddings"](x.ids))
        head_dim = c.hidden_size // c.num_attention_heads
        full = rotary(x.positions, head_dim, c.global_rope_theta)
        local = rotary(x.positions, head_dim, c.local_rope_theta)
        for i, layer in enumerate(self.layers):
            is_global = c.layer_types[i] == "full_attention"
            h = run(self, layer, h, full if is_global else local, x, None if is_global else c.local_attention // 2)
        return self.head["norm"](F.gelu(self.head["dense"](self.final_norm(h))))


# ---------------------------------------------------------------------------------------------------- BERT, RoBERTa


@dataclass
class BertConfig(Config):
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = True
    vocab_bias: bool = True
    layer_norm_eps: float = 1e-12
    type_vocab_size: int = 2
    pad_token_id: int = 0

    @property
    def first_position(self) -> int:
        """RoBERTa counts from pad_token_id + 1; the embeddings before that are never used."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings - self.first_position


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
        own, out = self.attention["self"], self.attention["output"]
        q, k, v = (own[name](h).unflatten(-1, (self.heads, -1)) for name in ("query", "key", "value"))
        h = out["LayerNorm"](h + out["dense"](attend(q, k, v, x).flatten(1)))
        return self.output["LayerNorm"](h + self.output["dense"](F.gelu(self.intermediate["dense"](h))))


class Bert(nn.Module):
    """BERT and RoBERTa with their prediction transform: absolute positions, post-norm. [T] token ids -> [T, D]."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.gradient_checkpointing = False
        self.position_limit = c.max_positions  # positions are a table here: beyond its end there is nothing
        D, eps = c.hidden_size, c.layer_norm_eps
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

    def forward(self, x: Ragged) -> Tensor:
        c, e = self.config, self.embeddings
        if x.max_seqlen > c.max_positions:
            raise ValueError(f"a sequence of {x.max_seqlen} tokens exceeds the model's {c.max_positions} positions")
        h = e["word_embeddings"](x.ids) + e["position_embeddings"](x.positions + c.first_position)
        h = e["LayerNorm"](h + e["token_type_embeddings"].weight[0])
        for layer in self.layers:
            h = run(self, layer, h, x)
        return self.transform["LayerNorm"](F.gelu(self.transform["dense"](h)))


# ---------------------------------------------------------------------------------------------------- families

# model_type -> backbone, its configuration, and the defaults that differ from that of the family
FAMILIES = {
    "llama": (Decoder, DecoderConfig, {}),
    "llada": (Decoder, DecoderConfig, {"rope_theta": 500000.0, "rms_norm_eps": 1e-5}),
    "qwen2": (Decoder, DecoderConfig, {"attention_bias": True}),
    "dream": (Decoder, DecoderConfig, {"attention_bias": True}),
    "qwen3": (Decoder, DecoderConfig, {"qk_norm": True}),
    "modernbert": (ModernBert, ModernBertConfig, {}),
    "bert": (Bert, BertConfig, {}),
    "roberta": (Bert, BertConfig, {"layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1}),
}

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


def backbone(config: Config) -> nn.Module:
    """The backbone of a configuration, with weights as PyTorch makes them."""
    return FAMILIES[config.model_type][0](config)


def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Linear layers N(0, 1 / fan_in), embeddings N(0, 1 / D), biases 0, in place."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=m.in_features**-0.5, generator=generator)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Embedding):
            nn.init.normal_(m.weight, std=m.embedding_dim**-0.5, generator=generator)


def pad_rows(backbone: nn.Module) -> None:
    """For bf16 on CPUs: from now on the backbone fills its rows up to a multiple of 64 tokens.

    In bf16, oneDNN compiles a kernel for every new matrix shape, and the number of tokens is new at every step
    (measured on a linear layer of 256 x 704 at 1300 to 1700 tokens: 10.7 ms a step instead of 4.8). What is filled in
    are sequences of their own, which no other sequence can see; their hidden states are dropped.
    """
    forward = backbone.forward

    def padded(x: Ragged) -> Tensor:
        T, filler = len(x.ids), -len(x.ids) % 64
        if not T or not filler:
            return forward(x)
        ends = [*range(T + x.max_seqlen, T + filler, x.max_seqlen), T + filler]
        cu_seqlens = torch.cat([x.cu_seqlens, x.cu_seqlens.new_tensor(ends)])
        longer = Ragged(F.pad(x.ids, (0, filler)), cu_seqlens, x.max_seqlen)
        return forward(longer)[:T]

    backbone.forward = padded
