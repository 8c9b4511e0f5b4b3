"""Edges between a host and a program: their order, the cutoff, padding; in every family and as TorchScript."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.edges import MASKED, SORTED, WITHIN, Edges, canonical_order, reversed_edges
from fxpass.frontends.bundled import BundledFrontend
from fxpass.ir.program import Program
from fxpass.models import Settings, build, collate
from fxpass.registry import default_registry
from fxpass.structures import Structure, neighbour_list, probe_structures
from fxpass.targets.geometry import lower_both
from fxpass.targets.torchscript import script

pytestmark = pytest.mark.once

F64 = torch.float64
CUTOFF = 5.0
PROBES = {probe.name: probe for probe in probe_structures((29, 47, 79), CUTOFF)}
MODES = {"drop": (SORTED, WITHIN), "mask": (SORTED, MASKED), "mask, unsorted": (MASKED,)}


def listed(structure: Structure, cutoff: float = CUTOFF) -> tuple[Tensor, Tensor]:
    """Edge vectors and index of a structure, as interfaces compute them."""
    index, units = neighbour_list(structure, cutoff)
    positions = torch.from_numpy(structure.positions)
    sender, receiver = torch.from_numpy(index)
    return positions[receiver] - positions[sender] + torch.from_numpy(units @ structure.cell), torch.from_numpy(index)


def shuffled(edges: int, seed: int = 0) -> Tensor:
    return torch.randperm(edges, generator=torch.Generator().manual_seed(seed))


# --- order


@pytest.mark.parametrize("name", PROBES)
def test_any_permutation_comes_out_as_one_list(name: str) -> None:
    vectors, index = listed(PROBES[name])
    atoms = len(PROBES[name])
    order = canonical_order(vectors, index, atoms)
    for seed in range(3):
        mixed = shuffled(len(vectors), seed)
        again = canonical_order(vectors[mixed], index[:, mixed], atoms)
        assert torch.equal(vectors[mixed][again], vectors[order])
        assert torch.equal(index[:, mixed][:, again], index[:, order])


def test_the_order_is_by_receiver_sender_and_vector() -> None:
    vectors, index = listed(PROBES["alloy"])
    order = canonical_order(vectors, index, 12)
    rows = torch.cat([index[[1, 0]][:, order].t().double(), vectors[order]], dim=1).tolist()
    assert rows == sorted(rows)
    assert len({tuple(row[:2]) for row in rows}) < len(rows)  # images of one atom, so vectors had to decide


@pytest.mark.parametrize("name", PROBES)
def test_the_reversed_edge(name: str) -> None:
    vectors, index = listed(PROBES[name])
    atoms = len(PROBES[name])
    mixed = shuffled(len(vectors))
    vectors, index = vectors[mixed], index[:, mixed]
    reverse = reversed_edges(vectors, index, atoms)
    assert torch.equal(index[:, reverse], index.flip(0))
    assert torch.equal(vectors[reverse], -vectors)
    assert torch.equal(reverse[reverse], torch.arange(len(vectors)))


def test_forces_are_a_sum_over_received_edges_alone() -> None:
    """What the reversed-edge index is for: no atomic additions where edges are sorted by receiver."""
    vectors, index = listed(PROBES["alloy"])
    gradient = torch.randn(vectors.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    positions = torch.zeros(12, 3, dtype=F64)
    expected = positions.index_add(0, index[0], gradient).index_add(0, index[1], gradient, alpha=-1)
    assert torch.equal(Edges(1.0).forces(gradient, index, positions), expected)
    order = canonical_order(vectors, index, 12)
    vectors, index, gradient = vectors[order], index[:, order], gradient[order]
    received = gradient[reversed_edges(vectors, index, 12)] - gradient
    counts = torch.bincount(index[1], minlength=12)
    segments = torch.segment_reduce(received, "sum", lengths=counts)
    torch.testing.assert_close(segments, expected, rtol=0, atol=1e-12)


def test_a_half_list_has_no_reversed_edges() -> None:
    vectors, index = listed(PROBES["cluster"])
    half = index[0] < index[1]
    with pytest.raises(RuntimeError, match=r"edge 0, from atom \d to atom \d, has no reverse"):
        reversed_edges(vectors[half], index[:, half], 5)


# --- the module


def test_without_assumptions_nothing_is_touched() -> None:
    vectors, index = torch.zeros(2, 3), torch.tensor([[0, 1], [0, 1]])
    same, still, order = Edges(CUTOFF, ["one-hot node_attrs"])(vectors, index, 2)
    assert same is vectors and still is index and order is None


def padded(vectors: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The same list with padding of every form, some of it in the middle."""
    padding = [
        ((-1, -1), (1.0, 0.0, 0.0)),
        ((-1, 0), (0.0, 0.0, 0.0)),
        ((0, 0), (0.0, 0.0, 0.0)),
        ((1, 1), (0.0, 0.0, 99.0)),
        ((0, 1), (CUTOFF, 0.0, 0.0)),
    ]
    more = torch.tensor([p[0] for p in padding]).t(), torch.tensor([p[1] for p in padding], dtype=vectors.dtype)
    at = len(vectors) // 2
    return (
        torch.cat([vectors[:at], more[1], vectors[at:]]),
        torch.cat([index[:, :at], more[0], index[:, at:]], dim=1),
    )


def test_padding_is_dropped_and_the_order_undone() -> None:
    vectors, index = listed(PROBES["cluster"])
    edges = Edges(CUTOFF, (SORTED, WITHIN))
    given = padded(vectors, index)
    mixed = shuffled(len(given[0]))
    kept, joined, order = edges(given[0][mixed], given[1][:, mixed], 5)
    expected, by_receiver, _ = edges(vectors, index, 5)
    assert torch.equal(kept, expected) and torch.equal(joined, by_receiver)
    back = edges.restored(kept, order, len(mixed))
    inert = torch.cat([torch.zeros(len(vectors) // 2), torch.ones(5), torch.zeros(len(vectors))])[: len(mixed)][mixed]
    assert torch.equal(back[inert == 0], given[0][mixed][inert == 0])
    assert not back[inert == 1].any()


def test_padding_is_masked_in_place() -> None:
    vectors, index = padded(*listed(PROBES["cluster"]))
    edges = Edges(CUTOFF, (MASKED,))
    kept, joined, order = edges(vectors, index, 5)
    assert order is None and kept.shape == vectors.shape
    masked = (joined == 5).all(0)
    assert int(masked.sum()) == 5
    assert (torch.linalg.vector_norm(kept[masked], dim=1) > CUTOFF).all()
    gradient, sums = edges.settled(torch.full_like(kept, torch.nan).masked_fill(~masked[:, None], 1.0), joined, 5)
    assert torch.equal(gradient, (~masked).double()[:, None].expand(-1, 3))
    assert int(sums.max()) < 5


def test_an_atom_and_a_graph_more_where_edges_are_masked() -> None:
    attrs, batch, head = torch.eye(3)[[2, 1]], torch.tensor([0, 1]), torch.tensor([4, 5])
    wider = Edges(CUTOFF, (MASKED,)).with_dummy(attrs, batch, head)
    assert [value.tolist() for value in wider] == [[[0, 0, 1], [0, 1, 0], [1, 0, 0]], [0, 1, 2], [4, 5, 0]]
    assert Edges(CUTOFF, (MASKED,)).without_dummy([batch])[0].tolist() == [0]
    for value, same in zip((attrs, batch, head), Edges(CUTOFF).with_dummy(attrs, batch, head), strict=True):
        assert value is same


@pytest.mark.parametrize("mode", MODES)
def test_not_a_number_is_no_padding(mode: str) -> None:
    """Lost atoms have to show in the energy, not to vanish from the neighbour list."""
    vectors = torch.tensor([[torch.nan, 0.0, 0.0], [1.0, 0.0, 0.0]])
    kept, _, _ = Edges(CUTOFF, MODES[mode])(vectors, torch.tensor([[0, 1], [1, 0]]), 2)
    assert int(kept.isnan().sum()) == 1


@pytest.mark.parametrize("mode", [(), (SORTED, WITHIN), (MASKED,)])
def test_edges_shorter_than_the_program_was_made_for(mode: Sequence[str]) -> None:
    edges = Edges(CUTOFF, (*mode, "edge lengths >= 0.3 A"))
    index = torch.tensor([[0, 1], [1, 0]])
    short = torch.tensor([[0.25, 0.0, 0.0], [-0.25, 0.0, 0.0]])
    with pytest.raises(RuntimeError, match=r"an edge of 0\.25 Angstrom is shorter than the 0\.3 Angstrom"):
        edges(short, index, 2)
    edges(2 * short, index, 2)
    edges(short[:0], index[:, :0], 2)
    assert Edges(CUTOFF, ("edge lengths >= 0.3 A", "edge lengths >= 0.4 A")).shortest == 0.4


def test_padding_is_not_too_short() -> None:
    vectors, index = padded(*listed(PROBES["cluster"]))
    Edges(CUTOFF, (WITHIN, "edge lengths >= 0.3 A"))(vectors, index, 5)


@pytest.mark.parametrize("mode", [(), *MODES.values(), (WITHIN, "edge lengths >= 0.3 A")])
def test_it_scripts(mode: Sequence[str]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edges = Edges(CUTOFF, mode)

        def forward(self, vectors: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            kept, joined, order = self.edges(vectors, index, 5)
            gradient, sums = self.edges.settled(kept, joined, 5)
            return self.edges.restored(gradient, order, vectors.size(0)), sums, self.edges.readable(index)

    for given in (listed(PROBES["cluster"]), padded(*listed(PROBES["cluster"]))):
        for plain, scripted in zip(Both()(*given), script(Both())(*given), strict=True):
            assert torch.equal(plain, scripted)


# --- in the interface of a family


@dataclass(frozen=True)
class Lowered:
    """A program lowered once, and interfaces over it that differ in their assumptions."""

    frontend: Any
    facts: dict[str, Any]
    program: Program
    target: str = "eager"

    def interface(self, *assumptions: str) -> nn.Module:
        target = default_registry().target(self.target)()
        energy, forces = lower_both(replace(self.program, assumptions=assumptions), target)
        interface = self.frontend.interface(energy, forces, {**self.facts, "assumptions": assumptions}).eval()
        return script(interface) if self.target == "torchscript" else interface


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    settings = Settings((29, 47, 79), (-1.0, -2.0, -3.0), features="4x0e+2x1o", max_degree=1)
    model, frontend = build(settings, F64), BundledFrontend()
    program = fxpass.run_passes(fxpass.capture(model), "default,legalize,dead-code").program
    return Lowered(frontend, frontend.attributes(model), program)


@pytest.fixture(scope="module", params=["eager", "torchscript"])
def small(request: pytest.FixtureRequest, lowered: Lowered) -> Lowered:
    return replace(lowered, target=request.param)


def batch(cutoff: float = CUTOFF, names: Sequence[str] = tuple(PROBES)) -> dict[str, Tensor]:
    return collate([PROBES[name] for name in names], (29, 47, 79), cutoff, F64)


def permuted(data: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    order = shuffled(data["shifts"].shape[0], seed)
    return {**data, "edge_index": data["edge_index"][:, order], "shifts": data["shifts"][order]}


def padded_batch(data: dict[str, Tensor], copies: int = 7) -> dict[str, Tensor]:
    """Padding as hosts do it: -1, or a loop of length zero or far beyond the cutoff on the last atom."""
    last = data["positions"].shape[0] - 1
    ends = torch.tensor([[-1, -1], [last, last], [last, last], [-1, 0]] * copies).t()
    shifts = torch.tensor([[0.0] * 3, [0.0] * 3, [0.0, 50.0, 0.0], [0.0] * 3] * copies, dtype=F64)
    return {
        **data,
        "edge_index": torch.cat([data["edge_index"], ends], dim=1),
        "shifts": torch.cat([data["shifts"], shifts]),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any], atol: float = 0.0) -> None:
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=atol, equal_nan=True, msg=name)


@pytest.mark.parametrize("names", [tuple(PROBES), ("alloy",), ("cluster",), ("atom",)])
def test_bits_do_not_depend_on_order_skin_or_padding(small: Lowered, names: Sequence[str]) -> None:
    model = small.interface(SORTED, WITHIN)
    exact = batch(names=names)
    expected = model(exact, compute_stress=True)
    for other in (permuted(exact, 0), batch(CUTOFF + 1.5, names), permuted(batch(CUTOFF + 1.5, names), 1)):
        assert_same(model(other, compute_stress=True), expected)
        assert_same(model(padded_batch(other), compute_stress=True), expected)


@pytest.mark.parametrize("mode", MODES)
def test_results_are_those_of_the_exact_list(small: Lowered, mode: str) -> None:
    expected = small.interface()(batch(), compute_stress=True)
    model = small.interface(*MODES[mode])
    for data in (batch(), padded_batch(permuted(batch(CUTOFF + 1.0), 2))):
        assert_same(model(data, compute_stress=True), expected, atol=1e-11)
        assert_same(model(data, compute_forces=False), {"energy": expected["energy"]}, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_no_edges_and_nothing_but_padding(small: Lowered, mode: str) -> None:
    alone = batch(names=["atom"])
    assert alone["edge_index"].shape[1] == 0
    model, expected = small.interface(*MODES[mode]), small.interface()(alone)
    for data in (alone, padded_batch(alone)):
        found = model(data)
        assert_same(found, expected, atol=1e-12)
        assert not found["forces"].any()


@pytest.mark.parametrize("mode", MODES)
def test_training_through_padding(small: Lowered, mode: str) -> None:
    """Derivatives of forces are as finite and the same as without padding."""

    def hessian(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        data = {**data, "positions": data["positions"].clone().requires_grad_()}
        result = model(data, training=True)
        (row,) = torch.autograd.grad(result["forces"][0, 0], data["positions"])
        return row

    clean = batch(names=["cluster"])
    expected = hessian(small.interface(), clean)
    found = hessian(small.interface(*MODES[mode]), padded_batch(clean))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("small", ["eager"], indirect=True)  # a scripted program takes no hooks
def test_a_number_of_edges_that_stays(small: Lowered) -> None:
    """Masked, a list of fixed length reaches the program with that length, however many of its edges are real."""
    seen = []
    model = small.interface(SORTED, MASKED)
    model.forces_program.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1].shape[1]))
    for names, cutoff in ((["cluster"], CUTOFF), (["dimer"], CUTOFF), (["atom"], CUTOFF)):
        data = batch(cutoff, names)
        missing = 40 - data["edge_index"].shape[1]
        data["edge_index"] = torch.cat([data["edge_index"], torch.full((2, missing), -1)], dim=1)
        data["shifts"] = torch.cat([data["shifts"], torch.zeros(missing, 3, dtype=F64)])
        model(data)
    assert seen == [40, 40, 40]


def test_short_edges_are_refused_at_run_time(small: Lowered) -> None:
    model = small.interface("edge lengths >= 1.5 A")
    model(batch())
    near = Structure(np.array([29, 47]), np.array([[0.0, 0, 0], [1.2, 0, 0]]), np.zeros((3, 3)), (False,) * 3)
    with pytest.raises((RuntimeError, torch.jit.Error), match=r"an edge of 1\.2 Angstrom is shorter than the 1\.5"):
        model(collate([near], (29, 47, 79), CUTOFF, F64))


# --- MACE, which shows edges to its caller


@pytest.fixture(scope="module")
def mace() -> Lowered:
    import mace_models
    from fxpass.frontends.mace import MaceFrontend

    model, frontend = mace_models.build(hidden="4x0e", l_max=1, correlation=1), MaceFrontend()
    program = fxpass.run_passes(fxpass.capture(model), "default,legalize,dead-code").program
    return Lowered(frontend, frontend.attributes(model), program)


def mace_data(facts: dict[str, Any], cutoff: float, seed: int | None = None) -> dict[str, Tensor]:
    from fxpass.frontends.mace import mace_batch

    probes = [p for p in probe_structures(facts["numbers"], facts["cutoff"]) if all(p.pbc)]
    data = mace_batch(probes, facts["numbers"], cutoff, facts["heads"], F64)
    if seed is not None:
        order = shuffled(data["shifts"].shape[0], seed)
        data["edge_index"] = data["edge_index"][:, order]
        data |= {name: data[name][order] for name in ("shifts", "unit_shifts")}
    return data


FLAGS = {"compute_stress": True, "compute_edge_forces": True, "compute_atomic_stresses": True}


@pytest.mark.mace
@pytest.mark.parametrize("target", ["eager", "torchscript"])
@pytest.mark.parametrize("mode", MODES)
def test_mace_shows_edges_in_the_order_of_the_host(mace: Lowered, mode: str, target: str) -> None:
    mace = replace(mace, target=target)
    given = mace_data(mace.facts, CUTOFF, seed=3)  # the cutoff of the model is 4.5
    expected = mace.interface()({**given}, **FLAGS)
    found = mace.interface(*MODES[mode])({**given}, **FLAGS)
    for name in ("energy", "forces", "stress", "virials", "edge_forces", "atomic_virials", "atomic_stresses"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9, msg=name)
    assert found["edge_forces"].shape == given["shifts"].shape


@pytest.mark.mace
@pytest.mark.parametrize("mode", MODES)
def test_mace_under_a_given_displacement(mace: Lowered, mode: str) -> None:
    """The strain of a host, edges in an order of their own: gradients by strain see the right edges."""

    def run(model: nn.Module) -> dict[str, Tensor]:
        data = mace_data(mace.facts, CUTOFF, seed=4)
        graphs = data["ptr"].numel() - 1
        strain = 0.02 * torch.randn(graphs, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(5))
        return model({**data, "displacement": strain}, compute_stress=True)

    expected, found = run(mace.interface()), run(mace.interface(*MODES[mode]))
    for name in ("energy", "forces", "stress", "virials"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.mace
def test_mace_bits_do_not_depend_on_order_or_skin(mace: Lowered) -> None:
    model = mace.interface(SORTED, WITHIN)
    expected = model(mace_data(mace.facts, mace.facts["cutoff"]), compute_stress=True)
    for cutoff, seed in ((4.5, 0), (6.0, None), (6.0, 1)):
        assert_same(model(mace_data(mace.facts, cutoff, seed), compute_stress=True), expected)


@pytest.mark.mace
def test_mace_hessian_of_sorted_edges(mace: Lowered) -> None:
    from fxpass.frontends.mace import mace_batch

    (probe,) = (p for p in probe_structures(mace.facts["numbers"], mace.facts["cutoff"]) if p.name == "cluster")

    def run(*assumptions: str) -> Tensor:
        data = mace_batch([probe], mace.facts["numbers"], 6.0, mace.facts["heads"], F64)
        return mace.interface(*assumptions)(data, compute_hessian=True)["hessian"]

    for mode in MODES.values():
        torch.testing.assert_close(run(*mode), run(), rtol=0, atol=1e-8)
