"""A part of a graph against what is to stand in for it: values, derivatives, rotation, inversion, permutation.

Whoever fuses or replaces a part of a graph asks here first::

    region = extract(program, nodes)
    done = substitute(program, region, kernel, made_by="my-pass")
    done.refusal  # None, or why the region was left as it was

The original is the measure throughout: a candidate has to give its values wherever both are evaluated, also on
rotated, inverted and permuted operands, and may break a symmetry as far as the original does and no further.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, fx

from .._torch_compat import o3
from ..algebra.irreps import columns_as_mul_ir, mul_ir
from ..errors import CaptureError, Location, PassError, VerificationError
from ..ir.cost import SizeNames
from ..ir.irreps_transfer import KEEP
from ..ir.metadata import irreps, provenance, set_provenance
from ..ir.ops import SEMANTIC, fusion_guard, gather, scatter_sum
from ..ir.program import Dim, Program, TensorSpec, add_constant, attribute
from ..ir.tracing import constants_of, trace_program
from ..ir.verifier import verify
from ..passes import Application, Refusal
from .physics import random_rotation
from .receipt import Checks, Row
from .tolerances import OWN_ERROR_FACTOR, ROUNDING

SIZES: tuple[Mapping[str, int], ...] = (
    {"atoms": 7, "edges": 23, "graphs": 2},
    {"atoms": 1, "edges": 0, "graphs": 1},
    {"atoms": 12, "edges": 60, "graphs": 3},
)

class _Fault(VerificationError):
    """What is wrong with a candidate: what it raised, or returned, itself.  Anything else that is raised is a bug."""


@contextmanager
def _faults() -> Iterator[None]:
    """While open, what torch or a foreign kernel raises is the fault of who is called."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise _Fault(f"{type(error).__name__}: {lines[0]}") from error

aten = torch.ops.aten


@dataclass(frozen=True)
class Region:
    """A part of a graph as a function.

    Attributes:
        name: for reports.
        nodes: in graph order.
        inputs: the nodes that it reads, weights too, in the order of ``operands``.
        outputs: its nodes that others read, in the order of ``results``.
        operands: of the inputs; ``irreps`` as far as known.  A tensor of integers with the property ``index:SIZE``
            holds indices below that size.  The property ``size`` marks an integer: the value of its one dimension.
        results: of the outputs.
        weights: values of the operands that are weights or constants of the program, by name.
        function: the region itself, operands -> tuple of results.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    operands: tuple[TensorSpec, ...]
    results: tuple[TensorSpec, ...]
    weights: Mapping[str, Tensor]
    function: fx.GraphModule


@dataclass(frozen=True)
class RegionReport(Checks):
    """What was compared: one row for each check at each set of sizes, errors relative to the largest element."""

    name: str

    def summary(self) -> str:
        """One line: each kind of check that failed, by its worst row; or the row that came nearest to its limit."""
        if not self.rows:
            return "nothing was compared"
        if not self.failures:
            row = max(self.rows, key=lambda row: row.used)
            nearest = f"{row.check}: {row.value:.1e} <= {row.limit:.0e}"
            return f"{len(self.rows)} checks passed, nearest to its limit {nearest}"
        worst: dict[str, Row] = {}
        for row in self.failures:
            if row.check not in worst or row.used > worst[row.check].used:
                worst[row.check] = row
        return "; ".join(map(_told, worst.values()))


def _told(row: Row) -> str:
    if math.isfinite(row.value):
        return f"{row.check} off by {row.value:.1e} > {row.limit:.0e}"
    return f"{row.check}: {row.note or 'not a finite number'}"


@dataclass(frozen=True)
class Substitution:
    """What came of a substitution: the program, the report, and either where it was done or why it was not."""

    program: Program
    report: RegionReport
    application: Application | None = None
    refusal: Refusal | None = None


def extract(program: Program, nodes: Collection[fx.Node], name: str = "") -> Region:
    """The part of ``program`` that consists of ``nodes``, as a function.

    Args:
        program: verified, so that its nodes carry shapes and irreps.
        nodes: calls of ops; e.g. one of ``fxpass.ir.guards.regions``.
        name: for reports; by default the name of the last node.

    Raises:
        PassError: it cannot be computed as a whole: another node reads one of its results and is read by it.
    """
    inside = [node for node in program.graph.nodes if node in nodes]
    if not inside or any(node.op != "call_function" for node in inside):
        raise PassError("a region consists of calls of ops, one at least")
    _dependants(inside)
    inputs = list(dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in nodes))
    outputs = [node for node in inside if set(node.users).difference(nodes)]
    names = SizeNames.of(program)
    graph = fx.Graph()
    mapping = {node: graph.placeholder(node.name) for node in inputs}
    for node in inside:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(tuple(mapping[node] for node in outputs))
    return Region(
        name or inside[-1].name,
        tuple(inside),
        tuple(inputs),
        tuple(outputs),
        tuple(_operand(node, nodes, names) for node in inputs),
        tuple(_spec(node, names, irreps(node)) for node in outputs),
        {node.name: attribute(program, node) for node in inputs if node.op == "get_attr"},
        fx.GraphModule(torch.nn.Module(), graph, class_name="Region"),
    )


def check_region(
    original: Callable[..., Any],
    candidate: Callable[..., Any],
    operands: Sequence[TensorSpec],
    results: Sequence[TensorSpec],
    *,
    name: str = "region",
    weights: Mapping[str, Tensor] | None = None,
    sizes: Sequence[Mapping[str, int]] = SIZES,
    tolerance: float | None = None,
    fixed: Collection[str] = (),
    gradients: bool = True,
    seed: int = 0,
) -> RegionReport:
    """Compare a candidate with the original of a region, on random operands.

    At each set of sizes: ``values`` and ``gradients`` (of a random functional, by each random floating operand)
    against the original; then for a random rotation, the inversion and a random order of rows, what the candidate
    gives for transformed operands against its own transformed result (``rotation``, ``inversion``,
    ``permutation``), and against the original's (``rotation, values`` and so on).  An operand without irreps is
    taken to be invariant.

    Args:
        original, candidate: operands -> tensor or tuple of tensors.
        operands, results: as those of :class:`Region`; a result without irreps is taken to be invariant.
        name: for the report.
        weights: operands that have a value, by name; all others are random.
        sizes: named sizes at which to compare.
        tolerance: error that is allowed, relative to the largest element of each result; by default that of a
            sum in another order in the results' dtype.  Breaking a symmetry is allowed up to twice the original's
            own error where that is more.
        fixed: named sizes whose rows have an order that the region relies on, e.g. ``("edges",)`` for edges that
            are sorted by receiver; they are not permuted.
        gradients: whether derivatives count; not for a program that is differentiated already.
        seed: of all random numbers.

    Returns:
        The report, passed or not.  A candidate that raises has failing rows that say so.
    """
    rows: list[Row] = []
    for number, at in enumerate(sizes):
        place = f"{name} at {', '.join(f'{n} {size}' for size, n in at.items() if _named(operands, size))}"
        compared = _Comparison(original, candidate, tuple(operands), tuple(results), weights or {}, place, tolerance)
        rows += compared.rows(at, fixed, gradients, seed + number)
    return RegionReport(tuple(rows), name)


def substitute(
    program: Program,
    region: Region,
    candidate: Callable[..., Any],
    *,
    made_by: str,
    sizes: Sequence[Mapping[str, int]] = SIZES,
    tolerance: float | None = None,
    fixed: Collection[str] = (),
) -> Substitution:
    """Put ``candidate`` in the place of a region, in ``program``'s own graph, if and only if it passes the check.

    The candidate is traced, so that an op of a kernel stays one node and plain torch becomes ATen.  Derivatives are
    compared where the program is still to be differentiated.

    Args:
        program: its graph is changed in place; ``region`` was extracted from it.
        candidate: takes the region's operands in order (sizes as integers) and returns its results.
        made_by: name of the pass, for provenance and report.
        sizes, tolerance, fixed: as for :func:`check_region`.

    Returns:
        The substitution.  With a refusal, the original is in place as before, and the refusal has the measured
        errors.
    """
    where, blamed = provenance(region.nodes[-1]).module, tuple(node.name for node in region.nodes)
    report = check_region(
        region.function,
        candidate,
        region.operands,
        region.results,
        name=region.name,
        weights=region.weights,
        sizes=sizes,
        tolerance=tolerance,
        fixed=fixed,
        gradients=program.stage == "energy",
    )

    def refused(reason: str) -> Substitution:
        return Substitution(program, report, refusal=Refusal("substitute", f"{region.name}: {reason}", blamed, where))

    if not report.passed:
        return refused(report.summary())
    try:
        made = _traced(program, region, candidate)
    except (_Fault, CaptureError, PassError) as error:
        return refused(f"it cannot be traced: {error.what.splitlines()[0]}")
    added = _splice(program, region, made, made_by)
    verify(program)
    return Substitution(
        program, report, Application("substitute", region.name, where, removed=len(region.nodes), added=added)
    )


# --- regions


def _dependants(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes between the first and the last of a region that read its results, directly or not, in order."""
    own, late = set(inside), dict.fromkeys(inside[:0])
    node = inside[0]
    while node is not inside[-1].next:
        read = next((n for n in node.all_input_nodes if n in late), None)
        if node in own and read is not None:
            raise PassError(
                f"it is no region: {read.name} lies between two nodes of it, the later of which is {node.name}",
                where=Location(node=read.name, module_path=provenance(read).module or None),
            )
        if node not in own and (read is not None or any(n in own for n in node.all_input_nodes)):
            late[node] = None
        node = node.next
    return list(late)


def _spec(node: fx.Node, names: SizeNames, known: str | None, *properties: str) -> TensorSpec:
    value = node.meta["val"]
    name = node.all_input_nodes[0].name if node.target is fusion_guard else node.name
    if not isinstance(value, Tensor):
        return TensorSpec(name, (_dim(names.size(value)),), torch.int64, properties=frozenset({"size"}))
    dims = tuple(map(_dim, names.shape(value)))
    return TensorSpec(name, dims, value.dtype, known, properties=frozenset(properties))


def _dim(size: sympy.Expr) -> Dim:
    return int(size) if size.is_number else str(size).replace(" ", "")


def _operand(node: fx.Node, inside: Collection[fx.Node], names: SizeNames) -> TensorSpec:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return _spec(node, names, None)
    if value.is_floating_point():
        return _spec(node, names, irreps(node) or _demanded(node, inside, value.shape[-1:]))
    into = next(_indexed(node, inside), None)
    return _spec(node, names, None, *([] if into is None else [f"index:{_dim(names.size(into))}"]))


def _demanded(node: fx.Node, inside: Collection[fx.Node], width: Sequence[Any]) -> str | None:
    """The irreps that the region's ops demand of an operand that has none recorded."""
    for user in node.users:
        if user not in inside:
            continue
        if user.target in (gather, scatter_sum, fusion_guard) or user.target in KEEP:
            if user.args[0] is node and (found := _demanded(user, inside, width)):
                return found
        elif user.target in SEMANTIC:
            for operand, expected in SEMANTIC[user.target].operands(user).values():
                if operand is node and expected is not None and [o3().Irreps(expected).dim] == list(width):
                    return expected
    return None


def _indexed(node: fx.Node, inside: Collection[fx.Node]) -> Iterator[Any]:
    """The sizes that a tensor of integers is an index into, as its users in the region say."""
    for user in node.users:
        if user in inside:
            if user.target is gather or user.target is aten.index_select.default:
                yield user.all_input_nodes[0].meta["val"].shape[0]
            elif user.target in (scatter_sum, aten.index_add.default):
                yield user.meta["val"].shape[0]
            elif user.meta["val"].dtype == node.meta["val"].dtype:
                yield from _indexed(user, inside)


# --- operands, and what symmetries do to them


def _extent(dim: Dim, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else int(sympy.sympify(dim).subs(sizes))


def _named(specs: Sequence[TensorSpec], size: str) -> bool:
    return any(size in str(dim) for spec in specs for dim in spec.dims)


def _random(
    specs: Sequence[TensorSpec], weights: Mapping[str, Tensor], sizes: Mapping[str, int], seed: int
) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)

    def value(spec: TensorSpec) -> Any:
        if spec.name in weights:
            return weights[spec.name].detach()
        shape = [_extent(dim, sizes) for dim in spec.dims]
        if "size" in spec.properties:
            return shape[0]
        if spec.dtype.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(spec.dtype)
        into = next((p.removeprefix("index:") for p in spec.properties if p.startswith("index:")), "1")
        bound = max(_extent(int(into) if into.isdigit() else into, sizes), 1)
        return torch.randint(bound, shape, generator=generator).to(spec.dtype)

    return [value(spec) for spec in specs]


Move = Callable[[Any, TensorSpec], Any]


def _symmetries(sizes: Mapping[str, int], fixed: Collection[str], seed: int) -> Iterator[tuple[str, Move]]:
    rotation = torch.tensor(random_rotation(np.random.default_rng(seed + 1)))
    yield "rotation", lambda x, spec: _turned(x, spec, rotation)
    yield "inversion", lambda x, spec: _turned(x, spec, -torch.eye(3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed + 2)
    orders = {name: torch.randperm(n, generator=generator) for name, n in sizes.items() if name not in fixed}
    yield "permutation", lambda x, spec: _permuted(x, spec, orders)


def _turned(x: Any, spec: TensorSpec, matrix: Tensor) -> Any:
    """``x`` under an orthogonal transformation of space: its last dimension by the irreps' representation."""
    if spec.irreps is None:
        return x
    order = columns_as_mul_ir(spec.irreps)
    d = o3().Irreps(mul_ir(spec.irreps)).D_from_matrix(matrix)[order][:, order]
    return (x.double() @ d.double().T).to(x.dtype)


def _permuted(x: Any, spec: TensorSpec, orders: Mapping[str, Tensor]) -> Any:
    """``x`` with its rows in a new order, and with the new places of the rows that it is an index into."""
    if not isinstance(x, Tensor):
        return x
    for axis, dim in enumerate(spec.dims):
        if dim in orders:
            x = x.index_select(axis, orders[str(dim)])
    for into, order in orders.items():
        if f"index:{into}" in spec.properties:
            x = torch.argsort(order).to(x.dtype)[x.long()]
    return x


# --- comparing


@dataclass(frozen=True)
class _Comparison:
    original: Callable[..., Any]
    candidate: Callable[..., Any]
    operands: tuple[TensorSpec, ...]
    results: tuple[TensorSpec, ...]
    weights: Mapping[str, Tensor]
    place: str
    tolerance: float | None

    def rows(self, sizes: Mapping[str, int], fixed: Collection[str], gradients: bool, seed: int) -> Iterator[Row]:
        values = _random(self.operands, self.weights, sizes, seed)
        expected = _call(self.original, values)
        limits = [ROUNDING.get(y.dtype, 0.0) if self.tolerance is None else self.tolerance for y in expected]
        yield self.row("values", partial(self.apart, values, expected), limits)
        if gradients:
            slopes = self.gradients(self.original, values, seed)
            allowed = limits[:1] * len(slopes)
            yield self.row("gradients", partial(self.steeper, values, slopes, seed), allowed)
        for kind, move in _symmetries(sizes, fixed, seed):
            moved = [move(x, spec) for x, spec in zip(values, self.operands, strict=True)]
            there = _call(self.original, moved)
            own = self.broken(self.original, values, moved, move, expected)
            allowed = [max(limit, OWN_ERROR_FACTOR * error) for limit, error in zip(limits, own, strict=True)]
            yield self.row(kind, partial(self.broken, self.candidate, values, moved, move, expected), allowed)
            yield self.row(f"{kind}, values", partial(self.apart, moved, there), limits)

    def apart(self, values: Sequence[Any], expected: Sequence[Tensor]) -> list[float]:
        return _errors(_call(self.candidate, values), expected)

    def steeper(self, values: Sequence[Any], expected: Sequence[Tensor], seed: int) -> list[float]:
        return _errors(self.gradients(self.candidate, values, seed), expected)

    def gradients(self, function: Callable[..., Any], values: Sequence[Any], seed: int) -> list[Tensor]:
        """Derivatives of a random functional of the results by every floating-point operand that is no weight."""
        generator = torch.Generator().manual_seed(seed + 3)
        free = [_is_floating(v) and s.name not in self.weights for v, s in zip(values, self.operands, strict=True)]
        leaves = [v.detach().clone().requires_grad_() if f else v for v, f in zip(values, free, strict=True)]
        by = [leaf for leaf, f in zip(leaves, free, strict=True) if f]
        with torch.enable_grad():
            with _faults():
                found = function(*leaves)
            results = [y for y in (found if isinstance(found, (tuple, list)) else [found]) if _is_floating(y)]
            seeds = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in results]
            if by and not any(y.requires_grad for y in results):
                raise _Fault("it has no derivative: autograd takes its result for a constant")
            kept = [(y, g) for y, g in zip(results, seeds, strict=True) if y.requires_grad]
            ys, gs = [y for y, _ in kept], [g for _, g in kept]
            with _faults():
                grads = torch.autograd.grad(ys, by, gs, allow_unused=True) if by else ()
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(by, grads, strict=True)]

    def broken(
        self,
        function: Callable[..., Any],
        values: Sequence[Any],
        moved: Sequence[Any],
        move: Move,
        expected: Sequence[Tensor],
    ) -> list[float]:
        """How far a function is from commuting with a transformation; its results are such as those ``expected``."""
        found = _alike(_call(function, values), expected)
        here = [move(y, spec) for y, spec in zip(found, self.results, strict=True)]
        return _errors(_call(function, moved), here)

    def row(self, check: str, errors: Callable[[], Sequence[float]], allowed: Sequence[float]) -> Row:
        """The worst of several errors, each by its own limit; one that cannot be computed is NaN, which fails."""
        try:
            pairs = list(zip(errors(), allowed, strict=True))
        except _Fault as error:
            return Row(check, self.place, math.nan, max(allowed, default=0.0), "relative", error.what)
        found = [Row(check, self.place, error, limit, "relative") for error, limit in pairs]
        nothing = Row(check, self.place, 0.0, 0.0, "relative", "nothing to compare")
        return max(found, key=lambda row: (not row.passed, row.used), default=nothing)


def _call(function: Callable[..., Any], values: Sequence[Any]) -> list[Tensor]:
    with torch.no_grad(), _faults():
        found = function(*values)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Sequence[Tensor]:
    """``found``, which has the shapes and dtypes of those expected."""
    if [(y.shape, y.dtype) for y in found] != [(y.shape, y.dtype) for y in expected]:
        told = [", ".join(f"{y.dtype} {list(y.shape)}" for y in ys) for ys in (found, expected)]
        raise _Fault(f"it returns {told[0]} in place of {told[1]}")
    return found


def _errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Largest differences, each relative to the largest element expected; NaN where either has NaN."""
    return [relative_error(a, b) for a, b in zip(_alike(found, expected), expected, strict=True)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest element expected (over 1 where that is zero); 0 for empty tensors."""
    if not expected.numel():
        return 0.0
    a, b = found.double(), expected.double()
    scale = float(b.abs().max())
    return float((a - b).abs().max()) / (scale if scale > 0 else 1.0)


# --- substitution


def _traced(program: Program, region: Region, candidate: Callable[..., Any]) -> Program:
    """The candidate as a program of its own; an operand that is a size becomes a tensor of that size."""
    sized = ["size" in spec.properties for spec in region.operands]

    def body(*inputs: Tensor) -> list[Tensor]:
        values = [x.shape[0] if is_size else x for x, is_size in zip(inputs, sized, strict=True)]
        with _faults():
            found = candidate(*values)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    made, frozen = trace_program(body, region.operands, region.results, {}, stage=program.stage)
    if frozen:
        raise PassError(f"it ties a size to a value: {'; '.join(frozen)}")
    return made


def _splice(program: Program, region: Region, made: Program, made_by: str) -> int:
    """Replace the region's nodes by those of ``made``; returns how many came."""
    late, last = _dependants(region.nodes), region.nodes[-1]
    origin = provenance(last)
    inputs = dict(zip(made.graph.find_nodes(op="placeholder"), region.inputs, strict=True))
    mapping = dict(inputs)
    sizes = {carrier for carrier, given in inputs.items() if not isinstance(given.meta["val"], Tensor)}
    constants = {name: add_constant(program, name, value) for name, value in constants_of(made).items()}
    added, after = 0, last
    for node in made.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.target is aten.sym_size.int and node.args[0] in sizes:
            mapping[node] = inputs[node.all_input_nodes[0]]
            continue
        with program.graph.inserting_after(after):
            copied = program.graph.node_copy(node, mapping.__getitem__)
        if node.op == "get_attr":
            copied.target = constants[str(node.target)]
        set_provenance(copied, replace(origin, made_by=made_by))
        mapping[node], after = copied, copied
        added += 1
    for node in late:  # they read what is computed only now
        after.append(node)
        after = node
    for old, new in zip(region.outputs, made.results.values(), strict=True):
        old.replace_all_uses_with(mapping[new])
    for node in reversed(region.nodes):
        program.graph.erase_node(node)
    program.graph_module.recompile()
    return added
