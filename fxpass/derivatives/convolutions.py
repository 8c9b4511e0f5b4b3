"""Second derivatives of convolutions over edges, in convolutions.

F = sum(g * convolution(x, y, w(r))) is linear in x, y, w and g.  Its gradients are ``convolution_gradient``; the
derivatives of these along directions a of x, b of y and c of r are those of F(a, y, w) + F(x, b, w) + F(x, c y, v),
where v is read from the table of the slopes of w.  So nothing of size edges x weights is made, to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.multilinear import parse_tensor_product
from ..algebra.piecewise import COARSE, parse_grid
from ..ir.convolution import convolution, convolution_gradient, rows_by
from ..ir.program import Program, attribute


@dataclass(frozen=True)
class Slopes:
    """Tables of the slopes of the tables of a program.

    Attributes:
        of: identity of the coefficients of a table -> those of its slope.
        named: the latter by a name of their own.
    """

    of: Mapping[int, Tensor]
    named: Mapping[str, Tensor]

    @classmethod
    def to(cls, program: Program, order: int) -> Slopes:
        """Of all tables that convolutions of ``program`` read, and of these, ``order`` times over."""
        of: dict[int, Tensor] = {}
        named: dict[str, Tensor] = {}
        names = [argument.name for argument in convolution._schema.arguments]
        for node in program.graph.find_nodes(op="call_function", target=convolution):
            stored, grid = (node.args[names.index(name)] for name in ("coefficients", "grid"))
            if stored is None or stored.op != "get_attr":
                continue
            coefficients = attribute(program, stored)
            for k in range(order):
                if id(coefficients) not in of:
                    of[id(coefficients)] = named[f"{stored.target}_slope_{k + 1}"] = slope_of(coefficients, grid)
                coefficients = of[id(coefficients)]
        return cls(of, named)

    def rules(self) -> dict[Any, Callable[..., Any]]:
        """What runs in place of an op while a program is differentiated."""

        def gradient(*args: Any) -> Any:
            table = args[5]
            if table is not None and id(table) not in self.of:  # made within the program, as of a cast
                return convolution_gradient(*args)
            return _Gradient.apply(self, *args)

        return {convolution_gradient: gradient}


def slope_of(coefficients: Tensor, text: str) -> Tensor:
    """Coefficients of the derivative of a table by its argument, on the same grid."""
    grid = parse_grid(text)
    powers, rows, _ = coefficients.shape
    scale = torch.full((grid.rows,), grid.cells / (grid.end - grid.start), dtype=torch.float64)
    if grid.coarse:
        scale[grid.cells + 1 :] /= COARSE
    scale = scale.repeat(rows // grid.rows)
    factors = torch.arange(1, powers, dtype=torch.float64)
    slope = coefficients[1:].double() * factors[:, None, None] * scale[:, None]
    return torch.cat([slope, torch.zeros_like(slope[:1])]).to(coefficients.dtype)


class _Gradient(torch.autograd.Function):
    """``convolution_gradient`` with the derivative above."""

    @staticmethod
    def forward(ctx: Any, slopes: Slopes, *args: Any) -> Any:
        x, y, g, radial, species, coefficients, sender, receiver, order, *ctx.rest = args
        ctx.set_materialize_grads(False)
        ctx.slopes, ctx.coefficients = slopes, coefficients
        ctx.save_for_backward(x, y, g, radial, species, sender, receiver, order)
        return convolution_gradient(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, y, g, radial, species, sender, receiver, order = ctx.saved_tensors
        spec, grid, needs = ctx.rest
        tp = parse_tensor_product(spec)
        along = [value if need else None for value, need in zip(grads, needs, strict=True)]
        wanted = ctx.needs_input_grad[1:5]
        found: list[list[Tensor]] = [[], [], [], []]  # by x, y, g, radial
        rows = rows_by(receiver, g.shape[0])

        def add(form: str, x: Tensor, y: Tensor, r: Tensor, table: Tensor | None, by: tuple[int, ...]) -> None:
            text, kinds = (grid, species) if table is not None else ("", None)
            needed = [wanted[slot] and slot in by for slot in (0, 1, 3)]
            if wanted[2]:
                size = g.shape[0]
                found[2].append(convolution(x, y, r, kinds, table, sender, receiver, rows, size, form, text))
            if any(needed):
                operands = (x, y, g, r, kinds, table, sender, receiver, order, form, text, needed)
                for slot, value in zip((0, 1, 3), _Gradient.apply(ctx.slopes, *operands), strict=True):
                    if wanted[slot] and slot in by:
                        found[slot].append(value)

        table = ctx.coefficients
        weighted = (3,) if tp.weights else ()
        if along[0] is not None:
            add(spec, along[0], y, radial, table, (1, *weighted))
        if along[1] is not None:
            add(spec, x, along[1], radial, table, (0, *weighted))
        if along[2] is not None:
            linear = str(tp.linear_in_weights)
            if table is None:
                add(linear, x, y, along[2], None, (0, 1))
            else:
                factor, before = along[2].unsqueeze(1), len(found[1])
                add(linear, x, y * factor, radial, ctx.slopes.of[id(table)], (0, 1, 3))
                found[1][before:] = [value * factor for value in found[1][before:]]
        totals = [sum(terms[1:], terms[0]) if terms else None for terms in found]
        return (None, *totals, *[None] * 8)
