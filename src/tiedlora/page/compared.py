"""The answer to `compare A B` as text for a terminal, as Markdown, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tiedlora import storage
from tiedlora.analysis.two_sides import PairedTest, Side
from tiedlora.page.tables import COUNT, Column, Kind, Table, markdown, pipe_table
from tiedlora.records.interval import Unit
from tiedlora.text import aligned, counted, visible


@dataclass(frozen=True)
class Compared:
    """Two sides and the tests of B against A."""

    a: Side
    b: Side
    tests: Sequence[PairedTest]
    notes: Sequence[str]
    """On the whole; each test has its own."""

    def text(self) -> str:
        """For a terminal."""
        table = self._table()
        return self._around(aligned([table.head, *table.texts()]), "", visible)

    def markdown(self) -> str:
        """For a document."""
        return self._around(pipe_table(self._table()).rstrip("\n"), "- ", markdown)

    def json(self) -> str:
        """For programs. Numbers are in the metric's own unit, as in the files."""
        sides = {side.name: {"paths": list(map(str, side.paths)), "arm": side.label} for side in (self.a, self.b)}
        return storage.json_bytes(sides | {"tests": list(map(_plain, self.tests)), "notes": [*self.notes]}).decode()

    def _around(self, table: str, mark: str, shown: Callable[[str], str]) -> str:
        several = len(self.tests) > 1
        names = {id(test): " ".join(filter(None, (test.task, test.metric))) for test in self.tests}
        before = {id(test): f"{names[id(test)]}: " if several else "" for test in self.tests}
        lines = [*(mark + shown(_described(side)) for side in (self.a, self.b)), "", table, ""]
        lines += [mark + shown(before[id(test)] + _sentence(test)) for test in self.tests]
        if several:
            better, worse = (sum(test.answer == answer for test in self.tests) for answer in ("better", "worse"))
            total = counted(len(self.tests), "test")
            lines.append(f"{mark}By Holm's procedure over {total} (5 %): B is better in {better}, worse in {worse}.")
        of_tests: dict[str, list[str]] = {}
        for test in self.tests:
            for note in test.notes:
                of_tests.setdefault(note, []).append(names[id(test)])
        # A note that all tests share needs no names.
        said = [n if len(own) == len(self.tests) else f"{', '.join(own)}: {n}" for n, own in of_tests.items()]
        lines += [mark + shown(f"note: {note}") for note in (*said, *self.notes)]
        return "\n".join(lines) + "\n"

    def _table(self) -> Table:
        tests = self.tests

        def has(of: Callable[[PairedTest], Any]) -> bool:
            return any(of(test) for test in tests)

        columns = [
            *([Column("task", cell=lambda test: visible(test.task))] if has(lambda test: test.task) else []),
            Column("metric", cell=lambda test: visible(test.metric) + (" (lower)" if test.lower_is_better else "")),
            *([Column("split", cell=lambda test: test.split)] if has(lambda test: test.split) else []),
            *([Column("seeds", COUNT, lambda test: test.seeds)] if has(lambda test: test.seeds > 1) else []),
            Column("rows", COUNT, lambda test: test.rows),
            *([Column("clusters", COUNT, lambda t: t.clusters or None)] if has(lambda test: test.clusters) else []),
            Column("A", cell=lambda test: test.unit.number(test.a)),
            Column("B", cell=lambda test: test.unit.number(test.b)),
            Column("B - A [95 %]", cell=lambda test: test.unit.text(test.difference.widest, "+")),
            Column("p", Kind(p_in_words), lambda test: test.p),
            Column("can show", cell=lambda test: None if test.smallest is None else test.unit.number(test.smallest)),
            Column("B is", cell=lambda test: test.answer),
        ]
        return Table.of("compared", "", columns, tests)


def p_in_words(p: float) -> str:
    """Two digits; a smaller one than 0.0001 is only said to be that."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _described(side: Side) -> str:
    more = f" and {len(side.paths) - 1} more" if len(side.paths) > 1 else ""
    paths = f"{side.paths[0]}{more}"
    return f"{side.name}: {f'{side.label} ({paths})' if side.label else paths}"


def _sentence(test: PairedTest) -> str:
    interval, unit = test.difference.widest, test.unit
    said = {"better": "B is better than A", "worse": "B is worse than A", "not shown": "no difference is shown"}
    how = f"{unit.text(interval, '+')} {unit.words}, {test.test}"
    if test.alone is not None:
        what = "1" if test.lower_is_better else "right"
        how += f" ({counted(test.alone[1], 'row')} {what} in B alone, {test.alone[0]:,} in A alone)"
    shown = ""
    if test.smallest is not None:
        shown = f" Such a test shows a difference of {unit.number(test.smallest)} with a chance of 80 %."
    return f"{said[test.answer]}: {how}.{shown}"


def _plain(test: PairedTest) -> dict[str, Any]:
    interval = test.difference.widest
    return {
        # A name from a stranger's file may hold half of a character, which no file can.
        "task": visible(test.task),
        "metric": visible(test.metric),
        "split": test.split,
        "lower_is_better": test.lower_is_better,
        "rows": test.rows,
        "seeds": test.seeds,
        "clusters": test.clusters,
        "A": test.a,
        "B": test.b,
        "difference": interval.value,
        "low": None if math.isnan(interval.low) else interval.low,
        "high": None if math.isnan(interval.high) else interval.high,
        "interval": interval.method,
        "test": test.test,
        "p": test.p,
        "only_A": None if test.alone is None else test.alone[0],
        "only_B": None if test.alone is None else test.alone[1],
        "smallest_shown": test.smallest,
        "unit": "fractions of 1" if test.unit is Unit.POINTS else test.unit.words,
        "shown": test.holds,
        "B_is": test.answer,
        "notes": list(map(visible, test.notes)),
    }
