"""python scripts/sweep.py plan|status|watch|select|drop|retry +grid=paper [words of train.py]: a sweep."""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("sweep", sys.argv[1:])
