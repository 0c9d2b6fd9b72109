"""What models.py promises, against plain attention, complex-number RoPE, and `transformers`."""

import cmath
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
from plumbing import checkpoints
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
THETAS = {
    "full_attention": {"rope_type": "default", "rope_theta": 50.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
PADS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

# model_type -> (the class in transformers, what its config says beyond SIZES)
FAMILIES = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "llama, rope scaling": (
        "LlamaForCausalLM",
        {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "rms_norm_eps": 0.1},
    ),
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 0.1}),
    "qwen3, biases": (
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "modernbert": ("ModernBertForMaskedLM", PADS | {"local_attention": 16}),
    "modernbert, every second": (
        "ModernBertForMaskedLM",
        PADS | {"local_attention": 6, "global_attn_every_n_layers": 2, "norm_eps": 0.1, "rope_parameters": THETAS},
    ),
    "bert": ("BertForMaskedLM", {"layer_norm_eps": 0.1}),
    "roberta": ("RobertaForMaskedLM", {}),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(*lengths, seed=0):
    """Random token ids, none of them special."""
    rng = generator(seed)
    return Ragged.pack([torch.randint(5, V, (n,), generator=rng) for n in lengths])


# ---------------------------------------------------------------------------------------------------- attention


def plain_attention(q, k, v, lengths, window, causal):
    """[T, T] scores over the whole row in float64, with everything outside the own sequence and window at -inf."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position = torch.arange(len(q))
    visible = owner[:, None] == owner
    if window is not None:
        visible &= (position[:, None] - position).abs() <= window
    if causal:
        visible &= position <= position[:, None]
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 17, 33]), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    window=st.sampled_from([None, 0, 1, 4, 100]),
    padded=st.booleans(),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_attention_and_its_gradient_equal_plain_masked_attention(lengths, heads, window, padded, causal, seed):
    rng, T = generator(seed), sum(lengths)
    q, k, v = (torch.randn(T, h, 8, generator=rng, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    target = torch.randn(T, heads[0], 8, generator=rng)
    x = Ragged.from_lengths(torch.zeros(T, dtype=torch.int64), torch.tensor(lengths))
    x = dataclasses.replace(x, causal=causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "SHORT", 192 if padded else 0)
        out = models.attend(q, k, v, x, window)
    expected = plain_attention(q, k, v, lengths, window, causal)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=0)
    grads = torch.autograd.grad((out * target).sum(), (q, k, v))
    for ours, theirs in zip(grads, torch.autograd.grad((expected * target).sum(), (q, k, v))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("short", [0, 192])
def test_attention_never_looks_into_a_neighbour(short, monkeypatch):
    monkeypatch.setattr(models, "SHORT", short)
    x = Ragged.from_lengths(torch.zeros(9, dtype=torch.int64), torch.tensor([4, 5]))
    q, k, v = torch.randn(3, 9, 2, 8, generator=generator())
    before = models.attend(q, k, v, x)
    v[4:] = math.nan
    after = models.attend(q, k, v, x)
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

    config = checkpoints.read_config(directory)
    backbone = models.backbone(config)
    have = checkpoints.find_tensors(directory)
    names = {name: checkpoints.disk_name(config.model_type, f"model.{name}") for name in backbone.state_dict()}
    backbone.load_state_dict({name: have[on_disk].read() for name, on_disk in names.items()})
    unread = set(have) - set(names.values())
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
        torch.testing.assert_close(p.grad, gradients[checkpoints.disk_name(kind, f"model.{name}")], atol=1e-5, rtol=0)


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
    backbone, kept = models.backbone(models.DecoderConfig("llama", **SIZES)), []
    for backbone.gradient_checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            backbone(batch(50, 50))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("family", ["bert", "roberta"], indirect=True)
def test_absolute_positions_end_with_an_error_in_words(family):
    backbone = family[1]
    last = 128 - backbone.config.first_position
    backbone(batch(last))
    with pytest.raises(ValueError, match=f"{last + 1} tokens.*{last} positions"):
        backbone(batch(last + 1))


@pytest.mark.parametrize("lengths", [(5,), (63, 1), (64,), (3, 0, 70, 1)])
def test_rows_filled_up_for_bf16_are_dropped_again(lengths, monkeypatch):
    backbone, x, rows = models.backbone(models.DecoderConfig("llama", **SIZES)), batch(*lengths), []
    models.init_weights(backbone, generator())
    expected = backbone(x)
    backbone.embed_tokens.register_forward_hook(lambda _, inputs, out: rows.append(len(inputs[0])))
    models.pad_rows(backbone)
    torch.testing.assert_close(backbone(x), expected, atol=1e-5, rtol=0)
    assert [n % 64 for n in rows] == [0]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = backbone(x)
    assert F.cosine_similarity(hidden.float(), expected).min() > 0.995


def test_llada_has_the_settings_of_its_published_checkpoints_where_a_config_is_silent():
    config = checkpoints.complete_config({"model_type": "llada", **SIZES})
    assert (config.rope_theta, config.rms_norm_eps) == (500000.0, 1e-5)


def test_random_weights_have_the_scales_that_are_documented():
    module = nn.Sequential(nn.Linear(256, 512), nn.Linear(1024, 128), nn.Embedding(2000, 64))
    models.init_weights(module, generator())
    for m, std in zip(module, (1 / 16, 1 / 32, 1 / 8)):
        assert m.weight.std().item() == pytest.approx(std, rel=0.02)
        assert abs(m.weight.mean()) < 0.02 * std
    assert not module[0].bias.any()
