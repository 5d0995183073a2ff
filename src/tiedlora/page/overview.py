"""The overview: configurations x tasks, with one table per base model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from tiedlora.analysis import crossed
from tiedlora.analysis.compare import ResultRow
from tiedlora.analysis.runs import LeftOut
from tiedlora.page.values import AverageScore, Column, Count, Percent, ScoreInterval, Table, TaskScore
from tiedlora.records.interval import Interval

Line = tuple[int, int, str, float]
"""The values that identify a line of the table: rank, parameters, configuration, share of LoRA."""


def overview(rows: Sequence[ResultRow], left_out: Sequence[LeftOut]) -> list[Table]:
    """A table per base model: score and paired difference to LoRA for every configuration and task, with an average."""
    primary = [row for row in rows if row.primary]
    models = sorted({row.group.model for row in primary})
    return [_of_model(model, [row for row in primary if row.group.model == model], left_out) for model in models]


def _of_model(model: str, rows: Sequence[ResultRow], left_out: Sequence[LeftOut]) -> Table:
    places = sorted({_place(row) for row in rows})
    by_place = {(_line(row), _place(row)): row for row in rows}
    # An average is over tasks. A task with two columns must not count twice, and must not be left out silently.
    is_averaged = len(places) > 1 and len({task for task, _, _ in places}) == len(places)
    # Points and nats have no common mean.
    is_averaged = is_averaged and len({row.measure.unit for row in rows}) == 1
    body = []
    for line in sorted({_line(row) for row in rows}):
        rank, params, configuration, share = line
        rows_of_line = [by_place.get((line, place)) for place in places]
        scores = [
            _task_score(row) if row is not None else _missing(configuration, rank, task, left_out)
            for row, (task, _, _) in zip(rows_of_line, places, strict=True)
        ]
        average = [_average(rows_of_line)] if is_averaged else []
        body.append((configuration, rank, Count(params), Percent(share), *scores, *average))
    settings = [(task, variant) for task, variant, _ in places]
    # The task's first metric needs no name, unless there is another one.
    named = {_place(row) for row in rows if not row.is_first or settings.count((row.group.task, row.group.variant)) > 1}
    names = [
        (f"{task} ({variant})" if variant else task) + (f", {metric}" if (task, variant, metric) in named else "")
        for task, variant, metric in places
    ]
    columns = (
        Column("configuration"),
        Column("rank", int),
        Column("parameters", Count),
        Column("share of LoRA", Percent),
        *(Column(name, TaskScore) for name in names),
        *([Column("average", AverageScore)] if is_averaged else []),
    )
    name = f"overview-{re.sub(r'[^A-Za-z0-9]+', '-', model).lower()}"
    return Table(name, _caption(model, names, is_averaged), columns, body)


def _place(row: ResultRow) -> tuple[str, str, str]:
    return row.group.task, row.group.variant, row.measure.metric


def _line(row: ResultRow) -> Line:
    group = row.group
    # The share is rounded as it is shown, because settings may differ in its last digits.
    return group.rank, group.params, group.configuration, round(group.share, 4)


def _caption(model: str, names: Sequence[str], is_averaged: bool) -> str:
    caption = (
        f"{model}: score in points of 100, loss in nats (mean over seeds, n seeds) and, in brackets, the paired "
        "difference to LoRA at the same rank with its 95 % interval over seeds and examples (only over examples for "
        "one seed). "
        "* has notes in the table of results."
    )
    if is_averaged:
        caption += (
            f" The average is the plain mean of each task's metric over the {len(names)} columns "
            f"{', '.join(names)}; its interval is a t interval over seeds that all of them share, and it is left "
            "out where a column is missing."
        )
    return caption


def _task_score(row: ResultRow) -> TaskScore:
    unit = row.measure.unit
    difference = ScoreInterval(row.difference.widest, signed=True, unit=unit) if row.difference is not None else None
    score = None if row.score is None else row.score.value
    return TaskScore(score, len(row.seeds), score is None or bool(row.group.marks or row.notes), difference, unit)


def _missing(configuration: str, rank: int, task: str, left_out: Sequence[LeftOut]) -> str | None:
    """`failed` if a run of the configuration failed on the task and none is finished."""
    runs = [folder.run for folder in left_out if folder.run is not None]
    failed = [run for run in runs if run.failed and (run.label, run.rank, run.task) == (configuration, rank, task)]
    return "failed" if failed else None


def _average(rows: Sequence[ResultRow | None]) -> AverageScore | None:
    """The mean over tasks, for the seeds that all tasks have; None if a task is missing."""
    scored = [row for row in rows if row is not None and row.score is not None]
    if len(scored) < len(rows):
        return None
    shared = sorted(set.intersection(*(set(row.seeds) for row in scored)))
    if not shared:
        return None
    values = np.array([_values(row, shared) for row in scored]).mean(0)
    if len(shared) == 1:
        return AverageScore(Interval(float(values[0]), math.nan, math.nan), 1, scored[0].measure.unit)
    return AverageScore(crossed.seeds_interval(values), len(shared), scored[0].measure.unit)


def _values(row: ResultRow, seeds: Sequence[int]) -> list[float]:
    """The row's score for each of the seeds."""
    by_seed = {run.seed: run for run in row.group.runs}
    return [float(value) for value in row.measure.values([by_seed[seed] for seed in seeds])]
