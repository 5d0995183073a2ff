"""Base models of 4 and 8 bits, and several processes, on real GPUs."""

import sys

import pytest
import torch
from helpers import processes
from helpers.tiny import folder_of

from tiedlora.config.identity import run_id
from tiedlora.config.project import PROJECT
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run
from tiedlora.runs.verify import verify

pytestmark = pytest.mark.gpu


def losses_of(folder: RunFolder) -> list[float]:
    return [row.values["train/loss"] for row in read_metrics(folder.metrics_file) if "train/loss" in row.values]


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_quantised_base_trains_and_continues(gpu_config, bits):
    pytest.importorskip("bitsandbytes", reason="model.quantization needs bitsandbytes (the extra `quantization`)")
    words = (f"model.quantization={bits}", "train.dtype=bfloat16", "train.deterministic=true")
    whole, paused = gpu_config("whole", *words), gpu_config("paused", *words)
    record = run.main(whole)
    assert record.base.quantization == bits
    assert record.training.validation_loss_last < record.training.validation_loss_first
    paused.train.pause_after = 3
    run.main(paused)
    paused.train.pause_after = None
    run.main(paused)
    assert losses_of(folder_of(paused)) == losses_of(folder_of(whole))


def test_a_run_can_be_verified_on_the_same_gpu(gpu_config):
    config = gpu_config("verified")
    run.main(config)
    findings = verify(folder_of(config).path, rows=12)
    assert not [finding for finding in findings if finding.ok is False]
    assert any(finding.ok and "outputs come out as they were" in finding.explanation for finding in findings)


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_are_one(gpu, gpu_config, tiny_run, tmp_path, shard):
    if gpu.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    alone = gpu_config("alone", "train.batch_size=7")
    run.main(alone)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(PROJECT / "train.py"), *tiny_run("train.batch_size=7"), f"outputs={tmp_path}/together"]
    command += [f"train.device={gpu.type}", f"train.shard={str(shard).lower()}"]
    done = processes.run(command, seconds=300)
    assert done.returncode == 0, done.stderr[-3000:]
    together = RunFolder(tmp_path / "together" / run_id(alone))
    assert "2 processes" in str(together.finished_record().execution)
    assert losses_of(together) == pytest.approx(losses_of(folder_of(alone)), rel=1e-3)
