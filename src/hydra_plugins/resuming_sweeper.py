"""The sweeper behind `python train.py --multirun`: what is finished is skipped, what stopped goes on.

hydra_plugins is a namespace package that Hydra searches at every start, so nothing heavy is imported here.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

log = logging.getLogger("tiedlora.sweeper")

LAUNCHES = 2
"""A cell whose worker died without a word is launched once more."""
SECONDS_BETWEEN_LOOKS = 2.0


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """What stops a run stops the sweep too, where no run takes the signal: before, between and beside its cells.

    Unhandled, SIGTERM and Slurm's SIGUSR1 would end the process with another exit code than 75. A run that a signal
    reaches in its last step finishes, and hands the signal on to here.
    """
    from tiedlora.training.signals import SIGNALS

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ResumingSweeper(BasicSweeper):
    """Composes, checks and freezes all cells, then launches those that are not finished."""

    def __init__(self, params: dict[str, str], match_lora: bool) -> None:
        """
        Args:
            params: axes of the grids on the command line; the command line's own win.
            match_lora: add to each tied cell the LoRA cell of nearest trainable count (grid.py reads it).
        """
        super().__init__(max_batch_size=None, params=params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what a launcher is made of: it is made when the cells are frozen."""
        self.hydra_context, self.config = hydra_context, config
        self.task_function: TaskFunction | None = task_function

    @_stopped_by_signals()
    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Run what is not finished, then print the table of all cells.

        Raises:
            UserError: a cell's configuration is wrong; nothing was run.
            SystemExit: with 1, after naming every cell that failed.
            KeyboardInterrupt: stopped on request; the same command goes on.
        """
        from tiedlora.sweeps import expand, sweep

        assert self.config is not None
        assert self.hydra_context is not None
        found = expand.expand(self.config, self.hydra_context.config_loader, arguments)
        frozen = HydraContext(config_loader=found.freeze(), callbacks=self.hydra_context.callbacks)  # type: ignore[arg-type]
        launcher = self._launcher(frozen)
        open_cells = [cell for cell in found.cells if not cell.finished()]
        failures = sweep.changed_since(cell for cell in found.cells if cell not in open_cells)
        done = len(found.cells) - len(open_cells)
        log.info("%s: %d cells, %d finished before, %d to run", found.id, len(found.cells), done, len(open_cells))
        launches: Counter[str] = Counter()
        try:
            with sweep.Watch(found):
                while open_cells:
                    self._launch(launcher, open_cells, sum(launches.values()))
                    launches.update(cell.run_id for cell in open_cells)
                    open_cells = self._still_open(open_cells, launches)
        except KeyboardInterrupt:
            print(sweep.summary(found, sweep.rows(found)))
            raise
        rows = sweep.rows(found)
        print(f"\n{sweep.table(rows)}\n\n{sweep.summary(found, rows)}")
        failures.update({row["run_id"]: row["error"] for row in rows if row["state"] != "done"})
        if failures:
            print(f"\n{len(failures)} of {len(rows)} cells failed; their tracebacks are in error.txt:", file=sys.stderr)
            for run_id, error in failures.items():
                print(f"  {run_id}: {error}", file=sys.stderr)
            raise SystemExit(1)
        return []

    def _launcher(self, context: HydraContext) -> Any:
        from tiedlora.errors import UserError

        assert self.config is not None
        assert self.task_function is not None
        try:
            return Plugins.instance().instantiate_launcher(context, self.task_function, self.config)
        except (ImportError, RuntimeError) as error:
            name = self.config.hydra.runtime.choices.get("hydra/launcher")
            raise UserError(
                f"hydra/launcher={name}: {str(error).splitlines()[0]}; is it installed? "
                "pip install 'tiedlora[ray]' for ray_tasks, 'tiedlora[slurm]' for slurm and submitit_slots"
            ) from None

    def _launch(self, launcher: Any, cells: list[Any], first: int) -> None:
        """Hand cells to the launcher. What became of them is in their folders, whatever it returns or raises."""
        try:
            launcher.launch([[f"cell={cell.run_id}"] for cell in cells], initial_job_idx=first)
        except Exception as error:
            log.warning("the launcher gave up (%s: %s); looking at what was done", type(error).__name__, error)

    def _still_open(self, cells: list[Any], launches: Counter[str]) -> list[Any]:
        """Cells to launch again. Those that another process runs are waited for first."""
        again = []
        waiting = False
        for cell in cells:
            while (state := cell.state()) == "running":
                if not waiting:
                    log.info("waiting for cells that another process is working on, such as %s", cell.run_id)
                    waiting = True
                time.sleep(SECONDS_BETWEEN_LOOKS)
            if state in ("done", "failed"):
                continue
            if launches[cell.run_id] < LAUNCHES:
                log.warning("%s: stopped without a result; launching it once more", cell.run_id)
                again.append(cell)
            else:
                cell.folder.error_file.write_text(
                    f"The worker ended {LAUNCHES} times without a result or an error: killed, or out of memory?\n"
                )
        return again
