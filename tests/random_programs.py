"""Random small programs: source text of modules, and what a training step of them leaves behind.

A seed makes a program. It has control flow, containers, views, in-place operations, checkpoints,
blocks without gradients, random numbers, results that nobody uses and, in some, graph breaks.
"""

from __future__ import annotations

import linecache
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tmm
from tests.eager_hooks import walk
from tests.model_zoo import noise

WIDTH = 4
CHANNELS, SIDE = 2, 2  # an image of a vector: CHANNELS * SIDE is its width


class Image(nn.Module):
    """Applies a module for images to vectors."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.reshape(-1, CHANNELS, SIDE, 1)).reshape(-1, WIDTH)


class Part(nn.Module):
    """Gives back its input, or a part of it, by way of ``of``."""

    def __init__(self, of: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: torch.Tensor) -> Any:
        return self.of(x)


def first(output: Any) -> torch.Tensor:
    """The first tensor of an output."""
    while not isinstance(output, torch.Tensor):
        output = output[0] if isinstance(output, (tuple, list)) else output["a"]
    return output


LEAVES = (
    *("nn.Linear(WIDTH, WIDTH)", "nn.Linear(WIDTH, WIDTH)", "nn.Linear(WIDTH, WIDTH, bias=False)"),
    *("Image(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))", "Image(nn.BatchNorm2d(CHANNELS))"),
    *("nn.BatchNorm1d(WIDTH)", "nn.LayerNorm(WIDTH)", "Image(nn.GroupNorm(1, CHANNELS))"),
    *("nn.RMSNorm(WIDTH)", "nn.ReLU()", "nn.GELU()", "nn.Tanh()", "nn.Softmax(dim=-1)"),
    *("nn.Dropout(0.3)", "nn.Dropout(0.3)", "Image(nn.Dropout2d(0.3))", "nn.AlphaDropout(0.3)"),
    *("nn.Dropout(0.0)", "nn.RReLU()", "nn.Identity()", "nn.Sequential()"),
    "nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.Tanh())",
    *("Part(lambda x: (x, {'a': x * 2}))", "Part(lambda x: x.detach())", "Part(lambda x: x[:])"),
    *("Part(lambda x: [x.view(-1, 2).view(-1, WIDTH)])", "Part(lambda x: (x, x.argmax(-1)))"),
)
IN_PLACE_LEAVES = (
    *("nn.ReLU(inplace=True)", "nn.LeakyReLU(inplace=True)", "nn.Hardtanh(inplace=True)"),
    *("nn.Dropout(0.3, inplace=True)", "Part(lambda x: x.add_(0.5))"),
)
EXPRESSIONS = (
    *("{a} + {b}", "{a} * 0.5", "{a} - {b}.mean()", "torch.cat([{a}[:, :2], {b}[:, 2:]], 1)"),
    *("{a}.flip(1)", "torch.where({b} > 0, {a}, {b})", "{a} * torch.zeros_like({b})"),
    *("{a}.t().contiguous().t()", "torch.stack([{a}, {b}]).sum(0)", "{a}.clamp(-1, 1) + {a}"),
)
VIEWS = (
    *("{a}[:]", "{a}.view(-1).view(-1, WIDTH)", "{a}.detach()", "{a}.view_as({b})"),
    *("{a}.unflatten(1, (2, 2)).flatten(1)", "torch.cat({a}.chunk(2, 1), 1)", "{a}.t().t()"),
)
DRAWS = (
    *("{a} + torch.rand_like({b})", "functional.dropout({a}, 0.4)", "{a} * torch.rand(WIDTH)"),
    *("torch.bernoulli({a}.sigmoid())", "functional.gumbel_softmax({a})"),
    *("{a} + torch.empty(WIDTH).normal_()", "functional.rrelu({a}, training=True)"),
    "{a} + torch.multinomial({b}.softmax(-1), 1)",
)
CHANGES = (
    *("{a}.add_(1)", "{a}.mul_(0.5)", "{a}[:, :1].mul_(2)", "{a}.relu_()", "{a}.add_({b})"),
    *("{a}[:, 1] = {b}[:, 0]", "{a}.copy_({b})", "{a}.zero_()", "{a}.detach().add_(0.1)"),
    *("{a}.uniform_()", "{a} += 1", "self.seen.add_({a}.detach().mean())"),
)
# Not inference_mode: what fails under it inside AOTAutograd leaves torch unusable.
WITHOUT_GRADIENT = (
    *("torch.no_grad()", "torch.no_grad()", "torch.set_grad_enabled(False)", "torch.enable_grad()"),
    "torch.autocast('cpu', enabled=False)",
)
RETURNS = ("{a}", "{a}, {b}", "[{a}, {b}]", "{{'a': {a}, 'b': ({b}, None)}}", "{a}, {a}", "{a}, x")


@dataclass(frozen=True)
class Program:
    """A module's source, and how a step of it goes: batches of these sizes, in training or not."""

    seed: int
    source: str
    sizes: tuple[int, ...]
    training: bool
    input_requires_grad: bool
    breaks: bool
    changes_in_place: bool

    def build(self, record: Callable[..., None] = tmm.record) -> nn.Module:
        """The module, with the parameters that the seed gives."""
        name = f"<program {self.seed}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        known = {
            "torch": torch,
            "nn": nn,
            "functional": functional,
            "checkpoint": checkpoint,
            "Image": Image,
            "Part": Part,
            "first": first,
            "record": record,
            "WIDTH": WIDTH,
            "CHANNELS": CHANNELS,
        }
        exec(compile(self.source, name, "exec"), known)
        torch.manual_seed(self.seed)
        module: nn.Module = known["Net"]()  # type: ignore[operator]
        return module.train(self.training)

    def batches(self) -> list[torch.Tensor]:
        """The inputs of a step."""
        return [noise(size, WIDTH, seed=index) for index, size in enumerate(self.sizes)]


def program(seed: int) -> Program:
    """The program that a seed makes."""
    choose = random.Random(seed)
    in_place, breaks = choose.random() < 0.5, choose.random() < 0.3
    classes = [
        _Class(name, choose, inner, in_place, breaks).text()
        for name, inner in (("Inner", ()), ("Outer", ("Inner",)), ("Net", ("Inner", "Outer")))
    ]
    return Program(
        seed,
        "\n\n".join(classes),
        tuple(choose.choice([(3,), (3,), (2, 4), (4, 4)])),
        choose.random() < 0.85,
        choose.random() < 0.5,
        breaks,
        in_place,
    )


@dataclass
class _Class:
    """Writes a module: the children that its statements call, and the statements."""

    name: str
    choose: random.Random
    inner: tuple[str, ...]
    in_place: bool
    breaks: bool
    children: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=lambda: ["x"])
    count: int = 0

    def text(self) -> str:
        self._write("y0 = self.enter(x)", "")
        self.values.append("y0")
        for _ in range(self.choose.randint(2, 6)):
            self._statement("")
        result = self.choose.choice(RETURNS).format(a=self.values[-1], b=self._value())
        self._write(f"return {result}", "")
        children = [f"        self.m{i} = {child}" for i, child in enumerate(self.children)]
        return "\n".join([
            f"class {self.name}(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            "        self.enter = nn.Linear(WIDTH, WIDTH)",
            "        self.register_buffer('seen', torch.zeros(()))",
            *children,
            "    def forward(self, x):",
            *self.lines,
        ])  # fmt: skip

    def _statement(self, indent: str) -> None:
        kinds = [
            *[self._call] * 6,
            *[self._compute] * 4,
            *[self._draw, self._unused, self._view, self._record, self._repeat, self._branch],
            *[self._without_gradient, self._checkpoint] * 2,
        ]
        if self.in_place:
            kinds += [self._change] * 4
        if self.breaks:
            kinds += [self._break]
        self.choose.choice(kinds)(indent)

    def _write(self, line: str, indent: str) -> None:
        self.lines.append(f"        {indent}{line}")

    def _value(self) -> str:
        return self.choose.choice(self.values[-4:])

    def _assign(self, expression: str, indent: str) -> str:
        self.count += 1
        name = f"y{self.count}"
        self._write(f"{name} = {expression}", indent)
        self.values.append(name)
        return name

    def _filled(self, forms: tuple[str, ...]) -> str:
        return self.choose.choice(forms).format(a=self._value(), b=self._value())

    def _child(self) -> str:
        if self.children and self.choose.random() < 0.15:
            return f"self.m{self.choose.randrange(len(self.children))}"
        leaves = LEAVES + (IN_PLACE_LEAVES if self.in_place else ())
        kinds = [self.choose.choice(leaves)] * 3 + [f"{name}()" for name in self.inner]
        self.children.append(self.choose.choice(kinds))
        return f"self.m{len(self.children) - 1}"

    def _call(self, indent: str) -> None:
        self._assign(f"first({self._child()}({self._value()}))", indent)

    def _unused(self, indent: str) -> None:
        call = f"{self._child()}({self._value()})"
        self._write(self.choose.choice([call, call, self._filled(DRAWS)]), indent)

    def _compute(self, indent: str) -> None:
        self._assign(self._filled(EXPRESSIONS), indent)

    def _view(self, indent: str) -> None:
        self._assign(self._filled(VIEWS), indent)

    def _draw(self, indent: str) -> None:
        self._assign(self._filled(DRAWS), indent)

    def _change(self, indent: str) -> None:
        self._write(self._filled(CHANGES), indent)

    def _record(self, indent: str) -> None:
        self._write(f"record('{self.name}.{len(self.lines)}', {self._value()})", indent)

    def _repeat(self, indent: str) -> None:
        child, name = self._child(), self._assign(self._value(), indent)
        self._write(f"for _ in range(2): {name} = first({child}({name})) * 0.5", indent)

    def _branch(self, indent: str) -> None:
        test = self.choose.choice(["self.training", "x.shape[0] > 2", "x.requires_grad"])
        name = self._assign(self._value(), indent)
        self._write(f"if {test}:", indent)
        self._write(f"    {name} = first({self._child()}({name}))", indent)
        self._write(f"else: {name} = {self._filled(EXPRESSIONS)}", indent)

    def _without_gradient(self, indent: str) -> None:
        if len(indent) > 4:
            return
        self._write(f"with {self.choose.choice(WITHOUT_GRADIENT)}:", indent)
        for _ in range(self.choose.randint(1, 2)):
            self.choose.choice([self._call, self._call, self._compute, self._unused])(
                indent + "    "
            )
        if self.choose.random() < 0.4:
            self._without_gradient(indent + "    ")

    def _checkpoint(self, indent: str) -> None:
        reentrant = self.choose.random() < 0.15
        call = f"checkpoint({self._child()}, {self._value()}, use_reentrant={reentrant})"
        self._assign(f"first({call})", indent)

    def _break(self, indent: str) -> None:
        self._write("torch._dynamo.graph_break()", indent)


def step(
    program: Program, module: nn.Module, callee: Callable[[torch.Tensor], Any]
) -> dict[str, torch.Tensor | None]:
    """All that a training step of a program leaves behind, by name."""
    left: dict[str, torch.Tensor | None] = {}
    torch.manual_seed(program.seed + 1)
    for index, batch in enumerate(program.batches()):
        leaf = batch.clone().requires_grad_(program.input_requires_grad)
        given = leaf * 1
        outputs = [tensor for _, tensor in walk(callee(given))]
        backward(outputs)
        tensors = [*outputs, given]
        for changed in range(-1, len(tensors)):
            if changed >= 0:
                with torch.no_grad():
                    tensors[changed].add_(1)  # what shares memory with it changes with it
            for place, tensor in enumerate(tensors):
                left[f"batch {index}, tensor {place}, {changed}"] = tensor.detach().clone()
        for place, tensor in enumerate(outputs):
            left[f"batch {index}, gradient required {place}"] = torch.tensor(tensor.requires_grad)
        left[f"batch {index}, gradient of the input"] = leaf.grad
    left |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    left |= {f"buffer {name}": buffer for name, buffer in module.named_buffers()}
    left["random state"] = torch.get_rng_state()
    return left


def backward(outputs: list[torch.Tensor]) -> None:
    """A backward pass of a loss of all outputs that require a gradient."""
    losses = [t.double().square().sum() * (i + 1) for i, t in enumerate(outputs) if t.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
