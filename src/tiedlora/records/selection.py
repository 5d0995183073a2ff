"""The chosen learning rates of a sweep: the scores that rates are compared by, and selection.json as typed values.

selection.json lies beside the sweep's frozen cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from tiedlora import storage
from tiedlora.reading import Flag, StoredCount, StoredNumber, StoredText, StoredWhole, read_typed
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.scores import Finished

SELECTION_FILE = "selection.json"
LOSS = "validation/loss"
"""The metric of a choice by loss."""


@dataclass(frozen=True)
class RateChoice:
    """The chosen rate of one model, task, configuration and rank, and the trials that chose it."""

    model: StoredText
    task: StoredText
    configuration: StoredText
    rank: StoredWhole
    lr: StoredNumber
    lrs: list[StoredNumber]
    """The rates that were tried, in ascending order."""
    metric: StoredText
    """The metric that chose: that of `validation_metric`, or LOSS."""
    value: StoredNumber
    """Mean over the selection seeds, on validation."""
    seeds: StoredCount
    """The number of runs at the chosen rate."""
    trials: StoredCount
    """The number of runs that were tried, failed and stopped ones included. It is the effort of the search."""
    failed: StoredCount
    edge: Flag
    """Whether the chosen rate is the lowest or highest of those tried. Then the best rate may be outside them."""
    run_ids: list[StoredText]
    """The runs of the chosen rate, one for each seed."""
    test: StoredNumber | None = None
    """Mean over the seeds on test, once it is scored."""
    test_metric: StoredText = ""
    """The metric of `test`: the one that chose if test has it, otherwise the task's first."""
    selection_seeds: list[StoredWhole] = field(default_factory=list)
    """The seeds that the rate was compared on."""
    tied: list[StoredNumber] = field(default_factory=list)
    """The rates that a race could not tell from the chosen one."""

    @property
    def by(self) -> str:
        """What chose the rate: the validation loss or a score."""
        return "loss" if self.metric == LOSS else "score"


@dataclass(frozen=True)
class SearchDecision:
    """One decision of the staged sweeper, with its reason."""

    lr: StoredNumber
    action: StoredText
    """stopped, diverged, outward (the rate joined beyond an edge), edge (no rate joined), finalist, behind (it left the
    race), finer (the rate joined between the two best that a race left), tied (the race ended with more than one rate),
    chosen, fallback (chosen because a better one diverged), or none (no rate is left)."""
    reason: StoredText
    seed: StoredWhole | None = None
    step: StoredWhole | None = None
    """The step of training after which the run stopped."""


@dataclass(frozen=True)
class RateSearch:
    """How the staged sweeper searched the rate of one configuration."""

    group: StoredText
    """Configuration, rank, task and model in words."""
    seeds: list[StoredWhole]
    """In the order of use. Without `search_seeds`, the first two search."""
    rungs: list[StoredWhole]
    """The steps at which rates could stop."""
    lowest: StoredNumber
    """The bounds of rates outside the grid."""
    highest: StoredNumber
    decisions: list[SearchDecision]
    search_seeds: list[StoredWhole] = field(default_factory=list)
    """The seeds at which rates were compared, if the sweep names them."""
    race_level: StoredNumber | None = None
    """The level at which a rate left the race, if there was one."""
    race_within: StoredNumber | None = None
    """How level the rates had to be for the race to end, in nats. Races of an earlier version had no such end."""


SEARCH_OPTIONS = tuple(item.name for item in fields(RateSearch) if item.name not in ("group", "decisions"))
"""What a search was told: with other values it may decide otherwise."""


@dataclass(frozen=True)
class Selection:
    """The choices for a sweep."""

    sweep: StoredText
    """The sweep's id."""
    by: StoredText
    """The criterion: `score` or `loss`."""
    choices: list[RateChoice]
    searches: list[RateSearch] = field(default_factory=list)
    """The decisions of the staged sweeper, for each configuration; empty after a plain sweep."""


def write_selection(path: Path, selection: Selection) -> None:
    """Write a selection.json, completely or not at all. One that is the same stays."""
    storage.write_changed(path, storage.json_bytes(asdict(selection)))


def read_selection(path: Path) -> Selection:
    """The selection in a selection.json.

    Raises:
        UserError: a key is missing or wrong; the message names the file and the key.
    """
    return read_typed(path, Selection, "a sweep's selection")


def validation_metric(runs: Iterable[Finished]) -> str | None:
    """The metric on validation by which runs can be compared; None if they do not all have the same one.

    It is the reward of a run that was trained from one, and otherwise the task's first. Runs without a score on
    validation do not count.
    """
    found = {
        run.record.identity.objective.get("metric") or first
        for run in runs
        if (first := run.scores.first_metric("validation")) is not None
    }
    return found.pop() if len(found) == 1 else None


def validation_scores(runs: Mapping[int, Finished], metric: str | None) -> dict[int, float]:
    """Seed -> the score on validation by this metric, where more is better: a loss is negated.

    Args:
        metric: None gives no scores.
    """
    if metric is None:
        return {}
    own = {seed: run.scores.metrics("validation") for seed, run in runs.items()}
    sign = -1 if is_loss(metric) else 1
    return {seed: sign * metrics[metric].value for seed, metrics in own.items() if metric in metrics}
