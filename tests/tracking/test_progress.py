"""Nobody takes slow work for a hang: a terminal shows a running clock, and a log says what goes on."""

import io
import logging
import re
import time
from types import SimpleNamespace

import pytest

from tiedlora.runs import loading, run, trainer
from tiedlora.runs.inputs import SingleSlotCache
from tiedlora.tracking import progress
from tiedlora.tracking.progress import AboveBars, ProgressBar, running_clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    """Standard error is a terminal of 80 columns, and a bar ticks a hundred times faster."""
    shown = Terminal()
    # Not sys.stderr itself, which pytest replaces between the fixtures and the test.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=shown))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_TICKS", 0.01)
    return shown


@pytest.fixture
def impatient_log(monkeypatch, caplog) -> pytest.LogCaptureFixture:
    """A log in which every moment without a line is a long silence."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_TICKS", 0.01)
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.02)
    caplog.set_level(logging.INFO)
    return caplog


def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_a_bar_shows_what_is_done_and_for_how_long_before_anything_is_finished(terminal):
    bar = ProgressBar("training", 40, "steps")
    bar.now_doing("first step, compiling")
    until(lambda: "[00:01<" in terminal.getvalue())
    last = terminal.getvalue().rpartition("\r")[2]
    assert re.search(r"training: +0%.* 0/40 \[00:01<\?, +\? steps/s, first step, compiling\]", last)
    assert len(last.strip()) < 80
    bar.note = "loss 1.5"
    bar.advance(1)
    bar.close()
    assert "1/40" in (shown := terminal.getvalue())
    assert "compiling" not in shown[shown.index("1/40") :]
    # Nothing draws it again.
    time.sleep(0.05)
    assert terminal.getvalue() == shown


def test_a_wait_of_unknown_length_is_a_clock_that_leaves_no_trace(terminal):
    with running_clock("loading a model"):
        until(lambda: "loading a model: 00:01" in terminal.getvalue())
    assert terminal.getvalue().endswith("\r" + " " * len("loading a model: 00:01") + "\r")


def test_a_log_line_has_a_line_of_its_own_above_a_bar(terminal):
    handler = AboveBars(terminal)
    bar = ProgressBar("training", 40, "steps")
    handler.emit(logging.LogRecord("tiedlora", logging.INFO, "", 0, "a line", None, None))
    bar.close()
    before, _, after = terminal.getvalue().partition("a line\n")
    assert before.endswith("\r")
    assert "training" in after


def test_a_log_gets_a_line_about_every_silence(impatient_log):
    with running_clock("loading a model"):
        until(lambda: impatient_log.messages.count("loading a model: 0:00 so far") > 1)
    bar = ProgressBar("training", 40, "steps", 3)
    with bar.doing("validation"):
        until(lambda: "training: 3 of 40 steps, validation, 0:00 so far" in impatient_log.messages)
    bar.close()


def test_a_run_says_that_it_loads_validates_and_is_in_its_first_step(tiny_config, impatient_log, monkeypatch):
    def slow(module, name):
        call = getattr(module, name)

        def slower(*arguments, **more):
            time.sleep(0.3)
            return call(*arguments, **more)

        monkeypatch.setattr(module, name, slower)

    slow(loading, "load_base")
    slow(trainer, "row_losses")
    slow(trainer, "target_loss")
    monkeypatch.setattr(loading, "_BASE", SingleSlotCache())
    config = tiny_config()
    run.main(config)
    said = impatient_log.text
    assert f"loading {config.model.name}: 0:00 so far" in said
    for moment in ("0 of 6 steps, validation", "0 of 6 steps, first step", "1 of 6 steps"):
        assert f"training: {moment}" in said
