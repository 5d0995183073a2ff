"""The model card of an exported adapter: what it is, its training data, its scores, and the command that made it.

The scores also stand as `model-index` in its front matter, which the hub reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from tiedlora.config import command
from tiedlora.config.identity import identity, start_of
from tiedlora.config.identity import label as label_of
from tiedlora.config.schema import FORGETTING, Config
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.run_record import RunRecord, SplitScores
from tiedlora.text import visible

COMMIT = re.compile(r"[0-9a-f]{40}")


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
    label = start_of(identity(config.tying)) or label_of(config.tying)
    is_other = config.tying.method is not None
    kind = f"PEFT adapter ({config.tying.method})" if is_other else "Tied-LoRA adapter (arXiv 2311.09578)"
    title = f"{label}{'' if is_other else f', r = {config.rank.r}'}, on {config.task.name}"
    front_matter: dict[str, Any] = {
        "base_model": record.base.name,
        "library_name": _FORMS[form].library,
        "pipeline_tag": "text-generation",
        "tags": ["peft"] if is_other else ["tied-lora", "lora", "arxiv:2311.09578"],
    }
    if index := _model_index(record, config, title):
        front_matter["model-index"] = index
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
            shown = _nats if is_loss(metric) else _percent
            base = "" if scores.base is None else shown(scores.base[metric])
            lines.append(f"| {split} | {metric} | {scores.rows} | {base} | {shown(adapted)} |")
    return lines


def _nats(interval: Interval) -> str:
    return f"{interval.value:.3f} nats [{interval.low:.3f}, {interval.high:.3f}]"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _model_index(record: RunRecord, config: Config, name: str) -> list[dict[str, Any]]:
    """The value of `model-index`: every metric of every split with its interval; empty if nothing is scored.

    Args:
        name: the model's name on its card.
    """
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=config.task.hub.id or config.task.name,
            dataset_name=config.task.name,
            dataset_config=config.task.hub.subset,
            dataset_split=_rows_of(split, config),
            dataset_revision=_commit(config),
            metric_type=metric,
            metric_name=f"{metric} ({_interval_words(scores, metric, interval)})",
            metric_value=interval.value,
            metric_args={"low": interval.low, "high": interval.high, "level": 0.95, "rows": scores.rows},
        )
        for split, scores in record.scores.items()
        if split != FORGETTING
        for metric, interval in scores.metrics.items()
    ]
    index: list[dict[str, Any]] = eval_results_to_model_index(name, results) if results else []
    return index


def _interval_words(scores: SplitScores, metric: str, interval: Interval) -> str:
    """Such as `95 % interval 0.295 to 0.413 over 250 rows`."""
    unit = " nats per token" if is_loss(metric) else ""
    return f"95 % interval {interval.low:.3f} to {interval.high:.3f}{unit} over {scores.rows} rows"


def _rows_of(split: str, config: Config) -> str:
    """Our split as the hub names it, such as validation[2000:]; in words where the harness cuts it out of train."""
    hub = config.task.hub
    if hub.id is None:
        return split
    return hub.splits.get(split, f"{split}, cut out of {hub.splits.get('train', 'train')}")


def _commit(config: Config) -> str | None:
    """The revision of the data set, if it is a commit: a branch moves."""
    revision = config.task.hub.revision
    return revision if COMMIT.fullmatch(revision) else None
