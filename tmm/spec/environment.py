"""What a run remembers of the process that wrote it."""

from __future__ import annotations

import platform
from hashlib import sha256
from importlib.metadata import version

import torch
from torch.nn.parameter import is_lazy

from tmm.core.module_names import parameter_names, relative_names, unwrapped
from tmm.spec.spec import Spec
from tmm.spec.stages import Stages


def describe_environment() -> dict[str, object]:
    """Versions and machine, for ``run.json``."""
    return {
        "tmm": version("tmm-compile"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def describe_measured(module: torch.nn.Module, spec: Spec) -> dict[str, object]:
    """What is measured of which model, for ``run.json``.

    The model is known by the types of its modules and by names, shapes and dtypes of its
    parameters, but for one whose parameters get their shapes later. Of a pipeline it is that of
    all stages.
    """
    modules, parameters = relative_names(module), parameter_names(module)
    described: dict[str, object] = {"spec": str(spec)}
    if any(map(is_lazy, parameters)):
        return described
    if isinstance(module, Stages):
        kind, size, count, parts = module.described()
    else:
        parts = [f"{name}: {type(part).__name__}" for part, name in modules.items()]
        parts += [f"{name}: {tuple(p.shape)} {p.dtype}" for p, (name, _) in parameters.items()]
        kind, size = type(unwrapped(module)).__name__, len(modules)
        count = sum(parameter.numel() for parameter in parameters)
    known_by = sha256("\n".join(parts).encode()).hexdigest()[:12]
    model = f"{kind} of {size} modules and {count:,} parameters ({known_by})"
    return {**described, "model": model}
