"""Any tracker, W&B's or a new one: metrics.jsonl is written first, and the tracker gets a copy of it."""

import copy
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import wandb
from helpers.forks import forked_world
from helpers.report_runs import make_record, prediction_rows, score_run, scored_run, write_run
from helpers.tiny import folder_of

from tiedlora.errors import UserError
from tiedlora.records.rows import MetricsRow, read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_scores
from tiedlora.runs import run, trainer
from tiedlora.tracking import run_trackers
from tiedlora.tracking.run_trackers import RunTrackers, TrackedRun, Tracker, first_answers
from tiedlora.tracking.wandb import WandbTracker


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
def faked(tiny_config, fake):  # noqa: ARG001  (a fixture takes no mark, and this one makes the name valid)
    """A configuration with that tracker."""

    def build(*overrides):
        config = tiny_config(*overrides)
        config.tracking.backend = "fake"
        return config

    return build


def rows(*steps: int) -> list[MetricsRow]:
    return [MetricsRow(step, {"train/loss": float(step)}) for step in steps]


def test_metrics_jsonl_is_first_and_a_resumed_segment_holds_the_whole_curve(faked, fake, tmp_path):
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


def test_a_tracker_gets_no_path_of_this_machine(tiny_config, tmp_path):
    config = tiny_config(f"data_root={tmp_path}", f"score.forgetting={tmp_path}/neutral.txt")
    config.model.path, config.task.files.train = str(tmp_path / "model"), str(tmp_path / "rows.jsonl")
    config.train.init_from = str(tmp_path / "TAB-r8" / "adapter")
    settings = TrackedRun("run", tmp_path, config, trainable_params=1).settings()
    assert str(tmp_path) not in json.dumps(settings)
    assert (settings["outputs"], settings["task"]["files"]["train"]) == ("outputs", "rows.jsonl")
    assert (settings["score"]["forgetting"], settings["train"]["init_from"]) == ("neutral.txt", "TAB-r8/adapter")
    assert settings["run_id"] == "run"


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("moment", ["start", "log", "log_answers", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_gets_nothing_more(moment, faked, tmp_path, monkeypatch, caplog):
    calls = []

    def fail(*_arguments):
        calls.append(moment)
        raise RuntimeError("server on fire \x1b[31m")

    monkeypatch.setattr(FakeTracker, moment, fail)
    monkeypatch.setattr(FakeTracker, "abandon", lambda _tracker: None)
    folder = scored_run(tmp_path, [1.0])
    trackers = RunTrackers(TrackedRun("run", folder, faked(), 1), step=None)
    trackers.log(rows(1))
    trackers.log(rows(2))
    trackers.finish({})
    assert read_metrics(folder / "metrics.jsonl") == rows(1, 2)
    (warning,) = [entry.getMessage() for entry in caplog.records if "has failed" in entry.getMessage()]
    assert "server on fire ␛[31m" in warning
    assert calls == [moment]


def test_a_package_that_is_missing_is_a_mistake_only_if_it_was_asked_for(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setattr(run_trackers, "_chosen", lambda: "wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "tiedlora.tracking.wandb", raising=False)
    RunTrackers(TrackedRun("run", tmp_path, tiny_config(), 1), step=0).log(rows(1))
    assert read_metrics(tmp_path / "metrics.jsonl") == rows(1)
    with pytest.raises(UserError, match="wandb is not installed"):
        run_trackers.check_tracker(tiny_config("tracking=wandb"))


def test_the_table_of_answers_is_bounded_has_plain_texts_and_no_row_without_an_answer(tmp_path):
    record = make_record()
    folder = RunFolder(write_run(tmp_path, record))
    assert first_answers(folder, 7) == []
    losses = prediction_rows([0.5] * 9, "target_loss")
    score_run(tmp_path, record, "test", losses)
    assert first_answers(folder, 7) == []
    rows = prediction_rows([0.5] * 100, "f1", output="\x1b]0;x\x07<script>alert(1)</script>")
    rows = [replace(row, prompt="p" * 10**6) for row in rows]
    score_run(tmp_path, record, "validation", rows, rows)
    assert first_answers(folder, 0) == []
    answers = first_answers(folder, 7)
    assert [list(row) for row in answers] == 7 * [["split", "row", "prompt", "references", "base", "answer", "f1"]]
    assert max(len(cell) for row in answers for cell in row.values() if isinstance(cell, str)) < 2100
    assert answers[0]["answer"] == "␛]0;x␇<script>alert(1)</script>"


def test_a_run_starts_its_tracker_logs_every_row_and_ends_with_the_summary(faked, fake):
    record = run.main(faked())
    (tracker,) = fake
    assert (tracker.run.run_id, tracker.run.trainable_params) == (record.run_id, record.trainable_params)
    assert tracker.logged == read_metrics(RunFolder(tracker.run.folder).metrics_file)
    ((summary, exit_code),) = tracker.finished
    assert exit_code == 0
    scored = read_scores(RunFolder(tracker.run.folder).scores_file("validation", "answers"))
    assert len(tracker.answers) == scored.record.rows
    value = scored.record.metrics["exact_match_strict"].value
    assert summary["validation/exact_match_strict"] == value


def test_a_run_that_fails_ends_its_tracker_as_failed_and_a_pause_is_no_failure(faked, fake, monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("in the loop")

    assert run.main(faked("train.pause_after=2")) is None
    monkeypatch.setattr("tiedlora.training.loop.Loop.train", fail)
    with pytest.raises(RuntimeError, match="in the loop"):
        trainer.carry_out(faked(), folder_of(faked()))
    assert [tracker.finished for tracker in fake] == [[({}, 0)], [({}, 1)]]


def test_of_several_processes_only_the_first_has_a_tracker_and_none_changes_its_configuration(faked, fake):
    config = faked()
    before = copy.deepcopy(config)

    def act(rank):
        run.main(config)
        assert len(fake) == (rank == 0)
        assert config == before

    ended = forked_world(act)
    assert [code for code, _ in ended] == [0, 0], ended


def test_long_names_are_cut_to_tags_that_wandb_takes(faked):
    tags = TrackedRun("id", Path(), faked("task.name=" + 70 * "n", "tracking.tags=[mine]"), 1).tags
    assert "n" * 64 in tags
    assert max(map(len, tags)) <= 64


def test_a_tracker_that_is_named_for_a_finished_run_says_that_it_gets_nothing(finished_run, fake, capsys):
    config = finished_run()
    said = "tracking=fake: gets nothing, because the run has finished before (force=true repeats it)"
    run.main(config)
    assert "gets nothing" not in capsys.readouterr().out
    config.tracking.backend = "fake"
    run.main(config)
    assert said in capsys.readouterr().out.splitlines()
    assert fake == []


GONE = (
    'failed to upsert bucket: returned error 409: {"message":"run x was previously created and deleted; try a new id"}'
)


@pytest.mark.parametrize(
    ("errors", "modes", "after", "says"),
    [
        (
            [wandb.errors.CommError(GONE)],
            ["online"] * 2,
            "online",
            "was deleted there, which ends its id; it has the id",
        ),
        ([wandb.errors.CommError(GONE)] * 2, ["online", "online", "offline"], "online", "W&B refuses this run (failed"),
        ([wandb.errors.CommError("returned error 403: no")], ["online", "offline"], "online", "W&B refuses this run"),
        ([wandb.errors.AuthenticationError("key")], ["online", "offline"], "online", "W&B refuses this run (key)"),
        ([wandb.errors.UsageError("no")], ["online", "offline"], "online", "W&B refuses this run (no)"),
        (
            [wandb.errors.CommError("timed out after 30.0 sec")],
            ["online", "offline"],
            "offline",
            "W&B cannot be reached",
        ),
        ([wandb.errors.CommError("returned error 502: x")], ["online", "offline"], "offline", "W&B cannot be reached"),
    ],
)
def test_only_a_server_that_is_away_makes_later_runs_of_wandb_offline(
    errors, modes, after, says, tiny_config, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("WANDB_MODE", "online")
    left, calls = list(errors), []

    def init(**arguments):
        calls.append((arguments["id"], os.environ["WANDB_MODE"]))
        if left:
            raise left.pop(0)
        return MagicMock()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    WandbTracker().start(TrackedRun("run", tmp_path, tiny_config(), 1), [])
    assert ([mode for _, mode in calls], os.environ["WANDB_MODE"]) == (modes, after)
    assert says in caplog.text
    is_other = [re.fullmatch(r"run-[0-9a-f]{6}", id) is not None for id, _ in calls]
    assert is_other == ([False, True, True] if GONE in str(errors[0]) else [False] * 3)[: len(calls)]
