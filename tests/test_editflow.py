"""What editflow.py promises, proven on chains small enough to enumerate.

The oracle is plain Python: `columns` (the canonical alignment, from its definition), `outcomes` (every x_t with its
probability and its remaining edits), `posterior` (the true rates: expected edit counts given x_t) and `run_chain` (the
exact distribution of the texts that tau-leaping with given rates ends in). path, loss and sample must agree with it.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import editflow
import models
from editflow import PathBatch, parse_schedule, parse_source, path
from ragged import DEL, GAP, KEEP, SUB, Ragged, apply_edits, stratified

quick = settings(deadline=None, max_examples=60)
few = settings(deadline=None, max_examples=20)

V = 8  # vocabulary: letters 1 to 4, MASK, BOS
MASK, BOS = 6, 7
PROMPT = (BOS, 5)
LETTERS = st.integers(1, 4)
TEXT = st.lists(LETTERS, max_size=4)
PROMPTS = st.lists(st.integers(1, 7), min_size=1, max_size=3)

DATA = {(1, 2): 5, (2, 1): 4, (1,): 3, (1, 2, 3): 3, (): 1}  # sixteenths
DATA = {x1: n / 16 for x1, n in DATA.items()}
STARTS = {"empty": (), "masks": (MASK, MASK), "draft": (2, 3, 3)}


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
    """The canonical alignment of two tuples: [(symbol of a or None, symbol of b or None), ...]."""
    if not a and not b:
        return []
    d = distance(a, b)
    if a and b and d == distance(a[1:], b[1:]) + (a[0] != b[0]):  # KEEP if equal, else SUB
        return [(a[0], b[0]), *columns(a[1:], b[1:])]
    if a and d == distance(a[1:], b) + 1:
        return [(a[0], None), *columns(a[1:], b)]
    return [(None, b[0]), *columns(a, b[1:])]


def half_way(prompt, aligned, flips):
    """(x_t with its prompt, remaining edits): an edit is (kind, row of x_t, token), a deletion's token is None."""
    text, edits = list(prompt), []
    for (old, new), flipped in zip(aligned, flips):
        now = new if flipped else old
        if now is not None:
            text.append(now)
        if now != new:
            kind = "ins" if now is None else "del" if new is None else "sub"
            edits.append((kind, len(text) - 1, new))
    return tuple(text), tuple(edits)


def outcomes(prompt, x0, x1, kappa):
    """{(x_t, remaining edits): probability}, from all 2^columns patterns of flips."""
    aligned, law = columns(tuple(x0), tuple(x1)), Counter()
    for flips in itertools.product((0, 1), repeat=len(aligned)):
        law[half_way(prompt, aligned, flips)] += kappa ** sum(flips) * (1 - kappa) ** (len(flips) - sum(flips))
    return law


def posterior(x0, kappa, data=None, prompt=PROMPT):
    """{x_t: (probability of x_t, {(kind, row, token): expected number of such remaining edits given x_t})}."""
    mass, counts = Counter(), {}
    for x1, p in (data or DATA).items():
        for (text, edits), q in outcomes(prompt, x0, x1, kappa).items():
            mass[text] += p * q
            for edit in edits:
                counts.setdefault(text, Counter())[edit] += p * q
    return {x: (m, {e: c / m for e, c in counts.get(x, {}).items() if c > 0}) for x, m in mass.items() if m > 0}


KAPPA = {"linear": lambda t: t, "cubic": lambda t: t**3}


@functools.cache
def rates_at(start, name, t):
    # just before 1 instead of at 1, where texts that are not finished have no posterior
    return {x: counts for x, (_, counts) in posterior(STARTS[start], KAPPA[name](min(t, 1 - 1e-6))).items()}


def run_chain(start, name, steps):
    """The exact law of the final response under tau-leaping with the true rates."""
    law = {PROMPT + STARTS[start]: 1.0}
    for k in range(steps):
        now, then = KAPPA[name](k / steps), KAPPA[name]((k + 1) / steps)
        q = (then - now) / (1 - now)
        after = Counter()
        for text, p in law.items():
            for new, p_new in one_step(text, rates_at(start, name, k / steps).get(text, {}), q).items():
                after[new] += p * p_new
        law = after
    return {text[len(PROMPT) :]: p for text, p in law.items()}


def one_step(text, counts, q):
    law = {(): 1.0}
    for row, token in enumerate(text):
        change = {((), e[2])[e[0] == "sub"]: c for e, c in counts.items() if e[1] == row and e[0] != "ins"}
        insert = {e[2]: c for e, c in counts.items() if e[1] == row and e[0] == "ins"}
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
    return [(otherwise, 1 - happens), *((what, happens * c / total) for what, c in options.items())]


def test_the_oracle_is_a_probability_law_and_its_chain_reaches_the_data_at_first_order():
    for start, name in itertools.product(STARTS, KAPPA):
        states = posterior(STARTS[start], 0.37)
        assert math.isclose(sum(p for p, _ in states.values()), 1)
        error = {}
        for steps in (16, 32, 64):
            law = run_chain(start, name, steps)
            assert math.isclose(sum(law.values()), 1, rel_tol=1e-9)
            error[steps] = sum(abs(law.get(x, 0) - DATA.get(x, 0)) for x in law.keys() | DATA.keys()) / 2
        assert error[64] < 0.05
        assert 1.6 < error[16] / error[32] < 2.6
        assert 1.6 < error[32] / error[64] < 2.6


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


# ---------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "spec", ["linear", "cosine", "cubic", "cubic[a:1,b:0]", "cubic[a:0,b:0.5]", " cubic[ b : -1 ] "]
)
def test_schedules_rise_from_0_to_1_and_carry_their_derivative(spec):
    kappa = parse_schedule(spec)
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    values = kappa.kappa(t)
    torch.testing.assert_close(values[[0, -1]], torch.tensor([0.0, 1.0]).double(), atol=1e-7, rtol=0)
    assert (values.diff() >= 0).all()
    numerical = (kappa.kappa(t + 1e-5) - kappa.kappa(t - 1e-5)) / 2e-5
    torch.testing.assert_close(kappa.d_kappa(t), numerical, atol=1e-6, rtol=0)


def test_schedules_are_the_formulas():
    t = torch.tensor(0.3, dtype=torch.float64)
    a, b = 0.5, -0.25
    assert math.isclose(parse_schedule("cubic").kappa(t), 0.3**3)
    general = (a + 1) * 0.3**3 - (a + b + 1) * 0.3**2 + (b + 1) * 0.3
    assert math.isclose(parse_schedule("cubic[a:0.5,b:-0.25]").kappa(t), general)
    assert math.isclose(parse_schedule("cosine").kappa(t), 1 - math.cos(math.pi * 0.3 / 2), rel_tol=1e-6)


def test_weight_is_the_rate_of_the_remaining_edits_and_is_clipped():
    t = torch.tensor([0.0, 0.2, 0.9, 0.999])
    torch.testing.assert_close(parse_schedule("linear").weight(t), torch.tensor([1, 1 / 0.8, 10, 20]))
    torch.testing.assert_close(parse_schedule("linear").weight(t, 5.0), torch.tensor([1, 1 / 0.8, 5, 5]))
    cubic = 3 * t.double() ** 2 / (1 - t.double() ** 3)
    torch.testing.assert_close(parse_schedule("cubic").weight(t, 1e9).double(), cubic, rtol=1e-3, atol=0)
    assert parse_schedule("linear").weight(torch.ones(1), 1e30).isfinite().all()


@quick
@given(
    st.sampled_from(["linear", "cosine", "cubic", "cubic[a:1,b:0]"]),
    st.lists(st.floats(0, 0.99), min_size=3, max_size=3),
)
def test_fire_is_the_chance_of_a_flip_in_an_interval(spec, times):
    a, b, c = sorted(times)
    kappa = parse_schedule(spec)
    survive = 1 - kappa.fire(a, b), 1 - kappa.fire(b, c)
    assert math.isclose(survive[0] * survive[1], 1 - kappa.fire(a, c), abs_tol=1e-7)
    assert math.isclose(kappa.fire(0, b), kappa.kappa(torch.tensor(b, dtype=torch.float64)), abs_tol=1e-7)
    assert math.isclose(kappa.fire(b, 1), 1, abs_tol=1e-6)
    assert 0 <= kappa.fire(a, b) <= 1


@pytest.mark.parametrize("spec", ["cubic[a:9,b:9]", "cubic[b:-2]", "cubic[a:-5]", "cubic[a:nan]", "cubic[b:inf]"])
def test_a_schedule_that_falls_is_refused(spec):
    with pytest.raises(ValueError, match="cubic") as error:
        parse_schedule(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec", ["", "quartic", "cubic[", "cubic]", "cubic[c:1]", "cubic[a]", "cubic[a:x]", "linear[a:1]", "line ar"]
)
def test_an_unknown_schedule_is_answered_with_the_known_ones(spec):
    with pytest.raises(ValueError, match="linear, cosine, cubic") as error:
        parse_schedule(spec)
    assert repr(spec) in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- sources


def test_sources_are_read_with_their_lengths():
    assert parse_source("empty") == ("empty", 0)
    assert parse_source("masks") == ("masks", 64)
    assert parse_source("masks[length:5]") == ("masks", 5)
    assert parse_source("uniform") == ("uniform", 100)
    assert parse_source(" uniform[ length: 7 ] ") == ("uniform", 7)
    assert parse_source("draft") == ("draft", 0)


BAD_LENGTHS = [f"masks[length:{n}]" for n in ("2.5", "-1", "x", "", "inf", "nan")]


@pytest.mark.parametrize("spec", ["", "noise", "masks[64]", "masks[len:3]", "empty[length:3]", *BAD_LENGTHS])
def test_an_unreadable_source_is_refused_in_one_line(spec):
    with pytest.raises(ValueError, match="x0_sampler") as error:
        parse_source(spec)
    assert repr(spec) in str(error.value)
    assert "\n" not in str(error.value)
    if "length:" not in spec:
        assert all(
            name in str(error.value) for name in ("empty", "masks[length:NUMBER]", "uniform[length:NUMBER]", "draft")
        )


def test_what_sources_draw():
    frequencies = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0, 0, 0])
    assert parse_source("empty").draw([1], MASK, frequencies, seeded(0)) == []
    assert parse_source("masks[length:3]").draw(None, MASK, None, seeded(0)) == [MASK] * 3
    assert parse_source("draft").draw([3, 1], MASK, None, seeded(0)) == [3, 1]
    assert parse_source("draft").draw([], MASK, None, seeded(0)) == []
    with pytest.raises(ValueError, match="draft"):
        parse_source("draft").draw(None, MASK, None, seeded(0))
    uniform = parse_source("uniform[length:5000]")
    drawn = uniform.draw(None, MASK, frequencies, seeded(1))
    assert drawn == uniform.draw(None, MASK, frequencies, seeded(1)) != uniform.draw(None, MASK, frequencies, seeded(2))
    assert chi_square(Counter(drawn), dict(enumerate(frequencies.tolist()))) > 1e-3
    assert parse_source("uniform[length:0]").draw(None, MASK, frequencies, seeded(0)) == []


# ---------------------------------------------------------------------------------------------------- path


def edits_of(batch):
    """The remaining edits of every sequence of a PathBatch, as `half_way` writes them, by row."""
    x = batch.x
    edits = [[] for _ in range(len(x))]
    listed = [("sub", r, v) for r, v in zip(batch.sub_row.tolist(), batch.sub_token.tolist())]
    listed += [("del", r, None) for r in batch.del_row.tolist()]
    listed += [("ins", r, v) for r, v in zip(batch.ins_row.tolist(), batch.ins_token.tolist())]
    where, position = x.batch.tolist(), x.positions.tolist()
    for kind, row, token in listed:
        edits[where[row]].append((kind, position[row], token))
    return edits


def apply_all(text, edits):
    """Every edit at once; several insertions behind one token in the order in which they are listed."""
    result = []
    for row, token in enumerate(text):
        here = [(kind, new) for kind, r, new in edits if r == row]
        change = [(kind, new) for kind, new in here if kind != "ins"]
        assert len(change) <= 1
        result += [token] if not change else [change[0][1]] if change[0][0] == "sub" else []
        result += [new for kind, new in here if kind == "ins"]
    return result


def canonical(edits):
    """An order for comparisons; insertions behind the same token keep theirs."""
    return tuple(sorted(edits, key=lambda e: (e[1], e[0])))


SEQUENCE = st.tuples(PROMPTS, TEXT, TEXT, st.sampled_from([0.0, 1.0]) | st.floats(0, 1))


@settings(deadline=None, max_examples=200)
@given(st.lists(SEQUENCE, min_size=1, max_size=4), st.integers(0, 2**40))
def test_path_draws_an_enumerated_state_whose_remaining_edits_give_x1(batch, seed):
    prompts, x0, x1, t = (list(z) for z in zip(*batch))
    got = path(prompts, x0, x1, torch.tensor(t, dtype=torch.float64), parse_schedule("linear"), seeded(seed))
    assert got.prompt_len.tolist() == list(map(len, prompts))
    assert got.norm.tolist() == [max(1, len(s)) for s in x1]
    torch.testing.assert_close(got.t, torch.tensor(t, dtype=torch.float32))
    for b, (text, edits) in enumerate(zip(got.x.unpack(), edits_of(got))):
        law = outcomes(prompts[b], x0[b], x1[b], t[b])
        assert (tuple(text), canonical(edits)) in {(x, canonical(e)) for (x, e), p in law.items() if p > 0}
        assert apply_all(text, edits) == prompts[b] + x1[b]
        last = len(prompts[b]) - 1
        assert all(row > last or (row == last and kind == "ins") for kind, row, _ in edits)
        if t[b] in (0, 1):
            assert text == prompts[b] + (x1 if t[b] else x0)[b]
            assert edits == [] or t[b] == 0


@pytest.mark.parametrize(("x0", "x1"), [("", "1234"), ("66", "123"), ("2331", "12"), ("1212", "2121"), ("123", "")])
@pytest.mark.parametrize("t", [0.25, 0.7])
def test_path_has_the_enumerated_law(x0, x1, t):
    """Chi-square over x_t and its edits together; two different sequences alternate in the batch."""
    n, cubic = 4000, parse_schedule("cubic")
    x0, x1, other = tuple(map(int, x0)), tuple(map(int, x1)), ((BOS,), (1,), (2, 3))
    draws = [(PROMPT, x0, x1), other] * n
    prompts, starts, ends = ([list(s) for s in z] for z in zip(*draws))
    got = path(prompts, starts, ends, torch.full((2 * n,), t), cubic, seeded(5))
    counts = Counter(zip(map(tuple, got.x.unpack()), map(canonical, edits_of(got))))
    law = {}
    for case in ((PROMPT, x0, x1), other):
        for (text, edits), p in outcomes(*case, t**3).items():
            law[text, canonical(edits)] = law.get((text, canonical(edits)), 0) + p / 2
    assert counts.keys() <= law.keys()
    assert chi_square(counts, law) > 1e-3


def test_path_is_repeatable_and_refuses_an_empty_prompt():
    case = ([[BOS]] * 50, [[MASK] * 4] * 50, [[1, 2, 3]] * 50, torch.full((50,), 0.5), parse_schedule("linear"))
    assert path(*case, seeded(3)).x.unpack() == path(*case, seeded(3)).x.unpack() != path(*case, seeded(4)).x.unpack()
    with pytest.raises(ValueError, match="prompt"):
        path([[BOS], []], [[], []], [[1], [2]], torch.zeros(2), parse_schedule("linear"), seeded(0))


def test_times_are_stratified_and_stay_below_1():
    for seed in range(5):
        t = stratified(64, 0, 1 - editflow.EPSILON, seeded(seed)) / (1 - editflow.EPSILON)
        assert t.min() >= 0
        assert t.max() * (1 - editflow.EPSILON) < 1 - editflow.EPSILON / 2
        assert (t * 64).long().sort().values.tolist() == list(range(64))
    first = torch.stack([stratified(16, 0, 1, seeded(s))[0] for s in range(400)])  # any place in the batch gets any t
    assert abs(first.mean() - 0.5) < 4 / math.sqrt(12 * 400)


# ---------------------------------------------------------------------------------------------------- loss


class Tiny(nn.Module):
    """A small model with the interface of editflow.Model: each token sees the mean of its own sequence, and t."""

    def __init__(self, seed=0, vocab=V, rate_bias=0.0):
        super().__init__()
        torch.manual_seed(seed)
        D = 12
        self.schedule = "linear"
        self.embed, self.mix = nn.Embedding(vocab, D), nn.Linear(D, D)
        self.rate_heads = nn.Sequential(nn.Linear(D, 3), nn.Softplus())
        self.sub_logits, self.ins_logits = nn.Linear(D, vocab), nn.Linear(D, vocab, bias=False)
        nn.init.constant_(self.rate_heads[0].bias, rate_bias)

    def forward(self, x, t):
        h = self.embed(x.ids)
        mean = torch.zeros(len(x), h.shape[1], dtype=h.dtype).index_add_(0, x.batch, h) / x.lengths[:, None].clamp(
            min=1
        )
        place = torch.sin(x.positions[:, None] * torch.arange(1.0, h.shape[1] + 1))
        return torch.tanh(h + self.mix(mean)[x.batch] + place + t[x.batch][:, None])


def plain_loss(model, batch, w, lengths=None):
    """The header's formula in float64, token by token, from full tables of rates and log-probabilities."""
    hidden = model(batch.x, batch.t).double()
    rate = F.softplus(F.linear(hidden, *(p.double() for p in model.rate_heads[0].parameters())))
    log_q = {}
    for kind, head in (("sub", model.sub_logits), ("ins", model.ins_logits)):
        log_q[kind] = F.linear(hidden, *(p.double() for p in head.parameters())).log_softmax(-1)
    column = {"sub": 0, "del": 1, "ins": 2}
    total, start = 0.0, 0
    for b, (text, edits) in enumerate(zip(batch.x.unpack(), edits_of(batch))):
        prompt = int(batch.prompt_len[b])
        value = rate[start + prompt - 1, 2]
        for i in range(prompt, len(text)):
            value = value + rate[start + i].sum()
        for kind, row, token in edits:
            value = value - rate[start + row, column[kind]].log()
            if token is not None:
                value = value - log_q[kind][start + row, token]
        total = total + w(float(batch.t[b])) * value / (max(1, lengths[b]) if lengths else 1)
        start += len(text)
    return total / len(batch.x)


def draw_batch(batch, seed=0, name="linear", **options):
    prompts, x0, x1, t = (list(z) for z in zip(*batch))
    return path(prompts, x0, x1, torch.tensor(t), parse_schedule(name), seeded(seed), **options)


MIXED = [
    ([BOS, 3], [], [1, 2, 3, 4, 1], 0.0),  # five insertions share one row
    ([BOS], [], [1, 2, 3, 4, 1], 0.5),
    ([2, 1], [MASK] * 3, [1, 2], 0.3),
    ([2, 1, 1], [1, 2, 3], [], 0.6),  # empty response
    ([BOS], [], [], 0.1),
    ([BOS, 1], [1, 2, 1, 4], [4, 1, 2, 2], 0.8),
    ([4], [1, 2, 3], [3, 2], 0.99),  # w is clipped
]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("name", "max_w"), [("linear", 20.0), ("cubic", 2.0)])
def test_loss_equals_the_plain_version_in_value_and_gradient(normalize, name, max_w):
    formula = {"linear": lambda t: 1 / (1 - t), "cubic": lambda t: 3 * t**2 / (1 - t**3)}[name]
    seen = set()
    for seed in range(6):
        batch, model = draw_batch(MIXED, seed, name, normalize=normalize, max_w=max_w), Tiny(seed)
        seen |= {kind for edits in edits_of(batch) for kind, _, _ in edits}
        got, parts = editflow.loss(model, batch)
        lengths = [len(x1) for _, _, x1, _ in MIXED] if normalize else None
        expected = plain_loss(model, batch, lambda t: min(max_w, formula(t)), lengths)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts["loss"], got.detach())
        torch.testing.assert_close(sum(v for k, v in parts.items() if k != "loss"), got.detach())
        assert not any(v.requires_grad for v in parts.values())
        names = [n for n, _ in model.named_parameters()]
        ours = torch.autograd.grad(got, model.parameters())
        theirs = torch.autograd.grad(expected, model.parameters())
        for n, a, b in zip(names, ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")
    assert seen == {"sub", "del", "ins"}


@few
@given(st.lists(st.tuples(PROMPTS, TEXT, TEXT, st.floats(0, 0.999)), min_size=1, max_size=4), st.integers(0, 99))
def test_loss_equals_the_plain_version_on_anything(batch, seed):
    lengths = [len(x1) for _, _, x1, _ in batch]
    batch, model = draw_batch(batch, seed), Tiny(seed)
    got, _ = editflow.loss(model, batch)
    expected = plain_loss(model, batch, lambda t: min(20.0, 1 / (1 - t)), lengths)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [-1e30, -1e4, -60.0, 60.0, 1e4, 1e30])
def test_extreme_rate_logits_give_finite_losses_and_gradients(bias):
    model = Tiny(rate_bias=bias)
    value, _ = editflow.loss(model, draw_batch(MIXED))
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    # from either end the rates are pulled back: up where edits remain, down where rates are huge
    pull = model.rate_heads[0].bias.grad
    assert (pull * math.copysign(1, bias) > 0).all()


def test_log_softplus_is_its_name_and_never_loses_its_gradient():
    raw = torch.tensor([-200.0, -50.0, -16.0, -14.0, -3.0, 0.0, 5.0, 90.0], requires_grad=True)
    value = editflow.log_softplus(raw)
    exact = [math.log(math.log1p(math.exp(r))) if r > -30 else r for r in raw.tolist()]
    torch.testing.assert_close(value, torch.tensor(exact), rtol=1e-5, atol=1e-6)
    slope = [(1 / (1 + math.exp(-r))) / math.log1p(math.exp(r)) if r > -30 else 1.0 for r in raw.tolist()]
    torch.testing.assert_close(torch.autograd.grad(value.sum(), raw)[0], torch.tensor(slope), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- the true rates

LOW = -80.0  # a logit for "never"
WIDTH, LONGEST = 3 + 2 * V, 8


class Tabular(nn.Module):
    """One free row per text and token: three rate logits, V substitution logits, V insertion logits.

    The heads only pick their columns. `table` [S, LONGEST, WIDTH]; a text that has no entry gets rates of zero.
    """

    def __init__(self, texts, table, name="linear", table_at=None):
        super().__init__()
        self.schedule, self.depends_on_t = name, table_at is not None
        self.keys = torch.tensor([self.key(Ragged.pack([text]))[0] for text in texts])
        self.table, self.table_at, self.calls = nn.Parameter(table), table_at, []
        self.rate_heads = nn.Sequential(self.pick(0, 3), nn.Softplus())
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

    def forward(self, x, t=None):
        if self.table_at:
            self.calls.append(float(t[0]))
            self.table.data = self.table_at(float(t[0]))
        known = self.keys == self.key(x)[:, None]  # [B, S]
        state = torch.where(known.any(1), known.long().argmax(1), len(self.table) - 1)[x.batch]
        return self.table[state, x.positions.clamp_max(LONGEST - 1)]


def table_of(texts, rates):
    """Logits [S + 1, LONGEST, WIDTH] whose rates and distributions are these expected counts; the last row is LOW."""
    table = torch.full((len(texts) + 1, LONGEST, WIDTH), LOW, dtype=torch.float64)
    for s, text in enumerate(texts):
        total = Counter()
        for (kind, row, token), count in rates.get(text, {}).items():
            total[kind, row] += count
            if token is not None:
                table[s, row, token + {"sub": 3, "ins": 3 + V}[kind]] = math.log(count)
        for (kind, row), count in total.items():
            table[s, row, ("sub", "del", "ins").index(kind)] = count + math.log(-math.expm1(-count))  # softplus^-1
    return table.float()


def every_path(x0, data):
    """Every (x1, flips), as often as its probability at kappa = 1/2 says: a batch whose loss is the expectation.

    data: {x1: how many sixteenths}. Rows are [(text, edits, len(x1))].
    """
    aligned = {x1: columns(x0, x1) for x1 in data}
    most = max(map(len, aligned.values()))
    rows = []
    for x1, n in data.items():
        copies = n * 2 ** (most - len(aligned[x1]))
        for flips in itertools.product((0, 1), repeat=len(aligned[x1])):
            rows += [(*half_way(PROMPT, aligned[x1], flips), len(x1))] * copies
    return rows


def as_batch(rows, t, w, normalize=False):
    x = Ragged.pack([text for text, _, _ in rows])
    start = x.cu_seqlens.tolist()
    flat = [(kind, start[b] + row, token) for b, (_, edits, _) in enumerate(rows) for kind, row, token in edits]
    pick = {k: [e for e in flat if e[0] == k] for k in ("ins", "sub", "del")}
    column = lambda kind, i: torch.tensor([e[i] for e in pick[kind]], dtype=torch.int64)  # noqa: E731
    return PathBatch(
        x=x,
        t=torch.full((len(rows),), t),
        w=torch.full((len(rows),), w),
        norm=torch.tensor([float(max(1, n)) if normalize else 1.0 for _, _, n in rows]),
        prompt_len=torch.full((len(rows),), len(PROMPT)),
        ins_row=column("ins", 1),
        ins_token=column("ins", 2),
        sub_row=column("sub", 1),
        sub_token=column("sub", 2),
        del_row=column("del", 1),
    )


SIXTEENTHS = {x1: round(16 * p) for x1, p in DATA.items()}
HALF = {"linear": 0.5, "cubic": 0.5 ** (1 / 3)}  # the time at which kappa is 1/2


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["linear", "cubic"])
def test_the_true_posterior_rates_minimise_the_loss(start, name):
    x0, t = STARTS[start], HALF[name]
    w = {"linear": 2.0, "cubic": 3 * t**2 / 0.5}[name]
    states = posterior(x0, 0.5)
    rates = {x: counts for x, (_, counts) in states.items()}
    batch = as_batch(every_path(x0, SIXTEENTHS), t, w)
    truth = table_of(list(states), rates)
    model = Tabular(list(states), truth)

    def expected_loss():
        return editflow.loss(model, batch)[0]

    best = expected_loss()
    (gradient,) = torch.autograd.grad(best, model.table)
    assert gradient.abs().max() < 1e-5

    # w E[ sum lambda - lambda log lambda + lambda H(Q) ],  with lambda * Q(token) = count and lambda = sum of counts
    minimum = 0.0
    for mass, counts in states.values():
        total = Counter()
        for (kind, row, _), count in counts.items():
            total[kind, row] += count
        minimum += mass * sum(lam - lam * math.log(lam) for lam in total.values())
        minimum -= mass * sum(c * math.log(c / total[e[:2]]) for e, c in counts.items())
    assert math.isclose(best.item(), w * minimum, rel_tol=1e-4)

    noise = seeded(1)
    for size in (0.1, 0.3, 1.0, 3.0):
        for _ in range(4):
            model.table.data = truth + size * torch.randn(truth.shape, generator=noise)
            assert expected_loss() > best + 1e-4 * size

    # other plausible rates are not stationary: those of another time, those of the most likely target alone
    for wrong in (posterior(x0, 0.8), posterior(x0, 0.5, {(1, 2): 1.0})):
        model.table.data = table_of(list(states), {x: counts for x, (_, counts) in wrong.items()})
        assert expected_loss() > best + 1e-3


def test_dividing_by_the_length_weighs_targets_by_its_inverse():
    """normalize=True learns the rates of the law p(x1) / |x1|, rescaled: short targets count for more."""
    x0 = STARTS["masks"]
    batch = as_batch(every_path(x0, SIXTEENTHS), 0.5, 2.0, normalize=True)
    tilted = {x1: p / max(1, len(x1)) for x1, p in DATA.items()}
    texts = list(posterior(x0, 0.5))
    for data, stationary in ((tilted, True), (DATA, False)):
        model = Tabular(texts, table_of(texts, {x: c for x, (_, c) in posterior(x0, 0.5, data).items()}))
        value, _ = editflow.loss(model, batch)
        (gradient,) = torch.autograd.grad(value, model.table)
        assert (gradient.abs().max() < 1e-5) == stationary


def test_training_a_table_finds_the_true_rates():
    x0 = STARTS["draft"]
    states = posterior(x0, 0.5)
    batch = as_batch(every_path(x0, SIXTEENTHS), 0.5, 2.0)
    truth = table_of(list(states), {x: counts for x, (_, counts) in states.items()})
    model = Tabular(list(states), torch.zeros_like(truth))
    optimizer = torch.optim.Adam([model.table], lr=0.3)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 150)
        optimizer.zero_grad()
        editflow.loss(model, batch)[0].backward()
        optimizer.step()
    for s, text in enumerate(states):
        learned, true = (F.softplus(z[s, len(PROMPT) : len(text), :3]) for z in (model.table.detach(), truth))
        torch.testing.assert_close(learned, true, atol=0.02, rtol=0)


# ---------------------------------------------------------------------------------------------------- sampling


def true_model(start, name):
    """The time-conditioned model that knows the posterior of DATA."""
    texts = list(posterior(STARTS[start], 0.5))
    table_at = functools.cache(lambda t: table_of(texts, rates_at(start, name, t)))
    return Tabular(texts, table_at(0.0), name, table_at)


def draw_texts(start, name, steps, n):
    sampled = sample(true_model(start, name), [list(PROMPT)] * n, x0=[list(STARTS[start])] * n, steps=steps)
    return Counter(tuple(s.response) for s in sampled)


def against_data(counts):
    """(share of texts that are no x1 at all, p-value of the others): two edits that exclude each other may fire in the
    same step, with a probability of order tau."""
    possible = {x1: counts[x1] for x1 in DATA}
    return 1 - sum(possible.values()) / sum(counts.values()), chi_square(possible, DATA)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["linear", "cubic"])
def test_few_steps_have_exactly_the_law_of_tau_leaping(start, name):
    """Far from the data, and just as far as the enumerated chain says."""
    for steps in (1, 2, 5):
        counts = draw_texts(start, name, steps, 4000)
        law = run_chain(start, name, steps)
        assert counts.keys() <= {x for x, p in law.items() if p > 0}
        assert chi_square(counts, law) > 1e-3
        outside, p = against_data(counts)
        assert outside > 0.05
        assert p < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["linear", "cubic"])
def test_the_true_rates_sample_the_data_as_tau_goes_to_0(start, name):
    outside, p = against_data(draw_texts(start, name, 200, 3000))
    assert outside < 0.02
    assert p > 1e-3


@functools.cache
def real_model(time_conditioned=False, rates=0.0):
    """A random transformer. In float64, so that rounding, which may depend on the batch, never decides an edit."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = models.backbone(models.DecoderConfig("llama", V, **sizes))
    model = editflow.Model(backbone, 16, V, stored={"time_conditioned": time_conditioned})
    model.schedule = "linear"
    models.init_weights(model, seeded(1))
    model.init_heads(seeded(1))
    nn.init.normal_(model.rate_heads[0].weight, generator=seeded(2))
    nn.init.constant_(model.rate_heads[0].bias, rates)
    return model.eval() if time_conditioned else model.double().eval()


class Steps(list):
    """on_step, remembering."""

    def __call__(self, t, x, op, sub_token, ins_token, label):
        self.append(SimpleNamespace(t=t, x=x, op=op, sub_token=sub_token, ins_token=ins_token, label=label))


CASES = st.lists(st.tuples(PROMPTS, TEXT, st.integers(0, 2**40)), min_size=1, max_size=5, unique_by=lambda c: c[2])


@few
@given(CASES, st.randoms(), st.sampled_from([{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 3, "top_p": 0.8}]))
def test_a_text_does_not_depend_on_its_batch(cases, random, options):
    def texts(cases):
        prompts, x0, seeds = (list(z) for z in zip(*cases))
        return [
            (tuple(s.response), s.details | {"left_over": round(s.details["left_over"], 4)})
            for s in sample(real_model(), prompts, x0=x0, seeds=seeds, steps=6, **options)
        ]

    together = texts(cases)
    shuffled = random.sample(range(len(cases)), len(cases))
    assert texts([cases[i] for i in shuffled]) == [together[i] for i in shuffled]
    i = shuffled[0]
    assert texts([cases[i]]) == [together[i]]


@few
@given(CASES, st.integers(1, 8))
def test_the_edits_shown_to_on_step_are_the_ones_made(cases, steps):
    prompts, x0, seeds = (list(z) for z in zip(*cases))
    seen = Steps()
    sampled = sample(real_model(), prompts, x0=x0, seeds=seeds, steps=steps, on_step=seen)
    assert [s.t for s in seen] == [k / steps for k in range(steps)]
    assert all(s.label == "" for s in seen)
    x, made = Ragged.pack([p + s for p, s in zip(prompts, x0)]), torch.zeros(len(cases), 3, dtype=torch.int64)
    for s in seen:
        assert s.x.unpack() == x.unpack()
        kinds = torch.stack([s.op == SUB, s.op == DEL, s.ins_token != GAP], dim=1).long()
        made.index_add_(0, x.batch, kinds)
        prompt_len = torch.tensor([len(p) for p in prompts])[x.batch]
        assert (s.op[x.positions < prompt_len] == KEEP).all()
        assert (s.ins_token[x.positions < prompt_len - 1] == GAP).all()
        assert ((s.sub_token != GAP) == (s.op == SUB)).all()
        x = apply_edits(x, s.op, s.sub_token, s.ins_token)
    assert x.unpack() == [p + s.response for p, s in zip(prompts, sampled)]
    assert made.tolist() == [[s.details[k] for k in ("substitutions", "deletions", "insertions")] for s in sampled]


def sample_ten(model, **options):
    prompts = [[BOS, 1 + k % 4] for k in range(10)]
    return sample(model, prompts, x0=[[MASK] * (k % 4) for k in range(10)], **options)


def test_seeds_decide():
    a, b, c = (sample_ten(real_model(), steps=10, seeds=range(s, s + 10)) for s in (0, 0, 50))
    assert a == b != c
    assert a == sample_ten(real_model(), steps=10)  # the default seeds are 0, 1, 2, ...


def test_top_k_1_and_temperature_0_take_the_most_likely_token():
    greedy = sample_ten(real_model(), steps=10, temperature=0)
    assert greedy == sample_ten(real_model(), steps=10, top_k=1) == sample_ten(real_model(), steps=10, top_p=1e-9)
    assert greedy != sample_ten(real_model(), steps=10)
    seen, model = Steps(), real_model()
    sample_ten(model, steps=10, temperature=0, on_step=seen)
    checked = 0
    for s in seen:
        hidden = model(s.x, torch.full((10,), s.t))
        for token, head in ((s.sub_token, model.sub_logits), (s.ins_token, model.ins_logits)):
            rows = token != GAP
            assert token[rows].tolist() == head(hidden[rows]).argmax(-1).tolist()
            checked += rows.sum().item()
    assert checked > 20


@pytest.mark.parametrize("rates", [-2.0, -5.0, -9.0])
def test_only_texts_that_have_changed_are_read_again(rates, monkeypatch):
    model, read, seen = real_model(rates=rates), [], Steps()
    read_again = lambda x, t: read.append(x.unpack()) or editflow.Model.forward(model, x, t)  # noqa: E731
    monkeypatch.setattr(model, "forward", read_again)
    prompts, x0 = [[BOS, 2], [BOS], [BOS, 3]], [[1, 2, 3], [], [4] * 6]
    sampled = sample(model, prompts, x0=x0, steps=20, on_step=seen)
    after = [s.x.unpack() for s in seen[1:]] + [[p + s.response for p, s in zip(prompts, sampled)]]
    expected, partial = [[p + s for p, s in zip(prompts, x0)]], 0
    for s, texts in zip(seen, after):
        edited = s.x.batch[(s.op != KEEP) | (s.ins_token != GAP)].unique().tolist()
        expected += [[texts[b] for b in edited]] if edited else []
        partial += 0 < len(edited) < 3
    assert read == expected
    assert partial or rates == -9.0


@pytest.mark.parametrize("rates", [-1.0, -9.0])
def test_a_time_conditioned_model_reads_every_text_at_every_t(rates, monkeypatch):
    model, times = real_model(time_conditioned=True, rates=rates), []

    def forward(x, t):
        assert (len(x), t.shape) == (2, (2,))
        times.append(t.unique().item())
        return editflow.Model.forward(model, x, t)

    monkeypatch.setattr(model, "forward", forward)
    sample(model, [[BOS], [BOS, 2]], x0=[[], [1]], steps=8)
    assert times == [k / 8 for k in range(9)]  # the last for what is left over


class Scripted(nn.Module):
    """The same rates for every token, and always the same two tokens."""

    def __init__(self, sub=0.0, delete=0.0, ins=0.0):
        super().__init__()
        self.schedule = "cubic"
        self.rates = nn.Parameter(torch.tensor([sub, delete, ins]))
        self.rate_heads = lambda hidden: self.rates.expand(len(hidden), 3)
        self.sub_logits = lambda hidden: 50 * F.one_hot(torch.full((len(hidden),), 3), V).float()
        self.ins_logits = lambda hidden: 50 * F.one_hot(torch.full((len(hidden),), 4), V).float()

    def forward(self, x, t):
        return torch.zeros(len(x.ids), 1)


def responses(model, x0, **options):
    return [s.response for s in sample(model, [[BOS, 1]] * len(x0), x0=x0, **options)]


def test_the_last_step_makes_every_expected_edit():
    x0 = [[], [1], [1, 2, 1]] * 20
    assert responses(Scripted(ins=1.0), x0, steps=1) == [[4], [4, 1, 4], [4, 1, 4, 2, 4, 1, 4]] * 20
    assert responses(Scripted(sub=1.0), x0, steps=1) == [[], [3], [3, 3, 3]] * 20
    assert responses(Scripted(delete=1.0), x0, steps=1) == [[]] * 60
    assert responses(Scripted(delete=1.0, ins=1.0), x0, steps=1) == [[4], [4] * 2, [4] * 4] * 20
    assert responses(Scripted(sub=1.0), x0, steps=7) == [[], [3], [3, 3, 3]] * 20  # whatever fired before
    either = Counter(
        token for r in responses(Scripted(sub=0.75, delete=0.25), [[1] * 100] * 20, steps=1) for token in r
    )
    assert set(either) == {3}  # nothing stays as it was
    assert abs(either[3] - 1500) < 4 * math.sqrt(2000 * 0.75 * 0.25)


def test_edits_fire_with_the_schedules_probability():
    n = 4000
    seen = Steps()
    sample(Scripted(sub=0.5, delete=0.3, ins=0.6), [[BOS, 1]], x0=[[1] * n], steps=4, on_step=seen)
    for s in seen[:3]:
        a, b = s.t**3, (s.t + 0.25) ** 3
        q, size = (b - a) / (1 - a), len(s.x.ids) - 2
        for fired, rate in ((s.op == SUB, 0.5), (s.op == DEL, 0.3), (s.ins_token != GAP, 0.6)):
            assert abs(fired.sum().item() - size * q * rate) < 4 * math.sqrt(size * q * rate) + 1
        both = ((s.op != KEEP) & (s.ins_token != GAP)).sum().item()  # independent of each other
        assert abs(both - size * q * q * 0.48) < 4 * math.sqrt(size * q * q * 0.48) + 1


def test_left_over_insertions_are_counted():
    for x0, seed in itertools.product(([], [1, 2, 3]), range(3)):
        (one,) = sample(Scripted(ins=2.5), [[BOS, 1, 1]], x0=[x0], steps=2, seeds=[seed])
        assert math.isclose(one.details["left_over"], 2.5 * (len(one.response) + 1), rel_tol=1e-6)
    done, unfinished = (sample(true_model("empty", "linear"), [list(PROMPT)], x0=[[]], steps=s)[0] for s in (100, 1))
    assert done.details["left_over"] < 0.01
    expected = rates_at("empty", "linear", 1.0)[PROMPT + tuple(unfinished.response)]
    total = sum(c for (kind, _, _), c in expected.items() if kind == "ins")
    assert math.isclose(unfinished.details["left_over"], total, abs_tol=1e-4)
    nothing = {"substitutions": 0, "deletions": 0, "insertions": 0, "left_over": 0.0}
    (one,) = sample(Scripted(), [[BOS]], x0=[[1]], steps=3)
    assert (one.response, one.tokens, one.passes, one.details, one.note) == ([1], [1], {"steps": 3}, nothing, "")


def test_sample_refuses_what_it_cannot_run():
    model = Scripted()
    with pytest.raises(ValueError, match="prompt"):
        sample(model, [[BOS], []], x0=[[], []], steps=1)
    for lengths in ({"x0": [[]]}, {"x0": [[], [], []]}, {"x0": [[], []], "seeds": [1]}):
        with pytest.raises(ValueError, match=r"zip\(\) argument"):
            sample(model, [[BOS], [BOS]], steps=1, **lengths)
    assert sample(model, [], x0=[], steps=2) == []


# ---------------------------------------------------------------------------------------------------- one token


def kept(p, top_k, top_p):
    """The tokens that may be drawn, with their probabilities, by sorting a list."""
    order = sorted(range(len(p)), key=lambda v: -p[v])
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        order = [v for i, v in enumerate(order) if sum(p[u] for u in order[:i]) < top_p]
    total = sum(p[v] for v in order)
    return {v: p[v] / total for v in order}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.75), (0.7, 4, 0.9), (1.0, 99, 1.0)],
)
def test_tokens_are_drawn_from_softmax_top_k_and_top_p(temperature, top_k, top_p):
    n, logits = 10_000, torch.tensor([0.3, -1.0, 2.0, 1.1, -0.4, 1.6, -3.0, 0.0])
    z = [math.exp(v / temperature) for v in logits.tolist()]
    law = kept([v / sum(z) for v in z], top_k, top_p)
    u = (torch.arange(n) + torch.rand(n, generator=seeded(3))) / n
    counts = Counter(editflow.draw_token(logits.expand(n, V), u, temperature, top_k, top_p).tolist())
    assert counts.keys() <= law.keys()
    for v, p in law.items():
        assert abs(counts[v] / n - p) < 2 / n  # u is stratified: frequencies are exact up to the two ends


@few
@given(st.lists(st.lists(st.floats(-20, 20), min_size=5, max_size=5), min_size=1, max_size=4), st.floats(0.01, 0.99))
def test_each_row_is_drawn_from_its_own_distribution(rows, u):
    logits = torch.tensor(rows)
    for options in ((1.0,), (0.5, 2), (1.0, 0, 0.6), (0,)):
        together = editflow.draw_token(logits, torch.full((len(rows),), u), *options)
        alone = [editflow.draw_token(logits[i : i + 1], torch.tensor([u]), *options).item() for i in range(len(rows))]
        assert together.tolist() == alone


def test_impossible_tokens_are_never_drawn_at_the_ends_of_u():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0, -math.inf]]).expand(4, 5)
    u = torch.tensor([1e-300, 0.5, 1 - 2.0**-53, 0.9], dtype=torch.float64)
    for top_k, top_p in itertools.product((0, 2, 4), (1.0, 0.999)):
        assert set(editflow.draw_token(logits, u, 1.0, top_k, top_p).tolist()) == {1, 3}


@few
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(1, 9))
def test_insertions_stop_where_the_positions_end(rows, limit):
    x = Ragged.pack([[1] * len(row) for row in rows])
    kept = editflow.within(torch.tensor([b for row in rows for b in row]), x, limit).tolist()
    for row in rows:
        here, kept = kept[: len(row)], kept[len(row) :]
        room, expected = limit - len(row), []
        for wanted in row:  # the first ones, as long as there is room
            expected.append(wanted and room > 0)
            room -= wanted
        assert here == expected


def test_a_text_never_outgrows_the_model():
    sampled = sample(Scripted(ins=3.0), [[BOS, 1], [BOS]], x0=[[], [1] * 4], steps=30, max_length=12)
    assert [len(s.response) for s in sampled] == [10, 11]


# ---------------------------------------------------------------------------------------------------- time


def test_time_conditioning_starts_as_a_no_op_and_then_works_per_sequence():
    model = real_model.__wrapped__(time_conditioned=True)
    x = Ragged.pack([[BOS, 1, 2, 3, 4], [BOS, 4, 3, 2, 1, 1, 2]])
    assert torch.equal(model(x, torch.tensor([0.1, 0.9])), model.model(x))
    (model(x, torch.tensor([0.1, 0.9])).sum()).backward()
    assert model.time_embed[2].weight.grad.abs().max() > 0, "and yet it can learn"
    nn.init.normal_(model.time_embed[2].weight, generator=seeded(0))
    a, b = model(x, torch.tensor([0.1, 0.9])), model(x, torch.tensor([0.1, 0.3]))
    assert torch.equal(a[:5], b[:5])
    assert (a[5:] - b[5:]).abs().min(1).values.max() > 1e-4


def test_time_features_tell_close_times_apart():
    f = editflow.time_features(torch.linspace(0, 1, 1001))
    assert f.shape == (1001, editflow.TIME_FEATURES)
    assert f.dtype == torch.float32
    assert (f[1:] - f[:-1]).norm(dim=1).min() > 0.5


class Fixed(nn.Module):
    """The same rates everywhere and at all times, and no opinion on tokens."""

    has_clock = False

    def __init__(self, sub: float, delete: float, ins: float):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([sub, delete, ins]))
        self.sub_logits = self.ins_logits = lambda hidden: torch.zeros(len(hidden), V)

    def forward(self, x):
        return torch.zeros(len(x.ids), 1)

    def at(self, h, s):
        return h

    def log_rates(self, h, s):
        return self.rates.log().expand(len(h), 3)


def test_a_token_and_the_one_inserted_behind_it_are_drawn_independently():
    n = 4000
    schedule = editflow.parse_schedule("linear")
    (text,) = editflow.sample(Fixed(1.0, 0.0, 1.0), [[BOS]], [[1] * n], schedule=schedule, steps=1)
    pairs = list(zip(text.response[1::2], text.response[2::2]))  # the first was inserted behind the prompt
    assert len(pairs) == n
    equal = sum(a == b for a, b in pairs)
    assert abs(equal - n / V) < 4 * math.sqrt(n / V)


def test_only_insertions_are_left_over():
    schedule = editflow.parse_schedule("linear")
    (text,) = editflow.sample(Fixed(0.5, 0.25, 2.5), [[BOS, 1]], [[1, 2, 3]], schedule=schedule, steps=2)
    assert text.details["left_over"] == pytest.approx(2.5 * (len(text.response) + 1))


def test_the_rate_of_a_remaining_edit_grows_with_its_flipped_neighbours_and_weighs_its_loss():
    x1, t, schedule = [1, 2, 3, 4] * 10, torch.tensor([0.5]), editflow.parse_schedule("linear")
    batch = editflow.path([[BOS]], [[]], [list(range(100, 140))], t, schedule, seeded(0), propagation=1.0)
    there = set(batch.x.ids.tolist())
    remaining = [token for token in range(100, 140) if token not in there]
    rates = [2.0 + len({token - 1, token + 1} & there) for token in remaining]  # w(0.5) = 2
    assert set(rates) == {2.0, 3.0, 4.0}
    assert batch.token.tolist() == remaining
    assert batch.rate.tolist() == pytest.approx(rates)

    batch = editflow.path([[BOS]], [[MASK] * 20], [x1], t, schedule, seeded(0))
    heavier = dataclasses.replace(batch, rate=3 * batch.rate)
    (_, once), (_, thrice) = (editflow.loss(real_model(), b) for b in (batch, heavier))
    for name in ("loss_sub", "loss_ins"):
        assert thrice[name].item() == pytest.approx(3 * once[name].item()) != 0
