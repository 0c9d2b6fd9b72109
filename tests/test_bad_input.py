"""Wrong flags and damaged files: one line that names the cause, the right exit status, and nothing left behind.

    flags that cannot be, alone or together      status 2, before anything is read
    files that cannot be                         status 1

A case is a row: a command that works, and what spoils it (flags that are appended, a file that is damaged). Rows of
wrong types are made from the parsers, so that a new flag is covered by itself. `test_commands_work` runs every command
unspoiled, so that a case fails for its own reason. Commands run in a folder of their own, `world`, by relative paths.
"""

import functools
import gzip
import io
import json
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

import convert
import evaluate
import models
import sample
import toy
import train
from plumbing import checkpoints, cli, streaming
from plumbing.tokenizer import train_tokenizer

SECONDS = 20  # after which a command counts as hanging
LONGEST = 1500  # characters of an error

# ------------------------------------------------------------------------------------------------------- commands

SCRIPTS = {"train": train, "sample": sample, "convert": convert, "evaluate": evaluate}
TOY = "--dataset_args toy[train:8,test:2]"
TRAIN = "--method editflow --max_steps 1 --eval_strategy no --vocab_size 300 --output_dir out"
SAMPLE = "--steps 2 --init_num 4 --output texts.jsonl --prompt Ann"
EVALUATE = "--steps 2 --limit 2 --output_dir evaluation"
COMMANDS = {  # each works in `world`
    "train": (train, f"{TRAIN} {TOY}"),
    "train medlm": (train, f"{TRAIN} {TOY} --method medlm"),
    "train from": (train, f"{TRAIN} {TOY} --model_name_or_path flow"),
    "train from shards": (train, f"{TRAIN} {TOY} --model_name_or_path shards"),
    "train from sentencepiece": (train, f"{TRAIN} {TOY} --model_name_or_path spiece"),
    "train on": (train, f"{TRAIN} --max_length 64"),
    "train streamed": (train, f"{TRAIN} --max_length 64 --streaming"),
    "train again": (train, f"{TRAIN} {TOY} --output_dir run --max_steps 2"),
    "train adapters again": (
        train, f"{TRAIN} {TOY} --lora --model_name_or_path flow --output_dir adapted --max_steps 2",
    ),
    "sample": (sample, f"{SAMPLE} --model_name_or_path flow"),
    "sample medlm": (sample, f"{SAMPLE} --model_name_or_path medlm"),
    "sample shards": (sample, f"{SAMPLE} --model_name_or_path shards"),
    "sample sentencepiece": (sample, f"{SAMPLE} --model_name_or_path spiece"),
    "sample chat": (sample, f"{SAMPLE} --model_name_or_path chat"),
    "sample adapters": (sample, f"{SAMPLE} --model_name_or_path adapted"),
    "sample prompts": (sample, "--model_name_or_path flow --steps 2 --output texts.jsonl"),
    "convert": (convert, "--to medlm -i flow -o out"),
    "convert to editflow": (convert, "--to editflow -i flow -o out"),
    "convert shards": (convert, "--to hf -i shards -o out"),
    "convert sentencepiece": (convert, "--to hf -i spiece -o out"),
    "convert adapters": (convert, "--to hf -i adapted/checkpoint-final -o out --merge_lora"),
    "convert bin": (convert, "--to hf -i bin -o out"),
    "convert bin index": (convert, "--to hf -i bins -o out"),
    "convert words": (convert, "--to hf -i words -o out"),
    "convert merges": (convert, "--to hf -i merges -o out"),
    "evaluate": (evaluate, f"{EVALUATE} --path flow --task toy"),
    "evaluate shards": (evaluate, f"{EVALUATE} --path shards --task toy"),
    "evaluate adapters": (evaluate, f"{EVALUATE} --path adapted --task toy"),
    "evaluate gsm8k": (evaluate, f"{EVALUATE} --path flow --task gsm8k"),
    "evaluate humaneval": (evaluate, f"{EVALUATE} --path flow --task humaneval"),
    "evaluate mbpp": (evaluate, f"{EVALUATE} --path flow --task mbpp"),
}  # fmt: skip
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = "one two three four five six seven eight nine ten"
RECORDS = [{"question": f"How much is {i} and 1?", "answer": f"That makes {i + 1}. #### {i + 1}"} for i in range(6)]
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    f()\n"}
MBPP = {"task_id": 2, "prompt": '"""\nNegate.\nassert neg(2) == -2\n"""\n', "test_list": [], "test_imports": []}


def build_world(root: Path) -> None:
    """Everything that the commands read."""
    words = toy.tokenizer()
    model = checkpoints.new_model("editflow", "tiny", words.vocab_size, schedule="cubic", x0_sampler="masks[length:4]")
    for name in ("flow", "shards", "bin", "bins", "words", "merges"):
        checkpoints.save(model, root / name)
        words.save(root / name)
    medlm = checkpoints.new_model("medlm", "tiny", words.vocab_size)
    checkpoints.save(medlm, root / "medlm")
    words.save(root / "medlm")
    chat = train_tokenizer([WORDS], 300)
    checkpoints.save(checkpoints.new_model("editflow", "tiny", chat.vocab_size, x0_sampler="empty"), root / "chat")
    chat.save(root / "chat")

    part = "model-00001-of-00001.safetensors"
    (root / "shards/model.safetensors").rename(root / "shards" / part)
    index = {"weight_map": dict.fromkeys(load_file(root / "shards" / part), part)}
    write_json(root / "shards/model.safetensors.index.json", index)
    torch.save(load_file(root / "bin/model.safetensors"), root / "bin/pytorch_model.bin")
    shutil.copy(root / "bin/pytorch_model.bin", root / "bins/pytorch_model-1.bin")
    index = {"weight_map": dict.fromkeys(load_file(root / "bins/model.safetensors"), "pytorch_model-1.bin")}
    write_json(root / "bins/pytorch_model.bin.index.json", index)
    for name in ("bin", "bins"):
        (root / name / "model.safetensors").unlink()

    vocabulary = sorted(words.backend.get_vocab(), key=words.backend.token_to_id)
    for name in ("words", "merges"):
        (root / name / "tokenizer.json").unlink()
    (root / "words/vocab.txt").write_text("".join(f"{token}\n" for token in [*vocabulary[:-3], "[UNK]", "[CLS]", "[SEP]"]))
    letters = ["a", "b", "ab", *vocabulary[:20]]
    write_json(root / "merges/vocab.json", {token: i for i, token in enumerate(letters)})
    (root / "merges/merges.txt").write_text("#version: 0.2\na b\n")

    (root / "spiece").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 9), model_prefix=str(root / "spiece/tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (root / "spiece/tokenizer.vocab").unlink()
    write_json(root / "spiece/tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    checkpoints.save(checkpoints.new_model("editflow", "tiny", 320, x0_sampler="empty"), root / "spiece")

    for name, text in formats().items():
        (root / name).write_bytes(text)
        (root / f"{name}.gz").write_bytes(gzip.compress(text))
    for name, record in (("humaneval", HUMANEVAL), ("mbpp", MBPP)):
        (root / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    for command in ("train again", "train adapters again", "evaluate"):
        script, flags = COMMANDS[command]
        script.main([*shlex.split(flags), *(["--max_steps", "1"] if script is train else [])])
    adapters = root / "adapted/checkpoint-final/adapter_config.json"
    write_json(adapters, json.loads(adapters.read_text()) | {"base_model_name_or_path": "flow"})


def formats() -> dict[str, bytes]:
    """The same records in all formats."""
    rows, table = [list(record.values()) for record in RECORDS], io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), table)
    texts = {
        "data.txt": "".join(f"{question} {answer}\n" for question, answer in rows) * 4,
        "data.jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS),
        "data.json": json.dumps(RECORDS),
        "data.csv": "question,answer\n" + "".join(f"{question},{answer}\n" for question, answer in rows),
    }
    return {name: text.encode() for name, text in texts.items()} | {"data.parquet": table.getvalue()}


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.PRESETS, "tiny", SIZE)
        patch.chdir(root)
        build_world(root)
    return root


class Hanging(BaseException):
    """No Exception, so that no script can take it for an error of its own."""


@pytest.fixture
def world(original, tmp_path, monkeypatch):
    """Makes copies to spoil of what a command names (and of `flow`, to which the adapters belong), in the current
    folder."""

    def copy(*flags):
        named = set(re.findall(r"[\w.]+", " ".join(flags))) | {"flow"}
        for source in (path for path in original.iterdir() if path.name in named):
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / source.name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.PRESETS, "tiny", SIZE)
    return copy


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script as the shell would: (exit status, stderr)."""

    def hub(name, **options):
        raise ConnectionError("no route to the hub")

    def stop(number, frame):
        raise Hanging

    def start(script, flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["script.py", *flags])
        signal.alarm(SECONDS)
        with pytest.raises(SystemExit) as end:
            cli.run(script.main)
        signal.alarm(0)
        return end.value.code, capsys.readouterr().err

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.setattr(streaming, "WAITS", (0.01,))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGALRM, stop)
    yield start
    signal.alarm(0)
    for number, handler in before.items():
        signal.signal(number, handler)


def contents(root: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------------------------------- flags


class Flag(NamedTuple):
    """A flag that cannot be, behind a command that works."""

    script: str
    flags: tuple[str, ...]
    said: str

    @property
    def id(self) -> str:
        return shown(self.script, *self.flags)


def shown(*words: str) -> str:
    """Words as the id of a test: short, printable."""
    return " ".join(repr(word)[1:-1][:60] if word else "''" for word in words)


class Found(Exception):
    pass


def parser_of(script) -> cli.Flags:
    """The parser that the script builds."""

    def stop(parser, argv=None):
        raise Found(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.Flags, "parse_args", stop)
        with pytest.raises(Found) as found:
            script.parse_args([])
    return found.value.args[0]


NO_NUMBER = ["abc", "", "nan", "inf", "1e999", "1,5", "9" * 5000]
NO_BOOLEAN = ["abc", "", "nan", "2"]
NO_CHOICE = ["abc", "", "nan", "-1"]


def wrong_values(action) -> list[str]:
    """What a flag cannot be, from its type."""
    kind = action.type
    if kind is cli.boolean:
        return NO_BOOLEAN
    if action.choices:
        return [*NO_CHOICE, next(iter(action.choices)).upper()]
    if isinstance(kind, cli.number):
        step = 1 if kind.kind is int else 1e-6
        beyond = [str(limit - step) for limit in (kind.low,) if limit is not None]
        beyond += [str(limit + step) for limit in (kind.high,) if limit is not None]
        beyond += [str(limit) for limit in (kind.above, kind.below) if limit is not None]
        return NO_NUMBER + beyond + (["1.5", "-1", "1" + "0" * 30] if kind.kind is int else ["-1"])
    if kind in (int, float):  # should be cli.number, which refuses what is not finite
        return NO_NUMBER
    if kind is cli.text:
        return ["\udcff"]
    if kind is None:
        return ["", " "]
    return ["", "no such["]  # a small language of its own


def wrong_types():
    for name, script in SCRIPTS.items():
        parser = parser_of(script)
        for action in parser._actions:
            if action.dest == "help":
                continue
            flag = max(action.option_strings, key=len)
            for value in wrong_values(action):
                yield Flag(name, (f"{flag}={value}",), flag)
            if action.nargs in (None, "+"):
                yield Flag(name, (flag,), flag)
            yield Flag(name, (flag[:-1] + "_",), flag[:-1] + "_")


IMPOSSIBLE = [
    Flag("train", ("--preset", "huge"), "--preset"),
    Flag("train", ("--schedule", "quartic"), "schedule 'quartic' is not known"),
    Flag("train", ("--schedule", "cubic[a:-9]"), "kappa falls"),
    Flag("train", ("--schedule", "cubic[a]"), "cannot read 'a'"),
    Flag("train", ("--schedule", "linear[a:1]"), "cannot read 'a:1'"),
    Flag("train", ("--schedule", "cubic[a:nan]"), "cannot read 'a:nan'"),
    Flag("train", ("--x0_sampler", "noise"), "x0_sampler 'noise' is not known"),
    Flag("train", ("--x0_sampler", "masks[size:3]"), "cannot read 'size:3'"),
    Flag("train", ("--x0_sampler", "masks[length:1.5]"), "whole number"),
    Flag("train", ("--x0_sampler", "masks[length:-1]"), "whole number"),
    Flag("train", ("--x0_sampler", "masks[length:1e300]"), "length"),
    Flag("train", ("--x0_sampler", "uniform[length:99999999999]"), "length"),
    Flag("train", ("--dataset_args", "toy["), "--dataset_args"),
    Flag("train", ("--dataset_args", "toy[trian:5]"), "--dataset_args"),
    Flag("train", ("--dataset_args", "toy + + toy"), "--dataset_args"),
    Flag("train", ("--dataset_args", "toy[train:5,train:6]"), "--dataset_args"),
    Flag("train", ("--dataset_args", "toy[train:-5]"), "--dataset_args"),
    Flag("train", ("--adam_beta2", "1"), "--adam_beta2"),
    Flag("train", ("--vocab_size", "4000000000"), "--vocab_size"),
    Flag("train", ("--method", "editflow", "medlm"), "medlm"),
    Flag("train", ("--max_length", "1"), "--max_length"),
    Flag("train", ("--mask_diffusion_pred_per_step", "2", "0"), "--mask_diffusion_pred_per_step"),
    Flag("train", ("surplus",), "surplus"),
    Flag("train", ("--methid", "x"), "--methid"),
    Flag("sample", ("--x0_sampler", "noise"), "x0_sampler 'noise' is not known"),
    Flag("sample", ("--x0_sampler", "masks[size:3]"), "cannot read 'size:3'"),
    Flag("sample", ("--x0_sampler", "masks[length:1e300]"), "--x0_sampler"),
    Flag("sample", ("--prompt", "fine", "\udcff"), "--prompt"),
    Flag("sample", ("--tau", "5e-324"), "--tau"),
    Flag("sample", ("--tau", "1.0000001"), "--tau"),
    Flag("sample", ("--draft", "\ud800"), "--draft"),
    Flag("convert", ("--x0_sampler", "noise"), "x0_sampler 'noise' is not known"),
    Flag("convert", ("--schedule", "quartic"), "schedule 'quartic' is not known"),
    Flag("convert", ("--schedule", "cubic[a:-9]"), "kappa falls"),
    Flag("evaluate", ("--x0_sampler", "uniform[length:x]"), "--x0_sampler"),
    Flag("evaluate", ("--task", "toy", "sudoku"), "unknown task 'sudoku'"),
    Flag("evaluate", ("--data", "toy"), "--data"),
    Flag("evaluate", ("--data", "toy="), "--data"),
    Flag("evaluate", ("--data", "=x"), "--data"),
    Flag("evaluate", ("--data", "sudoku=x"), "unknown task 'sudoku'"),
    Flag("evaluate", ("--data", "gsm8k=x"), "--data gsm8k"),
    Flag("evaluate", ("--data", "toy=x"), "--data toy"),
    Flag("evaluate", ("--task", "gsm8k", "--data", "gsm8k=a", "gsm8k=b"), "--data gsm8k: given twice"),
    Flag("evaluate", ("--tau", "1e-320"), "--tau"),
]  # fmt: skip


class Clash(NamedTuple):
    """Flags that are fine without each other."""

    script: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    said: str

    @property
    def id(self) -> str:
        return shown(self.script, *self.first, *self.second)


CLASHES = [
    Clash("train", ("--min_t", "0.6"), ("--max_t", "0.5"), "--min_t 0.6 must be below --max_t 0.5"),
    Clash("train", ("--min_t", "0.5"), ("--max_t", "0.5"), "--min_t 0.5 must be below --max_t 0.5"),
    Clash("train", ("--intermediate_min_t", "0.6"), ("--intermediate_max_t", "0.5"), "--intermediate_min_t 0.6"),
    Clash("train", ("--pad_len", "300"), ("--max_length", "200"), "--pad_len 300 must not exceed --max_length 200"),
    Clash("train", ("--method", "medlm"), ("--max_t", "1e-9"), "--max_t 1e-09"),
    Clash(
        "train", ("--intermediate_ratio", "1", "--pad_len", "8"), ("--insert_eos", "False"), "--insert_eos",
    ),
    Clash("sample", ("--tau", "0.1"), ("--steps", "3"), "--tau and --steps"),
    Clash("sample", ("--mask_length", "0"), ("--x0_sampler", "empty"), "--mask_length N means --x0_sampler"),
    Clash("sample", ("--prompt", "a"), ("--prompt_file", "b"), "--prompt_file: not allowed with argument --prompt"),
    Clash("sample", ("--interactive",), ("--prompt", "a"), "--interactive"),
    Clash("sample", ("--interactive",), ("--prompt_file", "a"), "--interactive"),
    Clash("sample", ("--interactive",), ("--output", "a"), "--output does not go with --interactive"),
    Clash("sample", ("--interactive",), ("--draft", "a"), "--draft does not go with --interactive"),
    Clash("sample", ("--interactive",), ("--num_samples", "2"), "--num_samples does not go with --interactive"),
    Clash("sample", ("--interactive",), ("--make_gif",), "--make_gif does not go with --interactive"),
    Clash("sample", ("--interactive",), ("--make_html", "a"), "--make_html does not go with --interactive"),
    Clash("sample", ("--draft", "a"), ("--mask_length", "3"), "--draft is where to start"),
    Clash("sample", ("--draft", "a"), ("--x0_sampler", "empty"), "--draft is where to start"),
    Clash("sample", ("--output", "a"), ("--prompt_file", "a"), "--prompt_file and --output name the same file"),
    Clash("sample", ("--output", "a"), ("--make_gif", "./a"), "--output and --make_gif name the same file"),
    Clash("sample", ("--make_gif", "a"), ("--make_html", "a"), "--make_gif and --make_html name the same file"),
    Clash("convert", ("--to", "hf"), ("--schedule", "linear"), "--to editflow only"),
    Clash("convert", ("--to", "medlm"), ("--x0_sampler", "empty"), "--to editflow only"),
    Clash("convert", ("--to", "bidirectional"), ("--time_conditioned",), "--to editflow only"),
    Clash("evaluate", ("--tau", "0.1"), ("--steps", "3"), "--tau and --steps"),
    Clash("evaluate", ("--mask_length", "3"), ("--x0_sampler", "empty"), "--mask_length N means --x0_sampler"),
]  # fmt: skip
BARE = {  # the least that a script asks for
    "train": f"--method editflow --output_dir out {TOY}",
    "sample": "--model_name_or_path flow",
    "convert": "--to editflow -i flow -o out",
    "evaluate": "--path flow --task toy",
}
LACKING = [  # flags without which nothing goes
    Flag("train", ("--output_dir", "out"), "--method"),
    Flag("train", ("--method", "medlm"), "--output_dir"),
    Flag("train", ("--streaming", *TOY.split(), *BARE["train"].split()), "--streaming"),
    Flag("train", (*BARE["train"].split(), "--streaming", "--max_steps", "1", "--eval_strategy", "epoch"), "--stream"),
    Flag("train", (*BARE["train"].split(), "--lora"), "--lora adapts a checkpoint"),
    Flag("train", (*BARE["train"].split(), "--load_in_4bit"), "--load_in_4bit needs --lora"),
    Flag("sample", (), "--model_name_or_path"),
    Flag("sample", ("--model_name_or_path", "flow", "--x0_sampler", "draft"), "--x0_sampler draft"),
    Flag("convert", ("-i", "flow", "-o", "out"), "--to"),
    Flag("convert", ("--to", "hf", "-o", "out"), "--model_name_or_path"),
    Flag("convert", ("--to", "hf", "-i", "flow"), "--output_dir"),
    Flag("evaluate", ("--task", "toy"), "--path"),
]


def rows(cases) -> list:
    return [pytest.param(case, id=case.id) for case in cases]


def refused(run, script, flags, status: int, said: str) -> None:
    """The command ends with this status and one line that contains `said`; no file is written, changed or removed."""
    before = contents(Path())
    found, err = run(script, list(flags))
    assert "Traceback" not in err
    *_, last = err.splitlines()
    assert last.startswith("script.py: error: "), err
    assert said in last
    assert len(last) < LONGEST
    assert found == status, last
    if status == 2:
        assert len(err.splitlines()) == 1
    assert contents(Path()) == before


@pytest.mark.parametrize("case", rows([*wrong_types(), *IMPOSSIBLE]))
def test_flags_that_cannot_be(case, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # empty: what is wrong is seen before anything is read
    refused(run, SCRIPTS[case.script], [*BARE[case.script].split(), *case.flags], 2, case.said)


@pytest.mark.parametrize("case", rows(LACKING))
def test_flags_that_are_lacking(case, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run, SCRIPTS[case.script], case.flags, 2, case.said)


@pytest.mark.parametrize("case", rows(CLASHES))
def test_flags_that_contradict_each_other(case, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, bare = SCRIPTS[case.script], BARE[case.script].split()
    for alone in (case.first, case.second):
        script.parse_args([*bare, *alone])
    refused(run, script, [*bare, *case.first, *case.second], 2, case.said)


# ------------------------------------------------------------------------------------------------------- files


class Damage(NamedTuple):
    """A damaged file, read by a command that works with the file as it was."""

    command: str  # a key of COMMANDS
    file: str
    how: str  # a key of DAMAGES, one of WHOLE, "field = value", or the file's new text
    said: str
    flags: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        lines = self.how.split("\n")
        return shown(self.command, self.file, lines[1] if len(lines) > 2 else self.how)


DAMAGES = {  # what a file holds -> what it holds then
    "empty": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) * 3 // 5],
    "truncated by a byte": lambda raw: raw[:-1],
    "binary": lambda raw: bytes(range(256)) * 9,
    "utf-16": lambda raw: raw.decode().encode("utf-16"),
    "latin-1": lambda raw: raw[:2] + b"\xe9" + raw[2:],
    "nested": lambda raw: b'{"a":' * 100_000,
    "nested lists": lambda raw: b"[" * 100_000,
    "huge line": lambda raw: b'"' + b"x" * 1_000_000,
    "huge number": lambda raw: b"9" * 10_000,
    "a list": lambda raw: b"[]",
    "a number": lambda raw: b"7",
    "null": lambda raw: b"null",
    "a text": lambda raw: b'"text"',
    "huge header": lambda raw: b"\xff" * 7 + b"\x7f" + raw[8:],
    "another header": lambda raw: raw[:8] + b"[" + raw[9:],
    "not gzip": lambda raw: gzip.decompress(raw),
    "gzip of nothing": lambda raw: gzip.compress(b""),
    "gzip broken inside": lambda raw: raw[: len(raw) // 2] + b"\0\0\0" + raw[len(raw) // 2 + 3 :],
    "gzip of binary": lambda raw: gzip.compress(bytes(range(256)) * 9),
}
WHOLE = ("a folder", "missing")  # and these


def spoil(file: Path, how: str) -> None:
    raw = file.read_bytes()
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif change := re.fullmatch(r"([\w.]+) = (.*)", how):
        *outer, field = change[1].split(".")
        value = json.loads(raw)
        functools.reduce(dict.get, outer, value)[field] = json.loads(change[2])
        file.write_text(json.dumps(value))
    elif how != "missing":
        file.write_bytes(DAMAGES[how](raw) if how in DAMAGES else how.encode("utf-8", "surrogatepass"))


NO_JSON = ["empty", "truncated", "binary", "utf-16", "latin-1", "nested", "nested lists", "huge line", "huge number"]
NO_OBJECT = [*NO_JSON, "a list", "a number", "null", "a text"]
NO_TENSORS = ["empty", "truncated", "truncated by a byte", "binary", "huge header", "another header"]
FINAL, ADAPTED = "run/checkpoint-final", "adapted/checkpoint-final"
CHECKPOINTS = [  # (commands and the folder that each reads, file, how it is damaged)
    (["train from:flow", "sample:flow", "convert:flow", "evaluate:flow"], "config.json", [*NO_OBJECT, *WHOLE]),
    ([f"sample adapters:{ADAPTED}", f"convert adapters:{ADAPTED}"], "config.json", [*NO_OBJECT, "a folder"]),
    (["train from:flow", "sample:flow", "convert:flow", "evaluate:flow"], "tokenizer.json", [*NO_OBJECT, "a folder"]),
    (["train from:flow", "sample:flow", "convert:flow"], "tokenizer_config.json", [*NO_OBJECT, "a folder"]),
    (["convert words:words", "convert merges:merges"], "tokenizer_config.json", [*NO_OBJECT, "a folder"]),
    (["sample:flow", "convert words:words"], "special_tokens_map.json", [*NO_OBJECT, "a folder"]),
    (["sample chat:chat"], "chat_template.jinja", ["binary", "latin-1", "a folder"]),
    (["train from sentencepiece:spiece", "sample sentencepiece:spiece", "convert sentencepiece:spiece"],
     "tokenizer.model", ["empty", "truncated", "truncated by a byte", "binary", "a folder", "missing"]),
    (["convert words:words"], "vocab.txt", ["empty", "binary", "utf-16", "latin-1", "a text", "a folder", "missing"]),
    (["convert merges:merges"], "vocab.json", [*NO_OBJECT, *WHOLE]),
    (["convert merges:merges"], "merges.txt", ["binary", "utf-16", "latin-1", "a text", "huge line", *WHOLE]),
    (["train from:flow", "sample:flow", "convert:flow", "evaluate:flow"], "model.safetensors", [*NO_TENSORS, *WHOLE]),
    ([f"train again:{FINAL}"], "model.safetensors", [*NO_TENSORS, *WHOLE]),
    (["train from shards:shards", "sample shards:shards", "convert shards:shards", "evaluate shards:shards"],
     "model.safetensors.index.json", [*NO_OBJECT, *WHOLE]),
    (["sample shards:shards", "convert shards:shards"], "model-00001-of-00001.safetensors", [*NO_TENSORS, *WHOLE]),
    (["convert bin:bin"], "pytorch_model.bin", ["empty", "truncated", "truncated by a byte", "binary", *WHOLE]),
    (["convert bin index:bins"], "pytorch_model.bin.index.json", [*NO_OBJECT, *WHOLE]),
    (["convert bin index:bins"], "pytorch_model-1.bin", ["empty", "truncated", "binary", *WHOLE]),
    ([f"train adapters again:{ADAPTED}", f"sample adapters:{ADAPTED}", f"convert adapters:{ADAPTED}",
      f"evaluate adapters:{ADAPTED}"], "adapter_config.json", NO_OBJECT),
    ([f"train adapters again:{ADAPTED}", f"sample adapters:{ADAPTED}", f"convert adapters:{ADAPTED}",
      f"evaluate adapters:{ADAPTED}"], "adapter_model.safetensors", [*NO_TENSORS, *WHOLE]),
    ([f"train adapters again:{ADAPTED}", f"sample adapters:{ADAPTED}", f"convert adapters:{ADAPTED}",
      f"evaluate adapters:{ADAPTED}"], "heads.safetensors", [*NO_TENSORS, *WHOLE]),
    ([f"train again:{FINAL}"], "train_state.json", [*NO_OBJECT, "a folder"]),
    ([f"train again:{FINAL}"], "optimizer.safetensors", [*NO_TENSORS, *WHOLE]),
    (["train again:run"], "metrics.jsonl", ["binary", "utf-16", "latin-1", "a folder"]),
    (["evaluate:evaluation"], "toy.rank0.jsonl", ["binary", "utf-16", "latin-1", "a folder"]),
]  # fmt: skip


def named(folder: str, file: str, how: str) -> str:
    """What an error about a file must name: the file, or the folder in which it is looked for."""
    return folder if how in WHOLE else f"{folder}/{file}"


def broken_checkpoints():
    for commands, file, damages in CHECKPOINTS:
        for command, folder in (entry.split(":") for entry in commands):
            for how in damages:
                yield Damage(command, f"{folder}/{file}", how, named(folder, file, how))


READERS = {  # what reads files of records, and the flag that names them
    "train on": ("--dataset_args", "{}"),
    "train streamed": ("--dataset_args", "{}"),
    "sample prompts": ("--prompt_file", "{}"),
    "evaluate gsm8k": ("--data", "gsm8k={}"),
}
LINES = ["{", "[]", "7", "null", '"text"', "{}", '{"question": "Why?", "answer": ', '{"question": 5, "answer": "a"}',
         '{"question": "\\ud800", "answer": "a"}', '{"question": null, "answer": null}', "[" * 5000, "9" * 5000,
         "NaN", '{"question": ["a"], "answer": {}}']  # fmt: skip
RECORD_DAMAGES = {
    "data.txt": ["empty", "binary", "utf-16", "latin-1", "a folder", "missing"],
    "data.jsonl": ["empty", "truncated", "utf-16", "binary", "latin-1", "nested", "nested lists", "huge line",
                   "huge number", "a list", "a number", "null", "a text", *WHOLE],
    "data.json": [*NO_JSON, "a list", "a number", "null", "a text", *WHOLE],
    "data.csv": ["empty", "binary", "utf-16", "latin-1", "huge line", *WHOLE],
    "data.parquet": ["empty", "truncated", "truncated by a byte", "binary", *WHOLE],
}  # fmt: skip
PACKED = ["empty", "truncated", "truncated by a byte", "binary", "not gzip", "gzip of nothing", "gzip broken inside",
          "gzip of binary", "a folder", "missing"]  # fmt: skip


def broken_records():
    for command, (flag, value) in READERS.items():
        for name, damages in RECORD_DAMAGES.items():
            if command == "evaluate gsm8k" and name == "data.txt":
                continue  # no task is read from plain text
            if command == "train streamed" and name == "data.json":
                continue  # see `places`
            for file, ways in ((name, damages), (f"{name}.gz", PACKED)):
                for how in ways:
                    yield Damage(command, file, how, file, (flag, value.format(file)))
        for line in LINES:
            text = f"{json.dumps(RECORDS[0])}\n{line}\n{json.dumps(RECORDS[1])}\n"
            said = f"data.jsonl: byte {text.index(line, 2)}" if command == "train streamed" else "data.jsonl:2:"
            yield Damage(command, "data.jsonl", text, said, (flag, value.format("data.jsonl")))


# complete only with the flag of a case
NEED_DATA = {(command, ()) for command in ("train on", "train streamed", "evaluate gsm8k")}


def with_field(command: str, file: str, field: str, said: str, *values) -> list[Damage]:
    """A JSON file with other values in one of its fields; "a.b" is field b of the object in field a."""
    return [Damage(command, file, f"{field} = {json.dumps(value)}", said) for value in values]


LONG = 10**12
SIZES = ("x", None, 0, -1, 1.5, [], {}, LONG)
CONFIG = {  # field -> (what the error must contain, values that cannot be)
    "model_type": ("model_type", 5, None, "gpt2", [], {}),
    "vocab_size": ("vocab_size", *SIZES[:-1]),
    "hidden_size": ("hidden_size", *SIZES[:-1]),
    "num_hidden_layers": ("num_hidden_layers", *SIZES[:-1]),
    "num_attention_heads": ("num_attention_heads", *SIZES[:-1], 3),
    "num_key_value_heads": ("num_key_value_heads", "x", -1, 1.5, [1], 3),
    "head_dim": ("head_dim", "x", -2, 1.5, [8], 7),
    "intermediate_size": ("intermediate_size", *SIZES[:-1]),
    "max_position_embeddings": ("max_position_embeddings", "x", None, 0, -1, 1.5, [], {}),
    "rope_theta": ("rope_theta", "x", None, 0, -1, []),
    "rope_scaling": ("rope", "x", 5, {"rope_type": "yarn", "factor": 2}, {"rope_type": "linear"}),
    "rope_parameters": ("rope", "x", 5, {"rope_theta": "x"}, {"full_attention": 5}),
    "rms_norm_eps": ("rms_norm_eps", "x", None, -1, []),
    "hidden_act": ("hidden_act", "relu", 5, []),
    "nanoedit": ("nanoedit", "x", 5, None, [1]),
    "nanoedit.method": ("method", 5, "x", [], {}),
    "nanoedit.schedule": ("schedule", 5, "quartic", [], None, {}),
    "nanoedit.x0_sampler": ("x0_sampler", 5, "noise", [], None, {}),
}
MISFITS = {  # sizes of another model
    "vocab_size": ("has shape", 7, LONG),
    "hidden_size": ("has shape", 15, LONG),
    "intermediate_size": ("has shape", 8, LONG),
    "num_hidden_layers": ("'model.layers.1.", 2),
    "nanoedit.time_conditioned": ("time_embed", True),
    "nanoedit.x0_sampler": ("positions", "masks[length:100000]"),
}
TOKENS = {
    "added_tokens_decoder": ("added_tokens_decoder", [], "x", 5, {"a": {"content": "b"}}, {"1": 5}, {"1": {}},
                             {"1": {"content": 5}}),
    "chat_template": ("chat_template", 5, {}, [1], [{"name": "default"}], [{"name": "default", "template": 5}]),
}  # fmt: skip
TEMPLATES = ("{% for", "{{ 1 / 0 }}", "{{ messages[9].content }}", "{% include 'a' %}", "{{ raise_exception('no') }}",
             "{{ ''.__class__.__mro__ }}")  # fmt: skip
TOO_MANY = {"type": "WordLevel", "vocab": {"a": 10**6, "<|unk|>": 0}, "unk_token": "<|unk|>"}
VOCABULARY = {
    "model": ("tokenizer.json", {}, [], "x", 5, {"type": "BPE"}, {"type": "no such"},
              {"type": "BPE", "vocab": {"a": "x"}, "merges": []}),
    "added_tokens": ("tokenizer.json", "x", {}, [5], [{"id": -1, "content": "a"}]),
    "decoder": ("tokenizer.json", 5, {"type": "no such"}),
}  # fmt: skip
ADAPTERS = {
    "r": ("'r'", 0, -1, "x", None, 1.5, [], {}, True, LONG),
    "lora_alpha": ("'lora_alpha'", "x", None, [], {}, True, float("nan"), float("inf")),
    "lora_dropout": ("'lora_dropout'", "x", 2, -1, []),
    "base_model_name_or_path": ("'base_model_name_or_path'", 5, None, [], {}, ""),
}
BASES = {"nowhere": "nowhere: no such directory", "flow/config.json": "flow/config.json", "adapted": "holds adapters"}
INDEX = (5, "x", None, [], {"a": 5}, {"a": None}, {"a": ["b"]})
STATE = {"step": ("train_state.json", "x", None, -1, 0.5, [], {}, True), "args": ("train_state.json", 5, "x", None, [])}
ROW = {"key": "a", "prompt": "", "response": "", "draft": None, "tokens": 1, "mask_passes": 1, "edit_passes": 1,
       "seconds": 1.0, "draft_right": None, "right": True, "draft_valid": None, "valid": True}  # fmt: skip
RESULTS = {"response": (None, 5, []), "draft": (5,), "tokens": ("x", None, 1.5), "seconds": ("x", None), "prompt": (5,),
           "right": ("yes", 2, []), "valid": ("yes",), "mask_passes": (None,), "edit_passes": ({},)}  # fmt: skip
DIALOGUES = ['{"messages": "x"}', '{"messages": {}}', '{"messages": []}', '{"messages": [5]}', '{"messages": [{}]}',
             '{"messages": [{"role": "user"}]}', '{"messages": [{"role": "user", "content": 5}]}',
             '{"messages": [{"role": 5, "content": "a"}]}', '{"history": 5, "response": "a"}',
             '{"instruction": "a", "output": "b", "input": 5}', '{"prompt": 5, "response": "a"}',
             '{"prompt": "", "response": "a"}', '{"color": "red"}']  # fmt: skip
ANSWERS = ['{"prompt": "a", "response": 5}', '{"prompt": "a", "response": ""}', '{"prompt": "a"}', '{"text": 5}',
           '{"messages": [{"role": "user", "content": "a"}]}', '{"prompt": "a", "response": "b", "draft": 5}',
           '{"text": "\\udfff"}', '{"text": " "}']  # fmt: skip


def wrong_fields():
    config, settings = "flow/config.json", "flow/tokenizer_config.json"
    for fields in (CONFIG, MISFITS):
        for field, (said, *values) in fields.items():
            yield from with_field("sample", config, field, said, *values)
    for command in ("train from", "convert to editflow", "evaluate"):
        for field, (said, *values) in CONFIG.items():
            yield from with_field(command, config, field, said, values[0])
    for field, (said, *values) in TOKENS.items():
        for command in ("sample", "convert", "train from", "evaluate"):
            yield from with_field(command, settings, field, said, *values)
    yield from with_field("sample", settings, "chat_template", "the chat template fails", *TEMPLATES)
    for command in ("train from", "convert", "sample", "evaluate"):
        for field, (said, *values) in VOCABULARY.items():
            yield from with_field(command, "flow/tokenizer.json", field, said, *values)
        yield from with_field(command, "flow/tokenizer.json", "model", "tokens", TOO_MANY)
    for command in ("train adapters again", "sample adapters", "convert adapters", "evaluate adapters"):
        file = f"{ADAPTED}/adapter_config.json"
        for field, (said, *values) in ADAPTERS.items():
            yield from with_field(command, file, field, said, *values)
        yield from with_field(command, file, "r", "has shape", 7)
        for base, said in BASES.items():
            yield from with_field(command, file, "base_model_name_or_path", said, base)
    for command in ("sample shards", "convert shards"):
        file = "shards/model.safetensors.index.json"
        yield from with_field(command, file, "weight_map", "index.json", *INDEX)
        yield from with_field(command, file, "weight_map", "nowhere: missing", {"a": "nowhere"})
        yield from with_field(command, file, "weight_map", "is missing", {})
    for field, (said, *values) in STATE.items():
        yield from with_field("train again", f"{FINAL}/train_state.json", field, said, *values)
    rows = "evaluation/toy.rank0.jsonl"
    for line in ("{", "[1]", "7", "null", "{}", '{"key": 5}', '{"key": []}', "", "[" * 5000):
        yield Damage("evaluate", rows, f"{json.dumps(ROW)}\n{line}\n", f"{rows}:2")
    for field, values in RESULTS.items():
        for value in values:
            row = json.dumps({field: value} | ROW | {field: value}) + "\n"
            yield Damage("evaluate", rows, row, f"{rows}: the row of key 'a' lacks a usable {field!r}")
    yield Damage("evaluate", rows, '{"key": "a"}\n', f"{rows}: the row of key 'a' lacks a usable")
    for name, fields in (("humaneval", HUMANEVAL), ("mbpp", MBPP)):
        flags = ("--data", f"{name}={name}.jsonl")
        for field in evaluate.TASKS[name].fields:
            for value in (5, None, [], "\ud800"):
                text = json.dumps({field: value} | fields | {field: value}) + "\n"
                said = f"{name}.jsonl:1: needs a field {field!r}"
                yield Damage(f"evaluate {name}", f"{name}.jsonl", text, said, flags)
        for field in ("test_list", "test_imports"):
            for value in (5, "x", {"a": 1}, [5], ["\ud800"]):
                text = json.dumps({field: value} | fields | {field: value}) + "\n"
                yield Damage(f"evaluate {name}", f"{name}.jsonl", text, f"{name}.jsonl:1: the field {field!r}", flags)
        text = json.dumps(fields | {"draft": 5}) + "\n"
        yield Damage(f"evaluate {name}", f"{name}.jsonl", text, f"{name}.jsonl:1: the field 'draft'", flags)
    for line in [*DIALOGUES, *ANSWERS]:
        for command, (flag, value) in READERS.items():
            if command == "train on" or (command == "sample prompts" and line in DIALOGUES):
                yield Damage(command, "data.jsonl", line, "data.jsonl:1:", (flag, value.format("data.jsonl")))


FILES = [*broken_checkpoints(), *broken_records(), *wrong_fields()]


class Place(NamedTuple):
    """A flag that names something that is not there, or is something else."""

    command: str
    flags: tuple[str, ...]
    said: str

    @property
    def id(self) -> str:
        return shown(self.command, *self.flags)


def places(commands: str, flag: str, *values: tuple[str, str]) -> list[Place]:
    return [Place(command, (flag, value), said) for command in commands.split(", ") for value, said in values]


NO_MODEL = [
    ("nowhere", "nowhere: no such directory"), ("./a/b", "./a/b: no such directory"),
    ("data.jsonl", "data.jsonl: no such directory"), ("owner/name", "owner/name: no such directory, and the hub"),
    ("empty", "empty/config.json: missing"), ("evaluation", "evaluation/config.json: missing"),
]  # fmt: skip
NO_FOLDER = [("data.jsonl", "--output_dir data.jsonl"), ("data.jsonl/a/b", "--output_dir data.jsonl/a/b")]
UNWRITABLE = [(name, f"{name}: cannot be written") for name in ("flow", "data.jsonl/a")]
PLACES = [
    *places("train, sample", "--model_name_or_path", *NO_MODEL),
    *places("convert", "--input", *NO_MODEL),
    *places("evaluate", "--path", *NO_MODEL),
    *places("train, evaluate", "--output_dir", *NO_FOLDER),
    *places("convert", "--output_dir", ("data.jsonl", "is a file"), ("data.jsonl/a", "data.jsonl/a"),
            ("flow", "not empty")),
    *places("train on", "--dataset_args", ("nowhere", "nowhere: no such"), ("a/b.jsonl", "a/b.jsonl: no such file"),
          ("owner/name", "owner/name: no such file or folder, and no such dataset from the hub"),
          ("empty", "empty: the folder holds no data file"), ("data.txt + nowhere", "nowhere: no such file"),
          ("flow/model.safetensors", "flow/model.safetensors: cannot read"), ("toy[train:0]", "nothing to train on"),
          ("data.jsonl[train:99]", "data.jsonl: train:99 asks for more")),
    *places("sample prompts", "--prompt_file", ("nowhere", "nowhere: no such file"), ("flow", "flow: no such file"),
          ("flow/model.safetensors", "flow/model.safetensors:1: not UTF-8")),
    *places("sample", "--output", *UNWRITABLE),
    *places("sample", "--make_gif", *UNWRITABLE),
    *places("sample", "--make_html", *UNWRITABLE),
    *places("evaluate gsm8k", "--data_dir", ("nowhere", "nowhere/gsm8k_test.jsonl"), ("data.jsonl", "data.jsonl/gsm8k"),
          ("empty", "--data_dir: no file empty/gsm8k_test.jsonl")),
    *places("evaluate gsm8k", "--data", ("gsm8k=nowhere.jsonl", "nowhere.jsonl: no such file"),
          ("gsm8k=empty", "empty: the folder holds no data file"), ("gsm8k=data.txt", "data.txt:1: needs"),
          ("gsm8k=flow/model.safetensors", "flow/model.safetensors: cannot read")),
    Place("train on", ("--dataset_args", "data.jsonl", "--text_field", "nowhere"), "field 'nowhere'"),
    *places("train streamed", "--dataset_args", ("data.json", "data.json: cannot be streamed"),
            ("toy", "toy is made up in memory"), ("data.jsonl[train:3]", "leave train:3 out"), ("empty", "empty"),
            ("nowhere.jsonl", "nowhere.jsonl: no such file"), ("http://localhost:1/a.jsonl", "a.jsonl: cannot be read"),
            ("data.jsonl + data.parquet + nowhere", "nowhere: no such file")),
    Place("train from", ("--method", "medlm"), "flow: this is a checkpoint of method 'editflow'"),
    Place("train from", ("--time_conditioned",), "--time_conditioned"),
    Place("train from", ("--x0_sampler", "draft"), 'of the records have no "draft"'),
    Place("train again", ("--method", "medlm"), "this is a checkpoint of method 'editflow'"),
    Place("train again", ("--lora", "--model_name_or_path", "flow"), "--lora"),
    Place("train adapters again", ("--lora", "False"), "--lora"),
    Place("train from", ("--overwrite_output_dir", "--output_dir", "flow"), "--overwrite_output_dir would delete flow"),
    Place("train from", ("--max_length", "4000000"), "--max_length 4000000"),
    Place("sample", ("--prompt", "Ann " * 5000), "positions"),
    Place("sample", ("--mask_length", "1000000"), "positions"),
    Place("sample", ("--x0_sampler", "masks[length:1e6]"), "positions"),
    Place("sample", ("--x0_sampler", "uniform[length:4]"), "uniform needs the token frequencies"),
    Place("sample medlm", ("--init_num", "4000000000"), "positions"),
    Place("sample medlm", ("--draft", "Ann"), "--draft is for Edit Flows"),
    Place("convert", ("--merge_lora",), "--merge_lora: flow holds no adapters"),
    Place("convert adapters", ("--merge_lora", "False"), "pass --merge_lora"),
    Place("convert", ("-i", "owner/name", "--revision", "v2"), "owner/name: no such directory, and the hub"),
    Place("evaluate", ("--x0_sampler", "uniform"), "uniform needs the token frequencies"),
    Place("evaluate", ("--x0_sampler", "draft"), "this checkpoint edits drafts"),
    Place("evaluate", ("--mask_length", "1000000"), "positions"),
    Place("evaluate", ("--path", "medlm", "--init_num", "4000000000"), "positions"),
    Place("evaluate", ("--system_prompt", "Ann " * 5000), "positions"),
]  # fmt: skip


@pytest.mark.parametrize("case", rows(PLACES))
def test_names_of_something_else(case, run, world):
    script, flags = command_line(case.command, case.flags)
    world(*flags)
    Path("empty").mkdir()
    refused(run, script, flags, 1, case.said)


def command_line(command: str, flags: tuple[str, ...] = ()) -> tuple:
    script, always = COMMANDS[command]
    return script, [*shlex.split(always), *flags]


@pytest.mark.parametrize("case", rows(FILES))
def test_files_that_cannot_be(case, run, world):
    script, flags = command_line(case.command, case.flags)
    world(*flags)
    spoil(Path(case.file), case.how)
    refused(run, script, flags, 1, case.said)


UNSPOILED = sorted({(case.command, case.flags) for case in FILES} | {(case.command, ()) for case in PLACES} - NEED_DATA)


@pytest.mark.parametrize(("command", "flags"), [pytest.param(*row, id=shown(row[0], *row[1])) for row in UNSPOILED])
def test_commands_work(command, flags, run, world):
    script, flags = command_line(command, flags)
    world(*flags)
    status, err = run(script, flags)
    assert status == 0, err


@pytest.mark.parametrize("text", ["x", " ", "x1", "\u4e2d"])
def test_a_huge_line_is_no_reason_to_hang(text, run, world):
    script, flags = command_line("train on", ("--dataset_args", "data.txt"))
    world(*flags)
    Path("data.txt").write_text(f"one\n{text * 200_000}\ntwo", encoding="utf-8")
    status, err = run(script, flags)
    assert status == 0, err
