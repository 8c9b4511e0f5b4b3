"""Tracing a function to a program, and replaying a program inside a trace.

``trace_program`` is the one way a graph is made: at capture from a model, in ``differentiate`` from
the energy program and autograd, in ``legalize`` from the reference implementations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from .._torch_compat import fake_inputs, frozen_sizes, size_expr, trace
from ..errors import CaptureError, Location, PassError
from .metadata import Provenance, provenance
from .program import Dim, Program, Stage, TensorSpec, register
from .semantic import tensors

#: prime hints that collide with no model dimension
SIZES = {"atoms": 1009, "edges": 4177, "graphs": 211}
OTHER_SIZES = {"atoms": 1013, "edges": 4201, "graphs": 223}
_PRIMES = tuple(sympy.primerange(307, 2000))


def sizes_of(inputs: Sequence[TensorSpec], known: Mapping[str, int] = SIZES) -> dict[str, int]:
    """``known``, and a prime hint of its own for every other size that ``inputs`` name; others for ``OTHER_SIZES``."""
    named = dict.fromkeys(dim.partition("+")[0] for spec in inputs for dim in spec.dims if isinstance(dim, str))
    primes = _PRIMES[known.get("atoms") == OTHER_SIZES["atoms"] :: 2]
    return {**known, **dict(zip((name for name in named if name not in known), primes, strict=False))}


def size_names(inputs: Sequence[TensorSpec], values: Sequence[Tensor]) -> dict[sympy.Expr, str]:
    """The named sizes of ``inputs`` by the symbol that they have in the trace of ``values``."""
    found: dict[sympy.Expr, str] = {}
    for spec, value in zip(inputs, values, strict=True):
        pairs = zip(value.shape, spec.dims, strict=True)
        found |= {size_expr(size): dim for size, dim in pairs if isinstance(dim, str) and "+" not in dim}
    return found


def dims_of(value: Tensor, names: Mapping[sympy.Expr, str]) -> tuple[Dim, ...]:
    """The shape of a traced value: numbers, names, and expressions in names, such as ``"2*batch"``."""
    symbols = {symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}
    return tuple(s if isinstance(s, int) else str(size_expr(s).subs(symbols)) for s in value.shape)


def trace_program(
    function: Callable[..., Sequence[Tensor]],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    constants: Mapping[str, Tensor],
    *,
    stage: Stage,
    energy: str = "energy",
    sizes: Mapping[str, int] = SIZES,
    differentiable: Collection[str] = (),
    mutates: bool = False,
    stacks: bool = False,
) -> tuple[Program, tuple[str, ...]]:
    """Trace ``function(*inputs) -> outputs`` with symbolic sizes.

    Args:
        function: takes one tensor per input spec, returns one per output spec.
        constants: name -> tensor the function closes over; the graph refers to them by these names.
        sizes: hints for named sizes; those it leaves out get primes.
        differentiable: names of the inputs that ``function`` differentiates by.
        mutates: ``function`` may change tensors in place; the trace is made functional.
        stacks: record the Python stack of every call, for ``record_sources``.

    Returns:
        the program, and the conditions under which the trace froze a size (empty when it is dynamic).
    """
    fakes = fake_inputs([(s.name, s.dims, s.dtype) for s in inputs], sizes_of(inputs, sizes))
    for spec, fake in zip(inputs, fakes, strict=True):
        fake.requires_grad_(spec.name in differentiable)
    body: Callable[..., Any] = lambda *args: tuple(function(*args))  # noqa: E731
    if mutates and stage != "function":
        body = torch.func.functionalize(body, remove="mutations")
    traced = trace(body, fakes, stacks=stacks)
    if mutates and stage == "function" and any(map(_mutates, traced.graph.nodes)):
        # as a second step: ops made of others, such as a linear map of many rows, fix sizes under functionalize
        replay = fx.Interpreter(traced).run
        traced = trace(torch.func.functionalize(lambda *args: replay(*args), remove="mutations"), fakes, stacks=False)
    functional(traced.graph)
    if not stacks:
        _inherit_provenance(traced.graph)
    names = {id(t): name.replace(".", "_") for name, t in reversed(list(constants.items()))}
    module = _adopt(traced, names)
    taken = {node.name for node in module.graph.nodes}
    for node, spec in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.target = spec.name
        _rename(node, spec.name, taken)
        node.meta["irreps"] = spec.irreps
    for node in module.graph.find_nodes(op="get_attr"):
        _rename(node, str(node.target), taken)
    module.recompile()
    return Program(module, inputs, outputs, stage=stage, energy=energy), frozen_sizes(fakes)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _rename(node: fx.Node, name: str, taken: set[str]) -> None:
    """Call ``node`` by what it stands for, where that name is free."""
    if name not in taken:
        taken.add(name)
        node.name = name


def _adopt(traced: fx.GraphModule, names: Mapping[int, str]) -> fx.GraphModule:
    """Flatten constants onto one root, under their names, each tensor once."""
    root = nn.Module()
    placed: dict[tuple[Any, ...], str] = {}
    for node in list(traced.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(traced, str(node.target))
        key = _identity(value, names)
        if key not in placed:
            placed[key] = register(root, names.get(id(value), "constant"), value)
        node.target = placed[key]
        node.meta["val"] = value
    module = fx.GraphModule(root, traced.graph, class_name="Program")
    module.graph.eliminate_dead_code()
    return module


def _inherit_provenance(graph: fx.Graph) -> None:
    """Nodes that a replay made outside every node's scope (sums of gradients) belong where their input does."""
    for node in graph.nodes:
        if node.op == "call_function" and provenance(node) == Provenance():
            known = [n for n in node.all_input_nodes if provenance(n) != Provenance()]
            if known:
                node.meta["custom"] = {**(node.meta.get("custom") or {}), **(known[0].meta.get("custom") or {})}


def functional(graph: fx.Graph) -> None:
    """Replace in-place ops on fresh temporaries by their functional forms, in place.

    Derivative formulas of torch use them (``masked_fill_`` in that of a norm).

    Raises:
        CaptureError: the changed tensor is an input, a weight, or a view of something else.
    """
    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        changed = node.args[0]
        overload = getattr(torch.ops.aten, node.target.overloadpacket.__name__.rstrip("_"), None)
        twin = getattr(overload, node.target._overloadname, None)
        fresh = changed.op == "call_function" and not any(r.alias_info for r in changed.target._schema.returns)
        if twin is None or not fresh:
            raise CaptureError(
                f"{node.target} changes a tensor in place that may be shared",
                where=Location(node=node.name, module_path=provenance(node).module),
                hint="write this operation out of place in the model",
            )
        node.target = twin
        changed.replace_all_uses_with(node, delete_user_cb=lambda user, at=node: order[user] > order[at])


def _identity(value: Tensor, names: Mapping[int, str]) -> tuple[Any, ...]:
    """Named tensors are told apart by identity, literals that a trace made by content."""
    if id(value) in names or value.numel() > 1 << 16:
        return ("id", id(value))
    return ("content", value.dtype, tuple(value.shape), str(value.device), value.cpu().numpy().tobytes())


def constants_of(program: Program) -> dict[str, Tensor]:
    """The program's weights and constants by flat name."""
    module = program.graph_module
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


class Replay(fx.Interpreter):
    """Runs a program inside a trace: new nodes, and the backward of them, inherit provenance.

    Args:
        program: what to run.
        expand: op -> function that runs in its place (a legalisation).
        made_by: name of the pass, stored in the provenance of the nodes it makes.
        differentiates: the replay is differentiated; an op that loses the derivative is an error.
    """

    def __init__(
        self,
        program: Program,
        expand: Mapping[Any, Callable[..., Any]] | None = None,
        made_by: str = "",
        *,
        differentiates: bool = False,
    ) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self.expand = expand or {}
        self.made_by = made_by
        self.differentiates = differentiates
        self.seen: set[Any] = set()
        self.origin = Provenance()

    def run_node(self, n: fx.Node) -> Any:
        origin = provenance(n)
        if n.op == "call_function" and n.target in self.expand:
            origin = replace(origin, made_by=self.made_by)
        self.origin = origin
        result = super().run_node(n)
        if self.differentiates and _lost_derivative(n, result, self.env):
            raise PassError(
                f"{n.target} has no derivative: autograd takes its result for a constant, and forces would be wrong",
                where=Location(node=n.name, module_path=origin.module or None, source=origin.source or None),
                hint="register one with torch.library.register_autograd, or a module rule that avoids the op",
            )
        for value in tensors(result):
            if value.grad_fn is not None:
                self._tag(value.grad_fn, replace(origin, backward=True, made_by=self.made_by))
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The interpreter has just made the node's own metadata current.  annotate() would write into the
        # dictionary that the node holds, so a new one is put in its place for the time of the call.
        current = fx.traceback.get_current_meta()
        own = current.get("custom") or {}
        current["custom"] = {**own, "fxpass": asdict(self.origin)}
        try:
            return super().call_function(self.expand.get(target, target), args, kwargs)
        finally:
            current["custom"] = own

    def _tag(self, grad_fn: Any, origin: Provenance) -> None:
        """Make the backward of every autograd node that this graph node added run under ``origin``."""
        stack = [grad_fn]
        while stack:
            fn = stack.pop()
            if fn is None or fn in self.seen:
                continue
            self.seen.add(fn)
            scope = _Scope(origin)
            fn.register_prehook(scope.enter)
            fn.register_hook(scope.exit)
            stack.extend(next_fn for next_fn, _ in fn.next_functions)


#: ops whose floating results do not depend on the values of their operands, or are cut from them on purpose
_CONSTANT = frozenset(
    {
        torch.ops.aten.zeros_like.default,
        torch.ops.aten.ones_like.default,
        torch.ops.aten.full_like.default,
        torch.ops.aten.new_zeros.default,
        torch.ops.aten.new_ones.default,
        torch.ops.aten.new_full.default,
        torch.ops.aten.detach.default,
    }
)


def _lost_derivative(node: fx.Node, result: Any, env: Mapping[fx.Node, Any]) -> bool:
    """Whether a floating result hangs on a differentiated operand that autograd does not see."""
    if node.op != "call_function" or node.target in _CONSTANT:
        return False
    floats = [x for x in tensors(result) if x.is_floating_point()]
    if not floats or any(x.requires_grad for x in floats):
        return False
    return any(x.requires_grad for n in node.all_input_nodes for x in tensors(env[n]))


class _Scope:
    """Annotation that is open while one autograd node runs."""

    def __init__(self, origin: Provenance) -> None:
        self.origin = origin
        self.context: Any = None

    def enter(self, _grads: Any) -> None:
        self.context = fx.traceback.annotate({"fxpass": asdict(self.origin)})
        self.context.__enter__()

    def exit(self, _grad_inputs: Any, _grad_outputs: Any) -> None:
        self.context.__exit__(None, None, None)


@contextmanager
def module_provenance(model: nn.Module) -> Iterator[None]:
    """While open, nodes traced from ``model`` carry the path of the module that runs."""
    stack: list[Any] = []

    def enter(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            stack.append(fx.traceback.annotate({"fxpass": asdict(Provenance(module=path))}))
            stack[-1].__enter__()

        return hook

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        stack.pop().__exit__(None, None, None)

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def record_sources(graph: fx.Graph) -> None:
    """Add ``file:line`` of the innermost frame outside torch and this compiler to every node's provenance."""
    own_rooms = (str(Path(__file__).parent.parent / room) for room in ("ir", "capture", "frontends", "_torch_compat"))
    skipped = (str(Path(torch.__file__).parent), *own_rooms)
    for node in graph.nodes:
        frames = _FRAME.findall(node.meta.get("stack_trace") or "")
        own = [(f, line) for f, line in frames if not f.startswith(skipped) and not f.startswith("<")]
        if own and node.op == "call_function":
            file, line = own[-1]
            parts = Path(file).parts
            short = "/".join(parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-2:])
            origin = replace(provenance(node), source=f"{short}:{line}")
            node.meta["custom"] = {**(node.meta.get("custom") or {}), "fxpass": asdict(origin)}
