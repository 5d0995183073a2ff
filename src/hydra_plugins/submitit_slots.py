"""hydra/launcher=submitit_slots: submitit's local executor, a few jobs at a time instead of all at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

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
            """Run the cells, each in a job of its own."""

            def one(place: int) -> JobReturn:
                result: JobReturn
                (result,) = super(SubmititSlotsLauncher, self).launch([job_overrides[place]], initial_job_idx + place)
                return result

            with ThreadPoolExecutor(self.jobs_at_once) as threads:
                return list(threads.map(one, range(len(job_overrides))))
