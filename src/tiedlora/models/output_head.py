"""From the outputs of a model's output head to its logits: a factor, and a soft cap.

Loss and scoring call the body and the head apart, so that logits are computed only where they are needed. So they need
to know what the model's own forward pass does after the head, and `check` refuses a model for which that is not all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiedlora.errors import UserError
from tiedlora.models.placement import input_device

TOLERANCE = 0.02
"""The largest difference to the model's own logits, as a share of the largest logit. bfloat16 has 8 bits."""


def factor(model: Any) -> float:
    """The number that the head's outputs are multiplied by: Cohere's logit_scale, or 1 / Granite's logits_scaling."""
    scale, divisor = (getattr(model.config, key, None) for key in ("logit_scale", "logits_scaling"))
    # MPT's configuration may have a word here.
    scale, divisor = (value if isinstance(value, (int, float)) and value else 1.0 for value in (scale, divisor))
    return float(scale / divisor)


def softcap(model: Any) -> float | None:
    """c, if the logits are c tanh(logits / c) as in Gemma 2; None without it."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return None if cap is None else float(cap)


def after(model: Any, outputs: Tensor) -> Tensor:
    """The logits, from the outputs of the head, (..., vocabulary)."""
    scale, cap = factor(model), softcap(model)
    # Without a factor no second tensor of the logits' size is made.
    logits = outputs if scale == 1 else scale * outputs
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.inference_mode()
def check(model: Any) -> None:
    """Compare body and head with the model's own logits, on three tokens.

    Raises:
        UserError: they differ, so a loss from body and head would not be the model's; or they are not finite.
    """
    if model.base_model is model:
        raise UserError(
            f"model: {type(model).__name__} has no body that ends before its output head, and the loss needs both; "
            "choose another model"
        )
    ids = torch.arange(1, 4, device=input_device(model))[None]
    # The fused attention of a CPU hides what is no number in q and k.
    with sdpa_kernel(SDPBackend.MATH):
        own = model(input_ids=ids, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not own.isfinite().all():
        here = ((name, weight) for name, weight in model.named_parameters() if not weight.is_meta)
        wrong = next((name for name, weight in here if not weight.isfinite().all()), None)
        cause = f"{wrong} is damaged" if wrong else "its weights are finite, so a number of its config.json is wrong"
        raise UserError(
            f"model: the logits of {type(model).__name__} are not finite: {cause}; restore the model's files"
        )
    ours = after(model, model.get_output_embeddings()(hidden).float()).to(own.device)
    if not torch.allclose(ours, own, rtol=0, atol=TOLERANCE * float(own.abs().max())):
        raise UserError(
            f"model: the logits of {type(model).__name__} are not those of its output head (they differ by "
            f"{float((ours - own).abs().max()):.2g}), and no rule for this family is known; its losses would be wrong, "
            "so choose another model"
        )
