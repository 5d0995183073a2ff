"""Runs grouped into the cells of a comparison: which runs may be averaged, and at which learning rate.

A *setting* is everything that two configurations must share to be compared: base model, task and protocol,
training but for the rate, scoring. A *cell* is one configuration at one rank in a setting; its runs differ in seed
and learning rate alone. The rate is chosen on validation.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from tiedlora.report.runs import LeftOut, Run

OF_A_CELL = ("tying", "rank", "seed")
"""Keys of a run's identity that a setting leaves open; and of train, these:"""
OF_A_CELL_IN_TRAIN = ("lr", "lr_factor")


@dataclass
class Rate:
    """One learning rate's trial in a cell."""

    lr: float
    seeds: list[int]
    score: float | None
    """Mean over the seeds that all rates share of the task's first metric on validation."""
    loss: float
    failed: bool
    """A run at this rate failed, so the rate cannot be chosen."""


@dataclass
class Cell:
    """One configuration at one rank in one setting, at the chosen learning rate."""

    setting: str
    """The setting's key: cells with equal keys may be compared."""
    model: str
    task: str
    configuration: str
    """Its name, with what differs where two cells of a setting would share it."""
    rank: int
    label: str = ""
    """LoRA, TABuv, ...: the name alone."""
    variant: str = ""
    """What sets it apart from cells that would otherwise have the same name, such as train.steps=300."""
    runs: list[Run] = field(default_factory=list)
    """At the chosen rate, by seed."""
    rates: list[Rate] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    """What a reader must know before using the cell's numbers."""

    @property
    def lr(self) -> float:
        return self.runs[0].lr

    @property
    def params(self) -> int:
        return self.runs[0].params

    @property
    def share(self) -> float:
        """Of LoRA's trainable parameters at the same rank."""
        return float(self.runs[0].record["share_of_lora"])

    @property
    def name(self) -> str:
        return f"{self.configuration} r={self.rank}"

    def digests(self, split: str) -> set[str]:
        """Digests of the split's rows over the runs that scored it."""
        return {run.splits[split]["digest"] for run in self.runs if split in run.splits}


def cells(runs: Sequence[Run], left_out: Iterable[LeftOut] = ()) -> list[Cell]:
    """Group the runs, choose rates, and mark what is mixed; sorted for a table."""
    grouped: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        grouped[keys(run)].append(run)
    failures = [folder.about for folder in left_out if folder.about]
    found = []
    for (setting, _), same in grouped.items():
        first = same[0]
        cell = Cell(setting, first.model, first.task, first.configuration, first.rank, first.configuration)
        _choose_rate(cell, same, [about for about in failures if _could_be(about, first)])
        _mark_mixtures(cell)
        found.append(cell)
    _name_variants(found, {setting_and_own: same[0] for setting_and_own, same in grouped.items()})
    return sorted(found, key=lambda cell: (cell.model, cell.task, cell.variant, cell.rank, cell.params))


def keys(run: Run) -> tuple[str, str]:
    """The keys of a run's setting and, within it, of its cell."""
    setting, own = _parts(run)
    return tuple(json.dumps(part, sort_keys=True) for part in (setting, own))  # type: ignore[return-value]


def _parts(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    identity = run.record["identity"]
    setting = {key: value for key, value in identity.items() if key not in OF_A_CELL}
    setting["train"] = {key: value for key, value in identity["train"].items() if key not in OF_A_CELL_IN_TRAIN}
    setting["base"] = run.record["base"].get("digest")
    own = {"tying": identity["tying"], "rank": identity["rank"], "lr_factor": identity["train"].get("lr_factor")}
    return setting, own


def _could_be(about: dict[str, Any], run: Run) -> bool:
    """Whether a folder without a result, by its name, may belong to the run's cell."""
    name = str(run.record["run_id"]).split("-")
    return bool(
        about["label"] == name[0]
        and about["rank"] == run.rank
        and about["task"] == run.task
        and run.run_id.startswith(f"{about['label']}-r{about['rank']}-{about['task']}-{about['model']}-s")
    )


def _choose_rate(cell: Cell, runs: list[Run], failures: list[dict[str, Any]]) -> None:
    by_rate: dict[float, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        by_rate[run.lr][run.seed] = run
    broken = {about.get("lr") for about in failures if about.get("failed")}
    usable = {lr: same for lr, same in by_rate.items() if lr not in broken} or by_rate
    shared = set.intersection(*(set(same) for same in usable.values()))
    for lr, same in sorted(by_rate.items()):
        chosen = [same[seed] for seed in sorted(shared & set(same) or same)]
        scores = [_validation_score(run) for run in chosen]
        score = None if None in scores else mean(value for value in scores if value is not None)
        loss = mean(run.record["training"]["validation_loss_last"] for run in chosen)
        cell.rates.append(Rate(lr, sorted(same), score, loss, lr in broken))
    # Equal scores: the lower validation loss, then the lower rate, so that the choice never depends on order.
    by_score = all(rate.score is not None for rate in cell.rates if rate.lr in usable)
    best = min(
        (rate for rate in cell.rates if rate.lr in usable),
        key=lambda rate: (-rate.score if by_score and rate.score is not None else 0.0, rate.loss, rate.lr),
    )
    cell.runs = [by_rate[best.lr][seed] for seed in best.seeds]
    rates = [rate.lr for rate in cell.rates]
    if len(rates) > 2 and best.lr in (rates[0], rates[-1]):
        cell.marks.append(f"the chosen rate {best.lr:g} is at the edge of those tried ({rates[0]:g} to {rates[-1]:g})")
    if len(usable) > 1 and not shared:
        cell.marks.append("learning rates were tried with different seeds, so their choice is not paired")
    if len(rates) > 1 and not by_score:
        cell.marks.append("the rate was chosen by validation loss, since not all runs have a validation score")
    for about in failures:
        if about.get("lr") in (None, best.lr) or about.get("failed"):
            what = "failed" if about.get("failed") else "is not finished"
            rate = f" at lr {about['lr']:g}" if about.get("lr") else ""
            cell.marks.append(f"seed {about['seed']}{rate} {what}")


def _validation_score(run: Run) -> float | None:
    found = run.splits.get("validation")
    return None if found is None else float(next(iter(found["metrics"].values()))["value"])


def _mark_mixtures(cell: Cell) -> None:
    records = [run.record for run in cell.runs]
    commits = sorted({str(record["code"].get("commit"))[:8] for record in records})
    if len(commits) > 1:
        cell.marks.append(f"mixed commits: {', '.join(commits)}")
    if any(record["code"].get("dirty") for record in records):
        cell.marks.append("made by uncommitted code")
    for package in ("torch", "transformers"):
        versions = sorted({str(record["versions"].get(package)) for record in records})
        if len(versions) > 1:
            cell.marks.append(f"mixed versions of {package}: {', '.join(versions)}")
    if len(devices := sorted({str(record.get("device")) for record in records})) > 1:
        cell.marks.append(f"mixed devices: {'; '.join(devices)}")
    trained_on = {json.dumps(record["data"].get("train", {}).get("digest")) for record in records}
    if len(trained_on) > 1:
        cell.marks.append("mixed data: seeds were trained on different rows")


def mixed_data(cell: Cell, split: str) -> bool:
    """Whether the cell's runs may not be averaged, because they saw different rows."""
    trained_on = {json.dumps(run.record["data"].get("train", {}).get("digest")) for run in cell.runs}
    return len(trained_on) > 1 or len(cell.digests(split)) > 1


def _name_variants(found: list[Cell], runs: dict[tuple[str, str], Run]) -> None:
    """Say what differs where settings, or cells of a setting, would have the same name."""
    described = list(runs.values())
    by_name: dict[tuple[str, str], list[int]] = defaultdict(list)
    by_cell: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for number, cell in enumerate(found):
        by_name[cell.model, cell.task].append(number)
        by_cell[cell.setting, cell.configuration, cell.rank].append(number)
    for part, groups in ((0, by_name), (1, by_cell)):
        for numbers in groups.values():
            flat = [dict(_flat(_parts(described[number])[part])) for number in numbers]
            names = sorted({key for one in flat for key in one})
            varying = [name for name in names if len({json.dumps(one.get(name)) for one in flat}) > 1]
            for number, one in zip(numbers, flat, strict=True):
                text = ", ".join(f"{name}={_short(one.get(name))}" for name in varying)
                if part == 0:
                    found[number].variant = text
                elif text:
                    found[number].configuration += f" ({text})"


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).replace("\n", " ")
    return text if len(text) <= 24 else f"{text[:21]}..."
