"""Reference implementations of the semantic ops in plain PyTorch.

These run in eager mode, and traced they are the legalisation to ATen.  No operand's batch size is
read: shapes come from the specs and from ``-1``, so a trace of them is dynamic by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from math import factorial, log2
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algebra.irreps import channels_last, clebsch_gordan, segments
from ..algebra.multilinear import CHANNELS, Path, TensorProduct, parse_linear, parse_tensor_product
from ..algebra.piecewise import COARSE, parse_grid
from ..algebra.polynomial import Polynomial, parse_polynomial


def constant(values: np.ndarray, like: Tensor) -> Tensor:
    """A float64 array as a tensor of the dtype and device of ``like``."""
    return torch.tensor(values.tolist(), dtype=like.dtype, device=like.device).reshape(values.shape)


#: types too narrow to add up in
HALF = (torch.float16, torch.bfloat16)


def rounding_once(operands: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorates a reference: where its leading ``operands`` are of a 16-bit type, it adds up in float32, rounds once.

    The result saturates: beyond the range of the type it is the largest number of that type, never infinite.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(function)
        def run(*args: Any) -> Tensor:
            kinds = {t.dtype for a in args[:operands] for t in _tensors(a) if t.is_floating_point()}
            if len(kinds) != 1 or not kinds.issubset(HALF):
                return function(*args)
            (low,) = kinds
            wide = [[_widened(t) for t in a] if isinstance(a, (list, tuple)) else _widened(a) for a in args]
            return saturated(function(*wide), low)

        return run

    return decorate


def _tensors(argument: Any) -> list[Tensor]:
    return [t for t in (argument if isinstance(argument, (list, tuple)) else [argument]) if isinstance(t, Tensor)]


def _widened(argument: Any) -> Any:
    return argument.to(torch.float32) if isinstance(argument, Tensor) and argument.dtype in HALF else argument


def saturated(x: Tensor, low: torch.dtype) -> Tensor:
    """``x`` rounded to ``low``; float16 ends at 65504, where finite numbers would become infinite."""
    largest = torch.finfo(low).max
    return (x.clamp(-largest, largest) if low is torch.float16 else x).to(low)


def digits(dtype: torch.dtype) -> int:
    """Binary digits of a floating type's significand: 8 (bfloat16), 11 (float16), 24 (float32), 53 (float64)."""
    return 1 - round(log2(torch.finfo(dtype).eps))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in the wider of the two types.

    Where one operand is narrower, the other is taken apart into a sum of words of that narrow type, 2 of float16
    or 3 of bfloat16 for float32, and the products of narrow numbers are added up in the wide type: exact products,
    no rounding but that of the sum (Ootomo and Yokota, Int. J. High Perform. Comput. Appl. 36, 475 (2022)). Rows
    are scaled by powers of two, so that no word overflows, and later words do not underflow, whatever the row holds.
    Tensor cores run such products at the narrow type's rate; ATen on CPU has none with a wide result, so the
    narrow numbers are widened, which changes no bit.
    """
    if a.dtype == b.dtype:
        return torch.mm(a, b)
    if a.dtype.itemsize < b.dtype.itemsize:
        return product(b.t(), a.t()).t().contiguous()
    low, narrow = b.dtype, b.to(a.dtype)
    step = 2.0 ** digits(low)
    largest = a.abs().amax(1, keepdim=True).clamp_min(1e-37)
    scale = torch.exp2(-torch.floor(torch.log2(largest)))
    rest, unit, total = a * scale, 1.0, None
    for _ in range(round(digits(a.dtype) / digits(low))):
        word = rest.to(low).to(a.dtype)
        part = torch.mm(word, narrow)
        total = part if total is None else total + part * unit
        rest, unit = (rest - word) * step, unit / step
    assert total is not None
    return total / scale


def contract(
    a: Tensor, on_a: str, b: Tensor, on_b: str, keep: str, sizes: dict[str, int]
) -> tuple[Tensor, str]:
    """Sum of a * b over the indices that both have and ``keep`` has not; returns it and its indices.

    ``sizes`` gives the extent of every index but the batch index z.  The sum is one (batched) matrix
    product on explicit views; an einsum would trace to twice the nodes and to arithmetic on sizes.
    """
    shared = [c for c in on_a if c in on_b]
    summed = [c for c in shared if c not in keep]
    batch = [c for c in shared if c in keep]
    left, right = [c for c in on_a if c not in shared], [c for c in on_b if c not in shared]
    if not summed:
        out = [c for c in on_a if c in shared or c in left] + right
        return _spread(a, on_a, out) * _spread(b, on_b, out), "".join(out)

    if not left and not right and on_a == on_b and on_a[-1] in batch:  # channels last: they stay contiguous
        return (a * b).sum([on_a.index(c) for c in summed]), "".join(batch)

    def extent(group: list[str]) -> int:
        return -1 if "z" in group else int(np.prod([sizes[c] for c in group]))

    def matrix(x: Tensor, on: str, *groups: list[str]) -> Tensor:
        order = [on.index(c) for group in groups for c in group]
        x = x if order == sorted(order) else x.permute(order)
        shape = [extent(group) for group in groups if group or group is not batch]
        return x if list(x.shape[1:]) == shape[1:] and x.dim() == len(shape) else x.contiguous().view(shape)

    x, y = matrix(a, on_a, batch, left, summed), matrix(b, on_b, batch, summed, right)
    value = torch.bmm(x, y) if batch else product(x, y)
    out = batch + left + right
    return value.view([-1 if c == "z" else sizes[c] for c in out]), "".join(out)


def _on(irreps: str, channels: str, component: str) -> str:
    """Indices of one segment of features."""
    return f"z{component}{channels}" if channels_last(irreps) else f"z{channels}{component}"


def _view(x: Tensor, letters: str, sizes: dict[str, int]) -> Tensor:
    """Split the last dimension of ``x`` into the indices ``letters``."""
    shape = [-1 if c == "z" else sizes[c] for c in letters]
    return x if x.dim() == len(shape) and list(x.shape[1:]) == shape[1:] and "z" in letters else x.view(shape)


def _spread(x: Tensor, on: str, out: list[str]) -> Tensor:
    """``x`` with its indices in the order of ``out`` and extent one where it has none."""
    order = [on.index(c) for c in out if c in on]
    x = x if order == sorted(order) else x.permute(order)
    for position, c in enumerate(out):
        if c not in on:
            x = x.unsqueeze(position)
    return x


def reorder(x: Tensor, on: str, to: str, sizes: dict[str, int]) -> Tensor:
    """Bring ``x`` from indices ``on`` to ``to``: sum over what ``to`` lacks, repeat over what ``on`` lacks."""
    extra = [k for k, c in enumerate(on) if c not in to]
    if extra:
        x, on = x.sum(extra), "".join(c for c in on if c in to)
    for c in to:
        if c not in on:
            x, on = x.unsqueeze(-1).expand([-1] * len(on) + [sizes[c]]), on + c
    return x if on == to else x.permute([on.index(c) for c in to])


def _flatten(x: Tensor, letters: str, columns: int) -> Tensor:
    """[rows, columns] where the slot has a batch index, else [columns]."""
    shape = [-1, columns] if "z" in letters else [columns]
    return x if x.dim() == len(shape) and x.shape[-1] == columns else x.contiguous().view(shape)


def assemble(pieces: dict[int, list[Tensor]], lengths: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Concatenate summed pieces by key; keys without a piece are zeros of their length."""
    columns = []
    for key, length in lengths:
        if key in pieces:
            total = pieces[key][0]
            for piece in pieces[key][1:]:
                total = total + piece
            columns.append(total)
        elif length:
            columns.append(like.new_zeros((*like.shape[:-1], length)))
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)


def _segment(x: Tensor, irreps: str, index: int) -> Tensor:
    rows = segments(irreps)
    if len(rows) == 1:
        return x
    offset, mul, l, _ = rows[index]
    return x.narrow(-1, offset, mul * (2 * l + 1))


@rounding_once(operands=4)
def tensor_product(
    x1: Tensor | None, x2: Tensor | None, weight: Tensor | None, out: Tensor | None, spec: str, wrt: str
) -> Tensor:
    """Gradient of sum(out * TP(x1, x2, weight)) with respect to the slot ``wrt``; ``"out"`` is TP itself."""
    tp = parse_tensor_product(spec)
    operands = {"x1": x1, "x2": x2, "weight": weight, "out": out}
    layouts = {"x1": tp.irreps1, "x2": tp.irreps2, "out": tp.irreps_out}
    like = next(t for name, t in operands.items() if t is not None and (name != "weight" or not tp.shared))
    pieces: dict[int, list[Tensor]] = {}
    for path in tp.paths:
        if wrt == "weight" and path.weight < 0:
            continue
        value = _path(tp, path, operands, layouts, wrt)
        key = {"x1": path.i1, "x2": path.i2, "out": path.io, "weight": path.weight}[wrt]
        pieces.setdefault(key, []).append(value)
    if wrt == "weight":
        lengths = _weight_lengths({p.weight: _numel(tp, p) for p in tp.paths if p.weight >= 0}, tp.weights)
        return assemble(pieces, lengths, like.new_zeros(1) if tp.shared else like)
    return assemble(pieces, [(k, m * (2 * l + 1)) for k, (_, m, l, _) in enumerate(segments(layouts[wrt]))], like)


def _weight_lengths(used: dict[int, int], total: int) -> list[tuple[int, int]]:
    """(offset, length) runs that cover the weight vector; keys of gaps are negative."""
    rows, at = [], 0
    for offset in sorted(used):
        if offset > at:
            rows.append((-1 - at, offset - at))
        rows.append((offset, used[offset]))
        at = offset + used[offset]
    if total > at:
        rows.append((-1 - at, total - at))
    return rows


def _numel(tp: TensorProduct, path: Path) -> int:
    sizes = tp.sizes(path)
    return int(np.prod([sizes[c] for c in CHANNELS[path.mode][2]]))


def _path(
    tp: TensorProduct, path: Path, operands: dict[str, Tensor | None], layouts: dict[str, str], wrt: str
) -> Tensor:
    """One path's contribution to slot ``wrt``, flattened to [rows, columns] (or [weights] if shared)."""
    sizes = tp.sizes(path)
    u, v, w, o = CHANNELS[path.mode]
    full = {"x1": _on(layouts["x1"], u, "i"), "x2": _on(layouts["x2"], v, "j"), "out": _on(layouts["out"], o, "k")}
    full["weight"] = w if tp.shared else f"z{w}"
    # A coupling with a scalar is delta / sqrt(2l+1): the two other component indices are one index.
    degrees = tp.degrees(path)
    scale, same = path.coefficient, {}
    if 0 in degrees:
        scale /= float(np.sqrt(2 * max(degrees) + 1))
        pair = [c for c, l in zip("ijk", degrees, strict=True) if l == max(degrees)]
        same = {c: pair[0] for c in pair}
    # Indices of extent one carry nothing; without them most contractions become plain products.
    lean = {
        name: "".join(same.get(c, c) for c in letters if c == "z" or sizes[c] > 1) for name, letters in full.items()
    }

    def load(name: str) -> tuple[Tensor, str]:
        x = operands[name]
        assert x is not None
        if name == "weight":
            numel = _numel(tp, path)
            piece = x if numel == tp.weights else x.narrow(-1, path.weight, numel)
        else:
            piece = _segment(x, layouts[name], {"x1": path.i1, "x2": path.i2, "out": path.io}[name])
        return _view(piece, lean[name], sizes), lean[name]

    order = {
        "out": ("x2", "cg", "x1", "weight"),
        "weight": ("x2", "cg", "x1", "out"),
        "x1": ("x2", "cg", "out", "weight"),
        "x2": ("out", "weight", "x1", "cg"),
    }[wrt]
    terms = []
    for name in order:
        if name == "cg":
            if 0 not in degrees:
                cg = clebsch_gordan(*degrees, tp.rounding) * scale
                terms.append((constant(cg, next(t for t in operands.values() if t is not None)), "ijk"))
        elif name != "weight" or path.weight >= 0:
            terms.append(load(name))
    if wrt == "x1":  # out * weight first: it keeps the couplings small
        late = terms.pop() if path.weight >= 0 else None
        cut = terms.pop()
        if late is not None:
            cut = contract(*cut, *late, keep=lean["x1"] + "".join(on for _, on in terms), sizes=sizes)
        terms.append(cut)
    value, on = terms[0]
    for n, term in enumerate(terms[1:], start=2):
        keep = lean[wrt] + "".join(rest for _, rest in terms[n:])
        value, on = contract(value, on, *term, keep=keep, sizes=sizes)
    value = reorder(value, on, lean[wrt], sizes)
    if 0 in degrees and scale != 1.0:
        value = value * scale
    columns = int(np.prod([sizes[c] for c in full[wrt] if c != "z"]))
    return _flatten(value, full[wrt], columns)


@rounding_once(operands=3)
def linear(x: Tensor | None, weight: Tensor | None, out: Tensor | None, spec: str, wrt: str) -> Tensor:
    """Gradient of sum(out * linear(x, weight)) with respect to the slot ``wrt``; ``"out"`` is the map itself."""
    lin = parse_linear(spec)
    ins, outs = segments(lin.irreps_in), segments(lin.irreps_out)
    like = next(t for t in ((x, out) if lin.shared else (x, out, weight)) if t is not None)
    mixed = weight is not None and weight.dtype != like.dtype  # narrow weights must not be rounded once more
    pieces: dict[int, list[Tensor]] = {}
    used: dict[int, int] = {}
    for path in lin.paths:
        (_, m, l, _), (_, n, _, _) = ins[path.i], outs[path.o]
        sizes = {"u": m, "w": n, "i": 2 * l + 1}
        full = {"x": _on(lin.irreps_in, "u", "i"), "out": _on(lin.irreps_out, "w", "i")}
        full["weight"] = "uw" if lin.shared else "zuw"
        lean = {k: "".join(c for c in letters if c == "z" or sizes[c] > 1) for k, letters in full.items()}
        used[path.weight] = m * n
        terms = []
        if wrt != "x":
            assert x is not None
            terms.append((_view(_segment(x, lin.irreps_in, path.i), lean["x"], sizes), lean["x"]))
        if wrt != "out":
            assert out is not None
            terms.append((_view(_segment(out, lin.irreps_out, path.o), lean["out"], sizes), lean["out"]))
        if wrt != "weight":
            assert weight is not None
            block = weight if m * n == lin.weights else weight.narrow(-1, path.weight, m * n)
            matrix = _view(block, lean["weight"], sizes)
            terms.append((matrix if mixed else matrix * path.coefficient, lean["weight"]))
        value, on = contract(*terms[0], *terms[1], keep=lean[wrt], sizes=sizes)
        value = reorder(value, on, lean[wrt], sizes)
        if wrt == "weight" or mixed:
            value = value * path.coefficient
        columns = int(np.prod([sizes[c] for c in full[wrt] if c != "z"]))
        value = _flatten(value, full[wrt], columns)
        pieces.setdefault({"x": path.i, "out": path.o, "weight": path.weight}[wrt], []).append(value)
    if wrt == "weight":
        return assemble(pieces, _weight_lengths(used, lin.weights), like.new_zeros(1) if lin.shared else like)
    rows = ins if wrt == "x" else outs
    return assemble(pieces, [(k, m * (2 * l + 1)) for k, (_, m, l, _) in enumerate(rows)], like)


@rounding_once(operands=4)
def polynomial(
    x: Tensor,
    directions: Sequence[Tensor],
    weight: Tensor | None,
    out: Tensor | None,
    coefficients: Tensor,
    spec: str,
    wrt: str,
) -> Tensor:
    """A polynomial of ``x`` and its directional derivatives, per row and channel.

    With P(x)[k] = sum_n weight[n] coefficients[m, n, k] monomial_m(x) and D^d P its d-th derivative
    along ``directions``, this is the gradient of sum(out * D^d P) with respect to ``wrt``: ``"out"``
    is D^d P itself, ``"weight"`` the gradient by the weights, ``"direction"`` the gradient by one more
    direction.

    Args:
        x, directions: [rows, channels, variables].
        weight: [rows, paths, channels], or None where there is one path of weight 1.
        out: [rows, channels, outputs].
        coefficients: [monomials, paths, outputs].
    """
    poly = parse_polynomial(spec)
    if coefficients.dtype.itemsize > x.dtype.itemsize:  # the result is of the type of x
        coefficients = coefficients.to(x.dtype)
    channels, (count, paths, outputs) = x.shape[1], coefficients.shape
    # columns are rows x channels: every gather and product below runs over contiguous memory
    values = monomials(poly, as_columns(x), [as_columns(d) for d in directions])
    w = None if weight is None else weight.transpose(0, 1).contiguous().view(paths, 1, -1)
    if wrt == "direction":
        assert out is not None
        seed = as_columns(out)
        if w is not None:  # outer product of weight and out first: paths x outputs are fewer than monomials
            seed = (w * seed.unsqueeze(0)).view(paths * outputs, -1)
        g = product(coefficients.view(count, -1), seed)
        return as_rows(polynomial_gradient(poly, g, values), channels)
    if poly.columns != tuple(range(len(poly.order))):
        values = values.index_select(0, torch.tensor(poly.columns, device=x.device))
    basis = product(coefficients.view(count, -1).t(), values).view(paths, outputs, -1)
    if wrt == "weight":
        assert out is not None
        return (basis * as_columns(out).unsqueeze(0)).sum(1).view(paths, -1, channels).transpose(0, 1).contiguous()
    return as_rows((basis.squeeze(0) if w is None else (basis * w).sum(0)), channels)


def as_columns(x: Tensor) -> Tensor:
    """[rows, channels, n] -> [n, rows * channels]."""
    return x.permute(2, 0, 1).contiguous().view(x.shape[2], -1)


def as_rows(x: Tensor, channels: int) -> Tensor:
    """[n, rows * channels] -> [rows, channels, n]."""
    return x.view(x.shape[0], -1, channels).permute(1, 2, 0).contiguous()


def monomials(poly: Polynomial, x: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """The closure's monomials, differentiated once along each direction: [variables, n] -> [monomials, n]."""
    levels: dict[tuple[int, frozenset[int]], Tensor | None] = {}
    along = frozenset(range(len(directions)))
    blocks = []
    for degree, names in enumerate(poly.closure):
        if names:
            value = _level(poly, x, directions, degree, along, levels)
            blocks.append(torch.zeros_like(x.narrow(0, 0, 1)).expand(len(names), -1) if value is None else value)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _level(
    poly: Polynomial,
    x: Tensor,
    directions: Sequence[Tensor],
    degree: int,
    along: frozenset[int],
    known: dict[tuple[int, frozenset[int]], Tensor | None],
) -> Tensor | None:
    """The monomials of one degree, differentiated along some of the directions; None for zero.

    By the product rule on monomial = parent * x_last: x is linear, a constant has no derivative.  Not a function inside
    of :func:`monomials`: one that calls itself is part of its own closure, which would keep ``known`` alive until the
    next run of Python's garbage collector.
    """
    if degree < len(along):
        return None
    if degree == 0:
        return torch.ones_like(x.narrow(0, 0, 1))
    key = (degree, along)
    if key not in known:
        parents, last = (torch.tensor(rows, device=x.device) for rows in poly.steps[degree - 1])
        total: Tensor | None = None
        for rest, factor in [(along, x), *((along - {j}, directions[j]) for j in sorted(along))]:
            below = _level(poly, x, directions, degree - 1, rest, known)
            if below is not None:
                term = factor.index_select(0, last)
                if degree > 1:
                    term = below.index_select(0, parents) * term
                total = term if total is None else total + term
        known[key] = total
    return known[key]


def polynomial_gradient(poly: Polynomial, g: Tensor, values: Tensor) -> Tensor:
    """d/dx_i of sum_m g_m monomial_m, gathered per variable; rows are padded with a zero factor."""
    longest = max(map(len, poly.gradient), default=0)
    if longest == 0:  # a constant
        return g.new_zeros((poly.variables, 1)).expand(-1, g.shape[1])
    table = np.zeros((3, poly.variables, longest), dtype=np.int64)
    for i, rows in enumerate(poly.gradient):
        for k, row in enumerate(rows):
            table[:, i, k] = row
    pick_g, pick_v = (torch.tensor(t.reshape(-1).tolist(), device=g.device) for t in table[:2])
    factor = constant(table[2].reshape(-1, 1).astype(np.float64), g)
    terms = g.index_select(0, pick_g) * (values.index_select(0, pick_v) * factor)
    return terms.view(poly.variables, longest, -1).sum(1)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` by ``index``: [rows, ...] -> [indices, ...]."""
    return torch.index_select(x, 0, index)


@rounding_once(operands=1)
def scatter_sum(source: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum of the rows of ``source`` into ``size`` rows by ``index``: the transposed gather."""
    return torch.index_add(source.new_zeros((size, *source.shape[1:])), 0, index, source)


def table(x: Tensor, index: Tensor | None, coefficients: Tensor, spec: str, derivative: int) -> Tensor:
    """Piecewise polynomials of one number per row, or their derivative of the given order by it.

    Continued linearly outside the grid, or constant beyond it where the grid is flat. A NaN gives NaN, and
    whatever x is, no coefficient outside the table is read.

    Args:
        x: [rows].
        index: [rows], int64: number of the table of each row, or None where there is one.
        coefficients: [order + 1, tables * rows of a table, channels], by powers of u; see ``algebra.piecewise``.
            Best kept in float64: rounded to float32 they leave steps of 6e-8 at the knots, which do no harm to
            float32 but to finite differences of the same program in float64. Lowering folds the cast.
        spec: text of the grid, which all tables share.

    Returns:
        [rows, channels], in the dtype of x; float32 for a 16-bit x.
    """
    grid = parse_grid(spec)
    x = _widened(x)  # a 16-bit number cannot count cells
    coefficients = coefficients.to(x.dtype)
    if grid.flat:
        x = x.clamp(max=grid.last)
    per_step = grid.cells / (grid.end - grid.start)
    local = x - grid.start
    # the comparison is false for a NaN, which must not become the number of a row
    row = torch.where(x >= grid.start, (local * per_step).floor().clamp(0, grid.cells - 1), -1.0)
    u = (local - row * grid.step) * per_step  # the difference is exact, see ``Grid.fitted``
    past = x >= grid.last
    if grid.coarse:
        beyond = x >= grid.end
        far = (x - grid.end) * (per_step / COARSE)
        cell = far.floor().clamp(0, grid.coarse - 1)
        row = torch.where(beyond, cell + grid.cells, row)
        u = torch.where(beyond, far - cell, u)
    row = torch.where(past, float(grid.cells + grid.coarse), row).to(torch.int64) + 1
    u = torch.where(past, (x - grid.last) * (per_step / COARSE if grid.coarse else per_step), u)
    u = u.unsqueeze(1)
    if derivative >= grid.order:
        value = u * 0  # NaN where x is
        if derivative > grid.order:
            return value.expand(-1, coefficients.shape[2])
    if index is not None:
        row = row + index * grid.rows

    def term(power: int) -> Tensor:
        return torch.index_select(coefficients[power], 0, row)

    # Horner for sum over k of k!/(k-d)! c_k u^(k-d), divided by d!; factors go to the one column of u
    value = term(grid.order) + value if derivative == grid.order else term(grid.order)
    for power in range(grid.order - 1, derivative - 1, -1):
        factor = u * ((power + 1) / (power + 1 - derivative)) if derivative else u
        value = term(power) + value * factor  # addcmul would not trace: it cannot broadcast symbolic sizes
    if derivative:
        scale = factorial(derivative) * per_step**derivative
        if not grid.coarse:
            return value * scale
        beyond = (x >= grid.end).unsqueeze(1)
        value = value * torch.where(beyond, torch.full_like(u, scale / COARSE**derivative), scale)
    return value


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Numbers stored as integers: ``q * scale`` in the type of ``scale``, which broadcasts against ``q``."""
    return q.to(scale.dtype) * scale
