"""python tests/drills/kill_run.py [--moments 50] [WORD ...]: kill a run with kill -9 at many moments; each must resume
exactly. The words change the run, such as `objective=reward objective.ended_reward=0.5 score.checkpoint=last`.

A run on a tiny random model has some hundred events: it loads the model, every pass, every optimizer step, every flush
and rename of a file. For evenly spread events, a process is killed before the event, and the same configuration is
started again. What it leaves is compared with what an uninterrupted run leaves, byte by byte except for times. The
drill exits with 1 if anything differs, or if a kill cost more optimizer steps than one checkpoint interval.

The processes are forks of this one, which has imported everything. So a kill costs a fraction of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import drilling
from helpers.forks import forked

from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run

CHECKPOINT_EVERY = 3
STEPS = 12
words: list[str] = []
"""Those of the command line."""


def config(outputs: Path, *more: str) -> Config:
    return compose_config(
        [
            "model=tiny_llama",
            "task.options.rows={train: 40, validation: 8, test: 8}",
            "task.rows.validation=null",
            "task.max_new_tokens=8",
            f"train.steps={STEPS}",
            "train.batch_size=4",
            "train.warmup_steps=2",
            "train.validate_every=4",
            f"train.checkpoint_every={CHECKPOINT_EVERY}",
            "train.log_every=2",
            "train.dtype=float32",
            "train.threads=1",
            "tying.dropout=0.1",
            "score.checkpoint=best",
            *words,
            *more,
            f"outputs={outputs}",
        ]
    )


def folder(outputs: Path) -> RunFolder:
    return RunFolder(outputs / run_id(config(outputs)))


def child(outputs: Path, kill_at: int | None = None) -> tuple[int, list[str]]:
    """Carry out the run in a fork. Returns its exit code, and the journal of all forks with these outputs."""
    outputs.mkdir(parents=True, exist_ok=True)
    journal = outputs / "journal"

    def act() -> None:
        drilling.Events(journal, f"any {kill_at}" if kill_at else "").install()
        run.main(config(outputs))

    return forked(act, seconds=120)[0], journal.read_text().splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args()
    moments = arguments.moments
    words.extend(arguments.words)
    wrong, killed, executed = [], Counter[str](), 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        # One run in this process, so that every fork has imported everything that a run needs.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            run.main(config(root / "warm"))
        events = len(child(root / "whole")[1])
        whole = drilling.left_by(folder(root / "whole"))
        print(f"{events} events in an uninterrupted run; killing at {moments} of them")
        for number in range(moments):
            kill_at = 1 + number * (events - 1) // max(1, moments - 1)
            outputs = root / f"killed-{number}"
            code, journal = child(outputs, kill_at)
            if code >= 0:
                wrong.append(f"event {kill_at}: the process was not killed (it ended with {code})")
                continue
            where = journal[-1]
            killed[where.split()[2]] += 1
            code, journal = child(outputs)
            executed += journal.count("step")
            if code != 0:
                wrong.append(f"event {kill_at}, {where}: the second start ended with {code}")
                continue
            if found := drilling.differences(folder(outputs), whole):
                wrong.append(f"event {kill_at}, {where}: differs in {', '.join(found)}")
            if journal.count("step") > STEPS + CHECKPOINT_EVERY:
                wrong.append(f"event {kill_at}, {where}: {journal.count('step')} optimizer steps")
    print("killed before: " + ", ".join(f"{event} {count}" for event, count in killed.items()))
    print(f"optimizer steps: {executed} executed, {moments * STEPS} planned")
    print("\n".join(wrong) if wrong else f"{moments} of {moments} resumed exactly")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
