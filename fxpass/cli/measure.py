"""How long calls take, how much memory they need, and what the machine could do at best."""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from ..ir.cost import Amount
from ..structures import FCC, Structure

Call = Callable[[], object]
K = TypeVar("K", bound=Hashable)

WARM_UP = 2  # calls that are not timed
FEWEST = 3  # calls that are timed, however long they take


def by_turns(calls: Mapping[K, Call], repeat: int, seconds: float = math.inf) -> dict[K, tuple[float, ...]]:
    """Seconds of every call of each, in the order of the calls.

    They take turns, so that a machine that gets slower or faster meanwhile is fair to all.

    Args:
        calls: what to time, by name.
        repeat: timed calls of each.
        seconds: begin no further round once all of them together took so long; there are three rounds at least.
    """
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    taken: dict[K, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(repeat):
        if done >= FEWEST and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: tuple(values) for name, values in taken.items()}


def moved(structure: Structure) -> Structure:
    """The structure with every atom a thousandth of an Angstrom or so further, as a step of dynamics leaves it."""
    steps = np.random.default_rng(0).normal(scale=1e-3, size=structure.positions.shape)
    return replace(structure, positions=structure.positions + steps)


def in_turn(calls: Sequence[Call]) -> Call:
    """One call after the other, and the first again: what is kept between calls on equal positions is of no use."""
    turns = cycle(calls)
    return lambda: next(turns)()


def peak_memory(call: Call) -> int:
    """Bytes that one call holds at most in torch's CPU allocator, beyond what was there before.

    Every allocation and release is in the profiler's trace, so this is the same at every run, unlike the size
    of the process.  Memory that a library takes from the system by itself is not seen, and buffers that are kept from
    one call to the next are seen at the call that makes them.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    made = [event["args"] for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    if not made:
        return 0
    before = made[0]["Total Allocated"] - made[0]["Bytes"]  # what calls recorded earlier have kept counts in the total
    return max(max(each["Total Allocated"] for each in made) - before, 0)


@dataclass(frozen=True)
class Peaks:
    """What the machine does at best on the threads it was measured on.

    Attributes:
        flops: of a matrix product of ``dtype``, in 1/s.
        bandwidth: bytes read and written by ``a = b + s c`` on arrays that fit into no cache, in 1/s.
        dtype: of the elements.
    """

    flops: float
    bandwidth: float
    dtype: str

    @classmethod
    def measure(cls, dtype: torch.dtype = torch.float32, side: int = 1024, mebibytes: int = 64) -> Peaks:
        """The best of ten of each, with torch's present number of threads."""
        square = torch.rand(side, side, dtype=dtype)
        out = torch.empty_like(square)
        elements = mebibytes * 2**20 // dtype.itemsize
        a, b, c = (torch.ones(elements, dtype=dtype) for _ in range(3))
        calls = {
            "product": lambda: torch.matmul(square, square, out=out),
            "triad": lambda: torch.add(b, c, alpha=0.5, out=a),
        }
        best = {name: min(taken) for name, taken in by_turns(calls, 10).items()}
        moved = 3 * elements * dtype.itemsize
        return cls(2 * side**3 / best["product"], moved / best["triad"], str(dtype).removeprefix("torch."))

    def bound(self, amount: Amount) -> float:
        """Seconds below which so much work cannot be done, were it done as it is counted."""
        return max(amount.flops / self.flops, amount.bytes / self.bandwidth)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads for as long as this is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor() -> str:
    """Name of the processor; Python knows it only on some systems."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def crystal(atoms: int, numbers: Sequence[int], cutoff: float, nearest: float | None = None) -> Structure:
    """A rattled fcc crystal of random species with about so many atoms: a multiple of 4, no fewer than asked for.

    One atom is asked for by 1: it is the primitive cell.

    Args:
        atoms: how many.
        numbers: atomic numbers to choose from.
        cutoff: of the model, Angstrom.
        nearest: distance of nearest neighbours, Angstrom; by default 2.5, or 0.55 cutoffs where that is less, as in
            the probe structures.
    """
    a = (min(2.5, 0.55 * cutoff) if nearest is None else nearest) * math.sqrt(2.0)
    rng = np.random.default_rng(0)
    if atoms == 1:
        return Structure(rng.choice(numbers, size=1), np.zeros((1, 3)), a * FCC[1:], (True, True, True), "fcc, 1 atom")
    side = max(1, round((atoms / 4) ** (1 / 3)))
    repeats = np.array([side, side, math.ceil(atoms / (4 * side**2))])
    corners = np.stack(np.meshgrid(*map(np.arange, repeats), indexing="ij"), axis=-1).reshape(-1, 1, 3)
    positions = a * (corners + FCC).reshape(-1, 3)
    return Structure(
        rng.choice(numbers, size=len(positions)),
        positions + rng.normal(scale=0.02 * a, size=positions.shape),
        a * np.diag(repeats),
        (True, True, True),
        f"fcc {'x'.join(map(str, repeats))}",
    )


def ms(seconds: Sequence[float]) -> float:
    """The median in milliseconds."""
    return 1e3 * median(seconds)
