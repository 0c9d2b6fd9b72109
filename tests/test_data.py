"""Files are read or refused with file and line, and batches lose nothing."""

import csv
import dataclasses
import gzip
import hashlib
import json
import re
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from conftest import CORPUS, DIALOGUE
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import toy
from data import Example, Source
from plumbing.tokenizer import Tokenizer, train_tokenizer

quick = settings(deadline=None, max_examples=60)
many = settings(deadline=None, max_examples=200)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer([CORPUS], 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def refusal(call, *args, **options) -> str | None:
    """The message of the ValueError that a call raises, if it does."""
    try:
        call(*args, **options)
    except ValueError as error:
        return str(error)


def jsonl(path, records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


# ------------------------------------------------------------------------------------------------------------ specs

names = st.text("aB7./-_ é", min_size=1).map(str.strip).filter(bool)
counts = st.none() | st.integers(0, 10**6)


@many
@given(sources=st.lists(st.builds(Source, names, counts, counts), min_size=1), signs=st.randoms())
def test_specs_are_read_back(sources, signs):
    def write_source(source):
        sizes = [f"{key}:{n}" for key, n in (("train", source.train), ("test", source.test)) if n is not None]
        signs.shuffle(sizes)
        return source.name + (f"[{', '.join(sizes)}]" if sizes else "")

    spec = write_source(sources[0])
    for source in sources[1:]:
        spec += signs.choice([" + ", "|", "+", " | "]) + write_source(source)
    if not data.os.path.exists(spec):
        assert data.parse_spec(spec) == sources


@many
@given(spec=st.text("ab/[]:,+|0 train test"))
def test_any_spec_is_read_or_refused(spec):
    message = refusal(data.parse_spec, spec)
    assert message.startswith("dataset spec") if message else all(source.name for source in data.parse_spec(spec))


def test_a_configuration_of_a_dataset_is_chosen_by_name(tmp_path, monkeypatch):
    assert data.parse_spec("o/d[name:main,train:1_0] + e[test:2, name:a-b]") == [
        Source("o/d", 10, None, "main"), Source("e", None, 2, "a-b")
    ]  # fmt: skip
    root = tmp_path / "main" / "snapshots" / "c0ffee"  # before a file's path in its dataset: does not count
    for name in ("main/train.jsonl", "data/main/b.jsonl", "main-train.jsonl", "mainly.jsonl", "a/main.b.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(root / name, [{"text": name}])
    monkeypatch.setattr(data.huggingface_hub, "snapshot_download", lambda *_, **__: str(root))
    expected = {"main/train.jsonl", "data/main/b.jsonl", "main-train.jsonl", "a/main.b.jsonl"}
    for name in ("owner/name", str(root)):
        train, _, _ = data.load_records(f"{name}[name:main,test:0]")
        assert {record["text"] for record in train} == expected
    with pytest.raises(ValueError, match=r"no data file of \[name:other\]"):
        data.load_records(f"{root}[name:other]")


def test_broken_specs():
    counts = ("", "a + ", "a[train]", "a[train:x]", "a[train:1,train:2]", "a[dev:3]", "a[test:-1]", "a[]b", "a[]")
    for spec in (*counts, "a[name:]", "a[name:b,name:c]", "a[name:b c]"):
        with pytest.raises(ValueError, match=r"dataset spec .* write name\["):
            data.parse_spec(spec)


def test_a_spec_that_is_a_path_is_taken_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a+b[1].txt", "x")
    assert data.parse_spec("a+b[1].txt") == [Source("a+b[1].txt")]


# ------------------------------------------------------------------------------------------------- files and records

USER = [{"role": "user", "content": "Q"}]
ANSWER = {"messages": USER, "response": "A", "draft": None}
FORM_CASES = [
    ("text", {"text": "T"}, {"text": "T"}),
    ("text", {"text": "T", "source": "where it comes from"}, {"text": "T"}),
    ("text", {"text": "T", "prompt": "without a response"}, {"text": "T"}),
    ("text", {"text": "T", "draft": "D"}, {"messages": [], "response": "T", "draft": "D"}),
    ("history/response", {"history": USER, "response": "A"}, ANSWER),
    ("history/response", {"history": USER, "response": "A", "source": "from where"}, ANSWER),
    ("history/response", {"history": [], "response": "A"}, ANSWER | {"messages": []}),
    ("messages", {"messages": [*USER, {"role": "assistant", "content": "A"}]}, ANSWER),
    ("messages", {"messages": [*USER, {"role": "assistant", "content": "A"}], "source": "from where"}, ANSWER),
    ("prompt/response", {"prompt": "Q", "response": "A"}, ANSWER),
    ("prompt/response", {"prompt": "Q", "response": "A", "source": "D"}, ANSWER | {"draft": "D"}),
    ("prompt/response", {"prompt": "Q", "response": "A", "draft": "", "source": "no"}, ANSWER | {"draft": ""}),
    ("prompt/response", {"prompt": "Q", "response": "A", "source": {"url": "provenance, not a draft"}}, ANSWER),
    ("question/answer", {"question": "Q", "answer": "A"}, ANSWER),
    ("instruction/input/output", {"instruction": "Q", "input": "", "output": "A", "text": "all of it"}, ANSWER),
    ("instruction/input/output", {"instruction": "Q", "input": None, "output": "A"}, ANSWER),
    (
        "instruction/input/output", {"instruction": "Q", "input": "I", "output": "A"},
        ANSWER | {"messages": [{"role": "user", "content": "Q\n\nI"}]},
    ),
]


@pytest.mark.parametrize(("form", "record", "normal"), FORM_CASES)
def test_every_record_form(form, record, normal, tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [record])
    assert data.detect_form(record) == (form, data.FORMS[form])
    unit = "dialogues" if "messages" in normal else "documents"
    assert data.load_records(path) == ([normal], [], [f"{path}: 1 {unit} to train on, 0 held out"])


def test_the_form_of_a_record_depends_on_nothing_else(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [record for _, record, _ in FORM_CASES])
    train, _, _ = data.load_records(f"{path}[test:0]")
    assert all(normal in train for _, _, normal in FORM_CASES)


def test_a_text_field_can_be_named(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{"Text": "T", "prompt": "Q", "response": "A", "text": "t"}])
    assert data.load_records(path, named=("Text",))[0] == [{"text": "T"}]
    assert data.load_records(path)[0] == [ANSWER]


def flags(text_field=None, prompt_field=None, response_field=None) -> tuple[str, ...]:
    return data.named_fields(SimpleNamespace(**locals()))


def test_question_and_answer_fields_can_be_named(tmp_path):
    record = {"problem": "Q", "solution": "A", "answer": "7", "text": "all of it", "draft": "D"}
    path = jsonl(tmp_path / "data.jsonl", [record])
    named = flags(prompt_field="problem", response_field="solution")
    assert data.load_records(path, named=named)[0] == [ANSWER | {"draft": "D"}]
    [other], _, _ = data.load_records(path, named=flags(prompt_field="problem", response_field="answer"))
    assert other["response"] == "7"
    assert data.read_prompts(path, flags(prompt_field="problem")) == [USER]
    for field, wrong in (("response", flags(prompt_field="problem")), ("prompt", flags(response_field="solution"))):
        with pytest.raises(ValueError, match=rf"data\.jsonl:1: field '{field}' must be text, found no such field"):
            data.load_records(path, named=wrong)
    with pytest.raises(ValueError, match="--text_field names a document"):
        flags("text", "problem")
    assert flags() == ()


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_all_formats_hold_the_same_records(packed, tmp_path):
    rows = [{"question": f'Q{i}, "so"', "answer": f"A\n{i}"} for i in range(5)]
    table = data.io.StringIO()
    writer = csv.DictWriter(table, ["question", "answer"])
    writer.writeheader()
    writer.writerows(rows)
    contents = {
        "a.jsonl": "\ufeff" + "\n\n".join(json.dumps(row) for row in rows),
        "b.json": json.dumps(rows),
        "c.json": json.dumps({"version": 1, "data": rows}),
        "d.csv": table.getvalue(),
    }
    for name, content in contents.items():
        path = write(tmp_path / (name + packed), content)
        records = data.load_records(path + "[test:0]")[0]
        found = sorted((record["messages"][0]["content"], record["response"]) for record in records)
        assert found == [(row["question"], row["answer"]) for row in rows], name


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: record 2: field 'text' must be text, found None"):
        data.load_records(str(path))
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("a.parquet", "b.parquet.gz"):
        train, _, [report] = data.load_records(f"{tmp_path}/{name}[test:0]", skip_bad_records=True)
        assert sorted(record["text"] for record in train) == ["one", "two"]
        assert "1 broken" in report
    path.write_bytes(b"PAR1, or so it says")
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read"):
        data.load_records(str(path))


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        data.load_records(write(tmp_path / "a.parquet", b"PAR1"))


BROKEN_LINES = {
    "{": "not JSON",
    "[1]": "must be an object",
    '"text"': "must be an object",
    "{}": "known forms are",
    '{"text": 1}': "must be text, found 1 ",
    '{"text": ""}': "found ''",
    '{"text": " \\n"}': "must be text",
    '{"text": null}': "found None",
    '{"text": "\\ud800"}': "not UTF-8",
    '{"text": "T", "draft": 3}': "'draft' must be text",
    "[" * 10**5: "not JSON",
    '{"text": ' + "1" * 5000 + "}": "not JSON",
}


@pytest.mark.parametrize("line", BROKEN_LINES, ids=lambda line: line[:20])
def test_a_broken_record_is_named_or_skipped_and_counted(line, tmp_path):
    good = '{"text": "T"}\n'
    path = write(tmp_path / "data.jsonl", good + line + "\n" + good)
    with pytest.raises(ValueError, match=BROKEN_LINES[line]) as error:
        data.load_records(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert "--skip_bad_records" in str(error.value)
    train, test, [report] = data.load_records(path, skip_bad_records=True)
    assert len(train) + len(test) == 2
    assert report.endswith(", 1 broken ones skipped")


BROKEN_DIALOGUES = {
    "last message": {"messages": USER},
    "must be a list of messages, found 'Q'": {"messages": "Q"},
    r"found \[\]": {"messages": []},
    r"list of messages, found \['Q'\]": {"messages": ["Q"]},
    "field 'role' must be text": {"messages": [{"role": 1, "content": "Q"}]},
    "field 'content'": {"history": [{"role": "user"}], "response": "A"},
    "field 'response' must be text": {"history": USER, "response": ["A"]},
    "field 'input'": {"instruction": "Q", "input": 1, "output": "A"},
    "found fields 'a', 'b'; known forms are messages, .*--text_field": {"a": 1, "b": 2},
}


@pytest.mark.parametrize("message", BROKEN_DIALOGUES)
def test_broken_dialogues(message, tmp_path):
    with pytest.raises(ValueError, match=rf"data\.jsonl:1: .*{message}"):
        data.load_records(jsonl(tmp_path / "data.jsonl", [BROKEN_DIALOGUES[message]]))


BROKEN_FILES = {
    "a.txt": (b"one\ntwo \xff\n", r":2: not UTF-8 .* character 5\)"),
    "latin.jsonl": (b'{"text": "T"}\n{"text": "\xe4"}', ":2: not UTF-8 .* character 11"),
    "empty.txt": (b" \n", ": no usable record"),
    "empty.jsonl": (b"\n\n", ": no usable record"),
    "a.json": (b'{"data": [\n1,,]}', ": cannot be read .*not JSON .*line 2"),
    "lines.json": (b'{"text": "T"}\n{"text": "T"}\n', "line 2 .*a .jsonl file holds one object per line"),
    "two.json": (b'{"a": [], "b": []}', ": .*exactly one list"),
    "number.json": (b"3", ": .*must hold a list"),
    "deep.json": (b"[" * 10**5, "not JSON"),
    "latin.json": (b'[\n{"text": "\xe4"}]', ": cannot be read .not UTF-8"),
    "item.json": (b'[{"text": "T"}, {}]', ": record 2: found fields ; known forms"),
    "a.csv": (b"question,answer\nQ,A\nQ,A,B\n", ":3: more values than fields"),
    "short.csv": (b"question,answer\nQ\n", ":2: field 'answer' must be text"),
    "quote.csv": (b'question,answer\nQ,A\n"Q"x,A\n', ":2: cannot be read from here on .*expected after"),
    "latin.csv": (b"question,answer\n\xe4,A\n", ":2: not UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files(name, tmp_path):
    content, message = BROKEN_FILES[name]
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        data.load_records(path)
    assert str(error.value).startswith(path)
    assert len(str(error.value).splitlines()) == 1


def test_a_line_that_is_not_utf8_is_left_out_alone(tmp_path):
    path = write(tmp_path / "a.txt", b"one\n\xff\n" + b" " * 20_000 + b"\ntwo\n")
    [record], _, [report] = data.load_records(f"{path}[test:0]", skip_bad_records=True)
    assert record == {"corpus": "one\n" + " " * 20_000 + "\ntwo\n"}
    assert "1 broken" in report


def test_files_that_are_not_there(tmp_path, monkeypatch):
    for name in (f"{tmp_path}/no.txt", "gsm8k", "../nothing", f"{tmp_path}/no"):
        with pytest.raises(ValueError, match=r"no such file or folder \(nor a hub dataset"):
            data.load_records(name)
    with pytest.raises(ValueError, match=r"no data file; use \.txt, \.jsonl"):
        data.load_records(str(tmp_path))
    with pytest.raises(ValueError, match=r"a\.docx: no data file; use .txt"):
        data.load_records(write(tmp_path / "a.docx", "x"))
    whole = gzip.compress(b'{"text": "T"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: cannot be read \(Compressed file ended"):
        data.load_records(f"{tmp_path}/a.jsonl.gz")


def test_which_files_of_a_folder_are_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = ["[a].jsonl/b.csv", "[a]/c.txt.gz", "d/e/f.parquet", "g.json"]
    others = [".git/h.jsonl", "d/.i.jsonl", "dataset_infos.json", "README.txt", "j.py"]
    for name in inside + others:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "in" / name, "x")
    assert data.data_files("in") == sorted(data.Path("in", name) for name in inside)
    assert data.data_files("in/README.txt") == [data.Path("in/README.txt")]


def test_hub_datasets(tmp_path, monkeypatch):
    """The hub's answer is a folder, read like any other; its many errors become one line."""
    import huggingface_hub

    jsonl(tmp_path / "train-00000.jsonl", [{"text": "a"}])
    jsonl(tmp_path / "test-00000.jsonl", [{"text": "b"}])
    write(tmp_path / "dataset_infos.json", "{}")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert data.load_records("owner/name")[:2] == ([{"text": "a"}], [{"text": "b"}])
    assert asked == ["owner/name"]

    def unreachable(name, **_):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(OSError, match=r"owner/name: no such .* from the hub \(RuntimeError: no route\)$"):
        data.load_records("owner/name")


garbage = st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass"))
scraps = [b'{"text": "T"}', b'{"text":', b"\n", b",", b'"', b"[", b"]", b"{}", b"text\n", b"\xff", b"\0", b"\r", b"9"]


@many
@given(
    name=st.sampled_from(["g.txt", "g.jsonl", "g.json", "g.csv", "g.jsonl.gz"]),
    content=garbage | st.lists(st.sampled_from(scraps), max_size=12).map(b"".join),
    packed=st.booleans(),
    skip=st.booleans(),
)
def test_garbage_is_read_or_refused_with_file_and_line(folder, name, content, packed, skip):
    path = folder / name
    path.write_bytes(gzip.compress(content) if packed and name.endswith(".gz") else content)
    message = refusal(data.load_records, str(path), skip_bad_records=skip)
    if message:
        assert re.match(re.escape(str(path)) + r":(\d+:| record \d+:| no usable record| cannot be read)", message)
        assert len(message.splitlines()) == 1
    else:
        train, test, [report] = data.load_records(str(path), skip_bad_records=skip)
        assert all(set(record) in ({"text"}, {"corpus"}) for record in train + test)
        assert skip or "broken" not in report


json_leaves = st.none() | st.integers() | st.floats() | st.text(max_size=5)
json_values = json_leaves | st.lists(json_leaves, max_size=3) | st.dictionaries(st.text(max_size=5), json_leaves)
a_message = {"role": st.just("assistant") | json_leaves, "content": st.text() | json_leaves}
messages = st.lists(st.fixed_dictionaries(a_message))
fields = st.sampled_from(["text", "messages", "history", "prompt", "response", "draft", "source"])
any_record = json_values | st.dictionaries(fields, json_values | messages)


@quick
@given(records=st.lists(any_record, max_size=4), first=st.sampled_from([record for _, record, _ in FORM_CASES]))
def test_any_json_is_read_or_skipped(folder, records, first):
    train, test, [report] = data.load_records(jsonl(folder / "any.jsonl", [first, *records]), skip_bad_records=True)
    bad = re.search(r", (\d+) broken ones skipped$", report)
    assert len(train) + len(test) + int(bad[1] if bad else 0) == 1 + len(records)
    for record in train + test:
        assert set(record) in ({"text"}, {"messages", "response", "draft"})
        assert all(isinstance(text, str) for text in data.texts([record]))


# --------------------------------------------------------------------------------------------------------- hold-out


def test_hold_out_is_seeded_and_complete(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{"text": str(i)} for i in range(1000)])
    train, test, [report] = data.load_records(path, seed=3)
    assert (len(train), len(test)) == (950, 50)
    assert report.endswith("950 documents to train on, 50 held out")
    assert {r["text"] for r in train + test} == {str(i) for i in range(1000)}
    assert (train, test) == data.load_records(path, seed=3)[:2]
    assert test != data.load_records(path, seed=4)[1]
    expected = {"[train:10]": (10, 50), "[test:7]": (993, 7), "[train:9,test:991]": (9, 991), "[train:1000]": (1000, 0)}
    for spec, sizes in expected.items():
        train, test, _ = data.load_records(path + spec)
        assert (len(train), len(test)) == sizes
        assert not {r["text"] for r in train} & {r["text"] for r in test}
    for spec in ("[train:1001]", "[test:1001]", "[train:500,test:501]"):
        with pytest.raises(ValueError, match="asks for more than there is"):
            data.load_records(path + spec)
    both = data.load_records(f"{path}[train:10,test:5] + {path}[train:20,test:1]")
    assert list(map(len, both)) == [30, 6, 2]


def test_held_out_files_and_texts(tmp_path):
    for name in ("train.txt", "more.txt", "valid.txt"):
        write(tmp_path / name, "".join(f"{name} {i}\n" for i in range(100)))
    train, test, _ = data.load_records(f"{tmp_path}[test:10]")
    assert train[0]["corpus"].count("\n") >= 200
    assert test == [{"corpus": "".join(f"valid.txt {i}\n" for i in range(10))}]
    train, test, _ = data.load_records(f"{tmp_path}/train.txt")
    assert train[0]["corpus"] + test[0]["corpus"] == (tmp_path / "train.txt").read_text()
    assert test[0]["corpus"].count("\n") == 5
    jsonl(tmp_path / "x.jsonl", [{"text": "T"}])
    with pytest.raises(ValueError, match=r"holds \.txt files beside files of records"):
        data.load_records(str(tmp_path))


# --------------------------------------------------------------------------------------------------------- examples


def test_dialogues_become_prompt_and_response(bpe):
    record = {"messages": DIALOGUE, "response": "12 bottles", "draft": "13 beer"}
    [example] = data.encode([record], bpe, max_length=200).examples
    assert bpe.decode(example.prompt, skip_special=False) == bpe.write_chats([DIALOGUE])[0]
    assert bpe.decode(example.response, skip_special=False) == "12 bottles<|im_end|>"
    assert bpe.decode(example.draft, skip_special=False) == "13 beer<|im_end|>"
    assert example.prompt == data.encode_prompts([DIALOGUE], bpe)[0]
    without = Tokenizer(bpe.backend, bpe.config, bpe.chat_template)
    without.configure(chat_template=False)
    [raw] = data.encode([record], without, max_length=200, insert_eos=False).examples
    text = 'Be brief.\nHow many bottles?\n\n 12 \nUnd "größer"?'
    assert bpe.decode(raw.prompt, skip_special=False) == "<|bos|>" + text
    assert bpe.decode(raw.response, skip_special=False) == "12 bottles"
    assert data.encode_prompts([[]], bpe)[0] == [bpe.bos_id]


def test_too_long_samples_are_left_out_and_their_lengths_kept(bpe):
    def sample(n, draft=None):
        return {"messages": USER, "response": "1" * n, "draft": draft}

    prompt = len(data.encode_prompts([USER], bpe)[0])
    records = [sample(n) for n in (1, 9, 10, 50)] + [sample(1, draft="1" * 10)]
    kept = data.encode(records, bpe, max_length=prompt + 10)
    assert ([len(e.response) for e in kept.examples], len(kept)) == ([2, 10], 2)
    assert kept.too_long == [prompt + n for n in (11, 51, 11)]


@quick
@given(n=st.integers(1, 60), max_length=st.integers(2, 20))
def test_long_texts_are_cut_evenly_and_lose_nothing(bpe, n, max_length):
    examples = data.encode([{"text": "7" * n}], bpe, max_length=max_length).examples
    assert all(e.prompt == [bpe.bos_id] for e in examples)
    assert [i for e in examples for i in e.response] == [*bpe.encode("7" * n), bpe.eos_id]
    sizes = [len(e.response) for e in examples]
    assert max(sizes) <= max_length - 1
    assert max(sizes) - min(sizes) <= 1


@quick
@given(n=st.integers(7, 200), max_length=st.integers(2, 8), epoch=st.integers(0, 5))
def test_a_corpus_is_cut_elsewhere_in_every_epoch(bpe, n, max_length, epoch):
    digits = "".join(str(i * i % 10) for i in range(n))
    dataset = data.encode([{"corpus": digits}], bpe, max_length=max_length, insert_eos=False)
    examples = dataset.epoch(seed=1, epoch=epoch)
    assert len(examples) == len(dataset)
    assert all(e.prompt == [bpe.bos_id] and len(e) == max_length for e in examples)
    ids = bpe.encode(digits)
    joined = [i for e in examples for i in e.response]
    assert any(joined == ids[k : k + len(joined)] for k in range(len(ids) - len(joined) + 1))
    assert len(joined) > len(ids) - 2 * max_length
    assert examples == dataset.epoch(seed=1, epoch=epoch)


def test_phases_differ_and_validation_is_fixed_and_whole(bpe):
    dataset = data.encode([{"corpus": CORPUS}], bpe, max_length=32)
    assert len({tuple(dataset.epoch(0, epoch)[0].response) for epoch in range(8)}) > 4
    fixed = data.encode([{"corpus": CORPUS}], bpe, max_length=32, recut=False)
    assert fixed.epoch(0, 1) == fixed.epoch(5, 2) == fixed.examples
    assert bpe.decode([i for e in fixed.examples for i in e.response]) == CORPUS


def test_large_corpora_are_cut_behind_newlines_before_encoding(bpe):
    text = "beer on the wall\n" * 10_000 + "x" * 70_000
    dataset = data.encode([{"corpus": text}], bpe, max_length=64, insert_eos=False)
    assert bpe.decode(dataset.corpus.tolist()) == text


def test_what_encode_refuses(bpe):
    with pytest.raises(ValueError, match="the text has 4 tokens, fewer than one example of --max_length 64"):
        data.encode([{"corpus": "123"}], bpe, max_length=64)
    without = Tokenizer(bpe.backend, {}, None)
    with pytest.raises(ValueError, match="the tokenizer has no eos token"):
        data.encode([{"text": "1"}], without, max_length=8)
    with pytest.raises(ValueError, match="the tokenizer has no bos token"):
        data.encode([{"text": "1"}], without, max_length=8, insert_eos=False)


def test_pad_response():
    example = Example([1], [5, 6, 7])
    assert data.pad_response(example, 4, 0).response == [5, 6, 7, 0]
    assert data.pad_response(example, 3, 0) == example
    for pad_len, pads in ((4, 1), (3, 3), (1, 1)):
        assert data.pad_response(example, pad_len, 0, at_least_one=True).response == [5, 6, 7] + [0] * pads
    assert data.pad_response(example, 8, 0, max_length=6).response == [5, 6, 7, 0, 0]
    assert example.response == [5, 6, 7]


def test_prompts_from_files(tmp_path):
    asked = [[{"role": "user", "content": f"Q{i}"}] for i in range(2)]
    assert data.read_prompts(write(tmp_path / "a.txt", "Q0\n\n Q1\n")) == asked
    records = [{"prompt": "Q0"}, {"messages": [*asked[1], {"role": "assistant", "content": "A"}]}]
    assert data.read_prompts(jsonl(tmp_path / "a.jsonl", records)) == asked
    assert data.read_prompts(jsonl(tmp_path / "b.jsonl", [{"history": asked[0]}, {"question": "Q1"}])) == asked
    for record in (3, {"x": 1}, {"prompt": 3}):
        with pytest.raises(ValueError, match=r"c\.jsonl:1: "):
            data.read_prompts(jsonl(tmp_path / "c.jsonl", [record]))
    with pytest.raises(OSError, match=r"none\.txt"):
        data.read_prompts(f"{tmp_path}/none.txt")


# ---------------------------------------------------------------------------------------------------------- batches


@many
@given(lengths=st.lists(st.integers(1, 50), max_size=80), max_len=st.integers(50, 120))
def test_packing_is_best_fit_and_keeps_every_sample_once(lengths, max_len):
    rows = data.pack([Example([i], [0] * (n - 1)) for i, n in enumerate(lengths)], max_len)
    assert sorted(e.prompt[0] for row in rows for e in row) == list(range(len(lengths)))
    spaces = []  # the slow way: longest first, into the fullest row that has room
    for n in sorted(lengths, reverse=True):
        best = min((k for k, space in enumerate(spaces) if space >= n), key=lambda k: spaces[k], default=None)
        if best is None:
            spaces.append(max_len - n)
        else:
            spaces[best] -= n
    assert sorted(max_len - sum(map(len, row)) for row in rows) == sorted(spaces)


def test_packing_refuses_what_fits_nowhere():
    with pytest.raises(ValueError, match="a sample of 3 tokens does not fit into rows of 2"):
        data.pack([Example([1], [2, 3])], 2)


@many
@given(st.integers(0, 60), st.integers(1, 7), st.integers(0, 3))
def test_batches_hold_every_item_once(n, size, epoch):
    found = list(data.batches(list(range(n)), size, 5, epoch))
    assert sorted(item for batch in found for item in batch) == list(range(n))
    assert all(len(batch) == size for batch in found[:-1])


def test_order_depends_on_seed_and_epoch():
    orders = [tuple(next(data.batches(list(range(100)), 100, seed, epoch))) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_a_seed_gives_the_examples_and_batches_that_it_always_gave(tmp_path, monkeypatch):
    """So a run begun by an earlier version goes on with the data it would have seen."""
    monkeypatch.chdir(tmp_path)
    answers = [record["response"] for record in toy.records("train", 90, seed=1)]
    jsonl(tmp_path / "a.jsonl", [{"question": "Ann has 3 apples:", "answer": a} for a in answers[:40]])
    jsonl(tmp_path / "b.jsonl", [{"text": " ".join(answers[i : i + 5])} for i in range(0, 40, 3)])
    write(tmp_path / "c.txt", "\n".join(answers))
    train, held_out, _ = data.load_records("toy-repair[train:30,test:5] + a.jsonl + b.jsonl[test:2] + c.txt", seed=7)
    tokenizer, seen = toy.tokenizer(), [train, held_out]
    dataset = data.encode(train, tokenizer, max_length=40)
    for epoch in range(2):
        examples = [data.pad_response(e, 16, tokenizer.pad_id, max_length=40) for e in dataset.epoch(7, epoch)]
        rows = [row for batch in data.batches(data.pack(examples, 64), 4, 7, epoch) for row in batch]
        seen += [[dataclasses.astuple(e)[:3] for batch in data.batches(examples, 6, 7, epoch) for e in batch]]
        seen += [[dataclasses.astuple(e)[:3] for row in rows for e in row]]
    assert hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16] == "592ed59d66f5f8c0"
