"""Faults on purpose: kills, full disks, folders that cannot be written."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from tiedlora import checkpoint, cli, run
from tiedlora.config import PROJECT
from tiedlora.record import RunFolder, run_id
from tiedlora.tasks import metrics  # noqa: F401  (a fork that is short of memory could not import it)


def test_a_run_killed_at_any_moment_resumes_exactly():
    """Ten moments of benchmarks/kill_run.py, which takes any number."""
    done = subprocess.run(
        [sys.executable, str(PROJECT / "benchmarks/kill_run.py"), "--moments", "10"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 resumed exactly" in done.stdout
    for stage in ("start-up", "training", "checkpointing", "scoring", "result"):
        assert stage in done.stdout


def test_half_written_files_and_a_finished_runs_checkpoints_are_tidied(tiny_config):
    config = tiny_config()
    run.main(config)
    folder = RunFolder(Path(config.outputs) / run_id(config))
    (folder.path / ".result.json.77.tmp").write_text("{")
    (folder.path / "predictions" / ".test.jsonl.77.tmp").write_text("{")
    folder.checkpoints.mkdir()
    run.main(tiny_config())
    assert not folder.checkpoints.exists()
    assert not list(folder.path.rglob("*.tmp"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_at_any_write_loses_nothing(tiny_run, tmp_path):
    """One run on file systems of growing size: each ends in a line, and with space goes on to the same result."""
    disk = tmp_path / "disk"
    disk.mkdir()
    overrides = tiny_run(f"outputs={disk}/outputs", "train.validate_every=2")

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(PROJECT / "train.py"), *overrides], capture_output=True, text=True, timeout=120
        )

    def remount(size: str, option: str = "") -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"{option}size={size}", "tmpfs", str(disk)], check=True)

    remount("4m")
    try:
        assert start().returncode == 0
        whole = _content(disk)
        used = sum(f.stat().st_blocks * 512 for f in disk.rglob("*") if f.is_file())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    stopped = 0
    for eighth in (1, 4, 7):
        remount(str(used * eighth // 8 // 4096 * 4096))
        try:
            done = start()
            if done.returncode != 0:
                stopped += 1
                assert done.returncode == 2, done.stderr
                assert "the disk is full" in done.stderr
                assert "Traceback" not in done.stderr
                assert not list(disk.rglob("result.json"))
            remount("4m", "remount,")
            assert start().returncode == 0
            assert _content(disk) == whole
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    assert stopped >= 2


def _content(disk: Path) -> dict[str, object]:
    """Adapter, predictions, and scores of the one run below `disk`."""
    (result,) = disk.rglob("result.json")
    folder = result.parent
    return {
        "scores": {k: v for k, v in json.loads(result.read_text())["scores"]["validation"].items() if k != "seconds"},
        **{
            name: (folder / name).read_bytes()
            for name in ("adapter/adapter.safetensors", "predictions/validation.jsonl")
        },
    }


def test_a_folder_that_cannot_be_written_is_said_in_a_line(tiny_run, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = subprocess.run(
        [sys.executable, str(PROJECT / "train.py"), *tiny_run(f"outputs={tmp_path}/file/outputs")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "file") in done.stderr


def forked(act: Callable[[], object], seconds: int = 60) -> tuple[int, str]:
    """Exit code and standard error of `act` under cli.exits(), in a fork that has imported everything already."""
    with tempfile.TemporaryFile("w+") as told:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(seconds)
                os.dup2(told.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                logging.basicConfig(stream=sys.stderr, level=logging.INFO, force=True)
                with cli.exits():
                    act()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        told.seek(0)
        return os.waitstatus_to_exitcode(status), told.read()


def one_error(told: str) -> str:
    """The one line that says what is wrong."""
    assert "Traceback" not in told, told
    (line,) = (line for line in told.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize(
    ("stage", "lower"), [("training", "train.microbatch_size below 200"), ("scoring", "score.batch_size=500")]
)
def test_too_little_memory_says_what_to_lower_and_leaves_the_checkpoint(tiny_config, monkeypatch, stage, lower):
    """A real limit on the address space, from the first checkpoint or the scoring on."""
    options = ["task.options.rows={train: 400, validation: 500, test: 2}", "score.base=false", "score.batch_size=500"]
    options += ["train.steps=2", "train.checkpoint_every=1", "train.validate_every=0", "train.validation_rows=8"]
    if stage == "training":
        options += ["train.batch_size=200", "score.splits=[]"]
    config = tiny_config(*options)
    folder = RunFolder(Path(config.outputs) / run_id(config))

    def start() -> None:
        save = checkpoint.save

        def save_and_limit(*arguments):
            save(*arguments)
            if arguments[1].step == (1 if stage == "training" else 2):
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**20, -1))

        monkeypatch.setattr(checkpoint, "save", save_and_limit)
        run.main(config)

    code, told = forked(start)
    assert code == 2, told
    line = one_error(told)
    assert "out of memory" in line
    assert lower in line
    assert folder.state() == "failed"
    assert list(folder.checkpoints.glob("step-*"))
    code, told = forked(lambda: run.main(tiny_config(*options, "train.microbatch_size=50")))
    assert code == 0, told
    assert "going on from step" in told
    assert folder.state() == "done"
