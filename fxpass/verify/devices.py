"""One program on every device that is here, and every implementation of an op against its reference.

A kernel that is right on one device says nothing about another one's.  ``device_rows`` judges a result: it goes
into the receipt.  ``kernel_rows`` judges the implementations of the custom ops that were replaced; the result
contains none of them any more, so a wrong one is a reason to have replaced it, and not a fault of the result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .._torch_compat import OpOverload, fallback_kernel
from ..ir.decompositions import Reference, References, custom_nodes, reference_of
from ..ir.program import Program
from .receipt import Row
from .regions import relative_error
from .tolerances import ROUNDING

#: a program is a long chain of sums: this many times the rounding of one of them
CHAIN = 100.0


def devices() -> tuple[str, ...]:
    """The devices on which programs can run here: ``"cpu"``, and ``"cuda"`` where there is one."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def device_rows(
    before: Program, after: Program, samples: Sequence[Mapping[str, Tensor]], *, tolerance: float | None = None
) -> tuple[Row, ...]:
    """A program without custom ops on every device, against the one with them on the CPU.

    Args:
        before: calls whatever kernels the CPU has; its fusion guards and semantic ops may be there still.
        after: of the same interface, as returned by ``legalize-custom-ops``.
        samples: inputs by name; see ``Program.samples``.
        tolerance: error allowed, relative to the largest element of an output; by default by its dtype.

    Returns:
        For each device, sample and output a row ``OUTPUT on DEVICE``; at stage ``"energy"`` also one for the
        derivative of the energy by the edge vectors.
    """
    rows: list[Row] = []
    for number, sample in enumerate(samples):
        expected = _evaluate(before, sample, "cpu")
        for device in devices():
            found = _evaluate(after, sample, device)
            for name, value in expected.items():
                rows.append(_row(f"{name} on {device}", f"sample {number}", found[name], value, tolerance, CHAIN))
    return tuple(rows)


def kernel_rows(
    program: Program,
    samples: Sequence[Mapping[str, Tensor]],
    references: References | None = None,
    *,
    tolerance: float | None = None,
) -> tuple[Row, ...]:
    """Every implementation of every custom op of a program against the op's reference, on what the op really gets.

    Args:
        program: before ``legalize-custom-ops``.
        samples: inputs by name.
        references: op name to function, asked first.
        tolerance: as for :func:`device_rows`.
    """
    called = {node: reference_of(node.target, references) for node in custom_nodes(program)}  # type: ignore[arg-type]
    rows: list[Row] = []
    for number, sample in enumerate(samples):
        seen = _Arguments(program.graph_module, set(called))
        with torch.no_grad():
            seen.run(*(sample[spec.name] for spec in program.inputs))
        for node, (args, kwargs) in seen.arguments.items():
            if reference := called[node]:
                place = f"sample {number}, {node.name}"
                rows += compare_kernels(node.target, reference, args, kwargs, place=place, tolerance=tolerance)  # type: ignore[arg-type]
    return tuple(rows)


def compare_kernels(
    op: OpOverload,
    reference: Reference,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    place: str = "",
    tolerance: float | None = None,
) -> tuple[Row, ...]:
    """Every implementation of one op that can run here against its reference on the CPU, values and derivatives.

    Rows ``OP on DEVICE`` and ``OP on DEVICE, derivative`` for the devices here, as the dispatcher chooses; and where
    the op has one implementation for the CPU and another one for all devices without their own, ``OP elsewhere`` for
    that, run on the CPU.  What cannot be computed is NaN, which does not pass.
    """
    given = dict(kwargs or {})
    expected, slopes = _values(reference, args, given), _slopes(reference, args, given)
    rows: list[Row] = []

    def compare(check: str, found: Callable[[], Sequence[Tensor]], known: Sequence[Tensor]) -> None:
        try:
            each = [_row(check, place, a, b, tolerance) for a, b in zip(found(), known, strict=True)]
        except (RuntimeError, TypeError, ValueError) as error:  # a foreign kernel raises what it likes of these
            note = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            each = [Row(check, place, math.nan, tolerance or 0.0, "relative", note)]
        rows.extend(sorted(each, key=lambda row: (row.passed, -row.used))[:1])

    for device in devices():
        there = [x.to(device) if isinstance(x, Tensor) else x for x in args]
        compare(f"{op} on {device}", partial(_values, op, there, given), expected)
        compare(f"{op} on {device}, derivative", partial(_slopes, op, there, given), slopes)
    if fallback := fallback_kernel(op):
        compare(f"{op} elsewhere", partial(_values, fallback, args, given), expected)
    return tuple(rows)


def _values(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        found = function(*args, **kwargs)
    return [y for y in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(y, Tensor)]


def _slopes(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Derivatives of the sum of all squared results by each floating-point argument."""
    free = [isinstance(x, Tensor) and x.is_floating_point() for x in args]
    leaves = [x.detach().clone().requires_grad_() if f else x for x, f in zip(args, free, strict=True)]
    by = [leaf for leaf, f in zip(leaves, free, strict=True) if f]
    with torch.enable_grad():
        found = function(*leaves, **kwargs)
        results = [y for y in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(y, Tensor)]
        if by and not any(y.requires_grad for y in results):
            raise RuntimeError("it has no derivative: autograd takes its result for a constant")
        total = sum(((y**2).sum() for y in results if y.requires_grad), torch.zeros(()))
        grads = torch.autograd.grad(total, by, allow_unused=True) if by else ()
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(by, grads, strict=True)]


def _evaluate(program: Program, sample: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """Outputs by name, on the CPU; at stage ``"energy"`` with the derivative of the energy by the edge vectors."""
    module = _on(program, device)
    inputs = [sample[spec.name].to(device) for spec in program.inputs]
    vectors = [k for k, spec in enumerate(program.inputs) if "edge_vector" in spec.properties]
    slopes = program.stage == "energy" and bool(vectors)
    if slopes:
        inputs[vectors[0]] = inputs[vectors[0]].detach().requires_grad_()
    with torch.set_grad_enabled(slopes):
        found = dict(zip((spec.name for spec in program.outputs), module(*inputs), strict=True))
        if slopes:
            (found["edge_gradient"],) = torch.autograd.grad(found[program.energy].sum(), inputs[vectors[0]])
    return {name: value.detach().cpu() for name, value in found.items()}


def _on(program: Program, device: str) -> fx.GraphModule:
    """The program's graph with its weights, and the tensors that it makes, on a device."""
    module = program.copy().graph_module
    for node in module.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda x: torch.device(device) if isinstance(x, torch.device) else x
        )
    module.recompile()
    return copy.deepcopy(module).to(device) if device != "cpu" else module


class _Arguments(fx.Interpreter):
    """Runs a graph and keeps what some of its nodes are called with."""

    def __init__(self, module: fx.GraphModule, nodes: Collection[fx.Node]) -> None:
        super().__init__(module)
        self.nodes = nodes
        self.arguments: dict[fx.Node, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.nodes:
            self.arguments[n] = self.fetch_args_kwargs_from_env(n)
        return super().run_node(n)


def _row(
    check: str, place: str, found: Tensor, expected: Tensor, tolerance: float | None, factor: float = 1.0
) -> Row:
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise ValueError(f"it returns {found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}")
    limit = factor * ROUNDING.get(expected.dtype, 0.0) if tolerance is None else tolerance
    return Row(check, place, relative_error(found.cpu(), expected), limit, "relative")
