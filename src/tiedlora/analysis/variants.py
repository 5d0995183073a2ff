"""Names for the differences between groups that would otherwise have the same name."""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

LONGEST = 24
"""The most characters of a value in a name."""


def differing_values(names: Sequence[Hashable], trees: Sequence[Any]) -> list[str]:
    """For each tree, the values that distinguish it from others of the same name, such as `train.steps=300`.

    Args:
        names: one per tree; trees with equal names are compared.
        trees: nested plain data.

    Returns:
        One text per tree; empty if nothing differs.
    """
    numbers_of: dict[Hashable, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        numbers_of[name].append(number)
    texts = [""] * len(names)
    for numbers in numbers_of.values():
        flat = [dict(_flat(trees[number])) for number in numbers]
        keys = sorted({key for values in flat for key in values})
        varying = [key for key in keys if len({json.dumps(values.get(key)) for values in flat}) > 1]
        short = {key: _short_names([values.get(key) for values in flat]) for key in varying}
        for place, number in enumerate(numbers):
            texts[number] = ", ".join(f"{key}={short[key][place]}" for key in varying)
    return texts


def _short_names(values: Sequence[Any]) -> list[str]:
    """The values, cut to LONGEST characters. Where different values are cut to the same text, each has its hash."""
    names = list(map(_short, values))
    wholes = [json.dumps(value) for value in values]
    if len(set(names)) == len(set(wholes)):
        return names
    return [f"{name} #{zlib.crc32(whole.encode()):08x}" for name, whole in zip(names, wholes, strict=True)]


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).replace("\n", " ")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
