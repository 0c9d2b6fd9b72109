"""Minimum edit scripts between token sequences, and the training labels that are read off them.

A script turns `noisy` (length n) into `clean` (length m) with the fewest substitutions, deletions and insertions. Many
scripts are equally short, and a model must not be taught one today and another tomorrow, so there is one canonical
script: read from the left; in every state take KEEP, else SUB, else DEL, else INS, the first that lies on an optimal
path. `script_in_python` is this sentence as a program; edit_distance.c does the same 64 cells at a time, and is
compiled when this file is first imported. Without a C compiler the Python version serves, a thousand times slower.

Why from the left.  ME-DLM learns two labels per position (`edit_labels`), and "insert nothing here" is encoded as "the
insertion equals the token on its right". Hence an inserted token must differ from the token on its right. Read from the
left, it always does: were they equal, KEEP would have come first. Nor does an insertion ever touch a deletion, since
together they would be one substitution. So every label means one thing, and applying the labels of a pair, labelling
again, and so on, strictly lowers the distance in each pass until it is 0.

The published helper traces from the right. `a` -> `a a` then inserts in front of the kept `a`, which reads as "insert
nothing"; a repair that exchanges neighbouring labels misses the gap in front of the sequence and can reorder tokens
(`1 5 7` -> `1 5 5 6 7` passes through `1 6 5 5 7`), and its decoder takes the insertion behind a deleted run from a
position that never had a label. Followed to the letter those labels never reach the target on 27 % of random pairs
over 2 symbols and 7 % over 20. Its token targets are ours on reversed sequences.
"""

import warnings
from array import array
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise

import numpy as np

from ragged import DEL, GAP, INS, KEEP, SUB


def _load():
    try:
        import build_ext

        return build_ext.load()
    except Exception as error:  # no compiler, no headers, a read-only folder, no cffi: all mean "use plain Python"
        warnings.warn(
            "edit distance falls back to plain Python (slow): compiling edit_distance.c failed. Install a C compiler "
            "(Debian: apt install gcc python3-dev; macOS: xcode-select --install), then run `python build_ext.py`. "
            f"The error was: {error}",
            stacklevel=2,
        )
        return None


_compiled = _load()


def distance(noisy, clean) -> int:
    """Fewest single-token substitutions, deletions and insertions that turn `noisy` into `clean`."""
    return int(np.count_nonzero(edit_script(noisy, clean)))


def edit_script(noisy, clean) -> np.ndarray:
    """The canonical script of one pair: uint8, one of KEEP, SUB, DEL, INS per column, left to right.

    Sequences are lists or 1-D integer arrays of int32 values. Raises TypeError for anything but integers, ValueError
    for other shapes and values, MemoryError when the table (2 bits per cell) does not fit.
    """
    return edit_scripts([noisy], [clean])[0]


def edit_scripts(noisy: list, clean: list, threads: int = 1) -> list[np.ndarray]:
    """`edit_script` for many pairs at once: one call into C, or one per thread; the GIL is released."""
    return _scripts(*_pack(noisy, "noisy"), *_pack(clean, "clean"), threads)


def align(x0, x1) -> tuple[np.ndarray, np.ndarray]:
    """(z0, z1), int64 and equally long: the canonical script as two rows, with GAP where a row has no token.

    Dropping the gaps gives x0 and x1 back; no column has two gaps (Edit Flows, section 3.2: the auxiliary alignment).
    """
    return align_batch([x0], [x1])[:2]


def align_batch(x0: list, x1: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`align` for B pairs: z0 and z1 of all pairs end to end, and how many columns each pair has, int64 [B]."""
    (x, x_fence), (y, y_fence) = _pack(x0, "x0"), _pack(x1, "x1")
    scripts = _scripts(x, x_fence, y, y_fence)
    op = _end_to_end(scripts)
    z0, z1 = np.full((2, len(op)), GAP, dtype=np.int64)
    z0[op != INS], z1[op != DEL] = x, y
    return z0, z1, np.array([len(script) for script in scripts], dtype=np.int64)


def edit_labels(noisy, clean, del_id: int, eos_id: int, ignore_id: int = -100) -> tuple[np.ndarray, np.ndarray]:
    """What ME-DLM's two heads should say about `noisy`, as int64 arrays (token_target [n], insert_target [n + 1]).

    token_target[i]: the token that noisy[i] becomes, itself if kept; `del_id` if it is deleted.
    insert_target[k]: the first token of the run inserted in gap k. Gap k lies before noisy[k], gap n at the end. Where
        nothing is inserted it is the token that will stand to the right of the gap: `token_target` of the next position
        that is not deleted, or `eos_id`. A gap directly behind a deleted position has no label (`ignore_id`).

    To apply them, a surviving token (or the end) takes the insertion of the gap before the run of deleted positions in
    front of it, unless that equals its own target. `clean` must not contain `del_id` or `eos_id` (ValueError: the
    labels would be ambiguous); `noisy` may.
    """
    return edit_labels_batch([noisy], [clean], del_id, eos_id, ignore_id)[0]


def edit_labels_batch(noisy: list, clean: list, del_id: int, eos_id: int, ignore_id: int = -100, threads: int = 1):
    """`edit_labels` for many pairs at once: a list of (token_target, insert_target)."""
    (x, x_fence), (y, y_fence) = _pack(noisy, "noisy"), _pack(clean, "clean")
    forbidden = np.flatnonzero((y == del_id) | (y == eos_id))
    if len(forbidden):
        pair = np.searchsorted(y_fence, forbidden[0], side="right") - 1
        raise ValueError(
            f"clean[{pair}] contains {y[forbidden[0]]} at position {forbidden[0] - y_fence[pair]}, which is del_id or "
            "eos_id: its labels would be ambiguous. Remove special tokens from the target."
        )
    op = _end_to_end(_scripts(x, x_fence, y, y_fence, threads))
    pair = np.arange(len(noisy))
    right = np.insert(y.astype(np.int64), y_fence[1:], eos_id)  # `clean`, end to end, eos_id behind every pair
    # per noisy token: is it deleted, and which entry of `right` comes next when its column is done
    deleted = op[op != INS] == DEL
    following = np.cumsum(op != DEL)[op != INS] + np.repeat(pair, np.diff(x_fence))
    token_target = np.where(deleted, del_id, right[following - 1])
    insert_target = np.where(deleted, ignore_id, right[following])
    insert_target = np.insert(insert_target, x_fence[:-1], right[y_fence[:-1] + pair])  # the gap in front
    gap_fence = x_fence + np.arange(len(x_fence))
    return list(zip(_split(token_target, x_fence), _split(insert_target, gap_fence)))


def _scripts(x, x_fence, y, y_fence, threads=1) -> list[np.ndarray]:
    """The script of every pair; `_pack` says how they arrive."""
    pairs = len(x_fence) - 1
    if len(y_fence) - 1 != pairs:
        raise ValueError(f"{pairs} noisy sequences, but {len(y_fence) - 1} clean ones")
    if threads < 1:
        raise ValueError(f"threads is {threads}, must be at least 1")
    if _compiled is None:
        both = zip(_split(x, x_fence), _split(y, y_fence))
        return [np.array(script_in_python(a.tolist(), b.tolist()), np.uint8) for a, b in both]
    script, length = np.empty(len(x) + len(y), np.uint8), np.empty(pairs, np.int64)
    types = {1: "uint8_t[]", 4: "int32_t[]", 8: "int64_t[]"}
    arrays = [_compiled.ffi.from_buffer(types[a.itemsize], a) for a in (x, x_fence, y, y_fence, script, length)]

    def every(first):
        return _compiled.lib.edit_scripts(pairs, first, threads, *arrays)

    if threads == 1:
        failed = every(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            failed = any(pool.map(every, range(threads)))
    if failed:
        raise MemoryError("edit distance: the table needs 2 bits per cell (n * m / 4 bytes) for the longest pair")
    starts = (x_fence[:-1] + y_fence[:-1]).tolist()
    return [script[a : a + k] for a, k in zip(starts, length.tolist())]


def _pack(sequences, name):
    """Sequences end to end as int32 [T], and their fences int64 [B + 1]: b lies between fence[b] and fence[b + 1]."""
    try:
        if set(map(type, sequences)) != {np.ndarray}:
            sequences = [np.asarray(array("i", s) if isinstance(s, (list, tuple)) else s) for s in sequences]
        row = np.concatenate(sequences) if sequences else np.empty(0, np.int32)
    except TypeError as error:
        raise TypeError(f"{name}: token ids must be integers ({error})") from None
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{name}: must be lists or 1-D arrays of integers that fit in int32 ({error})") from None
    if row.ndim != 1:
        raise ValueError(f"{name}: a sequence must have one dimension, found shape {row.shape}")
    if row.dtype.kind not in "iu":
        raise TypeError(f"{name}: token ids must be integers, found {row.dtype}")
    if row.dtype != np.int32 and len(row) and not -(2**31) <= row.min() <= row.max() < 2**31:
        raise ValueError(f"{name}: token ids must fit in int32, found {row.min()} to {row.max()}")
    return row.astype(np.int32, copy=False), np.array([0, *accumulate(map(len, sequences))], np.int64)


def _split(row, fence):
    return [row[a:b] for a, b in pairwise(fence.tolist())]


def _end_to_end(scripts):
    return np.concatenate(scripts) if scripts else np.empty(0, np.uint8)


def script_in_python(noisy: list, clean: list) -> list[int]:
    """The canonical script, cell by cell: the fallback, and what the tests hold edit_distance.c to."""
    n, m = len(noisy), len(clean)
    rest = [[0] * (m + 1) for _ in range(n + 1)]  # rest[i][j]: distance between noisy[i:] and clean[j:]
    for i in range(n, -1, -1):
        for j in range(m, -1, -1):
            if i == n or j == m:
                rest[i][j] = (n - i) + (m - j)
            elif noisy[i] == clean[j]:
                rest[i][j] = rest[i + 1][j + 1]
            else:
                rest[i][j] = 1 + min(rest[i + 1][j + 1], rest[i + 1][j], rest[i][j + 1])
    i = j = 0
    script = []
    while i < n or j < m:
        if i < n and j < m and noisy[i] == clean[j]:
            op = KEEP
        elif i < n and j < m and rest[i][j] == 1 + rest[i + 1][j + 1]:
            op = SUB
        elif i < n and rest[i][j] == 1 + rest[i + 1][j]:
            op = DEL
        else:
            op = INS
        script.append(op)
        i += op != INS
        j += op != DEL
    return script


def labels_in_python(noisy: list, clean: list, script, del_id: int, eos_id: int, ignore_id: int = -100):
    """`edit_labels` from a script, written as the definition reads."""
    n, j = len(noisy), 0
    fate = []  # per noisy token: KEEP, SUB or DEL
    token_target, inserted = [], [[] for _ in range(n + 1)]  # inserted[k]: the run that goes into gap k
    for op in script:
        if op == INS:
            inserted[len(fate)].append(clean[j])
        else:
            fate.append(op)
            token_target.append(del_id if op == DEL else clean[j])
        j += op != DEL
    insert_target = []
    for k in range(n + 1):
        survivors_on_the_right = (token_target[i] for i in range(k, n) if fate[i] != DEL)
        if k > 0 and fate[k - 1] == DEL:
            insert_target.append(ignore_id)
        elif inserted[k]:
            insert_target.append(inserted[k][0])
        else:
            insert_target.append(next(survivors_on_the_right, eos_id))
    return token_target, insert_target
