"""The loss of targets as a score: as transformers computes it, whatever shares a batch, with intervals in nats."""

from dataclasses import replace

import pytest
import torch
from helpers.hostile import snapshot
from helpers.tiny import randomise, task_option, tiny_scorer

from tiedlora import storage
from tiedlora.analysis.metrics import gains, summarise
from tiedlora.description import DESCRIPTION
from tiedlora.errors import UserError
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import LARGEST_LOSS, LOSS_METRICS, TARGET_LOSS, TARGET_LOSS_BY_TOKEN, loss_scores
from tiedlora.records.rows import PredictionRow
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_run_scores
from tiedlora.scoring.wanted import Wanted, missing_scores, wanted_scores
from tiedlora.tasks import Example

EXAMPLES = [Example(str(i), f"Add {'1 and ' * (i * 3 % 5)}2:", f" {'9' * (1 + i * 5 % 7)}", ("9",)) for i in range(9)]


def gsm8k_scorer(*overrides, **more):
    return tiny_scorer("task=gsm8k", "task.max_new_tokens=4", *overrides, **more)


def transformers_loss(scorer, prompt, target):
    """The mean loss of one row as transformers computes it: labels are -100 in the prompt."""
    tokenizer = scorer.encoder.tokenizer
    tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, target)]
    tokens[1].append(tokenizer.eos_token_id)
    ids, labels = torch.tensor([tokens[0] + tokens[1]]), torch.tensor([[-100] * len(tokens[0]) + tokens[1]])
    with torch.no_grad():
        return float(scorer.arm.model(input_ids=ids, labels=labels).loss), len(tokens[1])


@pytest.mark.parametrize("limits", [["score.batch_size=1"], ["score.batch_size=4"], ["score.batch_tokens=64"]])
def test_a_rows_loss_is_that_of_transformers_whatever_shares_its_batch(limits):
    scorer = gsm8k_scorer(*limits)
    randomise(scorer.arm.adapter, scale=0.2)
    rows = scorer.rows(EXAMPLES, "test", "losses")
    assert [row.id for row in rows] == [example.id for example in EXAMPLES]
    for row, example in zip(rows, EXAMPLES, strict=True):
        mean, tokens = transformers_loss(scorer, example.prompt, example.target)
        assert row.scores[TARGET_LOSS] == pytest.approx(mean, rel=1e-5)
        assert row.scores[TARGET_LOSS_BY_TOKEN] == pytest.approx([mean * tokens, tokens], rel=1e-5)
        assert (row.output, row.output_tokens, row.ended) == ("", 0, "")
    batches = scorer.batches(EXAMPLES, "losses")
    assert sorted(number for batch in batches for number in batch) == list(range(len(EXAMPLES)))


def test_a_target_that_does_not_fit_loses_its_end_and_is_counted(tmp_path):
    scorer = gsm8k_scorer(f"outputs={tmp_path}", context=24)
    long = Example("long", "Add 2 and 7 to 1:", " 10 is the answer\n#### 10", ("10",))
    rows = scorer.rows([long, replace(long, target=" 10")], "test", "losses")
    assert [row.cut_target for row in rows] == [True, False]
    # The tiny tokenizer has one token a byte. The end-of-text token is not among the tokens that fit.
    assert rows[0].scores[TARGET_LOSS_BY_TOKEN][1] == 24 - len(long.prompt)
    folder = RunFolder(tmp_path / "run")
    storage.write_bytes(folder.adapter / DESCRIPTION, b"{}")
    scorer.score_split("test", [long], folder, wanted_scores(None, scorer.task))
    answers, losses = read_run_scores(folder).of("test")
    assert (answers.cut_targets, losses.cut_targets) == (0, 1)
    assert list(losses.metrics) == list(LOSS_METRICS)


def test_rows_without_a_target_have_no_loss(tmp_path):
    scorer = gsm8k_scorer(f"outputs={tmp_path}")
    examples = [EXAMPLES[0], replace(EXAMPLES[1], target="")]
    folder = RunFolder(tmp_path / "run")
    storage.write_bytes(folder.adapter / DESCRIPTION, b"{}")
    scorer.score_split("test", examples, folder, wanted_scores(None, scorer.task))
    (answers,) = read_run_scores(folder).of("test")
    assert set(answers.metrics) == set(scorer.task.metrics)
    assert not answers.has_targets
    # Nothing is missing: null asks for the losses of rows that have targets.
    assert missing_scores(replace(scorer.config.score, splits=["test"]), folder) == {}
    before = snapshot(tmp_path)
    for wanted in (wanted_scores([TARGET_LOSS], scorer.task), wanted_scores(None, scorer.task, drift=True)):
        with pytest.raises(UserError, match=r"^score\.metrics: row 1 has no target, so these rows have no loss and no"):
            scorer.score_split("test", examples, folder, wanted)
    assert snapshot(tmp_path) == before


def test_losses_are_missing_where_rows_have_targets(tmp_path):
    scorer = gsm8k_scorer(f"outputs={tmp_path}")
    folder, score = RunFolder(tmp_path / "run"), replace(scorer.config.score, splits=["test"])
    storage.write_bytes(folder.adapter / DESCRIPTION, b"{}")
    assert missing_scores(score, folder) == {"test": Wanted(("answers", "losses"))}
    scorer.score_split("test", EXAMPLES[:2], folder, Wanted(("answers",)))
    assert missing_scores(score, folder) == {"test": Wanted(("losses",))}
    assert missing_scores(replace(score, metrics=["exact_match_strict"]), folder) == {}
    scorer.score_split("test", EXAMPLES[:2], folder, Wanted(("losses",)))
    assert missing_scores(score, folder) == {}


def rows_with(losses):
    """Rows of losses. Every loss is over four tokens."""
    return [PredictionRow(str(i), "", [], loss_scores(4 * loss, 4)) for i, loss in enumerate(losses)]


def test_a_loss_is_never_a_proportion():
    task = task_option("gsm8k")
    adapted, base = rows_with([0.0, 1.0, 1.0]), rows_with([1.0, 1.0, 0.0])
    for interval in (*summarise(adapted, task, "losses").values(), *gains(adapted, base, task, "losses").values()):
        assert interval.method == "bootstrap"
    nats = summarise(rows_with([2.0, 3.0, 7.0, 8.0]), task, "losses")[TARGET_LOSS]
    assert 2 <= nats.low < nats.value < nats.high <= 8
    assert nats.value == 5
    # One row says nothing about other rows.
    (one, by_token) = gains(rows_with([2.5]), rows_with([3.0]), task, "losses").values()
    assert one == by_token == Interval(-0.5, -LARGEST_LOSS, LARGEST_LOSS, "bootstrap")
    rows = rows_with([1.0, 2.0])
    rows[1] = replace(rows[1], scores=loss_scores(24.0, 12))
    metrics = summarise(rows, task, "losses")
    assert metrics[TARGET_LOSS].value == 1.5
    assert metrics[TARGET_LOSS_BY_TOKEN].value == (4 + 24) / (4 + 12)
