"""Edit distance: the C file against the plain-Python twin, the promises made about labels, and bad input."""

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

import edit_distance
from edit_distance import (
    DEL,
    GAP,
    INS,
    KEEP,
    SUB,
    align,
    align_batch,
    distance,
    edit_labels,
    edit_labels_batch,
    edit_script,
    edit_scripts,
    script_in_python,
)

ROOT = Path(edit_distance.__file__).parent
DEL_ID, EOS_ID = 1001, 1002
BORDERS = [0, 1, 2, 63, 64, 65, 127, 128, 129]  # a machine word holds 64 rows of the table
INT32 = st.integers(-(2**31), 2**31 - 1)


def labels_in_python(noisy: list, clean: list, script, del_id: int, eos_id: int, ignore_id: int = -100):
    """`edit_labels` from a script, column by column."""
    right, j = [*clean, eos_id], 0  # right[j] comes next
    token_target, insert_target = [], [right[0]]
    for op in script:
        j += op != DEL
        if op != INS:
            token_target.append(del_id if op == DEL else right[j - 1])
            insert_target.append(ignore_id if op == DEL else right[j])
    return token_target, insert_target


@st.composite
def pairs(draw, longest=40):
    """Two related or unrelated sequences; few symbols, since ties are what a wrong trace trips over."""
    symbols = st.one_of(st.integers(0, draw(st.sampled_from([0, 1, 2, 4, 20]))), st.sampled_from([7, 2**31 - 1]))
    clean = draw(st.lists(symbols, max_size=longest))
    if draw(st.booleans()):
        return draw(st.lists(symbols, max_size=longest)), clean
    noisy = list(clean)
    edits = st.tuples(st.integers(0, longest), st.integers(0, 2), symbols)
    for place, kind, token in draw(st.lists(edits, max_size=6)):
        noisy[place : place + (kind > 0)] = [token] if kind < 2 else []
    return noisy, clean


def random_tokens(rng, length, symbols):
    return rng.integers(0, symbols, length).tolist()


def test_the_compiled_version_is_in_use():
    assert edit_distance._compiled is not None


@settings(max_examples=1000, deadline=None)
@given(pairs())
def test_script_is_the_canonical_one(pair):
    assert edit_script(*pair).tolist() == script_in_python(*pair)


@settings(max_examples=100, deadline=None)
@given(st.lists(INT32, max_size=12), st.lists(INT32, max_size=12))
def test_script_for_any_int32(noisy, clean):
    assert edit_script(noisy, clean).tolist() == script_in_python(noisy, clean)


@pytest.mark.parametrize("symbols", [1, 2, 3, 1000])
def test_script_at_word_borders(symbols):
    rng = np.random.default_rng(symbols)
    noisy = [random_tokens(rng, n, symbols) for n in BORDERS for _ in BORDERS]
    clean = [random_tokens(rng, m, symbols) for _ in BORDERS for m in BORDERS]
    for script, x, y in zip(edit_scripts(noisy, clean), noisy, clean):
        assert script.tolist() == script_in_python(x, y)


@pytest.mark.parametrize(("n", "m"), [(513, 70), (3, 1030), (1025, 130), (600, 600)])
def test_script_of_a_long_pair(n, m):
    rng = np.random.default_rng(n)
    noisy, clean = random_tokens(rng, n, 3), random_tokens(rng, m, 3)
    assert edit_script(noisy, clean).tolist() == script_in_python(noisy, clean)


def test_short_and_long_pairs_in_one_batch():
    """The memory is kept from pair to pair: nothing of a pair is left for the next one."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([0, 3, 64, 100, 300], (24, 2)).tolist()
    noisy = [random_tokens(rng, n, 5) for n, _ in lengths]
    clean = [random_tokens(rng, m, 5) if rng.random() < 0.8 else [9, *x] for (_, m), x in zip(lengths, noisy)]
    for script, x, y in zip(edit_scripts(noisy, clean), noisy, clean):
        assert script.tolist() == script_in_python(x, y)


def brute_force_canonical(noisy, clean):
    """All scripts of a tiny pair, then the best: fewest edits, then first in KEEP < SUB < DEL < INS order."""
    if not noisy and not clean:
        return []
    found = []
    if noisy and clean:
        op = KEEP if noisy[0] == clean[0] else SUB
        found.append([op, *brute_force_canonical(noisy[1:], clean[1:])])
    if noisy:
        found.append([DEL, *brute_force_canonical(noisy[1:], clean)])
    if clean:
        found.append([INS, *brute_force_canonical(noisy, clean[1:])])
    return min(found, key=lambda script: (sum(op != KEEP for op in script), script))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=4), st.lists(st.integers(0, 2), max_size=4))
def test_the_python_version_is_canonical(noisy, clean):
    assert script_in_python(noisy, clean) == brute_force_canonical(noisy, clean)


@settings(max_examples=100, deadline=None)
@given(st.lists(pairs(), max_size=8))
def test_a_batch_is_its_pairs(batch):
    noisy, clean = [x for x, _ in batch], [y for _, y in batch]
    assert [s.tolist() for s in edit_scripts(noisy, clean)] == [edit_script(x, y).tolist() for x, y in batch]
    labels = edit_labels_batch(noisy, clean, DEL_ID, EOS_ID)
    for (token_target, insert_target), (x, y) in zip(labels, batch, strict=True):
        alone = edit_labels(x, y, DEL_ID, EOS_ID)
        assert (token_target.tolist(), insert_target.tolist()) == (alone[0].tolist(), alone[1].tolist())


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_align_gives_both_sequences_back(pair):
    z0, z1 = align(*pair)
    assert z0.dtype == z1.dtype == np.int64
    assert len(z0) == len(z1)
    assert (z0[z0 != GAP].tolist(), z1[z1 != GAP].tolist()) == pair
    assert not ((z0 == GAP) & (z1 == GAP)).any()
    assert (z0 != z1).sum() == distance(*pair)


@settings(max_examples=100, deadline=None)
@given(st.lists(pairs(), max_size=8))
def test_align_batch_is_align_pair_by_pair(batch):
    z0, z1, columns = align_batch([x for x, _ in batch], [y for _, y in batch])
    assert z0.dtype == z1.dtype == columns.dtype == np.int64
    expected = [align(*pair) for pair in batch]
    assert columns.tolist() == [len(a) for a, _ in expected]
    assert z0.tolist() == [token for a, _ in expected for token in a.tolist()]
    assert z1.tolist() == [token for _, b in expected for token in b.tolist()]


@settings(max_examples=300, deadline=None)
@given(pairs())
def test_distance_agrees_with_rapidfuzz(pair):
    assert distance(*pair) == Levenshtein.distance(*pair)


@settings(max_examples=500, deadline=None)
@given(pairs())
def test_labels_agree_with_the_python_version(pair):
    token_target, insert_target = edit_labels(*pair, DEL_ID, EOS_ID, ignore_id=-7)
    assert token_target.dtype == insert_target.dtype == np.int64
    expected = labels_in_python(*pair, script_in_python(*pair), DEL_ID, EOS_ID, ignore_id=-7)
    assert (token_target.tolist(), insert_target.tolist()) == expected


def test_labels_of_a_worked_example():
    # keep 1 5, insert 5 (6 is for the next pass), keep 7 8, delete 9
    token_target, insert_target = edit_labels([1, 5, 7, 8, 9], [1, 5, 5, 6, 7, 8], DEL_ID, EOS_ID)
    assert token_target.tolist() == [1, 5, 7, 8, DEL_ID]
    assert insert_target.tolist() == [1, 5, 5, 8, EOS_ID, -100]


def apply_labels(noisy, token_target, insert_target):
    """One decoding pass: every survivor (or the end) takes the insertion of the gap before the deletions in front."""
    result, gap = [], 0
    for k, token in enumerate([*token_target, EOS_ID]):
        if token == DEL_ID:
            continue
        assert insert_target[gap] != -100, "an unsupervised gap was asked"
        if insert_target[gap] != token:
            result.append(insert_target[gap])
        result.append(token)
        gap = k + 1
    return result[:-1]


@settings(max_examples=500, deadline=None)
@given(pairs(longest=25))
def test_every_pass_of_fresh_labels_comes_closer(pair):
    noisy, clean = pair
    left = distance(noisy, clean)
    while left:
        labels = edit_labels(noisy, clean, DEL_ID, EOS_ID)
        noisy = apply_labels(noisy, labels[0].tolist(), labels[1].tolist())
        closer = distance(noisy, clean)
        assert closer < left
        left = closer
    assert noisy == clean


@settings(max_examples=300, deadline=None)
@given(pairs())
def test_labels_are_never_ambiguous(pair):
    """An insertion never equals the token on its right, and never touches a deletion."""
    noisy, clean = pair
    script = edit_script(noisy, clean).tolist()
    assert not any({a, b} == {INS, DEL} for a, b in pairwise(script))
    j, gap = 0, 0
    _, insert_target = edit_labels(noisy, clean, DEL_ID, EOS_ID)
    for k, op in enumerate(script):
        if op == INS and (k == 0 or script[k - 1] != INS):
            run = next((i for i in range(k, len(script)) if script[i] != INS), len(script)) - k
            assert insert_target[gap] == clean[j]
            assert insert_target[gap] != [*clean, EOS_ID][j + run]
        gap += op != INS
        j += op != DEL


@pytest.mark.parametrize("special", [DEL_ID, EOS_ID])
def test_special_tokens_only_in_noisy(special):
    edit_labels([1, special, 2], [1, 2], DEL_ID, EOS_ID)
    with pytest.raises(ValueError, match=r"clean\[1\] contains del_id or eos_id"):
        edit_labels_batch([[1], [2]], [[1], [2, special]], DEL_ID, EOS_ID)


@pytest.mark.parametrize("make", [list, tuple, np.array, lambda x: np.array(x, np.int16), lambda x: np.array(x, ">i8")])
def test_accepted_sequences(make):
    assert edit_script(make([1, 2, 3]), make([1, 3])).tolist() == [KEEP, DEL, KEEP]
    assert edit_script([1, 2, 3], np.array([1, 2, 3, 9], np.uint64)[::3]).tolist() == [KEEP, SUB, DEL]


@pytest.mark.parametrize("empty", [[], (), np.array([], np.int64)])
def test_empty_sequences(empty):
    assert distance(empty, empty) == 0
    assert edit_script(empty, [1, 2]).tolist() == [INS, INS]
    assert edit_script([1, 2], empty).tolist() == [DEL, DEL]
    assert edit_scripts([], []) == edit_labels_batch([], [], DEL_ID, EOS_ID) == []
    assert [row.tolist() for row in align_batch([], [])] == [[], [], []]
    token_target, insert_target = edit_labels(empty, empty, DEL_ID, EOS_ID)
    assert (token_target.tolist(), insert_target.tolist()) == ([], [EOS_ID])


NOT_SEQUENCES = [None, 3, "ab", {1: 2}, np.array(3), [[1, 2], [3, 4]], np.zeros((2, 2), int)]
NOT_INTEGERS = [[1.5], ["a"], [None], np.array([1.0]), np.array([]), np.array([True])]
NOT_INT32 = [[2**31], [-(2**31) - 1], [2**70], np.array([2**31]), np.array([2**63], np.uint64)]


@pytest.mark.parametrize("bad", NOT_SEQUENCES + NOT_INTEGERS + NOT_INT32, ids=repr)
def test_bad_sequences(bad):
    for noisy, clean in [(bad, [1]), ([1], bad)]:
        with pytest.raises((TypeError, ValueError, OverflowError)):
            edit_script(noisy, clean)
        with pytest.raises((TypeError, ValueError, OverflowError)):
            edit_labels(noisy, clean, DEL_ID, EOS_ID)


def test_bad_sequences_are_named():
    with pytest.raises(TypeError, match=r"^noisy: sequences must be .* of integers, found 1-D and float64"):
        edit_script(np.array([1.5]), [1])
    with pytest.raises(ValueError, match=r"^clean: token ids must fit in int32"):
        edit_script([1], [1, 2**31])
    with pytest.raises(ValueError, match=r"^noisy: token ids must fit in int32"):
        edit_script(np.array([1, -(2**31) - 1]), [1])


def test_bad_arguments():
    with pytest.raises(ValueError, match="2 noisy sequences, but 1 clean"):
        edit_scripts([[1], [2]], [[1]])


def test_out_of_memory_is_an_exception(tmp_path):
    """A table of 2 * 2^20 * 2^20 bits, 256 GB, under a limit of 64 GB of address space."""
    code = """
import resource, numpy as np, edit_distance
resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))
x = np.arange(1 << 20)
try:
    edit_distance.edit_script(x, -x - 1)
except MemoryError as error:
    print("MemoryError:", error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("MemoryError: edit distance"), run.stderr


def copy_sources(folder):
    for name in ["edit_distance.c", "edit_distance.py", "build_ext.py", "ragged.py"]:
        shutil.copy(ROOT / name, folder)


def test_without_a_compiler_one_warning_and_the_same_scripts(tmp_path):
    copy_sources(tmp_path)
    code = "import edit_distance as e; print(e.edit_script([1, 2], [2]), e.edit_labels([1, 2], [2, 2], 8, 9))"
    environment = os.environ | {"CC": "no-such-compiler", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{edit_script([1, 2], [2])} {edit_labels([1, 2], [2, 2], 8, 9)}\n"
    assert run.stderr.count("UserWarning") == 1
    assert "Install a C compiler" in run.stderr
    assert "python build_ext.py" in run.stderr


def test_the_fallback_is_the_same_everywhere(monkeypatch):
    rng = np.random.default_rng(0)
    noisy = [random_tokens(rng, n, 4) for n in range(20)]
    clean = [random_tokens(rng, 19 - n, 4) for n in range(20)]
    fast = edit_scripts(noisy, clean), edit_labels_batch(noisy, clean, DEL_ID, EOS_ID)
    monkeypatch.setattr(edit_distance, "_compiled", None)
    slow = edit_scripts(noisy, clean), edit_labels_batch(noisy, clean, DEL_ID, EOS_ID)
    np.testing.assert_equal(slow, fast)


@pytest.mark.slow
def test_many_processes_may_build_at_once(tmp_path):
    copy_sources(tmp_path)
    command = [sys.executable, "-W", "error", "-c", "import edit_distance; print(edit_distance.distance([1], [2]))"]
    runs = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [run.communicate()[0] for run in runs] == ["1\n"] * 4
    assert [path.suffix for path in tmp_path.glob("_edit*")] == [".so"]
    assert not list(tmp_path.glob(".build-*"))


@pytest.mark.slow
def test_a_library_older_than_its_source_is_built_again(tmp_path):
    copy_sources(tmp_path)
    code = "import edit_distance, build_ext; print(build_ext.LIBRARY)"
    command = [sys.executable, "-W", "error", "-c", code]
    library = Path(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.strip())
    first = library.stat().st_mtime_ns
    subprocess.run(command, cwd=tmp_path, check=True)
    assert library.stat().st_mtime_ns == first
    os.utime(tmp_path / "edit_distance.c")
    subprocess.run(command, cwd=tmp_path, check=True)
    assert library.stat().st_mtime_ns > first
