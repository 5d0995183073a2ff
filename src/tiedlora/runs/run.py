"""One run, as `python train.py` starts it. A finished run is printed; any other is carried out (trainer.py).

The imports inside functions are those that need torch. Torch and transformers take seconds to import, and a finished
run, a wrong option and `--help` answer without them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.errors import Paused, as_called
from tiedlora.records.provenance import code_version
from tiedlora.records.run_folder import Busy, RunFolder
from tiedlora.records.run_record import RunRecord
from tiedlora.records.scores import read_run_scores
from tiedlora.records.summary import terminal_lines
from tiedlora.runs.inputs import check_same_inputs
from tiedlora.scoring.wanted import check_words, lacks_scores
from tiedlora.tracking.progress import running_clock
from tiedlora.tracking.run_trackers import AUTO, NONE


def main(config: Config, folder: RunFolder | None = None) -> RunRecord | None:
    """Carry out a run if it is not finished, and print its result.

    Args:
        folder: the run's own; None is the one of the run's id. A frozen cell of a sweep may have another first word.

    Returns:
        The record. None if the run has paused (train.pause_after). Of several processes that train together, only the
        first gets the record; the others get None.

    Raises:
        UserError: a mistake that the user can correct, or too little memory.
        Busy: another process is working on this run.
        StoppedEarly: a signal asked the run to stop; the same command continues from its checkpoint.
    """
    code_version()  # Asked before anything is loaded: a commit that comes later is not what this process runs.
    check_words(config)
    folder = folder or RunFolder(Path(config.outputs) / run_id(config))
    finished = None if config.force else folder.record()
    record = finished
    # Several processes must agree that the run is finished, so they connect first.
    if finished is None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with running_clock("importing torch"):
            from tiedlora.runs import trainer  # noqa: PLC0415

        try:
            record = trainer.carry_out(config, folder)
        except Paused:
            print(f"paused after step {config.train.pause_after}: {folder.path}")
            return None
    if record is None:
        return None
    # Another process may have finished the run while this one waited, with other scores than this command asks for.
    if finished is not None or lacks_scores(config.score, folder):
        _reuse(config, folder, record)
    scores = read_run_scores(folder, record)
    for split in config.score.splits if config.score.base else []:
        if not scores.gains(split):
            command = as_called(f"python scripts/score.py {folder.path} --split {split} --again")
            print(f"its base model was not scored on {split} (score.base=false); {command} scores both")
    print(terminal_lines(record, scores, folder.path))
    return record


def _reuse(config: Config, folder: RunFolder, record: RunRecord) -> None:
    """Score the splits and metrics that are requested and that the finished run lacks."""
    check_same_inputs(config, record, folder)
    if (backend := config.tracking.backend) not in (AUTO, NONE):
        print(f"tracking={backend}: gets nothing, because the run has finished before (force=true repeats it)")
    # A read-only archive cannot be tidied, and another process may be scoring the run. Neither is a problem.
    with suppress(OSError, Busy), folder.locked():
        folder.tidy()
    if lacks_scores(config.score, folder):
        from tiedlora.runs.add_scores import add_scores  # noqa: PLC0415

        add_scores(folder, config)
    else:
        print(f"finished before: {folder.path} (force=true repeats it)")
