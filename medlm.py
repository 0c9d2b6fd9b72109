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
"""

import itertools
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
ORDERS = ("confidence", "random")

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


def per_sample_mean(sample: Tensor, n_samples: int) -> Tensor:
    """Weights [E] that turn a sum over rows into the mean over each sample's rows, averaged over samples having any.

    sample: int64 [E], the sequence each row belongs to.
    """
    count = torch.bincount(sample, minlength=n_samples)
    return 1 / (count[sample] * (count > 0).sum())


# ---------------------------------------------------------------------------------------------------- stages 1 and 2


def mask_batch(
    examples, *, mask_id: int, min_t: float, max_t: float, generator: torch.Generator, loss_norm: str = "tokens"
) -> Batch:
    """Mask each response token, the first and the trailing pads included, with its sample's probability t.

    t ~ U[max(min_t, MIN_T), max_t], one per sample, stratified over the batch. Prompts are never masked. lm_head is
    supervised at the masked rows, next_token_head at the rows before them; the row before a response's first token is
    the prompt's last, so no label ever leaves its sample. With CE_i the cross-entropy at masked row i of a sample of
    which k tokens out of `length` are masked:

    loss_norm "tokens"  mean over samples having masks of  sum_i CE_i / (k t).  The published form. k is about
                        t * length, so it estimates E_t[CE(t) / t], with CE(t) the mean cross-entropy at masked
                        fraction t: compared with the bound, nearly finished texts count 1/t times more, and long
                        samples no more than short ones. Not a likelihood; its scale depends on MIN_T.
    loss_norm "bound"   mean over samples of  sum_i CE_i / (t length).  With t ~ U[0, 1], lm_head's part times length
                        has the expectation  E_order[-log p(response | prompt, order)], the order in which the tokens
                        are revealed one by one being uniform. By Jensen's inequality that is an upper bound of
                        -log p(response | prompt) of a decoder that reveals one random token per pass (LLaDA). In nats
                        per response token. The floor MIN_T leaves out the nearly finished texts, which are the easy
                        ones: an average over U[MIN_T, 1] lies higher as long as CE(t) grows with t.
    """
    x = pack_examples(examples)
    t = stratified(len(x), max(min_t, MIN_T), max_t, generator)
    row = draw_masks(x, t, generator)
    sample, length = x.batch[row], free_lengths(x)
    if loss_norm == "tokens":
        weight = per_sample_mean(sample, len(x)) / t[sample]
    else:
        weight = 1 / (t * length * (length > 0).sum())[sample]
    masked = replace(x, ids=x.ids.index_fill(0, row, mask_id))
    return Batch("mask", masked, row, x.ids[row], weight, row - 1, x.ids[row], weight, {"masked_tokens": len(row)})


def draw_masks(x: Ragged, t: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [E]: the FREE rows to be masked, each with probability t [B] of its sequence."""
    masked = torch.rand(len(x.ids), generator=generator) < t[x.batch]
    return (masked & (x.frozen == FREE)).nonzero().flatten()


def free_lengths(x: Ragged, counted: Tensor | bool = True) -> Tensor:
    """int64 [B]: how many FREE tokens each sequence has, of those that are counted, bool [T]."""
    return torch.bincount(x.batch[(x.frozen == FREE) & counted], minlength=len(x))


# ---------------------------------------------------------------------------------------------------- drafting


def forward_active(model: nn.Module, x: Ragged, active: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [T', D] of the active [B] sequences only, and where [T]: which of them an active row of x has.

    With nothing active the first sequence is run: on a sharded model every rank must make every forward pass.
    """
    if not active.any():
        active = torch.arange(len(active), device=active.device) == 0
    kept = active[x.batch]
    return model(x.select(active)), kept.cumsum(0) - 1


def best_tokens(hidden: Tensor, head: nn.Linear, row: Tensor, never: list[int], rival: Tensor | None = None):
    """The most probable token of each row [N], leaving out the ids in `never`, and the confidence in it, float32 [N].

    Confidence: log p(token), or against a rival token [N] the log-odds log p(token) - log p(rival).
    Rows go through the head in chunks, so that [N, V] floats never exist.
    """
    never, size = torch.tensor(never, device=row.device), max(1, CHUNK // head.out_features)
    tokens, confidences = [], []
    for i, rows in enumerate(row.split(size)):
        logits = head(hidden[rows]).float()
        if rival is not None:
            against = logits.gather(1, rival.split(size)[i][:, None])[:, 0]
        logits.index_fill_(1, never, -torch.inf)
        top, token = logits.max(1)
        tokens.append(token)
        confidences.append(top - (logits.logsumexp(1) if rival is None else against))
    return torch.cat(tokens), torch.cat(confidences)


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
    model: nn.Module, x: Ragged, passes: Tensor, tokens: dict, *,
    order: str, seeds: Tensor, rounds: int | None = None, on_pass: Callable | None = None,
) -> Ragged:  # fmt: skip
    """Phase 1, parallel decoding: sequence b's masks are filled in passes[b] passes, an equal share in each.

    passes: int64 [B], between 1 and the sequence's number of masks (0 where it has none). order: "confidence" fills the
    masks whose best token is most probable first; "random" draws them from seeds, int64 [B]. Neither `<|del|>` nor the
    mask itself is ever chosen; a mask that is not FREE is left alone. Sequences that are done leave the batch. rounds:
    forward passes to make, at least max(passes), which is the default.
    """
    never = [tokens["mask"], tokens["del"]]
    for step in range(int(passes.max()) if rounds is None else rounds):
        masked = ((x.ids == tokens["mask"]) & (x.frozen == FREE)).nonzero().flatten()
        sample = x.batch[masked]
        left = torch.bincount(sample, minlength=len(x))
        share = -(-left // (passes - step).clamp(min=1))  # rounded up
        hidden, where = forward_active(model, x, left > 0)
        if order == "random":
            row = masked[highest(uniform_noise(seeds[sample], step, x.positions[masked], stream=0), sample, share)]
            token, _ = best_tokens(hidden, model.lm_head, where[row], never)
        else:
            token, confidence = best_tokens(hidden, model.lm_head, where[masked], never)
            chosen = highest(confidence, sample, share)
            row, token = masked[chosen], token[chosen]
        op = torch.zeros_like(x.ids, dtype=torch.uint8).index_fill(0, row, SUB)
        edits = op, x.ids.index_copy(0, row, token), torch.full_like(x.ids, GAP)
        if on_pass:
            on_pass("mask", step, x, edits)
        x = apply_edits(x, *edits)
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


def text_and_gaps(x: Ragged) -> tuple[Tensor, Tensor]:
    """Of closed drafts: the rows that may be edited, and those that may insert behind them (last prompt token, too).

    Both int64; a response of n tokens has n of the first and n + 1 of the second, in the order of `edit_labels`.
    """
    return (x.frozen == FREE).nonzero().flatten(), (x.frozen != FROZEN).nonzero().flatten()


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
    text, gaps = (rows[active[x.batch[rows]]] for rows in text_and_gaps(x))
    hidden, where = forward_active(model, x, active)
    new, new_odds = best_tokens(hidden, model.lm_head, where[text], [mask, pad, eos], x.ids[text])
    behind, behind_odds = best_tokens(hidden, model.next_token_head, where[gaps], [mask, pad, delete], x.ids[gaps + 1])
    token = x.ids.index_copy(0, text, new.masked_fill(new == delete, GAP))  # a prompt may hold any id, delete's too
    following = torch.full_like(x.ids, GAP).index_copy(0, gaps, behind.masked_fill(behind == eos, GAP))
    odds = torch.zeros(len(x.ids), 2, device=x.ids.device)
    odds[text, 0], odds[gaps, 1] = new_odds, behind_odds
    return token, following, odds


def propose_edits(model, x, active, tokens, max_len: Tensor, max_edits: int | None):
    """The edits that the model wants to make to the active [B] drafts, within the limits of `refine`: the arguments of
    `apply_edits`."""
    token, following, odds = predict_edits(model, x, active, tokens)
    op, sub_token, ins_token = edit_pass(x, token, following)
    # Deletions make way for insertions; but max_edits may undo them, so then all that stands there now counts.
    room = max_len - free_lengths(x, True if max_edits is not None else op != DEL)
    edits = torch.stack([op != KEEP, ins_token != GAP], 1)  # [T, 2]
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
    max_edits: int | None = None, lockstep: bool = False, on_pass: Callable | None = None,
) -> tuple[Ragged, Tensor]:  # fmt: skip
    """Phase 2: up to `passes` rounds of edits on closed drafts. Returns the texts and the passes used, int64 [B].

    A pass depends on the text alone, so a text that has been there before would go round for ever: its sequence is
    finished and leaves the batch, most often because there was nothing to edit.
    max_len: int64 [B], FREE tokens that a text may have: only the surest insertions are made when there is no more
    room. Without it a model that does not edit well yet may double its text in every pass. max_edits: at most so many
    edits per pass and sequence, the surest ones. lockstep: all ranks make forward passes until every one is finished.
    """
    active = torch.ones(len(x), dtype=torch.bool, device=x.ids.device)
    used = torch.zeros_like(x.lengths)
    seen = [{tuple(row)} for row in x.unpack()]
    for step in itertools.count():
        if step == passes:
            active = torch.zeros_like(active)
        if not all_reduce_max(int(active.any()), lockstep, x.ids.device):
            return x, used
        edits = propose_edits(model, x, active, tokens, max_len, max_edits)
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
    init_num: int = 512, mask_diffusion_step: int = 48, edit_diffusion_step: int = 16, order: str = "confidence",
    max_edits: int | None = None, max_positions: int | None = None, seeds: Sequence[int] | None = None,
    on_step: Callable | None = None,
) -> list[Generated]:  # fmt: skip
    """Answer prompts: fill init_num masks in mask_diffusion_step passes, then edit in up to edit_diffusion_step passes.

    prompts: B lists of at least one token id. drafts: B lists of token ids to be edited; then there is no mask phase,
    and masks in a draft stay as they are. suffixes: B lists of token ids that follow the response and end with eos;
    without them every response ends itself. keep: of each draft a list of bool, the tokens that must stay; they do not
    move against each other where they stand side by side. order of unmasking: "confidence" or "random", the latter from
    seeds, B ints, by default 0, 1, 2, ... max_edits: per pass and sequence; None for all. No response grows beyond
    init_num tokens, or its draft's, nor a text beyond max_positions. A prompt gets the same answer alone and in any
    batch (in float32, and with the same seed if the order is random).
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

    passes = torch.full_like(x.lengths, mask_passes)
    x = close_draft(fill_masks(model, x, passes, tokens, order=order, seeds=seeds, on_pass=on_pass), tokens)
    drafts, free = contents(x), free_lengths(x)
    room = init_num if max_positions is None else (max_positions - x.lengths + free).clamp(max=init_num)
    limits = {"max_len": free.clamp(min=room), "max_edits": max_edits}
    x, used = refine(model, x, edit_diffusion_step, tokens, **limits, on_pass=on_pass)
    return [
        Generated(text, row[len(prompt) :], {"mask_passes": mask_passes, "edit_passes": n}, draft)
        for prompt, draft, text, row, n in zip(prompts, drafts, contents(x), x.unpack(), used.tolist())
    ]


# ---------------------------------------------------------------------------------------------------- stage 3


class RolloutPlan(NamedTuple):
    """The choices that decide how many forward passes a rollout makes: the same on every rank (`plan_rollout`)."""

    tokens_per_pass: int
    max_passes: int
    edit_share: float  # of the passes that filling the masks leaves over, in [0, 1)

    def edit_passes(self, mask_passes: int) -> int:
        return int(self.edit_share * (self.max_passes - mask_passes + 1))


def plan_rollout(progress: float, pred_per_step: Sequence[int], max_steps: int, shared: torch.Generator) -> RolloutPlan:
    """Draw a rollout's pass counts. shared: a generator in the same state on every rank. progress of training: 0 to 1.

    pred_per_step (`--mask_diffusion_pred_per_step`): tokens filled in per pass, one of these. max_steps
    (`--max_diffusion_steps`) limits mask and edit passes together. Filling goes first; where it would take more than
    max_steps passes, more tokens are filled in per pass. Of the R passes left over, up to progress * R are edit
    passes, their number uniform from 0: at first the model learns to repair raw drafts, later also what its own edits
    leave behind, and raw drafts never disappear from the mix.
    """
    choice = int(torch.randint(len(pred_per_step), (), generator=shared))
    return RolloutPlan(pred_per_step[choice], max_steps, min(progress, 1.0) * float(torch.rand((), generator=shared)))


@torch.no_grad()
def rollout(
    model: nn.Module, examples, plan: RolloutPlan, tokens: dict, *,
    min_t: float, max_t: float, generator: torch.Generator, order: str = "random",
) -> Batch:  # fmt: skip
    """Let the model draft and edit the responses itself, then label the result against the true ones.

    A fraction t ~ U[min_t, max_t] of each response (pads included, stratified over the batch) is masked and filled in
    with plan.tokens_per_pass tokens per pass, then closed and edited; no gradients, no dropout, the weights as they
    are. Every rank makes the same number of forward passes: the longest fill and the end of editing are agreed. What
    comes out depends on this rank's examples alone.
    Raises ValueError where a response cannot be labelled (`response_text`).
    """
    clean = [response_text(e.response, tokens) for e in examples]
    x = pack_examples(examples)
    masked = draw_masks(x, stratified(len(x), min_t, max_t, generator), generator)
    seeds = torch.randint(2**62, (len(x),), generator=generator)
    count = torch.bincount(x.batch[masked], minlength=len(x))
    passes = (-(-count // plan.tokens_per_pass)).clamp(max=plan.max_passes)  # rounded up
    device = next(model.parameters()).device
    x = replace(x, ids=x.ids.index_fill(0, masked, tokens["mask"])).to(device)
    seeds, passes, max_len = seeds.to(device), passes.to(device), free_lengths(x)
    longest = int(passes.max())
    rounds = all_reduce_max(longest, True, device)
    x = close_draft(fill_masks(model, x, passes, tokens, order=order, seeds=seeds, rounds=rounds), tokens)
    x, used = refine(model, x, plan.edit_passes(longest), tokens, max_len=max_len, lockstep=True)
    batch = label_drafts(x, clean, tokens)
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


def label_drafts(x: Ragged, clean: list[list[int]], tokens: dict) -> Batch:
    """Edit labels of closed drafts x against the wanted texts. The label of gap k goes to the row in front of it.

    Behind the last token a suffix follows, and its first token is the label there: nothing in a text shows where its
    suffix begins. So where the wanted text goes on with just that token, the label asks for nothing to be inserted.
    Weights: per head the mean over a sample's rows, averaged over samples.
    """
    noisy, device = contents(x), x.ids.device
    labels = edit_labels_batch(noisy, clean, tokens["del"], tokens["eos"], IGNORE)
    token_target, insert_target = (torch.cat([torch.as_tensor(l[k]) for l in labels]).to(device) for k in (0, 1))
    text, gaps = text_and_gaps(x)
    suffix = x.ids[gaps[torch.bincount(x.batch[gaps]).cumsum(0) - 1] + 1]  # [B] the first token of each
    insert_target = insert_target.where(insert_target != tokens["eos"], suffix[x.batch[gaps]])
    gaps, insert_target = gaps[insert_target != IGNORE], insert_target[insert_target != IGNORE]
    text_weight, gap_weight = (per_sample_mean(x.batch[rows], len(x)) for rows in (text, gaps))
    # Substitutions and deletions are labels that differ from the token; what survives and what is inserted is `clean`.
    changed, deleted = (token_target != x.ids[text]).sum(), (token_target == tokens["del"]).sum()
    inserted = sum(map(len, clean)) - (len(text) - int(deleted))
    counts = {"edit_distance": (int(changed) + inserted) / len(clean)}
    return Batch("edit", x, text, token_target, text_weight, gaps, insert_target, gap_weight, counts)


# ------------------------------------------------------------- what the scripts ask for (plumbing/methods.py)

TITLE = "ME-DLM"
HEADS = ("lm_head", "next_token_head")
TOKENS = ("mask", "pad", "del", "eos")
PACKED = True


def model_flags(f) -> None:
    """Nothing to remember."""


def training_flags(f) -> None:
    f.number("--min_t", low=0, high=1, default=0.0, help="smallest masking probability (a floor applies)")
    f.number("--max_t", low=0, high=1, default=1.0, help="largest masking probability")
    f.choice("--loss_norm", choices=["tokens", "bound"], default="tokens",
             help="published mean over masked tokens / t, or LLaDA's bound")
    f.flag("--copy_head", help="stage 1: next_token_head starts as a copy of lm_head")
    f.number("--intermediate_ratio", low=0, high=1, default=0.0, help="stage 3: share of steps trained on rollouts")
    f.integer("--mask_diffusion_pred_per_step", low=1, nargs="+", default=[2, 4, 8, 16],
              help="tokens unmasked per rollout pass")
    f.integer("--max_diffusion_steps", low=1, default=32,
              help="most passes of a rollout; the edit passes among them grow with training progress")
    f.number("--intermediate_min_t", low=0, high=1, default=0.0, help="smallest share masked before a rollout")
    f.number("--intermediate_max_t", low=0, high=1, default=1.0, help="largest share masked before a rollout")
    f.choice("--rollout_order", choices=ORDERS, default="random", help="order in which a rollout unmasks")


def sampling_flags(f) -> None:
    f.integer("--mask_diffusion_step", "-m", low=1, default=48, help="passes that fill masks")
    f.integer("--edit_diffusion_step", "-e", low=0, default=16, help="most passes that edit")
    f.choice("--order", choices=ORDERS, default="confidence", help="which masks are filled first")
    f.integer("--max_edits", low=1, help="most edits per pass (default: all)")


def remember(args, stored: dict) -> dict:
    return {}


def check_flags(args) -> None:
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
    if torch.rand((), generator=shared_rng) < s.intermediate_ratio:
        plan = plan_rollout(progress, s.mask_diffusion_pred_per_step, s.max_diffusion_steps, shared_rng)
        limits = {"min_t": s.intermediate_min_t, "max_t": s.intermediate_max_t}
        return rollout(model, examples, plan, s.tokens, **limits, order=s.rollout_order, generator=rng)
    limits = {"min_t": s.min_t, "max_t": s.max_t}
    return mask_batch(examples, mask_id=s.tokens["mask"], **limits, loss_norm=s.loss_norm, generator=rng)


def passes(settings) -> int:
    return min(settings.mask_diffusion_step, settings.init_num) + settings.edit_diffusion_step


def start_length(settings) -> int:
    return settings.init_num


def generate(
    model, prompts: list, settings, seeds: list[int], drafts=None, suffixes=None, keep=None, on_step=None
) -> list[Generated]:
    s = settings
    return decode(
        model, prompts, s.tokens, drafts=drafts, suffixes=suffixes, keep=keep, init_num=s.init_num,
        mask_diffusion_step=s.mask_diffusion_step, edit_diffusion_step=s.edit_diffusion_step, order=s.order,
        max_edits=s.max_edits, max_positions=s.max_positions, seeds=seeds, on_step=on_step,
    )  # fmt: skip
