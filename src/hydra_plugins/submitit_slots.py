"""hydra/launcher=slurm and submitit_slots: submitit's executors, which wait for every job, also after one was killed.

This file has only what submitit and Hydra need from a launcher. Hydra imports hydra_plugins at every start, so this
file may import Hydra, its submitit launcher and light packages, but no torch.
"""

from __future__ import annotations

import logging
import signal
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from hydra.core.utils import JobReturn, JobStatus

log = logging.getLogger(__name__)

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher
except ImportError:
    # It is not installed. Hydra imports every plug-in at every start, so this is an error only for
    # hydra/launcher=slurm or submitit_slots, and the sweeper reports it.
    pass
else:

    class SlurmJobsLauncher(SlurmLauncher):  # type: ignore[misc]
        """One job array, whose jobs are all waited for."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
            """Run the cells, each in its own job. A job that was killed is returned as failed."""
            with _killed_jobs_are_failed():
                results: list[JobReturn] = super().launch(job_overrides, initial_job_idx)
                return results

    class SubmititSlotsLauncher(LocalLauncher):  # type: ignore[misc]
        """A few jobs at a time: the local executor gets one for each free slot, because it starts every job at once."""

        def __init__(self, jobs_at_once: int, **params: object) -> None:
            """
            Args:
                jobs_at_once: how many jobs run at once.
                params: the parameters of hydra_submitit_launcher.
            """
            super().__init__(**params)
            self.jobs_at_once = jobs_at_once

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
            """Run the cells, each in its own job. A job that was killed is returned as failed.

            Raises:
                KeyboardInterrupt: after every running cell has ended or saved its checkpoint.
            """
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            # On a KeyboardInterrupt map drops the waiting cells, and the pool waits for the jobs, which then end.
            with ThreadPoolExecutor(self.jobs_at_once) as threads, _jobs_stop_with_sweep(), _killed_jobs_are_failed():
                return list(threads.map(self._launch_job, job_overrides, numbers))

        def _launch_job(self, overrides: Sequence[str], number: int) -> JobReturn:
            result: JobReturn
            (result,) = super().launch([overrides], number)
            return result


@contextmanager
def _killed_jobs_are_failed() -> Iterator[None]:
    """Inside the context, the result of a job that was killed is a failure, and no exception.

    Hydra's launchers read the results one after the other. With the exception they would stop at the first killed job,
    while the others run or wait in the queue.
    """
    # Not at the top of the file: submitit is an optional extra.
    from submitit.core.core import Job

    results = Job.results

    def results_or_failure(job: Job[JobReturn]) -> list[JobReturn]:
        try:
            return list(results(job))
        except Exception as error:
            log.warning("job %s ended without a result: %s", job.job_id, str(error).strip().splitlines()[:1])
            return [JobReturn(status=JobStatus.FAILED)]

    Job.results = results_or_failure
    try:
        yield
    finally:
        Job.results = results


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
