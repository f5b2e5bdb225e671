"""Registers, spilled bytes and occupancy of Triton kernels, told by Triton's own assembler.

No device is needed: ``ptxas`` says what a kernel takes. Triton is imported where it is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from benchmarks.mocked_gpu import CHIPS, Chip

_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on a chip: of each thread ``registers`` and ``spilled`` bytes."""

    kernel: str
    capability: int
    warps: int
    registers: int
    spilled: int
    shared: int
    """Bytes of shared memory of a block."""
    configuration: str = ""

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's threads that can be on their way at a time."""
        return occupancy(
            CHIPS[self.capability], warps=self.warps, registers=self.registers, shared=self.shared
        )

    def numbers(self) -> dict[str, object]:
        """All of it, for a report."""
        return {**asdict(self), "occupancy": self.occupancy}


def occupancy(chip: Chip, *, warps: int, registers: int, shared: int) -> float:
    """What NVIDIA's occupancy calculator gives: registers go to warps in pieces of 256.

    Each of the four parts of a multiprocessor has a quarter of them; a block's shared memory takes
    1 KB more.
    """
    of_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = 4 * (chip.registers // 4 // of_warp) // warps
    by_threads = chip.threads // (32 * warps)
    by_memory = chip.shared_memory // (shared + 1024)
    blocks = min(by_registers, by_threads, by_memory, chip.blocks)
    return blocks * warps * 32 / chip.threads


def read_log(log: str) -> tuple[int, int]:
    """Registers and spilled bytes that ``ptxas -v`` tells of a kernel and what it calls.

    Raises ``ValueError`` for a text that tells none.
    """
    registers = [int(number) for number in _REGISTERS.findall(log)]
    spills = [int(stores) for stores, _ in _SPILLS.findall(log)]
    if not registers or not spills:
        raise ValueError(f"this is no text of ptxas -v: {log[:200]!r}")
    return max(registers), sum(spills)


def least(found: list[Resources]) -> Resources:
    """Of the configurations of a kernel the one that spills least, then the one with most threads.

    Inductor times all of them on the device, and leaves out those that spill.
    """
    return min(found, key=lambda one: (one.spilled, -one.occupancy, one.registers))


@contextlib.contextmanager
def assembler_log() -> Iterator[io.StringIO]:
    """Have Triton compile what the block asks for, cached or not, and keep what ptxas says."""
    from triton import knobs

    log = io.StringIO()
    with (
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        yield log


def assemble(source: str, chip: Chip) -> list[Resources]:
    """What a kernel that Inductor generated takes, with each of its configurations.

    In a process of its own, after ``mock_gpus`` with this chip.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tuner = _autotuner(source)
    found = []
    for config in tuner.configs:
        meta = tuner._create_compile_meta(config)
        options = tuner._create_compile_options(config, meta)
        text = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
        with assembler_log() as log:
            kernel = triton.compile(
                text, target=GPUTarget("cuda", chip.capability, 32), options=options
            )
        found.append(_resources(tuner.fn.__name__, chip, kernel, log.getvalue(), str(config)))
    return found


def launched(call: Callable[[], object], chip: Chip) -> list[Resources]:
    """What the kernels take that a call launches, which are compiled and not run.

    The call may give its tensors on this machine: kernels are chosen by their dtypes, sizes and
    alignment. In a process of its own, after ``mock_gpus`` with this chip.
    """
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    found: list[Resources] = []

    def compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with assembler_log() as log:
            kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if log.getvalue():  # else it was compiled by an earlier launch
            found.append(_resources(self.__name__, chip, kernel, log.getvalue(), ""))
        return kernel

    with mock.patch.object(JITFunction, "run", compiled):
        call()
    return found


def _resources(name: str, chip: Chip, kernel: Any, log: str, configuration: str) -> Resources:
    registers, spilled = read_log(log)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return Resources(name, chip.capability, warps, registers, spilled, shared, configuration)


def _autotuner(source: str) -> Any:
    """What a generated text defines: a kernel with the configurations that are tried."""
    from torch._inductor.runtime import triton_helpers

    with mock.patch.object(triton_helpers, "set_driver_to_gpu"):
        module = _load(source)
    (name,) = (n for n, value in vars(module).items() if hasattr(value, "configs"))
    return getattr(module, name)


def _load(source: str) -> ModuleType:
    """A module of that text, in a file, where Triton finds the text of functions."""
    folder = tempfile.mkdtemp()
    path = Path(folder) / f"kernel_{abs(hash(source)):x}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def assembled(sources: Mapping[str, str], chip: Chip) -> dict[str, list[Resources]]:
    """``assemble`` of each source, by name; a source that several names have only once."""
    known: dict[str, list[Resources]] = {}
    found = {}
    for name, source in sources.items():
        text = source.replace(name, "kernel")
        if text not in known:
            known[text] = assemble(source, chip)
        found[name] = known[text]
    return found
