"""python scripts/generate.py RUN [--prompt TEXT ...]: try a finished run, with base and adapted model side by side."""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("generate", sys.argv[1:])
