"""Derivatives as a product: against finite differences, sum rules and symmetry, for several families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxpass
from fxpass.algebra.piecewise import Grid
from fxpass.api import run_passes
from fxpass.derivatives import EV_PER_CUBIC_ANGSTROM, Derivatives
from fxpass.derivatives.convolutions import slope_of
from fxpass.derivatives.model import to_numpy
from fxpass.derivatives.motion import Motion
from fxpass.errors import StructureError, UnsupportedModelError, UsageError, VerificationError
from fxpass.ir.ops import table
from fxpass.ir.program import TensorSpec
from fxpass.ir.tracing import trace_program
from fxpass.models import small_potential
from fxpass.optimized import Optimized
from fxpass.structures import FCC, Floats, Structure

RNG = np.random.default_rng(0)
A = 3.9
CRYSTAL = Structure([29, 47, 29, 79], FCC * A + RNG.normal(scale=0.05, size=(4, 3)), np.eye(3) * A, (True,) * 3)
CLUSTER = Structure([29, 29, 79], [[0, 0, 0], [2.4, 0.1, 0], [0.2, 2.6, 0.3]], np.zeros((3, 3)), (False,) * 3)
ATOM = Structure([29], [[0.0, 0.0, 0.0]], np.zeros((3, 3)), (False,) * 3)
FAR = Structure([29, 79], [[0.0, 0.0, 0.0], [30.0, 0.0, 0.0]], np.zeros((3, 3)), (False,) * 3)
U, V = RNG.normal(size=(2, 4, 3))
STRAIN = np.array([[1.0, 0.3, 0.0], [0.3, -0.5, 0.2], [0.0, 0.2, 0.4]])


@pytest.fixture(scope="module")
def optimised() -> Optimized:
    return fxpass.optimize(small_potential(torch.float64), "exact", verify=False)


@pytest.fixture(scope="module")
def derivatives(optimised: Optimized) -> Derivatives:
    return optimised.derivatives()


def moved(structure: Structure, by: Floats) -> Structure:
    return replace(structure, positions=structure.positions + by)


def strained(structure: Structure, by: Floats) -> Structure:
    deform = np.eye(3) + by
    return replace(structure, positions=structure.positions @ deform, cell=structure.cell @ deform)


def slope(function: Callable[[float], Any], h: float = 2e-3) -> Any:
    """Central differences of fourth order."""
    return (8 * (function(h) - function(-h)) - (function(2 * h) - function(-2 * h))) / (12 * h)


def check_hessian(derivatives: Derivatives, structure: Structure, tolerance: float = 1e-6) -> None:
    """Products with the Hessian agree with differences of forces, with the Hessian, and with the sum rule."""
    u = np.random.default_rng(1).normal(size=(len(structure), 3))
    product = derivatives.hessian_vector(structure, u)
    expected = -slope(lambda h: derivatives.forces(moved(structure, h * u)))
    assert np.abs(product - expected).max() < tolerance * np.abs(expected).max()
    full = derivatives.hessian(structure)
    assert np.abs(np.einsum("aibj,bj->ai", full, u) - product).max() < 1e-10 * np.abs(full).max()
    assert np.abs(full.sum(axis=2)).max() < 1e-10 * np.abs(full).max()


def test_first_derivatives(optimised: Optimized, derivatives: Derivatives) -> None:
    """They are those of the drop-in; edges and atoms add up to them."""
    for structure in (CRYSTAL, CLUSTER, ATOM):
        here = optimised.frontend.evaluate(optimised, structure)
        assert np.abs(derivatives.forces(structure) - here.forces).max() < 1e-12
        assert np.abs(derivatives.atomic_virials(structure).sum(0) - derivatives.virial(structure)).max() < 1e-12
        if here.stress is not None:
            assert np.abs(derivatives.stress(structure) - here.stress).max() < 1e-14
        edges = derivatives.edge_forces(structure)
        total = np.zeros((len(structure), 3))
        np.add.at(total, edges.index[0], edges.gradients)
        np.subtract.at(total, edges.index[1], edges.gradients)
        assert np.abs(total - here.forces).max() < 1e-12


def test_hessian(derivatives: Derivatives) -> None:
    check_hessian(derivatives, CRYSTAL)
    check_hessian(derivatives, CLUSTER)


@pytest.mark.once
def test_hessian_vectors_come_in_any_number(derivatives: Derivatives) -> None:
    both = derivatives.hessian_vector(CRYSTAL, np.array([U, V]))
    assert both.shape == (2, 4, 3)
    assert np.array_equal(both[1], derivatives.hessian_vector(CRYSTAL, V))


@pytest.mark.once
def test_ase_atoms_and_structures_are_the_same(derivatives: Derivatives) -> None:
    ase = pytest.importorskip("ase")
    atoms = ase.Atoms(CRYSTAL.numbers, CRYSTAL.positions, cell=CRYSTAL.cell, pbc=True)
    assert np.array_equal(derivatives.hessian_vector(atoms, U), derivatives.hessian_vector(CRYSTAL, U))


@pytest.mark.once
def test_rows_come_in_chunks(derivatives: Derivatives) -> None:
    full = derivatives.hessian(CRYSTAL, symmetrise=False)
    pieces = list(derivatives.hessian_rows(CRYSTAL, chunk=3))
    assert [atoms.tolist() for atoms, _ in pieces] == [[0, 1, 2], [3]]
    assert np.array_equal(np.concatenate([rows for _, rows in pieces]), full)


@pytest.mark.once
def test_no_memory_is_slower_and_the_same(optimised: Optimized, derivatives: Derivatives) -> None:
    """Nothing is kept between directions where nothing may be."""
    linear, motion = derivatives._product(2), derivatives._motion(CRYSTAL)
    along = motion.displaced(torch.from_numpy(U))
    kept, anew = (linear.prepared(motion.inputs, memory) for memory in (2**30, 0))
    assert np.abs(to_numpy(kept(*along)[0]) - to_numpy(anew(*along)[0])).max() < 1e-12
    assert sum(n.op == "call_function" for n in linear.after.graph.nodes) < sum(
        n.op == "call_function" for n in linear.whole.graph.nodes
    )


@pytest.mark.once
def test_an_asymmetric_hessian_is_refused(derivatives: Derivatives) -> None:
    with pytest.raises(VerificationError, match=r"not symmetric: H - H\^T reaches"):
        derivatives.hessian(CRYSTAL, tolerance=-1.0)


@pytest.mark.once
def test_no_edges(derivatives: Derivatives) -> None:
    for structure in (ATOM, FAR):
        n = len(structure)
        assert not derivatives.hessian(structure).any()
        assert not derivatives.third(structure, U[:n], V[:n]).any()
        assert not derivatives.internal_strain(structure).any()
        assert derivatives.edge_forces(structure).vectors.shape == (0, 3)


@pytest.mark.once
def test_third_derivatives(derivatives: Derivatives) -> None:
    """Against differences of products with the Hessian; symmetric in all three directions."""
    found = derivatives.third(CRYSTAL, U, V)
    expected = slope(lambda h: derivatives.hessian_vector(moved(CRYSTAL, h * V), U))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(found).max()
    assert np.abs(found - derivatives.third(CRYSTAL, V, U)).max() < 1e-10 * np.abs(found).max()
    assert (found * U).sum() == pytest.approx((derivatives.third(CRYSTAL, U, U) * V).sum(), rel=1e-10)
    assert np.abs(found.sum(axis=0)).max() < 1e-10 * np.abs(found).max()


@pytest.mark.once
def test_strain(derivatives: Derivatives, optimised: Optimized) -> None:
    """Elastic constants and internal strain against finite strains."""
    constants = derivatives.elastic_constants(CRYSTAL)
    assert np.array_equal(constants, constants.transpose(2, 3, 0, 1))
    assert np.array_equal(constants, constants.transpose(1, 0, 2, 3))

    def work(h: float) -> float:
        """dE/dh of the strain h STRAIN: the virial there, brought back to the undeformed crystal."""
        back = np.linalg.inv(np.eye(3) + h * STRAIN) @ STRAIN
        return -float((derivatives.virial(strained(CRYSTAL, h * STRAIN)) * back).sum())

    found = np.einsum("ijkl,ij,kl", constants, STRAIN, STRAIN) * CRYSTAL.volume
    assert found == pytest.approx(slope(work), rel=1e-6)
    coupling = np.einsum("aikl,kl->ai", derivatives.internal_strain(CRYSTAL), STRAIN)
    expected = -slope(lambda h: derivatives.forces(strained(CRYSTAL, h * STRAIN)))
    assert np.abs(coupling - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.once
def test_relaxed_elastic_constants(derivatives: Derivatives) -> None:
    """Against the stress of crystals that are strained and then relaxed; softer than those of clamped atoms."""
    start = replace(CRYSTAL, numbers=[29, 29, 79, 79], positions=FCC * A)
    crystal = relaxed(derivatives, start)
    clamped, found = (derivatives.elastic_constants(crystal, relaxed=r) for r in (False, True))
    shear = np.array([[0.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 1.0]])

    def work(h: float) -> float:
        there = relaxed(derivatives, strained(crystal, h * shear))
        return -float((derivatives.virial(there) * (np.linalg.inv(np.eye(3) + h * shear) @ shear)).sum())

    expected = slope(work) / crystal.volume
    assert np.einsum("ijkl,ij,kl", found, shear, shear) == pytest.approx(expected, rel=1e-5)
    matrix = (clamped - found).reshape(9, 9)
    assert np.linalg.eigvalsh(matrix).min() > -1e-10


def relaxed(derivatives: Derivatives, structure: Structure) -> Structure:
    """At vanishing forces, by Newton's method."""
    n = 3 * len(structure)
    for _ in range(8):
        forces = derivatives.forces(structure).reshape(-1)
        if np.abs(forces).max() < 1e-11:
            break
        step = np.linalg.pinv(derivatives.hessian(structure).reshape(n, n), rcond=1e-8, hermitian=True) @ forces
        structure = moved(structure, step.reshape(-1, 3))
    return structure


@pytest.mark.once
def test_cubic_copper(derivatives: Derivatives) -> None:
    """One atom in a cell: three independent constants, of the size of those of copper, in GPa."""
    cell = (np.ones((3, 3)) - np.eye(3)) * 3.5896 / 2
    c = derivatives.elastic_constants(Structure([29], [[0, 0, 0]], cell, (True,) * 3), relaxed=True)
    c = c * EV_PER_CUBIC_ANGSTROM
    assert c[0, 0, 0, 0] == pytest.approx(c[2, 2, 2, 2]) and c[0, 0, 1, 1] == pytest.approx(c[1, 1, 2, 2])
    assert abs(c[0, 0, 0, 1]) < 1e-8 * c[0, 0, 0, 0]
    assert 150 < c[0, 0, 0, 0] < 200 and 50 < c[1, 2, 1, 2] < 110


@pytest.mark.once
def test_what_cannot_be_relaxed_is_refused(derivatives: Derivatives) -> None:
    with pytest.raises(StructureError, match="not relaxed: forces reach"):
        derivatives.elastic_constants(CRYSTAL, relaxed=True)
    with pytest.raises(StructureError, match="is no minimum: a mode has the force constant"):
        sparse = replace(CRYSTAL, numbers=[29] * 4, positions=FCC * 4.6, cell=np.eye(3) * 4.6)
        derivatives.elastic_constants(sparse, relaxed=True)
    with pytest.raises(StructureError, match="no volume"):
        derivatives.stress(CLUSTER)


@pytest.mark.once
def test_jacobians(derivatives: Derivatives) -> None:
    """jvp is the transpose of vjp; both are the Jacobian, whose rows add up to minus the forces."""
    weights = RNG.normal(size=4)
    forward = derivatives.jvp(CRYSTAL, "node_energy", U)
    backward = derivatives.vjp(CRYSTAL, "node_energy", weights)
    assert forward @ weights == pytest.approx((backward * U).sum(), rel=1e-12)
    full = derivatives.jacobian(CRYSTAL, "node_energy")
    assert full.shape == (4, 4, 3)
    assert np.abs(np.einsum("naj,aj->n", full, U) - forward).max() < 1e-12
    assert np.abs(full.sum(axis=0) + derivatives.forces(CRYSTAL)).max() < 1e-12
    assert not derivatives.jacobian(CRYSTAL, "cell").any()  # an input that this energy does not depend on


class Bonds(torch.nn.Module):
    """A chain of charges in a field: what no family that has a frontend offers."""

    charges = torch.tensor([0.7, -0.3], dtype=torch.float64)

    def forward(self, vectors: Any, index: Any, attrs: Any, field: Any) -> list[Any]:
        lengths = vectors.norm(dim=1)
        difference = (attrs @ self.charges)[index[1]] - (attrs @ self.charges)[index[0]]
        dipole = 0.25 * (difference.unsqueeze(1) * vectors * (1 + 0.1 * lengths.unsqueeze(1))).sum(0, keepdim=True)
        energy = ((lengths - 2.0) ** 2).sum().reshape(1) - (dipole * field).sum(1)
        return [energy, dipole]


def chain(outputs: tuple[str, ...]) -> tuple[Derivatives, Structure]:
    """Derivatives of ``Bonds``, through a family made for it."""
    f64 = torch.float64
    inputs = (
        TensorSpec("edge_vectors", ("edges", 3), f64, None, "Angstrom", frozenset({"edge_vector"})),
        TensorSpec("edge_index", (2, "edges"), torch.int64, None, "", frozenset({"index:atoms"})),
        TensorSpec("node_attrs", ("atoms", 2), f64, None, "", frozenset({"one_hot"})),
        TensorSpec("field", ("graphs", 3), f64, None, "V/Angstrom"),
    )
    specs = {"energy": TensorSpec("energy", ("graphs",), f64), "dipole": TensorSpec("dipole", ("graphs", 3), f64)}
    bonds = Bonds()

    def body(*values: Any) -> list[Any]:
        energy, dipole = bonds(*values)
        total = values[3].sum(1) * 0 + energy  # [graphs]
        return [total, values[3] * 0 + dipole][: len(outputs)]

    program, _ = trace_program(
        body, inputs, tuple(specs[name] for name in outputs), {"charges": bonds.charges}, stage="energy"
    )
    program = run_passes(program, "differentiate").program

    class Family:
        name = "chain"

        def interface(self, energy: Any, forces: Any, facts: Any) -> Any:
            return forces

        def evaluate(self, model: Any, structure: Structure, neighbours: Any = None) -> None:
            index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
            positions = torch.from_numpy(structure.positions)
            attrs = torch.eye(2, dtype=f64)[torch.tensor([0, 1, 0])]
            field = torch.tensor([[0.1, 0.2, -0.1]], dtype=f64)
            model(positions[index[1]] - positions[index[0]], index, attrs, field)

    positions = [[0.0, 0.0, 0.0], [2.1, 0.3, 0.0], [4.0, 0.1, 0.2]]
    structure = Structure([1, 9, 1], positions, np.zeros((3, 3)), (False,) * 3)
    family: Any = Family()
    return Derivatives(program, family, {}), structure


@pytest.mark.once
def test_born_charges() -> None:
    """From a dipole, and from a field, the same; they add up to zero; and by finite differences."""
    with_dipole, structure = chain(("energy", "dipole"))
    by_field, _ = chain(("energy",))
    found = with_dipole.born_charges(structure)
    assert found.shape == (3, 3, 3)
    assert np.abs(found - by_field.born_charges(structure)).max() < 1e-12
    assert np.abs(found.sum(axis=0)).max() < 1e-12
    u = np.random.default_rng(3).normal(size=(3, 3))
    jvp = with_dipole.jvp(structure, "dipole", u)[0]
    assert np.abs(np.einsum("aik,ai->k", found, u) - jvp).max() < 1e-12
    assert np.abs(found).max() > 0.1
    field = by_field.jvp(structure, "field", u)[0]  # dE/d(field) is minus the dipole
    assert np.abs(field + jvp).max() < 1e-12


@pytest.mark.once
def test_refusals(derivatives: Derivatives, optimised: Optimized) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no dipole and no electric field.*energy, node_energy"):
        derivatives.born_charges(CRYSTAL)
    with pytest.raises(UsageError, match=r"no output or input 'dipoles'.*outputs energy, node_energy"):
        derivatives.jvp(CRYSTAL, "dipoles", U)
    with pytest.raises(UsageError, match="do not move the 4 atoms"):
        derivatives.hessian_vector(CRYSTAL, U[:3])
    with pytest.raises(UsageError, match="not finite"):
        derivatives.hessian_vector(CRYSTAL, np.full((4, 3), np.nan))
    with pytest.raises(UsageError, match=r"the cotangent is \[3\], node_energy is \[4\]"):
        derivatives.vjp(CRYSTAL, "node_energy", np.zeros(3))
    with pytest.raises(UsageError, match="str is not a structure"):
        derivatives.hessian("crystal.xyz")
    with pytest.raises(UsageError, match="pieces of 0 atoms"):
        derivatives.hessian_rows(CRYSTAL, chunk=0)
    with pytest.raises(StructureError, match="unknown species"):
        derivatives.hessian(replace(CRYSTAL, numbers=[1, 1, 1, 1]))
    with pytest.raises(UsageError, match="would be noise"):
        optimised.derivatives(dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="cannot keep -1 bytes"):
        optimised.derivatives(memory=-1)
    energy = optimised.program.without_gradient()
    with pytest.raises(UsageError, match="need a program at stage forces"):
        Derivatives(energy, optimised.frontend, optimised.facts)


@pytest.mark.once
@pytest.mark.long
def test_float32_model_in_float64() -> None:
    model = fxpass.optimize(small_potential(torch.float32), "exact", verify=False)
    exact = model.derivatives(dtype=torch.float64).hessian_vector(CRYSTAL, U)
    own = model.derivatives().hessian_vector(CRYSTAL, U)
    assert 0 < np.abs(own - exact).max() < 1e-4 * np.abs(exact).max()


@pytest.mark.once
@pytest.mark.slow
def test_tables(derivatives: Derivatives, optimised: Optimized) -> None:
    """Of order 5 they give the Hessian, by kernels that read them; of order 3 with a warning, and nothing beyond."""
    pipeline = "preserve-sparsity,tabulate{order=5},differentiate,common-subexpressions,dead-code"
    tabulated = fxpass.optimize(small_potential(torch.float64), pipeline, verify=False).derivatives()
    expected = derivatives.hessian_vector(CRYSTAL, U)
    assert np.abs(tabulated.hessian_vector(CRYSTAL, U) - expected).max() < 1e-5 * np.abs(expected).max()
    targets = [str(node.target) for node in tabulated._product(2).after.graph.nodes]
    assert "fxpass.convolution_gradient.default" in targets
    assert not {"fxpass.table.default", "fxpass.scatter_sum.default"} & set(targets)
    cubic = optimised.derivatives()
    cubic._orders = (3,)
    with pytest.warns(UserWarning, match="tables of order 3, whose second derivatives jump"):
        cubic.hessian_vector(CRYSTAL, U)
    with pytest.raises(UsageError, match="order 3: their third derivatives are steps"):
        cubic.third(CRYSTAL, U, V)


@pytest.mark.once
@pytest.mark.parametrize("coarse", [0.0, 9.0])
def test_the_slope_of_a_table_is_a_table(coarse: float) -> None:
    grid = Grid.fitted(5, 1.0, 5.0, 0.25, reach=coarse)
    coefficients = torch.randn(6, 2 * grid.rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.tensor([0.7, 1.0, 2.3, 4.99, 5.6, 8.8, 12.0], dtype=torch.float64)
    kinds = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    slope_table = slope_of(coefficients, str(grid))
    for derivative in range(3):
        found = table(x, kinds, slope_table, str(grid), derivative)
        expected = table(x, kinds, coefficients, str(grid), derivative + 1)
        assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.once
def test_padding_does_not_count(derivatives: Derivatives) -> None:
    """Where a program has one more atom for padding, its edges add nothing."""
    plain = derivatives._motion(CLUSTER)
    index = torch.cat([plain.index, torch.full((2, 2), 3)], dim=1)
    vectors = torch.cat([plain.moved[0], torch.ones(2, 3, dtype=torch.float64)])
    padded = Motion(plain.inputs, plain.kinds, (vectors,), index, 3, 4)
    (along,) = padded.displaced(torch.from_numpy(U[:3]))
    assert not along[-2:].any() and torch.equal(along[:-2], plain.displaced(torch.from_numpy(U[:3]))[0])
    gradient = torch.ones_like(vectors)
    assert torch.equal(padded.by_atom([gradient]), plain.by_atom([gradient[:-2]]))
    assert torch.allclose(padded.by_strain([gradient]), plain.by_strain([gradient[:-2]]))


@pytest.mark.mace
@pytest.mark.slow
def test_mace(alloy_model_path: Path) -> None:
    """Hessian, and third derivatives, of a MACE, and ``torch.autograd.functional.hessian`` of the original."""
    from fxpass.api import open_model
    from fxpass.frontends.base import converted

    original, frontend = open_model(alloy_model_path)
    model = converted(original, torch.float64)
    derivatives = fxpass.optimize(model, "exact", verify=False).derivatives()
    structure = replace(CRYSTAL, numbers=[29, 47, 28, 79])
    check_hessian(derivatives, structure)
    seen: list[dict[str, torch.Tensor]] = []
    hook = model.register_forward_pre_hook(lambda _, args, kw: seen.append(dict(args[0])), with_kwargs=True)
    frontend.evaluate(model, structure)
    hook.remove()

    def energy(positions: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = model({**seen[0], "positions": positions}, training=True, compute_force=False)["energy"]
        return total.sum()

    expected = torch.autograd.functional.hessian(energy, seen[0]["positions"].detach()).numpy()
    assert np.abs(derivatives.hessian(structure) - expected).max() < 1e-9 * np.abs(expected).max()
    features = derivatives.jvp(structure, "node_feats", U)
    weights = RNG.normal(size=features.shape)
    backward = derivatives.vjp(structure, "node_feats", weights)
    assert (features * weights).sum() == pytest.approx((backward * U).sum(), rel=1e-9)


@pytest.mark.sevenn
@pytest.mark.slow
def test_sevennet() -> None:
    from test_sevennet import NUMBERS, build

    derivatives = fxpass.optimize(build(), "exact", verify=False).derivatives()
    check_hessian(derivatives, replace(CRYSTAL, numbers=[NUMBERS[k % len(NUMBERS)] for k in range(4)]), 1e-5)


@pytest.mark.schnetpack
@pytest.mark.long
def test_painn() -> None:
    from test_schnetpack import VARIANTS, build, structures

    derivatives = fxpass.optimize(build(**VARIANTS["painn-one-layer"]), "exact", verify=False).derivatives()
    check_hessian(derivatives, max(structures(), key=len), 1e-5)
