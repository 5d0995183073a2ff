"""A finished run in words: what the terminal shows, and the flat summary that W&B's views use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FLOOR = 0.05
"""A score whose interval stays under this says nothing about a method: whatever it does, it looks the same."""


def visible(text: str) -> str:
    """Control characters, bidirectional marks and lone surrogates as visible signs, so that no text rewrites what is
    around it; line feeds are kept as a sign too."""
    return "".join(_sign(c) for c in text)


def _sign(c: str) -> str:
    code = ord(c)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    # C1 controls, bidirectional marks and overrides, line separators, surrogates, the byte order mark.
    hidden = (0x80, 0x9F), (0x200E, 0x200F), (0x2028, 0x202E), (0x2066, 0x2069), (0xD800, 0xDFFF), (0xFEFF, 0xFEFF)
    return f"<U+{code:04X}>" if any(low <= code <= high for low, high in hidden) else c


def lines(text: str) -> str:
    """Text of several lines with each line made visible, so that it cannot move the cursor or rewrite the terminal."""
    return "\n".join(map(visible, text.split("\n")))


def result(record: dict[str, Any], folder: Path) -> str:
    """The lines that end `python train.py`: loss, scores with intervals, size, folder."""
    config, training = record["config"], record["training"]
    head = f"{config['tying']['name']} r={config['rank']['r']} on {config['task']['name']}, {record['base']['name']}"
    shown = [
        "",
        f"{head}, seed {record['seed']}",
        f"  validation loss       {training['validation_loss_first']:.3f} -> {training['validation_loss_last']:.3f}"
        f"   ({training['steps']} steps, {training['seconds']:.0f} s, {training['tokens_per_s']:.0f} tokens/s)",
        f"  trainable parameters  {record['trainable_params']:,} ({100 * record['share_of_lora']:.2f} % of LoRA)",
    ]
    for split, scores in record["scores"].items():
        cut = f" ({scores['shortened']} prompts shortened)" if scores.get("shortened") else ""
        shown.append(f"  {split}: {scores['rows']} rows{cut}, scores x 100, 95 % intervals over which rows were drawn")
        for name, found in scores["metrics"].items():
            base = scores.get("base", {}).get(name)
            gain = scores.get("gain", {}).get(name)
            text = f"    {name:<22}"
            text += f"base {_points(base)}   adapted {_points(found)}" if base else f"adapted {_points(found)}"
            shown.append(text + (f"   gain {_points(gain, sign='+')}" if gain else ""))
        if remark := _remark(scores):
            shown.append(f"    {remark}")
    shown.append(f"  run folder            {folder}")
    return "\n".join(map(visible, shown))


def _points(interval: dict[str, Any], sign: str = "") -> str:
    """A score in points: records hold fractions of 1, tables show them times 100, as papers do."""
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _remark(scores: dict[str, Any]) -> str:
    """What the first metric's gain does not show, if anything."""
    if "gain" not in scores:
        return ""
    name = next(iter(scores["metrics"]))
    gain = scores["gain"][name]
    if gain["low"] > 0:
        return ""
    if max(scores["base"][name]["high"], scores["metrics"][name]["high"]) < FLOOR:
        return f"{name}: at the floor for this model; a comparison of methods on it is uninformative"
    return f"{name}: no gain shown, the interval includes 0" if gain["high"] >= 0 else f"{name}: worse than the base"


def flat_summary(record: dict[str, Any]) -> dict[str, float | int | str]:
    """One level of keys, `validation/exact_match_strict` and so on, for W&B's tables and plots."""
    flat: dict[str, float | int | str] = {
        "trainable_params": record["trainable_params"],
        "share_of_lora": record["share_of_lora"],
        "adapter_bytes": record["adapter_bytes"],
        **{f"training/{key}": value for key, value in record["training"].items()},
    }
    for split, scores in record["scores"].items():
        for kind in ("metrics", "base", "gain"):
            prefix = split if kind == "metrics" else f"{split}/{kind}"
            for name, interval in scores.get(kind, {}).items():
                flat[f"{prefix}/{name}"] = interval["value"]
                flat[f"{prefix}/{name}_low"], flat[f"{prefix}/{name}_high"] = interval["low"], interval["high"]
    return flat
