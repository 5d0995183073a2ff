"""W&B without an account: sweeps/wandb, and what a sweep of ours looks like there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tiedlora.config import compose as configuration
from tiedlora.config.identity import run_id
from tiedlora.records.run_folder import RunFolder
from tiedlora.sweeps import expand

PROJECT = Path(__file__).parents[2]
FILES = sorted((PROJECT / "sweeps" / "wandb").glob("*.yaml"))


def values(sweep: dict) -> dict[str, object]:
    """One draw: each parameter's first value or lower bound."""
    return {key: spec["values"][0] if "values" in spec else spec["min"] for key, spec in sweep["parameters"].items()}


def command(sweep: dict, chosen: dict[str, object]) -> list[str]:
    """As an agent expands it: ${args_no_hyphens} becomes KEY=VALUE words."""
    words = {"${env}": ["/usr/bin/env"], "${program}": [sweep["program"]]}
    words["${args_no_hyphens}"] = [f"{key}={value}" for key, value in chosen.items()]
    return [word for part in sweep["command"] for word in words.get(part, [part])]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_schema_is_wandbs(file):
    check = pytest.importorskip("sweeps.config").schema_violations_from_proposed_config
    assert check(yaml.safe_load(file.read_text())) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_expanded_command_runs_and_logs_the_metric(file, tiny_run, tmp_path):
    sweep = yaml.safe_load(file.read_text())
    chosen = values(sweep)
    # Every value must survive YAML, the command line and Hydra as a number; the names are options or keys.
    assert all(not isinstance(spec.get("min"), str) for spec in sweep["parameters"].values())
    expanded = command(sweep, chosen)
    assert expanded[:3] == ["/usr/bin/env", "python", "train.py"]
    assert "--multirun" not in expanded
    small = tiny_run()
    offline(*expanded[2:], *small)
    config = configuration.compose_config([*expanded[3:], *small])
    for key, value in chosen.items():
        node = config
        for name in key.split("."):
            node = getattr(node, name)
        assert getattr(node, "name", node) == value
    folder = RunFolder(Path(config.outputs) / run_id(config))
    logged = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert any(sweep["metric"]["name"] in row for row in logged)
    assert list(folder.path.glob("wandb/offline-run-*"))


def offline(*words: str) -> None:
    """Python on these words, as a person without an account calls it; it must end well."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_a_sweep_is_one_group_of_runs_with_names_and_tags(tiny_run):
    words = tiny_run("tying=LoRA,TABuv", "rank=r2,r8", "tracking=wandb", "tracking.tags=[mine]")
    offline("train.py", "--multirun", *words)
    found = expand.compose_sweep(words)
    for cell, (tying, rank) in zip(found.cells, [(t, r) for t in ("LoRA", "TABuv") for r in ("r2", "r8")], strict=True):
        (logged,) = cell.folder.path.glob("wandb/offline-run-*")
        records = subprocess.run(
            [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(logged)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        (run,) = [r["run"] for r in map(json.loads, records.stdout.splitlines()) if r["type"] == "run"]
        assert (run["run_id"], run["run_group"], run["job_type"]) == (cell.run_id, found.id, "train")
        assert run["display_name"] == f"{tying} {rank} chain_sum s0"
        assert run["tags"] == ["llama", "chain_sum", tying, rank, "mine"]
