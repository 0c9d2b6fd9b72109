"""The command line: flags, help, errors in one line, and the published commands."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import flags_of, save_checkpoint

import convert
import editflow
import evaluate
import sample
import train
from plumbing import cli

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train.py", "sample.py", "evaluate.py", "convert.py")
PARSERS = {"train": train, "sample": sample, "evaluate": evaluate, "convert": convert}


@pytest.mark.parametrize("text", ["True", "yes", "1", "t"])
def test_yes(text):
    assert cli.boolean(text) is True


@pytest.mark.parametrize("text", ["False", "no", "0", "F"])
def test_no(text):
    assert cli.boolean(text) is False


def test_flags_stand_alone_or_with_a_value():
    f = cli.Flags("x")
    f.flag("--bf16", help="")
    assert [f.parse_args(argv.split()).bf16 for argv in ("", "--bf16", "--bf16 True", "--bf16 False")] == [
        False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "x", "1e999", ""])
def test_numbers_out_of_bounds(text, capsys):
    f = cli.Flags("x")
    f.add_argument("--n", type=cli.number(low=0, high=10))
    with pytest.raises(SystemExit) as end:
        f.parse_args(["--n", text])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert "--n" in err
    assert len(err.splitlines()) == 1


def call(script: str, *flags: str, **options) -> subprocess.CompletedProcess:
    start = ["bash"] if script.endswith(".sh") else [sys.executable]
    options = {"cwd": ROOT, "capture_output": True, "text": True} | options
    return subprocess.run([*start, script, *flags], timeout=120, **options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flags(script):
    wrong = call(script, "--no_such_flag")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
    assert wrong.stderr.startswith(f"{script}: error: ")


# ---------------------------------------------------------------------------------------------------- help


def programs() -> list[str]:
    """What can be started, of the files that the README names."""
    files = [file for place in ("*.py", "recipes/*") for file in ROOT.glob(place)]
    files = [file for file in files if file.suffix == ".sh" or "__main__" in file.read_text(encoding="utf-8")]
    return sorted(str(file.relative_to(ROOT)) for file in files if file.suffix in (".py", ".sh"))


@pytest.mark.slow
@pytest.mark.parametrize("script", programs())
def test_help_of_every_program(script):
    shown = call(script, "--help")
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout) > 80
    assert not shown.stderr


def help_of(script: str, capsys) -> str:
    with pytest.raises(SystemExit):
        PARSERS[script].parse_args(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("script", PARSERS)
def test_help_shows_what_is_required_and_how_defaults_act(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    text = help_of(script, capsys)
    flags = re.split(r"\n  (?=-)", text)
    assert "None" not in text
    for action in flags_of(PARSERS[script]):
        (said,) = [flag for flag in flags if re.match(rf"{action.option_strings[0]}\b", flag)]
        shown = re.findall(r"\(default: (.*?)\)", said)
        assert ("(required)" in said) == action.required
        assert len(shown) <= 1
        if isinstance(action.default, list):
            assert shown == ([" ".join(map(str, action.default))] if action.default else [])
        elif action.default is not None and action.default is not False:
            assert shown == [str(action.default)]


@pytest.mark.parametrize("script", ["train", "sample", "evaluate"])
def test_help_shows_the_flags_of_the_methods_apart(script, capsys):
    text = help_of(script, capsys)
    sections = dict(re.findall(r"^(\S.*?):\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL))
    assert len(sections) > 4
    assert "--x0_sampler" in sections["Edit Flows"]
    assert ("--min_t" if script == "train" else "--mask_diffusion_step") in sections["ME-DLM"]
    assert [text.count(f"  {flag} ") for flag in ("--x0_sampler", "--seed")] == [1, 1]


# ---------------------------------------------------------------------------------------------------- pipes


@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in programs() if name.endswith(".py") and name != "build_ext.py"])
def test_a_reader_that_leaves_is_no_error(script):
    """As `| head -1` does, only that it is sure to leave first."""
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = call(script, "--help", capture_output=False, stdout=writer, stderr=subprocess.PIPE, env=buffered)
    os.close(writer)
    assert ended.stderr == ""
    assert ended.returncode in (141, -13)


@pytest.mark.slow
def test_answers_that_nobody_reads_on(tmp_path):
    command = f"{sys.executable} sample.py --model_name_or_path {save_checkpoint(tmp_path / 'flow')} --steps 2"
    command += " --num_samples 40 --batch_size 1 --x0_sampler masks[length:300] | head -1"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stdout.startswith("--- seed 0")
    assert "rror" not in ended.stderr
    assert "Traceback" not in ended.stderr


# ---------------------------------------------------------------------------------------------------- as published

ENCODER = "--model_name_or_path .models/editflow/ModernBERT-large --per_device_train_batch_size 16"
ENCODER += " --per_device_eval_batch_size 16 --learning_rate 1e-4 --output_dir .models/out"
STAGE = (
    "--seed 3407 --report_to tensorboard --dataloader_num_workers 8 --remove_unused_columns False --save_steps 5000 "
    "--max_len 2048 --warmup_steps 100 --logging_steps 1 --lr_scheduler_type cosine --bf16 --do_train "
    "--save_safetensors --gradient_checkpointing --learning_rate 5e-5 --num_train_epochs 1 "
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 32 --deepspeed config/stage_1.json "
    "--model_cfg data/LLaDA-8B-Base --train_file text.jsonl --output_dir out --min_t 0.0 --max_t 1.0"
)
PUBLISHED = [  # the flags of the published commands, and of their scripts' variants
    f"editflow {ENCODER} --dataset_args Trelis/tiny-shakespeare --text_field Text --max_length 128 "
    "--num_train_epochs 10 --x0_sampler masks[length:64] --insert_eos False",
    f"editflow {ENCODER} --dataset_args dylanebert/openwebtext --text_field text --streaming True --max_length 512 "
    "--max_steps 20000 --eval_strategy no --x0_sampler masks[length:64]",
    f"editflow {ENCODER} --dataset_args allenai/tulu-3-sft-mixture|HuggingFaceTB/smoltalk --max_length 1024 "
    "--save_steps 0.1 --num_train_epochs 10 --x0_sampler masks[length:64]",
    f"editflow {ENCODER} --load_in_4bit True --lora True --r 32 --lora_alpha 64 --dtype bfloat16 --truncation right "
    "--mask_prompt_loss True --scheduler_cls LinearKappaScheduler --report_to none",
    f"medlm {STAGE} --weight_decay 0.01 --copy_head --num_workers 64 --resume",
    f"medlm {STAGE} --pad_len 128",
    f"medlm {STAGE} --pad_len 128 --intermediate_ratio 0.5 --mask_diffusion_pred_per_step 2 4 8 16 "
    "--max_diffusion_steps 32 --intermediate_min_t 0.0 --intermediate_max_t 1.0 --train_file a.jsonl b.jsonl",
]


@pytest.mark.parametrize("command", PUBLISHED)
def test_published_training_commands_parse(command):
    train.parse_args(["--method", *command.split()])


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("convert", "--to editflow --model_name_or_path answerdotai/ModernBERT-large --output_dir .models/editflow"),
        ("convert", "--to medlm -i llada -o out"),
        ("sample", "--model_name_or_path .models/out --interactive --chat_template False"),
        ("sample", "--model_name_or_path .models/out --prompt poem --tau 0.01 --mask_length 64 --seed 42 --make_gif"),
        (
            "evaluate",
            "--path renhouxing/ME-DLM-Stage3 --task humaneval mbpp gsm8k math500 --mask_diffusion_step 48 "
            "--edit_diffusion_step 16",
        ),
    ],
)
def test_other_published_commands_parse(script, flags):
    PARSERS[script].parse_args(flags.split())


def test_published_flags_have_their_effect():
    args = train.parse_args(["--method", *PUBLISHED[3].split()])
    assert args.lora_r == 32
    assert args.bf16
    assert args.schedule == "LinearKappaScheduler"
    assert train.parse_args(["--method", *PUBLISHED[-1].split()]).dataset_args == "a.jsonl + b.jsonl"
    assert not train.parse_args(["--method", "medlm", "--output_dir", "out", "--dtype", "float32"]).bf16


@pytest.mark.parametrize(("name", "here"), [("Linear", "linear"), ("Cosine", "cosine"), ("Cubic", "cubic[a:1,b:1]")])
def test_published_names_of_schedules(name, here):
    published, ours = editflow.parse_schedule(f"{name}KappaScheduler"), editflow.parse_schedule(here)
    assert published.fire(0.2, 0.7) == ours.fire(0.2, 0.7)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_optional_packages_are_asked_for_before_anything_starts(package, monkeypatch, refused):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    flags = f"--method editflow --output_dir out --report_to {package}"
    assert f"pip install {package}" in refused(train.main, flags.split(), 2)


@pytest.mark.parametrize("script", ["sample", "evaluate", "train"])
def test_bf16_without_units_for_it_is_one_line_and_float32(script, tmp_path, monkeypatch, capsys, tiny_is_even_smaller):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flow, seen = save_checkpoint(tmp_path / "flow"), set()
    watched = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *args: seen.add(watched(*args).dtype) or watched(*args))
    PARSERS[script].main({
        "sample": f"--model_name_or_path {flow} --steps 2 --bf16",
        "evaluate": f"--path {flow} --task toy --limit 2 --steps 2 --output_dir {tmp_path}/evaluation --bf16",
        "train": f"--method editflow --max_steps 1 --dataset_args toy[train:8,test:2] --output_dir {tmp_path} --bf16",
    }[script].split())  # fmt: skip
    assert capsys.readouterr().err.count("--bf16: no bf16 units here") == 1
    assert seen == {torch.float32}
