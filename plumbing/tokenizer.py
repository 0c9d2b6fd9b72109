"""Tokenizers: text to token ids and back, chat templates, and training one on the spot.

A tokenizer is a folder in the layout that the Hugging Face hub uses, so that every published checkpoint opens and
every saved one can be opened elsewhere:

    tokenizer.json            the algorithm and the vocabulary, for the `tokenizers` library; or else
    tokenizer.model           the same for `sentencepiece`
    tokenizer_config.json     which token is bos, eos, pad, mask
    chat_template.jinja       a program that writes a dialogue as one text (older folders keep it in the config)

`Tokenizer` adds to these libraries what the rest of this repository asks for: the ids of the few tokens that mean
something to an editing model, and one printable string per token for the traces.
"""

import json
import re
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

DEL_TOKEN = "<|del|>"
SPECIAL_TOKENS = {"pad": "<|pad|>", "bos": "<|bos|>", "eos": "<|eos|>", "mask": "<|mask|>", "del": DEL_TOKEN}
NEW_CONFIG = {f"{role}_token": name for role, name in SPECIAL_TOKENS.items() if role != "del"}
NEW_CONFIG |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
MASK_NAMES = ("<|mdm_mask|>", "<|mask|>", "[MASK]", "<mask>")  # for checkpoints that do not declare theirs, as LLaDA's
END_OF_MESSAGE = ("<|im_end|>", "<|eot_id|>")

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


class Tokenizer:
    """A `tokenizers.Tokenizer` (or a `SentencePiece`), its configuration and its chat template.

    config         tokenizer_config.json as a dict; "bos_token" and the like are plain strings in it
    chat_template  jinja source, or None
    """

    def __init__(self, backend, config: dict, chat_template: str | None = None):
        self.backend = backend
        self.config = dict(config)
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        """Token ids. Nothing is added; special tokens written out in the text are recognised."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The same for many texts, on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

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
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def _id(self, *names: str) -> int | None:
        """The first of these tokens that there is; "bos_token" and the like stand for what the config says."""
        names = [self.config.get(name) if name.endswith("_token") else name for name in names]
        ids = [self.backend.token_to_id(name) for name in names if name]
        return next((i for i in ids if i is not None), None)

    bos_id = property(lambda self: self._id("bos_token", "cls_token"))
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

    def chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """[{"role": ..., "content": ...}, ...] as one text, up to where the assistant speaks next.

        Raises ValueError when there is no chat template or when it rejects the messages.
        """
        if not self.chat_template:
            raise ValueError("the tokenizer has no chat template: pass --chat_template False, or add the template")
        context = _special_names(self.config) | {"tools": None, "documents": None}
        context |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return _compile_template(self.chat_template).render(context)
        except Exception as error:  # a template is a program and can fail in any way
            raise ValueError(f"the chat template fails on these messages: {error}") from error

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

    sentencepiece never recognises a special token in a text, and its vocabulary cannot grow. So the text is cut at the
    special tokens, and the ids of added tokens follow those of the model.
    """

    def __init__(self, path):
        self.model = SentencePieceProcessor(model_file=path)
        self.vocab = {self.model.id_to_piece(i): i for i in range(len(self.model))}
        self.names = {}  # of the special tokens, by id
        self.add_special_tokens([AddedToken(t) for t, i in self.vocab.items() if self.model.is_control(i)])

    def add_special_tokens(self, tokens: list[AddedToken]) -> None:
        for token in tokens:
            i = self.vocab.setdefault(token.content, len(self.vocab))
            self.names[i] = token.content
        longest_first = sorted(self.names.values(), key=len, reverse=True)
        self.cut = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode_batch_fast(self, texts, add_special_tokens=False):
        return [SimpleNamespace(ids=self._encode(text)) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids = []
        for n, part in enumerate(self.cut.split(text)):  # texts at even places, special tokens between them
            ids += [self.vocab[part]] if n % 2 else self.model.encode(part)
        return ids

    def decode(self, ids, skip_special_tokens=True) -> str:
        ids = [i for i in ids if not (skip_special_tokens and i in self.names)]
        parts = []
        for is_special, run in groupby(ids, key=self.names.__contains__):
            part = list(run)
            parts += map(self.names.get, part) if is_special else [self.model.decode(part)]
        return "".join(parts)

    def token_to_id(self, token: str) -> int | None:
        return self.vocab.get(token)

    def get_vocab(self, with_added_tokens=True) -> dict[str, int]:
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
        for token in [added[i]["content"] for i in sorted(added, key=int)]:
            if backend.token_to_id(token) is None:
                backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if isinstance(template, list):  # of several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        template = written.read_text(encoding="utf-8") if written.exists() else template
        if not isinstance(template, str | None):
            raise TypeError(f"a chat_template of type {type(template).__name__}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{settings} (added_tokens_decoder, chat_template) or {written}"
        raise ValueError(f"{what} cannot be read: {type(error).__name__}: {error}") from None
    return Tokenizer(backend, config | names, template)


def _load_backend(directory: Path):
    path, old = directory / "tokenizer.json", directory / "tokenizer.model"
    try:
        if path.exists():
            backend = tokenizers.Tokenizer.from_file(str(path))
            backend.no_truncation()
            backend.no_padding()
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


@lru_cache
def _compile_template(source: str) -> jinja2.Template:
    """With what templates written for the hub expect to find. They come with a checkpoint: code that is not trusted."""

    def raise_exception(message):
        raise ValueError(message)

    loops = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(source)


MOST_TOKENS = 10**7  # in a vocabulary that is trained: the library reserves memory for as many as are asked for
LONG_RUN = re.compile(r"(\S{1000}|\s{1000})")  # BPE takes time that is quadratic in the longest word


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """Byte-level BPE, trained on an iterable of texts: any text can be written with it and comes back unchanged.

    Numbers are split into digits, which arithmetic needs. Raises ValueError when `vocab_size` has no room for the 256
    bytes and the special tokens.
    """
    special = [*SPECIAL_TOKENS.values(), "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(special) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"a vocabulary of {vocab_size} is too small: {least} is the least")
    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    options = {"special_tokens": special, "initial_alphabet": sorted(alphabet), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, **options)
    pieces = (piece for text in texts for piece in LONG_RUN.sub("\\1\0", text).split("\0"))
    backend.train_from_iterator(pieces, trainer)
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
