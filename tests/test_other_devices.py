"""Devices without float64, and programs whose tensors come to lie elsewhere than on the CPU."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tmm
from tests.mocked_device import load_guards
from tests.test_floors import FILES
from tmm.core.metrics import COLUMN_ORDER, METRIC_NAMES, PAIR_COLUMNS, builtin_reductions
from tmm.core.torch_private import FakeTensor
from tmm.kernels import dense
from tmm.kernels.dense import packed_dtype
from tmm.kernels.ops import _histogram
from tmm.kernels.pairs import ROW_NORM, row_norms
from tmm.kernels.summarize.group import summarize_group
from tmm.kernels.summarize.torch_rows import summarize_with_torch
from tmm.nonfinite import statistics
from tmm.nonfinite.statistics import statistics_of
from tmm.spec.ranks import _fingerprint
from tmm.steps.ends_of_model import spread
from tmm.steps.optimizer_state import state_value
from tmm.steps.optimizers import WatchedScaler

(EIGHT,) = builtin_reductions(("mean", "std", "rms", "absmax", "min"), is_complex=False)
ALL, _ = builtin_reductions(METRIC_NAMES, is_complex=False)


@pytest.fixture
def xpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What a GPU of Intel says of itself."""
    properties = SimpleNamespace(has_fp64=False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    dense._has_float64.cache_clear()
    yield properties
    dense._has_float64.cache_clear()


def test_which_devices_have_float64(xpu: SimpleNamespace) -> None:
    assert packed_dtype(torch.device("xpu", 0)) is torch.float32
    xpu.has_fp64 = True
    assert packed_dtype(torch.device("xpu", 0)) is torch.float32  # asked once of each
    assert packed_dtype(torch.device("xpu", 1)) is torch.float64
    del xpu.has_fp64  # an older torch does not say
    assert packed_dtype(torch.device("xpu", 2)) is torch.float64
    assert packed_dtype(torch.device("mps")) is torch.float32
    for kind in ("cpu", "cuda", "meta"):
        assert packed_dtype(torch.device(kind)) is torch.float64


class Without64(TorchDispatchMode):
    """Refuses float64 on a type of device, as that does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.seen = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device.type == self.kind:
                self.seen += 1
                wide = x.dtype in (torch.float64, torch.complex128)
                if wide:
                    raise TypeError(f"{function}: {self.kind} has no {x.dtype}")
        return result


@contextmanager
def without_float64(kind: str) -> Iterator[Without64]:
    mode = Without64(kind)
    load_guards()
    with FakeTensorMode(allow_non_fake_inputs=True), mode:
        yield mode


def moved(x: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=kind)


def rows(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        x = torch.empty(6, 50, dtype=dtype, device=kind)
        for columns in (EIGHT.columns, ALL.columns):
            assert summarize_group([x, x[1]], columns).dtype is torch.float32
    assert summarize_with_torch(torch.empty(0, device=kind), EIGHT.columns).dtype is torch.float32


def pairs(kind: str) -> None:
    columns = tuple(name for name in COLUMN_ORDER if name in (*EIGHT.columns, *PAIR_COLUMNS))
    for dtype in (torch.float32, torch.float16, torch.complex64):
        x = torch.empty(6, 50, dtype=dtype, device=kind)
        some = columns if not dtype.is_complex else ("sum_squares", *PAIR_COLUMNS)
        assert summarize_group([x, x.t()], some, [x, x.t()]).dtype is torch.float32


def further_rows(kind: str) -> None:
    x = torch.empty(6, 50, device=kind)
    assert _histogram(x).dtype is torch.float32
    assert row_norms(x.half(), ROW_NORM).dtype is torch.float32
    assert spread(x).dtype is torch.float32
    assert spread(x.bfloat16()).dtype is torch.float32


def scaler(kind: str) -> None:
    of_user = torch.amp.GradScaler("cpu")
    watched = WatchedScaler(of_user, lambda: None)
    device = torch.device(kind)
    assert watched.factor(device).dtype is torch.float32  # before a loss was scaled
    of_user._scale = torch.full((), 1024.0, device=kind)
    assert watched.factor(device).dtype is torch.float32
    assert watched.factor(torch.device("cpu")).dtype is torch.float64
    inverse = watched.inverse_scale([])
    assert inverse is not None
    assert inverse.dtype is torch.float32


def rates(kind: str) -> None:
    parameter = torch.empty(3, 4, device=kind)
    optimizer = torch.optim.Adam([nn.Parameter(parameter)], lr=0.1)
    (group,) = optimizer.param_groups
    for step in (torch.empty((), device=kind), torch.ones(()).new_ones(())):
        state = {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter}
        if isinstance(step, FakeTensor) and step.device.type == "cpu":
            continue  # its number is read
        value = state_value("effective_lr", optimizer, group, state)
        assert value is not None
        assert value.dtype is torch.float32


@pytest.mark.parametrize("kind", ["mps", "xpu"])
@pytest.mark.parametrize("measure", [rows, pairs, further_rows, scaler, rates])
def test_nothing_is_in_float64(
    measure: Callable[[str], None], kind: str, xpu: SimpleNamespace
) -> None:
    with without_float64(kind) as device:
        measure(kind)
    assert device.seen


@pytest.mark.usefixtures("xpu")
def test_float64_is_refused() -> None:
    with without_float64("xpu"), pytest.raises(TypeError, match="xpu has no torch.float64"):
        torch.empty(3, device="xpu").double()


@pytest.mark.parametrize("tensor", [torch.arange(5), torch.tensor([1.0, torch.inf, -3e38, 2e38])])
def test_numbers_of_find_nonfinite_are_exact_without_float64(
    tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = statistics_of(tensor, "output")
    copied = []
    monkeypatch.setattr(statistics, "packed_dtype", lambda device: torch.float32)
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda self: copied.append(self) or self.clone(), raising=True
    )
    assert statistics_of(tensor, "output") == expected
    assert len(copied) == 1  # float64 is asked of the host only


def test_reasons_are_left_out_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """An overflow is found all the same; what it would be in float64 is not known."""

    class Overflows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 1e30).square()

    x = torch.ones(3)
    with_reason = tmm.find_nonfinite(Overflows(), x)
    assert with_reason is not None
    assert "overflow of float32" in with_reason.first.reason

    def refuses(value: object) -> object:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr("tmm.nonfinite.reasons._widened", refuses)
    found = tmm.find_nonfinite(Overflows(), x)
    assert found is not None
    assert found.first.operation == with_reason.first.operation
    assert "float64" not in found.first.reason


def test_fingerprints_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    first, same, other = torch.randn(9, 5), torch.randn(9, 5), torch.randn(9, 5)
    same.copy_(first)
    monkeypatch.setattr("tmm.spec.ranks.packed_dtype", lambda device: torch.float32)
    assert _fingerprint(first) == _fingerprint(same) != _fingerprint(other)
    assert _fingerprint(first) != _fingerprint(first.flip(0))


class Drawing(nn.Module):
    """Draws from generators of all accelerators."""

    def __init__(self, states: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.states, self.layer = states, nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.draw()
        y: torch.Tensor = self.layer(x)
        return y

    @torch.compiler.disable
    def draw(self) -> None:
        for state in self.states.values():
            state += 1


def prepare(model: nn.Module, compiled: Any) -> None:
    tmm.instrument(compiled, tmm.Spec(tmm.activation("rms")))
    tmm.monitor(compiled).prepare(torch.randn(2, 3))
    tmm.remove(compiled)


def find_nonfinite(model: nn.Module, compiled: Any) -> None:
    assert tmm.find_nonfinite(compiled, torch.full((2, 3), torch.inf)) is not None


def check(model: nn.Module, compiled: Any) -> None:
    tmm.testing.check(model, (torch.randn(2, 3),))


@pytest.mark.parametrize("way", [prepare, find_nonfinite])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_random_states_of_all_accelerators_stay(
    way: Callable[..., None], is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of passes that are run besides those of the training."""
    states = {"xpu": torch.tensor([1]), "mps": torch.tensor([2])}
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_rng_state_all", lambda: [states["xpu"].clone()])
    monkeypatch.setattr(torch.xpu, "set_rng_state_all", lambda s: states["xpu"].copy_(s[0]))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states["mps"].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda s: states["mps"].copy_(s))
    model = Drawing(states)
    compiled = torch.compile(model, backend="eager") if is_compiled else model
    way(model, compiled)
    assert (states["xpu"].item(), states["mps"].item()) == (1, 2)
    model(torch.randn(2, 3))
    assert (states["xpu"].item(), states["mps"].item()) == (2, 3)


MAKING = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace")
OF_USERS = {
    "tmm.module_monitor.module_monitor": "what a user logs, in a traced graph",
    "tmm.passes.attention.head_rows": "what a user's function gives",
    "tmm.passes.metrics.recognize_eager": "a fake tensor",
}
RUN_IN_STEPS = ("kernels", "passes", "runtime", "spec", "instrumentation", "steps", "runs")


def unplaced(path: Path) -> list[int]:
    """The lines in which a tensor is made that lies where a program wants all tensors to lie."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            names = {keyword.arg for keyword in node.keywords}
            if of_torch and node.func.attr in MAKING and "device" not in names:
                found.append(node.lineno)
    return found


def test_tensors_of_ours_lie_where_we_say() -> None:
    """And not on what ``torch.set_default_device`` says, whose copy would be waited for."""
    found = {
        module: lines
        for module, path in FILES.items()
        if module.split(".")[1:2] and module.split(".")[1] in (*RUN_IN_STEPS, "module_monitor")
        if (lines := unplaced(path))
    }
    assert found.keys() == OF_USERS.keys(), found


def test_a_training_where_all_tensors_lie_elsewhere(tmp_path: Path) -> None:
    """That of the program lies on the CPU all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    spec = tmm.Spec(
        *tmm.default_spec().rules,
        tmm.activation(own=lambda x: float(x.abs().max())),
        tmm.gradient("norm"),
        tmm.optimizer_state("effective_lr"),
        diagnosis=True,
    )
    x = torch.randn(5, 4)
    torch.set_default_device("meta")
    try:
        with tmm.start_run("elsewhere", root=tmp_path) as run:
            watched = run.watch(model, spec)
            tmm.monitor(watched).watch(optimizer)
            for _ in range(2):
                loss = watched(x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.log({"loss": loss, "number": 3.0})
                run.step()
        values = tmm.open_run(run.path).at(1)
    finally:
        torch.set_default_device(None)
    assert values["number"] == 3.0
    assert values["loss"] > 0
    assert values["activation/1/own"] > 0
    assert values["step/gradient_norm"] > 0
    assert all(value is not None for value in values.values())
