"""A program: one FX graph with named, typed, dimensioned inputs and outputs.

Sizes are symbolic and have names: ``"atoms"``, ``"edges"``, ``"graphs"``.  A dimension is an
``int``, a name, or a sum such as ``"graphs+1"``.  The graph is flat: placeholders in the order of
``inputs``; ``get_attr`` nodes for weights and constants, by flat name on the graph module; one
output node that returns a tuple in the order of ``outputs``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any, Literal

import torch
from torch import fx

Dim = int | str
Stage = Literal["energy", "forces", "function"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a program.

    Attributes:
        name: field name, e.g. ``"edge_vectors"``.
        dims: shape, each an ``int`` or the name of a symbolic size.
        dtype: element type.
        irreps: irreps of the last dimension in e3nn notation, or ``None`` where it has none.
        unit: physical unit, e.g. ``"eV"`` or ``"eV/Angstrom"``.
        properties: facts that the frontend guarantees, e.g. ``"one_hot"`` for species attributes,
            ``"index:atoms"`` for an index into atoms, ``"edge_vector"`` for the input that forces come from,
            ``"differentiated"`` for others that the energy is differentiated by.
    """

    name: str
    dims: tuple[Dim, ...]
    dtype: torch.dtype
    irreps: str | None = None
    unit: str = ""
    properties: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Program:
    """A captured model at one stage of compilation.

    Attributes:
        graph_module: the flat graph with its weights.
        inputs: in placeholder order.
        outputs: in output-tuple order.
        stage: ``"energy"`` before ``differentiate``, ``"forces"`` after it; ``"function"`` where there is no energy.
        energy: name of the output (eV, one per graph) that is differentiated.
        assumptions: what passes rely on beyond the frontend's guarantees, checked at run time.
        samples: inputs by name of structures to calibrate on, in the dtypes of ``inputs``; never saved.
    """

    graph_module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    stage: Stage = "energy"
    energy: str = "energy"
    assumptions: tuple[str, ...] = field(default=())
    samples: tuple[Mapping[str, torch.Tensor], ...] = field(default=(), repr=False, compare=False)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def placeholders(self) -> dict[str, fx.Node]:
        """Input name -> placeholder node."""
        nodes = [n for n in self.graph.nodes if n.op == "placeholder"]
        return {spec.name: node for spec, node in zip(self.inputs, nodes, strict=True)}

    @property
    def results(self) -> dict[str, fx.Node]:
        """Output name -> the node that is returned under that name."""
        (returned,) = self.graph.output_node().args
        assert isinstance(returned, (tuple, list))
        return {spec.name: node for spec, node in zip(self.outputs, returned, strict=True)}

    def input(self, name: str) -> TensorSpec:
        return next(s for s in self.inputs if s.name == name)

    def with_property(self, prop: str) -> tuple[TensorSpec, ...]:
        return tuple(s for s in self.inputs if prop in s.properties)

    @property
    def differentiated(self) -> tuple[TensorSpec, ...]:
        """Inputs that the energy is differentiated by, in the order of the gradients: edge vectors last."""
        return (*self.with_property("differentiated"), *self.with_property("edge_vector"))

    def following(self, other: Program) -> Program:
        """This program, made from ``other`` by tracing it again: with its assumptions and samples."""
        assumptions = tuple(dict.fromkeys((*other.assumptions, *self.assumptions)))
        return replace(self, assumptions=assumptions, samples=other.samples)

    def without_gradient(self) -> Program:
        """The energy outputs of a force program alone, as a program of its own."""
        program, count = self.copy(), len(self.outputs) - len(self.differentiated)
        node = program.graph.output_node()
        node.args = (tuple(node.args[0])[:count],)  # type: ignore[arg-type]
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
        return replace(program, outputs=self.outputs[:count], stage="energy")

    def cast(self, dtype: torch.dtype) -> Program:
        """The program computing in ``dtype`` in place of every floating type; weights are cast, not recomputed."""

        def other(value: Any) -> Any:
            return dtype if isinstance(value, torch.dtype) and value.is_floating_point else value

        program = self.copy()
        module = program.graph_module
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point() and tensor.dtype != dtype:
                delattr(module, name)
                module.register_buffer(name, tensor.detach().to(dtype))
        for node in program.graph.nodes:
            if node.op == "call_function":
                node.args = fx.node.map_aggregate(node.args, other)
                node.kwargs = fx.node.map_aggregate(node.kwargs, other)
                if _makes_default_floats(node):
                    node.kwargs = {**node.kwargs, "dtype": dtype}
        module.recompile()

        def retyped(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(replace(s, dtype=other(s.dtype)) for s in specs)

        samples = tuple(
            {name: value.to(dtype) if value.is_floating_point() else value for name, value in sample.items()}
            for sample in self.samples
        )
        return replace(program, inputs=retyped(self.inputs), outputs=retyped(self.outputs), samples=samples)

    def copy(self) -> Program:
        """A program whose graph may be changed freely; tensors are shared with this one."""
        source = self.graph_module
        root = torch.nn.Module()
        for name, parameter in source.named_parameters(remove_duplicate=False):
            root.register_parameter(name, parameter)
        for name, buffer in source.named_buffers(remove_duplicate=False):
            root.register_buffer(name, buffer)
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        returned = graph.graph_copy(source.graph, mapping)
        graph.output(returned)
        graph.output_node().meta = copy.copy(source.graph.output_node().meta)
        return replace(self, graph_module=fx.GraphModule(root, graph, class_name="Program"))


def _makes_default_floats(node: fx.Node) -> bool:
    """Whether a node makes a floating tensor from no other, and leaves its type to torch's default."""
    schema, value = getattr(node.target, "_schema", None), node.meta.get("val")
    if schema is None or any(map(_is_tensor, node.all_input_nodes)):
        return False
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return floats and "dtype" not in node.kwargs and any(argument.name == "dtype" for argument in schema.arguments)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def attribute(program: Program, node: fx.Node) -> torch.Tensor:
    """The tensor behind a ``get_attr`` node."""
    assert node.op == "get_attr"
    value = getattr(program.graph_module, str(node.target))
    assert isinstance(value, torch.Tensor)
    return value


def add_constant(program: Program, name: str, value: torch.Tensor) -> str:
    """Store ``value`` as a buffer under a fresh flat name derived from ``name``; return that name."""
    return register(program.graph_module, name.replace(".", "_"), value.detach())


def register(root: torch.nn.Module, name: str, tensor: torch.Tensor) -> str:
    """Store ``tensor`` on ``root``, as the parameter or buffer that it is, under a fresh name; return that name."""
    name = fresh(name, lambda taken: hasattr(root, taken))
    if isinstance(tensor, torch.nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)
    return name


def fresh(name: str, taken: Callable[[str], bool], *, mark: str = "_", first: int = 1) -> str:
    """``name``, or the first of NAME_1, NAME_2, ... that is not taken."""
    return next(n for n in chain([name], (f"{name}{mark}{k}" for k in count(first))) if not taken(n))


def ancestors(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """All nodes that ``nodes`` are computed from, themselves too; not what is behind ``stop``."""
    halt, found, stack = set(stop), set[fx.Node](), list(nodes)
    while stack:
        last = stack.pop()
        if last not in found:
            found.add(last)
            if last not in halt:
                stack.extend(last.all_input_nodes)
    return found
