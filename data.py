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

A record that cannot be read travels as the ValueError that says why, from its reader to `normalise`, which raises it;
so whoever consumes records skips or reports a broken one in one place. What spoils the rest of a file is raised at
once. Every such error is one line that begins with the file and the line or record at fault.
"""

import csv
import gzip
import io
import json
import os
import re
import reprlib
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import huggingface_hub
import numpy as np
from tqdm import tqdm

import toy
from plumbing.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------- specs

SIZE = r"\s*(?:train|test)\s*:\s*[0-9][0-9_]*\s*"


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
    sources = []
    for part in map(str.strip, re.split(r"[|+](?![^\[]*\])", spec)):
        match = re.fullmatch(rf"([^\[\]]+?)\s*(\[{SIZE}(,{SIZE})?\])?", part)
        sizes = re.findall(r"(train|test)\s*:\s*([0-9_]+)", match[2] or "") if match else []
        counts = {kind: int(count.replace("_", "")) for kind, count in sizes}
        if not match or len(counts) < len(sizes):
            raise ValueError(f"dataset spec {spec!r}: cannot read {part!r}; write name[train:5000,test:500] + other")
        sources.append(Source(match[1], **counts))
    return sources


# ---------------------------------------------------------------------------------------------------------------- files


def read_file(path: Path) -> Iterator[tuple[str, dict | ValueError]]:
    """(place, record) for every record; the place is "file:line", or "file: record 7" where lines say little."""
    return READERS[suffix(path)](path)


def suffix(path) -> str:
    """Of a file or a name, without .gz: .jsonl, .txt, ..."""
    return os.path.splitext(getattr(path, "name", path).removesuffix(".gz"))[1].lower()


@contextmanager
def open_file(path) -> Iterator:
    """The bytes of a file, unpacked. `path` is anything that has `name` and `open("rb")`."""
    try:
        with path.open("rb") as file:
            yield gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:1: not a complete gzip file ({error}); fetch or pack it again") from error


def numbered_lines(path) -> Iterator[tuple[str, str | ValueError]]:
    """(place, line) for every line; a line that is not UTF-8 comes as an error."""
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            yield f"{path}:{number}", decode_line(line)


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


def parse_jsonl(lines: Iterable[tuple[str, str | ValueError]]) -> Iterator[tuple[str, dict | ValueError]]:
    """(place, record) from (place, line); empty lines are left out."""
    for place, line in lines:
        if isinstance(line, ValueError):
            yield place, line
        elif line.strip():
            yield place, _parse_json(line)[0]


def _parse_json(text: str) -> tuple:
    """(the value or the ValueError that says why there is none, the line at fault)"""
    try:
        return json.loads(text), 1
    except json.JSONDecodeError as error:
        advice = "a .jsonl file holds one object per line, a .json file one list of them"
        return ValueError(f"not JSON ({error.msg} at column {error.colno}); {advice}"), error.lineno
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of nested brackets
        return ValueError(f"not usable JSON ({error})"), 1


def _read_json(path: Path):
    """A list of records, or an object of which one value is a list."""
    value, line = _parse_json("".join(_whole_lines(path)))
    lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else []
    records = lists[0] if len(lists) == 1 else value
    if not isinstance(records, list):
        wanted = "the file must hold a list of records, or an object with exactly one list"
        raise ValueError(f"{path}:{line}: {value if isinstance(value, ValueError) else wanted}")
    for number, record in enumerate(records, 1):
        yield f"{path}: record {number}", record


def _read_csv(path: Path):
    """The first line names the fields."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents of more than 128 kB
    rows = csv.DictReader(_whole_lines(path), strict=True)
    while True:
        try:
            record = next(rows)
            if None in record:
                record = ValueError(f"more values than the {len(rows.fieldnames)} fields of the header")
        except StopIteration:
            return
        except csv.Error as error:
            record = ValueError(f"not CSV ({error})")
        yield f"{path}:{rows.reader.line_num}", record  # that of `rows` lags behind after an error


def _read_parquet(path: Path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        with open_file(path) as file:
            # a packed file is unpacked once, not again wherever a column begins
            table = parquet.ParquetFile(io.BytesIO(file.read()) if path.name.endswith(".gz") else file)
            rows = (row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, record in enumerate(rows, 1):
                yield f"{path}: record {number}", record
    except ArrowException as error:
        raise ValueError(f"{path}:1: not a readable parquet file ({error})") from error


READERS = {
    ".txt": _read_txt,
    ".jsonl": lambda path: parse_jsonl(numbered_lines(path)),
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
FORMATS = ", ".join(READERS) + ", or one of these with .gz"
NOT_DATA = {"dataset_infos.json", "dataset_dict.json", "state.json", "requirements.txt", "readme.txt", "license.txt"}
# published datasets call their held-out files test-00000-of-00001.parquet, gsm8k_test.jsonl, valid.txt, ...
HELD_OUT = re.compile(r"(?<![a-z])(test|validation|valid|val|dev|eval)(?![a-z])")


def data_files(name: str) -> list[Path]:
    """The files a name stands for: itself, those in a folder, or those of a hub dataset (`owner/dataset[/folder]`).

    Raises ValueError or OSError when there are none, or when the hub cannot be reached.
    """
    path = Path(name)
    if not path.exists():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)+", name) or suffix(path) in READERS:
            raise ValueError(f"{name}: no such file or folder (nor a hub dataset owner/name, nor toy or toy-repair)")
        owner, dataset, *folder = name.split("/")
        repository = f"{owner}/{dataset}"
        patterns = ["/".join([*folder, f"*{kind}{packed}"]) for kind in READERS for packed in ("", ".gz")]
        try:
            root = huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=patterns)
        except Exception as error:  # the hub client raises a dozen unrelated classes
            raise no_dataset(name, error) from error
        path = Path(root, *folder)
    if path.is_file():
        files, none = [path] if suffix(path) in READERS else [], f"cannot read {path.suffix or 'a file without suffix'}"
    else:
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and is_data(str(file.relative_to(path)))]
        none = "the folder holds no data file"
    if not files:
        raise ValueError(f"{name}: {none}; use {FORMATS}")
    return files


def is_data(name: str) -> bool:
    """Whether a file inside a dataset's folder is part of the data."""
    hidden = "/." in f"/{name}"
    return suffix(name) in READERS and not hidden and os.path.basename(name).lower() not in NOT_DATA


def no_dataset(name: str, error: Exception) -> OSError:
    """What to raise where the hub has failed."""
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return OSError(f"{name}: no such file or folder, and no such dataset from the hub ({reason})")


def split_files(files: list) -> tuple[list, list]:
    """(to train on, held out), by their names. Where all are called held out, none is."""
    held_out = [file for file in files if HELD_OUT.search(file.name.lower())]
    held_out = [] if len(held_out) == len(files) else held_out
    return [file for file in files if file not in held_out], held_out


# -------------------------------------------------------------------------------------------------------------- records

FORMS = {  # the fields that make a record one of these, tried in this order: question first, answer second
    "messages": ("messages",),
    "history/response": ("history", "response"),
    "prompt/response": ("prompt", "response"),
    "instruction/input/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
    "text": ("text",),
}


def detect_form(record, text_field: str | None = None, question_only: bool = False) -> str:
    """The form of a record, with or without an answer: a key of FORMS. Raises ValueError when it has none."""
    _check_record(record)
    if text_field is not None:
        return "text"
    for form, fields in FORMS.items():
        if all(field in record for field in fields[: 1 if question_only else None]):
            return form
    found = ", ".join(map(repr, record))
    raise ValueError(f"found fields {found}; known forms are {', '.join(FORMS)}; or name the text with --text_field")


def normalise(record, form: str, text_field: str | None = None) -> dict:
    """A record of any form in one of the normal forms (see the top). Raises ValueError: the record could not be read,
    or a field is missing, of the wrong type, or empty.

    A `draft` beside the other fields is the text to be edited. So is a `source`, if it is text; but not beside a
    {"text"}, where corpora use that name for where a document comes from.
    """
    _check_record(record)
    if form == "corpus":
        return record
    draft = None
    if record.get("draft") is not None:
        draft = _text(record, "draft", may_be_empty=True)
    elif form != "text" and isinstance(record.get("source"), str):
        draft = _text(record, "source", may_be_empty=True)
    if form == "text":
        text = _text(record, text_field or "text")
        return {"text": text} if draft is None else {"messages": [], "response": text, "draft": draft}
    messages, answer = _messages(record, form), FORMS[form][-1]
    if form == "messages":
        record, answer = messages.pop(), "content"
        if record["role"] != "assistant":
            raise ValueError(f"the last message must be the assistant's, to be learnt, not the {record['role']}'s")
    return {"messages": messages, "response": _text(record, answer), "draft": draft}


def _check_record(record) -> None:
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object with fields, found {reprlib.repr(record)}")


def _messages(record: dict, form: str) -> list[dict]:
    """What comes before the answer; in the form "messages" also the answer."""
    field = FORMS[form][0]
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
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {field!r} holds half a character (a lone \\ud800-\\udfff escape)") from None
    return value


def _found(record: dict, field: str) -> str:
    return reprlib.repr(record[field]) if field in record else f"no such field (only {', '.join(map(repr, record))})"


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
    spec: str, seed: int = 0, *, text_field: str | None = None, skip_bad_records: bool = False
) -> tuple[list[dict], list[dict], list[SourceReport]]:
    """Everything a dataset spec names, read and normalised: (records to train on, held-out records, reports to print).

    Held out are the files whose names say so (test, validation, ...) where there are others beside them, else a
    random part drawn with `seed`: as many records as the spec says, or 5 % (at most 500). Of a text the last lines
    are held out, and counts are lines. The toy task brings its own held-out prompts.

    skip_bad_records counts broken records in the report, where the first would raise ValueError ("file:line: ...")
    """
    train, test, reports = [], [], []
    for source in parse_spec(spec):
        report = SourceReport(source.name)
        if source.name in toy.SOURCES:
            report.form = source.name
            sizes = ("train", source.train, 20_000), ("test", source.test, toy.HELD_OUT)
            parts = [
                toy.records(split, default if count is None else count, seed, repair=source.name == "toy-repair")
                for split, count, default in sizes
            ]
        else:
            parts = _load_files(source, seed, report, text_field, skip_bad_records)
        report.train, report.test = map(len, parts)
        if report.form == "corpus":
            parts = [[{"corpus": "".join(lines)}] if lines else [] for lines in parts]
        train += parts[0]
        test += parts[1]
        reports.append(report)
    return train, test, reports


def _load_files(source: Source, seed: int, report: SourceReport, text_field, skip: bool) -> tuple[list, list]:
    """The two parts of a source: of records, or of the lines of a text."""
    files = data_files(source.name)
    is_text = {suffix(file) == ".txt" for file in files}
    if len(is_text) == 2:
        raise ValueError(f"{source.name}: holds .txt files beside files of records; name them as two sources, a + b")
    report.form = "corpus" if True in is_text else ""
    parts = [], []
    for part, its_files in zip(parts, split_files(files)):
        for place, record in chain.from_iterable(map(read_file, its_files)):
            try:
                form = report.form or detect_form(record, text_field)
                part.append(normalise(record, form, text_field))
                report.form = form
            except ValueError as error:
                report.bad += bad_record(place, error, skip)
    if not parts[0]:
        raise ValueError(f"{source.name}: no usable record ({report.bad} broken ones skipped)")
    if report.form == "corpus":
        train, test = (list(io.StringIO("\n".join(record["corpus"] for record in part))) for part in parts)
        return _split(train, test, source, most=5000)
    train, test = parts
    order = np.random.default_rng(seed).permutation(len(train))
    return _split([train[i] for i in order], test, source, most=500)


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


def read_prompts(path: str) -> list[list[dict]]:
    """The dialogues to continue in a file: a line of plain text each, or records of any form (answers are ignored).

    Raises OSError or ValueError ("file:line: ...").
    """
    path, dialogues = Path(path), []
    if not path.is_file():
        raise OSError(f"--prompt_file {path}: no such file")
    if suffix(path) not in READERS or suffix(path) == ".txt":
        return [[{"role": "user", "content": line.strip()}] for line in _whole_lines(path) if line.strip()]
    for place, record in read_file(path):
        try:
            form = detect_form(record, question_only=True)
            messages = _messages(record, form)
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
        return len(self.examples) + (max(len(self.corpus) // self.piece - 1, 1) if len(self.corpus) else 0)

    def epoch(self, seed: int, epoch: int) -> list[Example]:
        """The examples of an epoch; which ones depends on (seed, epoch) only."""
        used = (len(self) - len(self.examples)) * self.piece
        phase = int(np.random.default_rng([seed, epoch, 1]).integers(len(self.corpus) - used + 1))
        rows = self.corpus[phase : phase + used].reshape(-1, self.piece)
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
    bos = [] if all(in_template) else [_required(tokenizer, "bos")]
    ids = _encode_texts(written, tokenizer, progress)
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
    dialogues = [record for record in records if "messages" in record]
    documents = [record["text"] for record in records if "text" in record]
    corpora = [record["corpus"] for record in records if "corpus" in record]
    piece = max_length - 1
    eos = [_required(tokenizer, "eos")] if insert_eos else []
    bos = [_required(tokenizer, "bos")] if documents or corpora else []

    prompts = _encode_prompts([r["messages"] for r in dialogues], tokenizer, chat_template, progress)
    responses = _encode_texts([r["response"] for r in dialogues], tokenizer, progress)
    drafts = _encode_texts([r["draft"] or "" for r in dialogues], tokenizer, progress)
    samples = [
        Example(prompt, response + eos, None if r["draft"] is None else draft + eos)
        for r, prompt, response, draft in zip(dialogues, prompts, responses, drafts)
    ]
    examples = [e for e in samples if len(e.prompt) + max(len(e.response), len(e.draft or [])) <= max_length]
    too_long = len(samples) - len(examples)
    if samples and not examples and not all_may_be_too_long:
        raise ValueError(
            f"all {too_long} samples are longer than --max_length {max_length}; the shortest has "
            f"{min(map(len, samples))} tokens: raise --max_length"
        )

    rows = [ids + eos for ids in _encode_texts(documents, tokenizer, progress)]
    corpus = []
    for text in corpora:
        # cut behind newlines into texts of at most 64k characters, so that all cores have work
        parts = _encode_texts(re.findall(r"(?s).{0,65535}\n|.{1,65536}", text), tokenizer, progress)
        row = [*chain.from_iterable(parts), *eos]
        if recut:
            corpus += row
        else:
            rows.append(row)
    if corpora and recut and len(corpus) < piece:
        raise ValueError(
            f"the text has {len(corpus)} tokens, fewer than one example of --max_length {max_length}; "
            "give more text or a smaller --max_length"
        )
    for row in filter(None, rows):
        parts = np.array_split(np.array(row, dtype=np.int32), -(-len(row) // piece))
        examples += [Example(bos, part.tolist()) for part in parts]
    return Dataset(examples, too_long, np.array(corpus, dtype=np.int32), bos, piece)


def pad_response(example: Example, pad_len: int, pad_id: int, max_length: int | None = None) -> Example:
    """ME-DLM, stages 2 and 3: pads the response to a multiple of `pad_len`, but no further than to a sequence of
    `max_length`. The model learns to predict the pads, and so how long an answer is."""
    pads = -len(example.response) % pad_len
    if max_length is not None:
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
