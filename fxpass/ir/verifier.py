"""The verifier: derives shapes, dtypes and irreps of every node again, and names the node that breaks.

It runs after every pass.  What it derives is stored: ``meta["val"]`` and ``meta["irreps"]``.  A node that calls the
same op on the same values as when it was derived last has the same result, so only what a pass changed, and what
depends on it, is derived again.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .._torch_compat import OpOverload, fake_inputs, frozen_sizes
from ..errors import Location, PassError
from .irreps_transfer import transfer
from .metadata import provenance
from .program import Program
from .sparsity import SPARSE
from .sparsity import check as check_sparsity
from .tracing import dims_of, size_names, sizes_of

#: functions on symbolic sizes that a graph may call besides ops
ARITHMETIC = frozenset(
    {
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.neg,
        operator.getitem,
        torch.sym_max,
        torch.sym_min,
    }
)


def verify(program: Program) -> None:
    """Check ``program`` and refresh the metadata of its nodes.

    Raises:
        PassError: a malformed graph, a call of what is no op, arguments that an op does
            not take, an output of another shape or dtype than declared, a frozen size, or a node that
            mixes irreps.  The node, its module and its source line are named.
    """
    try:
        program.graph.lint()
    except (RuntimeError, ValueError) as error:
        raise PassError(f"the graph is malformed: {str(error).strip().splitlines()[0]}") from error
    for node in program.graph.nodes:
        _check_node(node)
    if len(program.placeholders) != len(program.inputs):
        raise PassError("the graph's placeholders do not match the program's inputs")
    inputs = _inputs(program)
    inputs.sound = False  # a size that a failure ties stays tied
    fakes = inputs.fakes
    with fakes[0].fake_mode, torch.no_grad():
        returned = _Derive(program).run(*fakes)
    sizes: dict[str, Any] = {}
    for spec, fake in zip(program.inputs, fakes, strict=True):
        sizes.update(zip(map(str, spec.dims), fake.shape, strict=True))
    for spec, value, node in zip(program.outputs, returned, program.results.values(), strict=True):
        shape = tuple(d if isinstance(d, int) else sizes.get(d, d) for d in spec.dims)
        same = len(shape) == value.dim() and all(
            str(a) == str(b) for a, b in zip(shape, value.shape, strict=True)
        )
        same = same or spec.dims == dims_of(value, size_names(program.inputs, fakes))
        if not same or value.dtype != spec.dtype:
            found, declared = f"{list(value.shape)} of {value.dtype}", f"{list(spec.dims)} of {spec.dtype}"
            raise PassError(f"the output {spec.name} is {found}, declared {declared}", where=_place(node))
    frozen = frozen_sizes(fakes)
    if frozen:
        raise PassError(f"the graph ties a size to a value: {'; '.join(frozen)}")
    inputs.sound = True
    for spec, node in zip(program.inputs, program.placeholders.values(), strict=True):
        node.meta["irreps"] = spec.irreps
    for node in program.graph.nodes:
        if node.op != "placeholder":
            irreps, complaint = transfer(node)
            if complaint:
                raise PassError(f"equivariance is broken: {complaint}", where=_place(node))
            node.meta["irreps"] = irreps
    if SPARSE in program.assumptions:
        check_sparsity(program)


def _place(node: fx.Node) -> Location:
    origin = provenance(node)
    value = node.meta.get("val")
    return Location(
        node=node.name,
        shape=str(list(value.shape)) if isinstance(value, torch.Tensor) else None,
        irreps=node.meta.get("irreps"),
        module_path=origin.module or None,
        source=origin.source or None,
    )


def _check_node(node: fx.Node) -> None:
    if node.op in ("call_module", "call_method"):
        raise PassError(f"the graph holds a {node.op} of {node.target}; only ops are allowed", where=_place(node))
    if node.op != "call_function":
        return
    target: Any = node.target
    if target in ARITHMETIC:
        return
    if not isinstance(target, OpOverload):  # ops of other libraries may stand until a target has to carry them
        raise PassError(
            f"the graph calls {getattr(target, '__name__', target)}, which is no op",
            where=_place(node),
            hint="call torch.ops.aten.NAME.OVERLOAD, or register the function with torch.library",
        )
    if target._schema.is_mutable:
        raise PassError(f"{target} changes a tensor in place", where=_place(node), hint="use the functional op")


@dataclass
class _Inputs:
    """Fake inputs, which programs that come of each other share, so that what was derived from them stays true.

    Attributes:
        specs: name, dims and dtype of each.
        fakes: of one fake mode.
        sound: whether no verification that used them failed.
    """

    specs: list[tuple[str, tuple[int | str, ...], torch.dtype]]
    fakes: tuple[Any, ...]
    sound: bool = True


def _inputs(program: Program) -> _Inputs:
    """The inputs that all placeholders were derived with last, or new ones."""
    specs = [(s.name, s.dims, s.dtype) for s in program.inputs]
    nodes = list(program.placeholders.values())
    known = nodes[0].meta.get("derived_with")
    if known is None or not known.sound or known.specs != specs or any(
        n.meta.get("derived_with") is not known for n in nodes
    ):
        known = _Inputs(specs, fake_inputs(specs, sizes_of(program.inputs)))
    for node in nodes:
        node.meta["derived_with"] = known
    return known


@dataclass(frozen=True)
class _Derived:
    """What a call gave: its op, the values it was given, and its result."""

    target: Any
    operands: Any
    result: Any


def _same(a: Any, b: Any) -> bool:
    """Whether an op that is given ``a`` cannot tell it from ``b``."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return bool(a == b)


class _Derive(fx.Interpreter):
    """Runs the graph on fake tensors and stores each result."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        calls = n.op == "call_function"
        operands = self.fetch_args_kwargs_from_env(n) if calls else ()
        known = n.meta.get("derived") if calls else None
        if known is not None and known.target is n.target and _same(known.operands, operands):
            n.meta["val"] = known.result
            return known.result
        try:
            result = super().run_node(n)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # what ops raise at wrong operands
            text = (str(error).strip().splitlines() or [""])[0]
            what = f"{n.format_node()} does not fit: {type(error).__name__}: {text}"
            raise PassError(what, where=_place(n)) from error
        n.meta["val"] = result
        if calls:
            n.meta["derived"] = _Derived(n.target, operands, result)
        return result
