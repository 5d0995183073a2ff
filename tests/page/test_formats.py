"""Values become text only when they are written: for people in Markdown, LaTeX and the page, for programs in CSV."""

import csv
import math
from operator import attrgetter
from types import SimpleNamespace

import pytest

from tiedlora.analysis.results import Measure
from tiedlora.page import tables
from tiedlora.page.tables import Column, Table
from tiedlora.records.interval import Interval, Unit

SCORE, GAP = Interval(0.4213, 0.4, 0.45), Interval(-0.011, -0.03, 0.008)
NO_ENDS = Interval(0.5, math.nan, math.nan)
CASES = [
    (tables.TEXT, "squad", "squad", ["squad"]),
    (tables.TEXT, None, "–", ["–"]),
    (tables.WHOLE, 8, "8", ["8"]),
    (tables.COUNT, 46080, "46,080", ["46080"]),
    (tables.amount(2), 1234.567, "1,234.57", ["1234.57"]),
    (tables.SHARE, 0.112, "11.20 %", ["11.20 %"]),
    (tables.PERCENT_INTERVAL, Interval(0.86, 0.68, 1.08), "86 % [68, 108]", ["86.00", "68.00", "108.00"]),
    (tables.PERCENT_INTERVAL, NO_ENDS, "50 %", ["50.00", "–", "–"]),
    (tables.RATE, (0.003, 1), "0.003", ["0.003"]),
    (tables.RATE, (0.003, 3), "0.003 of 3", ["0.003 of 3"]),
    (tables.NAMED_ENDS, (Unit.POINTS, GAP, ""), "[-3.0, +0.8]", ["", "-3.0", "+0.8"]),
    (tables.NAMED_ENDS, (Unit.POINTS, Interval(-0.01, -0.02, -0.0003), ""), "[-2.0, -0.03]", ["", "-2.0", "-0.03"]),
    (tables.NAMED_ENDS, (Unit.NATS, Interval(0.01, 0.0, 1e-9), ""), "[+0.000, +0.000]", ["", "+0.000", "+0.000"]),
    (tables.NAMED_ENDS, (Unit.POINTS, GAP, "examples"), "[-3.0, +0.8] examples", ["examples", "-3.0", "+0.8"]),
    (tables.PERCENT_INTERVAL, "failed", "failed", ["failed", "–", "–"]),
]


@pytest.mark.parametrize(("kind", "cell", "text", "cells"), CASES)
def test_a_cell_is_one_text_for_people_and_its_numbers_for_programs(kind, cell, text, cells):
    table = Table.of("t", "c", [Column("x", kind)], [cell])
    assert table.texts() == [[text]]
    head, body = csv.reader(tables.to_csv(table).splitlines())
    assert body == cells
    assert len(head) == len(set(head)) == len(cells)
    assert head[0].startswith("x")


@pytest.mark.parametrize(
    ("number", "options", "text", "cells"),
    [
        (SCORE, tables.VALUE, "42.1", ["42.1"]),
        (SCORE, {"sign": "+", **tables.VALUE}, "+42.1", ["+42.1"]),
        (SCORE, {}, "42.1 [40.0, 45.0]", ["42.1", "40.0", "45.0"]),
        (NO_ENDS, {}, "50.0", ["50.0", "–", "–"]),
        (GAP, {"sign": "+"}, "-1.1 [-3.0, +0.8]", ["-1.1", "-3.0", "+0.8"]),
        (SCORE, tables.ENDS, "[40.0, 45.0]", ["40.0", "45.0"]),
        (NO_ENDS, tables.ENDS, "–", ["–", "–"]),
    ],
)
def test_an_estimate_has_its_unit_and_two_columns_of_one_name_differ_in_csv(number, options, text, cells):
    of = attrgetter("contrast")
    columns = (tables.estimate("x", of, **options), tables.estimate("x", of, csv_name="x (difference)", **options))
    table = Table.of("t", "c", columns, [SimpleNamespace(contrast=number, measure=Measure("test", "f1"))])
    assert table.texts() == [[text, text]]
    head, body = csv.reader(tables.to_csv(table).splitlines())
    assert body == 2 * cells
    assert len(set(head)) == len(head)
