"""python tests/drills/launchers.py [--launchers basic joblib ...] [--model smollm2_135m] [--folder /tmp/launchers]

The same four cells run under each launcher, two at a time if it can run several. Adapters, records and predictions must
have the same bytes, except for times. ray and submitit need their extras (pip install 'tiedlora[ray,slurm]').
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_sweep import overrides_of_a_short_cell, results

from tiedlora.config.project import PROJECT

CELLS = ["tying=LoRA,TABuv", "seed=0,1"]
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib_slots", "hydra.launcher.n_jobs=2"],
    "ray": ["hydra/launcher=ray_tasks", "+hydra.launcher.ray.init.num_cpus=2"],
    "submitit": ["hydra/launcher=submitit_slots", "hydra.launcher.jobs_at_once=2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--folder", type=Path, help="where the sweeps go; a new temporary folder if left out")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="launchers-"))
    for name in arguments.launchers:
        words = [*overrides_of_a_short_cell(arguments.model, folder / name), *CELLS, *LAUNCHERS[name]]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(PROJECT / "train.py"), "--multirun", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=PROJECT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        cells = len(results(folder / name))
        assert cells == 4
        print(f"{name:<9} {cells} cells in {time.monotonic() - started:.0f} s", flush=True)
    compared = [name for name in LAUNCHERS if (folder / name).exists()]
    for name in compared[1:]:
        assert results(folder / name) == results(folder / compared[0]), f"{name} differs from {compared[0]}"
    print(f"identical: {', '.join(compared)}")


if __name__ == "__main__":
    main()
