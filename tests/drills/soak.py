"""python tests/drills/soak.py [--runs 300]: many runs in one process, as in a sweep; memory and files must not grow.

Each run is a new one on a tiny random model, with another seed and the next option of tying. After each run, the drill
reads the process's resident memory, open files and threads, and the size and files of the run's folder. It prints the
medians of the first third and of the last third, and exits with 1 if one of them grew by more than 5 %.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

import kill_run
import pandas as pd

from tiedlora.config.identity import run_id
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run
from tiedlora.tying import NAMES

LIMIT = 1.05
WHAT = ("resident memory, MB", "open files", "threads", "run folder, kB", "files in it", "files left beside it")


def one(number: int, root: Path, more: list[str]) -> list[float]:
    """Carry out a run. Returns the values that WHAT names, measured after it."""
    words = [f"tying={NAMES[number % len(NAMES)]}", f"seed={number}", f"cache={root}/cache", "train.steps=3", *more]
    config = kill_run.config(root / "outputs", *words)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        run.main(config)
    folder = RunFolder(Path(config.outputs) / run_id(config))
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    places = ("outputs", "base", "cache", root.name)
    beside = sum(1 for path in root.rglob("*") if path.is_file() and path.parent.name in places)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    listed = [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]
    return [resident / 1e6, *listed, sum(path.stat().st_size for path in files) / 1e3, len(files), beside]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("overrides", nargs="*", help="more of train.py's, such as tracking=wandb")
    arguments = parser.parse_args()
    third = arguments.runs // 3
    if third < 1:
        sys.exit("--runs: at least 3")
    with tempfile.TemporaryDirectory() as temporary:
        found = [one(number, Path(temporary), arguments.overrides) for number in range(arguments.runs)]
    values = pd.DataFrame(found, columns=WHAT)
    first, last = values.head(third).median(), values.tail(third).median()
    summary = {f"median of the first {third}": first, f"of the last {third}": last, "most": values.max()}
    print(pd.DataFrame({**summary, "growth": last / first - 1}).round(3).to_string())
    grown = [name for name in WHAT if last[name] > LIMIT * first[name]]
    print(f"{arguments.runs} runs; grew by more than 5 %: {', '.join(grown) or 'nothing'}")
    return 1 if grown else 0


if __name__ == "__main__":
    raise SystemExit(main())
