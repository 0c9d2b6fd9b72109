"""What many tests share: tiny models, small checkpoints, and a script that is run as the shell would run it.

Tests run on one core, so that results do not depend on the machine, and the slow ones come last. Processes of their
own, which can be killed, are in fleet.py.
"""

import gzip
import json
import signal
import sys
from pathlib import Path

import huggingface_hub
import pyarrow.parquet
import pytest
import sentencepiece
import torch
from fleet import TINY
from safetensors.torch import load_file

import models
import toy
from plumbing import checkpoints, cli, feed
from plumbing.tokenizer import load_tokenizer, train_tokenizer

NO_NUMBER = ["abc", "", "nan", "inf", "1e999", "1,5", "-1", "9" * 5000]
HANGING = 60  # seconds after which a command counts as hanging

torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


# ---------------------------------------------------------------------------------------------------- models


@pytest.fixture
def tiny_is_even_smaller(monkeypatch):
    """The preset `tiny`, for tests in which one size is as good as another."""
    monkeypatch.setitem(models.PRESETS, "tiny", TINY)


def save_checkpoint(directory, method="editflow", tokenizer=None, rows=None, sizes=None, **settings) -> Path:
    """Saves an untrained model and its tokenizer, by default that of the toy task; returns the directory.

    The rates of Edit Flows are high enough that a few steps write something. rows: of the embedding, if not one for
    each token. sizes: what differs from TINY. settings: what the checkpoint remembers, such as x0_sampler.
    """
    tokenizer = tokenizer or toy.tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.PRESETS, "small", TINY | (sizes or {}))
        model = checkpoints.new_model(method, "small", rows or tokenizer.vocab_size, **settings)
    if method == "editflow":
        torch.nn.init.constant_(model.rate_heads[0].bias, 0.5)
    checkpoints.save(model, directory)
    tokenizer.save(directory)
    return Path(directory)


def save_encoder(directory, method: str, family: str, positions: int) -> Path:
    """Like save_checkpoint, with one of the backbones that have absolute positions."""
    tokenizer = toy.tokenizer()
    config = {"model_type": family, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": positions}
    config = checkpoints.complete_config(TINY | config | {"nanoedit": {"method": method}})
    checkpoints.save(checkpoints.build(config), directory)
    tokenizer.save(directory)
    return Path(directory)


VERSE = "{0} bottles of beer on the wall, {0} bottles of beer.\nTake one down; pass it around!\n\n"
CORPUS = "".join(map(VERSE.format, range(60)))
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many bottles?\n"},
    {"role": "assistant", "content": " 12 "},
    {"role": "user", "content": 'Und "größer"?'},
]
WORDS = "one two three four five six seven eight nine ten"


def save_every_form(root: Path) -> None:
    """An Edit Flows checkpoint in every form in which weights and tokenizers are published, each in a folder; and one
    of ME-DLM.
    """
    for name in ("flow", "shards", "bin", "bins", "words", "merges"):
        save_checkpoint(root / name, schedule="cubic", x0_sampler="masks[length:4]")
    save_checkpoint(root / "medlm", "medlm")
    save_checkpoint(root / "chat", tokenizer=train_tokenizer([WORDS], 300), schedule="cubic", x0_sampler="empty")

    weights, part = load_file(root / "flow/model.safetensors"), "model-00001-of-00001.safetensors"
    (root / "shards/model.safetensors").rename(root / "shards" / part)
    write_json(root / "shards/model.safetensors.index.json", {"weight_map": dict.fromkeys(weights, part)})
    for name, part in (("bin", "pytorch_model.bin"), ("bins", "pytorch_model-1.bin")):
        (root / name / "model.safetensors").unlink()
        torch.save(weights, root / name / part)
    write_json(root / "bins/pytorch_model.bin.index.json", {"weight_map": dict.fromkeys(weights, part)})

    vocabulary = list(json.loads((root / "flow/tokenizer.json").read_text())["model"]["vocab"])
    for name in ("words", "merges"):
        (root / name / "tokenizer.json").unlink()
    (root / "words/vocab.txt").write_text("\n".join([*vocabulary[:-3], "[UNK]", "[CLS]", "[SEP]"]))
    write_json(root / "words/special_tokens_map.json", {"unk_token": "[UNK]"})
    write_json(root / "merges/vocab.json", {token: i for i, token in enumerate(["a", "b", "ab", *vocabulary[:20]])})
    (root / "merges/merges.txt").write_text("#version: 0.2\na b\n")

    (root / "spiece").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 9), model_prefix=str(root / "spiece/tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    write_json(root / "spiece/tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    save_checkpoint(root / "spiece", tokenizer=load_tokenizer(root / "spiece"), schedule="cubic", x0_sampler="empty")


# ---------------------------------------------------------------------------------------------------- records


def save_records(root: Path, records: list[dict]) -> None:
    """The same records in every format, as they are and packed."""
    rows = [list(record.values()) for record in records]
    (root / "data.txt").write_text("".join(" ".join(row) + "\n" for row in rows) * 4)
    (root / "data.csv").write_text("".join(",".join(row) + "\n" for row in [records[0], *rows]))
    write_json(root / "data.json", records)
    jsonl(root / "data.jsonl", *records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), root / "data.parquet")
    for file in list(root.glob("data.*")):
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def jsonl(path: Path, *records) -> Path:
    """Writes a record to a line; returns the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---------------------------------------------------------------------------------------------------- commands


class Hanging(BaseException):
    """No Exception, so that no script can take it for an error of its own."""


@pytest.fixture(autouse=True)
def signals_as_before():
    """A training run that is told to stop has its own way with signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Runs main() of a script as the shell would, without a new process: (exit status, stderr)."""

    def stop(number, frame):
        raise Hanging

    def start(main, flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(HANGING)
        try:
            with pytest.raises(SystemExit) as end:
                cli.run(main)
        finally:
            signal.alarm(0)
        return end.value.code, capsys.readouterr().err

    return start


@pytest.fixture
def refused(command_line, tmp_path):
    """Runs main() of a script with flags that must fail; what it says, in one line, without the script's name.

    status: 1 or 2, if one of the two is promised. named: what the line must contain. Nothing else is said before an
    exit status of 2, because nothing has been read. No file of the test is written, changed or removed, but locks.
    """

    def contents():
        files = (file for file in tmp_path.rglob("*") if file.is_file() and not file.name.endswith(".lock"))
        return {file: file.read_bytes() for file in files}

    def start(main, flags, status=None, *named):
        before = contents()
        found, err = command_line(main, flags)
        assert found in ([status] if status else [1, 2]), err
        assert "Traceback" not in err
        *progress, last = err.strip().splitlines()
        assert found == 1 or not progress, err
        assert last.startswith("script.py: error: "), err
        assert len(last) < 1500
        assert all(name in last for name in named), last
        assert contents() == before
        return last.removeprefix("script.py: error: ")

    return start


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """There is no hub, nobody waits for it, and the current folder is empty."""
    monkeypatch.chdir(tmp_path)

    def hub(name, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.setattr(feed, "WAITS", (0, 0.01))


def flags_of(script) -> list:
    """The flags that the parser of a script knows, as argparse keeps them."""
    parsers = []

    def stop(parser, argv=None):
        parsers.append(parser)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.Flags, "parse_args", stop)
        with pytest.raises(InterruptedError):
            script.parse_args([])
    return [action for action in parsers[0]._actions if action.dest != "help"]


def wrong_values(action) -> list[str]:
    """What a flag cannot be, from its type."""
    kind = action.type
    if kind is cli.boolean or action.choices:
        return ["abc", "", "nan", "2", *(choice.upper() for choice in action.choices or ())]
    if kind in (int, float):  # should be cli.number, which refuses what is not finite
        return NO_NUMBER
    if isinstance(kind, cli.number):
        whole = kind.kind is int
        step = 1 if whole else 1e-6
        bounds = [(kind.low, -step), (kind.high, step), (kind.above, 0), (kind.below, 0)]
        beyond = [str(limit + more) for limit, more in bounds if limit is not None]
        return [*NO_NUMBER, *beyond, *(["1.5", "1" + "0" * 30] if whole else [])]
    if kind is cli.text:
        return ["\udcff"]
    return ["", " "] if kind is None else ["", "no such["]  # the last: a small language of its own
