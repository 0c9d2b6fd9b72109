"""What ragged.py promises: packing loses nothing, edits do what a list would do, every draw of noise has an address."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ragged
from ragged import DEL, GAP, INS, KEEP, SUB, Ragged, apply_edits, uniform_noise, weighted_nll

SEQUENCES = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=5)
INT64 = st.integers(-(2**63), 2**63 - 1)


# ---------------------------------------------------------------------------------------------------- batches


@settings(deadline=None, max_examples=60)
@given(SEQUENCES)
def test_pack_and_unpack_are_inverse_and_every_field_says_the_same(sequences):
    x = Ragged.pack(sequences)
    assert x.unpack() == sequences
    assert len(x) == len(sequences)
    assert (x.ids.dtype, x.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert x.cu_seqlens.tolist() == [sum(map(len, sequences[:b])) for b in range(len(sequences) + 1)]
    assert x.max_seqlen == max(map(len, sequences), default=0)
    assert x.lengths.tolist() == list(map(len, sequences))
    assert x.batch.tolist() == [b for b, s in enumerate(sequences) for _ in s]
    assert x.positions.tolist() == [i for s in sequences for i in range(len(s))]
    assert (x.batch.dtype, x.positions.dtype) == (torch.int64, torch.int64)


@settings(deadline=None, max_examples=60)
@given(SEQUENCES)
def test_lists_arrays_tensors_and_flat_rows_pack_alike(sequences):
    x = Ragged.pack(sequences)
    assert Ragged.pack([np.array(s, np.int32) for s in sequences]).unpack() == sequences
    assert Ragged.pack([torch.tensor(s, dtype=torch.int64) for s in sequences]).unpack() == sequences
    assert Ragged.from_lengths(x.ids, x.lengths).unpack() == sequences
    assert x.to("cpu").unpack() == sequences


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=6), st.booleans()), max_size=5))
def test_select_keeps_the_chosen_sequences(rows):
    chosen = torch.tensor([keep for _, keep in rows], dtype=torch.bool)
    part = Ragged.pack([s for s, _ in rows]).select(chosen)
    assert part.unpack() == [s for s, keep in rows if keep]
    assert part.max_seqlen == max((len(s) for s, keep in rows if keep), default=0)


# ---------------------------------------------------------------------------------------------------- edits


@st.composite
def texts_and_edits(draw):
    sequences = draw(SEQUENCES)
    one = st.tuples(st.sampled_from([KEEP, SUB, DEL]), st.integers(0, 9), st.sampled_from([GAP, *range(10)]))
    return sequences, [draw(st.lists(one, min_size=len(s), max_size=len(s))) for s in sequences]


@settings(deadline=None, max_examples=60)
@given(texts_and_edits())
def test_apply_edits_equals_editing_lists(case):
    sequences, edits = case
    expected = []
    for sequence, row in zip(sequences, edits):
        text = []
        for token, (op, sub_token, ins_token) in zip(sequence, row):
            text += {KEEP: [token], SUB: [sub_token], DEL: []}[op]
            text += [] if ins_token == GAP else [ins_token]
        expected.append(text)
    flat = [edit for row in edits for edit in row]
    op, sub_token, ins_token = (torch.tensor([e[k] for e in flat], dtype=torch.int64) for k in range(3))
    x = Ragged.pack(sequences)
    y = apply_edits(x, op.to(torch.uint8), sub_token, ins_token)
    assert y.unpack() == expected
    assert y.max_seqlen == max(map(len, expected), default=0)
    assert (y.ids.dtype, y.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert x.unpack() == sequences  # the old row is left alone


def test_edit_codes_are_the_ones_of_the_edit_scripts():
    import edit_distance

    ours = (KEEP, SUB, DEL, INS, GAP)
    theirs = (edit_distance.KEEP, edit_distance.SUB, edit_distance.DEL, edit_distance.INS, edit_distance.GAP)
    assert ours == theirs
    assert edit_distance.edit_script([1, 2, 3], [1, 4, 3, 5]).tolist() == [KEEP, SUB, KEEP, INS]


# ---------------------------------------------------------------------------------------------------- noise


def splitmix64(z):
    """One output of SplitMix64 from state z, on Python's unbounded integers."""
    word = 2**64 - 1
    z = (z + 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


@settings(deadline=None, max_examples=60)
@given(INT64, st.integers(0, 10_000), st.integers(0, 100_000), st.integers(0, 7))
def test_noise_is_the_documented_hash_of_its_address(seed, step, position, stream):
    key = splitmix64(splitmix64(seed % 2**64) + step * 8 + stream)
    expected = ((splitmix64(key + position) >> 12) + 0.5) / 2**52
    u = uniform_noise(torch.tensor([seed]), step, torch.tensor([position]), stream)
    assert u.dtype == torch.float64
    assert u.tolist() == [expected]
    assert 0 < expected < 1


def test_splitmix64_gives_the_published_first_numbers():
    # the reference implementation seeded with 1234567
    gold = 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567 + i * gold) for i in range(3)] == expected


def draws(n, *, seed=0, step=0, stream=0):
    return uniform_noise(torch.full((n,), seed), step, torch.arange(n), stream)


@pytest.mark.parametrize(
    "u",
    [
        draws(20_000),
        uniform_noise(torch.arange(20_000), 3, torch.zeros(20_000, dtype=torch.int64), 1),  # along seeds
        torch.cat([draws(1, seed=5, step=k) for k in range(3_000)]),  # along steps
        torch.cat([draws(1, seed=s, stream=k) for s in range(400) for k in range(8)]),  # along streams
    ],
    ids=["positions", "seeds", "steps", "streams"],
)
def test_noise_is_uniform_in_every_direction(u):
    """Kolmogorov-Smirnov: the largest distance to the uniform distribution function; 1.95 / sqrt(n) has p = 0.001."""
    u, n = u.sort().values, len(u)
    above, below = torch.arange(1, n + 1) / n - u, u - torch.arange(n) / n
    assert max(above.max(), below.max()) < 1.95 / math.sqrt(n)


def test_seeds_steps_streams_and_neighbouring_positions_are_uncorrelated():
    n = 20_000
    base = draws(n)
    for other in (draws(n, seed=1), draws(n, step=1), *(draws(n, stream=k) for k in range(1, 8)), base.roll(1)):
        assert not torch.equal(other, base)
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1]) < 4 / math.sqrt(n)


def test_no_two_of_many_addresses_share_a_draw():
    seen = [draws(200, seed=s, step=k, stream=j) for s in range(10) for k in range(10) for j in range(8)]
    assert torch.cat(seen).unique().numel() == 160_000


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 5)), min_size=1, max_size=6), st.randoms())
def test_a_sequences_noise_depends_on_its_own_address_only(rows, random):
    """rows: (seed, length). Alone, in a batch, in another order: the same numbers."""

    def noise(rows):
        x = Ragged.pack([[0] * n for _, n in rows])
        seed = torch.tensor([seed for seed, _ in rows])
        u = uniform_noise(seed[x.batch], 4, x.positions, torch.arange(5)[:, None])  # [5, T], all streams at once
        for stream in range(5):
            assert torch.equal(u[stream], uniform_noise(seed[x.batch], 4, x.positions, stream))
        return [u[:, x.batch == b].tolist() for b in range(len(rows))]

    together = dict(zip(rows, noise(rows)))
    shuffled = random.sample(rows, len(rows))
    assert dict(zip(shuffled, noise(shuffled))) == together
    for row in rows:
        assert noise([row])[0] == together[row]


# ---------------------------------------------------------------------------------------------------- cross-entropy


def full_nll(hidden, head, row, token, weight):
    """All [N, V] log-probabilities, then the ones asked for."""
    return (weight * -head(hidden).log_softmax(-1)[row, token]).sum()


def nll_case(N, E, bias, seed, V=13, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    head = nn.Linear(6, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=dtype))
    hidden = torch.randn(N, 6, generator=rng, dtype=dtype, requires_grad=True)
    row, token = (torch.randint(0, high, (E if N else 0,), generator=rng) for high in (max(N, 1), V))
    return hidden, head, row, token, torch.rand(len(row), generator=rng)


@given(
    N=st.integers(0, 90),
    E=st.sampled_from([0, 1, 5, 100]),
    bias=st.booleans(),
    chunk=st.sampled_from([1, 26, 13 * 7, 13 * 64, 1 << 24]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_weighted_nll_and_its_gradients_equal_a_full_softmax(N, E, bias, chunk, seed):
    hidden, head, row, token, weight = nll_case(N, E, bias, seed, dtype=torch.float32)
    inputs = (hidden, *head.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "CHUNK", chunk)
        loss = weighted_nll(hidden, head, row, token, weight)
    expected = full_nll(hidden, head, row, token, weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    # twice the loss: the incoming gradient counts
    ours, theirs = (torch.autograd.grad(2 * out, inputs) for out in (loss, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_weighted_nll_of_nothing_is_zero_with_zero_gradients():
    for N, E in ((0, 0), (4, 0)):
        hidden, head, row, token, weight = nll_case(N, E, True, 0)
        loss = weighted_nll(hidden, head, row, token, weight)
        loss.backward()
        assert loss == 0
        assert all((p.grad == 0).all() for p in (hidden, *head.parameters())), "they take part, as DDP asks"


def test_weighted_nll_survives_huge_logits():
    hidden, head, row, token, weight = nll_case(20, 30, True, 1, dtype=torch.float32)
    loss = weighted_nll(hidden * 1e4, head, row, token, weight)
    torch.testing.assert_close(loss, full_nll(hidden * 1e4, head, row, token, weight), rtol=1e-5, atol=0)


def test_weighted_nll_under_bf16_autocast_is_close():
    hidden, head, row, token, weight = nll_case(70, 200, True, 2, dtype=torch.float32)
    inputs = (hidden, *head.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = weighted_nll(hidden, head, row, token, weight)
    assert loss.dtype == torch.float32
    expected = full_nll(hidden, head, row, token, weight)
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_weighted_nll_never_holds_all_logits(monkeypatch):
    """One chunk of logits at a time: nothing that is saved or made reaches rows x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(ragged, "CHUNK", 64 * 500)
    hidden, head, row, token, weight = nll_case(640, 2000, False, 0, V=500, dtype=torch.float32)
    with Watch():
        weighted_nll(hidden, head, row, token, weight).backward()
    assert largest <= 64 * 500


def test_stratified_numbers_lie_one_in_each_stratum_in_random_order():
    rng = torch.Generator().manual_seed(0)
    many = torch.stack([ragged.stratified(5, 2.0, 3.0, rng) for _ in range(2000)])
    stratum = ((many - 2.0) * 5).floor()
    assert torch.equal(stratum.sort(dim=1).values, torch.arange(5.0).expand(2000, 5))
    assert (stratum.mean(0) - 2).abs().max() < 0.2
    assert ((many - 2.0) * 5 - stratum).mean().item() == pytest.approx(0.5, abs=0.02)
