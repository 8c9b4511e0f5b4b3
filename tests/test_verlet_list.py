"""Neighbour lists with a skin: always the arrays of the list made anew, whatever atoms and cells do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from fxpass.errors import StructureError, UsageError
from fxpass.structures import COINCIDENT, Structure, VerletList, neighbour_list

pytestmark = pytest.mark.once

CUTOFF = 3.5
CELL = np.array([[8.0, 0, 0], [0.7, 7.5, 0], [-0.4, 0.5, 8.5]])
ALL, NONE, SLAB, WIRE = (True,) * 3, (False,) * 3, (True, True, False), (False, False, True)


@pytest.fixture(params=["vesin", "fallback"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test with vesin, where it is installed, and without."""
    if request.param == "fallback":
        monkeypatch.setitem(sys.modules, "vesin", None)
    return str(request.param)


def gas(pbc: tuple[bool, bool, bool], atoms: int = 40, seed: int = 0, cell: np.ndarray = CELL) -> Structure:
    rng = np.random.default_rng(seed)
    return Structure(rng.choice([6, 29], atoms), rng.uniform(size=(atoms, 3)) @ CELL, cell, pbc)


def walk(start: Structure, steps: int, size: float, seed: int = 1) -> Iterator[Structure]:
    """Steady motion in random directions, so that atoms leave the cell and pass each other."""
    rng = np.random.default_rng(seed)
    velocity = rng.normal(scale=size, size=start.positions.shape)
    here = start
    for _ in range(steps):
        yield here
        velocity += rng.normal(scale=0.3 * size, size=velocity.shape)
        here = replace(here, positions=here.positions + velocity)


def assert_same(kept: VerletList, structure: Structure, cutoff: float = CUTOFF) -> None:
    for found, expected in zip(kept(structure, cutoff), neighbour_list(structure, cutoff), strict=True):
        assert found.dtype == expected.dtype and found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("pbc", [ALL, NONE, SLAB, WIRE], ids=["crystal", "isolated", "slab", "wire"])
@pytest.mark.parametrize("skin", [0.0, 0.3, 1.0])
def test_it_is_the_list_made_anew(pbc: tuple[bool, bool, bool], skin: float) -> None:
    kept = VerletList(CUTOFF, skin)
    for structure in walk(gas(pbc), 40, 0.03):
        assert_same(kept, structure)
    assert kept.made > 1 if skin else kept.made == 40
    assert kept.made < 25 or skin < 1


def test_slow_motion_makes_one_list() -> None:
    kept = VerletList(CUTOFF, 0.5)
    start = gas(ALL)
    kept(start, CUTOFF)
    rng = np.random.default_rng(2)
    for _ in range(20):
        noise = rng.uniform(-0.14, 0.14, size=start.positions.shape)  # sqrt(3) * 0.14 < 0.25
        assert_same(kept, replace(start, positions=start.positions + noise))
    assert kept.made == 1


def test_half_the_skin_is_the_limit() -> None:
    """Two atoms that approach each other by half the skin each meet the cutoff exactly when the list is made anew."""
    start = Structure([6, 6], [[0, 0, 0], [CUTOFF + 0.49, 0, 0]], np.zeros((3, 3)), NONE)
    kept = VerletList(CUTOFF, 0.5)
    assert kept(start, CUTOFF)[0].size == 0
    for way, made in [(0.2499, 1), (0.2501, 2)]:
        closer = replace(start, positions=[[way, 0, 0], [CUTOFF + 0.49 - way, 0, 0]])
        assert_same(kept, closer)
        assert (kept(closer, CUTOFF)[0].size, kept.made) == (4, made)


def test_what_makes_a_new_list() -> None:
    kept, start = VerletList(CUTOFF, 0.5), gas(ALL)
    changes = [
        start,
        replace(start, cell=start.cell * 1.001),
        replace(start, cell=start.cell * 1.001, pbc=SLAB),
        replace(start, numbers=[*start.numbers, 6], positions=[*start.positions, [1.0, 2.0, 3.0]]),
        replace(start, numbers=start.numbers[:-1], positions=start.positions[:-1]),
        replace(start, positions=start.positions[::-1]),
        replace(start, positions=start.positions + np.eye(len(start), 3) @ start.cell),  # wrapped
    ]
    for made, structure in enumerate(changes, 1):
        assert_same(kept, structure)
        assert_same(kept, structure)
        assert kept.made == made
    other = replace(changes[-1], numbers=np.where(changes[-1].numbers == 6, 29, 6))
    assert_same(kept, other)  # a list of pairs knows no species
    assert kept.made == len(changes)


def test_atoms_that_move_in_place_are_noticed() -> None:
    kept, structure = VerletList(CUTOFF, 0.5), gas(ALL)
    kept(structure, CUTOFF)
    structure.positions[3] += 0.1
    assert_same(kept, structure)
    structure.cell[0, 0] += 0.1
    assert_same(kept, structure)
    assert kept.made == 2


def test_narrow_cells_have_many_images() -> None:
    cell = np.array([[2.0, 0, 0], [0.3, 2.5, 0], [0, 0.2, 9.0]])
    kept = VerletList(CUTOFF, 0.5)
    for structure in walk(gas(ALL, 4, cell=cell), 15, 0.03):
        assert_same(kept, structure)
    assert kept.made < 15


@pytest.mark.parametrize("atoms", [1, 2])
@pytest.mark.parametrize("pbc", [ALL, NONE])
def test_few_atoms(atoms: int, pbc: tuple[bool, bool, bool]) -> None:
    kept = VerletList(CUTOFF, 0.5)
    start = Structure([6] * atoms, 20.0 * np.eye(3)[:atoms], 50 * np.eye(3), pbc)
    assert kept(start, CUTOFF)[0].shape == (2, 0) and kept(start, CUTOFF)[1].shape == (0, 3)
    assert_same(kept, start)


def test_a_shorter_cutoff_is_served_from_the_same_pairs() -> None:
    kept, structure = VerletList(CUTOFF, 0.5), gas(ALL)
    for cutoff in (COINCIDENT, 2.0, CUTOFF):
        assert_same(kept, structure, cutoff)
    assert kept.made == 1


def test_coincident_atoms_are_found_through_it() -> None:
    kept, structure = VerletList(CUTOFF, 0.5), gas(ALL)
    structure.check(None, kept)
    meeting = structure.positions.copy()
    meeting[7] = meeting[4] + CELL[1]
    with pytest.raises(StructureError, match="atoms 4 and 7 at the same place"):
        replace(structure, positions=meeting).check(None, kept)


def test_nonsense_is_refused() -> None:
    for cutoff, skin in [(0.0, 0.5), (np.nan, 0.5), (3.0, -0.1), (3.0, np.inf)]:
        with pytest.raises(UsageError, match="is not a"):
            VerletList(cutoff, skin)
    with pytest.raises(UsageError, match=r"up to 3\.5"):
        VerletList(CUTOFF)(gas(ALL), 3.6)


def test_the_library_is_the_one_asked_for(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With vesin, where it is installed, no list is made by the slow way."""
    import fxpass.structures as module

    called = []
    monkeypatch.setattr(module, "neighbour_list", lambda *a: called.append(a) or neighbour_list(*a))
    VerletList(CUTOFF)(gas(ALL), CUTOFF)
    try:
        import vesin  # noqa: F401
    except ModuleNotFoundError:
        library = "fallback"
    assert len(called) == (library == "fallback")
