"""What a GPU needs, shown without one: by tensors that have a device and no values (torch's meta and fake tensors)."""

import logging
import os
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import processes
from helpers.tiny import folder_of

from tiedlora.adapter.parts import ParameterGroup
from tiedlora.config.identity import run_id
from tiedlora.config.schema import TrainConfig
from tiedlora.models import device
from tiedlora.records.provenance import Execution
from tiedlora.runs import run, trainer, verify, verify_scores
from tiedlora.scoring.split import Scorer
from tiedlora.training import checkpoint
from tiedlora.training.checkpoint import RunInputs
from tiedlora.training.loop import TrainState
from tiedlora.training.optimizer import build_optimizer

TRAIN = TrainConfig(lr=1e-2, betas=[0.8, 0.99])


def parts_on(kind: str) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.ones(3, 2, device=kind)) for name in ("qkv.u", "qkv.A", "qkv.B")}


def test_a_restored_fused_optimizer_has_its_whole_state_on_the_device(tmp_path):
    """A fused AdamW takes no step while its step count is on the CPU."""
    parts = parts_on("cpu")
    optimizer = build_optimizer([ParameterGroup([part]) for part in parts.values()], TRAIN)
    for parameter in parts.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint.save(tmp_path, TrainState(step=1), parts, optimizer, RunInputs(Execution("cpu", 1)))

    there = parts_on("meta")
    groups = build_optimizer([ParameterGroup([part]) for part in there.values()], TRAIN).param_groups
    fused = torch.optim.AdamW([{**group, "fused": True} for group in groups], lr=TRAIN.lr)
    assert checkpoint.restore(tmp_path, there, fused, RunInputs(Execution("cpu", 1))) == TrainState(step=1)
    for parameter in there.values():
        state = fused.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert {value.device.type for value in state.values()} == {"meta"}
    assert [group["lr_factor"] for group in fused.param_groups] == [1.0] * 3


def test_deterministic_switches_torch_for_the_run_only(tiny_config, monkeypatch):
    # Set and deleted, so that the end of the test restores it.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    wished = tiny_config("train.deterministic=true")
    assert run_id(wished) == run_id(tiny_config())
    during, loss = [], trainer.target_loss

    def watched(model, batch):
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        during.append((torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]))
        return loss(model, batch)

    monkeypatch.setattr(trainer, "target_loss", watched)
    run.main(wished)
    assert set(during) == {(True, ":4096:8")}
    assert not torch.are_deterministic_algorithms_enabled()
    # So do scores that are added later, and those that verify makes again.
    later, losses = [], Scorer.losses
    monkeypatch.setattr(
        Scorer, "losses", lambda *of: later.append(torch.are_deterministic_algorithms_enabled()) or losses(*of)
    )
    run.main(tiny_config("train.deterministic=true", "score.splits=[test]", "score.metrics=[target_loss]"))
    added = len(later)
    loading, load_base = [], verify_scores.load_base
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    # The base model is the first that computes, and cuBLAS reads the variable when it starts.
    monkeypatch.setattr(
        verify_scores,
        "load_base",
        lambda *of: loading.append("CUBLAS_WORKSPACE_CONFIG" in os.environ) or load_base(*of),
    )
    assert all(finding.ok is not False for finding in verify.verify(folder_of(wished).path))
    assert 0 < added < len(later)
    assert all(later)
    assert loading == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_without_a_number_of_threads_has_torchs_own_also_after_one_with():
    before = torch.get_num_threads()
    device.own_threads.cache_clear()
    try:
        torch.set_num_threads(2)
        device.set_up_device("cpu", 1)
        assert torch.get_num_threads() == 1
        device.set_up_device("cpu", None)
        assert torch.get_num_threads() == 2
    finally:
        device.own_threads.cache_clear()
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kind", "dtype", "supported", "emulates"),
    [
        ("cuda", "bfloat16", False, True),
        ("cuda", "bfloat16", True, False),
        ("cuda", "float32", False, False),
        ("cpu", "bfloat16", False, False),
    ],
)
def test_a_gpu_without_bfloat16_is_known(kind, dtype, supported, emulates, monkeypatch):
    # torch counts emulation as support, unless it is told not to.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or supported
    )
    assert device.emulates_bfloat16(torch.device(kind), dtype) is emulates


@pytest.mark.parametrize(
    ("threads", "busy", "says"),
    [
        (2, 1.4, "2 threads on 2 cores, of which others use 1.4: train.threads=1 may be much faster"),
        (4, 0.0, "4 threads on 2 cores, of which others use 0.0: train.threads=2 may be much faster"),
        (2, 0.3, None),
        # With one, there is nothing to do about it.
        (1, 2.0, None),
    ],
)
def test_threads_that_other_programs_leave_no_core_for_are_named_with_the_key(threads, busy, says, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    # Two seconds pass in the block, by a clock that does not depend on how busy this machine is.
    clock, others = iter([10.0, 12.0]), iter([100.0, 100.0 + 2.0 * busy])
    monkeypatch.setattr(device, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(device, "_seconds_of_others", lambda: next(others))
    monkeypatch.setattr(device, "_cores", lambda: {0, 1})
    monkeypatch.setattr(device.torch, "get_num_threads", lambda: threads)
    with device.watched_cores(torch.device("cpu")):
        pass
    (said,) = caplog.messages or [""]
    assert said == "" if says is None else re.fullmatch(says, said)


def test_the_time_of_other_processes_is_counted():
    before = device._seconds_of_others()
    processes.run_python("-c", "import time\nwhile time.process_time() < 0.5: pass", check=True)
    assert device._seconds_of_others() - before > 0.4
