"""Feeds: every record once an epoch on some process, exact resumption, and servers that misbehave."""

import csv
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import shutil
import signal
import threading
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from fleet import Fleet, metrics, run
from hypothesis import given
from hypothesis import strategies as st

import data
from plumbing import feed


def texts(n, seed=0):
    rng = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, 30))) for i in range(n)]


def as_file(kind, path, texts):
    file, lines = path / f"corpus.{kind}", "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if kind == "csv":
        with open(file, "w", newline="") as f:
            csv.writer(f).writerows([["text"], *[[text] for text in texts]])
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    else:
        file.write_bytes(gzip.compress(lines.encode()) if kind.endswith(".gz") else lines.encode())
    return file


def jsonl(path, texts):
    return as_file("jsonl", path.parent, texts).rename(path)


def corpus(spec, hold_out=0, seed=1, skip=False):
    return feed.Corpus(str(spec), seed, hold_out, (), skip)


class Plain(feed.StreamedFeed):
    """Micro-batches of three texts: all of a stream but the tokenizer."""

    digest = "of the records"

    def __init__(self, corpus, rank=0, world=1, group=1, stored=None, step=0):
        self.ranks = SimpleNamespace(rank=rank, world=world, gather=lambda part: [part])
        self.args = SimpleNamespace(gradient_accumulation_steps=group // world, pad_len=None)
        self.corpus, self.group = corpus, group
        self.begin(step, stored)

    def examples(self, records, place):
        return [r["text"] if "text" in r else r.get("corpus") or r["response"] for r in records]

    def batches(self, examples, seed, epoch):
        return list(data.batches(examples, 3, seed, epoch))


def an_epoch(source, world):
    """Everything that the processes hand out before they begin again."""
    seen = []
    for shard in [shard for rank in range(world) for shard in Plain(source, rank, world).shards.values()]:
        for batch, position in shard:
            if position > [1, 0, 0, 0]:
                break
            seen += batch
    return seen


# ---------------------------------------------------------------------------------------------------- pieces


@given(st.lists(st.text(st.characters(blacklist_characters="\n", codec="utf-8"))), st.integers(1, 40), st.booleans())
def test_every_line_belongs_to_one_piece(tmp_path_factory, lines, size, ends):
    raw = "\n".join(lines).encode() + b"\n" * ends
    file = tmp_path_factory.mktemp("lines") / "a.txt"
    file.write_bytes(raw)
    cuts = [*range(0, len(raw), size), len(raw)]
    found = [line for a, b in itertools.pairwise(cuts) for _, line in feed.read_lines(file, a, b)]
    assert found == list(io.BytesIO(raw))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_an_epoch_holds_every_record_once(kind, world, tmp_path):
    records = texts(3000)
    source = corpus(as_file(kind, tmp_path, records))
    assert source.shards(world) == (16 if kind == "jsonl" else world)
    seen = an_epoch(source, world)
    assert Counter(seen) == Counter(records)
    assert seen != records


def test_many_packed_files_are_shared_whole(tmp_path):
    for i in range(9):
        as_file("jsonl.gz", tmp_path, [f"text {i}"]).rename(tmp_path / f"part{i}.jsonl.gz")
    source = corpus(tmp_path)
    assert sorted(an_epoch(source, 4)) == [f"text {i}" for i in range(9)]
    assert sum(map(len, source.deal(4, 0))) == 9


def test_text_is_handed_out_in_stretches(tmp_path):
    text = "".join(f"line {i} of the text\n" for i in range(20000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.txt", "b.txt.gz"):
        stretches = an_epoch(corpus(tmp_path / name), 2)
        assert sorted("".join(stretches).splitlines()) == sorted(text.splitlines())
        assert max(map(len, stretches)) < 20000


def test_the_order_is_new_in_every_epoch_and_a_function_of_the_seed(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", texts(50))
    stream, again, other = Plain(corpus(file)), Plain(corpus(file)), Plain(corpus(file, seed=2))
    first, second = ([stream.take()[0] for _ in range(17)] for _ in range(2))
    assert Counter(itertools.chain(*first)) == Counter(itertools.chain(*second)) == Counter(texts(50))
    assert first != second
    assert [again.take()[0] for _ in range(17)] == first
    assert [other.take()[0] for _ in range(17)] != first


@pytest.mark.parametrize("world", [2, 4, 8])
def test_micro_batches_do_not_depend_on_the_number_of_processes(world, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", texts(2000))

    def steps(world):
        streams = [Plain(corpus(file), rank, world, 8) for rank in range(world)]
        for _ in range(40):
            parts = [stream.take() for stream in streams]
            yield [part[i] for i in range(8 // world) for part in parts]

    assert list(steps(world)) == list(steps(1))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_a_stream_goes_on_from_any_position(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "BUFFER_RECORDS", 20)
    file = as_file(kind, tmp_path, texts(400))
    stream, positions, taken = Plain(corpus(file), group=2), [], []
    for _ in range(200):
        positions.append(json.loads(json.dumps(stream.gather(stream.position()))))
        taken.append(stream.take())
    for step in (0, 1, 7, 50, 66, 67, 68, 133, 199):
        restored = Plain(corpus(file), group=2, stored=positions[step], step=step)
        assert restored.gather(restored.position()) == positions[step]
        assert [restored.take() for _ in range(5)][: 200 - step] == taken[step : step + 5]


def test_a_position_stored_by_an_earlier_version(tmp_path):
    """What checkpoints hold, and the order of records, stay as they are."""
    file = jsonl(tmp_path / "a.jsonl", texts(600))
    positions = {"0": [0, 0, 0, 46], "1": [0, 0, 0, 46]}
    stored = {"lanes": 2, "positions": positions, "files": [1, ["a.jsonl", 53968, 586]]}
    rest = Plain(corpus(f"{file}[test:5]"), group=4, stored=stored, step=23)
    found = json.dumps([rest.take() for _ in range(60)])
    assert hashlib.sha256(found.encode()).hexdigest().startswith("5b41d3a76fcc0e566afb55326e1e741b")
    assert rest.gather(rest.position())["positions"] == {"0": [1, 0, 0, 67], "1": [1, 0, 0, 66]}


def test_few_long_records_may_leave_a_shard_without_any_for_an_epoch(tmp_path):
    records = [f"{i}: " + "long " * 1000 for i in range(40)]
    streams = [Plain(corpus(jsonl(tmp_path / "a.jsonl", records)), rank, 8, 8) for rank in range(8)]
    assert {text for stream in streams for _ in range(60) for text in stream.take()[0]} == set(records)


def test_held_out_records_are_not_trained_on(tmp_path):
    records = texts(300)
    for kind in ("jsonl", "csv"):
        source = corpus(f"{as_file(kind, tmp_path, records)}[test:20]")
        assert [r["text"] for r in source.held_out] == records[:20]
        assert Counter(an_epoch(source, 2)) == Counter(records[20:])
    assert 10 < len(corpus(tmp_path / "corpus.jsonl", hold_out=200).held_out) < 25, "a twentieth"
    folder = tmp_path / "split"
    folder.mkdir()
    jsonl(folder / "train.jsonl", records)
    jsonl(folder / "test.jsonl", ["held out"] * 7)
    source = corpus(f"{folder}[test:5]", hold_out=20)
    assert [r["text"] for r in source.held_out] == ["held out"] * 5
    assert Counter(an_epoch(source, 1)) == Counter(records)


def test_a_sample_comes_from_all_over_the_corpus(tmp_path):
    source = corpus(jsonl(tmp_path / "a.jsonl", texts(20000)))
    numbers = [int(r["text"].split(":")[0]) for r in source.sample(200_000)]
    assert 1000 < len(numbers) < 6000
    assert len({n // 1000 for n in numbers}) > 10


def test_the_corpus_is_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "BUFFER_RECORDS", 20)
    file = jsonl(tmp_path / "a.jsonl", [text * 50 for text in texts(5000)])
    tracemalloc.start()
    stream = Plain(corpus(file), group=16)
    assert sum(len(batch) for _ in range(120) for batch in stream.take()) > 5000
    assert tracemalloc.get_traced_memory()[1] < file.stat().st_size / 5
    tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------- servers


class Server:
    """Files over HTTP on this machine. trouble(path) may spoil an answer; storage: another server, to which this one
    points, as the hub does."""

    def __init__(self, folder, trouble=lambda path: None, storage=None):
        self.folder, self.trouble, self.storage = folder, trouble, storage
        self.asked, self.spoilt = [], 0
        methods = {"do_GET": lambda request: self.answer(request), "log_message": lambda *_: None}
        handler = type("Handler", (http.server.BaseHTTPRequestHandler,), methods | {"protocol_version": "HTTP/1.1"})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request):
        path, trouble = request.path, self.trouble(request.path)
        self.asked.append((path, request.headers["Authorization"]))
        self.spoilt += bool(trouble)
        file, headers, status = self.folder / path.rpartition("/")[2], {}, 206
        if trouble == "503":
            return request.send_error(503)
        if path.startswith("/api/datasets/"):
            names = [{"rfilename": f.name, "size": f.stat().st_size} for f in self.folder.iterdir()]
            body, status = json.dumps({"id": "owner/texts", "sha": "c0ffee", "siblings": names}).encode(), 200
        elif self.storage:
            body, status, headers = b"", 302, {"Location": f"{self.storage.url}/{file.name}"}
        elif not file.is_file():
            return request.send_error(404)
        else:
            start, end = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
            body = file.read_bytes()
            headers = {"Content-Range": f"bytes {start}-{end}/{len(body)}"}
            body = body[start : end + 1]
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(name, value)
        request.end_headers()
        request.close_connection = trouble == "drop"  # in the middle of the answer
        request.wfile.write(body[: len(body) // 2] if trouble == "drop" else body)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    monkeypatch.setattr(feed, "WAITS", (0, 0.01, 0.02, 0.02, 0.02, 0.02))
    yield
    feed.StopSignal.requested = False


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_a_server_that_drops_connections_and_answers_503(kind, tmp_path):
    records, turn = texts(500), itertools.count()
    file = as_file(kind, tmp_path, records)
    with Server(tmp_path, lambda path: ["503", "drop", None][next(turn) % 3]) as server:
        assert Counter(an_epoch(corpus(f"{server.url}/{file.name}"), 2)) == Counter(records)
        assert server.spoilt > 1


def test_a_fault_that_lasts_and_requests_that_cannot_succeed(tmp_path):
    with Server(tmp_path, lambda path: "503") as server:
        with pytest.raises(OSError, match=r"a.jsonl: cannot be read \(status 503 .*; tried 6 times\)"):
            corpus(f"{server.url}/a.jsonl")
        assert len(server.asked) == 6
    with pytest.raises(OSError, match=r"a.jsonl: cannot be read \(ConnectError: .*refused"):
        corpus(f"{server.url}/a.jsonl")
    with Server(tmp_path) as server:
        with pytest.raises(OSError, match=r"b\.jsonl: .*\(status 404 Not Found\)"):
            corpus(f"{server.url}/b.jsonl")
        with pytest.raises(OSError, match=r"c\.jsonl: the server does not hand out parts .*\(status 200 OK\)"):
            corpus(f"{server.url}/api/datasets/c.jsonl")
        assert len(server.asked) == 2


def test_a_stop_request_ends_the_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "WAITS", (0, 3600))
    with Server(tmp_path, lambda path: setattr(feed.StopSignal, "requested", True) or "503") as server:
        with pytest.raises(OSError, match=r"a.jsonl: interrupted"):
            corpus(f"{server.url}/a.jsonl")
        assert len(server.asked) == 1


def test_what_came_before_is_not_read_again(tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(8000))
    with Server(tmp_path) as server:
        stream = Plain(corpus(f"{server.url}/a.jsonl"))
        stored = [stream.gather(stream.position()) for _ in range(1500) if stream.take()][-1]
        whole = len(server.asked)
        server.asked.clear()
        Plain(corpus(f"{server.url}/a.jsonl"), stored=stored, step=1500).take()
        assert len(server.asked) < whole / 10


def test_a_hub_dataset_is_streamed_without_being_downloaded_and_the_token_stays_at_the_hub(tmp_path, monkeypatch):
    jsonl(tmp_path / "train-0.jsonl", texts(200))
    jsonl(tmp_path / "train-1.jsonl", texts(200, 1))
    jsonl(tmp_path / "test.jsonl", ["held out"] * 9)
    (tmp_path / "README.txt").write_text("not data")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Server(tmp_path) as storage, Server(tmp_path, storage=storage) as hub:
        monkeypatch.setattr(feed.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(feed, "HfApi", lambda: huggingface_hub.HfApi(endpoint=hub.url))
        monkeypatch.setattr(feed, "hf_hub_url", lambda repo, name, revision, **_: f"{hub.url}/{repo}/{revision}/{name}")
        source = corpus("owner/texts", hold_out=5)
        assert [file.name for file in source.files] == ["train-0.jsonl", "train-1.jsonl"]
        assert [r["text"] for r in source.held_out] == ["held out"] * 5
        assert Counter(an_epoch(source, 2)) == Counter(texts(200) + texts(200, 1))
        corpus(f"{storage.url}/train-0.jsonl")
        assert {token for path, token in hub.asked if path.endswith(".jsonl")} == {"Bearer secret"}
        assert {token for _, token in storage.asked} == {None}


# ---------------------------------------------------------------------------------------------------- runs

FLAGS = (
    "--method editflow --x0_sampler masks[length:8] --max_length 48 --vocab_size 300 --per_device_train_batch_size 4 "
    "--streaming True --logging_steps 3 --eval_steps 10 --save_steps 7 --max_steps 30 --eval_samples 0"
)
ENDLESS = "--max_steps 100000 --save_steps 100000 --logging_steps 1 --eval_strategy no"


def kill_9(steps, rank):
    """From within, so that the moment does not depend on the machine's load."""
    take, taken = feed.StreamedFeed.take, itertools.count()

    def watched(self):
        if next(taken) == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self)

    feed.StreamedFeed.take = watched


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_kill_9_and_another_number_of_processes(kind, tmp_path):
    file = as_file(kind, tmp_path, texts(3000))
    flags = f"{FLAGS} --dataset_args {file} --gradient_accumulation_steps 2 --method medlm --pad_len 8"
    flags = flags.replace("--method editflow --x0_sampler masks[length:8]", "")
    run(flags, tmp_path / "undisturbed", 2)
    out = tmp_path / "killed"
    for steps in (9, 16):  # after checkpoint 7, and after 21
        assert -signal.SIGKILL in Fleet(flags, out, 2, functools.partial(kill_9, steps)).wait()
    assert (out / "checkpoint-21").exists()
    shutil.copytree(out, tmp_path / "one")
    run(flags, out, 2)
    assert metrics(out) == metrics(tmp_path / "undisturbed")
    run(flags.replace("accumulation_steps 2", "accumulation_steps 4"), tmp_path / "one", 1)
    if kind == "jsonl":
        for a, b in zip(metrics(tmp_path / "one"), metrics(out), strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    else:  # each shard reads all of a packed file, so there are only as many as there were processes
        fleet = Fleet(flags.replace("steps 30", "steps 31"), tmp_path / "one", 4)
        assert fleet.wait() == [1] * 4
        assert "this run has 2 shards: go on with 1, 2 processes" in fleet.said()


def set_waits(waits, rank):
    feed.WAITS = waits


@pytest.mark.slow
@pytest.mark.parametrize("end", ["a lasting fault", "sigterm"])
def test_what_ends_a_run_saves_it_and_it_can_go_on(end, tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(4000))
    broken, out = threading.Event(), tmp_path / "out"
    with Server(tmp_path, lambda path: "503" if broken.is_set() else None) as server:
        flags = f"{FLAGS} {ENDLESS} --dataset_args {server.url}/a.jsonl"
        world, waits = {"a lasting fault": (2, (0, 0.05)), "sigterm": (1, (0, 3600))}[end]
        fleet = Fleet(flags, out, world, functools.partial(set_waits, waits))
        fleet.until((out / "metrics.jsonl").exists)
        broken.set()
        if end == "sigterm":
            fleet.until(lambda: server.spoilt)
            fleet.kill(number=signal.SIGTERM)
            assert fleet.wait() == [0]
        else:
            assert fleet.wait() == [1, 1], fleet.said()
            assert "a.jsonl: cannot be read (status 503" in fleet.said()
        assert "the same command goes on from there" in fleet.said()
        broken.clear()
        (saved,) = out.glob("checkpoint-*")
        step = int(saved.name.removeprefix("checkpoint-"))
        run(f"{flags} --max_steps {step + 20} --lr_scheduler_type constant", out, world)
    assert [line["step"] for line in metrics(out)] == list(range(1, step + 21))


# ---------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_streamed_is_said(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    file = jsonl(tmp_path / "a.jsonl", texts(20))
    for spec, said in [
        ("toy", "toy is made up in memory"),
        (f"{file}[train:5]", "leave train:5 out"),
        (tmp_path / "list.json", "cannot be streamed; use .txt, .jsonl, .csv, .parquet"),
        (tmp_path / "nowhere.jsonl", "no such file"),
    ]:
        with pytest.raises(ValueError, match=said.replace(".", r"\.")):
            corpus(spec)


def test_broken_records_stop_the_stream_with_their_place_or_are_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": \n{"text": "two"}\n{"txt": "three"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl: byte 16: not JSON .*--skip_bad_records"):
        an_epoch(corpus(file), 1)
    source = corpus(file, skip=True)
    assert sorted(an_epoch(source, 1)) == ["one", "two"]
    assert source.bad == 4, "in two epochs"


def test_a_file_without_any_known_form_is_no_traceback(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"x": 1}\n{"y": 2}\n')
    with pytest.raises(ValueError, match=r"a.jsonl: byte 0: found fields 'x'"):
        corpus(file).sample()
    source = corpus(file, skip=True)
    with pytest.raises(ValueError, match="nothing to train on"):
        source.sample()
    assert source.bad == 2


def test_a_corpus_that_is_too_small_or_has_changed(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(ValueError, match="holds nothing to train on; leave --streaming out"):
        [Plain(corpus(file), rank, 4, 4).take() for rank in range(4)]
    stream = Plain(corpus(file))
    stored = stream.gather(stream.position())
    for other in (corpus(file, seed=2), corpus(f"{file}[test:1]"), corpus(jsonl(file, ["one", "two"]))):
        with pytest.raises(ValueError, match="not the files, the --seed or the held-out part"):
            Plain(other, stored=stored)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_LINE", 100)
    file = jsonl(tmp_path / "a.jsonl", ["short", "long " * 40])
    with pytest.raises(ValueError, match=r"byte 18: a line of more than"):
        an_epoch(corpus(file), 1)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt", "txt.gz", "csv", "csv.gz"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_line_has_a_limit_in_memory_too_and_however_small_it_is_packed(kind, stream, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_LINE", 1 << 20)
    file, content = tmp_path / f"a.{kind}", b'text\n{"text": "one"}\n' + b" " * (1 << 21)
    file.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    with pytest.raises(ValueError, match=rf"{file}.*a line of more than 1 MB"):
        list(feed.read_piece(file)) if stream else data.load_records(str(file), skip_bad_records=True)


@pytest.mark.parametrize("kind", ["json.gz", "parquet.gz", "json"])
def test_what_is_read_in_one_piece_has_a_limit(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGEST_FILE", 2)
    file = tmp_path / f"a.{kind}"
    for size, refused in ((1 << 20, False), (3 << 20, True)):
        content = b'[{"text": "one"}]' + b" " * size
        file.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
        if "json" in kind and not refused:
            assert len(list(data.read_file(file))) == 1
    with pytest.raises(ValueError, match=rf"{file}: .*more than 2 MB in one piece"):
        list(data.read_file(file))


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet.gz"])
def test_where_memory_ends_the_file_is_named(kind, tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    for name in ("decode", "read_whole"):
        monkeypatch.setattr(data, name, full)
    file = tmp_path / f"a.{kind}"
    file.write_bytes(gzip.compress(b"{}") if kind.endswith("gz") else b"{}")
    with pytest.raises(ValueError, match=rf"{file}: cannot be read \(MemoryError\)"):
        list(data.read_file(file))
