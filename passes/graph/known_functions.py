"""What nodes call, and what functions of torch do with elements, by their usual names."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Node
from torch.nn import functional

from tmm.core.torch_private import nn_functions

# Each element of the result comes from the elements at the same place.
_POINTWISE = (
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "truediv"),
    *("iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_"),
    *("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "pow", "reciprocal"),
    *("sin", "cos", "tanh", "sigmoid", "relu", "relu_", "relu6", "gelu", "silu", "elu", "selu"),
    *("celu", "mish", "softplus", "logsigmoid", "hardswish", "hardsigmoid", "hardtanh", "erf"),
    *("leaky_relu", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "where", "dropout"),
    *("contiguous", "clone", "detach", "float", "half", "bfloat16", "double", "type_as", "to"),
)

# Made of their operands alone, and not by cutting something out, which each rank may do elsewhere.
_DETERMINISTIC = (
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d"),
    *("layer_norm", "rms_norm", "group_norm", "normalize", "softmax", "log_softmax", "embedding"),
    *("mean", "sum", "var", "std", "norm", "amax", "amin", "scaled_dot_product_attention"),
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze"),
    *("expand", "cat", "stack", "t", "avg_pool2d", "adaptive_avg_pool2d", "max_pool2d"),
)

_NAMESPACES = (torch, functional, operator, nn_functions)


def _functions(names: Sequence[str]) -> frozenset[object]:
    found = (getattr(space, name, None) for space in _NAMESPACES for name in names)
    return frozenset(function for function in found if function is not None)


_POINTWISE_FUNCTIONS = _functions(_POINTWISE)
_DETERMINISTIC_FUNCTIONS = _functions(_DETERMINISTIC)
_PRODUCTS = _functions(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"))


def name_of(node: Node) -> str:
    """The name of what a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def is_of_torch(node: Node) -> bool:
    """Whether a node calls a method, or a function of torch."""
    if node.op == "call_method":
        return True
    return any(getattr(space, name_of(node), None) is node.target for space in _NAMESPACES)


def kind_of(node: Node) -> tuple[bool, bool]:
    """Whether an operation is pointwise, and whether its result depends on its operands alone."""
    if node.op == "call_method":
        return node.target in _POINTWISE, node.target in _DETERMINISTIC
    return node.target in _POINTWISE_FUNCTIONS, node.target in _DETERMINISTIC_FUNCTIONS


def is_product(node: Node) -> bool:
    """Whether a node calls a product of matrices, which libraries compute."""
    return node.target in _PRODUCTS
