"""Raising: the many ATen spellings of a gather and of a sum by receiver become one semantic op each.

Models write ``x[index]`` and ``zeros.scatter_add(0, index.expand, x)`` or ``index_add``; later passes
look for ``fxpass::gather`` and ``fxpass::scatter_sum`` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..ir import ops
from ..ir.metadata import provenance, set_provenance

aten = torch.ops.aten


Trust = Callable[[fx.Node, Any], bool]


def raise_gathers_and_scatters(graph: fx.Graph, trusts: Trust = lambda index, size: True) -> int:
    """Replace, in place, gathers along the first dimension and scatters into zeros; returns how many.

    ``trusts`` says of an index and the size of what it points into whether it stays within: the semantic ops do not
    look, and know no negative indices.
    """
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        replacement = _gather(node) or _scatter(node)
        if replacement is None:
            continue
        target, args = replacement
        into = args[0].meta["val"].shape[0] if target is ops.gather else args[2]
        if not trusts(args[1], into):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        new.meta["val"] = node.meta.get("val")
        set_provenance(new, provenance(node))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        count += 1
    graph.eliminate_dead_code()
    return count


def copies_become_values(graph: fx.Graph) -> None:
    """Replace, in place, writes into views, ``aten.copy``, by the values written: that op has no derivative.

    A tensor that is made without values to be written into begins with zeros.
    """
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        into, value = node.args[:2]
        wanted, known = node.meta["val"], value.meta["val"]
        with graph.inserting_before(node):
            if known.dtype != wanted.dtype:
                value = graph.call_function(aten._to_copy.default, (value,), {"dtype": wanted.dtype})
                known = value.meta["val"] = known.to(wanted.dtype)
                set_provenance(value, provenance(node))
            if [str(size) for size in known.shape] != [str(size) for size in wanted.shape]:
                sizes = [_size(graph, into, k) for k in range(wanted.dim())]
                value = graph.call_function(aten.expand.default, (value, sizes))
                value.meta["val"] = known.expand(wanted.shape)
                set_provenance(value, provenance(node))
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target in ZEROS and all(user.target in WRITES and user.args[0] is node for user in node.users):
            node.target = ZEROS[node.target]
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}


#: tensors without values, and the same with zeros
ZEROS = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}
#: ops that write into their first operand, or take a part of it to write into
WRITES = frozenset(
    {
        *(aten.slice_scatter.default, aten.select_scatter.default, aten.index_put.default, aten.slice.Tensor),
        *(aten.select.int, aten.sym_size.int),
    }
)


def _size(graph: fx.Graph, of: fx.Node, axis: int) -> fx.Node | int:
    """A size as an argument: a number, or a node that asks for it."""
    size: int | torch.SymInt = of.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    node = graph.call_function(aten.sym_size.int, (of, axis))
    node.meta["val"] = size
    return node


def _is_index(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dim() == 1 and value.dtype == torch.int64


def _gather(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    if node.target is aten.index.Tensor:
        x, indices = node.args[:2]
        if isinstance(indices, (list, tuple)) and len(indices) == 1 and _is_index(indices[0]):
            return ops.gather, (x, indices[0])
    if node.target is aten.index_select.default and node.args[1] == 0 and _is_index(node.args[2]):
        return ops.gather, (node.args[0], node.args[2])
    if node.target is aten.embedding.default and _is_index(node.args[1]):
        return ops.gather, node.args[:2]  # the rest of its arguments concern its derivative by the weights
    return None


def _is_zeros(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (
        aten.zeros.default,
        aten.new_zeros.default,
        aten.zeros_like.default,
    )


def _adds_trailing(node: fx.Node) -> bool:
    """Whether a node only adds trailing dimensions, or repeats along them."""
    if node.target is aten.unsqueeze.default:
        return node.args[1] in (-1, node.args[0].meta["val"].dim())  # type: ignore[union-attr]
    if node.target is aten.view.default:
        return all(size == 1 for size in node.meta["val"].shape[1:])
    return node.target is aten.expand.default


def _broadcast_index(node: Any) -> fx.Node | None:
    """The 1-d index that is broadcast to ``node``, where it is one."""
    while isinstance(node, fx.Node) and not _is_index(node):
        if not _adds_trailing(node):
            return None
        node = node.args[0]
    while isinstance(node, fx.Node) and node.target is aten.expand.default:
        node = node.args[0]  # an expand of a 1-d index to its own length
    return node if _is_index(node) else None


def _scatter(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    if node.target is aten.scatter_add.default:
        into, dim, index, source = node.args
    elif node.target is aten.index_add.default and not node.kwargs:
        into, dim, index, source = node.args[:4]
    else:
        return None
    rows, spread = source.meta["val"].shape, index.meta["val"].shape  # type: ignore[union-attr]
    fits = into.meta["val"].shape[1:] == rows[1:] and (node.target is aten.index_add.default or spread == rows)  # type: ignore[union-attr]
    index = _broadcast_index(index) if fits else None
    if index is None or not _is_zeros(into) or dim not in (0, -len(rows)):
        return None
    zeros = into.args[0] if into.target is aten.zeros.default else into.args[1] if len(into.args) > 1 else None  # type: ignore[union-attr]
    if isinstance(zeros, (list, tuple)):
        return ops.scatter_sum, (source, index, zeros[0])
    return None
