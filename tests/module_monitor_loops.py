"""The loops that torch-module-monitor documents, with the library as an argument."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Metrics = dict[int, dict[str, float]]
Compile = Callable[[nn.Module], nn.Module]


def make_model(library: ModuleType, blocks: int = 2) -> nn.Module:
    """A small transformer: embedding, normalization, attention that logs, a tuple as output."""

    class Attention(nn.Module, library.MonitorMixin):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            if self.is_monitoring:
                library.monitor_scaled_dot_product_attention(
                    self.get_module_monitor(),
                    *(self, q, k, v),
                    is_causal=True,
                    activation=y,
                    is_reference=self.is_reference_module,
                )
                name = "reference_stat" if self.is_reference_module else "custom_stat"
                self.get_module_monitor().log_tensor(name, y.norm(dim=-1))
            out: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
            return out

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x.mean()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 12)
            self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(blocks))
            self.blocks = nn.ModuleList(Attention() for _ in range(blocks))
            self.pair, self.head = Pair(), nn.Linear(12, 11)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embedding(tokens)
            for norm, block in zip(self.norms, self.blocks, strict=True):
                x = x + block(norm(x))
            out: torch.Tensor = self.head(self.pair(x)[0])
            return out

    torch.manual_seed(0)
    model = Model()
    for module in model.modules():
        if isinstance(module, library.MonitorMixin):
            module.set_module_monitor(None)  # torch-module-monitor needs it before set_module
    return model


def train(
    library: ModuleType,
    compile_model: Compile,
    prepare: Callable[[Any, nn.Module], Any],
    step: Callable[..., None] | None = None,
    *,
    blocks: int = 2,
    steps: int = 5,
) -> Any:
    """A monitor after a short training in which ``step`` runs between backward and update."""
    model = make_model(library, blocks)
    called = compile_model(model)
    monitor = library.ModuleMonitor(monitor_step_fn=lambda step: step % 2 == 0)
    monitor.set_module(called)
    extra = prepare(monitor, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        monitor.begin_step(number)
        for micro_batch in range(2 if step is micro_batches else 1):
            size = 4 - micro_batch
            tokens = torch.randint(11, (size, 6), generator=generator)
            if monitor.has_reference_module():
                with torch.no_grad():
                    monitor.reference_module(tokens)
            logits = called(tokens)
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            if step is not None:
                step(monitor, model, extra, loss)
        monitor.monitor_parameters()
        monitor.monitor_gradients()
        optimizer.step()
        optimizer.zero_grad()
        monitor.end_step()
    return monitor


def basic(library: ModuleType, compile_model: Compile, **sizes: int) -> Any:
    """The README's first loop."""
    return train(library, compile_model, basic_metrics, **sizes)


def basic_metrics(monitor: Any, model: nn.Module) -> None:
    monitor.add_activation_metric("mean", lambda x: x.mean())
    monitor.add_parameter_metric("norm", lambda x: x.norm())
    monitor.add_gradient_metric("norm", lambda x: x.norm())


def reference(library: ModuleType, compile_model: Compile, **sizes: int) -> Any:
    """Comparison with the model at initialization, whose forward pass the loop runs itself."""

    def prepare(monitor: Any, model: nn.Module) -> None:
        monitor.add_gradient_metric("norm", lambda x: x.norm())
        monitor.set_reference_module(copy.deepcopy(model))
        monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
        monitor.add_activation_difference_metric(
            "relative", lambda a, b: (a - b).norm() / b.norm(), r"blocks\.\d$"
        )
        monitor.add_parameter_difference_metric("l2_distance", lambda p, q: (p - q).norm())

    return train(library, compile_model, prepare, **sizes)


def coordinate_check(library: ModuleType, compile_model: Compile, **sizes: int) -> Any:
    """The refined coordinate check, after backward; tuples are excluded, which it cannot take."""

    def prepare(monitor: Any, model: nn.Module) -> Any:
        monitor.excluded_modules_compiled_re = __import__("re").compile("pair")
        monitor.add_gradient_metric("norm", lambda x: x.norm())
        monitor.set_reference_module(copy.deepcopy(model))
        return library.RefinedCoordinateCheck(monitor)

    def step(monitor: Any, model: nn.Module, check: Any, loss: torch.Tensor) -> None:
        if monitor.current_step != 2:  # not recorded where nobody asks
            check.refined_coordinate_check()

    return train(library, compile_model, prepare, step, **sizes)


def micro_batches(monitor: Any, model: nn.Module, extra: object, loss: torch.Tensor) -> None:
    """After the backward pass of a micro-batch."""
    monitor.log_scalar("loss", loss)
    monitor.after_micro_batch()


def accumulation(library: ModuleType, compile_model: Compile, **sizes: int) -> Any:
    """Two micro-batches of different size, joined by the mean and by functions."""

    def prepare(monitor: Any, model: nn.Module) -> None:
        monitor.add_gradient_metric("norm", lambda x: x.norm())
        monitor.set_reference_module(copy.deepcopy(model))
        monitor.add_activation_difference_metric("max", lambda a, b: (a - b).abs(), "head", max_of)
        monitor.add_activation_metric("mean", lambda x: x.mean(dim=-1))
        monitor.add_activation_metric("least", lambda x: x.min(dim=-1).values, "head", torch.min)
        monitor.add_activation_metric(
            "both", lambda x: x, "norms", lambda v: {"[mean]": v.mean(), "[std]": v.std().item()}
        )
        monitor.add_activation_metric(
            "kept", lambda x: x, "head", lambda v: {"": v.mean().item(), "[n]": v.numel()}
        )

    return train(library, compile_model, prepare, micro_batches, **sizes)


def max_of(values: torch.Tensor) -> torch.Tensor:
    return values.max()


def clipping(library: ModuleType, compile_model: Compile, **sizes: int) -> Any:
    """Gradients before and after clipping."""

    def prepare(monitor: Any, model: nn.Module) -> None:
        monitor.add_gradient_metric("norm", lambda g: g.norm())
        add_share(monitor)

    return train(library, compile_model, prepare, clip, **sizes)


def add_share(monitor: Any) -> None:
    monitor.add_gradient_metric("share", lambda g: (g > 0).float().mean().item(), ".*weight")


def clip(monitor: Any, model: nn.Module, extra: object, loss: torch.Tensor) -> None:
    monitor.monitor_gradients(before_clip=True)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def attention(library: ModuleType, compile_model: Compile, **sizes: int) -> Any:
    """Metrics of heads, which the module shows itself."""

    def prepare(monitor: Any, model: nn.Module) -> None:
        monitor.add_gradient_metric("norm", lambda x: x.norm())
        add_metrics_of_heads(monitor)

    return train(library, compile_model, prepare, **sizes)


def add_metrics_of_heads(monitor: Any) -> None:
    monitor.add_activation_metric("rms", lambda x: x.square().mean().sqrt())
    monitor.add_activation_metric("max", lambda x: x.amax(), r".*head_1\.(key|value)")


def custom(library: ModuleType, compile_model: Compile, **sizes: int) -> Any:
    """Metrics that return vectors, matrices or numbers, and names of the user's own."""

    def prepare(monitor: Any, model: nn.Module) -> None:
        monitor.add_gradient_metric("norm", lambda g: g.norm())
        add_own_metrics(monitor)

    return train(library, compile_model, prepare, log, **sizes)


def add_own_metrics(monitor: Any) -> None:
    monitor.add_activation_metric("entropy", lambda x: -(x.softmax(-1) * x.log_softmax(-1)))
    monitor.add_activation_metric("sorted", lambda x: x.flatten().sort().values[:3], "head|norm")
    monitor.add_parameter_metric("opnorm", lambda p: torch.linalg.matrix_norm(p, 2), ".*qkv.*w")
    monitor.add_parameter_metric("count", lambda p: p.numel())
    monitor.add_parameter_metric("fraction", lambda p: float((p > 0).sum()) / p.numel())


def log(monitor: Any, model: nn.Module, extra: object, loss: torch.Tensor) -> None:
    monitor.log_scalar("loss", loss)
    monitor.log_scalar("every", loss.item(), force=True)
    monitor.log_tensor("losses", loss.detach().expand(3), lambda v: {"[sum]": v.sum()})


def together(library: ModuleType, compile_model: Compile, **sizes: int) -> Any:
    """What the loops without a reference measure, in one."""

    def prepare(monitor: Any, model: nn.Module) -> None:
        basic_metrics(monitor, model)
        add_share(monitor)
        add_metrics_of_heads(monitor)
        add_own_metrics(monitor)

    def step(*arguments: Any) -> None:
        clip(*arguments)
        log(*arguments)

    return train(library, compile_model, prepare, step, **sizes)


WITH_REFERENCE = (reference, coordinate_check, accumulation)
LOOPS = (basic, clipping, attention, custom, *WITH_REFERENCE)
