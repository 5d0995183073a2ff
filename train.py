"""python train.py [tying=TABuv] [task=gsm8k] [rank=r8] [train.lr=3e-3] ...: one run; with --multirun, many runs."""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("train", sys.argv[1:])
