"""Rules that compute some columns instead of slicing them out or masking others: used by ``specialize-heads``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxpass.algebra.irreps import segments
from fxpass.algebra.multilinear import Linear, LinearPath, parse_linear
from fxpass.ir import ops
from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program, attribute
from fxpass.rewrite import Builder, Lit, Match, Op, Refused, Rule, Var, refuse

from .constants import constant_value, constants, taking_over, weight_name

aten = torch.ops.aten
POINTWISE = (
    *(aten.silu.default, aten.tanh.default, aten.sigmoid.default, aten.neg.default),
    *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor),
)
ALL = slice(None)


def slice_of_gather(match: Match, program: Program, builder: Builder, *, x: Any, index: Any, **cut: int) -> fx.Node:
    return taking_over(builder.call(ops.gather, builder.call(aten.slice.Tensor, x, *cut.values()), index), match)


def has_columns(match: Match, program: Program, *, y: fx.Node, **cut: int) -> Refused | None:
    width = y.meta["val"].shape[-1]
    for operand in y.all_input_nodes:
        value = operand.meta["val"]
        if value.dim() and value.shape[-1] not in (1, width):
            return refuse(f"{operand.name} does not broadcast over columns", operand)
    return None


def slice_of_pointwise(match: Match, program: Program, builder: Builder, *, y: fx.Node, **cut: int) -> fx.Node:
    def narrow(operand: fx.Node) -> fx.Node:
        value = operand.meta["val"]
        wide = value.dim() and value.shape[-1] != 1
        return builder.call(aten.slice.Tensor, operand, -1, cut["start"], cut["end"]) if wide else operand

    target: Any = y.target
    return taking_over(builder.call(target, *fx.map_arg(y.args, narrow), **y.kwargs), match)


def is_cuttable(match: Match, program: Program, *, x: Any, weight: fx.Node, spec: str, **cut: Any) -> Refused | None:
    lin = parse_linear(spec)
    layout = lin.irreps_in if "mask" in cut else lin.irreps_out
    if [l for _, _, l, _ in segments(layout)] != [0]:
        return refuse(f"{layout} is not one segment of scalars", match.root)
    if not lin.shared or weight not in constants(program.graph):
        return refuse("the weights are not constants shared by all rows", weight)
    return None


def slice_of_linear(
    match: Match, program: Program, builder: Builder, *, x: Any, weight: Any, spec: str, **cut: int
) -> fx.Node:
    return _cut(match, program, builder, x, weight, spec, ALL, slice(cut["start"], cut["end"]))


def linear_of_mask(
    match: Match, program: Program, builder: Builder, *, x: Any, weight: Any, spec: str, mask: fx.Node
) -> fx.Node:
    kept = attribute(program, mask).nonzero().flatten().tolist()
    rows = slice(kept[0], kept[-1] + 1)
    block = builder.call(aten.slice.Tensor, x, 1, rows.start, rows.stop)
    return _cut(match, program, builder, block, weight, spec, rows, ALL)


def _cut(
    match: Match, program: Program, builder: Builder, x: Any, weight: Any, spec: str, rows: slice, columns: slice
) -> fx.Node:
    linear, value = cut_linear(parse_linear(spec), constant_value(program, weight), rows, columns)
    stored = builder.constant(weight_name(match.root, weight), value)
    return taking_over(builder.call(ops.linear, x, stored, None, str(linear), "out"), match)


def cut_linear(lin: Linear, weight: Tensor, rows: slice, columns: slice) -> tuple[Linear, Tensor]:
    """A linear map from some channels to some channels; where not all are kept, that side is one segment of scalars."""
    ins, outs = segments(lin.irreps_in), segments(lin.irreps_out)
    paths, blocks, at = [], [weight.new_zeros(0)], 0
    for path in lin.paths:
        m, n = ins[path.i][1], outs[path.o][1]
        block = weight.narrow(0, path.weight, m * n).view(m, n)[rows, columns].reshape(-1)
        paths.append(LinearPath(path.i, path.o, at, path.coefficient))
        blocks.append(block)
        at += len(block)

    def scalars(irreps: str, kept: slice) -> str:
        (_, channels, _, parity), *_ = segments(irreps)
        return irreps if kept == ALL else f"{len(range(channels)[kept])}x0{'e' if parity == 1 else 'o'}"

    layouts = scalars(lin.irreps_in, rows), scalars(lin.irreps_out, columns)
    return Linear(*layouts, tuple(paths), at, shared=True), torch.cat(blocks)


def narrowing(made_by: str) -> tuple[Rule, ...]:
    """The rules, for slices and masks of columns that the pass ``made_by`` has made; others are left alone.

    A mask is a buffer [columns] with ones in one block and zeros elsewhere.
    """

    def own_slice(node: fx.Node) -> bool:
        return node.target is aten.slice.Tensor and provenance(node).made_by == made_by

    def own_mask(node: fx.Node) -> bool:
        factor = node.args[1] if node.target is aten.mul.Tensor else None
        return isinstance(factor, fx.Node) and factor.op == "get_attr" and provenance(factor).made_by == made_by

    cut = Lit("dim", lambda dim: dim in (1, -1)), Lit("start"), Lit("end")
    x, weight, spec = Var("x"), Var("weight"), Lit("spec")
    gather, linear = Op(ops.gather, x, Var("index")), Op(ops.linear, x, weight, None, spec, "out")
    masked = Op(own_mask, x, Var("mask"))
    return (
        Rule("slice-of-gather", Op(own_slice, gather, *cut), None, slice_of_gather),
        Rule("slice-of-pointwise", Op(own_slice, Var("y", Op(POINTWISE, ...)), *cut), has_columns, slice_of_pointwise),
        Rule("slice-of-linear", Op(own_slice, linear, *cut), is_cuttable, slice_of_linear),
        Rule("linear-of-mask", Op(ops.linear, masked, weight, None, spec, "out"), is_cuttable, linear_of_mask),
    )
