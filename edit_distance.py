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

The published helper traces from the right: `a` -> `a a` then inserts in front of the kept `a`, which reads as "insert
nothing"; and its decoder takes the insertion behind a deleted run from a position that never had a label. Followed to
the letter, those labels never reach the target on 27 % of random pairs over 2 symbols and 7 % over 20.
"""

import warnings
from array import array
from itertools import accumulate, pairwise

import numpy as np

from ragged import DEL, GAP, INS, KEEP, SUB

try:
    import build_ext

    _compiled = build_ext.load()
except Exception as error:  # no compiler, no headers, a read-only folder, no cffi: all mean "use plain Python"
    _compiled = None
    warnings.warn(
        "edit distance falls back to plain Python (slow): compiling edit_distance.c failed. Install a C compiler "
        f"(Debian: apt install gcc python3-dev; macOS: xcode-select --install), run `python build_ext.py`. ({error})",
        stacklevel=2,
    )


def distance(noisy, clean) -> int:
    """Fewest single-token substitutions, deletions and insertions that turn `noisy` into `clean`."""
    return int(np.count_nonzero(edit_script(noisy, clean)))


def edit_script(noisy, clean) -> np.ndarray:
    """The canonical script of one pair: uint8, one of KEEP, SUB, DEL, INS per column, left to right.

    Sequences are lists or 1-D integer arrays of int32 values. Raises TypeError for anything else, ValueError for values
    beyond int32, MemoryError when the table (2 bits per cell) does not fit.
    """
    return edit_scripts([noisy], [clean])[0]


def edit_scripts(noisy: list, clean: list) -> list[np.ndarray]:
    """`edit_script` for many pairs at once: one call into C, during which other threads may run."""
    return _split(*_scripts(*_pack(noisy, "noisy"), *_pack(clean, "clean")))


def align(x0, x1) -> tuple[np.ndarray, np.ndarray]:
    """(z0, z1), int64 and equally long: the canonical script as two rows, with GAP where a row has no token.

    Dropping the gaps gives x0 and x1 back; no column has two gaps (Edit Flows, section 3.2: the auxiliary alignment).
    """
    return align_batch([x0], [x1])[:2]


def align_batch(x0: list, x1: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`align` for B pairs: z0 and z1 of all pairs end to end, and how many columns each pair has, int64 [B]."""
    (x, x_fence), (y, y_fence) = _pack(x0, "x0"), _pack(x1, "x1")
    op, fence = _scripts(x, x_fence, y, y_fence)
    z0, z1 = np.full((2, len(op)), GAP, dtype=np.int64)
    z0[op != INS], z1[op != DEL] = x, y
    return z0, z1, np.diff(fence)


def edit_labels(noisy, clean, del_id: int, eos_id: int, ignore_id: int = -100) -> tuple[np.ndarray, np.ndarray]:
    """What ME-DLM's two heads should say about `noisy`, as int64 arrays (token_target [n], insert_target [n + 1]).

    token_target[i]: the token that noisy[i] becomes, itself if kept; `del_id` if it is deleted.
    insert_target[k]: the token of `clean` that follows gap k, or `eos_id`. It is the first of the run inserted there;
        where nothing is inserted, the one that will stand to the right of the gap. Gap k lies before noisy[k], gap n at
        the end. A gap directly behind a deleted position has no label (`ignore_id`).

    To apply them, a surviving token (or the end) takes the insertion of the gap before the run of deleted positions in
    front of it, unless that equals its own target. `clean` must not contain `del_id` or `eos_id` (ValueError: the
    labels would be ambiguous); `noisy` may.
    """
    return edit_labels_batch([noisy], [clean], del_id, eos_id, ignore_id)[0]


def edit_labels_batch(noisy: list, clean: list, del_id: int, eos_id: int, ignore_id: int = -100):
    """`edit_labels` for many pairs at once: a list of (token_target, insert_target)."""
    (x, x_fence), (y, y_fence) = _pack(noisy, "noisy"), _pack(clean, "clean")
    ambiguous = (y == del_id) | (y == eos_id)
    if ambiguous.any():
        pair = np.searchsorted(y_fence, ambiguous.argmax(), side="right") - 1
        raise ValueError(f"clean[{pair}] contains del_id or eos_id: its labels would be ambiguous. Remove them there.")
    script, fence = _scripts(x, x_fence, y, y_fence)
    if _compiled is None:
        both = zip(_split(script, fence), _split(y, y_fence))
        return [_labels_in_python(op, right, del_id, eos_id, ignore_id) for op, right in both]
    token_target, insert_target = np.empty(len(x), np.int64), np.empty(len(x) + len(noisy), np.int64)
    ids = del_id, eos_id, ignore_id
    _call("edit_labels", len(noisy), y, y_fence, script, fence, *ids, token_target, insert_target)
    return list(zip(_split(token_target, x_fence), _split(insert_target, x_fence + np.arange(len(x_fence)))))


def _scripts(x, x_fence, y, y_fence) -> tuple[np.ndarray, np.ndarray]:
    """The scripts of all pairs end to end, uint8, and their fences; `_pack` says what that is."""
    pairs = len(x_fence) - 1
    if len(y_fence) - 1 != pairs:
        raise ValueError(f"{pairs} noisy sequences, but {len(y_fence) - 1} clean ones")
    if _compiled is None:
        both = zip(_split(x, x_fence), _split(y, y_fence))
        script, fence = _pack([script_in_python(a.tolist(), b.tolist()) for a, b in both], "script")
        return script.astype(np.uint8), fence
    script, fence = np.empty(len(x) + len(y), np.uint8), np.empty(pairs + 1, np.int64)
    if _call("edit_scripts", pairs, x, x_fence, y, y_fence, script, fence):
        raise MemoryError("edit distance: the table needs 2 bits per cell (n * m / 4 bytes) for the longest pair")
    return script[: fence[-1]], fence


def _call(function: str, *arguments):
    """A function of edit_distance.c; it reads and writes the arrays where they are."""
    types = {1: "uint8_t[]", 4: "int32_t[]", 8: "int64_t[]"}
    pointer = _compiled.ffi.from_buffer
    arguments = [pointer(types[a.itemsize], a) if isinstance(a, np.ndarray) else a for a in arguments]
    return getattr(_compiled.lib, function)(*arguments)


def _pack(sequences, name):
    """Sequences end to end as int32 [T], and their fences int64 [B + 1]: b lies between fence[b] and fence[b + 1]."""
    try:
        if set(map(type, sequences)) != {np.ndarray}:
            sequences = [np.asarray(array("i", s) if isinstance(s, (list, tuple)) else s) for s in sequences]
        row = np.concatenate(sequences) if sequences else np.empty(0, np.int32)
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise TypeError(f"{name}: sequences must be 1-D and of integers, found {row.ndim}-D and {row.dtype}")
        if row.dtype != np.int32 and len(row) and not -(2**31) <= row.min() <= row.max() < 2**31:
            raise OverflowError  # as `array` does
    except OverflowError:
        raise ValueError(f"{name}: token ids must fit in int32") from None
    return row.astype(np.int32, copy=False), np.array([0, *accumulate(map(len, sequences))], np.int64)


def _split(row, fence):
    return [row[a:b] for a, b in pairwise(fence.tolist())]


def script_in_python(noisy: list, clean: list) -> list[int]:
    """The canonical script, cell by cell: the fallback, and what the tests hold edit_distance.c to."""
    n, m = len(noisy), len(clean)
    rest = [[n - i + m - j for j in range(m + 1)] for i in range(n + 1)]  # distance between noisy[i:] and clean[j:]
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            if noisy[i] == clean[j]:
                rest[i][j] = rest[i + 1][j + 1]
            else:
                rest[i][j] = 1 + min(rest[i + 1][j + 1], rest[i + 1][j], rest[i][j + 1])
    i, j, script = 0, 0, []
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
        i, j = i + (op != INS), j + (op != DEL)
    return script


def _labels_in_python(op, clean, del_id, eos_id, ignore_id) -> tuple[np.ndarray, np.ndarray]:
    """The labels of one pair, read off its script: the fallback."""
    right, after = np.append(clean, eos_id), np.cumsum(op != DEL)[op != INS]  # of each noisy token: what comes next
    deleted = op[op != INS] == DEL
    insert_target = np.where(deleted, ignore_id, right[after])
    return np.where(deleted, del_id, right[after - 1]), np.append(right[0], insert_target)
