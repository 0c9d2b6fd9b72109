"""train.py from the command line to the checkpoint: what it writes, how it stops and goes on, what it refuses."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import jsonl, save_checkpoint, save_encoder
from fleet import ALONE, metrics
from safetensors.torch import load_file

import data
import editflow
import medlm
import parallel
import sample
import toy
import train
from plumbing import checkpoints, feed
from plumbing.tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(train.__file__).parent
TOY = "--dataset_args toy[train:48,test:6] --per_device_train_batch_size 8"
QUICK = "--logging_steps 1 --eval_samples 1 --learning_rate 1e-3"
# a run of each method: every branch is taken within a few steps
METHODS = {
    "editflow": "--method editflow --x0_sampler masks[length:8] --max_length 64",
    "medlm": (
        "--method medlm --max_length 64 --pad_len 8 --per_device_train_batch_size 2 "
        "--intermediate_ratio 0.5 --max_diffusion_steps 3 --min_t 0.1"
    ),
}


pytestmark = pytest.mark.usefixtures("tiny_is_even_smaller")  # these tests are about the loop


def run(method, out, flags):
    """The flags given last win. Returns the exit status as main() does."""
    return train.main(f"{TOY} {QUICK} {METHODS[method]} --output_dir {out} {flags}".split())


@pytest.fixture
def refused(refused):
    """Runs train.py with flags that must fail; the one line it says."""
    return lambda flags: refused(train.main, flags.split())


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("method", METHODS)
def test_a_run_from_flags_to_sample(method, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(method, out, "--max_steps 6 --eval_steps 3") == 0
    lines = lines_of(out)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["tokens_per_s"] > 0 for line in steps)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    parts = set().union(*steps)
    expected = {"editflow": {"loss_ins", "loss_sub", "loss_rate"}, "medlm": {"loss_mask_lm", "loss_edit_next"}}[method]
    assert expected <= parts, "losses per branch and kind of edit"
    said = capsys.readouterr().err
    assert f"saved in {out}/checkpoint-final" in said
    assert said.count("  | '") == 2, "one text for each evaluation"

    files = {f.name for f in (out / "checkpoint-final").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "train_state.json"} <= files
    flags = f"--model_name_or_path {out} --output {tmp_path}/texts.jsonl --steps 4 --init_num 8"
    sample.main([*flags.split(), "--prompt", "Ann has 3 apples, gets 4:"])
    assert isinstance(json.loads((tmp_path / "texts.jsonl").read_text())["response"], str)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(method, tmp_path):
    flags = "--max_steps 120 --learning_rate 5e-3 --eval_strategy no --intermediate_ratio 0 --loss_norm bound"
    run(method, tmp_path, flags)
    curve = [line["loss"] for line in lines_of(tmp_path)]
    assert sum(curve[-15:]) < 0.8 * sum(curve[:15])


def test_a_run_is_a_function_of_its_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("editflow", tmp_path / name, f"--max_steps 3 --seed {seed}")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")
    assert same_weights(tmp_path / "a/checkpoint-final", tmp_path / "b/checkpoint-final")


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_checkpointing_bf16_and_the_other_schedules_run(method, tmp_path):
    flags = "--gradient_accumulation_steps 2 --bf16 --gradient_checkpointing --weight_decay 0.1 --eval_strategy epoch"
    assert run(method, tmp_path, f"{flags} --max_steps 3 --lr_scheduler_type linear --warmup_steps 2") == 0
    rates = [line["lr"] for line in lines_of(tmp_path) if "lr" in line]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3])


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    for name, flag in (("a", "False"), ("b", "True")):
        run("editflow", tmp_path / name, f"--max_steps 3 --gradient_checkpointing {flag}")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_learning_rate(kind):
    flags = f"--method medlm --output_dir x --lr_scheduler_type {kind} --warmup_ratio 0.1 --learning_rate 2.0"
    args = train.parse_args(flags.split())
    rate = [train.learning_rate(step, 110, args) for step in range(110)]
    assert rate[:11] == pytest.approx([2.0 * (i + 1) / 11 for i in range(11)])
    half = {"cosine": 1.0, "linear": 1.0, "constant": 2.0}[kind]
    assert (rate[60] + rate[61]) / 2 == pytest.approx(half, abs=0.04)
    assert rate[109] == pytest.approx(2.0 if kind == "constant" else 0.0, abs=0.03)
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))


def test_steps_follow_from_epochs_and_groups(tmp_path):
    """48 examples, batches of 8, 2 to a step: 3 steps an epoch."""
    run("editflow", tmp_path, "--num_train_epochs 2 --gradient_accumulation_steps 2 --eval_strategy no")
    assert lines_of(tmp_path)[-1]["step"] == 6


def test_every_example_once_an_epoch_in_another_order():
    args = train.parse_args(f"{TOY} {METHODS['editflow']} --output_dir x".split())
    records, held_out, _ = data.load_records(args.dataset_args, args.seed)
    method = SimpleNamespace(PACKED=False)
    batches = feed.MemoryFeed(args, method, {}, toy.tokenizer(), records, held_out, parallel.Ranks())

    def taken(step, n):
        batches.begin(step, None)
        return [tuple(e.prompt + e.response) for _ in range(n) for batch in batches.take() for e in batch]

    both = taken(0, 12)
    first, second = both[:48], both[48:]
    assert sorted(first) == sorted(second)
    assert first != second
    assert taken(9, 3) == second[24:]


def test_continued_training_from_a_checkpoint_keeps_its_settings(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run("editflow", first, "--max_steps 1 --schedule linear --x0_sampler masks[length:5] --time_conditioned")
    flags = f"--method editflow --model_name_or_path {first} --output_dir {second} --max_steps 1"
    train.main(f"{TOY} {QUICK} {flags}".split())
    settings = checkpoints.load(second).config.nanoedit
    assert settings["schedule"] == "linear"
    assert settings["x0_sampler"] == "masks[length:5]"
    assert settings["clock"] is True


def test_copy_head_starts_the_second_head_as_the_first(tmp_path, monkeypatch):
    seen, loss = [], medlm.loss

    def watched(model, *args):
        seen.append({name: p.clone() for name, p in model.state_dict().items()})
        return loss(model, *args)

    monkeypatch.setattr(medlm, "loss", watched)
    run("medlm", tmp_path, "--max_steps 2 --copy_head --intermediate_ratio 0 --eval_strategy no")
    assert torch.equal(seen[0]["lm_head.weight"], seen[0]["next_token_head.weight"])
    assert not torch.equal(seen[1]["lm_head.weight"], seen[1]["next_token_head.weight"])


# ---------------------------------------------------------------------------------------------------- sources


def test_drafts_are_where_training_starts(tmp_path):
    run("editflow", tmp_path, "--dataset_args toy-repair[train:48,test:6] --x0_sampler draft --max_steps 3")
    assert checkpoints.load(tmp_path).config.nanoedit["x0_sampler"] == "draft"
    flags = f"--model_name_or_path {tmp_path} --output {tmp_path}/repaired.jsonl --steps 4"
    sample.main([*flags.split(), "--prompt", "Ann has 3 apples, gets 4:", "--draft", "That makes 8."])
    assert isinstance(json.loads((tmp_path / "repaired.jsonl").read_text())["response"], str)


def test_one_record_without_a_draft_is_found_before_training_starts(tmp_path, refused):
    pair = {"prompt": "2 + 2", "response": "4"}
    file = jsonl(tmp_path / "pairs.jsonl", *[pair | {"draft": "5"}] * 40, pair)
    flags = "--method editflow --x0_sampler draft --vocab_size 300 --max_length 64 --max_steps 2"
    line = refused(f"{flags} --per_device_train_batch_size 1 --dataset_args {file}[test:0] --output_dir {tmp_path}/out")
    assert "draft" in line
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_uniform_starts_from_the_frequencies_of_the_responses(tmp_path):
    run("editflow", tmp_path, "--x0_sampler uniform[length:6] --max_steps 2")
    model, tokenizer = checkpoints.load(tmp_path), load_tokenizer(tmp_path / "checkpoint-final")
    records, _, _ = data.load_records("toy[train:48,test:6]", 42)
    ids = [i for r in records for i in [*tokenizer.encode(r["response"]), tokenizer.eos_id]]
    expected = torch.bincount(torch.tensor(ids), minlength=tokenizer.vocab_size) / len(ids)
    torch.testing.assert_close(model.unigram, expected)


def test_a_model_with_more_rows_than_tokens_keeps_them(tmp_path):
    """Published embeddings are often rounded up."""
    rows = toy.tokenizer().vocab_size + 7
    save_checkpoint(tmp_path / "wide", rows=rows)
    out = tmp_path / "out"
    run("editflow", out, f"--model_name_or_path {tmp_path}/wide --x0_sampler uniform[length:6] --max_steps 1")
    assert checkpoints.load(out).unigram.shape == (rows,)


PAIRS = [{"prompt": f"Count to {n}.", "response": "0123456789" * n} for n in (1, 9)] * 20


def lengths(tmp_path, monkeypatch, flags) -> set:
    """(tokens of the prompt, of the response) of what is trained on."""
    seen, prepare = set(), editflow.prepare

    def watched(model, examples, *args):
        seen.update((len(e.prompt), len(e.response)) for e in examples)
        return prepare(model, examples, *args)

    monkeypatch.setattr(editflow, "prepare", watched)
    file = jsonl(tmp_path / "pairs.jsonl", *PAIRS)
    run("editflow", tmp_path / "out", f"--dataset_args {file}[test:0] --vocab_size 300 --max_length 60 {flags}")
    monkeypatch.undo()
    return seen


def test_long_dialogues_are_left_out_or_lose_their_end(tmp_path, monkeypatch):
    short = lengths(tmp_path, monkeypatch, "--max_steps 5")
    ((prompt, response),) = short
    flags = "--max_steps 5 --truncation right --overwrite_output_dir"
    assert lengths(tmp_path, monkeypatch, flags) == {(prompt, response), (prompt, 60 - prompt)}


def test_prompts_can_be_learned(tmp_path, monkeypatch):
    ((prompt, response),) = lengths(tmp_path, monkeypatch, "--max_steps 5")
    flags = "--max_steps 5 --mask_prompt_loss False --overwrite_output_dir"
    assert lengths(tmp_path, monkeypatch, flags) == {(1, prompt - 1 + response)}


@pytest.mark.parametrize("streaming", ["", "--streaming"])
def test_several_files_and_patterns(streaming, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    for name in ("a1.jsonl", "a2.jsonl", "b/c.jsonl"):
        jsonl(tmp_path / name, *PAIRS)
    files = f"{tmp_path}/a*.jsonl[test:10] {tmp_path}/b/c.jsonl"
    flags = f"--vocab_size 300 --max_length 200 --max_steps 2 {streaming}"
    assert run("editflow", tmp_path / "out", f"{flags} --train_file {files}") == 0
    state = json.loads((tmp_path / "out/checkpoint-final/train_state.json").read_text())
    assert state["args"]["dataset_args"] == files.replace(" ", " + ")
    said = capsys.readouterr().err
    assert streaming or ("70 dialogues" in said and "38 dialogues" in said)


def test_a_pattern_that_fits_no_file(tmp_path, refused):
    line = refused(f"--method editflow --train_file {tmp_path}/*.jsonl --output_dir {tmp_path}/out")
    assert f"{tmp_path}/*.jsonl: no such file" in line


TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "fox.txt"
    file.write_text(TEXT)
    return file


def test_a_text_brings_its_own_tokenizer(corpus, tmp_path):
    run("editflow", tmp_path, f"--dataset_args {corpus} --max_length 16 --vocab_size 320 --max_steps 2")
    tokenizer = load_tokenizer(tmp_path / "checkpoint-final")
    assert 256 < checkpoints.load(tmp_path).config.vocab_size == tokenizer.vocab_size <= 320
    assert len(tokenizer.encode(" quick")) == 1, "trained on this text"
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_file_called_toys_is_not_the_toy_task(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toys.txt").write_text(TEXT)
    run("editflow", tmp_path / "out", "--dataset_args toys.txt --max_length 16 --vocab_size 300 --max_steps 1")
    assert checkpoints.load(tmp_path / "out").config.vocab_size == 300


# ---------------------------------------------------------------------------------------------------- stop, go on


def signal_at(step, number, monkeypatch, times=1):
    """A real signal to this process while that step is logged."""
    write = train.Log.write_when_due

    def interrupted(log, at, lr):
        write(log, at, lr)
        if at == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(train.Log, "write_when_due", interrupted)
    return lambda: monkeypatch.setattr(train.Log, "write_when_due", write)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_stopped_run_saves_says_where_and_goes_on_bit_for_bit(method, number, tmp_path, monkeypatch, capsys):
    flags = "--max_steps 8 --eval_steps 4 --gradient_accumulation_steps 2"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(method, whole, flags)
    undo = signal_at(5, number, monkeypatch)
    capsys.readouterr()
    status = run(method, parts, flags)
    assert status == (130 if number == signal.SIGINT else 0)
    assert f"stopped at step 5; saved in {parts}/checkpoint-5; the same command goes on" in capsys.readouterr().err
    assert not (parts / "checkpoint-final").exists()
    undo()
    assert run(method, parts, flags) == 0
    assert "continuing" in capsys.readouterr().err
    assert metrics(parts) == metrics(whole)
    assert same_weights(parts / "checkpoint-final", whole / "checkpoint-final")


def test_a_run_killed_at_once_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    """A second Ctrl-C does not wait for anything; neither does a power cut."""
    flags = "--max_steps 8 --save_steps 3"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("editflow", whole, flags)
    undo = signal_at(5, signal.SIGINT, monkeypatch, times=2)
    with pytest.raises(KeyboardInterrupt):
        run("editflow", parts, flags)
    undo()
    assert [c.name for c in checkpoints.checkpoints(parts)] == ["checkpoint-3"]
    with open(parts / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "lo')  # the line that was being written
    run("editflow", parts, flags)
    assert metrics(parts) == metrics(whole)
    assert same_weights(parts / "checkpoint-final", whole / "checkpoint-final")


@pytest.fixture
def full_disk():
    """Calls a function while no file may grow beyond 20 kB: writing fails as it does on a full disk."""

    def call(function, *args, **kwargs):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            return function(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return call


@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_a_save_that_fails_leaves_the_older_checkpoint_whole(where, tmp_path, monkeypatch, full_disk):
    flags = "--max_steps 6 --save_steps 2 --save_total_limit 1"
    save, calls = checkpoints.save_file, []

    def second_fails(tensors, file, **options):
        calls.append(file)
        fails = sum(where in str(file) for file in calls) == 2 and where in str(file)
        return full_disk(save, tensors, file, **options) if fails else save(tensors, file, **options)

    monkeypatch.setattr(checkpoints, "save_file", second_fails)
    with pytest.raises(OSError, match=f"{tmp_path}/checkpoint-4: cannot be saved .*the same command goes on"):
        run("editflow", tmp_path, flags)
    assert [c.name for c in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2"]
    checkpoints.load(tmp_path)
    run("editflow", tmp_path, flags)
    assert [c.name for c in checkpoints.checkpoints(tmp_path)] == ["checkpoint-final"]
    assert not list(tmp_path.glob(".writing*"))


def test_only_so_many_checkpoints_are_kept(tmp_path):
    run("editflow", tmp_path, "--max_steps 6 --save_steps 1 --save_total_limit 2 --eval_strategy no")
    assert [c.name for c in checkpoints.checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-final"]


def test_a_finished_run_is_not_trained_further_unless_overwritten(tmp_path):
    run("editflow", tmp_path, "--max_steps 2")
    before = metrics(tmp_path)
    run("editflow", tmp_path, "--max_steps 2")
    assert metrics(tmp_path) == before
    run("editflow", tmp_path, "--max_steps 3 --seed 7 --overwrite_output_dir")
    assert [line["step"] for line in lines_of(tmp_path) if "loss" in line] == [1, 2, 3]
    assert metrics(tmp_path)[0] != before[0]


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("editflow", tmp_path, "--max_steps 3 --report_to tensorboard")
    run("editflow", tmp_path, "--max_steps 5 --report_to tensorboard")  # and a run that goes on
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "loss_ins", "lr", "eval_loss"):
        expected = {line["step"]: line[name] for line in lines_of(tmp_path) if name in line}
        assert {e.step: e.value for e in board.Scalars(name)} == pytest.approx(expected)


def test_wandb_holds_what_metrics_jsonl_holds_and_a_run_that_goes_on_goes_on_there(tmp_path, monkeypatch):
    started, logged = [], {}

    def init(**options):
        started.append(options)
        return SimpleNamespace(log=lambda record, step: logged.setdefault(step, {}).update(record))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError, __spec__=1))
    for steps in (3, 5):
        run("editflow", tmp_path, f"--max_steps {steps} --report_to wandb --eval_steps 1")
    for line in lines_of(tmp_path):
        assert line.items() <= logged[line["step"]].items()
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["dir"] == tmp_path
    assert started[0]["config"]["max_steps"] == 3


def test_wandb_that_cannot_start_is_one_line(tmp_path, monkeypatch, refused):
    def init(**options):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError, __spec__=1))
    flags = f"{TOY} --method editflow --max_steps 1 --report_to wandb --output_dir"
    assert "--report_to wandb: no API key" in refused(f"{flags} {tmp_path}/out")


# ---------------------------------------------------------------------------------------------------- many processes


def subprocess_train(flags, launcher=""):
    """train.py as it is called on the command line, in a process of its own (without this file's smaller `tiny`)."""
    return subprocess.Popen(
        [sys.executable, *launcher.split(), str(ROOT / "train.py"), *flags.split()],
        env=os.environ | ALONE,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_compute_what_one_does_with_accumulation(method, tmp_path, monkeypatch):
    monkeypatch.undo()  # the preset as the other processes know it
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = f"{TOY} {QUICK} {METHODS[method]} --max_steps 4"
    flags += " --eval_samples 0 --eval_steps 2 --per_device_eval_batch_size 3"
    launcher = "-m torch.distributed.run --nproc_per_node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0"
    two = subprocess_train(f"{flags} --output_dir {tmp_path}/two", launcher)
    train.main(f"{flags} --output_dir {tmp_path}/one --gradient_accumulation_steps 2".split())
    _, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-4)
    a, b = weights(tmp_path / "one/checkpoint-final"), weights(tmp_path / "two/checkpoint-final")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-3


@pytest.mark.slow
def test_ctrl_c_and_errors_as_the_shell_sees_them(tmp_path):
    bad = subprocess_train(f"{TOY} --method editflow --schedule quartic --output_dir {tmp_path}/bad")
    out, flags = tmp_path / "out", f"--max_steps 100000 --eval_strategy no --output_dir {tmp_path}/out"
    run = subprocess_train(f"{TOY} {QUICK} {METHODS['editflow']} {flags}")
    while run.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 130, err
    assert "Traceback" not in err
    (saved,) = checkpoints.checkpoints(out)
    assert f"saved in {saved}" in err
    assert checkpoints.load(out).config.nanoedit["method"] == "editflow"

    _, err = bad.communicate(timeout=300)
    assert bad.returncode == 2
    assert "argument --schedule/--scheduler_cls: schedule 'quartic' is not known" in err.splitlines()[-1]
    assert "Traceback" not in err


# ---------------------------------------------------------------------------------------------------- bad input


def test_an_output_directory_that_cannot_be_written_is_found_first(tmp_path, refused, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data, "load_records", lambda *a, **k: pytest.fail("the data were read first"))
    for out in (tmp_path / "file", tmp_path / "file/out", tmp_path / "file/a/b"):
        for extra in ("", "--overwrite_output_dir"):
            line = refused(f"--method editflow --output_dir {out} {extra}")
            assert line.startswith(f"--output_dir {out}: cannot be written to")


def test_data_that_cannot_be_used(tmp_path, refused):
    def with_data(spec, more=""):
        flags = f"--method editflow --output_dir {tmp_path}/out --vocab_size 300 --max_steps 1 {more}"
        return refused(f"{flags} --dataset_args {spec}")

    (tmp_path / "empty.txt").write_text(" \n")
    assert "empty.txt" in with_data(tmp_path / "empty.txt")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in with_data(tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": "broken\n{"text": "fine"}\n')
    assert f"{tmp_path}/broken.jsonl:2: not JSON" in with_data(tmp_path / "broken.jsonl")
    lacking = jsonl(tmp_path / "lacking.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "a"})
    assert f"{lacking}:2: field 'response' must be text" in with_data(lacking)
    assert "missing.txt: no such file" in with_data(tmp_path / "missing.txt")
    (tmp_path / "short.txt").write_text("far too short\n" * 3)
    assert "fewer than one example of --max_length 512" in with_data(tmp_path / "short.txt")
    long = jsonl(tmp_path / "long.jsonl", *[{"prompt": "abc " * 9, "response": "def " * 9}] * 3)
    assert "longer than --max_length 8" in with_data(long, "--max_length 8")
    assert "dataset spec" in with_data("toy[trian:5]")
    assert "nothing to train on" in with_data("toy[train:0,test:2]")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--schedule quartic", "schedule 'quartic' is not known; choose from linear, cosine, cubic"),
        ("--x0_sampler noise", "choose from empty, masks[length:NUMBER], uniform[length:NUMBER], draft"),
        ("--x0_sampler masks[length:1.5]", "length must be a whole number"),
        ("--preset huge", "--preset 'huge' is not known; choose from tiny, small, medium, 280m, 1.3b"),
        ("--min_t 0.6 --max_t 0.5", "--min_t 0.6 must be below --max_t 0.5"),
        ("--pad_len 700", "--pad_len 700 must not exceed --max_length 512"),
        ("--bf16 maybe", "--bf16: expected True or False, got 'maybe'"),
    ],
)
def test_what_is_said_about_flags_that_cannot_be(flags, said, tmp_path, refused):
    """That they are refused at all: test_bad_input.py."""
    assert said in refused(f"--method editflow --dataset_args toy[train:48,test:6] --output_dir {tmp_path} {flags}")


@pytest.fixture
def toy_checkpoint(tmp_path):
    """An untrained Edit Flows model of the toy task."""
    return save_checkpoint(tmp_path / "start")


def test_checkpoints_that_do_not_fit(toy_checkpoint, tmp_path, refused):
    def with_model(method):
        data = "--dataset_args toy[train:48,test:6] --max_steps 1"
        return refused(f"--method {method} --output_dir {tmp_path}/out --model_name_or_path {toy_checkpoint} {data}")

    assert "this is a checkpoint of method 'editflow', but 'medlm' is asked for" in with_model("medlm")
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.save(toy_checkpoint)
    assert "300" in with_model("editflow"), "a tokenizer with more tokens than the model has rows"
    (toy_checkpoint / "tokenizer.json").unlink()
    assert f"no tokenizer in {toy_checkpoint}" in with_model("editflow")
    (toy_checkpoint / "model.safetensors").write_bytes(b"\0" * 50)
    assert "model.safetensors: truncated or corrupt" in with_model("editflow")


def test_a_run_of_the_other_method_in_the_output_directory(tmp_path, refused):
    run("editflow", tmp_path, "--max_steps 1")
    line = refused(f"--method medlm --output_dir {tmp_path}")
    assert "this is a checkpoint of method 'editflow'" in line


def test_a_truncated_optimizer_file_is_named(tmp_path, refused):
    run("editflow", tmp_path, "--max_steps 1")
    file = tmp_path / "checkpoint-final/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    line = refused(f"--method editflow --output_dir {tmp_path} --max_steps 2")
    assert str(file) in line


def test_time_conditioning_is_not_silently_ignored(toy_checkpoint, tmp_path, refused):
    flags = f"--method editflow --model_name_or_path {toy_checkpoint} --output_dir {tmp_path}/out --max_steps 1"
    line = refused(f"{flags} --time_conditioned")
    assert "--time_conditioned" in line


def test_sequences_beyond_absolute_positions_are_one_line(tmp_path, refused):
    save_encoder(tmp_path / "bert", "editflow", "bert", positions=20)
    flags = f"--model_name_or_path {tmp_path}/bert --output_dir {tmp_path}/out --max_steps 2"
    line = refused(f"--method editflow --x0_sampler masks[length:16] --dataset_args toy[train:48,test:6] {flags}")
    assert "20 positions" in line


def test_overwriting_waits_until_the_new_run_can_start(tmp_path, refused):
    out = tmp_path / "out"
    run("editflow", out, "--max_steps 1")
    flags = f"--method editflow --overwrite_output_dir --output_dir {out}"
    refused(f"{flags} --dataset_args nowhere.jsonl")
    assert "would delete" in refused(f"{flags} --dataset_args toy[train:48,test:6] --model_name_or_path {out}")
    assert (out / "checkpoint-final/model.safetensors").is_file()
    assert run("editflow", out, "--max_steps 2 --overwrite_output_dir") == 0
    assert [line["step"] for line in lines_of(out) if "loss" in line] == [1, 2]


def test_a_finished_run_is_left_as_it_is(tmp_path, capsys):
    run("editflow", tmp_path, "--max_steps 1")
    before = (tmp_path / "checkpoint-final/model.safetensors").stat().st_mtime_ns
    assert run("editflow", tmp_path, "--max_steps 1") == 0
    assert "is finished, at step 1 of 1" in capsys.readouterr().err
    assert (tmp_path / "checkpoint-final/model.safetensors").stat().st_mtime_ns == before


def test_seconds_go_on_where_a_run_goes_on(tmp_path):
    run("editflow", tmp_path, "--max_steps 3")
    run("editflow", tmp_path, "--max_steps 5")
    seconds = [line["seconds"] for line in lines_of(tmp_path) if "seconds" in line]
    assert len(seconds) == 5
    assert seconds == sorted(seconds)


def test_special_tokens_inside_held_out_responses_are_found_before_the_first_step(tmp_path, refused):
    folder = tmp_path / "split"
    folder.mkdir()
    pair = {"prompt": "Count to three.", "response": "one two three"}
    jsonl(folder / "train.jsonl", *[pair] * 40)
    jsonl(folder / "test.jsonl", pair | {"response": "one <|del|> three"})
    flags = "--method medlm --vocab_size 300 --max_length 96 --max_steps 2 --intermediate_ratio 1 --raw_control_tokens"
    line = refused(f"{flags} --train_file {folder} --output_dir {tmp_path}/out")
    assert "del token" in line
    assert "one" in line
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_long_held_out_samples_are_left_out_and_counted(tmp_path, capsys):
    folder = tmp_path / "split"
    folder.mkdir()
    pair = {"prompt": "Count.", "response": "one two three"}
    jsonl(folder / "train.jsonl", *[pair] * 40)
    jsonl(folder / "test.jsonl", pair | {"response": "one two " * 200})
    run("editflow", tmp_path / "out", f"--dataset_args {folder} --vocab_size 300 --max_length 60 --max_steps 1")
    assert "1 held-out samples longer than --max_length 60 left out" in capsys.readouterr().err


def test_a_damaged_train_state_is_named(tmp_path, refused):
    run("editflow", tmp_path, "--max_steps 1")
    (tmp_path / "checkpoint-final/train_state.json").write_text("{")
    line = refused(f"--method editflow --output_dir {tmp_path}")
    assert "checkpoint-final/train_state.json" in line


def test_the_optimizer_flags_reach_the_optimizer(tmp_path):
    """Gradients clipped to nearly nothing move nothing, where AdamW divides them by its epsilon; so what is left of a
    step is the weight decay."""
    kept, shrunk = (tmp_path / name for name in ("kept", "shrunk"))
    flags = "--max_steps 1 --max_grad_norm 1e-16 --learning_rate 0.1 --eval_strategy no --adam_beta2 0.75 --seed 7"
    run("editflow", kept, flags)
    run("editflow", shrunk, f"{flags} --weight_decay 0.5")
    new = checkpoints.new_model("editflow", "tiny", toy.tokenizer().vocab_size, seed=7).model.state_dict()
    for directory, share in ((kept, 1.0), (shrunk, 1 - 0.1 * 0.5)):
        for name, tensor in checkpoints.load(directory / "checkpoint-final").model.state_dict().items():
            expected = new[name] * (share if tensor.ndim > 1 else 1.0)
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=f"{directory.name}: {name}")
    moments = load_file(kept / "checkpoint-final/optimizer.safetensors")
    (name,) = [name for name in moments if name.endswith("rate_heads.0.bias.exp_avg")]
    m, v = moments[name], moments[name.removesuffix("avg") + "avg_sq"]
    torch.testing.assert_close(v / (1 - 0.75), (m / (1 - 0.9)) ** 2, rtol=1e-4, atol=0)


def test_every_micro_batch_draws_for_itself_and_a_step_shares_one_generator(tmp_path, monkeypatch):
    keys, generators = [], train.generators
    monkeypatch.setattr(train, "generators", lambda *key: keys.append(key) or generators(*key))
    run("editflow", tmp_path, "--max_steps 2 --gradient_accumulation_steps 3 --seed 5 --eval_strategy no")
    assert keys == [(5, step, micro_batch) for step in range(2) for micro_batch in range(3)]

    own, shared = {}, {}
    for key in itertools.product((0, 5), range(4), range(4)):
        mine, ours = generators(*key)
        own[key], shared[key] = mine.initial_seed(), ours.initial_seed()
        assert torch.initial_seed() == own[key], "dropout follows from it, too"
    assert len(set(own.values())) == len(own)
    assert all(shared[a] == shared[b] for a in shared for b in shared if a[:2] == b[:2])
    assert len({*shared.values(), *own.values()}) == len(own) + 8


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_takes_the_mean_over_micro_batches(method, tmp_path, monkeypatch):
    """The same micro-batch twice, with the same noise, is the step with it once."""
    generators, take = train.generators, feed.MemoryFeed.take
    monkeypatch.setattr(train, "generators", lambda seed, step, micro_batch: generators(seed, step, 0))
    monkeypatch.setattr(feed.MemoryFeed, "take", lambda self: take(self)[:1] * self.args.gradient_accumulation_steps)
    for n in (1, 2):
        run(method, tmp_path / str(n), f"--max_steps 1 --gradient_accumulation_steps {n} --eval_strategy no")
    (once,), (twice,) = (lines_of(tmp_path / n) for n in ("1", "2"))
    assert (twice["loss"], twice["grad_norm"]) == pytest.approx((once["loss"], once["grad_norm"]), rel=1e-5)


def test_progress_rises_through_a_run_and_the_end_of_it_is_evaluated(tmp_path, monkeypatch):
    seen, prepare = [], medlm.prepare
    monkeypatch.setattr(medlm, "prepare", lambda *args: seen.append(args[3]) or prepare(*args))
    run("medlm", tmp_path, "--max_steps 4 --eval_steps 3 --per_device_eval_batch_size 6")
    assert seen == [0.0, 0.25, 0.5, 1.0, 0.75, 1.0]  # 1.0: of evaluations, after 3 steps and after the last
    assert [line["step"] for line in lines_of(tmp_path) if "eval_loss" in line] == [3, 4]


def test_every_held_out_example_counts_alike(tmp_path):
    """5 examples in batches of 2, 2 and 1, whose loss is their number: 9 / 5, and not 5 / 3."""
    prepare = lambda model, examples, *_: torch.tensor(float(len(examples)))  # noqa: E731
    one = SimpleNamespace(
        args=SimpleNamespace(per_device_eval_batch_size=2), feed=SimpleNamespace(eval=[None] * 5), settings=None,
        ranks=parallel.Ranks(), stop=SimpleNamespace(check=lambda: None), model=lambda f, *args: f(None, *args),
        method=SimpleNamespace(prepare=prepare, loss=lambda model, n: (n, {"twice": 2 * n})),
    )  # fmt: skip
    assert train.evaluate(one) == pytest.approx({"eval_loss": 9 / 5, "eval_twice": 18 / 5})


def test_a_line_of_metrics_is_the_mean_over_the_steps_since_the_one_before(tmp_path):
    for every in (1, 3):
        run("medlm", tmp_path / str(every), f"--max_steps 6 --logging_steps {every} --eval_strategy no")
    each, some = lines_of(tmp_path / "1"), lines_of(tmp_path / "3")
    assert [line["step"] for line in some] == [3, 6]
    for line, three in zip(some, (each[:3], each[3:])):
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(sum(one[name] for one in three) / 3)


def test_an_epoch_ends_with_an_evaluation(tmp_path):
    run("editflow", tmp_path, "--num_train_epochs 2 --eval_strategy epoch")  # 48 examples, 8 to a step
    assert [line["step"] for line in lines_of(tmp_path) if "eval_loss" in line] == [6, 12]


def test_a_run_that_is_longer_than_asked_for_is_finished(tmp_path, capsys):
    run("editflow", tmp_path, "--max_steps 3 --eval_strategy no")
    assert run("editflow", tmp_path, "--max_steps 2 --eval_strategy no") == 0
    assert "is finished, at step 3 of 2" in capsys.readouterr().err
