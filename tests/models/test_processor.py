"""What a record says about the device of a run."""

from pathlib import Path

import pytest
import torch

from tiedlora.models import device
from tiedlora.models.device import execution_on, processor_name

INTEL = """
model name\t: Intel(R) Xeon(R) 8481C
flags\t\t: fpu avx512_bf16 amx_bf16

model name\t: the second core
"""


def test_a_run_on_a_cpu_names_the_processor_and_its_instructions():
    execution = execution_on(torch.device("cpu"), processes=2)
    assert torch.backends.cpu.get_cpu_capability() in execution.processor
    assert str(execution) == f"cpu, {torch.get_num_threads()} threads, 2 processes, {processor_name()}"


@pytest.mark.parametrize(
    ("text", "name"), [(INTEL, "Intel(R) Xeon(R) 8481C (AVX2, avx512_bf16, amx_bf16)"), ("", "arm (AVX2)")]
)
def test_the_name_comes_from_the_system_and_without_one_from_the_architecture(monkeypatch, text, name):
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    monkeypatch.setattr(device.platform, "machine", lambda: "arm")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert processor_name() == name
