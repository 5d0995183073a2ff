"""hydra/launcher=submitit_slots: submitit's local executor, with a few jobs at a time instead of all at once.

This file has only what submitit and Hydra need from a launcher. Hydra imports hydra_plugins at every start, so this
file may import Hydra, its submitit launcher and light packages, but no torch.
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
        """Gives the local executor one job for each free slot, because it starts every job at once."""

        def __init__(self, jobs_at_once: int, **params: object) -> None:
            """
            Args:
                jobs_at_once: how many jobs run at once.
                params: the parameters of hydra_submitit_launcher.
            """
            super().__init__(**params)
            self.jobs_at_once = jobs_at_once

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
            """Run the cells, each in its own job.

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
    """Inside the context, a stop of the sweep also stops its jobs. Without this, submitit's jobs would continue."""
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
            # submitit's process passes SIGTERM to the job.
            controller.send_signal(signal.SIGTERM)
        raise
    finally:
        local.start_controller = start_controller
