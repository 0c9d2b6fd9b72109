"""Generate, chat, continue or repair a draft with a trained checkpoint of any method, and watch the edits.

    python sample.py --model_name_or_path OUT --prompt "..." --make_gif
    python sample.py --model_name_or_path OUT --interactive
    python sample.py --model_name_or_path OUT --prompt_file prompts.txt --num_samples 4 --output samples.jsonl

Edit Flows: --tau is the time step of the chain (1 / --steps). ME-DLM: --mask_diffusion_step passes fill --init_num
masks, then up to --edit_diffusion_step passes edit the draft.
"""

import json
import os
import re
import sys
from contextlib import suppress
from itertools import accumulate, combinations
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in train.py, and before torch

import torch
from tqdm import tqdm

import data
import parallel
from plumbing import checkpoints, cli, methods
from plumbing.picture import Trace, show, write_gif, write_html

WRITERS = {"--make_gif": write_gif, "--make_html": write_html, "--save_trace": Trace.save}  # of the first text's decode


def parse_args(argv=None):
    f = cli.Flags("Generate with a checkpoint of any method.")
    f.choice("--model_name_or_path", required=True,
             help="checkpoint directory, the output directory of train.py, or a hub id")
    with f.exclusive():
        f.choice("--prompt", type=cli.text, nargs="+", help="one or more prompts; without any: text from scratch")
        f.choice("--prompt_file", help="many prompts in one batch: one per line (.txt) or record (.jsonl, .json, ...)")
        f.flag("--interactive", help="chat on the terminal; an empty line generates from scratch")
    f.choice("--text_field", help="field of a record of --prompt_file that holds a prompt alone")
    data.add_flags(f)
    f.choice("--suffix", type=cli.text, help="what stands behind the text: a middle of unknown length is written")
    f.choice("--draft", type=cli.text, help="a text to edit, instead of starting from masks or nothing")
    f.choice("--freeze", type=cli.text, nargs="+", metavar="PART", help="parts of --draft that must stay as they are")
    f.integer("--num_samples", low=1, default=1, help="texts per prompt, with seeds seed, seed + 1, ...")
    f.integer("--batch_size", low=1, default=32, help="texts generated at once")
    f.integer("--seed", low=0, default=0, help="of the first text of each prompt")
    f.group("output")
    f.choice("--output", default="-", help="a .jsonl file for the results (- prints them)")
    f.flag("--bf16", help="compute in bf16")
    f.flag("--show", help="watch the first text being written on the terminal")
    f.choice("--make_gif", nargs="?", const="decode_trace.gif", metavar="FILE",
             help="draw the first text being written")
    f.choice("--make_html", nargs="?", const="decode_trace.html", metavar="FILE",
             help="the same as a page to step through")
    f.choice("--save_trace", nargs="?", const="decode_trace.json", metavar="FILE",
             help="record it; python -m plumbing.picture show|gif|html FILE")
    methods.sampling_flags(f)
    args = f.parse_args(argv)
    args.files = {} if args.output == "-" else {"--output": args.output}
    args.files |= {flag: file for flag in WRITERS if (file := getattr(args, flag[2:]))}
    clashes = {"--draft": args.draft is not None, "--suffix": args.suffix is not None}
    clashes |= {"--num_samples": args.num_samples > 1} | args.files
    for name in [name for name, given in clashes.items() if args.interactive and given]:
        f.error(f"{name} does not go with --interactive")
    start = args.x0_sampler or "draft"
    if args.draft is not None and (args.mask_length is not None or start != "draft"):
        f.error("--draft is where to start; leave out --mask_length and --x0_sampler")
    if args.draft is None and (args.x0_sampler == "draft" or args.freeze):
        f.error(f"{'--freeze' if args.freeze else '--x0_sampler draft'} is about a text: give it with --draft")
    files = {"--prompt_file": args.prompt_file} | args.files
    given = [(flag, os.path.realpath(file)) for flag, file in files.items() if file]
    for (flag, file), (other, same) in combinations(given, 2):
        if file == same:
            f.error(f"{flag} and {other} name the same file")
    return args


class Sampler:
    """A checkpoint, and the settings with which it is asked."""

    def __init__(self, directory: Path, args, device: str):
        bf16 = parallel.bf16_if_possible(args.bf16, device)
        self.model, self.tokenizer = checkpoints.open_for_inference(directory, device, bf16)
        self.method, self.args = methods.of(self.model), args
        self.tokenizer.configure(args.chat_template, args.raw_control_tokens)
        self.settings = methods.sampling_settings(self.method, args, self.model, self.tokenizer)

    def prompt(self, messages: list[dict]) -> list[int]:
        """A conversation as the model was trained to see it; without messages the beginning-of-text token alone."""
        return data.encode_prompts([messages], self.tokenizer)[0]

    def generate(self, prompts, seeds, on_step=None, **given):
        """given: drafts, keep, suffixes."""
        methods.check_lengths(self.method, prompts, self.settings, given.get("drafts"), given.get("suffixes"))
        return self.method.generate(self.model, prompts, self.settings, seeds, **given, on_step=on_step)

    def trace(self, prompt: list[int], live=None) -> Trace:
        t = self.tokenizer
        return Trace(len(prompt), t.pieces, t.mask_id, t.pad_id, self.method.TITLE, live)


def draft_ids(tokenizer, draft: str) -> list[int]:
    """A draft as the model was trained to see it: with end-of-message behind it."""
    return [*tokenizer.encode(draft), *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]


def frozen_tokens(tokenizer, draft: list[int], parts: list[str]) -> list[bool]:
    """Which tokens of a draft hold some of these parts of its text. Raises ValueError for one that does not occur, and
    where nothing would be left to edit."""
    pieces = tokenizer.pieces(draft)
    ends = list(accumulate(map(len, pieces)))
    text, frozen = "".join(pieces), [False] * len(draft)
    for part in parts:
        found = [(m.start(), m.end()) for m in re.finditer(re.escape(part), text)]
        if not found:
            raise ValueError(f"--freeze {part!r} does not occur in --draft")
        for start, end in found:
            frozen = [f or (e - len(p) < end and e > start) for f, p, e in zip(frozen, pieces, ends)]
    if all(f or token == tokenizer.eos_id for f, token in zip(frozen, draft)):
        raise ValueError("--freeze covers all of --draft: nothing is left to edit")
    return frozen


def main(argv=None):
    args = parse_args(argv)
    for flag, file in args.files.items():  # now rather than after the work is done
        checkpoints.check_writable(Path(file), f"{flag} {file}")
    named = data.named_fields(args)
    conversations = [[{"role": "user", "content": p}] for p in args.prompt or []] or [[]]
    if args.prompt_file:
        conversations = data.read_prompts(args.prompt_file, named)
        if not conversations:
            raise ValueError(f"{args.prompt_file}: holds no prompt")
    directory = checkpoints.local_path(args.model_name_or_path)
    sampler = Sampler(directory, args, "cuda" if torch.cuda.is_available() else "cpu")
    if args.interactive:
        return interact(sampler)

    asked = list(zip(conversations, data.encode_prompts(conversations, sampler.tokenizer)))
    jobs = [(c, ids, args.seed + k) for c, ids in asked for k in range(args.num_samples)]
    given = {"drafts": args.draft, "suffixes": args.suffix}
    given = {name: draft_ids(sampler.tokenizer, text) for name, text in given.items() if text is not None}
    if args.freeze:
        given["keep"] = frozen_tokens(sampler.tokenizer, given["drafts"], args.freeze)
    names = [f"the prompt {c[-1]['content'][:40]!r}" if c else "a prompt" for c, _, _ in jobs]
    starts = [[given[name]] * len(jobs) if name in given else None for name in ("drafts", "suffixes")]
    prompts = [ids for _, ids, _ in jobs]
    # now, and not when its batch comes up
    methods.check_lengths(sampler.method, prompts, sampler.settings, *starts, names)
    trace, wanted = None, {file: WRITERS[flag] for flag, file in args.files.items() if flag in WRITERS}
    if args.show or wanted:
        trace = sampler.trace(jobs[0][1], live=sys.stdout if args.show else None)
    out = sys.stdout if args.output == "-" else None  # an older file is kept until there is something to write
    total = sampler.method.passes(sampler.settings) * -(-len(jobs) // args.batch_size)
    with tqdm(total=total, unit="pass", file=sys.stderr, disable=bool(trace and trace.screen), leave=False) as bar:
        for i in range(0, len(jobs), args.batch_size):
            batch = jobs[i : i + args.batch_size]

            def on_step(*step, is_first=i == 0):
                bar.update(step[-1] != "back")  # the corrector's way back takes no forward pass
                if trace and is_first:
                    trace.on_step(*step)

            prompts, seeds = [ids for _, ids, _ in batch], [seed for _, _, seed in batch]
            repeated = {name: [ids] * len(batch) for name, ids in given.items()}
            texts = sampler.generate(prompts, seeds, on_step, **repeated)
            if trace and i == 0:
                trace.finish([*jobs[0][1], *texts[0].tokens, *given.get("suffixes", [])])
                if args.show and not trace.screen:  # on a terminal the frames have been seen
                    show(trace)
            out = out or open(args.output, "w", encoding="utf-8")  # noqa: SIM115
            for (messages, _, seed), text in zip(batch, texts):
                write_result(out, messages, text, seed, sampler.tokenizer, len(jobs))
    if out is not sys.stdout:
        out.close()
        print(f"{len(jobs)} texts written to {args.output}", file=sys.stderr)
    for file, write in wanted.items():
        write(trace, file)
        print(f"decode written to {file}", file=sys.stderr)


def write_result(out, messages, generated, seed: int, tokenizer, count: int) -> None:
    """One JSON line into a file; on the terminal the text itself, with a heading where there are several."""
    prompt, text = messages[-1]["content"] if messages else "", tokenizer.decode(generated.response)
    draft = {} if generated.draft is None else {"draft": tokenizer.decode(generated.draft)}
    if out is not sys.stdout:
        details = {name: round(value, 2) for name, value in generated.details.items()}
        record = {"prompt": prompt, "response": text, "seed": seed, **draft, **generated.passes, **details}
        out.write(json.dumps(record, ensure_ascii=False) + "\n")
        out.flush()
        return
    if count > 1:
        print(f"--- {prompt!r}, seed {seed}" if prompt else f"--- seed {seed}")
    print(text, flush=True)
    passes = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in generated.passes.items())
    for note in (draft and f"{passes}; draft: {draft['draft']}", generated.note):
        if note:
            print(f"note: {note}", file=sys.stderr)


HELP = """An empty line generates from scratch; /reset forgets the conversation; /help says this again.
Ctrl-C stops an answer, Ctrl-D ends the conversation."""


def interact(sampler: Sampler) -> None:
    """A conversation on the terminal, in which lines can be edited and called back. Every answer is written before
    one's eyes; one that is stopped is not part of the conversation."""
    with suppress(ImportError):  # where there is none, lines are read as they are
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # many lines that are pasted are one message
    templated = sampler.tokenizer.writes_chats
    print("Chat." if templated else "Raw continuation.", HELP)
    history, turn = [], 0
    while True:
        try:
            line = input("\n> ").strip()
            if line in ("/help", "/reset", "/clear"):
                history = history if line == "/help" else []
                print(HELP if line == "/help" else "The conversation begins anew.")
                continue
            messages = [*history, {"role": "user", "content": line}] if line else []
            ids = sampler.prompt(messages)
            trace = sampler.trace(ids, live=sys.stdout)
            text = sampler.generate([ids], [sampler.args.seed + turn], on_step=trace.on_step)[0]
            trace.finish([*ids, *text.tokens])
            answer = sampler.tokenizer.decode(text.response)
            print(answer)
            turn += 1
            if templated and line:
                history = [*messages, {"role": "assistant", "content": answer}]
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\n(stopped; the conversation goes on, Ctrl-D ends it)")
        except ValueError as e:  # a prompt that is too long, say
            print(f"error: {e}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
