"""Streaming: every record once an epoch on some process, exact resumption, and servers that misbehave."""

import csv
import gzip
import http.server
import itertools
import json
import random
import resource
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from fleet import Fleet, forkserver, metrics, run
from hypothesis import given
from hypothesis import strategies as st

from plumbing import streaming


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts(n, seed=0):
    rng = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, 30))) for i in range(n)]


def corpus(spec, hold_out=0, seed=1, skip=False):
    return streaming.Corpus(str(spec), seed, hold_out, None, skip)


def plain(pool, rng):
    """Micro-batches of three records, shuffled: what train.py does, without a tokenizer."""
    records = [r.get("text") or r.get("corpus") or r["response"] for _, r in pool]
    order = rng.permutation(len(records))
    return [[records[i] for i in order[at : at + 3]] for at in range(0, len(order), 3)]


def ranks(world):
    return [SimpleNamespace(rank=rank, world=world, gather=lambda thing: [thing]) for rank in range(world)]


def an_epoch(source, world, lanes=None):
    """Everything that the processes hand out before they begin again."""
    seen, lanes = [], lanes or source.lanes(world)
    for number in range(lanes):
        lane = streaming.Lane(source, number, lanes, plain)
        while batch := lane.take():
            if lane.epoch:
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
    found = [line for a, b in itertools.pairwise(cuts) for _, line in streaming.read_lines(file, a, b)]
    assert found == [streaming.data.decode_line(line + b"\n") for line in raw.split(b"\n")[:-1]] + [
        line.decode().removeprefix("\ufeff") for line in [raw.rsplit(b"\n", 1)[-1]] if line
    ]


def as_file(kind, path, records):
    file = path / f"corpus.{kind}"
    if kind == "jsonl":
        return jsonl(file, records)
    if kind == "jsonl.gz":
        file.write_bytes(gzip.compress(jsonl(path / "plain.jsonl", records).read_bytes()))
        (path / "plain.jsonl").unlink()
    elif kind == "csv":
        with open(file, "w", newline="") as f:
            csv.writer(f).writerows([["text"], *[[r] for r in records]])
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": records}), file)
    return file


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_an_epoch_holds_every_record_once(kind, world, tmp_path):
    records = texts(3000)
    source = corpus(as_file(kind, tmp_path, records))
    assert source.lanes(world) == (16 if kind == "jsonl" else world)
    seen = an_epoch(source, world)
    assert Counter(seen) == Counter(records)
    assert seen != records


def test_many_packed_files_are_shared_whole(tmp_path):
    for i in range(9):
        (tmp_path / f"part{i}.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": f"text {i}"}).encode() + b"\n"))
    source = corpus(tmp_path)
    assert Counter(an_epoch(source, 4)) == Counter(f"text {i}" for i in range(9))
    assert sum(len(lane) for lane in source.deal(4, 0)) == 9


def test_text_is_handed_out_in_stretches(tmp_path):
    text = "".join(f"line {i} of the text\n" for i in range(20000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.txt", "b.txt.gz"):
        stretches = an_epoch(corpus(tmp_path / name), 2)
        assert sorted("".join(stretches).splitlines()) == sorted(text.splitlines())
        assert max(map(len, stretches)) < 20000


def test_the_order_is_new_in_every_epoch_and_a_function_of_the_seed(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", texts(500))
    lane = streaming.Lane(corpus(file), 0, 1, plain)
    first, second = ([lane.take() for _ in range(167)] for _ in range(2))
    assert Counter(itertools.chain(*first)) == Counter(itertools.chain(*second))
    assert first != second
    again = streaming.Lane(corpus(file), 0, 1, plain)
    assert [again.take() for _ in range(167)] == first
    other = streaming.Lane(corpus(file, seed=2), 0, 1, plain)
    assert [other.take() for _ in range(167)] != first


@pytest.mark.parametrize("world", [2, 4, 8])
def test_micro_batches_do_not_depend_on_the_number_of_processes(world, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", texts(2000))

    def steps(world):
        streams = [streaming.Stream(corpus(file), r, 8, plain, None, 0) for r in ranks(world)]
        for _ in range(40):
            parts = [stream.take() for stream in streams]
            yield [part[i] for i in range(8 // world) for part in parts]

    assert list(steps(world)) == list(steps(1))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_a_stream_goes_on_from_any_position(kind, tmp_path):
    file = as_file(kind, tmp_path, texts(400))
    (alone,) = ranks(1)
    stream = streaming.Stream(corpus(file), alone, 2, plain, None, 0)
    positions, taken = [], []
    for _ in range(200):
        positions.append(json.loads(json.dumps(stream.gather(stream.position()))))
        taken.append(stream.take())
    for step in (0, 1, 7, 50, 66, 67, 68, 133, 199):
        restored = streaming.Stream(corpus(file), alone, 2, plain, positions[step], step)
        assert restored.gather(restored.position()) == positions[step]
        assert [restored.take() for _ in range(5)][: 200 - step] == taken[step : step + 5]


def test_the_form_of_a_file_is_that_of_its_first_record(tmp_path):
    """Not of the first one that a process happens to read."""
    both = {"prompt": "a", "response": "b"}
    dialogue = {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    records = [both, *[both | dialogue] * 2000]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert set(an_epoch(corpus(tmp_path / "a.jsonl"), 4)) == {"b"}


def test_few_long_records_may_leave_a_lane_without_any_for_an_epoch(tmp_path):
    records = [f"{i}: " + "long " * 1000 for i in range(40)]
    source = corpus(jsonl(tmp_path / "a.jsonl", records))
    lanes = [streaming.Lane(source, n, 8, plain) for n in range(8)]
    seen = [Counter(text for _ in range(60) for text in lane.take()) for lane in lanes]
    assert set().union(*seen) == set(records)


def test_held_out_records_are_not_trained_on(tmp_path):
    records = texts(300)
    for kind in ("jsonl", "csv"):
        source = corpus(f"{as_file(kind, tmp_path, records)}[test:20]")
        assert [r["text"] for r in source.held_out] == records[:20]
        assert Counter(an_epoch(source, 2)) == Counter(records[20:])
    small = corpus(tmp_path / "corpus.jsonl", hold_out=200)
    assert 10 < len(small.held_out) < 25, "a twentieth"
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
    assert min(numbers) < 3000
    assert max(numbers) > 17000


# ---------------------------------------------------------------------------------------------------- memory


def read_much(file, result):
    source = streaming.Corpus(file, 0, 0, None, False)
    (alone,) = ranks(1)
    stream = streaming.Stream(source, alone, 16, plain, None, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = sum(len(batch) for _ in range(1500) for batch in stream.take())
    Path(result).write_text(json.dumps([records, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))


@pytest.mark.slow
def test_the_corpus_is_never_held(tmp_path):
    file = tmp_path / "large.jsonl"
    block = "".join(json.dumps({"text": text * 8}) + "\n" for text in texts(2000))
    with open(file, "w") as f:
        for _ in range(200_000_000 // len(block)):
            f.write(block)
    process = forkserver.Process(target=read_much, args=(str(file), str(tmp_path / "result")))
    process.start()
    process.join(120)
    records, kilobytes = json.loads((tmp_path / "result").read_text())
    assert records > 60_000
    assert kilobytes < 100_000, "of 200 MB"


# ---------------------------------------------------------------------------------------------------- servers


class Server:
    """Files over HTTP on this machine, as the hub serves them; `trouble(path)` may spoil an answer."""

    def __init__(self, folder, trouble=lambda path: None):
        self.folder, self.trouble, self.asked, self.spoilt = Path(folder), trouble, [], 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request):
        path, ranges = request.path, request.headers["Range"]
        self.asked.append((path, ranges))
        if path.startswith("/api/datasets/"):
            files = [f for f in sorted(self.folder.rglob("*")) if f.is_file()]
            names = [{"rfilename": str(f.relative_to(self.folder)), "size": f.stat().st_size} for f in files]
            body = json.dumps({"id": "owner/texts", "sha": "c0ffee", "siblings": names}).encode()
            request.send_response(200)
            request.send_header("Content-Type", "application/json")
        else:
            trouble = self.trouble(path)
            self.spoilt += bool(trouble)
            if trouble == "503":
                return request.send_error(503)
            file = self.folder / path.split("/resolve/c0ffee/")[-1].lstrip("/")
            if not file.is_file():
                return request.send_error(404)
            body = file.read_bytes()
            if trouble == "drop":  # in the middle of the answer
                request.send_response(206)
                request.send_header("Content-Length", str(len(body)))
                request.end_headers()
                request.wfile.write(body[: len(body) // 2])
                return request.connection.close()
            if ranges:
                start, end = map(int, ranges.removeprefix("bytes=").split("-"))
                body = body[start : end + 1]
            request.send_response(206 if ranges else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def little_patience(monkeypatch):
    monkeypatch.setattr(streaming, "WAITS", (0.01, 0.02, 0.02, 0.02, 0.02))
    streaming.hurry.clear()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_a_server_that_drops_connections_and_answers_503(kind, tmp_path, little_patience):
    records, rng = texts(500), random.Random(3)
    file = as_file(kind, tmp_path, records)
    with Server(tmp_path, lambda path: rng.choice(["503", "drop", None, None])) as server:
        seen = an_epoch(corpus(f"{server.url}/{file.name}"), 2)
        assert Counter(seen) == Counter(records)
        assert server.spoilt > 1


def test_a_fault_that_lasts_and_requests_that_cannot_succeed(tmp_path, little_patience):
    jsonl(tmp_path / "a.jsonl", texts(50))
    with Server(tmp_path, lambda path: "503") as server:
        with pytest.raises(OSError, match=r"a.jsonl: cannot be read \(status 503; tried 6 times\)"):
            corpus(f"{server.url}/a.jsonl")
        assert len(server.asked) == 6
    with Server(tmp_path) as server:
        with pytest.raises(OSError, match=r"b\.jsonl: the server says 404"):
            corpus(f"{server.url}/b.jsonl")
        assert len(server.asked) == 1
    with pytest.raises(OSError, match=r"a.jsonl: cannot be read \(URLError: .*refused"):
        corpus(f"{server.url}/a.jsonl")


def test_a_signal_ends_the_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "WAITS", (60,))
    streaming.hurry.clear()
    with Server(tmp_path, lambda path: "503") as server:
        threading.Timer(0.2, streaming.hurry.set).start()
        begin = time.monotonic()
        with pytest.raises(OSError, match="interrupted"):
            corpus(f"{server.url}/a.jsonl")
        assert time.monotonic() - begin < 5
    streaming.hurry.clear()


def test_what_came_before_is_not_read_again(tmp_path, little_patience):
    jsonl(tmp_path / "a.jsonl", texts(8000))
    (alone,) = ranks(1)
    with Server(tmp_path) as server:
        stream = streaming.Stream(corpus(f"{server.url}/a.jsonl"), alone, 1, plain, None, 0)
        position = [stream.position() for _ in range(1500) if stream.take()][-1]
        whole = len(server.asked)
        server.asked.clear()
        restored = streaming.Stream(corpus(f"{server.url}/a.jsonl"), alone, 1, plain, stream.gather(position), 1499)
        restored.take()
        assert len(server.asked) < whole / 10


def test_a_hub_dataset_is_streamed_without_being_downloaded(tmp_path, monkeypatch, little_patience):
    data = tmp_path / "data"
    data.mkdir()
    jsonl(data / "train-0.jsonl", texts(200))
    jsonl(data / "train-1.jsonl", texts(200, 1))
    jsonl(data / "test.jsonl", ["held out"] * 9)
    (tmp_path / "README.txt").write_text("not data")
    with Server(tmp_path) as server:
        monkeypatch.setattr(streaming.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(streaming, "HfApi", lambda: __import__("huggingface_hub").HfApi(endpoint=server.url))
        monkeypatch.setattr(
            streaming, "hf_hub_url",
            lambda repo, name, **_: f"{server.url}/datasets/{repo}/resolve/c0ffee/{name}",
        )  # fmt: skip
        source = corpus("owner/texts", hold_out=5)
        assert [file.name for file in source.files] == ["train-0.jsonl", "train-1.jsonl"]
        assert [r["text"] for r in source.held_out] == ["held out"] * 5
        assert Counter(an_epoch(source, 2)) == Counter(texts(200) + texts(200, 1))


# ---------------------------------------------------------------------------------------------------- runs

FLAGS = (
    "--method editflow --x0_sampler masks[length:8] --max_length 48 --vocab_size 300 --per_device_train_batch_size 4 "
    "--streaming True --logging_steps 3 --eval_steps 10 --save_steps 7 --max_steps 30 --eval_samples 0"
)


@pytest.mark.slow
def test_1_2_and_4_processes_have_the_same_losses(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", texts(3000))
    for world in (1, 2, 4):
        flags = f"{FLAGS} --dataset_args {file} --gradient_accumulation_steps {4 // world}"
        run(flags, tmp_path / f"on{world}", world)
    one, two, four = (metrics(tmp_path / f"on{world}") for world in (1, 2, 4))
    for a, b, c in zip(one, two, four, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert a == pytest.approx(c, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_kill_9_and_another_number_of_processes(kind, tmp_path):
    file = as_file(kind, tmp_path, texts(3000))
    flags = f"{FLAGS} --dataset_args {file} --method medlm --pad_len 8 --gradient_accumulation_steps 2"
    flags = flags.replace("--method editflow --x0_sampler masks[length:8]", "").replace('"text"', "")
    run(flags, tmp_path / "undisturbed", 2)
    out = tmp_path / "killed"
    for checkpoint in ("checkpoint-7", "checkpoint-21"):
        fleet = Fleet(flags, out, 2)
        fleet.until((out / checkpoint).exists)
        fleet.kill()
        assert fleet.wait(10) == [-9, -9], "too late"
    shutil.copytree(out, tmp_path / "one")
    run(flags, out, 2)
    assert metrics(out) == metrics(tmp_path / "undisturbed")
    flags = flags.replace("accumulation_steps 2", "accumulation_steps 4")
    if kind == "jsonl":
        run(flags, tmp_path / "one", 1)
        for a, b in zip(metrics(tmp_path / "one"), metrics(out), strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    else:  # each lane reads all of a packed file, so there are only as many as there were processes
        run(flags, tmp_path / "one", 1)
        fleet = Fleet(flags.replace("steps 30", "steps 31"), tmp_path / "one", 4)
        assert fleet.wait() == [1] * 4
        assert "this run has 2 lanes: go on with 1, 2 processes" in fleet.said()


@pytest.mark.slow
def test_a_lasting_fault_saves_and_the_run_can_go_on(tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(4000))
    broken = threading.Event()
    with Server(tmp_path, lambda path: "503" if broken.is_set() else None) as server:
        flags = f"{FLAGS} --dataset_args {server.url}/a.jsonl --max_steps 3000 --save_steps 10000 --logging_steps 1"
        flags += " --eval_strategy no"
        out = tmp_path / "out"
        fleet = Fleet(flags, out, 2, impatient)
        fleet.until((out / "metrics.jsonl").exists)
        broken.set()
        assert fleet.wait(30) == [1, 1], fleet.said()
        error = next(line for line in fleet.said().splitlines() if "error:" in line)
        assert "cannot be read (status 503" in error
        assert "saved in" in error
        assert "the same command goes on from there" in error
        broken.clear()
        (saved,) = out.glob("checkpoint-*")
        step = int(saved.name.removeprefix("checkpoint-"))
        flags = flags.replace("--max_steps 3000", f"--max_steps {step + 20} --lr_scheduler_type constant")
        run(flags, out, 2)
    assert [line["step"] for line in metrics(out)] == list(range(1, step + 21))


def impatient(rank):
    streaming.WAITS = (0.05, 0.05)


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
        an_epoch(corpus(file), 1, lanes=1)
    source = corpus(file, skip=True)
    assert sorted(an_epoch(source, 1, lanes=1)) == ["one", "two"]
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
    streams = [streaming.Stream(corpus(file), r, 4, plain, None, 0) for r in ranks(4)]
    with pytest.raises(ValueError, match="holds nothing to train on; leave --streaming out"):
        [stream.take() for stream in streams]
    (alone,) = ranks(1)
    stream = streaming.Stream(corpus(file), alone, 1, plain, None, 0)
    stored = stream.gather(stream.position())
    for other in (corpus(file, seed=2), corpus(f"{file}[test:1]"), corpus(jsonl(file, ["one", "two"]))):
        with pytest.raises(ValueError, match="not the files, the --seed or the held-out part"):
            streaming.Stream(other, alone, 1, plain, stored, 0)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "LONGEST_LINE", 100)
    file = jsonl(tmp_path / "a.jsonl", ["short", "long " * 40])
    with pytest.raises(ValueError, match=r"byte 18: a line of more than"):
        an_epoch(corpus(file), 1, lanes=1)
