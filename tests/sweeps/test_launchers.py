"""Sweeps with cells in other processes: stopped by signals, killed, and equal to a sweep in one process."""

import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
from helpers import processes
from helpers.commands import FreshCommand, wait_until

from tiedlora.config.schema import SLOT_DEVICE
from tiedlora.errors import UserError
from tiedlora.models.device import resolve_device
from tiedlora.sweeps.cells import Sweep, SweepCell
from tiedlora.sweeps.expand import compose_sweep
from tiedlora.sweeps.run_cell import run_cell
from tiedlora.sweeps.worker_slots import SlotJob, WorkerSlots, visible_device


def results(finished: Sweep) -> dict[str, tuple[bytes, str]]:
    """Adapter and predictions of each cell."""
    by_run = {}
    for cell in finished.cells:
        (tensors,) = cell.folder.adapter.glob("*.safetensors")
        by_run[cell.run_id] = (tensors.read_bytes(), cell.folder.predictions_file("validation").read_text())
    return by_run


def has_checkpoint(cell: SweepCell) -> bool:
    return any(cell.folder.checkpoints.glob("step-*[0-9]"))


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 1)])
def test_a_signal_stops_a_sweep_whose_runs_are_in_other_processes(tiny_run, number, processes):
    pytest.importorskip("joblib")
    seeds = ",".join(map(str, range(processes + 1)))
    launcher = ["hydra/launcher=joblib_slots", f"hydra.launcher.n_jobs={processes}"]
    words = tiny_run(f"seed={seeds}", "train.steps=100000", "train.validate_every=0", *launcher)
    *running, last = compose_sweep(words).cells
    command = FreshCommand("--multirun", *words)
    wait_until(lambda: all(map(has_checkpoint, running)))
    command.send_signal(number)
    ended = command.ended()
    assert ended.code == 75, ended.err
    assert [cell.state() for cell in running] == ["interrupted"] * processes
    assert last.state() == "missing"


def lock_owner(lock: Path) -> int | None:
    """The process that holds a run's lock, as the kernel lists it."""
    if not lock.exists():
        return None
    inode = lock.stat().st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] != "->" and words[5].rsplit(":", 1)[1] == str(inode):
            return int(words[4])
    return None


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="finds the worker to kill through Linux's list of locks")
def test_a_killed_joblib_worker_costs_its_cell_one_retry(tiny_run, tmp_path):
    pytest.importorskip("joblib")
    words = tiny_run("seed=0,1,2", "train.steps=40", "train.validate_every=0")
    swept = compose_sweep(words)
    _, victim, last = swept.cells

    command = FreshCommand("--multirun", *words, "hydra/launcher=joblib_slots")
    killed: list[int] = []

    def worker() -> int | None:
        """The process that trains the victim. The sweep's own process takes the lock when it asks for the state."""
        pid = lock_owner(victim.folder.path / ".lock")
        return None if pid in (command.pid, *killed) or not has_checkpoint(victim) else pid

    def kill_twice() -> None:
        """Each time after a checkpoint; the first time only when the other process has taken the last cell."""
        while len(killed) < 2:
            pid = wait_until(worker)
            os.kill(pid, signal.SIGSTOP)
            wait_until(last.folder.metrics_file.exists)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    thread = threading.Thread(target=kill_twice)
    thread.start()
    ended = command.ended()
    thread.join()
    assert ended.code == 1, ended.err
    assert [cell.state() for cell in swept.cells] == ["done", "failed", "done"], ended.err
    assert ended.err.count("its worker was killed") == 2
    assert "1 of 3 cells failed" in ended.err
    assert f"{victim.run_id}: The worker ended 2 times" in ended.err
    assert "failed" in ended.out
    # Under another launcher it is the same sweep, and this launcher starts no worker.
    ended = FreshCommand("--multirun", *words).ended()
    assert ended.code == 0
    assert "2 finished before, 1 to run" in ended.err
    assert "continuing from step" in ended.err

    expected = compose_sweep([*words, f"outputs={tmp_path}/expected"])
    for cell in expected.cells:
        run_cell(cell.config)
    assert results(swept) == results(expected)


def test_a_lost_job_costs_no_other_its_result(caplog):
    pytest.importorskip("joblib")
    jobs = [
        SlotJob("first", partial(os.getenv, "SLOT")),
        SlotJob("killed", partial(signal.raise_signal, signal.SIGKILL)),
        SlotJob("raising", partial(int, "no number")),
        SlotJob("last", partial(os.getenv, "SLOT")),
    ]
    assert WorkerSlots(jobs, [{"SLOT": "0"}]).run() == ["0", None, None, "0"]
    assert "killed: its worker was killed" in caplog.text
    assert "raising: could not be run (ValueError" in caplog.text


def test_a_slot_that_cannot_go_on_ends_the_sweep_with_its_error(monkeypatch):
    loky = pytest.importorskip("joblib.externals.loky")

    def broken(*arguments, **options):
        raise OSError("no more processes\nhere")

    monkeypatch.setattr(loky, "ProcessPoolExecutor", broken)
    with pytest.raises(UserError, match=r"joblib_slots has ended: OSError: no more processes here; the same command"):
        WorkerSlots([SlotJob("first", os.getpid), SlotJob("second", os.getpid)], [{}, {}]).run()


def test_joblib_is_imported_before_the_slots_have_threads():
    """Of two threads that import it at once, one may see half of it."""
    pytest.importorskip("joblib")
    code = """
import os, sys, threading
from tiedlora.sweeps.worker_slots import SlotJob, WorkerSlots
start = threading.Thread.start
def checked(thread):
    assert "joblib.externals.loky" in sys.modules
    start(thread)
threading.Thread.start = checked
print(WorkerSlots([SlotJob("job", os.getppid)], [{}]).run() == [os.getpid()])
"""
    done = processes.run_python("-c", code)
    assert done.stdout == "True\n", done.stderr


def test_joblib_gives_each_slot_its_device(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    from hydra_plugins.joblib_slots import JoblibSlotsLauncher

    launcher = JoblibSlotsLauncher(n_jobs=3, devices=[4, 7])
    assert [launcher.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]
    assert JoblibSlotsLauncher(n_jobs=2, devices=None).environment(1) == {}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"n_jobs": -1}, r"n_jobs=-1: must be a whole number of at least 1"),
        ({"n_jobs": "many"}, r"n_jobs=many: must be a whole number"),
        ({"devices": 1}, r"devices=1: must be a list such as \[0,1\], or null"),
        ({"devices": "0,1"}, r"devices=0,1: must be a list"),
    ],
)
def test_a_wrong_number_of_slots_or_devices_is_refused(words, says):
    pytest.importorskip("joblib")
    from hydra_plugins.joblib_slots import JoblibSlotsLauncher

    launcher = JoblibSlotsLauncher(**{"n_jobs": 2, "devices": None, **words})
    with pytest.raises(UserError, match=rf"^hydra.launcher.{says}"):
        launcher.setup(hydra_context=None, task_function=None, config=None)


def test_a_slot_with_a_device_does_not_fall_back_to_the_cpu(monkeypatch):
    from hydra_plugins.joblib_slots import JoblibSlotsLauncher

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name, value in JoblibSlotsLauncher(n_jobs=1, devices=[7]).environment(0).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^hydra\.launcher\.devices: has 7, and torch finds no such CUDA device"):
        resolve_device("auto")
    assert resolve_device("cpu").type == "cpu"
    monkeypatch.delenv(SLOT_DEVICE)
    assert resolve_device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("package", "chosen"),
    [
        ("ray", ["hydra/launcher=ray_tasks", "+hydra.launcher.ray.init.num_cpus=1"]),
        ("submitit", ["hydra/launcher=submitit_slots"]),
    ],
)
def test_a_cluster_gives_the_same_results(tiny_run, tmp_path, package, chosen):
    pytest.importorskip(package)
    pytest.importorskip(f"hydra_plugins.hydra_{package}_launcher")
    words = tiny_run("tying=LoRA,TABuv")
    expected = compose_sweep([*words, f"outputs={tmp_path}/expected"])
    for cell in expected.cells:
        run_cell(cell.config)
    ended = FreshCommand("--multirun", *words, *chosen).ended()
    assert ended.code == 0, ended.err
    assert results(compose_sweep(words)) == results(expected)


def test_a_killed_job_of_submitit_fails_alone(tiny_run):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = tiny_run("seed=0,1,2,3", "train.steps=300", "train.log_every=1")
    cells = compose_sweep(words).cells
    command = FreshCommand("--multirun", *words, "hydra/launcher=submitit_slots", "hydra.launcher.jobs_at_once=1")
    killed = {None}
    for _ in range(2):
        # The lock's owner is the job, or for a moment this sweep that looks at the cell's state.
        owner = wait_until(lambda: {lock_owner(cells[0].folder.path / ".lock")} - killed - {command.pid}).pop()
        os.kill(owner, signal.SIGKILL)
        killed.add(owner)
    ended = command.ended()
    assert ended.code == 1, ended.err
    assert [cell.state() for cell in cells] == ["failed", "done", "done", "done"], ended.err


def test_a_slots_device_is_one_of_those_that_the_command_sees():
    assert [visible_device(device, "4,7") for device in (0, "1", 1)] == ["4", "7", "7"]
    assert visible_device(1, "GPU-aa, GPU-bb") == "GPU-bb"
    assert visible_device("GPU-bb", "GPU-aa,GPU-bb") == "GPU-bb"
    assert visible_device(3, None) == "3"
    for device, inherited in ((2, "4,7"), (-1, "4,7"), (0, "")):
        with pytest.raises(
            UserError, match=rf"^hydra.launcher.devices: has {device}, but CUDA_VISIBLE_DEVICES={inherited} "
        ):
            visible_device(device, inherited)
