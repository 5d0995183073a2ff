"""A W&B report of the claims: the verdicts with their reasons, and below them each task's panels.

It is built without account or network, from the same answers as the page of scripts/report.py.
"""

from __future__ import annotations

import importlib
from typing import Any

from tiedlora.analysis.claim_verdicts import error_note
from tiedlora.page import formats, tables, wandb_dashboard
from tiedlora.page.write import Report

TITLE = "Tied-LoRA: verdicts on the claims"


def claims_report(report: Report, entity: str, project: str) -> Any:
    """The W&B report of these answers.

    Raises:
        UserError: wandb-workspaces is not installed, or there is no run.
    """
    workspaces = wandb_dashboard.workspaces(report.runs, entity, project)
    wr: Any = importlib.import_module("wandb_workspaces.reports.v2")
    blocks: list[Any] = [wr.P(report.summary()), wr.P(error_note(report.answers)), wr.H2("Verdicts")]
    for verdict in report.verdicts:
        where = f" ({verdict.model})" if verdict.model else ""
        blocks.append(wr.P(f"{str(verdict.verdict).upper()}: {verdict.claim.name}{where}. {verdict.reason}."))
    blocks += [wr.H2("Every claim on every task"), wr.MarkdownBlock(formats.to_markdown(tables.claims(report.answers)))]
    for workspace in workspaces:
        blocks.append(wr.H2(workspace.name))
        # Without a project of its own, a set of runs has the report's; with one, the package would ask the server.
        filters, groups = workspace.runset_settings.filters, ["config.tying.name", "config.rank.r"]
        runset = wr.Runset(name="runs", filters=filters, groupby=groups)
        panels = [panel for section in workspace.sections for panel in section.panels if section.is_open]
        blocks.append(wr.PanelGrid(runsets=[runset], panels=panels))
    return wr.Report(project=project, entity=entity, title=TITLE, description=report.summary(), blocks=blocks)


def specification(report: Any) -> Any:
    """The data that would be sent to W&B, as plain data."""
    return report._to_model().model_dump(mode="json", by_alias=True)


def save(report: Any) -> str:
    """Save a report to W&B and return its address.

    Raises:
        UserError: there is no account on this machine, or W&B refuses.
    """
    return wandb_dashboard.save(report)
