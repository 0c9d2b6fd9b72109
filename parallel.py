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
import faulthandler
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
LIMIT = datetime.timedelta(minutes=5)  # of waiting for the others within a step: then one of them stands still
PATIENCE = datetime.timedelta(hours=2)  # in a barrier: one of them may be writing a large checkpoint, or fetching one


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
            self.store, _, _ = next(dist.rendezvous("env://", timeout=LIMIT))
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            group = dist.PrefixStore("group", self.store)
            dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.world, timeout=LIMIT)
            self.patient = dist.new_group(timeout=PATIENCE, backend="gloo")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if self.world == 1:
            return
        faulthandler.cancel_dump_traceback_later()
        if error is None or isinstance(error, SystemExit):
            dist.destroy_process_group()
            return
        try:
            is_first = self.store.add("failed", 1) == 1
        except RuntimeError:  # the process that keeps the store is gone
            is_first = False
        name, of_group, text = f"rank {self.rank} ends", isinstance(error, RuntimeError), str(error)
        if not is_first:
            text = f"{name}, because another process did" + f": {text.partition(chr(10))[0]}" * of_group
        elif of_group and "onnection" in text:
            text = f"{name}: the connection to another process, which has died, is lost"
        elif of_group and "imed out" in text:
            text = f"{name}: it has waited {LIMIT} for another process, which stands still"
        elif isinstance(error, ValueError | OSError | MemoryError):
            text = f"{os.path.basename(sys.argv[0])}: error: rank {self.rank}: {text}"
        else:
            text = "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
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
        """Waits for the others, also where the work of one takes longer than LIMIT."""
        if self.world > 1:
            faulthandler.cancel_dump_traceback_later()
            dist.barrier(self.patient)


class Stopped(Exception):
    """All processes agreed to save and stop."""


class StopSignal:
    """Ctrl-C and SIGTERM end the run before the next micro-batch, after saving; so do data that cannot be had. A second
    Ctrl-C ends it at once, unless a launcher may have sent on the first.

    The next signal may interrupt a handler anywhere. So it sets flags, and takes no lock (as threading.Event would).
    """

    requested = False  # of this process, for whoever waits for something

    def __init__(self, ranks: Ranks):
        StopSignal.requested, self.status, self.ranks = False, 0, ranks
        self.fault, self.failed = None, False  # what this process met; whether any did
        signal.signal(signal.SIGTERM, self.receive)
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, number, frame):
        StopSignal.requested, self.status = True, 130 if number == signal.SIGINT else 0
        if "RANK" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self, work=lambda: None):
        """What work() returns; raises Stopped on all processes as soon as one has been asked to stop, or work() met a
        fault. All must call it equally often; a process that does not come back says where it stands, before the others
        lose patience."""
        if self.ranks.world > 1:
            faulthandler.dump_traceback_later(0.8 * LIMIT.total_seconds(), file=2)
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
        if self.is_sharded:
            return self(_rank0_leads, self.ranks, function, *args)
        result = function(self.plain, *args) if self.ranks.is_main else None
        self.ranks.barrier()
        return result


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
    """Products in bf16, if that is wanted and possible.

    Without autocast's cache: bf16 copies of weights made in a rollout have no place in the graph of the loss after it.
    """
    wanted = bf16_if_possible(wanted, ranks.device, ranks.say)
    if wanted and ranks.device.type == "cpu":
        models.pad_rows(model.model)
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)


def bf16_if_possible(wanted: bool, device: torch.device | str, say=lambda text: print(text, file=sys.stderr)) -> bool:
    """Whether to compute in bf16: where it is wanted, and the hardware has units for it."""
    if torch.device(device).type == "cuda":
        possible = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        possible = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if wanted and not possible:
        say("--bf16: no bf16 units here, without them it is some ten times slower; going on in float32")
    return wanted and possible


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
