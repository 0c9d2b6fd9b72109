"""Evaluate a checkpoint on GSM8K, MATH-500, HumanEval, MBPP and the toy task.

    python evaluate.py --path CKPT --task gsm8k math500 humaneval mbpp --mask_diffusion_step 48 --edit_diffusion_step 16
    torchrun --nproc_per_node 8 evaluate.py --path CKPT --task gsm8k --data_dir data

Everything a number depends on stands in one table, TASKS: the data, the words of the prompt, and the rule that finds
the answer in a response and judges it. Zero-shot throughout. The words are those of the published ME-DLM evaluation,
so that its checkpoints are asked what they were measured with; a model trained on bare questions wants
`--system_prompt ""`. Where an answer has a draft (ME-DLM's, or the one that a record brings), both are judged.

    samples      questions of a task, in the order of its file; rank r of W takes every W-th, from the r-th on
    prepare      a model's settings for a task, and the function from samples to answers
    rows         one JSON object per finished sample, appended to OUT/<task>.rank<r>.jsonl as they come
    summary      once all ranks are done: the rows with verdicts, OUT/<task>.jsonl, and OUT/summary.json

A run that is killed goes on where it stopped when it is started again, with as many ranks as you like: a row carries a
hash of all that its answer depends on (checkpoint, settings, prompt), and samples whose row is there are skipped.

Generated programs run only with --allow_code_execution; what protects you then, and what does not, is at the top of
execution.py. Without it the programs are written and not judged. They are always written in evalplus's format; where
evalplus is installed, and a whole task has been answered, its much larger test sets judge them as well.
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from math import sqrt
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import toy
from plumbing import checkpoints, cli, execution, methods
from sample import check_writable, draft_ids

# --------------------------------------------------------------------------- finding the answer, and judging it
#
# A check takes the record of a sample and the text of a response, and says whether it is right.
# Its docstring is the rule, which the summary quotes.

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


def gsm8k_check(record: dict, response: str) -> dict[str, bool]:
    r"""The number after ####, else in the last \boxed{}, else the last one, equals the reference's."""
    answer = final_number(response)
    return {"right": answer is not None and answer == final_number(record["answer"])}


def math_check(record: dict, response: str) -> dict[str, bool]:
    r"""The last \boxed{} equals the reference, as text or by math-verify."""
    from math_verify import parse, verify

    answer = boxed(response) or ""
    same = "".join(answer.split()) == "".join(record["answer"].split())
    return {"right": same or bool(verify(parse(f"${record['answer']}$"), parse(f"${answer}$")))}


def humaneval_program(record: dict, response: str) -> str:
    """Prompt and code. Code that is the whole function again replaces the prompt's, whose body is a docstring."""
    return record["prompt"].rstrip() + "\n" + code(response)


def humaneval_check(record: dict, response: str) -> dict[str, bool]:
    """HumanEval's own tests pass, run by execution.py."""
    tests = f"{record['test']}\ncheck({record['entry_point']})\n"
    return {"right": execution.run(humaneval_program(record, response), tests) == "passed"}


def mbpp_asserts(record: dict) -> list[str]:
    """Those that the record carries: its test_list, or else what stands in the prompt's docstring (usually one)."""
    in_prompt = [line for line in record["prompt"].splitlines() if line.startswith("assert")]
    return record.get("test_list") or in_prompt


def mbpp_check(record: dict, response: str) -> dict[str, bool]:
    """The record's asserts pass, run by execution.py (one, if only the prompt has some; evalplus has more)."""
    tests = [*(record.get("test_imports") or []), *mbpp_asserts(record)]
    return {"right": execution.run(code(response), "\n".join(tests)) == "passed"}


def mbpp_question(record: dict) -> str:
    description = [line for line in record["prompt"].replace('"""', "").strip().splitlines() if line[:6] != "assert"]
    example = "\n".join(mbpp_asserts(record)[:1])
    return "\n".join(description) + f"\nYour code should satisfy the following assertion:\n```python\n{example}\n```"


def toy_check(record: dict, response: str) -> dict[str, bool]:
    """right: the number after ####; valid: the response is one of the 18 that answer the prompt."""
    right, valid = toy.check(record["messages"][0]["content"], response)
    return {"right": right, "valid": valid}


@dataclass(frozen=True)
class Task:
    question: Callable[[dict], str]  # record -> what the user asks
    check: Callable[[dict, str], dict[str, bool]]  # (record, text of a response) -> verdicts
    fields: tuple[str, ...] = ()  # text fields that a record must have
    system: str = ""
    hub: str = ""  # dataset on the hub, with a folder where it has several
    file: str = ""  # its name under --data_dir
    package: str = ""  # that the check needs
    program: Callable[[dict, str], str] | None = None  # (record, response) -> what a code task runs
    explain: Callable[[str, str], str] | None = None  # (question, response) -> what is wrong, "" if nothing
    init_num: int = 512  # for methods that start from so many tokens


MATH = "Please reason step by step, and put your final answer within \\boxed{}."
CODE = "You are an intelligent programming assistant to produce Python algorithmic solutions."

TASKS = {
    "gsm8k": Task(
        hub="openai/gsm8k/main", file="gsm8k_test.jsonl",
        fields=("question", "answer"), question=lambda record: record["question"],
        system=MATH, check=gsm8k_check,
    ),
    "math500": Task(
        hub="HuggingFaceH4/MATH-500", file="math500.jsonl",
        fields=("problem", "answer"), question=lambda record: record["problem"],
        system=MATH, check=math_check, package="math_verify",
    ),
    "humaneval": Task(
        hub="openai/openai_humaneval", file="humaneval.jsonl",
        fields=("prompt", "test", "entry_point"),
        question=lambda record: f"```python\n{record['prompt'].strip()}\n```",
        system=CODE, check=humaneval_check, program=humaneval_program,
    ),
    "mbpp": Task(
        hub="evalplus/mbppplus", file="mbpp.jsonl",
        fields=("prompt",), question=mbpp_question,
        system=CODE, check=mbpp_check, program=lambda record, response: code(response),
    ),
    "toy": Task(
        question=lambda record: record["messages"][0]["content"], check=toy_check, explain=toy.explain, init_num=24,
    ),
}  # fmt: skip
TASKS["toy-repair"] = TASKS["toy"]  # from a corrupted response


@dataclass
class Sample:
    id: str
    record: dict
    messages: list[dict]  # the dialogue to answer
    seed: int  # of everything random in its answer
    key: str = ""  # hash of all that the answer depends on


def load_samples(name: str, source: str, limit: int | None, seed: int, system: str | None) -> list[Sample]:
    """The first `limit` samples of a task, from a file, folder or hub dataset. system: instead of the task's. Raises
    ValueError / OSError naming the file and line."""
    task = TASKS[name]
    if task.package and not importlib.util.find_spec(task.package):
        raise ValueError(f"--task {name} needs {task.package} to judge answers: pip install {task.package}")
    if name in toy.SOURCES:
        records = toy.records("test", limit or toy.HELD_OUT, seed, name)
    else:
        files = data.data_files(source)
        files = [file for file in files if "test" in file.name] or files
        records = [checked(task, *line) for file in files for line in data.read_file(file)][:limit]
        if not records:
            raise ValueError(f"{files[0]}: no record in it")
    system = task.system if system is None else system
    dialogue = [{"role": "system", "content": system}] if system else []
    samples = []
    for i, record in enumerate(records):
        id = record.get("task_id", record.get("unique_id", i))
        id = id if isinstance(id, str) else f"{name.capitalize()}/{id}"  # as evalplus calls them: "Mbpp/2"
        messages = [*dialogue, {"role": "user", "content": task.question(record)}]
        samples.append(Sample(id, record, messages, seed * 1_000_003 + i))
    return samples


def checked(task: Task, place: str, record) -> dict:
    """The record, if it is one of this task."""
    if isinstance(record, ValueError):
        raise ValueError(f"{place}: {record}")
    for field in task.fields:
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise ValueError(f"{place}: needs text in field {field!r}; is this the right file for the task?")
    if not isinstance(record.get("draft"), str | None):
        raise ValueError(f"{place}: the field 'draft' must hold text")
    for field in ("test_list", "test_imports"):  # of mbpp, both optional
        lines = record.get(field) or []
        if not (isinstance(lines, list) and all(isinstance(line, str) for line in lines)):
            raise ValueError(f"{place}: the field {field!r} must hold a list of texts")
    return record


def set_keys(samples: list[Sample], settings: dict, checkpoint: Path) -> None:
    """The checkpoint counts by name, size and time of its files: once it was trained on, it is another one."""
    counts = re.compile(r".*\.(safetensors|jinja|model)|(\w+_)?config\.json|tokenizer\.json")
    files = [file for file in sorted(checkpoint.iterdir()) if counts.fullmatch(file.name)]
    state = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    for i, sample in enumerate(samples):
        everything = [i, sample.id, sample.messages, sample.seed, settings, state]
        sample.key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ answers and rows


def prepare(model, tokenizer, args, name: str, samples: list[Sample]) -> tuple[dict, Callable]:
    """(settings, generate) of a task. settings: what an answer depends on beside checkpoint, prompt and seed.
    generate: from samples to answers, {"response", "tokens", "draft" (None where there is none), "passes"}.

    Raises ValueError for the first question that leaves no room for an answer: now, and not when its turn comes.
    """
    method = methods.of(model)
    flags = argparse.Namespace(**vars(args) | {"init_num": args.init_num or TASKS[name].init_num})
    settings = methods.sampling_settings(method, flags, model, tokenizer)

    def encode(samples: list[Sample]) -> tuple[list, list | None]:
        prompts = [data.encode_prompt(s.messages, tokenizer) for s in samples]
        drafts = [s.record.get("draft") for s in samples]
        return prompts, None if None in drafts else [draft_ids(tokenizer, draft) for draft in drafts]

    def generate(samples: list[Sample]) -> list[dict]:
        prompts, drafts = encode(samples)
        answers = []
        for text in method.generate(model, prompts, settings, [s.seed for s in samples], drafts):
            answer = {"response": tokenizer.decode(text.response), "tokens": len(text.response)}
            answer["draft"] = None if text.draft is None else tokenizer.decode(text.draft)
            answers.append(answer | {"passes": text.passes})
        return answers

    prompts, drafts = encode(samples)
    methods.check_lengths(method, prompts, settings, drafts, names=[f"question {s.id}" for s in samples])
    return vars(settings) | {"bf16": args.bf16}, generate


def read_rows(name: str, out: Path) -> dict[str, dict]:
    """The rows of a task from every rank, by key. A last line without its newline was cut off by a kill and does not
    count. Raises ValueError for any other line that is not a row."""
    rows = {}
    for path in sorted(out.glob(f"{name}.rank*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ValueError(f"{path}:{number}: not a row; move the file away") from None
    return rows


def answer_samples(name, samples, generate, out: Path, rank=0, world=1, batch_size=8) -> None:
    """This rank's share of a task: appends a row for every sample that has none yet."""
    rows = read_rows(name, out)
    pending = [sample for sample in samples[rank::world] if sample.key not in rows]
    bar = tqdm(total=len(pending), desc=name, unit="sample", disable=rank > 0)
    with bar, open(out / f"{name}.rank{rank}.jsonl", "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # what a kill cut off; appending goes on behind it
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            started = time.perf_counter()
            answers = generate(batch)
            seconds = (time.perf_counter() - started) / len(batch)
            for sample, answer in zip(batch, answers, strict=True):
                row = {"key": sample.key, "id": sample.id, "prompt": sample.messages[-1]["content"]}
                line = json.dumps(row | answer | {"seconds": seconds}) + "\n"
                file.write(line.encode())
                file.flush()
                bar.update()


TEXTS = ("draft", "response")  # what is judged of a row


def judge(name: str, samples: list[Sample], out: Path, may_run: bool = False) -> list[dict]:
    """The rows of these samples from all ranks, in order, with verdicts (programs get some only if they may run), as
    written to OUT/<task>.jsonl. Programs also go to OUT/evalplus_<task>_response.jsonl and ..._draft.jsonl."""
    task, found = TASKS[name], read_rows(name, out)
    rows = [found[sample.key] | {"verdicts": {}} for sample in samples]
    check = cache(lambda i, text: task.check(samples[i].record, text))  # what was not edited is judged once
    for kind in TEXTS:
        answered = [i for i, row in enumerate(rows) if row[kind] is not None]
        texts = [rows[i][kind] for i in answered]
        if task.program:
            answers = [(samples[i], text) for i, text in zip(answered, texts)]
            lines = [{"task_id": s.id, "solution": task.program(s.record, text)} for s, text in answers]
            write_rows(out / f"evalplus_{name}_{kind}.jsonl", lines)
            if not may_run:
                continue
        with ThreadPoolExecutor(max(1, os.cpu_count() // 2)) as pool:
            work = pool.map if task.program else map  # math-verify works in the main thread alone
            judged = tqdm(work(check, answered, texts), f"{name}, judging", len(texts))
            for i, verdicts in zip(answered, judged):
                rows[i]["verdicts"] |= {f"{kind} {verdict}": holds for verdict, holds in verdicts.items()}
    write_rows(out / f"{name}.jsonl", rows)
    return rows


def write_rows(file: Path, rows: list[dict]) -> None:
    checkpoints.write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))


def evalplus(name: str, samples: Path) -> dict | str:
    """{"base", "plus"}: pass@1 on the original and the extended tests, by evalplus, which fetches its tests itself
    and has its own sandbox (pip install evalplus). Where it fails, its last words."""
    samples.with_name(samples.stem + "_eval_results.json").unlink(missing_ok=True)  # or it would report the last run
    command = [sys.executable, "-m", "evalplus.evaluate", "--dataset", name, "--samples", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    scores = re.findall(r"pass@1:\s*([0-9.]+)", done.stdout)
    if len(scores) == 2:
        return {"base": float(scores[0]), "plus": float(scores[1])}
    return "failed: " + (done.stderr.strip().splitlines() or ["without a message"])[-1]


def summarise(rows: list[dict]) -> dict:
    """Every verdict in percent with its standard error 100 sqrt(p (1 - p) / n); mean counts of passes; tokens of
    responses per second of generation, in one process."""
    verdicts = {}
    for verdict in dict.fromkeys(verdict for row in rows for verdict in row["verdicts"]):
        given = [row["verdicts"][verdict] for row in rows if verdict in row["verdicts"]]
        p = fmean(given)
        error = sqrt(p * (1 - p) / len(given))
        verdicts[verdict] = {"percent": 100 * p, "standard_error": 100 * error}
    passes = {count: fmean(row["passes"][count] for row in rows) for count in rows[0]["passes"]}
    speed = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
    return {"n": len(rows), "verdicts": verdicts, "passes": passes, "tokens_per_second": speed}


def report(name: str, samples: list[Sample], args) -> dict:
    """Prints the verdicts on a task, and the first answers where they are asked for; returns the summary."""
    task, out = TASKS[name], Path(args.output_dir)
    rows = judge(name, samples, out, args.allow_code_execution)
    for row in rows[: args.show_answers]:
        print(f"{row['prompt']}  ->  {row['response']}    {row['verdicts'] or 'not judged'}")
        if task.explain and (wrong := task.explain(row["prompt"], row["response"])):
            print(f"    {wrong}")
    summary = summarise(rows) | {"judge": task.check.__doc__}
    passes = [f"{mean:.1f} {count.replace('_', ' ')}" for count, mean in summary["passes"].items()]
    speed = f"{summary['tokens_per_second']:.1f} tokens/s"
    print(f"{name}, {len(rows)} samples:", *passes, speed, sep="   ")
    for verdict, found in summary["verdicts"].items():
        print(f"    {verdict:15}", "{percent:5.1f} ± {standard_error:.1f} %".format(**found))
    if task.program and not args.allow_code_execution:
        print(f"    programs were written to {out} and not run; --allow_code_execution runs them")
    elif task.program and args.limit is None and importlib.util.find_spec("evalplus"):
        kinds = [kind for kind in TEXTS if rows[0][kind] is not None]
        files = {kind: out / f"evalplus_{name}_{kind}.jsonl" for kind in kinds}
        summary["evalplus"] = {kind: evalplus(name, file) for kind, file in files.items()}
        print(f"    pass@1 by evalplus: {summary['evalplus']}")
    return summary


# ------------------------------------------------------------------------------------------------------- the script


def parse_args(argv=None):
    f = cli.Flags("Evaluate a checkpoint; answers, verdicts and a summary go to --output_dir.")
    f.choice("--path", "-p", required=True, help="checkpoint directory or hub id")
    f.choice("--task", "-t", choices=TASKS, nargs="+", default=["gsm8k", "humaneval", "mbpp", "math500"],
             metavar="TASK", help=f"of {', '.join(TASKS)}")
    f.choice("--data", nargs="+", default=[], metavar="TASK=PATH", help="file, folder or hub dataset of a task")
    f.choice("--data_dir", help="folder with the tasks' files (default: the hub)")
    f.choice("--output_dir", default="evaluation", help="rows, verdicts, summary; a run found here is continued")
    f.integer("--limit", low=1, help="only the first samples of each task")
    f.choice("--system_prompt", type=cli.text, help='instead of that of the task; "" for none')
    f.integer("--seed", low=0, default=42, help="of everything random")
    f.integer("--batch_size", low=1, default=8, help="samples decoded together")
    f.integer("--show_answers", low=0, default=0, help="print so many answers of each task")
    f.flag("--bf16", default=torch.cuda.is_available(), help="weights in bfloat16")
    f.flag("--allow_code_execution", help="run the generated programs, which execution.py confines")
    methods.sampling_flags(f, temperature=0.0)
    args = f.parse_args(argv)
    given = [item.partition("=")[::2] for item in args.data]
    for name, path in given:
        if not path or name not in args.task or name in toy.SOURCES or len(dict(given)) < len(given):
            f.error(f"--data {name}={path}: expected TASK=PATH, once for a task that --task names and that reads data")
    args.data = {name: TASKS[name].hub for name in args.task}
    if args.data_dir:
        args.data = {name: hub and f"{args.data_dir}/{TASKS[name].file}" for name, hub in args.data.items()}
    args.data |= dict(given)
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    which = args.limit, args.seed, args.system_prompt
    samples = {name: load_samples(name, source, *which) for name, source in args.data.items()}
    out = Path(args.output_dir)
    for name in samples:
        check_writable(out / f"{name}.rank{rank}.jsonl")
        read_rows(name, out)  # raises for a broken file of an earlier run
    checkpoint = checkpoints.local_path(args.path)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    model, tokenizer = checkpoints.open_for_inference(checkpoint, device, args.bf16)
    prepared = {name: prepare(model, tokenizer, args, name, samples[name]) for name in samples}
    for name, (settings, generate) in prepared.items():
        set_keys(samples[name], settings, checkpoint)
        answer_samples(name, samples[name], generate, out, rank, world, args.batch_size)
    if world > 1:  # the only time that ranks talk to each other; one may be days behind
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        tasks = {name: report(name, samples[name], args) for name in samples}
        settings = {name: settings for name, (settings, _) in prepared.items()}
        checkpoints.write_json(out / "summary.json", {"args": vars(args), "settings": settings, "tasks": tasks})
        print(f"answers, verdicts and summary written to {out}")


if __name__ == "__main__":
    cli.run(main)
