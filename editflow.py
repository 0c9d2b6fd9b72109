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

Read in this order: schedules, sources, `Model` (the heads), `path` (x_t and what remains), `loss`, `sample`. What
train.py and sample.py ask of a method stands at the end.
"""

import math
import re
from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit_distance import align_batch
from ragged import DEL, GAP, KEEP, SUB, Generated, Ragged, apply_edits, stratified, uniform_noise, weighted_nll

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

TIME_FEATURES = 128
SUBSTITUTE, DELETE, INSERT = 0, 1, 2  # columns of the rates


class Model(nn.Module):
    """The heads of Edit Flows over a backbone, a module that turns a ragged batch into hidden states [T, D].

    stored: what a checkpoint remembers. With "time_conditioned" an embedding of t is added to the input embeddings, and
    the backbone is called as backbone(x, extra [T, D]). With the source `uniform`, `unigram` [V] holds the token
    frequencies of the training data.
    """

    def __init__(self, backbone: nn.Module, D: int, V: int, bias: bool = False, stored: dict | None = None):
        super().__init__()
        stored = stored or {}
        self.model = backbone
        self.rate_heads = nn.Sequential(nn.Linear(D, 3), nn.Softplus())  # lambda of SUBSTITUTE, DELETE, INSERT
        self.sub_logits = nn.Linear(D, V, bias=bias)  # what a substituted token becomes
        self.ins_logits = nn.Linear(D, V, bias=bias)  # what is inserted to the right of a token
        self.depends_on_t = bool(stored.get("time_conditioned"))
        if self.depends_on_t:
            self.time_embed = nn.Sequential(nn.Linear(TIME_FEATURES, D), nn.SiLU(), nn.Linear(D, D))
        if str(stored.get("x0_sampler")).startswith("uniform"):
            self.register_buffer("unigram", torch.ones(V) / V)

    def init_heads(self, generator: torch.Generator) -> None:
        """Small rates to begin with, a time embedding that adds nothing, equal token frequencies."""
        nn.init.normal_(self.rate_heads[0].weight, std=0.02, generator=generator)
        nn.init.constant_(self.rate_heads[0].bias, -2.0)  # softplus(-2) = 0.13 edits per token
        if hasattr(self, "unigram"):
            self.unigram.fill_(1 / len(self.unigram))
        if self.depends_on_t:
            first, _, last = self.time_embed
            nn.init.normal_(first.weight, std=TIME_FEATURES**-0.5, generator=generator)
            for zero in (first.bias, last.weight, last.bias):
                nn.init.zeros_(zero)

    def forward(self, x: Ragged, t: Tensor | None = None) -> Tensor:
        """Hidden states [T, D]. t float [B] is read by time-conditioned models only."""
        if not self.depends_on_t:
            return self.model(x)
        return self.model(x, self.time_embed(time_features(t))[x.batch])


def time_features(t: Tensor) -> Tensor:
    """Sinusoids of t in [0, 1] at 64 frequencies from 1 to 1000 rad: [B] -> [B, 128]."""
    freq = torch.logspace(0, 3, TIME_FEATURES // 2, device=t.device)
    return torch.cat([(t[:, None] * freq).cos(), (t[:, None] * freq).sin()], dim=1).float()


# ---------------------------------------------------------------------------------------------------- path


@dataclass
class PathBatch:
    """x_t for a batch, and the edits that remain. `*_row` index tokens of x_t [T]; every edit belongs to a response."""

    x: Ragged  # prompts followed by half-edited responses
    t: Tensor  # float [B]
    w: Tensor  # float [B]: w(t), the rate at which a remaining edit fires
    norm: Tensor  # float [B]: by which a text's loss is divided, |x1| (response tokens only) or 1
    prompt_len: Tensor  # int64 [B]
    ins_row: Tensor  # int64 [N_ins]: insert ins_token to the right of the row; several may share a row
    ins_token: Tensor
    sub_row: Tensor  # int64 [N_sub]: substitute sub_token
    sub_token: Tensor
    del_row: Tensor  # int64 [N_del]

    def to(self, device) -> "PathBatch":
        return PathBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def path(
    prompts: list, x0: list, x1: list, t: Tensor, schedule: Schedule, generator: torch.Generator, *,
    normalize: bool = True, max_w: float = MAX_W,
) -> PathBatch:  # fmt: skip
    """Draw x_t given (x0, x1) for every sequence: align, flip each column with probability kappa(t), drop the gaps.

    prompts, x0, x1: lists of B token lists; t: float [B]. normalize: `norm` is |x1|, at least 1; else it is 1.
    Prompt and response are aligned as one text. The canonical script keeps equal tokens in front whatever follows, so a
    prompt is a run of kept columns, and x_t comes out with its prompt in place. Its last token anchors insertions in
    front of the response, so prompts must not be empty (ValueError).
    """
    if not all(prompts):
        raise ValueError("every prompt needs at least one token (BOS): it anchors what is inserted in front")
    texts = ([[*p, *s] for p, s in zip(prompts, side)] for side in (x0, x1))
    z0, z1, columns = map(torch.from_numpy, align_batch(*texts))  # all columns of the batch in one row
    batch = torch.arange(len(prompts)).repeat_interleave(columns)
    flipped = torch.rand(len(z0), generator=generator) < schedule.kappa(t.double())[batch]
    zt = torch.where(flipped, z1, z0)

    here = zt != GAP
    row = here.cumsum(0) - 1  # the last token of x_t at or before each column; the anchor comes first
    insert, delete = ~here & (z1 != GAP), here & (z1 == GAP)
    substitute = here & (z1 != GAP) & (zt != z1)
    lengths = torch.zeros(len(prompts), dtype=torch.int64).index_add_(0, batch, here.long())
    target_len = torch.tensor([max(1, len(s)) for s in x1], dtype=torch.float32)
    return PathBatch(
        x=Ragged.from_lengths(zt[here], lengths),
        t=t.float(),
        w=schedule.weight(t.float(), max_w),
        norm=target_len if normalize else torch.ones_like(target_len),
        prompt_len=torch.tensor([len(p) for p in prompts]),
        ins_row=row[insert],
        ins_token=z1[insert],
        sub_row=row[substitute],
        sub_token=z1[substitute],
        del_row=row[delete],
    )


# ---------------------------------------------------------------------------------------------------- loss


def loss(model, batch: PathBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The Edit Flows loss (formula in the header), averaged over the batch.

    Returns (scalar, parts of it for logging, detached). Of the vocabulary heads only rows with a remaining insertion
    (substitution) are computed, each once.
    """
    x, sub, dele, ins = batch.x, batch.sub_row, batch.del_row, batch.ins_row
    h = model(x, batch.t)
    raw = model.rate_heads[0](h).float()  # [T, 3] before the softplus
    w = (batch.w / batch.norm / max(len(x), 1))[x.batch]  # [T]

    sum_lambda = (F.softplus(raw) * editable(x, batch.prompt_len)).sum(1)  # [T]
    log_lambda = log_softplus(raw)
    nll_sub = weighted_nll(h, model.sub_logits, sub, batch.sub_token, w[sub])
    nll_ins = weighted_nll(h, model.ins_logits, ins, batch.ins_token, w[ins])

    rate = (w * sum_lambda).sum()
    for row, kind in ((sub, SUBSTITUTE), (dele, DELETE), (ins, INSERT)):
        rate = rate - (w[row] * log_lambda[row, kind]).sum()
    total = rate + nll_sub + nll_ins
    parts = {"loss": total, "loss_rate": rate, "loss_sub": nll_sub, "loss_ins": nll_ins}
    return total, {name: value.detach() for name, value in parts.items()}


def editable(x: Ragged, prompt_len: Tensor) -> Tensor:
    """bool [T, 3], a column per rate: response tokens may be substituted or deleted; they, and the last prompt token,
    may get a new right neighbour."""
    offset = x.positions - prompt_len[x.batch]
    return torch.stack([offset >= 0, offset >= 0, offset >= -1], dim=1)


def log_softplus(raw: Tensor) -> Tensor:
    """log(softplus(raw)) with a gradient everywhere: far to the left, softplus(raw) = exp(raw) underflows to 0."""
    return F.softplus(raw.clamp_min(-15.0)).log() + (raw + 15.0).clamp_max(0.0)


# ---------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(
    model, prompts: list, x0: list, *, schedule: Schedule, steps: int = 100, seeds: list[int] | None = None,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    eos_id: int | None = None, max_length: int | None = None, on_step=None,
) -> list[Generated]:  # fmt: skip
    """Run the chain from t = 0 to 1 in `steps` equal steps (tau-leaping, tau = 1 / steps), prompts in one batch.

    From t to t + tau a remaining edit fires with probability q = (kappa(t + tau) - kappa(t)) / (1 - kappa(t)),
    so a token is substituted or deleted with probability q (lambda_sub + lambda_del) and gets a right neighbour with
    probability q lambda_ins, each at most 1. For small tau this is the Euler step; in the last one q = 1, and every
    expected edit is made instead of being cut off. At most one token is inserted per gap and step.

    prompts, x0: B lists of token ids; prompts are frozen. Rates first, tokens only where an edit fires: the vocabulary
    heads see fired rows alone. temperature 0 takes the most likely token. A text of max_length tokens takes no more
    insertions. Each sequence draws from its own counter-based noise, so its text depends on its seed and not on its
    neighbours. on_step(t, x, op, sub_token, ins_token, "") is called before edits are applied. Raises ValueError for
    an empty prompt or lists of unequal length.
    """
    if not prompts:
        return []
    x, prompt_len, seed = start_texts(prompts, x0, seeds, device=next(model.parameters()).device)
    count = torch.zeros(len(x), 3, dtype=torch.int64, device=x.ids.device)  # substitutions, deletions, insertions
    stream = torch.arange(5, device=x.ids.device)[:, None]
    hidden, stale = None, torch.ones_like(seed, dtype=torch.bool)
    for step in range(steps):
        t, t_next = step / steps, (step + 1) / steps
        hidden = read(model, x, t, stale, hidden)
        lambda_sub, lambda_del, lambda_ins = (model.rate_heads(hidden).float() * editable(x, prompt_len)).T
        q = schedule.fire(t, t_next)
        u_change, u_which, u_sub, u_insert, u_ins = uniform_noise(seed[x.batch], step, x.positions, stream)  # [T] each
        change = u_change < q * (lambda_sub + lambda_del)
        substitute = change & (u_which * (lambda_sub + lambda_del) < lambda_sub)
        insert = within(u_insert < q * lambda_ins, x, max_length)

        op = torch.where(change, torch.where(substitute, SUB, DEL), KEEP).to(torch.uint8)
        sub_token = draw_tokens(model.sub_logits, hidden, substitute, u_sub, temperature, top_k, top_p)
        ins_token = draw_tokens(model.ins_logits, hidden, insert, u_ins, temperature, top_k, top_p)
        if on_step is not None:
            on_step(t, x, op, sub_token, ins_token, "")
        edits = torch.stack([substitute, change & ~substitute, insert], dim=1).long()
        made = torch.zeros_like(count).index_add_(0, x.batch, edits)
        count += made
        stale = made.any(1) | getattr(model, "depends_on_t", True)
        hidden = hidden[~stale[x.batch]]
        x = apply_edits(x, op, sub_token, ins_token)
    return finish_texts(model, x, prompt_len, hidden, stale, steps, count, eos_id)


def start_texts(prompts: list, x0: list, seeds: list[int] | None, device) -> tuple[Ragged, Tensor, Tensor]:
    """The texts at t = 0, prompt lengths [B] and seeds [B]."""
    if not all(map(len, prompts)):
        raise ValueError("every prompt needs at least one token (BOS): it anchors what is inserted in front")
    x = Ragged.pack([[*p, *s] for p, s in zip(prompts, x0, strict=True)], device)
    prompt_len = torch.tensor([len(p) for p in prompts], device=device)
    seeds = range(len(prompts)) if seeds is None else seeds
    return x, prompt_len, torch.tensor([seed for _, seed in zip(prompts, seeds, strict=True)], device=device)


def read(model, x: Ragged, t: float, stale: Tensor, kept: Tensor | None) -> Tensor:
    """Hidden states [T, D] of the current texts.

    Only texts in `stale`, bool [B], go through the model: those that changed since they were last read, or all of them
    if it depends on t. kept: hidden states of the others, in order. On the toy task this saves 61 % of the forward
    passes at 32 steps and 86 % at 100, which are then made in 1 / 2.7 and 1 / 7.5 of the time, with the same texts.
    """
    if stale.all():
        return model(x, torch.full((len(x),), t, device=x.ids.device))
    changed = stale[x.batch]
    hidden = kept.new_empty(len(x.ids), kept.shape[1])
    hidden[~changed] = kept
    if changed.any():
        part = x.select(stale)
        hidden[changed] = model(part, torch.full((len(part),), t, device=x.ids.device))
    return hidden


def within(insert: Tensor, x: Ragged, max_length: int | None) -> Tensor:
    """insert, bool [T], without the insertions by which a sequence would exceed max_length tokens."""
    added = torch.zeros_like(x.lengths).index_add_(0, x.batch, insert.long())
    if not max_length or not (x.lengths + added > max_length).any():
        return insert
    count = insert.long().cumsum(0)
    before = (added.cumsum(0) - added)[x.batch]
    return insert & (count - before <= (max_length - x.lengths)[x.batch])


def draw_tokens(head, hidden: Tensor, fired: Tensor, u: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """int64 [T]: a token from the head wherever an edit fired, bool [T]; GAP elsewhere. u in (0, 1) [T]."""
    token = torch.full_like(fired, GAP, dtype=torch.int64)
    rows = fired.nonzero()[:, 0]
    if len(rows):
        token[rows] = draw_token(head(hidden[rows]), u[rows], temperature, top_k, top_p)
    return token


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


def finish_texts(model, x, prompt_len, hidden, stale, steps, count, eos_id) -> list[Generated]:
    """The responses, with what was done to them. left_over: insertions that the model still expected in the end."""
    rates = model.rate_heads(read(model, x, 1.0, stale, hidden)).float() * editable(x, prompt_len)
    expected = torch.zeros(len(x), device=x.ids.device).index_add_(0, x.batch, rates[:, INSERT])
    texts = []
    for ids, start, made, left_over in zip(x.unpack(), prompt_len.tolist(), count.tolist(), expected.tolist()):
        tokens = ids[start:]
        response = tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens
        details = dict(zip(("substitutions", "deletions", "insertions"), made)) | {"left_over": left_over}
        text = Generated(response, tokens, {"steps": steps}, details=details)
        if left_over > max(2, 0.05 * made[INSERT]):
            expects = f"the model still expected {left_over:.0f} insertions at the end"
            text.note = f"{expects}; more steps (a smaller --tau) give longer texts"
        texts.append(text)
    return texts


# ------------------------------------------------------------- what the scripts ask for (plumbing/methods.py)

TITLE = "Edit Flows"
HEADS = ("sub_logits", "ins_logits")
TOKENS = ()
PACKED = False


def model_flags(f) -> None:
    f.text("--x0_sampler", read=parse_source,
           help="start: empty, masks[length:64], uniform[length:100], draft (default: the checkpoint's, else empty)")
    f.text("--schedule", "--scheduler_cls", read=parse_schedule,
           help="kappa: linear, cosine, cubic, cubic[a:A,b:B] (default: the checkpoint's, else cubic)")
    f.flag("--time_conditioned", help="a new model sees t, through an embedding that adds zero at first")


def training_flags(f) -> None:
    f.flag("--normalize", default=True, help="divide each sequence's loss by its length")


def sampling_flags(f) -> None:
    with f.exclusive():
        f.number("--tau", low=1e-6, high=1, help="time step of the chain; 0.01 (the default) makes 100 steps")
        f.integer("--steps", low=1, help="the same as a number of steps")
    with f.exclusive():
        f.text("--x0_sampler", read=parse_source, help="where to start (default: as in training)")
        f.integer("--mask_length", low=0, help="start from this many masks")


def remember(args, stored: dict) -> dict:
    """Raises ValueError for a schedule or a source that is not known."""
    schedule = args.schedule or stored.get("schedule", "cubic")
    x0_sampler = args.x0_sampler or stored.get("x0_sampler", "empty")
    parse_schedule(schedule), parse_source(x0_sampler)
    conditioned = bool(args.time_conditioned or stored.get("time_conditioned"))
    return {"schedule": schedule, "x0_sampler": x0_sampler, "time_conditioned": conditioned}


def check_example(example, settings) -> None:
    if parse_source(settings.x0_sampler).kind == "draft" and example.draft is None:
        raise ValueError('--x0_sampler draft: no "draft" field to start from')


def start(model, settings, examples: list, resumed: bool) -> None:
    """Takes token frequencies from the examples where x0 is drawn from them, and checks that all of x_t will fit."""
    kind, length = parse_source(settings.x0_sampler)
    if settings.time_conditioned and not model.depends_on_t:
        raise ValueError("--time_conditioned is for new models; this one was made without it")
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
    unigram = getattr(model, "unigram", None)
    source, schedule = parse_source(settings.x0_sampler), parse_schedule(settings.schedule)
    x0 = [source.draw(e.draft, settings.tokens["mask"], unigram, rng) for e in examples]
    prompts, x1 = [e.prompt for e in examples], [e.response for e in examples]
    t = stratified(len(examples), 0, 1 - EPSILON, rng)
    return path(prompts, x0, x1, t, schedule, rng, normalize=settings.normalize)


def start_source(settings) -> Source:
    """Where sampling starts: --mask_length, --x0_sampler, or as in training."""
    if settings.mask_length is not None:
        return Source("masks", settings.mask_length)
    return parse_source(settings.x0_sampler)


def passes(settings) -> int:
    return settings.steps or max(1, round(1 / (settings.tau or 0.01)))


def start_length(settings) -> int:
    return max(1, start_source(settings).length)


def generate(model, prompts: list, settings, seeds: list[int], drafts=None, on_step=None) -> list[Generated]:
    """drafts: token ids to start from, one per prompt, instead of the checkpoint's source."""
    source = Source("draft") if drafts else start_source(settings)
    unigram, mask_id = getattr(model, "unigram", None), settings.tokens["mask"]
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    x0 = [source.draw(draft, mask_id, unigram, g) for draft, g in zip(drafts or [None] * len(prompts), noise)]
    generated = sample(
        model, prompts, x0, schedule=parse_schedule(settings.schedule), steps=passes(settings), seeds=seeds,
        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
        eos_id=settings.tokens["eos"], max_length=settings.max_positions, on_step=on_step,
    )  # fmt: skip
    for text, draft in zip(generated, drafts or []):
        text.draft = draft
    return generated
