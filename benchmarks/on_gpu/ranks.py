"""What tmm does to trainings on several GPUs: over NCCL, or with ``--device cpu`` over gloo.

    torchrun --nproc-per-node 4 -m benchmarks.on_gpu.ranks
    torchrun --nproc-per-node 2 -m benchmarks.on_gpu.ranks --device cpu

Of each way of splitting a model it says whether losses and parameters are bitwise those without
tmm, how many collectives the groups of the training begin on steps that are measured and that are
not, with tmm and without, and how often a step that is not measured waits for the device. It ends
with 1 if tmm changes anything of these, but for collectives of measured steps.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import tmm

STEPS, EVERY, WARM, WIDTH, BLOCKS = 10, 2, 4, 256, 3


class Block(nn.Module):
    """A norm, and two layers that tensor parallel splits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to ``x`` is of its shape."""
        down: Tensor = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return x + down


def network(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*(Block() for _ in range(BLOCKS))).to(device)
    for block in net:
        block.compile(backend="aot_eager")  # Inductor's own choices are no matter here
    return net


def parallel(net: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    for block in net:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return net


def sharded(net: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    for block in net:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def ways(device: str) -> dict[str, Callable[[], nn.Module]]:
    """How the model is split; meshes of two dimensions take an even number of ranks, 4 or more."""
    size = dist.get_world_size()
    kind = torch.device(device).type
    line = init_device_mesh(kind, (size,))
    found: dict[str, Callable[[], nn.Module]] = {
        "DistributedDataParallel": lambda: DistributedDataParallel(network(device)),
        "fully_shard": lambda: sharded(network(device), line),
        "tensor parallel": lambda: parallel(network(device), line),
    }
    if size >= 4 and size % 2 == 0:
        mesh = init_device_mesh(kind, (size // 2, 2), mesh_dim_names=("data", "tp"))
        found["fully_shard x tensor parallel"] = lambda: sharded(
            parallel(network(device), mesh["tp"]), mesh["data"]
        )
        found["DistributedDataParallel x tensor parallel"] = lambda: DistributedDataParallel(
            parallel(network(device), mesh["tp"]), device_mesh=mesh["data"]
        )
    return found


@dataclass
class Trained:
    """Of each step the loss, the collectives that it began, and the waits for the device."""

    losses: list[float]
    collectives: list[int]
    waits: list[int]
    state: list[Tensor]


def begun(groups: list[dist.ProcessGroup]) -> int:
    return sum(group._get_sequence_number_for_group() for group in groups)


def train(model: nn.Module, device: str, spec: tmm.Spec | None) -> Trained:
    groups = list(dist.distributed_c10d._world.pg_map)  # those of the training
    parameters = list(model.parameters())
    called = model if spec is None else tmm.instrument(model, spec)
    monitor = None if spec is None else tmm.monitor(called)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    if monitor is not None:
        monitor.watch(optimizer)
    draws = torch.Generator(device).manual_seed(1)
    trained = Trained([], [], [], [])
    losses = []
    for step in range(STEPS):
        x = torch.randn(16, WIDTH, generator=draws, device=device)
        before = begun(groups)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            set_waits(device, "warn")
            if monitor is not None:
                monitor.begin_step(step)
            loss = called(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.end_step()
            set_waits(device, "default")
        trained.waits.append(sum("synchroniz" in str(each.message) for each in caught))
        trained.collectives.append(begun(groups) - before)
        losses.append(loss.detach())
    if monitor is not None:
        tmm.remove(called)
    trained.losses = torch.stack(losses).tolist()
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    trained.state = [part.detach().clone() for part in parts]
    return trained


def set_waits(device: str, mode: str) -> None:
    """Let torch warn of what waits for the device."""
    if device.startswith("cuda"):
        torch.cuda.set_sync_debug_mode(mode)


def compared(name: str, build: Callable[[], nn.Module], device: str) -> bool:
    """Train without tmm and with it; whether nothing is other than it is to be."""
    spec = tmm.Spec(
        *(tmm.activation("rms", "std"), tmm.activation_gradient("rms"), tmm.gradient("norm")),
        *(tmm.parameter("rms"), tmm.update("relative_norm")),
        every=EVERY,
    )
    plain = train(build(), device, None)
    torch._dynamo.reset()
    found = train(build(), device, spec)
    torch._dynamo.reset()
    is_same = plain.losses == found.losses
    is_same = is_same and all(map(torch.equal, plain.state, found.state))
    between = [step for step in range(WARM, STEPS) if step % EVERY]
    measured = [step for step in range(WARM, STEPS) if step % EVERY == 0]
    more = [found.collectives[step] - plain.collectives[step] for step in between]
    more_measured = [found.collectives[step] - plain.collectives[step] for step in measured]
    waits = [found.waits[step] - plain.waits[step] for step in between]
    is_right = is_same and not any(more) and not any(wait > 0 for wait in waits)
    everywhere: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, is_right)
    if dist.get_rank() == 0:
        print(f"{name}: {'right' if all(everywhere) else 'WRONG'} on {len(everywhere)} ranks")
        print(f"  bitwise the training without tmm: {is_same}")
        print(f"  collectives of a step without tmm: {plain.collectives[WARM:]}")
        print(f"  more with tmm: measured {more_measured}, between {more}")
        print(f"  more waits for the device between: {waits}", flush=True)
    return all(everywhere)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device: str = parser.parse_args().device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device != "cpu" else "gloo")
    found = [compared(name, build, device) for name, build in ways(device).items()]
    dist.destroy_process_group()
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
