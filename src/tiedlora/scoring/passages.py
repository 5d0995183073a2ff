"""The neutral text whose loss measures forgetting: passages of a text file, of another task, or of the hub.

A passage is an example whose every token after the first is a target. It imports no torch, because a finished run's
passages are checked without it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tiedlora import storage
from tiedlora.config.check import HUB_TEXT, TASK_TEXT, check_forgetting
from tiedlora.config.compose import task_option
from tiedlora.config.explain import options
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.tasks import Example, load_examples, load_task
from tiedlora.text import nearest

PASSAGES = 100
"""The first so many passages are scored. PEFT's benchmark takes as many pages of FineWiki."""
PASSAGE_TOKENS = 768
"""Most tokens of a passage, as in PEFT's benchmark; fewer if the model's context is shorter."""
LONGEST_WINDOW = 16 * PASSAGE_TOKENS
"""Most characters that a passage is looked for in. English has about four characters for a token."""


@dataclass(frozen=True)
class Passage(Example):
    """A text without a prompt: its first token is given, and all others are predicted."""


def as_passages(texts: Sequence[str]) -> list[Passage]:
    """The texts as examples. An id holds a hash of its text, so rows of different texts are never paired."""
    return [
        Passage(f"{number}-{hashlib.sha256(text.encode()).hexdigest()[:8]}", "", text, (text,))
        for number, text in enumerate(texts)
    ]


def check_source(source: str, task: str) -> None:
    """Refuse neutral text that is not there, before anything is loaded. Only the hub is not asked yet.

    Args:
        source: as score.forgetting.
        task: the name of the run's task.

    Raises:
        UserError: the message says what is allowed.
    """
    check_forgetting(source, task)
    kind, _, name = source.partition(":")
    if kind == TASK_TEXT and name not in (tasks := options("task")):
        raise UserError(
            f"score.forgetting={source}: no such task; choose from {', '.join(tasks)}{nearest(name, tasks)}"
        )
    if kind not in (TASK_TEXT, HUB_TEXT) and not Path(source).expanduser().is_file():
        raise UserError(f"score.forgetting={source}: no such file; a relative path starts at the present folder")


def source_digest(source: str) -> str | None:
    """The sha256 of a text file; None for the text of a task or of the hub, and for a file that is not there."""
    path = Path(source).expanduser()
    is_file = source.partition(":")[0] not in (TASK_TEXT, HUB_TEXT) and path.is_file()
    return storage.sha256(path) if is_file else None


def read_passages(source: str, encoder: Encoder, data_root: str | None) -> list[Passage]:
    """The first PASSAGES passages of `score.forgetting`.

    A file is split into consecutive passages. Another task gives one passage for each validation row (prompt and
    target), and the hub one for each page; both are cut to a passage's length.

    Raises:
        UserError: the source cannot be read, or holds no text.
    """
    limit = min(PASSAGE_TOKENS, encoder.context)

    def fits(text: str) -> bool:
        return len(encoder.text(text)) <= limit

    kind, _, name = source.partition(":")
    if kind == TASK_TEXT:
        task = task_option(name)
        task.rows.validation = None  # there may be fewer rows than the task's own scoring needs
        examples = load_examples(load_task(task), "validation", data_root)
        texts = (example.prompt + example.target for example in examples)
        passages = _beginnings(texts, fits)
    elif kind == HUB_TEXT:
        passages = _beginnings(_hub_texts(name), fits)
    else:
        passages = split_text(_file_text(Path(source)), fits)
    # A passage of one token has nothing to predict.
    found = list(islice((text for text in passages if len(encoder.text(text)) > 1), PASSAGES))
    if not found:
        raise UserError(f"score.forgetting={source}: holds no text of two tokens")
    return as_passages(found)


def _beginnings(texts: Iterable[str], fits: Callable[[str], bool]) -> Iterator[str]:
    for text in texts:
        yield from islice(split_text(text, fits), 1)


def split_text(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Consecutive pieces of the text. Each is as long as `fits` allows, and ends at the end of a word where it can."""
    rest = text.strip()
    while rest:
        # Bisection finds the most characters that fit: nearly always, a longer text has more tokens.
        low, high = 1, min(len(rest), LONGEST_WINDOW)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(rest[:middle]) else (low, middle - 1)
        if low < len(rest) and (words := re.match(r"(?s).*\s", rest[: low + 1])):
            low = words.end()
        yield rest[:low].strip()
        rest = rest[low:].strip()


def _file_text(path: Path) -> str:
    try:
        return storage.read_bytes(path.expanduser()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"score.forgetting={path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _hub_texts(name: str) -> Iterator[str]:
    """The first pages of a data set on the hub, from the field `text`. Only these pages are downloaded.

    Args:
        name: its id, or id:configuration.
    """
    # It takes more than a second to import, and other sources do not need it.
    import datasets

    id, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(id, configuration or None, split="train", streaming=True)
        texts = [row["text"] for row in islice(rows, PASSAGES)]
    # All errors of huggingface_hub and datasets for an unreachable hub or a missing data set derive from these.
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"score.forgetting=hub:{name}: cannot be loaded ({reason}); reach the hub, or give a text file (FILE.txt)"
        ) from None
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"score.forgetting=hub:{name}: its field 'text' holds no texts")
    yield from texts
