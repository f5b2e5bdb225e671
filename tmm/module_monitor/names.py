"""The names that users of a ``ModuleMonitor`` see, and those of tmm."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tmm.core.module_names import display_name, parameter_names, relative_names, without_wrappers
from tmm.core.records import ROOT_NAME

FormatName = Callable[[str], str]


def default_format_module_name_fn(name: str) -> str:
    """A name of ``named_modules()`` or ``named_parameters()`` without the components of wrappers.

    Those are what ``torch.compile``, FSDP and others add. The root is ``"[root module]"``.
    """
    return without_wrappers(name) or ROOT_NAME


class Names:
    """The names of one model's modules and parameters.

    ``modules`` gives the formatted name of each module. tmm's own names are without the components
    of wrappers.
    """

    def __init__(self, module: torch.nn.Module, format_name: FormatName) -> None:
        self.modules = {m: format_name(name) for name, m in module.named_modules()}
        self._raw: dict[str, str] = {}
        self._formatted: dict[str, str] = {}
        for m, name in relative_names(module).items():
            self._formatted[display_name(name)] = self.modules[m]
        raw = {parameter: name for name, parameter in module.named_parameters()}
        for parameter, (name, _) in parameter_names(module).items():
            self._raw[name] = raw[parameter]
            self._formatted[name] = format_name(raw[parameter])

    def formatted(self, name: str) -> str:
        """The formatted name of a module or parameter that tmm calls ``name``; else the same."""
        return self._formatted.get(name, name)

    def raw(self, name: str) -> str:
        """The name in ``named_parameters()`` of a parameter that tmm calls ``name``."""
        return self._raw.get(name, name)
