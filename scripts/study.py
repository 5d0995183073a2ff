"""python scripts/study.py WHAT studies/NAME: a planned comparison, and its records."""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("study", sys.argv[1:])
