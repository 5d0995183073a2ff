"""W&B workspaces for finished runs, one per task: Pareto, bars, and curves by configuration.

They are built from the runs' records, so the panels use exactly the keys that runs log (records.summary.flat_summary
and metrics.jsonl). To build them needs no account and no network; only to save them does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from tiedlora.analysis.compare import SPLIT_PREFERENCE
from tiedlora.analysis.runs import Run
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss

MISSING = "wandb_dashboard: wandb-workspaces is not installed; run: pip install 'tiedlora[dashboard]'"
CONFIGURATION = "tying.name"
"""The key of a run's W&B configuration that panels group by."""


def workspaces(runs: Sequence[Run], entity: str, project: str) -> list[Any]:
    """One workspace for each task of the runs.

    Raises:
        UserError: wandb-workspaces is not installed, or there is no run.
    """
    # importlib is used because type checkers do not find the names that the packages re-export.
    try:
        wr: Any = importlib.import_module("wandb_workspaces.reports.v2")
        ws: Any = importlib.import_module("wandb_workspaces.workspaces")
    except ImportError:
        raise UserError(MISSING) from None
    if not runs:
        raise UserError("wandb_dashboard: no finished run to take tasks and metrics from")
    built = []
    for task in sorted({run.task for run in runs}):
        splits = [(split, run.splits.get(split)) for split in SPLIT_PREFERENCE for run in runs if run.task == task]
        keys = list(dict.fromkeys(f"{split}/{name}" for split, scores in splits if scores for name in scores.metrics))
        built.append(
            ws.Workspace(
                entity=entity,
                project=project,
                name=f"Tied-LoRA: {task}",
                sections=[ws.Section(name, panels, is_open=True) for name, panels in _panels(wr, keys).items()],
                settings=ws.WorkspaceSettings(x_axis="Step"),
                runset_settings=ws.RunsetSettings(
                    filters=[ws.Config("task.name") == task],
                    groupby=[ws.Config(CONFIGURATION), ws.Config("rank.r")],
                ),
            )
        )
    return built


def _panels(wr: Any, keys: Sequence[str]) -> dict[str, list[Any]]:
    """The name of a section -> its panels, of these keys of the runs' summaries."""
    grouped, scatters = {"groupby": wr.Config(CONFIGURATION), "groupby_aggfunc": "mean"}, []
    for key in keys:
        best = {"running_ymin" if is_loss(key.rpartition("/")[2]) else "running_ymax": True}
        x, y = wr.SummaryMetric("trainable_params"), wr.SummaryMetric(key)
        scatters.append(wr.ScatterPlot(title=f"{key} by trainable parameters", x=x, y=y, log_x=True, **best))
    return {
        "Score by trainable parameters (Pareto)": scatters,
        "Bars": [
            wr.BarPlot(title=f"{key} by configuration", metrics=[key], groupby_rangefunc="stddev", **grouped)
            for key in keys
        ],
        "Curves by configuration": [
            wr.LinePlot(title=title, x="Step", y=[key], groupby_rangefunc="minmax", **grouped)
            for title, key in (("validation loss", "validation/loss"), ("training loss", "train/loss"))
        ],
    }


def save(workspace: Any) -> str:
    """Save a workspace to W&B and return its address.

    Raises:
        UserError: there is no account on this machine, or W&B refuses.
    """
    # An optional package that takes a second to import, and that only saving needs.
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        raise UserError("wandb_dashboard: WANDB_MODE keeps W&B offline; unset it to save, or use --json")
    try:
        return str(workspace.save().url)
    except (wandb.errors.Error, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"wandb_dashboard: cannot save ({reason}); `wandb login` first, or use --json") from None
