"""Whether a reference differs from a model in more than its tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_PLAIN = (int, float, complex, str, tuple, torch.dtype)
_OF_THE_MODULE = ("training", "is_reference_module", "call_super_init", "dump_patches")
_DEPEND_ON_MODE = ("Dropout", "BatchNorm", "MultiheadAttention", "RReLU")


def differences(module: torch.nn.Module, reference: torch.nn.Module) -> Iterator[str]:
    """What a forward pass of ``module`` with the tensors of ``reference`` does otherwise.

    Modules are compared that have the same name, by their types and plain attributes.
    """
    others = dict(reference.named_modules())
    for name, own in module.named_modules():
        other = others.get(name)
        if other is None:
            continue
        called = name or "the root module"
        if type(own) is not type(other):
            yield f"{called} is a {type(other).__name__}, not a {type(own).__name__}"
            continue
        for key, value in own.__dict__.items():
            if key.startswith("_") or key in _OF_THE_MODULE or not isinstance(value, _PLAIN):
                continue
            theirs = other.__dict__.get(key, value)
            if isinstance(theirs, _PLAIN) and value != theirs:
                yield f"{called}.{key} is {theirs!r}, not {value!r}"


def modes(module: torch.nn.Module, reference: torch.nn.Module) -> Iterator[str]:
    """The modules whose result depends on their mode, which differs."""
    others = dict(reference.named_modules())
    for name, own in module.named_modules():
        depends = any(kind in type(own).__name__ for kind in _DEPEND_ON_MODE)
        if depends and name in others and others[name].training != own.training:
            yield name
