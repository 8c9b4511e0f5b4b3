"""Programs of second and third derivatives, and of Jacobians: the forces program, differentiated as a graph once more.

Each is traced once for a model, with symbolic sizes, out of semantic ops whose derivatives are ops of the same set, and
then fused as any other program is.  Each is linear in its directions.  What does not depend on these is computed once
for a structure (``Linear.prepared``), and every direction costs the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..algebra.piecewise import parse_grid
from ..algebra.polynomial import parse_polynomial
from ..errors import Location, PassError, UsageError
from ..ir.convolution import convolution, convolution_gradient
from ..ir.guards import lower_guards
from ..ir.ops import gather, polynomial, scatter_sum, table
from ..ir.program import Program, TensorSpec
from ..ir.tracing import Replay, constants_of, trace_program
from ..ir.verifier import verify
from ..kernels.dispatch import Kernels
from ..pipeline import resolve
from ..registry import default_registry
from ..runner import run
from .convolutions import Slopes

FUSED = "fold-linears,fuse-convolution,fuse-contraction,fold-constants,common-subexpressions,dead-code"

WINDOW = 24  # nodes after which what is made again is made again once more, rather than held
WIDE = 32  # columns of tensors worth making again rather than keeping
TINY = 1e-30  # a scale in place of zero, far from both ends of float32
LEAST = 1e-6  # what features of a row are taken to be where they vanish

aten = torch.ops.aten
#: made again for each direction rather than kept: they cost no more than to read what was kept
_VIEWS = frozenset(
    {
        *(gather, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.expand.default),
        *(aten.select.int, aten.t.default, aten.transpose.int, aten.permute.default, aten._unsafe_view.default),
    }
)
#: made again where they are wide, which halves what is kept of networks over edges
_ELEMENTWISE = frozenset(
    {
        *(aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.rsub.Scalar),
        *(aten.div.Tensor, aten.neg.default, aten.sigmoid.default, aten.silu.default, aten.tanh.default),
    }
)


@dataclass(frozen=True)
class Linear:
    """A program that is linear in its directions, its last inputs.

    Attributes:
        before: the other inputs -> what the rest needs of them.
        after: that, then directions -> results.
        whole: inputs, then directions -> results, keeping nothing.
        kernels: what runs the ops; empty blocks for another device than the CPU.
    """

    before: fx.GraphModule
    after: fx.GraphModule
    whole: fx.GraphModule
    kernels: Kernels

    def prepared(self, inputs: Sequence[Tensor], memory: int) -> Callable[..., list[Tensor]]:
        """Directions -> results, for these inputs.

        Args:
            memory: bytes; where more would have to be kept, nothing is, and each call computes everything.
        """
        with torch.no_grad(), self.kernels:
            kept = self.before(*inputs)
        held = sum(t.numel() * t.element_size() for t in kept if isinstance(t, Tensor))
        module, first = (self.after, tuple(kept)) if held <= memory else (self.whole, tuple(inputs))
        del kept

        def apply(*directions: Tensor) -> list[Tensor]:
            with torch.no_grad(), self.kernels:
                return list(module(*first, *directions))

        return apply


def products(program: Program, order: int) -> Linear:
    """Derivatives of the gradients of a forces program along directions of all inputs that it is differentiated by.

    ``order`` 2 takes one direction of each of these inputs, and gives the Hessian times it; 3 takes two of each.
    """
    moved = program.differentiated
    program = run(program, resolve("fuse-convolution,dead-code", default_registry()), check=verify).program
    slopes = Slopes.to(program, order)
    directions = tuple(
        replace(spec, name=f"direction_{k}_{spec.name}", properties=frozenset())
        for k in range(1, order)
        for spec in moved
    )
    results = tuple(replace(spec, name=f"product_{spec.name}", properties=frozenset()) for spec in moved)

    def body(*inputs: Tensor) -> list[Tensor]:
        own, along = inputs[: len(program.inputs)], inputs[len(program.inputs) :]
        by = [own[program.inputs.index(spec)] for spec in moved]
        found: Sequence[Tensor] = _replayed(program, own, slopes)[-len(moved) :]
        for k in range(order - 1):
            found = _derived(found, by, along[k * len(moved) : (k + 1) * len(moved)], again=k + 2 < order)
        return list(found)

    return _linear(program, directions, results, body, [spec.name for spec in moved], slopes.named)


def transposed_jacobian(program: Program, name: str) -> Linear:
    """Cotangent of the output ``name`` -> its derivatives by the inputs that the energy is differentiated by (vjp).

    The name of a floating input stands for the derivative of the energy by it.
    """
    moved = program.differentiated
    value = spec_of(program, name)
    cotangent = replace(value, name="cotangent", properties=frozenset())
    results = tuple(replace(spec, name=f"product_{spec.name}", properties=frozenset()) for spec in moved)

    def body(*inputs: Tensor) -> list[Tensor]:
        own = inputs[:-1]
        by = [own[program.inputs.index(spec)] for spec in moved]
        return list(_derived([_value(program, name, own)], by, inputs[-1:], again=False))

    return _linear(program, (cotangent,), results, body, [*(spec.name for spec in moved), name])


def jacobian(program: Program, name: str) -> Linear:
    """Directions of the inputs that the energy is differentiated by -> derivative of the output ``name`` (jvp).

    It is the derivative of the transposed Jacobian by its cotangent, in which that is linear.
    """
    moved = program.differentiated
    directions = tuple(replace(spec, name=f"direction_{spec.name}", properties=frozenset()) for spec in moved)
    result = replace(spec_of(program, name), name="product", properties=frozenset())

    def body(*inputs: Tensor) -> list[Tensor]:
        own, along = inputs[: len(program.inputs)], inputs[len(program.inputs) :]
        by = [own[program.inputs.index(spec)] for spec in moved]
        value = _value(program, name, own)
        cotangent = torch.zeros_like(value).requires_grad_()
        return list(_derived(_derived([value], by, [cotangent], again=True), [cotangent], along, again=False))

    return _linear(program, directions, (result,), body, [*(spec.name for spec in moved), name])


def spec_of(program: Program, name: str) -> TensorSpec:
    """The output, or the floating input, of that name.

    Raises:
        UsageError: there is none; those that there are are listed.
    """
    outputs = program.without_gradient().outputs
    inputs = [s for s in program.inputs if s.dtype.is_floating_point and not s.properties & {"one_hot", "edge_vector"}]
    found = next((spec for spec in (*outputs, *inputs) if spec.name == name), None)
    if found is None or not found.dtype.is_floating_point:
        raise UsageError(
            f"the model has no output or input {name!r} to differentiate",
            hint=f"one of the outputs {_names(outputs)}" + (f", or of the inputs {_names(inputs)}" if inputs else ""),
        )
    return found


def tables(program: Program) -> tuple[int, ...]:
    """Orders of the tables that a program reads, each once."""
    texts: set[str] = set()
    for node in program.graph.nodes:
        if node.target is table:
            texts.add(str(node.args[3]))
        elif node.target in (convolution, convolution_gradient):
            names = [argument.name for argument in node.target._schema.arguments]
            texts.add(str(node.args[names.index("grid")]))
    return tuple(sorted({parse_grid(text).order for text in texts if text}))


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _replayed(program: Program, inputs: Sequence[Tensor], slopes: Slopes | None = None) -> list[Tensor]:
    """Outputs of the program.  What it detaches is not: autograd detaches what it saves, and a trace records that."""
    expand = {aten.detach.default: _same, **({} if slopes is None else slopes.rules())}
    return list(Replay(program, expand, made_by="derivatives", differentiates=True).run(*inputs))


def _same(x: Tensor) -> Tensor:
    return x


def _value(program: Program, name: str, inputs: Sequence[Tensor]) -> Tensor:
    outputs = [spec.name for spec in program.outputs]
    values = _replayed(program.without_gradient(), inputs)
    if name in outputs:
        return values[outputs.index(name)]
    energy = values[outputs.index(program.energy)]
    by = inputs[program.inputs.index(program.input(name))]
    return _derived([energy], [by], [torch.ones_like(energy)], again=True)[0]


def _derived(
    values: Sequence[Tensor], by: Sequence[Tensor], along: Sequence[Tensor], *, again: bool
) -> tuple[Tensor, ...]:
    """Derivatives of sum(values * along); zero where nothing depends on ``by``."""
    live = [(v, a) for v, a in zip(values, along, strict=True) if v.requires_grad]
    if not live:
        return tuple(torch.zeros_like(x) for x in by)
    outputs, weights = zip(*live, strict=True)
    return torch.autograd.grad(outputs, by, weights, create_graph=again, materialize_grads=True)


def _linear(
    program: Program,
    directions: tuple[TensorSpec, ...],
    results: tuple[TensorSpec, ...],
    body: Callable[..., list[Tensor]],
    differentiable: list[str],
    constants: Mapping[str, Tensor] | None = None,
) -> Linear:
    """Trace ``body`` over the program's inputs and directions, fuse, and split by what depends on directions.

    Raises:
        PassError: an op has no derivative of this order, or the trace ties a size to a value.
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            derived, frozen = trace_program(
                body,
                (*program.inputs, *directions),
                results,
                {**constants_of(program), **(constants or {})},
                stage="forces",
                energy=program.energy,
                differentiable=differentiable,
            )
        except RuntimeError as error:
            raise PassError(
                f"the program cannot be differentiated once more: {str(error).splitlines()[0]}",
                where=Location(pass_name="derivatives"),
                hint="register a derivative for the op named above with torch.library.register_autograd",
            ) from error
        if frozen:
            raise PassError(f"differentiation tied a size to a value: {'; '.join(frozen)}")
        _sums_apart(derived.graph)
        _by_differences(derived.graph)
        derived.graph_module.recompile()
        verify(derived)
        fused = run(derived, resolve(FUSED, default_registry()), check=verify).program.copy()
    lower_guards(fused.graph)
    module = fused.graph_module
    before, after = _split(fused, {spec.name for spec in directions})
    for node in module.graph.nodes:
        node.meta = {}
    module.recompile()
    return Linear(before, after, module, Kernels([*module.parameters(), *module.buffers()]))


def _sums_apart(graph: fx.Graph) -> None:
    """A sum by rows of a sum becomes a sum of sums by rows, in place: what is over edges can then be fused."""
    pending = list(graph.find_nodes(op="call_function", target=scatter_sum))
    while pending:
        node = pending.pop()
        source, *rest = node.args
        if source.target is not aten.add.Tensor or source.kwargs or len(source.users) > 1:
            continue
        terms = source.args
        if not all(isinstance(t, fx.Node) and t.meta["val"].shape == source.meta["val"].shape for t in terms):
            continue
        with graph.inserting_before(node):
            parts = [graph.call_function(scatter_sum, (term, *rest)) for term in terms]
            total = graph.call_function(aten.add.Tensor, tuple(parts))
        for made in (*parts, total):
            made.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        graph.erase_node(source)
        pending.extend(parts)


def _by_differences(graph: fx.Graph) -> None:
    """Derivatives of weighted polynomials along a direction become differences of values, in place.

    For p(t) = P(x + t d) of degree 2, p'(0) = (p(h) - p(-h)) / 2h at any h; of degree 4, (8 (p(h) - p(-h)) -
    (p(2h) - p(-2h))) / 12h.  With h = |x| / |d| in each row and channel rounding is that of the values; no less
    than a thousandth of the row, as constant terms of gradients cancel.  These have kernels, and no table of all
    monomials.
    """
    points: dict[tuple[fx.Node, fx.Node], _Line] = {}
    for node in list(graph.find_nodes(op="call_function", target=polynomial)):
        x, directions, weight, _, _, spec, wrt = node.args
        degree = len(parse_polynomial(spec).closure) - 1 - (wrt == "direction")
        if len(directions) != 1 or weight is None or wrt == "weight" or degree > 4:
            continue
        key = x, directions[0]
        with graph.inserting_before(node):
            if key not in points:
                points[key] = _Line(graph, *key)
            total = points[key].slope(node, degree)
        node.replace_all_uses_with(total)
        graph.erase_node(node)


class _Line:
    """Points x + k h d of a line, k = -2, -1, 1, 2."""

    def __init__(self, graph: fx.Graph, x: fx.Node, d: fx.Node) -> None:
        self.call = graph.call_function
        here, there = (self.call(aten.amax.default, (self.call(aten.abs.default, (v,)), [-1], True)) for v in (x, d))
        row = self.call(aten.clamp_min.default, (self.call(aten.amax.default, (here, [-2], True)), LEAST))
        here = self.call(aten.maximum.default, (here, self.call(aten.mul.Tensor, (row, 1e-3))))
        there = self.call(aten.clamp_min.default, (there, TINY))
        self.h = self.call(aten.div.Tensor, (here, there))
        step = self.call(aten.mul.Tensor, (d, self.h))
        twice = self.call(aten.mul.Tensor, (step, 2.0))
        self.pairs = [
            tuple(self.call(op, (x, by)) for op in (aten.add.Tensor, aten.sub.Tensor)) for by in (step, twice)
        ]

    def slope(self, node: fx.Node, degree: int) -> fx.Node:
        """What replaces a polynomial with a direction."""

        def odd(pair: tuple[fx.Node, ...]) -> fx.Node:
            values = tuple(self.call(polynomial, (point, [], *node.args[2:])) for point in pair)
            return self.call(aten.sub.Tensor, values)

        total, divisor = odd(self.pairs[0]), 2.0
        if degree > 2:
            eightfold = self.call(aten.mul.Tensor, (total, 8.0))
            total, divisor = self.call(aten.sub.Tensor, (eightfold, odd(self.pairs[1]))), 12.0
        return self.call(aten.div.Tensor, (total, self.call(aten.mul.Tensor, (self.h, divisor))))


def _split(program: Program, directions: set[str]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """What does not depend on the directions, and the rest."""
    nodes = list(program.graph.nodes)
    given = [node for name, node in program.placeholders.items() if name in directions]
    late = set(given)
    for node in nodes:
        if node.op != "output" and not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    returned = list(program.results.values())
    kept: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    wanted = [*returned, *(source for node in nodes if node in late for source in node.all_input_nodes)]
    while wanted:
        node = wanted.pop()
        if node in late or node in seen:
            continue
        seen.add(node)
        if _made_again(node):
            wanted.extend(node.all_input_nodes)
        else:
            kept[node] = None

    before, after = fx.Graph(), fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op != "output" and node not in late:
            twin[node] = before.node_copy(node, twin.__getitem__)
    before.output([twin[node] for node in kept])
    before.eliminate_dead_code()

    held = {node: after.placeholder(node.name) for node in (*kept, *given)}
    recent: dict[fx.Node, tuple[fx.Node, int]] = {}

    def fetch(node: fx.Node) -> fx.Node:
        if node in held:
            return held[node]
        made, age = recent.get(node, (None, 0))
        if made is None or len(after.nodes) - age > WINDOW:
            made = after.node_copy(node, fetch)
            recent[node] = (made, len(after.nodes))
        return made

    for node in nodes:
        if node in late and node not in held:
            held[node] = after.node_copy(node, fetch)
    after.output([fetch(node) for node in returned])
    for graph in (before, after):
        for node in graph.nodes:
            node.meta = {}
    root: Any = program.graph_module
    return fx.GraphModule(root, before, "Before"), fx.GraphModule(root, after, "After")


def _made_again(node: fx.Node) -> bool:
    if node.op == "get_attr" or node.target in _VIEWS:
        return True
    value = node.meta.get("val")
    return node.target in _ELEMENTWISE and isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] >= WIDE
