"""The pass ``pin-precision``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fxpass.errors import UsageError
from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program, Stage
from fxpass.ir.verifier import verify
from fxpass.passes import Application, Exactness, Outcome, Pass, Refusal
from fxpass.verify.tolerances import parse_budget

from .lower_precision import Lowering
from .precision_choice import Choice
from .precision_regions import find_regions, is_float
from .sensitivity import Sensitivity

COMPUTE = (torch.float16, torch.bfloat16, torch.float32)
PINNED = (torch.float32, torch.float64)


@dataclass(frozen=True)
class PinPrecision(Pass):
    """Computes in a low type what may be, and keeps in a wide one what the physics needs.

    Before / After::

        h = mm(x, w)                    h = linear(x, w_float16)            equivariant
        y = silu(mm(x, w))              c = _to_copy(x, float16)            not equivariant
                                        y = _to_copy(silu(mm(c, w_float16)), float32)

    Always pinned: edge vectors, norms, directions and radial functions; spherical harmonics; the first tensor
    product on edges; sums over edges and atoms; energies per atom and what is added to them. The derivative is taken
    of the result, so that forces are the gradient of the energy that is computed.

    Equivariant: products with constant matrices (linear maps, layers of a radial net, symmetric contractions) store the
    matrix in the low type and multiply low numbers, adding up in the pinned type. The other operand is taken apart
    into a sum of low words (see ``fxpass.ir.reference.product``), scaled by powers of two so that nothing overflows.
    No feature is ever rounded to the low type, so a rotation moves the result by no more than before; rounded
    activations turn the last bit of a float32 into the last bit of a float16. Matrices that couple components
    (coefficients of polynomials) are stored as two words.
    Otherwise: all that is not pinned is of the low type, with one cast of a value to each type where it changes over.
    Semantic ops add up in float32 and round once. Float16 saturates at 65504 in casts and arithmetic; a region whose
    values or gradients come within a factor 8 of that on the samples is pinned.

    Holds when: compute is narrower than pinned and the program is at stage "energy". With a budget there must be
    samples: regions are ranked by the force error that each causes alone over the FLOPs that it makes low, and
    the worst are pinned until the largest error of any force component on the samples is below a quarter of the budget.

    Keeps: interface and dtypes of inputs and outputs; values within the rounding of the low type, or the budget; no
    gradient with respect to stored constants.

    Attributes:
        compute: float16, bfloat16 or float32.
        pinned: float32 or float64.
        budget: largest error of a force component, eV/Angstrom or a text such as ``"1 meV/A"``; without one nothing
            more is pinned.
        equivariant: whether features keep the pinned type; by default for 16-bit types.
    """

    name: ClassVar[str] = "pin-precision"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    stages: ClassVar[tuple[Stage, ...]] = ("energy",)
    calibrated: ClassVar[bool] = True

    compute: torch.dtype = torch.bfloat16
    pinned: torch.dtype = torch.float32
    budget: str | float | None = None
    equivariant: bool | None = None

    def __post_init__(self) -> None:
        for name, dtype, known in (("compute", self.compute, COMPUTE), ("pinned", self.pinned, PINNED)):
            if dtype not in known:
                names = ", ".join(str(d).removeprefix("torch.") for d in known)
                raise UsageError(f"{name}={dtype} is no type that pin-precision computes in", hint=f"one of {names}")
        if self.compute.itemsize >= self.pinned.itemsize:
            raise UsageError(f"compute={self.compute} is not narrower than pinned={self.pinned}")
        if self.budget is not None:
            parse_budget(self.budget)

    @property
    def keeps_features(self) -> bool:
        """Whether features keep the pinned type."""
        return self.compute.itemsize == 2 if self.equivariant is None else self.equivariant

    def apply(self, program: Program) -> Outcome:
        made = tuple(n.name for n in program.graph.nodes if provenance(n).made_by == self.name)
        if made:
            return Outcome(program, False, refusals=(Refusal("low-region", "the program went through it", made),))
        size = len(program.graph.nodes)
        choice = self.choice(program)
        wide = choice.program
        result = self._lowered(wide, choice.low)
        modules = {node.name: provenance(node).module for node in wide.graph.nodes}
        applications = tuple(
            Application("low-region", r.nodes[0], modules[r.nodes[0]], len(r.nodes), len(r.nodes))
            for r in choice.found.regions
            if r.name in choice.low
        )
        modified = bool(applications) or len(wide.graph.nodes) != size
        return Outcome(result if modified else program, modified, applications, choice.refusals())

    def choice(self, program: Program) -> Choice:
        """The regions of ``program``, a private copy, and which of them are low.

        Raises:
            UsageError: samples are needed, and there are none.
            VerificationError: the budget cannot be met, or forces are not finite.
        """
        if any(is_float(n) and n.meta["val"].dtype != self.pinned for n in program.placeholders.values()):
            Lowering(program, self.compute, self.pinned, self.name).types_of(())
            program.graph_module.recompile()
            verify(program)
        choice = Choice(program, self._lowered, self.compute, equivariant=self.keeps_features)
        if self.budget is not None:
            choice.within(parse_budget(self.budget))
        return choice

    def sensitivity(self, program: Program) -> tuple[Sensitivity, ...]:
        """Every region alone in the low type, by force error over FLOPs made low, worst first.

        Raises:
            UsageError: ``program`` has no samples.
        """
        choice = self.choice(program.copy())
        words = {0: "pinned", 1: "low", 2: "two words"}
        return tuple(replace(row, precision=words[choice.low.get(row.region, 0)]) for row in choice.ranking)

    def _lowered(self, program: Program, low: Mapping[str, int]) -> Program:
        """A copy of ``program`` with regions in the low type: name -> words of their constant matrices."""
        found = find_regions(program, self.compute, equivariant=self.keeps_features)
        words = {name: low[region.name] for region in found.regions if region.name in low for name in region.nodes}
        result = program.copy()
        nodes = {node: words[node.name] for node in result.graph.nodes if node.name in words}
        lowering = Lowering(result, self.compute, self.pinned, self.name)
        if self.keeps_features:
            lowering.products(nodes)
        else:
            lowering.types_of(nodes)
        result.graph.eliminate_dead_code()
        result.graph_module.recompile()
        return result
