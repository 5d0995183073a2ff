"""python tests/drills/failing_cells.py [--ways exception ...] [--model smollm2_135m] [--folder /tmp/failing]

It runs eight cells (eight learning rates) in two joblib processes. One cell is made to fail, in one of these ways:

- exception: a file lies where the cell's checkpoints go, so that its first one cannot be saved;
- not_finite: its rate is 100, and nothing clips the gradient;
- killed: kill -9 of its worker after a checkpoint, and again after another one when it is tried once more;
- killed_once: kill -9 of its worker once, which the retry repairs.

The other seven must finish, and the command must end with 1 and name the cell in table and message. When the cause is
repaired, only that cell may be trained, and the files of the other seven results must not change. In the end, all ways
must give the same eight results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kill_sweep import overrides_of_a_short_cell, results

from tiedlora.config.project import PROJECT

RATES = ("1e-3", "2e-3", "3e-3", "5e-3", "7e-3", "1e-2", "2e-2", "3e-2")
VICTIM = 4
"""The failing cell's place among the rates: other cells come before and after it in both processes."""


def overrides(model: str, outputs: Path, rates: tuple[str, ...] = RATES) -> list[str]:
    return [
        *overrides_of_a_short_cell(model, outputs),
        f"train.lr={','.join(rates)}",
        "train.batch_size=2",
        "train.clip=null",
    ]


def sweep(words: list[str], *meanwhile: Callable[[], object]) -> tuple[int, str, str]:
    """Run the sweep in two joblib processes. Returns exit code, output and messages."""
    command = [sys.executable, str(PROJECT / "train.py"), "--multirun", "hydra/launcher=joblib_slots", *words]
    threads = [threading.Thread(target=work, daemon=True) for work in meanwhile]
    for thread in threads:
        thread.start()
    done = subprocess.run(
        [*command, "hydra.launcher.n_jobs=2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def victim(words: list[str], rate: str) -> Path:
    """The failing cell's folder."""
    plan = subprocess.run(
        [sys.executable, str(PROJECT / "scripts/sweep.py"), "plan", "--json", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    (name,) = [cell["run_id"] for cell in json.loads(plan.stdout)["cells"] if cell["lr"] == float(rate)]
    return Path(next(word for word in words if word.startswith("outputs="))[8:]) / name


def kill_workers(folder: Path, times: int) -> None:
    """Send kill -9 to the process that has the run's lock, after each of the first `times` new checkpoints."""
    earlier: set[Path] = set()
    for _ in range(times):
        while not (new := set(folder.glob("checkpoint/step-*[0-9]")) - earlier):
            time.sleep(0.01)
        earlier |= new
        for file in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                if os.readlink(file) == str(folder / ".lock"):
                    os.kill(int(file.parts[2]), signal.SIGKILL)
            except OSError:
                # It has ended in the meantime, or belongs to another user.
                continue


def times_written(outputs: Path) -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in outputs.glob("*/result.json")}


def way(name: str, model: str, outputs: Path) -> list[str]:
    """Fail in one way and repair it. Returns the row of the printed table."""
    rates = list(RATES)
    if name == "not_finite":
        rates[VICTIM] = "100"
    words = overrides(model, outputs, tuple(rates))
    folder = victim(words, rates[VICTIM])
    if name == "exception":
        folder.mkdir(parents=True)
        (folder / "checkpoint").write_text("in the way")
    kills = {"killed": 2, "killed_once": 1}.get(name, 0)
    code, out, err = sweep(words, *([lambda: kill_workers(folder, kills)] if kills else []))
    assert err.count("its worker was killed") == kills, err
    before = times_written(outputs)
    if name == "killed_once":
        assert (code, len(before)) == (0, 8), err
        assert "continuing from step" in err
        return [name, str(code), "8", "its retry continued from the checkpoint", ""]

    assert code == 1, err
    assert len(before) == 7, sorted(before)
    assert folder.name not in before
    failed = [line for line in out.splitlines() if " failed " in line and f" {float(rates[VICTIM]):g} " in line]
    assert len(failed) == 1, out
    (reason,) = [line for line in err.split("1 of 8 cells failed")[1].splitlines() if folder.name in line]
    assert (folder / "error.txt").read_text().strip()

    if name == "exception":
        (folder / "checkpoint").unlink()
    code, _, err = sweep(overrides(model, outputs))
    assert code == 0, err
    assert "8 cells, 7 finished before, 1 to run" in err, err
    after = times_written(outputs)
    assert len(after) == 8
    assert before.items() <= after.items()
    if name == "killed":
        assert "continuing from step" in err
    error = reason.split(": ", 1)[1]
    return [name, "1", "7", error if len(error) < 70 else error[:67] + "...", f"{len(after) - len(before)}"]


WAYS = ("exception", "not_finite", "killed", "killed_once")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--folder", type=Path, help="where the sweeps go; a new temporary folder if left out")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="failing-cells-"))
    print("way          exit  others done  trained after repair  error")
    for name in arguments.ways:
        way_name, code, others, error, trained = way(name, arguments.model, folder / name)
        print(f"{way_name:<12} {code:<5} {others:<12} {trained:<21} {error}", flush=True)
    done = [results(folder / name) for name in WAYS if (folder / name).exists()]
    assert all(len(by_run) == 8 and by_run == done[0] for by_run in done)
    print(f"the same eight results {len(done)} times, adapters bit-identical")


if __name__ == "__main__":
    main()
