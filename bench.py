"""Speed and memory, always as a ratio against something named, both measured in the same run.

    python bench.py edit_distance

One function per benchmark; `BENCHMARKS` at the end lists them. The contestants take turns, because the speed of a
machine drifts; a ratio is the median over the turns.
"""

import argparse
import time
from statistics import median

import numpy as np

from edit_distance import edit_scripts


def take_turns(contestants: dict, repeats: int, clock=time.perf_counter) -> dict:
    """Runs every contestant once per turn. Returns name -> list of seconds, one per turn.

    For work on one core, clock=time.process_time leaves out what other programs take of the machine.
    """
    seconds = {name: [] for name in contestants}
    for run in contestants.values():
        run()  # warm up
    for _ in range(repeats):
        for name, run in contestants.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def ratio(reference: list, ours: list) -> float:
    """How many times faster we are."""
    return median(a / b for a, b in zip(reference, ours))


def bench_edit_distance(args):
    """edit_scripts, one call for a batch of pairs, against rapidfuzz's Levenshtein.editops, pair by pair.

    Ours starts from a list of int64 arrays and ends with a list of scripts. rapidfuzz gets strings, one character per
    token, the input on which it is fastest, and once more lists of integers; making them is not counted. Times are CPU
    times of one core; the last column is the gain in wall time of a second thread.
    """
    try:
        from rapidfuzz.distance.Levenshtein import editops
    except ImportError:
        raise SystemExit("bench.py edit_distance needs rapidfuzz: pip install -r requirements-dev.txt") from None

    rng = np.random.default_rng(args.seed)
    print(f"microseconds per pair, and how often edit_scripts is faster; vocabulary {args.vocab}")
    print("length  noise  edit_scripts | rapidfuzz   ratio | from lists   ratio | 2 threads")
    for length in args.lengths:
        for noise in args.noise:
            pairs = max(8, args.tokens // length)
            clean = [rng.integers(0, args.vocab, length) for _ in range(pairs)]
            noisy = [add_noise(rng, x, noise, args.vocab) for x in clean]
            lists = [(x.tolist(), y.tolist()) for x, y in zip(noisy, clean)]
            strings = [(as_string(x), as_string(y)) for x, y in lists]
            contestants = {
                "ours": lambda noisy=noisy, clean=clean: edit_scripts(noisy, clean),
                "strings": lambda strings=strings: [editops(x, y) for x, y in strings],
                "lists": lambda lists=lists: [editops(x, y) for x, y in lists],
            }
            seconds = take_turns(contestants, args.repeats, time.process_time)
            ours, strings_us, lists_us = (1e6 * median(times) / pairs for times in seconds.values())
            contestants = {
                "one": contestants["ours"],
                "two": lambda noisy=noisy, clean=clean: edit_scripts(noisy, clean, threads=2),
            }
            wall = take_turns(contestants, args.repeats)
            print(
                f"{length:6} {noise:6.0%} {ours:13.2f} |"
                f" {strings_us:9.2f} {ratio(seconds['strings'], seconds['ours']):6.2f}x |"
                f" {lists_us:10.2f} {ratio(seconds['lists'], seconds['ours']):6.2f}x |"
                f" {ratio(wall['one'], wall['two']):8.2f}x",
                flush=True,
            )


def add_noise(rng, clean, noise, vocab):
    """Each token is edited with probability `noise`: substituted, deleted, or followed by a new one. 1: unrelated."""
    if noise == 1:
        return rng.integers(0, vocab, len(clean))
    kind = np.where(rng.random(len(clean)) < noise, rng.integers(1, 4, len(clean)), 0)
    new = rng.integers(0, vocab, len(clean))
    both = np.stack([np.where(kind == 1, new, clean), new], axis=1)
    keep = np.stack([kind != 2, kind == 3], axis=1)
    return both[keep]


def as_string(tokens):
    """One character per token; the surrogates are left out."""
    return "".join(chr(token if token < 0xD800 else token + 0x800) for token in tokens)


BENCHMARKS = {"edit_distance": bench_edit_distance}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    common = argparse.ArgumentParser(add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    common.add_argument("--repeats", type=int, default=15, help="turns; every ratio is a median over them")
    common.add_argument("--seed", type=int, default=0)

    p = benchmarks.add_parser("edit_distance", parents=[common], help="edit scripts against rapidfuzz")
    p.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="tokens of the clean sequence")
    p.add_argument("--noise", type=float, nargs="+", default=[0.05, 0.3, 1.0], help="share edited; 1: unrelated")
    p.add_argument("--vocab", type=int, default=32000, help="symbols, drawn uniformly")
    p.add_argument("--tokens", type=int, default=65536, help="tokens in a batch of pairs")

    args = parser.parse_args()
    BENCHMARKS[args.benchmark](args)


if __name__ == "__main__":
    main()
