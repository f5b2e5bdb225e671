"""Kernels that a wheel brings along, so that whoever installs it needs no compiler.

There is a library of each text of sources for each set of instructions, named after both: one that
was built of other sources is never loaded. They use torch through its stable ABI only, so that one
binary serves each torch from ``OLDEST_TORCH`` on. ``setup.py`` builds them.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "built"
"""Where they lie; a checkout has none."""

OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class InstructionSet:
    """What a library may use of a processor.

    Attributes:
        name: In the names of files.
        flags: Of the compiler.
        capabilities: What torch calls processors that have it
            (``torch.backends.cpu.get_cpu_capability``); all of the machine's type do without them.
    """

    name: str
    flags: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()

    @property
    def is_here(self) -> bool:
        """Whether this processor has it, and torch uses it."""
        return not self.capabilities or torch.backends.cpu.get_cpu_capability() in self.capabilities


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_BASE = InstructionSet("base")
_OF_MACHINES = {
    "x86_64": (
        InstructionSet("avx512", _AVX512, ("AVX512",)),
        InstructionSet("avx2", _AVX2, ("AVX512", "AVX2")),
        _BASE,
    ),
    "aarch64": (_BASE,),  # which has NEON
}


def instruction_sets() -> tuple[InstructionSet, ...]:
    """Those that libraries are built for on this type of machine, the widest vectors first."""
    return _OF_MACHINES.get(platform.machine(), ()) if platform.system() == "Linux" else ()


def place_of(text: str, one: InstructionSet, folder: Path) -> Path:
    """Where the library of these sources lies in a folder."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder / f"{digest}-{platform.machine()}-{one.name}.so"


def is_ahead(text: str) -> bool:
    """Whether there is a library of these sources that this processor can run."""
    return bool(_places(text))


def find_ahead(text: str) -> ctypes.CDLL | None:
    """The library of these sources with the widest vectors that this processor has, loaded.

    None where there is none, and where this system or this torch cannot load one.
    """
    for place in _places(text):
        with suppress(OSError):
            return ctypes.CDLL(str(place))
    return None


def _places(text: str) -> list[Path]:
    places = [place_of(text, one, FOLDER) for one in instruction_sets() if one.is_here]
    return [place for place in places if place.exists()]
