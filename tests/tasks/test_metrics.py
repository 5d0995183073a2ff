"""Scores equal those of the standard libraries, on the same outputs."""

import random

import pytest
import sacrebleu
from helpers.tiny import task_option

from tiedlora.errors import UserError
from tiedlora.tasks import Example, Task
from tiedlora.tasks.gsm8k import flexible_number, normalise, strict_number
from tiedlora.tasks.metrics import has_no_blanks
from tiedlora.tasks.task_metric import TaskMetric

# Answers as SQuAD's awkward ones are: articles, punctuation, case, repeated words, nothing left, other scripts.
SQUAD = [
    ("the Norman", ["Normans", "The Normans", "norman"]),
    ("A  cat, a dog.", ["cat dog", "cats and dogs"]),
    ("", ["something"]),
    ("...", ["the"]),
    ("10th and 11th centuries", ["in the 10th and 11th centuries", "10th-11th centuries"]),
    ("$1,000", ["1000", "$ 1,000"]),
    ("Über-Mensch", ["über mensch", "Übermensch"]),
    ("to to be", ["to be or not to be"]),
    ("an apple", ["AN APPLE!"]),
    ("", ["the"]),
    ("a", ["word"]),
    ("theatre", ["the atre"]),
]
SENTENCES = [
    ("The cat sat on the mat.", "The cat sat on a mat."),
    ("", "Thank you."),
    ("It's 5 o'clock, isn't it?", "It is five o'clock, is it not?"),
    ("completely different words here", "nothing in common at all"),
    ("Ein Satz auf Deutsch & mehr", "A sentence in German &amp; more"),
    ("We went to the moon in 1969 -- and came back.", "We went to the moon in 1969, and we came back."),
    ("yes", "Yes."),
]
# (output, strict, flexible): what the harness' filters take from it, None for its "[invalid]".
GSM8K = [
    ("#### 18", "18", "18"),
    ("#### 1,234", "1,234", "1,234"),
    ("#### 42.", "42.", "42."),
    ("#### $18", None, "$18"),
    ("####18", None, "18"),
    ("#### 5 #### 6", "5", "6"),
    ("#### 5\n\nQuestion: 7?", "5", "7"),
    ("The answer is 18.", None, "18."),
    ("She pays $1,000.00 in all", None, "$1,000.00"),
    ("- 7", None, "7"),
    ("between 3-4 hours", None, "-4"),
    ("no number at all", None, None),
    ("...", None, "..."),
    ("$ 5", None, "5"),
    ("#### ,", ",", None),
    ("<<2*9=18>>18\n#### 18", "18", "18"),
    ("1e5", None, "5"),
    ("\u0661\u0662", None, None),
    ("#### -1,000.5 kg", "-1,000.5", "-1,000.5"),
]


def test_exact_match_and_f1_are_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.text", reason="the dev extra brings the reference")
    outputs, references = map(list, zip(*SQUAD, strict=True))
    metric = TaskMetric(task_option("squad"))
    found = metric.compute(predictions=outputs, references=references, choices=[[] for _ in SQUAD])
    reference = functional.squad(
        [{"prediction_text": output, "id": str(i)} for i, output in enumerate(outputs)],
        [{"answers": {"answer_start": [0] * len(r), "text": r}, "id": str(i)} for i, r in enumerate(references)],
    )
    assert found["exact_match"] * 100 == pytest.approx(float(reference["exact_match"]), abs=5e-5)
    assert found["f1"] * 100 == pytest.approx(float(reference["f1"]), abs=5e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("今天的天气真的非常好。", True),
        ("きょうはとてもいいてんきです", True),
        ("วันนี้อากาศดีมาก", True),
        ("ມື້ນີ້ອາກາດດີຫຼາຍ", True),
        ("ថ្ងៃនេះអាកាសធាតុល្អ", True),
        ("ဒီနေ့ရာသီဥတုကောင်းတယ်", True),
        ("天气", False),  # a label
        ("使用 Python 编程语言进行开发工作", False),
        ("the word 天气 in an English sentence", False),
        ("오늘 날씨가 정말 좋습니다", False),
        ("๐๑๒๓๔๕๖๗๘๙๐๑", False),  # a number
        ("Donaudampfschifffahrtsgesellschaft", False),
    ],
)
def test_texts_without_blanks_are_known_by_their_scripts(text, expected):
    assert has_no_blanks(text) is expected


def test_bleu_and_chrf_are_sacrebleus():
    task, generator = task_option("iwslt2017"), random.Random(0)
    rows = [task.score(output, Example("", "", "", (reference,))) for output, reference in SENTENCES]
    for _ in range(5):
        chosen = generator.choices(range(len(SENTENCES)), k=len(SENTENCES))
        outputs, references = zip(*(SENTENCES[i] for i in chosen), strict=True)
        for name, theirs in {"bleu": sacrebleu.BLEU(), "chrf": sacrebleu.CHRF()}.items():
            ours = task.total(name, [rows[i][name] for i in chosen])
            assert 100 * ours == pytest.approx(theirs.corpus_score(outputs, [references]).score, abs=1e-9)
            assert task.signatures()[name] == str(theirs.get_signature())


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_is_rouge_scores(stemmer):
    from rouge_score.rouge_scorer import RougeScorer

    task = task_option("dialogsum", f"task.options.use_stemmer={stemmer}")
    reference = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)
    for output, wanted in SENTENCES:
        for name, found in task.score(output, Example("", "", "", (wanted,))).items():
            assert found == pytest.approx(reference.score(wanted, output)[name].fmeasure, abs=1e-12)
    # Each metric takes its own best reference.
    several = task.score("a b c d", Example("", "", "", ("d c b a", "a b x y z")))
    assert several["rouge1"] == 1.0
    assert several["rouge2"] == pytest.approx(reference.score("a b x y z", "a b c d")["rouge2"].fmeasure)


@pytest.mark.parametrize(("output", "strict", "flexible"), GSM8K)
def test_gsm8k_takes_what_the_harness_takes(output, strict, flexible):
    assert strict_number(output) == strict
    assert flexible_number(output) == flexible
    # Numbers are compared as text, without commas, dollar signs and a final point.
    assert normalise("$1,234.") == "1234"
    found = task_option("gsm8k").score(output, Example("", "", "", (flexible or "x",)))
    same = strict is not None and normalise(strict) == normalise(flexible or "x")
    assert found == {"exact_match_strict": same, "exact_match_flexible": flexible is not None}


def test_a_metric_of_choices():
    metric = TaskMetric(task_option("hellaswag"), by_likelihood=True)
    found = metric.compute(
        predictions=[[-5.5, -2.0, -9.0, -9.0]], references=[["0"]], choices=[[" abcdef", " ab", " a", " b"]]
    )
    # The second is more likely, but the first is more likely per character without the blank: 5.5/6 against 2/2.
    assert (found["accuracy"], found["accuracy_norm"]) == (0.0, 1.0)


class OwnTask(Task):
    """A task of a user: the score is given by the id of the example, which the built-in tasks do not look at."""

    metrics = ("right",)
    given: dict[str, dict]

    def score(self, _output, example):
        return self.given[example.id]


def own_scores(**given):
    task = OwnTask(task_option("squad").config)
    task.given = given
    examples = [Example(id, "its prompt", "its target") for id in given]
    empty = [[] for _ in given]
    metric = TaskMetric(task, examples=examples)
    return metric.compute(predictions=["answer" for _ in given], references=empty, choices=empty)


def test_a_task_scores_the_whole_example():
    scores = own_scores(a={"right": 1.0}, b={"right": True}, c={"right": 0}, d={"right": 1 + 1e-12})
    assert scores["right"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({"right": 57.0}, "row b has right=57.0; it must be a number from 0 to 1"),
        ({"right": "1"}, "row b has right='1'"),
        ({"wrong": 1.0}, "row b has right=None"),
    ],
)
def test_a_score_that_a_record_cannot_hold_is_refused(scores, says):
    with pytest.raises(UserError, match=f"task=squad: the score of {says}"):
        own_scores(a={"right": 1.0}, b=scores)
