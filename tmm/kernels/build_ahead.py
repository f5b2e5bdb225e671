"""Compile the kernels that a wheel brings along, for all processors of a type of machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from tmm.kernels.ahead import OLDEST_TORCH, instruction_sets, place_of

_FLAGS = (
    *("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fopenmp"),
    *("-fno-trapping-math", "-fno-signed-zeros", "-fno-math-errno", "-ffp-contract=off"),
    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH),
)


def build_ahead(texts: Iterable[str], folder: Path) -> list[Path]:
    """Compile a library of each text for each set of instructions, which are returned.

    The compiler is what the environment's ``CXX`` names, or ``g++``.

    Raises:
        RuntimeError: No libraries are known for this type of machine.
        subprocess.CalledProcessError: The compiler failed, and has written why.
    """
    if not instruction_sets():
        raise RuntimeError("no kernels are built ahead for this type of machine: unset TMM_KERNELS")
    folder.mkdir(parents=True, exist_ok=True)
    built = []
    for text in texts:
        for one in instruction_sets():
            built.append(place_of(text, one, folder))
            _compile(text, built[-1], one.flags)
    return built


def _compile(text: str, library: Path, flags: tuple[str, ...]) -> None:
    """Compile one library.

    OpenMP is not linked: torch has loaded one for everybody, and threads of two would compete.
    """
    root, compiler = Path(torch.__file__).parent, os.environ.get("CXX", "g++")
    source, compiled = library.with_suffix(".cpp"), library.with_suffix(".o")
    source.write_text(text)
    to_compile = (*_FLAGS, *flags, "-I", root / "include", "-c", source, "-o", compiled)
    to_link = ("-shared", "-s", compiled, "-L", root / "lib", "-ltorch_cpu", "-o", library)
    for arguments in (to_compile, to_link):
        subprocess.run([compiler, *map(str, arguments)], check=True)
    source.unlink()
    compiled.unlink()
