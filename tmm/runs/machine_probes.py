"""What can be asked of the machine: its processors, memory and GPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from tmm.core.keys import system_key

Values: TypeAlias = Mapping[str, float]
"""Numbers by key."""

_NO_GPU = ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded")
_STATUS, _MEMORY = Path("/proc/self/status"), Path("/proc/meminfo")


@dataclass(frozen=True)
class Probe:
    """A query that gives values by key; ``name`` is for the user."""

    name: str
    read: Callable[[], Values]


def all_probes(psutil: Any, nvml: Any, stack: ExitStack, failures: list[str]) -> list[Probe]:
    """All that there are; of those that cannot be had, why is appended to ``failures``."""
    probes: list[Probe] = []
    gpus: dict[str, int] = {}
    try:
        probes.extend(_host_probes() if psutil is None else _psutil_probes(psutil))
    except Exception as error:
        failures.append(f"{system_key('...')} ({error!r})")
    probes.append(Probe(system_key("process_cpu_percent"), _ProcessTime().percent))
    try:
        if nvml is not None:
            probes.extend(_gpu_probes(nvml, gpus, stack, failures))
    except Exception as error:
        if type(error).__name__ not in _NO_GPU:
            failures.append(f"{system_key('gpu_...')} ({error!r})")
    probes.append(Probe(system_key("gpu_...", "torch_memory"), partial(_torch_memory, gpus)))
    return probes


# The host


def _psutil_probes(psutil: Any) -> Iterator[Probe]:
    process = psutil.Process()
    psutil.cpu_percent(interval=None)  # from here on it counts

    def host_memory() -> Values:
        memory = psutil.virtual_memory()
        return _memory(system_key("host_memory"), memory.total - memory.available, memory.total)

    yield Probe(system_key("host_memory"), host_memory)
    yield _number(system_key("cpu_percent"), lambda: psutil.cpu_percent(interval=None))
    yield _number(system_key("process_memory"), lambda: process.memory_info().rss)


def _host_probes() -> Iterator[Probe]:
    """What can be known without psutil."""

    def host_memory() -> Values:
        total, available = (_from_table(_MEMORY, name) for name in ("MemTotal", "MemAvailable"))
        return _memory(system_key("host_memory"), total - available, total)

    if _MEMORY.exists():
        yield Probe(system_key("host_memory"), host_memory)
    if _STATUS.exists():
        yield _number(system_key("process_memory"), lambda: _from_table(_STATUS, "VmRSS"))
    if hasattr(os, "getloadavg"):
        yield _number(system_key("load_average"), lambda: os.getloadavg()[0])


def _number(key: str, read: Callable[[], float]) -> Probe:
    return Probe(key, lambda: {key: float(read())})


def _memory(key: str, used: int, total: int) -> Values:
    return {key: float(used), f"{key}_percent": 100 * used / total}


def _from_table(path: Path, name: str) -> int:
    """A number of bytes from a table of Linux, which has lines such as ``VmRSS:  123 kB``."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{path} has no {name}")


class _ProcessTime:
    """Processor time of this process, against the clock."""

    def __init__(self) -> None:
        self._busy, self._clock = time.process_time(), time.monotonic()

    def percent(self) -> Values:
        busy, clock = self._busy, self._clock
        self._busy, self._clock = time.process_time(), time.monotonic()
        if self._clock <= clock:
            return {}
        percent = 100 * (self._busy - busy) / (self._clock - clock)
        return {system_key("process_cpu_percent"): percent}


# GPUs


def _gpu_probes(
    nvml: Any, gpus: dict[str, int], stack: ExitStack, failures: list[str]
) -> Iterator[Probe]:
    """Of each GPU that NVML has; fills ``gpus``: identifiers as torch writes them, to numbers."""
    nvml.nvmlInit()
    stack.callback(_shut_down, nvml)
    for index in range(nvml.nvmlDeviceGetCount()):
        name = f"gpu_{index}"
        try:
            gpu = nvml.nvmlDeviceGetHandleByIndex(index)
            gpus[nvml.nvmlDeviceGetUUID(gpu).removeprefix("GPU-")] = index
        except Exception as error:  # one that has failed
            failures.append(f"{system_key(name)} ({error!r})")
        else:
            yield from _probes_of_gpu(nvml, gpu, name)


def _probes_of_gpu(nvml: Any, gpu: Any, name: str) -> Iterator[Probe]:
    def memory() -> Values:
        found = nvml.nvmlDeviceGetMemoryInfo(gpu)
        return _memory(system_key(name, "memory"), found.used, found.total)

    def temperature() -> float:
        celsius: float = nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)
        return celsius

    rates, power = nvml.nvmlDeviceGetUtilizationRates, nvml.nvmlDeviceGetPowerUsage
    yield Probe(system_key(name, "memory"), memory)
    yield _number(system_key(name, "utilisation_percent"), lambda: rates(gpu).gpu)
    yield _number(system_key(name, "temperature"), temperature)
    yield _number(system_key(name, "power"), lambda: power(gpu) / 1000)


def _torch_memory(gpus: Mapping[str, int]) -> Values:
    """What torch has allocated, by the numbers ``gpus`` of identifiers; by torch's without any."""
    if not torch.cuda.is_initialized():
        return {}
    values = {}
    for device in range(torch.cuda.device_count()):
        index: int | None = device
        if gpus:
            index = gpus.get(str(torch.cuda.get_device_properties(device).uuid))
        if index is None:
            raise LookupError(f"cuda:{device} is none of the GPUs that NVML has")
        key = system_key(f"gpu_{index}", "torch_memory")
        values[key] = float(torch.cuda.memory_allocated(device))
    return values


def _shut_down(nvml: Any) -> None:
    with suppress(nvml.NVMLError):  # nothing is lost by it
        nvml.nvmlShutdown()
