"""What plumbing/checkpoints.py promises: every bit comes back, and what cannot be opened is one line that names it."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import editflow
import models
from plumbing import checkpoints, methods
from ragged import Ragged

V = 97
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(*lengths):
    return Ragged.pack([torch.randint(5, V, (n,), generator=generator(n)) for n in lengths])


def small(method="editflow", seed=0, **stored):
    """A model with random weights in every tensor, so that no agreement can be an accident of zeros."""
    model = checkpoints.new_model(method, "tiny", V, seed=seed, **stored)
    rng = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * p.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "modernbert", "bert", "roberta"])
def test_save_and_load_return_every_bit(method, kind, tmp_path):
    raw = SIZES | {"model_type": kind, "nanoedit": {"method": method, "schedule": "cubic", "x0_sampler": "empty"}}
    model = checkpoints.build(checkpoints.complete_config(raw))
    checkpoints.init_weights(model, generator())
    checkpoints.save(model, tmp_path)
    back = checkpoints.load(tmp_path)
    assert type(back) is type(model)
    assert vars(back.config) == vars(model.config)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))
    assert all(p.requires_grad and p.device.type == "cpu" for p in back.parameters())
    x = batch(5, 3)
    assert torch.equal(back(x), model(x))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_clock_and_unigram_frequencies_are_part_of_a_checkpoint(tmp_path):
    model = small(clock=True, x0_sampler="uniform[length:5]")
    model.unigram.copy_(torch.arange(V) / sum(range(V)))
    torch.nn.init.normal_(model.clock.weight)
    checkpoints.save(model, tmp_path)
    back = checkpoints.load(tmp_path)
    assert torch.equal(back.unigram, model.unigram)
    s = torch.tensor([0.1, 0.5, 0.9, 1.0])
    rates, expected = (m.log_rates(m.at(m(batch(4)), s), s) for m in (back, model))
    assert torch.equal(rates, expected)


@pytest.mark.parametrize("method", methods.METHODS)
def test_what_is_read_lies_at_addresses_like_those_of_new_tensors(method, tmp_path):
    """In the memory map of a file they are odd, and the kernels of some processors then round differently."""
    checkpoints.save(small(method), tmp_path)
    assert {p.data_ptr() % 64 for p in checkpoints.load(tmp_path).parameters()} == {0}


def test_disk_holds_the_published_names(tmp_path):
    """Those of the family, so that other tools find the backbone."""
    raw = SIZES | {"model_type": "roberta", "nanoedit": {"method": "medlm"}}
    checkpoints.save(checkpoints.build(checkpoints.complete_config(raw)), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    backbone = {"roberta.embeddings.word_embeddings.weight", "roberta.encoder.layer.3.attention.self.query.bias"}
    assert backbone | {"lm_head.dense.weight", "lm_head.layer_norm.bias"} <= names


def test_saving_again_replaces_and_leaves_nothing_half_written(tmp_path):
    checkpoints.save(small(seed=0), tmp_path)
    checkpoints.save(small(seed=1), tmp_path)
    assert torch.equal(checkpoints.load(tmp_path).rate_heads[0].weight, small(seed=1).rate_heads[0].weight)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_load_casts(tmp_path):
    checkpoints.save(small(), tmp_path)
    assert {p.dtype for p in checkpoints.load(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_build_depends_on_the_seed_alone_and_lists_its_presets():
    a, b, c = (checkpoints.new_model("medlm", "tiny", V, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    with pytest.raises(ValueError, match=r"'huge' is not known; choose from tiny, small, medium, 280m, 1.3b"):
        checkpoints.new_model("medlm", "huge", V)


@pytest.mark.parametrize(("preset", "millions"), [("280m", 280), ("1.3b", 1300)])
def test_the_named_sizes_are_what_they_say(preset, millions):
    """Counted as published: backbone with embeddings and one output matrix, a vocabulary of 128k."""
    with torch.device("meta"):
        backbone = models.backbone(models.DecoderConfig("llama", 128_256, **models.PRESETS[preset]))
    count = sum(p.numel() for p in backbone.parameters())
    assert 0.75 < count / 1e6 / millions < 1.25


def split_into_shards(directory, shards=2):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {name: f"model-0000{i % shards + 1}-of-0000{shards}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: tensors[n] for n, f in files.items() if f == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return sorted({directory / f for f in files.values()})


@pytest.fixture
def checkpoint(tmp_path):
    checkpoints.save(small(), tmp_path)
    return tmp_path


def test_shards_are_read_like_one_file(checkpoint):
    split_into_shards(checkpoint)
    expected, state = small().state_dict(), checkpoints.load(checkpoint).state_dict()
    assert all(torch.equal(expected[name], state[name]) for name in expected)


def edit_config(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def damage_missing_config(d):
    (d / "config.json").unlink()
    return "config.json: missing"


def damage_config_not_json(d):
    (d / "config.json").write_text("{")
    return "config.json is not JSON"


def damage_config_not_utf8(d):
    (d / "config.json").write_bytes(b'{"a": "\xff"}')
    return "config.json is not JSON"


def damage_config_is_a_list(d):
    (d / "config.json").write_text("[]")
    return "config.json must hold one JSON object"


def damage_model_type(d):
    edit_config(d, model_type="gpt2")
    return "config.json: model_type 'gpt2' is not supported; these are: llama, .*, roberta"


def damage_size(d):
    edit_config(d, hidden_size="128")
    return "config.json: field 'hidden_size' must be a positive integer, found '128'"


def damage_heads(d):
    edit_config(d, num_attention_heads=0, head_dim=None)
    return "config.json: field 'num_attention_heads' must be"


def damage_activation(d):
    edit_config(d, hidden_act="relu")
    return "config.json: hidden_act 'relu' is not supported"


def damage_no_tensors(d):
    (d / "model.safetensors").unlink()
    return "no weights; looked for model.safetensors"


def damage_empty_file(d):
    (d / "model.safetensors").write_bytes(b"")
    return "model.safetensors: truncated or corrupt"


def damage_truncated_file(d):
    file = d / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model.safetensors: truncated or corrupt"


def damage_noise(d):
    (d / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return "model.safetensors: truncated or corrupt"


def damage_missing_tensor(d):
    edit_tensors(d, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    return "tensor 'model.layers.2.mlp.up_proj.weight' is missing"


def damage_shape(d):
    edit_tensors(d, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
    return r"model.safetensors: tensor 'model.norm.weight' has shape \[5\], its config asks for \[128\]"


def damage_missing_shard(d):
    file = split_into_shards(d)[1]
    file.unlink()
    return f"{file.name}: missing, although model.safetensors.index.json names it"


def damage_truncated_shard(d):
    file = split_into_shards(d)[1]
    file.write_bytes(file.read_bytes()[:1000])
    return f"{file.name}: truncated or corrupt"


def damage_index_points_elsewhere(d):
    files = split_into_shards(d)
    index = d / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map = dict.fromkeys(weight_map, files[0].name)
    index.write_text(json.dumps({"weight_map": weight_map}))
    return f"{d}: tensor '.*' is missing"


def damage_index_not_json(d):
    split_into_shards(d)
    (d / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json is not JSON"


def damage_index_of_another_kind(d):
    split_into_shards(d)
    (d / "model.safetensors.index.json").write_text("[1]")
    return "model.safetensors.index.json must hold one JSON object"


def damage_no_heads(d):
    edit_config(d, nanoedit={})
    edit_tensors(d, lambda tensors: [tensors.pop(n) for n in list(tensors) if not n.startswith("model.")])
    return "no heads of a method in this checkpoint; add them with `convert.py --to editflow or medlm"


DAMAGES = [f for name, f in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.removeprefix("damage_"))
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(damage, checkpoint):
    expected = damage(checkpoint)
    with pytest.raises((ValueError, OSError), match=expected) as error:
        checkpoints.load(checkpoint)
    assert "\n" not in str(error.value)


@given(cut=st.integers(0, 2000), flips=st.lists(st.tuples(st.integers(0, 1999), st.integers(0, 255)), max_size=3))
@settings(max_examples=60, deadline=None)
def test_no_header_however_broken_gets_past_the_named_errors(cut, flips, tmp_path_factory):
    """safetensors' header is JSON: cut it, change bytes in it. Loading gives a model or a ValueError, nothing else."""
    directory = tmp_path_factory.getbasetemp() / "broken-header"
    if not directory.is_dir():
        checkpoints.save(small(), directory)
        (directory / "whole").write_bytes((directory / "model.safetensors").read_bytes())
    whole = bytearray((directory / "whole").read_bytes())
    for at, byte in flips:
        whole[at] = byte
    (directory / "model.safetensors").write_bytes(whole[:cut] if cut < 1000 else whole)
    try:
        checkpoints.load(directory)
    except ValueError as error:
        assert "model.safetensors" in str(error) or "is missing" in str(error)  # noqa: PT017


def test_a_checkpoint_of_the_other_method_is_refused(checkpoint):
    with pytest.raises(ValueError, match=f"{checkpoint}: .* method 'editflow', but 'medlm' is asked for"):
        checkpoints.load(checkpoint, method="medlm")
    assert checkpoints.load(checkpoint, method="editflow").config.nanoedit["method"] == "editflow"


def test_the_method_is_seen_from_the_heads_where_the_config_is_silent(checkpoint):
    edit_config(checkpoint, nanoedit={})
    assert isinstance(checkpoints.load(checkpoint), editflow.Model)


def test_a_directory_that_is_not_there_is_said_to_be_missing(tmp_path):
    for path in (tmp_path / "nothing", "./nothing", "nothing"):
        with pytest.raises(OSError, match="no such directory"):
            checkpoints.load(str(path))


def test_the_output_directory_of_a_run_stands_for_its_newest_checkpoint(tmp_path):
    steps = {"checkpoint-9": 9, "checkpoint-10": 10, "checkpoint-final": 12, "checkpoint-broken": 99}
    for name, step in steps.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_state.json").write_text(json.dumps({"step": step, "args": {}}))
    (tmp_path / "checkpoint-broken/train_state.json").unlink()
    assert checkpoints.local_path(tmp_path).name == "checkpoint-final"
    (tmp_path / "checkpoint-14").mkdir()
    assert checkpoints.local_path(tmp_path).name == "checkpoint-final", "not complete"
    (tmp_path / "checkpoint-final").rename(tmp_path / "checkpoint-12")
    assert checkpoints.local_path(tmp_path).name == "checkpoint-12"


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_nothing_in_a_checkpoint_is_unpickled(checkpoint, tmp_path_factory):
    trace = tmp_path_factory.mktemp("trace") / "was-here"
    assert pickle.loads(pickle.dumps(Bomb(trace))) is None
    assert trace.exists(), "the bomb works"
    trace.unlink()
    for name in ("pytorch_model.bin", "model.bin", "training_args.bin", "optimizer.pt", "model.safetensors"):
        (checkpoint / name).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt"):
        checkpoints.load(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no weights; looked for model\.safetensors"):
        checkpoints.load(checkpoint)
    assert not trace.exists()
