"""python scripts/verify.py RUN: does a finished run agree with its record, and can its numbers be reproduced?"""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("verify", sys.argv[1:])
