"""The method itself: parts, layers, attach / detach / merge, and the adapter's file."""

from tiedlora.adapter.adapter_set import Adapters
from tiedlora.adapter.attach import Attached, attach, attach_adapter
from tiedlora.adapter.files import load, save
from tiedlora.adapter.parts import TiedAdapter

__all__ = [
    "Adapters",
    "Attached",
    "TiedAdapter",
    "attach",
    "attach_adapter",
    "load",
    "save",
]
