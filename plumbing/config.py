"""config.json of a checkpoint, and the names of its tensors: from what many tools write to the one form used here.

    read_config       config.json -> the Config of its family (models.py), every field checked; errors name the field
    config_as_json    and back again, with the fields that nothing here reads
    disk_name         our name of a parameter -> its name in a file

Whatever is wrong in it, a layer count of ten million included, must be seen before a model is made of it.
"""

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args

import torch

import models
from plumbing import methods
from plumbing.tokenizer import read_json

# ---------------------------------------------------------------------------------------------------- names

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


def naming(config: models.Config) -> str:
    """The key of `disk_name` for a checkpoint with this config. LLaDA's own speak of d_model."""
    return "llada original" if "d_model" in config.other else config.model_type


def disk_name(kind: str, name: str) -> str:
    """Our parameter name -> its name in a checkpoint."""
    for ours, theirs in DISK_NAMES.get(kind, []):
        if name.startswith(ours) or (ours.startswith(".") and ours in name):
            name = name.replace(ours, theirs, 1)
    return name


# ---------------------------------------------------------------------------------------------------- fields


def read_config(directory: Path) -> models.Config:
    """config.json with its gaps filled. Raises OSError / ValueError naming the file and the field."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise OSError(f"{file}: missing; a checkpoint directory holds config.json, safetensors and tokenizer files")
    raw = read_json(file)
    try:
        return complete_config(raw)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


MOST = 10**8  # of what is counted: the sizes of a model's matrices then stay below 2^63
KINDS = {  # type of a field -> what its value must be, in words and as a test
    int: (f"a positive integer, at most {MOST}", lambda v: type(v) is int and 0 < v <= MOST),
    float: ("a number above 0", lambda v: type(v) in (int, float) and 0 < v < 1e30),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    dict: ("an object", lambda v: isinstance(v, dict)),
    str: ("a text", lambda v: isinstance(v, str) and v.strip()),
    list[str]: ("a list of texts", lambda v: isinstance(v, list) and {*map(type, v)} <= {str}),
}
FEW = ("a positive integer, at most 4096", lambda v: type(v) is int and 0 < v <= 4096)
COUNTS = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"), FEW)
# Settings under which a checkpoint would load, but compute something else than its authors' code.
REQUIRED = {
    "position_embedding_type": "absolute", "use_sliding_window": False, "is_decoder": False,
    "partial_rotary_factor": 1.0, "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms",
    "alibi": False, "include_bias": False, "include_qkv_bias": False, "scale_logits": False, "input_emb_norm": False,
    "attention_layer_norm": False, "rope": True,
}  # fmt: skip


def check_field(name: str, value, kind) -> None:
    """Raises ValueError where the value is not of this kind, a key of KINDS or an entry like those in it."""
    what, fits = KINDS.get(kind, kind)
    if not fits(value):
        raise ValueError(f"field {name!r} must be {what}, found {str(value)[:80]!r}")


def complete_config(raw: dict) -> models.Config:
    """A Hugging Face config.json as the Config of its family. Raises ValueError for what is missing, of the wrong type
    or not supported."""
    kind = re.sub("^(editflow-|a2d-)*", "", str(raw.get("model_type", "")).lower())  # as the published system has it
    if kind not in models.FAMILIES:
        known = ", ".join(models.FAMILIES)
        raise ValueError(f"model_type {raw.get('model_type')!r} is not supported; these are: {known}")
    backbone, family, defaults = models.FAMILIES[kind]
    is_decoder = backbone is models.Decoder
    activation = "silu" if is_decoder else "gelu"
    for name, value in (REQUIRED | {"hidden_act": activation, "hidden_activation": activation}).items():
        if raw.get(name) not in (None, value):
            raise ValueError(f"{name} {raw[name]!r} is not supported for {kind}, only {value!r}")
    raw = raw | other_spellings(raw) | (llada_config(raw) if "d_model" in raw else {})
    names = {field.name for field in fields(family)} - {"model_type", "other"}
    other = {name: value for name, value in raw.items() if name not in names}
    if str(raw["model_type"]).lower() == kind:
        del other["model_type"]  # otherwise it is written back as it was
    values = {"nanoedit": {}} | defaults | {name: raw[name] for name in names & raw.keys()}
    values |= {"model_type": kind, "other": other}
    for field in fields(family):
        value = values.get(field.name)
        if value != field.default and (field.name in values or field.default is MISSING):
            kinds = get_args(field.type) or [field.type]  # of `int | None`: int
            check_field(field.name, value, COUNTS.get(field.name, kinds[0]))
    if "method" in values["nanoedit"]:
        values["nanoedit"] = methods.complete(values["nanoedit"])
    if not values.get("head_dim"):
        check_multiple(values, "hidden_size", "num_attention_heads")
    if kind in ("llama", "qwen3"):  # their one switch is for all four projections
        values["attention_out_bias"] = values.get("attention_bias", False)
    config = family(**values)
    if is_decoder:
        check_decoder(config)
    return config


def check_multiple(values: dict, name: str, factor: str) -> None:
    if values[name] % values[factor]:
        raise ValueError(f"{name} {values[name]} must be a multiple of {factor} {values[factor]}")


def check_decoder(c: models.DecoderConfig) -> None:
    check_multiple(vars(c), "num_attention_heads", "num_key_value_heads")
    if c.head_dim % 2:
        raise ValueError(f"head_dim {c.head_dim} must be even: positions turn pairs of numbers")
    try:
        cos, _ = models.rotary(torch.ones(1), c.head_dim, c.rope_theta, c.rope_scaling)
        is_broken = bool(cos.isnan().any())
    except (LookupError, TypeError, ArithmeticError):
        is_broken = True
    if is_broken:
        raise ValueError(f"rope_scaling {c.rope_scaling!r} lacks a number of its type")


def other_spellings(raw: dict) -> dict:
    """Fields under the names of `models.Config` that some versions of transformers write otherwise."""
    rope = raw.get("rope_parameters") or {}
    check_field("rope_parameters", rope, dict)
    found = {"rope_theta": rope["rope_theta"], "rope_scaling": rope} if "rope_theta" in rope else {}
    for name, part in (("global_rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention")):
        if part in rope:
            check_field(f"rope_parameters.{part}", rope[part], dict)
            found[name] = rope[part].get("rope_theta")
    return found | ({"vocab_bias": raw["decoder_bias"]} if "decoder_bias" in raw else {})


def llada_config(raw: dict) -> dict:
    """The fields of LLaDA's own config under the names of Llama's."""
    check_field("d_model", raw["d_model"], int)
    heads = raw.get("n_heads")
    return {
        "vocab_size": raw.get("embedding_size") or raw.get("vocab_size"),
        "hidden_size": raw["d_model"],
        "num_hidden_layers": raw.get("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("n_kv_heads") or (1 if raw.get("multi_query_attention") else heads),
        "intermediate_size": raw.get("mlp_hidden_size") or raw.get("mlp_ratio", 4) * raw["d_model"],
        "max_position_embeddings": raw.get("max_sequence_length", 4096),
        "tie_word_embeddings": bool(raw.get("weight_tying", False)),
    }


def config_as_json(config: models.Config) -> dict:
    return {name: value for name, value in vars(config).items() if name != "other"} | config.other


