"""What low precision does to forces, region by region: used by ``pin-precision``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxpass.errors import UsageError
from fxpass.ir.program import Program

Sample = Mapping[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """How far a program is from the same in float64, over samples.

    Attributes:
        largest: of any force component, eV/Angstrom.
        rms: over all force components, eV/Angstrom.
        energy: of any energy, eV/atom.
    """

    largest: float
    rms: float
    energy: float

    @property
    def budget(self) -> float:
        """The budget it takes, eV/Angstrom; receipts allow an energy per atom a tenth of that, times 1 Angstrom."""
        return max(self.largest, 10 * self.energy)


@dataclass(frozen=True)
class Sensitivity:
    """One region, alone in the low type.

    Attributes:
        region: its name.
        errors: against the program in float64.
        flops: that are low.
        bytes: that are saved.
        precision: what the pass chooses: ``"low"``, ``"two words"`` (low products, each matrix a sum of two) or
            ``"pinned"``.
    """

    region: str
    errors: Errors
    flops: float
    bytes: float
    precision: str = "low"

    @property
    def per_gflop(self) -> float:
        """Budget (eV/Angstrom) taken for each 10^9 FLOPs made low."""
        return _over(self.errors.budget, self.flops / 1e9)

    @property
    def per_megabyte(self) -> float:
        """Budget (eV/Angstrom) taken for each 10^6 bytes saved."""
        return _over(self.errors.budget, self.bytes / 1e6)


def _over(error: float, saved: float) -> float:
    return error / saved if saved > 0 else math.inf if error > 0 else 0.0


@dataclass(frozen=True)
class Evaluated:
    """Energies [graphs], eV, and forces [atoms, 3], eV/Angstrom, in float64."""

    energy: Tensor
    forces: Tensor


def evaluate(program: Program, sample: Sample, run: Callable[..., Sequence[Tensor]] | None = None) -> Evaluated:
    """Energies and forces, by autograd through an energy program in its own types.

    With g_ij = dE/dr_ij, those of sender and receiver are +g and -g: what a family's interface does.
    """
    (vectors,) = program.with_property("edge_vector")
    inputs = [_typed(sample[s.name], s.dtype) for s in program.inputs]
    at = [s.name for s in program.inputs].index(vectors.name)
    inputs[at] = inputs[at].clone().requires_grad_()
    with torch.enable_grad():
        values = (run or program.graph_module)(*inputs)
        energy = values[[s.name for s in program.outputs].index(program.energy)]
        (gradient,) = torch.autograd.grad(energy.sum(), inputs[at])
    gradient = gradient.detach().double()
    index = next((s for s in program.inputs if s.dims == (2, "edges") and "index:atoms" in s.properties), None)
    if index is None:  # a program without atoms to add up for: the gradients themselves
        return Evaluated(energy.detach().double(), gradient)
    sender, receiver = sample[index.name]
    atoms = next(sample[s.name].shape[0] for s in program.inputs if s.dims[:1] == ("atoms",))
    zeros = gradient.new_zeros((atoms, 3))
    total = zeros.index_add(0, sender, gradient).index_add(0, receiver, gradient, alpha=-1)
    return Evaluated(energy.detach().double(), total)


def _typed(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


class Reference:
    """The program in float64 on some samples, to measure others against.

    Raises:
        UsageError: there are no samples.
    """

    def __init__(self, program: Program, limit: int) -> None:
        if not program.samples:
            raise UsageError("the calibration set is empty", hint="structures like those the model will meet")
        step = max(1, len(program.samples) // limit)
        self.samples = program.samples[::step]
        wide = program.cast(torch.float64)
        self.values = [evaluate(wide, sample) for sample in self.samples]

    def errors(self, program: Program) -> Errors:
        """How far ``program`` is off; infinite where it is not finite."""
        forces, energies = [torch.zeros(1, dtype=torch.float64)], [0.0]
        for sample, expected in zip(self.samples, self.values, strict=True):
            found = evaluate(program, sample)
            forces.append((found.forces - expected.forces).flatten())
            atoms = max(len(found.forces) / max(len(found.energy), 1), 1.0)
            energies += ((found.energy - expected.energy) / atoms).nan_to_num(torch.inf).abs().tolist()
        off = torch.cat(forces[1:] or forces).nan_to_num(torch.inf)
        if not off.numel():
            off = forces[0]
        return Errors(off.abs().max().item(), off.square().mean().sqrt().item(), max(energies))


class Ranges(fx.Interpreter):
    """Largest absolute value and gradient of every floating node, over the runs that are made with it."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.values: dict[str, float] = {}
        self.gradients: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            self._note(self.values, n, value)
            if value.requires_grad:
                value.register_hook(lambda gradient: self._note(self.gradients, n, gradient))
        return value

    def _note(self, into: dict[str, float], node: fx.Node, value: Tensor) -> None:
        if value.numel():
            into[node.name] = max(into.get(node.name, 0.0), value.detach().abs().max().item())


def ranges(program: Program, samples: Collection[Sample]) -> Ranges:
    """The ranges of values and gradients on ``samples``."""
    found = Ranges(program)
    for sample in samples:
        evaluate(program, sample, found.run)
    return found
