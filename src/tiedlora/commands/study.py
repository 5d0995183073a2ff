"""python scripts/study.py WHAT studies/NAME: a planned comparison, and its records.

    plan     the commands of the study, in their order
    forecast what the study will cost, or with another model: forecast studies/NAME model=llama3_2_1b
    run      carry them out, and export after each one; the same command continues. The plan must be committed
    export   write the records of the ended runs to studies/NAME/runs, without texts of the data and without paths
    finish   pack the records of a study whose runs have all ended into one archive
    restore  copy these records to where the runs are, so that `run` on another machine does not repeat them
    repeat   train the run RUN of the study again, and compare its adapter with the recorded sha256
    verify   check every finished run, or those that are named, as scripts/verify.py does

The report reads the folder: python scripts/report.py studies/NAME
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tiedlora import errors, screen
from tiedlora.commands.parser import Parser, filled
from tiedlora.config import compose
from tiedlora.errors import UserError, as_called
from tiedlora.places import cache_folder, folder_of, outputs_folder
from tiedlora.records import study_files
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run
from tiedlora.sweeps import forecast, study
from tiedlora.tracking.progress import show_log
from tiedlora.training import signals

REPEATED_LOSS = 0.05
"""By how much the validation loss of a repeated run may differ on another kind of device, as a share of it."""


def main(words: list[str]) -> None:
    arguments = read_arguments(words)
    show_log()
    if arguments.data_root:
        # The cells of the plan take it from there.
        os.environ["TIEDLORA_DATA"] = arguments.data_root
    folder, part, own_words = arguments.study, arguments.part, arguments.words
    planned = study.read_study(folder)
    outputs = (arguments.outputs or outputs_folder() / "studies" / planned.name).expanduser().absolute()
    commands: dict[str, Callable[[], None]] = {
        "plan": lambda: show_plan(planned, outputs, part),
        "forecast": lambda: show_forecast(planned, outputs, part, own_words),
        "run": lambda: carry_out(planned, folder, outputs, part),
        "export": lambda: print(f"{study.export_study(folder, outputs)} runs in {folder / 'runs'}"),
        "finish": lambda: print(f"{folder / study_files.ARCHIVE}: sha256 {study_files.finish(folder)}"),
        "restore": lambda: print(f"{study.restore_study(folder, outputs)} runs copied to {outputs}"),
        "repeat": lambda: repeat(folder, own_words, outputs / "repeated", arguments.data_root),
        "verify": lambda: verify_runs(folder, own_words, arguments.data_root),
    }
    commands[arguments.what]()


def read_arguments(words: list[str]) -> argparse.Namespace:
    """The words of the command line. An option that the command would not use is refused."""
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("plan", "forecast", "run", "export", "finish", "restore", "repeat", "verify"))
    parser.add_argument("study", type=filled("STUDY", Path), help="the study's folder")
    parser.add_argument("words", nargs="*", help="repeat, verify: ids of runs. forecast: words of train.py to add")
    parser.add_argument("--part", help="plan, forecast, run: only this part")
    parser.add_argument(
        "--outputs", type=filled("--outputs", Path), help="where the runs are; default TIEDLORA_OUTPUTS/studies/NAME"
    )
    parser.add_argument(
        "--data-root",
        type=filled("--data-root", str),
        default=folder_of("TIEDLORA_DATA"),
        help="as data_root= of train.py",
    )
    arguments = parser.parse_intermixed_args(words)
    if arguments.words and arguments.what not in ("forecast", "repeat", "verify"):
        raise UserError(f"{' '.join(arguments.words)}: {arguments.what} takes no words; change study.yaml instead")
    if arguments.part and arguments.what not in ("plan", "forecast", "run"):
        raise UserError(f"--part: is for plan, forecast and run; {arguments.what} takes the whole study")
    if arguments.outputs and arguments.what == "verify":
        raise UserError("--outputs: verify checks the records in the study's folder; leave it out")
    return arguments


def show_plan(planned: study.Study, outputs: Path, part: str | None) -> None:
    for name, words, _ in planned.composed(outputs, part):
        print(as_called(f"{name}: python train.py --multirun {' '.join(map(shown, words))}"))


def shown(word: str) -> str:
    """The word of a command that a person may paste into a shell. A list such as [test] needs no quotes there."""
    return word if re.fullmatch(r"[\w@%+=:,./\[\]-]*", word, re.ASCII) else shlex.quote(word)


def show_forecast(planned: study.Study, outputs: Path, part: str | None, words: list[str]) -> None:
    # Two parts may have cells in common, which will run once.
    cells = {cell.run_id: cell for *_, sweep in planned.composed(outputs, part, words) for cell in sweep.cells}
    screen.show(*forecast.described(*forecast.forecast(cells.values())))


def carry_out(planned: study.Study, folder: Path, outputs: Path, part: str | None) -> None:
    study.check_can_run(folder)
    failed = []
    # A mistake in the last part must not be found after the hours of the others.
    for name, words, _ in planned.composed(outputs, part):
        print(f"{name}: {' '.join(words)}", flush=True)
        command = [sys.executable, "-m", "tiedlora", "train", "--multirun", *words, study.outputs_word(outputs)]
        ended = run_until_stopped(command)
        if outputs.is_dir():
            study.export_study(folder, outputs)
        if ended == errors.STOPPED:
            raise SystemExit(ended)
        if ended != 0:
            failed.append(f"{name}: {' '.join(words)}")
    if failed:
        raise UserError(f"{len(failed)} sweeps did not end well; the same command continues them: {'; '.join(failed)}")


def run_until_stopped(command: list[str]) -> int:
    """The exit code of a sweep, or STOPPED if a signal came: the sweep gets it too, and first saves its checkpoints."""
    stopped = False
    # In a session of its own the sweep gets no Ctrl-C of the terminal as well: a second one would stop it at once.
    with signals.stopped_by_signals(), subprocess.Popen(command, start_new_session=True) as sweep:
        while True:
            try:
                ended = sweep.wait()
                return errors.STOPPED if stopped else ended
            except KeyboardInterrupt:
                sweep.send_signal(signal.SIGINT if stopped else signal.SIGTERM)
                stopped = True


def repeat(folder: Path, run_ids: list[str], outputs: Path, data_root: str | None) -> None:
    if len(run_ids) != 1:
        raise UserError("repeat: takes one run; give its id")
    (kept,) = finished_runs(folder, run_ids)
    recorded = kept.finished_record()
    config = compose.read_finished_config(kept.config_file, recorded.config.tree)
    config.outputs, config.data_root, config.force = str(outputs), data_root, True
    # The record has no path of a neutral text. A tracker would replace the run that it has under this id.
    config.score.splits, config.score.forgetting, config.tracking.backend = [], None, "none"
    config.cache = str(cache_folder())
    repeated = run.main(config)
    assert repeated is not None
    for name, sha256 in recorded.files.items():
        equal = repeated.files.get(name) == sha256
        print(f"{name}: {'the same bytes' if equal else f'differs: {repeated.files.get(name)}, recorded {sha256}'}")
    print(f"validation loss: {repeated.training.validation_loss_last}, was {recorded.training.validation_loss_last}")
    print(f"device: {repeated.execution}, was {recorded.executions_in_words}")
    if repeated.files == recorded.files:
        return
    before, now = recorded.training.validation_loss_last, repeated.training.validation_loss_last
    # Written so that NaN disagrees.
    if recorded.rounds_as(repeated.execution) or not abs(now - before) <= REPEATED_LOSS * before:
        raise SystemExit(errors.DISAGREES)
    print(f"the same up to the rounding of another processor: the loss is within {REPEATED_LOSS:.0%}")


def verify_runs(folder: Path, run_ids: list[str], data_root: str | None) -> None:
    # It imports torch, which takes seconds: the other commands do not need it.
    from tiedlora.runs import verify

    checked, wrong = finished_runs(folder, run_ids), []
    for kept in checked:
        findings = verify.verify(kept.path, data_root=data_root, cache=cache_folder())
        disagreeing = [finding for finding in findings if finding.ok is False]
        print(verify.line_of_run(kept.path.name, findings), flush=True)
        if disagreeing:
            wrong.append(kept.path.name)
            print("\n".join(verify.lines(disagreeing)[:-1]))
    print(f"{len(checked) - len(wrong)} of {len(checked)} runs agree with their records")
    if wrong:
        raise SystemExit(errors.DISAGREES)


def finished_runs(folder: Path, run_ids: list[str]) -> list[RunFolder]:
    """The finished runs of the study with these ids, or all of them.

    Raises:
        UserError: one of them is no finished run, or there is none.
    """
    runs = study_files.runs_folder(folder)
    names = run_ids or sorted(path.parent.name for path in runs.glob("*/result.json"))
    if not names:
        raise UserError(f"{runs}: has no finished run yet")
    for name in names:
        if not (runs / name / "result.json").is_file():
            raise UserError(f"{runs / name}: is no finished run of the study; give the id of one")
    return [RunFolder(runs / name) for name in names]
