"""differentiate: the energy program becomes the energy-and-force program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxpass.errors import Location, PassError
from fxpass.ir.program import Program, Stage, TensorSpec
from fxpass.ir.tracing import Replay, constants_of, trace_program
from fxpass.passes import Exactness, Outcome, Pass


@dataclass(frozen=True)
class Differentiate(Pass):
    """Append dE/d(edge vector) to the outputs, as graph.

    Before / After:

        energy = f(edge_vectors, ...)       energy = f(edge_vectors, ...)
                                            edge_gradient = transposed f applied to 1, in ops of the same set

    The gradient [edges, 3] (eV/Angstrom) is all that forces, virials, per-atom virials and per-edge forces
    need: with r_ij = r_j - r_i + shift, F_i = sum_j g_ij - sum_j g_ji and the virial is sum r_ij (x) g_ij.

    Holds when: every op on the way from the edge vectors to the energy has a derivative, and the energies
    of different graphs do not mix, so that the sum over graphs may be differentiated at once.

    Keeps: the energy outputs, bit for bit; every forward node's provenance, which its backward nodes get.
    """

    name: ClassVar[str] = "differentiate"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    stages: ClassVar[tuple[Stage, ...]] = ("energy",)

    def apply(self, program: Program) -> Outcome:
        (vectors,) = program.with_property("edge_vector")
        at = [s.name for s in program.inputs].index(vectors.name)
        energy = [s.name for s in program.outputs].index(program.energy)
        gradient = TensorSpec("edge_gradient", vectors.dims, vectors.dtype, vectors.irreps, "eV/Angstrom")

        def body(*inputs: torch.Tensor) -> list[Any]:
            values = Replay(program, made_by=self.name, differentiates=True).run(*inputs)
            (g,) = torch.autograd.grad(values[energy].sum(), inputs[at])
            return [*(v.detach() for v in values), g]

        try:
            derived, frozen = trace_program(
                body,
                program.inputs,
                (*program.outputs, gradient),
                constants_of(program),
                stage="forces",
                energy=program.energy,
                differentiable=vectors.name,
            )
        except RuntimeError as error:
            raise PassError(
                f"the energy cannot be differentiated: {str(error).splitlines()[0]}",
                where=Location(pass_name=self.name),
                hint="register a derivative for the op named above with torch.library.register_autograd",
            ) from error
        if frozen:
            raise PassError(f"differentiation tied a size to a value: {'; '.join(frozen)}")
        return Outcome(derived.following(program), modified=True)
