"""A fair comparison: a learning rate for every configuration, chosen on validation, and test scores only for these.

The choice is stored in selection.json, beside the sweep's frozen cells.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from tiedlora import storage
from tiedlora.config.identity import identity
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.reading import Count, Flag, Number, Text, Whole, typed
from tiedlora.records.run_record import RunRecord
from tiedlora.runs import lazy
from tiedlora.sweeps.cells import Sweep, SweepCell
from tiedlora.text import aligned

log = logging.getLogger(__name__)

CRITERIA = ("score", "loss")
"""The criteria of the choice: the task's first metric on validation, or the validation loss."""
LOSS = "validation/loss"
COLUMNS = (
    "model",
    "task",
    "configuration",
    "rank",
    "lr",
    "of rates",
    "validation",
    "seeds",
    "trials",
    "failed",
    "test",
)
EDGE_REMARK = "at the edge of the grid"


@dataclass(frozen=True)
class RateChoice:
    """The chosen rate of one model, task, configuration and rank, and the trials that chose it."""

    model: Text
    task: Text
    configuration: Text
    rank: Whole
    lr: Number
    lrs: list[Number]
    """The grid's rates, in ascending order."""
    metric: Text
    """The metric that chose: the task's first, or LOSS."""
    value: Number
    """Mean over the seeds, on validation."""
    seeds: Count
    trials: Count
    """The number of cells that were tried: rates times seeds, failed cells included."""
    failed: Count
    edge: Flag
    """Whether the chosen rate is the grid's lowest or highest. Then the best rate may be outside the grid."""
    run_ids: list[Text]
    """The runs of the chosen rate, one for each seed."""
    test: Number | None = None
    """Mean over the seeds of the metric on test, once it is scored."""


@dataclass(frozen=True)
class Selection:
    """The choices of `select` for a sweep."""

    sweep: Text
    """The sweep's id."""
    by: Text
    """One of CRITERIA."""
    choices: list[RateChoice]


@dataclass(frozen=True)
class _RateResult:
    """The validation scores of a rate, as means over the seeds. Every seed has finished."""

    lr: float
    loss: float
    metric: str
    value: float

    def order(self) -> tuple[float, float, float]:
        """A sort key that puts the best rate first. For equal scores, the lower loss is better, then the lower rate."""
        lower_is_better = self.metric == LOSS or is_loss(self.metric)
        return (self.value if lower_is_better else -self.value), self.loss, self.lr


def select_rates(sweep: Sweep, by: str = "score") -> Selection:
    """Choose a rate for each configuration by its mean over the seeds.

    A rate counts only if all its seeds finished, because a rate that diverges at one seed should not be used. For equal
    scores, the lower validation loss is better, then the lower rate.

    Args:
        by: one of CRITERIA.

    Raises:
        UserError: cells are not finished, no rate of a configuration finished at every seed, or a run has no validation
            scores.
    """
    unfinished = sum(cell.state() not in ("done", "failed") for cell in sweep.cells)
    if unfinished:
        raise UserError(
            f"{sweep.id}: {unfinished} of {len(sweep.cells)} cells are not finished; run the sweep's command first"
        )
    groups: dict[str, list[SweepCell]] = {}
    for cell in sweep.cells:
        groups.setdefault(_comparison_key(cell), []).append(cell)
    return Selection(sweep.id, by, [_choose_rate(cells, by) for cells in groups.values()])


def _comparison_key(cell: SweepCell) -> str:
    """The values that change the result, except the rate and the seed."""
    tree = identity(cell.config)
    del tree["seed"], tree["train"]["lr"]
    return json.dumps(tree, sort_keys=True)


def _choose_rate(cells: list[SweepCell], by: str) -> RateChoice:
    """The choice among cells that differ only in rate and seed."""
    by_rate: dict[float, list[SweepCell]] = {}
    for cell in cells:
        by_rate.setdefault(cell.parameters().lr, []).append(cell)
    results, failed = [], 0
    for lr, seeds in by_rate.items():
        records = [record for cell in seeds if (record := cell.folder.record()) is not None]
        failed += len(seeds) - len(records)
        if len(records) == len(seeds):
            results.append(_rate_result(lr, records, by))
    named = cells[0].parameters()
    if not results:
        raise UserError(
            f"{named.configuration} r={named.rank} on {named.task}, {named.model}: no rate finished at every seed; "
            "add lower ones with train.lr="
        )
    best = min(results, key=_RateResult.order)
    lrs = sorted(by_rate)
    return RateChoice(
        model=named.model,
        task=named.task,
        configuration=named.configuration,
        rank=named.rank,
        lr=best.lr,
        lrs=lrs,
        metric=best.metric,
        value=best.value,
        seeds=len(by_rate[best.lr]),
        trials=len(cells),
        failed=failed,
        edge=best.lr in (lrs[0], lrs[-1]),
        run_ids=sorted(cell.run_id for cell in by_rate[best.lr]),
    )


def _rate_result(lr: float, records: list[RunRecord], by: str) -> _RateResult:
    loss = mean(record.training.validation_loss_last for record in records)
    if by == "loss":
        return _RateResult(lr, loss, LOSS, loss)
    scores = [record.scores["validation"] for record in records if "validation" in record.scores]
    if len(scores) < len(records):
        raise UserError("select: not every run is scored on validation (score.splits); choose by loss with --by loss")
    metric = scores[0].first_metric
    return _RateResult(lr, loss, metric, mean(split.metrics[metric].value for split in scores))


def score_test(sweep: Sweep, selection: Selection) -> Selection:
    """Score only the chosen runs on test. Runs that already have test scores are not scored again.

    Returns:
        The selection with the choices' scores on test.

    Raises:
        UserError: a run's folder is damaged, or the rows of test cannot be loaded.
    """
    cells = {cell.run_id: cell for cell in sweep.cells}
    choices = []
    for choice in selection.choices:
        scores = [_test_score(cells[run_id], choice.metric) for run_id in choice.run_ids]
        choices.append(replace(choice, test=mean(scores)))
    return replace(selection, choices=choices)


def _test_score(cell: SweepCell, metric: str) -> float:
    """The run's value of the metric on test. If the loss was the criterion, it is the task's first metric."""
    record = cell.folder.finished_record()
    if "test" not in record.scores:
        log.info("scoring %s on test", cell.run_id)
        record = lazy.add_scores(cell.folder, ["test"], cell.config.data_root, cell.config, cell.config.score.metrics)
    scores = record.scores["test"]
    return scores.metrics[metric if metric in scores.metrics else scores.first_metric].value


def selection_file(sweep: Sweep) -> Path:
    """The path of a sweep's selection.json."""
    return sweep.path / "selection.json"


def write_selection(sweep: Sweep, selection: Selection) -> None:
    """Write selection.json beside the sweep's frozen cells.

    Raises:
        OSError: the disk is full, or there is no permission.
    """
    storage.write_json(selection_file(sweep), asdict(selection))


def read_selection(path: Path) -> Selection:
    """The selection in a selection.json.

    Raises:
        UserError: a key is missing or wrong; the message names the file and the key.
    """
    tree = storage.read_json(path)
    try:
        return typed(Selection, tree, what="a sweep's selection")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def table(choices: Sequence[RateChoice]) -> str:
    """The choices as a table, with notes that a reader needs before a comparison."""
    text = [aligned([[*COLUMNS, ""], *map(_table_row, choices)])]
    if any(choice.edge for choice in choices):
        text.append("")
        text.append(
            "A rate at the edge of the grid may not be the best: add rates beyond it with train.lr= and select again."
        )
    trials: dict[tuple[str, str], set[int]] = {}
    for choice in choices:
        trials.setdefault((choice.model, choice.task), set()).add(choice.trials)
    for (model, task), counts in trials.items():
        if len(counts) > 1:
            text.append(
                f"{model} on {task}: {min(counts)} to {max(counts)} trials a configuration: not a fair comparison."
            )
    return "\n".join(text)


def _table_row(choice: RateChoice) -> list[str]:
    value = _shown(choice.value, choice.metric)
    test = "" if choice.test is None else _shown(choice.test, "" if choice.metric == LOSS else choice.metric)
    return [
        *(choice.model, choice.task, choice.configuration, str(choice.rank)),
        *(f"{choice.lr:g}", str(len(choice.lrs)), value),
        *(str(choice.seeds), str(choice.trials), str(choice.failed)),
        *(test, EDGE_REMARK if choice.edge else ""),
    ]


def _shown(value: float, metric: str) -> str:
    """A loss in nats, any other metric in per cent."""
    return f"{value:.3f}" if metric == LOSS or is_loss(metric) else f"{100 * value:.1f} %"


def to_json(choices: Sequence[RateChoice]) -> str:
    """The choices as plain data, for programs."""
    return json.dumps([asdict(choice) for choice in choices], indent=2, ensure_ascii=False)
