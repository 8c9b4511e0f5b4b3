"""The ops ``contraction`` and ``contraction_gradient``: per-species sparse polynomials of each row and channel.

With P(x)[k] = sum over the terms (m, k) of terms[index, term] * monomial_m(x), ``contraction`` is P and
``contraction_gradient`` the gradient of sum(g * P(x)) by x.  The derivatives of the second are written in ATen.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .._torch_compat import size_expr
from ..algebra.contraction import Contraction, parse_contraction
from .reference import as_columns, as_rows, monomials, polynomial_gradient, rounding_once
from .semantic import SemanticOp, define, moved, owned

define("contraction(Tensor x, Tensor index, Tensor terms, str spec) -> Tensor")
define("contraction_gradient(Tensor x, Tensor index, Tensor terms, Tensor g, str spec) -> Tensor")

contraction = torch.ops.fxpass.contraction.default
contraction_gradient = torch.ops.fxpass.contraction_gradient.default


class _Rows:
    """A contraction on rows times channels as columns, so that every product below runs over contiguous memory.

    Args:
        x: [rows, channels, variables].
        directions: of the shape of x; the polynomial is differentiated once along each.
    """

    def __init__(self, x: Tensor, directions: list[Tensor], spec: str) -> None:
        self.channels = x.shape[1]
        self.contraction = parse_contraction(spec)
        self.values = monomials(self.contraction.polynomial, as_columns(x), [as_columns(d) for d in directions])

    def out(self, coefficients: Tensor) -> Tensor:
        """[rows, channels, outputs]: the value, for coefficients [rows, terms, channels]."""
        products = self._of_terms() * _by_term(coefficients)
        to = [k for _, k in self.contraction.terms]
        return as_rows(_summed(products, to, self.contraction.outputs), self.channels)

    def terms(self, g: Tensor) -> Tensor:
        """[rows, terms, channels]: gradient of sum(g * value) by the coefficients."""
        products = self._of_terms() * self._of_outputs(g)
        return products.view(len(self.contraction.terms), -1, self.channels).permute(1, 0, 2).contiguous()

    def gradient(self, coefficients: Tensor, g: Tensor) -> Tensor:
        """[rows, channels, variables]: gradient of sum(g * value) by one more direction."""
        poly = self.contraction.polynomial
        of_terms = _by_term(coefficients) * self._of_outputs(g)
        of_monomials = _summed(of_terms, self.contraction.rows, len(poly.monomials))
        return as_rows(polynomial_gradient(poly, of_monomials, self.values), self.channels)

    def _of_terms(self) -> Tensor:
        columns = [self.contraction.polynomial.columns[n] for n in self.contraction.rows]
        return self.values.index_select(0, _indices(columns, self.values))

    def _of_outputs(self, g: Tensor) -> Tensor:
        return as_columns(g).index_select(0, _indices([k for _, k in self.contraction.terms], g))


def _by_term(coefficients: Tensor) -> Tensor:
    """[rows, terms, channels] -> [terms, rows * channels]."""
    return coefficients.transpose(0, 1).contiguous().view(coefficients.shape[1], -1)


def _summed(x: Tensor, to: Any, size: int) -> Tensor:
    """Rows of ``x`` added up into ``size`` rows, by number."""
    chosen = torch.arange(size, device=x.device).unsqueeze(1) == _indices(to, x)
    return torch.mm(chosen.to(x.dtype), x)


def _indices(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=like.device)


@rounding_once(operands=3)
def _contraction(x: Tensor, index: Tensor, terms: Tensor, spec: str) -> Tensor:
    """Sparse polynomials of ``x`` with the coefficients of each row's species.

    Args:
        x: [rows, channels, variables].
        index: [rows], int64: species.
        terms: [species, terms, channels].
        spec: text of the ``algebra.contraction.Contraction``.

    Returns:
        [rows, channels, outputs].
    """
    return _Rows(x, [], spec).out(torch.index_select(terms, 0, index))


@rounding_once(operands=4)
def _contraction_gradient(x: Tensor, index: Tensor, terms: Tensor, g: Tensor, spec: str) -> Tensor:
    """Gradient of ``sum(g * contraction(x, index, terms, spec))`` by x, for ``g`` [rows, channels, outputs]."""
    return _Rows(x, [], spec).gradient(torch.index_select(terms, 0, index), g)


torch.library.impl("fxpass::contraction", "CompositeExplicitAutograd", owned(_contraction))
torch.library.impl("fxpass::contraction_gradient", "CompositeExplicitAutograd", owned(_contraction_gradient))


@torch.library.register_fake("fxpass::contraction")
def _(x: Tensor, index: Tensor, terms: Tensor, spec: str) -> Tensor:
    return x.new_empty((*x.shape[:2], parse_contraction(spec).outputs))


@torch.library.register_fake("fxpass::contraction_gradient")
def _(x: Tensor, index: Tensor, terms: Tensor, g: Tensor, spec: str) -> Tensor:
    return x.new_empty(x.shape)


def _by_species(per_row: Tensor, index: Tensor, terms: Tensor) -> Tensor:
    return torch.index_add(torch.zeros_like(terms), 0, index, per_row)


def _contraction_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.spec = inputs
    ctx.save_for_backward(*operands)


def _contraction_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, index, terms = ctx.saved_tensors
    needs_x, _, needs_terms, _ = ctx.needs_input_grad
    grad_x = contraction_gradient(x, index, terms, grad, ctx.spec) if needs_x else None
    grad_terms = _by_species(_Rows(x, [], ctx.spec).terms(grad), index, terms) if needs_terms else None
    return grad_x, None, grad_terms, None


def _gradient_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # sum(grad * gradient) is sum(g * P'(x)[grad]): the form of the contraction with one direction
    x, index, terms, g = ctx.saved_tensors
    needs_x, _, needs_terms, needs_g, _ = ctx.needs_input_grad
    along, coefficients = _Rows(x, [grad], ctx.spec), torch.index_select(terms, 0, index)
    grad_x = along.gradient(coefficients, g) if needs_x else None
    grad_terms = _by_species(along.terms(g), index, terms) if needs_terms else None
    return grad_x, None, grad_terms, along.out(coefficients) if needs_g else None, None


torch.library.register_autograd("fxpass::contraction", _contraction_backward, setup_context=_contraction_setup)
torch.library.register_autograd("fxpass::contraction_gradient", _gradient_backward, setup_context=_contraction_setup)


def _of(node: fx.Node) -> Contraction:
    return parse_contraction(str(node.args[-1]))


def _cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    rows, channels, _ = map(size_expr, node.args[0].meta["val"].shape)  # type: ignore[union-attr]
    return rows * channels * _of(node).flops(gradient=node.target is contraction_gradient), moved(node)


def _summary(node: fx.Node) -> str:
    found = _of(node)
    degree = max((len(m) for m, _ in found.terms), default=0)
    return f"{found.irreps_in} -> {found.irreps_out}, degree {degree}, {len(found.terms)} terms"


def _operands(node: fx.Node) -> dict[str, tuple[fx.Node, str | None]]:
    found, (x, *_, last, _spec) = _of(node), node.args
    demanded = {"x": (x, found.irreps_in)}
    if node.target is contraction_gradient:
        demanded["g"] = (last, found.irreps_out)
    return demanded  # type: ignore[return-value]


CONTRACTION = SemanticOp("contraction", _contraction, _summary, _cost, lambda node: _of(node).irreps_out, _operands)
CONTRACTION_GRADIENT = SemanticOp(
    "contraction_gradient",
    _contraction_gradient,
    _summary,
    _cost,
    lambda node: _of(node).irreps_in,
    _operands,
)
