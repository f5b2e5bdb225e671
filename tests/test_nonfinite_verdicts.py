"""What ``tmm.find_nonfinite`` says beside its findings: what was checked, and the own program."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tmm

Step = Callable[[torch.Tensor], object]


def plain(module: nn.Module) -> nn.Module:
    return module


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="aot_eager")


def one_number(model: nn.Module) -> Step:
    return lambda x: model(x).sum()


def attribute(model: nn.Module) -> Step:
    return lambda x: {"loss": model(x).square().mean(), "logits": None}


def one_element(model: nn.Module) -> Step:
    return lambda x: model(x).sum().reshape(1, 1)


@pytest.mark.parametrize("wrap", [plain, compiled])
@pytest.mark.parametrize("step_of", [one_number, attribute, one_element])
def test_a_finite_step_that_gives_its_loss_is_not_warned_of(
    step_of: Callable[[nn.Module], Step], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model = wrap(nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", tmm.MonitoringWarning)
        assert tmm.find_nonfinite(step_of(model), (torch.ones(3, 4),)) is None
        assert tmm.find_nonfinite(model, torch.ones(3, 4), torch.sum) is None
        assert tmm.find_nonfinite(model, torch.ones(3, 4)) is None  # asks for no loss


def detached(model: nn.Module) -> Step:
    return lambda x: model(x).sum().detach()


def frozen(model: nn.Module) -> Step:
    model.requires_grad_(False)
    return one_number(model)


def without_gradients(model: nn.Module) -> Step:
    return torch.no_grad()(one_number(model))


@pytest.mark.parametrize("step_of", [detached, frozen, without_gradients])
def test_a_loss_without_a_gradient_is_told(step_of: Callable[[nn.Module], Step]) -> None:
    step = step_of(nn.Linear(4, 2))
    with pytest.warns(tmm.MonitoringWarning, match="does not require a gradient"):
        assert tmm.find_nonfinite(step, (torch.ones(3, 4),)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", tmm.MonitoringWarning)
        assert tmm.find_nonfinite(step, (torch.ones(3, 4),), backward=False) is None


def test_a_detached_loss_of_a_module_is_told() -> None:
    with pytest.warns(tmm.MonitoringWarning, match="does not require a gradient"):
        tmm.find_nonfinite(nn.Linear(4, 2), torch.ones(3, 4), lambda y: y.sum().detach())


class Keeps(nn.Module):
    """Writes into a buffer what its output does not depend on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 2), how
        self.register_buffer("kept", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        assert isinstance(self.kept, torch.Tensor)
        if self.how == "copied":
            self.kept.copy_((self.kept - 2).log())
        elif self.how == "divided":
            self.kept.div_(y.detach().mean(0) * 0)
        else:
            self.kept.lerp_(y.detach().mean(0) / 0, 0.1)
        return y.sum()


@pytest.mark.parametrize("how", ["copied", "divided", "averaged"])
def test_the_own_program_is_looked_at_for_what_it_writes(how: str) -> None:
    module = Keeps(how)
    model = compiled(module)
    model(torch.ones(3, 4))
    module.kept.fill_(1)
    result = tmm.find_nonfinite(model, torch.ones(3, 4))
    assert result is not None
    assert "buffer kept" in result.first.reaches
    assert result.own_program is True
    assert module.kept.eq(1).all()


def test_what_reaches_nothing_is_no_matter_of_rounding() -> None:
    module = Keeps("copied")
    model = compiled(module)
    model(torch.ones(3, 4))  # the buffer is NaN from now on
    result = tmm.find_nonfinite(model, torch.ones(3, 4))
    assert result is not None
    assert not any(origin.reaches for origin in result.origins)
    assert result.own_program is False
    assert "the compiled program itself: finite, as all that it gives" in str(result)
    assert "rounds" not in str(result)


@pytest.mark.parametrize("wrap", [plain, compiled])
@pytest.mark.parametrize("cleared", [True, False, None])
def test_a_step_that_goes_backward_itself_is_refused(
    wrap: Callable[[nn.Module], nn.Module], cleared: bool | None
) -> None:
    module = nn.Linear(4, 2)
    model, optimizer = wrap(module), torch.optim.SGD(module.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        if cleared is not None:
            optimizer.zero_grad(set_to_none=cleared)
        return loss

    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match=r"the step function called backward\(\)"):
        tmm.find_nonfinite(step, (torch.ones(3, 4),))
    assert torch.equal(module.weight, before)
    assert module.weight.grad is None
