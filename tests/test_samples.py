"""A reference on the first items of each batch, against eager forwards of these items alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tmm
from tests.eager_hooks import Expected, Tolerance, assert_agrees, backward
from tests.eager_reference import Batch, expected
from tests.model_zoo import CASES
from tests.test_reference import as_double, moved, run
from tmm.core.metrics import MEANS

METRICS = ("rms", "relative_norm", "cosine", "l2")
RULES = (tmm.activation_difference(*METRICS), tmm.rcc())
KEPT = 1
DOUBLE = Tolerance(1e-9, 1e-9)


def some(batch: Batch, kept: int = KEPT) -> Batch:
    return {n: v[:kept] if torch.is_tensor(v) and v.ndim else v for n, v in batch.items()}


def wanted(
    module: nn.Module, reference: nn.Module, batches: Sequence[Batch], joined: tuple[str, ...]
) -> dict[str, Expected]:
    """What eager forwards of the first items give; ``joined`` sites have none of their own."""
    values = expected(module, reference, batches, floor=1e-3)
    known = (*METRICS, "l2norm")
    return {
        key: value
        for key, value in values.items()
        if key.rpartition("/")[2] in known and not any(f"/{site}" in key for site in joined)
    }


def instrumented(module: nn.Module, reference: Any, kept: int = KEPT, **options: Any) -> Any:
    spec = tmm.Spec(*RULES, reference=reference, reference_samples=kept)
    return tmm.instrument(torch.compile(module, **options), spec)


@pytest.mark.parametrize(
    ("name", "joined"),
    [
        ("Sequential", ()),
        ("BertForMaskedLM", ("[root module][loss]",)),
        pytest.param("GPT2LMHeadModel (graph break)", ("[root module]",), marks=pytest.mark.slow),
        pytest.param("LlamaForCausalLM", ("[root module][loss]",), marks=pytest.mark.slow),
        pytest.param("ViTForImageClassification", ("[root module][loss]",), marks=pytest.mark.slow),
    ],
)
def test_architectures(name: str, joined: tuple[str, ...]) -> None:
    module = CASES[name].build().double().eval()
    batch = as_double(CASES[name].batch())
    reference = moved(module)
    model = instrumented(module, reference, backend="aot_eager")
    values = run(model, [batch])
    assert_agrees(values, wanted(module, reference, [some(batch)], joined), DOUBLE)
    for site in joined:
        reasons = ("joins the items of the batch", "after a graph break")
        assert any(reason in str(tmm.explain(model)) for reason in reasons), site


class Layers(nn.Module):
    """Dropouts of all kinds, attention, a checkpoint, a tied head, tensors made of sizes."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed, self.position = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8))
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(inplace=True))
        self.drop, self.channels = nn.Dropout(0.3), nn.Dropout1d(0.3)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids) + self.position
        batch, length, width = x.shape
        x = x + torch.rand_like(x) + torch.arange(batch, device=x.device)[:, None, None] % 2
        if self.checkpointed:
            x = x + checkpoint(self.block, x, use_reentrant=False)
        else:
            x = x + self.block(x)
        x = self.channels(self.drop(x))
        y = x.view(batch, length, 2, 4).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=0.2, is_causal=True)
        y = y.transpose(1, 2).reshape(-1, width)
        x = self.drop(y).unflatten(0, (batch, length)) + x.flatten(0, 1).view(batch, -1, width)
        z, _ = self.attention(*[x.transpose(0, 1)] * 3)
        x = x + z.transpose(0, 1)
        x += 1
        return self.head(x), x.mean()


IDS = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(0))


def without_dropout(module: nn.Module) -> nn.Module:
    for child in module.modules():
        if isinstance(child, (nn.Dropout, nn.Dropout1d)):
            child.p = 0.0
        elif isinstance(child, nn.MultiheadAttention):
            child.dropout = 0.0
    return module


@pytest.mark.parametrize(
    ("checkpointed", "backend"),
    [
        *[(False, "eager"), (True, "aot_eager")],
        *[
            pytest.param(checkpointed, backend, marks=pytest.mark.slow)
            for checkpointed, backend in (
                *[(False, "aot_eager"), (True, "eager")],
                *[(False, "inductor"), (True, "inductor")],
            )
        ],
    ],
)
def test_no_difference_from_itself_with_dropout(checkpointed: bool, backend: str) -> None:
    torch.manual_seed(0)
    module = Layers(checkpointed=checkpointed).double()
    values = run(instrumented(module, "init", 2, backend=backend), [{"ids": IDS}])
    rows = [v for key, v in values.items() if "difference" in key and "cosine" not in key]
    rows += [v for key, v in values.items() if "(" in key]
    assert len(rows) > 30
    assert max(rows) < 1e-12


class Plain(nn.Module):
    """Items lie in several dimensions on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8).eval()
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        y = self.conv(self.fc(x).transpose(1, 2)) * torch.ones(batch, 1, 1, dtype=x.dtype)
        y = self.norm(y.reshape(batch * width, length).view(batch, width, length))
        y = self.fc(y.permute(2, 0, 1)).transpose(0, 1).type_as(x) * self.scale.type_as(x)
        return self.fc(y.flatten(0, 1)).view(-1, length, width)


@pytest.mark.parametrize(
    ("dynamic", "backend"),
    [
        *[(None, "eager"), (True, "eager")],
        pytest.param(None, "aot_eager", marks=pytest.mark.slow),
        pytest.param(True, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_batches_of_any_size(dynamic: bool | None, backend: str) -> None:
    torch.manual_seed(0)
    module = Plain().double()
    module.train()
    module.norm.eval()
    reference = moved(module)
    batches = [{"x": torch.randn(size, 4, 8).double()} for size in (6, 5, 9, 2, 1, 7)]
    want = wanted(module, reference, [some(batch, 2) for batch in batches], ())
    model = instrumented(module, reference, 2, backend=backend, dynamic=dynamic)
    assert_agrees(run(model, batches), want, DOUBLE)
    graphs = len(tmm.explain(model).graphs)
    assert_agrees(run(model, batches, 1), want, DOUBLE)
    assert len(tmm.explain(model).graphs) == graphs <= 5


def test_the_compiled_program_of_the_user_knows_nothing_of_it() -> None:
    traced = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        traced.append([v for v in inputs if isinstance(v, torch.SymInt)])
        return graph.forward

    x = torch.randn(6, 4, 8)
    model = instrumented(without_dropout(Plain()), "init", 2, backend=backend)
    model(x)
    run(model, [{"x": x}])
    model(x)
    assert len(traced) == 2
    assert not traced[0]
    assert not {name for name in vars(x) if "dynamo" in name}


def test_keys_say_that_they_are_of_some_items(tmp_path: Any) -> None:
    spec = tmm.Spec(tmm.rcc(), tmm.activation("rms"), reference="init", reference_samples=2)
    model = tmm.instrument(torch.compile(Plain(), backend="eager"), spec, run=tmp_path / "run")
    run(model, [{"x": torch.randn(6, 4, 8)}])
    tmm.remove(model)
    with tmm.open_run(tmp_path / "run") as opened:
        assert opened.key_info("RCC x_t/fc/l2norm").notes == "of the first 2 items of each batch"
        assert opened.key_info("activation/fc/rms").notes == ""


class Around(nn.Module):
    """Some function around a linear layer."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc, self.out, self.function = nn.Linear(8, 8), nn.Linear(8, 8), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(self.function(self.fc(x)))
        return y


def attend(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3).transpose(0, 1)


def broken(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (nn.BatchNorm1d(4), "batch norm in training mode"),
        (attend, "'out' gives other values|'' gives other values"),
        (lambda x: x.flip(0), "mixes the items"),
        (lambda x: x.softmax(0), "mixes the items"),
        (lambda x: x[torch.arange(x.shape[0] - 1, -1, -1)], "mixes the items"),
        (lambda x: x + 1 if x.shape[0] == 6 else x, "depends on the batch's size, 6"),
        (lambda x: x.view(6, 4, 8), "depends on the batch's size, 6"),
        (lambda x: x + 1 if x.shape[0] > 3 else x, "needs a batch where"),
        (lambda x: x.squeeze() + 0, "mixes the items|without the rest"),
    ],
    ids=[
        *("batch norm", "attention", "flip", "softmax", "permutation", "size", "constant"),
        *("guard", "squeeze"),
    ],
)
def test_what_cannot_be_followed_is_refused(function: Any, reason: str) -> None:
    model = instrumented(Around(function), "init", 1, backend="aot_eager")
    monitor = tmm.monitor(model)
    with pytest.raises(ValueError, match=r"reference_samples=") as caught, monitor.step(0):
        model(torch.randn(6, 4, 8))
    assert any(part in str(caught.value) for part in reason.split("|")), caught.value


def test_what_joins_items_has_no_rows() -> None:
    module = Around(lambda x: x - x.mean(0))
    model = instrumented(module, moved(module), 2, backend="aot_eager")
    values = run(model, [{"x": torch.randn(6, 4, 8)}])
    assert "activation_difference/fc/rms" in values
    assert not any("/out/" in key for key in values)
    assert "joins the items of the batch" in str(tmm.explain(model))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.transpose(0, 1).reshape(-1, 8).sin(),
        lambda x: torch.cat([x, x]),
        lambda x: x.repeat(2, 1, 1),
        lambda x: x.permute(1, 0, 2).flatten(0, 1),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_items_that_are_no_longer_outermost_have_no_rows(function: Any, before: bool) -> None:
    module: nn.Module = Around(function)
    if before:  # where nothing depends on a parameter yet
        module = nn.Sequential(Function(function), module.out)
    model = instrumented(module, moved(module), 2, backend="aot_eager")
    # All items alike: their values could not tell.
    batch = torch.ones(6, 4, 8)
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(batch).sum().backward()
    values = monitor.get_step_metrics()
    known = ("/fc", "RCC x_t/0/", "RCC (x_t-x_0)/0/")  # and what goes into the function
    assert not [key for key in values if not any(part in key for part in known)]
    assert "cannot be told apart" in str(tmm.explain(model))


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Gated(nn.Module):
    """Mixes items as soon as its gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gate = nn.Linear(8, 8), nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return y + self.gate * y.flip(0)


def test_a_mixture_that_is_hidden_by_a_weight_of_zero_is_found() -> None:
    model = instrumented(Gated(), "init", 2, backend="aot_eager")
    with pytest.raises(ValueError, match="mixes the items"), tmm.monitor(model).step(0):
        model(torch.randn(6, 4, 8))


class Decaying(nn.Module):
    """Changes a parameter in its forward, as an average does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.fc.weight.mul_(0.5)
        y: torch.Tensor = self.fc(x)
        return y


def test_the_check_changes_no_parameter() -> None:
    module = Decaying()
    before = module.fc.weight.detach().clone()
    spec = tmm.Spec(tmm.activation_difference("rms"), reference="init", reference_samples=2)
    model = tmm.instrument(torch.compile(module, backend="eager"), spec)
    with tmm.monitor(model).step(0):
        model(torch.randn(6, 4, 8))
    assert torch.equal(module.fc.weight, before / 2)


def test_after_a_graph_break_nothing_is_compared() -> None:
    module = Around(broken).double()
    reference, batch = moved(module), {"x": torch.randn(6, 4, 8).double()}
    model = instrumented(module, reference, 2, backend="aot_eager")
    want = wanted(module, reference, [some(batch, 2)], ())
    want = {key: value for key, value in want.items() if "/fc" in key}
    for step in range(2):
        assert_agrees(run(model, [batch], step), want, DOUBLE)
    explanation = str(tmm.explain(model))
    assert "after a graph break, where the first items of a batch are lost" in explanation


def test_parts_that_are_compiled_alone_are_refused() -> None:
    module = Around(nn.Identity())
    module.out.compile(backend="eager")
    spec = tmm.Spec(tmm.rcc(), reference="init", reference_samples=1)
    model = tmm.instrument(module, spec)
    with pytest.raises(ValueError, match="several graphs"), tmm.monitor(model).step(0):
        model(torch.randn(6, 4, 8))


def test_faults_of_later_steps_leave_the_training_alone() -> None:
    module = Around(nn.BatchNorm1d(4).eval())
    model = instrumented(module, "init", 1, backend="eager")
    run(model, [{"x": torch.randn(6, 4, 8)}])
    module.train()
    with pytest.warns(UserWarning, match="mixes the items of a batch"):
        values = run(model, [{"x": torch.randn(6, 4, 8)}], 1)
    assert not any("RCC" in key for key in values)


@pytest.mark.parametrize("metric", ["norm", "absmax", "std", "min", "nan_count", "histogram"])
def test_metrics_that_some_items_do_not_estimate_are_refused(metric: str) -> None:
    assert metric not in MEANS
    with pytest.raises(ValueError, match=f"{metric}.*reference_samples=2.*rms"):
        tmm.Spec(tmm.activation_difference(metric), reference="init", reference_samples=2)


def test_other_mistakes() -> None:
    own = tmm.activation_difference(total=lambda a, b: a - b, aggregate="sum")
    with pytest.raises(ValueError, match="aggregate='sum'"):
        tmm.Spec(own, reference="init", reference_samples=2)
    with pytest.raises(ValueError, match="at least 1"):
        tmm.Spec(tmm.rcc(), reference="init", reference_samples=0)
    with pytest.raises(TypeError, match="number of items"):
        tmm.Spec(tmm.rcc(), reference="init", reference_samples=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of"):
        tmm.Spec(tmm.activation("rms"), reference_samples=2)
    model = instrumented(Around(nn.Identity()), "init", 1, backend="eager")
    copy.deepcopy(model)
    assert "reference_samples=1" in str(tmm.monitor(model).spec)
    backward(model(torch.randn(1, 4, 8)))
