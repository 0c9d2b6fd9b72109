"""One model on many processes: who am I, what is kept where, and how the pieces come together for a checkpoint.

What each of N processes keeps of a model with P parameters in float32, in bytes:

                             weights        gradients   AdamW's moments
    ddp                      4 P            4 P         8 P        everything everywhere; gradients are averaged
    fsdp (ZeRO-3)            4 P / N        4 P / N     8 P / N    a block is gathered when its turn comes, then let go
    fsdp, reshard_after_forward False (ZeRO-2)                     blocks stay gathered until their backward pass: one
                             4 P / N + 4 P  4 P / N     8 P / N    exchange less; `--parallel zero1` is another name

While micro-batches are accumulated nobody exchanges gradients before the last one, so under fsdp they lie there whole,
4 P, until then. The embedding and the heads are one piece, gathered for the whole step.

All modes compute the same: the mean gradient over the micro-batches of all processes.
"""

import contextlib
import datetime
import os
import signal
import sys
import traceback

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import models

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

    def all_reduce_max(self, value: int) -> int:
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
        self.all_reduce_max(0)


class Stopped(Exception):
    """All processes agreed to save and stop."""


class StopSignal:
    """Ctrl-C and SIGTERM end the run before the next micro-batch, after saving; so do data that cannot be had. A second
    Ctrl-C ends it at once."""

    def __init__(self, ranks: Ranks, notify):
        """notify is called when a signal comes, for whoever waits for something."""
        self.requested, self.status, self.ranks, self.notify = False, 0, ranks, notify
        self.fault, self.failed = None, False  # what this process met; whether any did
        signal.signal(signal.SIGTERM, self.receive)
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, number, frame):
        self.requested, self.status = True, 130 if number == signal.SIGINT else 0
        self.notify()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self, work=lambda: None):
        """What work() returns; raises Stopped on all processes as soon as one has been asked to stop, or work() met a
        fault. All must call it equally often."""
        result, fault = None, None
        try:
            result = work()
        except (OSError, ValueError) as e:
            fault = e
        verdict = self.ranks.all_reduce_max(2 if fault and not self.requested else int(self.requested))
        if verdict:
            self.fault, self.failed = fault if verdict == 2 else None, verdict == 2
            raise Stopped
        return result


# ---------------------------------------------------------------------------------------------------- the model


class Callee(nn.Module):
    """DDP and FSDP act around forward(); so everything that a step computes, heads included, happens inside one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function, *args, **kwargs):
        return function(self.model, *args, **kwargs)


class ParallelModel:
    """The one handle on a model, wherever its pieces lie: parallel_model(f, ...) is f(model, ...) on every process.

    When that makes gradients, backward() averages them over the processes.
    """

    def __init__(self, model: nn.Module, mode: str, ranks: Ranks, reshard_after_forward: bool = True):
        self.plain, self.ranks, self.callee = model, ranks, Callee(model)
        self.is_sharded = mode != "ddp" and ranks.world > 1
        if self.is_sharded:  # FSDP2, in place: one group per block, and one for what is left (embedding, norms, heads)
            for block in model.model.layers:
                fully_shard(block, reshard_after_forward=reshard_after_forward and mode == "fsdp")
            fully_shard(self.callee, reshard_after_forward=False)
            return
        self.callee.to(ranks.device)
        if ranks.world > 1:
            device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self.callee = DistributedDataParallel(
                self.callee, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )
            # DDP sorts its buckets anew after the first backward pass. With that behind us, a run that goes on adds
            # gradients in the same order as one that never stopped.
            self(lambda model: sum(p.sum() for p in model.parameters() if p.requires_grad)).backward()
            self.zero_grad()

    def __call__(self, function, *args, **kwargs):
        return self.callee(function, *args, **kwargs)

    @contextlib.contextmanager
    def inference(self):
        """No gradients and no dropout inside."""
        self.callee.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.callee.train()

    @contextlib.contextmanager
    def micro_batch(self, last: bool):
        """Around the forward and backward pass of a micro-batch: gradients are exchanged with the last one only."""
        if self.is_sharded:
            self.callee.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or not hasattr(self.callee, "no_sync") else self.callee.no_sync():
            yield

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales the gradients so that their norm over all processes is at most max_norm; returns what it was."""
        return full_tensor(nn.utils.clip_grad_norm_(self.plain.parameters(), max_norm))

    def zero_grad(self) -> None:
        """DDP's gradients stay where they are, in its buckets: set to None, they would be made again, outside."""
        self.callee.zero_grad(set_to_none=not isinstance(self.callee, DistributedDataParallel))

    def reshard(self) -> None:
        """Lets go what forward passes without a backward pass have left gathered."""
        if self.is_sharded:
            self.callee.reshard()

    def run_on_rank0(self, function, *args):
        """function(model, ...) on rank 0, for work in which nobody can say beforehand how many forward passes it takes.
        A sharded model makes these on all processes together. Returns None on the others."""
        if not self.is_sharded:
            return function(self.plain, *args) if self.ranks.is_main else None
        return self(_rank0_leads, self.ranks, function, *args)


def _rank0_leads(model: nn.Module, ranks: Ranks, function, *args):
    def announce(inputs):
        shared = [inputs and [z.to("cpu") for z in inputs]]
        dist.broadcast_object_list(shared, src=0)
        return shared[0] and [z.to(ranks.device) for z in shared[0]]

    if not ranks.is_main:
        while inputs := announce(None):
            model(*inputs)
        return None
    hook = model.register_forward_pre_hook(lambda _, inputs: tuple(announce(inputs)))
    try:
        return function(model, *args)
    finally:
        hook.remove()
        announce(None)


def bf16_autocast(wanted: bool, model: nn.Module, ranks: Ranks) -> torch.autocast:
    """Products in bf16, if that is wanted and this processor can.

    Without autocast's cache: bf16 copies of weights made in a rollout have no place in the graph of the loss after it.
    """
    if wanted and ranks.device.type == "cpu":
        wanted = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if wanted:
            models.pad_rows(model.model)
        else:
            ranks.say("--bf16: this processor has no bf16 units and would be 8 times slower; going on in float32")
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (all processes must ask); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def adamw(model: nn.Module, *, lr: float, beta2: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is to be trained; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


# ---------------------------------------------------------------------------------------------------- checkpoints

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def gather(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Named tensors, each put together, on the CPU of rank 0; elsewhere empty. All processes must call."""
    found = {}
    for name, tensor in tensors.items():
        tensor = full_tensor(tensor)
        if ranks.is_main:
            found[name] = tensor.detach().cpu().contiguous()
    return found


def moments(model: nn.Module, optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "parameter.moment" -> tensor, as sharded as the parameters are."""
    state = optimizer.state
    return {f"{n}.{key}": state[p][key] for n, p in model.named_parameters() if p in state for key in MOMENTS}


def restore_moments(model: nn.Module, optimizer, stored: dict[str, Tensor]) -> None:
    """Fills the optimizer with what `gather` made of `moments`; each process takes its share."""
    for name, p in model.named_parameters():
        if f"{name}.step" in stored:
            optimizer.state[p] = {key: like(stored[f"{name}.{key}"], p) for key in MOMENTS}


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the device of the parameter, and sharded as it is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
