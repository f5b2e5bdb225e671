"""The private names of Inductor by which operators of tmm are fused; it takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

_aten = torch.ops.aten
_VIEWS = (
    *(_aten.view, _aten._unsafe_view, _aten.reshape, _aten.alias, _aten.detach),
    *(_aten.permute, _aten.transpose, _aten.t, _aten.squeeze, _aten.unsqueeze),
)
_PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)


def fuse_operator(operator: Callable[..., Any], body: Callable[..., Any]) -> None:
    """Let Inductor compile an operator as the operations of ``body``, which it fuses like others.

    ``body`` is called with ``Lowered`` and the operator's arguments.
    """
    from torch._inductor.lowering import register_lowering

    def lower(*arguments: Any) -> Any:
        return body(Lowered, *arguments)

    register_lowering(operator, type_promotion_kind=None)(lower)


class Lowered:
    """Operations on what Inductor keeps of tensors while it compiles a graph."""

    @staticmethod
    def apply(function: Any, *arguments: Any) -> Any:
        """An operator of ATen."""
        from torch._inductor.lowering import lowerings

        return lowerings[function](*arguments)

    @staticmethod
    def sizes(x: Any) -> list[Any]:
        """Those of its dimensions."""
        return list(x.get_size())

    @staticmethod
    def as_stored(x: Any) -> Any:
        """The values as memory holds them, in float32.

        Kernels keep half precision in float32, and take a cast there and back for nothing; but for
        one to a type that is not the one they compute in.
        """
        from torch._inductor.lowering import make_pointwise
        from torch._inductor.virtualized import ops

        stored = x.get_dtype()

        def value(given: Any) -> Any:
            rounded = ops.to_dtype(given, stored, use_compute_types=False)
            return ops.to_dtype(rounded, torch.float32)

        return make_pointwise(value, override_return_dtype=torch.float32)(x)

    @staticmethod
    def reading(x: Any) -> Any:
        """The argument of the operator, as it is best read.

        A copy in another order that a product reads is stored anyway. Computed once more it would
        be read in the order of the copy; what is stored, Inductor lets the kernel sum that copies.

        Where the program sums over a batch, as for the gradient of what is added to each item, its
        kernel holds no row whole. Inductor would part it for the sake of sums of rows.
        """
        owner, root = _owner(x), _root()
        is_copy = _is_one_of(root, (_aten.clone,)) and _is_pointwise(owner)
        if is_copy and any(_is_one_of(user, _PRODUCTS) for user in _readers()):
            owner.realize()
            owner.data.freeze_layout()  # in the order of the copy
        is_summed = _is_batch_sum(root) or any(map(_is_batch_sum, _readers()))
        is_own = _is_computed(owner) and root.meta["val"].is_contiguous()
        return _for_other_kernels(x) if is_summed and is_own else x

    @staticmethod
    def rows_apart(x: Any) -> Any:
        """``x``, or another name for it where the program sums over its rows as well.

        Inductor joins sums over rows and over columns of one tensor in one kernel, before it would
        see that the kernel which writes the tensor can sum its rows. It does not see that the other
        name is the same, which lives inside of that kernel only.
        """
        from torch._inductor.lowering import make_pointwise

        sums = (user for user in _readers() if _is_one_of(user, (_aten.sum,)))
        if not _is_pointwise(_owner(x)) or not any(map(_is_over_rows, sums)):
            return x
        again = make_pointwise(lambda value: value, override_return_dtype=x.get_dtype())(x)
        again.realize()
        return again

    @staticmethod
    def mean_and_spread(x: Any) -> tuple[Any, Any]:
        """Of the last dimension: the mean, and the sum of squares of the deviations from it."""
        from torch._inductor import ir, lowering

        how = lowering._make_reduction_inner(
            x, axis=[-1], keepdims=False, dtype=None, override_return_dtype=None
        )
        read = how.pop("inner_fn")
        how.pop("dst_dtype")
        how.pop("src_dtype")
        mean, spread, _ = ir.WelfordReduction.create(
            inner_fns=(read,), reduction_type="welford_reduce", dtype=x.get_dtype(), **how
        )
        mean.realize()
        spread.realize()
        return mean, spread

    @staticmethod
    def join(parts: Any) -> Any:
        """Contiguous tensors, one after the other and flat; each is written into its place.

        Inductor does so by itself for ``aten.cat`` of what kernels make, but it pads long rows, and
        copies views and what was made by ``aten.cat``. A tensor may not come twice.
        """
        from torch._inductor import ir

        device, dtype = parts[0].get_device(), parts[0].get_dtype()
        total = sum(part.get_numel() for part in parts)
        layout = ir.FixedLayout(device, dtype, [total], [1])
        whole = ir.ConcatKernel(name=None, layout=layout, inputs=[])
        box = ir.StorageBox(whole)
        pieces: list[Any] = []
        start: Any = 0
        for owner in map(_owner, parts):
            size = list(owner.get_size())
            strides = ir.FlexibleLayout.contiguous_strides(size)
            layout = ir.FixedLayout(device, dtype, size, strides, start)
            place = ir.ReinterpretView(data=box, layout=layout)
            start += owner.get_numel()
            made = owner.data
            if isinstance(made, ir.ConcatKernel) and isinstance(made.layout, ir.FixedLayout):
                made.layout = ir.NonOwningLayout(place)
                pieces.append(made)
            else:
                pieces.append(ir.ConcatKernel.realize_into(owner, place))
        _register(whole, pieces)
        return ir.TensorBox(box)

    @staticmethod
    def distinct(parts: Any) -> tuple[list[Any], list[int]]:
        """The tensors without those that come again, and for each which of these it is."""
        numbers: dict[int, int] = {}
        kept: list[Any] = []
        places = []
        for part in parts:
            key = id(_owner(part).data)
            if key not in numbers:
                numbers[key] = len(kept)
                kept.append(part)
            places.append(numbers[key])
        return kept, places

    @staticmethod
    def integers(numbers: Any, device: torch.device) -> Any:
        """A tensor of int64 that a kernel writes: no memory that outlives the graph's."""
        from torch._inductor import ir
        from torch._inductor.virtualized import ops

        def value(index: Any) -> Any:
            place = ops.index_expr(index[0], torch.int64)
            found = ops.constant(0, torch.int64)
            for number, own in enumerate(numbers):
                is_here = ops.eq(place, ops.constant(number, torch.int64))
                found = ops.where(is_here, ops.index_expr(own, torch.int64), found)
            return found

        made = ir.Pointwise.create(
            device=device, dtype=torch.int64, inner_fn=value, ranges=[len(numbers)]
        )
        made.realize()
        return made

    @staticmethod
    def call(operator: Any, *arguments: Any) -> Any:
        """An operator that Inductor does not look into."""
        from torch._inductor.lowering import fallback_handler

        return fallback_handler(operator, add_to_fallback_set=False)(*arguments)


def _for_other_kernels(x: Any) -> Any:
    """``x`` as it is stored, which Inductor does not fuse with what computes it."""
    from torch._inductor import ir

    size = list(x.get_size())
    strides = ir.FlexibleLayout.contiguous_strides(size)
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), size, strides)
    whole = ir.ConcatKernel(name=None, layout=layout, inputs=[])
    box = ir.StorageBox(whole)
    place = ir.ReinterpretView(data=box, layout=layout)
    _register(whole, [ir.ConcatKernel.realize_into(x, place)])
    return ir.TensorBox(box)


def _register(whole: Any, pieces: Any) -> None:
    """Give a tensor the pieces that are written into their places in it."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    whole.inputs = ir.ConcatKernel.unwrap_storage(pieces)
    whole.name = V.graph.register_buffer(whole)
    V.graph.register_operation(whole)


def _is_batch_sum(node: torch.fx.Node) -> bool:
    """Whether a node sums over some of the dimensions before the last two."""
    arguments: Any = node.args
    if not _is_one_of(node, (_aten.sum,)) or len(arguments) < 2:
        return False
    rank = len(arguments[0].meta["val"].shape)
    return bool(arguments[1]) and {n % rank for n in arguments[1]} <= set(range(rank - 2))


def _owner(x: Any) -> Any:
    """What holds the memory of a tensor that may be a view."""
    from torch._inductor import ir

    while isinstance(x, (ir.TensorBox, ir.BaseView)):
        x = x.data
    return x


def _is_pointwise(owner: Any) -> bool:
    from torch._inductor import ir

    return isinstance(_made(owner), ir.Pointwise)


def _is_computed(owner: Any) -> bool:
    """Whether a kernel of Inductor's computes it: no input, and nothing of a library."""
    from torch._inductor import ir

    return isinstance(_made(owner), (ir.Pointwise, ir.Reduction))


def _made(owner: Any) -> Any:
    from torch._inductor import ir

    made = getattr(owner, "data", None)
    return made.data if isinstance(made, ir.ComputedBuffer) else made


def _root() -> torch.fx.Node:
    """What the first argument of the node that is being compiled is a view of, or that itself."""
    from torch._inductor.virtualized import V

    root: Any = V.graph.current_node.args[0]
    while _is_one_of(root, _VIEWS):
        root = root.args[0]
    found: torch.fx.Node = root
    return found


def _readers() -> Iterator[torch.fx.Node]:
    """What reads that, besides the node."""
    from torch._inductor.virtualized import V

    pending = [_root()]
    while pending:
        for user in pending.pop().users:
            if _is_one_of(user, _VIEWS):
                pending.append(user)
            elif user is not V.graph.current_node:
                yield user


def _is_one_of(node: torch.fx.Node, operators: tuple[Any, ...]) -> bool:
    return getattr(node.target, "overloadpacket", None) in operators


def _is_over_rows(node: torch.fx.Node) -> bool:
    """Whether a sum is over all dimensions but the last."""
    arguments: Any = node.args
    if len(arguments) < 2 or not isinstance(arguments[1], (list, tuple)):
        return False
    rank = len(arguments[0].meta["val"].shape)
    return {dimension % rank for dimension in arguments[1]} == set(range(rank - 1))
