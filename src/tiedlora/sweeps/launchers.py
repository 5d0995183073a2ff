"""The launchers: where the workers of a sweep run. conf/hydra/launcher/ has their options.

All workers do the same (launching.py), so a launcher only starts some, and waits for them. The packages of Ray and
submitit are optional extras, and are imported when they are used.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from tiedlora.config.schema import SLOT_DEVICE
from tiedlora.errors import UserError
from tiedlora.keys import is_count
from tiedlora.sweeps.cells import Goal
from tiedlora.sweeps.launching import STARTS, Launch, work
from tiedlora.training.signals import stopped_by_signals

log = logging.getLogger(__name__)

ENDED, STOPPED, KILLED = "no cell is left", "it was asked to stop", "its process is killed again and again"
"""How a worker of Slots has ended, if not by an error."""


def launcher_of(config: DictConfig) -> Launch:
    """The launcher that the configuration of a sweep names. Hydra's own default works in this process.

    Raises:
        UserError: it is none of ours, an argument is wrong, or its package is not installed.
    """
    option = config.hydra.runtime.choices["hydra/launcher"]
    if option == "basic":
        return work
    try:
        launcher = instantiate(config.hydra.launcher)
    except InstantiationException as error:
        # Hydra wraps an error of a constructor.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"hydra/launcher={option}: {str(error).splitlines()[0]}") from None
    if not isinstance(launcher, Slots | RayTasks | SubmititJobs):
        raise UserError(
            f"hydra/launcher={option}: is no launcher of sweeps; choose basic, joblib_slots, ray_tasks, slurm or "
            "submitit_slots"
        )
    return launcher


class Slots:
    """hydra/launcher=joblib_slots: several workers on this machine, each a process with its own device."""

    def __init__(self, n_jobs: int, devices: Sequence[str | int] | None) -> None:
        """
        Args:
            n_jobs: the number of workers.
            devices: the device of each worker, in turn. A number counts the devices that this process sees. None leaves
                CUDA_VISIBLE_DEVICES as it is.

        Raises:
            UserError: an argument is of another type, such as joblib's own n_jobs=-1, or there is no such device.
        """
        if not is_count(n_jobs):
            raise UserError(f"hydra.launcher.n_jobs={n_jobs}: must be a whole number of at least 1")
        if devices is not None and not isinstance(devices, list | ListConfig):
            raise UserError(f"hydra.launcher.devices={devices}: must be a list such as [0,1], or null")
        self.environments: list[dict[str, str]] = [{} for _ in range(n_jobs)]
        """The variables that each worker has in addition to those of this process."""
        for environment, device in zip(self.environments, itertools.cycle(devices or ()), strict=False):
            visible = visible_device(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
            environment.update({"CUDA_VISIBLE_DEVICES": visible, SLOT_DEVICE: str(device)})

    def __call__(self, folder: Path, goals: Sequence[Goal]) -> None:
        """Run the workers. One that is killed is replaced, and the others are not affected.

        Raises:
            KeyboardInterrupt: after every running cell has ended or saved its checkpoint.
            UserError: a worker could not go on. The running cells have ended as above.
        """
        running: list[SlotWorker] = []
        try:
            for environment in self.environments[: len(goals)]:
                running.append(SlotWorker(environment, folder, goals))
            killed = 0
            while running:
                ready = connection.wait([worker.told for worker in running])
                for worker in [worker for worker in running if worker.told in ready]:
                    running.remove(worker)
                    word = worker.last_word()
                    if word == STOPPED:
                        raise KeyboardInterrupt
                    if word == KILLED and killed < STARTS * len(goals):
                        # The next one tries its cell once more. No cell is tried for ever.
                        killed += 1
                        log.warning("a worker was killed, and another one takes its place")
                        running.append(SlotWorker(worker.environment, folder, goals))
                    elif word != ENDED:
                        raise UserError(
                            f"a worker of hydra/launcher=joblib_slots has ended: {word}; the same command continues"
                        )
        finally:
            for worker in running:
                worker.process.terminate()
            for worker in running:
                worker.process.join()


class SlotWorker:
    """One worker of Slots, in a new process."""

    def __init__(self, environment: Mapping[str, str], folder: Path, goals: Sequence[Goal]) -> None:
        self.environment = environment
        # A new interpreter: a fork of a process that has used torch may wait for ever for its threads.
        context = multiprocessing.get_context("spawn")
        self.told, tell = context.Pipe(duplex=False)
        self.process = context.Process(target=_slot, args=(environment, folder, goals, tell))
        self.process.start()
        # Now only the worker can write, and its end is the end of the pipe.
        tell.close()

    def last_word(self) -> str:
        """How it has ended: ENDED, STOPPED, KILLED, or its error."""
        try:
            word = str(self.told.recv())
        except EOFError:
            word = ""
        self.process.join()
        code = self.process.exitcode or 0
        return word or (KILLED if code < 0 else f"its process could not start (exit code {code})")


def _slot(environment: Mapping[str, str], folder: Path, goals: Sequence[Goal], tell: connection.Connection) -> None:
    """One worker of Slots, in its process."""
    os.environ.update(environment)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    said = ENDED
    try:
        with stopped_by_signals():
            logged_work(folder, goals)
    except KeyboardInterrupt:
        said = STOPPED
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
    tell.send(said)


def _stop_with_parent() -> None:
    """Without this, workers would go on with the sweep after its command was killed."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def visible_device(device: str | int, inherited: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES for a process that gets one device.

    Args:
        device: a number counts the devices that this process sees, from 0. Other names, such as a GPU's UUID, stay.
        inherited: CUDA_VISIBLE_DEVICES of this process; None if it is not set. A cluster sets it to the devices that it
            has given to the job, so a number must not reach beyond them.

    Raises:
        UserError: there is no such device.
    """
    name = str(device)
    if inherited is None or not re.fullmatch(r"-?\d+", name):
        return name
    given = [item.strip() for item in inherited.split(",") if item.strip()]
    if not 0 <= int(name) < len(given):
        raise UserError(
            f"hydra.launcher.devices: has {name}, but CUDA_VISIBLE_DEVICES={inherited} gives {len(given)} devices to "
            "this process; number them from 0"
        )
    return given[int(name)]


def check_installed(package: str, option: str, extra: str) -> None:
    """Raises UserError if an optional package is not installed."""
    if find_spec(package) is None:
        raise UserError(f"hydra/launcher={option}: {package} is not installed; run: pip install 'tiedlora[{extra}]'")


def logged_work(folder: Path, goals: Sequence[Goal]) -> None:
    """`work` in a process of its own, with the log lines of a run."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("tiedlora").setLevel(logging.INFO)
    work(folder, goals)


class RayTasks:
    """hydra/launcher=ray_tasks: Ray starts as many workers as its CPUs and GPUs allow."""

    MOST = 256
    """The most workers. Those that start when no cell is left end at once."""

    def __init__(self, ray: DictConfig) -> None:
        """
        Args:
            ray: the arguments of ray.init and of ray.remote.

        Raises:
            UserError: Ray is not installed.
        """
        check_installed("ray", "ray_tasks", "ray")
        self.options: Any = OmegaConf.to_container(ray)

    def __call__(self, folder: Path, goals: Sequence[Goal]) -> None:
        """Run the workers.

        Raises:
            RayError: a worker has not ended by itself. All have ended.
        """
        import ray

        if not ray.is_initialized():
            ray.init(**self.options["init"])
        worker, shared = ray.remote(**self.options["remote"])(logged_work), ray.put(list(goals))
        tasks = [worker.remote(folder, shared) for _ in goals[: self.MOST]]
        ray.wait(tasks, num_returns=len(tasks))
        ray.get(tasks)


class SubmititJobs:
    """hydra/launcher=slurm and submitit_slots: workers in submitit's jobs, in Slurm's queue or on this machine."""

    SHARED = (
        *("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name"),
        "stderr_to_stdout",
    )
    """The parameters that submitit has for every kind of queue."""

    def __init__(self, cluster: str, jobs_at_once: int, submitit_folder: str, **parameters: Any) -> None:
        """
        Args:
            cluster: slurm, or local.
            jobs_at_once: the most workers.
            parameters: those of submitit's executor, without the cluster's name before them.

        Raises:
            UserError: an argument is wrong, or submitit is not installed.
        """
        check_installed("submitit", "slurm and submitit_slots", "slurm")
        if not is_count(jobs_at_once):
            raise UserError(f"hydra.launcher: the number of jobs at once is {jobs_at_once}; it must be at least 1")
        self.cluster, self.jobs_at_once, self.folder = cluster, jobs_at_once, submitit_folder
        given = {key: value for key, value in parameters.items() if value is not None}
        named = {key if key in self.SHARED else f"{cluster}_{key}": value for key, value in given.items()}
        self.of_executor = {key: value for key, value in named.items() if key.endswith("max_num_timeout")}
        self.of_job = {key: value for key, value in named.items() if key not in self.of_executor}

    def __call__(self, folder: Path, goals: Sequence[Goal]) -> None:
        """Run the workers.

        Raises:
            RuntimeError: a worker has not ended by itself. All have ended.
            KeyboardInterrupt: on this machine, after every running cell has ended or saved its checkpoint. In Slurm's
                queue the jobs go on.
        """
        import submitit

        executor = submitit.AutoExecutor(folder=self.folder, cluster=self.cluster, **self.of_executor)
        executor.update_parameters(**self.of_job)
        count = min(self.jobs_at_once, len(goals))
        jobs = executor.map_array(Job(self.cluster == "local"), [folder] * count, [list(goals)] * count)
        try:
            errors = [error for job in jobs if (error := job.exception()) is not None]
        except KeyboardInterrupt:
            if self.cluster == "local":
                for job in jobs:
                    # The id is that of a process, which passes the signal to the job. It may have ended.
                    with suppress(ProcessLookupError):
                        os.kill(int(job.job_id), signal.SIGTERM)
                for job in jobs:
                    job.wait()
            raise
        if errors:
            raise RuntimeError(str(errors[0]).strip().splitlines()[0])


class Job:
    """A worker as submitit calls it."""

    def __init__(self, is_local: bool) -> None:
        self.is_local = is_local

    def __call__(self, folder: Path, goals: Sequence[Goal]) -> None:
        """Work until no cell is free."""
        if self.is_local:
            # Submitit ignores it, and on this machine it comes from the command that was stopped.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        logged_work(folder, goals)

    def checkpoint(self, folder: Path, goals: Sequence[Goal]) -> Any:
        """What is queued again after a time limit or a preemption: the same, because the cells' folders have the rest.

        submitit calls this method by its name.
        """
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, folder, goals)
