"""Run folders of an earlier version of the code are read, reported, verified, printed and continued. They are fixtures.

tests/fixtures/earlier holds one run twice, made by commit 1dc40d2: finished, and stopped after step 3 of 6 with its
checkpoint.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tiedlora.config.compose import read_config
from tiedlora.config.identity import config_tree, run_id
from tiedlora.errors import UserError
from tiedlora.page import write
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run, verify
from tiedlora.sweeps.cells import frozen_cell

FIXTURES = Path(__file__).parents[1] / "fixtures" / "earlier"
RUN = "custom-r2-chain_sum-llama-s0-8745001118"
BFLOAT16 = "custom-r2-chain_sum-llama-s0-cd00cdcd92"
"""The same in bfloat16, where the order of roundings decides the bits."""
FILES = ("adapter/adapter.safetensors", "adapter/adapter.json", "predictions/test.jsonl")
PROCESSOR = (FIXTURES / "processor.txt").read_text().strip()
"""Vendor, family and model of the processor that made the fixtures."""


@pytest.fixture
def old(request, tmp_path):
    """A copy of the run in a state, in its own outputs/."""
    state, run_id = request.param
    shutil.copytree(FIXTURES / state / run_id, tmp_path / "outputs" / run_id)
    return tmp_path / "outputs" / run_id


def config_of(folder: Path):
    """The run's own configuration, with the present place of the folder."""
    config = read_config(folder / "config.yaml")
    config.outputs, config.cache = str(folder.parent), str(folder.parents[1] / "cache")
    return config


@pytest.mark.parametrize("old", [("finished", RUN)], indirect=True)
def test_a_finished_run_keeps_its_id_and_is_printed_reported_and_verified(old, capsys):
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    record = RunFolder(old).finished_record()
    assert record.run_id == run_id(config_of(old)) == RUN
    assert run.main(config_of(old)) == record
    assert "finished before" in capsys.readouterr().out
    assert [found.record.run_id for found in write.build([old.parent]).runs] == [RUN]
    findings = verify.verify(old, rows=12, cache=old.parents[1] / "cache")
    assert [finding.check for finding in findings if finding.ok is not True] == ["result.json"]
    assert {finding.check for finding in findings} >= {"adapter", "predictions test", "regenerate test.base"}
    assert {path: path.read_bytes() for path in before} == before
    # It has a key that is gone, at the one value that is left; another one would be another result.
    config = (old / "config.yaml").read_text()
    assert "engine: transformers" in config
    (old / "config.yaml").write_text(config.replace("engine: transformers", "engine: static"))
    with pytest.raises(UserError, match=r"score\.engine"):
        read_config(old / "config.yaml")
    # Every key of the record survives reading and writing. Its arm was not recorded then.
    RunFolder(old).write_record(record)
    written = json.loads((old / "result.json").read_text())
    assert written.pop("arm")["params"] == record.trainable_params
    assert written == json.loads(before[old / "result.json"])


@pytest.mark.parametrize("old", [("interrupted", RUN), ("interrupted", BFLOAT16)], indirect=True)
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


def test_a_frozen_cell_with_keys_that_are_gone_is_read(tiny_config, tmp_path):
    config = tiny_config()
    tree = config_tree(config)
    tree["train"]["validation_answers"], tree["tying"]["config"] = 0, None
    path = tmp_path / "outputs" / "sweeps" / "s" / "cells" / f"{run_id(config)}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(tree))
    assert frozen_cell(path.parents[1], run_id(config)).run_id == run_id(config)
