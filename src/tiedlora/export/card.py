"""The model card of an exported adapter: what it is, its training data, its scores, and the command that made it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tiedlora.config import command
from tiedlora.config.identity import identity, name_of
from tiedlora.config.identity import label as label_of
from tiedlora.config.schema import Config
from tiedlora.records.interval import Unit
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.run_record import RunRecord
from tiedlora.text import visible


@dataclass(frozen=True)
class _Form:
    """One form of an exported folder."""

    library: str
    """The hub's name of the library that loads it."""
    usage: str
    """Python code that loads it; {base} is the base model's name."""


_FORMS = {
    "peft": _Form(
        "peft",
        """    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "FOLDER")""",
    ),
    "merged": _Form(
        "transformers",
        """    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("FOLDER")""",
    ),
    "hub-card": _Form(
        "tiedlora",
        """    import tiedlora
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("{base}")
    attached = tiedlora.load("FOLDER", model)""",
    ),
}


def card(record: RunRecord, config: Config, form: str, notes: list[str]) -> str:
    """The text of README.md for an exported folder.

    Args:
        form: the content of the folder: `peft`, `merged` or `hub-card` (the tied adapter itself).
        notes: sentences about this export, such as the effect of rounding.
    """
    label = name_of(identity(config.tying), config.model.architecture.layers) or label_of(config.tying)
    is_other = config.tying.method is not None
    kind = f"PEFT adapter ({config.tying.method})" if is_other else "Tied-LoRA adapter (arXiv 2311.09578)"
    title = f"{label}{'' if is_other else f', r = {config.rank.r}'}, on {config.task.name}"
    front_matter: dict[str, Any] = {
        "base_model": record.base.name,
        "library_name": _FORMS[form].library,
        "pipeline_tag": "text-generation",
        "tags": ["peft"] if is_other else ["tied-lora", "lora", "arxiv:2311.09578"],
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front_matter.items()),
        "---",
        "",
        f"# {title}",
        "",
        f"A {kind} trained with the tiedlora research harness.",
        *(["", *notes] if notes else []),
        "",
        "## Use",
        "",
        _FORMS[form].usage.format(base=record.base.name),
        "",
        f"Prompt, as it was trained: `{_template(config.task.prompt)}`"
        + (", as one user turn of the tokenizer's chat template" if config.task.chat_template else ""),
        "",
        "## Facts",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {_table_cell(fact)} |" for name, fact in _facts(record, config, label).items()),
        "",
        "## Scores",
        "",
        *_score_lines(record),
        "",
        "## Command",
        "",
        f"    {command.command(config)}",
        "",
    ]
    return "\n".join(lines)


def _facts(record: RunRecord, config: Config, label: str) -> dict[str, str]:
    base, training, train_data = record.base, record.training, record.data["train"]
    facts = {
        "base model": f"`{base.name}`, revision `{base.revision}`, `{base.digest}`",
        "configuration": ", ".join(_configuration(config, label)),
        "trainable parameters": f"{record.trainable_params:,} "
        f"({100 * record.share_of_lora:.2f} % of LoRA's at {'this rank' if config.tying.method is None else 'rank 8'})",
        "task": f"{config.task.name} (version {config.task.version}), {train_data.rows} training rows, "
        f"sha256 `{train_data.digest[:16]}`",
        "training": f"{training.steps} steps of {config.train.batch_size} rows, lr {config.train.lr:g}, "
        f"base in {config.train.dtype}, validation loss {training.validation_loss_first:.3f} -> "
        f"{training.validation_loss_last:.3f}",
        "seed": str(record.seed),
    }
    if commits := [code for code in record.code_versions if code.commit is not None]:
        facts["made with"] = ", then ".join(
            f"commit `{code.commit}`{' with uncommitted changes' if code.dirty else ''}" for code in commits
        )
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    facts["device"] = record.executions_in_words
    return facts


def _configuration(config: Config, label: str) -> Iterator[str]:
    rank, specification = config.rank, config.tying
    if specification.method is not None:
        arguments = json.dumps(specification.resolved, sort_keys=True)
        yield from (f"{specification.method} of PEFT", f"targets {specification.targets}", f"arguments `{arguments}`")
        return
    yield from (label, f"r = {rank.r}", f"alpha = {rank.alpha:g}")
    if rank.scaling != "standard":
        yield f"{rank.scaling} scaling"
    yield f"targets {specification.targets}"
    if specification.layers is not None:
        yield f"layers {specification.layers}"


def _table_cell(text: str) -> str:
    """A text of the record, escaped so that it can end neither the cell nor the line and is not read as HTML."""
    return visible(text).replace("|", "\\|").replace("<", "&lt;")


def _template(text: str) -> str:
    """A prompt template as JSON, without backticks: a backtick would end the code span around it."""
    return visible(json.dumps(text, ensure_ascii=False).replace("`", "\\u0060"))


def _score_lines(record: RunRecord) -> list[str]:
    if not record.scores:
        return ["Not scored."]
    lines = [
        "95 % intervals over which rows were drawn. They are of one seed and say nothing about another.",
        "",
        "| split | metric | rows | base | adapted |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for split, scores in record.scores.items():
        for metric, adapted in scores.metrics.items():
            unit, name = (Unit.NATS, " nats") if is_loss(metric) else (Unit.POINTS, " %")
            base = "" if scores.base is None else unit.text(scores.base[metric], unit=name)
            lines.append(f"| {split} | {metric} | {scores.rows} | {base} | {unit.text(adapted, unit=name)} |")
    return lines
