"""From a command line to cells: the list of cells, checks of all cells before the first run, frozen cells."""

import itertools
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.sweeping import cell_of
from helpers.tiny import EIGHT, composed, folder_of
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from tiedlora.config import compose, trial_arm
from tiedlora.config.compose import compose_config
from tiedlora.config.identity import config_tree, run_id
from tiedlora.errors import UserError
from tiedlora.places import CONF
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_run_scores
from tiedlora.runs import run
from tiedlora.sweeps.expand import CellComposer, compose_sweep
from tiedlora.sweeps.launching import work
from tiedlora.sweeps.status import status_of


def test_the_same_cell_written_differently_is_one_run(tiny_run, tmp_path, monkeypatch):
    sweep = compose_sweep(tiny_run("tying=LoRA,TABuv", "rank=r8", "seed=0,1"))
    rewritten = compose_sweep(
        tiny_run("seed=1,0,0", "rank.r=8", "rank.alpha=null,8", "tying=TABuv,LoRA", "+hydra.job.env_set.A=b")
    )
    assert len(sweep.cells) == len(rewritten.cells) == 4
    assert sweep.id == rewritten.id
    monkeypatch.chdir(tmp_path)
    single = compose_config(tiny_run("tying=LoRA", "seed=1"))
    assert run_id(single) in {cell.run_id for cell in sweep.cells}


def test_the_papers_grid_is_320_cells():
    models, tasks = ("gpt2_xl", "llama2_7b"), ("gsm8k", "squad", "hellaswag", "dialogsum", "iwslt2017")
    cells = compose_sweep(["+grid=paper"]).cells
    assert len(cells) == 320
    expected = set()
    for model, task, name, rank in itertools.product(models, tasks, EIGHT, (2, 8, 32, 128)):
        expected.add((f"model={model}", f"task={task}", task, name, rank))
    found = {(*cell.overrides[:2], cell.config.task.name, cell.config.tying.name, cell.config.rank.r) for cell in cells}
    assert found == expected


def test_a_command_lines_axis_replaces_the_grids():
    sweep = compose_sweep(["+grid=[configurations,learning_rates]", "tying=TABuv", "train.lr=1e-3,1e-1", "seed=0,1"])
    found = {(cell.config.tying.name, cell.config.train.lr, cell.config.seed) for cell in sweep.cells}
    assert found == set(itertools.product(["TABuv"], (1e-3, 1e-1), (0, 1)))
    assert sweep.id.startswith("configurations+learning_rates-")


ARMS = [("LoRA", 1), ("TAuv", 8), ("TABuv", 8)]


def test_arms_of_different_rank_are_one_axis_with_the_runs_of_the_single_commands(tiny_run):
    sweep = compose_sweep(tiny_run("arm=LoRA@r1,TAuv@r8,TABuv@8", "seed=0,1"))
    single = [f"tying={name} rank=r{rank} seed={seed}" for (name, rank), seed in itertools.product(ARMS, (0, 1))]
    assert [cell.run_id for cell in sweep.cells] == [run_id(composed(tiny_run(*words.split()))) for words in single]
    # One arm is a word of any command.
    assert run_id(compose_config(tiny_run("arm=LoRA@r1", "seed=1"))) == sweep.cells[1].run_id
    assert [cell.run_id for cell in compose_sweep(tiny_run("arm=LoRA@r1", "seed=1")).cells] == [sweep.cells[1].run_id]


@pytest.mark.slow
def test_arms_are_swept_and_listed_by_the_same_words(tiny_run, script):
    words = tiny_run("arm=LoRA@r1,TA@r2", "train.steps=2", "score.splits=[]")
    code, _, err = script("train.py", "--multirun", *words)
    assert code == 0, err
    for name, rank in (("LoRA", 1), ("TA", 2)):
        single = composed(tiny_run(f"tying={name}", f"rank.r={rank}", "train.steps=2", "score.splits=[]"))
        assert folder_of(single).state() == "done"
    code, plan, err = script("scripts/sweep.py", "plan", *words)
    assert code == 0, err
    assert "2 done" in plan
    # A search of rates takes them as it takes the axes tying and rank.
    searched = compose_sweep([*words, "hydra/sweeper=staged", "train.lr=1e-3,1e-2", "seed=0,1"])
    assert {(cell.config.tying.name, cell.config.rank.r) for cell in searched.cells} == {("LoRA", 1), ("TA", 2)}
    assert len(searched.cells) == 2 * 2 * 2


def test_a_word_that_refers_to_an_axis_has_its_value_in_each_cell(tiny_run):
    cells = compose_sweep(tiny_run("rank.r=4,8", "rank.alpha=${rank.r}", "tying=LoRA")).cells
    assert [(cell.config.rank.r, cell.config.rank.alpha) for cell in cells] == [(4, 4.0), (8, 8.0)]


def test_arms_replace_a_grids_configurations_and_one_without_a_rank_takes_that_of_the_command():
    def arms(*words):
        return [(cell.config.tying.name, cell.config.rank.r) for cell in compose_sweep([*words]).cells]

    assert arms("+grid=configurations", "arm=LoRA@r1,TA") == [("LoRA", 1), ("TA", 8)]
    assert arms("arm=LoRA,TA", "rank=r1,r2") == [("LoRA", 1), ("LoRA", 2), ("TA", 1), ("TA", 2)]
    assert arms("+grid=configurations", "tying=TA") == [("TA", 8)]


@pytest.mark.slow
def test_the_yardstick_brings_the_curve_the_floor_and_the_weakest_arm_at_every_rate_and_seed():
    sweep = compose_sweep(["+grid=yardstick", "tying=TABuv", "rank=r8", "train.lr=1e-3,1e-2", "seed=0,1"])
    arms = {(cell.name.configuration, cell.name.rank) for cell in sweep.cells}
    assert arms == {
        ("TABuv", 8),
        ("TA", 8),
        ("LoRA (shuffled targets)", 8),
        *(("LoRA", rank) for rank in (8, 2, 1)),
        *((f"LoRA_l{count}", 1) for count in (15, 8, 4, 2)),
    }
    assert len(sweep.cells) == len(arms) * 4
    assert len(compose_sweep(["+grid=yardstick", "tying=TABuv,LoRA", "train.lr=1e-2", "budget=23040"]).cells) == 10


def test_matched_cells_have_the_nearest_lora_rank():
    sweep = compose_sweep(["+grid=matched", "model=smollm2_135m,llama2_7b", "tying=TABuv", "rank=r8,r32"])
    # smollm2 at r 32: TABuv trains 30 * 32 + 30 * 960 + 32 * (576 + 960) = 78,912, LoRA 46,080 a rank; llama2 at r 32:
    # 32 * 32 + 32 * 12,288 + 32 * 16,384 = 918,528 against 524,288 a rank. At r 8, LoRA of rank 1 is nearest.
    expected = [("TABuv", 8), ("LoRA", 1), ("TABuv", 32), ("LoRA", 2)] * 2
    assert [(cell.config.tying.name, cell.config.rank.r) for cell in sweep.cells] == expected


def test_what_only_the_loaded_model_can_count_is_matched_with_no_lora(tiny_run):
    with pytest.raises(
        UserError, match=r"^cell .*tying=full: hydra\.sweeper\.match_lora: tying\.method=\w+ can be count"
    ):
        compose_sweep(tiny_run("hydra.sweeper.match_lora=true", "tying=full"))


def test_a_misspelt_grid_is_answered_with_the_grids_there_are():
    names = "arena, configurations, learning_rates, matched, paper, quick, yardstick"
    with pytest.raises(
        UserError, match=rf"^grid=papr: no such option; choose one of {names} \(did you mean paper\?\)$"
    ):
        compose_sweep(["+grid=papr"])


def test_a_sweep_refuses_what_a_new_run_cannot_have_before_it_runs(tmp_path):
    words = ["tying=TABuv", "train.lr_factor.v=1,0", f"outputs={tmp_path}"]
    with pytest.raises(UserError, match=r"^cell .*train\.lr_factor\.v=0.*: train\.lr_factor\.v=0: v starts at zero"):
        compose_sweep(words)
    # A finished run of an earlier version may have it.
    finished = RunFolder(tmp_path / run_id(compose_config([*words[:1], "train.lr_factor.v=0"])))
    finished.path.mkdir()
    finished.result_file.touch()
    assert len(compose_sweep(words).cells) == 2


def test_a_last_rate_of_a_constant_one_is_refused_because_it_changes_only_the_id(tmp_path):
    with pytest.raises(UserError, match=r"train\.min_lr=1e-05: changes nothing"):
        compose_sweep(["train.schedule=constant", "train.min_lr=1e-5", f"outputs={tmp_path}"])


def test_a_frozen_cell_is_the_same_run_whatever_becomes_of_conf(tiny_run):
    sweep = compose_sweep(tiny_run("tying=LoRA,TABuv", "task.prompt='{question}?'"))
    sweep.freeze()
    for cell in sweep.cells:
        config = cell_of(sweep.path, cell.goal).config
        assert run_id(config) == cell.run_id
        assert config.tracking.group == sweep.id
        config.tracking.group = None
        assert config == cell.config


def test_a_cell_whose_named_arm_has_other_values_now_keeps_its_id_and_its_folder(tiny_run, monkeypatch):
    sweep = compose_sweep(tiny_run("tying=TABuv"))
    (cell,) = sweep.cells
    sweep.freeze()
    sweep.control.start(fail_fast=False)
    assert cell.run_id.startswith("TABuv-")
    # As after an edit of conf/tying/TABuv.yaml, in a worker that starts later.
    monkeypatch.setattr(trial_arm, "name_of", lambda _: None)
    frozen = cell_of(sweep.path, cell.goal)
    assert run_id(frozen.config).startswith("custom-")
    assert (frozen.run_id, frozen.folder.path) == (cell.run_id, cell.folder.path)
    work(sweep.path, [cell.goal])
    assert status_of(frozen, sweep.control).state == "done"
    assert frozen.folder.finished_record().run_id == cell.run_id
    assert [path.name for path in Path(frozen.config.outputs).glob("*-r8-*")] == [cell.run_id]
    # Scores that are added later have the id too.
    run.main(frozen.until(None, ["validation", "test"]).config, frozen.folder)
    assert set(read_run_scores(frozen.folder, frozen.folder.finished_record()).splits) == {"validation", "test"}


def test_a_frozen_cell_of_another_configuration_is_refused(tiny_run):
    sweep = compose_sweep(tiny_run("seed=0,1"))
    sweep.freeze()
    first, second = (sweep.path / "cells" / f"{cell.run_id}.json" for cell in sweep.cells)
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"is the configuration of another run, \.\.\.-\w{10}; start the sweep again"):
        cell_of(sweep.path, sweep.cells[0].goal)


CHOICES = {
    # One item of each list goes into a cell; an empty text is no override.
    "grid": ["", "+grid=paper"],
    "model": ["", "model=gpt2_xl", "model=tiny_gpt2", "model.context=64"],
    "task": ["", "task=gsm8k", "task=squad", "task=hellaswag"],
    "tying": ["", "tying=LoRA", "tying=Tuv", "tying.A.share=3", "tying.u={trained: false, init: 1.0}"],
    "rank": ["", "rank=r2", "rank.r=5", "rank.alpha=16", "rank={r: 3, alpha: 2.5}"],
    "train": ["", "train=paper", "train=tiny"],
    "rows": ["", "task.rows.test=null", "task.rows={train: 10, test: 12}", "task.stop=[]", "task.stop=['a,b',c]"],
    "text": ["", "task.prompt='{question}, = $ and ${not'", r"task.target=' \{answer\}'", "task.name='x y'"],
    "lr": ["", "train.lr=null", "train.lr=1e-3", "train.lr=3", "train.betas=[0.8,0.99]", "train.lr_factor.B=16"],
    "added": ["", "+task.options.rows={train: 4}", "++train.steps=9", "+task.options.a.b=[1,{a: null}]", "~task.stop"],
    "odd": ["", "+train.steps=9", "~train.steps", "~tracking", "+other=1", "train.unknown=1", "train.steps=many"],
    "refers": ["", "train.warmup_steps=${train.steps}", "train.validation_rows=${rank.r}", "cache=${outputs}/cache"],
    "paths": ["", "outputs=~/runs", "data_root=null", "outputs=${oc.env:TIEDLORA_TEST,here}", "outputs=${oc.env:HOME}"],
    "seed": ["", "seed=3", "seed=-1", "seed=0"],
    "score": ["", "score.splits=[validation,test]", "score.splits=[]", "tracking=wandb", "score.batch_tokens=1024"],
}
# Most cells must be valid, or only error messages would be compared.
USUALLY_ABSENT = ("added", "odd", "refers", "text")


@contextmanager
def composer(*shared: str) -> Iterator[CellComposer]:
    compose.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF), **compose.VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        yield CellComposer(loader.load_configuration("config", list(shared), run_mode=RunMode.MULTIRUN), loader)


def whole(fast: CellComposer):
    """Hydra composes a cell in one piece."""
    return lambda cell: compose.load(fast._load(cell))


def outcome(function, overrides: list[str]) -> object:
    """The complete configuration and its id, or the message of the error."""
    try:
        config = function(overrides)
    except UserError as error:
        return str(error)
    # JSON tells 1 from 1.0 and from true, which compare as equal.
    return json.dumps(config_tree(config)), run_id(config)


@pytest.mark.slow
def test_random_cells_equal_hydras_own_composition():
    # Tried once with 300 cells of seed 1 as well, which takes minutes.
    generator = random.Random(0)
    valid = 0
    with composer() as fast:
        for _ in range(16):
            present = (CHOICES[name] for name in CHOICES if name not in USUALLY_ABSENT or generator.random() < 0.25)
            cell = [override for choices in present if (override := generator.choice(choices))]
            generator.shuffle(cell)
            expected = outcome(whole(fast), cell)
            assert outcome(fast.compose, cell) == expected, cell
            valid += not isinstance(expected, str)
    assert 4 <= valid <= 14


def test_a_grid_costs_one_composition_for_each_value_of_each_axis(monkeypatch):
    axes = {"model": ["gpt2", "llama2_7b"], "tying": ["LoRA", "TA", "TB"], "train.lr": ["1e-3", "1e-2"], "seed": "0123"}
    with composer("+grid=paper") as fast:
        loaded = []
        load = fast._load
        monkeypatch.setattr(fast, "_load", lambda cell: loaded.append(cell) or load(cell))
        cells = [[]]
        for key, values in axes.items():
            cells = [[*cell, f"{key}={value}"] for cell in cells for value in values]
        configs = [fast.compose(["+grid=paper", *cell]) for cell in cells]
    assert len({run_id(config) for config in configs}) == 2 * 3 * 2 * 4
    # One more for the sections that no axis changes.
    assert len(loaded) == 2 + 3 + 2 + 4 + 1


def test_a_sweep_of_few_cells_costs_one_composition_for_each(tiny_run, monkeypatch):
    loaded, load = [], CellComposer._load
    monkeypatch.setattr(CellComposer, "_load", lambda self, words: loaded.append(words) or load(self, words))
    assert len(compose_sweep(tiny_run("seed=0,1")).cells) == len(loaded) == 2


def test_an_option_that_changes_other_sections_is_composed_as_a_whole(tmp_path):
    for path, text in {
        "tying/everywhere.yaml": "# @package _global_\ntying: {name: everywhere}\ntrain: {validate_every: 7}\n",
        "rank/with_defaults.yaml": "defaults:\n  - /train/paper@_global_.train\n  - _self_\nr: 4\n",
    }.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    with composer(f"hydra.searchpath=[file://{tmp_path}]") as fast:
        for cell in (["tying=everywhere"], ["rank=with_defaults"], ["tying=everywhere", "train=tiny", "seed=1"]):
            expected = whole(fast)(cell)
            assert fast.compose(cell) == expected, cell
        assert expected.train.validate_every == 4
        assert fast.compose(["tying=everywhere", "train.steps=9"]).tying.name == "everywhere"


def test_layers_depend_on_the_model_of_their_cell_only():
    tyings = (["tying.layers=[2,0-1]"], ["tying.layers=[0-29]"], ["tying=TABuv", "tying.u.init=0"])
    with composer() as fast:
        for model in (["model=tiny_llama"], []):
            for own in tyings:
                cell = [*model, *own, "rank.scaling=rslora"]
                assert outcome(fast.compose, cell) == outcome(whole(fast), cell), cell
        assert fast.compose(["model=tiny_llama", *tyings[0]]).tying.layers is None
        assert fast.compose(tyings[0]).tying.layers == [0, 1, 2]
