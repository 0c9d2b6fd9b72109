"""Train by editing: Edit Flows and ME-DLM, from scratch or from a checkpoint, on one process or many.

    python train.py --method editflow --dataset_args toy --preset tiny --output_dir out/toy
    torchrun --nproc_per_node 8 train.py --method medlm --model_name_or_path CKPT --dataset_args data.jsonl ...

The loop is a loop you can read aloud (function `train`): draw a micro-batch, loss, backward, repeat for accumulation,
clip, step, log, evaluate, save. The methods live in editflow.py and medlm.py, behind one interface
(plumbing/methods.py). How a model is spread over processes is in parallel.py; what the loop is fed with, how a run is
saved and recorded, in plumbing/feed.py, checkpoints.py and log.py.

Nothing random is stored. Every draw comes from a generator seeded by (seed, step, micro-batch), and so does the choice
of examples: a run killed and restarted sees what an undisturbed run sees, and one process with accumulation 4 sees
what four processes see.
"""

import importlib.util
import math
import os
from pathlib import Path
from types import SimpleNamespace

# Waiting OpenMP threads would spin. Where other work takes the cores, that is the work of the others they wait for: two
# threads made 1,100 to 9,400 tokens/s of the demo beside two busy processes, 10,700 to 17,000 asleep; one made 12,000.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import data
import models
import parallel
import toy
from parallel import ParallelModel, Ranks, Stopped, StopSignal, bf16_autocast
from plumbing import checkpoints, cli, feed, methods
from plumbing.log import Log
from plumbing.tokenizer import MOST_TOKENS, load_tokenizer, train_tokenizer

# ---------------------------------------------------------------------------------------------------- flags


def parse_args(argv=None):
    f = cli.Flags("Train a model that generates by editing.")
    f.choice("--method", choices=list(methods.METHODS), required=True, help="what to train")
    f.choice("--output_dir", required=True, help="checkpoints, metrics.jsonl; a run found here is continued")
    f.flag("--overwrite_output_dir", help="start anew although output_dir holds a run")
    f.integer("--seed", low=0, default=42, help="everything random follows from it")

    f.group("model")
    f.choice("--model_name_or_path", "--model_cfg",
             help="checkpoint directory or hub id to start from; without it: a new model")
    f.text("--preset", read=checkpoints.preset_sizes, default="tiny",
           help=f"size of a new model: {', '.join(models.PRESETS)}")
    f.integer("--vocab_size", low=300, high=MOST_TOKENS, default=4096, help="of the tokenizer trained for a new model")
    f.choice("--parallel", choices=parallel.MODES, default="ddp",
             help="several processes: everything on each (ddp), or weights and optimizer shared (fsdp); zero1 is fsdp "
             "with --reshard_after_forward False")
    f.flag("--reshard_after_forward", default=True,
           help="fsdp: let a block's weights go between forward and backward (ZeRO-3); False keeps them (ZeRO-2)")
    f.flag("--gradient_checkpointing", help="recompute activations block by block: less memory, one more forward")
    f.flag("--bf16", help="bf16 autocast; weights and optimizer stay float32")
    f.choice("--dtype", choices=["float32", "bfloat16"], help="bfloat16 is another name for --bf16")
    f.flag("--compile", help="torch.compile the blocks")
    f.flag("--lora", help="train low-rank additions to the blocks and the heads; save these alone")
    f.integer("--lora_r", "--r", low=1, default=32, help="their rank")
    f.number("--lora_alpha", above=0, default=64.0, help="their weight is lora_alpha / lora_r")
    f.number("--lora_dropout", low=0, high=1, default=0.05, help="dropout in front of them")
    f.flag("--load_in_4bit", help="with --lora: keep the matrices of the blocks in 4 bits (NF4)")

    f.group("data")
    f.text("--dataset_args", "--train_file", read=data.parse_spec, nargs="+", default=["toy"],
           help="files, folders, patterns with *, hub ids or `toy`: name[train:N,test:M] + other, or several of these")
    f.flag("--insert_eos", default=True, help="end texts and responses with the end-of-message token")
    f.choice("--text_field", help="field of a record that holds plain text (default: text)")
    data.add_flags(f, chat_template=True)
    f.flag("--streaming", help="read the data bit by bit and never hold it: files, URLs, hub ids; needs --max_steps")
    f.flag("--skip_bad_records", help="count and skip broken records instead of stopping")
    f.integer("--max_length", "--max_len", low=2, default=512, help="tokens per sample (per packed row for medlm)")
    f.choice("--truncation", choices=["filter", "right"], default="filter",
             help="dialogues of more than max_length tokens are left out, or lose the end of the response")
    f.flag("--mask_prompt_loss", default=True, help="prompts are given; False: the model learns to write them, too")
    f.integer("--pad_len", low=1, help="pad responses to a multiple of this (default: no padding)")

    f.group("optimization")
    f.number("--num_train_epochs", above=0, high=1e6, default=1.0, help="passes over the data, without max_steps")
    f.integer("--max_steps", low=1, help="optimizer steps (default: those of num_train_epochs)")
    f.integer("--per_device_train_batch_size", low=1, default=32, help="sequences per process (medlm: packed rows)")
    f.integer("--per_device_eval_batch_size", low=1, default=32, help="the same for evaluation")
    f.integer("--gradient_accumulation_steps", low=1, default=1, help="micro-batches per optimizer step")
    f.number("--learning_rate", above=0, default=1e-4, help="peak learning rate")
    f.choice("--lr_scheduler_type", choices=["cosine", "linear", "constant"], default="cosine", help="after warm-up")
    f.integer("--warmup_steps", low=0, default=0, help="linear warm-up")
    f.number("--warmup_ratio", low=0, high=1, default=0.0, help="the same as a share of all steps")
    f.number("--weight_decay", low=0, default=0.0, help="AdamW, on matrices only")
    f.number("--adam_beta2", low=0, below=1, default=0.98, help="AdamW; 0.98 forgets a bad start sooner than 0.999")
    f.number("--max_grad_norm", above=0, default=1.0, help="gradient clipping")

    f.group("watching and saving")
    f.integer("--logging_steps", low=1, default=10, help="steps between lines of metrics.jsonl")
    f.choice("--eval_strategy", choices=["no", "steps", "epoch"], default="steps", help="when to evaluate")
    f.number("--eval_steps", above=0, default=0.1, help="steps between evaluations; below 1: a share of the run")
    f.integer("--eval_samples", low=0, default=2, help="texts decoded and shown at each evaluation")
    f.number("--save_steps", above=0, default=0.25, help="steps between checkpoints; below 1: a share of the run")
    f.integer("--save_total_limit", low=1, help="checkpoints kept (default: all)")
    f.choice("--report_to", choices=["none", "tensorboard", "wandb"], default="none", help="besides metrics.jsonl")
    methods.training_flags(f)
    f.group("accepted so that published commands run; these change nothing")
    for name in ("--do_train", "--save_safetensors", "--remove_unused_columns", "--resume"):
        f.flag(name, default=None, help="")
    f.choice("--deepspeed", help="see --parallel")
    f.integer("--dataloader_num_workers", "--num_workers", low=0, help="batches are made in the main process")
    args = f.parse_args(argv)
    args.dataset_args, args.bf16 = " + ".join(args.dataset_args), args.bf16 or args.dtype == "bfloat16"
    if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
        f.error(f"--report_to {args.report_to}: run `pip install {args.report_to}` first")
    if args.streaming and (not args.max_steps or args.eval_strategy == "epoch"):
        f.error("--streaming does not know how long an epoch is; say --max_steps, and no --eval_strategy epoch")
    if args.lora and not args.model_name_or_path:
        f.error("--lora adapts a checkpoint; name it with --model_name_or_path")
    if args.load_in_4bit and not args.lora:
        f.error("--load_in_4bit needs --lora: 4-bit weights cannot be trained themselves")
    if (args.pad_len or 0) > args.max_length:
        f.error(f"--pad_len {args.pad_len} must not exceed --max_length {args.max_length}")
    for check in (data.named_fields, *(getattr(m, "check_flags", bool) for m in methods.METHODS.values())):
        try:
            check(args)
        except ValueError as e:
            f.error(str(e))
    return args


# ---------------------------------------------------------------------------------------------------- set-up


def open_run(args, ranks: Ranks) -> SimpleNamespace | None:
    """Everything that the loop works with: opened, built and, for a run found in --output_dir, restored. None when that
    run is finished."""
    out, resume = checkpoints.prepare_output(args, ranks)
    method = methods.get(args.method)
    Feed, records, sample = feed.open_data(args, ranks)  # first of all, for a new tokenizer is trained on them
    model, tokenizer = open_model(args, resume, sample)
    settings = methods.training_settings(method, args, model, tokenizer)
    batches = Feed(args, method, settings, tokenizer, *records, ranks)
    steps = args.max_steps or math.ceil(args.num_train_epochs * batches.steps_per_epoch)
    eval_every, save_every = (max(1, int(n if n >= 1 else n * steps)) for n in (args.eval_steps, args.save_steps))
    if args.eval_strategy == "epoch":
        eval_every = max(1, int(batches.steps_per_epoch))
    state = checkpoints.state_of(args, resume, steps, ranks) if resume else {"step": 0}
    if not state:
        return None
    if hasattr(method, "start"):
        method.start(model, settings, batches.rows(), resumed=resume is not None)
    ranks.say(describe(args, model, steps, ranks))
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    ranks.barrier()  # one may have fetched the model or the data much longer than another
    parallel_model = ParallelModel(model, args.parallel, ranks, args.reshard_after_forward)
    optimizer = parallel.adamw(model, lr=args.learning_rate, beta2=args.adam_beta2, weight_decay=args.weight_decay)
    if resume:
        checkpoints.restore(model, optimizer, resume)
    batches.begin(state["step"], state.get("data"))
    checkpoints.clear_output(out, args, ranks)
    return SimpleNamespace(
        args=args, ranks=ranks, out=out, method=method, settings=settings, tokenizer=tokenizer, feed=batches,
        model=parallel_model, optimizer=optimizer, autocast=bf16_autocast(args.bf16, model, ranks),
        log=Log(out, state, steps, args, ranks), stop=StopSignal(ranks),
        first_step=state["step"], steps=steps, eval_every=eval_every, save_every=save_every,
        position=batches.position(),  # of the feed, where the next step begins
    )  # fmt: skip


def open_model(args, resume: Path | None, sample):
    """(model, tokenizer): continued, converted, or new. sample: gives the records that a tokenizer is trained on."""
    source = resume or args.model_name_or_path
    if source:
        directory = resume or checkpoints.local_path(source)
        if args.overwrite_output_dir and directory.resolve().is_relative_to(Path(args.output_dir).resolve()):
            raise ValueError(f"--overwrite_output_dir would delete {directory}, from which this run is to start")
        model, tokenizer = checkpoints.open_for_training(args, directory, resume), load_tokenizer(directory)
        checkpoints.check_rows(model, tokenizer, directory)
    elif all(source.name in toy.SOURCES for source in data.parse_spec(args.dataset_args)):
        tokenizer = toy.tokenizer()
    else:
        tokenizer = train_tokenizer(data.texts(sample()), args.vocab_size)
    tokenizer.configure(args.chat_template, args.raw_control_tokens)
    if not source:
        stored = methods.get(args.method).remember(args, {})
        model = checkpoints.new_model(args.method, args.preset, tokenizer.vocab_size, args.seed, **stored)
    stored = model.config.nanoedit
    stored |= methods.get(args.method).remember(args, stored)
    if args.max_length > model.config.max_positions:
        positions = model.config.max_positions
        raise ValueError(f"--max_length {args.max_length} is more than the model's {positions} positions; lower it")
    model.model.gradient_checkpointing = args.gradient_checkpointing
    return model, tokenizer


def describe(args, model, steps: int, ranks: Ranks) -> str:
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
    if args.lora:
        size += f", {sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f}M of them trained"
    mode = f", {args.parallel}" if ranks.world > 1 else ""
    return f"{args.method}, {size}, {steps} steps on {ranks.world} x {ranks.device.type}{mode}"


# ---------------------------------------------------------------------------------------------------- steps


def seeded(*key: int) -> torch.Generator:
    """A generator that depends on nothing but its key: (seed, step, micro-batch, ...)."""
    state = 0
    for k in key:
        state = (state * 6364136223846793005 + k + 1442695040888963407) % 2**64
        state = ((state ^ state >> 33) * 0xFF51AFD7ED558CCD) % 2**64
    return torch.Generator().manual_seed(state % 2**63)


def generators(seed: int, step: int, micro_batch: int) -> tuple[torch.Generator, torch.Generator]:
    """This micro-batch's own generator, which also decides about dropout, and one that is the same on every process."""
    own = seeded(seed, step, micro_batch)
    torch.manual_seed(own.initial_seed())
    return own, seeded(seed, step)


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up, then cosine or linear decay to 0, or constant."""
    warmup = args.warmup_steps or int(args.warmup_ratio * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    decay = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return args.learning_rate * decay[args.lr_scheduler_type]


def set_learning_rate(optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def save(run, step: int, name: str) -> Path:
    state = {"step": step, "log": run.log.state(), "data": run.feed.gather(run.position)}
    with run.log.paused():
        return checkpoints.save_run(run.out, name, run.model, run.tokenizer, run.optimizer, state, run.args)


def stopped(run, step: int) -> int:
    """Saves and says so; returns the exit status. Raises OSError for the fault that stopped the run."""
    saved, stop = save(run, step, str(step)), run.stop
    goes_on = f"saved in {saved}; {checkpoints.resume_hint(run.args)} goes on from there"
    if stop.fault:
        raise OSError(f"{stop.fault}; stopped at step {step}; {goes_on}") from stop.fault
    if stop.failed:
        return 1  # another process says why
    run.ranks.say(f"stopped at step {step}; {goes_on}")
    return stop.status


# ---------------------------------------------------------------------------------------------------- evaluation


def evaluate_when_due(run, step: int) -> None:
    due = step and (step % run.eval_every == 0 or step == run.steps) and run.args.eval_strategy != "no"
    if due and run.feed.eval and run.log.last_eval < step:
        with run.log.paused(), run.autocast, torch.no_grad():
            run.log.write_eval(step, evaluate(run))
            run.stop.check()
            show_samples(run)
            run.model.reshard()


def evaluate(run) -> dict[str, float]:
    """Mean loss on the held-out examples. The noise depends on the batch number alone, so that figures compare.

    Batches that are computed at the same time share the choices of a rollout, as in training; so groups of 8 do (or of
    the next multiple of the number of processes), and every process makes the same number of rounds.
    """
    size, sums, counts = run.args.per_device_eval_batch_size, {}, {}
    batches = [run.feed.eval[i : i + size] for i in range(0, len(run.feed.eval), size)]
    world = run.ranks.world
    group, rounds = -(-8 // world) * world, -(-len(batches) // world)
    for i in range(run.ranks.rank, rounds * world, world):
        run.stop.check()
        examples, counted = (batches[i], True) if i < len(batches) else (batches[0], False)
        rng, shared_rng = seeded(0, i // group, i), seeded(0, i // group)
        batch = run.model(run.method.prepare, examples, run.settings, 1.0, rng, shared_rng)
        loss, parts = run.model(run.method.loss, batch.to(run.ranks.device))
        for name, value in {"loss": loss, **parts}.items() if counted else ():
            sums[name] = sums.get(name, 0.0) + float(value) * len(examples)
            counts[name] = counts.get(name, 0) + len(examples)
    return {f"eval_{name}": value for name, value in run.ranks.mean(sums, counts).items()}


def show_samples(run) -> None:
    """A few held-out prompts answered: the loss says how well it learns, the texts say what."""
    examples = run.feed.eval[: run.args.eval_samples]
    if not examples:
        return
    flags = methods.default_sampling(init_num=max(len(e.response) for e in examples))
    settings = methods.sampling_settings(run.method, flags, run.model.plain, run.tokenizer)
    drafts = [e.draft for e in examples]
    drafts = None if None in drafts else drafts
    prompts, seeds = [e.prompt for e in examples], list(range(len(examples)))
    texts = run.model.run_on_rank0(run.method.generate, prompts, settings, seeds, drafts)
    for e, text in zip(examples, texts or []):
        run.ranks.say(f"  | {run.tokenizer.decode(e.prompt)!r} -> {run.tokenizer.decode(text.tokens)!r}")


# ---------------------------------------------------------------------------------------------------- the loop


def train(args, ranks: Ranks) -> int:
    """Returns the exit status: 0, 130 after Ctrl-C, 1 if another process says what went wrong."""
    run = open_run(args, ranks)
    if run is None:
        return 0
    model, method, log, stop, optimizer = run.model, run.method, run.log, run.stop, run.optimizer
    step = run.first_step  # steps made
    try:
        evaluate_when_due(run, step)  # made up for, where the run was stopped in an evaluation
        for step in range(run.first_step, run.steps):
            set_learning_rate(optimizer, learning_rate(step, run.steps, args))
            batches = stop.check(run.feed.take)
            for m, examples in enumerate(batches):
                if m:
                    stop.check()
                rng, shared_rng = generators(args.seed, step, m * ranks.world + ranks.rank)
                with run.autocast, torch.no_grad():
                    batch = model(method.prepare, examples, run.settings, step / run.steps, rng, shared_rng)
                with model.micro_batch(last=m == len(batches) - 1):
                    with run.autocast:
                        loss, parts = model(method.loss, batch.to(ranks.device))
                    (loss / len(batches)).backward()  # the mean over them; that over processes is the model's work
                log.collect(loss, parts, examples)
            norm = model.clip_gradients(args.max_grad_norm)
            if ranks.all_reduce_max(not log.is_finite(norm)):  # on one is enough: all skip it, or weights would part
                log.skip(step, batches, run.tokenizer)
            else:
                optimizer.step()
                log.add(norm)
            model.zero_grad()
            step, run.position = step + 1, run.feed.position()
            log.write_when_due(step, optimizer.param_groups[0]["lr"])
            evaluate_when_due(run, step)
            if step % run.save_every == 0 and step < run.steps:
                save(run, step, str(step))
    except Stopped:
        return stopped(run, step)
    finally:
        log.bar.close()
    ranks.say(f"saved in {save(run, step, 'final')}")
    return 0


def main(argv=None):
    args = parse_args(argv)
    with Ranks() as ranks:
        return train(args, ranks)


if __name__ == "__main__":
    cli.run(main)
