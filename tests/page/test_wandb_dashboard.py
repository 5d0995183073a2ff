"""W&B workspaces are built offline and ask for keys that runs log."""

import json

import pytest
from helpers.report_runs import scored_run

from tiedlora.analysis.runs import read_runs
from tiedlora.errors import UserError
from tiedlora.page import wandb_dashboard
from tiedlora.records.summary import flat_summary

pytest.importorskip("wandb_workspaces")


@pytest.fixture
def runs(tmp_path):
    scored_run(tmp_path, [1.0, 0.0] * 10, [0.0] * 20, split="test")
    scored_run(tmp_path, [1.0, 0.0] * 10, [0.0] * 20, task="squad")
    return read_runs([tmp_path])[0]


def test_every_panel_asks_for_a_key_that_runs_log(runs):
    (workspace, _) = wandb_dashboard.workspaces(runs, "team", "tiedlora")
    text = json.dumps(wandb_dashboard.specification(workspace))
    (run,) = [run for run in runs if run.task == "chain_sum"]
    logged = flat_summary(run.record)
    for key in ("trainable_params", "test/exact_match_strict"):
        assert key in logged
        assert key in text
    for key in ("validation/loss", "train/loss", "tying", "rank"):
        assert key in text


def test_the_best_losses_are_the_lowest(runs):
    def scatters(keys):
        sections = wandb_dashboard._sections(keys)
        return {
            panel.title: panel for section in sections for panel in section.panels if hasattr(panel, "running_ymax")
        }

    plots = scatters(["test/target_loss", "test/exact_match_strict"])
    loss, score = (plots[f"test/{name} by trainable parameters"] for name in ("target_loss", "exact_match_strict"))
    assert (loss.running_ymin, loss.running_ymax) == (True, None)
    assert (score.running_ymin, score.running_ymax) == (None, True)


def test_each_tasks_workspace_filters_its_runs(runs):
    workspaces = wandb_dashboard.workspaces(runs, "team", "tiedlora")
    assert [workspace.name for workspace in workspaces] == ["Tied-LoRA: chain_sum", "Tied-LoRA: squad"]
    assert "squad" in json.dumps(wandb_dashboard.specification(workspaces[1])["spec"]["section"]["runSets"])


def test_mistakes_are_for_people(runs):
    with pytest.raises(UserError, match="no finished run"):
        wandb_dashboard.workspaces([], "team", "tiedlora")
    (workspace, _) = wandb_dashboard.workspaces(runs, "team", "tiedlora")
    with pytest.raises(UserError, match="WANDB_MODE"):
        wandb_dashboard.save(workspace)


def test_the_script_prints_workspaces(runs, tmp_path, script):
    code, out, _ = script("scripts/wandb_dashboard.py", tmp_path, "--entity", "team", "--json")
    assert code == 0
    assert len(json.loads(out)) == 2
