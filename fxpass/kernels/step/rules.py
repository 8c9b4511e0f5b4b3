"""What each ATen op means to a step: views move nothing, elementwise ops are formulas, the rest are loops."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch

from ..._torch_compat import size_expr
from .values import Formula, Indices, Pieces, Place, Readable, Reshaped, Value, aligned, constant, moved
from .views import TYPES, Shape, Size, Unsupported, numel, printed, same
from .writer import Writer

aten = torch.ops.aten
#: elements of a matrix up to which a product is written out
SMALL = 2048
#: (writer, the value's shape and type, arguments of the op) -> value
Rule = Callable[..., Value]


class Out:
    """Shape and type of the tensor that a node makes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape: Shape = tuple(size_expr(n) for n in tensor.shape)
        self.dtype: torch.dtype = tensor.dtype


# --- views


def _reshape(w: Writer, out: Out, x: Value, *_: Any) -> Value:
    if isinstance(x, Place):
        view = x.view.reshape(out.shape)
        if view is not None:
            return Place(view)
    if isinstance(x, Formula) and x.at is not None:
        flat = x.at
        dims = out.shape

        def element(at: Indices) -> str:
            terms = [f"{i} * {printed(numel(dims[d + 1:]))}" for d, i in enumerate(at) if i != "0"]
            return flat(f"({' + '.join(terms) or '0'})")

        return Formula(out.shape, x.dtype, element, x.reads, flat, x.free)
    return Reshaped(out.shape, x)


def _select(w: Writer, out: Out, x: Value, dim: int, index: Any) -> Value:
    source, dim = w.readable(x), dim % len(x.shape)
    index = _size(index)
    _fixed(source.shape[dim], index)
    if index.is_negative:
        index = index + source.shape[dim]
    if isinstance(source, Place):
        return Place(source.view.narrow(dim, index, sympy.S.One).drop(dim))
    at = printed(index)
    return moved(source, out.shape, lambda i: (*i[:dim], at, *i[dim:]))


def _slice(w: Writer, out: Out, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    dim, first = dim % len(x.shape), _size(start or 0)
    if first == 0 and step == 1 and same(x.shape[dim], out.shape[dim]):
        return x
    _fixed(x.shape[dim], first)
    if first.is_negative:
        first = max(first + x.shape[dim], sympy.S.Zero)
    first = min(first, x.shape[dim])
    if isinstance(x, Pieces) and x.dim == dim:  # one of the pieces, as they were joined
        for at, part in x.parts:
            if same(at, first) and same(part.shape[dim], out.shape[dim]) and step == 1:
                return part
    source = w.readable(x)
    if isinstance(source, Place):
        return Place(source.view.narrow(dim, first, out.shape[dim], step))
    move = f"({printed(first)} + {step} * "
    return moved(source, out.shape, lambda i: (*i[:dim], f"{move}{i[dim]})", *i[dim + 1 :]))


def _fixed(size: Size, index: Size) -> None:
    """Which elements are read is known now; cut from what grows with the system it is known when the model runs."""
    if not (size.is_Integer and index.is_Integer):
        raise Unsupported("a part of a dimension that grows with the system")


def _expand(w: Writer, out: Out, x: Value, *_: Any) -> Value:
    source = w.readable(x)
    new = len(out.shape) - len(source.shape)
    if isinstance(source, Place):
        view = source.view
        for _d in range(new):
            view = view.insert(0)
        for d, n in enumerate(out.shape):
            if view.shape[d] == 1 and n != 1:
                view = view.drop(d).insert(d, n)
        return Place(view)
    if source.free:
        return constant(out.shape, out.dtype, source.element(["0"] * len(source.shape)))
    return Formula(out.shape, out.dtype, lambda i: aligned(source, out.shape, i), source.reads)


def _unsqueeze(w: Writer, out: Out, x: Value, dim: int) -> Value:
    dim = dim % (len(x.shape) + 1)
    if isinstance(x, Place):
        return Place(x.view.insert(dim))
    if isinstance(x, Formula):
        element = x.element
        return Formula(out.shape, x.dtype, lambda i: element((*i[:dim], *i[dim + 1 :])), x.reads, x.at, x.free)
    return Reshaped(out.shape, x)


def _squeeze(w: Writer, out: Out, x: Value, dims: Any = None) -> Value:
    some = range(len(x.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(x.shape) for d in some if x.shape[d] == 1}
    if isinstance(x, Place):
        view = x.view
        for d in sorted(gone, reverse=True):
            view = view.drop(d)
        return Place(view)
    if isinstance(x, Formula):
        element, rank = x.element, len(x.shape)

        def inside(i: Indices) -> str:
            left = iter(i)
            return element(["0" if d in gone else next(left) for d in range(rank)])

        return Formula(out.shape, x.dtype, inside, x.reads, x.at, x.free)
    return Reshaped(out.shape, x)


def _permute(w: Writer, out: Out, x: Value, dims: Sequence[int]) -> Value:
    source = w.readable(x)
    dims = [d % len(x.shape) for d in dims]
    if isinstance(source, Place):
        return Place(source.view.permute(dims))
    return moved(source, out.shape, lambda i: [i[dims.index(d)] for d in range(len(dims))])


def _transpose(w: Writer, out: Out, x: Value, a: int = 0, b: int = 1) -> Value:
    dims = list(range(len(x.shape)))
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return _permute(w, out, x, dims)


def _same(w: Writer, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    return x


def _item(w: Writer, out: Out, values: Sequence[Value], number: int) -> Value:
    return values[number]


# --- numbers


def _size(value: Any) -> Size:
    """A Python number or the value of a size node, as a size."""
    if isinstance(value, sympy.Expr):
        return value
    if isinstance(value, int):
        return sympy.Integer(value)
    raise Unsupported(f"{value} where a size is wanted")


def _number(value: Any, dtype: torch.dtype) -> str:
    """C++ of a Python number, or of a size, in the type ``dtype``."""
    if isinstance(value, sympy.Expr):
        return f"{TYPES[dtype]}({printed(value)})"
    if dtype == torch.bool and isinstance(value, bool):
        return "true" if value else "false"
    if dtype not in TYPES or not isinstance(value, int | float):
        raise Unsupported(f"the argument {value!r}")
    if not dtype.is_floating_point:
        if value != int(value):
            raise Unsupported(f"the number {value} among integers")
        return f"{TYPES[dtype]}({int(value)})"
    if math.isnan(value):
        return f"{TYPES[dtype]}(NAN)"
    if math.isinf(value):
        return f"{TYPES[dtype]}({'-' if value < 0 else ''}INFINITY)"
    return f"{TYPES[dtype]}({float(value)!r})"


# --- elementwise


def formula(w: Writer, shape: Shape, dtype: torch.dtype, text: str, *args: Any, among: torch.dtype) -> Formula:
    """``text`` with the elements of ``args`` in place of {0}, {1}, ...; numbers are taken in the type ``among``."""
    values = [
        w.readable(w_once(w, a) if args.count(a) > 1 or _dear(a, shape) else a) if isinstance(a, Value) else None
        for a in args
    ]
    numbers = ["" if isinstance(a, Value) else _number(a, among) for a in args]
    present = [v for v in values if v is not None]

    def fill(pick: Callable[[Readable], str]) -> str:
        found = [n if v is None else pick(v) for v, n in zip(values, numbers, strict=True)]
        return f"({text.format(*found)})"

    def element(at: Indices) -> str:
        return fill(lambda v: aligned(v, shape, at))

    def flat_at(index: str) -> str:
        return fill(lambda v: _flat(v, index))

    flat = all(_is_one(v) or (v.flat and _equal(v.shape, shape)) for v in present)
    reads = frozenset[int]().union(*(v.reads for v in present))
    return Formula(shape, dtype, element, reads, flat_at if flat else None)


def _dear(value: Value, shape: Shape) -> bool:
    """Whether broadcasting to ``shape`` would compute something again that takes longer than to read it."""
    if not isinstance(value, Formula) or value.free:
        return False
    wide = shape[len(shape) - len(value.shape) :]
    repeated = any(n == 1 and m != 1 for n, m in zip(value.shape, wide, strict=True))
    text = value.element(["0"] * len(value.shape))
    return repeated and any(sign in text for sign in (" / ", "std::", "fast_"))


def _flat(value: Readable, index: str) -> str:
    if _is_one(value):
        return value.element(["0"] * len(value.shape))
    assert value.at is not None
    return value.at(index)


def _is_one(value: Readable) -> bool:
    return all(n == 1 for n in value.shape) or (isinstance(value, Formula) and value.free)


def _equal(a: Shape, b: Shape) -> bool:
    return len(a) == len(b) and all(same(m, n) for m, n in zip(a, b, strict=True))


def _kinds(args: Sequence[Any]) -> set[torch.dtype]:
    return {a.dtype for a in args if isinstance(a, Value)}


def _pointwise(text: str, floats: bool = False) -> Rule:
    def rule(w: Writer, out: Out, *args: Any) -> Value:
        if _kinds(args) != {out.dtype} or (floats and not out.dtype.is_floating_point):
            raise Unsupported(f"types {_kinds(args)} to {out.dtype}")
        if out.dtype == torch.bool:
            raise Unsupported("arithmetic of bool")
        return formula(w, out.shape, out.dtype, text.replace("T(", f"{TYPES[out.dtype]}("), *args, among=out.dtype)

    return rule


def _sum_of(text: str) -> Rule:
    """Of a, b and a factor alpha of b."""
    plain, scaled = _pointwise(text), _pointwise(text.replace("{1}", "{1} * {2}"))

    def rule(w: Writer, out: Out, a: Any, b: Any, alpha: Any = 1) -> Value:
        if isinstance(a, Pieces) and isinstance(b, Pieces) and text == "{0} + {1}" and alpha == 1:
            joined = a.plus(b) if _equal(a.shape, b.shape) else None
            if joined is not None:
                return joined
        return plain(w, out, a, b) if alpha == 1 else scaled(w, out, a, b, alpha)

    return rule


def _compare(sign: str) -> Rule:
    def rule(w: Writer, out: Out, a: Value, b: Any) -> Value:
        kinds = _kinds([a, b])
        if len(kinds) != 1 or not (isinstance(b, Value) or a.dtype.is_floating_point or isinstance(b, int)):
            raise Unsupported(f"a comparison of {kinds}")
        if a.dtype == torch.bool and not isinstance(b, Value):
            raise Unsupported(f"a comparison of {kinds}")
        return formula(w, out.shape, torch.bool, f"{{0}} {sign} {{1}}", a, b, among=a.dtype)

    return rule


def _logical(text: str) -> Rule:
    def rule(w: Writer, out: Out, *args: Value) -> Value:
        if _kinds(args) != {torch.bool}:
            raise Unsupported(f"logic of {_kinds(args)}")
        return formula(w, out.shape, torch.bool, text, *args, among=torch.bool)

    return rule


def _where(w: Writer, out: Out, condition: Value, a: Any, b: Any) -> Value:
    if condition.dtype != torch.bool or _kinds([a, b]) - {out.dtype}:
        raise Unsupported("where of several types")
    return formula(w, out.shape, out.dtype, "{0} ? {1} : {2}", condition, a, b, among=out.dtype)


def _masked_fill(w: Writer, out: Out, x: Value, mask: Value, number: Any) -> Value:
    return _where(w, out, mask, number, x)


def _cast(w: Writer, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    if x.dtype == out.dtype:
        return x
    if out.dtype not in TYPES or x.dtype not in TYPES:
        raise Unsupported(f"{x.dtype} as {out.dtype}")
    source = w.readable(x)
    if isinstance(source, Formula) and source.free:
        text = f"{TYPES[out.dtype]}({source.element(['0'] * len(source.shape))})"
        return constant(out.shape, out.dtype, text)
    return formula(w, out.shape, out.dtype, f"{TYPES[out.dtype]}({{0}})", source, among=out.dtype)


def _power(w: Writer, out: Out, x: Value, exponent: Any) -> Value:
    if isinstance(exponent, int | float) and exponent in range(1, 9):
        return _pointwise(" * ".join(["{0}"] * int(exponent)), floats=True)(w, out, w_once(w, x))
    return _pointwise("std::pow({0}, {1})", floats=True)(w, out, x, exponent)


def w_once(w: Writer, x: Value) -> Value:
    """``x`` such that reading an element several times computes nothing again."""
    return x if isinstance(x, Place) or (isinstance(x, Formula) and x.free) else Place(w.place(x))


def _clamp(w: Writer, out: Out, x: Value, low: Any = None, high: Any = None) -> Value:
    # comparisons keep NaN, as torch does
    value = w_once(w, x)
    if low is not None:
        value = _pointwise("{0} < {1} ? {1} : {0}")(w, out, value, low)
    if high is not None:
        value = _pointwise("{0} > {1} ? {1} : {0}")(w, out, w_once(w, value), high)
    return value


def _often(text: str) -> Rule:
    """An elementwise op that reads its argument more than once."""
    rule = _pointwise(text, floats=True)
    return lambda w, out, x: rule(w, out, w_once(w, x))


def _of_result(text: str) -> Rule:
    """A gradient that is made of the op's result, which it reads more than once."""
    rule = _pointwise(text, floats=True)
    return lambda w, out, g, y: rule(w, out, g, w_once(w, y))


def _fill(value: Any) -> Rule:
    return lambda w, out, *_, **__: constant(out.shape, out.dtype, _number(value, out.dtype))


def _full(w: Writer, out: Out, _: Any, value: Any, **__: Any) -> Value:
    return constant(out.shape, out.dtype, _number(value, out.dtype))


def _new_full(w: Writer, out: Out, _: Any, __: Any, value: Any, **___: Any) -> Value:
    return constant(out.shape, out.dtype, _number(value, out.dtype))


def _scalar(w: Writer, out: Out, value: Any, **_: Any) -> Value:
    return constant(out.shape, out.dtype, _number(value, out.dtype))


# --- joined and cut


def _cat(w: Writer, out: Out, values: Sequence[Value], dim: int = 0) -> Value:
    values = [v for v in values if len(v.shape) == len(out.shape)]  # torch allows empty vectors among the rest
    dim, at, parts = dim % len(out.shape), sympy.S.Zero, []
    for value in values:
        if value.dtype != out.dtype:
            raise Unsupported("a cat of several types")
        parts.append((at, value))
        at = sympy.expand(at + value.shape[dim])
    if len(parts) == 1:
        return parts[0][1]
    return Pieces(out.shape, out.dtype, dim, tuple(parts))


def _stack(w: Writer, out: Out, values: Sequence[Value], dim: int = 0) -> Value:
    dim = dim % len(out.shape)
    row = Out.__new__(Out)
    row.shape, row.dtype = (*out.shape[:dim], sympy.S.One, *out.shape[dim + 1 :]), out.dtype
    return _cat(w, out, [_unsqueeze(w, row, v, dim) for v in values], dim)


def _slice_backward(w: Writer, out: Out, g: Value, _: Any, dim: int, start: Any, __: Any, step: int) -> Value:
    first = _size(start)
    if step != 1 or first.is_negative:
        raise Unsupported("the gradient of a slice with steps, or counted from the end")
    return Pieces(out.shape, out.dtype, dim % len(out.shape), ((first, g),))


def _select_backward(w: Writer, out: Out, g: Value, _: Any, dim: int, index: Any) -> Value:
    dim, at = dim % len(out.shape), _size(index)
    if at.is_negative:
        at = at + out.shape[dim]
    row = Out.__new__(Out)
    row.shape, row.dtype = (*out.shape[:dim], sympy.S.One, *out.shape[dim + 1 :]), out.dtype
    return Pieces(out.shape, out.dtype, dim, ((at, _unsqueeze(w, row, g, dim)),))


# --- indices and sums


def _index_select(w: Writer, out: Out, x: Value, dim: int, index: Value) -> Value:
    dim = dim % len(x.shape)
    source, rows = w.readable(x), Place(w.place(index))
    w.check(rows, source.shape[dim], "an index is not below the number of rows")
    reads = source.reads | rows.reads

    def element(at: Indices) -> str:
        return source.element((*at[:dim], rows.element([at[dim]]), *at[dim + 1 :]))

    if isinstance(source, Formula) and source.free:
        return constant(out.shape, out.dtype, source.element(["0"] * len(source.shape)))
    return Formula(out.shape, out.dtype, element, reads)


def _index_add(w: Writer, out: Out, x: Value, dim: int, index: Value, source: Value, alpha: Any = 1) -> Value:
    if dim % len(out.shape) != 0 or alpha != 1 or source.dtype != out.dtype:
        raise Unsupported("a scatter along another dimension than the first, with a factor, or of several types")
    rows, values = Place(w.place(index)), w.readable(source)
    w.check(rows, out.shape[0], "an index is not below the number of rows")
    to = w.buffer("arena", out.dtype, out.shape)
    w.store(x, to)
    outer, inner = values.shape[0], values.shape[1:]
    row = rows.element(["n"])

    def add(at: Indices) -> list[str]:
        return [f"{to.element(['row', *at])} += {values.element(['n', *at])};"]

    lines = [
        f"for (int64_t n = 0; n < {printed(outer)}; n++) {{",
        f"  const int64_t row = {row};",
        *(f"  {line}" for line in w.loops(inner, add)),
        "}",
    ]
    w.emit(lines, values.reads | rows.reads | {to.buffer}, frozenset({to.buffer}))
    return Place(to)


def _sum(w: Writer, out: Out, x: Value, dims: Any = None, keep: bool = False, **_: Any) -> Value:
    if x.dtype == torch.bool or x.dtype.is_floating_point != out.dtype.is_floating_point:
        raise Unsupported(f"a sum of {x.dtype} as {out.dtype}")
    return _reduced(w, out, w.readable(x), dims, keep, "{0}", "sum")


def _norm(w: Writer, out: Out, x: Value, order: Any = 2, dims: Any = None, keep: bool = False, **_: Any) -> Value:
    if order != 2 or not out.dtype.is_floating_point:
        raise Unsupported(f"a norm of order {order}")
    source = w.readable(w_once(w, x))
    return _reduced(w, out, source, dims, keep, "double({0}) * {0}", "std::sqrt(sum)")


def _reduced(w: Writer, out: Out, source: Readable, dims: Any, keep: bool, term: str, result: str) -> Value:
    """Sums are made in float64: they are few, and exact to the last bit of float32."""
    rank = len(source.shape)
    some = [dims] if isinstance(dims, int) else list(dims or range(rank))
    gone = {d % rank for d in some} if rank else set()
    to = w.buffer("arena", out.dtype, out.shape)
    kept = [d for d in range(rank) if d not in gone]
    wide = "double" if source.dtype.is_floating_point else "int64_t"

    def body(at: Indices) -> list[str]:
        outer = dict(zip(kept, [at[d] for d in kept] if keep else at, strict=True))
        inside = {d: f"r{d}" for d in sorted(gone)}
        element = source.element([outer.get(d) or ("0" if source.shape[d] == 1 else inside[d]) for d in range(rank)])
        lines = [f"sum += {term.format(element)};"]
        for d in sorted(gone, reverse=True):
            if source.shape[d] != 1:
                head = f"for (int64_t r{d} = 0; r{d} < {printed(source.shape[d])}; r{d}++) {{"
                lines = [head, *(f"  {line}" for line in lines), "}"]
        return [f"{wide} sum = 0;", *lines, f"{to.element(at)} = {result};"]

    w.emit(["{", *w.loops(out.shape, body, simd=False), "}"], source.reads, frozenset({to.buffer}))
    return Place(to)


def _matmul(w: Writer, out: Out, a: Value, b: Value) -> Value:
    """Rows of products of small matrices, which are many: each would cost BLAS more to start than to do."""
    depth, columns = b.shape[-2:]
    if not (depth.is_Integer and columns.is_Integer and depth * columns <= SMALL):
        raise Unsupported("a product of matrices that BLAS is made for")
    if _kinds([a, b]) != {out.dtype} or not out.dtype.is_floating_point:
        raise Unsupported(f"a product of matrices of {_kinds([a, b])}")
    left, right = Place(w.place(a)), Place(w.contiguous(b))
    to = w.buffer("arena", out.dtype, out.shape)
    kind = TYPES[out.dtype]

    rows = out.shape[-2]
    together = 4 if rows.is_Integer and rows % 4 == 0 else 1  # sums that do not wait for one another

    def body(at: Indices) -> list[str]:
        *batch, block = at
        row = block if together == 1 else f"({together} * {block} + r)"
        factor, element = left.element([*batch, row, "k"]), right.element([*batch, "k", "j"])
        each = f"for (int64_t r = 0; r < {together}; r++)"
        return [
            f"{kind} sums[{together}][{columns}] = {{}};",
            f"for (int64_t k = 0; k < {depth}; k++) {each} {{",
            f"  const {kind} factor = {factor};",
            *(["  #pragma omp simd"] if columns >= 4 else []),
            f"  for (int64_t j = 0; j < {columns}; j++) sums[r][j] += factor * {element};",
            "}",
            f"{each} for (int64_t j = 0; j < {columns}; j++) {to.element([*batch, row, 'j'])} = sums[r][j];",
        ]

    blocks = (*out.shape[:-2], rows / together)
    w.emit(["{", *w.loops(blocks, body, simd=False), "}"], left.reads | right.reads, frozenset({to.buffer}))
    return Place(to)


def _argmax(w: Writer, out: Out, x: Value, dim: Any = None, keep: bool = False) -> Value:
    if dim is None or keep:
        raise Unsupported("an argmax over everything")
    source, dim = Place(w.place(x)), dim % len(x.shape)
    if not source.shape[dim].is_Integer or source.shape[dim] < 1:
        raise Unsupported("an argmax over a dimension that may be empty")
    to = w.buffer("arena", out.dtype, out.shape)

    def body(at: Indices) -> list[str]:
        def element(k: str) -> str:
            return source.element((*at[:dim], k, *at[dim:]))

        k, best = element("k"), element("best")
        return [
            "int64_t best = 0;",
            f"for (int64_t k = 1; k < {printed(source.shape[dim])}; k++)",
            f"  if ({k} > {best} || ({k} != {k} && {best} == {best})) best = k;  // NaN is the greatest",
            f"{to.element(at)} = best;",
        ]

    w.emit(["{", *w.loops(out.shape, body, simd=False), "}"], source.reads, frozenset({to.buffer}))
    return Place(to)


RULES: Mapping[Any, Rule] = {
    operator.getitem: _item,
    # views
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.expand.default: _expand,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.squeeze.default: _squeeze,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten.lift_fresh_copy.default: _same,
    # elementwise
    aten.add.Tensor: _sum_of("{0} + {1}"),
    aten.add.Scalar: _sum_of("{0} + {1}"),
    aten.sub.Tensor: _sum_of("{0} - {1}"),
    aten.sub.Scalar: _sum_of("{0} - {1}"),
    aten.rsub.Scalar: lambda w, out, x, number, alpha=1: _sum_of("{0} - {1}")(w, out, number, x, alpha),
    aten.mul.Tensor: _pointwise("{0} * {1}"),
    aten.mul.Scalar: _pointwise("{0} * {1}"),
    aten.div.Tensor: _pointwise("{0} / {1}", floats=True),
    aten.div.Scalar: _pointwise("{0} / {1}", floats=True),
    aten.neg.default: _pointwise("-{0}"),
    aten.abs.default: _pointwise("std::abs({0})", floats=True),
    aten.reciprocal.default: _pointwise("1 / {0}", floats=True),
    aten.sqrt.default: _pointwise("std::sqrt({0})", floats=True),
    aten.rsqrt.default: _pointwise("1 / std::sqrt({0})", floats=True),
    aten.exp.default: _pointwise("fast_exp({0})", floats=True),
    aten.expm1.default: _pointwise("std::expm1({0})", floats=True),
    aten.log.default: _pointwise("std::log({0})", floats=True),
    aten.log1p.default: _pointwise("std::log1p({0})", floats=True),
    aten.sin.default: _pointwise("std::sin({0})", floats=True),
    aten.cos.default: _pointwise("std::cos({0})", floats=True),
    aten.tanh.default: _pointwise("fast_tanh({0})", floats=True),
    aten.erf.default: _pointwise("std::erf({0})", floats=True),
    aten.sigmoid.default: _pointwise("1 / (1 + fast_exp(-{0}))", floats=True),
    aten.silu.default: _often("{0} / (1 + fast_exp(-{0}))"),
    aten.tanh_backward.default: _of_result("{0} * (1 - {1} * {1})"),
    aten.sigmoid_backward.default: _of_result("{0} * (1 - {1}) * {1}"),
    aten.relu.default: _often("{0} < 0 ? T(0) : {0}"),
    aten.pow.Tensor_Scalar: _power,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: lambda w, out, x, low: _clamp(w, out, x, low),
    aten.clamp_max.default: lambda w, out, x, high: _clamp(w, out, x, None, high),
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.logical_and.default: _logical("{0} && {1}"),
    aten.logical_or.default: _logical("{0} || {1}"),
    aten.logical_not.default: _logical("!{0}"),
    aten.bitwise_and.Tensor: _logical("{0} && {1}"),
    aten.bitwise_or.Tensor: _logical("{0} || {1}"),
    aten.bitwise_not.default: _logical("!{0}"),
    aten._to_copy.default: _cast,
    aten.zeros.default: _fill(0),
    aten.zeros_like.default: _fill(0),
    aten.new_zeros.default: _fill(0),
    aten.ones.default: _fill(1),
    aten.ones_like.default: _fill(1),
    aten.new_ones.default: _fill(1),
    aten.full.default: _full,
    aten.full_like.default: _full,
    aten.new_full.default: _new_full,
    aten.scalar_tensor.default: _scalar,
    # the rest
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.slice_backward.default: _slice_backward,
    aten.select_backward.default: _select_backward,
    aten.index_select.default: _index_select,
    aten.index_add.default: _index_add,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.linalg_vector_norm.default: _norm,
    aten.argmax.default: _argmax,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
}
for _name, _sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    for _overload in ("Scalar", "Tensor"):
        RULES[getattr(getattr(aten, _name), _overload)] = _compare(_sign)  # type: ignore[index]
