"""What errors of tables do to forces: estimated from sensitivities, and measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxpass.ir.program import Program
from fxpass.ir.scalar_functions import ScalarFunction, execute, synthetic_inputs
from fxpass.ir.tabulation import Fit

MOST_SAMPLES = 4
RANDOM_EDGES = 60
CURVATURE = 10.0  # 1/Angstrom: relative change of dE/d(table) as atoms move, which turns value errors into forces
DEVIATIONS = 3.0


def lengths_of(program: Program) -> Tensor | None:
    """Lengths of all edges in the samples, Angstrom, float64; None without samples."""
    (vectors,) = program.with_property("edge_vector")
    found = [sample[vectors.name].double().norm(dim=1) for sample in program.samples if len(sample[vectors.name])]
    return torch.cat(found) if found else None


def samples_of(program: Program, shortest: float, longest: float) -> list[list[Tensor]]:
    """Inputs of some samples in float64; random edges between one atom of each species where there are none."""
    twin = program.cast(torch.float64)
    step = max(1, -(-len(twin.samples) // MOST_SAMPLES))
    given = [[sample[spec.name] for spec in twin.inputs] for sample in twin.samples[::step]]
    (vectors,) = program.with_property("edge_vector")
    at = [spec.name for spec in program.inputs].index(vectors.name)
    given = [inputs for inputs in given if len(inputs[at])]
    return given or [_random(twin, shortest, longest, seed) for seed in range(2)]


def _random(program: Program, shortest: float, longest: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hot = program.with_property("one_hot")
    species = int(hot[0].dims[1]) if hot else 2
    directions = torch.randn(RANDOM_EDGES, 3, dtype=torch.float64, generator=generator)
    low = max(shortest, 0.4 * longest)
    lengths = low + (longest - low) * torch.rand(RANDOM_EDGES, 1, dtype=torch.float64, generator=generator)
    ends = torch.randint(0, species, (2, RANDOM_EDGES), generator=generator)
    return synthetic_inputs(program, directions / directions.norm(dim=1, keepdim=True) * lengths, ends[0], ends[1])


class Probe:
    """Samples on which errors of tables become errors of forces.

    Args:
        program: the exact one.
        functions: those that may become tables.
        samples: inputs in float64.
    """

    def __init__(self, program: Program, functions: tuple[ScalarFunction, ...], samples: list[list[Tensor]]) -> None:
        self.samples = samples
        self.exact = functions[0].program
        names = [spec.name for spec in program.inputs]
        self.vectors = names.index(program.with_property("edge_vector")[0].name)
        self.edges = next(k for k, s in enumerate(program.inputs) if s.dims == (2, "edges"))
        lengths = torch.cat([inputs[self.vectors].norm(dim=1) for inputs in samples])
        self.shortest = float(lengths.min())
        self.forces = [self._forces(self.exact, inputs) for inputs in samples]
        self.weights = self._weights(functions)
        self.stretch = {function: _stretch(function, lengths) for function in functions}

    def estimate(self, function: ScalarFunction, found: Fit) -> float:
        """Force error in eV/Angstrom, to first order, if errors are as large as the certified bounds everywhere.

        Those of different edges and channels are taken to be independent; three standard deviations.
        """
        bounds = torch.from_numpy(self.stretch[function] * found.slope_bounds + CURVATURE * found.value_bounds)
        return DEVIATIONS * float((self.weights[function] @ bounds.square()).max().sqrt())

    def force_error(self, program: Program) -> float:
        """Largest change of a force component on the samples, eV/Angstrom, in float64."""
        twin = program.cast(torch.float64)
        pairs = zip(self.samples, self.forces, strict=True)
        errors = [float((self._forces(twin, inputs) - forces).abs().max()) for inputs, forces in pairs]
        return max(errors) if all(error == error for error in errors) else float("inf")

    def _forces(self, program: Program, inputs: list[Tensor]) -> Tensor:
        vectors = list(program.placeholders.values())[self.vectors]
        energy = program.results[program.energy]
        with torch.enable_grad():
            values = execute(program, inputs, [energy], leaves=[vectors])
            (gradient,) = torch.autograd.grad(values[energy].sum(), values[vectors], allow_unused=True)
        gradient = torch.zeros_like(inputs[self.vectors]) if gradient is None else gradient
        sender, receiver = inputs[self.edges]
        atoms = 1 + int(inputs[self.edges].max())
        return gradient.new_zeros(atoms, 3).index_add(0, sender, gradient).index_add(0, receiver, -gradient)

    def _weights(self, functions: tuple[ScalarFunction, ...]) -> Mapping[ScalarFunction, Tensor]:
        """For each function sums over the edges of an atom of (dE/d value)^2, [atoms of all samples, channels]."""
        rows: dict[ScalarFunction, list[Tensor]] = {function: [] for function in functions}
        energy, leaves = self.exact.results[self.exact.energy], [function.node for function in functions]
        for inputs in self.samples:
            with torch.enable_grad():
                values = execute(self.exact, inputs, [energy], leaves=leaves)
                total = values[energy].sum()
                found = torch.autograd.grad(total, [values[leaf] for leaf in leaves], allow_unused=True)
            atoms = 1 + int(inputs[self.edges].max())
            for function, gradient in zip(functions, found, strict=True):
                each = torch.zeros_like(values[function.node]) if gradient is None else gradient
                squares = each.flatten(1).square() if each.dim() > 1 else each.unsqueeze(1).square()
                both = squares.new_zeros(atoms, squares.shape[1])
                for end in inputs[self.edges]:
                    both = both.index_add(0, end, squares)
                rows[function].append(both)
        return {function: torch.cat(parts) for function, parts in rows.items()}


def _stretch(function: ScalarFunction, lengths: Tensor) -> float:
    """Largest |dx/dr| at the lengths that occur."""
    with torch.no_grad():
        ends = [function.of_length(lengths + h)[: len(lengths)] for h in (-1e-4, 1e-4)]
    return float((ends[1] - ends[0]).abs().max() / 2e-4)
