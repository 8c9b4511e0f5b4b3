"""What is known of a program before it runs: nodes that depend on weights and literals only."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxpass.ir.ops import OpOverload
from fxpass.ir.program import Program, attribute
from fxpass.rewrite import Match, is_pure

aten = torch.ops.aten


def constants(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes that depend on weights and literals only."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        known = isinstance(node.target, OpOverload) and is_pure(node) and bool(node.all_input_nodes)
        if node.op == "get_attr" or (known and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return frozenset(found)


def constant_value(program: Program, node: fx.Node) -> Tensor:
    """Value of one of ``constants``."""
    if node.op == "get_attr":
        return attribute(program, node).detach()
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: constant_value(program, n))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def weight_name(op: fx.Node, weight: fx.Node) -> str:
    """Flat name of the weight that an op reads, through views; the op's own name where there is none."""
    while weight.op != "get_attr" and len(weight.all_input_nodes) == 1:
        (weight,) = weight.all_input_nodes
    return str(weight.target) if weight.op == "get_attr" else op.name


def taking_over(new: fx.Node, match: Match) -> fx.Node:
    """``new`` with the fake value of the root that it replaces, for later rules to read."""
    new.meta["val"] = match.root.meta.get("val")
    return new
