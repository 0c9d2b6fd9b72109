"""recipes/plan.py against real steps on the CPU, alone and in two processes that share a model."""

import ctypes
import json
import os
import resource
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import parallel
from plumbing import checkpoints, methods
from ragged import Ragged, weighted_nll

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

import plan

MIB = 2**20
KEPT = ("Parameter", "Sharded Param", "Optstate", "OptState")  # from step to step


def planned(text: str) -> dict[str, int]:
    return plan.step(plan.flags().parse_args(text.split()))


def real_loss(model, x: Ragged, heads) -> torch.Tensor:
    """Every row has a label of every vocabulary head, the most there can be."""
    hidden, row = model.model(x), torch.arange(len(x.ids))
    return sum(weighted_nll(hidden, model.get_submodule(h), row, x.ids, torch.ones(len(row))) for h in heads)


def real_run(rank: int, text: str, port: int, pipe) -> None:
    """One process of a training run. Sends the bytes that a step takes at most beyond what is kept between steps."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: tensors that are freed go back to the system at once
    args = plan.flags().parse_args(text.split())
    rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": args.gpus}
    os.environ.update({name: str(value) for name, value in rendezvous.items()})
    with parallel.Ranks() as ranks:
        plain = checkpoints.new_model(args.method, args.model, args.vocab_size)
        plain.model.gradient_checkpointing = args.gradient_checkpointing
        model = parallel.ParallelModel(plain, args.parallel, ranks, args.reshard_after_forward)
        optimizer = parallel.adamw(plain, lr=1e-4, beta2=0.98, weight_decay=0.01)

        def step(rows: int, length: int) -> None:
            x = Ragged.pack([[0] * length] * rows)
            for m in range(args.gradient_accumulation_steps):
                with model.micro_batch(last=m == args.gradient_accumulation_steps - 1):
                    model(real_loss, x, methods.get(args.method).HEADS).backward()
            optimizer.step()
            model.zero_grad()

        step(1, 2)  # makes the moments, loads what libraries load
        step(1, 2)
        held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        step(args.per_device_train_batch_size, args.max_length)
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "text",
    [
        "--method editflow --gpus 1 --per_device_train_batch_size 8",
        "--method medlm --gpus 1 --per_device_train_batch_size 8 --gradient_checkpointing",
        "--method medlm --gpus 2 --parallel fsdp --gradient_accumulation_steps 2 --gradient_checkpointing",
        "--method medlm --gpus 2 --parallel zero1",
        "--method medlm --gpus 2 --parallel ddp --gradient_accumulation_steps 2",
    ],
)
def test_the_peak_of_a_real_step_is_within_ten_percent(text):
    text = f"--model medium --max_length 64 --per_device_train_batch_size 4 {text}"
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    start, gpus = mp.get_context("forkserver"), plan.flags().parse_args(text.split()).gpus
    ours, theirs = zip(*(mp.Pipe() for _ in range(gpus)))
    processes = [start.Process(target=real_run, args=(rank, text, port, theirs[rank])) for rank in range(gpus)]
    for process in processes:
        process.start()
    real = ours[0].recv()
    for process in processes:
        process.join()
    peak = planned(text)
    expected = peak["Total"] - sum(peak.get(name, 0) for name in KEPT)
    if "ddp" in text:
        expected -= peak["Parameter"]  # the gradients are in DDP's buckets before the step
    print(f"{text}: planned {expected / MIB:.0f} MiB, measured {real / MIB:.0f} MiB")
    assert real > 60 * MIB
    assert expected == pytest.approx(real, rel=0.1)


def test_weights_and_moments_of_llada_8b():
    """8.02e9 weights by its model card, and a second head of 126464 x 4096; float32, a share of each for a GPU."""
    peak, weights = planned("--gpus 64 --bf16 --gradient_checkpointing --max_length 64"), 8.02e9 + 126464 * 4096
    assert peak["Sharded Param"] == pytest.approx(4 * weights / 64, rel=0.002)
    assert peak["OptState"] == pytest.approx(2 * peak["Sharded Param"], rel=0.002)


def test_sharding_divides_what_is_kept_and_checkpointing_what_is_not():
    texts = ("--gpus 8", "--gpus 64", "--gpus 8 --gradient_checkpointing", "--gpus 8 --parallel ddp")
    eight, many, light, ddp = (planned(f"--model small --bf16 --max_length 512 {text}") for text in texts)
    assert eight["Sharded Param"] == pytest.approx(8 * many["Sharded Param"], rel=0.02)
    assert ddp["Parameter"] == pytest.approx(8 * eight["Sharded Param"], rel=0.02)
    assert ddp["Gradient"] == pytest.approx(ddp["Parameter"], rel=0.02)
    assert light["Activation"] < eight["Activation"] / 2


@pytest.mark.parametrize("more", ["--gpus 1 --lora", "--parallel ddp --lora --load_in_4bit", "--lora --load_in_4bit"])
def test_only_what_is_trained_has_moments(more):
    whole, adapted = (planned(f"--model small --bf16 --max_length 64 {text}") for text in ("--gpus 1", more))
    moments = adapted.get("Optstate", adapted.get("OptState"))
    assert moments < whole["Optstate"] / 2
    assert adapted["Total"] < whole["Total"]


@pytest.mark.parametrize("kind", ["modernbert", "bert", "qwen3"])
def test_a_config_file_can_be_planned(tmp_path, kind):
    raw = {"model_type": kind, "vocab_size": 999, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 96, "max_position_embeddings": 512}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert planned(f"--model {tmp_path} --method editflow --gpus 2 --bf16 --max_length 256")["Total"] > 0


def test_a_model_that_is_not_there():
    with pytest.raises(OSError, match=r"config\.json: missing"):
        planned("--model nix")
