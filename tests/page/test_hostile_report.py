"""Hostile texts in records and predictions: what reaches the page, tables and terminal, and a search for more."""

import csv
import hashlib
import json
import re
import shutil

from helpers.hostile import HOSTILE, ODD_VALUES, change_rows, put, right_or_refused, search
from helpers.report_runs import scored_run
from hypothesis import given
from hypothesis import strategies as st

from tiedlora.page import charts, tables, write
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import read_record
from tiedlora.records.scores import read_finished, read_scores
from tiedlora.records.summary import terminal_lines
from tiedlora.runs import library, verify
from tiedlora.text import visible, visible_lines

pytest_plugins = ["helpers.hostile_runs"]
ALIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]")
"""Characters that move a cursor, end a line or reverse it. A page and a CSV file may have tabs and line feeds."""


def test_what_a_model_wrote_reaches_no_page_table_or_terminal_alive(tmp_path, script):
    for seed, (variant, lr) in enumerate((("cosine", 1e-2), (HOSTILE, 1e-2), ("=HYPERLINK(1)", 1e-3))):
        folder = scored_run(tmp_path / "runs", [1, 0, 1, 1], [0, 0, 1, 0], output=HOSTILE, seed=seed, lr=lr)
        put(folder, "identity.train.schedule", variant)
        put(folder, "identity.task.prompt", f"$\\frac{{{variant}")
        put(folder, "execution.device", HOSTILE)
        put(folder, "versions", {"torch": HOSTILE, HOSTILE: "@SUM(1)"})
        put(folder, "code", {"commit": HOSTILE, "dirty": None})
        change_rows(
            folder / "scores" / "validation.answers.jsonl",
            lambda row: row.update(id=f"{row['id']}{HOSTILE}", prompt=HOSTILE, references=[HOSTILE]),
        )
    failed = tmp_path / "runs" / "=1+1"
    failed.mkdir()
    (failed / "error.txt").write_text(f"Traceback\nValueError: {HOSTILE}\n")
    code, out, err = script("scripts/report.py", tmp_path / "runs", "--out", tmp_path / "report")
    assert (code, err) == (0, "")
    assert not ALIVE.search(out)
    texts = {path.name: path.read_text() for path in (tmp_path / "report").iterdir() if path.suffix != ".png"}
    for name, text in texts.items():
        assert not ALIVE.search(text), name
        assert "<script>alert" not in text or name.endswith((".csv", ".tex")), name
        if name.endswith(".md"):
            assert not re.search(r"(?<!\\)\]\(", text), name
        if name.endswith(".csv"):
            cells = [cell.lstrip() for row in csv.reader(text.splitlines()) for cell in row]
            formulas = [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
            assert all(re.fullmatch(r"[+-][\d.]+", cell) for cell in formulas), (name, formulas)
    assert texts["index.html"].count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in texts["index.html"]
    assert r"\input{" not in texts["results.tex"]
    assert r"95 \% seeds" in texts["results.tex"]
    assert r"50 \%" not in texts["results.tex"]


def test_what_a_record_says_reaches_the_terminal_and_the_card_tamed(folder, script, tmp_path):
    put(folder, "execution.device", HOSTILE)
    put(folder, "versions", {"torch": HOSTILE})
    code, out, err = script("scripts/score.py", folder, "--split", "validation")
    assert (code, err) == (0, "")
    assert not ALIVE.search(out)
    code, out, err = script("scripts/export.py", folder, "--to", "hub-card", "--out", tmp_path / "card")
    assert (code, err) == (0, "")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "\x1b" not in card
    assert "<script>" not in card
    code, out, _ = script("scripts/verify.py", folder, "--rows", "6")
    assert not ALIVE.search(out)


def test_a_failed_cells_error_reaches_the_terminal_tamed(folder, words, script):
    (folder / "result.json").unlink()
    (folder / "error.txt").write_text(f"Traceback\n{HOSTILE}")
    code, out, err = script("scripts/sweep.py", "status", *words)
    assert (code, err) == (0, "")
    assert "failed" in out
    assert not ALIVE.search(out)
    (folder / "error.txt").write_bytes(b"\xff\xfe")
    assert script("scripts/sweep.py", "status", *words)[0] == 0


def test_texts_are_made_visible():
    assert visible("a\x1b[2J\x00\n\x7f\x9b\u202e\ud800\uffffé") == "a␛[2J␀␊␡<U+009B><U+202E><U+D800><U+FFFF>é"
    assert visible_lines("a\nb\x1b") == "a\nb␛"


def leaves(node: object, prefix: tuple = ()) -> list[tuple]:
    found = [prefix] if prefix else []
    if isinstance(node, dict):
        found += [path for key, value in node.items() for path in leaves(value, (*prefix, key))]
    return found


@given(st.data())
@search(25)
def test_any_record_is_read_or_refused(place, tmp_path_factory, data):
    """The record of the training, or that of scores in the first line of a file."""
    name = data.draw(st.sampled_from(["result.json", "scores/validation.answers.jsonl"]))
    first, *rows = (place[0] / name).read_text().split("\n", 1 if name.startswith("scores") else 0)
    record = json.loads(first)
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from(leaves(record)))
        node = record
        for key in parents:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[last] = data.draw(ODD_VALUES)
    root = tmp_path_factory.getbasetemp() / "any-record"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(place[0], root / place[0].name)
    text = "\n".join([json.dumps(record), *rows])
    (root / place[0].name / name).write_text(text)
    with right_or_refused():
        run = read_finished(RunFolder(root / place[0].name))
        terminal_lines(run.record, run.scores, root)
        library.config_of(root / place[0].name)
    report = write.build([root])
    shown = report.tables()
    for table in shown:
        for render in (tables.to_csv, tables.to_latex, tables.to_markdown):
            assert not ALIVE.search(render(table))
    drawn = write.render(report, shown, charts.panels(report.rows, report.rankings, report.share_panels, report.leads))
    assert drawn.count("<script>") == 1
    assert not ALIVE.search(drawn)
    with right_or_refused():
        verify.lines(verify.verify(root / place[0].name, rows=0))
    assert (root / place[0].name / name).read_text() == text


@given(st.data())
@search(250)
def test_any_file_is_read_or_refused(place, tmp_path_factory, data):
    lines = (place[0] / "scores" / "validation.answers.jsonl").read_bytes().splitlines()
    head, *rows = map(json.loads, lines)
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.sampled_from([*row, "choices", "log_likelihoods"]))] = data.draw(ODD_VALUES)
    lines = st.just(rows) | st.lists(ODD_VALUES, max_size=4)
    content = data.draw(st.binary(max_size=200) | lines.map(lambda own: "\n".join(map(json.dumps, own)).encode()))
    head["rows_sha256"] = hashlib.sha256(content).hexdigest()
    path = tmp_path_factory.getbasetemp() / "any-file"
    for whole in (content, json.dumps(head).encode() + b"\n" + content):
        path.write_bytes(whole)
        for reader in (read_record, read_scores, read_metrics):
            with right_or_refused():
                reader(path)
        assert path.read_bytes() == whole
