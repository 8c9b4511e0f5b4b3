"""The fused convolution over edges and its gradient, as semantic ops.

``convolution`` is a gather of features by sender, a tensor product with what each edge carries, weighted by a table of
one number per edge or by given weights, and a sum by receiver.  ``convolution_gradient`` gives the gradients by its
features, by what the edges carry and by that number, of which any subset may be asked for.  A kernel that implements
them keeps nothing of size edges x channels x paths; the references here compose the ops that they stand for.

``rows_by`` sorts edges by an index into rows: a kernel then runs over rows, and no two threads write to one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .._torch_compat import size_expr
from ..algebra.multilinear import CHANNELS, TensorProduct, parse_tensor_product
from ..algebra.piecewise import parse_grid
from . import reference
from .semantic import SemanticOp, define, moved, no_irreps, no_operands, no_summary, numel, owned

define("rows_by(Tensor index, SymInt size) -> Tensor")
define(
    "convolution(Tensor x, Tensor y, Tensor radial, Tensor? species, Tensor? coefficients, Tensor sender, "
    "Tensor receiver, Tensor order, SymInt size, str spec, str grid) -> Tensor"
)
define(
    "convolution_gradient(Tensor x, Tensor y, Tensor g, Tensor radial, Tensor? species, Tensor? coefficients, "
    "Tensor sender, Tensor receiver, Tensor order, str spec, str grid, bool[3] needs) -> (Tensor, Tensor, Tensor)"
)

rows_by = torch.ops.fxpass.rows_by.default
convolution = torch.ops.fxpass.convolution.default
convolution_gradient = torch.ops.fxpass.convolution_gradient.default


def fusible(tp: TensorProduct) -> str | None:
    """Why no kernel takes a tensor product; None where one does.

    Kernels run channels of the first operand and of the result as the lanes of one vector: every path must map them
    one to one, weighted by one number per row and channel, or by none.
    """
    if not tp.paths:
        return "it has no paths"
    if tp.shared and tp.weights:
        return "its weights are shared by all rows"
    for path in tp.paths:
        if "w" in CHANNELS[path.mode][2] or "u" not in CHANNELS[path.mode][3]:
            return f"a path of mode {path.mode} mixes channels"
        if tp.sizes(path)["v"] != 1:
            return f"the second operand has {tp.sizes(path)['v']} channels in a path of mode {path.mode}"
    return None


def _rows_by(index: Tensor, size: int) -> Tensor:
    """Where the rows of each value of ``index`` begin, and the order that sorts them.

    Args:
        index: [n] int64, below ``size``.

    Returns:
        int64 [size + 1 + n]: offsets, then the stable permutation: the positions at which ``index`` is k are entries
        ``offsets[k]`` to ``offsets[k + 1]`` of it.
    """
    counts = torch.index_add(index.new_zeros((size + 1,)), 0, index + 1, torch.ones_like(index))
    return torch.cat([counts.cumsum(0), torch.argsort(index, stable=True)])


def _convolution(
    x: Tensor,
    y: Tensor,
    radial: Tensor,
    species: Tensor | None,
    coefficients: Tensor | None,
    sender: Tensor,
    receiver: Tensor,
    order: Tensor,
    size: int,
    spec: str,
    grid: str,
) -> Tensor:
    """Sum by receiver of tensor products over edges: [size, columns of the result].

    Args:
        x: [rows, columns], features.
        y: [edges, columns], the second operand, e.g. spherical harmonics.
        radial: [edges], at which the table is read; without a table [edges, weights].
        species: [edges] int64, number of the table of each edge; None where there is one.
        coefficients: of the table, see ``reference.table``; None where ``radial`` holds the weights themselves.
        sender, receiver: [edges] int64.
        order: ``rows_by(receiver, size)``.
        spec: of the tensor product.
        grid: of the table, empty without one.
    """
    weights = radial if coefficients is None else reference.table(radial, species, coefficients, grid, 0)
    messages = reference.tensor_product(reference.gather(x, sender), y, weights, None, spec, "out")
    return reference.scatter_sum(messages, receiver, size)


def _convolution_gradient(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    radial: Tensor,
    species: Tensor | None,
    coefficients: Tensor | None,
    sender: Tensor,
    receiver: Tensor,
    order: Tensor,
    spec: str,
    grid: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(g * convolution) by x, y and radial, each of its operand's shape; ``[0]`` where not needed.

    Args:
        g: [size, columns of the result].
        order: ``rows_by(sender, rows of x)``.
        needs: which of the three gradients are made.
    """
    weights = radial if coefficients is None else reference.table(radial, species, coefficients, grid, 0)
    features, incoming = reference.gather(x, sender), reference.gather(g, receiver)
    none = [operand.new_empty((0,)) for operand in (x, y, radial)]
    by_x, by_y, by_radial = none
    if needs[0]:
        by_edge = reference.tensor_product(None, y, weights, incoming, spec, "x1")
        by_x = reference.scatter_sum(by_edge, sender, x.shape[0])
    if needs[1]:
        by_y = reference.tensor_product(features, None, weights, incoming, spec, "x2")
    if needs[2]:
        by_radial = reference.tensor_product(features, y, None, incoming, spec, "weight")
        if coefficients is not None:
            by_radial = (by_radial * reference.table(radial, species, coefficients, grid, 1)).sum(1)
    return by_x, by_y, by_radial


torch.library.impl("fxpass::rows_by", "CompositeExplicitAutograd", owned(_rows_by))
torch.library.impl("fxpass::convolution", "CompositeExplicitAutograd", owned(_convolution))
torch.library.impl("fxpass::convolution_gradient", "CompositeExplicitAutograd", owned(_convolution_gradient))


@torch.library.register_fake("fxpass::rows_by")
def _(index: Tensor, size: int) -> Tensor:
    return index.new_empty((size + 1 + index.shape[0],))


@torch.library.register_fake("fxpass::convolution")
def _(x: Tensor, *args: Any) -> Tensor:
    size, spec, _grid = args[-3:]
    return x.new_empty((size, parse_tensor_product(spec).dims["out"]))


@torch.library.register_fake("fxpass::convolution_gradient")
def _(x: Tensor, y: Tensor, g: Tensor, radial: Tensor, *args: Any) -> tuple[Tensor, ...]:
    needs = args[-1]
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((x, y, radial), needs, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, _order, _size, ctx.spec, ctx.grid = inputs
    ctx.save_for_backward(*operands)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y, radial, species, coefficients, sender, receiver = ctx.saved_tensors
    weighted = parse_tensor_product(ctx.spec).weights > 0
    needs = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and weighted]
    order = rows_by(sender, x.shape[0])
    grads = convolution_gradient(
        x, y, grad, radial, species, coefficients, sender, receiver, order, ctx.spec, ctx.grid, needs
    )
    return (*(value if need else None for value, need in zip(grads, needs, strict=True)), *[None] * 8)


torch.library.register_autograd("fxpass::convolution", _backward, setup_context=_setup)


def _gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, _order, ctx.spec, ctx.grid, ctx.needs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands)


def _gradient_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Derivative of the gradients, each multiplied by its own incoming gradient and added up.

    That sum is the derivative of the form F = sum(g * convolution) along the incoming gradients as directions of x, y
    and radial.  F is linear in each of x, y, weights and g by edge, so it is a sum of forms F with a direction in the
    place of an operand, and its derivatives are convolutions and gradients of convolutions.
    """
    x, y, g, radial, species, coefficients, sender, receiver = ctx.saved_tensors
    tp = parse_tensor_product(ctx.spec)
    to_x, to_y, to_radial = (value if need else None for value, need in zip(grads, ctx.needs, strict=True))
    need_x, need_y, need_g, need_radial, *_ = ctx.needs_input_grad
    need_weight = need_radial and tp.weights > 0
    by_receiver = rows_by(receiver, g.shape[0]) if need_g else None
    by_sender = rows_by(sender, x.shape[0])

    def weights(derivative: int) -> Tensor:
        if coefficients is None:
            return radial
        return torch.ops.fxpass.table.default(radial, species, coefficients, ctx.grid, derivative)

    operands = {"x": x, "y": y, "weight": weights(0)}
    along: dict[str, Tensor] = {}
    if to_x is not None:
        along["x"] = to_x
    if to_y is not None:
        along["y"] = to_y
    if to_radial is not None:
        along["weight"] = to_radial if coefficients is None else to_radial.unsqueeze(1) * weights(1)

    def gradients(given: dict[str, Tensor], spec: str, needs: dict[str, bool]) -> tuple[Tensor, ...]:
        at = given["x"], given["y"], g, given["weight"]
        return convolution_gradient(*at, None, None, sender, receiver, by_sender, spec, "", [*needs.values()])

    total: dict[str, Tensor] = {}

    def add(slot: str, term: Tensor) -> None:
        total[slot] = total[slot] + term if slot in total else term

    for slot, direction in along.items():
        given = {**operands, slot: direction}
        spec = str(tp.linear_in_weights) if slot == "weight" else ctx.spec
        needs = {"x": need_x, "y": need_y, "weight": need_weight} | {slot: False}
        if any(needs.values()):
            for name, value in zip(operands, gradients(given, spec, needs), strict=True):
                if needs[name]:
                    add(name, value)
        if need_g:
            at = *given.values(), None, None, sender, receiver, by_receiver, g.shape[0]
            add("g", convolution(*at, spec, ""))
    by_radial = total.get("weight")
    if coefficients is not None and need_weight:
        by_radial = None if by_radial is None else (by_radial * weights(1)).sum(1)
        if to_radial is not None:
            slope = gradients(operands, ctx.spec, {"x": False, "y": False, "weight": True})[2]
            bend = to_radial * (slope * weights(2)).sum(1)
            by_radial = bend if by_radial is None else by_radial + bend
    return total.get("x"), total.get("y"), total.get("g"), by_radial, *[None] * 8


torch.library.register_autograd("fxpass::convolution_gradient", _gradient_backward, setup_context=_gradient_setup)


def _value(node: fx.Node, name: str) -> Any:
    """The fake tensor behind the operand ``name``; the argument itself where it is none."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = node.args[names.index(name)]
    return given.meta["val"] if isinstance(given, fx.Node) else given


def _table_flops(node: fx.Node, derivative: int) -> int:
    """Per edge: to find the row of the table, and to evaluate its polynomials or their derivative."""
    if _value(node, "coefficients") is None:
        return 0
    powers, _, channels = _value(node, "coefficients").shape
    return 2 * max(powers - derivative, 0) * channels + (0 if derivative else 10)


def _convolution_cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    tp = parse_tensor_product(_value(node, "spec"))
    edges = size_expr(_value(node, "sender").shape[0])
    return edges * (tp.flops() + tp.dims["out"] + _table_flops(node, 0)), moved(node)


def _gradient_cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    tp = parse_tensor_product(_value(node, "spec"))
    by_x, by_y, by_radial = needs = _value(node, "needs")
    flops = sum(needs) * tp.flops() + by_x * tp.dims["x1"]
    if by_x or by_y:
        flops += _table_flops(node, 0)
    if by_radial and _value(node, "coefficients") is not None:
        flops += _table_flops(node, 1) + 2 * tp.weights
    return size_expr(_value(node, "sender").shape[0]) * flops, moved(node)


def _rows_cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    return numel(_value(node, "index")), moved(node)


def _convolution_irreps(node: fx.Node) -> str | None:
    return parse_tensor_product(_value(node, "spec")).irreps_out


def _gradient_irreps(item: fx.Node) -> str | None:
    node, k = item.args
    tp = parse_tensor_product(_value(node, "spec"))  # type: ignore[arg-type]
    return (tp.irreps1, tp.irreps2, None)[k] if _value(node, "needs")[k] else None  # type: ignore[arg-type, index]


def _operands(node: fx.Node) -> dict[str, tuple[fx.Node, str | None]]:
    tp = parse_tensor_product(_value(node, "spec"))
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    demanded = {"x": tp.irreps1, "y": tp.irreps2, "g": tp.irreps_out}
    return {n: (a, demanded[n]) for n, a in zip(names, node.args, strict=True) if n in demanded}  # type: ignore[misc]


def _summary(node: fx.Node) -> str:
    tp = parse_tensor_product(_value(node, "spec"))
    text = f"{tp.irreps1} x {tp.irreps2} -> {tp.irreps_out}, {len(tp.paths)} paths"
    if _value(node, "coefficients") is None:
        return f"{text}, {tp.weights} per-edge weights"
    grid = parse_grid(_value(node, "grid"))
    return f"{text}, {tp.weights} weights from {grid.cells} cells of order {grid.order}"


def _gradient_summary(node: fx.Node) -> str:
    wanted = [name for name, need in zip(("x", "y", "radial"), _value(node, "needs"), strict=True) if need]
    return f"{_summary(node)}, by {', '.join(wanted)}"


ROWS_BY = SemanticOp("rows_by", _rows_by, no_summary, _rows_cost, no_irreps, no_operands)
CONVOLUTION = SemanticOp("convolution", _convolution, _summary, _convolution_cost, _convolution_irreps, _operands)
CONVOLUTION_GRADIENT = SemanticOp(
    "convolution_gradient", _convolution_gradient, _gradient_summary, _gradient_cost, _gradient_irreps, _operands
)
