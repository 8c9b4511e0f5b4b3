"""``fxpass bench``: how much faster is the result than the original?"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any, TypeVar

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from .. import api
from ..frontends.base import Frontend
from ..ir.cost import Cost, program_cost
from ..ir.program import Program
from ..lowering import legal, lower
from ..optimized import Optimized
from ..passes import Pass
from ..pipeline import resolve
from ..registry import default_registry
from ..runner import PassRecord, run
from ..structures import Structure, neighbour_list
from . import options
from .answer import Answer
from .doctor import cores
from .measure import Call, Peaks, by_turns, crystal, in_turn, moved, ms, peak_memory, processor, threads
from .options import Commands

K = TypeVar("K", bound=Hashable)

EXAMPLES = """
fxpass bench example:small --atoms 256 --threads 1
fxpass bench example:small --atoms 4 32 -p dead-irreps --no-verify --memory --roofline
"""

ORIGINAL = "original"


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
        more="All run in this process, by turns, on the same inputs; neighbour lists are not counted.",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "--atoms",
        metavar="N",
        type=options.positive,
        nargs="+",
        default=[108],
        help="sizes of the crystals to time on (default: 108)",
    )
    parser.add_argument(
        "--repeat", metavar="N", type=options.positive, default=10, help="timed calls of each (default: 10)"
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=options.positive,
        nargs="+",
        default=[None],
        help="threads to run on, one after the other (default: torch's choice)",
    )
    parser.add_argument(
        "--presets", metavar="PIPELINE", nargs="+", default=[], help="further passes to compare, each with each target"
    )
    parser.add_argument("--targets", metavar="TARGET", nargs="+", default=[], help="further targets to compare")
    parser.add_argument("--memory", action="store_true", help="what each call allocates at most")
    parser.add_argument(
        "--roofline", action="store_true", help="what the machine could do at best with the work that the result is"
    )
    parser.add_argument(
        "--each-pass", action="store_true", help="the program after every pass: gain by its cost, and as measured"
    )


@dataclass(frozen=True)
class Timing:
    """Times of calls of the original and one result on one structure, in seconds, in the order of the calls.

    Attributes:
        structure: its name; ``atoms`` and ``edges`` are its sizes.
        computes: what a call computes, in words.
        original, optimised: the times.
        passes: of the result, as they were asked for.
        target: of the result.
        threads: on which both ran.
        memory: bytes that a call of the original and of the result allocates at most; None where not asked for.
        bound: seconds below which the machine cannot do the result's work; None where not asked for.
    """

    structure: str
    atoms: int
    edges: int
    computes: str
    original: tuple[float, ...]
    optimised: tuple[float, ...]
    passes: str = ""
    target: str = ""
    threads: int = 1
    memory: tuple[int, int] | None = None
    bound: float | None = None

    @property
    def ratio(self) -> float:
        return median(self.original) / median(self.optimised)

    def to_json(self) -> dict[str, Any]:
        seconds = {
            name: {"median": median(values), "fastest": min(values), "slowest": max(values)}
            for name, values in ((ORIGINAL, self.original), ("optimised", self.optimised))
        }
        return {
            "structure": self.structure,
            "atoms": self.atoms,
            "edges": self.edges,
            "computes": self.computes,
            "passes": self.passes,
            "target": self.target,
            "threads": self.threads,
            "seconds": seconds,
            "ratio": self.ratio,
            "memory": None if self.memory is None else dict(zip((ORIGINAL, "optimised"), self.memory, strict=True)),
            "bound": self.bound,
        }


@dataclass(frozen=True)
class Step:
    """The program after one more pass.

    Attributes:
        name: of the pass; the first is what was captured.
        expected: seconds below which the machine cannot do its work as the cost expressions count it.
        seconds: of its calls.
    """

    name: str
    expected: float
    seconds: tuple[float, ...]


def bench(arguments: argparse.Namespace) -> Answer:
    given = options.find_structures(arguments.structures)
    model, frontend = api.open_model(options.find_model(arguments.model))
    facts = frontend.attributes(model)
    heads = facts.get("heads", [])
    head = heads[0] if len(heads) > 1 else None  # a model may refuse to choose
    structures = given or [replace(crystal(n, facts["numbers"], facts["cutoff"]), head=head) for n in arguments.atoms]
    wanted = [
        (passes, target)
        for passes in dict.fromkeys([arguments.passes, *arguments.presets])
        for target in dict.fromkeys([arguments.target, *arguments.targets])
    ]
    programs = _Programs()
    results: dict[tuple[str, str], Optimized] = {}
    timings: list[Timing] = []
    steps: list[Step] = []
    with options.progress(stages=6 * len(wanted), passes=arguments.passes) as bar:
        for passes, target in wanted:
            with threads(arguments.threads[0]):
                results[passes, target] = api.optimize(
                    model,
                    passes,
                    example=given,
                    target=target,
                    budget=arguments.budget,
                    verify=not arguments.no_verify,
                    observers=[bar] if results else [bar, programs],
                    progress=bar.stage,
                )
        for structure in structures:
            for count in arguments.threads:
                bar.stage(f"time {structure.name}")
                with threads(count):
                    timings += _time(model, results, frontend, structure, arguments)
        if arguments.each_pass:
            bar.stage("time the program after every pass")
            with threads(arguments.threads[0]):
                steps = _steps(programs, results[wanted[0]], structures[0], arguments.repeat)
        machine = {
            "processor": processor(),
            "cores": cores(),
            "threads": timings[0].threads,
            "torch": torch.__version__,
            "system": platform.platform(terse=True),
        }
    report = results[wanted[0]].report
    data = {
        "model": arguments.model,
        "dtype": facts["dtype"],
        "pipeline": report.pipeline,
        "target": report.target,
        "machine": machine,
        "repeat": arguments.repeat,
        "timings": [timing.to_json() for timing in timings],
        "each_pass": [
            {"pass": step.name, "expected": step.expected, "median": median(step.seconds)} for step in steps
        ],
        "stages": [{"stage": stage, "seconds": seconds} for stage, seconds in report.timings],
        "verified": report.receipt is not None,
    }
    on = (
        f"{machine['processor']}, {machine['cores']} cores, {', '.join(str(n) for n in _threads(timings))} threads, "
        f"torch {machine['torch']}, {data['dtype']}"
    )
    shown: list[Any] = [on, timing_table(timings, arguments.repeat)]
    if steps:
        shown.append(steps_table(steps))
    for (passes, target), result in results.items():
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.report.timings)
        shown.append(f"once, {passes} to {target}: {stages}")
    return Answer(data, shown)


def _threads(timings: Sequence[Timing]) -> list[int]:
    return list(dict.fromkeys(timing.threads for timing in timings))


def timing_table(timings: Sequence[Timing], repeat: int) -> Table:
    """One line for each timing; columns that nobody asked for are left out."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left", title_style="")
    table.title = f"{timings[0].computes}, medians of {repeat} calls"
    columns: list[tuple[str, Callable[[Timing], str]]] = [
        ("structure", lambda t: t.structure),
        ("passes", lambda t: t.passes),
        ("target", lambda t: t.target),
        ("atoms", lambda t: str(t.atoms)),
        ("edges", lambda t: str(t.edges)),
        ("threads", lambda t: str(t.threads)),
        (ORIGINAL, lambda t: f"{ms(t.original):.2f} ms"),
        ("optimised", lambda t: f"{ms(t.optimised):.2f} ms"),
        ("µs/atom", lambda t: f"{1e3 * ms(t.optimised) / t.atoms:.1f}"),
        ("memory", lambda t: "" if t.memory is None else f"{t.memory[0] / 1e6:.1f} -> {t.memory[1] / 1e6:.1f} MB"),
        ("bound", lambda t: "" if t.bound is None else f"{1e3 * t.bound:.2f} ms"),
        ("of bound", lambda t: "" if t.bound is None else f"{t.bound / median(t.optimised):.0%}"),
    ]
    columns = [(heading, cell) for heading, cell in columns if any(cell(timing) for timing in timings)]
    for heading, _ in columns:
        words = heading in ("structure", "passes", "target")
        table.add_column(heading, header_style="bright_black", justify="left" if words else "right")
    table.add_column("ratio", header_style="bright_black", justify="right")
    for timing in timings:
        cells = [Text(cell(timing)) for _, cell in columns]
        table.add_row(*cells, Text(f"{timing.ratio:.2f}x", "bold"))
    return table


def steps_table(steps: Sequence[Step]) -> Table:
    """One line for each program, with its gain over the one before."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left", title_style="")
    table.title = "after every pass that changed the program"
    for heading in ("pass", "bound", "expected gain", "measured", "measured gain"):
        table.add_column(heading, header_style="bright_black", justify="left" if heading == "pass" else "right")
    for before, step in zip([steps[0], *steps], steps, strict=False):
        table.add_row(
            Text(step.name),
            f"{1e3 * step.expected:.2f} ms",
            f"{before.expected / step.expected:.2f}x",
            f"{ms(step.seconds):.2f} ms",
            f"{median(before.seconds) / median(step.seconds):.2f}x",
        )
    return table


def _time(
    model: nn.Module,
    results: dict[tuple[str, str], Optimized],
    frontend: Frontend,
    structure: Structure,
    arguments: argparse.Namespace,
) -> list[Timing]:
    """The original and every result by turns on one structure."""
    facts = frontend.attributes(model)
    edges, _ = neighbour_list(structure, facts["cutoff"])
    computes = "energy and forces" if frontend.evaluate(model, structure).stress is None else "energy, forces, stress"
    calls, whole = calls_of({(ORIGINAL, ""): model, **results}, frontend, structure)
    computes += ", from the structure on" if whole else ""
    memory = {key: peak_memory(call) for key, call in calls.items()} if arguments.memory else {}
    taken = by_turns(calls, arguments.repeat)
    peaks = Peaks.measure(getattr(torch, facts["dtype"])) if arguments.roofline else None
    sizes = {"atoms": len(structure), "edges": edges.shape[1], "graphs": 1}
    return [
        Timing(
            structure.name,
            sizes["atoms"],
            sizes["edges"],
            computes,
            taken[ORIGINAL, ""],
            taken[key],
            *key,
            torch.get_num_threads(),
            (memory[ORIGINAL, ""], memory[key]) if memory else None,
            None if peaks is None else peaks.bound(_cost(result).at(**sizes)),
        )
        for key, result in results.items()
    ]


def _cost(result: Optimized) -> Cost:
    """Of the program that runs: with what the target fuses, or in the ops that it takes apart."""
    return program_cost(legal(result.program, result.target, default_registry()).program)


def calls_of(modules: Mapping[K, nn.Module], frontend: Frontend, structure: Structure) -> tuple[dict[K, Call], bool]:
    """Calls that evaluate ``structure``, and whether they are whole evaluations.

    They are those that the family makes of the modules, without what it does around them.  Where it does not call one
    of them but its parts, as it does with SevenNet's original in float64, evaluations are compared, for all; these get
    the neighbour lists that were made once.  Atoms move from call to call, as in dynamics.
    """
    structures = (structure, moved(structure))
    own = {key: [_own_call(module, frontend, each) for each in structures] for key, module in modules.items()}
    calls = {key: in_turn([call for call in found if call is not None]) for key, found in own.items() if all(found)}
    if len(calls) == len(modules):
        return calls, False

    @cache
    def listed(number: int, cutoff: float) -> Any:
        return neighbour_list(structures[number], cutoff)

    def evaluation(module: nn.Module, number: int) -> Call:
        return lambda: frontend.evaluate(module, structures[number], lambda _, cutoff: listed(number, cutoff))

    turns = range(len(structures))
    return {key: in_turn([evaluation(module, n) for n in turns]) for key, module in modules.items()}, True


def call_of(module: nn.Module, frontend: Frontend, structure: Structure) -> Call:
    """:func:`calls_of` of one module."""
    return calls_of({ORIGINAL: module}, frontend, structure)[0][ORIGINAL]


def _own_call(module: nn.Module, frontend: Frontend, structure: Structure) -> Call | None:
    """The call that the family makes of ``module`` to evaluate ``structure``, if it makes one.

    Each call has copies of its own of the tensors in dictionaries: some models write into these.
    """
    seen: list[tuple[Any, Any]] = []

    def see(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((tuple(map(_fresh, args)), kwargs))

    hook = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        frontend.evaluate(module, structure)
    finally:
        hook.remove()
    if not seen:
        return None
    args, kwargs = seen[0]
    return lambda: module(*map(_fresh, args), **kwargs)


def _fresh(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    copies = copy.copy(given)
    copies.update({k: v.detach().clone() for k, v in given.items() if isinstance(v, torch.Tensor)})
    return copies


class _Programs:
    """Keeps the program after every pass that changed it."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Program]] = []

    def on_pass_start(self, pass_: Pass, program: Program) -> None:
        if not self.kept:
            self.kept.append(("captured", program))

    def on_pass_end(self, record: PassRecord, before: Program, after: Program) -> None:
        if record.modified:
            self.kept.append((record.name, after))


def _steps(programs: _Programs, result: Optimized, structure: Structure, repeat: int) -> list[Step]:
    """Every program lowered to the target of ``result``, and timed by turns."""
    registry = default_registry()
    calls: list[Call] = []
    costs: list[Cost] = []
    for _, kept in programs.kept:
        program = run(kept, resolve("differentiate", registry), check=lambda _: None).program
        fit = legal(program, result.target, registry).program
        costs.append(program_cost(fit))
        interface = lower(fit, result.target, result.frontend, result.facts)
        calls.append(call_of(interface, result.frontend, structure))
    taken = by_turns(dict(enumerate(calls)), repeat)
    peaks = Peaks.measure(getattr(torch, result.facts["dtype"]))
    edges, _ = neighbour_list(structure, result.facts["cutoff"])
    sizes = {"atoms": len(structure), "edges": edges.shape[1], "graphs": 1}
    names = [name for name, _ in programs.kept]
    return [
        Step(name, peaks.bound(cost.at(**sizes)), seconds)
        for name, cost, seconds in zip(names, costs, taken.values(), strict=True)
    ]
