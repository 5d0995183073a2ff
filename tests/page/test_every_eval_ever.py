"""Runs in the shared evaluation schema: the files fit together, and the schema's own validator passes them."""

import hashlib
import json
import sys
from importlib.util import find_spec

import pytest
from helpers import processes
from helpers.report_runs import scored_run

from tiedlora.analysis.runs import read_runs
from tiedlora.page import every_eval_ever

HOSTILE = "\x1b]0;x\x07<script>alert(1)</script>\ud800" + "a" * 10**6
"""A title for the terminal, markup, half of a surrogate pair, and a megabyte."""


@pytest.fixture
def exported(tmp_path):
    scores = [1.0, 0.0] * 10
    scored_run(tmp_path / "runs", scores, [0.0] * 20, split="test", output=HOSTILE)
    scored_run(tmp_path / "runs", [1.5, 0.5] * 10, split="validation", metric="target_loss", task="squad", name="LoRA")
    runs, _ = read_runs([tmp_path / "runs"])
    assert every_eval_ever.export(runs, tmp_path / "out") == 2
    return runs, tmp_path / "out"


def aggregates(folder) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def test_every_score_has_its_interval_and_every_row_its_result(exported):
    runs, folder = exported
    for tree in aggregates(folder):
        (run,) = [run for run in runs if tree["model_info"]["id"].endswith(run.run_id)]
        ((split, scores),) = run.splits.items()
        (result,) = tree["evaluation_results"]
        interval = scores.metrics[scores.first_metric]
        ends = result["score_details"]["uncertainty"]["confidence_interval"]
        assert (result["score_details"]["score"], ends["lower"], ends["upper"]) == (
            interval.value,
            interval.low,
            interval.high,
        )
        detailed = tree["detailed_evaluation_results"]
        data = (folder / detailed["file_path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == detailed["checksum"]
        rows = [json.loads(line) for line in data.splitlines()]
        assert len(rows) == detailed["total_rows"] == scores.rows
        assert {row["evaluation_result_id"] for row in rows} == {result["evaluation_result_id"]}
        assert {row["evaluation_id"] for row in rows} == {tree["evaluation_id"]}
        assert [row["evaluation"]["score"] for row in rows] == [
            row.scores[scores.first_metric] for row in run.rows(split)
        ]


def test_a_models_text_is_kept_as_it_is(exported):
    _, folder = exported
    outputs = {json.loads(line)["output"]["raw"][0] for path in folder.rglob("*.jsonl") for line in path.open()}
    assert HOSTILE in outputs


def test_a_second_export_writes_the_same_files(exported):
    runs, folder = exported
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    every_eval_ever.export(runs, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(find_spec("every_eval_ever") is None, reason="needs every-eval-ever (Python 3.12)")
def test_the_schemas_own_validator_passes_the_files(tmp_path, script):
    scored_run(tmp_path / "runs", [1.0, 0.0] * 10, [0.0] * 20, split="test", output="<b>\x1b[31m</b>" + "a" * 10**6)
    code, out, _ = script("scripts/report.py", tmp_path / "runs", "--out", tmp_path, "--export", "every-eval-ever")
    assert code == 0
    assert "exported       1 runs" in out
    folder = tmp_path / "every-eval-ever"
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    command = [sys.executable, "-m", "every_eval_ever", "validate", *files]
    done = processes.run(command, cwd=folder)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
