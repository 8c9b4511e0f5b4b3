"""A linear map whose weights depend on the species of the row, as a semantic op.

Networks of one kind of atom each, evaluated for all atoms and masked, take as many times the work as there are species;
weights looked up for each row take as many times the memory as there are rows.  A kernel sorts the rows by species, and
multiplies each group with its own matrix.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .semantic import SemanticOp, define, moved, no_irreps, no_operands, numel, owned

define("linear_by_species(Tensor x, Tensor weight, Tensor index, bool transposed) -> Tensor")

linear_by_species = torch.ops.fxpass.linear_by_species.default


def _linear_by_species(x: Tensor, weight: Tensor, index: Tensor, transposed: bool) -> Tensor:
    """Rows times the matrix of their species.

    Args:
        x: [rows, inputs], or [rows, outputs] if transposed.
        weight: [species, inputs, outputs].
        index: [rows] int64: species.

    Returns:
        [rows, outputs], or [rows, inputs] if transposed.
    """
    total = None
    for k in range(weight.shape[0]):
        mine = (index == k).to(x.dtype).unsqueeze(1)
        part = torch.mm(x * mine, weight[k].t() if transposed else weight[k])
        total = part if total is None else total + part
    assert total is not None
    return total


torch.library.impl("fxpass::linear_by_species", "CompositeExplicitAutograd", owned(_linear_by_species))


@torch.library.register_fake("fxpass::linear_by_species")
def _(x: Tensor, weight: Tensor, index: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1 if transposed else 2]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.transposed = inputs
    ctx.save_for_backward(*operands)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, index = ctx.saved_tensors
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    by_weight = None
    if needs_weight:
        inner, outer = (grad, x) if ctx.transposed else (x, grad)
        chosen = [(index == k).to(x.dtype).unsqueeze(1) for k in range(weight.shape[0])]
        by_weight = torch.stack([torch.mm((inner * mine).t(), outer) for mine in chosen])
    return linear_by_species(grad, weight, index, not ctx.transposed) if needs_x else None, by_weight, None, None


torch.library.register_autograd("fxpass::linear_by_species", _backward, setup_context=_setup)


def _summary(node: fx.Node) -> str:
    species, inputs, outputs = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    return f"{outputs} -> {inputs}, {species} species" if node.args[3] else f"{inputs} -> {outputs}, {species} species"


def _cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    _, inputs, outputs = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    return 2 * numel(node.meta["val"]) * (outputs if node.args[3] else inputs), moved(node)


LINEAR_BY_SPECIES = SemanticOp(
    "linear_by_species", _linear_by_species, _summary, _cost, no_irreps, no_operands
)
