"""Run folders of version 0.1 can still be read, reported, verified, printed and continued. They are fixtures.

tests/fixtures/version_0_1 holds one run twice, made by version 0.1: finished, and stopped after
step 3 of 6 with its checkpoint.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiedlora
from tiedlora.config.compose import read_config
from tiedlora.config.identity import run_id
from tiedlora.page import write
from tiedlora.records.loss_metrics import LOSS_METRICS
from tiedlora.records.provenance import Execution, with_execution
from tiedlora.records.reading import typed
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run, verify
from tiedlora.training.checkpoint import RunInputs

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version_0_1"
RUN = "custom-r2-chain_sum-llama-s0-8745001118"
BFLOAT16 = "custom-r2-chain_sum-llama-s0-cd00cdcd92"
"""The same in bfloat16, where the order of roundings decides the bits."""
FILES = ("adapter/adapter.safetensors", "adapter/adapter.json", "predictions/test.jsonl")
PROCESSOR = (FIXTURES / "processor.txt").read_text().strip()
"""Vendor, family and model of the processor that made the fixtures."""

FINISHED = pytest.mark.parametrize("old", [("finished", RUN)], indirect=True)


def processor() -> str:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    values = {key.strip(): value.strip() for key, _, value in lines}
    return " ".join(values.get(key, "") for key in ("vendor_id", "cpu family", "model"))


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


@FINISHED
def test_a_finished_run_keeps_its_id_and_is_printed_and_reported(old, capsys, tmp_path):
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    record = RunFolder(old).finished_record()
    assert record.run_id == run_id(config_of(old)) == RUN
    assert record.execution == Execution("cpu", threads=1)
    assert run.main(config_of(old)) == record
    assert "finished before" in capsys.readouterr().out
    report = write.build([old.parent])
    assert [found.record.run_id for found in report.runs] == [RUN]
    assert {path: path.read_bytes() for path in before} == before


@FINISHED
def test_every_key_of_the_record_survives_reading_and_writing(old):
    tree = json.loads((old / "result.json").read_text())
    RunFolder(old).write_record(RunFolder(old).finished_record())
    again = json.loads((old / "result.json").read_text())
    assert again.pop("execution") == {"device": "cpu", "threads": 1, "processes": 1}
    assert again == tree


@FINISHED
def test_a_finished_run_verifies_and_its_outputs_are_made_again(old):
    findings = verify.verify(old, rows=12, cache=old.parents[1] / "cache")
    assert [finding for finding in findings if finding.ok is not True] == []
    assert {finding.check for finding in findings} >= {"adapter", "predictions test", "regenerate test.base"}


@FINISHED
def test_a_finished_run_gets_its_loss_and_keeps_the_rest(old):
    before = RunFolder(old).finished_record()
    config = config_of(old)
    config.score.metrics = ["target_loss"]
    after = run.main(config)
    for split, scores in before.scores.items():
        now = after.scores[split]
        assert {*now.metrics} == {*scores.metrics, *LOSS_METRICS}
        assert {name: now.metrics[name] for name in scores.metrics} == scores.metrics
        assert {name: now.gain[name] for name in scores.metrics} == scores.gain
    findings = verify.verify(old, rows=12, cache=old.parents[1] / "cache")
    assert [finding for finding in findings if finding.ok is False] == []


@FINISHED
def test_an_adapter_is_loaded(old):
    attached = tiedlora.load(old)
    stored = load_file(old / "adapter" / "adapter.safetensors")
    assert all(torch.equal(attached.adapter.parts()[name], values) for name, values in stored.items())


@pytest.mark.parametrize("old", [("interrupted", RUN), ("interrupted", BFLOAT16)], indirect=True)
def test_a_checkpoint_is_continued_to_the_very_adapter(old, capsys):
    config = config_of(old)
    # Version 0.1 scored no losses, and its predictions had none.
    config.score.metrics = list(RunFolder(FIXTURES / "finished" / old.name).finished_record().scores["test"].metrics)
    record = run.main(config)
    assert record.training.steps == 6
    (earlier,) = record.training.continued_from
    assert (earlier.step, earlier.execution) == (3, Execution("cpu", threads=1))
    assert [row["step"] for row in map(json.loads, (old / "metrics.jsonl").read_text().splitlines())][-1] == 6
    expected = load_file(FIXTURES / "finished" / old.name / "adapter" / "adapter.safetensors")
    for name, values in load_file(old / "adapter" / "adapter.safetensors").items():
        assert (values - expected[name]).abs().max() <= (1e-2 if old.name == BFLOAT16 else 1e-6)
    # Another kind of processor may round differently. On the fixture's kind, every byte must be the same.
    if processor() == PROCESSOR:
        for name in FILES:
            assert (old / name).read_bytes() == (FIXTURES / "finished" / old.name / name).read_bytes(), name


def test_an_earlier_checkpoint_has_its_execution_as_text():
    """Until the key `execution`: device, threads and processes as one text, and later the processor beside it."""
    facts = {"data": {}, "base": "b", "versions": {}, "code": None, "device": "cpu, 2 threads, 3 processes"}
    assert typed(RunInputs, with_execution(facts)).execution == Execution("cpu", 2, 3)
    assert typed(RunInputs, with_execution({**facts, "processor": "EPYC"})).execution == Execution("cpu", 2, 3, "EPYC")
