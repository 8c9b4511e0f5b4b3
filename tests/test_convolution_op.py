"""``fxpass::convolution``: what it stands for, its derivatives to second order, ops of several results in programs."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxpass._torch_compat import fake_inputs, trace
from fxpass.algebra.multilinear import Path, TensorProduct
from fxpass.algebra.piecewise import Grid, coefficients
from fxpass.errors import PassError, PipelineError
from fxpass.ir import ops
from fxpass.ir.convolution import convolution, convolution_gradient, fusible, rows_by
from fxpass.ir.cost import program_cost
from fxpass.ir.diff import diff
from fxpass.ir.legalize import legalize, semantic_nodes
from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.snapshot import snapshot
from fxpass.ir.sparsity import check
from fxpass.ir.verifier import verify
from fxpass.package import program_from_json, program_to_json
from fxpass.pipeline import parse
from fxpass.registry import default_registry
from fxpass.testing import PassContract, build_program, example_inputs, run_program
from fxpass_passes.common_subexpressions import CommonSubexpressions
from fxpass_passes.dead_code import DeadCode
from fxpass_passes.fold_constants import FoldConstants
from fxpass_passes.legalize import Legalize

pytestmark = pytest.mark.once

PATHS = (
    Path(0, 0, 0, "uvu", 0, 1.0),
    Path(0, 1, 1, "uvu", 2, 0.7),
    Path(1, 0, 2, "uvu", 4, 1.1),
    Path(1, 1, 0, "uvu", 6, 0.3),
    Path(1, 1, 3, "uvu", -1, 0.5),
)
PRODUCT = TensorProduct("2x0e+2x1o", "1x0e+1x1o", "2x0e+2x1o+2x1o+2x2e", PATHS, 8, False)
GRID = Grid(5, 0.0, 3.0, 6)
SPEC = str(PRODUCT)
#: number of edges and atoms
SIZES = [(7, 3), (0, 3), (3, 1), (0, 1)]


def table(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    knots = len(GRID.knots())
    rows = []
    for _ in range(count):
        values, slopes, bends = torch.randn(3, knots, PRODUCT.weights, dtype=torch.float64, generator=generator).numpy()
        rows.append(torch.from_numpy(coefficients(GRID, values, slopes, bends)))
    return torch.cat(rows, 1)


def operands(edges: int, atoms: int, kind: str, size: int | None = None) -> dict[str, Any]:
    """Everything that a convolution and its gradient take, float64; ``kind`` says where the weights come from."""
    generator = torch.Generator().manual_seed(edges + 10 * atoms)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    receivers = atoms if size is None else size
    sender = torch.randint(atoms, (edges,), generator=generator)
    receiver = torch.randint(receivers, (edges,), generator=generator)
    radial = (3.6 * torch.rand(edges, dtype=torch.float64, generator=generator)).requires_grad_()
    return {
        "x": normal(atoms, PRODUCT.dims["x1"]),
        "y": normal(edges, PRODUCT.dims["x2"]),
        "g": normal(receivers, PRODUCT.dims["out"]),
        "radial": normal(edges, PRODUCT.weights) if kind == "weights" else radial,
        "species": torch.randint(2, (edges,), generator=generator) if kind == "species" else None,
        "coefficients": None if kind == "weights" else table(2 if kind == "species" else 1),
        "sender": sender,
        "receiver": receiver,
        "size": receivers,
        "grid": "" if kind == "weights" else str(GRID),
    }


def fused(o: dict[str, Any], x: Tensor, y: Tensor, radial: Tensor) -> Tensor:
    by_receiver = rows_by(o["receiver"], o["size"])
    lookup = (o["species"], o["coefficients"], o["sender"], o["receiver"])
    return convolution(x, y, radial, *lookup, by_receiver, o["size"], SPEC, o["grid"])


def composed(o: dict[str, Any], x: Tensor, y: Tensor, radial: Tensor) -> Tensor:
    weights = radial
    if o["coefficients"] is not None:
        weights = ops.table(radial, o["species"], o["coefficients"], o["grid"], 0)
    messages = ops.tensor_product(ops.gather(x, o["sender"]), y, weights, None, SPEC, "out")
    return ops.scatter_sum(messages, o["receiver"], o["size"])


def gradient(o: dict[str, Any], needs: tuple[bool, bool, bool] = (True, True, True)) -> Callable[..., Any]:
    def run(x: Tensor, y: Tensor, g: Tensor, radial: Tensor) -> tuple[Tensor, ...]:
        by_sender = rows_by(o["sender"], x.shape[0])
        lookup = (o["species"], o["coefficients"], o["sender"], o["receiver"])
        found = convolution_gradient(x, y, g, radial, *lookup, by_sender, SPEC, o["grid"], list(needs))
        return tuple(value for value, need in zip(found, needs, strict=True) if need)

    return run


def test_rows_by_sorts_an_index() -> None:
    index = torch.tensor([3, 0, 3, 1, 0])
    assert rows_by(index, 5).tolist() == [0, 2, 3, 3, 5, 5, 1, 4, 3, 0, 2]
    assert rows_by(index[:0], 2).tolist() == [0, 0, 0]
    assert rows_by(index[:0], 0).tolist() == [0]


@pytest.mark.parametrize("kind", ["weights", "table", "species"])
@pytest.mark.parametrize(("edges", "atoms"), SIZES)
def test_values_and_gradients_are_those_of_the_ops_that_it_stands_for(edges: int, atoms: int, kind: str) -> None:
    o = operands(edges, atoms, kind, size=atoms + 1)
    inputs = [o["x"], o["y"], o["radial"]]
    found, expected = fused(o, *inputs), composed(o, *inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    by_expected = torch.autograd.grad(expected, inputs, o["g"])
    for by in (torch.autograd.grad(found, inputs, o["g"]), gradient(o)(o["x"], o["y"], o["g"], o["radial"])):
        for a, b in zip(by, by_expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["weights", "table", "species"])
@pytest.mark.parametrize(("edges", "atoms"), [(5, 3), (2, 1)])
def test_first_and_second_derivatives(edges: int, atoms: int, kind: str) -> None:
    o = operands(edges, atoms, kind)
    inputs = (o["x"], o["y"], o["radial"])
    assert torch.autograd.gradcheck(lambda *a: fused(o, *a), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: fused(o, *a), inputs, fast_mode=True)
    assert torch.autograd.gradcheck(gradient(o), (o["x"], o["y"], o["g"], o["radial"]))


@pytest.mark.parametrize("kind", ["weights", "table"])
def test_second_derivatives_of_the_gradient(kind: str) -> None:
    o = operands(3, 2, kind)
    assert torch.autograd.gradgradcheck(gradient(o), (o["x"], o["y"], o["g"], o["radial"]), fast_mode=True)


@pytest.mark.parametrize("kind", ["weights", "species"])
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(needs: tuple[bool, bool, bool], kind: str) -> None:
    o = operands(6, 3, kind)
    inputs = (o["x"], o["y"], o["g"], o["radial"])
    (alone,), together = gradient(o, needs)(*inputs), gradient(o)(*inputs)
    torch.testing.assert_close(alone, together[needs.index(True)], rtol=0, atol=0)
    expected = torch.autograd.grad(together[needs.index(True)].sin().sum(), inputs, allow_unused=True)
    found = torch.autograd.grad(alone.sin().sum(), inputs, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("edges", [0, 5])
def test_without_weights(edges: int) -> None:
    bare = PRODUCT.keep((PATHS[-1],))
    spec = str(TensorProduct(bare.irreps1, bare.irreps2, bare.irreps_out, bare.paths, 0, False))
    o = operands(edges, 3, "weights")
    radial = o["y"].detach()[:, :0].requires_grad_()
    order = rows_by(o["receiver"], 3)

    def run(x: Tensor, y: Tensor) -> Tensor:
        return convolution(x, y, radial, None, None, o["sender"], o["receiver"], order, 3, spec, "")

    messages = ops.tensor_product(ops.gather(o["x"], o["sender"]), o["y"], None, None, spec, "out")
    torch.testing.assert_close(run(o["x"], o["y"]), ops.scatter_sum(messages, o["receiver"], 3), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(run, (o["x"], o["y"]))
    assert torch.autograd.gradgradcheck(run, (o["x"], o["y"]))


@pytest.mark.parametrize("kind", ["weights", "species"])
@pytest.mark.parametrize(("edges", "atoms"), SIZES)
def test_shape_functions_agree_with_the_ops(edges: int, atoms: int, kind: str) -> None:
    o = {k: v.detach() if isinstance(v, Tensor) else v for k, v in operands(edges, atoms, kind).items()}
    lookup = (o["species"], o["coefficients"], o["sender"], o["receiver"])
    by_receiver, by_sender = rows_by(o["receiver"], atoms), rows_by(o["sender"], atoms)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (rows_by, (o["sender"], atoms)),
        (convolution, (o["x"], o["y"], o["radial"], *lookup, by_receiver, atoms, SPEC, o["grid"])),
    ]
    for needs in ([True, True, True], [False, True, False]):
        gradients = (o["x"], o["y"], o["g"], o["radial"], *lookup, by_sender, SPEC, o["grid"], needs)
        calls.append((convolution_gradient, gradients))
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        found = op(*args)
        assert all(value.is_contiguous() for value in (found if isinstance(found, tuple) else (found,)))


def test_second_derivatives_trace_with_dynamic_sizes() -> None:
    o = operands(5, 3, "species")
    names = ("x", "y", "g", "radial", "species", "sender", "receiver")
    dims = {"x": ("atoms", 8), "y": ("edges", 4), "g": ("atoms", PRODUCT.dims["out"])}
    specs = [(n, dims.get(n, ("edges",)), o[n].dtype) for n in names]

    def body(*args: Tensor) -> tuple[Tensor, ...]:
        x, y, g, radial, species, sender, receiver = args
        given = {**o, "species": species, "sender": sender, "receiver": receiver, "size": g.shape[0]}
        first = torch.autograd.grad((fused(given, x, y, radial) * g).sum(), (x, radial), create_graph=True)
        return torch.autograd.grad(sum(f.sin().sum() for f in first), (x, y, radial))  # type: ignore[union-attr]

    fakes = fake_inputs(specs, {"atoms": 101, "edges": 211})
    for name, fake in zip(names, fakes, strict=True):
        fake.requires_grad_(name in ("x", "y", "radial"))
    graph = trace(body, fakes, stacks=False)
    assert convolution_gradient in {node.target for node in graph.graph.nodes}
    for edges, atoms in SIZES:
        new = operands(edges, atoms, "species")
        inputs = [new[name] for name in names]
        for a, b in zip(graph(*inputs), body(*inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# --- in programs


def program(kind: str = "table", needs: tuple[bool, bool, bool] = (True, True, True)) -> Program:
    """A convolution, and the gradients of half the square of its result."""
    dims: tuple[Any, ...] = ("edges", PRODUCT.weights) if kind == "weights" else ("edges",)
    inputs = (
        TensorSpec("x", ("atoms", 8), torch.float64, PRODUCT.irreps1),
        TensorSpec("y", ("edges", 4), torch.float64, PRODUCT.irreps2),
        TensorSpec("radial", dims, torch.float64),
        TensorSpec("edge_index", (2, "edges"), torch.int64, properties=frozenset({"index:atoms"})),
    )

    def body(graph: fx.Graph, x: fx.Node, y: fx.Node, radial: fx.Node, index: fx.Node) -> dict[str, fx.Node]:
        sender, receiver = (graph.call_function(torch.ops.aten.select.int, (index, 0, k)) for k in (0, 1))
        size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
        by_sender, by_receiver = (graph.call_function(rows_by, (i, size)) for i in (sender, receiver))
        stored, grid = (None, "") if kind == "weights" else (graph.get_attr("stored"), str(GRID))
        lookup = (None, stored, sender, receiver)
        out = graph.call_function(convolution, (x, y, radial, *lookup, by_receiver, size, SPEC, grid))
        taken = graph.call_function(
            convolution_gradient, (x, y, out, radial, *lookup, by_sender, SPEC, grid, list(needs))
        )
        names = [(k, name) for k, name in enumerate(("by_x", "by_y", "by_radial")) if needs[k]]
        return {"out": out, **{name: graph.call_function(operator.getitem, (taken, k)) for k, name in names}}

    return build_program(body, inputs, {} if kind == "weights" else {"stored": table(1)})


def agree(a: Program, b: Program) -> None:
    for edges, atoms in SIZES:
        inputs = example_inputs(a, {"atoms": atoms, "edges": edges})
        expected, found = run_program(a, inputs), run_program(b, inputs)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


def test_irreps_of_results_and_operands() -> None:
    given = program()
    verify(given)
    irreps = {name: node.meta["irreps"] for name, node in given.results.items()}
    assert irreps == {
        "out": PRODUCT.irreps_out, "by_x": PRODUCT.irreps1, "by_y": PRODUCT.irreps2, "by_radial": None
    }  # fmt: skip
    for name in ("x", "y"):
        changed = program()
        wrong = {"x": "8x0e", "y": "4x0e"}[name]
        specs = tuple(replace(s, irreps=wrong) if s.name == name else s for s in changed.inputs)
        with pytest.raises(PassError, match=f"operand {name} is {wrong}"):
            verify(replace(changed, inputs=specs))


@pytest.mark.parametrize("kind", ["weights", "table"])
def test_legalised_and_kept(kind: str) -> None:
    given = program(kind)
    outcomes = PassContract(Legalize(), [lambda: program(kind)]).check()
    assert not semantic_nodes(outcomes[0].program)
    agree(given, outcomes[0].program)
    kept = Legalize(keep=("convolution", "convolution_gradient", "rows_by")).apply(given).program
    assert [n.target for n in semantic_nodes(kept)] == [n.target for n in semantic_nodes(given)]
    only = Legalize(keep=("convolution_gradient",))
    some = only.apply(given).program
    assert {n.target for n in semantic_nodes(some)} == {convolution_gradient}
    assert not semantic_nodes(some, only.keeps)
    for node in some.graph.find_nodes(op="call_function", target=torch.ops.aten.index_add.default):
        assert provenance(node).made_by == "legalize"
    verify(some)
    agree(given, some)


def test_names_that_legalize_keeps_are_checked() -> None:
    (pass_,) = parse("legalize{keep=[linear,convolution]}", default_registry())
    assert pass_ == Legalize(keep=("linear", "convolution"))
    with pytest.raises(PipelineError, match="no semantic op 'liner'"):
        parse("legalize{keep=[liner]}", default_registry())


def test_equal_calls_merge_and_unused_ones_go() -> None:
    given = program()
    graph = given.graph
    twin = next(n for n in graph.nodes if n.target is convolution_gradient)
    out = graph.output_node()
    with graph.inserting_before(out):
        again = graph.call_function(convolution_gradient, twin.args)
        total = graph.call_function(
            torch.ops.aten.add.Tensor,
            (graph.call_function(operator.getitem, (again, 0)), graph.call_function(operator.getitem, (twin, 0))),
        )
        graph.call_function(convolution_gradient, (*twin.args[:-1], [True, False, False]))  # read by none
    out.args = ((*out.args[0][:1], total, *out.args[0][2:]),)  # type: ignore[index, misc]
    verify(given)
    merged = DeadCode().apply(CommonSubexpressions().apply(given.copy()).program).program
    assert [n.target for n in merged.graph.nodes].count(convolution_gradient) == 1
    assert not FoldConstants().apply(merged.copy()).modified
    verify(merged)
    agree(given, merged)


def test_printed_compared_and_saved() -> None:
    given = program(needs=(True, False, True))
    verify(given)
    shown = snapshot(given, "made")
    text = shown.code()
    assert ": tuple = fxpass.convolution_gradient(x, y, convolution_default, radial" in text
    assert "5 paths, 8 weights from 6 cells of order 5, by x, radial" in text
    assert not diff(shown, snapshot(given.copy(), "again"))
    other = snapshot(program(needs=(True, True, True)), "other")
    assert diff(shown, other).op_delta == {"operator.getitem": 1}
    arrays = {"stored": given.graph_module.stored.numpy()}
    loaded = program_from_json(json.loads(json.dumps(program_to_json(given))), arrays)
    verify(loaded)
    assert not diff(shown, snapshot(loaded, "loaded"))
    agree(given, loaded)


def test_edges_stay_sparse() -> None:
    for needs in ((True, True, True), (True, False, False)):
        given = program(needs=needs)
        verify(given)
        check(given)


def test_cost_is_that_of_the_ops_that_it_stands_for() -> None:
    sizes = {"atoms": 100, "edges": 4000}
    fused_cost = program_cost(program()).at(**sizes)
    legal = program_cost(legalize(program())).at(**sizes)
    assert fused_cost.bytes < legal.bytes / 3
    edge = PRODUCT.flops() * 4 + PRODUCT.dims["out"] + PRODUCT.dims["x1"]
    assert 4000 * edge < fused_cost.flops < 2 * 4000 * edge


def test_what_kernels_take() -> None:
    assert fusible(PRODUCT) is None
    assert fusible(PRODUCT.keep(PATHS[-1:])) is None
    one = TensorProduct("2x0e", "1x0e", "2x0e", (Path(0, 0, 0, "uvuv", 0, 1.0),), 2, False)
    assert fusible(one) is None
    refused = {
        "it has no paths": replace(one, paths=()),
        "its weights are shared by all rows": replace(one, shared=True),
        "a path of mode uvw mixes channels": replace(one, paths=(Path(0, 0, 0, "uvw", 0, 1.0),), weights=4),
        "a path of mode uvv mixes channels": replace(one, paths=(Path(0, 0, 0, "uvv", 0, 1.0),)),
        "the second operand has 3 channels": replace(one, irreps2="3x0e", irreps_out="6x0e", weights=6),
    }
    for reason, tp in refused.items():
        assert reason in (fusible(tp) or ""), tp
