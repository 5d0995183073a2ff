"""python scripts/sweep.py plan|status|select +grid=paper [words of train.py]: a sweep before, while and after it runs.

plan shows every cell and its state, and which claims the sweep can decide. status shows counts and the time left in one
line, and then the unfinished cells. select chooses each configuration's learning rate on validation, and scores test
only for the chosen runs.
"""

import argparse
import logging

from tiedlora import errors
from tiedlora.config.project import PROJECT
from tiedlora.records.selection import write_selection
from tiedlora.report import claims, planning
from tiedlora.statistics.rate_choice import CRITERIA
from tiedlora.sweeps import selection, status
from tiedlora.sweeps.cells import Sweep
from tiedlora.sweeps.expand import compose_sweep

GSM8K_TEST_ROWS = 1319
"""The number of test rows in a plan if the task's YAML does not limit them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("plan", "status", "select"))
    parser.add_argument(
        "words", nargs="*", help="the words after `train.py --multirun`; the same words are the same sweep"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--by",
        choices=CRITERIA,
        help="select: the task's first metric, or the loss; by default the metric if every run has it",
    )
    parser.add_argument("--no-test", action="store_true", help="select: choose only, and leave test for later")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("tiedlora").setLevel(logging.INFO)
    sweep = compose_sweep(arguments.words)
    if arguments.what == "select":
        select(sweep, by=arguments.by, test=not arguments.no_test, json=arguments.json)
    else:
        show(sweep, plan=arguments.what == "plan", json=arguments.json)


def select(sweep: Sweep, by: str | None, test: bool, json: bool) -> None:
    chosen = selection.select_rates(sweep, by)
    if test:
        chosen = selection.score_test(sweep, chosen)
    write_selection(selection.selection_file(sweep), chosen)
    print(selection.to_json(chosen.choices) if json else selection.table(chosen.choices))


def show(sweep: Sweep, plan: bool, json: bool) -> None:
    cells = status.statuses(sweep)
    if json:
        print(status.to_json(sweep, cells))
    elif plan:
        print(f"{status.table(cells)}\n\n{status.summary_line(sweep, cells)}\n")
        print("\n".join(decidable_claims(sweep)))
    else:
        print("\n".join([status.summary_line(sweep, cells), *status.unfinished_lines(cells)]))


def decidable_claims(sweep: Sweep) -> list[str]:
    """Which of the paper's claims the sweep's seeds and test rows can decide, before the sweep is run."""
    seeds = len({cell.config.seed for cell in sweep.cells})
    rows = min(cell.config.task.rows.test or GSM8K_TEST_ROWS for cell in sweep.cells)
    return planning.plan(claims.read(PROJECT / "claims/tied_lora.yaml"), seeds, rows)


if __name__ == "__main__":
    with errors.exit_codes():
        main()
