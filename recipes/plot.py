"""Charts: the training and evaluation losses of runs, and means with error bars for other recipes.

    python recipes/plot.py RUN_DIR [RUN_DIR ...] -o losses.png
"""

import argparse
import json
import signal
import sys
from pathlib import Path

try:
    from matplotlib import pyplot
except ImportError:
    sys.exit("recipes/plot.py needs matplotlib: pip install -r requirements-dev.txt")

# Colours that colour-blind readers can tell apart, in a picture of 1520 x 920 pixels that can be read when small.
pyplot.style.use(["petroff10", {"font.size": 13, "axes.grid": True, "grid.alpha": 0.4}])
FIGURE = {"figsize": (7.6, 4.6), "dpi": 200, "layout": "constrained"}


def read_losses(run: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.jsonl to the steps and values of every loss, without a line that is still being written.
    Raises OSError, or ValueError if there is none yet."""
    losses, file = {}, run / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    except ValueError as e:
        raise ValueError(f"{file}: not the metrics of a run ({e})") from None
    for record in records:
        for name, value in record.items():
            if name.startswith(("loss", "eval_loss")):
                losses.setdefault(name, []).append((record["step"], value))
    if not losses:
        raise ValueError(f"{file}: no loss in it yet")
    return losses


def plot_losses(runs: list[Path], output) -> None:
    """Of one run all losses, of several the total: lines as logged, each a mean of --logging_steps steps, and points
    for evaluations. Raises OSError, ValueError."""
    figure, axes = pyplot.subplots(**FIGURE)
    colors = {}
    for run in runs:
        for name, curve in read_losses(run).items():
            part = name.removeprefix("eval_")
            if len(runs) == 1 or part == "loss":
                color = colors.setdefault((run, part), f"C{len(colors)}")
                style = "-" if name == part else "o"
                axes.plot(*zip(*curve), style, color=color, label=f"{run.resolve().name} {name}")
    axes.set(xlabel="step", ylabel="loss")
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
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    parser = argparse.ArgumentParser(description="Draw the losses of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", type=Path, help="a folder that holds metrics.jsonl")
    parser.add_argument("-o", "--output", default="losses.png", help="default %(default)s")
    args = parser.parse_args()
    try:
        plot_losses(args.runs, args.output)
        print(f"losses drawn in {args.output}")
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: error: {error}")
