"""Programs side by side in one, and parts of a program's outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import PassError
from .metadata import provenance, set_provenance
from .program import Program, register


def first_outputs(program: Program, count: int) -> Program:
    """The first ``count`` outputs of a program, as a program of its own at stage ``"energy"``."""
    part = program.copy()
    node = part.graph.output_node()
    node.args = (tuple(node.args[0])[:count],)  # type: ignore[arg-type]
    part.graph.eliminate_dead_code()
    part.graph_module.recompile()
    return replace(part, outputs=program.outputs[:count], stage="energy")


def output_name(name: str, member: int) -> str:
    """What an output of a member is called in the merged program."""
    return f"{name}.{member}"


def merge(programs: Sequence[Program]) -> Program:
    """One program that computes what each of ``programs`` does, from inputs that they share.

    Weights and constants of equal content become one, so that ``common-subexpressions`` finds what members have in
    common: edge lengths, spherical harmonics, radial bases.  The output ``name`` of member k is called ``name.k``.
    First come the outputs of member 0 without its gradient, those of member 1, and so on; then, at stage
    ``"forces"``, the gradients of all members in order.

    Raises:
        PassError: no programs, or programs of different inputs or stages.
    """
    if not programs:
        raise PassError("there are no programs to merge")
    first = programs[0]
    for k, program in enumerate(programs):
        if (program.inputs, program.stage) != (first.inputs, first.stage):
            raise PassError(f"program {k} has other inputs, or is at another stage, than program 0")
    graph, root = fx.Graph(), nn.Module()
    inputs = []
    for spec, node in zip(first.inputs, first.placeholders.values(), strict=True):
        inputs.append(graph.placeholder(spec.name))
        inputs[-1].meta = dict(node.meta)
    placed: dict[tuple[Any, ...], str] = {}
    energies: list[tuple[Any, fx.Node]] = []
    gradients: list[tuple[Any, fx.Node]] = []
    for k, program in enumerate(programs):
        twin = dict(zip(program.placeholders.values(), inputs, strict=True))
        for node in program.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            twin[node] = graph.node_copy(node, twin.__getitem__)
            origin = provenance(node)
            set_provenance(twin[node], replace(origin, module=f"members.{k}.{origin.module}".rstrip(".")))
            if node.op == "get_attr":
                twin[node].target = _place(root, getattr(program.graph_module, str(node.target)), node, placed)
        outputs = [
            (replace(spec, name=output_name(spec.name, k)), twin[node])
            for spec, node in zip(program.outputs, program.results.values(), strict=True)
        ]
        last = len(outputs) - (len(program.differentiated) if program.stage == "forces" else 0)
        energies += outputs[:last]
        gradients += outputs[last:]
    specs, nodes = zip(*energies, *gradients, strict=True)
    graph.output(tuple(nodes))
    module = fx.GraphModule(root, graph, class_name="Program")
    assumptions = tuple(dict.fromkeys(fact for program in programs for fact in program.assumptions))
    return replace(
        first, graph_module=module, outputs=specs, energy=output_name(first.energy, 0), assumptions=assumptions
    )


def _place(root: nn.Module, tensor: Tensor, node: fx.Node, placed: dict[tuple[Any, ...], str]) -> str:
    """Store a weight under a flat name, tensors of the same content once; returns the name."""
    whole = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # one row of another keeps its stride
    raw = whole.flatten().view(torch.uint8)  # numpy knows no bfloat16
    learned = isinstance(tensor, nn.Parameter), tensor.requires_grad
    digest = hashlib.sha256(raw.numpy().tobytes()).digest()
    key = (tensor.dtype, tuple(tensor.shape), str(tensor.device), digest, *learned)
    if key not in placed:
        placed[key] = register(root, str(node.target), tensor)
    return placed[key]
