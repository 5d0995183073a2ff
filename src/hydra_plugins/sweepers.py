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

from tiedlora.keys import from_person
from tiedlora.sweeps.cells import Sweep
from tiedlora.sweeps.expand import expand
from tiedlora.sweeps.launchers import launcher_of
from tiedlora.sweeps.launching import Launch, run_sweep
from tiedlora.training.signals import stopped_by_signals

PREFIX = "hydra.sweeper."
"""The place of the sweepers' keys, for messages."""


class ResumingSweeper(Sweeper):
    """Composes and checks all cells, and then launches those that are not finished."""

    def __init__(
        self, params: dict[str, str], match_lora: bool, arms: Sequence[Sequence[str]] = (), fail_fast: bool = False
    ) -> None:
        """
        Args:
            params: the axes of the grids on the command line. The command line's own axes replace them.
            match_lora: whether to add to each tied cell the LoRA cell with the nearest trainable count.
            arms: the words of arms to add to the grid, at every value of its other axes.
            fail_fast: whether the first cell that fails stops the sweep.
        """
        # Axes, matching cells and arms are read from the configuration (sweeps/expand.py).
        self.fail_fast = fail_fast

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what the sweep needs. Cells are carried out by workers, and not by the task function."""
        self.hydra_context, self.config = hydra_context, config

    @stopped_by_signals()
    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Run the cells that are not finished, and then print the table of all cells.

        Raises:
            UserError: a cell's configuration is wrong; nothing was run.
            SystemExit: with code 1, after naming every cell that failed.
            KeyboardInterrupt: the sweep was asked to stop; the same command continues it.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        launch = launcher_of(self.config)
        sweep = expand(self.config, self.hydra_context.config_loader, arguments)
        self.run(sweep, launch)
        return []

    def run(self, sweep: Sweep, launch: Launch) -> None:
        """Carry out the sweep. The arguments and errors are those of run_sweep."""
        run_sweep(sweep, launch, self.fail_fast)


class StagedSweeper(ResumingSweeper):
    """Runs the cells of the grid that the search of the learning rates asks for."""

    def __init__(
        self,
        rungs: list[float],
        finalists: int,
        lowest_rate: float,
        highest_rate: float,
        **grid: Any,
    ) -> None:
        """
        Args:
            rungs, finalists, lowest_rate, highest_rate: as in SearchOptions.
            grid: the arguments of ResumingSweeper.
        """
        super().__init__(**grid)
        self.search = dict(rungs=rungs, finalists=finalists, lowest_rate=lowest_rate, highest_rate=highest_rate)

    def run(self, sweep: Sweep, launch: Launch) -> None:
        """Carry out the staged sweep. The arguments and errors are those of run_staged."""
        from tiedlora.sweeps.staged import SearchOptions, run_staged

        run_staged(sweep, from_person(SearchOptions, self.search, prefix=PREFIX), launch, self.fail_fast)


class DecidingSweeper(StagedSweeper):
    """After the search, runs the seeds that open claims need."""

    def __init__(self, claims: str, budget: int | None, **search: Any) -> None:
        """
        Args:
            claims: the file with the claims and their planned looks.
            budget: the most runs of the sweep; None sets no limit.
            search: the arguments of StagedSweeper.
        """
        super().__init__(**search)
        self.claims, self.budget = claims, budget

    def run(self, sweep: Sweep, launch: Launch) -> None:
        """Carry out the deciding sweep. The arguments and errors are those of run_deciding."""
        from tiedlora.sweeps.deciding import run_deciding
        from tiedlora.sweeps.staged import SearchOptions

        options = from_person(SearchOptions, self.search, prefix=PREFIX)
        run_deciding(sweep, options, self.claims, self.budget, launch, self.fail_fast)
