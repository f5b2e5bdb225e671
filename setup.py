"""Builds the kernels of a CPU into the wheel where ``TMM_KERNELS=ahead`` asks for it.

``make wheel`` does, with the torch of its environment. Without it the wheel is of pure Python, and
kernels are compiled where they are first used. All else is in ``pyproject.toml``.
"""

import os
import sys
from pathlib import Path
from shutil import rmtree

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

AHEAD = os.environ.get("TMM_KERNELS") == "ahead"


class BuildWithKernels(build_py):
    """Copies modules and compiles kernels."""

    def run(self) -> None:
        """Do both."""
        super().run()
        folder = Path(self.build_lib, "tmm", "kernels", "built")
        rmtree(folder, ignore_errors=True)  # of an earlier build
        if not AHEAD:
            return
        sys.path.insert(0, str(Path(__file__).parent))
        from tmm.kernels.build import text_of
        from tmm.kernels.build_ahead import build_ahead
        from tmm.kernels.kernel_registry import KERNELS

        texts = {text_of(kernel.sources) for kernel in KERNELS if kernel.sources}
        build_ahead(texts, folder)


class OfAMachine(Distribution):
    """What has libraries lies where those of a machine lie."""

    def has_ext_modules(self) -> bool:
        """Whether there are any."""
        return AHEAD


class WheelOfAMachine(bdist_wheel):
    """A wheel with libraries is of a type of machine, and of any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Libraries use nothing of Python."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if AHEAD else (python, abi, platform)


setup(
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfAMachine},
    distclass=OfAMachine,
)
