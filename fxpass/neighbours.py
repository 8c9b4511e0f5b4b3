"""Pairs of atoms within a cutoff, found by cells, in plain torch that also scripts.

Family-neutral.  An interface whose host gives positions and no neighbours asks :class:`Pairs`; a target may put a
faster search in its place.
"""

# TorchScript reads the annotations.
# ruff: noqa: UP006, UP035, UP045

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor, nn


class Pairs(nn.Module):
    """:func:`pairs_within` one cutoff, Angstrom."""

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff: float = float(cutoff)

    def forward(self, positions: Tensor, cell: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """Positions [atoms, 3] and cell [3, 3] or None -> (neighbour, centre) [2, pairs] and vectors [pairs, 3]."""
        return pairs_within(positions, cell, self.cutoff)


def pairs_within(positions: Tensor, cell: Optional[Tensor], cutoff: float) -> Tuple[Tensor, Tensor]:
    """All pairs of atoms, and of images of atoms, within ``cutoff``; in time proportional to their number.

    Args:
        positions: [atoms, 3], Angstrom.
        cell: [3, 3], cell vectors as rows, Angstrom, periodic along all three; None without periodicity.

    Returns:
        [2, pairs] int64, (neighbour, centre), by centre; and [pairs, 3], from the neighbour to the centre, with an
        autograd graph to positions and cell where these have one.
    """
    atoms = positions.size(0)
    owner = torch.arange(atoms, device=positions.device)
    where = positions.detach()
    shift = torch.zeros_like(where)
    home = where
    turns = torch.zeros_like(where)
    if cell is not None:
        lattice = cell.detach()
        inverse = torch.linalg.inv(lattice)
        turns = torch.floor(where @ inverse)
        fractions = where @ inverse - turns
        reach = cutoff * torch.linalg.vector_norm(inverse, dim=0)  # in cells; planes are 1 / norm apart
        for axis in range(3):
            many = int(torch.ceil(reach[axis]))
            steps = torch.arange(-many, many + 1, device=where.device).to(where.dtype)
            moved = fractions[:, axis].index_select(0, owner).unsqueeze(1) + shift[:, axis : axis + 1] + steps
            row, step = torch.where((moved >= -reach[axis]) & (moved < 1 + reach[axis]))
            owner, shift = owner.index_select(0, row), shift.index_select(0, row)
            along = torch.zeros([3], dtype=where.dtype, device=where.device)
            along[axis] = 1.0
            shift = shift + steps.index_select(0, step).unsqueeze(1) * along
        home = fractions @ lattice
        where = home.index_select(0, owner) + shift @ lattice
    if atoms == 0:
        return torch.zeros([2, 0], dtype=torch.int64, device=positions.device), positions.new_zeros([0, 3])

    width = cutoff / 2  # 5 x 5 columns of 5 boxes hold a sphere in fewer candidates than 3 x 3 of 3 wider ones
    low = where.min(0)[0]
    boxes = torch.floor((where - low) / width).to(torch.int64) + 2
    sizes = boxes.max(0)[0] + 3
    key = (boxes[:, 0] * sizes[1] + boxes[:, 1]) * sizes[2] + boxes[:, 2]
    key, order = torch.sort(key)
    mine = torch.floor((home - low) / width).to(torch.int64) + 2
    offsets = torch.arange(-2, 3, device=where.device)
    column = (mine[:, 0:1] + offsets).unsqueeze(2) * sizes[1] + (mine[:, 1:2] + offsets).unsqueeze(1)
    middle = column.reshape(atoms, 25) * sizes[2] + mine[:, 2:3]
    first = torch.searchsorted(key, (middle - 2).contiguous())
    last = torch.searchsorted(key, (middle + 2).contiguous(), right=True)
    counts = (last - first).flatten()
    run = torch.repeat_interleave(counts)
    inside = torch.arange(run.size(0), device=where.device) - (counts.cumsum(0) - counts).index_select(0, run)
    image = order.index_select(0, first.flatten().index_select(0, run) + inside)
    centre = torch.div(run, 25, rounding_mode="floor")
    still = torch.where((shift == 0).all(1), owner, -1)  # the atoms themselves, among their images
    squared = torch.zeros([run.size(0)], dtype=where.dtype, device=where.device)
    for axis in range(3):  # one column after the other is three times as fast as rows of three
        here, there = home[:, axis].contiguous(), where[:, axis].contiguous()
        apart = here.index_select(0, centre) - there.index_select(0, image)
        squared.addcmul_(apart, apart)
    near = torch.where((squared <= cutoff * cutoff) & (still.index_select(0, image) != centre))[0]
    centre, image = centre.index_select(0, near), image.index_select(0, near)
    neighbour = owner.index_select(0, image)
    vectors = positions.index_select(0, centre) - positions.index_select(0, neighbour)
    if cell is not None:
        units = shift.index_select(0, image) - turns.index_select(0, neighbour) + turns.index_select(0, centre)
        vectors = vectors - units @ cell
    return torch.stack([neighbour, centre]), vectors
