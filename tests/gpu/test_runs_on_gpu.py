"""Runs on a GPU: a CPU's losses and answers, resume, memory, no waiting, no recompilation, few bits, processes."""

import math
import sys
from contextlib import contextmanager

import pytest
import torch
from helpers import processes
from helpers.tiny import folder_of, losses_of, rows_of
from safetensors.torch import load_file

from tiedlora.config.identity import run_id
from tiedlora.models.device import execution_on, free_memory
from tiedlora.places import PROJECT
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import TrainingRecord
from tiedlora.runs import run, trainer
from tiedlora.runs.verify import verify
from tiedlora.training.signals import StopSignal

pytestmark = pytest.mark.gpu
QUIET = ("train.log_every=100", "train.validate_every=0", "train.checkpoint_every=100", "score.splits=[]")
"""Nothing that reads numbers from the device between the first step and the last."""
LARGER = (
    "model.architecture.hidden=256",
    "model.architecture.head_dim=64",
    "model.architecture.intermediate=1024",
    "train.steps=2",
    "train.warmup_steps=0",
    "train.validation_rows=2",
    *QUIET,
)
"""A model whose activations are more than the workspace of the products."""


def whole_and_continued(gpu_config, *words: str) -> tuple[RunFolder, RunFolder]:
    """Two finished runs with the same losses. The second was paused after half of its steps."""
    whole, paused = gpu_config("whole", *words), gpu_config("paused", *words)
    run.main(whole)
    paused.train.pause_after = 3
    assert run.main(paused) is None
    paused.train.pause_after = None
    run.main(paused)
    assert losses_of(folder_of(paused)) == losses_of(folder_of(whole))
    return folder_of(whole), folder_of(paused)


def test_a_run_on_the_gpu_has_the_losses_of_a_cpu(gpu, gpu_config):
    config, on_cpu = gpu_config("gpu"), gpu_config("cpu", "train.device=cpu")
    record = run.main(config)
    assert record.execution == execution_on(gpu)
    assert record.training.peak_memory_bytes > 0
    expected = run.main(on_cpu)
    assert record.run_id == expected.run_id, "the device is no part of the identity"
    assert losses_of(folder_of(config)) == pytest.approx(losses_of(folder_of(on_cpu)), rel=1e-3)
    assert losses_of(folder_of(config))[6] < losses_of(folder_of(config))[1], "it trained"
    answers = [rows_of(folder_of(each), "validation") for each in (config, on_cpu)]
    # In float32, rounding rarely changes an answer of this model.
    assert sum(ours.output == theirs.output for ours, theirs in zip(*answers, strict=True)) >= len(answers[0]) - 1
    for name, part in load_file(folder_of(on_cpu).adapter / "adapter.safetensors").items():
        ours = load_file(folder_of(config).adapter / "adapter.safetensors")[name]
        assert (ours - part).abs().max() <= 2e-2 * part.abs().max(), name


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_a_paused_run_continues_bit_for_bit_if_algorithms_are_deterministic(gpu_config, checkpoint):
    words = ("train.deterministic=true", f"score.checkpoint={checkpoint}", "train.validate_every=1")
    folders = whole_and_continued(gpu_config, *words)
    expected, found = ((folder.adapter / "adapter.safetensors").read_bytes() for folder in folders)
    assert found == expected
    whole, continued = (folder.finished_record().training for folder in folders)
    assert continued.scored_step == whole.scored_step
    if checkpoint == "best":
        assert continued.scored_step == continued.best_step


def test_tokens_of_a_pass_bound_the_memory_whatever_the_batch(gpu, gpu_config):
    peaks = {}
    for name, words in {
        "small": ("train.batch_size=8", "train.microbatch_tokens=256"),
        "large": ("train.batch_size=32", "train.microbatch_tokens=256"),
        "unbounded": ("train.batch_size=32", "train.microbatch_tokens=null"),
    }.items():
        free_memory()
        peaks[name] = run.main(gpu_config(name, *LARGER, *words)).training.peak_memory_bytes
    assert peaks["large"] <= 1.25 * peaks["small"], peaks
    if gpu.type == "cuda":
        # On a CPU, the peak is that of the whole process.
        assert peaks["unbounded"] > 1.5 * peaks["large"], peaks


@contextmanager
def memory_between(gpu, small: int, large: int, monkeypatch):
    """Inside the block, the process gets the memory in the middle of two peaks. On a CPU, large passes fail instead."""
    if gpu.type == "cuda":
        free_memory()
        whole = torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction((small + large) / 2 / whole, 0)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, 0)
        return
    plain = trainer.target_loss

    def limited(model, batch):
        if batch.input_ids.numel() > 1024:
            raise torch.OutOfMemoryError("CUDA out of memory. (rehearsed)")
        return plain(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "target_loss", limited)
        yield


def test_too_little_memory_halves_the_passes_and_the_run_ends(gpu, gpu_config, monkeypatch):
    words = (*LARGER, "train.batch_size=32", "train.microbatch_tokens=null")
    plain, bounded = (gpu_config(name, *words) for name in ("plain", "bounded"))
    bounded.train.microbatch_tokens = 256
    large, small = (run.main(config).training.peak_memory_bytes for config in (plain, bounded))
    halved = gpu_config("halved", *words)
    with memory_between(gpu, small, large, monkeypatch):
        record = run.main(halved)
    assert record.training.halvings
    assert record.training.halvings[0].during == "training"
    assert losses_of(folder_of(halved)) == pytest.approx(losses_of(folder_of(plain)), rel=1e-3)


def sync_debug(gpu, mode: str) -> None:
    """What torch does if the program waits for the device: `error` or `default` (nothing)."""
    if gpu.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


def carried_out(config, monkeypatch, begin, end) -> TrainingRecord:
    """Carry out a run that calls `begin` after its first step and `end` after the last."""
    calls: list[int] = []

    def requested(_self) -> bool:
        # The loop asks this after each step, before it fetches any number, and after the last step again.
        calls.append(1)
        if len(calls) == 1:
            begin()
        if len(calls) == config.train.steps:
            end()
        return False

    monkeypatch.setattr(StopSignal, "requested", requested)
    try:
        record = run.main(config)
    finally:
        end()
    assert len(calls) == config.train.steps + 1
    return record.training


def test_no_step_after_the_first_waits_for_the_gpu(gpu, gpu_config, monkeypatch):
    config = gpu_config("quiet", *QUIET, "train.microbatch_size=2")

    def begin():
        sync_debug(gpu, "error")
        if gpu.type == "cuda":
            with pytest.raises(RuntimeError, match="synchroniz"):
                torch.ones(1, device=gpu).item()

    training = carried_out(config, monkeypatch, begin, lambda: sync_debug(gpu, "default"))
    assert math.isfinite(training.validation_loss_last)


def test_no_batch_after_the_first_compiles_again(gpu_config, monkeypatch):
    config = gpu_config("compiled", *QUIET, "train.compile=always", "train.steps=10")
    stance = torch.compiler.set_stance
    training = carried_out(config, monkeypatch, lambda: stance("fail_on_recompile"), lambda: stance("default"))
    assert training.validation_loss_last < training.validation_loss_first


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_quantised_base_trains_and_continues(gpu_config, bits):
    pytest.importorskip("bitsandbytes", reason="model.quantization needs bitsandbytes (the extra `quantization`)")
    words = (f"model.quantization={bits}", "train.dtype=bfloat16", "train.deterministic=true")
    record = whole_and_continued(gpu_config, *words)[0].finished_record()
    assert record.base.quantization == bits
    assert record.training.validation_loss_last < record.training.validation_loss_first


def test_a_run_can_be_verified_on_the_same_gpu(gpu_config):
    config = gpu_config("verified")
    run.main(config)
    findings = verify(folder_of(config).path, rows=12)
    assert not [finding for finding in findings if finding.ok is False]
    assert any(finding.ok and "outputs come out as they were" in finding.explanation for finding in findings)


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_train_as_one(gpu, gpu_config, tiny_run, tmp_path, shard):
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
