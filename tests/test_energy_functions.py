"""Energy functions in plain PyTorch: force fields and potentials of one's own, and the frontend for them."""

from __future__ import annotations

import json
import math
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
from fxpass.structures import FCC, Structure, probe_structures
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
            return self.constant * ((positions - positions.mean(0)) ** 2).sum(1)

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
        (bad(atoms=3), "it is for 3 atoms and names no example of that size"),
        (Edges(), r"for 12 atoms its forward returns a tensor of shape \[\d+\]"),
    ],
)
def test_what_is_no_energy_function_is_refused(energy: nn.Module, complaint: str) -> None:
    with pytest.raises(UnsupportedModelError, match=complaint) as caught:
        fxpass.optimize(energy)
    assert caught.value.hint


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
