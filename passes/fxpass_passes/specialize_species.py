"""The pass ``specialize-species``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxpass.algebra.irreps import segments
from fxpass.algebra.multilinear import Linear, LinearPath, TensorProduct, parse_tensor_product
from fxpass.ir import ops
from fxpass.ir.metadata import provenance, set_provenance
from fxpass.ir.program import Program
from fxpass.passes import Exactness, Outcome, Pass, Refusal
from fxpass.rewrite import Builder, Lit, Match, Op, Refused, Rule, Shared, Var, apply_rules, refuse
from fxpass.rewrite.pattern import target_name

from .constants import constant_value, constants, taking_over, weight_name

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.matmul.default)
HARMLESS = (aten.argmax.default, aten.sym_size.int, aten.zeros_like.default, aten.new_zeros.default)
SLOTS = {"out": "out", "x1": "x"}  # slot of a tensor product -> of the linear map that takes over


@dataclass(frozen=True)
class SpecializeSpecies(Pass):
    """Turns one-hot species attributes times weights into look-ups by species.

    Before / After::

        e = linear(node_attrs, w)                   e = gather(w_by_species, species)
        y = mm(node_attrs, v)                       y = gather(v, species)
        t = tensor_product(x, node_attrs, u)        t = linear(x, gather(u_by_species, species))

    where ``species = argmax(node_attrs, 1)``, an argmax that is there already if there is one. What depends on
    the species alone, as a linear map of ``e`` does, becomes one look-up too. Attributes that are gathered
    first are multiplied first, and what was concatenated with attributes and sliced out again is read directly.

    Holds when: an input has the property ``one_hot`` (recorded as an assumption); weights are finite and, except
    those of ``mm``, constant; tensor products have mode uvw, even scalars and weights shared by all rows. One that
    takes other features too reads its weights anew for each row, where before all rows shared one matrix product
    of size species: it stays as it is for few species, or for many weights.

    Keeps: values up to rounding, interface, gradients with respect to other inputs. Tables are buffers: the
    weights folded into them get no gradient.

    Attributes:
        max_row_weights: largest number of weights that a tensor product may look up for each row.
        min_species: number of species from which such a look-up is cheaper than the product; measured on one
            core, 108 and 1,000 atoms, 16 to 128 channels, the look-up takes 1.1 to 60 times as long for 5 and 10
            species, and a tenth to twice as long for 89.
    """

    name: ClassVar[str] = "specialize-species"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    max_row_weights: int = 65536
    min_species: int = 32

    def apply(self, program: Program) -> Outcome:
        species = _Species(program, self)
        done = apply_rules(program, species.rules(), made_by=self.name)
        refusals = done.refusals + species.other_uses(program)
        facts = [f"one-hot {spec.name}" for spec in program.with_property("one_hot") if done.modified]
        new = tuple(fact for fact in facts if fact not in program.assumptions)
        program = replace(program, assumptions=program.assumptions + new)
        return Outcome(program, done.modified, done.applications, refusals)


class _Species:
    """The one-hot inputs of a program, and the rules on what is made of them."""

    def __init__(self, program: Program, options: SpecializeSpecies) -> None:
        self.program, self.options = program, options
        self.inputs = [program.placeholders[spec.name] for spec in program.with_property("one_hot")]
        self.constants = constants(program.graph)

    def rules(self) -> tuple[Rule, ...]:
        hot, index, weight = Var("hot", Op(self.is_one_hot, ...)), Var("index"), Var("weight")
        parts = Shared(Op(self.is_cat_with_one_hot, Lit("parts"), Lit("axis", is_last)))
        gathered = Shared(Op(ops.gather, hot, index))
        part = Op(aten.slice.Tensor, parts, Lit("dim", is_last), Lit("start"), Lit("end"))
        return (
            Rule("slice-of-cat", part, is_part, take_part),
            Rule("product-of-gather", Op((*PRODUCTS, ops.linear), gathered, ...), None, multiply_first),
            Rule("species-row", Op(PRODUCTS, hot, weight), None, self.row_of_weights),
            Rule("species-table", Op(self.has_table, ...), None, self.row_of_table),
            Rule("species-weights", Op(ops.tensor_product, ..., x2=hot), self.has_row_weights, self.linear_by_species),
        )

    def is_one_hot(self, node: fx.Node) -> bool:
        return node in self.inputs

    def is_cat_with_one_hot(self, node: fx.Node) -> bool:
        return node.target is aten.cat.default and any(part in self.inputs for part in node.all_input_nodes)

    def other_uses(self, program: Program) -> tuple[Refusal, ...]:
        """Every node that still multiplies or copies one-hot attributes, with a reason."""
        found = []
        for node in program.graph.nodes:
            used = node.op == "call_function" and any(map(self.is_one_hot, node.all_input_nodes))
            refused = node.target is ops.tensor_product and node.args[1] in self.inputs  # by its own rule
            if used and not refused and node.target not in HARMLESS:
                found.append(Refusal("species-lookup", _why_not(node), (node.name,), provenance(node).module))
        return tuple(found)

    def species(self, one_hot: fx.Node) -> fx.Node:
        """``argmax(one_hot, 1)``, [atoms], right after the inputs."""
        inputs = self.program.graph.find_nodes(op="placeholder")
        for node in one_hot.users:
            if node.target is aten.argmax.default and node.args[1:] in ((1,), (-1,)):
                inputs[-1].append(node)
                return node
        with self.program.graph.inserting_after(inputs[-1]):
            node = self.program.graph.call_function(aten.argmax.default, (one_hot, 1))
        set_provenance(node, replace(provenance(one_hot), made_by=self.options.name))
        return node

    def value(self, node: Any) -> tuple[Tensor, fx.Node | None] | None:
        """A constant; or for a node that depends on the species alone, its row for each species, and the input."""
        if node in self.inputs:
            like = node.meta["val"]
            return torch.eye(like.shape[1], dtype=like.dtype, device=like.device), node
        if self.is_constant(node):
            return constant_value(self.program, node), None
        if node.target is ops.gather and node.args[1].target is aten.argmax.default and self.is_constant(node.args[0]):
            one_hot = node.args[1].args[0]
            return (constant_value(self.program, node.args[0]), one_hot) if one_hot in self.inputs else None
        return None

    def is_constant(self, node: object) -> bool:
        return isinstance(node, fx.Node) and (node.op == "get_attr" or node in self.constants)

    def table(self, node: fx.Node) -> tuple[Tensor, fx.Node] | None:
        """For an op on rows: its result for each species, and the one-hot input that alone decides."""
        if node.target not in (ops.linear, ops.tensor_product) or node.args[-1] == "weight":
            return None
        values = {operand: self.value(operand) for operand in node.all_input_nodes}
        tensors = {operand: found[0] for operand, found in values.items() if found}
        inputs = {found[1] for found in values.values() if found and found[1]}
        if len(tensors) < len(values) or len(inputs) != 1:
            return None
        with torch.no_grad():
            return node.target(*fx.map_arg(node.args, tensors.get)), inputs.pop()

    def has_table(self, node: fx.Node) -> bool:
        return self.table(node) is not None

    def row_of_table(self, match: Match, program: Program, builder: Builder) -> fx.Node:
        table = self.table(match.root)
        assert table is not None
        name = weight_name(match.root, match.root.all_input_nodes[-1])
        rows = builder.constant(f"{name}_by_species", table[0])
        return taking_over(builder.call(ops.gather, rows, self.species(table[1])), match)

    def row_of_weights(
        self, match: Match, program: Program, builder: Builder, *, hot: fx.Node, weight: fx.Node
    ) -> fx.Node:
        return taking_over(builder.call(ops.gather, weight, self.species(hot)), match)

    def has_row_weights(self, match: Match, program: Program, *, hot: fx.Node) -> Refused | None:
        _, _, weight, _, spec, wrt = match.root.args
        tp = parse_tensor_product(str(spec))
        if wrt not in SLOTS:
            return refuse(f"a tensor product with respect to its {wrt} is no linear map of a row", match.root)
        if not tp.shared or not self.is_constant(weight):
            return refuse("the weights are not constants shared by all rows", match.root)
        if any((l, parity) != (0, 1) for _, _, l, parity in segments(tp.irreps2)):
            return refuse(f"the one-hot attributes are {tp.irreps2}, not even scalars", match.root)
        modes = {path.mode if path.weight >= 0 else f"{path.mode} without weights" for path in tp.paths}
        if modes != {"uvw"}:
            return refuse(f"its paths are {', '.join(sorted(modes)) or 'none'}, not uvw", match.root)
        needed, limit = sum(s["u"] * s["w"] for s in map(tp.sizes, tp.paths)), self.options.max_row_weights
        if needed > limit:
            return refuse(f"a look-up of {needed} weights for each row, more than max_row_weights={limit}", match.root)
        if tp.dims["x2"] < self.options.min_species:
            few = f"{tp.dims['x2']} species are fewer than min_species={self.options.min_species}"
            return refuse(f"{few}: a product costs less than a look-up of {needed} weights for each row", match.root)
        return None

    def linear_by_species(self, match: Match, program: Program, builder: Builder, *, hot: fx.Node) -> fx.Node:
        x1, _, weight, out, spec, wrt = match.root.args
        assert isinstance(weight, fx.Node)
        linear, rows = row_weights(parse_tensor_product(str(spec)), constant_value(program, weight))
        stored = builder.constant(f"{weight_name(match.root, weight)}_by_species", rows)
        weights = builder.call(ops.gather, stored, self.species(hot))
        return taking_over(builder.call(ops.linear, x1, weights, out, str(linear), SLOTS[str(wrt)]), match)


def row_weights(tp: TensorProduct, weight: Tensor) -> tuple[Linear, Tensor]:
    """A tensor product with one-hot even scalars as a linear map, and its weights, [species, weights].

    The coupling with a scalar is delta / sqrt(2l+1). It goes into the coefficients and not into the weights,
    which stay the model's own, whatever dtype they are cast to.
    """
    paths, blocks, at = [], [], 0
    for path in tp.paths:
        sizes, (first, *_) = tp.sizes(path), segments(tp.irreps2)[path.i2]
        u, v, w = sizes["u"], sizes["v"], sizes["w"]
        block = weight.new_zeros(tp.dims["x2"], u, w)
        block[first : first + v] = weight.narrow(0, path.weight, u * v * w).view(u, v, w).transpose(0, 1)
        blocks.append(block.flatten(1))
        paths.append(LinearPath(path.i1, path.io, at, path.coefficient / sqrt(2 * tp.degrees(path)[0] + 1)))
        at += u * w
    return Linear(tp.irreps1, tp.irreps_out, tuple(paths), at, shared=False), torch.cat(blocks, dim=1)


def part_of(parts: Sequence[fx.Node], start: int | None, end: int | None) -> fx.Node | None:
    """The one of concatenated ``parts`` [atoms, width] of which columns ``start`` to ``end`` consist."""
    at = 0
    for part in parts:
        to = at + part.meta["val"].shape[1]
        if (start or 0) == at and (to == end or (part is parts[-1] and (end is None or end > to))):
            return part
        at = to
    return None


def is_last(axis: int) -> bool:
    return axis in (1, -1)


def is_part(match: Match, program: Program, *, parts: Any, start: Any, end: Any, **axes: int) -> Refused | None:
    if part_of(parts, start, end) is None:
        return refuse("it is not exactly one of the tensors that were concatenated", *parts)
    return None


def take_part(
    match: Match, program: Program, builder: Builder, *, parts: Any, start: Any, end: Any, **axes: int
) -> Any:
    return part_of(parts, start, end)


def multiply_first(match: Match, program: Program, builder: Builder, *, hot: fx.Node, index: fx.Node) -> fx.Node:
    product: Any = match.root.target
    return taking_over(builder.call(ops.gather, builder.call(product, hot, *match.root.args[1:]), index), match)


def _why_not(node: fx.Node) -> str:
    if node.target is ops.linear:
        return "its weights are not constants shared by all rows"
    if node.target is aten.cat.default:
        return "the attributes are concatenated with features and not sliced out again"
    return f"{target_name(node.target)} is not a product of the attributes with weights"
