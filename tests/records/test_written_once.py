"""A file that is written once has its name only when all of it is on the disk: a power failure leaves no part of it."""

import os

import pytest
from helpers.report_runs import GOOD, scored_run

from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_scores, write_scores


@pytest.fixture
def done(monkeypatch):
    """What is done to files and folders from now on, in order: (flush or rename, the inode)."""
    seen, replace = [], os.replace

    def renamed(source, target):
        seen.append(("rename", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(("flush", os.fstat(descriptor).st_ino)))
    monkeypatch.setattr(os, "replace", renamed)
    return seen


@pytest.mark.parametrize("what", ["scores", "result"])
def test_it_is_flushed_then_named_and_then_its_folder_is_flushed(what, tmp_path, done):
    folder = RunFolder(scored_run(tmp_path, GOOD))
    record, path = folder.finished_record(), folder.result_file
    if what == "scores":
        path = folder.scores_file("validation", "answers")
        scored = read_scores(path)
    done.clear()
    folder.write_record(record) if what == "result" else write_scores(path, scored.record, scored.rows)
    file = path.stat().st_ino
    assert done == [("flush", file), ("rename", file), ("flush", path.parent.stat().st_ino)]
