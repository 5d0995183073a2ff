"""IWSLT 2017 (TED talks), German -> English.

The scores are corpus-level BLEU and chrF2, as sacreBLEU's command line computes them by default. The score of one
output is its n-gram counts. Their sum over all outputs gives the corpus score; sums over resampled outputs give its
interval.

On the hub, the pairs are in a zip with a loading script. The script is not run; the zip is read directly.
"""

from __future__ import annotations

import html
import re
import zipfile
from collections.abc import Iterable

import huggingface_hub
from typing_extensions import override

from tiedlora.errors import UserError
from tiedlora.tasks.base import Example, Score, Task
from tiedlora.tasks.metrics import CORPUS, corpus_counts, corpus_score, corpus_signature
from tiedlora.tasks.rows import DataRow, RowError, hub_errors

ZIP = "data/2017-01-trnted/texts/de/en/de-en.zip"
LANGUAGES = ("de", "en")


class Iwslt2017(Task):
    """IWSLT 2017: German sentences of talks become English ones, scored by BLEU and chrF of the corpus."""

    fields = {"translation": dict}
    metrics = corpus_metrics = CORPUS
    inputs_recur = True  # many talks end with "Vielen Dank."

    @override
    def hub_rows(self, split: str) -> list[DataRow]:
        hub = self.config.hub
        with hub_errors(self.config, split) as sets:
            assert hub.id  # hub_errors has refused a task without it
            path = huggingface_hub.hf_hub_download(hub.id, ZIP, repo_type="dataset", revision=hub.revision)
        try:
            with zipfile.ZipFile(path) as archive:
                return [row for name in sets.split("+") for row in zipped_rows(archive, name)]
        except (zipfile.BadZipFile, UnicodeDecodeError, EOFError) as error:
            raise UserError(f"{path}: is damaged ({error}); remove it, and it is downloaded again") from None

    @override
    def example(self, row: DataRow, id: str) -> Example:
        pair = row["translation"]
        for language in LANGUAGES:
            if not isinstance(pair.get(language), str):
                raise RowError(f"the field 'translation' must hold a text '{language}'")
        if not pair["de"].strip():
            raise RowError("the field 'translation.de' is empty")
        # For sacreBLEU's command line, a reference is one line. Double blanks are typing errors of the source.
        return super().example(
            row.with_fields(**{language: " ".join(pair[language].split()) for language in LANGUAGES}), id
        )

    def score(self, output: str, example: Example) -> dict[str, Score]:
        """Metric -> the counts of one output, as sacreBLEU sums them over a corpus."""
        return {name: corpus_counts(name, output, example.references) for name in self.metrics}

    @override
    def corpus_score(self, metric: str, statistics: Iterable[float]) -> float:
        return corpus_score(metric, statistics)

    @override
    def signatures(self) -> dict[str, str]:
        return {name: corpus_signature(name) for name in self.metrics}


def zipped_rows(archive: zipfile.ZipFile, name: str) -> list[DataRow]:
    """The pairs of one set of the official zip: `train`, or an evaluation set such as `tst2010`.

    A pair with an empty side is left out, because it is not a translation.

    Raises:
        UserError: the zip lacks the set, or its two languages have different numbers of lines.
    """
    sides = []
    for language in LANGUAGES:
        words = f"train.tags.de-en.{language}" if name == "train" else f"IWSLT17.TED.{name}.de-en.{language}.xml"
        members = [member for member in archive.namelist() if member.rsplit("/", 1)[-1] == words]
        if not members:
            raise UserError(f"{archive.filename}: holds no {words}; set task.hub.splits to sets it has")
        text = archive.read(members[0]).decode("utf-8")
        if name == "train":
            # All lines but the tags about a talk. Empty ones stay: line n of both languages is one pair.
            lines = [line for line in text.removesuffix("\n").split("\n") if not line.lstrip().startswith("<")]
        else:
            # The XML is not always well-formed.
            lines = [html.unescape(line) for line in re.findall(r"<seg[^>]*>(.*?)</seg>", text, re.DOTALL)]
        sides.append([line.strip() for line in lines])
    if len(sides[0]) != len(sides[1]):
        raise UserError(f"{archive.filename}: {name} has {len(sides[0])} German and {len(sides[1])} English lines")
    return [
        DataRow(f"{archive.filename}[{name}] pair {number}", {"translation": dict(zip(LANGUAGES, pair, strict=True))})
        for number, pair in enumerate(zip(*sides, strict=True), start=1)
        if all(pair)
    ]


TASK = Iwslt2017
