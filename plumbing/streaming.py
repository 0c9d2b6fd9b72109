"""A corpus that does not fit: read a little at a time, shared among processes, gone on with where it was left.

    files   ->  pieces  ->  lanes  ->  pools  ->  micro-batches

    piece   a stretch of a file: about a megabyte of its lines, found by seeking; or, of a file that cannot be entered
            in the middle (gzip, CSV, parquet), every n-th of its records
    lane    a share of the pieces, in an order drawn anew for every epoch. Micro-batch number i of the run comes from
            lane i modulo their number, whoever computes it: so runs with other numbers of processes, as long as they
            divide the number of lanes, see the same micro-batches
    pool    the next thousand records of a lane, or megabyte: tokenized, shuffled and dealt out before the next is read

A lane stands at [epoch, piece, record, used]: where its pool begins, and how many micro-batches of it were handed out.
That is all a checkpoint needs. An epoch is one of a lane: it reads none of its records twice before it has read them
all, and may be a little ahead of the others.

Files are local, behind an http(s) address, or on the hub; remote ones are read in ranges, with patience.
"""

import http.client
import io
import os
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers

import data
import toy

LANES = 16
PIECE = 1 << 20  # bytes, at most; small corpora are cut finer
POOL_RECORDS, POOL_CHARACTERS = 1000, 1 << 20
LONGEST_LINE = 1 << 26  # bytes
PATIENCE = 5  # epochs in a row in which a lane may come out empty, as happens with few and long records
WAITS = (0.5, 1, 2, 4, 8)  # seconds between attempts to read a remote file

hurry = threading.Event()  # set when the run is to stop: nobody waits for a remote file any more


# ---------------------------------------------------------------------------------------------------- files


class RemoteFile:
    """A file behind a URL. Has what the readers of data.py use of a Path: its name, and open()."""

    def __init__(self, url: str, size: int | None = None):
        self.url = url
        self.size = self.fetch("HEAD") if size is None else size

    def __str__(self):
        return self.url

    @property
    def name(self) -> str:
        return Path(urlsplit(self.url).path).name

    def open(self, mode: str = "rb"):
        return io.BufferedReader(_Ranges(self), 1 << 18)

    def fetch(self, method: str, start: int = 0, end: int = 0):
        """HEAD: the size in bytes. GET: bytes start to end. Tries again after errors that may pass; raises OSError."""
        request = urllib.request.Request(self.url, method=method)
        # compressed on the way, a response has no size, and ranges would be of other bytes
        request.add_header("Accept-Encoding", "identity")
        if method == "GET":
            request.add_header("Range", f"bytes={start}-{end - 1}")
        if self.url.startswith(f"{constants.ENDPOINT}/"):
            for name, value in build_hf_headers().items():  # not for the servers that the hub points to
                request.add_unredirected_header(name, value)
        for wait in (0, *WAITS):
            if wait and hurry.wait(wait):
                break
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    if method == "HEAD" and answer.headers["content-length"]:
                        return int(answer.headers["content-length"])
                    if answer.status == 206:
                        body = b""
                        while (part := answer.read1(1 << 16)) and not hurry.is_set():
                            body += part
                        if len(body) == end - start:
                            return body
                        raise EOFError(f"{len(body)} bytes instead of {end - start}")
                break  # no size, or the whole file instead of a part
            except urllib.error.HTTPError as e:
                if e.code < 500 and e.code not in (408, 429):
                    raise OSError(f"{self.url}: the server says {e.code} {e.reason}") from None
                reason = f"status {e.code}"
            except (OSError, EOFError, http.client.HTTPException) as e:
                reason = f"{type(e).__name__}: {e}"
        else:
            raise OSError(f"{self.url}: cannot be read ({reason}; tried {len(WAITS) + 1} times)")
        if hurry.is_set():
            raise OSError(f"{self.url}: interrupted")
        raise OSError(f"{self.url}: the server does not serve parts of a file; download it, and name the file")


class _Ranges(io.RawIOBase):
    """A RemoteFile as Python sees files."""

    def __init__(self, file: RemoteFile):
        self.file, self.at = file, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.file.size}[whence]
        return self.at

    def readinto(self, buffer):
        end = min(self.at + len(buffer), self.file.size)
        if end <= self.at:
            return 0
        read = self.file.fetch("GET", self.at, end)
        buffer[: len(read)] = read
        self.at += len(read)
        return len(read)


def find_files(name: str) -> list:
    """The files a name of a dataset spec stands for: Paths and RemoteFiles. Raises ValueError or OSError."""
    if name.startswith(("http://", "https://")):
        files = [RemoteFile(name)]
    elif os.path.exists(name) or name.count("/") == 0 or data.suffix(name) in data.READERS:
        files = data.data_files(name)
    else:
        owner, dataset, *folder = name.split("/")
        inside = "/".join([*folder, ""])
        try:
            info = HfApi().dataset_info(f"{owner}/{dataset}", files_metadata=True)
        except Exception as e:  # the hub client raises a dozen unrelated classes
            raise data.no_dataset(name, e) from e
        files = [
            RemoteFile(hf_hub_url(info.id, s.rfilename, repo_type="dataset", revision=info.sha), s.size)
            for s in sorted(info.siblings, key=lambda s: s.rfilename)
            if s.rfilename.startswith(inside) and data.is_data(s.rfilename)
        ]
    for file in files:
        if data.suffix(file) not in data.READERS or data.suffix(file) == ".json":
            formats = ", ".join(s for s in data.READERS if s != ".json")
            raise ValueError(f"{file}: cannot be streamed; use {formats}, or one of these with .gz")
    if not files:
        raise ValueError(f"{name}: no data file there; use {', '.join(data.READERS)}")
    return files


def size_of(file) -> int:
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def characters(records: list[dict]) -> int:
    """How much text is in normal records."""
    return sum(map(len, data.texts(records)))


def is_cuttable(file) -> bool:
    """Whether one can begin to read in the middle: lines of text, not compressed."""
    return data.suffix(file) in (".jsonl", ".txt") and not file.name.endswith(".gz")


# ---------------------------------------------------------------------------------------------------- pieces


class Piece(NamedTuple):
    """Of a cuttable file: the lines that begin at bytes start to end. Of another: records start, start + step, ..."""

    file: object
    start: int
    end: int | None = None
    step: int = 1

    def records(self, skip: int = 0) -> Iterator[tuple[str, dict | ValueError]]:
        """(place, record), as data.read_file gives them, without the first `skip`."""
        if is_cuttable(self.file):
            lines = read_lines(self.file, self.start, self.end)
            yield from islice(_parse(self.file, lines), skip, None)
        elif data.suffix(self.file) == ".txt":
            lines = data.numbered_lines(self.file)
            yield from islice(_parse(self.file, lines), self.start + skip * self.step, None, self.step)
        else:
            yield from islice(data.read_file(self.file), self.start + skip * self.step, None, self.step)


def read_lines(file, start: int, end: int | None) -> Iterator[tuple[str, str | ValueError]]:
    """The lines that begin at bytes start to end. The one around `start` began before, and belongs to another piece."""
    with file.open("rb") as f:
        at = start
        if start:
            f.seek(start - 1)
            at = start - 1 + len(f.readline(LONGEST_LINE))
        while end is None or at < end:
            line = f.readline(LONGEST_LINE)
            if not line:
                return
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                raise ValueError(f"{file}: byte {at}: a line of more than {LONGEST_LINE >> 20} MB")
            yield f"{file}: byte {at}", data.decode_line(line)
            at += len(line)


def _parse(file, lines) -> Iterator[tuple[str, dict | ValueError]]:
    """Records of .jsonl lines; of .txt, stretches of some 16,000 characters."""
    if data.suffix(file) == ".jsonl":
        yield from data.parse_jsonl(lines)
        return
    where, parts, length = "", [], 0
    for place, line in lines:
        if isinstance(line, ValueError):
            yield place, line
            continue
        where, length = where or place, length + len(line)
        parts.append(line)
        if length >= 1 << 14:
            yield where, {"corpus": "".join(parts)}
            where, parts, length = "", [], 0
    if "".join(parts).strip():
        yield where, {"corpus": "".join(parts)}


# ---------------------------------------------------------------------------------------------------- the corpus


class Corpus:
    """The files of a dataset spec, and how they are dealt to lanes.

    hold_out: so many records are kept for validation, from files whose names say so (test, validation, ...), else the
    first ones.
    """

    def __init__(self, spec: str, seed: int, hold_out: int, text_field: str | None, skip_bad_records: bool):
        self.spec, self.seed, self.skip_bad, self.text_field = spec, seed, skip_bad_records, text_field
        self.bad, self.too_long, self.forms, self.files, self.begin, self.held_out = 0, 0, {}, [], {}, []
        for source in data.parse_spec(spec):
            if source.name in toy.SOURCES:
                raise ValueError(f"--streaming: {source.name} is made up in memory; leave --streaming out")
            if source.train is not None:
                raise ValueError(f"--streaming does not count records: leave train:{source.train} out of {spec!r}")
            train, held_out = data.split_files(find_files(source.name))
            want, most = source.test, float("inf")
            if want is None:  # of a small corpus, a twentieth
                want, most = hold_out, sum(map(size_of, train)) / 20
            for file in held_out or train:
                got, after = self._read_start(file, want, most)
                self.held_out += got
                want -= len(got)
                if not held_out:
                    self.begin[file] = after
                if want <= 0 or (got and not held_out):
                    break
            self.files += train
        self.total = sum(size_of(file) for file in self.files)

    def _read_start(self, file, n: int, most: float) -> tuple[list[dict], int]:
        """The first good records of a file, n of them or `most` characters, and where the next record begins: a byte of
        a cuttable file, else a number."""
        found, after, length = [], 0, 0
        if n <= 0:
            return found, after
        records = Piece(file, 0).records()
        for after, (place, record) in enumerate(records, 1):  # noqa: B007
            normal = self.normal(file, place, record)
            found += normal
            length += characters(normal)
            if len(found) == n or length >= most:
                break
        if is_cuttable(file):  # the byte is in the place of the next record
            place, _ = next(records, (f" {size_of(file)}", None))
            after = int(place.rsplit(" ", 1)[1])
        return found, after

    def normal(self, file, place: str, record) -> list[dict]:
        """The record in normal form; [] for a broken one that is skipped. Raises ValueError with its place."""
        try:
            if isinstance(record, ValueError):
                raise record
            if data.suffix(file) == ".txt":
                return [record]
            form = self.form_of(file) or data.detect_form(record, self.text_field)
            return [data.normalise(record, form, self.text_field)]
        except ValueError as error:
            self.refuse(place, error)
            return []

    def form_of(self, file) -> str | None:
        """That of the file's first readable record, whichever record this process happens to read first; None where no
        record has a known form."""
        if file not in self.forms:
            self.forms[file] = None
            for place, record in Piece(file, 0).records():
                try:
                    if isinstance(record, ValueError):
                        raise record
                    self.forms[file] = data.detect_form(record, self.text_field)
                    break
                except ValueError as error:
                    data.bad_record(place, error, self.skip_bad)  # counted when its turn comes
        return self.forms[file]

    def refuse(self, place: str, error: ValueError) -> None:
        """Counts a bad record, where these are to be skipped; else raises ValueError."""
        self.bad += data.bad_record(place, error, self.skip_bad)

    def lanes(self, world: int) -> int:
        """A multiple of the number of processes: LANES where there is enough to read at any place, else as few as
        possible, since files that cannot be cut are read by every lane that has a part in them."""
        if not all(map(is_cuttable, self.files)):
            return world
        lanes = LANES
        while lanes > 1 and self.total < lanes << 14:
            lanes //= 2
        return lanes if lanes % world == 0 else -(-lanes // world) * world

    def deal(self, lanes: int, epoch: int) -> list[list[Piece]]:
        """The pieces of every lane in this epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        size = min(PIECE, max(self.total // (16 * lanes), 1024))
        cuttable = [file for file in self.files if is_cuttable(file)]
        others = [file for file in self.files if file not in cuttable]
        pieces = [
            Piece(file, at, min(at + size, size_of(file)))
            for file in cuttable
            for at in range(self.begin.get(file, 0), size_of(file), size)
        ]
        if len(others) >= lanes:
            pieces += [Piece(file, self.begin.get(file, 0)) for file in others]
            others = []
        order = rng.permutation(len(pieces))
        dealt = [[pieces[i] for i in order[lane::lanes]] for lane in range(lanes)]
        for lane, mine in enumerate(dealt):
            mine += [Piece(file, self.begin.get(file, 0) + lane, None, lanes) for file in others]
        return [[mine[i] for i in rng.permutation(len(mine))] for mine in dealt]

    def sample(self, most: int = 1 << 23) -> list[dict]:
        """Records from all over the corpus, about so many characters of them, the same on every process: for tokenizers
        and frequencies."""
        found, length, pieces = [], 0, self.deal(1, 0)[0]
        for n, piece in enumerate(pieces, 1):
            for place, record in piece.records():
                for normal in self.normal(piece.file, place, record):
                    found.append(normal)
                    length += characters([normal])
                if length >= most * n / min(len(pieces), 32):
                    break
            if length >= most:
                break
        if not found:
            raise ValueError(f"--dataset_args {self.spec}: nothing to train on")
        return found

    def fingerprint(self) -> list:
        """All that decides which pieces there are and in which order."""
        files = [[file.name, size_of(file), self.begin.get(file, 0)] for file in self.files]
        return [self.seed, *files]


# ---------------------------------------------------------------------------------------------------- lanes


class Lane:
    """Micro-batches without end. batches_of(pool, rng): those of a pool, which is a list of (place, normal record)."""

    def __init__(self, corpus: Corpus, number: int, lanes: int, batches_of, position=(0, 0, 0, 0)):
        self.corpus, self.number, self.lanes, self.batches_of = corpus, number, lanes, batches_of
        self.epoch, self.piece, self.record, self.used = position
        self.next = (self.epoch, self.piece, self.record)  # where the next pool begins
        self.ready, self.reader, self.pieces, self.skip = deque(), None, None, self.used
        self.idle = 0  # fills in a row that gave no micro-batch and ended an epoch

    def position(self) -> list[int]:
        return [self.epoch, self.piece, self.record, self.used] if self.ready or self.skip else [*self.next, 0]

    def take(self) -> list:
        while not self.ready:
            self.fill()
        self.used += 1
        return self.ready.popleft()

    def fill(self) -> None:
        """Reads, shuffles and cuts up the next pool."""
        self.epoch, self.piece, self.record = epoch, piece, record = self.next
        if self.pieces is None:
            self.pieces = self.corpus.deal(self.lanes, epoch)[self.number]
        pieces, pool, length = self.pieces, [], 0
        while piece < len(pieces) and len(pool) < POOL_RECORDS and length < POOL_CHARACTERS:
            if self.reader is None:
                self.reader = pieces[piece].records(record)
            got = next(self.reader, None)
            if got is None:
                self.reader, piece, record = None, piece + 1, 0
                continue
            record += 1
            place, raw = got
            for normal in self.corpus.normal(pieces[piece].file, place, raw):
                pool.append((place, normal))
                length += characters([normal])
        rng = np.random.default_rng([self.corpus.seed, self.epoch, self.number, self.piece, self.record])
        self.ready = deque(self.batches_of(pool, rng)[self.skip :])
        self.used, self.skip = self.skip, 0
        self.next = (epoch, piece, record)
        self.idle = 0 if self.ready else self.idle
        if piece == len(pieces):
            self.idle += not self.ready
            if self.idle > PATIENCE:
                raise ValueError(
                    f"--dataset_args {self.corpus.spec}: a whole share of it, 1 of {self.lanes}, holds nothing to "
                    "train on; leave --streaming out, use fewer processes, or raise --max_length"
                )
            self.next, self.pieces = (epoch + 1, 0, 0), None


class Stream:
    """This process's micro-batches of a streamed corpus."""

    def __init__(self, corpus: Corpus, ranks, group: int, batches_of, stored: dict | None, step: int):
        """group: micro-batches in a step, of all processes. stored: what `gather` made for the checkpoint at `step`."""
        self.corpus, self.ranks, self.group, self.number = corpus, ranks, group, step * group
        lanes, positions = corpus.lanes(ranks.world), {}
        if stored:
            if stored["files"] != corpus.fingerprint():
                raise ValueError(
                    f"--dataset_args {corpus.spec}: not the files, the --seed or the held-out part that the checkpoint "
                    "was made with"
                )
            lanes, positions = stored["lanes"], stored["positions"]
            if lanes % ranks.world:
                fitting = [n for n in range(1, lanes + 1) if lanes % n == 0]
                raise ValueError(f"this run has {lanes} lanes: go on with {', '.join(map(str, fitting))} processes")
        self.lanes = {
            n: Lane(corpus, n, lanes, batches_of, positions.get(str(n), (0, 0, 0, 0)))
            for n in range(ranks.rank, lanes, ranks.world)
        }
        self.count = lanes

    def take(self) -> list[list]:
        """The micro-batches of the next step. Raises OSError or ValueError when data cannot be had."""
        numbers = range(self.number + self.ranks.rank, self.number + self.group, self.ranks.world)
        self.number += self.group
        return [self.lanes[n % self.count].take() for n in numbers]

    def position(self) -> dict:
        return {str(n): lane.position() for n, lane in self.lanes.items()}

    def gather(self, position: dict) -> dict:
        """For a checkpoint: the positions of all processes. All must call."""
        merged = {}
        for part in self.ranks.gather(position):
            merged |= part
        return {"lanes": self.count, "positions": merged, "files": self.corpus.fingerprint()}
