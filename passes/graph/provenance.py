"""Where an inserted node comes from: which pass, for which sites."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from tmm.core.records import Site
from tmm.passes.graph.subgraphs import nested_calls

_PASS = "tmm_pass"
_SITES = "tmm_sites"


def add_site(node: Node, family: str, site: Site) -> None:
    """Remember that ``node`` was inserted to measure ``site``."""
    label = (family, site)
    if label not in (known := node.meta.get(_SITES, ())):
        node.meta[_SITES] = (*known, label)


def copy_sites(source: Node, target: Node) -> None:
    """Let ``target`` serve the sites that ``source`` serves."""
    target.meta[_SITES] = source.meta.get(_SITES, ())


def sites_of(node: Node) -> tuple[tuple[str, Site], ...]:
    """Family and site of what ``node`` was inserted for."""
    sites: tuple[tuple[str, Site], ...] = node.meta.get(_SITES, ())
    return sites


def pass_of(node: Node) -> str | None:
    """The pass that inserted ``node``; None for a node of the traced program."""
    name: str | None = node.meta.get(_PASS)
    return name


def sign_new_nodes(module: GraphModule, name: str, known: set[Node]) -> None:
    """Mark each node that is not among ``known`` as inserted by the pass ``name``."""
    for node in all_nodes(module):
        if node not in known:
            node.meta[_PASS] = name


def all_nodes(module: GraphModule) -> Iterator[Node]:
    """The nodes of a graph and of the graphs nested in it."""
    yield from module.graph.nodes
    for _, body in nested_calls(module):
        yield from all_nodes(body)
