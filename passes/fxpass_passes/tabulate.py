"""The pass ``tabulate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import fx

from fxpass.algebra.piecewise import COARSE
from fxpass.errors import Location, UsageError, VerificationError
from fxpass.ir import ops
from fxpass.ir.metadata import provenance, set_provenance
from fxpass.ir.program import Program, Stage, add_constant
from fxpass.ir.scalar_functions import ScalarFunction, scalar_functions
from fxpass.ir.tabulation import Domain, Fit, NotTabulable, checked, domain, fit
from fxpass.passes import Application, Exactness, Outcome, Pass, Refusal
from fxpass.rewrite import erase_unused
from fxpass.verify.tolerances import parse_budget

from .table_errors import Probe, lengths_of, samples_of

aten = torch.ops.aten

COARSEST, FINEST = 16, 1 << 14  # cells between which a search looks
ASYMPTOTIC = 256  # cells from which on an error that does not fall will not do so any more
MARGIN = 4.0  # between the force error on the samples and the budget
SLACK = 16.0  # by which estimates, of bounds that add up, may be too large: symmetric samples show no error at all
REFINEMENTS = 6  # of all tables, where the measured force error is too large
ITEMSIZE = 8  # tables are stored in float64
Fits = Mapping[ScalarFunction, Fit]


@dataclass(frozen=True)
class Tabulate(Pass):
    """Turns functions of one number per edge into look-ups in piecewise polynomials.

    Before / After::

        r = linalg_vector_norm(edge_vectors)          r = linalg_vector_norm(edge_vectors)
        y = sin(r * k) / r * envelope(r)              w = table(squeeze(r), None, coefficients, grid, 0)
        w = mm(silu(mm(y, a)), b)

    Basis, cutoff envelope and network are one function, and so are embedding and filter networks. A function that
    depends on the species at the ends of the edge too becomes a table for each species or pair of species.

    Holds when: every op from the number to the result works on rows alone, and its other operands are weights or
    depend on species; the function is finite, and continuous at the cutoff, beyond which it is constant (or ``r_max``
    or calibration structures bound the range); a table costs at most 1/``gain`` of it and fits into ``max_bytes``;
    with ``dx=auto``, some grid is fine enough for the budget. Edges must be at least ``r_min`` long (recorded as an
    assumption that is checked at run time), since such functions are singular at 0.

    Keeps: values and derivatives within certified bounds, which are stored with each table; forces within the budget
    (eV/Angstrom) on the calibration structures, or on random edges where there are none; what is beyond the cutoff,
    exactly. Forces stay the exact gradient of the energy. Weights folded into tables get no gradient.

    Attributes:
        budget: force error allowed; 1e-6 eV/Angstrom where nobody gives one. With a fixed ``dx`` it decides nothing.
        dx: step, in Angstrom, made smaller until it divides the range, by one cell more where it does already, so
            that knots are not on round lengths; ``auto`` searches the widest one in budget.
        order: 5 matches value and two derivatives at the knots, 3 only one. Tables of order 5 need fewer and larger
            cells (``benchmarks/tables.py``).
        r_min: shortest edge, Angstrom; no two nuclei come so near: H2, the shortest bond, has 0.74.
        r_max: longest edge; by default the cutoff that is found in the function.
        max_bytes: size of the largest table.
        gain: by how much a table must be cheaper than the function in operations, an exponential counting as ten.
        over: ``length`` tabulates by edge length; ``nearest`` by a number nearer to the function through which
            everything goes, where there is one, such as DeePMD's s, which has no largest value: a grid ten times as
            coarse goes on to ten times the largest one met. ``auto`` takes the smaller table; for a fixed ``dx``, which
            is a step of both, the one by length unless the nearer number is of that kind.
    """

    name: ClassVar[str] = "tabulate"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    stages: ClassVar[tuple[Stage, ...]] = ("energy",)
    default_budget: ClassVar[float | None] = 1e-6

    budget: str | float | None = None
    dx: float | Literal["auto"] = "auto"
    order: Literal[3, 5] = 5
    r_min: float = 0.3
    r_max: float | None = None
    max_bytes: int = 64 << 20
    gain: float = 2.0
    over: Literal["auto", "length", "nearest"] = "auto"

    def apply(self, program: Program) -> Outcome:
        allowed = parse_budget(self.default_budget or 0.0 if self.budget is None else self.budget)
        if self.r_max is not None and not 0 < self.r_min < self.r_max:
            raise UsageError(f"a table cannot run from {self.r_min:g} to {self.r_max:g} Angstrom", where=self._where())
        if self.dx != "auto" and not 0 < self.dx < float("inf"):
            raise UsageError(f"a table cannot have the step {self.dx}", where=self._where(), hint="0.01, or auto")
        chosen, refusals = self._candidates(program)
        if not chosen:
            return Outcome(program, False, refusals=tuple(refusals))
        longest = max(where.cutoff or where.end for where in chosen.values())
        probe = Probe(program, tuple(chosen), samples_of(program, self.r_min, longest))
        names = dict.fromkeys(function.name for function in chosen)
        share = allowed / 2 / len(names)
        fits: dict[ScalarFunction, Fit] = {}
        rough: list[Refusal] = []
        for name in names:
            variants = [function for function in chosen if function.name == name]
            try:
                best = self._best(variants, chosen, probe, share)
                fits.update([best])
            except NotTabulable as error:
                rough.append(_refusal(variants[0], error.what))
        refusals += rough
        if rough and not fits and self.dx == "auto" and self.budget is not None:
            what = "; ".join(f"{refusal.module or refusal.nodes[0]}: {refusal.reason}" for refusal in rough)
            raise self._missed(f"nothing can be tabulated within {allowed:.1e} eV/A: {what}", rough[0].module)
        if not fits:
            return Outcome(program, False, refusals=tuple(refusals))
        result, applications = tabulated(program, fits, self.name)
        measured = probe.force_error(result) if self.dx == "auto" else 0.0
        if 0 < measured < allowed / MARGIN:
            wider = share * min(allowed / MARGIN / measured, SLACK)
            coarser = {f: self._search(f, chosen[f], probe, wider, self.max_bytes) for f in fits}
            smaller = tabulated(program, coarser, self.name)
            changed = probe.force_error(smaller[0])
            if changed <= allowed / 2:
                fits, (result, applications), measured = coarser, smaller, changed
        for _ in range(REFINEMENTS if self.dx == "auto" else 0):
            if measured <= allowed / 2:
                break
            for function, found in fits.items():
                finer = self._fit(function, chosen[function], probe, found.grid.step / 1.5, self.max_bytes)
                fits[function] = checked(function, finer)
            result, applications = tabulated(program, fits, self.name)
            measured = probe.force_error(result)
        if measured > allowed:
            worst = max(fits, key=lambda f: probe.estimate(f, fits[f]))
            what = f"tables change forces by {measured:.1e} eV/A, more than {allowed:.1e} eV/A, however fine they are"
            raise self._missed(what, worst.module)
        facts = [f"edge lengths >= {self.r_min:g} A"]
        facts += [f"one-hot {spec.name}" for spec in program.with_property("one_hot") if any(f.ends for f in fits)]
        result = replace(result, assumptions=tuple(dict.fromkeys((*program.assumptions, *facts))))
        return Outcome(result, True, applications, tuple(refusals))

    def _candidates(self, program: Program) -> tuple[dict[ScalarFunction, Domain], list[Refusal]]:
        """Functions for which a table pays and fits, with their ranges; and why others have none."""
        chosen: dict[ScalarFunction, Domain] = {}
        refusals: list[Refusal] = []
        lengths = lengths_of(program)

        def consider(function: ScalarFunction) -> None:
            cost = 2 * (self.order + 1) * function.channels + 10
            size = function.tables * (COARSEST + 2) * (self.order + 1) * function.channels * ITEMSIZE
            flops = function.remaining(chosen)
            if flops < self.gain * cost:
                reason = f"it takes {flops:.0f} operations an edge, a table {cost}"
                refusals.append(_refusal(function, reason))
                return
            if size > self.max_bytes:
                least, limit = _megabytes(size), _megabytes(self.max_bytes)
                reason = f"{function.tables} tables by species take {least} or more, max_bytes is {limit}"
                refusals.append(_refusal(function, reason))
                for part in function.inner:
                    consider(part)
                return
            for variant in self._variants(function):
                try:
                    chosen[variant] = domain(variant, self.r_min, self.r_max, lengths)
                except NotTabulable as error:
                    refusals.append(_refusal(variant, error.what))

        for function in scalar_functions(program):
            consider(function)
        return chosen, refusals

    def _variants(self, function: ScalarFunction) -> list[ScalarFunction]:
        if function.nearer is None or self.over == "length":
            return [function]
        return [function.nearer] if self.over == "nearest" else [function.nearer, function]

    def _best(
        self, variants: list[ScalarFunction], chosen: Mapping[ScalarFunction, Domain], probe: Probe, share: float
    ) -> tuple[ScalarFunction, Fit]:
        """The smallest table among variants of a function."""
        if self.dx != "auto":
            variants = [v for v in variants if chosen[v].reach or v is variants[-1]]
        best: tuple[ScalarFunction, Fit] | None = None
        failed: NotTabulable | None = None
        for variant in variants:
            limit = self.max_bytes if best is None else best[1].coefficients.nbytes
            try:
                best = variant, self._search(variant, chosen[variant], probe, share, limit)
            except NotTabulable as error:
                failed = error
        if best is None:
            assert failed is not None
            raise failed
        return best

    def _search(self, function: ScalarFunction, where: Domain, probe: Probe, share: float, limit: int) -> Fit:
        """The coarsest grid whose bounds keep the estimated force error within ``share``; or that of ``dx``."""
        if self.dx != "auto":
            cells = (where.end - where.start) / self.dx
            if abs(cells - round(cells)) < 1e-6:  # knots on round lengths, where dimers and crystals sit
                cells = round(cells) + 1
            step = (where.end - where.start) / cells
            return checked(function, self._fit(function, where, probe, step, limit))
        width, cells, before = where.end - where.start, COARSEST, float("inf")
        while True:
            found = self._fit(function, where, probe, width / cells, limit)
            error = probe.estimate(function, found)
            if error <= share:
                break
            if cells == FINEST or (cells >= ASYMPTOTIC and error > before / 1.5):
                raise NotTabulable(
                    f"it is not smooth enough: with {cells} cells of {found.grid.step:.1e} the table of order "
                    f"{self.order} is off by {found.value_error:.1e} and its slope by {found.slope_error:.1e}, which "
                    f"changes forces by some {error:.1e} eV/A; its share of the budget is {share:.1e} eV/A"
                )
            cells, before = 2 * cells, error
        for fewer in (cells * 5 // 8, cells * 3 // 4, cells * 7 // 8) if cells > COARSEST else ():
            coarser = self._fit(function, where, probe, width / fewer, limit)
            if probe.estimate(function, coarser) <= share:
                found = coarser
                break
        return checked(function, found)

    def _fit(self, function: ScalarFunction, where: Domain, probe: Probe, step: float, limit: int) -> Fit:
        cells = (where.end - where.start + max(0.0, where.reach - where.end) / COARSE) / step
        size = function.tables * cells * (self.order + 1) * function.channels * ITEMSIZE
        if size > limit:
            needs, most = _megabytes(size), _megabytes(limit)
            raise NotTabulable(f"its table takes {needs} at a step of {step:.1e}, the limit is {most}")
        return fit(function, where, self.order, step, used=0.8 * probe.shortest if where.is_length else where.start)

    def _missed(self, what: str, module: str) -> VerificationError:
        where = Location(pass_name=self.name, module_path=module or None)
        return VerificationError(what, where=where, hint="a wider budget=, order=5, or a pipeline without tabulate")

    def _where(self) -> Location:
        return Location(pass_name=self.name)


def tabulated(program: Program, fits: Fits, made_by: str) -> tuple[Program, tuple[Application, ...]]:
    """A copy of ``program`` with tables in place of functions."""
    result = program.copy()
    graph = result.graph
    nodes = {node.name: node for node in graph.nodes}
    numbers: dict[tuple[int, ...], fx.Node] = {}
    done = []
    for function, found in fits.items():
        root, variable = nodes[function.name], nodes[function.variable_name]
        value, before = root.meta["val"], set(graph.nodes)
        name = add_constant(result, f"{root.name}_table", found.coefficients.contiguous())
        with graph.inserting_before(root):
            if function.ends and function.ends not in numbers:
                numbers[function.ends] = _number(result, function)
            stored = graph.get_attr(name)
            x = variable
            if variable.meta["val"].dim() == 2:
                x = graph.call_function(aten.squeeze.dim, (variable, 1))
            if variable.meta["val"].dtype != value.dtype:
                x = graph.call_function(aten._to_copy.default, (x,), {"dtype": value.dtype})
            index = numbers.get(function.ends)
            new = graph.call_function(ops.table, (x, index, stored, str(found.grid), 0))
            if value.dim() == 1:
                new = graph.call_function(aten.squeeze.dim, (new, 1))
            elif value.dim() > 2:
                new = graph.call_function(aten.view.default, (new, [-1, *map(int, value.shape[1:])]))
        made = [node for node in graph.nodes if node not in before]
        for node in made:
            set_provenance(node, replace(provenance(root), made_by=made_by))
        module = provenance(root).module
        root.replace_all_uses_with(new)
        removed = len(erase_unused([root]))
        done.append(Application("table", function.name, module, removed, len(made)))
    result.graph_module.recompile()
    return result, tuple(done)


def _number(program: Program, function: ScalarFunction) -> fx.Node:
    """The number of each edge's table, [edges], int64: the species at its ends."""
    graph = program.graph
    (hot,) = (program.placeholders[spec.name] for spec in program.with_property("one_hot"))
    (edges,) = (program.placeholders[s.name] for s in program.with_property("index:atoms") if s.dims == (2, "edges"))
    species = graph.call_function(aten.argmax.default, (hot, 1))
    rows = (graph.call_function(aten.select.int, (edges, 0, end)) for end in function.ends)
    first, *rest = [graph.call_function(ops.gather, (species, row)) for row in rows]
    for second in rest:
        scaled = graph.call_function(aten.mul.Tensor, (first, function.species))
        first = graph.call_function(aten.add.Tensor, (scaled, second))
    return first


def _refusal(function: ScalarFunction, reason: str) -> Refusal:
    return Refusal("table", reason, (function.name,), function.module)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.3g} MB"
