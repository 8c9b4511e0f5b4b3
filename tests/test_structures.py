"""Structures: validation, files, neighbour lists, probe structures."""

from __future__ import annotations

import builtins
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxpass.errors import FxpassError, MissingExtraError, StructureError, UsageError
from fxpass.structures import SYMBOLS, Floats, Structure, liquid, neighbour_list, probe_structures, read_structures

pytestmark = pytest.mark.once

ISOLATED, PERIODIC = (False, False, False), (True, True, True)


def copper(positions: Any, cell: Any = None, pbc: tuple[bool, bool, bool] = ISOLATED) -> Structure:
    positions = np.array(positions, dtype=float).reshape(-1, 3)
    return Structure(np.full(len(positions), 29), positions, np.zeros((3, 3)) if cell is None else cell, pbc)


def test_arrays_are_converted_and_copied() -> None:
    positions = np.zeros((1, 3), dtype=np.float32)
    structure = Structure([29], positions, np.eye(3, dtype=int), [1, 0, 1])  # type: ignore[arg-type]
    positions += 1
    assert structure.numbers.dtype == np.int64
    assert structure.positions.dtype == structure.cell.dtype == np.float64
    assert not structure.positions.any()
    assert structure.pbc == (True, False, True)
    assert (len(structure), structure.volume) == (1, 1.0)


GOOD = copper([[0, 0, 0], [1.8, 1.8, 0]], np.eye(3) * 3.6, PERIODIC)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (lambda: replace(GOOD, numbers=[], positions=np.zeros((0, 3))), "no atoms"),
        (lambda: replace(GOOD, numbers=[29]), r"numbers \(1,\), positions \(2, 3\)"),
        (lambda: replace(GOOD, cell=np.zeros(3)), r"cell \(3,\)"),
        (lambda: replace(GOOD, pbc=(True, True)), "2 periodicity flags"),
        (lambda: replace(GOOD, positions=[[0, 0, 0], [0, np.nan, 0]]), "NaN or infinite positions, first at atom 1"),
        (lambda: replace(GOOD, positions=[[np.inf, 0, 0], [0, 0, 0]]), "NaN or infinite positions, first at atom 0"),
        (lambda: replace(GOOD, cell=np.full((3, 3), np.inf)), "NaN or infinite cell"),
        (lambda: replace(GOOD, cell=np.diag([3.6, 3.6, 0.0])), "cell vector of length zero"),
        (lambda: replace(GOOD, cell=[[3, 0, 0], [0, 3, 0], [3, 3, 0]]), "degenerate cell"),
        (lambda: replace(GOOD, numbers=[29, 119]), "unknown species number 119"),
        (lambda: replace(GOOD, numbers=[0, 29]), "unknown species number 0"),
        (lambda: replace(GOOD, positions=np.zeros((2, 3))), "atoms 0 and 1 at the same place"),
        (lambda: replace(GOOD, positions=[[0, 0, 1], [3.6, -7.2, 1]]), "atoms 0 and 1 at the same place"),
        (lambda: replace(GOOD, numbers=["Cu", "Cu"]), "not made of arrays of numbers"),
        (lambda: replace(GOOD, positions=[[0, 0, 0], [0, 0]]), "not made of arrays of numbers"),
    ],
)
def test_nonsense_is_refused(bad: Callable[[], Structure], complaint: str) -> None:
    with pytest.raises(StructureError, match=complaint) as caught:
        bad().check()
    assert "\n" not in str(caught.value)


def test_sense_is_accepted() -> None:
    GOOD.check()
    GOOD.check(known_numbers=[28, 29])
    replace(GOOD, cell=np.diag([3.6, 3.6, 0.0]), pbc=(True, True, False)).check()
    replace(GOOD, positions=[[0, 0, 0], [3.6, 0, 0]], pbc=ISOLATED).check()  # one place only if it were periodic


def test_unknown_species_are_listed_with_the_known_ones() -> None:
    with pytest.raises(StructureError, match=r"unknown species O, Cu; known are H, Au"):
        replace(GOOD, numbers=[8, 29]).check(known_numbers=[79, 1])


# Files


XYZ = """2
Lattice="4 0 0 0 5 0 1 0 6" Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.5 note="pbc=F F F" pbc="T F T" head=pbe
Cu 0.5 0.25 0 1 2 3
au 1.0 2.0 -3.0 0 0 0
1

29 7 8 9
1
Properties=id:I:1:pos:R:3:Z:I:1 Lattice={3 0 0 0 3 0 0 0 3} REF_stress="_JSON [[0.1, 0.2], [0.3]]"
1 1.0 1.5 2.0 13

"""


def test_extended_xyz(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(XYZ)
    first, second, third = read_structures(path)
    assert [s.name for s in (first, second, third)] == ["a.xyz[0]", "a.xyz[1]", "a.xyz[2]"]
    assert first.numbers.tolist() == [29, 79]
    assert first.positions.tolist() == [[0.5, 0.25, 0], [1, 2, -3]]
    assert first.cell.tolist() == [[4, 0, 0], [0, 5, 0], [1, 0, 6]]
    assert (first.pbc, first.head) == ((True, False, True), "pbe")
    assert (second.numbers.tolist(), second.positions.tolist(), second.pbc) == ([29], [[7, 8, 9]], ISOLATED)
    assert not second.cell.any() and second.head is None
    assert (third.numbers.tolist(), third.positions.tolist(), third.pbc) == ([13], [[1, 1.5, 2]], PERIODIC)
    assert third.cell.tolist() == (3 * np.eye(3)).tolist()


@pytest.mark.parametrize(
    ("index", "frames"),
    [(":", [0, 1, 2]), (0, [0]), ("-1", [2]), ("1:", [1, 2]), ("::2", [0, 2]), ("2:0:-1", [2, 1]), ("-2:", [1, 2])],
)
def test_index_selects_frames(tmp_path: Path, index: str | int, frames: list[int]) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(XYZ)
    assert [s.name for s in read_structures(path, index)] == [f"a.xyz[{i}]" for i in frames]


def test_frames_after_the_last_wanted_one_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(XYZ + "not a frame\n")
    assert len(read_structures(path, "0:2")) == 2
    with pytest.raises(StructureError, match="frame 3"):
        read_structures(path, ":")


@pytest.mark.parametrize("index", ["", "x", "1:2:3:4", "::0", "1.5"])
def test_an_index_that_selects_nothing_is_refused(tmp_path: Path, index: str) -> None:
    with pytest.raises(UsageError, match="does not select frames"):
        read_structures(tmp_path / "a.xyz", index)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.xyz", None, "no structure file"),
        ("a.xyz", b"", "no frames"),
        ("a.xyz", b"hello\nworld\n", "cannot be read as extended XYZ, frame 0"),
        ("a.xyz", b"\x80\x02\xff", "cannot be read as extended XYZ"),
        ("a.xyz", b"3\n\nCu 0 0 0\n", "ends after 1 of 3 atoms"),
        ("a.xyz", b"1\n\nZz 0 0 0\n", "Zz"),
        ("a.xyz", b"1\n\nCu 0 0\n", "frame 0"),
        ("a.xyz", b'1\nLattice="1 2 3"\nCu 0 0 0\n', "frame 0"),
        ("a.xyz", b"1\nProperties=species:S:1:forces:R:3\nCu 0 0 0\n", "need species"),
        ("a.cif", b"hello\n", "cannot be read by ASE|no frames"),
        ("a.model", b"PK\x03\x04", "cannot be read by ASE"),
        ("a.vasp", b"\x00\x01\x02", "cannot be read by ASE"),
    ],
)
def test_a_bad_file_is_one_paragraph(tmp_path: Path, name: str, content: bytes | None, complaint: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StructureError, match=complaint) as caught:
        read_structures(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def random_alloy() -> Structure:
    rng = np.random.default_rng(0)
    cell = rng.normal(size=(3, 3)) + 5 * np.eye(3)
    return Structure(rng.choice([28, 29], 7), rng.random((7, 3)) @ cell, cell, (True, False, True), "x", "pbe")


def test_ase_round_trip() -> None:
    structure = random_alloy()
    back = Structure.from_ase(structure.to_ase(), "y")
    for field in ("numbers", "positions", "cell"):
        assert np.array_equal(getattr(back, field), getattr(structure, field))
    assert (back.pbc, back.head, back.name) == (structure.pbc, "pbe", "y")


def test_both_readers_agree(tmp_path: Path) -> None:
    from ase.io import write

    atoms = [random_alloy().to_ase(), probe_structures([29], 5.0)[1].to_ase()]
    atoms[0].set_array("forces", np.ones((7, 3)))
    for name in ("a.extxyz", "a.traj"):
        write(tmp_path / name, atoms)
    ours, theirs = read_structures(tmp_path / "a.extxyz"), read_structures(tmp_path / "a.traj")
    assert [s.name for s in theirs] == ["a.traj[0]", "a.traj[1]"]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.numbers.tolist(), a.pbc) == (b.numbers.tolist(), b.pbc)
        assert np.allclose(a.positions, b.positions, atol=1e-7, rtol=0)
        assert np.allclose(a.cell, b.cell, atol=1e-7, rtol=0)
    assert [s.name for s in read_structures(tmp_path / "a.traj", -1)] == ["a.traj[1]"]


def test_symbols_are_those_of_ase() -> None:
    from ase.data import chemical_symbols

    assert chemical_symbols == SYMBOLS


def test_without_ase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ase"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without_ase(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "ase":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_ase)
    (tmp_path / "a.xyz").write_text(XYZ)
    (tmp_path / "a.cif").write_text("")
    assert len(read_structures(tmp_path / "a.xyz")) == 3
    for attempt in (lambda: read_structures(tmp_path / "a.cif"), GOOD.to_ase):
        with pytest.raises(MissingExtraError, match=r'pip install "fxpass\[ase\]"'):
            attempt()


# Neighbours


def brute_force(structure: Structure, cutoff: float) -> set[tuple[int, ...]]:
    """Every pair and image within reach, by trying all images that can matter."""
    periodic = list(structure.pbc)
    reach = [0, 0, 0]
    if any(periodic):
        # Rows of the pseudo-inverse are normal to the other periodic vectors: heights of the cell, any periodicity.
        vectors = structure.cell[periodic]
        height = 1 / np.linalg.norm(np.linalg.pinv(vectors), axis=0)
        spread = np.ptp(structure.positions @ np.linalg.pinv(vectors), axis=0)
        for axis, m in zip(np.flatnonzero(periodic), np.ceil(cutoff / height + spread), strict=True):
            reach[axis] = int(m) + 1
    found = set()
    for shift in product(*(range(-m, m + 1) for m in reach)):
        vectors = structure.positions[None] - structure.positions[:, None] + np.array(shift) @ structure.cell
        for i, j in np.argwhere(np.linalg.norm(vectors, axis=2) < cutoff):
            if i != j or any(shift):
                found.add((int(i), int(j), *shift))
    return found


def listed(structure: Structure, cutoff: float) -> list[tuple[int, ...]]:
    edges, shifts = neighbour_list(structure, cutoff)
    assert (edges.dtype, shifts.dtype) == (np.int64, np.float64)
    assert edges.shape == (2, len(shifts)) and shifts.shape == (len(shifts), 3)
    return [tuple(row) for row in np.column_stack([edges.T, shifts.astype(int)]).tolist()]


@pytest.mark.parametrize("pbc", list(product([False, True], repeat=3)))
@pytest.mark.parametrize("seed", range(8))
def test_neighbours_are_those_of_brute_force(pbc: tuple[bool, bool, bool], seed: int) -> None:
    rng = np.random.default_rng([seed, *pbc])
    cell = rng.normal(size=(3, 3)) + rng.uniform(1.5, 6.0) * np.linalg.qr(rng.normal(size=(3, 3)))[0]
    if seed % 2:
        cell[~np.array(pbc)] = 0.0
    # Some atoms lie several cells away from the first.
    structure = copper(rng.normal(scale=6.0, size=(int(rng.integers(1, 9)), 3)), cell, pbc)
    cutoff = float(rng.uniform(1.0, 5.0))
    edges = listed(structure, cutoff)
    assert len(edges) == len(set(edges))
    assert set(edges) == brute_force(structure, cutoff)


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_are_those_of_ase(seed: int) -> None:
    from ase.neighborlist import neighbor_list

    rng = np.random.default_rng(seed)
    cell = rng.normal(scale=2.0, size=(3, 3)) + 12 * np.eye(3)
    structure = copper(rng.random((150, 3)) @ cell * 1.5, cell, PERIODIC if seed % 2 else (True, False, True))
    i, j, shift = neighbor_list("ijS", structure.to_ase(), 4.0, self_interaction=False)
    assert set(listed(structure, 4.0)) == {tuple(row) for row in np.column_stack([i, j, shift]).tolist()}


def test_edges_are_sorted_and_come_in_both_directions() -> None:
    edges = listed(probe_structures([28, 29], 5.0)[5], 5.0)
    assert edges == sorted(edges, key=lambda e: (e[1], e[0], *e[2:]))
    assert {(j, i, -a, -b, -c) for i, j, a, b, c in edges} == set(edges)


def test_edge_vectors_follow_the_convention() -> None:
    structure = copper([[0.5, 0, 0], [9.0, 0, 0]], np.eye(3) * 10, PERIODIC)
    assert listed(structure, 2.0) == [(1, 0, 1, 0, 0), (0, 1, -1, 0, 0)]
    (senders, receivers), shifts = neighbour_list(structure, 2.0)
    vectors = structure.positions[receivers] - structure.positions[senders] + shifts @ structure.cell
    assert np.allclose(vectors, [[1.5, 0, 0], [-1.5, 0, 0]])


def test_the_cutoff_is_strict() -> None:
    pair = copper([[0, 0, 0], [2, 0, 0]])
    assert listed(pair, 2.0) == []
    assert listed(pair, np.nextafter(2.0, 3.0)) == [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0)]
    chain = copper([[0, 0, 0]], np.diag([2.0, 0, 0]), (True, False, False))
    assert listed(chain, 4.0) == [(0, 0, -1, 0, 0), (0, 0, 1, 0, 0)]


@pytest.mark.parametrize(
    "structure",
    [
        copper([[1, 2, 3]]),
        copper([[0, 0, 0], [50, 0, 0]]),
        copper([[0, 0, 0], [1e7, -1e7, 1e7]]),
        copper([[0, 0, 0]], np.eye(3) * 20, PERIODIC),
    ],
)
def test_no_edges(structure: Structure) -> None:
    assert listed(structure, 5.0) == []


def test_an_atom_on_the_boundary_is_not_lost() -> None:
    structure = copper([[-1e-17, 0, 0], [3.9, 0, 0]], np.eye(3) * 4.0, PERIODIC)
    assert set(listed(structure, 1.0)) == {(0, 1, -1, 0, 0), (1, 0, 1, 0, 0)}


def test_bins_are_no_narrower_than_the_cutoff() -> None:
    """Five bins over this row would be 1.98 wide and put atoms 1.982 apart two bins apart."""
    row = copper([[1.98 * k + d, 0, 0] for k in range(6) for d in (-1e-3, 1e-3)])
    for cutoff in (1.97, 1.979, 1.981, 1.99, 2.0):
        assert set(listed(row, cutoff)) == brute_force(row, cutoff)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, np.nan, np.inf])
def test_a_cutoff_is_a_length(cutoff: float) -> None:
    for use in (lambda: neighbour_list(GOOD, cutoff), lambda: probe_structures([29], cutoff)):
        with pytest.raises(UsageError, match="not a positive length"):
            use()


def test_four_thousand_atoms() -> None:
    side = (4000 / 0.085) ** (1 / 3)
    structure = copper(np.random.default_rng(0).random((4000, 3)) * side, np.eye(3) * side, PERIODIC)
    start = time.perf_counter()
    edges, _ = neighbour_list(structure, 5.0)
    assert time.perf_counter() - start < 3.0
    expected = 4000 * 0.085 * 4 / 3 * np.pi * 5.0**3  # of an ideal gas
    assert edges.shape[1] == pytest.approx(expected, rel=0.02)


# Probe structures


@pytest.mark.parametrize("cutoff", [2.5, 5.0, 7.0])
@pytest.mark.parametrize("numbers", [[29], [28, 29, 46, 47, 79], range(1, 90)])
def test_probe_structures(numbers: list[int], cutoff: float) -> None:
    probes = {s.name: s for s in probe_structures(numbers, cutoff)}
    again = probe_structures(numbers, cutoff)
    assert list(probes) == ["alloy", "cluster", "slab", "atom", "dimer", "triclinic"]
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(probes.values(), again, strict=True))
    seen: set[int] = set()
    for name, structure in probes.items():
        structure.check(known_numbers=numbers)
        seen |= set(structure.numbers.tolist())
        edges, _ = neighbour_list(structure, cutoff)
        assert (edges.shape[1] == 0) == (name == "atom")
    assert len(seen) == min(29, len(numbers))
    assert probes["cluster"].pbc == probes["dimer"].pbc == ISOLATED and not probes["cluster"].cell.any()
    assert sorted(probes["slab"].pbc) == [False, True, True]
    assert probes["alloy"].pbc == probes["triclinic"].pbc == PERIODIC
    assert min_angle(probes["triclinic"].cell) > 1.0
    assert np.linalg.norm(probes["dimer"].positions[1] - probes["dimer"].positions[0]) == pytest.approx(0.97 * cutoff)


def min_angle(cell: Floats) -> float:
    """How far, in degrees, the cell is from having any right angle."""
    unit = cell / np.linalg.norm(cell, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(3, 1)]
    return float(np.abs(np.degrees(np.arccos(cosines)) - 90.0).min())


@pytest.mark.parametrize(("numbers", "shortest"), [([1, 8], 0.62), ([1, 6, 7, 8], 0.97), ([14, 29], 2.4)])
def test_a_liquid_has_bonds_of_their_length_and_nothing_nearer(numbers: list[int], shortest: float) -> None:
    structure = liquid(numbers)
    structure.check(numbers)
    assert set(structure.numbers) == set(numbers)
    edges, units = neighbour_list(structure, 6.0)
    vectors = structure.positions[edges[1]] - structure.positions[edges[0]] + units @ structure.cell
    lengths = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(lengths.min(), shortest, atol=0.15)
    assert 10 < edges.shape[1] / len(structure) < 120


def test_probe_structures_need_a_species() -> None:
    with pytest.raises(FxpassError, match="at least one species"):
        probe_structures([], 5.0)
