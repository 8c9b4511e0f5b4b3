"""Derivatives by positions of any output, and of the derivative by any input: dipoles, Born charges."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UnsupportedModelError, UsageError
from ..structures import Floats
from .model import Differentiable, direction_of, structure_of, to_numpy
from .motion import Motion
from .programs import Linear, jacobian, spec_of, transposed_jacobian

DIPOLES = ("dipole", "dipoles")
FIELDS = ("field", "electric_field")


class Jacobians(Differentiable):
    """Of other outputs than the energy, by other inputs than the edges."""

    def jvp(self, structure: Any, of: str, displacement: Any) -> Floats:
        """Derivative of an output along a displacement [atoms, 3]: of the output's shape and unit, per Angstrom.

        Args:
            of: name of an output, or of a floating input, for the derivative of the energy by it.

        Raises:
            UsageError: no such output; those that there are are listed.
        """
        structure = structure_of(structure)
        along = self._tensor(direction_of(displacement, structure))
        motion = self._motion(structure)
        (found,) = self._forward(of).prepared(motion.inputs, 0)(*motion.displaced(along))
        return to_numpy(self._cut(of, found, motion))

    def vjp(self, structure: Any, of: str, cotangent: Any) -> Floats:
        """Derivative by positions [atoms, 3] of sum(cotangent * output); see :meth:`jvp`, of which it is the transpose.

        Raises:
            UsageError: no such output, or the cotangent is not of its shape.
        """
        structure = structure_of(structure)
        motion = self._motion(structure)
        shape = self._shape(of, motion)
        weights = np.asarray(cotangent, dtype=np.float64)
        if weights.shape != shape:
            raise UsageError(f"the cotangent is {list(weights.shape)}, {of} is {list(shape)}")
        found = self._backward(of).prepared(motion.inputs, 0)(self._pad(of, self._tensor(weights), motion))
        return to_numpy(motion.by_atom(found))

    def jacobian(self, structure: Any, of: str) -> Floats:
        """Derivative of an output by positions, [*shape of the output, atoms, 3]; see :meth:`jvp`.

        By forward or by backward products, whichever are fewer.

        Raises:
            UsageError: no such output; those that there are are listed.
        """
        structure = structure_of(structure)
        motion = self._motion(structure)
        n, shape = 3 * motion.atoms, self._shape(of, motion)
        size = int(np.prod(shape))
        full = np.empty((size, n))
        if size <= n:
            backward = self._backward(of).prepared(motion.inputs, self.memory)
            for k in range(size):
                unit = torch.zeros(size, dtype=self.dtype)
                unit[k] = 1.0
                found = backward(self._pad(of, unit.view(shape), motion))
                full[k] = to_numpy(motion.by_atom(found)).reshape(-1)
        else:
            forward = self._forward(of).prepared(motion.inputs, self.memory)
            for k in range(n):
                unit = torch.zeros(n, dtype=self.dtype)
                unit[k] = 1.0
                (value,) = forward(*motion.displaced(unit.view(-1, 3)))
                full[:, k] = to_numpy(self._cut(of, value, motion)).reshape(-1)
        return full.reshape(*shape, motion.atoms, 3)

    def born_charges(self, structure: Any) -> Floats:
        """Z[a, i, k] = d(dipole k)/d(position i of atom a) [atoms, 3, 3], in the model's unit of charge.

        From an output that is a dipole, or from an input that is an electric field E: dipole = -d(energy)/dE.

        Raises:
            UnsupportedModelError: the model has neither.
        """
        structure = structure_of(structure)
        outputs = [spec.name for spec in self._program.without_gradient().outputs]
        inputs = [spec.name for spec in self._program.inputs]
        dipole = next((name for name in DIPOLES if name in outputs), None)
        field = next((name for name in FIELDS if name in inputs), None)
        name = dipole or field
        if name is None:
            raise UnsupportedModelError(
                f"the model has no dipole and no electric field, so no Born charges: its outputs are "
                f"{', '.join(outputs)}, its inputs {', '.join(inputs)}",
                hint=f"a model with an output {' or '.join(DIPOLES)}, or with an input {' or '.join(FIELDS)}",
            )
        found = self.jacobian(structure, name).reshape(-1, len(structure), 3).transpose(1, 2, 0)
        return found if dipole else -found

    def _forward(self, of: str) -> Linear:
        if ("jvp", of) not in self._made:
            self._made["jvp", of] = jacobian(self._program, of)
        return self._made["jvp", of]

    def _backward(self, of: str) -> Linear:
        if ("vjp", of) not in self._made:
            self._made["vjp", of] = transposed_jacobian(self._program, of)
        return self._made["vjp", of]

    def _shape(self, of: str, motion: Motion) -> tuple[int, ...]:
        sizes = {"atoms": motion.atoms, "edges": motion.index.shape[1], "graphs": 1}
        return tuple(d if isinstance(d, int) else sizes[d] for d in spec_of(self._program, of).dims)

    def _padding(self, of: str, motion: Motion) -> int:
        """Rows that the program has besides those of the structure: those of an atom that does not exist."""
        return motion.rows - motion.atoms if spec_of(self._program, of).dims[:1] in (("atoms",), ("graphs",)) else 0

    def _cut(self, of: str, value: Tensor, motion: Motion) -> Tensor:
        return value[: value.shape[0] - padding] if (padding := self._padding(of, motion)) else value

    def _pad(self, of: str, value: Tensor, motion: Motion) -> Tensor:
        padding = self._padding(of, motion)
        return torch.cat([value, value.new_zeros((padding, *value.shape[1:]))]) if padding else value
