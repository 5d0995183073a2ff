"""python scripts/sweep.py plan|status|watch|select|drop|retry +grid=paper [words of train.py]: a sweep.

plan shows every cell, its state, and what the sweep will cost. status shows counts and the time left in one line, and
then the unfinished cells. watch shows them in a live table while the sweep runs. Both work in any terminal on the same
folder, and instead of words they take a sweep's id or name, or nothing for the newest one. select chooses each
configuration's learning rate on validation, and scores test only for the chosen runs. drop takes cells out of a sweep,
also while it runs, and retry puts them back or lets failed ones run once more: name them by their ids, such as
'LoRA-*-s1-*'.
"""

import argparse
from dataclasses import asdict
from json import dumps
from pathlib import Path

from tiedlora import screen
from tiedlora.analysis.rate_choice import CRITERIA
from tiedlora.commands.parser import Parser, filled
from tiedlora.errors import UserError
from tiedlora.places import outputs_folder
from tiedlora.records.selection import SELECTION_FILE, write_selection
from tiedlora.sweeps import forecast, selection, status
from tiedlora.sweeps.cells import Sweep
from tiedlora.sweeps.expand import compose_sweep
from tiedlora.text import visible
from tiedlora.tracking.progress import show_log

SEARCHING = {"hydra/sweeper=staged", "hydra/sweeper=deciding"}
"""The words of sweeps that need only the cells of the rates that their search has chosen."""


def main(words: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("plan", "status", "watch", "select", "drop", "retry"))
    parser.add_argument(
        "words",
        nargs="*",
        help="the words after `train.py --multirun`; the same words are the same sweep. drop, retry: the ids of cells "
        "too, with * and ? as wildcards. status, watch: or a sweep's id, name or folder, and outputs=FOLDER",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--by",
        choices=CRITERIA,
        help="select: the task's first metric, or the loss; by default the metric if every run has it",
    )
    parser.add_argument("--no-test", action="store_true", help="select: choose only, and leave test for later")
    parser.add_argument(
        "--tflops",
        type=positive,
        help=f"plan: the rate of arithmetic, for models and tasks without a finished run ({forecast.TFLOPS})",
    )
    arguments = parser.parse_intermixed_args(words)
    for option in ("by", "no_test"):
        if getattr(arguments, option) and arguments.what != "select":
            raise UserError(f"--{option.replace('_', '-')}: is for select; {arguments.what} does not use it")
    if arguments.tflops and arguments.what != "plan":
        raise UserError(f"--tflops: is for plan; {arguments.what} does not use it")
    if arguments.json and arguments.what in ("watch", "drop", "retry"):
        raise UserError(f"--json: is for plan, status and select; {arguments.what} does not use it")
    show_log()
    # A word of train.py has a '=', or deletes a key with '~'; an id has neither.
    cells = [word for word in arguments.words if "=" not in word and not word.startswith("~")]
    if arguments.what in ("drop", "retry"):
        steer(compose_sweep([word for word in arguments.words if word not in cells]), arguments.what, cells)
        return
    if arguments.what in ("status", "watch"):
        folder = started_sweep(arguments.what, [word for word in arguments.words if word not in cells], cells)
        if arguments.what == "watch":
            show_live(folder or compose_sweep(arguments.words).path)
            return
        if folder is not None:
            show_started(folder, json=arguments.json)
            return
    sweep = compose_sweep(arguments.words)
    if arguments.what == "select":
        select(sweep, by=arguments.by, test=not arguments.no_test, json=arguments.json)
    else:
        tflops = (arguments.tflops or forecast.TFLOPS) if arguments.what == "plan" else None
        show(sweep, not SEARCHING.isdisjoint(arguments.words), tflops, json=arguments.json)


def positive(text: str) -> float:
    if not 0 < (value := float(text)) < 1e9:
        raise argparse.ArgumentTypeError("must be above 0 and below 1e9")
    return value


def select(sweep: Sweep, by: str | None, test: bool, json: bool) -> None:
    # The choices of the staged sweeper stay, unless --by asks for another criterion.
    chosen = (selection.searched_rates(sweep) if by is None else None) or selection.select_rates(sweep, by)
    if test:
        chosen = selection.score_test(sweep, chosen)
    write_selection(sweep.path / SELECTION_FILE, chosen)
    as_data = [asdict(choice) for choice in chosen.choices]
    if json:
        print(dumps(as_data, indent=2, ensure_ascii=False))
    else:
        screen.show(*selection.table(chosen.choices, searched=bool(chosen.searches)))


def steer(sweep: Sweep, what: str, patterns: list[str]) -> None:
    if not patterns:
        raise UserError(f"{what}: name the cells by their ids, such as 'LoRA-*-s1-*'; status lists them")
    run_ids = sweep.matching(patterns)
    check_started(sweep.path)
    (sweep.control.drop if what == "drop" else sweep.control.retry)(run_ids)
    print("\n".join(run_ids))


def started_sweep(what: str, words: list[str], names: list[str]) -> Path | None:
    """The folder of the sweep with this name, or of the one that was started last. outputs= says where to look.

    Returns:
        None if words of train.py say which sweep it is.

    Raises:
        UserError: there is no such sweep, or there are words besides the name.
    """
    others = [word for word in words if not word.startswith("outputs=")]
    if len(names) > 1 or (names and others):
        raise UserError(f"{what}: takes one sweep: its id, its name, its folder, or the words of train.py --multirun")
    if others:
        return None
    place = filled("outputs=", Path)
    outputs = place(words[-1].removeprefix("outputs=")).expanduser() if words else outputs_folder()
    return status.find_sweep(outputs.absolute(), *names)


def check_started(folder: Path) -> None:
    """Refuse the folder of a sweep that nobody has started. Other words are another sweep."""
    if not folder.is_dir():
        raise UserError(
            f"{folder.name}: this sweep has not been started; train.py --multirun starts it, with these words"
        )


def show_live(folder: Path) -> None:
    """Watch the sweep in this folder."""
    check_started(folder)
    if not status.watch(folder):
        raise SystemExit(1)


def show_started(folder: Path, json: bool) -> None:
    """Print the status of the sweep in this folder, as its own files say it."""
    cells = next(status.views(folder)).cells
    if json:
        print(status.to_json(folder.name, cells))
    else:
        screen.show(*status.unfinished(visible(folder.name), cells))


def show(sweep: Sweep, searches: bool, tflops: float | None, json: bool) -> None:
    """Print the status; with `tflops`, the plan."""
    # A search may have cells outside the grid. A plain sweep of the same cells runs all of them.
    has_searched = searches and (sweep.path / SELECTION_FILE).is_file()
    plain = (status.status_of(cell, sweep.control, patience=0) for cell in sweep.cells)
    cells = next(status.views(sweep.path)).cells if has_searched else list(plain)
    forecasts, unknown = forecast.forecast(sweep.cells, tflops) if tflops else ([], [])
    if json:
        print(status.to_json(sweep.id, cells, [asdict(row) for row in forecasts] if tflops else None))
    elif tflops:
        screen.show(*status.summarised(sweep.id, cells), "", *forecast.described(forecasts, unknown))
    else:
        screen.show(*status.unfinished(sweep.id, cells))
