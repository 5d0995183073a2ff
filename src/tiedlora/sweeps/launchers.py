"""The launchers of sweeps, options of conf/hydra/launcher/: they start workers and wait for them (launching.py).

The packages of Ray and submitit are optional extras, and are imported when they are used.
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
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from tiedlora.config.schema import SLOT_DEVICE
from tiedlora.errors import MISTAKE, STOPPED, UserError, exit_codes
from tiedlora.keys import CHECKED, Count, Text, Whole, from_person
from tiedlora.sweeps.cells import Goal
from tiedlora.sweeps.launching import STARTS, Launch, Unfit, logged_work, work
from tiedlora.training.signals import stopped_by_signals

log = logging.getLogger(__name__)

MOST_WORKERS = 256
"""Of one command, on this machine or in Ray's tasks."""


@dataclass
class Slots:
    """hydra/launcher=joblib_slots: several workers on this machine, each a process with its own device."""

    __pydantic_config__ = CHECKED
    n_jobs: Annotated[Whole, Field(ge=1, le=MOST_WORKERS)]
    """The number of workers."""
    devices: list[Text] | None
    """The device of each worker, in turn. A number counts the devices that this process sees. None leaves
    CUDA_VISIBLE_DEVICES as it is."""

    def __post_init__(self) -> None:
        """Raises UserError if there is no such device, or no worker for one of them."""
        devices = self.devices or []
        if len(devices) > self.n_jobs:
            raise UserError(
                f"hydra.launcher.devices: has {len(devices)} devices for {self.n_jobs} workers; set "
                f"hydra.launcher.n_jobs={len(devices)}"
            )
        self.environments: list[dict[str, str]] = [{} for _ in range(self.n_jobs)]
        """The variables that each worker has in addition to those of this process."""
        inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
        given = [item.strip() for item in (inherited or "").split(",") if item.strip()]
        for environment, device in zip(self.environments, itertools.cycle(devices), strict=False):
            visible = device
            if not device or device.startswith("-"):
                raise UserError(f"hydra.launcher.devices: has {device!r}; give numbers from 0, or names of devices")
            # A cluster sets the variable to the devices of the job, so a number must not reach beyond them. Other
            # names, such as a GPU's UUID, stay.
            if inherited is not None and re.fullmatch(r"\d+", device):
                if int(device) >= len(given):
                    raise UserError(
                        f"hydra.launcher.devices: has {device}, but CUDA_VISIBLE_DEVICES={inherited} gives "
                        f"{len(given)} devices to this process; number them from 0"
                    )
                visible = given[int(device)]
            environment.update({"CUDA_VISIBLE_DEVICES": visible, SLOT_DEVICE: device})
        self._workers: list[_Worker] = []

    def __call__(self, folder: Path, goals: Sequence[Goal]) -> None:
        """Let the workers work. One that is killed, or that a passing error of the machine has ended, is replaced, and
        the others are not affected.

        They stay for the next call, with what they have imported and loaded.

        Raises:
            KeyboardInterrupt: after every running cell has ended or saved its checkpoint.
            UserError: a worker could not go on. The running cells have ended as above.
        """
        replaced = 0
        # A worker may have been killed while it had no work.
        self._workers = [worker for worker in self._workers if worker.process.is_alive()]
        used = [worker.environment for worker in self._workers]
        free = [environment for environment in self.environments if not any(environment is other for other in used)]
        more = min(self.n_jobs, len(goals)) - len(self._workers)
        self._workers += [_Worker(environment) for environment in free[: max(0, more)]]
        working = self._workers[: len(goals)]
        try:
            for worker in working:
                worker.channel.send((folder, goals))
            while working:
                for channel in connection.wait([worker.channel for worker in working]):
                    (worker,) = [each for each in working if each.channel is channel]
                    working.remove(worker)
                    if (code := worker.ended()) is None:
                        continue
                    self._workers.remove(worker)
                    if code == STOPPED:
                        raise KeyboardInterrupt
                    # A mistake would end each worker.
                    if code not in (0, MISTAKE) and replaced < STARTS * len(goals):
                        # The next one tries its cell once more. No cell is tried for ever.
                        replaced += 1
                        why = "was killed" if code < 0 else f"has ended with exit code {code}, for the reason above"
                        log.warning("a worker %s, and another one takes its place", why)
                        other = _Worker(worker.environment)
                        self._workers.append(other)
                        other.channel.send((folder, goals))
                        working.append(other)
                    elif code != 0:
                        raise UserError(
                            f"a worker of hydra/launcher=joblib_slots has ended with exit code {code}, for the reason "
                            "above; the same command continues"
                        )
        except BaseException:
            for worker in self._workers:
                worker.process.terminate()
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.channel.close()
        for worker in self._workers:
            worker.process.join()
        self._workers = []


class _Worker:
    """One worker of Slots: a process that waits for work, until its channel ends."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        # A new interpreter: a fork of a process that has used torch may wait for ever for its threads.
        context = multiprocessing.get_context("spawn")
        self.channel, theirs = context.Pipe()
        self.process = context.Process(target=_slot, args=(environment, theirs))
        self.process.start()
        # With the only other end in its process, the channel ends with it.
        theirs.close()

    def ended(self) -> int | None:
        """The exit code if the process has ended; None if it has done its work and waits for more.

        It is asked when the channel has something to say.
        """
        try:
            self.channel.recv()
        except (EOFError, OSError):
            self.process.join()
            return self.process.exitcode or 0
        return None


def _slot(environment: Mapping[str, str], channel: connection.Connection[Any, Any]) -> None:
    """What the process of a worker does."""
    os.environ.update(environment)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with exit_codes():
        try:
            with stopped_by_signals(), suppress(EOFError):
                while True:
                    folder, goals = channel.recv()
                    logged_work(folder, goals)
                    channel.send("done")
        except Unfit as error:
            # The others go on. What is broken in this process ends with it.
            log.error("%s", error)
        except KeyboardInterrupt:
            # The command says it, once for all workers.
            raise SystemExit(STOPPED) from None


def _stop_with_parent() -> None:
    """Without this, workers would go on with the sweep after its command was killed."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def check_installed(package: str, option: str, extra: str) -> None:
    """Raises UserError if an optional package is not installed."""
    if find_spec(package) is None:
        raise UserError(f"hydra/launcher={option}: {package} is not installed; run: pip install 'tiedlora[{extra}]'")


@dataclass
class RayTasks:
    """hydra/launcher=ray_tasks: Ray starts as many workers as its CPUs and GPUs allow, MOST_WORKERS at most."""

    __pydantic_config__ = CHECKED
    ray: dict[str, dict[str, Any]]
    """The arguments of ray.init and of ray.remote."""

    def __post_init__(self) -> None:
        check_installed("ray", "ray_tasks", "ray")

    def __call__(self, folder: Path, goals: Sequence[Goal]) -> None:
        """Run the workers.

        Raises:
            RayError: a worker was killed or failed. All workers have ended.
        """
        import ray  # noqa: PLC0415

        if not ray.is_initialized():
            ray.init(**self.ray["init"])
        worker, shared = ray.remote(**self.ray["remote"])(logged_work), ray.put(goals)
        # Those that start when no cell is left end at once.
        tasks = [worker.remote(folder, shared) for _ in goals[:MOST_WORKERS]]
        ray.wait(tasks, num_returns=len(tasks))
        ray.get(tasks)


@dataclass
class SubmititJobs:
    """hydra/launcher=slurm and submitit_slots: workers in submitit's jobs, in Slurm's queue or on this machine."""

    cluster: str
    """slurm, or local."""
    jobs_at_once: Count
    """The most workers."""
    submitit_folder: str
    parameters: dict[str, Any]
    """Those of submitit's executor, without the cluster's name before them."""

    def __post_init__(self) -> None:
        check_installed("submitit", "slurm or submitit_slots", "slurm")

    def __call__(self, folder: Path, goals: Sequence[Goal]) -> None:
        """Run the workers.

        Raises:
            RuntimeError: a worker was killed or failed. All workers have ended.
            KeyboardInterrupt: on this machine, after every running cell has ended or saved its checkpoint. In Slurm's
                queue the jobs go on.
        """
        import submitit  # noqa: PLC0415

        of_every_queue = (
            "timeout_min",
            "cpus_per_task",
            "gpus_per_node",
            "tasks_per_node",
            "mem_gb",
            "nodes",
            "name",
            "stderr_to_stdout",
        )
        given = {key: value for key, value in self.parameters.items() if value is not None}
        named = {key if key in of_every_queue else f"{self.cluster}_{key}": value for key, value in given.items()}
        of_executor = {key: named.pop(key) for key in list(named) if key.endswith("max_num_timeout")}
        executor = submitit.AutoExecutor(folder=self.submitit_folder, cluster=self.cluster, **of_executor)
        executor.update_parameters(**named)
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
        try:
            logged_work(folder, goals)
        except KeyboardInterrupt as stop:
            if stop.args:
                # What submitit's own handler has raised. It expects an error, and writes it down as the job's end.
                raise RuntimeError(str(stop)) from None
            raise

    def checkpoint(self, folder: Path, goals: Sequence[Goal]) -> Any:
        """What is queued again after a time limit or a preemption: the same, because the cells' folders have the rest.

        submitit calls this method by its name.
        """
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415

        return DelayedSubmission(self, folder, goals)


LAUNCHERS: dict[str, type[Slots | RayTasks | SubmititJobs]] = {
    f"{kind.__module__}.{kind.__name__}": kind for kind in (Slots, RayTasks, SubmititJobs)
}
"""`_target_` of the options -> the launcher."""


def launcher_of(config: DictConfig) -> AbstractContextManager[Launch]:
    """The launcher that the configuration of a sweep names, which ends with the context. Hydra's own default works in
    this process.

    Raises:
        UserError: it is none of ours, an argument is wrong, or its package is not installed.
    """
    option = config.hydra.runtime.choices["hydra/launcher"]
    if option == "basic":
        return nullcontext(work)
    values: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    kind = LAUNCHERS.get(values.pop("_target_"))
    if kind is None:
        raise UserError(
            f"hydra/launcher={option}: is no launcher of sweeps; choose basic, joblib_slots, ray_tasks, slurm or "
            "submitit_slots"
        )
    names = [item.name for item in fields(kind)]
    if "parameters" in names:
        values["parameters"] = {key: values.pop(key) for key in list(values) if key not in names}
    launch = from_person(kind, values, names, "hydra.launcher.")
    return closing(launch) if isinstance(launch, Slots) else nullcontext(launch)
