"""Tokenizers: text to token ids and back, chat templates, and training one on the spot.

A tokenizer is a folder in the layout that the Hugging Face hub uses, so that every published checkpoint opens and
every saved one can be opened elsewhere:

    tokenizer.json            the algorithm and the vocabulary, for the `tokenizers` library; or else
    tokenizer.model           the same for `sentencepiece`
    tokenizer_config.json     which token is bos, eos, pad, mask
    chat_template.jinja       a program that writes a dialogue as one text (older folders keep it in the config)

`Tokenizer` adds to these libraries what the rest of this repository asks for: the ids of the few tokens that mean
something to an editing model, and one printable string per token for the traces.

Text is text: the control token `<|im_end|>` comes from the chat template or from this program. In what a user or a
training file has written the same characters are letters, or one message could forge a whole dialogue.
"""

import json
import math
import re
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from plumbing import template as templates
from plumbing.template import CHAT_TEMPLATE, PUBLISHED_TEMPLATE

DEL_TOKEN = "<|del|>"
SPECIAL_TOKENS = {"pad": "<|pad|>", "bos": "<|bos|>", "eos": "<|eos|>", "mask": "<|mask|>", "del": DEL_TOKEN}
NEW_CONFIG = {f"{role}_token": name for role, name in SPECIAL_TOKENS.items() if role != "del"}
NEW_CONFIG |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
MASK_NAMES = ("<|mdm_mask|>", "<|mask|>", "[MASK]", "<mask>")  # for checkpoints that do not declare theirs, as LLaDA's
MESSAGE_TOKENS = ("<|im_start|>", "<|im_end|>")
END_OF_MESSAGE = ("<|im_end|>", "<|eot_id|>")
MOST_GROWTH = 10_000  # how many times longer a normalizer may make a text


class Tokenizer:
    """A `tokenizers.Tokenizer` (or a `SentencePiece`), its configuration and its chat template.

    config         tokenizer_config.json as a dict; "bos_token" and the like are plain strings in it
    chat_template  jinja source, or None
    """

    def __init__(self, backend, config: dict, chat_template: str | None = None):
        self.backend = backend
        self.config = dict(config)
        self.chat_template = chat_template
        self.raw_control_tokens = False

    def configure(self, chat_template: bool | str | None = None, raw_control_tokens: bool = False) -> None:
        """How texts are written from now on; what is said of the template is saved with the tokenizer.

        chat_template: True or False: whether it is used; "published": that of the published ME-DLM processor;
        "shipped": the one that stood beside the weights; None: as the checkpoint was trained. raw_control_tokens: all
        text may write control tokens, for those who know where theirs comes from. Raises ValueError.
        """
        if chat_template == "published":
            if None in map(self.backend.token_to_id, MESSAGE_TOKENS):
                raise ValueError(f"--chat_template published: the tokenizer has no {' and '.join(MESSAGE_TOKENS)}")
            self.config.setdefault("shipped_chat_template", self.chat_template)
            self.chat_template = PUBLISHED_TEMPLATE
        elif chat_template == "shipped":
            self.chat_template = self.config.get("shipped_chat_template", self.chat_template)
        if chat_template is not None:
            self.config["raw_dialogues"] = not chat_template
        self.raw_control_tokens = raw_control_tokens

    @property
    def writes_chats(self) -> bool:
        return bool(self.chat_template) and not self.config.get("raw_dialogues")

    @property
    def is_published(self) -> bool:
        """Whether prompts, texts and pads are those of the published ME-DLM processor."""
        return self.chat_template == PUBLISHED_TEMPLATE

    def encode(self, text: str, control: bool | None = None) -> list[int]:
        return self.encode_batch([text], control)[0]

    def encode_batch(self, texts: list[str], control: bool | None = None) -> list[list[int]]:
        """Token ids of many texts, on all cores. Nothing is added. control: whether control tokens that are written out
        are recognised (default: raw_control_tokens). Raises ValueError where the tokenizer fails."""
        control = self.raw_control_tokens if control is None else control
        if control and isinstance(self.backend, SentencePiece):
            return [self._encode_parts(self._cut().split(text)) for text in texts]
        self.backend.encode_special_tokens = not control
        try:
            rows = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:  # the library's panics are no Exception: that of an endless regex, say
            if type(error).__module__ != "pyo3_runtime":
                raise
            raise ValueError(f"the tokenizer fails on a text: {error}") from None
        names = {} if control else self._controls()
        for n, row in enumerate(rows):
            if not names.keys().isdisjoint(row):  # words of the vocabulary: now letter by letter
                spelt = [[self._id(letter, "unk_token") for letter in names[i]] if i in names else [i] for i in row]
                rows[n] = [i for letters in spelt for i in letters if i is not None]
        return rows

    def _controls(self) -> dict[int, str]:
        """{id: token}, without that for unknown words, and without a single letter, which stands for itself."""
        unknown = self._id("unk_token", "[UNK]", "<unk>")
        tokens = self.backend.get_added_tokens_decoder().items()
        return {i: t.content for i, t in tokens if t.special and i != unknown and len(t.content) > 1}

    def _cut(self) -> re.Pattern:
        """Splits a text into texts, at even places, and the control tokens between them."""
        longest_first = sorted(self._controls().values(), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def _encode_parts(self, parts: list[str]) -> list[int]:
        ids = [[self.backend.token_to_id(part)] for part in parts]
        ids[::2] = self.encode_batch(parts[::2], control=False)
        return [i for part in ids for i in part]

    def decode(self, ids, skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def pieces(self, ids) -> list[str]:
        """What each token adds to the text before it; special tokens as their own names. Joined: the decoded text.

        A token is decoded together with its left neighbour, because its spaces may depend on it. A character of which
        the token holds only some bytes is shown as U+FFFD.
        """
        ids = list(ids)
        alone = [self.decode([i], skip_special=False) for i in ids]
        pieces = alone[:1]
        for left, left_text, i, text in zip(ids, alone, ids[1:], alone[1:]):
            both = self.decode([left, i], skip_special=False)
            pieces.append((both[len(left_text) :] if both.startswith(left_text) else "") or text)
        names = self.backend.get_added_tokens_decoder()
        return [names[i].content if i in names else piece for i, piece in zip(ids, pieces)]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding must have."""
        return max(self.backend.get_vocab().values()) + 1

    def _id(self, *names: str) -> int | None:
        """The first of these tokens that there is; "bos_token" and the like stand for what the config says."""
        names = [self.config.get(name) if name.endswith("_token") else name for name in names]
        ids = [self.backend.token_to_id(name) for name in names if name]
        return next((i for i in ids if i is not None), None)

    bos_id = property(lambda self: self._id("<|im_start|>" if self.is_published else "bos_token", "cls_token"))
    pad_id = property(lambda self: self._id("pad_token"))
    mask_id = property(lambda self: self._id("mask_token", *MASK_NAMES))
    del_id = property(lambda self: self._id(DEL_TOKEN))

    @property
    def eos_id(self) -> int | None:
        """The token that ends a message: the chat template's, if there is one, else the end of the text."""
        ends = [name for name in END_OF_MESSAGE if name in (self.chat_template or "")]
        return self._id(*ends, "eos_token", "sep_token")

    def add_tokens(self, names: dict[str, str]) -> dict[str, int]:
        """Gives the tokenizer the tokens it lacks: {role: token}, for example {"mask": "<|mask|>", "del": "<|del|>"}.

        A role (pad, bos, eos, mask, del) that is filled already keeps its token; any other key only adds the token.
        Returns {token: id} of what is new in the vocabulary, for which the model needs new rows.
        """
        added = {}
        for role, name in names.items():
            if role in SPECIAL_TOKENS and getattr(self, f"{role}_id") is not None:
                continue
            if self.backend.token_to_id(name) is None:
                self.backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])
                added[name] = self.backend.token_to_id(name)
            if role in SPECIAL_TOKENS and name != DEL_TOKEN:
                self.config[f"{role}_token"] = name
        return added

    def write_chats(self, dialogues: list[list[dict]], add_generation_prompt: bool = True) -> list[str]:
        """Dialogues [{"role": ..., "content": ...}, ...] as texts, up to where the assistant speaks next. Raises
        ValueError when there is no chat template or when it rejects the messages."""
        if not self.chat_template:
            raise ValueError("the tokenizer has no chat template: pass --chat_template False, or add the template")
        common = _special_names(self.config) | {"tools": None, "documents": None}
        common["add_generation_prompt"] = add_generation_prompt
        return templates.render(self.chat_template, [common | {"messages": messages} for messages in dialogues])

    def encode_chats(self, dialogues: list[list[dict]]) -> list[list[int]]:
        """Token ids of dialogues in the chat template, with its control tokens and no others.

        Before the template sees it, each control token in a message is broken by a character that occurs nowhere else,
        and so is the beginning of one at a message's end. (Not covered: a template that takes characters out of the
        middle of messages can join what was apart; and the name of a role may complete a token that a template begins.)
        Where no message speaks of control tokens, the ids are those of the whole text. Raises ValueError, too.
        """
        names, cut = self._controls(), self._cut()
        beginnings = {name[:k] for name in names.values() for k in range(1, len(name))}
        longest = max(map(len, beginnings), default=0)
        everything = "\n".join(value for messages in dialogues for m in messages for value in m.values())
        mark = next(c for c in map(chr, range(0xF0000, 0x110000)) if c not in everything + (self.chat_template or ""))

        def break_up(text: str) -> str:
            while cut.search(text):
                text = cut.sub(lambda found: found[0][0] + mark + found[0][1:], text)
            for k in range(min(longest, len(text)), 0, -1):
                if text[-k:] in beginnings:
                    text = text[: len(text) - k + 1] + mark + text[len(text) - k + 1 :]
            return text

        if not self.raw_control_tokens:
            dialogues = [[{key: break_up(m[key]) for key in m} for m in messages] for messages in dialogues]
        texts = self.write_chats(dialogues)
        rows = self.encode_batch(texts, control=True)
        for n, text in enumerate(texts):
            parts = cut.split(text)
            found = [i for i in rows[n] if i in names]
            if mark in text or found != list(map(self.backend.token_to_id, parts[1::2])):
                rows[n] = self._encode_parts([part.replace(mark, "") for part in parts])
        return rows

    def save(self, directory) -> None:
        """Writes the folder that `load_tokenizer` reads back."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        added = {}
        if isinstance(self.backend, SentencePiece):
            (directory / "tokenizer.model").write_bytes(self.backend.model.serialized_model_proto())
            tokens = self.backend.names.items()
            added["added_tokens_decoder"] = {i: {"content": name, "special": True} for i, name in tokens}
        else:
            (directory / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        config = json.dumps(self.config | added, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
        if self.chat_template:
            (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


class SentencePiece:
    """A sentencepiece model behind the few methods of `tokenizers.Tokenizer` that `Tokenizer` calls.

    sentencepiece never recognises a special token in a text, and its vocabulary cannot grow: the ids of added tokens
    follow those of the model, and `Tokenizer` cuts the text at them.
    """

    def __init__(self, path):
        self.model = SentencePieceProcessor(model_file=path)
        self.vocab = {self.model.id_to_piece(i): i for i in range(len(self.model))}
        self.names = {i: t for t, i in self.vocab.items() if self.model.is_control(i)}  # of the special tokens

    def add_special_tokens(self, tokens: list[AddedToken]) -> None:
        for token in tokens:
            i = self.vocab.setdefault(token.content, len(self.vocab))
            self.names[i] = token.content

    def encode_batch_fast(self, texts, add_special_tokens=False):
        return [SimpleNamespace(ids=self.model.encode(text)) for text in texts]

    def decode(self, ids, skip_special_tokens=True) -> str:
        ids = [i for i in ids if not (skip_special_tokens and i in self.names)]
        runs = groupby(ids, key=self.names.get)  # a special token's name, or None
        return "".join(name * len(list(run)) if name else self.model.decode(list(run)) for name, run in runs)

    def token_to_id(self, token: str) -> int | None:
        return self.vocab.get(token)

    def get_vocab(self) -> dict[str, int]:
        return self.vocab

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        return {i: AddedToken(name, special=True) for i, name in self.names.items()}


def load_tokenizer(directory, backend=None) -> Tokenizer:
    """Opens a tokenizer folder. Raises OSError when there is none, ValueError when a file in it is broken.

    backend: instead of what tokenizer.json or tokenizer.model holds.
    """
    directory = Path(directory)
    settings, written = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    config = read_json(settings)
    added, template = config.pop("added_tokens_decoder", {}), config.pop("chat_template", None)
    names = _special_names(read_json(directory / "special_tokens_map.json")) | _special_names(config)
    backend = backend or _load_backend(directory)
    try:
        late = [added[i]["content"] for i in sorted(added, key=int)]
        late = [AddedToken(name, special=True, normalized=False) for name in late if backend.token_to_id(name) is None]
        known = backend.get_added_tokens_decoder().values()
        control = {*names.values(), *MASK_NAMES, *MESSAGE_TOKENS, *END_OF_MESSAGE, DEL_TOKEN}
        backend.add_special_tokens(late + [t for t in known if t.content in control and not t.special])
        if isinstance(template, list):  # of several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        template = written.read_text(encoding="utf-8") if written.exists() else template
        if not isinstance(template, str | None):
            raise TypeError(f"a chat_template of type {type(template).__name__}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{settings} (added_tokens_decoder, chat_template) or {written}"
        raise ValueError(f"{what} cannot be read: {type(error).__name__}: {error}") from None
    model, tokenizer = read_json(directory / "config.json"), Tokenizer(backend, config | names, template)
    if "nanoedit" not in model:
        _write_as_published(tokenizer, str(model.get("model_type")))
    return tokenizer


def _write_as_published(tokenizer: Tokenizer, kind: str) -> None:
    """Dialogues as the published systems write them, for a checkpoint that was made elsewhere. kind: of model.

    ME-DLM's processor does not ask the template in its folder (which begins with bos and trims contents). Edit Flows
    has its own for encoders and LLaDA, here where theirs is missing, and lets Qwen3 answer without thinking.
    """
    template = tokenizer.chat_template or ""
    if "llada" in kind and None not in map(tokenizer.backend.token_to_id, (DEL_TOKEN, *MESSAGE_TOKENS)):
        tokenizer.configure("published")
    elif not template and ("bert" in kind or "llada" in kind):
        tokenizer.chat_template = templates.ENCODER_TEMPLATE if "bert" in kind else templates.LLADA_TEMPLATE
    elif "enable_thinking" in template:
        tokenizer.chat_template = "{% set enable_thinking = false %}" + template


def _load_backend(directory: Path):
    path, old = directory / "tokenizer.json", directory / "tokenizer.model"
    try:
        if path.exists():
            backend = tokenizers.Tokenizer.from_file(str(path))
            backend.no_truncation()
            backend.no_padding()
            state = backend.normalizer.__getstate__().decode() if backend.normalizer else ""
            contents = re.findall(r'"content":("(?:[^"\\]|\\.)*")', state)  # what is put for each thing replaced
            if math.prod(max(1, len(json.loads(content))) for content in contents) > MOST_GROWTH:
                raise ValueError(f"its normalizer can make texts more than {MOST_GROWTH} times longer")
            return backend
        if old.exists():
            return SentencePiece(str(old))
    except Exception as error:  # both libraries raise bare Exception or RuntimeError
        raise ValueError(f"{path if path.exists() else old} cannot be read as a tokenizer: {error}") from error
    raise OSError(f"no tokenizer in {directory}: looked for {path.name} and {old.name}; copy one from the base model")


def _special_names(config: dict) -> dict[str, str]:
    """{"bos_token": "<s>", ...}; a token is written as a string or as {"content": "<s>", ...}."""
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in tokens.items() if key.endswith("_token") and isinstance(value, str)}


MOST_TOKENS = 10**7  # in a vocabulary that is trained: the library reserves memory for as many as are asked for
LONG_RUN = re.compile(r"(\S{1000}|\s{1000})")  # BPE takes time that is quadratic in the longest word


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """Byte-level BPE, trained on an iterable of texts: any text can be written with it and comes back unchanged.

    Numbers are split into digits, which arithmetic needs. Raises ValueError when `vocab_size` has no room for the 256
    bytes and the special tokens.
    """
    special = [*SPECIAL_TOKENS.values(), *MESSAGE_TOKENS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(special) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"a vocabulary of {vocab_size} is too small: {least} is the least")
    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    options = {"special_tokens": special, "initial_alphabet": sorted(alphabet), "show_progress": False}
    pieces = (piece for text in texts for piece in LONG_RUN.sub("\\1\0", text).split("\0"))
    backend.train_from_iterator(pieces, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return Tokenizer(backend, NEW_CONFIG, CHAT_TEMPLATE)


def read_json(path: Path) -> dict:
    """A file that may be missing. Raises ValueError naming it when it does not hold an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return value
