"""python scripts/wandb_dashboard.py outputs --entity TEAM [--project tiedlora]: W&B workspaces, one per task.

Pareto, bars, curves by configuration and parallel coordinates, over what runs with tracking=wandb have logged. --json
prints them instead of saving: no account, no network.
"""

import argparse
import json
import os
from pathlib import Path

from tiedlora import errors
from tiedlora.report import wandb_dashboard
from tiedlora.report.runs import read_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, from which tasks and metrics are taken")
    parser.add_argument("--entity", required=True, help="your team or account")
    parser.add_argument("--project", default="tiedlora")
    parser.add_argument("--json", action="store_true", help="print the workspaces instead of saving them")
    arguments = parser.parse_args()
    if arguments.json:
        # In the environment: only then does wandb make no network call at all.
        os.environ["WANDB_MODE"] = "offline"
    runs, _ = read_runs(arguments.runs)
    workspaces = wandb_dashboard.workspaces(runs, arguments.entity, arguments.project)
    if arguments.json:
        print(json.dumps([wandb_dashboard.specification(workspace) for workspace in workspaces], indent=2))
        return
    for workspace in workspaces:
        print(wandb_dashboard.save(workspace))


if __name__ == "__main__":
    with errors.exit_codes():
        main()
