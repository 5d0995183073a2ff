"""Score more of a finished run: each kind of scores of a split is a new file. What is there stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from tiedlora.config.schema import Config
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.models.device import set_up_device
from tiedlora.records import study_files
from tiedlora.records.provenance import CHAT_TEMPLATE, TOKENIZER, package_versions
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord
from tiedlora.records.scores import Kind, read_run_scores
from tiedlora.runs import library
from tiedlora.runs.inputs import read_rows, warn_of_trained_rows
from tiedlora.runs.loading import cached_base, check_scores_mean_something, computing_as
from tiedlora.scoring.passages import check_source
from tiedlora.scoring.split import Scorer
from tiedlora.scoring.wanted import forgetting_to_score, missing_scores, wanted_scores
from tiedlora.tasks import Example, digest, load_examples, load_task
from tiedlora.training.signals import StopSignal

log = logging.getLogger(__name__)


def add_scores(folder: RunFolder, config: Config, again: bool = False) -> None:
    """Score what the run lacks of `config.score`. Each kind of scores of a split becomes a file of its own.

    Args:
        config: the run's configuration, with the paths, the placement of the model and the scores of this command.
            Losses of another neutral text are replaced.
        again: also score again what has a file, which is replaced.

    Raises:
        UserError: the run is not finished, its base model or adapter has changed or is not there, a metric is unknown,
            the rows are not those of the split's other scores, or check_scores_mean_something refuses the scores.
        KeyboardInterrupt: a signal asked to stop. The same command goes on after the last complete file.
    """
    finished, score, task = folder.finished_record(), config.score, load_task(config.task)
    # The run may have been moved, or made by another user: it is written where it is now.
    config = replace(config, outputs=str(folder.path.parent))
    wanted = wanted_scores(score.metrics, task, score.drift)
    if score.forgetting is not None:
        check_source(score.forgetting)
    _check_can_be_scored(folder)
    if finished.admission is not None:
        check_scores_mean_something(finished.admission, config)
    with StopSignal(), ExitStack() as undone:
        device = set_up_device(config.train.device, finished.execution.threads)
        undone.enter_context(computing_as(config.train, device))
        base = cached_base(config, device)
        arm = library.load(folder.adapter, base)
        undone.callback(arm.detach)
        # Answers of a run's splits end alike.
        encoder = Encoder(base.tokenizer, config.task, config.model.context, finished.more_ends or ())
        _check_same_tokens(folder, finished, encoder)
        scorer = Scorer(arm, encoder, task, config, base.record, run_id=finished.run_id)
        undone.enter_context(folder.locked())
        folder.error_file.unlink(missing_ok=True)
        # Asked again now that no other process can add scores.
        missing = dict.fromkeys(score.splits, wanted) if again else missing_scores(score, folder)
        for split, lacking in missing.items():
            examples = load_examples(task, split, config.data_root)
            _check_same_rows(folder, finished, split, examples, lacking.kinds)
            if split == "test":
                _compare_with_trained_rows(config, finished, examples)
            scorer.score_split(split, examples, folder, lacking)
        forgetting = score.forgetting if again else forgetting_to_score(score, folder)
        if forgetting is not None:
            scorer.score_forgetting(forgetting, folder)


def _check_can_be_scored(folder: RunFolder) -> None:
    """Refuse a study's record, which never changes, and a run without its adapter."""
    place = folder.path.resolve().parent
    if place.name == study_files.RUNS and study_files.is_study(place.parent):
        raise UserError(f"{folder.path}: is a study's record; copy it to outputs with scripts/study.py restore first")
    if not folder.has_adapter:
        raise UserError(
            f"{folder.path}: is a study's record without its adapter, which scores need; repeat the run with another "
            "outputs=, or here with force=true (then its other scores are made again too)"
        )


def _check_same_tokens(folder: RunFolder, finished: RunRecord, encoder: Encoder) -> None:
    """Refuse a chat template or a tokenizer other than those of the training."""
    digests, here = {CHAT_TEMPLATE: encoder.template_digest}, package_versions()
    if all(finished.versions.get(name) == here.get(name) for name in ("tokenizers", "transformers")):
        # Another version of these packages may write the same rules in other words.
        digests[TOKENIZER] = encoder.tokenizer_digest
    for name, current in digests.items():
        if finished.versions.get(name) not in (None, current):
            raise UserError(f"{folder.path}: was trained with another {name} of the model; restore it")


def _check_same_rows(
    folder: RunFolder, finished: RunRecord, split: str, examples: Sequence[Example], kinds: Sequence[Kind]
) -> None:
    """Refuse rows other than those of the run, or of the split's scores that stay."""
    current = digest(examples)
    if split in finished.data and finished.data[split].digest != current:
        raise UserError(
            f"{folder.path}: was trained beside other {split} rows (sha256 {finished.data[split].digest[:12]}, now "
            f"{current[:12]}); restore them"
        )
    for record in read_run_scores(folder).of(split):
        if record.kind not in kinds and record.digest != current:
            raise UserError(
                f"{folder.path}: its {record.kind} of {split} are of other rows (sha256 {record.digest[:12]}, now "
                f"{current[:12]}); restore them, or score every metric of the split with --again"
            )


def _compare_with_trained_rows(config: Config, record: RunRecord, examples: Sequence[Example]) -> None:
    """Warn if the run may have trained on test rows. One that scores in one go has asked before its first step."""
    name = config.task.name
    try:
        rows = read_rows(config)
    except UserError as error:
        log.warning("task=%s: the test rows are not compared with the training rows: %s", name, error)
        return
    warn_of_trained_rows(name, rows.examples["train"], examples)
    if rows.digests["train"] != record.data["train"].digest:
        log.warning(
            "task=%s: the training rows here are not those of the run, so whether it has trained on test rows is not "
            "known",
            name,
        )
