"""python tests/drills/full_disk.py [--moments N]: fill the disk before a write of a run, for each of its writes.

The run of kill_run.py works on a small file system in memory. Before the n-th file is opened for writing, the rest of
that file system is filled (completely, or except for one page, so that a write fails in the middle). Every such run
must end with exit code 2, one line that names a file, and no result.json. Then there is space again, and the same
configuration is started. It must leave the same files as an uninterrupted run, byte for byte as in kill_run.py. The
drill prints a table of the files that were to be written, and exits with 1 if anything differs.

To mount a file system needs root on Linux. Without it, the drill is skipped and ends with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kill_run
import printed

from tiedlora import errors
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


@dataclass
class Writes:
    """Counts openings for writing below `disk`, and fills the disk before one of them."""

    disk: Path
    fill_at: int | None = None
    spare: int = 0
    names: list[str] = field(default_factory=list)

    def install(self) -> None:
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        path = Path(arguments[0])
        if path.is_relative_to(self.disk) and path.name != "filler":
            self.names.append(kind(path))
            if len(self.names) == self.fill_at:
                fill(self.disk, self.spare)


def kind(path: Path) -> str:
    """The path without process ids, steps and digests."""
    if path.name.endswith(".lock"):
        return "a lock"
    if path.parent.name == "base":
        return "base/*.jsonl"
    name = re.sub(r"\.(\d+\.)?tmp$", "", path.name).removeprefix(".")
    parent = re.sub(r"\.[0-9a-f]+\.tmp$", "", path.parent.name).removeprefix(".")
    parent = re.sub(r"-\d{8}$", "", parent)
    return f"{parent}/{name}" if parent in ("step", "best", "adapter", "predictions") else name


def fill(disk: Path, spare: int) -> None:
    free = os.statvfs(disk).f_bavail * PAGE - spare
    if free > 0:
        descriptor = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(descriptor, 0, free)
        os.close(descriptor)


def child(outputs: Path, writes: Writes) -> tuple[int, str, list[str]]:
    """Carry out a run in a fork. Returns its exit code, its standard error, and the files it wrote, in order."""
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as wrote:
        process = os.fork()
        if process == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(told.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            code = 1
            try:
                writes.install()
                with errors.exit_codes():
                    run.main(kill_run.config(outputs))
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stderr.flush()
                wrote.write("\n".join(writes.names))
                wrote.flush()
                os._exit(code)
        _, status = os.waitpid(process, 0)
        told.seek(0)
        wrote.seek(0)
        return os.waitstatus_to_exitcode(status), told.read().strip(), wrote.read().splitlines()


def trial(place: Path, number: int, spare: int, whole: dict[str, Any]) -> tuple[str, list[str]]:
    """The file that was to be written when the disk was full, and a list of what was wrong."""
    with small_disk(place) as disk:
        outputs = disk / "outputs"
        code, told, wrote = child(outputs, Writes(disk, number, spare))
        what, wrong = wrote[number - 1], []
        if code == 2:
            if len(told.splitlines()) != 1 or "the disk is full" not in told or str(disk) not in told:
                wrong.append(f"said {told!r}")
            if list(disk.rglob("result.json")):
                wrong.append("left a result.json")
        elif code != 0:
            wrong.append(f"ended with {code}: {told[-300:]}")
        (disk / "filler").unlink(missing_ok=True)
        code, told, _ = child(outputs, Writes(disk))
        if code != 0:
            wrong.append(f"with space again it ended with {code}: {told[-300:]}")
        else:
            found = kill_run.leftovers(outputs)
            wrong += [f"{key} differs" for key, value in found.items() if value != whole[key]]
    return what, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, help="so many of the writes, spread evenly; all by default")
    parser.add_argument("--from", type=int, default=1, dest="first", help="continue from this write")
    arguments = parser.parse_args()
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
            code, told, wrote = child(disk / "outputs", Writes(disk))
            assert code == 0, told
            whole = kill_run.leftovers(disk / "outputs")
        count = len(wrote)
        chosen = range(arguments.first, count + 1)
        if arguments.moments:
            chosen = [1 + n * (count - 1) // max(1, arguments.moments - 1) for n in range(arguments.moments)]
        print(f"{count} writes in an uninterrupted run; the disk is full before {len(chosen)} of them, in two ways")
        table: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        wrong = []
        for number in chosen:
            for spare in (0, PAGE):
                what, found = trial(root / f"disk-{number}-{spare}", number, spare, whole)
                table[what][0] += 1
                table[what][1] += not found
                wrong += [f"write {number} ({what}), {spare} bytes left: {line}" for line in found]
    rows = [[what, str(tried), str(exact)] for what, (tried, exact) in table.items()]
    print(printed.table(["full before the writing of", "trials", "one line, then the exact result"], rows))
    print("\n".join(wrong) if wrong else f"{2 * len(chosen)} of {2 * len(chosen)} continued to the exact result")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
