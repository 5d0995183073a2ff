"""The method: the parts of an adapter, the modules that they change, attaching and merging, files, PEFT.

This package stands alone: it imports the modules of tiedlora itself, and no other package. It knows no task, no
training, no configuration of a run and no record.
"""

from tiedlora.adapter.attach import AdapterSet, Attached, attach, attach_adapter
from tiedlora.adapter.files import load, save
from tiedlora.adapter.parts import TiedAdapter

__all__ = ["AdapterSet", "Attached", "TiedAdapter", "attach", "attach_adapter", "load", "save"]
