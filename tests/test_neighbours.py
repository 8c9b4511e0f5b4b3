"""Pairs within a cutoff, by torch and by the kernel, are those of the reference list."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxpass.kernels.build import build, find_compiler
from fxpass.kernels.neighbours import BoundNeighbours, NeighboursKernel
from fxpass.neighbours import Pairs, pairs_within
from fxpass.structures import Structure, neighbour_list

CUTOFF = 3.5
CELLS: dict[str, Any] = {
    "isolated": None,
    "cubic": 9.0 * np.eye(3),
    "narrower than the cutoff": np.diag([2.1, 9.0, 3.0]),
    "oblique": np.array([[8.0, 0.0, 0.0], [3.0, 7.0, 0.0], [-2.0, 5.0, 6.0]]),
    "left-handed": np.array([[0.0, 8.0, 0.0], [7.0, 1.0, 0.0], [0.0, 0.0, 6.0]]),
}


def bound() -> BoundNeighbours:
    kernel, compiler = NeighboursKernel(), find_compiler()
    assert compiler is not None
    return kernel.bind(build({kernel.name: kernel.source}, compiler)[kernel.name])


@pytest.mark.parametrize("atoms", [0, 1, 2, 60])
@pytest.mark.parametrize("name", CELLS)
def test_the_reference_list(name: str, atoms: int) -> None:
    cell = CELLS[name]
    positions = np.random.default_rng(atoms).uniform(-12, 20, (atoms, 3)) if cell is not None else _cluster(atoms)
    expected = np.zeros((0, 5))
    if atoms:
        lattice = np.zeros((3, 3)) if cell is None else cell
        structure = Structure(np.full(atoms, 14), positions, lattice, (cell is not None,) * 3, name)
        edges, units = neighbour_list(structure, CUTOFF)
        expected = _in_order(edges.T, positions[edges[1]] - positions[edges[0]] + units @ lattice)
    given = torch.from_numpy(positions), None if cell is None else torch.from_numpy(cell)
    for found in (Pairs(CUTOFF)(*given), bound().pairs(*given, CUTOFF)):
        assert found is not None
        index, vectors = found
        assert bool((index[1].diff() >= 0).all())
        ours = _in_order(index.T.numpy(), vectors.numpy())
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, atol=1e-9)


def _cluster(atoms: int) -> Any:
    return np.random.default_rng(atoms).uniform(0, 9, (atoms, 3))


def _in_order(edges: Any, vectors: Any) -> Any:
    rows = np.concatenate([edges, vectors], axis=1).reshape(-1, 5)
    return rows[np.lexsort(np.round(rows, 6).T)]


def test_the_module_scripts_and_has_derivatives() -> None:
    positions = torch.from_numpy(_cluster(8)).requires_grad_()
    cell = torch.from_numpy(CELLS["oblique"]).requires_grad_()
    scripted: Any = torch.jit.script(Pairs(CUTOFF))

    def lengths(positions: Tensor, cell: Tensor) -> Tensor:
        return pairs_within(positions, cell, CUTOFF)[1].pow(2).sum(1)

    assert torch.equal(scripted(positions, cell)[1].pow(2).sum(1), lengths(positions, cell))
    assert torch.autograd.gradcheck(lengths, (positions, cell))


def test_what_the_kernel_leaves_to_torch() -> None:
    positions = torch.from_numpy(_cluster(8))
    search = bound().pairs
    assert search(positions.float(), None, CUTOFF) is None
    assert search(positions.clone().requires_grad_(), None, CUTOFF) is None
    far = torch.cat([positions, positions + 1e7])
    assert search(far, None, CUTOFF) is None
    assert search(positions, torch.diag(torch.tensor([1e-5, 9.0, 9.0], dtype=torch.float64)), CUTOFF) is None
    assert pairs_within(far, None, CUTOFF)[0].shape[1] == 2 * pairs_within(positions, None, CUTOFF)[0].shape[1]
