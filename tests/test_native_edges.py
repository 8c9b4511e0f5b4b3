"""Edges of the target ``native``: the same vectors, decisions and forces as torch's, one pass each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fxpass
from fxpass.edges import MASKED, SORTED, WITHIN, Edges
from fxpass.kernels.build import build, find_compiler
from fxpass.kernels.edges import IN_ORDER, PLAIN, BoundEdges, EdgesKernel
from fxpass.models import small_potential
from fxpass.structures import neighbour_list, probe_structures
from fxpass.targets.native import NativeEdges

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler, and without one edges are torch's"),
]

CUTOFF = 5.0
PROBES = {probe.name: probe for probe in probe_structures((29, 47, 79), CUTOFF)}
MODES = {"sorted": (SORTED,), "drop": (SORTED, WITHIN), "mask": (SORTED, MASKED), "short": ("edge lengths >= 0.3 A",)}


@pytest.fixture(scope="module")
def functions() -> BoundEdges:
    kernel = EdgesKernel()
    return kernel.bind(build({kernel.name: kernel.source}, find_compiler())[kernel.name])


def given(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, index and shifts of a probe."""
    structure = PROBES[name]
    index, units = neighbour_list(structure, CUTOFF)
    positions = torch.from_numpy(structure.positions).to(dtype)
    return positions, torch.from_numpy(index), torch.from_numpy(units @ structure.cell).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PROBES)
def test_vectors_and_forces(name: str, dtype: torch.dtype, functions: BoundEdges) -> None:
    positions, index, shifts = given(name, dtype)
    ours, theirs = NativeEdges(Edges(CUTOFF), functions), Edges(CUTOFF)
    vectors = ours.vectors(positions, index, shifts)
    assert torch.equal(vectors, theirs.vectors(positions, index, shifts))
    found = ours.forces(vectors, index, positions)
    expected = theirs.forces(vectors.double(), index, positions.double())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROBES)
def test_the_same_decisions(mode: str, name: str, functions: BoundEdges) -> None:
    positions, index, shifts = given(name, torch.float64)
    theirs = Edges(CUTOFF, MODES[mode])
    ours = NativeEdges(theirs, functions)
    atoms = len(positions)
    vectors = theirs.vectors(positions, index, shifts)
    mixed = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    lists = [(vectors, index), (vectors[mixed], index[:, mixed].contiguous())]
    if len(vectors):
        for first in (vectors.new_tensor([CUTOFF, 0, 0]), vectors.new_tensor([float("nan"), 1, 1])):
            changed = vectors.clone()
            changed[0] = first
            lists.append((changed, index))
        beyond = index.clone()
        beyond[0, 0] = -1
        lists.append((vectors, beyond))
    for each in lists:
        results = [edges(*each, atoms) for edges in (ours, theirs)]
        for found, expected in zip(*results, strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_a_short_edge_is_refused(functions: BoundEdges) -> None:
    edges = NativeEdges(Edges(CUTOFF, ("edge lengths >= 0.3 A",)), functions)
    vectors, index = torch.tensor([[0.1, 0, 0], [-0.1, 0, 0]]), torch.tensor([[0, 1], [1, 0]])
    with pytest.raises(RuntimeError, match="shorter"):
        edges(vectors, index, 2)


def test_what_a_look_tells(functions: BoundEdges) -> None:
    vectors = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 2.0, 0]])
    index = torch.tensor([[1, 0, 1], [0, 1, 2]])

    def look(v: Tensor = vectors, i: Tensor = index, shortest: float = 0.3) -> int:
        return functions.look(v, i, 3, shortest, CUTOFF)

    assert look() == PLAIN | IN_ORDER
    assert look(shortest=1.5) == IN_ORDER
    assert look(i=index.flip(1).contiguous()) == PLAIN
    assert look(i=torch.tensor([[1, 1, 1], [0, 0, 2]])) == PLAIN  # two edges between the same atoms
    assert look(v=vectors * 3) == look(v=vectors * 0) == look(v=vectors * float("nan")) == IN_ORDER
    assert look(v=vectors[:0], i=index[:, :0]) in (0, PLAIN | IN_ORDER)
    assert look(v=vectors.half()) == look(v=vectors[:, :2]) == 0


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_index_outside_is_left_to_torch(bad: int, functions: BoundEdges) -> None:
    positions, index = torch.rand(3, 3), torch.tensor([[0, bad], [1, 0]])
    assert functions.vectors(positions, index, torch.zeros(2, 3)) is None
    assert functions.forces(torch.ones(2, 3), index, positions) is None
    with pytest.raises((IndexError, RuntimeError)):
        NativeEdges(Edges(CUTOFF), functions).forces(torch.ones(2, 3), index, positions)


def test_shapes_that_do_not_belong_together_are_left_to_torch(functions: BoundEdges) -> None:
    positions, index = torch.rand(3, 3), torch.tensor([[0, 1], [1, 0]])
    assert functions.vectors(positions, index[:, :1].contiguous(), torch.zeros(2, 3)) is None
    assert functions.vectors(positions, index, torch.zeros(1, 3)) is None
    assert functions.forces(torch.ones(1, 3), index, positions) is None
    assert functions.look(torch.ones(1, 3), index, 3, 0.3, CUTOFF) == 0


def test_autograd_goes_through_torch(functions: BoundEdges) -> None:
    positions, index, shifts = given("alloy", torch.float64)
    edges = NativeEdges(Edges(CUTOFF), functions)
    vectors = edges.vectors(positions.requires_grad_(), index, shifts)
    edges.forces(vectors * vectors, index, positions).square().sum().backward()
    assert positions.grad is not None and positions.grad.abs().max() > 0


def test_a_result_and_its_copies_have_them() -> None:
    optimized = fxpass.optimize(small_potential(torch.float64), "exact", target="native", verify=False)
    for each in (optimized, copy.deepcopy(optimized.interface)):
        kinds: list[Any] = [type(module) for module in each.modules() if isinstance(module, Edges)]
        assert kinds == [NativeEdges]
