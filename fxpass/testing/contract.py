"""What every pass must keep, whoever wrote it.

::

    def test_my_pass_keeps_the_contract():
        PassContract(MyPass(order=5), [small_program, program_that_does_not_match]).check()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from .._torch_compat import fake_inputs
from ..errors import Location, PassError, PipelineError, UsageError
from ..ir.metadata import provenance
from ..ir.program import Dim, Program, Stage, TensorSpec
from ..ir.verifier import verify
from ..passes import Exactness, Outcome, Pass
from ..pipeline import format_pass, parse
from ..registry import PASSES, Registry, pass_problem
from ..verify.tolerances import ROUNDING

SECTIONS = ("Before / After:", "Holds when:", "Keeps:")
SIZES = ({"atoms": 7, "edges": 19, "graphs": 2}, {"atoms": 1, "edges": 0, "graphs": 1})


@dataclass(frozen=True)
class PassContract:
    """A pass, and the programs on which it is held to its promises.

    Attributes:
        subject: the pass, with its options.
        programs: functions without arguments, each returning a new program at a stage of the pass. The pass
            must change at least one of them; one that it must leave alone belongs here too.
        sizes: named sizes at which values are compared; by default some atoms, and one atom without edges.
        seed: of the random inputs.
        budget: for an approximate pass, the largest absolute error of any output, in the output's unit.
    """

    subject: Pass
    programs: Sequence[Callable[[], Program]]
    sizes: Sequence[Mapping[str, int]] = SIZES
    seed: int = 0
    budget: float | None = None

    def check(self) -> tuple[Outcome, ...]:
        """Check everything; returns one outcome for each program, for further assertions.

        Raises:
            PassError: the first promise that is broken.
            UsageError: the contract itself is not usable: no program, no budget for an approximate pass, or
                a program for which no inputs can be made.
        """
        if not self.programs:
            raise UsageError("A contract needs programs to hold the pass to.", where=self._where())
        if self.subject.exactness is Exactness.APPROXIMATE and self.budget is None:
            raise UsageError("The contract of an approximate pass needs a budget.", where=self._where())
        self.check_declaration()
        self.check_docstring()
        self.check_options()
        outcomes = tuple(self.check_program(make()) for make in self.programs)
        if not any(outcome.modified for outcome in outcomes):
            raise self._broken("changed none of the programs, so that nothing was tested")
        return outcomes

    def check_declaration(self) -> None:
        """The class is a frozen dataclass with a kebab-case name, an exactness class and stages."""
        cls = type(self.subject)
        if problem := pass_problem(cls):
            raise self._broken(problem)
        if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise self._broken("is not frozen")
        if not isinstance(cls.exactness, Exactness):
            raise self._broken(f"has exactness {cls.exactness!r}, which is no member of Exactness")
        if not cls.stages or not set(cls.stages) <= {"energy", "forces", "function"}:
            raise self._broken(f"runs on the stages {cls.stages!r}, not on some of 'energy', 'forces' and 'function'")
        if declared := {"name", "exactness", "stages"} & {f.name for f in fields(cls)}:
            raise self._broken(f"declares {', '.join(sorted(declared))} as an option instead of a ClassVar")

    def check_docstring(self) -> None:
        """The docstring has a one-line summary and the sections that ``fxpass explain`` prints, in their order."""
        lines = [line.strip() for line in (type(self.subject).__doc__ or "").splitlines()] or [""]
        if not lines[0].endswith(".") or any(lines[1:2]):
            raise self._broken("has no one-line summary, a sentence with an empty line after it, in its docstring")
        found = tuple(section for line in lines for section in SECTIONS if line.startswith(section))
        if found != SECTIONS:
            raise self._broken(f"has the sections {found} in its docstring, not {SECTIONS}")

    def check_options(self) -> None:
        """The pass survives the way to pipeline text and back."""
        cls = type(self.subject)
        if "<locals>" in cls.__qualname__:
            raise self._broken("is defined inside a function, where no entry point can name it")
        registry = Registry([EntryPoint(cls.name, f"{cls.__module__}:{cls.__qualname__}", PASSES)])
        text = format_pass(self.subject)
        try:
            returned = parse(text, registry)
        except PipelineError as error:
            raise self._broken(f"has the pipeline text {text!r}, which does not parse: {error}") from error
        if returned != (self.subject,):
            raise self._broken(f"does not come back from its pipeline text {text!r}")

    def check_program(self, program: Program) -> Outcome:
        """Run the pass on a private copy of ``program`` and compare the two."""
        if program.stage not in self.subject.stages:
            raise UsageError(f"The program is at stage {program.stage!r}, where the pass does not run.")
        try:
            verify(program)
        except PassError as error:
            raise UsageError(f"The contract was given a broken program: {error}", where=self._where()) from error
        before, tensors = _structure(program), {name: t.clone() for name, t in _tensors(program).items()}
        given = program.copy()
        copied = _structure(given)  # a copy leaves out the weights that no node reads
        with self._environment_unchanged():
            outcome = self.subject.apply(given)
        if _structure(program) != before:
            raise self._broken("changed the graph of the program it was given a copy of")
        for name, tensor in _tensors(program).items():
            if not _equal(tensor, tensors[name]):
                raise self._broken(f"changed the weight {name} in place")
        result = outcome.program
        changed = _structure(result) != copied
        if outcome.modified and not changed:
            raise self._broken("says that it modified the program, which it did not")
        if changed and not outcome.modified:
            raise self._broken("modified the program and does not say so")
        if result.stage == program.stage and (result.inputs, result.outputs) != (program.inputs, program.outputs):
            raise self._broken("changed the inputs or outputs of the program")
        try:
            verify(result)
        except PassError as error:
            raise self._broken(f"returned a program that the verifier refuses: {error}") from error
        if result.stage in self.subject.stages and self.subject.apply(result.copy()).modified:
            raise self._broken("is not done after one run: a second run changes the program again")
        for number, sizes in enumerate(self.sizes):
            self._check_values(program, result, sizes, self.seed + number)
        return outcome

    def _check_values(self, program: Program, result: Program, sizes: Mapping[str, int], seed: int) -> None:
        inputs = example_inputs(program, sizes, seed)
        expected = run_program(program, inputs)
        by_name = dict(zip((spec.name for spec in program.inputs), inputs, strict=True))
        try:
            actual = run_program(result, tuple(by_name[spec.name] for spec in result.inputs))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # what torch ops raise
            raise self._broken(f"returned a program that does not run at {dict(sizes)}: {error}") from error
        for name in expected.keys() & actual.keys():
            problem = self._difference(expected[name], actual[name])
            if problem:
                raise self._broken(f"{problem} in output {name!r} at {dict(sizes)}")

    def _difference(self, expected: Tensor, actual: Tensor) -> str | None:
        if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
            return f"returns {actual.dtype} {list(actual.shape)}, not {expected.dtype} {list(expected.shape)},"
        if _equal(expected, actual):
            return None
        if self.subject.exactness is Exactness.EXACT or expected.dtype not in ROUNDING:
            return "does not keep the bits"
        # In float64, where a difference of two finite numbers of any of the types is finite.
        error = (expected.double() - actual.double()).abs().max().item()
        if self.subject.exactness is Exactness.APPROXIMATE:
            assert self.budget is not None
            limit = self.budget
        else:
            limit = ROUNDING[expected.dtype] * expected.double().abs().max().item()
        return None if error <= limit else f"is off by {error:.2e}, more than {limit:.2e},"

    @contextmanager
    def _environment_unchanged(self) -> Iterator[None]:
        def environment() -> tuple[Any, ...]:
            return torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed()

        before, random_state = environment(), torch.get_rng_state()
        yield
        if environment() != before or not torch.equal(torch.get_rng_state(), random_state):
            raise self._broken("changed torch's default dtype, autograd mode, thread count or random state")

    def _where(self) -> Location:
        return Location(pass_name=getattr(self.subject, "name", type(self.subject).__name__))

    def _broken(self, problem: str) -> PassError:
        return PassError(f"The pass {type(self.subject).__name__} {problem}.", where=self._where())


def example_inputs(program: Program, sizes: Mapping[str, int], seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs for a program, the same ones for the same seed.

    Floating-point inputs are normally distributed. ``"one_hot"`` inputs have a single one in each row,
    ``"index:SIZE"`` and ``"below:SIZE"`` inputs are integers below that size (a name, a number or a sum).
    ``"index:graphs"`` inputs are sorted and leave no graph empty while there are enough rows. Integers of
    ``graphs+1`` elements are offsets that agree with them. Other integers are zero, the one value that is a
    legal index into anything.

    Args:
        program: only its input specs are read.
        sizes: named sizes, e.g. ``{"atoms": 7, "edges": 19, "graphs": 2}``.
        seed: of the generator; torch's own is not touched.

    Raises:
        UsageError: a size without a value, or an index into nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(_example(spec, sizes, generator) for spec in program.inputs)


def run_program(program: Program, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs by name, computed node by node without autograd and without touching torch's random state."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = fx.Interpreter(program.graph_module).run(*inputs)
    return dict(zip((spec.name for spec in program.outputs), outputs, strict=True))


def derive_values(program: Program, sizes: Mapping[str, int] = SIZES[0]) -> Program:
    """Set ``node.meta["val"]`` of all nodes, with a symbolic size for each name in the input specs.

    For programs written by hand; those that were captured have it. ``sizes`` are the hints of the symbols.
    """
    inputs = fake_inputs([(s.name, s.dims, s.dtype) for s in program.inputs], dict(sizes))
    if inputs:
        with torch.no_grad():
            FakeTensorProp(program.graph_module, mode=inputs[0].fake_mode).propagate_dont_convert_inputs(*inputs)
    return program


def build_program(
    body: Callable[..., Mapping[str, fx.Node]],
    inputs: Sequence[TensorSpec],
    weights: Mapping[str, Tensor] | None = None,
    *,
    stage: Stage = "energy",
) -> Program:
    """A program written by hand.

    ``body(graph, *placeholders)`` adds the nodes and returns the outputs by name; ``graph.get_attr(name)`` reads
    a weight. ``meta["val"]`` and the specs of the outputs are derived.
    """
    root, graph = torch.nn.Module(), fx.Graph()
    for name, tensor in (weights or {}).items():
        if isinstance(tensor, torch.nn.Parameter):
            root.register_parameter(name, tensor)
        else:
            root.register_buffer(name, tensor)
    placeholders = [graph.placeholder(spec.name) for spec in inputs]
    outputs = body(graph, *placeholders)
    graph.output(tuple(outputs.values()))
    module = fx.GraphModule(root, graph, class_name="Program")
    program = derive_values(Program(module, tuple(inputs), outputs=(), stage=stage))
    names = {
        str(size): dim
        for spec, node in zip(inputs, placeholders, strict=True)
        for size, dim in zip(node.meta["val"].shape, spec.dims, strict=True)
    }

    def spec(name: str, value: Tensor) -> TensorSpec:
        unnamed = next((size for size in value.shape if not isinstance(size, int) and str(size) not in names), None)
        if unnamed is not None:
            raise UsageError(f"The output {name!r} has the size {unnamed}, which is the size of no input.")
        return TensorSpec(name, tuple(names.get(str(size), size) for size in value.shape), value.dtype)

    return replace(program, outputs=tuple(spec(name, node.meta["val"]) for name, node in outputs.items()))


def _example(spec: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = [_extent(dim, sizes, spec) for dim in spec.dims]
    if "one_hot" in spec.properties:
        kinds = torch.randint(shape[-1], shape[:-1], generator=generator)
        return torch.nn.functional.one_hot(kinds, shape[-1]).to(spec.dtype)
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        wide = torch.complex128 if spec.dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(spec.dtype)
    if spec.dtype is torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    into = next((p.partition(":")[2] for p in spec.properties if p.startswith(("index:", "below:"))), None)
    if spec.dims == ("graphs+1",):
        atoms, graphs = sizes["atoms"], sizes["graphs"]
        return torch.searchsorted(_members(atoms, graphs), torch.arange(graphs + 1)).to(spec.dtype)
    if into is None:
        return torch.zeros(shape, dtype=spec.dtype)
    if into == "graphs" and len(shape) == 1:
        return _members(shape[0], sizes["graphs"]).to(spec.dtype)
    bound = _extent(int(into) if into.isdigit() else into, sizes, spec)
    if bound == 0 and 0 not in shape:
        raise UsageError(f"The input {spec.name!r} of shape {shape} is an index into no {into}.")
    return torch.randint(max(bound, 1), shape, generator=generator).to(spec.dtype)


def _members(rows: int, groups: int) -> Tensor:
    """Group of each row: sorted, in groups of nearly one size."""
    return torch.arange(rows) * groups // max(rows, 1)


def _extent(dim: Dim, sizes: Mapping[str, int], spec: TensorSpec) -> int:
    if isinstance(dim, int):
        return dim
    terms = [term.strip() for term in dim.split("+")]
    missing = next((term for term in terms if not term.isdigit() and term not in sizes), None)
    if missing is not None:
        raise UsageError(f"The input {spec.name!r} has the size {missing!r}, which is not in {dict(sizes)}.")
    return sum(int(term) if term.isdigit() else sizes[term] for term in terms)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Same type, shape and values, where a NaN equals a NaN."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _tensors(program: Program) -> dict[str, Tensor]:
    module = program.graph_module
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _structure(program: Program) -> tuple[object, ...]:
    """Everything that a pass may change; equal for a program and its copy."""
    nodes = list(program.graph.nodes)
    number = {node: f"%{i}" for i, node in enumerate(nodes)}

    def text(value: Any) -> str:
        return repr(fx.map_arg(value, lambda node: _Label(number[node])))

    lines = [
        (node.op, str(node.target), text(node.args), text(node.kwargs), provenance(node), node.meta.get("irreps"))
        for node in nodes
    ]
    weights = [(name, id(tensor)) for name, tensor in _tensors(program).items()]
    return lines, weights, program.inputs, program.outputs, program.stage, program.energy, program.assumptions


class _Label(str):
    """A string that prints without quotes, so that no literal can be taken for a node."""

    def __repr__(self) -> str:
        return str(self)
