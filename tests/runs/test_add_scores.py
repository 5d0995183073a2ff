"""More scores of a finished run: the loss of its targets is added, and what is recorded stays as it was."""

import json

import pytest
import torch
from helpers.hostile import change_rows, put
from helpers.tiny import folder_of, score_more

from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import LOSS_METRICS, TARGET_LOSS, TARGET_LOSS_BY_TOKEN, loss_scores
from tiedlora.records.rows import NOT_GENERATED, read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import add_scores, run, verify
from tiedlora.scoring.split import Scorer

OWN = ["exact_match_strict", "exact_match_flexible"]


@pytest.fixture
def config(finished_run, tiny_config):
    """Composes a run that is finished, and has only the task's own metrics. Its batches are smaller than its splits."""
    words = ("score.batch_size=4", "score.metrics=[exact_match_strict]")
    finished_run(*words)
    return lambda *more: tiny_config(words[0], *more)


def scores_of(folder: RunFolder, name: str = "validation") -> list[dict]:
    """The JSON objects of a predictions file, without the losses."""
    rows = [json.loads(line) for line in folder.predictions_file(name).read_text().splitlines()]
    return [{**row, "scores": {k: v for k, v in row["scores"].items() if k not in LOSS_METRICS}} for row in rows]


def wrong(folder: RunFolder, rows: int = 100) -> list[str]:
    return [f"{f.check}: {f.explanation}" for f in verify.verify(folder.path, rows=rows) if f.ok is False]


def test_more_scores_are_computed_with_the_threads_of_the_run(config):
    """As in a new process of a sweep's launcher, which has trained nothing before."""
    torch.set_num_threads(2)
    run.main(config("score.splits=[test]"))
    assert torch.get_num_threads() == 1


def test_a_run_without_losses_is_finished_until_they_are_asked_for(config, monkeypatch):
    """The default adds nothing to a finished run, and never asks a model."""
    folder = folder_of(config())
    before = folder.result_file.read_bytes()
    monkeypatch.setattr(add_scores, "add_scores", lambda *_, **__: pytest.fail("scored"))
    run.main(config())
    run.main(config("score.metrics=[exact_match_flexible]"))
    assert folder.result_file.read_bytes() == before
    with pytest.raises(pytest.fail.Exception):
        run.main(config("score.metrics=[target_loss]"))


@pytest.mark.parametrize("how", ["train.py", "score.py"])
def test_the_loss_is_added_and_the_rest_stays(config, how, script, monkeypatch):
    folder = folder_of(config())
    before, rows, base_rows = folder.record(), scores_of(folder), scores_of(folder, "validation.base")
    monkeypatch.setattr(Scorer, "answers", lambda *_: pytest.fail("asked for answers"))
    if how == "train.py":
        run.main(config("score.metrics=[target_loss]"))
    else:
        command = ["scripts/score.py", folder.path, "--split", "validation", "--metrics", "target_loss"]
        code, out, err = script(*command)
        assert code == 0, err
        assert "target_loss " in out
    after = folder.record()
    now, then = after.scores["validation"], before.scores["validation"]
    assert list(now.metrics) == list(now.base) == list(now.gain) == [*OWN, *LOSS_METRICS]
    for kind in ("metrics", "base", "gain"):
        assert {name: getattr(now, kind)[name] for name in OWN} == getattr(then, kind)
    assert (now.first_metric, now.seconds, now.signatures) == (OWN[0], then.seconds, then.signatures)
    assert now.gain[TARGET_LOSS].value == pytest.approx(now.metrics[TARGET_LOSS].value - now.base[TARGET_LOSS].value)
    assert scores_of(folder) == rows
    assert scores_of(folder, "validation.base") == base_rows
    assert after.to_json() | {"scores": 0} == before.to_json() | {"scores": 0}
    monkeypatch.undo()
    assert not wrong(folder)


def test_a_split_of_losses_alone_has_no_answers_until_they_are_asked_for(config, monkeypatch):
    folder = folder_of(config())
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "answers", lambda *_: pytest.fail("asked for answers"))
        run.main(config("score.metrics=[target_loss_by_token]", "score.splits=[test]"))
    losses = folder.record().scores["test"]
    assert list(losses.metrics) == list(LOSS_METRICS)
    assert {(r.output, r.ended) for r in read_predictions(folder.predictions_file("test"))} == {("", NOT_GENERATED)}
    assert not wrong(folder)
    run.main(config("score.splits=[test]"))
    both = folder.record().scores["test"]
    assert list(both.metrics) == [*OWN, *LOSS_METRICS]
    assert {name: both.metrics[name] for name in LOSS_METRICS} == losses.metrics
    assert all(row.has_answer for row in read_predictions(folder.predictions_file("test")))
    assert not wrong(folder)


def test_the_loss_of_other_rows_is_not_added(config, caplog):
    folder = folder_of(config())
    put(folder.path, "data.train.digest", "0" * 64)
    score_more(folder, splits=["test"])
    assert "the training rows here are not those of the run" in caplog.text
    put(folder.path, "scores.validation.digest", "0" * 64)
    with pytest.raises(UserError, match="validation was scored on other rows"):
        score_more(folder, metrics=[TARGET_LOSS])
    # Scored again as a whole, the split has one set of rows.
    scores = score_more(folder, again=True, metrics=None).scores["validation"]
    assert list(scores.metrics) == [*OWN, *LOSS_METRICS]


def test_a_changed_loss_is_named_by_its_row(config):
    folder = folder_of(config())
    score_more(folder, metrics=[TARGET_LOSS])
    path = folder.predictions_file("validation")
    name = read_predictions(path)[3].id
    change_rows(path, lambda row: row["scores"].update({TARGET_LOSS: row["scores"][TARGET_LOSS] - 0.5}), [3])
    found = "\n".join(wrong(folder, rows=0))
    assert f"predictions validation: row {name}: its output and its loss score" in found
    # Consistent with each other, but not what the model computes.
    total, tokens = read_predictions(path)[3].scores[TARGET_LOSS_BY_TOKEN]
    change_rows(path, lambda row: row["scores"].update(loss_scores(total - 0.5 * tokens, int(tokens))), [3])
    found = "\n".join(wrong(folder))
    assert f"losses validation: row {name}: now [" in found
    assert "predictions validation: scores.validation.metrics.target_loss.value is " in found
