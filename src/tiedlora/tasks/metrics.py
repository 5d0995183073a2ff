"""The metrics of generated answers and of choices, which several tasks use.

An output is compared with each reference, and the best score counts. sacreBLEU and rouge-score are imported when they
are first used, because it takes long, and only scoring needs them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from tiedlora.tasks.gsm8k import FLEXIBLE
from tiedlora.tasks.gsm8k import normalise as number_form

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

ROUGES = ("rouge1", "rouge2", "rougeL")
CORPUS = ("bleu", "chrf")
"""Corpus-level metrics. The score of one output is its n-gram counts, whose sum gives the metric."""
GENERATED = ("exact_match", "token_f1", *ROUGES, *CORPUS)
"""The metrics of a generated answer."""
CHOSEN = ("choice_accuracy", "choice_accuracy_norm")
"""The metrics of choices: whether the likeliest is right, by its likelihood and by its likelihood per character."""
FEWEST_LETTERS = 10
"""A shorter text without blanks may be a single word, such as a label."""
_WITHOUT_BLANKS = re.compile(
    "["
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ecf"  # Lao
    "\u1000-\u103f\u1050-\u108f"  # Myanmar
    "\u1780-\u17d3"  # Khmer
    "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # CJK ideographs
    "]"
)
"""The letters of scripts that have no blanks between words."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def lower_form(text: str) -> str:
    """The text without differences of case, and with single blanks."""
    return " ".join(text.casefold().split())


def squad_form(text: str) -> str:
    """The form of an answer that SQuAD's official evaluation compares: without case, punctuation and articles."""
    without_articles = re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split())


def last_number(text: str) -> str:
    """The last number of a text, without commas, dollar signs and final points; empty if there is none.

    A hyphen after a digit is no sign: the last number of 10-12 is 12.
    """
    numbers = [found for found in FLEXIBLE.findall(re.sub("(?<=[0-9])-", " ", text)) if re.search("[0-9]", found)]
    return number_form(numbers[-1]).rstrip(".") if numbers else ""


FORMS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": lower_form,
    "squad": squad_form,
    "number": last_number,
}
"""task.normalise -> the form of an answer that exact_match and token_f1 compare."""


def exact_match(output: str, references: Sequence[str], form: Callable[[str], str]) -> float:
    """1 if the output has the same form as a reference, otherwise 0."""
    return float(form(output) in map(form, references))


def token_f1(output: str, references: Sequence[str], form: Callable[[str], str]) -> float:
    """The harmonic mean of precision and recall over the words of the forms. Repeated words count.

    If both texts are empty in their form, it is 1, as in torchmetrics and in SQuAD 2.0's script. The script of
    SQuAD 1.1 gives 0.
    """
    return max(_f1(form(output).split(), form(reference).split()) for reference in references)


def _f1(output_words: list[str], reference_words: list[str]) -> float:
    if not output_words and not reference_words:
        return 1.0
    shared = sum((Counter(output_words) & Counter(reference_words)).values())
    return 2 * shared / (len(output_words) + len(reference_words)) if shared else 0.0


def rouge(names: tuple[str, ...], output: str, references: Sequence[str], use_stemmer: bool) -> dict[str, float]:
    """Each of these ROUGE metrics -> rouge-score's F-measure, the best over the references."""
    scorer = _rouge_scorer(names, use_stemmer)
    scores = scorer.score_multi([reference.strip() for reference in references], output.strip())
    return {name: float(scores[name].fmeasure) for name in names}


def has_rouge_words(text: str) -> bool:
    """Whether ROUGE sees more than the numbers of a text. Its words have the letters a to z and digits alone."""
    text = text.lower()
    return re.search("[a-z]", text) is not None or (re.search("[0-9]", text) is not None and not _has_letters(text))


def _has_letters(text: str) -> bool:
    return any(map(str.isalpha, text))


def has_no_blanks(text: str) -> bool:
    """Whether a text is surely one word to metrics of words, because its script has no blanks between words.

    It then has ten or more letters of such scripts, and no blank from the first to the last.
    """
    letters = _WITHOUT_BLANKS.findall(text)
    if len(letters) < FEWEST_LETTERS:
        return False
    return re.search(r"\s", text[text.index(letters[0]) : text.rindex(letters[-1])]) is None


@functools.cache
def _rouge_scorer(names: tuple[str, ...], use_stemmer: bool) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # takes more than a second  # noqa: PLC0415

    return RougeScorer(names, use_stemmer=use_stemmer)


def rouge_signature(use_stemmer: bool) -> str:
    """What a record says of the ROUGE that scored it."""
    stemmer = "yes" if use_stemmer else "no"
    return f"rouge-score:{importlib.metadata.version('rouge-score')}|F1|stemmer:{stemmer}|refs:max"


@functools.cache
def _sacrebleu(name: str) -> BLEU | CHRF:
    from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415
    from sacrebleu.metrics.chrf import CHRF  # noqa: PLC0415

    return BLEU() if name == "bleu" else CHRF()


def corpus_counts(name: str, output: str, references: Sequence[str]) -> list[float]:
    """The counts of one output, as sacreBLEU sums them over a corpus."""
    streams = [[reference.strip()] for reference in references]
    return [float(count) for count in _sacrebleu(name)._extract_corpus_statistics([output.strip()], streams)[0]]


def corpus_score(name: str, statistics: Iterable[float]) -> float:
    """BLEU or chrF in [0, 1], from the sum of the counts over outputs."""
    # Sums of counts are whole numbers, and sacreBLEU's formulas expect ints.
    counts = [round(count) for count in statistics]
    return float(_sacrebleu(name)._compute_score_from_stats(counts).score) / 100


def corpus_signature(name: str) -> str:
    """sacreBLEU's signature of BLEU or chrF."""
    metric = _sacrebleu(name)
    # The signature holds the number of references. sacreBLEU knows it only after it has scored a corpus.
    metric._extract_corpus_statistics(["x"], [["x"]])
    return str(metric.get_signature())


def choice_accuracies(log_likelihoods: Sequence[float], lengths: Sequence[int], correct: int) -> tuple[float, float]:
    """Whether the likeliest choice is the right one, and the likeliest per character. Of equal ones, the first is
    chosen.

    Args:
        lengths: the characters of each choice. An empty one counts as one character.
        correct: the number of the right choice.
    """
    numbers = range(len(log_likelihoods))
    likeliest = max(numbers, key=lambda i: log_likelihoods[i])
    likeliest_per_character = max(numbers, key=lambda i: log_likelihoods[i] / max(1, lengths[i]))
    return float(likeliest == correct), float(likeliest_per_character == correct)
