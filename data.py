"""From files to batches: dataset specs, file readers, record forms, examples, packing.

    "alpaca.jsonl[test:500] + more/"     spec      load_records: what to train on, what to hold out
    one object per line, row, ...        reader    read_file: an iterator of (place, record)
    {"question": ..., "answer": ...}     record    normalise: every known form becomes one of the three below
    Example(prompt, response, draft)     example   encode: token ids
    lists of examples                    batch     batches, pack

The normal forms of a record:

    {"text": str}                               a document; one longer than --max_length becomes several examples
    {"messages": [...], "response": str, "draft": str | None}
                                                a dialogue and its answer; with a draft, the answer is an edited draft
    {"corpus": str}                             the text of .txt files, cut into examples anew in every epoch

Every error about the content of a file is one line that begins with the file and the line or record at fault.
"""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import toy
from plumbing.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------------------------
# Specs: name[train:5000,test:500] + other


@dataclass(frozen=True)
class Source:
    """One name of a spec, and how many records to train on and to hold out (None: not said)."""

    name: str
    train: int | None = None
    test: int | None = None


def parse_spec(spec: str) -> list[Source]:
    """`name[train:5000,test:500] + other`; | works like +. Raises ValueError.

    A spec that is the path of a file or folder is taken whole, whatever characters are in it.
    """
    if os.path.exists(spec):
        return [Source(spec)]
    return [_parse_source(part.strip(), spec) for part in re.split(r"[|+](?![^\[]*\])", spec)]


def _parse_source(part: str, spec: str) -> Source:
    match = re.fullmatch(r"([^\[\]]+?)\s*(?:\[([^\[\]]*)\])?", part)
    if not match:
        raise ValueError(f"dataset spec {spec!r}: cannot read {part!r}; write name[train:5000,test:500] + other")
    name, sizes = match.groups()
    counts = {}
    for size in sizes.split(",") if sizes is not None else []:
        match = re.fullmatch(r"\s*(train|test)\s*:\s*([0-9][0-9_]*)\s*", size)
        if not match or match[1] in counts:
            raise ValueError(f"dataset spec {spec!r}: cannot read [{sizes}]; write [train:5000,test:500]")
        counts[match[1]] = int(match[2].replace("_", ""))
    return Source(name, **counts)


# ------------------------------------------------------------------------------------------------------------------
# Files. A reader is an iterator of (place, record): a streaming mode puts its shuffle buffer right behind it. A record
# that cannot be read is handed on as the ValueError that says why, so that the consumer may skip it. What makes the
# rest of the file unreadable is raised.


def read_file(path: Path) -> Iterator[tuple[str, dict | ValueError]]:
    """(place, record) for every record; the place is "file:line", or "file: record 7" where lines say little."""
    return READERS[suffix(path)](path)


def suffix(path) -> str:
    """Of a file or a name, without .gz: .jsonl, .txt, ..."""
    return os.path.splitext(getattr(path, "name", path).removesuffix(".gz"))[1].lower()


def _open(path):
    return gzip.open(path.open("rb"), "rb") if path.name.endswith(".gz") else path.open("rb")


def numbered_lines(path) -> Iterator[tuple[str, str | ValueError]]:
    """(place, line) for every line; a line that is not UTF-8 comes as an error."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", decode_line(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:1: not a complete gzip file ({error}); fetch or pack it again") from error


def decode_line(line: bytes) -> str | ValueError:
    try:
        return line.removeprefix(b"\xef\xbb\xbf").decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start + 1} of the line); convert it, say with iconv")


def _whole_lines(path: Path) -> Iterator[str]:
    """Lines for formats in which one bad line spoils the rest."""
    for place, line in numbered_lines(path):
        if isinstance(line, ValueError):
            raise ValueError(f"{place}: {line}")
        yield line


def _read_txt(path: Path):
    """The whole file is one record."""
    lines = []
    for place, line in numbered_lines(path):
        if isinstance(line, ValueError):
            yield place, line
        else:
            lines.append(line)
    text = "".join(lines)
    yield f"{path}:1", {"corpus": text} if text.strip() else ValueError("the file holds no text")


def _read_jsonl(path: Path):
    return parse_jsonl(numbered_lines(path))


def parse_jsonl(lines: Iterable[tuple[str, str | ValueError]]) -> Iterator[tuple[str, dict | ValueError]]:
    """(place, record) from (place, line); empty lines are left out."""
    for place, line in lines:
        if isinstance(line, ValueError):
            yield place, line
        elif line.strip():
            yield place, _parse_json_line(line)


def _parse_json_line(line: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON ({error.msg} at column {error.colno}); a .jsonl file holds one object per line")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of nested brackets
        return ValueError(f"not usable JSON ({error})")


def _read_json(path: Path):
    """A list of records, or an object of which one value is a list."""
    text = "".join(_whole_lines(path))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        advice = "name it .jsonl if it holds one object per line" if error.msg == "Extra data" else "repair it"
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:1: not usable JSON ({error})") from error
    lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else [value]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise ValueError(f"{path}:1: the file must hold a list of records, or an object with exactly one list")
    for number, record in enumerate(lists[0], 1):
        yield f"{path}: record {number}", record


def _read_csv(path: Path):
    """The first line names the fields."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents of more than 128 kB
    number = 0  # the reader's own line_num lags behind when it fails

    def lines():
        nonlocal number
        for number, line in enumerate(_whole_lines(path), 1):  # noqa: B007
            yield line

    reader = csv.DictReader(lines(), strict=True)
    while True:
        try:
            record = next(reader)
            if None in record:
                record = ValueError(f"more values than the {len(reader.fieldnames)} fields of the header")
        except StopIteration:
            return
        except csv.Error as error:
            record = ValueError(f"not CSV ({error})")
        yield f"{path}:{number}", record


def _read_parquet(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        with _open(path) as file:
            table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if path.name.endswith(".gz") else file)
            rows = (row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, record in enumerate(rows, 1):
                yield f"{path}: record {number}", record
    except (pyarrow.ArrowException, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:1: not a readable parquet file ({error})") from error


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
NOT_DATA = {"dataset_infos.json", "dataset_dict.json", "state.json", "requirements.txt", "readme.txt", "license.txt"}


def data_files(name: str) -> list[Path]:
    """The files a name stands for: itself, those in a folder, or those of a hub dataset (`owner/dataset[/folder]`).

    Raises ValueError or OSError when there are none, or when the hub cannot be reached.
    """
    path = Path(name)
    if path.is_file():
        if suffix(path) not in READERS:
            raise ValueError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {_formats()}")
        return [path]
    if not path.exists():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)+", name) or suffix(path) in READERS:
            raise ValueError(f"{name}: no such file or folder (nor a hub dataset owner/name, nor toy or toy-repair)")
        path = _fetch(name)
    inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
    files = [file for file in inside if is_data(str(file.relative_to(path)))]
    if not files:
        raise ValueError(f"{name}: the folder holds no data file; use {_formats()}")
    return files


def is_data(name: str) -> bool:
    """Whether a file inside a dataset's folder is part of the data."""
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts)
    return suffix(name) in READERS and not hidden and parts[-1].lower() not in NOT_DATA


def _formats() -> str:
    return ", ".join(READERS) + ", or one of these with .gz"


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    owner, dataset, *folder = name.split("/")
    inside = "/".join([*folder, ""])
    patterns = [f"{inside}*{suffix}{packed}" for suffix in READERS for packed in ("", ".gz")]
    try:
        root = snapshot_download(f"{owner}/{dataset}", repo_type="dataset", allow_patterns=patterns)
    except Exception as error:  # the hub client raises a dozen unrelated classes
        raise no_dataset(name, error) from error
    return Path(root, *folder)


def no_dataset(name: str, error: Exception) -> OSError:
    """What to raise where the hub has failed."""
    reason = next(iter(str(error).splitlines()), "")
    return OSError(
        f"{name}: no such file or folder, and no such dataset from the hub ({type(error).__name__}: {reason})"
    )


def _is_held_out(path) -> bool:
    """Published datasets call their held-out files test-00000-of-00001.parquet, gsm8k_test.jsonl, valid.txt, ..."""
    return bool(re.search(r"(?<![a-z])(test|validation|valid|val|dev|eval)(?![a-z])", path.name.lower()))


def split_files(files: list) -> tuple[list, list]:
    """(to train on, held out), by their names. Where all are called held out, none is."""
    held_out = [file for file in files if _is_held_out(file)]
    held_out = [] if len(held_out) == len(files) else held_out
    return [file for file in files if file not in held_out], held_out


# ------------------------------------------------------------------------------------------------------------------
# Records

FORMS = {  # the fields that make a record one of these, tried in this order: question first, answer second
    "messages": ("messages",),
    "history/response": ("history", "response"),
    "prompt/response": ("prompt", "response"),
    "instruction/input/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
    "text": ("text",),
}


def detect_form(record, text_field: str | None = None) -> str:
    """The form of a record: a key of FORMS. Raises ValueError when it has none."""
    if text_field is not None:
        return "text"
    for form, fields in FORMS.items():
        if isinstance(record, dict) and all(field in record for field in fields):
            return form
    found = f"fields {', '.join(map(repr, record))}" if isinstance(record, dict) else f"a {type(record).__name__}"
    raise ValueError(f"found {found}; known forms are {', '.join(FORMS)}; or name the text with --text_field")


def normalise(record, form: str, text_field: str | None = None) -> dict:
    """A record of any form in one of the normal forms (see the top). Raises ValueError: a field is missing, of the
    wrong type, or empty.

    A `draft` beside the other fields is the text to be edited. So is a `source`, if it is text; but not beside a
    {"text"}, where corpora use that name for where a document comes from.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object with fields, found a {type(record).__name__}")
    draft = None
    if record.get("draft") is not None:
        draft = _text(record, "draft", empty=True)
    elif form != "text" and isinstance(record.get("source"), str):
        draft = _text(record, "source", empty=True)
    if form == "text":
        text = _text(record, text_field or "text")
        return {"text": text} if draft is None else {"messages": [], "response": text, "draft": draft}
    messages = _history(record, form)
    if form == "messages":
        *messages, last = messages
        if last["role"] != "assistant":
            raise ValueError(f"the last message must be the assistant's, the answer to learn; it is {last['role']!r}'s")
        response = _text(last, "content")
    else:
        response = _text(record, FORMS[form][1])
    return {"messages": messages, "response": response, "draft": draft}


def _history(record: dict, form: str) -> list[dict]:
    field = FORMS[form][0]
    if form in ("messages", "history/response"):
        return _messages(record, field, empty=form == "history/response")
    text = _text(record, field)
    if form == "instruction/input/output" and record.get("input"):
        text += "\n\n" + _text(record, "input")
    return _question(text)


def _question(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _messages(record: dict, field: str, empty: bool = False) -> list[dict]:
    messages = record.get(field)
    if not isinstance(messages, list) or not (messages or empty):
        raise ValueError(f"field {field!r} must be a list of messages, found {_describe(record, field)}")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"field {field!r}: a message must be an object with role and content")
        _text(message, "role"), _text(message, "content", empty=True)
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _text(record: dict, field: str, empty: bool = False) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"field {field!r} must be text, found {_describe(record, field)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {field!r} holds half a character (a lone \\ud800-\\udfff escape)") from None
    return value


def _describe(record: dict, field: str) -> str:
    if field not in record:
        return f"no such field (only {', '.join(map(repr, record))})"
    value = record[field]
    return type(value).__name__ if value or not isinstance(value, str | list) else f"an empty {type(value).__name__}"


@dataclass
class SourceReport:
    """What came of one source; str() of it is the line to print."""

    name: str
    form: str = ""
    bad: int = 0
    train: int = 0
    test: int = 0

    def __str__(self):
        unit = "lines of text" if self.form == "corpus" else f"records of form {self.form}"
        skipped = f", {self.bad} broken ones skipped" if self.bad else ""
        return f"{self.name}: {self.train} {unit} to train on, {self.test} held out{skipped}"


def is_toy(spec: str) -> bool:
    """Whether a spec names nothing but the toy task, which brings its own tokenizer."""
    return all(source.name in toy.SOURCES for source in parse_spec(spec))


def load_records(
    spec: str,
    seed: int = 0,
    *,
    text_field: str | None = None,
    form: str | None = None,
    skip_bad_records: bool = False,
) -> tuple[list[dict], list[dict], list[SourceReport]]:
    """Everything a dataset spec names, read and normalised: (records to train on, held-out records, reports to print).

    Held out are the files whose names say so (test, validation, ...) where there are others beside them, else a
    random part drawn with `seed`: as many records as the spec says, or 5 % (at most 500). Of a text the last lines
    are held out, and counts are lines. The toy task brings its own held-out prompts.

    form             a key of FORMS, instead of the one detected on the first record of a source
    skip_bad_records counts broken records in the report, where the first would raise ValueError ("file:line: ...")
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"unknown record form {form!r}; choose one of {', '.join(FORMS)}")
    train, test, reports = [], [], []
    for source in parse_spec(spec):
        report = SourceReport(source.name, form or "")
        if source.name in toy.SOURCES:
            parts = _toy_source(source, seed, report)
        else:
            parts = _load_files(source, seed, report, text_field, skip_bad_records)
        report.train, report.test = map(len, parts)
        text = report.form == "corpus"
        train += _join(parts[0]) if text else parts[0]
        test += _join(parts[1]) if text else parts[1]
        reports.append(report)
    return train, test, reports


def _toy_source(source: Source, seed: int, report: SourceReport) -> tuple[list, list]:
    report.form = source.name
    repair = source.name == "toy-repair"
    train = 20_000 if source.train is None else source.train
    test = toy.HELD_OUT if source.test is None else source.test
    return toy.records("train", train, seed, repair), toy.records("test", test, seed, repair)


def _load_files(source: Source, seed: int, report: SourceReport, text_field, skip: bool) -> tuple[list, list]:
    """The two parts of a source: of records, or of the lines of a text."""
    files = data_files(source.name)
    if len({suffix(file) == ".txt" for file in files}) == 2:
        raise ValueError(f"{source.name}: holds .txt files beside files of records; name them as two sources, a + b")
    train, test = (list(_read_records(part, report, text_field, skip)) for part in split_files(files))
    if not train:
        raise ValueError(f"{source.name}: no usable record ({report.bad} broken ones skipped)")
    if report.form == "corpus":
        return _split(_lines(train), _lines(test), source, most=5000)
    order = np.random.default_rng(seed).permutation(len(train))
    return _split([train[i] for i in order], test, source, most=500)


def _read_records(files: list[Path], report: SourceReport, text_field: str | None, skip: bool) -> Iterator[dict]:
    for file in files:
        for place, record in read_file(file):
            try:
                if isinstance(record, ValueError):
                    raise record
                form = "corpus" if suffix(file) == ".txt" else report.form or detect_form(record, text_field)
                normal = record if form == "corpus" else normalise(record, form, text_field)
            except ValueError as error:
                report.bad += bad_record(place, error, skip)
            else:
                report.form = form
                yield normal


def bad_record(place: str, error: ValueError, skip: bool) -> int:
    """1, for a count, where bad records are to be skipped; else raises ValueError."""
    if not skip:
        raise ValueError(f"{place}: {error} (repair it, or pass --skip_bad_records)") from error
    return 1


def _split(train: list, test: list, source: Source, most: int) -> tuple[list, list]:
    """Cuts the held-out part off the end where no file brings it, then applies the counts of the spec."""
    if not test:
        n, at_least = len(train), 1 if source.train is None else source.train
        default = max(0, min(max(n // 20, 1), most, n - at_least))
        cut = max(0, n - (default if source.test is None else source.test))
        train, test = train[:cut], train[cut:]
    for part, count, kind in ((train, source.train, "train"), (test, source.test, "test")):
        if count is not None and count > len(part):
            raise ValueError(f"{source.name}: {kind}:{count} asks for more than there is ({len(part)} left); lower it")
    return train[: source.train], test[: source.test]


def _lines(records: list[dict]) -> list[str]:
    return re.findall(r"[^\n]*\n|[^\n]+", "\n".join(record["corpus"] for record in records))


def _join(lines: list[str]) -> list[dict]:
    return [{"corpus": "".join(lines)}] if lines else []


def read_prompts(path: str) -> list[list[dict]]:
    """The dialogues to continue in a file: a line of plain text each, or records of any form (answers are ignored).

    Raises OSError or ValueError ("file:line: ...").
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"--prompt_file {path}: no such file")
    if suffix(path) not in READERS or suffix(path) == ".txt":
        return [_question(line.strip()) for line in _whole_lines(path) if line.strip()]
    return [_prompt(place, record) for place, record in read_file(path)]


def _prompt(place: str, record) -> list[dict]:
    try:
        if isinstance(record, ValueError):
            raise record
        form = next((form for form, fields in FORMS.items() if isinstance(record, dict) and fields[0] in record), None)
        messages = _history(record, form or detect_form(record))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return messages[:-1] if form == "messages" and messages[-1]["role"] == "assistant" else messages


def texts(records: Iterable[dict]) -> Iterator[str]:
    """All text in the records: what a tokenizer is trained on."""
    for record in records:
        if "messages" in record:
            yield from (message["content"] for message in record["messages"])
            yield record["response"]
            yield record["draft"] or ""
        else:
            yield from record.values()


# ------------------------------------------------------------------------------------------------------------------
# Examples


@dataclass
class Example:
    """What the model is trained on. prompt + response is the sequence; len() is its length."""

    prompt: list[int]  # never edited, at least one token; its last token is the anchor of insertions
    response: list[int]  # the target
    draft: list[int] | None = None  # x0, for training from draft to target

    def __len__(self):
        return len(self.prompt) + len(self.response)


@dataclass
class Dataset:
    """Encoded records: fixed examples, and one row of corpus tokens that every epoch cuts elsewhere.

    With pieces cut at the same places every time, a small corpus is learned by heart; a fresh phase costs nothing.
    """

    examples: list[Example]
    too_long: int  # how many samples were left out
    corpus: np.ndarray  # int32 [n]
    prompt: list[int]  # of every piece of the corpus
    piece: int  # tokens of a piece, without the prompt

    def __len__(self):
        """Examples per epoch, the same in every epoch."""
        return len(self.examples) + self._pieces

    @property
    def _pieces(self) -> int:
        return max(len(self.corpus) // self.piece - 1, 1) if len(self.corpus) else 0

    def epoch(self, seed: int, epoch: int) -> list[Example]:
        """The examples of an epoch; which ones depends on (seed, epoch) only."""
        slack = len(self.corpus) - self._pieces * self.piece
        phase = int(np.random.default_rng([seed, epoch, 1]).integers(slack + 1))
        rows = self.corpus[phase : phase + self._pieces * self.piece].reshape(-1, self.piece)
        return self.examples + [Example(self.prompt, row) for row in rows.tolist()]


def encode_prompt(messages: list[dict], tokenizer: Tokenizer, chat_template: bool = True) -> list[int]:
    """What a model is given to answer to: the dialogue in the tokenizer's chat template up to the assistant's turn.

    Without a template (or `chat_template` False) it is bos and the raw contents, joined by newlines; without messages
    bos alone. Raises ValueError when the tokenizer has no bos token.
    """
    return _encode_prompts([messages], tokenizer, chat_template)[0]


def _encode_prompts(dialogues: list[list[dict]], tokenizer: Tokenizer, chat_template: bool, progress=False):
    in_template = [bool(messages and chat_template and tokenizer.chat_template) for messages in dialogues]
    written = [
        tokenizer.chat(messages) if chat else "\n".join(message["content"] for message in messages)
        for messages, chat in zip(dialogues, in_template)
    ]
    ids = _encode_texts(written, tokenizer, progress)
    bos = [] if all(in_template) else [_required(tokenizer, "bos")]
    return [prompt if chat else bos + prompt for prompt, chat in zip(ids, in_template)]


def _required(tokenizer: Tokenizer, role: str) -> int:
    token = getattr(tokenizer, f"{role}_id")
    if token is None:
        raise ValueError(f"the tokenizer has no {role} token: add one with convert.py")
    return token


def _encode_texts(texts: list[str], tokenizer: Tokenizer, progress: bool) -> list[list[int]]:
    """In large groups, for the tokenizer works on all cores; with a bar when it takes long."""
    size, ids = 1000, []
    hidden = not progress or sum(map(len, texts)) < 10**7
    for start in tqdm(range(0, len(texts), size), desc="tokenizing", unit_scale=size, unit="text", disable=hidden):
        ids += tokenizer.encode_batch(texts[start : start + size])
    return ids


def encode(
    records: list[dict],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    insert_eos: bool = True,
    chat_template: bool = True,
    recut: bool = True,
    all_may_be_too_long: bool = False,
    progress: bool = False,
) -> Dataset:
    """Normal records to a Dataset.

    dialogue  encode_prompt and the response; left out and counted when they (or the draft) exceed `max_length`
    text      bos and up to max_length - 1 tokens; a longer text becomes several examples of about equal length
    corpus    bos and exactly max_length - 1 tokens, cut anew every epoch; with `recut` False, as for validation, it is
              a text like any other

    insert_eos ends every response, and the last piece of every text, with eos. Raises ValueError when every sample is
    too long (unless all_may_be_too_long), when a corpus is shorter than one piece, and when the tokenizer has no bos or
    eos token.
    """
    if max_length < 2:
        raise ValueError(f"--max_length must be at least 2 (one token of prompt, one to learn), it is {max_length}")
    eos = [_required(tokenizer, "eos")] if insert_eos else []
    dialogues = [record for record in records if "messages" in record]
    documents = [record["text"] for record in records if "text" in record]
    corpora = [record["corpus"] for record in records if "corpus" in record]

    examples = _encode_dialogues(dialogues, tokenizer, eos, chat_template, progress)
    fitting = [e for e in examples if max(len(e), len(e.prompt) + len(e.draft or [])) <= max_length]
    if examples and not fitting and not all_may_be_too_long:
        shortest = min(map(len, examples))
        raise ValueError(
            f"all {len(examples)} samples are longer than --max_length {max_length}; the shortest has {shortest} "
            "tokens: raise --max_length"
        )

    piece = max_length - 1
    bos = [_required(tokenizer, "bos")] if documents or corpora else []
    token_rows = [ids + eos for ids in _encode_texts(documents, tokenizer, progress)]
    corpus_rows = [ids + eos for ids in _encode_corpora(corpora, tokenizer, progress)]
    if not recut:
        token_rows, corpus_rows = token_rows + corpus_rows, []
    corpus = np.array([i for row in corpus_rows for i in row], dtype=np.int32)
    if corpus_rows and len(corpus) < piece:
        raise ValueError(
            f"the text has {len(corpus)} tokens, fewer than one example of --max_length {max_length}; "
            "give more text or a smaller --max_length"
        )
    pieces = [Example(bos, part.tolist()) for row in token_rows for part in _even_pieces(row, piece)]
    return Dataset(fitting + pieces, len(examples) - len(fitting), corpus, bos, piece)


def _encode_dialogues(records, tokenizer, eos, chat_template, progress) -> list[Example]:
    prompts = _encode_prompts([record["messages"] for record in records], tokenizer, chat_template, progress)
    responses = _encode_texts([record["response"] for record in records], tokenizer, progress)
    drafts = iter(_encode_texts([r["draft"] for r in records if r["draft"] is not None], tokenizer, progress))
    return [
        Example(prompt, response + eos, None if record["draft"] is None else next(drafts) + eos)
        for record, prompt, response in zip(records, prompts, responses)
    ]


def _encode_corpora(corpora: list[str], tokenizer: Tokenizer, progress: bool) -> list[list[int]]:
    """Cut behind newlines into texts of at most 64k characters, so that all cores have work."""
    cut = [re.findall(r"(?s).{0,65535}\n|.{1,65536}", corpus) for corpus in corpora]
    ids = iter(_encode_texts([text for parts in cut for text in parts], tokenizer, progress))
    return [[i for row in islice(ids, len(parts)) for i in row] for parts in cut]


def _even_pieces(row: list[int], size: int) -> list[np.ndarray]:
    return np.array_split(np.array(row, dtype=np.int32), -(-len(row) // size)) if row else []


def pad_response(example: Example, pad_len: int, pad_id: int, max_length: int | None = None) -> Example:
    """ME-DLM, stages 2 and 3: pads the response to a multiple of `pad_len`, but no further than to a sequence of
    `max_length`. The model learns to predict the pads, and so how long an answer is."""
    if pad_len < 1:
        raise ValueError(f"--pad_len must be at least 1, it is {pad_len}")
    pads = -len(example.response) % pad_len
    if max_length is not None:
        pads = max(0, min(pads, max_length - len(example)))
    return replace(example, response=example.response + [pad_id] * pads)


# ------------------------------------------------------------------------------------------------------------------
# Batches


def pack(examples: list[Example], max_len: int) -> list[list[Example]]:
    """Best fit: rows of examples, each of at most `max_len` tokens. Raises ValueError for an example longer than that.

    Longest first, each into the row where it leaves the least space. `spaces` has bit s set while some row has s tokens
    of space, so that the best row is the lowest bit at or above the length. Examples of equal length keep their order:
    shuffle them for other rows.
    """
    rows, rows_with, spaces = [], defaultdict(list), 0
    for example in sorted(examples, key=len, reverse=True):
        length = len(example)
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[space].pop()
            spaces ^= 0 if rows_with[space] else 1 << space
        elif length <= max_len:
            space, row = max_len, []
            rows.append(row)
        else:
            raise ValueError(f"a sample of {length} tokens does not fit into rows of {max_len}")
        row.append(example)
        rows_with[space - length].append(row)
        spaces |= 1 << (space - length)
    return rows


def batches(items: list, batch_size: int, seed: int, epoch: int) -> Iterator[list]:
    """The items (examples, or rows of examples from `pack`) in batches, each once, in an order that depends on
    (seed, epoch) only. The last batch may be smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(len(items))
    for at in range(0, len(order), batch_size):
        yield [items[i] for i in order[at : at + batch_size]]
