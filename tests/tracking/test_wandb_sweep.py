"""W&B without an account: sweeps/wandb, and the W&B runs of our own sweeps."""

import json

import pytest
import yaml
from helpers import processes
from helpers.commands import Command
from wandb.util import get_core_path

from tiedlora.config.compose import compose_config
from tiedlora.places import PROJECT
from tiedlora.sweeps.expand import compose_sweep

CURVES = {"train/loss", "train/lr", "train/grad_norm", "train/tokens", "train/seconds", "validation/loss"}
"""What scripts/wandb_dashboard.py and W&B's own charts draw over steps."""
FILES = sorted((PROJECT / "sweeps" / "wandb").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_expanded_command_is_a_run_that_logs_the_metric(file):
    sweep = yaml.safe_load(file.read_text())
    # One draw: each parameter's first value or lower bound. Each must be a number after YAML, command line and Hydra.
    chosen = {key: spec["values"][0] if "values" in spec else spec["min"] for key, spec in sweep["parameters"].items()}
    assert all(not isinstance(spec.get("min"), str) for spec in sweep["parameters"].values())
    # As an agent expands it: ${args_no_hyphens} becomes KEY=VALUE words.
    words = {"${env}": ["/usr/bin/env"], "${program}": [sweep["program"]]}
    words["${args_no_hyphens}"] = [f"{key}={value}" for key, value in chosen.items()]
    expanded = [word for part in sweep["command"] for word in words.get(part, [part])]
    assert expanded[:3] == ["/usr/bin/env", "python", "train.py"]
    config = compose_config(expanded[3:])
    for key, value in chosen.items():
        node = config
        for name in key.split("."):
            node = getattr(node, name)
        assert getattr(node, "name", node) == value
    assert config.tracking.backend == "wandb"
    assert sweep["metric"]["name"] in CURVES
    assert pytest.importorskip("sweeps.config").schema_violations_from_proposed_config(sweep) == []


@pytest.mark.slow
def test_a_sweep_is_one_group_of_runs_with_names_and_tags(tiny_run):
    words = tiny_run("tying=LoRA", "rank=r2,r8", "tracking=wandb", "tracking.tags=[mine]")
    ended = Command("--multirun", *words).ended()
    assert ended.code == 0, ended.err
    sweep = compose_sweep(words)
    for cell, rank in zip(sweep.cells, ("r2", "r8"), strict=True):
        (logged,) = cell.folder.path.glob("wandb/offline-run-*")
        # As `wandb leet inspect --json` lists them, without the start of W&B's own CLI.
        (file,) = logged.glob("*.wandb")
        options = ("leet", "inspect", "--no-observability", "--json", "--run-file", file, logged.parent)
        done = processes.run([get_core_path(), *options], check=True)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        (run,) = [record["run"] for record in records if record["type"] == "run"]
        assert (run["run_id"], run["run_group"], run["job_type"]) == (cell.run_id, sweep.id, "train")
        assert run["display_name"] == f"LoRA {rank} chain_sum s0"
        assert run["tags"] == ["llama", "chain_sum", "LoRA", rank, "mine"]
        items = [record["history"]["item"] for record in records if record["type"] == "history"]
        assert {key for item in items for key in item} >= CURVES
        (table,) = logged.rglob("answers_*.table.json")
        assert {"prompt", "base", "answer"} <= set(json.loads(table.read_text())["columns"])
