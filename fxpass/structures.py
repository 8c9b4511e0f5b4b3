"""Atomic structures and what a model says about them; files, neighbour lists, and structures to probe models with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import MissingExtraError, StructureError, UsageError

if TYPE_CHECKING:
    from ase import Atoms

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_TABLE = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu "
    "Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr "
    "Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
SYMBOLS = _TABLE.split()  # by atomic number; X is ASE's dummy atom
COINCIDENT = 1e-6  # Angstrom; atoms nearer than this have no defined force on each other
MAX_BINS = 2**20  # an axis, so that the number of a bin fits into int64


@dataclass(frozen=True, eq=False)
class Structure:
    """Atoms in space.

    The arrays are copied and converted on construction; ``check`` says whether they make sense.

    Attributes:
        numbers: atomic numbers, int64 ``[n]``.
        positions: float64 ``[n, 3]``, Angstrom.
        cell: the cell vectors as rows, float64 ``[3, 3]``, Angstrom; zeros if isolated.
        pbc: which cell vectors are periodic.
        name: how messages and receipts call the structure.
        head: the head of a multi-head model that evaluates it, ``None`` for the model's default.

    Raises:
        StructureError: something is not an array of numbers.
    """

    numbers: Integers
    positions: Floats
    cell: Floats
    pbc: tuple[bool, bool, bool]
    name: str = "structure"
    head: str | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "numbers", np.array(self.numbers, dtype=np.int64))
            object.__setattr__(self, "positions", np.array(self.positions, dtype=np.float64))
            object.__setattr__(self, "cell", np.array(self.cell, dtype=np.float64))
            object.__setattr__(self, "pbc", tuple(bool(periodic) for periodic in self.pbc))
        except (OverflowError, TypeError, ValueError) as error:
            raise StructureError(f"{self.name} is not made of arrays of numbers: {error}.") from error

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def volume(self) -> float:
        """Volume of the cell in Angstrom^3; 0 where a cell vector is missing."""
        return float(abs(np.linalg.det(self.cell)))

    def check(self, known_numbers: Iterable[int] | None = None, neighbours: Neighbours | None = None) -> None:
        """Refuse what no model can evaluate.

        Args:
            known_numbers: atomic numbers that the model knows; ``None`` for all elements.
            neighbours: what lists the pairs of atoms; ``None`` for :func:`neighbour_list`.

        Raises:
            StructureError: wrong shapes, no atoms, NaN or infinite coordinates, a missing or degenerate
                periodic cell vector, an unknown species, two atoms at the same place.
        """
        n = self.numbers.size
        if n == 0:
            raise StructureError(f"{self.name} has no atoms.")
        if self.numbers.shape != (n,) or self.positions.shape != (n, 3) or self.cell.shape != (3, 3):
            shapes = f"numbers {self.numbers.shape}, positions {self.positions.shape}, cell {self.cell.shape}"
            raise StructureError(f"{self.name} has {shapes}; it needs [n], [n, 3] and [3, 3].")
        if len(self.pbc) != 3:
            raise StructureError(f"{self.name} has {len(self.pbc)} periodicity flags; it needs 3.")
        bad = np.flatnonzero(~np.isfinite(self.positions).all(axis=1))
        if bad.size:
            raise StructureError(f"{self.name} has NaN or infinite positions, first at atom {bad[0]}.")
        if not np.isfinite(self.cell).all():
            raise StructureError(f"{self.name} has NaN or infinite cell vectors.")
        self._check_periodic_vectors()
        known = set(range(1, len(SYMBOLS))) if known_numbers is None else {int(z) for z in known_numbers}
        unknown = sorted(set(self.numbers.tolist()) - known)
        if unknown:
            names = "elements" if known_numbers is None else _symbols(known)
            raise StructureError(f"{self.name} has the unknown species {_symbols(unknown)}; known are {names}.")
        pairs, _ = (neighbours or neighbour_list)(self, COINCIDENT)
        if pairs.size:
            i, j = sorted(pairs[:, 0].tolist())
            raise StructureError(f"{self.name} has atoms {i} and {j} at the same place.")

    def _check_periodic_vectors(self) -> None:
        vectors = self.cell[list(self.pbc)]
        lengths = np.linalg.norm(vectors, axis=1)
        if (lengths < COINCIDENT).any():
            raise StructureError(
                f"{self.name} is periodic along a cell vector of length zero.",
                hint="give the cell (Lattice= in extended XYZ), or switch periodicity off along that vector.",
            )
        if len(vectors) and np.linalg.svd(vectors / lengths[:, None], compute_uv=False).min() < 1e-6:
            raise StructureError(f"{self.name} has a degenerate cell: its periodic vectors are linearly dependent.")

    @classmethod
    def from_ase(cls, atoms: Atoms, name: str = "structure") -> Structure:
        """The structure of an ``ase.Atoms``; ``atoms.info["head"]`` is its head."""
        head = atoms.info.get("head")
        return cls(atoms.numbers, atoms.positions, atoms.cell.array, tuple(atoms.pbc), name, head)

    def to_ase(self) -> Atoms:
        """This structure as ``ase.Atoms``.

        Raises:
            MissingExtraError: ase is not installed.
        """
        try:
            from ase import Atoms
        except ImportError as error:
            raise _missing_ase("convert a structure to ase.Atoms") from error
        info = {} if self.head is None else {"head": self.head}
        return Atoms(numbers=self.numbers, positions=self.positions, cell=self.cell, pbc=self.pbc, info=info)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model says about one structure.

    Attributes:
        energy: total energy, eV.
        forces: ``[n, 3]``, eV/Angstrom.
        stress: ``[3, 3]``, eV/Angstrom^3, the derivative of the energy by strain over the volume (tension is
            positive, as in ASE); ``None`` where the model or the structure has none.
        dtype: element type in which the model computed, e.g. ``"float32"``; the numbers here are float64.
    """

    energy: float
    forces: Floats
    stress: Floats | None = None
    dtype: str = "float64"


Evaluator = Callable[[Structure], Evaluation]
#: makes neighbour lists: (structure, cutoff in Angstrom) -> (edge_index, unit_shifts), as :func:`neighbour_list` does
Neighbours = Callable[[Structure, float], tuple[Integers, Floats]]


def _symbols(numbers: Iterable[int]) -> str:
    return ", ".join(SYMBOLS[z] if 0 < z < len(SYMBOLS) else f"number {z}" for z in sorted(numbers))


def _missing_ase(purpose: str) -> MissingExtraError:
    return MissingExtraError(f"ase is needed to {purpose}.", hint='pip install "fxpass[ase]"')


# Files


# What the readers raise on a file that is not what its name says; each format of ASE has its own habits.
_READER_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, OSError),
    *(RuntimeError, StopIteration, SyntaxError, TypeError, ValueError),
)


def read_structures(path: str | Path, index: str | int = ":") -> list[Structure]:
    """Read structures from a file; they are called ``FILE[FRAME]``.

    ``.xyz`` and ``.extxyz`` are read here, every other format by ASE.

    Args:
        path: the file.
        index: which frames: a number or a slice, as in Python, e.g. ``-1`` or ``"::10"``.

    Raises:
        StructureError: the file is missing, cannot be read, or has no such frames.
        UsageError: ``index`` is neither a number nor a slice.
        MissingExtraError: the format needs ASE and it is not installed.
    """
    path = Path(path)
    frames = _as_slice(index)
    if not path.is_file():
        raise StructureError(f"There is no structure file {path}.")
    reader = _read_xyz if path.suffix.lower() in (".xyz", ".extxyz") else _read_with_ase
    counts_forward = frames.stop is not None and min(frames.start or 0, frames.stop, frames.step or 1) >= 0
    structures = list(islice(reader(path), frames.stop if counts_forward else None))[frames]
    if not structures:
        raise StructureError(f"{path} has no frames {index!r}.")
    return structures


def _as_slice(index: str | int) -> slice:
    parts = str(index).strip().split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
        if len(parts) == 1:
            first = int(parts[0])
            return slice(first, first + 1 or None)
        if len(parts) <= 3 and 0 not in numbers[2:]:
            return slice(*numbers)
    except ValueError:
        pass
    raise UsageError(f"{index!r} does not select frames.", hint='a number or a slice, such as -1, ":" or "::10".')


def _read_with_ase(path: Path) -> Iterator[Structure]:
    try:
        from ase.io import iread
        from ase.io.formats import UnknownFileTypeError
    except ImportError as error:
        raise _missing_ase(f"read {path}") from error
    try:
        for i, atoms in enumerate(iread(path, ":")):
            yield Structure.from_ase(atoms, f"{path.name}[{i}]")
    except (*_READER_ERRORS, UnknownFileTypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StructureError(f"{path} cannot be read by ASE as structures: {reason}.") from error


_XYZ_FIELD = re.compile(r'(\w+)=("[^"]*"|\{[^}]*\}|\[[^=]*\](?=\s|$)|\S+)')


def _read_xyz(path: Path) -> Iterator[Structure]:
    """Frames of an extended XYZ file: ``Lattice``, ``Properties``, ``pbc`` and ``head`` are read, the rest skipped."""
    i = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    count, comment = int(line), next(lines, "")
                    yield _xyz_frame([row.split() for row in islice(lines, count)], count, comment, f"{path.name}[{i}]")
                    i += 1
    except (LookupError, OSError, ValueError) as error:
        raise StructureError(f"{path} cannot be read as extended XYZ, frame {i}: {error}.") from error


def _xyz_frame(rows: list[list[str]], count: int, comment: str, name: str) -> Structure:
    if len(rows) < count:
        raise ValueError(f"it ends after {len(rows)} of {count} atoms")
    fields = {key.lower(): value.strip('"') for key, value in _XYZ_FIELD.findall(comment)}
    layout = fields.get("properties", "species:S:1:pos:R:3").split(":")
    column, start = {}, 0
    for key, width in zip(layout[::3], layout[2::3], strict=True):
        column[key.lower()] = start
        start += int(width)
    kind = column.get("species", column.get("z"))
    if kind is None or "pos" not in column:
        raise ValueError("its Properties need species (or Z) and pos")
    species = [row[kind] for row in rows]
    numbers = [int(s) if s.isdigit() else SYMBOLS.index(s.capitalize()) for s in species]
    positions = [row[column["pos"] : column["pos"] + 3] for row in rows]
    cell = np.array(_words(fields.get("lattice", "0 " * 9)), dtype=float).reshape(3, 3)
    default = "T T T" if "lattice" in fields else "F F F"
    pbc = tuple(word[0] in "Tt1" for word in _words(fields.get("pbc", default)))
    return Structure(
        np.array(numbers, dtype=np.int64),
        np.array(positions, dtype=float).reshape(count, 3),
        cell,
        pbc,  # type: ignore[arg-type]  # three or not is for check() to say
        name,
        fields.get("head"),
    )


def _words(value: str) -> list[str]:
    return re.findall(r"[^\s,\[\]{}\"]+", value)


# Neighbours


def neighbour_list(structure: Structure, cutoff: float) -> tuple[Integers, Floats]:
    """All pairs of atoms nearer than a cutoff, periodic images included, in linear time.

    ``positions[receiver] - positions[sender] + unit_shift @ cell`` is the vector of an edge; its length is
    strictly below ``cutoff``. Both directions of a pair are listed; an atom is paired with itself only
    through periodic images. Edges are sorted by receiver, then sender, then shift.

    Atoms are binned into boxes at least a cutoff wide (Quentrec and Brot, J. Comput. Phys. 13, 430 (1973)), or
    into one box an axis where the cell is narrower and more than one image is within reach.

    Args:
        structure: any structure that passes ``Structure.check``.
        cutoff: Angstrom.

    Returns:
        ``(edge_index, unit_shifts)``: int64 ``[2, edges]`` (sender, receiver) and float64 ``[edges, 3]``, whole
        numbers, 0 along vectors that are not periodic.

    Raises:
        UsageError: the cutoff is not a positive length.
    """
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise UsageError(f"A cutoff of {cutoff} Angstrom is not a positive length.")
    positions, periodic = structure.positions, np.array(structure.pbc)
    reach = cutoff + 1e-9  # so that rounding in fractional coordinates loses no pair

    # Coordinates in units of the periodic vectors and, along the rest, of unit vectors normal to them.
    basis = _basis(structure)
    inverse = np.linalg.inv(basis)
    fractional = positions @ inverse
    origin = np.where(periodic, 0.0, fractional.min(axis=0))
    extent = np.where(periodic, 1.0, fractional.max(axis=0) - origin)
    wraps = np.where(periodic, np.floor(fractional), 0.0).astype(np.int64)
    inside = fractional - wraps - origin

    width = extent / np.linalg.norm(inverse, axis=0)  # distance between opposite faces of the binned region
    bins = np.clip(width // reach, 1, MAX_BINS).astype(np.int64)
    within_reach = np.where(periodic, np.ceil(reach / width.clip(min=COINCIDENT)), 0)
    images = np.where(bins > 1, 1, within_reach).astype(np.int64)
    box = np.minimum(inside * (bins / np.where(extent > 0, extent, 1.0)), bins - 1).astype(np.int64)

    strides = np.array([bins[1] * bins[2], bins[2], 1])
    key = box @ strides
    order = np.argsort(key, kind="stable")
    sorted_key = key[order]
    found = []
    for offset in product(*(range(-m, m + 1) for m in images.tolist())):
        target = box + np.array(offset)
        image = np.where(periodic, target // bins, 0)
        target -= image * bins
        senders = np.flatnonzero(((target >= 0) & (target < bins)).all(axis=1))
        target_key = target[senders] @ strides
        first = np.searchsorted(sorted_key, target_key, side="left")
        counts = np.searchsorted(sorted_key, target_key, side="right") - first
        sender = np.repeat(senders, counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        receiver = order[np.repeat(first, counts) + within]
        shift = image[sender] + wraps[sender] - wraps[receiver]
        pairs = np.stack([sender, receiver])
        squares = _squared_lengths(positions, pairs, _offsets(shift, structure.cell))
        near = (squares < cutoff * cutoff) & ((sender != receiver) | shift.any(axis=1))
        found.append(np.column_stack([sender, receiver, shift])[near])
    edges = np.concatenate(found)
    return _in_order(edges[:, :2].T, edges[:, 2:])


def _basis(structure: Structure) -> Floats:
    """The periodic cell vectors, and unit vectors normal to them and to each other in place of the rest."""
    basis, periodic = structure.cell.copy(), np.array(structure.pbc)
    basis[~periodic] = np.linalg.svd(basis[periodic])[2][periodic.sum() :]
    return basis


def _offsets(shifts: NDArray[Any], cell: Floats) -> Floats:
    """Cartesian components [3, edges] of shifts [edges, 3] in units of the cell vectors."""
    # Written out, not a matrix product: the edge i -> j is kept exactly when j -> i is.
    return np.stack([shifts[:, 0] * a + shifts[:, 1] * b + shifts[:, 2] * c for a, b, c in cell.T])


def _squared_lengths(positions: Floats, edges: Integers, offsets: Floats) -> Floats:
    """Squared lengths [edges] of the vectors from senders to receivers, plus offsets [3, edges]."""
    squares = np.zeros(edges.shape[1])
    for x, offset in zip(np.ascontiguousarray(positions.T), offsets, strict=True):
        along = x.take(edges[1])
        along -= x.take(edges[0])
        along += offset
        along *= along
        squares += along
    return squares


def _in_order(edges: Integers, shifts: NDArray[Any]) -> tuple[Integers, Floats]:
    """Edges [2, edges] and shifts [edges, 3] sorted by receiver, then sender, then shift."""
    order = np.lexsort((*shifts.T[::-1], edges[0], edges[1]))
    return edges.take(order, axis=1), shifts.take(order, axis=0).astype(np.float64)


class VerletList:
    """Neighbour lists of structures that follow one another, with a skin: as a function, :func:`neighbour_list`.

    It returns **the same arrays**, element by element and in the same order, so a model's results are the same bits.
    Pairs within the cutoff and a skin are kept, and every call picks those that are within the cutoff now
    (Verlet, Phys. Rev. 159, 98 (1967)).  They are listed anew where an atom has moved further than half the skin
    since, and where the cell, the periodicity or the number of atoms has changed.

    ``vesin`` makes the list of pairs where it is installed, :func:`neighbour_list` elsewhere.

    Args:
        cutoff: the longest cutoff that will be asked for, Angstrom.
        skin: Angstrom.  A thick one costs more pairs each step, a thin one more lists; 0 makes a list whenever an
            atom moves.

    Attributes:
        made: how many lists of pairs were made.

    Raises:
        UsageError: a cutoff or skin that is no length, when it is made; a longer cutoff, when it is called.
    """

    def __init__(self, cutoff: float, skin: float = 0.5) -> None:
        if not (np.isfinite(cutoff) and cutoff > 0):
            raise UsageError(f"A cutoff of {cutoff} Angstrom is not a positive length.")
        if not (np.isfinite(skin) and skin >= 0):
            raise UsageError(f"A skin of {skin} Angstrom is not a length.", hint="0.5, or 0 for none")
        self.cutoff = cutoff
        self.skin = skin
        self.made = 0
        self._pairs: _Pairs | None = None
        self._measured: tuple[Floats, Floats] | None = None

    def __call__(self, structure: Structure, cutoff: float) -> tuple[Integers, Floats]:
        if not 0 < cutoff <= self.cutoff:
            raise UsageError(f"This list is for cutoffs up to {self.cutoff} Angstrom, not {cutoff}.")
        pairs = self._pairs
        if pairs is None or not pairs.cover(structure, self.skin):
            self._pairs = pairs = _Pairs.of(structure, self.cutoff + self.skin)
            self._measured = None
            self.made += 1
        if self._measured is None or not np.array_equal(self._measured[0], structure.positions):
            squares = _squared_lengths(structure.positions, pairs.edges, pairs.offsets)
            self._measured = structure.positions.copy(), squares
        near = np.flatnonzero(self._measured[1] < cutoff * cutoff)
        return pairs.edges.take(near, axis=1), pairs.shifts.take(near, axis=0)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """All pairs of atoms that were nearer than some length when the atoms were at ``positions``."""

    positions: Floats
    cell: Floats
    pbc: tuple[bool, bool, bool]
    edges: Integers
    shifts: Floats
    offsets: Floats

    @classmethod
    def of(cls, structure: Structure, reach: float) -> _Pairs:
        edges, shifts = _list_pairs(structure, reach + 1e-9)
        cell = structure.cell.copy()
        return cls(structure.positions.copy(), cell, structure.pbc, edges, shifts, _offsets(shifts, cell))

    def cover(self, structure: Structure, skin: float) -> bool:
        """Whether every pair that is within the reach less the skin now is one of these."""
        same = structure.pbc == self.pbc and np.array_equal(structure.cell, self.cell)
        if not same or structure.positions.shape != self.positions.shape:
            return False
        moved = structure.positions - self.positions
        return bool(np.einsum("ij,ij->i", moved, moved).max() <= (0.5 * skin) ** 2)


def _list_pairs(structure: Structure, reach: float) -> tuple[Integers, Floats]:
    """``neighbour_list``, made by vesin where it is installed; pairs that are as long as ``reach`` may differ."""
    try:
        from vesin import NeighborList
    except ModuleNotFoundError:
        return neighbour_list(structure, reach)
    find = NeighborList(cutoff=reach, full_list=True, n_threads=1)  # the model's threads are not spun for this
    pairs, shifts = find.compute(structure.positions, _basis(structure), np.array(structure.pbc), "PS")
    return _in_order(pairs.T.astype(np.int64), shifts)


# Structures to compare models on

# Conventional cell of the fcc lattice, in units of its lattice constant.
FCC = np.array([[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
# A compact cluster without any symmetry once it is rattled, in units of the nearest neighbour distance.
BIPYRAMID = np.array([[0.58, 0, 0], [-0.29, 0.5, 0], [-0.29, -0.5, 0], [0, 0, 0.82], [0, 0, -0.82]])
COVALENT = {1: 0.31, 5: 0.84, 6: 0.76, 7: 0.71, 8: 0.66, 9: 0.57}  # Angstrom, by atomic number
STRAIN = np.array([[1.04, 0.06, -0.03], [0.0, 0.95, 0.05], [0.0, 0.0, 1.03]])


def probes_of(facts: Mapping[str, Any]) -> tuple[Structure, ...]:
    """Structures to probe a model with: those that its facts name (``"structures"``), else :func:`probe_structures`.

    A force field with fixed bonds is for the atoms that it was made for, and says which these are.  A model whose facts
    say ``"molecules"`` is probed with a :func:`liquid` too: what it makes of lengths is steepest where they are short.
    """
    if own := facts.get("structures"):
        return tuple(Structure(s["numbers"], s["positions"], s["cell"], s["pbc"], s["name"]) for s in own)
    probes = probe_structures(facts["numbers"], facts["cutoff"])
    return (*probes, liquid(facts["numbers"])) if facts.get("molecules") else probes


def liquid(numbers: Iterable[int]) -> Structure:
    """Eight molecules of three atoms at the length of their bonds, turned at random, as close as their bonds allow.

    Bonds are sums of covalent radii (Cordero et al., Dalton Trans. 2008, 2832), of 1.2 Angstrom where an element is not
    among those that organic molecules are made of.
    """
    rng = np.random.default_rng(0)
    species = cycle(rng.permutation(np.unique(np.array(list(numbers), dtype=np.int64))).tolist())
    taken = np.array(list(islice(species, 24)), dtype=np.int64)
    radii = np.array([COVALENT.get(int(z), 1.2) for z in taken]).reshape(8, 3)
    turns, _ = np.linalg.qr(rng.normal(size=(8, 3, 3)))
    bonds = np.stack([np.zeros(8), radii[:, 0] + radii[:, 1], radii[:, 0] + radii[:, 2]], axis=1)
    side = max(3.1, 2 * bonds.max() + 0.9)  # that leaves this much between the nearest ends of two molecules
    corners = side * np.stack(np.meshgrid(*[np.arange(2)] * 3, indexing="ij"), axis=-1).reshape(8, 3)
    angle = np.deg2rad(104.5)
    directions = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [np.cos(angle), np.sin(angle), 0.0]])
    placed = corners[:, None, :] + (bonds[:, :, None] * directions) @ turns
    return Structure(taken, placed.reshape(-1, 3), 2 * side * np.eye(3), (True, True, True), "liquid")


def probe_structures(numbers: Iterable[int], cutoff: float) -> tuple[Structure, ...]:
    """Six small structures, the same at every call, that together reach every path of a model.

    ``alloy``: 12 atoms, periodic, in a cell thinner than the cutoff; ``cluster``: 5 atoms, isolated;
    ``slab``: 5 atoms, periodic along two vectors; ``atom``: a single atom without edges; ``dimer``: two atoms
    just inside the cutoff; ``triclinic``: 4 atoms in a strained cell. Lattices and cluster are rattled, so no
    force vanishes by symmetry. Nearest neighbours are about 2.5 Angstrom apart, or 0.55 cutoffs where that is
    less. The species take turns, so up to 29 species all appear.

    Args:
        numbers: atomic numbers that the model knows.
        cutoff: of the model, Angstrom.

    Raises:
        UsageError: no species, or a cutoff that is not a positive length.
    """
    known = np.unique(np.array(list(numbers), dtype=np.int64))
    if not known.size:
        raise UsageError("Probe structures need at least one species.")
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise UsageError(f"A cutoff of {cutoff} Angstrom is not a positive length.")
    rng = np.random.default_rng(0)
    species = cycle(rng.permutation(known).tolist())
    near = min(2.5, 0.55 * cutoff)
    a = near * np.sqrt(2.0)

    def structure(
        name: str,
        positions: Floats,
        cell: Floats | None = None,
        pbc: tuple[bool, bool, bool] = (False, False, False),
        rattle: float = 0.06,
    ) -> Structure:
        placed = positions + rng.normal(scale=rattle * near, size=positions.shape)
        taken = np.array(list(islice(species, len(positions))), dtype=np.int64)
        return Structure(taken, placed, np.zeros((3, 3)) if cell is None else cell, pbc, name)

    row = np.concatenate([FCC + np.array([i, 0, 0]) for i in range(3)])
    layers = np.concatenate([FCC, [[0.5, 0.5, 1.0]]])  # two layers and an adatom
    dimer = np.array([[0.0, 0.0, 0.0], [1.0, 2.0, -2.0]]) / 3.0
    return (
        structure("alloy", a * row, a * np.diag([3.0, 1.0, 1.0]), (True, True, True)),
        structure("cluster", near * BIPYRAMID),
        structure("slab", a * layers, a * np.diag([1.0, 1.0, 4.0]), (True, True, False)),
        structure("atom", np.zeros((1, 3))),
        structure("dimer", 0.97 * cutoff * dimer, rattle=0.0),
        structure("triclinic", a * FCC @ STRAIN, a * STRAIN, (True, True, True)),
    )
