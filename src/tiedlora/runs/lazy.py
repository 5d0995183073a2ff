"""Imports torch late, for a forecast."""

from __future__ import annotations

from tiedlora.config.schema import Config
from tiedlora.models.arithmetic import DeviceSpeed


def device_speed(config: Config, seconds: float, prompt: float, row: float) -> DeviceSpeed:
    """Measure the device that a run would use; see device_speed.py."""
    from tiedlora.runs import device_speed

    return device_speed.measure(config, seconds, prompt, row)
