"""The only place where code that needs torch or transformers is imported late: when one of these functions is called.

The imports take seconds. A finished run, a wrong option and `--help` do not need them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tiedlora.config.schema import Config
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord

if TYPE_CHECKING:
    from tiedlora.runs.verify import CheckedRun, Finding


def execute(config: Config) -> RunRecord | None:
    """As runs.execute.execute."""
    from tiedlora.runs import execute

    return execute.execute(config)


def add_scores(
    folder: RunFolder, splits: list[str], data_root: str | None, execution: Config | None = None
) -> RunRecord:
    """As runs.add_scores.add_scores."""
    from tiedlora.runs import add_scores

    return add_scores.add_scores(folder, splits, data_root, execution)


def check_adapter(run: CheckedRun) -> Iterator[Finding]:
    """As runs.regenerate.check_adapter."""
    from tiedlora.runs import regenerate

    return regenerate.check_adapter(run)


def regenerate(run: CheckedRun, least: int, suspects: set[str]) -> Iterator[Finding]:
    """As runs.regenerate.regenerate."""
    from tiedlora.runs import regenerate

    return regenerate.regenerate(run, least, suspects)


def free_device_memory() -> None:
    """Free torch's cached memory on a GPU, so that the next run of this process can use it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
