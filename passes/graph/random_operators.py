"""Operators of which torch itself says that they draw random numbers."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tmm.core.torch_private import OpOverload, OpOverloadPacket


def known_to_draw(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """The arguments of a call by name, once for each form of an operator that draws and fits."""
    forms = [form for form in _forms(target) if torch.Tag.nondeterministic_seeded in form.tags]
    bound = (_bind(form, args, kwargs) for form in forms)
    return [arguments for arguments in bound if arguments is not None]


def _forms(target: Any) -> list[OpOverload]:
    if isinstance(target, OpOverload):
        return [target]
    if isinstance(target, types.BuiltinFunctionType):
        target = getattr(torch.ops.aten, target.__name__, None)
    if not isinstance(target, OpOverloadPacket):
        return []
    return [getattr(target, name) for name in target.overloads()]


def _bind(
    form: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    expected = form._schema.arguments
    names = [argument.name for argument in expected]
    if len(args) > len(names) or not kwargs.keys() <= {*names}:
        return None
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    for argument in expected:
        # Recurrent layers have two forms with equally many arguments, in another order.
        is_flag = isinstance(argument.type, torch.BoolType)
        if argument.name not in given:
            if not argument.has_default_value():
                return None
            given[argument.name] = argument.default_value
        elif is_flag and not isinstance(given[argument.name], bool):
            return None
    return given
