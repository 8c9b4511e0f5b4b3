"""Which weights of a program may be stored in 8 bits, and which of them share a scale: used by ``quantize``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from fxpass.algebra.irreps import scalars_only, segments
from fxpass.algebra.multilinear import parse_linear, parse_tensor_product
from fxpass.ir import ops
from fxpass.ir.metadata import irreps, provenance
from fxpass.ir.program import Program, attribute
from fxpass.passes import Refusal
from fxpass.rewrite.pattern import arguments, target_name

aten = torch.ops.aten

#: ops that read a weight and keep the order of its elements
KEEPS_ORDER = frozenset(
    {
        *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default),
        *(aten.squeeze.dim, aten.squeeze.default, aten.clone.default, aten.detach.default, aten.alias.default),
        *(aten._to_copy.default, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar),
    }
)
SMALLEST = 8  # elements; anything smaller is a constant of a formula
SELECTED = "its rows are looked up by species: an embedding, energies of single atoms, or weights of a polynomial"
FEWEST = 4  # weights for each scale: with fewer, scales take the place that 8 bits save


@dataclass(frozen=True)
class Piece:
    """Columns of a weight [rows, n] that are stored together, as [rows, count, outer, channels, inner].

    One scale serves all of outer and inner: what goes into one output channel, for all components of its irrep.
    """

    start: int
    count: int
    outer: int
    channels: int
    inner: int = 1

    @property
    def size(self) -> int:
        return self.count * self.outer * self.channels * self.inner


@dataclass(frozen=True)
class Layout:
    """How a weight falls into channels.

    Attributes:
        shape: of the weight.
        rows: how often the pieces repeat, e.g. for each species.
        pieces: in order; together they cover a row.
    """

    shape: tuple[int, ...]
    rows: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return self.rows * sum(piece.size for piece in self.pieces)

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """(P, K, N) for each piece: P matrices of K weights for each of N channels."""
        for p in self.pieces:
            yield self.rows * p.count, p.outer * p.inner, p.channels

    def to_columns(self, weight: Tensor) -> Tensor:
        """The elements in the order of ``blocks``, [size]."""
        table = weight.reshape(self.rows, -1)
        parts = []
        for p in self.pieces:
            stored = table.narrow(1, p.start, p.size).view(self.rows, p.count, p.outer, p.channels, p.inner)
            parts.append(stored.permute(0, 1, 2, 4, 3).reshape(-1))
        return torch.cat(parts)

    def stored(self, columns: Tensor) -> list[Tensor]:
        """Inverse of ``to_columns``, piece by piece: [rows, count, outer, channels, inner] each."""
        parts = columns.split([self.rows * p.size for p in self.pieces])
        shapes = [(self.rows, p.count, p.outer, p.inner, p.channels) for p in self.pieces]
        return [part.view(shape).permute(0, 1, 2, 4, 3) for part, shape in zip(parts, shapes, strict=True)]

    def from_columns(self, columns: Tensor) -> Tensor:
        """Inverse of ``to_columns``."""
        return torch.cat([part.reshape(self.rows, -1) for part in self.stored(columns)], dim=1).view(self.shape)


@dataclass(frozen=True)
class Candidate:
    """A weight that may be stored in 8 bits: its name in the program, its module, its layout."""

    name: str
    module: str
    layout: Layout


def candidates(program: Program) -> tuple[tuple[Candidate, ...], tuple[Refusal, ...]]:
    """The weights that may be quantised, and for every other floating tensor the reason why not."""
    named: dict[str, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        named.setdefault(str(node.target), []).append(node)
    search = _Search(program)
    found: list[Candidate] = []
    refusals: list[Refusal] = []
    for name, nodes in named.items():
        value = attribute(program, nodes[0])
        if not value.is_floating_point() or value.numel() < SMALLEST:
            continue
        layout = search.layout(nodes, value)
        if isinstance(layout, Layout):
            found.append(Candidate(name, provenance(nodes[0]).module, layout))
        else:
            refusals.append(Refusal("int8", layout, (nodes[0].name,), provenance(nodes[0]).module))
    narrowest = min((attribute(program, named[c.name][0]).dtype.itemsize for c in found), default=0)
    for candidate in list(found):
        node = named[candidate.name][0]
        if attribute(program, node).dtype.itemsize > narrowest:
            found.remove(candidate)
            dtype = str(attribute(program, node).dtype).removeprefix("torch.")
            reason = f"it is pinned to {dtype}, where other weights are narrower"
            refusals.append(Refusal("int8", reason, (node.name,), candidate.module))
    return tuple(found), tuple(refusals)


class _Search:
    """Follows weights to the ops that read them; a string says why a weight must stay as it is."""

    def __init__(self, program: Program) -> None:
        (vectors,) = program.with_property("edge_vector") or (None,)
        inputs = program.placeholders
        self.one_hot = {inputs[s.name] for s in program.with_property("one_hot")}
        self.geometry: set[fx.Node] = {inputs[vectors.name]} if vectors else set()  # what edge vectors alone decide
        for node in program.graph.nodes:
            sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
            if node.op == "call_function" and sources and self.geometry.issuperset(sources):
                self.geometry.add(node)

    def layout(self, nodes: list[fx.Node], value: Tensor) -> Layout | str:
        found: set[Layout] = set()
        for node in nodes:
            for reader, operand, turned in _readers(node):
                pieces = self.pieces(reader, operand, turned)
                if isinstance(pieces, str):
                    return pieces
                if (fewest := min((p.outer * p.inner for p in pieces), default=0)) < FEWEST:
                    return f"channels of {fewest} weights: a scale for each takes the place that 8 bits save"
                rows = value.shape[0] if reader.target is ops.gather else 1
                complete = _complete(pieces, value.numel() // rows)
                if complete is None:
                    return "its paths share weights"
                found.add(Layout(tuple(value.shape), rows, complete))
        if len(found) != 1:
            return "it is read in different ways" if found else "nothing reads it"
        return found.pop()

    def pieces(self, reader: fx.Node, operand: fx.Node, turned: bool) -> tuple[Piece, ...] | str:
        given = arguments(reader)
        slot = next(name for name, value in given.items() if _holds(value, operand))
        if (reader.target, slot) in _MATRIX:
            x, out_first = given[_MATRIX[reader.target, slot]], (reader.target is aten.linear.default) != turned
            if x in self.one_hot:
                return SELECTED
            layout = irreps(x) if isinstance(x, fx.Node) else None
            if layout is not None and not scalars_only(layout):
                return f"it mixes components of {layout}"
            a, b = reversed(operand.meta["val"].shape) if turned else operand.meta["val"].shape
            return (Piece(0, 1, 1, a, b),) if out_first else (Piece(0, 1, a, b),)
        if turned:
            return f"it is read transposed by {reader.name}"
        if slot == "weight" and reader.target in (ops.linear, ops.tensor_product):
            return self.path_pieces(reader, shared=True)
        if slot == "x" and reader.target is ops.gather and operand.meta["val"].dim() == 2:
            users = {self.path_pieces(u, shared=False) if _weighs(u, reader) else "" for u in reader.users}
            if len(users) == 1 and isinstance(pieces := next(iter(users)), tuple):
                return pieces
            return SELECTED
        if reader.target is ops.polynomial:
            what = "weights" if slot == "weight" else "coefficients"
            return f"{what} of a polynomial, whose products would multiply their rounding"
        return f"{reader.name} ({target_name(reader.target)}) is no linear map that it is the matrix of"

    def path_pieces(self, reader: fx.Node, *, shared: bool) -> tuple[Piece, ...] | str:
        """Pieces of the weight vector of an equivariant map, in the order of its paths."""
        *_, spec, wrt = reader.args
        if wrt != "out":
            return f"{reader.name} is a derivative by {wrt}"
        for x, layout in ops.SEMANTIC[reader.target].operands(reader).values():  # type: ignore[index]
            if x in self.geometry and not scalars_only(layout or ""):
                return f"{x.name} is geometry of edges, which is pinned"
        if reader.target is ops.linear:
            if reader.args[0] in self.one_hot:
                return SELECTED
            lin = parse_linear(str(spec))
            kind, ins, outs = lin.shared, segments(lin.irreps_in), segments(lin.irreps_out)
            pieces = [Piece(p.weight, 1, ins[p.i][1], outs[p.o][1]) for p in lin.paths]
        else:
            tp = parse_tensor_product(str(spec))
            kind, sizes = tp.shared, [(p, tp.sizes(p)) for p in tp.paths if p.weight >= 0]
            pieces = [Piece(p.weight, 1, *_CHANNELS[p.mode](n["u"], n["v"], n["w"])) for p, n in sizes]
        if kind is not shared:
            return f"{reader.name} takes weights for each row"
        return tuple(pieces)


#: (op, slot of the matrix) -> slot of what it multiplies
_MATRIX: dict[tuple[Any, str], str] = {
    (aten.mm.default, "mat2"): "self",
    (aten.addmm.default, "mat2"): "mat1",
    (aten.matmul.default, "other"): "self",
    (aten.linear.default, "weight"): "input",
}

#: connection mode of a tensor product -> (outer, channels, inner) of its weights; the channel is what the output counts
_CHANNELS: dict[str, Callable[[int, int, int], tuple[int, int, int]]] = {
    "uvw": lambda u, v, w: (u, v * w, 1),
    "uvu": lambda u, v, w: (1, u, v),
    "uvv": lambda u, v, w: (u, v, 1),
    "uuw": lambda u, v, w: (u, w, 1),
    "uuu": lambda u, v, w: (1, u, 1),
    "uvuv": lambda u, v, w: (1, u * v, 1),
}


def _readers(node: fx.Node, turned: bool = False) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """(reader, the node that it reads, whether that is transposed) for everything that reads a weight."""
    for user in node.users:
        alone = user.args[:1] == (node,) and user.all_input_nodes == [node]
        if alone and user.target in KEEPS_ORDER and not (turned and user.target in _RESHAPES):
            yield from _readers(user, turned)
        elif alone and user.meta["val"].dim() == 2 and (user.target, *user.args[1:]) in _TURNS:
            yield from _readers(user, not turned)
        else:
            yield user, node, turned


_RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_TURNS: Any = (
    (aten.t.default,),
    (aten.permute.default, [1, 0]),
    (aten.transpose.int, 0, 1),
    (aten.transpose.int, 1, 0),
)


def _holds(value: Any, node: fx.Node) -> bool:
    return value is node or (isinstance(value, (list, tuple)) and any(v is node for v in value))


def _weighs(reader: fx.Node, weights: fx.Node) -> bool:
    """Whether ``weights`` are nothing but the weights of ``reader``."""
    slots = [name for name, value in arguments(reader).items() if _holds(value, weights)]
    return reader.target in (ops.linear, ops.tensor_product) and slots == ["weight"]


def _complete(pieces: tuple[Piece, ...], length: int) -> tuple[Piece, ...] | None:
    """Pieces in order, equal neighbours as one, with pieces for what no path reads; None where two overlap."""
    rows: list[Piece] = []
    at = 0
    for piece in (*sorted(set(pieces), key=lambda p: p.start), None):
        start = length if piece is None else piece.start
        if start < at:
            return None
        if start > at:
            rows.append(Piece(at, 1, start - at, 1))
        if piece is not None:
            rows.append(piece)
            at = piece.start + piece.size
    merged = rows[:1]
    for before, piece in pairwise(rows):
        last = merged[-1]
        if (before.outer, before.channels, before.inner) == (piece.outer, piece.channels, piece.inner):
            merged[-1] = Piece(last.start, last.count + 1, last.outer, last.channels, last.inner)
        else:
            merged.append(piece)
    return tuple(merged)
