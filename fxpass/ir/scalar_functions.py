"""Functions of one number per edge: found in the graph, and evaluated apart from it.

A node is one where each of its rows depends on one number of that edge, its variable, and at most on the species
at the two ends of the edge.  This is proven op by op: rows stay rows, and nothing but weights joins them.  Which
model family made the graph does not matter; basis, cutoff envelope and network are one function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .._torch_compat import OpOverload, size_expr
from ..errors import PassError
from .cost import costs
from .metadata import provenance
from .ops import SEMANTIC, gather
from .program import Program, ancestors, attribute

aten = torch.ops.aten

#: ops that look at nothing but the shape of their operand
FILLS = frozenset(
    {
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.full.default,
        aten.zeros.default,
        aten.ones.default,
    }
)
PRODUCTS = frozenset(
    {aten.mm.default, aten.addmm.default, aten.matmul.default, aten.bmm.default, aten.mv.default, aten.linear.default}
)
#: ops that rearrange elements and keep rows where the first size stays the same
LAYOUT = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten._to_copy.default,
        aten.lift_fresh_copy.default,
    }
)
#: their elements count ten times as much as those of other pointwise ops
TRANSCENDENTAL = frozenset(
    {
        "exp", "expm1", "log", "log1p", "pow", "sin", "cos", "tan", "tanh", "sigmoid", "silu", "softplus", "gelu",
        "elu", "erf", "mish", "selu", "log_sigmoid_forward",
    }
)  # fmt: skip
#: ops along one dimension or several, by the name of the argument
ALONG = {
    aten.sum.dim_IntList: "dim",
    aten.mean.dim: "dim",
    aten.prod.dim_int: "dim",
    aten.amax.default: "dim",
    aten.amin.default: "dim",
    aten.argmax.default: "dim",
    aten.linalg_vector_norm.default: "dim",
    aten.logsumexp.default: "dim",
    aten._softmax.default: "dim",
    aten._log_softmax.default: "dim",
    aten.cumsum.default: "dim",
    aten.cumprod.default: "dim",
    aten.select.int: "dim",
    aten.slice.Tensor: "dim",
    aten.cat.default: "dim",
    aten.stack.default: "dim",
    aten.split.Tensor: "dim",
    aten.split_with_sizes.default: "dim",
    aten.unbind.int: "dim",
    aten.index_select.default: "dim",
    aten.gather.default: "dim",
    aten.permute.default: "dims",
}


@dataclass(frozen=True)
class Rows:
    """What a row of a tensor depends on.

    Attributes:
        level: ``"edge"``, ``"atom"``, or ``""`` for weights and literals.
        roots: numbers of the edge, or its vector.
        ends: ends of the edge (0 sender, 1 receiver) whose species matter.
    """

    level: str = ""
    roots: frozenset[fx.Node] = frozenset()
    ends: frozenset[int] = frozenset()


CONSTANT = Rows()


@dataclass(frozen=True)
class ScalarFunction:
    """One node of a program as a function of one number per edge, and perhaps of species.

    Attributes:
        program: the float64 twin of the program.
        node: in the twin, the values, [edges, ...].
        variable: in the twin, the number, [edges] or [edges, 1].
        ends: ends of the edge whose species matter; tables are numbered by their species, the last end fastest.
        species: number of species that the program knows.
        name: name of the node, in the program as in the twin.
        variable_name: name of the variable there.
        module: path of the module that the node belongs to.
        flops: what one edge costs, from the variable on; a transcendental function counts ten.
        nearer: the same node as a function of a number nearer to it, such as DeePMD's s, through which everything goes
            and after which most of the work is done.
        costs: node of the twin -> what it costs for one edge.
        inner: the widest functions within that do not depend on species, for where tables by species are too large.
    """

    program: Program = field(repr=False)
    node: fx.Node = field(repr=False)
    variable: fx.Node = field(repr=False)
    ends: tuple[int, ...]
    species: int
    name: str
    variable_name: str
    module: str
    flops: float
    inner: tuple[ScalarFunction, ...] = ()
    nearer: ScalarFunction | None = None
    costs: Mapping[fx.Node, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tables(self) -> int:
        """How many functions of the variable alone this is."""
        return self.species ** len(self.ends)

    @property
    def channels(self) -> int:
        count = 1
        for size in self.node.meta["val"].shape[1:]:
            count *= int(size)
        return count

    def __call__(self, x: Tensor, table: Tensor) -> Tensor:
        """Values [n, channels] at x [n] for the species that ``table`` [n], int64, numbers; float64."""
        sender, receiver = self._species(table)
        shaped = x.unsqueeze(1) if self.variable.meta["val"].dim() == 2 else x
        inputs = synthetic_inputs(self.program, torch.ones(len(x), 3, dtype=x.dtype), sender, receiver)
        value: Tensor = execute(self.program, inputs, [self.node], given={self.variable: shaped})[self.node]
        return value.flatten(1) if value.dim() > 1 else value.unsqueeze(1)

    def jet(self, x: Tensor, table: Tensor, order: int) -> list[Tensor]:
        """Value and derivatives by x up to ``order``, each [n, channels], by automatic differentiation in float64.

        Raises:
            NotDifferentiable: an op has no derivative.
        """
        parts = [self._jet(a, b, order) for a, b in zip(x.split(1024), table.split(1024), strict=True)]
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]

    def _jet(self, x: Tensor, table: Tensor, order: int) -> list[Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            values = [self(x, table)]
            for _ in range(order):
                # sum over c of w_c f_c'(x) is linear in w: its gradient by w is f', for all channels at once
                weights = torch.zeros_like(values[-1], requires_grad=True)
                slope = _gradient(values[-1], x, weights)
                values.append(_gradient(slope, weights, torch.ones_like(slope)))
        return [value.detach() for value in values]

    def remaining(self, done: Iterable[ScalarFunction]) -> float:
        """What one edge costs where other functions are known."""
        known = [function.node for function in done]
        behind = ancestors([self.node], [self.variable, *known])
        return sum(self.costs[n] for n in between(self.node, self.variable) if n in behind and n not in known)

    def of_length(self, lengths: Tensor) -> Tensor:
        """The variable [3 n] of edges of ``lengths`` [n], in three directions one after the other."""
        directions = torch.tensor([[1.0, 0.0, 0.0], [0.48, -0.6, 0.64], [-0.36, 0.48, 0.8]], dtype=lengths.dtype)
        vectors = (directions.unsqueeze(1) * lengths.unsqueeze(1)).flatten(0, 1)
        first = torch.zeros(len(vectors), dtype=torch.int64)
        inputs = synthetic_inputs(self.program, vectors, first, first)
        return execute(self.program, inputs, [self.variable])[self.variable].reshape(-1)

    def literals(self) -> list[float]:
        """Numbers that the function is made with: the cutoff is among them."""
        found: set[float] = set()
        for node in between(self.node, self.variable):
            found.update(float(a) for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool))
            for n in (a for a in node.all_input_nodes if a.op == "get_attr"):
                tensor = attribute(self.program, n)
                if tensor.numel() == 1 and tensor.is_floating_point():
                    found.add(float(tensor))
        return sorted(found)

    def _species(self, table: Tensor) -> tuple[Tensor, Tensor]:
        last = table % self.species if self.ends else torch.zeros_like(table)
        first = table // self.species if len(self.ends) == 2 else last
        return first, last


class NotDifferentiable(PassError):
    """A derivative that torch refuses."""


def _gradient(value: Tensor, by: Tensor, weights: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(by)
    try:
        (found,) = torch.autograd.grad(value, by, weights, create_graph=True, allow_unused=True)
    except RuntimeError as error:  # an op without a derivative
        raise NotDifferentiable(f"it cannot be differentiated: {str(error).splitlines()[0]}") from error
    return torch.zeros_like(by) if found is None else found


# ------------------------------------------------------------------------------------------- running parts of a program


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(-len(shape), 0))
    mean = x.mean(dims, keepdim=True)
    scale = (x - mean).square().mean(dims, keepdim=True).add(eps).rsqrt()
    value = (x - mean) * scale
    value = value if weight is None else value * weight
    return (value if bias is None else value + bias), mean, scale


#: torch takes mean and deviation of a layer norm for constants from the third derivative on
_EXPANDED: dict[Any, Any] = {aten.native_layer_norm.default: _layer_norm}


def execute(
    program: Program,
    inputs: Sequence[Tensor],
    wanted: Iterable[fx.Node],
    given: Mapping[fx.Node, Tensor] | None = None,
    leaves: Iterable[fx.Node] = (),
) -> dict[fx.Node, Any]:
    """Values of ``wanted`` nodes and ``leaves``; only what they need is run.

    Args:
        inputs: of the program, in order.
        given: values of nodes that are not computed.
        leaves: nodes at whose results autograd starts anew, so that gradients by them can be asked for.
    """
    known: dict[fx.Node, Any] = dict(given or {})
    targets, cut = list(wanted), set(leaves)
    needed = ancestors([*targets, *cut], known)
    placeholders = dict(zip(program.placeholders.values(), inputs, strict=True))
    for node in program.graph.nodes:
        if node not in needed or node in known:
            continue
        if node.op == "placeholder":
            known[node] = placeholders[node]
        elif node.op == "get_attr":
            known[node] = attribute(program, node)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = _EXPANDED.get(node.target, node.target)(*args, **kwargs)
        if node in cut:
            known[node] = known[node].detach().requires_grad_()
    return {node: known[node] for node in [*targets, *cut]}


def between(node: fx.Node, variable: fx.Node) -> list[fx.Node]:
    """The nodes that lead from ``variable`` to ``node``, itself too, in the order of the graph."""
    behind = ancestors([node], [variable])
    reached: set[fx.Node] = {variable}
    ordered = [n for n in node.graph.nodes if n in behind and n is not variable]
    for n in ordered:
        if any(a in reached for a in n.all_input_nodes):
            reached.add(n)
    return [n for n in ordered if n in reached]


def synthetic_inputs(program: Program, vectors: Tensor, sender: Tensor, receiver: Tensor) -> list[Tensor]:
    """Inputs with one atom of each species, in one graph, and the given edges between them.

    Args:
        vectors: [edges, 3], Angstrom.
        sender, receiver: [edges], species at the ends.
    """
    hot = program.with_property("one_hot")
    species = int(hot[0].dims[1]) if hot else 1 + int(torch.cat([sender, receiver, sender.new_zeros(1)]).max())
    sizes = {"atoms": species, "edges": len(vectors), "graphs": 1}

    def extent(dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        base, _, more = dim.partition("+")
        return sizes[base] + int(more or 0)

    made = []
    for spec in program.inputs:
        shape = [extent(dim) for dim in spec.dims]
        if "edge_vector" in spec.properties:
            made.append(vectors.to(spec.dtype))
        elif "index:atoms" in spec.properties and spec.dims == (2, "edges"):
            made.append(torch.stack([sender, receiver]))
        elif "one_hot" in spec.properties:
            made.append(torch.eye(species, shape[1], dtype=spec.dtype))
        else:
            made.append(torch.zeros(shape, dtype=spec.dtype))
    return made


# ------------------------------------------------------------------------------------------------------------- finding


def scalar_functions(program: Program) -> tuple[ScalarFunction, ...]:
    """The widest functions of one number per edge, in the order of the graph.

    Each is a node that something else than such a function reads, without the reshaping at its end.  The variable
    is the length of the edge where the graph computes it.

    Args:
        program: at stage ``"energy"``, with shapes derived.
    """
    return tuple(_Finder(program).functions())


def function_of(program: Program, node: str) -> ScalarFunction | None:
    """The function of one number per edge that the node of this name is, or ``None``."""
    return _Finder(program).function(next(n for n in program.graph.nodes if n.name == node))


class _Finder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.twin = program.cast(torch.float64)
        pairs = zip(program.graph.nodes, self.twin.graph.nodes, strict=True)
        self.twin_of = dict(pairs)
        for node, twin in self.twin_of.items():
            twin.meta.update({key: node.meta[key] for key in ("val",) if key in node.meta})
        self.flops = {n: c.at(edges=1, atoms=0, graphs=0).flops * _weight(n) for n, c in costs(program).items()}
        self.twin_costs = {twin: self.flops[node] for node, twin in self.twin_of.items()}
        self.rows = classify(program)
        hot = program.with_property("one_hot")
        self.species = int(hot[0].dims[1]) if hot else 1
        self.variables: dict[fx.Node, fx.Node | None] = {}

    def functions(self) -> list[ScalarFunction]:
        found = dict.fromkeys(
            self.core(node)
            for node in self.program.graph.nodes
            if self.is_function(node) and any(not self.is_function(user) for user in self.readers(node))
        )
        made = (self.function(node) for node in found)
        return [function for function in made if function is not None]

    def is_function(self, node: fx.Node) -> bool:
        rows = self.rows.get(node)
        return rows is not None and rows.level == "edge" and len(rows.roots) == 1 and not self.is_vector(rows.roots)

    def is_vector(self, roots: frozenset[fx.Node]) -> bool:
        return any(root.op == "placeholder" for root in roots)

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Users that look at values; one that only looks at the size is none."""
        return [u for u in node.users if isinstance(u.meta.get("val"), (Tensor, tuple, list)) or u.op == "output"]

    def core(self, node: fx.Node) -> fx.Node:
        """``node`` without reshaping and copies to a wider shape."""
        while node.target in LAYOUT and self.is_function(node.all_input_nodes[0]):
            if node.meta["val"].dtype != node.all_input_nodes[0].meta["val"].dtype:
                break
            node = node.all_input_nodes[0]
        return node

    def function(self, node: fx.Node) -> ScalarFunction | None:
        """``node`` as a function, ``None`` where it is a variable itself, no number, or of no isotropic variable."""
        value = node.meta.get("val")
        if not self.is_function(node) or not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        (root,) = self.rows[node].roots  # type: ignore[union-attr]
        variable = self.variable(root)
        if variable is None or variable not in ancestors([node]) or node is variable:
            return None
        gates = self.gates(node, variable)
        nearer = self.made(node, gates[-1]) if gates else None
        return replace(self.made(node, variable), nearer=nearer)

    def made(self, node: fx.Node, variable: fx.Node) -> ScalarFunction:
        path = between(node, variable)
        rows = self.rows[node]
        assert rows is not None
        inner = [
            self.core(n)
            for n in (variable, *path)
            if rows.ends and self.is_plain(n) and any(u in path and not self.is_plain(u) for u in n.users)
        ]
        return ScalarFunction(
            self.twin,
            self.twin_of[node],
            self.twin_of[variable],
            tuple(sorted(rows.ends)),
            self.species,
            node.name,
            variable.name,
            provenance(node).module,
            self.work(path),
            tuple(f for n in dict.fromkeys(inner) if (f := self.function(n)) is not None),
            costs=self.twin_costs,
        )

    def work(self, path: list[fx.Node]) -> float:
        return sum(self.flops[n] for n in path)

    def is_plain(self, node: fx.Node) -> bool:
        rows = self.rows.get(node)
        return self.is_function(node) and rows is not None and not rows.ends

    def variable(self, root: fx.Node) -> fx.Node | None:
        """The number to tabulate by: the root, or the length where the root is only on the way to it."""
        if root not in self.variables:
            self.variables[root] = self._variable(root)
        return self.variables[root]

    def _variable(self, root: fx.Node) -> fx.Node | None:
        lengths = torch.linspace(0.7, 3.1, 7, dtype=torch.float64)
        node = root
        while True:
            function = ScalarFunction(
                self.twin, self.twin_of[node], self.twin_of[node], (), self.species, node.name, node.name, "", 0.0
            )
            with torch.no_grad():
                x = function.of_length(lengths).view(3, -1)
            if not torch.allclose(x, x[:1].expand_as(x), rtol=1e-9, atol=0.0):
                return None  # it depends on the direction
            nexts = [u for u in self.readers(node) if self.is_function(u)]
            if torch.allclose(x[0], lengths, rtol=1e-9, atol=0.0) or len(nexts) != 1 or not self.is_number(nexts[0]):
                return node
            node = nexts[0]

    def is_number(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or not self.is_plain(node):
            return False
        return value.dim() <= 2 and all(isinstance(s, int) and s == 1 for s in value.shape[1:])

    def gates(self, node: fx.Node, variable: fx.Node) -> list[fx.Node]:
        """Numbers after ``variable``, first to last, through which everything goes on its way to most of the work."""
        path = between(node, variable)
        numbers = [n for n in path if n is not node and self.is_number(n) and variable not in ancestors([node], [n])]
        return [n for n in numbers if self.work(between(node, n)) >= 0.5 * self.work(path)]


def _weight(node: fx.Node) -> int:
    packet = getattr(node.target, "overloadpacket", None)
    return 10 if packet is not None and packet.__name__ in TRANSCENDENTAL else 1


def classify(program: Program) -> dict[fx.Node, Rows | None]:
    """What each row of each node depends on, ``None`` where it is something else than ``Rows`` can say."""
    rows: dict[fx.Node, Rows | None] = {}
    ends: dict[fx.Node, int] = {}
    same: dict[tuple[Any, ...], fx.Node] = {}
    leads: dict[str, Any] = {}
    for spec, node in zip(program.inputs, program.placeholders.values(), strict=True):
        rows[node] = None
        if "edge_vector" in spec.properties:
            rows[node] = Rows("edge", frozenset([node]))
            leads["edge"] = size_expr(node.meta["val"].shape[0])
        if "one_hot" in spec.properties:
            rows[node] = Rows("atom")
            leads["atom"] = size_expr(node.meta["val"].shape[0])
    indices = {program.placeholders[s.name] for s in program.with_property("index:atoms") if s.dims == (2, "edges")}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            rows[node] = CONSTANT
        if node.op != "call_function":
            continue
        if node.target is aten.select.int and node.args[0] in indices and node.args[1] == 0:
            ends[node], rows[node] = int(node.args[2]), None
            continue
        found = _rows(node, rows, ends, leads)
        if found is not None and found.level == "edge" and _is_new_number(node, found):
            key = (node.target, str(node.args), str(node.kwargs))
            found = Rows("edge", frozenset([same.setdefault(key, node)]))
        rows[node] = found
    return rows


def _is_new_number(node: fx.Node, rows: Rows) -> bool:
    """A number made of the edge vector, where no single number was before."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or rows.ends or not rows.roots:
        return False
    single = value.dim() == 1 or (value.dim() == 2 and isinstance(value.shape[1], int) and value.shape[1] == 1)
    return single and (len(rows.roots) > 1 or any(root.op == "placeholder" for root in rows.roots))


def _rows(
    node: fx.Node, rows: Mapping[fx.Node, Rows | None], ends: Mapping[fx.Node, int], leads: Mapping[str, Any]
) -> Rows | None:
    target: Any = node.target
    value = node.meta.get("val")
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
    if isinstance(value, (torch.SymInt, int)):
        return CONSTANT
    if target in FILLS and isinstance(value, Tensor):
        return _filled(value, leads)
    if not node.all_input_nodes and isinstance(target, OpOverload) and not node.is_impure():
        return CONSTANT
    looked_up = _look_up(node, rows, ends)
    if looked_up is not None:
        return looked_up
    known = [rows.get(n) for n in tensors]
    if not isinstance(target, OpOverload) and getattr(target, "__name__", "") != "getitem":
        return None
    if not tensors or any(k is None for k in known) or node.is_impure():
        return None
    carrying = [n for n, k in zip(tensors, known, strict=True) if k is not None and k.level]
    levels = {k.level for k in known if k is not None and k.level}
    if not levels:
        return CONSTANT
    if len(levels) > 1:
        return None
    (level,) = levels
    lead = leads.get(level)
    if lead is None or not _keeps_rows(node, carrying, lead):
        return None
    parts = [k for k in known if k is not None]
    roots: frozenset[fx.Node] = frozenset().union(*(k.roots for k in parts))
    return Rows(level, roots, frozenset().union(*(k.ends for k in parts)))


def _filled(value: Tensor, leads: Mapping[str, Any]) -> Rows | None:
    """All rows alike: on the level that the first size belongs to."""
    if value.dim() == 0 or isinstance(value.shape[0], int):
        return CONSTANT
    first = size_expr(value.shape[0])
    return next((Rows(level) for level, lead in leads.items() if first == lead), None)


def _look_up(node: fx.Node, rows: Mapping[fx.Node, Rows | None], ends: Mapping[fx.Node, int]) -> Rows | None:
    """Rows of atoms at an end of the edge, or rows of a constant by a number that is known per row."""
    if node.target in (gather, aten.embedding.default):
        source, index = node.args[:2]
    elif node.target is aten.index_select.default and node.args[1] == 0:
        source, _, index = node.args
    elif node.target is aten.index.Tensor and len(node.args[1]) == 1:  # type: ignore[arg-type]
        source, index = node.args[0], node.args[1][0]  # type: ignore[index]
    else:
        return None
    if not isinstance(source, fx.Node) or not isinstance(index, fx.Node):
        return None
    rows_of_source, rows_of_index = rows.get(source), rows.get(index)
    if index in ends and rows_of_source is not None and rows_of_source.level == "atom":
        return Rows("edge", frozenset(), frozenset([ends[index]]))
    by_number = index.meta["val"].dtype in (torch.int64, torch.int32)
    if rows_of_source == CONSTANT and rows_of_index is not None and rows_of_index.level and by_number:
        return rows_of_index
    return None


def _keeps_rows(node: fx.Node, carrying: Sequence[fx.Node], lead: Any) -> bool:
    """Whether row k of the result depends on row k of the ``carrying`` operands alone, and on constants."""
    target: Any = node.target
    results = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    operands = [v for n in carrying for v in _tensors(n.meta["val"])]
    for value in [*results, *operands]:
        if value.dim() == 0 or size_expr(value.shape[0]) != lead:
            return False
    if getattr(target, "__name__", "") == "getitem" or target in LAYOUT:
        return True
    if target in SEMANTIC:
        return SEMANTIC[target].name in ("linear", "tensor_product", "polynomial")
    if target in PRODUCTS:
        left = node.args[1] if target is aten.addmm.default else node.args[0]
        return carrying[0] is left and (len(carrying) == 1 or target is aten.bmm.default)
    if target is aten.native_layer_norm.default:
        return len(node.args[1]) < operands[0].dim()  # type: ignore[arg-type]
    if target in ALONG:
        return _along(node, operands[0].dim())
    if target is aten.transpose.int:
        return all(int(d) % operands[0].dim() != 0 for d in node.args[1:])  # type: ignore[arg-type]
    rank = results[0].dim()
    return torch.Tag.pointwise in target.tags and all(v.dim() == rank for v in operands)


def _tensors(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _along(node: fx.Node, rank: int) -> bool:
    """Whether an op along dimensions leaves the first one alone."""
    target: Any = node.target
    name = ALONG[target]
    given = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    default = next(a.default_value for a in target._schema.arguments if a.name == name)
    dims = given.get(name, default)
    if dims is None:
        return False
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    if target is aten.permute.default:
        return int(dims[0]) % rank == 0
    if target is aten.stack.default:
        rank += 1
    if target is aten.slice.Tensor and int(dims[0]) % rank == 0:
        return given.get("start") in (None, 0) and given.get("step", 1) == 1  # the result is as long: all of it
    return bool(dims) and all(int(d) % rank != 0 for d in dims)


