"""Published scores, which the report shows beside ours. They are read from reference/*.yaml.

A published score was measured with other code, and mostly with other data, seeds and prompts. So it enters no mean, no
interval and no verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import ConfigDict, Field

from tiedlora import storage
from tiedlora.analysis.groups import RunGroup
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.reading import Name, Number, Text, from_person

Words = Annotated[Text, Field(min_length=1, max_length=500)]
"""A text of the file, which the report shows in one cell."""


@dataclass(frozen=True)
class PublishedScore:
    """One published number, with the source in which a reader finds it."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    source: Words
    """The publication."""
    link: Annotated[Text, Field(pattern=r"^https://\S+$", max_length=500)]
    """Its address, where the number can be read."""
    table: Words
    """The table, figure or file of the source."""
    protocol: Words
    """How it was measured, above all what differs from ours."""
    model: Name
    """The base model, with its organisation as on the hub."""
    task: Name
    metric: Name
    configuration: Words
    """The configuration as our tables name it, such as LoRA, TABuv_v0 or `custom (mine)`."""
    rank: Annotated[int, Field(strict=True, ge=1)]
    value: Annotated[Number, Field(ge=0, le=1)]
    """The score as a fraction of 1."""
    split: Literal["test", "validation"] = "test"

    def __post_init__(self) -> None:
        if is_loss(self.metric):
            raise ValueError(f"'{self.metric}' is a loss, which compares within one tokenization; give a score")

    @property
    def about(self) -> tuple[str, str, str, str, str, int]:
        """What was measured."""
        return self.model, self.task, self.split, self.metric, self.configuration, self.rank

    def note(self) -> str:
        """The number with its source, for the notes of a table."""
        return f"published {100 * self.value:.1f}: {self.source}, {self.table} ({self.protocol}), {self.link}"


def read(folder: Path) -> list[PublishedScore]:
    """The scores in every *.yaml of a folder, by file name and in the files' order.

    Raises:
        UserError: there is no such folder; or a file is not readable, a key is unknown, missing or wrong, or two
            scores of a file are about the same. The message names the file, the score and the key.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; published scores are YAML files in reference/")
    return [score for path in sorted(folder.glob("*.yaml")) for score in _read_file(path)]


def _read_file(path: Path) -> list[PublishedScore]:
    # Interpolations are not resolved: a number needs none, and must not read the environment.
    tree: Any = OmegaConf.to_container(storage.read_yaml(path))
    entries = tree.pop("scores", None)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: needs the key scores, a list of at least one")
    scores: dict[tuple[object, ...], PublishedScore] = {}
    for number, entry in enumerate(entries):
        where, keys = f"{path}: scores[{number}]", [field.name for field in fields(PublishedScore)]
        if not isinstance(entry, dict):
            raise UserError(f"{where}: must be a mapping with the keys {', '.join(keys)}")
        try:
            # The file's own keys, such as source, are those of every score. A score may give its own value.
            score = from_person(PublishedScore, {**tree, **entry}, keys)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if score.about in scores:
            raise UserError(f"{where}: is about the same run as an earlier score of this file; keep one of them")
        scores[score.about] = score
    return list(scores.values())


def published(scores: Iterable[PublishedScore], group: RunGroup, split: str, metric: str) -> list[PublishedScore]:
    """The published scores of what a group's runs measure."""
    wanted = (group.runs[0].record.base.name, group.task, split, metric, group.label, group.rank)
    return [score for score in scores if score.about == wanted]
