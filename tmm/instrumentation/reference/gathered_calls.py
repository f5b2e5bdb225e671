"""Second calls of modules whose hooks gather their parameters, as those of ``fully_shard`` do."""

from __future__ import annotations

from typing import Any

import torch

from tmm.spec.ranks import fsdp_groups


class WithoutHooks(torch.nn.Module):
    """Runs the forward of a module, and none of its hooks."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What the module's own forward gives."""
        return self.inner.forward(*arguments, **keywords)


def is_gathered(module: torch.nn.Module) -> bool:
    """Whether hooks of the module itself gather its parameters."""
    return hasattr(module, "_get_fsdp_state")


def why_not_repeated(module: torch.nn.Module) -> str:
    """Why a module cannot be run once more with other parameters; empty if it can."""
    if any(is_gathered(child) for child in module.modules() if child is not module):
        return "modules in it gather parameters by hooks, which a second call would run again"
    for group in fsdp_groups(module) if is_gathered(module) else ():
        policies = {parameter.mp_policy for parameter in group.fsdp_params}
        if any(policy.param_dtype or policy.output_dtype for policy in policies):
            return "its hooks convert what it is given and gives, and a second call runs none"
    return ""
