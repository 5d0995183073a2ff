"""hydra/sweeper=resuming, staged and deciding: the sweepers behind `python train.py --multirun`.

This file has only what Hydra needs from a sweeper. The work is in tiedlora.sweeps. Hydra imports hydra_plugins, a
namespace package, at every start, so this file may import tiedlora's light packages, but no torch. What needs numpy or
scipy is imported when a sweep starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from typing_extensions import override

from tiedlora.sweeps.expand import DecidingOptions, SearchOptions, expand, read_options
from tiedlora.sweeps.launchers import launcher_of
from tiedlora.sweeps.launching import run_sweep
from tiedlora.training.signals import stopped_by_signals


class ResumingSweeper(Sweeper):
    """Composes and checks all cells, and then launches those that are not finished."""

    def __init__(self, **options: Any) -> None:
        """The options are read from the configuration (sweeps/expand.py), as scripts read them too."""

    @override
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what the sweep needs. Cells are carried out by workers, and not by the task function."""
        self.hydra_context, self.config = hydra_context, config

    @stopped_by_signals()
    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Run the cells that the sweep needs and that are not finished, and then print what it has found.

        Raises:
            UserError: an option or a cell's configuration is wrong; nothing was run.
            SystemExit: with code 1, after naming every cell that failed.
            KeyboardInterrupt: the sweep was asked to stop; the same command continues it.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        options = read_options(self.config)
        with launcher_of(self.config) as launch:
            sweep = expand(self.config, self.hydra_context.config_loader, arguments)
            if not isinstance(options, SearchOptions):
                run_sweep(sweep, launch, options.fail_fast)
                return []
            from tiedlora.sweeps.staged import run_deciding, run_staged  # noqa: PLC0415

            if isinstance(options, DecidingOptions):
                run_deciding(sweep, options, launch)
            else:
                run_staged(sweep, options, launch)
            return []


class StagedSweeper(ResumingSweeper):
    """Runs the cells that the search of the learning rates asks for, also at rates outside the grid."""


class DecidingSweeper(ResumingSweeper):
    """After the search, runs the seeds that open claims need."""
