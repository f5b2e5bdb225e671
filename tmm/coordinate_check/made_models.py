"""The models that a coordinate check trains: each a new one, of other sizes at each width."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

MakeModel: TypeAlias = Callable[[int], tuple[nn.Module, Optimizer]]

_Sizes: TypeAlias = dict[str, tuple[int, ...]]


class MadeModels:
    """Makes models, and tells those that would give exponents which look right and are not.

    Whoever returns one model twice, as from a cache, trains it further; and where the width changes
    nothing every exponent is 0, as if hyperparameters carried over.
    """

    def __init__(self, make_model: MakeModel) -> None:
        self._make_model = make_model
        self._trained: dict[int, weakref.ref[torch.Tensor]] = {}
        self._sizes: dict[int, _Sizes] = {}

    def make(self, width: int) -> tuple[nn.Module, Optimizer]:
        """A model and its optimizer.

        Raises:
            TypeError: if ``make_model`` returns something else.
            ValueError: if they do not belong together, or parameters were trained already.
        """
        made: object = self._make_model(width)
        if isinstance(made, tuple) and len(made) == 2:
            module, optimizer = made
            if isinstance(module, nn.Module) and isinstance(optimizer, Optimizer):
                self._check_parameters(module, optimizer, width)
                return module, optimizer
        raise TypeError(
            f"make_model({width}) must return the module and its optimizer, such as"
            f" (model, torch.optim.Adam(model.parameters())); it returned {type(made).__name__}"
        )

    def check_sizes(self, module: nn.Module, width: int) -> None:
        """Raise ValueError if the module has the sizes that one of another width has."""
        sizes = {
            name: tuple(parameter.shape)
            for name, parameter in module.named_parameters()
            if not is_lazy(parameter)
        }
        self._sizes[width] = sizes
        for other, known in self._sizes.items():
            if other != width and known == sizes:
                raise ValueError(
                    f"make_model= gives models of the same sizes at width {other} and at width"
                    f" {width}, so that nothing could depend on the width; make the layers as wide"
                    " as it says"
                )

    def _check_parameters(self, module: nn.Module, optimizer: Optimizer, width: int) -> None:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        own = set(module.parameters())
        if own.isdisjoint(held):
            raise ValueError(
                f"make_model({width}): the optimizer holds no parameter of the module that it"
                " was returned with; make it of that module's parameters()"
            )
        for parameter in held:
            if not parameter.requires_grad:
                continue  # of a frozen layer, which may be in all models
            known = self._trained.get(id(parameter))
            if known is not None and known() is parameter:
                raise ValueError(
                    f"make_model({width}) returned parameters that it had returned before, which"
                    " have been trained since; make a new module at each call"
                )
            self._trained[id(parameter)] = weakref.ref(parameter)
