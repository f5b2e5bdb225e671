"""A graph as text: one line per node, and as Python that runs by itself."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from tmm.core.keys import key_of
from tmm.core.records import Site
from tmm.core.torch_private import CUSTOM_BUILTINS, OpOverload
from tmm.passes.graph.provenance import pass_of, sites_of
from tmm.passes.graph.subgraphs import nested_calls
from tmm.passes.graph.taps import call_of, is_mark
from tmm.passes.graph.values import module_of, value_of

_CONSTANT_LIMIT = 4096  # elements of a constant that are written out
_NUMPY_WRAPPERS = ("numpy_to_tensor_wrapper", "numpy_method_wrapper", "numpy_operator_wrapper")


@dataclass(frozen=True)
class NodeLine:
    """A node as a reader sees it.

    ``module`` is the module that the traced node belongs to, ``inserted_by`` the pass that
    inserted the node (empty for the traced program's own) and ``measures`` what for.
    """

    text: str
    module: str = ""
    inserted_by: str = ""
    measures: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.inserted_by:
            return self.text
        measures = f": {', '.join(self.measures)}" if self.measures else ""
        return f"{self.text}  # {self.inserted_by}{measures}"


def node_lines(
    module: GraphModule,
    names: Mapping[int, str] | None = None,
    *,
    taps: bool = False,
    indent: str = "",
) -> list[NodeLine]:
    """One line per node, nested graphs indented below their call.

    ``names`` gives the name of each module by its ``id``. Taps are left out unless asked for:
    they are marks, not computation.
    """
    bodies: dict[Node, list[GraphModule]] = {}
    for call, body in nested_calls(module):
        bodies.setdefault(call, []).append(body)
    lines = []
    for node in module.graph.nodes:
        if not taps and is_mark(node):
            continue
        lines.append(_line(node, names or {}, indent))
        for body in bodies.get(node, ()):
            lines += node_lines(body, names, taps=taps, indent=indent + "    ")
    return lines


def runnable_code(module: GraphModule) -> str:
    """Python source that defines ``graph``, a module that computes what ``module`` does.

    Constants of more than 4096 elements are left for the reader to fill in, and so is a callable
    that has no name to import it by.
    """
    needs = Needs({"import torch", "import tmm"}, {})
    classes = "\n\n\n".join(_classes(module, "Graph", needs))
    head = "\n".join([*sorted(needs.imports), *needs.definitions])
    return f"{head}\n\n\n{classes}\n\n\ngraph = Graph()\n"


def _line(node: Node, names: Mapping[int, str], indent: str) -> NodeLine:
    arguments = ", ".join(
        [_argument(argument) for argument in node.args]
        + [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    )
    result = f"%{node.name}{_type(value_of(node))} = "
    if node.op == "output":
        text = f"return {_argument(node.args[0])}"
    elif node.op == "placeholder":
        text = f"{result}input"
    elif node.op == "get_attr":
        text = f"{result}self.{node.target}"
    elif node.op == "call_module":
        text = f"{result}self.{node.target}({arguments})"
    elif node.op == "call_method":
        text = f"{result}.{node.target}({arguments})"
    else:
        text = f"{result}{_target(node)}({arguments})"
    measures = dict.fromkeys(site_label(family, site) for family, site in sites_of(node))
    return NodeLine(indent + text, _module(node, names), pass_of(node) or "", tuple(measures))


def _target(node: Node) -> str:
    try:
        return str(node._pretty_print_target(node.target))
    except Exception:  # it asks for names, which not every callable has
        return _written(node.target)


def _written(value: object) -> str:
    """``repr``, or the type of an object whose own one fails."""
    try:
        return repr(value)
    except Exception:  # an object of the user's
        return f"<a {type(value).__name__}>"


def _argument(value: object) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        items = ", ".join(map(_argument, value))
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, dict):
        items = ", ".join(f"{_written(key)}: {_argument(item)}" for key, item in value.items())
        return "{" + items + "}"
    return _written(value)


def _type(example: object) -> str:
    if isinstance(example, torch.Tensor):
        dtype = str(example.dtype).removeprefix("torch.")
        return f": {dtype}[{', '.join(map(str, example.shape))}]"
    return ""


def _module(node: Node, names: Mapping[int, str]) -> str:
    call = call_of(node)
    if call is None:
        return ""
    name = names.get(module_of(call), "")
    return name.removeprefix("//") or "[this module]"


def site_label(family: str, site: Site) -> str:
    """A site as a reader knows it, relative to the module whose frame was traced."""
    name = site.module.removeprefix("//") + site.path
    return key_of(family, name or "[this module]") if family else f"record {name!r}"


@dataclass(frozen=True)
class Needs:
    """What the text of a graph refers to: lines that import it, and then lines that define it."""

    imports: set[str]
    definitions: dict[str, None]


def _classes(module: GraphModule, name: str, needs: Needs) -> Iterator[str]:
    fields = []
    for node in module.graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        target = str(node.target)
        value = getattr(module, target)
        if isinstance(value, GraphModule):
            yield from _classes(value, f"{name}_{target}", needs)
            # Higher-order operators take graphs only.
            fields.append(f"        self.{target} = torch.fx.symbolic_trace({name}_{target}())")
        else:
            fields.append(f"        self.{target} = {_constant(value)}")
    lines = [f"class {name}(torch.nn.Module):"]
    if fields:
        lines += ["    def __init__(self):", "        super().__init__()"]
        lines += [*dict.fromkeys(fields), ""]
    lines += ["    " + line if line.strip() else "" for line in _forward(module.graph, needs)]
    yield "\n".join(lines)


def _forward(graph: Graph, needs: Needs) -> list[str]:
    code = graph.python_code("self")
    for name, value in code.globals.items():
        if name in CUSTOM_BUILTINS:
            needs.imports.add(CUSTOM_BUILTINS[name].import_str)
        elif name not in ("torch", "tmm"):
            _define(name, value, needs)
    return code.src.strip().splitlines()


def _define(name: str, value: object, needs: Needs) -> None:
    place = _place(value)
    if place is not None and "." not in place[1]:
        needs.imports.add(f"from {place[0]} import {place[1]} as {name}")
        return
    expression = _expression(value, needs)
    if expression is None:
        expression = f"None  # fill in: {' '.join(_written(value).split())}"
    needs.definitions[f"{name} = {expression}"] = None


def _expression(value: object, needs: Needs) -> str | None:
    """Python that gives the callable ``value``; None for one that cannot be had by any name."""
    if (place := _place(value)) is not None:
        needs.imports.add(f"import {place[0]}")
        return ".".join(place)
    if isinstance(value, OpOverload):
        return f"torch.ops.{value}"
    if isinstance(value, functools.partial):
        inner, bound = value.func, [*map(_argument, value.args)]
        bound += [f"{name}={_argument(item)}" for name, item in value.keywords.items()]
        maker = "functools.partial"
    elif type(value).__name__ in _NUMPY_WRAPPERS:
        inner, bound = next(iter(vars(value).values())), []
        maker = f"torch._dynamo.utils.{type(value).__name__}"
    else:
        return None
    wrapped = repr(inner) if isinstance(inner, str) else _expression(inner, needs)
    if wrapped is None:
        return None
    needs.imports.add(f"import {maker.rpartition('.')[0]}")
    return f"{maker}({', '.join([wrapped, *bound])})"


def _place(value: object) -> tuple[str, str] | None:
    """Module and qualified name under which ``value`` itself is found; None if it is not."""
    try:
        owner = getattr(value, "__objclass__", value)  # of what C defines: torch.Tensor.to
        own = str(value.__name__)  # type: ignore[attr-defined]
        name = value.__qualname__ if owner is value else f"{owner.__qualname__}.{own}"  # type: ignore[attr-defined]
        places = [(str(owner.__module__), name), ("torch", own), ("torch._numpy", own)]
    except Exception:  # not every callable has these names, and some fail when they are asked
        return None
    return next((place for place in places if _found(*place) is value), None)


def _found(module: str, name: str) -> object:
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _constant(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return f"None  # a {type(value).__name__} of the traced program"
    if value.numel() > _CONSTANT_LIMIT:
        return f"None  # fill in: {value.dtype}, shape {tuple(value.shape)}"
    return f"torch.tensor({value.tolist()}, dtype={value.dtype})"
