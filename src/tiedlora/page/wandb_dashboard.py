"""W&B workspaces for finished runs, one per task: scores against parameters, and W&B's own panels by configuration.

They are built from the runs' records, so the panels use exactly the keys that runs log (records.summary.flat_summary).
Building them needs no account and no network; only saving does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from tiedlora.analysis.runs import Run
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss


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
        raise UserError(
            "wandb_dashboard: wandb-workspaces is not installed; run: pip install 'tiedlora[dashboard]'"
        ) from None
    if not runs:
        raise UserError("wandb_dashboard: no finished run to take tasks and metrics from")
    built = []
    for task in sorted({run.task for run in runs}):
        scored = [
            (split, run.scores.metrics(split)) for split in ("test", "validation") for run in runs if run.task == task
        ]
        keys = dict.fromkeys(f"{split}/{name}" for split, metrics in scored for name in metrics)
        plots = []
        for key in keys:
            best = {"running_ymin" if is_loss(key.rpartition("/")[2]) else "running_ymax": True}
            x, y = wr.SummaryMetric("trainable_params"), wr.SummaryMetric(key)
            plots.append(wr.ScatterPlot(title=f"{key} by trainable parameters", x=x, y=y, log_x=True, **best))
        filters, by = [ws.Config("task.name") == task], [ws.Config("tying.name"), ws.Config("rank.r")]
        built.append(
            ws.Workspace(
                entity=entity,
                project=project,
                name=f"Tied-LoRA: {task}",
                sections=[ws.Section("Score by trainable parameters (Pareto)", plots, is_open=True)],
                settings=ws.WorkspaceSettings(x_axis="Step"),
                runset_settings=ws.RunsetSettings(filters=filters, groupby=by),
                auto_generate_panels=True,
            )
        )
    return built


def save(workspace: Any) -> str:
    """Save a workspace to W&B and return its address.

    Raises:
        UserError: there is no account on this machine, or W&B refuses.
    """
    # An optional package that takes a second to import, and that only saving needs.
    import wandb  # noqa: PLC0415

    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        raise UserError("wandb_dashboard: WANDB_MODE keeps W&B offline; unset it to save, or use --json")
    try:
        return str(workspace.save().url)
    except (wandb.errors.Error, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"wandb_dashboard: cannot save ({reason}); `wandb login` first, or use --json") from None
