"""FLOPs and bytes of a program, as expressions in its named sizes.

The counts are those of an unfused program: every op reads each of its inputs once and writes its
outputs once.  A multiply-add is two FLOPs; an element of a pointwise op is one, whether it is an
addition or an exponential; an element that enters a reduction or a scatter-add is one.  Views,
arithmetic on sizes, inputs and weights at rest cost nothing.  An op outside these families counts
as pointwise.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from ..errors import UsageError
from .ops import SEMANTIC
from .program import Program

REFERENCE_SIZES: Mapping[str, int] = {"atoms": 100, "edges": 4000, "graphs": 1}


def size(name: str) -> sympy.Symbol:
    """The symbol of a named size, a positive integer."""
    return sympy.Symbol(name, integer=True, positive=True)


ATOMS, EDGES, GRAPHS = size("atoms"), size("edges"), size("graphs")


class Amount(NamedTuple):
    """A cost at given sizes."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Cost:
    """Floating point operations, and bytes read and written, as functions of the named sizes."""

    flops: sympy.Expr = sympy.S.Zero
    bytes: sympy.Expr = sympy.S.Zero

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    @staticmethod
    def total(costs: Iterable[Cost]) -> Cost:
        """Sum of many costs, expanded."""
        parts = list(costs)
        return Cost(
            sympy.expand(sympy.Add(*(c.flops for c in parts))),
            sympy.expand(sympy.Add(*(c.bytes for c in parts))),
        )

    @property
    def sizes(self) -> frozenset[str]:
        """Names of the sizes that the cost depends on."""
        return frozenset(s.name for s in self.flops.free_symbols | self.bytes.free_symbols)

    def at(self, **sizes: float) -> Amount:
        """The cost at given sizes, e.g. ``cost.at(atoms=108, edges=4610, graphs=1)``.

        Raises:
            UsageError: a size that the cost depends on is not given.
        """
        missing = sorted(self.sizes - sizes.keys())
        if missing:
            raise UsageError(
                f"The cost depends on {', '.join(missing)}, of which no value was given.",
                hint="at(" + ", ".join(f"{name}=..." for name in sorted(self.sizes)) + ")",
            )
        values = {size(name): value for name, value in sizes.items()}
        return Amount(float(self.flops.subs(values)), float(self.bytes.subs(values)))

    def __str__(self) -> str:
        return f"{pretty(self.flops)} flops, {pretty(self.bytes)} bytes"


ZERO = Cost()


def pretty(expr: sympy.Expr) -> str:
    """Short text of a cost expression, largest coefficient first: ``1.2e4·edges + 3.1e3·atoms``."""
    terms = sympy.expand(expr).as_coefficients_dict()
    ordered = sorted(terms.items(), key=lambda item: (item[0] == 1, -abs(float(item[1])), str(item[0])))
    text = ""
    for factor, coefficient in ordered:
        sign = "-" if coefficient < 0 else "+"
        text += f" {sign} " if text else sign.replace("+", "")
        number = _number(abs(float(coefficient)))
        name = str(factor).replace("**", "^").replace("*", "·")
        text += number if factor == 1 else name if number == "1" else f"{number}·{name}"
    return text or "0"


def _number(value: float) -> str:
    if value < 1000:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


_OPERATORS: dict[type[ast.AST], Callable[..., sympy.Expr]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: sympy.floor(a / b),
    ast.Pow: lambda a, b: a**b,
    ast.USub: lambda a: -a,
}
_FUNCTIONS = {f.__name__: f for f in (sympy.Max, sympy.Min, sympy.Mod, sympy.floor, sympy.ceiling)}


def parse(text: str) -> sympy.Expr:
    """The expression that ``text`` spells, e.g. ``"graphs+1"``; names are sizes, nothing is evaluated as code.

    Raises:
        UsageError: ``text`` is not arithmetic on names and numbers.
    """

    def convert(tree: ast.expr) -> sympy.Expr:
        match tree:
            case ast.Constant(value=int() | float() as value):
                return sympy.sympify(value)
            case ast.Name(id=name):
                return size(name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](convert(left), convert(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](convert(operand))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*map(convert, args))
        raise UsageError(f"{text!r} is not an expression in sizes.", hint="arithmetic such as graphs+1")

    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise UsageError(f"{text!r} is not an expression in sizes.", hint="arithmetic such as graphs+1") from error
    return convert(tree.body)


@dataclass(frozen=True)
class SizeNames:
    """The names of a program's symbolic sizes.

    Attributes:
        names: symbol of the shape environment -> expression in named sizes.
    """

    names: Mapping[sympy.Symbol, sympy.Expr]
    _memo: dict[sympy.Expr, sympy.Expr] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, program: Program) -> SizeNames:
        """Names found by comparing the placeholders' shapes with the input specifications."""
        targets = [[parse(str(dim)) for dim in spec.dims] for spec in program.inputs]
        known = {symbol for dims in targets for dim in dims for symbol in dim.free_symbols}
        names: dict[sympy.Symbol, sympy.Expr] = {}
        for dims, node in zip(targets, program.placeholders.values(), strict=True):
            for dim, traced in zip(dims, getattr(node.meta.get("val"), "shape", ()), strict=False):
                expr = _expr(traced).xreplace(names)
                unknown = [symbol for symbol in expr.free_symbols if symbol not in known]
                if len(unknown) == 1:
                    solutions = [dim] if expr == unknown[0] else sympy.solve(expr - dim, unknown[0])
                    names.update(zip(unknown, solutions, strict=False))
        return cls(names)

    def rename(self, expr: sympy.Expr) -> sympy.Expr:
        """``expr`` with the symbols of the shape environment replaced by named sizes."""
        named = self._memo.get(expr)
        if named is None:
            named = self._memo[expr] = expr.xreplace(self.names)
        return named

    def size(self, value: int | torch.SymInt) -> sympy.Expr:
        """A size as an expression in named sizes."""
        return self.rename(_expr(value))

    def shape(self, tensor: torch.Tensor) -> tuple[sympy.Expr, ...]:
        """A tensor's shape as expressions in named sizes."""
        return tuple(self.size(s) for s in tensor.shape)


def _expr(value: int | torch.SymInt) -> sympy.Expr:
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)


# ---------------------------------------------------------------------------------------------- counting

_MATMULS = {"mm", "bmm", "matmul", "linear", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv"}
_GATHERS = {"index", "_unsafe_index", "index_select", "gather", "take", "embedding", "take_along_dim"}
_SCATTERS = {"index_add", "scatter_add", "scatter_reduce", "index_put", "_unsafe_index_put", "index_reduce",
             "embedding_dense_backward"}  # fmt: skip
_MOVES = {"_to_copy", "clone", "copy", "lift_fresh_copy", "cat", "stack", "constant_pad_nd", "fill", "flip", "roll",
          "repeat", "repeat_interleave", "scatter", "index_copy", "index_fill", "tril", "triu", "select_backward",
          "slice_backward", "select_scatter", "slice_scatter", "diagonal_scatter", "as_strided_scatter"}  # fmt: skip
_FREE = {"_unsafe_view", "_reshape_alias", "sym_size", "sym_numel", "sym_stride", "sym_storage_offset"}


def node_cost(node: fx.Node, sizes: SizeNames) -> Cost:
    """Cost of one node in named sizes."""
    if node.op != "call_function" or getattr(node.target, "namespace", None) is None:
        return ZERO  # inputs, weights, output, getitem, arithmetic on sizes
    target: Any = node.target
    if target in SEMANTIC:
        flops, moved = SEMANTIC[target].cost(node)
        return Cost(sizes.rename(sympy.sympify(flops)), sizes.rename(sympy.sympify(moved)))
    name = _base_name(target)
    if target.is_view or name in _FREE:
        return ZERO

    written = list(_tensors(node.meta.get("val")))
    read = [t for source in node.all_input_nodes for t in _tensors(source.meta.get("val"))]
    if name.startswith("new_") or name.endswith("_like"):
        read = []  # only their shape and dtype are looked at
    out = sympy.Add(*(_elements(t, sizes) for t in written))
    moved = sympy.Add(*(_elements(t, sizes) * t.dtype.itemsize for t in [*read, *written]))

    if name in _MATMULS:
        biased = name in ("addmm", "baddbmm", "addmv")
        left = node.args[1 if biased else 0]
        assert isinstance(left, fx.Node)
        inner = sizes.shape(left.meta["val"])[-1]
        bias = out if biased or (name == "linear" and len(read) == 3) else 0
        return Cost(2 * out * inner + bias, moved)
    if name == "einsum":
        equation, operands = node.args[0], node.args[1]
        assert isinstance(equation, str) and isinstance(operands, (list, tuple))
        shapes = [sizes.shape(n.meta["val"]) for n in operands if isinstance(n, fx.Node)]
        return Cost(einsum_flops(equation, shapes), moved)
    if name in _GATHERS:
        source, *indices = read
        return Cost(bytes=2 * out * source.dtype.itemsize + _bytes(indices, sizes))
    if name in _SCATTERS:
        return Cost(_elements(read[-1] if name != "embedding_dense_backward" else read[0], sizes), moved)
    if not read or name in _MOVES:
        return Cost(bytes=moved)
    if torch.Tag.reduction in target.tags:
        return Cost(_elements(read[0], sizes, stored=False), moved)
    return Cost(out, moved)


def costs(program: Program) -> dict[fx.Node, Cost]:
    """Cost of every node of a program."""
    sizes = SizeNames.of(program)
    return {node: node_cost(node, sizes) for node in program.graph.nodes}


def program_cost(program: Program) -> Cost:
    """Cost of one run of a program."""
    return Cost.total(costs(program).values())


def einsum_flops(equation: str, shapes: list[tuple[sympy.Expr, ...]]) -> sympy.Expr:
    """FLOPs of an einsum contracted from left to right.

    Each pairwise contraction costs two FLOPs for every combination of the labels of its operands,
    one where nothing is summed.  An ellipsis stands for the leading dimensions that it covers.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    extent: dict[str, sympy.Expr] = {}
    operands: list[set[str]] = []
    for term, shape in zip(inputs.split(","), shapes, strict=True):
        head, dots, tail = term.partition("...")
        covered = len(shape) - len(head) - len(tail)
        labels = [*head, *(f"...{i}" for i in range(covered, 0, -1) if dots), *tail]
        for label, dim in zip(labels, shape, strict=True):
            extent[label] = dim if extent.get(label, 1) == 1 else extent[label]
        operands.append(set(labels))
    letters = [c for c in inputs if c.isalpha()]
    kept = set(output) if arrow else {c for c in letters if letters.count(c) == 1}
    kept |= {label for label in extent if label.startswith("...")}

    flops = sympy.S.Zero
    current = operands[0]
    if len(operands) == 1:
        return sympy.Mul(*(extent[c] for c in current)) if current - kept else flops
    for position, operand in enumerate(operands[1:], start=1):
        joined = current | operand
        current = joined & (kept | set().union(*operands[position + 1 :]))
        work = sympy.Mul(*(extent[c] for c in joined))
        flops += work * (2 if joined - current else 1)
    return flops


def _base_name(target: Any) -> str:
    name = target.overloadpacket.__name__
    return name[:-1] if name.endswith("_") and not name.startswith("_") else name


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _elements(tensor: torch.Tensor, sizes: SizeNames, stored: bool = True) -> sympy.Expr:
    """Number of elements; with ``stored``, an expanded dimension (stride 0) counts once, as in memory."""
    strides = tensor.stride() if stored else (1,) * tensor.dim()
    kept = [s for s, step in zip(tensor.shape, strides, strict=True) if not (isinstance(step, int) and step == 0)]
    return sympy.Mul(*(sizes.size(s) for s in kept))


def _bytes(tensors: Iterable[torch.Tensor], sizes: SizeNames) -> sympy.Expr:
    return sympy.Add(*(_elements(t, sizes) * t.dtype.itemsize for t in tensors))
