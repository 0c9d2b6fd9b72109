"""Every model, adapter and run that is opened or written.

    DIR/config.json                  the backbone's fields under Hugging Face's names, and "nanoedit": what the
                                     checkpoint remembers of its method
        model.safetensors            or shards with an index
        tokenizer files              plumbing/tokenizer.py
    DIR/adapter_config.json          instead of a whole model: LoRA adapters in the layout of the PEFT library, and
        adapter_model.safetensors    heads.safetensors, everything outside the backbone
    RUN/checkpoint-500/              a model or adapters as above, and beside them
        optimizer.safetensors        moments of AdamW, by parameter
        train_state.json             {"step", "args", ...}: everything else that the next step depends on
        SHA256SUMS                   of all these files; `sha256sum -c` reads it, too

Files and folders are written beside their place and renamed when they are complete, so that a process killed at any
moment leaves the old or the new. Whatever is opened was perhaps made by somebody else, or lay on a bad disk: nothing is
built before the names and shapes of its tensors are known, and errors name file and field.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lora
import models
import parallel
from plumbing import methods
from plumbing.config import check_field, complete_config, config_as_json, disk_name, naming, read_config
from plumbing.tokenizer import Tokenizer, load_tokenizer, read_json

STATE, SUMS = "train_state.json", "SHA256SUMS"

# ---------------------------------------------------------------------------------------------------- whole files


@contextlib.contextmanager
def replacing(target: Path):
    """A path beside `target`, where a file or folder is to be made. It is on the disk, under its final name, when the
    block ends without an error, and gone otherwise. What stood at `target` before is replaced."""
    partial = target.with_name(f".writing-{target.name}")
    remove(partial)  # of a process that was killed
    try:
        yield partial
        for path in [*partial.glob("*"), partial]:
            sync(path)
        if target.is_dir():
            remove(target)
        os.replace(partial, target)
        sync(target.parent)
    finally:
        remove(partial)


def write_whole(file: Path, text: str) -> None:
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, value) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a rename never outlives what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Deletes a file or folder, if it is there. Half a folder never stands under its name."""
    if path.is_dir():
        doomed = path.with_name(f".deleting-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)  # of a process that was killed
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    path.unlink(missing_ok=True)


def check_writable(file: Path, name: str) -> None:
    """Makes the folder of a file. Raises OSError, now rather than when the work is done, where it cannot be written.

    name: what the error calls it, such as a flag with its value.
    """
    try:
        is_new = not file.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab"):
            pass
        if is_new:
            file.unlink(missing_ok=True)  # another process may have tried at the same time
    except OSError as e:
        raise OSError(f"{name}: cannot be written to ({e.strerror or e}); choose another") from None


def lock(file: Path) -> None:
    """Keeps a file, in an output directory, locked until this process ends, however it ends. Raises OSError saying
    which process holds it already. (POSIX locks: they work on NFS, and children do not inherit them.)"""
    handle = os.open(file, os.O_RDWR | os.O_CREAT)  # never closed, or the lock would be gone
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = f"process {os.read(handle, 100).decode()} writes to it"
        raise OSError(f"--output_dir {file.parent}: {holder}; let it end, or choose another") from None
    except OSError:  # a disk that knows no locks
        return
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()} on {os.uname().nodename}".encode())


# ---------------------------------------------------------------------------------------------------- tensors

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def local_path(path_or_hub_id: str, patterns=CHECKPOINT_FILES, revision: str | None = None) -> Path:
    """A local directory (of a run: its final or newest checkpoint), or a hub repository fetched into the hub's cache.

    Downloads are resumed. Raises OSError saying what was tried, ValueError for a pipe or a device among the files.
    """
    directory = Path(path_or_hub_id)
    if directory.is_dir():
        runs = [] if (directory / "config.json").is_file() else checkpoints(directory)
        directory = runs[-1] if runs else directory
    elif directory.is_absolute() or str(path_or_hub_id).count("/") != 1 or str(path_or_hub_id).startswith("."):
        raise OSError(f"{path_or_hub_id}: no such directory, and not of the form owner/name")
    else:
        from huggingface_hub import snapshot_download

        try:
            directory = Path(snapshot_download(path_or_hub_id, allow_patterns=list(patterns), revision=revision))
        except Exception as e:  # the hub client raises a dozen unrelated classes
            reason = str(e).partition("\n")[0] or type(e).__name__
            raise OSError(f"{path_or_hub_id}: no such directory, and the hub did not deliver it ({reason})") from e
    for file in (file for pattern in patterns for file in directory.glob(pattern)):
        if not file.is_file() and not file.is_dir():  # links to files are followed: the hub's cache is made of them
            raise ValueError(f"{file}: a pipe, a device, or a link to what is no file")
    return directory


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Lazy:
    """A tensor that is read, or made, when it is needed.

    name: in the file; meta: its shape and dtype, without values; how: "copied", or where else it comes from.
    """

    name: str
    file: Path | None
    meta: Tensor
    make: Callable[[], Tensor]
    how: str = "copied"

    def read(self) -> Tensor:
        """Raises ValueError where a number in it is not finite."""
        tensor = self.make()
        if tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):  # needs no memory, as isfinite() would
            raise ValueError(f"{self.file}: tensor {self.name!r} holds NaN or infinity")
        return tensor.to(self.meta.dtype)

    def check(self, *shape: int) -> None:
        """Raises ValueError where it has another shape, or holds no floating-point numbers."""
        where = f"{self.file}: tensor {self.name!r}"
        if self.meta.dtype not in FLOATS.values():
            raise ValueError(f"{where} is none of {', '.join(FLOATS)}: quantised weights are not supported")
        if self.meta.shape != shape:
            raise ValueError(f"{where} has shape {list(self.meta.shape)}, its config asks for {list(shape)}")


def tensors_of(file: Path) -> dict[str, Lazy]:
    """The tensors of a safetensors file by name. Raises ValueError for one that is truncated or corrupt."""
    found = {}
    try:
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                stored = f.get_slice(name)
                dtype = FLOATS.get(stored.get_dtype(), torch.uint8)  # no float: `check` refuses it
                meta = torch.empty(stored.get_shape(), dtype=dtype, device="meta")
                found[name] = Lazy(name, file, meta, partial(read_tensor, file, name))
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: truncated or corrupt safetensors file ({e})") from None
    return found


def read_tensor(file: Path, name: str) -> Tensor:
    """In a memory map of the file, which lasts as long as the tensor."""
    with safe_open(file, "pt") as f:
        return f.get_tensor(name)


SAFETENSORS = {"model.safetensors": tensors_of}


def find_tensors(directory: Path, formats=SAFETENSORS, find=local_path) -> dict[str, Lazy]:
    """The tensors of a checkpoint by their names on disk; of a directory with LoRA adapters, those of its base model
    with the adapters merged into them. Raises OSError for missing, ValueError for broken files.

    formats: a dict, name of a file, or of its shards' index without ".index.json" -> function that reads such files.
    find: name of the base model -> its directory.
    """
    if (directory / "adapter_config.json").is_file():
        return merge_adapters(directory, formats, find)
    for name, read in formats.items():
        single, index = directory / name, directory / f"{name}.index.json"
        files = indexed_files(index) if index.is_file() else [single] * single.is_file()
        if files:
            return {name: tensor for file in files for name, tensor in read(file).items()}
    raise OSError(f"{directory}: no weights; looked for {', '.join(formats)}; convert.py reads pytorch_model.bin, too")


def indexed_files(index: Path) -> list[Path]:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not {*map(type, weight_map.values())} <= {str}:
        raise ValueError(f"{index}: no weight_map in it, of tensor names to file names")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if index.parent / file.name != file:
            raise ValueError(f"{index}: {str(file)!r} lies in another folder")
        if not file.is_file():
            raise OSError(f"{file}: missing, although {index.name} names it")
    return files


# ---------------------------------------------------------------------------------------------------- models


def build(config: models.Config, device="cpu") -> nn.Module:
    """The model of a configuration: its backbone under the heads of its method. On the device "meta": without memory
    for its weights."""
    stored = config.nanoedit = methods.complete(config.nanoedit)
    head_sizes = config.hidden_size, config.vocab_size, config.vocab_bias
    with torch.device(device):
        model = methods.get(stored["method"]).Model(models.backbone(config), *head_sizes, stored)
    model.config = config
    return model


def new_model(method: str, preset: str, vocab_size: int, seed: int = 0, **stored) -> nn.Module:
    """A new model with random weights. preset: a key of models.PRESETS. stored: what it is to remember."""
    sizes = {"model_type": "llama", "vocab_size": vocab_size} | preset_sizes(preset)
    model = build(complete_config(sizes | {"nanoedit": {"method": method} | stored}))
    init_weights(model, torch.Generator().manual_seed(seed))
    return model


def init_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights for backbone and heads, in place."""
    models.init_weights(model, generator)
    model.init_heads(generator)


def preset_sizes(preset: str) -> dict:
    if preset not in models.PRESETS:
        raise ValueError(f"--preset {preset!r} is not known; choose from {', '.join(models.PRESETS)}")
    return models.PRESETS[preset]


def load(path: str, device="cpu", dtype=torch.float32, method: str | None = None) -> nn.Module:
    """A checkpoint of any method, from a directory or a hub id. The model is built on the meta device and its tensors
    are copied one by one: in the memory map they lie at odd addresses, where the kernels of some processors round
    differently, and a run would not go on exactly as it began. LoRA adapters are merged into their base model.

    method: when given, a checkpoint of another method is refused. Raises OSError / ValueError naming the file.
    """
    directory = local_path(path)
    config, have = read_config(directory), find_tensors(directory)
    found = config.nanoedit.get("method") or methods.recognise(have)
    if found is None:
        command = f"convert.py --to {method or ' or '.join(methods.METHODS)} -i {path} -o OUT"
        raise ValueError(f"{directory}: no heads of a method in this checkpoint; add them with `{command}`")
    if method and found != method:
        hint = "convert.py makes one from the other"
        raise ValueError(f"{directory}: this is a checkpoint of method {found!r}, but {method!r} is asked for; {hint}")
    if "method" not in config.nanoedit:  # as the published systems save them
        config.nanoedit = methods.published(found) | config.nanoedit | {"method": found}
    model = build(config, "meta")
    names = {name: disk_name(naming(config), name) for name in model.state_dict()}
    read = read_state(model, names, have, directory)
    model.load_state_dict({name: tensor.to(device, dtype, copy=True) for name, tensor in read}, assign=True)
    return model.requires_grad_(True)


def read_state(model: nn.Module, names: dict[str, str], have: dict[str, Lazy], directory: Path):
    """Yields (name, tensor) for the model's tensors that are keys of `names`, which holds their names on disk. Raises
    ValueError for one that is missing or has another shape."""
    state = model.state_dict()
    for name, name_on_disk in names.items():
        if name_on_disk not in have:
            hint = f"`convert.py --to {model.config.nanoedit['method']}` adds missing heads"
            raise ValueError(f"{directory}: tensor {name_on_disk!r} is missing; {hint}")
        have[name_on_disk].check(*state[name].shape)
        yield name, have[name_on_disk].read()


def check_rows(model: nn.Module, tokenizer, directory) -> None:
    """Raises ValueError where the tokenizer of a checkpoint knows more tokens than its model has rows."""
    known, rows = tokenizer.vocab_size, model.config.vocab_size
    if known > rows:
        raise ValueError(f"{directory}: the tokenizer has {known} tokens, but the model only {rows} rows")


def open_for_inference(directory: Path, device: str, bf16: bool) -> tuple[nn.Module, Tokenizer]:
    """A checkpoint's model and tokenizer. Raises OSError / ValueError, also where the two do not belong together."""
    model = load(directory, device, torch.bfloat16 if bf16 else torch.float32).eval()
    tokenizer = load_tokenizer(directory)
    check_rows(model, tokenizer, directory)
    return model, tokenizer


def open_for_training(args, directory: Path, resume: Path | None) -> nn.Module:
    """The checkpoint to start from or to continue, with LoRA adapters where they are asked for."""
    adapted = (directory / "adapter_config.json").is_file()
    if resume and adapted != args.lora:
        kind = "with" if adapted else "without"
        raise ValueError(f"{directory}: this run was trained {kind} --lora; go on {kind} it, or choose another folder")
    if not args.lora:
        return load(directory, method=args.method)
    if adapted and not resume:
        raise ValueError(f"{directory}: holds adapters already; `convert.py --to {args.method} --merge_lora` first")
    if resume:
        return load_adapters(directory, method=args.method, four_bit=args.load_in_4bit)
    model = load(directory, method=args.method)
    model.base = str(directory)
    return lora.add(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.load_in_4bit, args.seed)


def save(model: nn.Module, directory: str, state: dict | None = None) -> None:
    """config.json and model.safetensors, or adapters. state: all of it, where the model itself holds only shards."""
    directory, kind, state = Path(directory), naming(model.config), state or model.state_dict()
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config_as_json(model.config))
    if hasattr(model, "lora"):
        return save_adapters(model, directory, state)
    write_tensors(directory / "model.safetensors", {disk_name(kind, name): state[name] for name in state})


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------- adapters

PREFIX = "base_model.model."  # of every name in a PEFT file
ADAPTER_FIELDS = {  # of adapter_config.json, those read again
    "r": ("a whole number from 1 to 65536", lambda r: type(r) is int and 1 <= r <= 65536),
    "lora_alpha": float,
    "lora_dropout": ("a number from 0 to 1", lambda p: type(p) in (int, float) and 0 <= p <= 1),
    "base_model_name_or_path": str,
}


def adapted_names(model: nn.Module) -> dict[str, str]:
    """Names of the tensors that are saved with adapters -> their names on disk: the adapters themselves, under PEFT's
    names, and everything outside the backbone."""
    kind, names = naming(model.config), model.state_dict().keys()
    adapters = {name: PREFIX + disk_name(kind, name) for name in names if ".lora_" in name}
    return {name: name for name in names if not name.startswith("model.")} | adapters


def save_adapters(model: nn.Module, directory: Path, state: dict) -> None:
    """Adapters and heads alone. model.base: the checkpoint they belong to, a directory or a hub id."""
    config = model.lora | {
        "peft_type": "LORA",
        "base_model_name_or_path": os.path.abspath(model.base) if os.path.isdir(model.base) else model.base,
        "target_modules": sorted({name.rpartition(".")[2] for name in lora.adapted_layers(model)}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    for file, is_adapter in (("adapter_model.safetensors", True), ("heads.safetensors", False)):
        names = {name: theirs for name, theirs in adapted_names(model).items() if (".lora_" in name) == is_adapter}
        write_tensors(directory / file, {theirs: state[name] for name, theirs in names.items()})
    write_json(directory / "adapter_config.json", config)


def read_adapters(directory: Path, find) -> tuple[dict, Path, dict[str, Lazy]]:
    """(adapter_config.json, the directory of the base model, adapters and heads by their names on disk).

    find: base_model_name_or_path -> directory. Raises OSError / ValueError naming the file.
    """
    file = directory / "adapter_config.json"
    settings = {"lora_dropout": 0.0} | read_json(file)
    try:
        for field, kind in ADAPTER_FIELDS.items():
            check_field(field, settings.get(field), kind)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None
    base = find(settings["base_model_name_or_path"])
    if (base / "adapter_config.json").is_file():
        raise ValueError(f"{file}: the base model {base} holds adapters itself")
    have = tensors_of(directory / "adapter_model.safetensors") | tensors_of(directory / "heads.safetensors")
    return settings, base, have


def merge_adapters(directory: Path, formats, find) -> dict[str, Lazy]:
    """See find_tensors. The sums are float32 and rounded once, to what is asked for."""
    settings, base, adapters = read_adapters(directory, find)
    rank, scale = settings["r"], settings["lora_alpha"] / settings["r"]
    have = find_tensors(base, formats)
    for name in [name for name in adapters if name.endswith(".lora_A.weight")]:
        A, B = adapters.pop(name), adapters.pop(name.replace(".lora_A.", ".lora_B."), None)
        W = have.get(name.removeprefix(PREFIX).replace(".lora_A", ""))
        if not W or not B:
            raise ValueError(f"{A.file}: {name!r} has no partner in it, or nothing to be added to in {base}")
        A.check(rank, W.meta.shape[1])
        B.check(W.meta.shape[0], rank)
        have[W.name] = replace(W, make=lambda W=W, B=B, A=A: lora.merged(W.read(), B.read(), A.read(), scale))
    return have | adapters  # what is left of these: heads


def load_adapters(directory: str, device="cpu", dtype=torch.float32, method=None, four_bit=False) -> nn.Module:
    """The base model of a directory that `save_adapters` wrote, with its adapters, unmerged."""
    directory = Path(directory)
    settings, base, have = read_adapters(directory, local_path)
    model = load(base, device, dtype, method)
    model.config = read_config(directory)
    lora.add(model, settings["r"], settings["lora_alpha"], settings["lora_dropout"], four_bit)
    model.base = settings["base_model_name_or_path"]
    if "unigram" in have:  # a run that starts from `uniform` may adapt a model that does not
        model.register_buffer("unigram", torch.ones(model.config.vocab_size, device=device))
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in read_state(model, adapted_names(model), have, directory):
            state[name].copy_(tensor)
    return model


# ---------------------------------------------------------------------------------------------------- runs


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [file.parent for file in out.glob(f"checkpoint-*/{STATE}")]
    return [path for _, path in sorted((step_of(path), path) for path in found)]


def step_of(checkpoint: Path) -> float:
    """The step at which a complete checkpoint was written; infinite where its train_state.json is damaged."""
    try:
        state = read_json(checkpoint / STATE)
    except (ValueError, OSError):
        return math.inf
    step = state.get("step")
    return step if type(step) is int and step >= 0 and isinstance(state.get("args"), dict) else math.inf


def sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint of a run, or "". One that an earlier version wrote has no checksums."""
    try:
        lines = (checkpoint / SUMS).read_text("utf-8").splitlines() if (checkpoint / SUMS).exists() else []
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        wrong = [name for name in [STATE, *sums] if sums and sha256(checkpoint / Path(name).name) != sums.get(name)]
    except (OSError, ValueError) as e:
        return f"{checkpoint / SUMS}: {e}"
    if wrong:
        return f"{checkpoint / wrong[0]}: not as it was written"
    return "" if step_of(checkpoint) < math.inf else f"{checkpoint / STATE}: no step and args of a run in it"


def prepare_output(args, ranks) -> tuple[Path, Path | None]:
    """The output directory, proven writable before anything long starts, and the checkpoint to continue from. One that
    is damaged is put aside, and the one before it taken."""
    out = Path(args.output_dir)
    if ranks.is_main:
        check_writable(out / ".writable", f"--output_dir {out}")
        lock(out / ".lock")
        for rest in [*out.glob(".writing-*"), *out.glob(".deleting-*")]:  # of a run that was killed
            remove(rest)
        while not args.overwrite_output_dir and (found := checkpoints(out)) and (reason := damage(found[-1])):
            if len(found) == 1:
                hint = f"if the change is yours, delete {SUMS} there, else start anew with --overwrite_output_dir"
                raise ValueError(f"{reason}; this checkpoint is damaged, and there is none before it; {hint}")
            remove(aside := out / f"damaged-{found[-1].name}")
            os.replace(found[-1], aside)
            ranks.say(f"{reason}; this checkpoint is damaged, and now called {aside.name}: taking the one before it")
    ranks.barrier()
    found = [] if args.overwrite_output_dir else [str(path) for path in checkpoints(out)]
    if any(other != found for other in ranks.gather(found)):
        raise ValueError(f"--output_dir {out}: processes see different checkpoints in it; it must be on a shared disk")
    return out, Path(found[-1]) if found else None


def clear_output(out: Path, args, ranks) -> None:
    """--overwrite_output_dir, once everything that the new run needs has been read."""
    if args.overwrite_output_dir and ranks.is_main:
        for old in out.glob("checkpoint-*"):
            remove(old)
        (out / "metrics.jsonl").unlink(missing_ok=True)
    ranks.barrier()


def save_run(out: Path, name: str, model: parallel.ParallelModel, tokenizer, optimizer, state: dict, args) -> Path:
    """OUT/checkpoint-NAME, by all processes together; rank 0 writes. state: for train_state.json, with the step.

    Raises OSError when it cannot be written; older checkpoints are then as they were.
    """
    target, ranks = out / f"checkpoint-{name}", model.ranks
    is_saved = (target / STATE).is_file() and step_of(target) == state["step"]
    if ranks.all_reduce_max(is_saved):  # a run that was stopped where it had just saved
        return target
    weights = model.plain.state_dict()
    if args.lora:
        weights = {name: weights[name] for name in adapted_names(model.plain)}
    weights = parallel.gather(weights, ranks)
    moments = parallel.gather(parallel.moments(model.plain, optimizer), ranks)
    if ranks.is_main:
        try:
            if target.exists():  # the end of a shorter run becomes a checkpoint like any other
                older = out / f"checkpoint-{step_of(target)}"
                remove(target) if older.exists() else os.replace(target, older)
            with replacing(target) as partial:
                save(model.plain, partial, weights)
                tokenizer.save(partial)
                write_tensors(partial / "optimizer.safetensors", moments)
                write_json(partial / STATE, state | {"args": vars(args)})
                sums = [f"{sha256(file)}  {file.name}\n" for file in sorted(partial.iterdir())]
                (partial / SUMS).write_text("".join(sums), encoding="utf-8")
        except (OSError, SafetensorError) as e:
            hint = "" if args.save_total_limit else "--save_total_limit keeps fewer checkpoints; "
            hint += f"{resume_hint(args)} goes on from the last checkpoint"
            raise OSError(f"{target}: cannot be saved ({e}); {hint}") from e
        for old in checkpoints(out)[: -args.save_total_limit] if args.save_total_limit else []:
            remove(old)
    ranks.barrier()
    return target


def state_of(args, resume: Path, steps: int, ranks) -> dict | None:
    """train_state.json of the checkpoint to go on from; None when the run is finished."""
    state = read_json(resume / STATE)
    step = state["step"]
    if step > steps or (step == steps and resume.name == "checkpoint-final"):
        ranks.say(f"{resume.parent} is finished, at step {step} of {steps}; for a new run choose another --output_dir")
        return None
    changed = {k: v for k, v in vars(args).items() if k in state["args"] and state["args"][k] != v}
    if changed:
        ranks.say("changed since the checkpoint was written: " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    ranks.say(f"continuing {resume} at step {step} of {steps}")
    return state


def restore(model: nn.Module, optimizer, checkpoint: Path) -> None:
    """The optimizer as it was when the checkpoint of a run was written."""
    stored = tensors_of(checkpoint / "optimizer.safetensors")
    parallel.restore_moments(model, optimizer, {name: t.read().clone() for name, t in stored.items()})


def resume_hint(args) -> str:
    """How to go on from a checkpoint, in words."""
    return "the same command" + " without --overwrite_output_dir" * args.overwrite_output_dir
