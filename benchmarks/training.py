"""A training step of MACE: the package's eager model beside the same parameters through ``fxpass.trainable``.

    python benchmarks/training.py
    python benchmarks/training.py "128x0e+128x1o" --threads 2 --repeats 7

One step is a forward pass on a batch with ``training=True``, a loss on energies, forces and stress, and its backward
pass to all parameters. Both are timed in this process, by turns, as processor time too: it does not depend on what else
the machine does.  Gradients in float64 are compared first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from models import CUTOFF, MODELS, NEAREST, NUMBERS, build
from torch import Tensor, nn

from fxpass.cli.measure import crystal, processor
from fxpass.frontends.mace import mace_batch
from fxpass.training import trainable

ATOMS = (20, 24, 28, 32, 36, 44, 52, 60)  # of the structures of a batch


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    """Eight rattled fcc crystals of 32 to 64 atoms: about so many as ``ATOMS`` asks for, made of whole cells."""
    items = [crystal(atoms, NUMBERS, CUTOFF, NEAREST) for atoms in ATOMS]
    return mace_batch(items, NUMBERS, CUTOFF, ["Default"], dtype)


def loss(result: dict[str, Tensor]) -> Tensor:
    """Huber losses against random references."""
    generator = torch.Generator().manual_seed(0)

    def term(name: str, weight: float) -> Tensor:
        value = result[name]
        reference = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        return weight * nn.functional.huber_loss(value, reference)

    return term("energy", 1.0) + term("forces", 10.0) + term("stress", 1.0)


def step(model: nn.Module, owner: nn.Module, data: dict[str, Tensor]) -> None:
    """Fresh positions, as a loader gives them: MACE makes those it is given require gradients."""
    owner.zero_grad()
    given = {name: value.detach() for name, value in data.items()}
    loss(model(given, training=True, compute_stress=True)).backward()


def gradients(model: nn.Module, owner: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    step(model, owner, data)
    return {name: p.grad.clone() for name, p in owner.named_parameters() if p.grad is not None and p.numel()}


def largest_difference(size: str) -> float:
    """Of gradients in float64, relative to the largest number of each parameter's."""
    model, data = build(MODELS[size], torch.float64), batch(torch.float64)
    expected = gradients(model, model, data)
    found = gradients(trainable(model), model, data)
    return max(float((found[n] - g).abs().max() / g.abs().max().clamp_min(1e-12)) for n, g in expected.items())


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor."""
    clock, processor_time = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processor_time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["64x0e+64x1o"], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-gradients", action="store_true", help="leave out the comparison in float64")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = batch(torch.float32)
    atoms, edges = len(data["positions"]), data["edge_index"].shape[1]
    print(f"{processor()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{len(ATOMS)} structures, {atoms} atoms, {edges} edges, float32, medians of {options.repeats}")
    print(f"{'model':26} {'eager':>9} {'fxpass':>9} {'ratio':>6}   {'ratio of processor time':23} gradients in float64")
    for name in options.models:
        model = build(MODELS[name])
        calls = {"eager": model, "fxpass": trainable(model)}
        taken: dict[str, list[tuple[float, float]]] = {which: [] for which in calls}
        for each in calls.values():
            step(each, model, data)  # kernels are built, memory is asked for
        for _ in range(options.repeats):
            for which, each in calls.items():
                taken[which].append(timed(partial(step, each, model, data)))
        (eager, eager_busy), (ours, busy) = (
            (median(clock for clock, _ in taken[which]), median(used for _, used in taken[which])) for which in calls
        )
        differ = "" if options.no_gradients else f"{largest_difference(name):.1e}"
        ratios = f"{eager / ours:6.1f}   {eager_busy / busy:23.1f}"
        print(f"{name:26} {eager:7.2f} s {ours:7.2f} s {ratios} {differ:>20}", flush=True)


if __name__ == "__main__":
    main()
