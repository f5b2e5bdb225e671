"""What made a NaN or an infinity, as far as the inputs of the operation prove it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tmm.core.torch_private import OpOverload, tree_flatten, tree_map
from tmm.nonfinite.operation import Operation
from tmm.nonfinite.statistics import is_checked

# For finite numbers these give an infinity by an overflow only (a power of 0 is told before).
_GROWING = ("exp", "exp2", "expm1", "sinh", "cosh", "pow", "prod", "cumprod")
_ADDING = ("add", "sub", "mul", "sum", "cumsum", "mm", "bmm", "addmm", "baddbmm")
_ATTENTION_MASKS = ("attn_mask", "attn_bias")

_Case: TypeAlias = tuple[str, Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Call:
    """An operation, one of its outputs, and the mask of its elements to be explained.

    Those are NaN or infinite although what they were computed from is not, or meant to be.
    """

    operation: Operation
    output: torch.Tensor
    fresh: torch.Tensor

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of the operation, as they were before."""
        return self.operation.args

    @property
    def fresh_values(self) -> torch.Tensor:
        """The elements to be explained."""
        return self.output.detach()[self.fresh]

    @property
    def name(self) -> str:
        """The name of the operation, also of one that works in place: ``"log"``."""
        return self.operation.base_name


def reason_of(call: Call) -> str:
    """A sentence that says what made it; empty where the inputs do not tell."""
    if not isinstance(call.operation.function, OpOverload):
        return ""
    with torch.no_grad():
        rule = _RULES.get(call.name)
        reason = "" if rule is None else rule(call)
        if not reason and call.name.startswith("_scaled_dot_product"):
            reason = _masked_attention(call)
        return reason or _of_infinities(call) or _overflow(call)


def _at_fresh(call: Call, value: object) -> torch.Tensor:
    """The elements of an argument that the fresh elements were computed from."""
    if not isinstance(value, torch.Tensor):
        value = torch.as_tensor(value, device=call.fresh.device)
    return value.detach().expand(call.fresh.shape)[call.fresh]


def _count(found: torch.Tensor, total: torch.Tensor, what: str) -> str:
    return f"{int(found.sum())} of {total.numel()} elements are {what}"


def _outside(title: str, *cases: _Case) -> Callable[[Call], str]:
    """Tells which elements of the first argument lie where the function has no finite value."""

    def reason(call: Call) -> str:
        x = call.args[0]
        fresh = _at_fresh(call, x)
        there = [(what, test) for what, test in cases if bool(test(fresh).any())]
        counts = [_count(test(x.detach()), x, what) for what, test in there]
        return f"{title}: {', '.join(counts)}" if counts else ""

    return reason


def _division(call: Call) -> str:
    dividend, divisor = call.args[:2]
    divisors = _at_fresh(call, divisor)
    if not bool((divisors == 0).any()):
        return ""
    text = "division by zero"
    if isinstance(divisor, torch.Tensor):
        text += f": {int((divisor == 0).sum())} of {divisor.numel()} divisors are 0"
    both = int(((_at_fresh(call, dividend) == 0) & (divisors == 0)).sum())
    return f"{text}; {both} of the results are 0 / 0" if both else text


def _power(call: Call) -> str:
    base, exponent = (_at_fresh(call, value) for value in call.args[:2])
    if bool(((base == 0) & (exponent < 0)).any()):
        count = int(((base == 0) & (exponent < 0)).sum())
        return f"division by zero: {count} bases are 0 and have a negative exponent"
    odd = (base < 0) & (exponent != exponent.round())
    if bool(odd.any()):
        return f"{int(odd.sum())} negative bases have an exponent that is not whole"
    return ""


def _softmax(call: Call) -> str:
    x, dim = call.args[:2]
    empty = (x == -torch.inf).all(dim)
    if not bool(empty.any()):
        return ""
    return (
        f"{int(empty.sum())} of {empty.numel()} rows hold nothing but -inf, as where a mask leaves"
        " nothing"
    )


def _masked_attention(call: Call) -> str:
    for name in _ATTENTION_MASKS:
        mask = call.operation.argument(name)
        if isinstance(mask, torch.Tensor) and mask.is_floating_point():
            empty = (mask == -torch.inf).all(-1)
            if bool(empty.any()):
                return f"the mask leaves nothing in {int(empty.sum())} of {empty.numel()} rows"
    return ""


def _spread(call: Call) -> str:
    x = call.args[0]
    elements = x.numel() // max(call.output.numel(), 1)
    if elements > 1 or not bool(call.output.isnan().any()):
        return ""
    return f"the spread of {elements} element is not defined (0 degrees of freedom)"


def _mean(call: Call) -> str:
    return "the mean of no elements" if call.args[0].numel() == 0 else ""


def _no_targets(call: Call) -> str:
    total = call.operation.outputs[1] if len(call.operation.outputs) > 1 else None
    if total is not None and total.numel() == 1 and float(total) == 0:
        return "0 / 0: all targets are ignored, or have weight 0"
    return ""


_ZERO: _Case = "0", lambda x: x == 0
_NEGATIVE: _Case = "negative", lambda x: x < 0
_BEYOND: _Case = "beyond", lambda x: x.abs() > 1
_root = _outside("root of a negative number", _NEGATIVE)
_inverse_of_zero = _outside("division by zero: 1 / root of 0", _ZERO)

_RULES: Mapping[str, Callable[[Call], str]] = {
    **dict.fromkeys(("log", "log2", "log10"), _outside("logarithm of 0 or less", _ZERO, _NEGATIVE)),
    "log1p": _outside(
        "logarithm of 1 + x, which is 0 or less",
        ("-1", lambda x: x == -1),
        ("below -1", lambda x: x < -1),
    ),
    "sqrt": _root,
    "rsqrt": lambda call: _inverse_of_zero(call) or _root(call),
    "reciprocal": _outside("division by zero", _ZERO),
    "acos": _outside("acos outside of -1 to 1", _BEYOND),
    "asin": _outside("asin outside of -1 to 1", _BEYOND),
    "atanh": _outside(
        "atanh is finite between -1 and 1 only", ("there or beyond", lambda x: x.abs() >= 1)
    ),
    **dict.fromkeys(("div", "true_divide"), _division),
    "pow": _power,
    **dict.fromkeys(("_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _spread),
    "mean": _mean,
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _no_targets),
}


def _of_infinities(call: Call) -> str:
    """A NaN that infinite inputs make."""
    operands = [value for value in call.args[:2] if isinstance(value, (torch.Tensor, float, int))]
    if call.name not in ("add", "sub", "mul") or len(operands) < 2:
        return ""
    first, second = (_at_fresh(call, operand) for operand in operands)
    if call.name == "mul":
        zero = ((first == 0) & second.isinf()) | (first.isinf() & (second == 0))
        return f"0 * infinity in {int(zero.sum())} places" if bool(zero.any()) else ""
    both = first.isinf() & second.isinf()
    return f"inf - inf in {int(both.sum())} places" if bool(both.any()) else ""


def _overflow(call: Call) -> str:
    """Does the operation once more in float64 and compares with what its type can hold."""
    dtype = call.output.dtype
    position = next((i for i, t in enumerate(call.operation.outputs) if t is call.output), None)
    inputs = [v for v in tree_flatten((call.args, call.operation.kwargs))[0] if is_checked(v)]
    if (
        position is None
        or not inputs
        or torch.Tag.nondeterministic_seeded in call.operation.function.tags
        or not dtype.is_floating_point
    ):
        return ""
    if dtype is torch.float64:
        return _too_large_for_float64(call)
    try:
        args, kwargs = tree_map(_widened, (call.args, dict(call.operation.kwargs)))
        wide = tree_flatten(call.operation.function(*args, **kwargs))[0][position]
    except (RuntimeError, NotImplementedError, TypeError):
        return ""  # the operation or the device does not know float64, or memory is short
    if wide.dtype is not torch.float64 or wide.shape != call.fresh.shape:
        return ""
    exact = wide[call.fresh].abs()
    name = str(dtype).removeprefix("torch.")
    if not bool(torch.isfinite(exact).all()):
        if any(not bool(torch.isfinite(tensor).all()) for tensor in inputs):
            return ""  # what is infinite may come from there
        if call.name not in _GROWING or bool(exact.isnan().any()):
            return ""
        return f"overflow, even of float64 ({name} ends at {torch.finfo(dtype).max:.5g})"
    largest, end = float(exact.max()), torch.finfo(dtype).max
    if largest > end:
        return f"overflow of {name}: the largest result is {largest:.4g}, {name} ends at {end:.5g}"
    return (
        f"overflow of {name} inside of the operation: in float64 the results are finite, up to"
        f" {largest:.4g}"
    )


def _too_large_for_float64(call: Call) -> str:
    can_overflow = call.name in (*_GROWING, *_ADDING)
    return "overflow of float64" if can_overflow and bool(call.fresh_values.isinf().all()) else ""


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().to(torch.float64, copy=True)
    if isinstance(value, torch.Tensor) and value.is_complex():
        return value.detach().to(torch.complex128, copy=True)
    return value
