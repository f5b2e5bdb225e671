"""Random numbers that nobody uses: a monitored step draws exactly those that a plain one draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tmm
from tests.graphs import applied, check_golden, measure, text, trace
from tmm.passes.graph.dead_draws import marks_of_dead_draws
from tmm.passes.remove_dead_marks import remove_dead_marks

Draw = Callable[[torch.Tensor], torch.Tensor]
X = torch.linspace(-1, 1, 12).reshape(3, 4)
DRAWS: dict[str, Draw] = {
    "dropout": lambda y: functional.dropout(y, 0.3),
    "dropout2d": lambda y: functional.dropout2d(y[None, :, :, None], 0.3),
    "rrelu": lambda y: functional.rrelu(y, training=True),
    "gumbel_softmax": functional.gumbel_softmax,
    "rand_like": torch.rand_like,
    "normal_": lambda y: torch.empty(3, 4).normal_(),
    "multinomial": lambda y: torch.multinomial(y.softmax(-1), 1).float(),
    "attention": lambda y: functional.scaled_dot_product_attention(
        y[None], y[None], y[None], dropout_p=0.3
    ),
}


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


class Drawing(nn.Module):
    """Draws random numbers, uses them in its way or not at all, and draws others."""

    def __init__(self, draw: Draw, use: Callable[[Drawing, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.draw, self.after = nn.Linear(4, 4), Calls(draw), Calls(lambda u: u * 2)
        self.norm, self.last, self.use = nn.BatchNorm1d(4), nn.Dropout(0.3), use
        self.both = Calls(lambda y: (y + 1, self.draw(y)))
        self.halve = Calls(lambda y: self.after(y) + y.mul_(0.5))
        self.fill = Calls(lambda y: y.fill_(3) * 2)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(self.use(self, y))


def unused(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    m.after(m.draw(y))
    return y


def recorded(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    tmm.record("drawn", m.draw(y))
    return y


def in_a_checkpoint(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    kept, dropped = checkpoint(m.both, y, use_reentrant=False)
    m.after(dropped)
    return kept


def shape_only(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    return y + torch.zeros_like(m.after(m.draw(y))).sum()


def added_to_what_is_unused(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    other = torch.zeros(4)
    other[:2].add_(m.draw(y).sum())
    m.after(other)
    return y


def overwritten(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    z = m.draw(y).detach() * 1
    m.after(z)
    z.zero_()
    return y + z.sum()


def without_gradient(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        m.after(m.draw(y))
    return y


def before_a_break(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    m.after(m.draw(y))
    torch._dynamo.graph_break()
    return y


def in_place_in_a_checkpoint(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    """The checkpoint writes to what was drawn, which nothing reads afterwards."""
    z = m.draw(y.detach()) * 1
    checkpoint(m.halve, z, use_reentrant=False)
    return y


def in_two_checkpoints(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    """The inner one writes to what the outer one was given."""
    z = m.draw(y.detach()) * 1
    checkpoint(lambda w: checkpoint(m.halve, w, use_reentrant=False) * 2, z, use_reentrant=False)
    return y


def filled_before_a_checkpoint(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    z = torch.empty(3, 4).normal_() + m.draw(y.detach()).sum()
    checkpoint(m.fill, z, use_reentrant=False)
    m.after(z)
    return y


DEAD = (
    *(unused, recorded, in_a_checkpoint, shape_only, added_to_what_is_unused, overwritten),
    *(without_gradient, before_a_break, in_place_in_a_checkpoint, in_two_checkpoints),
    filled_before_a_checkpoint,
)


def read_after_a_checkpoint(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    """The checkpoint writes to what was drawn, and it is read afterwards."""
    z = m.draw(y.detach()) * 1
    checkpoint(m.halve, z, use_reentrant=False)
    return y + z.sum()


def used(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    return y + m.after(m.draw(y)).sum()


def in_running_statistics(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    m.norm(m.after(m.draw(y)).reshape(-1)[:3, None].expand(3, 4))
    return y


def in_a_buffer(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    m.seen.add_(m.after(m.draw(y)).sum().detach())
    return y


def in_a_view_of_what_is_used(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    other = torch.zeros(4)
    part = other[:2]
    part.add_(m.after(m.draw(y)).sum())
    return y + other


def after_a_break(m: Drawing, y: torch.Tensor) -> torch.Tensor:
    u = m.draw(y)
    torch._dynamo.graph_break()
    m.after(u)
    return y


LIVE = (
    *(used, in_running_statistics, in_a_buffer, in_a_view_of_what_is_used, after_a_break),
    read_after_a_checkpoint,
)


def left_by(module: Drawing, backend: str, *rules: tmm.Rule) -> tuple[list[Any], Any]:
    torch._dynamo.reset()
    model = torch.compile(module, backend=backend)
    if rules:
        tmm.instrument(model, tmm.Spec(*rules))
    torch.manual_seed(1)
    with tmm.monitor(model).step(0) if rules else contextlib.nullcontext():
        output = model(X)
        output.sum().backward()
    left = [output.detach(), torch.get_rng_state(), *module.buffers()]
    return left + [p.grad for p in module.parameters()], model


def check(draw: str, use: Any, backend: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A step is bitwise the plain one; gives its values, and what it has none of."""
    left = []
    for rules in ((), (tmm.activation("rms"), tmm.activation_gradient("rms"))):
        torch.manual_seed(0)
        found, model = left_by(Drawing(DRAWS[draw], use), backend, *rules)
        left.append(found)
    for plain, monitored in zip(*left, strict=True):
        assert plain is monitored is None or torch.equal(plain, monitored)
    return tmm.monitor(model).get_step_metrics(), tmm.explain(model).unmeasured


@pytest.mark.parametrize(
    ("draw", "use"),
    [*[("dropout", use) for use in DEAD], *[(draw, unused) for draw in DRAWS if draw != "dropout"]],
)
def test_a_draw_that_nobody_uses_stays_unused(draw: str, use: Any) -> None:
    metrics, unmeasured = check(draw, use, "aot_eager")
    for site in ("draw",) if use is recorded else ("draw", "after"):
        if use in (added_to_what_is_unused,) and site == "draw":
            continue
        assert f"activation/{site}/rms" not in metrics
        assert "random numbers" in unmeasured[site]
    assert {"activation/first/rms", "activation/last/rms"} <= metrics.keys()
    assert "drawn" not in metrics


@pytest.mark.parametrize("use", LIVE)
def test_what_depends_on_a_draw_that_is_used_is_measured(use: Any) -> None:
    metrics, unmeasured = check("dropout", use, "aot_eager")
    assert {"activation/draw/rms", "activation/after/rms"} <= metrics.keys()
    assert not [reason for reason in unmeasured.values() if "random numbers" in reason]


@pytest.mark.parametrize("use", [unused, recorded])
def test_what_runs_as_it_stands_draws_and_measures_all(use: Any) -> None:
    metrics, unmeasured = check("dropout", use, "eager")
    assert "activation/draw/rms" in metrics
    assert not unmeasured


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
@pytest.mark.parametrize("use", [*DEAD, *LIVE])
def test_other_compilers_draw_the_same(use: Any, backend: str) -> None:
    check("dropout", use, backend)


def test_the_pass_erases_the_marks_of_what_depends_on_an_unused_draw() -> None:
    module = Drawing(DRAWS["dropout"], unused)
    graph = trace(module, X)
    before = text(graph)
    request = replace(measure(module, "rms"), keeps_unused=False)
    refused = applied(remove_dead_marks, graph, request).unmeasured
    check_golden("remove_dead_marks", before + "\n# becomes\n\n" + text(graph))
    assert [site.module for site, _ in refused] == ["draw", "after"]
    assert marks_of_dead_draws(graph) == ()


def test_a_graph_without_unused_draws_is_left_alone() -> None:
    module = Drawing(DRAWS["dropout"], used)
    graph = trace(module, X)
    before = text(graph)
    request = replace(measure(module, "rms"), keeps_unused=False)
    assert applied(remove_dead_marks, graph, request).unmeasured == []
    assert text(graph) == before
