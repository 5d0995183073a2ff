"""The checks of a finished run that need torch: its adapter, and predictions that are regenerated from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tiedlora.adapter import load
from tiedlora.adapter.attach_arm import attach_saved, is_other_method, read_spec
from tiedlora.adapter.other_arm import check_tensors
from tiedlora.config.identity import identity
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.models import products
from tiedlora.models.base_model import load_base
from tiedlora.models.device import execution_on
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.rows import PredictionRow
from tiedlora.records.run_record import ADAPTER
from tiedlora.runs import rounding
from tiedlora.runs.findings import CheckedRun, Finding
from tiedlora.runs.process_device import set_up_device
from tiedlora.scoring.memory import with_halved_batches
from tiedlora.scoring.predict import scoring_batches
from tiedlora.scoring.split import Scorer
from tiedlora.scoring.target_losses import loss_batches

LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""How much a row's loss may differ on the same kind of device, as a share of it, or in nats if it is below 1."""


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
    for kind in ("", ".base") if scores.base is not None else ("",):
        recorded = run.predictions(split, base=bool(kind))
        if len(recorded) != len(examples):
            yield Finding(f"regenerate {split}{kind}", False, f"{len(recorded)} predictions of {len(examples)} rows")
            continue
        ids = [row.id for row in recorded]
        if scores.engine is not None:
            explanation = f"{scores.engine}; only this project's decoding gives the same texts again"
            yield Finding(f"regenerate {split}{kind}", None, explanation)
        elif not all(map(is_loss, scores.metrics)):
            places = _chosen_places(ids, scoring_batches(scorer.encoder, examples, run.config), least, suspects)
            rows_of = scorer.compute_base_rows if kind else scorer.adapted_rows
            chosen = [examples[place] for place in places]
            rows = rows_of(chosen, f"regenerating {split}{kind}")
            asked = rounding.Asked(chosen, rows, [recorded[place] for place in places])
            finding = _compared(run, f"regenerate {split}{kind}", rows, asked.recorded)
            if elsewhere and not finding.ok:
                finding = rounding.outputs_elsewhere(run, scorer, finding.check, asked, active=not kind)
            yield finding
        if any(map(is_loss, scores.metrics)):
            places = _chosen_places(ids, loss_batches(scorer.encoder, examples, run.config), least, suspects)
            losses_of = scorer.compute_base_losses if kind else scorer.adapted_losses
            rows = losses_of([examples[place] for place in places], f"computing the losses of {split}{kind} again")
            compared = rounding.losses_elsewhere if elsewhere else _compared_losses
            yield compared(run, f"losses {split}{kind}", rows, [recorded[place] for place in places])


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


def _compared_losses(
    run: CheckedRun, check: str, rows: Sequence[PredictionRow], recorded: Sequence[PredictionRow]
) -> Finding:
    """Compare the sums and counts of the rows' losses, up to the rounding of the same kind of device."""
    tolerance = LOSS_TOLERANCE[run.config.train.dtype]
    wrong = rounding.wrong_loss(run, check, rows, recorded, tolerance)
    return wrong or Finding(check, True, f"{len(rows)} losses come out as they were, within {tolerance:g}")


def _compared(run: CheckedRun, check: str, rows: Sequence[PredictionRow], recorded: Sequence[PredictionRow]) -> Finding:
    different = [new.id for new, old in zip(rows, recorded, strict=True) if new.output != old.output]
    if not different:
        return Finding(check, True, f"{len(rows)} outputs come out as they were")
    return Finding(
        check,
        False,
        f"row {different[0]}: another output than the recorded one ({len(different)} of {len(rows)} rows differ); "
        f"recorded on {run.record.execution}",
        different[0],
    )
