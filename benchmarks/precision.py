"""Accuracy, speed and memory of low precision on structures that no pass has seen.

    python benchmarks/precision.py MODEL --structures test.xyz@::4 --calibration calibration.xyz@::20 [--json FILE]

Every row is compared with the model in float64.  Equivariance is the error of forces under a random rotation, of the
same structures.  Latency is one evaluation of energy and forces by the eager target on the first structure; on a
processor without arithmetic in a 16-bit type that type is widened for each operation, so it costs time there and saves
memory only.  Memory is what the cost model counts: weights at rest, and bytes of all values that energy and forces
write, at the mean sizes of the structures.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import fxpass
from fxpass.api import run_passes
from fxpass.cli.options import find_model, find_structures
from fxpass.ir.program import Program
from fxpass.passes import Pass
from fxpass.pipeline import format_passes, resolve
from fxpass.registry import PASSES, default_registry
from fxpass.runner import run
from fxpass.verify.physics import random_rotation
from fxpass_passes.pin_precision import PinPrecision
from fxpass_passes.precision_regions import SampleSizes
from fxpass_passes.sensitivity import Reference, evaluate

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BUDGET = "1 meV/A"


@dataclass(frozen=True)
class Row:
    """One version of the model.

    Attributes:
        version: what it is.
        energy: root mean square error, meV/atom.
        force_rms, force_max: errors of force components, meV/Angstrom.
        rotation_rms, rotation_max: errors of forces under rotation, meV/Angstrom.
        low: share of the FLOPs that are low, of those that are not always pinned; NaN where nothing says so.
        latency: ms for energy and forces.
        weights: kB.
        values: MB written.
        note: why there are no numbers.
    """

    version: str
    energy: float = math.nan
    force_rms: float = math.nan
    force_max: float = math.nan
    rotation_rms: float = math.nan
    rotation_max: float = math.nan
    low: float = math.nan
    latency: float = math.nan
    weights: float = math.nan
    values: float = math.nan
    note: str = ""


def measure(version: str, program: Program, reference: Reference, low: float = math.nan) -> Row:
    """A row for an energy program; ``reference`` holds the structures."""
    errors = reference.errors(program)
    rotation = torch.tensor(random_rotation(np.random.default_rng(1)))
    energies, turns = [], []
    (vectors,) = program.with_property("edge_vector")
    for sample, expected in zip(reference.samples, reference.values, strict=True):
        here = evaluate(program, sample)
        own = sample[vectors.name]
        turned = {**sample, vectors.name: (own.double() @ rotation.T).to(own.dtype)}
        turns.append((evaluate(program, turned).forces - here.forces @ rotation.T).flatten())
        energies.append((here.energy - expected.energy).sum().item() / len(here.forces))
    turn = torch.cat(turns) * 1e3
    derived = run_passes(program, "differentiate,common-subexpressions,dead-code").program
    weights, values = memory(derived)
    return Row(
        version,
        float(np.sqrt(np.mean(np.square(energies)))) * 1e3,
        errors.rms * 1e3,
        errors.largest * 1e3,
        turn.square().mean().sqrt().item(),
        turn.abs().max().item(),
        low,
        latency(derived, reference),
        weights / 1e3,
        values / 1e6,
    )


def memory(derived: Program) -> tuple[float, float]:
    """Bytes of weights, and of the values that energy and forces write."""
    tensors = {n.target: n.meta["val"] for n in derived.graph.find_nodes(op="get_attr")}
    weights = sum(t.numel() * t.element_size() for t in tensors.values())
    sizes, made = SampleSizes(derived), [n for n in derived.graph.nodes if n.op == "call_function"]
    values = [n for n in made if isinstance(n.meta["val"], torch.Tensor) and not n.target.is_view]
    return weights, sum(sizes.elements(n) * n.meta["val"].element_size() for n in values)


def latency(derived: Program, reference: Reference, repeats: int = 5) -> float:
    """Median time of energy and forces by the eager target on the first structure, ms."""
    target = default_registry().target("eager")()
    module = target.lower(run(derived, resolve(target.pipeline, default_registry()), check=lambda _: None).program)
    sample = reference.samples[0]
    inputs = [v.to(s.dtype) if v.is_floating_point() else v for s in derived.inputs for v in [sample[s.name]]]
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            module(*inputs)
            times.append(time.perf_counter() - start)
    return float(np.median(times[1:])) * 1e3


def versions(program: Program) -> list[tuple[str, Program, Pass | torch.dtype | None]]:
    """Name, program to start from, and the pass or the type that makes the version of it."""
    wide = program.cast(F64)
    rows: list[tuple[str, Program, Pass | torch.dtype | None]] = [("original float32", program.cast(F32), None)]
    for dtype in (F16, BF16):
        rows.append((f"cast whole to {str(dtype).removeprefix('torch.')}", program, dtype))
    for budget in (None, BUDGET):
        for equivariant in (None, False):
            for dtype in (F16, BF16):
                name = f"pinned, {str(dtype).removeprefix('torch.')}"
                name += ", features too" * (equivariant is False) + f", {budget}" * (budget is not None)
                rows.append((name, program.cast(F32), PinPrecision(dtype, budget=budget, equivariant=equivariant)))
    rows.append(("float64 pinned, float32", wide, PinPrecision(F32, pinned=F64)))
    if "quantize" in default_registry().names(PASSES):
        (int8,) = resolve("quantize", default_registry())
        rows.append((format_passes([int8]), program.cast(F32), int8))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, or example:small")
    parser.add_argument("--structures", metavar="FILE", help="held-out structures, FILE@FRAMES takes some")
    parser.add_argument("--calibration", metavar="FILE", help="structures that passes measure on")
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose name holds this text")
    parser.add_argument("--json", metavar="FILE", help="write the rows here too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = find_model(options.model)
    structures = find_structures(options.structures)  # without any: the frontend's own
    unseen = fxpass.capture(model, calibration=structures)
    unseen = replace(unseen, samples=unseen.samples[-len(structures) :])
    given = fxpass.capture(model, calibration=find_structures(options.calibration) or None).samples
    reference = Reference(unseen, len(unseen.samples))
    rows = []
    for name, start, how in versions(replace(unseen, samples=given)):
        if options.only not in name:
            continue
        try:
            if isinstance(how, Pass):
                share = how.choice(start.copy()).share if isinstance(how, PinPrecision) else math.nan
                result = run_passes(start, [how]).program
                rows.append(measure(name, result, reference, share))
            else:
                rows.append(measure(name, start if how is None else start.cast(how), reference))
        except fxpass.FxpassError as error:
            rows.append(Row(name, note=str(error)))
        print(f"{name}: done", flush=True)
    table = Table(title=f"{options.model}, {len(reference.samples)} structures, {platform.machine()}, one thread")
    headings = ("version", "dE rms meV/atom", "dF rms meV/A", "dF max", "rotation rms", "max", "low", "ms", "kB", "MB")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "version" else "right")
    for row in rows:
        numbers = [v for k, v in asdict(row).items() if k not in ("version", "note")]
        table.add_row(row.version, *("" if math.isnan(v) else f"{v:.3g}" for v in numbers))
    console = Console(width=200)
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.version}: {row.note}")
    if options.json:
        data = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(r).items()} for r in rows]
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
