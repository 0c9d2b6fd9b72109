"""Train by editing: Edit Flows and ME-DLM, from scratch or from a checkpoint, on one process or many.

    python train.py --method editflow --dataset_args toy --preset tiny --output_dir out/toy
    torchrun --nproc_per_node 8 train.py --method medlm --model_name_or_path CKPT --dataset_args data.jsonl ...

The loop is a loop you can read aloud (function `train`): draw a micro-batch, loss, backward, repeat for accumulation,
clip, step, log, evaluate, save. The methods live in editflow.py and medlm.py; here they are the two branches of
`loss_function`. What the loop is fed with is in feed.py, how a model is spread over processes in parallel.py, how a run
is saved in checkpoints.py and recorded in metrics.py.

Nothing random is stored. Every draw comes from a generator seeded by (seed, step, micro-batch), and so does the choice
of examples: a run killed and restarted sees what an undisturbed run sees, and one process with accumulation 4 sees
what four processes see.
"""

import json
import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
import editflow
import lora
import medlm
import models
import parallel
from parallel import LossModule, Ranks
from plumbing import cli, feed
from plumbing.checkpoints import STATE, again, clear_output, prepare_output, save_checkpoint
from plumbing.feed import Corpus, MemoryFeed, StreamedFeed
from plumbing.log import Log

# ---------------------------------------------------------------------------------------------------- flags


def parse_args(argv=None):
    f = cli.Flags("Train an Edit Flows or ME-DLM model.")
    n, positive = cli.number, cli.number(int, low=1)
    a = f.add_argument
    a("--method", choices=list(models.METHODS), required=True, help="what to train")
    a("--output_dir", required=True, help="checkpoints, metrics.jsonl; a run found here is continued")
    f.flag("--overwrite_output_dir", help="start anew although output_dir holds a run")
    a("--seed", type=n(int, low=0), default=42, help="everything random follows from it")

    a("--model_name_or_path", "--model_cfg",
      help="checkpoint directory or hub id to start from; without it: a new model")
    a("--preset", type=cli.spec(models.preset_sizes), default="tiny",
      help=f"size of a new model: {', '.join(models.PRESETS)}")
    a("--vocab_size", type=n(int, low=300, high=data.MOST_TOKENS), default=4096,
      help="size of the tokenizer trained for a new model")
    a("--parallel", choices=parallel.MODES, default="ddp",
      help="several processes: everything on each (ddp), the optimizer shared (zero1), weights too (fsdp)")
    f.flag("--reshard_after_forward", default=True,
           help="fsdp: let a block's weights go between forward and backward (ZeRO-3); False keeps them (ZeRO-2)")
    f.flag("--gradient_checkpointing", help="recompute activations block by block: less memory, one more forward")
    f.flag("--bf16", help="bf16 autocast; weights and optimizer stay float32")
    f.flag("--compile", help="torch.compile the blocks")
    f.flag("--lora", help="train low-rank additions to the blocks and the heads; save these alone")
    a("--lora_r", type=positive, default=32, help="their rank")
    a("--lora_alpha", type=n(above=0), default=64.0, help="their weight is lora_alpha / lora_r")
    a("--lora_dropout", type=n(low=0, high=1), default=0.05, help="dropout in front of them")
    f.flag("--load_in_4bit", help="with --lora: keep the matrices of the blocks in 4 bits (NF4)")

    a("--dataset_args", "--train_file", type=cli.spec(data.parse_spec), default="toy",
      help="files, folders, hub ids or `toy`: name[train:N,test:M] + other")
    a("--text_field", default=None, help="field of a record that holds plain text")
    f.flag("--insert_eos", default=True, help="end texts and responses with the end-of-message token")
    f.flag("--chat_template", default=True, help="render dialogues with the tokenizer's chat template")
    f.flag("--streaming", help="read the data bit by bit and never hold it: files, URLs, hub ids; needs --max_steps")
    f.flag("--skip_bad_records", help="count and skip broken records instead of stopping")
    a("--max_length", "--max_len", type=n(int, low=2), default=512, help="tokens per sample (per packed row for medlm)")

    a("--num_train_epochs", type=n(above=0, high=1e6), default=1.0,
      help="passes over the data, unless max_steps is given")
    a("--max_steps", type=positive, default=None, help="optimizer steps")
    a("--per_device_train_batch_size", type=positive, default=32, help="sequences (packed rows for medlm) per process")
    a("--per_device_eval_batch_size", type=positive, default=32, help="the same for evaluation")
    a("--gradient_accumulation_steps", type=positive, default=1, help="micro-batches per optimizer step")
    a("--learning_rate", type=n(above=0), default=1e-4, help="peak learning rate")
    a("--lr_scheduler_type", choices=["cosine", "linear", "constant"], default="cosine", help="after the warm-up")
    a("--warmup_steps", type=n(int, low=0), default=0, help="linear warm-up")
    a("--warmup_ratio", type=n(low=0, high=1), default=0.0, help="the same as a share of all steps")
    a("--weight_decay", type=n(low=0), default=0.0, help="AdamW, on matrices only")
    a("--adam_beta2", type=n(low=0, below=1), default=0.98, help="AdamW; 0.98 forgets a bad start sooner than 0.999")
    a("--max_grad_norm", type=n(above=0), default=1.0, help="gradient clipping")

    a("--logging_steps", type=positive, default=10, help="steps between lines of metrics.jsonl")
    a("--eval_strategy", choices=["no", "steps", "epoch"], default="steps", help="when to evaluate")
    a("--eval_steps", type=n(above=0), default=0.1, help="steps between evaluations; below 1: a share of the run")
    a("--eval_samples", type=n(int, low=0), default=2, help="texts decoded and shown at each evaluation")
    a("--save_steps", type=n(above=0), default=0.25, help="steps between checkpoints; below 1: a share of the run")
    a("--save_total_limit", type=positive, default=2, help="checkpoints kept")
    a("--report_to", choices=["none", "tensorboard"], default="none", help="besides metrics.jsonl")
    for name in ("--do_train", "--save_safetensors", "--remove_unused_columns"):
        f.flag(name, default=None, help="accepted so that published commands run; changes nothing here")
    a("--deepspeed", help="accepted likewise; see --parallel")
    a("--dataloader_num_workers", type=n(int, low=0), default=0,
      help="accepted likewise; batches are made in the main process")

    e = f.add_argument_group("Edit Flows").add_argument
    e("--x0_sampler", type=cli.spec(editflow.source), default=None,
      help="start: empty, masks[length:64], uniform[length:100], draft (default: the checkpoint's, else empty)")
    e("--schedule", type=cli.spec(editflow.schedule), default=None,
      help="kappa: linear, cosine, cubic, cubic[a:A,b:B] (default: the checkpoint's, else cubic)")
    e("--time_conditioned", type=cli.boolean, nargs="?", const=True, default=False, metavar="BOOL",
      help="a new model sees t")
    e("--normalize", type=cli.boolean, nargs="?", const=True, default=True, metavar="BOOL",
      help="divide each sequence's loss by its length")

    m = f.add_argument_group("ME-DLM").add_argument
    m("--min_t", type=n(low=0, high=1), default=0.0, help="smallest masking probability (a floor applies)")
    m("--max_t", type=n(low=0, high=1), default=1.0, help="largest masking probability")
    m("--loss_norm", choices=["tokens", "bound"], default="tokens",
      help="published mean over masked tokens / t, or LLaDA's bound")
    m("--copy_head", type=cli.boolean, nargs="?", const=True, default=False, metavar="BOOL",
      help="stage 1: next_token_head starts as a copy of lm_head")
    m("--pad_len", type=positive, default=None, help="pad responses to a multiple of this (default: no padding)")
    m("--intermediate_ratio", type=n(low=0, high=1), default=0.0, help="stage 3: share of steps trained on rollouts")
    m("--mask_diffusion_pred_per_step", type=positive, nargs="+", default=[2, 4, 8, 16],
      help="tokens unmasked per rollout pass")
    m("--max_diffusion_steps", type=positive, default=32,
      help="most passes of a rollout; the edit passes among them grow with training progress")
    m("--intermediate_min_t", type=n(low=0, high=1), default=0.0, help="smallest share masked before a rollout")
    m("--intermediate_max_t", type=n(low=0, high=1), default=1.0, help="largest share masked before a rollout")
    m("--rollout_order", choices=["random", "confidence"], default="random", help="order in which a rollout unmasks")
    args = f.parse_args(argv)
    if args.streaming and not args.max_steps:
        f.error("--streaming does not know how long an epoch is; say --max_steps")
    if args.streaming and args.eval_strategy == "epoch":
        f.error("--streaming does not know how long an epoch is; leave --eval_strategy epoch out")
    if args.lora and not args.model_name_or_path:
        f.error("--lora adapts a checkpoint; name it with --model_name_or_path")
    if args.load_in_4bit and not args.lora:
        f.error("--load_in_4bit needs --lora: 4-bit weights cannot be trained themselves")
    if args.method == "medlm" and args.max_t <= medlm.MIN_T:
        f.error(f"--max_t {args.max_t} leaves nothing to draw from: t is kept above {medlm.MIN_T}")
    if args.intermediate_ratio and args.pad_len and not args.insert_eos:
        f.error("--intermediate_ratio with --pad_len needs --insert_eos True: eos divides a response from its pads")
    if args.min_t >= args.max_t:
        f.error(f"--min_t {args.min_t} must be below --max_t {args.max_t}")
    if args.intermediate_min_t >= args.intermediate_max_t:
        f.error(f"--intermediate_min_t {args.intermediate_min_t} must be below "
                f"--intermediate_max_t {args.intermediate_max_t}")  # fmt: skip
    if (args.pad_len or 0) > args.max_length:
        f.error(f"--pad_len {args.pad_len} must not exceed --max_length {args.max_length}")
    return args


# ---------------------------------------------------------------------------------------------------- methods


def seeded(*key: int) -> torch.Generator:
    """A generator that depends on nothing but its key: (seed, step, micro-batch, ...)."""
    state = 0
    for k in key:
        state = (state * 6364136223846793005 + k + 1442695040888963407) % 2**64
        state = ((state ^ state >> 33) * 0xFF51AFD7ED558CCD) % 2**64
    return torch.Generator().manual_seed(state % 2**63)


def loss_function(args, module: LossModule, tokenizer, device):
    """The two methods behind one interface: f(call, examples, key, progress) -> (loss, metrics).

    call is the module itself, or its DDP wrapper where gradients are wanted; key seeds the noise of this micro-batch;
    progress runs from 0 to 1.
    """
    model = module.model
    settings = model.config.nanoedit
    if args.method == "editflow":
        kappa, x0_source = editflow.schedule(settings["schedule"]), editflow.source(settings["x0_sampler"])
        unigram = model.unigram.cpu() if hasattr(model, "unigram") else None

        def editflow_loss(call, examples, key, progress):
            rng = seeded(*key)
            x0 = [x0_source.draw(e.draft, tokenizer.mask_id, unigram, rng) for e in examples]
            prompts, x1 = [e.prompt for e in examples], [e.response for e in examples]
            batch = editflow.path(prompts, x0, x1, editflow.draw_t(len(examples), rng), kappa.kappa, rng)
            return call(editflow.loss, batch.to(device), kappa, normalize=args.normalize)

        return editflow_loss

    tokens = medlm.special_tokens(tokenizer)

    def medlm_loss(call, examples, key, progress):
        shared = seeded(*key[:2])  # (seed, step): the same on every rank, so all ranks make the same passes
        if torch.rand((), generator=shared) < args.intermediate_ratio:
            plan = medlm.plan_rollout(progress, args.mask_diffusion_pred_per_step, args.max_diffusion_steps, shared)
            batch = module(
                medlm.rollout, examples, plan, tokens,
                min_t=args.intermediate_min_t, max_t=args.intermediate_max_t,
                order=args.rollout_order, generator=seeded(*key),
            )  # fmt: skip
            return call(medlm.rollout_loss, batch)
        batch = medlm.mask_batch(
            examples, mask_id=tokens["mask"], min_t=args.min_t, max_t=args.max_t, generator=seeded(*key)
        )
        return call(medlm.mask_loss, batch.to(device), args.loss_norm)

    return medlm_loss


# ---------------------------------------------------------------------------------------------------- set-up


def prepare_model(args, resume: Path | None, texts, ranks: Ranks):
    """(model, tokenizer): continued, converted, or new. texts: what a new model's tokenizer is trained on."""
    source = resume or args.model_name_or_path
    if source:
        directory = models.local_path(str(source))
        if args.overwrite_output_dir and directory.resolve().is_relative_to(Path(args.output_dir).resolve()):
            raise ValueError(f"--overwrite_output_dir would delete {directory}, from which this run is to start")
        model, tokenizer = open_model(args, directory, resume), data.load_tokenizer(directory)
        models.check_rows(model, tokenizer, directory)
        if args.time_conditioned and not model.config.nanoedit.get("time_conditioned"):
            raise ValueError(f"--time_conditioned is for new models; {directory} was made without it")
    else:
        is_toy = data.is_toy(args.dataset_args)
        tokenizer = data.toy_tokenizer() if is_toy else data.train_tokenizer(texts(), args.vocab_size)
        model = models.build(
            args.method, args.preset, tokenizer.vocab_size, time_conditioned=args.time_conditioned, seed=args.seed
        )
    if args.method == "editflow":
        settings = model.config.nanoedit
        settings["schedule"] = args.schedule or settings.get("schedule", "cubic")
        settings["x0_sampler"] = args.x0_sampler or settings.get("x0_sampler", "empty")
        kind = editflow.source(settings["x0_sampler"]).kind
        editflow.schedule(settings["schedule"])
        if kind == "masks" and tokenizer.mask_id is None:
            raise ValueError("--x0_sampler masks: the tokenizer has no mask token; convert.py --to editflow adds one")
    else:
        medlm.special_tokens(tokenizer)
        if args.copy_head and not resume:
            model.next_token_head.load_state_dict(model.lm_head.state_dict())
    if args.max_length > models.max_positions(model.config):
        positions = models.max_positions(model.config)
        raise ValueError(f"--max_length {args.max_length} is more than the model's {positions} positions; lower it")
    model.model.gradient_checkpointing = args.gradient_checkpointing
    return model, tokenizer


def open_model(args, directory: Path, resume: Path | None):
    """The checkpoint to start from or to continue, with LoRA adapters where they are asked for."""
    adapted = (directory / "adapter_config.json").is_file()
    if resume and adapted != args.lora:
        kind = "with" if adapted else "without"
        raise ValueError(f"{directory}: this run was trained {kind} --lora; go on {kind} it, or choose another folder")
    if not args.lora:
        return models.load(directory, method=args.method)
    if adapted and not resume:
        raise ValueError(f"{directory}: holds adapters already; `convert.py --to {args.method} --merge_lora` first")
    if resume:
        return lora.load(directory, method=args.method, four_bit=args.load_in_4bit)
    model = models.load(directory, method=args.method)
    model.base = str(directory)
    return lora.add(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.load_in_4bit, args.seed)


def prepare_data_and_model(args, resume: Path | None, ranks: Ranks):
    """(model, tokenizer, dataset, steps per epoch). The data come first, for a new tokenizer is trained on them."""
    if args.streaming:
        hold_out = 0 if args.eval_strategy == "no" else 200
        corpus = Corpus(args.dataset_args, args.seed, hold_out, args.text_field, args.skip_bad_records)
        model, tokenizer = prepare_model(args, resume, lambda: data.texts(corpus.sample()), ranks)
        method, settings = feed_method(args, model, tokenizer)
        dataset = StreamedFeed(args, method, settings, tokenizer, corpus, ranks)
    else:
        train_records, eval_records, reports = data.load_records(
            args.dataset_args, args.seed, text_field=args.text_field, skip_bad_records=args.skip_bad_records
        )
        for report in reports:
            ranks.say(str(report))
        model, tokenizer = prepare_model(args, resume, lambda: data.texts(train_records), ranks)
        method, settings = feed_method(args, model, tokenizer)
        dataset = MemoryFeed(args, method, settings, tokenizer, train_records, eval_records, ranks)
    if args.method == "editflow":
        prepare_source(model, dataset, resume)
    return model, tokenizer, dataset, dataset.steps_per_epoch


def feed_method(args, model, tokenizer):
    """(method, settings) as feed.py asks for them."""
    settings = model.config.nanoedit

    def check_example(example, settings):
        if args.method == "medlm" and args.intermediate_ratio:
            medlm.response_text(example.response, medlm.special_tokens(tokenizer))
        is_draft = args.method == "editflow" and editflow.source(settings["x0_sampler"]).kind == "draft"
        if args.streaming and is_draft and example.draft is None:
            raise ValueError('--x0_sampler draft: no "draft" field to start from')

    return SimpleNamespace(PACKED=args.method == "medlm", check_example=check_example), settings


def prepare_source(model, dataset: MemoryFeed, resume: Path | None) -> None:
    """What the x0_sampler needs: token frequencies, or a draft in every example. Raises ValueError without drafts."""
    kind, start = editflow.source(model.config.nanoedit["x0_sampler"])
    rows = dataset.rows()
    if kind == "uniform" and not (resume and hasattr(model, "unigram")):
        model.set_unigram(unigram(rows, model.config.vocab_size))
    examples = [*rows, *dataset.eval]
    lacking = sum(e.draft is None for e in examples)
    if kind == "draft" and lacking:
        raise ValueError(f'--x0_sampler draft: {lacking} of the records have no "draft" field to start from')
    if isinstance(model.model, models.Bert):  # on the way from x0 to x1 a text holds tokens of both
        longest = max(len(e) + (len(e.draft or []) if kind == "draft" else start) for e in examples)
        if isinstance(dataset, StreamedFeed):  # these are only some
            longest = dataset.args.max_length + (dataset.args.max_length if kind == "draft" else start)
        if longest > models.max_positions(model.config):
            raise ValueError(
                f"prompt, response and x0 take up to {longest} tokens together, the model has "
                f"{models.max_positions(model.config)} positions; lower --max_length or the length of --x0_sampler"
            )


def unigram(examples: list, vocab_size: int) -> torch.Tensor:
    """Token frequencies of the responses, float [V]: where x0_sampler uniform draws from."""
    counts = torch.bincount(torch.tensor([token for e in examples for token in e.response]), minlength=vocab_size)
    return counts.float() / counts.sum()


def read_state(args, resume: Path, steps: int, ranks: Ranks) -> dict | None:
    """train_state.json of the checkpoint to go on from; None when the run is finished."""
    state = json.loads((resume / STATE).read_text())
    step = state["step"]
    if step > steps or (step == steps and resume.name == "checkpoint-final"):
        ranks.say(f"{resume.parent} is finished, at step {step} of {steps}; for a new run choose another --output_dir")
        return None
    changed = {k: v for k, v in vars(args).items() if k in state["args"] and state["args"][k] != v}
    if changed:
        ranks.say("changed since the checkpoint was written: " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    ranks.say(f"continuing {resume} at step {step} of {steps}")
    return state


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up, then cosine or linear decay to 0, or constant."""
    warmup = args.warmup_steps or int(args.warmup_ratio * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    decay = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return args.learning_rate * decay[args.lr_scheduler_type]


# ---------------------------------------------------------------------------------------------------- the loop


def train(args, ranks: Ranks) -> int:
    """Returns the exit status: 0, 130 after Ctrl-C, 1 if another process says what went wrong."""
    out, resume = prepare_output(args, ranks)
    model, tokenizer, dataset, steps_per_epoch = prepare_data_and_model(args, resume, ranks)
    steps = args.max_steps or math.ceil(args.num_train_epochs * steps_per_epoch)
    eval_every, save_every = (max(1, int(n if n >= 1 else n * steps)) for n in (args.eval_steps, args.save_steps))
    if args.eval_strategy == "epoch":
        eval_every = max(1, int(steps_per_epoch))
    state = read_state(args, resume, steps, ranks) if resume else {"step": 0}
    if not state:
        return 0

    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
    if args.lora:
        size += f", {sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f}M of them trained"
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    # three handles on one thing: the model; module(f, ...), f(model, ...) on every process's own account; and
    # call(f, ...), the same for losses, whose gradients the processes average
    module = LossModule(model)
    call = parallel.distribute(module, args.parallel, ranks, args.reshard_after_forward)
    optimizer = parallel.adamw(
        model, args.parallel, ranks, lr=args.learning_rate, beta2=args.adam_beta2, weight_decay=args.weight_decay
    )
    if resume:
        with models.open_tensors(resume / "optimizer.safetensors") as moments:
            parallel.restore_moments(model, optimizer, moments)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss_of = loss_function(args, module, tokenizer, ranks.device)
    step = state["step"]
    dataset.begin(step, state.get("data"))
    clear_output(out, args, ranks)
    log, stop = Log(out, state, args, ranks), StopSignal(ranks)
    mode = f", {args.parallel}" if ranks.world > 1 else ""
    ranks.say(f"{args.method}, {size}, {steps} steps on {ranks.world} x {ranks.device.type}{mode}")

    def save(name: str) -> Path:
        state = {"step": step, "log": log.state(), "data": dataset.gather(position)}
        return save_checkpoint(out, name, model, tokenizer, optimizer, state, args, ranks)

    # without its cache: bf16 copies of weights made in a rollout have no place in the graph of the loss that follows
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False)
    pause = 0.2 if sys.stderr.isatty() else 20  # seconds between updates of the bar: a log file wants few
    with tqdm(total=steps, initial=step, disable=not ranks.is_main, unit="step", mininterval=pause) as bar:
        try:
            while True:
                position = dataset.position()  # before this step: one cut short is done again
                evaluate_now = step and (step % eval_every == 0 or step == steps)
                if evaluate_now and args.eval_strategy != "no" and dataset.eval and log.last_eval < step:
                    with autocast, log.aside():
                        log.write_eval(step, evaluate(loss_of, module, dataset.eval, args, ranks, stop))
                        stop.check()
                        show_samples(module, tokenizer, dataset.eval, args, ranks)
                if step == steps:
                    break
                if step and step % save_every == 0:
                    with log.aside():
                        save(str(step))

                for g in optimizer.param_groups:
                    g["lr"] = learning_rate(step, steps, args)
                batches, fault = attempt(dataset.take)
                stop.check(fault)  # all processes vote, before every micro-batch, whether to stop
                parts, tokens = [], 0
                for m, examples in enumerate(batches):
                    if m:
                        stop.check()
                    key = (args.seed, step, m * ranks.world + ranks.rank)
                    torch.manual_seed(seeded(*key).initial_seed())  # for dropout
                    with parallel.accumulating(call, last=m == len(batches) - 1):
                        with autocast:
                            loss, metrics = loss_of(call, examples, key, step / steps)
                        (loss / len(batches)).backward()  # the mean over them; that over processes is `call`'s work
                    parts.append({"loss": loss.detach(), **metrics})
                    tokens += sum(len(e) for e in examples)
                norm = parallel.clip_gradients(trained, args.max_grad_norm)
                finite = all(math.isfinite(x) for x in [float(norm), *(float(p["loss"]) for p in parts)])
                if ranks.most(not finite):  # on one is enough: all skip the step, or weights would part
                    log.skip(step, parts, batches, tokenizer)
                else:
                    optimizer.step()
                    log.add(parts, tokens, norm)
                parallel.clear_gradients(call)
                step += 1
                bar.update()
                if step % args.logging_steps == 0 or step == steps:
                    bar.set_postfix(log.write(step, optimizer.param_groups[0]["lr"]), refresh=False)
        except Stopped:
            saved = save(str(step))
            goes_on = f"saved in {saved}; {again(args)} goes on from there"
            if stop.fault:
                raise OSError(f"{stop.fault}; stopped at step {step}; {goes_on}") from stop.fault
            if stop.failed:
                return 1  # another process says why
            ranks.say(f"stopped at step {step}; {goes_on}")
            return stop.status
        ranks.say(f"saved in {save('final')}")
    return 0


class Stopped(Exception):
    """All processes agreed to save and stop."""


class StopSignal:
    """Ctrl-C and SIGTERM end the run before the next micro-batch, after saving; so do data that cannot be had. A second
    Ctrl-C ends it at once."""

    def __init__(self, ranks: Ranks):
        self.requested, self.status, self.ranks = False, 0, ranks
        self.fault, self.failed = None, False  # what this process met; whether any did
        signal.signal(signal.SIGTERM, self.receive)
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, number, frame):
        self.requested, self.status = True, 130 if number == signal.SIGINT else 0
        feed.stop_requested.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self, fault: Exception | None = None) -> None:
        """Raises Stopped on all processes as soon as one has been asked to stop, or met a fault. All must call it
        equally often."""
        verdict = self.ranks.most(2 if fault and not self.requested else int(self.requested))
        if verdict:
            self.fault, self.failed = fault if verdict == 2 else None, verdict == 2
            raise Stopped


def attempt(function):
    """(its result, None), or (None, the error) where data cannot be had."""
    try:
        return function(), None
    except (OSError, ValueError) as e:
        return None, e


@torch.no_grad()
def evaluate(loss_of, module: LossModule, examples: list, args, ranks: Ranks, stop: StopSignal) -> dict[str, float]:
    """Mean loss on the held-out examples. The noise depends on the batch number alone, so that figures compare.

    Batches that are computed at the same time share the choices of a rollout, as in training; so groups of 8 do (or of
    the next multiple of the number of processes), and every process makes the same number of rounds.
    """
    module.eval()
    size, sums, counts = args.per_device_eval_batch_size, {}, {}
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    world = ranks.world
    group, rounds = -(-8 // world) * world, -(-len(batches) // world)
    for i in range(ranks.rank, rounds * world, world):
        stop.check()
        batch, counted = (batches[i], True) if i < len(batches) else (batches[0], False)
        loss, parts = loss_of(module, batch, (0, i // group, i), 1.0)
        for name, value in {"loss": loss, **parts}.items() if counted else ():
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
            counts[name] = counts.get(name, 0) + len(batch)
    settle(module)
    return {f"eval_{name}": value for name, value in ranks.mean(sums, counts).items()}


def settle(module: LossModule) -> None:
    """Back to training, and what a forward pass without a backward pass left gathered is sharded again."""
    module.train()
    if hasattr(module, "reshard"):
        module.reshard()


def show_samples(module: LossModule, tokenizer, examples: list, args, ranks: Ranks) -> None:
    """A few held-out prompts answered: the loss says how well it learns, the texts say what."""
    is_sharded = hasattr(module, "reshard")
    if not args.eval_samples or not (ranks.is_main or is_sharded):
        return
    module.eval()
    chosen = examples[: args.eval_samples]
    texts = module(decode_samples, chosen, args, tokenizer, ranks if is_sharded else None)
    for e, text in zip(chosen, texts or []):
        ranks.say(f"  | {tokenizer.decode(e.prompt)!r} -> {tokenizer.decode(text)!r}")
    settle(module)


def decode_samples(model, examples: list, args, tokenizer, together: Ranks | None = None) -> list[list[int]]:
    if together:
        return parallel.lead(model, together, lambda: decode_samples(model, examples, args, tokenizer))
    prompts = [e.prompt for e in examples]
    if args.method == "editflow":
        start, rng = editflow.source(model.config.nanoedit["x0_sampler"]), seeded(0)
        unigram = model.unigram.cpu() if hasattr(model, "unigram") else None
        x0 = [start.draw(e.draft, tokenizer.mask_id, unigram, rng) for e in examples]
        return [s.response for s in editflow.sample(model, prompts, x0=x0, steps=50)]
    longest = max(len(e.response) for e in examples)
    passes = {"init_num": longest, "mask_diffusion_step": -(-longest // 4), "edit_diffusion_step": 4}
    return [d.response for d in medlm.decode(model, prompts, medlm.special_tokens(tokenizer), **passes)]


def main(argv=None):
    args = parse_args(argv)
    with Ranks() as ranks:
        return train(args, ranks)


if __name__ == "__main__":
    cli.run(main)
