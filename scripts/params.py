"""python scripts/params.py [model=llama2_7b] [rank=r8] [tying=TABuv] [budget=46080]: trainable parameters."""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("params", sys.argv[1:])
