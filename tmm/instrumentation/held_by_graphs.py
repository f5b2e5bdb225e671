"""Which modules only graphs run, so that no call of them needs to be watched."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from tmm.instrumentation.regions import Region


class HeldByGraphs:
    """Knows the modules inside of regions each of which has run as one graph so far.

    Where Dynamo leaves such a region to Python after all, as when it was compiled too often, the
    module of the region itself is called: that is none of them, so its call can be watched.
    """

    def __init__(self) -> None:
        self._names: Mapping[torch.nn.Module, str] = {}
        self._key: tuple[int, Sequence[Region]] = (0, ())
        self._modules: frozenset[torch.nn.Module] = frozenset()
        self._callees: frozenset[torch.nn.Module] = frozenset()

    def modules(
        self,
        names: Mapping[torch.nn.Module, str],
        whole: Sequence[Region],
        eager_modules: Collection[torch.nn.Module],
    ) -> frozenset[torch.nn.Module]:
        """Those of ``names``: inside of regions that are ``whole``, which are modules.

        None of a region is, if any in it is of ``eager_modules``, which have run outside of graphs.
        """
        key = len(eager_modules), whole
        if names is self._names and key == self._key:
            return self._modules
        self._names, self._key = names, key
        inside = {region.module: set(region.module.modules()) for region in whole if region.module}
        held = {m: parts for m, parts in inside.items() if parts.isdisjoint(eager_modules)}
        self._callees = frozenset(held)
        self._modules = frozenset[torch.nn.Module]().union(*held.values()) - inside.keys()
        return self._modules

    def holds_parts_of(self, region_module: torch.nn.Module) -> bool:
        """Whether modules inside of this one, which is that of a region, are not watched."""
        return region_module in self._callees

    def forget(self) -> None:
        """Hold no module."""
        self.modules({}, (), ())
