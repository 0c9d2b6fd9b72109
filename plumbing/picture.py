"""What a decode did, step by step: a recording of its edits, and pictures of it.

    trace = Trace(len(prompt), tokenizer.pieces, tokenizer.mask_id, live=sys.stdout)
    samples = sample(model, [prompt], ..., on_step=trace.on_step)
    trace.finish(prompt + samples[0].response).save("decode.json")
    write_gif(trace, "decode.gif")  # later: python -m plumbing.picture show|gif|html decode.json

recording  per step, the first sequence of the batch as it was, and the edits about to be made
frames     frame k is the sequence after k steps; every token is marked by how it got there, kept, inserted (+) or
           substituted (~), and by whether it is about to be deleted (-); a last frame shows what came of it
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
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from plumbing import cli
from ragged import DEL, GAP, KEEP, SUB, Ragged

INSERTED, SUBSTITUTED, DELETED = "+", "~", "-"
LEGEND = {INSERTED: "inserted", SUBSTITUTED: "substituted", DELETED: "to be deleted"}
BLOCKS = {"mask": " ░░", "pad": " ·"}  # what stands for these tokens

# ---- recording -------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """The sequence before a step of the sampler, and what the step does to it; no edits after the last step."""

    t: float
    label: str  # "" for Edit Flows, "back" for its corrector, "mask" or "edit" for the phases of ME-DLM
    ids: list[int]
    text: list[str]  # one string per token
    edits: list[list[int]]  # [position, op, sub_token, ins_token] where there is something to do
    # What is above goes into a file; this follows from it:
    uids: list[object]  # the identity of every token
    total: tuple[int, ...]  # tokens inserted, substituted, deleted by all steps before


@dataclass
class Trace:
    """The first sequence of a batch while it is generated."""

    prompt_len: int  # the first tokens, which are never edited
    pieces: Callable[[list[int]], list[str]]  # token ids to one string per token (`Tokenizer.pieces`)
    mask_id: int | None = None  # drawn as a block
    pad_id: int | None = None  # drawn as a dot
    title: str = "nanoEdit"  # headline of pictures
    live: object = None  # a file such as sys.stdout: if it is a terminal, every step is drawn as it happens
    states: list[State] = field(default_factory=list)

    def __post_init__(self):
        screen = Screen(self.live) if self.live else None
        self.screen = screen if screen and screen.is_terminal else None

    def on_step(self, t, x: Ragged, op, sub_token, ins_token, label: str = "") -> None:
        """Called by a sampler after each step, with the state before it and the arguments of `apply_edits`, all [T]."""
        ids, *columns = (column[: x.cu_seqlens[1]].tolist() for column in (x.ids, op, sub_token, ins_token))
        edits = [[i, *edit] for i, edit in enumerate(zip(*columns)) if edit[0] != KEEP or edit[2] != GAP]
        self._add(float(t), label, ids, self.pieces(ids), edits)
        if self.screen:
            now = len(self.states) - 1
            self.screen.draw(_frame(self, now, max(0, now - 1)))

    def finish(self, ids: list[int]) -> "Trace":
        """Ends the recording with the final state, prompt and response."""
        while len(self.states) > 1 and all(s.label == "edit" and not s.edits for s in self.states[-2:]):
            self.states.pop()  # passes that only other sequences of the batch still made
        self._add(1.0, "", ids, self.pieces(ids), [])
        if self.screen:
            self.screen.draw(outcome(self))
        return self

    def _add(self, t, label, ids, text, edits) -> None:
        """The next state. Identities are carried over from the one before by its edits."""
        first = State(t, label, ids, text, [], [object() for _ in ids], (0, 0, 0))
        last = self.states[-1] if self.states else first
        made = [(ins != GAP, op == SUB and sub != last.ids[i], op == DEL) for i, op, sub, ins in last.edits]
        total = tuple(map(sum, zip(last.total, *made)))
        expected, uids = _apply(last)
        if expected != ids:  # a sampler may also drop pads, and cut the end or force it
            carried = [object() for _ in ids]
            for a, b, n in SequenceMatcher(None, expected, ids, autojunk=False).get_matching_blocks():
                carried[b : b + n] = uids[a : a + n]
            uids = carried
        self.states.append(State(t, label, ids, text, edits, uids, total))

    def save(self, path) -> None:
        """Writes a finished trace as JSON. Raises OSError."""
        *states, final = self.states
        record = {name: getattr(self, name) for name in ("prompt_len", "mask_id", "pad_id", "title")}
        record |= {"format": "nanoedit trace", "steps": [dict(zip(State._fields[:5], state)) for state in states]}
        record["final"] = final.ids, final.text
        Path(path).write_text(json.dumps(record), encoding="utf-8")

    @staticmethod
    def load(path) -> "Trace":
        """Reads what `save` wrote. Raises OSError, or ValueError naming the file."""
        try:
            record = {"title": "nanoEdit"} | json.loads(Path(path).read_text(encoding="utf-8"))
            trace = Trace(record["prompt_len"], None, record["mask_id"], record["pad_id"], record["title"])
            for step in record["steps"]:
                trace._add(**step)
            trace._add(1.0, "", *record["final"], [])
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


# ---- frames ----------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One token of a frame, or a part of it, as it is shown."""

    text: str  # printable: no control characters but newlines
    kind: str = "text"  # or "prompt", "mask", "pad"; in captions "dim"
    mark: str = ""  # INSERTED or SUBSTITUTED, if that is how it got here, then DELETED if the next frame lacks it


class Frame(NamedTuple):
    """The sequence after some steps."""

    step: int
    phase: str  # "t = 0.25", "mask pass 3", "edit pass 1"
    t: float
    cells: list[Cell]
    total: tuple[int, ...]  # tokens inserted, substituted, deleted since the beginning
    draft: list[Cell] | None = None  # shown above the cells


def frames(trace: Trace, limit: int | None = None) -> list[Frame]:
    """The frames of a finished trace: all, or at most `limit` (2 or more) of those in which something changed."""
    chosen = range(len(trace.states))
    if limit is not None:
        changed = [k for k in chosen if k in (0, chosen[-1]) or trace.states[k].ids != trace.states[k - 1].ids]
        count = min(limit, len(changed))
        chosen = [changed[k * (len(changed) - 1) // max(1, count - 1)] for k in range(count)]
    return [_frame(trace, *numbers) for numbers in zip(chosen, [None, *chosen], [*chosen[1:], None])]


def _frame(trace: Trace, now: int, before: int | None = None, after: int | None = None) -> Frame:
    """State `now`, marked by comparison with the states before and after it. No `before`: nothing has arrived; no
    `after`: what leaves is what the step that was recorded with it deletes."""
    states = trace.states
    state, past = states[now], states[now if before is None else before]
    was = dict(zip(past.uids, past.ids))
    stays = set(_apply(state)[1] if after is None else states[after].uids)
    cells, kinds = [], {trace.pad_id: "pad", trace.mask_id: "mask"}
    for i, (token, text, uid) in enumerate(zip(state.ids, state.text, state.uids, strict=True)):
        kind = "prompt" if i < trace.prompt_len else kinds.get(token, "text")
        mark = "" if was.get(uid) == token else SUBSTITUTED if uid in was else INSERTED
        mark += "" if uid in stays else DELETED
        shown = BLOCKS.get(kind) or printable(text)
        if mark:
            shown = shown.replace("\n", "¶\n") or "·"  # something to see the mark on
        cells.append(Cell(shown, kind, mark))
    phase, label = f"t = {state.t:.2f}", states[now - 1].label if now else ""
    if label not in ("", "back"):
        phase = f"{label} pass {sum(s.label == label for s in states[:now])}"
    return Frame(now, phase, state.t, cells, state.total)


def outcome(trace: Trace) -> Frame:
    """What follows the last frame: the final text without marks, or, without the prompt, ME-DLM's draft and the
    repaired text with their differences marked."""
    end = _frame(trace, len(trace.states) - 1)  # compared with nothing
    draft = next((state for state in trace.states if state.label == "edit"), None)
    if draft is None:
        return end
    # Without the edits: a token that was deleted and came back is no difference.
    pair = Trace(trace.prompt_len, None, trace.mask_id, trace.pad_id, states=[draft._replace(edits=[])])
    pair._add(1.0, "", trace.states[-1].ids, trace.states[-1].text, [])
    draft, repaired = (frame.cells[trace.prompt_len :] for frame in frames(pair))
    return end._replace(phase="draft and repaired", draft=draft, cells=repaired)


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
    owners = iter([n for n, cell in enumerate(cells) for _ in cell.text])
    lines, x = [[]], 0  # lines of (number of the cell, character)
    for word in re.findall(r"\n| ?[^ \n]+| ", "".join(cell.text for cell in cells)):
        starts = word == "\n" or (x > 0 and x + columns(word) > width)
        for c in word:
            if starts or (x > 0 and x + columns(c) > width):
                lines.append([])
                x = 0
            n = next(owners)
            if not (starts and c.isspace()):
                lines[-1].append((n, c))
                x += columns(c)
            starts = False
    runs = [groupby(line, key=lambda letter: letter[0]) for line in lines]
    return [[cells[n]._replace(text="".join(c for _, c in run)) for n, run in line] for line in runs]


def view(lines: list[list[Cell]], rows: int) -> list[list[Cell]]:
    """Of a text that is too long to be seen at once, the page of so many rows that has the first change."""
    changed = (n for n, line in enumerate(lines) if any(cell.mark for cell in line))
    start = next(changed, 0) // rows * rows
    return lines[start : start + rows]


def layout(frame: Frame, width: int, height: int) -> list[list[Cell]]:
    """A frame as lines: progress, the legend with the number of edits, the text."""
    space = max(0, width - len(f"{frame.phase}    step {frame.step}"))
    full = round(space * frame.t)
    head = [Cell(f"{frame.phase}  {'━' * full}"), Cell(f"{'─' * (space - full)}  step {frame.step}", "dim")]
    legend = []
    for (mark, name), total in zip(LEGEND.items(), frame.total):
        legend += [Cell(name, mark=mark), Cell(f" {total}   ")]
    lines = [wrap(head, width)[0], *wrap(legend, width), []]
    rows = max(1, height - len(lines))
    if frame.draft is None:
        return lines + view(wrap(frame.cells, width), rows)
    for name, cells in (("draft:", frame.draft), ("repaired:", frame.cells)):
        lines += [[Cell(name, "dim")], *view(wrap(cells, width), max(1, rows // 2 - 2)), []]
    return lines


# ---- pictures --------------------------------------------------------------------------------------------------------

BRACKETS = {INSERTED: ("{+", "+}"), SUBSTITUTED: ("{~", "~}"), DELETED: ("[-", "-]"), "": ("", "")}
# Bold underline, reverse, strike-through: told apart without their colours, which NO_COLOR removes.
STYLES = {INSERTED: ("1;4", ";32"), SUBSTITUTED: ("7", ";33"), DELETED: ("9", ";31")}
ASCII = str.maketrans("░━─·¶", "_=-.$")  # for files that cannot hold the others

U = 2  # pixels per unit of length: text stays crisp on dense screens
SIZE, ROW, MARGIN = 15 * U, 26 * U, 28 * U
WIDTH, ROWS = 69, 22  # of a frame, in letters and lines
PAPER = "#FFFFFF"
# Of a mark, of its text, and behind it; the marks' colours are Okabe and Ito's, made for colour-blind readers.
COLORS = {
    INSERTED: ("#009E73", "#005C43", "#D5F0E4"),
    SUBSTITUTED: ("#0072B2", "#004F7C", "#DCEAF7"),
    DELETED: ("#D55E00", "#A84300", "#FDE6D8"),
    "text": (PAPER, "#1F2328", PAPER),
    "mask": (PAPER, "#D8DEE4", "#D8DEE4"),
}
FONTS = ("DejaVuSansMono", "Menlo", "consola", "LiberationMono-Regular")  # found in the system's font folders


def show(trace: Trace, file=None, delay: float = 0.1, limit: int = 8) -> None:
    """Replays a trace: in place on a terminal, `delay` seconds a frame; elsewhere as text in at most `limit` frames."""
    screen = Screen(file or sys.stdout)
    for frame in [*frames(trace, None if screen.is_terminal else limit), outcome(trace)]:
        screen.draw(frame)
        time.sleep(delay * screen.is_terminal)


class Screen:
    """A file that shows frames: on a terminal each takes the place of the one before, in others they follow it."""

    def __init__(self, file):
        self.file, self.height = file, 0
        self.is_terminal = file.isatty() and os.environ.get("TERM") != "dumb"

    def draw(self, frame: Frame) -> None:
        size = shutil.get_terminal_size()
        # The cursor rests on the line below the picture, which must be on the screen, too.
        space = size.lines - 1 if self.is_terminal else sys.maxsize
        lines = [*layout(frame, max(2, min(100, size.columns)), space - 1), []][:space]
        encoding = self.file.encoding or "utf-8"
        shown = ""
        for line in lines:
            text = ""
            for (before, after), run in groupby(line, key=self._around):
                words = "".join(cell.text for cell in run)
                start = len(words) - len(words.lstrip(" ") or words)  # marks begin at the word, not at its space
                text += words[:start] + before + words[start:] + after
            if text.encode(encoding, "replace").decode(encoding) != text:
                text = text.translate(ASCII).encode(encoding, "replace").decode(encoding)
            shown += text.rstrip() + "\n"
        if self.is_terminal:
            back = f"\x1b[{self.height}F\x1b[J" if self.height else ""
            # Without wrapping: a terminal may do it as soon as a line is full, or find letters wider than counted here.
            shown = f"{back}\x1b[?7l{shown}\x1b[?7h"
        self.file.write(shown)
        self.file.flush()
        self.height = len(lines)

    def _around(self, cell: Cell) -> tuple[str, str]:
        """Escape codes, or brackets as in a word diff, before and after a run of one kind of edit."""
        if not self.is_terminal:
            return BRACKETS[cell.mark[-1:]]
        color = not os.environ.get("NO_COLOR")
        codes = ";".join(style + ink * color for style, ink in map(STYLES.get, cell.mark))
        codes = codes or "2" * (cell.kind != "text")  # dim
        return (f"\x1b[{codes}m", "\x1b[0m") if codes else ("", "")


def font() -> ImageFont.FreeTypeFont:
    """A monospaced font of the system, else the one built into Pillow, which has little but ASCII."""
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, SIZE)
    return ImageFont.load_default(SIZE)


def write_gif(trace: Trace, path, max_frames: int = 120) -> None:
    """Draws a decode as an animated GIF of what a terminal shows, without steps that change nothing; the last frame is
    held for 3 seconds. Raises OSError."""
    pages = [layout(frame, WIDTH, ROWS) for frame in [*frames(trace, max_frames - 1), outcome(trace)]]
    letters = font()
    size = round(WIDTH * letters.getlength("m")) + 2 * MARGIN, (max(map(len, pages)) + 1) * ROW + 2 * MARGIN
    images = []
    for page in pages:
        images.append(Image.new("P", size, PAPER))
        draw = ImageDraw.Draw(images[-1])
        draw.font = letters
        for n, line in enumerate([[Cell(printable(trace.title))], *page]):
            x = MARGIN
            for cell in line:
                x = draw_cell(draw, x, MARGIN + n * ROW, cell)
    durations = [min(600, 12000 // len(images))] * (len(images) - 1) + [3000]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, disposal=1)


def draw_cell(draw: ImageDraw.ImageDraw, x: float, y: float, cell: Cell) -> float:
    """A token in the row that starts at y; returns where it ends. Lines say what a mark says, colours repeat it."""
    word = cell.text.lstrip(" ") or cell.text
    x += draw.textlength(" ") * (len(cell.text) - len(word))
    end = x + draw.textlength(word)
    _, ink, fill = COLORS.get(cell.mark[-1:] or cell.kind, (PAPER, "#818B98", PAPER))
    draw.rectangle((x, y + 2 * U, end, y + 24 * U), fill)
    draw.text((x, y + 18 * U), word, ink, anchor="ls")
    for mark in cell.mark:
        top = y + (13 if mark == DELETED else 22) * U
        length = 3 * U if mark == SUBSTITUTED else round(end - x)
        for left in range(round(x), round(end) - U, length + 2 * U):
            draw.rectangle((left, top, left + length - 1, top + 2 * U - 1), COLORS[mark][0])
    return end


def write_html(trace: Trace, path, max_frames: int = 1000) -> None:
    """Writes a decode as one HTML file that needs nothing else: a slider, a play button, arrow keys. All text of the
    model is data, set with `textContent`, never markup. Raises OSError."""
    shown = [frame._asdict() for frame in [*frames(trace, max_frames - 1), outcome(trace)]]
    data = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")  # so nothing can end the script element
    head, tail = Path(__file__).with_suffix(".html").read_text(encoding="utf-8").split("{{data}}")
    Path(path).write_text(head.replace("{{title}}", html.escape(trace.title)) + data + tail, encoding="utf-8")


def main(argv=None) -> None:
    f = cli.Flags("Look at a recorded decode.")
    f.add_argument("what", choices=("show", "gif", "html"), help="replay it in the terminal, draw it, or make a page")
    f.add_argument("trace", help="what sample.py --save_trace wrote")
    f.add_argument("-o", "--output", help="file to write; by default decode_trace.gif or .html")
    f.add_argument("--title", help="headline of the picture, instead of the trace's")
    args = f.parse_args(argv)
    trace, output = Trace.load(args.trace), args.output or f"decode_trace.{args.what}"
    trace.title = args.title or trace.title
    if args.what == "show":
        return show(trace)
    {"gif": write_gif, "html": write_html}[args.what](trace, output)
    print(f"decode written to {output}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
