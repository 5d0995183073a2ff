"""W&B workspaces for finished runs, one per task: Pareto, bars, curves by configuration, parallel coordinates.

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

INSTALL = "wandb-workspaces is not installed; run: pip install 'tiedlora[dashboard]'"
CONFIGURATION = "tying.name"
"""The key of a run's W&B configuration that panels group by."""


def workspaces(runs: Sequence[Run], entity: str, project: str) -> list[Any]:
    """One workspace for each task of the runs.

    Raises:
        UserError: wandb-workspaces is not installed, or there is no run.
    """
    try:
        ws: Any = importlib.import_module("wandb_workspaces.workspaces")
    except ImportError:
        raise UserError(f"wandb_dashboard: {INSTALL}") from None
    if not runs:
        raise UserError("wandb_dashboard: no finished run to take tasks and metrics from")
    built = []
    for task in sorted({run.task for run in runs}):
        scored = [run for run in runs if run.task == task]
        keys = [key for split in SPLIT_PREFERENCE for key in _keys(scored, split)]
        built.append(
            ws.Workspace(
                entity=entity,
                project=project,
                name=f"Tied-LoRA: {task}",
                sections=_sections(keys),
                settings=ws.WorkspaceSettings(x_axis="Step"),
                runset_settings=ws.RunsetSettings(
                    filters=[ws.Config("task.name") == task],
                    groupby=[ws.Config(CONFIGURATION), ws.Config("rank.r")],
                ),
            )
        )
    return built


def _keys(runs: Sequence[Run], split: str) -> list[str]:
    """Summary keys of a split's metrics, the task's first metric first."""
    metrics = next((list(run.splits[split].metrics) for run in runs if split in run.splits), [])
    return [f"{split}/{name}" for name in metrics]


def _sections(keys: Sequence[str]) -> list[Any]:
    # importlib is used because type checkers do not find the names that the package re-exports.
    wr: Any = importlib.import_module("wandb_workspaces.reports.v2")
    ws: Any = importlib.import_module("wandb_workspaces.workspaces")
    summary, config = wr.SummaryMetric, wr.Config
    pareto = [
        wr.ScatterPlot(
            title=f"{key} by trainable parameters",
            x=summary("trainable_params"),
            y=summary(key),
            log_x=True,
            **{"running_ymin" if is_loss(key.rpartition("/")[2]) else "running_ymax": True},
        )
        for key in keys
    ]
    bars = [
        wr.BarPlot(
            title=f"{key} by configuration",
            metrics=[key],
            groupby=config(CONFIGURATION),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
        )
        for key in keys
    ]
    curves = [
        wr.LinePlot(
            title=title,
            x="Step",
            y=[key],
            groupby=config(CONFIGURATION),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )
        for title, key in (("validation loss", "validation/loss"), ("training loss", "train/loss"))
    ]
    column = wr.ParallelCoordinatesPlotColumn
    choices = wr.ParallelCoordinatesPlot(
        title="choices and scores",
        columns=[
            column(metric=config(CONFIGURATION)),
            column(metric=config("rank.r"), log=True),
            column(metric=config("train.lr"), log=True),
            column(metric=summary("trainable_params"), log=True),
            *(column(metric=summary(key)) for key in keys[:2]),
        ],
    )
    cost = [
        wr.ScatterPlot(title=f"{keys[0]} by {title}", x=summary(key), y=summary(keys[0]))
        for title, key in (("peak memory", "training/peak_memory_bytes"), ("tokens/s", "training/tokens_per_s"))
        if keys
    ]
    return [
        ws.Section("Score by trainable parameters (Pareto)", pareto, is_open=True),
        ws.Section("Bars", bars, is_open=True),
        ws.Section("Curves by configuration", curves, is_open=True),
        ws.Section("Parallel coordinates", [choices], is_open=True),
        ws.Section("Cost", cost),
    ]


def specification(workspace: Any) -> Any:
    """The data that would be sent to W&B, as plain data."""
    return workspace._to_model().model_dump(mode="json", by_alias=True)


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
