"""Capture: from a model to an energy program, with proofs.

The model is copied, its known leaf modules become semantic ops, and its energy is traced with
symbolic sizes, twice, at sizes that collide with nothing.  Then the graph must prove that it is
dynamic, complete and free of opaque parts; what cannot be proven is refused, with the place.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .._torch_compat import size_conditions, size_expr
from ..errors import CaptureError, Location, UnsupportedModelError
from ..ir.metadata import provenance
from ..ir.program import Program, TensorSpec, ancestors
from ..ir.tracing import (
    OTHER_SIZES,
    SIZES,
    dims_of,
    module_provenance,
    record_sources,
    size_names,
    trace_program,
)
from .canonical import copies_become_values, raise_gathers_and_scatters
from .rules import RULES, Rule, install

#: ops that read what was never written
UNINITIALISED = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty_strided.default,
)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, also of models whose parameters cannot copy themselves (MACE's ``EmptyParam``).

    Nor can scripted functions, which the copy shares with the model.

    Raises:
        UnsupportedModelError: the model keeps something that cannot be copied; named by its path.
    """
    memo: dict[int, Any] = {id(p): _copy_of(p, name) for name, p in model.named_parameters()}
    attributes = (value for module in model.modules() for value in vars(module).values())
    memo.update({id(value): value for value in attributes if isinstance(value, torch.jit.ScriptFunction)})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # what a model keeps is foreign, and may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"the model cannot be copied: {reason}",
            where=Location(module_path=_uncopied(model) or "(model)", source=type(model).__qualname__),
            hint="make what cannot be copied in forward, or keep it outside of the module",
        ) from error


def _uncopied(model: nn.Module) -> str:
    """The path of the first attribute that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in vars(nn.Module()):  # parts, which come later, and weights, which the copy has already
                continue
            try:
                copy.deepcopy(value)
            except Exception:  # as above
                return f"{path}.{name}".lstrip(".")
    return ""


def _copy_of(parameter: nn.Parameter, name: str) -> nn.Parameter:
    """A copy that knows which parameter of the first model it comes from; rules may keep it under other names."""
    copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    copied.origin = getattr(parameter, "origin", name)  # type: ignore[attr-defined]
    return copied


def prepare(model: nn.Module, rules: Mapping[str, Rule] = RULES) -> nn.Module:
    """A frozen copy of ``model`` in which known leaf modules call semantic ops."""
    replica = install(copy_model(model), rules)
    replica.eval()
    for parameter in replica.parameters():
        parameter.requires_grad_(False)
    return replica


def capture(
    function: Callable[..., Sequence[Tensor]],
    model: nn.Module,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    energy: str = "energy",
    example: Callable[[int], Sequence[Tensor]] | None = None,
) -> Program:
    """Trace ``function`` over ``model`` to an energy program and prove it dynamic and complete.

    Args:
        function: one tensor per input spec -> one tensor per output spec; calls ``model``.
        model: a module made by :func:`prepare`.
        inputs: canonical inputs; those that are differentiated (``Program.differentiated``) are what forces come from.
        outputs: what ``function`` returns, in order; their shapes and dtypes are filled in from the trace.
        energy: name of the output that forces are the derivative of.
        example: seed -> inputs to run the program on, in which the seed moves atoms alone; three atoms if None.

    Raises:
        CaptureError: the model froze a size, reads uninitialised memory, ignores an input that the
            energy must depend on, or holds an op without a shape function.
    """
    program = _trace_twice(function, model, Program(fx.GraphModule({}, fx.Graph()), inputs, outputs, energy=energy))
    raise_gathers_and_scatters(program.graph)
    program.graph_module.recompile()
    _check_complete(program)
    depends_on_positions(program, example)
    return replace(program, outputs=_checked_outputs(program))


def capture_function(
    function: Callable[..., Sequence[Tensor]],
    model: nn.Module,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    signed: Collection[str] = (),
) -> Program:
    """Trace any ``function`` over ``model`` to a program at stage ``"function"``, as :func:`capture` does.

    Attention is traced in its plain form, which has derivatives of every order and runs on every device.  Inputs that
    become indices get the property ``"index:SIZE"`` or ``"below:NUMBER"``, which their caller has to see to;
    but those that ``signed`` names may hold negative ones, which count from the end.

    Raises:
        CaptureError: as :func:`capture`; or an output is a constant, or drawn at random.
    """

    def written(*values: Tensor, clones: bool = False) -> Sequence[Tensor]:
        with _Copied(clones):
            return function(*values)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            bare = Program(fx.GraphModule({}, fx.Graph()), inputs, outputs, stage="function")
            try:
                program = _trace_twice(written, model, bare)
            except _OwnWriteError:
                program = _trace_twice(partial(written, clones=True), model, bare)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    values = [node.meta["val"] for node in program.placeholders.values()]
    names = size_names(inputs, values)
    found: dict[str, set[str]] = {}

    def trusts(index: fx.Node, size: Any) -> bool:
        """Whether an index is an input, or a part of one, and the caller can be told what it has to stay within."""
        size = size.meta["val"] if isinstance(size, fx.Node) else size
        limit = f"below:{size}" if isinstance(size, int) else f"index:{names.get(size_expr(size), '')}"
        source = _part_of(index)
        if source.op != "placeholder" or source.target in signed or limit == "index:":
            return False
        found.setdefault(source.name, set()).add(limit)
        return True

    copies_become_values(program.graph)
    raise_gathers_and_scatters(program.graph, trusts)
    program.graph_module.recompile()
    _check_complete(program)
    for node in program.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise CaptureError(
                f"{node.target} draws random numbers, which no drop-in could draw alike",
                where=Location(node=node.name, module_path=provenance(node).module, source=provenance(node).source),
                hint="draw them outside of the module, and give them to it",
            )
    placed = zip(inputs, program.placeholders.values(), strict=True)
    inputs = tuple(replace(s, properties=s.properties | found.get(node.name, set())) for s, node in placed)
    for spec, node in zip(outputs, program.results.values(), strict=True):
        if any(not size_expr(s).free_symbols <= set(names) for s in node.meta["val"].shape if not isinstance(s, int)):
            raise CaptureError(
                f"the size of {spec.name} depends on values",
                where=Location(node=node.name, module_path=provenance(node).module, source=provenance(node).source),
                hint="masks in place of nonzero, unique and x[mask], which keep the size",
            )
    results = zip(outputs, program.results.values(), strict=True)
    outputs = tuple(replace(s, dims=dims_of(n.meta["val"], names), dtype=n.meta["val"].dtype) for s, n in results)
    return replace(program, inputs=inputs, outputs=outputs)


#: ops whose result is a part of their first operand
_PARTS = frozenset(
    {
        *(torch.ops.aten.select.int, torch.ops.aten.slice.Tensor, torch.ops.aten.view.default),
        *(torch.ops.aten.unbind.int, torch.ops.aten.alias.default, torch.ops.aten.detach.default, operator.getitem),
        torch.ops.aten.clone.default,
    }
)


def _part_of(node: fx.Node) -> fx.Node:
    """What ``node`` is a part of, or itself."""
    while node.op == "call_function" and node.target in _PARTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _trace_twice(function: Callable[..., Sequence[Tensor]], model: nn.Module, like: Program) -> Program:
    """``function`` traced to a program with the interface and stage of ``like``; the same one at both sizes."""
    named = [*model.named_parameters(), *model.named_buffers()]
    constants = {f"m_{name}" if name[:1].isdigit() else name: tensor for name, tensor in named}

    def traced(*values: Tensor) -> Sequence[Tensor]:
        try:
            return function(*values)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            if _raised_by_us(error):
                raise
            raise _trace_failure(error) from error

    def run(sizes: Mapping[str, int], stacks: bool) -> tuple[Program, tuple[str, ...]]:
        options: dict[str, Any] = {"stage": like.stage, "energy": like.energy, "mutates": True}
        with module_provenance(model):
            try:
                return trace_program(
                    traced, like.inputs, like.outputs, constants, sizes=sizes, stacks=stacks, **options
                )
            except RuntimeError as error:
                if _raised_by_us(error):
                    raise
                raise _write_failure(error) from error

    program, frozen = run(SIZES, stacks=True)
    other, _ = run(OTHER_SIZES, stacks=False)
    _same_at_both_sizes(program, other)
    if frozen:
        raise CaptureError(
            f"tracing tied a size to a value: {'; '.join(frozen)}",
            hint="replace len(tensor), int(size) and branches on sizes in the model by tensor operations",
        )
    if branches := _branches(program):
        raise CaptureError(
            f"the model does something else at other sizes; it was traced for {'; '.join(branches)}",
            hint="replace branches on sizes in the model by tensor operations; fix the size, where it never changes",
        )
    record_sources(program.graph)
    return program


#: sizes that a trace has to hold for: even and odd, powers of two and primes, up to the large
_TRIED = (24, 25, 64, 97, 1000, 1009, 4096, 99_991, 1_000_000)


def _branches(program: Program) -> list[str]:
    """Conditions of the trace that some sizes from ``_TRIED`` do not meet, alike or different.

    Smaller sizes are left to the receipts: what a convolution or a mean needs at least is a condition too.
    """
    values = [node.meta["val"] for node in program.placeholders.values()]
    names = size_names(program.inputs, values)
    found = []
    for condition in size_conditions(values):
        symbols = sorted(condition.free_symbols, key=str)
        alike = [dict.fromkeys(symbols, size) for size in _TRIED]
        turned = [
            {s: _TRIED[(k + step * j) % len(_TRIED)] for j, s in enumerate(symbols)}
            for k in range(len(_TRIED))
            for step in (1, 2, len(_TRIED) - 1)
        ]
        if any(condition.subs(sizes) == sympy.false for sizes in (*alike, *turned)):
            found.append(str(condition.subs({s: sympy.Symbol(names.get(s, str(s))) for s in symbols})))
    return list(dict.fromkeys(found))


def _raised_by_us(error: Exception) -> bool:
    """Whether the line that raised is one of this compiler: a bug, and not what a model does to torch."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "fxpass"


def _trace_failure(error: Exception) -> CaptureError:
    """A torch error during the trace, as one paragraph with the place in the model."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and "/fxpass/" not in file and not file.startswith("<"):
            place = f"{'/'.join(file.rsplit('/', 3)[1:])}:{trace.tb_lineno}"
        trace = trace.tb_next
    hint = "make this part of the model independent of tensor values, or register a module rule for it"
    if "fake" in text.lower() or "meta" in text.lower():
        hint = "register a shape function for this op with torch.library.register_fake"
    what = f"the model cannot be traced with symbolic sizes: {text}"
    return CaptureError(what, where=Location(source=place), hint=hint)


def _write_failure(error: RuntimeError) -> CaptureError:
    """An error of torch while it makes a trace functional, which is about writes alone, with the line that writes."""
    text = str(error)
    lines = re.findall(r'File "([^"]+)", line (\d+)', text)
    where = Location(source=":".join(("/".join(lines[-1][0].rsplit("/", 3)[1:]), lines[-1][1])) if lines else None)
    if "mutating a non-functional tensor" in text:
        return _OwnWriteError(
            "the module writes to a buffer or weight of its own, or what is made of these, which a program cannot",
            where=where,
            hint="return the new value instead of writing it; write to a clone of what is made of weights",
        )
    return CaptureError(
        f"a write into a tensor cannot be made functional: {text.splitlines()[0]}",
        where=where,
        hint="a new tensor instead of the write: torch.where, torch.cat, or x.index_put(...) for x[...] = value",
    )


class _OwnWriteError(CaptureError):
    """A write to what the module holds, or to a clone of that, which torch cannot tell from it."""


class _Copied(TorchFunctionMode):
    """Writes what ops of ``COPIED`` compute: torch cannot make them functional at symbolic sizes.

    Nor can it with ``clones`` of weights, which become new tensors.
    """

    def __init__(self, clones: bool = False) -> None:
        super().__init__()
        self.clones = clones

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.clones and getattr(func, "__name__", "") == "clone":
            return torch.zeros(args[0].shape, dtype=args[0].dtype, device=args[0].device).copy_(args[0])
        if func in CLAMPS and kwargs.get("inplace"):
            return args[0].copy_(func(*args, **{**kwargs, "inplace": False}))
        twin = COPIED.get(getattr(func, "__name__", ""))
        return func(*args, **kwargs) if twin is None else args[0].copy_(twin(*args, **kwargs))


#: name of an op that writes into its first operand -> what it writes there
COPIED: dict[str, Callable[..., Tensor]] = {
    "clamp_": torch.clamp,
    "clip_": torch.clip,
    "clamp_min_": torch.clamp_min,
    "clamp_max_": torch.clamp_max,
    "index_fill_": torch.index_fill,
}
#: functions of torch that call such an op where they are asked to
CLAMPS = (nn.functional.hardtanh, nn.functional.relu6)


def _literals(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return "%"
    if isinstance(value, (list, tuple)):
        return tuple(_literals(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _literals(v)) for k, v in value.items())
    return str(value)


def _same_at_both_sizes(a: Program, b: Program) -> None:
    """Two traces at different sizes must be one graph: same ops, same literals."""
    for one, two in zip(a.graph.nodes, b.graph.nodes, strict=False):
        left = (one.op, str(one.target), _literals(one.args), _literals(one.kwargs))
        right = (two.op, str(two.target), _literals(two.args), _literals(two.kwargs))
        if left != right and one.op != "get_attr":
            raise CaptureError(
                f"the traced graph depends on the example's size: {one.format_node()} became {two.format_node()}",
                where=Location(node=one.name, module_path=provenance(one).module),
                hint="replace len(tensor) and int(size) in this module, or register a module rule for it",
            )
    if len(a.graph.nodes) != len(b.graph.nodes):
        raise CaptureError(
            f"the traced graph has {len(a.graph.nodes)} nodes at one size and {len(b.graph.nodes)} at another",
            hint="remove branches and loops over sizes from the model, or register a module rule",
        )


def _check_complete(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in UNINITIALISED:
            raise CaptureError(
                "the graph reads uninitialised memory",
                where=Location(node=node.name, module_path=provenance(node).module),
                hint="create the tensor with torch.zeros",
            )
        if node.op == "call_module" or node.op == "call_method":
            raise CaptureError(
                f"the graph holds an opaque {node.op} of {node.target}",
                where=Location(node=node.name, module_path=provenance(node).module),
            )
    for name, node in program.results.items():
        behind = ancestors([node])
        if not any(n.op == "placeholder" for n in behind):
            raise CaptureError(
                f"the output {name} is a constant and depends on no input",
                hint="check that forward computes it from what it is given",
            )
        moved = [spec.name for spec in program.differentiated]
        if name == program.energy and moved and behind.isdisjoint(program.placeholders[name] for name in moved):
            raise CaptureError(
                f"the energy does not depend on {' or '.join(moved)}: forces would be zero",
                hint="check that forward computes the energy from the positions it is given, without detach",
            )


def _checked_outputs(program: Program) -> tuple[TensorSpec, ...]:
    """Output specs with the shape and dtype that the graph really returns, sizes by name."""
    names: dict[str, str] = {}
    for spec in program.inputs:
        shape = program.placeholders[spec.name].meta["val"].shape
        names.update({str(extent): dim for extent, dim in zip(shape, spec.dims, strict=True) if isinstance(dim, str)})

    def checked(spec: TensorSpec, node: fx.Node) -> TensorSpec:
        value = node.meta["val"]
        unknown = [str(s) for s in value.shape if not isinstance(s, int) and str(s) not in names]
        if unknown:
            raise CaptureError(f"the output {spec.name} has a size that no input has: {', '.join(unknown)}")
        dims = tuple(s if isinstance(s, int) else names[str(s)] for s in value.shape)
        return replace(spec, dims=dims, dtype=value.dtype)

    return tuple(checked(s, n) for s, n in zip(program.outputs, program.results.values(), strict=True))


def depends_on_positions(program: Program, example: Callable[[int], Sequence[Tensor]] | None = None) -> None:
    """Proof by running: two inputs that differ in edge vectors only must give different, finite outputs.

    Reachability alone does not show it: ``torch.ones_like(edge_vectors)`` is reached and constant.

    Raises:
        CaptureError: an output that is computed from edge vectors is the same, or not a number.
    """
    vectors = {program.placeholders[s.name] for s in program.differentiated}
    with torch.no_grad():
        runs = [program.graph_module(*(example or partial(_example, program))(seed)) for seed in (0, 1)]
    for (name, node), before, after in zip(program.results.items(), *runs, strict=True):
        if vectors.isdisjoint(ancestors([node])):
            continue
        if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
            raise CaptureError(f"the captured {name} of three atoms is not a number", hint="check the model's weights")
        if torch.equal(before, after):
            moved = ", ".join(n.name for n in vectors)
            raise CaptureError(
                f"the {name} does not depend on {moved}: it stays the same when atoms move",
                hint="check that forward uses the positions it is given, and does not detach them",
            )


def _example(program: Program, seed: int) -> list[Tensor]:
    """Three atoms with two edges each, about 1 Angstrom long; ``seed`` moves the edge vectors alone."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"atoms": 3, "edges": 6, "graphs": 1}

    def make(spec: TensorSpec) -> Tensor:
        bases = [(str(d).partition("+")) for d in spec.dims]
        shape = [int(b) if b.isdigit() else sizes[b] + int(add or 0) for b, _, add in bases]
        if "edge_vector" in spec.properties:
            vectors = torch.randn(shape, generator=generator, dtype=torch.float64)
            return (vectors / vectors.norm(dim=1, keepdim=True) * (1 + 0.1 * seed)).to(spec.dtype)
        if "one_hot" in spec.properties:
            return torch.eye(shape[1], dtype=spec.dtype)[torch.arange(shape[0]) % shape[1]]
        if spec.dtype == torch.int64:
            limits = [p.partition(":")[2] for p in spec.properties if p.startswith(("index:", "below:"))]
            limit = sizes.get(limits[0], 0) or int(limits[0]) if limits else 1
            return torch.arange(int(torch.Size(shape).numel())).reshape(shape) % limit
        return torch.ones(shape, dtype=spec.dtype)

    return [make(spec) for spec in program.inputs]
