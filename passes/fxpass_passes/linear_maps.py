"""Linear maps as nodes of a graph: what they read, their transposes, compositions and weights by block."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxpass.algebra.irreps import segments
from fxpass.algebra.multilinear import Linear, LinearPath, parse_linear
from fxpass.ir import ops
from fxpass.ir.program import Program
from fxpass.rewrite import OneOf, Op
from fxpass.rewrite.pattern import Pattern

from .constants import constant_value

Blocks = dict[tuple[int, int], Tensor]  # (segment read, segment written) -> [channels read, channels written]


def linear_map(node: fx.Node) -> bool:
    """A linear map of rows, forward or transposed."""
    return node.target is ops.linear and node.args[-1] in ("out", "x")


def reading(value: Pattern) -> OneOf:
    """A linear map, forward or transposed, of rows that match ``value``."""
    return OneOf(Op(ops.linear, ..., x=value, wrt="out"), Op(ops.linear, ..., out=value, wrt="x"))


def operand(node: fx.Node) -> fx.Node:
    """The rows that a linear map reads."""
    x = node.args[0] if node.args[-1] == "out" else node.args[2]
    assert isinstance(x, fx.Node)
    return x


def oriented(node: fx.Node) -> Linear:
    """A map from what it reads to what it returns."""
    linear = parse_linear(str(node.args[-2]))
    return linear if node.args[-1] == "out" else linear.transposed


def add_to(blocks: Blocks, ends: tuple[int, int], block: Tensor) -> None:
    """Add ``block`` between two segments."""
    blocks[ends] = blocks[ends] + block if ends in blocks else block


def blocks_of(program: Program, node: fx.Node) -> Blocks:
    """Weights of a map by segments, from what it reads to what it returns, coefficients included, in float64."""
    linear, backward = parse_linear(str(node.args[-2])), node.args[-1] == "x"
    assert isinstance(node.args[1], fx.Node)
    weight = constant_value(program, node.args[1]).to("cpu", torch.float64)
    ins, outs = segments(linear.irreps_in), segments(linear.irreps_out)
    found: Blocks = {}
    for p in linear.paths:
        m, n = ins[p.i][1], outs[p.o][1]
        block = weight.narrow(0, p.weight, m * n).view(m, n) * p.coefficient
        add_to(found, (p.o, p.i) if backward else (p.i, p.o), block.T if backward else block)
    return found


def product(inner: Blocks, outer: Blocks) -> Blocks:
    """Blocks of the map ``outer`` of ``inner``."""
    found: Blocks = {}
    for (i, middle), a in inner.items():
        for (again, o), b in outer.items():
            if again == middle:
                add_to(found, (i, o), a @ b)
    return found


def joined(layout: Linear, blocks: Blocks) -> tuple[Linear, Tensor]:
    """The map between the layouts of ``layout`` that has ``blocks``, and its weights [weights] in float64."""
    paths, at = [], 0
    ends = sorted(blocks)
    for i, o in ends:
        paths.append(LinearPath(i, o, at, 1.0))
        at += blocks[i, o].numel()
    weight = torch.cat([torch.zeros(0, dtype=torch.float64), *(blocks[key].flatten() for key in ends)])
    return Linear(layout.irreps_in, layout.irreps_out, tuple(paths), at, shared=True), weight


def is_quantized(weight: fx.Node) -> bool:
    """Whether weights are made of stored integers."""
    return weight.target is ops.dequantize or any(map(is_quantized, weight.all_input_nodes))
