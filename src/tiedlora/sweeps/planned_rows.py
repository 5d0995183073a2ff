"""The rows of a sweep's tasks, before anything is run: how many there are, and how long. Nothing is downloaded."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import tokenizers

from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.models.identity import EMBEDDED_SHA256
from tiedlora.tasks import Example, load_examples, load_task

HUB_ROWS = {
    ("openai/gsm8k", "test"): 1_319,
    ("rajpurkar/squad", "validation"): 10_570,
    ("rajpurkar/squad", "validation[2000:]"): 8_570,
    ("Rowan/hellaswag", "validation"): 10_042,
    ("Rowan/hellaswag", "validation[2000:]"): 8_042,
    ("knkarthick/dialogsum", "test"): 500,
    ("IWSLT/iwslt2017", "tst2010+tst2011+tst2012+tst2013+tst2014+tst2015"): 8_079,
}
"""(data set, split) -> its examples. Those of GSM8K, SQuAD, HellaSwag and DialogSum were counted in copies of the
published files; for IWSLT 2017, the page of a copy on the hub (paulh27/alignment_iwslt2017_de_en) says 8.08 thousand.
DialogSum's 1,500 rows are 500 dialogues with three summaries each."""
SAMPLED_ROWS = 200
CHARACTERS_PER_TOKEN = 4.0
"""Assumed for English text if the model's tokenizer is not here."""


@dataclass(frozen=True)
class RowLengths:
    """The lengths of a task's training rows, in tokens."""

    prompt: float
    """The mean."""
    target: float
    """The mean, with the end-of-text token."""
    longest: int
    """Prompt and target of the longest row."""
    choices: int
    """How many given texts are compared after each prompt; 0 if an answer is generated."""
    is_exact: bool
    """Whether the model's tokenizer counted, and not the number of characters."""


def split_rows(config: Config, split: str) -> int | None:
    """How many rows of validation or test a run will be scored on; None if this is not known here.

    Rows that are generated or read from data_root are counted.
    """
    task = config.task
    asked = getattr(task.rows, split)
    if asked is not None:
        return int(asked)
    if split == "validation" and task.validation_from_train:
        return task.validation_from_train
    if config.data_root is None and not load_task(task).generator:
        return HUB_ROWS.get((str(task.hub.id), task.hub.splits.get(split, "")))
    examples = _examples(config, split)
    return None if examples is None else len(examples)


class RowCounts:
    """`split_rows` for the cells of a sweep. Cells share their sections, and each task is counted once."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, str | None, str], tuple[Config, int]] = {}

    def rows(self, config: Config, split: str) -> int:
        """The number of rows; 0 if it is not known here."""
        key = id(config.task), config.data_root, split
        if key not in self._counts:
            # The configuration is kept, because its id is only unique while it exists.
            self._counts[key] = config, split_rows(config, split) or 0
        return self._counts[key][1]


def row_lengths(config: Config) -> RowLengths | None:
    """The lengths of training rows, from a sample; None if the rows are not here."""
    if config.data_root is None and not load_task(config.task).generator:
        return None
    examples = _examples(config, "train")
    if examples is None:
        return None
    sample = random.Random(0).sample(examples, min(SAMPLED_ROWS, len(examples)))
    tokenizer = _tokenizer(config)

    def tokens(text: str) -> float:
        if config.model.source == "random":
            return len(text.encode())
        if tokenizer is None:
            return len(text) / CHARACTERS_PER_TOKEN
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    limit = min(config.task.max_prompt_tokens or config.model.context, config.model.context)
    prompts = [min(tokens(example.prompt), limit) for example in sample]
    targets = [tokens(example.target) + 1 for example in sample]
    longest = max(prompt + target for prompt, target in zip(prompts, targets, strict=True))
    is_exact = tokenizer is not None or config.model.source == "random"
    choices = max(len(example.choices) for example in sample)
    return RowLengths(mean(prompts), mean(targets), round(longest), choices, is_exact)


def _examples(config: Config, split: str) -> list[Example] | None:
    try:
        return load_examples(load_task(config.task), split, config.data_root)
    except UserError:
        # A plan does not need the rows. The sweep itself reports the error.
        return None


def _tokenizer(config: Config) -> tokenizers.Tokenizer | None:
    """The tokenizer of a local or converted model; None if it is not here. transformers is not imported."""
    if config.model.path:
        folder = Path(config.model.path)
    else:
        folder = Path(config.cache) / "models" / f"smollm2-135m-instruct-{EMBEDDED_SHA256[:12]}"
        if config.model.source != "embedded":
            return None
    path = folder / "tokenizer.json"
    return tokenizers.Tokenizer.from_file(str(path)) if path.is_file() else None
