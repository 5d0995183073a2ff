"""Run jobs in several worker processes at once. Each slot is one process with its own environment.

Each slot has a joblib pool of one process. With one pool for all slots, a killed job would end the others too, because
joblib gives up a whole pool when it loses a worker.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tiedlora.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")
SECONDS_BETWEEN_SIGNAL_CHECKS = 0.2


@dataclass(frozen=True)
class SlotJob(Generic[T]):
    """One job: its name in log lines, and the function that a worker process calls. cloudpickle must support it."""

    name: str
    work: Callable[[], T]


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


class WorkerSlots(Generic[T]):
    """One launch of several jobs. Each slot has a thread, which takes the next job until none is left.

    A worker process stays for the slot's next job, and keeps the data that it has loaded.

    Args:
        environments: for each slot, the variables that its process has in addition to those of this process.
    """

    def __init__(self, jobs: Sequence[SlotJob[T]], environments: Sequence[Mapping[str, str]]) -> None:
        self.environments = environments[: len(jobs)]
        self._waiting = deque(enumerate(jobs))
        self._results: list[T | None] = [None] * len(jobs)
        self._pools: dict[int, Any] = {}
        self._stopping = False
        self._error: BaseException | None = None
        """Why a slot has ended before its time."""
        self._ended = [threading.Event() for _ in self.environments]

    def run(self) -> list[T | None]:
        """Run the jobs. This must be called only once, in the main thread.

        Returns:
            The result of each job; None if it failed or its worker died. The other jobs are not affected.

        Raises:
            KeyboardInterrupt: after every running job has ended or saved its checkpoint.
            UserError: a slot could not go on, as when no process can be started. The running jobs have ended as above.
        """
        # Now, and not in the slots: of two threads that import it at once, one may see half of it. Not at the top of
        # the file: joblib is an optional extra, and the plug-in has checked that it is installed.
        importlib.import_module("joblib.externals.loky")
        for slot in range(len(self.environments)):
            threading.Thread(target=self._work, args=(slot,)).start()
        try:
            self._wait()
        except KeyboardInterrupt:
            self._stop()
            self._wait()
        if self._error is not None:
            reason = " ".join(f"{type(self._error).__name__}: {self._error}".split())
            raise UserError(f"a slot of hydra/launcher=joblib_slots has ended: {reason}; the same command continues")
        if self._stopping:
            raise KeyboardInterrupt
        return self._results

    def _wait(self) -> None:
        """Wait until every slot has ended.

        Not with Thread.join: if a signal interrupts it, Python 3.11 takes the running thread for one that has ended.
        """
        for ended in self._ended:
            # The wait has a limit, because Python handles a signal only between two calls.
            while not ended.wait(SECONDS_BETWEEN_SIGNAL_CHECKS):
                pass

    def _stop(self) -> None:
        """Start no more jobs, and ask the running ones to save a checkpoint and end."""
        self._stopping = True
        for pool in list(self._pools.values()):
            for process in list((pool._processes or {}).values()):
                if process.is_alive():
                    os.kill(process.pid, signal.SIGTERM)

    def _work(self, slot: int) -> None:
        try:
            self._take_jobs(slot)
        except BaseException as error:
            # Without its slot the sweep would go on with one process fewer, and say nothing.
            self._error = error
            self._stop()
        finally:
            self._ended[slot].set()

    def _take_jobs(self, slot: int) -> None:
        from joblib.externals.loky import BrokenProcessPool, ProcessPoolExecutor

        while self._waiting and not self._stopping:
            try:
                place, job = self._waiting.popleft()
            except IndexError:
                break
            if slot not in self._pools:
                self._pools[slot] = ProcessPoolExecutor(1, env=dict(self.environments[slot]))
            try:
                self._results[place] = self._pools[slot].submit(job.work).result()
            except BrokenProcessPool:
                log.warning("%s: its worker was killed", job.name)
                self._pools.pop(slot).shutdown(kill_workers=True)
            except KeyboardInterrupt:
                self._stopping = True
            except Exception as error:
                # The sweep will see in the cell's folder that there is no result. The slot takes its next job.
                log.warning("%s: could not be run (%s: %s)", job.name, type(error).__name__, error)
        if slot in self._pools:
            self._pools.pop(slot).shutdown()
