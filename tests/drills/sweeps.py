"""python tests/drills/sweeps.py staged|deciding [--model NAME] [--launchers joblib ray submitit] [--folder FOLDER]

A sweep runs once without interruption, once with kill -9 at several moments (at start-up, while the model loads, before
a step, while a checkpoint or a result is written, in the middle of a pass), and once under each launcher. All must end
with the same results, bit-identical adapters, and the same decisions of a staged search. No finished cell may be
trained again, and a kill may cost at most one checkpoint interval. ray and submitit need their extras.

The plain grid of a `staged` search's words continues the search's runs, so that both together take no step twice. A
`deciding` sweep, with --model smollm2_135m, has looks at 3, 5 and 8 seeds and two claims. That LoRA's loss is lower
than TABuv's by more than 0.9 nats is far from the truth: it must be contradicted at the first look, and TABuv must have
no run of a later one.

Steps are counted in the child process: it writes its events to a journal (see drilling.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drilling

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import processes

from tiedlora.places import PROJECT
from tiedlora.records.run_folder import RunFolder

STEPS = 8
CELL = (
    "task=chain_sum",
    "task.options.rows={train: 200, validation: 16, test: 16}",
    "task.max_new_tokens=8",
    "train=tiny",
    f"train.steps={STEPS}",
    "train.checkpoint_every=2",
    "train.threads=1",
)
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib_slots", "hydra.launcher.n_jobs=2"],
    "ray": ["hydra/launcher=ray_tasks", "+hydra.launcher.ray.init.num_cpus=2"],
    "submitit": ["hydra/launcher=submitit_slots", "hydra.launcher.jobs_at_once=2"],
}


@dataclass(frozen=True)
class Drill:
    grid: tuple[str, ...]
    """Words of the plain grid."""
    search: tuple[str, ...]
    """Words that make it a search."""
    cells: int
    """Cells of the plain grid."""
    checkpoint_every: int
    moments: tuple[str, ...]
    """The kills: an event, and which of them in that start of the sweep."""


CLAIMS = """
paper: a drill of this project
looks: [3, 5, 8]
claims:
  - {name: LoRA has a lower loss than Tuv, method: {configuration: LoRA, rank: 8},
     comparator: {configuration: Tuv, rank: 8}, better_by: 0.0, tasks: {chain_sum: target_loss}}
  - {name: LoRA's loss is lower than TABuv's by more than 0.9 nats, method: {configuration: LoRA, rank: 8},
     comparator: {configuration: TABuv, rank: 8}, better_by: 0.9, tasks: {chain_sum: target_loss}}
"""
DRILLS = {
    "staged": Drill(
        (
            "tying=LoRA,TABuv,TAB",
            "train.lr=1e-4,1e-3,1e-2,1e-1",
            "seed=0,1,2",
            "score.base=false",
            "task.rows.validation=16",
            "train.validation_rows=16",
            "train.validate_every=2",
        ),
        # Within the grid's rates, so that the plain grid has all cells of the search.
        ("hydra/sweeper=staged", "hydra.sweeper.lowest_rate=1e-4", "hydra.sweeper.highest_rate=0.1"),
        36,
        2,
        ("any 1", "step 9", "write step 20", "step 41", "write result.json 1"),
    ),
    "deciding": Drill(
        (
            "tying=LoRA,TABuv,Tuv",
            "train.lr=3e-3,1e-2",
            "rank=r8",
            "train.steps=24",
            "train.batch_size=8",
            "task.options.rows={train: 400, validation: 32, test: 64}",
            "task.rows.validation=32",
            "train.validation_rows=32",
            "train.validate_every=6",
            "score.splits=[test]",
            "score.metrics=[target_loss]",
            "train.checkpoint_every=6",
        ),
        ("hydra/sweeper=deciding", "hydra.sweeper.lowest_rate=1e-3"),
        0,
        6,
        ("step 100", "write result.json 7"),
    ),
}


def child() -> None:
    """Run train.py with a journal, and with a kill at the moment that KILL_AT names."""
    drilling.Events(Path(os.environ["JOURNAL"]), os.environ["KILL_AT"]).install()
    sys.argv = [str(PROJECT / "train.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(outputs: Path, model: str, words: tuple[str, ...], kill_at: str = "") -> int:
    """Start the sweep once. Returns its exit code."""
    environment = {**os.environ, "JOURNAL": f"{outputs}.journal", "KILL_AT": kill_at, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", "--multirun", f"model={model}", *CELL, *words, f"outputs={outputs}"]
    # A process that is left, such as a worker, ends with the command.
    done = processes.run(command, seconds=3600, env=environment, cwd=outputs.parent)
    if done.returncode not in (0, -signal.SIGKILL):
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
    return done.returncode


def results(outputs: Path) -> dict[str, dict[str, Any]]:
    """Run -> what it left."""
    return {
        file.parent.name: drilling.left_by(RunFolder(file.parent)) for file in sorted(outputs.glob("*/result.json"))
    }


def decisions(outputs: Path) -> dict[str, object]:
    """The texts of the decisions of a search and of looks, and the names of the pruned runs."""
    files = (file for name in ("selection", "verdicts") for file in outputs.glob(f"sweeps/*/{name}.json"))
    texts = {file.name: file.read_text() for file in files}
    return {**texts, "pruned": sorted(pruned.parent.name for pruned in outputs.glob("*/pruned.txt"))}


def journal(outputs: Path) -> list[str]:
    return Path(f"{outputs}.journal").read_text().splitlines()


def steps(outputs: Path) -> int:
    """How many optimizer steps were taken, including those of killed processes."""
    return journal(outputs).count("step")


def trained_after_the_end(outputs: Path) -> list[str]:
    """Runs that wrote a checkpoint although they had a result."""
    ended: set[str] = set()
    again = []
    for line in journal(outputs):
        if found := re.search(r"/([^/]+)/(result\.json|checkpoint/step-\d+)$", line):
            name, what = found.groups()
            if what == "result.json":
                ended.add(name)
            elif name in ended:
                again.append(name)
    return again


def compare(ours: Path, expected: Path) -> None:
    """The same decisions and results."""
    assert decisions(ours) == decisions(expected), f"{ours.name}: other decisions than {expected.name}"
    found, wanted = results(ours), results(expected)
    assert sorted(found) == sorted(wanted), f"{ours.name}: other runs than {expected.name}"
    for name in wanted:
        different = [what for what in wanted[name] if found[name].get(what) != wanted[name][what]]
        assert not different, f"{ours.name}: {name} differs in {different}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drill", choices=DRILLS)
    parser.add_argument("--model", default="tiny_llama", help="smollm2_135m for the embedded one")
    parser.add_argument("--launchers", nargs="*", choices=LAUNCHERS, default=["joblib"])
    parser.add_argument("--folder", type=Path, help="where the sweeps go; a new temporary folder if left out")
    arguments = parser.parse_args()
    drill = DRILLS[arguments.drill]
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix=f"{arguments.drill}-"))
    folder.mkdir(parents=True, exist_ok=True)
    words = (*drill.grid, *drill.search)
    if arguments.drill == "deciding":
        (folder / "claims.yaml").write_text(CLAIMS)
        words = (*words, f"hydra.sweeper.claims={folder / 'claims.yaml'}")
    whole, killed = folder / "uninterrupted", folder / "killed"

    started = time.monotonic()
    assert start(whole, arguments.model, words) == 0
    pruned = decisions(whole)["pruned"]
    print(f"uninterrupted: {time.monotonic() - started:.0f} s, {steps(whole)} steps")
    print(f"{len(results(whole))} runs finished, {len(pruned)} pruned", flush=True)
    for moment in drill.moments:
        assert start(killed, arguments.model, words, moment) == -signal.SIGKILL, f"not killed at {moment}"
        print(f"killed at {moment:<20} {len(results(killed))} runs finished, {steps(killed)} steps so far", flush=True)
    assert start(killed, arguments.model, words) == 0
    compare(killed, whole)
    assert steps(whole) <= steps(killed) <= steps(whole) + len(drill.moments) * drill.checkpoint_every
    assert not trained_after_the_end(killed)
    print(f"killed {len(drill.moments)} times: same results, adapters bit-identical, {steps(killed)} steps")
    for name in arguments.launchers:
        assert start(folder / name, arguments.model, (*words, *LAUNCHERS[name])) == 0
        compare(folder / name, whole)
        print(f"{name}: same results, adapters bit-identical", flush=True)
    if arguments.drill == "deciding":
        check_looks(whole)
    else:
        continue_as_grid(drill, whole, arguments.model)


def check_looks(whole: Path) -> None:
    """The verdicts of CLAIMS, and no seed of a look that no open claim needs."""
    verdicts = json.loads(str(decisions(whole)["verdicts.json"]))
    for verdict in verdicts:
        print(f"{verdict['claim']}: {verdict['verdict']} at look {verdict['look']}: {verdict['reason']}")
    better, far_better = verdicts
    assert better["verdict"] != "contradicted"
    assert (far_better["verdict"], far_better["look"]) == ("contradicted", 1)
    assert not any(verdict["open"] for verdict in verdicts)
    records = [RunFolder(whole / name).finished_record() for name in results(whole)]
    assert {record.seed for record in records if record.arm.label == "TABuv"} == {0, 1, 2}, "TABuv has other seeds"


def continue_as_grid(drill: Drill, whole: Path, model: str) -> None:
    """The plain grid of the same words continues the runs, takes no step twice, and changes no decision."""
    decided, finished = decisions(whole), results(whole)
    assert start(whole, model, drill.grid) == 0
    after = results(whole)
    assert len(after) == drill.cells
    tensors = "adapter/adapter.safetensors"
    assert all(after[name][tensors] == left[tensors] for name, left in finished.items())
    assert steps(whole) == drill.cells * STEPS, "the plain grid repeats steps"
    assert not trained_after_the_end(whole)
    assert decisions(whole) == {**decided, "pruned": []}, "the plain grid changes the decisions, or leaves a pruned run"
    print(f"plain grid: {drill.cells} cells done, {steps(whole)} steps in all, none twice")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child()
    else:
        main()
