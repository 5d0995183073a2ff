"""From examples to batches: tokenise, order, collate."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiedlora.config.schema import TaskConfig, TrainConfig
from tiedlora.errors import UserError
from tiedlora.tasks import Example

BUCKET_BATCHES = 16
"""Batches sorted by length together: enough to make their rows alike, few enough to keep them shuffled."""


@dataclass(frozen=True)
class Encoded:
    """One example in tokens. The target ends with the end-of-text token."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass, padded on the right: no token sees what comes after, so no mask is needed."""

    input_ids: Tensor
    """(rows, length)"""
    positions: Tensor
    """(target tokens,) places in the flattened (rows * length) whose next token is a target."""
    targets: Tensor
    """(target tokens,) those next tokens."""
    tokens: int
    """Real tokens, padding not counted."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, without waiting for the copy."""
        if device.type != "cuda":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return Batch(move(self.input_ids), move(self.positions), move(self.targets), self.tokens)


class Encoder:
    """Text to token ids, the same for training and for generation.

    Prompt and target are tokenised apart, so no token merges across their boundary. Training and
    generation leave a prompt the same room, so that one that is shortened is shortened alike in both.

    Args:
        context: tokens that the model can attend to.
    """

    def __init__(self, tokenizer: Any, config: TaskConfig, context: int) -> None:
        self.tokenizer, self.config, self.context = tokenizer, config, context
        self.room = min(config.max_prompt_tokens or context, context - config.max_new_tokens)
        """Tokens that a prompt may have."""
        if self.room < 1:
            raise UserError(
                f"task.max_new_tokens={config.max_new_tokens}: leaves no room for a prompt in the model's context of "
                f"{context} tokens; lower it"
            )
        if config.chat_template and not tokenizer.chat_template:
            raise UserError("task.chat_template=true: this model's tokenizer has none; set it to false")
        if tokenizer.eos_token_id is None:
            raise UserError("model: its tokenizer has no end-of-text token, which every target ends with")

    def prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, with what the model expects at the start of a text."""
        if self.config.chat_template:
            turn = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        bos = self.tokenizer.bos_token_id
        starts_with_bos = bos is not None and self.tokenizer("x").input_ids[:1] == [bos]
        return (bos, *ids) if starts_with_bos else tuple(ids)

    def continuation(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that goes on after a prompt; a chat template's answer starts without a blank."""
        text = text.lstrip(" ") if self.config.chat_template else text
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def shortened(self, example: Example) -> Example | None:
        """The example itself if its prompt fits, else with what the task lets it lose cut at a word's end.

        Returns:
            None if the task lets it lose nothing, or too little.
        """
        if len(self.prompt(example.prompt)) <= self.room:
            return example
        start, end = example.cuttable
        text = example.prompt[start:end]

        def prompt(kept: int) -> str:
            return example.prompt[:start] + _whole_words(text[:kept]) + example.prompt[end:]

        # The longest beginning that fits: more characters never make fewer tokens, but for a word or so.
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self.prompt(prompt(middle))) <= self.room:
                low = middle
            else:
                high = middle - 1
        return replace(example, prompt=prompt(low)) if _whole_words(text[:low]) else None

    def example(self, example: Example) -> Encoded:
        """Prompt and target, the latter with the end-of-text token.

        Raises:
            UserError: the prompt has no token, so there is nothing to predict the target's first one from.
        """
        prompt = self.prompt(example.prompt)
        if not prompt:
            raise UserError(f"task.prompt={self.config.prompt!r}: row {example.id} gives an empty prompt")
        return Encoded(prompt, (*self.continuation(example.target), self.tokenizer.eos_token_id))


def _whole_words(text: str) -> str:
    """What is left of a text that was cut anywhere, without the word that the cut may have hit."""
    return text.rpartition(" ")[0].rstrip()


class Fitted(NamedTuple):
    """Rows that fit, in tokens."""

    kept: list[int]
    """Their numbers among the examples."""
    encoded: list[Encoded]
    counts: dict[str, int]
    """How many were shortened, and how many dropped and why, for the record."""


def fit(encoder: Encoder, examples: Sequence[Example]) -> Fitted:
    """Encode the examples to train on, or to take a loss of: shorten what may be, drop and count the rest.

    A target is never cut. `dropped_answer` counts rows whose answer went with the end of a shortened
    prompt: to train on them would be to teach invention.

    Raises:
        UserError: none fits.
    """
    config, context = encoder.config, encoder.context
    kept, encoded = [], []
    counts = {"rows": len(examples), "shortened": 0, "dropped_prompt": 0, "dropped_target": 0, "dropped_answer": 0}
    for number, example in enumerate(examples):
        asked = encoder.shortened(example)
        tokens = encoder.example(asked or example)
        if asked is None:
            counts["dropped_prompt"] += 1
        elif len(tokens.target) > (config.max_target_tokens or context) or len(tokens) > context:
            counts["dropped_target"] += 1
        elif asked is not example and example.must_hold not in asked.prompt:
            counts["dropped_answer"] += 1
        else:
            counts["shortened"] += asked is not example
            kept.append(number)
            encoded.append(tokens)
    if not kept:
        raise UserError(
            f"task={config.name}: none of {len(examples)} rows fits max_prompt_tokens={config.max_prompt_tokens}, "
            f"max_new_tokens={config.max_new_tokens}, max_target_tokens={config.max_target_tokens} and the model's "
            f"context of {context}"
        )
    return Fitted(kept, encoded, counts)


def cut(lengths: Sequence[int], rows: int | None, tokens: int | None) -> list[slice]:
    """Cut rows into runs of at most `rows` rows and `tokens` tokens, padding counted.

    Args:
        rows, tokens: None sets no limit. A row that is longer than `tokens` is a run of its own.
    """
    runs, start, longest = [], 0, 0
    for end, length in enumerate(lengths):
        number, longest = end + 1 - start, max(longest, length)
        if end > start and ((rows and number > rows) or (tokens and number * longest > tokens)):
            runs.append(slice(start, end))
            start, longest = end, length
    return [*runs, slice(start, len(lengths))] if lengths else []


class Order:
    """Which rows make up each optimizer step: a pure function of (lengths, train's settings, seed, step).

    Every row comes exactly once an epoch, and the last step of an epoch may be smaller. With `train.bucket`,
    rows of like length share a step: shuffled rows are sorted within BUCKET_BATCHES batches and the
    batches shuffled again. With `train.batch_tokens` a step ends early at that many tokens.
    """

    def __init__(self, lengths: Sequence[int], train: TrainConfig, seed: int) -> None:
        self.lengths, self.train, self.seed = lengths, train, seed
        self._first_steps = [1]
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def rows(self, step: int) -> list[int]:
        """Row numbers of optimizer step `step`, counted from 1."""
        epoch = bisect.bisect_right(self._first_steps, step) - 1
        while True:
            place, batches = step - self._first_steps[epoch], self.epoch(epoch)
            if place < len(batches):
                return batches[place]
            epoch += 1
            if epoch == len(self._first_steps):
                self._first_steps.append(self._first_steps[-1] + len(batches))

    def epoch(self, epoch: int) -> list[list[int]]:
        """Row numbers of each step of an epoch, counted from 0."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        train = self.train
        generator = random.Random(f"order/{self.seed}/{epoch}")
        rows = list(range(len(self.lengths)))
        generator.shuffle(rows)
        if train.bucket:
            size = BUCKET_BATCHES * train.batch_size
            chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
            rows = [row for chunk in chunks for row in sorted(chunk, key=lambda row: self.lengths[row])]
        batches = [rows[run] for run in cut([self.lengths[row] for row in rows], train.batch_size, train.batch_tokens)]
        if train.bucket:
            generator.shuffle(batches)
        return batches


ALIGNED = 16
"""Matrix products are up to a fifth faster over a multiple of so many tokens."""


def collate(rows: Sequence[Encoded], pad_id: int, context: int = 0) -> Batch:
    """Pad on the right and mark the target positions.

    Args:
        context: rows are padded somewhat further than to the longest, to a multiple of ALIGNED tokens in all, as long
            as they are no longer than this.
    """
    longest = max(len(row) for row in rows)
    each = ALIGNED // math.gcd(ALIGNED, len(rows))
    length = min(-(-longest // each) * each, max(context, longest))
    input_ids = torch.full((len(rows), length), pad_id)
    positions: list[int] = []
    targets: list[int] = []
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor(row.prompt + row.target)
        first = number * length + len(row.prompt) - 1
        positions.extend(range(first, first + len(row.target)))
        targets.extend(row.target)
    return Batch(input_ids, torch.tensor(positions), torch.tensor(targets), sum(len(row) for row in rows))


def microbatches(
    rows: Sequence[Encoded], pad_id: int, size: int | None = None, tokens: int | None = None, context: int = 0
) -> list[Batch]:
    """The rows of one optimizer step in passes of at most `size` rows and `tokens` tokens (but see `collate`).

    As few passes as that allows, and as even: the largest decides the memory, and a last pass of one row would cost
    a whole reading of the weights (and, where blocks are compiled, a graph of its own). Shortest rows first, so that
    each pass pads little.
    """
    if not rows:
        return []
    ordered = sorted(rows, key=len)
    lengths = [len(row) for row in ordered]
    few, longest = len(cut(lengths, size, tokens)), lengths[-1]
    most = tokens or longest * len(lengths)
    limits = range(longest, most)
    even = min(most, longest + bisect.bisect_left(limits, True, key=lambda n: len(cut(lengths, size, n)) <= few))
    return [collate(ordered[run], pad_id, context) for run in cut(lengths, size, even)]
