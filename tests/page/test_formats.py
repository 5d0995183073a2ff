"""Values become text only when they are written: for people in Markdown, LaTeX and the page, for programs in CSV."""

import csv
import math

import pytest

from tiedlora.page import formats
from tiedlora.page.values import (
    Amount,
    AverageScore,
    Column,
    Count,
    Ends,
    LearningRate,
    NamedEnds,
    Percent,
    PercentInterval,
    ScoreInterval,
    ScoreValue,
    Table,
    TaskScore,
)
from tiedlora.records.interval import Interval

SCORE, GAP = Interval(0.4213, 0.4, 0.45), Interval(-0.011, -0.03, 0.008)
NO_ENDS = Interval(0.5, math.nan, math.nan)
GAIN = ScoreInterval(GAP, signed=True)
CASES = [
    ("squad", "squad", ["squad"]),
    (8, "8", ["8"]),
    (2.5, "2.5", ["2.5"]),
    (None, "–", ["–"]),
    (Count(46080), "46,080", ["46080"]),
    (Amount(1234.567), "1,234.57", ["1234.57"]),
    (Amount(1234.567, 0), "1,235", ["1235"]),
    (Percent(0.112), "11.20 %", ["11.20 %"]),
    (PercentInterval(Interval(0.86, 0.68, 1.08)), "86 % [68, 108]", ["86 %", "68", "108"]),
    (PercentInterval(NO_ENDS), "50 %", ["50 %", "–", "–"]),
    (LearningRate(0.003, 1), "0.003", ["0.003"]),
    (LearningRate(0.003, 3), "0.003 of 3", ["0.003 of 3"]),
    (ScoreValue(0.4213), "42.1", ["42.1"]),
    (ScoreValue(0.4213, signed=True), "+42.1", ["+42.1"]),
    (ScoreInterval(SCORE), "42.1 [40.0, 45.0]", ["42.1", "40.0", "45.0"]),
    (GAIN, "-1.1 [-3.0, +0.8]", ["-1.1", "-3.0", "+0.8"]),
    (ScoreInterval(NO_ENDS), "50.0", ["50.0", "–", "–"]),
    (Ends(SCORE), "[40.0, 45.0]", ["40.0", "45.0"]),
    (Ends(NO_ENDS), "–", ["–", "–"]),
    (NamedEnds(GAP, signed=True), "[-3.0, +0.8]", ["", "-3.0", "+0.8"]),
    (NamedEnds(GAP, "examples", signed=True), "[-3.0, +0.8] examples", ["examples", "-3.0", "+0.8"]),
    (TaskScore(0.482, 5, False), "48.2 (n=5)", ["48.2", "5", "", "–", "–", "–"]),
    (TaskScore(0.482, 5, True, GAIN), "48.2 (n=5)* (-1.1 [-3.0, +0.8])", ["48.2", "5", "*", "-1.1", "-3.0", "+0.8"]),
    (TaskScore(None, 0, True), "–*", ["–", "0", "*", "–", "–", "–"]),
    (AverageScore(SCORE, 4), "42.1 [40.0, 45.0] (n=4)", ["42.1", "4", "40.0", "45.0"]),
    (AverageScore(NO_ENDS, 1), "50.0 (n=1)", ["50.0", "1", "–", "–"]),
]


@pytest.mark.parametrize(("value", "text", "cells"), CASES)
def test_a_value_is_one_text_for_people_and_its_numbers_for_programs(value, text, cells):
    table = Table("t", "c", (Column("x", type(value) if value is not None else str),), [(value,)])
    assert formats.text(value) == text
    head, body = csv.reader(formats.to_csv(table).splitlines() if cells != [""] else [])
    assert body == cells
    assert len(head) == len(set(head)) == len(cells)
    assert head[0].startswith("x")


def test_a_column_has_the_same_csv_columns_whatever_its_rows_hold():
    columns = (Column("score", TaskScore), Column("95 %", Ends), Column("95 %", Ends, csv_name="95 % (difference)"))
    rows = [("failed", None, None), (TaskScore(0.5, 1, False), Ends(SCORE), None)]
    head, failed, scored = csv.reader(formats.to_csv(Table("t", "c", columns, rows)).splitlines())
    assert head[-4:] == ["95 % low", "95 % high", "95 % (difference) low", "95 % (difference) high"]
    assert len(head) == len(failed) == len(scored)
    assert failed[0] == "failed"
    assert set(failed[1:]) == {formats.MISSING}


@pytest.mark.parametrize(
    ("cell", "safe"),
    [("=1+1", "'=1+1"), ("@x", "'@x"), ("+1.5", "+1.5"), ("-3000", "-3000"), ("-1+2", "'-1+2"), (" =x", "' =x")],
)
def test_formulas_are_neutralised_and_numbers_stay(cell, safe):
    assert formats.safe_text(cell) == safe


def test_markup_of_markdown_and_latex_is_escaped():
    table = Table("t", "a_b", (Column("x|y"),), [("50 % of $x_1$ & <b>",)])
    assert r"| 50 % of $x\_1$ & \<b\> |" in formats.to_markdown(table)
    assert r"x\|y" in formats.to_markdown(table)
    assert r"50 \% of \$x\_1\$ \& \textless{}b\textgreater{} \\" in formats.to_latex(table)
