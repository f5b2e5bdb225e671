"""What the name of a key says: its family, its site, its metric, whether it is a loss."""

from __future__ import annotations

import re

from tmm.layout import ATTENTION, FAMILIES, ROOT_NAME, KeyInfo

LOSS_WORDS = frozenset({"loss", "losses"})
NO_LOSS_WORDS = frozenset({"scale", "scaler", "scaling", "weight", "coefficient", "coef", "count"})
"""Words that make something else of a name that contains ``loss``, such as ``loss_scale``."""

TOTAL_WORDS = LOSS_WORDS.union(
    ("train", "training", "val", "valid", "validation", "eval", "test"),
    ("total", "mean", "average", "avg", "step", "epoch"),
)
"""What the name of the loss that is optimised, or its like on other data, consists of."""

_WORD = re.compile(r"[A-Z]+[0-9]*(?![a-z])|[A-Z]?[a-z]+[0-9]*|[0-9]+")


def is_family(kind: str) -> bool:
    """Whether ``kind`` is the first part of keys that tmm makes itself."""
    return kind in FAMILIES or kind.startswith((f"{ATTENTION}_", "RCC "))


def info_of(key: str, position: int = 0) -> KeyInfo:
    """What the key says of itself: ``family/site/metric``, or a name that a user chose.

    Keys of attention, of steps and of the system end with their site.
    """
    kind, _, rest = key.partition("/")
    site, _, metric = rest.rpartition("/")
    if not is_family(kind) or not metric or kind in ("step", "system") or _is_attention(kind):
        site = ""
    return KeyInfo(key, kind, site or rest or key, position, "")


def metric_of(info: KeyInfo) -> str:
    """The metric at the end of a key; empty for keys that have none."""
    for prefix in (f"{info.kind}/{info.site}", info.site):
        if info.key.startswith(prefix):
            return info.key[len(prefix) :].lstrip("/")
    return ""


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: ``valLoss``, ``val_loss`` and ``val.loss`` have two."""
    return [word.lower() for word in _WORD.findall(name)]


def is_loss(info: KeyInfo) -> bool:
    """Whether the key is that of a loss.

    The last part of its path contains the word, or an earlier part is it (``Loss/train``); keys of
    tmm's own families are none.
    """
    if is_family(info.kind):
        return False
    *folders, name = info.key.split("/")
    words = set(words_of(name))
    if words & NO_LOSS_WORDS:
        return False
    return bool(words & LOSS_WORDS) or any(folder.lower() in LOSS_WORDS for folder in folders)


def is_total_loss(info: KeyInfo) -> bool:
    """Whether it is the loss as a whole, rather than one of its terms such as ``kl_loss``."""
    return is_loss(info) and set(words_of(info.key)) <= TOTAL_WORDS


def is_inside(inner: str, outer: str) -> bool:
    """Whether the site ``inner`` lies in a module below that of the site ``outer``."""
    if outer.startswith(ROOT_NAME):
        return not inner.startswith(ROOT_NAME)
    return inner.startswith(f"{outer.partition('[')[0]}.")


def _is_attention(kind: str) -> bool:
    return kind.startswith(f"{ATTENTION}_")
