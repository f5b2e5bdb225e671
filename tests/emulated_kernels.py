"""The kernels of a CPU compiled for another processor, and run by an emulator of it.

They stand in the place of the functions of a compiled library: tensors are sent to a process, which
sends back the rows.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch

from tmm.kernels.attention.attention_call import ATTENTION_COLUMNS
from tmm.kernels.attention.attention_host import _MASK_TYPES, SOURCES
from tmm.kernels.build import DTYPES, VECTORS, text_of

Kernels: TypeAlias = dict[torch.dtype, Callable[..., None]]

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
IS_THERE = shutil.which(COMPILER) is not None and shutil.which(EMULATOR) is not None
"""Debian has both: ``apt-get install g++-aarch64-linux-gnu qemu-user-static``."""

_READING = """
#include <cstdio>
#include <cstdlib>
#include <vector>
static void get(void* to, size_t bytes) {
  if (bytes && std::fread(to, bytes, 1, stdin) != 1) std::exit(0);
}
static int64_t integer() { int64_t value; get(&value, sizeof(value)); return value; }
static std::vector<double> memory(int64_t bytes) {
  std::vector<double> piece(bytes / sizeof(double) + 1);
  get(piece.data(), bytes);
  return piece;
}
static void reply(const std::vector<double>& rows) {
  std::fwrite(rows.data(), sizeof(double), rows.size(), stdout);
  std::fflush(stdout);
}
"""

_TENSORS = """
int main() {
  while (true) {
    const int64_t type = integer(), tensors = integer(), columns = integer(), pairs = integer();
    std::vector<int64_t> elements(tensors), order(columns), addresses, others;
    get(elements.data(), tensors * sizeof(int64_t));
    get(order.data(), columns * sizeof(int64_t));
    std::vector<std::vector<double>> pieces;
    const int64_t sizes[] = {8, 4, 2, 2};
    for (int64_t side = 0; side < 1 + pairs; side++)
      for (int64_t tensor = 0; tensor < tensors; tensor++) {
        pieces.push_back(memory(elements[tensor] * sizes[type]));
        (side ? others : addresses).push_back(reinterpret_cast<int64_t>(pieces.back().data()));
      }
    const auto function = type == 0   ? summarize_float64
                          : type == 1 ? summarize_float32
                          : type == 2 ? summarize_float16
                                      : summarize_bfloat16;
    std::vector<double> rows(tensors * columns);
    function(tensors, addresses.data(), pairs ? others.data() : nullptr, elements.data(), columns,
             order.data(), 1, rows.data());
    reply(rows);
  }
}
"""

_ATTENTIONS = """
int main() {
  while (true) {
    const int64_t type = integer();
    Geometry geometry;
    get(&geometry, sizeof(geometry));
    const auto query = memory(integer()), key = memory(integer()), mask = memory(integer());
    const auto function = type == 0   ? summarize_float64
                          : type == 1 ? summarize_float32
                          : type == 2 ? summarize_float16
                                      : summarize_bfloat16;
    std::vector<double> rows(geometry.heads * sizeof(Row) / sizeof(double));
    const auto bytes = [](const std::vector<double>& piece) {
      return reinterpret_cast<const char*>(piece.data());
    };
    function(&geometry, bytes(query), bytes(key), bytes(mask), rows.data());
    reply(rows);
  }
}
"""


@contextmanager
def emulated(folder: Path) -> Iterator[tuple[Kernels, Kernels]]:
    """The kernels of tensors, and those of attentions; ``folder`` is for what is compiled."""
    tensors = _Process(folder, (VECTORS, "summarize/host.cpp"), _TENSORS)
    attentions = _Process(folder, SOURCES, _ATTENTIONS)
    try:
        yield (
            {dtype: _of_tensors(tensors, dtype) for dtype in DTYPES},
            {dtype: _of_attentions(attentions, dtype) for dtype in DTYPES},
        )
    finally:
        tensors.close()
        attentions.close()


class _Process:
    def __init__(self, folder: Path, sources: Sequence[str], program: str) -> None:
        source = folder / f"{Path(sources[-1]).stem}_emulated.cpp"
        source.write_text(text_of(sources) + _READING + program)
        binary = source.with_suffix("")
        flags = ("-O3", "-std=c++20", "-ffp-contract=off", "-static", "-w")
        subprocess.run([COMPILER, *flags, str(source), "-o", str(binary)], check=True)
        self._process = subprocess.Popen(
            [EMULATOR, str(binary)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, *parts: bytes, doubles: int, to: int) -> None:
        """Send parts, and write what comes back to an address."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"".join(parts))
        self._process.stdin.flush()
        reply = self._process.stdout.read(8 * doubles)
        assert len(reply) == 8 * doubles, "the emulated program ended"
        ctypes.memmove(to, reply, len(reply))

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def _of_tensors(process: _Process, dtype: torch.dtype) -> Callable[..., None]:
    def kernel(
        tensors: int,
        addresses: Sequence[int],
        others: Sequence[int] | None,
        elements: Sequence[int],
        columns: int,
        order: Sequence[int],
        threads: int,
        result: int,
    ) -> None:
        process.ask(
            _integers(DTYPES.index(dtype), tensors, columns, int(others is not None)),
            _integers(*elements),
            _integers(*order),
            *(
                ctypes.string_at(address, size * dtype.itemsize)
                for side in (addresses, others or ())
                for address, size in zip(side, elements, strict=False)
                if size
            ),
            doubles=tensors * columns,
            to=result,
        )

    return kernel


def _of_attentions(process: _Process, dtype: torch.dtype) -> Callable[..., None]:
    def kernel(geometry: Any, query: int, key: int, mask: int | None, result: int) -> None:
        of = geometry.contents
        queries = (of.batch, of.heads, of.queries, of.channels)
        keys = (of.batch, of.key_heads, of.keys, of.channels)
        pieces = [
            _piece(query, queries, of.query_strides, dtype.itemsize),
            _piece(key, keys, of.key_strides, dtype.itemsize),
            b"",
        ]
        mask_type = _MASK_TYPES[of.mask_type]
        if mask is not None and mask_type is not None:
            shape = (of.batch, of.heads, of.queries, of.keys)
            pieces[2] = _piece(mask, shape, of.mask_strides, mask_type.itemsize)
        process.ask(
            _integers(DTYPES.index(dtype)),
            bytes(of),
            *(part for piece in pieces for part in (_integers(len(piece)), piece)),
            doubles=of.heads * len(ATTENTION_COLUMNS),
            to=result,
        )

    return kernel


def _piece(address: int, shape: Sequence[int], strides: Sequence[int], item: int) -> bytes:
    """The memory from the first element of a tensor to its last one."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return ctypes.string_at(address, (last + 1) * item)


def _integers(*values: int) -> bytes:
    return struct.pack(f"={len(values)}q", *values)
