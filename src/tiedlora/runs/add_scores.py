"""Score more splits or metrics of a finished run. Its identity, its training and its other scores stay unchanged."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace

from tiedlora.config.schema import FORGETTING, Config
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.models import products
from tiedlora.models.device import execution_on, set_up_device
from tiedlora.records import study_files
from tiedlora.records.loss_metrics import DRIFT
from tiedlora.records.provenance import CHAT_TEMPLATE, TOKENIZER, Execution, package_versions
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import ADAPTER, RunRecord, SplitScores
from tiedlora.runs import library
from tiedlora.runs.inputs import read_rows, warn_of_trained_rows
from tiedlora.runs.loading import cached_base, check_scores_mean_something
from tiedlora.scoring.passages import check_source
from tiedlora.scoring.passes import missing_passes, wanted_passes
from tiedlora.scoring.split import Scorer
from tiedlora.tasks import load_examples, load_task
from tiedlora.training.loss import chunks_within
from tiedlora.training.signals import StopSignal

log = logging.getLogger(__name__)


def add_scores(folder: RunFolder, config: Config, again: bool = False) -> RunRecord:
    """Score what the run lacks of `config.score`, and write it into its record and predictions/.

    Args:
        config: the run's configuration, with the paths, the placement of the model and the scores of this command.
            Earlier losses of neutral text are replaced.
        again: also score what is recorded. With score.metrics=null, the splits' earlier scores are replaced.

    Raises:
        UserError: the run is not finished, its base model or adapter has changed or is not there, a metric is unknown,
            or check_scores_mean_something refuses the scores.
        KeyboardInterrupt: a signal asked to stop. The same command goes on after the last complete split.
    """
    finished, score, task = folder.finished_record(), config.score, load_task(config.task)
    # The run may have been moved, or made by another user: it is written where it is now.
    config = replace(config, outputs=str(folder.path.parent))
    wanted = wanted_passes(score.metrics, task, score.drift)
    if score.forgetting is not None:
        check_source(score.forgetting)
    place = folder.path.resolve().parent
    if place.name == study_files.RUNS and study_files.is_study(place.parent):
        raise UserError(f"{folder.path}: is a study's record; copy it to outputs with scripts/study.py restore first")
    if not finished.keeps(ADAPTER):
        raise UserError(f"{folder.path}: is a study's record without its adapter, which scores need; repeat the run")
    if finished.admission is not None:
        check_scores_mean_something(finished.admission, config)
    with StopSignal(), ExitStack() as undone:
        device = set_up_device(config.train.device, finished.execution.threads)
        base = cached_base(config, device)
        arm = library.load(folder.adapter, base)
        undone.callback(arm.detach)
        # Answers of a run's splits end alike, also if an earlier version wrote the first of them.
        encoder = Encoder(base.tokenizer, config.task, config.model.context, finished.more_ends or ())
        digests, here = {CHAT_TEMPLATE: encoder.template_digest}, package_versions()
        if all(finished.versions.get(name) == here.get(name) for name in ("tokenizers", "transformers")):
            # Another version of these packages may write the same rules in other words.
            digests[TOKENIZER] = encoder.tokenizer_digest
        for name, digest in digests.items():
            if finished.versions.get(name) not in (None, digest):
                raise UserError(f"{folder.path}: was trained with another {name} of the model; restore it")
        scorer = Scorer(arm, encoder, task, config, base.record)
        undone.enter_context(folder.locked())
        undone.enter_context(products.on_any_cpu(device, config.train.dtype))
        undone.enter_context(chunks_within(config.train.loss_memory_mb))
        folder.error_file.unlink(missing_ok=True)
        # Read again now that no other process can add scores.
        record = folder.finished_record()
        for split in score.splits:
            recorded = record.scores.get(split)
            # Losses that are scored again keep their drift.
            has_drift = recorded is not None and DRIFT in recorded.metrics
            again_passes = replace(wanted, drift=wanted.losses and (score.drift or has_drift))
            passes = again_passes if again else missing_passes(score.metrics, recorded, score.drift)
            if not passes:
                continue
            kept = None if again and score.metrics is None else recorded
            examples = load_examples(task, split, config.data_root)
            if split == "test":
                # A run that trains and scores in one go compares them before its first step.
                name = task.config.name
                try:
                    rows = read_rows(config)
                    warn_of_trained_rows(name, rows.examples["train"], examples)
                    if rows.digests["train"] != record.data["train"].digest:
                        log.warning(
                            "task=%s: the training rows here are not those of the run, so whether it has trained on "
                            "test rows is not known",
                            name,
                        )
                except UserError as error:
                    log.warning("task=%s: the test rows are not compared with the training rows: %s", name, error)
            scores = scorer.score_split(split, examples, folder, passes, kept)
            scores = _with_place(scores, kept, record, execution_on(device))
            record = replace(record, scores={**record.scores, split: scores})
            folder.write_record(record)
        if score.forgetting is not None:
            scores = _with_place(scorer.score_forgetting(score.forgetting, folder), None, record, execution_on(device))
            record = replace(record, scores={**record.scores, FORGETTING: scores})
            folder.write_record(record)
        return record


def _with_place(scores: SplitScores, kept: SplitScores | None, record: RunRecord, here: Execution) -> SplitScores:
    """The scores with every place where they were made, `here` and that of what is kept of earlier ones."""
    places = (kept.executions or [record.execution]) if kept is not None else []
    places = [*places, *([] if any(place.rounds_as(here) for place in places) else [here])]
    return replace(scores, executions=None if all(map(record.execution.rounds_as, places)) else places)
