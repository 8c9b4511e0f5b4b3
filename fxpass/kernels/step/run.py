"""Runs steps: the Python function around the C++ one, and a graph that calls steps in place of its nodes."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ...errors import KernelError
from ..choice import Choice
from .rules import RULES, Out
from .translate import Refusal, Step, translate

#: a node of this many is not worth a function of its own
FEW = 2


@dataclass(frozen=True)
class Plan:
    """What runs a graph, in order.

    Attributes:
        parts: steps, and nodes that run as ATen.
        refused: why a node is in no step, by its name.
    """

    parts: tuple[Step | fx.Node, ...]
    refused: Mapping[str, str]

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(part for part in self.parts if isinstance(part, Step))


def plan(graph: fx.Graph, choices: Mapping[str, Choice]) -> Plan:
    """Steps for as much of a graph as C++ can be printed for.

    Args:
        graph: whose nodes have ``meta["val"]``.
        choices: kernels by name of the node that they run.
    """
    refused: dict[str, str] = {}
    for node in _calls(graph):
        if node.name not in choices and node.target not in RULES:
            refused[node.name] = f"no C++ is printed for {node.target}"
    while True:
        try:
            return Plan(_parts(graph, choices, refused), refused)
        except Refusal as refusal:
            refused[refusal.node.name] = refusal.reason


def _parts(graph: fx.Graph, choices: Mapping[str, Choice], refused: dict[str, str]) -> tuple[Step | fx.Node, ...]:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    left = _calls(graph)
    for node in left:  # parts of a result are where the whole is
        if node.target is operator.getitem and node.all_input_nodes[0].name in refused:
            refused.setdefault(node.name, "a part of what ATen computes")
    parts: list[Step | fx.Node] = []
    waiting = set(left)
    in_step = True
    while left:
        group: list[fx.Node] = []
        for node in left:
            if (node.name not in refused) is in_step and not any(n in waiting for n in node.all_input_nodes):
                group.append(node)
                waiting.discard(node)
        chosen = set(group)
        left = [n for n in left if n not in chosen]
        if in_step and group:
            busy = [n for n in group if n.name in choices]
            if not busy and len(group) <= FEW:
                parts.extend(group)
            else:
                read = [n for n in group if any(user not in chosen for user in n.users)]
                parts.append(translate(group, read, choices, placeholders))
        else:
            parts.extend(group)
        in_step = not in_step
    return tuple(parts)


def _calls(graph: fx.Graph) -> list[fx.Node]:
    """What computes tensors; sizes are computed where they are read."""
    calls = (n for n in graph.nodes if n.op == "call_function")
    return [n for n in calls if not isinstance(n.meta["val"], torch.SymInt | int)]


def bind(step: Step, fixed: Sequence[Tensor], libraries: Mapping[str, ctypes.CDLL]) -> Callable[..., list[Tensor]]:
    """The function that runs a step: tensors of its inputs -> tensors of its outputs.

    The arena is kept from call to call, so that memory of the operating system is asked for once; calls at the same
    time have an arena each.

    Args:
        fixed: in the order of ``step.fixed``.
        libraries: by name, the step's own and those of its kernels.
    """
    library = libraries[step.name]
    function, room = getattr(library, step.name), getattr(library, f"{step.name}_bytes")
    function.argtypes, function.restype = (*(ctypes.c_void_p,) * 6, ctypes.c_int), ctypes.c_int
    room.argtypes, room.restype = (ctypes.c_void_p,) * 2, ctypes.c_int64
    constants = [tensor.contiguous() for tensor in fixed]
    fixed_addresses = _addresses([t.data_ptr() for t in constants])
    called = [getattr(libraries[_kernel(name, libraries)], name) for name in step.functions]
    functions = _addresses([ctypes.cast(each, ctypes.c_void_p).value for each in called])
    wanted = [(Out(node.meta["val"]), node.name) for node in step.inputs]
    places = list(step.symbols.values())
    known = {symbol: k for k, symbol in enumerate(step.symbols)}
    expected = [_shape(out.shape, known) for out, _ in wanted]
    ranks = [len(out.shape) for out, _ in wanted]
    shapes = [(_shape(out.shape, known), out.dtype) for _, out in step.outputs]
    Addresses, Made = ctypes.c_void_p * len(step.inputs), ctypes.c_void_p * len(step.outputs)
    Sizes = ctypes.c_int64 * len(places)
    arenas: list[Tensor] = []

    def run(*tensors: Tensor, keep: Sequence[Tensor] = constants) -> list[Tensor]:  # as long as their addresses
        given = [t.contiguous() for t in tensors]
        of = [list(t.shape) for t in given]
        if [len(shape) for shape in of] != ranks:
            raise KernelError(_misfit(wanted, given))
        sizes = [of[k][d] for k, d in places]
        if any(shape != wants(sizes) for shape, wants in zip(of, expected, strict=True)):
            raise KernelError(_misfit(wanted, given))
        made = [torch.empty(shape(sizes), dtype=dtype, device="cpu") for shape, dtype in shapes]
        numbers = Sizes(*sizes)
        needed = room(numbers, functions)
        try:
            arena = arenas.pop()
        except IndexError:
            arena = None
        if arena is None or arena.numel() < needed:
            arena = torch.empty(needed + needed // 8, dtype=torch.uint8, device="cpu")
        failure = function(
            Addresses(*[t.data_ptr() for t in given]),
            fixed_addresses,
            Made(*[t.data_ptr() for t in made]),
            numbers,
            arena.data_ptr(),
            functions,
            torch.get_num_threads(),
        )
        arenas.append(arena)
        if failure:
            raise KernelError(step.failures[failure - 1])
        return made

    return run


def graph_of(graph: fx.Graph, plan: Plan, functions: Mapping[str, Callable[..., Any]]) -> fx.Graph:
    """The graph that runs a plan; ``functions`` has what runs each step and each kernel, by name of step or node."""
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # weights and sizes, where they are needed
            copies[node] = made.node_copy(node, copied)
        return copies[node]

    for node in graph.nodes:
        if node.op == "placeholder":
            copied(node)
    for part in plan.parts:
        if isinstance(part, fx.Node):
            if part.name in functions:  # a kernel that Python calls
                copied(part).target = functions[part.name]
            copied(part)
            continue
        result = made.call_function(functions[part.name], tuple(copied(n) for n in part.inputs))
        for number, (node, _) in enumerate(part.outputs):
            copies[node] = made.call_function(_item, (result, number))
    made.output(fx.map_arg(graph.output_node().args[0], copied))
    for node in made.nodes:
        node.meta = {}
    return made


def _item(values: list[Tensor], number: int) -> Tensor:
    return values[number]


def _kernel(function: str, libraries: Mapping[str, ctypes.CDLL]) -> str:
    return function if function in libraries else function.removesuffix("_scratch")


def _addresses(values: Sequence[int | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(values))(*values)


def _shape(shape: Sequence[sympy.Expr], known: Mapping[sympy.Symbol, int]) -> Callable[[Sequence[int]], list[int]]:
    """Sizes of a call -> shape of a tensor."""
    symbols = list(known)
    plain = [int(n) if n.is_Integer else n for n in shape]
    if all(isinstance(n, int) or n in known for n in plain):
        at = [(n, False) if isinstance(n, int) else (known[n], True) for n in plain]
        return lambda sizes: [sizes[n] if symbolic else n for n, symbolic in at]
    whole = sympy.lambdify([symbols], list(shape), "math")
    return lambda sizes: [int(n) for n in whole(sizes)]


def _misfit(wanted: Sequence[tuple[Out, str]], given: Sequence[Tensor]) -> str:
    pairs = zip(wanted, given, strict=True)
    said = [f"{name} {[str(n) for n in out.shape]} as {list(t.shape)}" for (out, name), t in pairs]
    return f"shapes do not belong together: {'; '.join(said)}"
