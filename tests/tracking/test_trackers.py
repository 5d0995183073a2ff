"""Any tracker, W&B's or a new one: metrics.jsonl is written first, and the tracker gets a copy of it."""

import sys
from types import ModuleType

import pytest

from tiedlora.records.rows import MetricsRow, ValidationLosses, read_metrics, read_validation_losses
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import execute, run
from tiedlora.tracking.appended_file import AppendedFile
from tiedlora.tracking.base import TrackedRun
from tiedlora.tracking.metrics_file import MetricsFile
from tiedlora.tracking.run_trackers import RunTrackers


class FakeTracker:
    """Stores the rows that it gets, and how many rows metrics.jsonl had when a row arrived."""

    started: list["FakeTracker"] = []

    def start(self, run, earlier):
        self.run, self.earlier, self.logged, self.rows_on_disk, self.finished = run, list(earlier), [], [], []
        FakeTracker.started.append(self)

    def log(self, rows):
        self.logged += rows
        self.rows_on_disk.append(len(read_metrics(RunFolder(self.run.folder).metrics_file)))

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


class TestMetricsFile:
    def test_a_resumed_run_keeps_the_rows_up_to_its_checkpoint(self, tmp_path):
        MetricsFile(tmp_path / "metrics.jsonl").log(rows(1, 2, 3, 4, 5, 6))
        resumed = MetricsFile(tmp_path / "metrics.jsonl", step=4)
        assert resumed.rows == rows(1, 2, 3, 4)
        resumed.log(rows(5))
        assert read_metrics(tmp_path / "metrics.jsonl") == rows(1, 2, 3, 4, 5)

    def test_a_run_that_starts_over_starts_an_empty_file(self, tmp_path):
        MetricsFile(tmp_path / "metrics.jsonl").log(rows(1, 2))
        assert MetricsFile(tmp_path / "metrics.jsonl").rows == []
        assert read_metrics(tmp_path / "metrics.jsonl") == []

    def test_the_losses_of_validation_rows_are_kept_in_the_same_way(self, tmp_path):
        path = tmp_path / "validation_losses.jsonl"
        losses = [ValidationLosses(step, [1.5, step / 2], [3, 2]) for step in (0, 2, 4)]
        AppendedFile(path, read_validation_losses).append(losses)
        with path.open("a") as file:
            file.write('{"step": 6, "losses": [1.0')
        resumed = AppendedFile(path, read_validation_losses, step=3)
        resumed.append([losses[2]])
        assert read_validation_losses(path) == losses
        assert read_validation_losses(tmp_path / "of-an-older-run.jsonl") == []


class TestRunTrackers:
    def test_a_resumed_segment_holds_the_whole_curve(self, faked, fake, tmp_path):
        tracked = TrackedRun("run", tmp_path, faked(), trainable_params=1)
        RunTrackers(tracked, tmp_path / "metrics.jsonl", step=0).log(rows(1, 2, 3, 4, 5, 6))
        RunTrackers(tracked, tmp_path / "metrics.jsonl", step=4).log(rows(5))
        first, resumed = fake
        assert (first.earlier, first.logged) == ([], rows(1, 2, 3, 4, 5, 6))
        assert resumed.earlier + resumed.logged == rows(1, 2, 3, 4, 5)
        assert resumed.earlier + resumed.logged == read_metrics(tmp_path / "metrics.jsonl")

    def test_a_row_is_in_metrics_jsonl_before_another_tracker_has_it(self, faked, fake, tmp_path):
        trackers = RunTrackers(TrackedRun("run", tmp_path, faked(), 1), tmp_path / "metrics.jsonl", step=0)
        for row in rows(1, 2, 3):
            trackers.log([row])
        assert fake[0].rows_on_disk == [1, 2, 3]

    def test_without_a_backend_metrics_jsonl_is_all(self, tiny_config, fake, tmp_path):
        trackers = RunTrackers(TrackedRun("run", tmp_path, tiny_config(), 1), tmp_path / "metrics.jsonl", step=0)
        trackers.log(rows(1))
        trackers.finish({"validation/f1": 0.5})
        assert read_metrics(tmp_path / "metrics.jsonl") == rows(1)
        assert fake == []


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
        value = record.scores["validation"].metrics["exact_match_strict"].value
        assert summary["validation/exact_match_strict"] == value

    def test_a_run_that_fails_ends_its_tracker_as_failed(self, faked, fake, monkeypatch):
        def fail(*arguments):
            raise RuntimeError("in the loop")

        monkeypatch.setattr("tiedlora.training.loop.train", fail)
        with pytest.raises(RuntimeError, match="in the loop"):
            execute.execute(faked())
        assert fake[0].finished == [({}, 1)]
