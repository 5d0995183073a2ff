"""The whole report: tables in three formats, figures, a page on which nothing runs, and errors in one line."""

import base64
import csv
import hashlib
import re

import pytest
from helpers.hostile import HOSTILE
from helpers.report_runs import scored_run, world

from tiedlora.page import write
from tiedlora.records.interval import Unit

GOOD = [1.0, 0.0] * 25
BASE = [0.0] * 50


def test_the_page_loads_nothing_and_its_policy_allows_its_own_script_and_style_alone(tmp_path):
    scored_run(tmp_path / "runs", GOOD, BASE, output=HOSTILE)
    write.write(write.build([tmp_path / "runs"]), tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<script>") == 1
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)([^\"]+)", page)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        ((text),) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.search(r"<[^>]* (?:style|on[a-z]+)=", page), "an attribute that the policy would refuse"


def test_tables_come_in_three_formats_with_the_same_cells(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.5, "TABuv": 0.4}, seeds=2, rows=40)
    report = write.build([tmp_path / "runs"])
    write.write(report, tmp_path / "report")
    rows = list(csv.reader((tmp_path / "report" / "results.csv").open()))
    assert len(rows) == 3
    cells = dict(zip(rows[0], rows[2], strict=True))
    (row,) = [row for row in report.rows if row.group.configuration == cells["configuration"]]
    assert float(cells["score"]) == pytest.approx(100 * row.score.value, abs=0.05)
    assert float(cells["95 % seeds low"]) == pytest.approx(100 * row.score.seeds.low, abs=0.05)
    assert "95 % seeds (difference) high" in cells
    assert cells["parameters"] == str(row.group.params)
    latex = (tmp_path / "report" / "results.tex").read_text()
    markdown = (tmp_path / "report" / "results.md").read_text()
    for text in (latex, markdown):
        assert Unit.POINTS.number(report.rows[0].score.value) in text
    assert all(line.endswith((r"\\", "rule")) for line in latex.splitlines()[4:-2])
    for name in ("pareto", "curves"):  # forest: test_claims_shown.py
        assert (tmp_path / "report" / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / "report" / f"{name}.svg").read_text().startswith("<?xml")
