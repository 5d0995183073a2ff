"""Tied-LoRA: a research harness (arXiv 2311.09578), and a small library.

    import tiedlora

    attached = tiedlora.attach(model, "TABuv", rank=8)     # any causal language model of a known family
    ...                                                    # train attached.adapter.trained_parts()
    attached.save_pretrained("my-adapter")

A name is imported when it is first used. So `import tiedlora` is quick, and so are the commands that need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiedlora.adapter import AdapterSet, TiedAdapter
    from tiedlora.adapter.attach import Attached, attach, attach_adapter
    from tiedlora.adapter.peft_method import TiedLoraConfig, TiedLoraModel
    from tiedlora.errors import UserError
    from tiedlora.export.folder import to_merged, to_peft
    from tiedlora.runs.library import base_of, load
    from tiedlora.tying import Architecture, Factor, Layout, Part, Tying, named

__version__ = "0.2.0"
"""The one place of the version. pyproject.toml reads it from here, because metadata of an editable install grow old."""

_MODULES = {
    **dict.fromkeys(("AdapterSet", "Attached", "TiedAdapter", "attach", "attach_adapter"), "adapter"),
    **dict.fromkeys(("Architecture", "Factor", "Layout", "Part", "Tying", "named"), "tying"),
    **dict.fromkeys(("base_of", "load"), "runs.library"),
    **dict.fromkeys(("TiedLoraConfig", "TiedLoraModel"), "adapter.peft_method"),
    **dict.fromkeys(("to_merged", "to_peft"), "export.folder"),
    "UserError": "errors",
}
"""Public name -> the module that defines it."""

__all__ = [
    "AdapterSet",
    "Architecture",
    "Attached",
    "Factor",
    "Layout",
    "Part",
    "TiedAdapter",
    "TiedLoraConfig",
    "TiedLoraModel",
    "Tying",
    "UserError",
    "attach",
    "attach_adapter",
    "base_of",
    "load",
    "named",
    "to_merged",
    "to_peft",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tiedlora' has no attribute '{name}'")
    return getattr(importlib.import_module(f"tiedlora.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
