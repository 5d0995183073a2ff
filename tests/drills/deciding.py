"""python tests/drills/deciding.py [--model smollm2_135m] [--folder /tmp/deciding]: a claim that ends before its plan.

A deciding sweep of LoRA, TABuv and Tuv on short sums, with planned looks at 3, 5 and 8 seeds and two claims:

- LoRA has a lower loss than Tuv, whose projections are frozen, at the same rank;
- LoRA has a lower loss than TABuv by more than 0.9 nats, in 24 steps.

The second is far from its boundary. The drill ends with an error unless it is contradicted at the first look, TABuv has
no run of a later look, the first claim is not contradicted, and the same command has nothing left to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tiedlora.config.project import PROJECT
from tiedlora.records.run_folder import RunFolder

LOOKS = (3, 5, 8)
CLAIMS = f"""
paper: a drill of this project
looks: {list(LOOKS)}
claims:
  - name: LoRA has a lower loss than Tuv
    method: {{configuration: LoRA, rank: 8}}
    comparator: {{configuration: Tuv, rank: 8}}
    better_by: 0.0
    tasks: {{chain_sum: target_loss}}
  - name: LoRA's loss is lower than TABuv's by more than 0.9 nats
    method: {{configuration: LoRA, rank: 8}}
    comparator: {{configuration: TABuv, rank: 8}}
    better_by: 0.9
    tasks: {{chain_sum: target_loss}}
"""
WORDS = (
    *("hydra/sweeper=deciding", "tying=LoRA,TABuv,Tuv", "rank=r8", "train.lr=3e-3,1e-2", "task=chain_sum"),
    *("task.options.rows={train: 400, validation: 32, test: 64}", "task.rows.validation=32", "train=tiny"),
    *("train.steps=24", "train.batch_size=8", "train.validate_every=6", "train.validation_rows=32"),
    *("score.splits=[test]", "score.metrics=[target_loss]", "train.threads=1", "tracking=none"),
    *("hydra.sweeper.lowest_rate=1e-3", "hydra.sweeper.highest_rate=0.1"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--folder", type=Path, help="where the sweep goes; a new temporary folder if left out")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="deciding-"))
    folder.mkdir(parents=True, exist_ok=True)
    claims = folder / "claims.yaml"
    claims.write_text(CLAIMS)
    words = [*WORDS, f"model={arguments.model}", f"hydra.sweeper.claims={claims}", f"outputs={folder / 'outputs'}"]
    command = [sys.executable, str(PROJECT / "train.py"), "--multirun", *words]

    def results() -> dict[Path, bytes]:
        """Run -> the bytes of its record, after one more start."""
        subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
        return {path.parent: path.read_bytes() for path in sorted(folder.glob("outputs/*/result.json"))}

    finished = results()
    (file,) = folder.glob("outputs/sweeps/*/verdicts.json")
    verdicts = json.loads(file.read_text())
    for verdict in verdicts:
        print(f"{verdict['claim']}: {verdict['verdict']} at look {verdict['look']}: {verdict['reason']}")
    better, far_better = verdicts
    assert better["verdict"] != "contradicted"
    assert (far_better["verdict"], far_better["look"]) == ("contradicted", 1)
    assert not any(verdict["open"] for verdict in verdicts)
    records = [RunFolder(path).finished_record() for path in finished]
    seeds = {record.seed for record in records if record.label == "TABuv"}
    assert seeds == set(range(LOOKS[0])), f"TABuv has runs of seeds {sorted(seeds)}"
    assert results() == finished, "the same command once more has changed a run"
    print(f"{len(finished)} runs finished; TABuv has {LOOKS[0]} seeds of the plan's {LOOKS[-1]}")


if __name__ == "__main__":
    main()
