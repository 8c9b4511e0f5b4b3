"""The families whose packages need e3nn 0.6: each package's eager model beside its optimised form.

    python run_tests.py --env e3nn06 -- --collect-only      # makes the environment .envs/e3nn06
    .envs/e3nn06/bin/python benchmarks/families.py --threads 1 2

Energy, forces and, where the model gives it, stress; float32 unless named otherwise; both in this process and by turns,
on inputs that are prepared once.  Models have random weights (costs do not depend on them), but SevenNet-0 is the
pretrained one.  DeePMD's inputs are positions: the search for neighbours is part of both sides.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fxpass
from fxpass.api import open_model
from fxpass.cli.bench import calls_of
from fxpass.cli.measure import by_turns, crystal, processor, threads
from fxpass.structures import Structure, neighbour_list

NEAREST = 2.62  # Angstrom; gives 43 neighbours within 5 Angstrom of a rattled fcc crystal
SYMBOLS = ("Cu", "Si")
SIDE = 3.105  # Angstrom of water for each molecule, at 1 g/cm^3


@dataclass(frozen=True)
class Row:
    """One line of the table; times are seconds, medians and least."""

    model: str
    threads: int
    atoms: int
    edges: int
    eager: float
    native: float
    eager_least: float
    native_least: float
    forces: float
    largest: float

    @property
    def ratio(self) -> float:
        return self.eager / self.native


def nequip() -> nn.Module:
    """Three layers, l_max 2, 32 features."""
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    return NequIPGNNModel(
        seed=0,
        model_dtype="float32",
        r_max=5.0,
        type_names=list(SYMBOLS),
        num_layers=3,
        l_max=2,
        parity=False,
        num_features=32,
        radial_mlp_depth=2,
        radial_mlp_width=64,
        avg_num_neighbors=43.0,
        per_type_energy_scales=1.0,
        per_type_energy_shifts={"Cu": -1.0, "Si": -2.0},
    )


def allegro() -> nn.Module:
    """Two layers, l_max 2 with parity, 64 scalar and 32 tensor features."""
    from allegro.model import AllegroModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    return AllegroModel(
        seed=0,
        model_dtype="float32",
        r_max=5.0,
        type_names=list(SYMBOLS),
        l_max=2,
        parity=True,
        num_layers=2,
        num_scalar_features=64,
        num_tensor_features=32,
        radial_chemical_embed={"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 8},
        avg_num_neighbors=43.0,
        per_type_energy_scales=1.0,
        per_type_energy_shifts={"Cu": -1.0, "Si": -2.0},
    )


def sevennet() -> nn.Module:
    """SevenNet-0, as the wheel brings it."""
    return open_model("7net-0")[0]


def schnetpack(kind: str, blocks: int) -> nn.Module:
    """128 features and 20 Gaussians, as in schnetpack's own configurations."""
    from fxpass.frontends.schnetpack import import_schnetpack

    spk = import_schnetpack()
    representation = getattr(spk.representation, kind)(
        n_atom_basis=128,
        n_interactions=blocks,
        radial_basis=spk.nn.GaussianRBF(n_rbf=20, cutoff=5.0),
        cutoff_fn=spk.nn.CosineCutoff(5.0),
    )
    return spk.model.NeuralNetworkPotential(
        representation=representation,
        input_modules=[spk.atomistic.PairwiseDistances()],
        output_modules=[spk.atomistic.Atomwise(n_in=128, output_key="energy"), spk.atomistic.Forces()],
        postprocessors=[spk.transform.CastTo64(), spk.transform.AddOffsets("energy", add_mean=True)],
    )


def deepmd(precision: str) -> nn.Module:
    """se_e2_a for water: embedding 25-50-100, axis 16, fitting 240-240-240; statistics as of data."""
    from fxpass.frontends.deepmd import import_deepmd

    import_deepmd()
    from deepmd.pt.model.model import get_model

    descriptor = {"type": "se_e2_a", "sel": [46, 92], "rcut_smth": 0.5, "rcut": 6.0, "neuron": [25, 50, 100]}
    descriptor |= {"resnet_dt": False, "axis_neuron": 16, "seed": 1, "precision": precision}
    fitting = {"neuron": [240, 240, 240], "resnet_dt": True, "seed": 1, "precision": precision}
    model = get_model({"type_map": ["O", "H"], "descriptor": descriptor, "fitting_net": fitting})
    for module in model.modules():
        if isinstance(getattr(module, "stddev", None), torch.Tensor):
            module.stddev[...] = 0.15
            module.mean[..., :1] = 0.05
    return model


WATER = ("SchNet", "PaiNN", "DeePMD")
MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "SevenNet-0": sevennet,
    "SchNet, 6 blocks, 128 features": lambda: schnetpack("SchNet", 6),
    "PaiNN, 3 blocks, 128 features": lambda: schnetpack("PaiNN", 3),
    "DeePMD se_e2_a, 25-50-100/240^3, float32": lambda: deepmd("float32"),
    "DeePMD se_e2_a, 25-50-100/240^3, float64": lambda: deepmd("float64"),
    # NequIP's own state, which its models ask for, is that of the whole process: last
    "NequIP, 3 layers, l_max 2, 32 features": nequip,
    "Allegro, 2 layers, l_max 2, 64/32 features": allegro,
}


def water(side: int) -> Structure:
    """``side``^3 molecules on a grid, turned at random, in a periodic box."""
    rng = np.random.default_rng(0)
    molecule = np.array([[0.0, 0.0, 0.0], [0.9572, 0.0, 0.0], [-0.2400, 0.9266, 0.0]])
    corners = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    turns, _ = np.linalg.qr(rng.normal(size=(len(corners), 3, 3)))
    places = SIDE * corners[:, None, :] + molecule @ turns + rng.normal(scale=0.05, size=(len(corners), 3, 3))
    numbers = np.tile([8, 1, 1], len(corners))
    return Structure(numbers, places.reshape(-1, 3), SIDE * side * np.eye(3), (True, True, True), "water")


def measure(name: str, options: argparse.Namespace) -> list[Row]:
    """A model, eager and native, on both numbers of threads."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model, frontend = open_model(model)
    facts = frontend.attributes(model)
    of_water = {1, 8} <= set(facts["numbers"]) and name.startswith(WATER)
    species = [n for n in (14, 29) if n in facts["numbers"]]
    structure = water(4) if of_water else crystal(options.atoms, species, facts["cutoff"], NEAREST)
    result = fxpass.optimize(model, options.passes, target="native", verify=not options.no_verify)
    ours, theirs = (frontend.evaluate(each, structure) for each in (result, model))
    calls, _ = calls_of({"eager": model, "native": result}, frontend, structure)
    rows = []
    for count in options.threads:
        with threads(count):
            taken = by_turns(calls, options.repeat, options.seconds)
        rows.append(
            Row(
                name,
                count,
                len(structure),
                neighbour_list(structure, facts["cutoff"])[0].shape[1],
                median(taken["eager"]),
                median(taken["native"]),
                min(taken["eager"]),
                min(taken["native"]),
                float(np.abs(ours.forces - theirs.forces).max()),
                float(np.abs(theirs.forces).max()),
            )
        )
    return rows


def table(rows: list[Row]) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    numbers = ("threads", "atoms", "edges", "eager, ms", "native, ms", "ratio", "of least", "dF", "max F")
    for heading in ("model", *numbers):
        made.add_column(heading, justify="left" if heading == "model" else "right", header_style="bright_black")
    for row in rows:
        made.add_row(
            row.model,
            *(str(n) for n in (row.threads, row.atoms, row.edges)),
            f"{1e3 * row.eager:.1f}",
            f"{1e3 * row.native:.2f}",
            f"{row.ratio:.1f}x",
            f"{row.eager_least / row.native_least:.1f}x",
            f"{row.forces:.0e}",
            f"{row.largest:.2g}",
        )
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--passes", default="default", metavar="PIPELINE")
    parser.add_argument("--atoms", type=int, default=108, metavar="N", help="of the crystal (default: 108)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--repeat", type=int, default=15, metavar="N")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="begin no further round after so long")
    parser.add_argument("--no-verify", action="store_true", help="without a receipt")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows here too")
    options = parser.parse_args(arguments)
    console = Console()
    console.print(f"{processor()}, torch {torch.__version__}, {options.passes}, native")
    rows: list[Row] = []
    for name in options.models:
        rows += measure(name, options)
        console.print(table(rows[-len(options.threads) :]))
    console.print(table(rows))
    if options.json is not None:
        made: list[dict[str, Any]] = [{**asdict(row), "ratio": row.ratio} for row in rows]
        options.json.write_text(json.dumps(made, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
