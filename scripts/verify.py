"""python scripts/verify.py RUN: is a finished run what its record says, and do its numbers come out again?

Checks the configuration, the data, adapter and base by their hashes, recomputes the scores from predictions/, and
regenerates a sample from the adapter. Exit code 0: everything that was checked agrees; 3: something does not.
"""

import argparse
import os
from pathlib import Path

from tiedlora import errors
from tiedlora.runs import verify

DISAGREES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--data-root", default=os.environ.get("TIEDLORA_DATA"), help="as data_root= of train.py")
    parser.add_argument("--rows", type=int, default=32, help="predictions a split to regenerate at least; 0 for none")
    parser.add_argument("--cache", type=Path, default=os.environ.get("TIEDLORA_CACHE"), help="as cache= of train.py")
    arguments = parser.parse_args()
    found = verify.verify(arguments.run, data_root=arguments.data_root, rows=arguments.rows, cache=arguments.cache)
    for line in verify.lines(found):
        print(line)
    if any(finding.ok is False for finding in found):
        raise SystemExit(DISAGREES)


if __name__ == "__main__":
    with errors.exit_codes():
        main()
