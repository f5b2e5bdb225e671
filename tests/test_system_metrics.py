"""What the machine does beside the training, and the time of steps."""

import gc
import math
import os
import sys
import threading
import time
import warnings
from contextlib import suppress
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tmm.core.failures import MonitoringWarning
from tmm.runs.machine import StepClock, SystemSampler

THREAD = "tmm system metrics"
LONG = 30.0
HOST = ("host_memory", "host_memory_percent", "process_memory", "process_cpu_percent")


@pytest.fixture(autouse=True)
def no_gpu_of_this_machine(monkeypatch):
    """The GPUs of these tests are made up."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def wait_until(condition, seconds=LONG):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.005)


def first_sample(sampler):
    found = []
    wait_until(lambda: found.append(sampler.latest()) or found[-1])
    return found[-1]


def keys(*names):
    return {f"system/{name}" for name in names}


class NVMLError(Exception):
    pass


LibraryNotFound = type("NVMLError_LibraryNotFound", (NVMLError,), {})  # pynvml makes them so, too


def fake_nvml(monkeypatch, count=2, starts=None):
    """A pynvml with two GPUs, of which the second one does not tell its temperature."""

    def temperature(gpu, sensor):
        nvml.asked.append(gpu)
        if gpu:
            raise NVMLError("Not Supported")
        return 40 + gpu

    def start():
        if starts is not None:
            raise starts
        nvml.running += 1

    def shut_down():
        nvml.running -= 1

    nvml = ModuleType("pynvml")
    nvml.NVMLError = NVMLError
    nvml.running, nvml.asked = 0, []
    nvml.nvmlInit, nvml.nvmlShutdown = start, shut_down
    nvml.nvmlDeviceGetCount = lambda: count
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetUUID = "GPU-uuid-{}".format
    nvml.nvmlDeviceGetMemoryInfo = lambda gpu: SimpleNamespace(used=2**30 << gpu, total=2**33)
    nvml.nvmlDeviceGetUtilizationRates = lambda gpu: SimpleNamespace(gpu=50 + gpu, memory=1)
    nvml.NVML_TEMPERATURE_GPU = 0
    nvml.nvmlDeviceGetTemperature = temperature
    nvml.nvmlDeviceGetPowerUsage = lambda gpu: 70_500 + gpu * 1000
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def fake_cuda(monkeypatch, order):
    """A torch that has initialised CUDA and sees the GPUs in ``order``."""

    def refuse():
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(order))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(uuid=f"uuid-{order[device]}"),
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000 + device)


def test_the_values_are_plausible():
    pytest.importorskip("psutil")
    with SystemSampler(0.05) as sampler:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            sum(range(10_000))
        values = sampler.latest()
    assert set(values) == keys("cpu_percent", *HOST)
    assert all(type(value) is float for value in values.values())
    assert 0 <= values["system/cpu_percent"] <= 100
    assert 0 < values["system/process_cpu_percent"] < 100 * (os.cpu_count() or 1) + 50
    assert 2**24 < values["system/process_memory"] < values["system/host_memory"] * 2
    assert 0 < values["system/host_memory_percent"] <= 100


def test_values_are_there_at_once_and_belong_to_the_caller():
    with SystemSampler(LONG) as sampler:
        values = first_sample(sampler)
        assert values
        start = time.perf_counter()
        for _ in range(100):
            sampler.latest()
        assert (time.perf_counter() - start) / 100 < 0.005
        values.clear()
        assert sampler.latest()


def test_new_values_replace_old_ones():
    with SystemSampler(0.01) as sampler:
        first = first_sample(sampler)
        ballast = bytearray(os.urandom(2**20) * 64)
        wait_until(
            lambda: (
                sampler.latest()["system/process_memory"] > first["system/process_memory"] + 2**25
            )
        )
        assert len(ballast) == 2**26


def test_the_thread_ends_at_once_and_may_start_again():
    sampler = SystemSampler(LONG)
    assert sampler.latest() == {}
    sampler.stop()
    for _ in range(2):
        sampler.start()
        sampler.start()
        assert len(threads()) == 1
        assert threads()[0].daemon
        first_sample(sampler)
        start = time.monotonic()
        sampler.stop()
        assert time.monotonic() - start < 2
        assert not threads()
        assert sampler.latest() == {}
        sampler.stop()


def test_an_error_in_the_training_ends_the_thread():
    with pytest.raises(KeyError), SystemSampler():
        raise KeyError
    assert not threads()


def test_a_sampler_that_is_forgotten_leaves_no_thread():
    sampler = SystemSampler(LONG)
    sampler.start()
    first_sample(sampler)
    del sampler
    gc.collect()
    wait_until(lambda: not threads())


def test_an_interpreter_that_exits_does_not_mind(interpreters):
    program = (
        "import time; from tmm.runs.machine import SystemSampler\n"
        "sampler = SystemSampler(0.001); sampler.start(); time.sleep(0.3)\n"
        "assert sampler.latest()"
    )
    done = interpreters.run(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("interval", [0, -1, math.nan, math.inf])
def test_an_interval_is_a_positive_number(interval):
    with pytest.raises(ValueError, match="interval_seconds"):
        SystemSampler(interval)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_no_thread_and_may_start_one():
    with SystemSampler(0.001) as sampler:
        first_sample(sampler)
        for _ in range(20):  # the thread may hold any lock
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    inherited = sampler.latest()
                    sampler.start()
                    started = first_sample(sampler)
                    sampler.stop()
                    sampler.stop()
                    code = 0 if inherited == {} and started and not threads() else 2
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert sampler.latest()
        assert len(threads()) == 1


def test_gpus_are_those_that_exist_and_what_fails_is_said_once(monkeypatch):
    nvml = fake_nvml(monkeypatch)
    with pytest.warns(MonitoringWarning) as caught, SystemSampler(0.01) as sampler:
        first_sample(sampler)
        wait_until(lambda: nvml.asked.count(0) > 5)
        values = sampler.latest()
    (warning,) = (str(one.message) for one in caught)
    assert "system/gpu_1/temperature" in warning
    assert "Not Supported" in warning
    assert "gpu_0" not in warning
    assert nvml.asked.count(1) == 1
    assert nvml.running == 0
    assert {key: value for key, value in values.items() if "gpu" in key} == {
        "system/gpu_0/memory": 2.0**30,
        "system/gpu_0/memory_percent": 12.5,
        "system/gpu_0/utilisation_percent": 50.0,
        "system/gpu_0/temperature": 40.0,
        "system/gpu_0/power": 70.5,
        "system/gpu_1/memory": 2.0**31,
        "system/gpu_1/memory_percent": 25.0,
        "system/gpu_1/utilisation_percent": 51.0,
        "system/gpu_1/power": 71.5,
    }


def test_a_gpu_that_has_failed_does_not_hide_the_others(monkeypatch):
    nvml = fake_nvml(monkeypatch)

    def identifier(gpu):
        if gpu == 0:
            raise NVMLError("GPU is lost")
        return "GPU-uuid-1"

    nvml.nvmlDeviceGetUUID = identifier
    nvml.nvmlDeviceGetTemperature = lambda gpu, sensor: 41
    with pytest.warns(MonitoringWarning, match="gpu_0.*GPU is lost"), SystemSampler() as sampler:
        values = first_sample(sampler)
    assert values["system/gpu_1/temperature"] == 41
    assert not [key for key in values if "gpu_0" in key]


def test_what_torch_has_allocated_has_the_number_of_its_gpu(monkeypatch):
    fake_nvml(monkeypatch).nvmlDeviceGetTemperature = lambda gpu, sensor: 40
    fake_cuda(monkeypatch, order=(1, 0))
    with SystemSampler() as sampler:
        values = first_sample(sampler)
    assert values["system/gpu_1/torch_memory"] == 1000
    assert values["system/gpu_0/torch_memory"] == 1001


def test_without_nvml_gpus_have_the_numbers_of_torch(monkeypatch):
    fake_cuda(monkeypatch, order=(5, 7))
    with SystemSampler() as sampler:
        values = first_sample(sampler)
    found = {key: value for key, value in values.items() if "gpu" in key}
    assert found == {"system/gpu_0/torch_memory": 1000, "system/gpu_1/torch_memory": 1001}


def test_a_gpu_of_torch_that_nvml_does_not_know_is_said(monkeypatch):
    fake_nvml(monkeypatch, count=1)
    fake_cuda(monkeypatch, order=(3,))
    with pytest.warns(MonitoringWarning, match="torch_memory.*cuda:0"), SystemSampler() as sampler:
        assert not [key for key in first_sample(sampler) if "torch_memory" in key]


def test_cuda_is_never_initialised(monkeypatch):
    fake_nvml(monkeypatch).nvmlDeviceGetTemperature = lambda gpu, sensor: 40
    fake_cuda(monkeypatch, order=(0, 1))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with SystemSampler() as sampler:
        assert not [key for key in first_sample(sampler) if "torch_memory" in key]


def test_a_machine_without_a_driver_is_nothing_to_warn_of(monkeypatch):
    fake_nvml(monkeypatch, starts=LibraryNotFound())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SystemSampler() as sampler:
            assert not [key for key in first_sample(sampler) if "gpu" in key]


def test_a_driver_that_does_not_fit_is(monkeypatch):
    fake_nvml(monkeypatch, starts=NVMLError("Driver/library version mismatch"))
    with pytest.warns(MonitoringWarning, match="mismatch"), SystemSampler() as sampler:
        assert keys("process_cpu_percent") <= set(first_sample(sampler))


def test_warnings_as_errors_do_not_end_the_thread(monkeypatch):
    nvml = fake_nvml(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SystemSampler(0.01) as sampler:
            wait_until(lambda: nvml.asked.count(0) > 3)
            assert "system/gpu_1/power" in sampler.latest()


def test_old_values_are_not_given(monkeypatch):
    """A driver may hang; what it said before is no news."""
    nvml = fake_nvml(monkeypatch, count=1)
    release = threading.Event()
    monkeypatch.setattr("tmm.runs.machine._STALE_SECONDS", 0.2)
    with SystemSampler(0.01) as sampler:
        first_sample(sampler)
        nvml.nvmlDeviceGetTemperature = lambda gpu, sensor: release.wait(LONG)
        wait_until(lambda: not sampler.latest())
        release.set()
        assert first_sample(sampler)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_without_psutil_values_are_those_of_the_system(monkeypatch):
    expected = {}
    with suppress(ImportError):
        import psutil

        memory = psutil.virtual_memory()
        expected["system/host_memory"] = memory.total - memory.available
        expected["system/process_memory"] = psutil.Process().memory_info().rss
    monkeypatch.setitem(sys.modules, "psutil", None)
    with SystemSampler() as sampler:
        values = first_sample(sampler)
    assert set(values) == keys("load_average", *HOST)
    assert values["system/load_average"] >= 0
    assert 2**24 < values["system/process_memory"] < values["system/host_memory"] * 2
    assert 0 < values["system/host_memory_percent"] <= 100
    for key, value in expected.items():
        assert value / 2 < values[key] < value * 2  # other programs run


def test_without_psutil_and_linux_keys_are_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "psutil", None)
    for name in ("_STATUS", "_MEMORY"):
        monkeypatch.setattr(f"tmm.runs.machine_probes.{name}", tmp_path / "missing")
    monkeypatch.delattr(os, "getloadavg")
    with SystemSampler() as sampler:
        assert set(first_sample(sampler)) == keys("process_cpu_percent")


def test_a_psutil_that_fails_is_said_once(monkeypatch):
    psutil = ModuleType("psutil")
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    with pytest.warns(MonitoringWarning, match="Process"), SystemSampler() as sampler:
        assert set(first_sample(sampler)) == keys("process_cpu_percent")


# Steps


def test_a_clock_gives_seconds_and_rates(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tmm.runs.machine.time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = StepClock()
    assert clock.mark(8, 1024) == {}
    now[0] += 0.5
    assert clock.mark(samples=8, tokens=1024) == {
        "system/step_seconds": 0.5,
        "system/samples_per_second": 16.0,
        "system/tokens_per_second": 2048.0,
    }
    now[0] += 2
    assert clock.mark() == {"system/step_seconds": 2.0}
    assert clock.mark(8) == {"system/step_seconds": 0.0}
    now[0] += 2
    assert clock.mark(tokens=0) == {"system/step_seconds": 2.0, "system/tokens_per_second": 0.0}


def test_a_clock_runs():
    clock = StepClock()
    clock.mark()
    time.sleep(0.02)
    assert 0.02 <= clock.mark()["system/step_seconds"] < LONG
