"""Evaluate a checkpoint on GSM8K, MATH-500, HumanEval, MBPP and the toy task, or by the likelihood of a text.

    python evaluate.py --path CKPT --task gsm8k math500 humaneval mbpp --mask_diffusion_step 48 --edit_diffusion_step 16
    torchrun --nproc_per_node 8 evaluate.py --path CKPT --task gsm8k --data_dir data
    python evaluate.py --path CKPT --task likelihood --data FILE

Everything a number depends on stands in one table, TASKS: the data, the words of the prompt, and the rule that finds
the answer in a response and judges it. Zero-shot, in the words of the published ME-DLM evaluation; a model trained on
bare questions wants `--system_prompt ""`. Where an answer has a draft (ME-DLM's, or the one that a record brings), both
are judged; by our rule ("right"), which looks for what was meant, and by the published one where that is stricter.

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
import builtins
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
from functools import cache, partial
from itertools import chain, islice
from math import gcd, log, sqrt
from pathlib import Path
from statistics import fmean, pstdev

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in train.py, and before torch

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import parallel
import toy
from plumbing import checkpoints, cli, execution, methods
from sample import draft_ids

# --------------------------------------------------------------------------- finding the answer, and judging it
#
# A check takes the record of a sample and the text of a response, and says whether it is right. Its docstring is the
# rule, which the summary quotes. PUBLISHED: the verdict of the published ME-DLM evaluation, in so far as it differs.

PUBLISHED = "as published"
TEXTS = ("draft", "response")  # what is judged of a row

NUMBER = re.compile(r"(?:(?<![\w)}])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)
FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
DEMONSTRATION = re.compile(r"^(?:if\b|assert\b|print\b|check *\()", re.MULTILINE)
STOPS = re.compile(r"\n(?:# Test|if|assert|print|```|check)")  # the published ones: they do not mind where a word ends
NO_MATTER = re.compile(  # in an answer of MATH
    r"\\(?:left|right)(?![a-z])|\\[,;:!$%]|[$%]|\^ *(?:\\circ|\{\\circ\})|(?<=[\d)}])\s*\\text *\{[^{}]*\}$"
)


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


def plain(answer: str) -> str:
    r"""An answer of MATH without a letter and = in front, \left, \right, TeX's small spaces, the signs for percent,
    dollars and degrees, and a unit in \text{} at the end."""
    name, _, value = answer.partition("=")
    is_named = value and len(name.strip()) <= 2 and "=" not in value
    return NO_MATTER.sub("", (value if is_named else answer).strip()).strip()


def code(text: str) -> str:
    """The first fenced block (an unclosed one reaches to the end), or the whole text; in either case without what only
    demonstrates it: everything from the first unindented assert, print, check or `if` behind a function on."""
    fenced = FENCE.search(text)
    program = fenced[1] if fenced else text
    demonstration = DEMONSTRATION.search(program, max(0, program.find("def ")))
    return program[: demonstration.start() if demonstration else None].rstrip() + "\n"


def published_code(text: str) -> str:
    """What the published evaluation runs: all from behind the first line that holds a fence (without one, from the
    second line), up to the first of its stop strings."""
    fenced = re.search("```[^\n]*\n", text)
    program = text[fenced.end() :] if fenced else text.partition("\n")[2]
    return STOPS.split(program, maxsplit=1)[0].rstrip() + "\n"


def gsm8k_check(record: dict, response: str) -> dict[str, bool]:
    r"""right: the number after ####, else in the last \boxed{}, else the last one, equals the reference's;
    as published: the last \boxed{} holds it, alone."""
    answer, in_box = final_number(response), plain(boxed(response) or "").replace("{,}", ",")
    right = answer is not None and answer == final_number(record["answer"])
    return {"right": right, PUBLISHED: right and bool(NUMBER.fullmatch(in_box))}


def math_check(record: dict, response: str) -> dict[str, bool]:
    r"""right: the last \boxed{} equals the reference, as text or by math-verify; as published: and it is a whole number
    where the reference is one, and no fraction that can be reduced."""
    from math_verify import parse, verify

    answer, reference = plain(boxed(response) or ""), plain(record["answer"])
    same = "".join(answer.split()) == "".join(reference.split())
    right = same or bool(verify(parse(f"${reference}$"), parse(f"${answer}$")))
    whole = NUMBER.fullmatch(answer) or not reference.lstrip("-").isdigit()
    fraction = re.fullmatch(r"-?(?:\\[dt]?frac *)?\{?(\d+)[}{/ ]+(\d+)\}?", answer)
    reduced = not fraction or gcd(int(fraction[1]), int(fraction[2])) == 1
    return {"right": right, PUBLISHED: same or bool(right and whole and reduced)}


def passed(start: str, response: str, tests: str, function: str) -> dict[str, bool]:
    """Verdicts on a program by execution.py: `start` and the code of a response, ours and the published one."""
    programs = {"right": start + code(response), PUBLISHED: start + published_code(response)}
    reasons = {program: execution.run(program, tests, function) for program in set(programs.values())}
    return {verdict: reasons[program] is None for verdict, program in programs.items()}


def humaneval_check(record: dict, response: str) -> dict[str, bool]:
    """HumanEval's own tests pass. Where the file has none, as the published one, evalplus has them."""
    test, function = record.get("test"), record.get("entry_point")
    if not test or not function:
        return {}
    helpers = record["prompt"].rpartition(f"def {function}")[0]  # for the tests, as the prompt defines them
    start = TASKS["humaneval"].start(record)
    return passed(start, response, f"{helpers}\n{test}\ncheck({function})\n", function)


def mbpp_asserts(record: dict) -> list[str]:
    """Those that the record carries: its test_list, or else what stands in the prompt's docstring (usually one)."""
    in_prompt = [line for line in record["prompt"].splitlines() if line.startswith("assert")]
    return record.get("test_list") or in_prompt


def mbpp_check(record: dict, response: str) -> dict[str, bool]:
    """All asserts of the record pass (one, if only the prompt has some, as in the published file)."""
    asserts = mbpp_asserts(record)
    called = re.findall(r"(?<![\w.])(?!assert\b)([A-Za-z_]\w*)\s*\(", "\n".join(asserts))
    if not called:
        return {}
    function = next((name for name in called if not hasattr(builtins, name)), called[0])  # one is called sum
    tests = ["import math, sys", *(record.get("test_imports") or []), *asserts]
    return passed("", response, "\n".join(tests), function)


def mbpp_question(record: dict) -> str:
    description = [line for line in record["prompt"].replace('"""', "").strip().splitlines() if line[:6] != "assert"]
    example = "\n".join(mbpp_asserts(record)[:1])
    return "\n".join(description) + f"\nYour code should satisfy the following assertion:\n```python\n{example}\n```"


def toy_check(record: dict, response: str) -> dict[str, bool]:
    """right: the number after ####; valid: the response is one of the 18 that answer the prompt."""
    right, valid = toy.check(record["messages"][0]["content"], response, record.get("suffix", ""))
    return {"right": right, "valid": valid}


@dataclass(frozen=True)
class Task:
    question: Callable[[dict], str]  # record -> what the user asks
    check: Callable[[dict, str], dict[str, bool]]  # (record, text of a response) -> verdicts
    fields: tuple[str, ...] = ()  # text fields that a record must have
    system: str = ""
    hub: str = ""  # dataset on the hub, with a folder where it has several
    files: tuple[str, ...] = ()  # its name under --data_dir, and that in the published folder of data
    package: str = ""  # that the check needs
    start: Callable[[dict], str] | None = None  # record -> what a program has in front of a response's code
    init_num: int = 512  # for methods that start from so many tokens


MATH = "Please reason step by step, and put your final answer within \\boxed{}."
CODE = "You are an intelligent programming assistant to produce Python algorithmic solutions."

TASKS = {
    "gsm8k": Task(
        hub="openai/gsm8k/main", files=("gsm8k_test.jsonl", "math/gsm8k.jsonl"), fields=("question", "answer"),
        question=lambda record: record["question"], system=MATH, check=gsm8k_check,
    ),
    "math500": Task(
        hub="HuggingFaceH4/MATH-500", files=("math500.jsonl", "math/math500.jsonl"), fields=("problem", "answer"),
        question=lambda record: record["problem"], system=MATH, check=math_check, package="math_verify",
    ),
    "humaneval": Task(
        hub="openai/openai_humaneval", files=("humaneval.jsonl", "code/humaneval.jsonl"), fields=("prompt",),
        question=lambda record: f"```python\n{record['prompt'].strip()}\n```", system=CODE, check=humaneval_check,
        start=lambda record: record["prompt"].rstrip() + "\n",  # code may define the whole function once more
    ),
    "mbpp": Task(
        hub="evalplus/mbppplus", files=("mbpp.jsonl", "code/mbpp.jsonl"), fields=("prompt",),
        question=mbpp_question, system=CODE, check=mbpp_check, start=lambda record: "",
    ),
    "toy": Task(question=lambda record: record["messages"][0]["content"], check=toy_check, init_num=24),
}  # fmt: skip
TASKS["toy-repair"] = TASKS["toy-infill"] = TASKS["toy"]  # from a corrupted response; between its two ends
LIKELIHOOD = "likelihood"  # stands alone, in the section of its name


@dataclass
class Sample:
    id: str
    record: dict
    messages: list[dict]  # the dialogue to answer
    seed: int  # of everything random in its answer
    key: str = ""  # hash of all that the answer depends on


def load_samples(
    name: str, source: str, limit: int | None, seed: int, system: str | None, named: tuple = ()
) -> list[Sample]:
    """The first `limit` samples of a task, from a file, folder or hub dataset. system: instead of the task's; named:
    the fields of question and answer, likewise. Raises ValueError / OSError naming the file and line."""
    task = TASKS[name]
    if task.package and not importlib.util.find_spec(task.package):
        raise ValueError(f"--task {name} needs {task.package} to judge answers: pip install {task.package}")
    if name in toy.SOURCES:
        records = toy.records("test", limit or toy.HELD_OUT, seed, name)
    else:
        records = [record for _, record in read(source, limit, partial(checked, task, named))]
    system = task.system if system is None else system
    dialogue = [{"role": "system", "content": system}] if system else []
    samples = []
    for i, record in enumerate(records):
        id = record.get("task_id", record.get("unique_id", i))
        id = id if isinstance(id, str) else f"{name.capitalize()}/{id}"  # as evalplus calls them: "Mbpp/2"
        messages = [*dialogue, {"role": "user", "content": task.question(record)}]
        samples.append(Sample(id, record, messages, seed * 1_000_003 + i))
    return samples


def read(source: str, limit: int | None, check: Callable[[dict], dict]) -> list[tuple[str, dict]]:
    """(place, checked record) of the first `limit` records of a file, folder (of its test files, if it has some) or hub
    dataset. Raises ValueError, OSError."""
    files, records = data.data_files(source), []
    files = [file for file in files if "test" in file.name] or files
    for place, record in islice(chain.from_iterable(map(data.read_file, files)), limit):
        try:
            records.append((place, check(record)))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not records:
        raise ValueError(f"{files[0]}: no record in it")
    return records


def checked(task: Task, named: tuple, record) -> dict:
    """The record, if it is one of this task, with the fields under their usual names. Raises ValueError."""
    if isinstance(record, ValueError):
        raise record
    names = dict(zip(task.fields, task.fields)) | {usual: name for usual, name in zip(task.fields, named) if name}
    for field in names.values():
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise ValueError(f"needs text in field {field!r}; --prompt_field and --response_field name others")
    record |= {usual: record[field] for usual, field in names.items()}
    for field in ("draft", "test", "entry_point", "test_list", "test_imports"):  # need not be there
        value, is_list = record.get(field), field.startswith("test_")
        texts = value if is_list and isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) for text in texts) or (is_list and isinstance(value, str)):
            raise ValueError(f"the field {field!r} must hold {'a list of texts' if is_list else 'text'}")
    return record


def set_keys(samples: list[Sample], settings: dict, checkpoint: Path) -> None:
    """The checkpoint counts by name, size and time of its files: once it was trained on, it is another one."""
    counts = re.compile(r".*\.(safetensors|jinja|model)|(\w+_)?config\.json|tokenizer\.json")
    files = [(file.name, file.stat()) for file in sorted(checkpoint.iterdir()) if counts.fullmatch(file.name)]
    state = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]
    for i, sample in enumerate(samples):
        everything = [i, sample.id, sample.messages, sample.seed, settings, state]
        sample.key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ answers and rows


def prepare(model, tokenizer, args, name: str, samples: list[Sample]) -> tuple[dict, Callable]:
    """(settings, generate) of a task. settings: what an answer depends on beside checkpoint, prompt and seed.
    generate: from samples to answers, {"response", "tokens", "draft" (None where there is none), "passes"}. Raises
    ValueError for the first question that leaves no room for an answer: now, and not when its turn comes."""
    method = methods.of(model)
    tokenizer.configure(args.chat_template, args.raw_control_tokens)
    flags = argparse.Namespace(**vars(args) | {"init_num": args.init_num or TASKS[name].init_num})
    settings = methods.sampling_settings(method, flags, model, tokenizer)
    written = {name: getattr(args, name) for name in ("bf16", "chat_template", "raw_control_tokens")}

    def encode(samples: list[Sample]) -> tuple[list, list | None, list | None]:
        """Prompts, and drafts and suffixes where every record has one."""
        given = ([s.record.get(field) for s in samples] for field in ("draft", "suffix"))
        given = [None if None in texts else [draft_ids(tokenizer, text) for text in texts] for texts in given]
        return data.encode_prompts([s.messages for s in samples], tokenizer), *given

    def generate(samples: list[Sample]) -> list[dict]:
        prompts, *given = encode(samples)
        texts = method.generate(model, prompts, settings, [s.seed for s in samples], *given)
        drafts = [None if text.draft is None else tokenizer.decode(text.draft) for text in texts]
        answers = [{"response": tokenizer.decode(text.response), "tokens": len(text.response)} for text in texts]
        return [a | {"draft": d, "passes": text.passes} for a, d, text in zip(answers, drafts, texts)]

    prompts, drafts, suffixes = encode(samples)
    methods.check_lengths(method, prompts, settings, drafts, suffixes, [f"question {s.id}" for s in samples])
    return vars(settings) | written, generate


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
    with open(out / f"{name}.rank{rank}.jsonl", "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # what a kill cut off; appending goes on behind it
        for start in tqdm(range(0, len(pending), batch_size), name, unit="batch", disable=rank > 0):
            batch = pending[start : start + batch_size]
            started = time.perf_counter()
            answers = generate(batch)
            seconds = (time.perf_counter() - started) / len(batch)
            for sample, answer in zip(batch, answers, strict=True):
                row = {"key": sample.key, "id": sample.id, "prompt": sample.messages[-1]["content"]}
                file.write(json.dumps(row | answer | {"seconds": seconds}).encode() + b"\n")
            file.flush()


def judge(name: str, samples: list[Sample], out: Path, may_run: bool = False) -> list[dict]:
    """The rows of these samples from all ranks, in order, with verdicts (programs get some only if they may run), as
    written to OUT/<task>.jsonl. Programs also go to OUT/evalplus_<task>_response.jsonl and ..._draft.jsonl."""
    task, found = TASKS[name], read_rows(name, out)
    rows = [found[sample.key] | {"verdicts": {}} for sample in samples]
    check = cache(lambda i, text: task.check(samples[i].record, text))  # what was not edited is judged once
    for kind in TEXTS:
        texts = {i: row[kind] for i, row in enumerate(rows) if row[kind] is not None}
        if task.start:
            asked = [(samples[i], text) for i, text in texts.items()]
            lines = [{"task_id": s.id, "solution": task.start(s.record) + code(text)} for s, text in asked]
            write_rows(out / f"evalplus_{name}_{kind}.jsonl", lines)
            if not may_run:
                continue
        with ThreadPoolExecutor(max(1, os.cpu_count() // 2)) as pool:
            work = pool.map if task.start else map  # math-verify works in the main thread alone
            judged = tqdm(work(check, texts, texts.values()), f"{name}, judging", len(texts))
            for i, verdicts in zip(texts, judged):
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
    """Every verdict in percent with its standard error; mean counts of passes; tokens of responses per second of
    generation, in one process."""
    verdicts = {}
    for verdict in dict.fromkeys(verdict for row in rows for verdict in row["verdicts"]):
        given = [row["verdicts"][verdict] for row in rows if verdict in row["verdicts"]]
        verdicts[verdict] = {"percent": 100 * fmean(given), "standard_error": 100 * pstdev(given) / sqrt(len(given))}
    passes = {count: fmean(row["passes"][count] for row in rows) for count in rows[0]["passes"]}
    speed = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
    return {"n": len(rows), "verdicts": verdicts, "passes": passes, "tokens_per_second": speed}


def report(name: str, samples: list[Sample], args) -> dict:
    """Prints the verdicts on a task, and the first answers where they are asked for; returns the summary."""
    task, out = TASKS[name], Path(args.output_dir)
    rows = judge(name, samples, out, args.allow_code_execution)
    for sample, row in list(zip(samples, rows))[: args.show_answers]:
        print(f"{row['prompt']}  ->  {row['response']}    {row['verdicts'] or 'not judged'}")
        suffix = sample.record.get("suffix", "")
        if name in toy.SOURCES and (wrong := toy.explain(row["prompt"], row["response"], suffix)):
            print("   ", wrong)
    summary = summarise(rows) | {"judge": task.check.__doc__}
    passes = [f"{mean:.1f} {count.replace('_', ' ')}" for count, mean in summary["passes"].items()]
    print(f"{name}, {len(rows)} samples:", *passes, f"{summary['tokens_per_second']:.1f} tokens/s", sep="   ")
    for verdict, found in summary["verdicts"].items():
        print(f"    {verdict:21}", "{percent:5.1f} ± {standard_error:.1f} %".format(**found))
    if task.start and not args.allow_code_execution:
        print(f"    programs were written to {out} and not run; --allow_code_execution runs them")
    elif task.start and args.limit is None and importlib.util.find_spec("evalplus"):
        kinds = [kind for kind in TEXTS if rows[0][kind] is not None]
        summary["evalplus"] = {kind: evalplus(name, out / f"evalplus_{name}_{kind}.jsonl") for kind in kinds}
        print(f"    pass@1 by evalplus: {summary['evalplus']}")
    elif not summary["verdicts"]:
        print("    the file has no tests; evalplus has: pip install evalplus")
    return summary


# ------------------------------------------------------------------------------------------------------ likelihood


@torch.no_grad()
def likelihood(model, tokenizer, args, records: list[tuple[str, dict]]) -> dict:
    """How many bits the model needs for a byte of the texts (of responses, prompt and suffix given): the mean over
    draws of nats / ln 2 / bytes, and its standard error from their spread (of the noise, not of the texts' choice).
    records: (place, record in normal form); all corpus makes one text. Raises ValueError for a text that the tokenizer
    does not give back."""
    method, examples, size, left_out = methods.of(model), [], 0, 0
    if not hasattr(method, "likelihood"):
        raise ValueError(f"--task {LIKELIHOOD}: {method.TITLE} does not say how likely a text is")
    length = min(args.max_length, model.config.max_positions)
    corpus = "".join(record.get("corpus", "") for _, record in records)
    texts = [(place, record) for place, record in records if "corpus" not in record]
    for place, record in texts + ([(args.data[LIKELIHOOD], {"corpus": corpus})] if corpus else []):
        text = record.get("text") or record.get("corpus") or record["response"]
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            lost = next((text[i:] for i, mark in enumerate(back) if text[i : i + 1] != mark), text[len(back) :])
            raise ValueError(f"{place}: the tokenizer does not give the text back, from {lost[:20]!r} on")
        found = data.encode([record], tokenizer, max_length=length, recut=False).examples
        examples += found
        size, left_out = size + len(text.encode()) * bool(found), left_out + (not found)
    if not examples:
        raise ValueError(f"{records[0][0]}: no record fits into {length} tokens; raise --max_length")
    flags = cli.Flags("")
    methods.training_flags(flags)  # paths and masks are drawn as in training
    settings = methods.sampling_settings(method, args, model, tokenizer)
    settings = argparse.Namespace(**vars(flags.parse_args([])) | vars(settings))
    rng = torch.Generator().manual_seed(args.seed)
    draws = torch.zeros(1 if getattr(method, "EXACT", False) else args.draws, dtype=torch.float64)
    for start in tqdm(range(0, len(examples), args.batch_size), LIKELIHOOD, unit="batch"):
        batch = examples[start : start + args.batch_size]
        draws += torch.stack([method.likelihood(model, batch, settings, rng).sum().cpu() for _ in draws])
    draws /= log(2) * size
    bits, error = float(draws.mean()), float(draws.std() / sqrt(len(draws))) if len(draws) > 1 else 0.0
    relation = "exactly" if len(draws) == 1 else f"from {len(draws)} draws, at most"
    print(f"{len(examples)} pieces, {size} bytes, {left_out} records too long:", relation, end=" ")
    print(f"{bits:.4f} ± {error:.4f} bits per byte")
    sizes = {"bytes": size, "pieces": len(examples), "left_out": left_out, "draws": len(draws)}
    return {"bits_per_byte": bits, "standard_error": error} | sizes


# ------------------------------------------------------------------------------------------------------- the script


def parse_args(argv=None):
    f = cli.Flags("Evaluate a checkpoint; answers, verdicts and a summary go to --output_dir.")
    f.choice("--path", "-p", required=True, help="checkpoint directory or hub id")
    f.choice("--task", "-t", choices=[*TASKS, LIKELIHOOD], nargs="+", default=["gsm8k", "humaneval", "mbpp", "math500"],
             metavar="TASK", help=f"of {', '.join([*TASKS, LIKELIHOOD])}")
    f.choice("--data", nargs="+", default=[], metavar="TASK=PATH",
             help="file, folder or hub dataset of a task; PATH alone where there is one task")
    f.choice("--data_dir", help="folder with the tasks' files, also as published (default: the hub)")
    f.choice("--output_dir", default="evaluation", help="rows, verdicts, summary; a run found here is continued")
    f.group("which samples, and how")
    f.integer("--limit", low=1, help="only the first samples of each task")
    f.choice("--system_prompt", type=cli.text, help='instead of that of the task; "" for none')
    f.integer("--seed", low=0, default=42, help="of everything random")
    f.integer("--batch_size", low=1, default=8, help="samples decoded together")
    f.integer("--max_length", low=2, default=512, help="likelihood: tokens of a piece of text")
    f.integer("--draws", low=2, default=8, help="likelihood: estimates of a bound, from which its error follows")
    f.integer("--show_answers", low=0, default=0, help="print so many answers of each task")
    f.flag("--bf16", default=torch.cuda.is_available(), help="weights in bfloat16")
    f.flag("--allow_code_execution", help="run the generated programs, which execution.py confines")
    data.add_flags(f)
    methods.sampling_flags(f, temperature=0.0)
    args = f.parse_args(argv)
    if len(args.task) == len(args.data) == 1 and not args.data[0].startswith(f"{args.task[0]}="):
        args.data = [f"{args.task[0]}={args.data[0]}"]
    given, reading = dict(item.partition("=")[::2] for item in args.data), set(args.task) - set(toy.SOURCES)
    if not all(given.values()) or not given.keys() <= reading or len(given) < len(args.data):
        f.error(f"--data {' '.join(args.data)}: expected TASK=PATH, once for a task of --task that reads data")
    args.data = given
    if LIKELIHOOD in args.task and (len(args.task) > 1 or not args.data):
        f.error(f"--task {LIKELIHOOD} stands alone and needs --data FILE")
    for name in [name for name in args.task if name not in args.data]:
        args.data[name] = TASKS[name].hub
        if args.data_dir and TASKS[name].files:
            local = [Path(args.data_dir, file) for file in TASKS[name].files]
            args.data[name] = str(next(filter(Path.is_file, local), local[0]))
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out, alone = Path(args.output_dir), args.task == [LIKELIHOOD]
    if alone and rank > 0:
        return  # one process is enough
    which = args.limit, args.seed, args.system_prompt, (args.prompt_field, args.response_field)
    texts = read(args.data[LIKELIHOOD], args.limit, data.normalise) if alone else []
    samples = {name: load_samples(name, source, *which) for name, source in args.data.items() if not alone}
    checkpoints.check_writable(out / "summary.json", f"--output_dir {out}")
    for name in samples:
        read_rows(name, out)  # raises for a broken file of an earlier run
    checkpoints.lock(out / f".rank{rank}.lock")
    checkpoint = checkpoints.local_path(args.path)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    args.bf16 = parallel.bf16_if_possible(args.bf16, device)
    model, tokenizer = checkpoints.open_for_inference(checkpoint, device, args.bf16)
    prepared = {name: prepare(model, tokenizer, args, name, samples[name]) for name in samples}
    for name, (settings, generate) in prepared.items():
        set_keys(samples[name], settings, checkpoint)
        answer_samples(name, samples[name], generate, out, rank, world, args.batch_size)
    if world > 1 and not alone:  # the only time that ranks talk to each other; one may be days behind
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        tasks = {LIKELIHOOD: likelihood(model, tokenizer, args, texts)} if alone else {}
        tasks |= {name: report(name, samples[name], args) for name in samples}
        settings = {name: settings for name, (settings, _) in prepared.items()}
        checkpoints.write_json(out / "summary.json", {"args": vars(args), "settings": settings, "tasks": tasks})
        print(f"answers, verdicts and summary written to {out}")


if __name__ == "__main__":
    cli.run(main)
