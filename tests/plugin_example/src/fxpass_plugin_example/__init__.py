"""A pass in a package of its own: merges multiplications by numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxpass.ir.program import Program
from fxpass.passes import Exactness, Outcome, Pass
from fxpass.rewrite import Builder, Lit, Match, Op, Refused, Rule, Var, apply_rules, refuse

aten = torch.ops.aten
MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def check(match: Match, program: Program, *, x: fx.Node, a: float, b: float) -> Refused | None:
    """Refuse where promotion decides the type of the result, and where a * b leaves the range of that type."""
    dtype = x.meta["val"].dtype
    if not dtype.is_floating_point:
        return refuse(f"{x.name} is {dtype}, not floating point", x)
    limits = torch.finfo(dtype)
    if not all(limits.smallest_normal <= abs(factor) <= limits.max for factor in (a, b, a * b)):
        return refuse(f"{a} * {b} is not a normal number in {dtype}", x)
    return None


def merge(match: Match, program: Program, builder: Builder, *, x: fx.Node, a: float, b: float) -> fx.Node:
    product = builder.call(aten.mul.Tensor, x, a * b)
    product.meta["val"] = match.root.meta["val"]  # same shape and type; check reads it where x is such a product
    return product


RULE = Rule(
    "merge-scalars",
    Op(MULTIPLY, Op(MULTIPLY, Var("x"), Lit("a", is_number)), Lit("b", is_number)),
    check,
    merge,
)


@dataclass(frozen=True)
class FuseScalarMultiplies(Pass):
    """Merges multiplications by one number after the other into one.

    Before / After::

        y = mul(x, 2.0)                  z = mul(x, 6.0)
        z = mul(y, 3.0)

    Holds when: x is floating point, nothing else needs y, and both numbers and their product are normal
    numbers in the type of x.

    Keeps: values up to rounding, gradients, interface.
    """

    name: ClassVar[str] = "fuse-scalar-multiplies"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def apply(self, program: Program) -> Outcome:
        return apply_rules(program, (RULE,), made_by=self.name)
