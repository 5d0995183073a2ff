"""One good row of each task that reads rows, and functions for such rows."""

import functools
import json
import random
from pathlib import Path

import pytest
from helpers.tiny import task_option as compose_task

from tiedlora.config.project import PROJECT
from tiedlora.tasks import Example
from tiedlora.tasks.rows import DataRow

DATA = PROJECT.parent / "shared" / "data"
needs_rows = pytest.mark.skipif(not DATA.is_dir(), reason="real rows are looked for in ../shared/data, never committed")

# A task keeps no state but its own rows.
task_option = functools.cache(compose_task)

FIVE = ("gsm8k", "squad", "hellaswag", "dialogsum", "iwslt2017")
GOOD = {
    "gsm8k": {"question": "How many?", "answer": "2 and 3 are <<2+3=5>>5\n#### 5"},
    "squad": {
        "id": "q1",
        "title": "Rome",
        "context": "Rome was founded in 753 BC by Romulus.",
        "question": "Who founded Rome?",
        "answers": {"text": ["Romulus", "by Romulus"], "answer_start": [30, 27]},
    },
    "hellaswag": {
        "ind": 7,
        "activity_label": "Cooking",
        "ctx_a": "A man cuts an onion.",
        "ctx_b": "he",
        "ctx": "A man cuts an onion. he",
        "endings": ["cries.", "sings.", "eats it.", "cuts a second onion."],
        "source_id": "activitynet~v_1",
        "split": "val",
        "split_type": "indomain",
        "label": "0",
    },
    "dialogsum": {"id": "train_1", "dialogue": "#Person1#: Hi.", "summary": "#Person1# greets.", "topic": "greeting"},
    "iwslt2017": {"translation": {"de": "Vielen Dank.", "en": "Thank you."}},
}
SENTINEL = "\u2603 sentinel 12345"


def relabelled(kind: str, row: dict) -> dict:
    """The row with other target fields. It is still a valid row of the task."""
    row = json.loads(json.dumps(row))
    if kind == "gsm8k":
        row["answer"] = f"{SENTINEL}\n#### 99"
    elif kind == "squad":
        first = row["context"].split()[0]
        row["answers"] = {"text": [first], "answer_start": [row["context"].index(first)]}
    elif kind == "hellaswag":
        row["label"] = str((int(row["label"]) + 1) % 4)
    elif kind == "dialogsum":
        row["summary"] = SENTINEL
    else:
        row["translation"]["en"] = SENTINEL
    return row


def write(root: Path, kind: str, *rows: dict | str | bytes, split: str = "test") -> Path:
    """Write rows as the file of a task's split. A text or bytes are written unchanged."""
    path = root / kind / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def real_rows(kind: str, split: str, count: int) -> list[dict]:
    """A seeded sample of the real rows of a split."""
    lines = (DATA / kind / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in random.Random(0).sample(lines, count)]


def one_example(kind: str, row: dict, *overrides: str) -> Example:
    """The example of one row of a task."""
    return task_option(kind, *overrides).example(DataRow("here", row), "0")
