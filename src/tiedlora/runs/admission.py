"""Measure an arm of another method before its first step: does it start at the base, move, see the future, and reload?

The measurement uses arms of its own, made from the run's seed, and takes them off again. So the run's arm, and the
state of torch's generators, are as they would be without it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiedlora.adapter.arms import Arm, ArmSpec
from tiedlora.adapter.attach import attach_saved, new_arm
from tiedlora.description import BaseModelRecord
from tiedlora.records.run_record import Admission
from tiedlora.tying import LrFactors

ROWS, LENGTH = 3, 24
"""The size of the batch that is measured."""
NOISE = 0.02
"""Standard deviation of what is added to trained parameters before causality is measured: many methods start with an
update of zero, which no token could change."""


def measure(
    model: nn.Module, spec: ArmSpec, base: BaseModelRecord, rows: Sequence[Sequence[int]], lr: float
) -> Admission:
    """Measure the arm of `spec` on `model`. Afterwards the model is the base model.

    Args:
        rows: token ids of training rows. The longest ones are used.
        lr: the run's learning rate, for the first step.
    """
    longest = [(list(row) * LENGTH)[:LENGTH] for row in sorted(rows, key=len, reverse=True)[:ROWS]]
    # Short rows, and few of them, are repeated.
    ids = torch.tensor((longest * ROWS)[:ROWS]).to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        base_logits = _logits(model, ids)
        size = float(base_logits.abs().max())
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as undone:
            arm = new_arm(model, spec)
            undone.callback(arm.detach)
            start = _logits(model, ids)
            _first_step(arm, ids, lr)
            moves = not torch.equal(_logits(model, ids), start)
            generator = torch.Generator().manual_seed(0)
            for parameter in arm.trained_parts().values():
                parameter.data += (NOISE * torch.randn(parameter.shape, generator=generator)).to(parameter)
            moved = _logits(model, ids)
            half = LENGTH // 2
            later, others = ids.clone(), ids.clone()
            later[:, half:] = ids[:, half:].flip(1).roll(1, 0)
            others[1:] = ids[1:].flip(1)
            after_later = (_logits(model, later) - moved)[:, :half]
            after_others = (_logits(model, others) - moved)[0]
            arm.save(Path(scratch) / "arm", base)
            undone.close()
            undone.callback(attach_saved(model, Path(scratch) / "arm").detach)
            reloaded = _logits(model, ids)
    finally:
        model.train(was_training)

    def relative(difference: Tensor) -> float:
        return float(difference.abs().max()) / size

    return Admission(
        start=relative(start - base_logits),
        moves=moves,
        later_tokens=relative(after_later),
        other_rows=relative(after_others),
        reload=relative(reloaded - moved),
    )


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _first_step(arm: Arm, ids: Tensor, lr: float) -> None:
    """Adam's first step: lr in the direction of each gradient's sign."""
    model: Any = arm.model
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    loss: Any = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    with torch.no_grad():
        for group in arm.parameter_groups(LrFactors()):
            for parameter in group.parameters:
                if parameter.grad is not None:
                    parameter.sub_(lr * group.lr_factor * parameter.grad.sign())
