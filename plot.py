"""Line charts with Pillow alone: the losses of a run, or any few series, as a PNG.

    line_chart([Series("stage 2", [2, 4, 8], [.1, .7, 1.0])], "accuracy.png", "Toy task", "passes", "right answers")

`plot_runs` draws the `metrics.jsonl` files that train.py writes. Fonts and colours are shared with the pictures of
trace.py.
"""

import json
import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

# Okabe and Ito's palette, whose colours stay apart for colour-blind readers.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PAPER, INK, DIM, LINE = "#FFFFFF", "#1F2328", "#818B98", "#D8DEE4"

FONTS = [  # regular and bold; found by name in the system's font folders
    ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    ("Menlo.ttc", "Menlo.ttc"),
    ("consola.ttf", "consolab.ttf"),
    ("LiberationMono-Regular.ttf", "LiberationMono-Bold.ttf"),
]
PLAIN = {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-", "·": ".", "→": ">", "↵": "\\n"}


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A monospaced font of the system, else the one built into Pillow. Raises OSError if Pillow cannot scale fonts."""
    for names in FONTS:
        try:
            return ImageFont.truetype(names[bold], size)
        except OSError:
            continue
    try:
        return ImageFont.load_default(size)
    except ImportError as error:
        raise OSError("drawing text needs Pillow with FreeType: pip install --force-reinstall pillow") from error


def fit(text: str, face: ImageFont.FreeTypeFont) -> str:
    """The text with what the font lacks replaced by plain letters and signs; where there are none, it draws its box."""
    return "".join(c if c == "\n" or _has(face, c) else _stand_in(face, c) for c in text)


@cache
def _stand_in(face, c: str) -> str:
    plain = unicodedata.normalize("NFKD", PLAIN.get(c, c))
    plain = "".join(p for p in plain if not unicodedata.combining(p))
    return plain if plain and all(_has(face, p) for p in plain) else c


@cache
def _has(face, c: str) -> bool:
    return c == " " or bytes(face.getmask(c)) != bytes(face.getmask("\U0010fffd"))


# ---- line charts -----------------------------------------------------------------------------------------------------

COLORS = [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK, DIM]
U = 4  # pixels per unit of length while drawing; the picture is then halved, which smooths its lines
WIDTH, HEIGHT = 760 * U, 460 * U
LEFT, RIGHT, BOTTOM = 66 * U, 24 * U, 60 * U


class Series(NamedTuple):
    """A curve. Points that are not finite are left out."""

    label: str  # "" for none in the legend
    x: Sequence[float]
    y: Sequence[float]
    style: str = "both"  # "line", "points", "both", or "faint": a pale line behind the others that may leave the view
    color: int | None = None  # index into COLORS, which also chooses the marker; by default the place in the list
    error: Sequence[float] | None = None  # half the length of an error bar at each point


def line_chart(
    series: Sequence[Series],
    path,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
    log_x: bool = False,
) -> None:
    """Draws curves as a PNG of 1520 x 920 pixels. Raises OSError; ValueError if there is nothing to draw.

    y_range: by default all but faint lines is in view. x_ticks: round numbers unless given. log_x: spaces the x axis by
    ratio; needs x > 0.
    """
    series = [_finite(s, n) for n, s in enumerate(series)]
    seen = [s for s in series if s.style != "faint" and len(s.x)] or [s for s in series if len(s.x)]
    if not seen:
        raise ValueError(f"{path}: there is nothing to draw")
    warp = np.log if log_x else np.asarray
    x = warp(np.concatenate([s.x for s in seen]))
    y = np.concatenate([[*(s.y - s.error), *(s.y + s.error)] for s in seen])
    first, last = _padded(x.min(), x.max(), 0.02)
    low, high = y_range or _padded(y.min(), y.max(), 0.05)

    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 34 * U), fit(title, font(16 * U, bold=True)), INK, font(16 * U, bold=True), anchor="ls")
    top = _draw_legend(draw, [s for s in series if s.label and len(s.x)]) + 40 * U
    bottom = HEIGHT - BOTTOM

    def place(x, y):
        """Data to pixels."""
        up = np.clip((np.asarray(y) - low) / (high - low), 0, 1)
        return LEFT + (warp(x) - first) / (last - first) * (WIDTH - LEFT - RIGHT), bottom - up * (bottom - top)

    small = font(12 * U)
    for tick in _ticks(low, high, 6):
        _, at = place(1, tick)
        draw.line((LEFT, at, WIDTH - RIGHT, at), LINE, U)
        draw.text((LEFT - 8 * U, at), _name(tick), DIM, small, anchor="rm")
    for tick in x_ticks or _ticks(*(np.exp([first, last]) if log_x else (first, last)), 8):
        at, _ = place(tick, low)
        draw.line((at, bottom, at, bottom + 5 * U), DIM, U)
        draw.text((at, bottom + 10 * U), _name(tick), DIM, small, anchor="mt")
    draw.line((LEFT, bottom, WIDTH - RIGHT, bottom), DIM, U)
    draw.text((LEFT, top - 12 * U), fit(y_label, small), DIM, small, anchor="ls")
    draw.text((WIDTH - RIGHT, HEIGHT - 14 * U), fit(x_label, small), DIM, small, anchor="rs")
    for s in sorted(series, key=lambda s: s.style != "faint"):
        _draw_series(draw, s, place)
    image.reduce(2).save(path, format="PNG", optimize=True)


def _finite(s: Series, place: int) -> Series:
    """The series as arrays, without points that are not finite, and with a colour."""
    x, y, error = (np.asarray(v, float) for v in (s.x, s.y, np.zeros(len(s.y)) if s.error is None else s.error))
    keep = np.isfinite(x) & np.isfinite(y) & np.isfinite(error)
    color = (place if s.color is None else s.color) % len(COLORS)
    return s._replace(x=x[keep], y=y[keep], error=error[keep], color=color)


def _padded(low, high, share) -> tuple[float, float]:
    pad = share * (high - low) or 0.5 * abs(high) or 1.0
    return float(low - pad), float(high + pad)


def _draw_legend(draw, series) -> float:
    """Labels under the title, in as many rows as they need. Returns where it ends."""
    small, x, y = font(12 * U), LEFT, 56 * U
    for s in series:
        label = fit(s.label, small)
        if x > LEFT and x + 30 * U + small.getlength(label) > WIDTH - RIGHT:
            x, y = LEFT, y + 20 * U
        if s.style != "points":
            draw.line((x, y, x + 22 * U, y), COLORS[s.color], 2 * U)
        if s.style in ("points", "both"):
            _draw_marker(draw, x + 11 * U, y, s.color)
        draw.text((x + 30 * U, y), label, INK, small, anchor="lm")
        x += 52 * U + small.getlength(label)
    return y


def _draw_series(draw, s: Series, place) -> None:
    color = COLORS[s.color]
    points = list(zip(*place(s.x, s.y)))
    if s.style == "faint":
        pale = tuple(round(0.25 * c + 0.75 * 255) for c in ImageColor.getrgb(color))
        draw.line(points, pale, U)
    elif s.style != "points":
        draw.line(points, color, 2 * U, joint="curve")
    for x, low, high in zip(s.x, s.y - s.error, s.y + s.error):
        if low < high:
            (at, a), (_, b) = place(x, low), place(x, high)
            draw.line((at, a, at, b), color, U)
            for end in (a, b):
                draw.line((at - 3 * U, end, at + 3 * U, end), color, U)
    if s.style in ("points", "both"):
        for x, y in points:
            _draw_marker(draw, x, y, s.color)


def _draw_marker(draw, x, y, color) -> None:
    """Another shape for each of the first four colours, so that curves can be told apart in grey."""
    r = 4.5 * U
    shape = [
        lambda: draw.circle((x, y), r, **style),
        lambda: draw.regular_polygon((x, y, 1.2 * r), 4, **style),
        lambda: draw.regular_polygon((x, y, 1.3 * r), 3, **style),
        lambda: draw.regular_polygon((x, y, 1.3 * r), 4, rotation=45, **style),
    ]
    style = dict(fill=COLORS[color], outline=PAPER)
    shape[color % 4]()


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between low and high: at least one, at most count + 1."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first <= count:
            break
    return [k * step for k in range(first, last + 1)]


def _name(tick: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(tick) >= size:
            return f"{tick / (1e3 if unit == 'k' else size):.6g}{unit}"
    return f"{tick:.6g}"


# ---- losses of runs --------------------------------------------------------------------------------------------------


def plot_runs(runs: Sequence, path) -> None:
    """Draws the losses in the metrics.jsonl of some runs: smoothed over raw, validation as points. Raises OSError.

    One run: all its losses. Several: the total loss and the validation loss of each, in one colour per run. Raises
    ValueError, naming the file, when there is no loss in it.
    """
    series = []
    for run in runs:
        file = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
        curves = read_metrics(file)
        keys = [k for k in curves if k.startswith(("loss", "eval_loss"))]
        if len(runs) > 1:
            keys = [k for k in keys if k in ("loss", "eval_loss")]
        if not keys:
            raise ValueError(f"{file}: no loss in it yet")
        base = len({s.color for s in series})
        plain = list(dict.fromkeys(k.removeprefix("eval_") for k in keys))
        for key in keys:
            x, y = curves[key]
            label = key if len(runs) == 1 else f"{Path(run).resolve().name} {key}"
            color = base + plain.index(key.removeprefix("eval_"))
            if key.startswith("eval_"):
                series.append(Series(label, x, y, "points", color))
            else:
                series += [Series("", x, y, "faint", color), Series(label, x, smooth(y), "line", color)]
    title = Path(runs[0]).resolve().name if len(runs) == 1 else "Losses"
    line_chart(series, path, title, "step", "loss")


def read_metrics(file) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """metrics.jsonl to {key: (steps, values)}, one value per step (the newest), finite ones only.

    A run that is being written may end in half a line, which is left out. Raises OSError, or ValueError with file and
    line.
    """
    curves = {}
    lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f'{file}, line {number}: expected a JSON object with a "step"') from error
        for key, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(key, {})[step] = value
    return {key: tuple(map(np.array, zip(*sorted(values.items())))) for key, values in curves.items()}


def smooth(y: np.ndarray) -> np.ndarray:
    """The mean over a fortieth of the curve around each point, or over what of that there is at its ends."""
    total, half, at = np.concatenate([[0.0], np.cumsum(y)]), len(y) // 80, np.arange(len(y))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
    return (total[last] - total[first]) / (last - first)
