"""Many processes compute what one does, in every mode, and none waits for another."""

import datetime
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fleet import ALONE, Fleet, forkserver, metrics, run
from safetensors.torch import load_file

import parallel
from plumbing import checkpoints

ROOT = Path(parallel.__file__).parent

TOY = "--dataset_args toy[train:64,test:7] --max_length 64 --learning_rate 1e-3 --logging_steps 1 --eval_samples 1 "
KINDS = {
    "editflow": "--method editflow --x0_sampler masks[length:8] --per_device_train_batch_size 4",
    "mask": "--method medlm --pad_len 8 --per_device_train_batch_size 2 --loss_norm bound",
    "rollout": (
        "--method medlm --pad_len 8 --per_device_train_batch_size 2 --intermediate_ratio 1 --max_diffusion_steps 4 "
        "--min_t 0.1"
    ),
}
MODES = {
    "ddp": "--parallel ddp",
    "fsdp": "--parallel fsdp",
    "zero1": "--parallel zero1",  # the same as fsdp with --reshard_after_forward False
}


def same(a: list[dict], b: list[dict], tolerance=1e-4) -> None:
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for one, other in zip(a, b):
        assert one == pytest.approx(other, rel=tolerance, abs=1e-7)


# ---------------------------------------------------------------------------------------------------- the same figures


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_1_2_and_4_processes_have_the_same_losses(kind, tmp_path):
    flags = f"{TOY} {KINDS[kind]} --max_steps 12 --eval_steps 6 --per_device_eval_batch_size 3"
    run(f"{flags} --gradient_accumulation_steps 4", tmp_path / "one")
    expected = metrics(tmp_path / "one")
    assert len(expected) == 14
    for mode, world in (("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("zero1", 4)):
        out = tmp_path / f"{mode}{world}"
        run(f"{flags} {MODES[mode]} --gradient_accumulation_steps {4 // world}", out, world)
        same(metrics(out), expected)
        a, b = (load_file(path / "checkpoint-final/model.safetensors") for path in (out, tmp_path / "one"))
        assert max((a[k] - b[k]).abs().max() for k in b) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero1", "fsdp"])
def test_lora_and_checkpointing_change_nothing_about_it(mode, tmp_path):
    run(f"{TOY} {KINDS['mask']} --max_steps 2", tmp_path / "base")
    flags = f"{TOY} {KINDS['mask']} --max_steps 8 --model_name_or_path {tmp_path}/base --lora --lora_r 4"
    flags += " --gradient_checkpointing --lora_dropout 0.3"
    run(f"{flags} --gradient_accumulation_steps 2", tmp_path / "one")
    run(f"{flags} {MODES[mode]}", tmp_path / "two", 2)
    same(metrics(tmp_path / "two"), metrics(tmp_path / "one"))
    a, b = (load_file(tmp_path / run / "checkpoint-final/adapter_model.safetensors") for run in ("one", "two"))
    assert max((a[k] - b[k]).abs().max() for k in b) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["editflow", "rollout"])
def test_bf16_in_every_mode(kind, tmp_path):
    """A parameter without its gradient would show in the norm, whatever the rounding."""
    flags = f"{TOY} {KINDS[kind]} --bf16 --max_steps 3 --eval_strategy no"
    run(f"{flags} --gradient_accumulation_steps 2", tmp_path / "one")
    for mode in MODES:
        run(f"{flags} {MODES[mode]}", tmp_path / mode, 2)
        for line, expected in zip(metrics(tmp_path / mode), metrics(tmp_path / "one"), strict=True):
            for name in ("loss", "grad_norm"):
                assert line[name] == pytest.approx(expected[name], rel=0.05), (mode, name)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    flags = f"{TOY} {KINDS['rollout']} --max_steps 12 --save_steps 6 --logging_steps 4 --save_total_limit 9"
    run(f"{flags} --parallel zero1 --gradient_accumulation_steps 2", tmp_path / "two", 2)
    for world, mode in ((1, "ddp"), (4, "fsdp")):
        out = tmp_path / f"{mode}{world}"
        shutil.copytree(tmp_path / "two", out)
        shutil.rmtree(out / "checkpoint-final")
        run(f"{flags} --parallel {mode} --gradient_accumulation_steps {4 // world}", out, world)
        same(metrics(out), metrics(tmp_path / "two"))


# ---------------------------------------------------------------------------------------------------- exchanges


def exchanges(rank, directory, mode, micro_batches):
    """Writes how many times gradients are exchanged in a step of so many micro-batches."""
    import models
    from plumbing import checkpoints

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    ranks = parallel.Ranks.__new__(parallel.Ranks)
    ranks.rank, ranks.world, ranks.device = rank, 2, torch.device("cpu")
    model = parallel.ParallelModel(checkpoints.new_model("editflow", "tiny", 50), mode, ranks)

    def loss(model):
        rope, x = models.rotary(torch.arange(4), 32, 1e4), models.Ragged.pack([[1, 2, 3, 4]])
        outside = [p for name, p in model.named_parameters() if ".layers." not in name]
        blocks = [layer(torch.ones(4, 128), rope, x) for layer in model.model.layers]
        return sum((y * y).sum() for y in outside + blocks)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for m in range(micro_batches):
            with model.micro_batch(last=m == micro_batches - 1):
                model(loss).backward()
    names = [event.name for event in profile.events()]
    counted = sum("allreduce" in name or "reduce_scatter" in name for name in names if name.startswith("c10d::"))
    if rank == 0:
        (directory / f"{mode}-{micro_batches}").write_text(str(counted))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("mode", parallel.MODES)
def test_accumulation_exchanges_gradients_once_a_step(mode, tmp_path):
    for n in (1, 4):
        processes = [forkserver.Process(target=exchanges, args=(r, tmp_path, mode, n)) for r in range(2)]
        for p in processes:
            p.start()
        for p in processes:
            p.join(300)
            assert p.exitcode == 0
        (tmp_path / "meet").unlink(missing_ok=True)
    one, four = (int((tmp_path / f"{mode}-{n}").read_text()) for n in (1, 4))
    assert one == four > 0


# ---------------------------------------------------------------------------------------------------- disagreement


def uneven_texts(rank):
    """One rank's drafts need one pass and are right; the others start from nothing but masks, and never finish."""
    import medlm

    draw_masks, propose_edits = medlm.draw_masks, medlm.propose_edits

    def draw(x, t, generator):
        rows = draw_masks(x, t * 0 + 1, generator)
        return rows[:1] if rank == 1 else rows

    def propose(*args):
        op, sub, ins = propose_edits(*args)
        return (op * 0, sub, ins * 0 - 1) if rank == 1 else (op, sub, ins)

    medlm.draw_masks, medlm.propose_edits = draw, propose


def not_finite_on_rank_1(rank):
    import medlm

    loss_of, calls = medlm.loss, []

    def loss(*args):
        calls.append(1)
        value, parts = loss_of(*args)
        return (value * float("nan") if rank == 1 and len(calls) == 3 else value), parts

    medlm.loss = loss


def out_of_memory_on_rank_1(rank):
    import medlm

    loss_of, calls = medlm.loss, []

    def loss(*args):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            raise MemoryError("rank 1 is full")
        return loss_of(*args)

    medlm.loss = loss


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_ranks_that_disagree_on_every_count_finish(mode, tmp_path):
    """Masks, fill passes, edit passes, tokens, held-out batches (5 for 4 processes) and the last batch all differ."""
    flags = f"{TOY} {KINDS['rollout']} {MODES[mode]} --per_device_train_batch_size 1 --max_steps 8 --eval_steps 4"
    flags += " --dataset_args toy[train:61,test:5] --per_device_eval_batch_size 1 --max_diffusion_steps 6"
    run(flags, tmp_path / "out", 4, uneven_texts)
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(mode, tmp_path):
    out = tmp_path / "out"
    run(f"{TOY} {KINDS['mask']} {MODES[mode]} --max_steps 5 --eval_strategy no", out, 2, not_finite_on_rank_1)
    lines = metrics(out)
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 1, 1]
    assert "loss" not in lines[2]
    assert all(line["loss"] > 0 for line in lines[3:])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(mode, tmp_path):
    out = tmp_path / "out"
    fleet = Fleet(f"{TOY} {KINDS['mask']} {MODES[mode]} --max_steps 100000 --eval_strategy no", out, 2)
    fleet.until((out / "metrics.jsonl").exists)
    fleet.kill(1, signal.SIGTERM)
    assert fleet.wait() == [0, 0], fleet.said()
    assert "stopped at step" in fleet.logs[0].read_text()


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_and_is_the_one_shown(tmp_path):
    fleet = Fleet(f"{TOY} {KINDS['mask']} --max_steps 50", tmp_path / "out", 2, out_of_memory_on_rank_1)
    assert fleet.wait() == [1, 1]
    assert fleet.logs[1].read_text().splitlines()[-1] == "train.py: error: rank 1: rank 1 is full"
    last = fleet.logs[0].read_text().splitlines()[-1]
    assert last.startswith("rank 0 ends, because another process did"), fleet.said()
    assert "Traceback" not in fleet.said()


@pytest.mark.slow
def test_an_error_that_all_ranks_meet_is_said_once(tmp_path):
    fleet = Fleet("--method editflow --dataset_args nowhere.jsonl", tmp_path / "out", 4)
    assert fleet.wait() == [1] * 4
    assert sum("nowhere.jsonl" in log.read_text() for log in fleet.logs) == 1


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_the_others_with_it(tmp_path):
    out = tmp_path / "out"
    fleet = Fleet(f"{TOY} {KINDS['mask']} --max_steps 100000 --eval_strategy no", out, 3)
    fleet.until((out / "metrics.jsonl").exists)
    fleet.kill(2)
    assert fleet.wait() == [1, 1, -signal.SIGKILL], fleet.said()
    assert "the connection to another process, which has died, is lost" in fleet.said()
    assert "Traceback" not in fleet.said()


# ---------------------------------------------------------------------------------------------------- signals

HANDLER = """
import signal, time, parallel
parallel.StopSignal(parallel.Ranks())
signal.signal(signal.SIGALRM, lambda *_: exit(7))
print("ready", flush=True)
while True:
    "the loop of a run"
"""


@pytest.mark.slow
def test_ten_thousand_pairs_of_signals_do_not_stop_a_process():
    """The second of a pair interrupts the handler of the first: a lock in it would never be released."""
    run = subprocess.Popen([sys.executable, "-c", HANDLER], cwd=ROOT, env=os.environ | ALONE, stdout=subprocess.PIPE)
    try:
        assert run.stdout.readline() == b"ready\n"
        for _ in range(10_000):
            run.send_signal(signal.SIGTERM)
            run.send_signal(signal.SIGTERM)
            time.sleep(0.0002)
        run.send_signal(signal.SIGALRM)
        assert run.wait(60) == 7
    finally:
        run.kill()
        run.stdout.close()


@pytest.mark.slow
def test_every_process_answers_sigusr1_with_its_stack(tmp_path):
    out = tmp_path / "out"
    fleet = Fleet(f"{TOY} {KINDS['mask']} --max_steps 100000 --eval_strategy no", out, 2)
    fleet.until((out / "metrics.jsonl").exists)
    fleet.kill(number=signal.SIGUSR1)
    fleet.until(lambda: all("in train" in log.read_text() for log in fleet.logs))
    fleet.kill(0, signal.SIGTERM)
    assert fleet.wait() == [0, 0], "and goes on"


def of_little_patience(rank):
    parallel.LIMIT = datetime.timedelta(seconds=3)


def stands_still(rank):
    def clip_gradients(*_):
        time.sleep(3600)

    of_little_patience(rank)
    if rank == 1:
        parallel.ParallelModel.clip_gradients = clip_gradients


@pytest.mark.slow
def test_a_process_that_stands_still_is_not_waited_for_and_says_where(tmp_path):
    fleet = Fleet(f"{TOY} {KINDS['mask']} --max_steps 9", tmp_path / "out", 2, stands_still)
    fleet.until(lambda: not fleet.processes[0].is_alive())
    fleet.kill(1)
    assert fleet.wait() == [1, -signal.SIGKILL], fleet.said()
    assert "in clip_gradients" in fleet.logs[1].read_text()
    assert fleet.logs[0].read_text().splitlines()[-1].startswith("rank 0 ends: it has waited 0:00:03 for another")


def saves_for_long(rank):
    of_little_patience(rank)
    save = checkpoints.save
    checkpoints.save = lambda *args: (time.sleep(5), save(*args))


@pytest.mark.slow
def test_saving_may_take_longer_than_a_step(tmp_path):
    run(f"{TOY} {KINDS['mask']} --max_steps 2 --eval_strategy no --save_steps 1", tmp_path / "out", 2, saves_for_long)
    assert len(metrics(tmp_path / "out")) == 2


def after_a_step(gradient, **settings):
    """A linear layer of ones after one step of AdamW with the same gradient everywhere, and the optimizer."""
    model = torch.nn.Linear(3, 2)
    for p in model.parameters():
        torch.nn.init.ones_(p)
        p.grad = torch.full_like(p, gradient)
    optimizer = parallel.adamw(model, **settings)
    optimizer.step()
    return model, optimizer


def test_weight_decay_shrinks_matrices_and_leaves_vectors_alone():
    model, _ = after_a_step(0.0, lr=0.5, beta2=0.98, weight_decay=0.1)
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 3), 1 - 0.5 * 0.1))
    assert torch.equal(model.bias.detach(), torch.ones(2))


def test_the_optimizer_has_the_betas_that_are_asked_for():
    model, optimizer = after_a_step(2.0, lr=0.5, beta2=0.75, weight_decay=0.0)
    for p in model.parameters():
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full_like(p, (1 - 0.9) * 2))
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], torch.full_like(p, (1 - 0.75) * 2**2))


def test_gradients_are_clipped_to_the_norm_and_what_it_was_comes_back():
    model = torch.nn.Linear(3, 1, bias=False)
    handle = parallel.ParallelModel(model, "ddp", parallel.Ranks())
    for max_norm, left in ((1.0, 1.0), (10.0, 3.0)):
        model.weight.grad = torch.tensor([[2.0, 2.0, 1.0]])
        assert float(handle.clip_gradients(max_norm)) == pytest.approx(3.0)
        assert float(model.weight.grad.norm()) == pytest.approx(left, rel=1e-5)
