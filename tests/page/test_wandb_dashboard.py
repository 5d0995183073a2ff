"""W&B workspaces are built offline and ask for keys that runs log."""

import json
import re

import pytest
from helpers.report_runs import scored_run

from tiedlora.analysis.runs import read_runs
from tiedlora.errors import UserError
from tiedlora.page import wandb_dashboard
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.summary import flat_summary

pytest.importorskip("wandb_workspaces")


@pytest.fixture
def runs(tmp_path):
    scored_run(tmp_path, [1.0, 0.0] * 10, [0.0] * 20, split="test")
    scored_run(tmp_path, [0.5] * 20, metric="target_loss", task="squad")
    return read_runs([tmp_path])[0]


def test_a_workspace_for_each_task_asks_for_keys_that_runs_log_and_the_best_loss_is_the_lowest(runs, tmp_path, script):
    code, out, _ = script("scripts/wandb_dashboard.py", tmp_path, "--entity", "team", "--json")
    assert code == 0
    texts = [json.dumps(workspace) for workspace in json.loads(out)]
    for run, text, metric in zip(runs, texts, ("test/exact_match_strict", "validation/target_loss"), strict=True):
        assert f"Tied-LoRA: {run.task}" in text
        for key in ("trainable_params", metric):
            assert key in flat_summary(run.record, run.scores)
            assert key in text
        assert "tying" in text
        best = "showMinYAxisLine" if is_loss(metric.partition("/")[2]) else "showMaxYAxisLine"
        assert re.findall(r'"(\w+YAxisLine)": true', text) == [best]


def test_mistakes_are_for_people(runs):
    with pytest.raises(UserError, match="no finished run"):
        wandb_dashboard.workspaces([], "team", "tiedlora")
    (workspace, _) = wandb_dashboard.workspaces(runs, "team", "tiedlora")
    with pytest.raises(UserError, match="WANDB_MODE"):
        wandb_dashboard.save(workspace)
