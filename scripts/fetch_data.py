"""python scripts/fetch_data.py task=gsm8k data_root=FOLDER: download a task's rows from the hub into local files."""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("fetch_data", sys.argv[1:])
