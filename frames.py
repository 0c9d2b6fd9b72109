"""What a decode did, step by step: a recording of the edits, the frames made from it, and their view in the terminal.

    record    a `Trace` is given to a sampler as `on_step=trace.on_step`; per step it keeps one sequence of the batch as
              it was before the step, and the edits about to be made
    frames    frame k is the sequence after k steps; every token is marked by how it got there, kept, inserted (+) or
              substituted (~), and by whether it is about to be deleted (-)
    lines     tokens to lines of text, for any unit of length: columns of a terminal, pixels of a picture
    terminal  redrawn in place while the decode runs (`live`) or afterwards (`show`); plain text where there is none

The marks follow tokens, not positions: a token keeps its identity when it is kept or substituted, and an inserted one
gets a new identity. So any two states can be compared, also ones with many steps between them, which is how long
decodes are shown in few frames. The pictures are in trace.py.
"""

import json
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable
from difflib import SequenceMatcher
from itertools import count, groupby
from typing import NamedTuple

import torch

from ragged import DEL, GAP, KEEP, SUB, Ragged

INSERTED, SUBSTITUTED, DELETED = "+", "~", "-"
BLOCKS = ("mask", "pad")  # kinds of token that are drawn as a symbol


# ---- record ----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One step of the sampler: the sequence before it, and what the step does to it."""

    t: float
    label: str  # "" for Edit Flows, "mask" or "edit" for the phases of ME-DLM
    ids: list[int]
    text: list[str]  # one string per token
    edits: list[list[int]]  # [position, op, sub_token, ins_token] where there is something to do; GAP for no token


class Trace:
    """One sequence of a batch while it is generated.

    prompt_len  the first tokens of the sequence, which are never edited
    pieces      token ids to one string per token (`Tokenizer.pieces`)
    mask_id     drawn as a block; None if there is none.  pad_id likewise, drawn as a dot
    index       which sequence of the batch; samplers keep the order of the prompts in the batch they report
    live        a file such as sys.stdout: if it is a terminal, every step is drawn as it happens
    """

    def __init__(
        self,
        prompt_len: int,
        pieces: Callable[[list[int]], list[str]],
        mask_id: int | None = None,
        pad_id: int | None = None,
        index: int = 0,
        live=None,
    ):
        self.prompt_len, self.pieces, self.mask_id, self.pad_id, self.index = prompt_len, pieces, mask_id, pad_id, index
        self.screen = Screen(live) if live and is_terminal(live) else None
        self.steps: list[Step] = []
        self.final: tuple[list[int], list[str]] | None = None

    def on_step(self, t, x: Ragged, op, sub_token, ins_token, label: str = "") -> None:
        """Called by a sampler after each step, with the state before it and the arguments of `apply_edits`, all [T]."""
        a, b = x.cu_seqlens[self.index : self.index + 2].tolist()
        columns = torch.stack([x.ids[a:b], op[a:b].long(), sub_token[a:b], ins_token[a:b]])
        ids, ops, subs, ins = columns.tolist()
        edits = [
            [i, ops[i], subs[i] if ops[i] == SUB else GAP, ins[i]]
            for i in range(b - a)
            if ops[i] != KEEP or ins[i] != GAP
        ]
        self.steps.append(Step(float(t), label, ids, self.pieces(ids), edits))
        if self.screen:
            self.screen.draw(_live_frame(self))

    def finish(self, x: Ragged | list[int] | None = None) -> "Trace":
        """Ends the recording with the final state: the batch, or this sequence, or (None) what the last step leaves."""
        if isinstance(x, Ragged):
            x = x.unpack()[self.index]
        while len(self.steps) > 1 and all(s.label == "edit" and not s.edits for s in self.steps[-2:]):
            self.steps.pop()  # passes that only other sequences of the batch still made
        if x is None:
            if not self.steps:
                raise ValueError("nothing was recorded: pass `on_step=trace.on_step` to the sampler")
            last = self.steps[-1]
            x, _ = _apply(last.ids, last.ids, last.edits, count())
        self.final = (list(x), self.pieces(list(x)))
        if self.screen:
            self.screen.draw(frames(self)[-1])
        return self

    def save(self, path) -> None:
        """Writes the trace as JSON. Raises OSError."""
        if self.final is None:
            self.finish()
        record = dict(format="nanoedit trace", prompt_len=self.prompt_len, mask_id=self.mask_id, pad_id=self.pad_id)
        record.update(steps=[step._asdict() for step in self.steps], final=self.final)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file)

    @staticmethod
    def load(path) -> "Trace":
        """Reads what `save` wrote. Raises OSError, or ValueError naming the file."""
        try:
            with open(path, encoding="utf-8") as file:
                record = json.load(file)
            trace = Trace(record["prompt_len"], _no_pieces, record["mask_id"], record["pad_id"])
            trace.steps = [Step(**step) for step in record["steps"]]
            trace.final = tuple(record["final"])
            frames(trace)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: not a trace written by nanoEdit ({type(error).__name__}: {error})") from error
        return trace


def _no_pieces(ids):
    raise ValueError("a trace read from a file is complete: it cannot be recorded into")


# ---- frames ----------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One token of a frame."""

    id: int
    text: str  # printable: no control characters but newlines
    kind: str  # "prompt", "text", "mask" or "pad"
    mark: str = ""  # how it got here: INSERTED, SUBSTITUTED, or "" for kept
    leaving: bool = False  # deleted on the way to the next frame


class Edits(NamedTuple):
    """How many edits of each kind. A substitution by the same token is none."""

    inserted: int = 0
    substituted: int = 0
    deleted: int = 0

    def plus(self, other: "Edits") -> "Edits":
        return Edits(*map(sum, zip(self, other)))

    def __str__(self):
        return f"+{self.inserted} ~{self.substituted} -{self.deleted}"


class Frame(NamedTuple):
    """The sequence after `step` of `steps` steps."""

    step: int
    steps: int
    t: float
    phase: str  # "", "mask pass 3/8", "edit pass 1/4"
    cells: list[Cell]
    edits: Edits  # made since the frame before
    total: Edits  # made since the beginning


class _State(NamedTuple):
    ids: list[int]
    text: list[str]
    uids: list[int]  # the identity of every token
    t: float
    phase: str
    edits: Edits


def frames(trace: Trace, limit: int | None = None) -> list[Frame]:
    """The frames of a trace: one per state, or at most `limit` (at least 4) of those in which something changed."""
    states = _states(trace)
    chosen = range(len(states)) if limit is None else _select(states, limit)
    total, shown = Edits(), []
    for before, now, after in zip([None, *chosen], chosen, [*chosen[1:], None]):
        state = states[now]
        edits = Edits()
        for passed in states[0 if before is None else before + 1 : now + 1]:
            edits = edits.plus(passed.edits)
        total = total.plus(edits)
        was = dict(zip(states[before].uids, states[before].ids)) if before is not None else None
        stays = set(state.uids if after is None else states[after].uids)
        cells = []
        for i, (token, text, uid) in enumerate(zip(state.ids, state.text, state.uids, strict=True)):
            if was is None or was.get(uid) == token:
                mark = ""
            else:
                mark = SUBSTITUTED if uid in was else INSERTED
            cells.append(Cell(token, printable(text), _kind(trace, i, token), mark, uid not in stays))
        shown.append(Frame(now, len(states) - 1, state.t, state.phase, cells, edits, total))
    return shown


def _live_frame(trace: Trace) -> Frame:
    """The frame before the step just recorded: what that step deletes is known. `finish` draws the last."""
    recent = Trace(trace.prompt_len, trace.pieces, trace.mask_id, trace.pad_id)
    recent.steps = trace.steps[-2:]
    total = Edits()
    for step in trace.steps[:-1]:
        total = total.plus(_count(step))
    label = trace.steps[-1].label
    phase = f"{label} pass {sum(step.label == label for step in trace.steps)}" if label else ""
    frame = frames(recent)[len(recent.steps) - 1]
    return frame._replace(step=len(trace.steps) - 1, steps=0, phase=phase, total=total)


def _states(trace: Trace) -> list[_State]:
    """Every state, with identities carried from each to the next by the edits between them."""
    if trace.final is None:
        trace.finish()
    following = [*((step.ids, step.text) for step in trace.steps[1:]), trace.final]
    times = [*(step.t for step in trace.steps[1:]), 1.0]
    passes = {label: sum(step.label == label for step in trace.steps) for label in ("mask", "edit")}
    fresh, seen = count(), dict.fromkeys(passes, 0)
    ids, text = (trace.steps[0].ids, trace.steps[0].text) if trace.steps else trace.final
    states = [_State(ids, text, [next(fresh) for _ in ids], trace.steps[0].t if trace.steps else 1.0, "", Edits())]
    for step, (ids, text), t in zip(trace.steps, following, times):
        after, uids = _apply(step.ids, states[-1].uids, step.edits, fresh)
        phase = ""
        if step.label in passes:
            seen[step.label] += 1
            phase = f"{step.label} pass {seen[step.label]}/{passes[step.label]}"
        states.append(_State(ids, text, _carry(after, uids, ids, fresh), t, phase, _count(step)))
    return states


def _apply(ids, uids, edits, fresh) -> tuple[list[int], list[int]]:
    """`ragged.apply_edits` for one sequence, with identities: substituted tokens keep theirs, inserted ones are new."""
    at = {position: rest for position, *rest in edits}
    new_ids, new_uids = [], []
    for i, (token, uid) in enumerate(zip(ids, uids, strict=True)):
        op, sub, ins = at.get(i, (KEEP, GAP, GAP))
        if op != DEL:
            new_ids.append(sub if op == SUB else token)
            new_uids.append(uid)
        if ins != GAP:
            new_ids.append(ins)
            new_uids.append(next(fresh))
    return new_ids, new_uids


def _carry(ids, uids, changed, fresh) -> list[int]:
    """Identities of `changed`, the state a sampler reports where `ids` was expected (pads dropped, the end forced)."""
    if ids == changed:
        return uids
    carried = []
    for op, a, b, c, d in SequenceMatcher(None, ids, changed, autojunk=False).get_opcodes():
        same = op == "equal" or b - a == d - c
        carried += uids[a:b] if same else [next(fresh) for _ in range(c, d)]
    return carried


def _count(step: Step) -> Edits:
    ins = sum(e[3] != GAP for e in step.edits)
    sub = sum(e[1] == SUB and e[2] != step.ids[e[0]] for e in step.edits)
    return Edits(ins, sub, sum(e[1] == DEL for e in step.edits))


def _select(states, limit) -> list[int]:
    """First, last, last of each phase, and evenly spaced ones among the states that differ from the one before."""
    last = len(states) - 1
    changed = [k for k in range(1, last) if states[k].ids != states[k - 1].ids]
    fixed = {0, last} | {k for k in changed if states[k].phase.split()[:1] != states[k + 1].phase.split()[:1]}
    if len(fixed | set(changed)) <= limit:
        return sorted(fixed | set(changed))
    rest = [k for k in changed if k not in fixed]
    room = max(0, limit - len(fixed))
    return sorted(fixed | {rest[(2 * i + 1) * len(rest) // (2 * room)] for i in range(room)})


def _kind(trace: Trace, position: int, token: int) -> str:
    if position < trace.prompt_len:
        return "prompt"
    return {trace.pad_id: "pad", trace.mask_id: "mask"}.get(token, "text")


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters become pictures, half characters and overrides U+FFFD."""
    text = re.sub("\r\n?|[\v\f\x85\u2028\u2029]", "\n", text).replace("\t", "    ")
    return "".join(c if c == "\n" else _picture(c) for c in text)


def _picture(c: str) -> str:
    if ord(c) < 0x20:
        return chr(0x2400 + ord(c))
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\u200d" else c


def comparison(trace: Trace) -> tuple[list[Cell], list[Cell]] | None:
    """ME-DLM's draft and the repaired text, without the prompt, differences marked; None if there was no edit phase."""
    draft = next((step for step in trace.steps if step.label == "edit"), None)
    if draft is None:
        return None
    if trace.final is None:
        trace.finish()
    n = trace.prompt_len
    sides = [(draft.ids[n:], draft.text[n:]), (trace.final[0][n:], trace.final[1][n:])]
    old, new = ([Cell(i, printable(s), _kind(trace, n, i)) for i, s in zip(*side, strict=True)] for side in sides)
    for op, a, b, c, d in SequenceMatcher(None, sides[0][0], sides[1][0], autojunk=False).get_opcodes():
        if op != "equal":
            mark = SUBSTITUTED if b - a == d - c else INSERTED
            old[a:b] = [cell._replace(leaving=True) for cell in old[a:b]]
            new[c:d] = [cell._replace(mark=mark) for cell in new[c:d]]
    return old, new


# ---- lines -----------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """A token, or a part of it, at its place in a line. x in the unit of `measure`."""

    x: float
    text: str
    cell: Cell


def wrap(cells: list[Cell], width: float, measure: Callable[[str], float], symbols: dict) -> list[list[Span]]:
    """Cells to lines. Breaks at newlines and between words (not between tokens), inside a word only if it is too long.

    symbols: what stands for a "mask", a "pad" and a "newline" that carries a mark.
    """
    lines, x = [[]], 0.0
    for word in _words(cells, symbols):
        if word == "\n":
            lines, x = [*lines, []], 0.0
            continue
        wraps = x > 0 and x + sum(measure(text) for text, _ in word) > width
        if wraps:
            lines, x = [*lines, []], 0.0
        if wraps or (x == 0 and word[0][1].kind in BLOCKS):
            word = [(word[0][0].lstrip(" ") or word[0][0], word[0][1]), *word[1:]]
        for text, cell in word:
            while x + measure(text) > width and len(text) > 1:  # one word longer than a line
                fits = next((n for n in range(len(text) - 1, 0, -1) if x + measure(text[:n]) <= width), 0)
                if fits or x == 0:
                    lines[-1].append(Span(x, text[: fits or 1], cell))
                lines, x, text = [*lines, []], 0.0, text[fits or (x == 0) :]
            lines[-1].append(Span(x, text, cell))
            x += measure(text)
    return lines


def _words(cells, symbols):
    """Groups of (text, cell) that should stay on one line, and "\n" where a line ends."""
    word = []
    for cell in cells:
        text = cell.text
        if cell.kind in BLOCKS:
            text = " " + symbols[cell.kind]
        elif cell.mark or cell.leaving:
            text = text.replace("\n", symbols["newline"] + "\n") or symbols["pad"]
        for n, part in enumerate(text.split("\n")):
            if word and (n or part[:1].isspace() or word[-1][0][-1].isspace() or word[-1][1].kind in BLOCKS):
                yield word
                word = []
            if n:
                yield "\n"
            if part:
                word = [*word, (part, cell)]
    if word:
        yield word


def window(lines: list[list[Span]], height: int, start: int) -> int:
    """Where a view of `height` lines should start: at `start`, moved as little as brings the changes into view.

    If they are too far apart for that, the view moves only when none of them is in it.
    """
    busy = [n for n, line in enumerate(lines) if any(s.cell.mark or s.cell.leaving for s in line)]
    in_view = [n for n in busy if start <= n < start + height]
    if busy and (not in_view or busy[-1] - busy[0] < height):
        start = max(min(start, busy[0]), min(busy[-1], busy[0] + height - 1) - height + 1)
    return max(0, min(start, len(lines) - height))


# ---- terminal --------------------------------------------------------------------------------------------------------

UNICODE = dict(mask="░░", pad="·", newline="↵", full="█", empty="░")
ASCII = dict(mask="__", pad=".", newline="\\n", full="#", empty=".")
BRACKETS = {INSERTED: ("{+", "+}"), SUBSTITUTED: ("{~", "~}"), DELETED: ("[-", "-]")}
# Bold underline, reverse, strike-through: told apart without their colours, which NO_COLOR removes.
STYLES = {INSERTED: ("1;4", "32"), SUBSTITUTED: ("7", "33"), DELETED: ("9", "31"), "dim": ("2", "")}


def show(trace: Trace, file=None, delay: float = 0.1, limit: int = 8) -> None:
    """Replays a trace: in place on a terminal, `delay` seconds a frame; elsewhere as text in at most `limit` frames."""
    file = file or sys.stdout
    if is_terminal(file):
        screen = Screen(file)
        for frame in frames(trace):
            screen.draw(frame)
            time.sleep(delay)
    else:
        _print_frames(frames(trace, limit), file)
    show_pair(trace, file)


def show_pair(trace: Trace, file=None) -> None:
    """Of an ME-DLM decode, the draft and the repaired text, one above the other."""
    file = file or sys.stdout
    for name, cells in zip(("draft", "repaired"), comparison(trace) or ()):
        _write(file, f"\n{name}:")
        _write(file, *_body(cells, file))
    file.flush()


class Screen:
    """A terminal on which each frame takes the place of the one before."""

    def __init__(self, file):
        self.file, self.height, self.start = file, 0, 0

    def draw(self, frame: Frame) -> None:
        rows = max(4, shutil.get_terminal_size().lines - 4)
        lines = _wrap_for(frame.cells, self.file)
        self.start = window(lines, rows, self.start)
        visible = lines[self.start : self.start + rows]
        body = [_headline(frame, _symbols(self.file)), "", *(_paint(line) for line in visible), "", _legend(_paint_one)]
        self.file.write(f"\x1b[{self.height}F\x1b[J" if self.height else "")
        _write(self.file, *body)
        self.file.flush()
        self.height = len(body)


def is_terminal(file) -> bool:
    """Whether a file shows escape codes: a terminal, and not a dumb one."""
    return file.isatty() and os.environ.get("TERM") != "dumb"


def _print_frames(shown: list[Frame], file) -> None:
    _write(file, _legend(_bracket_one))
    for n, frame in enumerate(shown):
        cells = [cell for cell in frame.cells if n == 0 or cell.kind != "prompt"]
        _write(file, "", _headline(frame, _symbols(file)), *_body(cells, file))


def _body(cells, file) -> list[str]:
    paint = _paint if is_terminal(file) else _bracket
    return ["  " + paint(line) for line in _wrap_for(cells, file)]


def _wrap_for(cells, file) -> list[list[Span]]:
    width = min(100, shutil.get_terminal_size().columns - 4)
    return wrap(cells, max(8, width), _columns, _symbols(file))


def _headline(frame: Frame, symbols) -> str:
    done = frame.step / frame.steps if frame.phase and frame.steps else frame.t
    bar = symbols["full"] * round(20 * done) + symbols["empty"] * (20 - round(20 * done))
    place = f"{frame.phase or f't {frame.t:.2f}':<14} {bar}  step {frame.step}" + f"/{frame.steps}" * bool(frame.steps)
    return f"{place:<52}  {frame.edits!s:<12}  total {frame.total}"


def _legend(paint) -> str:
    marks = {INSERTED: "inserted", SUBSTITUTED: "substituted", DELETED: "about to be deleted"}
    return "  ".join(paint(text, [mark]) for mark, text in marks.items())


def _marks(cell: Cell) -> list[str]:
    return [cell.mark] * bool(cell.mark) + [DELETED] * cell.leaving


def _paint(line: list[Span]) -> str:
    """A line with escape codes."""
    return "".join(_paint_one(s.text, _marks(s.cell) or ["dim"] * (s.cell.kind != "text")) for s in line)


def _paint_one(text, marks) -> str:
    color = "NO_COLOR" not in os.environ
    codes = ";".join(part for mark in marks for part in (STYLES[mark][0], STYLES[mark][1] * color) if part)
    word = text.lstrip(" ") or text
    return text[: len(text) - len(word)] + (f"\x1b[{codes}m{word}\x1b[0m" if codes else word)


def _bracket(line: list[Span]) -> str:
    """A line for places without escape codes: runs of one kind of edit in one pair of brackets, as in a word diff."""
    runs = groupby(line, key=lambda s: _marks(s.cell)[-1:])
    return "".join(_bracket_one("".join(s.text for s in run), marks) for marks, run in runs)


def _bracket_one(text, marks) -> str:
    opening, closing = BRACKETS[marks[0]] if marks else ("", "")
    word = text.lstrip(" ") or text
    return text[: len(text) - len(word)] + opening + word + closing


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)


def _symbols(file) -> dict:
    try:
        "".join(UNICODE.values()).encode(file.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def _write(file, *lines) -> None:
    encoding = file.encoding or "utf-8"
    for line in lines:
        file.write(line.rstrip().encode(encoding, "replace").decode(encoding) + "\n")
