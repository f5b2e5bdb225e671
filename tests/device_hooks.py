"""What lets torch's C++ take this machine for one with GPUs; imports no torch by itself.

Guards tell devices apart. Hooks make backward passes run on a mocked device, and must be there
before torch is: for a process of its own, whose first call is ``load_hooks``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

GUARDS = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
template <c10::DeviceType TYPE>
struct Guard final : c10::impl::NoOpDeviceGuardImpl<TYPE> {
  typedef c10::Device Device;
  typedef c10::Stream Stream;
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
  Device getDevice() const override { return {TYPE, 0}; }
  Device exchangeDevice(Device) const override { return {TYPE, 0}; }
  Stream getStream(Device device) const noexcept override {
    return Stream(Stream::DEFAULT, device);
  }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
}
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard<c10::DeviceType::CUDA>)
C10_REGISTER_GUARD_IMPL(XPU, Guard<c10::DeviceType::XPU>)
C10_REGISTER_GUARD_IMPL(MPS, Guard<c10::DeviceType::MPS>)
}
"""

_HOOKS = """
#include <ATen/detail/CUDAHooksInterface.h>
namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 2; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""

HAS_COMPILER = shutil.which("g++") is not None


@functools.cache
def load(text: str) -> None:
    """Compile a text against torch, and load it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    libraries = [root / "lib" / f"lib{name}.so" for name in ("c10", "torch_cpu")]
    for library in libraries:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    flags = ["-std=c++20", "-shared", "-fPIC", "-O0", f"-I{root / 'include'}"]
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "device.cpp", Path(folder) / "device.so"
        source.write_text(text)
        command = ["g++", *flags, str(source), "-o", str(made), *map(str, libraries)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)


def load_hooks() -> None:
    """Both, in a process that has not imported torch yet."""
    load(GUARDS)
    load(_HOOKS)
