"""The charts: what they draw, where names stand, and that their SVG is safe and follows the page's theme."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from types import SimpleNamespace

import pytest
from helpers.hostile import HOSTILE
from helpers.report_runs import BASE, GOOD, make_record, report_of_claim, scored_run, world, write_config, write_lines
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tiedlora.page import charts, figures, write
from tiedlora.page.figures import BACK, Panel
from tiedlora.records.rows import MetricsRow, ValidationLosses


def panels(root):
    report = write.build([root])
    return charts.panels(report.rows, report.rankings, report.share_panels, report.leads)


def drawn(panel):
    """The Axes on which the panel has drawn."""
    ax = Figure(figsize=figures.SIZE).add_subplot()
    panel.draw(ax)
    return ax


def markers(ax):
    """(marker, whether it is filled) of every point that is drawn alone."""
    single = [line for line in ax.lines if len(line.get_xdata()) == 1]
    return [(line.get_marker(), to_hex(line.get_markerfacecolor()) != BACK) for line in single]


def unfinished(root, lr, loss, file, text):
    """A run that a search stopped, or that failed."""
    record = make_record(lr=lr)
    folder = root / record.run_id
    folder.mkdir(parents=True)
    write_config(folder, record)
    (folder / file).write_text(text)
    rows = [MetricsRow(step, {"validation/loss": value}) for step, value in ((0, 2.0), (16, loss))]
    write_lines(folder / "metrics.jsonl", rows)


def test_a_row_against_lora_names_the_size_of_lora_on_each_task():
    group, equal = SimpleNamespace(params=41_328, short="TABuv r 8"), SimpleNamespace(params=46_080)
    there = SimpleNamespace(group=group, lora=equal, has_equal_size=True)
    far = SimpleNamespace(group=group, lora=SimpleNamespace(params=368_640), has_equal_size=False)
    names = [charts._row_name(arms) for arms in ([there, there], [far, far], [there, far])]
    assert names == [f"TABuv r 8 (41,328{more})" for more in ("", "; LoRA: 368,640", "; LoRA: its size or 368,640")]


def test_the_search_marks_the_chosen_rate_and_shows_pruned_and_failed_runs(tmp_path):
    for lr, right in ((1e-3, 10), (1e-2, 30)):
        for seed in (0, 1):
            scored_run(tmp_path, [1.0] * right + [0.0] * (50 - right), BASE, lr=lr, seed=seed)
    unfinished(tmp_path, 3e-2, 1.7, "pruned.txt", "1.7 is worse than 1.2")
    unfinished(tmp_path, 1e-1, 9.0, "error.txt", "Diverged: nan")
    (panel,) = [panel for panel in panels(tmp_path) if panel.kind == "search"]
    (group,) = panel.groups
    ax = drawn(panel)
    assert Counter(markers(ax)) == {("D", True): 4, ("D", False): 1, ("x", False): 1, ("o", True): 1}
    (ring,) = [line for line in ax.lines if line.get_marker() == "o"]
    assert ring.get_xdata() == [group.lr] == [1e-2]
    # The axis has room for the finished runs. The one with a loss of 9 stands at the top of it.
    losses = [trial.loss for trial in group.trials if trial.ending == "finished"]
    shown = {line.get_marker(): line.get_ydata()[0] for line in ax.lines if len(line.get_ydata()) == 1}
    assert max(losses) < shown["x"] < ax.get_ylim()[1] < 2 * max(losses)


def test_curves_have_a_line_for_each_configuration_and_a_band_over_seeds_and_one_rate_is_no_search(tmp_path):
    for name in ("LoRA", "TABuv"):
        for seed in (0, 1):
            folder = scored_run(tmp_path, GOOD, BASE, name=name, seed=seed)
            # A run that was continued by hand may lack a line.
            steps = (0, 100) if (name, seed) == ("LoRA", 0) else (0, 50, 100)
            rows = [MetricsRow(step, {"validation/loss": 2.0 - step / 100 + seed / 10}) for step in steps]
            rows += [MetricsRow(step, {"validation/f1": 0.5}) for step in ((50, 100) if name == "LoRA" else (100,))]
            write_lines(folder / "metrics.jsonl", rows)
    found = panels(tmp_path)
    found = [panel for panel in found if panel.kind != "against"]
    assert [panel.kind for panel in found] == ["pareto", "curves", "curves"], "one rate is no search"
    assert [panel.title for panel in found[1:]] == ["chain_sum", "chain_sum, validation/f1"]
    assert [group.label for group in found[2].groups] == ["LoRA"], "one step is no curve"
    ax = drawn(found[1])
    # The mean of the two seeds at the end: 1 and 1.1.
    assert [line.get_ydata()[-1] for line in ax.lines] == [pytest.approx(1.05)] * 2
    assert len(ax.collections) == 2
    assert {text.get_text() for text in ax.texts} == {"LoRA r 8", "TABuv r 8"}


def test_pareto_fills_what_is_not_beaten_and_names_the_points(tmp_path):
    world(tmp_path, {"LoRA": 0.7, "TABuv": 0.6, "TAB": 0.2, "TA": 0.3}, seeds=2, rows=200, base=0.05)
    ax = drawn(next(panel for panel in panels(tmp_path) if panel.kind == "pareto"))
    assert [marker for marker, is_filled in markers(ax) if not is_filled] == ["s"], (
        "TAB has more parameters than TA and a lower score"
    )
    assert {"LoRA r 8", "TABuv r 8"} <= {text.get_text() for text in ax.texts}


def test_differences_from_lora_have_better_at_the_right_and_are_filled_if_they_hold(tmp_path):
    truth = {("LoRA", 1): 0.2, ("LoRA", 8): 0.3, ("TABuv", 32): 0.8, ("TAB", 48): 0.2}
    world(tmp_path / "runs", truth, seeds=5, rows=200)
    report = report_of_claim(tmp_path, "better_by: 0", "TABuv, rank: 32", "frontier: LoRA", top="looks: [3, 5]")
    found = charts.panels(report.rows, report.rankings, report.share_panels, report.leads)
    (panel,) = [panel for panel in found if panel.kind == "against"]
    (ax,) = drawn(panel).child_axes
    params = {arm.group.label: arm.group.params for arm in report.rankings[0]}
    rows = sorted(("TABuv", "TAB"), key=lambda name: -params[name])
    assert [label.get_text().split()[0] for label in ax.get_yticklabels()] == rows
    points = [line for line in ax.lines if len(line.get_xdata()) == 1 and line.get_marker() in "Ds"]
    assert [(line.get_marker(), to_hex(line.get_markerfacecolor()) != BACK) for line in points] == [
        ("D", True),
        ("s", False),
    ]
    assert points[0].get_xdata()[0] > 0 > points[1].get_xdata()[0]


def test_the_lead_over_steps_has_a_band_and_an_axis_for_the_second_half(tmp_path):
    # A hundred times as far apart at the start as later.
    for name, losses in (("LoRA", [2.0, 1.0, 0.9]), ("TABuv", [2.0, 3.0, 0.91])):
        for seed in (0, 1):
            folder = scored_run(tmp_path, GOOD, BASE, name=name, seed=seed)
            rows = [
                ValidationLosses(step, [loss, loss + seed / 1000], [2, 2])
                for step, loss in zip((0, 20, 100), losses, strict=True)
            ]
            write_lines(folder / "validation_losses.jsonl", rows)
    (panel,) = [panel for panel in panels(tmp_path) if panel.kind == "over-steps"]
    ax = drawn(panel)
    _, line = ax.lines
    assert line.get_ydata() == pytest.approx([0, 2, 0.01])
    assert len(ax.collections) == 1
    low, high = ax.get_ylim()
    assert low < 0
    assert 0.01 < high < 0.1
    assert [text.get_text() for text in ax.texts] == ["TABuv r 8"]


def test_no_two_configurations_have_one_colour(tmp_path):
    colours = [colour for colour, _, _ in figures.STYLES.values()]
    assert len(set(colours)) == len(colours)
    for name in ("TABuv", "TAB", "TA", "LoRA"):
        scored_run(tmp_path, GOOD, BASE, name=name)
        # Its name follows from its values, so that it is none of the named configurations.
        scored_run(tmp_path, GOOD, BASE, name=name, changes={"config.objective.name": "reward"})
    report = write.build([tmp_path])
    figures.choose_styles(report.groups)
    looks = {group.arm.family: figures.style(group.arm)[0] for group in report.groups}
    assert len(looks) == 8
    assert len(set(looks.values())) == 8


@pytest.mark.filterwarnings("error")
def test_a_panel_of_the_page_has_no_style_no_fixed_colour_and_hostile_text_only_as_text():
    def draw(ax):
        ax.plot([0, 1], [0, 1], color=figures.COLOURS[0])
        ax.set_xlabel(figures.cut(HOSTILE, 200))

    texts = [figures.inline(Panel("pareto", "tiny", title, draw)) for title in (HOSTILE, "other")]
    for text in texts:
        assert "<script" not in text
        assert not set(text) & {"\x1b", "\x00", "\u202e"}
        assert "style" not in text
        assert not re.search("#[0-9a-f]{6}", text), "a colour that does not follow the theme"
        root = ElementTree.fromstring(text)
        used = {element.get("href") for element in root.iter("use")}
        assert used
        assert used == {f"#{element.get('id')}" for element in root.iter("path") if f"#{element.get('id')}" in used}
    ids = [re.findall(r' id="([^"]+)"', text) for text in texts]
    assert not set(ids[0]) & set(ids[1])
