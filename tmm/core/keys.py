"""Names of values: composed and parsed here, and nowhere else.

A key is ``family/site/metric``, or a name that a user chose. Keys of attention, of whole steps and
of the system end with their site, which may have parts: ``system/gpu_0/memory``.
"""

from __future__ import annotations

import re
from dataclasses import replace

from tmm.core.families import ATTENTION, GRADIENT, RCC, STEP, SYSTEM, family_of
from tmm.core.records import ROOT_NAME, KeyInfo, of_rank

SEPARATOR = "/"
"""Between the parts of a key, so that no name of a metric may hold it."""

LOSS_WORDS = frozenset({"loss", "losses"})
NO_LOSS_WORDS = frozenset({"scale", "scaler", "scaling", "weight", "coefficient", "coef", "count"})
"""Words that make something else of a name that contains ``loss``, such as ``loss_scale``."""

TOTAL_WORDS = LOSS_WORDS.union(
    ("train", "training", "val", "valid", "validation", "eval", "test"),
    ("total", "mean", "average", "avg", "step", "epoch"),
)
"""What the name of the loss that is optimised, or its like on other data, consists of."""

_WORD = re.compile(r"[A-Z]+[0-9]*(?![a-z])|[A-Z]?[a-z]+[0-9]*|[0-9]+")


_HEAD = re.compile(r"(\.call_\d+)?(\.head_\d+)?(\.(query|key|value|activation))?$")
_PART = re.compile(r"\.head_\d+\.(query|key|value|activation)$")
_WITHOUT_BIAS = ".weight"


def key_of(family: str, *names: str) -> str:
    """The key of a family, a site and a metric, or of the parts of a site; without empty ones."""
    return SEPARATOR.join(part for part in (family, *names) if part)


def key_of_metric(site: str, metric: str) -> str:
    """The key of a metric of a site, which `key_of` made of a family and a name."""
    return key_of(site, metric)


def parts_of(site: str) -> tuple[str, str]:
    """The family and the name that `key_of` made a site of; no name if it has no family."""
    family, _, name = site.partition(SEPARATOR)
    return family, name


def system_key(*parts: str) -> str:
    """The key of something of the machine or the process, such as of ``"gpu_0", "memory"``."""
    return key_of(SYSTEM.name, *parts)


SKIPPED = key_of(STEP.name, "skipped")
"""Whether the step of an optimizer was skipped, by a scaler of gradients."""

GRAD_SCALE = key_of(STEP.name, "grad_scale")
OPTIMIZER_AGE = key_of(STEP.name, "optimizer_age")
"""How many steps the state of an optimizer has seen; of several the fewest."""

STARTED = key_of(STEP.name, "started")
"""1 at the first monitored step of a start of the run; a run that is resumed has several."""

REPLICAS_DIFFERING = key_of(STEP.name, "replicas_differing")
"""How many parameters ranks do not hold alike, which are to be replicas; 0 if all are."""

UNTRAINED = ("frozen", "without_optimizer", "without_gradient")
"""Why a parameter is not trained."""
TOTAL_NORM = "gradient_norm"
"""What is of several gradients together."""


def is_of_system(key: str) -> bool:
    """Whether `system_key` made the key."""
    return parts_of(key)[0] == SYSTEM.name


def total_norm(family: str, block: str = "") -> str:
    """The key of the norm of all gradients of a family together, or of those of a block."""
    return key_of(STEP.name, family.replace(GRADIENT.name, TOTAL_NORM, 1), block)


def replica_key(parameter: str) -> str:
    """The key that says that a parameter is the first of which ranks hold different ones."""
    return key_of(REPLICAS_DIFFERING, parameter)


def replica_of(info: KeyInfo) -> str | None:
    """The parameter of which `replica_key` made a key; None for other keys."""
    start, name = parts_of(info.site)
    is_replica = info.kind == STEP.name and key_of(STEP.name, start) == REPLICAS_DIFFERING
    return name or None if is_replica else None


def key_of_rank(info: KeyInfo, rank: int) -> KeyInfo:
    """What a key is called of which a rank has its own, beside those of other ranks."""
    site = key_of(info.kind, info.site) if info.site != info.kind else info.site
    start = site if info.key.startswith(site) else info.key
    key = of_rank(start, rank) + info.key[len(start) :]
    return replace(info, key=key, site=of_rank(info.site, rank))


def untrained_key(reason: str, parameter: str) -> str:
    """The key that says that a parameter is not trained, for one of the reasons `UNTRAINED`."""
    return key_of(STEP.name, reason, parameter)


def untrained_of(info: KeyInfo) -> tuple[str, str] | None:
    """The reason and the parameter of which `untrained_key` made a key; None for other keys."""
    reason, name = parts_of(info.site)
    return (reason, name) if info.kind == STEP.name and reason in UNTRAINED and name else None


def is_total_norm(info: KeyInfo) -> bool:
    """Whether it is the norm of several gradients together."""
    return info.kind == STEP.name and info.site.startswith(TOTAL_NORM)


def block_of_norm(info: KeyInfo) -> str:
    """The block of a norm of several gradients; empty for that of all, and for other keys."""
    return parts_of(info.site)[1] if is_total_norm(info) else ""


def is_family(kind: str) -> bool:
    """Whether ``kind`` is the first part of keys that tmm makes itself."""
    return family_of(kind) is not None


def reserved_start(key: str) -> str | None:
    """What a key begins with, up to its first slash, if only tmm makes such keys."""
    start, separator, _ = key.partition(SEPARATOR)
    return f"{start}{SEPARATOR}" if separator and own_family(start) else None


def own_family(name: str) -> str | None:
    """What a name begins with, if it is the first part of keys that only tmm makes."""
    start = name.partition(SEPARATOR)[0].partition(" ")[0]
    return start if is_family(start) else None


def info_of(key: str, position: int = 0) -> KeyInfo:
    """What the key says of itself."""
    kind, _, rest = key.partition(SEPARATOR)
    site, _, metric = rest.rpartition(SEPARATOR)
    family = family_of(kind)
    if family is None or not metric or not family.ends_with_metric:
        site = ""
    return KeyInfo(key, kind, site or rest or key, position, "")


def metric_of(info: KeyInfo) -> str:
    """The metric at the end of a key; empty for keys that have none."""
    for prefix in (key_of(info.kind, info.site), info.site):
        if info.key.startswith(prefix):
            return info.key[len(prefix) :].lstrip(SEPARATOR)
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
    *folders, name = info.key.split(SEPARATOR)
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


def layer_of(info: KeyInfo) -> str:
    """The module that a key belongs to; empty for keys that belong to none."""
    family, site = family_of(info.kind), info.site
    if family is None or family.subject is None:
        return block_of_norm(info) if parts_of(site)[0] == TOTAL_NORM else ""
    if family.subject == "parameters":
        return site.rpartition(".")[0] or ROOT_NAME
    if site.startswith(ROOT_NAME):
        return ROOT_NAME
    if family is RCC:
        return site.removesuffix(_WITHOUT_BIAS)
    if family is ATTENTION or part_of_head(info):
        site = _HEAD.sub("", site)
    return site.partition("[")[0]


def part_of_head(info: KeyInfo) -> str:
    """Which tensor of an attention head a key is of, such as ``"query"``; empty for others."""
    part = _PART.search(info.site)
    return part[1] if part else ""


def is_without_bias(info: KeyInfo) -> bool:
    """Whether a norm of the coordinate check leaves out the bias."""
    return info.site.endswith(_WITHOUT_BIAS)
