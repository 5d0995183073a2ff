"""A staged sweep on a tiny model: what runs, what is kept, and what a stop or a full grid changes."""

import json
import signal
from dataclasses import asdict, replace

import pytest
from helpers.commands import Command, FreshCommand, wait_until
from helpers.sweeping import Here, cell_of, compose_sweep, fail, search_options, times
from omegaconf import OmegaConf

from tiedlora.errors import UserError
from tiedlora.records.selection import read_selection
from tiedlora.runs import inputs, run
from tiedlora.sweeps import selection, staged, status
from tiedlora.sweeps.expand import read_options
from tiedlora.sweeps.launching import run_sweep

OPTIONS = search_options()
GRID = ("train.lr=1e-4,1e-3,1e-2,1e-1", "seed=0,1,2", "train.steps=8", "train.validate_every=2", "score.base=false")


def adapter(cell) -> bytes:
    (tensors,) = cell.folder.adapter.glob("*.safetensors")
    return tensors.read_bytes()


def assert_same(first, second) -> None:
    """The decisions, states and adapters of two sweeps."""
    assert (first.path / "selection.json").read_text() == (second.path / "selection.json").read_text()
    for cell, same in zip(first.cells, second.cells, strict=True):
        assert cell.state() == same.state()
        if cell.state() == "done":
            assert adapter(cell) == adapter(same)


@pytest.fixture
def searched(tiny_run):
    """A finished staged sweep, and its launcher."""
    sweep, launcher = compose_sweep(tiny_run(*GRID)), Here()
    staged.run_staged(sweep, OPTIONS, launcher)
    return sweep, launcher


def test_it_runs_a_part_of_the_grid_and_scores_only_the_chosen_runs(searched):
    sweep, launcher = searched
    selected = read_selection(sweep.path / "selection.json")
    ((choice,), (search,)) = selected.choices, selected.searches
    assert (search.seeds, search.rungs, selected.by) == ([0, 1, 2], [2, 4], "loss")
    assert len(launcher.goals) == len(set(launcher.goals))
    assert {(goal.pause_after, goal.splits) for goal in launcher.goals[:4]} == {(2, ())}
    states = {(cell.name.lr, cell.config.seed): cell.state() for cell in sweep.cells}
    assert {key for key, state in states.items() if state == "done"} >= {(choice.lr, seed) for seed in (0, 1, 2)}
    scored = {cell.run_id for cell in sweep.cells if cell.folder.scores_file("validation", "answers").exists()}
    assert scored == set(choice.run_ids)
    stopped = [made for made in search.decisions if made.action == "stopped"]
    assert stopped
    assert [states[made.lr, made.seed] for made in stopped] == ["pruned"] * len(stopped)
    # The report and `select` name the same rate from the runs alone.
    assert selection.choose(sweep.cells, "loss").lr == choice.lr


def test_the_same_command_continues_and_decides_the_same(searched, tiny_run, tmp_path):
    sweep, _ = searched
    again, outputs = Here(), sweep.path.parents[1]
    before = times(outputs)
    staged.run_staged(sweep, OPTIONS, again)
    assert again.goals == []
    assert times(outputs) == before, "it is printed from a read-only archive too"
    other = compose_sweep(tiny_run(*GRID, f"outputs={tmp_path}/other"))
    for stop_before in (2, 5, 8):
        interrupted = Here(stop_before=stop_before - 1)
        with pytest.raises(KeyboardInterrupt):
            staged.run_staged(other, OPTIONS, interrupted)
    staged.run_staged(other, OPTIONS, Here())
    assert_same(sweep, other)


@pytest.mark.slow
def test_a_search_that_is_killed_again_and_again_decides_the_same(searched, tiny_run, tmp_path):
    sweep, _ = searched
    words = [*tiny_run(*GRID, f"outputs={tmp_path}/other"), "hydra/sweeper=staged", "hydra.sweeper.finalists=2"]
    killed = compose_sweep(words)
    for runs in (1, 3, 7):
        command = Command("--multirun", *words)
        wait_until(lambda runs=runs: len(list((tmp_path / "other").glob("*/metrics.jsonl"))) >= runs)
        command.send_signal(signal.SIGKILL)
        assert command.ended().code == -signal.SIGKILL
    ended = FreshCommand("--multirun", *words, "hydra/launcher=joblib_slots").ended()
    assert ended.code == 0, ended.err
    assert_same(sweep, killed)


def test_a_full_grid_continues_the_pruned_runs_exactly_and_trains_no_finished_one(searched, tiny_run, tmp_path):
    sweep, _ = searched
    decided = (sweep.path / "selection.json").read_text()
    results = [cell.folder.result_file for cell in sweep.cells if cell.finished()]
    trained = {file: file.stat().st_mtime_ns for file in results}
    pruned = [cell for cell in sweep.cells if cell.state() == "pruned"]
    steps = {cell.run_id: cell.folder.checkpoint_step() for cell in pruned}
    assert set(steps.values()) <= {2, 4}
    grid = Here()
    run_sweep(sweep, grid)
    assert {cell.state() for cell in sweep.cells} == {"done"}
    assert trained == {file: file.stat().st_mtime_ns for file in results}
    expected = compose_sweep(tiny_run(*GRID, f"outputs={tmp_path}/expected"))
    for cell in expected.cells:
        if cell.run_id in steps:
            run.main(cell.config)
            (same,) = [other for other in pruned if other.run_id == cell.run_id]
            assert adapter(cell) == adapter(same)
            logged = [json.loads(line)["step"] for line in same.folder.metrics_file.read_text().splitlines()]
            assert sorted(set(logged)) == list(range(9))
    staged.run_staged(sweep, OPTIONS, Here())
    assert (sweep.path / "selection.json").read_text() == decided


def test_a_search_that_goes_on_with_other_options_says_so(searched, caplog):
    sweep, _ = searched
    decided = (sweep.path / "selection.json").read_text()
    staged.run_staged(sweep, OPTIONS, Here())
    assert "other options" not in caplog.text
    staged.run_staged(sweep, search_options(rungs=[], highest_rate=0.5), Here())
    (said,) = [line for line in caplog.messages if "other options" in line]
    assert said.endswith("made anew: rungs [2, 4] -> [], highest 1.0 -> 0.5")
    staged.run_staged(sweep, OPTIONS, Here())
    assert (sweep.path / "selection.json").read_text() == decided


def test_a_failure_that_is_no_divergence_is_named_and_tried_again(tiny_run, capsys):
    sweep = compose_sweep(tiny_run(*GRID))

    def failing(folder, goals):
        for cell in (cell_of(folder, goal) for goal in goals):
            if cell.name.lr == 1e-3:
                fail(cell, "OSError: the disk is full\n")
            else:
                run.main(cell.config)

    with pytest.raises(SystemExit) as end:
        staged.run_staged(sweep, OPTIONS, failing)
    assert end.value.code == 1
    assert "the disk is full" in capsys.readouterr().err
    assert read_selection(sweep.path / "selection.json").choices == []
    assert next(status.views(sweep.path)).ended, "a watch ends with its command"
    staged.run_staged(sweep, OPTIONS, Here())
    assert len(read_selection(sweep.path / "selection.json").choices) == 1


def test_a_chosen_run_whose_scores_failed_is_not_done(tiny_run):
    """It blocks its search, and no choice names it."""
    sweep = compose_sweep(tiny_run(*GRID))

    def failing(folder, goals):
        for goal in goals:
            Here()(folder, [replace(goal, splits=())])
            if goal.splits:
                fail(cell_of(folder, goal), "RuntimeError: out of memory\n")

    with pytest.raises(SystemExit):
        staged.run_staged(sweep, OPTIONS, failing)
    view = next(status.views(sweep.path))
    failed = [cell for cell in view.cells if cell.state == "failed"]
    assert {cell.error for cell in failed} == {"RuntimeError: out of memory"}
    assert view.ended


def test_a_rate_outside_the_grid_takes_the_options_of_the_present_start(tiny_run):
    """The first start ran out of memory, and the second one names a smaller microbatch."""

    class Crashing(Here):
        def __call__(self, folder, goals):
            of_grid = [goal for goal in goals if cell_of(folder, goal).name.lr in (1e-3, 1e-2)]
            super().__call__(folder, of_grid)
            for cell in (cell_of(folder, goal) for goal in goals):
                if cell.name.lr not in (1e-3, 1e-2):
                    fail(cell, "RuntimeError: out of memory\n")

    words = ["train.lr=1e-3,1e-2", "seed=0", "train.steps=8", "train.validate_every=2"]
    options = search_options(rungs=[0.5])
    sweep = compose_sweep(tiny_run(*words))
    with pytest.raises(SystemExit):
        staged.run_staged(sweep, options, Crashing())
    later = compose_sweep(tiny_run(*words, "train.microbatch_tokens=512"))
    assert later.path == sweep.path
    staged.run_staged(later, options, Here())
    frozen = [json.loads(path.read_text())["train"] for path in (later.path / "cells").glob("*.json")]
    assert {train["microbatch_tokens"] for train in frozen} == {512}
    assert {train["lr"] for train in frozen} > {1e-3, 1e-2}


def test_a_rate_beyond_the_grid_that_another_sweep_has_finished_is_a_cell_too(tiny_run):
    options = search_options(rungs=[])
    words = ["seed=0", "train.steps=8", "train.validate_every=2", "score.base=false"]
    first = compose_sweep(tiny_run("train.lr=1e-3,1e-2", *words))
    staged.run_staged(first, options, Here())
    # The second sweep launches one of its cells, the third none.
    for rates, launched in (("3e-3,1e-2", 1), ("1e-2,3e-2", 0)):
        sweep, launcher = compose_sweep(tiny_run(f"train.lr={rates}", *words)), Here()
        staged.run_staged(sweep, options, launcher)
        assert len(launcher.goals) == launched
        (choice,) = read_selection(sweep.path / "selection.json").choices
        shown = next(status.views(sweep.path)).cells
        assert len(shown) == choice.trials > len(sweep.cells)
        assert set(choice.run_ids) <= {cell.run_id for cell in shown if cell.state == "done"}


def test_a_rate_that_diverges_is_a_result_and_its_run_is_not_repeated(tiny_run, capsys):
    words = tiny_run("train.lr=1e-3,1e-2,1000", "seed=0", "train.clip=null", "train.steps=20")
    sweep = compose_sweep(words)
    staged.run_staged(sweep, OPTIONS, Here())
    (choice,) = read_selection(sweep.path / "selection.json").choices
    assert (choice.lr < 1000, choice.failed, choice.edge) == (True, 1, False)
    assert "1000 diverged" in capsys.readouterr().out
    again = Here()
    staged.run_staged(sweep, OPTIONS, again)
    assert again.goals == []
    # A person may think otherwise, after a fault of the machine.
    (diverged,) = [cell for cell in sweep.cells if cell.name.lr == 1000]
    sweep.control.retry([diverged.run_id])
    staged.run_staged(sweep, OPTIONS, again)
    assert {cell.run_id for cell in again.cells} == {diverged.run_id}


def test_runs_on_other_rows_than_now_are_named_at_every_seed_and_rate(tiny_run, monkeypatch, capsys):
    """The seeds of the search are no axis of the grid, and rates join that are not in it."""
    words = ["train.lr=1e-3,1e-2", "train.steps=8", "train.validate_every=2", "score.base=false"]
    options = search_options(search_seeds=[0, 1], rungs=[])
    launcher = Here()
    staged.run_staged(compose_sweep(tiny_run(*words, "seed=7")), options, launcher)
    assert {cell.name.lr for cell in launcher.cells} > {1e-3, 1e-2}
    later = compose_sweep(tiny_run(*words, "seed=8"))
    record = inputs.row_digests(later.cells[0].config)
    monkeypatch.setattr(inputs, "row_digests", lambda _config: {**record, "train": "other"})
    capsys.readouterr()
    with pytest.raises(SystemExit):
        staged.run_staged(later, options, Here())
    errors = capsys.readouterr().err
    of_search = {cell.run_id for cell in launcher.cells if cell.config.seed in (0, 1)}
    assert {run_id for run_id in of_search if run_id in errors} == of_search


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rungs": [1.5]}, r"hydra\.sweeper\.rungs\.0=1\.5: must be less than 1"),
        (
            {"rungs": [0.5, 0.25]},
            r"hydra\.sweeper: rungs=\[0\.5, 0\.25\] must rise, each once, such as \[0\.25, 0\.5\]",
        ),
        ({"rungs": [0.5, 0.5]}, r"hydra\.sweeper: rungs=\[0\.5, 0\.5\] must rise"),
        ({"search_seeds": [3]}, r"hydra\.sweeper: search_seeds=\[3\] must have two seeds or more"),
        ({"search_seeds": [0, 1, 0]}, r"hydra\.sweeper\.search_seeds=\[0, 1, 0\]: names 0 twice"),
        ({"search_seeds": [0, -1]}, r"hydra\.sweeper\.search_seeds\.1=-1: must be greater than or equal to 0"),
        ({"race_level": 30}, r"hydra\.sweeper\.race_level=30: must be less than 1"),
        ({"race_within": -1}, r"hydra\.sweeper\.race_within=-1: must be greater than or equal to 0"),
        ({"finalists": 1}, r"hydra\.sweeper\.finalists=1: must be greater than or equal to 2"),
        ({"lowest_rate": 2.0}, r"hydra\.sweeper: highest_rate=1\.0 is below lowest_rate=2\.0"),
        ({"budget": 0}, r"hydra\.sweeper\.budget=0: must be greater than or equal to 1"),
        ({"budget": 1.5}, r"hydra\.sweeper\.budget=1\.5: must be a whole number"),
        ({"claims": ""}, r"hydra\.sweeper\.claims=: must have at least 1 item"),
        ({"finalist": 2}, r"hydra\.sweeper\.finalist: unknown key \(did you mean finalists\?\)"),
    ],
)
def test_wrong_options_are_one_line(option, message):
    values = {**asdict(OPTIONS), "claims": "claims.yaml", "budget": None, **option}
    config = OmegaConf.create({"hydra": {"sweeper": {"_target_": "hydra_plugins.sweepers.DecidingSweeper", **values}}})
    with pytest.raises(UserError, match=message):
        read_options(config)


def test_a_sweeper_of_another_module_is_refused_whatever_its_name():
    config = OmegaConf.create({"hydra": {"sweeper": {"_target_": "elsewhere.StagedSweeper"}}})
    with pytest.raises(UserError, match=r"^hydra/sweeper: elsewhere\.StagedSweeper is none of ours; choose resuming"):
        read_options(config)


LEVEL = ("train.lr=1.4e-1,2e-1", "seed=7,8", "train.steps=4", "train.validate_every=2", "score.base=false")
"""Two rates on both sides of the best one. Which of them is better depends on the seed."""


@pytest.mark.slow
def test_a_race_uses_seeds_of_its_own_and_says_that_it_is_a_tie(tiny_run, tmp_path, capsys):
    sweep, launcher = compose_sweep(tiny_run(*LEVEL)), Here()
    options = search_options(search_seeds=[2, 0, 1], lowest_rate=1.4e-1, highest_rate=2e-1)
    staged.run_staged(sweep, options, launcher)
    selected = read_selection(sweep.path / "selection.json")
    ((choice,), (search,)) = selected.choices, selected.searches
    assert (search.search_seeds, search.race_level, search.race_within) == ([2, 0, 1], 0.3, 0.005)
    assert (search.seeds, choice.seeds) == ([7, 8], 2)
    assert {cell.config.seed for cell in launcher.cells} == {0, 1, 2, 7, 8}
    scored = {cell.config.seed for cell in launcher.cells if cell.folder.scores_file("validation", "answers").exists()}
    assert scored == {7, 8}, "the seeds of the race are not scored"
    assert [made.lr for made in search.decisions if made.action == "finer"] == [0.17]
    assert {cell.name.lr for cell in launcher.cells if cell.config.seed == 1} >= {0.14, 0.2}, "both have run on"
    assert choice.tied
    assert choice.lr not in choice.tied
    assert "tied" in capsys.readouterr().out
    # Stopped at several moments and continued, it races to the same choice.
    other = compose_sweep(tiny_run(*LEVEL, f"outputs={tmp_path}/other"))
    for stop_before in (3, 4, 2):
        with pytest.raises(KeyboardInterrupt):
            staged.run_staged(other, options, Here(stop_before=stop_before))
    staged.run_staged(other, options, Here())
    assert_same(sweep, other)


@pytest.mark.slow
def test_a_search_by_losses_is_refused_for_a_reward(tiny_run):
    swept = compose_sweep(tiny_run("objective=reward", "train.lr=1e-3,1e-2"))
    with pytest.raises(UserError, match=r"^hydra/sweeper: a search of rates compares validation losses of refer"):
        staged.run_staged(swept, OPTIONS, Here())


@pytest.mark.slow
def test_as_a_command_and_then_select(tiny_run, script):
    words = [*tiny_run(*GRID), "hydra/sweeper=staged"]
    ended = Command("--multirun", *words).ended()
    assert ended.code == 0, ended.err
    assert "cells to step 2" in ended.err
    assert "cells are scored" in ended.err
    sweep = compose_sweep(words)
    (choice,) = read_selection(sweep.path / "selection.json").choices
    code, out, err = script("scripts/sweep.py", "select", *words)
    assert code == 0, err
    assert f"{choice.lr:g}" in out
    (tested,) = read_selection(sweep.path / "selection.json").choices
    assert (tested.lr, tested.run_ids, tested.test is None) == (choice.lr, choice.run_ids, False)
    # The search has ended: the cells of other rates will not run. A plain sweep of the same cells would run them.
    code, out, _ = script("scripts/sweep.py", "status", *words)
    assert "pruned" in out
    assert "unneeded" in out
    assert "missing" not in out
    assert " left" not in out
    code, out, _ = script("scripts/sweep.py", "status", *words[:-1])
    assert "missing" in out
    assert " left for one process" in out
