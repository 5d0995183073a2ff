"""The report's numbers: scores, paired differences to LoRA, gains over the base, and what is left of LoRA's gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiedlora.errors import UserError
from tiedlora.report.cells import Cell, mixed_data
from tiedlora.report.runs import Run
from tiedlora.statistics import coverage, crossed
from tiedlora.statistics.crossed import Array
from tiedlora.statistics.intervals import Interval

BASELINE = "LoRA"
SPLITS = ("test", "validation")
"""In this order: the split that a report shows is the first that its runs have."""


@dataclass
class Estimate:
    """A value with its 95 % intervals, each named by the variance it covers; None where there are no numbers for it."""

    value: float
    seeds: Interval | None = None
    """t over seeds, on these examples."""
    examples: Interval | None = None
    """Over which examples were drawn, with these seeds."""
    both: Interval | None = None
    """Over seeds and examples."""
    method: str = ""
    """How the interval over examples was made: Wilson, Newcombe, bootstrap, paired bootstrap."""

    def widest(self) -> Interval | None:
        """The interval that covers most: both, else examples, else seeds."""
        return self.both or self.examples or self.seeds


@dataclass
class Row:
    """One cell's numbers on one split by one metric."""

    cell: Cell
    split: str
    metric: str
    primary: bool
    """Whether it is the metric that comparisons use."""
    seeds: list[int] = field(default_factory=list)
    examples: int = 0
    score: Estimate | None = None
    difference: Estimate | None = None
    """Paired, to LoRA at the same rank."""
    gain: Estimate | None = None
    """Paired, over the base model."""
    retained: Interval | None = None
    """gain / LoRA's gain; low and high are NaN where no interval exists."""
    notes: list[str] = field(default_factory=list)


class Scorebook:
    """Per-example scores of runs, read once."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, str, bool], tuple[tuple[str, ...], dict[str, Array]] | UserError] = {}

    def scores(self, run: Run, split: str, metric: str, base: bool = False) -> tuple[tuple[str, ...], Array]:
        """(ids, one number an example) whose mean is the metric.

        Raises:
            UserError: predictions are missing or damaged, or disagree with result.json.
        """
        key = (str(run.path), split, base)
        if key not in self._read:
            self._read[key] = self._load(run, split, base)
        found = self._read[key]
        if isinstance(found, UserError):
            raise found
        ids, scores = found
        recorded = run.splits[split]["base" if base else "metrics"]
        if metric not in scores or metric not in recorded:
            raise UserError(f"predictions/{split} has no per-example {metric}")
        if abs(float(scores[metric].mean()) - recorded[metric]["value"]) > 1e-6:
            raise UserError(f"predictions/{split} disagrees with result.json on {metric}; scripts/verify.py says where")
        return ids, scores[metric]

    def _load(self, run: Run, split: str, base: bool) -> tuple[tuple[str, ...], dict[str, Array]] | UserError:
        try:
            rows = run.rows(split, base)
        except UserError as error:
            return error
        scores = {}
        for metric in run.splits[split]["metrics"]:
            found = [row["scores"].get(metric) for row in rows]
            try:
                if found and all(isinstance(score, list) for score in found):
                    scores[metric] = pseudo_values(np.array(found, dtype=float), corpus_score(run, metric))
                elif None not in found:
                    scores[metric] = np.array(found, dtype=float)
            except UserError as error:
                return error
            except (KeyError, TypeError, ValueError, ImportError) as error:
                return UserError(f"predictions/{split}: its scores of {metric} cannot be read ({error!r:.60})")
        return tuple(row["id"] for row in rows), scores


def corpus_score(run: Run, metric: str) -> Callable[[Array], float]:
    """The function from summed statistics to a corpus-level metric such as BLEU, which the run's task owns."""
    # Tasks import Hydra's schema (and sacrebleu): only a report with such a metric waits for them.
    from tiedlora.config.schema import TaskConfig
    from tiedlora.tasks import load_task

    recorded = run.record["identity"]["task"]
    task: Any = load_task(TaskConfig(name=run.task, kind=str(recorded["kind"]), options=recorded.get("options", {})))
    if not hasattr(task, "corpus_score"):
        raise UserError(f"task {run.task}: this version of the code has no corpus score for {metric}")
    return lambda sums: float(task.corpus_score(metric, sums))


def pseudo_values(statistics: Array, score: Callable[[Array], float]) -> Array:
    """One number an example for a metric that is no mean, so that every interval here serves it too.

    Tukey's jackknife pseudo-values, shifted so that their mean is the corpus score itself: the spread of
    their mean is, to first order, that of the score when sentences are resampled.

    Args:
        statistics: (examples, statistics), whose sum over examples `score` takes.
    """
    total, count = statistics.sum(0), len(statistics)
    whole = score(total)
    without = np.array([score(total - one) for one in statistics])
    values = count * whole - (count - 1) * without
    return np.asarray(values - values.mean() + whole)


def shown_split(found: Sequence[Cell]) -> dict[str, str]:
    """For each task the split that the report shows: test if any chosen run has it, else validation."""
    shown = {}
    for task in {cell.task for cell in found}:
        scored = {split for cell in found if cell.task == task for run in cell.runs for split in run.splits}
        shown[task] = next((split for split in SPLITS if split in scored), "validation")
    return shown


def rows(found: Sequence[Cell], book: Scorebook, split: str | None = None) -> list[Row]:
    """Every cell's numbers, by each metric of its task.

    Args:
        split: validation or test; None shows test where the chosen runs have it.
    """
    splits = {cell.task: split for cell in found} if split else shown_split(found)
    lora = baselines(found)
    table = []
    for cell in found:
        shown = splits[cell.task]
        metrics = next((list(run.splits[shown]["metrics"]) for run in cell.runs if shown in run.splits), [""])
        for metric in metrics:
            row = Row(cell, shown, metric, primary=metric == metrics[0])
            _fill(row, lora.get((cell.setting, cell.rank)), book)
            table.append(row)
    return table


def baselines(found: Sequence[Cell]) -> dict[tuple[str, int], Cell]:
    """LoRA's cell by setting and rank: the plain one (alpha = r) where there are several."""

    def plain(cell: Cell) -> bool:
        return bool(cell.runs[0].record["identity"]["rank"].get("alpha") == cell.rank)

    ordered = sorted((cell for cell in found if cell.label == BASELINE), key=plain)
    return {(cell.setting, cell.rank): cell for cell in ordered}


def _fill(row: Row, lora: Cell | None, book: Scorebook) -> None:
    runs = _scored(row.cell, row.split, row.metric)
    row.seeds = [run.seed for run in runs]
    if missing := [run.seed for run in row.cell.runs if run.seed not in row.seeds]:
        row.notes.append(f"not scored on {row.split}: seed {', '.join(map(str, missing))}")
    if not runs:
        return
    if mixed_data(row.cell, row.split):
        row.notes.append("no mean: its seeds saw different data")
        return
    row.examples = int(runs[0].splits[row.split]["rows"])
    if row.split == "validation" and len(row.cell.rates) > 1:
        row.notes.append("validation also chose the learning rate, so the score is optimistic")
    row.score = score(row, runs, book)
    row.gain = gain(row.cell, row.split, row.metric, book)
    if lora is not None and lora is not row.cell:
        row.difference, why = difference(row.cell, lora, row.split, row.metric, book)
        if why:
            row.notes.append(f"compared with LoRA: {why}")
        row.retained = retained(row.cell, lora, row.split, row.metric)
    elif lora is None:
        row.notes.append(f"no LoRA at rank {row.cell.rank} in the same setting to compare with")


def _scored(cell: Cell, split: str, metric: str) -> list[Run]:
    return [run for run in cell.runs if split in run.splits and metric in run.splits[split]["metrics"]]


def _values(runs: Sequence[Run], split: str, metric: str, kind: str = "metrics") -> Array:
    return np.array([run.splits[split][kind][metric]["value"] for run in runs], dtype=float)


def score(row: Row, runs: Sequence[Run], book: Scorebook) -> Estimate:
    """A cell's mean over seeds. One seed has the interval that its record holds."""
    values = _values(runs, row.split, row.metric)
    found = Estimate(float(values.mean()))
    scoring_examples = row.examples
    try:
        table = np.stack([book.scores(run, row.split, row.metric)[1] for run in runs])
        found.examples, found.method = crossed.score_over_examples(table)
        scoring_examples = int((table != 0).any(0).sum())
    except (UserError, ValueError) as error:
        row.notes.append(f"no interval over examples: {error}")
    if len(runs) > 1:
        found.seeds = crossed.interval(crossed.over_seeds(values))
    row.notes += coverage.remarks(found, scoring_examples, row.examples, len(runs))
    return found


def gain(cell: Cell, split: str, metric: str, book: Scorebook) -> Estimate | None:
    """The paired difference to the base model, which has no seeds of its own."""
    runs = [run for run in _scored(cell, split, metric) if metric in run.splits[split].get("base", {})]
    if not runs:
        return None
    values = _values(runs, split, metric) - _values(runs, split, metric, "base")
    found = Estimate(float(values.mean()))
    if len(runs) > 1:
        found.seeds = crossed.interval(crossed.over_seeds(values))
    try:
        ids, base = book.scores(runs[0], split, metric, base=True)
        _paired(found, _table(runs, split, metric, book, ids), np.broadcast_to(base, (len(runs), len(base))))
    except UserError:
        if len(runs) == 1:
            recorded = runs[0].splits[split]["gain"][metric]
            found.examples, found.method = Interval(recorded["value"], recorded["low"], recorded["high"]), "as recorded"
    return found


def difference(ours: Cell, theirs: Cell, split: str, metric: str, book: Scorebook) -> tuple[Estimate | None, str]:
    """The paired difference of two cells over the seeds they share, and what is to be said of it."""
    pairs = _pairs(ours, theirs, split, metric)
    if not pairs:
        return None, "no seed in common"
    if ours.digests(split) != theirs.digests(split) or mixed_data(ours, split) or mixed_data(theirs, split):
        return None, "other data"
    first, second = zip(*pairs, strict=True)
    values = _values(first, split, metric) - _values(second, split, metric)
    found = Estimate(float(values.mean()))
    notes = []
    if len(pairs) > 1:
        found.seeds = crossed.interval(crossed.over_seeds(values))
    try:
        ids, _ = book.scores(first[0], split, metric)
        _paired(found, _table(first, split, metric, book, ids), _table(second, split, metric, book, ids))
    except UserError as error:
        notes.append(f"no interval over examples: {error}")
    commits = [{str(run.record["code"].get("commit")) for run in side} for side in (first, second)]
    if commits[0] != commits[1]:
        notes.append("made by another commit")
    if len(pairs) < max(len(ours.runs), len(theirs.runs)):
        notes.append(f"{len(pairs)} seeds in common")
    return found, "; ".join(notes)


def _pairs(ours: Cell, theirs: Cell, split: str, metric: str) -> list[tuple[Run, Run]]:
    other = {run.seed: run for run in _scored(theirs, split, metric)}
    return [(run, other[run.seed]) for run in _scored(ours, split, metric) if run.seed in other]


def _table(runs: Sequence[Run], split: str, metric: str, book: Scorebook, ids: tuple[str, ...]) -> Array:
    found = []
    for run in runs:
        own, scores = book.scores(run, split, metric)
        if own != ids:
            raise UserError(f"{run.run_id}: its predictions are of other examples")
        found.append(scores)
    return np.stack(found)


def _paired(found: Estimate, ours: Array, theirs: Array) -> None:
    found.examples, found.method = crossed.difference_over_examples(ours, theirs)
    if len(ours) > 1 and ours.shape[1] > 1:
        found.both = crossed.interval(crossed.over_both(ours - theirs))


def paired_table(ours: Cell, theirs: Cell, split: str, metric: str, book: Scorebook) -> Array:
    """Per-seed, per-example differences: (seeds, examples).

    Raises:
        UserError: the predictions are not there.
    """
    first, second = zip(*_pairs(ours, theirs, split, metric), strict=True)
    ids, _ = book.scores(first[0], split, metric)
    return _table(first, split, metric, book, ids) - _table(second, split, metric, book, ids)


def retained(ours: Cell, theirs: Cell, split: str, metric: str) -> Interval | None:
    """(ours - base) / (theirs - base) over the seeds in common; NaN bounds where there is no interval."""
    pairs = [
        pair
        for pair in _pairs(ours, theirs, split, metric)
        if all(metric in r.splits[split].get("base", {}) for r in pair)
    ]
    if not pairs or ours.digests(split) != theirs.digests(split):
        return None
    first, second = zip(*pairs, strict=True)
    base = _values(first, split, metric, "base")
    top, bottom = _values(first, split, metric) - base, _values(second, split, metric) - base
    if (found := crossed.ratio(top, bottom)) is not None:
        return found
    return Interval(float(top.mean() / bottom.mean()), float("nan"), float("nan")) if bottom.mean() > 0 else None
