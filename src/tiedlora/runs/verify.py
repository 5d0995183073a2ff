"""Check a finished run: does the folder of a finished run agree with its record, and can its numbers be reproduced?

Each check names what does not agree: a configuration key, a data row, a file, a number, a row of scores. The last
findings name the recorded values that no check has compared, such as seconds, which nothing here can tell.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tiedlora import storage, tying
from tiedlora.adapter import TiedAdapter, arms, files
from tiedlora.analysis.intervals import mean_loss
from tiedlora.config import compose
from tiedlora.config.identity import identity, leaves, run_id
from tiedlora.config.schema import FORGETTING
from tiedlora.config.sizes import trainable_params
from tiedlora.data.batching import BatchSampler
from tiedlora.data.encoding import EncodedRows, Encoder, load_or_encode
from tiedlora.description import BaseModelRecord
from tiedlora.errors import UserError
from tiedlora.models.base_model import load_tokenizer
from tiedlora.models.identity import known_digest, tokens_digest
from tiedlora.records.provenance import TOKEN_FILES
from tiedlora.records.rows import read_metrics, read_validation_losses
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import verify_scores
from tiedlora.runs.checked_run import CheckedRun, Finding, compared, nearly
from tiedlora.scoring.passages import as_passages
from tiedlora.tasks import Example, digest, load_examples, load_task
from tiedlora.tasks.rows import ChangedRows
from tiedlora.text import visible
from tiedlora.tying import DECIDING_KEYS

LOSS_TOLERANCE = 1e-6
"""Between a validation loss in metrics.jsonl and the losses of its rows: early versions added up in float32."""


def verify(path: Path, *, data_root: str | None = None, rows: int = 32, cache: Path | None = None) -> list[Finding]:
    """Check a run's folder.

    Args:
        data_root: the folder of the rows, as for train.py; None takes the run's own, or that of TIEDLORA_DATA.
        rows: at least so many rows of each file of scores are scored again, in whole batches; 0 scores none.
        cache: the folder of converted models; None takes TIEDLORA_CACHE, or else the run's own.

    Raises:
        UserError: the folder holds no finished run, or no readable configuration.
    """
    folder = RunFolder(path.absolute())
    record = folder.finished_record()
    config = compose.read_config(folder.config_file)
    # A run that was moved here names a folder of another machine.
    config.data_root = compose.rows_are_in(config, data_root)
    config.cache = compose.cache_is_in(config, cache)
    run = CheckedRun(folder, record, leaves(storage.read_json(folder.result_file)), config, load_task(config.task))
    checks: dict[str, Callable[[CheckedRun], Iterator[Finding]]] = {
        "configuration": _check_configuration,
        "files": _check_files,
        "files of scores": verify_scores.read_files,
        "data": _check_data,
        "adapter": _check_adapter,
        "base": _check_base,
        "parameters": _check_parameters,
        "training": _check_training,
        "tokens": _check_tokens,
        "scores": verify_scores.check_scores,
    }
    if rows > 0:
        checks["regenerate"] = functools.partial(verify_scores.regenerate, least=rows)
    findings = [finding for name, check in checks.items() for finding in _guarded(name, check(run))]
    return [*findings, *run.unchecked(findings)]


def _guarded(name: str, check: Iterator[Finding]) -> Iterator[Finding]:
    """The findings of a check. An error of the check becomes a finding too, so that the other checks still run."""
    try:
        yield from check
    except UserError as error:
        yield Finding(name, False, str(error))
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        # Such as of rows that somebody has changed.
        yield Finding(name, False, f"cannot be checked ({error!r:.200})")


def _check_configuration(run: CheckedRun) -> Iterator[Finding]:
    """Check that config.yaml, result.json (configuration and identity) and the folder's name describe one run."""
    values = {f"config.{key}": pair for key, pair in compose.compared_keys(run.config, run.record.config.tree).items()}
    own, recorded = leaves(compose.as_recorded(identity(run.config))), leaves(run.record.identity.tree)
    values |= {f"identity.{key}": (own.get(key), recorded.get(key)) for key in sorted({*own, *recorded})}
    arm = leaves({"arm": compose.as_recorded(asdict(run.record.arm))})
    found = {"run_id": run_id(run.config), "seed": run.config.seed, "status": "done"}
    # Records of earlier versions do not name the arm.
    values |= run.beside_record(found | {key: value for key, value in arm.items() if key in run.recorded})
    name = run.folder.path.name
    values["the folder's name"] = name, run.record.run_id
    yield compared("configuration", values, f"config.yaml, result.json and the folder's name make one id, {name}")


def _check_files(run: CheckedRun) -> Iterator[Finding]:
    """Check the adapter's files against the sha256 values and the size in result.json."""
    if run.folder.has_adapter:
        recorded = run.record.files
        here = run.folder.checksums(*recorded)
        found: dict[str, object] = {f"files.{name}": here.get(name) for name in recorded}
        found["adapter_bytes"] = sum((run.folder.path / name).stat().st_size for name in here)
        yield compared("files", run.beside_record(found), f"{len(recorded)} files have the sha256 of result.json")


def _check_data(run: CheckedRun) -> Iterator[Finding]:
    """Check the rows of every split that the run used, by content."""
    digests = {scored.split: scored.record.digest for scored in run.scored if not scored.is_base}
    digests |= {split: data.digest for split, data in run.record.data.items()}
    for split, recorded in digests.items():
        check = f"data {split}"
        try:
            rows = run.examples[split] = _rows_here(run, split)
        except ChangedRows as error:
            yield Finding(check, False, str(error))
            continue
        except UserError as error:
            yield Finding(check, None, f"cannot be read here ({error})")
            continue
        sha256 = digest(rows)
        name = f"data.{split}.digest" if split in run.record.data else f"the sha256 of {split}"
        finding = compared(check, {name: (sha256, recorded)}, f"{len(rows):,} rows, sha256 {sha256[:12]}")
        yield finding if finding.ok else _with_changed_row(run, split, finding)


def _rows_here(run: CheckedRun, split: str) -> list[Example]:
    """The rows of a split. A file of scores has the whole passages of neutral text, so their source is not needed.

    Raises:
        UserError: they cannot be read.
    """
    if split != FORGETTING:
        return load_examples(run.task, split, run.config.data_root)
    if not run.record.keeps_texts:
        raise UserError("the study keeps no texts")
    (rows, *_) = (scored.file.rows for scored in run.scored if scored.record.split == split)
    return list(as_passages(["".join(row.references[:1]) for row in rows]))


def _with_changed_row(run: CheckedRun, split: str, finding: Finding) -> Finding:
    """The finding about changed data, with the first row that differs from that of a file of scores."""
    files = [scored.file for scored in run.scored if scored.record.split == split and run.record.keeps_texts]
    for row, example in zip(files[0].rows if files else [], run.examples[split], strict=False):
        # A shortened prompt is not equal to the row's prompt.
        prompts = () if row.shortened else ((example.prompt, row.prompt),)
        for now, was in ((example.id, row.id), *prompts, (list(example.references), row.references)):
            if now != was:
                return replace(finding, explanation=f"row {row.id}: {now!r:.80} was {was!r:.80}; {finding.explanation}")
    return finding


def _check_adapter(run: CheckedRun) -> Iterator[Finding]:
    """Check that the adapter's tensors have their own hash, and that adapter.json describes this run's adapter."""
    if not run.folder.has_adapter:
        yield Finding("adapter", None, "the study keeps only its sha256; the run's command gives the files again")
        return
    saved, base = arms.read(run.folder.adapter)
    config = run.config
    architecture = config.model.architecture
    values: dict[str, tuple[object, object]] = {
        "its base model": (base, run.record.base),
        "its seed": (saved.seed, config.seed),
        "its architecture": (saved.architecture, architecture),
    }
    if isinstance(saved, TiedAdapter):
        values |= {f"its {key}": (getattr(saved.tying, key), getattr(config.tying, key)) for key in DECIDING_KEYS}
        values |= {f"its {key}": (getattr(saved, key), getattr(config.rank, key)) for key in ("alpha", "scaling")}
        values["its rank"] = saved.rank, config.rank.r
    else:
        keys = ("method", "resolved", "targets", "layers")
        values |= {f"its {key}": (getattr(saved.tying, key), getattr(config.tying, key)) for key in keys}
    agree = "its tensors have the sha256 of adapter.json, which describes this run's adapter and base model"
    yield compared("adapter", values, agree)


def _check_base(run: CheckedRun) -> Iterator[Finding]:
    """Check the name of the base model, its digest, and that of its files that decide tokens, if it is here."""
    model = run.config.model
    found: dict[str, object] = {f"base.{name}": getattr(model, name) for name in ("name", "revision", "quantization")}
    here = known_digest(model) if model.path is None or Path(model.path).exists() else None
    if here is None:
        explanation = f"{run.record.base.digest}: the model is not here, or has its digest once it loads"
        yield Finding("base", None, f"{explanation} (regeneration compares it)")
    else:
        run.base = BaseModelRecord(model.name, model.revision, here, model.quantization)
        found["base.digest"] = here
        if TOKEN_FILES in run.record.versions:
            found[f"versions.{TOKEN_FILES}"] = tokens_digest(model, run.config.task.chat_template)
    yield compared("base", run.beside_record(found), here or f"{model.name} at {model.revision}")


def _check_parameters(run: CheckedRun) -> Iterator[Finding]:
    """Check the numbers of parameters, from the configuration, and from the file of an arm of another method."""
    config, record, architecture = run.config, run.record, run.config.model.architecture
    try:
        trained = trainable_params(config)
    except UserError as error:
        # Such as without PEFT.
        yield Finding("parameters", None, f"cannot be counted here ({error})")
        trained = None
    found: dict[str, object] = {}
    stored = None
    if config.tying.method is None:
        specified = tying.parts(config.tying, config.rank.r, architecture)
        stored = sum(math.prod(shape) for _, part, shape in specified if files.is_in_file(part))
    elif run.folder.has_adapter:
        stored = arms.stored_params(run.folder.adapter)
    if trained is not None:
        found["trainable_params"] = trained
    count = record.trainable_params if trained is None else trained
    if stored is not None:
        found["stored_params"] = None if stored == count else stored
    found["share_of_lora"] = count / tying.lora_params(config.rank.r, architecture)
    yield compared("parameters", run.beside_record(found), f"{count:,} are trained")


def _check_training(run: CheckedRun) -> Iterator[Finding]:
    """Check what the record says of training, from the configuration, metrics.jsonl and validation_losses.jsonl."""
    train = run.config.train
    found: dict[str, object] = {"training.steps": train.steps}
    others: dict[str, tuple[object, object]] = {}
    if (steps := _logged_steps(run)) is None:
        yield Finding("training", None, f"metrics.jsonl does not have each of the {train.steps} steps")
    else:
        norms = [values.get("train/grad_norm", 0.0) for values in steps]
        seconds, tokens = steps[-1].get("train/seconds", math.nan), steps[-1]["train/tokens"]
        found |= {
            "training.seconds": seconds,
            "training.tokens": tokens,
            "training.tokens_per_s": tokens / seconds,
            "training.clipped_share": sum(norm > (train.clip or math.inf) for norm in norms) / train.steps,
            "training.skipped_steps": sum("train/skipped" in values for values in steps),
        }
    loss = "validation/loss"
    logged = {row.step: row.values[loss] for row in read_metrics(run.folder.metrics_file, loss) if loss in row.values}
    by_row = {row.step: mean_loss(row) for row in read_validation_losses(run.folder.validation_losses_file)}
    # Without one of the files, the other alone gives the numbers.
    for step in sorted({*logged, *by_row}) if logged and by_row else ():
        name = f"the validation loss of step {step} in validation_losses.jsonl"
        others[name] = nearly(by_row.get(step), logged.get(step), LOSS_TOLERANCE), logged.get(step)
    if losses := logged or by_row:
        best = min(losses, key=lambda step: (losses[step], step))
        found |= {
            "training.validation_loss_first": losses[min(losses)],
            "training.validation_loss_last": losses[max(losses)],
            "training.best_step": best,
            "training.scored_step": best if run.config.score.checkpoint == "best" else train.steps,
        }
    explanation = f"{train.steps:,} steps and {len(losses)} validation losses give the recorded numbers"
    yield compared("training", run.beside_record(found) | others, explanation)


def _logged_steps(run: CheckedRun) -> list[dict[str, float | int]] | None:
    """The metrics of each optimizer step, in order; None if metrics.jsonl does not have them all."""
    name = "train/tokens"
    steps = {row.step: row.values for row in read_metrics(run.folder.metrics_file, name) if name in row.values}
    is_whole = len(steps) == run.config.train.steps == max(steps, default=0) and min(steps) == 1
    return [steps[step] for step in sorted(steps)] if is_whole else None


def _check_tokens(run: CheckedRun) -> Iterator[Finding]:
    """Check the counts of rows and tokens: encode the rows again, and draw those of each step by the seed."""
    config, record = run.config, run.record
    if missing := [split for split in record.data if split not in run.examples]:
        yield Finding("tokens", None, f"the rows of {missing[0]} cannot be read here")
        return
    digests = {split: digest(run.examples[split]) for split in record.data}
    if run.base not in (None, record.base) or any(record.data[split].digest != digests[split] for split in digests):
        yield Finding("tokens", None, "the rows or the base model here are others")
        return
    cache = Path(config.cache)
    try:
        encoder = Encoder(load_tokenizer(config.model, cache), config.task, config.model.context)
    except UserError as error:
        yield Finding("tokens", None, f"the tokenizer is not here ({error})")
        return
    fitted = {
        split: load_or_encode(encoder, run.examples[split], sha256, run.base, cache)
        for split, sha256 in digests.items()
    }
    found: dict[str, object] = {
        f"data.{split}.{name}": count for split, rows in fitted.items() for name, count in rows.counts.items()
    }
    # A reward's rows are answers that the model has sampled.
    if config.objective.name == "targets" and _logged_steps(run) is not None:
        found |= _drawn_tokens(run, fitted["train"])
    targets = [len(row.target) for row in fitted["validation"].encoded[: config.train.validation_rows]]
    losses = read_validation_losses(run.folder.validation_losses_file)
    others = {
        f"the target tokens of step {row.step} in validation_losses.jsonl": (targets, row.tokens) for row in losses
    }
    explanation = f"{len(fitted['train'].encoded):,} training rows and the seed give the recorded counts"
    yield compared("tokens", run.beside_record(found) | others, explanation)


def _drawn_tokens(run: CheckedRun, fitted: EncodedRows) -> dict[str, object]:
    """The tokens of all steps, whose rows the seed gives."""
    sampler = BatchSampler([len(row) for row in fitted.encoded], run.config.train, run.config.seed)
    numbers = [number for step in range(1, run.config.train.steps + 1) for number in sampler.rows_of_step(step)]
    rows = [fitted.encoded[number] for number in numbers]
    return {
        "training.tokens": sum(map(len, rows)),
        "training.target_tokens": sum(len(row.target) for row in rows),
    }


def line_of_run(name: str, findings: Sequence[Finding]) -> str:
    """One line for a whole run: whether it agrees, how many checks were made, and how many only up to rounding."""
    made = sum(finding.ok is not None for finding in findings)
    rounded = sum(finding.by_rounding for finding in findings)
    word = "WRONG" if any(finding.ok is False for finding in findings) else "ok"
    line = f"{word:<6} {name}  {made} of {len(findings)} checks made"
    return line + (f", {rounded} up to the rounding of another device" if rounded else "")


def lines(findings: Sequence[Finding]) -> list[str]:
    """One line for each finding, and a last line that sums up."""
    words = {True: "ok", False: "WRONG", None: "skipped"}
    rows = [f"{words[finding.ok]:<8} {finding.check:<28} {finding.explanation}" for finding in findings]
    wrong = [finding.check for finding in findings if finding.ok is False]
    last = f"does not agree: {', '.join(dict.fromkeys(wrong))}" if wrong else "everything that was checked agrees"
    return [visible(line) for line in [*rows, last]]
