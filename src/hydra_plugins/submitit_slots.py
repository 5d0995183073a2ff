"""hydra/launcher=submitit_slots: submitit's local executor, a few jobs at a time instead of all at once.

Here belongs what submitit and Hydra ask of a launcher. Hydra searches hydra_plugins at every start, so this file may
import Hydra, its submitit launcher and light packages, and no torch.
"""

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
    # It is not installed. Hydra imports every plug-in at every start, so this is an error only for
    # hydra/launcher=submitit_slots, and the sweeper reports it.
    pass
else:

    class SubmititSlotsLauncher(LocalLauncher):  # type: ignore[misc]
        """The local executor starts every job that it gets, so it gets one for each free slot."""

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
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            # On a KeyboardInterrupt map drops the waiting cells, and the pool waits for the jobs, which then end.
            with ThreadPoolExecutor(self.jobs_at_once) as threads, _jobs_stop_with_sweep():
                return list(threads.map(self._launch_job, job_overrides, numbers))

        def _launch_job(self, overrides: Sequence[str], number: int) -> JobReturn:
            result: JobReturn
            (result,) = super().launch([overrides], number)
            return result


@contextmanager
def _jobs_stop_with_sweep() -> Iterator[None]:
    """Pass a stop of the sweep to its jobs: submitit's jobs outlive the process that started them, and Hydra does not
    keep them."""
    # Not at the top of the file: submitit is an optional extra.
    from submitit.local import local

    controllers: list[subprocess.Popen[bytes]] = []
    start_controller = local.start_controller

    def start_and_remember(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        controllers.append(start_controller(*arguments, **options))
        return controllers[-1]

    local.start_controller = start_and_remember
    try:
        yield
    except KeyboardInterrupt:
        for controller in controllers:
            # It passes SIGTERM to its job.
            controller.send_signal(signal.SIGTERM)
        raise
    finally:
        local.start_controller = start_controller
