"""python tests/drills/kill_run.py [--moments 50]: kill a run with kill -9 at many moments; each must resume exactly.

A run on a tiny random model has more than a hundred events: reading its parts, every optimizer step, every fsync and
rename, every step of decoding. For evenly spread events, a process is killed at the event, and the same configuration
is started again. The files that it leaves are compared with those of an uninterrupted run: adapter and predictions byte
by byte, metrics and result except for times. The drill prints one line per stage. It exits with 1 if anything differs,
or if a kill cost more optimizer steps than one checkpoint interval.

The processes are forks of this one, which has imported everything. So a kill costs a fraction of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.models import base_model
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run, trainer
from tiedlora.scoring import decoding
from tiedlora.tracking import metrics_file
from tiedlora.training import checkpoint

CHECKPOINT_EVERY = 3
STEPS = 12
TIMES = ("seconds", "loss_seconds", "tokens_per_s", "peak_memory_bytes")


def config(outputs: Path) -> Config:
    return compose_config(
        [
            "model=tiny_llama",
            "task.options.rows={train: 40, validation: 8, test: 8}",
            "task.rows.validation=null",
            "task.max_new_tokens=8",
            f"train.steps={STEPS}",
            "train.batch_size=4",
            "train.warmup_steps=2",
            "train.validate_every=4",
            f"train.checkpoint_every={CHECKPOINT_EVERY}",
            "train.log_every=2",
            "train.dtype=float32",
            "train.threads=1",
            "tying.dropout=0.1",
            "score.checkpoint=best",
            f"outputs={outputs}",
        ]
    )


class Events:
    """Counts the events of the run, and kills the process at one of them."""

    def __init__(self, kill_at: int | None, journal: Path) -> None:
        self.kill_at, self.journal, self.count = kill_at, journal, 0
        self.stage = "start-up"

    def at(self, stage: str | None, name: str) -> None:
        self.stage = stage or self.stage
        self.count += 1
        if self.count == self.kill_at:
            self.write(f"killed {self.stage}: {name}")
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, line: str) -> None:
        """Append to the journal at once, so that it is complete even if the process is killed."""
        with open(self.journal, "ab", buffering=0) as file:
            file.write(f"{line}\n".encode())

    def install(self) -> None:
        def before(owner: Any, name: str, stage: str | None, note: Callable[..., None] = lambda: None) -> None:
            plain = getattr(owner, name)

            def wrapped(*arguments: Any, **options: Any) -> Any:
                self.at(stage, name)
                result = plain(*arguments, **options)
                note()
                return result

            setattr(owner, name, wrapped)

        before(base_model, "random_model", "start-up")
        before(trainer, "build_optimizer", "start-up")
        before(checkpoint, "restore", "start-up")
        before(torch.optim.AdamW, "step", "training", lambda: self.write("step"))
        before(metrics_file.MetricsFile, "log", "training")
        before(checkpoint, "save", "checkpointing")
        before(decoding, "hidden_states", "scoring")
        before(trainer, "flat_summary", "result")
        before(os, "fsync", None)
        before(os, "replace", None)


def child(outputs: Path, kill_at: int | None) -> tuple[int, list[str]]:
    """Run one process. Returns its wait status and its journal."""
    journal = outputs / "journal"
    outputs.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        events = Events(kill_at, journal)
        events.install()
        code = 1
        try:
            run.main(config(outputs))
            events.write(f"events {events.count}")
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    return status, journal.read_text().splitlines() if journal.exists() else []


def leftovers(outputs: Path) -> dict[str, Any]:
    """The files and values that must be equal."""
    folder = RunFolder(outputs / run_id(config(outputs)))
    result = folder.record()
    assert result is not None

    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_times(v) for k, v in value.items() if k not in TIMES and "outputs" not in k}
        return value

    logged = read_metrics(folder.metrics_file)
    clock = [row.values["train/seconds"] for row in logged if "train/seconds" in row.values]
    rows = [{k: v for k, v in row.to_json().items() if "seconds" not in k} for row in logged]
    files = ["validation_losses.jsonl"]
    files += ["adapter/adapter.safetensors", "predictions/validation.jsonl", "predictions/validation.base.jsonl"]
    return {
        "result": json.dumps(without_times(result.to_json()), sort_keys=True),
        "metrics": rows,
        # Times cannot be equal, but they must continue over a resume and end at the value in the result.
        "clock": (clock == sorted(clock), clock[0] > 0, clock[-1] == result.training.seconds),
        "names": sorted(p.name for p in folder.path.iterdir()),
        **{name: (folder.path / name).read_bytes() for name in files},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    moments = parser.parse_args().moments
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        # One run in this process, so that every fork has imported everything that a run needs.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            run.main(config(root / "warm"))
        _, journal = child(root / "whole", None)
        whole = leftovers(root / "whole")
        events = int(journal[-1].split()[1])
        print(f"{events} events in an uninterrupted run; killing at {moments} of them")
        wrong, stages, executed = [], Counter[str](), 0
        for number in range(moments):
            kill_at = 1 + number * (events - 1) // max(1, moments - 1)
            outputs = root / f"killed-{number}"
            status, _ = child(outputs, kill_at)
            if not os.WIFSIGNALED(status):
                wrong.append(f"event {kill_at}: the process was not killed (status {status})")
                continue
            status, journal = child(outputs, None)
            where = next(line for line in journal if line.startswith("killed"))
            stages[where.removeprefix("killed ").split(":")[0]] += 1
            steps = journal.count("step")
            executed += steps
            if status != 0:
                wrong.append(f"event {kill_at}, {where}: the second start ended with status {status}")
                continue
            differs = [key for key, value in leftovers(outputs).items() if value != whole[key]]
            if differs:
                wrong.append(f"event {kill_at}, {where}: differs in {', '.join(differs)}")
            if steps > STEPS + CHECKPOINT_EVERY:
                wrong.append(f"event {kill_at}, {where}: {steps} optimizer steps")
    planned = moments * STEPS
    print("killed during: " + ", ".join(f"{stage} {count}" for stage, count in stages.items()))
    print(f"optimizer steps: {executed} executed, {planned} planned, at most {planned + moments * CHECKPOINT_EVERY}")
    print("\n".join(wrong) if wrong else f"{moments} of {moments} resumed exactly")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
