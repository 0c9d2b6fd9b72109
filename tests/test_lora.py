"""LoRA and 4-bit weights: what they leave alone, what they add, and that merging adds the same."""

import json

import pytest
import torch
from safetensors.torch import load_file

import convert
import lora
import toy
import train
from plumbing import checkpoints, methods
from ragged import Ragged

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
ENCODERS = {
    "modernbert": {"local_attention": 8},
    "bert": {"max_position_embeddings": 64},
    "roberta": {"max_position_embeddings": 64},
}
KINDS = {"llama": {}, "qwen3": {"head_dim": 16}, **ENCODERS}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(kind="llama", method="editflow"):
    """A model with random numbers everywhere, biases included."""
    raw = SIZE | {"model_type": kind, "vocab_size": 58, "nanoedit": {"method": method}} | KINDS[kind]
    model = checkpoints.build(checkpoints.complete_config(raw))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator(p.numel()))
    return model.eval()


def batch():
    return Ragged.pack([torch.randint(5, 58, (n,), generator=generator(n)).tolist() for n in (9, 1, 14)])


def disturb(model, seed=3):
    """B is zero at first; after this, the additions do something."""
    for layer in lora.adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1, generator=generator(seed))
    return model


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_at_first_and_merged_equals_unmerged(kind, method):
    model, x = make(kind, method), batch()
    with torch.no_grad():
        plain = model(x)
        lora.add(model, rank=4, alpha=8.0)
        model.eval()
        assert torch.equal(model(x), plain)
        adapted = disturb(model)(x)
        assert (adapted - plain).abs().max() > 0.01
        for layer in lora.adapted_layers(model).values():
            W = layer.base.weight
            W.copy_(lora.merged(W, layer.lora_B.weight, layer.lora_A.weight, layer.scale))
            layer.lora_B.weight.zero_()
        torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-5)


def test_every_linear_layer_of_the_blocks_is_adapted_and_no_other():
    model = lora.add(make("llama"), rank=4)
    per_block = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(name.rpartition(".")[2] for name in lora.adapted_layers(model)) == sorted(per_block * 2)


@pytest.mark.parametrize("four_bit", [False, True])
def test_gradients_reach_adapters_and_heads_only(four_bit):
    model = disturb(lora.add(make("llama"), rank=4, four_bit=four_bit)).train()
    hidden = model(batch())
    (model.sub_logits(hidden).sum() + model.ins_logits(hidden).sum() + model.rate_heads(hidden).sum()).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert reached == trainable
    assert all("lora_" in name or not name.startswith("model.") for name in trainable)
    assert any("lora_A" in name for name in trainable)
    assert any("rate_heads" in name for name in trainable)


def test_dropout_is_for_training_only():
    """Not for what a rollout or an evaluation in the middle of it reads."""
    model, x = disturb(lora.add(make("llama"), rank=4, dropout=0.5)), batch()
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


# ---------------------------------------------------------------------------------------------------- 4 bits


def test_the_codebook_is_the_published_one():
    """Values printed in the QLoRA paper's appendix E."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(lora.nf4_codebook(), torch.tensor(published), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (3, 50), (1, 1), (5, 64)])
def test_every_weight_becomes_the_nearest_value_of_its_block(shape):
    weight = torch.randn(shape, generator=generator())
    back = lora.dequantize(*lora.quantize(weight), weight.shape)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    levels = lora.nf4_codebook() * flat.abs().amax(1, keepdim=True)  # [blocks, 16]
    nearest = (flat[:, :, None] - levels[:, None]).abs().min(2).values.flatten()[: weight.numel()]
    torch.testing.assert_close((back - weight).abs().flatten(), nearest, atol=1e-6, rtol=0)


def test_four_bit_weights_take_under_six_tenths_of_a_byte_and_stay_close():
    linear = torch.nn.Linear(256, 512)
    small = lora.Linear4bit(linear)
    size = sum(b.numel() * b.element_size() for b in small.buffers())
    assert size / linear.weight.numel() < 0.6
    assert not any(p.requires_grad for p in (small.packed, small.scale))
    x = torch.randn(7, 256, requires_grad=True)
    expected = torch.nn.functional.linear(x, lora.dequantize(small.packed, small.scale, small.shape), linear.bias)
    torch.testing.assert_close(small(x), expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (small(x), expected))
    torch.testing.assert_close(ours, theirs)
    assert (small(x) - linear(x)).norm() / linear(x).norm() < 0.12


# ---------------------------------------------------------------------------------------------------- from the shell


@pytest.fixture
def base(tmp_path):
    directory, tokenizer = tmp_path / "base", toy.tokenizer()
    model = checkpoints.new_model("editflow", "tiny", tokenizer.vocab_size, schedule="linear", x0_sampler="empty")
    checkpoints.save(model, directory)
    tokenizer.save(directory)
    return directory


def fit(method, base, out, *flags):
    argv = f"--method {method} --model_name_or_path {base} --output_dir {out} --lora --lora_r 4 --learning_rate 1e-2"
    argv += " --dataset_args toy[train:48,test:6] --max_length 64 --max_steps 3 --per_device_train_batch_size 4"
    assert train.main([*argv.split(), "--logging_steps", "1", "--eval_samples", "0", *flags]) == 0
    return out / "checkpoint-final"


@pytest.mark.parametrize("flags", [(), ("--load_in_4bit",)])
def test_a_run_saves_adapters_in_pefts_layout_and_heads(base, tmp_path, flags):
    final = fit("editflow", base, tmp_path / "out", *flags)
    assert not (final / "model.safetensors").exists()
    config = json.loads((final / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 4, str(base))
    adapters = load_file(final / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapters
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in adapters)
    assert set(config["target_modules"]) == {name.split(".")[-3] for name in adapters}
    assert any(t.abs().max() > 0 for n, t in adapters.items() if "lora_B" in n)

    merged, separate, before = checkpoints.load(final), checkpoints.load_adapters(final).eval(), checkpoints.load(base)
    with torch.no_grad():
        torch.testing.assert_close(merged(batch()), separate(batch()), atol=1e-5, rtol=1e-5)
        assert (merged(batch()) - before(batch())).abs().max() > 1e-4
    assert not torch.equal(merged.ins_logits.weight, before.ins_logits.weight)
    assert torch.equal(merged.model.embed_tokens.weight, before.model.embed_tokens.weight)


def test_a_run_goes_on_from_its_adapters(base, tmp_path):
    fit("editflow", base, tmp_path / "whole")
    fit("editflow", base, tmp_path / "halves", "--max_steps", "2", "--lr_scheduler_type", "constant")
    fit("editflow", base, tmp_path / "halves", "--lr_scheduler_type", "constant")
    fit("editflow", base, tmp_path / "at_once", "--lr_scheduler_type", "constant")
    a, b = (load_file(tmp_path / d / "checkpoint-final/adapter_model.safetensors") for d in ("halves", "at_once"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_merging_into_a_plain_checkpoint(base, tmp_path):
    final = fit("editflow", base, tmp_path / "out")
    flags = ["-i", str(final), "-o", str(tmp_path / "plain")]
    with pytest.raises(ValueError, match="--merge_lora"):
        convert.main(["--to", "editflow", *flags])
    convert.main(["--to", "editflow", "--merge_lora", *flags])
    ours, expected = checkpoints.load(tmp_path / "plain").state_dict(), checkpoints.load(final).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="holds no adapters"):
        convert.main(["--to", "hf", "--merge_lora", "-i", str(base), "-o", str(tmp_path / "x")])
    convert.main(["--to", "hf", "--merge_lora", "-i", str(final), "-o", str(tmp_path / "hf")])
    exported = load_file(tmp_path / "hf/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(exported[name], expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("flags", ["--lora", "--load_in_4bit --model_name_or_path x"])
def test_flags_that_contradict(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(f"--method editflow --output_dir {tmp_path} {flags}".split())
    assert end.value.code == 2
    assert "--lora" in capsys.readouterr().err


def test_damaged_adapters_are_named(base, tmp_path):
    final = fit("editflow", base, tmp_path / "out")
    (final / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: truncated or corrupt"):
        checkpoints.load(final)
    (final / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(ValueError, match=r"adapter_config\.json: field 'lora_alpha' must be a number"):
        checkpoints.load(final)


def test_a_run_does_not_change_sides(base, tmp_path):
    final = fit("editflow", base, tmp_path / "out")
    argv = f"--method editflow --model_name_or_path {base} --dataset_args toy[train:48,test:6] --max_steps 5".split()
    with pytest.raises(ValueError, match="trained with --lora"):
        train.main([*argv, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="holds adapters already"):
        fit("editflow", final, tmp_path / "twice")
    with pytest.raises(OSError, match="checkpoint of a run"):
        convert.main(["--to", "editflow", "--merge_lora", "--overwrite", "-i", str(final), "-o", str(final)])
    assert (final / "adapter_model.safetensors").is_file()
