"""Score in smaller batches if memory runs out, so that a trained run is not lost because of its answers' batches."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from tiedlora.config.schema import FORGETTING, Config
from tiedlora.errors import UserError, is_out_of_memory
from tiedlora.models.device import free_memory
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import SplitScores
from tiedlora.scoring.passages import read_passages, source_digest
from tiedlora.scoring.passes import Passes
from tiedlora.scoring.split import Scorer

log = logging.getLogger(__name__)

T = TypeVar("T")


def with_halved_batches(config: Config, times: int) -> Config:
    """The configuration with score.batch_size and score.batch_tokens halved so many times; neither is below 1."""
    score = config.score
    tokens = None if score.batch_tokens is None else max(1, score.batch_tokens >> times)
    return replace(config, score=replace(score, batch_size=max(1, score.batch_size >> times), batch_tokens=tokens))


def score_within_memory(scorer: Scorer, *arguments: Any, halvings: int = 0) -> SplitScores:
    """The result of Scorer.score_split, which gets the arguments.

    If memory runs out, the split is scored again from its start, in halved batches: the adapted model and the base
    model in the same ones, because rounding depends on them. Little work is lost, because the longest rows come first.

    Args:
        halvings: how often the batches are halved already, by an earlier scoring of the same split.

    Raises:
        UserError: memory runs out with a single row; or as Scorer.score_split.
    """
    scores, times = within_memory(scorer, lambda smaller: smaller.score_split(*arguments), halvings)
    return replace(scores, batch_halvings=times or None)


def within_memory(scorer: Scorer, score: Callable[[Scorer], T], halvings: int = 0) -> tuple[T, int]:
    """What `score` returns, and how often the batches were halved until it had enough memory.

    Args:
        score: gets the scorer, with smaller batches from call to call.
        halvings: as score_within_memory.

    Raises:
        UserError: memory runs out with a single row.
    """
    for times in itertools.count(halvings):
        smaller = replace(scorer, config=with_halved_batches(scorer.config, times))
        batch_size = smaller.config.score.batch_size
        try:
            return score(smaller), times
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        if batch_size == 1:
            break
        log.warning("scoring: out of memory; score.batch_size=%d is halved to %d", batch_size, batch_size // 2)
    raise UserError(
        "scoring: out of memory with score.batch_size=1; the trained adapter and its checkpoint are kept, so with more "
        "memory the same command continues with scoring"
    )


def score_forgetting(scorer: Scorer, source: str, folder: RunFolder) -> SplitScores:
    """The losses of neutral text, with the adapter and without it, scored as a split without answers.

    Args:
        source: as score.forgetting.

    Raises:
        UserError: the text cannot be read; or as score_within_memory.
    """
    passages = read_passages(source, scorer.encoder, scorer.config.data_root)
    scores = score_within_memory(scorer, FORGETTING, passages, folder, Passes(answers=False))
    return replace(scores, source=source, source_digest=source_digest(source))
