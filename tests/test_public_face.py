"""What users see and store: public names with their signatures, and the keys of a fixed run."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import tmm
from tests.graphs import check_golden

PUBLIC = {
    *("tmm", "tmm.analysis", "tmm.examples", "tmm.integrations", "tmm.module_monitor"),
    *("tmm.sinks", "tmm.testing"),
}
"""Packages that users may import; what others hold may change with each version."""

FACES = ("LiveRun", "ModuleMonitor", "Monitor", "Run", "Spec")
"""Classes whose methods users call."""


def signature(name: str, thing: object) -> str:
    try:
        text = str(inspect.signature(thing))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return f"{name}: {type(thing).__name__}"
    return re.sub(r" at 0x[0-9a-f]+", "", f"{name}{text}")


def face() -> Iterator[str]:
    for name in sorted(tmm.__all__):
        thing = getattr(tmm, name)
        if inspect.ismodule(thing):
            yield f"{name}: module"
            continue
        yield signature(name, thing)
        if name not in FACES:
            continue
        for attribute, member in sorted(inspect.getmembers(thing)):
            is_method = inspect.isfunction(member)
            if not attribute.startswith("_") and (is_method or isinstance(member, property)):
                text = signature(attribute, member) if is_method else attribute
                yield f"    {name}.{text}"


def test_private_packages_say_so() -> None:
    root = Path(__file__).parent.parent
    for folder in ("tmm", "passes", "runtime"):
        for path in (root / folder).rglob("__init__.py"):
            name = ".".join(path.parent.relative_to(root).parts)
            says_so = (ast.get_docstring(ast.parse(path.read_text())) or "").startswith("Private: ")
            assert says_so == (name not in PUBLIC), name


def test_public_names_and_signatures() -> None:
    check_golden("public_api", "\n".join(face()) + "\n")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        attended: torch.Tensor = x + self.attention(y, y, y, need_weights=False)[0]
        tmm.record("attended", attended)
        return attended


def test_keys_of_a_run_of_everything(tmp_path: Path) -> None:
    """Stored runs hold these keys, and programs ask for them."""
    model = nn.Sequential(Block(), nn.Linear(8, 4))
    spec = tmm.Spec(
        tmm.activation("rms", "histogram", widest=lambda x: x.abs().amax(-1)),
        tmm.activation_gradient("norm"),
        tmm.activation_difference("relative_norm", "cosine"),
        tmm.attention("entropy", "max_logit", "rms"),
        tmm.rcc(operands=True),
        tmm.gradient("norm"),
        tmm.parameter("rms"),
        tmm.parameter_difference("relative_norm"),
        tmm.update("relative_norm"),
        tmm.optimizer_state("exp_avg_norm", "effective_lr"),
        reference="init",
    )
    optimizer = torch.optim.Adam(model.parameters())
    with tmm.start_run("p", "keys", root=tmp_path, system_seconds=None) as run:
        called = run.watch(torch.compile(model, backend="eager"), spec, optimizer=optimizer)
        for _ in range(2):
            called(torch.randn(2, 3, 8)).square().mean().backward()
            optimizer.step()
            run.log({"loss": 1.0})
            run.step(samples=2)
    with tmm.open_run(run.path) as recorded:
        lines = [
            f"{key} ({recorded.key_info(key).kind}: {recorded.key_info(key).site})"
            for key in recorded.keys()  # noqa: SIM118
        ]
    check_golden("keys_of_a_run", "\n".join(lines) + "\n")
