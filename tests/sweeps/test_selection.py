"""A learning rate for every configuration, chosen on validation; test only for the chosen runs; selection.json."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.report_runs import make_config, make_record, scored_run, write_config, write_run
from helpers.sweeping import compose_sweep

from tiedlora import screen
from tiedlora.errors import UserError
from tiedlora.page import write
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_finished, read_run_scores
from tiedlora.records.selection import (
    RateChoice,
    Selection,
    read_selection,
    validation_metric,
    validation_scores,
    write_selection,
)
from tiedlora.sweeps import selection
from tiedlora.sweeps.cells import Sweep, SweepCell


def test_select_chooses_on_validation_and_tests_the_chosen_alone(tiny_run, finish):
    sweep = compose_sweep(tiny_run("tying=LoRA,TABuv", "train.lr=1e-3,1e-2", "seed=0,1"))
    for cell in sweep.cells:
        finish(cell.config)
    chosen = selection.select_rates(sweep, "loss")
    found = [(choice.configuration, choice.lrs, choice.seeds, choice.trials) for choice in chosen.choices]
    assert found == [(name, [1e-3, 1e-2], 2, 4) for name in ("LoRA", "TABuv")]
    for choice in chosen.choices:
        losses = dict.fromkeys(choice.lrs, 0.0)
        for cell in sweep.cells:
            if cell.config.tying.name == choice.configuration:
                losses[cell.config.train.lr] += cell.folder.record().training.validation_loss_last / 2
        assert choice.lr == min(losses, key=losses.get)
        assert choice.edge
    scored = selection.score_test(sweep, chosen)
    tested = {cell.run_id for cell in sweep.cells if cell.folder.scores_file("test", "answers").exists()}
    assert tested == {run_id for choice in chosen.choices for run_id in choice.run_ids}
    assert len(tested) == 4
    assert "at the edge of the grid" in screen.text(*selection.table(scored.choices, searched=False))
    # A stop may have left some of a run's kinds of scores.
    lost = RunFolder(sweep.cells[0].folder.path.parent / scored.choices[0].run_ids[0]).scores_file("test", "losses")
    lost.unlink()
    assert selection.score_test(sweep, chosen) == scored
    assert lost.exists()
    for choice in scored.choices:
        tested = [read_run_scores(cell.folder).metrics("test") for cell in sweep.cells if cell.run_id in choice.run_ids]
        assert choice.test == sum(metrics["exact_match_strict"].value for metrics in tested) / 2


@pytest.fixture
def chosen() -> Selection:
    choice = RateChoice(
        "llama",
        "chain_sum",
        "TABuv",
        8,
        1e-3,
        [1e-4, 1e-3, 1e-2],
        "exact_match_strict",
        0.25,
        2,
        6,
        0,
        False,
        ["TABuv-1", "TABuv-2"],
    )
    return Selection("sweep-1a2b3c4d", "score", [choice])


def test_a_dropped_cell_is_no_trial(tiny_run, finish):
    sweep = compose_sweep(tiny_run("seed=0,1", "train.lr=1e-3,1e-2"))
    *run_now, last = sweep.cells
    for cell in run_now:
        finish(cell.config)
    with pytest.raises(UserError, match="1 of 4 cells are not finished"):
        selection.select_rates(sweep)
    sweep.control.drop([last.run_id])
    (choice,) = selection.select_rates(sweep).choices
    assert choice.trials == 3


def test_of_a_sweep_whose_cells_are_all_dropped_nothing_is_chosen(tiny_run):
    sweep = compose_sweep(tiny_run("seed=0,1"))
    sweep.control.drop([cell.run_id for cell in sweep.cells])
    with pytest.raises(UserError, match=r"all of its cells are dropped; sweep\.py retry puts them back"):
        selection.select_rates(sweep)


def test_selection_json_is_read_as_it_was_written_and_damage_is_one_line_that_names_file_and_key(tiny_run, chosen):
    file = compose_sweep(tiny_run()).path / "selection.json"
    write_selection(file, chosen)
    assert read_selection(file) == chosen
    tree = json.loads(file.read_text())
    assert list(tree) == ["sweep", "by", "choices", "searches"]
    assert list(tree["choices"][0]) == [
        "model",
        "task",
        "configuration",
        "rank",
        "lr",
        "lrs",
        "metric",
        "value",
        "seeds",
        "trials",
        "failed",
        "edge",
        "run_ids",
        "test",
        "test_metric",
        "selection_seeds",
        "tied",
    ]
    file.write_text(json.dumps({**tree, "choices": [{**tree["choices"][0], "lr": "high"}]}))
    with pytest.raises(UserError, match=r"selection\.json: 'choices\.0\.lr' is 'high'"):
        read_selection(file)


def test_without_scores_the_rate_is_chosen_by_loss_unless_the_score_is_asked_for(tiny_run, finish):
    sweep = compose_sweep(tiny_run("train.lr=1e-3,1e-2", "score.splits=[]"))
    for cell in sweep.cells:
        finish(cell.config)
    chosen = selection.select_rates(sweep)
    assert (chosen.by, chosen.choices[0].metric, chosen.choices[0].selection_seeds) == ("loss", "validation/loss", [0])
    with pytest.raises(UserError, match="choose by loss with --by loss"):
        selection.select_rates(sweep, "score")


def test_trials_that_differ_are_no_fair_comparison(chosen):
    (choice,) = chosen.choices
    fewer = replace(choice, configuration="LoRA", trials=4)
    remark = "llama on chain_sum: 4 to 6 trials a configuration: not a fair comparison."
    assert remark in screen.text(*selection.table([choice, fewer], searched=False))
    assert "fair" not in screen.text(*selection.table([choice, choice], searched=False))
    by_rule = "4 to 6 trials a configuration: the search added rates or seeds, by one rule for all."
    assert by_rule in screen.text(*selection.table([choice, fewer], searched=True))


def test_a_loss_is_the_better_score_if_it_is_lower_and_runs_of_two_metrics_have_none_in_common(tmp_path):
    of_metric = {"target_loss": [0.5, 1.5], "exact_match": [1.0, 1.0]}
    folders = [scored_run(tmp_path / name, scores, metric=name) for name, scores in of_metric.items()]
    loss, match = (read_finished(RunFolder(folder)) for folder in folders)
    assert validation_scores({0: loss}, "target_loss") == {0: -1.0}
    assert validation_scores({0: match}, "exact_match") == {0: 1.0}
    assert validation_metric([loss, loss]) == "target_loss"
    assert validation_metric([loss, match]) is None


def by_report(sweep: Sweep) -> dict[tuple[str, int], float]:
    """(Configuration, rank) -> the rate that the report takes."""
    report = write.build([Path(sweep.cells[0].config.outputs)])
    return {(group.configuration, group.rank): group.lr for group in report.groups}


def random_sweep(outputs: Path, draw: random.Random) -> Sweep:
    """A finished sweep: ties, failed runs, missing seeds, searches of unequal effort, and runs of different metrics."""
    metrics = draw.choice(([], ["exact_match_strict"], ["exact_match_strict", "target_loss"]))
    cells = []
    for name in ("LoRA", "TAB", "TABuv"):
        rates = draw.sample((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), draw.choice((1, 2, 4, 7)))
        kept = draw.choice(rates)
        for lr in rates:
            seeds = range(3) if draw.random() < 0.6 else draw.sample(range(4), draw.choice((1, 2, 3)))
            diverges = lr != kept and draw.random() < 0.3
            for seed in seeds:
                cell = SweepCell((), make_config(name, lr=lr, seed=seed))
                cell.config.outputs = str(outputs)
                cell.config.score.splits = ["validation"] if metrics else []
                metric = draw.choice(metrics or [""])
                cell.config.score.metrics = [metric] if metric else None
                cells.append(cell)
                if diverges and draw.random() < 0.7:
                    cell.folder.path.mkdir(parents=True)
                    write_config(cell.folder.path, make_record(name=name, lr=lr, seed=seed))
                    cell.folder.error_file.write_text("UserError: step 3: the validation loss is nan\n")
                    continue
                # Few different values, so that ties are common.
                about = {"name": name, "lr": lr, "seed": seed}
                changes = {"training.validation_loss_last": draw.choice((0.5, 0.75, 1.0))}
                if metrics:
                    right = draw.choice((2, 3, 4))
                    scored_run(outputs, [1.0] * right + [0.0] * (8 - right), metric=metric, changes=changes, **about)
                else:
                    write_run(outputs, make_record(changes, **about))
    draw.shuffle(cells)
    return Sweep("sweep", cells)


@pytest.mark.parametrize("number", range(12))
def test_one_rate_for_one_sweep(tmp_path, number):
    sweep = random_sweep(tmp_path / "outputs", random.Random(number))
    chosen = selection.select_rates(sweep)
    rates = {(choice.configuration, choice.rank): choice.lr for choice in chosen.choices}
    assert set(rates) == {("LoRA", 8), ("TAB", 8), ("TABuv", 8)}
    assert by_report(sweep) == rates
    write_selection(sweep.path / "selection.json", chosen)
    assert by_report(sweep) == rates, "after select"
