"""The test rows are read before a run or a staged sweep trains, and those that were trained are named."""

import pytest
from helpers.sweeping import search_options
from helpers.task_rows import write
from helpers.tiny import folder_of, rows_of, score_more

from tiedlora.config.compose import compose_config
from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import loading, run
from tiedlora.sweeps import staged
from tiedlora.sweeps.expand import compose_sweep
from tiedlora.training.distributed import ALONE

SAID = "task=gsm8k: 12 test rows are also training rows (such as id "


@pytest.fixture
def data(tmp_path):
    """A folder with training rows, 12 of which stay when 8 are taken for validation; `test` adds the test rows."""
    rows = [{"question": f"What is {i}?", "answer": f"{i}\n#### {i}"} for i in range(30)]
    write(tmp_path / "data", "gsm8k", *rows, split="more")
    return write(tmp_path / "data", "gsm8k", *rows[:20], split="train").parent


@pytest.fixture
def words(tiny_run, data):
    more = ("task.validation_from_train=8", "task.rows.test=null", f"data_root={data.parent}", "score.splits=[test]")
    return lambda *others: tiny_run(*more, *others, task="gsm8k")


def test_test_rows_are_read_first_and_those_that_are_trained_are_named(words, data, tmp_path, caplog):
    config = compose_config(words())
    with pytest.raises(UserError, match=r"test\.jsonl: no such file"):
        run.main(config)
    assert not (tmp_path / "outputs").exists()
    (data / "more.jsonl").rename(data / "test.jsonl")
    run.main(config)
    assert SAID in caplog.text


def test_those_that_are_trained_are_named_too_when_a_finished_run_is_scored(words, data, tmp_path, caplog):
    run.main(compose_config([*words(), "score.splits=[]"]))
    (data / "more.jsonl").rename(data / "test.jsonl")
    (path,) = (tmp_path / "outputs").glob("TABuv-*")
    more = {"data_root": str(data.parent), "splits": ["test"], "metrics": ["target_loss"]}
    score_more(RunFolder(path), **more)
    assert SAID in caplog.text
    (data / "train.jsonl").rename(data / "elsewhere.jsonl")
    (losses,) = score_more(RunFolder(path), **more, again=True).of("test")
    assert losses.rows == 30
    assert "the test rows are not compared with the training rows: " in caplog.text


def test_a_finished_run_scores_the_rows_that_the_present_command_names(words, data):
    run.main(compose_config([*words(), "score.splits=[]"]))
    (data / "more.jsonl").rename(data / "test.jsonl")
    data.rename(data.parent / "mine")
    config = compose_config(words("task.folder=mine"))
    run.main(config)
    assert len(rows_of(folder_of(config), "test")) == 30


def test_a_staged_sweep_launches_nothing_without_the_rows_that_it_will_score(words):
    sweep = compose_sweep(words("train.lr=1e-3,1e-2", "score.base=false"))
    launched = []
    with pytest.raises(UserError, match=r"test\.jsonl: no such file"):
        staged.run_staged(sweep, search_options(rungs=[0.25]), lambda cells, _first_job: launched.extend(cells))
    assert launched == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["task.max_new_tokens=6"], "8 of 8 validation targets are longer than task.max_new_tokens=6"),
        (["task.max_new_tokens=60"], ""),
        (["task.max_new_tokens=6", "score.metrics=[target_loss]"], ""),
    ],
)
def test_targets_that_no_answer_can_equal_are_counted(more, said, words, caplog):
    loading.load(compose_config(words(*more, "score.splits=[validation]")), ALONE).release()
    assert said in caplog.text
    assert ("are longer than" in caplog.text) == bool(said)
