"""The name of the file that describes a saved adapter, and the base model that it names."""

from __future__ import annotations

from dataclasses import dataclass

from tiedlora.reading import StoredText

DESCRIPTION = "adapter.json"
"""The file of an adapter's folder that describes it."""


@dataclass(frozen=True)
class BaseModelRecord:
    """Which base model an adapter belongs to."""

    name: StoredText
    revision: StoredText | None
    digest: StoredText | None
    """The sha256 of its files, or its commit on the hub. Digest and revision are None if a program made the model."""
    quantization: StoredText | None = None
    """nf4 or int8, if its linear layers are quantised after loading; the digest is that of the files."""

    @property
    def version(self) -> str | None:
        """What the hub has exactly this model under: its commit; of a model from elsewhere, its revision."""
        kind, _, commit = (self.digest or "").partition(":")
        return commit if kind == "commit" else self.revision

    def __str__(self) -> str:
        return f"{self.name} at {self.revision} ({self.digest}{f', {self.quantization}' if self.quantization else ''})"
