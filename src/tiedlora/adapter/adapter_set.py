"""Several adapters on one base model, one of them active at a time."""

from __future__ import annotations

from torch import nn

from tiedlora.adapter.attach import Attached, attach_adapter
from tiedlora.adapter.parts import TiedAdapter
from tiedlora.errors import UserError


class Adapters:
    """Named adapters that take turns on one base model.

        adapters = Adapters(model)
        adapters.add("sums", adapter)
        adapters.use("sums")
        adapters.use(None)      # the base model itself

    An adapter is small and hooks cost nothing to place, so a switch takes about a millisecond and the base's weights
    stay where they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: str | None = None
        self._named: dict[str, TiedAdapter] = {}
        self._attached: Attached | None = None

    @property
    def names(self) -> list[str]:
        """In the order they were added."""
        return list(self._named)

    def add(self, name: str, adapter: TiedAdapter) -> None:
        """Keep an adapter under a name; `use` makes it act.

        Raises:
            UserError: the name is taken.
        """
        if name in self._named:
            raise UserError(f"adapters: '{name}' is taken; remove it first, or choose another name")
        self._named[name] = adapter

    def use(self, name: str | None) -> Attached | None:
        """Make one adapter act, or none (then the model is the base, bit for bit).

        Raises:
            UserError: there is no such name, or the adapter is for another architecture (the model is then the base).
        """
        if name is not None and name not in self._named:
            raise UserError(f"adapters: there is no '{name}'; there are {', '.join(self._named) or 'none'}")
        if self._attached is not None:
            self._attached.detach()
        self._attached, self.active = None, None
        if name is not None:
            self._attached, self.active = attach_adapter(self.model, self._named[name]), name
        return self._attached

    def remove(self, name: str) -> None:
        """Forget an adapter; if it is active, the model is the base again.

        Raises:
            UserError: there is no such name.
        """
        if name == self.active:
            self.use(None)
        if self._named.pop(name, None) is None:
            raise UserError(f"adapters: there is no '{name}'; there are {', '.join(self._named) or 'none'}")
