"""A Deep Potential in plain PyTorch, as PWMLFF has it: its embedding nets become tables, of orders 3 and 5.

The descriptor is se_e2_a (Zhang et al., NeurIPS 2018): s(r), 1/r with a switch; an embedding net of s for each pair of
species; D = G^T R R^T G<; a fitting net for each species.  The Python below and this command do the same::

    python -m fxpass compress model.pt -d 0.01 -o 3 -s compressed.fxp

Usage::

    python examples/plain_deep_potential.py
    python examples/plain_deep_potential.py --step 0.02 --folder out
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fxpass
from fxpass.cli import main as fxpass_command
from fxpass.frontends.energy import batch_of
from fxpass.frontends.energy_interface import Potential
from fxpass.structures import FCC


class Network(nn.Module):
    """tanh layers; one as wide as its input, or twice as wide, adds that input, as DeePMD's do."""

    def __init__(self, inputs: int, widths: Sequence[int], outputs: int = 0) -> None:
        super().__init__()
        sizes = [inputs, *widths]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.last = nn.Linear(sizes[-1], outputs) if outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            y = torch.tanh(layer(x))
            if y.shape[1] == x.shape[1]:
                y = x + y
            elif y.shape[1] == 2 * x.shape[1]:
                y = torch.cat([x, x], 1) + y
            x = y
        return self.last(x)


class DeepPotential(nn.Module):
    """An energy function: fxpass reads ``numbers``, ``cutoff`` and what ``forward`` takes.

    Args:
        numbers: atomic numbers, in the order of the columns of ``node_attrs``.
        cutoff: Angstrom; s is switched off from ``smooth`` on.
        neighbours: that the sum over neighbours is divided by.
        axis: columns of G<.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        cutoff: float = 5.0,
        smooth: float = 1.0,
        embedding: Sequence[int] = (8, 16, 32),
        axis: int = 4,
        fitting: Sequence[int] = (32, 32),
        neighbours: float = 4.0,
    ) -> None:
        super().__init__()
        self.numbers, self.cutoff, self.smooth = tuple(numbers), cutoff, smooth
        self.width, self.axis, self.neighbours = embedding[-1], axis, neighbours
        species = range(len(numbers))
        self.embedding = nn.ModuleList(nn.ModuleList(Network(1, embedding) for _ in species) for _ in species)
        self.fitting = nn.ModuleList(Network(self.width * axis, fitting, 1) for _ in species)

    def switched(self, distance: Tensor) -> Tensor:
        """s(r) = w(r)/r with w from 1 to 0 between ``smooth`` and ``cutoff``; two derivatives are continuous."""
        t = ((distance - self.smooth) / (self.cutoff - self.smooth)).clamp(0, 1)
        return (t**3 * (-6 * t * t + 15 * t - 10) + 1) / distance

    def forward(self, edge_vectors: Tensor, edge_index: Tensor, node_attrs: Tensor) -> Tensor:
        """Energies of atoms, [atoms], in eV."""
        sender, receiver = edge_index[0], edge_index[1]
        distance = edge_vectors.norm(dim=1, keepdim=True)
        s = self.switched(distance)
        rows = torch.cat([s, s * edge_vectors / distance], 1)  # R: s, s x/r, s y/r, s z/r
        centre, other = node_attrs[receiver], node_attrs[sender]
        g = torch.zeros_like(s)
        for i, nets in enumerate(self.embedding):
            for j, net in enumerate(nets):  # one embedding net for each pair of species
                g = g + centre[:, i : i + 1] * other[:, j : j + 1] * net(s)
        outer = (g.unsqueeze(2) * rows.unsqueeze(1)).flatten(1) / self.neighbours
        summed = node_attrs.new_zeros(node_attrs.shape[0], 4 * self.width).index_add(0, receiver, outer)
        t = summed.view(-1, self.width, 4)  # G^T R
        descriptor = torch.bmm(t, t[:, : self.axis].transpose(1, 2)).flatten(1)
        each = torch.cat([net(descriptor) for net in self.fitting], 1)
        return (each * node_attrs).sum(1)


def alloy(numbers: Sequence[int], cells: int, seed: int = 0) -> fxpass.Structure:
    """A rattled fcc lattice with species at random."""
    rng = np.random.default_rng(seed)
    corners = np.array([[i, j, k] for i in range(cells) for j in range(cells) for k in range(cells)])
    places = 3.9 * (corners[:, None] + FCC).reshape(-1, 3) + rng.normal(scale=0.05, size=(4 * cells**3, 3))
    cell = 3.9 * cells * np.eye(3)
    return fxpass.Structure(rng.choice(list(numbers), len(places)), places, cell, (True, True, True), "alloy")


def milliseconds(potential: nn.Module, data: dict[str, Tensor], calls: int = 5) -> float:
    potential(data)
    start = time.perf_counter()
    for _ in range(calls):
        potential(data)
    return 1000 * (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.01, help="of the tables")
    parser.add_argument("--cells", type=int, default=3, help="of the alloy, along each axis")
    parser.add_argument("--folder", type=Path, default=Path(), help="where files are written")
    options = parser.parse_args()

    torch.manual_seed(0)
    numbers = (29, 47)
    model = Potential(DeepPotential(numbers).double())  # random weights
    checkpoint, saved = options.folder / "model.pt", options.folder / "compressed.fxp"
    torch.save(model, checkpoint)

    # the command; a checkpoint is a pickle, so its class must be importable here
    code = fxpass_command(["compress", str(checkpoint), "-d", str(options.step), "-o", "3", "-s", str(saved)])
    assert code == 0
    compressed = fxpass.load(saved)

    # the same from Python, with errors by order
    data = batch_of([alloy(numbers, options.cells)], model)
    before = model(data)
    results = {"command, order 3": compressed}
    for order in (3, 5):
        pipeline = f"specialize-species,common-subexpressions,tabulate{{dx={options.step},order={order}}},exact"
        results[f"Python, order {order}"] = fxpass.optimize(model, pipeline, budget="1 meV/A")
    for name, result in results.items():
        error = (result(data)["forces"] - before["forces"]).abs().max()
        print(f"{name}: largest force error {float(error):.1e} eV/A")

    timed = {"original": model, "exact": fxpass.optimize(model, "exact"), "compressed": compressed}
    took = ", ".join(f"{name} {milliseconds(potential, data):.0f} ms" for name, potential in timed.items())
    print(f"{len(data['numbers'])} atoms: {took}")


if __name__ == "__main__":
    import plain_deep_potential  # a pickle names the module of a class, which must not be __main__

    plain_deep_potential.main()
