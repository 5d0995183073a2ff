"""hydra/sweeper=resuming: the sweeper behind `python train.py --multirun`.

This file has only what Hydra needs from a sweeper. The work is in tiedlora.sweeps. Hydra imports hydra_plugins, a
namespace package, at every start, so this file may import tiedlora's light packages, but no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from tiedlora.errors import UserError
from tiedlora.sweeps.cells import FrozenCells, Sweep, SweepCell
from tiedlora.sweeps.expand import expand
from tiedlora.sweeps.launching import Launch, run_sweep
from tiedlora.tracking.run_trackers import NONE, backend_of
from tiedlora.training.signals import stopped_by_signals


class ResumingSweeper(Sweeper):
    """Composes, checks and freezes all cells, and then launches those that are not finished."""

    def __init__(self, params: dict[str, str], match_lora: bool, fail_fast: bool = False) -> None:
        """
        Args:
            params: the axes of the grids on the command line. The command line's own axes replace them.
            match_lora: whether to add to each tied cell the LoRA cell with the nearest trainable count.
            fail_fast: whether the first cell that fails stops the sweep.
        """
        # The axes and the matching cells are read from the configuration (sweeps/expand.py).
        self.fail_fast = fail_fast

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the arguments of the launcher, which is made when the cells are frozen."""
        self.hydra_context, self.config = hydra_context, config
        self.task_function: TaskFunction | None = task_function

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
        sweep = expand(self.config, self.hydra_context.config_loader, arguments)
        launcher = self._launcher(sweep.freeze())
        try:
            self.run(sweep, partial(_launch, launcher))
        finally:
            # After failed cells too, which end it with SystemExit. A stopped sweep has no result yet.
            if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                self.track(sweep)
        return []

    def track(self, sweep: Sweep) -> None:
        """Send the sweep's summary to its tracker, if it has one."""
        if backend_of(sweep.cells[0].config) != NONE:
            # The verdicts need numpy and scipy, which the start of a single run should not import.
            from tiedlora.sweeps.summary_run import track_sweep

            track_sweep(sweep, *self.claims_file())

    def claims_file(self) -> tuple[Path, ...]:
        """The file with the sweep's own claims, or nothing."""
        return ()

    def run(self, sweep: Sweep, launch: Launch) -> None:
        """Carry out the sweep. The arguments and errors are those of run_sweep."""
        run_sweep(sweep, launch, self.fail_fast)

    def _launcher(self, frozen: FrozenCells) -> Launcher:
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.task_function is not None
        # Launchers use only the loader's load_sweep_config.
        context = HydraContext(config_loader=frozen, callbacks=self.hydra_context.callbacks)  # type: ignore[arg-type]
        try:
            return Plugins.instance().instantiate_launcher(context, self.task_function, self.config)
        except (ImportError, RuntimeError) as error:
            option = self.config.hydra.runtime.choices.get("hydra/launcher")
            raise UserError(
                f"hydra/launcher={option}: {str(error).splitlines()[0]}; is it installed? "
                "pip install 'tiedlora[ray]' for ray_tasks, 'tiedlora[slurm]' for slurm and submitit_slots"
            ) from None


def _launch(launcher: Launcher, cells: Sequence[SweepCell], first_job: int) -> None:
    launcher.launch([[f"cell={cell.run_id}", *cell.launch_words] for cell in cells], initial_job_idx=first_job)
