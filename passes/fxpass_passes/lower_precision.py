"""How nodes are moved to a low type: used by ``pin-precision``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpass.algebra.multilinear import Linear, LinearPath
from fxpass.ir import ops
from fxpass.ir.metadata import provenance, set_provenance
from fxpass.ir.program import Program, add_constant
from fxpass.ir.reference import digits
from fxpass.rewrite import arguments, erase_unused

from .constants import constant_value, constants, weight_name
from .precision_regions import is_float, own_type, static_operand

aten = torch.ops.aten
GROWING = (
    *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.sum.dim_IntList, aten.exp.default),
    *(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.rsub.Scalar, aten.reciprocal.default),
    *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor),
)  # ops whose result may be larger than any operand; semantic ops saturate by themselves
COUPLING_WORDS = 2  # of polynomial coefficients, which couple components: one word would break equivariance


class Lowering:
    """Moves nodes of ``program`` to ``compute``, everything else to ``pinned``, in place."""

    def __init__(self, program: Program, compute: torch.dtype, pinned: torch.dtype, made_by: str) -> None:
        self.program, self.compute, self.pinned, self.made_by = program, compute, pinned, made_by
        self.known = constants(program.graph)
        self.made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.words: dict[fx.Node, list[fx.Node]] = {}
        self.types: dict[fx.Node, torch.dtype] = {}
        self.values: dict[fx.Node, Tensor] = {}

    def products(self, nodes: Mapping[fx.Node, int]) -> None:
        """Multiply with matrices in the low type, each a sum of so many words; the other operand stays as it is."""
        for node in [n for n in self.program.graph.nodes if n in nodes]:
            matrix = static_operand(node, self.known)
            assert matrix is not None
            coefficients = node.target is ops.polynomial
            step, total = 2.0 ** -digits(self.compute), None
            for number, word in enumerate(self._words(matrix, max(nodes[node], COUPLING_WORDS * coefficients))):
                part = self._product(node, word)
                if total is None:
                    total = part
                else:
                    scaled = self._call(node, aten.mul.Tensor, part, step**number)
                    total = self._call(node, aten.add.Tensor, total, scaled)
            assert total is not None
            self._take_over(node, total)

    def _product(self, node: fx.Node, word: fx.Node) -> fx.Node:
        """``node`` with a word in place of its matrix; every op is linear in that."""
        if node.target is ops.polynomial:
            return self._call(node, ops.polynomial, *node.args[:4], word, *node.args[5:])
        if node.target is ops.linear:
            return self._call(node, ops.linear, node.args[0], word, *node.args[2:])
        rows, columns = (x.meta["val"].shape[-1] for x in (node.args[0], node))  # type: ignore[union-attr]
        spec = Linear(f"{rows}x0e", f"{columns}x0e", (LinearPath(0, 0, 0, 1.0),), rows * columns, shared=True)
        return self._call(node, ops.linear, node.args[0], word, None, str(spec), "out")

    def _words(self, matrix: fx.Node, count: int) -> list[fx.Node]:
        """A matrix as words, the n-th to be multiplied by 2^(-digits n); as a vector where ``linear`` reads it."""
        if (known := self.words.get(matrix, [])) and len(known) >= count:
            return known[:count]
        value, name, found = self.value(matrix), weight_name(matrix, matrix), []
        rest = value if value.dim() == 3 else value.flatten()
        for _ in range(count):
            word = rest.to(self.compute)
            found.append(self._constant(matrix, name, word))
            rest = (rest - word.to(rest.dtype)) * 2.0 ** digits(self.compute)
        self.words[matrix] = found
        return found

    def types_of(self, nodes: Collection[fx.Node]) -> None:
        """Compute ``nodes`` in the low type and the others in the pinned one, with casts where a value changes over."""
        graph = self.program.graph
        for node in list(graph.nodes):
            if node.op == "output":
                (values,) = node.args
                specs = self.program.outputs
                node.args = (tuple(self.cast(v, s.dtype) for v, s in zip(values, specs, strict=True)),)
            elif node in self.known or node.op != "call_function" or own_type(node):
                if is_float(node):
                    self.types[node] = node.meta["val"].dtype
            else:
                wanted = self.compute if node in nodes else self.pinned
                kept = arguments(node).get("coefficients") if node.target is ops.polynomial else None

                def given(operand: fx.Node, wanted: torch.dtype = wanted, kept: Any = kept) -> fx.Node:
                    return self.cast(operand, self.pinned if operand is kept else wanted)

                node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), given)
                if is_float(node):
                    self.types[node] = wanted
                    node.meta["val"] = node.meta["val"].to(wanted)
                    if wanted is torch.float16 and node.target in GROWING:
                        clamped = self._clamped(node)
                        node.replace_all_uses_with(clamped, delete_user_cb=lambda user, own=clamped: user is not own)
        for node in list(graph.nodes):
            source = node.args[0] if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"} else None
            if isinstance(source, fx.Node) and self.types.get(source) == self.types[node]:
                self._take_over(node, source)
        erase_unused([node for node in graph.nodes if node.target is aten._to_copy.default])

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``node`` in ``dtype``: itself, a constant stored in it, or the one cast of it to that type."""
        if not is_float(node):
            return node
        node = self._origin(node)
        if self.types[node] == dtype:
            return node
        if node in self.known:
            return node if node.meta["val"].dim() == 0 else self.stored(node, dtype)
        key = (node, dtype)
        if key not in self.made:
            source = self._clamped(node) if dtype is torch.float16 else node
            self.made[key] = self._after(source, aten._to_copy.default, source, dtype=dtype)
        return self.made[key]

    def _clamped(self, node: fx.Node) -> fx.Node:
        """``node`` within the range of float16, beyond which numbers become infinite."""
        largest = torch.finfo(torch.float16).max
        return self._after(node, aten.clamp.default, node, -largest, largest)

    def _origin(self, node: fx.Node) -> fx.Node:
        """The value that ``node`` is, or the one that it is an exact conversion of."""
        source = node.args[0] if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"} else None
        if not isinstance(source, fx.Node) or source not in self.types or node in self.known:
            return node
        origin = self._origin(source)
        here, there = self.types[node], self.types[origin]
        return origin if here == there or here.itemsize > there.itemsize else node

    def value(self, node: fx.Node) -> Tensor:
        if node not in self.values:
            self.values[node] = constant_value(self.program, node)
        return self.values[node]

    def stored(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A constant, evaluated and rounded once."""
        if (node, dtype) not in self.made:
            self.made[node, dtype] = self._constant(node, weight_name(node, node), self.value(node).to(dtype))
        return self.made[node, dtype]

    def _constant(self, at: fx.Node, name: str, value: Tensor) -> fx.Node:
        name = add_constant(self.program, f"{name}_{str(value.dtype).removeprefix('torch.')}", value.contiguous())
        return self._made(at, lambda: self.program.graph.get_attr(name), value)

    def _call(self, at: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        return self._made(at, lambda: self.program.graph.call_function(target, args), at.meta["val"])

    def _after(self, at: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        last = self.program.graph.find_nodes(op="placeholder")[-1] if at.op == "placeholder" else at
        with self.program.graph.inserting_after(last):
            node = self.program.graph.call_function(target, args, kwargs)
        return self._described(node, at, at.meta["val"].to(kwargs.get("dtype", at.meta["val"].dtype)))

    def _made(self, at: fx.Node, make: Callable[[], fx.Node], value: Tensor) -> fx.Node:
        with self.program.graph.inserting_before(at):
            return self._described(make(), at, value)

    def _described(self, node: fx.Node, at: fx.Node, value: Tensor) -> fx.Node:
        set_provenance(node, replace(provenance(at), made_by=self.made_by))
        node.meta["val"] = value
        if node.op == "call_function":
            self.types[node] = value.dtype
        return node

    def _take_over(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        erase_unused([node])
