"""The parts A, B, u and v of one adapter, and the folded factors a layer uses.

Each part of each target is one nn.Parameter that holds all its layers or groups:

    A: (groups, r, d_in)   B: (groups, d_out, r)   u: (L, r)   v: (L, d_out)

so a tied factor is one object in the optimizer, in the file and in the count, and its gradient is the
sum over the layers that use it.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from tiedlora import tying as spec
from tiedlora.tying import Architecture, Tying


def draw(init: float | str, shape: tuple[int, ...], seed: int, part: str, target: str) -> Tensor:
    """Initial values of one part, float32 on the CPU.

    A group's values depend on (seed, part, target, group) alone: neither on the device nor on which
    other parts are drawn.

    Args:
        init: `uniform` = U(-1/sqrt(n), 1/sqrt(n)) with n the last dimension, `normal` = N(0, 1), or a constant.
        shape: (groups, ...).
    """
    if not isinstance(init, str):
        return torch.full(shape, float(init))
    values = torch.empty(shape)
    for group in range(shape[0]):
        digest = hashlib.sha256(f"{seed}/{part}/{target}/{group}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        if init == "uniform":
            bound = 1 / math.sqrt(shape[-1])
            values[group].uniform_(-bound, bound, generator=generator)
        else:
            values[group].normal_(generator=generator)
    return values


class TargetParts(nn.Module):
    """A, B, u and v of one target. u or v that is frozen at one is None: it changes nothing."""

    A: nn.Parameter
    B: nn.Parameter
    u: nn.Parameter | None
    v: nn.Parameter | None

    def __init__(self, tying: Tying, rank: int, architecture: Architecture, target: str, seed: int) -> None:
        super().__init__()
        self.shares = {
            "A": spec.layers_per_group(tying.A.share, architecture.layers),
            "B": spec.layers_per_group(tying.B.share, architecture.layers),
        }
        for name in spec.PARTS:
            part = getattr(tying, name)
            parameter = None
            if not (name in "uv" and spec.is_identity(part)):
                shape = spec.part_shape(tying, name, rank, architecture, target)
                parameter = nn.Parameter(draw(part.init, shape, seed, name, target), requires_grad=part.trained)
            self.register_parameter(name, parameter)

    def folded(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """(A_l, B_l) = (diag(u_l) A, diag(v_l) B), B_l cut to `rows`: an ordinary LoRA pair.

        Scaling the factors, r x d_in and d_out x r, costs next to nothing; scaling activations would
        cost a tensor of tokens x d_out.

        Returns:
            A_l of shape (r, d_in) and B_l of shape (len(rows), r).
        """
        A_l = self.A[layer // self.shares["A"]]
        B_l = self.B[layer // self.shares["B"], rows]
        if self.u is not None:
            A_l = self.u[layer].unsqueeze(-1) * A_l
        if self.v is not None:
            B_l = self.v[layer, rows].unsqueeze(-1) * B_l
        return A_l, B_l


class TiedAdapter(nn.Module):
    """All parts of one adapter: float32, whatever the base model's dtype.

    Args:
        alpha: the update's scale is s = alpha / rank.
        seed: draws the random parts.

    Raises:
        UserError: the specification breaks the rule of initial values (tying.check).
    """

    def __init__(self, tying: Tying, rank: int, alpha: float, architecture: Architecture, seed: int) -> None:
        super().__init__()
        spec.check(tying, architecture)
        self.tying, self.rank, self.alpha, self.architecture, self.seed = tying, rank, alpha, architecture, seed
        self.scale = alpha / rank
        self.targets = nn.ModuleDict(
            {target: TargetParts(tying, rank, architecture, target, seed) for target in tying.targets}
        )

    def parts(self) -> dict[str, nn.Parameter]:
        """`target.part` -> its one parameter, trained and frozen alike."""
        return {name.removeprefix("targets."): parameter for name, parameter in self.named_parameters()}

    def trained_parts(self) -> dict[str, nn.Parameter]:
        """`target.part` -> parameter, of the parts the optimizer moves."""
        return {name: parameter for name, parameter in self.parts().items() if parameter.requires_grad}

    def trainable_params(self) -> int:
        """Numbers the optimizer moves, each counted once."""
        return sum(parameter.numel() for parameter in self.trained_parts().values())
