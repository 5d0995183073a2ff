"""The method: the parts of an adapter, the modules that they change, attaching and merging, files, PEFT.

This package knows no task and no training. It may import records, config, and the modules tying, keys, text, storage,
errors.
"""

from tiedlora.adapter.attach import AdapterSet, Attached, attach, attach_adapter
from tiedlora.adapter.files import load, save
from tiedlora.adapter.parts import TiedAdapter

__all__ = ["AdapterSet", "Attached", "TiedAdapter", "attach", "attach_adapter", "load", "save"]
