"""The pass sort-edges: one stable permutation in front, results in the caller's order, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx
from torch.testing import FileCheck

import fxpass
from fxpass.edges import SORTED
from fxpass.ir import ops
from fxpass.ir.convolution import rows_by
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.sparsity import check
from fxpass.ir.verifier import verify
from fxpass.models import small_potential
from fxpass.passes import Outcome
from fxpass.structures import probe_structures
from fxpass.testing import PassContract, build_program, example_inputs, graph_text, run_program
from fxpass_passes.sort_edges import SortEdges
from test_fuse_convolution import Layers, aten, counts, forces, fused, program

pytestmark = pytest.mark.once

F64 = torch.float64
SIZES = (
    {"atoms": 7, "edges": 19, "graphs": 2},
    {"atoms": 1, "edges": 0, "graphs": 1},
    {"atoms": 1, "edges": 3, "graphs": 1},
)


def sorted_(given: Program) -> Outcome:
    outcome = SortEdges().apply(given.copy())
    verify(outcome.program)
    return outcome


def refusal(given: Program) -> tuple[str, tuple[str, ...]]:
    outcome = sorted_(given)
    assert not outcome.modified
    (refused,) = outcome.refusals
    return refused.reason, refused.nodes


def test_before_and_after() -> None:
    given = forces(program("species"))
    assert "rows_by" not in graph_text(given)
    text = graph_text(sorted_(given).program)
    expected = FileCheck().check("%rows_by = fxpass.rows_by.default(%select, %sym_size)")
    expected.check("%gather = fxpass.gather.default(%edge_vectors, %slice)")
    expected.check("%index_select = aten.index_select.default(%edge_index, 1, %slice)")
    expected.check("%gather_1 = fxpass.gather.default(%species, %slice)")
    expected.check("aten.linalg_vector_norm.default(%gather, 2, [1])")
    expected.check("%scatter_sum_4 = fxpass.scatter_sum.default(%add_9, %slice, %sym_size_1)")
    expected.check("return edge_gradient = %scatter_sum_4").run(text)
    assert text.count("%edge_vectors") == text.count("%species") == 1 and text.count("%edge_index") == 3


@pytest.mark.parametrize("stage", ["energy", "forces"])
@pytest.mark.parametrize("kind", ["species", "weights"])
def test_contract(kind: str, stage: str) -> None:
    make: Callable[[], Program] = lambda: program(kind) if stage == "energy" else forces(program(kind))  # noqa: E731
    (outcome,) = PassContract(SortEdges(), [make], sizes=SIZES).check()
    assert [a.node for a in outcome.applications] == ["edge_vectors", "edge_index", "species"]
    check(outcome.program)


def test_later_ops_read_sorted_receivers_and_equal_ones_stay_in_order() -> None:
    given = forces(program("species"))
    after = sorted_(given).program
    gathers = after.graph.find_nodes(op="call_function", target=ops.gather)
    (vectors,) = (n for n in gathers if n.args[0].name == "edge_vectors")
    (index,) = after.graph.find_nodes(op="call_function", target=aten.index_select.default)
    (select,) = (n for n in index.users if n.args[2] == 1)
    inputs = example_inputs(given, SIZES[0])
    seen: dict[fx.Node, Any] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    Watch(after.graph_module).run(*inputs)
    order = torch.argsort(inputs[1][1], stable=True)
    assert torch.equal(seen[select], inputs[1][1][order]) and torch.equal(seen[vectors], inputs[0][order])


def test_results_are_in_the_callers_order() -> None:
    given = forces(program("species"))
    after = sorted_(given).program
    inputs = example_inputs(given, SIZES[0])
    mixed = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    edges = {"edge_vectors": 0, "edge_index": 1, "species": 0}
    others = [
        value.index_select(edges[spec.name], mixed) if spec.name in edges else value
        for spec, value in zip(given.inputs, inputs, strict=True)
    ]
    one, two = run_program(after, inputs), run_program(after, others)
    torch.testing.assert_close(two["edge_gradient"], one["edge_gradient"][mixed], rtol=1e-12, atol=1e-12)
    expected = run_program(given, inputs)["edge_gradient"]
    torch.testing.assert_close(one["edge_gradient"], expected, rtol=1e-12, atol=1e-12)


def test_sorted_first_and_differentiated_then() -> None:
    given = program("table")
    late, early = forces(sorted_(given).program), sorted_(forces(given)).program
    for sizes in SIZES:
        inputs = example_inputs(given, sizes)
        for name, value in run_program(early, inputs).items():
            torch.testing.assert_close(run_program(late, inputs)[name], value, rtol=1e-12, atol=1e-12)


def test_fused_after_sorting() -> None:
    found = counts(fused(sorted_(forces(program())).program).program)
    assert found[ops.tensor_product] == 0 and found[rows_by] == 3


# --- what stays


def test_not_twice() -> None:
    assert refusal(sorted_(program()).program) == ("its edges are sorted already", ("edge_vectors",))


def test_not_where_the_host_sorts() -> None:
    given = replace(program(), assumptions=(SORTED,))
    assert refusal(given) == (f"its host sorts: {SORTED}", ("edge_index",))


def test_not_without_a_neighbour_list() -> None:
    given = build_program(
        lambda graph, x: {"energy": graph.call_function(aten.sum.dim_IntList, (x, [1]))},
        (TensorSpec("x", ("atoms", 3), F64),),
    )
    assert refusal(given)[0].startswith("it has no edge vectors")


def with_op(change: Callable[[Layers, fx.Node, fx.Node, fx.Node], fx.Node]) -> Program:
    """Layers whose messages [edges, 14] are changed by ``change(layers, messages, edge index, edge vectors)``."""

    class Changed(Layers):
        def build(self, *inputs: fx.Node) -> dict[str, fx.Node]:
            self.inputs = inputs
            return super().build(*inputs)

        def sum(self, message: fx.Node, receiver: fx.Node, size: fx.Node) -> fx.Node:
            return super().sum(change(self, message, self.inputs[1], self.inputs[0]), receiver, size)

    return program("bare", Changed)


def rolled(layers: Layers, m: fx.Node, index: fx.Node, vectors: fx.Node) -> fx.Node:
    return layers.call(aten.add.Tensor, m, layers.call(aten.roll.default, m, [1], [0]))


def summed_up(layers: Layers, m: fx.Node, index: fx.Node, vectors: fx.Node) -> fx.Node:
    return layers.call(aten.cumsum.default, m, 0)


def numbered(layers: Layers, m: fx.Node, index: fx.Node, vectors: fx.Node) -> fx.Node:
    size = layers.call(aten.sym_size.int, vectors, 0)
    numbers = layers.call(aten.arange.default, size)
    factor = layers.call(aten._to_copy.default, layers.call(aten.unsqueeze.default, numbers, 1))
    return layers.call(aten.mul.Tensor, m, factor)


def paired(layers: Layers, m: fx.Node, index: fx.Node, vectors: fx.Node) -> fx.Node:
    numbers = layers.call(aten.remainder.Scalar, layers.call(aten.select.int, index, 0, 0), 1)
    return layers.call(ops.gather, m, numbers)


def first_dropped(layers: Layers, m: fx.Node, index: fx.Node, vectors: fx.Node) -> fx.Node:
    head, tail = (layers.call(aten.slice.Tensor, m, 0, *ends) for ends in ((0, 1), (1, (1 << 63) - 1)))
    return layers.call(aten.cat.default, [tail, head], 0)


@pytest.mark.parametrize(
    ("change", "reason", "node"),
    [
        (rolled, "it is not known to treat all edges alike", "roll_default"),
        (summed_up, "it works along the list of edges: cumsum", "cumsum_default"),
        (numbered, "it is not known to treat all edges alike", "arange_default"),
        (paired, "it reads, or sums into, rows of edges by their numbers", "gather_default_1"),
        (first_dropped, "it works along the list of edges: slice", "slice_tensor"),
    ],
)
def test_programs_that_depend_on_the_order(change: Any, reason: str, node: str) -> None:
    assert refusal(with_op(change)) == (reason, (node,))


def halved(layers: Layers, m: fx.Node, index: fx.Node, vectors: fx.Node) -> fx.Node:
    """Ops on rows that are taken: softmax over edges, views, products of matrices, stacks."""
    tall = layers.call(aten.view.default, m, [-1, 2, 7])
    back = layers.call(aten.view.default, tall, [-1, 14])
    return layers.call(aten.mul.Tensor, back, 0.5)


def test_programs_that_do_not() -> None:
    make = lambda: with_op(halved)  # noqa: E731
    (outcome,) = PassContract(SortEdges(), [make], sizes=SIZES).check()
    assert outcome.modified


def test_outputs_with_edges_in_another_dimension() -> None:
    given = program()
    flipped = replace(given.outputs[0], name="pairs", dims=("graphs", "edges"))
    outcome = SortEdges().apply(replace(given.copy(), outputs=(flipped,)))
    assert outcome.refusals[0].reason == "the result pairs has edges in dimension 1" and not outcome.modified


# --- a whole potential


@pytest.mark.slow
def test_a_potential_with_sorted_edges_is_the_same_potential() -> None:
    model = small_potential(F64)
    fast = fxpass.optimize(model, ["specialize-species", "sort-edges", "differentiate"], verify=False)
    assert any(node.target is rows_by for node in fast.program.graph.nodes)
    for structure in probe_structures(fast.facts["numbers"], fast.facts["cutoff"]):
        found, expected = (fast.frontend.evaluate(each, structure) for each in (fast, model))
        assert abs(found.energy - expected.energy) < 1e-10 * max(len(structure), 1)
        np.testing.assert_allclose(found.forces, expected.forces, rtol=0, atol=1e-10)
