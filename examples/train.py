"""A training script to start from: a small language model of bytes, on text that Python ships with.

    python examples/train.py --steps 300 --compile inductor --precision bfloat16
    python examples/train.py --steps 300 --resume          # goes on where it was killed
    torchrun --nproc-per-node 2 examples/train.py --sink wandb --sink tensorboard

Replace the first part (data, model, losses); the second trains anything. The lines that are marked
``# tmm`` record the run (``tmm list --root output/runs``); weights are the same without them.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

import tmm  # tmm

Data = TensorDataset | Subset[Any]
Losses = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
Window = list[tuple[list[Tensor], float]]  # the micro-batches of a step, and their weights


def option(default: Any, help: str) -> Any:
    """A setting with its explanation on the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out."""

    output: str = option("output", "folder of checkpoints, runs and the profile")
    resume: bool = option(False, "go on from the newest checkpoint in the output, if there is one")
    steps: int = option(1000, "steps of the optimizer")
    batch_size: int = option(32, "items of a micro-batch, those of all processes together")
    accumulate: int = option(1, "micro-batches of a step")
    workers: int = option(0, "further processes that load data, for each that trains")

    learning_rate: float = option(3e-3, "the highest one")
    schedule: Literal["constant", "cosine", "step", "exponential", "plateau"] = option(
        "cosine", "how the learning rate falls after the warm-up"
    )
    warmup: int = option(50, "steps in which the learning rate rises")
    decay: float = option(0.3, "factor of a decay (step, exponential, plateau)")
    decay_every: int = option(300, "steps of a decay (step, exponential)")
    plateau_patience: int = option(2, "validations without improvement that are no plateau yet")
    clip: float = option(1.0, "largest norm of all gradients; inf for no limit")

    precision: Literal["float32", "bfloat16", "float16"] = option("float32", "of matrix products")
    compile: str = option("", "backend of torch.compile, such as inductor; none without")
    device: str = option("", "such as cpu; a GPU without, where there is one")
    seed: int = option(0, "of weights, order of the data, and dropout")
    deterministic: bool = option(False, "refuse algorithms that may give other bits each time")

    validate_every: int = option(100, "steps between two validations")
    patience: int = option(0, "validations without improvement before an early stop; 0 for never")
    save_every: int = option(100, "steps between two checkpoints")
    keep: int = option(2, "latest checkpoints that are kept, beside the best one; 0 for all")

    monitor_every: int = option(10, "steps between two looks inside the model; 0 for no run")
    sink: tuple[str, ...] = option((), "where values go, too: wandb, tensorboard, mlflow, csv, ...")
    debug: bool = option(False, "train on a small part of the data")
    fast: bool = option(False, "one batch of training, one of validation: does everything run?")
    profile: bool = option(False, "write a profile of the steps 3 to 5 into the output")

    width: int = option(64, "of the model")
    layers: int = option(2, "of the model")
    length: int = option(64, "bytes of an item")
    dropout: float = option(0.1, "of the model")


# What to replace: data, model, losses, optimizer


def build_data(settings: Settings) -> tuple[Data, Data]:
    """What to train on and what to validate on: passages of text, and the same one byte later."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    passages = tokens.unfold(0, settings.length + 1, settings.length)
    items = TensorDataset(passages[:, :-1], passages[:, 1:])
    border = len(items) * 9 // 10
    return Subset(items, range(border)), Subset(items, range(border, len(items)))


class Block(nn.Module):
    """One layer of a transformer with heads of 16 channels; keeps the shape."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position of (batch, length, width) with those before, then transform each."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, -1, 16)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads.unbind(), is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        output: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return output


class Model(nn.Module):
    """Logits of the next byte, (batch, length, 256), at each of (batch, length) bytes."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, dropout = settings.width, settings.dropout
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(settings.length, width)
        self.blocks = nn.Sequential(*(Block(width, dropout) for _ in range(settings.layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict at each position."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.token(tokens) + self.position(positions))
        logits: Tensor = self.head(self.norm(x))
        return logits


def build_model(settings: Settings) -> nn.Module:
    """The model; its random numbers are those of ``--seed``."""
    return Model(settings)


def compute_losses(model: nn.Module, batch: Sequence[Tensor]) -> Losses:
    """What is minimised: a tensor, or the sum of several, in a tuple or by name.

    Each is a mean over the items of the batch, so that micro-batches and processes join to what one
    large batch gives.
    """
    tokens, targets = batch
    logits = model(tokens).float()
    return {
        "next_byte": functional.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        "normalizer": 1e-4 * logits.logsumexp(-1).square().mean(),  # keeps logits from drifting
    }


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; the learning rate is set at each step."""
    return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))


# How it is trained


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; the only one without it."""

    rank: int
    world: int
    device: torch.device

    @staticmethod
    def join(device: str = "") -> Processes:
        """Find the others; ``device`` is that of ``--device``."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return Processes(rank, world, torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means over all processes."""
        if self.world == 1:
            return dict(values)
        joined = torch.stack(list(values.values()))
        dist.all_reduce(joined)
        return dict(zip(values, joined / self.world, strict=True))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


@dataclass
class Progress:
    """How far it has come."""

    step: int = 0  # steps that were done
    best: float = math.inf  # loss of a validation
    bad_validations: int = 0  # since then
    plateau_scale: float = 1.0  # of the learning rate
    plateau_validations: int = 0  # without improvement, since the last decay

    def judge(self, loss: float, settings: Settings) -> bool:
        """Take in the loss of a validation; tell whether it is the best. NaN never is."""
        if loss < self.best:
            self.best, self.bad_validations, self.plateau_validations = loss, 0, 0
            return True
        self.bad_validations += 1
        self.plateau_validations += 1
        if self.plateau_validations > settings.plateau_patience:
            self.plateau_scale *= settings.decay
            self.plateau_validations = 0
        return False


def named(losses: Losses) -> dict[str, Tensor]:
    """The sum as ``loss``, and each of several as ``loss/name``, or ``loss/0`` in a tuple."""
    if isinstance(losses, Tensor):
        return {"loss": losses}
    pairs = losses.items() if isinstance(losses, Mapping) else enumerate(losses)
    found = {f"loss/{name}": loss for name, loss in pairs}
    return {"loss": torch.stack(list(found.values())).sum(), **found}


def learning_rate(settings: Settings, step: int, plateau_scale: float = 1.0) -> float:
    """The learning rate of a step, counted from 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    after = step - settings.warmup
    factors = {
        "constant": 1.0,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * after / max(1, settings.steps - settings.warmup)),
        "step": settings.decay ** (after // settings.decay_every),
        "exponential": settings.decay ** (after / settings.decay_every),
        "plateau": plateau_scale,
    }
    return settings.learning_rate * factors[settings.schedule]


def batches_of(order: Sequence[int], settings: Settings, world: int) -> list[Sequence[int]]:
    """Items in batches that all processes share equally; what is left over is not used."""
    size, length = len(order) // world * world, settings.batch_size // world * world
    return [order[start : min(start + length, size)] for start in range(0, size, length)]


def load(
    data: Data, batches: Sequence[Sequence[int]], settings: Settings, processes: Processes
) -> Iterator[list[Tensor]]:
    """The share of this process in each batch, on its device."""
    loader = DataLoader(
        data,
        batch_sampler=[batch[processes.rank :: processes.world] for batch in batches],
        num_workers=settings.workers,
        pin_memory=processes.device.type == "cuda",
        generator=torch.Generator(),  # its own, so that dropout does not depend on loading
    )
    for batch in loader:
        yield [tensor.to(processes.device, non_blocking=True) for tensor in batch]


def windows(data: Data, settings: Settings, processes: Processes, step: int) -> Iterator[Window]:
    """The micro-batches of each step from ``step`` on, without end.

    Their weights are their shares in the items of the step: those that end an epoch may be fewer.
    """
    per_epoch = len(batches_of(range(len(data)), settings, processes.world))
    steps_per_epoch = math.ceil(per_epoch / settings.accumulate)
    for epoch in count(step // steps_per_epoch):
        generator = torch.Generator().manual_seed(settings.seed + epoch)
        order = torch.randperm(len(data), generator=generator).tolist()
        done = max(0, step - epoch * steps_per_epoch) * settings.accumulate
        batches = batches_of(order, settings, processes.world)[done:]
        loaded = load(data, batches, settings, processes)
        for start in range(0, len(batches), settings.accumulate):
            window = batches[start : start + settings.accumulate]
            items = sum(map(len, window))
            yield [(next(loaded), len(batch) / items) for batch in window]


def autocast(settings: Settings, processes: Processes) -> torch.autocast:
    """Lower precision, where that is safe."""
    dtype = getattr(torch, settings.precision)
    return torch.autocast(processes.device.type, dtype, enabled=dtype != torch.float32)


def update(
    model: nn.Module, window: Window, training: Training, settings: Settings, processes: Processes
) -> dict[str, Tensor]:
    """One step of the optimizer; gives the losses, and the gradients' norm before clipping."""
    optimizer, scaler = training.optimizer, training.scaler
    values: dict[str, Tensor] = {}
    for number, (batch, weight) in enumerate(window, 1):
        # Processes exchange gradients once, in the last backward pass.
        waits = isinstance(model, DistributedDataParallel) and number < len(window)
        with model.no_sync() if waits else nullcontext():
            with autocast(settings, processes):
                losses = named(compute_losses(model, batch))
            scaler.scale(losses["loss"] * weight).backward()
        for key, loss in losses.items():
            values[key] = values.get(key, 0) + loss.detach() * weight
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return {**processes.mean(values), "gradient_norm": norm}


@torch.no_grad()
def validate(
    model: nn.Module, data: Data, settings: Settings, processes: Processes
) -> dict[str, Tensor]:
    """The losses on data that is not trained on, means over its items."""
    batches = batches_of(range(len(data)), settings, processes.world)
    items = sum(map(len, batches))
    values: dict[str, Tensor] = {}
    model.eval()
    for indices, batch in zip(batches, load(data, batches, settings, processes), strict=True):
        with autocast(settings, processes):
            losses = named(compute_losses(model, batch))
        for key, loss in losses.items():
            values[f"val/{key}"] = values.get(f"val/{key}", 0) + loss * (len(indices) / items)
    model.train()
    return processes.mean(values)


# Checkpoints


@dataclass
class Training:
    """All that a checkpoint holds; ``run`` is the id of the run."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    run: str | None = None

    def save(self, settings: Settings, processes: Processes, names: Sequence[str]) -> None:
        """Write checkpoints, each whole or not at all, and remove old ones. All processes call."""
        state = {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "random": processes.gather(random_state(processes.device)),
            "run": self.run,
            "settings": asdict(settings),
        }
        for name in names if processes.is_main else ():
            path = Path(settings.output, "checkpoints", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".partial")
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            for old in checkpoints(settings)[: -settings.keep]:
                old.unlink()

    def load(self, path: Path, processes: Processes) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress, self.run = Progress(**state["progress"]), state["run"]
        if processes.rank < len(state["random"]):  # fewer processes may have written it
            set_random_state(state["random"][processes.rank], processes.device)


def checkpoints(settings: Settings) -> list[Path]:
    """The latest checkpoints, oldest first; ``best.pt`` lies beside them."""
    found = Path(settings.output, "checkpoints").glob("step-*.pt")
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))


def random_state(device: torch.device) -> dict[str, Any]:
    """What ``set_random_state`` takes, to let the same numbers be drawn again."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go back to a ``random_state``."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# All together


def train(settings: Settings, processes: Processes) -> Training:
    """Train as the settings say; gives what came out.

    Raises:
        FileExistsError: if the output holds checkpoints, and ``resume`` is not set.
    """
    if settings.fast:
        output = str(Path(settings.output, "fast"))
        settings = replace(settings, output=output, steps=1, accumulate=1, resume=False)
    known = checkpoints(settings)
    if known and not (settings.resume or settings.fast):
        raise FileExistsError(f"{known[-1]} exists: give --resume, or another --output")
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    train_data, val_data = build_data(settings)
    if settings.debug or settings.fast:
        items = range(settings.batch_size * (1 if settings.fast else 8))
        train_data, val_data = Subset(train_data, items), Subset(val_data, items)

    torch.manual_seed(settings.seed)  # the same weights in all processes
    module = build_model(settings).to(processes.device)
    optimizer = build_optimizer(module, settings)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=settings.precision == "float16")
    training = Training(module, optimizer, scaler, Progress())
    random.seed(settings.seed + processes.rank)
    torch.manual_seed(settings.seed + processes.rank)  # but dropout of its own in each
    if settings.resume and known:
        training.load(known[-1], processes)
    progress = training.progress

    # What compiles and what distributes share the parameters of the module, which is what is saved.
    compiled = torch.compile(module, backend=settings.compile) if settings.compile else module
    model = DistributedDataParallel(compiled) if processes.world > 1 else compiled
    with recording(settings, training) as run, profiling(settings, processes) as profile:
        if run:
            spec = tmm.default_spec(settings.monitor_every)
            watched = scaler if scaler.is_enabled() else None
            run.watch(model, spec, optimizer=optimizer, scaler=watched)  # tmm
            training.run = run.id
        if not progress.step:
            training.save(settings, processes, ["step-0000000.pt"])
        ahead = windows(train_data, settings, processes, progress.step)
        for window in islice(ahead, max(0, settings.steps - progress.step)):
            rate = learning_rate(settings, progress.step, progress.plateau_scale)
            for group in optimizer.param_groups:
                group["lr"] = rate
            values = update(model, window, training, settings, processes)
            progress.step += 1
            is_last, names = progress.step == settings.steps, []
            if is_last or progress.step % settings.validate_every == 0:
                with run.monitor.no_monitor() if run else nullcontext():  # tmm
                    values |= validate(compiled, val_data, settings, processes)
                if progress.judge(values["val/loss"].item(), settings):
                    names.append("best.pt")
                if processes.is_main:
                    shown = (f"{key} {value.item():.4f}" for key, value in values.items())
                    print(f"step {progress.step}:", ", ".join(shown), flush=True)
            if run:
                run.log({"learning_rate": rate, **values})  # tmm
                run.step()  # tmm
            if is_last or progress.step % settings.save_every == 0:
                names.append(f"step-{progress.step:07}.pt")
            if names:
                training.save(settings, processes, names)
            if profile:
                profile.step()
            if 0 < settings.patience <= progress.bad_validations:
                if run:
                    run.stop_early(f"{settings.patience} validations without improvement")  # tmm
                break
    return training


def recording(settings: Settings, training: Training) -> Any:
    """The run, which goes on where the checkpoint was; that of the main process is written."""
    if not settings.monitor_every:
        return nullcontext()
    return tmm.start_run(  # tmm
        "train",
        config=asdict(settings),
        root=Path(settings.output, "runs"),
        resume=training.run,
        step=training.progress.step,
        sinks=settings.sink,
    )


def profiling(settings: Settings, processes: Processes) -> Any:
    """A profiler of three steps, where one is asked for."""
    if not (processes.is_main and settings.profile):
        return nullcontext()
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(f"{settings.output}/trace.json"),
    )


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The settings of a command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    kinds = get_type_hints(Settings)
    for setting in fields(Settings):
        kind, options = kinds[setting.name], dict(setting.metadata, default=setting.default)
        if kind is bool:
            options |= {"action": "store_true"}
        elif get_origin(kind) is tuple:
            options |= {"action": "append", "default": []}
        elif get_origin(kind) is Literal:
            options |= {"choices": get_args(kind)}
        else:
            options |= {"type": kind}
        parser.add_argument(f"--{setting.name.replace('_', '-')}", **options)
    found = vars(parser.parse_args(arguments))
    return Settings(**found | {"sink": tuple(found["sink"])})


def main() -> None:
    """Train as the command line says."""
    settings = parse()
    processes = Processes.join(settings.device)
    try:
        train(settings, processes)
    finally:
        if processes.world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
