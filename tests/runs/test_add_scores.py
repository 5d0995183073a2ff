"""More scores of a finished run: each is a new file, and every file that is there stays as it is."""

import shutil

import pytest
import torch
from helpers.hostile import change_rows, put, put_in_scores, snapshot
from helpers.tiny import folder_of, little_memory, rows_of, score_more

from tiedlora.errors import UserError
from tiedlora.models import device
from tiedlora.records.loss_metrics import LOSS_METRICS, TARGET_LOSS, TARGET_LOSS_BY_TOKEN, loss_scores
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_run_scores
from tiedlora.runs import add_scores, run, verify
from tiedlora.scoring import split as scoring
from tiedlora.scoring.split import Scorer

OWN = ["exact_match_strict", "exact_match_flexible"]


@pytest.fixture
def config(finished_run, tiny_config):
    """Composes a run that is finished, and has only the task's own metrics. Its batches are smaller than its splits."""
    words = ("score.batch_size=4", "score.metrics=[exact_match_strict]")
    finished_run(*words)
    return lambda *more: tiny_config(words[0], *more)


def wrong(folder: RunFolder, rows: int = 100) -> list[str]:
    findings = verify.verify(folder.path, rows=rows)
    return [f"{finding.check}: {finding.explanation}" for finding in findings if finding.ok is False]


def only_losses(_self, _model, _examples, _title):
    pytest.fail("asked for answers")


def test_more_scores_are_computed_with_the_threads_of_the_run(config):
    """As in a new process of a sweep's launcher, which has trained nothing before."""
    torch.set_num_threads(2)
    run.main(config("score.splits=[test]"))
    assert torch.get_num_threads() == 1


def test_all_metrics_of_a_kind_are_scored_together_and_the_losses_are_asked_for_by_default(config, monkeypatch):
    folder = folder_of(config())
    before = snapshot(folder.path.parent)
    monkeypatch.setattr(add_scores, "add_scores", lambda *_, **__: pytest.fail("scored"))
    run.main(config("score.metrics=[exact_match_flexible]"))
    assert snapshot(folder.path.parent) == before
    for words in ("score.metrics=[target_loss]", "score.metrics=null"):
        with pytest.raises(pytest.fail.Exception):
            run.main(config(words))


@pytest.mark.parametrize("how", ["train.py", "score.py"])
def test_an_added_score_is_a_new_file_and_every_other_stays(config, how, script, monkeypatch):
    folder = folder_of(config())
    before = snapshot(folder.path.parent)
    monkeypatch.setattr(Scorer, "answers", only_losses)
    if how == "train.py":
        run.main(config("score.metrics=[target_loss]"))
    else:
        command = ["scripts/score.py", folder.path, "--split", "validation", "--metrics", "target_loss"]
        code, out, err = script(*command)
        assert code == 0, err
        assert "target_loss " in out
    after = snapshot(folder.path.parent)
    answers, losses = read_run_scores(folder).of("validation")
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before and not name.endswith(".lock")} == {
        f"{folder.path.name}/scores/validation.losses.jsonl",
        f"base/{losses.base}.jsonl",
    }
    assert (list(answers.metrics), list(losses.metrics)) == (OWN, list(LOSS_METRICS))
    base = read_run_scores(folder).base_metrics("validation")
    assert losses.gain[TARGET_LOSS].value == pytest.approx(losses.metrics[TARGET_LOSS].value - base[TARGET_LOSS].value)
    monkeypatch.undo()
    assert not wrong(folder)


def test_a_split_of_losses_alone_has_no_answers_until_they_are_asked_for(config, monkeypatch):
    folder = folder_of(config())
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "answers", only_losses)
        run.main(config("score.metrics=[target_loss_by_token]", "score.splits=[test]"))
    (losses,) = read_run_scores(folder).of("test")
    assert list(losses.metrics) == list(LOSS_METRICS)
    assert {(row.output, row.ended) for row in rows_of(folder, "test", "losses")} == {("", "")}
    assert not wrong(folder)
    run.main(config("score.splits=[test]"))
    assert read_run_scores(folder).of("test")[1] == losses
    assert list(read_run_scores(folder).metrics("test")) == [*OWN, *LOSS_METRICS]
    assert all(row.ended for row in rows_of(folder, "test"))
    assert not wrong(folder)


def test_losses_that_are_added_in_halved_batches_say_so_and_the_answers_stay(config, monkeypatch):
    folder = folder_of(config())
    (before,) = read_run_scores(folder).of("validation")
    compute = scoring.row_losses

    def limited(model, batch):
        if len(batch.rows) > 2:
            raise MemoryError
        return compute(model, batch)

    monkeypatch.setattr(scoring, "row_losses", limited)
    score_more(folder, metrics=[TARGET_LOSS])
    answers, losses = read_run_scores(folder).of("validation")
    assert (answers, losses.batch_halvings) == (before, 1)
    assert not wrong(folder), "the losses are checked in batches of the same size, which fit"


def test_scores_of_other_rows_are_not_added(config, caplog):
    folder = folder_of(config())
    put(folder.path, "data.train.digest", "0" * 64)
    score_more(folder, splits=["test"])
    assert "the training rows here are not those of the run" in caplog.text
    put_in_scores(folder.scores_file("validation", "answers"), "digest", "0" * 64)
    before = snapshot(folder.path.parent)
    with pytest.raises(UserError, match=r"its answers of validation are of other rows .* with --again"):
        score_more(folder, metrics=[TARGET_LOSS])
    assert snapshot(folder.path.parent) == before
    # Scored again as a whole, the split has one set of rows.
    answers, losses = score_more(folder, again=True, metrics=None).of("validation")
    assert answers.digest == losses.digest != "0" * 64


def test_two_runs_share_the_file_of_the_base_model(config, tiny_config, monkeypatch):
    folder = folder_of(config())
    before = snapshot(folder.path.parent / "base")
    other = tiny_config("score.batch_size=4", "score.metrics=[exact_match_strict]", "seed=1")
    sizes = little_memory(monkeypatch, rows=4)
    run.main(other)
    assert sizes == [4] * 3, "the adapted model alone was asked"
    assert snapshot(folder.path.parent / "base") == before
    (ours,), (theirs,) = (read_run_scores(each).of("validation") for each in (folder, folder_of(other)))
    assert ours.base == theirs.base
    assert ours.gain.keys() == theirs.gain.keys() == set(OWN)


def test_a_finished_run_of_an_earlier_version_counts_as_trained_and_is_scored_again(config, monkeypatch):
    """Its record held the scores, and their rows were in predictions/."""
    folder = folder_of(config())
    rows = rows_of(folder, "validation")
    put(folder.path, "scores", {"validation": {"metrics": {}, "files": {"predictions/validation.jsonl": "0" * 64}}})
    put(folder.path, "left_out", None)
    folder.scores.rename(folder.path / "predictions")
    before = snapshot(folder.path)
    monkeypatch.setattr("tiedlora.runs.trainer.Training.train", lambda *_: pytest.fail("trained again"))
    run.main(config("score.metrics=[exact_match_strict]"))
    after = snapshot(folder.path)
    assert {name: after[name] for name in before} == before
    assert rows_of(folder, "validation") == rows


def test_what_another_process_scores_while_this_one_waits_is_not_scored_again(config, tmp_path):
    folder = folder_of(config())
    other = RunFolder(tmp_path / "other" / folder.path.name)
    shutil.copytree(folder.path.parent, other.path.parent)
    score_more(other, metrics=[TARGET_LOSS])

    class Waiting(RunFolder):
        """The other process has the lock first."""

        def locked(self, *patience):
            shutil.copytree(other.path.parent, folder.path.parent, dirs_exist_ok=True)
            return super().locked(*patience)

    score_more(Waiting(folder.path), metrics=[TARGET_LOSS])
    assert snapshot(folder.path.parent) == snapshot(other.path.parent)


def test_without_a_base_there_is_no_gain_and_no_file_of_it(config):
    folder = folder_of(config())
    before = snapshot(folder.path.parent / "base")
    scores = score_more(folder, splits=["test"], metrics=None, base=False)
    assert snapshot(folder.path.parent / "base") == before
    assert [record.gain for record in scores.of("test")] == [{}, {}]
    assert scores.base_metrics("test") == scores.gains("test") == {}
    assert not wrong(folder)


def test_scores_that_are_made_again_have_their_base_also_if_the_run_had_none(config, script, capsys):
    run.main(config("score.base=false", "score.splits=[test]"))
    folder = folder_of(config())
    run.main(config("score.splits=[test]"))
    assert "its base model was not scored on test (score.base=false)" in capsys.readouterr().out
    assert not read_run_scores(folder).base_metrics("test")
    assert script("scripts/score.py", folder.path, "--split", "test", "--metrics", TARGET_LOSS, "--again")[0] == 0
    assert set(read_run_scores(folder).base_metrics("test")) == {TARGET_LOSS, TARGET_LOSS_BY_TOKEN}


def test_the_place_of_added_scores_is_that_of_their_process(config, monkeypatch):
    folder = folder_of(config())
    (before,) = read_run_scores(folder).of("validation")
    monkeypatch.setattr(device, "processor_name", lambda: "another processor")
    answers, losses = score_more(folder, metrics=[TARGET_LOSS]).of("validation")
    assert answers.execution == before.execution == folder.record().execution
    assert losses.execution.processor == "another processor"


def test_a_changed_loss_is_named_by_its_row(config):
    folder = folder_of(config())
    score_more(folder, metrics=[TARGET_LOSS])
    path = folder.scores_file("validation", "losses")
    name = rows_of(folder, "validation", "losses")[3].id
    change_rows(path, lambda row: row["scores"].update({TARGET_LOSS: row["scores"][TARGET_LOSS] - 0.5}), [3])
    found = "\n".join(wrong(folder, rows=0))
    assert f"scores validation.losses: row {name}: its output or its loss scores" in found
    # Consistent with each other, but not what the model computes.
    total, tokens = rows_of(folder, "validation", "losses")[3].scores[TARGET_LOSS_BY_TOKEN]
    change_rows(path, lambda row: row["scores"].update(loss_scores(total - 0.5 * tokens, int(tokens))), [3])
    found = "\n".join(wrong(folder))
    assert f"regenerate validation.losses: row {name}: now [" in found
    assert "scores validation.losses: scores/validation.losses.metrics.target_loss.value is " in found
