"""A fair comparison: a learning rate for every configuration, chosen on validation, and test scores only for these.

The choice is stored in selection.json, beside the sweep's frozen cells.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import asdict, replace
from statistics import mean

from rich.console import RenderableType

from tiedlora import screen
from tiedlora.analysis.rate_choice import CRITERIA, ChosenRate, choose_rate, rate_trials
from tiedlora.errors import LONGEST_MESSAGE, UserError
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.scores import Finished, Metrics, read_finished, read_run_scores
from tiedlora.records.selection import LOSS, SELECTION_FILE, RateChoice, Selection, read_selection, validation_metric
from tiedlora.scoring.wanted import lacks_scores
from tiedlora.sweeps.cells import Sweep, SweepCell, frozen_cell, rate_groups
from tiedlora.text import visible

log = logging.getLogger(__name__)

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
    "",
)
NUMBERS = ("rank", "of rates", "validation", "seeds", "trials", "failed", "test")
EDGE_REMARK = "at the edge of the grid"
EDGE_NOTE = "A rate at the edge of the grid may not be the best: add rates beyond it with train.lr= and select again."


def select_rates(sweep: Sweep, by: str | None = None) -> Selection:
    """Choose a rate for each configuration, by the rule of analysis/rate_choice.py.

    Args:
        by: one of rate_choice.CRITERIA. None takes the score if every configuration can be chosen by it, and otherwise
            the loss for all, because one criterion must serve the whole comparison.

    Raises:
        UserError: cells are not finished, no rate of a configuration finished at every seed, or `by` is "score" and a
            run has no validation scores.
    """
    # What a person has dropped will not be run. It is no trial.
    cells = [cell for cell in sweep.cells if cell.state() == "done" or not sweep.control.is_dropped(cell.run_id)]
    if not cells:
        raise UserError(f"{sweep.id}: all of its cells are dropped; sweep.py retry puts them back")
    unfinished = sum(cell.state() not in ("done", "failed") for cell in cells)
    if unfinished:
        raise UserError(
            f"{sweep.id}: {unfinished} of {len(cells)} cells are not finished; run the sweep's command first (after a "
            "staged sweep, leave out --by: it has chosen, and does not run the others)"
        )
    groups = rate_groups(cells)
    for used in CRITERIA if by is None else (by,):
        choices = [choose(cells, used) for cells in groups.values()]
        if all(choice.by == used for choice in choices):
            return Selection(sweep.id, used, choices)
    raise UserError(
        "select: not every run is scored on validation by the same metric (score.splits, score.metrics); choose by "
        "loss with --by loss"
    )


def choose(cells: Sequence[SweepCell], by: str) -> RateChoice:
    """The choice among cells that differ only in rate and seed. By score, it is by loss if scores are missing.

    Raises:
        UserError: every rate failed at some seed.
    """
    group = cells[0].name.group
    # A cell without a result or an error adds nothing.
    runs: dict[float, dict[int, Finished]] = {cell.name.lr: {} for cell in cells}
    failed: dict[float, set[int]] = {cell.name.lr: set() for cell in cells}
    for cell in cells:
        if (run := read_finished(cell.folder)) is not None:
            runs[cell.name.lr][cell.config.seed] = run
        elif cell.state() == "failed":
            failed[cell.name.lr].add(cell.config.seed)
    trials = rate_trials(runs, failed)
    best = choose_rate(trials, by)
    if best is None:
        raise UserError(f"{group}: no rate finished at every seed; add lower ones with train.lr=")
    if best.by == "loss" and cells[0].config.objective.name == "reward":
        raise UserError(
            f"{group}: objective=reward does not lower the loss of references; choose by score, with "
            "score.splits=[validation] in all runs"
        )
    chosen = [cell for cell in cells if cell.name.lr == best.lr and cell.folder.result_file.exists()]
    metric = LOSS if best.by == "loss" else validation_metric([runs[best.lr][chosen[0].config.seed]]) or LOSS
    # The rule takes more as better, so it has seen a loss with the other sign.
    value = -best.value if is_loss(metric) else best.value
    failures = sum(len(trial.failed) for trial in trials)
    return recorded_choice(best, chosen, metric, value, trials=len(cells), failed=failures)


def recorded_choice(
    chosen: ChosenRate, runs: Sequence[SweepCell], metric: str, value: float, *, trials: int, failed: int
) -> RateChoice:
    """The chosen rate as selection.json holds it, without test scores.

    Args:
        runs: the cells at the chosen rate.
        metric: what chose, with its mean `value` on validation.
        trials: the number of runs that were tried, of which `failed` failed.
    """
    named = asdict(runs[0].name)
    del named["seed"], named["lr"]
    return RateChoice(
        **named,
        lr=chosen.lr,
        lrs=list(chosen.tried),
        metric=metric,
        value=value,
        seeds=len(runs),
        trials=trials,
        failed=failed,
        edge=chosen.edge,
        run_ids=sorted(cell.run_id for cell in runs),
        selection_seeds=list(chosen.seeds),
    )


def score_test(sweep: Sweep, selection: Selection) -> Selection:
    """Score only the chosen runs on test: the kinds of scores that they lack.

    Returns:
        The selection with the choices' scores on test.

    Raises:
        UserError: a run's folder is damaged, or the rows of test cannot be loaded.
    """
    cells, choices, here = {cell.run_id: cell for cell in sweep.cells}, [], sweep.cells[0].config
    for choice in selection.choices:
        scores = []
        for run_id in choice.run_ids:
            # The staged sweeper may have added cells beyond the grid.
            cell = cells.get(run_id) or frozen_cell(sweep.path, run_id)
            cell.folder.finished_record()
            score = replace(cell.config.score, splits=["test"], forgetting=None)
            if lacks_scores(score, cell.folder):
                log.info("scoring %s on test", run_id)
                # It imports torch, which takes seconds, and most selections are complete.
                from tiedlora.runs.add_scores import add_scores  # noqa: PLC0415

                # A cell beyond the grid has the folders of the command that added it.
                config = replace(cell.config, score=score, data_root=here.data_root, cache=here.cache)
                add_scores(cell.folder, config)
            scores.append(read_run_scores(cell.folder).metrics("test"))
        # If the validation loss was the criterion, the test score is by the task's first metric.
        value, metric = mean_score(scores, choice.metric)
        choices.append(replace(choice, test=value, test_metric=metric))
    return replace(selection, choices=choices)


def mean_score(scores: Sequence[Metrics], preferred: str = "") -> tuple[float | None, str]:
    """The mean over seeds of one metric, and its name; None if the seeds have no metric in common.

    Args:
        preferred: the metric to take if all seeds have it; otherwise it is the first that all have.
    """
    common = [name for name in (preferred, *scores[0]) if all(name in own for own in scores)]
    return (mean(own[common[0]].value for own in scores), common[0]) if common else (None, "")


def searched_rates(sweep: Sweep) -> Selection | None:
    """The choices of the staged sweeper; None if it has made none.

    Raises:
        UserError: selection.json is damaged, or the search has not chosen a rate for every configuration.
    """
    path = sweep.path / SELECTION_FILE
    if not path.exists() or not (selected := read_selection(path)).searches:
        return None
    hopeless = [search.group for search in selected.searches if any(made.action == "none" for made in search.decisions)]
    if hopeless:
        raise UserError(f"{path}: every rate of {', '.join(hopeless)} diverged; add lower ones to train.lr")
    if (left := len(selected.searches) - len(selected.choices)) > 0:
        raise UserError(
            f"{path}: {left} of {len(selected.searches)} configurations have no chosen rate yet; run the staged "
            "sweep's command first"
        )
    return selected


def decision_lines(selected: Selection, actions: Container[str] | None = None) -> list[str]:
    """What the staged sweeper has decided and why, in the order of its searches.

    Args:
        actions: those that are wanted; None takes all.
    """
    lines = []
    for search in selected.searches:
        for made in (made for made in search.decisions if actions is None or made.action in actions):
            seed = "" if made.seed is None else f", seed {made.seed}"
            step = "" if made.step is None else f", step {made.step}"
            lines.append(f"{search.group}: {made.lr:g} {made.action}{seed}{step}: {made.reason}")
    return [visible(line[:LONGEST_MESSAGE]) for line in lines]


def table(choices: Sequence[RateChoice], searched: bool) -> list[RenderableType]:
    """The choices as a table, with notes that a reader needs before a comparison.

    Args:
        searched: a staged search made them, which adds rates and seeds by one rule for every configuration.
    """

    def shown(value: float | None, metric: str) -> str:
        """A loss in nats, any other metric in per cent."""
        if value is None:
            return ""
        return f"{value:.3f}" if metric == LOSS or is_loss(metric) else f"{100 * value:.1f} %"

    rows: list[Sequence[str]] = []
    trials: dict[tuple[str, str], set[int]] = {}
    for choice in choices:
        numbers = (choice.seeds, choice.trials, choice.failed)
        rows.append(
            [
                choice.model,
                choice.task,
                choice.configuration,
                str(choice.rank),
                f"{choice.lr:g}",
                str(len(choice.lrs)),
                shown(choice.value, choice.metric),
                *map(str, numbers),
                shown(choice.test, choice.test_metric),
                EDGE_REMARK if choice.edge else "",
            ]
        )
        trials.setdefault((choice.model, choice.task), set()).add(choice.trials)
    text: list[RenderableType] = [screen.table(COLUMNS, rows, NUMBERS)]
    if any(choice.edge for choice in choices):
        text += ["", EDGE_NOTE]
    why = "the search added rates or seeds, by one rule for all" if searched else "not a fair comparison"
    for (model, task), counts in trials.items():
        if len(counts) > 1:
            text.append(f"{model} on {task}: {min(counts)} to {max(counts)} trials a configuration: {why}.")
    return text
