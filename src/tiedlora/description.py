"""The name of the file that describes a saved adapter, and the base model that it names."""

from __future__ import annotations

from dataclasses import dataclass

from tiedlora.reading import Text

DESCRIPTION = "adapter.json"
"""The file of an adapter's folder that describes it."""


@dataclass(frozen=True)
class BaseModelRecord:
    """Which base model an adapter belongs to."""

    name: Text
    revision: Text | None
    digest: Text | None
    """The sha256 of its files, or its commit on the hub. Digest and revision are None if a program made the model."""
    quantization: Text | None = None
    """nf4 or int8, if its linear layers are quantised after loading; the digest is that of the files."""

    def __str__(self) -> str:
        return f"{self.name} at {self.revision} ({self.digest}{f', {self.quantization}' if self.quantization else ''})"
