"""python tests/drills/full_disk.py [--moments N]: fill the disk before a write of a run, for each of its writes.

The run of kill_run.py works on a small file system in memory. Before the n-th file is opened for writing, the rest of
that file system is filled (completely, or except for one page, so that a write fails in the middle). Every such run
must end with exit code 2, one line that names a file, and no result.json. Then there is space again, and the same
configuration is started. It must leave the same files as an uninterrupted run. The drill exits with 1 if anything
differs.

To mount a file system needs root on Linux. Without it, the drill is skipped and ends with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import drilling
import kill_run

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.forks import forked

from tiedlora.runs import run

SIZE = 4 * 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, spare: int) -> None:
    free = os.statvfs(disk).f_bavail * PAGE - spare
    if free > 0:
        descriptor = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(descriptor, 0, free)
        os.close(descriptor)


def child(disk: Path, journal: Path, fill_at: int | None = None, spare: int = 0) -> tuple[int, str, list[str]]:
    """Carry out the run in a fork, and fill the disk before a write. Returns exit code, messages, and what it wrote."""

    def act() -> None:
        count, file = 0, os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def before_write(path: Path) -> None:
            nonlocal count
            if path.is_relative_to(disk) and path.name != "filler":
                count += 1
                os.write(file, f"{drilling.kind(path)}\n".encode())
                if count == fill_at:
                    fill(disk, spare)

        # safetensors writes without Python, but into files that were created before.
        def hook(event: str, words: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(words[0], str) and words[2] & (os.O_WRONLY | os.O_RDWR):
                before_write(Path(words[0]))

        sys.addaudithook(hook)
        run.main(kill_run.config(disk / "outputs"))

    code, told = forked(act, seconds=120)
    return code, told.strip(), journal.read_text().splitlines()


def trial(place: Path, number: int, spare: int, whole: dict[str, Any]) -> tuple[str, list[str]]:
    """The file that was to be written when the disk was full, and a list of what was wrong."""
    with small_disk(place) as disk:
        code, told, wrote = child(disk, place.with_suffix(".full"), number, spare)
        wrong, errors = [], [line for line in told.splitlines() if line.startswith("error: ")]
        if code == 2:
            if len(errors) != 1 or "the disk is full" not in told or str(disk) not in told or "Traceback" in told:
                wrong.append(f"said {told!r}")
            if list(disk.rglob("result.json")):
                wrong.append("left a result.json")
        elif code != 0:
            wrong.append(f"ended with {code}: {told[-300:]}")
        (disk / "filler").unlink(missing_ok=True)
        code, told, _ = child(disk, place.with_suffix(".again"))
        if code != 0:
            wrong.append(f"with space again it ended with {code}: {told[-300:]}")
        else:
            found = drilling.differences(kill_run.folder(disk / "outputs"), whole)
            wrong += [f"{name} differs" for name in found]
    return wrote[number - 1], wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, help="so many of the writes, spread evenly; all by default")
    arguments = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        try:
            with small_disk(root / "try"):
                pass
        except (OSError, subprocess.CalledProcessError):
            print("skipped: mounting a small file system needs root on Linux")
            return 0
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            run.main(kill_run.config(root / "warm"))
        with small_disk(root / "whole") as disk:
            code, told, wrote = child(disk, root / "whole.journal")
            assert code == 0, told
            whole = drilling.left_by(kill_run.folder(disk / "outputs"))
        count = len(wrote)
        moments = arguments.moments or count
        chosen = [1 + n * (count - 1) // max(1, moments - 1) for n in range(moments)]
        print(f"{count} writes in an uninterrupted run; the disk is full before {len(chosen)} of them, in two ways")
        for number in chosen:
            for spare in (0, PAGE):
                what, found = trial(root / f"disk-{number}-{spare}", number, spare, whole)
                wrong += [f"write {number} ({what}), {spare} bytes left: {line}" for line in found]
    print("\n".join(wrong) if wrong else f"{2 * len(chosen)} of {2 * len(chosen)} continued to the exact result")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
