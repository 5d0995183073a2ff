"""IWSLT 2017 (TED talks), German -> English.

Scored with corpus-level BLEU and chrF2, as sacreBLEU's command line computes them by default. Each output's
n-gram counts are its score here: their sum over outputs gives the corpus score, and sums over
resampled outputs its interval.

On the hub the pairs lie in zips behind a loading script, which is not run here: the zip is read
instead. hub.id=sentence-transformers/parallel-sentences-talks gives more TED pairs, for training.
"""

from __future__ import annotations

import html
import re
import zipfile
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from tiedlora.errors import UserError
from tiedlora.tasks import Example, Score, Task
from tiedlora.tasks.rows import Row, RowError, from_hub, hub_errors

ZIP = "data/2017-01-trnted/texts/de/en/de-en.zip"
ZIP_SOURCE = "IWSLT/iwslt2017"
LANGUAGES = ("de", "en")


class Iwslt2017(Task):
    fields = {"translation": dict}
    metrics = corpus_metrics = ("bleu", "chrf")
    inputs_recur = True  # "Vielen Dank." ends many a talk

    def hub_rows(self, split: str) -> list[Row]:
        hub = self.config.hub
        if hub.id != ZIP_SOURCE:
            return [Row(row.where, ted_pair(row.fields)) for row in from_hub(self.config, split)]
        with hub_errors(self.config, split) as sets:
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(hub.id, ZIP, repo_type="dataset", revision=hub.revision)
        try:
            with zipfile.ZipFile(path) as archive:
                return [row for name in sets.split("+") for row in zipped_rows(archive, name)]
        except (zipfile.BadZipFile, UnicodeDecodeError, EOFError) as error:
            raise UserError(f"{path}: is damaged ({error}); remove it, and it is fetched again") from None

    def example(self, row: dict[str, Any], id: str) -> Example:
        pair = row["translation"]
        for language in LANGUAGES:
            if not isinstance(pair.get(language), str):
                raise RowError(f"the field 'translation' must hold a text '{language}'")
        if not pair["de"].strip():
            raise RowError("the field 'translation.de' is empty")
        # A reference is one line to sacreBLEU's command line, and inner double blanks are slips of the source.
        return super().example({**row, **{language: " ".join(pair[language].split()) for language in LANGUAGES}}, id)

    @cached_property
    def _metrics(self) -> dict[str, Any]:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        return {"bleu": BLEU(), "chrf": CHRF()}

    def score(self, output: str, example: Example) -> dict[str, Score]:
        """Each metric's counts of one output, as sacreBLEU sums them over a corpus."""
        references = [[reference.strip()] for reference in example.references]
        return {
            name: [float(count) for count in metric._extract_corpus_statistics([output.strip()], references)[0]]
            for name, metric in self._metrics.items()
        }

    def corpus_score(self, metric: str, statistics: Iterable[float]) -> float:
        # Sums of counts are whole numbers, and sacreBLEU's formulas expect ints.
        return (
            float(self._metrics[metric]._compute_score_from_stats([round(count) for count in statistics]).score) / 100
        )

    def signatures(self) -> dict[str, str]:
        for metric in self._metrics.values():
            metric._extract_corpus_statistics(["x"], [["x"]])  # it learns the number of references from a corpus
        return {name: str(metric.get_signature()) for name, metric in self._metrics.items()}


def ted_pair(fields: dict[str, Any]) -> dict[str, Any]:
    """A row of the hub's TED pairs (`english`, `non_english`) under IWSLT's field names."""
    return {"translation": {"de": fields.get("non_english"), "en": fields.get("english")}}


def zipped_rows(archive: zipfile.ZipFile, name: str) -> list[Row]:
    """The pairs of one set of the official zip: `train`, or an evaluation set such as `tst2010`.

    Pairs of which a side is empty are left out: they are no translations.

    Raises:
        UserError: the zip lacks the set, or its two languages have different numbers of lines.
    """
    sides = []
    for language in LANGUAGES:
        if name == "train":
            wanted, read = f"train.tags.de-en.{language}", training_lines
        else:
            wanted, read = f"IWSLT17.TED.{name}.de-en.{language}.xml", evaluation_lines
        found = [member for member in archive.namelist() if member.rsplit("/", 1)[-1] == wanted]
        if not found:
            raise UserError(f"{archive.filename}: holds no {wanted}; set task.hub.splits to sets it has")
        sides.append(read(archive.read(found[0]).decode("utf-8")))
    if len(sides[0]) != len(sides[1]):
        raise UserError(f"{archive.filename}: {name} has {len(sides[0])} German and {len(sides[1])} English lines")
    return [
        Row(f"{archive.filename}[{name}] pair {number}", {"translation": dict(zip(LANGUAGES, pair, strict=True))})
        for number, pair in enumerate(zip(*sides, strict=True), start=1)
        if all(pair)
    ]


def training_lines(text: str) -> list[str]:
    """The sentences of a train.tags file: every line that is not a tag about the talk.

    Empty lines stay: they keep the two languages in step.
    """
    return [line.strip() for line in text.removesuffix("\n").split("\n") if not line.lstrip().startswith("<")]


def evaluation_lines(text: str) -> list[str]:
    """The segments of an evaluation set's XML, which is not always well-formed, entities turned to characters."""
    return [html.unescape(segment).strip() for segment in re.findall(r"<seg[^>]*>(.*?)</seg>", text, re.DOTALL)]


TASK = Iwslt2017
