"""A sweep as a command: stopped, shared, resumed, failing; and the data that its cells share in one process."""

import json
import signal

import pytest
import torch
from helpers import processes
from helpers.commands import Command, wait_until
from helpers.sweeping import compose_sweep, times

from tiedlora.adapter.attach import Adapted
from tiedlora.errors import UserError
from tiedlora.places import PROJECT
from tiedlora.runs import inputs, loading, run
from tiedlora.sweeps import launching
from tiedlora.sweeps.cells import Sweep, SweepCell
from tiedlora.sweeps.launching import work

WITHOUT_TORCH = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, words
    loaded = [name for name in ("torch", "transformers") if name in sys.modules]
    assert not loaded, f"{words} has imported {loaded}"
"""


class TestLaunchers:
    """A launcher that fails, and what the folders hold then."""

    @pytest.mark.parametrize(
        ("error", "says"),
        [
            (RuntimeError("no such partition"), r"^hydra/launcher: started no cell: RuntimeError: no such part"),
            (UserError("a worker has ended"), r"^a worker has ended$"),
            (None, r"^hydra/launcher: started no cell: its workers find no work"),
        ],
    )
    def test_one_that_starts_nothing_ends_the_sweep_with_its_error(self, tiny_run, error, says):
        swept = compose_sweep(tiny_run("seed=0,1"))

        def broken(_folder, _goals):
            if error:
                raise error

        with pytest.raises(UserError, match=says):
            launching.run_sweep(swept, broken)
        assert [cell.state() for cell in swept.cells] == ["missing", "missing"]

    def test_cells_that_another_command_works_on_do_not_keep_the_others_waiting(self, tiny_run, monkeypatch):
        swept, launched, state = compose_sweep(tiny_run("seed=0,1")), [], SweepCell.state
        busy, free = swept.cells
        monkeypatch.setattr(SweepCell, "state", lambda own: "running" if own is busy and not launched else state(own))

        def launch(_folder, goals):
            launched.append([goal.run_id for goal in goals])
            swept.control.drop(launched[-1])

        launching.launch_cells(swept.cells, launch, swept.control)
        assert launched == [[free.run_id], [busy.run_id]]

    def test_a_cell_that_waits_while_another_one_is_killed_has_not_failed(self, tiny_run, capsys):
        swept = compose_sweep(tiny_run("seed=0,1,2,3"))
        victim = swept.cells[1].run_id

        def queue(folder, goals):
            for goal in goals[:2]:
                if goal.run_id == victim and swept.control.starts(victim) < 2:
                    swept.control.note_start(victim)
                    raise RuntimeError("Job 1 has not produced any output")
                work(folder, [goal])

        with pytest.raises(SystemExit):
            launching.run_sweep(swept, queue)
        assert [cell.state() for cell in swept.cells] == ["done", "failed", "done", "done"]
        assert f"{victim}: The worker ended 2 times" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_is_stopped_shared_and_finished(tiny_run, tmp_path):
    words = tiny_run("seed=0,1", "train.steps=80", "train.log_every=1", "train.checkpoint_every=80")
    cells = compose_sweep(words).cells
    first, second = cells
    command = Command("--multirun", *words, cwd=tmp_path)
    wait_until(lambda: first.folder.metrics_file.exists() and "train/loss" in first.folder.metrics_file.read_text())
    command.send_signal(signal.SIGINT)
    ended = command.ended()
    assert ended.code == 75, ended.err
    assert "the same command continues" in ended.err
    assert (first.state(), second.state()) == ("interrupted", "missing")

    both = [command.ended() for command in [Command("--multirun", *words) for _ in range(2)]]
    assert [ended.code for ended in both] == [0, 0], both
    assert sum("continuing from step" in ended.err for ended in both) == 1
    for cell in cells:
        # Two trainings of one cell would have logged the steps of both.
        rows = [json.loads(line) for line in cell.folder.metrics_file.read_text().splitlines()]
        assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 81))


def test_commands_that_run_nothing_import_no_torch(tiny_run, finish):
    words = tiny_run("seed=0,1")
    for cell in compose_sweep(words).cells:
        finish(cell.config)
    script = str(PROJECT / "scripts/sweep.py")
    commands = [
        [script, "status", *words],
        [script, "select", "--no-test", "--by", "loss", *words],
        [str(PROJECT / "train.py"), "--multirun", *words],
    ]
    ended = processes.run_python("-c", WITHOUT_TORCH, json.dumps(commands))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("2 cells: 2 done") == 2
    assert "2 finished before, 0 to run" in ended.stderr


def test_a_finished_sweep_is_printed_and_writes_nothing(finished_run, capsys):
    """Then it is printed from a read-only archive too."""
    swept = Sweep("sweep", [SweepCell((), finished_run("seed=0")), SweepCell((), finished_run("seed=1"))])
    outputs = swept.path.parents[1]
    before = times(outputs)
    launching.run_sweep(swept, lambda *_: pytest.fail("launched"))
    assert "2 cells: 2 done" in capsys.readouterr().out
    assert times(outputs) == before


def test_finished_on_other_data_is_not_finished(finished_run, monkeypatch):
    cell = SweepCell((), finished_run())
    assert launching.changed_inputs([cell]) == {}
    changed = {**inputs.row_digests(cell.config), "train": "other"}
    monkeypatch.setattr(inputs, "row_digests", lambda _config: changed)
    assert "finished on other train data" in launching.changed_inputs([cell])[cell.run_id]


class TestOneProcess:
    """Cells in one process share the data that they load."""

    def test_the_base_is_loaded_once_and_left_as_it_was(self, tiny_config, monkeypatch):
        loading._BASE.clear()
        first = tiny_config("tying=LoRA")
        base = loading.cached_base(first, torch.device("cpu"))
        before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
        monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("loaded again"))
        run.main(first)
        with pytest.raises(UserError, match=r"lower train\.lr"):
            run.main(tiny_config("tying=TABuv", "train.lr=1000", "train.clip=null", "train.steps=20"))
        run.main(tiny_config("tying=TABuv"))
        after = base.model.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not base.model.training
        assert not any(isinstance(module, Adapted) or module._forward_pre_hooks for module in base.model.modules())

    def test_reused_parts_change_no_result(self, tiny_config, tmp_path):
        for cache in (loading._BASE, inputs._ROWS, loading.TOKENS):
            cache.clear()
        alone = run.main(tiny_config("tying=TABuv", f"outputs={tmp_path}/alone"))
        run.main(tiny_config("tying=LoRA"))
        assert run.main(tiny_config("tying=TABuv")).files == alone.files, "the sha256 of the adapter's files"
