"""The checkpoints of a run: written whole or not at all, so that a run killed at any moment goes on from the newest.

    OUT/checkpoint-500/      config.json, model.safetensors, tokenizer files: a model like any other (models.py)
        optimizer.safetensors    moments of AdamW, by parameter
        train_state.json         {"step", "args", ...}: everything else that the next step depends on
    OUT/metrics.jsonl        one JSON object per line

A checkpoint is written as OUT/.writing-500 and renamed when it is complete; an old one is renamed before it is deleted.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

import lora
import models
import parallel
from lora import PREFIX, check_base, read_adapter_config  # noqa: F401
from models import (  # noqa: F401
    LLADA_NAMES, disk_name, indexed_files, llada_config, local_path, open_tensors, read_config, read_tensor, rename,
    load, save, tensor_files,
)  # fmt: skip

STATE = "train_state.json"


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [file.parent for file in out.glob(f"checkpoint-*/{STATE}")]
    return [path for _, path in sorted((step_of(path), path) for path in found)]


def step_of(checkpoint: Path) -> int:
    """The step at which a complete checkpoint was written. Raises ValueError naming its train_state.json."""
    file = checkpoint / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if type(state["step"]) is not int or state["step"] < 0 or not isinstance(state["args"], dict):
            raise ValueError("no step and args of a run in it")
        return state["step"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{file}: not readable ({e}); delete {checkpoint} to go on from another") from None


def prepare_output(args, ranks) -> tuple[Path, Path | None]:
    """The output directory, proven writable before anything long starts, and the checkpoint to continue from."""
    out = Path(args.output_dir)
    if ranks.is_main:
        try:
            out.mkdir(parents=True, exist_ok=True)
            probe = out / ".writable"
            probe.touch()
            probe.unlink()
            if (out / "metrics.jsonl").is_dir():
                raise OSError("metrics.jsonl is a folder")
            for rest in [*out.glob(".writing-*"), *out.glob(".deleting-*")]:  # of a run that was killed
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        except OSError as e:
            raise OSError(
                f"--output_dir {out}: cannot be written to ({e.strerror or e}); choose another folder"
            ) from None
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


def save_checkpoint(out: Path, name: str, model, tokenizer, optimizer, state: dict, args, ranks) -> Path:
    """OUT/checkpoint-NAME, by all processes together; rank 0 writes. state: for train_state.json, with the step.

    Raises OSError when it cannot be written; older checkpoints are then as they were.
    """
    target, partial = out / f"checkpoint-{name}", out / f".writing-{name}"
    is_saved = (target / STATE).is_file() and step_of(target) == state["step"]
    if ranks.most(is_saved):  # a run that was stopped where it had just saved
        return target
    weights = parallel.gather_state(model, ranks, lora.is_saved if args.lora else None)
    moments = parallel.gather_moments(model, optimizer, ranks)
    if ranks.is_main:
        try:
            if args.lora:
                lora.save(model, partial, model.base, weights)
            else:
                models.save(model, partial, weights)
            tokenizer.save(partial)
            save_file(moments, partial / "optimizer.safetensors")
            (partial / STATE).write_text(json.dumps(state | {"args": vars(args)}, indent=2))
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            if target.exists():  # the end of a shorter run: kept until the new one is in its place
                older = out / f"checkpoint-{step_of(target)}"
                remove(target) if older.exists() else os.replace(target, older)
            os.replace(partial, target)
            sync(out)
        except (OSError, SafetensorError) as e:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"{target}: cannot be saved ({e}); {again(args)} goes on from the last checkpoint") from e
        for old in checkpoints(out)[: -args.save_total_limit]:
            remove(old)
    ranks.barrier()
    return target


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a rename never outlives what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(f".deleting-{checkpoint.name}")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def again(args) -> str:
    """How to go on from a checkpoint, in words."""
    return "the same command" + " without --overwrite_output_dir" * args.overwrite_output_dir


def trim_metrics(file: Path, step: int) -> list[dict]:
    """Drops lines that an interrupted run logged after its last checkpoint: they will be logged again. Returns the
    others."""
    if not file.is_file():
        return []
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["step"] <= step]
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise ValueError(f"{file}: not the metrics of a run ({e}); move it away to go on without") from None
    shorter = file.with_name(".writing-metrics")
    try:
        shorter.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(shorter, file)
    except OSError as e:
        raise OSError(f"{file}: cannot be written to ({e.strerror or e})") from e
    return kept


def build_model(method: str, config):
    from plumbing import methods

    return methods.get(method).Model(config)


def write_whole(path: Path, text: str) -> None:
    """Writes beside, syncs and renames: the file is there whole or not at all."""
    partial = path.with_name(f".writing-{path.name}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


def write_json(path: Path, value) -> None:
    write_whole(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextmanager
def whole_directory(target: Path):
    """A directory beside the target to write into; renamed to it at the end, or removed."""
    partial = target.with_name(f".writing-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            sync(file)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
