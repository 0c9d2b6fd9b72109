"""How much memory a training step needs on every GPU, worked out before any GPU is rented.

    python recipes/plan.py --model llada-8b --gpus 8 --parallel fsdp --bf16 --gradient_checkpointing

The real model, spread by parallel.py, runs forward and backward on *fake tensors*, which have a shape and a type but no
contents, in a fake group of processes that sends nothing; the trackers of torch.distributed._tools watch every storage
come and go. AdamW's moments are there, as from the second step on. Fake tensors are the CPU's and cannot do all that a
GPU does, so `attend` and `HeadLoss` stand in, and DDP is its gradient buckets. Not in it: the CUDA context, buffers of
NCCL and cuBLAS, holes between allocations (about 4 GiB); rollouts and generation, which take less.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # FSDP would put its pieces on a GPU where it sees one
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

import lora
import models
import parallel
import ragged
from plumbing import checkpoints, cli, methods

LLADA_8B = {
    "model_type": "llada", "vocab_size": 126464, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "intermediate_size": 12288,
}  # fmt: skip
SIZES = models.PRESETS | {"llada-8b": LLADA_8B}


def attend(q, k, v, cu_seqlens, max_seqlen, window=None):
    """`models.attend` in the memory of a GPU: flash attention over sequences of equal length."""
    q, k, v = (z.unflatten(0, (-1, max_seqlen)).transpose(1, 2) for z in (q.to(v.dtype), k.to(v.dtype), v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(0, 1)


class HeadLoss(torch.autograd.Function):
    """`weighted_nll` in memory, with a label on every row: gradients from the forward pass on, logits in chunks."""

    @staticmethod
    def forward(ctx, hidden, W):
        ctx.gradients = torch.zeros_like(hidden), torch.zeros_like(W)
        for rows in hidden.split(max(1, ragged.CHUNK_FLOATS // len(W))):
            logits = F.linear(rows, W).float()
            ctx.gradients[1].add_(logits.T @ rows)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        gradients, ctx.gradients = ctx.gradients, None
        return gradients


def loss(model, x, heads):
    hidden = model.model(x)
    return sum(HeadLoss.apply(hidden.clone(), model.get_submodule(head).weight) for head in heads)


def build(args) -> torch.nn.Module:
    if args.model in SIZES:
        sizes = {"model_type": "llama", "vocab_size": args.vocab_size} | SIZES[args.model]
        config = checkpoints.complete_config(sizes)
    else:
        config = checkpoints.read_config(Path(args.model))
    config.nanoedit["method"] = args.method
    model = checkpoints.build(config)
    if args.lora:
        lora.LoRALinear.to = lambda layer, device: layer  # fake tensors refuse to move
        lora.add(model, four_bit=args.load_in_4bit)
    model.model.gradient_checkpointing = args.gradient_checkpointing
    return model


def freeze(module) -> None:
    """Makes buffers of frozen weights, because MemTracker asks every parameter for a gradient."""
    for m in module.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            if not p.requires_grad:
                delattr(m, name)
                m.register_buffer(name, p.detach())


def step(args) -> dict[str, int]:
    """What lies in a GPU's memory when it is fullest: owner -> bytes, "Total" among them."""
    models.attend = attend
    is_sharded, rows, L = args.gpus > 1 and args.parallel != "ddp", args.per_device_train_batch_size, args.max_length
    with FakeTensorMode() as fake:
        model = build(args)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.gpus)
    callee, ranks = parallel.Callee(model), SimpleNamespace(world=args.gpus)
    if is_sharded:
        callee = parallel.ParallelModel(model, args.parallel, ranks, args.reshard_after_forward).callee
    optimizer = parallel.adamw(model, lr=1e-4, beta2=0.95, weight_decay=0.1)
    with fake:
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()  # makes the moments
        optimizer.zero_grad(set_to_none=is_sharded or args.gpus == 1)  # DDP's gradients stay where they are
        ids = torch.zeros(rows * L, dtype=torch.int64)
        x = SimpleNamespace(ids=ids, positions=ids, cu_seqlens=None, max_seqlen=L)
        if not is_sharded:
            freeze(callee)
        tracker = FSDPMemTracker(callee, optimizer) if is_sharded else MemTracker()
        tracker.track_external(callee, optimizer)
        with tracker:  # of many micro-batches, those between the first and the last are like the first
            for is_last in (False, True) if args.gradient_accumulation_steps > 1 else (True,):
                if is_sharded:
                    callee.set_requires_gradient_sync(is_last)
                with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16, cache_enabled=False):
                    value = callee(loss, x, methods.get(args.method).HEADS)
                value.backward()
                tracker.reset_mod_stats()
    dist.destroy_process_group()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {getattr(owner, "value", owner): size for owner, size in peak.items() if size}


def flags() -> cli.Flags:
    f = cli.Flags("Memory of a training step per GPU, computed with fake tensors.")
    f.text("--model", default="llada-8b", help=f"{', '.join(SIZES)}, or a folder with a config.json")
    f.integer("--vocab_size", low=1, default=4096, help="of a preset")
    f.choice("--method", choices=list(methods.METHODS), default="medlm", help="what is trained")
    f.integer("--gpus", low=1, default=8, help="processes, one GPU each")
    f.choice("--parallel", choices=parallel.MODES, default="fsdp", help="how the model is spread")
    f.flag("--reshard_after_forward", default=True, help="fsdp: let a block's weights go after its forward pass")
    f.flag("--gradient_checkpointing", help="recompute activations block by block")
    f.flag("--bf16", help="bf16 autocast")
    f.flag("--lora", help="train low-rank additions and the heads")
    f.flag("--load_in_4bit", help="with --lora: the matrices of the blocks in 4 bits")
    f.integer("--max_length", low=1, default=2048, help="tokens of a sample, or of a packed row")
    f.integer("--per_device_train_batch_size", low=1, default=1, help="samples (rows) per GPU and micro-batch")
    f.integer("--gradient_accumulation_steps", low=1, default=1, help="micro-batches per step")
    return f


def main():
    peak = step(flags().parse_args())
    for owner, size in sorted(peak.items(), key=lambda item: item[1]):
        print(f"{owner:16} {size / 2**30:8.2f} GiB")


if __name__ == "__main__":
    cli.run(main)
