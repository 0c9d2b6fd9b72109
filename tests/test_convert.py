"""Conversion: what transformers computes, the converted model computes; and a broken source leaves nothing behind.

The oracle is transformers, with the causal mask switched off by a 4-D mask of zeros. Its models are tiny and random,
norms and biases included, so that a tensor left out or exchanged shows.
"""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, pre_tokenizers

import convert
import medlm
from plumbing import checkpoints, methods
from plumbing.tokenizer import Tokenizer, load_tokenizer
from ragged import Ragged

REPO = Path(__file__).parent.parent
WORDS = [f"w{i}" for i in range(37)]
KNOWN = 39  # tokens that every source knows: the words and two special ones; rows above may be given to new tokens
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
DECODERS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
    "llama tied": (hf.LlamaForCausalLM, hf.LlamaConfig, {"tie_word_embeddings": True}),
    "llama biased": (hf.LlamaForCausalLM, hf.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama linear": (hf.LlamaForCausalLM, hf.LlamaConfig, {"rope_parameters": LINEAR}),
    "llama 3": (hf.LlamaForCausalLM, hf.LlamaConfig, {"rope_parameters": LLAMA3}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, GROUPED),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
}
ENCODERS = {
    "modernbert": (
        hf.ModernBertForMaskedLM, hf.ModernBertConfig,
        {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, {}),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, {"pad_token_id": 1, "max_position_embeddings": 70}),
}  # fmt: skip
FAMILIES = DECODERS | ENCODERS


# ---------------------------------------------------------------------------------------------------- sources


def make_model(family: str, **more):
    kind, config, extra = FAMILIES[family]
    torch.manual_seed(7)
    model = kind(config(**SIZES | extra | more, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.85 / model.config.hidden_size**0.5)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def make_tokenizer(special=("<pad>", "<unk>"), config=None, template=None) -> Tokenizer:
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=special[1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return Tokenizer(backend, config if config is not None else {"pad_token": special[0]}, template)


BRACKETS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SPECIAL = {"pad_token": "<pad>", "mask_token": "<|mask|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def make_source(directory: Path, family: str, **more):
    """A directory as transformers saves it, with a tokenizer beside the weights. Returns the model."""
    model = make_model(family, **more)
    model.save_pretrained(directory)
    special = {"bert": BRACKETS, "modernbert": BRACKETS, "roberta": ROBERTA}.get(family)
    (make_tokenizer(special, {}) if special else make_tokenizer()).save(directory)
    return model


def run(source, output, to="editflow", *flags) -> Path:
    convert.main(["--to", to, "-i", str(source), "-o", str(output), *map(str, flags)])
    return Path(output)


def edit_json(file: Path, **changes) -> None:
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def all_tensors(directory: Path) -> dict:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


SEQUENCES = [torch.randint(5, 39, (n,), generator=torch.Generator().manual_seed(n)) for n in (50, 1, 13, 30)]
BATCH = Ragged.pack([s.tolist() for s in SEQUENCES])


@torch.no_grad()
def oracle(model) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers, one sequence at a time, every token seeing every other: hidden states [T, D] and logits [T, V]."""
    hidden, logits = [], []
    for ids in SEQUENCES:
        kind = model.config.model_type
        mask = torch.zeros(1, 1, len(ids), len(ids)) if kind in ("llama", "qwen2", "qwen3") else None
        h = model.base_model(input_ids=ids[None], attention_mask=mask).last_hidden_state
        if kind == "modernbert":
            h = model.head(h)
        elif kind == "bert":
            h = model.cls.predictions.transform(h)
        elif kind == "roberta":
            h = model.lm_head.layer_norm(torch.nn.functional.gelu(model.lm_head.dense(h)))
        hidden.append(h[0])
        logits.append(model(input_ids=ids[None], attention_mask=mask).logits[0])
    return torch.cat(hidden), torch.cat(logits)


@torch.no_grad()
def assert_agrees(directory: Path, model) -> None:
    """hidden states, and the logits of every vocabulary head on the tokens that the source knows."""
    ours, (hidden, logits) = checkpoints.load(directory), oracle(model)
    got = ours(BATCH)
    torch.testing.assert_close(got, hidden, atol=1e-5, rtol=1e-5)
    for head in ("sub_logits", "ins_logits", "lm_head", "next_token_head"):
        if hasattr(ours, head):
            torch.testing.assert_close(getattr(ours, head)(got)[:, :KNOWN], logits[:, :KNOWN], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("to", ["bidirectional", "editflow", "medlm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_transformers_computes_and_returns_bit_by_bit(tmp_path, family, to):
    model = make_source(tmp_path / "in", family)
    out = run(tmp_path / "in", tmp_path / "out", to)
    if to == "bidirectional":
        assert load_tokenizer(out).mask_id is not None
        assert_agrees(run(out, tmp_path / "further"), model)
    else:
        assert_agrees(out, model)

    before, after = all_tensors(tmp_path / "in"), all_tensors(run(out, tmp_path / "plain", "hf"))
    assert set(before) <= set(after)
    assert set(after) - set(before) <= {"cls.predictions.decoder.bias", "lm_head.decoder.bias"}
    for name, tensor in before.items():
        rows = KNOWN if len(tensor) == SIZES["vocab_size"] else None  # those above belong to tokens that were added
        assert torch.equal(after[name][:rows], tensor[:rows]), name


@pytest.mark.parametrize("to", ["editflow", "medlm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_model_opens_in_transformers(tmp_path, family, to):
    make_source(tmp_path / "in", family)
    trained = run(tmp_path / "in", tmp_path / "edited", to)
    ours = checkpoints.load(trained)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    checkpoints.save(ours, trained)
    plain = run(trained, tmp_path / "plain", "hf")

    auto = hf.AutoModelForMaskedLM if family in ENCODERS else hf.AutoModelForCausalLM
    opened, info = auto.from_pretrained(plain, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        logits = (ours.sub_logits if to == "editflow" else ours.lm_head)(ours(BATCH))
        torch.testing.assert_close(oracle(opened.eval())[1], logits, atol=1e-5, rtol=1e-5)
        alone = opened(input_ids=SEQUENCES[0][None]).logits[0]  # without a mask: the config says that it is not causal
        torch.testing.assert_close(alone, logits[:50], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama tied", "bert", "modernbert"])
def test_backbone_saved_alone_predicts_with_its_embeddings(tmp_path, family):
    model = make_source(tmp_path / "in", family, tie_word_embeddings=family != "llama")
    (tmp_path / "in/model.safetensors").unlink()
    model.base_model.save_pretrained(tmp_path / "in")
    out = checkpoints.load(run(tmp_path / "in", tmp_path / "out"))
    embedding = model.get_input_embeddings().weight
    torch.testing.assert_close(out.sub_logits.weight[:KNOWN], embedding[:KNOWN])
    assert torch.equal(out.sub_logits.weight, out.ins_logits.weight)
    if family == "bert":  # the missing prediction transform starts as hardly more than a LayerNorm
        with torch.no_grad():
            hidden = torch.cat([model.bert(input_ids=s[None]).last_hidden_state[0] for s in SEQUENCES])
            plain = torch.nn.functional.layer_norm(hidden, hidden.shape[1:])
            torch.testing.assert_close(out(BATCH), plain, atol=0.05, rtol=0.05)


def test_layer_norms_of_the_first_bert_checkpoints(tmp_path):
    model = make_source(tmp_path / "in", "bert")

    def spell(tensors):
        for name in [n for n in tensors if "LayerNorm" in n]:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)

    edit_tensors(tmp_path / "in", spell)
    assert_agrees(run(tmp_path / "in", tmp_path / "out"), model)


# ---------------------------------------------------------------------------------------------------- LLaDA, Dream


BLOCK = {
    "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
}  # fmt: skip


def to_llada(name: str) -> str:
    for theirs, ours in BLOCK.items():
        if f".{theirs}." in name:
            return f"model.transformer.blocks.{name.split('.')[2]}.{ours}.weight"
    ends = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
    return f"model.transformer.{ends[name.removesuffix('.weight')]}.weight"


def make_llada(directory: Path, model_type="llada", vocab_size=48, tokenizer=None, **more):
    """A Llama under the names of LLaDA's own code. Returns the Llama."""
    settings = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "head_dim": 128}
    model = make_model("llama", **settings, hidden_size=256, num_attention_heads=2, vocab_size=vocab_size, **more)
    directory.mkdir()
    tensors = {to_llada(name): p.detach().clone() for name, p in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors")
    config = {
        "model_type": model_type, "architectures": ["LLaDAModelLM"], "d_model": 256, "n_heads": 2, "n_kv_heads": 2,
        "n_layers": 3, "mlp_hidden_size": 40, "vocab_size": vocab_size, "embedding_size": vocab_size,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_sequence_length": 4096, "weight_tying": False,
        "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "alibi": False, "rope": True,
        "include_bias": False, "include_qkv_bias": False, "mlp_ratio": 4, "pad_token_id": 0, "mask_token_id": 5,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (tokenizer or make_tokenizer()).save(directory)
    return model


@pytest.mark.parametrize("to", ["editflow", "medlm"])
def test_llada_under_its_own_names_and_back_as_a_llama(tmp_path, to):
    model = make_llada(tmp_path / "in")
    out = run(tmp_path / "in", tmp_path / "out", to)
    assert_agrees(out, model)
    plain = run(out, tmp_path / "plain", "hf")
    opened = hf.AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager").eval()
    torch.testing.assert_close(oracle(opened)[1][:, :KNOWN], oracle(model)[1][:, :KNOWN], atol=1e-5, rtol=1e-5)


def llada_tokenizer() -> Tokenizer:
    """With the ids that matter in the published one: 126080 words, then the special tokens."""
    names = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]"]
    names += [f"<|reserved_token_{i}|>" for i in range(126336 - 126084)] + ["<|mdm_mask|>", "<|eot_id|>"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(126080)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    config = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return Tokenizer(backend, config, "{{ messages[0].content }}<|eot_id|>")


def llada_shapes(D: int, F: int, V: int, layers: int) -> dict[str, tuple[int, ...]]:
    block = {"q_proj": (D, D), "k_proj": (D, D), "v_proj": (D, D), "attn_out": (D, D), "ff_proj": (F, D),
             "up_proj": (F, D), "ff_out": (D, F), "attn_norm": (D,), "ff_norm": (D,)}  # fmt: skip
    shapes = {"wte.weight": (V, D), "ln_f.weight": (D,), "ff_out.weight": (V, D)}
    shapes |= {f"blocks.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
    return {f"model.transformer.{name}": shape for name, shape in shapes.items()}


def llada_config(directory: Path, D: int, F: int, V: int, layers: int) -> None:
    directory.mkdir()
    sizes = {"d_model": D, "n_heads": D // 8, "n_layers": layers, "mlp_hidden_size": F}
    config = {"model_type": "llada", "vocab_size": V, "embedding_size": V} | sizes
    (directory / "config.json").write_text(json.dumps(config))


def test_medlm_from_llada_puts_its_tokens_on_the_published_ids(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = (8, 8, 126464, 1)
    llada_config(tmp_path / "in", *sizes)
    tensors = {name: torch.rand(shape) for name, shape in llada_shapes(*sizes).items()}
    save_file(tensors, tmp_path / "in/model.safetensors")
    llada_tokenizer().save(tmp_path / "in")

    out = run(tmp_path / "in", tmp_path / "out", "medlm")
    tokenizer, model = load_tokenizer(out), checkpoints.load(out)
    assert methods.special_tokens(medlm, tokenizer) == {"mask": 126336, "pad": 126081, "del": 126084, "eos": 126085}
    assert tokenizer.encode("<|im_start|>t7<|im_end|><|del|>", control=True) == [126086, 7, 126085, 126084]
    assert tokenizer.write_chats([[{"role": "user", "content": "t3"}]])[0].startswith("<|startoftext|>")
    assert torch.equal(model.lm_head.weight, tensors["model.transformer.ff_out.weight"])  # no row added or changed
    assert torch.equal(model.next_token_head.weight, model.lm_head.weight)
    assert "<|del|> = 126084" in capsys.readouterr().out


def test_dream(tmp_path):
    model = make_source(tmp_path / "in", "qwen2")
    names = {"model_type": "Dream", "architectures": ["DreamModel"], "auto_map": {"AutoModel": "x.Y"}}
    edit_json(tmp_path / "in/config.json", **names)
    for to in ("editflow", "medlm"):
        out = run(tmp_path / "in", tmp_path / to, to)
        assert_agrees(out, model)
        assert "auto_map" not in json.loads((out / "config.json").read_text())


# ---------------------------------------------------------------------------------------------------- published


def publish(directory: Path, kind: str):
    """A checkpoint as the published Edit Flows system saves one. Returns (model it was made from, its tensors)."""
    complete = make_tokenizer(("<pad>", "<unk>", "<|mask|>", "<|bos|>", "<|eos|>"), SPECIAL)
    if kind == "llada":
        model = make_llada(directory, "editflow-llada", tokenizer=complete)
    else:
        model = make_source(directory, "qwen2" if kind == "dream" else kind)
        edit_json(directory / "config.json", model_type=f"editflow-{kind}")
        if kind != "modernbert":
            complete.save(directory)
    torch.manual_seed(1)
    D = model.config.hidden_size
    heads = {"rate_heads.0.weight": torch.randn(3, D), "rate_heads.0.bias": torch.randn(3)}
    for name in ("sub_logits", "ins_logits"):
        heads[f"{name}.weight"] = torch.randn(48, D)
        if kind == "modernbert":
            heads[f"{name}.bias"] = torch.randn(48)
    edit_tensors(directory, lambda tensors: tensors.update(heads))
    return model, heads


@pytest.mark.parametrize("kind", ["modernbert", "llada", "dream", "qwen2", "qwen3"])
def test_published_edit_flows_checkpoints(tmp_path, kind):
    model, heads = publish(tmp_path / "in", kind)
    source = all_tensors(tmp_path / "in")
    ours = checkpoints.load(tmp_path / "in")
    with torch.no_grad():
        torch.testing.assert_close(ours(BATCH), oracle(model)[0], atol=1e-5, rtol=1e-5)
    for name, tensor in heads.items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    checkpoints.save(ours, tmp_path / "again")
    again = all_tensors(tmp_path / "again")
    unused = {"lm_head.weight", "decoder.weight", "decoder.bias", "model.transformer.ff_out.weight"}  # beside the heads
    assert set(source) - set(again) <= unused
    assert json.loads((tmp_path / "again/config.json").read_text())["model_type"] == f"editflow-{kind}"
    assert all(torch.equal(again[name], t) for name, t in source.items() if name in again)
    with torch.no_grad():
        assert torch.equal(checkpoints.load(tmp_path / "again")(BATCH), ours(BATCH))


def test_published_edit_flows_checkpoints_convert_with_their_heads(tmp_path):
    _, heads = publish(tmp_path / "in", "qwen3")
    ours = checkpoints.load(run(tmp_path / "in", tmp_path / "out"))
    for name, tensor in heads.items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    medlm_model = checkpoints.load(run(tmp_path / "in", tmp_path / "medlm", "medlm"))
    assert torch.equal(medlm_model.lm_head.weight[:KNOWN], heads["sub_logits.weight"][:KNOWN])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_causal_model_made_bidirectional_by_the_published_system(tmp_path, kind):
    """Its model type begins with a2d-. What is made of it has the published settings, unless flags say otherwise."""
    model = make_source(tmp_path / "in", kind)
    edit_json(tmp_path / "in/config.json", model_type=f"a2d-{kind}")
    assert_agrees(run(tmp_path / "in", tmp_path / "medlm", "medlm"), model)
    published = {"schedule": "linear", "x0_sampler": "masks[length:64]"}
    for flags, changed in ((), {}), (("--x0_sampler", "empty"), {"x0_sampler": "empty"}):
        out = run(tmp_path / "in", tmp_path / f"flow{len(flags)}", "editflow", *flags)
        assert (published | changed).items() <= checkpoints.load(out).config.nanoedit.items()


# ---------------------------------------------------------------------------------------------------- tokens


def test_missing_tokens_are_added_and_said(tmp_path, capsys):
    make_source(tmp_path / "in", "llama", vocab_size=39)  # as many rows as the tokenizer has tokens
    before = all_tensors(tmp_path / "in")
    out = run(tmp_path / "in", tmp_path / "out", "medlm")
    tokenizer, model, said = load_tokenizer(out), checkpoints.load(out), capsys.readouterr().out
    assert None not in (*methods.special_tokens(medlm, tokenizer).values(), tokenizer.bos_id)
    assert tokenizer.vocab_size == model.config.vocab_size == model.lm_head.out_features > 39
    assert f"from 39 to {tokenizer.vocab_size} rows" in said
    for name in ("<|mask|>", "<|bos|>", "<|del|>", "<|im_start|>", "<|im_end|>"):
        assert f"{name} = {tokenizer.backend.token_to_id(name)}" in said
    for matrix, source in ((model.model.embed_tokens, "model.embed_tokens"), (model.lm_head, "lm_head")):
        old = before[f"{source}.weight"]
        assert torch.equal(matrix.weight[:39], old)
        torch.testing.assert_close(matrix.weight[39:], old.mean(0).expand(len(matrix.weight) - 39, -1))
    text = "w3 w36 w0"
    assert tokenizer.encode(text) == make_tokenizer().encode(text)


def test_new_tokens_use_rows_that_no_token_had(tmp_path):
    make_source(tmp_path / "in", "qwen2")  # 48 rows, 39 tokens
    before = all_tensors(tmp_path / "in")["model.embed_tokens.weight"]
    out = run(tmp_path / "in", tmp_path / "out")
    model, mask = checkpoints.load(out), load_tokenizer(out).mask_id
    assert model.config.vocab_size == 48
    torch.testing.assert_close(model.model.embed_tokens.weight[mask], before.mean(0))
    assert torch.equal(model.model.embed_tokens.weight[:39], before[:39])


@pytest.mark.parametrize(("family", "cls", "sep"), [("bert", 2, 3), ("modernbert", 2, 3), ("roberta", 0, 2)])
def test_encoders_speak_in_questions_and_answers(tmp_path, family, cls, sep):
    make_source(tmp_path / "in", family)
    tokenizer = load_tokenizer(run(tmp_path / "in", tmp_path / "out"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (cls, sep)
    assert tokenizer.mask_id == 4
    assert tokenizer.vocab_size == 42  # nothing was missing
    text = tokenizer.write_chats([[{"role": "user", "content": "w1"}]])[0]
    assert text == "[Question]\nw1\n[/Question]\n\n[Answer]\n", "as the published Edit Flows system writes it"


def test_a_chat_template_is_kept(tmp_path):
    make_source(tmp_path / "in", "llama")
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    make_tokenizer(("<pad>", "<unk>", "<|im_end|>"), {"pad_token": "<pad>"}, template).save(tmp_path / "in")
    tokenizer = load_tokenizer(run(tmp_path / "in", tmp_path / "out", "medlm"))
    assert tokenizer.chat_template == template
    assert tokenizer.eos_id == 2


def test_medlm_tells_the_end_of_a_message_from_padding(tmp_path):
    make_source(tmp_path / "in", "llama")
    config = {"eos_token": "<pad>", "pad_token": "<pad>"}
    make_tokenizer(config=config, template="{{ messages[0].content }}").save(tmp_path / "in")
    tokenizer = load_tokenizer(run(tmp_path / "in", tmp_path / "out", "medlm"))
    assert tokenizer.eos_id == 0
    assert tokenizer.pad_id not in (None, 0)


TEXT = "Don't stop:  naïve 北京 counts 12345 lines,\n\n  isn't it?\tYES we'll see"


def byte_level_bpe() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT] * 3, trainer)
    return backend


@pytest.mark.parametrize(("kind", "theirs"), [("dream", hf.Qwen2TokenizerFast), ("roberta", hf.RobertaTokenizerFast)])
def test_bare_byte_level_vocabulary(tmp_path, kind, theirs):
    byte_level_bpe().model.save(str(tmp_path))
    reference = theirs.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert convert.open_tokenizer(tmp_path, kind).encode(TEXT) == reference.encode(TEXT, add_special_tokens=False)


@pytest.mark.parametrize("lower", [True, False])
def test_bare_wordpiece_vocabulary(tmp_path, lower):
    letters = sorted(set(TEXT + TEXT.lower() + "i") - set(" \n\t"))
    words = [*BRACKETS, *letters, *("##" + letter for letter in letters), "stop", "##unts", "we"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    reference = hf.BertTokenizerFast.from_pretrained(tmp_path, do_lower_case=lower)
    ours = convert.open_tokenizer(tmp_path, "bert")
    text = TEXT + " [MASK] stop"
    ids = ours.encode(text, control=True)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert "[MASK]" not in ours.decode(ids)


# ---------------------------------------------------------------------------------------------------- files


def test_settings_dtype_and_seed(tmp_path):
    make_source(tmp_path / "in", "llama")
    flags = ["--x0_sampler", "uniform[length:9]", "--schedule", "linear", "--time_conditioned", "--dtype", "bfloat16"]
    out = run(tmp_path / "in", tmp_path / "a", "editflow", *flags)
    assert {t.dtype for t in all_tensors(out).values()} == {torch.bfloat16}
    model = checkpoints.load(out)
    settings = {"method": "editflow", "schedule": "linear", "x0_sampler": "uniform[length:9]", "clock": True}
    settings |= {"prompt_dropout": 0.0}
    assert model.config.nanoedit == settings
    assert model.unigram.std() == 0
    hidden, s = model(BATCH), torch.full((len(BATCH.ids),), 0.3)
    assert torch.equal(model.at(hidden, s), hidden)  # the clock changes no token yet
    assert model.log_rates(hidden, s).exp().mean() < 0.3
    same = all_tensors(run(tmp_path / "in", tmp_path / "b", "editflow", *flags))
    other = all_tensors(run(tmp_path / "in", tmp_path / "c", "editflow", *flags, "--seed", 1))
    assert all(torch.equal(t, same[name]) for name, t in all_tensors(out).items())
    assert not torch.equal(same["rate_heads.0.weight"], other["rate_heads.0.weight"])
    again = checkpoints.load(run(out, tmp_path / "d"))  # settings survive a further conversion
    assert again.config.nanoedit == settings


def split_up(directory: Path, stem: str, n: int, **options) -> None:
    """model.safetensors as `n` files with an index, or as one: model-*.safetensors, or pytorch_model-*.bin."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    name = {"model": "model{}.safetensors", "pytorch_model": "pytorch_model{}.bin"}[stem]
    where = {tensor: name.format(f"-{i % n + 1}" * (n > 1)) for i, tensor in enumerate(tensors)}
    for file in set(where.values()):
        held = {tensor: value for tensor, value in tensors.items() if where[tensor] == file}
        torch.save(held, directory / file, **options) if stem != "model" else save_file(held, directory / file)
    if n > 1:
        (directory / f"{name.format('')}.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("special", [SPECIAL, None])
def test_pytorch_files(tmp_path, shards, new_format, special):
    """special: all tokens are there, so that no matrix grows and both heads are the same rows of the file."""
    model = make_source(tmp_path / "in", "llama")
    split_up(tmp_path / "in", "pytorch_model", shards, _use_new_zipfile_serialization=new_format)
    if special:
        make_tokenizer(("<pad>", "<unk>", *list(special.values())[1:]), special).save(tmp_path / "in")
    assert_agrees(run(tmp_path / "in", tmp_path / "out"), model)


def test_sharded_in_and_out(tmp_path, monkeypatch):
    model = make_source(tmp_path / "in", "llama")
    (tmp_path / "in/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    whole = run(tmp_path / "in", tmp_path / "whole")
    monkeypatch.setattr(convert, "SHARD_BYTES", 20_000)
    shards = run(tmp_path / "in", tmp_path / "shards")
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 2
    assert max(f.stat().st_size for f in files) < 25_000
    assert_agrees(shards, model)
    one, many = all_tensors(whole), all_tensors(shards)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_mixed_dtypes_stay_readable(tmp_path):
    make_source(tmp_path / "in", "llama", vocab_size=39)

    def mix(tensors):  # an odd number of bf16 elements before float32 ones
        for name in list(tensors)[::2]:
            tensors[name] = tensors[name].bfloat16()

    edit_tensors(tmp_path / "in", mix)
    out = run(tmp_path / "in", tmp_path / "out")
    before, after = all_tensors(tmp_path / "in"), all_tensors(out)
    shared = [name for name in before if name in after and len(before[name]) != 39]
    assert {after[n].dtype for n in shared} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(before[name], after[name]) for name in shared)


def test_report_counts_and_names_what_is_left_over(tmp_path, capsys):
    make_source(tmp_path / "in", "bert")
    edit_tensors(tmp_path / "in", lambda t: t.update({"bert.pooler.dense.weight": torch.zeros(32, 32)}))
    n = len(all_tensors(tmp_path / "in"))
    run(tmp_path / "in", tmp_path / "out")
    said = capsys.readouterr().out
    assert f"bert -> editflow: {n - 2} tensors copied, 6 new, 1 left over" in said  # the bias went into the heads
    assert "left over: bert.pooler.dense.weight" in said
    assert "rate_heads.0.weight [3, 32]: new" in said
    assert "sub_logits.weight [48, 32]: copy of bert.embeddings.word_embeddings.weight" in said


def test_a_directory_with_files_is_refused_unless_overwrite(tmp_path):
    model = make_source(tmp_path / "in", "llama")
    make_source(tmp_path / "other", "qwen2")
    out = run(tmp_path / "other", tmp_path / "out")
    (out / "run").mkdir()
    (out / "run/precious").write_text("trained here")
    (out / "model.safetensors.index.json").write_text("{}")  # of a sharded checkpoint that was here before
    with pytest.raises(OSError, match=r"not empty.*--overwrite"):
        run(tmp_path / "in", out)
    run(tmp_path / "in", out, "editflow", "--overwrite")
    assert (out / "run/precious").read_text() == "trained here"
    assert_agrees(out, model)
    (tmp_path / "empty").mkdir()
    assert_agrees(run(tmp_path / "in", tmp_path / "empty"), model)
    run(tmp_path / "in", tmp_path / "in", "editflow", "--overwrite")  # in place
    assert_agrees(tmp_path / "in", model)


@pytest.mark.slow
def test_memory_stays_near_one_file(tmp_path):
    """LLaDA's shape scaled down: 0.5 GB in bf16, of which the largest tensor has 65 MB, written in files of 100 MB."""
    sizes, shard = (1024, 3072, 31616, 12), 10**8
    llada_config(tmp_path / "in", *sizes)
    make_tokenizer().save(tmp_path / "in")
    shapes = llada_shapes(*sizes)
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    largest = max(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, tmp_path / "in/model.safetensors")
    script = (
        "import sys, convert; status = lambda: open('/proc/self/status').read();"
        "peak = lambda: int(status().split('VmHWM:')[1].split()[0]) * 1024;"
        f"convert.SHARD_BYTES = {shard}; before = peak(); convert.main(sys.argv[1:]); print(peak() - before)"
    )
    flags = ["--to", "medlm", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *flags], cwd=REPO, capture_output=True, text=True, check=True)
    used = int(done.stdout.split()[-1])
    print(f"peak above imports: {used / 1e6:.0f} MB; file {shard / 1e6:.0f} MB, tensor {largest / 1e6:.0f} MB")
    assert used < shard + 4 * largest  # pages of the source that are mapped count, too; the model has 7 * largest


# ---------------------------------------------------------------------------------------------------- bad input


class Bomb:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def split_and(change, file: str, stem: str = "model"):
    def spoil(directory):
        split_up(directory, stem, 2)
        change(directory / file)

    return spoil


def hostile_bin(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb(directory.parent / "must-not-exist")}))


def truncated_bin(directory: Path) -> None:
    split_up(directory, "pytorch_model", 1)
    truncate(directory / "pytorch_model.bin")


def config(**changes):
    return lambda d: edit_json(d / "config.json", **changes)


def tensor(name: str, change):
    """change: None drops the tensor, a function replaces it."""

    def edit(tensors):
        old = tensors.pop(name, None)
        if change:
            tensors[name] = change(old)

    return lambda d: edit_tensors(d, edit)


BAD = {
    "model_type": (config(model_type="gpt2"), "model_type 'gpt2'.*llama.*qwen3.*modernbert.*bert"),
    "no model_type": (config(model_type=...), "model_type None is not supported"),
    "activation": (config(hidden_act="relu"), "config.json: hidden_act 'relu'"),
    "rope": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2}), "'yarn' is not supported"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    "config without size": (config(hidden_size=...), "field 'hidden_size'"),
    "truncated": (lambda d: truncate(d / "model.safetensors"), "model.safetensors: truncated or corrupt"),
    "corrupt": (
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 99),
        "model.safetensors: truncated or corrupt",
    ),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors: truncated or corrupt"),
    "truncated shard": (split_and(truncate, "model-2.safetensors"), "model-2.safetensors: truncated or corrupt"),
    "missing shard": (split_and(Path.unlink, "model-2.safetensors"), "model-2.safetensors: missing"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights; looked for model.safetensors, .*bin"),
    "hostile bin": (hostile_bin, "pytorch_model.bin: .*not a PyTorch file of tensors alone"),
    "truncated bin": (truncated_bin, "pytorch_model.bin: truncated"),
    "missing bin": (split_and(Path.unlink, "pytorch_model-2.bin", "pytorch_model"), "pytorch_model-2.bin: missing"),
    "missing tensor": (tensor("model.norm.weight", None), "'model.norm.weight' is missing"),
    "missing embedding": (tensor("model.embed_tokens.weight", None), "'model.embed_tokens.weight' is missing"),
    "missing output": (tensor("lm_head.weight", None), "'lm_head.weight' is missing"),
    "wrong shape": (
        tensor("model.norm.weight", lambda t: torch.ones(31)),
        r"'model.norm.weight' has shape \[31\].*\[32\]",
    ),
    "quantised": (tensor("lm_head.weight", lambda t: t.to(torch.int8)), "'lm_head.weight' is none of .*quantised"),
    "fewer layers in config": (config(num_hidden_layers=2), "describes another model.*'model.layers.2"),
    "more layers in config": (config(num_hidden_layers=4), "'model.layers.3.* is missing"),
    "vocabulary of config": (config(vocab_size=50), r"has shape \[48, 32\], its config asks for \[50, 32\]"),
    "surplus bias": (
        tensor("model.layers.1.self_attn.q_proj.bias", lambda t: torch.ones(32)),
        "another model.*q_proj.bias",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer in .*looked for tokenizer.json"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
    "larger tokenizer": (
        lambda d: make_tokenizer([f"s{i}" for i in range(60)], {}).save(d),
        "97 tokens.* vocab_size of 48",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    make_source(directory, "llama")
    return directory


@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_named_and_leaves_nothing(tmp_path, good, case):
    spoil, message = BAD[case]
    source = tmp_path / "in"
    shutil.copytree(good, source)
    spoil(source)
    with pytest.raises((ValueError, OSError), match=message):
        run(source, tmp_path / "out")
    assert {f.name for f in tmp_path.iterdir()} == {"in"}
    assert not (tmp_path / "must-not-exist").exists()


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, good, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.checkpoints, "write_json", full)  # after the weights
    with pytest.raises(OSError, match="No space left"):
        run(good, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_seen_before_writing(tmp_path, good, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"needs 0.0 GB, 0.0 GB are free"):
        run(good, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["no/such/dir", "/no/such", "./nothing", "nothing"])
def test_neither_directory_nor_hub_id(tmp_path, source):
    with pytest.raises(OSError, match="no such directory, and not of the form owner/name"):
        run(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unreachable_hub_id_says_what_was_tried(tmp_path, monkeypatch):
    def unreachable(*args, **options):
        assert options["revision"] == "v2"
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(OSError, match=r"someone/model: no such directory, and the hub did not deliver it .no route"):
        run("someone/model", tmp_path / "out", "editflow", "--revision", "v2")
    assert not list(tmp_path.iterdir())


def test_hub_checkpoints_of_pytorch_files_are_fetched_in_a_second_step(tmp_path, good, monkeypatch):
    asked = []

    def download(repository, allow_patterns, revision):
        asked.append("*.bin" in allow_patterns)
        for file in good.iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / "cache" / file.name).write_bytes(file.read_bytes())
        if asked[-1]:
            torch.save(load_file(good / "model.safetensors"), tmp_path / "cache/pytorch_model.bin")
        return str(tmp_path / "cache")

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    run("someone/model", tmp_path / "out")
    assert asked == [False, True]
    assert checkpoints.load(tmp_path / "out").config.model_type == "llama"


@pytest.mark.parametrize(
    "flags", [["--to", "gguf"], ["--to", "hf", "--schedule", "linear"], ["--to", "hf", "--seed", "-1"]]
)
def test_bad_flags(tmp_path, good, flags, capsys):
    with pytest.raises(SystemExit):
        convert.main([*flags, "-i", str(good), "-o", str(tmp_path / "out")])
    assert flags[-2] in capsys.readouterr().err


def test_output_that_is_a_file(tmp_path, good):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OSError, match="File exists"):
        run(good, tmp_path / "out", "editflow", "--overwrite")
    assert (tmp_path / "out").read_text() == "mine"
