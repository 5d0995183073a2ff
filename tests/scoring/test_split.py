"""Scoring one split: rows with scores, metrics with intervals, paired gains, and a base model scored once."""

import json
from copy import copy
from dataclasses import replace

import pytest
from helpers.tiny import rows_of as rows_of_run
from helpers.tiny import task_option, tiny, tiny_scorer

from tiedlora import storage
from tiedlora.adapter import attach
from tiedlora.analysis.metrics import gains, summarise
from tiedlora.description import DESCRIPTION
from tiedlora.errors import UserError
from tiedlora.models import device
from tiedlora.records.interval import Interval
from tiedlora.records.rows import PredictionRow
from tiedlora.records.run_folder import RunFolder
from tiedlora.scoring.split import Scorer
from tiedlora.scoring.wanted import Wanted
from tiedlora.tasks import Example
from tiedlora.tasks.rows import DataRow


def rows_of(task, pairs):
    """Prediction rows of (output, references), scored."""
    return [
        PredictionRow(str(i), "", list(references), task.score(output, Example("", "", "", references)), output=output)
        for i, (output, references) in enumerate(pairs)
    ]


def test_zero_one_scores_have_wilsons_interval_and_others_a_bootstrap():
    task = task_option("squad")
    rows = rows_of(task, [("red", ("red",)), ("red car", ("red",)), ("blue", ("red",)), ("the red", ("red",))])
    metrics = summarise(rows, task, "answers")
    assert metrics["exact_match"].value == 0.5
    assert metrics["exact_match"].method == "wilson"
    assert metrics["f1"].value == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert metrics["f1"].method == "bootstrap"
    assert 0 <= metrics["f1"].low < metrics["f1"].value < metrics["f1"].high <= 1


def test_gains_are_paired():
    task = task_option("squad")
    base = rows_of(task, [(f"red {i}" if i % 2 else "none", ("red 1",)) for i in range(40)])
    ours = rows_of(task, [(f"red {i}", ("red 1",)) for i in range(40)])
    gain = gains(ours, base, task, "answers")
    assert gain["f1"].method == "bootstrap"
    assert gain["f1"].low > 0
    assert gain["exact_match"].method == "newcombe"
    assert gains(base, base, task, "answers")["f1"] == Interval(0.0, 0.0, 0.0, "bootstrap")
    with pytest.raises(ValueError, match="same examples"):
        gains(ours[1:], base, task, "answers")


def test_corpus_metrics_resample_sentences():
    task = task_option("iwslt2017")
    right = "The cat sat on the mat and the dog lay on the floor."
    rows = rows_of(task, [(right if i % 3 else "A dog ran.", (right,)) for i in range(30)])
    metrics = summarise(rows, task, "answers")
    for metric in ("bleu", "chrf"):
        assert metrics[metric].method == "bootstrap"
        assert 0 < metrics[metric].low < metrics[metric].value < metrics[metric].high <= 1
    gain = gains(rows, rows_of(task, [("A dog ran.", (right,))] * 30), task, "answers")
    assert gain["bleu"].low > 0
    # What a file of scores keeps is enough to compute the score again.
    again = json.loads(json.dumps([row.to_json() for row in rows]))
    assert task.total("bleu", [row["scores"]["bleu"] for row in again]) == metrics["bleu"].value


def test_nothing_that_is_scored_is_left_out():
    scorer = tiny_scorer("task=iwslt2017", "task.max_new_tokens=8", context=40)
    examples = [Example("a", "German: x\nEnglish:", " y", (" y",)), Example("b", "x" * 60, " y", (" y",))]
    with pytest.raises(UserError, match=r"row b has a prompt of 60 tokens .*task\.max_new_tokens"):
        scorer.rows(examples, "test", "answers")
    assert len(scorer.rows(examples[:1], "test", "answers")) == 1


def test_a_shortened_prompt_is_scored_marked_and_shown():
    scorer = tiny_scorer("task=dialogsum", "task.max_new_tokens=8", context=120)
    dialogue = " ".join(f"word{i}" for i in range(60))
    row = {"id": "test_0_1", "dialogue": dialogue, "summary": "many words"}
    example = scorer.task.example(DataRow("here", row), "test_0")
    (prediction,) = scorer.rows([example], "test", "answers")
    assert prediction.shortened
    assert prediction.prompt.endswith("\n\nSummary:")
    assert len(scorer.encoder.prompt(prediction.prompt)) <= 112
    assert prediction.references == [" many words"]


@pytest.mark.parametrize(("kind", "other_kind"), [("answers", "losses"), ("losses", "answers")])
def test_the_base_model_is_scored_once_for_a_protocol(tmp_path, monkeypatch, kind, other_kind):
    scorer = tiny_scorer("task=squad", "task.max_new_tokens=4", f"outputs={tmp_path}")
    row = {"context": "Rome is old.", "question": "What is old?", "answers": {"text": ["Rome"], "answer_start": [0]}}
    examples = [scorer.task.example(DataRow("here", row), "0")]
    folder = RunFolder(tmp_path / "run")
    storage.write_bytes(folder.adapter / DESCRIPTION, b"{}")

    def score(scorer, examples=examples, kinds=(kind,)):
        scorer.score_split("test", examples, folder, Wanted(kinds))

    # Answers and losses have files of their own.
    score(scorer, kinds=(other_kind, kind))
    first = rows_of_run(folder, "test", kind, base=True)
    assert len(list((tmp_path / "base").glob("*.jsonl"))) == 2
    compute = Scorer.rows

    def adapted_only(self, examples, title, kind, base=False):
        return pytest.fail("scored again") if base else compute(self, examples, title, kind)

    monkeypatch.setattr(Scorer, "rows", adapted_only)
    score(scorer)
    assert rows_of_run(folder, "test", kind, base=True) == first
    # Another adapter does not matter; another model, other rows or another protocol does.
    other = replace(scorer, arm=attach(tiny("tiny_llama").model, "Tuv"))
    score(other)
    with pytest.raises(pytest.fail.Exception):
        score(replace(scorer, base=replace(scorer.base, digest="other")))
    for changed in (replace(examples[0], prompt="Other?"), replace(examples[0], target=" other")):
        with pytest.raises(pytest.fail.Exception):
            score(scorer, [changed])
    with monkeypatch.context() as patch:
        patch.setattr(device, "processor_name", lambda: "another processor, which rounds otherwise")
        with pytest.raises(pytest.fail.Exception):
            score(scorer)
    train = replace(scorer.config.train, dtype="float16")
    with pytest.raises(pytest.fail.Exception):
        score(replace(scorer, config=replace(scorer.config, train=train)))
    for change in ({"stop": ["."]}, {"max_new_tokens": 3}, {"options": {"use_stemmer": True}}):
        task = replace(scorer.config.task, **change)
        with pytest.raises(pytest.fail.Exception):
            score(replace(scorer, config=replace(scorer.config, task=task)))
    fewer = replace(scorer.config.score, batch_tokens=99)
    with pytest.raises(pytest.fail.Exception):
        score(replace(scorer, config=replace(scorer.config, score=fewer)))
    of_kind = {"context": 99} if kind == "losses" else {"more_ends": (3,)}
    for name, value in {"prompt_limit": 7, "leaves_out_blank": True, **of_kind}.items():
        encoder = copy(scorer.encoder)
        setattr(encoder, name, value)
        with pytest.raises(pytest.fail.Exception):
            score(replace(scorer, encoder=encoder))


def test_choices_are_kept_with_their_likelihoods():
    scorer = tiny_scorer("task=hellaswag")
    choices = (" one.", " two.", " three.", " four.")
    examples = [Example(str(i), f"Cooking: He {i}", choices[i], (str(i),), choices) for i in range(3)]
    rows = scorer.rows(examples, "test", "answers")
    assert [len(batch) for batch in scorer.batches(examples, "answers")] == [1, 1, 1], "of four choices each"
    for row, example in zip(rows, examples, strict=True):
        assert row.scores == scorer.task.score(row.log_likelihoods, example)
        assert row.output == choices[max(range(4), key=lambda i: row.log_likelihoods[i])]
        assert row.ended == "choice"
