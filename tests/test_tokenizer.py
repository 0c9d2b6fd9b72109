"""Tokenizers agree with transformers and sentencepiece, and are saved, opened and refused as they should be."""

import json

import pytest
import sentencepiece
import tokenizers
import transformers
from conftest import CORPUS, DIALOGUE
from hypothesis import given, settings
from hypothesis import strategies as st

import toy
from plumbing.tokenizer import DEL_TOKEN, SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer

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


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer([CORPUS], 400)


def special_ids(tokenizer: Tokenizer) -> list:
    return [getattr(tokenizer, f"{role}_id") for role in ("bos", "pad", "eos", "mask", "del")]


@quick
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_level_bpe_gives_every_text_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids, skip_special=False) == text
    assert all(0 <= i < bpe.vocab_size for i in ids)


def test_special_tokens_have_ids_and_names(bpe):
    end = bpe.backend.token_to_id("<|im_end|>")
    assert special_ids(bpe) == [1, 0, end, 3, 4], "the chat template ends messages with <|im_end|>"
    without = Tokenizer(bpe.backend, bpe.config, chat_template=None)
    assert without.eos_id == bpe.backend.token_to_id("<|eos|>")
    ids = bpe.encode("12 bottles<|mask|> of", control=True)
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


def assert_same_ids_and_texts(ours, oracle, texts):
    for text in texts:
        ids = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text, control=True) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", TEMPLATES)
def test_saved_tokenizer_agrees_with_transformers(bpe, name, tmp_path):
    ours = Tokenizer(bpe.backend, bpe.config, TEMPLATES[name] or bpe.chat_template)
    ours.save(tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = [oracle.bos_token_id, oracle.pad_token_id, oracle.mask_token_id]
    assert [ours.bos_id, ours.pad_id, ours.mask_id] == ids
    assert_same_ids_and_texts(ours, oracle, (CORPUS[:300], "größer 😀\t x", "a<|mask|> b<|im_end|>\n"))
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
    texts = (CORPUS[:300], "größer 😀 beer  on\n the WALL", "take [MASK] down, [PAD] pass")
    assert_same_ids_and_texts(ours, oracle, texts)


def test_save_and_load_change_nothing(bpe, tmp_path):
    for name, tokenizer in (("bpe", bpe), ("toy", toy.tokenizer())):
        tokenizer.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert (again.config, again.chat_template) == (tokenizer.config, tokenizer.chat_template)
        assert again.backend.to_str() == tokenizer.backend.to_str()
        assert special_ids(again) == special_ids(tokenizer)


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
    assert load_tokenizer(tmp_path).encode("<x>a<new-bos>", control=True)[::2] == [size + 1, size]


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
    assert tokenizer.encode("<late>", control=True) == [bpe.vocab_size]


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A folder with a sentencepiece model of Llama's settings."""
    target = tmp_path_factory.mktemp("spm")
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
    assert len(tokenizer.encode("<|mask|>", control=True)) > 1, "not known yet"
    added = tokenizer.add_tokens({"mask": "<|mask|>", "del": DEL_TOKEN, "eos": "<no>"})
    assert added == {"<|mask|>": 320, DEL_TOKEN: 321}
    assert tokenizer.vocab_size == 322
    assert special_ids(tokenizer) == [1, None, 2, 320, 321]
    ids = tokenizer.encode("<s>beer<|mask|>12</s>", control=True)
    assert ids == [1, *tokenizer.encode("beer"), 320, *tokenizer.encode("12"), 2]
    assert tokenizer.decode(ids, skip_special=False) == "<s>beer<|mask|>12</s>"
    assert tokenizer.decode(ids) == "beer 12"
    assert "".join(tokenizer.pieces(tokenizer.encode("pass it around"))) == "pass it around"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode("<s>beer<|mask|>12</s>", control=True) == ids
    assert (special_ids(again), again.vocab_size) == ([1, None, 2, 320, 321], 322)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (None, "", r"no tokenizer in .*: looked for tokenizer.json and tokenizer.model"),
        ("tokenizer.model", "nothing", r"tokenizer.model cannot be read"),
        ("tokenizer.json", "{}", r"tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", r"tokenizer_config.json is not JSON"),
    ],
)
def test_a_folder_that_holds_no_tokenizer(file, content, said, tmp_path):
    if file:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError if file else OSError, match=said):
        load_tokenizer(tmp_path)


def test_what_a_tokenizer_refuses():
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
