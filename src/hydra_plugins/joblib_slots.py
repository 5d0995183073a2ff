"""hydra/launcher=joblib_slots: several cells at once, each slot a process of its own with a device of its own.

One pool of a single process a slot, not one pool of them all: when joblib loses a worker it gives up the
whole pool, and a killed cell would take its neighbours along.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from tiedlora.errors import UserError

log = logging.getLogger("tiedlora.joblib")


class JoblibSlotsLauncher(Launcher):
    """Runs cells in `n_jobs` processes; a process stays for the next cell and keeps what it has loaded."""

    def __init__(self, n_jobs: int, devices: list[str | int] | None) -> None:
        """
        Args:
            n_jobs: cells at once.
            devices: what CUDA_VISIBLE_DEVICES holds in each slot, in turn; None leaves it alone.
        """
        self.n_jobs, self.devices = n_jobs, devices

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what a worker needs.

        Raises:
            UserError: joblib is not installed.
        """
        if find_spec("joblib") is None:
            raise UserError("hydra/launcher=joblib_slots: joblib is not installed; run: pip install 'tiedlora[joblib]'")
        self.context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the cells. A cell whose process dies comes back as failed; no other is touched.

        Raises:
            KeyboardInterrupt: after every running cell has ended or saved its checkpoint.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        slots = _Slots(self, job_overrides, initial_job_idx)
        return slots.run()

    def environment(self, slot: int) -> dict[str, str]:
        """What a slot's process sees beside this process's environment."""
        if not self.devices:
            return {}
        return {"CUDA_VISIBLE_DEVICES": str(self.devices[slot % len(self.devices)])}


class _Slots:
    """One launch: a thread a slot takes the next cell until none is left."""

    def __init__(self, launcher: JoblibSlotsLauncher, job_overrides: Sequence[Sequence[str]], first: int) -> None:
        self.launcher, self.state = launcher, Singleton.get_state()
        self.waiting = deque((first + place, list(overrides)) for place, overrides in enumerate(job_overrides))
        self.returns = [JobReturn(overrides=list(o), status=JobStatus.FAILED) for o in job_overrides]
        self.first = first
        self.pools: dict[int, Any] = {}
        self.stopping = False

    def run(self) -> list[JobReturn]:
        threads = [
            threading.Thread(target=self._work, args=(slot,))
            for slot in range(min(self.launcher.n_jobs, len(self.waiting)))
        ]
        for thread in threads:
            thread.start()
        try:
            self._join(threads)
        except KeyboardInterrupt:
            self._stop()
            self._join(threads)
        if self.stopping:
            raise KeyboardInterrupt
        return self.returns

    @staticmethod
    def _join(threads: list[threading.Thread]) -> None:
        for thread in threads:
            while thread.is_alive():
                # With a limit, so that a signal is seen at once.
                thread.join(0.2)

    def _stop(self) -> None:
        """Start no other cell, and ask those that run to save a checkpoint and end."""
        self.stopping = True
        for pool in list(self.pools.values()):
            for process in list((pool._processes or {}).values()):
                if process.is_alive():
                    os.kill(process.pid, signal.SIGTERM)

    def _work(self, slot: int) -> None:
        from joblib.externals.loky import BrokenProcessPool, ProcessPoolExecutor

        environment = self.launcher.environment(slot)
        while self.waiting and not self.stopping:
            try:
                number, overrides = self.waiting.popleft()
            except IndexError:
                break
            if slot not in self.pools:
                self.pools[slot] = ProcessPoolExecutor(1, env=environment)
            launcher = self.launcher
            arguments = (launcher.context, launcher.config, launcher.task_function, overrides, number, self.state)
            try:
                self.returns[number - self.first] = self.pools[slot].submit(_job, *arguments).result()
            except BrokenProcessPool:
                log.warning("%s: its worker was killed", overrides[0])
                self.pools.pop(slot).shutdown(kill_workers=True)
            except KeyboardInterrupt:
                self.stopping = True
            except Exception as error:
                # The sweeper sees in the cell's folder that it has no result; the slot goes on.
                log.warning("%s: could not be run (%s: %s)", overrides[0], type(error).__name__, error)
        if slot in self.pools:
            self.pools.pop(slot).shutdown()


def _job(
    context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
    overrides: list[str],
    number: int,
    state: Any,
) -> JobReturn:
    """In the worker: what Hydra's own launchers do for one job."""
    setup_globals()
    Singleton.set_state(state)
    cell = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(cell):
        cell.hydra.job.id = cell.hydra.job.num = number
    return run_job(
        hydra_context=context,
        task_function=task_function,
        config=cell,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
