"""ME-DLM: draft a text by filling in masks many at a time, then repair it by editing (arXiv 2605.09603).

A masked diffusion language model (LLaDA, arXiv 2502.09992) starts from a row of masks and fills in several per pass.
Tokens chosen in the same pass do not see each other, so few passes mean contradictions: two phrasings half mixed, a
word twice, a word missing. Masks cannot mend that: a filled position is final, and nothing can move. ME-DLM teaches
the same network to proofread: replace, delete and insert, everywhere at once, until nothing is left to do.

One backbone, two vocabulary heads, read at every token i:

    lm_head          what token i should become: itself, another token, or <|del|>
    next_token_head  which token should stand right behind it; if another one will stand there, it is inserted

    wanted           <sep>  3  +  4  =  7  <eos>
    draft            <sep>  so       3  +       =  7  <eos>
    lm_head                 <|del|>  3  +       =  7            <sep> and what precedes it is the prompt: never edited
    next_token_head  3      (none)   +  4       7  <eos>        behind +, 4 is wanted but = would stand: insert 4

The teacher is edit distance: a minimum edit script from a draft to the wanted text says what every token should become
(`edit_distance.edit_labels`, which also tells why the script is read from the left). Three stages of training:

    1, 2  mask loss on plain text, then on dialogues: both heads learn to fill masks (`mask_batch`)
    3     now and then the model's own drafts instead: mask a response, let the model fill it in and edit it, and train
          both heads on the edit labels of what came out (`plan_rollout`, `rollout`, `label_drafts`)

Both are a `Batch` of supervised rows with weights, and one `loss` serves all stages. `decode` writes: `fill_masks`,
`close_draft`, then `refine`, which repeats `propose_edits`. Rollouts call the very same functions, so the model is
trained on the drafts that it will meet. Every sequence is prompt + response + suffix; `x.frozen` says of each token
whether it may be edited (`ragged.frozen_text`): only the response is FREE, and the prompt's last token, its ANCHOR,
carries the insertion in front of it. There need not be a suffix; a closed draft has one, if only an end-of-message.
`tokens` holds the ids of the special tokens: mask, pad, del (`<|del|>`) and eos (end of message).

Decoder and training follow the published code where it matters to a published checkpoint; RESULTS.md has a table of
where they do not, and why. `--published` trains with the published side of all settings.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edit_distance import edit_labels_batch

from ragged import (  # isort: skip
    CHUNK, DEL, FREE, FROZEN, GAP, KEEP, SUB, Generated, Ragged, apply_edits, frozen_text, stratified, uniform_noise,
    weighted_nll,
)  # fmt: skip

MIN_T = 0.05  # floor of the masked fraction: losses are weighted by 1/t, so a single t near 0 would drown a whole batch
IGNORE = -100  # label of a row that is not supervised
ORDERS = ("pads_last", "confidence", "random")
REPAIRS = ("edit", "remask", "none")

# ---------------------------------------------------------------------------------------------------- heads and loss


class Model(nn.Module):
    """The heads of ME-DLM over a backbone, a module that turns a ragged batch into hidden states [T, D]: what a token
    should become, and what should stand right after it."""

    def __init__(self, backbone: nn.Module, D: int, V: int, bias: bool = False, stored: dict | None = None):
        super().__init__()
        self.model = backbone
        self.lm_head = nn.Linear(D, V, bias=bias)
        self.next_token_head = nn.Linear(D, V, bias=bias)

    def init_heads(self, generator: torch.Generator) -> None:
        """Both heads start from a pretrained output matrix, or like any other matrix."""

    def forward(self, x: Ragged) -> Tensor:
        """Hidden states [T, D]."""
        return self.model(x)


@dataclass(frozen=True)
class Batch:
    """Texts with masks or drafts, and what both heads should say about some of their rows."""

    kind: str  # "mask" or "edit"
    x: Ragged
    lm_row: Tensor  # int64 [N]: rows at which lm_head is supervised
    lm_token: Tensor  # int64 [N]
    lm_weight: Tensor  # float [N]
    next_row: Tensor  # the same for next_token_head, [M]
    next_token: Tensor
    next_weight: Tensor
    counts: dict[str, float]  # for the log

    def to(self, device) -> "Batch":
        moved = {name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")}
        return replace(self, **moved)


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
    """Weighted cross-entropy of both heads: the sum over rows of weight * -log p(token).

    The weights say over what it is a mean: see `mask_batch` and `label_drafts`. Returns the loss (float32 scalar, with
    gradients; 0 when nothing is supervised) and detached metrics.
    """
    hidden = model(batch.x)  # [T, D]
    lm = weighted_nll(hidden, model.lm_head, batch.lm_row, batch.lm_token, batch.lm_weight)
    following = weighted_nll(hidden, model.next_token_head, batch.next_row, batch.next_token, batch.next_weight)
    metrics = {f"loss_{batch.kind}_lm": lm.detach(), f"loss_{batch.kind}_next": following.detach()}
    return lm + following, metrics | batch.counts


def pack_examples(examples) -> Ragged:
    """Examples, with token ids in .prompt, .response and, if they have one, .suffix, of which the response is FREE."""
    suffixes = [getattr(e, "suffix", []) for e in examples]
    return frozen_text([e.prompt for e in examples], [e.response for e in examples], suffixes)


def per_sample_mean(sample: Tensor) -> Tensor:
    """Weights [E] that turn a sum over rows into the mean over each sample's rows, averaged over samples having any.

    sample: int64 [E], the sequence each row belongs to.
    """
    count = torch.bincount(sample)
    return 1 / (count[sample] * (count > 0).sum())


# ---------------------------------------------------------------------------------------------------- stages 1 and 2


def mask_batch(
    examples, *, mask_id: int, min_t: float, max_t: float, generator: torch.Generator, loss_norm: str = "tokens",
    one_t: bool = False,
) -> Batch:  # fmt: skip
    """Mask each response token, the first and the trailing pads included, with its sample's probability t.

    t ~ U[max(min_t, MIN_T), max_t], one per sample, stratified over the batch, or one for all. Prompts and suffixes are
    never masked. lm_head is supervised at the masked rows, next_token_head at the rows before them; the row before a
    response's first token is the prompt's last, so no label ever leaves its sample. With CE_i the cross-entropy at
    masked row i of a sample of `length` tokens, k of them masked, and K masked rows in the whole batch:

    loss_norm "tokens"  sum_i CE_i / (K t).  The published form. K is about t * length, so it estimates E_t[CE(t) / t],
                        with CE(t) the mean cross-entropy at masked fraction t: compared with the bound, nearly
                        finished texts count 1/t times more. Not a likelihood; its scale depends on MIN_T.
    loss_norm "samples" mean over samples having masks of  sum_i CE_i / (k t): a long one counts like a short one.
    loss_norm "bound"   mean over samples of  sum_i CE_i / (t length).  With t ~ U[0, 1], lm_head's part times length
                        has the expectation  E_order[-log p(response | prompt, order)], the order in which the tokens
                        are revealed one by one being uniform. By Jensen's inequality that is an upper bound of
                        -log p(response | prompt) of a decoder that reveals one random token per pass (LLaDA). In nats
                        per response token. The floor MIN_T leaves out the nearly finished texts, which are the easy
                        ones: an average over U[MIN_T, 1] lies higher as long as CE(t) grows with t. `likelihood`
                        estimates the bound without a floor.
    """
    x = pack_examples(examples)
    t = stratified(1 if one_t else len(x), max(min_t, MIN_T), max_t, generator).expand(len(x))
    row = draw_masks(x, t, generator)
    sample, length = x.batch[row], free_lengths(x)
    if loss_norm == "samples":
        weight = per_sample_mean(sample) / t[sample]
    else:
        weight = 1 / (t * (len(row) if loss_norm == "tokens" else length * (length > 0).sum()))[sample]
    masked = replace(x, ids=x.ids.index_fill(0, row, mask_id))
    return Batch("mask", masked, row, x.ids[row], weight, row - 1, x.ids[row], weight, {"masked_tokens": len(row)})


def draw_masks(x: Ragged, t: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [E]: the FREE rows to be masked, each with probability t [B] of its sequence."""
    masked = torch.rand(len(x.ids), generator=generator) < t[x.batch]
    return (masked & (x.frozen == FREE)).nonzero().flatten()


def free_lengths(x: Ragged, counted: Tensor | bool = True) -> Tensor:
    """int64 [B]: how many FREE tokens each sequence has, of those that are counted, bool [T]."""
    return torch.bincount(x.batch[(x.frozen == FREE) & counted], minlength=len(x))


@torch.no_grad()
def likelihood(model: nn.Module, examples, settings, rng: torch.Generator) -> Tensor:
    """For each example an unbiased estimate, in nats, of an upper bound of -log p(response | prompt, suffix): that of
    `mask_batch`, the mean over orders. float64 [B]; settings: `tokens` in it.

    The number of masks k is uniform on 1 ... length (stratified over the batch), which k of the tokens is uniform, and
    the estimate is  length / k * sum_i CE_i:  where k masks are left in a random order, each of them is the next one
    with probability 1 / k. That is the integral over t of the loss with weight 1/t, done exactly, and without a floor.
    """
    x = pack_examples(examples)
    row, length = (x.frozen == FREE).nonzero().flatten(), free_lengths(x)
    k = 1 + (stratified(len(x), 0, 1, rng) * length).long().minimum(length - 1)
    row = row[highest(torch.rand(len(row), generator=rng, dtype=torch.float64), x.batch[row], k)]
    device, size = next(model.parameters()).device, max(1, CHUNK // model.lm_head.out_features)
    hidden = model(replace(x, ids=x.ids.index_fill(0, row, settings.tokens["mask"])).to(device))
    chunks = zip(hidden[row.to(device)].split(size), x.ids[row].to(device).split(size))
    nll = [nn.functional.cross_entropy(model.lm_head(h).float(), ids, reduction="none") for h, ids in chunks]
    total = torch.zeros(len(x), dtype=torch.float64).index_add_(0, x.batch[row], torch.cat(nll).double().cpu())
    return total * length / k.clamp(min=1)


# ---------------------------------------------------------------------------------------------------- drafting


def forward_active(model: nn.Module, x: Ragged, active: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [T', D] of the active [B] sequences only, and where [T]: which of them an active row of x has.

    With nothing active the first sequence is run: on a sharded model every rank must make every forward pass.
    """
    if not active.any():
        active = torch.arange(len(active), device=active.device) == 0
    kept = active[x.batch]
    return model(x.select(active)), kept.cumsum(0) - 1


def best_tokens(
    hidden: Tensor, head: nn.Linear, row: Tensor, never: list[int], rival: Tensor | None = None, last: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable token of each row [N], leaving out the ids in `never`, the confidence in it, and its rank.

    Confidence, float32 [N]: log p(token), or against a rival token [N] the log-odds log p(token) - log p(rival).
    Rank, float32 [N]: the same; but with `last`, the log p(token) among the tokens other than `last`, and -inf where
    `last` itself is the best. Rows go through the head in chunks, so that [N, V] floats never exist.
    """
    never, size = torch.tensor(never, device=row.device), max(1, CHUNK // head.out_features)
    tokens, confidences, ranks = [], [], []
    for i, rows in enumerate(row.split(size)):
        logits = head(hidden[rows]).float()
        if rival is not None:
            against = logits.gather(1, rival.split(size)[i][:, None])[:, 0]
        logits.index_fill_(1, never, -torch.inf)
        top, token = logits.max(1)
        tokens.append(token)
        confidences.append(top - (logits.logsumexp(1) if rival is None else against))
        ranks.append(confidences[-1])
        if last is not None:
            logits[:, last] = -torch.inf
            ranks[-1] = (top - logits.logsumexp(1)).masked_fill(token == last, -torch.inf)
    return torch.cat(tokens), torch.cat(confidences), torch.cat(ranks)


def highest(score: Tensor, sample: Tensor, count: Tensor) -> Tensor:
    """bool [N]: is this one of the count[b] highest scores [N] of its sequence b = sample [N]? Ties: the first wins."""
    order = score.argsort(descending=True, stable=True)
    order = order[sample[order].argsort(stable=True)]  # sequence by sequence, and best first within each
    size = torch.bincount(sample, minlength=len(count))
    rank = torch.arange(len(score), device=score.device) - (size.cumsum(0) - size)[sample[order]]
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[order] = rank < count[sample[order]]
    return chosen


def fill_masks(
    model: nn.Module, x: Ragged, passes: Tensor, tokens: dict, *, order: str, seeds: Tensor | None = None,
    threshold: float | None = None, rounds: int | None = None, on_pass: Callable | None = None,
) -> tuple[Ragged, Tensor, Tensor]:  # fmt: skip
    """Phase 1, parallel decoding: sequence b's masks are filled in passes[b] passes, an equal share in each; where the
    division leaves a remainder, the first passes take one more.

    passes: int64 [B], between 1 and the sequence's number of masks (0 where it has none). order: "confidence" fills the
    masks whose best token is most probable first; "pads_last" likewise, with the pad left out of the probabilities and
    those that want a pad at the end (as published); "random" draws them from seeds, int64 [B]. threshold: every mask
    whose best token is more probable than that is filled at once, and the share is the least. Neither `<|del|>` nor the
    mask itself is ever chosen (theirs may fill a mask with a mask); a mask that is not FREE is left alone. Sequences
    that are done leave the batch. rounds: forward passes to make, at least max(passes); by default as many as it takes.
    Returns the texts, log p of what each mask was filled with (float32 [T]; inf elsewhere), and the passes used [B].
    """
    never, pad = [tokens["mask"], tokens["del"]], tokens["pad"] if order == "pads_last" else None
    sure, used = torch.full_like(x.ids, torch.inf, dtype=torch.float32), torch.zeros_like(passes)
    for step in range(int(passes.max()) if rounds is None else rounds):
        row = ((x.ids == tokens["mask"]) & (x.frozen == FREE)).nonzero().flatten()
        if rounds is None and not len(row):
            break
        left = torch.bincount(x.batch[row], minlength=len(x))
        share = -(-left // (passes - step).clamp(min=1))  # rounded up
        hidden, where = forward_active(model, x, left > 0)
        token, confidence, rank = best_tokens(hidden, model.lm_head, where[row], never, last=pad)
        if order == "random":
            rank = uniform_noise(seeds[x.batch[row]], step, x.positions[row], stream=0)
        chosen = highest(rank, x.batch[row], share)
        if threshold is not None:
            chosen |= confidence > math.log(threshold)
        row, token, confidence = row[chosen], token[chosen], confidence[chosen]
        sure, used = sure.index_copy(0, row, confidence), used + (left > 0)
        edits = substitutions(x, x.ids.index_copy(0, row, token))
        if on_pass:
            on_pass("mask", step, x, edits)
        x = apply_edits(x, *edits)
    return x, sure, used


def substitutions(x: Ragged, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `apply_edits` that turn the tokens of x into these, int64 [T]."""
    return torch.where(token == x.ids, KEEP, SUB).to(torch.uint8), token, torch.full_like(token, GAP)


def remask(
    model: nn.Module, x: Ragged, sure: Tensor, passes: int, tokens: dict, count: Tensor, on_pass: Callable
) -> Ragged:
    """The control for `refine`, repair without edits: in each pass the count [B] tokens of a sequence that it is least
    sure of become masks again and are filled again. sure [T]: from `fill_masks`; a new filling brings a new one."""
    for step in range(passes):
        row = sure.isfinite().nonzero().flatten()
        row = row[highest(-sure[row], x.batch[row], count)]
        masked = replace(x, ids=x.ids.index_fill(0, row, tokens["mask"]))
        filled, again, _ = fill_masks(model, masked, torch.ones_like(count), tokens, order="confidence")
        on_pass("edit", step, x, substitutions(x, filled.ids))
        x, sure = filled, again.where(again.isfinite(), sure)
    return x


def close_draft(x: Ragged, tokens: dict) -> Ragged:
    """Between the phases: what is FREE ends before its first end-of-message and loses its pads; and a text without a
    suffix gets one, a single eos.

    That eos is the sentinel: the model reads it, its left neighbour may insert in front of it, nobody edits it. What
    stood behind the first eos is dropped: it is not part of the answer that the draft gives. An empty draft becomes the
    eos alone.
    """
    free, last = x.frozen == FREE, x.cu_seqlens[1:].long() - 1
    ended = (free & (x.ids == tokens["eos"])).cumsum(0)
    before = torch.cat([ended.new_zeros(1), ended])[x.cu_seqlens[:-1].long()]  # [B] eos tokens in earlier sequences
    drop = free & ((ended > before[x.batch]) | (x.ids == tokens["pad"]))
    is_open = x.frozen[last] != FROZEN  # a prompt ends in its ANCHOR: what is FROZEN at the end is a suffix
    eos = torch.full_like(x.ids, GAP).index_fill(0, last[is_open], tokens["eos"])
    x = apply_edits(x, torch.where(drop, DEL, KEEP), x.ids, eos)
    return replace(x, frozen=x.frozen.index_fill(0, x.cu_seqlens[1:].long() - 1, FROZEN))


def contents(x: Ragged) -> list[list[int]]:
    """The responses of closed drafts: what stands behind the prompt, as far as the last token that is not FROZEN."""
    gaps = [(states != FROZEN).nonzero().flatten() for states in x.frozen.split(x.lengths.tolist())]
    return [row[rows[0] + 1 : rows[-1] + 1] for row, rows in zip(x.unpack(), gaps)]


# ---------------------------------------------------------------------------------------------------- editing


def edit_pass(x: Ragged, token: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn what the two heads say into one round of edits: the exact counterpart of `edit_labels`.

    token int64 [T]: what each token becomes, GAP to delete it (its own id where it is not FREE).
    following int64 [T]: which token should stand behind each (GAP where it is FROZEN, and for "nothing to insert").
    A survivor inserts unless that token is what the next survivor becomes. So a surviving token takes the decision made
    in front of the run of deleted tokens before it, the supervised one, and deleted tokens decide nothing.
    Returns op, sub_token, ins_token [T] for `apply_edits`.
    """
    survives = token != GAP
    end = token.new_tensor([len(token)])
    row = torch.where(survives, torch.arange(len(token), device=token.device), end)
    next_survivor = torch.cat([row[1:], end]).flip(0).cummin(0).values.flip(0)  # [T]; T where none follows
    will_follow = torch.cat([token, token.new_tensor([GAP])])[next_survivor]
    op = torch.where(survives, torch.where(token == x.ids, KEEP, SUB), DEL).to(torch.uint8)
    return op, token, torch.where(survives & (following != will_follow), following, GAP)


def predict_edits(model: nn.Module, x: Ragged, active: Tensor, tokens: dict):
    """One forward pass over the active [B] closed drafts: (token, following) for `edit_pass`, and odds, float [T, 2].

    odds: the log-odds of what becomes of a token against keeping it, and of what is inserted behind it against nothing.
    Only rows that may be edited go through the heads. Masks, pads and eos are never written: a draft stays a closed
    draft. For next_token_head, eos means that nothing follows.
    """
    mask, pad, delete, eos = (tokens[name] for name in ("mask", "pad", "del", "eos"))
    text, gaps = ((active[x.batch] & rows).nonzero().flatten() for rows in (x.frozen == FREE, x.frozen != FROZEN))
    hidden, where = forward_active(model, x, active)
    new, new_odds, _ = best_tokens(hidden, model.lm_head, where[text], [mask, pad, eos], x.ids[text])
    never = [mask, pad, delete]
    behind, behind_odds, _ = best_tokens(hidden, model.next_token_head, where[gaps], never, x.ids[gaps + 1])
    token = x.ids.index_copy(0, text, new.masked_fill(new == delete, GAP))  # a prompt may hold any id, delete's too
    following = torch.full_like(x.ids, GAP).index_copy(0, gaps, behind.masked_fill(behind == eos, GAP))
    odds = torch.zeros(len(x.ids), 2, device=x.ids.device)
    odds[text, 0], odds[gaps, 1] = new_odds, behind_odds
    return token, following, odds


def propose_edits(model, x, active, tokens, max_len: Tensor, max_edits: int | None, min_odds: float = -math.inf):
    """The edits that the model wants to make to the active [B] drafts, within the limits of `refine`: the arguments of
    `apply_edits`."""
    token, following, odds = predict_edits(model, x, active, tokens)
    op, sub_token, ins_token = edit_pass(x, token, following)
    edits = torch.stack([op != KEEP, ins_token != GAP], 1) & (odds >= min_odds)  # [T, 2]
    # Deletions make way for insertions; but max_edits may undo them, so then all that stands there now counts.
    room = max_len - free_lengths(x, True if max_edits is not None else ~(edits[:, 0] & (op == DEL)))
    edits[:, 1:] = surest(edits[:, 1:], odds[:, 1:], x, room)
    if max_edits is not None:
        edits = surest(edits, odds, x, torch.full_like(room, max_edits))
    return op.where(edits[:, 0], KEEP), sub_token, ins_token.where(edits[:, 1], GAP)


def surest(edits: Tensor, odds: Tensor, x: Ragged, count: Tensor) -> Tensor:
    """Of the edits, bool [T, k], the count[b] in each sequence with the highest odds [T, k]."""
    row, kind = edits.nonzero(as_tuple=True)
    chosen = torch.zeros_like(edits)
    chosen[row, kind] = highest(odds[row, kind], x.batch[row], count)
    return chosen


def refine(
    model: nn.Module, x: Ragged, passes: int, tokens: dict, *, max_len: Tensor,
    max_edits: int | None = None, min_odds: float = -math.inf, lockstep: bool = False, on_pass: Callable | None = None,
) -> tuple[Ragged, Tensor]:  # fmt: skip
    """Phase 2: up to `passes` rounds of edits on closed drafts. Returns the texts and the passes used, int64 [B].

    A pass depends on the text alone, so a text that has been there before would go round for ever: its sequence is
    finished and leaves the batch, most often because there was nothing to edit.
    max_len: int64 [B], FREE tokens that a text may have: only the surest insertions are made when there is no more
    room. Without it a model that does not edit well yet may double its text in every pass. max_edits: at most so many
    edits per pass and sequence, the surest ones. min_odds: the least log-odds of an edit. lockstep: all ranks make
    forward passes until every one is finished.
    """
    active = torch.ones(len(x), dtype=torch.bool, device=x.ids.device)
    used = torch.zeros_like(x.lengths)
    seen = [{tuple(row)} for row in x.unpack()]
    for step in itertools.count():
        if step == passes:
            active = torch.zeros_like(active)
        if not all_reduce_max(int(active.any()), lockstep, x.ids.device):
            return x, used
        edits = propose_edits(model, x, active, tokens, max_len, max_edits, min_odds)
        if on_pass:
            on_pass("edit", step, x, edits)
        x = apply_edits(x, *edits)
        used += active
        for b, row in enumerate(map(tuple, x.unpack())):
            active[b] &= row not in seen[b]
            seen[b].add(row)


def all_reduce_max(value: int, lockstep: bool, device) -> int:
    """The largest value over all ranks; this rank's own outside lockstep or without torch.distributed."""
    if not (lockstep and dist.is_available() and dist.is_initialized()):
        return value
    value = torch.tensor(value, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


@torch.no_grad()
def decode(
    model: nn.Module, prompts: list[list[int]], tokens: dict, *,
    drafts: list[list[int]] | None = None, suffixes: list[list[int]] | None = None, keep: list | None = None,
    init_num: int = 512, mask_diffusion_step: int = 48, edit_diffusion_step: int = 16, order: str = "pads_last",
    threshold: float | None = None, repair: str = "edit", max_edits: int | None = None, min_odds: float = -math.inf,
    max_positions: int | None = None, seeds: Sequence[int] | None = None, on_step: Callable | None = None,
) -> list[Generated]:  # fmt: skip
    """Answer prompts: fill init_num masks in mask_diffusion_step passes, then edit in up to edit_diffusion_step passes.

    prompts: B lists of at least one token id. drafts: B lists of token ids to be edited; then there is no mask phase,
    and masks in a draft stay as they are. suffixes: B lists of token ids that follow the response and end with eos;
    without them every response ends itself. keep: of each draft a list of bool, the tokens that must stay; they do not
    move against each other where they stand side by side. order, threshold: of unmasking (`fill_masks`); seeds: B ints
    for the random one, by default 0, 1, 2, ... max_edits, min_odds: of edits (`refine`). No response grows beyond
    init_num tokens, or its draft's, nor a text beyond max_positions. repair: "edit", or for comparison as many passes
    that fill the least sure tokens again ("remask", max_edits at a time, by default a mask pass's share), or "none".
    A prompt gets the same answer alone and in any batch (in float32, and with the same seed if the order is random).
    on_step(t, x, op, sub_token, ins_token, label) is called with the text before each pass and the edits about to be
    applied to it; t is the fraction of the planned passes behind it, label "mask" or "edit". Raises ValueError for an
    empty prompt.
    """
    if not prompts:
        return []
    device = next(model.parameters()).device
    x = frozen_text(prompts, drafts or [[tokens["mask"]] * init_num] * len(prompts), suffixes, keep, device)
    seeds = torch.tensor(range(len(prompts)) if seeds is None else seeds, device=device)
    mask_passes = 0 if drafts else min(mask_diffusion_step, init_num)

    def on_pass(label, step, x, edits):
        done = step if label == "mask" else mask_passes + step
        if on_step:
            on_step(done / (mask_passes + edit_diffusion_step), x, *edits, label)

    passes, fill = torch.full_like(x.lengths, mask_passes), {"order": order, "seeds": seeds, "threshold": threshold}
    filled, sure, filling = fill_masks(model, x, passes, tokens, **fill, on_pass=on_pass)
    draft = close_draft(filled, tokens)
    if repair == "edit":
        free = free_lengths(draft)
        room = init_num if max_positions is None else (max_positions - draft.lengths + free).clamp(max=init_num)
        limits = {"max_len": free.clamp(min=room), "max_edits": max_edits, "min_odds": min_odds}
        x, repairing = refine(model, draft, edit_diffusion_step, tokens, **limits, on_pass=on_pass)
    else:
        repairing = torch.full_like(passes, 0 if repair == "none" else edit_diffusion_step)
        count = torch.full_like(passes, max_edits or -(-init_num // max(mask_passes, 1)))
        x = close_draft(remask(model, filled, sure, int(repairing.max()), tokens, count, on_pass), tokens)
    passes = [{"mask_passes": m, "edit_passes": e} for m, e in zip(filling.tolist(), repairing.tolist())]
    end = [] if suffixes else [tokens["eos"]]
    return [Generated(a, [*a, *end], used, d) for a, used, d in zip(contents(x), passes, contents(draft))]


# ---------------------------------------------------------------------------------------------------- stage 3


class RolloutPlan(NamedTuple):
    """The choices that decide how many forward passes a rollout makes: the same on every rank (`plan_rollout`)."""

    tokens_per_pass: int
    max_passes: int
    edit_share: float  # of the passes that filling the masks leaves over, in [0, 1)
    edits_alone: bool = False  # max_passes limits the edit passes, and filling takes as many as it takes

    def mask_passes(self, count: Tensor) -> Tensor:
        passes = -(-count // self.tokens_per_pass)  # rounded up
        return passes if self.edits_alone else passes.clamp(max=self.max_passes)

    def edit_passes(self, mask_passes: int) -> int:
        return int(self.edit_share * (self.max_passes if self.edits_alone else self.max_passes - mask_passes + 1))


def plan_rollout(
    progress: float, pred_per_step: Sequence[int], max_steps: int, shared: torch.Generator, edits_alone: bool = False
) -> RolloutPlan:
    """Draw a rollout's pass counts. shared: a generator in the same state on every rank. progress of training: 0 to 1.

    pred_per_step (`--mask_diffusion_pred_per_step`): tokens filled in per pass, one of these. max_steps
    (`--max_diffusion_steps`) limits mask and edit passes together. Filling goes first; where it would take more than
    max_steps passes, more tokens are filled in per pass. Of the R passes left over, up to progress * R are edit
    passes, their number uniform from 0: at first the model learns to repair raw drafts, later also what its own edits
    leave behind, and raw drafts never disappear from the mix. edits_alone: progress * max_steps of them.
    """
    choice = int(torch.randint(len(pred_per_step), (), generator=shared))
    share = 1.0 if edits_alone else float(torch.rand((), generator=shared))
    return RolloutPlan(pred_per_step[choice], max_steps, min(progress, 1.0) * share, edits_alone)


@torch.no_grad()
def rollout(
    model: nn.Module, examples, plan: RolloutPlan, tokens: dict, *,
    min_t: float, max_t: float, generator: torch.Generator, order: str = "random", loss_norm: str = "bound",
    one_t: bool = False,
) -> Batch:  # fmt: skip
    """Let the model draft and edit the responses itself, then label the result against the true ones.

    A fraction t ~ U[min_t, max_t] of each response (pads included, stratified over the batch) is masked and filled in
    with plan.tokens_per_pass tokens per pass, then closed and edited; no gradients, no dropout, the weights as they
    are. Every rank makes the same number of forward passes: the longest fill and the end of editing are agreed. What
    comes out depends on this rank's examples alone. one_t: the same t for all. loss_norm: of `label_drafts`.
    Raises ValueError where a response cannot be labelled (`response_text`).
    """
    clean = [response_text(e.response, tokens) for e in examples]
    x = pack_examples(examples)
    t = stratified(1 if one_t else len(x), min_t, max_t, generator).expand(len(x))
    masked = draw_masks(x, t, generator)
    seeds = torch.randint(2**62, (len(x),), generator=generator)
    passes = plan.mask_passes(torch.bincount(x.batch[masked], minlength=len(x)))
    device = next(model.parameters()).device
    x = replace(x, ids=x.ids.index_fill(0, masked, tokens["mask"])).to(device)
    seeds, passes, max_len = seeds.to(device), passes.to(device), free_lengths(x)
    longest = int(passes.max())
    rounds = all_reduce_max(longest, True, device)
    x, *_ = fill_masks(model, x, passes, tokens, order=order, seeds=seeds, rounds=rounds)
    x, used = refine(model, close_draft(x, tokens), plan.edit_passes(longest), tokens, max_len=max_len, lockstep=True)
    batch = label_drafts(x, clean, tokens, loss_norm, t.to(device))
    batch.counts.update(mask_passes=longest, edit_passes=int(used.max()))
    return batch


def response_text(response: Sequence[int], tokens: dict) -> list[int]:
    """The tokens of a training response before its end-of-message and pads.

    Raises ValueError if eos, pad, mask or `<|del|>` stand inside: as labels they would mean something else.
    """
    response, closing = list(response), (tokens["eos"], tokens["pad"])
    end = next((i for i, token in enumerate(response) if token in closing), len(response))
    wrong = [name for name in ("mask", "del") if tokens[name] in response[:end]]
    if wrong or set(response[end:]) - set(closing):
        name = wrong[0] if wrong else ("eos", "pad")[closing.index(response[end])]
        raise ValueError(
            f"a response holds the {name} token (id {tokens[name]}) inside its text, where it cannot be labelled for "
            "editing; remove it from the training data"
        )
    return response[:end]


def label_drafts(
    x: Ragged, clean: list[list[int]], tokens: dict, loss_norm: str = "bound", t: Tensor | None = None
) -> Batch:
    """Edit labels of closed drafts x against the wanted texts. The label of gap k goes to the row in front of it.

    Behind the last token a suffix follows, and its first token is the label there: nothing in a text shows where its
    suffix begins. So where the wanted text goes on with just that token, the label asks for nothing to be inserted.
    Weights, per head: the mean over a sample's rows, averaged over samples; with loss_norm "tokens", as published, the
    mean over all rows, over t [B], the fractions that were masked, and the sentinel counts, with itself as its label.
    """
    noisy, device = contents(x), x.ids.device
    labels = edit_labels_batch(noisy, clean, tokens["del"], tokens["eos"], IGNORE)
    token_target, insert_target = (torch.cat([torch.as_tensor(l[k]) for l in labels]).to(device) for k in (0, 1))
    text, gaps = (rows.nonzero().flatten() for rows in (x.frozen == FREE, x.frozen != FROZEN))
    suffix = x.ids[gaps[torch.bincount(x.batch[gaps]).cumsum(0) - 1] + 1]  # [B] the first token of each
    insert_target = insert_target.where(insert_target != tokens["eos"], suffix[x.batch[gaps]])
    gaps, insert_target = gaps[insert_target != IGNORE], insert_target[insert_target != IGNORE]
    # Substitutions and deletions are labels that differ from the token; what survives and what is inserted is `clean`.
    changed, deleted = (token_target != x.ids[text]).sum(), (token_target == tokens["del"]).sum()
    inserted = sum(map(len, clean)) - (len(text) - int(deleted))
    counts = {"edit_distance": (int(changed) + inserted) / len(clean)}
    weights = [per_sample_mean(x.batch[rows]) for rows in (text, gaps)]
    if loss_norm == "tokens":
        last = x.cu_seqlens[1:].long() - 1
        text, token_target = torch.cat([text, last]), torch.cat([token_target, x.ids[last]])
        weights = [1 / (t.clamp(min=MIN_T)[x.batch[rows]] * len(rows)) for rows in (text, gaps)]
    return Batch("edit", x, text, token_target, weights[0], gaps, insert_target, weights[1], counts)


# ------------------------------------------------------------- what the scripts ask for (plumbing/methods.py)

TITLE = "ME-DLM"
HEADS = ("lm_head", "next_token_head")
TOKENS = ("mask", "pad", "del", "eos")
PACKED = True
PUBLISHED = {
    "loss_norm": "tokens", "one_t": True, "rollout_order": "random", "rollout_edits_alone": True, "adam_beta2": 0.999,
}  # fmt: skip


def model_flags(f) -> None:
    f.choice("--order", choices=ORDERS, help="which masks are filled first, in decoding (default: the checkpoint's, "
             "else pads_last, as published)")


def training_flags(f) -> None:
    f.number("--min_t", low=0, high=1, default=0.0, help="smallest masking probability (a floor applies)")
    f.number("--max_t", low=0, high=1, default=1.0, help="largest masking probability")
    f.choice("--loss_norm", choices=["tokens", "samples", "bound"], default="tokens",
             help="mean over tokens / t, in rollouts, too (published); mean of samples' means; LLaDA's bound")
    f.flag("--one_t", help="one t for a micro-batch, not one for each sample")
    f.flag("--copy_head", help="stage 1: next_token_head starts as a copy of lm_head")
    f.number("--intermediate_ratio", low=0, high=1, default=0.0, help="stage 3: share of steps trained on rollouts")
    f.integer("--mask_diffusion_pred_per_step", low=1, nargs="+", default=[2, 4, 8, 16],
              help="tokens unmasked per rollout pass")
    f.integer("--max_diffusion_steps", low=1, default=32,
              help="most passes of a rollout; the edit passes among them grow with training progress")
    f.number("--intermediate_min_t", low=0, high=1, default=0.0, help="smallest share masked before a rollout")
    f.number("--intermediate_max_t", low=0, high=1, default=1.0, help="largest share masked before a rollout")
    f.choice("--rollout_order", choices=ORDERS, default="random", help="order in which a rollout unmasks")
    f.flag("--rollout_edits_alone", help="max_diffusion_steps limits edit passes alone; as many as the share of the "
           "epoch that is over, not a random number up to that")
    f.flag("--published", help="what differs from the published training, as published: "
           + ", ".join(f"--{name} {value}" for name, value in PUBLISHED.items()))


def sampling_flags(f) -> None:
    f.integer("--mask_diffusion_step", "-m", low=1, default=48, help="passes that fill masks")
    f.integer("--edit_diffusion_step", "-e", low=0, default=16, help="most passes that edit")
    f.choice("--order", choices=ORDERS, help="which masks are filled first (default: the checkpoint's)")
    f.number("--threshold", above=0, below=1, help="fill every mask that is surer than this, in fewer passes")
    f.choice("--repair", choices=REPAIRS, default="edit", help="edit the draft, fill its least sure tokens again, or "
             "leave it")
    f.integer("--max_edits", low=1, help="most edits per pass (default: all), or tokens filled again")
    f.number("--min_odds", default=-99.0, help="make only edits whose log-odds are at least this")


def remember(args, stored: dict) -> dict:
    return {"order": args.order or stored.get("order", "pads_last")}


def check_flags(args) -> None:
    if args.published:
        vars(args).update(PUBLISHED)
    for low, high in (("min_t", "max_t"), ("intermediate_min_t", "intermediate_max_t")):
        if getattr(args, low) >= getattr(args, high):
            raise ValueError(f"--{low} {getattr(args, low)} must be below --{high} {getattr(args, high)}")
    if args.max_t <= MIN_T:
        raise ValueError(f"--max_t {args.max_t} leaves nothing to draw from: t is kept above {MIN_T}")
    if args.intermediate_ratio and args.pad_len and not args.insert_eos:
        raise ValueError("--intermediate_ratio with --pad_len needs --insert_eos True: eos divides text from pads")


def check_example(example, settings) -> None:
    if settings.intermediate_ratio:
        response_text(example.response, settings.tokens)


def start(model, settings, examples, resumed: bool) -> None:
    if settings.copy_head and not resumed:
        model.next_token_head.load_state_dict(model.lm_head.state_dict())


def prepare(model, examples: list, settings, progress: float, rng, shared_rng) -> Batch:
    s = settings
    norm = {"loss_norm": s.loss_norm, "one_t": s.one_t, "generator": rng}
    if torch.rand((), generator=shared_rng) < s.intermediate_ratio:
        if s.rollout_edits_alone and progress < 1:
            progress = progress * s.num_train_epochs % 1
        pace = s.mask_diffusion_pred_per_step, s.max_diffusion_steps, shared_rng, s.rollout_edits_alone
        limits = {"min_t": s.intermediate_min_t, "max_t": s.intermediate_max_t, "order": s.rollout_order}
        return rollout(model, examples, plan_rollout(progress, *pace), s.tokens, **limits, **norm)
    return mask_batch(examples, mask_id=s.tokens["mask"], min_t=s.min_t, max_t=s.max_t, **norm)


def passes(settings) -> int:
    return min(settings.mask_diffusion_step, settings.init_num) + settings.edit_diffusion_step


def start_length(settings) -> int:
    return settings.init_num


def generate(
    model, prompts: list, settings, seeds: list[int], drafts=None, suffixes=None, keep=None, on_step=None
) -> list[Generated]:
    if drafts and settings.repair == "remask":
        raise ValueError("--repair remask fills again what the mask phase filled; a given draft takes --repair edit")
    s = settings
    steps = {"init_num": s.init_num, "mask_diffusion_step": s.mask_diffusion_step, "order": s.order}
    steps |= {"edit_diffusion_step": s.edit_diffusion_step, "repair": s.repair, "max_edits": s.max_edits}
    limits = {"threshold": s.threshold, "min_odds": s.min_odds, "max_positions": s.max_positions}
    given = {"drafts": drafts, "suffixes": suffixes, "keep": keep, "seeds": seeds, "on_step": on_step}
    return decode(model, prompts, s.tokens, **steps, **limits, **given)
