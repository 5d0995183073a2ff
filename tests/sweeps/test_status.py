"""The status of a sweep's cells: counts, time left, reasons of failures; and what `watch` finds and shows."""

import json
import os
import pty
import re
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from helpers import processes
from helpers.commands import wait_until
from helpers.hostile import snapshot
from helpers.sweeping import compose_sweep, fail, held, search_options
from rich.console import Console

from tiedlora import screen
from tiedlora.errors import UserError
from tiedlora.places import PROJECT
from tiedlora.records.run_folder import State
from tiedlora.records.selection import read_selection
from tiedlora.sweeps import staged, status
from tiedlora.sweeps.launching import run_sweep, work
from tiedlora.sweeps.status import find_sweep, frame, news, views

CELL_KEYS = [
    "run_id",
    "overrides",
    "model",
    "task",
    "configuration",
    "rank",
    "lr",
    "seed",
    "trainable",
    "state",
    "metric",
    "score",
    "validation_loss",
    "error",
    "seconds",
]
"""The output of `scripts/sweep.py status --json`."""


def statuses(sweep):
    return [status.status_of(cell, sweep.control) for cell in sweep.cells]


def test_status_counts_and_estimates(tiny_run, finish):
    sweep = compose_sweep(tiny_run("tying=LoRA,TABuv", "seed=0,1"))
    assert status.time_left(statuses(sweep)) == {}
    assert json.loads(status.to_json(sweep.id, statuses(sweep)))["seconds_left"] is None
    finish(sweep.cells[0].config)
    cells = statuses(sweep)
    assert status.counts(cells) == {**dict.fromkeys(State, 0), "done": 1, "missing": 3}
    assert list(status.time_left(cells).values()) == [pytest.approx(cells[0].seconds)] * 3
    with held(sweep.cells[1].folder):
        assert statuses(sweep)[1].state == "running"
    fail(sweep.cells[2], "Traceback\ntiedlora.errors.UserError: no\n")
    assert statuses(sweep)[2].error == "UserError: no"
    tree = json.loads(status.to_json(sweep.id, statuses(sweep)))
    assert list(tree) == ["sweep", "counts", "seconds_left", "cells"]
    assert [list(cell) for cell in tree["cells"]] == [CELL_KEYS] * 4
    assert [cell["state"] for cell in tree["cells"]] == ["done", "interrupted", "failed", "missing"]


def test_a_damaged_result_is_a_failed_cell(tiny_run):
    (cell,) = (sweep := compose_sweep(tiny_run("seed=0"))).cells
    cell.folder.path.mkdir(parents=True)
    cell.folder.result_file.write_text('{"run_id": 3}')
    (shown,) = statuses(sweep)
    assert shown.state == "failed"
    assert shown.error.startswith(f"{cell.folder.result_file}: ")


def test_before_a_cell_is_done_its_own_speed_gives_the_time_left(tiny_run):
    first, second = (sweep := compose_sweep(tiny_run("seed=0,1"))).cells
    first.folder.path.mkdir(parents=True)
    first.folder.metrics_file.write_text('{"step": 2, "train/loss": 2.0, "train/seconds": 3.0}\n{"step": 3, "tra')
    assert status.time_left(statuses(sweep)) == {first.run_id: 6.0, second.run_id: 6.0}


def test_the_table_has_a_column_for_each_swept_key(tiny_run):
    sweep = compose_sweep(tiny_run("train.eps=1e-8,1e-6", "seed=0,1"))
    head, *lines = screen.text(status.drawn(statuses(sweep))).splitlines()
    assert len(lines) == 4
    assert head.split().count("seed") == 1
    assert "train.eps" in head
    assert sum("1e-06" in line or "1e-6" in line for line in lines) == 2


def test_a_narrow_terminal_has_no_columns_that_repeat_one_value(tiny_run):
    sweep = compose_sweep(tiny_run("train.lr=1e-3,1e-2", "seed=0,1"))
    lines = {}
    for width in (60, 200):
        console = Console(width=width)
        with console.capture() as drawn:
            console.print(status.drawn(statuses(sweep)))
        lines[width] = drawn.get().splitlines()
    heads = {width: own[0].split() for width, own in lines.items()}
    assert heads[60][:3] == ["lr", "seed", "state"]
    assert heads[200][:3] == ["model", "task", "configuration"]
    assert all(len(line) <= 60 for line in lines[60])
    assert len(lines[60]) == 5


def test_parameters_that_only_the_loaded_model_can_count_are_not_said_to_be_none(tiny_run):
    cells = statuses(sweep := compose_sweep(tiny_run("tying=full")))
    assert json.loads(status.to_json(sweep.id, cells))["cells"][0]["trainable"] is None
    head, row = status.rows(cells)
    assert row[head.index("trainable")] == ""


def test_a_cell_that_was_stopped_while_it_was_scored_is_not_paused_after_its_last_step(tiny_run):
    for pause_after, state in ((4, State.PAUSED), (6, State.INTERRUPTED)):
        (cell,) = compose_sweep(tiny_run(f"train.pause_after={pause_after}")).cells
        (cell.folder.checkpoints / "step-00000006").mkdir(parents=True, exist_ok=True)
        assert cell.state() == status.status_of(cell, compose_sweep(tiny_run()).control).state == state


def test_status_lists_what_is_not_done_with_whole_ids_and_the_reasons_of_failures(tiny_run, finish):
    sweep = compose_sweep(tiny_run("train.lr=1e-3,1e-2", "seed=0,1"))
    first, second, third, fourth = sweep.cells
    finish(first.config)
    fail(second, "Traceback\ntiedlora.errors.Diverged: step 3\n")
    third.folder.path.mkdir()
    said = screen.text(*status.unfinished(sweep.id, statuses(sweep))).splitlines()
    assert re.match(rf"{sweep.id}: 4 cells: 1 done, 1 interrupted, 1 failed, 1 missing; ", said[0])
    assert said[1].split() == ["state", "step", "time", "lr", "cell"]
    # The order of the live table: what needs a person first.
    shown = [(line.split()[0], line.split()[-1]) for line in said[2:5]]
    assert shown == [("failed", second.run_id), ("interrupted", third.run_id), ("missing", fourth.run_id)]
    assert said[5:] == [f"{second.run_id}: Diverged: step 3"]


@pytest.fixture
def sweep(tiny_run):
    """A frozen sweep of two rates and two seeds, with nothing run."""
    made = compose_sweep(tiny_run("train.lr=1e-3,1e-2", "seed=0,1", "train.log_every=1"))
    made.freeze()
    return made


class TestLooks:
    def test_it_shows_what_status_shows(self, sweep, finish):
        first, second, third, fourth = sweep.cells
        finish(first.config)
        fail(second, "Traceback\ntiedlora.errors.Diverged: step 3\n")
        third.folder.path.mkdir()
        sweep.control.drop([fourth.run_id])
        view = next(views(sweep.path))
        shown = {cell.run_id: cell.state for cell in view.cells}
        assert [shown[cell.run_id] for cell in sweep.cells] == ["done", "failed", "interrupted", "dropped"]
        assert not view.ended

    def test_a_look_changes_nothing(self, sweep, finish):
        finish(sweep.cells[0].config)
        sweep.cells[1].folder.path.mkdir()
        (sweep.cells[1].folder.path / ".lock").touch()
        outputs = Path(sweep.cells[0].config.outputs)
        before = snapshot(outputs)
        for _ in range(3):
            next(views(sweep.path))
        assert snapshot(outputs) == before
        # A folder that was never started is not made.
        assert not sweep.cells[2].folder.path.exists()

    def test_a_pipe_in_the_place_of_a_file_does_not_hang_it(self, sweep):
        cell = sweep.cells[0]
        cell.folder.path.mkdir()
        for path in (cell.folder.metrics_file, cell.folder.error_file):
            os.mkfifo(path)
        assert status.counts(next(views(sweep.path)).cells)["failed"] == 1

    def test_hostile_text_stays_text(self, sweep):
        cell = sweep.cells[0]
        fail(cell, "Traceback\n\x1b]0;title\x07[bold red]markup[/] \u202eevil " + "a" * 10**4)
        cell.folder.metrics_file.write_bytes(
            b"\xff" * 10**6 + b"\n" + b'{"step": 1, "validation/loss": 2.0}\n' + b"[" * 10**5
        )
        view = next(views(sweep.path))
        assert [each.validation_loss for each in view.cells if each.run_id == cell.run_id] == [2.0]
        console = Console(width=400, highlight=False, markup=False, emoji=False)
        with console.capture() as drawn:
            console.print(frame(view))
        for text in (drawn.get(), "\n".join(news(None, view))):
            assert "\x1b" not in text
            assert "\u202e" not in text
            assert "[bold red]markup[/]" in text
            assert len(text) < 20_000


class TestFinding:
    def test_by_id_name_folder_or_the_newest(self, tiny_run):
        older, newer = compose_sweep(tiny_run("seed=0,1")), compose_sweep(tiny_run("seed=0,1,2"))
        for sweep in (older, newer):
            sweep.freeze()
        outputs = older.path.parent.parent
        for path in [outputs, *outputs.rglob("*")]:
            os.utime(path, (time.time() - 600,) * 2)
        newer.control.start(fail_fast=False)
        assert find_sweep(outputs) == find_sweep(outputs, "sweep") == newer.path
        assert find_sweep(outputs, older.id) == older.path
        assert find_sweep(outputs, str(older.path)) == older.path
        with pytest.raises(UserError, match=rf"papr: no such sweep in .*; choose one of .*{newer.id}"):
            find_sweep(outputs, "papr")


class TestCommand:
    def test_without_words_it_is_the_newest_sweep(self, tiny_run, tmp_path, script):
        swept = compose_sweep(tiny_run("train.lr=1e-3,1000", "seed=0,1", "train.clip=null", "train.steps=30"))
        with pytest.raises(SystemExit):
            run_sweep(swept, work)
        code, out, err = script("scripts/sweep.py", "watch", f"outputs={tmp_path}/outputs")
        assert code == 1, err
        lines = out.splitlines()
        assert sum(" failed " in line and "Diverged: step" in line for line in lines) == 2
        assert re.search(r"4 cells: 2 done, 2 failed; .*, ended$", lines[-1])
        # The status of a started sweep needs no words either.
        code, out, err = script("scripts/sweep.py", "status", f"outputs={tmp_path}/outputs")
        assert (code, out.count("Diverged: step")) == (0, 2), err
        assert out.startswith(f"{swept.id}: 4 cells: 2 done, 2 failed; ")
        by_id = script("scripts/sweep.py", "status", swept.id, f"outputs={tmp_path}/outputs", "--json")[1]
        assert json.loads(by_id)["counts"]["failed"] == 2

    @pytest.mark.slow
    def test_a_live_table_on_a_terminal(self, sweep, tmp_path, finish):
        finish(sweep.cells[0].config)
        main, terminal = pty.openpty()
        command = [sys.executable, "scripts/sweep.py", "watch", "sweep", f"outputs={tmp_path}/outputs"]
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
        # A shell's background jobs, and so these tests as one, ignore the signal of Ctrl-C.
        hears_ctrl_c = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        shown = b""

        def screen() -> bytes:
            nonlocal shown
            with suppress(OSError):
                shown += os.read(main, 2**16)
            return shown

        streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
        with processes.started(command, cwd=PROJECT, env=environment, preexec_fn=hears_ctrl_c, **streams) as watching:
            os.close(terminal)
            os.set_blocking(main, False)
            wait_until(lambda: screen().count(b"Ctrl-C leaves") > 1)
            assert b"\x1b[?1049h" in shown
            watching.send_signal(2)
            wait_until(lambda: screen() and watching.poll() is not None)
        assert watching.returncode == 0
        assert b"\x1b[?1049l" in screen()
        assert b"4 cells: 1 done" in shown[shown.index(b"\x1b[?1049l") :]


class TestSearches:
    def test_one_in_which_every_rate_diverges_ends_too(self, tiny_run):
        swept = compose_sweep(tiny_run("tying=LoRA", "train.lr=1e3", "seed=0,1,2", "train.clip=null", "train.steps=20"))
        options = search_options(lowest_rate=1e2, highest_rate=1e3)
        with pytest.raises(SystemExit):
            staged.run_staged(swept, options, work)
        assert next(views(swept.path)).ended

    def test_its_decisions_and_its_end(self, tiny_run):
        grid = ("train.lr=1e-4,1e-3,1e-2,1e-1", "seed=0,1", "train.steps=8", "train.validate_every=2")
        sweep = compose_sweep(tiny_run(*grid, "score.base=false"))
        seen = []

        def launch(folder, goals):
            for goal in goals:
                work(folder, [goal])
                seen.append(next(views(sweep.path)))

        staged.run_staged(sweep, search_options(), launch)
        view = next(views(sweep.path))
        assert view.ended
        assert not any(look.ended for look in seen[:-1])
        assert any(status.counts(look.cells)["paused"] for look in seen)
        selected = read_selection(sweep.path / "selection.json")
        assert len(view.decisions) == sum(len(search.decisions) for search in selected.searches)
        assert status.counts(view.cells)["pruned"] == sum(cell.state() == "pruned" for cell in sweep.cells)
        # What changed between two looks is said once.
        said = [line for before, now in zip([None, *seen], [*seen, view], strict=True) for line in news(before, now)]
        assert len([line for line in said if line.startswith("decided: ")]) == len(view.decisions)
