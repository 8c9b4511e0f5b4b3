"""How displacements and strains move the inputs of a program, and what gradients by these inputs mean for them.

All inputs that an energy is differentiated by (edge vectors; positions and cells, where a function takes them) are
linear in displacements, and in the strain: derivatives of any order are those of the program with these maps around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..ir.program import Program


@dataclass(frozen=True)
class Motion:
    """One structure, as the program sees it.

    Attributes:
        inputs: of the program, in order.
        kinds: for each input that is differentiated: ``"edges"``, ``"atoms"`` or ``"cell"``.
        moved: these inputs: [edges, 3], [atoms, 3], [graphs, 3, 3], Angstrom.
        index: sender and receiver of each edge [2, edges].
        atoms: of the structure.
        rows: atoms in the program: one more where padding goes to an atom that does not exist.
    """

    inputs: tuple[Tensor, ...]
    kinds: tuple[str, ...]
    moved: tuple[Tensor, ...]
    index: Tensor
    atoms: int
    rows: int

    @classmethod
    def of(cls, program: Program, sample: dict[str, Tensor], atoms: int) -> Motion:
        """What the program is given for a structure of so many atoms.

        Raises:
            UnsupportedModelError: an input that is differentiated does not follow atoms or cell.
        """
        spec = next(s for s in program.inputs if s.dims == (2, "edges"))
        rows = next(sample[s.name].shape[0] for s in program.inputs if s.dims[:1] == ("atoms",))
        kinds = []
        for by in program.differentiated:
            kind = {("edges", 3): "edges", ("atoms", 3): "atoms", ("graphs", 3, 3): "cell"}.get(by.dims)
            if kind is None:
                raise UnsupportedModelError(f"it is unknown how the input {by.name}, {list(by.dims)}, moves with atoms")
            kinds.append(kind)
        inputs = tuple(sample[s.name] for s in program.inputs)
        moved = tuple(sample[s.name] for s in program.differentiated)
        return cls(inputs, tuple(kinds), moved, sample[spec.name], atoms, rows)

    def displaced(self, displacement: Tensor) -> list[Tensor]:
        """Directions of the inputs for displacements [atoms, 3]."""
        u = self._padded(displacement)
        ends = u.index_select(0, self.index[1]) - u.index_select(0, self.index[0])
        moves = {"edges": ends, "atoms": u}
        return [moves[k] if k in moves else torch.zeros_like(x) for k, x in zip(self.kinds, self.moved, strict=True)]

    def strained(self, strain: Tensor) -> list[Tensor]:
        """Directions of the inputs for a symmetric strain [3, 3]: every vector v becomes v + v strain."""
        return [self._real(kind, x @ strain) for kind, x in zip(self.kinds, self.moved, strict=True)]

    def by_atom(self, gradients: Sequence[Tensor]) -> Tensor:
        """Derivative by positions [atoms, 3] of gradients by the inputs."""
        total = self.moved[-1].new_zeros((self.rows, 3))
        for kind, g in zip(self.kinds, gradients, strict=True):
            if kind == "edges":
                total = total.index_add(0, self.index[1], g).index_add(0, self.index[0], -g)
            elif kind == "atoms":
                total = total + g
        return total[: self.atoms]

    def by_strain(self, gradients: Sequence[Tensor]) -> Tensor:
        """Derivative by a symmetric strain [3, 3] of gradients by the inputs."""
        total = self.moved[-1].new_zeros((3, 3))
        for kind, x, g in zip(self.kinds, self.moved, gradients, strict=True):
            total = total + torch.mm(x.reshape(-1, 3).t(), self._real(kind, g).reshape(-1, 3))
        return 0.5 * (total + total.t())

    def _padded(self, values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros((self.rows - self.atoms, 3))])

    def _real(self, kind: str, values: Tensor) -> Tensor:
        """Zero for padding, which has vectors of its own."""
        if self.rows == self.atoms or kind == "cell":
            return values
        padding = self.index[0] >= self.atoms if kind == "edges" else torch.arange(self.rows) >= self.atoms
        return values.masked_fill(padding.unsqueeze(1), 0.0)
