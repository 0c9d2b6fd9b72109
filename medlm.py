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

    1, 2  mask loss on plain text, then on dialogues: both heads learn to fill masks (`mask_batch`, `mask_loss`)
    3     now and then the model's own drafts instead: mask a response, let the model fill it in and edit it, and train
          both heads on the edit labels of what came out (`plan_rollout`, `rollout`, `rollout_loss`)

`decode` writes: `fill_masks`, `close_draft`, then `refine`, which repeats `edit_pass`. Rollouts call the very same four
functions, so the model is trained on the drafts that it will meet. Every sequence is prompt + response; `first` [B] is
where the response begins. Prompts hold at least one token: the last one carries the insertion in front of the response.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edit_distance import edit_labels_batch, edit_scripts
from models import CHUNK_FLOATS, weighted_nll
from ragged import DEL, GAP, KEEP, SUB, Ragged, apply_edits, uniform_noise

MIN_T = 0.05  # floor of the masked fraction: losses are weighted by 1/t, so a single t near 0 would drown a whole batch
IGNORE = -100  # label of a row that is not supervised
ORDERS = ("confidence", "random")


# ---------------------------------------------------------------------------------------------------- batches


def special_tokens(tokenizer) -> dict[str, int]:
    """The `tokens` that the functions below ask for: ids of mask, pad, del (`<|del|>`) and eos (end of message).

    Raises ValueError if the tokenizer lacks one of them.
    """
    tokens = {name: getattr(tokenizer, f"{name}_id") for name in ("mask", "pad", "del", "eos")}
    if missing := [name for name, token in tokens.items() if token is None]:
        raise ValueError(f"the tokenizer has no {' and no '.join(missing)} token; `convert.py --to medlm` adds them")
    return tokens


def pack_examples(examples) -> tuple[Ragged, Tensor]:
    """Examples (anything with .prompt and .response, lists of token ids) to prompt + response in one row, and `first`.

    first: int64 [B], the position at which the response begins. Raises ValueError for an empty prompt.
    """
    if empty := [i for i, e in enumerate(examples) if not len(e.prompt)]:
        raise ValueError(f"example {empty[0]} has an empty prompt; it needs at least one token, e.g. bos")
    x = Ragged.pack([list(e.prompt) + list(e.response) for e in examples])
    return x, torch.tensor([len(e.prompt) for e in examples], dtype=torch.int64)


def stratified(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """n numbers, float [n], each U[low, high], one from each of n equal strata, in random order.

    A batch then always holds easy and hard fractions, which lowers the variance of the loss.
    """
    stratum = torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)
    return low + (high - low) * stratum / max(n, 1)


def per_sample_mean(sample: Tensor, n_samples: int) -> Tensor:
    """Weights [E] that turn a sum over rows into the mean over each sample's rows, averaged over samples having any.

    sample: int64 [E], the sequence each row belongs to.
    """
    count = torch.bincount(sample, minlength=n_samples)
    return 1 / (count[sample] * (count > 0).sum())


# ---------------------------------------------------------------------------------------------------- stages 1 and 2


@dataclass(frozen=True)
class MaskBatch:
    """x with masks in place; `row` [E] are the masked rows and `token` [E] what stood there.

    t: float [B], the probability with which each response was masked. length: int64 [B], its tokens.
    """

    x: Ragged
    t: Tensor
    length: Tensor
    row: Tensor
    token: Tensor

    def to(self, device) -> "MaskBatch":
        return MaskBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def mask_batch(examples, *, mask_id: int, min_t: float, max_t: float, generator: torch.Generator) -> MaskBatch:
    """Mask each response token, the first and the trailing pads included, with its sample's probability t.

    t ~ U[max(min_t, MIN_T), max_t], one per sample, stratified over the batch. Prompts are never masked.
    Raises ValueError unless 0 <= min_t < max_t <= 1 and MIN_T < max_t.
    """
    check_range("min_t", min_t, "max_t", max_t)
    if max_t <= MIN_T:
        raise ValueError(f"--max_t {max_t} leaves nothing to draw from: t is kept above {MIN_T}; raise --max_t")
    x, first = pack_examples(examples)
    t = stratified(len(x), max(min_t, MIN_T), max_t, generator)
    row = draw_masks(x, first, t, generator)
    return MaskBatch(replace(x, ids=x.ids.index_fill(0, row, mask_id)), t, x.lengths - first, row, x.ids[row])


def draw_masks(x: Ragged, first: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [E]: the response rows to be masked, each with probability t [B] of its sequence."""
    masked = torch.rand(len(x.ids), generator=generator) < t[x.batch]
    return (masked & (x.positions >= first[x.batch])).nonzero().flatten()


def check_range(low_name: str, low: float, high_name: str, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"--{low_name} {low} and --{high_name} {high}: need 0 <= {low_name} < {high_name} <= 1")


def mask_loss(model: nn.Module, batch: MaskBatch, loss_norm: str = "tokens") -> tuple[Tensor, dict]:
    """Cross-entropy of lm_head at the masked rows plus that of next_token_head at the rows before them, weighted 1/t.

    The row before a response's first token is the prompt's last, so no label ever leaves its sample. With CE_i the
    cross-entropy at masked row i of a sample of which k tokens out of `length` are masked:

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

    Returns the loss (float32 scalar, with gradients; 0 when nothing is masked) and detached metrics.
    """
    sample, t = batch.x.batch[batch.row], batch.t
    if loss_norm == "tokens":
        weight = per_sample_mean(sample, len(t)) / t[sample]
    elif loss_norm == "bound":
        weight = 1 / (t * batch.length * (batch.length > 0).sum())[sample]
    else:
        raise ValueError(f"--loss_norm {loss_norm!r} is not known; choose tokens or bound")
    hidden = model(batch.x)  # [T, D]
    lm = weighted_nll(hidden, model.lm_head, batch.row, batch.token, weight)
    following = weighted_nll(hidden, model.next_token_head, batch.row - 1, batch.token, weight)
    metrics = {"loss_mask_lm": lm.detach(), "loss_mask_next": following.detach(), "masked_tokens": len(batch.row)}
    return lm + following, metrics


# ---------------------------------------------------------------------------------------------------- draft and edit


@contextmanager
def inference(model: nn.Module):
    """No gradients and no dropout; the mode that the model was in comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def forward_active(model: nn.Module, x: Ragged, active: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [T', D] of the active [B] sequences only, and where [T]: which of them an active row of x has.

    With nothing active the first sequence is run: on a sharded model every rank must make every forward pass.
    """
    if not active.any():
        active = torch.arange(len(active), device=active.device) == 0
    kept = active[x.batch]
    return model(Ragged.from_lengths(x.ids[kept], x.lengths[active])), kept.cumsum(0) - 1


def best_tokens(hidden: Tensor, head: nn.Linear, row: Tensor, never: list[int], rival: Tensor | None = None):
    """The most probable token of each row [N], leaving out the ids in `never`, and how sure the head is, float32 [N].

    How sure: log p(token), or against a rival token [N] the log-odds log p(token) - log p(rival).
    Rows go through the head in chunks, so that [N, V] floats never exist.
    """
    never = torch.tensor(never, device=row.device)
    found = []
    for i in range(0, max(len(row), 1), step := max(1, CHUNK_FLOATS // head.out_features)):
        logits = head(hidden[row[i : i + step]]).float()
        against = None if rival is None else logits.gather(1, rival[i : i + step, None])[:, 0]
        logits.index_fill_(1, never, -torch.inf)
        top, token = logits.max(1)
        found.append((token, top - (logits.logsumexp(1) if against is None else against)))
    return torch.cat([token for token, _ in found]), torch.cat([sure for _, sure in found])


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
    model: nn.Module, x: Ragged, first: Tensor, passes: Tensor, tokens: dict, *,
    order: str, seeds: Tensor, rounds: int | None = None, on_pass: Callable | None = None,
) -> Ragged:  # fmt: skip
    """Phase 1, parallel decoding: sequence b's masks are filled in passes[b] passes, an equal share in each.

    passes: int64 [B], between 1 and the sequence's number of masks (0 where it has none). order: "confidence" fills the
    masks whose best token is most probable first; "random" draws them from seeds, int64 [B]. Neither `<|del|>` nor the
    mask itself is ever chosen. Sequences that are done leave the batch. rounds: forward passes to make, at least
    max(passes), which is the default.
    """
    never = [tokens["mask"], tokens["del"]]
    for step in range(int(passes.max()) if rounds is None else rounds):
        masked = ((x.ids == tokens["mask"]) & (x.positions >= first[x.batch])).nonzero().flatten()
        sample = x.batch[masked]
        left = torch.bincount(sample, minlength=len(x))
        share = -(-left // (passes - step).clamp(min=1))  # rounded up
        hidden, where = forward_active(model, x, left > 0)
        if order == "random":
            row = masked[highest(uniform_noise(seeds[sample], step, x.positions[masked], stream=0), sample, share)]
            token, _ = best_tokens(hidden, model.lm_head, where[row], never)
        else:
            token, sure = best_tokens(hidden, model.lm_head, where[masked], never)
            chosen = highest(sure, sample, share)
            row, token = masked[chosen], token[chosen]
        op = torch.zeros_like(x.ids, dtype=torch.uint8).index_fill(0, row, SUB)
        edits = op, x.ids.index_copy(0, row, token), torch.full_like(x.ids, GAP)
        if on_pass:
            on_pass("mask", step, x, edits)
        x = apply_edits(x, *edits)
    return x


def close_draft(x: Ragged, first: Tensor, tokens: dict) -> Ragged:
    """Between the phases: a response becomes its tokens before the first end-of-message, no pads, then exactly one eos.

    That eos is the sentinel: the model reads it, its left neighbour may insert in front of it, nobody edits it. What
    stood behind the first eos is dropped: it is not part of the answer that the draft gives. A draft without eos gets
    one; an empty draft becomes the eos alone.
    """
    response = x.positions >= first[x.batch]
    is_eos = response & (x.ids == tokens["eos"])
    ended = is_eos.cumsum(0)
    before = torch.cat([ended.new_zeros(1), ended])[x.cu_seqlens[:-1].long()]  # [B] eos tokens in earlier sequences
    drop = response & ((ended > before[x.batch]) | (x.ids == tokens["pad"]))
    eos = torch.full_like(x.ids, GAP).index_fill(0, x.cu_seqlens[1:].long() - 1, tokens["eos"])
    return apply_edits(x, torch.where(drop, DEL, KEEP), x.ids, eos)


def text_and_gaps(x: Ragged, first: Tensor) -> tuple[Tensor, Tensor]:
    """Of closed drafts: the rows that may be edited, and those that may insert behind them (last prompt token, too).

    Both int64; a response of n tokens has n of the first and n + 1 of the second, in the order of `edit_labels`.
    """
    sentinel = torch.zeros_like(x.ids, dtype=torch.bool).index_fill(0, x.cu_seqlens[1:].long() - 1, True)
    text = ~sentinel & (x.positions >= first[x.batch])
    gaps = ~sentinel & (x.positions >= first[x.batch] - 1)
    return text.nonzero().flatten(), gaps.nonzero().flatten()


def contents(x: Ragged, first: Tensor) -> list[list[int]]:
    """The responses of closed drafts, without prompt and sentinel."""
    return [row[start:-1] for row, start in zip(x.unpack(), first.tolist())]


def edit_pass(x: Ragged, token: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn what the two heads say into one round of edits: the exact counterpart of `edit_labels`.

    token int64 [T]: what each token becomes, GAP to delete it (its own id outside the response).
    following int64 [T]: which token should stand behind each (GAP outside the response, and for "nothing to insert").
    A survivor inserts unless that token is what the next survivor becomes. So a surviving token takes the decision made
    in front of the run of deleted tokens before it, the supervised one, and deleted tokens decide nothing.
    Returns op, sub_token, ins_token [T] for `apply_edits`.
    """
    survives = token != GAP
    row = torch.arange(len(token), device=token.device)
    at_or_after = torch.where(survives, row, len(token)).flip(0).cummin(0).values.flip(0)  # [T] next survivor, or T
    after = torch.cat([at_or_after[1:], at_or_after.new_tensor([len(token)])])
    right = torch.cat([token, token.new_tensor([GAP])])[after]
    op = torch.where(survives, torch.where(token == x.ids, KEEP, SUB), DEL).to(torch.uint8)
    return op, token, torch.where(survives & (following != right), following, GAP)


def propose_edits(
    model: nn.Module, x: Ragged, first: Tensor, active: Tensor, tokens: dict, room: Tensor, max_edits: int | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """One forward pass over the active [B] closed drafts; the argmax edits of both heads, and the model's doubt.

    Only response rows go through the heads. Masks, pads and eos are never written: a draft stays a closed draft. For
    next_token_head, eos means that nothing follows. room [B], max_edits: see `refine`. Returns (op, sub_token,
    ins_token) and doubt, float [B]: the log-odds of the edits, before any limit, against leaving things as they are; 0
    for a text that the model would not touch.
    """
    text, gaps = (rows[active[x.batch[rows]]] for rows in text_and_gaps(x, first))
    hidden, where = forward_active(model, x, active)
    mask, pad, delete, eos = (tokens[k] for k in ("mask", "pad", "del", "eos"))
    token, token_odds = best_tokens(hidden, model.lm_head, where[text], [mask, pad, eos], x.ids[text])
    insert, insert_odds = best_tokens(hidden, model.next_token_head, where[gaps], [mask, pad, delete], x.ids[gaps + 1])
    following = torch.full_like(x.ids, GAP).index_copy(0, gaps, insert.masked_fill(insert == eos, GAP))
    token = x.ids.index_copy(0, text, token.masked_fill(token == delete, GAP))  # a prompt may hold any id, delete's too
    op, sub_token, ins_token = edit_pass(x, token, following)

    odds = torch.zeros(len(x.ids), 2, device=x.ids.device)  # [T, 2]: the token's own edit, the insertion behind it
    odds[text, 0], odds[gaps, 1] = token_odds, insert_odds
    edits = torch.stack([op != KEEP, ins_token != GAP], 1)
    doubt = odds.new_zeros(len(x)).index_add_(0, x.batch, (odds.clamp(min=0) * edits).sum(1))
    # Deletions make room; but max_edits may undo them, so then only the room that there is already counts.
    taken = text[op[text] != DEL] if max_edits is None else text
    free = room - torch.bincount(x.batch[taken], minlength=len(x))
    edits[:, 1:] = surest(edits[:, 1:], odds[:, 1:], x, free)
    if max_edits is not None:
        edits = surest(edits, odds, x, torch.full_like(room, max_edits))
    return (op.where(edits[:, 0], KEEP), sub_token, ins_token.where(edits[:, 1], GAP)), doubt


def surest(edits: Tensor, odds: Tensor, x: Ragged, count: Tensor) -> Tensor:
    """Of the edits, bool [T, k], the count[b] in each sequence with the highest odds [T, k]."""
    row, kind = edits.nonzero(as_tuple=True)
    chosen = torch.zeros_like(edits)
    chosen[row, kind] = highest(odds[row, kind], x.batch[row], count)
    return chosen


def refine(
    model: nn.Module, x: Ragged, first: Tensor, passes: int, tokens: dict, *, room: Tensor,
    max_edits: int | None = None, lockstep: bool = False, on_pass: Callable | None = None,
) -> tuple[Ragged, Tensor]:  # fmt: skip
    """Phase 2: up to `passes` rounds of edits on closed drafts. Returns the texts and the passes used, int64 [B].

    A sequence is finished, and leaves the batch, when it comes back to a text that it has been before. One edit pass
    depends on the text alone, so it would go round for ever. Of the texts on the cycle it keeps the one that the model
    doubts least (`propose_edits`); a text with nothing to edit is a cycle of one.
    room: int64 [B], tokens that a response may have: only the surest insertions are made when there is no more. Without
    it a model that does not edit well yet may double its text in every pass. max_edits: at most so many edits per pass
    and sequence, the surest ones. lockstep: all ranks make forward passes until every one of them is finished.
    """
    active = torch.ones(len(x), dtype=torch.bool, device=x.ids.device)
    used = torch.zeros_like(first)
    rows = [tuple(row) for row in x.unpack()]
    seen = [{} for _ in rows]  # per sequence: text -> doubt, in the order of the passes
    for step in itertools.count():
        if step == passes:
            active = torch.zeros_like(active)
        if not agree_max(int(active.any()), lockstep, x.ids.device):
            break
        edits, doubt = propose_edits(model, x, first, active, tokens, room, max_edits)
        if on_pass:
            on_pass("edit", step, x, edits)
        x = apply_edits(x, *edits)
        used += active
        after = [tuple(row) for row in x.unpack()]
        doubt = doubt.tolist()
        for b in active.nonzero().flatten().tolist():
            seen[b][rows[b]] = doubt[b]
            if after[b] in seen[b]:
                texts = list(seen[b])
                after[b] = min(texts[texts.index(after[b]) :], key=seen[b].get)
                active[b] = False
        x, rows = Ragged.pack(after, x.ids.device), after
    return x, used


def agree_max(value: int, lockstep: bool, device) -> int:
    """The largest value over all ranks; this rank's own outside lockstep or without torch.distributed."""
    if not (lockstep and dist.is_available() and dist.is_initialized()):
        return value
    value = torch.tensor(value, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


# ---------------------------------------------------------------------------------------------------- stage 3


@dataclass(frozen=True)
class RolloutPlan:
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
    if max_steps < 1 or not pred_per_step or min(pred_per_step) < 1:
        raise ValueError("--max_diffusion_steps and all of --mask_diffusion_pred_per_step must be at least 1")
    choice = int(torch.randint(len(pred_per_step), (), generator=shared))
    return RolloutPlan(pred_per_step[choice], max_steps, min(progress, 1.0) * float(torch.rand((), generator=shared)))


@dataclass(frozen=True)
class EditBatch:
    """Closed drafts x and what both heads should say about them.

    token_target [N]: for lm_head at rows token_row. insert_target [M]: for next_token_head at rows insert_row, without
    the unsupervised gaps. distance: float [B], edits from draft to target. mask_passes, edit_passes: forwards made.
    """

    x: Ragged
    token_row: Tensor
    token_target: Tensor
    insert_row: Tensor
    insert_target: Tensor
    distance: Tensor
    mask_passes: int = 0
    edit_passes: int = 0


def rollout(
    model: nn.Module, examples, plan: RolloutPlan, tokens: dict, *,
    min_t: float, max_t: float, generator: torch.Generator, order: str = "random", threads: int = 1,
) -> EditBatch:  # fmt: skip
    """Let the model draft and edit the responses itself, then label the result against the true ones.

    A fraction t ~ U[min_t, max_t] of each response (pads included, stratified over the batch) is masked and filled in
    with plan.tokens_per_pass tokens per pass, then closed and edited; no gradients, no dropout, the weights as they
    are. Every rank makes the same number of forward passes: the longest fill and the end of editing are agreed. What
    comes out depends on this rank's examples alone.
    Raises ValueError where a response cannot be labelled (`response_text`).
    """
    check_range("intermediate_min_t", min_t, "intermediate_max_t", max_t)
    clean = [response_text(e.response, tokens) for e in examples]
    x, first = pack_examples(examples)
    masked = draw_masks(x, first, stratified(len(x), min_t, max_t, generator), generator)
    seeds = torch.randint(2**62, (len(x),), generator=generator)
    count = torch.bincount(x.batch[masked], minlength=len(x))
    passes = (-(-count // plan.tokens_per_pass)).clamp(max=plan.max_passes)  # rounded up
    device = next(model.parameters()).device
    x = replace(x, ids=x.ids.index_fill(0, masked, tokens["mask"])).to(device)
    first, seeds, passes = first.to(device), seeds.to(device), passes.to(device)
    room = x.lengths - first
    longest = int(passes.max())
    with inference(model):
        rounds = agree_max(longest, True, device)
        x = fill_masks(model, x, first, passes, tokens, order=order, seeds=seeds, rounds=rounds)
        x = close_draft(x, first, tokens)
        x, used = refine(model, x, first, plan.edit_passes(longest), tokens, room=room, lockstep=True)
    batch = label_drafts(x, first, clean, tokens, threads)
    return replace(batch, mask_passes=longest, edit_passes=int(used.max()))


def response_text(response: Sequence[int], tokens: dict) -> list[int]:
    """The tokens of a training response before its end-of-message and pads.

    Raises ValueError if eos, pad, mask or `<|del|>` stand inside: as labels they would mean something else.
    """
    response = list(response)
    end = response.index(tokens["eos"]) if tokens["eos"] in response else len(response)
    wrong = [name for name in ("pad", "mask", "del") if tokens[name] in response[:end]]
    if wrong or set(response[end:]) - {tokens["eos"], tokens["pad"]}:
        name = wrong[0] if wrong else "eos"
        raise ValueError(
            f"a response holds the {name} token (id {tokens[name]}) inside its text, where it cannot be labelled for "
            "editing; remove it from the training data"
        )
    return response[:end]


def label_drafts(x: Ragged, first: Tensor, clean: list[list[int]], tokens: dict, threads: int = 1) -> EditBatch:
    """Edit labels of closed drafts x against the wanted texts. The label of gap k goes to the row in front of it."""
    noisy = contents(x, first)
    labels = edit_labels_batch(noisy, clean, tokens["del"], tokens["eos"], IGNORE, threads)
    token_target, insert_target = (torch.cat([torch.as_tensor(l[k]) for l in labels]).to(x.ids.device) for k in (0, 1))
    token_row, insert_row = text_and_gaps(x, first)
    supervised = insert_target != IGNORE
    distance = torch.tensor([float((script != KEEP).sum()) for script in edit_scripts(noisy, clean, threads)])
    return EditBatch(x, token_row, token_target, insert_row[supervised], insert_target[supervised], distance)


def rollout_loss(model: nn.Module, batch: EditBatch) -> tuple[Tensor, dict]:
    """Cross-entropy of both heads on the edit labels: per head the mean over a sample's rows, averaged over samples.

    Returns the loss (float32 scalar, with gradients) and detached metrics.
    """
    hidden = model(batch.x)  # [T, D]

    def loss(head, row, target):
        weight = per_sample_mean(batch.x.batch[row], len(batch.x))
        return weighted_nll(hidden, head, row, target, weight)

    lm = loss(model.lm_head, batch.token_row, batch.token_target)
    following = loss(model.next_token_head, batch.insert_row, batch.insert_target)
    metrics = {
        "loss_edit_lm": lm.detach(),
        "loss_edit_next": following.detach(),
        "edit_distance": batch.distance.mean(),
        "mask_passes": batch.mask_passes,
        "edit_passes": batch.edit_passes,
    }
    return lm + following, metrics


# ---------------------------------------------------------------------------------------------------- decoder


@dataclass(frozen=True)
class Decoded:
    """One answer: the draft of phase 1, the response after phase 2, and the forward passes each phase used."""

    draft: list[int]
    response: list[int]
    mask_passes: int
    edit_passes: int


def decode(
    model: nn.Module,
    prompts: list[list[int]],
    tokens: dict,
    *,
    init_num: int = 512,
    mask_diffusion_step: int = 48,
    edit_diffusion_step: int = 16,
    order: str = "confidence",
    max_edits: int | None = None,
    seeds: Sequence[int] | None = None,
    on_step: Callable | None = None,
    progress: Callable | None = None,
) -> list[Decoded]:
    """Answer prompts: fill init_num masks in mask_diffusion_step passes, then edit in up to edit_diffusion_step passes.

    prompts: B lists of at least one token id. tokens: see `special_tokens`. order of unmasking: "confidence" or
    "random", the latter from seeds, B ints, by default 0, 1, 2, ... max_edits: per pass and sequence; None for all. No
    response grows beyond init_num tokens. A prompt gets the same answer alone and in any batch (in float32, and with
    the same seed if the order is random).
    on_step(t, x, op, sub_token, ins_token, label) is called with the text before each pass and the edits about to be
    applied to it; t is the fraction of the planned passes behind it, label "mask" or "edit". progress(done, planned)
    follows each pass. Raises ValueError for an empty prompt or an impossible setting.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; choose one of {', '.join(ORDERS)}")
    if min(init_num, edit_diffusion_step) < 0 or mask_diffusion_step < 1 or (max_edits is not None and max_edits < 1):
        raise ValueError("need mask_diffusion_step >= 1, max_edits >= 1, init_num >= 0 and edit_diffusion_step >= 0")
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompt {empty[0]} is empty; a prompt needs at least one token")
    if not prompts:
        return []

    device = next(model.parameters()).device
    x = Ragged.pack([list(prompt) + [tokens["mask"]] * init_num for prompt in prompts], device)
    first = torch.tensor([len(prompt) for prompt in prompts], device=device)
    seeds = torch.tensor(range(len(prompts)) if seeds is None else seeds, device=device)
    mask_passes = min(mask_diffusion_step, init_num)
    planned = mask_passes + edit_diffusion_step

    def on_pass(label, step, x, edits):
        done = step if label == "mask" else mask_passes + step
        if on_step:
            on_step(done / planned, x, *edits, label)
        if progress:
            progress(done + 1, planned)

    with inference(model):
        passes = torch.full_like(first, mask_passes)
        x = fill_masks(model, x, first, passes, tokens, order=order, seeds=seeds, on_pass=on_pass)
        x = close_draft(x, first, tokens)
        drafts = contents(x, first)
        room = torch.full_like(first, init_num)
        x, used = refine(model, x, first, edit_diffusion_step, tokens, room=room, max_edits=max_edits, on_pass=on_pass)
    return [Decoded(d, r, mask_passes, n) for d, r, n in zip(drafts, contents(x, first), used.tolist())]
