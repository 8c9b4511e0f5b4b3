"""What a user asks: stress, virials, Hessians, elastic constants, Jacobians, for one structure after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import StructureError, UnsupportedModelError, UsageError, VerificationError
from ..frontends.base import Frontend
from ..ir.program import Program
from ..structures import Floats, Integers, Structure
from .motion import Motion
from .programs import Linear, jacobian, products, spec_of, tables, transposed_jacobian

#: GPa
EV_PER_CUBIC_ANGSTROM = 160.21766208

DIPOLES = ("dipole", "dipoles")
FIELDS = ("field", "electric_field")

Apply = Callable[..., list[Tensor]]


@dataclass(frozen=True, eq=False)
class EdgeForces:
    """What each edge contributes to forces and virial.

    Attributes:
        index: sender and receiver, int64 [2, edges].
        vectors: from sender to receiver, [edges, 3], Angstrom.
        gradients: derivative of the energy by these vectors, [edges, 3], eV/Angstrom: the force on the sender, and
            minus that on the receiver, through this edge.
    """

    index: Integers
    vectors: Floats
    gradients: Floats


class Derivatives:
    """Derivatives of the energy, and of other outputs, of one model.

    Structures are ``fxpass.Structure`` or ASE atoms; arrays are float64 numpy arrays, whatever type the model computes
    in.  Each kind of derivative is traced when it is first asked for, in seconds, and kept; its kernels are built then.
    Displacements and positions are in Angstrom, energies in eV.  Second derivatives by strain are those of the energy
    per undeformed volume along x -> x (1 + strain), symmetric strain.
    """

    def __init__(
        self,
        program: Program,
        frontend: Frontend,
        facts: Mapping[str, Any],
        *,
        dtype: torch.dtype | None = None,
        memory: int = 2**30,
    ) -> None:
        """
        Args:
            program: a forces program, with its semantic ops.
            frontend, facts: the family, and what its interface knows of the model.
            dtype: to compute derivatives in; float64 costs twice the time and leaves no rounding to speak of.
            memory: bytes that may be kept of a structure between directions; beyond, each direction starts anew.

        Raises:
            UsageError: the program has no forces, the memory is negative, or the type is none to compute in.
        """
        if program.stage != "forces":
            raise UsageError(f"derivatives need a program at stage forces, this one is at stage {program.stage}")
        if memory < 0:
            raise UsageError(f"derivatives cannot keep {memory} bytes")
        own = next(s.dtype for s in program.inputs if s.dtype.is_floating_point)
        if dtype not in (None, torch.float32, torch.float64):
            raise UsageError(f"derivatives in {dtype} would be noise", hint="torch.float64 or torch.float32")
        self.dtype = dtype or own
        self.memory = memory
        self._original = replace(program, samples=())
        self._program = self._original if self.dtype == own else self._original.cast(self.dtype)
        self._frontend, self._facts = frontend, {**facts, "assumptions": list(program.assumptions)}
        self._orders = tables(program)
        self._made: dict[tuple[str, Any], Linear] = {}
        self._gradient = _gradient(self._program)

    # --- first derivatives

    def forces(self, structure: Any) -> Floats:
        """Forces [atoms, 3], eV/Angstrom."""
        motion = self._motion(_structure(structure))
        return -_numpy(motion.by_atom(self._gradient(motion)))

    def virial(self, structure: Any) -> Floats:
        """-dE/d(strain), symmetric [3, 3], eV."""
        motion = self._motion(_structure(structure))
        return -_numpy(motion.by_strain(self._gradient(motion)))

    def stress(self, structure: Any) -> Floats:
        """dE/d(strain) over the volume, symmetric [3, 3], eV/Angstrom^3; times ``EV_PER_CUBIC_ANGSTROM``, in GPa.

        Raises:
            StructureError: the structure is not periodic in all directions, so it has no volume.
        """
        structure = _structure(structure)
        return -self.virial(structure) / _volume(structure)

    def edge_forces(self, structure: Any) -> EdgeForces:
        """Edges with the derivatives of the energy by their vectors.

        Raises:
            UnsupportedModelError: the energy depends on positions or cells besides edges.
        """
        motion = self._motion(_structure(structure))
        self._only_edges(motion, "per-edge forces")
        real = motion.index[0] < motion.atoms
        vectors, gradients = motion.moved[-1][real], self._gradient(motion)[-1][real]
        return EdgeForces(motion.index[:, real].numpy().copy(), _numpy(vectors), _numpy(gradients))

    def atomic_virials(self, structure: Any) -> Floats:
        """Virials of atoms, symmetric [atoms, 3, 3], eV, which add up to :meth:`virial`.

        Half of what an edge contributes belongs to either end (Thompson, Plimpton and Mattson, J. Chem. Phys. 131,
        154107 (2009), Eq. 15, for pairs); how a many-body virial is shared out is a convention.

        Raises:
            UnsupportedModelError: the energy depends on positions or cells besides edges.
        """
        structure = _structure(structure)
        edges = self.edge_forces(structure)
        outer = edges.vectors[:, :, None] * edges.gradients[:, None, :]
        total = np.zeros((len(structure), 3, 3))
        for end in edges.index:
            np.add.at(total, end, -0.25 * (outer + outer.transpose(0, 2, 1)))
        return total

    # --- second and third derivatives

    def hessian_vector(self, structure: Any, displacements: Any) -> Floats:
        """The Hessian times displacements, eV/Angstrom^2 times their unit.

        Args:
            displacements: [atoms, 3], or [k, atoms, 3] for k of them.

        Returns:
            of the same shape.
        """
        structure = _structure(structure)
        along = _directions(displacements, structure)
        apply, motion = self._hessian_of(structure)
        found = [_numpy(motion.by_atom(apply(*motion.displaced(u)))) for u in self._tensor(along)]
        return np.array(found).reshape(np.shape(displacements))

    def hessian_rows(self, structure: Any, chunk: int = 16) -> Iterator[tuple[Integers, Floats]]:
        """The Hessian by atoms, so that it need not fit into memory: (atoms [k], rows [k, 3, atoms, 3]), eV/Angstrom^2.

        Args:
            chunk: atoms in one piece.

        Raises:
            UsageError: ``chunk`` is not positive.
        """
        if chunk < 1:
            raise UsageError(f"a Hessian cannot come in pieces of {chunk} atoms")
        structure = _structure(structure)
        apply, motion = self._hessian_of(structure)
        return self._rows(apply, motion, chunk)

    def _rows(self, apply: Apply, motion: Motion, chunk: int) -> Iterator[tuple[Integers, Floats]]:
        n = motion.atoms
        for start in range(0, n, chunk):
            atoms = np.arange(start, min(start + chunk, n))
            rows = np.empty((len(atoms), 3, n, 3))
            for k, atom in enumerate(atoms):
                for axis in range(3):
                    unit = torch.zeros((n, 3), dtype=self.dtype)
                    unit[atom, axis] = 1.0
                    rows[k, axis] = _numpy(motion.by_atom(apply(*motion.displaced(unit))))
            yield atoms, rows

    def hessian(self, structure: Any, *, symmetrise: bool = True, tolerance: float | None = None) -> Floats:
        """d2E/dx dx [atoms, 3, atoms, 3], eV/Angstrom^2: force constants of the structure as it is repeated.

        Args:
            symmetrise: return the mean with the transpose, which differs by rounding.
            tolerance: largest difference of the two, relative to the largest element; by default 4 times the root of
                the resolution of the type.

        Raises:
            VerificationError: the two differ by more.
        """
        structure = _structure(structure)
        n = len(structure)
        full = np.empty((n, 3, n, 3))
        for atoms, rows in self.hessian_rows(structure):
            full[atoms] = rows
        mirrored = full.transpose(2, 3, 0, 1)
        limit = 4 * float(torch.finfo(self.dtype).eps) ** 0.5 if tolerance is None else tolerance
        difference, largest = np.abs(full - mirrored).max(), np.abs(full).max()
        if not difference <= limit * largest:
            raise VerificationError(
                f"the Hessian of {structure.name} is not symmetric: H - H^T reaches {difference:.3g} eV/Angstrom^2, "
                f"{limit:.1g} of {largest:.3g} is allowed",
                hint="dtype=torch.float64, or passes of which none is approximate",
            )
        return 0.5 * (full + mirrored) if symmetrise else full

    def third(self, structure: Any, first: Any, second: Any) -> Floats:
        """d3E/dx dx dx along two displacements [atoms, 3] each: [atoms, 3], eV/Angstrom^3 times their units.

        Raises:
            UsageError: the program reads cubic tables, whose third derivatives are steps.
        """
        structure = _structure(structure)
        u, v = (self._tensor(_direction(d, structure)) for d in (first, second))
        motion = self._motion(structure)
        # of so few directions none is worth keeping anything for
        apply = self._product(3).prepared(motion.inputs, 0)
        return _numpy(motion.by_atom(apply(*motion.displaced(u), *motion.displaced(v))))

    # --- strain

    def internal_strain(self, structure: Any) -> Floats:
        """d2E/dx d(strain) [atoms, 3, 3, 3], eV/Angstrom: minus the forces that a strain causes."""
        return self._strained(_structure(structure))[1]

    def elastic_constants(self, structure: Any, *, relaxed: bool = False, force_tolerance: float = 1e-2) -> Floats:
        """d2E/d(strain)d(strain) over the volume [3, 3, 3, 3], eV/Angstrom^3; times ``EV_PER_CUBIC_ANGSTROM``, in GPa.

        At zero stress these are the elastic constants; under stress, those of other conventions differ by it
        (Barron and Klein, Proc. Phys. Soc. 85, 523 (1965)).

        Args:
            relaxed: atoms follow the strain to where the forces vanish: less the internal strain times the inverse
                Hessian times the internal strain (Born and Huang; Wu, Vanderbilt and Hamann, PRB 72, 035105 (2005)).
            force_tolerance: eV/Angstrom, that forces may have for ``relaxed``.

        Raises:
            StructureError: the structure is not periodic in all directions; or ``relaxed``, and forces do not vanish
                or some displacement of atoms lowers the energy.
        """
        structure = _structure(structure)
        volume = _volume(structure)
        clamped, coupling = self._strained(structure)
        if not relaxed:
            return clamped / volume
        largest = np.abs(self.forces(structure)).max()
        if not largest <= force_tolerance:
            raise StructureError(
                f"{structure.name} is not relaxed: forces reach {largest:.3g} eV/Angstrom, {force_tolerance:g} allowed",
                hint="relax the atoms first, or ask for the constants of clamped atoms",
            )
        n = 3 * len(structure)
        hessian, coupling = self.hessian(structure).reshape(n, n), coupling.reshape(n, 9)
        together = np.tile(np.eye(3), (len(structure), 1)) / np.sqrt(len(structure))
        stiff = hessian + np.abs(hessian).max() * together @ together.T  # moving all atoms costs no energy
        lowest = np.linalg.eigvalsh(stiff).min()
        if len(structure) > 1 and not lowest > 1e-6 * np.abs(hessian).max():
            raise StructureError(
                f"{structure.name} is no minimum: a mode has the force constant {lowest:.3g} eV/Angstrom^2",
                hint="follow that mode to a minimum first",
            )
        if len(structure) == 1:
            return clamped / volume
        coupling = coupling - together @ (together.T @ coupling)
        return (clamped - (coupling.T @ np.linalg.solve(stiff, coupling)).reshape(3, 3, 3, 3)) / volume

    def _strained(self, structure: Structure) -> tuple[Floats, Floats]:
        """Second derivatives by strain [3, 3, 3, 3], eV, and by positions and strain [atoms, 3, 3, 3], eV/Angstrom."""
        apply, motion = self._hessian_of(structure)
        clamped, coupling = np.empty((3, 3, 3, 3)), np.empty((len(structure), 3, 3, 3))
        for i, j in combinations_with_replacement(range(3), 2):
            strain = torch.zeros((3, 3), dtype=self.dtype)
            strain[i, j] += 0.5
            strain[j, i] += 0.5
            found = apply(*motion.strained(strain))
            for pair in ((i, j), (j, i)):
                clamped[pair] = _numpy(motion.by_strain(found))
                coupling[:, :, pair[0], pair[1]] = _numpy(motion.by_atom(found))
        return 0.5 * (clamped + clamped.transpose(2, 3, 0, 1)), coupling

    # --- other outputs and inputs

    def jvp(self, structure: Any, of: str, displacement: Any) -> Floats:
        """Derivative of an output along a displacement [atoms, 3]: of the output's shape and unit, per Angstrom.

        Args:
            of: name of an output, or of a floating input, for the derivative of the energy by it.

        Raises:
            UsageError: no such output; those that there are are listed.
        """
        structure = _structure(structure)
        along = self._tensor(_direction(displacement, structure))
        motion = self._motion(structure)
        (found,) = self._forward(of).prepared(motion.inputs, 0)(*motion.displaced(along))
        return _numpy(self._cut(of, found, motion))

    def vjp(self, structure: Any, of: str, cotangent: Any) -> Floats:
        """Derivative by positions [atoms, 3] of sum(cotangent * output); see :meth:`jvp`, of which it is the transpose.

        Raises:
            UsageError: no such output, or the cotangent is not of its shape.
        """
        structure = _structure(structure)
        motion = self._motion(structure)
        shape = self._shape(of, motion)
        weights = np.asarray(cotangent, dtype=np.float64)
        if weights.shape != shape:
            raise UsageError(f"the cotangent is {list(weights.shape)}, {of} is {list(shape)}")
        found = self._backward(of).prepared(motion.inputs, 0)(self._pad(of, self._tensor(weights), motion))
        return _numpy(motion.by_atom(found))

    def jacobian(self, structure: Any, of: str) -> Floats:
        """Derivative of an output by positions, [*shape of the output, atoms, 3]; see :meth:`jvp`.

        By forward or by backward products, whichever are fewer.

        Raises:
            UsageError: no such output; those that there are are listed.
        """
        structure = _structure(structure)
        motion = self._motion(structure)
        n, shape = 3 * motion.atoms, self._shape(of, motion)
        size = int(np.prod(shape))
        full = np.empty((size, n))
        if size <= n:
            backward = self._backward(of).prepared(motion.inputs, self.memory)
            for k in range(size):
                unit = torch.zeros(size, dtype=self.dtype)
                unit[k] = 1.0
                found = backward(self._pad(of, unit.view(shape), motion))
                full[k] = _numpy(motion.by_atom(found)).reshape(-1)
        else:
            forward = self._forward(of).prepared(motion.inputs, self.memory)
            for k in range(n):
                unit = torch.zeros(n, dtype=self.dtype)
                unit[k] = 1.0
                (value,) = forward(*motion.displaced(unit.view(-1, 3)))
                full[:, k] = _numpy(self._cut(of, value, motion)).reshape(-1)
        return full.reshape(*shape, motion.atoms, 3)

    def born_charges(self, structure: Any) -> Floats:
        """Z[a, i, k] = d(dipole k)/d(position i of atom a) [atoms, 3, 3], in the model's unit of charge.

        From an output that is a dipole, or from an input that is an electric field E: dipole = -d(energy)/dE.

        Raises:
            UnsupportedModelError: the model has neither.
        """
        structure = _structure(structure)
        outputs = [spec.name for spec in self._program.without_gradient().outputs]
        inputs = [spec.name for spec in self._program.inputs]
        dipole = next((name for name in DIPOLES if name in outputs), None)
        field = next((name for name in FIELDS if name in inputs), None)
        name = dipole or field
        if name is None:
            raise UnsupportedModelError(
                f"the model has no dipole and no electric field, so no Born charges: its outputs are "
                f"{', '.join(outputs)}, its inputs {', '.join(inputs)}",
                hint=f"a model with an output {' or '.join(DIPOLES)}, or with an input {' or '.join(FIELDS)}",
            )
        found = self.jacobian(structure, name).reshape(-1, len(structure), 3).transpose(1, 2, 0)
        return found if dipole else -found

    # --- parts

    def _motion(self, structure: Structure) -> Motion:
        recorder = _Recorder(self._original)
        self._frontend.evaluate(self._frontend.interface(recorder, recorder, self._facts), structure)
        sample = recorder.taken
        cast = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in sample.items()}
        return Motion.of(self._program, cast, len(structure))

    def _hessian_of(self, structure: Structure) -> tuple[Apply, Motion]:
        motion = self._motion(structure)
        return self._product(2).prepared(motion.inputs, self.memory), motion

    def _product(self, order: int) -> Linear:
        if ("product", order) not in self._made:
            lowest = min(self._orders, default=None)
            smooth = order if lowest is None else (lowest - 1) // 2  # so many derivatives are continuous
            names = {2: "second", 3: "third"}
            if smooth < order - 1:
                raise UsageError(
                    f"this model reads tables of order {lowest}: their {names[order]} derivatives are steps",
                    hint='passes="exact", or tabulate{order=5}',
                )
            if smooth < order:
                warnings.warn(
                    f"fxpass: this model reads tables of order {lowest}, whose {names[order]} derivatives jump from "
                    'cell to cell; passes="exact" has none' + (", tabulate{order=5} smooth ones" if order == 2 else ""),
                    stacklevel=4,
                )
            self._made["product", order] = products(self._program, order)
        return self._made["product", order]

    def _forward(self, of: str) -> Linear:
        if ("jvp", of) not in self._made:
            self._made["jvp", of] = jacobian(self._program, of)
        return self._made["jvp", of]

    def _backward(self, of: str) -> Linear:
        if ("vjp", of) not in self._made:
            self._made["vjp", of] = transposed_jacobian(self._program, of)
        return self._made["vjp", of]

    def _shape(self, of: str, motion: Motion) -> tuple[int, ...]:
        sizes = {"atoms": motion.atoms, "edges": motion.index.shape[1], "graphs": 1}
        return tuple(d if isinstance(d, int) else sizes[d] for d in spec_of(self._program, of).dims)

    def _padding(self, of: str, motion: Motion) -> int:
        """Rows that the program has besides those of the structure: those of an atom that does not exist."""
        return motion.rows - motion.atoms if spec_of(self._program, of).dims[:1] in (("atoms",), ("graphs",)) else 0

    def _cut(self, of: str, value: Tensor, motion: Motion) -> Tensor:
        return value[: value.shape[0] - padding] if (padding := self._padding(of, motion)) else value

    def _pad(self, of: str, value: Tensor, motion: Motion) -> Tensor:
        padding = self._padding(of, motion)
        return torch.cat([value, value.new_zeros((padding, *value.shape[1:]))]) if padding else value

    def _tensor(self, values: Floats) -> Tensor:
        return torch.from_numpy(values).to(self.dtype)

    def _only_edges(self, motion: Motion, what: str) -> None:
        others = [spec.name for spec in self._program.with_property("differentiated")]
        if others:
            raise UnsupportedModelError(
                f"{what} are not all there is: the energy of this model depends on {', '.join(others)} besides edges",
                hint="forces and virial of the whole structure",
            )


class _Recorder(nn.Module):
    """Stands in for both lowered programs: keeps the inputs that the family's interface gives it, and returns zeros."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.taken: dict[str, Tensor] = {}

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        self.taken = {spec.name: value.detach() for spec, value in zip(self.program.inputs, inputs, strict=True)}
        sizes: dict[int | str, int] = {}
        for spec in self.program.inputs:
            sizes.update(zip(spec.dims, self.taken[spec.name].shape, strict=True))
        return [
            torch.zeros([d if isinstance(d, int) else sizes[d] for d in spec.dims], dtype=spec.dtype)
            for spec in self.program.outputs
        ]


def _gradient(program: Program) -> Callable[[Motion], list[Tensor]]:
    """Runs a forces program: gradients by the inputs that it is differentiated by."""
    module, count = program.copy().graph_module, len(program.differentiated)

    def run(motion: Motion) -> list[Tensor]:
        with torch.no_grad():
            return list(module(*motion.inputs)[-count:])

    return run


def _structure(given: Any) -> Structure:
    if isinstance(given, Structure):
        return given
    if hasattr(given, "get_positions"):
        return Structure.from_ase(given)
    raise UsageError(f"{type(given).__name__} is not a structure", hint="a Structure, or ASE atoms")


def _volume(structure: Structure) -> float:
    if not all(structure.pbc):
        raise StructureError(f"{structure.name} is not periodic in all directions, so it has no volume")
    return structure.volume


def _directions(given: Any, structure: Structure) -> Floats:
    """Displacements [k, atoms, 3], of one or more."""
    values = np.asarray(given, dtype=np.float64)
    if values.shape[-2:] != (len(structure), 3) or values.ndim not in (2, 3) or not np.isfinite(values).all():
        what = f"displacements {list(values.shape)}" + ("" if np.isfinite(values).all() else " that are not finite")
        raise UsageError(f"{what} do not move the {len(structure)} atoms of {structure.name}", hint="[atoms, 3]")
    return values.reshape(-1, len(structure), 3)


def _direction(given: Any, structure: Structure) -> Floats:
    """One displacement [atoms, 3]."""
    if np.ndim(given) != 2:
        raise UsageError(f"displacements {list(np.shape(given))} are not one of atoms", hint="[atoms, 3]")
    return _directions(given, structure)[0]


def _numpy(values: Tensor) -> Floats:
    return values.detach().to(torch.float64).numpy()
