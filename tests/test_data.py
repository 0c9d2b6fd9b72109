"""Tokenizers agree with transformers, files are read or refused with file and line, and batches lose nothing."""

import csv
import gzip
import json
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import toy
from data import Example, Source
from plumbing.tokenizer import DEL_TOKEN, SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer

VERSE = "{0} bottles of beer on the wall, {0} bottles of beer.\nTake one down; pass it around!\n\n"
CORPUS = "".join(map(VERSE.format, range(60)))
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many bottles?\n"},
    {"role": "assistant", "content": " 12 "},
    {"role": "user", "content": 'Und "größer"?'},
]
TEMPLATES = {
    "own": None,
    "loop controls": """\
{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}""",
    "whitespace": """\
{% for m in messages %}
    {% if loop.first %}
{{ bos_token }}
    {% endif %}
{{- m.role }}: {{ m.content | trim }}
{% endfor %}
""",
    "json": "{{ messages | tojson }}{% if add_generation_prompt %}<|im_start|>{% endif %}",
    "namespace": """\
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ eos_token }}{% endfor %}""",
}

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


# ------------------------------------------------------------------------------------------------------- tokenizers


@many
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_level_bpe_gives_every_text_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids, skip_special=False) == text
    assert all(0 <= i < bpe.vocab_size for i in ids)


def test_special_tokens_have_ids_and_names(bpe):
    assert (bpe.pad_id, bpe.bos_id, bpe.mask_id, bpe.del_id) == (0, 1, 3, 4)
    assert bpe.eos_id == bpe.encode("<|im_end|>")[0], "the chat template ends messages with <|im_end|>"
    without = Tokenizer(bpe.backend, bpe.config, chat_template=None)
    assert without.eos_id == bpe.encode("<|eos|>")[0]
    ids = bpe.encode("12 bottles<|mask|> of")
    assert bpe.pieces(ids)[-2:] == ["<|mask|>", " of"]
    assert bpe.decode(ids) == "12 bottles of"
    assert bpe.decode(ids, skip_special=False) == "12 bottles<|mask|> of"


@quick
@given(text=st.text("ab 12.\n<|ém", max_size=30))
def test_pieces_join_to_the_text(bpe, text):
    pieces = bpe.pieces(bpe.encode(text))
    assert len(pieces) == len(bpe.encode(text))
    if text.isascii():
        assert "".join(pieces) == text
    assert all(pieces)


@pytest.mark.parametrize("name", TEMPLATES)
def test_saved_tokenizer_agrees_with_transformers(bpe, name, tmp_path):
    ours = Tokenizer(bpe.backend, bpe.config, TEMPLATES[name] or bpe.chat_template)
    ours.save(tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = [oracle.bos_token_id, oracle.pad_token_id, oracle.mask_token_id]
    assert [ours.bos_id, ours.pad_id, ours.mask_id] == ids
    for text in (CORPUS[:300], "größer 😀\t x", "a<|mask|> b<|im_end|>\n"):
        assert ours.encode(text) == oracle.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ours.encode(text), skip) == oracle.decode(ours.encode(text), skip_special_tokens=skip)
    for prompt in (True, False):
        written = oracle.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=prompt)
        assert ours.chat(DIALOGUE, prompt) == written


def trained(kind: str):
    """A tokenizer of the tokenizers library, as BERT or T5 have one, trained here."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    if kind == "wordpiece":
        backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        backend.decoder = tokenizers.decoders.WordPiece()
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    else:
        backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
        backend.normalizer = tokenizers.normalizers.NFKC()
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        backend.decoder = tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=150, special_tokens=special, unk_token="[UNK]", show_progress=False
        )
    backend.train_from_iterator([CORPUS], trainer)
    return backend


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_trained_tokenizers_agree_with_transformers(kind, tmp_path):
    trained(kind).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"clean_up_tokenization_spaces": False}))
    ours, oracle = load_tokenizer(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (ours.mask_id, ours.pad_id) == (oracle.mask_token_id, oracle.pad_token_id)
    for text in (CORPUS[:300], "größer 😀 beer  on\n the WALL", "take [MASK] down, [PAD] pass"):
        ids = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_save_and_load_change_nothing(bpe, tmp_path):
    for tokenizer in (bpe, toy.tokenizer()):
        tokenizer.save(tmp_path)
        again = load_tokenizer(tmp_path)
        assert (again.config, again.chat_template) == (tokenizer.config, tokenizer.chat_template)
        assert again.backend.to_str() == tokenizer.backend.to_str()
        assert again.tokens == tokenizer.tokens


def test_add_tokens_fills_only_the_roles_that_are_empty(tmp_path):
    tokenizer = train_tokenizer([CORPUS], 300)
    assert tokenizer.add_tokens(SPECIAL_TOKENS) == {}
    del tokenizer.config["mask_token"], tokenizer.config["bos_token"]
    assert tokenizer.mask_id == 3, "found by its name"
    assert tokenizer.bos_id is None
    size = tokenizer.vocab_size
    added = tokenizer.add_tokens({"mask": "<new-mask>", "bos": "<new-bos>", "x": "<x>"})
    assert added == {"<new-bos>": size, "<x>": size + 1}
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (size, size + 2)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("<x>a<new-bos>")[::2] == [size + 1, size]


def test_tokens_and_template_of_older_folders_are_found(bpe, tmp_path):
    """Tokens as objects, in either file, or only in the config; the template in the config, one of several."""
    bpe.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    templates = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    added = {str(bpe.vocab_size): {"content": "<late>", "special": True}}
    config = {"eos_token": {"content": "<|eos|>"}, "chat_template": templates, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    names = {"cls_token": "<|bos|>", "pad_token": {"content": "<|pad|>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.decode([tokenizer.eos_id], False)) == (1, 0, "<|eos|>")
    assert tokenizer.chat(DIALOGUE) == "D"
    assert tokenizer.encode("<late>") == [bpe.vocab_size]


@pytest.fixture(scope="module")
def spm(folder):
    """A folder with a sentencepiece model of Llama's settings."""
    target = folder / "spm"
    target.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_prefix=str(target / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (target / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return target


@quick
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<▁\0"), min_size=1))
def test_sentencepiece_encodes_as_the_library_does(spm, text):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(spm / "tokenizer.model"))
    tokenizer = load_tokenizer(spm)
    assert tokenizer.encode(text) == oracle.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == oracle.decode(oracle.encode(text))


def test_sentencepiece_takes_special_tokens_and_is_saved_with_them(spm, tmp_path):
    tokenizer = load_tokenizer(spm)
    assert len(tokenizer.encode("<|mask|>")) > 1, "not known yet"
    added = tokenizer.add_tokens({"mask": "<|mask|>", "del": DEL_TOKEN, "eos": "<no>"})
    assert added == {"<|mask|>": 320, DEL_TOKEN: 321}
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (1, 322)
    assert tokenizer.tokens == {"mask": 320, "pad": None, "del": 321, "eos": 2}
    ids = tokenizer.encode("<s>beer<|mask|>12</s>")
    assert ids == [1, *tokenizer.encode("beer"), 320, *tokenizer.encode("12"), 2]
    assert tokenizer.decode(ids, skip_special=False) == "<s>beer<|mask|>12</s>"
    assert tokenizer.decode(ids) == "beer 12"
    assert "".join(tokenizer.pieces(tokenizer.encode("pass it around"))) == "pass it around"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode("<s>beer<|mask|>12</s>") == ids
    assert (again.tokens, again.vocab_size) == (tokenizer.tokens, 322)


def test_what_a_tokenizer_refuses(bpe, tmp_path):
    with pytest.raises(OSError, match=r"no tokenizer in .*: looked for tokenizer.json and tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"tokenizer.model cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer([CORPUS], 100)
    with pytest.raises(ValueError, match="no chat template"):
        toy.tokenizer().chat(DIALOGUE)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}",  # the way out of a sandbox
        "{% if %}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_bad_chat_template_is_an_error_not_a_traceback_or_a_hole(bpe, template):
    with pytest.raises(ValueError, match="the chat template fails on these messages: "):
        Tokenizer(bpe.backend, bpe.config, template).chat(DIALOGUE)


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


BROKEN_SPECS = ["", "a + ", "a[train]", "a[train:x]", "a[train:1,train:2]", "a[dev:3]", "a[test:-1]", "a[]b", "a[]"]


@pytest.mark.parametrize("spec", BROKEN_SPECS)
def test_broken_specs(spec):
    with pytest.raises(ValueError, match="dataset spec"):
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
    ("text", {"text": "T", "draft": "D"}, {"messages": [], "response": "T", "draft": "D"}),
    ("history/response", {"history": USER, "response": "A"}, ANSWER),
    ("history/response", {"history": USER, "response": "A", "source": "D"}, ANSWER | {"draft": "D"}),
    ("history/response", {"history": [], "response": "A"}, ANSWER | {"messages": []}),
    ("messages", {"messages": [*USER, {"role": "assistant", "content": "A"}]}, ANSWER),
    ("prompt/response", {"prompt": "Q", "response": "A"}, ANSWER),
    ("prompt/response", {"prompt": "Q", "response": "A", "draft": "", "source": "no"}, ANSWER | {"draft": ""}),
    ("prompt/response", {"prompt": "Q", "response": "A", "source": {"url": "provenance, not a draft"}}, ANSWER),
    ("question/answer", {"question": "Q", "answer": "A"}, ANSWER),
    ("instruction/input/output", {"instruction": "Q", "input": "", "output": "A", "text": "all of it"}, ANSWER),
    ("instruction/input/output", {"instruction": "Q", "input": None, "output": "A"}, ANSWER),
    (
        "instruction/input/output",
        {"instruction": "Q", "input": "I", "output": "A"},
        ANSWER | {"messages": [{"role": "user", "content": "Q\n\nI"}]},
    ),
]


@pytest.mark.parametrize(("form", "record", "normal"), FORM_CASES)
def test_every_record_form(form, record, normal, tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [record])
    train, test, [report] = data.load_records(path)
    assert (train, test, report.form) == ([normal], [], form)
    assert form in str(report)


def test_text_field_and_form_can_be_given(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{"Text": "T", "prompt": "Q", "response": "A", "text": "t"}])
    assert data.load_records(path, text_field="Text")[0] == [{"text": "T"}]
    assert data.load_records(path, form="text")[0] == [{"text": "t"}]
    assert data.load_records(path)[0] == [ANSWER]
    with pytest.raises(ValueError, match="unknown record form 'texts'; choose one of messages, "):
        data.load_records(path, form="texts")


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_all_formats_hold_the_same_records(packed, tmp_path):
    rows = [{"question": f"Q{i}, \"so\"", "answer": f"A\n{i}"} for i in range(5)]
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
    with pytest.raises(ValueError, match=r"a\.parquet: record 2: field 'text' must be text, found NoneType"):
        data.load_records(str(path))
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("a.parquet", "b.parquet.gz"):
        train, _, [report] = data.load_records(f"{tmp_path}/{name}[test:0]", skip_bad_records=True)
        assert (sorted(record["text"] for record in train), report.bad) == (["one", "two"], 1)
    path.write_bytes(b"PAR1, or so it says")
    with pytest.raises(ValueError, match=r"a\.parquet:1: not a readable parquet file"):
        data.load_records(str(path))


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        data.load_records(write(tmp_path / "a.parquet", b"PAR1"))


BROKEN_LINES = {
    "{": "not JSON",
    "[1]": "must be an object",
    '"text"': "must be an object",
    "{}": "no such field",
    '{"text": 1}': "must be text, found int",
    '{"text": ""}': "found an empty str",
    '{"text": " \\n"}': "must be text",
    '{"text": null}': "found NoneType",
    '{"text": "\\ud800"}': "half a character",
    '{"text": "T", "draft": 3}': "'draft' must be text",
    "[" * 10**5: "not usable JSON",
    '{"text": ' + "1" * 5000 + "}": "not usable JSON",
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
    assert (len(train) + len(test), report.bad) == (2, 1)
    assert "1 broken" in str(report)


BROKEN_DIALOGUES = {
    "last message": {"messages": USER},
    "must be a list of messages, found str": {"messages": "Q"},
    "found an empty list": {"messages": []},
    "with role and content": {"messages": ["Q"]},
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
    "a.txt": (b"one\ntwo \xff\n", r":2: not UTF-8 \(byte 5"),
    "empty.txt": (b"", ":1: the file holds no text"),
    "empty.jsonl": (b"\n\n", ": no usable record"),
    "a.json": (b'{"data": [\n1,,]}', ":2: not JSON"),
    "lines.json": (b'{"text": "T"}\n{"text": "T"}\n', ":2: not JSON .*name it .jsonl"),
    "two.json": (b'{"a": [], "b": []}', ":1: .*exactly one list"),
    "number.json": (b"3", ":1: .*must hold a list"),
    "deep.json": (b"[" * 10**5, ":1: not usable JSON"),
    "latin.json": (b'[\n{"text": "\xe4"}]', ":2: not UTF-8"),
    "item.json": (b'[{"text": "T"}, {}]', ": record 2: field 'text'"),
    "a.csv": (b"question,answer\nQ,A\nQ,A,B\n", ":3: more values than the 2 fields"),
    "short.csv": (b"question,answer\nQ\n", ":2: field 'answer' must be text"),
    "quote.csv": (b'question,answer\n"Q"x,A\n', ":2: not CSV"),
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


def test_files_that_are_not_there(tmp_path, monkeypatch):
    for name in (f"{tmp_path}/no.txt", "gsm8k", "../nothing", f"{tmp_path}/no"):
        with pytest.raises(ValueError, match=r"no such file or folder \(nor a hub dataset"):
            data.load_records(name)
    with pytest.raises(ValueError, match=r"the folder holds no data file; use \.txt, \.jsonl"):
        data.load_records(str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot read .docx; use .txt"):
        data.load_records(write(tmp_path / "a.docx", "x"))
    whole = gzip.compress(b'{"text": "T"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:1: not a complete gzip file"):
        data.load_records(f"{tmp_path}/a.jsonl.gz")


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
        assert re.match(re.escape(str(path)) + r":(\d+:| record \d+:| no usable record)", message)
        assert len(message.splitlines()) == 1
    else:
        train, test, [report] = data.load_records(str(path), skip_bad_records=skip)
        assert all(set(record) in ({"text"}, {"corpus"}) for record in train + test)
        assert skip or not report.bad


json_leaves = st.none() | st.integers() | st.floats() | st.text(max_size=5)
json_values = json_leaves | st.lists(json_leaves, max_size=3) | st.dictionaries(st.text(max_size=5), json_leaves)
a_message = {"role": st.just("assistant") | json_leaves, "content": st.text() | json_leaves}
messages = st.lists(st.fixed_dictionaries(a_message))
fields = st.sampled_from(["text", "messages", "history", "prompt", "response", "draft", "source"])
any_record = json_values | st.dictionaries(fields, json_values | messages)


@quick
@given(records=st.lists(any_record, max_size=4), form=st.sampled_from([*data.FORMS]))
def test_any_json_is_read_or_skipped(folder, records, form):
    whole = {"prompt": "Q", "response": "A", "text": "T", "history": [], "question": "Q", "answer": "A"}
    whole |= {"messages": [{"role": "assistant", "content": "A"}], "instruction": "Q", "output": "A"}
    path = jsonl(folder / "any.jsonl", [whole, *records])
    train, test, [report] = data.load_records(path, form=form, skip_bad_records=True)
    assert len(train) + len(test) + report.bad == 1 + len(records)
    for record in train + test:
        assert set(record) in ({"text"}, {"messages", "response", "draft"})
        assert all(isinstance(text, str) for text in data.texts([record]))


# --------------------------------------------------------------------------------------------------------- hold-out


def test_hold_out_is_seeded_and_complete(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{"text": str(i)} for i in range(1000)])
    train, test, [report] = data.load_records(path, seed=3)
    assert (len(train), len(test), report.train, report.test) == (950, 50, 950, 50)
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
    assert bpe.decode(example.prompt, skip_special=False) == bpe.chat(DIALOGUE)
    assert bpe.decode(example.response, skip_special=False) == "12 bottles<|im_end|>"
    assert bpe.decode(example.draft, skip_special=False) == "13 beer<|im_end|>"
    assert example.prompt == data.encode_prompt(DIALOGUE, bpe)
    [raw] = data.encode([record], bpe, max_length=200, chat_template=False, insert_eos=False).examples
    text = 'Be brief.\nHow many bottles?\n\n 12 \nUnd "größer"?'
    assert bpe.decode(raw.prompt, skip_special=False) == "<|bos|>" + text
    assert bpe.decode(raw.response, skip_special=False) == "12 bottles"
    assert data.encode_prompt([], bpe) == [bpe.bos_id]


def test_too_long_samples_are_counted_and_all_of_them_are_an_error(bpe):
    def sample(n, draft=None):
        return {"messages": USER, "response": "1" * n, "draft": draft}

    prompt = len(data.encode_prompt(USER, bpe))
    records = [sample(n) for n in (1, 9, 10, 50)] + [sample(1, draft="1" * 10)]
    kept = data.encode(records, bpe, max_length=prompt + 10)
    assert ([len(e.response) for e in kept.examples], kept.too_long, len(kept)) == ([2, 10], 3, 2)
    message = rf"all 2 samples are longer than --max_length {prompt + 5}; the shortest has {prompt + 11} tokens"
    with pytest.raises(ValueError, match=message):
        data.encode(records[2:4], bpe, max_length=prompt + 5)


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
    with pytest.raises(ValueError, match="--max_length must be at least 2"):
        data.encode([{"text": "1"}], bpe, max_length=1)
    without = Tokenizer(bpe.backend, {}, None)
    with pytest.raises(ValueError, match="the tokenizer has no eos token"):
        data.encode([{"text": "1"}], without, max_length=8)
    with pytest.raises(ValueError, match="the tokenizer has no bos token"):
        data.encode([{"text": "1"}], without, max_length=8, insert_eos=False)


def test_pad_response():
    example = Example([1], [5, 6, 7])
    assert data.pad_response(example, 4, 0).response == [5, 6, 7, 0]
    assert data.pad_response(example, 3, 0) == example
    assert data.pad_response(example, 8, 0, max_length=6).response == [5, 6, 7, 0, 0]
    assert example.response == [5, 6, 7]
    with pytest.raises(ValueError, match="--pad_len"):
        data.pad_response(example, 0, 0)


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
def test_packing_keeps_every_sample_once_and_no_row_overflows(lengths, max_len):
    examples = [Example([i], [0] * (n - 1)) for i, n in enumerate(lengths)]
    rows = data.pack(examples, max_len)
    assert sorted(e.prompt[0] for row in rows for e in row) == list(range(len(lengths)))
    fill = sorted(sum(map(len, row)) for row in rows)
    assert all(0 < n <= max_len for n in fill)
    assert len(fill) < 2 or fill[0] + fill[1] > max_len, "two rows that fit into one"


@many
@given(lengths=st.lists(st.integers(1, 100), max_size=60))
def test_packing_is_best_fit(lengths):
    spaces = []  # the slow way: longest first, into the fullest row that has room
    for n in sorted(lengths, reverse=True):
        best = min((k for k, space in enumerate(spaces) if space >= n), key=lambda k: spaces[k], default=None)
        if best is None:
            spaces.append(100 - n)
        else:
            spaces[best] -= n
    rows = data.pack([Example([1], [0] * (n - 1)) for n in lengths], 100)
    assert sorted(sum(map(len, row)) for row in rows) == sorted(100 - space for space in spaces)


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
