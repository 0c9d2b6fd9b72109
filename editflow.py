"""Edit Flows: language modelling as a continuous-time Markov chain of edits (arXiv 2506.09018).

The idea. A text x1 and a starting point x0 (nothing at all, a row of masks, random tokens, a draft) are laid side by
side in columns, with gaps where one side has no token. A clock t runs from 0 to 1, and each column flips, at its own
random moment, from its x0 symbol to its x1 symbol; a schedule kappa(t) is the probability of having flipped. Dropping
the gaps gives x_t, a text half-way between. The columns that have not flipped are the remaining edits:

    x_t side   x1 side   edit
    gap        a         insert a, to the right of the last token before the column
    a          gap       delete a
    a          b         substitute a by b

    columns    1 2 3 4 5        flipped: 3 and 5
    x0         M M M - -
    x1         t h e - y        x_t = M M e y      to do: substitute M -> t, M -> h
                   ^   ^

The model sees x_t alone and learns, per token, three rates (how soon will this token be substituted, deleted, or get a
new right neighbour?) and two distributions (by what?). Running the chain with those rates turns x0 into a text.

Rates. Every remaining edit fires at rate w(t) = kappa'(t) / (1 - kappa(t)). The network gives normalised rates
lambda >= 0; the true rate is w(t) * lambda, so lambda of an edit is the expected number of such edits still to come.

Loss per sequence, a Bregman divergence between the true and the modelled rates, up to a constant (paper, section 3):

    w(t) * [ sum_i (lambda_ins,i + lambda_del,i + lambda_sub,i) - sum_e ( log lambda_e + log Q_e(token of e) ) ] / |x1|

with i over the tokens of x_t and e over the remaining edits. Many edits share one lambda (a whole run is inserted to
the right of one token), so lambda learns their number and Q the distribution of their tokens.

Read in this order: schedules, sources, `path` (x_t and what remains), `loss`, `sample`.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edit_distance import edit_scripts
from models import max_positions, weighted_nll
from ragged import DEL, GAP, INS, KEEP, SUB, Ragged, apply_edits, uniform_noise

EPSILON = 1e-3  # t ~ U[0, 1 - EPSILON]: at t = 1 nothing remains and w(t) is infinite
MAX_W = 20.0  # w(t) is clipped here, so that no single late t dominates a batch


# ---------------------------------------------------------------------------------------------------- schedules


class Schedule(NamedTuple):
    """kappa(t) is the probability that a column has flipped by time t; d_kappa is its derivative."""

    kappa: callable
    d_kappa: callable

    def weight(self, t: Tensor, max_w: float = MAX_W) -> Tensor:
        """w(t) = kappa'(t) / (1 - kappa(t)): the rate at which a remaining edit fires. Clipped at max_w."""
        return (self.d_kappa(t) / (1 - self.kappa(t)).clamp_min(1e-9)).clamp_max(max_w)

    def fire(self, t: float, t_next: float) -> float:
        """The probability that an edit remaining at t fires before t_next; 1 when t_next is 1."""
        now, then = (float(self.kappa(torch.tensor(s, dtype=torch.float64))) for s in (t, t_next))
        return min(1.0, (then - now) / max(1 - now, 1e-12))


def schedule(spec: str) -> Schedule:
    """linear | cosine | cubic (t^3, the paper's choice) | cubic[a:A,b:B], with kappa(0) = 0 and kappa(1) = 1:
    (a + 1) t^3 - (a + b + 1) t^2 + (b + 1) t. Raises ValueError for other names and where kappa would fall.
    """
    name, arguments = parse_spec(spec, {"linear": (), "cosine": (), "cubic": ("a", "b")}, "schedule")
    if name == "linear":
        return Schedule(lambda t: t, lambda t: torch.ones_like(t))
    if name == "cosine":
        return Schedule(lambda t: 1 - torch.cos(t * torch.pi / 2), lambda t: torch.sin(t * torch.pi / 2) * torch.pi / 2)
    a, b = arguments.get("a", 0.0), arguments.get("b", -1.0)
    cubic = Schedule(
        lambda t: (a + 1) * t**3 - (a + b + 1) * t**2 + (b + 1) * t,
        lambda t: 3 * (a + 1) * t**2 - 2 * (a + b + 1) * t + (b + 1),
    )
    if cubic.d_kappa(torch.linspace(0, 1, 1001)).min() < -1e-5:
        raise ValueError(f"schedule {spec!r}: kappa falls somewhere in [0, 1]; choose a and b so that it never does")
    return cubic


def parse_spec(spec: str, known: dict[str, tuple], what: str) -> tuple[str, dict[str, float]]:
    """`name` or `name[key:number,...]` -> (name, {key: number}). `known` lists the keys each name may take."""
    match = re.fullmatch(r"(\w+)(?:\[(.*)\])?", spec.strip())
    usage = ", ".join(n + (f"[{','.join(f'{k}:NUMBER' for k in keys)}]" if keys else "") for n, keys in known.items())
    if not match or match[1] not in known:
        raise ValueError(f"{what} {spec!r} is not known; choose from {usage}")
    arguments = {}
    for item in filter(None, (match[2] or "").split(",")):
        key, _, value = (s.strip() for s in item.partition(":"))
        try:
            arguments[key] = float(value)
        except ValueError:
            key = None
        if key not in known[match[1]] or not math.isfinite(arguments[key]):
            raise ValueError(f"{what} {spec!r}: cannot read {item!r}; write {usage}")
    return match[1], arguments


# ---------------------------------------------------------------------------------------------------- sources


class Source(NamedTuple):
    """Where generation starts: kind is empty, masks, uniform or draft; length in tokens where it has one."""

    kind: str
    length: int

    def draw(self, draft: list[int] | None, mask_id: int | None, unigram: Tensor | None, generator) -> list[int]:
        """One x0. unigram float [V]: the token frequencies that `uniform` draws from."""
        if self.kind == "empty":
            return []
        if self.kind == "masks":
            return [mask_id] * self.length
        if self.kind == "uniform" and not self.length:
            return []  # multinomial refuses to draw nothing
        if self.kind == "uniform":
            return torch.multinomial(unigram, self.length, replacement=True, generator=generator).tolist()
        if draft is None:
            raise ValueError('x0_sampler \'draft\': this record has no "draft" (or "source") field to start from')
        return draft


def source(spec: str) -> Source:
    """empty | masks[length:64] | uniform[length:100] | draft. Raises ValueError for anything else."""
    known = {"empty": (), "masks": ("length",), "uniform": ("length",), "draft": ()}
    kind, arguments = parse_spec(spec, known, "x0_sampler")
    length = arguments.get("length", {"masks": 64, "uniform": 100}.get(kind, 0))
    if not 0 <= length <= 10**6 or length != int(length):
        raise ValueError(f"x0_sampler {spec!r}: length must be a whole number of tokens, at least 0, at most 1000000")
    return Source(kind, int(length))


# ---------------------------------------------------------------------------------------------------- path


@dataclass
class PathBatch:
    """x_t for a batch, and the edits that remain. `*_row` index tokens of x_t [T]; every edit belongs to a response.

    x          Ragged        prompts followed by half-edited responses
    t          float [B]
    prompt_len int64 [B]
    target_len int64 [B]     |x1|, response tokens only
    ins_row, ins_token       int64 [N_ins]  insert the token to the right of the row (several may share a row)
    sub_row, sub_token       int64 [N_sub]
    del_row                  int64 [N_del]
    """

    x: Ragged
    t: Tensor
    prompt_len: Tensor
    target_len: Tensor
    ins_row: Tensor
    ins_token: Tensor
    sub_row: Tensor
    sub_token: Tensor
    del_row: Tensor

    def to(self, device) -> "PathBatch":
        return PathBatch(*(v.to(device) for v in vars(self).values()))


def path(prompts: list, x0: list, x1: list, t: Tensor, kappa, generator: torch.Generator) -> PathBatch:
    """Draw x_t given (x0, x1) for every sequence: align, flip each column with probability kappa(t), drop the gaps.

    prompts, x0, x1: lists of B token lists. Only the responses are aligned: aligning prompt + response as one text can
    place an insertion inside the prompt, where sampling then forbids it. The prompt's last token anchors insertions
    in front of the response, so prompts must not be empty (ValueError).
    """
    if not all(prompts):
        raise ValueError("every prompt needs at least one token (BOS): it anchors what is inserted in front")
    scripts = edit_scripts(x0, x1)
    # a prompt is a run of KEEP columns, so that x_t comes out with its prompt in place
    parts = [part for p, s in zip(prompts, scripts) for part in (np.full(len(p), KEEP, np.uint8), s)]
    op = torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.uint8)  # [columns]
    z0, z1 = torch.full((2, len(op)), GAP, dtype=torch.int64)
    z0[op != INS] = flat(p + s for p, s in zip(map(list, prompts), map(list, x0)))
    z1[op != DEL] = flat(p + s for p, s in zip(map(list, prompts), map(list, x1)))

    columns = torch.tensor([len(p) + len(s) for p, s in zip(prompts, scripts)])
    batch = torch.arange(len(prompts)).repeat_interleave(columns)
    flipped = torch.rand(len(op), generator=generator) < kappa(t.double())[batch]
    zt = torch.where(flipped, z1, z0)

    here = zt != GAP
    row = here.cumsum(0) - 1  # the last token of x_t at or before each column; the anchor comes first
    insert, delete = ~here & (z1 != GAP), here & (z1 == GAP)
    substitute = here & (z1 != GAP) & (zt != z1)
    lengths = torch.zeros(len(prompts), dtype=torch.int64).index_add_(0, batch, here.long())
    return PathBatch(
        x=Ragged.from_lengths(zt[here], lengths),
        t=t.float(),
        prompt_len=torch.tensor([len(p) for p in prompts]),
        target_len=torch.tensor([len(s) for s in x1]),
        ins_row=row[insert],
        ins_token=z1[insert],
        sub_row=row[substitute],
        sub_token=z1[substitute],
        del_row=row[delete],
    )


def flat(lists) -> Tensor:
    return torch.tensor([token for tokens in lists for token in tokens], dtype=torch.int64)


def draw_t(n: int, generator: torch.Generator) -> Tensor:
    """n times in [0, 1 - EPSILON], one in each n-th part: uniform, with less variance than independent draws."""
    order = torch.randperm(n, generator=generator)
    return (order + torch.rand(n, generator=generator)) / n * (1 - EPSILON)


# ---------------------------------------------------------------------------------------------------- loss


def loss(model, batch: PathBatch, kappa: Schedule, *, normalize=True, max_w=MAX_W) -> tuple[Tensor, dict[str, Tensor]]:
    """The Edit Flows loss (formula in the header), averaged over the batch.

    normalize: divide each sequence's loss by |x1|, at least 1. Returns (scalar, parts of it for logging, detached).
    Of the vocabulary heads only rows with a remaining insertion (substitution) are computed, each once.
    """
    x = batch.x
    hidden = model(x, batch.t)
    B = max(len(x), 1)
    weight = kappa.weight(batch.t, max_w) / B  # [B]
    weight = (weight / batch.target_len.clamp_min(1) if normalize else weight)[x.batch]  # [T]

    raw = model.rate_heads[0](hidden).float()  # [T, 3] before the softplus
    can_edit, can_insert = editable(x, batch.prompt_len)
    allowed = torch.stack([can_edit, can_edit, can_insert], dim=1)
    rate = (F.softplus(raw) * allowed * weight[:, None]).sum()

    log_rate = log_softplus(raw)
    edits = ((batch.sub_row, 0), (batch.del_row, 1), (batch.ins_row, 2))
    timing = -sum((weight[row] * log_rate[row, column]).sum() for row, column in edits)
    sub = weighted_nll(hidden, model.sub_logits, batch.sub_row, batch.sub_token, weight[batch.sub_row])
    ins = weighted_nll(hidden, model.ins_logits, batch.ins_row, batch.ins_token, weight[batch.ins_row])
    total = rate + timing + sub + ins
    parts = {"loss": total, "loss_rate": rate + timing, "loss_sub": sub, "loss_ins": ins}
    return total, {name: value.detach() for name, value in parts.items()}


def editable(x: Ragged, prompt_len: Tensor) -> tuple[Tensor, Tensor]:
    """bool [T] twice: tokens that may be substituted or deleted (the response), tokens that may get a new right
    neighbour (the response and the last prompt token)."""
    offset = x.positions - prompt_len[x.batch]
    return offset >= 0, offset >= -1


def log_softplus(raw: Tensor) -> Tensor:
    """log(softplus(raw)) with a gradient everywhere: far to the left, softplus(raw) = exp(raw) underflows to 0."""
    return F.softplus(raw.clamp_min(-15.0)).log() + (raw + 15.0).clamp_max(0.0)


# ---------------------------------------------------------------------------------------------------- sampling


@dataclass
class Sampled:
    """response: token ids without the prompt. edits: how many substitutions, deletions and insertions were made.
    left_over: insertions that the model still expected at the end; well above 0 means too few steps."""

    response: list[int]
    edits: tuple[int, int, int]
    left_over: float


@torch.no_grad()
def sample(
    model,
    prompts: list[list[int]],
    *,
    x0: list[list[int]],
    steps: int = 100,
    seeds: list[int] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    on_step=None,
) -> list[Sampled]:
    """Run the chain from t = 0 to 1 in `steps` equal steps (tau-leaping, tau = 1 / steps), prompts in one batch.

    From t to t + tau a remaining edit fires with probability q = (kappa(t + tau) - kappa(t)) / (1 - kappa(t)),
    so a token is substituted or deleted with probability q (lambda_sub + lambda_del) and gets a right neighbour with
    probability q lambda_ins, each at most 1. For small tau this is the Euler step; in the last one q = 1, and every
    expected edit is made instead of being cut off. At most one token is inserted per gap and step.

    Rates first, tokens only where an edit fires: the vocabulary heads see fired rows alone. A sequence that did not
    change keeps its hidden states (unless the model depends on t). temperature 0 takes the most likely token. Prompts
    are frozen. A text that fills the model's positions takes no more insertions. Each sequence draws from its own
    counter-based noise, so its text depends on its seed and not on its neighbours. on_step(t, x, op, sub_token,
    ins_token, label) is called before edits are applied.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    seeds = list(range(len(prompts)) if seeds is None else seeds)
    if not len(prompts) == len(x0) == len(seeds):
        raise ValueError(f"sample got {len(prompts)} prompts, {len(x0)} x0 and {len(seeds)} seeds; one each is needed")
    if not all(map(len, prompts)):
        raise ValueError("every prompt needs at least one token (BOS): it anchors what is inserted in front")
    if not prompts:
        return []
    device = next(model.parameters()).device
    kappa = schedule(model.config.nanoedit.get("schedule", "cubic"))
    time_conditioned = model.config.nanoedit.get("time_conditioned", False)
    limit = getattr(model.config, "max_position_embeddings", None) and max_positions(model.config)
    x = Ragged.pack([list(p) + list(s) for p, s in zip(prompts, x0)], device)
    prompt_len = torch.tensor([len(p) for p in prompts], device=device)
    seed = torch.tensor(seeds, dtype=torch.int64, device=device)
    streams = torch.arange(5, device=device)[:, None]  # fire, which, sub token, insert, ins token
    count = torch.zeros(len(prompts), 3, dtype=torch.int64, device=device)
    stale = torch.ones(len(x), dtype=torch.bool, device=device)  # texts that changed since they were last read
    hidden = rates = None

    def read(t: float):
        """Hidden states [T, D] and rates [3, T] of the current texts; only stale ones go through the model."""
        if not stale.any():
            return hidden, rates
        part = x if stale.all() else x.select(stale)
        fresh = model(part, torch.full((len(part),), t, device=device))
        if part is not x:
            changed = stale[x.batch]
            merged = fresh.new_empty(len(x.ids), fresh.shape[1])
            merged[changed], merged[~changed] = fresh, hidden  # hidden: what the last edits left of it
            fresh = merged
        can_edit, can_insert = editable(x, prompt_len)
        allowed = torch.stack([can_edit, can_edit, can_insert])
        return fresh, model.rate_heads(fresh).float().T * allowed

    for step in range(steps):
        t, t_next = step / steps, (step + 1) / steps
        hidden, rates = read(t)
        sub_rate, del_rate, ins_rate = rates
        q = kappa.fire(t, t_next)
        u = uniform_noise(seed[x.batch], step, x.positions, streams)  # [5, T]
        change = u[0] < q * (sub_rate + del_rate)
        substitute = change & (u[1] * (sub_rate + del_rate) < sub_rate)
        insert = within(u[3] < q * ins_rate, x, limit)

        op = torch.where(change, torch.where(substitute, SUB, DEL), KEEP).to(torch.uint8)
        sub_token, ins_token = torch.full_like(x.ids, GAP), torch.full_like(x.ids, GAP)
        for fired, head, token, noise in (
            (substitute, model.sub_logits, sub_token, u[2]),
            (insert, model.ins_logits, ins_token, u[4]),
        ):
            rows = fired.nonzero()[:, 0]
            if len(rows):
                token[rows] = draw_token(head(hidden[rows]), noise[rows], temperature, top_k, top_p)
        if on_step is not None:
            on_step(t, x, op, sub_token, ins_token, "")
        edits = torch.stack([substitute, change & ~substitute, insert], dim=1).long()
        made = torch.zeros_like(count).index_add_(0, x.batch, edits)
        count += made
        stale = made.any(1) | time_conditioned
        if made.any():
            hidden = hidden[~stale[x.batch]]
            x = apply_edits(x, op, sub_token, ins_token)

    _, rates = read(1.0)
    left_over = torch.zeros(len(x), device=device).index_add_(0, x.batch, rates[2])
    texts = (ids[len(p) :] for ids, p in zip(x.unpack(), prompts))
    return [Sampled(ids, tuple(c), left) for ids, c, left in zip(texts, count.tolist(), left_over.tolist())]


def within(insert: Tensor, x: Ragged, limit: int | None) -> Tensor:
    """insert, bool [T], without the insertions by which a sequence would exceed `limit` tokens."""
    added = torch.zeros_like(x.lengths).index_add_(0, x.batch, insert.long())
    if not limit or not (x.lengths + added > limit).any():
        return insert
    count = insert.long().cumsum(0)
    before = (added.cumsum(0) - added)[x.batch]
    return insert & (count - before <= (limit - x.lengths)[x.batch])


def draw_token(logits: Tensor, u: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One token per row. logits [N, V]; u in (0, 1) [N], turned into a token by inverting the distribution function.

    top_k: keep the k most likely tokens (0: all). top_p: keep the smallest set of tokens that holds this probability.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    p, token = p.sort(dim=-1, descending=True, stable=True) if top_k or top_p < 1 else (p, None)
    if top_k:
        p[:, top_k:] = 0
    if top_p < 1:
        p = p * (p.cumsum(-1) - p < top_p)  # a token stays if those before it do not reach top_p
    cdf = p.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(cdf, (u.double() * cdf[:, -1])[:, None]).clamp_max(logits.shape[1] - 1)
    return (index if token is None else token.gather(1, index))[:, 0]
