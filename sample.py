"""Generate, chat, continue or repair a draft with a trained checkpoint of either method, and watch the edits.

    python sample.py --model_name_or_path OUT --prompt "..." --make_gif
    python sample.py --model_name_or_path OUT --interactive
    python sample.py --model_name_or_path OUT --prompt_file prompts.txt --num_samples 4 --output samples.jsonl

Edit Flows: --tau is the time step of the chain (1 / --steps). ME-DLM: --mask_diffusion_step passes fill --init_num
masks, then up to --edit_diffusion_step passes edit the draft.
"""

import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
import editflow
import medlm
import models
from plumbing import cli
from plumbing.picture import Trace, show, write_gif, write_html


def parse_args(argv=None):
    f = cli.Flags("Generate with an Edit Flows or ME-DLM checkpoint.")
    n, positive = cli.number, cli.number(int, low=1)
    a = f.add_argument
    a("--model_name_or_path", required=True, help="checkpoint directory, the output directory of train.py, or a hub id")
    what = f.add_mutually_exclusive_group()
    what.add_argument("--prompt", type=cli.text, nargs="+", help="one or more prompts; without any: text from scratch")
    what.add_argument(
        "--prompt_file", help="many prompts in one batch: one per line (.txt) or record (.jsonl, .json, ...)"
    )
    f.flag("--interactive", help="chat on the terminal; an empty line generates from scratch")
    f.flag(
        "--chat_template",
        default=True,
        help="wrap prompts in the checkpoint's chat template, if it was trained with one",
    )
    a("--draft", type=cli.text, help="a text to start from instead of masks or nothing (Edit Flows)")
    a("--num_samples", type=positive, default=1, help="texts per prompt, with seeds seed, seed + 1, ...")
    a("--batch_size", type=positive, default=32, help="texts generated at once")
    a("--seed", type=n(int, low=0), default=0, help="of the first text of each prompt")
    a("--output", default="-", help="a .jsonl file for the results (- prints them)")
    f.flag("--bf16", default=False, help="compute in bf16")

    decoding_flags(f)
    f.flag("--show", help="watch the first text being written on the terminal")
    a("--make_gif", nargs="?", const="decode_trace.gif", metavar="FILE", help="draw the first text being written")
    a("--make_html", nargs="?", const="decode_trace.html", metavar="FILE", help="the same as a page to step through")
    args = f.parse_args(argv)
    check_decoding(f, args)
    if args.interactive and (args.prompt or args.prompt_file):
        f.error("--interactive reads prompts from the terminal; leave out --prompt and --prompt_file")
    clashes = {"--output": args.output != "-", "--draft": args.draft is not None, "--num_samples": args.num_samples > 1}
    clashes |= {"--make_gif": args.make_gif, "--make_html": args.make_html}
    for name in [name for name, given in clashes.items() if args.interactive and given]:
        f.error(f"{name} does not go with --interactive")
    start = editflow.source(args.x0_sampler).kind if args.x0_sampler else "draft"
    if args.draft is not None and (args.mask_length is not None or start != "draft"):
        f.error("--draft is where to start; leave out --mask_length and --x0_sampler")
    if args.draft is None and args.x0_sampler and start == "draft":
        f.error("--x0_sampler draft starts from a text: give it with --draft")
    files = {
        "--prompt_file": args.prompt_file, "--output": None if args.output == "-" else args.output,
        "--make_gif": args.make_gif, "--make_html": args.make_html,
    }  # fmt: skip
    given = [(flag, os.path.realpath(file)) for flag, file in files.items() if file]
    for (flag, file), (other, same) in itertools.combinations(given, 2):
        if file == same:
            f.error(f"{flag} and {other} name the same file")
    return args


def decoding_flags(f: cli.Flags, temperature: float = 1.0, init_num: int | None = 512) -> None:
    """How to decode, for both methods: shared with evaluate.py."""
    n, positive = cli.number, cli.number(int, low=1)
    e = f.add_argument_group("Edit Flows").add_argument
    e("--tau", type=n(low=1e-6, high=1), help="time step of the chain; 0.01 (the default) makes 100 steps")
    e("--steps", type=positive, help="the same as a number of steps")
    e("--x0_sampler", type=cli.spec(editflow.source), help="where to start (default: as in training)")
    e("--mask_length", type=n(int, low=0), help="start from this many masks")
    e("--temperature", type=n(low=0), default=temperature, help="of the token distributions; 0 takes the likeliest")
    e("--top_k", type=n(int, low=0), default=0, help="draw from the k most likely tokens (0: all)")
    e("--top_p", type=n(above=0, high=1), default=1.0, help="draw from the likeliest tokens that hold this probability")

    m = f.add_argument_group("ME-DLM").add_argument
    m("--mask_diffusion_step", "-m", type=positive, default=48, help="passes that fill masks")
    m("--edit_diffusion_step", "-e", type=n(int, low=0), default=16, help="most passes that edit")
    m("--init_num", "-n", type=positive, default=init_num, help="masks to start from: the longest possible answer")
    m("--order", choices=medlm.ORDERS, default="confidence", help="which masks are filled first")
    m("--max_edits", type=positive, help="most edits per pass (default: all)")


def check_decoding(f: cli.Flags, args) -> None:
    if args.tau and args.steps:
        f.error("--tau and --steps say the same thing; give one of them")
    if args.mask_length is not None and args.x0_sampler is not None:
        f.error("--mask_length N means --x0_sampler masks[length:N]; give one of them")


@dataclass
class Text:
    """One generated text: its token ids up to end-of-message, and how it came about."""

    ids: list[int]
    details: dict


def load(directory: Path, device: str, bf16: bool):
    """(model, tokenizer) of a checkpoint. Raises OSError / ValueError, also where the two do not belong together."""
    model = models.load(directory, device=device, dtype=torch.bfloat16 if bf16 else torch.float32).eval()
    tokenizer = data.load_tokenizer(directory)
    models.check_rows(model, tokenizer, directory)
    return model, tokenizer


def generate(model, tokenizer, prompts, seeds, args, drafts=None, on_step=None) -> list[Text]:
    """Answer prompts (lists of token ids) in one batch with the checkpoint's own method and the settings in args.

    drafts: token ids to start from, one per prompt, for Edit Flows. Raises ValueError for what the model cannot do.
    """
    is_medlm = model.config.nanoedit["method"] == "medlm"
    if is_medlm and drafts:
        raise ValueError("--draft is for Edit Flows checkpoints; ME-DLM writes its draft itself")
    x0 = None if is_medlm else starts(model, tokenizer, prompts, seeds, args, drafts)
    check_room(model, prompts, args.init_num if is_medlm else max(1, *map(len, x0)))
    if is_medlm:
        decoded = medlm.decode(
            model, prompts, medlm.special_tokens(tokenizer),
            init_num=args.init_num, mask_diffusion_step=args.mask_diffusion_step,
            edit_diffusion_step=args.edit_diffusion_step, order=args.order, max_edits=args.max_edits,
            seeds=seeds, on_step=on_step,
        )  # fmt: skip
        return [
            Text(
                d.response,
                {"draft": tokenizer.decode(d.draft), "mask_passes": d.mask_passes, "edit_passes": d.edit_passes},
            )
            for d in decoded
        ]
    sampled = editflow.sample(
        model, prompts, x0=x0, steps=passes(model, args), seeds=seeds,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, on_step=on_step,
    )  # fmt: skip
    names = ("substitutions", "deletions", "insertions")
    return [
        Text(until(s.response, tokenizer.eos_id), dict(zip(names, s.edits)) | {"left_over": round(s.left_over, 2)})
        for s in sampled
    ]


def check_room(model, prompts: list[list[int]], room: int, what: str = "a prompt") -> None:
    """Raises ValueError where a prompt and `room` tokens to start from exceed the model's positions."""
    longest, limit = max(map(len, prompts)), models.max_positions(model.config)
    if longest + room > limit:
        raise ValueError(
            f"{what} of {longest} tokens and {room} to start from exceed the model's {limit} positions; shorten it, or "
            "start from fewer (--init_num, --mask_length)"
        )


def starts(model, tokenizer, prompts, seeds: list[int], args, drafts=None) -> list[list[int]]:
    """x0 for Edit Flows, as the flags ask or else as in training."""
    spec = args.x0_sampler or model.config.nanoedit.get("x0_sampler", "empty")
    if args.mask_length is not None:
        spec = f"masks[length:{args.mask_length}]"
    start = editflow.source("draft" if drafts else spec)
    unigram = model.unigram.cpu() if hasattr(model, "unigram") else None
    if start.kind == "draft" and not drafts:
        raise ValueError("this checkpoint edits drafts: give one with --draft, or another start with --x0_sampler")
    if start.kind == "masks" and tokenizer.mask_id is None:
        raise ValueError("starting from masks needs a mask token; `convert.py --to editflow` adds one")
    if start.kind == "uniform" and unigram is None:
        raise ValueError("starting from uniform needs the token frequencies of a checkpoint trained with that start")
    check_room(model, prompts, start.length)  # before so many tokens are drawn
    return [
        start.draw(drafts and drafts[i], tokenizer.mask_id, unigram, torch.Generator().manual_seed(seed))
        for i, seed in enumerate(seeds)
    ]


def until(ids: list[int], eos_id: int | None) -> list[int]:
    """The tokens before the first end-of-message."""
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def passes(model, args) -> int:
    """The most steps or passes that one batch takes."""
    if model.config.nanoedit["method"] == "medlm":
        return min(args.mask_diffusion_step, args.init_num) + args.edit_diffusion_step
    return args.steps or max(1, round(1 / (args.tau or 0.01)))


def prompt_ids(tokenizer, messages: list[dict], args) -> list[int]:
    """A conversation as the model was trained to see it; without messages the beginning-of-text token alone."""
    return data.encode_prompt(messages, tokenizer, chat_template=args.chat_template)


def draft_ids(tokenizer, draft: str) -> list[int]:
    """A draft as the model was trained to see it: with end-of-message behind it."""
    return [*tokenizer.encode(draft), *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]


def main(argv=None):
    args = parse_args(argv)
    check_writable(args.output if args.output != "-" else None, args.make_gif, args.make_html)
    conversations = [[{"role": "user", "content": p}] for p in args.prompt or []] or [[]]
    if args.prompt_file:
        conversations = data.read_prompts(args.prompt_file)
        if not conversations:
            raise ValueError(f"{args.prompt_file}: holds no prompt")
    directory = models.local_path(args.model_name_or_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(directory, device, args.bf16)
    if args.interactive:
        return interact(model, tokenizer, args)

    jobs = [(c, prompt_ids(tokenizer, c, args), args.seed + k) for c in conversations for k in range(args.num_samples)]
    draft = draft_ids(tokenizer, args.draft) if args.draft is not None else None
    is_medlm = model.config.nanoedit["method"] == "medlm"
    for messages, ids, _ in jobs:  # now, and not when its batch comes up
        name = f"the prompt {messages[-1]['content'][:40]!r}" if messages else "a prompt"
        check_room(model, [ids], args.init_num if is_medlm else 1, name)
    trace = None
    if args.show or args.make_gif or args.make_html:
        prompt = jobs[0][1]
        trace = Trace(
            len(prompt), tokenizer.pieces, tokenizer.mask_id, tokenizer.pad_id, live=sys.stdout if args.show else None
        )
    out = sys.stdout if args.output == "-" else None  # an older file is kept until there is something to write
    total = passes(model, args) * -(-len(jobs) // args.batch_size)
    with tqdm(total=total, unit="pass", file=sys.stderr, disable=bool(trace and trace.screen), leave=False) as bar:
        for i in range(0, len(jobs), args.batch_size):
            batch = jobs[i : i + args.batch_size]

            def on_step(*step, is_first=i == 0):
                bar.update()
                if trace and is_first:
                    trace.on_step(*step)

            drafts = [draft] * len(batch) if draft is not None else None
            texts = generate(
                model, tokenizer, [ids for _, ids, _ in batch], [seed for _, _, seed in batch], args, drafts, on_step
            )
            if trace and i == 0:
                trace.finish(final_state(model, tokenizer, jobs[0][1], texts[0]))
                if args.show and not trace.screen:  # the frames have not been seen
                    show(trace)
            out = out or open(args.output, "w", encoding="utf-8")  # noqa: SIM115
            for (messages, _, seed), text in zip(batch, texts):
                write_result(out, messages, tokenizer.decode(text.ids), seed, text.details, len(jobs))
    if out is not sys.stdout:
        out.close()
        print(f"{len(jobs)} texts written to {args.output}", file=sys.stderr)
    if trace:
        if args.make_gif:
            write_gif(trace, args.make_gif)
        if args.make_html:
            write_html(trace, args.make_html)
        for file in filter(None, (args.make_gif, args.make_html)):
            print(f"decode drawn in {file}", file=sys.stderr)


def final_state(model, tokenizer, prompt: list[int], text: Text) -> list[int] | None:
    """What the trace ends with: for ME-DLM the text it settled on, which a cycle can make an earlier one."""
    return [*prompt, *text.ids, tokenizer.eos_id] if model.config.nanoedit["method"] == "medlm" else None


def check_writable(*files) -> None:
    """Raises OSError now rather than after the work is done."""
    for file in filter(None, files):
        try:
            is_new = not Path(file).exists()
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8"):
                pass
            if is_new:
                Path(file).unlink()
        except OSError as e:
            raise OSError(f"{file}: cannot be written ({e.strerror or e}); choose another path") from None


def write_result(out, messages, text: str, seed: int, details: dict, count: int) -> None:
    """One JSON line into a file; on the terminal the text itself, with a heading where there are several."""
    prompt = messages[-1]["content"] if messages else ""
    if out is not sys.stdout:
        out.write(json.dumps({"prompt": prompt, "response": text, "seed": seed, **details}, ensure_ascii=False) + "\n")
        out.flush()
        return
    if count > 1:
        print(f"--- {prompt!r}, seed {seed}" if prompt else f"--- seed {seed}")
    print(text, flush=True)
    if "mask_passes" in details:
        passes = f"{details['mask_passes']} mask passes, {details['edit_passes']} edit passes"
        print(f"note: {passes}; draft: {details['draft']}", file=sys.stderr)
    if details.get("left_over", 0) > max(2, 0.05 * details.get("insertions", 0)):
        print(
            f"note: the model still expected {details['left_over']:.0f} insertions at the end; "
            "more steps (a smaller --tau) give longer texts",
            file=sys.stderr,
        )


def interact(model, tokenizer, args) -> None:
    """A conversation on the terminal. Every answer is written before one's eyes; /clear forgets, Ctrl-D ends."""
    templated = args.chat_template and tokenizer.chat_template is not None
    print(
        "Chat." if templated else "Raw continuation.",
        "An empty line generates from scratch; /clear forgets the conversation; Ctrl-D ends.",
    )
    history, turn = [], 0
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return
        if line == "/clear":
            history = []
            continue
        messages = [*history, {"role": "user", "content": line}] if line else []
        try:
            ids = prompt_ids(tokenizer, messages, args)
            trace = Trace(len(ids), tokenizer.pieces, tokenizer.mask_id, tokenizer.pad_id, live=sys.stdout)
            text = generate(
                model, tokenizer, [ids], [args.seed + turn], args, on_step=trace.on_step if trace.screen else None
            )[0]
        except ValueError as e:  # a prompt that is too long, say: the conversation goes on
            print(f"error: {e}", file=sys.stderr)
            continue
        if trace.screen:
            trace.finish(final_state(model, tokenizer, ids, text))
        answer = tokenizer.decode(text.ids)
        print(answer)
        turn += 1
        if templated and line:
            history = [*messages, {"role": "assistant", "content": answer}]


if __name__ == "__main__":
    cli.run(main)
