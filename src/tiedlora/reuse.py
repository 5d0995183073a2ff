"""What one cell of a sweep leaves in memory for the next."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any


class Latest:
    """The value made last, kept for whoever asks for the same key again.

    One value and no more: a sweep visits its cells grouped by model and task, and two base models
    would not fit on a device that one fills.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._value: Any = None

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of `key`; another key's value is dropped before the new one is made."""
        if self._value is None or key != self._key:
            self.forget()
            self._value, self._key = make(), key
        return self._value

    def forget(self) -> None:
        """Drop the value, cycles and all, so that its memory is free before more is asked for."""
        self._key = self._value = None
        gc.collect()
