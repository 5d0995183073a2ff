"""The training of one session: the loop and the functions that it calls, from a checkpoint to the last step."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.adapter import linear
from tiedlora.config.families import layout_of
from tiedlora.config.identity import config_tree
from tiedlora.data.batching import Batch, BatchSampler, by_length, empty_batch, microbatches
from tiedlora.errors import UserError, is_out_of_memory
from tiedlora.models import attention, products
from tiedlora.models.device import free_memory, peak_memory_bytes, restart_peak_memory
from tiedlora.records.rows import MetricsRow, ValidationLosses, read_validation_losses
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import Halving
from tiedlora.runs.session import RunSession
from tiedlora.scoring.memory import within_memory
from tiedlora.scoring.split import Scorer
from tiedlora.scoring.summary import summarise
from tiedlora.tracking.appended_file import AppendedFile
from tiedlora.tracking.base import TrackedRun
from tiedlora.tracking.progress import ProgressBar
from tiedlora.tracking.run_trackers import RunTrackers
from tiedlora.training import checkpoint, compiling, loop, sharding
from tiedlora.training.loss import RowLosses, mean_loss, row_losses, target_loss
from tiedlora.training.optimizer import build_optimizer
from tiedlora.training.signals import StopSignal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The results of training. The adapter on the session's model is that of the step that will be scored."""

    state: loop.TrainState
    peak_memory_bytes: int
    trackers: RunTrackers
    """Still open, because they get the run's summary after scoring."""


class Trainer:
    """One training.

    Args:
        folder: the run's folder. config.yaml, metrics.jsonl, validation_losses.jsonl and the checkpoints are written
            there.
        stop: if a signal came, training writes a checkpoint after the current step and ends.
        resume_from: the folder of the checkpoints to continue from; None takes the run's own.
    """

    def __init__(
        self, session: RunSession, folder: RunFolder, stop: StopSignal, resume_from: Path | None = None
    ) -> None:
        self.session, self.folder, self.stop = session, folder, stop
        self.config, self.arm = session.config, session.attached
        # 1. The optimizer, and the newest checkpoint if there is one.
        self.parts = self.arm.trained_parts()
        self.optimizer = build_optimizer(self.arm.parameter_groups(self.config.train.lr_factor), self.config.train)
        checkpoints = resume_from or folder.checkpoints
        state = checkpoint.restore(checkpoints, self.parts, self.optimizer, session.inputs(), self.arm.buffers())
        self.state = state or loop.TrainState()
        self.resumed_step = None if state is None else state.step
        self._check_same_step()
        if state is not None:
            log.info("continuing from step %d", state.step)
        # 2. The order of the training rows, and the validation batches.
        self.rows = session.fitted["train"].encoded
        self.sampler = BatchSampler([len(row) for row in self.rows], self.config.train, self.config.seed)
        self.pad_id = session.base.tokenizer.eos_token_id
        self.held_out = session.fitted["validation"].encoded[: self.config.train.validation_rows]
        self.validation_order = by_length(self.held_out)
        self.validation_batches = self._validation_batches()

    def train(self) -> Trained:
        """Train to the last step.

        Raises:
            UserError: a loss that is not finite, too little memory, or a tracker that refuses to start.
            StoppedEarly: the stop signal came; a checkpoint is written.
        """
        # 1. Write config.yaml, and open the trackers.
        config_yaml = OmegaConf.to_yaml(config_tree(self.config))
        storage.write_bytes(self.folder.config_file, config_yaml.encode())
        run = TrackedRun(self.folder.path.name, self.folder.path, self.config, self.session.trainable_params)
        self.trackers = RunTrackers(run, self.folder.metrics_file, self.resumed_step)
        losses_file = self.folder.validation_losses_file
        self.row_losses_file = AppendedFile(losses_file, read_validation_losses, self.resumed_step)
        # 2. Train.
        restart_peak_memory(self.session.device)
        self._run_loop()
        peak = peak_memory_bytes(self.session.device)
        # 3. Load the adapter of the step that is scored. Only the first process has its file.
        if self.config.score.checkpoint == "best":
            world, folder = self.session.world, self._best_folder(self.state.best_step())
            if world.is_first:
                self.arm.load_values(folder)
            best = {name: part.data.cpu() for name, part in self.parts.items()} if world.is_first else {}
            for name, values in world.gather(best)[0].items():
                self.parts[name].data.copy_(values)
        return Trained(self.state, peak, self.trackers)

    def _check_same_step(self) -> None:
        """Raises UserError in every process if the processes continue from different steps."""
        step, world = self.state.step, self.session.world
        first, last = world.smallest(step), -world.smallest(-step)
        if first != last:
            raise UserError(
                f"{self.folder.checkpoints}: of the {world.size} processes, one continues from step {first} and "
                f"another from step {last}; make all of them see the same outputs={self.config.outputs}"
            )

    def _run_loop(self) -> None:
        model = self.session.model
        self.bar = ProgressBar("training", self.config.train.steps, "steps", self.state.step)
        hooks = loop.LoopHooks(
            batches=self._batches,
            loss_sum=lambda batch: target_loss(model, batch),
            validate=self._validate,
            save_checkpoint=self._save_checkpoint,
            log_metrics=self._log_metrics,
            describe_rows=self._describe_rows,
            validation_scores=self._validation_scores,
            stop_requested=lambda: self.session.world.any(self.stop.requested()),
            world=self.session.world,
        )
        model.train()
        self.stop.finish_step_first = True
        try:
            with self.trackers.closed_on_error(), self._training_blocks():
                loop.train(self.state, hooks, self.optimizer, self.config.train, self.config.seed)
        finally:
            self.stop.finish_step_first = False
            self.bar.close()
        model.eval()

    @contextmanager
    def _training_blocks(self) -> Iterator[None]:
        """Inside the context, the blocks are compiled and recompute activations, as the configuration says."""
        train, model = self.config.train, self.session.model
        blocks: Any = model.get_submodule(layout_of(self.config.model.architecture).layers)
        weights = linear.weight_count(blocks)
        tokens = train.steps * train.batch_size * sum(map(len, self.rows)) / len(self.rows)
        if train.recompute_activations:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            # accelerate's hooks move weights while a block runs, which cannot be compiled.
            wish = train.compile if self.arm.compiles and not self.config.model.device_map else "never"
            slow = products.without_instructions(self.session.device, train.dtype)
            if slow:
                log.info("this CPU has no instructions for bfloat16: products are computed in float32 and rounded")
            worth_it = compiling.decide(wish, self.session.device.type, weights, tokens, slow)
            compiled = compiling.compiled(blocks, model.get_input_embeddings()) if worth_it else nullcontext()
            with attention.rows_not_packed(), compiled:
                yield
        finally:
            if train.recompute_activations:
                model.gradient_checkpointing_disable()

    def _batches(self, step: int) -> list[Batch]:
        """The microbatches of an optimizer step for this process."""
        rows = sorted((self.rows[number] for number in self.sampler.rows_of_step(step)), key=len)
        train, context = self.config.train, self.session.encoder.context
        own_rows = self.session.world.local_rows(rows)
        tokens = self._pass_tokens("training")
        batches = microbatches(own_rows, self.pad_id, train.microbatch_size, tokens, context)
        if train.shard:
            # All processes must make the same number of passes. One without targets adds zeros to the gradients.
            most = -self.session.world.smallest(-len(batches))
            batches += [empty_batch(self.pad_id)] * (most - len(batches))
        return [batch.to(self.session.device) for batch in batches]

    def _validation_batches(self) -> list[Batch]:
        size, tokens = self.config.score.batch_size, self._pass_tokens("validation")
        return [batch.to(self.session.device) for batch in microbatches(self.held_out, self.pad_id, size, tokens)]

    def _pass_tokens(self, during: str) -> int | None:
        """The most tokens of a forward pass: what the configuration says, or less after memory ran out."""
        limits = (self.config.train.microbatch_tokens, self.state.pass_tokens(during))
        return min((limit for limit in limits if limit is not None), default=None)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside the context, the model evaluates, and its blocks run uncompiled."""
        self.session.model.eval()
        with compiling.eager():
            yield
        self.session.model.train()

    def _validate(self) -> float:
        """The validation loss. The loss of each row is appended to validation_losses.jsonl.

        If the best adapter is scored, it is stored when its loss is the lowest so far.
        """
        with self._evaluating():
            while (losses := self._row_losses()) is None:
                self.validation_batches = self._validation_batches()
        loss = mean_loss(losses)
        # The loop refuses a loss that is not finite, which JSON cannot represent.
        if math.isfinite(loss):
            self.row_losses_file.append([self._in_row_order(losses)])
        best_so_far = all(loss < earlier for _, earlier in self.state.validation)
        if self.config.score.checkpoint == "best" and self.session.world.is_first and best_so_far:
            self.arm.save(self._best_folder(self.state.step), self.session.base.record)
        return loss

    def _validation_scores(self) -> dict[str, float]:
        """The scores of the first rows of validation, as train.validation_answers asks for."""
        session, count = self.session, self.config.train.validation_answers
        if not count:
            return {}
        examples = session.examples("validation")[:count]
        scorer = Scorer(self.arm, session.encoder, session.task, self.config, session.base.record, session.world)
        with self._evaluating():
            rows, _ = within_memory(scorer, lambda smaller: smaller.adapted_rows(examples, f"step {self.state.step}"))
        return {f"validation/{name}": scored.value for name, scored in summarise(rows, session.task).items()}

    def _row_losses(self) -> list[RowLosses] | None:
        """The losses of all validation batches, each process computing its share; None if memory ran out.

        Then the next batches are smaller.

        Raises:
            MemoryError, RuntimeError: memory ran out with a single row, or the model is sharded.
        """
        world, model, too_large = self.session.world, self.session.model, None
        own: list[RowLosses] = []
        with sharding.equal_passes(model, world):
            for batch in world.local_rows(self.validation_batches):
                try:
                    own.append(row_losses(model, batch))
                except (MemoryError, RuntimeError) as error:
                    if len(batch.input_ids) == 1 or sharding.is_sharded(model) or not is_out_of_memory(error):
                        raise
                    too_large = batch.tokens
                    break
        if world.any(too_large is not None):
            self._halve_validation(world.smallest(too_large or sys.maxsize) // 2)
            return None
        if world.size == 1:
            return own
        shares = world.gather([losses.to_cpu() for losses in own])
        return [shares[number % world.size][number // world.size] for number in range(len(self.validation_batches))]

    def _halve_validation(self, tokens: int) -> None:
        log.warning("validation: out of memory; batches have at most %d tokens from now on", tokens)
        self.state.halvings.append(Halving(self.state.step, "validation", tokens))
        free_memory()

    def _in_row_order(self, losses: list[RowLosses]) -> ValidationLosses:
        tokens = torch.cat([batch.tokens for batch in losses])
        means = torch.cat([batch.sums for batch in losses]) / tokens
        rows = sorted(zip(self.validation_order, means.tolist(), tokens.tolist(), strict=True))
        return ValidationLosses(self.state.step, [mean for _, mean, _ in rows], [count for _, _, count in rows])

    def _best_folder(self, step: int) -> Path:
        # Each step has its own folder: to replace a folder would leave a moment without any.
        return self.folder.checkpoints / f"best-{step:08d}"

    def _save_checkpoint(self, state: loop.TrainState) -> None:
        if self.session.world.is_first:
            inputs, buffers = self.session.inputs(), self.arm.changed_buffers()
            checkpoint.save(self.folder.checkpoints, state, self.parts, self.optimizer, inputs, buffers)

    def _log_metrics(self, rows: list[MetricsRow]) -> None:
        self.trackers.log(rows)
        if rows and "train/tokens" in (last := rows[-1].values):
            rate = last["train/tokens"] / max(last["train/seconds"], 1e-9)
            self.bar.advance(len(rows), f"loss {last.get('train/loss', math.nan):.3f}, {rate:.0f} tokens/s")

    def _describe_rows(self, step: int) -> str:
        return f"training rows {[self.session.train_examples[i].id for i in self.sampler.rows_of_step(step)]}"
