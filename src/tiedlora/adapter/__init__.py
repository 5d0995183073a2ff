"""The method itself: parts, layers, attach / detach / merge, the adapter's file, and its exports."""

from tiedlora.adapter.attach import Attached, attach, attach_adapter
from tiedlora.adapter.export import to_merged, to_peft
from tiedlora.adapter.files import load, save
from tiedlora.adapter.parts import TiedAdapter
from tiedlora.adapter.switch import Adapters

__all__ = [
    "Adapters",
    "Attached",
    "TiedAdapter",
    "attach",
    "attach_adapter",
    "load",
    "save",
    "to_merged",
    "to_peft",
]
