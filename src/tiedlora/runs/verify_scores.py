"""Check the scores of a finished run: the first line of each file against its rows, and the rows against the model.

A part of the rows is scored again. Another kind of processor adds in another order. In bfloat16 a greedy answer then
takes another token where two are nearly as likely, and differs from there on. So on another device a recorded answer
cannot be expected again. But each of its tokens must still be as likely as the likeliest one, up to a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tiedlora import storage
from tiedlora.adapter.attach import attach_saved
from tiedlora.analysis.metrics import gains, summarise
from tiedlora.config import compose
from tiedlora.config.identity import leaves
from tiedlora.config.schema import FORGETTING, SCORED_SPLITS
from tiedlora.data.encoding import Encoder
from tiedlora.description import DESCRIPTION
from tiedlora.errors import UserError
from tiedlora.models.base_model import load_base
from tiedlora.models.device import execution_on, here_or_auto, set_up_device
from tiedlora.models.placement import input_device, without_gradients
from tiedlora.reading import plain
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import DRIFT, TARGET_LOSS_BY_TOKEN, loss_scores
from tiedlora.records.provenance import Execution, package_versions
from tiedlora.records.rows import PredictionRow
from tiedlora.records.scores import KINDS, Kind, Metrics, ScoreRecord, read_scores
from tiedlora.runs.checked_run import CheckedRun, Finding, Scored, compared
from tiedlora.runs.loading import computing_as
from tiedlora.scoring.split import Scorer, scored_model, with_halved_batches
from tiedlora.tasks import Example, digest

METRIC_PACKAGES = ("sacrebleu", "rouge-score")
"""Those whose versions are in the signatures of metrics."""
Asked = list[tuple[Example, PredictionRow, PredictionRow]]
"""Examples that were asked again, each with its row of now and the recorded one."""
LEAST: dict[Kind, float] = {"losses": 1.0, "drift": 0.02}
"""In nats: a smaller loss or drift of a row may differ by its tolerance of this. bfloat16 rounds logits to 8 bits."""


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


def read_files(run: CheckedRun) -> Iterator[Finding]:
    """Read the files of scores, whose first lines have the sha256 of the others, and name those that are damaged."""
    for split, kind in product((*SCORED_SPLITS, FORGETTING), KINDS):
        path, name = run.folder.scores_file(split, kind), f"{split}.{kind}"
        if not storage.is_here(path):
            continue
        try:
            file = read_scores(path)
        except UserError as error:
            yield Finding(f"scores {name}", False, str(error))
            continue
        base, base_file = None, run.folder.base_scores_file(file.record.base)
        if file.record.base and not storage.is_here(base_file):
            if file.record.gain:
                yield Finding(f"scores {name}.base", None, f"{base_file}: is not here, so the gain is not checked")
        elif file.record.base:
            try:
                base = read_scores(base_file)
            except UserError as error:
                yield Finding(f"scores {name}.base", False, str(error))
        run.scored.append(Scored(split, kind, file, base, is_base=False))
        if base is not None:
            run.scored.append(Scored(split, kind, base, None, is_base=True))
    for scored in run.scored:
        run.recorded |= leaves({scored.key: plain(scored.record)})


def check_scores(run: CheckedRun) -> Iterator[Finding]:
    """Check the first line of each file of scores against its rows, and the scores of each row against its output."""
    for scored in run.scored:
        check, record = f"scores {scored.name}", scored.record
        if record.kind == "answers" and not run.record.keeps_texts and record.split not in run.examples:
            yield Finding(check, None, "the study keeps no texts, and the rows cannot be read here")
            continue
        rows = run.rows(scored.file)
        wrong = list(_misscored(run, rows, record, check))
        yield from wrong
        finding = compared(
            check, _first_line_again(run, scored, rows), f"{len(rows):,} rows give the recorded scores and intervals"
        )
        if not (finding.ok and wrong):
            yield finding


def _misscored(run: CheckedRun, rows: Sequence[PredictionRow], record: ScoreRecord, check: str) -> Iterator[Finding]:
    by_id = {example.id: example for example in run.examples.get(record.split, [])}
    for row in rows:
        scores = row.scores
        if record.kind == "answers":
            # Without the data, the row's references are used: the output was scored against them.
            own = Example(row.id, row.prompt, "", tuple(row.references), tuple(row.choices or ()))
            # A choice among given texts is scored by the likelihoods of the texts, which are in the row.
            answer = row.output if row.log_likelihoods is None else row.log_likelihoods
            scores = compose.as_recorded(run.task.score(answer, by_id.get(row.id) or own))
        elif record.kind == "losses":
            # Only the model can tell what a loss should be: it is asked again below. But its two forms must agree.
            total, tokens = _numbers(row, record.kind) or [0.0, 0.0]
            scores = loss_scores(total, int(tokens)) if tokens >= 1 else {}
        if scores != row.scores:
            explanation = f"row {row.id}: its output or its loss scores {scores}, the file says {row.scores}"
            yield Finding(check, False, explanation)


def _first_line_again(
    run: CheckedRun, scored: Scored, rows: Sequence[PredictionRow]
) -> dict[str, tuple[object, object]]:
    """What the run, the data and the rows say of the values of the first line: name -> (what they say, recorded)."""
    record = scored.record
    found: dict[str, Any] = {
        "run_id": "" if scored.is_base else run.record.run_id,
        "adapter": "" if scored.is_base else run.record.files.get(f"adapter/{DESCRIPTION}"),
        "split": scored.split,
        "kind": scored.kind,
        "rows": len(rows),
        "shortened": sum(row.shortened for row in rows),
        "output_tokens": sum(row.output_tokens for row in rows),
        "cut_targets": sum(row.cut_target for row in rows),
        # It was compared when the file was read.
        "rows_sha256": record.rows_sha256,
    }
    others: dict[str, tuple[object, object]] = {}
    if record.split != FORGETTING:
        found |= {"source": "", "source_digest": ""}
    here = package_versions()
    if all(record.versions.get(name) == here.get(name) for name in METRIC_PACKAGES):
        found["signatures"] = run.task.signatures() if record.kind == "answers" else {}
    if (examples := run.examples.get(record.split)) is not None:
        found["digest"] = digest(examples)
        found["has_targets"] = all(example.target.strip() for example in examples)
        ids = [row.id for row in rows], [example.id for example in examples]
        others[f"the rows' ids of {scored.name}"] = ids if ids[0] != ids[1] else ("", "")
    if scored.base is not None:
        found["base"] = scored.base.record.base
    elif record.kind == "drift":
        found["base"] = ""
    elif scored.is_base:
        # The file's name, by which it was found.
        found["base"] = record.base
    try:
        metrics = summarise(rows, run.task, record.kind)
        found["metrics"] = _intervals(metrics, record.metrics)
        # Comparisons use the first one. Other values than these are named above.
        if metrics.keys() == record.metrics.keys():
            others[f"the order of the metrics of {scored.name}"] = [*metrics], [*record.metrics]
        found |= _gain_again(run, scored, rows)
    except ValueError as error:
        others[f"what the rows of {scored.name} have"] = str(error), "the same scores in each"
    return run.beside_record(leaves({scored.key: found})) | others


def _gain_again(run: CheckedRun, scored: Scored, rows: Sequence[PredictionRow]) -> dict[str, Any]:
    """The key `gain` as the rows give it; empty if the base model's rows are not here.

    Raises:
        ValueError: the rows do not all have the same scores.
    """
    record = scored.record
    if scored.base is not None and record.gain:
        return {"gain": _intervals(gains(rows, run.rows(scored.base), run.task, record.kind), record.gain)}
    has_none = scored.is_base or record.kind == "drift" or (not record.gain and not record.base)
    return {"gain": {}} if has_none else {}


def _intervals(again: Metrics, recorded: Metrics) -> dict[str, dict[str, object]]:
    """Metric -> part of its interval -> what the rows give, for all that are recorded or can be computed."""
    return {
        metric: {part.name: getattr(again.get(metric), part.name, None) for part in fields(Interval)}
        for metric in {**again, **recorded}
    }


def regenerate(run: CheckedRun, least: int) -> Iterator[Finding]:
    """Score whole batches again, with the adapter and with the base model, and compare them with the files of scores.

    A batch is repeated with the same rows, because rounding depends on which rows share it.

    Args:
        least: the least number of rows of each file. The shortest ones are taken.
    """
    config = run.config
    if not run.folder.has_adapter:
        yield Finding("regenerate", None, "the study keeps no adapter of this run")
        return
    try:
        device = set_up_device(here_or_auto(config.train.device), run.record.execution.threads)
        # Loading computes too, and is the first that does.
        with computing_as(config.train, device):
            base = load_base(config.model, config.train.dtype, device, Path(config.cache))
    except UserError as error:
        yield Finding("regenerate", None, f"the base model cannot be loaded here ({error})")
        return
    loaded = {f"base.{name}": value for name, value in vars(base.record).items()}
    finding = compared("base", run.beside_record(loaded), f"the loaded one is {base.record}")
    if run.base is None or not finding.ok:
        yield finding
    if not finding.ok:
        return
    arm = attach_saved(base.model, run.folder.adapter)
    encoder = Encoder(base.tokenizer, config.task, config.model.context, run.record.more_ends or ())
    for scored in run.scored:
        if run.examples.get(scored.record.split):
            as_scored = with_halved_batches(config, scored.record.batch_halvings)
            scorer = Scorer(arm, encoder, run.task, as_scored, base.record)
            # As in the process that scored them.
            set_up_device(here_or_auto(config.train.device), scored.record.execution.threads)
            with computing_as(config.train, device):
                finding = _regenerate_file(run, scorer, scored, least, execution_on(device))
            yield finding


def _regenerate_file(run: CheckedRun, scorer: Scorer, scored: Scored, least: int, here: Execution) -> Finding:
    examples, record, check = run.examples[scored.record.split], scored.record, f"regenerate {scored.name}"
    recorded = run.rows(scored.file)
    if len(recorded) != len(examples):
        return Finding(check, False, f"{len(recorded)} scored rows of {len(examples)} rows")
    places: list[int] = []
    for batch in reversed(scorer.batches(examples, record.kind)):
        places += batch if len(places) < least else []
    # In the order of the split: scoring sorts by length, and rows of equal length must keep their order.
    places.sort()
    chosen = [examples[place] for place in places]
    rows = scorer.rows(chosen, f"scoring {scored.name} again", record.kind, base=scored.is_base)
    asked = list(zip(chosen, rows, [recorded[place] for place in places], strict=True))
    is_elsewhere = not record.execution.rounds_as(here)
    if record.kind == "answers":
        return _compared_outputs(run, scorer, check, asked, scored, is_elsewhere=is_elsewhere)
    return _compared_numbers(run, check, asked, scored, is_elsewhere)


def _compared_outputs(
    run: CheckedRun, scorer: Scorer, check: str, asked: Asked, scored: Scored, *, is_elsewhere: bool
) -> Finding:
    """Whether the outputs come out as they were; on another device, whether rounding explains those that do not."""
    different = [(example, new, old) for example, new, old in asked if new.output != old.output]
    where = f"recorded on {scored.record.execution}"
    if not different:
        return Finding(check, True, f"{len(asked)} outputs come out as they were")
    if not is_elsewhere:
        first, count = different[0][0].id, f"{len(different)} of {len(asked)} rows differ"
        return Finding(check, False, f"row {first}: another output than the recorded one ({count}); {where}")
    tolerance = TOLERANCES[run.config.train.dtype].gap
    with scored_model(scorer.arm, scorer.config, scored.is_base) as model:
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


def _compared_numbers(run: CheckedRun, check: str, asked: Asked, scored: Scored, is_elsewhere: bool) -> Finding:
    """Whether the losses or the drifts of rows are the recorded ones, up to rounding."""
    record = scored.record
    tolerances, where = TOLERANCES[run.config.train.dtype], f"recorded on {record.execution}"
    tolerance, least = tolerances.row if is_elsewhere else tolerances.loss, LEAST[record.kind]
    pairs = [(_numbers(new, record.kind), _numbers(old, record.kind)) for _, new, old in asked]
    for (_, row, _), (now, before) in zip(asked, pairs, strict=True):
        # Written so that NaN is beyond it.
        if not (before and now[1:] == before[1:] and _share(now[0], before[0], least) <= tolerance):
            explanation = f"row {row.id}: now {now}, the file says {before or None}; {where}"
            return Finding(check, False, explanation)
    if not is_elsewhere:
        return Finding(check, True, f"{len(asked)} rows come out as they were, within {tolerance:g}")
    total_now, total_before = (sum(numbers[0] for numbers in side) for side in zip(*pairs, strict=True))
    of_all = _share(total_now, total_before, least * len(asked))
    return Finding(
        check,
        of_all <= tolerances.mean,
        f"the mean of {len(asked)} rows differs by {of_all:.2%} ({tolerances.mean:.2%} is allowed on another "
        f"device), and no row's by more than {tolerance:.0%}; {where}",
        by_rounding=0 < of_all <= tolerances.mean,
    )


def _numbers(row: PredictionRow, kind: Kind) -> list[float]:
    """The drift of a row in nats, or the loss of its target in nats and its number of tokens; empty if it has none."""
    value = row.scores.get(DRIFT if kind == "drift" else TARGET_LOSS_BY_TOKEN, [])
    return list(map(float, value if isinstance(value, list) else [value]))


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
