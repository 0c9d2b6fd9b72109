"""What a decode did, step by step: a recording of its edits, and pictures of it.

    trace = Trace(len(prompt), tokenizer.pieces, tokenizer.mask_id, live=sys.stdout)
    samples = sample(model, [prompt], ..., on_step=trace.on_step)
    trace.finish(prompt + samples[0].response).save("decode.json")
    write_gif(trace, "decode.gif")  # later: python -m plumbing.picture show|gif|html decode.json

recording  per step, one sequence of the batch as it was, and the edits about to be made
frames     frame k is the sequence after k steps; every token is marked by how it got there, kept, inserted (+) or
           substituted (~), and by whether it is about to be deleted (-)
lines      a frame as lines of text, for the terminal and the GIF
pictures   a terminal, redrawn in place while the decode runs (`live`) or afterwards (`show`), or text with brackets
           where there is none; an animated GIF; one HTML file to step through

The marks follow tokens, not positions: a token keeps its identity when it is kept or substituted, and an inserted one
gets a new identity. So any two states can be compared, also ones with many steps between them.
"""

import html
import json
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageColor, ImageDraw, ImageFont

from plumbing import cli
from ragged import DEL, GAP, KEEP, SUB, Ragged

INSERTED, SUBSTITUTED, DELETED = "+", "~", "-"

# ---- recording -------------------------------------------------------------------------------------------------------

SAVED = ("t", "label", "ids", "text", "edits")  # fields of a state in a file; the others follow from these


class State(NamedTuple):
    """The sequence before a step of the sampler, and what the step does to it; no edits after the last step."""

    t: float
    label: str  # "" for Edit Flows, "mask" or "edit" for the phases of ME-DLM
    ids: list[int]
    text: list[str]  # one string per token
    edits: list[list[int]]  # [position, op, sub_token, ins_token] where there is something to do
    uids: list[object]  # the identity of every token
    total: tuple[int, int, int]  # tokens inserted, substituted, deleted by all steps before


@dataclass
class Trace:
    """One sequence of a batch while it is generated."""

    prompt_len: int  # the first tokens, which are never edited
    pieces: Callable[[list[int]], list[str]]  # token ids to one string per token (`Tokenizer.pieces`)
    mask_id: int | None = None  # drawn as a block
    pad_id: int | None = None  # drawn as a dot
    index: int = 0  # which sequence; samplers keep the order of the prompts in the batch they report
    live: object = None  # a file such as sys.stdout: if it is a terminal, every step is drawn as it happens
    states: list[State] = field(default_factory=list)
    final: State | None = None

    def __post_init__(self):
        screen = Screen(self.live) if self.live else None
        self.screen = screen if screen and screen.is_terminal else None

    def on_step(self, t, x: Ragged, op, sub_token, ins_token, label: str = "") -> None:
        """Called by a sampler after each step, with the state before it and the arguments of `apply_edits`, all [T]."""
        a, b = x.cu_seqlens[self.index : self.index + 2].tolist()
        ids, *columns = (column[a:b].tolist() for column in (x.ids, op, sub_token, ins_token))
        edits = [[i, *edit] for i, edit in enumerate(zip(*columns)) if edit[0] != KEEP or edit[2] != GAP]
        self.states.append(self._state(float(t), label, ids, self.pieces(ids), edits))
        if self.screen:
            now = len(self.states) - 1
            self.screen.draw(_frame(self, now, max(0, now - 1)))

    def finish(self, ids: list[int] | None = None) -> "Trace":
        """Ends the recording with the final state, by default what the last step leaves."""
        while len(self.states) > 1 and all(s.label == "edit" and not s.edits for s in self.states[-2:]):
            self.states.pop()  # passes that only other sequences of the batch still made
        if ids is None:
            ids, _ = _apply(self.states[-1])
        self.final = self._state(1.0, "", ids, self.pieces(ids), [])
        if self.screen:
            self.screen.draw(frames(self)[-1])
            self.screen.write(pair_lines(self, self.screen.width()))
        return self

    def _state(self, t, label, ids, text, edits) -> State:
        """The next state, with identities carried over from the one before by its edits."""
        if not self.states:
            return State(t, label, ids, text, edits, [object() for _ in ids], (0, 0, 0))
        last = self.states[-1]
        made = [(ins != GAP, op == SUB and sub != last.ids[i], op == DEL) for i, op, sub, ins in last.edits]
        total = tuple(map(sum, zip(last.total, *made)))
        return State(t, label, ids, text, edits, _carry(*_apply(last), ids), total)

    def save(self, path) -> None:
        """Writes a finished trace as JSON. Raises OSError."""
        record = dict(format="nanoedit trace", prompt_len=self.prompt_len, mask_id=self.mask_id, pad_id=self.pad_id)
        record["steps"] = [{name: getattr(state, name) for name in SAVED} for state in self.states]
        record["final"] = self.final.ids, self.final.text
        Path(path).write_text(json.dumps(record), encoding="utf-8")

    @staticmethod
    def load(path) -> "Trace":
        """Reads what `save` wrote. Raises OSError, or ValueError naming the file."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            trace = Trace(record["prompt_len"], None, record["mask_id"], record["pad_id"])
            for step in record["steps"]:
                trace.states.append(trace._state(*(step[name] for name in SAVED)))
            trace.final = trace._state(1.0, "", *record["final"], [])
            frames(trace)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: not a trace written by nanoEdit ({type(error).__name__}: {error})") from error
        return trace


def _apply(state: State) -> tuple[list[int], list[object]]:
    """`ragged.apply_edits` for one sequence, with identities: substituted tokens keep theirs, inserted ones are new."""
    ids, uids = list(state.ids), list(state.uids)
    for i, op, sub, ins in reversed(state.edits):
        if ins != GAP:
            ids.insert(i + 1, ins)
            uids.insert(i + 1, object())
        if op == SUB:
            ids[i] = sub
        if op == DEL:
            del ids[i], uids[i]
    return ids, uids


def _carry(ids, uids, changed) -> list[object]:
    """Identities of `changed`, the state a sampler reports where `ids` was expected (pads dropped, the end forced)."""
    if ids == changed:
        return uids
    carried = [object() for _ in changed]
    for a, b, n in SequenceMatcher(None, ids, changed, autojunk=False).get_matching_blocks():
        carried[b : b + n] = uids[a : a + n]
    return carried


# ---- frames ----------------------------------------------------------------------------------------------------------

BLOCKS = {"mask": " ░░", "pad": " ·"}  # what stands for these tokens


class Cell(NamedTuple):
    """One token of a frame, or a part of it, as it is shown."""

    text: str  # printable: no control characters but newlines
    kind: str = "text"  # or "prompt", "mask", "pad"; in captions "title", "dim"
    mark: str = ""  # INSERTED or SUBSTITUTED, if that is how it got here, then DELETED if the next frame lacks it


class Frame(NamedTuple):
    """The sequence after some steps. Edits are counted as (inserted, substituted, deleted)."""

    step: str  # "3/8", or "3" while the decode runs
    phase: str  # "t = 0.25", "mask pass 3", "edit pass 1"
    t: float
    cells: list[Cell]
    edits: tuple[int, ...]  # made since the frame before
    total: tuple[int, ...]  # made since the beginning


def frames(trace: Trace, limit: int | None = None) -> list[Frame]:
    """The frames of a finished trace: all, or at most `limit` (2 or more) of those in which something changed."""
    states = [*trace.states, trace.final]
    chosen = range(len(states))
    if limit is not None:
        changed = [k for k in chosen if k in (0, chosen[-1]) or states[k].ids != states[k - 1].ids]
        count = min(limit, len(changed))
        chosen = [changed[k * (len(changed) - 1) // max(1, count - 1)] for k in range(count)]
    return [_frame(trace, *numbers) for numbers in zip(chosen, [None, *chosen], [*chosen[1:], None])]


def _frame(trace: Trace, now: int, before: int | None = None, after: int | None = None) -> Frame:
    """State `now`, marked by comparison with the states before and after it. No `before`: nothing has arrived; no
    `after`: what leaves is what the step that was recorded with it deletes."""
    states = [*trace.states, trace.final] if trace.final else trace.states
    state, past = states[now], states[now if before is None else before]
    was = dict(zip(past.uids, past.ids))
    stays = set(_apply(state)[1] if after is None else states[after].uids)
    cells = []
    for i, (token, text, uid) in enumerate(zip(state.ids, state.text, state.uids, strict=True)):
        kind = {trace.pad_id: "pad", trace.mask_id: "mask"}.get(token, "text")
        kind = "prompt" if i < trace.prompt_len else kind
        mark = "" if was.get(uid) == token else SUBSTITUTED if uid in was else INSERTED
        mark += "" if uid in stays else DELETED
        shown = BLOCKS.get(kind) or printable(text)
        if mark:
            shown = shown.replace("\n", "¶\n") or "·"  # something to see the mark on
        cells.append(Cell(shown, kind, mark))
    phase, label = f"t = {state.t:.2f}", states[now - 1].label if now else ""
    if label:
        phase = f"{label} pass {sum(s.label == label for s in states[:now])}"
    step = f"{now}/{len(trace.states)}" if trace.final else f"{now}"
    edits = tuple(b - a for a, b in zip(past.total, state.total))
    return Frame(step, phase, state.t, cells, edits, state.total)


def comparison(trace: Trace) -> list[list[Cell]]:
    """ME-DLM's draft and the repaired text, without the prompt, differences marked; nothing without an edit phase."""
    draft = next((state for state in trace.states if state.label == "edit"), None)
    if draft is None:
        return []
    # Without the edits: a token that was deleted and came back is no difference.
    pair = Trace(trace.prompt_len, None, trace.mask_id, trace.pad_id, states=[draft._replace(edits=[])])
    pair.final = pair._state(1.0, "", trace.final.ids, trace.final.text, [])
    return [frame.cells[trace.prompt_len :] for frame in frames(pair)]


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters become pictures, half characters and overrides U+FFFD."""
    text = re.sub("\r\n?|[\v\f\x85\u2028\u2029]", "\n", text).replace("\t", "    ")
    text = re.sub("[\0-\x09\x0b-\x1f]", lambda c: chr(0x2400 + ord(c[0])), text)
    odd = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")} - {"\n", "\u200d"}
    return "".join("\N{REPLACEMENT CHARACTER}" if c in odd else c for c in text)


# ---- lines -----------------------------------------------------------------------------------------------------------


def columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def wrap(cells: list[Cell], width: int) -> list[list[Cell]]:
    """Cells to lines of at most `width` columns. Breaks at newlines and between words (not between tokens), inside a
    word only if it is too long. A cell on two lines becomes two."""
    owners = [n for n, cell in enumerate(cells) for _ in cell.text]
    lines, x = [[]], 0  # lines of (number of the cell, character)
    for word in re.finditer(r"\n| ?[^ \n]+| ", "".join(cell.text for cell in cells)):
        letters = list(zip(owners[slice(*word.span())], word[0]))
        starts = word[0] == "\n" or (x > 0 and x + columns(word[0]) > width)
        if starts:
            lines, x = [*lines, []], 0
        if word[0][0].isspace() and (starts or (x == 0 and cells[letters[0][0]].kind in BLOCKS)):
            letters = letters[1:]
        for n, c in letters:
            if x and x + columns(c) > width:
                lines, x = [*lines, []], 0
            lines[-1].append((n, c))
            x += columns(c)
    runs = [groupby(line, key=lambda letter: letter[0]) for line in lines]
    return [[cells[n]._replace(text="".join(c for _, c in run)) for n, run in line] for line in runs]


def view(lines: list[list[Cell]], rows: int) -> list[list[Cell]]:
    """Of a text that is too long to be seen at once, the page of so many rows that has the first change."""
    changed = (n for n, line in enumerate(lines) if any(cell.mark for cell in line))
    start = next(changed, 0) // rows * rows
    return lines[start : start + rows]


LEGEND = (Cell("inserted", mark=INSERTED), Cell("substituted", mark=SUBSTITUTED), Cell("to be deleted", mark=DELETED))


def layout(frame: Frame, width: int, height: int) -> list[list[Cell]]:
    """A frame as lines: progress, the text, the legend with all edits and (+) the newest."""
    room = max(0, width - len(frame.phase) - len(frame.step) - 9)
    full = round(room * frame.t)
    head = [Cell(f"{frame.phase}  {'━' * full}"), Cell(f"{'─' * (room - full)}  step {frame.step}", "dim")]
    legend = []
    for cell, total, new in zip(LEGEND, frame.total, frame.edits):
        legend += [cell, Cell(f" {total}"), Cell(f" +{new}" if new else "", "dim"), Cell("   ")]
    legend = wrap(legend, width)
    text = view(wrap(frame.cells, width), max(1, height - 3 - len(legend)))
    return [wrap(head, width)[0], [], *text, [], *legend]


def pair_lines(trace: Trace, width: int, rows: int = sys.maxsize) -> list[list[Cell]]:
    """Of an ME-DLM decode, the draft and the repaired text, one above the other, so many rows of each."""
    lines = []
    for name, cells in zip(("draft:", "repaired:"), comparison(trace)):
        lines += [[Cell(name, "dim")], *view(wrap(cells, width), rows), []]
    return lines


# ---- terminal --------------------------------------------------------------------------------------------------------

BRACKETS = {INSERTED: ("{+", "+}"), SUBSTITUTED: ("{~", "~}"), DELETED: ("[-", "-]"), "": ("", "")}
# Bold underline, reverse, strike-through: told apart without their colours, which NO_COLOR removes.
STYLES = {INSERTED: ("1;4", ";32"), SUBSTITUTED: ("7", ";33"), DELETED: ("9", ";31")}
ASCII = str.maketrans("░━─·¶", "_=-.$")  # for files that cannot hold the others


def show(trace: Trace, file=None, delay: float = 0.1, limit: int = 8) -> None:
    """Replays a trace: in place on a terminal, `delay` seconds a frame; elsewhere as text in at most `limit` frames."""
    screen = Screen(file or sys.stdout)
    for frame in frames(trace, None if screen.is_terminal else limit):
        screen.draw(frame)
        time.sleep(delay * screen.is_terminal)
    screen.write(pair_lines(trace, screen.width()))


class Screen:
    """A file that shows frames: on a terminal each takes the place of the one before, in others they follow it."""

    def __init__(self, file):
        self.file, self.height = file, 0
        self.is_terminal = file.isatty() and os.environ.get("TERM") != "dumb"

    def width(self) -> int:
        return max(2, min(100, shutil.get_terminal_size().columns))

    def draw(self, frame: Frame) -> None:
        # The cursor rests on the line below the picture, which must be on the screen, too.
        room = shutil.get_terminal_size().lines - 1 if self.is_terminal else sys.maxsize
        lines = [*layout(frame, self.width(), room - 1), []][:room]
        if self.is_terminal and self.height:
            self.file.write(f"\x1b[{self.height}F\x1b[J")
        self.write(lines)
        self.height = len(lines)

    def write(self, lines: list[list[Cell]]) -> None:
        """Writes lines with escape codes, or brackets as in a word diff, around runs of one kind of edit."""
        encoding = self.file.encoding or "utf-8"
        for line in lines:
            text = ""
            for (before, after), run in groupby(line, key=self._around):
                words = "".join(cell.text for cell in run)
                start = len(words) - len(words.lstrip(" ") or words)  # marks begin at the word, not at its space
                text += words[:start] + before + words[start:] + after
            if text.encode(encoding, "replace").decode(encoding) != text:
                text = text.translate(ASCII).encode(encoding, "replace").decode(encoding)
            self.file.write(text.rstrip() + "\n")
        self.file.flush()

    def _around(self, cell: Cell) -> tuple[str, str]:
        if not self.is_terminal:
            return BRACKETS[cell.mark[-1:]]
        color = not os.environ.get("NO_COLOR")
        codes = ";".join(style + ink * color for style, ink in map(STYLES.get, cell.mark))
        codes = codes or "2" * (cell.kind != "text")  # dim
        return (f"\x1b[{codes}m", "\x1b[0m") if codes else ("", "")


# ---- GIF -------------------------------------------------------------------------------------------------------------

U = 2  # pixels per unit of length: text stays crisp on dense screens
SIZE, ROW, MARGIN = 15 * U, 26 * U, 28 * U
PAPER, INK, DIM, LINE = "#FFFFFF", "#1F2328", "#818B98", "#D8DEE4"
# Of a mark, of its text, and behind it; the marks' colours are Okabe and Ito's, made for colour-blind readers.
COLORS = {
    INSERTED: ("#009E73", "#005C43", "#D5F0E4"),
    SUBSTITUTED: ("#0072B2", "#004F7C", "#DCEAF7"),
    DELETED: ("#D55E00", "#A84300", "#FDE6D8"),
}
FONTS = ("DejaVuSansMono", "Menlo", "consola", "LiberationMono-Regular")  # found in the system's font folders


@cache
def font() -> ImageFont.FreeTypeFont:
    """A monospaced font of the system, else the one built into Pillow."""
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, SIZE)
    return ImageFont.load_default(SIZE)


def write_gif(trace: Trace, path, title="nanoEdit", width: int = 680, max_rows=18, max_frames=120) -> None:
    """Draws a decode as an animated GIF, `width` units (2 pixels each) wide. Raises OSError.

    Steps without a change are left out, and at most `max_frames` are drawn. Of a text of more than `max_rows` lines
    the page that changes is in view. The last frame, held for 3 seconds, is the final text without marks, or ME-DLM's
    draft above the repaired text with their differences.
    """
    per_line = int((width * U - 2 * MARGIN) / font().getlength("m"))
    shown = frames(trace, max_frames - 1)
    pair = pair_lines(trace, per_line, max_rows // 2)
    end = _frame(trace, len(trace.states))  # compared with nothing: without marks
    if pair or end != shown[-1]:
        shown.append(end)
    pages = [layout(frame, per_line, max_rows + 4) for frame in shown]
    if pair:
        head, *_ = layout(end._replace(phase="draft and repaired"), per_line, max_rows)
        pages[-1] = [head, [], *pair, pages[-1][-1]]
    rows = max(map(len, pages))
    images, palette = [], _palette()
    for page in pages:
        page[-1:-1] = [[]] * (rows - len(page))  # the legend is at the bottom
        image = Image.new("RGB", (width * U, rows * ROW + 2 * MARGIN), PAPER)
        draw = ImageDraw.Draw(image)
        for n, line in enumerate([[Cell(title, "title")], *page]):
            x = MARGIN
            for cell in line:
                x = draw_cell(draw, x, MARGIN // 2 + n * ROW, cell)
        images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
    each = int(max(80, min(600, 12000 / len(images)))) // 10 * 10
    durations = [max(each, 700), *[each] * (len(images) - 2), 3000][-len(images) :]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, disposal=1)


def _palette() -> Image.Image:
    """One palette for all frames, so that only what changes is stored: inks and their shades on what is below them."""
    pairs = [(INK, PAPER), (DIM, PAPER), (LINE, LINE)]
    pairs += [(ink, fill) for *inks, fill in COLORS.values() for ink in inks]
    colors = []
    for ink, fill in (map(ImageColor.getrgb, pair) for pair in pairs):
        colors += [round(a + (b - a) * k / 7) for k in range(8) for a, b in zip(ink, fill)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colors)
    return palette


def draw_cell(draw, x: float, y: float, cell: Cell) -> float:
    """A token in the row that starts at y; returns where it ends. Underline, dots and strike carry the meaning of a
    mark, colours repeat it."""
    advance = font().getlength("m")
    word = cell.text.lstrip(" ") or cell.text
    x += advance * (len(cell.text) - len(word))
    end = x + advance * columns(word) - 1
    _, ink, fill = COLORS.get(cell.mark[-1:], (None, INK if cell.kind in ("text", "title") else DIM, LINE))
    if cell.kind == "mask":
        draw.rounded_rectangle((x + U, y + 5 * U, end - U, y + 21 * U), 4 * U, fill)
    else:
        if cell.mark:
            draw.rounded_rectangle((x, y + 2 * U, end, y + 24 * U), 3 * U, fill)
        draw.text((x, y + 18 * U), word, ink, font(), anchor="ls", stroke_width=(cell.kind == "title") * 0.6)
    for mark in cell.mark:
        top = y + (13 if mark == DELETED else 22) * U
        dots = [(dot, dot + 3 * U - 1) for dot in range(round(x), round(end) - U, 5 * U)]
        for left, right in dots if mark == SUBSTITUTED else [(x, end)]:
            draw.rectangle((left, top, right, top + 2 * U - 1), COLORS[mark][0])
    return end + 1


# ---- HTML ------------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).with_suffix(".html")  # the page, with {{title}} and {{data}} where these go


def write_html(trace: Trace, path, title: str = "nanoEdit", max_frames: int = 1000) -> None:
    """Writes a decode as one HTML file that needs nothing else: a slider, a play button, arrow keys. Raises OSError.

    The frames are chosen as in `write_gif`. All text of the model is data, set with `textContent`, never markup.
    """

    def rows(cells):
        return [cell[:1] if cell == Cell(cell.text) else cell for cell in cells]

    shown = [frame._asdict() | {"cells": rows(frame.cells)} for frame in frames(trace, max_frames)]
    data = json.dumps(dict(frames=shown, pair=[rows(side) for side in comparison(trace)]), separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # so nothing in it can end the script element
    head, tail = PAGE.read_text(encoding="utf-8").split("{{data}}")
    Path(path).write_text(head.replace("{{title}}", html.escape(title)) + data + tail, encoding="utf-8")


def main(argv=None) -> None:
    f = cli.Flags("Look at a recorded decode.")
    f.add_argument("what", choices=("show", "gif", "html"), help="replay it in the terminal, draw it, or make a page")
    f.add_argument("trace", help="a trace saved as JSON")
    f.add_argument("-o", "--output", help="file to write; by default decode_trace.gif or .html")
    f.add_argument("--title", default="nanoEdit", help="headline of the picture")
    f.add_argument("--delay", type=cli.number(low=0), default=0.1, help="seconds per frame on the terminal")
    args = f.parse_args(argv)
    trace, output = Trace.load(args.trace), args.output or f"decode_trace.{args.what}"
    if args.what == "show":
        show(trace, delay=args.delay)
    elif args.what == "gif":
        write_gif(trace, output, args.title)
    else:
        write_html(trace, output, args.title)


if __name__ == "__main__":
    cli.run(main)
