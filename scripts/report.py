"""python scripts/report.py outputs --out report: finished runs -> tables, intervals, figures, claims, one page."""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("report", sys.argv[1:])
