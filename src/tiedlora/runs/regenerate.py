"""The checks of a finished run that need torch: its adapter, and predictions that are regenerated from it.

Another kind of processor adds in another order. In bfloat16 a greedy answer then takes another token where two are
nearly as likely, and differs from there on. So on another device a recorded answer cannot be expected again. But each
of its tokens must still be as likely as the likeliest one, up to
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tiedlora.adapter import load
from tiedlora.adapter.arms import attach_saved, check_tensors, is_other_method, read_spec
from tiedlora.config.identity import identity
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.models import products
from tiedlora.models.base_model import load_base
from tiedlora.models.device import execution_on
from tiedlora.models.placement import input_device, without_gradients
from tiedlora.records.loss_metrics import TARGET_LOSS_BY_TOKEN, is_loss
from tiedlora.records.rows import PredictionRow
from tiedlora.records.run_record import ADAPTER
from tiedlora.runs.verify import CheckedRun, Finding
from tiedlora.scoring.split import Rows, Scorer, scored_model, with_halved_batches
from tiedlora.tasks import Example
from tiedlora.training.device import set_up_device


@dataclass(frozen=True)
class Tolerances:
    """How far outputs and losses may be from the recorded ones."""

    loss: float
    """How much the loss of a row may differ on the same kind of device, as a share of it, or in nats if it is below
    1."""
    gap: float
    """On another device: by how much the logit of a recorded token may be below the largest one, in nats."""
    row: float
    """On another device: as `loss`."""
    mean: float
    """On another device: the same for the mean loss of the rows."""


TOLERANCES = {"float32": Tolerances(1e-3, 0.01, 1e-3, 1e-3), "bfloat16": Tolerances(2e-2, 1.0, 0.5, 0.05)}
"""By dtype. Records of SmolLM2-135M in bfloat16 from AVX512-bf16 processors were checked on one with AVX2. 32 of 284
answers differed, and the largest gap was 0.5. The losses of rows differed by up to 28 %, their means by up to 0.6 %."""


class Asked(NamedTuple):
    """What was asked again, and the rows of now and of then."""

    examples: Sequence[Example]
    rows: Rows
    recorded: Rows


def check_adapter(run: CheckedRun) -> Iterator[Finding]:
    """Check that the adapter has its own hash, and that it belongs to this run."""
    if not run.record.keeps(ADAPTER):
        yield Finding("adapter", None, "the study keeps only its sha256; the run's command gives the files again")
        return
    try:
        same = _arm_values(run) if is_other_method(run.folder.adapter) else _adapter_values(run)
    except UserError as error:
        yield Finding("adapter", False, str(error))
        return
    for name, (here, expected) in same.items():
        if here != expected:
            explanation = f"adapter.json: its {name} is {here!r:.80}, the run's {expected!r:.80}"
            yield Finding("adapter", False, explanation)
            return
    yield Finding("adapter", True, "its tensors have the sha256 of adapter.json, and are this run's")


def _adapter_values(run: CheckedRun) -> dict[str, tuple[object, object]]:
    """Name -> (the adapter's value, the run's value)."""
    adapter, base = load(run.folder.adapter)
    # The name and the suggested rate of a tying are only labels: its other values are compared.
    return {
        "base": (base, run.record.base),
        "tying": (identity(adapter.tying), identity(run.config.tying)),
        "rank": (adapter.rank, run.config.rank.r),
        "alpha": (adapter.alpha, run.config.rank.alpha),
        "scaling": (adapter.scaling, run.config.rank.scaling),
        "seed": (adapter.seed, run.config.seed),
        "trainable parameters": (adapter.trainable_params(), run.record.trainable_params),
    }


def _arm_values(run: CheckedRun) -> dict[str, tuple[object, object]]:
    """As `_adapter_values`, for an arm of another method."""
    spec, base = read_spec(run.folder.adapter)
    check_tensors(run.folder.adapter)
    values = {"base": (base, run.record.base), "seed": (spec.seed, run.config.seed)}
    for name in ("method", "resolved", "targets", "layers"):
        values[name] = getattr(spec.tying, name), getattr(run.config.tying, name)
    return values


def regenerate(run: CheckedRun, least: int, suspects: set[str]) -> Iterator[Finding]:
    """Regenerate whole scoring batches, from the adapter and from the base, and compare them with predictions/.

    A batch is repeated with the same rows, because rounding depends on which rows share it.

    Args:
        least: the least number of rows of each split.
        suspects: the ids of rows that are regenerated first.
    """
    config = run.config
    if not run.record.keeps(ADAPTER):
        yield Finding("regenerate", None, "the study keeps no adapter of this run")
        return
    try:
        device = set_up_device(config.train.device, run.record.execution.threads)
        base = load_base(config.model, config.train.dtype, device, Path(config.cache))
    except UserError as error:
        yield Finding("regenerate", None, f"the base model cannot be loaded here ({error})")
        return
    if base.record != run.record.base:
        yield Finding("base", False, f"was {run.record.base}, here it is {base.record}")
        return
    attached = attach_saved(base.model, run.folder.adapter)
    encoder = Encoder(base.tokenizer, config.task, config.model.context, run.record.more_ends or ())
    for split, scores in run.record.scores.items():
        if run.examples.get(split):
            as_scored = replace(run, config=with_halved_batches(config, scores.batch_halvings or 0))
            scorer = Scorer(attached, encoder, run.task, as_scored.config, base.record)
            elsewhere = not run.record.execution.rounds_as(execution_on(device))
            with products.on_any_cpu(device, config.train.dtype):
                findings = list(_regenerate_split(as_scored, scorer, split, least, suspects, elsewhere))
            yield from findings
    attached.detach()


def _regenerate_split(
    run: CheckedRun, scorer: Scorer, split: str, least: int, suspects: set[str], elsewhere: bool
) -> Iterator[Finding]:
    """Args: elsewhere: whether this device may round otherwise than that of the record."""
    examples, scores = run.examples[split], run.record.scores[split]
    wanted = [losses for losses in (False, True) if losses in map(is_loss, scores.metrics)]
    for kind in ("", ".base") if scores.base is not None else ("",):
        recorded = run.predictions(split, base=bool(kind))
        if len(recorded) != len(examples):
            yield Finding(f"regenerate {split}{kind}", False, f"{len(recorded)} predictions of {len(examples)} rows")
            continue
        for losses in wanted:
            batches = scorer.batches(examples, losses=losses)
            places = _chosen_places([row.id for row in recorded], batches, least, suspects)
            chosen = [examples[place] for place in places]
            title = f"computing the losses of {split}{kind} again" if losses else f"regenerating {split}{kind}"
            rows = scorer.rows(chosen, title, losses=losses, base=bool(kind))
            asked = Asked(chosen, rows, [recorded[place] for place in places])
            if losses:
                yield _compared_losses(run, f"losses {split}{kind}", asked, elsewhere)
            else:
                yield _compared_outputs(run, scorer, f"regenerate {split}{kind}", asked, bool(kind), elsewhere)


def _chosen_places(ids: Sequence[str], batches: Sequence[list[int]], least: int, suspects: set[str]) -> list[int]:
    """The indices of whole scoring batches: first those with suspicious rows, then by length, from the shortest."""

    def is_suspect(batch: list[int]) -> bool:
        return any(ids[place] in suspects for place in batch)

    places: list[int] = []
    for batch in [*filter(is_suspect, batches), *(batch for batch in reversed(batches) if not is_suspect(batch))]:
        if len(places) >= least:
            break
        places += batch
    # In the order of the split: scoring sorts by length, and rows of equal length must keep their order.
    return sorted(places)


def _compared_outputs(
    run: CheckedRun, scorer: Scorer, check: str, asked: Asked, base: bool, elsewhere: bool
) -> Finding:
    """Whether the outputs come out as they were; on another device, whether rounding explains those that do not."""
    different = [same for same in zip(*asked, strict=True) if same[1].output != same[2].output]
    where = f"recorded on {run.record.execution}"
    if not different:
        return Finding(check, True, f"{len(asked.rows)} outputs come out as they were")
    if not elsewhere:
        first, count = different[0][0].id, f"{len(different)} of {len(asked.rows)} rows differ"
        return Finding(check, False, f"row {first}: another output than the recorded one ({count}); {where}", first)
    tolerance = TOLERANCES[run.config.train.dtype].gap
    with scored_model(scorer.attached, run.config, base) as model:
        gaps = {old.id: _gap(model, scorer, example, new, old) for example, new, old in different}
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
        f"within {max(gaps.values()):.3g} of the largest logit ({tolerance:g} is allowed); {where}",
        by_rounding=True,
    )


def _compared_losses(run: CheckedRun, check: str, asked: Asked, elsewhere: bool) -> Finding:
    """Whether the sums and counts of the rows' losses are the recorded ones, up to rounding."""
    tolerances, where = TOLERANCES[run.config.train.dtype], f"recorded on {run.record.execution}"
    tolerance = tolerances.row if elsewhere else tolerances.loss
    for new, old in zip(asked.rows, asked.recorded, strict=True):
        now, before = _loss_and_tokens(new), _loss_and_tokens(old)
        # Written so that NaN is beyond it.
        if not (before and now[1:] == before[1:] and _share(now[0], before[0]) <= tolerance):
            explanation = f"row {new.id}: its loss and target tokens are {now}, the file says {before or None}"
            return Finding(check, False, f"{explanation}; {where}", new.id)
    if not elsewhere:
        return Finding(check, True, f"{len(asked.rows)} losses come out as they were, within {tolerance:g}")
    total_now, total_before = (sum(_loss_and_tokens(row)[0] for row in rows) for rows in asked[1:])
    of_all = _share(total_now, total_before, least=float(len(asked.rows)))
    return Finding(
        check,
        of_all <= tolerances.mean,
        f"the mean of {len(asked.rows)} losses differs by {of_all:.2%} ({tolerances.mean:.2%} is allowed on another "
        f"device), and no row's by more than {tolerance:.0%}; {where}",
        by_rounding=0 < of_all <= tolerances.mean,
    )


def _loss_and_tokens(row: PredictionRow) -> list[float]:
    """The loss of a row's target in nats, and its number of tokens; empty if the row has none."""
    value = row.scores.get(TARGET_LOSS_BY_TOKEN)
    return list(map(float, value)) if isinstance(value, list) else []


def _share(now: float, before: float, least: float = 1.0) -> float:
    """The difference as a share of the recorded number, or of `least` if that is larger."""
    return abs(now - before) / max(abs(before), least)


def _gap(model: Any, scorer: Scorer, example: Example, new: PredictionRow, old: PredictionRow) -> float:
    if new.choices is None or new.log_likelihoods is None:
        return largest_gap(model, scorer, example, old)
    if old.output not in new.choices:
        return math.inf
    return max(new.log_likelihoods) - new.log_likelihoods[new.choices.index(old.output)]


@without_gradients
def largest_gap(model: Any, scorer: Scorer, example: Example, recorded: PredictionRow) -> float:
    """By how much the logit of a token of the recorded answer is below the largest logit, at most, in nats.

    0 means that the answer is the greedy one. The answer's text is tokenised again, so its tokens can differ from those
    that were generated. The gap is then too large.
    """
    encoder = scorer.encoder
    prompt = encoder.prompt(scorer.fitting(example).prompt)
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
