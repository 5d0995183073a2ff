"""python scripts/sweep.py plan|status|select +grid=paper [train.py's words]: a sweep, before, while and after it runs.

plan shows every cell and its state; status is the same after one line of counts and time left, unfinished
cells first; select chooses each configuration's learning rate on validation and scores test for the chosen runs alone.
"""

import argparse
import logging

from tiedlora import errors
from tiedlora.config import compose
from tiedlora.report import claims
from tiedlora.sweeps import expand, selection, sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("plan", "status", "select"))
    parser.add_argument(
        "words", nargs="*", help="what follows `train.py --multirun`: the same words are the same sweep"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--by", choices=selection.BY, default="score", help="select: the task's first metric, or the loss"
    )
    parser.add_argument("--no-test", action="store_true", help="select: choose only, and leave test for later")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("tiedlora").setLevel(logging.INFO)
    found = expand.compose_sweep(arguments.words)
    if arguments.what == "select":
        choices = selection.choose(found, arguments.by)
        if not arguments.no_test:
            selection.score_test(found, choices)
        selection.save(found, choices, arguments.by)
        print(selection.to_json(choices) if arguments.json else selection.lines(choices))
        return
    rows = sweep.rows(found)
    if arguments.json:
        print(sweep.to_json(found, rows))
    elif arguments.what == "plan":
        print(f"{sweep.table(rows)}\n\n{sweep.summary(found, rows)}\n")
        print("\n".join(_decides(found)))
    else:
        print(sweep.summary(found, rows))
        for row in rows:
            if row["state"] != "done":
                print(f"  {row['state']:<12} {row['seconds']:>6.0f} s  {row['run_id']}  {row['error'] or ''}".rstrip())


def _decides(found: sweep.Sweep) -> list[str]:
    """What the sweep's seeds and test rows can decide of the paper's claims, before the money is spent.

    A task whose YAML takes all rows of test is planned with GSM8K's 1,319.
    """
    seeds = len({cell.config.seed for cell in found.cells})
    rows = min(cell.config.task.rows.test or 1319 for cell in found.cells)
    return claims.plan(claims.read(compose.PROJECT / "claims/tied_lora.yaml"), seeds, rows)


if __name__ == "__main__":
    with errors.exit_codes():
        main()
