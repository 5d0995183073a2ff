"""Refuse a specification of an adapter that cannot train from the base model, or that does not fit the model."""

from __future__ import annotations

import math

from tiedlora.errors import UserError
from tiedlora.tying import (
    ALL_LAYERS,
    PARTS,
    Architecture,
    Factor,
    Part,
    Tying,
    adapted_layers,
    target_shape,
)

RANDOM_INITS = ("uniform", "normal")


def check_tying(tying: Tying, architecture: Architecture) -> None:
    """Refuse a specification that cannot train from the base model.

    Exactly one part must start at zero, and it must be trained. If no part starts at zero, the run does not start at
    the base model. If the zero part is frozen, the update stays zero. If two parts start at zero, no part ever gets a
    gradient.

    Raises:
        UserError: a value is not allowed; the message names the key under `tying.`.
    """
    for name in PARTS:
        _check_part(name, getattr(tying, name))
    zeros = [name for name in PARTS if getattr(tying, name).init == 0.0]
    if not zeros:
        raise UserError(
            "tying: no part starts at zero, so the run would not start at the base model; "
            "give exactly one trained part of A, B, u, v init=0 (usually B)"
        )
    if len(zeros) > 1:
        raise UserError(
            f"tying: {' and '.join(zeros)} both start at zero, so no part would ever get a gradient; "
            "give exactly one trained part init=0"
        )
    if not getattr(tying, zeros[0]).trained:
        raise UserError(
            f"tying.{zeros[0]}: starts at zero and is frozen, so the update would always stay zero; "
            f"set tying.{zeros[0]}.trained=true or give it another init"
        )
    if not 0.0 <= tying.dropout < 1.0:
        raise UserError(f"tying.dropout={tying.dropout}: must be in [0, 1)")
    if not 0.0 < tying.suggested_lr < math.inf:
        raise UserError(f"tying.suggested_lr={tying.suggested_lr}: must be a positive number")
    check_layers(adapted_layers(tying, architecture), architecture)
    _check_targets(tying.targets, architecture)


def _check_part(name: str, part: Part) -> None:
    if isinstance(part.init, str):
        if part.init not in RANDOM_INITS:
            raise UserError(f"tying.{name}.init={part.init}: choose {', '.join(RANDOM_INITS)} or a number")
    elif not abs(part.init) <= 1e6:
        raise UserError(f"tying.{name}.init={part.init}: must be a finite number, from -1e6 to 1e6")
    if isinstance(part, Factor):
        share: object = part.share
        if share != ALL_LAYERS and (not isinstance(share, int) or isinstance(share, bool) or share < 1):
            raise UserError(f"tying.{name}.share={share}: choose all (tied) or how many layers share it (1 = untied)")


def check_layers(layers: list[int], architecture: Architecture) -> None:
    """Refuse layers that the model does not have.

    Raises:
        UserError: there is no layer, or one is out of range.
    """
    if not layers:
        raise UserError("tying.layers: is empty; name at least one layer, or set null to adapt all")
    if layers[-1] >= architecture.layers:
        raise UserError(
            f"tying.layers: holds {layers[-1]}, but the model has {architecture.layers} layers: "
            f"0 to {architecture.layers - 1} are allowed"
        )


def _check_targets(targets: list[str], architecture: Architecture) -> None:
    if not targets:
        raise UserError("tying.targets: is empty; name at least one projection, usually [qkv]")
    for target in targets:
        # OmegaConf accepts a list in the place of a text.
        if not isinstance(target, str):
            raise UserError(f"tying.targets={targets}: must be a list of names")
        target_shape(architecture, target)
    overlap = {"q", "k", "v"} & set(targets) if "qkv" in targets else set()
    if len(set(targets)) != len(targets) or overlap:
        raise UserError(f"tying.targets={targets}: a projection is adapted twice; qkv holds q, k and v already")
