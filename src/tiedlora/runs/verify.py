"""Check a finished run: does the folder of a finished run agree with its record, and can its numbers be reproduced?

Each check names what does not agree: a configuration key, a data row, a file, a prediction. The checks here need no
weights. The check of the adapter and the regeneration of predictions are in regenerate.py, which imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

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
from tiedlora.scoring.passages import as_passages
from tiedlora.scoring.summary import gains, summarise
from tiedlora.tasks import Example, Task, digest, load_examples, load_task
from tiedlora.text import visible

PATHS = ("outputs", "cache", "data_root")
CLOSE = 1e-9
"""A small tolerance is enough: the metrics are computed in the same order from the same numbers, read from JSON."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    ok: bool | None
    """None if the check could not be made here."""
    explanation: str
    row_id: str | None = None
    """The id of the row that does not agree, if it is a single row."""
    by_rounding: bool = False
    """Whether outputs or losses differ from the recorded ones, but by no more than another device's rounding."""


@dataclass
class CheckedRun:
    """A run, and the data that were loaded to check it."""

    folder: RunFolder
    record: RunRecord
    config: Config
    task: Task
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """Split -> its rows, if they can be read here."""

    def predictions(self, split: str, base: bool = False) -> list[PredictionRow]:
        """The rows of predictions/. Texts that a study has left out are taken from the data, by the rows' ids.

        Raises:
            UserError: the file is missing or damaged; or the texts are left out, and the rows cannot be read here.
        """
        if base:
            path = self.folder.base_predictions_file(split, self.record.scores[split].files)
        else:
            path = self.folder.predictions_file(split)
        rows = read_predictions(path)
        if self.record.keeps(TEXTS) or not any(row.has_answer for row in rows):
            return rows
        by_id = {example.id: example for example in self.examples.get(split, [])}
        if missing := [row.id for row in rows if row.id not in by_id]:
            raise UserError(f"row {missing[0]}: the study keeps no texts, and the row is not in the data here")
        return [_with_texts(row, by_id[row.id]) for row in rows]


def _with_texts(row: PredictionRow, example: Example) -> PredictionRow:
    texts = replace(row, prompt=example.prompt, references=list(example.references))
    if row.log_likelihoods is None:
        return texts
    best = max(range(len(row.log_likelihoods)), key=row.log_likelihoods.__getitem__)
    return replace(texts, choices=list(example.choices), output=example.choices[best])


def verify(path: Path, *, data_root: str | None = None, rows: int = 32, cache: Path | None = None) -> list[Finding]:
    """Check a run's folder.

    Args:
        data_root: the folder of the rows, as for train.py; None takes the run's own.
        rows: at least so many predictions of each split are regenerated, in whole scoring batches; 0 regenerates none.
        cache: the folder of converted models; None takes the run's own.

    Raises:
        UserError: the folder holds no finished run, or no readable configuration.
    """
    # Imported here because it imports torch, which takes seconds: a program that only shows findings needs none.
    from tiedlora.runs import regenerate

    folder = RunFolder(path.absolute())
    record = folder.record()
    if record is None:
        raise UserError(f"{path}: has no result.json, so there is no finished run to verify")
    config = compose.read_config(folder.config_file)
    here = replace(config, data_root=data_root or config.data_root, cache=str(cache or config.cache))
    run = CheckedRun(folder, record, here, load_task(config.task))
    checks: dict[str, Iterator[Finding]] = {
        "configuration": _check_configuration(folder, record, config),
        "files": _check_files(run),
        "data": _check_data(run),
        "adapter": regenerate.check_adapter(run),
        "base": _check_base(run),
        "predictions": _check_predictions(run),
    }
    findings = [finding for name, check in checks.items() for finding in _guarded(name, check)]
    if rows > 0:
        suspects = {finding.row_id for finding in findings if finding.ok is False and finding.row_id is not None}
        findings += _guarded("regenerate", regenerate.regenerate(run, rows, suspects))
    return findings


def _guarded(name: str, check: Iterator[Finding]) -> Iterator[Finding]:
    """The findings of a check. An error of the check becomes a finding too, so that the other checks still run."""
    try:
        yield from check
    except UserError as error:
        yield Finding(name, False, str(error))


def _check_configuration(folder: RunFolder, record: RunRecord, config: Config) -> Iterator[Finding]:
    """Check that config.yaml, result.json (configuration and identity) and the folder's name describe one run."""
    # An older record lacks keys that were added later, and has keys that are gone: it is read as a config.yaml is.
    recorded = _as_json(config_tree(compose.typed(OmegaConf.create(record.config.tree))))
    own = _as_json(config_tree(config))
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


def _differences(a: Any, b: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield f"{prefix} ({a!r:.40} and {b!r:.40})"


def _check_files(run: CheckedRun) -> Iterator[Finding]:
    """Check the adapter's files and the predictions against the sha256 values in result.json."""
    expected = dict(run.record.files) if run.record.keeps(ADAPTER) else {}
    now = run.folder.checksums(*expected)
    for split, scores in run.record.scores.items():
        paths = {f"predictions/{split}.jsonl": run.folder.predictions_file(split)}
        if scores.base is not None:
            paths[f"predictions/{split}.base.jsonl"] = run.folder.base_predictions_file(split, scores.files)
        expected |= {name: scores.files.get(name, "") for name in paths}
        now |= {name: storage.content_sha256(path) for name, path in paths.items() if storage.has_content(path)}
    wrong = [name for name, sha256 in expected.items() if now.get(name) != sha256]
    for name in wrong:
        found = f"has sha256 {now[name][:12]}, result.json says {expected[name][:12]}" if name in now else "is missing"
        yield Finding(f"file {name}", False, found)
    if not wrong:
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
