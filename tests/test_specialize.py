"""The passes specialize-species and specialize-heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.testing import FileCheck

from fxpass.algebra.multilinear import Linear, LinearPath, TensorProduct
from fxpass.algebra.multilinear import Path as TensorProductPath
from fxpass.errors import PassError
from fxpass.ir import ops
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.verifier import verify
from fxpass.passes import Outcome, Pass
from fxpass.testing import PassContract, build_program, example_inputs, graph_text, run_program
from fxpass_passes.differentiate import Differentiate
from fxpass_passes.fold_constants import FoldConstants
from fxpass_passes.specialize_heads import SpecializeHeads
from fxpass_passes.specialize_species import SpecializeSpecies

aten = torch.ops.aten
F64 = torch.float64
SIZES = ({"atoms": 9, "edges": 23, "graphs": 3}, {"atoms": 1, "edges": 0, "graphs": 1})
ATTRS = TensorSpec("node_attrs", ("atoms", 3), F64, "3x0e", properties=frozenset({"one_hot"}))
X = TensorSpec("x", ("atoms", 8), F64, "2x0e+2x1o")
SENDER = TensorSpec("sender", ("edges",), torch.int64, properties=frozenset({"index:atoms"}))
EMBED = str(Linear("3x0e", "4x0e", (LinearPath(0, 0, 0, 0.5),), 12, True))
ANY_SPECIES = SpecializeSpecies(min_species=1)
MIX = str(Linear("4x0e", "2x0e+1x0e", (LinearPath(0, 1, 0, 0.25), LinearPath(0, 0, 4, -2.0)), 12, True))
PATHS = tuple(TensorProductPath(i, 0, i, "uvw", 12 * i, 0.3 + i) for i in (0, 1))
SKIP = TensorProduct("2x0e+2x1o", "3x0e", "2x0e+2x1o", PATHS, 24, True)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)


# --- specialize-species


def lookups() -> Program:
    """A matrix product, an embedding and a map of it, and a tensor product with other features."""

    def body(graph: fx.Graph, x: fx.Node, attrs: fx.Node) -> dict[str, fx.Node]:
        w, v, u, t = (graph.get_attr(name) for name in "wvut")
        embedded = call(graph, ops.linear, attrs, v, None, EMBED, "out")
        return {
            "row": call(graph, aten.mm.default, attrs, w),
            "table": call(graph, ops.linear, embedded, u, None, MIX, "out"),
            "mixed": call(graph, ops.tensor_product, x, attrs, t, None, str(SKIP), "out"),
        }

    weights = {"w": numbers(3, 5), "v": numbers(12), "u": numbers(12, seed=1), "t": numbers(24)}
    return build_program(body, [X, ATTRS], weights)


def on_edges() -> Program:
    """Attributes that were concatenated, sliced out again, gathered to edges and embedded there."""

    def body(graph: fx.Graph, x: fx.Node, attrs: fx.Node, sender: fx.Node) -> dict[str, fx.Node]:
        cat = call(graph, aten.cat.default, [x, attrs], -1)
        features = call(graph, aten.slice.Tensor, cat, 1, 0, 8)
        again = call(graph, aten.slice.Tensor, cat, 1, 8, 2**63 - 1)
        gathered = call(graph, ops.gather, again, sender)
        embedded = call(graph, ops.linear, gathered, graph.get_attr("v"), None, EMBED, "out")
        return {"embedded": embedded, "twice": call(graph, aten.mul.Tensor, features, 2.0)}

    return build_program(body, [X, ATTRS, SENDER], {"v": numbers(12)})


def without_one_hot() -> Program:
    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        return {"y": call(graph, aten.mm.default, x, graph.get_attr("w"))}

    return build_program(body, [X], {"w": numbers(8, 5)})


def one_use(target: Any, *args: Any, weights: Mapping[str, Tensor] | None = None) -> Program:
    """``target`` with ``args``, where "x", "attrs" and names of weights stand for nodes."""

    def body(graph: fx.Graph, x: fx.Node, attrs: fx.Node) -> dict[str, fx.Node]:
        nodes = {"x": x, "attrs": attrs} | {name: graph.get_attr(name) for name in weights or {}}
        return {"y": call(graph, target, *fx.node.map_aggregate(args, lambda a: nodes.get(a, a)))}

    return build_program(body, [X, ATTRS], weights)


def test_species_contract() -> None:
    PassContract(ANY_SPECIES, [lookups, on_edges, without_one_hot], SIZES).check()


def test_species_become_lookups() -> None:
    outcome = ANY_SPECIES.apply(lookups())
    verify(outcome.program)
    check = FileCheck().check("node_attrs: f64[atoms, 3]").check_next("%argmax = aten.argmax.default(%node_attrs, 1)")
    check.check("%gather = fxpass.gather.default(%w, %argmax)")
    check.check("%u_by_species = weight f64[3, 3]").check_next("= fxpass.gather.default(%u_by_species, %argmax)")
    check.check("%t_by_species = weight f64[3, 8]").check_next("= fxpass.gather.default(%t_by_species, %argmax)")
    check.check_next("%linear = fxpass.linear.default(%x, %gather_2, None, '2x0e+2x1o|2x0e+2x1o|8|rows|")
    check.check_not("node_attrs").run(graph_text(outcome.program))
    assert sorted(a.rule for a in outcome.applications) == ["species-row", *["species-table"] * 2, "species-weights"]
    assert outcome.refusals == ()
    assert outcome.program.assumptions == ("one-hot node_attrs",)


def test_row_weights_are_the_models_own_numbers() -> None:
    """The coupling goes into the spec, so a table is exact in whatever dtype the program is cast to."""
    table = ANY_SPECIES.apply(lookups()).program.graph_module.get_buffer("t_by_species")
    by_path = numbers(24).view(2, 2, 3, 2)  # path, u, species, w
    assert torch.equal(table, by_path.permute(2, 0, 1, 3).reshape(3, 8))


def test_attributes_are_found_behind_cat_slice_and_gather() -> None:
    outcome = ANY_SPECIES.apply(on_edges())
    assert sorted({a.rule for a in outcome.applications}) == ["product-of-gather", "slice-of-cat", "species-table"]
    check = FileCheck().check("aten.argmax.default(%node_attrs, 1)")
    check.check("fxpass.gather.default(%v_by_species, %argmax)")
    check.check_next("fxpass.gather.default(%gather, %sender)").check("aten.mul.Tensor(%x, 2.0)").check_not("cat")
    check.run(graph_text(outcome.program))


def test_argmax_that_is_there_is_used() -> None:
    def body(graph: fx.Graph, attrs: fx.Node) -> dict[str, fx.Node]:
        row = call(graph, aten.mm.default, attrs, graph.get_attr("w"))
        species = call(graph, aten.argmax.default, attrs, -1)
        return {"row": row, "number": call(graph, ops.gather, graph.get_attr("z"), species)}

    program = build_program(body, [ATTRS], {"w": numbers(3, 5), "z": torch.tensor([28, 29, 46])})
    text = graph_text(ANY_SPECIES.apply(program).program)
    FileCheck().check_count("argmax.default", 1, exactly=True).check("gather.default(%w, %argmax)").run(text)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (lambda: one_use(aten.sin.default, "attrs"), "aten.sin.default is not a product of the attributes"),
        (lambda: one_use(aten.cat.default, ["x", "attrs"], 1), "concatenated with features and not sliced out again"),
        (lambda: one_use(ops.linear, "attrs", "x", None, ROWS, "out"), "not constants shared by all rows"),
        (lambda: skip(mode="uvu"), "its paths are uvu, not uvw"),
        (lambda: skip(irreps="3x0o"), "the one-hot attributes are 3x0o, not even scalars"),
        (lambda: product("attrs", "x", None, FLIPPED, "out"), "default is not a product of the attributes with"),
        (lambda: product("x", "attrs", "x", str(SKIP), "weight"), "with respect to its weight is no linear map"),
    ],
)
def test_species_refusals(program: Callable[[], Program], reason: str) -> None:
    outcome = ANY_SPECIES.apply(program())
    assert not outcome.modified
    assert outcome.program.assumptions == ()
    (refusal,) = outcome.refusals
    assert reason in refusal.reason
    assert refusal.nodes


ROWS = str(Linear("3x0e", "2x0e", (LinearPath(0, 0, 0, 1.0),), 8, False))
FLIPPED = str(TensorProduct("3x0e", "2x0e+2x1o", "6x0e", (TensorProductPath(0, 0, 0, "uvuv", -1, 1.0),), 0, True))


def product(x1: str, x2: str, out: str | None, spec: str, wrt: str) -> Program:
    return one_use(ops.tensor_product, x1, x2, None, out, spec, wrt)


def skip(mode: str = "uvw", irreps: str = "3x0e") -> Program:
    tp = TensorProduct("2x0e+2x1o", irreps, "2x0e+2x1o", (TensorProductPath(0, 0, 0, mode, 0, 1.0),), 12, True)
    return one_use(ops.tensor_product, "x", "attrs", "t", None, str(tp), "out", weights={"t": numbers(12)})


def test_too_many_row_weights_are_refused_with_their_number() -> None:
    assert SpecializeSpecies(max_row_weights=4, min_species=3).apply(skip()).modified
    outcome = SpecializeSpecies(max_row_weights=3, min_species=3).apply(skip())
    assert not outcome.modified
    assert outcome.refusals[0].reason == "a look-up of 4 weights for each row, more than max_row_weights=3"


def test_few_species_are_refused_with_their_number() -> None:
    outcome = SpecializeSpecies(min_species=4).apply(skip())
    assert not outcome.modified
    assert outcome.refusals[0].reason.startswith("3 species are fewer than min_species=4: a product costs less than")


def test_species_after_differentiation() -> None:
    """The transposed tensor product, with respect to its first operand, looks up the same weights."""

    def body(graph: fx.Graph, vectors: fx.Node, attrs: fx.Node) -> dict[str, fx.Node]:
        mixed = call(graph, ops.tensor_product, vectors, attrs, graph.get_attr("t"), None, str(VECTORS), "out")
        return {"energy": call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, mixed, mixed), [1])}

    vectors = TensorSpec("vectors", ("atoms", 3), F64, "1x1o", properties=frozenset({"edge_vector"}))
    energy = build_program(body, [vectors, ATTRS], {"t": numbers(6)})
    forces = Differentiate().apply(energy).program
    (outcome,) = PassContract(ANY_SPECIES, [lambda: forces], SIZES).check()
    assert [a.rule for a in outcome.applications] == ["species-weights", "species-weights"]


VECTORS = TensorProduct("1x1o", "3x0e", "2x1o", (TensorProductPath(0, 0, 0, "uvw", 0, 0.7),), 6, True)


# --- specialize-heads


def headed(heads: int = 3, below: bool = True) -> Program:
    """A readout with one column for each head, and a scale and a shift for each head."""

    def body(graph: fx.Graph, x: fx.Node, batch: fx.Node, head: fx.Node) -> dict[str, fx.Node]:
        columns = call(graph, ops.linear, x, graph.get_attr("w"), None, readout, "out")
        of_atom = call(graph, ops.gather, head, batch)
        atoms = call(graph, aten.arange.default, call(graph, aten.sym_size.int, x, 0))
        energy = call(graph, aten.index.Tensor, columns, [atoms, of_atom])
        scaled = call(graph, aten.mul.Tensor, energy, call(graph, ops.gather, graph.get_attr("scale"), of_atom))
        return {"energy": scaled, "shift": call(graph, ops.gather, graph.get_attr("shift"), head)}

    paths = (LinearPath(0, 0, 0, 0.5),)
    readout = str(Linear("2x0e+2x1o", f"{heads}x0e", paths, 2 * heads, True))
    batch = TensorSpec("batch", ("atoms",), torch.int64, properties=frozenset({"index:graphs"}))
    facts = {"head"} | ({f"below:{heads}"} if below else set())
    head = TensorSpec("head", ("graphs",), torch.int64, properties=frozenset(facts))
    weights = {"w": numbers(2 * heads), "scale": numbers(heads, seed=1), "shift": numbers(heads, 2, seed=2)}
    return build_program(body, [X, batch, head], weights)


def assert_same_for_head(before: Program, after: Program, head: int, atol: float = 1e-12) -> None:
    for sizes in SIZES:
        given = {spec.name: t for spec, t in zip(before.inputs, example_inputs(before, sizes), strict=True)}
        given["head"].fill_(head)
        expected, actual = (run_program(p, tuple(given.values())) for p in (before, after))
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=f"{name} at {sizes}")


@pytest.mark.parametrize(("heads", "head"), [(1, None), (1, 0), (3, 0)])
def test_heads_contract(heads: int, head: int | None) -> None:
    """Where nothing says how many heads there are, the contract asks for head 0 only, which the pass assumes."""
    PassContract(SpecializeHeads(head), [lambda: headed(heads, below=heads == 1), without_one_hot], SIZES).check()


def test_one_head_becomes_a_constant() -> None:
    outcome = SpecializeHeads().apply(headed(heads=1))
    verify(outcome.program)
    check = FileCheck().check("%linear = ").check("%select = aten.select.int(%linear, 1, 0)")
    check.check_next("%scale = weight f64[1]").check_next("%sym_size = aten.sym_size.int(%batch, 0)")
    check.check_next("%expand = aten.expand.default(%scale, [%sym_size])")
    check.check("aten.sym_size.int(%head, 0)").check("aten.clone.default(%expand_1)")  # a result of its own
    check.check_not("gather").run(graph_text(outcome.program))
    assert outcome.program.assumptions == ()
    assert outcome.refusals == ()


@pytest.mark.parametrize("head", [0, 1, 2])
def test_other_heads_are_not_computed(head: int) -> None:
    outcome = SpecializeHeads(head).apply(headed())
    verify(outcome.program)
    check = FileCheck().check("%w_1 = weight f64[2]").check("'2x0e+2x1o|1x0e|2|shared|0,0,0,0.5'")
    check.check("aten.select.int(%linear, 1, 0)").check_not("gather").run(graph_text(outcome.program))
    assert outcome.program.assumptions == (f"head == {head}",)
    assert outcome.refusals == ()
    assert_same_for_head(headed(), outcome.program, head)


@pytest.mark.parametrize(("below", "many"), [(True, "3"), (False, "an unknown number of")])
def test_several_heads_need_a_choice(below: bool, many: str) -> None:
    outcome = SpecializeHeads().apply(headed(below=below))
    assert not outcome.modified
    (refusal,) = outcome.refusals
    assert refusal.reason == f"the model has {many} heads; name one: specialize-heads{{head=0}}"
    assert refusal.nodes == ("head",)


@pytest.mark.parametrize("head", [-1, 3])
def test_a_head_that_does_not_exist(head: int) -> None:
    with pytest.raises(PassError, match=f"there is no head {head}: the model has 3 .*specialize-heads.*from 0 to 2"):
        SpecializeHeads(head).apply(headed())


def test_other_uses_of_the_head_are_reported() -> None:
    def body(graph: fx.Graph, x: fx.Node, head: fx.Node) -> dict[str, fx.Node]:
        first = call(graph, aten.index.Tensor, x, [call(graph, aten.arange.default, 1), head])  # of the first row only
        return {"first": first, "next": call(graph, aten.add.Tensor, head, 1)}

    head = TensorSpec("head", ("graphs",), torch.int64, properties=frozenset({"head", "below:1"}))
    outcome = SpecializeHeads().apply(build_program(body, [X, head]))
    assert not outcome.modified
    reasons = [r.reason for r in outcome.refusals]
    assert "it does not pick one column of each row of x" in reasons
    assert "aten.add.Tensor with the head chooses no column, row or block of channels" in reasons


# --- on MACE

RESIDUAL, NONLINEAR = "RealAgnosticResidualInteractionBlock", "RealAgnosticResidualNonLinearInteractionBlock"


@cache
def mace(block: str = RESIDUAL, heads: int = 1, readout: str = "NonLinearReadoutBlock") -> Program:
    """The folded energy program of a float64 ScaleShiftMACE with 4 channels, 3 species and pair repulsion."""
    from mace import modules  # before e3nn: e3nn 0.4.4 alone does not import on this torch

    # isort: split
    from e3nn import o3

    from fxpass.frontends.mace import MaceFrontend

    torch.set_default_dtype(F64)
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "r_max": 4.0,
        "num_bessel": 4,
        "num_polynomial_cutoff": 5,
        "max_ell": 1,
        "interaction_cls": modules.interaction_classes[block],
        "interaction_cls_first": modules.interaction_classes[block],
        "num_interactions": 2,
        "num_elements": 3,
        "hidden_irreps": o3.Irreps("4x0e+4x1o"),
        "MLP_irreps": o3.Irreps("4x0e"),
        "atomic_energies": np.random.default_rng(0).normal(size=(heads, 3)),
        "avg_num_neighbors": 8.0,
        "atomic_numbers": [28, 29, 46],
        "correlation": 2,
        "gate": torch.nn.functional.silu,
        "radial_MLP": [8, 8],
        "atomic_inter_scale": list(range(1, heads + 1)),
        "atomic_inter_shift": [0.1 * h for h in range(heads)],
        "heads": [f"head{h}" for h in range(heads)],
        "readout_cls": getattr(modules.blocks, readout),
        "pair_repulsion": True,
    }
    return run(FoldConstants(), MaceFrontend().capture(modules.ScaleShiftMACE(**options))).program


def run(pass_: Pass, program: Program) -> Outcome:
    verify(program)
    outcome = pass_.apply(program.copy())
    verify(outcome.program)
    return outcome


@pytest.mark.mace
@pytest.mark.parametrize("block", ["RealAgnosticDensityInteractionBlock", NONLINEAR])
def test_species_on_mace(block: str) -> None:
    program = mace(block)
    (outcome,) = PassContract(ANY_SPECIES, [lambda: program], SIZES).check()
    assert outcome.refusals == ()
    text = graph_text(outcome.program)
    FileCheck().check_count("(%node_attrs, 1)", 1, exactly=True).run(text)  # the argmax
    assert "(%node_attrs, %" not in text


@pytest.mark.mace
def test_forces_of_mace_with_lookups() -> None:
    program = mace(NONLINEAR)
    special = run(SpecializeHeads(), run(ANY_SPECIES, program).program).program
    before, after = (Differentiate().apply(p).program for p in (program, special))
    assert_same_for_head(before, after, 0)


@pytest.mark.mace
@pytest.mark.parametrize(("readout", "head"), [("NonLinearReadoutBlock", 1), ("NonLinearBiasReadoutBlock", 2)])
def test_heads_on_mace(readout: str, head: int) -> None:
    program = run(ANY_SPECIES, mace(heads=3, readout=readout)).program
    outcome = run(SpecializeHeads(head), program)
    assert outcome.refusals == ()
    check = FileCheck().check("|4x0e|16|").check_not("index_put").check_not("12x0e").check_not("3x0e|")
    check.check_not("aten.index.").run(graph_text(outcome.program))
    assert_same_for_head(program, outcome.program, head)


@pytest.mark.mace
def test_alloy_model(alloy_model_path: Path) -> None:
    from fxpass.frontends.mace import MaceFrontend

    frontend = MaceFrontend()
    captured = frontend.capture(frontend.load(str(alloy_model_path)).double())
    program = run(FoldConstants(), captured).program
    (species,) = PassContract(SpecializeSpecies(), [lambda: program], SIZES).check()
    (heads,) = PassContract(SpecializeHeads(), [lambda: program], SIZES).check()
    first = {"atomic_energies_fn", "node_embedding.linear", "interactions.0.skip_tp", "interactions.0.linear_up"}
    assert first <= {a.module for a in species.applications}
    assert [(r.rule, r.module) for r in species.refusals] == [("species-weights", "interactions.1.skip_tp")]
    assert [a.rule for a in heads.applications] == [*["head-column"] * 3, *["head-row"] * 2]
    assert heads.refusals == ()
