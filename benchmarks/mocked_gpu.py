"""What Inductor plans for GPUs, found without one: its text for devices that are mocked.

``mock_gpus`` changes torch for good: only for a process of its own, which was started with
``ENVIRONMENT``. Nothing is compiled or run: a plan ends where its text would be handed to Triton.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ENVIRONMENT = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Settings that Inductor reads when it is imported, those of every thread."""


@dataclass(frozen=True)
class Chip:
    """A kind of GPU, as far as kernels are chosen by it."""

    name: str
    capability: int
    processors: int
    shared_memory: int
    """Bytes that the blocks of a multiprocessor have between them."""
    memory: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    """Of a multiprocessor, as are the two before: the most that it holds at a time."""

    def properties(self) -> SimpleNamespace:
        """What torch tells of such a device."""
        major, minor = divmod(self.capability, 10)
        return SimpleNamespace(
            name=self.name,
            major=major,
            minor=minor,
            multi_processor_count=self.processors,
            total_memory=self.memory,
            regs_per_multiprocessor=self.registers,
            max_threads_per_multi_processor=self.threads,
            max_threads_per_block=1024,
            warp_size=32,
            shared_memory_per_block_optin=self.shared_memory - 1024,
            shared_memory_per_multiprocessor=self.shared_memory,
            L2_cache_size=50 << 20,
            gcnArchName="",
        )


CHIPS = {
    80: Chip("NVIDIA A100", 80, 108, 164 << 10, 80 << 30),
    90: Chip("NVIDIA H200", 90, 132, 228 << 10, 139 << 30),
    100: Chip("NVIDIA B200", 100, 148, 228 << 10, 180 << 30),
}
"""By compute capability."""


@dataclass(frozen=True)
class Plan:
    """The text that Inductor generates for a graph, and what it tells."""

    text: str
    has_cuda_graphs: bool
    """Whether what it makes of the text is recorded in CUDA graphs."""
    is_cpp: bool
    """Whether the launches are written in C++."""

    @property
    def triton_launches(self) -> int:
        """Kernels of Triton that a call launches."""
        return len(re.findall(r"^\s*triton_\w+\.run\(", self.text, re.MULTILINE))

    @property
    def other_launches(self) -> int:
        """Products, operators and what else a call hands over to libraries."""
        pattern = r"^ {8,}(?:\w+ = )?(?:extern_kernels|torch\.ops)\.[\w.]+\("
        return len(re.findall(pattern, self.text, re.MULTILINE))

    @property
    def device_indices(self) -> set[int]:
        """The devices that it runs on and allocates on."""
        called = "|".join(("_DeviceGuard", "set_device", "get_raw_stream"))
        found = re.findall(rf"(?:{called})\((\d+)\)|cuda', (?:index=)?(\d+)", self.text)
        return {int(first or second) for first, second in found}

    @property
    def readings(self) -> int:
        """Launches that are given the first input."""
        pattern = r"^\s*triton_\w+\.run\(.*\barg\d+_1\b.*, stream"
        return len(re.findall(pattern, self.text, re.MULTILINE))

    @property
    def counts_in_32_bits(self) -> bool:
        """Whether a product of sizes is cut to 32 bits: wrong from 2**31 elements on."""
        return ".to(tl.int32)" in self.text


class Planned(BaseException):
    """Ends a compilation, past everything that catches exceptions."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("planned")
        self.plan = plan


def mock_gpus(count: int = 2, chip: Chip = CHIPS[90]) -> None:
    """Let torch take this machine for one with ``count`` GPUs; the first one is current."""
    from torch._dynamo import device_interface
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, joint_graph, misc_patterns, pad_mm
    from torch._inductor.graph import GraphLowering
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    properties = chip.properties()
    names = {
        "is_available": True,
        "is_initialized": False,
        "device_count": count,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_name": chip.name,
        "is_bf16_supported": True,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "set_device": None,
        "synchronize": None,
        "set_rng_state": None,
    }
    for name, value in names.items():
        setattr(torch.cuda, name, _always(value))
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[assignment]
    torch.version.cuda = "12.8"
    interface = device_interface.CudaInterface
    of_interface = {
        "is_available": True,
        "current_device": 0,
        "device_count": count,
        "get_compute_capability": chip.capability,
        "get_device_properties": properties,
        "get_raw_stream": 0,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    for name, value in of_interface.items():
        setattr(interface, name, staticmethod(_always(value)))
    interface.device = contextlib.nullcontext
    interface.Worker.get_device_properties = staticmethod(_always(properties))
    interface.Worker.current_device = staticmethod(_always(0))
    target = GPUTarget("cuda", chip.capability, 32)
    limits = {
        "max_shared_mem": properties.shared_memory_per_block_optin,
        "multiprocessor_count": chip.processors,
        "warpSize": 32,
        "max_num_regs": chip.registers,
    }
    driver.set_active(
        SimpleNamespace(
            utils=SimpleNamespace(get_device_properties=_always(limits)),
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda index=0: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            get_device_interface=lambda: torch.cuda,
            is_active=lambda: True,
        )
    )
    # What registers patterns of attention and the like, and what evaluates constants, has tensors
    # on the device.
    joint_graph.constant_fold_uniform_value = _always(None)
    fuse_attention._sfdp_init = misc_patterns._misc_patterns_init = _always(None)
    pad_mm._pad_mm_init = _always(None)

    def end(self: Any) -> None:
        code, _ = self.codegen()
        text = getattr(code, "value", code)
        raise Planned(Plan(text, config.triton.cudagraphs, self.cpp_wrapper))

    GraphLowering.compile_to_module = end
    GraphLowering._compile_to_module = end


def plan_of(compile_graph: Callable[[], object]) -> Plan:
    """The plan of the first graph that a call compiles."""
    try:
        compile_graph()
    except Planned as planned:
        return planned.plan
    raise AssertionError("nothing was compiled")


def blocking_calls(call: Callable[[], object]) -> list[str]:
    """The operations of a call that wait for a device, on tensors that are fake.

    Needs no mock; the call makes its tensors, ``device="cuda"``.
    """
    watcher = _Watcher()
    with FakeTensorMode(), watcher:
        call()
    return watcher.found


class _Watcher(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(function).removeprefix("aten.").split(".")[0]
        result = function(*args, **kwargs)
        given = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = {x.device.type for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        copies = name in ("_to_copy", "copy_") and len(given | made) > 1
        waits = name in _WAITING and "cuda" in given
        overlaps = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
        if waits or (copies and not overlaps):
            self.found.append(name)
        return result


_WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal")
"""Operations whose results the CPU must know."""


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value
