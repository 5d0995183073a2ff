"""The training loop. It takes callables and iterables, and knows neither W&B nor Hydra nor files."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tiedlora.config.schema import TrainConfig
from tiedlora.data.encoding import Batch
from tiedlora.errors import UserError, out_of_memory

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""


@dataclass
class Progress:
    """Everything the loop carries from step to step beside tensors; a checkpoint holds it whole."""

    step: int = 0
    tokens: int = 0
    """Real tokens passed through the model, padding not counted."""
    target_tokens: int = 0
    clipped_steps: int = 0
    skipped_steps: int = 0
    """Steps without an update, since their loss or gradient was not finite."""
    seconds: float = 0.0
    """Of training steps alone, without validation and checkpoints."""
    validation: list[list[float]] = field(default_factory=list)
    """[step, loss] pairs, mean over target tokens."""

    def best_step(self) -> int:
        """The step of the lowest validation loss (the earlier of equals)."""
        return int(min(self.validation, key=lambda pair: (pair[1], pair[0]))[0])


@dataclass
class Calls:
    """What the loop is handed."""

    batches: Callable[[int], list[Batch]]
    """Optimizer step (from 1) -> its microbatches."""
    loss_sum: Callable[[Batch], Tensor]
    """Summed cross-entropy over a batch's target tokens."""
    validate: Callable[[], float]
    """Mean loss a target token on the validation rows."""
    save: Callable[[Progress], None]
    """Write a checkpoint."""
    log: Callable[[list[dict[str, Any]]], None]
    """Take rows of metrics, those of several steps at once."""
    describe: Callable[[int], str]
    """Step -> which rows it holds, for the message of a non-finite loss."""
    stop: Callable[[], bool]
    """Whether somebody asked the run to end; with several processes, the same answer in each."""
    add_up: Callable[[Sequence[Tensor]], None] = lambda tensors: None
    """Replace tensors by their sums over all processes that train together."""
    process: int = 0
    """This one's number among them: it draws its own dropout masks."""


def learning_rate(step: int, train: TrainConfig) -> float:
    """The rate of optimizer step `step`, counted from 1.

    Warm-up step k uses lr * k / warmup_steps: the first step moves (a warm-up that starts at 0 would
    waste it, and with it the only step at which just the zero part has a gradient). Cosine then ends
    at min_lr on the last step.
    """
    assert train.lr is not None
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    share = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return float(train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * share)) / 2)


def build_optimizer(parts: dict[str, torch.nn.Parameter], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trained parts, one group a part; weight decay never touches u and v.

    Decay would pull u and v from 1 towards 0, which is not what no change means for them.
    """
    groups = []
    for letter in "ABuv":
        found = [parameter for name, parameter in parts.items() if name.endswith(f".{letter}")]
        if found:
            groups.append(
                {
                    "params": found,
                    "lr_factor": getattr(train.lr_factor, letter),
                    "weight_decay": train.weight_decay if letter in "AB" else 0.0,
                }
            )
    on_cuda = next(iter(parts.values())).is_cuda
    return torch.optim.AdamW(
        groups, lr=train.lr or 0.0, betas=(train.betas[0], train.betas[1]), eps=train.eps, fused=on_cuda
    )


def train(progress: Progress, calls: Calls, optimizer: torch.optim.Optimizer, config: TrainConfig, seed: int) -> None:
    """Train from `progress` to config.steps, advancing `progress` in place.

    The gradient of a step is that of the mean loss over all its target tokens, so it does not depend
    on how the step is cut into microbatches.

    Raises:
        UserError: the loss or the gradient is not finite (for more steps than may be skipped), or memory is short.
        Interrupted: `calls.stop` said so; a checkpoint of the last finished step is written.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pending: list[dict[str, Any]] = []
    if not progress.validation:
        _validate(progress, calls)
    started = time.perf_counter()

    def settle() -> None:
        """Fetch the pending steps' numbers (the one place that waits for the device), check, log."""
        nonlocal started
        for row in pending:
            row.update({key: value.item() for key, value in row.items() if isinstance(value, Tensor)})
            if "train/skipped" in row:
                continue
            if not (math.isfinite(row["train/loss"]) and math.isfinite(row["train/grad_norm"])):
                already = f" ({progress.skipped_steps} are skipped already)" if progress.skipped_steps else ""
                raise UserError(_not_finite(row, calls, f"lower train.lr, or raise train.skip_nonfinite{already}"))
            progress.clipped_steps += config.clip is not None and row["train/grad_norm"] > config.clip
        progress.seconds += time.perf_counter() - started
        calls.log([{**row, "train/seconds": progress.seconds} for row in pending])
        pending.clear()
        started = time.perf_counter()

    while progress.step < config.steps:
        step = progress.step + 1
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        torch.manual_seed(step_seed(seed, step, calls.process))

        batches = calls.batches(step)
        counts = torch.tensor([sum(len(batch.targets) for batch in batches), sum(batch.tokens for batch in batches)])
        calls.add_up([counts])
        step_targets, step_tokens = (int(count) for count in counts)
        step_loss = torch.zeros((), device=parameters[0].device)
        try:
            for batch in batches:
                loss = calls.loss_sum(batch) / step_targets
                loss.backward()  # type: ignore[no-untyped-call]
                step_loss = step_loss + loss.detach()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(_no_memory(step, batches, config)) from error
        calls.add_up([step_loss, *_gradients(parameters)])
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip if config.clip is not None else math.inf)
        # Only a run that may skip waits for the numbers of every step; the sums are the same in all processes.
        skipping = progress.skipped_steps < config.skip_nonfinite and not bool((step_loss + norm).isfinite())
        if not skipping:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        progress.step = step
        progress.tokens += step_tokens
        progress.target_tokens += step_targets
        row = {
            "step": step,
            "train/loss": step_loss,
            "train/grad_norm": norm,
            "train/lr": rate,
            "train/tokens": progress.tokens,
        }
        if skipping:
            progress.skipped_steps += 1
            count = f"{progress.skipped_steps} of train.skip_nonfinite={config.skip_nonfinite}"
            log.warning("%s", _not_finite(row, calls, f"its update is skipped ({count})"))
            # Not the numbers: JSON has none for what is not finite.
            del row["train/loss"], row["train/grad_norm"]
            row["train/skipped"] = progress.skipped_steps
        pending.append(row)

        last, asked_to_stop = step == config.steps, calls.stop()
        validating = last or (config.validate_every and step % config.validate_every == 0)
        saving = last or asked_to_stop or step % config.checkpoint_every == 0
        if validating or saving or step % config.log_every == 0:
            settle()
        if validating:
            _validate(progress, calls)
        if saving:
            calls.save(progress)
        if asked_to_stop and not last:
            raise Interrupted
        if validating or saving:
            started = time.perf_counter()


def _gradients(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """Their gradients, zeros where this process had no row (a short last step)."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """The seed of a step's dropout masks: a pure function, so a resumed run draws the same ones."""
    name = f"dropout/{seed}/{step}" + (f"/{process}" if process else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def _not_finite(row: dict[str, Any], calls: Calls, then: str) -> str:
    return (
        f"step {row['step']}: the loss is {float(row['train/loss'])} and the gradient's norm "
        f"{float(row['train/grad_norm'])} at learning rate {row['train/lr']:.3g}; {then}. "
        f"The step's rows: {calls.describe(row['step'])}"
    )


def _no_memory(step: int, batches: list[Batch], config: TrainConfig) -> str:
    rows, length = max((tuple(batch.input_ids.shape) for batch in batches), key=lambda shape: shape[0] * shape[1])
    ways = []
    if rows > 1:
        ways.append(f"lower train.microbatch_tokens below {rows * length} or train.microbatch_size below {rows}")
    if not config.recompute_activations:
        ways.append("set train.recompute_activations=true (slower)")
    then = f"{', or '.join(ways)}, then the run goes on" if ways else "shorten the rows, or take a smaller model"
    return f"step {step}: out of memory with {rows} rows of up to {length} tokens a forward pass; {then}"


def _validate(progress: Progress, calls: Calls) -> None:
    loss = calls.validate()
    if not math.isfinite(loss):
        raise UserError(
            f"step {progress.step}: the validation loss is {loss}; "
            + ("lower train.lr" if progress.step else "it is so before any training: try train.dtype=float32")
        )
    progress.validation.append([progress.step, loss])
    calls.log([{"step": progress.step, "validation/loss": loss}])
