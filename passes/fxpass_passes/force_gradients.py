"""Forces of an energy program as a function of its weights: used by ``quantize``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from fxpass.errors import UsageError
from fxpass.ir.program import Program

#: How much an error of the energy per atom counts, against the mean square error of a force component. A receipt
#: allows energies a tenth of what it allows the worst component, which is some three times its root mean square.
ENERGY_SHARE = 10.0


@dataclass(frozen=True)
class Errors:
    """Errors over samples: forces (eV/Angstrom; largest component, rms) and energy (eV/atom, largest)."""

    largest: float
    rms: float
    energy: float

    def within(self, budget: float) -> bool:
        """Whether a receipt with this budget (eV/Angstrom) allows them; a NaN is never within."""
        return self.largest <= budget and self.energy <= budget / 10

    def __str__(self) -> str:
        force, energy = f"{1e3 * self.largest:.3g} meV/A (rms {1e3 * self.rms:.3g})", f"{1e3 * self.energy:.3g}"
        return f"the largest force error is {force}, the largest energy error {energy} meV/atom"


def errors(deviations: Sequence[Tensor]) -> Errors:
    """The largest and the root mean square of ``Calibration.deviations``."""
    forces, energies = torch.cat([d[1:] for d in deviations]), torch.stack([d[0] for d in deviations])
    if not forces.numel():
        forces = forces.new_zeros(1)
    return Errors(forces.abs().max().item(), forces.square().mean().sqrt().item(), energies.abs().max().item())


def weighted(deviation: Tensor) -> Tensor:
    """A deviation [1 + components] whose squares add up to the mean square force error and the energy's share."""
    return torch.cat([ENERGY_SHARE**0.5 * deviation[:1], deviation[1:] / max(deviation.numel() - 1, 1) ** 0.5])


class Calibration:
    """An energy program on its samples, with weights that may be exchanged.

    Errors are measured in float64, because energies of single atoms may be so large that float32 hides them.
    Gradients are computed in float32, whatever the program computes in.

    Args:
        program: at stage "energy".
        names: the weights that are exchanged.
        limit: how many samples to take; they are spread evenly over those that there are.

    Raises:
        UsageError: the program has no samples.
    """

    def __init__(self, program: Program, names: tuple[str, ...], limit: int) -> None:
        if not program.samples:
            raise UsageError("the calibration set is empty", hint="structures like those the model will meet")
        count = min(limit, len(program.samples))
        taken = tuple(program.samples[k * len(program.samples) // count] for k in range(count))
        program = replace(program, samples=taken)
        self._narrow, self._wide = program.cast(torch.float32), program.cast(torch.float64)
        module = self._narrow.graph_module
        self.weights: Mapping[str, Tensor] = {name: getattr(module, name).detach() for name in names}
        self._exact = self._values({})

    def deviations(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """Error of each sample, [1 + components]: of the energy per atom (eV), and of all forces (eV/Angstrom)."""
        return [a - b for a, b in zip(self._values(weights), self._exact, strict=True)]

    def _values(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        wide = {name: weight.double() for name, weight in weights.items()}
        return [energy_and_forces(self._wide, sample, wide).detach() for sample in self._wide.samples]

    def directions(self, probes: int, seed: int) -> list[Tensor]:
        """Random signs, in all ``probes`` rows, for ``gradients``: [rows, 1 + components] for each sample."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self._exact)
        rows = [(k + 1) * probes // count - k * probes // count for k in range(count)]
        drawn = [torch.randint(2, (r, len(v)), generator=generator) for r, v in zip(rows, self._exact, strict=True)]
        return [2.0 * signs - 1.0 for signs in drawn]

    def gradients(self, directions: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Rows v^T J of the Jacobian J of energies and forces by the weights, name -> [rows, *shape].

        The rows v of ``directions`` multiply ``weighted`` energies and forces. For random signs the mean of g g^T
        over the rows g = J^T v estimates J^T J (Hutchinson), the Gauss-Newton Hessian of the mean square error. For
        v a weighted deviation of length 1, g times the change of weights that caused it is the error itself.
        """
        names = list(self.weights)
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for sample, wanted in zip(self._narrow.samples, directions, strict=True):
            if not len(wanted):
                continue
            weights = {name: tensor.clone().requires_grad_() for name, tensor in self.weights.items()}
            values = weighted(energy_and_forces(self._narrow, sample, weights))
            for left, v in zip(reversed(range(len(wanted))), wanted.to(values.dtype), strict=True):
                found = torch.autograd.grad(
                    v @ values,
                    list(weights.values()),
                    retain_graph=left > 0,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for name, gradient in zip(names, found, strict=True):
                    rows[name].append(gradient)
        return {name: torch.stack(gradients) for name, gradients in rows.items()}


def energy_and_forces(program: Program, sample: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Energy per atom (eV), then all force components (eV/Angstrom), [1 + 3 atoms], with ``weights`` in place.

    Differentiable by ``weights`` where one of them requires a gradient. With g_ij = dE/dr_ij, sender and receiver of
    an edge get the forces +g and -g; a program without edges between atoms gives g itself.
    """
    (vectors,) = program.with_property("edge_vector")
    inputs = {s.name: sample[s.name] for s in program.inputs}
    moved = inputs[vectors.name] = inputs[vectors.name].clone().requires_grad_()
    differentiable = any(weight.requires_grad for weight in weights.values())
    with torch.enable_grad():
        values = functional_call(program.graph_module, dict(weights), tuple(inputs.values()))
        energy = values[[s.name for s in program.outputs].index(program.energy)].sum()
        (gradient,) = torch.autograd.grad(energy, moved, create_graph=differentiable, materialize_grads=True)
        atoms = next((sample[s.name].shape[0] for s in program.inputs if s.dims[:1] == ("atoms",)), 1)
        pairs = next((s.name for s in program.inputs if s.dims == (2, "edges") and "index:atoms" in s.properties), None)
        if pairs is not None:
            sender, receiver = sample[pairs]
            zeros = gradient.new_zeros((atoms, 3))
            gradient = zeros.index_add(0, sender, gradient).index_add(0, receiver, -gradient)
        return torch.cat([energy.reshape(1) / atoms, gradient.flatten()])
