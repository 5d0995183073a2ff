"""A run that an earlier version of the code has stopped is continued to the same adapter. It is a fixture.

tests/fixtures/earlier holds runs that commit 1dc40d2 made, stopped after step 3 of 6 with a checkpoint. `finished` has
the adapters and the answers that the same version gave when it finished them.
"""

import json
import shutil
from pathlib import Path

import pytest
from helpers.tiny import rows_of
from safetensors.torch import load_file

from tiedlora.config.compose import read_config
from tiedlora.config.identity import config_tree, run_id
from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run
from tiedlora.sweeps.cells import frozen_cell

FIXTURES = Path(__file__).parents[1] / "fixtures" / "earlier"
RUN = "custom-r2-chain_sum-llama-s0-8745001118"
BFLOAT16 = "custom-r2-chain_sum-llama-s0-cd00cdcd92"
"""The same in bfloat16, where the order of roundings decides the bits."""
FILES = ("adapter/adapter.safetensors", "adapter/adapter.json")
PROCESSOR = (FIXTURES / "processor.txt").read_text().strip()
"""Vendor, family and model of the processor that made the fixtures."""


@pytest.fixture
def old(request, tmp_path):
    """A copy of the stopped run, in its own outputs/."""
    return shutil.copytree(FIXTURES / "interrupted" / request.param, tmp_path / "outputs" / request.param)


def config_of(folder: Path):
    """The run's own configuration, with the present place of the folder."""
    config = read_config(folder / "config.yaml")
    config.outputs, config.cache = str(folder.parent), str(folder.parents[1] / "cache")
    return config


@pytest.mark.parametrize("old", [RUN], indirect=True)
def test_a_key_that_is_gone_is_read_at_the_one_value_that_is_left(old):
    """Another value would be another result."""
    config = (old / "config.yaml").read_text()
    assert "engine: transformers" in config
    assert run_id(read_config(old / "config.yaml")) == RUN
    (old / "config.yaml").write_text(config.replace("engine: transformers", "engine: static"))
    with pytest.raises(UserError, match=r"score\.engine"):
        read_config(old / "config.yaml")


@pytest.mark.parametrize("old", [RUN, BFLOAT16], indirect=True)
def test_a_checkpoint_is_continued_to_the_very_adapter(old):
    record = run.main(config_of(old))
    assert record.training.steps == 6
    (earlier,) = record.training.continued_from
    assert (earlier.step, earlier.code.commit[:7]) == (3, "1dc40d2")
    assert [row["step"] for row in map(json.loads, (old / "metrics.jsonl").read_text().splitlines())][-1] == 6
    expected = load_file(FIXTURES / "finished" / old.name / "adapter" / "adapter.safetensors")
    for name, values in load_file(old / "adapter" / "adapter.safetensors").items():
        assert (values - expected[name]).abs().max() <= (1e-2 if old.name == BFLOAT16 else 1e-6)
    # Another kind of processor may round differently. On the fixture's kind, every byte must be the same.
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    values = {key.strip(): value.strip() for key, _, value in lines}
    if " ".join(values.get(key, "") for key in ("vendor_id", "cpu family", "model")) == PROCESSOR:
        for name in FILES:
            assert (old / name).read_bytes() == (FIXTURES / "finished" / old.name / name).read_bytes(), name
        lines = (FIXTURES / "finished" / old.name / "predictions" / "test.jsonl").read_text().splitlines()
        assert [row.output for row in rows_of(RunFolder(old), "test")] == [json.loads(line)["output"] for line in lines]


def test_a_frozen_cell_with_keys_that_are_gone_is_read(tiny_config, tmp_path):
    config = tiny_config()
    tree = config_tree(config)
    tree["train"]["validation_answers"], tree["tying"]["config"] = 0, None
    path = tmp_path / "outputs" / "sweeps" / "s" / "cells" / f"{run_id(config)}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(tree))
    assert frozen_cell(path.parents[1], run_id(config)).run_id == run_id(config)
