"""The table and the plot of recipes/toy_medlm.sh: answers right and responses wholly valid against decoder passes.

For S passes, stage 2 and the compute-matched stage 2 fill the masks in S passes. Stage 3 spends up to E of them on
edits, after S - E mask passes: a quarter, as the paper does (48 + 16), but two from S = 4 on and one below.

    python recipes/toy_table.py [out/toy_medlm] [--plot FILE.png]
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import medlm
import toy
from plumbing import checkpoints, methods
from plumbing.tokenizer import load_tokenizer
from recipes.plot import plot_means

PASSES = (1, 2, 3, 4, 6, 8, 12, 16, 24)
STAGES = ("stage2", "matched", "stage3")
MASKS = 24  # the longest response, as trained with --pad_len 24


def split(stage: str, passes: int) -> tuple[int, int]:
    """(mask passes, edit passes)"""
    edits = min(passes // 2, max(2, passes // 4)) if stage == "stage3" else 0
    return passes - edits, edits


@torch.no_grad()
def measure(checkpoint: Path) -> dict[int, tuple[float, float]]:
    """S -> (share of answers right, share of responses valid) on all held-out prompts. Kept in the checkpoint's folder,
    so that it goes when the checkpoint goes."""
    directory = checkpoints.local_path(str(checkpoint))
    kept, settings = directory / "passes.json", [MASKS, *(split(checkpoint.name, p) for p in PASSES)]
    if kept.is_file() and (found := json.loads(kept.read_text()))["settings"] == json.loads(json.dumps(settings)):
        return {int(s): tuple(v) for s, v in found["result"].items()}
    model, tokenizer = checkpoints.load(str(directory)).eval(), load_tokenizer(directory)
    questions = toy.prompts("test")
    prompts = [data.encode_prompt([{"role": "user", "content": q}], tokenizer) for q in questions]
    result = {}
    for passes in tqdm(PASSES, desc=str(checkpoint), leave=False):
        masks, edits = split(checkpoint.name, passes)
        decoded = medlm.decode(
            model, prompts, methods.special_tokens(medlm, tokenizer),
            init_num=MASKS, mask_diffusion_step=masks, edit_diffusion_step=edits,
        )  # fmt: skip
        checks = [toy.check(q, tokenizer.decode(d.response)) for q, d in zip(questions, decoded)]
        result[passes] = tuple(sum(column) / len(checks) for column in zip(*checks))
    kept.write_text(json.dumps({"settings": settings, "result": result}))
    return result


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over the seeds and its standard error; with one seed the error is that of 304 prompts."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, math.sqrt(mean * (1 - mean) / len(toy.prompts("test")))
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", default="out/toy_medlm", type=Path)
    parser.add_argument("--plot", default="toy_medlm.png")
    args = parser.parse_args()
    seeds = sorted(d for d in args.runs.glob("seed*") if all((d / s / "checkpoint-final").is_dir() for s in STAGES))
    if not seeds:
        sys.exit(f"{args.runs}: no finished seed; run recipes/toy_medlm.sh 1 first")
    measured = {stage: [measure(seed / stage) for seed in seeds] for stage in STAGES}
    curves = {}
    for what, name in enumerate(("answers right", "responses valid")):
        print(f"\n{name}, {len(seeds)} seeds, {len(toy.prompts('test'))} held-out prompts, percent")
        print("passes " + "".join(f"{p:>12}" for p in PASSES))
        for stage in STAGES:
            points = [mean_and_error([run[p][what] for run in measured[stage]]) for p in PASSES]
            print(f"{stage:7}" + "".join(f"{100 * m:7.1f} ±{100 * e:4.1f}" for m, e in points))
            curves[f"{stage}, {name}"] = [[100 * value for value in column] for column in zip(*points)]
        gains = [min(a[p][what] - b[p][what] for a, b in zip(measured["stage3"], measured["matched"])) for p in PASSES]
        print("worst  " + "".join(f"{100 * g:+12.1f}" for g in gains) + "   stage3 - matched, worst seed")
    title = "Toy task: the same number of passes, with and without edits"
    plot_means(curves, PASSES, args.plot, title=title, xlabel="passes", ylabel="percent")
    print(f"\nplot in {args.plot}")


if __name__ == "__main__":
    main()
