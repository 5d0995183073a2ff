"""The only place that imports torch late: the modules that need it are imported when one of these functions is called.

Importing torch and transformers takes seconds. A finished run, a wrong option and `--help` answer without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tiedlora.config.schema import Config
from tiedlora.models.arithmetic import DeviceSpeed
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord
from tiedlora.runs.findings import CheckedRun, Finding


def execute(config: Config) -> RunRecord | None:
    """Carry out a run; see execute.py."""
    from tiedlora.runs import execute

    return execute.execute(config)


def add_scores(
    folder: RunFolder,
    splits: Sequence[str],
    data_root: str | None,
    paths_from: Config | None = None,
    metrics: Sequence[str] | None = None,
    again: bool = False,
    forgetting: str | None = None,
) -> RunRecord:
    """Score more splits or metrics of a finished run; see add_scores.py."""
    from tiedlora.runs import add_scores

    return add_scores.add_scores(folder, splits, data_root, paths_from, metrics, again, forgetting)


def check_adapter(run: CheckedRun) -> Iterator[Finding]:
    """Check a finished run's adapter; see regenerate.py."""
    from tiedlora.runs import regenerate

    return regenerate.check_adapter(run)


def regenerate(run: CheckedRun, least: int, suspects: set[str]) -> Iterator[Finding]:
    """Make a finished run's outputs again and compare them; see regenerate.py."""
    from tiedlora.runs import regenerate

    return regenerate.regenerate(run, least, suspects)


def device_speed(config: Config, seconds: float, prompt: float, row: float) -> DeviceSpeed:
    """Measure the device that a run would use; see device_speed.py."""
    from tiedlora.runs import device_speed

    return device_speed.measure(config, seconds, prompt, row)


def free_memory() -> None:
    """Free what a failed run leaves; see models/device.py."""
    from tiedlora.models import device

    device.free_memory()
