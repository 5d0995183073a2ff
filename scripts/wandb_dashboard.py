"""python scripts/wandb_dashboard.py outputs --entity TEAM [--project tiedlora]: W&B workspaces of finished runs."""

import sys

from tiedlora.__main__ import start

if __name__ == "__main__":
    start("wandb_dashboard", sys.argv[1:])
