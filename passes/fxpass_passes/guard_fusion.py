"""The pass ``guard-fusion``."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import ClassVar

import torch
from torch import fx

from fxpass.algebra.irreps import dim, same
from fxpass.ir import ops
from fxpass.ir.guards import ENTER, LEAVE, guards, region_of, side_and_region
from fxpass.ir.irreps_transfer import NONLINEAR
from fxpass.ir.metadata import provenance, set_provenance
from fxpass.ir.program import Program, fresh
from fxpass.passes import Application, Exactness, Outcome, Pass, Refusal
from fxpass.rewrite import is_pure

aten = torch.ops.aten
VIEWS = frozenset({aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.slice.Tensor})
SCALES = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor})


@dataclass(frozen=True)
class GuardFusion(Pass):
    """Marks what may be fused, reordered or decomposed as a whole only.

    Before / After::

        x = gather(features, sender)           f = fusion_guard(features, "enter convolution:layer")
        m = tensor_product(x, y, w)            (y and w likewise)
        s = scatter_sum(m, receiver)           x = gather(f, sender)
        return linear(s)                       m = tensor_product(x, y, w)
                                               s = scatter_sum(m, receiver)
                                               g = fusion_guard(s, "leave convolution:layer")
                                               return linear(g)

    A region is a tensor product with the gathers and the sum over neighbours that belong to it alone
    ("convolution"), one without such a sum ("tensor-product"), an equivariant polynomial with its weights, a gate
    with the scalars that open it, a sum over rows, or a custom kernel.  A guard costs nothing: no target computes it.
    Before ``differentiate`` is the place for this pass; the derivative of a guard guards the derivative of its region.

    Holds when: the node is not guarded yet; something that is computed enters the region; it draws no random numbers
    and returns floating-point tensors; for a gate, nobody else uses its scalars.  Products of even scalars alone
    need no guard: nothing that is done to them can break a symmetry.

    Keeps: bits, gradients, interface, provenance.
    """

    name: ClassVar[str] = "guard-fusion"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    def apply(self, program: Program) -> Outcome:
        guarded = set(region_of(program.graph))
        taken = {side_and_region(guard)[1] for guard in guards(program.graph)}
        constant = _constants(program.graph)
        applications: list[Application] = []
        refusals: list[Refusal] = []
        for seed in list(program.graph.nodes):
            for kind, nodes, reason, blamed in [] if seed in guarded else _regions_at(seed):
                where = provenance(seed).module
                why = reason or _why_not(seed, nodes, constant)
                if why:
                    named = dict.fromkeys(node.name for node in (seed, *blamed))
                    refusals.append(Refusal(kind, why, tuple(named), where))
                    continue
                region = fresh(f"{kind}:{where or seed.name}", taken.__contains__, mark="#", first=2)
                taken.add(region)
                added = _guard(nodes, region, constant, self.name)
                guarded |= nodes
                applications.append(Application(kind, seed.name, where, added=added))
                break
        return Outcome(program, bool(applications), tuple(applications), tuple(refusals))


Found = tuple[str, set[fx.Node], str | None, tuple[fx.Node, ...]]  # kind, nodes, why it is none, nodes to blame


def _regions_at(seed: fx.Node) -> Iterator[Found]:
    """The region of which ``seed`` is the heart: the largest first, then what is left where that one is refused."""
    target = seed.target
    if target is ops.tensor_product and not _scalar(seed):
        scalars = _scalars(seed, seed.args[1])
        if scalars:
            yield _gate(seed, scalars)
        yield _product(seed)
    elif target is aten.mul.Tensor and (scalars := _opening(seed)):
        yield _gate(seed, scalars)
    elif target is ops.polynomial and not _scalar(seed):
        yield "polynomial", {seed, *_own_rows(seed, seed.args[2])}, None, ()
    elif target is ops.scatter_sum and seed.args[0].meta["val"].is_floating_point():  # type: ignore[union-attr]
        (source, *_) = seed.all_input_nodes
        if source.target is not ops.tensor_product or len(source.users) > 1 or _scalar(source):
            yield "scatter", {seed}, None, ()
    elif isinstance(target, ops.OpOverload) and target.namespace != "aten" and target not in ops.SEMANTIC:
        parts = {user for user in seed.users if user.target is operator.getitem}
        yield "kernel", {seed, *parts}, None, ()


def _product(seed: fx.Node) -> Found:
    """A tensor product, the gathers that only it reads, and the sum over rows that alone reads it."""
    nodes = {seed, *(n for n in seed.all_input_nodes if n.target is ops.gather and len(n.users) == 1)}
    (user, *others) = seed.users
    if not others and user.target is ops.scatter_sum and user.args[0] is seed:
        return "convolution", nodes | {user}, None, ()
    return "tensor-product", nodes, None, ()


def _gate(seed: fx.Node, scalars: tuple[fx.Node, ...]) -> Found:
    nodes = {seed, *scalars}
    others = [u for n in scalars for u in n.users if u not in nodes and not provenance(u).backward]
    reason = "its scalars are used elsewhere too, so that it cannot be taken as a whole" if others else None
    return "gate", nodes, reason, (*scalars[-1:], *others)


def _opening(product: fx.Node) -> tuple[fx.Node, ...]:
    """Of a product vectors [..., 2l+1] x scalars [..., 1]: the nodes that make the scalars by a nonlinear function."""
    for thin, wide in permutations(product.all_input_nodes, 2):
        widths = [n.meta["val"].shape[-1] if n.meta["val"].dim() else 0 for n in (thin, wide)]
        if all(isinstance(w, int) for w in widths) and widths[0] == 1 < widths[1] and widths[1] % 2:
            return _scalars(product, thin)
    return ()


def _scalars(seed: fx.Node, node: object) -> tuple[fx.Node, ...]:
    """The chain of views and factors from ``node`` back to the nonlinear function of scalars that it comes from."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.target in VIEWS | SCALES:
        chain.append(node)
        node = node.args[0]
    return (*chain, node) if isinstance(node, fx.Node) and node.target in NONLINEAR else ()


def _own_rows(seed: fx.Node, node: object) -> Iterator[fx.Node]:
    """The look-up of weights for each row, and the views of it, that nobody else uses."""
    while isinstance(node, fx.Node) and len(node.users) == 1 and node.target in VIEWS | {ops.gather}:
        yield node
        node = node.args[0]


def _scalar(node: fx.Node) -> bool:
    """Whether a semantic op has even scalars only, in its result and in its operands."""
    row = ops.SEMANTIC[node.target]  # type: ignore[index]
    known = (row.irreps(node), *(irreps for _, irreps in row.operands(node).values()))
    return all(irreps is None or same(irreps, f"{dim(irreps)}x0e") for irreps in known)


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """What depends on weights, literals and sizes alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        size = isinstance(node.meta.get("val"), (int, torch.SymInt))
        if node.op == "get_attr" or size or (node.op == "call_function" and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _why_not(seed: fx.Node, nodes: set[fx.Node], constant: set[fx.Node]) -> str | None:
    if any(not is_pure(node) for node in nodes):
        return "it has an effect or draws random numbers"
    if not any(_floating(n) and n not in constant for node in nodes for n in node.all_input_nodes if n not in nodes):
        return "nothing that is computed enters it"
    leaving = [node for node in nodes if set(node.users) - nodes]
    if not leaving or not all(_floating(node) for node in leaving):
        return "what leaves it is not a tensor of floating-point numbers"
    return None


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _guard(nodes: set[fx.Node], region: str, constant: set[fx.Node], made_by: str) -> int:
    """Put a guard behind every tensor that enters or leaves the region; returns how many."""
    inside = [node for node in next(iter(nodes)).graph.nodes if node in nodes]
    entering = {n: node for node in reversed(inside) for n in node.all_input_nodes if n not in nodes}
    added = 0
    for source, first in entering.items():
        if _floating(source) and source not in constant:
            guard = _insert(source, first, region, ENTER, made_by)
            source.replace_all_uses_with(guard, delete_user_cb=nodes.__contains__)
            added += 1
    for node in inside:
        if set(node.users) - nodes:
            guard = _insert(node, node.next, region, LEAVE, made_by)
            node.replace_all_uses_with(guard, delete_user_cb=lambda user, own=guard: user not in nodes | {own})
            added += 1
    return added


def _insert(source: fx.Node, before: fx.Node, region: str, side: str, made_by: str) -> fx.Node:
    with source.graph.inserting_before(before):
        guard = source.graph.call_function(ops.fusion_guard, (source, f"{side} {region}"))
    guard.meta.update({key: source.meta[key] for key in ("val", "irreps") if key in source.meta})
    heart = provenance(before if side == ENTER else source)
    set_provenance(guard, replace(heart, made_by=made_by))
    return guard
