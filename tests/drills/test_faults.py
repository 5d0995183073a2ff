"""Deliberate faults: kills, full disks, folders that cannot be written to."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import drilling
import pytest
import torch
import wandb
from helpers import processes
from helpers.forks import forked, killed_after
from helpers.hostile import snapshot
from helpers.task_rows import write
from helpers.tiny import folder_of, losses_of, rows_of, score_more
from safetensors.torch import save_file

from tiedlora.config.compose import compose_config
from tiedlora.places import PROJECT
from tiedlora.records.rows import AppendedFile, read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_scores
from tiedlora.runs import run
from tiedlora.sweeps.cells import Sweep, SweepCell
from tiedlora.sweeps.launching import run_sweep, work
from tiedlora.tasks import task_metric  # noqa: F401  (a fork that is short of memory could not import it)
from tiedlora.training import checkpoint


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_run_killed_at_any_moment_resumes_exactly():
    """tests/drills/kill_run.py with ten moments."""
    done = processes.run_python(PROJECT / "tests/drills/kill_run.py", "--moments", "10", seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 resumed exactly" in done.stdout
    (kinds,) = re.findall("^killed before: (.*)$", done.stdout, re.MULTILINE)
    assert len(kinds.split(", ")) >= 3, "passes, steps, flushes: the moments are spread over the run"


def files_of_scores(outputs: Path) -> dict[str, str]:
    """Path in outputs/ -> the sha256 of its rows, of every file of scores. Each must be whole."""
    paths = [*outputs.glob("*/scores/*.jsonl"), *outputs.glob("base/*.jsonl")]
    return {str(path.relative_to(outputs)): read_scores(path).record.rows_sha256 for path in paths}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_while_scores_are_added_leaves_no_file_or_a_whole_one(finished_run, tmp_path):
    """Killed before 20 events at random: a pass of the model, a flush or a rename of a file."""
    done = folder_of(finished_run("score.metrics=[exact_match_strict]")).path

    def start(outputs: Path, kill_at: str = "") -> tuple[int, list[str]]:
        """Add the losses of validation, and both of test, in a fork."""

        def act() -> None:
            drilling.Events(outputs / "journal", kill_at).install()
            score_more(RunFolder(outputs / done.name), splits=["validation", "test"], metrics=None)

        return forked(act)[0], (outputs / "journal").read_text().splitlines()

    before = snapshot(shutil.copytree(done.parent, tmp_path / "whole"))
    code, journal = start(tmp_path / "whole")
    assert code == 0
    expected = files_of_scores(tmp_path / "whole")
    assert len([name for name in expected if name not in before]) == 6, "of the adapter and of the base model"
    counts = set()
    for kill_at in random.Random(0).sample(range(1, len(journal) + 1), 20):
        outputs = shutil.copytree(done.parent, tmp_path / str(kill_at))
        assert start(outputs, f"any {kill_at}")[0] == -signal.SIGKILL
        after = snapshot(outputs)
        assert {name: after[name] for name in before} == before, f"killed before event {kill_at}"
        left = files_of_scores(outputs)
        assert left.items() <= expected.items(), f"killed before event {kill_at}"
        counts.add(len(left))
        assert start(outputs)[0] == 0
        assert files_of_scores(outputs) == expected
    assert len(counts) > 3, "the moments are spread over the files"


def test_half_written_files_and_a_finished_runs_checkpoints_are_tidied(tiny_config, finished_run):
    config = finished_run()
    folder = folder_of(config)
    (folder.path / ".result.json.77.tmp").write_text("{")
    (folder.scores / ".test.answers.jsonl.77.tmp").write_text("{")
    folder.checkpoints.mkdir()
    run.main(tiny_config())
    assert not folder.checkpoints.exists()
    assert not list(folder.path.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_at_any_write_loses_nothing():
    """tests/drills/full_disk.py with eight writes. (By default it takes all of them.)"""
    done = processes.run_python(PROJECT / "tests/drills/full_disk.py", "--moments", "8", seconds=600)
    if "skipped" in done.stdout:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 of 16 continued to the exact result" in done.stdout


def test_a_folder_that_cannot_be_written_is_said_in_a_line(tiny_run, tmp_path, script):
    (tmp_path / "file").write_text("not a folder")
    code, _, err = script("train.py", *tiny_run(f"outputs={tmp_path}/file/outputs"))
    assert code == 2
    assert str(tmp_path / "file") in one_error(err)
    code, _, err = script("train.py", *tiny_run("outputs=/proc/outputs"))
    assert (code, one_error(err).startswith("error: /proc/outputs: no folder can be made there")) == (2, True)


def tensors(folder: RunFolder) -> bytes:
    return (folder.adapter / "adapter.safetensors").read_bytes()


def one_error(told: str) -> str:
    """The one line that says what is wrong."""
    assert "Traceback" not in told, told
    (line,) = (line for line in told.splitlines() if line.startswith("error: "))
    return line


def address_space() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.mark.parametrize("stage", ["training", "scoring"])
def test_too_little_memory_halves_the_passes_or_the_batches(tiny_config, monkeypatch, stage):
    """Set a real limit on the address space, from the first checkpoint or from scoring on."""
    options = ["task.options.rows={train: 400, validation: 500, test: 2}", "score.batch_size=500"]
    options += ["train.steps=2", "train.checkpoint_every=1", "train.validate_every=0", "train.validation_rows=8"]
    if stage == "training":
        options += ["train.batch_size=200", "train.microbatch_tokens=null", "score.splits=[]"]
    config = tiny_config(*options)
    folder = folder_of(config)

    def start() -> None:
        save, kept = checkpoint.save, []

        def save_and_limit(*arguments, **named):
            save(*arguments, **named)
            if arguments[1].step == (1 if stage == "training" else 2) and not kept:
                # The process keeps what it has freed, and so do the tests before this one: use that up first.
                before = address_space()
                while address_space() == before:
                    kept.append(torch.empty(2**18))
                resource.setrlimit(resource.RLIMIT_AS, (address_space() + 2**24, -1))

        monkeypatch.setattr(checkpoint, "save", save_and_limit)
        run.main(config)

    code, told = forked(start)
    assert code == 0, told
    assert "out of memory" in told
    assert "Traceback" not in told
    record = folder.finished_record()
    if stage == "training":
        assert {halving.step for halving in record.training.halvings} == {2}
        # The steps differ in tokens, so the limit is compared with the second step's own.
        tokens = {row.step: row.values["train/tokens"] for row in read_metrics(folder.metrics_file, "train/tokens")}
        assert record.training.halvings[-1].tokens <= (tokens[2] - tokens[1]) / 2, "half of the step, or less"
    else:
        assert read_scores(folder.scores_file("validation", "answers")).record.batch_halvings > 0
        assert record.training.halvings is None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root, and root may write anywhere else")
def test_a_read_only_file_system_is_said_and_what_is_finished_there_is_printed(tiny_config, finish, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    config = tiny_config(f"outputs={disk}/outputs")
    unfinished = tiny_config(f"outputs={disk}/outputs", "seed=1")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        finish(config)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, told = forked(lambda: run.main(unfinished))
        assert code == 2
        assert f"{disk}/outputs" in one_error(told)
        assert "read-only" in one_error(told)
        code, told = forked(lambda: run.main(config))
        assert code == 0, told
        code, told = forked(lambda: run_sweep(Sweep("sweep", [SweepCell((), config)]), work))
        assert code == 0, told
        code, told = forked(lambda: run_sweep(Sweep("sweep", [SweepCell((), unfinished)]), work))
        assert code == 2
        assert "read-only" in one_error(told)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_data_that_vanish_between_start_and_resume_are_named_and_brought_back_it_goes_on(tiny_run, tmp_path):
    rows = [{"question": f"What is {i}?", "answer": f"{i}\n#### {i}"} for i in range(30)]
    data = write(tmp_path / "data", "gsm8k", *rows, split="train")
    options = tiny_run("task.validation_from_train=8", f"data_root={tmp_path}/data", task="gsm8k")
    config, whole = compose_config(options), compose_config([*options, f"outputs={tmp_path}/whole"])
    folder, expected = map(folder_of, (config, whole))
    run.main(whole)
    killed_after(lambda: run.main(config), lambda state: state.step == 4)
    before = sorted(folder.path.rglob("*"))
    data.rename(data.with_suffix(".away"))
    code, told = forked(lambda: run.main(config))
    assert code == 2, told
    assert str(data) in one_error(told)
    assert sorted(folder.path.rglob("*")) == before
    data.with_suffix(".away").rename(data)
    code, told = forked(lambda: run.main(config))
    assert code == 0, told
    assert "continuing from step 4" in told
    assert tensors(folder) == tensors(expected)
    assert rows_of(folder, "validation") == rows_of(expected, "validation")


def test_two_processes_in_one_folder(tiny_config, finish, tmp_path):
    """While another process has the lock, a run is refused in one line, and no file changes. Two processes that start
    together give one result, the exact one."""
    config, whole = tiny_config(), tiny_config(f"outputs={tmp_path}/whole")
    folder, expected = map(folder_of, (config, whole))
    finish(whole)
    with folder.locked():
        code, told = forked(lambda: run.main(config))
        assert code == 2, told
        assert "another process is working on this run" in one_error(told)
        assert [path.name for path in folder.path.iterdir()] == [".lock"]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(forked, lambda: run.main(config)) for _ in range(2)]
    codes = sorted(one.result()[0] for one in both)
    assert codes in ([0, 0], [0, 2])
    assert tensors(folder) == tensors(expected)
    assert rows_of(folder, "validation") == rows_of(expected, "validation")


CUT_OFF = """
import sys, time
time.sleep = lambda seconds: None  # The hub's client waits between its tries, a minute in all.
from tiedlora import errors
from tiedlora.config.compose import compose_config
from tiedlora.runs import run
for more in (["model=qwen2_5_0_5b", "task=chain_sum"], ["model=tiny_llama", "task=gsm8k"]):
    try:
        with errors.exit_codes():
            run.main(compose_config([*more, f"outputs={sys.argv[1]}/outputs", f"cache={sys.argv[1]}/cache"]))
    except SystemExit as end:
        print(end.code)
"""


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_a_line_with_the_ways_round(tmp_path):
    """The network is on, but no server answers: first for a model, then for rows."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": f"{tmp_path}/hf"}
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    done = processes.run_python("-c", CUT_OFF, tmp_path, env=environment)
    assert done.stdout.split() == ["2", "2"], done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    model, rows = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "cannot be loaded" in model
    assert "model.path=FOLDER" in model
    assert "data_root=FOLDER" in rows
    assert not (tmp_path / "outputs").exists()


def wandb_processes() -> list[int]:
    """Of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(child) for child in children if "wandb" in Path(f"/proc/{child}/comm").read_text()]


@pytest.mark.slow
class TestWandb:
    """After any failure of W&B, the run ends normally, and its own record is complete."""

    def finished(self, config) -> None:
        folder = folder_of(config)
        assert folder.state() == "done"
        assert list(losses_of(folder)) == list(range(1, 7))

    def test_its_process_killed_in_mid_run_is_one_warning_and_the_next_run_has_a_new_one(self, tiny_config):
        config, following = (tiny_config("tracking=wandb", "train.log_every=1", f"seed={seed}") for seed in (0, 1))
        # A helper process that an earlier test started would be inherited, and is not this test's to kill.
        wandb.teardown()

        def start() -> None:
            append = AppendedFile.append

            def log_and_kill(self, rows):
                if config.seed == 0 and rows[0].step == 3:
                    for child in wandb_processes():
                        os.kill(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                append(self, rows)

            AppendedFile.append = log_and_kill
            run.main(config)
            assert not wandb_processes()
            AppendedFile.append = append
            run.main(following)
            wandb.teardown()

        code, told = forked(start)
        assert code == 0, told
        assert len([line for line in told.splitlines() if "W&B has failed" in line]) == 1, told
        assert "Traceback" not in told
        self.finished(config)
        self.finished(following)

    def test_a_server_that_cannot_be_reached_is_one_warning_and_no_hang(self, tiny_config, monkeypatch):
        config = tiny_config("tracking=wandb")
        environment = {"MODE": "online", "BASE_URL": "http://127.0.0.1:9", "API_KEY": "0" * 40, "INIT_TIMEOUT": "3"}
        for name, value in environment.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        code, told = forked(lambda: (run.main(config), wandb.teardown()), seconds=60)
        assert code == 0, told
        assert len([line for line in told.splitlines() if "W&B cannot be reached" in line]) == 1, told
        assert "Traceback" not in told
        self.finished(config)
        assert list((folder_of(config).path / "wandb").glob("offline-run-*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_a_library_in_rust_finds_full_is_said_in_a_line(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        code, told = forked(lambda: save_file({"x": torch.zeros(100_000)}, tmp_path / "x.safetensors"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert (code, "the disk is full; make space" in one_error(told)) == (2, True)
