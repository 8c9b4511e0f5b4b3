"""What fusion guards cost: the same model with and without ``guard-fusion``, on every target.

    python benchmarks/guard.py                                   the potential that fxpass ships
    python benchmarks/guard.py MODEL.model --targets torchscript --atoms 32 --edges 1400

Both variants run in turn, so that whatever else the machine does meets both; the table has medians and the median
of the ratios of neighbouring runs, with its quartiles.  The force program is timed, without the interface of a family.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fxpass
from fxpass.ir.guards import guards, regions
from fxpass.ir.program import Program
from fxpass.models import small_potential
from fxpass.registry import default_registry
from fxpass.testing import example_inputs

BEFORE = "fold-constants,specialize-species,specialize-heads,dead-irreps,common-subexpressions,dead-code"
AFTER = "differentiate,fold-constants,common-subexpressions,dead-code"


def programs(model: nn.Module | str, pipeline: str) -> tuple[Program, Program]:
    """The force program of a model without and with guards, made fit for a target."""
    energy = fxpass.run_passes(fxpass.capture(model), BEFORE).program
    free, guarded = (fxpass.run_passes(energy, f"{guard}{AFTER},{pipeline}").program for guard in ("", "guard-fusion,"))
    return free, guarded


def milliseconds(module: nn.Module, inputs: Sequence[Tensor]) -> float:
    """CPU time of one run: on one thread what a run takes by itself, whoever else uses the machine."""
    start = time.process_time()
    module(*inputs)
    return 1e3 * (time.process_time() - start)


def compare(free: nn.Module, guarded: nn.Module, inputs: Sequence[Tensor], repeats: int) -> tuple[float, ...]:
    """Median times of both in ms, and the quartiles of the ratios of neighbouring runs."""
    for _ in range(5):  # compilers and profiling executors settle
        milliseconds(free, inputs), milliseconds(guarded, inputs)
    pairs = []
    for number in range(repeats):
        order = (free, guarded) if number % 2 else (guarded, free)
        times = {module: milliseconds(module, inputs) for module in order}
        pairs.append((times[free], times[guarded]))
    low, middle, high = statistics.quantiles([with_ / without for without, with_ in pairs], n=4)
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs), low, middle, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model", nargs="?", help="a checkpoint; by default the potential that fxpass ships")
    parser.add_argument("--targets", nargs="+", default=["eager", "torchscript", "inductor"])
    parser.add_argument("--atoms", type=int, default=32)
    parser.add_argument("--edges", type=int, default=1400)
    parser.add_argument("--repeats", type=int, default=101)
    options = parser.parse_args()
    torch.set_num_threads(1)
    registry = default_registry()
    print(f"{options.atoms} atoms, {options.edges} edges, torch {torch.__version__}, CPU time on one thread, medians")
    print(f"{'target':12} {'regions':>8} {'guards':>7} {'without':>10} {'with':>10} {'ratio':>7}   quartiles")
    for name in options.targets:
        target = registry.target(name)()
        free, guarded = programs(options.model or small_potential(torch.float32), target.pipeline)
        inputs = example_inputs(free, {"atoms": options.atoms, "edges": options.edges, "graphs": 1})
        a, b, low, ratio, high = compare(target.lower(free), target.lower(guarded), inputs, options.repeats)
        counts = f"{len(regions(guarded.graph)):8} {len(guards(guarded.graph)):7}"
        print(f"{name:12} {counts} {a:7.2f} ms {b:7.2f} ms {ratio:7.3f}   {low:.3f} to {high:.3f}", flush=True)


if __name__ == "__main__":
    main()
