"""Any tracker, W&B's or a new one: metrics.jsonl is written first, and the tracker gets a copy of it."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tiedlora.errors import UserError
from tiedlora.records.rows import (
    NOT_GENERATED,
    AppendedFile,
    MetricsRow,
    PredictionRow,
    ValidationLosses,
    read_metrics,
    read_validation_losses,
    write_predictions,
)
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run, trainer
from tiedlora.tracking import run_trackers
from tiedlora.tracking.run_trackers import RunTrackers, TrackedRun, Tracker, first_answers


class FakeTracker(Tracker):
    """Stores the rows that it gets, and how many rows metrics.jsonl had when a row arrived."""

    started: list["FakeTracker"] = []

    def start(self, run, earlier):
        self.run, self.earlier, self.logged, self.rows_on_disk, self.finished = run, list(earlier), [], [], []
        FakeTracker.started.append(self)

    def log(self, rows):
        self.logged += rows
        self.rows_on_disk.append(len(read_metrics(RunFolder(self.run.folder).metrics_file)))

    def log_answers(self, answers):
        self.answers = answers

    def finish(self, summary, exit_code=0):
        self.finished.append((dict(summary), exit_code))


@pytest.fixture
def fake(monkeypatch) -> list[FakeTracker]:
    """Makes tracking.backend=fake valid, as a file tracking/fake.py would. Returns the started trackers."""
    module = ModuleType("tiedlora.tracking.fake")
    module.TRACKER = FakeTracker
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(FakeTracker, "started", [])
    return FakeTracker.started


@pytest.fixture
def faked(tiny_config, fake):
    """A configuration with that tracker."""

    def build(*overrides):
        config = tiny_config(*overrides)
        config.tracking.backend = "fake"
        return config

    return build


def rows(*steps: int) -> list[MetricsRow]:
    return [MetricsRow(step, {"train/loss": float(step)}) for step in steps]


class TestAppendedFile:
    def test_a_resumed_run_keeps_the_rows_up_to_its_checkpoint(self, tmp_path):
        path = tmp_path / "validation_losses.jsonl"
        losses = [ValidationLosses(step, [1.5, step / 2], [3, 2]) for step in (0, 2, 4)]
        AppendedFile(path, read_validation_losses).append(losses)
        with path.open("a") as file:
            file.write('{"step": 6, "losses": [1.0')
        resumed = AppendedFile(path, read_validation_losses, step=3)
        assert resumed.rows == losses[:2]
        resumed.append([losses[2]])
        assert read_validation_losses(path) == losses


class TestRunTrackers:
    def test_metrics_jsonl_is_first_and_a_resumed_segment_holds_the_whole_curve(self, faked, fake, tmp_path):
        tracked, file = TrackedRun("run", tmp_path, faked(), trainable_params=1), tmp_path / "metrics.jsonl"
        trackers = RunTrackers(tracked, step=0)
        for row in rows(1, 2, 3, 4, 5, 6):
            trackers.log([row])
        RunTrackers(tracked, step=4).log(rows(5))
        first, resumed = fake
        assert (first.earlier, first.logged) == ([], rows(1, 2, 3, 4, 5, 6))
        assert first.rows_on_disk == [1, 2, 3, 4, 5, 6]
        assert resumed.earlier + resumed.logged == rows(1, 2, 3, 4, 5) == read_metrics(file)
        # A run without a checkpoint starts over.
        RunTrackers(tracked, step=None)
        assert read_metrics(file) == []


class TestFailures:
    @pytest.mark.parametrize("moment", ["start", "log", "log_answers", "finish"])
    def test_a_tracker_that_fails_does_not_end_the_run(self, moment, faked, fake, monkeypatch, caplog):
        def fail(*arguments):
            raise RuntimeError("server on fire \x1b[31m")

        monkeypatch.setattr(FakeTracker, moment, fail)
        config = faked()
        record = run.main(config)
        assert record is not None
        assert len(read_metrics(RunFolder(Path(config.outputs) / record.run_id).metrics_file)) > 1
        warnings = [entry.getMessage() for entry in caplog.records if "has failed" in entry.getMessage()]
        assert len(warnings) == 1
        assert "server on fire ␛[31m" in warnings[0]

    def test_a_package_that_is_missing_is_a_mistake_only_if_it_was_asked_for(self, tiny_config, monkeypatch, tmp_path):
        auto, named = tiny_config(), tiny_config("tracking=wandb")
        monkeypatch.setattr(run_trackers, "_chosen", lambda: "wandb")
        monkeypatch.setitem(sys.modules, "wandb", None)
        monkeypatch.delitem(sys.modules, "tiedlora.tracking.wandb", raising=False)
        RunTrackers(TrackedRun("run", tmp_path, auto, 1), step=0).log(rows(1))
        assert read_metrics(tmp_path / "metrics.jsonl") == rows(1)
        with pytest.raises(UserError, match="wandb is not installed"):
            RunTrackers(TrackedRun("run", tmp_path, named, 1), step=0)


class TestAnswers:
    def test_the_table_is_bounded_and_its_texts_are_plain(self, tmp_path):
        long = PredictionRow("1", "p" * 10**6, ["r"], "\x1b]0;x\x07<script>alert(1)</script>", {"f1": 0.5})
        folder = RunFolder(tmp_path)
        write_predictions(folder.predictions_file("validation"), [long] * 100)
        write_predictions(folder.predictions_file("validation.base"), [long])
        answers = first_answers(folder, 7)
        assert [list(row) for row in answers] == 7 * [["split", "row", "prompt", "references", "base", "answer", "f1"]]
        assert max(len(cell) for row in answers for cell in row.values() if isinstance(cell, str)) < 2100
        assert answers[0]["answer"] == "␛]0;x␇<script>alert(1)</script>"

    def test_losses_alone_are_no_answers(self, tmp_path):
        folder = RunFolder(tmp_path)
        row = PredictionRow("1", "p", ["r"], "", {"target_loss": 0.5}, ended=NOT_GENERATED)
        write_predictions(folder.predictions_file("validation"), [row])
        assert first_answers(folder, 7) == []
        assert first_answers(RunFolder(tmp_path / "nothing"), 7) == []


class TestRun:
    def test_a_run_starts_its_tracker_logs_every_row_and_ends_with_the_summary(self, faked, fake):
        config = faked()
        record = run.main(config)
        (tracker,) = fake
        assert (tracker.run.run_id, tracker.run.trainable_params) == (record.run_id, record.trainable_params)
        assert tracker.earlier == []
        assert tracker.logged == read_metrics(RunFolder(tracker.run.folder).metrics_file)
        ((summary, exit_code),) = tracker.finished
        assert exit_code == 0
        assert summary["trainable_params"] == record.trainable_params
        assert len(tracker.answers) == record.scores["validation"].rows
        value = record.scores["validation"].metrics["exact_match_strict"].value
        assert summary["validation/exact_match_strict"] == value

    def test_a_run_that_fails_ends_its_tracker_as_failed_and_a_pause_is_no_failure(self, faked, fake, monkeypatch):
        def fail(*arguments):
            raise RuntimeError("in the loop")

        assert run.main(faked("train.pause_after=2")) is None
        monkeypatch.setattr("tiedlora.training.loop.Loop.train", fail)
        with pytest.raises(RuntimeError, match="in the loop"):
            trainer.carry_out(faked())
        assert [tracker.finished for tracker in fake] == [[({}, 0)], [({}, 1)]]

    def test_long_names_are_cut_to_tags_that_wandb_takes(self, faked):
        config = faked("task.name=" + 70 * "n", "tracking.tags=[mine]")
        tags = TrackedRun("id", Path(), config, 1).tags
        assert "n" * 64 in tags
        assert max(map(len, tags)) <= 64

    def test_a_team_in_the_project_is_refused(self, tiny_config):
        with pytest.raises(UserError, match=r"tracking\.project=team/tied: .*tracking\.entity"):
            run.main(tiny_config("tracking=wandb", "tracking.project=team/tied"))
