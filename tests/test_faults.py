"""Faults on purpose: kills, full disks, folders that cannot be written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiedlora import run
from tiedlora.config import PROJECT
from tiedlora.record import RunFolder, run_id


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
