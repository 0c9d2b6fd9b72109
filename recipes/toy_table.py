"""The tables and the plot of recipes/toy_medlm.sh: answers right and responses wholly valid against decoder passes.

At S passes all contestants make S forward passes. Those without repair fill the masks in S. The others spend E of them
on a repair, after S - E mask passes: a quarter, as the paper does (48 + 16), but two from S = 4 on and one below.

    none      no repair: the draft as it is
    remask    the least sure tokens become masks again and are filled again
    edit      ME-DLM's edits; "surest": at most 2 in a pass

Each with both orders of unmasking, pads last (as published) and plain confidence. Of those that do not edit, the table
has the best at up to S passes: a pass more must not make them worse. Then the passes that a confidence threshold saves,
and how many edits the first edit pass wants, makes, and makes rightly, measured at the nearest of the valid responses.

    python recipes/toy_table.py [out/toy_medlm] [--plot FILE.png]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import medlm
import toy
from edit_distance import distance
from plumbing import checkpoints, cli, methods
from plumbing.tokenizer import load_tokenizer
from ragged import DEL, GAP, SUB, Ragged
from recipes.plot import plot_means

PASSES = (1, 2, 3, 4, 6, 8, 12, 16, 24)
ORDERS = ("pads_last", "confidence")
CONTESTANTS = {  # name -> (stage, how its drafts are repaired)
    "stage2 none": ("stage2", {"repair": "none"}),
    "matched none": ("matched", {"repair": "none"}),
    "matched remask": ("matched", {"repair": "remask"}),
    "stage3 none": ("stage3", {"repair": "none"}),
    "stage3 remask": ("stage3", {"repair": "remask"}),
    "stage3 edit": ("stage3", {"repair": "edit"}),
    "stage3 surest": ("stage3", {"repair": "edit", "max_edits": 2}),
}
DRAWN = ("matched none", "matched remask", "stage3 edit")
THRESHOLDS = (0.5, 0.7, 0.9, 0.95, 0.99)
MASKS = 24  # the longest response, as trained with --pad_len 24
KINDS = ("substitutions", "deletions", "insertions")


def split(repair: str, passes: int) -> dict[str, int]:
    edits = 0 if repair == "none" else min(passes // 2, max(2, passes // 4))
    return {"mask_diffusion_step": passes - edits, "edit_diffusion_step": edits}


def count_edits(x: Ragged, edits: tuple[Tensor, Tensor, Tensor], wanted: list[list[int]], tokens: dict) -> np.ndarray:
    """[3 KINDS, 3]: edits that the labels of the drafts x ask for against the wanted texts, edits that are made (the
    arguments of `apply_edits`), and edits made that are among those asked for."""
    labels = medlm.label_drafts(x, wanted, tokens)
    token = labels.lm_token.masked_fill(labels.lm_token == tokens["del"], GAP)
    token = x.ids.index_copy(0, labels.lm_row, token)
    following = torch.full_like(x.ids, GAP).index_copy(0, labels.next_row, labels.next_token)

    def kinds(op, sub_token, ins_token):
        return torch.stack([sub_token.where(op == SUB, GAP), x.ids.where(op == DEL, GAP), ins_token])

    asked, made = kinds(*medlm.edit_pass(x, token, following)), kinds(*edits)
    right = (asked == made) & (made != GAP)
    return torch.stack([(asked != GAP).sum(1), (made != GAP).sum(1), right.sum(1)], 1).numpy()


class Decoder:
    """A checkpoint and the held-out questions."""

    def __init__(self, directory: Path):
        self.model, self.tokenizer = checkpoints.load(str(directory)).eval(), load_tokenizer(directory)
        self.questions = toy.prompts("test")
        dialogues = [[{"role": "user", "content": question}] for question in self.questions]
        self.prompts = data.encode_prompts(dialogues, self.tokenizer)
        self.tokens = methods.special_tokens(medlm, self.tokenizer)

    def score(self, on_step=None, **settings) -> list[float]:
        """Shares of answers right and of responses valid; the mean number of passes."""
        decoded = medlm.decode(self.model, self.prompts, self.tokens, init_num=MASKS, on_step=on_step, **settings)
        checks = [toy.check(q, self.tokenizer.decode(d.response)) for q, d in zip(self.questions, decoded)]
        return [*np.mean(checks, axis=0).tolist(), float(np.mean([sum(d.passes.values()) for d in decoded]))]

    def first_edits(self, **settings) -> list:
        """`count_edits` of the first edit pass, against the valid response that is nearest to each draft."""
        steps = []
        self.score(on_step=lambda t, x, *edits: steps.append((x, edits)), **settings)
        x, (*edits, _) = next(step for step in steps if step[1][-1] == "edit")
        valid = [list(map(self.tokenizer.encode, toy.valid_responses(q))) for q in self.questions]
        nearest = [min(v, key=lambda ids: distance(draft, ids)) for draft, v in zip(medlm.contents(x), valid)]
        return count_edits(x, edits, nearest, self.tokens).tolist()


@torch.no_grad()
def measure(checkpoint: Path) -> dict:
    """{"passes": {contestant: [ORDERS, PASSES, 2]}, "thresholds": {repair: [ORDERS, THRESHOLDS, 3]}, "edits":
    {S: [3, 3]}}. Kept in the checkpoint's folder, so that it goes when the checkpoint goes, with the settings that it
    was measured with."""
    directory = checkpoints.local_path(str(checkpoint))
    mine = {name: how for name, (stage, how) in CONTESTANTS.items() if stage == checkpoint.name}
    settings = json.loads(json.dumps([MASKS, PASSES, ORDERS, THRESHOLDS, mine, split("edit", 24)]))
    kept = directory / "passes.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    if found.get("settings") == settings:
        return found
    decoder, found = Decoder(directory), {"settings": settings, "passes": {}, "thresholds": {}, "edits": {}}
    for name, how in tqdm(mine.items(), desc=str(checkpoint), leave=False):
        found["passes"][name] = [
            [decoder.score(order=order, **how, **split(how["repair"], passes))[:2] for passes in PASSES]
            for order in ORDERS
        ]
    for repair, edits in {"none": 0, "edit": 2}.items() if checkpoint.name == "stage3" else ():
        steps = {"mask_diffusion_step": MASKS, "edit_diffusion_step": edits, "repair": repair}
        found["thresholds"][repair] = [
            [decoder.score(order=order, threshold=threshold, **steps) for threshold in THRESHOLDS] for order in ORDERS
        ]
    for passes in PASSES[1:] if checkpoint.name == "stage3" else ():
        found["edits"][str(passes)] = decoder.first_edits(**split("edit", passes))
    kept.write_text(json.dumps(found))
    return found


def mean_and_error(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Over seeds, values [seeds, ...] in percent; with one seed, the error is that of so many prompts (0: unknown)."""
    mean = values.mean(0)
    if len(values) > 1:
        return mean, values.std(0, ddof=1) / np.sqrt(len(values))
    return mean, np.sqrt(mean * (100 - mean) / count) if count else np.full_like(mean, np.nan)


def print_row(name: str, mean, error) -> None:
    print(f"{name:26}" + "".join(f"{m:7.1f} ±{e:4.1f}" for m, e in zip(mean, error)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", default="out/toy_medlm", type=Path)
    parser.add_argument("--plot", default="toy_medlm.png")
    args = parser.parse_args()
    stages = sorted({stage for stage, _ in CONTESTANTS.values()})
    seeds = sorted(d for d in args.runs.glob("seed*") if all((d / s / "checkpoint-final").is_dir() for s in stages))
    if not seeds:
        sys.exit(f"{args.runs}: no finished seed; run recipes/toy_medlm.sh 1 first")
    found = {stage: [measure(seed / stage) for seed in seeds] for stage in stages}
    curves, count = {}, len(toy.prompts("test"))
    for what, verdict in enumerate(("answers right", "responses valid")):
        print(f"\n{verdict}, {len(seeds)} seeds, {count} held-out prompts, percent")
        print(f"{'passes':26}" + "".join(f"{p:>12}" for p in PASSES))
        controls, ours = [], []
        for name, (stage, how) in CONTESTANTS.items():
            values = 100 * np.array([f["passes"][name] for f in found[stage]])[..., what]  # [seeds, ORDERS, PASSES]
            if how["repair"] != "edit":
                values = np.maximum.accumulate(values, axis=2)
            (ours if how["repair"] == "edit" else controls).append(values)
            for i, order in enumerate(ORDERS):
                curve = mean_and_error(values[:, i], count)
                print_row(f"{name}, {order}", *curve)
                if name in DRAWN and order == ORDERS[0]:
                    curves[f"{name}, {verdict}"] = curve
        best = [np.concatenate(group, 1).max(1) for group in (ours, controls)]  # [seeds, PASSES] each
        print_row("best edits - best control", *mean_and_error(best[0] - best[1], 0))
    print("\nstage3 with a threshold: passes used, answers right, responses valid")
    for repair in found["stage3"][0]["thresholds"]:
        values = np.array([f["thresholds"][repair] for f in found["stage3"]]).mean(0) * [100, 100, 1]
        for order, rows in zip(ORDERS, values):
            cells = [f"{t}: {used:.1f} {right:.1f} {valid:.1f}" for t, (right, valid, used) in zip(THRESHOLDS, rows)]
            print(f"{repair + ', ' + order:20}", "   ".join(cells))
    print("\nstage3, first edit pass: wanted, made, right per draft")
    for passes in PASSES[1:]:
        values = np.mean([f["edits"][str(passes)] for f in found["stage3"]], 0) / count
        cells = [f"{kind} {w:.2f} {m:.2f} {r:.2f}" for kind, (w, m, r) in zip(KINDS, values)]
        print(f"{passes:>3} passes  ", "   ".join(cells))
    title = "Toy task: the same number of passes, with and without edits"
    plot_means(curves, PASSES, args.plot, title=title, xlabel="passes", ylabel="percent")
    print(f"\nplot in {args.plot}")


if __name__ == "__main__":
    cli.run(main)
