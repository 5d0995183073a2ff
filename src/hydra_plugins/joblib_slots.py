"""hydra/launcher=joblib_slots: several cells at once. Each slot is one process with its own device.

This file has only what Hydra needs from a launcher. The processes are in tiedlora.sweeps.worker_slots. Hydra imports
hydra_plugins at every start, so this file may import tiedlora's light packages, but no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, open_dict

from tiedlora.config.schema import SLOT_DEVICE
from tiedlora.errors import UserError
from tiedlora.keys import is_count
from tiedlora.sweeps.worker_slots import SlotJob, WorkerSlots, visible_device


class JoblibSlotsLauncher(Launcher):
    """Runs cells in `n_jobs` processes. A process stays for the next cell, and keeps the data that it has loaded."""

    def __init__(self, n_jobs: int, devices: list[str | int] | None) -> None:
        """
        Args:
            n_jobs: how many cells run at once.
            devices: the device of each slot, in turn. A number counts the devices that this process sees. None leaves
                CUDA_VISIBLE_DEVICES as it is.
        """
        self.n_jobs, self.devices = n_jobs, devices

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what a worker needs.

        Raises:
            UserError: joblib is not installed, an argument is wrong, or there is no such device.
        """
        if find_spec("joblib") is None:
            raise UserError("hydra/launcher=joblib_slots: joblib is not installed; run: pip install 'tiedlora[joblib]'")
        self._check()
        self.environments = [self.environment(slot) for slot in range(self.n_jobs)]
        self.context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the cells. A cell whose process dies is returned as failed; the other cells are not affected.

        Raises:
            KeyboardInterrupt: after every running cell has ended or saved its checkpoint.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        run = partial(_run_job, self.context, self.config, self.task_function, Singleton.get_state())
        jobs = [
            SlotJob(overrides[0], partial(run, list(overrides), number))
            for number, overrides in enumerate(job_overrides, start=initial_job_idx)
        ]
        results = WorkerSlots(jobs, self.environments).run()
        return [
            result or JobReturn(overrides=list(overrides), status=JobStatus.FAILED)
            for overrides, result in zip(job_overrides, results, strict=True)
        ]

    def _check(self) -> None:
        """Raises UserError if an argument is of another type, such as joblib's own n_jobs=-1."""
        if not is_count(self.n_jobs):
            raise UserError(f"hydra.launcher.n_jobs={self.n_jobs}: must be a whole number of at least 1")
        if self.devices is not None and not isinstance(self.devices, list | ListConfig):
            raise UserError(f"hydra.launcher.devices={self.devices}: must be a list such as [0,1], or null")

    def environment(self, slot: int) -> dict[str, str]:
        """The variables that a slot's process has in addition to those of this process.

        Raises:
            UserError: this process does not see the slot's device.
        """
        if not self.devices:
            return {}
        device = self.devices[slot % len(self.devices)]
        visible = visible_device(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
        return {"CUDA_VISIBLE_DEVICES": visible, SLOT_DEVICE: str(device)}


def _run_job(
    context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
    singletons: dict[type, Singleton],
    overrides: list[str],
    number: int,
) -> JobReturn:
    """Run one job in the worker process, as Hydra's own launchers do."""
    setup_globals()
    Singleton.set_state(singletons)
    job_config = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(job_config):
        job_config.hydra.job.id = job_config.hydra.job.num = number
    return run_job(
        hydra_context=context,
        task_function=task_function,
        config=job_config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
