"""Time of energy and forces on a CUDA device: eager MACE, torch.compile, cuEquivariance, and fxpass's target triton.

    python benchmarks/gpu.py                                         # the four random models, 108 and 500 atoms
    python benchmarks/gpu.py --models 128x0e --atoms 8 108 500 4000 --json results.json

All are timed in this process and by turns, dict in, dict out, on inputs that lie on the device; a call ends when the
device has finished.  The file that is written, by default gpu-DEVICE.json, says which device it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from models import MODELS, NEAREST, find
from torch import Tensor, nn

import fxpass
from fxpass.api import open_model
from fxpass.capture.capture import copy_model
from fxpass.cli.measure import by_turns, crystal
from fxpass.errors import FxpassError, UsageError
from fxpass.frontends.base import dtype_of
from fxpass.frontends.mace import mace_batch

Data = dict[str, Tensor]
Run = Callable[[Data], dict[str, Tensor | None]]


@dataclass(frozen=True)
class Row:
    """One line of the result; times are seconds, memory is bytes.

    Attributes:
        median, fastest: of calls; None where there are none, for the reason in ``note``.
        ratio: median of the eager model over this one's.
        memory: the largest allocation of torch during a call beyond what was there before.
        compile: until the first result was there.
        force_error: largest component of the difference from the original in float64, eV/Angstrom.
    """

    model: str
    candidate: str
    atoms: int
    edges: int
    median: float | None = None
    fastest: float | None = None
    ratio: float | None = None
    memory: int | None = None
    compile: float | None = None
    force_error: float | None = None
    note: str = ""


def the_device() -> torch.device:
    """The current CUDA device.

    Raises:
        UsageError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            "this benchmark needs a CUDA device, and torch sees none", hint="benchmarks/speed.py, on this CPU"
        )
    return torch.device("cuda", torch.cuda.current_device())


# --- candidates: a model on the CPU -> what runs on the device


def eager(model: nn.Module, device: torch.device) -> Run:
    here = copy_model(model).to(device)
    return lambda data: here(data, compute_stress=False)


def torch_compile(model: nn.Module, device: torch.device) -> Run:
    """As MACE's calculator compiles: e3nn's code generation off, autograd inside the graph."""
    from mace.tools.compile import prepare

    compiled = torch.compile(prepare(copy_model)(model).to(device).requires_grad_(False))

    def run(data: Data) -> dict[str, Tensor | None]:
        leaves = {name: data[name].clone().requires_grad_(True) for name in ("positions", "node_attrs")}
        return compiled({**data, **leaves}, compute_stress=False, training=True)

    return run


def cuequivariance(model: nn.Module, device: torch.device) -> Run:
    """MACE's own conversion to NVIDIA's library.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    for name in ("cuequivariance", "cuequivariance_torch"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
    from mace.cli.convert_e3nn_cueq import run as convert

    before = torch.get_default_dtype()
    try:
        here = convert(copy_model(model), device="cuda").to(device)
    finally:
        torch.set_default_dtype(before)
    return lambda data: here(data, compute_stress=False)


def kernels(model: nn.Module, device: torch.device) -> Run:
    optimized = fxpass.optimize(copy_model(model), target="triton")
    optimized.interface.to(device)
    return lambda data: optimized(data, compute_stress=False)


EAGER = "eager MACE"
CANDIDATES = {EAGER: eager, "torch.compile": torch_compile, "cuEquivariance": cuequivariance, "fxpass": kernels}


# --- measurement


def finished(run: Run, data: Data) -> dict[str, Tensor | None]:
    """A call, until the device has nothing left to do."""
    found = run(data)
    torch.cuda.synchronize()
    return found


def peak_memory(run: Run, data: Data) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    finished(run, data)
    return torch.cuda.max_memory_allocated() - before


def measure(word: str, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """All rows of one model."""
    model = find(word, getattr(torch, options.dtype))
    facts = open_model(model)[1].attributes(model)
    name = word if word in MODELS else Path(word).stem
    structures = [crystal(atoms, facts["numbers"], facts["cutoff"], NEAREST) for atoms in options.atoms]

    def batch(structure: fxpass.Structure, dtype: torch.dtype) -> Data:
        made = mace_batch([structure], facts["numbers"], facts["cutoff"], facts["heads"], dtype)
        return {key: value.to(device) for key, value in made.items()}

    runs, compiled = {}, {}
    for candidate in options.candidates:
        start = time.perf_counter()
        try:
            runs[candidate] = CANDIDATES[candidate](model, device)
            finished(runs[candidate], batch(structures[0], dtype_of(model)))
        except (ModuleNotFoundError, FxpassError, RuntimeError) as error:
            runs.pop(candidate, None)
            yield Row(name, candidate, 0, 0, note=f"{type(error).__name__}: {str(error).splitlines()[0]}")
        compiled[candidate] = time.perf_counter() - start
    exact = eager(copy_model(model).double(), device)
    for structure in structures:
        data = batch(structure, dtype_of(model))
        wanted = finished(exact, batch(structure, torch.float64))["forces"]
        errors, memory = {}, {}
        for candidate, run in runs.items():
            forces = finished(run, data)["forces"]
            errors[candidate] = (forces.detach().double() - wanted.detach()).abs().max().item()
            memory[candidate] = peak_memory(run, data)
        calls = {candidate: partial(finished, run, data) for candidate, run in runs.items()}
        for candidate, taken in (times := by_turns(calls, options.repeat, options.seconds)).items():
            ratio = median(times[EAGER]) / median(taken) if EAGER in times else None
            yield Row(
                name,
                candidate,
                len(structure),
                data["edge_index"].shape[1],
                median(taken),
                min(taken),
                ratio,
                memory[candidate],
                compiled[candidate],
                errors[candidate],
            )


def line(row: Row) -> str:
    if row.median is None:
        return f"{row.model:26} {row.candidate:15} {row.note}"
    ratio = "" if row.ratio is None else f"{row.ratio:6.1f}x"
    cells = f"{row.atoms:6} atoms {1e3 * row.median:9.3f} ms {ratio} {(row.memory or 0) / 2**20:8.0f} MiB"
    return f"{row.model:26} {row.candidate:15} {cells}  dF {row.force_error:.0e} eV/A"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL",
                        help=f"checkpoints of MACE, or of {', '.join(MODELS)} (default: these)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--atoms", nargs="+", type=int, default=[108, 500], metavar="N")
    parser.add_argument("--repeat", type=int, default=20, metavar="N", help="rounds, one call of each (default: 20)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="begin no further round after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows here (default: gpu-DEVICE.json)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    try:
        device = the_device()
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}")
    rows = []
    for word in options.models:
        for row in measure(word, options, device):
            print(line(row), flush=True)
            rows.append(row)
    file = options.json or Path(f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.json")
    found = {"device": name, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    file.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
