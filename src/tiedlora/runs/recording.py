"""The record of a run, built once, when the run ends."""

from __future__ import annotations

from tiedlora import tying
from tiedlora.config.identity import config_tree, identity, run_id
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import (
    ConfigRecord,
    DataRecord,
    Identity,
    RunRecord,
    SplitScores,
    TrainingRecord,
)
from tiedlora.runs.session import RunSession
from tiedlora.runs.trainer import Trained


def build_record(
    session: RunSession, trained: Trained, folder: RunFolder, adapter_bytes: int, scores: dict[str, SplitScores]
) -> RunRecord:
    """The content of result.json, from a run that is trained and scored."""
    config = session.config
    return RunRecord(
        run_id=run_id(config),
        identity=Identity.from_tree(identity(config)),
        config=ConfigRecord.from_tree(config_tree(config)),
        seed=config.seed,
        code=session.code,
        versions=session.versions,
        execution=session.execution,
        base=session.base.record,
        trainable_params=session.trainable_params,
        share_of_lora=session.trainable_params / tying.lora_params(config.rank.r, config.model.architecture),
        data={
            split: DataRecord(digest=session.data_digests[split], **fitted.counts)
            for split, fitted in session.fitted.items()
        },
        training=_training(session, trained),
        adapter_bytes=adapter_bytes,
        scores=scores,
        status="done",
        files=folder.checksums("adapter/*"),
        stored_params=_stored_params(session),
        more_ends=list(session.encoder.more_ends) or None,
        admission=session.admission,
    )


def _stored_params(session: RunSession) -> int | None:
    """How many numbers the arm's files hold; None if they are the trained ones."""
    count = session.attached.stored_params()
    return count if count != session.trainable_params else None


def _training(session: RunSession, trained: Trained) -> TrainingRecord:
    state = trained.state
    return TrainingRecord(
        steps=state.step,
        tokens=state.tokens,
        target_tokens=state.target_tokens,
        seconds=state.seconds,
        tokens_per_s=state.tokens / state.seconds,
        clipped_share=state.clipped_steps / state.step,
        skipped_steps=state.skipped_steps,
        validation_loss_first=state.validation[0][1],
        validation_loss_last=state.validation[-1][1],
        best_step=state.best_step(),
        scored_step=state.best_step() if session.config.score.checkpoint == "best" else state.step,
        peak_memory_bytes=trained.peak_memory_bytes,
        halvings=state.halvings or None,
        continued_from=state.continued_from or None,
    )
