"""python scripts/wandb_dashboard.py outputs --entity TEAM [--project tiedlora]: W&B workspaces of finished runs.

There is one workspace for each task: scores against parameters, and W&B's own panels, with runs grouped by
configuration. It shows the runs that have logged with tracking=wandb. --json prints the workspaces instead of saving
them, without account or network.
"""

import json
import os
from pathlib import Path

from tiedlora.analysis.runs import read_runs, run_roots
from tiedlora.commands.parser import Parser, filled
from tiedlora.errors import UserError
from tiedlora.page import wandb_dashboard
from tiedlora.text import is_name


def main(words: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=filled("RUNS", Path), help="folders of runs; they give the tasks and metrics"
    )
    parser.add_argument("--entity", required=True, help="your team or account")
    parser.add_argument("--project", default="tiedlora")
    parser.add_argument("--json", action="store_true", help="print the workspaces instead of saving them")
    arguments = parser.parse_args(words)
    for option in ("entity", "project"):
        if not is_name(name := getattr(arguments, option)) or "/" in name:
            raise UserError(f"--{option} {name!r:.60}: use letters, digits, '.', '_' and '-'")
    if arguments.json:
        # This must be a variable of the environment: only then does wandb make no network call.
        os.environ["WANDB_MODE"] = "offline"
    runs, _ = read_runs(run_roots(arguments.runs))
    workspaces = wandb_dashboard.workspaces(runs, arguments.entity, arguments.project)
    if arguments.json:
        # As they would be sent.
        sent = [workspace._to_model().model_dump(mode="json", by_alias=True) for workspace in workspaces]
        print(json.dumps(sent, indent=2))
        return
    for workspace in workspaces:
        print(wandb_dashboard.save(workspace))
