"""The optimizers and learning-rate schedules that a run can choose. Each is one entry of a table.

Each name is also in the choices of `train.optimizer` or `train.schedule` (config/schema.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tiedlora.adapter.parts import ParameterGroup
from tiedlora.config.schema import TrainConfig


def _adamw(groups: list[dict[str, Any]], train: TrainConfig, fused: bool) -> torch.optim.Optimizer:
    betas = (train.betas[0], train.betas[1])
    return torch.optim.AdamW(groups, lr=train.lr or 0.0, betas=betas, eps=train.eps, fused=fused)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], TrainConfig, bool], torch.optim.Optimizer]] = {
    "adamw": _adamw,
}
"""`train.optimizer` -> a function of (parameter groups, settings, whether to update all parameters at once)."""


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda _share, lr, _min_lr: lr,
    "cosine": lambda share, lr, min_lr: min_lr + (lr - min_lr) * (1 + math.cos(math.pi * share)) / 2,
}
"""`train.schedule` -> the rate as a function of (share of the steps after the warm-up that are done, lr, min_lr)."""


def learning_rate(step: int, train: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 1.

    Warm-up step k uses lr * k / warmup_steps, so the first step already has a rate above 0. (At the first step only the
    part that starts at zero has a gradient. With a rate of 0, all other parts would wait one step longer.) The schedule
    ends on the last step.
    """
    assert train.lr is not None
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    share = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return SCHEDULES[train.schedule](share, train.lr, train.min_lr)


def build_optimizer(groups: Sequence[ParameterGroup], train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of an arm's trained parameters.

    Args:
        groups: the arm's groups, with all its trained parameters.
    """
    settings = [
        {"params": g.parameters, "lr_factor": g.lr_factor, "weight_decay": train.weight_decay if g.decays else 0.0}
        for g in groups
    ]
    # Accelerators have kernels that update all parameters at once. A CPU has them too, and they round otherwise.
    return OPTIMIZERS[train.optimizer](settings, train, groups[0].parameters[0].device.type != "cpu")
