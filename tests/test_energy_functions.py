"""Energy functions in plain PyTorch: force fields and potentials of one's own, and the frontend for them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import FileCheck

import fxpass
from conftest import ROOT
from fxpass.cli import main as command
from fxpass.edges import MASKED
from fxpass.errors import CaptureError, PassError, StructureError, UnsupportedModelError, UsageError
from fxpass.frontends.energy import EnergyFrontend, batch_of
from fxpass.frontends.energy_interface import Potential
from fxpass.ir import ops
from fxpass.optimized import Optimized
from fxpass.structures import FCC, Structure, neighbour_list, probe_structures
from fxpass.training import trainable
from fxpass.verify.physics import deviation, force_error, stress_error

sys.path.insert(0, str(ROOT / "examples"))
import classical_force_field as ff
import plain_deep_potential as dp

pytestmark = pytest.mark.once
FRONTEND = EnergyFrontend()
NUMBERS = (1, 8, 11)
LIMITS = {"energy": 1e-10, "forces": 1e-9, "stress": 1e-10}


class Mixture(nn.Module):
    """Lennard-Jones and damped shifted charges of three species: energies of atoms, from edges alone."""

    numbers = NUMBERS
    cutoff = 5.0

    def __init__(self) -> None:
        super().__init__()
        self.dispersion = ff.LennardJones([0.002, 0.01, 0.006], [2.0, 2.9, 2.6], self.cutoff)
        self.coulomb = ff.DampedShiftedCoulomb([0.4, -0.8, 0.5], self.cutoff)

    def forward(self, edge_vectors: Tensor, edge_index: Tensor, species: Tensor) -> Tensor:
        distance = edge_vectors.norm(dim=1)
        ends = species[edge_index[0]], species[edge_index[1]]
        pairs = self.dispersion.pair(distance, *ends) + self.coulomb.pair(distance, *ends)
        return distance.new_zeros(species.shape[0]).index_add(0, edge_index[1], 0.5 * pairs)


class Compressed(nn.Module):
    """Pairs, a spring from each atom to its centre of mass, and a pressure: energies of structures, by everything."""

    numbers = torch.tensor(NUMBERS)
    cutoff = 4.0

    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Parameter(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))
        self.spring = nn.Parameter(torch.tensor(0.03, dtype=torch.float64))
        self.pressure = nn.Parameter(torch.tensor(0.01, dtype=torch.float64))

    def forward(
        self,
        batch: Tensor,
        cell: Tensor,
        positions: Tensor,
        node_attrs: Tensor,
        edge_index: Tensor,
        edge_vectors: Tensor,
    ) -> Tensor:
        graphs = cell.shape[0]
        zero = positions.new_zeros(graphs)
        depth = node_attrs @ self.depth
        square = (edge_vectors**2).sum(1) / self.cutoff**2
        pairs = depth[edge_index[0]] * depth[edge_index[1]] * torch.exp(-3 * square) * (1 - square).clamp(min=0) ** 3
        count = zero.index_add(0, batch, torch.ones_like(depth))
        centre = positions.new_zeros(graphs, 3).index_add(0, batch, positions) / count.unsqueeze(1)
        springs = ((positions - centre[batch]) ** 2).sum(1)
        volume = (cell[:, 0] * torch.linalg.cross(cell[:, 1], cell[:, 2])).sum(1)
        energy = zero.index_add(0, batch[edge_index[1]], pairs).index_add(0, batch, self.spring * springs)
        return energy + self.pressure * volume


class Pairs(nn.Module):
    """All that an energy function needs."""

    numbers = (1,)
    cutoff = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def forward(self, edge_vectors: Tensor, edge_index: Tensor, species: Tensor) -> Tensor:
        pairs = self.scale * (3.0 - edge_vectors.norm(dim=1)).clamp(min=0) ** 3
        return pairs.new_zeros(species.shape[0]).index_add(0, edge_index[0], pairs)


def isolated_water() -> nn.Module:
    """Two molecules of water without a cell."""
    field = ff.water(2, cutoff=8.0, ewald=False)
    (box,) = field.examples
    field.examples = (replace(box, cell=np.zeros((3, 3)), pbc=(False, False, False)),)
    return field


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixture": Mixture,
    "compressed": Compressed,
    "water": lambda: ff.water(3, cutoff=4.0),
    "isolated water": isolated_water,
    "butane": lambda: ff.butane(2, cutoff=6.0),
}
made: dict[str, tuple[Potential, Optimized]] = {}


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> tuple[Potential, Optimized]:
    """A model, and what ``exact`` makes of it; once a run."""
    name = request.param
    if name not in made:
        model = Potential(MODELS[name]())
        made[name] = model, fxpass.optimize(model, "exact")
    return made[name]


every = pytest.mark.parametrize(
    "pair",
    [
        *("mixture", "compressed", "water"),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("isolated water", "butane")),
    ],
    indirect=True,
)


def structures(model: Potential) -> list[Structure]:
    """What a model is for, moved a little; of any size, periodic and not, where it is for all."""
    own = getattr(model.energy, "examples", None) or probe_structures(model.numbers, model.cutoff)
    rng = np.random.default_rng(3)
    return [replace(s, positions=s.positions + rng.normal(scale=0.02, size=s.positions.shape)) for s in own]


def same(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=limit, equal_nan=True)


# Forces and stress


@every
def test_it_is_the_original_and_passes_its_receipt(pair: tuple[Potential, Optimized]) -> None:
    model, optimized = pair
    receipt = optimized.report.receipt
    assert receipt is not None and receipt.passed
    periodic = any(all(s.pbc) for s in structures(model))
    checks = {row.check for row in receipt.rows}
    assert {"energy", "forces", "rotation", "translation", "finite differences", "closed loop"} <= checks
    assert ("strain" in checks) is ("stress" in checks) is periodic
    for structure in structures(model):
        found, expected = (FRONTEND.evaluate(m, structure) for m in (optimized, model))
        assert all(error <= LIMITS[name] for name, error in deviation(found, expected).items())


@every
def test_the_originals_forces_are_the_derivative_of_its_energy(pair: tuple[Potential, Optimized]) -> None:
    model, _ = pair
    for structure in structures(model)[:1]:
        here = FRONTEND.evaluate(model, structure)
        error, _ = force_error(lambda s: FRONTEND.evaluate(model, s), structure, here)
        assert error <= 1e-7 * (1 + abs(here.forces).max())
        if here.stress is not None:
            error, _ = stress_error(lambda s: FRONTEND.evaluate(model, s), structure, here)
            assert error <= 1e-8


def test_ewald_gives_the_madelung_constant_of_rock_salt() -> None:
    """1.7475646 (Crandall and Delord, J. Phys. A 20, 2279 (1987)), at any cutoff."""
    length = 5.0
    places = np.concatenate([FCC, FCC + np.array([0.5, 0, 0])]) * length
    crystal = Structure([11] * 4 + [17] * 4, places, length * np.eye(3), (True, True, True))
    for cutoff in (4.0, 7.0):
        nothing = ff.HarmonicBonds([(0, 1)], 0.0, 1.0)
        coulomb = ff.Ewald([1.0, -1.0], cutoff, waves=9)
        field = ff.ForceField(crystal, [0] * 4 + [1] * 4, cutoff, [nothing], [coulomb], [(0, 1)])
        field.excluded = torch.zeros((0, 2), dtype=torch.int64)
        energy = FRONTEND.evaluate(field, crystal).energy
        assert energy * (length / 2) / (-4 * ff.COULOMB) == pytest.approx(1.7475646, abs=2e-5)


def test_a_dihedral_has_the_energy_of_its_formula() -> None:
    term = ff.ProperDihedrals([(0, 1, 2, 3)], [0.1, 0.2, 0.3], [0.0, math.pi, 0.0])
    for phi in (0.0, 1.0, -2.0, math.pi):
        places = torch.tensor(
            [[1, 0, -0.4], [0, 0, 0], [0, 0, 1.5], [math.cos(phi), math.sin(phi), 2.0]], dtype=torch.float64
        )
        expected = 0.1 * (1 + math.cos(phi)) + 0.2 * (1 - math.cos(2 * phi)) + 0.3 * (1 + math.cos(3 * phi))
        assert term(places, torch.zeros(3, 3, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("pair", ["mixture", "compressed"], indirect=True)
def test_a_batch_of_structures_of_all_sizes(pair: tuple[Potential, Optimized]) -> None:
    model, optimized = pair
    together = structures(model)
    assert {1, 2, 4, 5, 12} == {len(s) for s in together}
    data = batch_of(together, model)
    with np.errstate(all="ignore"):
        same(optimized(data, compute_stress=True), model(data, compute_stress=True))
    single = [FRONTEND.evaluate(optimized, s).energy for s in together]
    np.testing.assert_allclose(optimized(data, compute_forces=False)["energy"], single, atol=1e-9)


@pytest.mark.parametrize("pair", ["water"], indirect=True)
def test_a_function_of_one_system_takes_no_other(pair: tuple[Potential, Optimized]) -> None:
    model, optimized = pair
    (box,) = structures(model)
    part = replace(box, numbers=box.numbers[:6], positions=box.positions[:6])
    for potential in (model, optimized):
        with pytest.raises(ValueError, match="is for 9 atoms"):
            potential(batch_of([part], model))
        with pytest.raises(ValueError, match="one structure at a time"):
            potential(batch_of([part, replace(part, numbers=[8, 1, 1], positions=part.positions[:3])], model))
    with pytest.raises(StructureError, match="unknown species He"):
        FRONTEND.evaluate(optimized, replace(box, numbers=[2] * 9))
    data = batch_of([box], model)
    data["numbers"] = torch.full((9,), 2)
    for potential in (model, optimized):
        with pytest.raises(ValueError, match="does not know"):
            potential(data)


@pytest.mark.parametrize("pair", ["compressed"], indirect=True)
def test_without_edges_and_with_a_single_atom(pair: tuple[Potential, Optimized]) -> None:
    model, optimized = pair
    alone = Structure([8], np.ones((1, 3)), np.zeros((3, 3)), (False, False, False))
    crystal = replace(alone, cell=9 * np.eye(3), pbc=(True, True, True))
    slab = replace(alone, cell=9 * np.eye(3), pbc=(True, True, False))
    for structure in (alone, crystal, slab):
        assert batch_of([structure], model)["edge_index"].shape == (2, 0)
        found, expected = (FRONTEND.evaluate(m, structure) for m in (optimized, model))
        assert all(error <= LIMITS[name] for name, error in deviation(found, expected).items())
    assert FRONTEND.evaluate(optimized, crystal).stress[0, 0] == pytest.approx(0.01)  # the pressure alone
    assert FRONTEND.evaluate(optimized, slab).energy == 0.0  # a vector that is not periodic spans no volume


# Targets, files, calculators, committees


long = pytest.mark.long


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("water", "native"),
        ("compressed", "torchscript"),
        pytest.param("water", "torchscript", marks=long),
        pytest.param("compressed", "native", marks=long),
    ],
)
def test_targets_and_files(name: str, target: str, tmp_path: Path) -> None:
    model = Potential(MODELS[name]())
    optimized = fxpass.optimize(model, "exact", target=target, verify=False)
    data = batch_of(structures(model)[:1], model)
    expected = model(data, compute_stress=True)
    same(optimized(data, compute_stress=True), expected)
    path = tmp_path / "saved"
    optimized.save(path)
    same(fxpass.load(path)(data, compute_stress=True), expected)
    if target == "torchscript":
        same(torch.jit.load(path)(data, compute_stress=True), expected)


@pytest.mark.parametrize("pair", ["water", "mixture"], indirect=True)
def test_the_calculator_of_ase(pair: tuple[Potential, Optimized]) -> None:
    pytest.importorskip("ase")
    model, optimized = pair
    structure = structures(model)[0]
    atoms = structure.to_ase()
    atoms.calc = optimized.calculator()
    expected = FRONTEND.evaluate(model, structure)
    assert atoms.get_potential_energy() == pytest.approx(expected.energy, abs=1e-9)
    np.testing.assert_allclose(atoms.get_forces(), expected.forces, atol=1e-9)
    np.testing.assert_allclose(atoms.get_stress(voigt=False), expected.stress, atol=1e-10)


def test_a_committee() -> None:
    members = []
    for scale in (1.0, 1.2):
        energy = Compressed()
        with torch.no_grad():
            energy.spring.mul_(scale)
        members.append(Potential(energy))
    committee = fxpass.optimize(members, "differentiate", verify=False)
    data = batch_of(structures(members[0])[:2], members[0])
    found = committee(data, compute_stress=True)
    for name in ("energy", "forces"):
        each = torch.stack([m(data, compute_stress=True)[name] for m in members])
        torch.testing.assert_close(found[f"{name}_comm"], each, rtol=1e-12, atol=1e-9)


def test_edges_of_any_list_in_any_order() -> None:
    model = Potential(Mixture())
    optimized = fxpass.optimize(model, "preserve-sparsity,exact", verify=False)
    box = structures(model)[0]
    data, expected = batch_of([box], model), FRONTEND.evaluate(model, box)
    far = batch_of([box], replace_cutoff(model, 6.0))  # a list with a skin, in another order
    assert far["edge_index"].shape[1] > data["edge_index"].shape[1]
    order = torch.randperm(far["edge_index"].shape[1], generator=torch.Generator().manual_seed(0))
    far["edge_index"], far["shifts"] = far["edge_index"][:, order], far["shifts"][order]
    torch.testing.assert_close(optimized(far)["forces"], optimized(data)["forces"], rtol=0, atol=0)
    assert abs(optimized(data)["forces"].numpy() - expected.forces).max() < 1e-9


def replace_cutoff(model: Potential, cutoff: float) -> Potential:
    other = Potential(model.energy)
    other.cutoff = cutoff
    return other


# The graph


def test_what_differentiate_makes() -> None:
    for energy, gradients in ((Pairs(), ["edge"]), (Compressed(), ["cell", "positions", "edge"])):
        program = fxpass.capture(energy)
        assert [spec.name for spec in program.differentiated][-1] == "edge_vectors"
        result = fxpass.run_passes(program, "differentiate").program
        names = [f"{name}_gradient" for name in gradients]
        assert [spec.name for spec in result.outputs[len(program.outputs) :]] == names
        assert [spec.dims for spec in result.outputs[-len(names) :]] == [spec.dims for spec in program.differentiated]
        assert result.without_gradient().outputs == program.outputs
        check = FileCheck().check("positions").check("edge_vectors") if len(names) == 3 else FileCheck()
        check.check_not("requires_grad").run("positions edge_vectors " + str(result.graph))


def test_an_input_that_does_not_matter_has_a_gradient_of_zero() -> None:
    class Springs(nn.Module):
        numbers = (1,)

        def __init__(self) -> None:
            super().__init__()
            self.constant = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, positions: Tensor, cell: Tensor) -> Tensor:
            return self.constant * ((positions - positions.mean(0)) ** 2).sum()

    model = Potential(Springs())
    assert model.arguments == ["positions", "cell"]
    optimized = fxpass.optimize(model, "exact")
    box = structures(model)[0]
    data = batch_of([box], model)
    assert data["edge_index"].shape == (2, 0)
    same(optimized(data, compute_stress=True), model(data, compute_stress=True))


# Parameters


@pytest.mark.parametrize("name", ["water", pytest.param("compressed", marks=long)])
def test_parameters_get_the_originals_gradients(name: str) -> None:
    model = Potential(MODELS[name]())
    fast = trainable(model)
    data = batch_of(structures(model)[:1], model)
    target = {k: v + 0.1 for k, v in model(data, compute_stress=True).items()}
    found = []
    for potential in (model, fast):
        model.zero_grad()
        result = potential(data, compute_stress=True, training=True)
        loss = torch.stack([(result[k] - target[k]).pow(2).sum() for k in ("energy", "forces", "stress")]).sum()
        loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, rtol=1e-9, atol=1e-12)
    assert any(float(g.abs().max()) > 1e-3 for g in found[0].values())


# Force fields that users write, against autograd written out


class StillingerWeber(nn.Module):
    """Silicon (Phys. Rev. B 31, 5262 (1985)): triples of edges as a tensor of edges x edges."""

    numbers = (14,)
    cutoff = 3.77118

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.length, self.angular, self.decay = (ff.parameter(v) for v in (2.1683, 2.0951, 21.0, 1.2))

    def forward(self, edge_vectors: Tensor, edge_index: Tensor, batch: Tensor, cell: Tensor) -> Tensor:
        centre, r = edge_index[0], edge_vectors.norm(dim=1)
        x = r / self.length
        inside = x < 1.8 - 1e-6
        gap = torch.where(inside, x - 1.8, -torch.ones_like(x))
        pairs = torch.where(inside, 7.049556277 * (0.6022245584 * x**-4 - 1) * torch.exp(1 / gap), torch.zeros_like(x))
        h = torch.where(inside, torch.exp(self.decay / gap), torch.zeros_like(x))
        u = edge_vectors / r[:, None]
        triples = (centre[:, None] == centre) & ~torch.eye(r.shape[0], dtype=torch.bool)
        angles = self.angular * (triples * h[:, None] * h * (u @ u.T + 1 / 3) ** 2).sum(1)
        return self.depth * r.new_zeros(cell.shape[0]).index_add(0, batch[centre], 0.5 * (pairs + angles))


class EmbeddedAtom(nn.Module):
    """Density and embedding from tables of cubics, in which a value is looked up by its integer part."""

    numbers = (28, 29)
    cutoff = 4.5

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.density, self.embedding = (
            nn.Parameter(0.1 * torch.randn(2, knots, 4, generator=generator, dtype=torch.float64)) for knots in (20, 6)
        )

    def forward(self, edge_vectors: Tensor, edge_index: Tensor, node_attrs: Tensor) -> Tensor:
        def table(rows: Tensor, species: Tensor, x: Tensor) -> Tensor:
            knot = x.detach().floor().long().clamp(0, rows.shape[1] - 1)
            t, c = x - knot, rows[species, knot]
            return c[:, 0] + t * (c[:, 1] + t * (c[:, 2] + t * c[:, 3]))

        species, r = node_attrs.argmax(1), edge_vectors.norm(dim=1)
        pairs = table(self.density, species[edge_index[1]], 4 * r) * (1 - (r / self.cutoff) ** 2) ** 3
        density = r.new_zeros(node_attrs.shape[0]).index_add(0, edge_index[0], pairs**2)
        return table(self.embedding, species, density)


def by_hand(energy: nn.Module, structure: Structure) -> list[Tensor]:
    """Energy, forces and virial, and what a loss on them gives by the parameters."""
    positions = torch.tensor(structure.positions, requires_grad=True)
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    deform = torch.eye(3, dtype=torch.float64) + 0.5 * (strain + strain.T)
    cell = torch.tensor(structure.cell * np.array(structure.pbc)[:, None])
    pairs, units = (torch.tensor(each) for each in neighbour_list(structure, energy.cutoff))
    species = torch.tensor([energy.numbers.index(z) for z in structure.numbers])
    given = {
        "edge_vectors": (positions[pairs[1]] - positions[pairs[0]] + units @ cell) @ deform,
        "edge_index": pairs,
        "node_attrs": nn.functional.one_hot(species, len(energy.numbers)).double(),
        "batch": torch.zeros_like(species),
        "cell": cell[None] @ deform,
    }
    value = energy(**{name: given[name] for name in Potential(energy).arguments}).sum()
    slopes = torch.autograd.grad(value, (positions, strain), create_graph=True, materialize_grads=True)
    return [value, *(-slope for slope in slopes), *learned(energy, value, -slopes[0], -slopes[1])]


def learned(energy: nn.Module, value: Tensor, forces: Tensor, virial: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, forces.numel(), dtype=torch.float64).view_as(forces)
    loss = 0.1 * value + (weights * forces).sum() + forces.square().mean() + virial.square().mean()
    return torch.autograd.grad(loss, list(energy.parameters()), materialize_grads=True)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:fxpass")  # the tables are random, and jump from one knot to the next
@pytest.mark.parametrize("energy", [StillingerWeber(), EmbeddedAtom()])
def test_force_fields_against_autograd_by_hand(energy: nn.Module) -> None:
    model = Potential(energy)
    fast, native = trainable(model), fxpass.optimize(model, "exact", target="native")
    z = energy.numbers[0]
    tiny = Structure([z], np.ones((1, 3)), 2.3 * np.eye(3) + 0.1, (True, True, True))
    apart = Structure([z, z], 20 * np.eye(3)[:2], np.zeros((3, 3)), (False, False, False))
    for structure in (*structures(model), tiny, apart):
        expected = by_hand(energy, structure)
        for potential in (native, fast):
            found = potential(batch_of([structure], model), compute_stress=True, training=potential is fast)
            values = [found["energy"].sum(), found["forces"], found["virial"][0]]
            if potential is fast:
                values += learned(energy, *values)
            for one, other in zip(values, expected, strict=potential is fast):
                torch.testing.assert_close(one, other.detach(), rtol=1e-10, atol=1e-10, check_dtype=True)


# A plain deep potential, and its compression


@pytest.fixture(scope="module")
def deep() -> Potential:
    torch.manual_seed(0)
    return Potential(dp.DeepPotential((29, 47), embedding=(4, 8), fitting=(4,)).double())


def test_compress_makes_one_table_for_each_pair_of_species(
    deep: Potential, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = tmp_path / "model.pt", tmp_path / "compressed.pt"
    torch.save(deep, checkpoint)
    assert FRONTEND.reads(str(checkpoint))
    words = ["compress", str(checkpoint), "-d", "0.01", "-o", "3", "-s", str(output), "-t", "torchscript", "--json"]
    assert command(words) == 0
    printed = capsys.readouterr()
    assert "is a pickle; loading it runs the code that it names" in printed.err
    answer = json.loads(printed.out)
    assert [(t["tables"], t["channels"], t["order"]) for t in answer["tables"]] == [(4, 8, 3)]
    assert answer["receipt"]["passed"]
    box = dp.alloy((29, 47), 2)
    data = batch_of([box], deep)
    # as an unmodified host has it
    script = f"import torch; m = torch.jit.load({str(output)!r}); d = torch.load('data.pt'); torch.save(m(d), 'out.pt')"
    torch.save(data, tmp_path / "data.pt")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, capture_output=True)
    found = torch.load(tmp_path / "out.pt")
    same(found, deep(data), limit=1e-7)


def test_errors_fall_with_order_and_step() -> None:
    torch.manual_seed(1)
    deep = Potential(dp.DeepPotential((29,), embedding=(4, 8), fitting=(4,)).double())
    data = batch_of([dp.alloy((29,), 2)], deep)
    expected = deep(data)["forces"]
    errors = {}
    for step, order in ((0.04, 3), (0.01, 3), (0.04, 5)):
        pipeline = f"specialize-species,common-subexpressions,tabulate{{dx={step},order={order}}},exact"
        result = fxpass.optimize(deep, pipeline, budget="1 meV/A", verify=False)
        tables = [n for n in result.program.graph.nodes if n.target is ops.table]
        assert len(tables) == 2  # the value and its slope
        errors[step, order] = float((result(data)["forces"] - expected).abs().max())
    assert 1e-12 < errors[0.01, 3] < 0.1 * errors[0.04, 3]  # slopes err by the cube of the step
    assert errors[0.04, 5] < 0.01 * errors[0.04, 3]


def test_a_bare_function_becomes_a_potential_too(tmp_path: Path) -> None:
    optimized = fxpass.optimize(Pairs(), "exact")
    box = structures(Potential(Pairs()))[0]
    assert deviation(FRONTEND.evaluate(optimized, box), FRONTEND.evaluate(Pairs(), box))["forces"] <= 1e-9
    for name, module in (("bare", dp.DeepPotential((29,))), ("other", nn.Linear(1, 1))):
        torch.save(module, tmp_path / name)
    assert FRONTEND.reads(str(tmp_path / "bare")) and not FRONTEND.reads(str(tmp_path / "other"))
    loaded = FRONTEND.load(str(tmp_path / "bare"))
    assert isinstance(loaded, Potential) and loaded.numbers == [29]
    with pytest.raises(UnsupportedModelError, match="holds a Linear, not an energy function"):
        FRONTEND.load(str(tmp_path / "other"))


# Bad input


def bad(**attributes: object) -> nn.Module:
    energy = Pairs()
    for name, value in attributes.items():
        setattr(energy, name, value)
    return energy


class Foreign(Pairs):
    def forward(self, edge_vectors: Tensor, charge: Tensor) -> Tensor:  # type: ignore[override]
        return edge_vectors.sum() * charge


class Untyped(nn.Module):
    numbers = (1,)
    cutoff = 3.0

    def forward(self, edge_vectors: Tensor, edge_index: Tensor, species: Tensor) -> Tensor:
        return edge_vectors.new_zeros(species.shape[0]).index_add(0, edge_index[0], edge_vectors.norm(dim=1))


class Edges(Pairs):
    def forward(self, edge_vectors: Tensor) -> Tensor:  # type: ignore[override]
        return self.scale * edge_vectors.norm(dim=1)


class Detached(Pairs):
    def forward(self, edge_vectors: Tensor, edge_index: Tensor, species: Tensor) -> Tensor:
        return super().forward(edge_vectors.detach(), edge_index, species)


HELIUM = Structure([2, 2], np.eye(3)[:2], np.zeros((3, 3)), (False, False, False))


class Inverse(Pairs):
    """For periodic structures alone, which nothing says."""

    def forward(self, positions: Tensor, cell: Tensor) -> Tensor:  # type: ignore[override]
        return self.scale * torch.cos(2 * math.pi * positions @ torch.linalg.inv(cell[0])).sum()


class Divided(Pairs):
    def forward(self, positions: Tensor, cell: Tensor) -> Tensor:  # type: ignore[override]
        centred = positions - positions.mean(0)
        return self.scale * (centred**2).sum() / torch.linalg.det(cell[0])


class Roots(Pairs):
    def forward(self, positions: Tensor) -> Tensor:  # type: ignore[override]
        return self.scale * ((positions - positions.mean(0)) ** 2).sum(1).sqrt().sum()


class OneTotal(Pairs):
    def forward(self, edge_vectors: Tensor, edge_index: Tensor, species: Tensor) -> Tensor:
        return super().forward(edge_vectors, edge_index, species).sum().reshape(1)


class Spread(Pairs):
    """Springs to the centre of the whole batch."""

    def forward(self, positions: Tensor) -> Tensor:  # type: ignore[override]
        return self.scale * ((positions - positions.mean(0)) ** 2).sum(1)


class Single(Pairs):
    """Of one type, whatever it is given."""

    def forward(self, edge_vectors: Tensor, edge_index: Tensor, species: Tensor) -> Tensor:
        pairs = self.scale * torch.exp(-edge_vectors.norm(dim=1))
        return torch.zeros(species.shape[0], dtype=torch.float32).index_add(0, edge_index[0], pairs)


class Walled(Pairs):
    """A spring along z to a place in space, beside pairs."""

    def forward(self, edge_vectors: Tensor, edge_index: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(edge_vectors, edge_index, positions) + 0.01 * positions[:, 2] ** 2


@pytest.mark.parametrize(
    ("energy", "complaint"),
    [
        (Foreign(), "its forward takes charge"),
        (Untyped(), "nothing says which type it computes in"),
        (bad(cutoff=None), "it takes edges and has no cutoff"),
        (bad(cutoff=-1.0), "its cutoff is -1.0"),
        (bad(numbers=(1, 1)), r"its numbers are \(1, 1\)"),
        (bad(numbers=(1.5,)), r"its numbers are \(1.5,\)"),
        (bad(numbers=()), r"its numbers are \(\)"),
        (bad(numbers=None), "its numbers are None"),
        (bad(numbers=1), "its numbers are 1"),
        (bad(numbers="H"), "its numbers are H"),
        (bad(numbers=((1, 8),)), r"its numbers are \(\(1, 8\),\)"),
        (bad(numbers=(1, 999)), r"its numbers are \(1, 999\)"),
        (bad(cutoff="far"), "its cutoff is far"),
        (bad(cutoff=(3.0, 4.0)), r"its cutoff is \(3.0, 4.0\)"),
        (bad(cutoff=float("nan")), "its cutoff is nan"),
        (bad(atoms="three"), "its atoms are three"),
        (bad(atoms=2.5), "its atoms are 2.5"),
        (bad(atoms=0), "its atoms are 0"),
        (bad(atoms=True), "its atoms are True"),
        (bad(examples="water.xyz"), "its examples hold a str"),
        (bad(examples=(np.zeros((2, 3)),)), "its examples hold a ndarray"),
        (bad(examples=(HELIUM,)), "unknown species He"),
        (bad(examples=(replace(HELIUM, numbers=[], positions=np.zeros((0, 3))),)), "has no atoms"),
        (Inverse(), r"raises _LinAlgError on cluster \(5 atoms, periodic along 0 vectors\)"),
        (Divided(), r"its energy of cluster, 5 atoms, is \[(inf|nan)\]"),
        (Roots(), "its forces on atom, 1 atoms, are not numbers"),
        (OneTotal(), r"for 6 structures its forward returns a tensor of shape \[1\]"),
        (Spread(), r"energies of 6 structures in one batch are .* eV off"),
        (Single(), r"raises RuntimeError on alloy .* must have the same scalar type"),
        (Walled(), r"when all atoms of .* move together, its energy changes by .* eV an atom and its forces by"),
        (bad(atoms=3), "it is for 3 atoms and names no example of that size"),
        (Edges(), r"for 12 atoms its forward returns a tensor of shape \[\d+\]"),
    ],
)
def test_what_is_no_energy_function_is_refused(energy: nn.Module, complaint: str) -> None:
    with pytest.raises(UnsupportedModelError, match=complaint) as caught:
        fxpass.optimize(energy)
    assert caught.value.hint


def test_an_external_field_is_told_with_its_numbers() -> None:
    field = Walled()
    field.external_field = True
    optimized = fxpass.optimize(field, "exact")
    told = [w for w in optimized.report.warnings if "after translation of" in w]
    assert len(told) == 1 and re.search(r"energy changes by \d\S* eV an atom and its forces by 0.0\d+ eV/A", told[0])
    assert optimized.report.receipt.passed
    assert FRONTEND.reference(Pairs())[1] == FRONTEND.reference(Mixture())[1] == ()


def test_what_differs_in_training_mode_is_told() -> None:
    class Noisy(Pairs):
        def forward(self, edge_vectors: Tensor, edge_index: Tensor, species: Tensor) -> Tensor:
            energy = super().forward(edge_vectors, edge_index, species)
            return nn.functional.dropout(energy, 0.5, self.training)

    state = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match=r"in training mode its energies of alloy differ by \d"):
        trainable(Noisy())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_single_atoms_have_energies_of_what_the_function_says() -> None:
    ones = [Structure([8], np.ones((1, 3)), np.zeros((3, 3)), (False, False, False))] * 3
    for energy, names in ((Compressed(), {"energy", "forces"}), (Mixture(), {"energy", "node_energy", "forces"})):
        potential = Potential(energy)
        assert potential(batch_of(ones, potential)).keys() == names


def test_forces_that_are_no_derivative_are_told() -> None:
    class Weighted(Pairs):
        def forward(self, edge_vectors: Tensor, edge_index: Tensor, species: Tensor) -> Tensor:
            energy = super().forward(edge_vectors, edge_index, species)
            return energy * energy.detach()

    told = EnergyFrontend().reference(Weighted())[1]
    assert len(told) == 2 and re.match(r"its forces are \d\S* eV/A off the derivative of its energy, on", told[0])
    assert told[1].startswith("its stress is")


def test_a_potential_of_what_is_no_energy_function_is_refused() -> None:
    for energy in (bad(numbers=None), bad(cutoff="far"), bad(atoms="three"), Foreign()):
        with pytest.raises(UnsupportedModelError) as caught:
            Potential(energy)
        assert caught.value.hint and caught.value.where.source
    with pytest.raises(UnsupportedModelError, match="a function is no energy function"):
        Potential(lambda positions: positions.sum())  # type: ignore[arg-type]


def test_members_of_a_committee_return_energies_of_the_same() -> None:
    class Total(Pairs):
        def forward(self, edge_vectors: Tensor, edge_index: Tensor, species: Tensor) -> Tensor:
            return super().forward(edge_vectors, edge_index, species).sum()

    members = [fxpass.optimize(energy, "differentiate", verify=False) for energy in (Pairs(), Total())]
    with pytest.raises(UsageError, match="member 0 has atom, member 1 has total"):
        fxpass.optimize(members)


class OneDihedral(nn.Module):
    """Four atoms in a row; each column of a list of one row is a tensor of one number that keeps the stride of four."""

    numbers = (6,)
    atoms = 4

    def __init__(self, constant: float = 0.3) -> None:
        super().__init__()
        self.term = ff.ProperDihedrals([(0, 1, 2, 3)], [constant, 0.2], [0.0, math.pi])
        chain = np.array([[-0.63, -1.31, 0.52], [0, 0, 0], [1.54, 0, 0], [2.17, 0.92, 1.08]])
        self.examples = [Structure([6] * 4, chain, np.zeros((3, 3)), (False, False, False), "chain")]

    def forward(self, positions: Tensor, cell: Tensor) -> Tensor:
        return self.term(positions, cell[0])


def test_a_topology_of_one_row() -> None:
    members = [fxpass.optimize(OneDihedral(constant), "differentiate", verify=False) for constant in (0.3, 0.4)]
    data = batch_of(OneDihedral().examples, Potential(OneDihedral()))
    expected = torch.stack([member(data)["energy"] for member in members])
    native = fxpass.optimize(OneDihedral(), "exact", target="native", verify=False)
    same(native(data), members[0](data))
    torch.testing.assert_close(fxpass.optimize(members)(data)["energy_comm"], expected, rtol=1e-12, atol=1e-12)


def test_an_energy_that_no_forces_come_from_is_refused() -> None:
    with pytest.raises(PassError, match="cannot be differentiated"):
        fxpass.optimize(Detached(), "exact")


def test_constants_of_atoms_need_their_number() -> None:
    field = ff.water(2, cutoff=4.0)
    del field.atoms
    with pytest.raises(CaptureError, match="cannot be traced with symbolic sizes"):
        fxpass.capture(field)


def test_masked_edges_need_energies_of_atoms() -> None:
    facts = FRONTEND.attributes(ff.water(2, cutoff=4.0))
    with pytest.raises(UsageError, match="takes no more"):
        FRONTEND.interface(nn.Identity(), nn.Identity(), {**facts, "assumptions": [MASKED]})
