"""What a call of one of tmm's operators launches on a GPU: its kernels, and torch's around them.

In a plan an operator is one line. Its implementation is run here on fake tensors: each operation of
torch that is no view counts as a launch, and so does each kernel in Triton, and what Inductor makes
for it, from the plan of that at the sizes of this call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.mocked_gpu import plan_of
from benchmarks.plan.account import Buffer, Kind, Launch, launches_of
from benchmarks.plan.capture import GPU, OperatorCall, fake_tensors_on_gpu
from tmm.kernels import ops
from tmm.kernels.summarize import inductor_rows

_FREE = ("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like")
"""Operations that allocate, and launch nothing."""


_OF_ADDRESSES = ("data pointer", "NYI: aten._pin_memory")
"""What a fake tensor says to who asks for its address, or puts addresses into pinned memory."""


class OperatorLaunches:
    """Counts them, and keeps the texts of the kernels that it has planned.

    In a process of its own, after ``mock_gpus``.
    """

    def __init__(self) -> None:
        self.texts: dict[tuple[Any, ...], str] = {}
        self._make: Callable[..., object] = inductor_rows._kernel

    def of(self, call: OperatorCall) -> list[Launch] | None:
        """The launches of a call in their order; None for an operator that cannot be run so.

        That is one whose implementation asks for the addresses of tensors.
        """
        from triton.runtime.jit import JITFunction

        implementation = getattr(ops, f"_{call.name}", None)
        if implementation is None:
            return None
        counter = _Counter()

        def kernel(
            columns: tuple[str, ...], dtype: torch.dtype, device: torch.device, several: bool
        ) -> Callable[[torch.Tensor], torch.Tensor]:
            text = self._text(columns, dtype, device, several)

            def run(rows: torch.Tensor) -> torch.Tensor:
                given = Buffer(tuple(map(int, rows.shape)), rows.element_size())
                counter.launches += launches_of(text, inputs=[given])
                return rows.new_empty(len(columns), dtype=torch.float64)

            return run

        with (
            mock.patch.object(inductor_rows, "_kernel", kernel),
            mock.patch.object(JITFunction, "run", counter.launched),
            torch.no_grad(),
            fake_tensors_on_gpu(),
            FakeTensorMode(),
        ):
            arguments = tree_map_only(torch.Tensor, _on_gpu, call.arguments)
            try:
                with counter:
                    implementation(*arguments)
            except (AssertionError, RuntimeError) as error:
                if not any(words in str(error) for words in _OF_ADDRESSES):
                    raise
                return None
        return counter.launches

    def _text(self, *key: Any) -> str:
        if key not in self.texts:
            self.texts[key] = plan_of(lambda: self._make(*key)).text
        return self.texts[key]


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []

    def launched(self, *arguments: Any, **options: Any) -> None:
        """A kernel in Triton."""
        self.add("a kernel in Triton", "triton", (arguments, options))

    def add(self, name: str, kind: Kind, given: Any) -> None:
        """Count a launch that is given such tensors."""
        tensors = {id(x): x for x in tree_leaves(given) if isinstance(x, torch.Tensor)}
        total = sum(x.numel() * x.element_size() for x in tensors.values())
        self.launches.append(Launch(name, kind, total))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and not function.is_view and name not in _FREE:
            self.add(name, "library", (args, kwargs, result))
        return result
