"""Where the chains of editflow.py lead, and what its extensions leave as it is: by enumeration (chains.py)."""

import functools
import itertools
import math
import zlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from chains import (
    BOS,
    CORRECTED,
    DATA,
    KAPPA,
    LOW,
    MASK,
    PROMPT,
    PROMPTS,
    SOURCES,
    STARTS,
    SUFFIX,
    Steps,
    Tabular,
    V,
    as_batch,
    chi_square,
    couplings,
    draw_texts,
    every_path,
    one_step,
    patterns,
    posterior,
    real_model,
    run_chain,
    sample,
    seeded,
    table_of,
    true_rates,
    variation,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import editflow
from editflow import parse_schedule, path
from ragged import FREE, FROZEN, GAP, KEEP

quick = settings(deadline=None, max_examples=60)
few = settings(deadline=None, max_examples=20)


# ---------------------------------------------------------------------------------------------------- consistency


@pytest.mark.parametrize("source", [*STARTS, pytest.param("uniform", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KAPPA)
def test_with_the_true_rates_the_law_goes_to_the_data_with_more_steps(source, name):
    assert math.isclose(sum(p for p, _ in posterior(source, 0.37).values()), 1)
    error = {}
    for steps in (50, 100, 400):
        law = run_chain(source, name, steps)[-1]
        assert math.isclose(sum(law.values()), 1, rel_tol=1e-9)
        error[steps] = variation(law)
    assert error[100] <= (0.04 if (source, name) == ("uniform", "cubic") else 0.03)
    assert error[400] <= 0.015
    assert 1.6 < error[50] / error[100] < 2.6, "first order"
    assert error[400] < error[100] / 3


def averaged_rates(source, name, points=400):
    """{x_t: counts} that minimise the loss of a model that does not know t: E[w(t) count | x_t] / E[w(t) | x_t]."""
    schedule, weights, counts = parse_schedule(name), Counter(), {}
    for t in (torch.arange(points, dtype=torch.float64) + 0.5) / points * (1 - editflow.EPSILON):
        w = float(schedule.weight(t))
        for text, (p, expected) in posterior(source, KAPPA[name](float(t))).items():
            weights[text] += w * p
            here = counts.setdefault(text, Counter())
            for edit, count in expected.items():
                here[edit] += w * p * count
    return {text: {e: c / weights[text] for e, c in here.items()} for text, here in counts.items()}


def test_a_model_that_does_not_know_t_gets_worse_with_more_steps():
    """Where nothing in a text says that it is finished, it goes on to expect insertions."""
    averaged = averaged_rates("empty", "linear")
    errors = [variation(run_chain("empty", "linear", n, lambda kappa: averaged)[-1]) for n in (32, 100, 400)]
    assert errors == pytest.approx([0.0922, 0.1445, 0.1878], abs=5e-4)
    assert variation(run_chain("empty", "linear", 32)[-1]) == pytest.approx(0.0309, abs=5e-4), "knowing t"


# ---------------------------------------------------------------------------------------------------- localized paths


def flip_law(parts, rate, kappa, steps=2000):
    """{flips: probability} at kappa, where an unflipped column flips at rate w(t) + rate * (flipped neighbours in its
    part), from the master equation, for the linear schedule. parts: the number of each column's part."""
    n = len(parts)
    near = [[j for j in (i - 1, i + 1) if 0 <= j < n and parts[j] == parts[i]] for i in range(n)]

    def change(law, t):
        flow = Counter()
        for flips, p in law.items():
            for i in range(n):
                if not flips[i]:
                    moved = p * (1 / (1 - t) + rate * sum(flips[j] for j in near[i]))
                    flow[flips] -= moved
                    flow[(*flips[:i], 1, *flips[i + 1 :])] += moved
        return flow

    law = {(0,) * n: 1.0}
    law |= {flips: 0.0 for flips in itertools.product((0, 1), repeat=n) if any(flips)}
    h = kappa / steps
    for k in range(steps):  # the midpoint rule
        first = change(law, k * h)
        middle = change({f: p + h / 2 * first[f] for f, p in law.items()}, (k + 0.5) * h)
        law = {f: p + h * middle[f] for f, p in law.items()}
    return law


@pytest.mark.parametrize("rate", [0.5, 6.0])
def test_localized_paths_flip_columns_beside_flipped_ones_sooner(rate):
    """Where x0 is empty and x1 = 1 2 3 4, a text says which columns have flipped."""
    n, t, x1 = 4000, 0.4, [1, 2, 3, 4]
    draws = [[BOS]] * n, [[]] * n, [x1] * n, torch.full((n,), t)
    got = path(*draws, parse_schedule("linear"), seeded(3), propagation=rate)
    flips = [tuple(int(v in text) for v in x1) for text in got.x.unpack()]
    assert chi_square(Counter(flips), flip_law([0] * 4, rate, t)) > 1e-3

    for parts in ([0, 0, 1, 1], [0, 0, 0, 1]):
        part = torch.tensor([2 * k + p for k in range(n) for p in parts])
        alone = torch.rand(len(part), generator=seeded(4), dtype=torch.float64)  # linear: t is kappa
        flipped = editflow.spread(alone, part, rate, seeded(5)) <= t
        assert chi_square(Counter(map(tuple, flipped.int().view(n, 4).tolist())), flip_law(parts, rate, t)) > 1e-3

    w = 1 / (1 - t)
    listed = iter(got.rate.tolist())
    for flipped in flips:
        for i in range(4):
            if not flipped[i]:
                neighbours = sum(flipped[j] for j in (i - 1, i + 1) if 0 <= j < 4)
                assert next(listed) == pytest.approx(w + rate * neighbours)


@pytest.mark.parametrize("start", STARTS)
def test_on_localized_paths_the_posterior_rates_minimise_the_loss(start):
    """A remaining edit's rate is w(t) + 3 * (flipped neighbours); what is learned, its mean over what may have flipped
    to give x_t, in units of w(t). That of independent columns is not stationary."""
    t, rate = 0.4, 3.0
    w, mass, counts = 1 / (1 - t), Counter(), {}
    rows = every_path(STARTS[start], DATA, w, lambda n: flip_law([0] * n, rate, t, 300), rate)
    for text, edits, rates, p, _ in rows:
        mass[text] += p
        for edit, r in zip(edits, rates):
            counts.setdefault(text, Counter())[edit] += p * r / w
    truth = {x: {e: c / mass[x] for e, c in here.items()} for x, here in counts.items()}
    batch = as_batch(rows, 1 - t, w)
    for rates, stationary in ((truth, True), (true_rates(start, t), False)):
        model = Tabular(list(mass), table_of(list(mass), rates))
        (gradient,) = torch.autograd.grad(editflow.loss(model, batch)[0], model.table)
        assert (gradient.abs().max() < 1e-5) == stationary


# ---------------------------------------------------------------------------------------------------- frozen spans


@st.composite
def frozen_cases(draw):
    """(prompt, x0, suffix, keep) a few times, and what goes with them."""
    drafts = st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=6)
    cases = draw(st.lists(st.tuples(PROMPTS, drafts, SUFFIX), min_size=1, max_size=4))
    prompts, drafts, suffixes = (list(z) for z in zip(*cases))
    x0, keep = ([[pair[k] for pair in draft] for draft in drafts] for k in (0, 1))
    options = {"suffixes": suffixes, "keep": keep}
    if draw(st.booleans()):
        x0 = [[MASK] * 2 for _ in x0]
        options = {"suffixes": suffixes} | CORRECTED
    return prompts, x0, options | {"guidance": draw(st.sampled_from([0.0, 1.0]))}


def spans(prompt, x0, keep, suffix):
    """The frozen spans: runs of tokens that must stay together, in order."""
    runs = [prompt]
    for i, (token, kept) in enumerate(zip(x0, keep)):
        if kept and i and keep[i - 1]:
            runs[-1] = [*runs[-1], token]
        elif kept:
            runs.append([token])
    return [*runs, suffix]


@quick
@given(frozen_cases(), st.integers(0, 2**40), st.integers(1, 6))
def test_no_frozen_token_changes_moves_or_is_split(cases, seed, steps):
    prompts, x0, options = cases
    seen, seeds = Steps(), range(seed, seed + len(prompts))
    options |= {"seeds": seeds, "steps": steps, "on_step": seen}
    sampled = sample(real_model(clock=True, rates=0.5), prompts, x0, **options)
    keep, suffixes = options.get("keep", [[False] * len(s) for s in x0]), options["suffixes"]
    last = [p + s.tokens + z for p, s, z in zip(prompts, sampled, suffixes)]
    for texts in (*(s.x.unpack() for s in seen), last):
        for text, *case in zip(texts, prompts, x0, keep, suffixes):
            first, *middle, end = spans(*case)
            assert text[: len(first)] == first
            assert text[len(text) - len(end) :] == end
            at = len(first)
            for span in middle:  # each as far to the left as it goes
                at = next(i for i in range(at, len(text)) if text[i : i + len(span)] == span) + len(span)
            assert at <= len(text) - len(end)
    for s in seen:  # and so it is by the marks that travel with the tokens
        frozen = s.x.frozen
        assert (s.op[frozen != FREE] == KEEP).all()
        assert (s.ins_token[frozen == FROZEN] == GAP).all()


# ---------------------------------------------------------------------------------------------------- guidance


def test_guided_rates_and_distributions_are_the_formula():
    """lambda(x | prompt)^(1 + w) lambda(x | no prompt)^(-w), and the same for Q, normalised: one step of the chain."""
    w, kappa, n, text = 0.6, 0.5, 6000, (MASK, 2)
    laws = {PROMPT: DATA, PROMPT[:1]: {(1, 2): 0.2, (2, 2, 4): 0.3, (3,): 0.5}}
    tables = {}
    for prompt, data in laws.items():
        for x, (_, counts) in posterior("masks", kappa, data).items():
            shifted = {(kind, row + len(prompt) - 2, token): c for (kind, row, token), c in counts.items()}
            tables[prompt + x[2:]] = shifted
    floor = {(kind, row, token): 0.02 for row in range(4) for kind in ("sub", "ins") for token in (1, 2, 3, 4)}
    floor |= {("del", row, None): 0.02 for row in range(4)}
    tables = {x: {e: c + floor.get(e, 0) for e, c in (floor | counts).items()} for x, counts in tables.items()}
    model = Tabular(list(tables), table_of(list(tables), tables))

    def parts(prompt):
        """{(kind, row in the response): rate}, {(kind, row, token): probability}"""
        rates, counts = Counter(), {(k, r - len(prompt), v): c for (k, r, v), c in tables[prompt + text].items()}
        counts = {e: c for e, c in counts.items() if -1 <= e[1] < len(text)}
        for (kind, row, _), c in counts.items():
            rates[kind, row] += c
        return rates, {e: c / rates[e[:2]] for e, c in counts.items()}

    (rates, q), (rates0, q0) = parts(PROMPT), parts(PROMPT[:1])
    guided, guided_q = ({e: z[e] ** (1 + w) * z0[e] ** -w for e in z} for z, z0 in ((rates, rates0), (q, q0)))
    total = Counter()
    for (kind, row, _), p in guided_q.items():
        total[kind, row] += p
    counts = {(k, r + 2, v): guided[k, r] * p / total[k, r] for (k, r, v), p in guided_q.items()}
    counts = {e: c for e, c in counts.items() if e[1] >= 2 or (e[1] == 1 and e[0] == "ins")}
    expected = one_step(PROMPT + text, counts, 0.5)
    seen = Steps()
    drawn = sample(model, [list(PROMPT)] * n, [list(text)] * n, steps=2, guidance=w, on_step=seen)
    assert len(drawn) == n
    after = Counter(map(tuple, seen[1].x.unpack()))
    assert chi_square(after, expected) > 1e-3
    unguided = {e: c for e, c in tables[PROMPT + text].items() if e in counts}
    assert chi_square(after, one_step(PROMPT + text, unguided, 0.5)) < 1e-6


def test_guidance_reads_both_branches_in_one_batch_and_0_is_none(monkeypatch):
    model, read = real_model(clock=True), []
    monkeypatch.setattr(model, "forward", lambda x: read.append(x.unpack()) or editflow.Model.forward(model, x))
    prompts, x0 = [[BOS, 2, 3], [BOS, 4]], [[1, 2], []]
    plain, plain_calls = sample(model, prompts, x0, steps=8), len(read)
    assert sample(model, prompts, x0, steps=8, guidance=0.0) == plain
    assert len(read) == 2 * plain_calls
    read.clear()
    assert sample(model, prompts, x0, steps=8, guidance=2.0) != plain
    assert read[0] == [[BOS, 2, 3, 1, 2], [BOS, 4], [BOS, 1, 2], [BOS]]
    assert len(read) <= 9, "one call a step, and one for what is left over"
    for texts in read:
        half = len(texts) // 2
        cut = [[BOS, *text[3 if text[1:3] == [2, 3] else 2 :]] for text in texts[:half]]
        assert texts[half:] == cut
    same = [[BOS], [BOS]]  # nothing to cut: both branches agree
    texts = [[s.response for s in sample(model, same, x0, steps=8, guidance=w)] for w in (0.0, 1.0)]
    assert texts[0] == texts[1]


# ---------------------------------------------------------------------------------------------------- corrector


def undone(response, undo, length):
    """{response: probability} after every flipped column has gone back with probability `undo`; x0: `length` masks."""
    law = {(): 1.0}
    for i, token in enumerate(response):
        back = () if i >= length else (MASK,)
        after = Counter()
        for old, p in law.items():
            after[(*old, token)] += p * (1 - undo)
            after[old + back] += p * undo
        law = after
    for _ in range(length - len(response)):  # masks that were lost at the end
        after = Counter()
        for old, p in law.items():
            after[old] += p * (1 - undo)
            after[(*old, MASK)] += p * undo
        law = after
    return law


@pytest.mark.parametrize("alpha", [1.0, 3.0])
@pytest.mark.parametrize("start", ["empty", "mask", "masks"])
def test_the_corrected_chain_has_the_law_of_the_plain_one(start, alpha):
    """At every time, x_t has the law p_t of the path to within what tau explains, which halves with tau; and the texts
    that are sampled have the law of the enumerated chain."""
    undo, error = functools.partial(undone, length=len(*SOURCES[start])), {}
    for steps in (100, 200, 400):
        laws = run_chain(start, "linear", steps, ahead=alpha, undo=undo)
        targets = (posterior(start, k / steps) for k in range(steps))
        errors = [variation(law, {x[2:]: p for x, (p, _) in z.items()}) for law, z in zip(laws, targets)]
        error[steps] = max(errors)
    assert error[400] < 0.02
    assert 1.5 < error[100] / error[200] < 2.7
    assert 1.5 < error[200] / error[400] < 2.7

    law = run_chain(start, "linear", 6, ahead=alpha, undo=undo)[-1]
    options = {"corrector": alpha, "start": len(*SOURCES[start]), "mask_id": MASK}
    counts = draw_texts(start, "linear", 6, 4000, **options)
    assert chi_square(counts, law) > 1e-3
    assert chi_square(counts, run_chain(start, "linear", 6)[-1]) < 1e-3, "and not that of the plain chain of 6 steps"


# ---------------------------------------------------------------------------------------------------- implicit coupling


def originals(n, kappa):
    """{k: the probability that k of the n tokens of x_t are x0's}: delete-all / insert-all, x0 and x1 of 4 tokens."""
    kappa, k_range = min(max(kappa, 1e-9), 1 - 1e-9), range(max(0, n - 4), min(4, n) + 1)
    law = {k: math.comb(4, k) * math.comb(4, n - k) * (kappa / (1 - kappa)) ** (n - 2 * k) for k in k_range}
    return {k: p / sum(law.values()) for k, p in law.items()}


def expected_edits(n, kappa):
    """Of a text of n tokens: how many deletions and insertions remain. With the columns in random order, each token is
    as likely as the others to be one of x0's, and letters do not tell."""
    k = sum(k * p for k, p in originals(n, kappa).items()) if 0 <= n <= 8 else 0.0
    return k, (4 - n + k if 0 <= n <= 8 else 0.0)


class Coupled(nn.Module):
    """The posterior rates of that process: x0 and x1 uniform on {1, 2}^4, independent of each other."""

    schedule = "linear"

    def __init__(self):
        super().__init__()
        self.device = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return (x.lengths - 1)[x.batch][:, None]

    def at(self, h, s):
        return h

    def log_rates(self, h, s):
        seen = {(n, v): expected_edits(n, 1 - v) for n, v in set(zip(h[:, 0].tolist(), s.tolist()))}
        k, new = torch.tensor([seen[pair] for pair in zip(h[:, 0].tolist(), s.tolist())]).T
        return torch.stack([torch.zeros(len(h)), k / h[:, 0].clamp_min(1), new / (h[:, 0] + 1)], dim=1).log()

    ins_logits = staticmethod(lambda h: torch.tensor([LOW, 0, 0, *[LOW] * (V - 3)]).expand(len(h), V))
    sub_logits = ins_logits


@pytest.mark.slow
def test_without_a_coupling_in_the_data_AAAA_still_goes_to_AAAA_25_times_as_often_as_to_BBBB():
    """The paper's appendix F. x0 and x1 are independent, but an x_t does not say which of its tokens are x0's, so
    some of its letters stay for good. (With all deletions in front of all insertions it is 4.5 times.)"""
    law, steps, h = {(4, 0): 1.0}, 400, 12 / 400  # (tokens of x0 that are still there, new ones), over -log(1 - kappa)

    def change(law, u):
        flow = Counter()
        for (old, new), p in law.items():
            deleted, inserted = expected_edits(old + new, 1 - math.exp(-u))
            n = max(1, old + new)
            for state, rate in (
                ((old - 1, new), deleted * old / n),
                ((old, new - 1), deleted * new / n),
                ((old, new + 1), inserted),
            ):
                if rate > 0:
                    flow[state] += p * rate
                    flow[old, new] -= p * rate
        return flow

    for step in range(steps):
        first = change(law, step * h)
        middle = change({x: law.get(x, 0) + h / 2 * first[x] for x in law.keys() | first.keys()}, (step + 0.5) * h)
        law = {x: law.get(x, 0) + h * middle[x] for x in law.keys() | middle.keys()}
    same = sum(p / 2**new for (old, new), p in law.items() if old + new == 4)
    other = law[0, 4] / 2**4
    assert same / other == pytest.approx(25.4, abs=0.1)

    n = 3000
    pairs = [[torch.randint(1, 3, (4,), generator=seeded(k)).tolist() for k in range(i, 2 * n, 2)] for i in (0, 1)]
    drawn = path([[BOS]] * n, *pairs, torch.full((n,), 0.4), parse_schedule("linear"), seeded(1), substituted=0.0)
    remaining, length = torch.zeros(n), drawn.x.lengths - 1
    remaining.index_add_(0, drawn.x.batch[drawn.row], (drawn.kind == editflow.DELETE).float())
    for size in range(2, 7):
        mean, error = remaining[length == size].mean(), remaining[length == size].std() / (length == size).sum().sqrt()
        assert abs(mean - expected_edits(size, 0.4)[0]) < 4 * error

    texts = Counter(tuple(s.response) for s in sample(Coupled(), [[BOS]] * n, [[1] * 4] * n, steps=100))
    for text, p in (((1,) * 4, same), ((2,) * 4, other)):
        assert abs(texts[text] / n - p) < 4 * math.sqrt(p / n) + 0.02 * p


# ---------------------------------------------------------------------------------------------------- likelihood

GRID = [(i + 0.5) * 12 / 300 for i in range(300)]  # of u = -log(1 - kappa), in which a remaining edit fires at rate 1


def exact_law(source, rates):
    """{response: probability} of the chain with these rates, from its master equation by the midpoint rule."""

    def change(law, known):
        flow = Counter()
        for text, p in law.items():
            for (kind, row, token), count in known.get(text, {}).items():
                new = () if token is None else (token,)
                flow[text[: row + (kind == "ins")] + new + text[row + 1 :]] += p * count
                flow[text] -= p * count
        return flow

    law, h = {PROMPT + x0: p for x0, p in SOURCES[source].items()}, GRID[1] - GRID[0]
    for u in GRID:
        first = change(law, rates(1 - math.exp(-u + h / 2)))
        middle = change(
            {x: law.get(x, 0) + h / 2 * first[x] for x in law.keys() | first.keys()}, rates(1 - math.exp(-u))
        )
        law = {x: law.get(x, 0) + h * middle[x] for x in law.keys() | middle.keys()}
    return {x[len(PROMPT) :]: p for x, p in law.items()}


def exact_bound(source, x1, rates):
    """The Kullback-Leibler divergence of the paths to x1 from the model's, by the midpoint rule."""
    total, h = 0.0, GRID[1] - GRID[0]
    for q, aligned in couplings(source, x1):
        total -= q * sum(old != new for old, new in aligned)
        for u in GRID:
            known = rates(1 - math.exp(-u))
            for text, edits, flipped, left in patterns(PROMPT, aligned):
                p = (1 - math.exp(-u)) ** flipped * math.exp(-u * left)
                here = known[text]
                total += q * p * h * (sum(here.values()) - sum(math.log(here[e]) for e in edits))
    return total


def perturbed(source, size, data=None):
    """The true rates, each multiplied by a random factor of its own."""

    @functools.cache
    def noise(*edit):
        return math.exp(size * torch.randn((), generator=seeded(zlib.crc32(repr(edit).encode()))))


    @functools.cache
    def rates(kappa):
        states = posterior(source, min(kappa, 1 - 1e-6), data)
        return {x: {e: c * noise(x, *e) for e, c in counts.items()} for x, (_, counts) in states.items()}

    return rates


@pytest.mark.parametrize("source", [*STARTS, pytest.param("uniform", marks=pytest.mark.slow)])
def test_the_likelihood_bound_is_above_the_exact_likelihood(source):
    for size in (0.0, 0.7):
        rates = perturbed(source, size)
        law = exact_law(source, rates)
        assert sum(law.values()) == pytest.approx(1, abs=1e-4)
        gaps = [exact_bound(source, x1, rates) + math.log(law[x1]) for x1 in DATA]
        assert min(gaps) > -2e-3
    assert max(gaps) > 0.05, "wrong rates, and several paths to a text"


def test_the_likelihood_bound_is_exact_where_nothing_of_the_path_is_lost():
    """One insertion; and masks of the true length, where x_t says which columns have flipped."""
    SIXTH = {(1, 2): 1 / 6, (2, 1): 1 / 2, (1, 3): 1 / 3}
    for source, data in (("empty", {(): 0.3, (1,): 0.5, (2,): 0.2}), ("masks", SIXTH)):
        rates = perturbed(source, 0.0, data)
        for x1, p in data.items():
            assert exact_bound(source, x1, rates) == pytest.approx(-math.log(p), abs=2e-3)


@pytest.mark.parametrize("source", STARTS)
def test_the_likelihood_estimate_has_the_bound_as_its_mean(source):
    n, half, x1 = 1000, perturbed(source, 0.7)(0.5), (1, 2)  # the rates at kappa = 1/2, times 2 (1 - kappa)
    base, every_rate = table_of(list(half), half), torch.tensor([1.0] * 3 + [0.0] * (2 * V))
    model = Tabular(list(half), base, table_at=lambda s: base + math.log(2 * s) * every_rate)
    exact = exact_bound(source, x1, lambda k: {x: {e: 2 * (1 - k) * c for e, c in z.items()} for x, z in half.items()})
    example = SimpleNamespace(prompt=list(PROMPT), response=list(x1), suffix=[], draft=list(STARTS[source]))
    spec = {"masks": "masks[length:2]"}.get(source, source)
    flags = SimpleNamespace(x0_sampler=spec, tokens={"mask": MASK}, alignment=None)
    draws = torch.stack([editflow.likelihood(model, [example] * n, flags, seeded(k)) / n for k in range(20)])
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - exact) < 4 * error + 1e-3
    assert error < 0.04 * exact
    with pytest.raises(ValueError, match="--time_conditioned"):
        editflow.likelihood(real_model(), [example], flags, seeded(0))
