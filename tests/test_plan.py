"""plan.py against runs that are possible here: real steps on the CPU, and real processes that share a model."""

import argparse
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
from torch._subclasses.fake_tensor import FakeTensorMode

import editflow
import lora
import medlm
import parallel
import plan
from parallel import LossModule
from plumbing import checkpoints
from ragged import Ragged

MIB = 2**20


def flags(text: str):
    parser = argparse.ArgumentParser()
    plan.add_flags(parser)
    args = parser.parse_args(text.split())
    plan.check(args)
    return args


# ---------------------------------------------------------------------------------------------------- real steps


def real_batch(args):
    """(loss, its arguments): every token has a label for each vocabulary head, as in plan.fake_loss."""
    B, L = args.per_device_train_batch_size, args.max_length
    x, row = Ragged.pack([list(range(L))] * B), torch.arange(B * L)
    t, length = torch.full((B,), 0.5), torch.full((B,), L)
    if args.method == "editflow":
        none = torch.zeros(B, dtype=torch.int64)
        batch = editflow.PathBatch(x, t, none, length, row, row, row, row, row[:0])
        return editflow.loss, batch, editflow.schedule("linear")
    inner = row[x.positions > 0]
    return medlm.mask_loss, medlm.MaskBatch(x, t, length, inner, inner)


def real_run(rank: int, texts: list[str], port: int, pipe) -> None:
    """One process of some runs. Sends of each the bytes of its weights, of its moments, and what a step of train.py
    takes beyond them at most (of the first run alone: the system remembers only the highest peak)."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: tensors that are freed go back to the system at once
    rendezvous, world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}, flags(texts[0]).gpus
    os.environ.update(rendezvous, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    with parallel.Ranks() as ranks:
        pipe.send([measured(text, ranks) for text in texts])


def measured(text: str, ranks) -> tuple[int, int, int]:
    args, few = flags(text), flags(f"{text} --max_length 2 --per_device_train_batch_size 1")
    module, call, optimizer = real_model(args, ranks)
    real_step(few, module, call, optimizer)  # makes the moments, loads what libraries load
    if args.parallel != "fsdp":
        real_step(few, module, call, optimizer)  # DDP makes its buckets anew after the first step
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    real_step(args, module, call, optimizer)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return *bytes_of(module, parallel.moments(optimizer)), most - held


def real_model(args, ranks):
    model = checkpoints.new_model(args.method, args.model, args.vocab_size)
    model.model.gradient_checkpointing = args.gradient_checkpointing
    if args.lora:
        lora.add(model, args.lora_r, four_bit=args.load_in_4bit)
    module = LossModule(model)
    call = parallel.distribute(module, args.parallel, ranks, args.reshard_after_forward)
    return module, call, parallel.adamw(model, args.parallel, ranks, lr=1e-4, beta2=0.98, weight_decay=0.01)


def real_step(args, module, call, optimizer) -> None:
    for m in range(args.gradient_accumulation_steps):
        with parallel.accumulating(call, last=m == args.gradient_accumulation_steps - 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16, cache_enabled=False):
                loss, _ = call(*real_batch(args))
            loss.backward()
    parallel.clip_gradients([p for p in module.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    parallel.clear_gradients(call)


def bytes_of(module, moments) -> tuple[int, int]:
    weights = [plan.local(t) for t in (*module.parameters(), *module.buffers())]
    states = [plan.local(t) for state in moments.values() for t in state.values()]
    return sum(map(plan.size_of, weights)), sum(map(plan.size_of, states))


def real_runs(texts: list[str]) -> list[list[tuple[int, int, int]]]:
    """What each process has, in the order of ranks, of each run. All runs are of as many processes as the first."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    pipes, start = [mp.Pipe() for _ in range(flags(texts[0]).gpus)], mp.get_context("forkserver")
    start.set_forkserver_preload(["torch", "plan"])  # imported once, not by every process
    processes = [start.Process(target=real_run, args=(r, texts, port, pipes[r][1])) for r in range(len(pipes))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [ours.recv() for ours, _ in pipes]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "text",
    [
        "--method editflow --gpus 1",
        "--method medlm --gpus 1 --gradient_checkpointing",
        "--method medlm --gpus 2 --parallel fsdp --gradient_accumulation_steps 2 --gradient_checkpointing",
        "--method editflow --gpus 2 --parallel zero1 --gradient_accumulation_steps 2",
    ],
)
def test_the_peak_of_a_real_step_is_within_ten_percent(text):
    text = f"--model medium --max_length 64 --per_device_train_batch_size {8 if '--gpus 1' in text else 4} {text}"
    args, ((_, _, real),) = flags(text), real_runs([text])[0]
    ledger = plan.simulate(args, on_gpu=False)
    planned = ledger.peak.total() - ledger.peak["parameters"] - ledger.peak["optimizer state"]
    if args.parallel == "zero1":  # the gradients, in DDP's buckets, are there before the step
        planned -= ledger.peak["parameters"]
    print(f"{text}: planned {planned / MIB:.0f} MiB, measured {real / MIB:.0f} MiB")
    assert real > 80 * MIB
    assert planned == pytest.approx(real, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("gpus", [2, 4])
def test_weights_and_moments_are_to_the_byte_those_of_real_processes(gpus):
    """1003 tokens: nothing divides evenly."""
    more = ["fsdp", "zero1", "fsdp --lora", "zero1 --lora --load_in_4bit"][: 8 // gpus]
    texts = [f"--model tiny --vocab_size 1003 --gpus {gpus} --max_length 8 --parallel {mode}" for mode in more]
    runs = real_runs(texts)
    for i, text in enumerate(texts):
        planned, real = [], [run[i][:2] for run in runs]
        for rank in range(gpus):
            with plan.pretend(gpus, rank):
                module, optimizer = plan.prepare(flags(text), FakeTensorMode())
                planned.append(bytes_of(module, optimizer.state))
        if "zero1" in text:  # the plan is for the process with the largest share
            planned, real = planned[:1], [max(real)]
        assert planned == real, text


# ---------------------------------------------------------------------------------------------------- on paper


def test_large_models_have_the_published_sizes():
    """LLaDA 8.02B with one head, Dream 7.62B (their model cards)."""
    for name, published in (("llada-8b", 8.02e9), ("dream-7b", 7.62e9)):
        args = flags(f"--model {name}")
        module = plan.build(args, FakeTensorMode())
        second_head = module.model.next_token_head.weight.numel()
        assert sum(p.numel() for p in module.parameters()) - second_head == pytest.approx(published, rel=0.002)


def test_sharding_divides_what_is_kept_and_checkpointing_what_is_not():
    ledgers = {}
    for text in ("--gpus 8", "--gpus 64", "--gpus 8 --gradient_checkpointing", "--gpus 8 --parallel zero1"):
        ledgers[text] = plan.simulate(flags(f"--model small --bf16 --max_length 512 {text}"))
    eight, many, light, zero1 = (ledger.peak for ledger in ledgers.values())
    assert eight["parameters"] == pytest.approx(8 * many["parameters"], rel=0.02)
    assert zero1["parameters"] == pytest.approx(8 * eight["parameters"], rel=0.02)
    assert zero1["gradients"] >= zero1["parameters"]
    assert light["activations"] < eight["activations"] / 2
    assert light["parameters"] == eight["parameters"]
    computing, recomputing = (ledgers[k].spans["backward"] for k in list(ledgers)[::2])
    assert recomputing.compute > computing.compute


def test_times_by_hand():
    args = flags("--gpus 16 --gpus_per_node 8 --link 100 --network 10 --bf16 --flops 100")
    assert plan.exchange(1.6e9, args) == pytest.approx(max(1.5 / 100, 0.8 / 80))
    args.network = 1
    assert plan.exchange(1.6e9, args) == pytest.approx(0.1)
    assert plan.exchange(1e9, flags("--gpus 1")) == 0
    assert plan.peak_flops(args) == 50e12
    q = torch.empty(6, 4, 8)
    assert plan.attention_flops((q, q, q, None, None, 3, 3, False, None, [-1, -1]), False) == 2 * 2 * 6 * 3 * 4 * 8
    span = plan.Span(compute=2.0, hidden=3.0, exposed=0.5)
    assert span.seconds == 3.5


def test_rollouts_make_as_many_passes_as_the_longest_response_takes():
    args = flags("--stage 3 --gpus 8 --mask_diffusion_pred_per_step 1 --max_length 2048")
    fills, edits = plan.rollout_passes(args)
    assert fills == 32
    assert edits < 4  # 2048 masks leave one of 32 passes at most, unless t is tiny on some process
    few = flags("--stage 3 --gpus 1 --mask_diffusion_pred_per_step 10 --max_length 2000 --sample_length 10")
    assert plan.rollout_passes(few)[0] == 1
    assert plan.rollout_passes(few)[1] == pytest.approx(32 / 4, rel=0.1)  # progress and share are both U[0, 1]


def test_a_report_of_a_config_file_and_what_cannot_be_planned(tmp_path, capsys):
    raw = {"model_type": "qwen3", "vocab_size": 999, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16,
           "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for model in (tmp_path, tmp_path / "config.json"):
        text = f"--model {model} --method medlm --stage 3 --gpus 2 --bf16 --gradient_accumulation_steps 2"
        plan.main(flags(text))
        out = capsys.readouterr().out
        assert "2 x fsdp" in out
        assert "mask pass, earlier micro-batches" in out
        assert "fits" in out
    for text, message in (
        ("--model nix", "--model 'nix' is not known"),
        ("--load_in_4bit", "--load_in_4bit needs --lora"),
        ("--max_length 9999", "--max_length 9999 is more than the model's 4096 positions"),
        ("--max_length 64 --sample_length 65", "--sample_length 65 must not exceed --max_length 64"),
        (f"--model {tmp_path}/nix/config.json", "config.json: missing"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            flags(text)


@pytest.mark.parametrize("kind", ["modernbert", "bert"])
def test_encoders_can_be_planned(tmp_path, kind):
    raw = {"model_type": kind, "vocab_size": 999, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 96, "max_position_embeddings": 512}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    text = f"--model {tmp_path} --method editflow --gpus 2 --bf16 --max_length 256 --sample_length 100"
    assert plan.simulate(flags(text)).peak.total() > 0
