"""Everything that names a learning rate names the same one, for random sweeps."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.report_runs import make_config, make_record, scored_run, write_run

from tiedlora.page import write
from tiedlora.records.selection import read_selection, write_selection
from tiedlora.sweeps import selection
from tiedlora.sweeps.cells import Sweep, SweepCell

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
Rates = dict[tuple[str, int], float]
"""(Configuration, rank) -> the chosen rate."""


def by_select(sweep: Sweep) -> Rates:
    return {(choice.configuration, choice.rank): choice.lr for choice in selection.select_rates(sweep).choices}


def by_selection_json(sweep: Sweep) -> Rates:
    file = sweep.selection_file
    write_selection(file, selection.select_rates(sweep))
    return {(choice.configuration, choice.rank): choice.lr for choice in read_selection(file).choices}


def by_report(sweep: Sweep) -> Rates:
    report = write.build([Path(sweep.cells[0].config.outputs)])
    return {(group.configuration, group.rank): group.lr for group in report.groups}


CHOOSERS: dict[str, Callable[[Sweep], Rates]] = {
    "select": by_select,
    "report": by_report,
    "selection.json": by_selection_json,
    "report after select": by_report,
}
"""What names a rate for each configuration of a sweep whose runs lie in its folder outputs/."""


def random_sweep(outputs: Path, draw: random.Random) -> Sweep:
    """A finished sweep: ties, failed runs, missing seeds, searches of unequal effort, and runs of different metrics."""
    metrics = draw.choice(([], ["exact_match_strict"], ["exact_match_strict", "target_loss"]))
    cells = []
    for name in ("LoRA", "TAB", "TABuv"):
        rates = draw.sample(RATES, draw.choice((1, 2, 4, 7)))
        kept = draw.choice(rates)
        for lr in rates:
            seeds = range(3) if draw.random() < 0.6 else draw.sample(range(4), draw.choice((1, 2, 3)))
            diverges = lr != kept and draw.random() < 0.3
            for seed in seeds:
                cell = SweepCell((), make_config(name, lr=lr, seed=seed))
                cell.config.outputs = str(outputs)
                cell.config.score.splits = ["validation"] if metrics else []
                metric = draw.choice(metrics or [""])
                cell.config.score.metrics = ["target_loss"] if metric == "target_loss" else None
                cells.append(cell)
                if diverges and draw.random() < 0.7:
                    cell.folder.path.mkdir(parents=True)
                    cell.folder.config_file.write_text(f"train: {{lr: {lr}}}\n")
                    cell.folder.error_file.write_text("UserError: step 3: the validation loss is nan\n")
                    continue
                # Few different values, so that ties are common.
                about = {"name": name, "lr": lr, "seed": seed}
                changes = {"training.validation_loss_last": draw.choice((0.5, 0.75, 1.0))}
                if metrics:
                    right = draw.choice((2, 3, 4))
                    scored_run(outputs, [1.0] * right + [0.0] * (8 - right), metric=metric, changes=changes, **about)
                else:
                    write_run(outputs, make_record(changes, **about), {})
    draw.shuffle(cells)
    return Sweep("sweep", cells)


@pytest.mark.parametrize("number", range(12))
def test_one_rate_for_one_sweep(tmp_path, number):
    sweep = random_sweep(tmp_path / "outputs", random.Random(number))
    named = {chooser: choose(sweep) for chooser, choose in CHOOSERS.items()}
    assert set(named["select"]) == {("LoRA", 8), ("TAB", 8), ("TABuv", 8)}
    assert all(rates == named["select"] for rates in named.values()), named
