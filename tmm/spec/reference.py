"""What a model is compared with: itself at first, another module, a state dict, a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from tmm.core.failures import warn
from tmm.core.families import BRANCH_FAMILIES, PARAMETER_DIFFERENCE
from tmm.core.module_names import unwrapped
from tmm.core.wrapped_tensors import held_by
from tmm.spec.gathering import Gathering
from tmm.spec.likeness import differences
from tmm.spec.module_state import ModelState, is_plain
from tmm.spec.ranks import is_distributed, local_part
from tmm.spec.reference_sources import as_sharded, read_source
from tmm.spec.spec import Plan, ReferenceSource

_LISTED = 5  # differing names in a message


class Reference:
    """A counterpart for each parameter, buffer and further tensor of a model that is compared.

    Counterparts are found by the names under which the model holds its tensors; ``look`` finds
    those that it holds now, which may be others than before. Tied tensors have tied counterparts.
    Those that are kept on another device, or in another dtype, are brought over when they are
    asked for, and are given up with ``release``. Those of sharded parameters are sharded alike; for
    a parameter that ``fully_shard`` has gathered, the counterpart is gathered when it is asked for:
    all ranks ask together.
    """

    def __init__(
        self, state: ModelState, kept: Mapping[str, torch.Tensor], gathering: Gathering
    ) -> None:
        self._state = state
        self._gathering = gathering
        self._kept = dict(kept)
        self._names: dict[int, tuple[str, torch.Tensor]] = {}  # keeps the ids valid
        self._parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._here: dict[int, torch.Tensor] = {}
        self._memory = {_memory(tensor) for tensor in self._kept.values()}
        self._places: dict[int, list[torch.Tensor]] = {}
        self._shared: dict[int, tuple[torch.Tensor, int]] = {}
        self.look()

    def look(self) -> None:
        """Find what the model holds under its names now."""
        names: dict[int, tuple[str, torch.Tensor]] = {}
        for name, own in self._state:
            names.setdefault(id(own), (name, own))
        self._name_gathered(names)
        if self._here:
            replaced = self._here.keys() - names.keys()
            for key in replaced:
                del self._here[key]
        self._names = names
        # What this rank has of a parameter that ranks share; not where it is gathered to be used.
        self._parts = {} if self._gathering.is_needed else dict(self._look_inside())
        self._places.clear()
        self._shared = {key: shared for key, shared in self._shared.items() if key in names}

    def of(self, own: object) -> torch.Tensor | None:
        """The counterpart of a tensor that the model holds, with its device and dtype, or None."""
        key = id(own)
        if key in self._here:
            return self._here[key]
        if key in self._parts:
            whole = self.of(self._parts[key][0])
            return None if whole is None else local_part(whole)
        if not self.holds(own) or not isinstance(own, torch.Tensor):
            return None
        kept = self._kept.get(self._names[key][0])
        if kept is None or kept.shape != own.shape:
            shared, version = self._shared.get(key, (None, 0))
            return shared.detach() if shared is own and own._version == version else None
        if is_distributed(kept) and not is_distributed(own):
            return self._gathering.whole(kept, own)
        if _serves(kept, own):
            return kept
        self._here[key] = kept.to(own.device, own.dtype, non_blocking=True)
        self._memory.add(_memory(self._here[key]))
        return self._here[key]

    @property
    def is_shared(self) -> bool:
        """Whether ranks share the tensors of a forward pass, and each computes its part."""
        return bool(self._parts)

    def stays(self, own: object) -> bool:
        """Whether the counterpart of a tensor is kept as it is asked for, in the same place."""
        if id(own) not in self._names or not isinstance(own, torch.Tensor):
            return False
        kept = self._kept.get(self._names[id(own)][0])
        return kept is not None and kept.shape == own.shape and _serves(kept, own)

    def holds(self, own: object) -> bool:
        """Whether the model holds a tensor under a name, with a counterpart or without."""
        if id(own) in self._names or id(own) in self._parts:
            return True
        if self._gathering.is_new(own):
            self._name_gathered(self._names)
        return id(own) in self._names

    def has(self, own: object) -> bool:
        """Whether a tensor has a counterpart, which is not brought over, or gathered, to know."""
        if id(own) in self._parts:
            own = self._parts[id(own)][0]
        if not self.holds(own) or not isinstance(own, torch.Tensor):
            return False
        kept = self._kept.get(self._names[id(own)][0])
        if kept is not None and kept.shape == own.shape:
            return True
        shared, version = self._shared.get(id(own), (None, 0))
        return shared is own and own._version == version

    def _look_inside(self) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
        for _, own in self._names.values():
            if is_distributed(own):
                (part,) = held_by(own)
                yield id(part), (own, part)

    def _name_gathered(self, names: dict[int, tuple[str, torch.Tensor]]) -> None:
        """Let a parameter and what it is gathered to have one name."""
        for pair in self._gathering.pairs():
            found = next((names[id(one)][0] for one in pair if id(one) in names), None)
            if found is not None:
                for one in pair:
                    names.setdefault(id(one), (found, one))

    def why_not(self, own: object) -> str | None:
        """Why a tensor that the model holds under a name has no counterpart; None if it has."""
        if not self.holds(own) or self.has(own):
            return None
        if id(own) in self._parts:
            own = self._parts[id(own)][0]
        name, tensor = self._names[id(own)]
        if (kept := self._kept.get(name)) is None:
            return f"the model has {name}, which the reference does not have"
        return f"{name} has shape {tuple(tensor.shape)}, in the reference {tuple(kept.shape)}"

    def keeps(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of a counterpart, which nothing may overwrite."""
        storage = tensor.untyped_storage()._cdata
        return storage in self._memory or self._gathering.keeps(storage)

    def lying_in(self, storage: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The model's tensors that lie in a piece of memory, with their counterparts."""
        if not self._places:
            plain = [own for _, own in self._names.values() if is_plain(own)]
            for own in (*plain, *(part for _, part in self._parts.values())):
                self._places.setdefault(own.untyped_storage()._cdata, []).append(own)
        held = ((own, self.of(own)) for own in self._places.get(storage, ()))
        return [(own, kept) for own, kept in held if kept is not None]

    def lacking(self) -> list[torch.Tensor]:
        """What the model holds without a counterpart."""
        return [own for _, own in self._names.values() if not self.has(own)]

    def share(self, tensor: torch.Tensor) -> None:
        """Let a tensor that depends on no parameter be its own counterpart, as long as it is."""
        if not tensor.is_inference():  # those do not tell when they change
            self._shared[id(tensor)] = tensor, tensor._version

    def release(self) -> None:
        """Give up what was brought over."""
        self._memory -= {_memory(tensor) for tensor in self._here.values()}
        self._here.clear()
        self._gathering.release()


def _serves(kept: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a counterpart is asked for as it is kept, and not gathered or brought over."""
    is_gathered = is_distributed(kept) and not is_distributed(own)
    return not is_gathered and kept.device == own.device and kept.dtype == own.dtype


def _memory(tensor: torch.Tensor) -> int:
    tensor = local_part(tensor)
    return tensor.untyped_storage()._cdata if is_plain(tensor) else 0


def load_reference(
    module: torch.nn.Module, plan: Plan, source: ReferenceSource | None, *, is_joined: bool = True
) -> Reference | None:
    """The reference for ``module`` that ``source`` gives; None without one.

    Where ranks share tensors, ``is_joined`` says that all of them are monitored together.

    It shares memory with nothing, unless the spec follows what a reference module comes to be.

    Raises:
        ValueError: names, shapes or dtypes differ, which are listed, a file holds no state dict, or
            the model is sharded in a way in which it cannot be compared.
        OSError: a file cannot be read.
    """
    spec = plan.spec
    if source is None:
        return None
    needs_all = any(spec.measures(family) for family in BRANCH_FAMILIES)
    gathering = Gathering(module)
    gathering.check(spec, runs_branch=needs_all, is_joined=is_joined)
    state = ModelState(module, everything=needs_all)
    names: dict[torch.Tensor, list[str]] = {}
    shards = {id(whole): shard for shard, whole in gathering.pairs()}  # what is gathered just now
    for name, own in state:
        names.setdefault(shards.get(id(own), own), []).append(name)
    if not needs_all:
        names = {
            own: known
            for own, known in names.items()
            if plan.metrics(known[0], PARAMETER_DIFFERENCE.name)
        }
    found = None
    if not (isinstance(source, str) and source == "init"):
        found = read_source(source, {name: own for own, known in names.items() for name in known})
        registered = {*module.parameters(), *module.buffers()}
        _check(plan, {own: known for own, known in names.items() if own in registered}, found)
        if isinstance(source, torch.nn.Module) and needs_all and spec.is_strict:
            _warn_of_other_code(module, source)
    device = None if spec.reference_device is None else torch.device(spec.reference_device)
    kept: dict[str, torch.Tensor] = {}
    for own, known in names.items():
        other = own if found is None else _first(found, known)
        copies = spec.copies_reference or other is None or other is own
        # A state dict need not hold buffers, and holds no other attributes.
        other = own if other is None else other
        tensor = _keep(other, own, device, spec.reference_dtype, copies=copies)
        kept.update(dict.fromkeys(known, tensor))
    return Reference(state, kept, gathering)


def _warn_of_other_code(module: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Tell that only the tensors of a reference count, where it would compute something else."""
    if differing := list(differences(unwrapped(module), unwrapped(reference))):
        warn(
            "reference=: the reference is computed by the model's code, with its own parameters and"
            f" buffers, but differs otherwise: {'; '.join(differing[:_LISTED])}"
        )


def _check(
    plan: Plan, names: Mapping[torch.Tensor, Sequence[str]], found: Mapping[str, torch.Tensor]
) -> None:
    """Raise ``ValueError`` for tensors that cannot be the counterparts of those that are named."""
    problems = []
    for own, known in names.items():
        name, other = known[0], _first(found, known)
        is_parameter = isinstance(own, torch.nn.Parameter)
        if other is None:
            problems += [f"{name} is missing"] if is_parameter else []
        elif other.shape != own.shape:
            problems.append(f"{name} has shape {tuple(other.shape)}, not {tuple(own.shape)}")
        elif other.dtype != own.dtype and plan.spec.reference_dtype is None:
            problems.append(
                f"{name} has {other.dtype}, not {own.dtype} (reference_dtype= converts)"
            )
        elif own.requires_grad and _is_same_memory(own, other):
            problems.append(f"{name} is the parameter itself, which will change: give a copy")
    if any(problem.endswith("is missing") for problem in problems):
        known_names = {*plan.parameters, *(name for known in names.values() for name in known)}
        problems += [f"{name} is not in the model" for name in found if name not in known_names]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(
            f"reference= does not fit the model: {'; '.join(problems[:_LISTED])}{more}"
        )


def _is_same_memory(own: torch.Tensor, other: torch.Tensor) -> bool:
    own, other = local_part(own), local_part(other)
    return bool(other.numel()) and other.data_ptr() == own.data_ptr()


def _first(found: Mapping[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor | None:
    return next((found[name] for name in names if name in found), None)


def _keep(
    tensor: torch.Tensor,
    own: torch.Tensor,
    device: torch.device | None,
    dtype: torch.dtype | None,
    *,
    copies: bool,
) -> torch.Tensor:
    tensor = tensor.detach()
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if is_distributed(own) or is_distributed(tensor):
        return as_sharded(tensor, own).to(wanted, copy=copies)
    device = own.device if device is None else device
    # Frozen parameters are copied, too: they may be trained, merged or loaded into later.
    kept = tensor.to(device, wanted, copy=copies)
    pin = device.type == "cpu" and own.device.type == "cuda"
    return kept.pin_memory() if pin else kept
