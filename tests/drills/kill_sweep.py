"""python tests/drills/kill_sweep.py [--model smollm2_135m] [--folder /tmp/kill]: a sweep killed ten times over.

Eight cells are swept once without interruption, and once with kill -9 at ten moments: at start-up, while the
base model loads, between optimizer steps, in the middle of writing a checkpoint, while decoding and while
writing the result. The two must end with the same results and bit-identical adapters, no finished cell may
be trained again, and the optimizer may not take more steps than planned and one checkpoint interval a kill.

Steps are counted where they happen: the child process wraps AdamW.step and appends a line to a journal
before each, which nothing ever rewrites, as it does for every cell that it starts to train.
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
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
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
"""Where each of the ten kills falls: the n-th time that the process gets there. A kill at `step` comes before it."""


def child() -> None:
    """train.py with a journal, and with an end at the moment that KILL_AT names."""
    import torch

    from tiedlora import storage
    from tiedlora.models import base_model
    from tiedlora.runs import session
    from tiedlora.scoring import scoring
    from tiedlora.training import checkpoint

    seen: Counter[str] = Counter()
    journal = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def at(moment: str) -> None:
        seen[moment] += 1
        if os.environ.get("KILL_AT") == f"{moment} {seen[moment]}":
            os.kill(os.getpid(), signal.SIGKILL)

    def note(line: str) -> None:
        os.write(journal, f"{line}\n".encode())

    def wrap(owner: object, name: str, before: object) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments, **keywords):
            before(*arguments)
            return original(*arguments, **keywords)

        setattr(owner, name, wrapped)

    def step(*_: object) -> None:
        at("step")
        note("step")

    def writing(path: Path, *_: object) -> None:
        # Tensors are written, the state is not, and nothing is renamed yet.
        if path.name == checkpoint.STATE:
            at("checkpoint")
        if path.name == "result.json":
            at("result")

    def training(run: object, folder: object, *_: object) -> None:
        note(f"train {folder.path.name}")

    def finished(path: Path, *_: object) -> None:
        if path.name == "result.json":
            note(f"finished {path.parent.name}")

    wrap(torch.optim.AdamW, "step", step)
    wrap(base_model, "load_base", lambda *_: at("load"))
    wrap(storage, "write_json", writing)
    wrap(scoring, "predict", lambda *_: at("decode"))
    wrap(scoring, "score_split", lambda *_: at("adapter"))
    wrap(session.RunSession, "train_and_score", training)
    original = storage.write_json

    def write_json(path: Path, value: object) -> None:
        original(path, value)
        finished(path)

    storage.write_json = write_json
    at("start")
    sys.argv = [str(PROJECT / "train.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def seconds_a_cell(model: str, outputs: Path) -> list[str]:
    """Overrides of a cell of a few seconds."""
    return [
        *(f"model={model}", "task=chain_sum", "task.rows.validation=8", "task.rows.test=8", "task.max_new_tokens=8"),
        *("task.options.rows={train: 200, validation: 16, test: 16}", "train=tiny", "train.validation_rows=4"),
        *(f"train.steps={STEPS}", f"train.checkpoint_every={CHECKPOINT_EVERY}", "train.threads=1"),
        f"outputs={outputs}",
    ]


def sweep(outputs: Path, model: str, kill_at: str | None = None) -> int:
    """One start of the sweep; its exit code."""
    overrides = [*seconds_a_cell(model, outputs), "tying=LoRA,TA,Tuv,TABuv", "seed=0,1"]
    environment = {**os.environ, "JOURNAL": str(outputs) + ".journal", "KILL_AT": kill_at or "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", "--multirun", *overrides]
    done = subprocess.run(command, env=environment, cwd=outputs.parent, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
    return done.returncode


def results(outputs: Path) -> dict[str, tuple[str, str]]:
    """Each run's adapter by hash, and what its record and predictions say apart from times."""
    found = {}
    for file in sorted(outputs.glob("*/result.json")):
        record = json.loads(file.read_text())
        tensors = next((file.parent / "adapter").glob("*.safetensors")).read_bytes()
        training = {
            k: v for k, v in record["training"].items() if "second" not in k and k[-2:] != "_s" and "peak" not in k
        }
        scores = {name: {k: v for k, v in s.items() if k != "seconds"} for name, s in record["scores"].items()}
        predictions = (file.parent / "predictions" / "validation.jsonl").read_text()
        said = json.dumps([training, scores, predictions], sort_keys=True)
        found[file.parent.name] = (hashlib.sha256(tensors).hexdigest(), said)
    return found


def steps(outputs: Path) -> int:
    """Optimizer steps that were taken, killed processes' too."""
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
    whole, killed = folder / "whole", folder / "killed"

    started = time.monotonic()
    assert sweep(whole, arguments.model) == 0
    print(f"uninterrupted: {time.monotonic() - started:.0f} s, {steps(whole)} steps")
    for moment in MOMENTS:
        code = sweep(killed, arguments.model, moment)
        assert code == -signal.SIGKILL, f"{moment}: the sweep ended with {code} before it was killed"
        print(f"killed at {moment:<14} {len(results(killed))} of {CELLS} cells finished, {steps(killed)} steps so far")
    assert sweep(killed, arguments.model) == 0

    expected, found = results(whole), results(killed)
    planned, taken = CELLS * STEPS, steps(killed)
    limit = planned + len(MOMENTS) * CHECKPOINT_EVERY
    print(
        f"steps: {planned} planned, {steps(whole)} uninterrupted, {taken} with {len(MOMENTS)} kills (at most {limit})"
    )
    assert len(expected) == len(found) == CELLS
    assert expected == found, f"not the same: {[name for name in expected if expected[name] != found.get(name)]}"
    assert steps(whole) == planned <= taken <= limit
    assert not trained_after_the_end(killed)
    started = time.monotonic()
    assert sweep(killed, arguments.model) == 0
    assert steps(killed) == taken
    print(
        f"same results, adapters bit-identical, nothing finished was trained again; "
        f"started once more: {time.monotonic() - started:.1f} s for {CELLS} cells, no step"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child()
    else:
        main()
