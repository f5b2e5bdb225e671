"""Names of modules as users know them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tmm.core.module_names import ParameterNames, display_name, relative_names, unwrapped_names


class Wrapper(nn.Module):
    """Holds a module under the name that a wrapper gives it."""

    def __init__(self, attribute: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(attribute, module)


class AlwaysEqual(nn.Module):
    """Like the metrics of torchmetrics, whose comparisons are metrics, too."""

    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        return True


def names(module: nn.Module) -> list[str]:
    return [display_name(name) for name in relative_names(module).values()]


def test_names_are_those_of_named_modules() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU()))
    assert list(relative_names(module).values()) == [name for name, _ in module.named_modules()]
    assert names(module) == ["[root module]", "0", "1", "1.0"]


def test_wrapper_components_are_removed_and_wrappers_have_no_name() -> None:
    for attribute in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        inner = nn.Linear(1, 1)
        module = nn.Sequential(Wrapper(attribute, nn.Sequential(inner)))
        assert names(module) == ["[root module]", "0", "0.0"]
        assert list(relative_names(module))[-1] is inner
    assert names(nn.DataParallel(nn.Sequential(nn.ReLU()))) == ["[root module]", "0"]
    assert names(nn.Sequential(torch.compile(nn.Sequential(nn.ReLU())))) == [
        "[root module]",
        "0",
        "0.0",
    ]


def test_whole_components_only() -> None:
    module = Wrapper("my_module", Wrapper("module", nn.Linear(1, 1)))
    assert names(module) == ["[root module]", "my_module", "my_module.module"]


class WithMore(Wrapper):
    """A wrapper that has a module of its own besides."""

    def __init__(self, attribute: str, module: nn.Module, name: str, own: nn.Module) -> None:
        super().__init__(attribute, module)
        self.add_module(name, own)


def test_components_of_wrappers_stay_where_names_would_be_equal() -> None:
    for attribute in ("_orig_mod", "_checkpoint_wrapped_module"):
        inner = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh())
        module = nn.Sequential(WithMore(attribute, inner, "0", nn.Linear(1, 1)))
        whole = f"0.{attribute}.0"
        assert names(module) == ["[root module]", "0", whole, f"{whole}.0", "0.1", "0.0"]
        assert [name for name, _ in ParameterNames(module)().items()] == list(module.parameters())
        state = unwrapped_names(["module.0.0.weight", f"module.{whole}.weight", "0.1.bias"])
        assert list(state.values()) == ["0.0.weight", f"{whole}.weight", "0.1.bias"]
    parallel = nn.DataParallel(nn.Sequential(nn.ReLU()))
    parallel.add_module("0", nn.Tanh())
    assert names(parallel) == ["[root module]", "module.0", "0"]


def test_a_module_that_is_called_like_the_root_is_numbered() -> None:
    module = nn.Module()
    module.add_module("[root module]", nn.Sequential(nn.ReLU()))
    assert names(module) == ["[root module]", "[root module] (2)", "[root module] (2).0"]


def test_a_shared_module_has_its_first_name() -> None:
    shared = nn.ReLU()
    assert names(nn.Sequential(shared, nn.Sequential(shared))) == ["[root module]", "0", "1"]


def test_parameter_names_follow_the_module() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
    names_of = ParameterNames(module)

    def check() -> None:
        named = names_of()
        assert dict(module.named_parameters()) == {name: p for p, name in named.items()}

    check()
    module[0].weight = nn.Parameter(torch.ones(2, 2))  # another parameter
    check()
    module[1].append(nn.Linear(2, 2, bias=False))  # another module, far inside
    check()
    module[1][0] = module[0]  # a shared one
    check()
    module[1][1].register_parameter("scale", nn.Parameter(torch.ones(1)))
    check()
    module[0].bias = None
    check()
    module.add_module("odd", AlwaysEqual())
    check()
    module.odd = nn.Linear(1, 1)  # which is equal to the one before, it says
    check()
    shared = module[0]
    del module[0]
    module.add_module("0", shared)  # comes after the other place where it is now
    check()
    inner = module[1]
    del module[1]
    module.add_module("renamed", inner)  # the same module by another name
    check()


@pytest.mark.filterwarnings("ignore")
def test_parameters_are_named_anew_where_children_change() -> None:
    net = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2))
    names = ParameterNames(net)
    expected = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(names().values()) == expected
    net[1] = nn.Linear(2, 3)
    assert names()[net[1].weight] == "1.weight"
    net.add_module("last", nn.Linear(3, 2, bias=False))
    assert list(names().values()) == [*expected, "last.weight"]
    net[1].register_module("inner", net[0])
    delattr(net, "0")
    assert list(names().values()) == [
        "1.weight",
        "1.bias",
        "1.inner.weight",
        "1.inner.bias",
        "last.weight",
    ]
    assert names().keys() == set(net.parameters())
