"""A finished run for people: the lines that a terminal shows, and the flat summary that trackers get."""

from __future__ import annotations

from pathlib import Path

from tiedlora.reading import plain
from tiedlora.records.interval import Interval, Unit
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.run_record import RunRecord
from tiedlora.records.scores import RunScores
from tiedlora.text import visible

NEAR_ZERO = 0.05
"""If the whole interval of a score is below this, the score cannot tell methods apart: all are near zero."""


def terminal_lines(record: RunRecord, scores: RunScores, folder: Path) -> str:
    """The lines that end `python train.py`: loss, scores with intervals, size, folder."""
    training = record.training
    rank = "" if record.arm.method is not None else f" r={record.arm.rank}"
    head = f"{record.arm.label}{rank} on {record.identity.task.name}, {record.base.name}"
    lines = [
        "",
        f"{head}, seed {record.seed}",
        f"  validation loss       {training.validation_loss_first:.3f} -> {training.validation_loss_last:.3f}"
        f"   ({training.steps} steps, {training.seconds:.0f} s, {training.tokens_per_s:.0f} tokens/s)",
        f"  trainable parameters  {record.trainable_params:,}"
        f" ({100 * record.share_of_lora:.2f} % of LoRA r {record.arm.rank})",
    ]
    for split in scores.splits:
        lines += _split_lines(split, scores)
    lines.append(f"  run folder            {folder}")
    return "\n".join(map(visible, lines))


def _split_lines(split: str, scores: RunScores) -> list[str]:
    metrics, base, parts = scores.metrics(split), scores.base_metrics(split), scores.of(split)
    # The base model's file may be gone, if the folder was moved.
    gains = {name: gain for name, gain in scores.gains(split).items() if name in base}
    first = parts[0]
    shortened = f" ({first.shortened} prompts shortened)" if first.shortened else ""
    units = ["scores x 100"] if not all(map(is_loss, metrics)) else []
    units += ["losses in nats per token"] if any(map(is_loss, metrics)) else []
    rows = f"{first.rows} passages of {first.source}" if first.source else f"{first.rows} rows{shortened}"
    lines = [f"  {split}: {rows}, {', '.join(units)}, 95 % intervals over which rows were drawn"]
    for name, adapted in metrics.items():
        text = f"    {name:<22}"
        unit = Unit.of(name)
        if name in gains:
            gain = f"{'gain' if unit is Unit.POINTS else 'change'} {unit.text(gains[name], sign='+')}"
            lines.append(f"{text}base {unit.text(base[name])}   adapted {unit.text(adapted)}   {gain}")
        else:
            lines.append(f"{text}adapted {unit.text(adapted)}")
    if cut := max(part.cut_targets for part in parts):
        lines.append(f"    {cut} rows lose the end of their target, which does not fit into the context")
    name = next(iter(metrics))
    # Neutral text is not expected to gain.
    if name in gains and not first.source and (remark := _remark(name, metrics[name], base[name], gains[name])):
        lines.append(f"    {remark}")
    return lines


def _remark(name: str, adapted: Interval, base: Interval, gain: Interval) -> str:
    """A warning if the first metric shows no gain; empty otherwise."""
    # A smaller loss is better.
    least, most = (-gain.high, -gain.low) if is_loss(name) else (gain.low, gain.high)
    if least > 0:
        return ""
    if not is_loss(name) and max(base.high, adapted.high) < NEAR_ZERO:
        return f"{name}: near zero for this model, so it cannot tell methods apart"
    return f"{name}: no gain shown, the interval includes 0" if most >= 0 else f"{name}: worse than the base"


def flat_summary(record: RunRecord, scores: RunScores) -> dict[str, float | int]:
    """A run as one level of keys, such as `validation/exact_match_strict` and its `_low` and `_high`."""
    flat: dict[str, float | int] = {
        "trainable_params": record.trainable_params,
        "share_of_lora": record.share_of_lora,
        "adapter_bytes": record.adapter_bytes,
        **{f"training/{key}": value for key, value in plain(record.training).items() if not isinstance(value, list)},
        "training/halvings": len(record.training.halvings or ()),
    }
    for split in scores.splits:
        kinds = {"": scores.metrics(split), "/base": scores.base_metrics(split), "/gain": scores.gains(split)}
        for kind, intervals in kinds.items():
            for name, interval in intervals.items():
                key = f"{split}{kind}/{name}"
                flat |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
    return flat
