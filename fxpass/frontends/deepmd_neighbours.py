"""The nearest neighbours of atoms, as many as have a place, in plain torch that also scripts."""

# TorchScript reads the annotations.
# ruff: noqa: UP006, UP035

from __future__ import annotations

from typing import List

import torch
from torch import Tensor


def nearest_only(
    vectors: Tensor, index: Tensor, kinds: Tensor, atoms: int, sel: List[int], mixed: bool
) -> Tensor:
    """Numbers of the edges that have a place: all of them, or the nearest ``sum(sel)``, and of these ``sel`` by type.

    Args:
        vectors: [edges, 3].
        index: [2, edges] int64, (neighbour, centre).
        kinds: [atoms] int64, types.
        sel: places by type of the neighbour, or of all types.
        mixed: whether neighbours of all types share their places.
    """
    every = torch.arange(index.size(1), device=index.device)
    if index.size(1) == 0:
        return every
    types = len(sel)
    group = index[1] if mixed else index[1] * types + kinds.index_select(0, index[0])
    places = torch.tensor(sel, device=index.device)
    room = places.sum().expand(atoms) if mixed else places.repeat(atoms)
    counts = torch.bincount(group, minlength=room.size(0))
    if bool((counts <= room).all()):  # then no atom has more than all places together
        return every
    far = torch.argsort(torch.linalg.vector_norm(vectors.detach(), dim=1), stable=True)
    if not mixed:
        far = far.index_select(0, _first_of(index[1].index_select(0, far), places.sum().expand(atoms)))
    chosen = far.index_select(0, _first_of(group.index_select(0, far), room))
    return chosen.sort()[0]


def _first_of(group: Tensor, room: Tensor) -> Tensor:
    """Numbers of the rows that are among the first ``room[group]`` of their group."""
    order = torch.argsort(group, stable=True)
    counts = torch.bincount(group, minlength=room.size(0))
    ordered = group.index_select(0, order)
    rank = torch.arange(group.size(0), device=group.device) - (counts.cumsum(0) - counts).index_select(0, ordered)
    return order[rank < room.index_select(0, ordered)].sort()[0]
