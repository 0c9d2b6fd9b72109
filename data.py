"""From files to batches: dataset specs, file readers, record forms, examples, packing.

    "alpaca.jsonl[test:500] + more/"     spec      load_records: what to train on, what to hold out
    one object per line, row, ...        reader    read_file: an iterator of (place, record)
    {"question": ..., "answer": ...}     record    normalise: every known form becomes one of the three below
    Example(prompt, response, draft)     example   encode: token ids
    lists of examples                    batch     batches, pack

The normal forms of a record:

    {"text": str}                               a document; one longer than --max_length becomes several examples
    {"messages": [...], "response": str, "draft": str | None}
                                                a dialogue and its answer; with a draft, the answer is an edited draft;
                                                with a "suffix", what is to be written stands between the two
    {"corpus": str}                             a stretch of a .txt file; all are cut into examples anew in every epoch

A record that cannot be read travels as the ValueError that says why, from its reader to `detect_form`, which raises it;
so whoever consumes records skips or reports a broken one in one place. Every error is one line that begins with the
file and the line or record at fault.
"""

import csv
import glob
import gzip
import io
import json
import math
import os
import re
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import huggingface_hub
import numpy as np
from tqdm import tqdm

import toy
from plumbing.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------- specs

OPTION = r"\s*(?:(?:train|test)\s*:\s*[0-9][0-9_]*|name\s*:\s*[\w.-]+)\s*"


@dataclass(frozen=True)
class Source:
    """One name of a spec, how many records to train on and to hold out (None: not said), and the configuration of a
    dataset that has several."""

    name: str
    train: int | None = None
    test: int | None = None
    config: str | None = None


def parse_spec(spec: str) -> list[Source]:
    """`name[train:5000,test:500] + other[name:main]`; | works like +. A path that exists is taken whole. Raises
    ValueError."""
    if os.path.exists(spec):
        return [Source(spec)]
    sources = []
    for part in map(str.strip, re.split(r"[|+](?![^\[]*\])", spec)):
        match = re.fullmatch(rf"([^\[\]]+?)\s*(?:\[({OPTION}(?:,{OPTION})*)\])?", part)
        given = re.findall(r"(\w+)\s*:\s*([\w.-]+)", match[2] or "") if match else []
        options = {"config" if key == "name" else key: v if key == "name" else int(v) for key, v in given}
        if not match or len(options) < len(given):
            raise ValueError(f"dataset spec {spec!r}: cannot read {part!r}; write name[train:5000,test:500] + other")
        sources.append(Source(match[1], **options))
    return sources


# ---------------------------------------------------------------------------------------------------------------- files


def read_file(path) -> Iterator[tuple[str, dict | ValueError]]:
    """(place, record) for every record of a Path, or of what has its `name` and `open("rb")`. The place is "file:line",
    or "file: record 7" where lines say little. What is none of READERS is read as plain text.

    Raises OSError, and ValueError where the rest cannot be read, with the place of the last good record.
    """
    place = ""
    try:
        with path.open("rb") as packed:
            file = gzip.GzipFile(fileobj=packed) if path.name.endswith(".gz") else packed
            for place, record in READERS.get(suffix(path), READERS[".txt"])(file):
                yield f"{path}{place}", record
    except Exception as error:  # those of gzip, zlib, csv, json and pyarrow have little in common
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        reason = str(error) or type(error).__name__  # a MemoryError is silent
        raise ValueError(f"{path}{place}: cannot be read {'from here on ' if place else ''}({reason})") from error


def lines(file) -> Iterator[bytes]:
    """The lines of an open file. Raises ValueError for one that is too long to be one, as a packed file may hide it."""
    while line := file.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            raise ValueError(f"a line of more than {LONGEST_LINE >> 20} MB")
        yield line


def read_whole(file) -> bytes:
    """For the formats that cannot be read bit by bit. Raises ValueError where it unpacks to too much."""
    parts = list(islice(iter(partial(file.read, 1 << 20), b""), LARGEST_FILE + 1))
    if len(parts) > LARGEST_FILE:
        raise ValueError(f"more than {LARGEST_FILE} MB in one piece; use .jsonl")
    return b"".join(parts)


def suffix(path) -> str:
    """Of a file or a name, without .gz: .jsonl, .txt, ..."""
    return os.path.splitext(getattr(path, "name", path).removesuffix(".gz"))[1].lower()


def decode(line: bytes) -> str:
    """What is not UTF-8 becomes half characters, which `check_utf8` refuses."""
    return line.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n")


def check_utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"{text[error.start]!r}, character {error.start + 1}"
        raise ValueError(f"not UTF-8 ({wrong}); convert the file, say with iconv") from None
    return text


def parse_json(text: bytes):
    text = check_utf8(decode(text))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        advice = "a .jsonl file holds one object per line, a .json file one list of them"
        raise ValueError(f"not JSON ({error}); {advice}") from error


def parse_jsonl(lines: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, dict | ValueError]]:
    """(place, record) from (place, line); empty lines are left out."""
    for place, line in lines:
        if line.strip():
            try:
                yield place, parse_json(line)
            except ValueError as error:
                yield place, error


def parse_txt(lines: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, dict | ValueError]]:
    """(place, record) from (place, line): stretches of some 16,000 characters."""
    begin = text = ""
    for place, line in lines:
        try:
            text += check_utf8(decode(line))
            begin = begin or place
        except ValueError as error:
            yield place, error
        if len(text) >= STRETCH:
            yield begin, {"corpus": text}
            begin = text = ""
    if text.strip():
        yield begin, {"corpus": text}


def _numbered(items: Iterable, before: str) -> Iterator[tuple[str, object]]:
    return ((f"{before}{number}", item) for number, item in enumerate(items, 1))


def _read_json(file):
    """A list of records, or an object of which one value is a list."""
    value = parse_json(read_whole(file))
    values = value.values() if isinstance(value, dict) else [value]
    lists = [item for item in values if isinstance(item, list)]
    if len(lists) != 1:
        raise ValueError("the file must hold a list of records, or an object with exactly one list")
    return _numbered(lists[0], ": record ")


def _read_csv(file):
    """The first line names the fields."""
    csv.field_size_limit(LONGEST_LINE)  # the default refuses documents of more than 128 kB
    rows = csv.DictReader(map(decode, lines(file)), strict=True)
    return ((f":{rows.line_num}", row) for row in rows)


def _read_parquet(file):
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("parquet needs pyarrow: pip install pyarrow") from None
    # a packed file is unpacked once, not again wherever a column begins
    table = parquet.ParquetFile(io.BytesIO(read_whole(file)) if isinstance(file, gzip.GzipFile) else file)
    batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=256))
    return _numbered(chain.from_iterable(batches), ": record ")


LONGEST_LINE = 1 << 26  # bytes
LARGEST_FILE = 1 << 12  # MB, of what is read in one piece
STRETCH = 1 << 14  # characters of a .txt file that make a record
LINES = {".txt": parse_txt, ".jsonl": parse_jsonl}
READERS = {
    ".txt": lambda file: parse_txt(_numbered(lines(file), ":")),
    ".jsonl": lambda file: parse_jsonl(_numbered(lines(file), ":")),
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
FORMATS = ", ".join(READERS) + ", or one of these with .gz"
NOT_DATA = {"dataset_infos.json", "dataset_dict.json", "state.json", "requirements.txt", "readme.txt", "license.txt"}
# published datasets call their held-out files test-00000-of-00001.parquet, gsm8k_test.jsonl, valid.txt, ...
HELD_OUT = re.compile(r"(?<![a-z])(test|validation|valid|val|dev|eval)(?![a-z])")


def data_files(name: str, hub_files=None, config: str | None = None) -> list:
    """The files a name stands for: itself, those in a folder, or those of a hub dataset (`owner/dataset[/folder]`), as
    hub_files(repository, folder) lists them; by default they are downloaded. config: only files in a folder of this
    name, or whose own names begin with it. Raises ValueError or OSError.
    """
    path = Path(name)
    if matching := [path] if path.exists() else sorted(map(Path, glob.glob(name, recursive=True))):
        files = [file for match in matching for file in _inside(match)]
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)+", name) or suffix(path) in READERS:
        raise ValueError(f"{name}: no such file or folder (nor a hub dataset owner/name, nor {', '.join(toy.SOURCES)})")
    else:
        owner, dataset, *folder = name.split("/")
        try:
            files = (hub_files or partial(_downloaded, config=config))(f"{owner}/{dataset}", "/".join(folder))
        except Exception as error:  # the hub client raises a dozen unrelated classes
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise OSError(f"{name}: no such file or folder, and no such dataset from the hub ({reason})") from error
    files = [file for file in files if suffix(file) in READERS and (file == path or file.name.lower() not in NOT_DATA)]
    if config:
        # what stands before a file's path in its dataset
        inside = rf"^{re.escape(name)}|/snapshots/\w+/|/resolve/\w+/"
        is_its = re.compile(rf"(.*/)?{re.escape(config)}(?![A-Za-z0-9])([^/]*|/.*)")
        files = [file for file in files if is_its.fullmatch(re.split(inside, str(file))[-1])]
    if not files:
        raise ValueError(f"{name}: no data file{f' of [name:{config}]' if config else ''}; use {FORMATS}")
    return files


def _inside(path: Path) -> list[Path]:
    """Everything in a folder but what is hidden; of a file, itself."""
    files = [path] if path.is_file() else map(Path, glob.glob(f"{glob.escape(str(path))}/**/*", recursive=True))
    return sorted(file for file in files if file.is_file())


def _downloaded(repository: str, folder: str, config: str | None) -> list[Path]:
    start = os.path.join(folder, f"*{config}*" if config else "*")
    patterns = [f"{start}{kind}{packed}" for kind in READERS for packed in ("", ".gz")]
    root = huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=patterns)
    return _inside(Path(root, folder))


def split_files(files: list) -> tuple[list, list]:
    """(to train on, held out), by their names. Where all are called held out, none is."""
    held_out = [file for file in files if HELD_OUT.search(file.name.lower())]
    return [file for file in files if file not in held_out] or files, held_out if held_out != files else []


# -------------------------------------------------------------------------------------------------------------- records

FORMS = {  # the fields that make a record one of these, tried in this order: question first, answer second
    "messages": ("messages",),
    "history/response": ("history", "response"),
    "prompt/response": ("prompt", "response"),
    "instruction/input/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
    "text": ("text",),
}


def add_flags(f, chat_template: bool | None = None) -> None:
    """How records are read and texts written. f: a cli.Flags; chat_template: the default (None: as trained)."""
    f.choice("--prompt_field", help="field of a record that holds the question")
    f.choice("--response_field", help="field of a record that holds the answer")
    f.flag("--chat_template", default=chat_template, words=("published", "shipped"),
           help="write dialogues in the checkpoint's chat template; or as the published ME-DLM processor does, or in "
           "the template shipped beside the weights")
    f.flag("--raw_control_tokens", help="<|im_end|> and the like in prompts and records are tokens, not letters")


def named_fields(args) -> tuple[str, ...]:
    """What the flags name: the field of a document, or those of a question and its answer; () where the form of each
    record is to be detected. Raises ValueError."""
    if not (args.prompt_field or args.response_field):
        return (args.text_field,) if args.text_field else ()
    if args.text_field:
        raise ValueError("--text_field names a document; leave out --prompt_field and --response_field")
    return args.prompt_field or "prompt", args.response_field or "response"


def detect_form(record, named: tuple = ()) -> tuple[str, tuple[str, ...]]:
    """The form of a record, a key of FORMS or "corpus", and its fields. Raises ValueError: it could not be read, or has
    no form. named: as named_fields gives it."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object with fields, found {reprlib.repr(record)}")
    if None in record:  # where csv puts them
        raise ValueError("more values than fields in the header")
    if record.keys() == {"corpus"}:
        return "corpus", ("corpus",)
    if named:
        return "text" if len(named) == 1 else "prompt/response", named
    for n in (2, 1):  # a record without an answer is still a prompt, and else an error that names the field
        for form, fields in FORMS.items():
            if all(field in record for field in fields[:n]):
                return form, fields
    found = ", ".join(map(repr, record))
    flags = "--text_field, or --prompt_field and --response_field"
    raise ValueError(f"found fields {found}; known forms are {', '.join(FORMS)}; or name them with {flags}")


def normalise(record, named: tuple = ()) -> dict:
    """A record of any form in one of the normal forms (see the top). Raises ValueError: the record could not be read,
    or a field is missing, of the wrong type, or empty.

    A `draft` beside the other fields is the text to be edited. So is a `source` beside a question and its answer, if it
    is text; beside a {"text"} or a dialogue it says where that comes from.
    """
    form, fields = detect_form(record, named)
    if form == "corpus":
        return {"corpus": _text(record, "corpus", may_be_empty=True)}
    is_draft = isinstance(record.get("source"), str) and form not in ("text", "messages", "history/response")
    place = "source" if is_draft and record.get("draft") is None else "draft"
    draft = None if record.get(place) is None else _text(record, place, may_be_empty=True)
    if form == "text":
        text = _text(record, fields[0])
        return {"text": text} if draft is None else {"messages": [], "response": text, "draft": draft}
    messages, answer = _messages(record, form, fields[0]), fields[-1]
    if form == "messages":
        record, answer = messages.pop(), "content"
        if record["role"] != "assistant":
            raise ValueError(f"the last message must be the assistant's, to be learnt, not the {record['role']}'s")
    given = {"response": _text(record, answer), "draft": draft}
    if record.get("suffix") is not None:
        given["suffix"] = _text(record, "suffix")
    return {"messages": messages} | given


def _messages(record: dict, form: str, field: str) -> list[dict]:
    """What comes before the answer; in the form "messages" also the answer."""
    if form not in ("messages", "history/response"):
        text = _text(record, field)
        if form == "instruction/input/output" and record.get("input"):
            text += "\n\n" + _text(record, "input")
        return [{"role": "user", "content": text}]
    messages = record.get(field)
    are_objects = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if not are_objects or (form == "messages" and not messages):
        raise ValueError(f"field {field!r} must be a list of messages, found {_found(record, field)}")
    return [{"role": _text(m, "role"), "content": _text(m, "content", may_be_empty=True)} for m in messages]


def _text(record: dict, field: str, may_be_empty: bool = False) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise ValueError(f"field {field!r} must be text, found {_found(record, field)}")
    return check_utf8(value)


def _found(record: dict, field: str) -> str:
    return reprlib.repr(record[field]) if field in record else f"no such field (only {', '.join(map(repr, record))})"


def load_records(spec: str, seed: int = 0, *, named: tuple = (), skip_bad_records: bool = False) -> tuple:
    """All that a spec names: (normal records to train on, normal records held out, a line to print for each source).

    Held out are the files whose names say so (test, validation, ...) where there are others beside them, else a
    random part drawn with `seed`: as many records as the spec says, or 5 % (at most 500). Of a text the last lines
    are held out, and counts are lines. The toy task brings its own held-out prompts.

    skip_bad_records counts broken records in the report, where the first would raise ValueError ("file:line: ...")
    """
    train, test, reports = [], [], []
    for source in parse_spec(spec):
        if source.name in toy.SOURCES:
            parts = [toy.records(split, getattr(source, split), seed, source.name) for split in ("train", "test")]
            unit, skipped = "problems", ""
        else:
            parts, unit, skipped = _load_files(source, seed, named, skip_bad_records)
        reports.append(f"{source.name}: {len(parts[0])} {unit} to train on, {len(parts[1])} held out{skipped}")
        if unit == "lines of text":
            parts = [[{"corpus": "".join(lines)}] if lines else [] for lines in parts]
        train += parts[0]
        test += parts[1]
    return train, test, reports


def _load_files(source: Source, seed: int, named: tuple, skip_bad: bool) -> tuple[tuple[list, list], str, str]:
    """((records or lines of a text to train on, those held out), what to call them, what to say of broken ones)"""
    files, bad, parts = data_files(source.name, config=source.config), 0, ([], [])
    is_text = suffix(files[0]) == ".txt"
    if any((suffix(file) == ".txt") != is_text for file in files):
        raise ValueError(f"{source.name}: holds .txt files beside files of records; name them as two sources, a + b")
    for part, its_files in zip(parts, split_files(files)):
        for file in its_files:
            part += [{"corpus": "\n"}] if part and is_text else []
            for _, record in usable(read_file(file), named, skip_bad):
                part += record
                bad += not record
    train, test = parts
    skipped = f", {bad} broken ones skipped" if bad else ""
    if not train:
        raise ValueError(f"{source.name}: no usable record{skipped}")
    if is_text:
        train, test = (list(io.StringIO("".join(texts(part)))) for part in parts)
        return _split(train, test, source, limit=5000), "lines of text", skipped
    order = np.random.default_rng(seed).permutation(len(train))
    unit = "dialogues" if "messages" in train[0] else "documents"
    return _split([train[i] for i in order], test, source, limit=500), unit, skipped


def usable(records: Iterable[tuple], named: tuple, skip_bad: bool) -> Iterator[tuple[str, list[dict]]]:
    """(place, [record in normal form]) from (place, record); [] for a broken one that is skipped, or else raised as a
    ValueError with its place."""
    for place, record in records:
        try:
            yield place, [normalise(record, named)]
        except ValueError as error:
            bad_record(place, error, skip_bad)
            yield place, []


def bad_record(place: str, error: ValueError, skip: bool) -> int:
    """1, for a count, where bad records are to be skipped; else raises ValueError."""
    if not skip:
        raise ValueError(f"{place}: {error} (repair it, or pass --skip_bad_records)") from error
    return 1


def _split(train: list, test: list, source: Source, limit: int) -> tuple[list, list]:
    """Cuts the held-out part off the end where no file brings it, then applies the counts of the spec."""
    if not test:
        n, at_least = len(train), 1 if source.train is None else source.train
        default = max(0, min(max(n // 20, 1), limit, n - at_least))
        cut = max(0, n - (default if source.test is None else source.test))
        train, test = train[:cut], train[cut:]
    for part, count, kind in ((train, source.train, "train"), (test, source.test, "test")):
        if count is not None and count > len(part):
            raise ValueError(f"{source.name}: {kind}:{count} asks for more than there is ({len(part)} left); lower it")
    return train[: source.train], test[: source.test]


def read_prompts(path: str, named: tuple = ()) -> list[list[dict]]:
    """The dialogues to continue in a file: a line of plain text each, or records of any form (answers are ignored).
    Raises OSError or ValueError ("file:line: ...")."""
    dialogues = []
    if not os.path.isfile(path):
        raise OSError(f"--prompt_file {path}: no such file")
    for place, record in read_file(Path(path)):
        try:
            form, fields = detect_form(record, named)
            if form == "corpus":
                lines = map(str.strip, _text(record, form, may_be_empty=True).split("\n"))
                dialogues += [[{"role": "user", "content": line}] for line in lines if line]
                continue
            messages = _messages(record, form, fields[0])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        answered = form == "messages" and messages[-1]["role"] == "assistant"
        dialogues.append(messages[:-1] if answered else messages)
    return dialogues


def texts(records: Iterable[dict]) -> Iterator[str]:
    """All text in the records: what a tokenizer is trained on."""
    for record in records:
        for value in record.values():
            yield from (message["content"] for message in value) if isinstance(value, list) else [value or ""]


# ------------------------------------------------------------------------------------------------------------- examples


@dataclass
class Example:
    """What the model is trained on. prompt + response + suffix is the sequence; len() is its length."""

    prompt: list[int]  # never edited, at least one token; its last token is the anchor of insertions
    response: list[int]  # the target
    draft: list[int] | None = None  # x0, for training from draft to target
    suffix: list[int] = field(default_factory=list)  # never edited, behind the response

    def __len__(self):
        return len(self.prompt) + len(self.response) + len(self.suffix)


@dataclass
class Dataset:
    """Encoded records: fixed examples, and one row of corpus tokens that every epoch cuts elsewhere.

    With pieces cut at the same places every time, a small corpus is learned by heart; a fresh phase costs nothing.
    """

    examples: list[Example]
    too_long: list[int]  # the lengths of the samples left out
    corpus: np.ndarray  # int32 [n]
    prompt: list[int]  # of every piece of the corpus
    piece: int  # tokens of a piece, without the prompt

    def __len__(self):
        """Examples per epoch, the same in every epoch."""
        return len(self.examples) + (max(len(self.corpus) // self.piece - 1, 1) if len(self.corpus) else 0)

    def epoch(self, seed: int, epoch: int) -> list[Example]:
        """The examples of an epoch; which ones depends on (seed, epoch) only."""
        used = (len(self) - len(self.examples)) * self.piece
        phase = int(np.random.default_rng([seed, epoch, 1]).integers(len(self.corpus) - used + 1))
        rows = self.corpus[phase : phase + used].reshape(-1, self.piece)
        return self.examples + [Example(self.prompt, row) for row in rows.tolist()]


def encode_prompts(dialogues: list[list[dict]], tokenizer: Tokenizer) -> list[list[int]]:
    """What a model is given to answer to: each dialogue in the chat template up to the assistant's turn.

    Where the tokenizer writes no chats it is bos and the raw contents, joined by newlines; without messages bos alone.
    Raises ValueError when the tokenizer has no bos token, and where it or its template fails.
    """
    if not tokenizer.writes_chats:
        raw = tokenizer.encode_batch(["\n".join(m["content"] for m in messages) for messages in dialogues])
        return [[_required(tokenizer, "bos"), *ids] for ids in raw]
    written = iter(tokenizer.encode_chats([messages for messages in dialogues if messages]))
    return [next(written) if messages else [_required(tokenizer, "bos")] for messages in dialogues]


def _required(tokenizer: Tokenizer, role: str) -> int:
    token = getattr(tokenizer, f"{role}_id")
    if token is None:
        raise ValueError(f"the tokenizer has no {role} token: add one with convert.py")
    return token


def encode(
    records: list[dict], tokenizer: Tokenizer, *, max_length: int, insert_eos: bool = True, recut: bool = True,
    truncate: bool = False, learn_prompts: bool = False, progress: bool = False,
) -> Dataset:  # fmt: skip
    """Normal records to a Dataset.

    dialogue  encode_prompts, response and suffix; left out and counted when they (or the draft) exceed `max_length`
    text      bos and up to max_length - 1 tokens; a longer text becomes several examples of about equal length
    corpus    bos and exactly max_length - 1 tokens, cut anew every epoch; with `recut` False, as for validation, it is
              a text like any other

    insert_eos ends every response, and the last piece of every text, with eos. truncate: dialogues lose the end of
    their responses, rather than being left out. learn_prompts: all of a dialogue but its first token is response.
    Raises ValueError when a corpus is shorter than one piece, and when the tokenizer has no bos or eos token.
    """

    def tokenize(items: list, encode=tokenizer.encode_batch) -> list[list[int]]:
        """In large groups, for the tokenizer works on all cores; with a bar when it takes long."""
        size, ids = 5000, []
        hidden = not progress or sum(map(len, items)) < 10**7
        for start in tqdm(range(0, len(items), size), desc="tokenizing", unit_scale=size, unit="text", disable=hidden):
            ids += encode(items[start : start + size])
        return ids

    dialogues = [record for record in records if "messages" in record]
    documents = [record["text"] for record in records if "text" in record]
    corpora = [record["corpus"] for record in records if "corpus" in record]
    eos = [_required(tokenizer, "eos")] if insert_eos else []
    bos = [_required(tokenizer, "bos")] if documents or corpora else []

    prompts = tokenize([r["messages"] for r in dialogues], partial(encode_prompts, tokenizer=tokenizer))
    responses = tokenize([r["response"] for r in dialogues])
    drafts, suffixes = (tokenize([r.get(field) or "" for r in dialogues]) for field in ("draft", "suffix"))
    examples, too_long = [], []
    for record, prompt, response, draft, suffix in zip(dialogues, prompts, responses, drafts, suffixes):
        if suffix:
            suffix = suffix + eos
        else:
            response, draft = response + eos, draft + eos
        room = max_length - len(prompt) - len(suffix)
        if truncate and room > 0:
            response, draft = response[:room], draft[:room]
        length = len(prompt) + max(len(response), len(draft)) + len(suffix)
        if learn_prompts:
            prompt, response, draft = prompt[:1], prompt[1:] + response, prompt[1:] + draft
        if length <= max_length:
            examples.append(Example(prompt, response, None if record["draft"] is None else draft, suffix))
        else:
            too_long.append(length)

    rows, piece = [ids + eos for ids in tokenize(documents)], max_length - 1
    # cut behind newlines into texts of at most 64k characters, so that all cores have work
    cut = (re.findall(r"(?s).{0,65535}\n|.{1,65536}", text) for text in corpora)
    streams = [[*chain.from_iterable(tokenize(parts)), *eos] for parts in cut]
    corpus = list(chain.from_iterable(streams)) if recut else []
    rows += [] if recut else streams
    if corpora and recut and len(corpus) < piece:
        short = f"the text has {len(corpus)} tokens, fewer than one example of --max_length {max_length}"
        raise ValueError(f"{short}; give more text or a smaller --max_length")
    for row in filter(None, rows):
        parts = np.array_split(np.array(row, dtype=np.int32), -(-len(row) // piece))
        examples += [Example(bos, part.tolist()) for part in parts]
    return Dataset(examples, too_long, np.array(corpus, dtype=np.int32), bos, piece)


def pad_response(example: Example, pad_len: int, pad_id: int, max_length=math.inf, at_least_one=False) -> Example:
    """ME-DLM, stages 2 and 3: pads the response to a multiple of `pad_len`, but no further than to a sequence of
    `max_length`. The model learns to predict the pads, and so how long an answer is.

    at_least_one: a response that is such a multiple already gets a whole block of pads, as in the published system.
    """
    pads = -len(example.response) % pad_len or at_least_one * pad_len
    pads = max(0, min(pads, max_length - len(example)))
    return replace(example, response=example.response + [pad_id] * pads)


# -------------------------------------------------------------------------------------------------------------- batches


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
