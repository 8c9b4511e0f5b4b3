"""Tables against the exact model: force error on unseen frames, certified bounds, file size, convergence.

::

    python benchmarks/tables.py --model alloy.model --calibration train.xyz --frames test.xyz@::10 --json tables.json

Without ``--model`` it runs on the potential that fxpass ships, with random alloys.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxpass
from fxpass.algebra.piecewise import parse_grid
from fxpass.api import capture, run_passes
from fxpass.cli.options import find_structures
from fxpass.ir import ops
from fxpass.ir.program import Program, attribute
from fxpass.ir.scalar_functions import function_of
from fxpass.ir.tabulation import Domain, check, domain, fit
from fxpass.models import small_potential
from fxpass_passes.tabulate import Tabulate

FOLDED = "fold-constants,specialize-species,specialize-heads,common-subexpressions,dead-code"
COARSE_STEP = 0.001  # Angstrom: the fixed step that files are compared with


def forces(program: Program, sample: Any) -> Tensor:
    """[atoms, 3], eV/Angstrom."""
    inputs = [sample[spec.name] for spec in program.inputs]
    at = next(k for k, spec in enumerate(program.inputs) if "edge_vector" in spec.properties)
    inputs[at] = inputs[at].clone().requires_grad_()
    names = [spec.name for spec in program.outputs]
    energy = program.graph_module(*inputs)[names.index(program.energy)]
    (gradient,) = torch.autograd.grad(energy.sum(), inputs[at])
    index = sample["edge_index"]
    zero = gradient.new_zeros(int(index.max()) + 1, 3)
    return zero.index_add(0, index[0], gradient).index_add(0, index[1], -gradient)


def force_error(exact: Program, tabulated: Program, samples: Any) -> tuple[float, float]:
    """Largest and rms change of force components, in float64."""
    one, other = exact.cast(torch.float64), tabulated.cast(torch.float64)
    changes = torch.cat([(forces(other, s) - forces(one, s)).flatten() for s in samples])
    return float(changes.abs().max()), float(changes.square().mean().sqrt())


def bytes_of(program: Program) -> int:
    nodes = [n for n in program.graph.nodes if n.target is ops.table]
    return sum(attribute(program, n.args[2]).nbytes for n in nodes)  # type: ignore[arg-type]


def file_size(model: Any, tabulate: Tabulate, calibration: Any) -> int:
    passes = [FOLDED, tabulate, "dead-code"]
    result = fxpass.optimize(model, passes, calibration=calibration, verify=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fxp"
        result.save(path)
        return path.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="checkpoint (default: the potential that fxpass ships)")
    parser.add_argument("--calibration", help="structures that tables are chosen on, FILE or FILE@FRAMES")
    parser.add_argument("--frames", help="structures that errors are measured on, never among those of --calibration")
    parser.add_argument("--points", type=int, default=1_000_000, help="random points at which each bound is held")
    parser.add_argument("--no-files", action="store_true", help="leave out the comparison of file sizes")
    parser.add_argument("--json", help="file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = arguments.model or small_potential()
    calibration = find_structures(arguments.calibration) or None
    exact = run_passes(capture(model, calibration=calibration), FOLDED).program
    unseen = find_structures(arguments.frames)  # after the frontend's own, or without any the frontend's own
    frames = capture(model, calibration=unseen).cast(torch.float64).samples[-len(unseen) :]
    data: dict[str, Any] = {"torch": torch.__version__, "frames": len(frames), "passes": [], "bounds": []}

    print(f"{'tables':34} {'kB':>8} {'dF max':>9} {'dF rms':>9}  eV/A on {len(frames)} frames, float64")
    for options in ({}, {"order": 3}, {"dx": 0.01, "order": 3}, {"dx": 0.01}, {"dx": COARSE_STEP, "order": 3}):
        start = time.perf_counter()
        subject = Tabulate(**options)  # type: ignore[arg-type]
        after = subject.apply(exact.copy()).program
        largest, rms = force_error(exact, after, frames)
        row = {"options": str(options), "bytes": bytes_of(after), "force_max": largest, "force_rms": rms}
        data["passes"].append({**row, "seconds": time.perf_counter() - start})
        print(f"{options or 'default: budget 1e-6, order 5'!s:34} {row['bytes'] / 1e3:8,.0f} {largest:9.1e} {rms:9.1e}")
        if not options:
            default = after, subject.apply(exact.copy()).applications
            data["default_in_budget"] = largest <= 1e-6
    same = max(data["passes"][-1]["force_max"], 1e-12)

    heading = f"{'bound':>9} {'found':>9} {'bound':>9} {'found':>9}"
    print(f"\n{'function':44} {heading}  value, slope at {arguments.points:,} points")
    program, applications = default
    nodes = [n for n in program.graph.nodes if n.target is ops.table]
    for application, node in zip(applications, nodes, strict=True):
        function = function_of(exact, application.node)
        assert function is not None
        grid, stored = parse_grid(str(node.args[3])), attribute(program, node.args[2])  # type: ignore[arg-type]
        if function.nearer is not None and grid.coarse:
            function = function.nearer
        again = fit(function, Domain(grid.start, grid.end, grid.last, grid.flat, None, False), grid.order, grid.step)
        assert stored.shape == again.coefficients.shape
        value, slope = check(function, replace(again, grid=grid), arguments.points)
        held = value <= grid.value_bound and slope <= grid.slope_bound
        name = application.module or application.node
        print(f"{name[-44:]:44} {grid.value_bound:9.1e} {value:9.1e} {grid.slope_bound:9.1e} {slope:9.1e}  "
              f"{'held' if held else 'BROKEN'}")  # fmt: skip
        data["bounds"].append({"function": name, "value": value, "slope": slope, "held": held, "grid": str(grid)})

    print("\nconvergence: power of the step with which errors fall (expected order + 1, order)")
    data["convergence"] = []
    function = function_of(exact, applications[0].node)
    assert function is not None
    where = domain(function, 0.3)
    for order in (3, 5):
        fits = [fit(function, where, order, step) for step in (0.04, 0.02, 0.01)]  # type: ignore[arg-type]
        powers = [
            [math.log2(getattr(a, kind) / getattr(b, kind)) for a, b in pairwise(fits)]
            for kind in ("value_error", "slope_error")
        ]
        print(f"order {order}: value {powers[0]}, slope {powers[1]}")
        data["convergence"].append({"order": order, "value": powers[0], "slope": powers[1]})

    if not arguments.no_files:
        # what the weights' own rounding leaves is met by the default too; else twice the error that was measured
        met = data["passes"][0]["force_max"] <= 1.1 * same
        wide, narrow = Tabulate(dx=COARSE_STEP, order=3), Tabulate() if met else Tabulate(budget=2 * same)
        after = narrow.apply(exact.copy()).program
        sizes = [file_size(model, subject, calibration) for subject in (wide, narrow)]
        data["files"] = {"fixed": sizes[0], "auto": sizes[1], "ratio": sizes[0] / sizes[1]}
        data["files"]["force_max"] = [same, force_error(exact, after, frames)[0]]
        print(f"\nfile with dx=0.001, order 3: {sizes[0] / 1e3:,.0f} kB, dF {same:.1e}; at the same error: "
              f"{sizes[1] / 1e3:,.0f} kB, dF {data['files']['force_max'][1]:.1e}, "
              f"{data['files']['ratio']:.1f} times smaller")  # fmt: skip
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
