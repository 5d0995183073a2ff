"""Is B better than A, and how sure? Two sides, each a run or a file of scores for each task and seed.

Rows are matched by their ids. The difference and its intervals are those of the report (`Estimate.over_rows`). Its test
is McNemar's exact one where one seed of each side has 0 or 1 for every row and rows are independent; otherwise the
interval's own level decides. Several tests hold by Holm's procedure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tiedlora.analysis import intervals, rules
from tiedlora.analysis.comparison import Estimate, unlike
from tiedlora.analysis.groups import differing_values, setting_of
from tiedlora.analysis.intervals import Array, Clusters
from tiedlora.analysis.results import FEW_EXAMPLES
from tiedlora.analysis.row_files import RowFile, listed, read_row_file, read_samples
from tiedlora.analysis.runs import Measure, NotComparable, RowScores, Run, Scorebook, read_runs, run_roots
from tiedlora.config.identity import identity_digest, leaves
from tiedlora.errors import UserError
from tiedlora.records.interval import Unit
from tiedlora.records.loss_metrics import is_loss
from tiedlora.text import counted, nearest, number_list

MOST_KEYS = 5
"""How many keys are named in which two sides differ."""

Output = Run | RowFile
"""What was scored of one model: of one task and one seed."""
SIDES = "give a run's folder, a file of rows (JSON Lines), or an output of lm_eval --log_samples"
Answer = Literal["better", "worse", "not shown"]


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two: its outputs of each task, in the order of their seeds."""

    name: str
    """A or B."""
    paths: tuple[Path, ...]
    tasks: dict[str, list[Output]]
    """A file that does not say its task has an empty name."""

    @property
    def label(self) -> str:
        """The arm of its runs; empty for files."""
        arms = [output.arm.short for outputs in self.tasks.values() for output in outputs if isinstance(output, Run)]
        return ", ".join(dict.fromkeys(arms))


@dataclass(frozen=True)
class PairedTest:
    """B against A on one task, by one metric."""

    task: str
    metric: str
    split: str
    """Empty for files."""
    unit: Unit
    lower_is_better: bool
    rows: int
    seeds: int
    clusters: int
    """How many clusters the interval and the test take as the sample; 0 if they take rows."""
    a: float
    b: float
    difference: Estimate
    """B minus A, in the metric's own direction."""
    p: float
    test: str
    """What `p` is of: exact McNemar, or t over rows, over clusters, or over seeds and rows."""
    alone: tuple[int, int] | None
    """Of exact McNemar: on how many rows A alone and B alone has 1."""
    smallest: float | None
    """The smallest difference that such a test shows with 80 % power; None if it can show none."""
    notes: tuple[str, ...]
    holds: bool = False
    """Whether the difference is shown at 5 %: for all tests of a comparison together, by Holm's procedure."""

    @property
    def answer(self) -> Answer:
        """What B is."""
        if not self.holds:
            return "not shown"
        return "better" if (self.difference.value > 0) != self.lower_is_better else "worse"


def read_side(name: str, paths: Sequence[Path], cluster: str | None = None) -> Side:
    """The outputs of one side.

    Args:
        name: A or B.
        paths: run folders, folders of them, files of rows, and output folders of lm-evaluation-harness.
        cluster: as for `read_row_file`.

    Raises:
        UserError: a path holds no scores, or damaged ones, or is there twice; or the runs of a task are not one arm
            with one run a seed.
    """
    tasks: dict[str, list[Output]] = {}
    for number, path in enumerate(paths):
        if path.resolve() in [before.resolve() for before in paths[:number]]:
            raise UserError(f"{name}: {path} is there twice; give each seed once")
        for output in _read(path, cluster):
            tasks.setdefault(output.task, []).append(output)
    for outputs in tasks.values():
        _check_one_arm(name, [output for output in outputs if isinstance(output, Run)])
        outputs.sort(key=lambda output: output.seed if isinstance(output, Run) else 0)
    return Side(name, tuple(paths), tasks)


def _read(path: Path, cluster: str | None) -> Sequence[Output]:
    if not path.exists():
        raise UserError(f"{path}: no such folder or file; {SIDES}")
    if not path.is_dir():
        return [read_row_file(path, cluster)]
    if samples := read_samples(path, cluster):
        return samples
    runs, left_out = read_runs(run_roots([path]))
    if not runs:
        found = f" ({left_out[0].path.name}: {left_out[0].reason})" if left_out else ""
        raise UserError(f"{path}: has no scores{found}; {SIDES}")
    if cluster is not None:
        raise UserError(f"--cluster {cluster}: {path} is of runs, which name their clusters themselves; leave it out")
    return runs


def _check_one_arm(name: str, runs: Sequence[Run]) -> None:
    arms = {identity_digest({**run.record.identity.tree, "seed": None}): run for run in runs}
    if len(arms) > 1:
        first, second = list(arms.values())[:2]
        trees = [{**run.record.identity.tree, "seed": None} for run in (first, second)]
        one, other = differing_values([""] * 2, trees)
        raise UserError(f"{name}: a side is one arm, and {first.path} has {one}, but {second.path} {other}")
    by_seed: dict[int, Run] = {}
    for run in runs:
        if (before := by_seed.setdefault(run.seed, run)) is not run:
            raise UserError(f"{name}: seed {run.seed} is there twice, {before.path} and {run.path}; give one of them")


def compare_sides(
    a: Side, b: Side, metrics: Sequence[str] = (), split: str | None = None, lower: bool = False
) -> list[PairedTest]:
    """B against A on every task that both have: by the metrics of these names or, without any, by the first one.

    Args:
        split: of runs; None takes test where all runs have it, and otherwise validation.
        lower: whether lower is better; for metrics of files that do not say it.

    Raises:
        UserError: the sides have no task in common, no metric, other rows, or numbers of outputs that cannot be paired.
    """
    if twice := {path.resolve() for path in a.paths} & {path.resolve() for path in b.paths}:
        raise UserError(f"{min(twice)}: is in A and in B; give two that differ")
    outputs = [output for side in (a, b) for own in side.tasks.values() for output in own]
    if split and not any(isinstance(output, Run) for output in outputs):
        raise UserError(f"--split {split}: is of runs, and A and B are files; leave it out")
    if lower and not any(isinstance(output, RowFile) for output in outputs):
        raise UserError("--lower-is-better: is of files, and A and B are runs, whose losses are known; leave it out")
    tests, book, offered = list[PairedTest](), Scorebook(), dict[str, None]()
    for task, first, second in _common_tasks(a, b):
        ours, theirs, notes = _paired(task, second, first)
        chosen = _split([output for output in (*theirs, *ours) if isinstance(output, Run)], split)
        compared, common = _metrics(task, (a.name, theirs), (b.name, ours), chosen, metrics)
        offered |= dict.fromkeys(common)
        if not metrics and len(common) > 1:
            notes.append(f"other metrics: {listed(common[1:])} (--metric)")
        tests += [_test(task, Measure(chosen, metric), ours, theirs, notes, lower, book) for metric in compared]
    if absent := [metric for metric in metrics if all(test.metric != metric for test in tests)]:
        why = f"no such metric{nearest(absent[0], offered)}; A and B have {listed(offered)}"
        raise UserError(f"--metric {absent[0]}: {_unreadable(absent[0], outputs) or why}")
    return [replace(test, holds=holds) for test, holds in zip(tests, rules.holm([t.p for t in tests]), strict=True)]


def left_out(a: Side, b: Side) -> list[str]:
    """Notes on the tasks that only one side has."""
    common = {task for task, *_ in _common_tasks(a, b)}
    alone = [(side.name, [task for task in side.tasks if task and task not in common]) for side in (a, b)]
    return [f"only {name} has {listed(tasks)}" for name, tasks in alone if tasks]


def _common_tasks(a: Side, b: Side) -> list[tuple[str, list[Output], list[Output]]]:
    common = [(task, a.tasks[task], b.tasks[task]) for task in a.tasks if task in b.tasks]
    if common:
        return common
    if len(a.tasks) == len(b.tasks) == 1:
        ((of_a, first),), ((of_b, second),) = a.tasks.items(), b.tasks.items()
        if not (of_a and of_b):
            return [(of_a or of_b, first, second)]
    raise UserError(f"A and B have no task in common: A has {listed(a.tasks)}, B has {listed(b.tasks)}")


def _paired(task: str, ours: list[Output], theirs: list[Output]) -> tuple[list[Output], list[Output], list[str]]:
    """Outputs of both sides, as many of each: of the same seeds, or in their order; and notes for the reader.

    A single output beside several is paired with each of them.
    """
    own, other = ({o.seed: o for o in outputs if isinstance(o, Run)} for outputs in (ours, theirs))
    if len(own) == len(ours) and len(other) == len(theirs) and (common := [seed for seed in own if seed in other]):
        most = max(len(own), len(other))
        notes = [f"{counted(len(common), 'seed')} in common ({number_list(common)})"] if len(common) < most else []
        return [own[seed] for seed in common], [other[seed] for seed in common], notes
    count = max(len(ours), len(theirs))
    if len(ours) == len(theirs):
        notes = ["no seed in common, so the runs are paired in the order of their seeds"] if own and other else []
        return ours, theirs, notes
    if min(len(ours), len(theirs)) > 1:
        counts = f"A has {len(theirs)} outputs{f' of {task}' if task else ''} and B has {len(ours)}"
        raise UserError(f"{counts}; give as many of each, or a single one on one side")
    single = "A" if len(theirs) == 1 else "B"
    note = f"{single} is one output beside {count} seeds: the chance of its own training is not in the interval"
    return ours * (count // len(ours)), theirs * (count // len(theirs)), [note]


def _split(runs: Sequence[Run], split: str | None) -> str:
    if not runs:
        return ""
    return split or ("test" if all("test" in run.scores.splits for run in runs) else "validation")


def _names(output: Output, split: str) -> list[str]:
    return list(output.scores.metrics(split)) if isinstance(output, Run) else list(output.rows.of_metric)


def _metrics(
    task: str,
    a: tuple[str, Sequence[Output]],
    b: tuple[str, Sequence[Output]],
    split: str,
    wanted: Sequence[str],
) -> tuple[list[str], list[str]]:
    """The metrics of a task that are compared, and those that all outputs have."""
    where = "".join([f" of {task}" if task else "", f" on {split}" if split else ""])
    lists = [(name, output, _names(output, split)) for name, outputs in (a, b) for output in outputs]
    common = [metric for metric in lists[0][2] if all(metric in names for _, _, names in lists)]
    if wanted:
        chosen = [metric for metric in dict.fromkeys(wanted) if any(metric in names for _, _, names in lists)]
        for metric, (name, output, names) in itertools.product(chosen, lists):
            if metric not in names:
                why = f"{output.path} has no such metric{where}; it has {listed(names)}"
                raise UserError(f"--metric {metric}: {name}: {_unreadable(metric, [output]) or why}")
        return chosen, common
    if not common:
        described = "; ".join(dict.fromkeys(f"{name} has {listed(names)}" for name, _, names in lists))
        files = [output for _, output, _ in lists if isinstance(output, RowFile)]
        why = next((why for file in files for why in file.rows.unreadable.values()), "")
        unscored = next((output for _, output, names in lists if isinstance(output, Run) and not names), None)
        advice = f"; `python scripts/score.py {unscored.path} --split {split}` scores one" if unscored else ""
        raise UserError(f"no metric in common{where}: {described}{f' ({why})' if why else ''}{advice}")
    says = all(isinstance(output, Run) or output.says_metrics for _, output, _ in lists)
    if not says and len(common) > 1:
        raise UserError(f"--metric: the rows have {listed(common)}; say which of them is the score")
    return common[:1], common


def _unreadable(metric: str, outputs: Iterable[Output]) -> str:
    """Why files have no numbers for a metric that they name; empty if they do not name it."""
    files = (output for output in outputs if isinstance(output, RowFile))
    return next((file.rows.unreadable[metric] for file in files if metric in file.rows.unreadable), "")


def _scored(output: Output, measure: Measure, book: Scorebook) -> tuple[RowScores, Array, float]:
    """The rows, the score of each row, and the score of all as it was recorded."""
    if isinstance(output, RowFile):
        values = output.rows.of_metric[measure.metric]
        return output.rows, values, float(values.mean())
    try:
        _, values = book.scores(output, measure)
    except NotComparable as why:
        raise UserError(str(why)) from None
    rows = book.read(output, measure.split, measure.kind, False)
    return rows, values, float(measure.values([output])[0])


def _tables(
    ours: Sequence[Output], theirs: Sequence[Output], measure: Measure, book: Scorebook
) -> tuple[list[Array], list[Array], RowScores]:
    """For each side (seeds, rows) and the recorded scores (seeds,); and the rows that name the clusters, in this order.

    Raises:
        UserError: the outputs have other rows, or files name another cluster of a row.
    """
    scored = [[_scored(output, measure, book) for output in side] for side in (ours, theirs)]
    outputs, rows = [*ours, *theirs], [own for side in scored for own, _, _ in side]
    places = [_places(outputs[0], rows[0].ids, output, own.ids) for output, own in zip(outputs, rows, strict=True)]
    _check_clusters([output for output in outputs if isinstance(output, RowFile)])
    by_digest = {run.scores.adapted[measure.split, measure.kind].digest: run for run in outputs if isinstance(run, Run)}
    if len(by_digest) > 1:
        first, second = itertools.islice(by_digest.values(), 2)
        raise UserError(f"{first.path} and {second.path}: were scored on other rows, or with other prompts; repeat one")
    of_place = iter(places)
    tables = [np.stack([values[next(of_place)] for _, values, _ in side]) for side in scored]
    means = [np.array([mean for *_, mean in side]) for side in scored]
    # As in a report, the first that names clusters counts: earlier records do not.
    named = [pair for pair in zip(rows, places, strict=True) if pair[0].named_clusters] or [(rows[0], places[0])]
    naming, place = named[0]
    clusters = None if naming.clusters is None else Clusters(naming.clusters.codes[place])
    return tables, means, replace(naming, clusters=clusters)


def _check_clusters(files: Sequence[RowFile]) -> None:
    """Refuse files that say of a row that it belongs to different clusters.

    Raises:
        UserError: naming the row.
    """
    known: dict[str, tuple[str, RowFile]] = {}
    for file in files:
        for name, cluster in file.cluster_of.items():
            before, other = known.setdefault(name, (cluster, file))
            if cluster != before:
                where = f"the cluster {listed([cluster])} in {file.path} and {listed([before])} in {other.path}"
                raise UserError(f"the row {listed([name])} is of {where}; give files that agree, or another --cluster")


def _places(first: Output, ids: Sequence[str], output: Output, own: Sequence[str]) -> NDArray[np.intp]:
    """Where each row of the first output is in another one.

    Raises:
        UserError: one of the two has a row that the other lacks.
    """
    place = {name: number for number, name in enumerate(own)}
    if missing := [name for name in ids if name not in place]:
        raise _other_rows(output, first, missing)
    known = set(ids)
    if missing := [name for name in own if name not in known]:
        raise _other_rows(first, output, missing)
    return np.array([place[name] for name in ids])


def _other_rows(lacking: Output, having: Output, missing: Sequence[str]) -> UserError:
    what = f"lacks {counted(len(missing), 'row')} of {having.path}, such as {listed(missing[:1])}"
    return UserError(f"{lacking.path}: {what}; score both on the same rows")


def _test(
    task: str,
    measure: Measure,
    ours: Sequence[Output],
    theirs: Sequence[Output],
    notes: Sequence[str],
    lower: bool,
    book: Scorebook,
) -> PairedTest:
    (table, other), (means, other_means), rows = _tables(ours, theirs, measure, book)
    seeds, count = table.shape
    if count < 2:
        raise UserError(f"{ours[0].path}: has one row, and an interval needs two")
    clusters = rows.clusters
    difference = Estimate.over_seeds(means - other_means).over_rows(table, other, clusters)
    differences, loss = table - other, is_loss(measure.metric)
    is_mcnemar = seeds == 1 and clusters is None and not loss and intervals.is_binary([table, other])
    if is_mcnemar:
        test, p = "exact McNemar", intervals.mcnemar(table[0], other[0])
        smallest = intervals.smallest_shown_by_mcnemar(table[0], other[0])
        alone = int((other > table).sum()), int((table > other).sum())
    else:
        test = f"t over {'seeds and ' if seeds > 1 else ''}{'rows' if clusters is None else 'clusters'}"
        p, alone = intervals.level_of(differences, clusters), None
        smallest = intervals.smallest_shown(differences, clusters) or None
    runs = [[output for output in side if isinstance(output, Run)] for side in (ours, theirs)]
    files = [output for output in (*theirs, *ours) if isinstance(output, RowFile)]
    # A metric of another program may be of any size.
    is_share = not files or max(np.abs(table).max(), np.abs(other).max()) <= 1
    lower_is_better = loss or any(measure.metric in file.lower for file in files) or (lower and bool(files))
    found = PairedTest(
        task=task,
        metric=measure.metric,
        split=measure.split,
        unit=measure.unit if is_share or loss else Unit.PLAIN,
        lower_is_better=lower_is_better,
        rows=count,
        seeds=seeds,
        clusters=0 if clusters is None else len(clusters.sizes),
        a=float(other_means.mean()),
        b=float(means.mean()),
        difference=difference,
        p=p,
        test=test,
        alone=alone,
        smallest=smallest,
        notes=(),
    )
    said = [*notes, *_notes_on_rows(found, rows, differences), *(note for file in files for note in file.notes)]
    if all(runs):
        said += [*unlike(runs, measure), *_other_settings(*runs)]
        if len({run.record.data["train"].digest for own in runs for run in own}) > 1:
            said.append("trained on other rows")
    return replace(found, notes=tuple(dict.fromkeys(said)))


def _other_settings(ours: Sequence[Run], theirs: Sequence[Run]) -> list[str]:
    """A note on what the runs do not share that the report would ask of runs that it compares."""
    values: tuple[dict[str, set[str]], ...] = ({}, {})
    for of_side, runs in zip(values, (ours, theirs), strict=True):
        for key, value in itertools.chain.from_iterable(leaves(setting_of(run)).items() for run in runs):
            of_side.setdefault(key, set()).add(str(value))
    one, other = values
    differing = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    more = f" and {len(differing) - MOST_KEYS} more" if differing[MOST_KEYS:] else ""
    return [f"A and B also differ in {', '.join(differing[:MOST_KEYS])}{more}"] if differing else []


def _notes_on_rows(test: PairedTest, rows: RowScores, differences: Array) -> list[str]:
    """What a reader must know about interval and test, from their rows."""
    notes = [rows.note_on_clusters] if rows.note_on_clusters else []
    if rows.named_clusters and rows.clusters is None:
        notes[-1] = f"warning: {notes[-1]}; to hold for others, they need 5 clusters, or more if their sizes differ"
    differing = int((differences != 0).any(0).sum())
    only = f"only {counted(differing, 'row')} {'differs' if differing == 1 else 'differ'}"
    if not differing:
        notes.append("A and B have the same score in every row")
    elif test.test == "exact McNemar":
        if test.smallest is None:
            notes.append(f"{only}, and the exact test needs 6")
    elif differing < FEW_EXAMPLES:
        notes.append(f"{only}, so the interval may be too narrow")
    interval = test.difference.widest
    if not math.isnan(interval.low) and (test.p <= rules.TOTAL) != (interval.low > 0 or interval.high < 0):
        notes.append(f"the interval and the test ({test.test}) disagree at 5 %, so it is close; the test decides")
    return notes
