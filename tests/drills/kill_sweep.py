"""python tests/drills/kill_sweep.py [--model smollm2_135m] [--folder /tmp/kill]: kill a sweep ten times.

A sweep of eight cells runs once without interruption, and once with kill -9 at ten moments: at start-up, while the base
model loads, between optimizer steps, in the middle of writing a checkpoint, while decoding, and while writing the
result. Both must end with the same results and bit-identical adapters, and no finished cell may be trained again. The
optimizer may take only the planned steps, plus one checkpoint interval for each kill.

Steps are counted in the child process: it appends a line to a journal before each AdamW.step, and another line for
every cell that it starts to train.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tiedlora import storage
from tiedlora.config.project import PROJECT
from tiedlora.records.run_folder import RunFolder

CHECKPOINT_STATE = "state.json"
"""The file of a checkpoint that is written last."""
STEPS, CHECKPOINT_EVERY, CELLS = 8, 2, 8
MOMENTS = (
    "start 1",
    "load 1",
    "step 3",
    "checkpoint 2",
    "decode 1",
    "step 12",
    "checkpoint 7",
    "adapter 2",
    "result 2",
    "step 5",
)
"""The ten kills: the moment, and at which of its occurrences. A kill at `step` comes before the step."""


class Journal:
    """Appends the events of the process to a file, and kills the process at the moment KILL_AT."""

    def __init__(self) -> None:
        self.file = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.reached: Counter[str] = Counter()

    def note(self, line: str) -> None:
        os.write(self.file, f"{line}\n".encode())

    def at(self, moment: str) -> None:
        self.reached[moment] += 1
        if os.environ.get("KILL_AT") == f"{moment} {self.reached[moment]}":
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: object, name: str, act: Callable[..., None]) -> None:
        """Make each call of `owner.name` first call `act` with the same arguments."""
        original = getattr(owner, name)

        def wrapped(*arguments, **keywords):
            act(*arguments)
            return original(*arguments, **keywords)

        setattr(owner, name, wrapped)

    def step(self, *_: object) -> None:
        self.at("step")
        self.note("step")

    def start_of_training(self, session: object, folder: RunFolder, *_: object) -> None:
        self.note(f"train {folder.path.name}")

    def install(self) -> None:
        """Watch the functions that mark the moments."""
        import torch

        from tiedlora.runs import trainer
        from tiedlora.scoring import split

        self.before(torch.optim.AdamW, "step", self.step)
        self.before(trainer, "load_base", lambda *_: self.at("load"))
        self.before(split, "predict", lambda *_: self.at("decode"))
        self.before(split.Scorer, "score_split", lambda *_: self.at("adapter"))
        self.before(trainer.Trainer, "train", self.start_of_training)
        write_json = storage.write_json

        def watched_write_json(path: Path, value: object) -> None:
            # A checkpoint's tensors are written before its state, and nothing is renamed yet.
            if path.name in (CHECKPOINT_STATE, "result.json"):
                self.at("checkpoint" if path.name == CHECKPOINT_STATE else "result")
            write_json(path, value)
            if path.name == "result.json":
                self.note(f"finished {path.parent.name}")

        storage.write_json = watched_write_json


def child() -> None:
    """Run train.py with a journal, and with a kill at the moment that KILL_AT names."""
    journal = Journal()
    journal.install()
    journal.at("start")
    sys.argv = [str(PROJECT / "train.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def overrides_of_a_short_cell(model: str, outputs: Path) -> list[str]:
    """Overrides for a cell that takes a few seconds."""
    return [
        *(f"model={model}", "task=chain_sum", "task.rows.validation=8", "task.rows.test=8", "task.max_new_tokens=8"),
        *("task.options.rows={train: 200, validation: 16, test: 16}", "train=tiny", "train.validation_rows=4"),
        *(f"train.steps={STEPS}", f"train.checkpoint_every={CHECKPOINT_EVERY}", "train.threads=1"),
        f"outputs={outputs}",
    ]


def sweep(outputs: Path, model: str, kill_at: str | None = None) -> int:
    """Start the sweep once. Returns its exit code."""
    overrides = [*overrides_of_a_short_cell(model, outputs), "tying=LoRA,TA,Tuv,TABuv", "seed=0,1"]
    environment = {**os.environ, "JOURNAL": str(outputs) + ".journal", "KILL_AT": kill_at or "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", "--multirun", *overrides]
    done = subprocess.run(command, env=environment, cwd=outputs.parent, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
    return done.returncode


def results(outputs: Path) -> dict[str, tuple[str, str]]:
    """Each run's adapter by hash, and its record and predictions without times."""
    by_run = {}
    for file in sorted(outputs.glob("*/result.json")):
        record = json.loads(file.read_text())
        tensors = next((file.parent / "adapter").glob("*.safetensors")).read_bytes()
        training = {
            k: v for k, v in record["training"].items() if "second" not in k and k[-2:] != "_s" and "peak" not in k
        }
        scores = {name: {k: v for k, v in s.items() if "seconds" not in k} for name, s in record["scores"].items()}
        predictions = [path.read_text() for path in sorted(file.parent.glob("predictions/validation.jsonl"))]
        without_times = json.dumps([training, scores, predictions], sort_keys=True)
        by_run[file.parent.name] = (hashlib.sha256(tensors).hexdigest(), without_times)
    return by_run


def steps(outputs: Path) -> int:
    """How many optimizer steps were taken, including those of killed processes."""
    return Path(f"{outputs}.journal").read_text().splitlines().count("step")


def trained_after_the_end(outputs: Path) -> list[str]:
    """Runs whose training was started again although they had a result."""
    ended: set[str] = set()
    again = []
    for line in Path(f"{outputs}.journal").read_text().splitlines():
        word, _, name = line.partition(" ")
        if word == "finished":
            ended.add(name)
        if word == "train" and name in ended:
            again.append(name)
    return again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_llama", help="smollm2_135m for the embedded one")
    parser.add_argument("--folder", type=Path, help="where the two sweeps go; a new temporary folder if left out")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="kill-sweep-"))
    folder.mkdir(parents=True, exist_ok=True)
    uninterrupted, killed = folder / "uninterrupted", folder / "killed"

    started = time.monotonic()
    assert sweep(uninterrupted, arguments.model) == 0
    print(f"uninterrupted: {time.monotonic() - started:.0f} s, {steps(uninterrupted)} steps")
    for moment in MOMENTS:
        code = sweep(killed, arguments.model, moment)
        assert code == -signal.SIGKILL, f"{moment}: the sweep ended with {code} before it was killed"
        done = len(results(killed))
        print(f"killed at {moment:<14} {done} of {CELLS} cells finished, {steps(killed)} steps so far", flush=True)
    assert sweep(killed, arguments.model) == 0
    check(uninterrupted, killed)

    taken, started = steps(killed), time.monotonic()
    assert sweep(killed, arguments.model) == 0
    assert steps(killed) == taken
    print(
        f"same results, adapters bit-identical, nothing finished was trained again; "
        f"started once more: {time.monotonic() - started:.1f} s for {CELLS} cells, no step"
    )


def check(uninterrupted: Path, killed: Path) -> None:
    """The two sweeps have the same results, and the kills cost no more steps than they may."""
    planned, taken = CELLS * STEPS, steps(killed)
    limit = planned + len(MOMENTS) * CHECKPOINT_EVERY
    kills = len(MOMENTS)
    print(
        f"steps: {planned} planned, {steps(uninterrupted)} uninterrupted, {taken} with {kills} kills (at most {limit})"
    )
    expected, resumed = results(uninterrupted), results(killed)
    assert len(expected) == len(resumed) == CELLS
    different = [name for name in expected if expected[name] != resumed.get(name)]
    assert expected == resumed, f"not the same: {different}"
    assert steps(uninterrupted) == planned <= taken <= limit
    assert not trained_after_the_end(killed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child()
    else:
        main()
