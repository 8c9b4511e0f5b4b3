"""Guarded regions: parts of a graph that are fused, reordered or decomposed as a whole or not at all.

Every tensor enters a region through ``fxpass::fusion_guard(x, "enter REGION")`` and leaves it through
``fxpass::fusion_guard(x, "leave REGION")``; constants, indices and sizes need no guard.  So a region is what lies
on a way from its entries to its exits, in any graph: before and after differentiation, which guards the derivative
of a region by the same two ops, before and after legalisation, and in the graph that a backend makes of it.
A guard is ``x`` itself: it stands in the way of whatever rewrites graphs, and no target computes it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ..errors import Location, PassError
from .metadata import provenance
from .ops import OpOverload, fusion_guard

ENTER, LEAVE = "enter", "leave"


def guards(graph: fx.Graph) -> list[fx.Node]:
    """The guards of a graph, in order."""
    return graph.find_nodes(op="call_function", target=fusion_guard)


def regions(graph: fx.Graph) -> dict[str, tuple[fx.Node, ...]]:
    """The nodes of each guarded region by its name, in order; guards are not counted.

    Raises:
        PassError: a node lies in two regions: a pass went around a guard.
    """
    found: dict[str, list[fx.Node]] = {}
    for node, region in region_of(graph).items():
        found.setdefault(region, []).append(node)
    return {region: tuple(nodes) for region, nodes in found.items()}


def region_of(graph: fx.Graph) -> dict[fx.Node, str]:
    """The region of every node that is in one, in order.

    Raises:
        PassError: a node lies in two regions.
    """
    nodes = [node for node in graph.nodes if not isinstance(node.meta.get("val"), (int, torch.SymInt))]
    into: dict[fx.Node, frozenset[str]] = {node: frozenset() for node in graph.nodes}  # a size belongs to nobody
    out = dict(into)
    for node in nodes:
        into[node] = _own(node, ENTER) if node.target is fusion_guard else _union(into[n] for n in node.all_input_nodes)
    for node in reversed(nodes):
        out[node] = _own(node, LEAVE) if node.target is fusion_guard else _union(out[n] for n in node.users)
    members = {}
    for node in nodes:
        around = () if node.target is fusion_guard else sorted(into[node] & out[node])
        if len(around) > 1:
            raise PassError(
                f"a node lies in the guarded regions {' and '.join(around)}",
                where=Location(node=node.name, module_path=provenance(node).module or None),
                hint="let the pass that moved it stop at fxpass::fusion_guard",
            )
        if around:
            members[node] = around[0]
    return members


def side_and_region(guard: fx.Node) -> tuple[str, str]:
    """``"enter"`` or ``"leave"``, and the name of the region."""
    side, region = str(guard.args[1]).split(" ", 1)
    return side, region


def _own(guard: fx.Node, side: str) -> frozenset[str]:
    known, region = side_and_region(guard)
    return frozenset({region}) if known == side else frozenset()


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*sets)


def lower_guards(graph: fx.Graph, op: OpOverload | None = None) -> int:
    """Replace guards by views, ``op(x)``, or remove them where ``op`` is None, in place.

    Guards that follow one another become one view.

    Returns:
        how many guards there were.
    """
    found = dict.fromkeys(guards(graph))
    for guard in found:
        (x,) = guard.all_input_nodes
        guard.replace_all_uses_with(x, delete_user_cb=lambda user: op is None or user in found)
        if op is not None and guard.users:
            guard.target, guard.args = op, (x,)
        else:
            graph.erase_node(guard)
    return len(found)
