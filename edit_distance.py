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
from operator import attrgetter

import numpy as np

KEEP, SUB, DEL, INS = 0, 1, 2, 3
GAP = -1


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
    (x, x_fence), (y, y_fence) = _pack_pairs(noisy, clean)
    script, length = _scripts(x, x_fence, y, y_fence, threads)
    return _split(script, x_fence[:-1] + y_fence[:-1], length)


def align(x0, x1) -> tuple[np.ndarray, np.ndarray]:
    """(z0, z1), int64 and equally long: the canonical script as two rows, with GAP where a row has no token.

    Dropping the gaps gives x0 and x1 back; no column has two gaps (Edit Flows, section 3.2: the auxiliary alignment).
    """
    script = edit_script(x0, x1)
    z0 = np.full(len(script), GAP, dtype=np.int64)
    z1 = z0.copy()
    z0[script != INS] = x0
    z1[script != DEL] = x1
    return z0, z1


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
    (x, x_fence), (y, y_fence) = _pack_pairs(noisy, clean)
    special = _tokens([del_id, eos_id, ignore_id], "del_id, eos_id, ignore_id").tolist()
    forbidden = np.flatnonzero(np.isin(y, special[:2]))
    if len(forbidden):
        pair = np.searchsorted(y_fence, forbidden[0], side="right") - 1
        raise ValueError(
            f"clean[{pair}] contains {y[forbidden[0]]} at position {forbidden[0] - y_fence[pair]}, which is del_id or "
            "eos_id: its labels would be ambiguous. Remove special tokens from the target."
        )
    script, length = _scripts(x, x_fence, y, y_fence, threads)
    token_target, insert_target = np.empty(len(x), np.int64), np.empty(len(x) + len(noisy), np.int64)
    if _compiled:
        arrays = (x_fence, y, y_fence, script, length, *special, token_target, insert_target)
        _call(_compiled.lib.edit_labels, len(noisy), threads, *arrays)
    else:
        for b, (i, j, out) in enumerate(_each_pair(x, x_fence, y, y_fence)):
            labels = labels_in_python(x[i].tolist(), y[j].tolist(), script[out][: length[b]], *special)
            token_target[i], insert_target[i.start + b : i.stop + b + 1] = labels
    lengths = np.diff(x_fence)
    gap_starts = x_fence[:-1] + np.arange(len(lengths))
    return list(zip(_split(token_target, x_fence[:-1], lengths), _split(insert_target, gap_starts, lengths + 1)))


def _scripts(x, x_fence, y, y_fence, threads):
    """Scripts of all pairs in one row, pair b from x_fence[b] + y_fence[b] on, and their lengths [B]."""
    script, length = np.empty(len(x) + len(y), np.uint8), np.empty(len(x_fence) - 1, np.int64)
    if _compiled:
        _call(_compiled.lib.edit_scripts, len(length), threads, x, x_fence, y, y_fence, script, length)
    else:
        for b, (i, j, out) in enumerate(_each_pair(x, x_fence, y, y_fence)):
            ops = script_in_python(x[i].tolist(), y[j].tolist())
            script[out][: len(ops)], length[b] = ops, len(ops)
    return script, length


def _call(function, pairs, threads, *arguments):
    """function(pairs, first, step, *arguments) for all pairs, divided between the threads."""
    if threads < 1:
        raise ValueError(f"threads is {threads}, must be at least 1")
    ffi, types = _compiled.ffi, {1: "uint8_t[]", 4: "int32_t[]", 8: "int64_t[]"}
    arguments = [ffi.from_buffer(types[a.itemsize], a) if isinstance(a, np.ndarray) else a for a in arguments]
    if threads == 1:
        failed = function(pairs, 0, 1, *arguments)
    else:
        with ThreadPoolExecutor(threads) as pool:
            failed = any(pool.map(lambda first: function(pairs, first, threads, *arguments), range(threads)))
    if failed:
        raise MemoryError("edit distance: the table needs 2 bits per cell (n * m / 4 bytes) for the longest pair")


def _pack_pairs(noisy, clean):
    if len(noisy) != len(clean):
        raise ValueError(f"{len(noisy)} noisy sequences, but {len(clean)} clean ones")
    return _pack(noisy, "noisy"), _pack(clean, "clean")


def _pack(sequences, name):
    """Sequences end to end as int32 [T], and their fences int64 [B + 1]."""
    if not _is_ready(sequences):
        sequences = [_tokens(sequence, name) for sequence in sequences]
    fence = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum(list(map(len, sequences)), out=fence[1:])
    row = np.concatenate(sequences) if len(sequences) else np.empty(0, dtype=np.int32)
    if row.dtype != np.int32 and len(row) and not -(2**31) <= row.min() <= row.max() < 2**31:
        raise ValueError(f"{name}: token ids must fit in int32, found {row.min()} to {row.max()}")
    return row.astype(np.int32, copy=False), fence


def _is_ready(sequences):
    """Whether all are 1-D arrays, int32 or int64, so that nothing has to be looked at one by one (sets are quick)."""
    return (
        set(map(type, sequences)) == {np.ndarray}
        and set(map(attrgetter("dtype"), sequences)) <= {np.dtype(np.int32), np.dtype(np.int64)}
        and set(map(attrgetter("ndim"), sequences)) == {1}
    )


def _tokens(sequence, name):
    """One sequence as a 1-D array, int32 or int64."""
    if isinstance(sequence, (list, tuple)):
        try:
            return np.asarray(array("i", sequence))
        except OverflowError:
            raise ValueError(f"{name}: token ids must fit in int32") from None
        except TypeError as error:
            raise TypeError(f"{name}: token ids must be integers ({error})") from None
    tokens = np.asarray(sequence)
    if tokens.ndim != 1:
        raise ValueError(f"{name}: a sequence must have one dimension, found shape {tokens.shape}")
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"{name}: token ids must be integers, found {tokens.dtype}")
    if tokens.dtype == np.uint64 and (tokens >= 2**31).any():
        raise ValueError(f"{name}: token ids must fit in int32, found {tokens.max()}")
    return tokens.astype(np.int64)


def _each_pair(x, x_fence, y, y_fence):
    """Where pair b lies in the rows of noisy tokens, clean tokens and scripts, as slices."""
    for i, i_end, j, j_end in zip(x_fence[:-1], x_fence[1:], y_fence[:-1], y_fence[1:]):
        yield slice(i, i_end), slice(j, j_end), slice(i + j, i_end + j_end)


def _split(row, starts, lengths):
    return [row[a:b] for a, b in zip(starts.tolist(), (starts + lengths).tolist())]


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
