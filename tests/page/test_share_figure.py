"""The figure of what every arm keeps of a reference's gain, and its table."""

import csv

import numpy as np
import pytest
from helpers.report_runs import report_of_shares, scored_run, world

from tiedlora.page import charts, figures, write


@pytest.mark.parametrize(("lora", "base"), [([0.0] * 50, [0.0] * 50), ([1.0] * 50, None)])
def test_without_a_gain_or_a_base_there_is_no_panel_and_no_file(tmp_path, lora, base):
    for name, scores in (("LoRA", lora), ("TABuv", [1.0] * 50)):
        for seed in (0, 1):
            scored_run(tmp_path / "runs", scores, base, name=name, seed=seed)
    report = report_of_shares(tmp_path)
    assert report.sizes == []
    write.write(report, tmp_path / "report")
    assert not list((tmp_path / "report").glob("shares.*"))


def test_the_figure_and_its_table_are_files_and_no_arm_is_lost_beyond_the_axis(tmp_path):
    for seed in (0, 1):
        for name, right in (("LoRA", 10), ("TABuv", 9), ("TA", 40)):
            scored_run(
                tmp_path / "runs",
                *(list(np.repeat([1.0, 0.0], [right, 40 - right])), [0.0] * 40),
                name=name,
                seed=seed,
            )
    write.write(report_of_shares(tmp_path), tmp_path / "report")
    svg = (tmp_path / "report" / "shares.svg").read_text()
    assert "share of the gain of LoRA r=8" in svg
    assert "400 %" in svg
    assert (tmp_path / "report" / "shares.png").stat().st_size > 5000
    with open(tmp_path / "report" / "shares.csv", newline="") as file:
        rows = {row["configuration"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"LoRA", "TABuv", "TA"}
    assert rows["TABuv"]["share of its gain"].startswith("90")


def test_the_page_shows_the_shares_first_and_folds_the_scores(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.5, "TA": 0.3}, rows=200, seed_sd=0.02)
    report = report_of_shares(tmp_path)
    (panel,) = [panel for panel in charts.panels(report.rows, report.answers, report.sizes) if panel.kind == "shares"]
    assert panel.title == "chain_sum, exact match strict"
    assert [key.name for key in figures.legend([panel])] == ["LoRA", "TABuv", "TA"]
    write.write(report, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    shares, scores = (page.index(f"<h3>{name} against trainable parameters") for name in ("Share of the gain", "Score"))
    assert shares < scores
    assert page[:scores].endswith('<details class="fold"><summary>')
