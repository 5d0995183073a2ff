"""Check a finished run: does the folder of a finished run agree with its record, and can its numbers be reproduced?

Each check names what does not agree: a configuration key, a data row, a file, a prediction.

Predictions are regenerated too. Another kind of processor adds in another order. In bfloat16 a greedy answer then takes
another token where two are nearly as likely, and differs from there on. So on another device a recorded answer cannot
be expected again. But each of its tokens must still be as likely as the likeliest one, up to a tolerance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tiedlora import storage
from tiedlora.adapter import arms
from tiedlora.adapter.attach import attach_saved
from tiedlora.config import compose
from tiedlora.config.identity import identity, leaves, run_id
from tiedlora.config.schema import FORGETTING, Config
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.models import products
from tiedlora.models.base_model import load_base
from tiedlora.models.device import execution_on, here_or_auto, set_up_device
from tiedlora.models.identity import known_digest, tokens_digest
from tiedlora.models.placement import input_device, without_gradients
from tiedlora.records.loss_metrics import DRIFT, TARGET_LOSS_BY_TOKEN, is_loss, loss_scores
from tiedlora.records.provenance import TOKEN_FILES
from tiedlora.records.rows import PredictionRow, read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import ADAPTER, TEXTS, RunRecord, SplitScores
from tiedlora.scoring.passages import as_passages
from tiedlora.scoring.split import Scorer, scored_model, with_halved_batches
from tiedlora.scoring.summary import gains, summarise
from tiedlora.tasks import Example, Task, digest, load_examples, load_task
from tiedlora.text import visible

Asked = list[tuple[Example, PredictionRow, PredictionRow]]
"""Examples that were asked again, each with its row of now and the recorded one."""
LEAST_LOSS, LEAST_DRIFT = 1.0, 0.02
"""In nats: a smaller loss or drift of a row may differ by its tolerance of this. bfloat16 rounds logits to 8 bits."""
CLOSE = 1e-9
"""A small tolerance is enough: the metrics are computed in the same order from the same numbers, read from JSON."""


@dataclass(frozen=True)
class Tolerances:
    """How far outputs, losses and drifts may be from the recorded ones."""

    loss: float
    """How much the number of a row may differ on the same kind of device, as a share of it, or of `least` if it is
    below that."""
    gap: float
    """On another device: by how much the logit of a recorded token may be below the largest one, in nats."""
    row: float
    """On another device: as `loss`."""
    mean: float
    """On another device: the same for the mean of the rows."""


TOLERANCES = {"float32": Tolerances(1e-3, 0.01, 1e-3, 1e-3), "bfloat16": Tolerances(2e-2, 1.0, 0.5, 0.05)}
"""By dtype. Records of SmolLM2-135M in bfloat16 from AVX512-bf16 processors were checked on one with AVX2. 32 of 284
answers differed, and the largest gap was 0.5. The losses of rows differed by up to 28 %, their means by up to 0.6 %."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    ok: bool | None
    """None if the check could not be made here."""
    explanation: str
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
    elsewhere: bool = False
    """Whether this device may round otherwise than those that scored the split."""
    places: str = ""
    """Those devices, in words."""

    def predictions(self, split: str, base: bool = False) -> list[PredictionRow]:
        """The rows of predictions/. Texts that a study has left out are taken from the data, by the rows' ids.

        Raises:
            UserError: the file is missing or damaged; or the texts are left out, and the rows cannot be read here.
        """
        own, files = self.folder.predictions_file(split), self.record.scores[split].files
        rows = read_predictions(self.folder.base_predictions_file(split, files) if base else own)
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
        data_root: the folder of the rows, as for train.py; None takes the run's own, or that of TIEDLORA_DATA.
        rows: at least so many predictions of each split are regenerated, in whole scoring batches; 0 regenerates none.
        cache: the folder of converted models; None takes the run's own.

    Raises:
        UserError: the folder holds no finished run, or no readable configuration.
    """
    folder = RunFolder(path.absolute())
    record = folder.finished_record()
    config = compose.read_config(folder.config_file)
    # A run that was moved here names a folder of another machine.
    config.data_root = compose.rows_are_in(config, data_root)
    config.cache = str(cache or config.cache)
    run = CheckedRun(folder, record, config, load_task(config.task))
    checks: dict[str, Callable[[CheckedRun], Iterator[Finding]]] = {
        "configuration": _check_configuration,
        "files": _check_files,
        "data": _check_data,
        "adapter": _check_adapter,
        "base": _check_base,
        "predictions": _check_predictions,
    }
    if rows > 0:
        checks["regenerate"] = functools.partial(_regenerate, least=rows)
    return [finding for name, check in checks.items() for finding in _guarded(name, check(run))]


def _guarded(name: str, check: Iterator[Finding]) -> Iterator[Finding]:
    """The findings of a check. An error of the check becomes a finding too, so that the other checks still run."""
    try:
        yield from check
    except UserError as error:
        yield Finding(name, False, str(error))
    except (TypeError, ValueError, LookupError) as error:
        # Such as of predictions that somebody has changed.
        yield Finding(name, False, f"cannot be checked ({error!r:.200})")


def _compared(check: str, values: Mapping[str, tuple[object, object]], agree: str) -> Finding:
    """Whether what is found here is what is recorded. What differs is named.

    Args:
        values: name -> (found, recorded).
        agree: the explanation if all are equal.
    """
    differing = {name: pair for name, pair in values.items() if pair[0] != pair[1]}
    wrong = [f"{name} is {found!r:.80}, recorded {recorded!r:.80}" for name, (found, recorded) in differing.items()]
    return Finding(check, not wrong, "; ".join(wrong[:5]) or agree)


def _check_configuration(run: CheckedRun) -> Iterator[Finding]:
    """Check that config.yaml, result.json (configuration and identity) and the folder's name describe one run."""
    values = compose.compared_keys(run.config, run.record.config.tree)
    own, recorded = leaves(compose.as_recorded(identity(run.config))), leaves(run.record.identity.tree)
    values |= {f"identity.{key}": (own.get(key), recorded.get(key)) for key in sorted({*own, *recorded})}
    name = run.folder.path.name
    values |= {"the id": (run_id(run.config), run.record.run_id), "the folder's name": (name, run.record.run_id)}
    yield _compared("configuration", values, f"config.yaml, result.json and the folder's name make one id, {name}")


def _check_files(run: CheckedRun) -> Iterator[Finding]:
    """Check the adapter's files and the predictions against the sha256 values in result.json."""
    recorded = dict(run.record.files) if run.record.keeps(ADAPTER) else {}
    found: dict[str, str | None] = dict(run.folder.checksums(*recorded))
    for split, scores in run.record.scores.items():
        paths = {f"predictions/{split}.jsonl": run.folder.predictions_file(split)}
        if scores.base is not None:
            paths[f"predictions/{split}.base.jsonl"] = run.folder.base_predictions_file(split, scores.files)
        recorded |= {name: scores.files.get(name, "") for name in paths}
        found |= {name: storage.content_sha256(path) for name, path in paths.items()}
    values = {f"the sha256 of {name}": (found.get(name), sha256) for name, sha256 in recorded.items()}
    yield _compared("files", values, f"{len(recorded)} files have the sha256 of result.json")


def _check_data(run: CheckedRun) -> Iterator[Finding]:
    """Check the rows of every split that the run used, by content."""
    recorded = {split: data.digest for split, data in run.record.data.items()}
    recorded |= {split: scores.digest for split, scores in run.record.scores.items()}
    for split, sha256 in recorded.items():
        check = f"data {split}"
        try:
            run.examples[split] = _rows_here(run, split)
        except UserError as error:
            yield Finding(check, None, f"cannot be read here ({error})")
            continue
        explanation = f"{len(run.examples[split]):,} rows, sha256 {sha256[:12]}"
        finding = _compared(check, {"the sha256 of the rows": (digest(run.examples[split]), sha256)}, explanation)
        yield finding if finding.ok else _with_changed_row(run, split, finding)


def _rows_here(run: CheckedRun, split: str) -> list[Example]:
    """The rows of a split. Predictions hold the whole passages of neutral text, so their source is not needed.

    Raises:
        UserError: they cannot be read.
    """
    if split != FORGETTING:
        return load_examples(run.task, split, run.config.data_root)
    if not run.record.keeps(TEXTS):
        raise UserError("the study keeps no texts")
    rows = read_predictions(run.folder.predictions_file(split))
    return list(as_passages(["".join(row.references[:1]) for row in rows]))


def _with_changed_row(run: CheckedRun, split: str, finding: Finding) -> Finding:
    """The finding about changed data, with the first row that differs from its prediction, if there are predictions."""
    rows = run.predictions(split) if split in run.record.scores and run.record.keeps(TEXTS) else []
    for row, example in zip(rows, run.examples[split], strict=False):
        # A shortened prompt is not equal to the row's prompt.
        prompts = () if row.shortened else ((example.prompt, row.prompt),)
        for now, was in ((example.id, row.id), *prompts, (list(example.references), row.references)):
            if now != was:
                return replace(finding, explanation=f"row {row.id}: {now!r:.80} was {was!r:.80}; {finding.explanation}")
    return finding


def _check_adapter(run: CheckedRun) -> Iterator[Finding]:
    """Check that the adapter's tensors have their own hash, and that its base model is that of the run.

    All else that describes it is in adapter.json, whose hash is in the record (`_check_files`).
    """
    if not run.record.keeps(ADAPTER):
        yield Finding("adapter", None, "the study keeps only its sha256; the run's command gives the files again")
        return
    _, base = arms.read(run.folder.adapter)
    yield _compared(
        "adapter",
        {"its base model": (base, run.record.base)},
        "its tensors have the sha256 of adapter.json, and its base model is this run's",
    )


def _check_base(run: CheckedRun) -> Iterator[Finding]:
    """Check the digest of the base model, and that of its files that decide tokens, if it is here."""
    path, recorded = run.config.model.path, run.record.base.digest
    found = known_digest(run.config.model) if path is None or Path(path).exists() else None
    if found is None:
        explanation = f"{recorded}: the model is not here, or has its digest once it loads (regeneration compares it)"
        yield Finding("base", None, explanation)
    else:
        values: dict[str, tuple[object, object]] = {"the digest": (found, recorded)}
        # Earlier versions have not recorded it.
        if (recorded_files := run.record.versions.get(TOKEN_FILES)) is not None:
            files = tokens_digest(run.config.model, run.config.task.chat_template)
            values["the files of its tokenizer or chat template"] = (files, recorded_files)
        yield _compared("base", values, found)


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
        wrong = [*_misscored(run, rows, split, check), *_misscored(run, base_rows or [], split, f"{check}.base")]
        yield from wrong
        finding = _compared(
            check,
            _metrics_again(run.task, recorded, rows, base_rows),
            f"{len(rows):,} rows give the recorded scores and intervals",
        )
        if not (finding.ok and wrong):
            yield finding


def _misscored(run: CheckedRun, rows: Sequence[PredictionRow], split: str, check: str) -> Iterator[Finding]:
    by_id = {example.id: example for example in run.examples.get(split, [])}
    for row in rows:
        # Without the data, the references in the prediction row are used: the output was scored against them.
        example = by_id.get(row.id) or Example(row.id, row.prompt, "", tuple(row.references), tuple(row.choices or ()))
        # A choice among given texts is scored by the likelihoods of the texts, which are in the row.
        answer = row.output if row.log_likelihoods is None else row.log_likelihoods
        scores = compose.as_recorded(run.task.score(answer, example)) if row.has_answer else {}
        # Only the model can tell what a loss should be: regeneration asks it. But its two forms must agree.
        loss = _loss_and_tokens(row)
        if len(loss) == 2 and loss[1] >= 1:
            scores |= loss_scores(loss[0], int(loss[1]))
        if DRIFT in row.scores:
            scores[DRIFT] = 0.0 if check.endswith(".base") else row.scores[DRIFT]
        if scores != row.scores:
            explanation = f"row {row.id}: its output and its loss score {scores}, the file says {row.scores}"
            yield Finding(check, False, explanation)


def _metrics_again(
    task: Task, recorded: SplitScores, rows: Sequence[PredictionRow], base_rows: Sequence[PredictionRow] | None
) -> dict[str, tuple[object, object]]:
    """What the record says of the predictions: name -> (what they give, what is recorded)."""
    values: dict[str, tuple[object, object]] = {
        "rows": (len(rows), recorded.rows),
        "output_tokens": (sum(row.output_tokens for row in rows), recorded.output_tokens),
    }
    kinds = {}
    try:
        kinds["metrics"] = summarise(rows, task), recorded.metrics
        if base_rows is not None:
            values["base rows"] = len(base_rows), recorded.rows
            kinds["base"] = summarise(base_rows, task), recorded.base or {}
            kinds["gain"] = gains(rows, base_rows, task), recorded.gain or {}
    except ValueError as error:
        values["what the rows have"] = str(error), "the same scores in each"
    for kind, (again, before) in kinds.items():
        for metric, interval in before.items():
            for end in ("value", "low", "high"):
                now, then = getattr(again.get(metric), end, None), getattr(interval, end)
                is_close = now is not None and abs(now - then) <= CLOSE
                values[f"{kind}.{metric}.{end}"] = then if is_close else now, then
    return values


def _regenerate(run: CheckedRun, least: int) -> Iterator[Finding]:
    """Regenerate whole scoring batches, from the adapter and from the base, and compare them with predictions/.

    A batch is repeated with the same rows, because rounding depends on which rows share it.

    Args:
        least: the least number of rows of each split. The shortest ones are taken.
    """
    config = run.config
    if not run.record.keeps(ADAPTER):
        yield Finding("regenerate", None, "the study keeps no adapter of this run")
        return
    try:
        device = set_up_device(here_or_auto(config.train.device), run.record.execution.threads)
        base = load_base(config.model, config.train.dtype, device, Path(config.cache))
    except UserError as error:
        yield Finding("regenerate", None, f"the base model cannot be loaded here ({error})")
        return
    if base.record != run.record.base:
        yield Finding("base", False, f"was {run.record.base}, here it is {base.record}")
        return
    arm = attach_saved(base.model, run.folder.adapter)
    encoder = Encoder(base.tokenizer, config.task, config.model.context, run.record.more_ends or ())
    for split, scores in run.record.scores.items():
        if run.examples.get(split):
            as_scored = with_halved_batches(config, scores.batch_halvings or 0)
            scorer = Scorer(arm, encoder, run.task, as_scored, base.record)
            places = scores.executions or [run.record.execution]
            run.elsewhere = not all(place.rounds_as(execution_on(device)) for place in places)
            run.places = "; ".join(map(str, places))
            with products.on_any_cpu(device, config.train.dtype):
                findings = list(_regenerate_split(run, scorer, split, least))
            yield from findings


def _regenerate_split(run: CheckedRun, scorer: Scorer, split: str, least: int) -> Iterator[Finding]:
    examples, scores = run.examples[split], run.record.scores[split]
    wanted = [losses for losses in (False, True) if losses in map(is_loss, scores.metrics)]
    for kind in ("", ".base") if scores.base is not None else ("",):
        recorded = run.predictions(split, base=bool(kind))
        if len(recorded) != len(examples):
            yield Finding(f"regenerate {split}{kind}", False, f"{len(recorded)} predictions of {len(examples)} rows")
            continue
        for losses in wanted:
            places: list[int] = []
            for batch in reversed(scorer.batches(examples, losses=losses)):
                places += batch if len(places) < least else []
            # In the order of the split: scoring sorts by length, and rows of equal length must keep their order.
            places.sort()
            chosen = [examples[place] for place in places]
            title = f"computing the losses of {split}{kind} again" if losses else f"regenerating {split}{kind}"
            rows = scorer.rows(chosen, title, losses=losses, base=bool(kind))
            asked = list(zip(chosen, rows, [recorded[place] for place in places], strict=True))
            if losses:
                pairs = [(_loss_and_tokens(new), _loss_and_tokens(old)) for _, new, old in asked]
                yield _compared_numbers(run, f"losses {split}{kind}", asked, pairs, LEAST_LOSS)
                if DRIFT in scores.metrics and not kind:
                    drift = scorer.divergences(chosen, f"computing the drift of {split} again")
                    before = [[x] if isinstance(x := old.scores.get(DRIFT), float) else [] for _, _, old in asked]
                    pairs = [([now], then) for now, then in zip(drift, before, strict=True)]
                    yield _compared_numbers(run, f"drifts {split}", asked, pairs, LEAST_DRIFT)
            else:
                yield _compared_outputs(run, scorer, f"regenerate {split}{kind}", asked, bool(kind))


def _compared_outputs(run: CheckedRun, scorer: Scorer, check: str, asked: Asked, base: bool) -> Finding:
    """Whether the outputs come out as they were; on another device, whether rounding explains those that do not."""
    different = [(example, new, old) for example, new, old in asked if new.output != old.output]
    where = f"recorded on {run.places}"
    if not different:
        return Finding(check, True, f"{len(asked)} outputs come out as they were")
    if not run.elsewhere:
        first, count = different[0][0].id, f"{len(different)} of {len(asked)} rows differ"
        return Finding(check, False, f"row {first}: another output than the recorded one ({count}); {where}")
    tolerance = TOLERANCES[run.config.train.dtype].gap
    with scored_model(scorer.arm, scorer.config, base) as model:
        gaps = {old.id: largest_gap(model, scorer, example, new, old) for example, new, old in different}
    for row_id, gap in gaps.items():
        # Written so that NaN is beyond it.
        if not gap <= tolerance:
            explanation = (
                f"row {row_id}: another output than the recorded one, and rounding does not explain it: a recorded "
                f"token is {gap:.3g} below the largest logit ({tolerance:g} is allowed); {where}"
            )
            return Finding(check, False, explanation)
    return Finding(
        check,
        True,
        f"{len(gaps)} of {len(asked)} outputs differ, none by more than another device's rounding: each token is "
        f"within {max(gaps.values()):.3g} of the largest logit ({tolerance:g} is allowed); {where}",
        by_rounding=True,
    )


def _compared_numbers(
    run: CheckedRun, check: str, asked: Asked, pairs: Sequence[tuple[list[float], list[float]]], least: float
) -> Finding:
    """Whether the losses or the drifts of rows are the recorded ones, up to rounding.

    Args:
        pairs: for each row what it is now and what is recorded, in nats, and after a loss its number of target tokens.
        least: a smaller number may differ by its tolerance of this.
    """
    tolerances, where = TOLERANCES[run.config.train.dtype], f"recorded on {run.places}"
    tolerance, what = tolerances.row if run.elsewhere else tolerances.loss, check.split()[0]
    for (_, row, _), (now, before) in zip(asked, pairs, strict=True):
        # Written so that NaN is beyond it.
        if not (before and now[1:] == before[1:] and _share(now[0], before[0], least) <= tolerance):
            explanation = f"row {row.id}: now {now}, the file says {before or None}; {where}"
            return Finding(check, False, explanation)
    if not run.elsewhere:
        return Finding(check, True, f"{len(asked)} {what} come out as they were, within {tolerance:g}")
    total_now, total_before = (sum(numbers[0] for numbers in side) for side in zip(*pairs, strict=True))
    of_all = _share(total_now, total_before, least * len(asked))
    return Finding(
        check,
        of_all <= tolerances.mean,
        f"the mean of {len(asked)} {what} differs by {of_all:.2%} ({tolerances.mean:.2%} is allowed on another "
        f"device), and no row's by more than {tolerance:.0%}; {where}",
        by_rounding=0 < of_all <= tolerances.mean,
    )


def _loss_and_tokens(row: PredictionRow) -> list[float]:
    """The loss of a row's target in nats, and its number of tokens; empty if the row has none."""
    value = row.scores.get(TARGET_LOSS_BY_TOKEN)
    return list(map(float, value)) if isinstance(value, list) else []


def _share(now: float, before: float, least: float) -> float:
    """The difference as a share of the recorded number, or of `least` if that is larger."""
    return abs(now - before) / max(abs(before), least)


@without_gradients
def largest_gap(model: Any, scorer: Scorer, example: Example, now: PredictionRow, recorded: PredictionRow) -> float:
    """By how much the logit of a token of the recorded answer is below the largest logit, at most, in nats.

    0 means that the answer is the greedy one. The answer's text is tokenised again, so its tokens can differ from those
    that were generated. The gap is then too large. For a choice, the gap is that of the log-likelihoods in `now`.
    """
    if now.choices is not None and now.log_likelihoods is not None:
        if recorded.output not in now.choices:
            return math.inf
        return max(now.log_likelihoods) - now.log_likelihoods[now.choices.index(recorded.output)]
    encoder = scorer.encoder
    prompt = encoder.prompt(encoder.scored(example).prompt)
    # Which token ended an answer is not recorded, and neither are blanks around it. It may have begun with one.
    ends = [[end] for end in (encoder.tokenizer.eos_token_id, *encoder.more_ends)] if recorded.ended == "end" else [[]]
    gaps = []
    for text, end in product((recorded.output, " " + recorded.output), ends):
        answer = [*encoder.tokenizer(text, add_special_tokens=False).input_ids, *end]
        ids = torch.tensor([[*prompt, *answer]], device=input_device(model))
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        taken = logits.gather(1, ids[0, len(prompt) :, None].to(logits.device))[:, 0]
        gaps.append(float((logits.max(1).values - taken).max()) if answer else math.inf)
    return min(gaps)


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
