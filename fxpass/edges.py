"""Edges as a program wants them: in one order, within the cutoff, none of them padding.

Family-neutral and in plain torch that also scripts.  The interface of a family puts :class:`Edges` between
what a host gives and what a program takes, and between the gradient that comes back and what the host sees.
What is done is decided by the assumptions of the program (``Program.assumptions``).

An edge is padding where one of its indices is negative, where it runs from an atom to that same atom with a
vector of length zero, or where it is as long as the cutoff or longer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: edges come sorted by receiver, then sender, then vector
SORTED = "edges sorted by receiver"
#: there are no edges but those within the cutoff
WITHIN = "edges within the cutoff"
#: edges beyond the cutoff belong to an atom and a graph of their own
MASKED = "edges beyond the cutoff masked"
#: ``edge lengths >= 0.3 A``
SHORTEST = re.compile(r"edge lengths >= (\S+) A")


class Edges(nn.Module):
    """Makes the assumptions of a program about its edges true, or refuses the edges.

    Args:
        cutoff: of the model, Angstrom.
        assumptions: of the program; those that say nothing of edges are left to others.
    """

    def __init__(self, cutoff: float, assumptions: Sequence[str] = ()) -> None:
        super().__init__()
        bounds = [float(found[1]) for text in assumptions if (found := SHORTEST.fullmatch(text))]
        self.cutoff: float = float(cutoff)
        self.sort: bool = SORTED in assumptions
        self.drop: bool = WITHIN in assumptions
        self.mask: bool = MASKED in assumptions and not self.drop
        self.shortest: float = max(bounds, default=0.0)

    def readable(self, index: Tensor) -> Tensor:
        """An edge index [2, edges] that atoms can be looked up with; padding reads atom 0."""
        return index.clamp(min=0) if self.drop or self.mask else index

    def forward(self, vectors: Tensor, index: Tensor, atoms: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the program takes.

        Args:
            vectors: [edges, 3], Angstrom, as looked up with ``readable(index)``.
            index: [2, edges] (sender, receiver), as the host gave it.
            atoms: number of atoms.

        Returns:
            Vectors and index, and the host's edges in the program's order, None where that is the host's own.
            Masked edges are those of the atom ``atoms``, which the host does not have (``with_dummy`` adds it).

        Raises:
            RuntimeError: an edge is shorter than the program was made for.
        """
        order: Tensor | None = None
        if self.drop or self.mask or self.shortest > 0:
            lengths = torch.linalg.vector_norm(vectors.detach(), dim=1)
            if not self._unremarkable(lengths, index):
                # NaN is no padding: it must come out as NaN
                padding = (lengths >= self.cutoff) | (index < 0).any(0) | ((index[0] == index[1]) & (lengths == 0))
                if self.shortest > 0:
                    self._refuse_short(lengths, padding)
                if self.drop and bool(padding.any()):
                    order = torch.logical_not(padding).nonzero().flatten()
                    vectors, index = vectors.index_select(0, order), index.index_select(1, order)
                if self.mask:
                    far = torch.full_like(vectors[:1], 2 * self.cutoff)
                    vectors = torch.where(padding.unsqueeze(1), far, vectors)
                    index = torch.where(padding.unsqueeze(0), torch.full_like(index[:, :1], atoms), index)
        if self.sort and not in_order(index, atoms):
            sorting = canonical_order(vectors.detach(), index, atoms)
            vectors, index = vectors.index_select(0, sorting), index.index_select(1, sorting)
            order = sorting if order is None else order.index_select(0, sorting)
        return vectors, index, order

    def vectors(self, positions: Tensor, index: Tensor, shifts: Tensor) -> Tensor:
        """Edge vectors [edges, 3]: from the sender's position to the receiver's, plus the shift of its image."""
        return positions.index_select(0, index[1]) - positions.index_select(0, index[0]) + shifts

    def forces(self, gradient: Tensor, index: Tensor, like: Tensor) -> Tensor:
        """Forces [atoms, 3] from g = dE/d(edge vector) [edges, 3]: g over edges sent minus g over edges received.

        Negated first: a factor in ``index_add`` takes torch's slow path, ten times slower on the CPU.
        """
        return torch.zeros_like(like).index_add(0, index[0], gradient).index_add(0, index[1], -gradient)

    def virial(self, gradient: Tensor, vectors: Tensor) -> Tensor:
        """-sum of g (x) r over edges, [3, 3] in eV, from g = dE/d(edge vector) and r, both [edges, 3]."""
        return -torch.matmul(gradient.t(), vectors)

    def _unremarkable(self, lengths: Tensor, index: Tensor) -> bool:
        """Whether it is plain that no edge is padding, too short or NaN: what nearly every call finds."""
        if lengths.numel() == 0:
            return True
        low, high = torch.aminmax(lengths)  # NaN if any length is, and then no comparison holds
        shortest = float(low)
        return shortest > 0 and shortest >= self.shortest and bool(high < self.cutoff) and int(index.min()) >= 0

    def _refuse_short(self, lengths: Tensor, padding: Tensor) -> None:
        real = lengths[torch.logical_not(padding)]
        if real.numel() > 0:
            shortest = float(real.min())
            if shortest < self.shortest:
                raise RuntimeError(
                    f"fxpass: an edge of {shortest} Angstrom is shorter than the {self.shortest} Angstrom for which "
                    "this model was compiled; optimise it for shorter edges, or use the original"
                )

    def with_dummy(self, attrs: Tensor, batch: Tensor, per_graph: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One-hot attributes [atoms, species], graph of each atom [atoms] and one more input [graphs, ...].

        Where edges are masked, with one more atom, of the first species, in one more graph, whose inputs are zero.
        """
        if not self.mask:
            return attrs, batch, per_graph
        first = torch.zeros_like(attrs.sum(0, keepdim=True))
        first[:, :1] = 1.0
        graph = torch.full([1], per_graph.size(0), dtype=batch.dtype, device=batch.device)
        zero = torch.zeros_like(per_graph.sum(0, keepdim=True))
        return torch.cat([attrs, first]), torch.cat([batch, graph]), torch.cat([per_graph, zero])

    def without_dummy(self, values: list[Tensor]) -> list[Tensor]:
        """Results with a row for each atom or each graph, without the row that ``with_dummy`` added."""
        return [value.narrow(0, 0, value.size(0) - 1) for value in values] if self.mask else values

    def settled(self, gradient: Tensor, index: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
        """dE/d(edge vector) [edges, 3] and index with which sums over edges are right: masked edges give zero."""
        if not self.mask:
            return gradient, index
        masked = index == atoms
        zero = torch.zeros_like(gradient[:1])
        return torch.where(masked[:1].t(), zero, gradient), index.masked_fill(masked, 0)

    def restored(self, values: Tensor, order: Tensor | None, edges: int) -> Tensor:
        """Values of the program's edges, [*, n], as values of the host's edges, [edges, n]; zero for dropped ones."""
        if order is None:
            return values
        full = torch.zeros([edges, values.size(1)], dtype=values.dtype, device=values.device)
        return full.index_copy(0, order, values)


def in_order(index: Tensor, atoms: int) -> bool:
    """Whether edges are sorted by receiver, then sender, and no two atoms share more than one edge."""
    key = index[1] * (atoms + 1) + index[0]
    return bool((key[1:] > key[:-1]).all())


def canonical_order(vectors: Tensor, index: Tensor, atoms: int) -> Tensor:
    """The permutation [edges] that sorts edges by receiver, sender, and x, y, z of the vector.

    Edges that agree in all of these are the same edge, so any permutation of a list comes out as one list.
    """
    key = index[1] * (atoms + 1) + index[0]
    ordered, order = torch.sort(key, stable=True)
    repeated = (ordered[1:] == ordered[:-1]) & (ordered[1:] < atoms * (atoms + 1))  # masked edges are all alike
    if bool(repeated.any()):  # images of one atom, in cells narrower than twice the cutoff
        order = torch.argsort(vectors[:, 2], stable=True)
        for axis in [1, 0]:
            order = order.index_select(0, torch.argsort(vectors[:, axis].index_select(0, order), stable=True))
        order = order.index_select(0, torch.argsort(key.index_select(0, order), stable=True))
    return order


def reversed_edges(vectors: Tensor, index: Tensor, atoms: int) -> Tensor:
    """For each edge (i, j, r) the position [edges] of the edge (j, i, -r) in the same list.

    With it a sum over edges sent is a sum over edges received: where edges are sorted by receiver, forces are
    ``segment_sum(g[reversed] - g)``, without atomic additions.

    Raises:
        RuntimeError: the list is not a full one; some edge has no reverse.
    """
    order = canonical_order(vectors, index, atoms)
    mirrored = canonical_order(-vectors, index.flip(0), atoms)
    reverse = torch.empty_like(order).index_copy(0, order, mirrored)
    same = (index.index_select(1, reverse) == index.flip(0)).all(0)
    same = same & (vectors.index_select(0, reverse) == -vectors).all(1)
    if not bool(same.all()):
        edge = int(torch.logical_not(same).nonzero()[0, 0])
        raise RuntimeError(
            f"fxpass: edge {edge}, from atom {int(index[0, edge])} to atom {int(index[1, edge])}, has no reverse"
        )
    return reverse
