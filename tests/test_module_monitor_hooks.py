"""The hooks of ``tmm.module_monitor``, beside those of torch-module-monitor."""

import gc

import pytest
import torch
from torch import nn
from torch_module_monitor.hooks import HooksManager as Original

from tmm.module_monitor.hooks import HooksManager

both = pytest.mark.parametrize("manager", [HooksManager, Original])


@both
def test_hooks_are_replaced_and_removed(manager):
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    calls = []
    hooks = manager()
    for name in ("old", "new"):
        hooks.register_forward_hook(first, lambda *_, name=name: calls.append(name))
    hooks.register_forward_hook(second, lambda *_: calls.append("second"))
    assert len(hooks) == 2
    assert list(hooks.hooks) == [first, second]
    nn.Sequential(first, second)(torch.ones(1))
    assert calls == ["new", "second"]
    hooks.remove_hook(first)
    hooks.remove_hook(first)
    nn.Sequential(first, second)(torch.ones(1))
    assert calls == ["new", "second", "second"]
    hooks.remove_all_hooks()
    assert len(hooks) == 0
    assert not second._forward_hooks


@both
def test_no_hook_outlives_its_block_or_its_manager(manager):
    module = nn.Linear(1, 1)
    foreign = module.register_forward_hook(lambda *_: None)
    with pytest.raises(KeyError), manager() as hooks:
        hooks.register_forward_hook(module, lambda *_: None)
        raise KeyError
    assert list(module._forward_hooks) == [foreign.id]
    hooks = manager()
    hooks.register_forward_hook(module, lambda *_, owner=hooks: None)  # a cycle, as in a monitor
    assert len(module._forward_hooks) == 2
    del hooks
    gc.collect()
    assert len(module._forward_hooks) == 2  # the hook holds its manager
    hooks = manager()
    hooks.register_forward_hook(module, lambda *_: None)
    del hooks
    assert len(module._forward_hooks) == 2
