"""What editflow.py promises of its schedules, sources, paths, loss and sampler, held to the oracle of chains.py."""

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from chains import (
    BOS,
    CORRECTED,
    DATA,
    KAPPA,
    MASK,
    PROMPT,
    PROMPTS,
    STARTS,
    SUFFIX,
    TEXT,
    Steps,
    Tabular,
    V,
    as_batch,
    chi_square,
    distance,
    draw_texts,
    every_path,
    frozen_states,
    knowing,
    outcomes,
    posterior,
    random_alignments,
    real_model,
    run_chain,
    sample,
    seeded,
    table_of,
    true_rates,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import editflow
from editflow import parse_schedule, parse_source, path
from ragged import ANCHOR, DEL, FREE, GAP, KEEP, SUB, Ragged, apply_edits, stratified

quick = settings(deadline=None, max_examples=60)
few = settings(deadline=None, max_examples=20)


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
    where, position = x.batch.tolist(), x.positions.tolist()
    for row, kind, token in zip(batch.row.tolist(), batch.kind.tolist(), batch.token.tolist()):
        edits[where[row]].append((("sub", "del", "ins")[kind], position[row], None if token == GAP else token))
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


SEQUENCE = st.tuples(PROMPTS, TEXT, TEXT, st.sampled_from([0.0, 1.0]) | st.floats(0, 1), SUFFIX)


@settings(deadline=None, max_examples=200)
@given(st.lists(SEQUENCE, min_size=1, max_size=4), st.integers(0, 2**40))
def test_path_draws_an_enumerated_state_whose_remaining_edits_give_x1(batch, seed):
    prompts, x0, x1, t, suffixes = (list(z) for z in zip(*batch))
    times, linear = torch.tensor(t, dtype=torch.float64), parse_schedule("linear")
    got = path(prompts, x0, x1, times, linear, seeded(seed), suffixes=suffixes, normalize="length")
    assert got.norm.tolist() == [max(1, len(s)) for s in x1]
    torch.testing.assert_close(got.s, 1 - torch.tensor(t, dtype=torch.float32))
    torch.testing.assert_close(got.w, linear.weight(times).float())
    torch.testing.assert_close(got.rate, got.w[got.x.batch[got.row]])
    for b, (text, edits) in enumerate(zip(got.x.unpack(), edits_of(got))):
        law = outcomes(prompts[b], x0[b], x1[b], t[b], suffixes[b])
        assert (tuple(text), canonical(edits)) in {(x, canonical(e)) for (x, e), p in law.items() if p > 0}
        assert apply_all(text, edits) == prompts[b] + x1[b] + suffixes[b]
        assert got.edits[b] == distance(tuple(x0[b]), tuple(x1[b]))
        length = len(text) - len(prompts[b]) - len(suffixes[b])
        frozen = frozen_states(prompts[b], length, suffixes[b])
        assert got.x.frozen[got.x.batch == b].tolist() == frozen
        assert all(frozen[row] == FREE or (frozen[row] == ANCHOR and kind == "ins") for kind, row, _ in edits)
        if t[b] in (0, 1):
            assert text == prompts[b] + (x1 if t[b] else x0)[b] + suffixes[b]
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


@pytest.mark.parametrize(("x0", "x1"), [("1234", "12"), ("12", "3412"), ("1", "")])
def test_random_alignments_are_shuffled_and_leave_all_but_the_responses_as_they_are(x0, x1):
    n, x0, x1 = 3000, tuple(map(int, x0)), tuple(map(int, x1))
    texts = ([PROMPT, side, (3,)] * n for side in (x0, x1))
    z0, z1, columns = editflow.random_columns(*texts, 0.5, seeded(1))
    z0, z1 = (z.split(columns.tolist()) for z in (z0, z1))
    pairs = [
        tuple(tuple(None if v == GAP else v for v in p) for p in zip(a.tolist(), b.tolist())) for a, b in zip(z0, z1)
    ]
    assert set(pairs[0::3]) == {tuple(zip(PROMPT, PROMPT))}
    assert set(pairs[2::3]) == {((3, 3),)}
    law = random_alignments(x0, x1)
    assert set(pairs[1::3]) <= law.keys()
    assert chi_square(Counter(pairs[1::3]), law) > 1e-3


# ---------------------------------------------------------------------------------------------------- loss


class Tiny(nn.Module):
    """A small backbone: each token sees the mean of its own sequence."""

    def __init__(self, D):
        super().__init__()
        self.embed, self.mix = nn.Embedding(V, D), nn.Linear(D, D)

    def forward(self, x):
        h = self.embed(x.ids)
        mean = torch.zeros(len(x), h.shape[1], dtype=h.dtype).index_add_(0, x.batch, h) / x.lengths[:, None].clamp(
            min=1
        )
        place = torch.sin(x.positions[:, None] * torch.arange(1.0, h.shape[1] + 1))
        return torch.tanh(h + self.mix(mean)[x.batch] + place)


def tiny_model(seed=0, clock=False, rate_bias=0.0):
    """editflow.Model with random weights everywhere."""
    torch.manual_seed(seed)
    model = editflow.Model(Tiny(12), 12, V, bias=True, stored={"clock": clock})
    nn.init.constant_(model.rate_heads[0].bias, rate_bias)
    if clock:
        nn.init.normal_(model.clock.weight, std=0.3)
    return model


def plain_heads(model, h, s):
    """What the heads say of one text, in float64: rates [T, 3], log-probabilities [T, V] of what is substituted and
    inserted. h [T, D]; s: the survival."""
    h, p = h.double(), {name: value.double() for name, value in model.named_parameters()}
    if model.has_clock:
        scale, shift = (p["clock.weight"] @ torch.tensor([s**k for k in (0.25, 0.5, 1, 2)]).double()).chunk(2)
        h = h * (1 + scale) + shift
    linear = lambda name: h @ p[f"{name}.weight"].T + p[f"{name}.bias"]  # noqa: E731
    rate = F.softplus(linear("rate_heads.0"))
    if model.has_clock:  # the odds that something remains, times s, as a probability
        odds = linear("odds").exp() * s
        rate = rate * odds / (1 + odds)
    return rate, {"sub": linear("sub_logits").log_softmax(-1), "ins": linear("ins_logits").log_softmax(-1)}


def plain_loss(model, batch, cases, w, kappa, lengths):
    """The header's formula in float64, token by token, from full tables of rates and log-probabilities."""
    hidden, column = model(batch.x).split(batch.x.lengths.tolist()), {"sub": 0, "del": 1, "ins": 2}
    total = 0.0
    for case, h, text, edits, length in zip(cases, hidden, batch.x.unpack(), edits_of(batch), lengths):
        prompt, _, _, t, *suffix = case
        rate, log_q = plain_heads(model, h, 1 - kappa(t))
        end = len(text) - sum(map(len, suffix))
        value = rate[len(prompt) - 1, 2] + rate[len(prompt) : end].sum()
        for kind, row, token in edits:
            value = value - rate[row, column[kind]].log()
            if token is not None:
                value = value - log_q[kind][row, token]
        total = total + w(t) * value / length
    return total / len(cases)


def draw_batch(cases, seed=0, name="linear", **options):
    prompts, x0, x1, t, *suffixes = (list(z) for z in zip(*cases))
    options |= {"suffixes": suffixes[0]} if suffixes else {}
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


@pytest.mark.parametrize("clock", [False, True])
@pytest.mark.parametrize("normalize", editflow.NORMALIZERS)
@pytest.mark.parametrize(("name", "max_w"), [("linear", 20.0), ("cubic", 2.0)])
def test_loss_equals_the_plain_version_in_value_and_gradient(normalize, name, max_w, clock):
    formula = {"linear": lambda t: 1 / (1 - t), "cubic": lambda t: 3 * t**2 / (1 - t**3)}[name]
    length = [max(1, len(x1)) for _, _, x1, _ in MIXED]
    n = len(MIXED)
    norm = {"length": length, "batch": [sum(length) / n] * n, "constant": [1] * n}[normalize]
    seen = set()
    for seed in range(4):
        batch, model = draw_batch(MIXED, seed, name, normalize=normalize, max_w=max_w), tiny_model(seed, clock)
        seen |= {kind for edits in edits_of(batch) for kind, _, _ in edits}
        got, parts = editflow.loss(model, batch)
        expected = plain_loss(model, batch, MIXED, lambda t: min(max_w, formula(t)), KAPPA[name], norm)
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
@given(
    st.lists(st.tuples(PROMPTS, TEXT, TEXT, st.floats(0, 0.999), SUFFIX), min_size=1, max_size=4), st.integers(0, 99)
)
def test_loss_equals_the_plain_version_on_anything(cases, seed):
    batch, model = draw_batch(cases, seed), tiny_model(seed, clock=seed % 2 == 0)
    got, _ = editflow.loss(model, batch)
    lengths = [max(1, len(x1)) for _, _, x1, _, _ in cases]
    expected = plain_loss(model, batch, cases, lambda t: min(20.0, 1 / (1 - t)), lambda t: t, lengths)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clock", [False, True])
@pytest.mark.parametrize("bias", [-1e30, -1e4, -60.0, 60.0, 1e4, 1e30])
def test_extreme_rate_logits_give_finite_losses_and_gradients(bias, clock):
    model = tiny_model(clock=clock, rate_bias=bias)
    value, _ = editflow.loss(model, draw_batch([*MIXED, ([BOS], [1], [2, 1], 1.0)]))  # nothing remains at t = 1
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


def test_a_clock_begins_with_changing_little_and_ends_all_rates_with_the_survival():
    model, h = tiny_model(clock=True), torch.randn(5, 12, generator=seeded(0))
    model.init_heads(seeded(1))
    s = torch.tensor([1.0, 0.5, 0.1, 1e-4, 0.0])
    torch.testing.assert_close(model.at(h, s), h, rtol=0, atol=0)
    factor = (model.log_rates(h, s).exp() / F.softplus(model.rate_heads[0](h))).mean(1)
    torch.testing.assert_close(factor, 1 / (1 + math.exp(-4) / s), rtol=1e-4, atol=0)
    assert (factor[:3] > 0.8).all()
    assert factor[3] < 0.01
    assert factor[4] == 0


# ---------------------------------------------------------------------------------------------------- the true rates

HALF = {"linear": 0.5, "cubic": 0.5 ** (1 / 3)}  # the time at which kappa is 1/2


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["linear", "cubic"])
def test_the_true_posterior_rates_minimise_the_loss(start, name):
    x0, t = STARTS[start], HALF[name]
    w = {"linear": 2.0, "cubic": 3 * t**2 / 0.5}[name]
    states = posterior(start, 0.5)
    rates = {x: counts for x, (_, counts) in states.items()}
    batch = as_batch(every_path(x0, DATA, w), 0.5, w)
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
    for wrong in (posterior(start, 0.8), posterior(start, 0.5, {(1, 2): 1.0})):
        model.table.data = table_of(list(states), {x: counts for x, (_, counts) in wrong.items()})
        assert expected_loss() > best + 1e-3


def test_dividing_by_the_length_weighs_targets_by_its_inverse():
    """normalize="length" learns the rates of the law p(x1) / |x1|, rescaled: short targets count for more."""
    batch = as_batch(every_path(STARTS["masks"], DATA, 2.0), 0.5, 2.0, normalize=True)
    tilted = {x1: p / max(1, len(x1)) for x1, p in DATA.items()}
    texts = list(posterior("masks", 0.5))
    for data, stationary in ((tilted, True), (DATA, False)):
        model = Tabular(texts, table_of(texts, {x: c for x, (_, c) in posterior("masks", 0.5, data).items()}))
        value, _ = editflow.loss(model, batch)
        (gradient,) = torch.autograd.grad(value, model.table)
        assert (gradient.abs().max() < 1e-5) == stationary


def test_training_a_table_finds_the_true_rates():
    states = posterior("draft", 0.5)
    batch = as_batch(every_path(STARTS["draft"], DATA, 2.0), 0.5, 2.0)
    truth = table_of(list(states), {x: counts for x, (_, counts) in states.items()})
    model = Tabular(list(states), torch.zeros_like(truth))
    optimizer = torch.optim.Adam([model.table], lr=0.3)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 150)
        optimizer.zero_grad()
        editflow.loss(model, batch)[0].backward()
        optimizer.step()
    for i, text in enumerate(states):
        learned, true = (z[i, len(PROMPT) : len(text), :3].exp() for z in (model.table.detach(), truth))
        torch.testing.assert_close(learned, true, atol=0.02, rtol=0)


# ---------------------------------------------------------------------------------------------------- sampling


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
        law = run_chain(start, name, steps)[-1]
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


CASES = st.lists(st.tuples(PROMPTS, TEXT, st.integers(0, 2**40)), min_size=1, max_size=5, unique_by=lambda c: c[2])
OPTIONS = [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 3, "top_p": 0.8}, {"guidance": 0.7}, CORRECTED]


@few
@given(CASES, st.randoms(), st.sampled_from(OPTIONS))
def test_a_text_does_not_depend_on_its_batch(cases, random, options):
    def texts(cases):
        prompts, x0, seeds = (list(z) for z in zip(*cases))
        x0 = [[MASK] * 2 for _ in x0] if "corrector" in options else x0
        return [
            (tuple(s.response), s.details | {"left_over": round(s.details["left_over"], 4)})
            for s in sample(real_model(clock=True), prompts, x0=x0, seeds=seeds, steps=6, **options)
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
    seen, model = Steps(), real_model(clock=True)
    sample_ten(model, steps=10, temperature=0, on_step=seen)
    checked = 0
    for s in seen:
        hidden = model.at(model(s.x), torch.full((len(s.x.ids),), 1 - s.t))
        for token, head in ((s.sub_token, model.sub_logits), (s.ins_token, model.ins_logits)):
            rows = token != GAP
            assert token[rows].tolist() == head(hidden[rows]).argmax(-1).tolist()
            checked += rows.sum().item()
    assert checked > 20


@pytest.mark.parametrize("clock", [False, True])
@pytest.mark.parametrize("rates", [-2.0, -5.0, -9.0])
def test_only_texts_that_have_changed_are_read_again(rates, clock, monkeypatch):
    model, read, seen = real_model(clock, rates), [], Steps()
    read_again = lambda x: read.append(x.unpack()) or editflow.Model.forward(model, x)  # noqa: E731
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


def test_texts_that_are_not_read_again_get_the_rates_of_every_t(monkeypatch):
    model, asked = real_model(clock=True, rates=-99.0), []
    monkeypatch.setattr(
        model, "log_rates", lambda h, s: asked.append(s.tolist()) or editflow.Model.log_rates(model, h, s)
    )
    sample(model, [[BOS], [BOS, 2]], x0=[[], [1]], steps=4)
    assert asked == [[s] * 4 for s in (1, 0.75, 0.5, 0.25, 0.25)]  # the last for what is left over


class Scripted(nn.Module):
    """The same rates for every token, and always the same two tokens."""

    def __init__(self, sub=0.0, delete=0.0, ins=0.0):
        super().__init__()
        self.schedule = "cubic"
        self.rates = nn.Parameter(torch.tensor([sub, delete, ins]))
        self.sub_logits = lambda hidden: 50 * F.one_hot(torch.full((len(hidden),), 3), V).float()
        self.ins_logits = lambda hidden: 50 * F.one_hot(torch.full((len(hidden),), 4), V).float()

    def forward(self, x):
        return torch.zeros(len(x.ids), 1)

    def at(self, h, s):
        return h

    def log_rates(self, h, s):
        return self.rates.log().expand(len(h), 3)


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
    done, unfinished = (sample(knowing("empty"), [list(PROMPT)], x0=[[]], steps=s, seeds=[1])[0] for s in (100, 2))
    assert done.details["left_over"] < 0.01
    expected = true_rates("empty", 0.5)[PROMPT + tuple(unfinished.response)]
    total = sum(c for (kind, _, _), c in expected.items() if kind == "ins")
    assert math.isclose(unfinished.details["left_over"], total, abs_tol=1e-4)
    nothing = {"substitutions": 0, "deletions": 0, "insertions": 0, "taken_back": 0, "left_over": 0.0}
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


def test_a_token_and_the_one_inserted_behind_it_are_drawn_independently():
    n, model = 4000, Scripted(sub=1.0, ins=1.0)
    model.sub_logits = model.ins_logits = lambda hidden: torch.zeros(len(hidden), V)
    (text,) = sample(model, [[BOS]], x0=[[1] * n], steps=1)
    pairs = list(zip(text.response[1::2], text.response[2::2]))  # the first was inserted behind the prompt
    assert len(pairs) == n
    equal = sum(a == b for a, b in pairs)
    assert abs(equal - n / V) < 4 * math.sqrt(n / V)


def test_only_insertions_are_left_over():
    (text,) = sample(Scripted(sub=0.5, delete=0.25, ins=2.5), [[BOS, 1]], x0=[[1, 2, 3]], steps=2)
    assert text.details["left_over"] == pytest.approx(2.5 * (len(text.response) + 1))


def test_the_rate_of_a_remaining_edit_grows_with_its_flipped_neighbours_and_weighs_its_loss():
    x1, t, schedule = [1, 2, 3, 4] * 10, torch.tensor([0.5]), parse_schedule("linear")
    batch = path([[BOS]], [[]], [list(range(100, 140))], t, schedule, seeded(0), propagation=1.0)
    there = set(batch.x.ids.tolist())
    remaining = [token for token in range(100, 140) if token not in there]
    rates = [2.0 + len({token - 1, token + 1} & there) for token in remaining]  # w(0.5) = 2
    assert set(rates) == {2.0, 3.0, 4.0}
    assert batch.token.tolist() == remaining
    assert batch.rate.tolist() == pytest.approx(rates)

    batch = path([[BOS]], [[MASK] * 20], [x1], t, schedule, seeded(0))
    heavier = dataclasses.replace(batch, rate=3 * batch.rate)
    (_, once), (_, thrice) = (editflow.loss(real_model(), b) for b in (batch, heavier))
    for name in ("loss_sub", "loss_ins"):
        assert thrice[name].item() == pytest.approx(3 * once[name].item()) != 0


def test_on_localized_paths_rates_are_finite_where_the_schedule_stands_still():
    begun = path([[BOS]], [[1, 2]], [[2, 3, 4]], torch.zeros(1), parse_schedule("cubic"), seeded(0), propagation=2.0)
    assert len(begun.rate) > 1
    assert (begun.rate == 0).all()
