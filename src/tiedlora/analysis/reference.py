"""Published scores, which the report shows beside ours. They are read from reference/*.yaml.

A published score was measured with other code, and mostly with other data, seeds and prompts. So it enters no mean, no
interval and no verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field

from tiedlora import storage
from tiedlora.analysis.groups import RunGroup
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.reading import Name, Number, Text, typed

WHAT = "a file of published scores"
LONGEST = 500
"""Most characters of a text in the file. The report shows them in one cell."""
Words = Annotated[Text, Field(min_length=1, max_length=LONGEST)]
SplitName = Literal["test", "validation"]


@dataclass(frozen=True)
class PublishedScore:
    """One published number, with the source in which a reader finds it."""

    source: Words
    """The publication."""
    link: Annotated[Text, Field(pattern=r"^https://\S+$", max_length=LONGEST)]
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
    split: SplitName = "test"

    def note(self) -> str:
        """The number with its source, for the notes of a table."""
        return f"published {100 * self.value:.1f}: {self.source}, {self.table} ({self.protocol}), {self.link}"


OF_FILE = ("source", "link", "protocol")
"""The keys that every score of a file shares. A score may give its own value."""


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
    _refuse_unknown(tree, OF_FILE, str(path))
    scores: dict[tuple[object, ...], PublishedScore] = {}
    for number, entry in enumerate(entries):
        where = f"{path}: scores[{number}]"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: must be a mapping with the keys {', '.join(_KEYS)}")
        _refuse_unknown(entry, _KEYS, where)
        try:
            score = typed(PublishedScore, {**tree, **entry}, WHAT)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if is_loss(score.metric):
            raise UserError(
                f"{where}: '{score.metric}' is a loss, which compares within one tokenization; give a score"
            )
        key = (score.model, score.task, score.split, score.metric, score.configuration, score.rank)
        if key in scores:
            raise UserError(f"{where}: is about the same run as an earlier score of this file; keep one of them")
        scores[key] = score
    return list(scores.values())


_KEYS = tuple(field.name for field in fields(PublishedScore))


def _refuse_unknown(tree: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    if unknown := [key for key in tree if key not in known]:
        raise UserError(f"{where}: has the unknown key {unknown[0]!r:.40}; its keys are {', '.join(known)}")


def published(scores: Iterable[PublishedScore], group: RunGroup, split: str, metric: str) -> list[PublishedScore]:
    """The published scores of what a group's runs measure: the same base model, task, split, metric, configuration
    and rank.
    """
    record = group.runs[0].record
    wanted = (record.base.name, group.task, split, metric, group.label, group.rank)
    return [
        score
        for score in scores
        if (score.model, score.task, score.split, score.metric, score.configuration, score.rank) == wanted
    ]
