"""The pass ``specialize-heads``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fxpass.errors import Location, PassError
from fxpass.ir import ops
from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program, TensorSpec, attribute
from fxpass.passes import Exactness, Outcome, Pass, Refusal
from fxpass.rewrite import Builder, Match, OneOf, Op, Refused, Rule, Shared, Var, apply_rules, escapes, refuse
from fxpass.rewrite.pattern import target_name

from .constants import taking_over
from .narrow import narrowing

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass(frozen=True)
class SpecializeHeads(Pass):
    """Makes the head a constant, and computes nothing for other heads.

    Before / After::

        y = linear(x, w)                    32x0e -> 3x0e    y = linear(x, w_of_head)    32x0e -> 1x0e
        e = index(y, [arange(atoms), heads])                 e = select(y, 1, 0)
        s = gather(scale, heads)                             s = expand(slice(scale, 0, head, head + 1), [atoms])

    Holds when: the model has one head, or ``head`` says which one is meant, an assumption from then on. Where
    a mask divides a hidden layer among the heads, the channels of other heads go if the layer consists of
    pointwise functions and of linear maps of scalars with constant weights.

    Keeps: values up to rounding (bits, with one head) and interface. Weights that are cut are buffers and get no
    gradient.

    Attributes:
        head: index of the head, from 0; with one head there is no choice.
    """

    name: ClassVar[str] = "specialize-heads"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    head: int | None = None

    def apply(self, program: Program) -> Outcome:
        specs = program.with_property("head")
        if not specs:
            return Outcome(program, modified=False)
        (spec,) = specs
        heads = _count(spec)
        head = 0 if self.head is None and heads == 1 else self.head
        if head is None:
            reason = f"the model has {heads or 'an unknown number of'} heads; name one: {self.name}{{head=0}}"
            return Outcome(program, modified=False, refusals=(Refusal("one-head", reason, (spec.name,)),))
        if head < 0 or (heads is not None and head >= heads):
            where = Location(pass_name=self.name, node=spec.name)
            hint = f"{self.name}{{head=0}}" if heads == 1 else f"a head from 0 to {(heads or 0) - 1}"
            raise PassError(f"there is no head {head}: the model has {heads}", where=where, hint=hint)
        rules = _Head(program.placeholders[spec.name], head)
        done = apply_rules(program, rules.rules(), made_by=self.name)
        applications, refusals = done.applications, done.refusals + rules.other_uses(program)
        if done.modified and heads != 1:
            narrowed = apply_rules(program, narrowing(self.name), made_by=self.name)
            applications, refusals = applications + narrowed.applications, refusals + narrowed.refusals
            facts = dict.fromkeys((*program.assumptions, f"{spec.name} == {head}"))
            program = replace(program, assumptions=tuple(facts))
        return Outcome(program, done.modified, applications, refusals)


def _count(spec: TensorSpec) -> int | None:
    """Number of heads that the frontend guarantees, from the property ``below:n``."""
    bounds = [int(p.removeprefix("below:")) for p in spec.properties if p.startswith("below:")]
    return min(bounds, default=None)


class _Head:
    """Rules on what reads the head of a graph or of an atom."""

    def __init__(self, placeholder: fx.Node, head: int) -> None:
        self.placeholder, self.head = placeholder, head

    def rules(self) -> tuple[Rule, ...]:
        x, atoms, heads = Var("x"), Var("atoms"), Var("heads", Shared(Op(self.is_head, ...)))
        blocks = Op(aten.index_put.default, Var("zeros", Op(aten.zeros.default, ...)), [atoms, None, heads], Var("one"))
        turned = Op(aten.permute.default, blocks, [0, 2, 1])
        mask = Var("mask", Op(RESHAPES, OneOf(Op(aten.clone.default, turned, ...), turned), ...))
        masked = OneOf(Op(aten.mul.Tensor, x, mask), Op(aten.mul.Tensor, mask, x))
        return (
            Rule("head-column", Op(aten.index.Tensor, x, [atoms, heads]), self.is_column, self.column),
            Rule("head-row", Op(ops.gather, x, heads), None, self.row),
            Rule("head-mask", masked, self.is_mask, self.block),
        )

    def is_head(self, node: fx.Node) -> bool:
        while node.target is ops.gather:
            node = node.args[0]  # type: ignore[assignment]
        return node is self.placeholder

    def other_uses(self, program: Program) -> tuple[Refusal, ...]:
        """Every node that still needs the value of the head, with a reason."""
        found = []
        for node in program.graph.nodes:
            used = node.op == "call_function" and any(map(self.is_head, node.all_input_nodes))
            if used and not self.is_head(node) and node.target is not aten.sym_size.int:
                reason = f"{target_name(node.target)} with the head chooses no column, row or block of channels"
                found.append(Refusal("one-head", reason, (node.name,), provenance(node).module))
        return tuple(found)

    def is_column(self, match: Match, program: Program, *, x: Any, atoms: Any, heads: Any) -> Refused | None:
        value = x.meta["val"]
        if value.dim() != 2 or not _counts_rows(atoms, value):
            return refuse(f"it does not pick one column of each row of {x.name}", atoms, x)
        return None

    def column(self, match: Match, program: Program, builder: Builder, *, x: Any, atoms: Any, heads: Any) -> fx.Node:
        if x.meta["val"].shape[1] != 1:
            x = builder.call(aten.slice.Tensor, x, 1, self.head, self.head + 1)
        return self.owned(builder.call(aten.select.int, x, 1, 0), match, builder)

    def row(self, match: Match, program: Program, builder: Builder, *, x: Any, heads: Any) -> fx.Node:
        shape = x.meta["val"].shape
        if shape[0] != 1:
            x = builder.call(aten.slice.Tensor, x, 0, self.head, self.head + 1)
        index = heads.args[1] if heads.target is ops.gather else heads
        rows = builder.call(aten.sym_size.int, index, 0)
        return self.owned(builder.call(aten.expand.default, x, [rows, *[-1] * (len(shape) - 1)]), match, builder)

    def owned(self, view: fx.Node, match: Match, builder: Builder) -> fx.Node:
        """A copy of a view that the program returns: it must not share memory with a weight or another output."""
        return taking_over(builder.call(aten.clone.default, view) if escapes(match.root) else view, match)

    def is_mask(
        self, match: Match, program: Program, *, x: Any, mask: Any, zeros: Any, atoms: Any, heads: Any, one: Any
    ) -> Refused | None:
        blocks, value = zeros.meta["val"], x.meta["val"]
        channels = blocks.shape[1] * blocks.shape[2]
        ones = one.op == "get_attr" and bool((attribute(program, one) == 1).all())
        if not ones or not _counts_rows(atoms, blocks) or mask.meta["val"].shape[-1] != channels:
            return refuse("the mask is not one for a block of channels of each atom's head and zero elsewhere", mask)
        if value.dim() != 2 or value.shape[1] != channels or match.root.meta["val"].dtype != value.dtype:
            return refuse(f"the mask changes the shape or dtype of {x.name}", x)
        return None

    def block(
        self, match: Match, program: Program, builder: Builder, *, x: Any, mask: Any, zeros: Any, **_: Any
    ) -> fx.Node:
        _, channels, heads = zeros.meta["val"].shape
        value = x.meta["val"]
        kept = torch.zeros(heads, channels, dtype=value.dtype, device=value.device)
        kept[self.head] = 1
        return taking_over(builder.call(aten.mul.Tensor, x, builder.constant("head_mask", kept.flatten())), match)


def _counts_rows(node: fx.Node, value: torch.Tensor) -> bool:
    """Whether ``node`` is 0, 1, 2, ... up to the last row of ``value``; true for every size."""
    if node.target is not aten.arange.default:
        return False
    return str(node.meta["val"].shape[0]) == str(value.shape[0])
