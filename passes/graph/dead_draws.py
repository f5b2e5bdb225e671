"""Random numbers that nobody uses: a compiler drops them, and measuring must not bring them back.

AOTAutograd leaves out each operation that no output of a graph and no overwritten input depends
on, draws of random numbers among them. A row of what depends on such a draw would keep it alive,
and all later draws of the training would be others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional

from tmm.core.torch_private import (
    FakeTensor,
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    tree_leaves,
    tree_map,
)
from tmm.passes.graph.dropout_functions import bind
from tmm.passes.graph.edits import example_like
from tmm.passes.graph.mutation import overwritten_by
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.taps import is_mark
from tmm.passes.graph.values import value_of

# What takes no more than the shape, dtype and device of its arguments; of the others but the first.
_LIKE = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
_SHAPED = (
    *(*_LIKE, "randint_like", "new_zeros", "new_ones", "new_empty", "new_full"),
    *("new_empty_strided", "broadcast_tensors", "meshgrid"),
)
_SHAPED_BY_OTHERS = ("expand_as", "view_as", "reshape_as", "type_as", "to", "resize_as_")

_FILLING = (
    *("copy_", "zero_", "fill_", "bernoulli_", "cauchy_", "exponential_", "geometric_"),
    *("log_normal_", "normal_", "random_", "uniform_"),
)
_NORMALIZATIONS: dict[object, str] = {
    functional.batch_norm: "training",
    functional.instance_norm: "use_input_stats",
}
_KNOWN_NAMESPACES = ("aten", "prims", "prim")


def marks_of_dead_draws(module: GraphModule) -> tuple[tuple[GraphModule, Node], ...]:
    """The marks of tensors that depend on random numbers which nothing else depends on.

    Each comes with its graph, ``module`` or one nested in it. Where it is not certain that a
    compiler keeps a draw, as of what gives away its shape only, it counts as dropped.
    """
    dead: set[Node] = set()  # operations that nothing depends on, and marks of such tensors
    _find_dead(module, lambda position: True, lambda position: True, dead)
    draws = {node for node in dead if not is_mark(node) and _draws(node)}
    found = _marks(module, draws, (), set()) if draws else ()
    return tuple((graph, mark) for graph, mark in found if mark in dead)


# Backwards: what is used


def _find_dead(
    module: GraphModule,
    is_used: Callable[[int], bool],
    is_read: Callable[[int], bool],
    dead: set[Node],
) -> tuple[bool, ...]:
    """Add what no used output depends on to ``dead``; tells which inputs one depends on.

    What is written to an input counts as an output where ``is_read`` says so of its position.
    """
    bodies = dict(nested_calls(module))
    used: set[Node] = set()
    read: set[int] = set()  # the memory that something later reads
    placeholders = module.graph.find_nodes(op="placeholder")
    given = _memory(n for i, n in enumerate(placeholders) if is_read(i))
    given |= _memory(module.graph.find_nodes(op="get_attr"))
    changed: set[int] = set()
    unread: list[Node] = []

    def use(nodes: Iterable[Node]) -> None:
        for node in nodes:
            used.add(node)
            read.update(_memory([node]))

    for node in reversed(module.graph.nodes):
        if node.op == "output":
            (returned,) = node.args
            assert isinstance(returned, (tuple, list))
            use(n for i, n in enumerate(returned) if isinstance(n, Node) and is_used(i))
        if is_mark(node) and not _is_within(_memory(node.all_input_nodes), read):
            unread.append(node)
        if node.op in ("output", "placeholder", "get_attr") or is_mark(node):
            continue
        target = _overwritten(node)
        written = _memory([target] if target is not None else ())
        changed |= written
        is_needed = node in used or bool(written & (read | given))
        if node in bodies and returns_body_outputs(node):
            positions = {user.args[1] for user in node.users if user in used}
            operands, needed = _operands(node), read | given
            later = [bool(_memory([operand]) & needed) for operand in operands]
            inputs = _find_dead(bodies[node], positions.__contains__, later.__getitem__, dead)
            use(n for n, is_input_used in zip(operands, inputs, strict=True) if is_input_used)
        elif not is_needed:
            dead.add(node)
        elif target is not None and _fills(node):
            if _is_whole(target):
                read -= written
                used = {n for n in used if not _is_within(_memory([n]), written)}
            use(n for n in _inputs_of_value(node) if n is not target)
        else:
            use(_inputs_of_value(node))
    for mark in unread:
        tensors = mark.all_input_nodes
        if not used.issuperset(tensors) or _memory(tensors) & changed:
            dead.add(mark)
    return tuple(node in used for node in placeholders)


def _operands(call: Node) -> list[Node]:
    """What a call of a nested graph hands to it."""
    return [argument for argument in call.args[1:] if isinstance(argument, Node)]


def _inputs_of_value(node: Node) -> list[Node]:
    """The arguments whose elements the result depends on, not only their shape."""
    if not _tensors(node) and _overwritten(node) is None:
        return []  # a size, or a number
    name = str(getattr(node.target, "__name__", node.target))
    if name in _SHAPED:
        return []
    return node.all_input_nodes[:1] if name in _SHAPED_BY_OTHERS else node.all_input_nodes


def _overwritten(node: Node) -> Node | None:
    """The tensor that a node overwrites; of a normalization, its running statistics."""
    if node.op == "call_function" and (flag := _NORMALIZATIONS.get(node.target)):
        arguments = bind(node.target, node.args, node.kwargs)
        statistics = arguments.get("running_mean")
        return statistics if arguments.get(flag) is True and isinstance(statistics, Node) else None
    return overwritten_by(node)


def _fills(node: Node) -> bool:
    """Whether nothing is left of what was in the tensor that a node overwrites."""
    if node.target is operator.setitem:
        return node.args[1] in (Ellipsis, slice(None, None, None))
    return node.target in _FILLING or "out" in node.kwargs


def _is_whole(node: Node) -> bool:
    """Whether a tensor is all that lies in its memory."""
    example = value_of(node)
    if not isinstance(example, FakeTensor):
        return False
    size = example.untyped_storage().nbytes()
    return isinstance(size, int) and size == example.numel() * example.element_size()


# Forwards: what depends on a draw


def _marks(
    module: GraphModule, draws: set[Node], inputs: Iterable[Node], returned: set[int]
) -> Iterator[tuple[GraphModule, Node]]:
    """The marks of what depends on ``draws`` or ``inputs``; adds the outputs that do."""
    bodies = dict(nested_calls(module))
    drawn = set(inputs)
    memory = _memory(drawn)
    of_calls: dict[Node, set[int]] = {}
    for node in module.graph.nodes:
        depends = node in draws or bool(drawn & {*node.all_input_nodes})
        depends = depends or bool(memory & _memory(node.all_input_nodes))
        if node.op == "output":
            (values,) = node.args
            assert isinstance(values, (tuple, list))
            returned |= {
                i for i, n in enumerate(values) if n in drawn or memory & _memory(_nodes([n]))
            }
        elif is_mark(node):
            if depends:
                yield module, node
        elif node in bodies and returns_body_outputs(node):
            body, positions = bodies[node], of_calls.setdefault(node, set())
            places = zip(_operands(node), body.graph.find_nodes(op="placeholder"), strict=True)
            given = [place for operand, place in places if _memory([operand]) & memory]
            yield from _marks(body, draws, given, positions)
        elif node.target is operator.getitem and node.args[0] in of_calls:
            if node.args[1] in of_calls[node.args[0]]:
                drawn.add(node)
                memory |= _memory([node])
        elif depends:
            drawn.add(node)
            memory |= _memory([node])
            if (target := _overwritten(node)) is not None:
                memory |= _memory([target])


def _nodes(values: Iterable[object]) -> list[Node]:
    return [value for value in values if isinstance(value, Node)]


def _is_within(memory: set[int], others: set[int]) -> bool:
    return bool(memory) and memory <= others


def _memory(nodes: Iterable[Node]) -> set[int]:
    """The memory that the tensors of these nodes lie in."""
    return {
        tensor.untyped_storage()._cdata
        for node in nodes
        for tensor in _plain_tensors(_tensors(node))
        if isinstance(tensor, FakeTensor) and tensor.layout is torch.strided
    }


def _tensors(node: Node) -> list[torch.Tensor]:
    leaves = tree_leaves(value_of(node))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _plain_tensors(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors that wrappers, such as a ``DTensor``, are made of."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            yield from _plain_tensors(getattr(tensor, name) for name in names)
        else:
            yield tensor


# Whether an operation draws


def _draws(node: Node) -> bool:
    """Whether an operation may draw random numbers: tried out on tensors without elements."""
    tensors = [t for t in tree_leaves(value_of(node)) if isinstance(t, FakeTensor)]
    if not tensors:
        return False
    if node.op not in ("call_function", "call_method"):
        return True
    watch = _WatchDraws()
    shapes = tensors[0].fake_mode.shape_env
    args, kwargs = map_arg((node.args, node.kwargs), _example)
    try:
        with tensors[0].fake_mode, watch:
            if shapes is None:
                _call(node, args, kwargs)
            else:
                with shapes.suppress_guards():
                    _call(node, args, kwargs)
    except Exception:
        return True  # not known, as of operators that call graphs
    return watch.has_seen_one


def _example(node: Node) -> Any:
    return tree_map(example_like, value_of(node))


def _call(node: Node, args: Any, kwargs: Mapping[str, Any]) -> None:
    if node.op == "call_method":
        getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        assert callable(node.target)
        node.target(*args, **kwargs)


class _WatchDraws(TorchDispatchMode):
    """Sees whether an operation draws; one of a library that is not torch's might."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_seen_one = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_known = func.namespace in _KNOWN_NAMESPACES
        if not is_known or torch.Tag.nondeterministic_seeded in func.tags:
            self.has_seen_one = True
        return func(*args, **(kwargs or {}))
