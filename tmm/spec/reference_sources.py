"""Where the tensors of a reference come from: a module, a state dict, a file, a checkpoint."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tmm.core.module_names import unwrapped_names
from tmm.spec.module_state import ModelState
from tmm.spec.ranks import is_distributed, whole_of

_NESTED = ("state_dict", "model_state_dict", "model")
_METADATA = ".metadata"
"""The file that makes a folder a checkpoint of ``torch.distributed.checkpoint``."""


def read_source(
    reference: torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
    wanted: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The tensors that a reference has, by name; ``wanted`` are those of the model.

    Of a folder of ``torch.distributed.checkpoint`` only these are read, and of sharded ones the
    part of this rank, without the others. Raises ``ValueError`` for what holds no state dict, and
    ``OSError``.
    """
    if isinstance(reference, torch.nn.Module):
        return {name: own.detach() for name, own in ModelState(reference, everything=True)}
    if isinstance(reference, (str, os.PathLike)):
        if (path := Path(reference)).is_dir():
            return _read_folder(path, wanted)
        reference = _read(path)
    tensors = {name: v for name, v in reference.items() if isinstance(v, torch.Tensor)}
    names = unwrapped_names(tensors)
    return {names[name]: value.detach() for name, value in tensors.items()}


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    """The state dict in a file, also where a checkpoint holds it beside other things."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ValueError(
                f"reference={str(path)!r} needs the package safetensors: pip install safetensors"
            ) from error
        loaded: Mapping[str, torch.Tensor] = load_file(path)
        return loaded
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"reference={str(path)!r} cannot be read as a state dict; save one with"
            f" torch.save(model.state_dict(), path): {error}"
        ) from error
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise ValueError(
            f"reference={str(path)!r} holds no state dict; save one with"
            " torch.save(model.state_dict(), path)"
        )
    return content


def _read_folder(path: Path, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The wanted tensors of a checkpoint; those of other shapes have no values.

    As ``torch.distributed.checkpoint`` does, it unpickles the file that describes the checkpoint.
    """
    if not (path / _METADATA).is_file():
        raise ValueError(
            f"reference={str(path)!r} is a folder without {_METADATA}, so no checkpoint of"
            " torch.distributed.checkpoint; give the path of one, or of a file"
        )
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(path)
    entries = {
        name: entry
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    places = _places(path, list(entries), wanted)
    found, read = {}, {}
    for name, place in places.items():
        entry, own = entries[place], wanted[name]
        if entry.size != own.shape:
            found[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        else:
            tensor = torch.empty_like(own, dtype=entry.properties.dtype, requires_grad=False)
            found[name] = read[place] = tensor.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process: this one
        load(read, storage_reader=reader, no_dist=True)
    return found


def _places(path: Path, names: list[str], wanted: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Where the checkpoint has what is wanted, by name: below one key, or at the top."""
    displayed = {name: place for place, name in unwrapped_names(names).items()}
    prefixes = dict.fromkeys(
        place.removesuffix(name)
        for name in wanted
        for place in displayed
        if place == name or place.endswith(f".{name}")
    )
    counts = {p: sum(p + name in displayed for name in wanted) for p in prefixes}
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    known = [prefix for prefix in ("", *(f"{name}." for name in _NESTED)) if prefix in best]
    if not known and len(best) != 1:
        found = ", ".join(map(repr, best)) if best else f"such as {', '.join(names[:5])}"
        raise ValueError(
            f"reference={str(path)!r}: the parameters of the model are in it"
            f" {f'several times, below {found}' if best else f'under no name; it holds {found}'};"
            " load them yourself, and give a state dict"
        )
    prefix = (known or best)[0]
    return {name: displayed[prefix + name] for name in wanted if prefix + name in displayed}


def as_sharded(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape of the model's ``own``, and on as many ranks in the same parts.

    Raises ``ValueError`` where the parts are such that only who made them knows which they are.
    """
    if not is_distributed(own):
        return whole_of(tensor)
    mesh, placements = own.device_mesh, own.placements
    if isinstance(tensor, DTensor):
        if tensor.device_mesh == mesh and tensor.placements == placements:
            return tensor
        tensor = whole_of(tensor)
    if any(type(placement) not in (Shard, Replicate) for placement in placements):
        raise ValueError(
            f"reference=: a parameter is sharded as {placements}, and a whole tensor cannot be told"
            ' apart likewise; give reference="init" or a checkpoint of torch.distributed.checkpoint'
        )
    return distribute_tensor(tensor.to(own.device), mesh, placements, src_data_rank=None)
