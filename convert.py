"""Checkpoints in and out: a pretrained model becomes an editing model, and an editing model a plain one again.

    python convert.py --to editflow --model_name_or_path answerdotai/ModernBERT-large --output_dir .models/ModernBERT
    python convert.py --to medlm -i GSAI-ML/LLaDA-8B-Base -o .models/LLaDA
    python convert.py --to hf -i out/run/checkpoint-final -o .models/plain          (with adapters: --merge_lora)

The weights of the backbone are never changed, only renamed where they must be. A conversion is four steps (`convert`):

    find    every tensor of the source by its file's header, under the one name by which we know it
    tokens  the tokenizer gets the special tokens that editing needs; the vocabulary may grow by a few rows
    plan    where each tensor of the target comes from: copied, a copy of the output matrix, or new
    write   file by file, each of at most SHARD_BYTES: no more of a model is in memory at a time

All complaints (missing tensors, wrong shapes, a tokenizer that does not fit) come before the first byte is written, and
the output directory appears, complete, at the end or not at all.

What `--to` makes:
    a method        backbone, the method's vocabulary heads (copies of the output matrix), and what else it has (new).
                    editflow: sub_logits, ins_logits; small, random rate_heads. medlm: lm_head, next_token_head.
    bidirectional   backbone and output matrix under their Hugging Face names, plus the special tokens
    hf              backbone and output matrix (sub_logits or lm_head) for other tools. LLaDA and Dream have the
                    architectures of Llama and Qwen2, so they are written as such and need no code of their own.
                    `is_causal: false` in the config tells transformers (5 and later) to look both ways.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import tokenizers
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tokenizers import AddedToken, BertWordPieceTokenizer, ByteLevelBPETokenizer, Regex, normalizers, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm

import models
from plumbing import checkpoints, cli, methods
from plumbing.checkpoints import CHECKPOINT_FILES, SAFETENSORS, Lazy, disk_name
from plumbing.tokenizer import CHAT_TEMPLATE, DEL_TOKEN, SPECIAL_TOKENS, Tokenizer, load_tokenizer, read_json

SHARD_BYTES = 2 * 10**9  # a file of the target; a larger tensor has a file for itself

_BRACKETS = {"bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]", "pad": "[PAD]", "unk": "[UNK]"}
_BRACKETS |= {"cls": "[CLS]", "sep": "[SEP]"}
_ANGLES = {"bos": "<s>", "eos": "</s>", "mask": "<mask>", "pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>"}
# the roles that a tokenizer of this family plays even where its config does not say so
ENCODER_TOKENS = {"bert": _BRACKETS, "modernbert": _BRACKETS, "roberta": _ANGLES}

# Hugging Face's names of the output matrix's module; where there are two, both have the bias
OUTPUT = {
    "modernbert": ["decoder"],
    "bert": ["cls.predictions.decoder", "cls.predictions"],
    "roberta": ["lm_head.decoder", "lm_head"],
}
HF_TYPE = {"llada": "llama", "dream": "qwen2"}
HF_CLASS = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "modernbert": "ModernBertForMaskedLM", "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM",
}  # fmt: skip


def parse_args(argv=None):
    f = cli.Flags("Convert checkpoints from and to Hugging Face's layout.")
    f.choice("--to", choices=["bidirectional", "hf", *methods.METHODS], required=True, help="what to make")
    f.choice("--model_name_or_path", "--input", "-i", required=True, help="checkpoint directory or hub id to read")
    f.choice("--output_dir", "-o", required=True, help="directory to write; must be new or empty")
    f.choice("--revision", help="branch, tag or commit of the hub repository")
    f.flag("--merge_lora", help="the source holds LoRA adapters: add them to the weights they were trained on")
    f.flag("--overwrite", help="replace the checkpoint in output_dir")
    f.choice("--dtype", choices=["keep", "float32", "bfloat16"], default="keep", help="of the weights written")
    f.integer("--seed", low=0, default=42, help="of the heads that start at random")
    for method in methods.METHODS.values():
        f.group(method.TITLE)
        method.model_flags(f)
    args = f.parse_args(argv)
    for name in methods.METHODS.keys() - {args.to}:
        alone = cli.Flags("")
        methods.get(name).model_flags(alone)
        for flag, default in vars(alone.parse_args([])).items():
            if getattr(args, flag) != default:
                f.error(f"--{flag} goes with --to {name} only")
    return args


# ---------------------------------------------------------------------------------------------------- find


def fetch(path_or_hub_id: str, revision: str | None = None) -> Path:
    """The source's directory; from the hub, PyTorch files are fetched only where there is no safetensors file."""
    directory = checkpoints.local_path(path_or_hub_id, revision=revision)
    if any(directory.glob("*.safetensors")):
        return directory
    return checkpoints.local_path(path_or_hub_id, (*CHECKPOINT_FILES, "*.bin"), revision)


def load_bin(file: Path) -> dict[str, Lazy]:
    """The tensors of a PyTorch file, from the memory map where its format allows. Nothing else is unpickled."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        return {name: Lazy(name, file, t.to("meta"), t.clone) for name, t in state.items() if isinstance(t, Tensor)}
    except Exception as e:  # whatever a broken or hostile pickle leads to
        reason = str(e).partition("\n")[0]
        raise ValueError(f"{file}: truncated, corrupt, or not a PyTorch file of tensors alone ({reason})") from None


FORMATS = SAFETENSORS | {"pytorch_model.bin": load_bin}


def spellings(name: str, kind: str) -> list[str]:
    """The names that a file may have for what we call `name`, with the name in our own files first."""
    ours, base = disk_name(kind, name), disk_name(kind, "model.")
    names = [ours, ours.removeprefix(base)]  # the second: of a backbone saved alone
    if name.startswith("lm_head."):
        names += [name.replace("lm_head", module) for module in OUTPUT.get(kind, [])]
    if kind == "llada":
        names.append(disk_name("llada original", name))
    if kind == "bert":  # as in the first BERT checkpoints
        old = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
        names += [n.replace(new, their) for n in names for new, their in old if n.endswith(new)]
    return names


# ---------------------------------------------------------------------------------------------------- tokens


def open_tokenizer(directory: Path, kind: str) -> Tokenizer:
    """The source's tokenizer; from a bare vocabulary where there is neither tokenizer.json nor tokenizer.model."""
    is_bare = not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = load_tokenizer(directory, from_vocabulary(directory, kind) if is_bare else None)
    for role, name in ENCODER_TOKENS.get(kind, {}).items():
        if tokenizer.backend.token_to_id(name) is None:
            continue
        tokenizer.config.setdefault(f"{role}_token", name)
        if is_bare:  # special tokens are then words like any other, until they are declared
            tokenizer.backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    return tokenizer


def from_vocabulary(directory: Path, kind: str) -> tokenizers.Tokenizer | None:
    """vocab.txt (WordPiece, BERT) or vocab.json + merges.txt (byte-level BPE: RoBERTa, Qwen2, Dream), if there."""
    words, vocab, merges = (directory / name for name in ("vocab.txt", "vocab.json", "merges.txt"))
    options = read_json(directory / "tokenizer_config.json")
    try:
        if words.is_file():
            backend = BertWordPieceTokenizer.from_file(
                str(words),
                lowercase=bool(options.get("do_lower_case", True)),
                strip_accents=options.get("strip_accents") and True,
                handle_chinese_chars=bool(options.get("tokenize_chinese_chars", True)),
            )
        elif vocab.is_file() and merges.is_file():
            backend = ByteLevelBPETokenizer.from_file(str(vocab), str(merges))
        else:
            return None
    except Exception as e:  # the library raises nothing more special
        files = words if words.is_file() else f"{vocab} or {merges}"
        raise ValueError(f"{files}: not readable ({e})") from None
    backend = tokenizers.Tokenizer.from_str(backend.to_str())
    if not words.is_file() and kind != "roberta":  # Qwen2 cuts texts otherwise
        pieces = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        pieces += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        split = pre_tokenizers.Split(Regex(pieces), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    return backend


def prepare_tokenizer(tokenizer: Tokenizer, kind: str, needed: tuple) -> tuple[dict, dict]:
    """Gives the tokenizer, in place, what editing needs: ({token: id} added, {token: id} put on reserved ids).

    needed: the roles of special tokens (TOKENS) that the method cannot do without.
    """
    wanted = {role: SPECIAL_TOKENS[role] for role in ("mask", "bos", "pad", "eos")}
    reserved = {}
    if "del" in needed:
        wanted["del"] = DEL_TOKEN
        message = ["<|im_end|>", "<|im_start|>"]
        if kind == "llada" and tokenizer.del_id is None:
            reserved = use_reserved_ids(tokenizer, [DEL_TOKEN, *message])
            tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
        if tokenizer.chat_template == CHAT_TEMPLATE:
            wanted |= {name: name for name in message}
    if {"pad", "eos"} <= set(needed) and tokenizer.pad_id is not None and tokenizer.pad_id == tokenizer.eos_id:
        del tokenizer.config["pad_token"]  # responses end in eos and then pads: two different things
    return tokenizer.add_tokens(wanted), reserved


def use_reserved_ids(tokenizer: Tokenizer, names: list[str]) -> dict[str, int]:
    """Renames reserved tokens (`<|reserved_token_0|>`, ...) in the order of their ids: the embedding need not grow."""
    spec, known, taken = tokenizer.backend.to_str(), tokenizer.backend.get_added_tokens_decoder(), {}
    free = [i for i in sorted(known) if re.fullmatch(r"<\|reserved_\w*\d+\|>", known[i].content)]
    missing = [name for name in names if tokenizer.backend.token_to_id(name) is None]
    for name, i in zip(missing, free):
        spec, taken[name] = spec.replace(json.dumps(known[i].content), json.dumps(name)), i
    tokenizer.backend = tokenizers.Tokenizer.from_str(spec)
    return taken


# ---------------------------------------------------------------------------------------------------- plan


IN_A_BLOCK = re.compile(r"(^|\.)(layers|layer|blocks)\.\d+\.")


def make_plan(have: dict[str, Lazy], config, to: str, new_ids: list[int], rows: int, seed: int):
    """Where every tensor of the target comes from: (list of Lazy, names in the source of what is left over).

    have: the source's tensors by their names on disk; config: the source's, completed; new_ids: of tokens added to the
    vocabulary, for which the target has `rows` rows. Raises ValueError for a missing, misshaped or surplus tensor.
    """
    kind = config.model_type
    model, heads = skeleton(config, to)
    parameters = model.state_dict()
    embedding = next(f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding))

    def find(name: str) -> Lazy | None:
        return next((have[spelling] for spelling in spellings(name, kind) if spelling in have), None)

    if source := find(embedding):
        source.check(*parameters[embedding].shape)  # before new heads of these sizes are made
    may_be_tied = config.tie_word_embeddings or not any(name.startswith("model.") for name in have)
    transform = [name for name in parameters if name.startswith(("model.transform.", "model.head."))]
    if transform and not any(map(find, transform)):  # an encoder saved without its prediction transform
        may_be_tied = True
        pass_through(model.get_submodule(".".join(transform[0].split(".")[:2])))
    fresh = new_tensors(model, heads, seed)
    outputs = [*(method.HEADS[0] for method in methods.METHODS.values()), "lm_head"]
    output = next((module for module in outputs if find(f"{module}.weight")), embedding.removesuffix(".weight"))
    if output not in outputs and not may_be_tied:
        raise ValueError("tensor 'lm_head.weight' is missing, and not tied to the embeddings")

    plan, used = [], set()
    for name in sorted(parameters, key=lambda name: name != embedding):  # the embedding has the dtype of what is new
        module, _, leaf = name.rpartition(".")
        source, how = find(name), "copied"
        if module in heads and (module == "lm_head" or not find(f"{module}.weight")):
            source = find(f"{output}.{leaf}")
            if leaf == "bias" and not source:
                source = find("lm_head.bias")  # an output matrix tied to the embeddings has a bias of its own
            how = f"copy of {source.name}" if source and module != output else "copied"
        if source:
            source.check(*parameters[name].shape)
            used.add(source.name)
            meta, make = source.meta, source.make
        elif name in fresh:
            meta, make, how = fresh[name].to("meta", plan[0].meta.dtype), fresh[name].clone, "new"
        else:
            raise ValueError(f"tensor {spellings(name, kind)[0]!r} is missing, but config.json asks for it")
        if new_ids and (module in (*heads, "") or name == embedding):  # "": token frequencies
            meta, make = meta.new_empty(rows, *meta.shape[1:]), partial(grow, make, new_ids, rows)
        plan.append(Lazy(disk_name(kind, name), None, meta, make, how))
    if to not in methods.METHODS:
        plan = hf_plan(plan, find(f"{output}.weight"), find(embedding), config)
    left_over = [name for name in have if name not in used]
    # outside the blocks: a pooler or another head; inside, where no old buffer of angles is: of another model
    strangers = [name for name in left_over if IN_A_BLOCK.search(name) and not name.endswith("inv_freq")]
    if strangers:
        found = f"{len(strangers)} tensors in the blocks that it does not ask for, such as {strangers[0]!r}"
        raise ValueError(f"config.json describes another model: there are {found}")
    return plan, left_over


def skeleton(config, to: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The target, without memory for its weights, and the names of its vocabulary heads."""
    if to in methods.METHODS:
        return checkpoints.build(config, "meta"), methods.get(to).HEADS
    with torch.device("meta"):
        lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.vocab_bias)
        return nn.ModuleDict({"model": models.backbone(config), "lm_head": lm_head}), ("lm_head",)


def pass_through(transform: nn.ModuleDict) -> None:
    """A prediction transform, LayerNorm(GELU(W h + b)), that starts as LayerNorm(h).

    W is the identity and b = 4: so far to the right GELU is nearly linear, and LayerNorm takes the shift out again.
    The outputs then lie in the space of the input embeddings, which serve as the output matrix. (Without a bias, as in
    ModernBERT, GELU cuts off what is negative.)
    """
    dense, norm = transform.to_empty(device="cpu").values()
    nn.init.eye_(dense.weight)
    if dense.bias is not None:
        nn.init.constant_(dense.bias, 4.0)
    norm.reset_parameters()


def new_tensors(model: nn.Module, heads: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    """What no pretrained checkpoint has, by our parameter names."""
    for name, module in model.named_children():
        if name not in ("model", *heads):
            module.to_empty(device="cpu")
    for name, buffer in list(model.named_buffers(recurse=False)):
        setattr(model, name, torch.empty_like(buffer, device="cpu"))
    if hasattr(model, "init_heads"):
        model.init_heads(torch.Generator().manual_seed(seed))
    state = model.state_dict()
    biases = {f"{head}.bias" for head in heads} & state.keys()
    fresh = {name: tensor for name, tensor in state.items() if not tensor.is_meta}
    return fresh | {name: torch.zeros(state[name].shape) for name in biases}


def grow(make: Callable[[], Tensor], new_ids: list[int], rows: int) -> Tensor:
    """[V] or [V, D] with `rows` rows; those of new tokens are the mean of the old ones."""
    old = make()
    total = sum(part.sum(0, dtype=torch.float32) for part in old.split(4096))  # in parts: they are copied
    mean = (total / len(old)).to(old.dtype)
    new = mean.repeat(rows, *[1] * (old.dim() - 1))
    new[: len(old)] = old
    new[new_ids] = mean
    return new


def hf_plan(plan: list[Lazy], matrix: Lazy, embedding: Lazy, config) -> list[Lazy]:
    """The plan under Hugging Face's names. An output matrix still equal to the embedding it was tied to is left out."""
    may_be_tied = config.tie_word_embeddings and matrix.meta.shape == embedding.meta.shape
    is_tied = matrix is embedding or (may_be_tied and torch.equal(matrix.read(), embedding.read()))
    modules = OUTPUT.get(config.model_type, ["lm_head"])
    names = {
        "lm_head.weight": [] if is_tied else [f"{modules[0]}.weight"],
        "lm_head.bias": [f"{module}.bias" for module in (modules[-1:] if is_tied else modules)],
    }
    return [replace(tensor, name=name) for tensor in plan for name in names.get(tensor.name, [tensor.name])]


# ---------------------------------------------------------------------------------------------------- write


def write_tensors(directory: Path, plan: list[Lazy], split) -> None:
    """The files of a StateDictSplit. The tensors of one file at a time are in memory."""
    planned = {tensor.name: tensor for tensor in plan}
    directory.mkdir(parents=True)
    for file, names in tqdm(split.filename_to_tensors.items(), unit="file", desc="writing", leave=False):
        checkpoints.write_tensors(directory / file, {name: planned[name].read() for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        checkpoints.write_json(directory / "model.safetensors.index.json", index)


def target_config(config: models.Config, to: str, rows: int, plan: list[Lazy]) -> dict:
    """config.json of the target. config: the source's, with the target's own settings."""
    kind, dropped = config.model_type, {"architectures", "auto_map", "torch_dtype"}
    new = checkpoints.config_as_json(config)
    new |= {"model_type": kind, "vocab_size": rows, "dtype": str(plan[0].meta.dtype).removeprefix("torch.")}
    if to not in methods.METHODS:
        dropped.add("nanoedit")
        if kind not in ENCODER_TOKENS:
            new["is_causal"] = False
        output = OUTPUT.get(kind, ["lm_head"])[0]
        new["tie_word_embeddings"] = f"{output}.weight" not in {tensor.name for tensor in plan}
    if to == "hf":
        dropped |= {"qk_norm", "attention_out_bias", "vocab_bias", *(name for name in new if new[name] is None)}
        new["model_type"] = HF_TYPE.get(kind, kind)
    new = {name: value for name, value in new.items() if name not in dropped}
    return new | ({"architectures": [HF_CLASS[new["model_type"]]]} if to == "hf" else {})


def check_output(output: Path, overwrite: bool) -> None:
    """Raises OSError where the directory cannot be written or must not be."""
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OSError(f"--output_dir {output}: not empty; choose another folder, or pass --overwrite")
    if (output / checkpoints.STATE).is_file():
        raise OSError(f"--output_dir {output}: holds a checkpoint of a run; choose another folder")
    checkpoints.check_writable((output if output.exists() else output.parent) / ".writable", f"--output_dir {output}")


def publish(written: Path, output: Path) -> None:
    """Moves a finished checkpoint into a directory that exists: it replaces the files of a checkpoint and leaves
    everything else as it is. Runs trained from a checkpoint are often kept inside its directory."""
    new = {file.name for file in written.iterdir()}
    patterns = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "tokenizer.*", "*.jinja")
    stale = [file for pattern in patterns for file in output.glob(pattern) if file.name not in new]
    for file in written.iterdir():
        os.replace(file, output / file.name)
    for file in stale:
        file.unlink()
    written.rmdir()


def convert(args) -> None:
    """Reads args.model_name_or_path, writes args.output_dir, prints what was done. Raises OSError / ValueError."""
    output = Path(os.path.abspath(args.output_dir))
    check_output(output, args.overwrite)
    directory = fetch(args.model_name_or_path, args.revision)
    is_adapted = (directory / "adapter_config.json").is_file()
    if is_adapted != args.merge_lora:
        holds = "adapters, not a whole model: pass" if is_adapted else "no adapters for"
        raise ValueError(f"{directory} holds {holds} --merge_lora")
    config = checkpoints.read_config(directory)
    if "d_model" in config.other:  # LLaDA's own names of the fields; what is written has Llama's
        config.other = {field: value for field, value in config.other.items() if field.endswith("_token_id")}
    method = methods.METHODS.get(args.to)
    if method:
        remembered = config.nanoedit or methods.published(args.to)
        config.nanoedit = {"method": args.to} | method.remember(args, remembered)
    have = checkpoints.find_tensors(directory, FORMATS, fetch)

    tokenizer, rows = open_tokenizer(directory, config.model_type), config.vocab_size
    if tokenizer.vocab_size > rows:
        known = f"{tokenizer.vocab_size} tokens"
        raise ValueError(f"{directory}: the tokenizer has {known}, but config.json a vocab_size of {rows}")
    added, reserved = {}, {}
    if args.to != "hf":
        added, reserved = prepare_tokenizer(tokenizer, config.model_type, method.TOKENS if method else ())
    rows = max(rows, tokenizer.vocab_size)

    plan, left_over = make_plan(have, config, args.to, list(added.values()), rows, args.seed)
    if args.dtype != "keep":
        plan = [replace(tensor, meta=tensor.meta.to(getattr(torch, args.dtype))) for tensor in plan]
    split = split_torch_state_dict_into_shards({t.name: t.meta for t in plan}, max_shard_size=SHARD_BYTES)
    size, free = split.metadata["total_size"], shutil.disk_usage(output.parent).free
    if size > free:
        raise OSError(f"--output_dir {output}: needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

    target = output.with_name(f".converted-{output.name}") if output.exists() else output
    with checkpoints.replacing(target) as writing:
        write_tensors(writing, plan, split)
        tokenizer.save(writing)
        checkpoints.write_json(writing / "config.json", target_config(config, args.to, rows, plan))
    if target != output:
        publish(target, output)

    new = [tensor for tensor in plan if tensor.how != "copied"]
    counts = f"{len(plan) - len(new)} tensors copied, {len(new)} new, {len(left_over)} left over"
    print(f"{config.model_type} -> {args.to}: {counts}")
    for tensor in new:
        print(f"  {tensor.name} {list(tensor.meta.shape)}: {tensor.how}")
    if left_over:
        print(f"  left over: {', '.join(left_over)}")
    for what, tokens in (("added", added), ("put on reserved ids", reserved)):
        if tokens:
            print(f"tokens {what}: {', '.join(f'{token} = {i}' for token, i in tokens.items())}")
    if rows > config.vocab_size:
        print(f"vocabulary grown from {config.vocab_size} to {rows} rows; new rows are the mean of the others")
    files = len(split.filename_to_tensors)
    print(f"saved in {output}: {size / 1e9:.2f} GB in {files} file{'s' * (files > 1)}")


def main(argv=None):
    convert(parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
