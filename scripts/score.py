"""python scripts/score.py RUN --split test: score more of a finished run, without changing what it has."""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("score", sys.argv[1:])
