"""A device that is not there: tensors that say they lie on it, and a list of what waits for it.

Elements lie on the CPU. What synchronises on a real device (``torch.cuda.set_sync_debug_mode``
warns of it) is noted, and what a real device refuses is refused: operations on several devices.
Whatever a tensor is copied to is full of NaN until the event that was recorded after the copy says
that it is done, or is waited for; ``Device.run()`` lets the device come to the end of its work.
"""

from __future__ import annotations

import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch._dynamo.device_interface  # which derives classes of its own from those of events
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests import device_hooks

aten = torch.ops.aten

_SYNCHRONISING = {
    *(aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default),
    *(aten.nonzero.default, aten.nonzero_numpy.default, aten.argwhere.default),
    *(aten.masked_select.default, aten.equal.default, aten.allclose.default),
    *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default),
    *(aten.repeat_interleave.Tensor, aten.bincount.default),
}
"""Operations that read a number of the device before they return."""

_INDEXING = {
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default),
    *(aten._unsafe_index.Tensor, aten._index_put_impl_.default),
}


@dataclass
class Device:
    """What was asked of the mocked device."""

    waits: list[str] = field(default_factory=list)
    """Each wait of the main thread for the device, with the line of tmm that led to it."""
    elsewhere: list[str] = field(default_factory=list)
    """Those of other threads."""
    events: int = 0
    busy: int = 0
    """Events whose waiting keeps a core busy."""
    asked: list[tuple[str, object, object]] = field(default_factory=list)
    """The thread that asks an event, or waits for it; its device, and what the thread's own is."""
    current: threading.local = field(default_factory=threading.local)
    """``device`` of a thread, where somebody has said so."""
    pinned: int = 0
    copies: int = 0
    """Copies from the device to the host."""
    allocated: int = 0
    peak: int = 0
    """Bytes of tensors that are alive on it, and the most at a time."""
    pending: list[Callable[[], None]] = field(default_factory=list)
    done: int = 0

    def run(self) -> None:
        """The device does all that it was told to."""
        self.done += len(self.pending)
        work, self.pending = self.pending, []
        for each in work:
            each()

    def wait(self, what: str) -> None:
        """A thread waits for it."""
        frames = [f for f in traceback.extract_stack() if "/tests/" not in f.filename]
        own = [f for f in frames if "/tmm/" in f.filename or "/runtime/" in f.filename]
        where = own[-1] if own else None
        is_main = threading.current_thread() is threading.main_thread()
        waits = self.waits if is_main else self.elsewhere
        waits.append(f"{what} by {where.filename}:{where.lineno}" if where else what)
        self.run()


class OnDevice(torch.Tensor):
    """A tensor on the mocked device; ``held`` has its elements."""

    held: torch.Tensor
    mode: _Mode

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device, mode: _Mode) -> OnDevice:
        self = torch.Tensor._make_wrapper_subclass(
            *(cls, held.shape),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        self.held, self.mode = held, mode
        return self

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        tensors = pytree.tree_leaves((args, kwargs))
        mode = next(x.mode for x in tensors if isinstance(x, OnDevice))
        return mode.call(function, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            self.mode.device.wait("a list of indices")
            return self.mode.put(self.held[index], self.device)
        return super().__getitem__(index)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)}, {self.dtype}, {self.device})"


class _Mode(TorchDispatchMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.pins: set[int] = set()
        self.users: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.call(function, args, kwargs or {})

    def call(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        if not any(isinstance(x, OnDevice) for x in leaves) and (
            function not in (aten.is_pinned.default, aten.copy_.default)
            and (target is None or target.type != "cuda")
        ):
            return function(*args, **kwargs)
        ours = {id(x.held): x for x in leaves if isinstance(x, OnDevice)}
        hosts = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice)]
        devices = {x.device for x in ours.values()}
        if function is aten.is_pinned.default:
            return _storage(args[0]) in self.pins
        if function is aten.copy_.default:
            return self._copy(*args, **kwargs)
        if function is aten._to_copy.default and target is not None:
            return self._moved(args[0], kwargs, target)
        kwargs.pop("pin_memory", None)
        if ours:
            self._check(function, args, devices, hosts)
        inner_args, inner_kwargs = pytree.tree_map(_held, (args, kwargs))
        if target is not None:
            inner_kwargs["device"] = "cpu"
        with _without_modes():
            result = function(*inner_args, **inner_kwargs)
        where = target if target is not None else next(iter(devices), None)
        if where is None or where.type == "cpu":
            return result
        where = torch.device(where.type, where.index or 0)

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return ours[id(x)] if id(x) in ours else self.put(x, where)

        return pytree.tree_map(wrapped, result)

    def put(self, held: torch.Tensor, device: torch.device) -> OnDevice:
        self._count(held)
        return OnDevice(held, device, self)

    def _count(self, held: torch.Tensor) -> None:
        key, size = _storage(held), held.untyped_storage().nbytes()
        self.users[key] = self.users.get(key, 0) + 1
        if self.users[key] == 1:
            self.device.allocated += size
            self.device.peak = max(self.device.peak, self.device.allocated)
        weakref.finalize(held, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if self.users[key] == 0:
            self.device.allocated -= size

    def _check(self, function: Any, args: Any, devices: set[Any], hosts: list[Any]) -> None:
        if len(devices) > 1:
            raise RuntimeError(f"{function}: expected all tensors on one device, not {devices}")
        if function in _SYNCHRONISING:
            self.device.wait(str(function))
        if function in _INDEXING:
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.device.wait(f"{function} with a mask")
            elif any(not isinstance(x, OnDevice) for x in indices):
                self.device.wait(f"{function} with indices from the host")
        elif any(x.dim() > 0 for x in hosts):
            raise RuntimeError(f"{function}: a tensor of the host among those of {devices}")

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        self.device.pinned += 1
        self.pins.add(_storage(tensor))
        return tensor

    def _moved(self, source: torch.Tensor, kwargs: dict[str, Any], target: Any) -> Any:
        target = torch.device(target.type, None if target.type == "cpu" else target.index or 0)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        is_async = kwargs.pop("non_blocking", False)
        with _without_modes():
            result = aten._to_copy.default(_held(source), **kwargs)
        if source.device != target and not is_async and "cpu" in (source.device.type, target.type):
            self.device.wait(f"a blocking copy from {source.device} to {target}")
        return result if target.type == "cpu" else self.put(result, target)

    def _copy(self, out: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        kinds = out.device.type, source.device.type
        late = False
        if kinds[0] != kinds[1]:
            host = source if kinds[0] != "cpu" else out
            if kinds[0] == "cpu":
                self.device.copies += 1
                late = non_blocking and _storage(host) in self.pins
            if (not non_blocking and (source.dim() or kinds[0] == "cpu")) or (
                kinds[0] == "cpu" and not late
            ):
                self.device.wait(f"a blocking copy from {source.device} to {out.device}")
        with _without_modes():
            if not late:
                aten.copy_.default(_held(out), _held(source))
                return out
            values, place = _held(source).clone(), _held(out)
            if place.is_floating_point():
                place.fill_(float("nan"))

        def arrive() -> None:
            with _without_modes():
                place.copy_(values)

        self.device.pending.append(arrive)
        return out


class _Event:
    """An event of the mocked device, recorded behind the work that it was told to do so far."""

    def __init__(self, device: Device, *, blocking: bool) -> None:
        device.events += 1
        device.busy += not blocking
        self._device = device
        self._behind = 0
        self._of: object = None

    def record(self, stream: _Stream) -> None:
        self._behind = self._device.done + len(self._device.pending)
        self._of = stream.device

    def query(self) -> bool:
        current = getattr(self._device.current, "device", None)
        self._device.asked.append((threading.current_thread().name, self._of, current))
        return self._device.done >= self._behind

    def synchronize(self) -> None:
        if not self.query():
            self._device.wait("an event")


@dataclass(frozen=True)
class _Stream:
    device: torch.device
    stream_id: int = 0


@contextmanager
def mocked_device(
    monkeypatch: pytest.MonkeyPatch, languages: tuple[str, ...] = ("torch",)
) -> Iterator[Device]:
    """Within the block ``cuda:0`` and ``cuda:1`` can be used.

    By kernels in these ``languages``: plain torch operations, and where Triton interprets those in
    ``Triton``, see ``Interpreted``.
    """
    device = Device()

    def functions(operation: str, where: torch.device) -> Any:
        from tmm.kernels import kernel_registry

        found = kernel_registry.candidates(operation, where.type)  # type: ignore[arg-type]
        chosen = [k for k in found if where.type == "cpu" or k.language in languages]
        return tuple(map(kernel_registry.function_of, chosen))

    def event(*_: object, blocking: bool = False, **__: object) -> _Event:
        return _Event(device, blocking=blocking)

    @contextmanager
    def on(where: Any) -> Iterator[None]:
        before = getattr(device.current, "device", None)
        device.current.device = torch.device(where)
        try:
            yield
        finally:
            device.current.device = before

    def stream(where: Any) -> _Stream:
        return _Stream(torch.device(where))

    mode, empty = _Mode(device), torch.empty

    def pinning(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return mode.pinned(made) if pin_memory else made

    def made_of_numbers(make: Any) -> Any:
        def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            if isinstance(data, torch.Tensor) or torch.device(device or "cpu").type == "cpu":
                return make(data, *args, device=device, **kwargs)
            return make(data, *args, device="cpu", **kwargs).to(device)  # blocking

        return made

    def made_there(make: Any) -> Any:
        """Also where modes are left, as around what is measured."""

        def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            where = torch.device(device or "cpu")
            if where.type != "cuda":
                return make(*args, device=device, **kwargs)
            with _without_modes():
                held = make(*args, device="cpu", **kwargs)
            return mode.put(held, torch.device("cuda", where.index or 0))

        return made

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        return mode.pinned(tensor.clone())

    # What asks for a device before a mode is told of it.
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch, "tensor", made_of_numbers(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", made_of_numbers(torch.as_tensor))
    for name in ("arange", "full", "ones", "zeros"):
        monkeypatch.setattr(torch, name, made_there(getattr(torch, name)))
    monkeypatch.setattr("tmm.kernels.kernel_registry._functions", functions)
    monkeypatch.setattr(torch, "empty", made_there(pinning))  # which refuses without a device
    monkeypatch.setattr(torch, "Event", event)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.accelerator, "current_stream", stream)
    load_guards()
    with mode:
        yield device


def load_guards() -> None:
    """Autograd and indexing ask for what sets the device of a thread; this torch has none."""
    if not device_hooks.HAS_COMPILER:
        pytest.skip("no C++ compiler")
    device_hooks.load(device_hooks.GUARDS)


class Interpreted:
    """A kernel of Triton that the interpreter runs on what tensors of the mocked device hold."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches += 1
            with _without_modes():
                self.kernel[grid](*map(_held, args), **kwargs)

        return launch


def to_device(module: torch.nn.Module, device: str = "cuda:0") -> torch.nn.Module:
    """Put a module's parameters and buffers there."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = parameter.detach().to(device, non_blocking=True)
                part._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device, non_blocking=True)
    return module


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def _storage(tensor: torch.Tensor) -> int:
    return _held(tensor).untyped_storage().data_ptr()


def _without_modes() -> AbstractContextManager[object]:
    return torch.utils._python_dispatch._disable_current_modes()
