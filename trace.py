"""Pictures of a decode: an animated GIF, and one HTML file to step through. Recording and marks are in frames.py.

    trace = Trace(len(prompt), tokenizer.pieces, tokenizer.mask_id, live=sys.stdout)
    samples = sample(model, [prompt], ..., on_step=trace.on_step)
    trace.finish(prompt + samples[0].response)
    write_gif(trace, "decode.gif")
    trace.save("decode.json")

A saved trace can be looked at later; `plot` draws the losses of training runs (plot.py):

    python trace.py show decode.json
    python trace.py gif decode.json -o decode.gif
    python trace.py html decode.json -o decode.html
    python trace.py plot RUN_DIR [RUN_DIR ...] -o losses.png
"""

import argparse
import html
import json
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageColor, ImageDraw

from frames import (
    DELETED,
    INSERTED,
    SUBSTITUTED,
    Cell,
    Edits,
    Frame,
    Span,
    Trace,
    comparison,
    frames,
    show,
    window,
    wrap,
)
from plot import BLUE, DIM, GREEN, INK, LINE, PAPER, VERMILLION, fit, font, plot_runs

# ---- GIF -------------------------------------------------------------------------------------------------------------

U = 2  # pixels per unit of length: text stays crisp on dense screens
ROW, CAPTION, MARGIN, HEADER, FOOTER = 26 * U, 34 * U, 28 * U, 80 * U, 60 * U
PILLS = {INSERTED: ("#D5F0E4", "#005C43"), SUBSTITUTED: ("#DCEAF7", "#004F7C"), DELETED: ("#FDE6D8", "#A84300")}
EDGES = {INSERTED: GREEN, SUBSTITUTED: BLUE, DELETED: VERMILLION}


class _Panel(NamedTuple):
    """A text with a caption, or the part of it that is in view."""

    caption: str
    lines: list[list[Span]]
    start: int  # the first line in view
    rows: int  # lines in view, if there are as many

    def visible(self) -> list[list[Span]]:
        return self.lines[self.start : self.start + self.rows]

    def height(self) -> int:
        return len(self.visible()) * ROW + (CAPTION if self.caption else 0)


def write_gif(trace: Trace, path, title: str | None = None, width: int = 680, max_rows=18, max_frames=120) -> None:
    """Draws a decode as an animated GIF, `width` units (2 pixels each) wide. Raises OSError.

    Steps without a change are left out, and at most `max_frames` are drawn. Text of more than
    `max_rows` lines is scrolled to where it changes. The last frame, held for 3 seconds, is the final text without
    marks, or ME-DLM's draft above the repaired text with their differences.
    """
    shown, pair, face = frames(trace, max_frames - 1), comparison(trace), font(15 * U)
    symbols = dict(mask="mm", pad=fit("·", face), newline=fit("↵", face))

    def lines_of(cells):
        fitted = [cell._replace(text=fit(cell.text, face)) for cell in cells]
        return wrap(fitted, width * U - 2 * MARGIN, face.getlength, symbols)

    closing = shown[-1]._replace(edits=Edits(), cells=[cell._replace(mark="") for cell in shown[-1].cells])
    if pair:
        closing = closing._replace(phase="draft and repaired")
    elif closing == shown[-1]:
        shown.pop()
    scenes, start = [], 0  # the panels of each frame
    for frame in shown if pair else [*shown, closing]:
        lines = lines_of(frame.cells)
        start = window(lines, max_rows, start)
        scenes.append([_Panel("", lines, start, max_rows)])
    if pair:
        sides = [(caption, lines_of(cells)) for caption, cells in zip(("draft", "repaired"), pair)]
        rows = max_rows // 2
        scenes.append([_Panel(caption, lines, window(lines, rows, 0), rows) for caption, lines in sides])

    body = max(sum(panel.height() for panel in scene) for scene in scenes)
    size = (width * U, HEADER + body + FOOTER)
    phases = sum(step.label == "mask" for step in trace.steps) / max(1, len(trace.steps))
    title = title or _method(trace)
    images = (
        _draw_frame(size, title, phases, frame, scene).quantize(palette=_palette(), dither=Image.Dither.NONE)
        for frame, scene in zip([*shown, closing], scenes, strict=True)
    )
    each = int(max(80, min(600, 12000 / len(scenes)))) // 10 * 10
    durations = [max(each, 700), *[each] * (len(scenes) - 2), 3000][-len(scenes) :]
    next(images).save(path, format="GIF", save_all=True, append_images=images, duration=durations, loop=0, disposal=1)


def _method(trace: Trace) -> str:
    return "ME-DLM" if any(step.label for step in trace.steps) else "Edit Flows"


def _draw_frame(size, title, phases, frame: Frame, scene) -> Image.Image:
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    _draw_header(draw, size[0] - MARGIN, title, phases, frame)
    y = HEADER
    for panel in scene:
        if panel.caption:
            draw.text((MARGIN, y + 24 * U), panel.caption.upper(), DIM, font(11 * U, bold=True), anchor="ls")
        end = y + panel.height()
        y = end - len(panel.visible()) * ROW
        if len(panel.lines) > panel.rows:  # a scroll bar
            a, b = (y + (end - y) * n / len(panel.lines) for n in (panel.start, panel.start + panel.rows))
            draw.rounded_rectangle((size[0] - 14 * U, a, size[0] - 10 * U, b), 2 * U, LINE)
        for line in panel.visible():
            for span in line:
                draw_span(draw, MARGIN + span.x, y, span, font(15 * U))
            y += ROW
    _draw_legend(draw, size, frame)
    return image


def _draw_header(draw, right, title, phases, frame: Frame) -> None:
    """Title, step, and a bar: of t, or of the passes made, with a gap where the mask phase (a share of them) ends."""
    face, bold, y = font(12 * U), font(15 * U, bold=True), 50 * U
    draw.text((MARGIN, 32 * U), fit(title, bold), INK, bold, anchor="ls")
    draw.text((right, 32 * U), f"step {frame.step}/{frame.steps}", DIM, face, anchor="rs")
    draw.text((MARGIN, 55 * U), frame.phase or f"t = {frame.t:.2f}", INK, face, anchor="ls")
    left = MARGIN + face.getlength("draft and repaired" if phases else "t = 0.00") + 12 * U
    done, gap = frame.step / frame.steps if phases else frame.t, left + phases * (right - left)
    draw.rounded_rectangle((left, y - 3 * U, right, y + 3 * U), 3 * U, LINE)
    if done:
        draw.rounded_rectangle((left, y - 3 * U, left + max(6 * U, done * (right - left)), y + 3 * U), 3 * U, INK)
    if 0 < phases < 1:
        draw.rectangle((gap - U, y - 3 * U, gap + U, y + 3 * U), PAPER)


def _draw_legend(draw, size, frame: Frame) -> None:
    """What the marks mean, drawn by the function that draws them, with all edits so far and (+) those of this step."""
    face, x, y = font(12 * U), MARGIN, size[1] - 38 * U
    draw.line((MARGIN, y - 8 * U, size[0] - MARGIN, y - 8 * U), LINE, U)
    names = {INSERTED: "inserted", SUBSTITUTED: "substituted", DELETED: "to be deleted"}
    for (mark, name), total, now in zip(names.items(), frame.total, frame.edits):
        draw_span(draw, x, y, Span(0, name, Cell(0, name, "text", mark.strip(DELETED), mark == DELETED)), face)
        x += face.getlength(name) + 7 * U
        draw.text((x, y + 18 * U), str(total), INK, face, anchor="ls")
        after = x + face.getlength(str(total)) + 5 * U
        draw.text((after, y + 18 * U), f"+{now}" if now else "", EDGES[mark], face, anchor="ls")
        x += face.getlength("0000+00") + 14 * U
    draw_span(draw, x, y, Span(0, "mm", Cell(0, "", "mask")), face)
    draw.text((x + face.getlength("mm") + 7 * U, y + 18 * U), "mask", DIM, face, anchor="ls")


def draw_span(draw, x: float, y: float, span: Span, face) -> None:
    """One token in the row that starts at y. Underline, dots and strike carry the meaning, colours repeat it."""
    cell, word = span.cell, span.text.lstrip(" ") or span.text
    mark = DELETED if cell.leaving else cell.mark
    x += face.getlength(span.text[: len(span.text) - len(word)])
    end, base = x + face.getlength(word) - 1, y + 18 * U
    if cell.kind == "mask":
        draw.rounded_rectangle((x + U, y + 5 * U, end - U, y + 21 * U), 4 * U, PILLS[mark][0] if mark else LINE)
    else:
        if mark:
            draw.rounded_rectangle((x, y + 2 * U, end, y + 24 * U), 3 * U, PILLS[mark][0])
        draw.text((x, base), word, PILLS[mark][1] if mark else INK if cell.kind == "text" else DIM, face, anchor="ls")
    if cell.mark == INSERTED:
        draw.rectangle((x, y + 22 * U, end, y + 24 * U - 1), GREEN)
    if cell.mark == SUBSTITUTED:
        for dot in range(round(x), round(end) - U, 5 * U):
            draw.rectangle((dot, y + 22 * U, dot + 3 * U - 1, y + 24 * U - 1), BLUE)
    if cell.leaving:
        middle = base - round(0.28 * face.size)
        draw.rectangle((x, middle - U, end, middle + U - 1), VERMILLION)


@cache
def _palette() -> Image.Image:
    """One palette for all frames, so that only what changes is stored: every ink and its shades on what is below it."""
    pairs = [(ink, PAPER) for ink in (INK, DIM, *EDGES.values())] + [(ink, fill) for fill, ink in PILLS.values()]
    colors = list(ImageColor.getrgb(LINE))
    for ink, fill in (map(ImageColor.getrgb, pair) for pair in pairs):
        colors += [round(a + (b - a) * k / 7) for k in range(8) for a, b in zip(ink, fill)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colors)
    return palette


# ---- HTML ------------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).with_name("trace.html")  # the page, with {{title}} and {{data}} where these go


def write_html(trace: Trace, path, title: str | None = None, max_frames: int = 1000) -> None:
    """Writes a decode as one HTML file that needs nothing else: a slider, a play button, arrow keys. Raises OSError.

    The frames are chosen as in `write_gif`. All text of the model is data, set with `textContent`, never markup.
    """

    def rows(cells):
        plain = {cell for cell in cells if cell.kind == "text" and not cell.mark and not cell.leaving}
        return [(c.text,) if c in plain else (c.text, c.kind, c.mark, c.leaving) for c in cells]

    record = [
        {**frame._asdict(), "cells": rows(frame.cells), "edits": frame.edits._asdict(), "total": frame.total._asdict()}
        for frame in frames(trace, max_frames)
    ]
    data = json.dumps(dict(frames=record, pair=[rows(side) for side in comparison(trace) or ()]), separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # nothing in it can end the script element
    head, tail = PAGE.read_text(encoding="utf-8").split("{{data}}")
    with open(path, "w", encoding="utf-8") as file:
        file.write(head.replace("{{title}}", html.escape(title or _method(trace))) + data + tail)


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Look at a recorded decode, or at the losses of training runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in [("show", "replay a trace in the terminal"), ("gif", "draw it"), ("html", "write it as a page")]:
        command = commands.add_parser(name, help=help)
        command.add_argument("trace", help="a trace saved as JSON")
        if name == "show":
            command.add_argument("--delay", type=float, default=0.1, help="seconds per frame (default 0.1)")
        else:
            command.add_argument("-o", "--output", default=f"decode_trace.{name}", help="default %(default)s")
            command.add_argument("--title", help="headline (default: the method)")
    command = commands.add_parser("plot", help="draw the losses of runs")
    command.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a folder with metrics.jsonl, or such a file")
    command.add_argument("-o", "--output", default="losses.png", help="default %(default)s")
    args = parser.parse_args(argv)
    try:
        if args.command == "plot":
            plot_runs(args.runs, args.output)
        elif args.command == "show":
            show(Trace.load(args.trace), delay=args.delay)
        else:
            write = {"gif": write_gif, "html": write_html}[args.command]
            write(Trace.load(args.trace), args.output, args.title)
    except (OSError, ValueError) as error:
        sys.exit(f"trace.py: error: {error}")


if __name__ == "__main__":
    main()
