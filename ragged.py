"""Ragged batches: sequences of unequal length, end to end in one flat row, with fences. Nothing is padded.

    ids         int64 [T]      b a t c a t d o g
    cu_seqlens  int32 [B + 1]  0     3     6     9       sequence b is ids[cu_seqlens[b] : cu_seqlens[b + 1]]

Both methods in this repository change lengths as they generate. On a padded rectangle every insertion would move a
whole tail and every deletion would leave a hole; on a flat row both are one boolean mask and one cumulative sum over
the fences, which is all that `apply_edits` does.

The same object travels through data, model, loss and sampler. Shapes in this repository: T tokens, B sequences,
D hidden, V vocabulary, N selected rows.

    Ragged         the row and its fences
    frozen_text    what may be edited in them, and what may not
    apply_edits    one round of edits
    uniform_noise  random numbers that do not depend on the batch; `stratified`: ones that cover it evenly
    Generated      what a method returns for one prompt
    weighted_nll   cross-entropy on chosen rows
"""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEEP, SUB, DEL, INS = 0, 1, 2, 3  # the edits, in the order in which ties are broken (edit_distance.c)
GAP = -1  # "no token here": the other side of an insertion or a deletion
FREE, ANCHOR, FROZEN = 0, 1, 2  # a token that may be edited; one that stays but may get a new right neighbour; neither


@dataclass(frozen=True)
class Ragged:
    """B sequences in one row.

    ids        int64 [T]
    cu_seqlens int32 [B + 1], cu_seqlens[0] = 0, cu_seqlens[B] = T, never decreasing
    max_seqlen length of the longest sequence
    frozen     uint8 [T] FREE, ANCHOR or FROZEN for every token; None where nobody edits
    causal     whether a token sees only those before it, and not those behind it as well
    """

    ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    frozen: Tensor | None = None
    causal: bool = False

    @staticmethod
    def pack(sequences, device=None) -> "Ragged":
        """Lists of token ids (or 1-D tensors / arrays) to one ragged row."""
        lengths = [len(s) for s in sequences]
        parts = [torch.as_tensor(s, dtype=torch.int64) for s in sequences]
        ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        return Ragged.from_lengths(ids.to(device), torch.tensor(lengths, dtype=torch.int64, device=device))

    @staticmethod
    def from_lengths(ids: Tensor, lengths: Tensor, frozen: Tensor | None = None) -> "Ragged":
        """A flat row [T] and the B lengths it divides into."""
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=ids.device)
        cu_seqlens[1:] = lengths.cumsum(0)
        return Ragged(ids, cu_seqlens, int(lengths.max()) if len(lengths) else 0, frozen)

    def unpack(self) -> list[list[int]]:
        """Back to B lists of token ids."""
        ids, fences = self.ids.tolist(), self.cu_seqlens.tolist()
        return [ids[a:b] for a, b in zip(fences[:-1], fences[1:])]

    def to(self, device) -> "Ragged":
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def select(self, chosen: Tensor) -> "Ragged":
        """The sequences for which chosen, bool [B], is true."""
        tokens = chosen[self.batch]
        frozen = None if self.frozen is None else self.frozen[tokens]
        return Ragged.from_lengths(self.ids[tokens], self.lengths[chosen], frozen)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [B]"""
        return self.cu_seqlens.diff().long()

    @cached_property
    def batch(self) -> Tensor:
        """int64 [T]: the sequence each token belongs to."""
        return torch.arange(len(self), device=self.ids.device).repeat_interleave(self.lengths)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: 0, 1, 2, ... restarting at every fence."""
        return torch.arange(len(self.ids), device=self.ids.device) - self.cu_seqlens[self.batch].long()


@dataclass
class Generated:
    """What a method returns for one prompt."""

    response: list[int]  # token ids up to the end of the message
    tokens: list[int]  # the response as it stood in the end: with its end-of-message and whatever stands behind
    passes: dict[str, int]  # forward passes made, by name
    draft: list[int] | None = None  # what was edited to become the response, where there was a draft
    details: dict[str, float] = field(default_factory=dict)  # other counts, by name
    note: str = ""  # a sentence for whoever reads the text


def apply_edits(x: Ragged, op: Tensor, sub_token: Tensor, ins_token: Tensor) -> Ragged:
    """One round of edits, all at once.

    op        uint8 [T]  KEEP, SUB or DEL for every token
    sub_token int64 [T]  what a SUB token becomes (not read elsewhere)
    ins_token int64 [T]  inserted directly to the right of the token, GAP for nothing; a deleted token may insert too

    A token followed by its insertion is two slots; the slots that hold something are the new row. What is inserted is
    FREE. Frozen tokens are the caller's to respect: `editable` says what may be done.
    """
    survivor = torch.where(op == SUB, sub_token, x.ids)
    slots = torch.stack([torch.where(op == DEL, GAP, survivor), ins_token], dim=1)  # [T, 2]
    filled = slots != GAP
    lengths = torch.zeros_like(x.lengths).index_add_(0, x.batch, filled.sum(1))
    frozen = None if x.frozen is None else F.pad(x.frozen[:, None], (0, 1), value=FREE)[filled]
    return Ragged.from_lengths(slots[filled], lengths, frozen)


def frozen_text(prompts, middles, suffixes=None, keep=None, device=None) -> Ragged:
    """B texts of which only the middle may be edited: prompt + middle + suffix, each a list of token ids.

    A frozen token never changes, and no frozen span is split: behind its last token something may be inserted (behind
    a suffix nothing), behind the others not. suffixes: None for none. keep: of each middle a list of bool, its tokens
    that are frozen as well; None for none. Raises ValueError for an empty prompt: its last token anchors what is
    inserted in front.
    """
    check_prompts(prompts)
    suffixes = suffixes or [[]] * len(prompts)
    keep = keep or [[False] * len(middle) for middle in middles]
    states = []
    for prompt, kept, suffix in zip(prompts, keep, suffixes, strict=True):
        ends = [*(not k for k in kept[1:]), True]
        states += [FROZEN] * (len(prompt) - 1) + [ANCHOR]
        states += [FREE if not k else ANCHOR if end else FROZEN for k, end in zip(kept, ends)]
        states += [FROZEN] * len(suffix)
    x = Ragged.pack([[*p, *m, *s] for p, m, s in zip(prompts, middles, suffixes, strict=True)], device)
    return replace(x, frozen=torch.tensor(states, dtype=torch.uint8, device=device))


def check_prompts(prompts) -> None:
    """Raises ValueError for an empty one."""
    if not all(map(len, prompts)):
        raise ValueError("every prompt needs at least one token (BOS): it anchors what is inserted in front")


def editable(x: Ragged) -> Tensor:
    """bool [T, 3]: whether each token may be substituted, be deleted, get a new right neighbour."""
    free, extensible = x.frozen == FREE, x.frozen != FROZEN
    return torch.stack([free, free, extensible], dim=1)


def uniform_noise(seed: Tensor, step: int, position: Tensor, stream: int | Tensor) -> Tensor:
    """Counter-based uniform numbers in (0, 1), float64: a hash of (seed, step, position, stream), which broadcast.

    A stateful generator hands out numbers in the order in which they are asked for, so a sequence would get other
    numbers, and another text, when its neighbours in the batch change. Here a draw is a pure function of its address.
    The mixer is SplitMix64's (Steele, Lea, Flood 2014); int64 multiplication wraps as it should. `stream` < 8.
    """
    key = _mix(_mix(seed) + step * 8 + stream)
    return (_mix(key + position) >> 12 & 0xFFFFFFFFFFFFF).double().add(0.5) * 2.0**-52


def stratified(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """n numbers, float [n], each U[low, high], one from each of n equal strata, in random order.

    A batch then always holds early and late times (few and many masks), which lowers the variance of the loss.
    """
    stratum = torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)
    return low + (high - low) * stratum / max(n, 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64: add the golden ratio, then scramble. Torch's >> keeps the sign; the masks make it a logical shift."""
    z = z - 0x61C8864680B583EB
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & 0x1FFFFFFFF)


# ---------------------------------------------------------------------------------------------------- cross-entropy

CHUNK = 1 << 24  # logits held at a time, in floats: 64 MB


def weighted_nll(hidden: Tensor, head: nn.Linear, row: Tensor, token: Tensor, weight: Tensor) -> Tensor:
    """Sum over e of  weight_e * -log softmax(head(hidden[row_e]))[token_e],  without [N, V] floats.

    hidden [N, D]; row, token int64 [E]; weight float [E]. Several e may share a row (many insertions in one gap): each
    row is projected once. E and N may be 0; the head then still takes part in the graph, with a zero gradient.
    Returns a float32 scalar. (`torch.nn.functional.linear_cross_entropy` gives the same, 1.9 times slower on a CPU:
    it projects a row once for each of its tokens.)
    """
    used, row = row.unique(return_inverse=True)
    if len(used) and not hidden.is_cuda:
        used = F.pad(used, (0, -len(used) % 64))  # rows of weight 0: `models.pad_rows` says why
    return _WeightedNLL.apply(hidden[used], head.weight, head.bias, row, token, weight.float())


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
        step = max(1, CHUNK // V)
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
