"""The section of one run on the page: its configuration, its command, and the link to its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.runs import Run
from tiedlora.config import command, compose
from tiedlora.config.identity import run_id
from tiedlora.errors import UserError
from tiedlora.page.browser import Sheet
from tiedlora.records.run_record import RunRecord
from tiedlora.tying import PARTS


@dataclass(frozen=True)
class RunSection:
    """What the page shows of a group's first run."""

    name: str
    about: str
    marks: list[str]
    facts: list[tuple[str, str]]
    command: str
    answers: str
    """The link to its answers in the page; empty if they are not there."""


def run_section(group: RunGroup, sheets: Sequence[Sheet] = ()) -> RunSection:
    """The section of the group's run with the lowest seed.

    Args:
        sheets: the answers in the page.
    """
    run = group.runs[0]
    variant = f", {group.variant}" if group.variant else ""
    return RunSection(
        name=group.name,
        about=f"{group.task}, {group.model}, seed {run.seed}{variant}",
        marks=group.short_marks,
        facts=_facts(group, run),
        command=_command(run),
        answers=next((link for sheet in sheets if (link := sheet.link(run.run_id))), ""),
    )


def _facts(group: RunGroup, run: Run) -> list[tuple[str, str]]:
    record, training, identity = run.record, run.record.training, run.record.identity
    trained = [part for part in PARTS if identity.tying.get(part, {}).get("trained")]
    return [
        ("run", run.run_id),
        ("base model", f"{record.base.name} ({record.base.digest})"),
        ("trained", identity.tying.get("method") or ", ".join(trained)),
        *_arm_facts(record),
        ("trainable parameters", f"{run.params:,} ({100 * group.share:.2f} % of LoRA)"),
        ("learning rate", ", ".join(f"{lr:g}" for lr in group.rates) + f"; chosen {group.lr:g}"),
        ("seeds", ", ".join(str(member.seed) for member in group.runs)),
        ("steps, batch", f"{training.steps} of {identity.tree['train'].get('batch_size')} rows"),
        ("validation loss", f"{training.validation_loss_first:.3f} → {training.validation_loss_last:.3f}"),
        ("speed", f"{training.tokens_per_s:,.0f} tokens/s, {training.seconds:,.0f} s, {record.execution}"),
        *((f"until step {part.step}", f"{part.code}, {part.execution}") for part in training.continued_from or ()),
        ("commit", f"{record.code.commit}{' with changes' if record.code.dirty else ''}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
    ]


def _arm_facts(record: RunRecord) -> list[tuple[str, str]]:
    """What only an arm of another method has."""
    if not record.is_other_method:
        return []
    arguments = record.identity.tying.get("resolved")
    facts = [
        ("arguments", json.dumps(arguments, sort_keys=True)),
        ("stored numbers", f"{record.stored_params or record.trainable_params:,}"),
    ]
    if record.admission is not None:
        facts.append(("admission", "; ".join(record.admission.marks().values()) or "all checks passed"))
    return facts


def _command(run: Run) -> str:
    """The command that repeats the run, or where to look if this version of the code composes another run from it."""
    elsewhere = f"# this version of the code reads another run; its whole configuration is in {run.run_id}/config.yaml"
    try:
        config = compose.load(OmegaConf.create(run.record.config.tree))
        return command.command(config) if run_id(config) == run.run_id else elsewhere
    except (UserError, OmegaConfBaseException):
        return elsewhere
