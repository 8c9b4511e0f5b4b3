"""What stands for an op that not every device or target computes alike: its reference decomposition.

A reference is a plain function with the op's arguments, made of ATen ops and differentiable.  It is looked for, in
this order,

1. among those that the caller gives, by the op's name: ``"mylib::attention"``, or ``"mylib::attention.default"``
   for one overload;
2. in the entry point group ``fxpass.decompositions``, where the name of an entry is the op's name spelled with dots::

       [project.entry-points."fxpass.decompositions"]
       "mylib.attention" = "mylib.reference:attention"

3. in the op itself, where it was registered with a ``CompositeImplicitAutograd`` implementation;
4. in ``torch.export.default_decompositions()``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, fx

from .._torch_compat import fallback_kernel
from ..errors import Location, UsageError
from .legalize import expand_ops
from .metadata import provenance
from .ops import SEMANTIC, OpOverload
from .program import Program

GROUP = "fxpass.decompositions"
HINT = f"register a reference decomposition for it, in the entry point group {GROUP} or as references={{...}}"

Reference = Callable[..., Any]
References = Mapping[str, Reference]

#: parts of the names of ATen ops that exist, or compute, in one way on one device
BACKENDS = frozenset({"cpu", "cuda", "cudnn", "miopen", "mkldnn", "mps", "xpu", "fbgemm", "flash", "efficient"})


@dataclass(frozen=True)
class Decomposed:
    """A program without the custom ops that have a reference; which they were, and which had none."""

    program: Program
    replaced: tuple[fx.Node, ...]
    opaque: tuple[fx.Node, ...]


def is_custom(op: object, also: Collection[str] = ()) -> bool:
    """Whether an op has no one meaning on every device: it is of a library, or ATen's for one backend, or named."""
    if not isinstance(op, OpOverload) or op in SEMANTIC:
        return False
    parts = op.name().partition("::")[2].replace(".", "_").split("_")
    return op.namespace != "aten" or not BACKENDS.isdisjoint(parts) or any(name in also for name in names(op))


def names(op: OpOverload) -> tuple[str, ...]:
    """What an op may be called, the overload first: ``lib::op.overload`` and ``lib::op``, with colons or a dot."""
    overload, packet = str(op), str(op.overloadpacket)
    return (overload.replace(".", "::", 1), overload, packet.replace(".", "::", 1), packet)


def custom_nodes(program: Program, also: Collection[str] = ()) -> tuple[fx.Node, ...]:
    """The calls of custom ops in a program, in order."""
    return tuple(n for n in program.graph.nodes if n.op == "call_function" and is_custom(n.target, also))


def reference_of(op: OpOverload, references: References | None = None) -> Reference | None:
    """The reference decomposition of an op; None where there is none.

    Raises:
        UsageError: an entry point for it cannot be loaded.
    """
    for name in names(op):
        if references and name in references:
            return references[name]
    for name in names(op):
        for entry in metadata.entry_points(group=GROUP, name=name):
            try:
                return entry.load()
            except (ImportError, AttributeError) as error:
                raise UsageError(f"the reference of {op}, {entry.value}, cannot be loaded: {error}") from error
    if composite := fallback_kernel(op, "CompositeImplicitAutograd"):
        return composite
    table = torch.export.default_decompositions()
    return table[op] if op in table else None  # noqa: SIM401  its get() does not see what is not materialised


def decompose(
    program: Program,
    references: References | None = None,
    *,
    also: Collection[str] = (),
    made_by: str = "legalize-custom-ops",
    sizes: Mapping[str, int] | None = None,
) -> Decomposed:
    """Replace the custom ops of a program by their references.

    Args:
        program: stays as it is.
        references: see above; asked first.
        also: names of ATen ops that are to be replaced too.
        made_by: for provenance.
        sizes: hints for the named sizes, where they are others than atoms, edges and graphs.

    Raises:
        LoweringError: a reference ties a size to a value.
    """
    found = custom_nodes(program, also)
    known = {op: reference_of(op, references) for op in dict.fromkeys(node.target for node in found)}  # type: ignore[arg-type]
    expand = {op: partial(_dense, reference) for op, reference in known.items() if reference is not None}
    replaced = tuple(node for node in found if node.target in expand)
    opaque = tuple(node for node in found if node.target not in expand)
    return Decomposed(expand_ops(program, expand, made_by, sizes) if replaced else program, replaced, opaque)


def _dense(reference: Reference, *args: Any, **kwargs: Any) -> Any:
    """Results laid out as kernels lay theirs: what follows may view them, which a transposed one does not allow."""
    found = reference(*args, **kwargs)
    return fx.node.map_aggregate(found, lambda x: x.contiguous() if isinstance(x, Tensor) else x)


def place(node: fx.Node) -> Location:
    """Where a node is in the graph, the model and the source."""
    origin = provenance(node)
    return Location(node=node.name, module_path=origin.module or None, source=origin.source or None)
