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

The model reads x_t and learns, per token, three rates (how soon will this token be substituted, deleted, or get a new
right neighbour?) and two distributions (by what?). Running the chain with those rates turns x0 into a text.

Rates. Every remaining edit fires at rate w(t) = kappa'(t) / (1 - kappa(t)). The network gives normalised rates
lambda >= 0; the true rate is w(t) * lambda, so lambda of an edit is the expected number of such edits still to come.

Loss per sequence, a Bregman divergence between the true and the modelled rates, up to a constant (paper, section 3):

    w(t) * [ sum_i (lambda_ins,i + lambda_del,i + lambda_sub,i) - sum_e ( log lambda_e + log Q_e(token of e) ) ] / |x1|

with i over the tokens of x_t and e over the remaining edits. Many edits share one lambda (a whole run is inserted to
the right of one token), so lambda learns their number and Q the distribution of their tokens.

What may not change is a mask over tokens (`Ragged.frozen`): the prompt, a suffix, any part of a draft.

Read in this order: schedules, sources, `Model` (the heads), `path` (x_t and what remains), `loss`, `sample`, and behind
it guidance, the corrector, and the likelihood. What train.py and sample.py ask of a method stands at the end.
"""

import math
import re
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit_distance import align_batch
from ragged import (
    ANCHOR,
    DEL,
    FREE,
    FROZEN,
    GAP,
    INS,
    KEEP,
    SUB,
    Generated,
    Ragged,
    apply_edits,
    check_prompts,
    editable,
    frozen_text,
    stratified,
    uniform_noise,
    weighted_nll,
)

EPSILON = 1e-3  # t ~ U[0, 1 - EPSILON]: at t = 1 nothing remains and w(t) is infinite
MAX_W = 20.0  # w(t) is clipped here, so that no single late t dominates a batch
SUBSTITUTED = 0.5  # share of x0's tokens that a random alignment substitutes
NORMALIZERS = ("length", "batch", "constant")  # of a text's loss


# ---------------------------------------------------------------------------------------------------- schedules


class Schedule(NamedTuple):
    """kappa(t) is the probability that a column has flipped by time t; d_kappa is its derivative."""

    kappa: callable
    d_kappa: callable

    def weight(self, t: Tensor, max_w: float = MAX_W) -> Tensor:
        """w(t) = kappa'(t) / (1 - kappa(t)): the rate at which a remaining edit fires. Clipped at max_w."""
        return (self.d_kappa(t) / (1 - self.kappa(t)).clamp_min(1e-9)).clamp_max(max_w)

    def at(self, t: float) -> float:
        """kappa(t) of a number."""
        return float(self.kappa(torch.tensor(t, dtype=torch.float64)))

    def inverse(self, kappa: Tensor) -> Tensor:
        """The times, float64, at which these values are reached: by bisection, for kappa never falls."""
        low, high = torch.zeros_like(kappa), torch.ones_like(kappa)
        for _ in range(50):
            middle = (low + high) / 2
            below = self.kappa(middle) < kappa
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high

    def fire(self, t: float, t_next: float) -> float:
        """The probability that an edit remaining at t fires before t_next; 1 when t_next is 1."""
        return min(1.0, (self.at(t_next) - self.at(t)) / max(1 - self.at(t), 1e-12))


PUBLISHED_SCHEDULES = {
    "LinearKappaScheduler": "linear", "CosineKappaScheduler": "cosine", "CubicKappaScheduler": "cubic[a:1,b:1]"
}  # fmt: skip


@cache
def parse_schedule(spec: str) -> Schedule:
    """linear | cosine | cubic (t^3, the paper's choice) | cubic[a:A,b:B], with kappa(0) = 0 and kappa(1) = 1:
    (a + 1) t^3 - (a + b + 1) t^2 + (b + 1) t. Raises ValueError for other names and where kappa would fall.
    """
    spec = PUBLISHED_SCHEDULES.get(spec, spec)
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
    try:
        items = [item.split(":") for item in (match[2] or "").split(",") if item.strip()]
        arguments = {key.strip(): float(number) for key, number in items}
        if arguments.keys() <= set(known[match[1]]) and all(map(math.isfinite, arguments.values())):
            return match[1], arguments
    except (ValueError, KeyError, TypeError):  # no number, no such name, no match
        pass
    usage = ", ".join(n + (f"[{','.join(f'{k}:NUMBER' for k in keys)}]" if keys else "") for n, keys in known.items())
    raise ValueError(f"{what} {spec!r} is not known; choose from {usage}")


# ---------------------------------------------------------------------------------------------------- sources


class Source(NamedTuple):
    """Where generation starts: kind is empty, masks, uniform or draft; length in tokens where it has one."""

    kind: str
    length: int = 0

    def draw(self, draft: list[int] | None, mask_id: int | None, unigram: Tensor | None, generator) -> list[int]:
        """One x0. unigram float [V]: the token frequencies that `uniform` draws from. Raises ValueError for what is
        missing."""
        if self.kind == "draft":
            if draft is None:
                raise ValueError('no draft to start from: give one with --draft, or a "draft" field in the data')
            return draft
        if self.kind == "masks" and mask_id is None:
            raise ValueError("no mask token to start from in the tokenizer; `convert.py --to editflow` adds one")
        if self.kind == "uniform" and unigram is None:
            raise ValueError("uniform starts from the token frequencies of the data; this checkpoint has none")
        if self.length == 0:
            return []
        if self.kind == "masks":
            return [mask_id] * self.length
        return torch.multinomial(unigram.cpu(), self.length, replacement=True, generator=generator).tolist()


@cache
def parse_source(spec: str) -> Source:
    """empty | masks[length:64] | uniform[length:100] | draft. Raises ValueError for anything else."""
    known = {"empty": (), "masks": ("length",), "uniform": ("length",), "draft": ()}
    kind, arguments = parse_spec(spec, known, "x0_sampler")
    length = arguments.get("length", {"masks": 64, "uniform": 100}.get(kind, 0))
    if not 0 <= length <= 10**6 or length != int(length):
        raise ValueError(f"x0_sampler {spec!r}: length must be a whole number of tokens, at least 0, at most 1000000")
    return Source(kind, int(length))


# ---------------------------------------------------------------------------------------------------- heads

SUBSTITUTE, DELETE, INSERT = 0, 1, 2  # columns of the rates


class Model(nn.Module):
    """The heads of Edit Flows over a backbone, a module that turns a ragged batch into hidden states [T, D].

    The backbone reads the text alone; the clock enters at the heads, so that hidden states stay valid while a text does
    not change. What remains to be done depends on t only through the survival s = 1 - kappa(t), the probability that a
    column has not flipped: given x_t, a longer x1 with n more columns is as much less likely as s^n is small. So a
    rate carries the posterior odds of "something remains" against "nothing does", sigmoid(odds(h) + log s), which goes
    to 0 with s unless the text must go on, and h itself is scaled and shifted by smooth functions of s.

    stored: what a checkpoint remembers. With "clock" the heads know s. With the source `uniform`, `unigram` [V] holds
    the token frequencies of the training data. Raises ValueError for a checkpoint that has t at its input.
    """

    def __init__(self, backbone: nn.Module, D: int, V: int, bias: bool = False, stored: dict | None = None):
        super().__init__()
        stored = stored or {}
        if stored.get("time_conditioned"):
            raise ValueError("checkpoints with t at the input are not read any more; convert.py --to editflow drops it")
        self.model = backbone
        self.rate_heads = nn.Sequential(nn.Linear(D, 3), nn.Softplus())  # lambda of SUBSTITUTE, DELETE, INSERT
        self.sub_logits = nn.Linear(D, V, bias=bias)  # what a substituted token becomes
        self.ins_logits = nn.Linear(D, V, bias=bias)  # what is inserted to the right of a token
        self.has_clock = bool(stored.get("clock"))
        if self.has_clock:
            self.odds = nn.Linear(D, 3)
            self.clock = nn.Linear(len(CLOCK_POWERS), 2 * D, bias=False)  # scale and shift of h
        if str(stored.get("x0_sampler")).startswith("uniform"):
            self.register_buffer("unigram", torch.ones(V) / V)

    def init_heads(self, generator: torch.Generator) -> None:
        """Small rates to begin with, a clock that changes little, equal token frequencies."""
        nn.init.normal_(self.rate_heads[0].weight, std=0.02, generator=generator)
        nn.init.constant_(self.rate_heads[0].bias, -2.0)  # softplus(-2) = 0.13 edits per token
        if hasattr(self, "unigram"):
            self.unigram.fill_(1 / len(self.unigram))
        if self.has_clock:
            nn.init.zeros_(self.odds.weight)
            nn.init.constant_(self.odds.bias, 4.0)  # sigmoid(4 + log s) > 0.8 as long as s > 0.08
            nn.init.zeros_(self.clock.weight)

    def forward(self, x: Ragged) -> Tensor:
        """Hidden states [T, D]."""
        return self.model(x)

    def at(self, h: Tensor, s: Tensor) -> Tensor:
        """What the heads read: hidden states h [T, D] at survival s float [T]."""
        if not self.has_clock:
            return h
        features = s[:, None] ** s.new_tensor(CLOCK_POWERS)
        scale, shift = self.clock(features.to(h.dtype)).chunk(2, dim=1)
        return h * (1 + scale) + shift

    def log_rates(self, h: Tensor, s: Tensor) -> Tensor:
        """log lambda, float32 [T, 3], from h = `at`(hidden states, s). -inf where s is 0 and the heads know it."""
        log_lambda = log_softplus(self.rate_heads[0](h).float())
        if not self.has_clock:
            return log_lambda
        return log_lambda + F.logsigmoid(self.odds(h).float() + s.log()[:, None])


CLOCK_POWERS = (0.25, 0.5, 1.0, 2.0)  # of s


def log_softplus(raw: Tensor) -> Tensor:
    """log(softplus(raw)) with a gradient everywhere: far to the left, softplus(raw) = exp(raw) underflows to 0."""
    return F.softplus(raw.clamp_min(-15.0)).log() + (raw + 15.0).clamp_max(0.0)


# ---------------------------------------------------------------------------------------------------- path


@dataclass
class PathBatch:
    """x_t for a batch, and the E edits that remain, each at a FREE token, or behind an ANCHOR."""

    x: Ragged  # prompts, half-edited responses, suffixes
    s: Tensor  # float [B]: 1 - kappa(t), the probability that a column has not flipped
    w: Tensor  # float [B]: w(t), the rate at which a remaining edit fires by itself
    norm: Tensor  # float [B]: by which a text's loss is divided
    row: Tensor  # int64 [E]: the token of x_t; an insertion goes to its right, and several may share a row
    kind: Tensor  # int64 [E]: SUBSTITUTE, DELETE or INSERT
    token: Tensor  # int64 [E]: what is substituted or inserted, GAP for a deletion
    rate: Tensor  # float [E]: w(t), and more where neighbours have flipped (localized paths)
    edits: Tensor  # int64 [B]: edits on the whole way from x0 to x1

    def to(self, device) -> "PathBatch":
        return PathBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def path(
    prompts: list, x0: list, x1: list, t: Tensor, schedule: Schedule, generator: torch.Generator, *,
    suffixes: list | None = None, normalize: str = "length", max_w: float = MAX_W,
    substituted: float | None = None, propagation: float = 0.0,
) -> PathBatch:  # fmt: skip
    """Draw x_t given (x0, x1) for every sequence: align, flip each column with probability kappa(t), drop the gaps.

    prompts, x0, x1, suffixes (frozen behind the response): lists of B token lists; t: float [B].
    substituted: None for the canonical script of least edits, else the share of x0's tokens that `random_columns`
    substitutes. propagation: see `spread`; the rate of a remaining edit is then w(t) + propagation times its flipped
    neighbours. max_w: rates are scaled so that w(t) is no larger.
    normalize: a text's loss is divided by "length", its own |x1| (then p(x1) / |x1| is learned: short texts come too
    often); "batch", the mean of |x1| over the batch (no such bias in large batches); "constant", 1 (none).
    Raises ValueError for an empty prompt: its last token anchors insertions in front of the response.
    """
    check_prompts(prompts)
    suffixes = suffixes or [[]] * len(prompts)
    parts0, parts1 = (list(chain(*zip(prompts, side, suffixes, strict=True))) for side in (x0, x1))
    if substituted is not None:
        z0, z1, columns = random_columns(parts0, parts1, substituted, generator)
    else:
        z0, z1, columns = map(torch.from_numpy, align_batch(parts0, parts1))
    part = torch.arange(len(parts0)).repeat_interleave(columns)  # 3 b + 0, 1, 2: prompt, response, suffix of text b
    batch, t = part // 3, t.double()
    chance = torch.rand(len(z0), generator=generator).double()
    if propagation:
        flipped = spread(schedule.inverse(chance), part, propagation, generator) <= t[batch]
    else:
        flipped = chance < schedule.kappa(t)[batch]
    zt = torch.where(flipped, z1, z0)

    here, remains = zt != GAP, zt != z1
    lengths = torch.zeros(len(prompts), dtype=torch.int64).index_add_(0, batch, here.long())
    frozen = torch.where(part % 3 == 1, FREE, FROZEN).to(torch.uint8)[here]
    x = Ragged.from_lengths(zt[here], lengths, frozen)
    x.frozen[x.cu_seqlens[:-1].long() + torch.tensor([len(p) - 1 for p in prompts])] = ANCHOR
    row = here.cumsum(0) - 1  # the last token of x_t at or before each column; the anchor comes first
    kind = torch.where(here, torch.where(z1 == GAP, DELETE, SUBSTITUTE), INSERT)

    w = schedule.weight(t, max_w)
    rate = w[batch]
    if propagation:
        scale = (max_w / schedule.weight(t, torch.inf)).clamp_max(1)  # 1 where w(t) is 0, too
        rate = rate + propagation * flipped_neighbours(flipped, part) * scale[batch]
    length = torch.tensor([max(1, len(s)) for s in x1], dtype=torch.float32)
    norm = {"length": length, "batch": length.mean().expand(len(x1)), "constant": torch.ones(len(x1))}[normalize]
    remaining = row[remains], kind[remains], z1[remains], rate[remains].float()
    edits = torch.bincount(batch[z0 != z1], minlength=len(prompts))
    return PathBatch(x, (1 - schedule.kappa(t)).float(), w.float(), norm, *remaining, edits)


def random_columns(x0: list, x1: list, substituted: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Like `align_batch`, in a random alignment: a share of x0's tokens is substituted (the paper's is a half), the
    others are deleted, what is left of x1 is inserted, and the three are shuffled. Every pair but the responses, number
    1 of 3, is one text twice, and kept."""
    z0, z1, columns = [], [], []
    for i, (a, b) in enumerate(zip(x0, x1)):
        both = min(int(substituted * len(a)), len(b)) if i % 3 == 1 else len(a)
        op = torch.tensor([SUB] * both + [DEL] * (len(a) - both) + [INS] * (len(b) - both), dtype=torch.int64)
        op = op[torch.randperm(len(op), generator=generator)]
        for z, tokens, absent in ((z0, a, INS), (z1, b, DEL)):
            z.append(torch.full_like(op, GAP).masked_scatter(op != absent, torch.tensor(tokens, dtype=torch.int64)))
        columns.append(len(op))
    return torch.cat(z0), torch.cat(z1), torch.tensor(columns)


def spread(time: Tensor, part: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Localized paths (paper, section 3): when each column flips, float64 [C], given when it would flip by itself.

    A flipped column makes each neighbour in its part, int64 [C], flip at this rate. So a column flips at the earliest
    over all columns of (its own time + a delay Exp(rate) for every step from there), and whatever the past, a column
    that has not flipped does so at rate w(t) + rate * (flipped neighbours): the process is Markov in what has flipped.
    (The paper lets every column that fires by itself cover Poisson(rate * time since) neighbours on either side.)
    """
    fence = torch.cat([part.new_full((1,), -1), part])[:-1] != part

    def onwards(time, fence):
        delay = -torch.rand(len(time), generator=generator, dtype=torch.float64).log() / rate
        way = delay.masked_fill(fence, 10.0).cumsum(0)  # from column 0; no time is above 1, so nothing crosses a fence
        return (time - way).cummin(0).values + way

    ends = torch.cat([fence, fence.new_ones(1)])[1:]
    return torch.minimum(onwards(time, fence), onwards(time.flip(0), ends.flip(0)).flip(0))


def flipped_neighbours(flipped: Tensor, part: Tensor) -> Tensor:
    """How many of the two neighbours in its part have flipped, float64 [C]."""
    together, flipped = part[1:] == part[:-1], flipped.double()
    left, right = flipped[:-1] * together, flipped[1:] * together
    return F.pad(left, (1, 0)) + F.pad(right, (0, 1))


# ---------------------------------------------------------------------------------------------------- loss


def loss(model, batch: PathBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The Edit Flows loss (formula in the header), averaged over the batch.

    Returns (scalar, parts of it for logging, detached). Of the vocabulary heads only rows with a remaining insertion
    (substitution) are computed, each once.
    """
    x, row, kind = batch.x, batch.row, batch.kind
    h = model.at(model(x), batch.s[x.batch])
    log_lambda = model.log_rates(h, batch.s[x.batch])  # [T, 3]
    mean = (1 / batch.norm / max(len(x), 1))[x.batch]  # [T]
    w, rate = batch.w[x.batch] * mean, batch.rate * mean[row]
    sub, ins = kind == SUBSTITUTE, kind == INSERT

    sum_lambda = (log_lambda.exp() * editable(x)).sum(1)  # [T]
    loss_rate = (w * sum_lambda).sum() - (rate * log_lambda[row, kind]).sum()
    nll_sub = weighted_nll(h, model.sub_logits, row[sub], batch.token[sub], rate[sub])
    nll_ins = weighted_nll(h, model.ins_logits, row[ins], batch.token[ins], rate[ins])

    total = loss_rate + nll_sub + nll_ins
    parts = {"loss": total, "loss_rate": loss_rate, "loss_sub": nll_sub, "loss_ins": nll_ins}
    return total, {name: value.detach() for name, value in parts.items()}


@torch.no_grad()
def likelihood(model, examples: list, settings, rng: torch.Generator) -> Tensor:
    """An unbiased estimate, in nats, float64 scalar, of an upper bound of the sum of -log p(response | prompt, suffix).

    E_t[loss], with w(t) not clipped and nothing divided, minus the number of edits, is the Kullback-Leibler divergence
    between the process that flips columns and the model's, as laws of whole paths; the law of x1 is a marginal of the
    latter. It is the same for every schedule, so t is drawn for small variance: kappa(t) = 1 - (1 - t)^2 has
    w(t) = 2 / (1 - t), and few edits remain where that is large. Raises ValueError for a model without a clock: its
    rates do not go to 0 as t goes to 1, and the bound is infinite.
    """
    if not model.has_clock:
        raise ValueError("the likelihood bound of Edit Flows is infinite for a model that does not know t; train one "
                         "with --time_conditioned")  # fmt: skip
    schedule = Schedule(lambda t: 1 - (1 - t) ** 2, lambda t: 2 * (1 - t))
    t = stratified(len(examples), 0, 1, rng).double().clamp_max(1 - 1e-7)
    batch = draw_path(model, examples, settings, schedule, rng, t, normalize="constant", max_w=torch.inf)
    total, _ = loss(model, batch.to(next(model.parameters()).device))
    return total.double() * len(examples) - batch.edits.sum()


# ---------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(
    model, prompts: list, x0: list, *, schedule: Schedule, steps: int = 100, seeds: list[int] | None = None,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, guidance: float = 0.0, corrector: float = 0.0,
    start: int | None = None, mask_id: int | None = None, suffixes: list | None = None, keep: list | None = None,
    eos_id: int | None = None, max_length: int | None = None, on_step=None,
) -> list[Generated]:  # fmt: skip
    """Run the chain from t = 0 to 1 in `steps` equal steps (tau-leaping, tau = 1 / steps), prompts in one batch.

    From t to t + tau a remaining edit fires with probability q = (kappa(t + tau) - kappa(t)) / (1 - kappa(t)),
    so a token is substituted or deleted with probability q (lambda_sub + lambda_del) and gets a right neighbour with
    probability q lambda_ins, each at most 1. For small tau this is the Euler step; in the last one q = 1, and every
    expected edit is made instead of being cut off. At most one token is inserted per gap and step.

    prompts, x0: B lists of token ids; prompts are frozen, and so are suffixes, behind x0, and the tokens of x0 for
    which keep, B lists of bool, is true. Rates first, tokens only where an edit fires: the vocabulary heads see fired
    rows alone. temperature 0 takes the most likely token. A text of max_length tokens takes no more insertions.
    guidance: see `Heads`. corrector: see `take_back`, which needs to know how many masks x0 consists of, `start`.
    Each sequence draws from its own counter-based noise, so its text depends on its seed and not on its neighbours.
    on_step(t, x, op, sub_token, ins_token, label) is called before edits are applied; the corrector's have the label
    "back". Raises ValueError for an empty prompt or lists of unequal length.
    """
    if not prompts:
        return []
    device = next(model.parameters()).device
    x = frozen_text(prompts, x0, suffixes, keep, device)
    prompt_len = torch.tensor([len(p) for p in prompts], device=device)
    seed = torch.tensor([s for _, s in zip(prompts, seeds or range(len(prompts)), strict=True)], device=device)
    count = torch.zeros(len(x), 4, dtype=torch.int64, device=device)  # substitutions, deletions, insertions, taken back
    heads, stream = Heads(model, prompt_len, guidance, temperature, top_k, top_p), torch.arange(5, device=device)
    for step in range(steps):
        t, t_next = step / steps, (step + 1) / steps
        ahead = min(1.0, t_next + corrector / steps)
        log_lambda = heads.read(x, 1 - schedule.at(t))
        lambda_sub, lambda_del, lambda_ins = (log_lambda.exp() * editable(x)).T
        q = schedule.fire(t, ahead)
        u_change, u_which, u_sub, u_insert, u_ins = uniform_noise(seed[x.batch], step, x.positions, stream[:, None])
        change = u_change < q * (lambda_sub + lambda_del)
        substitute = change & (u_which * (lambda_sub + lambda_del) < lambda_sub)
        insert = within(u_insert < q * lambda_ins, x, max_length)

        op = torch.where(change, torch.where(substitute, SUB, DEL), KEEP).to(torch.uint8)
        sub_token = heads.draw("sub_logits", substitute, u_sub)
        ins_token = heads.draw("ins_logits", insert, u_ins)
        if on_step is not None:
            on_step(t, x, op, sub_token, ins_token, "")
        made = torch.stack([substitute, change & ~substitute, insert, torch.zeros_like(insert)], dim=1)
        made = torch.zeros_like(count).index_add_(0, x.batch, made.long())
        x = apply_edits(x, op, sub_token, ins_token)
        if ahead > t_next:
            undone = 1 - schedule.at(t_next) / schedule.at(ahead)
            x, made[:, 3] = take_back(x, ahead, undone, start, mask_id, prompt_len, seed, step, on_step)
        count, heads.stale = count + made, made.any(1)
    return finish_texts(x, heads.read(x, 1 - schedule.at(t)), prompts, suffixes, steps, count, eos_id)


class Heads:
    """What the model says about a batch of texts, step after step, with only the texts read that are `stale`.

    The clock enters at the heads, so a text that no edit has touched keeps its hidden states. On the toy task this
    saves 61 % of the forward passes at 32 steps and 86 % at 100, which are then made in 1 / 2.7 and 1 / 7.5 of the
    time, with the same texts.

    guidance w: the rates become lambda(x | prompt)^(1 + w) lambda(x | no prompt)^(-w), and so do the token
    distributions, normalised (paper, section 3: "naive" guidance of the rates). Both branches are one batch: texts, and
    behind them the same texts with their prompts cut to the first token, as `--prompt_dropout` shows them in training.
    """

    def __init__(self, model, prompt_len: Tensor, guidance: float, temperature: float, top_k: int, top_p: float):
        self.model, self.prompt_len, self.guidance = model, prompt_len, guidance
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.stale = torch.ones_like(prompt_len, dtype=torch.bool)  # texts that have changed since they were read

    def read(self, x: Ragged, s: float) -> Tensor:
        """log lambda, float [T, 3], at survival s."""
        y, stale = x, self.stale
        if self.guidance:
            cut = (x.positions == 0) | (x.positions >= self.prompt_len[x.batch])  # what is left without prompt
            lengths = torch.cat([x.lengths, x.lengths - self.prompt_len + 1])
            y, stale = Ragged.from_lengths(torch.cat([x.ids, x.ids[cut]]), lengths), stale.repeat(2)
            self.twin = len(x.ids) + cut.cumsum(0) - 1  # where its copy stands; for the anchor, the first token's
        if stale.all():
            self.hidden = self.model(y)
        elif stale.any():
            changed, read = stale[y.batch], self.model(y.select(stale))
            hidden = read.new_empty(len(changed), read.shape[1])
            hidden[changed], hidden[~changed] = read, self.hidden[~stale[self.batch]]
            self.hidden = hidden
        self.batch, s = y.batch, torch.full((len(y.ids),), s, device=y.ids.device)
        self.h = self.model.at(self.hidden, s)
        log_lambda = self.model.log_rates(self.h, s)
        if not self.guidance:
            return log_lambda
        return (1 + self.guidance) * log_lambda[: len(x.ids)] - self.guidance * log_lambda[self.twin]

    def draw(self, head: str, fired: Tensor, u: Tensor) -> Tensor:
        """int64 [T]: a token from the vocabulary head wherever an edit fired, bool [T]; GAP elsewhere. u float [T]."""
        token = torch.full_like(fired, GAP, dtype=torch.int64)
        rows, head = fired.nonzero()[:, 0], getattr(self.model, head)
        if len(rows):
            logits = head(self.h[rows])
            if self.guidance:
                logits = (1 + self.guidance) * logits - self.guidance * head(self.h[self.twin[rows]])
            token[rows] = draw_token(logits, u[rows], self.temperature, self.top_k, self.top_p)
        return token


def take_back(
    x: Ragged, t: float, undone: float, start: int, mask_id: int | None, prompt_len: Tensor, seed: Tensor, step: int,
    on_step=None,
) -> tuple[Ragged, Tensor]:  # fmt: skip
    """The corrector: takes every flipped column back with probability `undone`. Returns x and how many, int64 [B].

    A chain that goes from t to t + (1 + a) tau and then back to t + tau has the law of the plain one (as tau goes to 0)
    for any a >= 0, and can mend what it has written. The way back of a column is known: from t' to t < t' a flipped one
    returns with probability 1 - kappa(t) / kappa(t'). Which columns have flipped is known, too, where x0 is `start`
    equal masks (0: empty), with no second model: in the canonical alignment the first `start` columns are substitutions
    as far as x1 reaches, what x1 has beyond them is inserted, and what it lacks is masks deleted at the end. So in x_t
    a token beyond the first `start` is an inserted one (taken back: deleted), one among them that is no mask a
    substituted one (back to a mask), and every token that x_t has less than `start` is a mask lost at the end (taken
    back: inserted there). For `uniform` and drafts x_t does not tell what has flipped.
    """
    free = x.frozen == FREE
    length = torch.zeros_like(x.lengths).index_add_(0, x.batch, free.long())  # [B] of the response
    hit = free & (uniform_noise(seed[x.batch], step, x.positions, 5) < undone)
    inserted = x.positions - prompt_len[x.batch] >= start
    op = torch.where(hit & inserted, DEL, torch.where(hit & (x.ids != mask_id), SUB, KEEP)).to(torch.uint8)
    slot = torch.arange(start, device=x.ids.device)
    lost = slot < (start - length)[:, None]  # [B, start]
    returning = (lost & (uniform_noise(seed[:, None], step, slot, 6) < undone)).sum(1)
    count = returning.index_add(0, x.batch, (op != KEEP).long())

    end, mask = prompt_len - 1 + length, GAP if mask_id is None else mask_id
    while (op != KEEP).any() or returning.any():  # at a time, one mask for every text that lacks one: behind its end
        back = returning > 0
        sub_token, ins_token = torch.full_like(x.ids, mask), torch.full_like(x.ids, GAP)
        ins_token[(x.cu_seqlens[:-1] + end)[back]] = mask
        if on_step is not None:
            on_step(t, x, op, sub_token, ins_token, "back")
        x = apply_edits(x, op, sub_token, ins_token)
        op, end, returning = torch.full_like(x.ids, KEEP).to(torch.uint8), end + back.long(), returning - back.long()
    return x, count


def within(insert: Tensor, x: Ragged, max_length: int | None) -> Tensor:
    """insert, bool [T], without the insertions by which a sequence would exceed max_length tokens."""
    added = torch.zeros_like(x.lengths).index_add_(0, x.batch, insert.long())
    if not max_length or not (x.lengths + added > max_length).any():
        return insert
    count = insert.long().cumsum(0)
    before = (added.cumsum(0) - added)[x.batch]
    return insert & (count - before <= (max_length - x.lengths)[x.batch])


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


def finish_texts(x: Ragged, log_lambda: Tensor, prompts, suffixes, steps: int, count: Tensor, eos_id: int | None):
    """The responses, with what was done to them. left_over: insertions that the model still expected in the end."""
    expected = log_lambda[:, INSERT].exp() * editable(x)[:, INSERT]
    expected = torch.zeros(len(x), device=x.ids.device).index_add_(0, x.batch, expected.float()).tolist()
    texts, kinds = [], ("substitutions", "deletions", "insertions", "taken_back")
    suffixes = suffixes or [[]] * len(prompts)
    for ids, prompt, suffix, made, left_over in zip(x.unpack(), prompts, suffixes, count.tolist(), expected):
        tokens = ids[len(prompt) : len(ids) - len(suffix)]
        response = tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens
        text = Generated(response, tokens, {"steps": steps}, details=dict(zip(kinds, made)) | {"left_over": left_over})
        if left_over > max(2, 0.05 * made[INSERT]):
            text.note = f"the model still expected {left_over:.0f} insertions at the end; more steps (a smaller --tau) "
            text.note += "give longer texts"
        texts.append(text)
    return texts


# ------------------------------------------------------------- what the scripts ask for (plumbing/methods.py)

TITLE = "Edit Flows"
HEADS = ("sub_logits", "ins_logits")
TOKENS = ()
PACKED = False
PUBLISHED = {"schedule": "linear", "x0_sampler": "masks[length:64]", "temperature": 0.0}


def model_flags(f) -> None:
    f.text("--x0_sampler", read=parse_source,
           help="start: empty, masks[length:64], uniform[length:100], draft (default: the checkpoint's, else empty)")
    f.text("--schedule", "--scheduler_cls", read=parse_schedule,
           help="kappa: linear, cosine, cubic, cubic[a:A,b:B] (default: the checkpoint's, else cubic)")
    f.flag("--time_conditioned", default=None, help="the heads of a new model know t (default: True)")
    f.number("--prompt_dropout", low=0, below=1,
             help="share of the examples shown without prompt, for --guidance (default: the checkpoint's, else 0)")


def training_flags(f) -> None:
    f.choice("--normalize", choices=list(NORMALIZERS), default="length",
             help="divide a text's loss by its own length, by the mean length of the batch, or not at all")
    f.choice("--alignment", choices=["canonical", "random"],
             help="of start and text: a shortest edit script, or the paper's (default: random for uniform)")
    f.number("--propagation", low=0, default=0.0, help="localized paths: rate at which edits spread to neighbours")
    f.flag("--prefix_prompts", help="of plain text, take the first c^3 as prompt, c uniform in [0, 1]")


def sampling_flags(f) -> None:
    with f.exclusive():
        f.number("--tau", low=1e-6, high=1, help="time step of the chain; 0.01 (the default) makes 100 steps")
        f.integer("--steps", low=1, help="the same as a number of steps")
    with f.exclusive():
        f.text("--x0_sampler", read=parse_source, help="where to start (default: as in training)")
        f.integer("--mask_length", low=0, help="start from this many masks")
    f.number("--guidance", low=0, default=0.0,
             help="how far the prompt is overstated; needs --prompt_dropout in training")
    f.number("--corrector", low=0, default=0.0,
             help="in every step go this many steps further and take them back; from empty and masks")


def remember(args, stored: dict) -> dict:
    """Raises ValueError for a schedule or a source that is not known."""
    schedule = args.schedule or stored.get("schedule", "cubic")
    x0_sampler = args.x0_sampler or stored.get("x0_sampler", "empty")
    parse_schedule(schedule), parse_source(x0_sampler)
    dropout = stored.get("prompt_dropout", 0.0) if args.prompt_dropout is None else args.prompt_dropout
    clock = stored.get("clock", False) or bool(args.time_conditioned) if stored else args.time_conditioned is not False
    return {"schedule": schedule, "x0_sampler": x0_sampler, "clock": clock, "prompt_dropout": dropout}


def check_example(example, settings) -> None:
    if parse_source(settings.x0_sampler).kind == "draft" and example.draft is None:
        raise ValueError('--x0_sampler draft: no "draft" field to start from')


def start(model, settings, examples: list, resumed: bool) -> None:
    """Takes token frequencies from the examples where x0 is drawn from them, and checks that all of x_t will fit."""
    kind, length = parse_source(settings.x0_sampler)
    if settings.clock and not model.has_clock:
        raise ValueError("--time_conditioned is for new models, and for `convert.py`; this one was made without it")
    if kind == "uniform" and not (resumed and hasattr(model, "unigram")):
        tokens = torch.tensor([token for e in examples for token in e.response])
        counts = torch.bincount(tokens, minlength=model.sub_logits.out_features).float()
        model.register_buffer("unigram", counts / counts.sum())
    limit = getattr(model.model, "position_limit", None)
    longest = max(len(e) + (len(e.draft or ()) if kind == "draft" else length) for e in examples)
    if settings.streaming:  # these are only some of the examples
        longest = settings.max_length + (settings.max_length if kind == "draft" else length)
    if limit and longest > limit:  # on the way from x0 to x1 a text holds tokens of both
        raise ValueError(
            f"prompt, response and x0 take up to {longest} tokens together, the model has {limit} positions; lower "
            "--max_length or the length of --x0_sampler"
        )


def prepare(model, examples: list, settings, progress: float, rng, shared_rng) -> PathBatch:
    t = stratified(len(examples), 0, 1 - EPSILON, rng)
    schedule = parse_schedule(settings.schedule)
    examples = [vary_prompt(e, settings, rng) for e in examples]
    options = {"propagation": settings.propagation, "normalize": settings.normalize}
    return draw_path(model, examples, settings, schedule, rng, t, **options)


def vary_prompt(example, settings, rng):
    """--prefix_prompts: the beginning of a plain text becomes its prompt. --prompt_dropout: only the first token of the
    prompt is left."""
    if settings.prefix_prompts and len(example.prompt) == 1:
        cut = int(float(torch.rand((), generator=rng)) ** 3 * len(example.response))
        example = replace(example, prompt=example.prompt + example.response[:cut], response=example.response[cut:])
    if settings.prompt_dropout and float(torch.rand((), generator=rng)) < settings.prompt_dropout:
        example = replace(example, prompt=example.prompt[:1])
    return example


def draw_path(model, examples: list, settings, schedule: Schedule, rng, t: Tensor, **options) -> PathBatch:
    """`path` from where the settings say that x0 comes from."""
    unigram, source = getattr(model, "unigram", None), parse_source(settings.x0_sampler)
    x0 = [source.draw(e.draft, settings.tokens["mask"], unigram, rng) for e in examples]
    alignment = settings.alignment or ("random" if source.kind == "uniform" else "canonical")
    prompts, x1, suffixes = zip(*((e.prompt, e.response, e.suffix) for e in examples))
    substituted = SUBSTITUTED if alignment == "random" else None
    return path(prompts, x0, x1, t, schedule, rng, suffixes=suffixes, substituted=substituted, **options)


def start_source(settings) -> Source:
    """Where sampling starts: --mask_length, --x0_sampler, or as in training."""
    if settings.mask_length is not None:
        return Source("masks", settings.mask_length)
    return parse_source(settings.x0_sampler)


def passes(settings) -> int:
    return settings.steps or max(1, round(1 / (settings.tau or 0.01)))


def start_length(settings) -> int:
    return max(1, start_source(settings).length)


def generate(
    model, prompts: list, settings, seeds: list[int], drafts=None, suffixes=None, keep=None, on_step=None
) -> list[Generated]:
    """drafts: token ids to start from, one per prompt, instead of the checkpoint's source; keep, lists of bool, says
    which of them are frozen. suffixes: token ids that stand behind the response. Raises ValueError for settings that
    do not fit the checkpoint."""
    source = Source("draft") if drafts else start_source(settings)
    if settings.guidance and not settings.prompt_dropout:
        raise ValueError("--guidance needs a model that knows texts without prompts: train with --prompt_dropout 0.1")
    if settings.corrector and source.kind not in ("empty", "masks"):
        raise ValueError(f"--corrector: from {source.kind} a text does not tell what has flipped; use empty or masks")
    unigram, mask_id = getattr(model, "unigram", None), settings.tokens["mask"]
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    x0 = [source.draw(draft, mask_id, unigram, g) for draft, g in zip(drafts or [None] * len(prompts), noise)]
    generated = sample(
        model, prompts, x0, schedule=parse_schedule(settings.schedule), steps=passes(settings), seeds=seeds,
        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, guidance=settings.guidance,
        corrector=settings.corrector, start=source.length, mask_id=mask_id, suffixes=suffixes, keep=keep,
        eos_id=settings.tokens["eos"], max_length=settings.max_positions, on_step=on_step,
    )  # fmt: skip
    for text, draft in zip(generated, drafts or []):
        text.draft = draft
    return generated
