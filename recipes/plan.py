"""How much memory a training step needs on every GPU, worked out before any GPU is rented.

    python recipes/plan.py --model llada-8b --gpus 8 --parallel fsdp --bf16 --gradient_checkpointing
    python recipes/plan.py --table --bf16 --gradient_checkpointing             LLaDA-8B on 1, 8 and 64 GPUs

The real model, spread by parallel.py, runs forward and backward on *fake tensors*, which have a shape and a type but no
contents, in a fake group of processes that sends nothing; the trackers of torch.distributed._tools watch every storage
come and go. AdamW's moments are there, as from the second step on. Fake tensors are the CPU's and cannot do all that a
GPU does, so `attend` and `HeadLoss` below stand in, and DDP is its gradient buckets. Not in it: the CUDA context,
buffers of NCCL and cuBLAS, holes between allocations (about 4 GiB); rollouts and generation, which take less.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # FSDP would put its pieces on a GPU where it sees one
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention.varlen import varlen_attn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import lora
import models
import parallel
import ragged
from plumbing import checkpoints, cli, methods

LLADA_8B = {
    "model_type": "llada", "vocab_size": 126464, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "intermediate_size": 12288, "max_position_embeddings": 4096,
}  # fmt: skip
TRAINED = {
    "all weights": {}, "all weights, 2 micro-batches": {"gradient_accumulation_steps": 2}, "LoRA": {"lora": True},
    "LoRA, 4 bits": {"lora": True, "load_in_4bit": True},
}  # fmt: skip
SPREAD = {"1 GPU": (1, "ddp"), "ddp": (8, "ddp")} | {
    f"{gpus} GPUs, {name}": (gpus, mode) for gpus in (8, 64) for name, mode in (("ZeRO-2", "zero1"), ("ZeRO-3", "fsdp"))
}


def to_product(t: torch.Tensor) -> torch.Tensor:
    """In the type in which matrix products are computed."""
    return t.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else t


def attend(q, k, v, cu_seqlens, max_seqlen, window=None):
    """`models.attend` as on a GPU; a window changes the time, not the memory."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (to_product(z) for z in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


class HeadLoss(torch.autograd.Function):
    """Takes the memory of `weighted_nll` with a label on every row, the most there can be: the gradients of hidden
    [T, D] and W [V, D] from the forward pass on, and logits in chunks."""

    @staticmethod
    def forward(ctx, hidden, W):
        H, W_ = to_product(hidden), to_product(W)
        ctx.gradients = torch.zeros_like(hidden), torch.zeros_like(W)
        for rows in H.split(max(1, ragged.CHUNK_FLOATS // len(W))):
            logits = (rows @ W_.T).float()
            logits = to_product(logits)
            ctx.gradients[1].add_(logits.T @ rows)
            logits @ W_
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        gradients, ctx.gradients = ctx.gradients, None
        return gradients


def loss(model, x, heads):
    hidden = model.model(x)
    return sum(HeadLoss.apply(hidden.clone(), model.get_submodule(head).weight) for head in heads)


def build(args) -> torch.nn.Module:
    if args.model == "llada-8b":
        config = checkpoints.complete_config(LLADA_8B)
    elif args.model in models.PRESETS:
        sizes = {"model_type": "llama", "vocab_size": args.vocab_size} | models.PRESETS[args.model]
        config = checkpoints.complete_config(sizes)
    else:
        config = checkpoints.read_config(Path(args.model))
    config.nanoedit["method"] = args.method
    model = checkpoints.build(config)
    if args.lora:
        lora.LoRALinear.to = lambda layer, device: layer  # fake tensors refuse to move
        lora.add(model, args.lora_r, four_bit=args.load_in_4bit)
    model.model.gradient_checkpointing = args.gradient_checkpointing
    return model


def freeze(module) -> None:
    """Makes buffers of frozen weights, because MemTracker asks every parameter for a gradient."""
    for m in module.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            if not p.requires_grad:
                delattr(m, name)
                m.register_buffer(name, p.detach())


def step(args) -> tuple[dict[str, int], float]:
    """Bytes on a GPU by owner, "Total" among them, when they are most; floating-point operations of a step."""
    models.attend = attend
    is_sharded, micro_batches = args.gpus > 1 and args.parallel != "ddp", args.gradient_accumulation_steps
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.gpus)
    with FakeTensorMode() as fake:
        model = build(args)
    if is_sharded:
        ranks = SimpleNamespace(world=args.gpus)
        callee = parallel.ParallelModel(model, args.parallel, ranks, args.reshard_after_forward).callee
    else:
        callee = parallel.Callee(model)
    optimizer = parallel.adamw(model, lr=1e-4, beta2=0.98, weight_decay=0.01)
    rows, T = args.per_device_train_batch_size, args.per_device_train_batch_size * args.max_length

    def micro_batch():
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            value = callee(loss, x, methods.get(args.method).HEADS)
        value.backward()

    with fake:
        for p in (trained := [p for p in model.parameters() if p.requires_grad]):
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes the moments
        optimizer.zero_grad(set_to_none=is_sharded or args.gpus == 1)  # DDP's gradients stay where they are
        x = SimpleNamespace(ids=torch.zeros(T, dtype=torch.int64), positions=torch.zeros(T, dtype=torch.int64))
        x.cu_seqlens, x.max_seqlen = torch.zeros(rows + 1, dtype=torch.int32), args.max_length
        if not is_sharded:
            freeze(callee)
        tracker = FSDPMemTracker(callee, optimizer) if is_sharded else MemTracker()
        tracker.track_external(callee, optimizer)
        with tracker:
            for m in range(min(micro_batches, 2)):  # the third is like the second
                if is_sharded:
                    callee.set_requires_gradient_sync(m == micro_batches - 1)
                micro_batch()
                tracker.reset_mod_stats()
        with FlopCounterMode(display=False) as counter:
            micro_batch()
    dist.destroy_process_group()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {getattr(owner, "value", owner): size for owner, size in peak.items()}, micro_batches * counter.get_total_flops()


def main():
    f = cli.Flags("Memory of a training step per GPU, computed with fake tensors.")
    f.text("--model", default="llada-8b", help=f"llada-8b, {', '.join(models.PRESETS)}, or a folder with a config.json")
    f.integer("--vocab_size", low=1, default=4096, help="of a preset")
    f.choice("--method", choices=list(methods.METHODS), default="medlm", help="what is trained")
    f.integer("--gpus", low=1, default=8, help="processes, one GPU each")
    f.choice("--parallel", choices=parallel.MODES, default="fsdp", help="how the model is spread")
    f.flag("--reshard_after_forward", default=True, help="fsdp: let a block's weights go after its forward pass")
    f.flag("--gradient_checkpointing", help="recompute activations block by block")
    f.flag("--bf16", help="bf16 autocast")
    f.flag("--lora", help="train low-rank additions and the heads")
    f.integer("--lora_r", low=1, default=32, help="their rank")
    f.flag("--load_in_4bit", help="with --lora: the matrices of the blocks in 4 bits")
    f.integer("--max_length", low=1, default=2048, help="tokens of a sample")
    f.integer("--per_device_train_batch_size", low=1, default=1, help="samples per GPU and micro-batch")
    f.integer("--gradient_accumulation_steps", low=1, default=1, help="micro-batches per step")
    f.number("--tflops", above=0, default=495, help="what matrix products reach: half an H100's peak in bf16")
    f.flag("--table", help="GiB per GPU for every way to train and to spread the model")
    args = f.parse_args()
    if args.table:
        print(f"| {args.model} | {' | '.join(SPREAD)} |\n| --- |{' --- |' * len(SPREAD)}")
        for name, settings in TRAINED.items():
            cells = []
            for gpus, mode in SPREAD.values():
                peak, _ = step(SimpleNamespace(**vars(args) | settings | {"gpus": gpus, "parallel": mode}))
                cells.append(f"{peak['Total'] / 2**30:.0f}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        return
    peak, operations = step(args)
    for owner, size in sorted(peak.items(), key=lambda item: item[1]):
        print(f"{owner:16} {size / 2**30:8.2f} GiB")
    print(f"{operations:.2e} operations a step: at least {operations / args.tflops / 1e12:.2f} s; exchanges not counted")


if __name__ == "__main__":
    cli.run(main)
