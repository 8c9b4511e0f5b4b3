"""The pass ``fuse-contraction``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxpass.algebra.contraction import Contraction, parse_contraction
from fxpass.algebra.polynomial import parse_polynomial
from fxpass.ir import ops
from fxpass.ir.contraction import contraction, contraction_gradient
from fxpass.ir.program import Program, attribute
from fxpass.passes import Exactness, Outcome, Pass
from fxpass.rewrite import Builder, Match, Op, Refused, Rule, Var, apply_rules, refuse

from .constants import constant_value, constants, taking_over, weight_name

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
PRODUCTS = (aten.mm.default, aten.matmul.default)
FULL = (torch.float32, torch.float64)


@dataclass(frozen=True)
class FuseContraction(Pass):
    """Turns symmetric contractions with weights by species into sparse polynomials by species.

    Before / After::

        w = view(gather(weights, species), [-1, paths, channels])
        y = polynomial(x, [], w, None, coefficients, ..., 'out')        y = contraction(x, species, terms)
        a = polynomial(x, [], w, g, coefficients, ..., 'direction')     a = contraction_gradient(x, species, terms, g)

    where ``terms[s, t] = sum over paths of weights[s, path] * coefficients[monomial, path, output]`` has a row t for
    each monomial and output that some path couples. Weights that all atoms share are those of species 0. The sum of
    two gradients with the same x becomes one.

    Holds when: weights and coefficients are constants of the type of x, float32 or float64, the weights are looked
    up by species or shared, no derivative is taken along a direction, and the terms take at most ``max_bytes``.

    Keeps: values up to rounding, interface, gradients with respect to inputs. Terms are buffers: the weights folded
    into them get no gradient.

    Attributes:
        max_bytes: largest size of the terms of one contraction, for all species.
        live: also weights that are no constants, such as parameters in training; their terms are computed at each
            run, as functions of them that have derivatives.
    """

    name: ClassVar[str] = "fuse-contraction"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    max_bytes: int = 128 << 20
    live: bool = False

    def apply(self, program: Program) -> Outcome:
        fusion = _Fusion(program, self.max_bytes, self.live)
        fused = apply_rules(program, [fusion.rule], made_by=self.name)  # first: it shares nodes that sums may erase
        summed = apply_rules(program, [fusion.sum_rule], made_by=self.name)
        applications = fused.applications + summed.applications
        return Outcome(program, bool(applications), applications, fused.refusals + summed.refusals)


@dataclass(frozen=True)
class _Weighted:
    """A polynomial with weights by species.

    Attributes:
        table: weights [species, paths * channels].
        species: numbers [atoms]; or ones [atoms, 1], which were multiplied by the table of the only species.
    """

    node: fx.Node
    table: fx.Node
    species: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> _Weighted | None:
        weight: Any = node.args[2]
        while weight.target in VIEWS:
            weight = weight.args[0]
        if weight.target is ops.gather:
            return cls(node, *weight.args)
        shared = weight.target in PRODUCTS and weight.args[0].target is aten.ones.default
        return cls(node, weight.args[1], weight.args[0]) if shared and weight.args[0].args[0][1] == 1 else None

    @property
    def coefficients(self) -> fx.Node:
        return self.node.args[4]  # type: ignore[return-value]

    @property
    def channels(self) -> int:
        return self.node.args[0].meta["val"].shape[1]  # type: ignore[union-attr]


class _Fusion:
    """The rules, and the terms that they have made: a polynomial and its gradient share theirs."""

    def __init__(self, program: Program, max_bytes: int, live: bool) -> None:
        self.program, self.max_bytes, self.live = program, max_bytes, live
        self.constants = constants(program.graph)
        self.made: dict[tuple[Any, Any, str], tuple[fx.Node, Contraction]] = {}
        self.zeros: dict[fx.Node, fx.Node] = {}
        gradients = (Var(name, Op(contraction_gradient, ...)) for name in ("a", "b"))
        self.rule = Rule("contraction", Op(is_weighted, ...), self.check, self.fuse)
        self.sum_rule = Rule("sum-of-gradients", Op(aten.add.Tensor, *gradients), self.check_sum, self.fuse_sum)

    def check(self, match: Match, program: Program) -> Refused | None:
        root = match.root
        found, (x, directions, _, _, coefficients, _, wrt) = _Weighted.of(root), root.args
        if directions or wrt == "weight":
            return refuse("it is a derivative by weights, or along a direction", root)
        fixed = {coefficients} if self.live else {found.table if found else None, coefficients}
        if found is None or fixed - self.constants:
            return refuse("its weights are not constants that are looked up by species", root.args[2])  # type: ignore[arg-type]
        dtypes = {n.meta["val"].dtype for n in (x, found.table, coefficients)}  # type: ignore[union-attr]
        if len(dtypes) > 1 or not dtypes.issubset(FULL):
            return refuse(f"it computes with {' and '.join(sorted(map(str, dtypes)))}, not in one full type", root)
        contraction = self.contraction_of(root)
        if not contraction.terms or contraction.outputs != coefficients.meta["val"].shape[2]:  # type: ignore[union-attr]
            return refuse("its coefficients do not fill its irreps", root)
        size = found.table.meta["val"].shape[0] * len(contraction.terms) * found.channels * dtypes.pop().itemsize
        return self.too_large(size, root)

    def too_large(self, size: int, root: fx.Node) -> Refused | None:
        if size <= self.max_bytes:
            return None
        return refuse(f"its terms would take {size} bytes, more than max_bytes={self.max_bytes}", root)

    def contraction_of(self, root: fx.Node) -> Contraction:
        coefficients = constant_value(self.program, root.args[4])  # type: ignore[arg-type]
        return Contraction.of(parse_polynomial(str(root.args[5])), coefficients)

    def fuse(self, match: Match, program: Program, builder: Builder) -> fx.Node:
        found, (x, _, _, g, _, spec, wrt) = _Weighted.of(match.root), match.root.args
        assert found is not None
        key = (_identity(found.table), _identity(found.coefficients), str(spec))
        if key not in self.made:
            self.made[key] = self.terms(found, builder), self.contraction_of(match.root)
        terms, contracted = self.made[key]
        operands = (x, self.species(found.species, builder), terms)
        if wrt == "out":
            return taking_over(builder.call(contraction, *operands, str(contracted)), match)
        return taking_over(builder.call(contraction_gradient, *operands, g, str(contracted)), match)

    def species(self, node: fx.Node, builder: Builder) -> fx.Node:
        if node.target is not aten.ones.default:
            return node
        if node not in self.zeros:
            options = {**node.kwargs, "dtype": torch.int64}
            self.zeros[node] = builder.call(aten.zeros.default, [node.args[0][0]], **options)  # type: ignore[index]
        return self.zeros[node]

    def terms(self, found: _Weighted, builder: Builder) -> fx.Node:
        """[species, terms, channels], added up in float64 where the weights are constant."""
        if found.table not in self.constants:
            return self.live_terms(found, builder)
        poly, contracted = parse_polynomial(str(found.node.args[5])), self.contraction_of(found.node)
        table, coefficients = (constant_value(self.program, n) for n in (found.table, found.coefficients))
        weights = table.double().reshape(table.shape[0], coefficients.shape[1], found.channels)
        folded = contracted.fold(poly, coefficients.double(), weights).to(table.dtype)
        return builder.constant(f"{weight_name(found.node, found.table)}_terms", folded)

    def live_terms(self, found: _Weighted, builder: Builder) -> fx.Node:
        """The same as a product in the graph: of what each term has of each path, with the weights."""
        poly, contracted = parse_polynomial(str(found.node.args[5])), self.contraction_of(found.node)
        coefficients = constant_value(self.program, found.coefficients)
        row = {m: n for n, m in enumerate(poly.monomials)}
        of_terms = coefficients[[row[m] for m, _ in contracted.terms], :, [k for _, k in contracted.terms]]
        species, paths = found.table.meta["val"].shape[0], of_terms.shape[1]
        matrix = builder.constant(f"{found.node.name}_paths", of_terms.contiguous())
        weights = builder.call(aten.view.default, found.table, [species, paths, found.channels])
        return builder.call(aten.matmul.default, matrix, weights)

    def check_sum(self, match: Match, program: Program, *, a: fx.Node, b: fx.Node) -> Refused | None:
        if a.args[:2] != b.args[:2]:
            return refuse("the two gradients are by different x or species", a, b)
        if any(n.args[2].op != "get_attr" for n in (a, b)):  # type: ignore[union-attr]
            return refuse("their terms are no constants", a, b)
        return self.too_large(sum(map(_bytes, self.both(a, b))), match.root)

    def fuse_sum(self, match: Match, program: Program, builder: Builder, *, a: fx.Node, b: fx.Node) -> fx.Node:
        x, species, first, g, _ = a.args
        name = weight_name(match.root, first)  # type: ignore[arg-type]
        terms = builder.constant(f"{name}_merged", torch.cat(self.both(a, b), dim=1))
        merged = Contraction.merged([parse_contraction(str(n.args[4])) for n in (a, b)])
        both = builder.call(aten.cat.default, [g, b.args[3]], -1)
        return taking_over(builder.call(contraction_gradient, x, species, terms, both, str(merged)), match)

    def both(self, a: fx.Node, b: fx.Node) -> list[Tensor]:
        return [attribute(self.program, n.args[2]) for n in (a, b)]  # type: ignore[arg-type]


def is_weighted(node: fx.Node) -> bool:
    return node.target is ops.polynomial and node.args[2] is not None


def _identity(node: fx.Node) -> Any:
    """A weight that is read twice is one weight."""
    return node.target if node.op == "get_attr" else node


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
