"""What another device may change in a finished run's outputs and losses, by rounding alone.

Another kind of processor adds in another order. In bfloat16 a greedy answer then takes another token where two are
nearly as likely, and differs from there on. So on another device a recorded answer cannot be expected again. But each
of its tokens must still be as likely as the likeliest one, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch

from tiedlora.config.schema import Config
from tiedlora.data.encoding import Encoder
from tiedlora.models.placement import input_device, without_gradients
from tiedlora.records.loss_metrics import TARGET_LOSS_BY_TOKEN
from tiedlora.records.rows import PredictionRow
from tiedlora.runs.findings import CheckedRun, Finding
from tiedlora.scoring.predict import fitting
from tiedlora.scoring.split import Scorer, disabled, merged_for_scoring
from tiedlora.tasks import Example


@dataclass(frozen=True)
class Tolerances:
    """How far outputs and losses may be from the recorded ones on another device."""

    gap: float
    """By how much the logit of a recorded token may be below the largest one, in nats."""
    row: float
    """How much the loss of a row may differ, as a share of it, or in nats if it is below 1."""
    mean: float
    """The same for the mean loss of the rows."""


TOLERANCES = {"float32": Tolerances(0.01, 1e-3, 1e-3), "bfloat16": Tolerances(1.0, 0.5, 0.05)}
"""By dtype. Records of SmolLM2-135M in bfloat16 from AVX512-bf16 processors were checked on one with AVX2. 32 of 284
answers differed, and the largest gap was 0.5. The losses of rows differed by up to 28 %, their means by up to 0.6 %."""


Rows = Sequence[PredictionRow]


class Asked(NamedTuple):
    """What was asked again, and the rows of now and of then."""

    examples: Sequence[Example]
    rows: Rows
    recorded: Rows


def outputs_elsewhere(run: CheckedRun, scorer: Scorer, check: str, asked: Asked, active: bool) -> Finding:
    """Whether each recorded output is one that this model may give on another device.

    Args:
        active: whether the outputs are the adapted model's; otherwise the base model's.
    """
    tolerance = TOLERANCES[run.config.train.dtype].gap
    attached, encoder = scorer.attached, scorer.encoder
    with merged_for_scoring(attached, run.config) if active else disabled(attached) as model:
        gaps = {
            old.id: _gap(model, encoder, example, new, old, run.config)
            for example, new, old in zip(*asked, strict=True)
            if new.output != old.output
        }
    where = f"recorded on {run.record.execution}"
    for row_id, gap in gaps.items():
        # Written so that NaN is beyond it.
        if not gap <= tolerance:
            explanation = (
                f"row {row_id}: another output than the recorded one, and rounding does not explain it: a recorded "
                f"token is {gap:.3g} below the largest logit ({tolerance:g} is allowed); {where}"
            )
            return Finding(check, False, explanation, row_id)
    return Finding(
        check,
        True,
        f"{len(gaps)} of {len(asked.rows)} outputs differ, none by more than another device's rounding: each token is "
        f"within {max(gaps.values(), default=0.0):.3g} of the largest logit ({tolerance:g} is allowed); {where}",
        by_rounding=bool(gaps),
    )


def losses_elsewhere(run: CheckedRun, check: str, rows: Rows, recorded: Rows) -> Finding:
    """Whether the recorded losses are those of this model, up to the rounding of another device."""
    tolerances = TOLERANCES[run.config.train.dtype]
    if wrong := wrong_loss(run, check, rows, recorded, tolerances.row):
        return wrong
    now, before = (sum(_loss_and_tokens(row)[0] for row in either) for either in (rows, recorded))
    of_all = _share(now, before, least=float(len(rows)))
    return Finding(
        check,
        of_all <= tolerances.mean,
        f"the mean of {len(rows)} losses differs by {of_all:.2%} ({tolerances.mean:.2%} is allowed on another device), "
        f"and no row's by more than {tolerances.row:.0%}; recorded on {run.record.execution}",
        by_rounding=0 < of_all <= tolerances.mean,
    )


def wrong_loss(run: CheckedRun, check: str, rows: Rows, recorded: Rows, tolerance: float) -> Finding | None:
    """The first row whose loss or number of target tokens is not the recorded one.

    Args:
        tolerance: how much a loss may differ, as a share of it, or in nats if it is below 1.
    """
    for new, old in zip(rows, recorded, strict=True):
        now, before = _loss_and_tokens(new), _loss_and_tokens(old)
        # Written so that NaN is beyond it.
        if not (before and now[1:] == before[1:] and _share(now[0], before[0]) <= tolerance):
            explanation = f"row {new.id}: its loss and target tokens are {now}, the file says {before or None}"
            return Finding(check, False, f"{explanation}; recorded on {run.record.execution}", new.id)
    return None


def _loss_and_tokens(row: PredictionRow) -> list[float]:
    """The loss of a row's target in nats, and its number of tokens; empty if the row has none."""
    value = row.scores.get(TARGET_LOSS_BY_TOKEN)
    return list(map(float, value)) if isinstance(value, list) else []


def _share(now: float, before: float, least: float = 1.0) -> float:
    """The difference as a share of the recorded number, or of `least` if that is larger."""
    return abs(now - before) / max(abs(before), least)


def _gap(
    model: Any, encoder: Encoder, example: Example, new: PredictionRow, old: PredictionRow, config: Config
) -> float:
    if new.choices is None or new.log_likelihoods is None:
        return largest_gap(model, encoder, example, old, config)
    if old.output not in new.choices:
        return math.inf
    return max(new.log_likelihoods) - new.log_likelihoods[new.choices.index(old.output)]


@without_gradients
def largest_gap(model: Any, encoder: Encoder, example: Example, recorded: PredictionRow, config: Config) -> float:
    """By how much the logit of a token of the recorded answer is below the largest logit, at most, in nats.

    0 means that the answer is the greedy one. The answer's text is tokenised again, so its tokens can differ from those
    that were generated. The gap is then too large.
    """
    prompt = encoder.prompt(fitting(encoder, example, config).prompt)
    # Which token ended an answer is not recorded, and neither are blanks around it. It may have begun with one.
    ends = [[end] for end in (encoder.tokenizer.eos_token_id, *encoder.more_ends)] if recorded.ended == "end" else [[]]
    gaps = []
    for text, end in product((recorded.output, " " + recorded.output), ends):
        answer = [*encoder.tokenizer(text, add_special_tokens=False).input_ids, *end]
        ids = torch.tensor([[*prompt, *answer]], device=input_device(model))
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        taken = logits.gather(1, ids[0, len(prompt) :, None].to(logits.device))[:, 0]
        gaps.append(float((logits.max(1).values - taken).max()) if answer else math.inf)
    return min(gaps)
