"""Check a finished run: does the folder of a finished run agree with its record, and can its numbers be reproduced?

Each check names what does not agree: a configuration key, a data row, a file, a prediction. The checks here need no
weights. The check of the adapter and the regeneration of predictions are in regenerate.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora.config import compose
from tiedlora.config.identity import config_tree, identity, run_id
from tiedlora.config.schema import FORGETTING, Config
from tiedlora.errors import UserError
from tiedlora.models.identity import known_digest
from tiedlora.records.loss_metrics import LOSS_METRICS, TARGET_LOSS, TARGET_LOSS_BY_TOKEN, is_loss, loss_scores
from tiedlora.records.rows import PredictionRow, read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import ADAPTER, TEXTS, RunRecord, Scores, SplitScores
from tiedlora.runs import lazy
from tiedlora.runs.findings import CheckedRun, Finding
from tiedlora.scoring.passages import as_passages
from tiedlora.scoring.summary import gains, summarise
from tiedlora.tasks import Example, Task, digest, load_examples, load_task
from tiedlora.text import visible

PATHS = ("outputs", "cache", "data_root")
CLOSE = 1e-9
"""A small tolerance is enough: the metrics are computed in the same order from the same numbers, read from JSON."""


def verify(path: Path, *, data_root: str | None = None, rows: int = 32, cache: Path | None = None) -> list[Finding]:
    """Check a run's folder.

    Args:
        data_root: the folder of the rows, as for train.py; None takes the run's own.
        rows: at least so many predictions of each split are regenerated, in whole scoring batches; 0 regenerates none.
        cache: the folder of converted models; None takes the run's own.

    Raises:
        UserError: the folder holds no finished run, or no readable configuration.
    """
    folder = RunFolder(path.absolute())
    record = folder.record()
    if record is None:
        raise UserError(f"{path}: has no result.json, so there is no finished run to verify")
    config = compose.read_config(folder.config_file)
    findings = list(_check_configuration(folder, record, config))
    config.data_root = data_root if data_root is not None else config.data_root
    config.cache = str(cache) if cache is not None else config.cache
    run = CheckedRun(folder, record, config, load_task(config.task))
    checks: dict[str, Callable[[CheckedRun], Iterator[Finding]]] = {
        "files": _check_files,
        "data": _check_data,
        "adapter": lazy.check_adapter,
        "base": _check_base,
        "predictions": _check_predictions,
    }
    for name, check in checks.items():
        findings += _guarded(name, check, run)
    if rows > 0:
        suspects = {finding.row_id for finding in findings if finding.ok is False and finding.row_id is not None}
        findings += _guarded("regenerate", lambda run: lazy.regenerate(run, rows, suspects), run)
    return findings


def _guarded(name: str, check: Callable[[CheckedRun], Iterator[Finding]], run: CheckedRun) -> list[Finding]:
    """The findings of a check. An error of the check becomes a finding too, so that the other checks still run."""
    findings: list[Finding] = []
    try:
        findings.extend(check(run))
    except UserError as error:
        findings.append(Finding(name, False, str(error)))
    return findings


def _check_configuration(folder: RunFolder, record: RunRecord, config: Config) -> Iterator[Finding]:
    """Check that config.yaml, result.json (configuration and identity) and the folder's name describe one run."""
    # An older run lacks keys that were added later. They have their default values.
    recorded = _filled(record.config.tree, _as_json(config_tree(Config())))
    own = _as_json(config_tree(config))
    if recorded["model"]["path"]:
        # Earlier versions recorded the path as the command line gave it. The one in config.yaml is read as absolute.
        recorded["model"]["path"] = compose.absolute(recorded["model"]["path"])
    if record.left_out is not None:
        # A study keeps no paths, and config.yaml's default ones are read as paths of this machine.
        recorded, own = _without_paths(recorded), _without_paths(own)
    differing = list(_differences(recorded, own))
    differing += [f"identity.{key}" for key in _differences(record.identity.tree, _as_json(identity(config)))]
    if differing:
        explanation = f"result.json and config.yaml disagree on {', '.join(differing[:5])}"
        yield Finding("configuration", False, explanation)
        return
    expected = run_id(config)
    for where, name in (("result.json's run_id", record.run_id), ("the folder's name", folder.path.name)):
        if name != expected:
            yield Finding("configuration", False, f"{where} is {name}, but the configuration makes {expected}")
            return
    yield Finding("configuration", True, f"config.yaml, result.json and the folder's name make one id, {expected}")


def _as_json(tree: Any) -> Any:
    """The tree after a JSON round trip, so that it can be compared with one that was read from a file."""
    return json.loads(json.dumps(tree))


def _without_paths(tree: Any) -> Any:
    return {**{key: value for key, value in tree.items() if key not in PATHS}, "model": {**tree["model"], "path": None}}


def _filled(tree: Any, defaults: Any) -> Any:
    """The tree, with default values for missing keys."""
    if not isinstance(tree, dict) or not isinstance(defaults, dict):
        return tree
    return {**defaults, **{key: _filled(value, defaults.get(key)) for key, value in tree.items()}}


def _differences(a: Any, b: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield f"{prefix} ({a!r:.40} and {b!r:.40})"


def _check_files(run: CheckedRun) -> Iterator[Finding]:
    """Check the adapter's files and the predictions against the sha256 values in result.json."""
    expected: dict[str, str | None] = {}
    if run.record.keeps(ADAPTER):
        # Records of the earliest version name no files.
        names = list(run.record.files) or ["adapter/adapter.json", "adapter/adapter.safetensors"]
        expected = {name: run.record.files.get(name) for name in names}
    now = run.folder.checksums(*expected)
    for split, scores in run.record.scores.items():
        paths = {f"predictions/{split}.jsonl": run.folder.predictions_file(split)}
        if scores.base is not None:
            paths[f"predictions/{split}.base.jsonl"] = run.folder.base_predictions_file(split, scores.files)
        expected |= {name: scores.files.get(name) for name in paths}
        now |= {name: storage.content_sha256(path) for name, path in paths.items() if storage.has_content(path)}
    wrong = False
    for name, sha256 in expected.items():
        if name not in now:
            yield Finding(f"file {name}", False, "is missing")
        elif sha256 is not None and now[name] != sha256:
            yield Finding(f"file {name}", False, f"has sha256 {now[name][:12]}, result.json says {sha256[:12]}")
        else:
            continue
        wrong = True
    if unknown := [name for name, sha256 in expected.items() if sha256 is None]:
        yield Finding("files", None, f"not recorded: the sha256 of {', '.join(unknown)} (an older run)")
    elif not wrong:
        yield Finding("files", True, f"{len(expected)} files have the sha256 of result.json")


def _check_data(run: CheckedRun) -> Iterator[Finding]:
    """Check the rows of every split that the run used, by content."""
    expected = {split: data.digest for split, data in run.record.data.items()}
    expected |= {split: scores.digest for split, scores in run.record.scores.items() if split != FORGETTING}
    if FORGETTING in run.record.scores:
        yield _check_passages(run)
    for split, sha256 in expected.items():
        try:
            run.examples[split] = load_examples(run.task, split, run.config.data_root)
        except UserError as error:
            yield Finding(f"data {split}", None, f"cannot be read here ({error})")
            continue
        if digest(run.examples[split]) == sha256:
            yield Finding(f"data {split}", True, f"{len(run.examples[split]):,} rows, sha256 {sha256[:12]}")
            continue
        row_id, explanation = _changed_row(run, split)
        yield Finding(f"data {split}", False, f"is not what the run saw; {explanation}", row_id)


def _check_passages(run: CheckedRun) -> Finding:
    """Check the passages of neutral text. The predictions hold the whole texts, so their source is not needed."""
    if not run.record.keeps(TEXTS):
        return Finding(f"data {FORGETTING}", None, "the study keeps no texts")
    rows = read_predictions(run.folder.predictions_file(FORGETTING))
    texts = [row.references[0] if row.references else "" for row in rows]
    run.examples[FORGETTING] = list(as_passages(texts))
    now, recorded = digest(run.examples[FORGETTING]), run.record.scores[FORGETTING].digest
    explanation = f"{len(texts):,} passages, sha256 {now[:12]}" + (
        "" if now == recorded else f", result.json says {recorded[:12]}"
    )
    return Finding(f"data {FORGETTING}", now == recorded, explanation)


def _changed_row(run: CheckedRun, split: str) -> tuple[str | None, str]:
    """The id of the first row that differs from its prediction, and what differs."""
    if not run.record.keeps(TEXTS):
        return None, "the study keeps no texts, so the row cannot be named"
    try:
        rows = read_predictions(run.folder.predictions_file(split))
    except UserError:
        return None, "the run recorded only a hash of the rows, so the row cannot be named"
    examples = run.examples[split]
    if len(rows) != len(examples):
        return None, f"there were {len(rows)} rows, now {len(examples)}"
    for row, example in zip(rows, examples, strict=True):
        pairs = {"id": (row.id, example.id), "prompt": (row.prompt, example.prompt)}
        pairs["references"] = (row.references, list(example.references))  # type: ignore[assignment]
        if row.shortened:
            # A shortened prompt is not equal to the row's prompt.
            del pairs["prompt"]
        for key, (before, now) in pairs.items():
            if before != now:
                return row.id, f"row {row.id}: its {key} was {before!r:.80}, now {now!r:.80}"
    return None, "prompts and references agree with the predictions, so a target or an id was changed"


def _check_base(run: CheckedRun) -> Iterator[Finding]:
    """Check the digest of the base model, if it is here."""
    path = run.config.model.path
    if path and not Path(path).exists():
        yield Finding("base", None, f"model.path={path}: is not here")
        return
    recorded, now = run.record.base.digest, known_digest(run.config.model)
    if now is None:
        explanation = f"{recorded}: a hub model's commit is known once it loads (regeneration compares it)"
        yield Finding("base", None, explanation)
    else:
        explanation = str(recorded) if now == recorded else f"was {recorded}, here it is {now}"
        yield Finding("base", now == recorded, explanation)


def _check_predictions(run: CheckedRun) -> Iterator[Finding]:
    """Check the scores of each prediction from its output, and the metrics of the record from the scores."""
    for split, recorded in run.record.scores.items():
        check = f"predictions {split}"
        has_answers = not all(map(is_loss, recorded.metrics))
        if has_answers and not run.record.keeps(TEXTS) and split not in run.examples:
            yield Finding(check, None, "the study keeps no texts, and the rows cannot be read here")
            continue
        rows = run.predictions(split)
        base_rows = run.predictions(split, base=True) if recorded.base is not None else None
        counts = {len(some) for some in (rows, base_rows) if some is not None}
        if counts != {recorded.rows}:
            count = " and ".join(map(str, sorted(counts)))
            yield Finding(check, False, f"{count} rows, result.json says {recorded.rows}")
            continue
        wrong = [*_misscored(run, rows, split, check), *_misscored(run, base_rows or [], split, f"{check}.base")]
        yield from wrong
        if differing := _differing_metrics(run.task, recorded, rows, base_rows):
            yield Finding(check, False, f"result.json disagrees on {'; '.join(differing[:3])}")
        elif not wrong:
            yield Finding(check, True, f"{len(rows):,} rows give the recorded scores and intervals")


def _misscored(run: CheckedRun, rows: Sequence[PredictionRow], split: str, check: str) -> Iterator[Finding]:
    by_id = {example.id: example for example in run.examples.get(split, [])}
    for row in rows:
        # Without the data, the references in the prediction row are used: the output was scored against them.
        example = by_id.get(row.id) or Example(row.id, row.prompt, "", tuple(row.references), tuple(row.choices or ()))
        # A choice among given texts is scored by the likelihoods of the texts, which are in the row.
        answer = row.output if row.log_likelihoods is None else row.log_likelihoods
        scores = _as_json(run.task.score(answer, example)) if row.has_answer else {}
        recorded = {name: score for name, score in row.scores.items() if not is_loss(name)}
        if scores != recorded:
            explanation = f"row {row.id}: its output scores {scores}, the file says {recorded}"
            yield Finding(check, False, explanation, row.id)
        elif not _is_one_loss(row):
            explanation = (
                f"row {row.id}: {TARGET_LOSS} is not the quotient of the two numbers of {TARGET_LOSS_BY_TOKEN}"
            )
            yield Finding(check, False, explanation, row.id)


def _is_one_loss(row: PredictionRow) -> bool:
    """Whether the row's two losses agree. Only the model can tell what they should be: regeneration asks it."""
    mean, statistics = (row.scores.get(name) for name in LOSS_METRICS)
    if mean is None and statistics is None:
        return True
    if not isinstance(statistics, list) or len(statistics) != 2 or statistics[1] < 1:
        return False
    return loss_scores(statistics[0], int(statistics[1])) == {TARGET_LOSS: mean, TARGET_LOSS_BY_TOKEN: statistics}


def _differing_metrics(
    task: Task, recorded: SplitScores, rows: Sequence[PredictionRow], base_rows: Sequence[PredictionRow] | None
) -> list[str]:
    """The metrics in which the record differs from the predictions."""
    try:
        kinds: dict[str, tuple[Scores | None, Scores]] = {"metrics": (recorded.metrics, summarise(rows, task))}
        if base_rows is not None:
            kinds["base"] = (recorded.base, summarise(base_rows, task))
            kinds["gain"] = (recorded.gain, gains(rows, base_rows, task))
    except ValueError as error:
        return [f"predictions ({error})"]
    differing = []
    for kind, (before, now) in kinds.items():
        if missing := sorted((before or {}).keys() - now.keys()):
            differing.append(f"{kind}.{missing[0]} (predictions have no such scores)")
        for metric, interval in ((name, value) for name, value in (before or {}).items() if name in now):
            for end in ("value", "low", "high"):
                was, is_now = getattr(interval, end), getattr(now[metric], end)
                if abs(was - is_now) > CLOSE:
                    differing.append(f"{kind}.{metric}.{end} (recorded {was:.6f}, recomputed {is_now:.6f})")
    if sum(row.output_tokens for row in rows) != recorded.output_tokens:
        differing.append("output_tokens")
    return differing


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
