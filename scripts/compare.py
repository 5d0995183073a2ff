"""python scripts/compare.py A B: is B better than A, and how sure?"""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("compare", sys.argv[1:])
