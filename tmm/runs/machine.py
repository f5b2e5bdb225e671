"""What the machine does beside the training: its processors, memory and GPUs, and time per step.

psutil and nvidia-ml-py are optional. Without them, or where the machine does not tell, keys are
missing: nothing is estimated.
"""

from __future__ import annotations

import atexit
import importlib
import math
import os
import threading
import time
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self

from tmm.core.failures import UserLine
from tmm.core.keys import system_key
from tmm.runs.machine_probes import Probe, Values, all_probes

_JOIN_SECONDS = 2.0  # a driver that hangs must not keep the training from its end
_STALE_INTERVALS, _STALE_SECONDS = 10, 10.0  # the larger counts
_FIRST_SECONDS = 0.1  # what the first percentages are of


class SystemSampler:
    """A daemon thread that samples the machine, each ``interval_seconds``; `latest` never waits.

    Keys, of the whole machine and in bytes unless another unit is named:

    ===================================  ========================================================
    ``system/cpu_percent``               of all processors, since the sample before; needs psutil
    ``system/load_average``              processes of the last minute; only without psutil
    ``system/process_cpu_percent``       of one processor: 200 where two are busy
    ``system/process_memory``            resident memory of this process, without its children
    ``system/host_memory``               what is not available to new programs
    ``system/host_memory_percent``       the same, of all memory
    ``system/gpu_I/memory``              of all programs, with what the driver reserves
    ``system/gpu_I/memory_percent``      the same, of all memory
    ``system/gpu_I/utilisation_percent`` time in which a kernel ran
    ``system/gpu_I/temperature``         degrees Celsius
    ``system/gpu_I/power``               watts
    ``system/gpu_I/torch_memory``        of this process's tensors, once it has initialised CUDA
    ===================================  ========================================================

    ``I`` numbers GPUs as nvidia-smi does, whatever ``CUDA_VISIBLE_DEVICES`` says; as torch does
    where NVML is missing. What cannot be read is warned of once and left out from then on.
    Raises ValueError for an interval that is no positive number.
    """

    def __init__(self, interval_seconds: float = 1.0) -> None:
        if not 0 < interval_seconds < math.inf:
            raise ValueError(f"interval_seconds must be a positive number, not {interval_seconds}")
        self.interval_seconds = interval_seconds
        self._psutil, self._nvml = _optional("psutil"), _optional("pynvml")
        self._sampling: _Sampling | None = None

    def latest(self) -> dict[str, float]:
        """The newest values by key, at once.

        Empty before the first sample, after `stop`, in a forked child that has not called `start`,
        and once the newest sample is old: ten intervals, and at least ten seconds.
        """
        sampling = self._sampling
        return {} if sampling is None else sampling.latest()

    def start(self) -> None:
        """Start the thread, if it does not run."""
        if self._sampling is None or not self._sampling.is_of_this_process:
            sampling = _Sampling(self.interval_seconds, self._psutil, self._nvml)
            # Only a signal: the garbage collector may run in the middle of anything.
            weakref.finalize(self, sampling.end).atexit = False
            sampling.start()
            self._sampling = sampling

    def stop(self) -> None:
        """End the thread, and wait for it for two seconds at most."""
        if self._sampling is not None:
            self._sampling.stop()
            self._sampling = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class StepClock:
    """Measures the time of steps, of the host: a GPU's kernels may still be running."""

    def __init__(self) -> None:
        self._marked: float | None = None

    def mark(self, samples: int | None = None, tokens: int | None = None) -> dict[str, float]:
        """End a step that took ``samples`` and ``tokens``; return its seconds and rates by key.

        The first call only starts the clock.
        """
        now, before = time.perf_counter(), self._marked
        self._marked = now
        if before is None:
            return {}
        values = {system_key("step_seconds"): now - before}
        for name, count in (("samples", samples), ("tokens", tokens)):
            if count is not None and now > before:
                values[system_key(f"{name}_per_second")] = count / (now - before)
        return values


@dataclass(frozen=True)
class _Sample:
    values: Values
    seconds: float  # of the monotonic clock


class _Sampling:
    """One thread and its newest sample. It knows no sampler, which can so be collected."""

    def __init__(self, interval: float, psutil: Any, nvml: Any) -> None:
        self._interval = interval
        self._psutil, self._nvml = psutil, nvml
        self._stale_seconds = max(_STALE_INTERVALS * interval, _STALE_SECONDS)
        self._sample = _Sample({}, -math.inf)
        self._process = os.getpid()
        self._started_at = UserLine.here()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tmm system metrics", daemon=True)

    @property
    def is_of_this_process(self) -> bool:
        return self._process == os.getpid()

    def latest(self) -> dict[str, float]:
        sample = self._sample
        if time.monotonic() - sample.seconds > self._stale_seconds or not self.is_of_this_process:
            return {}
        return dict(sample.values)

    def start(self) -> None:
        self._thread.start()
        atexit.register(self.stop)  # a daemon must not sample while the interpreter goes

    def end(self) -> None:
        if self.is_of_this_process:  # the event's lock may have been held when the parent forked
            self._end.set()

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self.end()
        if self.is_of_this_process:
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        with ExitStack() as stack:
            failures: list[str] = []
            probes = all_probes(self._psutil, self._nvml, stack, failures)
            pause = min(_FIRST_SECONDS, self._interval)
            while not self._end.wait(pause):
                probes = self._take(probes, failures)
                if failures:
                    _say(failures, self._started_at)
                    failures = []
                pause = self._interval

    def _take(self, probes: list[Probe], failures: list[str]) -> list[Probe]:
        """Take a sample; return the probes that worked."""
        values: dict[str, float] = {}
        working = []
        for probe in probes:
            try:
                values.update(probe.read())
            except BaseException as error:  # a driver's own classes; it ends nothing in a thread
                failures.append(f"{probe.name} ({error!r})")
            else:
                working.append(probe)
        self._sample = _Sample(values, time.monotonic())
        return working


def _optional(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
    except Exception as error:  # such as a psutil that does not know the system
        _say([f"what {name} measures ({error!r})"], UserLine.here())
        return None


def _say(failures: list[str], line: UserLine) -> None:
    line.warn(f"system metrics are left out from now on: {', '.join(failures)}")
