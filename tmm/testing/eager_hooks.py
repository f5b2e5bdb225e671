"""What plain eager hooks see of the modules of a model.

Written from the documentation alone: of tmm nothing is used but how keys are written and wrappers
are called, so that an error of its naming or its walking of outputs cannot hide behind the same
error here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from tmm.core.keys import key_of
from tmm.core.module_names import WRAPPERS
from tmm.core.torch_private import tree_map
from tmm.testing.defined_values import (
    BUILTIN,
    ORDERED,
    Expected,
    FloatArray,
    as_numbers,
    expected_values,
)

MetricFunction = Callable[[torch.Tensor], object]
Aggregate = str | Callable[[torch.Tensor], object]
"""How values are joined: ``"mean"``, ``"sum"``, ``"min"``, ``"max"`` or by a function."""


class Recording:
    """The outputs of every module, by the name of their site, call after call.

    ``owners`` are the modules by site, ``integers`` the sites of tensors that have no rows.
    """

    def __init__(self) -> None:
        self.sites: dict[str, list[torch.Tensor]] = {}
        self.owners: dict[str, str] = {}
        self.integers: set[str] = set()

    def add(self, name: str, output: object) -> None:
        """Take what the module, or the tensor, of that name gave."""
        for path, tensor in walk(output):
            tensor = tensor.values() if tensor.is_nested else tensor
            if tensor.is_floating_point() or tensor.is_complex():
                self.owners[name + path] = name
                self.sites.setdefault(name + path, []).append(tensor.detach().clone())
            else:
                self.integers.add(name + path)

    def data(self, site: str) -> FloatArray:
        """All elements of a site, as real numbers."""
        return np.concatenate([as_numbers(tensor) for tensor in self.sites[site]])

    def expected(
        self,
        metrics: tuple[str, ...] = BUILTIN,
        *,
        aggregate: Aggregate = "mean",
        **functions: MetricFunction,
    ) -> dict[str, Expected]:
        """Key to value, of these built-in metrics and of functions, whose values are joined."""
        wanted: dict[str, Expected] = {}
        for site, tensors in self.sites.items():
            data = self.data(site)
            if data.size and metrics:
                known = [m for m in metrics if not (tensors[0].is_complex() and m in ORDERED)]
                for name, expected in expected_values(data).items():
                    if name in known:
                        wanted[key_of("activation", site, name)] = expected
            for name, function in functions.items():
                values = np.concatenate([as_numbers(function(t.clone())) for t in tensors])
                if values.size:
                    joined = float(_joined(values, aggregate))
                    size = np.abs(values).sum() if aggregate == "sum" else np.abs(values).mean()
                    wanted[key_of("activation", site, name)] = Expected(joined, float(size))
        return wanted


def _joined(values: FloatArray, aggregate: Aggregate) -> float:
    if callable(aggregate):
        return float(torch.as_tensor(aggregate(torch.from_numpy(values))))
    join: Callable[[FloatArray], float] = getattr(np, aggregate)
    return join(values)


def walk(output: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in tuples and lists by position, in dicts by key, in dataclasses by field."""
    if isinstance(output, torch.Tensor):
        yield path, output
    elif isinstance(output, dict):
        for key in output:
            yield from walk(output[key], f"{path}[{key}]")
    elif isinstance(output, (list, tuple)):
        for position in range(len(output)):
            yield from walk(output[position], f"{path}[{position}]")
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from walk(getattr(output, field.name), f"{path}[{field.name}]")


def site_names(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules by the name that users know, without those that merely wrap another one."""
    named = {}
    for name, child in module.named_modules():
        if not any(wrapper in child._modules for wrapper in WRAPPERS):
            parts = [part for part in name.split(".") if part and part not in WRAPPERS]
            named[".".join(parts) or "[root module]"] = child
    return named


@contextmanager
def eager_hooks(module: torch.nn.Module, recording: Recording) -> Iterator[None]:
    """Record what each module of an uncompiled model returns while the block runs.

    Leave the block before a backward pass: recomputed activations are no new ones.
    """

    def watch(name: str, child: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        return child.register_forward_hook(lambda _, __, output: recording.add(name, output))

    handles = [watch(name, child) for name, child in site_names(module).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gradient_hooks(
    module: torch.nn.Module, recording: Recording, eager: Collection[str]
) -> Iterator[None]:
    """Record the gradient of each tensor that each module gives back, as full backward hooks do.

    They pass outputs through an identity and see the gradient that comes back through it, not
    that of what the module itself went on to do with the tensor. Theirs is a view, with which
    models that work in place fail; here it is a copy. Of the ``eager`` modules, which ran outside
    of graphs, it is the gradient of the tensor itself, as documented. What a module gives back as
    it was given is left to ``recording.integers``: whose gradient that is, is a matter of taste.
    """

    def watch(name: str, inputs: object, output: object) -> object:
        sites = dict(walk(output))
        given = {id(tensor) for _, tensor in walk(inputs)}

        copies: dict[int, torch.Tensor] = {}
        for path, tensor in sites.items():
            if id(tensor) in given:
                recording.integers.add(name + path)
            elif not torch.is_grad_enabled():
                recording.integers.add(name + path)  # nothing hands on a gradient there
            elif tensor.requires_grad and name in eager:
                tensor.register_hook(lambda g, site=name + path: recording.add(site, g))
            elif tensor.requires_grad:
                copy_of = copies.setdefault(id(tensor), tensor.clone())
                copy_of.register_hook(lambda g, site=name + path: recording.add(site, g))
        return tree_map(lambda value: copies.get(id(value), value), output)

    handles = [
        child.register_forward_hook(lambda _, x, output, name=name: watch(name, x, output))
        for name, child in site_names(module).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
