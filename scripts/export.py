"""python scripts/export.py RUN --to peft|merged|hub-card [--out FOLDER]: export a finished run for other programs."""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("export", sys.argv[1:])
