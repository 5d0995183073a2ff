"""Sweeps with cells in other processes: stopped by signals, killed, and equal to a sweep in one process."""

import signal
from collections.abc import Sequence
from contextlib import closing, nullcontext
from multiprocessing import Pipe, active_children
from types import SimpleNamespace

import psutil
import pytest
from helpers.commands import FreshCommand, wait_until
from helpers.sweeping import compose_sweep
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from tiedlora.config.compose import VERSION_BASE, register
from tiedlora.config.schema import SLOT_DEVICE
from tiedlora.errors import UserError
from tiedlora.models.device import resolve_device
from tiedlora.places import CONF
from tiedlora.records.rows import read_metrics
from tiedlora.records.scores import read_scores
from tiedlora.runs import run
from tiedlora.sweeps import launchers
from tiedlora.sweeps.cells import Goal, Sweep, SweepCell
from tiedlora.sweeps.launchers import Slots, launcher_of


def results(finished: Sequence[SweepCell]) -> dict[str, tuple[dict[str, str], str]]:
    """The sha256 of the files of the adapter and of the rows of answers of each cell."""
    return {
        cell.run_id: (
            cell.folder.finished_record().files,
            read_scores(cell.folder.scores_file("validation", "answers")).record.rows_sha256,
        )
        for cell in finished
    }


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


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_costs_its_cell_one_retry(tiny_run):
    words = tiny_run("train.steps=100000,6", "train.validate_every=0")
    victim, other = (swept := compose_sweep(words)).cells
    command = FreshCommand("--multirun", *words, "hydra/launcher=joblib_slots", "hydra.launcher.n_jobs=1")
    for killed in (0, 1):
        wait_until(lambda killed=killed: swept.control.starts(victim.run_id) > killed and has_checkpoint(victim))
        children = psutil.Process(command.pid).children()
        (worker,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        worker.kill()
    ended = command.ended()
    assert ended.code == 1
    assert (victim.state(), other.state()) == ("failed", "done")
    assert ended.err.count("a worker was killed") == 2
    assert f"{victim.run_id}: The worker ended 2 times" in ended.err


class TestSlots:
    """hydra/launcher=joblib_slots."""

    def test_a_worker_that_cannot_go_on_says_why_and_ends_the_sweep(self, tiny_run, capfd):
        swept = compose_sweep(tiny_run("seed=0,1"))
        swept.freeze()
        lost, _ = swept.cells
        (swept.path / "cells" / f"{lost.run_id}.json").unlink()
        with pytest.raises(UserError, match=r"^a worker of .*=joblib_slots has ended with exit code 2, for the reason"):
            Slots(2, None)(swept.path, [cell.goal for cell in swept.cells])
        assert f"{lost.run_id}.json: is missing" in capfd.readouterr().err
        assert not lost.folder.error_file.exists()

    @pytest.mark.parametrize(
        ("codes", "warnings", "error"),
        [
            # As after an OSError ESTALE of a network file system, which is gone a moment later; then a kill.
            (
                [1, -9, None],
                ["a worker has ended with exit code 1, for the reason above,", "a worker was killed,"],
                None,
            ),
            ([1, 1, 1], ["exit code 1, for the reason above,"] * 2, "exit code 1, "),
            ([2], [], "exit code 2, "),
        ],
    )
    def test_a_worker_is_replaced_unless_a_mistake_has_ended_it(
        self, codes, warnings, error, tmp_path, monkeypatch, caplog
    ):
        left = list(codes)

        class Worker:
            """Has ended, or has done its work, as soon as it has some."""

            def __init__(self, environment):
                self.environment, self.code = environment, left.pop(0)
                self.channel, self._other = Pipe()
                self._other.send("done")
                self.process = SimpleNamespace(is_alive=lambda: True, terminate=lambda: None, join=lambda: None)

            def ended(self):
                return self.code

        monkeypatch.setattr(launchers, "_Worker", Worker)
        with pytest.raises(UserError, match=error) if error else nullcontext():
            Slots(1, None)(tmp_path, [Goal("run", None, ())])
        assert (left, len(caplog.messages)) == ([], len(warnings))
        assert all(warning in said for warning, said in zip(warnings, caplog.messages, strict=True))

    def test_workers_stay_for_the_next_stage_and_end_with_the_sweep(self, finished_run):
        """Each stage of a search is a call. A new worker would import torch and load the base model again."""
        swept = Sweep("sweep", [SweepCell((), finished_run("seed=0")), SweepCell((), finished_run("seed=1"))])
        swept.freeze()
        swept.control.start(fail_fast=False)
        goals, pids = [cell.goal for cell in swept.cells], []
        with closing(Slots(2, None)) as launch:
            for stage in (goals[:1], goals, goals[1:], goals):
                launch(swept.path, stage)
                pids.append({child.pid for child in active_children()})
            assert (len(pids[0]), len(pids[1])) == (1, 2)
            assert pids[0] < pids[1] == pids[2] == pids[3]
            # One that is killed between two stages has a successor.
            (victim, *_) = active_children()
            victim.kill()
            victim.join()
            launch(swept.path, goals)
            now = {child.pid for child in active_children()}
            assert (len(now), len(now & pids[1]), victim.pid in now) == (2, 1, False)
        assert active_children() == []

    def test_each_worker_has_its_device(self, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        devices = [each["CUDA_VISIBLE_DEVICES"] for each in Slots(n_jobs=3, devices=["4", "7"]).environments]
        assert devices == ["4", "7", "4"]
        assert Slots(n_jobs=2, devices=None).environments == [{}, {}]

    def test_a_worker_with_a_device_does_not_fall_back_to_the_cpu(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        # Empty for the tests where torch is built for CUDA.
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in Slots(n_jobs=1, devices=["7"]).environments[0].items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"^hydra\.launcher\.devices: has 7, and torch finds no such CUDA device"):
            resolve_device("auto")
        assert resolve_device("cpu").type == "cpu"
        monkeypatch.delenv(SLOT_DEVICE)
        assert resolve_device("auto").type == "cpu"

    def test_a_device_is_one_of_those_that_the_command_sees(self, monkeypatch):
        def visible(device, inherited: str) -> str:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
            return Slots(1, [str(device)]).environments[0]["CUDA_VISIBLE_DEVICES"]

        assert [visible(device, "4,7") for device in (0, 1)] == ["4", "7"]
        assert visible(1, "GPU-aa, GPU-bb") == "GPU-bb"
        assert visible("GPU-bb", "GPU-aa,GPU-bb") == "GPU-bb"
        for device, inherited in ((2, "4,7"), (0, "")):
            with pytest.raises(
                UserError, match=rf"^hydra.launcher.devices: has {device}, but CUDA_VISIBLE_DEVICES={inherited} "
            ):
                visible(device, inherited)

    @pytest.mark.parametrize("device", ["-1", ""])
    def test_no_device_is_refused_before_a_cell_fails_on_it(self, monkeypatch, device):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with pytest.raises(UserError, match=f"^hydra.launcher.devices: has '{device}'; give numbers from 0"):
            Slots(1, [device])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["joblib_slots", "hydra.launcher.n_jobs=1000000000"], "n_jobs=1000000000: must be less than or equal to 256"),
        (["joblib_slots", "hydra.launcher.n_jobs=-1"], "^hydra.launcher.n_jobs=-1: must be greater than or equal to 1"),
        (["joblib_slots", "hydra.launcher.devices=[0,1,2]"], "devices: has 3 devices for 2 workers; set hydra."),
        (["joblib_slots", "+hydra.launcher.n_job=1"], r"^hydra.launcher.n_job: unknown key \(did you mean n_jobs\?\)"),
        (["ray_tasks"], r"^hydra/launcher=ray_tasks: ray is not installed; run: pip install 'tiedlora\[ray\]'$"),
        (["slurm"], "^hydra/launcher=slurm or submitit_slots: submitit is not installed"),
        (["joblib_slots", "hydra.launcher._target_=collections.Counter"], "is no launcher of sweeps; choose basic"),
        (["joblib_slots", "hydra.launcher._target_=elsewhere.Slots"], "is no launcher of sweeps; choose basic"),
    ],
)
def test_a_launcher_that_cannot_be_used_is_one_line(words, says, monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda _package: None)
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
