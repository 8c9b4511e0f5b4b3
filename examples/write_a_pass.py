"""Write a pass: scale the weights, not the features.

    python examples/write_a_pass.py

e3nn normalises its activations: it multiplies what they give by a constant, once for every edge and neuron.  What
follows is a linear map, so the constant can as well multiply the weights, which is done once and for all.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import fxpass
from fxpass.models import small_potential
from fxpass.render.terminal import console, pipeline_table
from fxpass.rewrite import Builder, Lit, Match, Op, Refused, Rule, Var, apply_rules, refuse

aten = torch.ops.aten


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def check(
    match: Match, program: fxpass.Program, *, x: fx.Node, factor: float, weight: fx.Node, spec: str = ""
) -> Refused | None:
    """Scaling anything but a weight would only move the work to another place."""
    return None if weight.op == "get_attr" else refuse(f"{weight.name} is computed, it is not a weight", weight)


def scale_matrix(
    match: Match, program: fxpass.Program, builder: Builder, *, x: fx.Node, factor: float, weight: fx.Node
) -> fx.Node:
    return builder.call(aten.mm.default, x, builder.call(aten.mul.Tensor, weight, factor))


def scale_linear(
    match: Match, program: fxpass.Program, builder: Builder, *, x: fx.Node, factor: float, weight: fx.Node, spec: str
) -> fx.Node:
    scaled = builder.call(aten.mul.Tensor, weight, factor)
    return builder.call(torch.ops.fxpass.linear.default, x, scaled, None, spec, "out")


SCALED = Op(aten.mul.Tensor, Var("x"), Lit("factor", is_number))
RULES = (
    Rule("scale-matrix", Op(aten.mm.default, SCALED, Var("weight")), check, scale_matrix),
    # the equivariant linear map of e3nn: (features, weight, out, specification, what is asked for)
    Rule(
        "scale-linear",
        Op(torch.ops.fxpass.linear.default, SCALED, Var("weight"), None, Lit("spec"), "out"),
        check,
        scale_linear,
    ),
)


@dataclass(frozen=True)
class ScaleWeights(fxpass.Pass):
    """Moves a constant factor from the input of a linear map to its weights.

    Before / After::

        y = mul(x, 1.68)              v = mul(weight, 1.68)
        z = mm(y, weight)             z = mm(x, v)

    Holds when: nothing else needs y, and the weight is stored with the model, so that v folds into a new one.

    Keeps: values up to rounding, gradients, interface.
    """

    name: ClassVar[str] = "scale-weights"
    exactness: ClassVar[fxpass.Exactness] = fxpass.Exactness.REASSOCIATES

    def apply(self, program: fxpass.Program) -> fxpass.Outcome:
        return apply_rules(program, RULES, made_by=self.name)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    # fold-constants first: e3nn divides its weights by a constant as well; "default" folds what this pass leaves
    optimized = fxpass.optimize(small_potential(), passes=["fold-constants", ScaleWeights(), "default"])
    screen = console()
    screen.print(pipeline_table(optimized.report.records))
    screen.print(optimized.report.receipt.summary())


if __name__ == "__main__":
    main()
