"""How many test rows the tasks of a sweep have, before anything is run."""

from __future__ import annotations

from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.tasks import load_examples, load_task

HUB_ROWS = {
    ("openai/gsm8k", "test"): 1_319,
    ("rajpurkar/squad", "validation"): 10_570,
    ("rajpurkar/squad", "validation[2000:]"): 8_570,
    ("Rowan/hellaswag", "validation"): 10_042,
    ("Rowan/hellaswag", "validation[2000:]"): 8_042,
    ("knkarthick/dialogsum", "test"): 500,
    ("IWSLT/iwslt2017", "tst2010+tst2011+tst2012+tst2013+tst2014+tst2015"): 8_079,
}
"""(data set, split) -> its examples, as the hub's pages of the data sets say. DialogSum's 1,500 rows are 500 dialogues
with three summaries each."""


def test_rows(config: Config) -> int | None:
    """How many test rows the runs of a configuration will be scored on; None if this is not known here.

    Nothing is downloaded. Rows that are generated or read from data_root are counted.
    """
    task = config.task
    if task.rows.test is not None:
        return task.rows.test
    if config.data_root is None and not load_task(task).generator:
        return HUB_ROWS.get((str(task.hub.id), task.hub.splits.get("test", "")))
    try:
        return len(load_examples(load_task(task), "test", config.data_root))
    except UserError:
        # A plan does not need the rows. The sweep itself reports the error.
        return None
