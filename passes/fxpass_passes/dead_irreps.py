"""The pass ``dead-irreps``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxpass.algebra.irreps import segments
from fxpass.algebra.multilinear import CHANNELS, Linear, TensorProduct, parse_linear, parse_tensor_product
from fxpass.algebra.polynomial import parse_polynomial
from fxpass.ir import ops
from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program
from fxpass.passes import Application, Exactness, Outcome, Pass, Refusal
from fxpass.rewrite import arguments, is_pure
from fxpass.rewrite.pattern import target_name

aten = torch.ops.aten
Mask = npt.NDArray[np.bool_]  # which elements of a row reach an output; symbolic dimensions have extent one


@dataclass(frozen=True)
class DeadIrreps(Pass):
    """Prunes paths of tensor products and linear maps whose result reaches no output.

    Before / After::

        y = linear(x, w)     0e+1o -> 0e+1o         y = linear(x, w)     0e+1o -> 0e+1o, path 1o -> 1o gone
        return slice(y, 1, 0, 1)                    return slice(y, 1, 0, 1)

    Layouts stay: dead segments are zeros. Liveness runs backwards, segment by segment, through what moves
    columns (slices, views, permutations, concatenations), what treats them alike (gathers, sums over rows,
    pointwise functions) and what mixes them in a known way (tensor products, linear maps, polynomials, which
    read the variables of their monomials). So what only pruned paths read is dead in its turn.

    Holds when: always. At any other op everything that it reads counts as live; a refusal names the op where
    that cost something.

    Keeps: bits of all outputs, gradients, interface. An application's ``removed`` counts paths, not nodes.
    """

    name: ClassVar[str] = "dead-irreps"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    def apply(self, program: Program) -> Outcome:
        live = Liveness(program)
        applications = []
        for node, paths in reversed(live.pruned.items()):
            spec = parse(node)
            node.update_arg(len(node.args) - 2, str(spec.keep(paths)))
            gone = len(spec.paths) - len(paths)
            applications.append(Application("dead-paths", node.name, provenance(node).module, removed=gone))
        return Outcome(program, bool(applications), tuple(applications), tuple(live.refusals))


class Liveness:
    """Which elements of each node's rows reach an output, derived from the outputs to the inputs."""

    def __init__(self, program: Program) -> None:
        self.masks: dict[fx.Node, Mask] = {}
        self.pruned: dict[fx.Node, tuple[Any, ...]] = {}
        self.refusals: list[Refusal] = []
        for node in program.results.values():
            self.need(node, True)
        for node in reversed(program.graph.nodes):
            if node.op == "call_function" and not is_pure(node):
                self.need(node, True)
            if node.op == "call_function" and node in self.masks and self.masks[node].any():
                self.visit(node, self.masks[node])

    def need(self, node: object, mask: Mask | bool) -> None:
        """Count as live what ``mask``, which broadcasts, says of ``node``."""
        if isinstance(node, fx.Node):
            known = self.masks.setdefault(node, np.zeros(extents(node), bool))
            known |= mask

    def visit(self, node: fx.Node, mask: Mask) -> None:
        for operand in node.all_input_nodes:
            if not is_tensor(operand):
                self.need(operand, True)
        transfer = TRANSFER.get(node.target)
        if transfer is not None and transfer(self, node, mask):
            return
        for operand in node.all_input_nodes:
            self.need(operand, True)
        if not mask.all():
            reason = f"{target_name(node.target)} is not known column by column: all that it reads counts as live"
            self.refusals.append(Refusal("dead-paths", reason, (node.name,), provenance(node).module))

    # --- transfer functions: from the live part of a result to those of the operands; false where that is unknown

    def nothing(self, node: fx.Node, mask: Mask) -> bool:
        return True

    def alike(self, node: fx.Node, mask: Mask) -> bool:
        """A pointwise function with a finite derivative at zero, which is what dead columns become."""
        for operand in filter(is_tensor, node.all_input_nodes):
            self.need(operand, _unbroadcast(mask, extents(operand)))
        return True

    def quotient(self, node: fx.Node, mask: Mask) -> bool:
        dividend, divisor = node.args
        self.need(divisor, True)  # a zero in a dead column of it would still make gradients NaN
        self.need(dividend, _unbroadcast(mask, extents(dividend)))  # type: ignore[arg-type]
        return True

    def rows(self, node: fx.Node, mask: Mask) -> bool:
        """A gather, or a sum of rows by index."""
        self.need(node.args[0], _any(mask, 0))
        self.need(node.args[1], True)
        return True

    def product(self, node: fx.Node, mask: Mask) -> bool:
        """A matrix product: a live column needs that column of the second factor, and all of the first."""
        *_, a, b = node.args
        self.need(a, True)
        self.need(b, _any(mask, -2))
        for bias in node.args[:-2]:
            self.need(bias, True)
        return True

    def total(self, node: fx.Node, mask: Mask) -> bool:
        given = arguments(node)
        rank = len(extents(given["self"]))
        axes = tuple(d % rank for d in given.get("dim") or range(rank))
        self.need(given["self"], mask if given.get("keepdim") else np.expand_dims(mask, axes))
        return True

    def moved(self, node: fx.Node, mask: Mask) -> bool:
        """An op that moves elements, run on their numbers to see from where to where."""
        numbers: dict[fx.Node, Any] = {}
        count = 0
        for operand in filter(is_tensor, node.all_input_nodes):
            size = prod(extents(operand))
            numbers[operand] = torch.arange(count, count + size).reshape(extents(operand))
            count += size
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: numbers.get(n, 1))
        try:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError):  # where it depends on a symbolic size, which has extent one here
            return False
        if tuple(result.shape) != mask.shape or (node.target in RESHAPES and not _keeps_rows(node)):
            return False
        hit = np.zeros(count, bool)
        hit[result.numpy()[mask]] = True
        for operand, given in numbers.items():
            self.need(operand, hit[given.numpy()])
        return True

    def multilinear(self, node: fx.Node, mask: Mask) -> bool:
        *operands, _, wrt = node.args
        spec = parse(node)
        columns = {path: _columns(spec, path) for path in spec.paths}
        paths = tuple(p for p in spec.paths if wrt in columns[p] and mask[..., columns[p][wrt]].any())  # type: ignore
        if len(paths) < len(spec.paths):
            self.pruned[node] = paths
        for slot, operand in zip(spec.dims, operands, strict=True):
            if isinstance(operand, fx.Node):
                used = np.zeros(extents(operand), bool)
                for path in paths:
                    if slot in columns[path]:
                        used[..., columns[path][slot]] = True
                self.need(operand, used)
        return True

    def polynomial(self, node: fx.Node, mask: Mask) -> bool:
        x, directions, weight, out, coefficients, spec, wrt = node.args
        poly = parse_polynomial(str(spec))
        asked = set(np.flatnonzero(mask.any(axis=(0, 1)))) if wrt == "direction" else set(range(poly.variables))
        read = {i for m in poly.monomials if not asked.isdisjoint(m) for i in m}
        variables = np.isin(np.arange(poly.variables), list(read))
        # [1, channels, 1], where the result with respect to weights is [rows, paths, channels]
        channels = _any(mask, 1).swapaxes(1, 2) if wrt == "weight" else _any(mask, 2)
        for operand in (x, *directions):  # type: ignore[misc]
            self.need(operand, channels & variables)
        self.need(weight, channels.swapaxes(1, 2))
        self.need(out, channels)
        self.need(coefficients, True)
        return True


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def extents(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node, one in place of each symbolic size; nothing for a number."""
    return tuple(s if isinstance(s, int) else 1 for s in node.meta["val"].shape) if is_tensor(node) else ()


def parse(node: fx.Node) -> TensorProduct | Linear:
    spec = str(node.args[-2])
    return parse_tensor_product(spec) if node.target is ops.tensor_product else parse_linear(spec)


def _columns(spec: TensorProduct | Linear, path: Any) -> dict[str, slice]:
    """Columns that a path reads or writes in each slot; no entry for weights that it has not."""

    def segment(irreps: str, index: int) -> slice:
        offset, mul, l, _ = segments(irreps)[index]
        return slice(offset, offset + mul * (2 * l + 1))

    if isinstance(spec, Linear):
        columns = {"x": segment(spec.irreps_in, path.i), "out": segment(spec.irreps_out, path.o)}
        size = segments(spec.irreps_in)[path.i][1] * segments(spec.irreps_out)[path.o][1]
    else:
        slots = ("x1", spec.irreps1, path.i1), ("x2", spec.irreps2, path.i2), ("out", spec.irreps_out, path.io)
        columns = {slot: segment(irreps, index) for slot, irreps, index in slots}
        size = prod(spec.sizes(path)[c] for c in CHANNELS[path.mode][2])
    return columns | ({"weight": slice(path.weight, path.weight + size)} if path.weight >= 0 else {})


def _unbroadcast(mask: Mask, shape: tuple[int, ...]) -> Mask:
    """What a live part of a broadcast result needs of an operand of ``shape``."""
    mask = _any(mask, *range(mask.ndim - len(shape))).reshape(mask.shape[mask.ndim - len(shape) :])
    return _any(mask, *(d for d, size in enumerate(shape) if size == 1))


def _any(mask: Mask, *axes: int) -> Mask:
    return np.asarray(mask.any(axis=axes, keepdims=True))


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a reshape keeps symbolic sizes in their order with equal numbers of elements between them."""

    def groups(value: torch.Tensor) -> list[object]:
        found: list[Any] = [1]
        for size in value.shape:
            if isinstance(size, int):
                found[-1] *= size
            else:
                found += [str(size), 1]
        return found

    return groups(node.meta["val"]) == groups(node.args[0].meta["val"])  # type: ignore[union-attr]


RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
TRANSFER: dict[Any, Callable[[Liveness, fx.Node, Mask], bool]] = {
    ops.tensor_product: Liveness.multilinear,
    ops.linear: Liveness.multilinear,
    ops.polynomial: Liveness.polynomial,
    ops.gather: Liveness.rows,
    ops.scatter_sum: Liveness.rows,
    aten.div.Tensor: Liveness.quotient,
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.addmm.default), Liveness.product),
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList, aten.mean.dim), Liveness.total),
    **dict.fromkeys(
        (aten.sym_size.int, aten.zeros_like.default, aten.ones_like.default, aten.new_zeros.default), Liveness.nothing
    ),
    **dict.fromkeys(
        (
            *(*RESHAPES, aten.slice.Tensor, aten.select.int, aten.cat.default, aten.stack.default, aten.expand.default),
            *(aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim),
            *(aten.clone.default, aten.alias.default, aten.detach.default),
        ),
        Liveness.moved,
    ),
    **dict.fromkeys(
        (
            *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default, aten.rsub.Scalar),
            *(aten.silu.default, aten.tanh.default, aten.sigmoid.default, aten.exp.default, aten._to_copy.default),
            *(aten.sin.default, aten.cos.default),
        ),
        Liveness.alike,
    ),
}
