"""A snapshot: what a program looked like at one point of the pipeline, as plain data.

A snapshot holds no graph and no tensor, so every stage of a compilation can be kept, printed,
compared (``fxpass.ir.diff``) and stored as JSON.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from .cost import REFERENCE_SIZES, ZERO, Cost, SizeNames, node_cost, parse
from .metadata import irreps, provenance
from .ops import SEMANTIC
from .program import Program, Stage, TensorSpec

REFERENCE = re.compile(r"%([A-Za-z_]\w*)")  # a node in the text of arguments
_LONGEST_LITERAL = 40


@dataclass(frozen=True)
class NodeRecord:
    """One node.

    Attributes:
        name: node name, unique in the snapshot.
        op: fx opcode, e.g. ``"call_function"``.
        target: ``"aten.mm"``, ``"fxpass.linear"``, the attribute of a weight, the name of an input.
        args: arguments as text: nodes as ``%name``; a long string is cut and ends in a digest of the whole.
        shape: ``"[edges, 32]"``; the value for a symbolic size; empty where there is none.
        dtype: ``"float32"``, ``"int"`` for a symbolic size, empty where there is none.
        irreps: irreps of the last dimension, empty where there are none.
        module: dotted path of the module that the node comes from.
        backward: true where the node belongs to the derivative of that module's call.
        source: ``file:line`` of the call.
        made_by: the pass that made the node, empty for captured nodes.
        summary: what a semantic op computes, in place of its specification.
        cost: FLOPs and bytes in named sizes.
    """

    name: str
    op: str
    target: str
    args: str = ""
    shape: str = ""
    dtype: str = ""
    irreps: str = ""
    module: str = ""
    backward: bool = False
    source: str = ""
    made_by: str = ""
    summary: str = ""
    cost: Cost = ZERO

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the nodes among the arguments, in order, repeated where they are."""
        return tuple(REFERENCE.findall(self.args))

    @property
    def type(self) -> str:
        """Dtype and shape, e.g. ``"float32[edges, 32]"``, ``"float32"`` for a scalar."""
        if not self.shape.startswith("["):
            return self.dtype if self.dtype == "int" else self.shape
        return self.dtype + self.shape.removesuffix("[]")

    @property
    def call(self) -> str:
        """The node's value as an expression."""
        if self.op == "get_attr":
            return f"self.{self.target}"
        if self.op == "placeholder":
            return f"input {self.target}"
        if self.op == "output":
            return f"return {self.args}"
        return f"{self.target}({self.args})"

    @property
    def place(self) -> str:
        """Module path for people: ``"(model)"`` for the model itself, ``"layers.0 (backward)"``."""
        return (self.module or "(model)") + (" (backward)" if self.backward else "")

    def __str__(self) -> str:
        if self.op == "output":
            return self.call
        return f"{self.name}: {self.type} = {self.call}" if self.type else f"{self.name} = {self.call}"


@dataclass(frozen=True)
class Port:
    """One input or output: its specification as text, and the node that carries it."""

    name: str
    node: str
    shape: str
    dtype: str
    irreps: str = ""
    unit: str = ""


@dataclass(frozen=True)
class OpRow:
    """All calls of one op: their number, their shares of FLOPs and bytes (0 to 1), the irreps they give."""

    target: str
    count: int
    flops: float
    bytes: float
    irreps: tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """A program at one point of the pipeline.

    Attributes:
        label: what made it: ``"capture"``, or a pass.
        stage: ``"energy"`` or ``"forces"``.
        nodes: in graph order.
        inputs: in placeholder order.
        outputs: in output-tuple order.
        seconds: how long the making took, where known.
    """

    label: str
    stage: Stage
    nodes: tuple[NodeRecord, ...]
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    seconds: float | None = None

    @cached_property
    def cost(self) -> Cost:
        """Cost of one run."""
        return Cost.total(node.cost for node in self.nodes)

    @cached_property
    def op_counts(self) -> Counter[str]:
        """Number of calls of each op."""
        return Counter(node.target for node in self.nodes if node.op == "call_function")

    def reference_sizes(self, **sizes: float) -> dict[str, float]:
        """A value for every size the cost depends on: the given one, the reference one, or 100."""
        others = dict.fromkeys(sorted(self.cost.sizes - REFERENCE_SIZES.keys()), 100)
        return {**REFERENCE_SIZES, **others, **sizes}

    def op_rows(self, **sizes: float) -> tuple[OpRow, ...]:
        """Calls by op, the greatest shares first, at the given or the reference sizes."""
        at = self.reference_sizes(**sizes)
        whole = self.cost.at(**at)
        rows = []
        for target, count in self.op_counts.items():
            nodes = [n for n in self.nodes if n.op == "call_function" and n.target == target]
            part = Cost.total(n.cost for n in nodes).at(**at)
            rows.append(
                OpRow(
                    target,
                    count,
                    part.flops / whole.flops if whole.flops else 0.0,
                    part.bytes / whole.bytes if whole.bytes else 0.0,
                    tuple(dict.fromkeys(n.irreps for n in nodes if n.irreps)),
                )
            )
        return tuple(sorted(rows, key=lambda row: (-row.flops - row.bytes, -row.count, row.target)))

    def code(self) -> str:
        """The program as Python-like text with types; the first line says what made it, and what it costs."""
        return "\n".join(_lines(self))

    def to_json(self) -> dict[str, Any]:
        """The snapshot as JSON data."""
        text: dict[sympy.Expr, str] = {}

        def expression(expr: sympy.Expr) -> str:
            if expr not in text:  # printing is slow, and few expressions are different
                text[expr] = str(expr)
            return text[expr]

        nodes = []
        for node in self.nodes:
            data = {f.name: getattr(node, f.name) for f in fields(node) if getattr(node, f.name) != f.default}
            if node.cost != ZERO:
                data["cost"] = [expression(node.cost.flops), expression(node.cost.bytes)]
            nodes.append(data)
        return {
            "label": self.label,
            "stage": self.stage,
            "seconds": self.seconds,
            "inputs": [asdict(port) for port in self.inputs],
            "outputs": [asdict(port) for port in self.outputs],
            "nodes": nodes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Snapshot:
        """The snapshot that ``to_json`` wrote.

        Raises:
            UsageError: a cost is not an expression in sizes.
        """
        expressions: dict[str, sympy.Expr] = {}

        def expression(text: str) -> sympy.Expr:
            if text not in expressions:
                expressions[text] = parse(text)
            return expressions[text]

        nodes = []
        for node in data["nodes"]:
            flops, moved = node.get("cost", ("0", "0"))
            nodes.append(NodeRecord(**{**node, "cost": Cost(expression(flops), expression(moved))}))
        return cls(
            label=data["label"],
            stage=data["stage"],
            nodes=tuple(nodes),
            inputs=tuple(Port(**port) for port in data["inputs"]),
            outputs=tuple(Port(**port) for port in data["outputs"]),
            seconds=data["seconds"],
        )


def snapshot(program: Program, label: str, *, seconds: float | None = None) -> Snapshot:
    """Take a snapshot of ``program``.

    Args:
        program: at any stage; nodes without ``meta["val"]`` get no shape and no cost.
        label: what made the program, e.g. ``"capture"`` or the text of a pass.
        seconds: how long the making took.
    """
    sizes = SizeNames.of(program)
    placeholders, results = program.placeholders, program.results
    names = {node: name for name, node in placeholders.items()}
    return Snapshot(
        label=label,
        stage=program.stage,
        nodes=tuple(_record(node, names.get(node) or _target(node.target), sizes) for node in program.graph.nodes),
        inputs=tuple(_port(spec, placeholders[spec.name]) for spec in program.inputs),
        outputs=tuple(_port(spec, results[spec.name]) for spec in program.outputs),
        seconds=seconds,
    )


def _record(node: fx.Node, target: str, sizes: SizeNames) -> NodeRecord:
    origin = provenance(node)
    shape, dtype = _type(node.meta.get("val"), sizes)
    called: Any = node.target
    semantic = SEMANTIC.get(called)
    return NodeRecord(
        name=node.name,
        op=node.op,
        target=target,
        args=_arguments(node),
        shape=shape,
        dtype=dtype,
        irreps=irreps(node) or "",
        module=origin.module,
        backward=origin.backward,
        source=origin.source,
        made_by=origin.made_by,
        summary=semantic.summary(node) if semantic else "",
        cost=node_cost(node, sizes),
    )


def _port(spec: TensorSpec, node: fx.Node) -> Port:
    shape = "[" + ", ".join(map(str, spec.dims)) + "]"
    return Port(spec.name, node.name, shape, _literal(spec.dtype), spec.irreps or "", spec.unit)


def _type(value: object, sizes: SizeNames) -> tuple[str, str]:
    """Shape and dtype as text."""
    if isinstance(value, torch.Tensor):
        return "[" + ", ".join(map(str, sizes.shape(value))) + "]", _literal(value.dtype)
    if isinstance(value, (torch.SymInt, int)):
        return str(sizes.size(value)), "int"
    if isinstance(value, (tuple, list)):
        parts = [_type(item, sizes) for item in value]
        return "(" + ", ".join(shape for shape, _ in parts) + ")", "(" + ", ".join(dtype for _, dtype in parts) + ")"
    return "", ""


def _target(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        return str(packet)  # the arguments tell the overloads apart
    if callable(target):
        return f"{target.__module__.lstrip('_')}.{target.__name__}"
    return str(target)


def _arguments(node: fx.Node) -> str:
    if node.op == "output":
        return _literal(node.args[0])
    texts = [_literal(arg) for arg in node.args]
    texts += [f"{name}={_literal(arg)}" for name, arg in node.kwargs.items()]
    return ", ".join(texts)


def _literal(value: object) -> str:
    """Text that is equal only for equal values."""
    match value:
        case fx.Node():
            return f"%{value.name}"
        case str():
            return repr(_shortened(value))
        case torch.dtype() | torch.layout() | torch.memory_format():
            return str(value).removeprefix("torch.")
        case torch.device():
            return repr(str(value))
        case list():
            return "[" + ", ".join(map(_literal, value)) + "]"
        case tuple():
            return "(" + ", ".join(map(_literal, value)) + ("," if len(value) == 1 else "") + ")"
        case dict():
            return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
        case slice():
            return f"slice({_literal(value.start)}, {_literal(value.stop)}, {_literal(value.step)})"
        case None | bool() | int() | float() | complex():
            return repr(value)
        case _:
            return _shortened(str(value))


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST_LITERAL:
        return text
    return f"{text[: _LONGEST_LITERAL - 12]}…#{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# ---------------------------------------------------------------------------------------------- printing


def _lines(snap: Snapshot) -> Iterator[str]:
    took = "" if snap.seconds is None else f" in {snap.seconds:.2f} s"
    yield f"# made by {snap.label}{took}: {snap.stage} program, {len(snap.nodes)} nodes, {snap.cost}"
    ports = {port.node: port for port in snap.inputs}
    yield f"def {snap.stage}("
    yield "    self,"
    for node in snap.nodes:
        if node.op == "placeholder":
            port = ports.get(node.name)
            remarks = [port.irreps, port.unit] if port else []
            yield f"    {node.name}{_annotation(node)}," + _comment(*remarks)
    yield "):"
    place = None
    for node in snap.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            returned = ", ".join(port.node for port in snap.outputs)
            names = ", ".join(port.name for port in snap.outputs)
            yield f"    return ({returned}{',' if len(snap.outputs) == 1 else ''})" + _comment(names)
            continue
        if node.op != "get_attr" and node.place != place:
            place = node.place
            yield f"    # {place}"
        value = node.shape if node.dtype == "int" else ""
        made = f"by {node.made_by}" if node.made_by else ""
        remark = _comment(value, node.irreps, node.summary, node.source, made)
        call = REFERENCE.sub(r"\1", node.call)
        yield f"    {node.name}{_annotation(node)} = {call}{remark}"


def _annotation(node: NodeRecord) -> str:
    if node.shape.startswith("("):
        return ": tuple"
    return f": {node.type}" if node.type else ""


def _comment(*remarks: str) -> str:
    text = "; ".join(remark for remark in remarks if remark)
    return f"  # {text}" if text else ""
