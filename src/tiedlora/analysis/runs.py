"""Read finished runs from their folders, and their scores of each example.

A damaged folder is listed, and does not stop a report. This needs no torch, Hydra or W&B.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from tiedlora import storage
from tiedlora.analysis.intervals import Array, Clusters, pseudo_values
from tiedlora.config.identity import arm_of, identity, identity_digest, leaves, without_gone_keys
from tiedlora.config.schema import Config, TaskConfig
from tiedlora.config.trial_arm import TrialArm
from tiedlora.errors import UserError
from tiedlora.reading import read_typed, typed
from tiedlora.records import study_files
from tiedlora.records.interval import Unit
from tiedlora.records.loss_metrics import TARGET_LOSS_BY_TOKEN, is_loss, mean_per_token
from tiedlora.records.rows import PredictionRow, ValidationLosses, read_metrics, read_validation_losses
from tiedlora.records.run_folder import RunFolder, RunName, last_line
from tiedlora.records.run_record import RunRecord, read_record
from tiedlora.records.scores import Kind, RunScores, kind_of, read_run_scores, read_scores
from tiedlora.records.selection import LOSS, SELECTION_FILE, Selection, read_selection
from tiedlora.tasks import NoSuchTask, load_task
from tiedlora.text import counted

PART_OF_A_RUN = (
    "result.json",
    "config.yaml",
    "metrics.jsonl",
    "checkpoint",
    "error.txt",
    ".lock",
    "adapter",
    "scores",
)
NOT_RUNS = ("base", "sweeps")
"""Folders in outputs/ that are not runs: scores of base models, and frozen configurations of sweeps."""
TOLERANCE = 1e-6
"""The allowed difference, by rounding, of a recorded metric from the mean over its examples."""
LONGEST_REASON = 200
"""Most characters of a failed run's error that are shown."""


class NotComparable(Exception):
    """Why runs cannot be compared: a side, a seed in common or a score of a row is missing, or the rows differ.

    It is a finding, which a report shows in the place of a number. Mistakes of a user are UserErrors.
    """


@dataclass(frozen=True)
class UnfinishedRun(RunName):
    """A run without a result. What it is follows from its config.yaml."""

    run_id: str
    """The folder's name."""
    arm: TrialArm
    search: str
    """As that of `Run`."""
    ending: Literal["", "failed", "pruned"]
    """Whether the run ended with an error, or the search of a learning rate stopped it."""
    diverged: bool
    """Whether that error was a loss that is not finite. Any other error can be repaired."""
    loss: float | None
    """The last validation loss."""


@dataclass(frozen=True)
class LeftOut:
    """A folder or file that is not in the report, and why."""

    path: Path
    reason: str
    run: UnfinishedRun | None = None
    """None if the folder has no readable config.yaml."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run."""

    path: Path
    record: RunRecord
    scores: RunScores
    ending: ClassVar = "finished"

    @property
    def run_id(self) -> str:
        """The id, which is also the name of its folder."""
        return self.record.run_id

    @property
    def arm(self) -> TrialArm:
        """What was trained: the label, the rank and the configuration."""
        return self.record.arm

    @property
    def search(self) -> str:
        """What runs share that differ in seed and rate alone: those that a search of the rate compares."""
        return _search(self.record.identity.tree)

    @property
    def model(self) -> str:
        """The base model's name without its organisation."""
        return self.record.base.name.rsplit("/", 1)[-1]

    @property
    def task(self) -> str:
        """The name of its task."""
        return self.record.identity.task.name

    @property
    def lr(self) -> float:
        """The learning rate that it was trained with."""
        return self.record.identity.train.lr

    @property
    def seed(self) -> int:
        """The seed of its start and of the order of its rows."""
        return self.record.seed

    @property
    def loss(self) -> float:
        """The last validation loss."""
        return self.record.training.validation_loss_last

    def last_losses(self) -> ValidationLosses | None:
        """The loss of every validation row after the last step; None if the file lacks it or cannot be read."""
        return self.losses_by_step().get(self.record.training.steps)

    def losses_by_step(self) -> dict[int, ValidationLosses]:
        """Step -> the loss of every validation row; empty if the file is gone or cannot be read."""
        with suppress(UserError):
            return {row.step: row for row in read_validation_losses(RunFolder(self.path).validation_losses_file)}
        return {}

    def rows(self, split: str, kind: Kind, base: bool = False) -> list[PredictionRow]:
        """The rows of a file of scores, one per example; with `base`, the rows of the base model.

        Raises:
            UserError: the file is missing or a row is damaged; the message names file and line.
        """
        folder = RunFolder(self.path)
        own = folder.scores_file(split, kind)
        return read_scores(folder.base_scores_file(self.scores.adapted[split, kind].base) if base else own).rows


def run_roots(roots: Iterable[Path]) -> list[Path]:
    """The roots, with the folder of runs for each one that is a study.

    Raises:
        UserError: a study has no runs yet, or its archive is damaged.
    """
    return [study_files.runs_folder(root) if study_files.is_study(root) else root for root in roots]


def read_runs(roots: Iterable[Path]) -> tuple[list[Run], list[LeftOut]]:
    """Every finished run in the roots, and the folders that were left out.

    Args:
        roots: folders of runs, or the folders of single runs.

    Raises:
        UserError: a root is not a folder.
    """
    runs: dict[tuple[str, str | None], Run] = {}
    left_out: list[LeftOut] = []
    for folder in _folders(roots):
        run = read_run(folder)
        if isinstance(run, LeftOut):
            left_out.append(run)
            continue
        # The id begins with the name of an option, which may have been renamed since.
        # An id says the name of the base model, and not which weights had it.
        same = identity_digest(run.record.identity.tree), run.record.base.digest
        first = runs.setdefault(same, run)
        if first is not run:
            # Of a run and its copy, one may lack scores that the other has.
            files, of_first = _score_files(run), _score_files(first)
            kept, other = (run, first) if len(files) > len(of_first) else (first, run)
            runs[same] = kept
            unused = sorted(files - of_first if kept is first else of_first - files)
            reason = f"; its scores are not used: {', '.join(unused)}" if unused else ""
            what = "the same run as" if _of_same_rows(kept, other) else "on other rows than the run of its id in"
            left_out.append(LeftOut(other.path, f"{what} {kept.path}{reason}"))
    return list(runs.values()), left_out


@dataclass(frozen=True)
class Names:
    """What a claim about some runs can name."""

    configurations: set[str] = field(default_factory=set)
    metrics: dict[str, set[str]] = field(default_factory=dict)
    """Task -> its recorded metrics."""
    keys: set[str] = field(default_factory=set)
    """The dotted keys of the runs' identities."""

    def add(self, arm: TrialArm, task: str, metrics: Iterable[str], identity: Mapping[str, Any]) -> None:
        """Add what one run has."""
        self.configurations.update((arm.configuration, arm.name))
        self.metrics.setdefault(task, set()).update(metrics)
        self.keys.update(leaves(identity))


def _of_same_rows(run: Run, other: Run) -> bool:
    """Whether both were trained and validated on the same rows: an id does not say what the files held."""
    return {name: data.digest for name, data in run.record.data.items()} == {
        name: data.digest for name, data in other.record.data.items()
    }


def _score_files(run: Run) -> set[str]:
    """What is scored of a run, in words, such as `answers of test` and `answers of test by the base`."""
    adapted = {f"{kind} of {split}" for split, kind in run.scores.adapted}
    return adapted | {f"{kind} of {split} by the base" for split, kind in run.scores.base}


def names_of(runs: Iterable[Run]) -> Names:
    """What a claim about these runs can name."""
    names = Names()
    for run in runs:
        metrics = (metric for split in run.scores.splits for metric in run.scores.metrics(split))
        names.add(run.arm, run.task, metrics, run.record.identity.tree)
    return names


def read_selections(roots: Iterable[Path]) -> tuple[list[Selection], list[LeftOut]]:
    """The choices of learning rates in the roots' sweeps/, and the files that cannot be read."""
    selections, left_out = [], []
    for path in sorted(path for root in roots for path in root.glob(f"sweeps/*/{SELECTION_FILE}")):
        try:
            selections.append(read_selection(path))
        except UserError as error:
            left_out.append(LeftOut(path, str(error).removeprefix(f"{path}: ")))
    return selections, left_out


def _folders(roots: Iterable[Path]) -> Iterator[Path]:
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root.absolute()}: is not a folder; give the one with the runs (outputs= of train.py)")
        if any((root / name).is_file() for name in PART_OF_A_RUN):
            yield root
            continue
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and not folder.name.startswith(".") and folder.name not in NOT_RUNS:
                yield folder


def read_run(path: Path) -> Run | LeftOut:
    """The run of one folder, or the reason why there is none."""
    folder = RunFolder(path)
    if not folder.result_file.is_file():
        if not any((path / name).exists() for name in PART_OF_A_RUN):
            return LeftOut(path, "not a run: it holds none of a run's files")
        reason = "not finished: it has no result.json (running, or interrupted)"
        if error := last_line(folder.error_file)[:LONGEST_REASON]:
            reason = f"failed: {error}"
        elif pruned := last_line(folder.pruned_file)[:LONGEST_REASON]:
            reason = f"pruned by the search of a learning rate: {pruned}"
        return LeftOut(path, reason, _unfinished(folder))
    try:
        record = read_record(folder.result_file)
        identity_digest(record.identity.tree)  # It refuses a number that is not finite.
        return Run(path, record, read_run_scores(folder, record))
    except UserError as error:
        return LeftOut(path, str(error).removeprefix(f"{path}/"), _unfinished(folder))


def _search(identity: dict[str, Any]) -> str:
    return identity_digest({**identity, "seed": None, "train": {**identity["train"], "lr": None}})


def _unfinished(folder: RunFolder) -> UnfinishedRun | None:
    """The run of a folder without a result; None if its configuration cannot be read."""
    try:
        tree = without_gone_keys(storage.read_yaml(folder.config_file))
        config = typed(Config, tree, "a run's configuration")
        arm, search = arm_of(config), _search(identity(config))
    except UserError:
        return None
    error, losses = last_line(folder.error_file), list(logged_curves(folder.path, LOSS).get(LOSS, {}).values())
    return UnfinishedRun(
        run_id=folder.path.name,
        arm=arm,
        search=search,
        model=config.model.name.rsplit("/", 1)[-1],
        configuration=arm.label,
        rank=arm.rank,
        task=config.task.name,
        seed=config.seed,
        lr=math.nan if config.train.lr is None else config.train.lr,
        ending="failed" if error else "pruned" if last_line(folder.pruned_file) else "",
        diverged=folder.diverged(),
        loss=losses[-1] if losses else None,
    )


def logged_curves(path: Path, prefix: str) -> dict[str, dict[int, float]]:
    """Metric -> its values by step, for the metrics of a run's metrics.jsonl whose names start with the prefix."""
    found: dict[str, dict[int, float]] = {}
    with suppress(UserError):
        for row in read_metrics(RunFolder(path).metrics_file, prefix):
            for name, value in row.values.items():
                if name.startswith(prefix):
                    found.setdefault(name, {})[row.step] = float(value)
    return found


@dataclass(frozen=True)
class Measure:
    """What is compared: one metric on one split."""

    split: str
    metric: str

    @property
    def unit(self) -> Unit:
        """The unit of the metric."""
        return Unit.of(self.metric)

    @property
    def kind(self) -> Kind:
        """The kind of scores that has the metric."""
        return kind_of(self.metric)

    @property
    def sign(self) -> float:
        """-1 for a loss, otherwise 1. The product of sign and value is better if it is higher."""
        return -1.0 if is_loss(self.metric) else 1.0

    def scored(self, runs: Iterable[Run]) -> list[Run]:
        """Those of the runs that have this metric."""
        return [run for run in runs if self.metric in run.scores.metrics(self.split)]

    def has_base(self, run: Run) -> bool:
        """Whether the base model was scored too."""
        return self.metric in run.scores.base_metrics(self.split)

    def values(self, runs: Sequence[Run], base: bool = False) -> Array:
        """(runs,): the score that each run recorded, its own or the base model's."""
        own = (run.scores.base_metrics(self.split) if base else run.scores.metrics(self.split) for run in runs)
        return np.array([metrics[self.metric].value for metrics in own])


@dataclass(frozen=True)
class RowScores:
    """What the rows of a file of scores have."""

    ids: tuple[str, ...]
    of_metric: dict[str, Array]
    """Metric -> one number per example. A metric that an example lacks is left out."""
    unreadable: dict[str, str]
    """Metric -> why its scores cannot be read."""
    clusters: Clusters | None
    """Which examples belong together; None if all are independent, or in too few clusters for an interval over them."""
    named_clusters: int
    """How many clusters the rows name; 0 if each row has its own."""
    equal_clusters: float
    """As how many clusters of one size the rows count: (number of rows)^2 / sum over clusters (its rows)^2."""

    @classmethod
    def of(
        cls, ids: Iterable[str], of_metric: dict[str, Array], unreadable: dict[str, str], names: Sequence[str]
    ) -> RowScores:
        """Args:
        names: each row's cluster; empty if it stands alone.
        """
        named = set(names) - {""}
        shared = len(named) if len(named) < len(names) - names.count("") else 0
        alone, sizes = names.count(""), Counter(name for name in names if name)
        equal = len(names) ** 2 / max(1, alone + sum(size * size for size in sizes.values()))
        return cls(tuple(ids), of_metric, unreadable, Clusters.of(names), shared, equal)

    @property
    def note_on_clusters(self) -> str:
        """Whether the rows come in clusters, for the reader; empty if they do not."""
        if self.clusters is not None:
            return f"rows in {len(self.clusters.sizes)} clusters, which intervals take as the sample"
        few = self.named_clusters
        return f"rows of only {counted(few, 'cluster')}: intervals hold for these alone" if few else ""


class Scorebook:
    """The scores of runs for each example. Each file is read once."""

    def __init__(self) -> None:
        self.read = functools.cache(_read)
        """What the rows have, by run, split, kind and whether they are the base model's."""

    def scores(self, run: Run, measure: Measure, base: bool = False) -> tuple[tuple[str, ...], Array]:
        """(ids, one number per example) whose mean is the metric.

        Raises:
            NotComparable: rows are missing or damaged, or disagree with the first line.
        """
        split, metric = measure.split, measure.metric
        where = f"{run.run_id}: scores/{split}.{measure.kind}.jsonl"
        read = self.read(run, split, measure.kind, base)
        recorded = run.scores.base_metrics(split) if base else run.scores.metrics(split)
        if metric not in read.of_metric or metric not in recorded:
            raise NotComparable(read.unreadable.get(metric, f"{where} has no per-example {metric}"))
        # Also where the mean is no number, as that of damaged statistics may be.
        if not math.isclose(read.of_metric[metric].mean(), recorded[metric].value, rel_tol=0, abs_tol=TOLERANCE):
            raise NotComparable(f"{where} disagrees with its first line on {metric}; scripts/verify.py says where")
        return read.ids, read.of_metric[metric]

    def base_scores(self, run: Run, measure: Measure) -> Array:
        """(examples,): the base model's scores of the run's examples.

        Raises:
            NotComparable: as `scores`, or the base model was scored on other examples.
        """
        ids, scores = self.scores(run, measure, base=True)
        if ids != self.read(run, measure.split, measure.kind, False).ids:
            raise NotComparable(f"{run.run_id}: its base model was scored on other rows")
        return scores

    def tables(self, sides: Sequence[Sequence[Run]], measure: Measure) -> tuple[list[Array], Clusters | None]:
        """(runs, examples) for each side: the scores of all runs on the same examples; and the examples' clusters.

        Earlier records do not name clusters, so the first run that does counts.

        Raises:
            NotComparable: as `scores`, or the runs were scored on different examples.
        """
        ids, _ = self.scores(sides[0][0], measure)
        if other := next((run for side in sides for run in side if self.scores(run, measure)[0] != ids), None):
            raise NotComparable(f"{other.run_id}: its scores are of other examples")
        named = (self.read(run, measure.split, measure.kind, False).clusters for runs in sides for run in runs)
        clusters = next((clusters for clusters in named if clusters is not None), None)
        return [np.stack([self.scores(run, measure)[1] for run in runs]) for runs in sides], clusters


def _read(run: Run, split: str, kind: Kind, base: bool) -> RowScores:
    """What the rows of a run's file of scores have, or those of its base model's.

    Raises:
        NotComparable: it is missing or damaged.
    """
    try:
        rows = run.rows(split, kind, base)
    except UserError as error:
        raise NotComparable(str(error)) from None
    values, unreadable = {}, {}
    for metric in run.scores.adapted[split, kind].metrics:
        scores = [row.scores.get(metric) for row in rows]
        if None in scores:
            continue
        try:
            table = np.array(scores, dtype=np.float64)
            values[metric] = table if table.ndim == 1 else pseudo_values(table, _corpus_score(run, metric))
        except (NotComparable, NoSuchTask) as why:
            unreadable[metric] = str(why)
        except (KeyError, TypeError, ValueError, ArithmeticError, ImportError) as error:
            unreadable[metric] = f"{run.run_id}: scores of {metric} on {split} cannot be read ({error!r:.60})"
    listed = _listed_clusters(run.path.absolute().parent.parent / study_files.CLUSTERS).get(run.task, {})
    names = [row.cluster or listed.get(row.id, "") for row in rows]
    return RowScores.of((row.id for row in rows), values, unreadable, names)


@functools.lru_cache(maxsize=8)
def _listed_clusters(path: Path) -> dict[str, dict[str, str]]:
    """Task -> row's id -> its cluster, from a study's file, for runs whose rows do not name them."""
    return read_typed(path, dict[str, dict[str, str]]) if path.is_file() else {}


def _corpus_score(run: Run, metric: str) -> Callable[[Array], float]:
    """The function from summed statistics to a corpus-level metric such as BLEU. The run's task defines it.

    Raises:
        NoSuchTask: this version of the code has no such task.
        NotComparable: its task has no such metric.
    """
    if metric == TARGET_LOSS_BY_TOKEN:
        return mean_per_token
    kind, values = run.record.identity.task.kind, run.record.identity.tree["task"]
    own = {name: values[name] for name in ("options", "metrics") if name in values}
    task = load_task(TaskConfig(name=run.task, kind=kind, **own))
    if metric not in task.corpus_metrics:
        raise NotComparable(f"task {run.task}: this version of the code has no corpus score for {metric}")
    return lambda sums: float(task.corpus_score(metric, sums))
