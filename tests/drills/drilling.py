"""What the drills share: events at which a process is killed, and what must be equal in two finished runs."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import RunFolder


class Events:
    """Counts what the process does: `load` a model, `pass`, optimizer `step`, `flush`, `write NAME` of a file.

    All of it is seen in libraries, so a drill does not depend on the names of our functions. Each event is written to a
    journal, which several processes may share.
    """

    def __init__(self, journal: Path, kill_at: str = "") -> None:
        """kill_at: the event before which the process is killed, and which of them: `step 3`; `any 17` is the 17th."""
        self.kill_at, self.reached = kill_at, Counter[str]()
        self.file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def at(self, event: str, place: str = "") -> None:
        for name in ("any", event):
            self.reached[name] += 1
            if self.kill_at == f"{name} {self.reached[name]}":
                os.write(self.file, f"killed before {event}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
        os.write(self.file, f"{place or event}\n".encode())

    def install(self) -> None:
        before(torch.optim.AdamW, "step", lambda *_: self.at("step"))
        before(LlamaForCausalLM, "__init__", lambda *_: self.at("load"))
        before(LlamaModel, "forward", lambda *_: self.at("pass"))
        before(os, "fsync", lambda *_: self.at("flush"))
        sys.addaudithook(self._renamed)

    def _renamed(self, event: str, words: tuple[Any, ...]) -> None:
        if event == "os.rename":
            path = Path(os.fsdecode(words[1]))
            self.at(f"write {kind(path)}", str(path))


def before(owner: object, name: str, act: Callable[..., object]) -> None:
    """Make each call of `owner.name` first call `act` with the same arguments."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        act(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def kind(path: Path) -> str:
    """The path without process ids, steps and digests."""
    if path.name.endswith(".lock"):
        return "a lock"
    if path.parent.name == "base":
        return "base/*.jsonl"
    name, parent = (
        re.sub(r"\.([0-9a-f]+\.)?tmp$", "", part).removeprefix(".") for part in (path.name, path.parent.name)
    )
    name, parent = (re.sub(r"-\d{8}$", "", part) for part in (name, parent))
    return f"{parent}/{name}" if parent in ("step", "best", "adapter", "scores") else name


def left_by(folder: RunFolder) -> dict[str, Any]:
    """What must be equal in two runs of one configuration: all files and values except for times."""
    record = folder.finished_record()
    logged = read_metrics(folder.metrics_file)
    clock = [row.values["train/seconds"] for row in logged if "train/seconds" in row.values]
    files = [*folder.adapter.iterdir(), folder.validation_losses_file]
    scored = [(path, *path.read_bytes().split(b"\n", 1)) for path in folder.scores.glob("*")]
    return {
        "result": json.dumps(_without_times(record.to_json()), sort_keys=True),
        "metrics": [_without_times(row.to_json()) for row in logged],
        # Times cannot be equal, but they must continue over a resume and end at the value in the result.
        "clock": (clock == sorted(clock), clock[0] > 0, clock[-1] == record.training.seconds),
        "names": sorted(path.name for path in folder.path.iterdir()),
        **{str(path.relative_to(folder.path)): path.read_bytes() for path in files},
        **{f"scores/{path.name}": (_without_times(json.loads(head)), rows) for path, head, rows in scored},
    }


def _without_times(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kept = {key: _without_times(inner) for key, inner in value.items() if not re.search("seconds|_per_s$|^peak_", key)}
    return {key: inner for key, inner in kept.items() if key != "outputs"}


def differences(ours: RunFolder, expected: dict[str, Any]) -> list[str]:
    """The names of what is not equal."""
    found = left_by(ours)
    return [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
