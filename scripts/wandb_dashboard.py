"""python scripts/wandb_dashboard.py outputs --entity TEAM [--project tiedlora]: W&B workspaces and a W&B report.

There is one workspace for each task: a Pareto plot, bars, curves by configuration, and parallel coordinates of the runs
that have logged with tracking=wandb. The W&B report has the verdicts on the claims, and the same panels below them.
--json prints all of this instead of saving it, without account or network.
"""

import argparse
import json
import os
from pathlib import Path

from tiedlora import errors
from tiedlora.page import wandb_dashboard, wandb_report, write

PROJECT = Path(__file__).resolve().parents[1]
CLAIMS = PROJECT / "claims" / "tied_lora.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; they give the tasks and metrics")
    parser.add_argument("--entity", required=True, help="your team or account")
    parser.add_argument("--project", default="tiedlora")
    parser.add_argument("--claims", type=Path, default=CLAIMS, help="a claims file; default claims/tied_lora.yaml")
    parser.add_argument("--no-report", action="store_true", help="only the workspaces")
    parser.add_argument(
        "--json", action="store_true", help="print the workspaces and the report instead of saving them"
    )
    arguments = parser.parse_args()
    if arguments.json:
        # This must be a variable of the environment: only then does wandb make no network call.
        os.environ["WANDB_MODE"] = "offline"
    report = write.build(arguments.runs, claims=arguments.claims)
    entity, project = arguments.entity, arguments.project
    workspaces = wandb_dashboard.workspaces(report.runs, entity, project)
    claims = None if arguments.no_report else wandb_report.claims_report(report, entity, project)
    if arguments.json:
        found = [wandb_dashboard.specification(workspace) for workspace in workspaces]
        print(json.dumps(found + ([wandb_report.specification(claims)] if claims is not None else []), indent=2))
        return
    for workspace in workspaces:
        print(wandb_dashboard.save(workspace))
    if claims is not None:
        print(wandb_report.save(claims))


if __name__ == "__main__":
    with errors.exit_codes():
        main()
