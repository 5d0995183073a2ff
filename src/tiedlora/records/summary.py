"""A finished run for people: the lines that a terminal shows, and the flat summary that trackers get."""

from __future__ import annotations

from pathlib import Path

from tiedlora.reading import plain
from tiedlora.records.interval import Unit
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.run_record import RunRecord, SplitScores
from tiedlora.text import visible

NEAR_ZERO = 0.05
"""If the whole interval of a score is below this, the score cannot tell methods apart: all are near zero."""


def terminal_lines(record: RunRecord, folder: Path) -> str:
    """The lines that end `python train.py`: loss, scores with intervals, size, folder."""
    training = record.training
    rank = "" if record.arm.method is not None else f" r={record.arm.rank}"
    head = f"{record.arm.label}{rank} on {record.identity.task.name}, {record.base.name}"
    lines = [
        "",
        f"{head}, seed {record.seed}",
        f"  validation loss       {training.validation_loss_first:.3f} -> {training.validation_loss_last:.3f}"
        f"   ({training.steps} steps, {training.seconds:.0f} s, {training.tokens_per_s:.0f} tokens/s)",
        f"  trainable parameters  {record.trainable_params:,} ({100 * record.share_of_lora:.2f} % of LoRA)",
    ]
    for split, scores in record.scores.items():
        lines += _split_lines(split, scores)
    lines.append(f"  run folder            {folder}")
    return "\n".join(map(visible, lines))


def _split_lines(split: str, scores: SplitScores) -> list[str]:
    shortened = f" ({scores.shortened} prompts shortened)" if scores.shortened else ""
    units = ["scores x 100"] if not all(map(is_loss, scores.metrics)) else []
    units += ["losses in nats per token"] if any(map(is_loss, scores.metrics)) else []
    rows = f"{scores.rows} rows{shortened}" if scores.source is None else f"{scores.rows} passages of {scores.source}"
    lines = [f"  {split}: {rows}, {', '.join(units)}, 95 % intervals over which rows were drawn"]
    for name, adapted in scores.metrics.items():
        text = f"    {name:<22}"
        unit = Unit.of(name)
        if scores.base is None or scores.gain is None:
            lines.append(f"{text}adapted {unit.text(adapted)}")
        else:
            gain = f"{'gain' if unit is Unit.POINTS else 'change'} {unit.text(scores.gain[name], sign='+')}"
            lines.append(f"{text}base {unit.text(scores.base[name])}   adapted {unit.text(adapted)}   {gain}")
    if scores.cut_targets:
        lines.append(f"    {scores.cut_targets} rows lose the end of their target, which does not fit into the context")
    if remark := _remark(scores):
        lines.append(f"    {remark}")
    return lines


def _remark(scores: SplitScores) -> str:
    """A warning if the first metric shows no gain; empty otherwise."""
    name = scores.first_metric
    # Neutral text is not expected to gain.
    if scores.base is None or scores.gain is None or scores.source is not None:
        return ""
    gain = scores.gain[name]
    # A smaller loss is better.
    least, most = (-gain.high, -gain.low) if is_loss(name) else (gain.low, gain.high)
    if least > 0:
        return ""
    if not is_loss(name) and max(scores.base[name].high, scores.metrics[name].high) < NEAR_ZERO:
        return f"{name}: near zero for this model, so it cannot tell methods apart"
    return f"{name}: no gain shown, the interval includes 0" if most >= 0 else f"{name}: worse than the base"


def flat_summary(record: RunRecord) -> dict[str, float | int]:
    """The record as one level of keys, such as `validation/exact_match_strict` and its `_low` and `_high`."""
    flat: dict[str, float | int] = {
        "trainable_params": record.trainable_params,
        "share_of_lora": record.share_of_lora,
        "adapter_bytes": record.adapter_bytes,
        **{f"training/{key}": value for key, value in plain(record.training).items() if not isinstance(value, list)},
        "training/halvings": len(record.training.halvings or ()),
    }
    for split, scores in record.scores.items():
        for kind, intervals in {"": scores.metrics, "/base": scores.base, "/gain": scores.gain}.items():
            for name, interval in (intervals or {}).items():
                key = f"{split}{kind}/{name}"
                flat |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
    return flat
