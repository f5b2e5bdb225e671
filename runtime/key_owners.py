"""Whose values each key holds: two different tensors must never be joined under one key."""

from __future__ import annotations

from collections.abc import Iterable

from tmm.core.families import VALUE_FAMILY, family_of
from tmm.core.records import Site

LOGGED_FOR_RUN = "a number that run.log logs"
LOGGED_BY_HAND = "a number that log_scalar or log_tensor logs"
MEASURED = "what tmm measures of the whole step"


def owner_of(family: str, site: Site, name: str) -> str:
    """Whose values a site's keys hold, in words that tell apart what differs.

    ``name`` is that of the site in keys, without a rank. Calls of one module are one owner, as are
    values that the program shows under one name.
    """
    rank = "" if site.rank is None else f" of rank {site.rank}"
    if family == VALUE_FAMILY:
        return f"the value that the model records as {name!r}{rank}"
    if site.is_shown:
        return f"the tensor that the program shows as {name!r}{rank}"
    module = name.removesuffix(site.path)
    known = family_of(family)
    if known is not None and known.subject == "parameters":
        return f"the parameter {name!r}{rank}"
    if not site.path:
        return f"the output of module {module!r}{rank}"
    if site.path.startswith("["):
        return f"the tensor {site.path} in the output of module {module!r}{rank}"
    return f"{site.path.removeprefix('.')} inside of module {module!r}{rank}"


class KeyOwners:
    """The owner of each key: the first that claims it.

    ``refused`` are the names of keys that another one asked for, with the owners of both.
    """

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}
        self.refused: dict[str, str] = {}

    def of(self, key: str) -> str | None:
        """The owner of a key, if it has one."""
        return self._owners.get(key)

    def claim(self, keys: Iterable[str], owner: str, name: str) -> bool:
        """Whether all of ``keys`` belong to ``owner``, or do from now on.

        If one belongs to another one, none is given, and ``refused`` says so under ``name``.
        """
        keys = tuple(keys)
        for key in keys:
            known = self._owners.get(key, owner)
            if known != owner:
                self._refuse(name, known, owner)
                return False
        for key in keys:
            self._owners[key] = owner
        return True

    def _refuse(self, name: str, known: str, owner: str) -> None:
        text = self.refused.get(name, f"its key belongs to {known}")
        refused = f"{owner} is not recorded"
        if refused not in text:
            self.refused[name] = f"{text}; {refused}: rename one of them"
