"""Names of modules as users know them: wrapper components removed."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence

import torch

from tmm.core.records import ROOT_NAME

WRAPPERS = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which wrappers hold the module that they wrap; left out of the names in keys."""

_PARALLEL = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


class Assembly(torch.nn.Module):
    """Modules that belong to one model, each under the name that it has there."""

    def output_names(self) -> dict[torch.nn.Module, str]:
        """The name of each module for what it returns, as ``relative_names`` gives it."""
        raise NotImplementedError

    def owner_names(self) -> dict[torch.nn.Module, str]:
        """The name of each module that names of its parameters and buffers begin with."""
        raise NotImplementedError

    def around(self, name: str) -> torch.nn.Module:
        """A module in which a parameter of that name lies as in the model."""
        raise NotImplementedError

    def begins(self, module: torch.nn.Module) -> bool:
        """Whether the inputs of the model go into ``module``."""
        raise NotImplementedError

    def ends(self, module: torch.nn.Module) -> bool:
        """Whether what ``module`` returns is the output of the model."""
        raise NotImplementedError


def wrapped_module(module: torch.nn.Module) -> torch.nn.Module | None:
    """The module that ``module`` merely wraps (for compilation, sharding, ...), if it does."""
    if isinstance(module, _PARALLEL):
        inner: torch.nn.Module = module.module
        return inner
    for name in WRAPPERS:
        if name in module._modules:  # which of a script module has no get
            inner_or_none = module._modules[name]
            if inner_or_none is not None:
                return inner_or_none
    return None


def is_container(module: torch.nn.Module) -> bool:
    """Whether a module has no forward of its own, such as ``torch.nn.ModuleList``."""
    own = inspect.getattr_static(type(module), "forward", None)  # script modules make theirs up
    return own is torch.nn.Module.forward and "forward" not in vars(module)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The innermost module that ``module`` merely wraps; itself if it wraps none."""
    while (inner := wrapped_module(module)) is not None:
        module = inner
    return module


def relative_names(module: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """Dotted names of ``module`` (empty) and its descendants, in the order of ``named_modules``.

    A wrapper and the module that it wraps have one name; it is given to the wrapped one. Where two
    modules would have one name without the wrappers' components, these stay. A module that occurs
    several times has the first of its names. Modules with a hash of their own, which
    may change, are left out, with what is inside: such are the metrics of torchmetrics.
    """
    if isinstance(module, Assembly):
        return module.output_names()
    names: dict[torch.nn.Module, str] = {}
    seen: set[torch.nn.Module] = set()

    def visit(current: torch.nn.Module, name: str) -> None:
        if current is not module and type(current).__hash__ is not torch.nn.Module.__hash__:
            return
        if current in seen:
            return
        seen.add(current)
        inner = wrapped_module(current)
        if inner is None:
            names[current] = name
        # Not `named_children` and `named_parameters`, whose sets and generators take twice as long.
        for child_name, child in current._modules.items():
            if child is None:
                continue
            if child is inner:
                visit(child, name)
            else:
                visit(child, f"{name}.{child_name}" if name else child_name)

    visit(module, "")
    counts = Counter(names.values())
    if len(counts) < len(names) or ROOT_NAME in counts:
        names = _names_told_apart(module, {name for name, count in counts.items() if count > 1})
    return names


def _names_told_apart(
    module: torch.nn.Module, ambiguous: Container[str]
) -> dict[torch.nn.Module, str]:
    """``relative_names`` where some are ``ambiguous``, or that of the root.

    What has an ambiguous name gets that of ``named_modules`` instead, and a number where even that
    is taken.
    """
    names: dict[torch.nn.Module, str] = {}
    taken = {ROOT_NAME}
    seen: set[torch.nn.Module] = set()

    def visit(current: torch.nn.Module, name: str, whole: str, shown: str) -> None:
        if current is not module and type(current).__hash__ is not torch.nn.Module.__hash__:
            return
        if current in seen:
            return
        seen.add(current)
        inner = wrapped_module(current)
        if name in ambiguous and name:
            shown = whole
        if inner is None:
            plain, number = shown, 2
            while shown in taken:
                shown, number = f"{plain} ({number})", number + 1
            taken.add(shown)
            names[current] = shown
        both = name, shown
        for child_name, child in current._modules.items():
            if child is None:
                continue
            of_child = f"{whole}.{child_name}" if whole else child_name
            if child is inner:
                visit(child, name, of_child, shown)
            else:
                plain, told = (f"{start}.{child_name}" if start else child_name for start in both)
                visit(child, plain, of_child, told)

    visit(module, "", "", "")
    return names


def display_name(name: str) -> str:
    """A module's name in keys and for patterns: the root, whose name is empty, has one too."""
    return name or ROOT_NAME


def owner_names(module: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """What the names of each module's own parameters and buffers begin with, without the dot."""
    return module.owner_names() if isinstance(module, Assembly) else relative_names(module)


def parameter_names(module: torch.nn.Module) -> dict[torch.nn.Parameter, tuple[str, str]]:
    """Each parameter with its dotted name and the display name of the module that it belongs to.

    A parameter that several modules share has the first of its names.
    """
    names: dict[torch.nn.Parameter, tuple[str, str]] = {}
    for owner, prefix in owner_names(module).items():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                dotted = f"{prefix}.{name}" if prefix else name
                names.setdefault(parameter, (dotted, display_name(prefix)))
    return names


def modules_of(root: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """A module and all that is in it, each once: ``root.modules()``, in a tenth of the time."""
    found = {root: None}
    waiting = [root]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return found


class ModuleTree:
    """A module and all that is in it, which may be others at each time one asks."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._modules: tuple[torch.nn.Module, ...] = ()
        self._children: list[object] = []
        self._held: list[tuple[torch.nn.Module | None, ...]] = []  # so that no other has their id

    def has_changed(self) -> bool:
        """Whether any module has other children than when this was last asked, or nobody asked."""
        if self._modules and self._children_now() == self._children:
            return False
        self._modules = tuple(self._module.modules())
        self._children = self._children_now()
        self._held = [tuple(module._modules.values()) for module in self._modules]
        return True

    def _children_now(self) -> list[object]:
        return _contents_of([module._modules for module in self._modules])


def _contents_of(held: Iterable[Mapping[str, object]]) -> list[object]:
    """How many each holds, their names, and which they are: some classes define equality."""
    contents: list[object] = []
    for named in held:
        contents.append(len(named))
        if named:
            # Those of script modules can be asked for keys, and not be iterated.
            contents.extend(named.keys())
            contents.extend(map(id, named.values()))
    return contents


class ParameterNames:
    """The names of a module's parameters, which may be others at each call.

    Its modules are walked again only where one has other children than at the last walk, and names
    are put together again only where one has other parameters.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._tree = ModuleTree(module)
        self._owners: list[tuple[torch.nn.Module, str]] = []
        self._held: list[object] = []
        self._names: dict[torch.nn.Parameter, str] = {}  # which keeps their ids

    def __call__(self) -> Mapping[torch.nn.Parameter, str]:
        """Each parameter with its dotted name; a shared one has the first of its names."""
        owners = self.owners()
        held = _contents_of([owner._parameters for owner, _ in owners])
        if held != self._held:
            names: dict[torch.nn.Parameter, str] = {}
            for owner, prefix in owners:
                for name, parameter in owner._parameters.items():
                    if parameter is not None:
                        names.setdefault(parameter, prefix + name)
            self._held, self._names = held, names
        return self._names

    def owners(self) -> Sequence[tuple[torch.nn.Module, str]]:
        """Each module with what the names of its tensors begin with."""
        if self._tree.has_changed():
            self._held = []
            self._owners = [
                (owner, f"{name}." if name else "")
                for owner, name in owner_names(self._module).items()
            ]
        return self._owners


def buffer_names(module: torch.nn.Module) -> dict[torch.Tensor, str]:
    """Each buffer with its dotted name; a shared one has the first of its names."""
    names: dict[torch.Tensor, str] = {}
    for owner, prefix in owner_names(module).items():
        for name, buffer in owner.named_buffers(recurse=False):
            names.setdefault(buffer, f"{prefix}.{name}" if prefix else name)
    return names


def without_wrappers(name: str) -> str:
    """A dotted name without the components of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped_names(names: Iterable[str]) -> dict[str, str]:
    """Names in a state dict, and what they are without the components of wrappers.

    Names that are equal without them keep them.
    """
    whole = {name: name.removeprefix("module.") for name in names}
    without = {name: without_wrappers(stripped) for name, stripped in whole.items()}
    counts = Counter(without.values())
    return {name: plain if counts[plain] == 1 else whole[name] for name, plain in without.items()}
