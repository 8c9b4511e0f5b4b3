"""Time and memory of a Hessian: ``Derivatives.hessian_rows`` against ``torch.autograd.functional.hessian``.

    python benchmarks/hessian.py MODEL [--atoms 64] [--rows 24] [--passes exact] [--json FILE]

The structure is a rattled fcc crystal of the model's species.  Both compute the same rows of the Hessian, in one
process on one thread, and what counts is processor time; ``--rows`` takes fewer than all (3 per atom).  The second
derivatives that torch computes are those of the original model, through its own ``forward`` with ``training=True``.
Memory is that of tensors, by the profiler's record of every allocation: for torch of a Hessian of three rows, which
records the graph that all rows need, and so no more than theirs; for ours of the rows that are timed.  Needs a MACE.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxpass
from fxpass.api import open_model
from fxpass.cli.measure import peak_memory
from fxpass.cli.options import find_model
from fxpass.frontends.base import Frontend
from fxpass.structures import FCC, Floats, Structure


@dataclass(frozen=True)
class Measured:
    """Figures of one way to a Hessian.

    Attributes:
        name: of the way.
        first: processor seconds of the first rows, with tracing and building where there is any.
        seconds: of the rows, all being made.
        memory: bytes of tensors at most.
    """

    name: str
    first: float
    seconds: float
    memory: int


def crystal(atoms: int, numbers: list[int], nearest: float) -> Structure:
    """A rattled fcc crystal of random species in a box as near to a cube as the number of atoms allows.

    Args:
        atoms: a multiple of 4.
        nearest: distance of nearest neighbours, Angstrom.
    """
    cells = atoms // 4
    boxes = [(i, j, cells // i // j) for i in range(1, cells + 1) for j in range(1, cells + 1) if cells % (i * j) == 0]
    box = np.array(min(boxes, key=lambda b: (max(b), b)))
    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(*map(np.arange, box), indexing="ij"), axis=-1).reshape(-1, 1, 3)
    a = nearest * np.sqrt(2.0)
    positions = (corners + FCC).reshape(-1, 3) * a + rng.normal(scale=0.05, size=(4 * len(corners), 3))
    species = rng.choice(numbers, size=len(positions))
    return Structure(species, positions, np.diag(box * a), (True, True, True), "crystal")


def rows_by_torch(model: nn.Module, frontend: Frontend, structure: Structure, atoms: int) -> Floats:
    """The block of the Hessian [3 atoms, 3 atoms] of the first atoms, through the original."""
    seen: list[dict[str, Tensor]] = []
    hook = model.register_forward_pre_hook(lambda _, args, kw: seen.append(dict(args[0])), with_kwargs=True)
    frontend.evaluate(model, structure)
    hook.remove()
    (data,) = seen
    start = data["positions"].detach().clone()

    def energy(positions: Tensor) -> Tensor:
        moved = torch.cat([positions, start[atoms:]])
        result: dict[str, Any] = model({**data, "positions": moved}, training=True, compute_force=False)
        return result["energy"].sum()

    found = torch.autograd.functional.hessian(energy, start[:atoms])
    return found.reshape(3 * atoms, 3 * atoms).double().numpy()


def timed(call: Any) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint of a MACE")
    parser.add_argument("--atoms", type=int, default=64, help="of the crystal, a multiple of 4 (default: 64)")
    parser.add_argument("--rows", type=int, help="rows of the Hessian to time, a multiple of 3 (default: all)")
    parser.add_argument("--passes", default="exact", help="pipeline (default: exact)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    model, frontend = open_model(find_model(arguments.model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    facts = frontend.attributes(model)
    structure = crystal(arguments.atoms, facts["numbers"], nearest=2.75)
    block = len(structure) if arguments.rows is None else arguments.rows // 3
    optimised = fxpass.optimize(model, arguments.passes, verify=False)
    derivatives = optimised.derivatives()

    def ours(atoms: int) -> Floats:
        (_, rows) = next(islice(derivatives.hessian_rows(structure, chunk=atoms), 1))
        return rows[:, :, :atoms].reshape(3 * atoms, 3 * atoms)

    first, _ = timed(lambda: ours(1))
    seconds, found = timed(lambda: ours(block))
    memory = peak_memory(lambda: ours(block))
    print(f"{'fxpass':8} {seconds:9.2f} s {memory / 1e6:9.1f} MB, first row after {first:.1f} s", flush=True)
    by_torch, few = timed(lambda: rows_by_torch(model, frontend, structure, 1))
    memory_by_torch = peak_memory(lambda: rows_by_torch(model, frontend, structure, 1))
    seconds_by_torch, expected = timed(lambda: rows_by_torch(model, frontend, structure, block))
    print(f"{'torch':8} {seconds_by_torch:9.2f} s {memory_by_torch / 1e6:9.1f} MB, 3 rows in {by_torch:.1f} s")
    results = [
        Measured("fxpass", first, seconds, memory),
        Measured("torch.autograd.functional.hessian", by_torch, seconds_by_torch, memory_by_torch),
    ]
    difference = max(float(np.abs(found - expected).max()), float(np.abs(found[:3, :3] - few).max()))
    print(
        f"{len(structure)} atoms, {3 * block} rows: {seconds_by_torch / seconds:.1f} times as fast, "
        f"{memory / memory_by_torch:.3f} of the memory, difference {difference:.1e} eV/Angstrom^2 "
        f"of {np.abs(expected).max():.1f}"
    )
    if arguments.json is not None:
        machine = {"python": platform.python_version(), "torch": torch.__version__}
        report = {"atoms": len(structure), "rows": 3 * block, "results": [asdict(r) for r in results], **machine}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
