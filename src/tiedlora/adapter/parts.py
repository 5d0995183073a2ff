"""The parts A, B, u and v of one adapter, and the folded factors that a layer uses.

Each part of each target is one nn.Parameter for all its layers or groups:

    A: (groups, r, d_in)   B: (groups, d_out, r)   u: (L, r)   v: (L, d_out)   with L the number of adapted layers

So a tied factor is one object in the optimizer, in the file and in the parameter count. Its gradient is the sum over
the layers that use it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from tiedlora import tying as spec
from tiedlora.adapter import architectures
from tiedlora.adapter.architectures import Site
from tiedlora.errors import UserError
from tiedlora.keys import from_person
from tiedlora.reading import is_number
from tiedlora.tying import Architecture, LrFactors, Part, Term, Tying

LARGEST_RANK = 2**16


def check_specification(
    tying: Tying, rank: int, alpha: float, architecture: Architecture, *, seed: int, scaling: str
) -> Tying:
    """The tying with typed values. Raises UserError unless an adapter can be made of these. It allocates nothing."""
    if method := getattr(tying, "method", None):
        raise UserError(f"tying.method={method}: is PEFT's; tiedlora.adapter.attach.new_arm makes an arm of it")
    tying = from_person(type(tying), tying, prefix="tying.")
    from_person(Architecture, architecture, prefix="architecture.")
    # Python's bool is a subclass of int, but True is not a rank.
    if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
        raise UserError(f"rank={rank!r:.40}: must be an int from 1 to {LARGEST_RANK}")
    spec.check_tying(tying, rank, architecture)
    if not is_number(alpha) or not 1e-12 <= alpha <= 1e12:
        raise UserError(f"alpha={alpha!r:.40}: must be a number from 1e-12 to 1e12")
    if type(seed) is not int:
        raise UserError(f"seed={seed!r:.40}: must be an int")
    if scaling not in spec.SCALINGS:
        raise UserError(f"scaling={scaling}: choose one of {', '.join(spec.SCALINGS)}")
    return tying


def seed_of(name: str) -> int:
    """A seed for torch that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def draw(init: float | str, shape: tuple[int, ...], seed: int, part: str, target: str) -> Tensor:
    """Draw the initial values of one part, in float32 on the CPU.

    A group's values depend only on (seed, part, target, group): neither on the device nor on which other parts are
    drawn.

    Args:
        init: `uniform` = U(-1/sqrt(n), 1/sqrt(n)) with n the last dimension, `normal` = N(0, 1), or a constant.
        shape: (groups, ...).
    """
    if not isinstance(init, str):
        return torch.full(shape, float(init))
    values = torch.empty(shape)
    for group in range(shape[0]):
        generator = torch.Generator().manual_seed(seed_of(f"{seed}/{part}/{target}/{group}"))
        if init == "uniform":
            bound = 1 / math.sqrt(shape[-1])
            values[group].uniform_(-bound, bound, generator=generator)
        else:
            values[group].normal_(generator=generator)
    return values


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and whether weight decay applies."""

    parameters: list[nn.Parameter]
    lr_factor: float = 1.0
    """A factor on the run's learning rate."""
    decays: bool = True


class TargetParts(nn.Module):
    """A, B, u and v of one term for one target. A u or v that is frozen at one changes nothing, so it is None.

    Args:
        rank: rank.r, from which the term's own rank follows.
        name: the name under which the adapter has these parts. Random values depend on it.
        factor: a factor on this term's update, for a term whose scale follows from its own rank.
    """

    A: nn.Parameter
    B: nn.Parameter
    u: nn.Parameter | None
    v: nn.Parameter | None

    def __init__(
        self, term: Term, rank: int, architecture: Architecture, *, target: str, name: str, seed: int, factor: float
    ) -> None:
        super().__init__()
        self.target, self.term, self.factor = target, term, factor
        self.layers = spec.adapted_layers(term, architecture)
        count = len(self.layers)
        self.shares = {part: spec.layers_per_group(getattr(term, part).share, count) for part in spec.FACTORS}
        for letter, traits in spec.PARTS.items():
            part = getattr(term, letter)
            parameter = None
            # A frozen part that changes nothing has no parameter.
            if part.trained or part.init != traits.neutral:
                shape = spec.part_shape(term, letter, rank, architecture, target)
                parameter = nn.Parameter(draw(part.init, shape, seed, letter, name), requires_grad=part.trained)
            self.register_parameter(letter, parameter)

    def folded(self) -> tuple[Tensor, Tensor]:
        """(diag(u_l) A, diag(v_l) B) of all adapted layers l of the term at once. These are ordinary LoRA pairs.

        To scale the factors, r x d_in and d_out x r, is cheap. To scale the activations would need a tensor of
        tokens x d_out.

        Returns:
            A of shape (L, r, d_in) and B of shape (L, d_out, r). If no vector scales a tied factor, its layers are
            views of one tensor.
        """
        A, B = self._by_layer("A"), self._by_layer("B")
        if self.u is not None:
            A = self.u.unsqueeze(-1) * A
        if self.v is not None:
            B = self.v.unsqueeze(-1) * B
        return (A if self.factor == 1.0 else self.factor * A), B

    def _by_layer(self, name: str) -> Tensor:
        factor, share = getattr(self, name), self.shares[name]
        if share == 1:
            return factor  # type: ignore[no-any-return]
        if len(factor) == 1:
            return factor.expand(len(self.layers), -1, -1)  # type: ignore[no-any-return]
        return factor.repeat_interleave(share, 0)[: len(self.layers)]  # type: ignore[no-any-return]


class TiedAdapter(nn.Module):
    """All parts of one adapter, always in float32, also if the base model has another dtype.

    Args:
        alpha: gives the scale of the update, s (see tying.scale).
        seed: the seed of the random parts.
        scaling: how s follows from alpha and the rank, one of tying.SCALINGS.

    Raises:
        UserError: the specification cannot train, or does not fit the model (see tying.check_tying).
    """

    def __init__(
        self,
        tying: Tying,
        rank: int,
        alpha: float,
        architecture: Architecture,
        *,
        seed: int,
        scaling: str = "standard",
    ) -> None:
        super().__init__()
        tying = check_specification(tying, rank, alpha, architecture, seed=seed, scaling=scaling)
        self.tying, self.rank, self.alpha, self.architecture, self.seed = tying, rank, alpha, architecture, seed
        self.scaling, self.scale = scaling, spec.scale(alpha, rank, scaling)
        self.layers = spec.adapted_layers(tying, architecture)
        """The numbers of the layers that get an update."""
        self.targets = nn.ModuleDict()
        """`target`, or `target:term` if there are several terms -> its parts."""
        for name, (target, term) in spec.target_terms(tying).items():
            factor = spec.term_scale(term, alpha, rank, scaling, architecture) / self.scale
            self.targets[name] = TargetParts(
                term, rank, architecture, target=target, name=name, seed=seed, factor=factor
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TiedAdapter:
        """Move and cast the parts, but never below float32: `model.bfloat16()` would round off the steps of u and v."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_narrow = moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32
            return tensor.to(moved.device) if is_narrow else moved

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self

    def folded(self, target: str) -> tuple[Tensor, Tensor]:
        """The LoRA pairs of a target, with all its terms joined along the rank: the sum of the terms' updates.

        Returns:
            A of shape (L, r, d_in) and B of shape (L, d_out, r), with r the sum of the terms' ranks. A term has zeros
            for layers that it does not adapt.
        """
        of_target = [parts for parts in self.targets.values() if parts.target == target]
        pairs = [[self._in_all_layers(parts, factor) for factor in parts.folded()] for parts in of_target]  # type: ignore[operator, arg-type]
        return _joined([(A, B) for A, B in pairs])

    def _in_all_layers(self, parts: TargetParts, factor: Tensor) -> Tensor:
        if len(parts.layers) == len(self.layers):
            return factor
        of_layer, nothing = dict(zip(parts.layers, factor, strict=True)), torch.zeros_like(factor[0])
        return torch.stack([of_layer.get(layer, nothing) for layer in self.layers])

    def pairs(self, scale: float = 1.0, dtype: torch.dtype | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Module path -> its LoRA pair (A: k r x d_in, B: width x k r), differentiable with respect to the parts.

        All layers are folded, scaled and rounded together, in a few operations for each target. k is the number of
        targets in the module. It is more than 1 if, for example, q and v of a fused module are two targets. Their
        pairs are then stacked: B's columns have the order of A's rows.

        Args:
            scale: a factor on the update.
            dtype: the dtype of the pairs; None keeps that of the parts. Folding, and the sum of a tied part's gradients
                over layers, are in float32 in any case.
        """
        pairs_of_module: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for target in self.tying.targets:
            A, B = self.folded(target)
            # As a Scalar it is not kept for the backward pass, so reentrant checkpoints can share the product.
            A = torch.ops.aten.mul.Scalar(A, scale) if scale != 1.0 else A
            for site, paths in self._sites[target]:
                B_layers = site.place(B[:, site.rows]).to(dtype or B.dtype).unbind()
                # Rounded for each site: the gradients of q, k and v are then added in float32, not in the base's dtype.
                A_layers = A.to(dtype or A.dtype).unbind()
                for path, A_l, B_l in zip(paths, A_layers, B_layers, strict=True):
                    pairs_of_module.setdefault(path, []).append((A_l, B_l))
        return {path: _joined(pairs) for path, pairs in pairs_of_module.items()}

    def paths(self) -> list[str]:
        """The paths of the adapted modules, each once."""
        return list(dict.fromkeys(path for sites in self._sites.values() for _, paths in sites for path in paths))

    @cached_property
    def _sites(self) -> dict[str, list[tuple[Site, list[str]]]]:
        """Target -> its sites, each with the paths of its modules in the adapted layers."""
        found: dict[str, list[tuple[Site, list[str]]]] = {}
        for target in self.tying.targets:
            sites = architectures.sites(self.architecture, target)
            found[target] = [(site, [site.in_layer(layer) for layer in self.layers]) for site in sites]
        return found

    def parts(self) -> dict[str, nn.Parameter]:
        """`target.part`, or `target:term.part` -> its one parameter, trained or frozen."""
        return {name.removeprefix("targets."): parameter for name, parameter in self.named_parameters()}

    def specification(self, name: str) -> Part:
        """The specification of a part, from its name among `parts`."""
        group, _, part = name.rpartition(".")
        specified: Part = getattr(self.targets[group].term, part)
        return specified

    def trained_parts(self) -> dict[str, nn.Parameter]:
        """`target.part` -> its parameter, for the trained parts."""
        return {name: parameter for name, parameter in self.parts().items() if parameter.requires_grad}

    def parameter_groups(self, lr_factors: LrFactors) -> list[ParameterGroup]:
        """One parameter group for each of A, B, u and v that is trained."""
        groups = []
        for letter, traits in spec.PARTS.items():
            parameters = [part for name, part in self.trained_parts().items() if spec.part_of(name) == letter]
            if parameters:
                groups.append(ParameterGroup(parameters, getattr(lr_factors, letter), traits.decays))
        return groups

    def trainable_params(self) -> int:
        """How many numbers the optimizer changes, each counted once."""
        return sum(parameter.numel() for parameter in self.trained_parts().values())


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several LoRA pairs of one module as one pair, whose rank is the sum of their ranks."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([A for A, _ in pairs], dim=-2), torch.cat([B for _, B in pairs], dim=-1)
