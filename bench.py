"""Speed and memory, always as a ratio against something named, both measured in the same run.

    python bench.py edit_distance      scripts per second against rapidfuzz
    python bench.py loss               the Edit Flows loss against vocabulary logits on all rows: time and memory
    python bench.py sampling           16 prompts in one batch against one at a time, and where the time goes
    python bench.py decode             ME-DLM decoding against vocabulary logits on all rows
    python bench.py rollout            how much of a stage-3 step is not the model

One function per benchmark; `BENCHMARKS` at the end lists them with their flags. The contestants take turns, because the
speed of a machine drifts; a ratio is the median over the turns.
"""

import argparse
import multiprocessing
import resource
import time
from functools import partial
from itertools import product
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import data
import editflow
import medlm
import models
import toy
from edit_distance import edit_scripts
from plumbing import checkpoints, cli, methods
from ragged import GAP, Ragged, editable, stratified


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


def random_model(args, method: str, family: str, width: float) -> torch.nn.Module:
    """A model of the size in the flags with random weights in float32. width: of its MLPs, in hidden sizes."""
    raw = {
        "model_type": family, "vocab_size": args.vocab, "hidden_size": args.hidden, "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64, "intermediate_size": int(args.hidden * width),
        "nanoedit": {"method": method},
    }  # fmt: skip
    model = checkpoints.build(checkpoints.complete_config(raw))
    checkpoints.init_weights(model, torch.Generator().manual_seed(args.seed))
    return model


def seconds_inside(*modules: torch.nn.Module) -> list[float]:
    """A list to which every forward pass of these modules will add its seconds."""
    inside = []
    for module in modules:
        start = []
        module.register_forward_pre_hook(lambda *_, start=start: start.append(time.perf_counter()))
        module.register_forward_hook(lambda *_, start=start: inside.append(time.perf_counter() - start.pop()))
    return inside


def bench_edit_distance(args):
    """edit_scripts, one call for a batch of pairs, against rapidfuzz's Levenshtein.editops, pair by pair.

    Ours starts from a list of int64 arrays and ends with a list of scripts. rapidfuzz gets strings, one character per
    token, the input on which it is fastest, and once more lists of integers; making them is not counted. Times are CPU
    times of one core.
    """
    try:
        from rapidfuzz.distance.Levenshtein import editops
    except ImportError:
        raise SystemExit("bench.py edit_distance needs rapidfuzz: pip install -r requirements-dev.txt") from None

    def pairwise(pairs):
        return lambda: [editops(x, y) for x, y in pairs]

    def warm(run):  # several passes over the same pairs
        return lambda: [run() for _ in range(args.passes)]

    rng = np.random.default_rng(args.seed)
    print(f"microseconds per pair, and how often edit_scripts is faster; vocabulary {args.vocab}")
    print("length  noise  edit_scripts | rapidfuzz   ratio | from lists   ratio")
    for length, noise in product(args.lengths, args.noise):
        clean = [rng.integers(0, args.vocab, length) for _ in range(args.pairs)]
        noisy = [add_noise(rng, x, noise, args.vocab) for x in clean]
        lists = [(x.tolist(), y.tolist()) for x, y in zip(noisy, clean)]
        strings = [(as_string(x), as_string(y)) for x, y in lists]
        ours = warm(partial(edit_scripts, noisy, clean))
        contestants = {"ours": ours, "strings": warm(pairwise(strings)), "lists": warm(pairwise(lists))}
        s = take_turns(contestants, args.repeats, time.process_time)
        us = {name: 1e6 * median(times) / (args.pairs * args.passes) for name, times in s.items()}
        print(
            f"{length:6} {noise:6.0%} {us['ours']:13.2f} |"
            f" {us['strings']:9.2f} {ratio(s['strings'], s['ours']):6.2f}x |"
            f" {us['lists']:10.2f} {ratio(s['lists'], s['ours']):6.2f}x",
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


# ---------------------------------------------------------------------------------------------------- Edit Flows

SCHEDULE = editflow.parse_schedule("linear")


def path_batch(args):
    """`batch` targets of `length` random tokens, from masks[length:64], at t ~ U[0, 1]."""
    rng = torch.Generator().manual_seed(args.seed)
    x1 = torch.randint(5, args.vocab, (args.batch, args.length), generator=rng).tolist()
    x0, prompts = [[4] * 64] * args.batch, [[1]] * args.batch
    return editflow.path(prompts, x0, x1, stratified(args.batch, 0, 1, rng), SCHEDULE, rng)


def loss_on_all_rows(model, batch):
    """`editflow.loss` the plain way: both vocabulary heads on every token, [T, V] logits and their log-softmax."""
    s = batch.s[batch.x.batch]
    h = model.at(model(batch.x), s)
    log_sub, log_ins = (F.log_softmax(head(h), dim=-1) for head in (model.sub_logits, model.ins_logits))
    w = (batch.w / batch.norm / len(batch.x))[batch.x.batch]
    log_lambda, row, kind, token = model.log_rates(h, s), batch.row, batch.kind, batch.token
    log_q = torch.where(kind == editflow.INSERT, log_ins[row, token], log_sub[row, token]) * (token != GAP)
    total = (w[:, None] * log_lambda.exp() * editable(batch.x)).sum()
    return total - (w[row] * (log_lambda[row, kind] + log_q)).sum(), {}


def peak_memory(work) -> float:
    """MB that work() takes at most beyond what its process held before, in a process of its own."""

    def child(pipe):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    theirs.close()  # so that recv() ends, in an EOFError, with a child that has failed
    try:
        return ours.recv()
    finally:
        process.join()


def bench_loss(args):
    """The Edit Flows loss against vocabulary logits on all rows: a training step, forward and backward. Memory: the
    peak of one step beyond weights and libraries, gradients included."""
    model, batch = random_model(args, "editflow", "modernbert", 1.5), path_batch(args)

    def step(loss):
        model.zero_grad()
        value, _ = loss(model, batch)
        value.backward()
        return float(value.detach())

    contestants = {
        "rows with an edit": partial(step, editflow.loss),
        "all rows": partial(step, loss_on_all_rows),
    }
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    memory = {name: peak_memory(work) for name, work in contestants.items()}
    torch.set_num_threads(args.threads)
    values = {name: work() for name, work in contestants.items()}
    seconds = take_turns(contestants, args.repeats)
    projected = batch.kind != editflow.DELETE
    rows = [len(torch.stack([batch.kind, batch.row])[:, projected].unique(dim=1)[0]), 2 * len(batch.x.ids)]
    print(f"{len(batch.x)} sequences, {len(batch.x.ids)} tokens, V = {args.vocab}, {args.threads} threads, float32")
    print("vocabulary heads on    head rows      loss   ms / step   peak MB")
    for name, n in zip(contestants, rows):
        print(f"{name:20} {n:11} {values[name]:9.4f} {1e3 * median(seconds[name]):11.1f} {memory[name]:9.0f}")
    faster = ratio(seconds["all rows"], seconds["rows with an edit"])
    print(f"{faster:.2f}x as fast, {memory['rows with an edit'] / memory['all rows']:.0%} of the memory")


@torch.no_grad()
def teach_rates(model, mask: int, vocab: int, rng) -> None:
    """Fits the rate head of a random model by least squares: rate 1 for substituting a mask and for inserting behind
    it, rate 0 for everything else, so that decoding goes on as with a trained model."""
    ids = torch.randint(5, vocab, (64, 96), generator=rng)
    ids[torch.rand(ids.shape, generator=rng) < 0.5] = mask
    hidden = model(Ragged.pack(list(ids)))
    is_mask = (ids.flatten() == mask).float()
    raw = is_mask * 20  # softplus(0.5) = 0.97, softplus(0.5 - 20) = 0; the offset follows below
    inputs = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)
    solution = torch.linalg.lstsq(inputs, raw[:, None]).solution[:, 0]
    model.rate_heads[0].weight.copy_(solution[:-1].expand(3, -1))
    start = model(Ragged.pack([[1] * 16 + [mask] * 64]))[16:]
    offset = 0.5 - (start @ solution[:-1]).mean()  # right on average where decoding starts
    model.rate_heads[0].bias.copy_(offset - torch.tensor([0.0, 40.0, 0.0]))  # no deletions


def bench_sampling(args):
    """Edit Flows sampling, one batch against one prompt at a time, in tokens per second; and the share of the time that
    one prompt spends outside the model's layers and heads.

    The weights are random, but the rates are those of a trained model: a mask is to be substituted once and waits for
    as many insertions behind it, and what has been written stays.
    """
    model = random_model(args, "editflow", "modernbert", 1.5).eval()
    teach_rates(model, 4, args.vocab, torch.Generator().manual_seed(args.seed))

    def run(seeds) -> int:
        prompts, x0 = [[1] * 16 for _ in seeds], [[4] * 64 for _ in seeds]
        sampled = editflow.sample(model, prompts, x0, schedule=SCHEDULE, steps=args.steps, seeds=list(seeds))
        return sum(len(s.response) for s in sampled)

    everyone = range(args.batch)
    contestants = {"one batch": lambda: run(everyone), "one at a time": lambda: sum(run([i]) for i in everyone)}
    tokens = {name: work() for name, work in contestants.items()}
    seconds = take_turns(contestants, args.repeats)
    for name in contestants:
        print(f"{name:14} {tokens[name]} tokens, {tokens[name] / median(seconds[name]):8.1f} tokens/s")
    faster = ratio(seconds["one at a time"], seconds["one batch"])
    print(f"{faster:.2f}x the tokens per second in one batch of {args.batch}")

    inside, outside = seconds_inside(model.model, model.rate_heads[0], model.sub_logits, model.ins_logits), []
    for _ in range(args.repeats):
        inside.clear()
        begin = time.perf_counter()
        run([0])
        outside.append(1 - sum(inside) / (time.perf_counter() - begin))
    print(f"one prompt: {median(outside):.1%} of the time outside the model's layers and heads")


# ---------------------------------------------------------------------------------------------------- ME-DLM


def best_tokens_on_all_rows(hidden, head, row, never, rival=None, last=None):
    """medlm.best_tokens the plain way: [T, V] logits, of which the rows are then picked."""
    logits = head(hidden).float()[row]
    against = None if rival is None else logits.gather(1, rival[:, None])[:, 0]
    logits.index_fill_(1, torch.tensor(never), -torch.inf)
    top, token = logits.max(1)
    confidence = top - (logits.logsumexp(1) if against is None else against)
    return token, confidence, confidence


def bench_decode(args):
    """ME-DLM decoding, vocabulary logits only on rows that can change against logits on all rows. The prompt is three
    times as long as the response; a decoder with random weights."""
    model = random_model(args, "medlm", "llada", 3).eval()
    prompts = torch.randint(10, args.vocab, (args.batch, 3 * args.length)).tolist()
    tokens = {"mask": 1, "pad": 2, "del": 3, "eos": 4}
    steps = {"mask_diffusion_step": args.mask_passes, "edit_diffusion_step": args.edit_passes, "order": "confidence"}

    def decode(best_tokens):
        with mock.patch.object(medlm, "best_tokens", best_tokens):
            return medlm.decode(model, prompts, tokens, init_num=args.length, **steps)

    contestants = {
        "rows that can change": partial(decode, medlm.best_tokens),
        "all rows": partial(decode, best_tokens_on_all_rows),
    }
    plain, ours = ([d.response for d in work()] for work in contestants.values())
    seconds = take_turns(contestants, args.repeats)
    print(
        f"{args.batch} prompts of {3 * args.length}, responses of {args.length}, V = {args.vocab}, "
        f"{args.mask_passes} + {args.edit_passes} passes; same texts: {plain == ours}"
    )
    for name, times in seconds.items():
        print(f"{name:21} {median(times):7.2f} s")
    print(f"{ratio(seconds['all rows'], seconds['rows that can change']):.2f}x as fast")


def bench_rollout(args):
    """A stage-3 training step on the toy task: the share of its time outside the model's forwards and backward."""
    tokenizer = toy.tokenizer()
    model = checkpoints.new_model("medlm", args.preset, tokenizer.vocab_size)
    encoded = data.encode(toy.records("train", args.batch * 10, args.seed), tokenizer, max_length=64).examples
    examples = [data.pad_response(e, 24, tokenizer.pad_id) for e in encoded]
    tokens = methods.special_tokens(medlm, tokenizer)
    inside, shares = seconds_inside(model.model, model.lm_head, model.next_token_head), []
    for turn in range(args.repeats):
        rng = torch.Generator().manual_seed(turn)
        plan = medlm.plan_rollout(1.0, [4, 8], 16, rng)
        chosen = [examples[i] for i in torch.randperm(len(examples), generator=rng)[: args.batch].tolist()]
        inside.clear()
        begin = time.perf_counter()
        batch = medlm.rollout(model, chosen, plan, tokens, min_t=0.5, max_t=1.0, generator=rng)
        rollout, modelled = time.perf_counter(), sum(inside)
        loss, _ = medlm.loss(model, batch)  # forward, loss and backward: all of it the model's work
        loss.backward()
        shares.append((rollout - begin - modelled) / (time.perf_counter() - begin))
    print(f"{args.preset} preset, {args.batch} samples: {median(shares[1:]):.1%} of a stage-3 step outside the model")


COMMON = {"repeats": 15, "seed": 0, "threads": torch.get_num_threads()}
SIZE = {"hidden": 256, "layers": 6, "batch": 16}
BENCHMARKS = {  # each with the defaults of its flags
    bench_edit_distance: {
        "lengths": [128, 512, 2048], "noise": [0.05, 0.3, 1.0], "vocab": 32000, "pairs": 128, "passes": 5
    },
    bench_loss: SIZE | {"vocab": 50000, "length": 128},
    bench_sampling: SIZE | {"vocab": 50000, "steps": 100},
    bench_decode: SIZE | {"batch": 4, "vocab": 126464, "length": 64, "mask_passes": 8, "edit_passes": 3},
    bench_rollout: {"preset": "small", "batch": 32},
}  # fmt: skip
HELP = {
    "repeats": "turns; every ratio is a median over them", "noise": "share edited; 1: unrelated", "batch": "sequences",
    "pairs": "in a batch", "passes": "over the batch in one turn, so that caches are warm for all",
    "preset": ", ".join(models.PRESETS), "length": "tokens; a prompt of decode has three times as many",
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    for run, flags in BENCHMARKS.items():
        name = run.__name__.removeprefix("bench_")
        p = benchmarks.add_parser(name, description=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(run=run)
        for name, default in (COMMON | flags).items():
            several = isinstance(default, list)
            options = {"type": type(default[0]), "nargs": "+"} if several else {"type": type(default)}
            p.add_argument(f"--{name}", default=default, help=HELP.get(name, name), **options)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
