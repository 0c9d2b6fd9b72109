"""Wrong flags and damaged files: one line that names the cause, the right exit status, and nothing left behind.

    flags that cannot be, alone or together      status 2, before anything is read
    files that cannot be                         status 1

A case is a command that works and what spoils it: flags that are appended, or a file that is damaged. What follows a
rule (wrong values from the parsers; damages times files times scripts) is made by rule, and some of each group are run,
the same in every run; BAD_INPUT=99 in the environment runs all of them.
"""

import functools
import gzip
import itertools
import json
import os
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import flags_of, jsonl, save_every_form, save_records, wrong_values

import convert
import evaluate
import sample
import train

SCRIPTS = {"train": train, "sample": sample, "convert": convert, "evaluate": evaluate}
SEED, EACH = 2026, int(os.environ.get("BAD_INPUT", 1))
pytestmark = pytest.mark.usefixtures("offline")
each = functools.partial(pytest.mark.parametrize, "case", ids=str)

# ------------------------------------------------------------------------------------------------------- commands

BARE = {  # the least that a script asks for
    "train": "--method editflow --output_dir out --dataset_args toy[train:8,test:2] --max_steps 1 --eval_strategy no",
    "sample": "--model_name_or_path flow --init_num 4",
    "convert": "--to editflow -i flow -o out",
    "evaluate": "--path flow --task toy --limit 2 --output_dir evaluation",
}
MODELS = {  # a command is called by its script and what it reads; the last value of a flag counts
    "train": ("--model_name_or_path", "flow shards spiece"),
    "sample": ("--prompt Ann --model_name_or_path", "flow medlm chat shards spiece adapted"),
    "convert": ("--to hf -i", "shards spiece bin bins words merges"),
    "evaluate": ("--path", "flow medlm shards adapted"),
}
COMMANDS = {f"{script} {name}": f"{flag} {name}" for script, (flag, names) in MODELS.items() for name in names.split()}
COMMANDS |= {
    "train run": "--max_steps 2 --output_dir run",
    "train records": "--max_length 64 --vocab_size 300",
    "train stream": "--max_length 64 --vocab_size 300 --streaming",
    "sample records": "",
    "train adapted": "--max_steps 2 --output_dir adapted --lora --model_name_or_path flow",
    "convert flow": "",
    "convert adapted": "--to hf -i adapted/checkpoint-final --merge_lora",
    "evaluate evaluation": "",
    "evaluate records": "--task gsm8k",
    "evaluate humaneval.jsonl": "--task humaneval --data humaneval=humaneval.jsonl",
    "evaluate mbpp.jsonl": "--task mbpp --data mbpp=mbpp.jsonl",
}
READERS = {  # commands that read a file of records, and the flag that names it
    "train records": "--dataset_args=", "train stream": "--dataset_args=", "sample records": "--prompt_file=",
    "evaluate records": "--data=gsm8k=",
}  # fmt: skip
RECORDS = [{"question": f"How much is {i} and 1?", "answer": f"That makes {i + 1}. #### {i + 1}"} for i in range(6)]
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    f()\n"}
MBPP = {"task_id": 2, "prompt": '"""\nNegate.\nassert neg(2) == -2\n"""\n', "test_list": [], "test_imports": []}


def command_of(name: str, flags=()) -> tuple:
    """(the script's main, all flags)."""
    script = name.split()[0]
    return SCRIPTS[script].main, [*f"{BARE[script]} {COMMANDS[name]}".split(), *flags]


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """Everything that the commands read."""
    root = tmp_path_factory.mktemp("world")
    save_every_form(root)
    save_records(root, RECORDS)
    jsonl(root / "humaneval.jsonl", HUMANEVAL)
    jsonl(root / "mbpp.jsonl", MBPP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, more in (("train run", "--max_steps 1"), ("train adapted", "--max_steps 1"), ("evaluate flow", "")):
            main, flags = command_of(name, more.split())
            main(flags)
    for sums in root.glob("*/*/SHA256SUMS"):  # as an earlier version wrote them: damage is met where a file is read
        sums.unlink()
    return root


@pytest.fixture
def world(original, tmp_path):
    """Copies what a command names, to be spoiled, into the current folder; and `flow`, on which the adapters stand."""

    def copy(flags):
        named = set(re.findall(r"[\w.]+", " ".join(flags))) | {"flow"}
        for source in (path for path in original.iterdir() if path.name in named):
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / source.name)

    return copy


# ------------------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    """What spoils a command, and what the error must name."""

    command: str
    named: tuple[str, ...]
    flags: tuple[str, ...] = ()
    file: str = ""
    how: str = ""  # a key of DAMAGES, "field = value", or the file's new text

    def __str__(self):
        return ascii(" ".join([self.command, *self.flags, self.file, self.how[-60:].strip()]))[1:100]


def some(n: int, cases: list) -> list:
    """n of them, the same in every run; and more where the environment says so."""
    return random.Random(f"{SEED} {cases[0]}").sample(cases, min(n * EACH, len(cases)))


# ------------------------------------------------------------------------------------------------------- flags

IMPOSSIBLE = [  # what is named is the first flag
    "train --preset huge", "train --schedule quartic", "train --schedule cubic[a:-9]", "train --schedule cubic[a]",
    "train --schedule linear[a:nan]", "train --x0_sampler noise", "train --x0_sampler masks[size:3]",
    "train --x0_sampler masks[length:1.5]", "train --x0_sampler masks[length:1e300]", "train --max_length 1",
    "train --dataset_args toy[", "train --dataset_args toy[trian:5]", "train --dataset_args 'toy + + toy'",
    "train --dataset_args toy[train:5,train:6]", "train --adam_beta2 1", "train --vocab_size 4000000000",
    "train --mask_diffusion_pred_per_step 2 0", "train surplus", "train --methid x", "train --load_in_4bit",
    "train --lora", "train --max_t 1e-9 --method medlm", "train --streaming --eval_strategy epoch",
    "sample --x0_sampler noise", "sample --x0_sampler uniform[length:99999999999]", "sample --x0_sampler draft",
    "sample --prompt fine \udcff", "sample --draft \ud800", "sample --tau 5e-324", "sample --tau 1.0000001",
    "convert --x0_sampler noise", "convert --schedule quartic", "evaluate --x0_sampler uniform[length:x]",
    "evaluate --task toy sudoku", "evaluate --data toy", "evaluate --data toy=", "evaluate --data =x",
    "evaluate --data sudoku=x", "evaluate --data gsm8k=x", "evaluate --tau 1e-320",
    "evaluate --data gsm8k=a gsm8k=b --task gsm8k",
]  # fmt: skip
NEEDED = [  # what is left out, and what is added
    "train --method", "train --output_dir", "train --max_steps --streaming", "sample --model_name_or_path",
    "convert --to", "convert -i", "convert -o", "evaluate --path",
]  # fmt: skip
CONTRADICTIONS = [  # flags that are fine without each other
    "train --min_t 0.5 | --max_t 0.5", "train --intermediate_min_t 0.6 | --intermediate_max_t 0.5",
    "train --pad_len 300 | --max_length 200",
    "train --insert_eos False | --intermediate_ratio 1 --pad_len 8", "sample --tau 0.1 | --steps 3",
    "sample --mask_length 0 | --x0_sampler empty", "sample --prompt a | --prompt_file b",
    "sample --interactive | --prompt a", "sample --interactive | --prompt_file a", "sample --interactive | --draft a",
    "sample --interactive | --output a", "sample --interactive | --num_samples 2", "sample --interactive | --make_gif",
    "sample --draft a | --mask_length 3", "sample --output a | --prompt_file a", "sample --output a | --make_gif ./a",
    "convert --schedule linear | --to hf", "convert --x0_sampler empty | --to medlm",
    "convert --time_conditioned | --to bidirectional", "evaluate --tau 0.1 | --steps 3",
    "evaluate --mask_length 3 | --x0_sampler empty",
]  # fmt: skip


def wrong_flags():
    """Of each flag a value that it cannot be; and of each script some flags without a value, or with a typing error."""
    for script in SCRIPTS:
        flags = {max(action.option_strings, key=len): action for action in flags_of(SCRIPTS[script])}
        for flag, action in flags.items():
            yield from some(1, [Case(script, (flag,), (f"{flag}={value}",)) for value in wrong_values(action)])
        yield from some(3, [Case(script, (flag[:-1] + "_",), (flag[:-1] + "_",)) for flag in flags])
        yield from some(3, [Case(script, (f,), (f,)) for f, action in flags.items() if action.nargs in (None, "+")])
    yield from [Case(script, (flag,), (flag, *more)) for script, flag, *more in map(shlex.split, IMPOSSIBLE)]


@each([*wrong_flags()])
def test_flags_that_cannot_be(case, refused):
    refused(SCRIPTS[case.command].main, [*BARE[case.command].split(), *case.flags], 2, *case.named)


@each(NEEDED)
def test_flags_that_are_lacking(case, refused):
    script, flag, *more = case.split()
    before, after = BARE[script].split(flag + " ")
    refused(SCRIPTS[script].main, [*before.split(), *after.split()[1:], *more], 2, flag)


@each(CONTRADICTIONS)
def test_flags_that_contradict_each_other(case, refused):
    name, *flags = case.split()
    bare, at = BARE[name].split(), flags.index("|")
    for alone in (flags[:at], flags[at + 1 :]):
        SCRIPTS[name].parse_args([*bare, *alone])
    flags.pop(at)
    refused(SCRIPTS[name].main, [*bare, *flags], 2, flags[0])


# ------------------------------------------------------------------------------------------------------- files

DAMAGES = {  # what a file holds then, and the kinds of file for which this is a damage
    "a folder": (None, "json jsonl txt csv jinja safetensors bin model parquet gz"),
    "binary": (lambda raw: bytes(range(256)) * 9, "json jsonl txt csv jinja safetensors bin model parquet gz"),
    "latin-1": (lambda raw: raw[:2] + b"\xe9" + raw[2:], "json jsonl txt csv jinja"),
    "utf-16": (lambda raw: raw.decode().encode("utf-16"), "json jsonl txt csv"),
    "empty": (lambda raw: b"", "json csv safetensors bin model parquet gz"),
    "truncated": (lambda raw: raw[: len(raw) * 3 // 5], "json safetensors bin model parquet gz"),
    "truncated by a byte": (lambda raw: raw[:-1], "safetensors model parquet gz"),
    "huge line": (lambda raw: b'"' + b"x" * 1_000_000, "json csv"),
    "huge number": (lambda raw: b"9" * 10_000, "json"),
    "nested": (lambda raw: b'{"a":' * 100_000, "json"),
    "nested lists": (lambda raw: b"[" * 100_000, "json"),
    "a list": (lambda raw: b"[]", "json"),
    "a number": (lambda raw: b"7", "json"),
    "null": (lambda raw: b"null", "json"),
    "a text": (lambda raw: b'"text"', "json"),
    "huge header": (lambda raw: b"\xff" * 7 + b"\x7f" + raw[8:], "safetensors"),
    "another header": (lambda raw: raw[:8] + b"[" + raw[9:], "safetensors"),
    "not gzip": (lambda raw: gzip.decompress(raw), "gz"),
    "gzip of nothing": (lambda raw: gzip.compress(b""), "gz"),
    "gzip of binary": (lambda raw: gzip.compress(bytes(range(256)) * 9), "gz"),
    "gzip broken inside": (lambda raw: raw[: len(raw) // 2] + b"\0\0\0" + raw[len(raw) // 2 + 3 :], "gz"),
}
KINDS = DAMAGES["a folder"][1].split()
WAYS = {f".{kind}": [how for how, (_, kinds) in DAMAGES.items() if kind in kinds.split()] for kind in KINDS}
ALL, FINAL, ADAPTED = "train sample convert evaluate", "run/checkpoint-final", "adapted/checkpoint-final"
CHECKPOINTS = {  # scripts -> files that they read. Those with a ? need not be there.
    ALL: "flow/config.json flow/tokenizer.json? flow/model.safetensors shards/model.safetensors.index.json "
         f"{ADAPTED}/adapter_model.safetensors {ADAPTED}/adapter_config.json {ADAPTED}/heads.safetensors",
    "train sample convert": "flow/tokenizer_config.json? spiece/tokenizer.model",
    "sample convert": f"{ADAPTED}/config.json? shards/model-00001-of-00001.safetensors",
    "train": f"{FINAL}/model.safetensors {FINAL}/optimizer.safetensors {FINAL}/train_state.json?",
    "sample": "chat/chat_template.jinja?",
    "convert": "words/tokenizer_config.json? words/special_tokens_map.json? merges/tokenizer_config.json? "
               "words/vocab.txt merges/vocab.json merges/merges.txt bin/pytorch_model.bin "
               "bins/pytorch_model.bin.index.json bins/pytorch_model-1.bin",
    "evaluate": "evaluation/toy.rank0.jsonl?",
}  # fmt: skip
BETWEEN = [  # lines between good records
    "{", "[]", "7", "null", '"text"', "{}", '{"question": "Why?", "answer": ', '{"question": 5, "answer": "a"}',
    '{"question": "\\ud800", "answer": "a"}', '{"question": null, "answer": null}', "[" * 5000, "9" * 5000, "NaN",
]  # fmt: skip
ALONE = [  # lines that are no training example
    '{"messages": "x"}', '{"messages": []}', '{"messages": [{}]}', '{"messages": [{"role": "user", "content": 5}]}',
    '{"messages": [{"role": "user", "content": "a"}]}', '{"history": 5, "response": "a"}', '{"text": " "}',
    '{"prompt": "a", "response": ""}', '{"prompt": "a"}', '{"prompt": "a", "response": "b", "draft": 5}',
    '{"text": "\\udfff"}', '{"color": "red"}',
]  # fmt: skip
CONFIG, TOKENIZER, ADAPTER = "flow/config.json", "flow/tokenizer.json", f"{ADAPTED}/adapter_config.json"
SETTINGS, INDEX = "flow/tokenizer_config.json", "shards/model.safetensors.index.json"
FIELDS = [  # (file, scripts that read it, fields, values that none of these can have, what is named if not the field)
    (CONFIG, ALL, "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
     "max_position_embeddings", ["x", None, 0, -1, 1.5, [], {}]),
    (CONFIG, ALL, "num_key_value_heads head_dim", ["x", -1, 1.5, [1], 7]),
    (CONFIG, ALL, "rope_theta rms_norm_eps", ["x", None, -1, []]),
    (CONFIG, ALL, "rope_scaling rope_parameters nanoedit", ["x", 5, [1]]),
    (CONFIG, ALL, "rope_scaling", [{"rope_type": "yarn", "factor": 2}, {"rope_type": "linear"}], "rope"),
    (CONFIG, ALL, "model_type hidden_act nanoedit.method", [5, "x"]),
    (CONFIG, "train sample evaluate", "nanoedit.schedule", [5, "x", [], None], "schedule"),
    (CONFIG, "train sample evaluate", "nanoedit.x0_sampler", [5, "x", [], None], "x0_sampler"),
    (CONFIG, ALL, "vocab_size hidden_size intermediate_size num_attention_heads head_dim max_position_embeddings",
     [10**12, 2**40, 10**400]),
    (CONFIG, ALL, "num_hidden_layers rms_norm_eps rope_theta", [10**400]),
    (CONFIG, ALL, "num_hidden_layers", [10**7]),
    (CONFIG, ALL, "rope_parameters", [{"full_attention": 5}, {"rope_theta": {}}, {"rope_theta": 10**400}], "rope"),
    (CONFIG, ALL, "rope_scaling", [{"type": "linear", "factor": x} for x in (0, 10**400, float("nan"), [])], "rope"),
    (CONFIG, "sample", "vocab_size hidden_size intermediate_size", [7, 10**7], "flow/model.safetensors"),
    (CONFIG, "sample", "num_hidden_layers", [3], "'model.layers.2."),
    (CONFIG, "train sample evaluate", "nanoedit.time_conditioned", [True], "t at the input"),
    (CONFIG, "sample", "nanoedit.clock", [True], "odds.weight"),
    (CONFIG, "sample", "nanoedit.x0_sampler", ["masks[length:100000]"], "positions"),
    (SETTINGS, ALL, "added_tokens_decoder", ["x", 5, {"a": {"content": "b"}}, {"1": 5}, {"1": {}}]),
    (SETTINGS, ALL, "chat_template", [5, {}, [1], [{"name": "default"}], [{"name": "default", "template": 5}]]),
    (SETTINGS, "sample", "chat_template", ["{% for", "{{ 1 / 0 }}", "{{ messages[9].content }}", "{% include 'a' %}",
     "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}"], "chat template"),
    (TOKENIZER, ALL, "model", [{}, [], 5, {"type": "BPE"}, {"type": "x"}], TOKENIZER),
    (TOKENIZER, ALL, "model", [{"type": "WordLevel", "vocab": {"a": 10**6, "x": 0}, "unk_token": "x"}], "tokens"),
    (TOKENIZER, ALL, "added_tokens decoder", ["x", [5], [{"id": -1, "content": "a"}], {"type": "x"}], TOKENIZER),
    (ADAPTER, ALL, "r", [0, -1, "x", None, 1.5, [], True, 10**12]),
    (ADAPTER, ALL, "r", [7], "adapter_model.safetensors"),
    (ADAPTER, ALL, "lora_alpha", ["x", None, {}, True, float("nan"), float("inf")]),
    (ADAPTER, ALL, "lora_dropout", ["x", 2, -1, []]),
    (ADAPTER, ALL, "base_model_name_or_path", [5, None, [], {}, ""]),
    (ADAPTER, ALL, "base_model_name_or_path", ["nowhere"], "nowhere"),
    (ADAPTER, ALL, "base_model_name_or_path", ["adapted"], "adapted/checkpoint-final"),
    (INDEX, ALL, "weight_map", [5, "x", None, [], {"a": 5}, {"a": None}, {"a": ["b"]}], INDEX),
    (INDEX, ALL, "weight_map", [{"a": "nowhere"}, {}], "shards"),
    (f"{FINAL}/train_state.json", "train", "step args", ["x", None, []], "train_state.json"),
    ("humaneval.jsonl", "evaluate", "prompt test entry_point", [5, None, []]),
    ("mbpp.jsonl", "evaluate", "test_list test_imports draft", [5, {"a": 1}, [5]]),
]  # fmt: skip
PLACES = [  # command: flags that name something else -> what is named, if not the last word
    *(f"{script} flow: {flag.split()[-1]} {name}" for script, (flag, _) in MODELS.items()
      for name in ("nowhere", "./a/b", "data.jsonl", "owner/name", "empty", "evaluation")),
    *(f"{script} flow: --output_dir data.jsonl{below}" for script in ("train", "convert", "evaluate")
      for below in ("", "/a/b")),
    *(f"train records: --dataset_args {name}" for name in (
        "nowhere", "owner/name", "empty", "flow/model.safetensors", "'data.txt + nowhere' -> nowhere",
        "toy[train:0] -> nothing", "data.jsonl[train:99] -> train:99", "data.jsonl --text_field nowhere")),
    *(f"train stream: --dataset_args {name}" for name in (
        "data.json", "toy", "empty", "nowhere.jsonl", "http://localhost:1/a.jsonl", "data.jsonl[train:3] -> train:3",
        "'data.jsonl + data.parquet + nowhere' -> nowhere")),
    *(f"evaluate records: --data gsm8k={name} -> {name}" for name in (
        "nowhere.jsonl", "empty", "data.txt", "flow/model.safetensors")),
    *(f"evaluate records: --data_dir {name}" for name in ("nowhere", "empty", "data.jsonl")),
    *(f"sample records: --prompt_file {name}" for name in ("nowhere", "flow", "flow/model.safetensors")),
    *(f"sample flow: {flag} {name}" for flag in ("--output", "--make_gif", "--make_html")
      for name in ("flow", "data.jsonl/a")),
    "train flow: --method medlm -> 'editflow'", "train run: --method medlm -> 'editflow'",
    "train flow: --time_conditioned", "train flow: --x0_sampler draft", "train adapted: --lora False -> --lora",
    "train run: --model_name_or_path flow --lora", "train flow: --max_length 4000000",
    "train flow: --output_dir flow --overwrite_output_dir", "sample flow: --mask_length 1000000 -> positions",
    f"sample flow: --prompt '{'Ann ' * 5000}' -> positions", "sample medlm: --init_num 4000000000 -> positions",
    "sample flow: --x0_sampler uniform[length:4] -> uniform", "sample medlm: --draft Ann --repair remask -> repair",
    "convert flow: --merge_lora", "convert adapted: --merge_lora False -> --merge_lora", "convert flow: -o flow",
    "convert flow: --revision v2 -i owner/name", "evaluate flow: --x0_sampler uniform",
    "evaluate flow: --x0_sampler draft", "evaluate medlm: --init_num 4000000000 -> positions",
    f"evaluate flow: --system_prompt '{'Ann ' * 5000}' -> positions",
]  # fmt: skip


def spoil(file: Path, how: str) -> None:
    raw = file.read_bytes()
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how in DAMAGES:
        file.write_bytes(DAMAGES[how][0](raw))
    elif change := re.fullmatch(r"([\w.]+) = (.*)", how):
        *outer, field = change[1].split(".")
        value = json.loads(raw.splitlines()[0] if file.suffix == ".jsonl" else raw)
        functools.reduce(dict.get, outer, value)[field] = json.loads(change[2])
        file.write_text(json.dumps(value) + "\n")
    elif how != "missing":
        file.write_text(how)


def damaged_checkpoints():
    for scripts, files in CHECKPOINTS.items():
        for script, entry in itertools.product(scripts.split(), files.split()):
            file, folder = entry.rstrip("?"), entry.split("/")[0]
            named = {"a folder": (folder,)}  # in which the file is looked for
            whole, ways = (folder, Path(file).name), WAYS[Path(file).suffix]
            yield from some(2, [Case(f"{script} {folder}", named.get(how, whole), (), file, how) for how in ways])
            if file == entry:
                yield Case(f"{script} {folder}", (folder,), (), file, "missing")


def damaged_records():
    first, *more = map(json.dumps, RECORDS)
    for command, flag in READERS.items():
        for kind in ("txt", "csv", "json", "parquet", "jsonl"):
            if (command, kind) in (("evaluate records", "txt"), ("train stream", "json")):
                continue  # no task is read from plain text, and JSON in one piece is not streamed
            for file in (f"data.{kind}", f"data.{kind}.gz"):
                ways = [*WAYS[Path(file).suffix], "missing"]
                yield from some(1, [Case(command, (file,), (flag + file,), file, how) for how in ways])
        named = ("data.jsonl", f"byte {len(first) + 1}" if command == "train stream" else "data.jsonl:2")
        texts = ("\n".join([first, line, *more]) for line in BETWEEN)
        yield from some(4, [Case(command, named, (f"{flag}data.jsonl",), "data.jsonl", text) for text in texts])
    flags = ("--dataset_args=data.jsonl",)
    yield from some(8, [Case("train records", ("data.jsonl:1",), flags, "data.jsonl", line) for line in ALONE])


def wrong_fields():
    for file, scripts, fields, values, *other in FIELDS:
        for field in fields.split():
            named = tuple(other) or (file.split("/")[-1], field.split(".")[-1])
            rows = itertools.product(scripts.split(), [f"{field} = {json.dumps(value)}" for value in values])
            yield from some(2, [Case(f"{script} {file.split('/')[0]}", named, (), file, how) for script, how in rows])


def wrong_places():
    for row in PLACES:
        command, flags, named = re.fullmatch("(.*?): (.*?)(?: -> (.*))?", row).groups()
        yield Case(command, (named or flags.split()[-1],), tuple(shlex.split(flags)))


FILES = [*damaged_checkpoints(), *damaged_records(), *wrong_fields(), *wrong_places()]


@each(FILES)
def test_files_that_cannot_be(case, refused, world):
    main, flags = command_of(case.command, case.flags)
    world([*flags, case.file])
    Path("empty").mkdir()
    if case.file:
        spoil(Path(case.file), case.how)
    refused(main, flags, 1, *case.named)


# the same commands unspoiled, so that a case fails for its own reason
UNSPOILED = {(command, ()) for command in COMMANDS if command not in READERS}
UNSPOILED |= {(case.command, case.flags) for case in FILES if case.file}


@pytest.mark.parametrize(("command", "flags"), sorted(UNSPOILED), ids=str)
def test_commands_work(command, flags, command_line, world):
    main, flags = command_of(command, flags)
    world(flags)
    status, err = command_line(main, flags)
    assert status == 0, err


@pytest.mark.parametrize("text", ["x", " ", "x1", "\u4e2d"])
def test_a_huge_line_is_no_reason_to_hang(text, command_line, world):
    world(["data.txt"])
    Path("data.txt").write_text(f"one\n{text * 200_000}\ntwo", encoding="utf-8")
    status, err = command_line(*command_of("train records", ("--dataset_args", "data.txt")))
    assert status == 0, err
