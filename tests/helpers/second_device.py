"""A second device without one: it computes on the CPU, refuses what a GPU would refuse, and notes each wait for it.

A tensor of this device is a wrapper around one of the CPU. Inside `SecondDevice`, every operation on such tensors
passes through `__torch_dispatch__`, which computes on the wrapped ones. As on a GPU,

- an operation that mixes the devices raises MixedDevices, but for scalars of the CPU, copies, and indices;
- the program waits for the device where it needs a value (item, tolist, nonzero, a copy to the CPU), and at copies to
  the device out of memory that is not pinned. Such a wait is counted only if work was queued since the last one.

PyTorch keeps one private device type for this, whose name and hooks are registered once for a process. Outside of the
block there is no accelerator, as before.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiedlora
from tiedlora.adapter import linear

NAME = "second"
CPU = torch.device("cpu")
OWN_CODE = str(Path(tiedlora.__file__).parent)
aten = torch.ops.aten
NEED_VALUES = {
    "_local_scalar_dense": "item",
    **dict.fromkeys(
        ("nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "bincount"), "nonzero"
    ),
    **dict.fromkeys(("equal", "is_nonzero"), "item"),
}
"""The operators whose result, or its size, the program needs at once -> what the wait is called."""
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class MixedDevices(RuntimeError):
    """What a GPU would refuse."""


class OnDevice(torch.Tensor):
    """A tensor of the second device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: torch.Tensor
    """Its values, on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **like, device=f"{NAME}:0")
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operator, kinds, args=(), kwargs=None):
        raise RuntimeError(f"{operator}: a tensor of the second device is used outside of its block")

    # What torch answers without asking the dispatcher.

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_without_lists(index), value)

    def tolist(self) -> Any:
        SecondDevice.active.wait("tolist")
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise MixedDevices(f"{place()}: numpy reads a tensor on {self.device}")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        copied._is_param = isinstance(self, torch.nn.Parameter)
        return copied

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        if not isinstance(values, OnDevice) or values.shape != self.shape or values.dtype != self.dtype:
            raise MixedDevices(f"{place()}: .data of a tensor on {self.device} is set to one on {values.device}")
        self.inner = values.inner


class SecondDevice(TorchDispatchMode):
    """What computes for the device, and counts."""

    active: SecondDevice | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """`what, file:line` of this project -> how often the program has waited for the device there."""
        self.operators: Counter[str] = Counter()
        """Operator -> how often it ran on the device."""
        self.largest = 0
        """The most numbers of a tensor that an operator has made."""
        self.limit: int | None = None
        """Above so many numbers of a tensor, memory runs out; None sets no limit."""
        self._is_busy = False

    def wait(self, what: str) -> None:
        """Note that the program waits for the device. With nothing queued there, this takes no time."""
        if self._is_busy:
            self.waits[f"{what}, {place()}"] += 1
        self._is_busy = False

    @contextlib.contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """The waits inside the block."""
        before, counted = Counter(self.waits), Counter[str]()
        yield counted
        counted.update(self.waits - before)

    def __torch_dispatch__(self, operator, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        values: list[Any] = []
        moved_args, moved_kwargs = _on_the_cpu(args, values), {k: _on_the_cpu(v, values) for k, v in kwargs.items()}
        wrapper_of = {id(value.inner): value for value in values if isinstance(value, OnDevice)}
        wished = kwargs.get("device")
        if not wrapper_of and (wished is None or torch.device(wished).type != NAME):
            return operator(*args, **kwargs)
        name = operator.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            return self._copied(name, args, kwargs)
        self.operators[name] += 1
        self._check(name, args, values)
        if wished is not None:
            moved_kwargs["device"] = CPU
        found = operator(*moved_args, **moved_kwargs)
        if name != "_local_scalar_dense" and not any(
            each.alias_info and not each.alias_info.is_write for each in operator._schema.returns
        ):
            # All but views.
            self._is_busy = True
        if isinstance(found, torch.Tensor):
            self.largest = max(self.largest, found.numel())
            if self.limit and found.numel() > self.limit:
                raise torch.OutOfMemoryError(f"{NAME}: out of memory (a test)")
        if name in NEED_VALUES:
            self.wait(NEED_VALUES[name])
        # An operator in place returns its argument.
        return _wrapped(found, wrapper_of)

    def _check(self, name: str, args: tuple[Any, ...], values: list[Any]) -> None:
        """Refuse what a GPU would refuse."""
        indices = list(args[1]) if name in INDEXED else []
        for index in indices:
            if isinstance(index, torch.Tensor) and (index.dtype == torch.bool or not isinstance(index, OnDevice)):
                # A mask becomes positions, and an index on the CPU is copied.
                self.wait("index")
        for value in values:
            if isinstance(value, torch.Generator) and value.device.type == "cpu":
                raise MixedDevices(f"{place()}: {name} on {NAME}:0 draws from a generator on the CPU")
            is_elsewhere = isinstance(value, torch.Tensor) and not isinstance(value, OnDevice) and value.dim()
            if is_elsewhere and not any(value is index for index in indices):
                raise MixedDevices(
                    f"{place()}: {name} mixes {NAME}:0 with a tensor of {tuple(value.shape)} on {value.device}"
                )

    def _copied(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """A copy within the device, to it, or from it."""
        if name == "copy_":
            target, source, *rest = args
            non_blocking = rest[0] if rest else kwargs.get("non_blocking", False)
            to_device, from_device = isinstance(target, OnDevice), isinstance(source, OnDevice)
            (target.inner if to_device else target).copy_(source.inner if from_device else source)
            copy = target
        else:
            source, wished = args[0], kwargs.get("device")
            non_blocking, from_device = kwargs.get("non_blocking", False), isinstance(source, OnDevice)
            to_device = from_device if wished is None else torch.device(wished).type == NAME
            kept = {**kwargs, "device": None} if wished is None or to_device else kwargs
            copy = aten._to_copy(source.inner if from_device else source, **kept)
            copy = OnDevice(copy) if to_device else copy
        if from_device and not to_device:
            self.wait("copy to the CPU")
        elif from_device or (non_blocking and hasattr(source, "_is_pinned_here")):
            self._is_busy = True
        else:
            self.wait("copy to the device")
        return copy


@contextlib.contextmanager
def second_device() -> Iterator[SecondDevice]:
    """Inside the block, torch has an accelerator, which `train.device=auto` takes."""
    _register()
    assert SecondDevice.active is None, "there is only one second device"
    device, swapped = SecondDevice(), torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as undone:
        # Otherwise backward passes of the device would want threads of its own. Those would have to be there since the
        # process's first backward pass, and a process with them may not fork, as some tests do.
        undone.enter_context(torch.autograd.set_multithreading_enabled(False))
        # A parameter that moves to a GPU stays the same object. A wrapper has to take its place.
        torch.__future__.set_swap_module_params_on_conversion(True)
        undone.callback(torch.__future__.set_swap_module_params_on_conversion, swapped)
        # torch.tensor, as_tensor and pin_memory ask no dispatcher.
        for owner, name, simulated in (
            (torch, "tensor", _made_on_the_cpu(torch.tensor)),
            (torch, "as_tensor", _made_on_the_cpu(torch.as_tensor)),
            (torch.Tensor, "pin_memory", _pinned),
            # torch does not let wrappers be views in inference mode.
            (linear, "PLAIN_WEIGHTS", (*linear.PLAIN_WEIGHTS, OnDevice.__name__)),
            (torch._C, "_InferenceMode", lambda mode: torch.no_grad() if mode else contextlib.nullcontext()),
        ):
            undone.enter_context(patch.object(owner, name, simulated))
        SecondDevice.active = device
        undone.callback(setattr, SecondDevice, "active", None)
        with device:
            yield device


def _without_lists(index: Any) -> Any:
    """An index, with each list of numbers as a tensor on the CPU."""
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _on_the_cpu(value: Any, values: list[Any]) -> Any:
    """The argument of an operator, with the wrapped tensors. What it consists of is added to `values`."""
    if type(value) in (list, tuple):
        return type(value)([_on_the_cpu(each, values) for each in value])
    values.append(value)
    return value.inner if isinstance(value, OnDevice) else value


def _wrapped(found: Any, wrapper_of: dict[int, OnDevice]) -> Any:
    """The result of an operator, as tensors of the device."""
    if type(found) in (list, tuple):
        return type(found)([_wrapped(each, wrapper_of) for each in found])
    if not isinstance(found, torch.Tensor):
        return found
    return wrapper_of[id(found)] if id(found) in wrapper_of else OnDevice(found)


def place() -> str:
    """The innermost line of this project that is running, as `folder/file.py:line: code`."""
    frame, outer = sys._getframe(1), None
    while frame is not None:
        if (file := frame.f_code.co_filename).startswith(OWN_CODE):
            return f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno}"
        if outer is None and "/site-packages/" not in file and file != __file__:
            outer = f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return outer or "outside of the project"


def _made_on_the_cpu(function: Any) -> Any:
    """torch.tensor and torch.as_tensor for the device: made on the CPU, and copied."""

    def made(values: Any, *args: Any, device: Any = None, **settings: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            return function(values, *args, device=device, **settings)
        if isinstance(values, OnDevice):
            return values.to(settings.get("dtype") or values.dtype)
        return function(values, *args, **settings).to(device)

    return made


def _pinned(tensor: torch.Tensor, _device: Any = None) -> torch.Tensor:
    copy = tensor.clone()
    copy._is_pinned_here = True
    return copy


class _Module(types.ModuleType):
    """torch.second, as torch.cuda."""

    _initialized = False

    @staticmethod
    def is_available() -> bool:
        return SecondDevice.active is not None

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return int(SecondDevice.active is not None)

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def set_device(device: Any) -> None:
        pass

    @staticmethod
    def get_device_name(_device: Any = None) -> str:
        return "a second device"

    @staticmethod
    def max_memory_allocated(_device: Any = None) -> int:
        return 1

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        pass

    @staticmethod
    def synchronize(_device: Any = None) -> None:
        SecondDevice.active.wait("synchronize")

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    # The device draws from the CPU's generator.

    @staticmethod
    def get_rng_state(_device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, _device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return SecondDevice.active is not None

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, _index: int) -> bool:
        return SecondDevice.active is not None


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


_REGISTERED: list[Any] = []
"""What torch refers to for the rest of the process."""


def _register() -> None:
    """Make torch know the device. Nothing else of the process changes."""
    if _REGISTERED:
        return
    # The first backward pass starts a thread for each device that there is by then.
    torch.ones((), requires_grad=True).backward()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module(f"torch.{NAME}"))
    _REGISTERED.extend((hooks := _Hooks(), guard := _Guard()))
    torch._C._acc.register_python_privateuseone_hook(hooks)
    torch._C._acc.register_python_privateuseone_device_guard(guard)
