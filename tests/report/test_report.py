"""The report: what it reads, leaves out, averages, marks and writes."""

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers.report_runs import add_scores, make_record, prediction_rows, scored_run, world, write_run

from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError
from tiedlora.report import cells, compare, tables, write
from tiedlora.report.compare import Scorebook
from tiedlora.report.runs import read_runs
from tiedlora.statistics import crossed

GOOD = [1.0, 0.0] * 25
BASE = [0.0] * 50


def built(root, **options):
    return write.build([root], **options)


def only(rows, name):
    (row,) = [row for row in rows if row.cell.label == name and row.primary]
    return row


class TestReading:
    def test_what_is_no_finished_run_is_listed_with_its_reason(self, tmp_path):
        scored_run(tmp_path, GOOD, BASE)
        for name in ("base", "sweeps", ".hidden"):
            (tmp_path / name).mkdir()
        (tmp_path / "photos").mkdir()
        unfinished = tmp_path / "LoRA-r8-chain_sum-tiny-s0-0123456789"
        unfinished.mkdir()
        (unfinished / "config.yaml").write_text("train: {lr: 0.003}\n")
        failed = tmp_path / "LoRA-r8-chain_sum-tiny-s1-0123456789"
        failed.mkdir()
        (failed / "error.txt").write_text("Traceback\nZeroDivisionError: division by zero\n")
        whole = scored_run(tmp_path, GOOD, BASE, seed=1)
        (whole / "result.json").write_text((whole / "result.json").read_text()[:200])
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        (foreign / "result.json").write_text('{"accuracy": 1}')
        runs, left_out = read_runs([tmp_path])
        assert len(runs) == 1
        reasons = {folder.path.name: folder.reason for folder in left_out}
        assert reasons["photos"].startswith("not a run")
        assert "not finished" in reasons[unfinished.name]
        assert reasons[failed.name] == "failed: ZeroDivisionError: division by zero"
        assert "not valid JSON" in reasons[whole.name]
        assert "not a run's record" in reasons["foreign"]
        assert set(reasons) == {"photos", unfinished.name, failed.name, whole.name, "foreign"}

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("identity.task.name", "<script>"),
            ("base.name", "a\nb"),
            ("training.tokens_per_s", float("nan")),
            ("status", "running"),
            ("trainable_params", True),
            ("scores", {"test": {"rows": 3, "digest": "d", "metrics": {"x": {"value": None}}}}),
            ("scores", {"test": 3}),
            ("code", None),
        ],
    )
    def test_a_record_that_is_not_ours_is_left_out_not_fatal(self, tmp_path, path, value):
        record = add_scores(make_record(), "validation", GOOD, BASE)
        *parents, last = path.split(".")
        node = record
        for key in parents:
            node = node[key]
        node[last] = value
        write_run(tmp_path, record, {})
        runs, left_out = read_runs([tmp_path])
        assert not runs
        assert len(left_out) == 1

    def test_the_same_run_twice_counts_once(self, tmp_path):
        scored_run(tmp_path / "a", GOOD, BASE)
        scored_run(tmp_path / "b", GOOD, BASE)
        runs, left_out = read_runs([tmp_path / "a", tmp_path / "b"])
        assert len(runs) == len(left_out) == 1
        assert "the same run" in left_out[0].reason

    def test_no_torch_is_imported(self, tmp_path):
        world(tmp_path, {"LoRA": 0.5, "TABuv": 0.4}, seeds=2, rows=40)
        program = (
            "import sys, runpy; sys.argv = ['report.py', sys.argv[1], '--out', sys.argv[2]]\n"
            f"runpy.run_path({str(PROJECT / 'scripts/report.py')!r}, run_name='__main__')\n"
            "assert not {'torch', 'transformers', 'wandb'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(tmp_path / "report")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def test_a_thousand_folders_fit_in_memory_and_bad_ones_are_listed(self, tmp_path):
        """The bound is 1 GB. Time is not tested: cores that other tests share double it (docs/results.md has it)."""
        names = ("LoRA", "TABuv", "TAB", "TA", "Tuv")
        generator = np.random.default_rng(1)
        for task in ("chain_sum", "squad", "gsm8k", "iwslt2017", "dialogsum"):
            for rank in (2, 8, 32, 128):
                for seed in range(10):
                    base = np.zeros(20)
                    for name in names:
                        ours = (generator.random(20) < 0.5).astype(float)
                        scored_run(tmp_path / "runs", ours, base, name=name, rank=rank, seed=seed, task=task)
        cut, unfinished = sorted(path for path in (tmp_path / "runs").iterdir() if "-s9-" in path.name)[:2]
        (cut / "result.json").write_text((cut / "result.json").read_text()[:300])
        (unfinished / "result.json").unlink()
        (tmp_path / "runs" / "foreign").mkdir()
        program = (
            "import re, sys, pathlib; from tiedlora.report import write\n"
            "found = write.build([pathlib.Path(sys.argv[1])])\n"
            "write.write(found, pathlib.Path(sys.argv[2]))\n"
            # Not getrusage: its peak survives exec, so a child would report its parent's.
            "peak = re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]\n"
            "print(len(found.runs), len(found.left_out), int(peak) // 1024)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "runs"), str(tmp_path / "report")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        runs, left_out, mebibytes = map(int, done.stdout.split())
        assert (runs, left_out) == (998, 3)
        assert 0 < mebibytes < 1024


class TestCells:
    def test_the_rate_is_chosen_on_validation_over_the_seeds_that_all_rates_share(self, tmp_path):
        for lr, right, seeds in ((1e-3, 10, 2), (1e-2, 30, 5), (3e-2, 20, 2)):
            for seed in range(seeds):
                scored_run(tmp_path, [1.0] * right + [0.0] * (50 - right), BASE, lr=lr, seed=seed)
        (cell,) = cells.cells(read_runs([tmp_path])[0])
        assert cell.lr == 1e-2
        assert [run.seed for run in cell.runs] == [0, 1, 2, 3, 4]
        assert [rate.lr for rate in cell.rates] == [1e-3, 1e-2, 3e-2]
        assert not cell.marks

    def test_a_winner_at_the_edge_and_a_failed_rate_are_marked(self, tmp_path):
        for lr, right in ((1e-3, 10), (1e-2, 20), (3e-2, 30), (1e-1, 40)):
            scored_run(tmp_path, [1.0] * right + [0.0] * (50 - right), BASE, lr=lr)
        failed = tmp_path / "TABuv-r8-chain_sum-tiny-s1-0123456789"
        failed.mkdir()
        (failed / "error.txt").write_text("UserError: the loss is nan")
        (failed / "config.yaml").write_text("train: {lr: 0.1}\n")
        (cell,) = cells.cells(*read_runs([tmp_path]))
        assert cell.lr == 3e-2, "a rate that diverges at one seed is not a rate to use"
        assert any("seed 1 at lr 0.1 failed" in mark for mark in cell.marks)
        failed.joinpath("error.txt").unlink()
        failed.joinpath("config.yaml").unlink()
        failed.rmdir()
        (cell,) = cells.cells(*read_runs([tmp_path]))
        assert cell.lr == 1e-1
        assert any("at the edge" in mark for mark in cell.marks)

    def test_other_protocols_are_other_rows_and_named(self, tmp_path):
        scored_run(tmp_path, GOOD, BASE)
        scored_run(tmp_path, GOOD, BASE, **{"identity.train.steps": 300})
        scored_run(tmp_path, GOOD, BASE, **{"identity.tying.dropout": 0.1})
        found = cells.cells(read_runs([tmp_path])[0])
        assert len(found) == 3
        assert {cell.variant for cell in found} == {"train.steps=100", "train.steps=300"}
        assert any("tying.dropout=0.1" in cell.configuration for cell in found)

    def test_mixed_commits_are_marked_and_mixed_data_have_no_mean(self, tmp_path):
        scored_run(tmp_path, GOOD, BASE, name="LoRA")
        scored_run(tmp_path, GOOD, BASE, seed=0)
        scored_run(tmp_path, GOOD, BASE, seed=1, **{"code.commit": "b" * 40, "code.dirty": True})
        rows = built(tmp_path).rows
        marks = only(rows, "TABuv").cell.marks
        assert any(mark.startswith("mixed commits: aaaaaaaa, bbbbbbbb") for mark in marks)
        assert any("uncommitted" in mark for mark in marks)
        scored_run(tmp_path, GOOD, BASE, seed=2, **{"data.train.digest": "other"})
        row = only(built(tmp_path).rows, "TABuv")
        assert row.score is None
        assert any("different data" in note for note in row.notes)

    def test_cells_on_other_rows_are_not_subtracted(self, tmp_path):
        scored_run(tmp_path, GOOD, BASE, name="LoRA")
        folder = scored_run(tmp_path, GOOD, BASE)
        record = json.loads((folder / "result.json").read_text())
        record["scores"]["validation"]["digest"] = "other rows"
        (folder / "result.json").write_text(json.dumps(record))
        row = only(built(tmp_path).rows, "TABuv")
        assert row.score is not None
        assert row.difference is None
        assert any("other data" in note for note in row.notes)

    def test_a_seed_without_the_split_is_missing_not_filled_in(self, tmp_path):
        scored_run(tmp_path, GOOD, BASE, split="test", seed=0)
        scored_run(tmp_path, GOOD, BASE, split="validation", seed=1)
        row = only(built(tmp_path).rows, "TABuv")
        assert (row.split, row.seeds) == ("test", [0])
        assert any("not scored on test: seed 1" in note for note in row.notes)


class TestNumbers:
    def test_every_number_equals_a_recomputation_from_predictions(self, tmp_path):
        world(tmp_path, {"LoRA": 0.5, "TABuv": 0.4, "TA": 0.2}, seeds=4, rows=60)
        for row in built(tmp_path).rows:
            ours = np.array([self.scores(run.path, "validation") for run in row.cell.runs])
            base = self.scores(row.cell.runs[0].path, "validation.base")
            assert row.score.value == pytest.approx(ours.mean())
            assert row.gain.value == pytest.approx((ours - base).mean())
            if row.cell.label != "LoRA":
                lora = only(built(tmp_path).rows, "LoRA")
                theirs = np.array([self.scores(run.path, "validation") for run in lora.cell.runs])
                per_seed = ours.mean(1) - theirs.mean(1)
                # Student's t by hand: 3.182 is the 97.5 % point of 3 degrees of freedom.
                half = 3.18245 * per_seed.std(ddof=1) / 2
                assert row.difference.value == pytest.approx(per_seed.mean())
                assert row.difference.seeds.low == pytest.approx(per_seed.mean() - half, abs=1e-6)
                assert row.retained.value == pytest.approx((ours - base).mean() / (theirs - base).mean())

    def scores(self, folder, name):
        lines = (folder / "predictions" / f"{name}.jsonl").read_text().splitlines()
        return np.array([json.loads(line)["scores"]["exact_match_strict"] for line in lines])

    def test_one_seed_has_the_intervals_of_its_record(self, tmp_path):
        world(tmp_path, {"LoRA": 0.5}, seeds=1, rows=60)
        row = only(built(tmp_path).rows, "LoRA")
        recorded = row.cell.runs[0].splits["validation"]
        found = row.score.examples
        assert {"value": found.value, "low": found.low, "high": found.high} == pytest.approx(
            recorded["metrics"]["exact_match_strict"]
        )
        gain = row.gain.examples
        assert {"value": gain.value, "low": gain.low, "high": gain.high} == pytest.approx(
            recorded["gain"]["exact_match_strict"]
        )
        assert row.score.seeds is None

    def test_predictions_that_disagree_with_the_record_give_no_interval(self, tmp_path):
        folder = scored_run(tmp_path, GOOD, BASE)
        path = folder / "predictions" / "validation.jsonl"
        path.write_text(path.read_text().replace("1.0", "0.0", 1))
        row = only(built(tmp_path).rows, "TABuv")
        assert row.score.examples is None
        assert any("verify.py" in note for note in row.notes)

    def test_corpus_scores_are_served_by_pseudo_values(self):
        """For a ratio of sums (BLEU's shape) they give the score, and the spread of resampled sentences."""
        generator = np.random.default_rng(3)
        length = generator.integers(5, 30, 400).astype(float)
        counts = np.stack([generator.binomial(length.astype(int), 0.6), length], axis=1)

        def score(sums):
            return float(sums[0] / sums[1])

        values = compare.pseudo_values(counts, score)
        assert values.mean() == pytest.approx(score(counts.sum(0)))
        drawn = generator.integers(0, 400, (2000, 400))
        resampled = np.array([score(counts[rows].sum(0)) for rows in drawn])
        _, low, high = crossed.over_examples(values)
        expected = np.quantile(resampled, [0.025, 0.975])
        assert [low, high] == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))

    def test_the_corpus_score_is_the_tasks_own(self, tmp_path, monkeypatch):
        from tiedlora.tasks.gsm8k import Gsm8k

        monkeypatch.setattr(Gsm8k, "corpus_score", lambda self, metric, sums: sums[0] / sums[1], raising=False)
        counts = [[3.0, 4.0], [1.0, 4.0]] * 10
        record = make_record()
        found = {"value": 0.5, "low": 0.4, "high": 0.6}
        record["scores"]["test"] = {"rows": 20, "digest": "d", "metrics": {"bleu": found}}
        write_run(tmp_path, record, {"test": prediction_rows(counts, "bleu")})
        (run,) = read_runs([tmp_path])[0]
        _, values = Scorebook().scores(run, "test", "bleu")
        assert values.mean() == pytest.approx(0.5)

    def test_the_ratio_has_no_interval_where_the_denominator_may_be_zero(self):
        assert crossed.ratio(np.array([0.1, 0.2, 0.1]), np.array([0.3, -0.2, 0.1])) is None
        found = crossed.ratio(np.array([0.30, 0.32, 0.31, 0.29]), np.array([0.40, 0.41, 0.42, 0.40]))
        assert found.low < found.value < found.high


class TestWriting:
    HOSTILE = "</pre><script>alert(1)</script>\x1b[2J\x00\u202e\ud800 =1+1"

    def test_predictions_cannot_run_or_hide(self, tmp_path):
        scored_run(tmp_path / "runs", GOOD, BASE, output=self.HOSTILE)
        write.write(built(tmp_path / "runs"), tmp_path / "report")
        page = (tmp_path / "report" / "index.html").read_text()
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)" in page
        assert not set(page) & {"\x1b", "\x00", "\u202e"}
        assert page.count("<script>") == 1
        assert "default-src 'none'" in page
        loads = re.findall(r"(?:src|href)=\"(?!#|data:)([^\"]+)", page)
        assert not loads, "the page loads nothing"

    def test_tables_come_in_three_formats_with_the_same_cells(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.5, "TABuv": 0.4}, seeds=2, rows=40)
        report = built(tmp_path / "runs")
        write.write(report, tmp_path / "report")
        rows = list(csv.reader((tmp_path / "report" / "results.csv").open()))
        assert len(rows) == 3
        cells = dict(zip(rows[0], rows[2], strict=True))
        (row,) = [row for row in report.rows if row.cell.configuration == cells["configuration"]]
        assert float(cells["score"]) == pytest.approx(100 * row.score.value, abs=0.05)
        assert float(cells["95 % seeds low"]) == pytest.approx(100 * row.score.seeds.low, abs=0.05)
        assert "95 % seeds (difference) high" in cells
        assert cells["parameters"] == str(row.cell.params)
        latex = (tmp_path / "report" / "results.tex").read_text()
        markdown = (tmp_path / "report" / "results.md").read_text()
        for text in (latex, markdown):
            assert tables.points(report.rows[0].score.value) in text
        assert all(line.endswith((r"\\", "rule")) for line in latex.splitlines()[4:-2])
        for name in ("pareto", "rank", "curves", "cost"):
            assert (tmp_path / "report" / f"{name}.png").stat().st_size > 5000
            assert (tmp_path / "report" / f"{name}.svg").read_text().startswith("<?xml")

    @pytest.mark.parametrize(
        ("cell", "safe"),
        [("=1+1", "'=1+1"), ("@x", "'@x"), ("+1.5", "+1.5"), ("-3,000", "-3000"), ("-1+2", "'-1+2"), (" =x", "' =x")],
    )
    def test_formulas_are_neutralised_and_numbers_stay(self, cell, safe):
        assert tables.safe_cell(cell) == safe

    def test_the_overview_names_missing_and_failed_cells_and_its_average(self, tmp_path):
        world(tmp_path, {"LoRA": 0.5, "TABuv": 0.4}, seeds=2, rows=40)
        world(tmp_path, {"LoRA": 0.5}, seeds=2, rows=40, task="squad")
        failed = tmp_path / "TABuv-r8-squad-tiny-s0-0123456789"
        failed.mkdir()
        (failed / "error.txt").write_text("boom")
        report = built(tmp_path)
        (table,) = tables.overview(report.rows, report.left_out)
        lines = {row[0]: row for row in table.rows}
        squad, average = table.head.index("squad"), table.head.index("average")
        assert lines["TABuv"][squad] == "failed"
        assert lines["TABuv"][average] == tables.MISSING
        assert "(n=2)" in lines["LoRA"][average]
        assert "chain_sum, squad" in table.caption

    def test_a_task_in_two_settings_has_no_average(self, tmp_path):
        scored_run(tmp_path, GOOD, BASE)
        scored_run(tmp_path, GOOD, BASE, **{"identity.train.steps": 300})
        (table,) = tables.overview(built(tmp_path).rows, [])
        assert "average" not in table.head
        assert any("train.steps=300" in name for name in table.head)

    def test_an_empty_folder_gives_an_empty_report_and_a_missing_one_an_error(self, tmp_path):
        (tmp_path / "runs").mkdir()
        lines = write.write(built(tmp_path / "runs"), tmp_path / "report")
        assert lines[0].startswith("0 finished runs")
        with pytest.raises(UserError, match="is not a folder"):
            built(tmp_path / "nowhere")

    def test_the_script_says_what_is_wrong_in_one_line(self, tmp_path):
        done = subprocess.run(
            [sys.executable, str(PROJECT / "scripts/report.py"), str(tmp_path / "nowhere")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
