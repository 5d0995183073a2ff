"""The loss of each row's target, teacher-forced: prompt and target are the tokens that training would use.

The loss of a passage of neutral text is computed in the same way. Its target is all of it after the first token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tiedlora.config.schema import Config
from tiedlora.data.batching import collate
from tiedlora.data.encoding import Encoded, Encoder
from tiedlora.errors import UserError
from tiedlora.models.placement import input_device
from tiedlora.records.loss_metrics import loss_scores
from tiedlora.records.rows import NOT_GENERATED, PredictionRow
from tiedlora.scoring.batches import batches_by_length
from tiedlora.scoring.passages import Passage
from tiedlora.scoring.predict import fitting
from tiedlora.tasks import Example
from tiedlora.tracking.progress import ProgressBar
from tiedlora.training.loss import row_losses


@dataclass(frozen=True)
class _Asked:
    """An example whose prompt and target fit into the context together."""

    example: Example
    """With its prompt shortened, if it had to be."""
    tokens: Encoded
    cut: bool
    """Whether the target lost its end."""


def predict_losses(
    model: Any, encoder: Encoder, examples: Sequence[Example], config: Config, title: str
) -> list[PredictionRow]:
    """One row for each example, with its loss and without an answer.

    Args:
        model: the base model, with or without an adapter.
        title: the text of the progress bar.

    Raises:
        UserError: a prompt does not fit, and the task does not allow to shorten it enough; or a loss is not finite.
    """
    asked = [_asked(encoder, example, config) for example in examples]
    rows: dict[int, PredictionRow] = {}
    progress = ProgressBar(title, len(examples), "rows")
    for numbers in _batches(asked, config):
        batch = collate([asked[number].tokens for number in numbers], encoder.tokenizer.eos_token_id)
        losses = row_losses(model, batch.to(input_device(model)))
        for number, total, tokens in zip(numbers, losses.sums.tolist(), losses.tokens.tolist(), strict=True):
            rows[number] = _row(examples[number], asked[number], total, tokens)
        progress.advance(len(numbers))
    progress.close()
    return [rows[number] for number in range(len(examples))]


def loss_batches(encoder: Encoder, examples: Sequence[Example], config: Config) -> list[list[int]]:
    """The example numbers of each batch of `predict_losses`."""
    return _batches([_asked(encoder, example, config) for example in examples], config)


def _batches(asked: Sequence[_Asked], config: Config) -> list[list[int]]:
    return batches_by_length([len(row.tokens) for row in asked], config.score.batch_size, config.score.batch_tokens)


def _asked(encoder: Encoder, example: Example, config: Config) -> _Asked:
    """The tokens of a row. No example may be left out, so a target that does not fit loses its end."""
    if isinstance(example, Passage):
        return _Asked(example, example.tokens(encoder), cut=False)
    shortened = fitting(encoder, example, config)
    tokens = encoder.example(shortened)
    cut = len(tokens) > encoder.context
    if cut:
        tokens = Encoded(tokens.prompt, tokens.target[: encoder.context - len(tokens.prompt)])
    return _Asked(shortened, tokens, cut)


def _row(original: Example, asked: _Asked, total: float, tokens: int) -> PredictionRow:
    if not math.isfinite(total):
        raise UserError(f"score: the loss of row {original.id} is {total}; try train.dtype=float32, or lower train.lr")
    return PredictionRow(
        id=original.id,
        prompt=asked.example.prompt,
        references=list(original.references),
        output="",
        scores=loss_scores(total, tokens),
        shortened=asked.example is not original,
        ended=NOT_GENERATED,
        cut_target=asked.cut,
    )
