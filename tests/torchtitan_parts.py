"""Stand-ins for the parts of torchtitan that tmm uses: their names and signatures, and no more.

As in torchtitan's main branch at commit b5bcd76 of 21 August 2026, which needs a GPU to be
imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn


class Configurable:
    """Components have a nested ``Config``, which builds them."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[type | None] = None

        def build(self, **kwargs: Any) -> Any:
            assert self._owner is not None
            return self._owner(config=replace(self), **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in cls.__dict__:
            cls.Config._owner = cls


class BaseLogger:
    def log(self, metrics: dict[str, Any], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class KeepingLogger(BaseLogger):
    """In the place of TensorBoard's: keeps what it is given."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Any]] = {}
        self.is_closed = False

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.steps.setdefault(step, {}).update(metrics)

    def close(self) -> None:
        self.is_closed = True


class LoggerContainer(BaseLogger):
    def __init__(self) -> None:
        self._loggers: list[BaseLogger] = []

    def add_logger(self, logger_instance: BaseLogger) -> None:
        self._loggers.append(logger_instance)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        for logger_instance in self._loggers:
            logger_instance.log(metrics, step)

    def close(self) -> None:
        for logger_instance in self._loggers:
            logger_instance.close()


class MetricsProcessor(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        log_freq: int = 10
        enable_tensorboard: bool = False

    def __init__(
        self,
        config: Config,
        *,
        parallel_dims: Any,
        dump_folder: str = "./outputs",
        pp_schedule: str = "1F1B",
        ft_enable: bool = False,
        ft_replica_id: int = 0,
        config_dict: dict[str, Any] | None = None,
        tag: str | None = None,
        has_quantization: bool = False,
    ) -> None:
        self.logger = self._build_metric_logger(
            config=config,
            parallel_dims=parallel_dims,
            dump_folder=dump_folder,
            pp_schedule=pp_schedule,
            ft_enable=ft_enable,
            ft_replica_id=ft_replica_id,
            config_dict=config_dict,
            tag=tag,
        )
        self.parallel_dims, self.config = parallel_dims, config
        self.device_memory_monitor = SimpleNamespace(device=torch.device("cpu"))
        self.optimizers: Any = None
        self.model_parts: list[nn.Module] | None = None

    def should_log(self, step: int) -> bool:
        return step == 1 or step % self.config.log_freq == 0

    def _build_metric_logger(
        self,
        *,
        config: Config,
        parallel_dims: Any,
        dump_folder: str,
        pp_schedule: str,
        ft_enable: bool = False,
        ft_replica_id: int = 0,
        config_dict: dict[str, Any] | None = None,
        tag: str | None = None,
    ) -> BaseLogger:
        if not config.enable_tensorboard:
            return BaseLogger()
        container = LoggerContainer()
        container.add_logger(KeepingLogger())
        return container

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        metrics = {
            "loss_metrics/global_avg_loss": global_avg_loss,
            "loss_metrics/global_max_loss": global_max_loss,
            "grad_norm": grad_norm,
            "throughput(tps)": 1.0,
        }
        self.logger.log({**metrics, **(extra_metrics or {})}, step)

    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        self.logger.log({"validation_metrics/loss": loss, **(extra_metrics or {})}, step)

    def close(self) -> None:
        self.logger.close()


class OptimizersContainer(torch.optim.Optimizer):
    """One optimizer for each kind of parameters, and an optimizer of all of them itself."""

    def __init__(self, *, model_parts: list[nn.Module]) -> None:
        (model,) = model_parts
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        self.optimizers = [torch.optim.AdamW(matrices, lr=1e-2), torch.optim.SGD(others, lr=1e-2)]
        self.model_parts = model_parts
        torch.optim.Optimizer.__init__(self, matrices + others, {})

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


@dataclass
class TrainerConfig:
    metrics: Any
    dump_folder: str
    steps: int = 4
    accumulation: int = 2
    validation_steps: tuple[int, ...] = (2,)
    job: dict[str, Any] = field(default_factory=lambda: {"training": {"steps": 4}})
    pipelines: bool = False


class Trainer:
    """The order in which torchtitan's trainer calls its parts."""

    def __init__(self, config: TrainerConfig, model: nn.Module) -> None:
        self.config = config
        self.metrics_processor = config.metrics.build(
            parallel_dims=SimpleNamespace(pp_enabled=config.pipelines),
            dump_folder=config.dump_folder,
            pp_schedule="1F1B",
            config_dict=config.job,
            has_quantization=False,
        )
        self.model_parts = [model]
        self.optimizers = OptimizersContainer(model_parts=self.model_parts)
        self.metrics_processor.optimizers = self.optimizers
        self.metrics_processor.model_parts = self.model_parts
        self.step = 0

    def batch(self, place: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * self.step + place)
        return torch.randn(4, 8, generator=generator)

    def train_step(self) -> None:
        self.optimizers.zero_grad()
        should_log = self.metrics_processor.should_log(self.step)
        total = 0.0
        for place in range(self.config.accumulation):
            loss = self.model_parts[0](self.batch(place)).square().mean()
            (loss / self.config.accumulation).backward()
            total += loss.item() / self.config.accumulation
        norm = torch.nn.utils.clip_grad_norm_(self.model_parts[0].parameters(), 100.0)
        self.optimizers.step()
        if should_log:
            self.metrics_processor.log(self.step, total, total, norm.item(), {"lr": 1e-2})

    def validate(self) -> None:
        self.model_parts[0].eval()
        with torch.no_grad():
            loss = self.model_parts[0](self.batch(99)).square().mean()
        self.metrics_processor.log_validation(loss=loss.item(), step=self.step)
        self.model_parts[0].train()

    def train(self, loaded_step: int = 0) -> None:
        self.step = loaded_step
        while self.step < self.config.steps:
            self.step += 1
            self.train_step()
            if self.step in self.config.validation_steps:
                self.validate()

    def close(self) -> None:
        self.metrics_processor.close()


@contextmanager
def installed() -> Iterator[None]:
    """As if torchtitan were installed."""
    package, components, metrics = (
        ModuleType(name)
        for name in ("torchtitan", "torchtitan.components", "torchtitan.components.metrics")
    )
    vars(metrics).update(
        BaseLogger=BaseLogger, LoggerContainer=LoggerContainer, MetricsProcessor=MetricsProcessor
    )
    added = {module.__name__: module for module in (package, components, metrics)}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in (*added, "tmm.integrations.torchtitan"):
            sys.modules.pop(name, None)
