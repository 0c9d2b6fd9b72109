"""The record of a run: metrics.jsonl, the numbers behind the progress bar, and the steps that could not be made."""

import contextlib
import json
import math
import sys
import time
import uuid
from pathlib import Path

from tqdm import tqdm

from parallel import Ranks
from plumbing.checkpoints import write_whole


class Log:
    """metrics.jsonl: one JSON object per logging step, means since the last one; tensorboard or wandb on request.

    Steps whose loss or gradient is not finite are counted here too; too many in a row end the run.
    """

    PATIENCE = 10  # steps in a row without a finite loss and gradient

    def __init__(self, out: Path, state: dict, steps: int, args, ranks: Ranks):
        self.file, self.ranks, self.steps, self.every = out / "metrics.jsonl", ranks, steps, args.logging_steps
        lines = trim_metrics(self.file, state["step"]) if ranks.is_main else []
        self.start = time.monotonic() - max((line.get("seconds", 0.0) for line in lines), default=0.0)
        evaluated = [line["step"] for line in lines if "eval_loss" in line]
        self.last_eval = ranks.all_reduce_max(max(evaluated, default=0))
        self.reset()
        stored = {"skipped": 0, "skipped_in_a_row": 0, "sums": [], "counts": []} | state.get("log", {})
        self.id = stored.get("id") or uuid.uuid4().hex[:8]
        self.report = open_report(args.report_to, out, self.id, state["step"], args) if ranks.is_main else None
        self.skipped, self.skipped_in_a_row = stored["skipped"], stored["skipped_in_a_row"]
        if len(stored["sums"]) == ranks.world:
            self.sums, self.counts = stored["sums"][ranks.rank], stored["counts"][ranks.rank]
        elif ranks.is_main:  # the checkpoint of another number of processes
            for mine, theirs in ((self.sums, stored["sums"]), (self.counts, stored["counts"])):
                for name in dict.fromkeys(name for d in theirs for name in d):
                    mine[name] = sum(d.get(name, 0) for d in theirs)
        pause = 0.2 if sys.stderr.isatty() else 20  # seconds between updates of the bar: a log file wants few
        self.bar = tqdm(total=steps, initial=state["step"], disable=not ranks.is_main, unit="step", mininterval=pause)

    def state(self) -> dict:
        """What the next line of metrics.jsonl depends on, for a checkpoint. All processes must ask."""
        sums = self.ranks.gather({name: float(total) for name, total in self.sums.items()})
        counts = self.ranks.gather(self.counts)
        return {
            "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "sums": sums, "counts": counts,
            "id": self.id,
        }  # fmt: skip

    def reset(self) -> None:
        self.sums, self.counts, self.tokens, self.since, self.micro_batches = {}, {}, 0, time.monotonic(), []

    def collect(self, loss, metrics: dict, examples: list) -> None:
        """A micro-batch. Tensors stay on their device until they are written."""
        self.micro_batches.append(({"loss": loss.detach(), **metrics}, sum(map(len, examples))))

    def is_finite(self, grad_norm) -> bool:
        """Whether the step can be made, as far as this process sees."""
        losses = [float(metrics["loss"]) for metrics, _ in self.micro_batches]
        return all(map(math.isfinite, [float(grad_norm), *losses]))

    def add(self, grad_norm) -> None:
        """The step was made: what has been collected counts."""
        norm = [({"grad_norm": grad_norm}, 0)] if self.ranks.is_main else []  # of all processes: counted once
        for metrics, tokens in self.micro_batches + norm:
            for name, value in metrics.items():
                self.sums[name] = self.sums.get(name, 0) + value
                self.counts[name] = self.counts.get(name, 0) + 1
            self.tokens += tokens
        self.skipped_in_a_row, self.micro_batches = 0, []
        self.bar.update()

    def skip(self, step: int, batches: list, tokenizer) -> None:
        """The step was not made. Raises ValueError after too many in a row, with the batch saved."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        losses, self.micro_batches = [float(metrics["loss"]) for metrics, _ in self.micro_batches], []
        self.bar.update()
        self.ranks.say(
            f"step {step + 1} skipped: loss or gradient not finite (losses {', '.join(f'{x:.3g}' for x in losses)}; "
            f"{self.skipped} skipped so far)"
        )
        if self.skipped_in_a_row < self.PATIENCE:
            return
        file = self.file.with_name(f"not-finite-step-{step + 1}-rank-{self.ranks.rank}.json")
        examples = [
            {"micro_batch": m, "loss": str(loss), "text": tokenizer.decode(e.prompt + e.response, skip_special=False)}
            | vars(e)
            for m, (loss, batch) in enumerate(zip(losses, batches))
            for e in batch
        ]
        file.write_text(json.dumps(examples, indent=1, ensure_ascii=False), encoding="utf-8")
        self.ranks.barrier()
        raise ValueError(
            f"loss or gradient was not finite in {self.PATIENCE} steps in a row; the examples of the last one are in "
            f"{file}; lower --learning_rate or --max_grad_norm, or look for what is odd in the data"
        )

    @contextlib.contextmanager
    def paused(self):
        """Around work that is no training: its time does not count in tokens per second."""
        begin = time.monotonic()
        yield
        self.since += time.monotonic() - begin

    def write_when_due(self, step: int, lr: float) -> None:
        if step % self.every and step != self.steps:
            return
        means = self.ranks.mean({name: float(total) for name, total in self.sums.items()}, self.counts)
        speed = self.tokens * self.ranks.world / (time.monotonic() - self.since)
        skipped = {"skipped_steps": self.skipped} if self.skipped else {}
        measured = {"tokens_per_s": round(speed), "seconds": round(time.monotonic() - self.start, 1)}
        self.append({"step": step, **means, "lr": lr, **skipped, **measured})
        self.reset()
        shown = {"loss": f"{means.get('loss', math.nan):.3f}", "lr": f"{lr:.1e}", "tok/s": f"{speed:.0f}"}
        self.bar.set_postfix(shown | skipped, refresh=False)

    def write_eval(self, step: int, values: dict) -> None:
        self.append({"step": step, **values})
        self.ranks.say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        self.last_eval = step

    def append(self, record: dict) -> None:
        if self.ranks.is_main:
            try:
                with open(self.file, "a", encoding="utf-8") as f:
                    f.write(json.dumps(record) + "\n")
            except OSError as e:
                raise OSError(f"{self.file}: cannot be written to ({e.strerror or e})") from e
            self.report(record)


def open_report(to: str, out: Path, run_id: str, step: int, args):
    """A function that takes lines of metrics.jsonl to where --report_to says, and goes on where the run does, at
    `step`. Raises ValueError."""
    if to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(out / to, purge_step=step + 1)
        return lambda record: [board.add_scalar(name, value, record["step"]) for name, value in record.items()]
    if to == "wandb":
        import wandb

        try:
            run = wandb.init(project="nanoEdit", name=out.name, dir=out, id=run_id, resume="allow", config=vars(args))
        except wandb.Error as e:
            raise ValueError(f"--report_to wandb: {e}") from None
        return lambda record: run.log(record, step=record["step"])
    return lambda record: None


def trim_metrics(file: Path, step: int) -> list[dict]:
    """Drops lines that an interrupted run logged after its last checkpoint: they will be logged again. Returns the
    others."""
    if not file.exists():
        return []
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["step"] <= step]
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise ValueError(f"{file}: not the metrics of a run ({e}); move it away to go on without") from None
    write_whole(file, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
