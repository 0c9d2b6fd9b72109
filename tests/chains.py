"""Chains small enough to enumerate, for the tests of editflow.py.

The oracle is plain Python: `columns` (the canonical alignment, from its definition), `half_way` (x_t and its remaining
edits), `posterior` (the true rates: expected edit counts given x_t) and `run_chain` (the exact distribution of the
texts that tau-leaping with given rates ends in). `knowing` is a model that has given rates, `real_model` a random one.
"""

import functools
import itertools
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import torch
from hypothesis import strategies as st
from torch import nn

import editflow
import models
from editflow import PathBatch, parse_schedule
from ragged import ANCHOR, FREE, FROZEN, GAP, Ragged

V = 8  # vocabulary: letters 1 to 4, MASK, BOS
MASK, BOS = 6, 7
PROMPT = (BOS, 5)
LETTERS = st.integers(1, 4)
TEXT = st.lists(LETTERS, max_size=4)
PROMPTS = st.lists(st.integers(1, 7), min_size=1, max_size=3)
SUFFIX = st.lists(st.integers(1, 7), max_size=2)

SIXTEENTHS = {(1, 2): 5, (2, 1): 4, (1,): 3, (1, 2, 3): 3, (): 1}
DATA = {x1: n / 16 for x1, n in SIXTEENTHS.items()}
STARTS = {"empty": (), "masks": (MASK, MASK), "draft": (2, 3, 3)}
SOURCES = {name: {x0: 1.0} for name, x0 in STARTS.items()}
SOURCES["mask"] = {(MASK,): 1.0}
SOURCES["uniform"] = {x0: 1 / 4 for x0 in itertools.product((1, 2), repeat=2)}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sample(model, prompts, x0, **options):
    """`editflow.sample` with the schedule that the test model carries."""
    return editflow.sample(model, prompts, x0, schedule=parse_schedule(model.schedule), **options)


# ---------------------------------------------------------------------------------------------------- the oracle


@functools.cache
def distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b[1:]) + (a[0] != b[0]), distance(a[1:], b) + 1, distance(a, b[1:]) + 1)


def columns(a, b):
    """The canonical alignment of two tuples: ((symbol of a or None, symbol of b or None), ...)."""
    if not a and not b:
        return ()
    d = distance(a, b)
    if a and b and d == distance(a[1:], b[1:]) + (a[0] != b[0]):  # KEEP if equal, else SUB
        return ((a[0], b[0]), *columns(a[1:], b[1:]))
    if a and d == distance(a[1:], b) + 1:
        return ((a[0], None), *columns(a[1:], b))
    return ((None, b[0]), *columns(a, b[1:]))


def random_alignments(a, b, substituted=0.5):
    """Every random alignment of two tuples, each with its probability."""
    both = min(int(substituted * len(a)), len(b))
    orders = Counter(itertools.permutations(["sub"] * both + ["del"] * (len(a) - both) + ["ins"] * (len(b) - both)))
    law = Counter()
    for order, n in orders.items():
        old, new = iter(a), iter(b)
        aligned = tuple((None if op == "ins" else next(old), None if op == "del" else next(new)) for op in order)
        law[aligned] += n / orders.total()
    return law


def half_way(prompt, aligned, flips, suffix=()):
    """(x_t with its prompt, remaining edits): an edit is (kind, row of x_t, token), a deletion's token is None."""
    text, edits = list(prompt), []
    for (old, new), flipped in zip(aligned, flips):
        now = new if flipped else old
        if now is not None:
            text.append(now)
        if now != new:
            kind = "ins" if now is None else "del" if new is None else "sub"
            edits.append((kind, len(text) - 1, new))
    return (*text, *suffix), tuple(edits)


@functools.cache
def patterns(prompt, aligned, suffix=()):
    """(x_t, remaining edits, columns flipped, columns not flipped) of all 2^columns patterns of flips."""
    every = itertools.product((0, 1), repeat=len(aligned))
    return [(*half_way(prompt, aligned, flips, suffix), sum(flips), len(flips) - sum(flips)) for flips in every]


def outcomes(prompt, x0, x1, kappa, suffix=()):
    """{(x_t, remaining edits): probability}"""
    law = Counter()
    for text, edits, flipped, left in patterns(tuple(prompt), columns(tuple(x0), tuple(x1)), tuple(suffix)):
        law[text, edits] += kappa**flipped * (1 - kappa) ** left
    return law


def couplings(source, x1):
    """[(probability, aligned columns)] of x0 and x1."""
    aligned = random_alignments if source == "uniform" else lambda *pair: {columns(*pair): 1.0}
    return [(p * q, z) for x0, p in SOURCES[source].items() for z, q in aligned(x0, x1).items()]


@functools.cache
def all_patterns(source, data):
    """{(x_t, remaining edits, columns flipped, columns not flipped): how often, before any column has its chance}"""
    law = Counter()
    for x1, p in data:
        for q, aligned in couplings(source, x1):
            for pattern in patterns(PROMPT, aligned):
                law[pattern] += p * q
    return law


def posterior(source, kappa, data=None):
    """{x_t: (probability of x_t, {(kind, row, token): expected number of such remaining edits given x_t})}."""
    mass, counts = Counter(), {}
    for (text, edits, flipped, left), p in all_patterns(source, tuple((data or DATA).items())).items():
        p = p * kappa**flipped * (1 - kappa) ** left
        mass[text] += p
        counts.setdefault(text, Counter()).update(dict.fromkeys(edits, 0.0))
        for edit in edits:
            counts[text][edit] += p
    return {x: (m, {e: c / m for e, c in counts[x].items() if c > 0}) for x, m in mass.items() if m > 0}


KAPPA = {"linear": lambda t: t, "cubic": lambda t: t**3, "cosine": lambda t: 1 - math.cos(math.pi * t / 2)}


@functools.cache
def true_rates(source, kappa):
    """{x_t: expected counts}: just before 1 instead of at 1, where texts that are not finished have no posterior."""
    return {x: counts for x, (_, counts) in posterior(source, min(kappa, 1 - 1e-6)).items()}


def run_chain(source, name, steps, rates=None, ahead=0.0, undo=None):
    """The exact law of the response after each step of tau-leaping, by default with the true rates.

    rates: kappa -> {x_t: counts}. undo: (response, probability) -> law, what happens to a step that went too far, by
    `ahead` steps, and is taken back."""
    rates, kappa = rates or functools.partial(true_rates, source), KAPPA[name]
    laws = [{PROMPT + x0: p for x0, p in SOURCES[source].items()}]
    for k in range(steps):
        now, then, far = (kappa(min(1.0, t / steps)) for t in (k, k + 1, k + 1 + ahead))
        q, known, after = (far - now) / (1 - now), rates(now), Counter()
        for text, p in laws[-1].items():
            for new, p_new in one_step(text, known.get(text, {}), q).items():
                back = undo(new[len(PROMPT) :], 1 - then / far) if undo and far > then else {new[len(PROMPT) :]: 1.0}
                for final, p_back in back.items():
                    after[PROMPT + final] += p * p_new * p_back
        laws.append(after)
    return [{text[len(PROMPT) :]: p for text, p in law.items()} for law in laws]


def one_step(text, counts, q):
    law = {(): 1.0}
    for row, token in enumerate(text):
        here = {e: c for e, c in counts.items() if e[1] == row}
        if not here:
            law = {(*old, token): mass for old, mass in law.items()}
            continue
        change = {((), e[2])[e[0] == "sub"]: c for e, c in here.items() if e[0] != "ins"}
        insert = {e[2]: c for e, c in here.items() if e[0] == "ins"}
        after = Counter()
        for (kept, p), (added, r) in itertools.product(fired(change, q, token), fired(insert, q, ())):
            for old, mass in law.items():
                after[old + tuple(z for z in (kept, added) if z != ())] += mass * p * r
        law = after
    return law


def fired(options, q, otherwise):
    """[(what happens, probability)]: one of the options with probability min(1, q * their sum)."""
    total = sum(options.values())
    happens = min(1.0, q * total)
    law = [(otherwise, 1 - happens), *((what, happens * c / total) for what, c in options.items())]
    return [(what, p) for what, p in law if p > 0]


def variation(law, other=DATA):
    """Total variation distance."""
    return sum(abs(law.get(x, 0) - other.get(x, 0)) for x in law.keys() | other.keys()) / 2


def chi_square(counts, law):
    """p-value of observed counts under a law; categories expected fewer than five times are taken together."""
    n = sum(counts.values())
    common = {x for x, p in law.items() if n * p >= 5}
    cells = [(counts.get(x, 0), n * law[x]) for x in common]
    rest = (n - sum(c for c, _ in cells), n - sum(e for _, e in cells))
    if rest[1] > 0.5 or rest[0] > 0:
        cells.append((rest[0], max(rest[1], 0.5)))  # half an outcome where the law says "never"
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    return survival(statistic, len(cells) - 1)


def survival(statistic, df):
    return (
        1.0 if df == 0 else float(torch.special.gammaincc(torch.tensor(df / 2).double(), torch.tensor(statistic / 2)))
    )


# ---------------------------------------------------------------------------------------------------- models

LOW = -80.0  # log of "never"
WIDTH, LONGEST = 3 + 2 * V, 8


class Tabular(nn.Module):
    """One free row per text and token: three logs of rates, V substitution logits, V insertion logits.

    The heads only pick their columns. `table` [S + 1, LONGEST, WIDTH]; the last row is for texts that have no entry.
    table_at: survival -> table, for a model that knows it.
    """

    has_clock = True

    def __init__(self, texts, table, name="linear", table_at=None):
        super().__init__()
        self.schedule, self.table_at = name, table_at
        self.keys = torch.tensor([self.key(Ragged.pack([text]))[0] for text in texts])
        self.table = nn.Parameter(table)
        self.sub_logits, self.ins_logits = self.pick(3, V), self.pick(3 + V, V)

    @staticmethod
    def pick(first, n):
        head = nn.Linear(WIDTH, n, bias=False).requires_grad_(False)
        head.weight.copy_(torch.eye(WIDTH)[first : first + n])
        return head

    @staticmethod
    def key(x):
        digit = (x.ids + 1) * (V + 1) ** x.positions
        return torch.zeros(len(x), dtype=torch.int64).index_add_(0, x.batch, digit)

    def forward(self, x):
        """[T, 1]: where in the table the token's row is."""
        known = self.keys == self.key(x)[:, None]  # [B, S]
        state = torch.where(known.any(1), known.long().argmax(1), len(self.table) - 1)[x.batch]
        return (state * LONGEST + x.positions.clamp_max(LONGEST - 1))[:, None]

    def at(self, h, s):
        if self.table_at is None:
            return self.table.flatten(0, 1)[h[:, 0]]
        rows = torch.empty(len(h), WIDTH)
        for value in s.unique():
            rows[s == value] = self.table_at(float(value)).flatten(0, 1)[h[s == value, 0]]
        return rows

    def log_rates(self, h, s):
        return h[:, :3]


def table_of(texts, rates):
    """The table [S + 1, LONGEST, WIDTH] whose rates and distributions are these counts; the last row is LOW."""
    table = torch.full((len(texts) + 1, LONGEST, WIDTH), LOW, dtype=torch.float64)
    for i, text in enumerate(texts):
        total = Counter()
        for (kind, row, token), count in rates.get(text, {}).items():
            total[kind, row] += count
            if token is not None:
                table[i, row, token + {"sub": 3, "ins": 3 + V}[kind]] = math.log(count)
        for (kind, row), count in total.items():
            table[i, row, ("sub", "del", "ins").index(kind)] = math.log(count)
    return table.float()


def knowing(source, rates=None, name="linear"):
    """The model whose rates at kappa are rates(kappa), {x_t: counts}; by default the true ones."""
    rates = rates or functools.partial(true_rates, source)
    texts = list(posterior(source, 0.5))
    table_at = functools.cache(lambda s: table_of(texts, rates(1 - s)))
    return Tabular(texts, table_at(0.5), name, table_at)


@functools.cache
def real_model(clock=False, rates=0.0):
    """A random transformer. In float64, so that rounding, which may depend on the batch, never decides an edit."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = models.backbone(models.DecoderConfig("llama", V, **sizes))
    model = editflow.Model(backbone, 16, V, stored={"clock": clock})
    model.schedule = "linear"
    models.init_weights(model, seeded(1))
    model.init_heads(seeded(1))
    nn.init.normal_(model.rate_heads[0].weight, generator=seeded(2))
    nn.init.constant_(model.rate_heads[0].bias, rates)
    if clock:
        nn.init.normal_(model.clock.weight, generator=seeded(3))
    return model.double().eval()


class Steps(list):
    """on_step, remembering."""

    def __call__(self, t, x, op, sub_token, ins_token, label):
        self.append(SimpleNamespace(t=t, x=x, op=op, sub_token=sub_token, ins_token=ins_token, label=label))


def draw_texts(source, name, steps, n, **options):
    model, x0 = knowing(source, name=name), [list(*SOURCES[source])] * n
    return Counter(tuple(s.response) for s in sample(model, [list(PROMPT)] * n, x0=x0, steps=steps, **options))


CORRECTED = {"corrector": 2.0, "start": 2, "mask_id": MASK}


def frozen_states(prompt, response, suffix):
    return [FROZEN] * (len(prompt) - 1) + [ANCHOR] + [FREE] * response + [FROZEN] * len(suffix)


def evenly(n):
    return dict.fromkeys(itertools.product((0, 1), repeat=n), 0.5**n)


def every_path(x0, data, w, law=evenly, propagation=0.0):
    """[(text, edits, their rates, probability, len(x1))] of every x1 and all flips of its columns. law: number of
    columns -> {flips: probability}, by default that at kappa = 1/2."""
    rows = []
    for x1, p in data.items():
        aligned = columns(x0, x1)
        for flips, q in law(len(aligned)).items():
            near = [sum(flips[max(0, i - 1) : i] + flips[i + 1 : i + 2]) for i in range(len(flips))]
            remain = [i for i, (old, new) in enumerate(aligned) if old != new and not flips[i]]
            rates = [w + propagation * near[i] for i in remain]
            rows.append((*half_way(PROMPT, aligned, flips), rates, p * q, len(x1)))
    return rows


def as_batch(rows, s, w, normalize=False):
    """A batch whose loss is the expectation over the rows."""
    x = Ragged.pack([text for text, *_ in rows])
    frozen = [v for text, *_ in rows for v in frozen_states(PROMPT, len(text) - len(PROMPT), ())]
    start, kinds = x.cu_seqlens.tolist(), ("sub", "del", "ins")
    listed = [(b, *edit, rate) for b, (_, edits, rates, *_) in enumerate(rows) for edit, rate in zip(edits, rates)]
    return PathBatch(
        x=replace(x, frozen=torch.tensor(frozen, dtype=torch.uint8)),
        s=torch.full((len(rows),), s),
        w=torch.full((len(rows),), w),
        norm=torch.tensor([(max(1, n) if normalize else 1) / p / len(rows) for *_, p, n in rows]),
        row=torch.tensor([start[b] + row for b, _, row, _, _ in listed]),
        kind=torch.tensor([kinds.index(kind) for _, kind, _, _, _ in listed]),
        token=torch.tensor([GAP if token is None else token for _, _, _, token, _ in listed]),
        rate=torch.tensor([rate for *_, rate in listed]),
        edits=torch.zeros(len(rows)),
    )
