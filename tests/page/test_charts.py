"""The page's charts: what is drawn, and that texts in them are escaped."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from helpers.hostile import HOSTILE
from helpers.report_runs import make_record, scored_run, world, write_lines

from tiedlora.analysis import compare
from tiedlora.analysis.groups import group_runs
from tiedlora.analysis.runs import read_runs
from tiedlora.analysis.scorebook import Scorebook
from tiedlora.page import charts
from tiedlora.page.chart import Chart, linear_axis, log_axis
from tiedlora.page.panels import rank_ticks
from tiedlora.records.rows import MetricsRow

GOOD = [1.0, 0.0] * 25
BASE = [0.0] * 50


def elements(svg, name, css=""):
    root = ElementTree.fromstring(svg)
    return [item for item in root.iter(name) if css in item.get("class", "").split() or not css]


def titles(svg):
    return [item.text for item in ElementTree.fromstring(svg).iter("title")]


def groups_of(root):
    return group_runs(*read_runs([root]))


def unfinished(root, lr, seed, loss, file, text, changes=None):
    """A run that a search stopped, or that failed."""
    folder = root / make_record(changes, lr=lr, seed=seed).run_id
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"train: {{lr: {lr}}}\n")
    (folder / file).write_text(text)
    write_lines(
        folder / "metrics.jsonl", [MetricsRow(0, {"validation/loss": 2.0}), MetricsRow(16, {"validation/loss": loss})]
    )


def test_the_ranks_of_an_axis_leave_room_for_their_labels():
    assert rank_ticks([1, 2, 8, 11, 17, 29, 30, 32, 48, 80, 576]) == [1, 2, 8, 11, 17, 32, 48, 80, 576]
    assert rank_ticks([29, 30]) == [29]


def test_the_search_marks_the_chosen_rate_and_shows_pruned_and_failed_runs(tmp_path):
    for lr, right in ((1e-3, 10), (1e-2, 30)):
        for seed in (0, 1):
            scored_run(tmp_path, [1.0] * right + [0.0] * (50 - right), BASE, lr=lr, seed=seed)
    unfinished(tmp_path, 3e-2, 0, 1.7, "pruned.txt", "1.7 is worse than 1.2")
    unfinished(tmp_path, 1e-1, 0, 9.0, "error.txt", "Diverged: nan")
    (group,) = groups_of(tmp_path)
    assert [(trial.lr, trial.state, trial.step, trial.loss) for trial in group.trials if trial.state != "finished"] == [
        (3e-2, "pruned", 16, 1.7),
        (1e-1, "failed", 16, 9.0),
    ]
    svg = charts.search([group]).svg
    assert len(elements(svg, "g", "mark")) == 6
    hollow = [text for text in titles(svg) if "stopped after step 16" in text]
    assert hollow == ["TABuv r=8, rate 0.03, seed 0: 1.7, stopped after step 16"]
    assert sum("failed" in text for text in titles(svg)) == 1
    assert svg.count('class="ring"') == 1
    assert svg.count("mark hollow") == 2


def test_one_rate_is_no_search(tmp_path):
    scored_run(tmp_path, GOOD, BASE)
    assert charts.search(groups_of(tmp_path)) is None


def test_a_stopped_run_of_another_setting_is_not_in_the_search(tmp_path):
    for lr in (1e-3, 1e-2):
        scored_run(tmp_path, GOOD, BASE, lr=lr)
        scored_run(tmp_path, GOOD, BASE, lr=lr, changes={"config.train.steps": 300})
    unfinished(tmp_path, 3e-2, 0, 1.7, "pruned.txt", "worse", {"config.train.steps": 300})
    states = {group.variant: [trial.state for trial in group.trials] for group in groups_of(tmp_path)}
    assert states == {
        "train.steps=100": ["finished", "finished"],
        "train.steps=300": ["finished", "finished", "pruned"],
    }


def test_curves_have_a_line_for_each_configuration_and_a_band_over_seeds(tmp_path):
    for name in ("LoRA", "TABuv"):
        for seed in (0, 1):
            folder = scored_run(tmp_path, GOOD, BASE, name=name, seed=seed)
            rows = [MetricsRow(step, {"validation/loss": 2.0 - step / 100 + seed / 10}) for step in (0, 50, 100)]
            rows += [MetricsRow(100, {"validation/f1": 0.5})] if name == "LoRA" else []
            write_lines(folder / "metrics.jsonl", rows)
    (panel,) = charts.validation_curves(groups_of(tmp_path))
    assert len(elements(panel.svg, "polyline")) == 2
    assert len(elements(panel.svg, "polygon")) == 2
    assert "LoRA r=8 ends at 1.05" in panel.svg


def test_a_score_that_is_logged_by_step_has_a_panel(tmp_path):
    folder = scored_run(tmp_path, GOOD, BASE)
    rows = [MetricsRow(step, {"validation/loss": 2.0, "validation/f1": step / 200}) for step in (0, 50, 100)]
    write_lines(folder / "metrics.jsonl", rows)
    panels = charts.validation_curves(groups_of(tmp_path))
    assert [panel.title for panel in panels] == ["chain_sum", "chain_sum, validation/f1"]


def test_pareto_fills_what_is_not_beaten_and_names_the_points(tmp_path):
    world(tmp_path, {"LoRA": 0.7, "TABuv": 0.6, "TAB": 0.2, "TA": 0.3}, seeds=2, rows=200, base=0.05)
    rows = compare.result_rows(groups_of(tmp_path), Scorebook())
    svg = charts.pareto(charts.by_setting(rows, "tiny")[0]).svg
    assert svg.count("mark hollow") == 1, "TAB has more parameters than TA and a lower score"
    for name in ("LoRA r=8", "TABuv r=8"):
        assert f">{name}</text>" in svg
    assert "41,328 parameters" in svg
    assert charts.ranks(charts.by_setting(rows, "tiny")[0]) is None


def test_short_marks_stand_beside_the_name(tmp_path):
    for lr, right in ((1e-3, 30), (1e-2, 10)):
        scored_run(tmp_path, [1.0] * right + [0.0] * (50 - right), BASE, lr=lr)
    (key,) = charts.legend(groups_of(tmp_path))
    assert (key.name, key.marks) == ("TABuv r=8", ["rate at the edge"])


def test_texts_in_a_chart_are_escaped():
    chart = Chart(linear_axis(HOSTILE, [0, 1]), linear_axis("y", [0, 1]), HOSTILE)
    chart.mark(0.5, 0.5, "o", "k0", HOSTILE)
    chart.name(0.5, 0.5, HOSTILE)
    svg = chart.svg()
    assert "<script" not in svg
    assert "\x1b" not in svg
    ElementTree.fromstring(svg)


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-9, 2e9], [-3.0, 5.0], [0.163, 0.1631], []])
def test_an_axis_holds_its_values_and_has_ticks(values):
    axis = linear_axis("x", values)
    assert 2 <= len(axis.ticks) <= 9
    assert all(0 <= axis.place(value) <= 1 for value in values)
    assert all(0 <= axis.place(tick) <= 1 for tick, _ in axis.ticks)


@pytest.mark.parametrize("values", [[1e-2], [1e-4, 1e-1], [4608.0, 368640.0], [1.0, 1e9], [0.16, 0.17]])
def test_a_log_axis_holds_its_values_and_has_ticks(values):
    axis = log_axis("x", values)
    assert len(axis.ticks) >= 2
    assert all(0 <= axis.place(value) <= 1 for value in values)


def test_names_do_not_cover_each_other():
    chart = Chart(linear_axis("x", [0, 1]), linear_axis("y", [0, 1]), "")
    generator = np.random.default_rng(0)
    placed = [chart.name(*point, "LoRA r=8") for point in generator.random((200, 2))]
    assert 5 < sum(placed) < 100
    boxes = chart._taken
    for place, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:place]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
