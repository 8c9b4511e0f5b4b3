"""Tree patterns over the nodes of a graph: what a rule looks for.

A pattern is anchored at a root node and reads from a node to its arguments::

    Op(aten.mul.Tensor, Op(aten.mm.default, Var("x"), Var("w")), Lit("scale"))

matches ``mm(x, w) * scale`` for a literal scale and binds ``x``, ``w`` and ``scale``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType, EllipsisType, MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import fx

OpOverload = type(torch.ops.aten.add.Tensor)  # the class has no public name
Target: TypeAlias = Callable[..., Any]
Predicate: TypeAlias = Callable[[fx.Node], bool]


@dataclass(frozen=True, init=False)
class Op:
    """A node by its target and its arguments.

    ``Op(targets, *args, **kwargs)``: ``targets`` is an ``OpOverload`` or a builtin such as
    ``operator.getitem``, a tuple of them, or a Python function ``node -> bool``.  An argument is a
    pattern, a list of patterns, or a plain value that the node's argument must equal.  Arguments are
    matched by their schema names, however the node passes them.  Arguments that are left out must have
    their schema's default; after a final ``...`` they may have any value.
    """

    targets: tuple[Target, ...]
    predicate: Predicate | None
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    open: bool

    def __init__(self, targets: Target | tuple[Target, ...] | Predicate, /, *args: Any, **kwargs: Any) -> None:
        if isinstance(targets, (OpOverload, BuiltinFunctionType)):
            targets = (targets,)
        is_open = bool(args) and isinstance(args[-1], EllipsisType)
        object.__setattr__(self, "targets", targets if isinstance(targets, tuple) else ())
        object.__setattr__(self, "predicate", None if isinstance(targets, tuple) else targets)
        object.__setattr__(self, "args", args[:-1] if is_open else args)
        object.__setattr__(self, "kwargs", tuple(kwargs.items()))
        object.__setattr__(self, "open", is_open)

    def accepts(self, node: fx.Node) -> bool:
        """Whether the node's target, or the predicate, fits; arguments are not looked at."""
        return node.target in self.targets if self.predicate is None else self.predicate(node)

    def __str__(self) -> str:
        if self.predicate is not None:
            return self.predicate.__name__
        return " or ".join(target_name(target) for target in self.targets)


@dataclass(frozen=True)
class Var:
    """Any node, bound to ``name``; one name binds one node.  With ``pattern``, a node that matches it."""

    name: str
    pattern: Op | OneOf | Shared | None = None


@dataclass(frozen=True)
class Lit:
    """An argument that is not a node: number, string, dtype, ``None``, or a list (which may hold symbolic sizes)."""

    name: str
    predicate: Callable[[Any], bool] | None = None


@dataclass(frozen=True, init=False)
class OneOf:
    """The first of several patterns that matches; names bound only by another one are ``None``."""

    options: tuple[Pattern, ...]

    def __init__(self, *options: Pattern) -> None:
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class Shared:
    """A node of the pattern that may have users outside the match; it stays where they need it."""

    pattern: Op | OneOf


Pattern: TypeAlias = Op | Var | Lit | OneOf | Shared


@dataclass(frozen=True)
class Match:
    """A full match: the root, what the names are bound to, and the matched nodes, root first."""

    root: fx.Node
    bindings: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class PartialMatch:
    """The deepest failure below a root: how many nodes of the pattern matched, the node to blame, and why."""

    root: fx.Node
    matched: int
    node: fx.Node
    reason: str


def target_name(target: object) -> str:
    """``aten.mul.Tensor`` for an overload, ``getitem`` for a function."""
    return str(target) if isinstance(target, (OpOverload, str)) else getattr(target, "__name__", repr(target))


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a node by name, in schema order, defaults filled in.

    Where there is no schema, a positional argument is named by its position (``"0"``).
    """
    if not isinstance(node.target, OpOverload):
        return {str(i): value for i, value in enumerate(node.args)} | node.kwargs
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def names(pattern: object) -> tuple[str, ...]:
    """Names that a pattern binds, each once."""
    return tuple(dict.fromkeys(_names(pattern)))


def _names(pattern: object) -> Iterator[str]:
    match pattern:
        case Lit(name):
            yield name
        case Var(name, inner):
            yield name
            yield from _names(inner)
        case Op():
            yield from _names((*pattern.args, *(value for _, value in pattern.kwargs)))
        case OneOf(options):
            yield from _names(options)
        case Shared(inner):
            yield from _names(inner)
        case list() | tuple():
            for part in pattern:
                yield from _names(part)


def root_ops(pattern: Pattern) -> tuple[Op, ...]:
    """The ops of which the root of a match must be one; empty where the pattern is not anchored at an op."""
    match pattern:
        case Op():
            return (pattern,)
        case Var(_, Op() | OneOf() | Shared() as inner) | Shared(inner):
            return root_ops(inner)
        case OneOf(options):
            found = tuple(root_ops(option) for option in options)
            return tuple(op for ops in found for op in ops) if all(found) else ()
        case _:
            return ()


def match(pattern: Pattern, root: fx.Node) -> Match | PartialMatch | None:
    """Match ``pattern`` at ``root``.

    Returns a partial match only where the root and at least one further node matched, ``None`` below that.
    """
    attempt = _Attempt()
    for state in attempt.match(pattern, root, root, _State()):
        outside = _used_outside(state)
        if outside is None:
            unbound = dict.fromkeys(names(pattern))
            return Match(root, MappingProxyType({**unbound, **state.bindings}), state.nodes)
        node, user = outside
        attempt.fail(state, node, f"{node.name} is also used by {user.name}, outside the match")
    best = attempt.best
    return PartialMatch(root, best.matched, best.node, best.reason) if best and best.matched >= 2 else None


@dataclass(frozen=True)
class _State:
    bindings: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()
    shared: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class _Failure:
    matched: int
    node: fx.Node
    reason: str


class _Attempt:
    """A backtracking match: each method yields every way in which a pattern fits, and notes the deepest failure."""

    def __init__(self) -> None:
        self.best: _Failure | None = None

    def fail(self, state: _State, node: fx.Node, reason: str) -> None:
        if self.best is None or len(state.nodes) > self.best.matched:
            self.best = _Failure(len(state.nodes), node, reason)

    def match(self, pattern: object, value: Any, user: fx.Node, state: _State) -> Iterator[_State]:
        """Match an argument ``value`` of ``user``, which is to blame where the value is not a node."""
        match pattern:
            case Op():
                yield from self.match_op(pattern, value, user, state)
            case OneOf(options):
                for option in options:
                    yield from self.match(option, value, user, state)
            case Shared(inner):
                if isinstance(value, fx.Node):
                    state = replace(state, shared=state.shared | {value})
                yield from self.match(inner, value, user, state)
            case Var(name, inner):
                if not isinstance(value, fx.Node):
                    self.fail(state, user, f"{name} of {user.name} is {value!r}, not a node")
                elif name in state.bindings and state.bindings[name] is not value:
                    self.fail(state, user, f"{name} is {state.bindings[name]} and also {value.name}")
                else:
                    state = replace(state, bindings={**state.bindings, name: value})
                    yield from (state,) if inner is None else self.match(inner, value, user, state)
            case Lit(name, predicate):
                if isinstance(value, fx.Node):
                    self.fail(state, user, f"{name} of {user.name} is {value.name}, not a literal")
                elif name in state.bindings and state.bindings[name] != value:
                    self.fail(state, user, f"{name} is {state.bindings[name]!r} and also {value!r}")
                elif predicate is not None and not predicate(value):
                    self.fail(state, user, f"{name} of {user.name} is {value!r}")
                else:
                    yield replace(state, bindings={**state.bindings, name: value})
            case list() | tuple():
                if isinstance(value, (list, tuple)) and len(value) == len(pattern):
                    yield from self.match_all(tuple(zip(pattern, value, strict=True)), user, state)
                else:
                    self.fail(state, user, f"{user.name} has {value!r} where {len(pattern)} values are expected")
            case _:
                if isinstance(value, fx.Node) or value != pattern:
                    self.fail(state, user, f"{user.name} has {value!r}, not {pattern!r}")
                else:
                    yield state

    def match_op(self, op: Op, value: Any, user: fx.Node, state: _State) -> Iterator[_State]:
        if not isinstance(value, fx.Node):
            self.fail(state, user, f"{user.name} has {value!r}, not {op}")
            return
        if not op.accepts(value):
            self.fail(state, value, f"{value.name} is {target_name(value.target)}, not {op}")
            return
        given = arguments(value)
        expected = dict(zip(given, op.args, strict=False)) | dict(op.kwargs)
        if len(op.args) > len(given) or not expected.keys() <= given.keys():
            self.fail(state, value, f"{value.name} takes other arguments than the pattern")
            return
        if not op.open:
            free = next((name for name in given if name not in expected and not _is_default(value, name, given)), None)
            if free is not None:
                self.fail(state, value, f"{free} of {value.name} is {given[free]!r}, not the default")
                return
        if value not in state.nodes:
            state = replace(state, nodes=(*state.nodes, value))
        yield from self.match_all(tuple((inner, given[name]) for name, inner in expected.items()), value, state)

    def match_all(self, pairs: tuple[tuple[object, Any], ...], user: fx.Node, state: _State) -> Iterator[_State]:
        if not pairs:
            yield state
            return
        (pattern, value), *rest = pairs
        for found in self.match(pattern, value, user, state):
            yield from self.match_all(tuple(rest), user, found)


def _is_default(node: fx.Node, name: str, given: Mapping[str, Any]) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    argument = next(a for a in node.target._schema.arguments if a.name == name)
    return argument.has_default_value() and bool(given[name] == argument.default_value)


def _used_outside(state: _State) -> tuple[fx.Node, fx.Node] | None:
    """A node below the root that would have to be computed in any case, and who needs it; weights cost nothing."""
    for node in state.nodes[1:]:
        if node not in state.shared and node.op == "call_function":
            for user in node.users:
                if user not in state.nodes:
                    return node, user
    return None
