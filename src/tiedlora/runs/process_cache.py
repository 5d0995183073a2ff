"""What one run leaves in memory for the next run of the same process: the base model, the rows, their token ids."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleSlotCache(Generic[T]):
    """The value that was made last, kept for the same key.

    One value and no more: a sweep visits its cells grouped by model and task, and two base models
    would not fit on a device that one fills.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._value: T | None = None

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The value of `key`; another key's value is dropped before the new one is made."""
        if self._value is None or key != self._key:
            self.clear()
            self._value, self._key = make(), key
        return self._value

    def clear(self) -> None:
        """Drop the value, reference cycles included, so that its memory is free before more is asked for."""
        self._key = self._value = None
        gc.collect()
