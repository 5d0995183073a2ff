"""Sweeps with cells in other processes: stopped by signals, killed, and equal to a sweep in one process."""

import multiprocessing.spawn
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from helpers.commands import WITH_TORCH, FreshCommand, wait_until
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from tiedlora.config.compose import VERSION_BASE, register
from tiedlora.config.project import CONF
from tiedlora.config.schema import SLOT_DEVICE
from tiedlora.errors import UserError
from tiedlora.models.device import resolve_device
from tiedlora.records.rows import read_metrics
from tiedlora.runs import run
from tiedlora.sweeps import launchers, launching
from tiedlora.sweeps.cells import SweepCell
from tiedlora.sweeps.expand import compose_sweep
from tiedlora.sweeps.launchers import Slots, launcher_of, visible_device
from tiedlora.sweeps.launching import work


def results(finished: Sequence[SweepCell]) -> dict[str, tuple[bytes, str]]:
    """Adapter and predictions of each cell."""
    by_run = {}
    for cell in finished:
        (tensors,) = cell.folder.adapter.glob("*.safetensors")
        by_run[cell.run_id] = (tensors.read_bytes(), cell.folder.predictions_file("validation").read_text())
    return by_run


def has_checkpoint(cell: SweepCell) -> bool:
    return any(cell.folder.checkpoints.glob("step-*[0-9]"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_save_a_checkpoint_when_their_command_is_stopped_or_killed(tiny_run, number):
    words = tiny_run("seed=0,1,2", "train.steps=100000", "train.validate_every=0", "hydra/launcher=joblib_slots")
    *running, last = compose_sweep(words).cells
    command = FreshCommand("--multirun", *words)
    wait_until(lambda: all(map(has_checkpoint, running)))
    workers = psutil.Process(command.pid).children(recursive=True)
    command.send_signal(number)
    _, left = psutil.wait_procs(workers, timeout=60)
    assert not left
    ended = command.ended()
    assert ended.code == (75 if number == signal.SIGTERM else -signal.SIGKILL), ended.err
    for cell in running:
        assert cell.state() == "interrupted"
        # Saved at the stop, and not only after every second step.
        rows = read_metrics(cell.folder.metrics_file)
        assert cell.folder.checkpoint_step() >= max(row.step for row in rows)
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="finds the worker to kill through Linux's list of locks")
def test_a_killed_joblib_worker_costs_its_cell_one_retry(tiny_run, tmp_path, monkeypatch, capsys, caplog):
    words = tiny_run("seed=0,1", "train.steps=40", "train.validate_every=0")
    swept = compose_sweep(words)
    victim, other = swept.cells
    killed: list[int] = []

    def worker() -> int | None:
        """The process that has taken the victim, and left its mark. The sweep's own one may look at the state."""
        pid = lock_owner(victim.folder.path / ".lock")
        is_marked = swept.control.starts(victim.run_id) > len(killed)
        return pid if is_marked and has_checkpoint(victim) and pid not in (os.getpid(), *killed) else None

    def kill_twice() -> None:
        """Each time after a checkpoint; the first time only when the other process has taken the other cell."""
        while len(killed) < 2:
            pid = wait_until(worker)
            os.kill(pid, signal.SIGSTOP)
            wait_until(other.folder.metrics_file.exists)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    thread = threading.Thread(target=kill_twice)
    thread.start()
    # Forked from a process that has imported torch, which takes longer than all of their work.
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: WITH_TORCH)
    with pytest.raises(SystemExit) as end:
        launching.run_sweep(swept, Slots(2, None))
    thread.join()
    assert end.value.code == 1
    assert [cell.state() for cell in swept.cells] == ["failed", "done"]
    assert caplog.text.count("a worker was killed") == 2
    printed = capsys.readouterr()
    assert "1 of 2 cells failed" in printed.err
    assert f"{victim.run_id}: The worker ended 2 times" in printed.err
    assert "failed" in printed.out
    # Under another launcher it is the same sweep, and this launcher starts no worker.
    caplog.set_level("INFO", "tiedlora")
    launching.run_sweep(swept, work)
    assert "1 finished before, 1 to run" in caplog.text
    assert "continuing from step" in caplog.text

    expected = [SweepCell((), replace(cell.config, outputs=f"{tmp_path}/expected")) for cell in swept.cells]
    for cell in expected:
        run.main(cell.config)
    assert results(swept.cells) == results(expected)


class TestSlots:
    """hydra/launcher=joblib_slots."""

    def test_a_worker_that_cannot_go_on_ends_the_sweep_with_its_error(self, tiny_run):
        swept = compose_sweep(tiny_run("seed=0,1"))
        swept.freeze()
        lost, _ = swept.cells
        (swept.path / "cells" / f"{lost.run_id}.json").unlink()
        with pytest.raises(UserError, match=rf"has ended: UserError: .*{lost.run_id}.json: is missing; the"):
            Slots(2, None)(swept.path, [cell.goal for cell in swept.cells])
        assert not lost.folder.error_file.exists()

    def test_a_worker_whose_process_cannot_start_ends_the_sweep(self, tiny_run, monkeypatch):
        swept = compose_sweep(tiny_run("seed=0"))
        monkeypatch.setattr(multiprocessing.spawn, "_python_exe", b"/bin/false")
        with pytest.raises(UserError, match=r"its process could not start \(exit code 1\)"):
            Slots(1, None)(swept.path, [swept.cells[0].goal])

    def test_each_worker_has_its_device(self, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        devices = [each["CUDA_VISIBLE_DEVICES"] for each in Slots(n_jobs=3, devices=[4, 7]).environments]
        assert devices == ["4", "7", "4"]
        assert Slots(n_jobs=2, devices=None).environments == [{}, {}]

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ({"n_jobs": -1}, r"n_jobs=-1: must be a whole number of at least 1"),
            ({"devices": 1}, r"devices=1: must be a list such as \[0,1\], or null"),
        ],
    )
    def test_a_wrong_number_of_workers_or_devices_is_refused(self, words, says):
        with pytest.raises(UserError, match=rf"^hydra.launcher.{says}"):
            Slots(**{"n_jobs": 2, "devices": None, **words})

    def test_a_worker_with_a_device_does_not_fall_back_to_the_cpu(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        for name, value in Slots(n_jobs=1, devices=[7]).environments[0].items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"^hydra\.launcher\.devices: has 7, and torch finds no such CUDA device"):
            resolve_device("auto")
        assert resolve_device("cpu").type == "cpu"
        monkeypatch.delenv(SLOT_DEVICE)
        assert resolve_device("auto").type == "cpu"

    def test_a_device_is_one_of_those_that_the_command_sees(self):
        assert [visible_device(device, "4,7") for device in (0, "1", 1)] == ["4", "7", "7"]
        assert visible_device(1, "GPU-aa, GPU-bb") == "GPU-bb"
        assert visible_device("GPU-bb", "GPU-aa,GPU-bb") == "GPU-bb"
        assert visible_device(3, None) == "3"
        for device, inherited in ((2, "4,7"), (-1, "4,7"), (0, "")):
            with pytest.raises(
                UserError, match=rf"^hydra.launcher.devices: has {device}, but CUDA_VISIBLE_DEVICES={inherited} "
            ):
                visible_device(device, inherited)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["joblib_slots", "hydra.launcher.n_jobs=many"], r"^hydra.launcher.n_jobs=many: must be a whole number"),
        (["ray_tasks"], r"^hydra/launcher=ray_tasks: ray is not installed; run: pip install 'tiedlora\[ray\]'$"),
        (["slurm"], "^hydra/launcher=slurm and submitit_slots: submitit is not installed"),
        (["joblib_slots", "hydra.launcher._target_=collections.Counter"], "is no launcher of sweeps; choose basic"),
    ],
)
def test_a_launcher_that_cannot_be_used_is_one_line(words, says, monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda package: None)
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF), **VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        words = [f"hydra/launcher={words[0]}", *words[1:]]
        config = loader.load_configuration("config", words, run_mode=RunMode.MULTIRUN)
        with pytest.raises(UserError, match=says):
            launcher_of(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "chosen"),
    [
        ("ray", ["hydra/launcher=ray_tasks", "+hydra.launcher.ray.init.num_cpus=1"]),
        ("submitit", ["hydra/launcher=submitit_slots"]),
    ],
)
def test_a_cluster_gives_the_same_results(tiny_run, tmp_path, package, chosen):
    pytest.importorskip(package)
    words = tiny_run("tying=LoRA,TABuv")
    expected = compose_sweep([*words, f"outputs={tmp_path}/expected"])
    for cell in expected.cells:
        run.main(cell.config)
    ended = FreshCommand("--multirun", *words, *chosen).ended()
    assert ended.code == 0, ended.err
    assert results(compose_sweep(words).cells) == results(expected.cells)


@pytest.mark.slow
def test_a_killed_job_of_submitit_fails_alone(tiny_run):
    pytest.importorskip("submitit")
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
