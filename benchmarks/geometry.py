"""What sharing geometry is worth: committees, heads, energy before forces.

Run from the checkout, in an environment with mace-torch::

    python benchmarks/geometry.py [--model PATH] [--structures PATH] [--repeats N]

Everything runs in one process on one thread; the cases of a table take turns, and each time is the median over the
turns of the processor time, so that other work on the machine counts little and for all alike.  Without ``--model``
a MACE of the size of a small production model is built at random: the costs do not depend on the weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxpass
from fxpass.api import open_model
from fxpass.capture.capture import copy_model
from fxpass.structures import Structure, read_structures

PASSES = ["preserve-sparsity", "default"]
NUMBERS = (28, 29, 46, 47, 79)
HEADS = ("pbe", "r2scan")


def random_model(seed: int, heads: Sequence[str] = ("Default",)) -> nn.Module:
    """A float32 MACE of 32x0e+32x1o, l_max 3, correlation 3, two layers, cutoff 5 Angstrom, for five metals."""
    from mace import modules  # before e3nn: e3nn 0.4.4 alone does not import on this torch

    # isort: split
    from e3nn import o3

    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    torch.manual_seed(seed)
    return modules.ScaleShiftMACE(
        r_max=5.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=len(NUMBERS),
        hidden_irreps=o3.Irreps("32x0e + 32x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros((len(heads), len(NUMBERS)), dtype=np.float32),
        avg_num_neighbors=38.5,
        atomic_numbers=list(NUMBERS),
        correlation=3,
        gate=nn.functional.silu,
        radial_type="bessel",
        atomic_inter_scale=[1.0] * len(heads),
        atomic_inter_shift=[0.0] * len(heads),
        heads=list(heads),
    )


def relatives(path: str | None) -> list[nn.Module]:
    """Three models of one architecture: at random, or a checkpoint and two of its kind with perturbed weights."""
    if path is None:
        return [random_model(seed) for seed in range(3)]
    original, _ = open_model(path)
    models = [copy_model(original) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for model in models[1:]:
        for name, weight in model.named_parameters():
            if "bessel" not in name:  # members of a committee are trained from the same basis
                noise = 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weight.data += noise * weight.data.abs().mean()
    return models


def alloy(seed: int = 0, cells: int = 2) -> Structure:
    """A rattled fcc alloy of five metals, 4 cells^3 atoms, periodic."""
    rng = np.random.default_rng(seed)
    corner = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    grid = np.array([[i, j, k] for i in range(cells) for j in range(cells) for k in range(cells)])
    positions = 3.9 * (grid[:, None] + corner).reshape(-1, 3)
    positions += rng.normal(scale=0.1, size=positions.shape)
    numbers = rng.choice(NUMBERS, size=len(positions))
    return Structure(numbers, positions, 3.9 * cells * np.eye(3), (True, True, True), f"alloy {len(numbers)}")


def medians(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of processor time of each case, which take turns."""
    for run in cases.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            start = time.process_time()
            run()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def table(title: str, found: Mapping[str, float]) -> None:
    """Print times, and how many times faster each case is than the first."""
    print(f"\n{title}")
    first = next(iter(found.values()))
    for name, value in found.items():
        print(f"  {name:<44}{value:9.2f} ms   {first / value:5.2f}x")


def moved(data: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Another geometry with the same edges."""
    generator = torch.Generator().manual_seed(seed)
    noise = 1e-3 * torch.randn(data["positions"].shape, generator=generator, dtype=data["positions"].dtype)
    return {**data, "positions": data["positions"] + noise}


def committee_of_three(models: Sequence[nn.Module], data: dict[str, Tensor], repeats: int) -> None:
    members = [fxpass.optimize(model, PASSES, verify=False) for model in models]
    committee = fxpass.optimize(members, verify=False)
    nodes = sum(len(member.program.graph.nodes) for member in members)
    print(f"\ncommittee: {nodes} nodes in three programs, {len(committee.program.graph.nodes)} in the merged one")
    step = iter(range(10**9))
    cases = {
        "three originals": lambda: [model(dict(now)) for now in [moved(data, next(step))] for model in models],
        "three optimised models": lambda: [model(now) for now in [moved(data, next(step))] for model in members],
        "the committee": lambda: committee(moved(data, next(step))),
    }
    found = medians(cases, repeats)
    table("energy and forces of three models, a new geometry at each call", found)
    ratio = found["three optimised models"] / found["the committee"]
    print(f"  the committee is {ratio:.2f}x as fast as three optimised models")


def calls_on_one_geometry(model: nn.Module, data: Sequence[dict[str, Tensor]], repeats: int) -> None:
    """The same work with and without kept geometry: forces after energy, and two heads."""
    kept = fxpass.optimize(model, PASSES, verify=False)
    without = fxpass.optimize(model, ["preserve-sparsity{cache=false}", "default"], verify=False)
    step = iter(range(10**9))

    def energy_then_forces(module: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            now = moved(data[0], next(step))
            module(now, compute_force=False)
            module(now)

        return run

    def heads(module: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            seed = next(step)
            for one in data:
                module(moved(one, seed))

        return run

    def single(module: nn.Module) -> Callable[[], Any]:
        return lambda: module(moved(data[0], next(step)))

    def energies(module: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            seed = next(step)
            for one in data:
                module(moved(one, seed), compute_force=False)

        return run

    cases = {"energy, then forces": energy_then_forces, "two heads": heads, "two heads, energies only": energies}
    for title, case in cases.items():
        table(title, medians({"computed again": case(without), "kept": case(kept)}, repeats))
    table(
        "one call for each geometry, so that nothing kept is used",
        medians({"not kept": single(without), "kept": single(kept)}, repeats),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint of a MACE, in place of one at random")
    parser.add_argument("--structures", help="file whose first structure is evaluated; needed with --model")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)

    from fxpass.frontends.mace import mace_batch

    structure = read_structures(options.structures, 0)[0] if options.structures else alloy()
    models = relatives(options.model)
    facts = open_model(models[0])[1].attributes(models[0])
    data = mace_batch([structure], facts["numbers"], facts["cutoff"], facts["heads"], torch.float32)
    print(f"{structure.name}: {len(structure)} atoms, {data['edge_index'].shape[1]} edges, one thread, eager")
    committee_of_three(models, data, options.repeats)
    model = random_model(0, HEADS)
    both = [mace_batch([replace(structure, head=head)], NUMBERS, 5.0, HEADS, torch.float32) for head in HEADS]
    calls_on_one_geometry(model, both, options.repeats)


if __name__ == "__main__":
    main()
