"""The training loop. It takes callables, and knows neither a tracker nor Hydra nor files."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tiedlora.adapter.parts import seed_of
from tiedlora.config.schema import TrainConfig
from tiedlora.data.batching import Batch
from tiedlora.errors import Diverged, Paused, StoppedEarly, UserError, is_out_of_memory
from tiedlora.models.device import free_memory
from tiedlora.records.provenance import ContinuedFrom
from tiedlora.records.rows import MetricsRow
from tiedlora.records.run_record import Halving
from tiedlora.training.distributed import ALONE, World
from tiedlora.training.optimizer import learning_rate

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """The state of the loop without its tensors. A checkpoint holds all of it."""

    step: int = 0
    """Finished optimizer steps."""
    tokens: int = 0
    """Real tokens of the training passes. Padding is not counted, nor are the tokens that a reward's answers sample."""
    target_tokens: int = 0
    clipped_steps: int = 0
    skipped_steps: int = 0
    """Steps without an update, because their loss or gradient was not finite."""
    seconds: float = 0.0
    """Seconds of the training steps, without validation and checkpoints."""
    validation: list[list[float]] = field(default_factory=list)
    """[step, loss] pairs. The loss is a mean over target tokens."""
    peak_memory_bytes: int = 0
    """The peak memory of the processes that trained, up to this checkpoint."""
    halvings: list[Halving] = field(default_factory=list)
    """Where memory ran out. They decide which rows share a pass, and so the rounding: a resumed run needs them."""
    continued_from: list[ContinuedFrom] = field(default_factory=list)
    """How earlier steps were made, if the run continued with other code or packages, or elsewhere."""

    def best_step(self, until: float = math.inf) -> int:
        """The step of the lowest validation loss up to a step; of equal losses, the earliest step."""
        measured = [pair for pair in self.validation if pair[0] <= until]
        return int(min(measured, key=lambda pair: (pair[1], pair[0]))[0])


@dataclass
class _StepNumbers:
    """The numbers of one step, still on the device."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    tokens: int
    skipped: int | None = None
    """If this update was skipped: how many updates were skipped so far."""


@dataclass
class Loop:
    """The loop: what it trains with, and the functions that it calls."""

    state: TrainState
    """Where it starts. Every step advances it in place."""
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    seed: int
    batches: Callable[[int], list[Batch]]
    """Optimizer step (counted from 1) -> this process's microbatches."""
    loss_sum: Callable[[Batch], Tensor]
    """The sum of the cross-entropy over a batch's target tokens, or another sum over them."""
    validate: Callable[[], dict[str, float]]
    """validation/loss, the mean loss per target token on the validation rows, and other metrics. If memory runs out, it
    adds to the state's halvings."""
    save_checkpoint: Callable[[TrainState], None]
    count_step: Callable[[], None]
    """Called after each step, before its numbers are fetched."""
    log_metrics: Callable[[list[MetricsRow]], None]
    """Logs rows of metrics, of several steps at once."""
    describe_rows: Callable[[int], str]
    """Optimizer step -> its rows in words, for the message about a loss that is not finite."""
    stop_requested: Callable[[], bool]
    """Whether the run should end after this step. With several processes, all get the same answer."""
    world: World = ALONE
    """The processes that train together. Each draws its own dropout masks."""

    def __post_init__(self) -> None:
        self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self._pending: list[_StepNumbers] = []
        """The numbers of the steps that are not logged yet."""
        self._clock_started = time.perf_counter()

    def train(self) -> None:
        """Train to config.steps.

        The gradient of a step is the gradient of the mean loss over all its target tokens. So it does not depend on how
        the step is split into microbatches.

        Raises:
            Diverged: the loss or the gradient is not finite, more often than config.skip_nonfinite.
            UserError: memory is short.
            Paused: config.pause_after is reached; a checkpoint of that step is written.
            StoppedEarly: `stop_requested` returned true; a checkpoint of the last finished step is written.
        """
        state, config, optimizer = self.state, self.config, self.optimizer
        if not state.validation:
            self._validate()
        self._clock_started = time.perf_counter()
        while state.step < config.steps:
            if config.pause_after is not None and state.step >= config.pause_after:
                raise Paused
            step = state.step + 1
            # 1. The learning rate depends only on the step.
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_factor"]

            # 2. Forward and backward passes. If memory runs out, the step starts again with smaller passes.
            loss, target_tokens, tokens = self._passes(step)

            # 3. Sum over processes, then clip.
            for parameter in self._parameters:
                if parameter.grad is None:
                    # This process had no row, in a short last step.
                    parameter.grad = torch.zeros_like(parameter)
            self.world.all_reduce_sum([loss, *(p.grad for p in self._parameters if p.grad is not None)])
            clip = config.clip if config.clip is not None else math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, clip)

            # 4. Update the parameters, or skip the update.
            state.step = step
            state.tokens += tokens
            state.target_tokens += target_tokens
            numbers = _StepNumbers(step, loss, grad_norm, rate, state.tokens)
            # Only a run that may skip updates waits here for the device. The sums are equal in all processes.
            if state.skipped_steps < config.skip_nonfinite and not bool((loss + grad_norm).isfinite()):
                state.skipped_steps += 1
                numbers.skipped = state.skipped_steps
                count = f"{state.skipped_steps} of train.skip_nonfinite={config.skip_nonfinite}"
                log.warning("%s", self._not_finite_message(numbers, f"its update is skipped ({count})"))
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._pending.append(numbers)
            self.count_step()

            # 5. Log, validate, save a checkpoint and stop, if one of these is due.
            self._after_step()

    def _passes(self, step: int) -> tuple[Tensor, int, int]:
        """The forward and backward passes of a step, which sum the gradients of the mean loss.

        Returns:
            This process's share of the mean loss, on the device, and the target tokens and all tokens of the step.

        Raises:
            UserError: memory ran out, and the processes share the model, or with a single row.
        """
        # The dropout masks depend only on the step and the process, so a resumed run draws the same ones.
        process = f"/{self.world.process_index}" if self.world.process_index else ""
        torch.manual_seed(seed_of(f"dropout/{self.seed}/{step}{process}"))
        halvings = len(self.state.halvings)
        batches = self.batches(step)
        if len(self.state.halvings) > halvings:
            # Memory ran out while answers were sampled. A checkpoint has the smaller batches before a step uses them.
            self._save_limit()
        # The target tokens of the whole step, over all processes, are counted before any loss is computed.
        counts = [sum(len(batch.targets) for batch in batches), sum(batch.tokens for batch in batches)]
        target_tokens, tokens = self.world.total(counts)
        total = torch.zeros((), device=self._parameters[0].device)
        too_large: Batch | None = None
        for batch in batches:
            try:
                total = total + self._pass(batch, target_tokens)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.config.shard:
                    raise UserError(_out_of_memory_message(step, batch, self.config)) from error
                too_large = batch
                break
        # With enough memory there is no limit.
        limit = self.world.smallest(sys.maxsize if too_large is None else _half(too_large))
        if limit == sys.maxsize:
            return total, target_tokens, tokens
        if limit == 0:
            raise UserError(_out_of_memory_message(step, too_large, self.config))
        self._halve(step, limit)
        return self._passes(step)

    def _pass(self, batch: Batch, target_tokens: int) -> Tensor:
        """Add the gradient of a batch. If memory runs out, its graph is freed with the frame of this function."""
        loss = self.loss_sum(batch) / target_tokens
        loss.backward()  # type: ignore[no-untyped-call]
        # With model.device_map, the loss may be on another device than the adapter.
        return loss.detach().to(self._parameters[0].device)

    def _halve(self, step: int, limit: int) -> None:
        """Prepare smaller passes. A checkpoint has their limit before any step is finished with them."""
        self.optimizer.zero_grad(set_to_none=True)
        free_memory()
        log.warning("step %d: out of memory; passes have at most %d tokens from now on", step, limit)
        self.state.halvings.append(Halving(step, "training", limit))
        self._save_limit()

    def _save_limit(self) -> None:
        self._flush_metrics()
        self.save_checkpoint(self.state)
        self._clock_started = time.perf_counter()

    def _after_step(self) -> None:
        """Log, validate, save a checkpoint and stop, if one of these is due after this step."""
        step, config = self.state.step, self.config
        last, stopping = step == config.steps, self.stop_requested()
        validating = last or (config.validate_every and step % config.validate_every == 0)
        saving = last or stopping or step == config.pause_after or step % config.checkpoint_every == 0
        if validating or saving or step % config.log_every == 0:
            self._flush_metrics()
        if validating:
            self._validate()
        if saving:
            self.save_checkpoint(self.state)
        # A signal that came during the last validation counts too: what follows is the scoring, which may take long.
        if stopping or (last and self.stop_requested()):
            raise StoppedEarly
        if validating or saving:
            self._clock_started = time.perf_counter()

    def _flush_metrics(self) -> None:
        """Fetch the numbers of the steps since the last call, check them and log them. This waits for the device."""
        rows, problem = [], ""
        for numbers in self._pending:
            values: dict[str, float | int] = {"train/lr": numbers.learning_rate, "train/tokens": numbers.tokens}
            if numbers.skipped is not None:
                # JSON cannot represent a loss that is not finite.
                values["train/skipped"] = numbers.skipped
            else:
                loss, grad_norm = float(numbers.loss), float(numbers.grad_norm)
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    skipped = f" ({self.state.skipped_steps} are skipped already)" if self.state.skipped_steps else ""
                    advice = f"lower train.lr, or raise train.skip_nonfinite{skipped}"
                    problem = self._not_finite_message(numbers, advice)
                    break
                self.state.clipped_steps += self.config.clip is not None and grad_norm > self.config.clip
                values = {"train/loss": loss, "train/grad_norm": grad_norm, **values}
            rows.append(MetricsRow(numbers.step, values))
        self.state.seconds += time.perf_counter() - self._clock_started
        for row in rows:
            row.values["train/seconds"] = self.state.seconds
        self.log_metrics(rows)
        self._pending.clear()
        if problem:
            # After the rows before it, which show how the run came there.
            raise Diverged(problem)
        self._clock_started = time.perf_counter()

    def _validate(self) -> None:
        step, halvings = self.state.step, len(self.state.halvings)
        metrics = self.validate()
        loss = metrics["validation/loss"]
        if not math.isfinite(loss):
            advice = "lower train.lr" if step else "this is before any training, so try train.dtype=float32"
            raise Diverged(f"step {step}: the validation loss is {loss}; {advice}")
        self.state.validation.append([step, loss])
        self.log_metrics([MetricsRow(step, {**metrics})])
        if len(self.state.halvings) > halvings:
            self.save_checkpoint(self.state)

    def _not_finite_message(self, numbers: _StepNumbers, advice: str) -> str:
        return (
            f"step {numbers.step}: the loss is {float(numbers.loss)} and the gradient's norm "
            f"{float(numbers.grad_norm)} at learning rate {numbers.learning_rate:.3g}; {advice}. "
            f"The step's rows: {self.describe_rows(numbers.step)}"
        )


def _half(batch: Batch) -> int:
    """Half of a pass's tokens: its rows then need at least two passes. 0 if it has only one row."""
    return batch.tokens // 2 if len(batch.input_ids) > 1 else 0


def _out_of_memory_message(step: int, batch: Batch | None, config: TrainConfig) -> str:
    if batch is None:
        return f"step {step}: another of the processes ran out of memory with a single row; its message says more"
    rows, length = batch.input_ids.shape
    if config.shard:
        return (
            f"step {step}: out of memory with {rows} rows of {length} tokens; with train.shard=true other processes "
            "wait inside this pass, so the step cannot start again; lower train.microbatch_tokens below "
            f"{rows * length}, or take more processes; the same command continues"
        )
    ways = [] if config.recompute_activations else ["set train.recompute_activations=true (slower)"]
    ways.append("shorten the rows, or take a smaller model")
    return f"step {step}: out of memory with a single row of {length} tokens; {', or '.join(ways)}"
