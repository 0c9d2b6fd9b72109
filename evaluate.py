"""Evaluate a checkpoint on GSM8K, MATH-500, HumanEval, MBPP and the toy task.

    python evaluate.py --path CKPT --task gsm8k math500 humaneval mbpp --mask_diffusion_step 48 --edit_diffusion_step 16
    torchrun --nproc_per_node 8 evaluate.py --path CKPT --task gsm8k --data_dir data

Everything a number depends on stands in one table, TASKS: the data, the words of the prompt, the rule that finds the
answer in a response, and how it is judged. Zero-shot throughout. The words are those of the published ME-DLM
evaluation, so that its checkpoints are asked what they were measured with; a model trained on bare questions wants
`--system_prompt ""`.

An ME-DLM checkpoint answers twice, with its draft and with the edited text, and both are judged. An Edit Flows
checkpoint has no draft.

    samples      questions of a task, in the order of its file; rank r of W takes every W-th, from the r-th on
    generate     messages in, answers out: the only function here that sees a model
    rows         one JSON object per finished sample, appended to OUT/<task>.rank<r>.jsonl as they come
    summary      OUT/<task>.jsonl, OUT/summary.json and a table, once all ranks are done

A run that is killed goes on where it stopped when it is started again, with as many ranks as you like: a row carries a
hash of all that its answer depends on (checkpoint, settings, prompt), and samples whose row is there are skipped.

Generated programs run only with --allow_code_execution; what protects you then, and what does not, is at the top of
execution.py. Without it the programs are written and not judged. They are always written in evalplus's format; where
evalplus is installed, and a whole task has been answered, its much larger test sets judge them as well.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import medlm
import models
import sample as sampler
import toy
from plumbing import cli, execution

# --------------------------------------------------------------------------- finding the answer, and judging it
#
# A check takes the record of a sample and the text of a response, and says whether it is right.

NUMBER = re.compile(r"(?:(?<![\w)}])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)
FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
DEMONSTRATION = re.compile(r"^(?:if __name__|assert\b|print\(|check\()", re.MULTILINE)


def boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...}; braces nest, and \{ is no brace."""
    for opening in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for mark in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening.end()):
            depth += {"{": 1, "}": -1}.get(mark[0], 0)
            if depth == 0:
                return text[opening.end() : mark.start()].strip()
    return None


def final_number(text: str) -> Decimal | None:
    r"""The first number behind the last ####; without ####, the last one in the last \boxed{}; else the last one."""
    marked, in_box = "####" in text, boxed(text)
    where = text.rpartition("####")[2] if marked else text if in_box is None else in_box
    numbers = NUMBER.findall(where.replace("{,}", ","))
    return Decimal(re.sub("[$,]", "", numbers[0 if marked else -1])) if numbers else None


def code(text: str) -> str:
    """The first fenced block (an unclosed one reaches to the end), or the whole text; in either case without what only
    demonstrates it: everything from the first unindented assert, print, check or `if __name__` on."""
    fenced = FENCE.search(text)
    program = fenced[1] if fenced else text
    return DEMONSTRATION.split(program, maxsplit=1)[0].rstrip() + "\n"


def gsm8k_right(record: dict, response: str) -> bool:
    answer = final_number(response)
    return answer is not None and answer == final_number(record["answer"])


def math_right(record: dict, response: str) -> bool:
    """Equal as text, or equal mathematics according to math-verify."""
    from math_verify import parse, verify

    answer = boxed(response)
    if answer is None:
        return False
    same = "".join(answer.split()) == "".join(record["answer"].split())
    return same or bool(verify(parse(f"${record['answer']}$"), parse(f"${answer}$")))


def humaneval_program(record: dict, response: str) -> str:
    """Prompt and code. Code that is the whole function again replaces the prompt's, whose body is a docstring."""
    return record["prompt"].rstrip() + "\n" + code(response)


def humaneval_right(record: dict, response: str) -> bool:
    tests = f"{record['test']}\ncheck({record['entry_point']})\n"
    return execution.run(humaneval_program(record, response), tests).passed


def mbpp_program(record: dict, response: str) -> str:
    return code(response)


def mbpp_tests(record: dict) -> list[str]:
    """The asserts that the record carries: its test_list, or else those in the prompt's docstring (usually one)."""
    in_prompt = [line for line in record["prompt"].splitlines() if line.startswith("assert")]
    return record.get("test_list") or in_prompt


def mbpp_right(record: dict, response: str) -> bool:
    tests = [*(record.get("test_imports") or []), *mbpp_tests(record)]
    return execution.run(mbpp_program(record, response), "\n".join(tests)).passed


def mbpp_question(record: dict) -> str:
    description = [line for line in record["prompt"].replace('"""', "").strip().splitlines() if line[:6] != "assert"]
    example = "\n".join(mbpp_tests(record)[:1])
    return "\n".join(description) + f"\nYour code should satisfy the following assertion:\n```python\n{example}\n```"


# ------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Task:
    fields: tuple[str, ...]  # text fields that a record must have
    question: Callable[[dict], str]  # record -> what the user asks
    checks: dict[str, Callable[[dict, str], bool]]  # name of a verdict -> (record, response) -> bool
    judge: str  # the checks in words, for the summary
    system: str = ""
    hub: str = ""  # dataset on the hub, with a folder where it has several
    file: str = ""  # its name under --data_dir
    id_field: str = ""  # without it, samples are known by their number
    package: str = ""  # that the checks need
    program: Callable[[dict, str], str] | None = None  # (record, response) -> what a code task runs
    init_num: int = 512


MATH = "Please reason step by step, and put your final answer within \\boxed{}."
CODE = "You are an intelligent programming assistant to produce Python algorithmic solutions."

TASKS = {
    "gsm8k": Task(
        hub="openai/gsm8k/main",
        file="gsm8k_test.jsonl",
        fields=("question", "answer"),
        system=MATH,
        question=lambda record: record["question"],
        checks={"right": gsm8k_right},
        judge="the number after ####, else in the last \\boxed{}, else the last one, equals the reference's",
    ),
    "math500": Task(
        hub="HuggingFaceH4/MATH-500",
        file="math500.jsonl",
        fields=("problem", "answer"),
        id_field="unique_id",
        system=MATH,
        question=lambda record: record["problem"],
        checks={"right": math_right},
        judge="the last \\boxed{} equals the reference, as text or by math-verify",
        package="math-verify",
    ),
    "humaneval": Task(
        hub="openai/openai_humaneval",
        file="humaneval.jsonl",
        fields=("prompt", "test", "entry_point"),
        id_field="task_id",
        system=CODE,
        question=lambda record: f"```python\n{record['prompt'].strip()}\n```",
        checks={"right": humaneval_right},
        judge="HumanEval's own tests pass, run by execution.py",
        program=humaneval_program,
    ),
    "mbpp": Task(
        hub="evalplus/mbppplus",
        file="mbpp.jsonl",
        fields=("prompt",),
        id_field="task_id",
        system=CODE,
        question=mbpp_question,
        checks={"right": mbpp_right},
        judge="the asserts in the record pass, run by execution.py (where they are in the prompt, one: far fewer than "
        "evalplus has)",
        program=mbpp_program,
    ),
    "toy": Task(
        fields=(),
        question=lambda record: record["messages"][0]["content"],
        checks={
            "right": lambda record, response: toy.check(record["messages"][0]["content"], response)[0],
            "valid": lambda record, response: toy.check(record["messages"][0]["content"], response)[1],
        },
        judge="right: the number after ####; valid: the response is one of the 18 that answer the prompt",
        init_num=24,
    ),
}

TASKS["toy-repair"] = replace(TASKS["toy"], judge=TASKS["toy"].judge + "; the draft is a corrupted response")

# -------------------------------------------------------------------------------------------------------- samples


@dataclass
class Sample:
    id: str
    record: dict
    messages: list[dict]  # the dialogue to answer
    seed: int  # of everything random in its answer
    key: str = ""  # hash of all that the answer depends on


def load_samples(name: str, source: str | None, limit: int | None, seed: int, system: str | None) -> list[Sample]:
    """The first `limit` samples of a task. source: a file, a folder or a hub dataset instead of the table's. system:
    instead of the table's, "" for none. Raises ValueError / OSError naming the file and line.
    """
    task = TASKS[name]
    if name in toy.SOURCES:
        records = toy.records("test", limit or toy.HELD_OUT, seed, repair=name == "toy-repair")
    else:
        files = data.data_files(source or task.hub)
        held_out = [file for file in files if "test" in file.name] or files
        records = [_checked(task, *line) for file in held_out for line in data.read_file(file)][:limit]
        if not records:
            raise ValueError(f"{held_out[0]}: no record in it")
    system = task.system if system is None else system
    samples = []
    for i, record in enumerate(records):
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": task.question(record)})
        samples.append(Sample(_name(name, record.get(task.id_field, i)), record, messages, seed * 1_000_003 + i))
    return samples


def _checked(task: Task, place: str, record) -> dict:
    if isinstance(record, ValueError):
        raise ValueError(f"{place}: {record}")
    for name in task.fields:
        if not isinstance(record, dict) or not is_text(record.get(name)):
            raise ValueError(f"{place}: needs a field {name!r} that holds text; is this the right file for the task?")
    if record.get("draft") is not None and not is_text(record["draft"]):
        raise ValueError(f"{place}: the field 'draft' must hold text")
    for name in ("test_list", "test_imports"):  # of mbpp, both optional
        lines = record.get(name) or []
        if task.program and not (isinstance(lines, list) and all(map(is_text, lines))):
            raise ValueError(f"{place}: the field {name!r} must hold a list of texts")
    return record


def is_text(value) -> bool:
    """Whether a value is a string that can be written as UTF-8: JSON can spell half a character."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _name(task: str, id) -> str:
    """Ids that are text stay what they are; numbers become what evalplus calls them ("Mbpp/2")."""
    return id if isinstance(id, str) else f"{task.capitalize()}/{id}"


def set_keys(samples: list[Sample], settings: dict) -> None:
    for i, sample in enumerate(samples):
        everything = json.dumps([i, sample.id, sample.messages, sample.seed, settings], sort_keys=True)
        sample.key = hashlib.sha256(everything.encode()).hexdigest()[:16]


def fingerprint(checkpoint: Path) -> list:
    """Name, size and time of its files: training on in the same folder makes it another checkpoint."""
    kinds, names = (".safetensors", ".jinja", ".model"), ("config.json", "tokenizer.json", "tokenizer_config.json")
    files = [file for file in sorted(checkpoint.iterdir()) if file.suffix in kinds or file.name in names]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


# ----------------------------------------------------------------------------------------------------- generation


@dataclass
class Answer:
    response: str
    tokens: int  # of the response
    draft: str | None = None  # None where the method has none
    mask_passes: int = 0
    edit_passes: int = 0


def generator(model, tokenizer, args) -> Callable[..., list[Answer]]:
    """sampler.generate, from samples to answers. Edit Flows makes one pass per step; it has a draft where the record
    brings one, from which it then starts."""
    steps = sampler.passes(model, args) if model.config.nanoedit["method"] == "editflow" else 0

    def generate(samples: list[Sample], init_num: int) -> list[Answer]:
        prompts = [data.encode_prompt(s.messages, tokenizer) for s in samples]
        args.init_num = init_num
        given = [s.record.get("draft") for s in samples]
        drafts = None if None in given else [sampler.draft_ids(tokenizer, draft) for draft in given]
        texts = sampler.generate(model, tokenizer, prompts, [s.seed for s in samples], args, drafts)
        return [
            Answer(
                tokenizer.decode(text.ids), len(text.ids), text.details.get("draft", draft),
                text.details.get("mask_passes", 0), text.details.get("edit_passes", steps),
            )
            for text, draft in zip(texts, given)
        ]  # fmt: skip

    return generate


# ----------------------------------------------------------------------------------------------------------- rows


def read_rows(path: Path) -> dict[str, dict]:
    """Rows by key; of two with the same key the later one. A last line without its newline was cut off by a kill and
    does not count. Raises ValueError for any other line that is not a row."""
    rows = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row["key"], str):
                raise TypeError
            rows[row["key"]] = row
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{path}:{number}: not a row of evaluate.py; move the file away to start anew") from None
    return rows


ROW = {  # fields of a row, beside its verdicts, that are read again
    "prompt": str, "response": str, "draft": str | None, "tokens": int, "mask_passes": int, "edit_passes": int,
    "seconds": float | int,
}  # fmt: skip


def all_rows(name: str, out: Path) -> dict[str, dict]:
    """The rows of a task from every rank. Where two ranks have one (their number has changed), a judged one wins.
    Raises ValueError naming the file, and the line or the field."""
    rows, verdict = {}, next(iter(TASKS[name].checks))
    fields = ROW | {part + check: bool | None for check in TASKS[name].checks for part in ("draft_", "")}
    for path in sorted(out.glob(f"{name}.rank*.jsonl")):
        for key, row in read_rows(path).items():
            for field, kind in fields.items():
                if field not in row or not isinstance(row[field], kind):
                    raise ValueError(
                        f"{path}: the row of key {key!r} lacks a usable {field!r}; move the file away to start anew"
                    )
            if key not in rows or rows[key][verdict] is None:
                rows[key] = row
    return rows


def judged(row: dict, task: Task, record: dict, may_run: bool) -> dict:
    """The row with its verdicts; None where there is no draft, or a program may not run."""

    def verdicts(text: str | None) -> list[bool | None]:
        judgeable = text is not None and (may_run or not task.program)
        return [bool(check(record, text)) if judgeable else None for check in task.checks.values()]

    edited = verdicts(row["response"])
    draft = edited if row["draft"] == row["response"] else verdicts(row["draft"])
    return row | dict(zip([f"draft_{check}" for check in task.checks], draft)) | dict(zip(task.checks, edited))


def answer_samples(
    name: str,
    samples: list[Sample],
    generate: Callable[[list[Sample]], list[Answer]],
    out: Path,
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 8,
    may_run: bool = False,
) -> None:
    """This rank's share of a task: answers what has no row yet, judges, appends a row per sample. Rows that have no
    verdict, because programs could not run before, are judged when they may."""
    task, mine = TASKS[name], samples[rank::world]
    rows, verdict = all_rows(name, out), next(iter(task.checks))
    unjudged = [s for s in mine if s.key in rows and rows[s.key][verdict] is None and may_run]
    pending = [s for s in mine if s.key not in rows]
    done = len(mine) - len(pending) - len(unjudged)
    bar = tqdm(total=len(mine), initial=done, desc=name, unit="sample", disable=rank > 0)
    with bar, open(out / f"{name}.rank{rank}.jsonl", "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # what a kill cut off; appending goes on behind it

        def finish(sample: Sample, row: dict) -> None:
            file.write(json.dumps(judged(row, task, sample.record, may_run)).encode() + b"\n")
            file.flush()
            bar.update()

        for sample in unjudged:
            finish(sample, rows[sample.key])
        for start in range(0, len(pending), batch_size):
            batch, started = pending[start : start + batch_size], time.perf_counter()
            answers = generate(batch)
            seconds = (time.perf_counter() - started) / len(batch)
            for sample, answer in zip(batch, answers, strict=True):
                prompt = sample.messages[-1]["content"]
                row = {"key": sample.key, "task": name, "id": sample.id, "prompt": prompt}
                finish(sample, row | vars(answer) | {"seconds": seconds})


# -------------------------------------------------------------------------------------------------------- summary


def merge(name: str, samples: list[Sample], out: Path) -> list[dict]:
    """The rows of these samples from all ranks, in order, as written to OUT/<task>.jsonl; programs also go to
    OUT/evalplus_<task>.jsonl and OUT/evalplus_<task>_draft.jsonl."""
    found = all_rows(name, out)
    rows = [found[sample.key] for sample in samples]
    write_lines(out / f"{name}.jsonl", rows)
    if program := TASKS[name].program:
        for who, part in (("response", ""), ("draft", "_draft")):
            solved = [(sample, row[who]) for sample, row in zip(samples, rows) if row[who] is not None]
            lines = [{"task_id": sample.id, "solution": program(sample.record, text)} for sample, text in solved]
            write_lines(out / f"evalplus_{name}{part}.jsonl", lines)
    return rows


def write_lines(path: Path, rows: list[dict]) -> None:
    """Whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    new.replace(path)


def summarise(name: str, rows: list[dict]) -> dict:
    """Accuracies with standard errors sqrt(p (1 - p) / n), None where nothing was judged; mean passes; tokens of the
    response per second of generation, in one process."""
    summary = {"n": len(rows)}
    for verdict in (part + check for check in TASKS[name].checks for part in ("draft_", "")):
        values = [row[verdict] for row in rows if row[verdict] is not None]
        p = sum(values) / len(values) if values else None
        summary[verdict] = p
        summary[verdict + "_standard_error"] = math.sqrt(p * (1 - p) / len(values)) if values else None
    for passes in ("mask_passes", "edit_passes"):
        summary[passes] = sum(row[passes] for row in rows) / len(rows)
    seconds = sum(row["seconds"] for row in rows)
    summary |= {"tokens": sum(row["tokens"] for row in rows), "seconds": seconds}
    summary["tokens_per_second"] = summary["tokens"] / seconds if seconds else None
    return summary


def table(summaries: dict[str, dict]) -> str:
    """One line per task and verdict: draft and edited accuracy in percent with standard errors, passes, speed."""
    lines = [("task", "verdict", "n", "draft", "edited", "mask passes", "edit passes", "tokens/s")]
    for name, summary in summaries.items():
        for check in TASKS[name].checks:
            draft, edited = (_percent(summary, part + check) for part in ("draft_", ""))
            passes = [f"{summary[key]:.1f}" for key in ("mask_passes", "edit_passes")]
            speed = summary["tokens_per_second"]
            cells = (name, check, str(summary["n"]), draft, edited, *passes, "-" if speed is None else f"{speed:.1f}")
            lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    pads = [str.ljust] * 2 + [str.rjust] * (len(widths) - 2)
    return "\n".join("  ".join(pad(*cell) for pad, *cell in zip(pads, line, widths)) for line in lines)


def print_answers(name: str, rows: list[dict]) -> None:
    """Prompt, response, verdict."""
    for row in rows:
        words = {True: "yes", False: "NO", None: "not judged"}
        verdicts = ", ".join(f"{check}: {words[row[check]]}" for check in TASKS[name].checks)
        print(f"{row['prompt']}  ->  {row['response']}    [{verdicts}]")
    if rows:
        print()


def _percent(summary: dict, verdict: str) -> str:
    if summary[verdict] is None:
        return "-"
    return f"{100 * summary[verdict]:.1f} ± {100 * summary[verdict + '_standard_error']:.1f}"


def evalplus(name: str, samples: Path) -> dict | str:
    """{"base", "plus"}: pass@1 on the original and the extended tests, by evalplus, which fetches its tests itself
    and has its own sandbox (pip install evalplus). Where it fails, its last words."""
    samples.with_name(samples.stem + "_eval_results.json").unlink(missing_ok=True)  # or it would report the last run
    command = [sys.executable, "-m", "evalplus.evaluate", "--dataset", name, "--samples", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    scores = re.findall(r"pass@1:\s*([0-9.]+)", done.stdout)
    if done.returncode == 0 and len(scores) == 2:
        return {"base": float(scores[0]), "plus": float(scores[1])}
    return "failed: " + (done.stderr.strip().splitlines() or ["without a message"])[-1]


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------------- the script


# The flags that an answer depends on, beside --init_num, which has a default per task.
DECODING = {
    "medlm": ("mask_diffusion_step", "edit_diffusion_step", "order", "max_edits", "bf16"),
    "editflow": ("tau", "steps", "x0_sampler", "mask_length", "temperature", "top_k", "top_p", "bf16"),
}


def parse_args(argv=None):
    f = cli.Flags("Evaluate an ME-DLM or Edit Flows checkpoint; answers, verdicts and a summary go to --output_dir.")
    n, at_least_1 = cli.number, cli.number(int, low=1)
    a = f.add_argument
    a("--path", "-p", required=True, help="checkpoint directory or hub id")
    a("--task", "-t", type=task_name, nargs="+", default=["gsm8k", "humaneval", "mbpp", "math500"],
      help=f"of {', '.join(TASKS)}")
    a("--data", type=task_data, nargs="+", default=[], metavar="TASK=PATH",
      help="file, folder or hub dataset of a task")
    a("--data_dir", help="folder with " + ", ".join(t.file for t in TASKS.values() if t.file) + "; default: the hub")
    a("--output_dir", default="evaluation", help="rows, merged rows, summary.json; a run found here is continued")
    a("--limit", type=at_least_1, help="only the first samples of each task")
    a("--system_prompt", type=cli.text, help='instead of that of the task; "" for none')
    a("--seed", type=n(int, low=0), default=42, help="of everything random")
    a("--batch_size", type=at_least_1, default=8, help="samples decoded together; changes the speed, not the answers")
    a("--show_answers", type=n(int, low=0), default=0, help="print the first answers of each task with their verdicts")
    f.flag("--bf16", default=torch.cuda.is_available(), help="weights in bfloat16")
    f.flag("--allow_code_execution", help="run the generated programs, which execution.py confines")
    sampler.decoding_flags(f, temperature=0.0, init_num=None)
    args = f.parse_args(argv)
    sampler.check_decoding(f, args)
    names = [name for name, _ in args.data]
    for name in names:
        if name not in args.task:
            f.error(f"--data {name}: --task does not name it ({', '.join(args.task)})")
        if names.count(name) > 1:
            f.error(f"--data {name}: given twice; name a folder where there are several files")
        if name in toy.SOURCES:
            f.error(f"--data {name}: this task makes its own data")
    return args


def task_name(text: str) -> str:
    """An argparse type: a key of TASKS."""
    if text not in TASKS:
        raise argparse.ArgumentTypeError(f"unknown task {text!r}; the tasks are {', '.join(TASKS)}")
    return text


def task_data(text: str) -> tuple[str, str]:
    """An argparse type: TASK=PATH as (task, path)."""
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"expected TASK=PATH, got {text!r}")
    return task_name(name), path


def sources(args) -> dict[str, str | None]:
    """Where the data of each task is; None for what the table says. Raises ValueError for a package that is missing
    and a file that is not there: before the model is loaded."""
    given = dict(args.data)
    found = {}
    for name in dict.fromkeys(args.task):
        task = TASKS[name]
        if task.package and not installed(task.package):
            raise ValueError(f"--task {name} needs {task.package} to judge answers: pip install {task.package}")
        found[name] = given.get(name)
        if args.data_dir and task.file and name not in given:
            found[name] = os.path.join(args.data_dir, task.file)
            if not os.path.exists(found[name]):
                raise ValueError(f"--data_dir: no file {found[name]}; name one with --data {name}=PATH")
    return found


def open_folder(path: str) -> Path:
    """Makes it; raises OSError when nothing can be written there."""
    out = Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise OSError(f"--output_dir {path}: cannot write there ({error.strerror}); choose another folder") from error
    return out


def wait_for_all(world: int) -> None:
    """Until every rank is here. The only time that ranks talk to each other; one may be days behind."""
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        dist.barrier()
        dist.destroy_process_group()


def load(args, checkpoint: Path) -> tuple[Callable[..., list[Answer]], Callable, str]:
    """(generate, check_lengths, method) of a checkpoint. check_lengths(samples, init_num) raises ValueError for the
    first question that leaves no room for an answer: now, and not hours later when its turn comes."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    model, tokenizer = sampler.load(checkpoint, device, args.bf16)
    method = model.config.nanoedit["method"]
    if method == "medlm":
        medlm.special_tokens(tokenizer)

    def check_lengths(samples: list[Sample], init_num: int) -> None:
        for sample in samples:
            prompt, draft, room = data.encode_prompt(sample.messages, tokenizer), sample.record.get("draft"), init_num
            if method == "editflow":
                drafts = None if draft is None else [sampler.draft_ids(tokenizer, draft)]
                room = max(1, len(sampler.starts(model, tokenizer, [prompt], [sample.seed], args, drafts)[0]))
            sampler.check_room(model, [prompt], room, f"question {sample.id}")

    return generator(model, tokenizer, args), check_lengths, method


def main(argv=None) -> None:
    args = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = sources(args)
    samples = {n: load_samples(n, path, args.limit, args.seed, args.system_prompt) for n, path in where.items()}
    out = open_folder(args.output_dir)
    for name in samples:
        all_rows(name, out)  # raises for a broken file of an earlier run
    checkpoint = models.local_path(args.path)
    generate, check_lengths, method = load(args, checkpoint)
    settings = {"method": method} | {flag: getattr(args, flag) for flag in DECODING[method]}
    init_nums = {name: args.init_num or TASKS[name].init_num for name in samples}
    for name, init_num in init_nums.items():
        check_lengths(samples[name], init_num)
    for name, init_num in init_nums.items():
        set_keys(samples[name], settings | {"init_num": init_num, "checkpoint": fingerprint(checkpoint)})
        options = {"rank": rank, "world": world, "batch_size": args.batch_size, "may_run": args.allow_code_execution}
        answer_samples(name, samples[name], partial(generate, init_num=init_num), out, **options)
    wait_for_all(world)
    if rank == 0:
        report(args, samples, where, settings, out)


def report(args, samples: dict[str, list[Sample]], where: dict, settings: dict, out: Path) -> None:
    """Merged rows, summary.json and the table."""
    summaries, notes = {}, []
    for name in samples:
        task = TASKS[name]
        rows = merge(name, samples[name], out)
        print_answers(name, rows[: args.show_answers])
        summary = summarise(name, rows)
        version = f" ({task.package} {installed(task.package)})" if task.package else ""
        summary |= {"judge": task.judge + version, "data": where[name] or task.hub or "built in"}
        summary["init_num"] = args.init_num or task.init_num
        if task.program and not args.allow_code_execution:
            notes.append(f"{name}: programs were written to {out} and not run; --allow_code_execution runs them")
        elif task.program and args.limit is None and installed("evalplus"):
            parts = {"": "edited", "_draft": "draft"} if settings["method"] == "medlm" else {"": "response"}
            for part, what in parts.items():
                summary["evalplus" + part] = evalplus(name, out / f"evalplus_{name}{part}.jsonl")
                notes.append(f"{name}, {what}: evalplus pass@1 {summary['evalplus' + part]}")
        summaries[name] = summary
    asked = {flag: getattr(args, flag) for flag in ("seed", "limit", "system_prompt")}
    text = json.dumps({"path": args.path, "settings": settings | asked, "tasks": summaries}, indent=2)
    (out / "summary.json").write_text(text + "\n")
    print("\n".join([table(summaries), *notes]))


if __name__ == "__main__":
    cli.run(main)
