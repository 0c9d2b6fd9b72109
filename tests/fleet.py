"""Training runs in processes of their own, killed and restarted at will.

The processes are forked off a server that has torch loaded, so that one starts within milliseconds. They meet as under
torchrun: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are all that it sets for them.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["train"])

ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # for processes that are not forked off the server
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def child(argv, rank, world, port, log, perturb):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    import torch

    import models
    import train
    from plumbing import cli

    torch.set_num_threads(1)
    models.PRESETS["tiny"] = TINY
    sys.argv = ["train.py", *argv]
    if perturb:
        perturb(rank)
    cli.run(train.main)


class Fleet:
    """`world` processes that run train.py with the same flags."""

    def __init__(self, flags: str, out: Path, world: int = 1, perturb=None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        out.parent.mkdir(parents=True, exist_ok=True)
        self.logs = [out.with_name(f"{out.name}-rank{rank}.log") for rank in range(world)]
        argv = f"{flags} --output_dir {out}".split()
        self.processes = [
            forkserver.Process(target=child, args=(argv, rank, world, port, str(log), perturb))
            for rank, log in enumerate(self.logs)
        ]
        for p in self.processes:
            p.start()

    def kill(self, rank: int | None = None, number=signal.SIGKILL) -> None:
        for p in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(p.pid, number)

    def until(self, condition, seconds: float = 300) -> None:
        """Waits for the condition, or until all processes have ended."""
        end = time.monotonic() + seconds
        while not condition() and any(p.is_alive() for p in self.processes):
            assert time.monotonic() < end, self.said()
            time.sleep(0.002)

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit statuses. Processes that are still there after so many seconds are killed and reported."""
        end = time.monotonic() + seconds
        for p in self.processes:
            p.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, p in enumerate(self.processes) if p.is_alive()]
        for rank in late:
            self.processes[rank].kill()
            self.processes[rank].join()
        assert not late, f"ranks {late} did not end:\n{self.said()}"
        return [p.exitcode for p in self.processes]

    def said(self) -> str:
        return "\n".join(f"--- rank {rank}\n{log.read_text()}" for rank, log in enumerate(self.logs) if log.exists())


def run(flags: str, out: Path, world: int = 1, perturb=None) -> None:
    fleet = Fleet(flags, out, world, perturb)
    assert fleet.wait() == [0] * world, fleet.said()


def metrics(out: Path) -> list[dict]:
    """metrics.jsonl without what is measured by the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]
