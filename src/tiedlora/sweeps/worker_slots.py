"""Jobs in several worker processes at once, each slot a process of its own with an environment of its own.

One joblib pool of a single process for each slot, not one pool of them all: when joblib loses a worker it gives up the
whole pool, and a killed job would end its neighbours too.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
SECONDS_BETWEEN_SIGNAL_CHECKS = 0.2


@dataclass(frozen=True)
class SlotJob(Generic[T]):
    """One job: the name that log lines use, and what a worker process calls. cloudpickle must be able to carry it."""

    name: str
    work: Callable[[], T]


class WorkerSlots(Generic[T]):
    """One launch of several jobs. A thread for each slot takes the next job until none is left.

    A worker process stays for the slot's next job and keeps what it has loaded.

    Args:
        environments: one for each slot: the variables that its process has beside those of this process.
    """

    def __init__(self, jobs: Sequence[SlotJob[T]], environments: Sequence[Mapping[str, str]]) -> None:
        self.environments = environments[: len(jobs)]
        self._waiting = deque(enumerate(jobs))
        self._results: list[T | None] = [None] * len(jobs)
        self._pools: dict[int, Any] = {}
        self._stopping = False

    def run(self) -> list[T | None]:
        """Run the jobs; must be called once, in the main thread.

        Returns:
            What each job returned; None where it failed or its worker died. The other jobs are not affected.

        Raises:
            KeyboardInterrupt: after every running job has ended or saved its checkpoint.
        """
        threads = [threading.Thread(target=self._work, args=(slot,)) for slot in range(len(self.environments))]
        for thread in threads:
            thread.start()
        try:
            _join(threads)
        except KeyboardInterrupt:
            self._stop()
            _join(threads)
        if self._stopping:
            raise KeyboardInterrupt
        return self._results

    def _stop(self) -> None:
        """Start no other job, and ask the running ones to save a checkpoint and end."""
        self._stopping = True
        for pool in list(self._pools.values()):
            for process in list((pool._processes or {}).values()):
                if process.is_alive():
                    os.kill(process.pid, signal.SIGTERM)

    def _work(self, slot: int) -> None:
        # Not at the top of the file: joblib is an optional extra, and the plug-in has looked for it.
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
                # The sweep sees in the cell's folder that there is no result; the slot takes its next job.
                log.warning("%s: could not be run (%s: %s)", job.name, type(error).__name__, error)
        if slot in self._pools:
            self._pools.pop(slot).shutdown()


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        while thread.is_alive():
            # With a limit, because Python handles a signal only between two calls.
            thread.join(SECONDS_BETWEEN_SIGNAL_CHECKS)
