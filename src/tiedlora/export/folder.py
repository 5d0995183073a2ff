"""An export folder of a finished run: the weights in the chosen form, a model card, and a task for lm-eval.

A_l = diag(u_l) A and B_l = diag(v_l) B are an ordinary LoRA pair, so PEFT's folder is exact for any specification. Only
the tying is lost: PEFT's format needs a pair for every layer.

The card (export.card.md.j2) says what the adapter is, its training data, its scores, and the command that made it. The
task (export.task.yaml.j2) gives this project's score in lm-evaluation-harness: its rows are those of
scores/<split>.answers.jsonl, with the prompts and references that were used, so the harness asks the same questions.
This works only for tasks whose answer is a number after `####` (GSM8K and the generated tasks).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch.nn import functional as F

from tiedlora import storage
from tiedlora.adapter import arms
from tiedlora.adapter.attach import attach_saved
from tiedlora.adapter.files import TENSORS, write_tensors
from tiedlora.adapter.parts import TiedAdapter
from tiedlora.config import compose
from tiedlora.config.check import check_dtype
from tiedlora.config.embedded import EMBEDDED, EmbeddedModel
from tiedlora.config.identity import identity
from tiedlora.config.schema import Config, ModelConfig, TaskConfig
from tiedlora.data.encoding import DATE, THINKING
from tiedlora.description import DESCRIPTION
from tiedlora.errors import UserError
from tiedlora.families import layout_of
from tiedlora.models.base_model import load_base
from tiedlora.models.device import resolve_device
from tiedlora.other_methods import FULL, PEFT_FILE, REGISTERED
from tiedlora.records.interval import Interval, Unit
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord
from tiedlora.records.scores import RunScores, read_run_scores, read_scores
from tiedlora.tasks import NoSuchTask, load_task
from tiedlora.tasks.gsm8k import FLEXIBLE, STRICT, Gsm8k
from tiedlora.text import visible

PEFT_TENSORS = "adapter_model.safetensors"


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


def export_run(run: RunFolder, record: RunRecord, config: Config, out: Path, options: ExportOptions) -> None:
    """Write the folder `out`. Its files are there only when all of them are complete.

    Args:
        out: a folder that does not exist or is empty.

    Raises:
        UserError: a file is damaged, the run cannot be merged, or the base model cannot be loaded or is another one.
        OSError: `out` cannot be written.
    """
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        # Inside, because `out` may be a mount point, or the shell's folder.
        with TemporaryDirectory(dir=out, prefix=".unfinished-") as unfinished:
            inside = Path(unfinished)
            _write_weights(run, record, config, inside, options)
            scored = read_run_scores(run, record)
            is_asked = options.form != "hub-card" and options.split in scored.splits and record.keeps_texts
            task = _write_task(run, config, inside, options) if is_asked and _is_gsm8k(config.task) else ""
            (inside / "README.md").write_text(card(record, scored, config, options, task), encoding="utf-8")
            for entry in inside.iterdir():
                entry.replace(out / entry.name)
    except BaseException:
        if is_new:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _write_weights(run: RunFolder, record: RunRecord, config: Config, out: Path, options: ExportOptions) -> None:
    """Write the adapter or the merged weights.

    Raises:
        UserError: a file of the adapter is not the one of the record; or as `export_run`.
    """
    found = run.checksums(*record.files)
    if changed := next((name for name, sha256 in record.files.items() if found.get(name) != sha256), None):
        raise UserError(f"{run.path / changed}: is missing, or has changed since the run; nothing is exported")
    adapter, _ = arms.read(run.adapter)
    hub_name, revision = base_to_load(config.model), record.base.version if config.model.source == "hub" else None
    if (is_full := config.tying.method == FULL) and options.form != "merged":
        raise UserError(f"--to {options.form}: full fine-tuning has no adapter; --to merged writes the whole model")
    if isinstance(adapter, arms.ArmSpec) and not is_full:
        if options.form == "merged":
            raise UserError(
                f"--to merged: is for this project's own adapters; export the run with --to peft, and use PEFT's "
                f"merge_and_unload if {config.tying.method} has it"
            )
        if options.form == "peft" and config.tying.method in REGISTERED:
            raise UserError(
                f"--to peft: PEFT does not know {config.tying.method}, a method of another program; --to hub-card "
                "copies the adapter for tiedlora.load, after that program has registered it"
            )
        own = [DESCRIPTION] if options.form == "hub-card" else []
        _copy(run, out, *own, arms.read_description(run.adapter).tensors_file)
        if (peft_file := run.adapter / PEFT_FILE).is_file():
            # The run's own file names the base as the run does: of an embedded model, by a file that is on no hub.
            about_base = {"base_model_name_or_path": hub_name, "revision": revision}
            storage.write_json(out / PEFT_FILE, storage.read_json(peft_file) | about_base)
        return
    if options.form == "hub-card":
        _copy(run, out, DESCRIPTION, TENSORS)
        return
    if options.form == "peft" and isinstance(adapter, TiedAdapter):
        to_peft(adapter, out, hub_name, revision)
        return
    if config.model.quantization:
        raise UserError(
            f"--to merged: the run was trained on quantised weights (model.quantization={config.model.quantization}), "
            "and merging would lose the update; use --to peft or --to hub-card, which keep the adapter apart"
        )
    whole = replace(config.model, device_map=None)
    base = load_base(whole, "float32", resolve_device("cpu"), Path(compose.cache_is_in(config, options.cache)))
    to_merged(attach_saved(base.model, run.adapter, base.record), base.tokenizer, out, options.dtype)


def _copy(run: RunFolder, out: Path, *names: str) -> None:
    """Copy these files of the adapter. A stranger's folder may hold other files, and links."""
    for name in names:
        if (run.adapter / name).is_file():
            shutil.copyfile(run.adapter / name, out / name)


def _is_gsm8k(task: TaskConfig) -> bool:
    """Whether it is gsm8k, which lm-eval can score. A task that another program has registered is unknown here."""
    try:
        return isinstance(load_task(task), Gsm8k)
    except NoSuchTask:
        return False


def _write_task(run: RunFolder, config: Config, out: Path, options: ExportOptions) -> str:
    """Write `<name>.yaml` and its rows for lm-evaluation-harness, and return what the card says of its use.

    Where lm-eval would ask other prompts, nothing is written, and the card says why.
    """
    thinking = config.task.template_options.get(THINKING)
    if config.task.template_options not in ({}, {THINKING: thinking}) or not isinstance(thinking, bool | None):
        return (
            "There is no task for lm_eval here: it gives a chat template no other option than "
            f"`{THINKING}`=True or False, so its prompts would be others."
        )
    # The name becomes the name of two files.
    name = f"tiedlora_{config.task.name}_{options.split}".replace("/", "_")
    scored = read_run_scores(run).of(options.split)[0]
    asked = read_scores(run.scores_file(options.split, scored.kind)).rows
    rows = [{"prompt": row.prompt, "answer": "".join(row.references[:1])} for row in asked]
    storage.write_json_lines(out / f"{name}.jsonl", rows)
    patterns = {"strict": STRICT.pattern, "flexible": f"({FLEXIBLE.pattern})"}
    text = _rendered("export.task.yaml.j2", name=name, task=config.task, **patterns)
    storage.write_bytes(out / f"{name}.yaml", text.encode())
    dtype = options.dtype if options.form == "merged" else config.train.dtype
    model = ["pretrained=BASE_MODEL,peft=." if options.form == "peft" else "pretrained=.", f"dtype={dtype}"]
    is_named = options.form == "peft" and config.model.source == "hub" and not config.model.quantization
    version = config.model.commit or config.model.revision
    model += [f"revision={version}"] if is_named and version != "main" else []
    model += [] if thinking is None else [f"{THINKING}={thinking}"]
    chat_template = " --apply_chat_template" if config.task.chat_template else ""
    use = (
        f"The {len(rows)} {options.split} rows below, asked by lm-evaluation-harness (start it inside this folder): "
        f"`lm_eval --model hf --model_args {','.join(model)} --include_path . --tasks {name} "
        f"--batch_size {config.score.batch_size}{chat_template}`"
    )
    if config.model.quantization:
        # transformers 5 takes no load_in_4bit any more, and lm-eval has no other way to quantise.
        use += (
            ". BASE_MODEL must be a folder of quantised weights: load the base as above, and call `save_pretrained` of "
            "it and of its tokenizer"
        )
    if config.task.chat_template:
        use += f". A chat template that asks for the date gets today's from lm_eval; in this run it is always {DATE}"
    return use


def card(record: RunRecord, scores: RunScores, config: Config, options: ExportOptions, task: str = "") -> str:
    """The text of README.md for an exported folder.

    Args:
        task: a sentence on the task for lm-evaluation-harness; empty if there is none.
    """
    return _rendered(
        "export.card.md.j2",
        record=record,
        scores=scores,
        config=config,
        terms=identity(config.tying).get("terms"),
        embedded=_embedded(config.model),
        base=base_to_load(config.model),
        label=record.arm.configuration,
        kind=_kind(config.tying.method),
        made_with=[code for code in record.code_versions if code.commit is not None or code.version is not None],
        command=compose.command(config),
        options=options,
        task=task,
    )


def _kind(method: str | None) -> str:
    """Whose method it is: tied (ours), full (all weights), foreign (of another program) or peft."""
    if method is None:
        return "tied"
    return "full" if method == FULL else "foreign" if method in REGISTERED else "peft"


def _embedded(model: ModelConfig) -> EmbeddedModel | None:
    return EMBEDDED.get(model.name) if model.source == "embedded" and not model.path else None


def base_to_load(model: ModelConfig) -> str:
    """The name of the base model for another program: of an embedded model, that of its original on the hub."""
    embedded = _embedded(model)
    return embedded.hub if embedded else model.name


def _rendered(template: str, **values: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"json": _json, "cell": _cell, "code": _code, "score": _score}
    return environment.get_template(template).render(values)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _cell(value: object) -> str:
    """A text of the record, escaped so that it can end neither the cell nor the line and is not read as HTML."""
    return visible(str(value)).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    """A prompt template as JSON, without backticks: a backtick would end the code span around it."""
    return visible(_json(text).replace("`", "\\u0060"))


def _score(interval: Interval, metric: str) -> str:
    unit = Unit.of(metric)
    return unit.text(interval, unit=" nats" if unit is Unit.NATS else " %")


# --- The weights: a standard PEFT LoRA folder, and the base model with the update in it.


@torch.no_grad()
def to_peft(adapter: TiedAdapter, folder: Path | str, base: str, revision: str | None = None) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads and that gives the same outputs.

    Args:
        base: the name of the base model, for programs that load it themselves. A path would be one of this machine.
        revision: the revision of the base model on the hub.

    Raises:
        UserError: `adapter` is none of this project.
    """
    if not isinstance(adapter, TiedAdapter):
        raise UserError(f"to_peft: the adapter is of {type(adapter).__name__}; give a TiedAdapter (attached.adapter)")
    layout, tensors, in_layer = layout_of(adapter.architecture), {}, set()
    pairs, rank, alpha = adapter.pairs(), adapter.rank, adapter.alpha
    # Several targets of one fused module, and several terms, are stacked, so that a module has another rank. PEFT reads
    # ranks and alphas by module, and rsLoRA's scale, but llama.cpp and vLLM do not: they would apply another update, or
    # refuse it. So the scale is in the factors, rows of zeros give every module one rank, and lora_alpha / r is 1.
    if adapter.scaling != "standard" or any(len(A) != rank for A, _ in pairs.values()):
        pairs = adapter.pairs(adapter.scale)
        rank = max(len(A) for A, _ in pairs.values())
        alpha = float(rank)
    for path, (A, B) in pairs.items():
        zeros = rank - len(A)
        # F.pad copies, also without zeros: safetensors refuses tensors that share memory, as the layers of a tied A do.
        tensors[f"base_model.model.{path}.lora_A.weight"] = F.pad(A.float().cpu(), (0, 0, 0, zeros)).contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = F.pad(B.float().cpu(), (0, zeros)).contiguous()
        # A path inside a layer means this module in every layer. The last name is not enough: GPT-2 has two c_proj.
        in_layer.add(path.removeprefix(f"{layout.layers}.").partition(".")[2])
    # Another part of a model with a layout by hand may have modules of the same names, such as the one for images.
    whole_paths = bool(adapter.architecture.layout.layers)
    some_layers = len(adapter.layers) < adapter.architecture.layers and not whole_paths
    # The names are those of PEFT's LoraConfig.
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        # Always written: PEFT's scale follows from it and from r, and its default of lora_alpha is 8 at every rank.
        "lora_alpha": alpha,
        "lora_dropout": adapter.tying.dropout,
        "fan_in_fan_out": layout.transposed,
        "target_modules": sorted(adapter.paths() if whole_paths else in_layer),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "layers_to_transform": adapter.layers if some_layers else None,
        # PEFT needs the name of the list of layers beside layers_to_transform.
        "layers_pattern": layout.layers.rpartition(".")[2] if some_layers else None,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / PEFT_TENSORS, metadata={"format": "pt"})
    storage.write_json(folder / PEFT_FILE, config)


def to_merged(attached: arms.Arm, tokenizer: Any, folder: Path | str, dtype: str = "float32") -> None:
    """Write the base model with the update in its weights. `AutoModelForCausalLM` loads it.

    The model keeps the update in its weights, has no adapter afterwards, and has become `dtype`. The sum is
    computed in float32. A narrower `dtype` rounds it: bfloat16 keeps 8 bits of a weight, so an update below 1/256 of
    its weight is mostly lost, and the outputs change.

    Args:
        attached: an adapter on a float32 model.
        dtype: float32 or bfloat16.
        tokenizer: is saved in the same folder; None saves no tokenizer.

    Raises:
        UserError: the model is not float32, or `dtype` is another one. The model is then as it was.
    """
    model: Any = attached.model
    check_dtype(dtype)
    if model.dtype != torch.float32:
        raise UserError(f"export: the base model is {model.dtype}; load it in float32, so that merging does not round")
    attached.fuse()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
