"""``fxpass bench``: how much faster is the result than the original?"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from .. import api
from ..frontends.base import Frontend
from ..structures import FCC, Structure, neighbour_list
from . import options
from .answer import Answer
from .doctor import cores
from .options import Commands

EXAMPLES = """
fxpass bench example:small --atoms 256 --threads 1
"""

WARM_UP = 2  # calls that are not timed


def add_to(commands: Commands) -> None:
    """Add the command of this file."""
    parser = commands.add(
        "bench",
        bench,
        "time a model against its optimised form",
        options.model_argument(),
        options.passes_option(),
        options.target_option(),
        options.no_verify_option(),
        options.verification_options("structures to time on in place of a crystal, and to verify on"),
        more="Both run in this process, by turns, on the same inputs; neighbour lists are not counted.",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "--atoms", metavar="N", type=options.positive, default=108, help="size of the crystal to time on (default: 108)"
    )
    parser.add_argument(
        "--repeat", metavar="N", type=options.positive, default=10, help="timed calls of each (default: 10)"
    )
    parser.add_argument(
        "--threads", metavar="N", type=options.positive, help="threads to run on (default: torch's choice)"
    )


@dataclass(frozen=True)
class Timing:
    """Times of calls on one structure, in seconds, in the order of the calls."""

    structure: str
    atoms: int
    edges: int
    computes: str
    original: tuple[float, ...]
    optimised: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return median(self.original) / median(self.optimised)

    def to_json(self) -> dict[str, Any]:
        seconds = {
            name: {"median": median(values), "fastest": min(values), "slowest": max(values)}
            for name, values in (("original", self.original), ("optimised", self.optimised))
        }
        sizes = {"structure": self.structure, "atoms": self.atoms, "edges": self.edges, "computes": self.computes}
        return {**sizes, "seconds": seconds, "ratio": self.ratio}


def bench(arguments: argparse.Namespace) -> Answer:
    given = options.find_structures(arguments.structures)
    model, frontend = api.open_model(options.find_model(arguments.model))
    facts = frontend.attributes(model)
    structures = given or [crystal(arguments.atoms, facts["numbers"], facts["cutoff"])]
    with _threads(arguments.threads), options.progress(stages=6, passes=arguments.passes) as bar:
        result = api.optimize(
            model,
            arguments.passes,
            example=given,
            target=arguments.target,
            budget=arguments.budget,
            verify=not arguments.no_verify,
            observers=[bar],
            progress=bar.stage,
        )
        timings = []
        for structure in structures:
            bar.stage(f"time {structure.name}")
            timings.append(_time(model, result, frontend, structure, arguments.repeat))
        machine = {
            "processor": _processor(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "system": platform.platform(terse=True),
        }
    report = result.report
    data = {
        "model": arguments.model,
        "dtype": facts["dtype"],
        "pipeline": report.pipeline,
        "target": report.target,
        "machine": machine,
        "repeat": arguments.repeat,
        "timings": [timing.to_json() for timing in timings],
        "stages": [{"stage": stage, "seconds": seconds} for stage, seconds in report.timings],
        "verified": report.receipt is not None,
    }
    on = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {machine['torch']}, {data['dtype']}, target {report.target}"
    )
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.timings)
    return Answer(data, (on, _table(timings, arguments.repeat), f"once: {stages}"))


def _table(timings: list[Timing], repeat: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left", title_style="")
    table.title = f"{timings[0].computes}, medians of {repeat} calls"
    for heading in ("structure", "atoms", "edges", "original", "optimised", "µs/atom", "ratio"):
        table.add_column(heading, header_style="bright_black", justify="left" if heading == "structure" else "right")
    for timing in timings:
        optimised = median(timing.optimised)
        table.add_row(
            Text(timing.structure),
            str(timing.atoms),
            str(timing.edges),
            f"{median(timing.original) * 1e3:.2f} ms",
            f"{optimised * 1e3:.2f} ms",
            f"{optimised / timing.atoms * 1e6:.1f}",
            Text(f"{timing.ratio:.2f}x", "bold"),
        )
    return table


def _time(model: nn.Module, result: nn.Module, frontend: Frontend, structure: Structure, repeat: int) -> Timing:
    """Time both by turns, so that a machine that gets slower or faster meanwhile is fair to both."""
    facts = frontend.attributes(model)
    edges, _ = neighbour_list(structure, facts["cutoff"])
    computes = "energy and forces" if frontend.evaluate(model, structure).stress is None else "energy, forces, stress"
    calls = [_call(module, frontend, structure) for module in (model, result)]
    for _ in range(WARM_UP):
        for call in calls:
            call()
    seconds: list[list[float]] = [[], []]
    for _ in range(repeat):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return Timing(structure.name, len(structure), edges.shape[1], computes, tuple(seconds[0]), tuple(seconds[1]))


def _call(module: nn.Module, frontend: Frontend, structure: Structure) -> Callable[[], object]:
    """The call that the family makes of ``module`` to evaluate ``structure``, without what it does around it."""
    seen: list[tuple[Any, Any]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        frontend.evaluate(module, structure)
    finally:
        hook.remove()
    args, kwargs = seen[0]
    return lambda: module(*args, **kwargs)


def crystal(atoms: int, numbers: list[int], cutoff: float) -> Structure:
    """A rattled fcc crystal of random species with about so many atoms: a multiple of 4, no fewer than asked for.

    Nearest neighbours are 2.5 Angstrom apart, or 0.55 cutoffs where that is less, as in the probe structures.
    """
    side = max(1, round((atoms / 4) ** (1 / 3)))
    repeats = np.array([side, side, math.ceil(atoms / (4 * side**2))])
    corners = np.stack(np.meshgrid(*map(np.arange, repeats), indexing="ij"), axis=-1).reshape(-1, 1, 3)
    a = min(2.5, 0.55 * cutoff) * math.sqrt(2.0)
    positions = a * (corners + FCC).reshape(-1, 3)
    rng = np.random.default_rng(0)
    return Structure(
        rng.choice(numbers, size=len(positions)),
        positions + rng.normal(scale=0.02 * a, size=positions.shape),
        a * np.diag(repeats),
        (True, True, True),
        f"fcc {'x'.join(map(str, repeats))}",
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads for as long as this is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    """Name of the processor; Python knows it only on some systems."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
