"""One good row of each task that reads rows, and functions for such rows."""

import functools
import json
from pathlib import Path

from helpers.tiny import task_option as compose_task

from tiedlora.tasks import Example
from tiedlora.tasks.rows import DataRow

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
WORDS = ("task=rows", 'task.prompt="{text}\\nTopic:"', 'task.target=" {topic}"', "task.metrics=[exact_match]")
"""A command on rows of one's own, without its files."""
TINY = ("model=tiny_llama", "train=tiny", "train.threads=1")
SENTINEL = "\u2603 sentinel 12345"
RELABELLED = {
    # Other values of the target fields, with which each row is still valid.
    "gsm8k": {"answer": f"{SENTINEL}\n#### 99"},
    "squad": {"answers": {"text": ["Rome"], "answer_start": [0]}},
    "hellaswag": {"label": "1"},
    "dialogsum": {"summary": SENTINEL},
    "iwslt2017": {"translation": {"de": "Vielen Dank.", "en": SENTINEL}},
}


def write(root: Path, kind: str, *rows: dict | str | bytes, split: str = "test") -> Path:
    """Write rows as the file of a task's split. A text or bytes are written unchanged."""
    path = root / kind / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        text = json.dumps(row) if isinstance(row, dict) else row
        lines.append(text.encode() if isinstance(text, str) else text)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def one_example(kind: str, row: dict, *overrides: str) -> Example:
    """The example of one row of a task."""
    return task_option(kind, *overrides).example(DataRow("here", row), "0")
