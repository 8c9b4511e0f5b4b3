"""The pass compact-irreps: what it stores densely, what it leaves with a reason, and that values stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.testing import FileCheck

import fxpass
from fxpass.algebra.irreps import columns_as_mul_ir, ir_mul, join, same, slice_irreps
from fxpass.algebra.multilinear import Linear, LinearPath, TensorProduct
from fxpass.algebra.multilinear import Path as TensorProductPath
from fxpass.algebra.polynomial import Polynomial
from fxpass.api import run_passes
from fxpass.errors import PassError
from fxpass.ir import ops, reference
from fxpass.ir.convolution import convolution
from fxpass.ir.cost import program_cost
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.verifier import verify
from fxpass.kernels import choice as kernels
from fxpass.kernels.build import build, find_compiler
from fxpass.kernels.triton_choice import choose
from fxpass.models import small_potential
from fxpass.passes import Outcome
from fxpass.targets.native import Native, NativeTarget
from fxpass.testing import PassContract, build_program, example_inputs, graph_text, run_program
from fxpass_passes.compact_irreps import CompactIrreps
from fxpass_passes.compact_irreps_regions import refined
from fxpass_passes.dead_code import DeadCode
from fxpass_passes.differentiate import Differentiate
from fxpass_passes.fuse_convolution import FuseConvolution
from fxpass_passes.legalize import Legalize

pytestmark = pytest.mark.once

aten = torch.ops.aten
F64 = torch.float64
SIZES = (
    {"atoms": 7, "edges": 19, "graphs": 2},
    {"atoms": 1, "edges": 0, "graphs": 1},
    {"atoms": 1, "edges": 3, "graphs": 1},
)
X, Y, OUT = "4x0e+4x1o", "1x0e+1x1o", "4x0e+4x1o+4x1e"
PRODUCT = TensorProduct(
    X,
    Y,
    OUT,
    (
        TensorProductPath(0, 0, 0, "uvu", 0, 1.0),
        TensorProductPath(0, 1, 1, "uvu", 4, 0.7),
        TensorProductPath(1, 0, 1, "uvu", 8, 0.6),
        TensorProductPath(1, 1, 0, "uvu", 12, 0.4),
        TensorProductPath(1, 1, 2, "uvu", 16, 0.3),
    ),
    20,
    False,
)
INPUTS = (
    TensorSpec("edge_vectors", ("edges", 3), F64, "1x1o", "Angstrom", frozenset({"edge_vector"})),
    TensorSpec("edge_index", (2, "edges"), torch.int64, properties=frozenset({"index:atoms"})),
    TensorSpec("x", ("atoms", 16), F64, X),
    TensorSpec("batch", ("atoms",), torch.int64, properties=frozenset({"index:graphs"})),
    TensorSpec("head", ("graphs",), torch.int64),
)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)


def block(mul: int, terms: str, paths: list[tuple[int, int]]) -> str:
    """A linear map between ``terms`` with ``mul`` channels each."""
    found = tuple(LinearPath(i, o, n * mul * mul, 0.5) for n, (i, o) in enumerate(paths))
    return str(Linear(terms, terms, found, len(paths) * mul * mul, True))


def mixed(graph: fx.Graph, x: fx.Node, name: str = "w") -> fx.Node:
    return call(graph, ops.linear, x, graph.get_attr(name), None, block(4, X, [(0, 0), (1, 1)]), "out")


def contracted(graph: fx.Graph, h: fx.Node) -> fx.Node:
    """[atoms, 4 channels, 4 components], as MACE arranges features, then a polynomial; [atoms, 4 channels] of it."""
    rows = call(graph, aten.sym_size.int, h, 0)
    scalars = call(graph, aten.view.default, call(graph, aten.slice.Tensor, h, 1, 0, 4), [rows, 4, 1])
    vectors = call(graph, aten.view.default, call(graph, aten.slice.Tensor, h, 1, 4, 16), [rows, 4, 3])
    packed = call(graph, aten.cat.default, [scalars, vectors], -1)
    spec = str(Polynomial(4, ((0,), (0, 0), (1, 1), (2, 2), (3, 3)), "1x0e+1x1o", "1x0e"))
    value = call(graph, ops.polynomial, packed, [], None, None, graph.get_attr("c"), spec, "out")
    return call(graph, aten.view.default, value, [rows, 4])


def scalars_of(graph: fx.Graph, h: fx.Node) -> fx.Node:
    return call(graph, aten.slice.Tensor, h, 1, 0, 4)


def features(graph: fx.Graph, h: fx.Node) -> fx.Node:
    return h


def norms(graph: fx.Graph, h: fx.Node) -> fx.Node:
    """[atoms, 4] of vectors, by ops that know nothing of irreps."""
    rows = call(graph, aten.sym_size.int, h, 0)
    vectors = call(graph, aten.view.default, call(graph, aten.slice.Tensor, h, 1, 4, 16), [rows, 4, 3])
    return call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, vectors, vectors), [2])


def message_passing(
    readout: Callable[[fx.Graph, fx.Node], fx.Node], product: TensorProduct = PRODUCT, reads: str | None = None
) -> Program:
    """One layer: energies of ``readout`` of a linear map of sums over edges, and what it reads."""

    def body(graph: fx.Graph, vectors: fx.Node, index: fx.Node, x: fx.Node, batch: fx.Node, head: fx.Node) -> Any:
        sender, receiver = (call(graph, aten.select.int, index, 0, k) for k in (0, 1))
        atoms, graphs = call(graph, aten.sym_size.int, x, 0), call(graph, aten.sym_size.int, head, 0)
        length = call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, vectors, vectors), [1], True)
        y = call(graph, aten.cat.default, [length, vectors], 1)
        weights = call(graph, aten.mm.default, length, graph.get_attr("radial"))
        gathered = call(graph, ops.gather, mixed(graph, x), sender)
        messages = call(graph, ops.tensor_product, gathered, y, weights, None, str(product), "out")
        total = call(graph, ops.scatter_sum, messages, receiver, atoms)
        scaled = call(graph, aten.div.Tensor, total, 3.0)
        paths = (LinearPath(0, 0, 0, 0.5), LinearPath(1, 1, 16, 0.5))
        spec = str(Linear(reads or product.irreps_out, X, paths, 48, True))
        h = call(graph, ops.linear, scaled, graph.get_attr("v"), None, spec, "out")
        by_atom = call(graph, aten.sum.dim_IntList, readout(graph, h), [1])
        return {"energy": call(graph, ops.scatter_sum, by_atom, batch, graphs), "node_energy": by_atom}

    weights = {"w": numbers(32), "v": numbers(48), "radial": numbers(1, 20), "c": numbers(5, 1, 1)}
    return build_program(body, INPUTS, weights)


def applied(program: Program) -> Outcome:
    """The pass on a copy, and what is left once dead code is gone."""
    verify(program)
    outcome = CompactIrreps().apply(program.copy())
    verify(outcome.program)
    return outcome


def forces(program: Program) -> Program:
    verify(program)
    done = Differentiate().apply(program.copy()).program
    verify(done)
    return done


def agree(a: Program, b: Program) -> None:
    for sizes in SIZES:
        inputs = example_inputs(a, sizes)
        one, other = run_program(a, inputs), run_program(b, inputs)
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-12)


# --- the layout as text


def test_the_layout_is_part_of_the_irreps() -> None:
    assert ir_mul("2x0e+2x1o") == "ir_mul:2x0e+2x1o"
    assert ir_mul("4x0e+1x1o") == "4x0e+1x1o"  # both layouts are one
    assert same("ir_mul:2x0e", "2x0e") and same("ir_mul:2x0e+1x1o", "1x0e+1x0e+1x1o")
    assert not same("ir_mul:2x1o", "2x1o") and not same("ir_mul:2x1o", "ir_mul:1x1o+1x1o")
    assert slice_irreps("ir_mul:2x0e+2x1o", 2, 8) == "ir_mul:2x1o"
    assert slice_irreps("ir_mul:2x0e+2x1o", 2, 5) is None  # three columns of six are no vector there
    assert slice_irreps("2x0e+2x1o", 2, 5) == "1x1o"
    assert join("ir_mul:2x1o", "4x0e") == "ir_mul:2x1o+4x0e"
    assert join("ir_mul:2x1o", "2x1o") is None
    assert columns_as_mul_ir("ir_mul:1x0e+2x1o") == [0, 1, 4, 2, 5, 3, 6]


def test_mixed_layouts_are_refused_by_the_verifier() -> None:
    outcome = applied(message_passing(contracted))
    (node,) = (n for n in outcome.program.graph.nodes if n.target is aten.div.Tensor)
    users = [u for u in node.users if u.target is ops.linear]
    users[0].update_arg(3, str(users[0].args[3]).replace("ir_mul:", ""))
    with pytest.raises(PassError, match="operand x is ir_mul:"):
        verify(outcome.program)


@pytest.mark.parametrize("wrt", ["out", "x1", "x2", "weight"])
@pytest.mark.parametrize("slots", [("irreps1",), ("irreps_out",), ("irreps1", "irreps_out")])
def test_products_in_every_layout(wrt: str, slots: tuple[str, ...]) -> None:
    other = replace(PRODUCT, **{slot: ir_mul(getattr(PRODUCT, slot)) for slot in slots})
    given = {"x1": numbers(5, 16), "x2": numbers(5, 4), "weight": numbers(5, 20), "out": numbers(5, 28)}
    layouts = {"x1": other.irreps1, "out": other.irreps_out}

    def laid(name: str, x: Tensor) -> Tensor:
        return x[:, columns_as_mul_ir(layouts[name])] if name in layouts else x

    plain = [None if name == wrt else x for name, x in given.items()]
    compact = [None if name == wrt else laid(name, x) for name, x in given.items()]
    expected = laid(wrt, reference.tensor_product(*plain, str(PRODUCT), wrt))
    torch.testing.assert_close(reference.tensor_product(*compact, str(other), wrt), expected, rtol=1e-13, atol=1e-13)


# --- what the pass does


def layouts(program: Program) -> list[tuple[str, ...]]:
    """Irreps of the tensor products and linear maps, in the order of the graph."""
    maps = [n for n in program.graph.nodes if n.target in (ops.linear, ops.tensor_product)]
    return [tuple(str(n.args[-2]).split("|")[: 3 if n.target is ops.tensor_product else 2]) for n in maps]


def test_before_and_after() -> None:
    program = message_passing(contracted)
    assert layouts(program) == [(X, X), (X, Y, OUT), (OUT, X)]
    FileCheck().check("aten.view").check("aten.view").check("aten.cat").check("fxpass.polynomial").run(
        graph_text(program)
    )
    outcome = applied(program)
    compact = ir_mul(X)
    assert layouts(outcome.program) == [(X, compact), (compact, Y, compact), (compact, compact)]  # no 4x1e
    (
        FileCheck()
        .check("fxpass.scatter_sum")
        .check("fxpass.linear")
        .check("aten.view.default").check_same("[-1, 4, 4]")
        .check_not("aten.cat")
        .check("aten.permute.default").check_same("[0, 2, 1]")
        .check("fxpass.polynomial")
        .run(graph_text(outcome.program))
    )  # fmt: skip
    assert [a.rule for a in outcome.applications] == ["dense", *["channels-last"] * 3]
    agree(program, outcome.program)


@pytest.mark.parametrize("stage", ["energy", "forces"])
def test_contract(stage: str) -> None:
    def made(readout: Callable[[fx.Graph, fx.Node], fx.Node]) -> Callable[[], Program]:
        return lambda: message_passing(readout) if stage == "energy" else forces(message_passing(readout))

    kinds = [contracted, scalars_of, features, norms]
    PassContract(CompactIrreps(), [made(kind) for kind in kinds], SIZES).check()


def test_before_differentiation_the_backward_graph_is_compact_too() -> None:
    program = message_passing(contracted)
    late, early = forces(program), forces(applied(program).program)
    agree(late, early)
    moved = [program_cost(DeadCode().apply(Legalize().apply(p).program).program).at(**SIZES[0]) for p in (late, early)]
    assert moved[1].bytes < 0.9 * moved[0].bytes
    fused = FuseConvolution().apply(early.copy()).program
    (node,) = fused.graph.find_nodes(op="call_function", target=convolution)
    assert "ir_mul:4x0e+4x1o|1x0e+1x1o|ir_mul:4x0e+4x1o" in str(node.args[9])
    agree(late, fused)


def test_what_reads_components_is_given_the_layout_of_e3nn() -> None:
    program = message_passing(norms)
    outcome = applied(program)
    refused = [r.nodes for r in outcome.refusals if "bytes and move" in r.reason]
    assert [nodes[0].partition("_default")[0] for nodes in refused] == ["x", "linear"]  # the input, and the last map
    assert refused[1][1].startswith("view")  # the border
    compact = ir_mul(X)
    vectors = ir_mul("4x1o")  # no one reads the scalars
    assert layouts(outcome.program) == [(X, compact), (compact, Y, vectors), (vectors, "4x1o")]
    agree(program, outcome.program)


def test_a_border_is_paid_where_more_is_saved() -> None:
    """Sums over edges are returned as well: one conversion of atoms, where edges were transposed."""

    def both(program: Program) -> Program:
        graph = program.graph
        total = next(n for n in graph.nodes if n.target is ops.scatter_sum)
        output = graph.output_node()
        output.args = ((*output.args[0], total),)
        spec = TensorSpec("total", ("atoms", 28), F64, OUT)
        return replace(program, outputs=(*program.outputs, spec))

    program = both(message_passing(contracted))
    outcome = applied(program)
    assert layouts(outcome.program)[1] == (ir_mul(X), Y, ir_mul(OUT))
    last = outcome.program.graph.output_node().args[0][-1]
    assert last.target is aten.cat.default and "channels-last" in {a.rule for a in outcome.applications}
    stay = [r for r in outcome.refusals if r.rule == "dense"]
    assert len(stay) == 0  # an output is live
    agree(program, outcome.program)


def test_terms_that_nothing_reads_or_makes_go() -> None:
    program = message_passing(scalars_of)  # the vectors of the last map are dead
    outcome = applied(program)
    dense = [a for a in outcome.applications if a.rule == "dense"]
    assert len(dense) == 2
    assert layouts(outcome.program)[1:] == [(ir_mul(X), Y, "4x0e"), ("4x0e", "4x0e")]
    before, after = (program_cost(p).at(**SIZES[0]).bytes for p in (program, outcome.program))
    assert after < 0.8 * before
    agree(program, outcome.program)


def test_terms_of_one_value_that_are_split_in_two_ways_stay() -> None:
    split = TensorProduct("4x0e+2x1o+2x1o", Y, OUT, (TensorProductPath(0, 1, 1, "uvu", 0, 1.0),), 20, False)
    outcome = applied(message_passing(contracted, split))
    reasons = [r.reason for r in outcome.refusals]
    assert any("in other terms" in reason for reason in reasons)


def test_a_map_of_joined_terms_reads_their_parts() -> None:
    """SevenNet joins equal irreps in front of a linear map: its rows of weights go to the parts."""
    twice = replace(PRODUCT, irreps_out="4x0e+4x1o+4x1o")
    program = message_passing(contracted, twice, "4x0e+8x1o")
    outcome = applied(program)
    assert layouts(outcome.program)[2] == ("ir_mul:4x0e+4x1o+4x1o", ir_mul(X))
    agree(program, outcome.program)
    joined = Linear("4x0e+8x1o", X, (LinearPath(1, 1, 16, 0.5),), 48, True)
    parts = refined(joined, "4x0e+3x1o+5x1o")
    assert parts is not None and [(p.i, p.weight) for p in parts.paths] == [(1, 16), (2, 28)]
    x, w, g = numbers(3, 28), numbers(48), numbers(3, 16)
    for args in ((x, w, None, "out"), (None, w, g, "x"), (x, None, g, "weight")):
        one, other = (reference.linear(*args[:3], str(spec), args[3]) for spec in (joined, parts))
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    assert refined(Linear("4x0e+2x1o+2x1o", X, joined.paths, 48, True), X) is None  # larger terms are no parts


def test_dead_parts_of_what_is_joined_go() -> None:
    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        h = mixed(graph, x)
        both = call(graph, aten.cat.default, [h, x], 1)
        spec = str(Linear(f"{X}+{X}", "4x0e", (LinearPath(0, 0, 0, 0.5), LinearPath(2, 0, 16, 0.5)), 32, True))
        return {"y": call(graph, ops.linear, both, graph.get_attr("w"), None, spec, "out")}

    program = build_program(body, [TensorSpec("x", ("atoms", 16), F64, X)], {"w": numbers(32)})
    outcome = applied(program)
    assert layouts(outcome.program) == [(X, "4x0e"), (f"4x0e+{X}", "4x0e")]  # the input keeps its dead columns
    agree(program, outcome.program)


def test_nothing_to_do_without_vectors() -> None:
    spec = str(Linear("4x0e", "4x0e", (LinearPath(0, 0, 0, 1.0),), 16, True))

    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        return {"y": call(graph, ops.linear, x, graph.get_attr("w"), None, spec, "out")}

    program = build_program(body, [TensorSpec("x", ("atoms", 4), F64, "4x0e")], {"w": numbers(16)})
    outcome = applied(program)
    assert not outcome.modified and not outcome.refusals


# --- models


ENERGY = "fold-constants,specialize-species,specialize-heads,dead-irreps,common-subexpressions,dead-code"
FORCES = "differentiate,fold-constants,common-subexpressions,dead-code"


def kept(model: Any, *targets: str) -> Outcome:
    """Forces with and without the pass agree in float64 on the structures that the family verifies on."""
    program = run_passes(fxpass.capture(model), ENERGY).program
    outcome = CompactIrreps().apply(program.copy())
    plain, compact = (run_passes(p, FORCES).program for p in (program, outcome.program))
    assert program.samples
    for sample in program.samples:
        inputs = [sample[spec.name] for spec in plain.inputs]
        one, other = run_program(plain, inputs), run_program(compact, inputs)
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-11, atol=1e-11)
    return outcome


def test_the_shipped_potential() -> None:
    """Energies, forces, equivariance and the rest of the receipt, and the kernels that run it."""
    pipeline = f"{ENERGY},compact-irreps,{FORCES}"
    compact = fxpass.optimize(small_potential(torch.float64), pipeline)
    receipt = compact.report.receipt
    assert receipt is not None and receipt.passed
    records = [r for r in compact.report.records if r.name == "compact-irreps"]
    rules = [a.rule for record in records for a in record.applications]
    assert rules.count("dense") == 3 and rules.count("channels-last") >= 4


def test_triton_has_no_kernels_for_it_and_says_so() -> None:
    spec = block(4, ir_mul(X), [(0, 0), (1, 1)])
    assert choose(ops.linear, (numbers(3, 16), numbers(32), None, spec, "out"), {}) == "features lie with channels last"


@pytest.mark.slow
def test_kernels_of_maps_in_every_layout() -> None:
    """Channels that fill no vector, five components, both directions; products with species too."""
    ins, outs = "5x0e+7x2e", "3x0e+9x2e"
    paths = (LinearPath(0, 0, 0, 0.5), LinearPath(1, 1, 15, 0.7))
    calls = []
    for one, other in ((ins, ir_mul(outs)), (ir_mul(ins), outs), (ir_mul(ins), ir_mul(outs))):
        spec = str(Linear(one, other, paths, 78, True))
        calls.append((ops.linear, (numbers(8, 40), numbers(78), None, spec, "out"), {1: numbers(78)}))
        calls.append((ops.linear, (None, numbers(78), numbers(8, 48), spec, "x"), {1: numbers(78)}))
    product = (TensorProductPath(0, 0, 0, "uvw", 0, 0.5), TensorProductPath(1, 0, 1, "uvw", 45, 0.7))
    spec = str(TensorProduct(ir_mul(ins), "3x0e", ir_mul(outs), product, 234, True))
    species = torch.eye(3, dtype=F64)[torch.tensor([0, 2, 1, 1, 0, 2, 0, 1])]
    weights = numbers(234)
    calls.append((ops.tensor_product, (numbers(8, 40), species, weights, None, spec, "out"), {2: weights}))
    calls.append((ops.tensor_product, (None, species, weights, numbers(8, 48), spec, "x1"), {2: weights}))
    chosen = [kernels.choose(op, args, constants) for op, args, constants in calls]
    compiler = find_compiler()
    assert compiler is not None
    libraries = build({c.kernel.name: c.kernel.source for c in chosen}, compiler)
    for (op, args, _), choice in zip(calls, chosen, strict=True):
        found = choice.bind(libraries[choice.kernel.name])(*args)
        torch.testing.assert_close(found, op(*args), rtol=1e-13, atol=1e-13)


@pytest.mark.slow
def test_kernels_read_both_layouts() -> None:
    """The same kernels run, on fewer moves between them, and what they compute is what the references do."""
    program = message_passing(contracted)
    lowered = []
    for given in (program, applied(program).program):
        fit = run_passes(forces(given), NativeTarget().pipeline).program
        native = NativeTarget().lower(fit)
        assert isinstance(native, Native)
        kinds = sorted(row.op for row in native.manifest if row.kernel and row.node)
        lowered.append((fit, kinds))
        for sizes in SIZES:
            inputs = example_inputs(fit, sizes)
            for value, expected in zip(native(*inputs), run_program(fit, inputs).values(), strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    (plain, before), (compact, after) = lowered
    assert before == after
    moved = [program_cost(p).at(**SIZES[0]).bytes for p in (plain, compact)]
    assert moved[1] < moved[0]


@pytest.mark.mace
@pytest.mark.parametrize(
    "name",
    [
        "scale-shift",
        pytest.param("density", marks=pytest.mark.long),
        pytest.param("nonlinear", marks=pytest.mark.long),
        pytest.param("three-layers-l2", marks=pytest.mark.long),
        pytest.param("agnostic-product", marks=pytest.mark.long),
        pytest.param("so3", marks=pytest.mark.long),
        pytest.param("edge-irreps", marks=pytest.mark.long),
    ],
)
def test_mace(name: str) -> None:
    import mace_models

    outcome = kept(mace_models.build(**{"dtype": F64, **mace_models.VARIANTS[name]}))
    assert {a.rule for a in outcome.applications} >= {"channels-last"}
