"""scripts/sweep.py watch: what it finds, what it shows, and that it leaves the sweep alone."""

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
from helpers.commands import Command, wait_until
from rich.console import Console

from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError
from tiedlora.records.run_folder import State
from tiedlora.records.selection import read_selection
from tiedlora.sweeps import staged, status
from tiedlora.sweeps.expand import compose_sweep
from tiedlora.sweeps.launching import work
from tiedlora.sweeps.watch import Watch, find_sweep, frame, news

HOSTILE = "\x1b]0;title\x07[bold red]markup[/] \u202eevil " + "a" * 10**4


@pytest.fixture
def sweep(tiny_run):
    """A frozen sweep of two rates and two seeds, with nothing run."""
    made = compose_sweep(tiny_run("train.lr=1e-3,1e-2", "seed=0,1", "train.log_every=1"))
    made.freeze()
    return made


def age(folder: Path) -> None:
    """Make the files of a folder old."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (time.time() - 600,) * 2)


def drawn(view) -> str:
    console = Console(width=400, highlight=False, markup=False, emoji=False)
    with console.capture() as shown:
        console.print(frame(view))
    return shown.get()


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


class TestLooks:
    def test_it_shows_what_status_shows(self, sweep, finish):
        first, second, third, fourth = sweep.cells
        finish(first.config)
        second.folder.path.mkdir()
        second.folder.error_file.write_text("Traceback\ntiedlora.errors.Diverged: step 3\n")
        third.folder.path.mkdir()
        third.folder.config_file.write_text("")
        sweep.control.drop([fourth.run_id])
        view = Watch(sweep.path).look()
        shown = {cell.run_id: (cell.state, cell.error, cell.score, cell.seconds, cell.step) for cell in view.cells}
        for cell in status.statuses(sweep.cells, sweep.control):
            assert shown[cell.run_id] == (cell.state, cell.error, cell.score, cell.seconds, cell.step)
        assert status.counts(view.cells) == {
            **dict.fromkeys(State, 0),
            "done": 1,
            "failed": 1,
            "interrupted": 1,
            "dropped": 1,
        }
        assert not view.ended

    def test_a_look_changes_nothing(self, sweep, finish):
        finish(sweep.cells[0].config)
        sweep.cells[1].folder.path.mkdir()
        (sweep.cells[1].folder.path / ".lock").touch()
        outputs = Path(sweep.cells[0].config.outputs)
        before = snapshot(outputs)
        for _ in range(3):
            Watch(sweep.path).look()
        assert snapshot(outputs) == before
        # A folder that was never started is not made.
        assert not sweep.cells[2].folder.path.exists()

    def test_a_pipe_in_the_place_of_a_file_does_not_hang_it(self, sweep):
        cell = sweep.cells[0]
        cell.folder.path.mkdir()
        for path in (cell.folder.metrics_file, cell.folder.error_file):
            os.mkfifo(path)
        assert status.counts(Watch(sweep.path).look().cells)["failed"] == 1

    def test_hostile_text_stays_text(self, sweep):
        cell = sweep.cells[0]
        cell.folder.path.mkdir()
        cell.folder.error_file.write_text("Traceback\n" + HOSTILE)
        cell.folder.metrics_file.write_bytes(
            b"\xff" * 10**6 + b"\n" + b'{"step": 1, "validation/loss": 2.0}\n' + b"[" * 10**5
        )
        view = Watch(sweep.path).look()
        assert [each.validation_loss for each in view.cells if each.run_id == cell.run_id] == [2.0]
        for text in (drawn(view), "\n".join(news(None, view))):
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
        age(outputs)
        os.utime(newer.path)
        assert find_sweep(outputs) == find_sweep(outputs, "sweep") == newer.path
        assert find_sweep(outputs, older.id) == older.path
        assert find_sweep(outputs, str(older.path)) == older.path
        with pytest.raises(UserError, match=rf"papr: no such sweep in .*; choose one of .*{newer.id}"):
            find_sweep(outputs, "papr")
        with pytest.raises(UserError, match="has no sweeps/"):
            find_sweep(outputs / "empty")


@pytest.mark.slow
class TestCommand:
    def test_lines_without_a_terminal_from_another_process(self, tiny_run, tmp_path):
        """A real sweep with a cell that fails, watched from its start to its end."""
        words = tiny_run("train.lr=1e-3,1000", "seed=0,1", "train.clip=null", "train.steps=30")
        sweeping = Command("--multirun", *words)
        wait_until(lambda: list((tmp_path / "outputs" / "sweeps").glob("*/cells/*")))
        command = [sys.executable, "scripts/sweep.py", "watch", f"outputs={tmp_path}/outputs"]
        done = processes.run(command, cwd=PROJECT)
        assert sweeping.ended().code == 1
        assert done.returncode == 1, done.stderr
        lines = done.stdout.splitlines()
        assert sum(" failed " in line and "Diverged: step" in line for line in lines) == 2
        assert re.search(r"4 cells: 2 done, 2 failed; .*, ended$", lines[-1])

    def test_a_live_table_on_a_terminal(self, sweep, tmp_path, finish):
        """On a terminal it redraws the screen, and Ctrl-C leaves it, with the last table below."""
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
        options = staged.SearchOptions(rungs=(0.5,), finalists=2, lowest_rate=1e2, highest_rate=1e3)
        with pytest.raises(SystemExit):
            staged.run_staged(swept, options, work)
        assert Watch(swept.path).look().ended

    def test_its_decisions_and_its_end(self, tiny_run):
        grid = ("train.lr=1e-4,1e-3,1e-2,1e-1", "seed=0,1", "train.steps=8", "train.validate_every=2")
        sweep = compose_sweep(tiny_run(*grid, "score.base=false"))
        options = staged.SearchOptions(rungs=(0.25, 0.5), finalists=2, lowest_rate=1e-5, highest_rate=1.0)
        looks = []

        def launch(folder, goals):
            for goal in goals:
                work(folder, [goal])
                looks.append(Watch(sweep.path).look())

        staged.run_staged(sweep, options, launch)
        view = Watch(sweep.path).look()
        assert view.ended
        assert not any(look.ended for look in looks[:-1])
        assert any(status.counts(look.cells)["paused"] for look in looks)
        selected = read_selection(sweep.selection_file)
        assert len(view.decisions) == sum(len(search.decisions) for search in selected.searches)
        assert any("chosen" in line for line in view.decisions)
        done = {cell.run_id for cell in view.cells if cell.state == "done"}
        assert done >= set(selected.choices[0].run_ids)
        assert status.counts(view.cells)["pruned"] == sum(cell.state() == "pruned" for cell in sweep.cells)
        # What changed between two looks is said once.
        said = [line for before, now in zip([None, *looks], [*looks, view], strict=True) for line in news(before, now)]
        assert len([line for line in said if line.startswith("decided: ")]) == len(view.decisions)
