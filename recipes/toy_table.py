"""The table and the plot of recipes/toy_medlm.sh: answers right and responses wholly valid against decoder passes.

For S passes, stage 2 and the compute-matched stage 2 fill the masks in S passes. Stage 3 spends up to E of them on
edits, after S - E mask passes: a quarter, as the paper does (48 + 16), but two from S = 4 on and one below.

    python recipes/toy_table.py [out/toy_medlm] [--plot FILE.png]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import medlm
import toy
from plumbing import checkpoints, cli, methods
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
def measure(checkpoint: Path) -> np.ndarray:
    """[PASSES, 2]: percent of answers right and of responses valid on all held-out prompts. Kept in the checkpoint's
    folder, so that it goes when the checkpoint goes, with the settings that it was measured with."""
    directory = checkpoints.local_path(str(checkpoint))
    kept, settings = directory / "passes.json", [MASKS, *([*split(checkpoint.name, p)] for p in PASSES)]
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    if found.get("settings") != settings:
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
            result[passes] = np.mean(checks, axis=0).tolist()
        found = {"settings": settings, "result": result}
        kept.write_text(json.dumps(found))
    return 100 * np.array(list(found["result"].values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", default="out/toy_medlm", type=Path)
    parser.add_argument("--plot", default="toy_medlm.png")
    args = parser.parse_args()
    seeds = sorted(d for d in args.runs.glob("seed*") if all((d / s / "checkpoint-final").is_dir() for s in STAGES))
    if not seeds:
        sys.exit(f"{args.runs}: no finished seed; run recipes/toy_medlm.sh 1 first")
    measured = {stage: np.stack([measure(seed / stage) for seed in seeds]) for stage in STAGES}
    curves, count = {}, len(toy.prompts("test"))
    for what, name in enumerate(("answers right", "responses valid")):
        print(f"\n{name}, {len(seeds)} seeds, {count} held-out prompts, percent")
        print("passes " + "".join(f"{p:>12}" for p in PASSES))
        for stage in STAGES:
            values = measured[stage][:, :, what]  # [seeds, PASSES]
            mean = values.mean(0)
            error = np.sqrt(mean * (100 - mean) / count)  # with one seed, that of so many prompts
            if len(seeds) > 1:
                error = values.std(0, ddof=1) / np.sqrt(len(seeds))
            print(f"{stage:7}" + "".join(f"{m:7.1f} ±{e:4.1f}" for m, e in zip(mean, error)))
            curves[f"{stage}, {name}"] = mean, error
        gains = (measured["stage3"] - measured["matched"])[:, :, what].min(0)
        print("worst  " + "".join(f"{g:+12.1f}" for g in gains) + "   stage3 - matched, worst seed")
    title = "Toy task: the same number of passes, with and without edits"
    plot_means(curves, PASSES, args.plot, title=title, xlabel="passes", ylabel="percent")
    print(f"\nplot in {args.plot}")


if __name__ == "__main__":
    cli.run(main)
