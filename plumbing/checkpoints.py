"""Every model, adapter and run that is opened or written.

    DIR/config.json                  the backbone's fields under Hugging Face's names, and "nanoedit": what the
                                     checkpoint remembers of its method
        model.safetensors            or shards with an index
        tokenizer files              plumbing/tokenizer.py
    DIR/adapter_config.json          instead of a whole model: LoRA adapters in the layout of the PEFT library, and
        adapter_model.safetensors    heads.safetensors, everything outside the backbone
    RUN/checkpoint-500/              a model or adapters as above, and beside them
        optimizer.safetensors        moments of AdamW, by parameter
        train_state.json             {"step", "args", ...}: everything else that the next step depends on

Files and folders are written beside their place and renamed when they are complete, so that a process killed at any
moment leaves the old or the new. Whatever is opened was perhaps made by somebody else: errors name file and field.
"""

import contextlib
import json
import math
import os
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lora
import models
import parallel
from plumbing import methods
from plumbing.tokenizer import Tokenizer, load_tokenizer

STATE = "train_state.json"

# ---------------------------------------------------------------------------------------------------- whole files


@contextlib.contextmanager
def whole_directory(target: Path):
    """A folder beside `target`, to be filled; it is on the disk, under its final name, when the block ends without an
    error, and gone otherwise. What stood at `target` before is replaced."""
    partial = target.with_name(f".writing-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in [*partial.iterdir(), partial]:
            sync(file)
        if target.exists():
            remove(target)
        os.replace(partial, target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(file: Path, text: str) -> None:
    """A text file, whole or not at all."""
    partial = file.with_name(f".writing-{file.name}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, file)


def write_json(file: Path, value) -> None:
    write_whole(file, json.dumps(value, indent=2, sort_keys=True) + "\n")


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a rename never outlives what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(directory: Path) -> None:
    doomed = directory.with_name(f".deleting-{directory.name}")
    os.replace(directory, doomed)
    shutil.rmtree(doomed)


def read_json(file: Path) -> dict:
    """Raises OSError when the file is absent, ValueError when it holds no JSON object."""
    if not file.is_file():
        raise OSError(f"{file}: missing")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


# ---------------------------------------------------------------------------------------------------- tensors

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def local_path(path_or_hub_id: str, patterns=CHECKPOINT_FILES, revision: str | None = None) -> Path:
    """A local directory (of a run: its final or newest checkpoint), or a hub repository fetched into the hub's cache.

    Downloads are resumed. Raises OSError saying what was tried.
    """
    directory = Path(path_or_hub_id)
    if directory.is_dir() and not (directory / "config.json").is_file():
        runs = [file.parent for file in directory.glob("checkpoint-*/config.json")]
        return max(runs, key=progress_of, default=directory)
    if directory.is_dir():
        return directory
    if directory.is_absolute() or str(path_or_hub_id).count("/") != 1 or str(path_or_hub_id).startswith("."):
        raise OSError(f"{path_or_hub_id}: no such directory, and not of the form owner/name of a hub repository")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=list(patterns), revision=revision))
    except Exception as e:  # the hub client raises a dozen unrelated classes
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise OSError(f"{path_or_hub_id}: no such directory, and the hub did not deliver it ({reason})") from e


def progress_of(checkpoint: Path) -> float:
    """How far a checkpoint-* directory of a run is trained; -1 where nothing tells."""
    try:
        return step_of(checkpoint)
    except (OSError, ValueError):
        name = checkpoint.name.removeprefix("checkpoint-")
        return math.inf if name == "final" else int(name) if name.isdecimal() else -1


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it. Raises OSError for missing, ValueError for corrupt files."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        return indexed_files(index, "a safetensors index")
    if not single.is_file():
        raise OSError(f"{directory}: no {single.name} and no {index.name}; convert.py reads other formats")
    with open_tensors(single) as f:
        return {name: single for name in f.keys()}  # noqa: SIM118


def indexed_files(index: Path, what: str) -> dict[str, Path]:
    """Tensor name -> the file beside `index` that holds it. Raises ValueError / OSError; `what` is for the message."""
    try:
        files = {name: index.parent / file for name, file in read_json(index)["weight_map"].items()}
    except (LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"{index}: not {what} ({e})") from None
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise OSError(f"{file}: missing, although {index.name} names it")
    return files


def open_tensors(file: Path):
    """safetensors' memory map of one file, with errors that name it."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: truncated or corrupt safetensors file ({e})") from None


def read_tensor(file: Path, name: str, shape) -> Tensor:
    """One tensor of a safetensors file, in its memory map. Raises ValueError when it is absent or has another shape."""
    with open_tensors(file) as f:
        if name not in f.keys():  # noqa: SIM118
            raise ValueError(f"{file}: tensor {name!r} is missing, although the index names this file for it")
        tensor = f.get_tensor(name)
    if tensor.shape != shape:
        raise ValueError(f"{file}: tensor {name!r} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
    return tensor


# ---------------------------------------------------------------------------------------------------- names, config

# (beginning of our name, or a part of it that starts with a dot; the same on disk), for families where they differ
DISK_NAMES = {
    "modernbert": [("model.head.", "head.")],
    "bert": [("model.transform.", "cls.predictions.transform."), ("model.", "bert.")],
    "roberta": [
        ("model.transform.dense.", "lm_head.dense."), ("model.transform.LayerNorm.", "lm_head.layer_norm."),
        ("model.", "roberta."),
    ],
    "llada original": [
        ("model.embed_tokens.", "model.transformer.wte."), ("model.norm.", "model.transformer.ln_f."),
        ("lm_head.", "model.transformer.ff_out."), ("model.layers.", "model.transformer.blocks."),
        (".self_attn.q_proj.", ".q_proj."), (".self_attn.k_proj.", ".k_proj."), (".self_attn.v_proj.", ".v_proj."),
        (".self_attn.o_proj.", ".attn_out."), (".input_layernorm.", ".attn_norm."),
        (".post_attention_layernorm.", ".ff_norm."), (".mlp.gate_proj.", ".ff_proj."), (".mlp.up_proj.", ".up_proj."),
        (".mlp.down_proj.", ".ff_out."),
    ],
}  # fmt: skip
LLADA_NAMES = DISK_NAMES["llada original"]


def naming(config: models.Config) -> str:
    """The key of `disk_name` for a checkpoint with this config. LLaDA's own speak of d_model."""
    return "llada original" if "d_model" in config.other else config.model_type


def disk_name(kind: str, name: str) -> str:
    """Our parameter name -> its name in a checkpoint."""
    return rename(name, DISK_NAMES.get(kind, []))


def rename(name: str, pairs) -> str:
    """Replaces beginnings of a name, and inner parts (they start with a dot): pairs of (old, new)."""
    for old, new in pairs:
        if name.startswith(old) or (old.startswith(".") and old in name):
            name = name.replace(old, new, 1)
    return name


def read_config(directory: Path) -> models.Config:
    """config.json with its gaps filled. Raises OSError / ValueError naming the file and the field."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise OSError(f"{file}: missing; a checkpoint directory holds config.json, safetensors and tokenizer files")
    try:
        return complete_config(read_json(file))
    except ValueError as e:
        raise ValueError(f"{file}: {str(e).removeprefix(f'{file}: ')}") from None


KINDS = {  # type of a field of models.Config -> what its value must be, in words and as a test
    int: ("a positive integer", lambda v: type(v) is int and v > 0),
    float: ("a number above 0", lambda v: type(v) in (int, float) and 0 < v < math.inf),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    dict: ("an object", lambda v: isinstance(v, dict)),
    str: ("text", lambda v: isinstance(v, str)),
    int | None: ("a positive integer", lambda v: v is None or (type(v) is int and v > 0)),
    dict | None: ("an object", lambda v: v is None or isinstance(v, dict)),
    list[str] | None: ("a list of texts", lambda v: v is None or (isinstance(v, list) and {*map(type, v)} <= {str})),
}
# Settings under which a checkpoint would load, but compute something else than its authors' code.
REQUIRED = {
    "position_embedding_type": ("absolute",), "use_sliding_window": (False,), "is_decoder": (False,),
    "partial_rotary_factor": (1.0,), "activation_type": ("silu",), "block_type": ("llama",),
    "layer_norm_type": ("rms",), "alibi": (False,), "include_bias": (False,), "include_qkv_bias": (False,),
    "scale_logits": (False,), "input_emb_norm": (False,), "attention_layer_norm": (False,), "rope": (True,),
}  # fmt: skip


def complete_config(raw: dict) -> models.Config:
    """A Hugging Face config.json as the Config of its family. Raises ValueError for what is missing, of the wrong type
    or not supported."""
    kind = str(raw.get("model_type", "")).lower().removeprefix("editflow-")
    if kind not in models.FAMILIES:
        known = ", ".join(models.FAMILIES)
        raise ValueError(f"model_type {raw.get('model_type')!r} is not supported; these are: {known}")
    backbone, family, defaults = models.FAMILIES[kind]
    is_decoder = backbone is models.Decoder
    act = ("silu" if is_decoder else "gelu",)
    for name, values in (REQUIRED | {"hidden_act": act, "hidden_activation": act}).items():
        if raw.get(name) is not None and raw[name] not in values:
            raise ValueError(f"{name} {raw[name]!r} is not supported for {kind}, only {values[0]!r}")
    raw = raw | (llada_config(raw) if "d_model" in raw else {}) | rope_fields(raw)
    if kind == "modernbert" and "decoder_bias" in raw:
        raw = {"vocab_bias": raw["decoder_bias"]} | raw
    names = {field.name for field in fields(family)} - {"other"}
    values = defaults | {name: value for name, value in raw.items() if name in names} | {"model_type": kind}
    for field in fields(family):
        what, fits = KINDS[field.type]
        value = values.get(field.name, field.default)
        is_given = field.name in values or field.name in ("vocab_size", "hidden_size", "num_hidden_layers",
                                                          "num_attention_heads", "intermediate_size")  # fmt: skip
        if is_given and not fits(value) and not (field.name == "pad_token_id" and value == 0):
            found = repr(values.get(field.name))
            raise ValueError(f"field {field.name!r} must be {what}, found {found}")
    if values["hidden_size"] % values["num_attention_heads"] and not values.get("head_dim"):
        heads = f"num_attention_heads {values['num_attention_heads']}"
        raise ValueError(f"hidden_size {values['hidden_size']} must be a multiple of {heads}")
    if kind in ("llama", "qwen3"):  # their one switch is for all four projections
        values["attention_out_bias"] = values.get("attention_bias", False)
    other = {name: value for name, value in raw.items() if name not in names}
    if str(raw["model_type"]).lower() != kind:
        other["model_type"] = raw["model_type"]  # written back as it was
    config = family(**values, other=other)
    config.nanoedit = dict(config.nanoedit)
    check_nanoedit(config.nanoedit)
    if is_decoder:
        check_decoder(config)
    return config


def check_nanoedit(stored: dict) -> None:
    """Raises ValueError where the block is not what the methods of this repository write."""
    if "method" in stored:
        methods.get(stored["method"])
    for name in ("schedule", "x0_sampler"):
        if not isinstance(stored.get(name, ""), str):
            raise ValueError(f"{name} must be text, found {stored[name]!r}")


def check_decoder(c: models.DecoderConfig) -> None:
    if c.head_dim % 2:
        raise ValueError(f"head_dim {c.head_dim} must be even: positions turn pairs of numbers")
    if c.num_attention_heads % c.num_key_value_heads:
        groups = f"num_key_value_heads {c.num_key_value_heads}"
        raise ValueError(f"num_attention_heads {c.num_attention_heads} must be a multiple of {groups}")
    try:
        models.rotary(torch.zeros(1), c.head_dim, c.rope_theta, c.rope_scaling)
    except (LookupError, TypeError, ZeroDivisionError):
        raise ValueError(f"rope_scaling {c.rope_scaling!r} lacks a number of its type") from None


def rope_fields(raw: dict) -> dict:
    """theta and scaling out of the `rope_parameters` that transformers 5 writes; ModernBERT has two of them."""
    rope = raw.get("rope_parameters") or {}
    parts = [rope.get(key, {}) for key in ("full_attention", "sliding_attention")] if isinstance(rope, dict) else [rope]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"field 'rope_parameters' must be an object, found {rope!r}")
    found = {"rope_theta": rope["rope_theta"], "rope_scaling": rope} if "rope_theta" in rope else {}
    if "full_attention" in rope:
        found["global_rope_theta"], found["local_rope_theta"] = (part.get("rope_theta") for part in parts)
    return found


def llada_config(raw: dict) -> dict:
    """The fields of LLaDA's own config under the names of Llama's."""
    heads = raw.get("n_heads")
    return {
        "vocab_size": raw.get("embedding_size") or raw.get("vocab_size"),
        "hidden_size": raw["d_model"],
        "num_hidden_layers": raw.get("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("n_kv_heads") or (1 if raw.get("multi_query_attention") else heads),
        "intermediate_size": raw.get("mlp_hidden_size") or raw.get("mlp_ratio", 4) * raw["d_model"],
        "max_position_embeddings": raw.get("max_sequence_length", 4096),
        "rope_theta": raw.get("rope_theta", 500000.0),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-5),
        "tie_word_embeddings": bool(raw.get("weight_tying", False)),
    }


def config_as_json(config: models.Config) -> dict:
    return {name: value for name, value in vars(config).items() if name != "other"} | config.other


# ---------------------------------------------------------------------------------------------------- models


def build(config: models.Config) -> nn.Module:
    """The model of a configuration: its backbone under the heads of its method."""
    config.nanoedit = methods.complete(config.nanoedit)
    head_sizes = config.hidden_size, config.vocab_size, config.vocab_bias
    model = methods.get(config.nanoedit["method"]).Model(models.backbone(config), *head_sizes, config.nanoedit)
    model.config = config
    return model


def new_model(method: str, preset: str, vocab_size: int, seed: int = 0, **stored) -> nn.Module:
    """A new model with random weights. preset: a key of models.PRESETS. stored: what it is to remember."""
    sizes = {"model_type": "llama", "vocab_size": vocab_size} | preset_sizes(preset)
    model = build(complete_config(sizes | {"nanoedit": {"method": method} | stored}))
    init_weights(model, torch.Generator().manual_seed(seed))
    return model


def init_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights for backbone and heads, in place."""
    models.init_weights(model, generator)
    model.init_heads(generator)


def preset_sizes(preset: str) -> dict:
    if preset not in models.PRESETS:
        raise ValueError(f"--preset {preset!r} is not known; choose from {', '.join(models.PRESETS)}")
    return models.PRESETS[preset]


def load(path: str, device="cpu", dtype=torch.float32, method: str | None = None) -> nn.Module:
    """A checkpoint of any method, from a directory or a hub id. The model is built on the meta device and its tensors
    are copied one by one: in the memory map they lie at odd addresses, where the kernels of some processors round
    differently, and a run would not go on exactly as it began. LoRA adapters are merged into their base model.

    method: when given, a checkpoint of another method is refused. Raises OSError / ValueError naming the file.
    """
    directory = local_path(path)
    if (directory / "adapter_config.json").is_file():
        return lora.merge(load_adapters(directory, device, dtype, method))
    config, files = read_config(directory), tensor_files(directory)
    found = config.nanoedit.get("method") or methods.recognise(files)
    if found is None:
        raise ValueError(
            f"{directory}: no heads of a method in this checkpoint; add them with "
            f"`convert.py --to {method or ' or '.join(methods.METHODS)} --model_name_or_path {path} --output_dir OUT`"
        )
    if method and found != method:
        hint = "convert.py makes one from the other"
        raise ValueError(f"{directory}: this is a checkpoint of method {found!r}, but {method!r} is asked for; {hint}")
    config.nanoedit["method"] = found
    with torch.device("meta"):
        model = build(config)
    state = {}
    for name, parameter in model.state_dict().items():
        source = disk_name(naming(config), name)
        if source not in files:
            raise ValueError(f"{directory}: tensor {source!r} is missing; `convert.py --to {found}` adds missing heads")
        state[name] = read_tensor(files[source], source, parameter.shape).to(device, dtype, copy=True)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def check_rows(model: nn.Module, tokenizer, directory) -> None:
    """Raises ValueError where the tokenizer of a checkpoint knows more tokens than its model has rows."""
    known, rows = tokenizer.vocab_size, model.config.vocab_size
    if known > rows:
        raise ValueError(f"{directory}: the tokenizer has {known} tokens, but the model only {rows} rows for them")


def open_for_inference(directory: Path, device: str, bf16: bool) -> tuple[nn.Module, Tokenizer]:
    """A checkpoint's model and tokenizer. Raises OSError / ValueError, also where the two do not belong together."""
    model = load(directory, device, torch.bfloat16 if bf16 else torch.float32).eval()
    tokenizer = load_tokenizer(directory)
    check_rows(model, tokenizer, directory)
    return model, tokenizer


def save(model: nn.Module, directory: str, state: dict | None = None) -> None:
    """config.json and model.safetensors. state: the full state dict where the model itself holds only shards of it."""
    directory, kind = Path(directory), naming(model.config)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "model.safetensors", state or model.state_dict(), lambda name: disk_name(kind, name))
    write_json(directory / "config.json", config_as_json(model.config))


def write_tensors(file: Path, tensors: dict[str, Tensor], name_on_disk=lambda name: name) -> None:
    """A safetensors file, whole or not at all."""
    partial = file.with_name(f".writing-{file.name}")
    tensors = {name_on_disk(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, file)


# ---------------------------------------------------------------------------------------------------- adapters

PREFIX = "base_model.model."  # of every name in a PEFT file
ADAPTER_FIELDS = {  # of adapter_config.json, those read again: what each must be
    "r": ("a whole number from 1 to 65536", lambda r: type(r) is int and 1 <= r <= 65536),
    "lora_alpha": ("a number", lambda alpha: type(alpha) in (int, float) and math.isfinite(alpha)),
    "lora_dropout": ("a number from 0 to 1", lambda p: type(p) in (int, float) and 0 <= p <= 1),
    "base_model_name_or_path": ("a directory or hub id", lambda base: isinstance(base, str) and base.strip()),
}


def is_adapted(name: str) -> bool:
    """Whether a tensor is saved with adapters: they themselves, and everything outside the backbone."""
    return not name.startswith("model.") or ".lora_" in name


def adapter_names(model: nn.Module) -> dict[str, str]:
    """Our names of the adapters' tensors -> their names in PEFT's file."""
    kind = naming(model.config)
    names = [f"{name}.{part}.weight" for name in lora.adapted_layers(model) for part in ("lora_A", "lora_B")]
    return {name: PREFIX + disk_name(kind, name) for name in names}


def save_adapters(model: nn.Module, directory: str, base: str, state: dict | None = None) -> None:
    """Adapters and heads alone. base: the checkpoint they belong to, a directory or a hub id.

    state: the full state dict where the model itself holds only shards of it.
    """
    directory, state, names = Path(directory), state or model.state_dict(), adapter_names(model)
    directory.mkdir(parents=True, exist_ok=True)
    config = model.lora | {
        "peft_type": "LORA",
        "base_model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else base,
        "target_modules": sorted({name.rpartition(".")[2] for name in lora.adapted_layers(model)}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_tensors(directory / "adapter_model.safetensors", {names[name]: state[name] for name in names})
    write_tensors(directory / "heads.safetensors", {n: t for n, t in state.items() if not n.startswith("model.")})
    write_json(directory / "adapter_config.json", config)
    write_json(directory / "config.json", config_as_json(model.config))


def read_adapter_config(directory: Path) -> dict:
    """adapter_config.json. Raises ValueError naming the file and the field."""
    file = directory / "adapter_config.json"
    config = {"lora_dropout": 0.0} | read_json(file)
    for field, (what, fits) in ADAPTER_FIELDS.items():
        if field not in config or not fits(config[field]):
            raise ValueError(f"{file}: field {field!r} must be {what}, found {str(config.get(field))[:80]!r}")
    return config


def check_base(base: Path, directory: Path) -> None:
    """Raises ValueError where the base model of adapters holds adapters, too."""
    if (base / "adapter_config.json").is_file():
        raise ValueError(f"{directory}/adapter_config.json: the base model {base} holds adapters itself")


def load_adapters(directory: str, device="cpu", dtype=torch.float32, method=None, four_bit=False) -> nn.Module:
    """The base model of a directory that `save_adapters` wrote, with its adapters, unmerged."""
    directory = Path(directory)
    settings = read_adapter_config(directory)
    base = local_path(settings["base_model_name_or_path"])
    check_base(base, directory)
    model = load(base, device, dtype, method)
    model.config = read_config(directory)
    lora.add(model, settings["r"], settings["lora_alpha"], settings["lora_dropout"], four_bit)
    model.base = settings["base_model_name_or_path"]
    heads, names = directory / "heads.safetensors", adapter_names(model)
    with open_tensors(heads) as f:
        if "unigram" in f.keys():  # noqa: SIM118 (a run that starts from `uniform` may adapt a model that does not)
            model.register_buffer("unigram", torch.ones(model.config.vocab_size, device=device))
    state = model.state_dict()
    with torch.no_grad():
        for name in filter(is_adapted, state):
            file = directory / "adapter_model.safetensors" if name in names else heads
            state[name].copy_(read_tensor(file, names.get(name, name), state[name].shape))
    return model


# ---------------------------------------------------------------------------------------------------- runs


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [file.parent for file in out.glob(f"checkpoint-*/{STATE}")]
    return [path for _, path in sorted((step_of(path), path) for path in found)]


def step_of(checkpoint: Path) -> int:
    """The step at which a complete checkpoint was written. Raises ValueError naming its train_state.json."""
    state = read_json(checkpoint / STATE)
    step = state.get("step")
    if type(step) is not int or step < 0 or not isinstance(state.get("args"), dict):
        raise ValueError(f"{checkpoint / STATE}: no step and args of a run in it; delete {checkpoint} to go on")
    return step


def prepare_output(args, ranks) -> tuple[Path, Path | None]:
    """The output directory, proven writable before anything long starts, and the checkpoint to continue from."""
    out = Path(args.output_dir)
    if ranks.is_main:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / ".writable").touch()
            if (out / "metrics.jsonl").is_dir():
                raise OSError("metrics.jsonl is a folder")
            for rest in [out / ".writable", *out.glob(".writing-*"), *out.glob(".deleting-*")]:  # of a run killed
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        except OSError as e:
            raise OSError(f"--output_dir {out}: cannot be written to ({e.strerror or e}); choose another") from None
    ranks.barrier()
    found = [] if args.overwrite_output_dir else [str(path) for path in checkpoints(out)]
    if any(other != found for other in ranks.gather(found)):
        raise ValueError(f"--output_dir {out}: processes see different checkpoints in it; it must be on a shared disk")
    return out, Path(found[-1]) if found else None


def clear_output(out: Path, args, ranks) -> None:
    """--overwrite_output_dir, once everything that the new run needs has been read."""
    if args.overwrite_output_dir and ranks.is_main:
        for old in out.glob("checkpoint-*"):
            remove(old)
        (out / "metrics.jsonl").unlink(missing_ok=True)
    ranks.barrier()


def save_run(out: Path, name: str, model: parallel.ParallelModel, tokenizer, optimizer, state: dict, args) -> Path:
    """OUT/checkpoint-NAME, by all processes together; rank 0 writes. state: for train_state.json, with the step.

    Raises OSError when it cannot be written; older checkpoints are then as they were.
    """
    target, ranks = out / f"checkpoint-{name}", model.ranks
    is_saved = (target / STATE).is_file() and step_of(target) == state["step"]
    if ranks.all_reduce_max(is_saved):  # a run that was stopped where it had just saved
        return target
    wanted = {n: t for n, t in model.plain.state_dict().items() if not args.lora or is_adapted(n)}
    weights = parallel.gather(wanted, ranks)
    moments = parallel.gather(parallel.moments(model.plain, optimizer), ranks)
    if ranks.is_main:
        try:
            if target.exists():  # the end of a shorter run becomes a checkpoint like any other
                older = out / f"checkpoint-{step_of(target)}"
                remove(target) if older.exists() else os.replace(target, older)
            with whole_directory(target) as partial:
                if args.lora:
                    save_adapters(model.plain, partial, model.plain.base, weights)
                else:
                    save(model.plain, partial, weights)
                tokenizer.save(partial)
                save_file(moments, partial / "optimizer.safetensors")
                write_json(partial / STATE, state | {"args": vars(args)})
        except (OSError, SafetensorError) as e:
            hint = f"{resume_hint(args)} goes on from the last checkpoint"
            raise OSError(f"{target}: cannot be saved ({e}); {hint}") from e
        for old in checkpoints(out)[: -args.save_total_limit]:
            remove(old)
    ranks.barrier()
    return target


def restore(model: nn.Module, optimizer, checkpoint: Path) -> None:
    """The optimizer as it was when the checkpoint of a run was written."""
    with open_tensors(checkpoint / "optimizer.safetensors") as f:
        parallel.restore_moments(model, optimizer, {name: f.get_tensor(name).clone() for name in f.keys()})  # noqa: SIM118


def resume_hint(args) -> str:
    """How to go on from a checkpoint, in words."""
    return "the same command" + " without --overwrite_output_dir" * args.overwrite_output_dir


def trim_metrics(file: Path, step: int) -> list[dict]:
    """Drops lines that an interrupted run logged after its last checkpoint: they will be logged again. Returns the
    others."""
    if not file.is_file():
        return []
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["step"] <= step]
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise ValueError(f"{file}: not the metrics of a run ({e}); move it away to go on without") from None
    try:
        write_whole(file, "".join(json.dumps(line) + "\n" for line in kept))
    except OSError as e:
        raise OSError(f"{file}: cannot be written to ({e.strerror or e})") from e
    return kept
