"""Check the scores of a finished run: predictions/ against result.json, and the model's answers against predictions/.

Predictions are regenerated. Another kind of processor adds in another order. In bfloat16 a greedy answer then takes
another token where two are nearly as likely, and differs from there on. So on another device a recorded answer cannot
be expected again. But each of its tokens must still be as likely as the likeliest one, up to a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tiedlora import storage
from tiedlora.adapter.attach import attach_saved
from tiedlora.config import compose
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.models import products
from tiedlora.models.base_model import load_base
from tiedlora.models.device import execution_on, here_or_auto, set_up_device
from tiedlora.models.placement import input_device, without_gradients
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import DRIFT, TARGET_LOSS_BY_TOKEN, is_loss, loss_scores
from tiedlora.records.rows import PredictionRow
from tiedlora.records.run_record import ADAPTER, TEXTS
from tiedlora.runs.checked_run import CheckedRun, Finding, compared
from tiedlora.scoring.split import Scorer, scored_model, with_halved_batches
from tiedlora.scoring.summary import gains, summarise
from tiedlora.tasks import Example
from tiedlora.training.loss import chunks_within

Asked = list[tuple[Example, PredictionRow, PredictionRow]]
"""Examples that were asked again, each with its row of now and the recorded one."""
LEAST_LOSS, LEAST_DRIFT = 1.0, 0.02
"""In nats: a smaller loss or drift of a row may differ by its tolerance of this. bfloat16 rounds logits to 8 bits."""


@dataclass(frozen=True)
class Tolerances:
    """How far outputs, losses and drifts may be from the recorded ones."""

    loss: float
    """How much the number of a row may differ on the same kind of device, as a share of it, or of `least` if it is
    below that."""
    gap: float
    """On another device: by how much the logit of a recorded token may be below the largest one, in nats."""
    row: float
    """On another device: as `loss`."""
    mean: float
    """On another device: the same for the mean of the rows."""


TOLERANCES = {"float32": Tolerances(1e-3, 0.01, 1e-3, 1e-3), "bfloat16": Tolerances(2e-2, 1.0, 0.5, 0.05)}
"""By dtype. Records of SmolLM2-135M in bfloat16 from AVX512-bf16 processors were checked on one with AVX2. 32 of 284
answers differed, and the largest gap was 0.5. The losses of rows differed by up to 28 %, their means by up to 0.6 %."""


def check_files(run: CheckedRun) -> Iterator[Finding]:
    """Check the predictions against the sha256 values in result.json."""
    for split, scores in run.record.scores.items():
        paths = {f"predictions/{split}.jsonl": run.folder.predictions_file(split)}
        if scores.base is not None:
            paths[f"predictions/{split}.base.jsonl"] = run.folder.base_predictions_file(split, scores.files)
        found = {f"scores.{split}.files.{name}": storage.content_sha256(path) for name, path in paths.items()}
        yield compared(f"files {split}", run.beside_record(found), f"{len(found)} files have their recorded sha256")


def check_predictions(run: CheckedRun) -> Iterator[Finding]:
    """Check the scores of each prediction from its output, and the metrics of the record from the scores."""
    for split, recorded in run.record.scores.items():
        check = f"predictions {split}"
        has_answers = not all(map(is_loss, recorded.metrics))
        if has_answers and not run.record.keeps(TEXTS) and split not in run.examples:
            yield Finding(check, None, "the study keeps no texts, and the rows cannot be read here")
            continue
        rows = run.predictions(split)
        base_rows = run.predictions(split, base=True) if recorded.base is not None else None
        wrong = [*_misscored(run, rows, split, base=False), *_misscored(run, base_rows or [], split, base=True)]
        yield from wrong
        finding = compared(
            check,
            _scores_again(run, split, rows, base_rows),
            f"{len(rows):,} rows give the recorded scores and intervals",
        )
        if not (finding.ok and wrong):
            yield finding


def _misscored(run: CheckedRun, rows: Sequence[PredictionRow], split: str, *, base: bool) -> Iterator[Finding]:
    by_id = {example.id: example for example in run.examples.get(split, [])}
    for row in rows:
        # Without the data, the references in the prediction row are used: the output was scored against them.
        example = by_id.get(row.id) or Example(row.id, row.prompt, "", tuple(row.references), tuple(row.choices or ()))
        # A choice among given texts is scored by the likelihoods of the texts, which are in the row.
        answer = row.output if row.log_likelihoods is None else row.log_likelihoods
        scores = compose.as_recorded(run.task.score(answer, example)) if row.has_answer else {}
        # Only the model can tell what a loss should be: regeneration asks it. But its two forms must agree.
        loss = _loss_and_tokens(row)
        if len(loss) == 2 and loss[1] >= 1:
            scores |= loss_scores(loss[0], int(loss[1]))
        if DRIFT in row.scores:
            scores[DRIFT] = 0.0 if base else row.scores[DRIFT]
        if scores != row.scores:
            explanation = f"row {row.id}: its output and its loss score {scores}, the file says {row.scores}"
            yield Finding(f"predictions {split}{'.base' if base else ''}", False, explanation)


def _scores_again(
    run: CheckedRun, split: str, rows: Sequence[PredictionRow], base_rows: Sequence[PredictionRow] | None
) -> dict[str, tuple[object, object]]:
    """What the record says of the predictions: name -> (what they give, what is recorded)."""
    recorded, task = run.record.scores[split], run.task
    found: dict[str, object] = {
        "rows": len(rows),
        "shortened": sum(row.shortened for row in rows),
        "output_tokens": sum(row.output_tokens for row in rows),
        "cut_targets": sum(row.cut_target for row in rows) or None,
    }
    others: dict[str, tuple[object, object]] = {}
    kinds = {}
    try:
        kinds["metrics"] = summarise(rows, task), recorded.metrics
        if base_rows is not None:
            others["base rows"] = len(base_rows), recorded.rows
            kinds["base"] = summarise(base_rows, task), recorded.base or {}
            kinds["gain"] = gains(rows, base_rows, task), recorded.gain or {}
    except ValueError as error:
        others["what the rows have"] = str(error), "the same scores in each"
    for kind, (again, before) in kinds.items():
        for metric in before:
            for part in fields(Interval):
                found[f"{kind}.{metric}.{part.name}"] = getattr(again.get(metric), part.name, None)
    return run.beside_record({f"scores.{split}.{name}": value for name, value in found.items()}) | others


def regenerate(run: CheckedRun, least: int) -> Iterator[Finding]:
    """Regenerate whole scoring batches, from the adapter and from the base, and compare them with predictions/.

    A batch is repeated with the same rows, because rounding depends on which rows share it.

    Args:
        least: the least number of rows of each split. The shortest ones are taken.
    """
    config = run.config
    if not run.record.keeps(ADAPTER):
        yield Finding("regenerate", None, "the study keeps no adapter of this run")
        return
    try:
        device = set_up_device(here_or_auto(config.train.device), run.record.execution.threads)
        base = load_base(config.model, config.train.dtype, device, Path(config.cache))
    except UserError as error:
        yield Finding("regenerate", None, f"the base model cannot be loaded here ({error})")
        return
    loaded = {f"base.{name}": value for name, value in vars(base.record).items()}
    finding = compared("base", run.beside_record(loaded), f"the loaded one is {base.record}")
    if run.base is None or not finding.ok:
        yield finding
    if not finding.ok:
        return
    arm = attach_saved(base.model, run.folder.adapter)
    encoder = Encoder(base.tokenizer, config.task, config.model.context, run.record.more_ends or ())
    for split, scores in run.record.scores.items():
        if run.examples.get(split):
            as_scored = with_halved_batches(config, scores.batch_halvings or 0)
            scorer = Scorer(arm, encoder, run.task, as_scored, base.record)
            places = scores.executions or [run.record.execution]
            run.elsewhere = not all(place.rounds_as(execution_on(device)) for place in places)
            run.places = "; ".join(map(str, places))
            memory_mb = config.train.loss_memory_mb
            with products.on_any_cpu(device, config.train.dtype), chunks_within(memory_mb):
                findings = list(_regenerate_split(run, scorer, split, least))
            yield from findings


def _regenerate_split(run: CheckedRun, scorer: Scorer, split: str, least: int) -> Iterator[Finding]:
    examples, scores = run.examples[split], run.record.scores[split]
    wanted = [losses for losses in (False, True) if losses in map(is_loss, scores.metrics)]
    for kind in ("", ".base") if scores.base is not None else ("",):
        recorded = run.predictions(split, base=bool(kind))
        if len(recorded) != len(examples):
            yield Finding(f"regenerate {split}{kind}", False, f"{len(recorded)} predictions of {len(examples)} rows")
            continue
        for losses in wanted:
            places: list[int] = []
            for batch in reversed(scorer.batches(examples, losses=losses)):
                places += batch if len(places) < least else []
            # In the order of the split: scoring sorts by length, and rows of equal length must keep their order.
            places.sort()
            chosen = [examples[place] for place in places]
            title = f"computing the losses of {split}{kind} again" if losses else f"regenerating {split}{kind}"
            rows = scorer.rows(chosen, title, losses=losses, base=bool(kind))
            asked = list(zip(chosen, rows, [recorded[place] for place in places], strict=True))
            if losses:
                pairs = [(_loss_and_tokens(new), _loss_and_tokens(old)) for _, new, old in asked]
                yield _compared_numbers(run, "losses", f"{split}{kind}", asked, pairs, LEAST_LOSS)
                if DRIFT in scores.metrics and not kind:
                    drift = scorer.divergences(chosen, f"computing the drift of {split} again")
                    before = [[x] if isinstance(x := old.scores.get(DRIFT), float) else [] for _, _, old in asked]
                    pairs = [([now], then) for now, then in zip(drift, before, strict=True)]
                    yield _compared_numbers(run, "drifts", split, asked, pairs, LEAST_DRIFT)
            else:
                yield _compared_outputs(run, scorer, f"regenerate {split}{kind}", asked, bool(kind))


def _compared_outputs(run: CheckedRun, scorer: Scorer, check: str, asked: Asked, base: bool) -> Finding:
    """Whether the outputs come out as they were; on another device, whether rounding explains those that do not."""
    different = [(example, new, old) for example, new, old in asked if new.output != old.output]
    where = f"recorded on {run.places}"
    if not different:
        return Finding(check, True, f"{len(asked)} outputs come out as they were")
    if not run.elsewhere:
        first, count = different[0][0].id, f"{len(different)} of {len(asked)} rows differ"
        return Finding(check, False, f"row {first}: another output than the recorded one ({count}); {where}")
    tolerance = TOLERANCES[run.config.train.dtype].gap
    with scored_model(scorer.arm, scorer.config, base) as model:
        gaps = {old.id: largest_gap(model, scorer, example, new, old) for example, new, old in different}
    for row_id, gap in gaps.items():
        # Written so that NaN is beyond it.
        if not gap <= tolerance:
            explanation = (
                f"row {row_id}: another output than the recorded one, and rounding does not explain it: a recorded "
                f"token is {gap:.3g} below the largest logit ({tolerance:g} is allowed); {where}"
            )
            return Finding(check, False, explanation)
    return Finding(
        check,
        True,
        f"{len(gaps)} of {len(asked)} outputs differ, none by more than another device's rounding: each token is "
        f"within {max(gaps.values()):.3g} of the largest logit ({tolerance:g} is allowed); {where}",
        by_rounding=True,
    )


def _compared_numbers(
    run: CheckedRun,
    what: str,
    rows: str,
    asked: Asked,
    pairs: Sequence[tuple[list[float], list[float]]],
    least: float,
) -> Finding:
    """Whether the losses or the drifts of rows are the recorded ones, up to rounding.

    Args:
        what, rows: the numbers and their rows in words, such as losses of test.base.
        pairs: for each row what it is now and what is recorded, in nats, and after a loss its number of target tokens.
        least: a smaller number may differ by its tolerance of this.
    """
    tolerances, where = TOLERANCES[run.config.train.dtype], f"recorded on {run.places}"
    tolerance, check = tolerances.row if run.elsewhere else tolerances.loss, f"{what} {rows}"
    for (_, row, _), (now, before) in zip(asked, pairs, strict=True):
        # Written so that NaN is beyond it.
        if not (before and now[1:] == before[1:] and _share(now[0], before[0], least) <= tolerance):
            explanation = f"row {row.id}: now {now}, the file says {before or None}; {where}"
            return Finding(check, False, explanation)
    if not run.elsewhere:
        return Finding(check, True, f"{len(asked)} {what} come out as they were, within {tolerance:g}")
    total_now, total_before = (sum(numbers[0] for numbers in side) for side in zip(*pairs, strict=True))
    of_all = _share(total_now, total_before, least * len(asked))
    return Finding(
        check,
        of_all <= tolerances.mean,
        f"the mean of {len(asked)} {what} differs by {of_all:.2%} ({tolerances.mean:.2%} is allowed on another "
        f"device), and no row's by more than {tolerance:.0%}; {where}",
        by_rounding=0 < of_all <= tolerances.mean,
    )


def _loss_and_tokens(row: PredictionRow) -> list[float]:
    """The loss of a row's target in nats, and its number of tokens; empty if the row has none."""
    value = row.scores.get(TARGET_LOSS_BY_TOKEN)
    return list(map(float, value)) if isinstance(value, list) else []


def _share(now: float, before: float, least: float) -> float:
    """The difference as a share of the recorded number, or of `least` if that is larger."""
    return abs(now - before) / max(abs(before), least)


@without_gradients
def largest_gap(model: Any, scorer: Scorer, example: Example, now: PredictionRow, recorded: PredictionRow) -> float:
    """By how much the logit of a token of the recorded answer is below the largest logit, at most, in nats.

    0 means that the answer is the greedy one. The answer's text is tokenised again, so its tokens can differ from those
    that were generated. The gap is then too large. For a choice, the gap is that of the log-likelihoods in `now`.
    """
    if now.choices is not None and now.log_likelihoods is not None:
        if recorded.output not in now.choices:
            return math.inf
        return max(now.log_likelihoods) - now.log_likelihoods[now.choices.index(recorded.output)]
    encoder = scorer.encoder
    prompt = encoder.prompt(encoder.scored(example).prompt)
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
