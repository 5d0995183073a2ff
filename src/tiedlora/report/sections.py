"""The section of one run on the page: its configuration, losses, command and some of its predictions.

All of it may contain text of a model or of a damaged record, so control characters become visible signs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from markupsafe import Markup
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiedlora.config import command, compose
from tiedlora.config.identity import run_id
from tiedlora.errors import UserError
from tiedlora.records.rows import PredictionRow, Score
from tiedlora.records.run_record import RunRecord
from tiedlora.report.groups import RunGroup
from tiedlora.report.runs import Run
from tiedlora.text import visible, visible_lines
from tiedlora.tying import PARTS

PREDICTIONS = 10
LONGEST = 700
"""The most characters of a prompt or an output that are shown. predictions/ has the rest."""


@dataclass(frozen=True)
class ShownPrediction:
    """One row of predictions as the page shows it."""

    id: str
    prompt: str
    output: str
    references: str
    scores: str


@dataclass(frozen=True)
class RunSection:
    """What the page shows of a group's first run."""

    name: str
    about: str
    facts: list[tuple[str, str]]
    curve: Markup
    command: str
    split: str
    predictions: list[ShownPrediction]
    no_predictions: str
    """Why there are no predictions."""


def run_section(group: RunGroup, split: str) -> RunSection:
    """The section of the group's run with the lowest seed."""
    run = group.runs[0]
    predictions, problem = _predictions(run, split)
    variant = f", {group.variant}" if group.variant else ""
    return RunSection(
        name=group.name,
        about=f"{group.task}, {group.model}, seed {run.seed}{variant}",
        facts=[(key, visible(value)) for key, value in _facts(group, run)],
        curve=curve(run),
        command=visible(_command(run)),
        split=split,
        predictions=predictions,
        no_predictions=problem,
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
        facts.append(("admission", "; ".join(record.admission.marks()) or "all checks passed"))
    return facts


def _command(run: Run) -> str:
    """The command that repeats the run, or where to look if this version of the code composes another run from it."""
    elsewhere = f"# this version of the code reads another run; its whole configuration is in {run.run_id}/config.yaml"
    try:
        config = compose.load(OmegaConf.create(run.record.config.tree))
    except (UserError, OmegaConfBaseException):
        return elsewhere
    return command.command(config) if run_id(config) == run.run_id else elsewhere


def _predictions(run: Run, split: str) -> tuple[list[ShownPrediction], str]:
    """Evenly spaced rows of predictions, or none and the reason."""
    try:
        rows = run.rows(split)
    except UserError as error:
        return [], str(error)
    step = max(1, len(rows) // PREDICTIONS)
    return [_shown_prediction(row) for row in rows[::step][:PREDICTIONS]], ""


def _shown_prediction(row: PredictionRow) -> ShownPrediction:
    return ShownPrediction(
        id=visible(row.id),
        prompt=_shortened(row.prompt),
        output=_shortened(row.output) if row.has_answer else f"({row.ended})",
        references=_shortened("\n".join(row.references)),
        scores=", ".join(_score(name, score) for name, score in row.scores.items()),
    )


def _score(name: str, score: Score) -> str:
    """The metric with its score. For a corpus metric only the name: its statistics say nothing about one row."""
    return visible(name) if isinstance(score, list) else f"{visible(name)} {score:.2f}".replace(".00", "")


def _shortened(text: str) -> str:
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"
    return visible_lines(text)


WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 560, 210, 46, 18, 8, 26
"""The size of a loss curve, and its margins."""


def curve(run: Run) -> Markup:
    """A run's losses by step as SVG, drawn in the page's own colours."""
    curves = {kind: run.curve(f"{kind}/loss") for kind in ("train", "validation")}
    steps = [step for own_steps, _ in curves.values() for step in own_steps]
    values = [value for _, own_values in curves.values() for value in own_values]
    if not steps:
        return Markup("<p>metrics.jsonl holds no losses.</p>")
    last, high, low = max(*steps, 1), max(values), min(values)
    floor = HEIGHT - BOTTOM
    across, down = (WIDTH - LEFT - RIGHT) / last, (floor - TOP) / ((high - low) or 1.0)
    lines = [
        Markup('<polyline class="{}" points="{}"/>').format(
            kind,
            " ".join(
                f"{LEFT + across * step:.1f},{TOP + down * (high - value):.1f}"
                for step, value in zip(*points, strict=True)
            ),
        )
        for kind, points in curves.items()
    ]
    label = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format
    labels = [
        label(LEFT - 6, TOP + 4, "end", f"{high:.3g}"),
        label(LEFT - 6, floor, "end", f"{low:.3g}"),
        label(WIDTH - RIGHT, HEIGHT - 8, "end", f"step {last}"),
        label(LEFT + 6, HEIGHT - 8, "start", "validation loss bold, training loss thin"),
    ]
    return Markup(
        '<svg class="curve" viewBox="0 0 {} {}" role="img" aria-label="losses by step">'
        '<line class="axis" x1="{}" y1="{}" x2="{}" y2="{}"/>'
        '<line class="axis" x1="{}" y1="{}" x2="{}" y2="{}"/>{}</svg>'
    ).format(
        *(WIDTH, HEIGHT, LEFT, TOP, LEFT, floor, LEFT, floor, WIDTH - RIGHT, floor),
        Markup("").join([*lines, *labels]),
    )
