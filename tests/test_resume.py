"""A run may be killed at any moment: restarted with the same command, it goes on as if nothing had happened."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fleet import ALONE, Fleet, metrics, run
from safetensors.torch import load_file

import train
from plumbing import checkpoints

TOY = "--dataset_args toy[train:64,test:7] --max_length 64 --learning_rate 1e-3 --eval_samples 0 --max_steps 40"
OFTEN = "--logging_steps 3 --eval_steps 10 --save_steps 4"  # so that a checkpoint often falls between two lines
KINDS = {
    "editflow": f"{TOY} {OFTEN} --method editflow --x0_sampler masks[length:8] --per_device_train_batch_size 4",
    "medlm": (
        f"{TOY} {OFTEN} --method medlm --pad_len 8 --per_device_train_batch_size 2 --intermediate_ratio 0.5 "
        "--max_diffusion_steps 3 --min_t 0.1"
    ),
}


def waits_in_a_save(rank):
    """While a file `hold` lies beside the output, the run does not get past the n-th file or folder that it saves; n is
    what `hold` says, and `held` appears there.
    """
    sync, hold, saved = checkpoints.sync, Path(sys.argv[-1]).with_name("hold"), []
    limit = int(hold.read_text()) if hold.exists() else None

    def held(path):
        saved.append(path)
        while limit and len(saved) >= limit and hold.exists():
            hold.with_name("held").touch()
            time.sleep(0.01)
        sync(path)

    checkpoints.sync = held


def logged(out):
    """Lines of metrics.jsonl."""
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "world", "mode", "more"),
    [
        ("editflow", 1, "ddp", "--time_conditioned"),
        ("medlm", 1, "ddp", "--gradient_accumulation_steps 2"),
        ("editflow", 2, "ddp", ""),
        ("medlm", 2, "zero1", ""),
        ("editflow", 2, "fsdp", "--gradient_accumulation_steps 2"),
        ("medlm", 2, "fsdp", ""),
        ("editflow", 4, "ddp", ""),  # sums of three and more depend on their order
    ],
)
def test_kill_9_at_any_moment_changes_nothing(kind, world, mode, more, tmp_path):
    flags = f"{KINDS[kind]} --parallel {mode} {more}"
    run(flags, tmp_path / "undisturbed", world)
    out, rng, kills = tmp_path / "killed", random.Random(world), 0
    hold, held = tmp_path / "hold", tmp_path / "held"
    for attempt in range(4):
        in_a_save = bool(attempt % 2)
        hold.write_text(str(rng.randint(1, 12) if in_a_save else 25))  # about two saves, so that no run ends too soon
        fleet, seen = Fleet(flags, out, world, waits_in_a_save), logged(out)
        fleet.until(held.exists if in_a_save else lambda seen=seen: held.exists() or logged(out) > seen)
        assert held.exists() or not in_a_save, fleet.said()
        time.sleep(0 if in_a_save else rng.uniform(0, 0.15))
        fleet.kill(None if attempt < 2 else world - 1)  # all at once, or one alone: the others must follow
        hold.unlink()
        kills += -signal.SIGKILL in fleet.wait()
        held.unlink(missing_ok=True)
    run(flags, out, world)
    assert kills == 4
    assert metrics(out) == metrics(tmp_path / "undisturbed")
    a, b = (load_file(path / "checkpoint-final/model.safetensors") for path in (out, tmp_path / "undisturbed"))
    assert all((a[k] == b[k]).all() for k in b)
    assert [file.name for file in out.glob(".*")] == [".lock"], "nothing half written is left behind"


@pytest.mark.slow
@pytest.mark.parametrize("number", [12 + 7 + 2, 12 + 2], ids=["in a step", "in an evaluation"])
def test_sigterm_saves_before_the_next_micro_batch(number, tmp_path):
    """Three steps of four micro-batches are followed by an evaluation of seven."""
    flags = f"{KINDS['editflow']} --logging_steps 1 --eval_steps 3 --per_device_eval_batch_size 1"
    flags += " --gradient_accumulation_steps 4 --max_steps 9"
    run(flags, tmp_path / "undisturbed")
    out, calls = tmp_path / "out", tmp_path / "calls"
    fleet = Fleet(flags, out, perturb=functools.partial(waits_in_a_loss, number))
    fleet.until(lambda: calls.exists() and calls.stat().st_size == number)
    fleet.kill(number=signal.SIGTERM)
    (tmp_path / "go").touch()
    assert fleet.wait() == [0], fleet.said()
    assert "stopped at step 3" in fleet.said()
    assert calls.stat().st_size == number, "no other micro-batch is begun"
    run(flags, out)
    assert metrics(out) == metrics(tmp_path / "undisturbed")


def waits_in_a_loss(number, rank):
    """In the file `calls` beside the output, a byte stands for each micro-batch; that of this number waits for `go`."""
    import editflow

    loss, out = editflow.loss, Path(sys.argv[-1])

    def held(*args, **kwargs):
        with out.with_name("calls").open("a") as calls:
            calls.write(".")
        while out.with_name("calls").stat().st_size == number and not out.with_name("go").exists():
            time.sleep(0.01)
        return loss(*args, **kwargs)

    editflow.loss = held


@pytest.mark.slow
def test_kill_9_while_the_metrics_are_trimmed_or_the_final_checkpoint_is_replaced(tmp_path):
    out = tmp_path / "out"
    flags = f"{KINDS['editflow']} --logging_steps 1 --save_steps 10000 --save_total_limit 1 --eval_strategy no"
    flags += " --lr_scheduler_type constant"
    run(f"{flags} --max_steps 30", tmp_path / "undisturbed")
    run(f"{flags} --max_steps 10", out)
    (out / ".writing-metrics.jsonl").write_text('{"step": 1, "lo')
    fleet = Fleet(f"{flags} --max_steps 20", out, perturb=killed_in_the_last_rename)
    assert fleet.wait() == [-signal.SIGKILL], fleet.said()
    run(f"{flags} --max_steps 30", out)
    assert metrics(out) == metrics(tmp_path / "undisturbed")
    assert [c.name for c in checkpoints.checkpoints(out)] == ["checkpoint-final"]


def killed_in_the_last_rename(rank):
    replace = os.replace

    def kill(source, target):
        if str(source).endswith(".writing-checkpoint-final"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = kill


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("told", ["launcher", "everyone, at once and again"])
def test_a_signal_to_torchrun_reaches_the_checkpoint(told, number, tmp_path):
    """As a cluster stops a job: the launcher is told, and tells its processes; or all of them are."""
    out, root = tmp_path / "out", os.path.dirname(train.__file__)
    flags = f"{KINDS['medlm']} --max_steps 9999 --save_steps 9999 --output_dir {out}"
    launch = "-m torch.distributed.run --nproc_per_node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0"
    job = subprocess.Popen(
        [sys.executable, *f"{launch} {root}/train.py {flags}".split()],
        env=os.environ | ALONE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "metrics.jsonl").exists() and job.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    for _ in range(1 if told == "launcher" else 5):
        for pid in [job.pid] if told == "launcher" else [job.pid, *map(int, children)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.002)
    _, err = job.communicate(timeout=300)  # which waits for the processes, too: they hold the pipe
    assert "stopped at step" in err
    assert 'train.py", line' not in err, "tracebacks are the launcher's own"
    assert len(checkpoints.checkpoints(out)) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_ends_the_run_and_spares_the_last_good_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = "--save_total_limit 9 --save_steps 2 --eval_strategy no"
    flags = f"{KINDS['editflow']} {size}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("no mount here")
    try:
        fleet = Fleet(flags, disk / "out", 2)
        assert fleet.wait() == [1, 1], fleet.said()
        error = fleet.logs[0].read_text().splitlines()[-1]
        assert "No space left on device" in error, fleet.said()
        assert "goes on from the last checkpoint" in error
        assert "Traceback" not in fleet.said()
        saved = checkpoints.checkpoints(disk / "out")
        assert saved
        shutil.copytree(disk / "out", tmp_path / "out")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    run(flags, tmp_path / "undisturbed", 2)
    run(flags, tmp_path / "out", 2)  # there is room again
    assert metrics(tmp_path / "out") == metrics(tmp_path / "undisturbed")


# ---------------------------------------------------------------------------------------------------- not finite


def never_finite(rank):
    import editflow

    loss, calls = editflow.loss, []

    def after_five(*args, **kwargs):
        calls.append(1)
        value, parts = loss(*args, **kwargs)
        return (value / 0 if len(calls) > 5 else value), parts

    editflow.loss = after_five


@pytest.mark.slow
def test_ten_steps_in_a_row_that_are_not_finite_end_the_run_and_the_batch_is_saved(tmp_path):
    out = tmp_path / "out"
    fleet = Fleet(f"{KINDS['editflow']} --logging_steps 1 --eval_strategy no --save_steps 5", out, perturb=never_finite)
    assert fleet.wait() == [1]
    error = fleet.said().splitlines()[-1]
    file = out / "not-finite-step-15-rank-0.json"
    assert "not finite in 10 steps in a row" in error
    assert str(file) in error
    assert fleet.said().count("skipped: loss or gradient not finite") == 10
    examples = json.loads(file.read_text())
    assert len(examples) == 4
    assert all("apples" in e["text"] and e["response"] for e in examples)
    run(f"{KINDS['editflow']} --logging_steps 1 --eval_strategy no --save_steps 5", out)
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["skipped_steps"] == 5, "those after the checkpoint at step 10 were made after all"


def twice_not_finite(rank):
    import editflow

    loss, calls = editflow.loss, []

    def some(*args, **kwargs):
        calls.append(1)
        value, parts = loss(*args, **kwargs)
        return (value * float("nan") if len(calls) in (3, 7) else value), parts

    editflow.loss = some


@pytest.mark.slow
def test_a_skipped_step_leaves_weights_and_moments_as_they_were(tmp_path):
    out = tmp_path / "out"
    run(f"{KINDS['editflow']} --logging_steps 1 --eval_strategy no", out, perturb=twice_not_finite)
    lines = metrics(out)
    assert [line["step"] for line in lines if "loss" not in line] == [3, 7]
    assert lines[-1]["skipped_steps"] == 2
    assert all(line["loss"] > 0 for line in lines if "loss" in line)
    moments = load_file(out / "checkpoint-final/optimizer.safetensors")
    assert {float(m) for name, m in moments.items() if name.endswith(".step")} == {38.0}
