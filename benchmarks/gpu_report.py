"""The page of benchmarks/gpu.py: one table for each kind of measurement, from whatever has been measured so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import common

Results = dict[tuple[Any, ...], dict[str, Any]]
"""(part, its arguments ...) -> its figures, or {"error": why there are none}."""

REHEARSED = """**This is a rehearsal on a CPU with a tiny model: its figures mean nothing.** It shows that they run.
"""
ABOUT = """Written by `{command}` on {date}, from commit {commit}, in {minutes:.0f} minutes. docs/gpu.md says what each
table means. To send it back, paste this file into an issue of the project. It holds no paths and no data, except what
an error message may quote.
"""
Row = list[str]


def page(results: Results, about: dict[str, Any], rehearsed: bool) -> str:
    """The whole page in Markdown."""
    sections = [
        "# GPU report\n",
        *([REHEARSED] if rehearsed else []),
        ABOUT.format(**about),
        *(_section(title, text) for title, text in _sections(results)),
        *_missing(results),
        "## The figures as JSON\n",
        "```json\n" + json.dumps([[list(key), _without_texts(value)] for key, value in results.items()]) + "\n```\n",
    ]
    return "\n".join(sections)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}\n"


def _sections(results: Results) -> list[tuple[str, str]]:
    tables: dict[str, Callable[[Results], str]] = {
        "Machine": _machine,
        "Smoke suite": _smoke,
        "Training": _training,
        "Loss": _losses,
        "Scoring": _scoring,
        "Several cells at once": _cells,
        "Two processes": _processes,
    }
    return [(title, text) for title, table in tables.items() if (text := table(results))]


def _of(results: Results, part: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """(arguments, figures) of each measurement of a part that succeeded."""
    return [(key[1:], value) for key, value in results.items() if key[0] == part and "error" not in value]


def _table(header: Sequence[str], rows: Sequence[Row]) -> str:
    return common.table(header, rows) if rows else ""


def _machine(results: Results) -> str:
    return _table(["", "value"], [[str(name), str(v)] for _, f in _of(results, "machine") for name, v in f.items()])


def _smoke(results: Results) -> str:
    lines = []
    for _, figures in _of(results, "smoke"):
        lines.append(
            f"{figures['passed']} passed, {figures['failed']} failed, {figures['skipped']} skipped, "
            f"in {figures['seconds']:.0f} s (`pytest -m gpu tests/gpu`).\n"
        )
        lines += [f"- failed: {text}" for text in figures["failures"]]
        lines += [f"- skipped: {text}" for text in figures["skips"]]
    return "\n".join(lines)


def _training(results: Results) -> str:
    beside = {arguments: figures["tokens_per_s"] for arguments, figures in _of(results, "peft")}
    rows = []
    for (model, variant), figures in _of(results, "training"):
        baseline = max((speed for (name, _), speed in beside.items() if name == model), default=None)
        rows.append(
            [
                f"ours, TABuv r 8, {model}, {variant}",
                f"{figures['tokens_per_s']:,.0f}",
                "" if baseline is None else f"{figures['tokens_per_s'] / baseline:.2f}",
                f"{figures['flop_per_s'] / 1e12:.2f}",
                f"{figures['share']:.3f}",
                _gigabytes(figures["peak"]) + (f" ({figures['halvings']} halvings)" if figures["halvings"] else ""),
                _gigabytes(figures["forecast"]),
                f"{figures['start']:.1f} s",
            ]
        )
    for (model, order), figures in _of(results, "peft"):
        speed, peak = f"{figures['tokens_per_s']:,.0f}", _gigabytes(figures["peak"])
        rows.append([f"PEFT LoRA + Trainer, {model}, bfloat16, {order}", speed, "", "", "", peak, "", ""])
    header = ["what", "tokens/s", "x PEFT", "TFLOP/s", "share of the bound", "peak memory", "forecast", "first steps"]
    return _table(header, rows)


def _losses(results: Results) -> str:
    rows = []
    for (positions, hidden, vocabulary), ways in _of(results, "losses"):
        for way, figures in ways.items():
            shape = f"{way}: {positions:,} positions, hidden {hidden:,}, vocabulary {vocabulary:,}"
            if "missing" in figures:
                rows.append([shape, figures["missing"], "", "", ""])
                continue
            memory = "" if figures["memory"] is None else f"{figures['memory'] / 1e6:.0f} MB"
            numbers = [f"{figures['loss']:.4f}", f"{figures['gradient']:.4f}"]
            rows.append([shape, f"{1e3 * figures['seconds']:.2f} ms", memory, *numbers])
    return _table(["loss, forward and backward", "time", "memory", "mean loss", "gradient's norm"], rows)


def _scoring(results: Results) -> str:
    ways = {way: figures for (way, *_), figures in _of(results, "scoring") if "outputs" in figures}
    rows = []
    for way, figures in ways.items():
        first = ways.get("ours", figures)["outputs"]
        same = sum(a == b for a, b in zip(first, figures["outputs"], strict=True))
        speed = figures["tokens"] / figures["seconds"]
        rows.append(
            [way, f"{speed:,.0f}", f"{figures['seconds']:.2f}", _gigabytes(figures["peak"]), f"{same} of {len(first)}"]
        )
    return _table(["answers by", "tokens/s", "seconds", "peak memory", "the same texts as ours"], rows)


def _cells(results: Results) -> str:
    measured = {at_once: figures["seconds"] for (at_once,), figures in _of(results, "cells")}
    first = measured.get(1)
    rows = [
        [f"{at_once} at once", f"{seconds:.1f}", "" if first is None else f"{first / seconds:.2f}"]
        for at_once, seconds in measured.items()
    ]
    return _table(["four cells, on one device", "seconds of the command", "x one at once"], rows)


def _processes(results: Results) -> str:
    rows = []
    for (size, shard), figures in _of(results, "processes"):
        name = f"{size} {'process' if size == 1 else 'processes'}{', sharded base' if shard == 'true' else ''}"
        rows.append([name, f"{figures['tokens_per_s']:,.0f}", _gigabytes(figures["peak"])])
    return _table(["training by", "tokens/s", "peak memory of the first"], rows)


def _missing(results: Results) -> list[str]:
    lines = [f"- {' '.join(map(str, key))}: {value['error']}" for key, value in results.items() if "error" in value]
    return [_section("Not measured", "\n".join(lines))] if lines else []


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB"


def _without_texts(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures without the answers, which are long, and which nobody needs twice."""
    return {name: value for name, value in figures.items() if name != "outputs"}
