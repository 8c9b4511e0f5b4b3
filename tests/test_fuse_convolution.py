"""The pass fuse-convolution: what it fuses, before and after differentiation, and what it leaves with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.testing import FileCheck

import fxpass
from fxpass.algebra.multilinear import Path, TensorProduct
from fxpass.algebra.piecewise import Grid, coefficients
from fxpass.ir import ops
from fxpass.ir.convolution import convolution, convolution_gradient, rows_by
from fxpass.ir.cost import program_cost
from fxpass.ir.guards import regions
from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.sparsity import check
from fxpass.ir.verifier import verify
from fxpass.models import WEIGHTS
from fxpass.passes import Outcome
from fxpass.testing import PassContract, build_program, example_inputs, graph_text, run_program
from fxpass_passes.common_subexpressions import CommonSubexpressions
from fxpass_passes.dead_code import DeadCode
from fxpass_passes.differentiate import Differentiate
from fxpass_passes.fuse_convolution import FuseConvolution
from fxpass_passes.guard_fusion import GuardFusion
from fxpass_passes.legalize import Legalize

pytestmark = pytest.mark.once

aten = torch.ops.aten
F64 = torch.float64
SIZES = (
    {"atoms": 7, "edges": 19, "graphs": 2},
    {"atoms": 1, "edges": 0, "graphs": 1},
    {"atoms": 1, "edges": 3, "graphs": 1},
)
X, Y, OUT = "2x0e+2x1o", "1x0e+1x1o", "2x0e+2x1o+2x1o"
WEIGHTED = (Path(0, 0, 0, "uvu", 0, 1.0), Path(0, 1, 1, "uvu", 2, 0.7), Path(1, 1, 0, "uvu", 4, 0.4))
BARE = Path(1, 0, 2, "uvu", -1, 0.6)
PRODUCT = TensorProduct(X, Y, OUT, (*WEIGHTED, BARE), 6, False)
GRID = Grid(5, 0.0, 3.0, 8, flat=True)
INPUTS = (
    TensorSpec("edge_vectors", ("edges", 3), F64, "1x1o", "Angstrom", frozenset({"edge_vector"})),
    TensorSpec("edge_index", (2, "edges"), torch.int64, properties=frozenset({"index:atoms"})),
    TensorSpec("x", ("atoms", 8), F64, X),
    TensorSpec("species", ("edges",), torch.int64, properties=frozenset({"below:2"})),
    TensorSpec("batch", ("atoms",), torch.int64, properties=frozenset({"index:graphs"})),
    TensorSpec("head", ("graphs",), torch.int64),
)


def table(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    knots = len(GRID.knots())
    made = []
    for _ in range(count):
        rows = torch.randn(3, knots, PRODUCT.weights, dtype=F64, generator=generator).numpy()
        made.append(torch.from_numpy(coefficients(GRID, *rows)))
    return torch.cat(made, 1)


class Layers:
    """Two convolutions, as capture leaves them, with the weights of ``kind``; each step may be overridden."""

    def __init__(self, graph: fx.Graph, kind: str, product: TensorProduct = PRODUCT) -> None:
        self.graph, self.kind, self.product = graph, kind, product

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def weights(self, layer: int, r: fx.Node, species: fx.Node) -> fx.Node | None:
        if self.kind == "bare":
            return None
        stored = self.graph.get_attr(f"stored_{layer}")
        if self.kind == "weights":
            return self.call(aten.mul.Tensor, self.call(aten.unsqueeze.default, r, 1), stored)
        return self.call(ops.table, r, species if self.kind == "species" else None, stored, str(GRID), 0)

    def message(self, x: fx.Node, y: fx.Node, w: fx.Node | None, sender: fx.Node) -> fx.Node:
        return self.call(ops.tensor_product, self.call(ops.gather, x, sender), y, w, None, str(self.product), "out")

    def sum(self, message: fx.Node, receiver: fx.Node, size: fx.Node) -> fx.Node:
        return self.call(ops.scatter_sum, message, receiver, size)

    def between(self, node: fx.Node) -> fx.Node:
        x = self.call(aten.slice.Tensor, node, 1, 0, 8)
        squares = self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, x, x), [1], True)
        return self.call(aten.mul.Tensor, x, self.call(aten.tanh.default, squares))

    def build(self, *inputs: fx.Node) -> dict[str, fx.Node]:
        vectors, index, x, species, batch, head = inputs
        sender, receiver = (self.call(aten.select.int, index, 0, k) for k in (0, 1))
        size, graphs = self.call(aten.sym_size.int, x, 0), self.call(aten.sym_size.int, head, 0)
        r = self.call(aten.linalg_vector_norm.default, vectors, 2, [1])
        y = self.call(aten.cat.default, [self.call(aten.unsqueeze.default, r, 1), vectors], 1)
        for layer in range(2):
            w = self.weights(layer, r, species)
            x = self.between(self.sum(self.message(x, y, w, sender), receiver, size))
        atomic = self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, x, x), [1])
        return {"energy": self.call(ops.scatter_sum, atomic, batch, graphs)}


def program(kind: str = "table", layers: type[Layers] = Layers, product: TensorProduct = PRODUCT) -> Program:
    """Two layers at stage "energy"."""
    stored = torch.linspace(-1, 1, product.weights, dtype=F64) if kind == "weights" else table(1 + (kind == "species"))
    weights = {f"stored_{layer}": (1 + layer) * stored for layer in range(2)}
    if kind == "bare":
        weights.clear()
        product = TensorProduct(X, Y, OUT, (BARE, replace(WEIGHTED[0], weight=-1)), 0, False)
    return build_program(lambda graph, *nodes: layers(graph, kind, product).build(*nodes), INPUTS, weights)


def forces(given: Program) -> Program:
    derived = Differentiate().apply(given.copy()).program
    for pass_ in (CommonSubexpressions(), DeadCode()):
        derived = pass_.apply(derived.copy()).program
    verify(derived)
    return derived


def fused(given: Program) -> Outcome:
    outcome = FuseConvolution().apply(given.copy())
    verify(outcome.program)
    return outcome


def counts(given: Program) -> Counter[Any]:
    return Counter(node.target for node in given.graph.nodes if node.op == "call_function")


def agree(a: Program, b: Program) -> None:
    for sizes in SIZES:
        inputs = example_inputs(a, sizes)
        expected, found = run_program(a, inputs), run_program(b, inputs)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_before_and_after() -> None:
    given = forces(program())
    FileCheck().check_count("fxpass.tensor_product", 7, exactly=True).run(graph_text(given))
    after = graph_text(fused(given).program)
    FileCheck().check_not("fxpass.tensor_product").run(after)
    FileCheck().check_not("fxpass.table").run(after)
    FileCheck().check_not("fxpass.gather").run(after.split("fxpass.scatter_sum")[0])
    found = counts(fused(given).program)
    assert (found[rows_by], found[convolution], found[convolution_gradient]) == (2, 2, 2)
    needs = [n.args[-1] for n in fused(given).program.graph.find_nodes(op="call_function", target=convolution_gradient)]
    assert sorted(needs) == [[False, True, True], [True, True, True]], "the features of the first layer are given"


@pytest.mark.parametrize(
    ("kind", "stage"), [("table", "energy"), ("species", "forces"), ("weights", "forces"), ("bare", "forces")]
)
def test_contract(kind: str, stage: str) -> None:
    make: Callable[[], Program] = lambda: program(kind) if stage == "energy" else forces(program(kind))  # noqa: E731
    (outcome,) = PassContract(FuseConvolution(), [make], sizes=SIZES).check()
    assert not outcome.refusals
    left = counts(outcome.program)
    assert not left[ops.tensor_product] and not left[ops.gather] - (stage == "forces"), "one is of the sum over atoms"
    assert left[convolution] == 2 and left[convolution_gradient] == (0 if stage == "energy" else 2)
    legal = Legalize().apply(outcome.program.copy()).program
    verify(legal)
    agree(make(), legal)


@pytest.mark.parametrize("kind", ["species", "weights", "bare"])
def test_fused_first_and_differentiated_then(kind: str) -> None:
    given = program(kind)
    late = forces(fused(given).program)
    assert counts(late)[convolution_gradient] == 2 and not counts(late)[ops.tensor_product]
    agree(forces(given), late)
    assert not fused(late).modified


def test_nothing_of_the_size_of_messages_is_left() -> None:
    given = forces(program())
    sizes = {"atoms": 100, "edges": 4000, "graphs": 1}
    before, after = (program_cost(p).at(**sizes).bytes for p in (given, fused(given).program))
    assert after < before / 2
    check(fused(given).program)


def test_provenance_is_that_of_what_went() -> None:
    given = forces(program())
    for node in fused(given).program.graph.nodes:
        if node.target in (convolution, convolution_gradient):
            assert provenance(node).made_by == "fuse-convolution"
            assert provenance(node).backward == (node.target is convolution_gradient)


# --- what stays


class GatheredSecond(Layers):
    def message(self, x: fx.Node, y: fx.Node, w: fx.Node | None, sender: fx.Node) -> fx.Node:
        swapped = tuple(replace(p, i1=p.i2, i2=p.i1, mode="uvv") for p in self.product.paths)
        spec = str(replace(self.product, irreps1=Y, irreps2=X, paths=swapped))
        return self.call(ops.tensor_product, y, self.call(ops.gather, x, sender), w, None, spec, "out")


class ScalarsGatheredSecond(Layers):
    """Both orders are of a mode that kernels take, where there is one channel."""

    def message(self, x: fx.Node, y: fx.Node, w: fx.Node | None, sender: fx.Node) -> fx.Node:
        one = str(TensorProduct("1x0e", "1x0e", "1x0e", (Path(0, 0, 0, "uvu", 0, 1.0),), 1, False))
        narrow = [self.call(aten.slice.Tensor, node, 1, 0, 1) for node in (y, x, w)]
        narrow[1] = self.call(ops.gather, narrow[1], sender)
        return self.call(aten.expand.default, self.call(ops.tensor_product, *narrow, None, one, "out"), [-1, 14])


class NotGathered(Layers):
    def message(self, x: fx.Node, y: fx.Node, w: fx.Node | None, sender: fx.Node) -> fx.Node:
        gathered = self.call(aten.neg.default, self.call(ops.gather, x, sender))
        return self.call(ops.tensor_product, gathered, y, w, None, str(self.product), "out")


class AddedMessages(Layers):
    def sum(self, message: fx.Node, receiver: fx.Node, size: fx.Node) -> fx.Node:
        return self.call(ops.scatter_sum, self.call(aten.add.Tensor, message, message), receiver, size)


class Twice(Layers):
    """Messages summed by receiver and, in the same way, by receiver once more."""

    def sum(self, message: fx.Node, receiver: fx.Node, size: fx.Node) -> fx.Node:
        return self.call(aten.add.Tensor, *(self.call(ops.scatter_sum, message, receiver, size) for _ in range(2)))


class Shared(Layers):
    def weights(self, layer: int, r: fx.Node, species: fx.Node) -> fx.Node | None:
        return self.graph.get_attr("stored_0")


SHARED = replace(PRODUCT, shared=True)
UUU = TensorProduct(X, X, OUT, (Path(0, 0, 0, "uuu", 0, 1.0), Path(0, 1, 1, "uuu", 2, 1.0)), 6, False)


class Wide(Layers):
    def message(self, x: fx.Node, y: fx.Node, w: fx.Node | None, sender: fx.Node) -> fx.Node:
        wide = self.call(aten.cat.default, [y, y], 1)
        return super().message(x, wide, w, sender)


@pytest.mark.parametrize(
    ("layers", "product", "kind", "reason"),
    [
        (GatheredSecond, PRODUCT, "table", "a path of mode uvv mixes channels"),
        (ScalarsGatheredSecond, PRODUCT, "table", "its x2, gather_default, is gathered and its x1 is not"),
        (NotGathered, PRODUCT, "table", "its x1 is not gathered"),
        (AddedMessages, PRODUCT, "table", "its result is read by add_tensor, which is no sum over edges"),
        (Shared, SHARED, "weights", "its weights are shared by all rows"),
        (Wide, UUU, "table", "the second operand has 2 channels in a path of mode uuu"),
    ],
)
def test_forward_refusals(layers: type[Layers], product: TensorProduct, kind: str, reason: str) -> None:
    given = program(kind, layers, product)
    verify(given)
    outcome = fused(given)
    assert not outcome.modified
    assert len(outcome.refusals) == 2
    assert outcome.refusals[0].reason == reason
    assert outcome.refusals[0].nodes[0] == "tensor_product_default"
    derived = forces(given)
    agree(derived, fused(derived).program)


def test_gradients_of_what_is_added_between() -> None:
    """The forward product stays; of the gradients nothing is gathered, as the sum comes after the gather."""
    outcome = fused(forces(program("table", AddedMessages)))
    assert not outcome.modified
    reasons = Counter(refusal.reason.split(",")[0] for refusal in outcome.refusals)
    assert reasons["the gradient of its result"] == 5


def test_messages_summed_twice() -> None:
    given = program("table", Twice)
    assert counts(fused(given).program)[convolution] == 4
    derived = forces(given)
    agree(derived, fused(derived).program)


class OneTable(Layers):
    def weights(self, layer: int, r: fx.Node, species: fx.Node) -> fx.Node | None:
        return super().weights(0, r, species)


def test_a_table_that_two_layers_read() -> None:
    """Their gradients by the weights are added before they meet the derivative of the table."""
    make = lambda: forces(CommonSubexpressions().apply(program("table", OneTable)).program)  # noqa: E731
    assert counts(make())[ops.table] == 2, "its values, and its derivative"
    (outcome,) = PassContract(FuseConvolution(), [make], sizes=SIZES).check()
    found = counts(outcome.program)
    assert found[convolution] == found[convolution_gradient] == 2
    assert not found[ops.tensor_product] and not found[ops.table] and not outcome.refusals
    assert [a.rule for a in outcome.applications].count("shared-table") == 1


def test_gradients_of_one_table_that_are_not_all_of_products_stay_added() -> None:
    def edit(graph: fx.Graph, products: list[fx.Node]) -> None:
        first, _ = (n for n in products if n.args[5] == "weight")
        with graph.inserting_after(first):
            new = graph.call_function(aten.tanh.default, (first,))
        first.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        new.meta["val"] = first.meta["val"]

    given = edited(forces(CommonSubexpressions().apply(program("table", OneTable)).program), edit)
    outcome = fused(given)
    assert not any(a.rule == "shared-table" for a in outcome.applications)
    assert counts(outcome.program)[ops.tensor_product] == 2
    agree(given, outcome.program)


# --- a number for each edge


class CutMessages(Layers):
    """Messages times a function of the length of their edge."""

    def build(self, *inputs: fx.Node) -> dict[str, fx.Node]:
        self.vectors = inputs[0]
        return super().build(*inputs)

    def factor(self) -> fx.Node:
        r = self.call(aten.linalg_vector_norm.default, self.vectors, 2, [1])
        return self.call(aten.unsqueeze.default, self.call(aten.cos.default, r), 1)

    def sum(self, message: fx.Node, receiver: fx.Node, size: fx.Node) -> fx.Node:
        return super().sum(self.call(aten.mul.Tensor, message, self.factor()), receiver, size)


class CutWeights(CutMessages):
    def weights(self, layer: int, r: fx.Node, species: fx.Node) -> fx.Node | None:
        return self.call(aten.mul.Tensor, self.factor(), super().weights(layer, r, species))

    def sum(self, message: fx.Node, receiver: fx.Node, size: fx.Node) -> fx.Node:
        return Layers.sum(self, message, receiver, size)


class CutTwice(CutWeights):
    sum = CutMessages.sum


class DoubledMessages(Layers):
    def sum(self, message: fx.Node, receiver: fx.Node, size: fx.Node) -> fx.Node:
        return super().sum(self.call(aten.mul.Tensor, message, 2.0), receiver, size)


ALL_WEIGHTED = replace(PRODUCT, paths=WEIGHTED)


@pytest.mark.parametrize("stage", ["energy", "forces"])
@pytest.mark.parametrize(
    ("layers", "kind", "product"),
    [
        (CutMessages, "species", PRODUCT),
        (CutMessages, "bare", PRODUCT),
        (CutWeights, "table", ALL_WEIGHTED),
        (CutWeights, "weights", ALL_WEIGHTED),
        (CutTwice, "species", ALL_WEIGHTED),
        (DoubledMessages, "table", PRODUCT),
    ],
)
def test_factors_of_edges_move_to_the_second_operand(
    layers: type[Layers], kind: str, product: TensorProduct, stage: str
) -> None:
    def make() -> Program:
        given = CommonSubexpressions().apply(program(kind, layers, product)).program
        return given if stage == "energy" else forces(given)

    (outcome,) = PassContract(FuseConvolution(), [make], sizes=SIZES).check()
    found = counts(outcome.program)
    assert found[convolution] == 2 and found[convolution_gradient] == (0 if stage == "energy" else 2)
    assert not found[ops.tensor_product] and not found[ops.table] and not outcome.refusals
    sizes = {"atoms": 100, "edges": 4000, "graphs": 1}
    if kind != "weights":
        widest = max(shape[1] for node in outcome.program.graph.nodes if (shape := edge_rows(node)) is not None)
        assert widest <= 4, "nothing wider than y has a row for each edge"
    assert program_cost(outcome.program).at(**sizes).bytes < 0.6 * program_cost(make()).at(**sizes).bytes


def edge_rows(node: fx.Node) -> tuple[Any, ...] | None:
    """Shape of a matrix with a row for each edge."""
    value = node.meta.get("val")
    known = isinstance(value, Tensor) and value.dim() == 2 and node.op == "call_function" and value.is_floating_point()
    vectors = next(iter(node.graph.find_nodes(op="placeholder"))).meta["val"]
    return tuple(value.shape) if known and str(value.shape[0]) == str(vectors.shape[0]) else None


def test_a_factor_of_the_weights_is_none_of_paths_without_any() -> None:
    given = forces(program("table", CutWeights))
    outcome = fused(given)
    assert counts(outcome.program)[convolution] == 2 and counts(outcome.program)[ops.table] == 4
    assert not any(a.rule == "edge-factor" for a in outcome.applications)
    agree(given, outcome.program)


class WideFactor(CutMessages):
    def factor(self) -> fx.Node:
        return self.call(aten.expand.default, super().factor(), [-1, 14])


def test_factors_of_columns_stay() -> None:
    outcome = fused(program("table", WideFactor))
    assert not outcome.modified
    assert outcome.refusals[0].reason == "its result is read by mul_tensor, which is no sum over edges"


# --- guarded regions


@pytest.mark.parametrize("kind", ["table", "species", "weights"])
def test_a_guarded_region_that_becomes_one_op_needs_no_guards(kind: str) -> None:
    make = lambda: forces(GuardFusion().apply(program(kind)).program)  # noqa: E731
    assert {region.partition(":")[0] for region in regions(make().graph)} >= {"convolution"}
    (outcome,) = PassContract(FuseConvolution(), [make], sizes=SIZES).check()
    found = counts(outcome.program)
    assert found[convolution] == found[convolution_gradient] == 2 and not found[ops.tensor_product]
    assert not any(region.startswith("convolution") for region in regions(outcome.program.graph))
    assert found[ops.table] == 0, "no guard stands between the table and its reader"
    assert [a.rule for a in outcome.applications].count("guarded-region") == 2


def test_a_guarded_region_that_is_refused_keeps_its_guards() -> None:
    given = forces(GuardFusion().apply(program("table", GatheredSecond)).program)
    before = regions(given.graph)
    outcome = fused(given)
    assert not outcome.modified and outcome.refusals
    assert {name: len(nodes) for name, nodes in regions(outcome.program.graph).items()} == {
        name: len(nodes) for name, nodes in before.items()
    }
    agree(given, outcome.program)


def test_half_precision_stays() -> None:
    given = program().cast(torch.bfloat16)
    derived = replace(given, inputs=given.inputs)
    verify(derived)
    outcome = fused(derived)
    assert not outcome.modified
    assert outcome.refusals[0].reason.startswith("kernels compute in float32 or float64 throughout")


def edited(given: Program, edit: Callable[[fx.Graph, list[fx.Node]], None]) -> Program:
    """A force program changed by hand: ``edit(graph, tensor products of gradients)``."""
    copy = given.copy()
    products = copy.graph.find_nodes(op="call_function", target=ops.tensor_product)
    edit(copy.graph, [n for n in products if n.args[5] != "out"])
    copy.graph_module.recompile()
    verify(copy)
    return copy


def by(products: list[fx.Node], slot: str) -> fx.Node:
    return next(n for n in products if n.args[5] == slot)


def test_a_gradient_by_the_weights_of_a_table_that_goes_elsewhere_stays() -> None:
    def edit(graph: fx.Graph, products: list[fx.Node]) -> None:
        (product,) = by(products, "weight").users
        (total,) = product.users
        with graph.inserting_after(product):
            total.update_arg(0, graph.call_function(aten.sin.default, (product,)))

    given = edited(forces(program()), edit)
    outcome = fused(given)
    (refusal,) = outcome.refusals
    assert "does not multiply it by the derivative of its table to be summed" in refusal.reason
    assert counts(outcome.program)[ops.tensor_product] == 1
    assert counts(outcome.program)[convolution_gradient] == 2
    agree(given, outcome.program)


def test_a_gradient_by_plain_weights_goes_anywhere() -> None:
    def edit(graph: fx.Graph, products: list[fx.Node]) -> None:
        product = by(products, "weight")
        with graph.inserting_after(product):
            other = graph.call_function(aten.sin.default, (product,))
        product.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)

    given = edited(forces(program("weights")), edit)
    outcome = fused(given)
    assert not outcome.refusals and not counts(outcome.program)[ops.tensor_product]
    agree(given, outcome.program)


def test_a_gradient_summed_by_another_index_stays() -> None:
    def edit(graph: fx.Graph, products: list[fx.Node]) -> None:
        product = by(products, "x1")
        (total,) = product.users
        total.update_arg(1, by(products, "x2").args[3].args[1])  # type: ignore[union-attr, arg-type]

    given = edited(forces(program()), edit)
    outcome = fused(given)
    (refusal,) = outcome.refusals
    assert refusal.reason.endswith("does not sum it by the index that x1 is gathered by")
    assert refusal.nodes == (refusal.nodes[0], refusal.reason.split()[0])
    agree(given, outcome.program)


def test_a_gradient_of_other_operands_stays() -> None:
    def edit(graph: fx.Graph, products: list[fx.Node]) -> None:
        product = by(products, "x2")
        with graph.inserting_before(product):
            product.update_arg(2, graph.call_function(aten.neg.default, (product.args[2],)))

    given = edited(forces(program()), edit)
    outcome = fused(given)
    (refusal,) = outcome.refusals
    assert refusal.reason == "there is no tensor product over edges with the same operands"
    agree(given, outcome.program)


def test_gradients_that_wait_for_each_other_are_not_joined() -> None:
    """Features depend on the gradient by x1 of the same operands: one op cannot make both; another one is fused."""

    def body(graph: fx.Graph, *inputs: fx.Node) -> dict[str, fx.Node]:
        _, index, x, _, _, _ = inputs
        layers = Layers(graph, "bare")
        sender, receiver = (layers.call(aten.select.int, index, 0, k) for k in (0, 1))
        size = layers.call(aten.sym_size.int, x, 0)
        y = layers.call(aten.slice.Tensor, layers.call(ops.gather, x, sender), 1, 0, 4)
        g = layers.call(aten.cat.default, [x, layers.call(aten.slice.Tensor, x, 1, 0, 6)], 1)
        spec = str(TensorProduct(X, Y, OUT, (BARE,), 0, False))
        h = layers.call(ops.gather, g, receiver)
        a = layers.call(ops.tensor_product, None, y, None, h, spec, "x1")
        by_x = layers.call(ops.scatter_sum, a, sender, size)
        features = layers.call(aten.add.Tensor, x, by_x)
        gathered = layers.call(ops.gather, features, sender)
        message = layers.call(ops.tensor_product, gathered, y, None, None, spec, "out")
        out = layers.call(ops.scatter_sum, message, receiver, size)
        by_y = layers.call(ops.tensor_product, gathered, None, None, h, spec, "x2")
        other = layers.call(ops.gather, layers.call(aten.neg.default, g), receiver)
        alone = layers.call(ops.tensor_product, gathered, None, None, other, spec, "x2")
        return {"out": out, "by_x": by_x, "by_y": by_y, "alone": alone}

    given = build_program(body, tuple(replace(spec, irreps=None) for spec in INPUTS), {})
    outcome = fused(given)
    found = counts(outcome.program)
    assert (found[convolution], found[convolution_gradient], found[ops.tensor_product], found[rows_by]) == (1, 1, 2, 2)
    (refusal,) = outcome.refusals
    assert "is computed after" in refusal.reason
    agree(given, outcome.program)


# --- models


@pytest.mark.slow
def test_energies_and_forces_of_the_shipped_potential_within_the_receipt() -> None:
    optimized = fxpass.optimize(WEIGHTS, "default,fuse-convolution", target="eager")
    assert optimized.report.receipt is not None and optimized.report.receipt.passed
    found = counts(optimized.program)
    assert found[convolution] == found[convolution_gradient] == 2 and not found[ops.table]


@pytest.mark.mace
@pytest.mark.parametrize("name", ["nonlinear", "late-cutoff"])
def test_mace(name: str) -> None:
    import mace_models

    options = {"hidden": "2x0e+2x1o", "l_max": 1, "correlation": 1, **mace_models.VARIANTS[name]}
    given = forces(fxpass.capture(mace_models.build(**options)))
    (outcome,) = PassContract(FuseConvolution(), [lambda: given]).check()
    left = counts(outcome.program)
    assert left[convolution] == left[convolution_gradient] == 2
    assert all(refusal.reason == "its weights are shared by all rows" for refusal in outcome.refusals)
