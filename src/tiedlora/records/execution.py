"""How a run, or a part of it, was carried out: which code, which packages, on which device."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from tiedlora.records.reading import Count, Flag, Text

DEVICE = re.compile(r"(?P<device>.+?)(, (?P<threads>\d+) threads)?(, (?P<processes>\d+) processes)?")
"""Device, threads and processes in words: "cpu, 2 threads, 2 processes"."""


@dataclass(frozen=True)
class CodeVersion:
    """The commit of the checkout whose code ran; None outside a git checkout."""

    commit: Text | None
    dirty: Flag | None
    """Whether the checkout had uncommitted changes."""

    def __str__(self) -> str:
        return f"commit {self.commit}{' with uncommitted changes' if self.dirty else ''}"


@dataclass(frozen=True)
class Execution:
    """Where a run was carried out. This is not part of the run's identity, but it changes rounding."""

    device: Text
    """`cpu`, or the GPU's name."""
    threads: Count | None = None
    """CPU threads of torch; None on a GPU."""
    processes: Count = 1
    """How many processes trained together."""
    processor: Text | None = None
    """The CPU's model and its vector instructions; None on a GPU, and in records before this key."""

    @property
    def device_and_threads(self) -> str:
        """Device, threads and processes, in words."""
        threads = f", {self.threads} threads" if self.threads is not None else ""
        return f"{self.device}{threads}" + (f", {self.processes} processes" if self.processes > 1 else "")

    def __str__(self) -> str:
        return self.device_and_threads + (f", {self.processor}" if self.processor is not None else "")

    def rounds_as(self, other: Execution) -> bool:
        """Whether both are the same kind of device. False if a record does not name its processor."""
        known = self.threads is None or self.processor is not None
        return known and (self.device, self.processor) == (other.device, other.processor)

    @classmethod
    def from_text(cls, text: str) -> Execution:
        """The value for `device_and_threads`."""
        match = DEVICE.fullmatch(text)
        if match is None:
            return cls(text)
        return cls(match["device"], int(match["threads"]) if match["threads"] else None, int(match["processes"] or 1))


def with_execution(tree: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a record or a checkpoint, with the key `execution`.

    Earlier versions wrote device, threads and processes as one text, `device`, and later `processor` beside it.
    """
    if "execution" in tree or not isinstance(tree.get("device"), str):
        return tree
    where = replace(Execution.from_text(tree["device"]), processor=tree.get("processor"))
    return {**tree, "execution": asdict(where)}


@dataclass(frozen=True)
class ContinuedFrom:
    """How the first steps of a run were made. The run then continued with other code, packages, or elsewhere."""

    step: Count
    """The last of these steps."""
    code: CodeVersion | None
    versions: dict[str, str]
    """Package -> installed version."""
    execution: Execution
