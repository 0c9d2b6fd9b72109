"""What a training run is fed with: the micro-batches of every step, from memory or from a stream.

    begin(step, stored)   where to go on; stored: what `gather` made for the checkpoint
    take()                this process's micro-batches of the next step, lists of examples
    position()            where the stream stands now, on this process
    gather(position)      the same of all processes, for a checkpoint

The micro-batches of a run are one sequence: process r of n takes every n-th, beginning with the r-th. So four processes
see what one process with four times the accumulation sees.

A corpus that does not fit into memory (--streaming) is read a little at a time:

    piece   a stretch of a file: about a megabyte of its lines, found by seeking; or, of a file that cannot be entered
            in the middle (gzip, CSV, parquet), every n-th of its records
    shard   a share of the pieces, in an order drawn anew for every epoch. Micro-batch i of the run comes from shard i
            modulo their number: so runs with other numbers of processes, as long as they divide the number of shards,
            see the same micro-batches
    buffer  the next thousand records of a shard, or megabyte: tokenized, shuffled, handed out before the next is read

A shard stands at [epoch, piece, record, used]: where its buffer begins, and how many micro-batches of it were handed
out. That is all a checkpoint needs. An epoch is one of a shard: it reads none of its records twice before it has read
them all, and may be a little ahead of the others.
"""

import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterator
from itertools import chain, count, islice, takewhile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from fsspec.spec import AbstractBufferedFile
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers

import data
import toy
from parallel import StopSignal

SHARDS = 16
PIECE = 1 << 20  # bytes, at most; small corpora are cut finer
BUFFER_RECORDS, BUFFER_CHARACTERS = 1000, 1 << 20
EMPTY_EPOCHS = 5  # in a row in which a shard may come out empty, as happens with few and long records
WAITS = (0, 0.5, 1, 2, 4, 8)  # seconds before each attempt to read a remote file


# ---------------------------------------------------------------------------------------------------- files


def fetch(url: str, start: int, end: int) -> tuple[bytes, int]:
    """(bytes start to end of a remote file, its size). Tries again after errors that may pass; raises OSError.

    The hub client's own retries would go on for 23 seconds when the run is to stop."""
    # compressed on the way, ranges would be of other bytes
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    if url.startswith(f"{constants.ENDPOINT}/"):
        headers |= build_hf_headers()  # the token; where the hub points to another server, the client drops it
    for wait in WAITS:
        again = time.monotonic() + wait
        while time.monotonic() < again and not StopSignal.requested:
            time.sleep(0.05)
        if StopSignal.requested:
            raise OSError(f"{url}: interrupted")
        try:
            with get_session().stream("GET", url, headers=headers, timeout=5) as answer:
                parts = answer.iter_raw() if answer.status_code == 206 else ()
                body = b"".join(takewhile(lambda _: not StopSignal.requested, parts))
        except Exception as e:  # the client raises a dozen unrelated classes
            reason = f"{type(e).__name__}: {e}"
            continue
        size = answer.headers.get("content-range", "").rpartition("/")[2]
        if len(body) == end - start and size.isdigit():
            return body, int(size)
        reason = f"status {answer.status_code} {answer.reason_phrase}"
        if answer.status_code < 500 and answer.status_code not in (206, 408, 429):
            raise OSError(f"{url}: the server does not hand out parts of this file ({reason}); download it yourself")
    raise OSError(f"{url}: cannot be read ({reason}; tried {len(WAITS)} times)")


class RemoteFile:
    """A file behind a URL. Has what is used of a Path: name, open(), stat().st_size."""

    def __init__(self, url: str, size: int | None = None):
        self.url, self.name = url, Path(urlsplit(url).path).name
        self.st_size = fetch(url, 0, 1)[1] if size is None else size

    def __str__(self):
        return self.url

    def stat(self):
        return self

    def open(self, mode: str = "rb"):
        return io.BufferedReader(_Ranges(None, self.url, size=self.st_size, cache_type="none"), 1 << 18)


class _Ranges(AbstractBufferedFile):
    """A remote file as Python sees files: fsspec's, but for how its bytes are had."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return fetch(self.path, start, min(end, self.size))[0]


def find_files(name: str, config: str | None = None) -> list:
    """The files a name of a dataset spec stands for: Paths and RemoteFiles. Raises ValueError or OSError."""
    is_url = name.startswith(("http://", "https://"))
    files = [RemoteFile(name)] if is_url else data.data_files(name, remote_files, config)
    streamed = [suffix for suffix in data.READERS if suffix != ".json"]
    for file in files:
        if data.suffix(file) not in streamed:
            raise ValueError(f"{file}: cannot be streamed; use {', '.join(streamed)}, or one of these with .gz")
    return files


def remote_files(repository: str, folder: str) -> list[RemoteFile]:
    """The data files of a hub dataset, in the version of this moment."""
    info = HfApi().dataset_info(repository, files_metadata=True)
    return [
        RemoteFile(hf_hub_url(info.id, s.rfilename, repo_type="dataset", revision=info.sha), s.size)
        for s in sorted(info.siblings, key=lambda s: s.rfilename)
        if s.rfilename.startswith(os.path.join(folder, ""))
    ]


def is_cuttable(file) -> bool:
    """Whether one can begin to read in the middle: lines of text, not compressed."""
    return data.suffix(file) in data.LINES and not file.name.endswith(".gz")


def read_piece(file, start: int = 0, end: int | None = None, step: int = 1, skip: int = 0) -> Iterator[tuple]:
    """(place, record), as data.read_file gives them, without the first `skip`. Of a cuttable file: the lines that begin
    at bytes start to end. Of another: records start, start + step, ..."""
    if not is_cuttable(file):
        return islice(data.read_file(file), start + skip * step, None, step)
    parse = data.LINES[data.suffix(file)]
    return islice(parse(read_lines(file, start, end)), skip, None)


def read_lines(file, start: int, end: int | None) -> Iterator[tuple[str, bytes]]:
    """(place, line) of those that begin at bytes start to end. The one around `start` belongs to the piece before."""
    with file.open("rb") as f:
        at = start
        if start:
            f.seek(start - 1)
            at = start - 1 + len(f.readline(data.LONGEST_LINE))
        try:
            for line in data.lines(f):
                if end is not None and at >= end:
                    return
                yield f"{file}: byte {at}", line
                at += len(line)
        except ValueError as error:
            raise ValueError(f"{file}: byte {at}: {error}") from None


# ---------------------------------------------------------------------------------------------------- the corpus


def collect(reader: Iterator[tuple], n: float, characters: float) -> tuple[list[dict], tuple | None, bool]:
    """Reads (..., place, [normal record] or []) until there are n records, or so much text: (the records, the last that
    was read, whether the reader came to its end)."""
    found, length, last = [], 0, None
    for last in reader:
        found += last[-1]
        length += sum(map(len, data.texts(last[-1])))
        if len(found) >= n or length >= characters:
            return found, last, False
    return found, last, True


class Corpus:
    """The files of a dataset spec, and how they are dealt to shards.

    hold_out: so many records are kept for validation, from files whose names say so (test, validation, ...), else the
    first ones.
    """

    def __init__(self, spec: str, seed: int, hold_out: int, named: tuple, skip_bad_records: bool):
        self.spec, self.seed, self.named, self.skip_bad = spec, seed, named, skip_bad_records
        self.bad, self.too_long = 0, 0  # records left out
        self.files, self.begin, self.held_out = [], {}, []
        for source in data.parse_spec(spec):
            if source.name in toy.SOURCES:
                raise ValueError(f"--streaming: {source.name} is made up in memory; leave --streaming out")
            if source.train is not None:
                raise ValueError(f"--streaming does not count records: leave train:{source.train} out of {spec!r}")
            train, held_out = data.split_files(find_files(source.name, source.config))
            self.files += train
            self.begin |= dict.fromkeys(train, 0)
            n, limit = source.test, math.inf
            if n is None:  # of a small corpus, a twentieth
                n, limit = hold_out, sum(file.stat().st_size for file in train) / 20
            for file in held_out or train:
                if n <= 0:
                    break
                found, after = self.read_start(file, n, limit)
                self.held_out += found
                n -= len(found)
                if not held_out:
                    self.begin[file] = after
                    n = 0 if found else n  # from one file, so that the others are read from their start
        self.total = sum(file.stat().st_size for file in self.files)

    def read_start(self, file, n: int, characters: float) -> tuple[list[dict], int]:
        """The first n good records of a file, or so much text, and where the next record begins: a byte of a cuttable
        file, else a number."""
        records = self.records((file,))
        found, last, _ = collect(records, n, characters)
        if not is_cuttable(file):
            return found, last[0] if last else 0
        _, place, _ = next(records, (0, f" {file.stat().st_size}", []))
        return found, int(place.rsplit(" ", 1)[1])

    def records(self, piece: tuple, skip: int = 0) -> Iterator[tuple[int, str, list[dict]]]:
        """(number of the next record, place, [the record in normal form]) without the first `skip`; [] for a broken one
        that is left out. Raises ValueError with its place."""
        usable = data.usable(read_piece(*piece, skip=skip), self.named, self.skip_bad)
        for number, (place, normal) in enumerate(usable, skip + 1):
            self.bad += not normal
            yield number, place, normal

    def shards(self, world: int) -> int:
        """A multiple of the number of processes: SHARDS where there is enough to read at any place, else as few as
        possible, since files that cannot be cut are read by every shard that has a part in them."""
        if not all(map(is_cuttable, self.files)):
            return world
        shards = SHARDS
        while shards > 1 and self.total < shards << 14:
            shards //= 2
        return -(-shards // world) * world

    def deal(self, shards: int, epoch: int) -> list[list[tuple]]:
        """The pieces of every shard in this epoch, as read_piece takes them."""
        rng, dealt = np.random.default_rng([self.seed, epoch]), []
        size = min(PIECE, max(self.total // (16 * shards), 1024))
        pieces = [
            (file, at, at + size)
            for file in filter(is_cuttable, self.files)
            for at in range(self.begin[file], file.stat().st_size, size)
        ]
        others = [file for file in self.files if not is_cuttable(file)]
        if len(others) >= shards:
            pieces += [(file, self.begin[file]) for file in others]
            others = []
        order = rng.permutation(len(pieces))
        for shard in range(shards):
            mine = [pieces[i] for i in order[shard::shards]]
            mine += [(file, self.begin[file] + shard, None, shards) for file in others]
            dealt.append([mine[i] for i in rng.permutation(len(mine))])
        return dealt

    def sample(self, characters: int = 1 << 23) -> list[dict]:
        """Records from all over the corpus, about so many characters of them, the same on every process: for tokenizers
        and frequencies."""
        found, length, pieces = [], 0, self.deal(1, 0)[0]
        for n, piece in enumerate(pieces, 1):
            if length < characters:
                share = characters * n / min(len(pieces), 32)
                records, _, _ = collect(self.records(piece), math.inf, share - length)
                found += records
                length += sum(map(len, data.texts(records)))
        if not found:
            raise ValueError(f"--dataset_args {self.spec}: nothing to train on")
        return found

    def fingerprint(self) -> list:
        """All that decides which pieces there are and in which order."""
        return [self.seed, *([file.name, file.stat().st_size, self.begin[file]] for file in self.files)]


# ---------------------------------------------------------------------------------------------------- feeds


class Feed:
    """What both kinds of feed share: from normal records to micro-batches, as the flags and the method ask.

    method: a module; of it are used PACKED (micro-batches are packed rows of max_length tokens, or single examples) and
    check_example(example, settings), if it has one. records: by which a run that goes on sees that its data are others.
    group: micro-batches in a step, of all processes together.
    """

    def __init__(self, args, method, settings, tokenizer, records, ranks):
        if args.pad_len and tokenizer.pad_id is None:
            raise ValueError("--pad_len: the tokenizer has no pad token; leave --pad_len out")
        self.args, self.method, self.settings, self.tokenizer, self.ranks = args, method, settings, tokenizer, ranks
        self.group, self.positions = args.gradient_accumulation_steps * ranks.world, {}
        digest = hashlib.sha256()
        for record in records:
            digest.update(json.dumps(record).encode())
        self.digest = digest.hexdigest()

    def take(self) -> list[list]:
        """This process's micro-batches of the next step. Raises OSError or ValueError when data cannot be had."""
        return list(islice(self.micro_batches, self.args.gradient_accumulation_steps))

    def position(self) -> dict:
        """Of this process, before the next step; of what is in memory, the step says it all."""
        return dict(self.positions)

    def begin(self, step: int, stored: dict | None) -> None:
        """Sets this process's micro-batches from this step on, and says where the data have changed."""
        if (stored or {}).get("digest", self.digest) != self.digest:
            spec = f"--dataset_args {self.args.dataset_args}"
            self.ranks.say(f"{spec}: not the records that the checkpoint was made with; going on with the new ones")

    def gather(self, position: dict) -> dict:
        """The positions of all processes, for a checkpoint. All must call."""
        return {"digest": self.digest}

    def encode(self, records: list[dict], **options) -> data.Dataset:
        a = self.args
        options = {"max_length": a.max_length, "insert_eos": a.insert_eos} | options
        options |= {"truncate": a.truncation == "right", "learn_prompts": not a.mask_prompt_loss}
        return data.encode(records, self.tokenizer, **options)

    def check(self, example: data.Example) -> None:
        """Raises now what the method would raise in the middle of a step: ValueError."""
        try:
            getattr(self.method, "check_example", lambda *_: None)(example, self.settings)
        except ValueError as error:
            start = self.tokenizer.decode(example.response, skip_special=False)[:60]
            raise ValueError(f"{error}: {start!r}...") from None

    def pad(self, examples: list) -> list:
        """--pad_len: responses end in pads, from which the model learns how long an answer is."""
        a = self.args
        if not a.pad_len:
            return examples
        options = self.tokenizer.pad_id, a.max_length, self.tokenizer.is_published
        return [data.pad_response(e, a.pad_len, *options) for e in examples]

    def batches(self, examples: list, seed: int, epoch: int) -> list[list]:
        """Micro-batches, lists of examples, in an order drawn from (seed, epoch)."""
        size = self.args.per_device_train_batch_size
        if not self.method.PACKED:
            return list(data.batches(examples, size, seed, epoch))
        rows = data.pack(examples, self.args.max_length)
        return [[e for row in batch for e in row] for batch in data.batches(rows, size, seed, epoch)]


class MemoryFeed(Feed):
    """Training and validation examples (`eval`) in memory."""

    def __init__(self, args, method, settings, tokenizer, train_records, eval_records, ranks):
        super().__init__(args, method, settings, tokenizer, train_records + eval_records, ranks)
        self.train = self.encode(train_records, progress=ranks.is_main)
        held_out = self.encode(eval_records, recut=False)
        self.eval = self.pad(held_out.examples)
        for e in self.train.examples + held_out.examples:
            self.check(e)
        for part, kind in ((self.train, ""), (held_out, "held-out ")):
            if part.too_long:
                ranks.say(f"{len(part.too_long)} {kind}samples longer than --max_length {args.max_length} left out")
        if not len(self.train):
            shortest = min(self.train.too_long, default=0)
            reason = f"; the shortest sample has {shortest} tokens, longer than --max_length {args.max_length}"
            raise ValueError(f"--dataset_args {args.dataset_args}: nothing to train on{reason if shortest else ''}")
        tokens = sum(len(e) for e in self.rows())
        ranks.say(f"{len(self.train)} examples an epoch, {tokens} tokens; {len(self.eval)} held out")
        self.steps_per_epoch = len(self.epoch(0)) / self.group

    def rows(self, epoch: int = 0) -> list:
        return self.pad(self.train.epoch(self.args.seed, epoch))

    def epoch(self, epoch: int) -> list[list]:
        return self.batches(self.rows(epoch), self.args.seed, epoch)

    def begin(self, step: int, stored: dict | None) -> None:
        super().begin(step, stored)
        everything, first = chain.from_iterable(map(self.epoch, count())), step * self.group + self.ranks.rank
        self.micro_batches = islice(everything, first, None, self.ranks.world)


class StreamedFeed(Feed):
    """Micro-batches of a corpus that is never held, and a few examples held out (`eval`)."""

    steps_per_epoch = math.inf

    def __init__(self, args, method, settings, tokenizer, corpus: Corpus, ranks):
        self.corpus, self.sample = corpus, corpus.sample(1 << 20)
        super().__init__(args, method, settings, tokenizer, corpus.held_out + self.sample, ranks)
        self.eval = self.pad(self.examples(corpus.held_out, "the last held-out record"))
        ranks.say(f"{corpus.total / 1e6:.1f} MB in {len(corpus.files)} files, streamed; {len(self.eval)} held out")

    def rows(self) -> list:
        """Some of the examples, from all over the corpus."""
        return self.examples(self.sample, "the last of a sample")

    def examples(self, records: list[dict], place: str) -> list:
        """Those that can be trained on. place: of the last record, for error messages."""
        found = []
        texts = [{"text": r["corpus"]} for r in records if "corpus" in r]  # of which none is the end of anything
        for part, options in ((texts, {"insert_eos": False}), ([r for r in records if "corpus" not in r], {})):
            encoded = self.encode(part, **options)
            self.corpus.too_long += len(encoded.too_long)
            for e in encoded.examples:
                try:
                    self.check(e)
                    found.append(e)
                except ValueError as error:
                    where = f"{place} or one of the {len(records) - 1} records before it"
                    self.corpus.bad += data.bad_record(where, error, self.corpus.skip_bad)
        return found

    def shard(self, number: int, epoch: int, piece: int, record: int, used: int) -> Iterator[tuple[list, list[int]]]:
        """(micro-batch, position after it) from a position on, without end: reads, shuffles and cuts up one buffer
        after the other. Raises OSError or ValueError."""
        begin, empty = (epoch, piece, record), 0
        while empty <= EMPTY_EPOCHS:
            epoch, empty = begin[0], empty + 1
            reader = self.read(number, *begin)
            while begin[0] == epoch:
                records, last, ended = collect(reader, BUFFER_RECORDS, BUFFER_CHARACTERS)
                following = (epoch + 1, 0, 0) if ended else (epoch, *last[:2])
                rng = np.random.default_rng([self.corpus.seed, epoch, number, *begin[1:]])
                examples = self.pad(self.examples(records, last[2] if last else ""))
                batches = self.batches(examples, int(rng.integers(2**31)), 0)
                for n, batch in enumerate(batches[used:], used + 1):
                    yield batch, [*begin, n] if n < len(batches) else [*following, 0]
                    empty = 0
                begin, used = following, 0
        raise ValueError(
            f"--dataset_args {self.corpus.spec}: a whole share of it, 1 of {self.count}, holds nothing to train on; "
            "leave --streaming out, use fewer processes, or raise --max_length"
        )

    def read(self, number: int, epoch: int, piece: int, record: int) -> Iterator[tuple[int, int, str, list[dict]]]:
        """(piece, number of the next record in it, place, [normal record] or []) of a shard to the end of the epoch."""
        pieces = self.corpus.deal(self.count, epoch)[number]
        for at in range(piece, len(pieces)):
            for following, place, normal in self.corpus.records(pieces[at], record):
                yield at, following, place, normal
            record = 0

    def begin(self, step: int, stored: dict | None) -> None:
        super().begin(step, stored)
        corpus, rank, world = self.corpus, self.ranks.rank, self.ranks.world
        corpus.bad = corpus.too_long = 0  # samples and held-out records have been counted until here
        self.count, positions = corpus.shards(world), {}
        if stored:
            if stored["files"] != corpus.fingerprint():
                raise ValueError(
                    f"--dataset_args {corpus.spec}: not the files, the --seed or the held-out part that the checkpoint "
                    "was made with"
                )
            self.count, positions = stored["lanes"], stored["positions"]  # the checkpoints' word for shards
            if self.count % world:
                fitting = [str(n) for n in range(1, self.count + 1) if self.count % n == 0]
                raise ValueError(f"this run has {self.count} shards: go on with {', '.join(fitting)} processes")
        self.positions = {str(n): positions.get(str(n), [0, 0, 0, 0]) for n in range(rank, self.count, world)}
        self.shards = {n: self.shard(int(n), *position) for n, position in self.positions.items()}
        self.micro_batches = self.from_number(step * self.group + rank)

    def from_number(self, first: int) -> Iterator[list]:
        for number in count(first, self.ranks.world):
            n = str(number % self.count)
            batch, self.positions[n] = next(self.shards[n])
            yield batch

    def gather(self, position: dict) -> dict:
        bad, too_long = map(sum, zip(*self.ranks.gather((self.corpus.bad, self.corpus.too_long))))
        if bad or too_long:
            self.ranks.say(f"left out of this run so far: {bad} broken records, {too_long} longer than --max_length")
        positions = {n: at for part in self.ranks.gather(position) for n, at in part.items()}
        files = self.corpus.fingerprint()
        return super().gather(position) | {"lanes": self.count, "positions": positions, "files": files}


def open_data(args, ranks):
    """(kind of feed, the records that it takes, a function that gives some of them)."""
    if args.streaming:
        hold_out = 0 if args.eval_strategy == "no" else 200
        corpus = Corpus(args.dataset_args, args.seed, hold_out, data.named_fields(args), args.skip_bad_records)
        return StreamedFeed, [corpus], corpus.sample
    train_records, eval_records, reports = data.load_records(
        args.dataset_args, args.seed, named=data.named_fields(args), skip_bad_records=args.skip_bad_records
    )
    for report in reports:
        ranks.say(str(report))
    return MemoryFeed, [train_records, eval_records], lambda: train_records
