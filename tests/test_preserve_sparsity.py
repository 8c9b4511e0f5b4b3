"""The pass preserve-sparsity: the proof that the neighbour list stays a list, and the geometry that is kept."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.testing import FileCheck

import fxpass
from fxpass import lowering
from fxpass.edges import MASKED, SORTED, WITHIN
from fxpass.errors import PassError, PipelineError
from fxpass.frontends.bundled import BundledFrontend
from fxpass.ir import ops
from fxpass.ir.geometry import KEPT, split_geometry
from fxpass.ir.metadata import Provenance, provenance, set_provenance
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.sparsity import SPARSE, check
from fxpass.ir.verifier import verify
from fxpass.models import Settings, build, collate
from fxpass.passes import Exactness, Outcome, Pass
from fxpass.pipeline import format_pass, parse
from fxpass.registry import PASSES, Registry, default_registry
from fxpass.runner import run
from fxpass.structures import probe_structures
from fxpass.targets.eager import EagerTarget
from fxpass.targets.geometry import KeptGeometry, WithGeometry, lower_both
from fxpass.testing import PassContract, build_program, graph_text
from fxpass_passes.differentiate import Differentiate
from fxpass_passes.preserve_sparsity import PreserveSparsity

pytestmark = pytest.mark.once

aten = torch.ops.aten
F64 = torch.float64
SIZES = ({"atoms": 9, "edges": 23, "graphs": 3}, {"atoms": 1, "edges": 0, "graphs": 1})
VECTORS = TensorSpec("edge_vectors", ("edges", 3), F64, "1x1o", "Angstrom", frozenset({"edge_vector"}))
INDEX = TensorSpec("edge_index", (2, "edges"), torch.int64, properties=frozenset({"index:atoms"}))
X = TensorSpec("x", ("atoms", 4), F64)
SPECIES = TensorSpec("species", ("atoms",), torch.int64, properties=frozenset({"below:3"}))
STATIC = 12  # neighbours an atom, in what is refused

Body = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node, fx.Node], fx.Node]


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    return graph.call_function(target, args, kwargs)


def made(body: Body, more: Sequence[TensorSpec] = ()) -> Program:
    """A program of edge vectors, edge index, features and species that returns the sum of what ``body`` makes."""

    def whole(graph: fx.Graph, *inputs: fx.Node) -> dict[str, fx.Node]:
        return {"y": call(graph, aten.sum.default, body(graph, *inputs[:4]))}

    return build_program(whole, [VECTORS, INDEX, X, SPECIES, *more])


def atoms(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return call(graph, aten.sym_size.int, x, 0)


def ends(graph: fx.Graph, index: fx.Node) -> tuple[fx.Node, fx.Node]:
    return call(graph, aten.select.int, index, 0, 0), call(graph, aten.select.int, index, 0, 1)


def messages() -> Program:
    """What message passing is: gather, a product on edges, a sum over edges; an energy with a derivative."""

    def body(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> dict[str, fx.Node]:
        sender, receiver = ends(graph, index)
        squares = call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, v, v), [1], True)
        weights = call(graph, aten.exp.default, call(graph, aten.neg.default, squares))
        messages = call(graph, aten.mul.Tensor, call(graph, ops.gather, x, sender), weights)
        summed = call(graph, ops.scatter_sum, messages, receiver, atoms(graph, x))
        return {"energy": call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, summed, summed), [1])}

    return build_program(body, [VECTORS, INDEX, X, SPECIES])


def without_edges() -> Program:
    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        return {"y": call(graph, aten.mm.default, x, call(graph, aten.permute.default, graph.get_attr("w"), [1, 0]))}

    return build_program(body, [X], {"w": torch.eye(4, dtype=F64)})


# --- the pass


def test_contract() -> None:
    (outcome, _, untouched) = PassContract(
        PreserveSparsity(), [messages, lambda: Differentiate().apply(messages()).program, without_edges], SIZES
    ).check()
    assert [(a.rule, a.node) for a in outcome.applications] == [("stays-sparse", "edge_vectors")]
    assert [r.reason for r in untouched.refusals] == ["no input has a row for each edge"]
    assert untouched.program.assumptions == ()


def test_the_graph_stays_as_it_is() -> None:
    before, after = messages(), PreserveSparsity().apply(messages()).program
    check = FileCheck().check("edge_vectors: f64[edges, 3]").check("fxpass.gather.default(%x, ")
    check.check("fxpass.scatter_sum.default(").run(graph_text(after))
    assert graph_text(after) == graph_text(before)


@pytest.mark.parametrize(
    ("text", "assumptions"),
    [
        ("preserve-sparsity", {SPARSE, SORTED, WITHIN, KEPT}),
        ("preserve-sparsity{sort=false,cache=false}", {SPARSE, WITHIN}),
        ("preserve-sparsity{beyond_cutoff=mask}", {SPARSE, SORTED, MASKED, KEPT}),
        ("preserve-sparsity{sort=false,beyond_cutoff=keep,cache=false}", {SPARSE}),
    ],
)
def test_options_are_what_the_program_assumes(text: str, assumptions: set[str]) -> None:
    (chosen,) = parse(text, default_registry())
    assert format_pass(chosen) == text
    assert set(chosen.apply(messages()).program.assumptions) == assumptions


def test_an_option_that_does_not_exist() -> None:
    with pytest.raises(PipelineError, match="drop"):
        parse("preserve-sparsity{beyond_cutoff=pad}", default_registry())


def test_assumptions_outlast_differentiation_and_legalisation() -> None:
    program = fxpass.run_passes(messages(), "preserve-sparsity,differentiate,legalize").program
    assert {SPARSE, SORTED, WITHIN} <= set(program.assumptions)


# --- the proof refuses


def pairs_of_atoms(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    one, other = (call(graph, aten.unsqueeze.default, x, k) for k in (1, 0))
    return call(graph, aten.sub.Tensor, one, other)


def distances(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    return call(graph, aten._cdist_forward.default, x, x, 2.0, None)


def gram(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    return call(graph, aten.mm.default, x, call(graph, aten.permute.default, x, [1, 0]))


def one_hot(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    receiver = call(graph, aten.unsqueeze.default, ends(graph, index)[1], 1)
    return call(graph, aten.eq.Tensor, receiver, call(graph, aten.arange.default, atoms(graph, x)))


def adjacency(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    n, length = atoms(graph, x), call(graph, aten.linalg_vector_norm.default, v, 2, [1])
    dense = call(graph, aten.new_zeros.default, v, [n, n])
    return call(graph, aten.index_put.default, dense, list(ends(graph, index)), length)


def flat_adjacency(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    n, (sender, receiver) = atoms(graph, x), ends(graph, index)
    place = call(graph, aten.add.Tensor, call(graph, aten.mul.Tensor, receiver, n), sender)
    return call(graph, ops.scatter_sum, v, place, graph.call_function(operator.mul, (n, n)))


def pairs_of_edges(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    return call(graph, aten.mm.default, v, call(graph, aten.permute.default, v, [1, 0]))


def slots(graph: fx.Graph, index: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Receivers [edges], where the edges of each atom begin [atoms], and the number of each among its atom's."""
    receiver = ends(graph, index)[1]
    first = call(graph, aten.searchsorted.Tensor, receiver, call(graph, aten.arange.default, atoms(graph, x)))
    edges = call(graph, aten.arange.default, call(graph, aten.sym_size.int, index, 1))
    return receiver, first, call(graph, aten.sub.Tensor, edges, call(graph, ops.gather, first, receiver))


def padded_to_slots(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    receiver, _, slot = slots(graph, index, x)
    padded = call(graph, aten.new_zeros.default, v, [atoms(graph, x), STATIC, 3])
    return call(graph, aten.index_put.default, padded, [receiver, slot], v)


def padded_and_accumulated(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    receiver, _, slot = slots(graph, index, x)
    padded = call(graph, aten.new_full.default, v, [atoms(graph, x), STATIC, 3], 0.0)
    return call(graph, aten.index_put.default, padded, [receiver, slot], v, True)


def padded_flat(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    receiver, _, slot = slots(graph, index, x)
    place = call(graph, aten.add.Tensor, call(graph, aten.mul.Tensor, receiver, STATIC), slot)
    return call(graph, ops.scatter_sum, v, place, graph.call_function(operator.mul, (atoms(graph, x), STATIC)))


def gathered_to_slots(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    _, first, _ = slots(graph, index, x)
    places = call(graph, aten.unsqueeze.default, first, 1)
    places = call(graph, aten.add.Tensor, places, call(graph, aten.arange.default, STATIC))
    return call(graph, aten.index.Tensor, v, [places])


def regrouped(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    return call(graph, aten.as_strided.default, v, [STATIC, 3], [3, 1])


def one_size(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    missing = graph.call_function(operator.sub, (5000, call(graph, aten.sym_size.int, v, 0)))
    return call(graph, aten.cat.default, [v, call(graph, aten.new_zeros.default, v, [missing, 3])])


def first_rows(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    """Something that no rule knows: as many rows of edges as there are atoms."""
    return call(graph, aten.as_strided.default, v, [atoms(graph, x), 3], [3, 1])


@pytest.mark.parametrize(
    ("body", "what", "shape"),
    [
        (pairs_of_atoms, "4·atoms^2 elements", "[atoms, atoms, 4]"),
        (distances, "atoms^2 elements", "[atoms, atoms]"),
        (gram, "atoms^2 elements", "[atoms, atoms]"),
        (one_hot, "atoms·edges elements", "[edges, atoms]"),
        (adjacency, "atoms^2 elements", "[atoms, atoms]"),
        (flat_adjacency, "3·atoms^2 elements", "[atoms**2, 3]"),
        (pairs_of_edges, "edges^2 elements", "[edges, edges]"),
        (padded_to_slots, "edges are written to slots that sub_tensor numbers", "[atoms, 12, 3]"),
        (padded_and_accumulated, "edges are written to slots that sub_tensor numbers", "[atoms, 12, 3]"),
        (padded_flat, "edges are written to slots that add_tensor numbers", "[12*atoms, 3]"),
        (gathered_to_slots, "index.Tensor makes rows for atoms of rows for edges", "[atoms, 12, 3]"),
        (regrouped, "edges are regrouped, a fixed number to a row", "[12, 3]"),
        (one_size, "edges are padded to a fixed number", "[5000, 3]"),
        (first_rows, "edges are regrouped", "[atoms, 3]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_makes_the_list_dense_is_refused(body: Body, what: str, shape: str) -> None:
    with pytest.raises(PassError) as refused:
        PreserveSparsity().apply(made(body))
    assert what in refused.value.what
    assert refused.value.where.shape == shape
    assert refused.value.where.node
    assert refused.value.hint


def test_edges_divided_among_atoms_are_refused() -> None:
    """``edges.view(atoms, -1, 3)`` traces for lists in which every atom has as many neighbours, and only for these."""

    def body(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
        count = graph.call_function(operator.floordiv, (call(graph, aten.sym_size.int, v, 0), atoms(graph, x)))
        return call(graph, aten.new_zeros.default, v, [atoms(graph, x), count, 3])

    with pytest.raises(PassError, match="edges are divided among atoms"):
        PreserveSparsity().apply(made(body))


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        (TensorSpec("incidence", ("atoms", "edges"), F64), "atoms·edges elements"),
        (TensorSpec("matrix", ("atoms", "atoms"), F64), "atoms^2 elements"),
        (replace(INDEX, name="neighbours", dims=("atoms", 12)), "padded to a fixed number"),
    ],
)
def test_an_input_that_is_dense_is_refused(spec: TensorSpec, what: str) -> None:
    program = made(lambda graph, v, index, x, species: call(graph, aten.sin.default, v), [spec])
    with pytest.raises(PassError, match=what.replace("^", r"\^")):
        PreserveSparsity().apply(program)


def test_the_error_names_node_shape_and_module() -> None:
    program = made(gram)
    (node,) = program.graph.find_nodes(op="call_function", target=aten.mm.default)
    set_provenance(node, Provenance("blocks.1.attention", "model.py:42"))
    with pytest.raises(PassError) as refused:
        fxpass.run_passes(program, "preserve-sparsity")
    for part in ("preserve-sparsity", "node mm_default", "[atoms, atoms]", "blocks.1.attention", "model.py:42"):
        assert part in str(refused.value)
    assert "index_add" in refused.value.hint


# --- the proof passes what is sparse


def by_species(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    """A sum for each atom and species of its neighbours."""
    sender, receiver = ends(graph, index)
    zeros = call(graph, aten.new_zeros.default, v, [atoms(graph, x), 3, 3])
    return call(graph, aten.index_put.default, zeros, [receiver, call(graph, ops.gather, species, sender)], v, True)


def sorted_inside(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    """Edges sorted in the graph: the permutation counts edges, the receivers that it reads do not."""
    receiver = ends(graph, index)[1]
    both = call(graph, aten.sort.stable, receiver, stable=True, dim=0)
    values, order = (graph.call_function(operator.getitem, (both, k)) for k in (0, 1))
    one = call(graph, ops.scatter_sum, call(graph, ops.gather, v, order), values, atoms(graph, x))
    again = call(graph, ops.gather, receiver, order)
    two = call(graph, ops.scatter_sum, call(graph, ops.gather, v, order), again, atoms(graph, x))
    return call(graph, aten.add.Tensor, one, two)


def with_loops(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    """A loop at every atom, added to the list."""
    loops = call(graph, aten.slice.Tensor, x, 1, 0, 3)
    own = call(graph, aten.arange.default, atoms(graph, x))
    everything = call(graph, aten.cat.default, [v, loops])
    receivers = call(graph, aten.cat.default, [ends(graph, index)[1], own])
    return call(graph, ops.scatter_sum, everything, receivers, atoms(graph, x))


def one_direction(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    half = graph.call_function(operator.floordiv, (call(graph, aten.sym_size.int, v, 0), 2))
    return call(graph, aten.sum.default, call(graph, aten.slice.Tensor, v, 0, 0, half))


def channels(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> fx.Node:
    return call(graph, aten.view.default, call(graph, aten.view.default, v, [-1]), [-1, 3, 1])


@pytest.mark.parametrize("body", [by_species, sorted_inside, with_loops, one_direction, channels])
def test_what_is_sparse_passes(body: Body) -> None:
    check(made(body))


# --- it is upheld: after other passes, and in what a target runs


@dataclass(frozen=True)
class Densify(Pass):
    """Replaces a sum over edges by a product with the incidence matrix, as generic exporters do."""

    name: ClassVar[str] = "densify"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def apply(self, program: Program) -> Outcome:
        graph = program.graph
        sums = [node for node in graph.nodes if node.target is ops.scatter_sum]
        for node in sums:
            edges, receiver, count = node.args
            with graph.inserting_before(node):
                rows = call(graph, aten.unsqueeze.default, call(graph, aten.arange.default, count), 1)
                incidence = call(graph, aten._to_copy.default, call(graph, aten.eq.Tensor, rows, receiver), dtype=F64)
                dense = call(graph, aten.mm.default, incidence, edges)
            node.replace_all_uses_with(dense)
            graph.erase_node(node)
        return Outcome(program, modified=bool(sums))


WITH_DENSIFY = Registry([EntryPoint("densify", f"{__name__}:Densify", PASSES)])


def test_a_later_pass_that_makes_the_list_dense_is_refused() -> None:
    assert run(messages(), [Densify()], check=verify).records[0].modified
    with pytest.raises(PassError, match=r"the neighbour list does not stay sparse.*preserve-sparsity") as refused:
        run(messages(), [PreserveSparsity(), Densify()], check=verify)
    assert refused.value.where.pass_name == "densify"
    assert refused.value.where.shape == "[atoms, edges]"


class DenseTarget(EagerTarget):
    name: ClassVar[str] = "dense"
    pipeline: ClassVar[str] = "densify"


def test_a_target_that_would_make_the_list_dense_is_refused() -> None:
    assert lowering.legal(messages(), DenseTarget(), WITH_DENSIFY).records[0].modified
    program = PreserveSparsity().apply(messages()).program
    with pytest.raises(PassError, match="the neighbour list does not stay sparse"):
        lowering.legal(program, DenseTarget(), WITH_DENSIFY)


# --- every shipped model passes


SETTINGS = Settings((29, 47, 79), (-1.0, -2.0, -3.0), features="4x0e+2x1o", max_degree=1)
FRONTEND = BundledFrontend()
PROBES = probe_structures(SETTINGS.numbers, SETTINGS.cutoff)


@pytest.fixture(scope="module")
def forces() -> Program:
    """The force program of a small potential, as targets get it."""
    return fxpass.run_passes(fxpass.capture(build(SETTINGS, F64)), "preserve-sparsity,exact").program


@pytest.fixture(scope="module")
def legal(forces: Program) -> Program:
    return fxpass.run_passes(forces, EagerTarget.pipeline).program


def test_the_bundled_potential_is_sparse_at_every_stage(forces: Program, legal: Program) -> None:
    for program in (forces, legal, legal.without_gradient()):
        assert SPARSE in program.assumptions
        check(program)


QUICK = ("attention", "nonlinear")


def sparse_mace(name: str) -> None:
    import mace_models

    options = {"hidden": "4x0e", "l_max": 1, "correlation": 1, **mace_models.VARIANTS[name]}
    program = fxpass.capture(mace_models.build(**options))
    program = fxpass.run_passes(program, "preserve-sparsity,differentiate").program
    check(program)


@pytest.mark.mace
@pytest.mark.parametrize("name", QUICK)
def test_mace_is_sparse(name: str) -> None:
    sparse_mace(name)


@pytest.mark.mace
@pytest.mark.slow
def test_every_mace_is_sparse() -> None:
    import mace_models

    for name in mace_models.VARIANTS.keys() - set(QUICK):
        sparse_mace(name)


# --- geometry is computed once in a graph


def made_by_harmonics(node: fx.Node) -> bool:
    spherical = "harmonics" in provenance(node).module
    return node.target is ops.polynomial and node.args[-1] == "out" and spherical


def radial(node: fx.Node) -> bool:
    return node.target is aten.sin.default and not provenance(node).backward


def test_harmonics_and_radial_basis_occur_once(forces: Program) -> None:
    """Two layers, energy and forces: one set of spherical harmonics, one radial basis."""
    nodes = list(forces.graph.nodes)
    assert sum(map(made_by_harmonics, nodes)) == 1
    assert sum(map(radial, nodes)) == 1
    products = [n for n in nodes if n.target is ops.tensor_product and n.args[-1] == "out"]
    layers = [n for n in products if provenance(n).module.endswith("product")]
    (harmonics,) = filter(made_by_harmonics, nodes)
    assert len(layers) == 2
    assert all(descends(n.args[1], harmonics) for n in layers)


def descends(node: Any, ancestor: fx.Node) -> bool:
    while node is not ancestor and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node is ancestor


@pytest.mark.mace
def test_harmonics_and_radial_basis_of_mace_occur_once() -> None:
    import mace_models

    program = fxpass.capture(mace_models.build(layers=3, hidden="4x0e+4x1o", correlation=1))
    nodes = list(fxpass.run_passes(program, "preserve-sparsity,exact").program.graph.nodes)
    assert sum(n.target is ops.polynomial and provenance(n).module == "spherical_harmonics" for n in nodes) <= 3
    assert sum(map(made_by_harmonics, nodes)) == 1
    assert sum(map(radial, nodes)) == 1


# --- geometry is kept between calls, and only while it is the same


@dataclass
class Counted:
    """An interface that keeps its geometry, one that does not, and how often geometry was computed."""

    kept: nn.Module
    plain: nn.Module
    runs: int = 0

    def computed(self, data: dict[str, Tensor], **flags: Any) -> int:
        """Evaluate both, compare all bits, and say how often geometry was computed for it."""
        before = self.runs
        found, expected = self.kept(data, **flags), self.plain(data, **flags)
        for name, value in expected.items():
            if isinstance(value, Tensor):
                assert torch.equal(found[name], value), name
        return self.runs - before


def counted(frontend: Any, facts: dict[str, Any], program: Program) -> Counted:
    def interface(program: Program) -> nn.Module:
        energy, forces = lower_both(program, EagerTarget())
        return frontend.interface(energy, forces, {**facts, "assumptions": program.assumptions}).eval()

    without = tuple(fact for fact in program.assumptions if fact != KEPT)
    result = Counted(interface(program), interface(replace(program, assumptions=without)))
    (geometry,) = {m for m in result.kept.modules() if isinstance(m, KeptGeometry)}

    def count(*_: Any) -> None:
        result.runs += 1

    geometry.geometry.register_forward_hook(count)
    return result


@pytest.fixture
def model(legal: Program) -> Counted:
    return counted(FRONTEND, FRONTEND.attributes(build(SETTINGS, F64)), legal)


def batch(cutoff: float = SETTINGS.cutoff, names: Sequence[str] = ("alloy", "cluster")) -> dict[str, Tensor]:
    return collate([p for p in PROBES if p.name in names], SETTINGS.numbers, cutoff, F64)


def test_energy_then_forces_compute_geometry_once(model: Counted) -> None:
    assert model.computed(batch(), compute_forces=False) == 1
    assert model.computed(batch()) == 0
    assert model.computed(batch(), compute_stress=True) == 0
    assert model.computed(batch(), compute_forces=False) == 0


def test_the_same_geometry_in_another_order_or_with_a_skin_is_kept(model: Counted) -> None:
    """Edges are brought into their order and cut off before they are compared."""
    data = batch(6.0)
    order = torch.randperm(data["shifts"].shape[0], generator=torch.Generator().manual_seed(0))
    mixed = {**data, "edge_index": data["edge_index"][:, order], "shifts": data["shifts"][order]}
    assert [model.computed(given) for given in (batch(), data, mixed)] == [1, 0, 0]


def test_an_atom_that_moves_in_place_is_noticed(model: Counted) -> None:
    data = batch()
    assert model.computed(data) == 1
    data["positions"][3, 0] += 1e-9
    assert model.computed(data) == 1
    with torch.no_grad():
        data["positions"].data.mul_(1.001)  # behind the back of version counters
    assert model.computed(data) == 1
    data["positions"].numpy()[0] += 0.01
    assert model.computed(data) == 1
    assert model.computed(data) == 0


def test_a_cell_that_changes_in_place_is_noticed(model: Counted) -> None:
    data = batch()
    assert model.computed(data, compute_stress=True) == 1
    data["shifts"].mul_(1.01)
    data["cell"].mul_(1.01)
    assert model.computed(data, compute_stress=True) == 1
    data["cell"].mul_(1.01)  # of which only the volume in the stress knows
    assert model.computed(data, compute_stress=True) == 0


def test_an_edge_that_changes_in_place_is_noticed(model: Counted) -> None:
    data = batch()
    assert model.computed(data) == 1
    data["edge_index"][:, 0] = data["edge_index"][:, -1]
    data["shifts"][0] = data["shifts"][-1]
    assert model.computed(data) == 1
    fewer = {**data, "edge_index": data["edge_index"][:, 1:], "shifts": data["shifts"][1:]}
    assert model.computed(fewer) == 1


def test_other_species_on_the_same_geometry_are_noticed(model: Counted) -> None:
    data = batch()
    assert model.computed(data) == 1
    data["numbers"] = torch.full_like(data["numbers"], 29)
    assert model.computed(data) == 0  # and yet the energy is another, as the comparison of bits says
    data["numbers"].fill_(79)
    assert model.computed(data) == 0


def test_another_partition_of_the_same_geometry_is_noticed(model: Counted) -> None:
    """Which atoms an edge joins is no geometry: the same vectors between other atoms."""
    data = batch(names=["cluster"])
    assert model.computed(data) == 1
    vectors = data["positions"][data["edge_index"][1]] - data["positions"][data["edge_index"][0]] + data["shifts"]
    moved = {**data, "positions": torch.zeros_like(data["positions"]), "shifts": vectors}
    assert model.computed(moved) == 0
    moved["edge_index"] = (4 - data["edge_index"]).clone()
    model.computed(moved)


@pytest.mark.parametrize("names", [["atom"], ["dimer"], ["alloy", "slab", "cluster"]])
def test_changing_sizes(model: Counted, names: Sequence[str]) -> None:
    assert model.computed(batch()) == 1
    assert model.computed(batch(names=names)) == 1
    assert model.computed(batch(names=names), compute_forces=False) == 0
    assert model.computed(batch()) == 1


def test_an_atom_without_edges_is_no_other_geometry(model: Counted) -> None:
    assert model.computed(batch()) == 1
    assert model.computed(batch(names=["alloy", "atom", "cluster"])) == 0


def test_nothing_is_kept_while_autograd_records(model: Counted) -> None:
    data = batch()
    assert model.computed(data, training=True) == 1
    assert model.computed(data) == 1
    assert model.computed(data, training=True) == 1
    moving = {**data, "positions": data["positions"].clone().requires_grad_()}
    (expected, found) = (
        torch.autograd.grad(m(moving, training=True)["forces"][0, 0], moving["positions"])[0]
        for m in (model.plain, model.kept)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_inference_mode(model: Counted) -> None:
    data = batch()
    with torch.inference_mode():
        assert model.computed(data) == 1
    assert model.computed(data) == 0
    assert model.computed(data, training=True) == 1


def test_a_caller_may_write_to_results(model: Counted) -> None:
    first = model.kept(batch(), compute_stress=True)
    expected = {name: value.clone() for name, value in first.items()}
    for value in first.values():
        value.zero_()
    for name, value in model.kept(batch(), compute_stress=True).items():
        assert torch.equal(value, expected[name])


def test_another_dtype_is_another_geometry() -> None:
    kept = KeptGeometry(nn.Identity())
    vectors = torch.tensor([[1.0, 2.0, 4.0]])
    with torch.no_grad():
        assert kept(vectors).dtype == torch.float32
        assert kept(vectors.double()).dtype == F64
        assert kept(vectors).dtype == torch.float32


def test_not_a_number_is_never_the_same() -> None:
    kept = KeptGeometry(nn.Identity())
    vectors = torch.tensor([[torch.nan, 0.0, 0.0]])
    with torch.no_grad():
        assert kept(vectors) is not None
        assert not torch.equal(kept(vectors), kept(torch.zeros(1, 3)))


def test_what_is_set_apart_is_geometry_alone(legal: Program) -> None:
    split = split_geometry(legal)
    assert split is not None
    assert [spec.name for spec in split.geometry.inputs] == ["edge_vectors"]
    for part in (split.geometry, split.energy, split.forces):
        verify(part)
    assert [spec.name for spec in split.energy.outputs] == ["energy", "node_energy"]
    assert [spec.name for spec in split.forces.outputs] == ["energy", "node_energy", "edge_gradient"]
    assert not any(radial(node) for part in (split.energy, split.forces) for node in part.graph.nodes)
    assert sum(map(radial, split.geometry.graph.nodes)) == 1


def test_a_program_without_geometry_of_its_own_is_left_whole() -> None:
    """Vectors that meet the species at once leave nothing to keep."""

    def body(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> dict[str, fx.Node]:
        rows = call(graph, ops.scatter_sum, v, ends(graph, index)[1], atoms(graph, x))
        return {"energy": call(graph, aten.sum.dim_IntList, rows, [1])}

    program = Differentiate().apply(build_program(body, [VECTORS, INDEX, X, SPECIES])).program
    assert split_geometry(program) is None
    energy, forces = lower_both(replace(program, assumptions=(KEPT,)), EagerTarget())
    assert not any(isinstance(module, WithGeometry) for module in (energy, forces))


def guarded_regions() -> Program:
    """One guarded region of geometry alone, and one that geometry and features share."""

    def body(graph: fx.Graph, v: fx.Node, index: fx.Node, x: fx.Node, species: fx.Node) -> dict[str, fx.Node]:
        sender, receiver = ends(graph, index)
        alone = call(graph, aten.atan.default, call(graph, ops.fusion_guard, v, "enter alone"))
        alone = call(graph, ops.fusion_guard, alone, "leave alone")
        mixed = call(graph, aten.sin.default, call(graph, ops.fusion_guard, alone, "enter mixed"))
        ends_ = call(graph, ops.gather, call(graph, aten.slice.Tensor, x, 1, 0, 3), sender)
        mixed = call(graph, aten.mul.Tensor, mixed, call(graph, ops.fusion_guard, ends_, "enter mixed"))
        mixed = call(graph, ops.fusion_guard, mixed, "leave mixed")
        summed = call(graph, ops.scatter_sum, mixed, receiver, atoms(graph, x))
        return {"energy": call(graph, aten.sum.dim_IntList, summed, [1])}

    return Differentiate().apply(build_program(body, [VECTORS, INDEX, X, SPECIES])).program


def test_a_guarded_region_is_kept_as_a_whole_or_not_at_all() -> None:
    split = split_geometry(guarded_regions())
    assert split is not None
    kept, rest = ({node.target for node in part.graph.nodes} for part in (split.geometry, split.forces))
    assert aten.atan.default in kept and aten.atan.default not in rest
    assert aten.sin.default in rest and not {aten.sin.default, aten.mul.Tensor} & kept


def test_torchscript_keeps_nothing_that_its_file_would_hold(legal: Program) -> None:
    both = lower_both(legal, default_registry().target("torchscript")())
    assert all(isinstance(module, torch.jit.ScriptModule) for module in both)


@pytest.mark.mace
def test_heads_share_their_geometry() -> None:
    import mace_models
    from fxpass.frontends.mace import MaceFrontend, mace_batch

    original = mace_models.build(heads=["pbe", "r2scan", "Default"], hidden="4x0e", l_max=1, correlation=1)
    program = fxpass.run_passes(fxpass.capture(original), f"preserve-sparsity,exact,{EagerTarget.pipeline}").program
    frontend = MaceFrontend()
    facts = frontend.attributes(original)
    model = counted(frontend, facts, program)
    probe = probe_structures(facts["numbers"], facts["cutoff"])[0]
    runs = []
    for head in facts["heads"]:
        data = mace_batch([replace(probe, head=head)], facts["numbers"], facts["cutoff"], facts["heads"], F64)
        runs.append(model.computed(data))
    assert runs == [1, 0, 0]


# --- all of it together


def test_an_optimised_model_is_verified_saved_and_loaded(tmp_path: Any) -> None:
    optimized = fxpass.optimize(build(replace(SETTINGS, layers=1), F64), ["preserve-sparsity", "default"])
    assert optimized.report.receipt.passed
    optimized.save(tmp_path / "small.fxp")
    loaded = fxpass.load(tmp_path / "small.fxp")
    assert {SPARSE, SORTED, WITHIN, KEPT} <= set(loaded.program.assumptions)
    expected = optimized(batch(), compute_stress=True)
    for model in (optimized, loaded):
        for name, value in model(batch(6.5), compute_stress=True).items():
            assert torch.equal(value, expected[name]), name
