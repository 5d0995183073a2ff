"""Carry out a sweep: what its command does, what each of its workers does, and the launchers, which start workers.

Finished cells are skipped, stopped ones continue, and a cell whose worker died is tried again. A worker takes the next
free cell and carries it out, until no cell is free. It holds the lock of its cell from the first moment, so no second
one takes it. The lock ends with its process. A worker that was killed leaves a mark (SweepControl), and the cell is
tried once more by another one. What workers have done is read only from the cells' folders.

All workers do the same, so a launcher only starts some, in this process, in other processes, or on other machines, and
waits for them. conf/hydra/launcher/ has the options. The packages of Ray and submitit are optional extras, and are
imported when they are used.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tiedlora import storage
from tiedlora.config.schema import SLOT_DEVICE
from tiedlora.errors import STOPPED, StoppedEarly, UserError, drop_output, exit_codes, output_is_closed
from tiedlora.keys import CHECKED, Count, Text, from_person
from tiedlora.records.run_folder import Busy, RunFolder
from tiedlora.runs import run
from tiedlora.runs.inputs import check_same_inputs
from tiedlora.scoring.passes import check_words
from tiedlora.sweeps.cells import Goal, Sweep, SweepCell, SweepControl, frozen_cell
from tiedlora.tasks import load_examples, load_task
from tiedlora.text import aligned, clock, visible
from tiedlora.tracking.run_trackers import check_tracker
from tiedlora.training.signals import also_stopped_by, stopped_by_signals

log = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKS = 1.0
"""The time between two looks at a cell that another process is working on, or at whether a cell should stop."""
STARTS = 2
"""How often a cell is started if its worker dies without leaving an error."""
SECONDS_BETWEEN_COUNTS = 2.0
LARGEST_SHARE = 0.02
"""The largest share of the time for counting: ten thousand cells take seconds on a network file system."""

Launch = Callable[[Path, Sequence[Goal]], None]
"""Starts workers on the goals of a sweep's folder, and returns when all have ended. It raises an error if a worker was
killed or failed. A UserError ends the sweep."""


def run_sweep(sweep: Sweep, launch: Launch, fail_fast: bool = False) -> None:
    """Run the cells that are neither finished nor dropped, then print the table of all cells.

    Args:
        fail_fast: stop all cells when the first one fails. Otherwise the others continue.

    Raises:
        UserError: a cell's result.json is damaged, or as `check_scoring`, or the launcher cannot go on.
        SystemExit: with code 1, after naming every cell that failed.
        KeyboardInterrupt: the sweep was asked to stop; the same command continues it.
    """
    # It imports rich, which takes a tenth of a second, and a single run loads this module too.
    from tiedlora.sweeps import status  # noqa: PLC0415

    finished = {cell.run_id: cell for cell in sweep.cells if cell.finished()}
    unfinished = [cell for cell in sweep.cells if cell.run_id not in finished]
    errors = changed_inputs(finished.values())
    check_scoring(unfinished)
    sweep.freeze()
    control = sweep.control
    control.start(fail_fast)
    wanted = sum(not control.is_dropped(cell.run_id) for cell in unfinished)
    log.info("%s: %d cells, %d finished before, %d to run", sweep.id, len(sweep.cells), len(finished), wanted)
    leave = threading.Event()
    progress = threading.Thread(target=_log_progress, args=(sweep, leave), daemon=True)
    progress.start()
    try:
        launch_cells(unfinished, launch, control)
    except KeyboardInterrupt:
        print(status.summary_line(sweep.id, [status.status_of(cell, control) for cell in sweep.cells]))
        raise
    finally:
        leave.set()
        progress.join()
    cells = [status.status_of(cell, control) for cell in sweep.cells]
    print(f"\n{aligned(status.rows(cells))}\n\n{status.summary_line(sweep.id, cells)}")
    ended = {"done", "paused", "dropped"} | ({"missing", "interrupted", "pruned"} if control.first_failure() else set())
    errors.update({cell.run_id: cell.error or "" for cell in cells if cell.state not in ended})
    end_with(errors, len(cells), control)


def _log_progress(sweep: Sweep, leave: threading.Event) -> None:
    """Log a line whenever a cell of the sweep ends, under any launcher, until `leave` is set."""

    def state(folder: RunFolder) -> str:
        """How the run has ended; empty if it has not. It takes no lock, because a worker may need it."""
        files = {"done": folder.result_file, "failed": folder.error_file, "pruned": folder.pruned_file}
        return next((name for name, file in files.items() if file.exists()), "")

    begun, pause, total = time.monotonic(), SECONDS_BETWEEN_COUNTS, len(sweep.cells)
    first = last = Counter(state(cell.folder) for cell in sweep.cells)
    while not leave.wait(pause):
        started = time.monotonic()
        if (now := Counter(state(cell.folder) for cell in sweep.cells)) != last:
            last, line = now, f"{sweep.id}: {now['done']} of {total} done"
            line += "".join(f", {now[state]} {state}" for state in ("failed", "pruned") if now[state])
            if (done := now["done"] - first["done"]) > 0:
                left = (started - begun) / done * (total - now["done"] - now["failed"])
                line += f", about {clock(left)} left"
            log.info("%s", line)
        pause = max(SECONDS_BETWEEN_COUNTS, (time.monotonic() - started) / LARGEST_SHARE)


def check_scoring(cells: Iterable[SweepCell]) -> None:
    """Check what would fail later and cost the time of the sweep: words, trackers and test rows.

    Rows of the hub and rows that a task generates are left to the run that scores them.

    Raises:
        UserError: a metric, a neutral text or an option of a task is wrong; a tracker is not installed; there are no
            rows, or one is wrong.
    """
    cells = list(cells)
    for cell in cells:
        if not cell.folder.result_file.exists():
            check_words(cell.config)
            check_tracker(cell.config)
    wanted = [cell.config for cell in cells if "test" in cell.config.score.splits and cell.config.data_root is not None]
    for config in {(repr(config.task), config.data_root): config for config in wanted}.values():
        if not (task := load_task(config.task)).generator:
            load_examples(task, "test", config.data_root)


def end_with(errors: Mapping[str, str], cells: int, control: SweepControl) -> None:
    """End a sweep of so many cells.

    Args:
        errors: run id -> why it failed.

    Raises:
        SystemExit: with code 1, after naming every cell that failed.
    """
    if (first_failure := control.first_failure()) is not None:
        print(f"\nfail_fast: {first_failure} failed, so the others stopped; fix it and run this again", file=sys.stderr)
    if errors:
        print(f"\n{len(errors)} of {cells} cells failed or are not done; tracebacks are in error.txt:", file=sys.stderr)
        for run_id, error in errors.items():
            print(f"  {run_id}: {error}", file=sys.stderr)
        raise SystemExit(1)


def launch_cells(cells: Sequence[SweepCell], launch: Launch, control: SweepControl) -> None:
    """Launch workers until each cell is done, paused, failed or dropped. A dropped one may be put back meanwhile.

    Raises:
        UserError: launches again and again change nothing, or the launcher says why it cannot go on.
    """
    reason, seen, failures = "", None, 0
    while True:
        # Another command on the same cells shares the work: it has some, and this one takes the others.
        busy = [cell for cell in cells if cell.state() == "running"]
        free = [cell for cell in cells if cell not in busy]
        for cell in free:
            if control.take_retry(cell.run_id):
                cell.folder.error_file.unlink(missing_ok=True)
                control.note_end(cell.run_id)
        if not (goals := [cell.goal for cell in free if is_open(cell, control)]):
            if not busy:
                return
            wait_for_one(busy)
            continue
        marks = [
            (cell.run_id, control.starts(cell.run_id), cell.state(), cell.folder.checkpoint_step()) for cell in free
        ]
        failures = failures + 1 if marks == seen else 0
        if failures == STARTS:
            # The cells' frozen configurations are those of the newest command.
            why = " ".join(reason.split()) or "its workers find no work; another command may ask for other scores"
            raise UserError(f"hydra/launcher: started no cell: {why}; the same command continues")
        if failures:
            time.sleep(SECONDS_BETWEEN_CHECKS)
        seen, reason = marks, ""
        try:
            launch(control.folder, goals)
        except UserError:
            raise
        except Exception as error:
            # The folders show what was done.
            reason = f"{type(error).__name__}: {error}"
            log.warning("the launcher failed (%s); continuing from the cells' folders", reason)


def wait_for_one(busy: Sequence[SweepCell]) -> None:
    """Wait until one of these cells is free, such as after another command has ended its work on it."""
    log.info("waiting for cells that another process is working on, such as %s", busy[0].run_id)
    while all(cell.state() == "running" for cell in busy):
        time.sleep(SECONDS_BETWEEN_CHECKS)


def is_open(cell: SweepCell, control: SweepControl) -> bool:
    """Whether a worker may take the cell: it is not done or paused, has not failed in this command, and may start."""
    state = cell.state()
    has_ended = state in ("done", "paused", "failed") and (state != "failed" or control.is_new(cell.folder.error_file))
    return not has_ended and not control.stops(cell.run_id)


def changed_inputs(cells: Iterable[SweepCell]) -> dict[str, str]:
    """Finished cells whose data or base model has changed since then: run id -> what has changed.

    Raises:
        UserError: a cell's result.json is missing or damaged.
    """
    changes = {}
    for cell in cells:
        record = cell.folder.finished_record()
        try:
            check_same_inputs(cell.config, record, cell.folder)
        except UserError as error:
            changes[cell.run_id] = str(error)
    return changes


def work(folder: Path, goals: Sequence[Goal]) -> None:
    """Carry out cells until none of them is free: each has ended, was dropped, or another worker is at it.

    Args:
        folder: the sweep's folder, with the frozen configurations of the cells.

    Raises:
        KeyboardInterrupt, UserError: the sweep was asked to stop (a checkpoint is written); a frozen cell is damaged.
    """
    control, waiting, before = SweepControl(folder), list(goals), len(goals) + 1
    while len(waiting) < before:
        before, free, waiting = len(waiting), waiting, []
        for goal in free:
            # The folder is outputs/sweeps/SWEEP.
            run_folder = RunFolder(folder.parents[1] / goal.run_id)
            try:
                if not control.stops(goal.run_id):
                    with run_folder.locked(patience=0):
                        cell = frozen_cell(folder, goal.run_id).until(goal.pause_after, goal.splits)
                        _carry_out(cell, control)
            except Busy:
                waiting.append(goal)


def _carry_out(cell: SweepCell, control: SweepControl) -> None:
    """Carry out a cell, unless it has ended. Its lock is held."""
    killed = control.note_start(cell.run_id)
    try:
        if killed >= STARTS and is_open(cell, control):
            why = f"The worker ended {STARTS} times without a result or an error: killed, or out of memory?"
            storage.write_bytes(cell.folder.error_file, f"{why}\n".encode())
            control.failed(cell.run_id)
        elif is_open(cell, control):
            if killed:
                log.warning("%s: once more, because its worker was killed", cell.run_id)
            run_cell(cell, control)
    finally:
        control.note_end(cell.run_id)


def run_cell(cell: SweepCell, control: SweepControl) -> None:
    """Carry out one cell. A failure is written to error.txt in the cell's folder, where the sweep reads it.

    A failure is not raised, because a launcher would keep the exception, and with it the tensors of the failed cell.

    Raises:
        KeyboardInterrupt: the sweep was asked to stop; a checkpoint is written.
    """
    folder, asked, next_look = cell.folder, False, 0.0

    def stopped() -> bool:
        """Whether the cell should stop. On a network file system, a look at the files may take milliseconds."""
        nonlocal asked, next_look
        if not asked and (now := time.monotonic()) >= next_look:
            asked, next_look = control.stops(cell.run_id), now + SECONDS_BETWEEN_CHECKS
        return asked

    try:
        with also_stopped_by(stopped):
            run.main(cell.config)
    except StoppedEarly:
        if not stopped():
            # After an Exception, a worker continues with the next cell; after a KeyboardInterrupt, it stops.
            raise KeyboardInterrupt from None
        log.info("%s: stopped with a checkpoint, because it was dropped or another cell failed", cell.run_id)
        return
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            # The sweep is piped into a program such as `head`, which has ended. That is no failure of the cell.
            drop_output()
            raise KeyboardInterrupt from None
        why = visible(" ".join(f"{type(error).__name__}: {error}".split()))
        if not folder.write_error():
            # The sweep could not tell it from a cell that was stopped, and would start it again and again.
            raise UserError(f"{folder.error_file}: cannot be written, so the sweep ends ({why})") from None
        control.failed(cell.run_id)
        log.error("%s failed: %s", cell.run_id, why)
    else:
        return
    # Here, and not in the block above, where the exception still holds the frames and tensors of the failed cell. It
    # imports torch, which a cell that is finished does not need.
    from tiedlora.models.device import free_memory  # noqa: PLC0415

    free_memory()


@dataclass
class Slots:
    """hydra/launcher=joblib_slots: several workers on this machine, each a process with its own device."""

    __pydantic_config__ = CHECKED
    n_jobs: Count
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
            # A cluster sets the variable to the devices of the job, so a number must not reach beyond them. Other
            # names, such as a GPU's UUID, stay.
            if inherited is not None and re.fullmatch(r"-?\d+", device):
                if not 0 <= int(device) < len(given):
                    raise UserError(
                        f"hydra.launcher.devices: has {device}, but CUDA_VISIBLE_DEVICES={inherited} gives "
                        f"{len(given)} devices to this process; number them from 0"
                    )
                visible = given[int(device)]
            environment.update({"CUDA_VISIBLE_DEVICES": visible, SLOT_DEVICE: device})

    def __call__(self, folder: Path, goals: Sequence[Goal]) -> None:
        """Run the workers. One that is killed is replaced, and the others are not affected.

        Raises:
            KeyboardInterrupt: after every running cell has ended or saved its checkpoint.
            UserError: a worker could not go on. The running cells have ended as above.
        """
        # New interpreters: a fork of a process that has used torch may wait for ever for its threads.
        context = multiprocessing.get_context("spawn")
        waiting, killed = self.environments[: len(goals)], 0
        running: dict[int, tuple[SpawnProcess, dict[str, str]]] = {}
        try:
            while waiting or running:
                while waiting:
                    environment = waiting.pop()
                    process = context.Process(target=_slot, args=(environment, folder, goals))
                    process.start()
                    running[process.sentinel] = process, environment
                ready = connection.wait(running)
                for sentinel in [each for each in running if each in ready]:
                    process, environment = running.pop(sentinel)
                    process.join()
                    code = process.exitcode or 0
                    if code == STOPPED:
                        raise KeyboardInterrupt
                    if code < 0 and killed < STARTS * len(goals):
                        # The next one tries its cell once more. No cell is tried for ever.
                        killed += 1
                        log.warning("a worker was killed, and another one takes its place")
                        waiting.append(environment)
                    elif code != 0:
                        raise UserError(
                            f"a worker of hydra/launcher=joblib_slots has ended with exit code {code}, for the reason "
                            "above; the same command continues"
                        )
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join()


def _slot(environment: Mapping[str, str], folder: Path, goals: Sequence[Goal]) -> None:
    """One worker of Slots, in its process."""
    os.environ.update(environment)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with exit_codes():
        try:
            with stopped_by_signals():
                logged_work(folder, goals)
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


def logged_work(folder: Path, goals: Sequence[Goal]) -> None:
    """`work` in a process of its own, with the log lines of a run."""
    # It imports tqdm, and a single run loads this module too.
    from tiedlora.tracking.progress import show_log  # noqa: PLC0415

    show_log()
    work(folder, goals)


@dataclass
class RayTasks:
    """hydra/launcher=ray_tasks: Ray starts as many workers as its CPUs and GPUs allow, 256 at most."""

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
        tasks = [worker.remote(folder, shared) for _ in goals[:256]]
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
            *("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name"),
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


LAUNCHERS = {"Slots": Slots, "RayTasks": RayTasks, "SubmititJobs": SubmititJobs}


def launcher_of(config: DictConfig) -> Launch:
    """The launcher that the configuration of a sweep names. Hydra's own default works in this process.

    Raises:
        UserError: it is none of ours, an argument is wrong, or its package is not installed.
    """
    option = config.hydra.runtime.choices["hydra/launcher"]
    if option == "basic":
        return work
    values: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    kind = LAUNCHERS.get(values.pop("_target_").rpartition(".")[2])
    if kind is None:
        raise UserError(
            f"hydra/launcher={option}: is no launcher of sweeps; choose basic, joblib_slots, ray_tasks, slurm or "
            "submitit_slots"
        )
    names = [item.name for item in fields(kind)]
    if "parameters" in names:
        values["parameters"] = {key: values.pop(key) for key in list(values) if key not in names}
    return from_person(kind, values, names, "hydra.launcher.")
