"""One model on many processes: who am I, what is kept where, and how the pieces come together for a checkpoint.

What each of N processes keeps of a model with P parameters in float32, in bytes:

                      weights    gradients   AdamW's moments
    ddp               4 P        4 P         8 P               everything everywhere; gradients are averaged
    zero1             4 P        4 P         8 P / N           each updates its share, then hands the new weights round
    fsdp              4 P / N    4 P / N     8 P / N           a block is gathered when its turn comes, then let go

Under fsdp with `reshard_after_forward` False (ZeRO-2), blocks stay gathered until their backward pass: one exchange
less, 4 P more. While micro-batches are accumulated nobody exchanges gradients before the last one, so under fsdp they
lie there whole, 4 P, until then. The embedding and the heads are one piece, gathered for the whole step.

All modes compute the same: the mean gradient over the micro-batches of all processes.
"""

import contextlib
import datetime
import os
import sys
import traceback

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

MODES = ("ddp", "zero1", "fsdp")


class Ranks:
    """This process among its peers under torchrun; alone otherwise. Used as `with Ranks() as ranks:`.

    An error on one process ends them all: its peers lose the connection. Only the first to fail says why.
    """

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if torch.cuda.is_available():
            torch.cuda.set_device(local)
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        self.is_main = self.rank == 0
        if self.world > 1:
            wait = datetime.timedelta(minutes=30)  # a checkpoint of a large model takes its time
            self.store, _, _ = next(dist.rendezvous("env://", timeout=wait))
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            group = dist.PrefixStore("group", self.store)
            dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.world, timeout=wait)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if self.world == 1:
            return
        if error is None or isinstance(error, SystemExit):
            dist.destroy_process_group()
            return
        try:
            is_first = self.store.add("failed", 1) == 1
        except RuntimeError:  # the process that keeps the store is gone
            is_first = False
        lost = isinstance(error, RuntimeError) and "onnection" in str(error)
        if is_first and lost:
            print(f"rank {self.rank} ends: the connection to another process, which has died, is lost", file=sys.stderr)
        elif is_first and isinstance(error, ValueError | OSError | MemoryError):
            print(f"{os.path.basename(sys.argv[0])}: error: rank {self.rank}: {error}", file=sys.stderr)
        elif is_first:
            traceback.print_exception(error)
        else:
            where = f": {str(error).splitlines()[0]}" if isinstance(error, RuntimeError) else ""
            print(f"rank {self.rank} ends, because another process did{where}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)  # threads of a broken group would hold it back

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def most(self, value: int) -> int:
        """The largest value over all processes. On CPU, so that no GPU is waited for."""
        if self.world == 1:
            return value
        vote = torch.tensor(value)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return int(vote)

    def gather(self, thing) -> list:
        """What each process has, in the order of their ranks, on all of them."""
        everyone = [thing]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, thing)
        return everyone

    def mean(self, sums: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
        """Sums over counts, of all processes together; a key need not be known to all of them."""
        everyone = self.gather((sums, counts))
        keys = dict.fromkeys(k for s, _ in everyone for k in s)
        return {k: sum(s.get(k, 0) for s, _ in everyone) / sum(n.get(k, 0) for _, n in everyone) for k in keys}

    def barrier(self) -> None:
        self.most(0)


# ---------------------------------------------------------------------------------------------------- modes


class LossModule(nn.Module):
    """DDP and FSDP act around forward(); so everything that a step computes, heads included, happens inside one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function, *args, **kwargs):
        return function(self.model, *args, **kwargs)


def distribute(module: LossModule, mode: str, ranks: Ranks, reshard_after_forward: bool = True) -> nn.Module:
    """The module to call for losses: for fsdp the same one, its weights now sharded, else inside DDP. One process alone
    keeps it as it is."""
    if ranks.world == 1:
        return module.to(ranks.device)
    if mode == "fsdp":
        return shard(module, reshard_after_forward)
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    call = DistributedDataParallel(
        module.to(ranks.device), device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
    )
    # DDP sorts its buckets anew after the first backward pass. With that behind us, a run that goes on adds gradients
    # in the same order as one that never stopped.
    call(lambda model: sum(p.sum() for p in model.parameters() if p.requires_grad)).backward()
    clear_gradients(call)
    return call


def shard(module: LossModule, reshard_after_forward: bool = True) -> LossModule:
    """FSDP2, in place: one group per block, and one for what is left (embedding, norms, heads)."""
    for block in module.model.model.layers:
        fully_shard(block, reshard_after_forward=reshard_after_forward)
    return fully_shard(module, reshard_after_forward=False)


def adamw(model: nn.Module, mode: str, ranks: Ranks, *, lr: float, beta2: float, weight_decay: float):
    """AdamW over what is to be trained; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    settings = {"lr": lr, "betas": (0.9, beta2), "fused": True}
    if mode == "zero1" and ranks.world > 1:
        return ZeroRedundancyOptimizer([g for g in groups if g["params"]], torch.optim.AdamW, **settings)
    return torch.optim.AdamW(groups, **settings)


@contextlib.contextmanager
def accumulating(module: nn.Module, last: bool):
    """Around the forward and backward pass of a micro-batch: gradients are exchanged with the last one only."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
    with contextlib.nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync():
        yield


def clear_gradients(call: nn.Module) -> None:
    """DDP's gradients stay where they are, in its buckets: set to None, they would be made again, outside."""
    call.zero_grad(set_to_none=not isinstance(call, DistributedDataParallel))


def clip_gradients(parameters: list, max_norm: float) -> Tensor:
    """Scales the gradients so that their norm over all processes is at most max_norm; returns what it was."""
    return whole(nn.utils.clip_grad_norm_(parameters, max_norm))


def lead(model: nn.Module, ranks: Ranks, function):
    """function() on rank 0, whose forward passes all processes make together: for work in which nobody can say
    beforehand how many it takes, with a model that no process has whole. Returns None on the others."""

    def announce(inputs):
        shared = [inputs and [z.to("cpu") for z in inputs]]
        dist.broadcast_object_list(shared, src=0)
        return shared[0] and [z.to(ranks.device) for z in shared[0]]

    if not ranks.is_main:
        with torch.no_grad():
            while inputs := announce(None):
                model(*inputs)
        return None
    hook = model.register_forward_pre_hook(lambda _, inputs: tuple(announce(inputs)))
    try:
        return function()
    finally:
        hook.remove()
        announce(None)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (all processes must ask); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------------------------------- checkpoints


def gather_state(model: nn.Module, ranks: Ranks, wanted=None) -> dict[str, Tensor]:
    """The state dict of the whole model, on the CPU of rank 0; elsewhere empty. All processes must call.

    wanted: says of a name whether it is; by default all are.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if wanted and not wanted(name):
            continue
        tensor = whole(tensor)
        if ranks.is_main:
            state[name] = tensor.detach().cpu().contiguous()
    return state


MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def own_share(optimizer) -> torch.optim.Optimizer:
    """The optimizer of this process's parameters: under zero1 one inside, of a share of them."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def moments(optimizer) -> dict:
    """The optimizer's state on this process: parameter -> {name in MOMENTS: tensor}."""
    return own_share(optimizer).state


def gather_moments(model: nn.Module, optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """The whole optimizer state as "parameter.moment" -> tensor, on the CPU of rank 0. All processes must call."""
    mine = moments(optimizer)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    owners = {}  # the first process that has a parameter's state: under zero1 only one has
    for rank, names in reversed(list(enumerate(ranks.gather([name for name, p in named.items() if p in mine])))):
        owners |= dict.fromkeys(names, rank)
    found = {}
    for name, p in named.items():
        for key in MOMENTS if name in owners else ():
            value = whole(mine[p][key]).detach().cpu().contiguous() if p in mine else None
            if owners[name] and ranks.is_main:
                value = torch.empty((), dtype=torch.float32) if key == "step" else torch.empty(p.shape, dtype=p.dtype)
                dist.recv(value, src=owners[name])
            elif owners[name] == ranks.rank and not ranks.is_main:
                dist.send(value, dst=0)
            if ranks.is_main:
                found[f"{name}.{key}"] = value
    return found


def restore_moments(model: nn.Module, optimizer, stored) -> None:
    """Fills the optimizer from an open safetensors file that `gather_moments` filled; each process takes its share."""
    names, mine = set(stored.keys()), moments(optimizer)
    kept = {id(p) for group in own_share(optimizer).param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if id(p) in kept and f"{name}.step" in names:
            mine[p] = {key: place(stored.get_tensor(f"{name}.{key}"), p) for key in MOMENTS}


def place(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like`, and sharded as it is."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value.to(like.device)
