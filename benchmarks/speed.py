"""Time, memory, compile time and accuracy of a model, its compilers' results and fxpass's, side by side.

    python benchmarks/speed.py                                      # the four random models, 108 atoms
    python benchmarks/speed.py --models PATH --targets native eager --compilers all --threads 1 2
    python benchmarks/speed.py --atoms 1 8 108 500 2000 4000 --plot scaling.svg --json scaling.json

Everything is timed in this process and by turns: energy and forces, dict in, dict out, on inputs that are prepared
once.  The second time is that of a step of dynamics in ASE, with conversion, neighbour list and stress.
docs/performance.md says what each column means.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from models import MODELS, NEAREST, find
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxpass
from fxpass._torch_compat import aot_compile
from fxpass.api import open_model, run_passes
from fxpass.capture.capture import copy_model
from fxpass.cli.measure import Call, Peaks, by_turns, crystal, in_turn, moved, peak_memory, processor, threads
from fxpass.frontends.base import dtype_of
from fxpass.frontends.mace import mace_batch
from fxpass.ir.cost import Cost, program_cost
from fxpass.lowering import legal
from fxpass.registry import default_registry
from fxpass.render.svg import Series, line_plot
from fxpass.structures import Structure
from fxpass.targets.base import LEGAL, executable
from fxpass.verify.receipt import on_float32_grid

EAGER = "eager model"
#: compilers that --compilers names, the fast ones first
COMPILERS = ("e3nn TorchScript", "torch.compile", "AOTInductor")
MOVE = 0.01  # Angstrom, by which atoms move between steps of ASE


@dataclass(frozen=True)
class Candidate:
    """One way to evaluate a model.

    Attributes:
        name: in the table.
        run: MACE's data dict -> the outputs, with forces.
        compile: seconds until the first result was there.
        cost: of the program that runs, where it is known.
        calculator: makes an ASE calculator of it.
    """

    name: str
    run: Callable[[dict[str, Tensor]], dict[str, Tensor | None]]
    compile: float = 0.0
    cost: Cost | None = None
    calculator: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table; what was not measured is None.  Times are seconds, memory is bytes.

    Attributes:
        median, fastest: of calls of the model.
        ratio: median of the eager model over this one's, measured in the same rounds.
        step: median of a step of ASE.
        memory: the largest allocation during a call beyond what was there before.
        compile: until the first result was there.
        cold, warm: the same in a new process with empty caches, and in another one after that.
        flops, bytes: of the program that runs, by its cost expressions.
        bound: below which the machine cannot do that work.
        energy_error, force_error: against the original in float64, eV/atom and the largest component in eV/Angstrom.
        note: why there are no numbers.
    """

    model: str
    candidate: str
    threads: int
    atoms: int
    edges: int
    median: float | None = None
    fastest: float | None = None
    ratio: float | None = None
    step: float | None = None
    memory: int | None = None
    compile: float | None = None
    cold: float | None = None
    warm: float | None = None
    flops: float | None = None
    bytes: float | None = None
    bound: float | None = None
    energy_error: float | None = None
    force_error: float | None = None
    note: str = ""


# --- candidates


def eager(model: nn.Module) -> Candidate:
    def mace_calculator() -> Any:
        from mace.calculators import MACECalculator

        with default_dtype_kept():
            dtype = str(dtype_of(model)).removeprefix("torch.")
            return MACECalculator(models=[copy_model(model)], default_dtype=dtype)

    return Candidate(EAGER, lambda data: model(data, compute_stress=False), calculator=mace_calculator)


def e3nn_torchscript(model: nn.Module) -> Candidate:
    """The whole model by e3nn's own compiler, as MACE's exports to LAMMPS are made."""
    from e3nn.util import jit

    scripted = jit.compile(copy_model(model))
    return Candidate(COMPILERS[0], lambda data: scripted(data, compute_stress=False))


def torch_compile(model: nn.Module) -> Candidate:
    """As MACE's calculator compiles: e3nn's code generation off, autograd inside the graph."""
    from mace.tools.compile import prepare

    prepared = prepare(copy_model)(model).requires_grad_(False)
    compiled = torch.compile(prepared)

    def run(data: dict[str, Tensor]) -> dict[str, Tensor | None]:
        leaves = {name: data[name].clone().requires_grad_(True) for name in ("positions", "node_attrs")}
        return compiled({**data, **leaves}, compute_stress=False, training=True)

    return Candidate(COMPILERS[1], run)


def aot_inductor(model: nn.Module) -> Candidate:
    """The joint graph of energy and forces that fxpass captures, untouched by its passes."""
    _, frontend = open_model(model)
    program = run_passes(frontend.capture(model), f"differentiate,{LEGAL}").program
    sizes = {"atoms": 7, "edges": 13, "graphs": 1}
    examples, dynamic = [], []
    for spec in program.inputs:
        examples.append(torch.zeros([sizes.get(dim, dim) for dim in spec.dims], dtype=spec.dtype))
        dynamic.append({axis: dim for axis, dim in enumerate(spec.dims) if dim in ("atoms", "edges")})
    compiled = aot_compile(executable(program), examples, dynamic)
    interface = frontend.interface(compiled, compiled, frontend.attributes(model))
    return Candidate(COMPILERS[2], lambda data: interface(data, compute_stress=False))


def ours(preset: str, target: str) -> str:
    return f"fxpass {preset}, {target}"


def optimised(model: nn.Module, preset: str, target: str) -> Candidate:
    result = fxpass.optimize(model, preset, target=target, verify=False)
    program = legal(result.program, result.target, default_registry()).program
    return Candidate(
        ours(preset, target),
        lambda data: result(data, compute_stress=False),
        cost=program_cost(program),
        calculator=result.calculator,
    )


MAKE = dict(zip(COMPILERS, (e3nn_torchscript, torch_compile, aot_inductor), strict=True))


def candidates(
    model: nn.Module, options: argparse.Namespace, first: dict[str, Tensor]
) -> Iterator[Candidate | tuple[str, str]]:
    """What can be made, each after its first call on ``first``; name and reason of what cannot."""
    yield eager(model)
    makers: dict[str, Callable[[], Candidate]] = {name: partial(MAKE[name], model) for name in options.chosen_compilers}
    for preset in options.presets:
        for target in options.targets:
            makers[ours(preset, target)] = partial(optimised, model, preset, target)
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            made = make()
            made.run(first)
        except Exception as error:  # compilers raise anything; what they refuse is a result, and the table says so
            reason = " ".join(str(error).split()) or type(error).__name__
            yield name, reason[:300]
        else:
            yield replace(made, compile=time.perf_counter() - start)


# --- measurements


@contextmanager
def default_dtype_kept() -> Iterator[None]:
    """mace-torch's calculator changes torch's default dtype and leaves it changed."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def step(calculator: Any, structure: Structure) -> Call:
    """A step of ASE without its integrator: the atoms have moved, and their calculator is asked."""
    atoms, rng = structure.to_ase(), np.random.default_rng(0)

    def run() -> None:
        atoms.positions += rng.normal(scale=MOVE / math.sqrt(3), size=atoms.positions.shape)
        with default_dtype_kept():
            calculator.calculate(atoms, ["energy", "forces"])

    return run


def errors(found: dict[str, Tensor | None], exact: dict[str, Tensor | None], atoms: int) -> tuple[float, float]:
    """Of the energy per atom and of the worst component of a force."""
    energy, forces = ((found[k].detach().double() - exact[k].detach()).abs() for k in ("energy", "forces"))
    return float(energy.max()) / atoms, float(forces.max())


def available_memory() -> float:
    """Bytes that this machine can still give; endless where it does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


def compile_times(word: str, preset: str, target: str, dtype: str | None) -> tuple[float, float]:
    """Seconds of ``optimize`` and one call in a new process with empty caches, and in a second one after it."""
    words = ["--compile-once", word, preset, target, *(["--dtype", dtype] if dtype else [])]
    with tempfile.TemporaryDirectory() as folder:
        caches = {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor")}
        found = []
        for _ in range(2):
            command = [sys.executable, __file__, *words]
            done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, check=True)
            found.append(float(done.stdout.split()[-1]))
    return found[0], found[1]


def compile_once(word: str, preset: str, target: str, dtype: torch.dtype | None) -> float:
    """Seconds of ``optimize`` and one call."""
    model = find(word, dtype)
    data = batch(model, crystal(8, facts(model)["numbers"], facts(model)["cutoff"], NEAREST))
    start = time.perf_counter()
    optimised(model, preset, target).run(data)
    return time.perf_counter() - start


def facts(model: nn.Module) -> dict[str, Any]:
    return open_model(model)[1].attributes(model)


def batch(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    known = facts(model)
    return mace_batch([structure], known["numbers"], known["cutoff"], known["heads"], dtype_of(model))


def measure(word: str, options: argparse.Namespace) -> Iterator[Row]:
    """All rows of one model."""
    model = find(word, options.torch_dtype)
    exact, known = copy_model(model).double(), facts(model)
    name = word if word in MODELS else Path(word).stem
    structures = [on_float32_grid(crystal(n, known["numbers"], known["cutoff"], NEAREST)) for n in options.atoms]
    structures = list({len(s): s for s in sorted(structures, key=len)}.values())
    chosen = []
    for made in candidates(model, options, batch(model, structures[0])):
        if isinstance(made, Candidate):
            chosen.append(made)
        else:
            yield Row(name, made[0], options.threads[0], 0, 0, note=made[1])
    times = {}
    if options.cold:
        compiled = {made.name for made in chosen}
        pairs = [(p, t) for p in options.presets for t in options.targets if ours(p, t) in compiled]
        times = {ours(*pair): compile_times(word, *pair, options.dtype) for pair in pairs}
    needs: dict[str, float] = {}  # bytes an atom, at the last size
    for structure in structures:
        data, atoms = batch(model, structure), len(structure)
        edges = data["edge_index"].shape[1]
        fits = {made.name: made for made in chosen if fit(made, needs, atoms, options.up_to)}
        memory = {key: peak_memory(partial(made.run, data)) for key, made in fits.items()}
        needs |= {key: value / atoms for key, value in memory.items()}
        accuracy: dict[str, tuple[float, float]] = {}
        if EAGER in fits:
            wide = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
            reference = exact(wide, compute_stress=False)
            accuracy = {key: errors(made.run(data), reference, atoms) for key, made in fits.items()}
        for count in options.threads:
            with threads(count):
                peaks = Peaks.measure(dtype_of(model))
                each = [data, batch(model, moved(structure))]
                calls = {k: in_turn([partial(m.run, d) for d in each]) for k, m in fits.items()}
                taken = by_turns(calls, options.repeat, options.seconds)
                asked = {k: step(m.calculator(), structure) for k, m in fits.items() if m.calculator is not None}
                steps = {} if options.no_ase else by_turns(asked, options.repeat, options.seconds)
            for key, made in fits.items():
                row = Row(name, key, count, atoms, edges, median(taken[key]), min(taken[key]))
                row = replace(row, memory=memory[key], compile=made.compile)
                row = replace(row, **dict(zip(("cold", "warm"), times.get(key, ()), strict=False)))
                row = replace(row, **dict(zip(("energy_error", "force_error"), accuracy.get(key, ()), strict=False)))
                if EAGER in taken:
                    row = replace(row, ratio=median(taken[EAGER]) / median(taken[key]))
                if key in steps:
                    row = replace(row, step=median(steps[key]))
                if made.cost is not None:
                    amount = made.cost.at(atoms=atoms, edges=edges, graphs=1)
                    row = replace(row, flops=amount.flops, bytes=amount.bytes, bound=peaks.bound(amount))
                yield row


def fit(made: Candidate, needs: Mapping[str, float], atoms: int, up_to: int) -> bool:
    """Whether a candidate runs at this size: as asked for, and with memory to spare."""
    return (atoms <= up_to or made.cost is not None) and 1.2 * needs.get(made.name, 0.0) * atoms < available_memory()


# --- output

COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("", lambda r: r.candidate),
    ("threads", lambda r: str(r.threads)),
    ("atoms", lambda r: str(r.atoms)),
    ("edges", lambda r: str(r.edges)),
    ("ms", lambda r: _number(r.median, 1e3)),
    ("fastest", lambda r: _number(r.fastest, 1e3)),
    ("ratio", lambda r: _number(r.ratio, 1, "x")),
    ("ASE ms", lambda r: _number(r.step, 1e3)),
    ("MB", lambda r: _number(r.memory, 1e-6)),
    ("GFLOP", lambda r: _number(r.flops, 1e-9)),
    ("GB", lambda r: _number(r.bytes, 1e-9)),
    ("bound ms", lambda r: _number(r.bound, 1e3)),
    ("of bound", lambda r: "" if r.bound is None or r.median is None else f"{r.bound / r.median:.0%}"),
    ("compile s", lambda r: _number(r.compile, 1)),
    ("cold s", lambda r: _number(r.cold, 1)),
    ("warm s", lambda r: _number(r.warm, 1)),
    ("dE eV/atom", lambda r: "" if r.energy_error is None else f"{r.energy_error:.0e}"),
    ("dF eV/A", lambda r: "" if r.force_error is None else f"{r.force_error:.0e}"),
)


def _number(value: float | None, factor: float, unit: str = "") -> str:
    if value is None:
        return ""
    value *= factor
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"


def table(title: str, rows: Sequence[Row]) -> Table:
    shown = Table(title=title, box=None, pad_edge=False, padding=(0, 1), title_justify="left")
    for heading, cell in COLUMNS:
        if heading == "" or any(cell(row) for row in rows):
            shown.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        shown.add_row(*(cell(row) for h, cell in COLUMNS if h == "" or any(cell(r) for r in rows)))
    return shown


def plot(rows: Sequence[Row]) -> str:
    """Time of a call over the number of atoms, a line for each model, candidate and number of threads."""
    lines: dict[str, list[Row]] = {}
    several = [len({getattr(row, field) for row in rows}) > 1 for field in ("model", "threads")]
    for row in rows:
        words = [row.model] * several[0] + [row.candidate] + [f"{row.threads} threads"] * several[1]
        lines.setdefault(", ".join(words), []).append(row)
    series = [Series(name, [r.atoms for r in own], [1e3 * (r.median or math.nan) for r in own])
              for name, own in lines.items()]  # fmt: skip
    width = max(720, 90 + sum(44 + 8 * len(name) for name in lines))
    return line_plot(series, title="Energy and forces", x_label="atoms", y_label="ms", log_x=True, log_y=True,
                     width=width)  # fmt: skip


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL",
                        help=f"checkpoints of MACE, or of {', '.join(MODELS)} (default: these)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "float64"), help="of the model (default: its own)")
    parser.add_argument("--presets", nargs="+", default=["default"], metavar="PIPELINE", help="passes of fxpass")
    parser.add_argument("--targets", nargs="+", default=["native"], metavar="TARGET", help="targets of fxpass")
    parser.add_argument("--compilers", nargs="*", default=[], metavar="NAME",
                        help=f"other compilers: all, or of {', '.join(COMPILERS)}; they take minutes")  # fmt: skip
    parser.add_argument("--atoms", nargs="+", type=int, default=[108], metavar="N", help="sizes (default: 108)")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], metavar="N")
    parser.add_argument("--repeat", type=int, default=15, metavar="N", help="rounds, one call of each (default: 15)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S",
                        help="begin no further round after so long, but three at least (default: 60)")  # fmt: skip
    parser.add_argument("--up-to", type=int, default=10**9, metavar="N",
                        help="atoms up to which the original and other compilers run")  # fmt: skip
    parser.add_argument("--no-ase", action="store_true", help="leave out the step of ASE")
    parser.add_argument("--cold", action="store_true", help="compile in new processes too, with caches empty and full")
    parser.add_argument("--json", metavar="FILE", help="write all rows here too")
    parser.add_argument("--plot", metavar="FILE", help="write times over sizes here, as SVG")
    parser.add_argument("--compile-once", nargs=3, metavar=("MODEL", "PIPELINE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.torch_dtype = None if options.dtype is None else getattr(torch, options.dtype)
    options.chosen_compilers = COMPILERS if "all" in options.compilers else options.compilers
    for name in options.chosen_compilers:
        if name not in MAKE:
            parser.error(f"there is no compiler {name!r}; one of all, {', '.join(COMPILERS)}")
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    if options.compile_once:
        print(compile_once(*options.compile_once, options.torch_dtype))
        return 0
    peaks = {}
    for count in options.threads:
        with threads(count):
            peaks[count] = Peaks.measure(options.torch_dtype or torch.float32)
    console = Console(width=220)
    best = "; ".join(f"{n} threads {p.flops / 1e9:.0f} GFLOP/s, {p.bandwidth / 1e9:.1f} GB/s" for n, p in peaks.items())
    console.print(f"{processor()}, torch {torch.__version__}; at best {best}")
    rows: list[Row] = []
    for word in options.models:
        own = []
        for row in measure(word, options):
            own.append(row)
            print(f"{row.model}: {row.candidate}, {row.atoms} atoms: {_number(row.median, 1e3)} ms {row.note}",
                  file=sys.stderr)  # fmt: skip
        console.print(table(own[0].model, [row for row in own if row.median is not None]))
        for row in own:
            if row.note:
                console.print(f"{row.candidate}: {row.note}")
        rows += own
    timed = [row for row in rows if row.median is not None]
    if options.plot:
        Path(options.plot).write_text(plot(timed))
    if options.json:
        machine = {"processor": processor(), "torch": torch.__version__}
        found = {"peaks": {k: asdict(p) for k, p in peaks.items()}, "rows": [asdict(row) for row in rows]}
        data = {**machine, **found}
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
