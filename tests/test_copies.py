"""Copies of many tensors at once."""

from __future__ import annotations

import pytest
import torch

from tmm.runtime import tensor_copies as copies
from tmm.runtime.tensor_copies import Copies

TENSORS = {
    "matrix": torch.randn(3, 5),
    "scalar": torch.tensor(2.0),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.randn(7)),
    "half": torch.randn(4).half(),
    "bfloat16": torch.randn(4, 3).bfloat16(),
    "double": torch.randn(65).double(),
    "complex": torch.randn(3, dtype=torch.complex64),
    "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "transposed": torch.randn(3, 4).t(),
    "expanded": torch.randn(3, 1).expand(3, 4),
    "with gaps": torch.randn(8)[::2],
    "sparse": torch.eye(3).to_sparse(),
    "integers": torch.arange(5),
}


@pytest.mark.parametrize("most", [1, 100, 1 << 26])
def test_copies_are_equal_and_apart(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_MOST", most)
    keeping = Copies()
    assert keeping.of({}) == {}
    keeping.of({"other": torch.zeros(1000), "half": torch.zeros(3).half()})
    found = keeping.of(TENSORS)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        copy = found[name]
        assert (copy.dtype, copy.shape, copy.layout) == (tensor.dtype, tensor.shape, tensor.layout)
        assert not copy.requires_grad
        assert torch.equal(copy.to_dense(), tensor.to_dense())
        if name in ("channels_last", "transposed"):
            assert copy.stride() == tensor.stride()
    for name, copy in found.items():  # none lies where another one does
        copy.zero_()
        rest = {other: found[other] for other in list(found)[list(found).index(name) + 1 :]}
        for other, later in rest.items():
            assert torch.equal(later.to_dense(), TENSORS[other].to_dense())
        assert name == "scalar" or torch.equal(TENSORS["scalar"], torch.tensor(2.0))


def test_the_same_tensors_again() -> None:
    tensors = {"a": torch.nn.Parameter(torch.zeros(3, 5)), "b": torch.randn(4, 3).t()}
    copies = Copies()
    first = copies.of(tensors)
    with torch.no_grad():
        tensors["a"].fill_(2.0)
    again = copies.of(dict(reversed(tensors.items())))
    assert {name: copy.data_ptr() for name, copy in again.items()} == {
        name: copy.data_ptr() for name, copy in first.items()
    }
    for changed in (
        {"a": torch.randn(5, 3)},
        {"a": torch.randn(5, 3).t()},
        {"a": torch.randn(3, 5).double()},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.randn(3, 5), "c": torch.randn(2)},
    ):
        now = {**tensors, **changed}
        found = copies.of(now)
        assert found.keys() == now.keys()
        for name, tensor in now.items():
            assert torch.equal(found[name].to_dense(), tensor.to_dense())
            assert found[name].dtype is tensor.dtype
            assert not found[name].requires_grad
            assert tensor.layout is torch.sparse_coo or found[name].stride() == tensor.stride()


def test_memory_of_inference_mode_serves_outside_of_it() -> None:
    tensors, copies = {"a": torch.randn(3, 5), "b": torch.randn(4)}, Copies()
    with torch.inference_mode():
        copies.of(tensors)
    for wanted in (tensors, {"a": tensors["a"]}):
        found = copies.of(wanted)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_memory_serves_again() -> None:
    copies = Copies()
    first = copies.of({"a": torch.zeros(1000), "b": torch.zeros(10)})["a"].data_ptr()
    assert copies.of({"a": torch.ones(900)})["a"].data_ptr() == first
    kept = copies._kept
    assert [memory.numel() for memory in kept.values()] == [1024 + 64]
    assert copies.of({"a": torch.ones(2000)})["a"].tolist() == [1.0] * 2000
    assert [memory.numel() for memory in kept.values()] == [2048]
