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
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

DEL_TOKEN = "<|del|>"
SPECIAL_TOKENS = {"pad": "<|pad|>", "bos": "<|bos|>", "eos": "<|eos|>", "mask": "<|mask|>", "del": DEL_TOKEN}
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
        self.config = config
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

    def _id(self, *names: str | None) -> int | None:
        ids = (self.backend.token_to_id(name) for name in names if name)
        return next((i for i in ids if i is not None), None)

    @property
    def bos_id(self) -> int | None:
        return self._id(self.config.get("bos_token"), self.config.get("cls_token"))

    @property
    def eos_id(self) -> int | None:
        """The token that ends a message: the chat template's, if there is one, else the end of the text."""
        ends = [name for name in END_OF_MESSAGE if name in (self.chat_template or "")]
        return self._id(*ends, self.config.get("eos_token"), self.config.get("sep_token"))

    @property
    def pad_id(self) -> int | None:
        return self._id(self.config.get("pad_token"))

    @property
    def mask_id(self) -> int | None:
        return self._id(self.config.get("mask_token"), *MASK_NAMES)

    @property
    def del_id(self) -> int | None:
        return self._id(DEL_TOKEN)

    @property
    def tokens(self) -> dict[str, int | None]:
        """The special tokens that ME-DLM works with, by role."""
        return {"mask": self.mask_id, "pad": self.pad_id, "del": self.del_id, "eos": self.eos_id}

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
        try:
            return _compile_template(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **_special_names(self.config),
            )
        except Exception as error:  # a template is a program and can fail in any way
            raise ValueError(f"the chat template fails on these messages: {error}") from error

    def save(self, directory) -> None:
        """Writes the folder that `load_tokenizer` reads back."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = dict(self.config)
        if isinstance(self.backend, SentencePiece):
            (directory / "tokenizer.model").write_bytes(self.backend.model.serialized_model_proto())
            tokens = self.backend.get_added_tokens_decoder()
            config["added_tokens_decoder"] = {
                str(i): {"content": token.content, "special": token.special} for i, token in tokens.items()
            }
        else:
            try:
                self.backend.save(str(directory / "tokenizer.json"))
            except Exception as error:  # the library raises nothing more precise, on a full disk too
                raise OSError(f"{directory / 'tokenizer.json'}: {error}") from error
        _write_json(directory / "tokenizer_config.json", config)
        _write_json(directory / "special_tokens_map.json", _special_names(config))
        template = directory / "chat_template.jinja"
        if self.chat_template:
            template.write_text(self.chat_template, encoding="utf-8")
        else:
            template.unlink(missing_ok=True)


class SentencePiece:
    """A sentencepiece model behind the few methods of `tokenizers.Tokenizer` that `Tokenizer` calls.

    sentencepiece never recognises a special token in a text, and its vocabulary cannot grow. So the text is cut at the
    special tokens, and the ids of added tokens follow those of the model.
    """

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor

        self.model = SentencePieceProcessor(model_file=str(path))
        control = [i for i in range(len(self.model)) if self.model.is_control(i)]
        self.added = {self.model.id_to_piece(i): i for i in control}

    def add_special_tokens(self, tokens: list[AddedToken]) -> None:
        for token in tokens:
            if token.content not in self.added:
                self.added[token.content] = len(self.get_vocab())
        self.__dict__.pop("_special", None)

    @cached_property
    def _special(self) -> re.Pattern:
        longest_first = sorted(self.added, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else "(?!)")

    def encode_batch_fast(self, texts, add_special_tokens=False):
        return [SimpleNamespace(ids=self._encode(text)) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids = []
        for part in self._special.split(text):
            if part in self.added:
                ids.append(self.added[part])
            elif part:
                ids += self.model.encode(part)
        return ids

    def decode(self, ids, skip_special_tokens=True) -> str:
        names = {i: token for token, i in self.added.items()}
        parts, run = [], []
        for i in ids:
            if i not in names:
                run.append(i)
            elif not skip_special_tokens:
                parts += [self.model.decode(run), names[i]]
                run = []
        return "".join([*parts, self.model.decode(run)])

    def token_to_id(self, token: str) -> int | None:
        return self.added.get(token, self._model_vocab.get(token))

    def get_vocab(self, with_added_tokens=True) -> dict[str, int]:
        return {**self._model_vocab, **self.added}

    @cached_property
    def _model_vocab(self) -> dict[str, int]:
        return {self.model.id_to_piece(i): i for i in range(len(self.model))}

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        return {i: AddedToken(token, special=True) for token, i in self.added.items()}


def load_tokenizer(directory, backend=None) -> Tokenizer:
    """Opens a tokenizer folder. Raises OSError when there is none, ValueError when a file in it is broken.

    backend: instead of what tokenizer.json or tokenizer.model holds.
    """
    directory = Path(directory)
    settings = directory / "tokenizer_config.json"
    config = read_json(settings)
    added = config.pop("added_tokens_decoder", {})
    names = _special_names(read_json(directory / "special_tokens_map.json")) | _special_names(config)
    template = _chat_template(directory, config.pop("chat_template", None))

    backend = backend or _load_backend(directory)
    try:
        missing = [token["content"] for _, token in sorted(added.items(), key=lambda item: int(item[0]))]
        missing = [name for name in missing if backend.token_to_id(name) is None]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in missing])
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"{settings}: added_tokens_decoder must map ids to objects with a text 'content'") from None
    if not backend.get_vocab(with_added_tokens=True):
        raise ValueError(f"{directory}: the tokenizer has an empty vocabulary")
    return Tokenizer(backend, config | names, template)


def _load_backend(directory: Path):
    fast, slow = directory / "tokenizer.json", directory / "tokenizer.model"
    path = fast if fast.exists() else slow
    if not path.exists():
        looked_for = f"looked for {fast.name} and {slow.name}"
        raise OSError(f"no tokenizer in {directory}: {looked_for}; copy one from the base model")
    try:
        if path == slow:
            return SentencePiece(path)
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # both libraries raise bare Exception or RuntimeError
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _chat_template(directory: Path, in_config) -> str | None:
    """The template's own file first. In the config it is a string, or a list of named templates."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
    try:
        if isinstance(in_config, list):
            in_config = {entry["name"]: entry["template"] for entry in in_config}.get("default")
    except (LookupError, TypeError):
        in_config = 0
    if not isinstance(in_config, str | None):
        settings = directory / "tokenizer_config.json"
        raise ValueError(f"{settings}: chat_template must be a text, or a list of objects with name and template")
    return in_config


def _special_names(config: dict) -> dict[str, str]:
    """{"bos_token": "<s>", ...}; a token is written as a string or as {"content": "<s>", ...}."""
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    return {key: value for key, value in tokens.items() if isinstance(value, str)}


@lru_cache
def _compile_template(source: str) -> jinja2.Template:
    """With what templates written for the hub expect to find. They come with a checkpoint: code that is not trusted."""

    def raise_exception(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(source)


MOST_TOKENS = 10**7
LONG_RUN = re.compile(r"(\S{1000}|\s{1000})")  # BPE takes time that is quadratic in the longest word


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """Byte-level BPE, trained on an iterable of texts: any text can be written with it and comes back unchanged.

    Numbers are split into digits, which arithmetic needs. Raises ValueError when `vocab_size` has no room for the 256
    bytes and the special tokens.
    """
    special = [*SPECIAL_TOKENS.values(), "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise ValueError(f"a vocabulary of {vocab_size} is too small: {len(special) + len(alphabet)} is the least")
    if vocab_size > MOST_TOKENS:  # the library would reserve memory for all of them
        raise ValueError(f"a vocabulary of {vocab_size} is too large: {MOST_TOKENS} is the most")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    pieces = (piece for text in texts for piece in LONG_RUN.sub("\\1\0", text).split("\0"))
    backend.train_from_iterator(pieces, trainer)
    return Tokenizer(backend, _new_config(), CHAT_TEMPLATE)


def word_tokenizer(words) -> Tokenizer:
    """One token per word, digit or mark. In the text no space stands before . and :, between digits, or before a comma
    behind a digit; so any row of these tokens is written as a text that is read as the same tokens."""
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), "<|unk|>", *words])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    backend.add_special_tokens(list(SPECIAL_TOKENS.values()))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\d|(?<=\d),|[.:]"), "isolated")]
    )
    spaces = decoders.WordPiece(prefix="\0", cleanup=False)  # no word begins with its "continued" mark: always a space
    no_space = decoders.Replace(Regex(r" (?=[.:])|(?<=\d) (?=[\d,])"), "")
    backend.decoder = decoders.Sequence([spaces, decoders.Fuse(), no_space])
    return Tokenizer(backend, _new_config() | {"unk_token": "<|unk|>"})


def _new_config() -> dict:
    tokens = {f"{role}_token": name for role, name in SPECIAL_TOKENS.items() if role != "del"}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}


def read_json(path: Path) -> dict:
    """A file that may be missing. Raises ValueError naming it when it does not hold an object."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return value


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
