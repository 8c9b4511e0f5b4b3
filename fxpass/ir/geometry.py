"""What a program computes from edge vectors alone, set apart from the rest.

Spherical harmonics, radial values and filters depend on the geometry only: not on species, heads or weights of
other layers, and the energy program needs the same ones as the force program.  Set apart, they can be kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from .cost import SizeNames
from .guards import region_of
from .merge import first_outputs
from .ops import fusion_guard
from .program import Dim, Program, TensorSpec, ancestors

#: the assumption under which a lowering may keep geometry from call to call
KEPT = "geometry kept between calls"


@dataclass(frozen=True)
class Split:
    """A force program in three parts.

    Attributes:
        vectors: position of the edge vectors among the inputs.
        geometry: edge vectors -> kept tensors.
        energy: the program's inputs, then the kept tensors -> its outputs without gradients.
        forces: the same -> all of its outputs.
    """

    vectors: int
    geometry: Program
    energy: Program
    forces: Program


def split_geometry(program: Program, gradients: int | None = None) -> Split | None:
    """Set apart what the energies of ``program`` need of the geometry; None where that is nothing.

    Args:
        program: a force program, legalised or not.
        gradients: how many of its last outputs are gradients; as many as inputs are differentiated if None.
    """
    (spec,) = program.with_property("edge_vector")
    gradients = len(program.differentiated) if gradients is None else gradients
    nodes = list(program.graph.nodes)
    kept = _boundary(program, len(program.outputs) - gradients)
    if not kept:
        return None
    sizes = SizeNames.of(program)
    specs = [TensorSpec(f"kept_{k}", _dims(node, sizes) or (), node.meta["val"].dtype) for k, node in enumerate(kept)]

    geometry = program.copy()
    twin = dict(zip(nodes, geometry.graph.nodes, strict=True))
    geometry.graph.output_node().args = (tuple(twin[node] for node in kept),)
    geometry.graph.eliminate_dead_code()
    for name, placeholder in list(geometry.placeholders.items()):
        if name != spec.name:
            geometry.graph.erase_node(placeholder)
    geometry.graph_module.recompile()

    rest = program.copy()
    twin = dict(zip(nodes, rest.graph.nodes, strict=True))
    last = list(rest.placeholders.values())[-1]
    for node, made in zip(kept, specs, strict=True):
        with rest.graph.inserting_after(last):
            last = rest.graph.placeholder(made.name)
        last.meta["val"] = node.meta["val"]
        twin[node].replace_all_uses_with(last)
    rest.graph.eliminate_dead_code()
    rest.graph_module.recompile()
    forces = replace(rest, inputs=(*program.inputs, *specs))
    return Split(
        program.inputs.index(spec),
        replace(geometry, inputs=(spec,), outputs=tuple(specs), stage="energy", energy=specs[0].name),
        first_outputs(forces, len(program.outputs) - gradients),
        forces,
    )


def _boundary(program: Program, outputs: int) -> list[fx.Node]:
    """The last nodes on every way from the edge vectors that depend on them alone, and can be handed on."""
    returned = list(program.results.values())
    forward = ancestors(returned[:outputs])
    (vectors,) = (program.placeholders[spec.name] for spec in program.with_property("edge_vector"))
    fixed: set[fx.Node] = set()
    known = {vectors}
    geometry: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
        elif node.op == "call_function" and node in forward and known.issuperset(node.all_input_nodes):
            geometry[node] = None
        else:
            continue
        known.add(node)
    sizes = SizeNames.of(program)
    seen = {owner for node in returned for owner in _owners(node)}
    whole = region_of(program.graph)  # a guarded region is kept as a whole or not at all
    while True:
        boundary = [node for node in geometry if any(user not in geometry for user in node.users)]
        unfit = [node for node in boundary if node in seen or node in whole or not _can_be_kept(node, sizes)]
        if not unfit:
            return boundary
        for node in unfit:
            del geometry[node]


def _can_be_kept(node: fx.Node, sizes: SizeNames) -> bool:
    """Whether a node is a tensor with memory of its own whose shape an input can have."""
    (own,) = node.all_input_nodes if node.target is fusion_guard else (node,)
    return isinstance(node.meta.get("val"), torch.Tensor) and not _is_view(own) and _dims(node, sizes) is not None


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.target is fusion_guard or schema is None or any(result.alias_info for result in schema.returns)


def _owners(node: fx.Node) -> list[fx.Node]:
    """The node, and those whose memory it may be a view of: what the caller gets is the caller's to change."""
    found = [node]
    while node.op == "call_function" and _is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        found.append(node)
    return found


def _dims(node: fx.Node, sizes: SizeNames) -> tuple[Dim, ...] | None:
    """The shape as an input declares it, or None where it has no such form."""
    dims: list[Dim] = []
    for dim in sizes.shape(node.meta["val"]):
        if isinstance(dim, sympy.Integer):
            dims.append(int(dim))
        elif isinstance(dim, sympy.Symbol):
            dims.append(dim.name)
        else:
            return None
    return tuple(dims)
