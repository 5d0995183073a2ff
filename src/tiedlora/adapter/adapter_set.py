"""Several adapters on one base model, of which at most one is active."""

from __future__ import annotations

from torch import nn

from tiedlora.adapter.attach import Attached, attach_adapter
from tiedlora.adapter.parts import TiedAdapter
from tiedlora.errors import UserError


class AdapterSet:
    """Named adapters that take turns on one base model.

        adapters = AdapterSet(model)
        adapters.add("sums", adapter)
        adapters.use("sums")
        adapters.use(None)      # the base model itself

    A switch changes the classes of the adapted modules and copies no weights, so it takes about a millisecond.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: str | None = None
        """The name of the active adapter; None if the model is the base."""
        self._adapters: dict[str, TiedAdapter] = {}
        self._attached: Attached | None = None

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order in which they were added."""
        return list(self._adapters)

    def add(self, name: str, adapter: TiedAdapter) -> None:
        """Keep an adapter under a name. `use` makes it active.

        Raises:
            UserError: another adapter has the name.
        """
        if name in self._adapters:
            raise UserError(f"adapters: '{name}' is taken; remove it first, or choose another name")
        self._adapters[name] = adapter

    def use(self, name: str | None) -> Attached | None:
        """Make one adapter active, or none (then the model is the base, bit for bit).

        Returns:
            The adapter on the model; None without a name.

        Raises:
            UserError: there is no such name, or the adapter is for another architecture (the model is then the base).
        """
        if name is not None:
            self._check_name(name)
        if self._attached is not None:
            self._attached.detach()
        self._attached, self.active = None, None
        if name is not None:
            self._attached, self.active = attach_adapter(self.model, self._adapters[name]), name
        return self._attached

    def remove(self, name: str) -> None:
        """Forget an adapter. If it is active, the model is the base again.

        Raises:
            UserError: there is no such name.
        """
        self._check_name(name)
        if name == self.active:
            self.use(None)
        del self._adapters[name]

    def _check_name(self, name: str) -> None:
        if name not in self._adapters:
            raise UserError(f"adapters: there is no '{name}'; there are {', '.join(self._adapters) or 'none'}")
