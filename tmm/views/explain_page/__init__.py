"""Private: an explanation as one HTML page that needs nothing else."""

from __future__ import annotations

import difflib
import html
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeAlias

from tmm.core.keys import key_of, parts_of
from tmm.core.records import ROOT_NAME
from tmm.instrumentation.graph_report import GraphReport
from tmm.passes.graph.printer import NodeLine

if TYPE_CHECKING:
    from tmm.steps.explanation import Explanation

Row: TypeAlias = dict[str, Any]

_OWNER = "[this module]"  # how a node names the module whose frame was traced
_PAIRS = {"equal": "same", "replace": "changed", "delete": "removed", "insert": "inserted"}


def page(explanation: Explanation) -> str:
    """The page's HTML: style, script and data are part of it, and it loads nothing."""
    data = _data(explanation)
    # Inside of a script element only "<" can end the element or open a comment.
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "<!-- title -->": html.escape(str(data["title"])),
        "/* style */": _resource("page.css"),
        "/* script */": _resource("page.js") + _resource("graphs.js"),
        "/* data */": embedded,
    }
    text = _resource("page.html")
    for mark, part in parts.items():  # the data come last: marks in them stay what they are
        text = text.replace(mark, part, 1)
    return text


def _resource(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _data(explanation: Explanation) -> dict[str, Any]:
    names = [module.name for module in explanation.modules]
    root = next((m.type for m in explanation.modules if m.name == ROOT_NAME), "")
    return {
        "title": f"tmm.explain: {root}" if root else "tmm.explain",
        "type": root,
        "root": ROOT_NAME,
        "modules": [
            {
                "name": module.name,
                "type": module.type,
                "metrics": module.metrics,
                "measured": "both" if " and " in module.measured else module.measured or "none",
                "parent": _parent(module.name, names),
            }
            for module in explanation.modules
        ],
        "rules": [
            {
                "rule": rule.rule,
                "matched": rule.matched,
                "count": len(rule.matched) + len(rule.others),
                "subject": rule.subject.removesuffix("s"),
            }
            for rule in explanation.rules
        ],
        "rows": explanation.rows,
        "regions": _grouped(explanation.regions),
        "recorded": explanation.recorded,
        "eager": _grouped(explanation.eager),
        "unmeasured": _grouped(explanation.unmeasured | explanation.without_rows),
        "notes": _grouped(explanation.notes),
        "graphs": [_graph(graph, frozenset(names)) for graph in explanation.graphs],
    }


def _grouped(texts: Mapping[str, str]) -> list[dict[str, object]]:
    """Names by their text: many modules tend to share few reasons."""
    groups: dict[str, list[str]] = {}
    for name, text in texts.items():
        groups.setdefault(text, []).append(name)
    return [{"text": text, "names": names} for text, names in groups.items()]


def _parent(name: str, names: Collection[str]) -> str | None:
    if name == ROOT_NAME:
        return None
    parent = name
    while "." in parent:
        parent = parent.rpartition(".")[0]
        if parent in names:
            return parent
    return ROOT_NAME if ROOT_NAME in names else None


def _graph(graph: GraphReport, names: Collection[str]) -> dict[str, Any]:
    return {
        "index": graph.index,
        "owner": graph.owner,
        "settings": graph.settings,
        "rows": graph.rows,
        "outputs": graph.outputs,
        "bytes": graph.bytes,
        "seconds": graph.seconds,
        "endedBy": graph.ended_by,
        "before": len(graph.before),
        "after": len(graph.after),
        "nodes": [
            _row(kind, before, after, graph.owner, names)
            for kind, before, after in _aligned(graph.before, graph.after)
        ],
    }


def _aligned(
    before: Sequence[NodeLine], after: Sequence[NodeLine]
) -> Iterator[tuple[str, NodeLine | None, NodeLine | None]]:
    """What became of each node, in the order of the graph after the passes.

    Nodes that a pass inserted are known as such; only the others are compared by their text.
    """
    kept = [node for node in after if not node.inserted_by]
    pairs = _paired(before, kept)
    for node in after:
        if node.inserted_by:
            yield "inserted", None, node
            continue
        for kind, old, new in pairs:
            yield kind, old, new
            if new is not None:
                break
    yield from pairs


def _paired(
    before: Sequence[NodeLine], after: Sequence[NodeLine]
) -> Iterator[tuple[str, NodeLine | None, NodeLine | None]]:
    old_texts, new_texts = ([node.text for node in nodes] for nodes in (before, after))
    matcher = difflib.SequenceMatcher(None, old_texts, new_texts, autojunk=False)
    for tag, start, end, new_start, new_end in matcher.get_opcodes():
        old, new = before[start:end], after[new_start:new_end]
        paired = min(len(old), len(new))
        for left, right in zip(old, new, strict=False):
            yield _PAIRS[tag], left, right
        yield from (("removed", node, None) for node in old[paired:])
        yield from (("inserted", None, node) for node in new[paired:])


def _row(
    kind: str, before: NodeLine | None, after: NodeLine | None, owner: str, names: Collection[str]
) -> Row:
    node = after or before
    assert node is not None
    row: Row = {"kind": kind}
    if before is not None:
        row["before"] = before.text
    if after is not None and kind != "same":
        row["after"] = after.text
    if node.inserted_by:
        sites = [_site(label, owner, names) for label in node.measures]
        row["pass"] = node.inserted_by
        row["measures"] = [label for label, _ in sites]
        row["modules"] = list(dict.fromkeys(module for _, module in sites if module))
    else:
        # A frame's own nodes may say nothing of modules.
        found = _located(node.module or _OWNER, owner, names)
        row["modules"] = [found[0] if found else node.module]
    return row


def _site(label: str, owner: str, names: Collection[str]) -> tuple[str, str | None]:
    """A site's label with the name that its module has in the model, and that name."""
    family, site = parts_of(label)
    found = _located(site, owner, names) if site else None
    if found is None:
        return label, None
    module, path = found
    return key_of(family, module + path), module


def _located(site: str, owner: str, names: Collection[str]) -> tuple[str, str] | None:
    """The model's name of a module that a graph names relative to its owner, and what follows.

    What follows are the brackets that locate a tensor in the module's output.
    """
    head = site
    while True:
        if head in ("", _OWNER):
            return owner, site.removeprefix(head)
        below = head if owner == ROOT_NAME else f"{owner}.{head}"
        for name in (below, head):
            if name in names:
                return name, site.removeprefix(head)
        if "[" not in head:
            return None
        head = head.rpartition("[")[0]
