"""The stages of a pipeline: parts of one model on several processes, under the names of the whole.

A rank knows its own stages. What the others hold is exchanged once, so that every rank knows all
names, in the order of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from tmm.core.keys import parts_of
from tmm.core.module_names import (
    Assembly,
    display_name,
    parameter_names,
    relative_names,
    unwrapped,
)
from tmm.core.records import ROOT_NAME
from tmm.spec.ranks import Exchange
from tmm.spec.stage_names import APART, StageNames, cut_in, have_other_names, plain, within

Modules = dict[torch.nn.Module, str | None]
"""Each module of a stage with its name in the whole model; None for one that is not part of it."""


class Stages(Assembly):
    """The stages that this process has of a pipeline of ``count``.

    A module that several stages have a part of, as a list of layers that is cut in pieces, returns
    what the whole model's returns in the last of these only. In the others its output, and that of
    each stage but the last, has no place in the whole model: such outputs are ``unnamed``, and no
    rule matches them.

    Attributes:
        all: what all stages hold, in order.
        are_apart: names are not those of one model, so that all begin with their stage.
    """

    def __init__(
        self,
        parts: Mapping[int, torch.nn.Module],
        count: int,
        whole: torch.nn.Module | None,
        exchange: Exchange,
    ) -> None:
        """All ranks call this together.

        Raises:
            ValueError: if ``whole`` does not hold what a stage does.
        """
        super().__init__()
        self.parts = dict(parts)
        self.count = count
        for index, part in self.parts.items():
            self.add_module(f"stage_{index}", part)
        # Not as a module of this one: what other ranks train would be found in it.
        self._whole = None if whole is None else (whole,)
        told: dict[int, StageNames] = {}
        for theirs in exchange([self._told(index) for index in self.parts]):
            for names in theirs:
                if isinstance(names, str):  # all ranks raise it
                    raise ValueError(names)
                told.setdefault(names.index, names)
        everything = [told[index] for index in sorted(told)]
        self.are_apart = whole is None and have_other_names(everything)
        if self.are_apart:
            everything = [names.apart() for names in everything]
        self.all = tuple(everything)
        self._is_cut = cut_in(self.all, count - 1) if whole is None else frozenset()
        self._stage_of = self._places()

    def _told(self, index: int) -> StageNames | str:
        """What a stage holds, or what is wrong with it."""
        part = self.parts[index]
        if self._whole is None:
            named = parameter_names(part)
        else:
            known = parameter_names(self._whole[0])
            if strange := [n for p, (n, _) in parameter_names(part).items() if p not in known]:
                return (
                    f"module=: stage {index} of the schedule holds {strange[0]}, which is no"
                    f" parameter of the {type(unwrapped(self._whole[0])).__name__}; give the model"
                    " that the stages are made of, or leave module= out where they have its names"
                )
            named = {parameter: known[parameter] for parameter in parameter_names(part)}
        modules = {m: name for m, name in self._modules_of(index).items() if name is not None}
        kinds = tuple(type(module).__name__ for module in modules)
        lines = [f"{name}: {kind}" for name, kind in zip(modules.values(), kinds, strict=True)]
        lines += [f"{name}: {tuple(p.shape)} {p.dtype}" for p, (name, _) in named.items()]
        elements = sum(parameter.numel() for parameter in named)
        return StageNames(
            *(index, tuple(modules.values()), kinds, tuple(named.values()), tuple(lines), elements)
        )

    def _modules_of(self, index: int) -> Modules:
        own = relative_names(self.parts[index])
        if self._whole is None:
            return dict(own)
        known = relative_names(self._whole[0])
        found: Modules = {module: known.get(module) for module in own}
        top = unwrapped(self.parts[index])
        if index == self.count - 1 and found[top] is None:
            found[top] = ""  # what the last stage returns is what the model does
        return found

    def _places(self) -> dict[str, int]:
        """The stage of each name."""
        places: dict[str, int] = {}
        for names in self.all:
            for name in names.modules:
                if (names.index, name) not in self._is_cut:
                    places.setdefault(display_name(name), names.index)
            for name, _ in names.parameters:
                places.setdefault(name, names.index)
        return places

    # As a model

    def output_names(self) -> dict[torch.nn.Module, str]:
        """What each module returns is named so; ``relative_names`` asks for it."""
        found: dict[torch.nn.Module, str] = {}
        for index, part in self.parts.items():
            relative = relative_names(part)
            for module, name in self._modules_of(index).items():
                if name is None or (index, name) in self._is_cut:
                    name = f"{relative[module] if name is None else name}[stage {index}]"
                elif self.are_apart:
                    name = within(index, name)
                found.setdefault(module, name)
        return found

    def owner_names(self) -> dict[torch.nn.Module, str]:
        """Names of parameters and buffers of each module begin so."""
        found: dict[torch.nn.Module, str] = {}
        for index in self.parts:
            for module, name in self._modules_of(index).items():
                if name is not None:
                    found.setdefault(module, within(index, name) if self.are_apart else name)
        return found | self._strays()

    def _strays(self) -> dict[torch.nn.Module, str]:
        """Stand-ins for modules of the whole model, with parameters that others hold in a stage."""
        found: dict[str, torch.nn.Module] = {}
        if self._whole is None:
            return {}
        known = parameter_names(self._whole[0])
        for index in self.parts:
            others = (module for module, name in self._modules_of(index).items() if not name)
            for parameter in (p for module in others for p in module.parameters(recurse=False)):
                name, owner = known[parameter]
                stand_in = found.setdefault(plain(owner), torch.nn.Module())
                stand_in.register_parameter(name.rpartition(".")[2], parameter)
        return {module: name for name, module in found.items()}

    def around(self, name: str) -> torch.nn.Module:
        """The part, or the whole model, in which a parameter of that name lies."""
        if self._whole is not None:
            return self._whole[0]
        if self.are_apart:
            around = torch.nn.Module()
            around.add_module(APART, torch.nn.ModuleList())
            return around
        parts = list(self.parts.values())
        holding = (p for p in parts if name in dict(parameter_names(p).values()))
        return next(holding, parts[0])

    def begins(self, module: torch.nn.Module) -> bool:
        """Whether it is the first stage."""
        return self._is_part(module, 0)

    def ends(self, module: torch.nn.Module) -> bool:
        """Whether it is the last stage."""
        return self._is_part(module, self.count - 1)

    def _is_part(self, module: torch.nn.Module, index: int) -> bool:
        part = self.parts.get(index)
        return part is not None and unwrapped(part) is unwrapped(module)

    # The whole

    @property
    def is_known(self) -> bool:
        """Whether all stages have told what they hold."""
        return len(self.all) == self.count

    def modules_of_all(self) -> list[str]:
        """The names of all modules of all stages that rules are matched on, in order."""
        names = (
            display_name(name)
            for stage in self.all
            for name in stage.modules
            if (stage.index, name) not in self._is_cut
        )
        return list(dict.fromkeys(names))

    def parameters_of_all(self) -> dict[str, str]:
        """The names of all parameters, with the module that each belongs to."""
        return dict(named for stage in self.all for named in stage.parameters)

    def unnamed(self) -> frozenset[str]:
        """The names, here, of modules that no rule matches."""
        known = {name for stage in self.all for name in stage.modules}
        return frozenset(name for name in self.output_names().values() if name not in known)

    def stage_of(self, site: str) -> int:
        """The stage that a site, with its family, lies in; 0 for one of none."""
        _, name = parts_of(site)
        name = ROOT_NAME if name.startswith(ROOT_NAME) else name.partition("[")[0]
        while name and name not in self._stage_of:
            name = name.rpartition(".")[0]
        return self._stage_of.get(name, 0)

    def described(self) -> tuple[str, int, int, Iterable[str]]:
        """The kind of the model, how many modules and elements it has, and lines that tell it."""
        kind = type(unwrapped(next(iter(self.parts.values())))).__name__
        lines = [line for stage in self.all for line in stage.lines]
        elements = sum(stage.elements for stage in self.all)
        return f"{kind} in {self.count} stages", len(self.modules_of_all()), elements, lines

    def remarks(self) -> Iterator[tuple[str, str]]:
        """What is to be known of rows."""
        own = ", ".join(map(str, self.parts))
        yield (
            "pipeline",
            f"this process measures stage {own} of {self.count}, and rank 0 records all of them",
        )
        if self.are_apart:
            yield (
                "names of stages",
                f"they begin with {APART!r} and the number of the stage, for two stages have"
                " something else under one name; module=model gives them those of a model that the"
                " stages are made of",
            )
