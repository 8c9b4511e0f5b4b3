"""fold-constants, common-subexpressions and dead-code; and the contract and golden graphs that hold them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx
from torch.testing import FileCheck

from fxpass.errors import PassError, UsageError
from fxpass.ir.metadata import Provenance, provenance, set_provenance
from fxpass.ir.program import Program, TensorSpec, add_constant
from fxpass.passes import Exactness, Outcome, Pass
from fxpass.testing import (
    PassContract,
    assert_golden,
    build_program,
    example_inputs,
    graph_text,
    run_program,
)
from fxpass_passes.common_subexpressions import CommonSubexpressions
from fxpass_passes.dead_code import DeadCode
from fxpass_passes.fold_constants import FoldConstants

pytestmark = pytest.mark.once

aten = torch.ops.aten
X = TensorSpec("x", ("atoms", 3), torch.float64)
N = TensorSpec("n", ("atoms",), torch.int64, properties=frozenset({"index:10"}))

Call = Callable[..., fx.Node]
Weights = Mapping[str, Tensor]


def program(
    body: Callable[..., dict[str, fx.Node]],
    weights: Weights | None = None,
    inputs: tuple[TensorSpec, ...] = (X,),
    stage: Any = "energy",
) -> Program:
    """``body(call, *inputs, **weights)`` with ``call(target, *args, **kwargs)``."""

    def build(graph: fx.Graph, *placeholders: fx.Node) -> dict[str, fx.Node]:
        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return graph.call_function(target, args, kwargs)

        return body(call, *placeholders, **{name: graph.get_attr(name) for name in weights or {}})

    return build_program(build, inputs, weights, stage=stage)


def apply(subject: Pass, before: Program) -> Outcome:
    return subject.apply(before.copy())


def calls(p: Program) -> list[Any]:
    return [n.target for n in p.graph.nodes if n.op == "call_function"]


W = torch.arange(9, dtype=torch.float64).reshape(3, 3) + 0.5


# --- dead-code


def with_dead_code() -> Program:
    def body(call: Call, x: fx.Node, unused: fx.Node, w: fx.Node, v: fx.Node) -> dict[str, fx.Node]:
        y = call(aten.mm.default, x, w)
        call(aten.sin.default, call(aten.mm.default, y, v))
        return {"y": y}

    unused = TensorSpec("unused", ("edges",), torch.float64)
    return program(body, {"w": W, "v": torch.nn.Parameter(2 * W)}, (X, unused))


def without_dead_code() -> Program:
    return program(lambda call, x, w: {"y": call(aten.mm.default, x, w)}, {"w": W})


def test_dead_code_contract() -> None:
    dead, live = PassContract(DeadCode(), [with_dead_code, without_dead_code]).check()
    assert [(a.rule, a.node) for a in dead.applications] == [
        ("unused-node", "sin_default"),
        ("unused-node", "mm_default_1"),
        ("unused-node", "v"),
        ("unused-weight", "v"),
    ]
    assert not live.modified


def test_dead_code_removes_nodes_and_weights_and_keeps_inputs() -> None:
    after = apply(DeadCode(), with_dead_code()).program
    assert graph_text(after) == (
        "energy program\n"
        "  x: f64[atoms, 3]\n"
        "  unused: f64[edges]\n"
        "  %w = weight f64[3, 3]\n"
        "  %mm = aten.mm.default(%x, %w)\n"
        "  return y = %mm\n"
    )
    assert not hasattr(after.graph_module, "v")


def test_dead_code_keeps_what_has_an_effect() -> None:
    def body(call: Call, x: fx.Node) -> dict[str, fx.Node]:
        call(aten.bernoulli.default, call(aten.sigmoid.default, x))
        return {"y": call(aten.sin.default, x)}

    assert not apply(DeadCode(), program(body)).modified


# --- common-subexpressions


def with_common_subexpressions() -> Program:
    def body(call: Call, x: fx.Node, w: fx.Node, same: fx.Node) -> dict[str, fx.Node]:
        atoms = [call(aten.sym_size.int, x, 0) for _ in range(2)]
        one = call(aten.add.Tensor, call(aten.mm.default, x, w), x)
        two = call(aten.add.Tensor, call(aten.mm.default, x, same), x, alpha=1)
        flat = [call(aten.view.default, y, [n, 3]) for y, n in zip((one, two), atoms, strict=True)]
        return {"y": call(aten.mul.Tensor, *flat)}

    return program(body, {"w": W, "same": W})


def without_common_subexpressions() -> Program:
    """Pairs that only look alike."""

    def body(call: Call, n: fx.Node, w: fx.Node, transposed: fx.Node, parameter: fx.Node) -> dict[str, fx.Node]:
        literals = [call(aten.mul.Tensor, n, value) for value in (1, 1.0, True)]
        signs = [call(aten.add.Tensor, literals[1], value) for value in (0.0, -0.0)]
        sums = [call(aten.add.Tensor, n, n), call(aten.add.Tensor, n, n, alpha=2)]
        noise = [call(aten.bernoulli.p, literals[1], 0.5) for _ in range(2)]
        weights = [call(aten.sum.default, weight) for weight in (w, transposed, parameter)]
        parts = (*literals, *signs, *sums, *noise, *weights)
        total = parts[0]
        for part in parts[1:]:
            total = call(aten.add.Tensor, total, part)
        return {"y": total}

    return program(body, {"w": W, "transposed": W.t(), "parameter": torch.nn.Parameter(W)}, (N,))


def test_common_subexpressions_contract() -> None:
    merged, alone = PassContract(
        CommonSubexpressions(), [with_common_subexpressions, without_common_subexpressions]
    ).check()
    assert len(merged.applications) == 5
    assert not alone.modified


def test_common_subexpressions_are_computed_once() -> None:
    after = apply(CommonSubexpressions(), with_common_subexpressions()).program
    FileCheck().check_count("weight f64[3, 3]", 1, exactly=True).check_count("aten.mm.default", 1, exactly=True).check(
        "%view = aten.view.default(%add, [%sym_size, 3])"
    ).check_next("aten.mul.Tensor(%view, %view)").run(graph_text(after))


def test_common_subexpressions_keeps_the_provenance_of_the_first() -> None:
    before = with_common_subexpressions()
    for number, found in enumerate(before.graph.find_nodes(op="call_function", target=aten.mm.default)):
        set_provenance(found, Provenance(f"layers.{number}"))
    outcome = apply(CommonSubexpressions(), before)
    (kept,) = outcome.program.graph.find_nodes(op="call_function", target=aten.mm.default)
    assert provenance(kept).module == "layers.0"
    assert "layers.1" in {a.module for a in outcome.applications}


def test_common_subexpressions_leaves_two_outputs_apart() -> None:
    """One tensor under two names would change under both when the caller writes to it."""

    def body(call: Call, x: fx.Node) -> dict[str, fx.Node]:
        return {name: call(aten.t.default, call(aten.sin.default, x)) for name in ("y", "z")}

    assert not apply(CommonSubexpressions(), program(body)).modified


# --- fold-constants: folding


def with_constants() -> Program:
    def body(call: Call, x: fx.Node, w: fx.Node, v: fx.Node) -> dict[str, fx.Node]:
        scaled = call(aten.mul.Tensor, w, 0.5)
        halves = call(aten.split.Tensor, call(aten.cat.default, [scaled, v]), 3)
        first, second = (call(operator.getitem, halves, i) for i in (0, 1))
        ones = call(aten.full.default, [3], 1.0, dtype=torch.float64, device="cpu")
        y = call(aten.add.Tensor, call(aten.mm.default, x, first), ones)
        return {"y": call(aten.mm.default, y, call(aten.t.default, second))}

    return program(body, {"w": torch.nn.Parameter(W), "v": 2 * W})


def without_constants() -> Program:
    """Random, returned, uninitialised, or of symbolic size: nothing here is a constant."""

    def body(call: Call, x: fx.Node, w: fx.Node) -> dict[str, fx.Node]:
        atoms = call(aten.sym_size.int, x, 0)
        noise = call(aten.bernoulli.p, w, 0.5)
        zeros = call(aten.zeros.default, [atoms, 3], dtype=torch.float64)
        garbage = call(aten.empty_like.default, w)
        product = call(aten.mm.default, call(aten.add.Tensor, x, zeros), call(aten.mul.Tensor, w, noise))
        return {
            "y": call(aten.mm.default, product, call(aten.fill.Scalar, garbage, 2.0)),
            "returned": call(aten.sin.default, w),
        }

    return program(body, {"w": W.sigmoid()})


def test_fold_constants_contract() -> None:
    folded, alone = PassContract(FoldConstants(limit=1 << 20), [with_constants, without_constants]).check()
    assert [a.node for a in folded.applications] == ["getitem", "full_default", "t_default"]
    assert not alone.modified


def test_fold_constants_before_and_after(tmp_path: Path) -> None:
    before = with_constants()
    after = apply(FoldConstants(), before).program
    assert graph_text(after) == (
        "energy program\n"
        "  x: f64[atoms, 3]\n"
        "  %folded_getitem = weight f64[3, 3]\n"
        "  %folded_full_default = weight f64[3]\n"
        "  %mm = aten.mm.default(%x, %folded_getitem)\n"
        "  %add = aten.add.Tensor(%mm, %folded_full_default)\n"
        "  %folded_t_default = weight f64[3, 3]\n"
        "  %mm_1 = aten.mm.default(%add, %folded_t_default)\n"
        "  return y = %mm_1\n"
    )
    assert {name for name, _ in after.graph_module.named_parameters()} == {"w"}
    assert not after.graph_module.get_buffer("folded_getitem").requires_grad
    (constant,) = after.graph.find_nodes(op="get_attr", target="folded_getitem")
    assert provenance(constant).made_by == "fold-constants"


def test_fold_constants_stops_at_the_limit() -> None:
    """Above it a result is stored only where it is smaller than what it is computed from."""

    def body(call: Call, x: fx.Node, w: fx.Node) -> dict[str, fx.Node]:
        larger = call(aten.repeat.default, w, [2, 1])
        smaller = call(aten.sum.dim_IntList, w, [0])
        return {"y": call(aten.mm.default, call(aten.add.Tensor, x, smaller), call(aten.t.default, larger))}

    before = program(body, {"w": W})
    after = apply(FoldConstants(limit=W.nbytes - 1), before).program
    FileCheck().check("aten.repeat.default(%w, [2, 1])").check("%folded_sum").check_not("aten.sum").run(
        graph_text(after)
    )
    assert aten.repeat.default not in calls(apply(FoldConstants(), before).program)


def test_fold_constants_keeps_parameters_trainable_if_asked() -> None:
    after = apply(FoldConstants(parameters=False), with_constants()).program
    FileCheck().check("%w = weight").check("aten.mul.Tensor(%w, 0.5)").check("%folded_full").run(graph_text(after))


def test_fold_constants_stores_equal_results_once() -> None:
    def body(call: Call, x: fx.Node, w: fx.Node, minus: fx.Node) -> dict[str, fx.Node]:
        twice, sum_ = call(aten.mul.Tensor, w, 2.0), call(aten.add.Tensor, w, w)
        zero, negative = call(aten.mul.Tensor, w, 0.0), call(aten.mul.Tensor, minus, 0.0)
        for factor in (twice, sum_, zero, negative):
            x = call(aten.mm.default, x, factor)
        return {"y": x}

    outcome = apply(FoldConstants(), program(body, {"w": W, "minus": -W}))
    assert len(outcome.applications) == 4
    names = [str(n.target) for n in outcome.program.graph.find_nodes(op="get_attr")]
    assert names == ["folded_mul_tensor", "folded_mul_tensor", "folded_mul_tensor_1", "folded_mul_tensor_2"]


def test_fold_constants_names_the_node_that_fails() -> None:
    def body(call: Call, x: fx.Node, w: fx.Node) -> dict[str, fx.Node]:
        return {"y": call(aten.mul.Tensor, x, call(aten.sum.default, call(aten.view.default, w, [9])))}

    before = program(body, {"w": W})
    (view,) = before.graph.find_nodes(op="call_function", target=aten.view.default)
    view.args = (view.args[0], [7])
    with pytest.raises(PassError, match="a constant cannot be computed") as caught:
        apply(FoldConstants(), before)
    assert caught.value.where.node == "view_default"


def test_fold_constants_under_inference_mode_makes_ordinary_tensors() -> None:
    with torch.inference_mode():
        after = apply(FoldConstants(), with_constants()).program
    assert not after.graph_module.get_buffer("folded_getitem").is_inference()


# --- fold-constants: identities

IDENTITIES: dict[str, Callable[[Call, fx.Node], fx.Node]] = {
    "mul": lambda call, x: call(aten.mul.Tensor, x, 1),
    "div": lambda call, x: call(aten.div.Tensor, x, 1.0),
    "sub": lambda call, x: call(aten.sub.Tensor, x, 0),
    "add negative zero": lambda call, x: call(aten.add.Tensor, x, -0.0),
    "clone": lambda call, x: call(aten.clone.default, x, memory_format=torch.contiguous_format),
    "cast": lambda call, x: call(aten._to_copy.default, x, dtype=torch.float64),
    "to": lambda call, x: call(aten.to.dtype, x, torch.float64),
    "view": lambda call, x: call(aten.view.default, x, [call(aten.sym_size.int, x, 0), 3]),
    "reshape": lambda call, x: call(aten.reshape.default, x, [-1, 3]),
    "expand": lambda call, x: call(aten.expand.default, x, [-1, 3]),
    "slice": lambda call, x: call(aten.slice.Tensor, x, 0, 0, 9223372036854775807),
    "transpose twice": lambda call, x: call(aten.t.default, call(aten.transpose.int, x, 0, 1)),
    "permute twice": lambda call, x: call(aten.permute.default, call(aten.permute.default, x, [1, 0]), [1, 0]),
    "squeeze": lambda call, x: call(aten.squeeze.dim, call(aten.unsqueeze.default, x, 1), 1),
}

NO_IDENTITIES: dict[str, Callable[[Call, fx.Node], fx.Node]] = {
    "mul by two": lambda call, x: call(aten.mul.Tensor, x, 2),
    "add zero": lambda call, x: call(aten.add.Tensor, x, 0),
    "subtract negative zero": lambda call, x: call(aten.sub.Tensor, x, -0.0),
    "cast": lambda call, x: call(aten._to_copy.default, x, dtype=torch.float32),
    "clone to another layout": lambda call, x: call(
        aten.clone.default, call(aten.t.default, x), memory_format=torch.contiguous_format
    ),
    "one transpose": lambda call, x: call(aten.t.default, x),
    "another permutation": lambda call, x: call(
        aten.permute.default, call(aten.permute.default, call(aten.unsqueeze.default, x, 0), [1, 2, 0]), [1, 2, 0]
    ),
    "transpose and reshape": lambda call, x: call(
        aten.reshape.default, call(aten.t.default, x), [call(aten.sym_size.int, x, 0), 3]
    ),
    "broadcast": lambda call, x: call(aten.expand.default, x, [2, -1, -1]),
    "detach before the derivative": lambda call, x: call(aten.detach.default, x),
}


def in_the_middle(identity: Callable[[Call, fx.Node], fx.Node], **options: Any) -> Callable[[], Program]:
    def body(call: Call, x: fx.Node) -> dict[str, fx.Node]:
        return {"y": call(aten.exp.default, identity(call, call(aten.sin.default, x)))}

    return lambda: program(body, **options)


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_goes(name: str) -> None:
    (outcome,) = PassContract(FoldConstants(), [in_the_middle(IDENTITIES[name])]).check()
    assert calls(outcome.program) == [aten.sin.default, aten.exp.default]


@pytest.mark.parametrize("name", NO_IDENTITIES)
def test_no_identity_stays(name: str) -> None:
    before = in_the_middle(NO_IDENTITIES[name])()
    outcome = apply(FoldConstants(), before)
    assert not outcome.modified
    assert graph_text(outcome.program) == graph_text(before)


def test_zeros_with_a_sign_keep_it() -> None:
    zeros = torch.tensor([[0.0, -0.0, -0.0]] * 9, dtype=torch.float64)
    for name in ("mul", "div", "sub", "add negative zero"):
        before = program(lambda call, x, name=name: {"y": call(aten.neg.default, IDENTITIES[name](call, x))})
        after = apply(FoldConstants(), before).program
        results = [run_program(p, [zeros])["y"].signbit() for p in (before, after)]
        assert torch.equal(*results), name
        assert calls(after) == [aten.neg.default]
    kept = apply(FoldConstants(), in_the_middle(NO_IDENTITIES["add zero"])())
    assert [r.reason for r in kept.refusals] == ["adding 0.0 turns -0.0 into 0.0"]


def test_integers_have_one_zero() -> None:
    before = program(
        lambda call, n: {"y": call(aten.neg.default, call(aten.add.Tensor, call(aten.mul.Tensor, n, 1), 0))},
        inputs=(N,),
    )
    assert calls(apply(FoldConstants(), before).program) == [aten.neg.default]
    promoted = program(lambda call, n: {"y": call(aten.exp.default, call(aten.mul.Tensor, n, 1.0))}, inputs=(N,))
    assert not apply(FoldConstants(), promoted).modified, "int64 times 1.0 is float32"


def test_clone_of_a_broadcast_is_kept_for_its_layout() -> None:
    def body(call: Call, x: fx.Node) -> dict[str, fx.Node]:
        wide = call(aten.expand.default, call(aten.unsqueeze.default, x, 0), [2, -1, -1])
        dense = call(aten.clone.default, wide, memory_format=torch.contiguous_format)
        return {"y": call(aten.sum.default, call(aten.view.default, dense, [-1]))}

    assert not apply(FoldConstants(), program(body)).modified


def test_returned_copy_is_kept() -> None:
    def body(call: Call, x: fx.Node) -> dict[str, fx.Node]:
        return {"y": call(aten.t.default, call(aten.clone.default, x))}

    outcome = apply(FoldConstants(), program(body))
    assert not outcome.modified
    assert [r.reason for r in outcome.refusals] == ["clone_default is returned, and its memory belongs to the caller"]


def test_detach_goes_once_the_forces_are_in_the_graph() -> None:
    make = in_the_middle(NO_IDENTITIES["detach before the derivative"], stage="forces")
    (outcome,) = PassContract(FoldConstants(), [make]).check()
    assert aten.detach.default not in calls(outcome.program)


# --- example inputs


def test_example_inputs_honour_dims_and_properties() -> None:
    specs = (
        TensorSpec("edge_vectors", ("edges", 3), torch.float32, properties=frozenset({"edge_vector"})),
        TensorSpec("species", ("atoms", 4), torch.float64, properties=frozenset({"one_hot"})),
        TensorSpec("edge_index", (2, "edges"), torch.int64, properties=frozenset({"index:atoms"})),
        TensorSpec("batch", ("atoms",), torch.int64, properties=frozenset({"index:graphs"})),
        TensorSpec("ptr", ("graphs+1",), torch.int64),
        TensorSpec("head", ("graphs",), torch.int32, properties=frozenset({"below:3"})),
        TensorSpec("shift", ("edges", 3), torch.int64),
        TensorSpec("mask", ("atoms",), torch.bool),
    )
    empty = program(lambda call, *inputs: {"y": inputs[0]}, inputs=specs)
    for sizes in ({"atoms": 7, "edges": 23, "graphs": 3}, {"atoms": 1, "edges": 0, "graphs": 1}):
        values = example_inputs(empty, sizes, seed=4)
        vectors, species, edges, batch, ptr, head, shift, mask = values
        assert vectors.shape == (sizes["edges"], 3)
        assert [v.dtype for v in values] == [spec.dtype for spec in specs]
        assert torch.equal(species.sum(1), torch.ones(sizes["atoms"], dtype=torch.float64))
        assert edges.shape == (2, sizes["edges"]) and ((edges >= 0) & (edges < sizes["atoms"])).all()
        assert torch.equal(batch, batch.sort().values)
        assert torch.equal(ptr.diff(), torch.bincount(batch, minlength=sizes["graphs"]))
        assert ptr[-1] == sizes["atoms"] and (ptr.diff() > 0).all()
        assert (head < 3).all() and not shift.any() and mask.shape == (sizes["atoms"],)
        again = example_inputs(empty, sizes, seed=4)
        assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True))
    assert not torch.equal(example_inputs(empty, sizes, seed=5)[1], species) or sizes["atoms"] == 1


def test_example_inputs_name_what_is_missing() -> None:
    with pytest.raises(UsageError, match="the size 'atoms', which is not in"):
        example_inputs(without_dead_code(), {"edges": 3})
    into = TensorSpec("i", (2,), torch.int64, properties=frozenset({"index:atoms"}))
    with pytest.raises(UsageError, match="index into no atoms"):
        example_inputs(program(lambda call, i: {"y": i}, inputs=(into,)), {"atoms": 0})


# --- golden graphs


def test_graph_text_does_not_depend_on_history() -> None:
    before = with_common_subexpressions()
    for found in before.graph.nodes:
        if found.op == "call_function":
            found.name = f"{found.name}_renamed"
    assert graph_text(before) == graph_text(with_common_subexpressions())


def test_graph_text_shortens_long_strings_and_tells_them_apart() -> None:
    def text(rounding: str) -> str:
        graph = program(lambda call, x: {"y": call(aten.div.Tensor_mode, x, 2.0, rounding_mode="floor")})
        (division,) = graph.graph.find_nodes(op="call_function", target=aten.div.Tensor_mode)
        division.kwargs = {"rounding_mode": rounding}
        return graph_text(graph)

    long = text("64x0e + " * 100)
    FileCheck().check("rounding_mode='64x0e + 64x0e + 64x0e + 64x0'...#").run(long)
    assert len(long) < 200
    assert long != text("64x0e + " * 101)


def test_assert_golden(tmp_path: Path) -> None:
    path = tmp_path / "graphs" / "product.txt"
    with pytest.raises(UsageError, match="there is no golden file"):
        assert_golden(without_dead_code(), path)
    assert_golden(without_dead_code(), path, update=True)
    assert_golden(without_dead_code(), path)
    with pytest.raises(PassError, match=r"(?s)\n-  %mm = .*\n\+  %cos = "):
        assert_golden(program(lambda call, x: {"y": call(aten.cos.default, x)}), path)


# --- the contract catches passes that break it


@dataclass(frozen=True)
class Double(Pass):
    """Writes y + y as 2 y.

    Before / After: ``add(y, y)``; ``mul(y, 2.0)``.

    Holds when: always.

    Keeps: values up to rounding.
    """

    name: ClassVar[str] = "double"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES
    error: float = 0.0

    def apply(self, program: Program) -> Outcome:
        found = program.graph.find_nodes(op="call_function", target=aten.add.Tensor)
        for old in found:
            with program.graph.inserting_before(old):
                new = program.graph.call_function(aten.mul.Tensor, (old.args[0], 2.0 + self.error))
            old.replace_all_uses_with(new)
            program.graph.erase_node(old)
        return Outcome(program, bool(found))


@dataclass(frozen=True)
class Exact(Double):
    __doc__ = Double.__doc__
    exactness: ClassVar[Exactness] = Exactness.EXACT


@dataclass(frozen=True)
class Approximate(Double):
    __doc__ = Double.__doc__
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE


class Undecorated(Double):
    __doc__ = Double.__doc__


@dataclass(frozen=True)
class Undocumented(Double):
    """Writes y + y as 2 y."""


@dataclass(frozen=True)
class Optional(Double):
    __doc__ = Double.__doc__
    name: str = "double"  # type: ignore[misc]


@dataclass(frozen=True)
class Textless(Double):
    __doc__ = Double.__doc__
    function: Callable[[], None] | None = None


@dataclass(frozen=True)
class Silent(Double):
    __doc__ = Double.__doc__

    def apply(self, program: Program) -> Outcome:
        return replace(super().apply(program), modified=False)


@dataclass(frozen=True)
class Boastful(Double):
    __doc__ = Double.__doc__

    def apply(self, program: Program) -> Outcome:
        return Outcome(program, modified=True)


@dataclass(frozen=True)
class Restless(Double):
    __doc__ = Double.__doc__

    def apply(self, program: Program) -> Outcome:
        output = program.graph.output_node()
        with program.graph.inserting_before(output):
            same = program.graph.call_function(aten.mul.Tensor, (program.results["y"], 1.0))
        output.args = ((same,),)
        return Outcome(program, modified=True)


@dataclass(frozen=True)
class Unordered(Double):
    __doc__ = Double.__doc__

    def apply(self, program: Program) -> Outcome:
        program.results["y"].append(program.placeholders["x"])
        return Outcome(program, modified=True)


@dataclass(frozen=True)
class InPlace(Double):
    __doc__ = Double.__doc__

    def apply(self, program: Program) -> Outcome:
        program.graph_module.get_buffer("w").add_(1.0)
        return super().apply(program)


@dataclass(frozen=True)
class Random(Double):
    __doc__ = Double.__doc__

    def apply(self, program: Program) -> Outcome:
        torch.rand(3)
        return super().apply(program)


@dataclass(frozen=True)
class Renaming(Double):
    __doc__ = Double.__doc__

    def apply(self, program: Program) -> Outcome:
        outcome = super().apply(program)
        outputs = tuple(replace(spec, name="z") for spec in program.outputs)
        return replace(outcome, program=replace(outcome.program, outputs=outputs))


@dataclass(frozen=True)
class Narrowing(Double):
    __doc__ = Double.__doc__

    def apply(self, program: Program) -> Outcome:
        (found,) = program.graph.find_nodes(op="call_function", target=aten.add.Tensor) or (None,)
        if found is None:
            return Outcome(program, modified=False)
        found.target = aten.sub.Tensor
        return Outcome(program, modified=True)


def sums(dtype: torch.dtype = torch.float64) -> Program:
    def body(call: Call, x: fx.Node, w: fx.Node) -> dict[str, fx.Node]:
        y = call(aten.mm.default, x, w)
        return {"y": call(aten.add.Tensor, y, y)}

    return program(body, {"w": W.to(dtype)}, (replace(X, dtype=dtype),))


def test_contract_holds_for_an_honest_pass() -> None:
    outcomes = PassContract(Double(), [sums, lambda: sums(torch.float32), without_dead_code]).check()
    assert [outcome.modified for outcome in outcomes] == [True, True, False]
    PassContract(Double(error=1e-14), [sums]).check()
    PassContract(Approximate(error=1e-5), [sums], budget=1e-2).check()


def test_contract_does_not_touch_the_program_it_checks() -> None:
    before = sums()
    text = graph_text(before)
    PassContract(Double(), [lambda: before]).check()
    assert graph_text(before) == text


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (Undecorated(), "is not decorated"),
        (Undocumented(), "has the sections"),
        (Optional(), "declares name as an option"),
        (Textless(function=print), "which does not parse"),
        (Silent(), "modified the program and does not say so"),
        (Boastful(), "says that it modified the program, which it did not"),
        (Restless(), "a second run changes the program again"),
        (Unordered(), "the verifier refuses: the graph is malformed"),
        (InPlace(), "changed the weight w in place"),
        (Random(), "random state"),
        (Renaming(), "changed the inputs or outputs"),
        (Narrowing(), "is off by .* in output 'y'"),
        (Double(error=1e-11), "is off by .* in output 'y'"),
        (Exact(error=1e-15), "does not keep the bits in output 'y'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_contract_catches(subject: Pass, message: str) -> None:
    with pytest.raises(PassError, match=message):
        PassContract(subject, [sums]).check()


def test_contract_wants_a_program_that_the_pass_changes() -> None:
    with pytest.raises(PassError, match="changed none of the programs"):
        PassContract(DeadCode(), [without_dead_code]).check()
    with pytest.raises(UsageError, match="needs programs"):
        PassContract(DeadCode(), []).check()


def test_contract_of_an_approximate_pass_wants_a_budget() -> None:
    with pytest.raises(UsageError, match="needs a budget"):
        PassContract(Approximate(), [sums]).check()
    with pytest.raises(PassError, match=r"more than 1\.00e-08"):
        PassContract(Approximate(error=1e-5), [sums], budget=1e-8).check()


def test_contract_wants_a_class_that_can_be_registered() -> None:
    @dataclass(frozen=True)
    class Local(Double):
        __doc__ = Double.__doc__

    with pytest.raises(PassError, match="inside a function"):
        PassContract(Local(), [sums]).check()


@dataclass(frozen=True)
class Freezing(Double):
    __doc__ = Double.__doc__

    def apply(self, program: Program) -> Outcome:
        (view,) = program.graph.find_nodes(op="call_function", target=aten.view.default)
        modified = view.args[1] != [7, 3]
        view.args = (view.args[0], [7, 3])
        return Outcome(program, modified)


@dataclass(frozen=True)
class Selecting(Double):
    __doc__ = Double.__doc__

    def apply(self, program: Program) -> Outcome:
        if program.graph.find_nodes(op="call_function", target=aten.select.int):
            return Outcome(program, modified=False)
        (old,) = program.graph.find_nodes(op="call_function", target=aten.sin.default)
        name = add_constant(program, "third", torch.tensor([2]))
        with program.graph.inserting_after(old):
            index = program.graph.get_attr(name)
        with program.graph.inserting_after(index):
            row = program.graph.call_function(aten.index_select.default, (old, 0, index))
        with program.graph.inserting_after(row):
            vector = program.graph.call_function(aten.select.int, (row, 0, 0))
        with program.graph.inserting_after(vector):
            nothing = program.graph.call_function(aten.zeros_like.default, (vector,))
        with program.graph.inserting_after(nothing):
            new = program.graph.call_function(aten.add.Tensor, (old, nothing))
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in (row, new))
        return Outcome(program, modified=True)


@pytest.mark.parametrize(
    ("subject", "message"),
    [(Freezing(), "the verifier refuses"), (Selecting(), r"does not run at \{'atoms': 1")],
    ids=["freezing", "selecting"],
)
def test_contract_catches_what_holds_for_some_sizes_only(subject: Pass, message: str) -> None:
    def body(call: Call, x: fx.Node) -> dict[str, fx.Node]:
        return {"y": call(aten.view.default, call(aten.sin.default, x), [call(aten.sym_size.int, x, 0), 3])}

    with pytest.raises(PassError, match=message):
        PassContract(subject, [lambda: program(body)]).check()


def test_contract_is_not_used_on_a_broken_program() -> None:
    broken = sums()
    broken.results["y"].append(broken.placeholders["x"])
    with pytest.raises(UsageError, match="given a broken program"):
        PassContract(Double(), [lambda: broken]).check()


def test_build_program_wants_outputs_of_named_sizes() -> None:
    with pytest.raises(UsageError, match="which is the size of no input"):
        program(lambda call, x: {"y": call(aten.view.default, x, [-1])})
