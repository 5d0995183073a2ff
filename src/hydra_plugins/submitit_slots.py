"""hydra/launcher=submitit_slots: submitit's local executor, a few jobs at a time instead of all at once."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from hydra.core.utils import JobReturn

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher
except ImportError:
    # Not installed, and hydra/launcher=submitit_slots then says so: Hydra imports every plugin at every start.
    pass
else:

    class SubmititSlotsLauncher(LocalLauncher):  # type: ignore[misc]
        """The local executor starts every job it is given, so it is given one a free slot."""

        def __init__(self, jobs_at_once: int, **params: object) -> None:
            """
            Args:
                jobs_at_once: running jobs at any time.
                params: as of hydra_submitit_launcher.
            """
            super().__init__(**params)
            self.jobs_at_once = jobs_at_once

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
            """Run the cells, each in a job of its own.

            Raises:
                KeyboardInterrupt: after every running cell has ended or saved its checkpoint.
            """

            def one(place: int) -> JobReturn:
                result: JobReturn
                (result,) = super(SubmititSlotsLauncher, self).launch([job_overrides[place]], initial_job_idx + place)
                return result

            # On a KeyboardInterrupt map drops the waiting cells, and the pool waits for the jobs, which then end.
            with ThreadPoolExecutor(self.jobs_at_once) as threads, _stopped_with_us():
                return list(threads.map(one, range(len(job_overrides))))


@contextmanager
def _stopped_with_us() -> Iterator[None]:
    """Hand a stop on to the jobs: submitit's outlive the process that started them, and Hydra keeps no hold of them."""
    from submitit.local import local

    controllers: list[subprocess.Popen[bytes]] = []
    plain = local.start_controller

    def start(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        controllers.append(plain(*arguments, **options))
        return controllers[-1]

    local.start_controller = start
    try:
        yield
    except KeyboardInterrupt:
        for controller in controllers:
            # It passes SIGTERM to its job.
            controller.send_signal(signal.SIGTERM)
        raise
    finally:
        local.start_controller = plain
