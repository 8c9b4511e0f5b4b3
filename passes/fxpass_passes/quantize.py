"""The pass ``quantize``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxpass.errors import Location, PassError, UsageError
from fxpass.ir import ops
from fxpass.ir.metadata import provenance, set_provenance
from fxpass.ir.program import Program, Stage, add_constant, attribute
from fxpass.passes import Application, Exactness, Outcome, Pass, Refusal
from fxpass.verify.tolerances import parse_budget

from .adaround import LEVELS, TINY, adaround, below, descend, scales
from .force_gradients import Calibration, Errors, errors, weighted
from .quantizable import Candidate, candidates

aten = torch.ops.aten
NOTHING = "no constant weight of a linear map is wide enough to be quantised"
SAMPLES = 40  # that errors are measured on
MEMORY = 1 << 28  # numbers that projected gradients may hold
MARGIN = 0.5  # of the budget, on the samples: other structures are worse than those that weights were fitted to


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight in 8 bits.

    Attributes:
        candidate: which weight, and its layout.
        q: integers -127 to 127 in the order of the layout's columns, float32 [size].
        scale: of each of them, float32 [size].
        nearest: force error that rounding this weight to the nearest would cause alone, eV/Angstrom.
    """

    candidate: Candidate
    q: Tensor
    scale: Tensor
    nearest: float

    @property
    def value(self) -> Tensor:
        """The weight that it stands for."""
        return self.candidate.layout.from_columns(self.q * self.scale)


@dataclass(frozen=True)
class Choice:
    """What ``quantize`` decides for a program.

    Attributes:
        rounded: the weights that are stored in 8 bits.
        left: those that stay as they are, for the sake of the budget.
        errors: on the samples.
        refusals: why other tensors are not touched.
    """

    rounded: tuple[Rounded, ...]
    left: tuple[Rounded, ...]
    errors: Errors
    refusals: tuple[Refusal, ...]

    @property
    def share(self) -> float:
        """How many of the weights that may be quantised are."""
        inside, outside = (sum(r.q.numel() for r in rs) for rs in (self.rounded, self.left))
        return inside / (inside + outside)


@dataclass(frozen=True)
class Quantize(Pass):
    """Stores the weights of linear maps in 8 bits, rounded so that forces change as little as possible.

    Before / After::

        y = linear(x, weight)           w = view(dequantize(weight_int8, weight_scale), [4096])
                                        y = linear(x, w)

    Quantised are the matrices of scalar nets (``mm``, radial nets among them), equivariant linear maps, and tensor
    products with shared weights. Each output channel of each path has a scale of its own. It multiplies whole
    irreps, all components alike, so equivariance is exact. Rounding is learnt on the samples, AdaRound with the
    Hessian of the force error: see ``adaround.py``.

    Holds when: the program is at stage "energy" and has samples. Left alone are coefficients and weights of
    polynomials (spherical harmonics, symmetric contractions), what species select (embeddings, energies of single
    atoms), bases, cutoffs, scale and shift, anything that reads the geometry of edges other than by invariants, and
    weights that are pinned to a wider type than others. With a budget, the weights whose rounding costs most for
    each byte saved stay too, until the errors on the samples are within half of it: the other half is for other
    structures.

    Keeps: interface, dtypes, equivariance; forces are the gradient of the energy that is computed. Gradients with
    respect to quantised weights are gone. ``fold-constants`` leaves the integers alone until they are legalised: a
    saved package is smaller, and a run is as fast as before.

    Attributes:
        bits: 8.
        budget: largest error of a force component, eV/Angstrom or a text such as ``"3 meV/A"``; a tenth of it for the
            energy per atom, in eV. Without one everything that may be is quantised.
        share: least share of the quantisable weights that must end up in 8 bits.
        probes: random projections of the force error, each the cost of some three force evaluations. The more, the
            better does the rounding generalise.
        rounds: how often projections along the error that is left on each sample are added, and weights rounded again.
        steps: of AdaRound, layer by layer; 0 starts from rounding to the nearest.
        sweeps: over all weights, of the descent that follows it on the forces of the whole model; 0 leaves it out.
        seed: of projections and of the order of rounding; equal seeds give equal bits.
    """

    name: ClassVar[str] = "quantize"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    stages: ClassVar[tuple[Stage, ...]] = ("energy",)
    calibrated: ClassVar[bool] = True

    bits: int = 8
    budget: str | float | None = None
    share: float = 0.7
    probes: int = 120
    rounds: int = 2
    steps: int = 500
    sweeps: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise UsageError(f"weights of {self.bits} bits are not known to quantize", hint="bits=8")
        if not 0 <= self.share <= 1:
            raise UsageError(f"share={self.share} is not a share", hint="a number from 0 to 1, such as 0.7")
        for option, least in (("probes", 1), ("rounds", 0), ("steps", 0), ("sweeps", 0)):
            if getattr(self, option) < least:
                raise UsageError(f"{option}={getattr(self, option)} is less than {least}")
        if self.budget is not None:
            parse_budget(self.budget)

    def apply(self, program: Program) -> Outcome:
        done = tuple(n.name for n in program.graph.nodes if n.target is ops.dequantize)
        if done:
            return Outcome(program, False, refusals=(Refusal("int8", "the program went through it already", done),))
        found, refusals = candidates(program)
        if not found:
            return Outcome(program, False, refusals=(Refusal("int8", NOTHING), *refusals))
        choice = self.choice(program)
        applications = tuple(store(program, rounded, self.name) for rounded in choice.rounded)
        program.graph_module.recompile()
        return Outcome(program, bool(applications), applications, choice.refusals)

    def choice(self, program: Program) -> Choice:
        """Which weights are stored, and as what; ``program`` stays as it is.

        Raises:
            UsageError: the program has no samples.
            PassError: there is nothing to quantise, weights or forces are not finite, or the budget is missed with
                ``share`` of the weights.
        """
        found, refusals = candidates(program)
        if not found:
            raise PassError(NOTHING)
        nodes = {str(n.target): n for n in program.graph.find_nodes(op="get_attr")}
        for candidate in found:
            values = attribute(program, nodes[candidate.name])
            if not values.isfinite().all():
                count = int((~values.isfinite()).sum())
                where = Location(node=nodes[candidate.name].name, module_path=candidate.module or None)
                raise PassError(f"{count} of {values.numel()} weights are not finite", where=where)
        calibration = Calibration(program, tuple(c.name for c in found), SAMPLES)
        names = {str(n.target): attribute(program, n).dtype for n in nodes.values()}
        probes = max(1, min(self.probes, MEMORY // sum(c.layout.size for c in found)))
        gradients = calibration.gradients(calibration.directions(probes, self.seed))
        started = [
            _start(c, calibration.weights[c.name], gradients[c.name], names[c.name], self.steps) for c in found
        ]
        for _ in range(self.rounds):
            deviations = calibration.deviations(_values(_rounded(started, self.sweeps, self.seed)))
            along = [weighted(d) for d in deviations]
            gradients = calibration.gradients([v[None] / v.norm().clamp_min(TINY) for v in along])
            started = [s.with_gradients(gradients[s.candidate.name]) for s in started]
        return self._within_budget(calibration, started, refusals)

    def _within_budget(
        self, calibration: Calibration, started: Sequence[_Start], refusals: tuple[Refusal, ...]
    ) -> Choice:
        """The choice that quantises most; those that cost most for each byte are left first."""
        ranked = sorted(started, key=lambda s: s.nearest**2 / s.saved, reverse=True)
        budget = None if self.budget is None else MARGIN * parse_budget(self.budget)
        room = (1 - self.share) * sum(s.x.numel() for s in started)
        left: list[_Start] = []
        while True:
            inside = [s for s in ranked if s not in left]
            rounded = _rounded(inside, self.sweeps, self.seed)
            found = errors(calibration.deviations(_values(rounded)))
            outside = tuple(Rounded(s.candidate, s.q(s.up), s.scale, s.nearest) for s in left)
            choice = Choice(rounded, outside, found, (*map(_left, outside), *refusals))
            if budget is None or found.within(budget):
                return choice
            before = len(left)
            for start in inside:  # the more are left, the more at a time
                if len(left) - before < max(1, before // 4) and start.x.numel() <= room:
                    left.append(start)
                    room -= start.x.numel()
            if len(left) == before:
                raise PassError(
                    f"with {choice.share:.0%} of the weights in 8 bits, {found} on the calibration set; the budget "
                    f"leaves {1e3 * budget:.3g} meV/A for it",
                    hint="a wider budget, a smaller share, more probes, or more structures to calibrate on",
                )


@dataclass(frozen=True, eq=False)
class _Start:
    """A weight after AdaRound: all in the order of the layout's columns, [size]; gradients are [probes, size]."""

    candidate: Candidate
    x: Tensor
    scale: Tensor
    up: Tensor
    gradients: Tensor
    nearest: float
    saved: int

    def q(self, up: Tensor) -> Tensor:
        return below(self.x) + up

    def with_gradients(self, gradients: Tensor) -> _Start:
        """With more rows, [rows, *shape]."""
        more = _columns(self.candidate, gradients) * self.scale
        return replace(self, gradients=torch.cat([self.gradients, more]))


def _columns(candidate: Candidate, gradients: Tensor) -> Tensor:
    """Gradients [rows, *shape] in the order of the layout's columns, [rows, size]."""
    columns = torch.stack([candidate.layout.to_columns(row) for row in gradients])
    if not columns.isfinite().all():
        what = "forces, or their gradients by weights, are not finite on the calibration set"
        raise PassError(what, where=Location(node=candidate.name, module_path=candidate.module or None))
    return columns


def _values(rounded: Sequence[Rounded]) -> dict[str, Tensor]:
    return {r.candidate.name: r.value for r in rounded}


def _start(candidate: Candidate, tensor: Tensor, rows: Tensor, dtype: torch.dtype, steps: int) -> _Start:
    """Scales, representable in ``dtype``, and the rounding of each block for itself."""
    weight, gradients = candidate.layout.to_columns(tensor), _columns(candidate, rows)
    at, parts, channels = 0, [], 0
    for p, k, n in candidate.layout.blocks():
        block = weight[at : at + p * k * n].view(p, k, n)
        g = gradients[:, at : at + p * k * n].view(-1, p, k, n)
        squares = g.square().sum(0)
        scale = scales(block, squares.mean(2, keepdim=True)).to(dtype).float()
        importance = squares.sum(1, keepdim=True) * scale.square()
        hessian = torch.einsum("mpkn,mpjn->pkj", g, g)
        up = adaround(block / scale, hessian, importance, steps=steps)
        parts.append((scale.expand_as(block).reshape(-1), up.reshape(-1)))
        at, channels = at + p * k * n, channels + p * n
    scale, up = (torch.cat(columns) for columns in zip(*parts, strict=True))
    x = weight / scale
    nearest = (gradients @ ((x.round().clamp(-LEVELS, LEVELS) - x) * scale)).square().mean().sqrt().item()
    saved = weight.numel() * (dtype.itemsize - 1) - channels * dtype.itemsize
    return _Start(candidate, x, scale, up, gradients * scale, nearest, saved)


def _rounded(starts: Sequence[_Start], sweeps: int, seed: int) -> tuple[Rounded, ...]:
    """All the weights rounded together."""
    if not starts:
        return ()
    x, up = torch.cat([s.x for s in starts]), torch.cat([s.up for s in starts])
    gradients = torch.cat([s.gradients for s in starts], dim=1)
    ups = descend(x, up, gradients, sweeps=sweeps, seed=seed).split([s.x.numel() for s in starts])
    return tuple(Rounded(s.candidate, s.q(u), s.scale, s.nearest) for s, u in zip(starts, ups, strict=True))


def _left(r: Rounded) -> Refusal:
    cost = f"rounding it to the nearest alone costs {1e3 * r.nearest:.2g} meV/A"
    return Refusal("int8", f"the budget: {cost} for {r.q.numel()} weights", (r.candidate.name,), r.candidate.module)


def store(program: Program, rounded: Rounded, made_by: str) -> Application:
    """Put integers, scales and the op that multiplies them in the place of a weight."""
    name, layout, graph = rounded.candidate.name, rounded.candidate.layout, program.graph
    nodes = [n for n in graph.find_nodes(op="get_attr") if n.target == name]
    first = next(n for n in graph.nodes if n in nodes)
    dtype = attribute(program, first).dtype
    origin = replace(provenance(first), made_by=made_by)
    made: list[fx.Node] = []

    def made_here(node: fx.Node) -> fx.Node:
        set_provenance(node, origin)
        made.append(node)
        return node

    with graph.inserting_before(first):
        parts = []
        for q, scale in zip(layout.stored(rounded.q), layout.stored(rounded.scale), strict=True):
            integers = q.to(torch.int8).contiguous()
            each = scale[:, :, :1, :, :1].to(dtype).contiguous()
            operands = (
                made_here(graph.get_attr(add_constant(program, f"{name}_int8", integers))),
                made_here(graph.get_attr(add_constant(program, f"{name}_scale", each))),
            )
            values = made_here(graph.call_function(ops.dequantize, operands))
            shape = list(layout.shape) if len(layout.pieces) == 1 else [layout.rows, q[0].numel()]
            parts.append(made_here(graph.call_function(aten.view.default, (values, shape))))
        weight = parts[0]
        if len(parts) > 1:
            table = made_here(graph.call_function(aten.cat.default, (parts, 1)))
            weight = made_here(graph.call_function(aten.view.default, (table, list(layout.shape))))
    for node in nodes:
        node.replace_all_uses_with(weight)
        graph.erase_node(node)
    delattr(program.graph_module, name)
    return Application("int8", first.name, rounded.candidate.module, len(nodes), len(made))
