"""A cache in memory for consecutive runs of one process: the base model, the rows, their token ids."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleSlotCache(Generic[T]):
    """Keeps the last value, and returns it again for the same key.

    There is only one value. A sweep groups its cells by model and task, so more are not needed, and two base models
    might not fit on a device.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._value: T | None = None

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The value of `key`. The value of another key is dropped before the new one is made."""
        if self._value is None or key != self._key:
            self.clear()
            self._value, self._key = make(), key
        return self._value

    def clear(self) -> None:
        """Drop the value and its reference cycles, so that the memory is free before a new value is made."""
        self._key = self._value = None
        gc.collect()
