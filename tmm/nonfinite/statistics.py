"""The statistics of one tensor, as a reader of a report wants them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tmm.kernels.dense import packed_dtype

_NARROW_BYTES = 1  # what is narrower than float16 has hardly any operation of its own


@dataclass(frozen=True)
class TensorStatistics:
    """What a tensor held.

    Attributes:
        name: the argument of the operation that it was, or ``"output"``.
        comes_from: the parameter, buffer, part of the batch or operation that it comes from.
        dtype: its type, such as ``"float16"``.
        shape: its sizes.
        minimum: the least finite element; None if there is none. Of complex numbers, here and
            below, their absolute values count.
        maximum: the largest finite element.
        mean: the mean of the finite elements, in float64.
        zeros: how many elements are 0.
        nans: how many are NaN.
        positive_infinities: how many are inf.
        negative_infinities: how many are -inf.
    """

    name: str
    comes_from: str
    dtype: str
    shape: tuple[int, ...]
    minimum: float | None
    maximum: float | None
    mean: float | None
    zeros: int
    nans: int
    positive_infinities: int
    negative_infinities: int

    @property
    def absmax(self) -> float | None:
        """The largest absolute value of the finite elements."""
        if self.minimum is None or self.maximum is None:
            return None
        return max(abs(self.minimum), abs(self.maximum))

    def __str__(self) -> str:
        parts = [f"{self.dtype}[{', '.join(map(str, self.shape))}]"]
        if self.minimum is not None:
            parts.append(f"min {self.minimum:.4g}, max {self.maximum:.4g}, mean {self.mean:.4g}")
        counts = {
            "zeros": self.zeros,
            "NaN": self.nans,
            "inf": self.positive_infinities,
            "-inf": self.negative_infinities,
        }
        parts += [f"{count} {what}" for what, count in counts.items() if count]
        source = f" ({self.comes_from})" if self.comes_from else ""
        return f"{self.name}{source}: {', '.join(parts)}"


def statistics_of(tensor: torch.Tensor, name: str, comes_from: str = "") -> TensorStatistics:
    """The statistics of a dense tensor; see ``TensorStatistics``."""
    with torch.no_grad():
        values = real_values(tensor.detach())
        if packed_dtype(values.device) is not torch.float64:
            values = values.cpu()  # the device has none
        nans = positive = negative = 0
        finite = values
        if values.is_floating_point():
            is_finite = torch.isfinite(values)
            if not bool(is_finite.all()):
                nans = int(values.isnan().sum())
                positive = int(values.isposinf().sum())
                negative = int(values.isneginf().sum())
                finite = values[is_finite]
        else:
            values = finite = values.to(torch.float64)  # not all integers know all operations
        zeros = int((values == 0).sum())
        minimum = maximum = mean = None
        if finite.numel():
            minimum, maximum = float(finite.min()), float(finite.max())
            mean = float(finite.sum(dtype=torch.float64)) / finite.numel()
    return TensorStatistics(
        name,
        comes_from,
        str(tensor.dtype).removeprefix("torch."),
        tuple(tensor.shape),
        *(minimum, maximum, mean, zeros, nans, positive, negative),
    )


def real_values(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as numbers that every operation knows: |x| of complex ones, wide enough."""
    if tensor.is_complex():
        return tensor.abs()
    if tensor.is_floating_point() and tensor.element_size() == _NARROW_BYTES:
        return tensor.to(torch.float32)
    return tensor


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is an ordinary one, whose elements lie in memory of its own."""
    is_dense = tensor.layout is torch.strided and tensor.device.type != "meta"
    return is_dense and not is_subclass(tensor)


def is_checked(value: object) -> bool:
    """Whether a value is a tensor that may hold a NaN or an infinity, and can be looked at."""
    return (
        isinstance(value, torch.Tensor)
        and (value.is_floating_point() or value.is_complex())
        and has_memory(value)
        and value.numel() > 0
        and not str(value.dtype).startswith("torch.float4")  # two numbers in one element
    )


def is_subclass(tensor: torch.Tensor) -> bool:
    """Whether a tensor does its operations itself, on plain tensors inside of it."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def nonfinite_elements(tensor: torch.Tensor) -> torch.Tensor | None:
    """Which elements are NaN or infinite, as a mask; None if none is."""
    values = tensor.detach()
    if values.is_floating_point():
        values = real_values(values)
    # The extremes are NaN if any element is, and take one reading of the tensor.
    real = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    if bool(torch.isfinite(torch.stack(torch.aminmax(real))).all()):
        return None
    return ~torch.isfinite(values)
