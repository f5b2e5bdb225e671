"""The plans of the graphs of a training step, forward and backward, for a mocked GPU.

The real programs are planned: Dynamo traces the step, tmm rewrites its graph, AOTAutograd
differentiates and splits it, and Inductor schedules and writes both halves. Only then does it end.
Tensors are those of this machine. While graphs are made of them, fake tensors tell Python that they
lie on ``cuda:0``; torch's own code in C++ takes them for what they are, as it has no GPUs here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from benchmarks.plan.account import Buffer
from benchmarks.plan.identity import identities, identity, name_nodes
from tmm.instrumentation import backend as measuring

GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class Computed:
    """What a launch of a Triton kernel computes, and what of it is stored, as identities of nodes.

    ``stored`` are those of buffers by name.
    """

    origins: frozenset[str]
    stored: Mapping[str, str]


@dataclass(frozen=True)
class OperatorCall:
    """A call of one of tmm's operators in a graph; its tensors are on the meta device."""

    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class GraphPlan:
    """What Inductor generates for one graph.

    ``sizes`` are its buffers by name, ``inputs`` its inputs in order, ``computed`` tells of each
    launch of a Triton kernel, ``operators`` are the calls of tmm's operators.
    """

    text: str
    sizes: Mapping[str, Buffer]
    inputs: Sequence[Buffer | int]
    computed: Sequence[Computed]
    operators: Sequence[OperatorCall]
    is_backward: bool


class _Planned(BaseException):
    """Ends the training step, past everything that catches exceptions."""


def plans_of(step: Callable[[], object], names: Mapping[int, str]) -> list[GraphPlan]:
    """The plans of the graphs that a training step compiles, up to its first backward graph.

    ``names`` are those of the tensors that the step reads, by their ``id``, so that the nodes of
    two programs can be told to be the same. In a process of its own, after ``mock_gpus``.
    """
    found: list[GraphPlan] = []
    with contextlib.suppress(_Planned), _captured(found, names):
        step()
    assert found, "nothing was compiled"
    assert found[-1].is_backward, "the step has no backward graph"
    return found


@contextlib.contextmanager
def _captured(found: list[GraphPlan], names: Mapping[int, str]) -> Iterator[None]:
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx
    from torch._inductor.codegen.triton import TritonScheduling
    from torch._inductor.graph import GraphLowering

    compile_graph = compile_fx.compile_fx
    joint_passes = compile_fx._recursive_joint_graph_passes
    written: Any = TritonScheduling.codegen_comment
    inputs: dict[str, str] = {}
    computed: list[Computed] = []

    def compiled(module: GraphModule, examples: Sequence[Any], *rest: Any, **options: Any) -> Any:
        inputs.update(_labels(examples, names))
        _choose_flash_attention(module)
        return compile_graph(module, examples, *rest, **options)

    def passed(module: GraphModule, *rest: Any, **options: Any) -> Any:
        _put_on_gpu(module)
        result = joint_passes(module, *rest, **options)
        name_nodes(result, inputs)
        return result

    def commented(self: Any, schedule: Any, kernel: str | None = None) -> None:
        computed.append(_computed(schedule))
        written(self, schedule, kernel)

    def ended(self: Any) -> Any:
        computed.clear()
        code, _ = self.codegen()
        text = getattr(code, "value", code)
        found.append(
            GraphPlan(
                text=text,
                sizes=_sizes(self),
                inputs=_inputs(self),
                computed=list(computed),
                operators=_operators(self),
                is_backward=bool(self.is_backward),
            )
        )
        if self.is_backward:
            raise _Planned
        return SimpleNamespace(call=None)

    with contextlib.ExitStack() as stack:
        for owner, name, function in (
            (compile_fx, "compile_fx", compiled),
            (compile_fx, "_recursive_joint_graph_passes", passed),
            (TritonScheduling, "codegen_comment", commented),
            (GraphLowering, "compile_to_module", ended),
            # What sites need of a GPU is planned by itself; what they need of a CPU is not built.
            (measuring, "compile_kernels", lambda module: None),
            (measuring, "start_compiling", lambda *sources: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        stack.enter_context(functorch_config.patch(force_non_lazy_backward_lowering=True))
        stack.enter_context(fake_tensors_on_gpu())
        yield


@contextlib.contextmanager
def fake_tensors_on_gpu() -> Iterator[None]:
    """Let fake tensors tell Python that they lie on a GPU, and be of the CPU for code in C++."""
    tells_device: Any = vars(FakeTensor)["device"].fget  # "meta" while an operation runs
    device_of = FakeTensor._normalize_fake_device

    def normalized(device: torch.device) -> torch.device:
        return device_of(torch.device("cpu") if device.type == GPU.type else device)

    def shown(self: FakeTensor) -> torch.device:
        device: torch.device = tells_device(self)
        return GPU if device.type == "cpu" else device

    with (
        mock.patch.object(FakeTensor, "_normalize_fake_device", staticmethod(normalized)),
        mock.patch.object(FakeTensor, "device", property(shown)),
        # What AOTAutograd wraps around them is asked as well, by what chooses by device.
        mock.patch.object(FunctionalTensor, "device", property(lambda self: GPU)),
    ):
        yield


def _labels(examples: Sequence[Any], names: Mapping[int, str]) -> dict[str, str]:
    """Names of the primals of a graph: of the tensor that is known, or of its kind and number."""
    found: dict[str, str] = {}
    seen: dict[str, int] = {}
    for index, example in enumerate(examples):
        label = names.get(id(example))
        if label is None and isinstance(example, torch.Tensor):
            kind = f"{example.dtype}{list(example.shape)}"
            seen[kind] = seen.get(kind, 0) + 1
            label = f"{kind} {seen[kind]}"
        found[f"primals_{index + 1}"] = label or str(index)
    return found


def _put_on_gpu(module: GraphModule) -> None:
    """Let tensors that operations in C++ make lie where what they are made from seems to lie."""

    def moved(argument: Any) -> Any:
        is_device = isinstance(argument, torch.device)
        return GPU if is_device and argument.type == "cpu" else argument

    for node in module.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(moved, (node.args, node.kwargs))


def _choose_flash_attention(module: GraphModule) -> None:
    """Let attentions become what torch chooses on a GPU: this build of it has no such choice."""
    for part in module.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                if node.target is torch._C._nn.scaled_dot_product_attention:
                    node.target = _flash_attention
            part.recompile()


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is not None or enable_gqa:
        raise NotImplementedError("only attentions without a mask, with as many keys as queries")
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    output: torch.Tensor = attend(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return output


def _computed(schedule: Any) -> Computed:
    nodes = [one.node for one in schedule if getattr(one, "node", None) is not None]
    origins: set[Node] = set()
    stored: dict[str, str] = {}
    for node in nodes:
        origins |= set(node.origins)
        origin = node.get_origin_node() or max(node.origins, default=None)
        if origin is not None:  # it may write to a buffer that has another name
            names = (node.get_name(), *node.get_mutation_names())
            stored |= dict.fromkeys(names, identity(origin))
    return Computed(identities(origins), stored)


def _sizes(graph: Any) -> dict[str, Buffer]:
    found = {}
    for name, buffer in graph.name_to_buffer.items():
        layout = buffer.maybe_get_layout() if hasattr(buffer, "maybe_get_layout") else buffer.layout
        if getattr(layout, "size", None) is not None and getattr(layout, "dtype", None) is not None:
            found[name] = _buffer(layout.size, layout.dtype)
    for name, tensor in graph.constants.items():
        found[name] = _buffer(tensor.shape, tensor.dtype)
    return found


def _inputs(graph: Any) -> list[Buffer | int]:
    return [
        _buffer(given.get_size(), given.get_dtype()) if hasattr(given, "get_size") else int(given)
        for given in (graph.graph_inputs[name] for name in graph.graph_input_names)
    ]


def _buffer(size: Sequence[Any], dtype: torch.dtype) -> Buffer:
    return Buffer(tuple(map(int, size)), dtype.itemsize)


def _operators(graph: Any) -> list[OperatorCall]:
    found = []
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "tmm":
            arguments = torch.fx.node.map_arg((node.args, node.kwargs), _on_meta)
            (positional, named) = arguments
            name = node.target.overloadpacket.__name__
            found.append(OperatorCall(name, (*positional, *named.values())))
    return found


def _on_meta(node: Node) -> Any:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return value
    with unset_fake_temporarily():
        return torch.empty_strided(
            *(tuple(map(int, sizes)) for sizes in (value.shape, value.stride())),
            dtype=value.dtype,
            device="meta",
        )
