"""Compiled kernels as later processes find them again, without asking the compiler anything.

Torch's own cache knows a library by the command that compiles it, for which each process tries what
its processor can do, in an interpreter that imports torch: that takes more than a second.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from tmm.core.atomic_file import replacing
from tmm.core.inductor_private import inductor_config
from tmm.kernels.trusted_files import check_file

_CPUINFO = Path("/proc/cpuinfo")


def find_library(folder: Path, text: str) -> ctypes.CDLL | None:
    """The library that ``keep_library`` kept of these sources, loaded; None for none that is whole.

    Raises UntrustedFileError for one that somebody else could have written.
    """
    for place in _places(folder, text):
        check_file(place)
        with suppress(OSError):
            if place.stem.endswith(_sum(place)):  # a torn one would end the process
                return ctypes.CDLL(str(place))
    return None


def is_kept(folder: Path, text: str) -> bool:
    """Whether there is a library of these sources."""
    return bool(_places(folder, text))


def keep_library(folder: Path, text: str, library: Path) -> None:
    """Keep a library for later processes; without a word where that cannot be."""
    with suppress(OSError):
        place = folder / "tmm" / f"{_key(text)}-{_sum(library)}.so"
        place.parent.mkdir(mode=0o700, exist_ok=True)
        with replacing(place) as temporary:
            shutil.copyfile(library, temporary)
            temporary.chmod(0o700)


def _places(folder: Path, text: str) -> list[Path]:
    return sorted((folder / "tmm").glob(f"{_key(text)}-*.so"))


def _sum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _key(text: str) -> str:
    return _digest("\n".join((text, torch.__version__, str(torch.version.git_version), machine())))


def machine() -> str:
    """A name of all that the same sources give other machine code for.

    The processor with all its instructions, since the compiler may use any of them, and what was
    set of Inductor's flags. A folder may be shared by machines that differ.
    """
    config = inductor_config()
    flags = (config.cpp.simdlen, config.aot_inductor.debug_compile)
    return _digest("\n".join((_processor(), *map(str, flags))))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _processor() -> str:
    described = (platform.system(), platform.machine(), torch.backends.cpu.get_cpu_capability())
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:  # another system than Linux
        lines = [platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU part")
    found = dict.fromkeys(line for line in lines if line.startswith(wanted))
    return "\n".join((*described, *found))
