"""Why plain operations measure on a device that there are kernels for, told once."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

from tmm.core.failures import levels_to_user

_OLDEST = (7, 0)
"""The compute capability that Triton compiles for at least."""


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton cannot serve a device, in a few words; None if it may."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            return "Triton serves compute capability 7.0 and newer, not {}.{}".format(*capability)
    return None


@functools.cache
def warn_of_plain_operations(device: torch.device, reason: str) -> None:
    """Say it once of each device."""
    warnings.warn(
        f"tmm measures on {device} with plain torch operations, which is slower and takes memory "
        f"for a while, because {reason}",
        stacklevel=levels_to_user(),
    )
