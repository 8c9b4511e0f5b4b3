"""Lowered programs that keep the geometry from one call to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ir.geometry import KEPT, split_geometry
from ..ir.merge import first_outputs
from ..ir.program import Program
from .base import Target


def lower_both(program: Program, target: Target, gradients: int | None = None) -> tuple[nn.Module, nn.Module]:
    """``program`` without its last ``gradients`` outputs and the whole of it, lowered to ``target``.

    They are as many as inputs are differentiated unless told otherwise.

    Where the program says so (``preserve-sparsity{cache=true}``), both share what depends on the geometry alone.
    A target that returns scripts keeps nothing: what they hold goes into their files.
    """
    gradients = len(program.differentiated) if gradients is None else gradients
    split = split_geometry(program, gradients) if KEPT in program.assumptions else None
    if split is not None:
        geometry = target.lower(split.geometry)
        if not isinstance(geometry, torch.jit.ScriptModule):
            kept = KeptGeometry(geometry)
            return (
                WithGeometry(kept, target.lower(split.energy), split.vectors),
                WithGeometry(kept, target.lower(split.forces), split.vectors),
            )
    return target.lower(first_outputs(program, len(program.outputs) - gradients)), target.lower(program)


class KeptGeometry(nn.Module):
    """Computes tensors from edge vectors [edges, 3], or hands out those of the last call.

    They are handed out again only for vectors of the same dtype, device and values, compared element by element
    with a copy that nobody else has: an atom that moved in place is an atom that moved.  Calls that record
    autograd are computed anew and not kept.
    """

    def __init__(self, geometry: nn.Module) -> None:
        super().__init__()
        self.geometry = geometry
        self.kept: tuple[Tensor, list[Tensor]] | None = None

    def forward(self, vectors: Tensor) -> list[Tensor]:
        if torch.is_grad_enabled():
            return self.geometry(vectors)
        kept = self.kept  # read once: another thread may exchange it
        if kept is not None and _same(kept[0], vectors):
            return kept[1]
        self.kept = kept = None  # frees the old tensors before the new ones are made
        made = self.geometry(vectors)
        self.kept = (vectors.clone(), made)
        return made


class WithGeometry(nn.Module):
    """A lowered program: the inputs of the whole program -> its outputs, by way of the kept geometry."""

    def __init__(self, geometry: KeptGeometry, rest: nn.Module, vectors: int) -> None:
        super().__init__()
        self.geometry = geometry
        self.rest = rest
        self.vectors = vectors

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return self.rest(*inputs, *self.geometry(inputs[self.vectors]))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
