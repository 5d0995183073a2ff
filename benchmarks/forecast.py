"""python benchmarks/forecast.py [--steps 120]: the forecast of scripts/sweep.py plan, and what the sweep then took.

The sweep has four cells of SmolLM2-135M (LoRA and TABuv at two seeds), which run one after the other in a fresh folder.
There are two forecasts: one before anything has run, from arithmetic at a stated rate, and one from the first cell. The
first says at which rate it would have been right; the second is compared to the other three cells. Use a quiet machine.
The script ends with an error if the second is off by more than 25 %.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

LIMIT = 0.25
SWEEP = ["tying=LoRA,TABuv", "seed=0,1", "train=quick", "task.rows.validation=64"]


def hours(words: list[str]) -> Any:
    """The only row of the sweep's forecast."""
    from tiedlora.sweeps.expand import compose_sweep
    from tiedlora.sweeps.forecast import forecast

    ((row,), _) = forecast(compose_sweep(words).cells)
    return row


def seconds(*arguments: str) -> float:
    """The time of one command from its start to its end."""
    started = time.perf_counter()
    command = [sys.executable, str(common.PROJECT / "train.py"), *arguments]
    subprocess.run(command, env=common.environment(), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    from tiedlora.sweeps.forecast import TFLOPS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # A fresh cache, so that the base model is scored too. The converted model is made by the first command.
        words = [*SWEEP, f"model={arguments.model}", f"train.steps={arguments.steps}", f"outputs={folder}/outputs"]
        words.append(f"cache={folder}/cache")
        prepare = ["train.steps=1", "train.warmup_steps=0", "train.validate_every=0", "score.splits=[]"]
        start = seconds(*prepare, f"model={arguments.model}", f"outputs={folder}/prepare", f"cache={folder}/cache")
        before = hours(words)
        first = [word.split(",")[0] for word in words]
        took_first = seconds(*first)
        after = hours(words)
        took_rest = seconds("--multirun", *words)
    took = took_first + took_rest
    error, right = after.seconds_left / took_rest - 1, TFLOPS * before.seconds / took
    rows = [
        ["before the first run", f"{before.seconds:.0f}", f"{took:.0f}", f"right at {right:.2f} TFLOP/s"],
        ["after the first cell", f"{after.seconds_left:.0f}", f"{took_rest:.0f}", f"off by {error:+.0%}"],
    ]
    print(f"a command with one step takes {start:.0f} s here; forecasts do not include the start\n")
    print(common.table(["forecast", "seconds", "it took", ""], rows))
    print(f"\n{before.source}\n{after.source}")
    common.write(arguments.json, {"rows": rows, "before": before.source, "after": after.source})
    if abs(error) > LIMIT:
        sys.exit(f"the forecast is off by more than {LIMIT:.0%}")


if __name__ == "__main__":
    main()
