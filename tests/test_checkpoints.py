"""What plumbing/checkpoints.py promises: every bit comes back, and what cannot be opened is one line that names it."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import editflow
import evaluate
import models
import parallel
import train
from plumbing import checkpoints, methods
from plumbing.config import complete_config, config_as_json
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
    model = checkpoints.build(complete_config(raw))
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
    checkpoints.save(checkpoints.build(complete_config(raw)), tmp_path)
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
    return "config.json: field 'hidden_size' must be a positive integer, .*found '128'"


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


# ---------------------------------------------------------------------------------------------------- data, not code


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(number, checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"][3].fill_(number))
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'model.layers.2.mlp.up_proj.weight' holds NaN"):
        checkpoints.load(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_not_cast(dtype, checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.ones(128).to(dtype)}))
    with pytest.raises(ValueError, match=r"tensor 'model.norm.weight' is none of F64, F32, F16, BF16"):
        checkpoints.load(checkpoint)


@pytest.mark.parametrize("place", ["../elsewhere/model.safetensors", "{out}/elsewhere/model.safetensors"])
def test_an_index_names_files_of_its_own_folder(place, checkpoint, tmp_path_factory):
    out = checkpoint / "in"
    checkpoints.save(small(), out)
    checkpoints.save(small(), checkpoint / "elsewhere")
    (out / "model.safetensors").unlink()
    weight_map = {"x": place.format(out=checkpoint)}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index.json: '.*model.safetensors' lies in another folder"):
        checkpoints.load(out)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "device", "nothing"])
def test_what_is_no_file_is_not_read(kind, name, checkpoint):
    (checkpoint / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(checkpoint / name)
    else:
        (checkpoint / name).symlink_to({"device": "/dev/zero", "nothing": "nowhere"}[kind])
    with pytest.raises(ValueError, match=f"{name}: a pipe, a device, or a link"):
        checkpoints.local_path(checkpoint)


def test_links_to_files_are_followed(checkpoint, tmp_path_factory):
    """The hub's cache is made of them."""
    cache = tmp_path_factory.mktemp("cache")
    for file in checkpoint.iterdir():
        (cache / file.name).symlink_to(file)
    assert checkpoints.load(cache).config == checkpoints.load(checkpoint).config


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab0.")
JSON = st.recursive(
    SCALARS | st.sampled_from([10**7, 2**40, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
)
ROPE = st.dictionaries(
    st.sampled_from("rope_theta rope_type type factor low_freq_factor full_attention".split()),  # noqa: SIM905
    st.sampled_from(["linear", "llama3", "default"]) | JSON,
)
FIELDS = [*{field: None for family in (models.DecoderConfig, models.ModernBertConfig, models.BertConfig)
            for field in vars(family(**SIZES, model_type="llama"))}]  # fmt: skip
FIELDS += ["rope_parameters", "decoder_bias", "d_model", "n_layers", "n_heads", "mlp_ratio", "weight_tying"]


@given(family=st.sampled_from(list(models.FAMILIES)), field=st.sampled_from(FIELDS), value=JSON, rope=ROPE)
@settings(max_examples=300, deadline=None)
def test_a_config_however_wrong_is_refused_or_can_be_built(family, field, value, rope):
    """Without memory, and without a loop over what it says there is."""
    raw = SIZES | {"model_type": family, "nanoedit": {"method": "editflow"}}
    try:
        config = complete_config(raw | {field: rope if "rope_" in field else value})
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    config.nanoedit.setdefault("method", "editflow")
    checkpoints.build(config, "meta")


@pytest.mark.parametrize("family", ["a2d-qwen3", "a2d-llama", "a2d-qwen2", "editflow-qwen3", "editflow-a2d-qwen3"])
def test_published_model_types(family):
    config = complete_config(SIZES | {"model_type": family})
    assert config.model_type == family.rpartition("-")[2]
    assert config_as_json(config)["model_type"] == family, "saved as it was"


def test_published_checkpoints_are_sampled_as_published(checkpoint):
    """Edit Flows' hold no settings; those of this repository hold theirs."""
    edit_config(checkpoint, nanoedit={}, model_type="editflow-llama")
    model, tokens = checkpoints.load(checkpoint), SimpleNamespace(mask_id=1, pad_id=None, del_id=None, eos_id=None)

    def settings(model, **flags):
        return methods.sampling_settings(editflow, methods.default_sampling(**flags), model, tokens)

    as_published = {"schedule": "linear", "x0_sampler": "masks[length:64]", "temperature": 0.0}
    assert as_published.items() <= vars(settings(model)).items()
    assert settings(model, temperature=0.5, x0_sampler="empty").temperature == 0.5
    assert settings(model, temperature=0.5, x0_sampler="empty").x0_sampler == "empty"
    checkpoints.save(model, checkpoint / "again")
    assert as_published.items() <= checkpoints.load(checkpoint / "again").config.nanoedit.items()
    assert settings(small()).temperature == 1.0
    assert settings(small()).schedule == "cubic"


# ---------------------------------------------------------------------------------------------------- runs

RUN = "--method editflow --dataset_args toy[train:32,test:0] --max_length 64 --logging_steps 1 --eval_strategy no"
RUN += " --per_device_train_batch_size 4 --max_steps 6 --save_steps 2"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints 2, 4 and final."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.PRESETS, "tiny", SIZES | {"num_hidden_layers": 1})
        patch.setattr(signal, "signal", lambda *_: None)
        train.main(f"{RUN} --output_dir {out}".split())
    return out


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def open_output(out: Path) -> str:
    """The checkpoint from which a run would go on."""
    args = SimpleNamespace(output_dir=out, overwrite_output_dir=False)
    with parallel.Ranks() as ranks:
        return checkpoints.prepare_output(args, ranks)[1].name


def flip(file: Path, at: float, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[int(at * (len(raw) - 1))] ^= 1 << bit
    file.write_bytes(raw)


def test_a_checkpoint_is_listed_as_sha256sum_reads_it(run):
    folder = run / "checkpoint-final"
    listed = subprocess.check_output(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, text=True).splitlines()
    assert {f"{file.name}: OK" for file in folder.iterdir()} - set(listed) == {"SHA256SUMS: OK"}


@given(number=st.integers(0, 6), at=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_one_flipped_bit_is_noticed_wherever_it_is(number, at, bit, finished, tmp_path_factory):
    checkpoint = tmp_path_factory.mktemp("flipped") / "checkpoint-final"
    shutil.copytree(finished / "checkpoint-final", checkpoint)
    assert checkpoints.damage(checkpoint) == ""
    files = sorted(checkpoint.iterdir())
    assert len(files) == 7, "config, weights, moments, state, two of the tokenizer, SHA256SUMS"
    flip(files[number], at, bit)
    assert str(checkpoint) in checkpoints.damage(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "train_state.json", "tokenizer.json"])
@pytest.mark.parametrize("how", [lambda file: flip(file, 0.9, 3), Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(name, how, run, capsys):
    for checkpoint in ("checkpoint-final", "checkpoint-4"):
        how(run / checkpoint / name)
    assert open_output(run) == "checkpoint-2"
    if how is Path.unlink and name == "train_state.json":  # a checkpoint without it was never complete
        return
    said = capsys.readouterr().err
    assert f"checkpoint-final/{name}" in said
    assert f"checkpoint-4/{name}" in said
    assert "taking the one before it" in said
    assert sorted(path.name for path in run.glob("*checkpoint-*")) == [
        "checkpoint-2", "damaged-checkpoint-4", "damaged-checkpoint-final"
    ]  # fmt: skip


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(run, monkeypatch, signals_as_before):
    before = [line for line in (run / "metrics.jsonl").read_text().splitlines()]
    flip(run / "checkpoint-final/optimizer.safetensors", 0.9, 3)
    flip(run / "checkpoint-4/model.safetensors", 0.9, 3)
    train.main(f"{RUN} --output_dir {run}".split())
    after = (run / "metrics.jsonl").read_text().splitlines()
    losses = [[json.loads(line)["loss"] for line in lines] for lines in (before, after)]
    assert losses[0] == losses[1]
    assert [path.name for path in checkpoints.checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-final"]
    assert not any(map(checkpoints.damage, checkpoints.checkpoints(run)))


def test_where_every_checkpoint_is_damaged_nothing_is_trained_anew(run):
    for checkpoint in checkpoints.checkpoints(run):
        flip(checkpoint / "model.safetensors", 0.5, 0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"checkpoint-2/model.safetensors: not as it was .* none before it"):
            open_output(run)


def test_moments_that_are_not_finite_are_refused_also_without_checksums(run, signals_as_before):
    shutil.rmtree(run / "checkpoint-final")
    (run / "checkpoint-4/SHA256SUMS").unlink()
    file = run / "checkpoint-4/optimizer.safetensors"
    moments = load_file(file)
    moments["model.norm.weight.exp_avg"][0] = float("nan")
    save_file(moments, file)
    with pytest.raises(ValueError, match=f"{file}: tensor 'model.norm.weight.exp_avg' holds NaN"):
        train.main(f"{RUN} --output_dir {run}".split())


def test_changed_data_are_said(tmp_path, capsys, monkeypatch, signals_as_before, tiny_is_even_smaller):
    file = tmp_path / "data.jsonl"
    flags = f"{RUN} --dataset_args {file} --vocab_size 300 --output_dir {tmp_path}/run"
    for stream in ("", " --streaming"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        for text, steps in (("one two", 2), ("one two", 4), ("two one", 6)):
            file.write_text("".join(json.dumps({"text": f"{text} {i:03}"}) + "\n" for i in range(64)))
            train.main(f"{flags}{stream} --max_steps {steps}".split())
            said = capsys.readouterr().err
            assert (f"{file}: not the records that the checkpoint was made with" in said) == (steps == 6), said


def test_all_checkpoints_are_kept_unless_told_otherwise(finished):
    names = [path.name for path in checkpoints.checkpoints(finished)]
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-final"]


HOLD = "import sys, time; from pathlib import Path; from plumbing import checkpoints; "
HOLD += "checkpoints.lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"


@pytest.mark.parametrize(
    ("main", "flags", "file"),
    [(train.main, f"{RUN} --max_steps 1", ".lock"), (evaluate.main, "--path RUN --task toy --limit 1", ".rank0.lock")],
)
def test_a_second_run_in_a_directory_says_who_holds_it(main, flags, file, finished, tmp_path, signals_as_before):
    root, flags = Path(train.__file__).parent, f"{flags} --output_dir {tmp_path}".replace("RUN", str(finished)).split()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / file], cwd=root, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OSError, match=f"--output_dir {tmp_path}: process {holder.pid} on .* writes to it"):
            main(flags)
        assert [file.name for file in tmp_path.iterdir()] == [file]
    finally:
        holder.kill()
        holder.wait()
    for _ in range(2):  # the lock died with its owner; and whoever holds it may take it again
        assert not main(flags)
