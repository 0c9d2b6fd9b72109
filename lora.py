"""LoRA: train small additions to the linear layers of a large model that itself stays as it is (arXiv 2106.09685).

    y = W x + alpha / r * B A x            W [out, in] frozen; A [r, in] random; B [out, r] zero, so at first y = W x

Only A, B and the heads get gradients, optimizer state and a place in checkpoints. With `four_bit`, W itself is kept in
4 bits per weight (NF4 of QLoRA, arXiv 2305.14314) and spelled out again, layer by layer, whenever it is needed.

    add      wraps every linear layer of the blocks; what is left trainable: adapters and heads
    merged   adds B A to W: the weights of a plain model that computes the same
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64  # weights that share a scale


class LoRALinear(nn.Module):
    """A linear layer, frozen, and its addition. x [..., in] -> [..., out]."""

    def __init__(self, base: nn.Module, size: tuple[int, int], rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(size[1], rank, bias=False)
        self.lora_B = nn.Linear(rank, size[0], bias=False)
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x):
        learning = self.training and torch.is_grad_enabled()  # rollouts and evaluations see no dropout
        return self.base(x) + self.scale * self.lora_B(self.lora_A(F.dropout(x, self.dropout, learning)))


def add(model: nn.Module, rank=32, alpha=64.0, dropout=0.05, four_bit=False, seed=0) -> nn.Module:
    """Freezes the backbone and adapts every linear layer of its blocks, in place. Heads stay trainable."""
    generator = torch.Generator().manual_seed(seed)
    model.model.requires_grad_(False)
    for block in model.model.layers:
        for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
            weight = linear.weight
            base = Linear4bit(linear) if four_bit else linear
            adapted = LoRALinear(base, weight.shape, rank, alpha, dropout)
            nn.init.normal_(adapted.lora_A.weight.data, std=weight.shape[1] ** -0.5, generator=generator)
            nn.init.zeros_(adapted.lora_B.weight)
            adapted.to(weight.device)
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, adapted)
    model.lora = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    return model


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def merged(W: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
    """The weights of a plain layer that computes the same, float32 [out, in]. scale: alpha / r."""
    return W.float() + scale * B.float() @ A.float()


# ---------------------------------------------------------------------------------------------------- 4 bits


def nf4_codebook() -> Tensor:
    """The 16 values of NF4, in [-1, 1]: evenly spaced quantiles of a normal distribution, 0 among them (QLoRA)."""
    outermost = 0.9677083  # the probability at which the outermost quantile is taken
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values
    return (values / values.abs().max()).float()


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Any shape -> (uint8 [n / 2], two weights in a byte; float32 [n / BLOCK], the largest size in each block).

    0.5625 bytes per weight. n is filled up to a multiple of BLOCK.
    """
    flat = F.pad(weight.detach().float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1)
    codebook = nf4_codebook().to(weight.device)
    halfway = (codebook[1:] + codebook[:-1]) / 2
    index = torch.bucketize(flat / scale.clamp_min(1e-30)[:, None], halfway).to(torch.uint8).view(-1, 2)
    return index[:, 0] << 4 | index[:, 1], scale


def dequantize(packed: Tensor, scale: Tensor, shape, dtype=torch.float32) -> Tensor:
    codebook = nf4_codebook().to(packed.device)
    index = torch.stack([packed >> 4, packed & 15], dim=1).long()
    flat = codebook[index].view(-1, BLOCK) * scale[:, None]
    return flat.flatten()[: shape.numel()].view(shape).to(dtype)


class _Matmul4bit(torch.autograd.Function):
    """x W^T; the backward pass spells W out once more instead of keeping it."""

    @staticmethod
    def forward(ctx, x, packed, scale, shape):
        ctx.save_for_backward(packed, scale)
        ctx.shape = shape
        return F.linear(x, dequantize(packed, scale, shape, x.dtype))

    @staticmethod
    def backward(ctx, d_out):
        return d_out @ dequantize(*ctx.saved_tensors, ctx.shape, d_out.dtype), None, None, None


class Linear4bit(nn.Module):
    """A frozen linear layer in 4 bits."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        packed, scale = quantize(linear.weight)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x):
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y = _Matmul4bit.apply(x.to(kind), self.packed, self.scale, self.shape)
        return y if self.bias is None else y + self.bias.to(kind)
