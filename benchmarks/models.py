"""MACE models with random weights, of the sizes that people train, for benchmarks: costs do not depend on weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fxpass.api import open_model

NUMBERS = (14, 29)
CUTOFF = 5.0  # Angstrom
NEAREST = 2.62  # Angstrom; gives 43 neighbours within the cutoff of a rattled fcc crystal


@dataclass(frozen=True)
class Size:
    """What the cost of a MACE depends on; ``first`` is the interaction block of the first layer."""

    hidden: str
    layers: int = 2
    first: str = "RealAgnosticInteractionBlock"
    l_max: int = 3
    correlation: int = 3


RESIDUAL = "RealAgnosticResidualInteractionBlock"
MODELS: Mapping[str, Size] = {
    "64x0e+64x1o": Size("64x0e+64x1o"),
    "128x0e": Size("128x0e"),
    "128x0e+128x1o": Size("128x0e+128x1o"),
    "residual, 3 layers, l=2": Size("64x0e+64x1o+64x2e", layers=3, first=RESIDUAL),
}


def build(size: Size, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A ScaleShiftMACE for two species, with forces of the order of 1 eV/Angstrom."""
    from mace import modules  # before e3nn: e3nn 0.4.4 alone does not import on this torch

    # isort: split
    from e3nn import o3

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = modules.ScaleShiftMACE(
                r_max=CUTOFF,
                num_bessel=8,
                num_polynomial_cutoff=5,
                max_ell=size.l_max,
                interaction_cls=modules.interaction_classes[RESIDUAL],
                interaction_cls_first=modules.interaction_classes[size.first],
                num_interactions=size.layers,
                num_elements=len(NUMBERS),
                hidden_irreps=o3.Irreps(size.hidden),
                MLP_irreps=o3.Irreps("16x0e"),
                atomic_energies=np.array([[-1.0, -2.0]]),
                avg_num_neighbors=43.0,
                atomic_numbers=list(NUMBERS),
                correlation=size.correlation,
                gate=nn.functional.silu,
                radial_type="bessel",
                atomic_inter_scale=[10.0],
                atomic_inter_shift=[0.0],
                heads=["Default"],
            )
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def find(word: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that MODELS has by this name, or the one in a checkpoint, cast to ``dtype`` where one is given."""
    if word in MODELS:
        return build(MODELS[word], dtype or torch.float32)
    model, _ = open_model(Path(word))
    return model if dtype is None else model.to(dtype)
