"""Cells that are put together from sections are those that Hydra composes as a whole."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from tiedlora.config import compose
from tiedlora.config.identity import config_tree, run_id
from tiedlora.config.project import CONF
from tiedlora.errors import UserError
from tiedlora.sweeps.cell_composer import CellComposer

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
    "added": [
        "",
        "+task.options.rows={train: 4}",
        "++train.steps=9",
        "+task.options.deep.er=[1,{a: null}]",
        "~task.stop",
    ],
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


def outcome(function, overrides: list[str]) -> object:
    """The complete configuration and its id, or the message of the error."""
    try:
        config = function(overrides)
    except UserError as error:
        return str(error)
    # JSON tells 1 from 1.0 and from true, which compare as equal.
    return json.dumps(config_tree(config)), run_id(config)


def random_cell(generator: random.Random) -> list[str]:
    cell = []
    for name, choices in CHOICES.items():
        if name not in USUALLY_ABSENT or generator.random() < 0.25:
            cell.append(generator.choice(choices))
    cell = [override for override in cell if override]
    generator.shuffle(cell)
    return cell


@pytest.mark.slow
def test_random_cells_equal_hydras_own_composition():
    # Tried once with 300 cells of seed 1 as well, which takes minutes.
    generator = random.Random(0)
    valid = 0
    with composer() as fast:
        for _ in range(16):
            cell = random_cell(generator)
            expected = outcome(fast.compose_whole, cell)
            assert outcome(fast.compose, cell) == expected, cell
            valid += not isinstance(expected, str)
    assert 4 <= valid <= 14


def test_a_grid_costs_one_composition_for_each_value_of_each_axis(monkeypatch):
    axes = {"model": ["gpt2", "llama2_7b"], "tying": ["LoRA", "TA", "TB"], "train.lr": ["1e-3", "1e-2"], "seed": "0123"}
    with composer("+grid=paper") as fast:
        monkeypatch.setattr(fast, "compose_whole", lambda cell: pytest.fail(f"composed as a whole: {cell}"))
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


def test_an_option_that_changes_other_sections_is_composed_as_a_whole(tmp_path):
    for path, text in {
        "tying/everywhere.yaml": "# @package _global_\ntying: {name: everywhere}\ntrain: {validate_every: 7}\n",
        "rank/with_defaults.yaml": "defaults:\n  - /train/paper@_global_.train\n  - _self_\nr: 4\n",
    }.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    with composer(f"hydra.searchpath=[file://{tmp_path}]") as fast:
        for cell in (["tying=everywhere"], ["rank=with_defaults"], ["tying=everywhere", "train=tiny", "seed=1"]):
            expected = fast.compose_whole(cell)
            assert fast.compose(cell) == expected, cell
        assert expected.train.validate_every == 4
        assert fast.compose(["tying=everywhere", "train.steps=9"]).tying.name == "everywhere"


def test_layers_depend_on_the_model_of_their_cell_only():
    """Every layer by number means null, and a model has its own number of layers: 3 here, then 30."""
    tyings = (["tying.layers=[2,0-1]"], ["tying.layers=[0-29]"], ["tying=TABuv_v0", "tying.u.init=0"])
    with composer() as fast:
        for model in (["model=tiny_llama"], []):
            for own in tyings:
                cell = [*model, *own, "rank.scaling=rslora"]
                assert outcome(fast.compose, cell) == outcome(fast.compose_whole, cell), cell
        assert fast.compose(["model=tiny_llama", *tyings[0]]).tying.layers is None
        assert fast.compose(tyings[0]).tying.layers == [0, 1, 2]
