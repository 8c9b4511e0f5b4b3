"""From nodes of a graph to the source of one C++ function."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..._torch_compat import size_expr
from ..call import Constant, Number, Operand, Result, Rows, Scratch, Threads
from ..choice import Choice
from .rules import RULES, Out
from .values import Formula, Place, Value
from .views import Unsupported, numel, printed, same
from .writer import Writer

#: what a rule raises where an op has arguments that it does not know
_NOT_PRINTED = (Unsupported, IndexError, KeyError, ZeroDivisionError, OverflowError)
#: arguments of ops that say how to make a tensor whose shape and type are known already
_MAKING = {"dtype", "layout", "device", "pin_memory", "memory_format"}


class Refusal(Exception):
    """A node that no C++ is printed for, and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


@dataclass(frozen=True)
class Fixed:
    """A tensor that never changes: a weight by name, or the argument of a node as its kernel packs it."""

    name: str
    position: int = -1


@dataclass(frozen=True)
class Step:
    """One C++ function in place of some nodes.

    Attributes:
        name: of the function.
        source: C++ text.
        inputs: nodes whose tensors each call is given, contiguous.
        fixed: tensors that are the same at every call.
        outputs: nodes whose tensors it makes, with shapes and types.
        symbols: input and dimension that each size is read from, in the order of ``sizes``.
        functions: names of the kernels' functions that it calls.
        failures: what its return values mean, from 1.
        nodes: how many it stands for.
    """

    name: str
    source: str
    inputs: tuple[fx.Node, ...]
    fixed: tuple[Fixed, ...]
    outputs: tuple[tuple[fx.Node, Out], ...]
    symbols: Mapping[sympy.Symbol, tuple[int, int]]
    functions: tuple[str, ...]
    failures: tuple[str, ...]
    nodes: int


def translate(
    nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], choices: Mapping[str, Choice], placeholders: Sequence[fx.Node]
) -> Step:
    """One function for ``nodes``.

    Args:
        nodes: calls, in an order in which they can run; their ``meta["val"]`` tell shapes and types.
        outputs: those that others read.
        choices: kernels by name of the node that they run.
        placeholders: of the whole graph, whose shapes tell all sizes.

    Raises:
        Refusal: for one of the nodes no C++ is printed.
    """
    return _Translation(choices, placeholders).step(nodes, outputs)


class _Translation:
    def __init__(self, choices: Mapping[str, Choice], placeholders: Sequence[fx.Node]) -> None:
        self.choices = choices
        self.placeholders = placeholders
        self.writer = Writer()
        self.values: dict[fx.Node, Any] = {}
        self.inputs: list[fx.Node] = []
        self.fixed: list[Fixed] = []

    def step(self, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Step:
        for node in nodes:
            try:
                self.values[node] = self.value(node)
            except _NOT_PRINTED as error:
                raise Refusal(node, f"{node.target}: {error}") from None
        made = []
        for number, node in enumerate(outputs):
            try:
                self.return_value(number, node)
            except _NOT_PRINTED as error:
                raise Refusal(node, f"{node.target}: {error}") from None
            made.append((node, Out(node.meta["val"])))
        symbols = self.symbols(nodes[0])
        lines = [f"{len(nodes)} ops in one function: kernels, and loops for what is between them", "sizes:"]
        lines += [f"  {s}: dimension {d} of {self.inputs[k].name}" for s, (k, d) in symbols.items()]
        text = self.writer.source("STEP", [str(s) for s in symbols], lines)
        name = f"step_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        w = self.writer
        return Step(
            name,
            text.replace("STEP", name),
            tuple(self.inputs),
            tuple(self.fixed),
            tuple(made),
            symbols,
            tuple(w.functions),
            tuple(w.failures),
            len(nodes),
        )

    # --- values

    def value(self, node: fx.Node) -> Any:
        """What a node of the step stands for."""
        args = fx.map_arg(node.args, self.known)
        kwargs = {k: v for k, v in fx.map_arg(node.kwargs, self.known).items() if k not in _MAKING}
        if node.name in self.choices:
            return self.call(node, args)
        if node.target not in RULES:
            raise Unsupported(f"the op {node.target}")
        out = Out(node.meta["val"])
        value = RULES[node.target](self.writer, out, *args, **kwargs)
        if isinstance(value, Formula) and not value.free and len(node.users) > 1:
            value = Place(self.writer.place(value))
        return value

    def known(self, node: fx.Node) -> Any:
        """The value of an argument, also of one from outside the step."""
        if node not in self.values:
            made = node.meta["val"]
            if isinstance(made, torch.SymInt | int):
                self.values[node] = size_expr(made)
            elif not isinstance(made, Tensor):
                raise Unsupported(f"the argument {node.name}")
            elif node.op == "get_attr":
                self.fixed.append(Fixed(str(node.target)))
                self.values[node] = Place(self.writer.buffer("fixed", made.dtype, Out(made).shape))
            else:
                self.inputs.append(node)
                self.values[node] = Place(self.writer.buffer("given", made.dtype, Out(made).shape))
        return self.values[node]

    def return_value(self, number: int, node: fx.Node) -> None:
        """Puts a value where the caller looks for it."""
        w, value, out = self.writer, self.known(node), Out(node.meta["val"])
        if not isinstance(value, Value):
            raise Unsupported("a result that is no tensor")
        if isinstance(value, Place):
            view = value.view
            buffer = w.buffers[view.buffer]
            whole = view.contiguous and view.offset == 0 and same(numel(view.shape) * out.dtype.itemsize, buffer.bytes)
            if buffer.source == "arena" and whole:  # it is computed there
                w.buffers[view.buffer] = replace(buffer, source="made", number=number)
                return
        to = w.buffer("made", out.dtype, out.shape)
        w.buffers[to.buffer] = replace(w.buffers[to.buffer], number=number)
        w.store(value, to)

    def call(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """A call of a kernel."""
        choice = self.choices[node.name]
        call, w = choice.call, self.writer
        if call is None:
            raise Unsupported("a kernel that is called from Python only")
        made = node.meta["val"]
        outs = [Out(t) for t in (made if isinstance(made, tuple | list) else [made])]
        results = [w.buffer("arena", out.dtype, out.shape) for out in outs]
        texts, types, reads = [], [], set[int]()
        for argument in call.arguments:
            type, text = "int64_t", ""
            match argument:
                case Operand(position):
                    type, text = "const void*", "nullptr"
                    if position is not None and args[position] is not None:
                        view = w.contiguous(args[position])
                        reads.add(view.buffer)
                        text = view.pointer()
                case Constant(position):
                    self.fixed.append(Fixed(node.name, position))
                    view = w.buffer("fixed", outs[0].dtype, ())
                    reads.add(view.buffer)
                    type, text = "const void*", view.pointer()
                case Result(number):
                    type, text = "void*", results[number].pointer()
                case Rows(position):
                    text = printed(args[position].shape[0])
                case Number(position):
                    text = printed(args[position])
                case Scratch(rows):
                    room = w.function(f"{choice.kernel.name}_scratch", "int64_t (*)(int64_t)")
                    w.scratch.append(f"{room}({printed(args[rows.position].shape[0])}) * {outs[0].dtype.itemsize}")
                    type, text = "void*", "scratch"
                case Threads():
                    type, text = "int", "threads"
            texts.append(text)
            types.append(type)
        signature = f"{'int' if call.failure else 'void'} (*)({', '.join(types)})"
        line = f"{w.function(choice.kernel.name, signature)}({', '.join(texts)})"
        line = f"if ({line}) return {w.fail(call.failure)};" if call.failure else f"{line};"
        comment = f"// {node.name} {tuple(outs[0].shape)}"
        w.emit([comment, line], frozenset(reads), frozenset(view.buffer for view in results))
        places = [Place(view) for view in results]
        return places if isinstance(made, tuple | list) else places[0]

    # --- sizes

    def symbols(self, first: fx.Node) -> dict[sympy.Symbol, tuple[int, int]]:
        """Where each size is read; inputs of the whole graph are added where those of the step do not tell it."""
        wanted: set[sympy.Symbol] = set()
        for buffer in self.writer.buffers:
            wanted |= buffer.bytes.free_symbols
        for value in self.values.values():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, Value):
                    wanted |= set[sympy.Symbol]().union(*(n.free_symbols for n in each.shape))
                elif isinstance(each, sympy.Expr):
                    wanted |= each.free_symbols
        found: dict[sympy.Symbol, tuple[int, int]] = {}
        seen: set[fx.Node] = set()
        while missing := wanted - found.keys():
            telling = (n for n in (*self.inputs, *self.placeholders) if n not in seen and missing & _sizes(n))
            node = next(telling, None)
            if node is None:
                raise Refusal(first, f"no input has the sizes {missing}")
            seen.add(node)
            self.known(node)
            for d, n in enumerate(Out(node.meta["val"]).shape):
                wanted |= n.free_symbols  # its whole shape is checked at each call
                if n.is_Symbol:
                    found.setdefault(n, (self.inputs.index(node), d))
        return {symbol: found[symbol] for symbol in sorted(found, key=str)}


def _sizes(node: fx.Node) -> set[sympy.Symbol]:
    """Sizes that the shape of a node tells as they are."""
    made = node.meta["val"]
    return {n for n in Out(made).shape if n.is_Symbol} if isinstance(made, Tensor) else set()
