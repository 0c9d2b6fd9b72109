"""Checkpoints in and out: a pretrained model becomes an editing model, and an editing model a plain one again.

    python convert.py --to editflow --model_name_or_path answerdotai/ModernBERT-large --output_dir .models/ModernBERT
    python convert.py --to medlm -i GSAI-ML/LLaDA-8B-Base -o .models/LLaDA
    python convert.py --to hf -i out/run/checkpoint-final -o .models/plain          (with adapters: --merge_lora)

The weights of the backbone are never changed, only renamed where they must be. A conversion is four steps (`convert`):

    find    every tensor of the source by its file's header, under the one name by which we know it
    tokens  the tokenizer gets the special tokens that editing needs; the vocabulary may grow by a few rows
    plan    where each tensor of the target comes from: copied, a copy of the output matrix, or new
    write   one tensor at a time, from memory map to file: an 8B model passes through the memory of its largest tensor

All complaints (missing tensors, wrong shapes, a tokenizer that does not fit) come before the first byte is written, and
the output directory appears, complete, at the end or not at all.

What `--to` makes:
    bidirectional   backbone and output matrix under their Hugging Face names, plus the special tokens
    editflow        backbone, sub_logits and ins_logits (copies of the output matrix) and rate_heads (small, random)
    medlm           backbone, lm_head (the output matrix) and next_token_head (a copy of it)
    hf              backbone and output matrix (sub_logits or lm_head) for other tools. LLaDA and Dream have the
                    architectures of Llama and Qwen2, so they are written as such and need no code of their own.
                    `is_causal: false` in the config tells transformers (5 and later) to look both ways.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

import editflow
import lora
import models
from plumbing import cli
from plumbing.tokenizer import CHAT_TEMPLATE, DEL_TOKEN, SPECIAL_TOKENS, Tokenizer, load_tokenizer, read_json

SHARD_BYTES = 5 * 10**9
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

QUESTION_ANSWER_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{{ {"user": "Question", "assistant": "Answer"}.get(message.role, "Instruction") }}:
{{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
Answer:
{% endif %}
"""
_BRACKETS = {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "pad": "[PAD]", "unk": "[UNK]"}
ENCODER_TOKENS = {  # the roles that a tokenizer of this family plays even where its config does not say so
    "bert": _BRACKETS,
    "modernbert": _BRACKETS,
    "roberta": {"cls": "<s>", "sep": "</s>", "mask": "<mask>", "pad": "<pad>", "unk": "<unk>"},
}

# Settings under which a checkpoint would load, but compute something else than its authors' code.
REQUIRED = {
    "hidden_act": ("silu", "gelu"), "hidden_activation": ("gelu",), "position_embedding_type": ("absolute",),
    "use_sliding_window": (False,), "is_decoder": (False,), "partial_rotary_factor": (1.0,),
    "activation_type": ("silu",), "block_type": ("llama",), "layer_norm_type": ("rms",), "alibi": (False,),
    "include_bias": (False,), "include_qkv_bias": (False,), "scale_logits": (False,), "input_emb_norm": (False,),
    "attention_layer_norm": (False,), "rope": (True,),
}  # fmt: skip

# How Hugging Face names what we call lm_head, in files: the matrix, and the bias (BERT's has two names).
OUTPUT_WEIGHT = {
    "modernbert": "decoder.weight",
    "bert": "cls.predictions.decoder.weight",
    "roberta": "lm_head.decoder.weight",
}
OUTPUT_BIAS = {
    "modernbert": ["decoder.bias"],
    "bert": ["cls.predictions.bias", "cls.predictions.decoder.bias"],
    "roberta": ["lm_head.bias", "lm_head.decoder.bias"],
}
HF_TYPE = {"llada": "llama", "dream": "qwen2"}
HF_CLASS = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "modernbert": "ModernBertForMaskedLM", "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM",
}  # fmt: skip
BARE = ("embed_tokens.", "embeddings.", "layers.", "encoder.", "norm.", "final_norm.")  # a backbone's own parts
HEADS = ("lm_head", "next_token_head", "sub_logits", "ins_logits")
EMBEDDINGS = (
    "model.embed_tokens.weight", "model.embeddings.tok_embeddings.weight", "model.embeddings.word_embeddings.weight",
)  # fmt: skip


def parse_args(argv=None):
    f = cli.Flags("Convert checkpoints from and to Hugging Face's layout.")
    a = f.add_argument
    a("--to", choices=["bidirectional", "editflow", "medlm", "hf"], required=True, help="what to make")
    a("--model_name_or_path", "--input", "-i", required=True, help="checkpoint directory or hub id to read")
    a("--output_dir", "-o", required=True, help="directory to write; must be new or empty")
    a("--revision", help="branch, tag or commit of the hub repository")
    f.flag("--merge_lora", help="the source holds LoRA adapters: add them to the weights they were trained on")
    f.flag("--overwrite", help="replace the checkpoint in output_dir")
    a("--x0_sampler", type=cli.spec(editflow.source),
      help="Edit Flows: where generation starts (default: the source's, else empty)")
    a("--schedule", type=cli.spec(editflow.schedule), help="Edit Flows: kappa (default: the source's, else cubic)")
    f.flag("--time_conditioned", help="Edit Flows: the model sees t, through an embedding that adds zero at first")
    a("--dtype", choices=["keep", "float32", "bfloat16"], default="keep", help="of the weights written")
    a("--seed", type=cli.number(int, low=0), default=42, help="of the new rate head")
    args = f.parse_args(argv)
    if args.to != "editflow" and (args.x0_sampler or args.schedule or args.time_conditioned):
        f.error("--x0_sampler, --schedule and --time_conditioned go with --to editflow only")
    return args


# ---------------------------------------------------------------------------------------------------- find


@dataclass
class Stored:
    """A tensor in a file: known by its header, read when needed. dtype is None where it is not a float we know."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def read(self) -> Tensor:
        if self.file.suffix == ".bin":
            return load_bin(self.file)[self.name]
        return models.read_tensor(self.file, self.name, self.shape)


def fetch(path_or_hub_id: str, revision: str | None) -> Path:
    """The source's directory; from the hub, PyTorch files are fetched only where there is no safetensors file."""
    directory = models.local_path(path_or_hub_id, revision=revision)
    if Path(path_or_hub_id).is_dir() or any(directory.glob("*.safetensors")):
        return directory
    patterns = ("*.json", "*.jinja", "*.model", "*.txt", "*.bin")
    return models.local_path(path_or_hub_id, patterns, revision)


def find_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its name on disk. Raises OSError for missing, ValueError for broken files."""
    load_bin.cache_clear()  # the file may have changed since
    safe = [directory / name for name in ("model.safetensors", "model.safetensors.index.json")]
    files = models.tensor_files(directory) if any(f.is_file() for f in safe) else bin_files(directory)
    stored = {}
    for file in sorted(set(files.values())):
        held = header(file)
        for name in (name for name, its_file in files.items() if its_file == file):
            if name not in held:
                raise ValueError(f"{file}: tensor {name!r} is missing, although the index names this file for it")
            stored[name] = Stored(file, name, *held[name])
    return stored


def header(file: Path) -> dict[str, tuple]:
    """Tensor name -> (shape, dtype), without reading a tensor."""
    if file.suffix == ".bin":
        held = load_bin(file).items()
        return {name: (tuple(t.shape), t.dtype if t.dtype in DTYPE_NAMES else None) for name, t in held}
    with models.open_tensors(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
        return {name: (tuple(s.get_shape()), DTYPES.get(s.get_dtype())) for name, s in slices.items()}


def bin_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the PyTorch file that holds it."""
    single, index = directory / "pytorch_model.bin", directory / "pytorch_model.bin.index.json"
    if single.is_file():
        return dict.fromkeys(load_bin(single), single)
    if not index.is_file():
        tried = "model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json"
        raise OSError(f"{directory}: no weights; looked for {tried}")
    return models.indexed_files(index, "an index of PyTorch files")


@lru_cache(maxsize=1)
def load_bin(file: Path) -> dict[str, Tensor]:
    """A PyTorch file, from the memory map where its format allows. weights_only: nothing else is unpickled."""
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files written before PyTorch 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    except Exception as e:  # whatever a broken or hostile pickle leads to
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{file}: truncated, corrupt, or not a PyTorch file of tensors alone ({reason})") from None


def read_config(directory: Path) -> dict:
    """config.json, with LLaDA's own field names replaced. Raises ValueError for what we would compute differently."""
    raw = models.read_config(directory)
    for field, values in REQUIRED.items():
        if raw.get(field) is not None and raw[field] not in values:
            raise ValueError(f"{directory}/config.json: {field} {raw[field]!r} is not supported, only {values[0]!r}")
    if "d_model" in raw:
        kept = {field: value for field, value in raw.items() if field.endswith("_token_id") or field == "nanoedit"}
        raw = kept | models.llada_config(raw) | {"model_type": raw.get("model_type")}
    config = models.complete_config(raw)
    if config.model_type == "modernbert":
        raw["vocab_bias"] = raw.get("vocab_bias", raw.get("decoder_bias", True))
    return raw


def canonical(stored: dict[str, Stored], kind: str) -> dict[str, Stored]:
    """The same tensors under one set of names: those of models.save, and lm_head for every family's output matrix."""
    base = models.disk_name(kind, "model.layers.").removesuffix("layers.")  # "model.", "bert." or "roberta."
    is_bare = not any(name.startswith(base) for name in stored)  # a backbone saved alone has no prefix
    named = {}
    for name, tensor in stored.items():
        if kind == "llada":
            name = llada_name(name)
        elif is_bare and name.startswith(BARE):
            name = base + name
        if kind == "bert":  # spelling of the first BERT checkpoints
            name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        if name == OUTPUT_WEIGHT.get(kind):
            name = "lm_head.weight"
        elif name in OUTPUT_BIAS.get(kind, []):
            name = "lm_head.bias"
        named[name] = tensor
    return named


def llada_name(name: str) -> str:
    """model.transformer.blocks.3.attn_out.weight -> model.layers.3.self_attn.o_proj.weight"""
    is_theirs = name.startswith("model.transformer.")
    return models.rename(name, [(theirs, ours) for ours, theirs in models.LLADA_NAMES]) if is_theirs else name


@dataclass
class Merged(Stored):
    """A matrix of the blocks and what LoRA adds to it."""

    addition: Callable[[], Tensor]

    def read(self) -> Tensor:
        return (super().read().float() + self.addition()).to(self.dtype)


def base_checkpoint(directory: Path, merge: bool) -> Path:
    """Where the weights are: the checkpoint itself, or the one that its adapters belong to."""
    if not (directory / "adapter_config.json").is_file():
        if merge:
            raise ValueError(f"--merge_lora: {directory} holds no adapters (there is no adapter_config.json)")
        return directory
    if not merge:
        raise ValueError(f"{directory}: holds LoRA adapters, not a whole model; pass --merge_lora")
    base = fetch(lora.read_adapter_config(directory)["base_model_name_or_path"], None)
    lora.check_base(base, directory)
    return base


def merged(have: dict[str, Stored], directory: Path, kind: str) -> dict[str, Stored]:
    """The tensors of a base checkpoint with the adapters and heads of `directory`. Raises ValueError for strangers."""
    settings, file = lora.read_adapter_config(directory), directory / "adapter_model.safetensors"
    scale = settings["lora_alpha"] / settings["r"]
    shapes = header(file)
    heads = directory / "heads.safetensors"
    have = have | {name: Stored(heads, name, *held) for name, held in header(heads).items()}
    for a in [name for name in shapes if name.endswith(".lora_A.weight")]:
        b, target = a.replace(".lora_A.", ".lora_B."), a.removeprefix(lora.PREFIX).replace(".lora_A", "")
        target = llada_name(target) if kind == "llada" else target
        if target not in have or b not in shapes:
            raise ValueError(f"{file}: {a} has no partner or no matrix {target!r} to be added to")
        rows, columns = have[target].shape
        for name, shape in ((a, (settings["r"], columns)), (b, (rows, settings["r"]))):
            if shapes[name][0] != shape:
                raise ValueError(f"{file}: {name} has shape {list(shapes[name][0])}, not {list(shape)}")

        def addition(a=a, b=b):
            A, B = (models.read_tensor(file, name, shapes[name][0]).float() for name in (a, b))
            return scale * B @ A

        have[target] = Merged(**vars(have[target]), addition=addition)
    return have


# ---------------------------------------------------------------------------------------------------- tokens


def open_tokenizer(directory: Path, kind: str) -> Tokenizer:
    """The source's tokenizer; from a bare vocabulary where there is neither tokenizer.json nor tokenizer.model."""
    is_bare = not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = load_tokenizer(directory, from_vocabulary(directory, kind) if is_bare else None)
    for role, name in ENCODER_TOKENS.get(kind, {}).items():
        if tokenizer.backend.token_to_id(name) is not None:
            tokenizer.config.setdefault(f"{role}_token", name)
    if is_bare:  # special tokens are then words like any other, until they are declared
        names = [v for k, v in tokenizer.config.items() if k.endswith("_token") and isinstance(v, str)]
        known = [name for name in names if tokenizer.backend.token_to_id(name) is not None]
        tokenizer.backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in known])
    return tokenizer


def from_vocabulary(directory: Path, kind: str) -> tokenizers.Tokenizer:
    """vocab.txt (WordPiece, BERT) or vocab.json + merges.txt (byte-level BPE: RoBERTa, Qwen2, Dream)."""
    words, vocab, merges = (directory / name for name in ("vocab.txt", "vocab.json", "merges.txt"))
    if words.is_file():
        options = read_json(directory / "tokenizer_config.json")
        backend = tokenizers.Tokenizer(vocabulary(tokenizers.models.WordPiece, words, unk_token="[UNK]"))
        if backend.token_to_id("[UNK]") is None:
            raise ValueError(f"{words}: not a vocabulary of BERT's kind: there is no line [UNK]")
        backend.normalizer = normalizers.BertNormalizer(
            lowercase=bool(options.get("do_lower_case", True)),
            strip_accents=options.get("strip_accents") and True,
            handle_chinese_chars=bool(options.get("tokenize_chinese_chars", True)),
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        return backend
    if not (vocab.is_file() and merges.is_file()):
        tried = "tokenizer.json, tokenizer.model, vocab.txt, vocab.json with merges.txt"
        raise OSError(f"no tokenizer in {directory}: looked for {tried}")
    backend = tokenizers.Tokenizer(vocabulary(tokenizers.models.BPE, vocab, merges))
    if kind == "roberta":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        contraction, word = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
        marks, space = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
        pieces = Regex("|".join([contraction, word, r"\p{N}", marks, space]))
        backend.normalizer = normalizers.NFC()
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), as_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def vocabulary(model: type, *files: Path, **options):
    """A model of the tokenizers library from files. Raises ValueError naming them."""
    try:
        return model.from_file(*map(str, files), **options)
    except Exception as e:  # the library raises nothing more special
        raise ValueError(f"{' or '.join(map(str, files))}: not readable ({e})") from None


def prepare_tokenizer(tokenizer: Tokenizer, kind: str, to: str) -> tuple[dict[str, int], dict[str, int]]:
    """Gives the tokenizer, in place, what editing needs: ({token: id} added, {token: id} put on reserved ids)."""
    wanted = {role: SPECIAL_TOKENS[role] for role in ("mask", "bos", "pad", "eos")}
    reserved = {}
    if kind in ENCODER_TOKENS:
        for role, its_name in (("bos", "cls"), ("eos", "sep")):
            if name := tokenizer.config.get(f"{role}_token") or tokenizer.config.get(f"{its_name}_token"):
                tokenizer.config[f"{role}_token"] = name
        tokenizer.chat_template = tokenizer.chat_template or QUESTION_ANSWER_TEMPLATE
    if to == "medlm":
        wanted["del"] = DEL_TOKEN
        message = ["<|im_end|>", "<|im_start|>"]
        if kind == "llada" and tokenizer.del_id is None:
            reserved = use_reserved_ids(tokenizer, [DEL_TOKEN, *message])
            tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
        if tokenizer.chat_template == CHAT_TEMPLATE:
            wanted |= {name: name for name in message}
        if tokenizer.pad_id is not None and tokenizer.pad_id == tokenizer.eos_id:
            del tokenizer.config["pad_token"]  # ME-DLM's responses end in eos and then pads: two different things
    return tokenizer.add_tokens(wanted), reserved


def use_reserved_ids(tokenizer: Tokenizer, names: list[str]) -> dict[str, int]:
    """Renames reserved tokens (`<|reserved_token_0|>`, ...) in the order of their ids: the embedding need not grow."""
    if not isinstance(tokenizer.backend, tokenizers.Tokenizer):
        return {}
    spec = json.loads(tokenizer.backend.to_str())
    free = [token for token in spec["added_tokens"] if re.fullmatch(r"<\|reserved_\w*\d+\|>", token["content"])]
    taken = {}
    missing = [name for name in names if tokenizer.backend.token_to_id(name) is None]
    for name, token in zip(missing, sorted(free, key=lambda token: token["id"])):
        vocab = spec["model"]["vocab"]
        if token["content"] in vocab:
            vocab[name] = vocab.pop(token["content"])
        token["content"], taken[name] = name, token["id"]
    tokenizer.backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return taken


# ---------------------------------------------------------------------------------------------------- plan


@dataclass
class Planned:
    """A tensor of the target. how: "copied", or for the report where else it comes from."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    how: str


def make_plan(have: dict[str, Stored], config, to: str, new_ids: list[int], rows: int, seed: int):
    """Where every tensor of the target comes from: (list of Planned, names in the source of what is left over).

    have: the source's tensors under canonical names; config: the source's, completed; new_ids: of tokens added to the
    vocabulary, for which the target has `rows` rows. Raises ValueError for a missing, misshaped or surplus tensor.
    """
    with torch.device("meta"):
        skeleton = models.METHODS["editflow" if to == "editflow" else "medlm"](config)
    parameters = {name: tuple(p.shape) for name, p in skeleton.state_dict().items()}
    disk_names = {name: models.disk_name(config.model_type, name) for name in parameters}
    embedding = next(name for name in EMBEDDINGS if name in parameters)
    transform = [disk_names[name] for name in parameters if name.startswith(("model.transform.", "model.head."))]
    no_transform = bool(transform) and not any(name in have for name in transform)  # an encoder saved without it
    output = output_module(have, config, disk_names[embedding], no_transform)
    fresh = new_tensors(skeleton, no_transform, seed)

    plan, used = [], set()
    for name, shape in parameters.items():
        module, _, leaf = name.rpartition(".")
        source = disk_names[name]
        if module in HEADS:
            own = module != "lm_head" and f"{module}.weight" in have
            source = f"{module if own else output}.{leaf}"
            if leaf == "bias" and source not in have:
                source = "lm_head.bias"  # an output matrix tied to the embeddings has a bias of its own
        if source in have:
            check(have[source], shape)
            used.add(source)
            how = "copied" if source in (name, disk_names[name]) else f"copy of {have[source].name}"
            dtype, make = have[source].dtype, have[source].read
        elif name in fresh:
            tensor, how = fresh[name]
            dtype, make = have[disk_names[embedding]].dtype, partial(torch.clone, tensor)
        else:
            raise ValueError(f"tensor {source!r} is missing, although config.json asks for it")
        if new_ids and (module in HEADS or name in (embedding, "unigram")):
            shape, make = (rows, *shape[1:]), partial(grow, make, new_ids, rows)
        plan.append(Planned(disk_names[name], shape, dtype, make, how))
    if to in ("hf", "bidirectional"):
        plan = hf_plan(plan, have, config, output, disk_names[embedding])
    left_over = [tensor.name for name, tensor in have.items() if name not in used]
    refuse_strangers(left_over)
    return plan, left_over


def output_module(have: dict[str, Stored], config, embedding: str, no_transform: bool) -> str:
    """The canonical name of what the source predicts tokens with; the embedding where it has nothing else."""
    for module in ("sub_logits", "lm_head"):
        if f"{module}.weight" in have:
            return module
    is_bare = not any(tensor.name.startswith("model.") for tensor in have.values())
    if not (config.tie_word_embeddings or no_transform or is_bare):
        raise ValueError("tensor 'lm_head.weight' is missing, and config.json does not tie it to the embeddings")
    return embedding.removesuffix(".weight")


def new_tensors(skeleton, no_transform: bool, seed: int) -> dict[str, tuple[Tensor, str]]:
    """What no pretrained checkpoint has, by our parameter names: (tensor, what it starts as)."""
    generator, fresh = torch.Generator().manual_seed(seed), {}
    parameters = skeleton.state_dict()
    if hasattr(skeleton, "time_embed"):
        models.init_weights(skeleton.time_embed.to_empty(device="cpu"), generator)
    if hasattr(skeleton, "rate_heads"):
        skeleton.rate_heads.to_empty(device="cpu")
        models.init_new_heads(skeleton, generator)
    for name, parameter in skeleton.state_dict().items():
        if name.startswith(("rate_heads.", "time_embed.")):
            fresh[name] = parameter.detach(), "new"
    for head in HEADS:
        if f"{head}.bias" in parameters:
            fresh[f"{head}.bias"] = torch.zeros(parameters[f"{head}.bias"].shape), "new, zeros"
    if "unigram" in parameters:
        fresh["unigram"] = torch.full(parameters["unigram"].shape, 1 / len(parameters["unigram"])), "new, uniform"
    if no_transform:
        fresh |= transparent_transform({n: p.shape for n, p in parameters.items() if "transform." in n or "head." in n})
    return fresh


def transparent_transform(shapes: dict[str, torch.Size]) -> dict[str, tuple[Tensor, str]]:
    """A prediction transform, LayerNorm(GELU(W h + b)), that starts as LayerNorm(h).

    W is the identity and b = 4: so far to the right GELU is nearly linear, and LayerNorm takes the shift out again.
    The outputs then lie in the space of the input embeddings, which serve as the output matrix. (Without a bias, as in
    ModernBERT, GELU cuts off what is negative.)
    """
    values = {
        "dense.weight": lambda shape: torch.eye(shape[0]),
        "dense.bias": lambda shape: torch.full(shape, 4.0),
        "orm.weight": torch.ones,
        "orm.bias": torch.zeros,
    }
    return {
        name: (value(shape), "new")
        for name, shape in shapes.items()
        for ending, value in values.items()
        if name.startswith("model.") and name.endswith(ending)
    }


def check(stored: Stored, shape: tuple[int, ...]) -> None:
    if stored.dtype is None:
        known = ", ".join(DTYPES)
        raise ValueError(f"tensor {stored.name!r} is none of {known}: quantised weights cannot be converted")
    if stored.shape != shape:
        found, asked = list(stored.shape), list(shape)
        raise ValueError(f"tensor {stored.name!r} has shape {found}, config.json asks for {asked}")


def refuse_strangers(left_over: list[str]) -> None:
    """What is left over outside the blocks is a pooler or another head; inside, the config tells of another model."""
    block = re.compile(r"(^|\.)(layers|layer|blocks)\.\d+\.")
    strangers = [name for name in left_over if block.search(name) and not name.endswith("rotary_emb.inv_freq")]
    if strangers:
        count = f"{len(strangers)} tensors in the blocks"
        raise ValueError(f"config.json describes another model: it asks for none of {count}, such as {strangers[0]!r}")


def grow(make: Callable[[], Tensor], new_ids: list[int], rows: int) -> Tensor:
    """[V] or [V, D] with `rows` rows; those of new tokens are the mean of the old ones."""
    old = make()
    mean = old.mean(0, dtype=torch.float32).to(old.dtype)
    new = old.new_empty(rows, *old.shape[1:])
    new[: len(old)] = old
    new[len(old) :] = mean
    new[new_ids] = mean
    return new


def hf_plan(plan: list[Planned], have: dict[str, Stored], config, output: str, embedding: str) -> list[Planned]:
    """The plan under Hugging Face's names. An output matrix still equal to the embedding it was tied to is left out."""
    kind, out = config.model_type, []
    is_tied = f"{output}.weight" == embedding
    if config.tie_word_embeddings and not is_tied and have[f"{output}.weight"].shape == have[embedding].shape:
        is_tied = torch.equal(have[f"{output}.weight"].read(), have[embedding].read())
    for tensor in plan:
        names = [tensor.name]
        if tensor.name == "lm_head.weight":
            names = [] if is_tied else [OUTPUT_WEIGHT.get(kind, tensor.name)]
        elif tensor.name == "lm_head.bias":
            names = OUTPUT_BIAS[kind][: 1 if is_tied else None]
        elif tensor.name.startswith("next_token_head."):
            names = []
        out += [replace(tensor, name=name) for name in names]
    return out


# ---------------------------------------------------------------------------------------------------- write


def write_tensors(directory: Path, plan: list[Planned], dtype: torch.dtype | None) -> list[str]:
    """model.safetensors, or shards of at most SHARD_BYTES with an index. Returns the names of the files.

    A safetensors file is the length of its header, the header (JSON: name, dtype, shape, place) and then the bytes.
    Written out here, because the library wants all tensors of a file at once.
    """
    shards, filled = [[]], 0
    for tensor in plan:
        if shards[-1] and filled + size(tensor, dtype) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size(tensor, dtype)
    n = len(shards)
    files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    total = sum(size(tensor, dtype) for tensor in plan)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", leave=False) as bar:
        for file, shard in zip(files, shards):
            write_shard(directory / file, shard, dtype, bar)
    if n > 1:
        where = {tensor.name: file for file, shard in zip(files, shards) for tensor in shard}
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return files


def write_shard(file: Path, shard: list[Planned], dtype: torch.dtype | None, bar) -> None:
    shard = sorted(shard, key=lambda t: -(dtype or t.dtype).itemsize)  # so that every tensor is aligned
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in shard:
        end = offset + size(tensor, dtype)
        kind = DTYPE_NAMES[dtype or tensor.dtype]
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(file, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for tensor in shard:
            data = tensor.make().to(dtype or tensor.dtype).contiguous().reshape(-1).view(torch.uint8)
            f.write(memoryview(data.numpy()))
            bar.update(len(data))


def size(tensor: Planned, dtype: torch.dtype | None) -> int:
    return math.prod(tensor.shape) * (dtype or tensor.dtype).itemsize


def target_config(raw: dict, config, to: str, rows: int, plan: list[Planned], args) -> dict:
    """config.json of the target. raw: the source's; config: the same, completed."""
    kind, foreign = config.model_type, ("architectures", "auto_map", "torch_dtype")
    new = {field: value for field, value in raw.items() if field not in foreign}
    dtype = getattr(torch, args.dtype) if args.dtype != "keep" else plan[0].dtype
    new |= {"model_type": kind, "vocab_size": rows, "dtype": str(dtype).removeprefix("torch.")}
    if to in ("hf", "bidirectional"):
        if kind not in ENCODER_TOKENS:
            new["is_causal"] = False
        names = {tensor.name for tensor in plan}
        new["tie_word_embeddings"] = OUTPUT_WEIGHT.get(kind, "lm_head.weight") not in names
        new.pop("nanoedit", None)
    if to == "hf":
        defaults = {field: value for field, value in models.ARCHITECTURES[kind][1].items() if value is not None}
        new = defaults | new  # they need not be those of HF_CLASS
        for field in ("qk_norm", "attention_out_bias", "vocab_bias"):
            new.pop(field, None)
        new |= {"model_type": HF_TYPE.get(kind, kind), "architectures": [HF_CLASS[HF_TYPE.get(kind, kind)]]}
    if to == "editflow":
        new["nanoedit"] = config.nanoedit
    if to == "medlm":
        new["nanoedit"] = {"method": "medlm"}
    return new


def editflow_settings(old: dict, args) -> dict:
    """Our block of the config. Raises ValueError for an unknown schedule or source."""
    new = {
        "method": "editflow",
        "schedule": args.schedule or old.get("schedule", "cubic"),
        "x0_sampler": args.x0_sampler or old.get("x0_sampler", "empty"),
        "time_conditioned": bool(args.time_conditioned or old.get("time_conditioned")),
    }
    editflow.schedule(new["schedule"])
    editflow.source(new["x0_sampler"])
    return new


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def prepare_output(output: Path, overwrite: bool) -> Path:
    """The directory to write into, beside the final one. Raises OSError when that cannot be or must not be written."""
    try:
        if not overwrite and output.is_dir() and any(output.iterdir()):
            raise OSError("not empty; choose another folder, or pass --overwrite")
        if (output / "train_state.json").is_file():
            raise OSError("holds a checkpoint of a run, which would be lost; choose another folder")
        if output.exists() and not output.is_dir():
            raise OSError("is a file; choose another name")
        writing = output.parent / f".writing-{output.name}"
        shutil.rmtree(writing, ignore_errors=True)  # of a conversion that was killed
        writing.mkdir(parents=True)
    except OSError as e:
        raise OSError(f"--output_dir {output}: {f'cannot be written to ({e.strerror})' if e.strerror else e}") from None
    return writing


def publish(writing: Path, output: Path) -> None:
    """Moves the finished checkpoint to its place. In a directory that exists, it replaces the files of a checkpoint
    and leaves everything else as it is: runs trained from a checkpoint are often kept inside its directory."""
    if not output.exists():
        return os.replace(writing, output)
    new = {file.name for file in writing.iterdir()}
    patterns = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "tokenizer.*", "*.jinja")
    stale = [file for pattern in patterns for file in output.glob(pattern) if file.name not in new]
    for file in writing.iterdir():
        os.replace(file, output / file.name)
    for file in stale:
        file.unlink()


def convert(args) -> None:
    """Reads args.model_name_or_path, writes args.output_dir, prints what was done. Raises OSError / ValueError."""
    output = Path(os.path.abspath(args.output_dir))
    writing = prepare_output(output, args.overwrite)
    try:
        directory = fetch(args.model_name_or_path, args.revision)
        raw = read_config(directory)
        config = models.complete_config(raw)
        kind = config.model_type
        base = base_checkpoint(directory, args.merge_lora)
        if args.to == "editflow":
            config.nanoedit = editflow_settings(config.nanoedit, args)

        tokenizer = open_tokenizer(directory, kind)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, config.json a vocab_size of "
                f"{config.vocab_size}; they do not belong together"
            )
        added, reserved = ({}, {}) if args.to == "hf" else prepare_tokenizer(tokenizer, kind, args.to)
        rows = max(config.vocab_size, tokenizer.vocab_size)

        have = canonical(find_tensors(base), kind)
        if base != directory:
            have = merged(have, directory, kind)
        try:
            plan, left_over = make_plan(have, config, args.to, list(added.values()), rows, args.seed)
        except ValueError as e:
            raise ValueError(f"{directory}: {e}") from None
        dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
        bytes_, free = sum(size(tensor, dtype) for tensor in plan), shutil.disk_usage(writing).free
        if bytes_ > free:
            raise OSError(f"--output_dir {output}: needs {bytes_ / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

        files = write_tensors(writing, plan, dtype)
        write_json(writing / "config.json", target_config(raw, config, args.to, rows, plan, args))
        tokenizer.save(writing)
        publish(writing, output)
    finally:
        shutil.rmtree(writing, ignore_errors=True)

    report(kind, args.to, plan, left_over)
    for what, tokens in (("added", added), ("put on reserved ids", reserved)):
        if tokens:
            print(f"tokens {what}: {', '.join(f'{token} = {i}' for token, i in tokens.items())}")
    if rows > config.vocab_size:
        print(f"vocabulary grown from {config.vocab_size} to {rows} rows; new rows are the mean of the others")
    print(f"saved in {output}: {bytes_ / 1e9:.2f} GB in {len(files)} file{'s' * (len(files) > 1)}")


def report(kind: str, to: str, plan: list[Planned], left_over: list[str]) -> None:
    new = [tensor for tensor in plan if tensor.how != "copied"]
    print(f"{kind} -> {to}: {len(plan) - len(new)} tensors copied, {len(new)} new, {len(left_over)} left over")
    for tensor in new:
        print(f"  {tensor.name} {list(tensor.shape)}: {tensor.how}")
    if left_over:
        print(f"  left over: {', '.join(left_over)}")


def main(argv=None):
    convert(parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
