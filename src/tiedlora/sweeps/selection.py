"""The fair comparison: a learning rate for every configuration, chosen on validation, and test for the chosen alone."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.records.run_folder import identity
from tiedlora.runs import run
from tiedlora.sweeps.sweep import Cell, Sweep

log = logging.getLogger(__name__)

BY = ("score", "loss")


@dataclass
class Choice:
    """The rate of one (model, task, configuration, rank), and how it was come by."""

    model: str
    task: str
    configuration: str
    rank: int
    lr: float
    lrs: list[float]
    """The grid's rates, in order."""
    metric: str
    value: float
    """Mean over the seeds, on validation."""
    seeds: int
    trials: int
    """Cells spent on it: rates times seeds, those that failed too."""
    failed: int
    edge: bool
    """The chosen rate is the grid's lowest or highest, so the best one may lie outside."""
    run_ids: list[str]
    test: float | None = None
    """Mean over the seeds of the metric on test, once it is scored."""


def choose(sweep: Sweep, by: str = "score") -> list[Choice]:
    """Choose a rate for each configuration by its mean over the seeds.

    A rate counts only if all its seeds finished: one that diverges at one seed is not a rate to use. Of
    equal scores the lower validation loss wins, then the lower rate.

    Raises:
        UserError: cells are still to be run, or no rate of a configuration finished.
    """
    groups: dict[str, list[Cell]] = {}
    waiting = 0
    for cell in sweep.cells:
        groups.setdefault(_group(cell), []).append(cell)
        waiting += cell.state() not in ("done", "failed")
    if waiting:
        raise UserError(
            f"{sweep.id}: {waiting} of {len(sweep.cells)} cells are not finished; run the sweep's command first"
        )
    return [_choice(cells, by) for cells in groups.values()]


def _group(cell: Cell) -> str:
    """Everything that changes the result but the rate and the seed."""
    meaning = identity(cell.config)
    del meaning["seed"], meaning["train"]["lr"]
    return json.dumps(meaning, sort_keys=True)


def _choice(cells: list[Cell], by: str) -> Choice:
    rates: dict[float, list[Cell]] = {}
    for cell in cells:
        assert cell.config.train.lr is not None
        rates.setdefault(cell.config.train.lr, []).append(cell)
    ranked, failed = [], 0
    for lr, same in rates.items():
        results = [result for cell in same if (result := cell.folder.result()) is not None]
        failed += len(same) - len(results)
        if len(results) == len(same):
            loss = mean(result["training"]["validation_loss_last"] for result in results)
            metric, score = _validation(results, by)
            ranked.append((loss if by == "loss" else -score, loss, lr, metric, loss if by == "loss" else score))
    about = cells[0].parameters()
    named = {key: about[key] for key in ("model", "task", "configuration", "rank")}
    if not ranked:
        raise UserError(f"{named}: no rate finished at every seed; add lower ones with train.lr=")
    _, _, lr, metric, value = min(ranked)
    lrs = sorted(rates)
    return Choice(
        **named,
        lr=lr,
        lrs=lrs,
        metric=metric,
        value=value,
        seeds=len(rates[lr]),
        trials=len(cells),
        failed=failed,
        edge=lr in (lrs[0], lrs[-1]),
        run_ids=sorted(cell.run_id for cell in rates[lr]),
    )


def _validation(results: list[dict[str, Any]], by: str) -> tuple[str, float]:
    """The task's first metric and its mean over the seeds."""
    if by == "loss":
        return "validation/loss", 0.0
    scored = [result["scores"].get("validation") for result in results]
    if None in scored:
        raise UserError("select: not every run is scored on validation (score.splits); choose by loss with --by loss")
    metric = next(iter(scored[0]["metrics"]))
    return metric, mean(found["metrics"][metric]["value"] for found in scored)


def score_test(sweep: Sweep, choices: list[Choice]) -> None:
    """Score the chosen runs, and no others, on test; runs that have it are left alone."""
    cells = {cell.run_id: cell for cell in sweep.cells}
    for choice in choices:
        values = []
        for run_id in choice.run_ids:
            cell = cells[run_id]
            result = cell.folder.result()
            if result is None or "test" not in result["scores"]:
                log.info("scoring %s on test", run_id)
                result = run.score_more(cell.folder, ["test"], cell.config.data_root, cell.config)
            metrics = result["scores"]["test"]["metrics"]
            values.append(metrics[choice.metric if choice.metric in metrics else next(iter(metrics))]["value"])
        choice.test = mean(values)


def save(sweep: Sweep, choices: list[Choice], by: str) -> None:
    """Keep the selection beside the sweep's frozen cells."""
    value = {"sweep": sweep.id, "by": by, "choices": [asdict(choice) for choice in choices]}
    storage.write_json(sweep.path / "selection.json", value)


def lines(choices: list[Choice]) -> str:
    """The table, and what a reader has to know before comparing."""
    head = [
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
        "",
    ]
    table = [head]
    for choice in choices:
        value = f"{choice.value:.3f}" if choice.metric == "validation/loss" else f"{100 * choice.value:.1f} %"
        test = "" if choice.test is None else f"{100 * choice.test:.1f} %"
        numbers = [
            f"{choice.lr:g}",
            str(len(choice.lrs)),
            value,
            *map(str, (choice.seeds, choice.trials, choice.failed)),
        ]
        where = [choice.model, choice.task, choice.configuration, str(choice.rank)]
        table.append([*where, *numbers, test, "at the edge of the grid" if choice.edge else ""])
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    text = ["  ".join(w.ljust(width) for w, width in zip(line, widths, strict=True)).rstrip() for line in table]
    if any(choice.edge for choice in choices):
        text += [
            "",
            "A rate at the edge of the grid may not be the best: add rates beyond it with train.lr= and select again.",
        ]
    per_task: dict[tuple[str, str], set[int]] = {}
    for choice in choices:
        per_task.setdefault((choice.model, choice.task), set()).add(choice.trials)
    for (model, task), trials in per_task.items():
        if len(trials) > 1:
            text.append(
                f"{model} on {task}: {min(trials)} to {max(trials)} trials a configuration: not a fair comparison."
            )
    return "\n".join(text)


def to_json(choices: list[Choice]) -> str:
    """The same for programs."""
    return json.dumps([asdict(choice) for choice in choices], indent=2, ensure_ascii=False)
