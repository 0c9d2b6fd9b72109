"""What medlm.py promises, checked against slow, obvious versions and against heads that know the answer."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import medlm
from edit_distance import distance, edit_labels
from plumbing import checkpoints, methods
from ragged import ANCHOR, DEL, FREE, FROZEN, GAP, KEEP, SUB, Ragged, apply_edits, frozen_text, stratified

V = 64
TOKENS = {"mask": 60, "pad": 61, "del": 62, "eos": 63}
MASK, PAD, DELETE, EOS = TOKENS.values()
LETTERS = st.integers(0, 3)
NORMS = ["tokens", "samples", "bound"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def example(prompt, response, suffix=()):
    return SimpleNamespace(prompt=prompt, response=response, suffix=list(suffix))


def closed(*rows):
    """Closed drafts from (prompt, text)."""
    return frozen_text([p for p, _ in rows], [t for _, t in rows], [[EOS]] * len(rows))


def random_examples(seed, n=5):
    """Ragged examples; among them an empty response, a one-token response and one of pads only."""
    draw = np.random.default_rng(seed)
    lengths = [*draw.integers(2, 9, n - 3), 0, 1, 1]
    examples = [
        example(draw.integers(0, 50, draw.integers(1, 5)).tolist(), draw.integers(0, 50, k).tolist()) for k in lengths
    ]
    examples[-1].response = [EOS]
    return [examples[i] for i in draw.permutation(n)]


# ---------------------------------------------------------------------------------------------------- stand-in models


class Tiny(nn.Module):
    """A small model with the interface of medlm.Model: each token sees the mean of its own sequence."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix = nn.Embedding(V, 16), nn.Linear(16, 16)
        self.lm_head, self.next_token_head = nn.Linear(16, V), nn.Linear(16, V)

    def forward(self, x, t=None):
        h = self.embed(x.ids)
        mean = torch.zeros(len(x), 16).index_add_(0, x.batch, h) / x.lengths[:, None].clamp(min=1)
        return torch.tanh(h + self.mix(mean)[x.batch] + torch.sin(x.positions[:, None] * torch.arange(16.0)))


class Say(nn.Module):
    """A head whose answer stands in one column of the hidden state."""

    out_features = V

    def __init__(self, column):
        super().__init__()
        self.column = column

    def forward(self, hidden):
        return 9 * nn.functional.one_hot(hidden[:, self.column].long(), V).float()


class Oracle(nn.Module):
    """Knows a draft and a target by the prompt's first token: fills masks with the draft, then says `edit_labels`.

    Rows without a label, the prompt's included, say something harmful instead.
    """

    def __init__(self, cases):  # {first token: (prompt length, draft, target)}
        super().__init__()
        self.cases, self.forwards, self.sizes = cases, 0, []
        self.lm_head, self.next_token_head = Say(0), Say(1)
        self.device_of = nn.Parameter(torch.zeros(1))

    def forward(self, x, t=None):
        self.forwards += 1
        self.sizes.append(len(x))
        hidden = []
        for row in x.unpack():
            n, draft, target, *end = self.cases[row[0]]
            suffix = end[0] if end else [EOS]
            said = torch.tensor([[DELETE, 7]] * len(row), dtype=torch.float32)
            last = len(row) - len(suffix)
            if MASK in row[n:]:
                said[n:, 0] = torch.tensor((draft + [PAD] * len(row))[: len(row) - n])
            elif len(row) > n:
                token, insert = edit_labels(row[n:last], target, DELETE, EOS)
                said[n:last, 0] = torch.tensor(token)
                said[n - 1 : last, 1] = torch.tensor(np.where(insert == -100, 7, insert))
            hidden.append(said)
        return torch.cat(hidden)


# ---------------------------------------------------------------------------------------------------- stages 1 and 2


def mask_batch(examples, seed, low=0.0, high=1.0, norm="tokens"):
    """(batch, t): t is the first thing that is drawn."""
    t = stratified(len(examples), max(low, medlm.MIN_T), high, seeded(seed))
    settings = {"mask_id": MASK, "min_t": low, "max_t": high, "loss_norm": norm}
    return medlm.mask_batch(examples, **settings, generator=seeded(seed)), t


def test_masks_cover_responses_only_and_targets_are_what_stood_there():
    for seed in range(20):
        examples = random_examples(seed)
        batch, _ = mask_batch(examples, seed)
        expected = []
        for row, e in zip(batch.x.unpack(), examples):
            assert row[: len(e.prompt)] == e.prompt
            assert len(row) == len(e.prompt) + len(e.response)
            expected += [e.response[i] for i, token in enumerate(row[len(e.prompt) :]) if token == MASK]
        assert batch.lm_token.tolist() == batch.next_token.tolist() == expected
        assert batch.next_row.tolist() == (batch.lm_row - 1).tolist()
        assert (batch.x.batch[batch.lm_row] == batch.x.batch[batch.next_row]).all()  # no label crosses a fence


def test_every_response_token_the_first_included_is_masked_with_probability_t():
    examples = [example([1], [5] * 8)] * 64
    hits, ts = torch.zeros(8), []
    for seed in range(100):
        batch, t = mask_batch(examples, seed, 0.2, 0.6)
        masked = (batch.x.ids == MASK).view(64, 9)[:, 1:]
        hits += masked.sum(0)
        ts.append(t)
        assert ((t - 0.2) / 0.4 * 64).long().sort().values.tolist() == list(range(64))  # one t in each stratum
    n = 6400
    assert ((hits / n - 0.4).abs() < 4 * math.sqrt(0.24 / n)).all()
    assert (
        (torch.stack(ts).mean(0) - 0.4).abs() < 4 * 0.4 / math.sqrt(12 * 100)
    ).all()  # whatever the place in the batch


def test_masking_follows_each_samples_own_t():
    examples = [example([1], [5] * 4000)] * 6
    batch, t = mask_batch(examples, 3)
    fraction = (batch.x.ids == MASK).view(6, -1)[:, 1:].float().mean(1)
    assert t.std() > 0.2
    assert ((fraction - t).abs() < 4 * 0.5 / math.sqrt(4000)).all()
    assert (t >= medlm.MIN_T).all()


def slow_mask_loss(model, batch, t, examples, norm):
    """One sample, one position at a time, with a full softmax."""
    lm, following, counted = [], [], 0
    where = {int(r): int(tok) for r, tok in zip(batch.lm_row, batch.lm_token)}
    start = 0
    for b, row in enumerate(batch.x.unpack()):
        hidden = model(Ragged.pack([row]))
        ce = [[], []]
        for i in range(len(row)):
            if start + i in where:
                token = where[start + i]
                ce[0].append(-model.lm_head(hidden[i]).log_softmax(-1)[token])
                ce[1].append(-model.next_token_head(hidden[i - 1]).log_softmax(-1)[token])
        start += len(row)
        length = len(examples[b].response)
        counted += {"tokens": len(ce[0]), "samples": bool(ce[0]), "bound": length > 0}[norm]
        if ce[0]:
            scale = t[b] * {"tokens": 1, "samples": len(ce[0]), "bound": length}[norm]
            lm.append(sum(ce[0]) / scale)
            following.append(sum(ce[1]) / scale)
    return (sum(lm) / counted, sum(following) / counted) if lm else (torch.tensor(0.0), torch.tensor(0.0))


@pytest.mark.parametrize("norm", NORMS)
def test_mask_loss_equals_the_slow_version(norm):
    for seed in range(12):
        model, examples = Tiny(seed), random_examples(seed)
        batch, t = mask_batch(examples, seed, norm=norm)
        loss, metrics = medlm.loss(model, batch)
        lm, following = slow_mask_loss(model, batch, t, examples, norm)
        assert torch.allclose(loss, lm + following, rtol=1e-4)
        assert torch.allclose(metrics["loss_mask_lm"], lm, rtol=1e-4)
        assert metrics["masked_tokens"] == len(batch.lm_row)
        ours = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
        if len(batch.lm_row):
            for a, b in zip(ours, torch.autograd.grad(lm + following, model.parameters())):
                assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_no_nan_with_nothing_or_everything_masked(norm, t, monkeypatch):
    monkeypatch.setattr(medlm, "stratified", lambda n, low, high, generator: torch.full((n,), t))
    examples, model = random_examples(0), Tiny()
    batch = medlm.mask_batch(examples, mask_id=MASK, min_t=0, max_t=1, generator=seeded(0), loss_norm=norm)
    assert len(batch.lm_row) == (0 if t == 0 else sum(len(e.response) for e in examples))
    loss, _ = medlm.loss(model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert t == 1.0 or loss == 0


@pytest.mark.parametrize("norm", NORMS)
def test_no_nan_when_all_responses_are_empty(norm):
    assert medlm.loss(Tiny(), mask_batch([example([1, 2], [])], 0, norm=norm)[0])[0] == 0


class Table(nn.Module):
    """An arbitrary conditional model of 3 tokens over 2 symbols: random logits for every pattern of visible tokens."""

    def __init__(self, seed):
        super().__init__()
        self.logits = {}
        self.noise = seeded(seed)
        self.lm_head = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.lm_head.weight)
        self.next_token_head = self.lm_head

    def forward(self, x, t=None):
        state = tuple(x.ids.tolist())
        if state not in self.logits:
            self.logits[state] = 2 * torch.randn(len(state), 2, generator=self.noise)
        return self.logits[state]


def test_bound_is_the_mean_over_orders_of_the_nll_and_an_upper_bound_of_the_exact_nll():
    """The decoder reveals one uniformly drawn masked token per pass, so p(x) = E_order[prod_i p(x_order(i) | earlier)].

    Expectations are exact: over masks by enumeration, over t ~ U[0, 1] by Gauss-Legendre (a polynomial in t).
    """
    L, model, total = 3, Table(0), 0.0
    nodes, node_weights = np.polynomial.legendre.leggauss(4)
    for text in itertools.product([0, 1], repeat=L):

        def masked_state(masked, text=text):
            return [1] + [MASK if i in masked else token for i, token in enumerate(text)]

        per_order = []
        for order in itertools.permutations(range(L)):
            nll = 0.0
            for step, i in enumerate(order):
                logits = model(Ragged.pack([masked_state(order[step:])]))[1 + i]
                nll -= float(logits.log_softmax(-1)[text[i]])
            per_order.append(nll)
        exact = -math.log(np.mean(np.exp(-np.array(per_order))))

        bound = 0.0
        for node, node_weight in zip(nodes, node_weights):
            t = (node + 1) / 2
            for masked in itertools.product([False, True], repeat=L):
                k = sum(masked)
                row = torch.tensor([1 + i for i in range(L) if masked[i]], dtype=torch.int64)
                x = Ragged.pack([masked_state([i for i in range(L) if masked[i]])])
                drawn = {"stratified": lambda *_, t=t: torch.tensor([t]), "draw_masks": lambda *_, row=row: row}
                with pytest.MonkeyPatch.context() as patch:
                    for name, value in drawn.items():
                        patch.setattr(medlm, name, value)
                    batch, _ = mask_batch([example([1], list(text))], 0, norm="bound")
                assert batch.x.unpack() == x.unpack()
                loss = float(medlm.loss(model, batch)[1]["loss_mask_lm"])
                bound += node_weight / 2 * t**k * (1 - t) ** (L - k) * loss * L
        assert bound == pytest.approx(np.mean(per_order), rel=1e-4)
        assert bound >= exact
        assert bound > exact + 1e-3  # the conditionals disagree between orders, so the bound is not tight here
        total += math.exp(-exact)
    assert total == pytest.approx(1, rel=1e-5)  # what is bounded is the likelihood of a proper distribution


def any_order(model, prompt, text, mask_id, suffix=()):
    """-log p(text | prompt, suffix, order) for every order in which the tokens may be revealed."""
    nlls = []
    for order in itertools.permutations(range(len(text))):
        hidden = [[mask_id if i in order[s:] else t for i, t in enumerate(text)] for s in range(len(text))]
        hidden = [[*prompt, *row, *suffix] for row in hidden]
        rows = [model.lm_head(model(Ragged.pack([row])))[len(prompt) + order[s]] for s, row in enumerate(hidden)]
        nlls.append(-sum(float(row.double().log_softmax(-1)[text[i]]) for row, i in zip(rows, order)))
    return nlls


@torch.no_grad()
def test_the_likelihood_estimate_has_the_any_order_bound_as_its_expectation(monkeypatch):
    """By enumeration: every number of masks k, and every subset of that size, is equally likely."""
    model, settings, total = Table(1), SimpleNamespace(tokens={"mask": 9}), 0.0
    for text in itertools.product([0, 1], repeat=3):
        for suffix in ([], [1]):  # read, and not counted
            e, estimates = example([1], list(text), suffix), []
            for k in (1, 2, 3):
                monkeypatch.setattr(medlm, "stratified", lambda *_, k=k: torch.tensor([(k - 0.5) / 3]))
                subsets = []
                for masked in itertools.combinations(range(3), k):
                    scores = torch.tensor([float(i in masked) for i in range(3)])
                    monkeypatch.setattr(torch, "rand", lambda *_, scores=scores, **options: scores)
                    subsets.append(float(medlm.likelihood(model, [e], settings, seeded(0))))
                estimates.append(np.mean(subsets))
            orders = any_order(model, [1], list(text), 9, suffix)
            assert np.mean(estimates) == pytest.approx(np.mean(orders), rel=1e-5)
        exact = -math.log(np.mean(np.exp(-np.array(orders))))
        assert np.mean(estimates) > exact
        total += math.exp(-exact)
    assert total == pytest.approx(1, rel=1e-5)


@torch.no_grad()
def test_likelihood_of_many_examples_is_unbiased_and_that_of_nothing_is_zero():
    model, settings = Tiny(3), SimpleNamespace(tokens=TOKENS)
    examples = [example([1], [4, 5, 6]), example([2, 3], [7], [8, EOS]), example([9], [])]
    means = [np.mean(any_order(model, e.prompt, e.response, MASK, e.suffix)) for e in examples[:2]]
    draws = torch.stack([medlm.likelihood(model, examples, settings, seeded(i)) for i in range(600)])
    assert draws.dtype == torch.float64
    error = 4 * draws.std(0) / math.sqrt(600) + 1e-6
    assert ((draws.mean(0) - torch.tensor([*means, 0.0])).abs() <= error).all()
    assert draws[:, 2].abs().max() == 0


# ---------------------------------------------------------------------------------------------------- parts of a pass


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=20),
    st.lists(st.integers(0, 4), min_size=4, max_size=4),
)
def test_highest_is_the_top_of_each_sequence(pairs, count):
    sample, score = (torch.tensor([p[k] for p in pairs], dtype=torch.int64) for k in (0, 1))
    chosen = medlm.highest(score.float(), sample, torch.tensor(count)).tolist()
    for b in range(4):
        rows = sorted((i for i, p in enumerate(pairs) if p[0] == b), key=lambda i: (-pairs[i][1], i))
        assert [i for i in rows if chosen[i]] == rows[: count[b]]


@pytest.mark.parametrize("chunk", [V, 3 * V, 1 << 24])
def test_best_tokens_equal_a_full_softmax(monkeypatch, chunk):
    monkeypatch.setattr(medlm, "CHUNK", chunk)
    hidden, head, row = torch.randn(9, 16, generator=seeded(1)), Tiny().lm_head, torch.tensor([8, 0, 3, 3, 5, 1, 2])
    with torch.no_grad():
        full = head(hidden)[row]
        allowed = full.clone()
        never = allowed.argmax(1)[:2].tolist()
        allowed[:, never] = -torch.inf
        token, sure, rank = medlm.best_tokens(hidden, head, row, never)
        assert token.tolist() == allowed.argmax(1).tolist()
        assert torch.allclose(sure, allowed.log_softmax(1).amax(1))
        assert (rank == sure).all()
        rival = torch.arange(7)
        token, sure, _ = medlm.best_tokens(hidden, head, row, never, rival)
        assert torch.allclose(sure, allowed.amax(1) - full[torch.arange(7), rival])
        last = int(token[0])
        token, sure, rank = medlm.best_tokens(hidden, head, row, never, last=last)
        others = allowed.index_fill(1, torch.tensor([last]), -torch.inf).log_softmax(1)
        assert torch.allclose(sure, allowed.log_softmax(1).amax(1))
        assert torch.allclose(rank, others.gather(1, token[:, None])[:, 0])
        assert rank[0] == -torch.inf
        assert all(len(found) == 0 for found in medlm.best_tokens(hidden, head, row[:0], never))


responses = st.lists(st.sampled_from([0, 1, PAD, EOS]), max_size=8)


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([5, EOS, PAD]), min_size=1, max_size=3), responses), min_size=1, max_size=4
    )
)
def test_close_draft_cuts_at_the_first_eos_drops_pads_and_ends_with_one_eos(cases):
    x = frozen_text([p for p, _ in cases], [r for _, r in cases])
    closed = medlm.close_draft(x, TOKENS)
    expected = [[t for t in itertools.takewhile(lambda t: t != EOS, r) if t != PAD] for _, r in cases]
    assert closed.unpack() == [p + e + [EOS] for (p, _), e in zip(cases, expected)]
    assert medlm.contents(closed) == expected
    assert closed.ids[closed.frozen == FREE].tolist() == list(itertools.chain(*expected))
    extensible = itertools.chain(*([p[-1], *e] for (p, _), e in zip(cases, expected)))
    assert closed.ids[closed.frozen != FROZEN].tolist() == list(extensible)


class Fickle(Tiny):
    """Would put <|del|>, then the mask, above everything else, if it were let."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.lm_head.bias[[DELETE, MASK]] = torch.tensor([99.0, 98.0])


@pytest.mark.parametrize("order", medlm.ORDERS)
def test_masks_are_filled_in_equal_shares_and_never_with_del_or_mask(order):
    x = frozen_text([[1, MASK], [2], [3]], [[MASK] * 10, [7, 8], [MASK] * 3])  # a mask in a prompt is left alone
    passes = torch.tensor([4, 0, 3])
    counts = []

    def count(label, step, x, edits):
        counts.append([int((edits[0][x.batch == b] == SUB).sum()) for b in range(3)])

    settings = {"order": order, "seeds": torch.arange(3), "on_pass": count}
    with torch.no_grad():
        filled, sure, used = medlm.fill_masks(Fickle(), x, passes, TOKENS, **settings)
    assert counts == [[3, 0, 1], [3, 0, 1], [2, 0, 1], [2, 0, 0]]
    rows = filled.unpack()
    assert used.tolist() == [4, 0, 3]
    assert (sure.isfinite() == ((x.ids == MASK) & (x.frozen == FREE))).all()
    assert rows[0][:2] == [1, MASK]
    assert rows[1] == [2, 7, 8]
    assert not {MASK, DELETE} & set(rows[0][2:] + rows[2])


def test_confident_order_fills_the_surest_masks_first():
    model, x = Tiny(), frozen_text([[1]], [[MASK] * 6])
    seen = []
    settings = {"order": "confidence", "seeds": None, "on_pass": lambda label, step, x, edits: seen.append((x, edits))}
    with torch.no_grad():
        medlm.fill_masks(model, x, torch.tensor([3]), TOKENS, **settings)
        for before, (op, token, _) in seen:
            logits = model.lm_head(model(before)).index_fill(1, torch.tensor([MASK, DELETE]), -torch.inf)
            best = logits.log_softmax(1).max(1)
            surest = sorted((before.ids == MASK).nonzero().flatten().tolist(), key=lambda i: -best.values[i])[:2]
            assert sorted(surest) == (op == SUB).nonzero().flatten().tolist()
            assert (token[op == SUB] == best.indices[op == SUB]).all()


def published_decoder(logits_of, n, steps, pad, never):
    """The published rule for one response of n masks: {position: token} after each pass, in plain Python.

    logits_of: from {position: token} to the n rows of logits. never: tokens that cannot be chosen.
    """
    filled, after = {}, []
    for step in range(steps):
        scores = []
        for i, row in enumerate(logits_of(filled)):
            row = [-math.inf if token in never else value for token, value in enumerate(row)]
            token = max(range(len(row)), key=lambda v: row[v])
            total = sum(math.exp(value) for v, value in enumerate(row) if v != pad)
            probability = 0.0 if token == pad else math.exp(row[token]) / total
            scores.append((probability, -i, token))
        free = sorted((score for score in scores if -score[1] not in filled), reverse=True)
        share = n // steps + (step < n % steps)
        filled |= {-at: token for _, at, token in free[:share]}
        after.append(dict(filled))
    return after


@pytest.mark.parametrize("favour", [0, 3, 5])
@torch.no_grad()
def test_the_default_order_is_the_published_one(favour):
    """On random logits with pads favoured; also that it differs from the order of confidence where pads are wanted."""
    n, same = 12, []
    for seed in range(40):
        model, steps = Tiny(seed), 1 + seed % 7
        model.lm_head.bias[PAD] += favour
        model.lm_head.weight *= 3
        x, seen = frozen_text([[seed % 50, 3]], [[MASK] * n]), []

        def logits_of(filled, x=x, model=model):
            row = [*x.ids[:2].tolist(), *(filled.get(i, MASK) for i in range(n))]
            return model.lm_head(model(Ragged.pack([row])))[2:].double().tolist()

        def note(t, x, op, sub, ins, label, seen=seen):
            seen.append({i: t for i, t in enumerate(apply_edits(x, op, sub, ins).ids[2:].tolist()) if t != MASK})

        limits = {"init_num": n, "mask_diffusion_step": steps, "edit_diffusion_step": 0}
        medlm.decode(model, [[seed % 50, 3]], TOKENS, **limits, on_step=note)
        assert seen == published_decoder(logits_of, n, steps, PAD, {MASK, DELETE})
        text, *_ = medlm.fill_masks(model, x, torch.tensor([steps]), TOKENS, order="confidence")
        same.append(text.unpack()[0][2:] == [seen[-1][i] for i in range(n)])
    assert favour == 0 or not all(same)


@given(st.integers(0, 999), st.integers(1, 12), st.floats(0.02, 0.9), st.sampled_from(medlm.ORDERS))
@settings(deadline=None, max_examples=60)
def test_above_a_threshold_every_sure_mask_is_filled_and_at_least_the_share_is(seed, steps, threshold, order):
    model, left = Tiny(seed), []
    with torch.no_grad():
        model.lm_head.weight *= 4
    x = frozen_text([[1], [2, 3]], [[MASK] * 12, [MASK] * 5])
    passes, seeds = torch.tensor([steps, min(steps, 5)]), torch.tensor([1, 2])

    def check(label, step, x, edits):
        filled, masked = edits[0] == SUB, (x.ids == MASK)
        p = model.lm_head(model(x)).index_fill(1, torch.tensor([MASK, DELETE]), -torch.inf).softmax(1).amax(1)
        sure = masked & (p > threshold)
        assert (filled | ~sure)[(p - threshold).abs() > 1e-5].all()
        for b in range(2):
            rest, done = int((masked & (x.batch == b)).sum()), int((filled & (x.batch == b)).sum())
            share = -(-rest // max(1, int(passes[b]) - step))
            assert done >= share
            assert done == share or (sure & (x.batch == b)).sum() > 0
        left.append(step)

    with torch.no_grad():
        fill = {"order": order, "seeds": seeds, "threshold": threshold}
        text, _, used = medlm.fill_masks(model, x, passes, TOKENS, **fill, on_pass=check)
    assert MASK not in text.ids
    assert len(left) == used.max() <= steps
    assert (used <= passes).all()


def test_a_low_threshold_fills_all_in_one_pass():
    (one,) = medlm.decode(Tiny(), [[1]], TOKENS, init_num=9, mask_diffusion_step=9, threshold=1e-6)
    assert one.passes["mask_passes"] == 1


@torch.no_grad()
def test_the_control_fills_the_least_sure_tokens_again_and_edits_nothing():
    for seed in range(10):
        model, states = Tiny(seed), []
        model.lm_head.weight *= 4
        model.lm_head.bias[[PAD, EOS]] = -99.0
        settings = {"init_num": 8, "mask_diffusion_step": 4, "edit_diffusion_step": 3, "order": "confidence"}
        note = lambda *step, to=states: to.append(step[1:])  # noqa: E731
        (out,) = medlm.decode(model, [[5, 6]], TOKENS, repair="remask", max_edits=3, **settings, on_step=note)
        assert out.passes == {"mask_passes": 4, "edit_passes": 3}
        x, sure, _ = medlm.fill_masks(
            model, frozen_text([[5, 6]], [[MASK] * 8]), torch.tensor([4]), TOKENS, order="confidence"
        )
        row, sure = x.ids.tolist(), sure.tolist()
        assert out.draft == row[2:]
        for _, op, sub, ins, label in states[4:]:
            assert label == "edit"
            least = sorted(range(2, 10), key=lambda i: sure[i])[:3]
            masked = [MASK if i in least else token for i, token in enumerate(row)]
            p = model.lm_head(model(Ragged.pack([masked]))).index_fill(1, torch.tensor([MASK, DELETE]), -torch.inf)
            top = p.log_softmax(1).max(1)
            before = list(row)
            for i in least:
                row[i], sure[i] = int(top.indices[i]), float(top.values[i])
            assert (ins == GAP).all()
            assert [s if o == SUB else b for o, s, b in zip(op.tolist(), sub.tolist(), before)] == row
        assert out.response == row[2:]
        (none,) = medlm.decode(model, [[5, 6]], TOKENS, repair="none", **settings)
        assert (none.response, none.passes["edit_passes"]) == (out.draft, 0)


def test_random_order_depends_on_the_seed_alone():
    def order(seeds, rows):
        x = frozen_text([[1]] * rows, [[MASK] * 12] * rows)
        masks = []

        def note(label, step, x, edits):
            masks.append(edits[0].view(rows, 13).argmax(1))  # one mask per sequence and pass

        passes = torch.full((rows,), 12)
        with torch.no_grad():
            medlm.fill_masks(Tiny(), x, passes, TOKENS, order="random", seeds=torch.tensor(seeds), on_pass=note)
        return torch.stack(masks, 1).tolist()

    batch = order([5, 6, 5], 3)
    assert batch[0] == batch[2] == order([5], 1)[0]
    assert batch[1] == order([6], 1)[0] != batch[0]


# ---------------------------------------------------------------------------------------------------- edits and oracle


def test_the_example_in_the_header():
    so, three, plus, four, equals, seven = range(6)
    x = Ragged.pack([[10, so, three, plus, equals, seven, EOS]])
    token = torch.tensor([10, GAP, three, plus, equals, seven, EOS])
    following = torch.tensor([three, so, plus, four, seven, EOS, GAP])
    op, _, insert = edits = medlm.edit_pass(x, token, following)
    assert op.tolist() == [KEEP, DEL, KEEP, KEEP, KEEP, KEEP, KEEP]
    assert insert.tolist() == [GAP, GAP, GAP, four, GAP, GAP, GAP]
    assert apply_edits(x, *edits).unpack() == [[10, three, plus, four, equals, seven, EOS]]
    labels = edit_labels([so, three, plus, equals, seven], [three, plus, four, equals, seven], DELETE, EOS)
    assert labels[0].tolist() == [DELETE, three, plus, equals, seven]
    assert labels[1].tolist() == [three, -100, plus, four, seven, EOS]


texts = st.lists(LETTERS, max_size=9)


suffixes = st.lists(LETTERS, max_size=3).map(lambda s: [8, *s, EOS] if s else [EOS])


@given(st.lists(st.tuples(st.integers(1, 3), texts, texts, suffixes), min_size=1, max_size=5), st.randoms())
@settings(deadline=None, max_examples=200)
def test_following_the_labels_every_edit_pass_lowers_the_distance_until_the_target_is_reached(cases, rng):
    x = frozen_text([[9] * n for n, *_ in cases], [draft for _, draft, *_ in cases], [s for *_, s in cases])
    for _ in range(10):
        drafts = medlm.contents(x)
        distances = [distance(a, target) for a, (_, _, target, _) in zip(drafts, cases)]
        if not any(distances):
            break
        batch = medlm.label_drafts(x, [target for _, _, target, _ in cases], TOKENS)
        assert batch.counts["edit_distance"] == pytest.approx(sum(distances) / len(distances))
        following = torch.tensor([rng.randrange(4) for _ in x.ids])  # what an unsupervised gap says must not matter,
        following[x.frozen == FROZEN] = GAP  # and outside the response there are no gaps
        following[batch.next_row] = batch.next_token
        token = x.ids.index_copy(0, batch.lm_row, batch.lm_token.masked_fill(batch.lm_token == DELETE, GAP))
        x = apply_edits(x, *medlm.edit_pass(x, token, following))
        for row, text, before, (n, _, target, suffix) in zip(x.unpack(), medlm.contents(x), distances, cases):
            assert row == [9] * n + text + suffix
            assert before == 0 or distance(text, target) < before
    assert medlm.contents(x) == [target for _, _, target, _ in cases]


drafts = st.lists(st.sampled_from([0, 1, 2, PAD, EOS]), max_size=9)


@given(
    st.lists(st.tuples(st.integers(1, 3), drafts, texts), min_size=1, max_size=5),
    st.permutations([MASK, PAD, DELETE, EOS]),
    st.integers(1, 12),
    st.sampled_from(medlm.ORDERS),
    st.sampled_from([None, 1, 3]),
)
@settings(deadline=None, max_examples=150)
def test_with_oracle_heads_decoding_reaches_the_target_from_any_draft_in_any_batch(
    cases, special, steps, order, max_edits
):
    keys = range(20, 20 + len(cases))
    model = Oracle({key: case for key, case in zip(keys, cases)})
    prompts = [[key, *special[: n - 1]] for key, (n, _, _) in zip(keys, cases)]
    room = max(len(text) for _, *pair in cases for text in pair)  # no more than is needed: deletions must make room
    states = []
    decoded = medlm.decode(
        model, prompts, TOKENS, init_num=room, mask_diffusion_step=steps, edit_diffusion_step=20, order=order,
        max_edits=max_edits, on_step=lambda t, x, op, sub, ins, label: states.append((label, x, op, ins)),
    )  # fmt: skip
    for d, (_, draft, target) in zip(decoded, cases):
        start = [t for t in itertools.takewhile(lambda t: t != EOS, draft) if t != PAD]
        assert d.draft == start
        assert d.response == target
        assert d.passes["mask_passes"] == min(steps, room)
        assert d.passes["edit_passes"] <= distance(start, target) + 1  # the last pass finds nothing left to do
    assert model.forwards == decoded[0].passes["mask_passes"] + max(d.passes["edit_passes"] for d in decoded)
    for label, x, op, ins in states:
        assert [row[:n] for row, (n, _, _) in zip(x.unpack(), cases)] == prompts  # special tokens in them included
        if label == "edit" and max_edits:
            per_sequence = torch.zeros(len(x)).index_add_(0, x.batch, (op != KEEP).float() + (ins != GAP))
            assert per_sequence.max() <= max_edits


def test_a_trace_replays_the_decode_and_finished_sequences_leave_the_batch():
    model = Oracle({20: (1, [0, 1], [0, 1]), 21: (2, [0, 0, 0, PAD, 2, EOS], [1, 2, 3, 0, 1])})
    steps, on_step = [], lambda *step: steps.append(step)
    decoded = medlm.decode(model, [[20], [21, 8]], TOKENS, init_num=8, mask_diffusion_step=3, on_step=on_step)
    for (_, x, op, sub, ins, label), (_, following, *_, next_label) in itertools.pairwise(steps):
        if label == next_label:
            assert apply_edits(x, op, sub, ins).unpack() == following.unpack()
    _, x, op, sub, ins, _ = steps[-1]
    assert [row[n:-1] for row, n in zip(apply_edits(x, op, sub, ins).unpack(), (1, 2))] == [d.response for d in decoded]
    assert [d.passes["edit_passes"] for d in decoded] == [1, len(steps) - 3]
    assert model.sizes == [2, 2, 2, 2] + [1] * (len(steps) - 4)
    assert [t for t, *_ in steps] == [i / 19 for i in range(len(steps))]


class Swap(nn.Module):
    """Wants 5 to be 6 and 6 to be 5; 4 to be 3. Inserts nothing."""

    def __init__(self):
        super().__init__()
        wants = 2 * torch.eye(V)
        wants[6, 5], wants[5, 6], wants[3, 4] = 5.0, 3.0, 9.0
        self.lm_head, self.next_token_head = nn.Linear(V, V, bias=False), nn.Linear(V, V)
        self.lm_head.weight = nn.Parameter(wants)
        nn.init.zeros_(self.next_token_head.weight)
        self.next_token_head.bias = nn.Parameter(9 * nn.functional.one_hot(torch.tensor(EOS), V).float())

    def forward(self, x, t=None):
        return nn.functional.one_hot(x.ids, V).float()


@torch.no_grad()
def test_a_sequence_that_comes_back_to_a_text_is_finished():
    x = closed(([1], [5, 2]), ([1], [4, 4]), ([1], []))
    out, used = medlm.refine(Swap(), x, 16, TOKENS, max_len=torch.full((3,), 9))
    assert out.unpack() == [[1, 5, 2, EOS], [1, 3, 3, EOS], [1, EOS]]
    assert used.tolist() == [2, 2, 1]


@torch.no_grad()
def test_no_response_outgrows_its_room_and_edits_never_write_special_tokens():
    for seed in range(10):
        model = Tiny(seed)
        model.next_token_head.bias.data[[MASK, PAD, DELETE]] = 50
        model.lm_head.bias.data[[MASK, PAD, EOS]] = 50
        settings = {"init_num": 7, "mask_diffusion_step": 2, "edit_diffusion_step": 9}
        steps = []
        decoded = medlm.decode(
            model, [[1], [2, 3]], TOKENS, on_step=lambda *step, to=steps: to.append(step), **settings
        )
        assert max(len(d.response) for d in decoded) <= 7
        for _, x, op, sub, ins, label in steps:
            assert x.max_seqlen <= 2 + 7 + 1
            if label == "edit":
                assert not set(ins.tolist()) & {MASK, PAD, DELETE, EOS}
                assert not set(sub[op == SUB].tolist()) & {MASK, PAD, DELETE, EOS}


@torch.no_grad()
def test_limited_edits_are_the_surest_ones():
    x = closed(([1], [5, 4, 5, 4]))  # Swap is surer about 4 -> 3 than about 5 -> 6
    active = torch.tensor([True])
    op, sub, ins = medlm.propose_edits(Swap(), x, active, TOKENS, torch.tensor([9]), 2)
    assert op.tolist() == [KEEP, KEEP, SUB, KEEP, SUB, KEEP]
    assert sub[op == SUB].tolist() == [3, 3]
    assert (ins == GAP).all()
    *_, odds = medlm.predict_edits(Swap(), x, active, TOKENS)
    assert odds[1:5, 0].tolist() == [5 - 2, 9 - 2, 5 - 2, 9 - 2]


@torch.no_grad()
def test_edits_below_the_least_odds_are_not_made():
    x, active, room = closed(([1], [5, 4, 5, 4])), torch.tensor([True]), torch.tensor([9])  # odds 3, 7, 3, 7
    for least, wanted in [(2.9, 4), (3.1, 2), (7.1, 0)]:
        op, *_ = medlm.propose_edits(Swap(), x, active, TOKENS, room, None, least)
        assert (op == SUB).sum() == wanted


def test_edits_are_counted_by_kind():
    """Wanted: 0 becomes 1, 2 goes, 3 comes behind. Made: 0 becomes 4, 2 goes, 1 goes, 3 and 4 come."""
    from recipes.toy_table import count_edits

    x = closed(([9], [0, 5, 2, 6, 7, 1]))
    op = torch.tensor([KEEP, SUB, KEEP, DEL, KEEP, KEEP, DEL, KEEP], dtype=torch.uint8)
    sub, ins = x.ids.index_fill(0, torch.tensor([1]), 4), torch.full_like(x.ids, GAP)
    ins[0], ins[5] = 4, 3
    assert count_edits(x, (op, sub, ins), [[1, 5, 6, 7, 3, 1]], TOKENS).tolist() == [[1, 1, 0], [1, 2, 1], [1, 2, 1]]


def test_without_room_to_insert_a_limited_pass_deletes_first():
    """The surest single edit is an insertion that does not fit until the deletion at the end has been made."""
    case = {20: (1, [0, 0, 1, 1, 1, 0, 2, 2, 0], [0, 0, 1, 1, 1, 1, 0, 2, 2])}
    steps = {"init_num": 9, "mask_diffusion_step": 1, "edit_diffusion_step": 9, "max_edits": 1}
    assert medlm.decode(Oracle(case), [[20]], TOKENS, **steps)[0].response == case[20][2]


# ---------------------------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("order", medlm.ORDERS)
@pytest.mark.parametrize("max_edits", [None, 3])
def test_a_prompt_decodes_alike_alone_and_in_a_batch(order, max_edits):
    model = checkpoints.new_model("medlm", "tiny", V, seed=1).eval()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 50, n).tolist() for n in (1, 7, 3, 12, 2)]
    settings = {
        "init_num": 13,
        "mask_diffusion_step": 5,
        "edit_diffusion_step": 6,
        "order": order,
        "max_edits": max_edits,
    }
    together = medlm.decode(model, prompts, TOKENS, seeds=range(5), **settings)
    assert len({tuple(d.response) for d in together}) > 1
    for i, prompt in enumerate(prompts):
        assert medlm.decode(model, [prompt], TOKENS, seeds=[i], **settings) == [together[i]]


def test_decode_with_nothing_to_do():
    assert medlm.decode(Tiny(), [], TOKENS) == []
    model = Oracle({20: (1, [], [])})
    for init_num, edits, passes in ((0, 3, (0, 1)), (2, 0, (2, 0))):
        steps = {"init_num": init_num, "mask_diffusion_step": 4, "edit_diffusion_step": edits}
        (one,) = medlm.decode(model, [[20]], TOKENS, **steps)
        assert (one.response, one.draft, one.tokens, tuple(one.passes.values())) == ([], [], [EOS], passes)
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        medlm.decode(Tiny(), [[1], []], TOKENS)


def test_special_tokens_names_what_is_missing():
    full = SimpleNamespace(mask_id=1, pad_id=2, del_id=3, eos_id=4, bos_id=None)
    assert methods.special_tokens(medlm, full) == {"mask": 1, "pad": 2, "del": 3, "eos": 4}
    full.del_id = None
    with pytest.raises(ValueError, match=r"no del token.*convert.py --to medlm"):
        methods.special_tokens(medlm, full)


# ---------------------------------------------------------------------------------------------------- frozen spans

ids = st.integers(0, V - 1)  # special tokens included
spans = st.lists(st.tuples(st.booleans(), ids), max_size=6)  # of a draft: (kept, token)
frozen_cases = st.tuples(st.lists(ids, min_size=1, max_size=3), spans, st.lists(ids, max_size=3))


def frozen_spans(prompt, span, suffix):
    """Runs of tokens that must stay and stay together: the prompt, every kept run, the suffix."""
    runs = [[token for _, token in run] for kept, run in itertools.groupby(span, lambda s: s[0]) if kept]
    return [prompt, *runs, *([suffix] if suffix else [])]


def holds(row, runs):
    """Whether the runs stand in the row in this order: the first at its start, the last, if it is a suffix, anywhere
    behind the others."""
    if not runs:
        return True
    n = len(runs[0])
    return any(row[i : i + n] == runs[0] and holds(row[i + n :], runs[1:]) for i in range(len(row) - n + 1))


@given(
    st.lists(frozen_cases, min_size=1, max_size=4), st.integers(0, 10**6), st.booleans(), st.booleans(),
    st.sampled_from([None, 2]),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_no_token_of_a_frozen_span_ever_changes_moves_or_is_split(cases, seed, drafted, suffixed, max_edits):
    model, states = Tiny(seed), []
    given_drafts = {}
    if drafted:
        given_drafts["drafts"] = [[token for _, token in span] for _, span, _ in cases]
        given_drafts["keep"] = [[kept for kept, _ in span] for _, span, _ in cases]
    if suffixed:
        given_drafts["suffixes"] = [[*suffix, EOS] for *_, suffix in cases]
    decoded = medlm.decode(
        model, [prompt for prompt, *_ in cases], TOKENS, **given_drafts, init_num=5, mask_diffusion_step=2,
        edit_diffusion_step=4, max_edits=max_edits, on_step=lambda t, *step: states.append(step),
    )  # fmt: skip
    texts = [[x.unpack() for x in (x, apply_edits(x, *edits))] for x, *edits, _ in states]
    texts = [rows for pair in texts for rows in pair]
    ends = [[*suffix, EOS] if suffixed else [] for *_, suffix in cases]
    texts.append([prompt + d.tokens + end for (prompt, *_), d, end in zip(cases, decoded, ends)])
    for rows in texts:
        for row, (prompt, span, suffix) in zip(rows, cases):
            suffix = [*suffix, EOS] if suffixed else []
            assert row[: len(prompt)] == prompt
            assert row[len(row) - len(suffix) :] == suffix
            assert holds(row, frozen_spans(prompt, span if drafted else [], suffix))
    assert all(d.tokens == d.response + ([] if suffixed else [EOS]) for d in decoded)


@given(st.lists(st.tuples(st.integers(1, 3), texts, texts, suffixes), min_size=1, max_size=4))
@settings(deadline=None)
def test_a_given_draft_is_edited_and_no_mask_is_filled(cases):
    known = {20 + i: (n, draft, target, suffix) for i, (n, draft, target, suffix) in enumerate(cases)}
    model = Oracle(known)
    prompts = [[20 + i, *[9] * (n - 1)] for i, (n, *_) in enumerate(cases)]
    decoded = medlm.decode(
        model, prompts, TOKENS, drafts=[draft for _, draft, *_ in cases], suffixes=[s for *_, s in cases], init_num=9,
        edit_diffusion_step=12,
    )  # fmt: skip
    assert [d.draft for d in decoded] == [draft for _, draft, *_ in cases]
    assert [d.response for d in decoded] == [target for *_, target, _ in cases]
    assert all(d.passes["mask_passes"] == 0 for d in decoded)
    assert model.forwards == max(d.passes["edit_passes"] for d in decoded)


def test_the_masks_stand_between_prompt_and_suffix_and_no_text_outgrows_the_positions():
    for seed in range(10):
        model = Tiny(seed)
        model.next_token_head.bias.data[3] = 50  # inserts wherever it may
        rows = []
        decoded = medlm.decode(
            model, [[1, 2], [3]], TOKENS, suffixes=[[7, EOS], [5, 6, EOS]], init_num=4, mask_diffusion_step=2,
            edit_diffusion_step=6, max_positions=7, on_step=lambda t, x, *_, rows=rows: rows.append(x.unpack()),
        )  # fmt: skip
        assert rows[0] == [[1, 2, *[MASK] * 4, 7, EOS], [3, *[MASK] * 4, 5, 6, EOS]]
        assert all(len(d.tokens) + n <= 8 for d, n in zip(decoded, (4, 4)))  # with prompt and suffix


def test_behind_a_response_its_suffix_is_the_label_even_where_the_wanted_text_goes_on_as_the_suffix_does():
    x = frozen_text([[9]], [[1]], [[3, 4, EOS]])
    for wanted in ([1], [1, 3]):
        batch = medlm.label_drafts(x, [wanted], TOKENS)
        assert batch.next_row.tolist() == [0, 1]
        assert batch.next_token.tolist() == [1, 3]  # 3 stands there already


def test_a_suffix_is_trained_around():
    examples = [example([1, 2], [3, 4, PAD], [7, EOS]), example([1], [5], [EOS]), example([6], [3, EOS])]
    for seed in range(10):
        batch, _ = mask_batch(examples, seed)
        assert set(batch.lm_row.tolist()) <= {2, 3, 4, 8, 11, 12}
        plan = medlm.RolloutPlan(2, 6, 0.9)
        batch = medlm.rollout(Tiny(seed), examples, plan, TOKENS, min_t=0.5, max_t=1.0, generator=seeded(seed))
        rows, frozen = batch.x.unpack(), batch.x.frozen.split(batch.x.lengths.tolist())
        ends = [e.suffix or [EOS] for e in examples]
        assert [row[-len(end) :] for row, end in zip(rows, ends)] == ends
        for e, states, end in zip(examples, frozen, ends):
            middle = len(states) - len(e.prompt) - len(end)
            start = [FROZEN] * (len(e.prompt) - 1) + [ANCHOR]
            assert states.tolist() == start + [FREE] * middle + [FROZEN] * len(end)
        assert set(batch.lm_row.tolist()) == set((batch.x.frozen == FREE).nonzero().flatten().tolist())


# ---------------------------------------------------------------------------------------------------- rollouts


@given(st.floats(0, 1), st.integers(1, 40), st.integers(0, 1000))
def test_plans_stay_within_their_limits_and_agree_for_the_same_generator(progress, max_steps, seed):
    plan = medlm.plan_rollout(progress, [2, 4, 8], max_steps, seeded(seed))
    assert plan == medlm.plan_rollout(progress, [2, 4, 8], max_steps, seeded(seed))
    assert plan.tokens_per_pass in (2, 4, 8)
    for mask_passes in range(max_steps + 1):
        assert 0 <= plan.edit_passes(mask_passes) <= progress * (max_steps - mask_passes + 1)
        assert mask_passes + plan.edit_passes(mask_passes) <= max_steps


def test_edits_alone_are_limited_by_progress_and_filling_takes_as_long_as_it_takes():
    plan = medlm.plan_rollout(0.6, [2], 8, seeded(0), edits_alone=True)
    assert plan.edit_passes(99) == 4
    assert plan.mask_passes(torch.tensor([0, 3, 41])).tolist() == [0, 2, 21]
    together = medlm.plan_rollout(0.6, [2], 8, seeded(0))
    assert together.mask_passes(torch.tensor([0, 3, 41])).tolist() == [0, 2, 8]


def test_one_t_for_a_batch_is_the_same_for_all_its_samples():
    examples = [example([1], [5] * 2000)] * 4
    batch = medlm.mask_batch(examples, mask_id=MASK, min_t=0.1, max_t=1.0, generator=seeded(1), one_t=True)
    masked = (batch.x.ids == MASK).view(4, -1).float().mean(1)
    assert (masked - masked.mean()).abs().max() < 0.05
    assert len(batch.lm_weight.unique()) == 1


def test_edit_passes_grow_with_progress_and_are_uniform():
    shared = seeded(0)
    assert {medlm.plan_rollout(0.0, [2], 8, shared).edit_passes(2) for _ in range(50)} == {0}
    counts = Counter(medlm.plan_rollout(1.0, [2], 8, shared).edit_passes(2) for _ in range(3500))
    assert sorted(counts) == [0, 1, 2, 3, 4, 5, 6]
    assert all(abs(n - 500) < 100 for n in counts.values())


def rollout_examples(seed):
    draw = np.random.default_rng(seed)
    lengths = [6, 0, 11, 1, 3]
    return [
        example([20 + i] + [8] * (i % 3), [*draw.integers(0, 4, n).tolist(), EOS] + [PAD] * (3 * (i % 2)))
        for i, n in enumerate(lengths)
    ]


def slow_edit_loss(model, rows, prompt_len, clean, ts=None):
    """Mean over samples of the mean over rows; with the masked fractions ts, mean over all rows of the loss / t."""
    lm, following, counts = [], [], [0, 0]
    for b, (row, n, target) in enumerate(zip(rows, prompt_len, clean)):
        hidden = model(Ragged.pack([row]))
        token, insert = edit_labels(row[n:-1], target, DELETE, EOS)
        labels = [*token.tolist(), *([] if ts is None else [EOS])]  # the end-of-message is supervised, too
        ce = [-model.lm_head(hidden[n + i]).log_softmax(-1)[label] for i, label in enumerate(labels)]
        lm += [sum(ce) / (len(ce) if ts is None else ts[b])] if ce else []
        counts[0] += len(ce)
        ce = [
            -model.next_token_head(hidden[n - 1 + k]).log_softmax(-1)[label]
            for k, label in enumerate(insert)
            if label != -100
        ]
        following.append(sum(ce) / (len(ce) if ts is None else ts[b]))
        counts[1] += len(ce)
    counts = [max(len(lm), 1), len(following)] if ts is None else counts
    return sum(lm) / counts[0], sum(following) / counts[1]


@pytest.mark.parametrize("norm", NORMS)
def test_rollouts_carry_the_labels_of_their_own_drafts_and_the_loss_equals_the_slow_version(norm):
    for seed in range(6):
        model, examples = Tiny(seed), rollout_examples(seed)
        plan = medlm.RolloutPlan(tokens_per_pass=2, max_passes=6, edit_share=0.7)
        limits = {"min_t": 0.0, "max_t": 0.9, "loss_norm": norm}
        batch = medlm.rollout(model, examples, plan, TOKENS, **limits, generator=seeded(seed))
        ts = stratified(5, 0.0, 0.9, seeded(seed)).clamp(min=medlm.MIN_T)  # the first thing that is drawn
        prompt_len = [len(e.prompt) for e in examples]
        rows = batch.x.unpack()
        clean = [e.response[: e.response.index(EOS)] for e in examples]
        distances = []
        for row, e, target in zip(rows, examples, clean):
            assert row[: len(e.prompt)] == e.prompt
            assert row[-1] == EOS
            assert not set(row[len(e.prompt) : -1]) & set(TOKENS.values())
            assert len(row) - 1 <= len(e.prompt) + len(e.response)
            distances.append(distance(row[len(e.prompt) : -1], target))
        assert batch.counts["edit_distance"] == pytest.approx(sum(distances) / len(distances))
        assert batch.counts["mask_passes"] + batch.counts["edit_passes"] <= 6
        loss, metrics = medlm.loss(model, batch)
        lm, following = slow_edit_loss(model, rows, prompt_len, clean, ts if norm == "tokens" else None)
        assert torch.allclose(metrics["loss_edit_lm"], lm, rtol=1e-4)
        assert torch.allclose(metrics["loss_edit_next"], following, rtol=1e-4)
        assert torch.allclose(loss, lm + following, rtol=1e-4)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_an_empty_rollout_trains_the_insertion_behind_the_prompt_and_nothing_else():
    batch = medlm.label_drafts(closed(([8, 9], []), ([8], [])), [[3, 1], []], TOKENS)
    assert len(batch.lm_row) == 0
    assert batch.next_row.tolist() == [1, 3]
    assert batch.next_token.tolist() == [3, EOS]
    model = Tiny()
    loss, _ = medlm.loss(model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_rollout_is_deterministic_and_leaves_no_gradient():
    model, plan = Tiny(), medlm.RolloutPlan(4, 8, 0.9)
    a, b = (
        medlm.rollout(model, rollout_examples(0), plan, TOKENS, min_t=0.0, max_t=1.0, generator=seeded(2))
        for _ in range(2)
    )
    assert a.x.unpack() == b.x.unpack()
    assert all(p.grad is None for p in model.parameters())


def test_filling_takes_as_many_passes_as_planned_and_never_more_than_the_limit():
    answers = [example([20], [1] * 30 + [EOS])]
    for per_pass, limit, most in [(2, 32, 16), (16, 32, 2), (2, 4, 4)]:
        model = Oracle({20: (1, [1] * 30 + [EOS], [1] * 30)})
        batch = medlm.rollout(
            model, answers, medlm.RolloutPlan(per_pass, limit, 0.0), TOKENS, min_t=0.99, max_t=1.0, generator=seeded(0)
        )
        assert batch.counts["mask_passes"] == model.forwards
        assert most - 1 <= batch.counts["mask_passes"] <= most


@pytest.mark.parametrize(
    ("response", "name"),
    [([1, EOS, 2], "eos"), ([1, PAD, 2, EOS], "pad"), ([DELETE, EOS], "del"), ([1, MASK], "mask"), ([EOS, 2], "eos")],
)
def test_responses_that_cannot_be_labelled_are_refused(response, name):
    with pytest.raises(ValueError, match=f"holds the {name} token"):
        medlm.response_text(response, TOKENS)


def test_response_text_ends_before_eos_and_pads():
    assert medlm.response_text([1, 2, EOS, PAD, PAD], TOKENS) == [1, 2]
    assert medlm.response_text([1, 2], TOKENS) == medlm.response_text([1, 2, PAD], TOKENS) == [1, 2]
    assert medlm.response_text([EOS], TOKENS) == medlm.response_text([], TOKENS) == []


def uneven_case(rank):
    """Rank 0's one draft is right at once; rank 1 has many masks and a long way to go."""
    if rank == 0:
        return [example([20], [1, EOS])], Oracle({20: (1, [1, EOS], [1])})
    target = [0, 1, 2, 3] * 5
    return [example([21], [*target, EOS])], Oracle({21: (1, [3] * 20 + [EOS], target)})


def uneven_rollout(rank, directory=None):
    """One rank's rollout; with a directory, as one of two gloo processes, its counts written there."""
    if directory:
        torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    examples, model = uneven_case(rank)
    plan = medlm.plan_rollout(1.0, [2, 4], 32, seeded(4))
    batch = medlm.rollout(model, examples, plan, TOKENS, min_t=0.9, max_t=1.0, generator=seeded(rank))
    counts = [model.forwards, batch.counts["mask_passes"], batch.counts["edit_passes"]]
    if directory:
        torch.save(torch.tensor([*counts, batch.counts["edit_distance"]]), f"{directory}/{rank}")
        torch.distributed.destroy_process_group()
    return counts


@pytest.mark.slow
def test_ranks_make_equally_many_forward_passes_when_one_finishes_early(tmp_path):
    alone = [uneven_rollout(rank) for rank in range(2)]
    assert alone[0][0] < alone[1][0]
    mp.spawn(uneven_rollout, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)).tolist() for rank in range(2)]
    assert ranks[0][0] == ranks[1][0]
    assert [counts[1:3] for counts in ranks] == [counts[1:] for counts in alone], "what comes out is each one's own"
    assert ranks[0][3] == ranks[1][3] == 0  # the oracle's edits have reached both targets


def test_every_text_of_a_rollout_is_filled_in_an_order_of_its_own(monkeypatch):
    given = []
    fill = medlm.fill_masks
    monkeypatch.setattr(medlm, "fill_masks", lambda *a, seeds, **b: given.append(seeds) or fill(*a, seeds=seeds, **b))
    plan, limits = medlm.RolloutPlan(1, 8, 0.0), {"min_t": 1.0, "max_t": 1.0}
    for seed in range(2):
        medlm.rollout(Tiny(), rollout_examples(0), plan, TOKENS, **limits, generator=seeded(seed))
    assert len(torch.cat(given).unique()) == sum(map(len, given))
