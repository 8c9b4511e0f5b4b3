"""The semantic ops: ``torch.library`` ops in the namespace ``fxpass``.

Each op has a reference implementation, a shape function, a derivative made of ops of this same set,
and a cost.  An op that is a polynomial map takes ``wrt``: the slot with respect to which it is
evaluated.  ``wrt="out"`` is the forward map; every other value is a transposed map, so the derivative
of an op is the same op with another ``wrt``, to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .._torch_compat import OpOverload as OpOverload
from .._torch_compat import size_expr
from ..algebra.multilinear import parse_linear, parse_tensor_product
from ..algebra.piecewise import parse_grid
from ..algebra.polynomial import parse_polynomial
from . import reference
from .contraction import CONTRACTION, CONTRACTION_GRADIENT, contraction, contraction_gradient
from .convolution import CONVOLUTION, CONVOLUTION_GRADIENT, ROWS_BY, convolution, convolution_gradient, rows_by
from .grouped import LINEAR_BY_SPECIES, linear_by_species
from .semantic import (
    SemanticOp,
    define,
    moved,
    no_cost,
    no_irreps,
    no_operands,
    no_summary,
    numel,
    owned,
    rows_of,
    slots,
)

define("tensor_product(Tensor? x1, Tensor? x2, Tensor? weight, Tensor? out, str spec, str wrt) -> Tensor")
define("linear(Tensor? x, Tensor? weight, Tensor? out, str spec, str wrt) -> Tensor")
define(
    "polynomial(Tensor x, Tensor[] directions, Tensor? weight, Tensor? out, Tensor coefficients, "
    "str spec, str wrt) -> Tensor"
)
define("gather(Tensor x, Tensor index) -> Tensor")
define("scatter_sum(Tensor source, Tensor index, SymInt size) -> Tensor")
define("fusion_guard(Tensor x, str spec) -> Tensor", torch.Tag.flexible_layout)
define("dequantize(Tensor q, Tensor scale) -> Tensor")

tensor_product = torch.ops.fxpass.tensor_product.default
linear = torch.ops.fxpass.linear.default
polynomial = torch.ops.fxpass.polynomial.default
gather = torch.ops.fxpass.gather.default
scatter_sum = torch.ops.fxpass.scatter_sum.default
dequantize = torch.ops.fxpass.dequantize.default
define("table(Tensor x, Tensor? index, Tensor coefficients, str spec, int derivative) -> Tensor")
fusion_guard = torch.ops.fxpass.fusion_guard.default
table = torch.ops.fxpass.table.default

for _name in ("tensor_product", "linear", "polynomial", "gather", "scatter_sum", "table", "dequantize"):
    torch.library.impl(f"fxpass::{_name}", "CompositeExplicitAutograd", owned(getattr(reference, _name)))


def _unguarded(x: Tensor, spec: str) -> Tensor:
    """``x`` itself, on its way into or out of a region: ``spec`` is ``"enter REGION"`` or ``"leave REGION"``."""
    return x


torch.library.impl("fxpass::fusion_guard", "CompositeExplicitAutograd", lambda *args: _unguarded(*args).clone())


@torch.library.register_fake("fxpass::tensor_product")
def _(x1: Tensor | None, x2: Tensor | None, weight: Tensor | None, out: Tensor | None, spec: str, wrt: str) -> Tensor:
    tp = parse_tensor_product(spec)
    rows = next(t for t in (x1, x2, out, None if tp.shared else weight) if t is not None)
    if wrt == "weight" and tp.shared:
        return rows.new_empty((tp.weights,))
    return rows.new_empty((rows.shape[0], tp.dims[wrt]))


@torch.library.register_fake("fxpass::linear")
def _(x: Tensor | None, weight: Tensor | None, out: Tensor | None, spec: str, wrt: str) -> Tensor:
    lin = parse_linear(spec)
    rows = next(t for t in (x, out, None if lin.shared else weight) if t is not None)
    if wrt == "weight" and lin.shared:
        return rows.new_empty((lin.weights,))
    return rows.new_empty((rows.shape[0], lin.dims[wrt]))


@torch.library.register_fake("fxpass::polynomial")
def _(
    x: Tensor,
    directions: Sequence[Tensor],
    weight: Tensor | None,
    out: Tensor | None,
    coefficients: Tensor,
    spec: str,
    wrt: str,
) -> Tensor:
    rows, channels, _variables = x.shape
    if wrt == "weight":
        return x.new_empty((rows, coefficients.shape[1], channels))
    return x.new_empty((rows, channels, coefficients.shape[2] if wrt == "out" else x.shape[2]))


@torch.library.register_fake("fxpass::gather")
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((index.shape[0], *x.shape[1:]))


@torch.library.register_fake("fxpass::scatter_sum")
def _(source: Tensor, index: Tensor, size: int) -> Tensor:
    return source.new_empty((size, *source.shape[1:]))


@torch.library.register_fake("fxpass::fusion_guard")
def _(x: Tensor, spec: str) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)  # targets lower it to x itself


@torch.library.register_fake("fxpass::dequantize")
def _(q: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(q.shape)


def _multilinear_autograd(op: Callable[..., Tensor], slots: tuple[str, ...]) -> None:
    """Derivative of a multilinear op: for slot s, swap the incoming gradient for the slot ``wrt`` and ask for s."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *operands, ctx.spec, ctx.wrt = inputs
        ctx.save_for_backward(*operands)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operands = list(ctx.saved_tensors)
        operands[slots.index(ctx.wrt)] = grad
        spec = ctx.spec
        if op is tensor_product and ctx.wrt == "weight":  # paths without weights had no part in it
            spec = str(parse_tensor_product(spec).linear_in_weights)
        grads: list[Tensor | None] = []
        for n, slot in enumerate(slots):
            if slot == ctx.wrt or not ctx.needs_input_grad[n]:
                grads.append(None)
                continue
            given = [None if m == n else t for m, t in enumerate(operands)]
            grads.append(op(*given, spec, slot))
        return (*grads, None, None)

    torch.library.register_autograd(str(op.name()), backward, setup_context=setup)  # type: ignore[attr-defined]


_multilinear_autograd(tensor_product, ("x1", "x2", "weight", "out"))
_multilinear_autograd(linear, ("x", "weight", "out"))


def _polynomial_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, directions, weight, out, coefficients, ctx.spec, ctx.wrt = inputs
    ctx.count = len(directions)
    ctx.save_for_backward(x, weight, out, coefficients, *directions)


def _polynomial_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, out, coefficients, *directions = ctx.saved_tensors
    needs_x, _, needs_weight, needs_out, *_ = ctx.needs_input_grad
    # the form is sum(out * D^d P[directions]) with the slot wrt replaced by grad
    if ctx.wrt == "out":
        out = grad
    elif ctx.wrt == "weight":
        weight = grad
    else:
        directions = [*directions, grad]

    def ask(along: list[Tensor], w: Tensor | None, o: Tensor | None, wrt: str) -> Tensor:
        return polynomial(x, along, w, o, coefficients, ctx.spec, wrt)

    grad_x = ask(directions, weight, out, "direction") if needs_x else None
    grads_d = [ask(directions[:n] + directions[n + 1 :], weight, out, "direction") for n in range(ctx.count)]
    grad_w = ask(directions, None, out, "weight") if needs_weight and ctx.wrt != "weight" else None
    grad_o = ask(directions, weight, None, "out") if needs_out and ctx.wrt != "out" else None
    return grad_x, grads_d, grad_w, grad_o, None, None, None


torch.library.register_autograd("fxpass::polynomial", _polynomial_backward, setup_context=_polynomial_setup)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index = inputs
    ctx.size = x.shape[0]
    ctx.save_for_backward(index)


torch.library.register_autograd(
    "fxpass::gather",
    lambda ctx, grad: (scatter_sum(grad, ctx.saved_tensors[0], ctx.size), None),
    setup_context=_gather_setup,
)


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


torch.library.register_autograd(
    "fxpass::scatter_sum",
    lambda ctx, grad: (gather(grad, ctx.saved_tensors[0]), None, None),
    setup_context=_scatter_setup,
)


def _guard_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    side, region = inputs[1].split(" ", 1)
    ctx.opposite = f"{'leave' if side == 'enter' else 'enter'} {region}"


# The derivative of a region runs from its results to its operands, and is a part of that region.
torch.library.register_autograd(
    "fxpass::fusion_guard",
    lambda ctx, grad: (fusion_guard(grad, ctx.opposite), None),
    setup_context=_guard_setup,
)


@torch.library.register_fake("fxpass::table")
def _(x: Tensor, index: Tensor | None, coefficients: Tensor, spec: str, derivative: int) -> Tensor:
    dtype = torch.float32 if x.dtype in reference.HALF else x.dtype
    return coefficients.new_empty((x.shape[0], coefficients.shape[2]), dtype=dtype)


def _table_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, coefficients, ctx.spec, ctx.derivative = inputs
    ctx.save_for_backward(x, index, coefficients)


def _table_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, index, coefficients = ctx.saved_tensors
    slope = table(x, index, coefficients, ctx.spec, ctx.derivative + 1)
    return (grad * slope).sum(1).to(x.dtype), None, None, None, None


torch.library.register_autograd("fxpass::table", _table_backward, setup_context=_table_setup)


def _dequantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, scale = inputs
    ctx.shape = scale.shape
    ctx.save_for_backward(q)


torch.library.register_autograd(
    "fxpass::dequantize",
    lambda ctx, grad: (None, (grad * ctx.saved_tensors[0].to(grad.dtype)).sum_to_size(ctx.shape)),
    setup_context=_dequantize_setup,
)


def _spec(node: fx.Node) -> str:
    return str(node.args[-2])


def _tp_cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    tp = parse_tensor_product(_spec(node))
    return rows_of(node, skip=(2,) if tp.shared else ()) * tp.flops(), moved(node)


def _linear_cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    lin = parse_linear(_spec(node))
    return rows_of(node, skip=(1,) if lin.shared else ()) * lin.flops(), moved(node)


def _polynomial_cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    poly = parse_polynomial(_spec(node))
    x, directions, weight, *_ = node.args
    count, paths, outputs = node.args[4].meta["val"].shape  # type: ignore[union-attr]
    rows, channels, _ = map(size_expr, x.meta["val"].shape)  # type: ignore[union-attr]
    build = (len(poly.order)) * (1 + len(directions))  # type: ignore[arg-type]
    contraction = 2 * count * paths * outputs + (2 * paths * outputs if weight is not None else 0)
    gradient = 2 * sum(map(len, poly.gradient)) if node.args[-1] == "direction" else 0
    return rows * channels * (build + contraction + gradient), moved(node)


def _tp_irreps(node: fx.Node) -> str | None:
    tp = parse_tensor_product(_spec(node))
    return {"x1": tp.irreps1, "x2": tp.irreps2, "out": tp.irreps_out}.get(str(node.args[-1]))


def _linear_irreps(node: fx.Node) -> str | None:
    lin = parse_linear(_spec(node))
    return {"x": lin.irreps_in, "out": lin.irreps_out}.get(str(node.args[-1]))


def _polynomial_irreps(node: fx.Node) -> str | None:
    poly = parse_polynomial(_spec(node))
    return {"out": poly.irreps_out, "direction": poly.irreps_in}.get(str(node.args[-1]))


def _tp_operands(node: fx.Node) -> dict[str, tuple[fx.Node, str | None]]:
    tp = parse_tensor_product(_spec(node))
    return slots(node, {"x1": tp.irreps1, "x2": tp.irreps2, "out": tp.irreps_out})


def _linear_operands(node: fx.Node) -> dict[str, tuple[fx.Node, str | None]]:
    lin = parse_linear(_spec(node))
    return slots(node, {"x": lin.irreps_in, "out": lin.irreps_out})


def _polynomial_operands(node: fx.Node) -> dict[str, tuple[fx.Node, str | None]]:
    poly = parse_polynomial(_spec(node))
    return slots(node, {"x": poly.irreps_in, "out": poly.irreps_out})


def _first_irreps(node: fx.Node) -> str | None:
    return node.args[0].meta.get("irreps")  # type: ignore[union-attr]


def _tp_summary(node: fx.Node) -> str:
    tp = parse_tensor_product(_spec(node))
    weights = f"{tp.weights} {'shared' if tp.shared else 'per-row'} weights"
    return f"{tp.irreps1} x {tp.irreps2} -> {tp.irreps_out}, {len(tp.paths)} paths, {weights}, wrt {node.args[-1]}"


def _linear_summary(node: fx.Node) -> str:
    lin = parse_linear(_spec(node))
    return f"{lin.irreps_in} -> {lin.irreps_out}, {lin.weights} weights, wrt {node.args[-1]}"


def _polynomial_summary(node: fx.Node) -> str:
    poly = parse_polynomial(_spec(node))
    degree = len(poly.closure) - 1
    text = f"{poly.irreps_in} -> {poly.irreps_out}, degree {degree}, {len(poly.monomials)} monomials"
    return f"{text}, wrt {node.args[-1]}"


def _zero_flops(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    return sympy.Integer(0), moved(node)


def _guard_summary(node: fx.Node) -> str:
    return str(node.args[1])


def _scatter_cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    return numel(node.args[0].meta["val"]), moved(node)  # type: ignore[union-attr]


def _table_cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    """A multiply-add for each term and channel, ten operations to find the row; only rows that are read move."""
    given, index, stored, _, derivative = node.args
    x, coefficients = given.meta["val"], stored.meta["val"]  # type: ignore[union-attr]
    powers, _, channels = coefficients.shape
    terms = max(powers - int(derivative), 0)  # type: ignore[arg-type]
    moved = (terms + 1) * channels * coefficients.element_size() + x.element_size() + (0 if index is None else 8)
    return size_expr(x.shape[0]) * (2 * terms * channels + 10), size_expr(x.shape[0]) * moved


def _table_summary(node: fx.Node) -> str:
    grid, coefficients = parse_grid(_spec(node)), node.args[2].meta["val"]  # type: ignore[union-attr]
    _, rows, channels = coefficients.shape
    coarse = f", then {grid.coarse} to {grid.last:.4g}" if grid.coarse else ""
    text = f"order {grid.order}, {grid.start:.4g} to {grid.end:.4g} in {grid.cells} cells{coarse}, {channels} channels"
    count = rows // grid.rows
    return text + (f", {count} tables" if count > 1 else "") + (f", derivative {node.args[4]}" if node.args[4] else "")


def _dequantize_summary(node: fx.Node) -> str:
    q, scale = (a.meta["val"] for a in node.args)  # type: ignore[union-attr]
    return f"{q.numel()} weights of {8 * q.element_size()} bits, {scale.numel()} scales"


def _dequantize_cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    return numel(node.meta["val"]), moved(node)


SEMANTIC: dict[OpOverload, SemanticOp] = {
    tensor_product: SemanticOp(
        "tensor_product", reference.tensor_product, _tp_summary, _tp_cost, _tp_irreps, _tp_operands
    ),
    linear: SemanticOp("linear", reference.linear, _linear_summary, _linear_cost, _linear_irreps, _linear_operands),
    polynomial: SemanticOp(
        "polynomial",
        reference.polynomial,
        _polynomial_summary,
        _polynomial_cost,
        _polynomial_irreps,
        _polynomial_operands,
    ),
    gather: SemanticOp("gather", reference.gather, no_summary, _zero_flops, _first_irreps, no_operands),
    scatter_sum: SemanticOp(
        "scatter_sum", reference.scatter_sum, no_summary, _scatter_cost, _first_irreps, no_operands
    ),
    fusion_guard: SemanticOp(
        "fusion_guard", _unguarded, _guard_summary, no_cost, _first_irreps, no_operands
    ),
    table: SemanticOp("table", reference.table, _table_summary, _table_cost, no_irreps, no_operands),
    dequantize: SemanticOp(
        "dequantize", reference.dequantize, _dequantize_summary, _dequantize_cost, no_irreps, no_operands
    ),
    **{contraction: CONTRACTION, contraction_gradient: CONTRACTION_GRADIENT},
    linear_by_species: LINEAR_BY_SPECIES,
    **{rows_by: ROWS_BY, convolution: CONVOLUTION, convolution_gradient: CONVOLUTION_GRADIENT},
}
