"""What models.py promises, against plain attention, complex-number RoPE, a full softmax, and `transformers`."""

import cmath
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import models
from ragged import Ragged

V, D = 97, 32
SIZES = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
PADS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

# model_type -> (the class in transformers, what its config says beyond SIZES)
FAMILIES = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "llama, rope scaling": ("LlamaForCausalLM", {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}),
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, biases": (
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "modernbert": ("ModernBertForMaskedLM", PADS | {"local_attention": 16}),
    "modernbert, every second": (
        "ModernBertForMaskedLM",
        PADS | {"local_attention": 6, "global_attn_every_n_layers": 2},
    ),
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForMaskedLM", {}),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(*lengths, seed=0):
    """Random token ids, none of them special."""
    rng = generator(seed)
    return Ragged.pack([torch.randint(5, V, (n,), generator=rng) for n in lengths])


def small(method="editflow", seed=0, **nanoedit):
    """A model with random weights in every tensor, so that no agreement can be an accident of zeros."""
    model = models.build(method, "tiny", V, seed=seed, **nanoedit)
    rng = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * p.shape[-1] ** -0.5)
    return model


# ---------------------------------------------------------------------------------------------------- attention


def plain_attention(q, k, v, lengths, window):
    """[T, T] scores over the whole row in float64, with everything outside the own sequence and window at -inf."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position = torch.arange(len(q))
    visible = owner[:, None] == owner
    if window is not None:
        visible &= (position[:, None] - position).abs() <= window
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 17, 33]), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    window=st.sampled_from([None, 0, 1, 4, 100]),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_attention_and_its_gradient_equal_plain_masked_attention(lengths, heads, window, padded, seed):
    rng, T = generator(seed), sum(lengths)
    q, k, v = (torch.randn(T, h, 8, generator=rng, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    target = torch.randn(T, heads[0], 8, generator=rng)
    x = Ragged.from_lengths(torch.zeros(T, dtype=torch.int64), torch.tensor(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "SHORT", 192 if padded else 0)
        out = models.attend(q, k, v, x.cu_seqlens, x.max_seqlen, window)
    expected = plain_attention(q, k, v, lengths, window)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=0)
    grads = torch.autograd.grad((out * target).sum(), (q, k, v))
    for ours, theirs in zip(grads, torch.autograd.grad((expected * target).sum(), (q, k, v))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("short", [0, 192])
def test_attention_never_looks_into_a_neighbour(short, monkeypatch):
    monkeypatch.setattr(models, "SHORT", short)
    x = Ragged.from_lengths(torch.zeros(9, dtype=torch.int64), torch.tensor([4, 5]))
    q, k, v = torch.randn(3, 9, 2, 8, generator=generator())
    before = models.attend(q, k, v, x.cu_seqlens, x.max_seqlen)
    v[4:] = math.nan
    after = models.attend(q, k, v, x.cu_seqlens, x.max_seqlen)
    assert torch.equal(before[:4], after[:4]) or short, "padding rows may not matter either"
    assert not after[:4].isnan().any()
    assert after[4:].isnan().all()


# ---------------------------------------------------------------------------------------------------- RoPE


def plain_frequencies(head_dim, theta, scaling):
    """One frequency at a time, from the published description of each scaling."""
    frequencies = []
    for i in range(head_dim // 2):
        f = theta ** (-2 * i / head_dim)
        wavelength = 2 * math.pi / f
        kind = scaling.get("rope_type", scaling.get("type")) if scaling else None
        if kind == "linear":
            f /= scaling["factor"]
        elif kind == "llama3":
            original = scaling["original_max_position_embeddings"]
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if wavelength > original / low:
                f /= scaling["factor"]
            elif wavelength > original / high:
                smooth = (original / wavelength - low) / (high - low)
                f = (1 - smooth) * f / scaling["factor"] + smooth * f
        frequencies.append(f)
    return frequencies


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}, {"type": "linear", "factor": 4.0}, LLAMA3])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_turns_complex_numbers(scaling, theta):
    x, hd = batch(40, 1, 60), 16
    q = torch.randn(101, 2, hd, generator=generator())
    ours = models.rotate(q, *models.rotary(x.positions, hd, theta, scaling))
    frequencies = plain_frequencies(hd, theta, scaling)
    for row, position in enumerate([*range(40), 0, *range(60)]):
        for i, f in enumerate(frequencies):
            number = complex(q[row, 1, i], q[row, 1, i + hd // 2]) * cmath.exp(1j * position * f)
            assert abs(complex(ours[row, 1, i], ours[row, 1, i + hd // 2]) - number) < 2e-5


def test_unknown_rope_scaling_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'yarn' is not supported \(default, linear, llama3 are\)"):
        models.rotary(torch.arange(3), 8, 1e4, {"rope_type": "yarn"})


# ---------------------------------------------------------------------------------------------------- backbones


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, tmp_path_factory):
    """(their model, our backbone with the same weights read from their files, their output matrix and bias)"""
    import transformers

    name, extra = FAMILIES[request.param]
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(getattr(transformers, name).config_class(**SIZES | extra)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            nn.init.normal_(p, std=0.3)
    directory = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(directory)

    config = models.complete_config(models.read_config(directory))
    backbone = models.ARCHITECTURES[config.model_type][0](config)
    files = models.tensor_files(directory)
    names = {name: models.disk_name(config.model_type, f"model.{name}") for name in backbone.state_dict()}
    backbone.load_state_dict(
        {n: models.read_tensor(files[names[n]], names[n], p.shape) for n, p in backbone.state_dict().items()}
    )
    unread = set(files) - set(names.values())
    assert unread <= {"lm_head.weight", "decoder.bias", "cls.predictions.bias", "lm_head.bias"}, "nothing left over"
    return theirs, backbone


def padded_outputs(theirs, x):
    """transformers on a padded rectangle with every token of a sequence visible to every other.

    Returns what enters the output matrix, and the logits, [T, D] and [T, V]. Causal models get a 4-D mask, which they
    use as it is.
    """
    B, L = len(x), x.max_seqlen
    real = torch.arange(L) < x.lengths[:, None]
    ids = torch.full((B, L), theirs.config.pad_token_id or 0)
    ids[real] = x.ids
    is_causal = type(theirs).__name__.endswith("CausalLM")
    mask = real[:, None, None].expand(B, 1, L, L) if is_causal else real
    seen = []
    hook = theirs.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = theirs(input_ids=ids, attention_mask=mask).logits
    hook.remove()
    return seen[0][real], logits[real]


LENGTHS = (40, 1, 3, 61, 18)  # the local windows reach 8 and 3 tokens to each side


@pytest.mark.parametrize("short", [192, 0], ids=["padded softmax", "one call per sequence"])
def test_ragged_equals_padded_transformers(family, short, monkeypatch):
    monkeypatch.setattr(models, "SHORT", short)
    theirs, backbone = family
    x = batch(*LENGTHS)
    hidden = backbone(x)
    their_hidden, their_logits = padded_outputs(theirs, x)
    torch.testing.assert_close(hidden, their_hidden, atol=1e-5, rtol=0)
    head = theirs.get_output_embeddings()
    torch.testing.assert_close(F.linear(hidden, head.weight, head.bias), their_logits, atol=1e-5, rtol=0)

    target = torch.randn(hidden.shape, generator=generator()) / len(x.ids)
    theirs.zero_grad(), backbone.zero_grad()
    (hidden * target).sum().backward()
    (their_hidden * target).sum().backward()
    kind = backbone.config.model_type
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in backbone.named_parameters():
        torch.testing.assert_close(p.grad, gradients[models.disk_name(kind, f"model.{name}")], atol=1e-5, rtol=0)


def test_a_sequence_comes_out_the_same_alone_and_in_company(family):
    backbone = family[1]
    x = batch(*LENGTHS)
    together = backbone(x)
    alone = torch.cat([backbone(Ragged.pack([ids])) for ids in x.unpack()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_every_token_sees_both_ways(family):
    backbone = family[1]
    x = batch(6)
    h = backbone(x)
    changed = Ragged(x.ids.clone(), x.cu_seqlens, x.max_seqlen)
    changed.ids[5] = 7
    assert (backbone(changed) - h)[0].abs().max() > 1e-4
    changed.ids[5], changed.ids[0] = x.ids[5], 7
    assert (backbone(changed) - h)[5].abs().max() > 1e-4


def test_gradient_checkpointing_changes_no_gradient(family):
    backbone = family[1]
    gradients = []
    for on in (False, True):
        backbone.gradient_checkpointing = on
        backbone.zero_grad()
        backbone(batch(9, 20)).square().sum().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    backbone.gradient_checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_gradient_checkpointing_keeps_less_for_the_backward_pass():
    backbone, kept = small().model, []
    for backbone.gradient_checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            backbone(batch(50, 50))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("family", ["bert", "roberta"], indirect=True)
def test_absolute_positions_end_with_an_error_in_words(family):
    backbone = family[1]
    last = 128 - backbone.first_position
    backbone(batch(last))
    with pytest.raises(ValueError, match=f"{last + 1} tokens.*{last} positions"):
        backbone(batch(last + 1))


@pytest.mark.parametrize("lengths", [(5,), (63, 1), (64,), (3, 0, 70, 1)])
def test_rows_filled_up_for_bf16_are_dropped_again(lengths):
    model, x = small(time_conditioned=True), batch(*lengths)
    t = torch.linspace(0.1, 0.9, len(lengths))
    expected = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(x, t)
    assert hidden.shape == expected.shape
    assert F.cosine_similarity(hidden.float(), expected).min() > 0.995


# ---------------------------------------------------------------------------------------------------- time


def test_time_conditioning_starts_as_a_no_op_and_then_works_per_sequence():
    model = models.build("editflow", "tiny", V, time_conditioned=True)
    x = batch(5, 7)
    assert torch.equal(model(x, torch.tensor([0.1, 0.9])), model.model(x))
    (model(x, torch.tensor([0.1, 0.9])).sum()).backward()
    assert model.time_embed[2].weight.grad.abs().max() > 0, "and yet it can learn"
    nn.init.normal_(model.time_embed[2].weight, generator=generator())
    a, b = model(x, torch.tensor([0.1, 0.9])), model(x, torch.tensor([0.1, 0.3]))
    assert torch.equal(a[:5], b[:5])
    assert (a[5:] - b[5:]).abs().min(1).values.max() > 1e-4


def test_time_features_tell_close_times_apart():
    f = models.time_features(torch.linspace(0, 1, 1001))
    assert f.shape == (1001, models.TIME_FEATURES)
    assert f.dtype == torch.float32
    assert (f[1:] - f[:-1]).norm(dim=1).min() > 0.5


# ---------------------------------------------------------------------------------------------------- weighted_nll


def full_nll(hidden, head, row, token, weight):
    """All [N, V] log-probabilities, then the ones asked for."""
    return (weight * -head(hidden).log_softmax(-1)[row, token]).sum()


def nll_case(N, E, bias, seed, V=13, dtype=torch.float64):
    rng = generator(seed)
    head = nn.Linear(6, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=dtype))
    hidden = torch.randn(N, 6, generator=rng, dtype=dtype, requires_grad=True)
    row, token = (torch.randint(0, high, (E if N else 0,), generator=rng) for high in (max(N, 1), V))
    return hidden, head, row, token, torch.rand(len(row), generator=rng)


@given(
    N=st.integers(0, 90),
    E=st.sampled_from([0, 1, 5, 100]),
    bias=st.booleans(),
    chunk=st.sampled_from([1, 26, 13 * 7, 13 * 64, 1 << 24]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_weighted_nll_and_its_gradients_equal_a_full_softmax(N, E, bias, chunk, seed):
    hidden, head, row, token, weight = nll_case(N, E, bias, seed, dtype=torch.float32)
    inputs = (hidden, *head.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "CHUNK_FLOATS", chunk)
        loss = models.weighted_nll(hidden, head, row, token, weight)
    expected = full_nll(hidden, head, row, token, weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    # twice the loss: the incoming gradient counts
    ours, theirs = (torch.autograd.grad(2 * out, inputs) for out in (loss, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_weighted_nll_of_nothing_is_zero_with_zero_gradients():
    for N, E in ((0, 0), (4, 0)):
        hidden, head, row, token, weight = nll_case(N, E, True, 0)
        loss = models.weighted_nll(hidden, head, row, token, weight)
        loss.backward()
        assert loss == 0
        assert all((p.grad == 0).all() for p in (hidden, *head.parameters())), "they take part, as DDP asks"


def test_weighted_nll_survives_huge_logits():
    hidden, head, row, token, weight = nll_case(20, 30, True, 1, dtype=torch.float32)
    loss = models.weighted_nll(hidden * 1e4, head, row, token, weight)
    torch.testing.assert_close(loss, full_nll(hidden * 1e4, head, row, token, weight), rtol=1e-5, atol=0)


def test_weighted_nll_under_bf16_autocast_is_close():
    hidden, head, row, token, weight = nll_case(70, 200, True, 2, dtype=torch.float32)
    inputs = (hidden, *head.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = models.weighted_nll(hidden, head, row, token, weight)
    assert loss.dtype == torch.float32
    expected = full_nll(hidden, head, row, token, weight)
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_weighted_nll_never_holds_all_logits(monkeypatch):
    """One chunk of logits at a time: nothing that is saved or made reaches rows x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(models, "CHUNK_FLOATS", 64 * 500)
    hidden, head, row, token, weight = nll_case(640, 2000, False, 0, V=500, dtype=torch.float32)
    with Watch():
        models.weighted_nll(hidden, head, row, token, weight).backward()
    assert largest <= 64 * 500


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("method", models.METHODS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "modernbert", "bert", "roberta"])
def test_save_and_load_return_every_bit(method, kind, tmp_path):
    raw = SIZES | {"model_type": kind, "nanoedit": {"method": method, "schedule": "cubic", "x0_sampler": "empty"}}
    model = models.METHODS[method](models.complete_config(raw))
    models.init_weights(model, generator())
    models.save(model, tmp_path)
    back = models.load(tmp_path)
    assert type(back) is type(model)
    assert vars(back.config) == vars(model.config)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))
    assert all(p.requires_grad and p.device.type == "cpu" for p in back.parameters())
    x = batch(5, 3)
    assert torch.equal(back(x), model(x))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_time_embedding_and_unigram_frequencies_are_part_of_a_checkpoint(tmp_path):
    model = small(time_conditioned=True, x0_sampler="uniform[length:5]")
    model.set_unigram(torch.arange(V) / sum(range(V)))
    models.save(model, tmp_path)
    back = models.load(tmp_path)
    assert torch.equal(back.unigram, model.unigram)
    assert torch.equal(back(batch(4), torch.tensor([0.5])), model(batch(4), torch.tensor([0.5])))


def test_disk_holds_the_published_names(tmp_path):
    """Those of the family, so that other tools find the backbone."""
    raw = SIZES | {"model_type": "roberta", "nanoedit": {"method": "medlm"}}
    models.save(models.MEDLMModel(models.complete_config(raw)), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    backbone = {"roberta.embeddings.word_embeddings.weight", "roberta.encoder.layer.3.attention.self.query.bias"}
    assert backbone | {"lm_head.dense.weight", "lm_head.layer_norm.bias"} <= names


def test_saving_again_replaces_and_leaves_nothing_half_written(tmp_path):
    models.save(small(seed=0), tmp_path)
    models.save(small(seed=1), tmp_path)
    assert torch.equal(models.load(tmp_path).rate_heads[0].weight, small(seed=1).rate_heads[0].weight)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_load_casts(tmp_path):
    models.save(small(), tmp_path)
    assert {p.dtype for p in models.load(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_build_depends_on_the_seed_alone_and_lists_its_presets():
    a, b, c = (models.build("medlm", "tiny", V, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    with pytest.raises(ValueError, match=r"'huge' is not known; choose from tiny, small, medium, 280m, 1.3b"):
        models.build("medlm", "huge", V)


@pytest.mark.parametrize(("preset", "millions"), [("280m", 280), ("1.3b", 1300)])
def test_the_named_sizes_are_what_they_say(preset, millions):
    """Counted as published: backbone with embeddings and one output matrix, a vocabulary of 128k."""
    with torch.device("meta"):
        raw = {"model_type": "llama", "vocab_size": 128_256, "nanoedit": {}} | models.PRESETS[preset]
        model = models.EditFlowModel(models.complete_config(raw))
    count = sum(p.numel() for p in model.model.parameters())
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
    models.save(small(), tmp_path)
    return tmp_path


def test_shards_are_read_like_one_file(checkpoint):
    split_into_shards(checkpoint)
    expected, state = small().state_dict(), models.load(checkpoint).state_dict()
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
    return "config.json: not valid JSON"


def damage_config_not_utf8(d):
    (d / "config.json").write_bytes(b'{"a": "\xff"}')
    return "config.json: not valid JSON"


def damage_config_is_a_list(d):
    (d / "config.json").write_text("[]")
    return "config.json: expected a JSON object, found list"


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
    return "no model.safetensors"


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
    return r"model.safetensors: tensor 'model.norm.weight' has shape \[5\], config.json asks for \[128\]"


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
    return f"{files[0].name}: tensor '.*' is missing, although the index names this file"


def damage_index_not_json(d):
    split_into_shards(d)
    (d / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json: not a safetensors index"


def damage_index_of_another_kind(d):
    split_into_shards(d)
    (d / "model.safetensors.index.json").write_text("[1]")
    return "model.safetensors.index.json: not a safetensors index"


def damage_no_heads(d):
    edit_config(d, nanoedit={})
    edit_tensors(d, lambda tensors: [tensors.pop(f"rate_heads.0.{p}") for p in ("weight", "bias")])
    return "no Edit Flows or ME-DLM heads in this checkpoint; add them with `convert.py --to medlm"


DAMAGES = [f for name, f in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.removeprefix("damage_"))
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(damage, checkpoint):
    expected = damage(checkpoint)
    with pytest.raises((ValueError, OSError), match=expected) as error:
        models.load(checkpoint)
    assert "\n" not in str(error.value)


@given(cut=st.integers(0, 2000), flips=st.lists(st.tuples(st.integers(0, 1999), st.integers(0, 255)), max_size=3))
@settings(max_examples=60, deadline=None)
def test_no_header_however_broken_gets_past_the_named_errors(cut, flips, tmp_path_factory):
    """safetensors' header is JSON: cut it, change bytes in it. Loading gives a model or a ValueError, nothing else."""
    directory = tmp_path_factory.getbasetemp() / "broken-header"
    if not directory.is_dir():
        models.save(small(), directory)
        (directory / "whole").write_bytes((directory / "model.safetensors").read_bytes())
    whole = bytearray((directory / "whole").read_bytes())
    for at, byte in flips:
        whole[at] = byte
    (directory / "model.safetensors").write_bytes(whole[:cut] if cut < 1000 else whole)
    try:
        models.load(directory)
    except ValueError as error:
        assert "model.safetensors" in str(error) or "is missing" in str(error)  # noqa: PT017


def test_a_checkpoint_of_the_other_method_is_refused(checkpoint):
    with pytest.raises(ValueError, match=f"{checkpoint}: .* method 'editflow', but 'medlm' is asked for"):
        models.load(checkpoint, method="medlm")
    assert models.load(checkpoint, method="editflow").config.nanoedit["method"] == "editflow"


def test_the_method_is_seen_from_the_heads_where_the_config_is_silent(checkpoint):
    edit_config(checkpoint, nanoedit={})
    assert isinstance(models.load(checkpoint), models.EditFlowModel)


def test_a_directory_that_is_not_there_is_said_to_be_missing(tmp_path):
    for path in (tmp_path / "nothing", "./nothing", "nothing"):
        with pytest.raises(OSError, match="no such directory"):
            models.load(str(path))


def test_the_output_directory_of_a_run_stands_for_its_newest_checkpoint(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-final.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert models.local_path(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-final").mkdir()
    assert models.local_path(tmp_path).name == "checkpoint-10", "not complete"
    (tmp_path / "checkpoint-final" / "config.json").write_text("{}")
    assert models.local_path(tmp_path).name == "checkpoint-final"


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
        models.load(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no model\.safetensors"):
        models.load(checkpoint)
    assert not trace.exists()
