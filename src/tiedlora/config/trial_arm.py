"""An arm of a comparison as one value: what it is called, what it trains, and how large it is.

It is built from a run's identity, so a configuration and the record of its run give the same value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tiedlora import storage
from tiedlora.keys import from_person
from tiedlora.tying import (
    Architecture,
    Tying,
    adapted_layers,
    evenly_spaced,
    is_named,
    name_of,
    trainable_params,
)


@dataclass(frozen=True)
class TrialArm:
    """What runs share that differ in seed, rate and setting. Equal values are the same arm, whatever it is called."""

    name: str = field(compare=False)
    """The named arm of conf/tying/ that has its values, such as TABuv, if `is_known`; otherwise what its user says."""
    is_known: bool
    rank: int
    """rank.r; without a meaning for another method."""
    on_layers: int | None = None
    """The number of evenly spaced layers, for LoRA on some of the layers."""
    method: str | None = None
    """Another method than this project's own, such as VeraConfig."""
    trained_for: str = ""
    """Empty for the targets of its rows; otherwise `shuffled targets` or `reward`."""
    params: int | None = None
    """The trained parameters. None for another method, which only its own code counts (config.sizes)."""
    digest: str = ""
    """The hash of all values that it trains by."""

    @property
    def configuration(self) -> str:
        """What claims call it: LoRA, LoRA_l15, peft/vera, or `custom (<its own name>)`."""
        if self.on_layers is not None:
            return f"{self.name}_l{self.on_layers}"
        # A changed TABuv may still have the name TABuv.
        is_its_own = self.is_known or (self.method is not None and not is_named(self.name))
        return self.name if is_its_own else f"custom ({self.name})"

    @property
    def label(self) -> str:
        """The configuration, and what it was trained for: the name in tables."""
        return self.configuration + self._suffix

    @property
    def short(self) -> str:
        """Such as `LoRA r 1, 22 layers`."""
        size = "" if self.method is not None else f" r {self.rank}"
        layers = "" if self.on_layers is None else f", {self.on_layers} layers"
        name = self.name if self.on_layers is not None else self.configuration
        return f"{name}{size}{layers}{self._suffix}"

    @property
    def family(self) -> str:
        """The label without the layers. Arms of one family are drawn in one style, and may be sizes of one curve."""
        return self.label if self.on_layers is None else self.name + self._suffix

    @property
    def _suffix(self) -> str:
        return f" ({self.trained_for})" if self.trained_for else ""

    @property
    def option(self) -> str:
        """The option of `tying` on the command line."""
        return self.configuration if self.is_known else self.name

    @property
    def word(self) -> str:
        """The first word of a run's id. It depends on values alone, and not on what its user calls it."""
        if self.method is not None:
            kind = self.method.removesuffix("Config")
            return kind if kind == self.method else f"peft_{kind}"
        return self.configuration if self.is_known else "custom"

    def goes_by(self, configuration: str, trained_for: str = "") -> bool:
        """Whether a claim that names this configuration means the arm."""
        is_its_own_name = configuration == self.name and not self.is_known and not is_named(configuration)
        return self.trained_for == trained_for and (configuration == self.configuration or is_its_own_name)

    def is_size_of(self, family: str) -> bool:
        """Whether it is on the curve of a family: every rank on all layers, and rank 1 on evenly spaced ones."""
        return self.family == family and (self.on_layers is None or self.rank == 1)


def trained_for(shuffle_targets: bool, objective: str | None) -> str:
    """What an arm is trained for, by the values of task.shuffle_targets and objective.name; empty for its targets."""
    return "reward" if objective == "reward" else "shuffled targets" if shuffle_targets else ""


def own_values(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run's identity that belong to its arm. It shares the others with what it is compared with."""
    values = {key: identity.get(key) for key in ("tying", "rank", "objective")}
    values["lr_factor"] = identity["train"].get("lr_factor")
    values["shuffle_targets"] = identity["task"].get("shuffle_targets", False)
    return values


def trial_arm(identity: Mapping[str, Any], name: str) -> TrialArm:
    """The arm of a run.

    Args:
        identity: the run's identity, from its configuration or its record.
        name: what the user calls it (tying.name).

    Raises:
        UserError: a value of a record cannot be one of a tying or of an architecture.
    """
    values, rank = identity["tying"], identity["rank"]["r"]
    objective = (identity.get("objective") or {}).get("name")
    purpose = trained_for(identity["task"].get("shuffle_targets", False), objective)
    digest = storage.json_sha256(own_values(identity))[:10]
    if (method := values.get("method")) is not None:
        return TrialArm(name, False, rank, None, method, purpose, None, digest)
    tying = from_person(Tying, values, prefix="identity.tying.")
    architecture = from_person(
        Architecture, identity["model"].get("architecture"), prefix="identity.model.architecture."
    )
    known, on_layers = name_of(tying), None
    if known is None and tying.layers is not None and name_of(replace(tying, layers=None)) == "LoRA":
        layers = adapted_layers(tying, architecture)
        if layers == evenly_spaced(len(layers), architecture.layers):
            known, on_layers = "LoRA", len(layers)
    params = trainable_params(tying, rank, architecture)
    return TrialArm(known or name, known is not None, rank, on_layers, None, purpose, params, digest)
