"""Charts: the training and evaluation losses of runs, and means with error bars for other recipes.

    python recipes/plot.py RUN_DIR [RUN_DIR ...] -o losses.png
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

try:
    from matplotlib import pyplot
except ImportError:
    sys.exit("recipes/plot.py needs matplotlib: pip install -r requirements-dev.txt")

# Colours that colour-blind readers can tell apart, in a picture of 1520 x 920 pixels that can be read when small.
pyplot.style.use(["petroff10", {"font.size": 13, "axes.grid": True, "grid.alpha": 0.4}])
FIGURE = {"figsize": (7.6, 4.6), "dpi": 200, "layout": "constrained"}


def read_losses(run: Path) -> dict[str, np.ndarray]:
    """metrics.jsonl to {name: [N, 2] of steps and finite losses}, without a last line that is still being written.
    Raises OSError, or ValueError naming the file."""
    file = run / "metrics.jsonl" if run.is_dir() else run
    losses, lines = {}, file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            for name in record:
                if name.startswith(("loss", "eval_loss")) and math.isfinite(record[name]):
                    losses.setdefault(name, {})[record["step"]] = record[name]
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(f"{file}, line {number}: expected a JSON object with a step and numbers") from None
    if not losses:
        raise ValueError(f"{file}: no loss in it yet")
    return {name: np.array(sorted(curve.items())) for name, curve in losses.items()}


def plot_losses(runs: list[Path], output) -> None:
    """Of one run all losses, of several the total and the evaluation loss. Pale: as measured; lines: the mean over a
    fortieth of the run; points: evaluations. Raises OSError, or ValueError naming the file."""
    figure, axes = pyplot.subplots(**FIGURE)
    colors = {}
    for run in runs:
        for name, curve in read_losses(run).items():
            if len(runs) > 1 and name not in ("loss", "eval_loss"):
                continue
            steps, values = curve.T
            label = name if len(runs) == 1 else f"{run.resolve().name} {name}"
            color = colors.setdefault((run, name.removeprefix("eval_")), f"C{len(colors)}")
            if name.startswith("eval_"):
                axes.plot(steps, values, "o", color=color, label=label)
            else:
                near = np.ones(2 * (len(values) // 80) + 1)
                smooth = np.convolve(values, near, "same") / np.convolve(np.ones(len(values)), near, "same")
                axes.plot(steps, values, color=color, alpha=0.25)
                axes.plot(steps, smooth, color=color, label=label)
    axes.set(title="Losses" if len(runs) > 1 else runs[0].resolve().name, xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(output)


def plot_means(curves: dict[str, tuple], x, output, **labels) -> None:
    """Means with error bars, x spaced by ratio. curves: label to (means, half the length of each error bar)."""
    figure, axes = pyplot.subplots(**FIGURE)
    for marker, (label, (mean, error)) in zip("osD^vP", curves.items()):
        axes.errorbar(x, mean, error, marker=marker, capsize=3, label=label)
    axes.set(xscale="log", **labels)
    axes.set_xticks(x, map(str, x))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the losses of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", type=Path, help="a folder that holds metrics.jsonl")
    parser.add_argument("-o", "--output", default="losses.png", help="default %(default)s")
    args = parser.parse_args()
    try:
        plot_losses(args.runs, args.output)
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: error: {error}")
