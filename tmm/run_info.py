"""What a run remembers of the process that wrote it."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from tmm.spec import Spec


def describe_environment(spec: Spec | None = None) -> dict[str, object]:
    """Versions, machine and specification, for ``run.json``."""
    described = {} if spec is None else {"spec": str(spec)}
    return {
        "tmm": version("tmm-compile"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        **described,
    }
