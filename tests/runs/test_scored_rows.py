"""The rows that a run scores are read before it trains."""

import json

import pytest

from tiedlora.config.compose import compose_config
from tiedlora.errors import UserError
from tiedlora.runs import run


def test_test_rows_are_read_first_and_those_that_are_trained_are_named(tiny_run, tmp_path, caplog):
    data = tmp_path / "data" / "gsm8k"
    data.mkdir(parents=True)
    lines = [json.dumps({"question": f"What is {i}?", "answer": f"{i}\n#### {i}"}) + "\n" for i in range(30)]
    (data / "train.jsonl").write_text("".join(lines[:20]))
    more = ("task.validation_from_train=8", "task.rows.test=null", f"data_root={tmp_path}/data", "score.splits=[test]")
    config = compose_config(tiny_run(*more, task="gsm8k"))
    with pytest.raises(UserError, match=r"test\.jsonl: no such file"):
        run.main(config)
    assert not (tmp_path / "outputs").exists()
    (data / "test.jsonl").write_text("".join(lines))
    run.main(config)
    assert "task=gsm8k: 12 test rows are also training rows (such as id " in caplog.text
