"""What a training run will need: memory and time per GPU, worked out before any GPU is rented.

    python bench.py plan --model llada-8b --gpus 8 --parallel fsdp --bf16 --gradient_checkpointing --max_length 2048

Where the memory of a step goes, in bytes, for P weights that are all trained:

    parameters        4 P    float32; --bf16 changes the arithmetic, not what is kept
    gradients         4 P    float32, from the backward pass to the update
    optimizer state   8 P    AdamW's two moments, float32
    bf16 copies       2 P    --bf16: autocast casts a weight for every use; without checkpointing the backward pass
                             needs the copies, with it one block's at a time
    vocabulary heads  8 D V  gradients of two heads [V, D], held from the loss on, and chunks of logits (weighted_nll)
    activations              what the backward pass will ask for, per token and block; with checkpointing the input of
                             every block, and one block in full at a time; and whatever lives shortly
    gathered                 fsdp: the blocks at work, whole, and the buffers they travel in; embedding and heads always

ddp keeps all of it on every GPU, zero1 divides the optimizer, fsdp parameters, gradients and optimizer (parallel.py).

The figures do not come from formulas. `simulate` builds the real model, spreads it with parallel.py and runs a step of
train.py on *fake tensors*: they have a shape and a type but no contents, so 8 billion weights take no memory, and the N
processes are one process in a fake group that sends nothing. A `Ledger` sees every operation: it counts each storage
from its creation to its end and, for the time, arithmetic, bytes moved and bytes exchanged. Three operations that keep
other things for the backward pass on a GPU than on a CPU are swapped for the GPU's (`as_on_gpu`).

Not in it: the CUDA context, buffers of NCCL and cuBLAS, holes between allocations (`--reserve`). DDP cannot run on fake
tensors; its buckets and exchanges are written down by hand.
"""

import contextlib
import math
import sys
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import lora
import medlm
import models
import parallel
from parallel import LossModule
from plumbing import cli
from ragged import Ragged

GIB = 2**30
EARLIER = ", earlier micro-batches"  # than the last, which alone exchanges gradients
LARGE = {
    "llada-8b": {
        "model_type": "llada", "vocab_size": 126464, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "intermediate_size": 12288, "max_position_embeddings": 4096,
    },
    "dream-7b": {
        "model_type": "dream", "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
        "max_position_embeddings": 131072, "rope_theta": 1e6,
    },
}  # fmt: skip
KNOWN = [*LARGE, *models.PRESETS]


# ---------------------------------------------------------------------------------------------------- flags


def add_flags(parser) -> None:
    a, n, positive = parser.add_argument, cli.number, cli.number(int, low=1)

    def flag(name, help, default=False):
        a(name, type=cli.boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help)

    a("--model", default="llada-8b", type=cli.name, help=f"{', '.join(KNOWN)}, a config.json or a checkpoint")
    a("--vocab_size", type=positive, default=4096, help="of a preset")
    a("--method", choices=list(models.METHODS), default="medlm", help="what is trained")
    a("--stage", type=int, choices=[1, 2, 3], default=2, help="of ME-DLM; 3 makes rollouts")
    a("--gpus", type=positive, default=8, help="processes, one GPU each")
    a("--parallel", choices=parallel.MODES, default="fsdp", help="how the model is spread")
    flag("--reshard_after_forward", "fsdp: let a block's weights go between forward and backward", True)
    flag("--gradient_checkpointing", "recompute activations block by block")
    flag("--bf16", "bf16 autocast")
    flag("--lora", "train low-rank additions and the heads")
    a("--lora_r", type=positive, default=32, help="their rank")
    flag("--load_in_4bit", "with --lora: the matrices of the blocks in 4 bits")
    a("--max_length", type=n(int, low=2), default=2048, help="tokens of a sample (of a packed row for medlm)")
    a("--sample_length", type=positive, help="tokens of one sample in a packed row (default: max_length, one per row)")
    a("--per_device_train_batch_size", type=positive, default=1, help="samples (rows) per GPU and micro-batch")
    a("--gradient_accumulation_steps", type=positive, default=1, help="micro-batches per step")
    a("--intermediate_ratio", type=n(low=0, high=1), default=0.5, help="stage 3: share of steps with a rollout")
    a("--mask_diffusion_pred_per_step", type=positive, nargs="+", default=[2, 4, 8, 16], help="as in train.py")
    a("--max_diffusion_steps", type=positive, default=32, help="as in train.py")
    a("--memory", type=n(above=0), default=80, help="GiB per GPU")
    a("--reserve", type=n(low=0), default=4, help="GiB left for CUDA, NCCL, cuBLAS and fragmentation: a guess")
    a("--flops", type=n(above=0), help="peak TFLOP/s of one GPU (default, an H100: 989 with --bf16, 67 without)")
    a("--utilization", type=n(above=0, high=1), default=0.5, help="share of that peak which matrix products reach")
    a("--bandwidth", type=n(above=0), default=3350, help="GB/s between a GPU and its memory")
    a("--link", type=n(above=0), default=450, help="GB/s per GPU and direction within a node")
    a("--network", type=n(above=0), default=50, help="GB/s per GPU and direction between nodes")
    a("--gpus_per_node", type=positive, default=8, help="GPUs in a node")
    flag("--table", "the table of the README: LLaDA-8B on 1, 8 and 64 GPUs")


def check(args) -> None:
    if args.load_in_4bit and not args.lora:
        raise ValueError("--load_in_4bit needs --lora: 4-bit weights cannot be trained themselves")
    if (args.sample_length or 0) > args.max_length:
        raise ValueError(f"--sample_length {args.sample_length} must not exceed --max_length {args.max_length}")
    config = configuration(args)
    if args.max_length > models.max_positions(config):
        positions = models.max_positions(config)
        raise ValueError(f"--max_length {args.max_length} is more than the model's {positions} positions; lower it")


def configuration(args) -> SimpleNamespace:
    """The config of --model. Raises ValueError / OSError."""
    path = Path(args.model)
    if args.model in LARGE:
        raw = LARGE[args.model]
    elif args.model in models.PRESETS:
        raw = {"model_type": "llama", "vocab_size": args.vocab_size} | models.PRESETS[args.model]
    elif path.name == "config.json" or path.is_dir():
        raw = models.read_config(path if path.is_dir() else path.parent)
    else:
        raise ValueError(f"--model {args.model!r} is not known: {', '.join(KNOWN)}, a config.json or a checkpoint")
    return models.complete_config(raw | {"nanoedit": {"method": args.method}})


# ---------------------------------------------------------------------------------------------------- the ledger


@dataclass
class Span:
    """A part of a step, in seconds of one GPU. compute: each operation takes as long as its arithmetic or its memory
    traffic, whichever is longer. hidden: exchanges that run beside it. exposed: exchanges that everything waits for."""

    compute: float = 0.0
    hidden: float = 0.0
    exposed: float = 0.0
    peak: int = 0  # bytes held at most

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hidden) + self.exposed


class Ledger(TorchDispatchMode):
    """Sees every operation: which storages there are, whose they are, how many bytes; and how long a GPU would take.

    now, peak: Counter, owner -> bytes; peak is `now` at the moment with the most. spans: name -> Span.
    """

    def __init__(self, args):
        super().__init__()
        self.args, self.span, self.spans = args, Span(), {}
        self.held, self.now, self.peak = {}, Counter(), Counter()  # held: storage -> (bytes, owner)
        self.watched, self.block_bytes = set(), set()  # sizes of the exchanges that one block needs

    def start(self, name: str) -> None:
        """What follows belongs to the span of this name."""
        self.span = self.spans.setdefault(name, Span())

    def assign(self, tensor: Tensor, owner: str) -> None:
        """Counts a tensor's storage as the owner's, from now until it is freed."""
        storage = local(tensor).untyped_storage()
        key = storage._cdata
        if key not in self.held:
            weakref.finalize(storage, self.book, key, 0, owner)
        self.book(key, storage.nbytes(), owner)

    def book(self, key: int, size: int, owner: str) -> None:
        before, whose = self.held.pop(key, (0, owner))
        self.now[whose] -= before
        self.now[owner] += size
        if size:
            self.held[key] = size, owner
        self.span.peak = max(self.span.peak, self.now.total())
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def resize(self, storage, size: int):
        """torch.UntypedStorage.resize_, with which FSDP lets go of weights and takes them back."""
        RESIZE(storage, size)
        if (key := storage._cdata) in self.held or size:
            self.book(key, storage.nbytes(), self.held.get(key, (0, "gathered"))[1])
        return storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs, outputs = tensors((args, kwargs)), tensors(out)
        new = [t for t in outputs if local(t).untyped_storage()._cdata not in self.held]
        for t in new:
            self.assign(t, owner(func, args))
        for p in inputs:
            if isinstance(p, nn.Parameter) and p.requires_grad and id(p) not in self.watched:
                self.watched.add(id(p))
                p.register_post_accumulate_grad_hook(lambda p: self.assign(p.grad, "gradients"))
        self.clock(func, args, kwargs or {}, out, inputs, outputs, bool(new))
        return out

    def clock(self, func, args, kwargs, out, inputs, outputs, makes_something) -> None:
        """Adds the time of one operation to the span."""
        if func.namespace == "c10d":
            size = max(map(size_of, tensors(args)), default=0)  # of the whole: what is gathered, what is scattered
            seconds = exchange(size, self.args)
            if size in self.block_bytes:
                self.span.hidden += seconds
            else:
                self.span.exposed += seconds
        elif (makes_something or func._schema.is_mutable) and "empty" not in func.__name__:  # else it is a view
            formula = flop_registry.get(func.overloadpacket)
            if func.namespace == "torch_attn":
                flops = attention_flops(args, backward="backward" in func.__name__)
            else:
                flops = formula(*args, **kwargs, out_val=out) if formula else 0
            traffic = sum(map(size_of, inputs)) + sum(map(size_of, outputs))
            self.span.compute += max(flops / peak_flops(self.args), traffic / self.args.bandwidth / 1e9)


RESIZE = torch.UntypedStorage.resize_


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def tensors(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def size_of(tensor: Tensor) -> int:
    """Bytes of this process's part."""
    return local(tensor).numel() * tensor.element_size()


def owner(func, args) -> str:
    """Who asked for a new storage: told by the operation and by the functions that are being run."""
    if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
        return "bf16 copies"
    frame = sys._getframe(2)
    while frame:
        file, name = frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_qualname
        if name == "_WeightedNLL.forward":
            return "vocabulary heads"
        if name == "foreach_reduce":
            return "gradients"
        if file in ("_fsdp_param.py", "_fsdp_collectives.py"):
            return "gathered"
        frame = frame.f_back
    return "activations"


# ---------------------------------------------------------------------------------------------------- the machine


def peak_flops(args) -> float:
    """FLOP/s that matrix products reach."""
    return args.utilization * 1e12 * (args.flops or (989 if args.bf16 else 67))


def attention_flops(args, backward: bool) -> float:
    """Of varlen_attn, all samples being equally long. args: query [T, H, hd] first (in the backward pass second)."""
    query, longest = (args[1], args[8]) if backward else (args[0], args[5])
    window = next((a[0] for a in args if isinstance(a, list | tuple)), -1)
    seen = longest if window < 0 else min(longest, 2 * window + 1)
    return (10 if backward else 4) * query.numel() * seen  # two products of [T, hd] x [hd, seen] per head; five back


def exchange(size: float, args) -> float:
    """Seconds until `size` bytes, an equal part on each GPU, have been gathered on all of them (or summed and
    scattered). What lies in another node enters a node once, over all its network adapters, and is handed on inside."""
    gpus, nodes = args.gpus, math.ceil(args.gpus / args.gpus_per_node)
    inside = size * (gpus - 1) / gpus / args.link
    between = size * (nodes - 1) / nodes / (args.network * min(gpus, args.gpus_per_node))
    return max(inside, between) / 1e9


# ---------------------------------------------------------------------------------------------------- the simulation


@contextlib.contextmanager
def pretend(gpus: int, rank: int = 0):
    """A process group of this size in which nobody else is there and nothing is sent, on the CPU."""
    with mock.patch.object(torch._C, "_get_accelerator", return_value=torch.device("cpu")):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=gpus)
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def as_on_gpu():
    """Fake tensors say that they are on the CPU; this runs the operations that a GPU would run on them."""

    def attend(q, k, v, cu_seqlens, max_seqlen, window=None):
        kind = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        side, groups = -1 if window is None else window, q.shape[1] // k.shape[1]
        k, v = (z.repeat_interleave(groups, dim=1) if groups > 1 else z for z in (k, v))
        q, k, v = (z.to(kind) for z in (q, k, v))
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(side, side))

    def rms_norm(x, shape, weight=None, eps=None):  # in float32 under autocast, and one kernel
        return torch.ops.aten._fused_rms_norm(x.float(), shape, weight, eps)[0]

    def dropout(x, p=0.5, training=True, inplace=False):  # keeps bools where the CPU keeps floats
        return torch.ops.aten.native_dropout(x, p, True)[0] if training and p else x

    with (
        mock.patch.object(models, "attend", attend),
        mock.patch.object(F, "rms_norm", rms_norm),
        mock.patch.object(F, "dropout", dropout),
        mock.patch.object(models, "hidden_states", lambda backbone, x, extra=None: backbone(x, extra)),
    ):
        yield


def fake_batch(args, fake) -> Ragged:
    """per_device_train_batch_size rows of max_length tokens, each row full of samples of equal length."""
    sample, T = args.sample_length or args.max_length, args.per_device_train_batch_size * args.max_length
    row = [min(sample, args.max_length - i) for i in range(0, args.max_length, sample)]
    x = Ragged.from_lengths(torch.zeros(T, dtype=torch.int64), torch.tensor(row * args.per_device_train_batch_size))
    counted = {"lengths": x.lengths, "batch": x.batch, "positions": x.positions}  # their shapes depend on contents
    faked = Ragged(fake.from_tensor(x.ids), fake.from_tensor(x.cu_seqlens), x.max_seqlen)
    faked.__dict__.update({name: fake.from_tensor(t) for name, t in counted.items()})
    return faked


def fake_loss(model, x: Ragged) -> Tensor:
    """A loss that takes the memory of `editflow.loss` and `medlm.mask_loss` when every token has one label for each
    vocabulary head: the most there can be (all masked; an insertion and a substitution everywhere)."""
    hidden = model(x, torch.zeros(len(x)))
    if isinstance(model, models.EditFlowModel):
        raw = model.rate_heads[0](hidden).float()
        total, heads = F.softplus(raw).sum(), (model.sub_logits, model.ins_logits)
    else:
        total, heads = 0, (model.lm_head, model.next_token_head)
    for head in heads:
        row = torch.arange(len(hidden))
        step = max(1, models.CHUNK_FLOATS // head.out_features)  # the chunks' fences, which depend on contents
        fences = SimpleNamespace(tolist=lambda step=step: list(range(0, len(x.ids) + step, step)))
        with mock.patch.object(torch, "searchsorted", lambda *_, fences=fences: fences):
            args = hidden[row], head.weight, head.bias, row, row, torch.ones(len(row))
            total = total + models._WeightedNLL.apply(*args)
    return total


def fake_pass(model, x: Ragged, edits: bool) -> None:
    """A forward pass of a rollout: one that fills masks (a few rows through one head), or one that edits (all rows
    through both)."""
    with medlm.inference(model):
        hidden, row = model(x), torch.arange(len(x.ids) if edits else len(x))
        for head in (model.lm_head, model.next_token_head)[: 1 + edits]:
            medlm.best_tokens(hidden, head, row, [0])


def build(args, fake) -> LossModule:
    with fake:
        model = models.METHODS[args.method](configuration(args))
        if args.lora:
            with mock.patch.object(lora.LoRALinear, "to", lambda layer, *_: layer):  # which fake tensors refuse
                lora.add(model, args.lora_r, four_bit=args.load_in_4bit)
    model.model.gradient_checkpointing = args.gradient_checkpointing
    return LossModule(model)


def spread(args, module: LossModule) -> torch.optim.Optimizer:
    """Shards the module where --parallel says so; returns the optimizer of this process, under zero1 of the one with
    the largest share."""
    if args.parallel == "fsdp" and args.gpus > 1:
        parallel.shard(module, args.reshard_after_forward)
    ranks = SimpleNamespace(world=args.gpus)
    optimizer = parallel.adamw(module.model, args.parallel, ranks, lr=1e-4, beta2=0.98, weight_decay=0.01)
    if args.parallel == "zero1" and args.gpus > 1:
        shares = optimizer._partition_parameters()
        largest = max(shares, key=lambda share: sum(p.numel() for group in share for p in group["params"]))
        return torch.optim.AdamW([group for group in largest if group["params"]], fused=True)
    return optimizer


def prepare(args, fake) -> tuple[LossModule, torch.optim.Optimizer]:
    """Model and optimizer as one process has them after its first update. Inside `pretend`."""
    module = build(args, fake)
    optimizer = spread(args, module)
    with fake:
        for p in module.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
    for p in module.parameters():
        p.grad = None
    return module, optimizer


def simulate(args, on_gpu: bool = True, at_most: float = math.inf) -> Ledger:
    """One optimizer step of train.py on fake tensors, seen by the ledger that is returned. on_gpu=False: as on a CPU,
    for comparison with a real one. at_most: bytes; the step is left out where what is kept between steps is more."""
    fake = FakeTensorMode()
    many, accumulates = args.gpus > 1, args.gradient_accumulation_steps > 1
    with pretend(args.gpus), as_on_gpu() if on_gpu else contextlib.nullcontext():
        (module, optimizer), x = prepare(args, fake), fake_batch(args, fake)
        trained = [p for p in module.parameters() if p.requires_grad]
        ledger = Ledger(args)
        with fake:
            for tensor in [*module.parameters(), *module.buffers()]:
                ledger.assign(tensor.detach(), "parameters")
            for tensor in tensors([list(state.values()) for state in optimizer.state.values()]):
                ledger.assign(tensor, "optimizer state")
            if many and args.parallel == "fsdp":
                block = module.model.model.layers[0]
                gathered = args.gpus * sum(size_of(p) for p in block.parameters())
                scattered = args.gpus * sum(size_of(p) for p in block.parameters() if p.requires_grad)
                ledger.block_bytes = {gathered, scattered}
            elif many:  # gradients live in DDP's buckets, from the first step to the last
                for p in trained:
                    p.grad = torch.zeros_like(p)
                    ledger.assign(p.grad, "gradients")
        if ledger.now.total() > at_most:
            return ledger
        with mock.patch.object(torch.UntypedStorage, "resize_", lambda *a: ledger.resize(*a)), fake, ledger:
            for last in (False, True) if accumulates else (True,):
                micro_batch(args, module, x, ledger, last)
            ledger.start("update")
            parallel.clip_gradients(trained, 1.0)
            optimizer.step()
    whole = 4 * sum(p.numel() for p in trained)
    if many and args.parallel != "fsdp":  # all-reduce: a sum and a gathering; then, for zero1, the new weights
        ledger.spans["backward"].hidden = 2 * exchange(whole, args)
        ledger.spans["update"].exposed = exchange(whole, args) if args.parallel == "zero1" else 0.0
    return ledger


def micro_batch(args, module: LossModule, x: Ragged, ledger: Ledger, last: bool) -> None:
    earlier = "" if last else EARLIER
    with parallel.accumulating(module, last):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            if args.method == "medlm" and args.stage == 3:
                ledger.start("forward" + earlier)
                module(lambda model: None)  # gathers what is in no block, once for all passes
                for name in ("mask pass", "edit pass"):
                    ledger.start(name + earlier)
                    module(fake_pass, x, name == "edit pass")
            ledger.start("forward" + earlier)
            loss = module(fake_loss, x)
        ledger.start("backward" + earlier)
        loss.backward()


# ---------------------------------------------------------------------------------------------------- the plan


def rollout_passes(args, draws: int = 400) -> tuple[float, float]:
    """Passes that fill masks and passes that edit, expected per rollout, averaged over the run. At most, for the
    latter: editing ends early where a text comes back to what it was. All processes make as many as the slowest."""
    rng = torch.Generator().manual_seed(0)
    length, row = args.sample_length or args.max_length, args.max_length // (args.sample_length or args.max_length)
    fills, edits = 0, 0
    for _ in range(draws):
        progress = float(torch.rand((), generator=rng))
        plan = medlm.plan_rollout(progress, args.mask_diffusion_pred_per_step, args.max_diffusion_steps, rng)
        t = torch.rand(args.gpus, args.per_device_train_batch_size * row, generator=rng)  # share masked, per sample
        passes = (t * length / plan.tokens_per_pass).ceil().clamp(max=plan.max_passes).amax(1).int().tolist()
        fills += max(passes)
        edits += max(map(plan.edit_passes, passes))
    return fills / draws, edits / draws


def step_times(args, ledger: Ledger) -> dict[str, tuple[float, Span]]:
    """How often each part of a step is run, and the part."""
    passes = dict(zip(("mask pass", "edit pass"), rollout_passes(args)))
    found = {}
    for name, span in ledger.spans.items():
        part, _, _ = name.partition(EARLIER)
        times = args.intermediate_ratio * passes[part] if part in passes else 1
        found[name] = times * (args.gradient_accumulation_steps - 1 if name != part else 1), span
    return found


def step_seconds(args, ledger: Ledger) -> float:
    return sum(times * span.seconds for times, span in step_times(args, ledger).values())


def fits(args, ledger: Ledger) -> bool:
    return ledger.peak.total() / GIB + args.reserve <= args.memory


def tokens_per_step(args) -> int:
    return args.gpus * args.gradient_accumulation_steps * args.per_device_train_batch_size * args.max_length


def report(args, ledger: Ledger) -> None:
    stage = f", stage {args.stage}" if args.method == "medlm" else ""
    trained = ("LoRA over 4-bit weights" if args.load_in_4bit else "LoRA") if args.lora else "all weights trained"
    how = f"{args.gpus} x {args.parallel}" if args.gpus > 1 else "1 GPU"
    print(f"{args.model}, {args.method}{stage}, {trained}, {how}; computed with fake tensors, not run\n")
    print("GiB per GPU, at the moment with the most")
    for owner, size in sorted(ledger.peak.items(), key=lambda item: -item[1]):
        if size > GIB / 1000:
            print(f"  {owner:28} {size / GIB:8.2f}")
    total = ledger.peak.total() / GIB
    verdict = "fits" if fits(args, ledger) else "DOES NOT FIT"
    print(f"  {'total':28} {total:8.2f}   and {args.reserve:g} in reserve, of {args.memory:g}: {verdict}\n")
    print("seconds                               times  compute | exchange: beside  waited for | together  GiB at most")
    for name, (times, span) in step_times(args, ledger).items():
        columns = f"{times:6.1f} {span.compute:8.3f} | {span.hidden:16.3f} {span.exposed:11.3f}"
        print(f"  {name:34} {columns} | {times * span.seconds:8.2f} {span.peak / GIB:12.2f}")
    seconds, tokens = step_seconds(args, ledger), tokens_per_step(args)
    print(f"  a step: {seconds:.2f} s for {tokens} tokens, {tokens / seconds:.0f} tokens/s on all GPUs\n")
    print(
        f"Assumed: matrix products at {peak_flops(args) / 1e12:.0f} TFLOP/s (--flops times --utilization); every "
        f"operation\nreads and writes its tensors once at {args.bandwidth:g} GB/s; exchanges at {args.link:g} GB/s per "
        f"GPU within a node of {args.gpus_per_node},\n{args.network:g} GB/s per GPU between nodes. Of these, the "
        "exchanges of blocks (fsdp) or of gradients (ddp, zero1) run beside\nthe computation, the longer of the two "
        "counts; embedding, heads (fsdp) and new weights (zero1) are waited for.\nEvery token has a label for each "
        "vocabulary head, the most there can be. CUDA, NCCL, fragmentation: --reserve."
    )


# rows (samples for Edit Flows) that a step of the table consists of: for ME-DLM as in recipes/medlm_8b.sh on 8 GPUs
RUNS = {
    "ME-DLM stage 1": ("medlm", 1, 256), "ME-DLM stage 2": ("medlm", 2, 16), "ME-DLM stage 3": ("medlm", 3, 16),
    "Edit Flows": ("editflow", 1, 128),
}  # fmt: skip
TRAINED = {"all weights": (False, False), "LoRA": (True, False), "LoRA, 4 bits": (True, True)}
CHEAPEST_FIRST = {
    "ddp": ("ddp", True), "zero1": ("zero1", True), "fsdp, ZeRO-2": ("fsdp", False), "fsdp": ("fsdp", True),
}  # fmt: skip


def table(args) -> None:
    print("| LLaDA-8B | trained | 1 GPU | 8 GPUs | 64 GPUs |\n| --- | --- | --- | --- | --- |")
    for run, (method, stage, rows) in RUNS.items():
        for trained, (adapters, four_bit) in TRAINED.items():
            cells = []
            for gpus in (1, 8, 64):
                settings = {
                    "model": "llada-8b", "method": method, "stage": stage, "gpus": gpus, "lora": adapters,
                    "load_in_4bit": four_bit, "bf16": True, "gradient_checkpointing": True,
                    "gradient_accumulation_steps": max(1, rows // gpus // args.per_device_train_batch_size),
                }  # fmt: skip
                cells.append(cell(SimpleNamespace(**vars(args) | settings)))
            print(f"| {run} | {trained} | {' | '.join(cells)} |", flush=True)


def cell(args) -> str:
    """The first mode that fits: its name, GiB per GPU, seconds per step."""
    modes = CHEAPEST_FIRST if args.gpus > 1 else {"one process": ("ddp", True)}
    for name, (args.parallel, args.reshard_after_forward) in modes.items():
        ledger = simulate(args, at_most=args.memory * GIB if name != list(modes)[-1] else math.inf)
        size = f"{ledger.peak.total() / GIB:.0f} GiB"
        if fits(args, ledger):
            seconds = step_seconds(args, ledger)
            return f"{name}: {size}, {seconds:.{0 if seconds >= 10 else 1}f} s"
    return f"does not fit: {size}"


def main(args) -> None:
    if args.table:
        table(args)
        return
    check(args)
    report(args, simulate(args))
