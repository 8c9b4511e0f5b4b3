"""The arguments and results of any module as a flat list of tensors, and the way back.

A *tree* says how arguments or results are made of tensors, as JSON has it: ``{"tensor": 2}`` is the third of the flat
list, ``{"list": [...]}``, ``{"tuple": [...]}`` and ``{"dict": {...}}`` hold trees, and ``{"constant": 3}`` is a value
that is always the same.
"""

from __future__ import annotations

import inspect
import keyword
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any

from torch import Tensor, fx, nn

from ..errors import Location, PackageError, UsageError
from ..ir.program import TensorSpec
from . import checks

Tree = dict[str, Any]

#: what a constant may be: values that print as they are read
CONSTANTS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Signature:
    """How a module is called, and what it returns.

    Attributes:
        parameters: name and tree of each argument of ``forward`` in order; those with ``"default"`` in their tree may
            be left out, those with ``"keyword"`` must be given by name.
        result: tree of what it returns.
        paths: where each tensor is among the arguments, such as ``data.positions``.
    """

    parameters: tuple[tuple[str, Tree], ...]
    result: Tree
    paths: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"parameters": [list(p) for p in self.parameters], "result": self.result, "paths": list(self.paths)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """What :meth:`to_json` wrote.

        Raises:
            PackageError: a parameter, which becomes part of the source code of the drop-in, has no name of one.
        """
        parameters = tuple((str(name), dict(tree)) for name, tree in data["parameters"])
        for name, _ in parameters:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise PackageError(f"the package names {name!r}, which is not a name", hint="save the model again")
        return cls(parameters, dict(data["result"]), tuple(map(str, data["paths"])))

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments by place and by name that are made of ``tensors``; what has a default is left out."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        skipped = False
        for name, tree in self.parameters:
            if "default" in tree:
                skipped = True
            elif "keyword" in tree or skipped:
                kwargs[name] = unflatten(tree, tensors)
            else:
                args.append(unflatten(tree, tensors))
        return tuple(args), kwargs


def flatten(value: Any, path: str, into: list[tuple[str, Tensor]]) -> Tree:
    """The tree of ``value``, whose tensors are appended to ``into`` with their paths, such as ``data.positions``.

    Raises:
        UsageError: something in it is neither a tensor, nor a number, a text or None, nor a tuple, list or dict.
    """
    if isinstance(value, Tensor):
        into.append((path, value))
        return {"tensor": len(into) - 1}
    if type(value) in CONSTANTS:
        return {"constant": value}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: flatten(item, f"{path}.{key}", into) for key, item in value.items()}}
    if type(value) in (list, tuple):
        kind = type(value).__name__
        return {kind: [flatten(item, f"{path}.{k}", into) for k, item in enumerate(value)]}
    raise UsageError(
        f"{path} is a {type(value).__qualname__}, which a compiled module cannot take or return",
        hint="tensors, numbers, texts, None, and tuples, lists and dicts of these; wrap the module to convert the rest",
    )


def unflatten(tree: Tree, tensors: Sequence[Any]) -> Any:
    """The value that a tree says; the inverse of :func:`flatten`."""
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "constant" in tree:
        return tree["constant"]
    if "dict" in tree:
        return {key: unflatten(item, tensors) for key, item in tree["dict"].items()}
    values = [unflatten(item, tensors) for item in _items(tree)]
    return tuple(values) if "tuple" in tree else values


def _items(tree: Tree) -> list[Tree]:
    """The trees in that of a tuple or list."""
    items: list[Tree] = tree["tuple"] if "tuple" in tree else tree["list"]
    return items


def same_shape(a: Tree, b: Tree) -> bool:
    """Whether two trees hold tensors in the same places; their constants may differ."""
    return _places(a) == _places(b)


def _places(tree: Tree) -> Any:
    if "dict" in tree:
        return {key: _places(item) for key, item in tree["dict"].items()}
    for kind in ("list", "tuple"):
        if kind in tree:
            return kind, [_places(item) for item in tree[kind]]
    return "tensor" in tree


def parameters(module: nn.Module, example: Any) -> tuple[tuple[tuple[str, Tree], ...], list[tuple[str, Tensor]]]:
    """Parameters of ``module.forward`` as the example gives them, and the example's tensors with their paths.

    ``*args`` and ``**kwargs`` of ``forward`` become parameters of their own, as many as the example has.

    Args:
        example: a tuple of arguments, a dict of arguments by name, or one tensor.

    Raises:
        UsageError: they do not fit ``forward``, hold no tensor, or hold something that is none of the kinds above.
    """
    if isinstance(example, Tensor):
        example = (example,)
    if not isinstance(example, (tuple, list, dict)):
        raise UsageError(
            f"example_inputs is a {type(example).__qualname__}", hint="a tuple of arguments, or a dict of them by name"
        )
    try:
        signature = inspect.signature(module.forward)
    except ValueError as error:
        raise UsageError(
            f"forward does not say which arguments it takes: {error}",
            where=Location(source=type(module).__qualname__),
            hint="a module around it, whose forward names them",
        ) from error
    try:
        bound = signature.bind(**example) if isinstance(example, dict) else signature.bind(*example)
    except TypeError as error:
        raise UsageError(f"example_inputs do not fit forward{signature}: {error}") from error
    tensors: list[tuple[str, Tensor]] = []
    found: list[tuple[str, Tree]] = []
    for name, parameter in signature.parameters.items():
        if name in bound.arguments:
            given = bound.arguments[name]
        elif parameter.default is not parameter.empty and type(parameter.default) in CONSTANTS:
            given = parameter.default
        else:  # its default is no constant, and stays the module's own: calls that give it are refused
            found.append((name, {"constant": None, "default": True}))
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            for _, before in found:  # all of them are given
                before.pop("default", None)
            found += [(f"{name}_{k}", flatten(item, f"{name}_{k}", tensors)) for k, item in enumerate(given)]
        elif parameter.kind is parameter.VAR_KEYWORD:
            found += [(key, {**flatten(item, key, tensors), "keyword": True}) for key, item in given.items()]
        else:
            tree = flatten(given, name, tensors)
            constant = tree.get("constant", ...)
            if type(parameter.default) is type(constant) and parameter.default == constant:
                tree["default"] = True
            elif parameter.kind is parameter.KEYWORD_ONLY:
                tree["keyword"] = True
            found.append((name, tree))
    if not tensors:
        raise UsageError("example_inputs hold no tensor", hint="at least one, as real ones are")
    return tuple(found), tensors


def interface(program: nn.Module, signature: Signature, inputs: Sequence[TensorSpec]) -> fx.GraphModule:
    """The drop-in: a module with the signature of the original over a lowered program; scripts where it can.

    Its arguments are looked at before they go into the program: see :mod:`fxpass.functions.checks`.
    """
    graph, root = fx.Graph(), nn.Module()
    root.add_module("program", program)
    tensors: dict[int, fx.Node] = {}
    nodes, optional = [], False  # behind one that may be left out all have a default, as in any function
    for name, tree in signature.parameters:
        optional = optional or "default" in tree
        default = tree.get("constant") if optional else inspect.Parameter.empty
        kind = _annotation(tree) | None if optional and "tensor" in tree else _annotation(tree)
        nodes.append((name, tree, graph.placeholder(name, kind, default)))
    for name, tree, node in nodes:
        if node.args and "tensor" in tree:
            node = graph.call_function(checks.present, (node, name))
        _unpack(graph, node, tree, name, tensors)
    flat = _checked(graph, [tensors[k] for k in range(len(inputs))], inputs, signature.paths)
    results = graph.call_module("program", tuple(flat))
    graph.output(_pack(graph, results, signature.result))
    return fx.GraphModule(root, graph, class_name="Function")


def _annotation(tree: Tree) -> Any:
    """The type of an argument, for TorchScript."""
    if "tensor" in tree:
        return Tensor
    if "constant" in tree:
        return Tensor | None if tree["constant"] is None else type(tree["constant"])
    parts = [_annotation(item) for item in (tree["dict"].values() if "dict" in tree else _items(tree))]
    if "tuple" in tree:
        return GenericAlias(tuple, tuple(parts))
    kind, key = (dict, (str,)) if "dict" in tree else (list, ())
    return GenericAlias(kind, (*key, parts[0])) if len(set(parts)) == 1 else kind


def _unpack(graph: fx.Graph, node: fx.Node, tree: Tree, path: str, tensors: dict[int, fx.Node]) -> None:
    """Nodes that check the structure of an argument and take its tensors out of it."""
    if "tensor" in tree:
        tensors[tree["tensor"]] = node
    elif "constant" in tree:
        value = tree["constant"]
        if value is None:
            graph.call_function(checks.absent, (node, path))
        else:
            told = f"{path} is {value!r} in this compiled module, and cannot be another value"
            graph.call_function(checks.CONSTANT[type(value)], (node, value, told))
    elif "dict" in tree:
        keys = list(tree["dict"])
        graph.call_function(checks.keys, (node, keys, path))
        for key in keys:
            item = graph.call_function(operator.getitem, (node, key))
            _unpack(graph, item, tree["dict"][key], f"{path}.{key}", tensors)
    else:
        items = _items(tree)
        graph.call_function(checks.listed, (node, path))
        graph.call_function(checks.length, (graph.call_function(len, (node,)), len(items), path))
        for k, part in enumerate(items):
            _unpack(graph, graph.call_function(operator.getitem, (node, k)), part, f"{path}.{k}", tensors)


def _checked(
    graph: fx.Graph, values: Sequence[fx.Node], inputs: Sequence[TensorSpec], paths: Sequence[str]
) -> list[fx.Node]:
    """Nodes that check dtype, shape and range of the tensors; sizes that several have must agree."""
    sizes: dict[str, fx.Node] = {}
    found: list[fx.Node] = []
    for value, spec, path in zip(values, inputs, paths, strict=True):
        names = [dim if isinstance(dim, str) else "" for dim in spec.dims]
        dims = [sizes.get(dim, -1) if isinstance(dim, str) else dim for dim in spec.dims]
        value = graph.call_function(checks.tensor, (value, path, spec.dtype, dims, names))
        named = [dim for dim in spec.dims if isinstance(dim, str)]
        for dim in dict.fromkeys(named):
            if dim not in sizes:
                sizes[dim] = graph.call_method("size", (value, spec.dims.index(dim)))
        if len(set(named)) < len(named):
            dims = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
            value = graph.call_function(checks.tensor, (value, path, spec.dtype, dims, names))
        found.append(value)
    for k, spec in enumerate(inputs):
        for limit in sorted(spec.properties):
            kind, _, end = limit.partition(":")
            below = sizes[end] if kind == "index" else int(end)
            found[k] = graph.call_function(checks.index, (found[k], paths[k], below))
    return found


def _pack(graph: fx.Graph, results: fx.Node, tree: Tree) -> Any:
    if "tensor" in tree:
        return graph.call_function(operator.getitem, (results, tree["tensor"]))
    if "constant" in tree:
        return tree["constant"]
    if "dict" in tree:
        return {key: _pack(graph, results, item) for key, item in tree["dict"].items()}
    packed = [_pack(graph, results, item) for item in _items(tree)]
    return tuple(packed) if "tuple" in tree else packed
