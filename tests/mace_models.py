"""Small MACE models, one for each variant that the frontend covers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fxpass._torch_compat import o3

NUMBERS = (6, 8, 14)
CUTOFF = 4.5


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


def build(
    kind: str = "ScaleShiftMACE",
    *,
    interaction: str = "RealAgnosticResidualInteractionBlock",
    first: str | None = None,
    hidden: str = "4x0e+4x1o",
    l_max: int = 2,
    correlation: int = 2,
    layers: int = 2,
    dtype: torch.dtype = torch.float64,
    heads: list[str] | None = None,
    readout: str = "NonLinearReadoutBlock",
    edge_irreps: str | None = None,
    gate: Any = nn.functional.silu,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """A MACE with random weights, large enough that forces are of the order of 1 eV/Angstrom."""
    import mace.modules as modules

    count = len(heads) if heads else 1
    energies = np.array([-1.0, -2.0, -3.0])
    if kind == "ScaleShiftMACE":
        many = count > 1
        options["atomic_inter_scale"] = [100.0 + k for k in range(count)] if many else 100.0
        options["atomic_inter_shift"] = [0.1 * k for k in range(count)] if many else 0.1
    random = torch.get_rng_state()
    torch.manual_seed(seed)
    with default_dtype(dtype):
        model = getattr(modules, kind)(
            r_max=CUTOFF,
            num_bessel=6,
            num_polynomial_cutoff=5,
            max_ell=l_max,
            interaction_cls=modules.interaction_classes[interaction],
            interaction_cls_first=modules.interaction_classes[first or interaction],
            num_interactions=layers,
            num_elements=len(NUMBERS),
            hidden_irreps=o3().Irreps(hidden),
            MLP_irreps=o3().Irreps("4x0e"),
            atomic_energies=np.stack([energies + k for k in range(count)]) if count > 1 else energies,
            avg_num_neighbors=4.0,
            atomic_numbers=list(NUMBERS),
            correlation=correlation,
            gate=gate,
            heads=heads,
            radial_MLP=[8, 8],
            readout_cls=getattr(modules.blocks, readout),
            edge_irreps=None if edge_irreps is None else o3().Irreps(edge_irreps),
            **options,
        )
    torch.set_rng_state(random)
    return model.eval()


#: name -> arguments of :func:`build`; every class, option and range that the frontend covers occurs
VARIANTS: dict[str, dict[str, Any]] = {
    "scale-shift": {},
    "mace": {"kind": "MACE"},
    "agnostic": {"interaction": "RealAgnosticInteractionBlock"},
    "attention": {"interaction": "RealAgnosticAttResidualInteractionBlock"},
    "density": {"interaction": "RealAgnosticDensityInteractionBlock"},
    "density-residual": {"interaction": "RealAgnosticDensityResidualInteractionBlock"},
    "nonlinear": {"interaction": "RealAgnosticResidualNonLinearInteractionBlock"},
    "residual-after-density": {"first": "RealAgnosticDensityInteractionBlock"},
    "correlation-1-scalars": {"correlation": 1, "hidden": "4x0e"},
    "correlation-3-l3": {"correlation": 3, "l_max": 3},
    "correlation-4": {"correlation": 4, "l_max": 1, "layers": 1},
    "l1": {"l_max": 1, "hidden": "4x0e"},
    "l4": {"l_max": 4, "layers": 1},
    "three-layers-l2": {"hidden": "4x0e+4x1o+4x2e", "layers": 3},
    "hidden-l3": {"hidden": "4x0e+4x1o+4x2e+4x3o", "l_max": 3},
    "one-layer": {"layers": 1},
    "heads": {"heads": ["pbe", "r2scan", "Default"]},
    "heads-nonlinear": {
        "heads": ["pbe", "Default"],
        "interaction": "RealAgnosticResidualNonLinearInteractionBlock",
        "readout": "NonLinearBiasReadoutBlock",
    },
    "zbl": {"pair_repulsion": True},
    "zbl-mace": {"kind": "MACE", "pair_repulsion": True},
    "agnesi": {"distance_transform": "Agnesi"},
    "soft": {"distance_transform": "Soft"},
    "gaussian": {"radial_type": "gaussian"},
    "bias-readout": {"readout": "NonLinearBiasReadoutBlock"},
    "late-cutoff": {"apply_cutoff": False},
    "agnostic-product": {"use_agnostic_product": True},
    "last-readout": {"use_last_readout_only": True},
    "full-cg": {"use_reduced_cg": False},
    "so3": {"use_so3": True},
    "edge-irreps": {"edge_irreps": "2x0e+2x1o"},
    "tanh": {"gate": torch.tanh},
}
