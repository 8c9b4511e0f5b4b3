"""differentiate: the energy program becomes the energy-and-force program."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fxpass.errors import Location, PassError
from fxpass.ir.program import Program, Stage, TensorSpec
from fxpass.ir.tracing import Replay, constants_of, trace_program
from fxpass.passes import Exactness, Outcome, Pass


@dataclass(frozen=True)
class Differentiate(Pass):
    """Append dE/d(edge vector) to the outputs, as graph; and the gradients by other inputs, where a frontend asks.

    Before / After:

        energy = f(edge_vectors, ...)       energy = f(edge_vectors, ...)
                                            edge_gradient = transposed f applied to 1, in ops of the same set

    The gradient [edges, 3] (eV/Angstrom) is all that forces, virials, per-atom virials and per-edge forces
    need: with r_ij = r_j - r_i + shift, F_i = sum_j g_ij - sum_j g_ji and the virial is sum r_ij (x) g_ij.

    Inputs with the property "differentiated", such as positions x and cells c of a force field with bonds or a
    reciprocal sum, get gradients p and q before it (``positions_gradient``, ``cell_gradient``): then p_i is
    subtracted from F_i, and sum x_i (x) p_i + sum c_k (x) q_k is added to dE/d(strain).

    Holds when: every op on the way from these inputs to the energy has a derivative, and the energies
    of different graphs do not mix, so that the sum over graphs may be differentiated at once.

    Keeps: the energy outputs, bit for bit; every forward node's provenance, which its backward nodes get.
    """

    name: ClassVar[str] = "differentiate"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    stages: ClassVar[tuple[Stage, ...]] = ("energy",)

    def apply(self, program: Program) -> Outcome:
        by = program.differentiated
        at = [program.inputs.index(spec) for spec in by]
        energy = [s.name for s in program.outputs].index(program.energy)
        gradients = tuple(replace(s, name=_name(s), unit="eV/Angstrom", properties=frozenset()) for s in by)

        def body(*inputs: torch.Tensor) -> list[Any]:
            values = Replay(program, made_by=self.name, differentiates=True).run(*inputs)
            moved = [inputs[k] for k in at]
            found = torch.autograd.grad(values[energy].sum(), moved, materialize_grads=len(by) > 1)
            return [*(v.detach() for v in values), *found]

        try:
            derived, frozen = trace_program(
                body,
                program.inputs,
                (*program.outputs, *gradients),
                constants_of(program),
                stage="forces",
                energy=program.energy,
                differentiable=[spec.name for spec in by],
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


def _name(spec: TensorSpec) -> str:
    """What the gradient by an input is called."""
    return "edge_gradient" if "edge_vector" in spec.properties else f"{spec.name}_gradient"
