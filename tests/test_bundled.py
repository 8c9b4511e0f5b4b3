"""The potential that fxpass ships, and its frontend, in both versions of e3nn."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fxpass
from fxpass.capture.capture import prepare
from fxpass.errors import UnsupportedModelError, UsageError
from fxpass.frontends.bundled import BundledFrontend
from fxpass.models import WEIGHTS, Settings, SmallPotential, build, collate, load, save, small_potential
from fxpass.structures import Structure, probe_structures
from fxpass.verify.physics import SYMMETRIES, Evaluator, deviation, force_error, stress_error, symmetry_error
from fxpass.verify.tolerances import TABLE

NUMBERS = (29, 47, 79)
CUTOFF = 5.0
FRONTEND = BundledFrontend()
PROBES = probe_structures(NUMBERS, CUTOFF)
DTYPES = [torch.float32, torch.float64]
FCC = np.array([[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])


def fcc(number: int, a: float, cells: int = 1) -> Structure:
    corners = np.array([[i, j, k] for i in range(cells) for j in range(cells) for k in range(cells)])
    positions = a * (corners[:, None] + FCC).reshape(-1, 3)
    return Structure(np.full(len(positions), number), positions, a * cells * np.eye(3), (True, True, True))


def evaluator(model: torch.nn.Module) -> Evaluator:
    return lambda structure: FRONTEND.evaluate(model, structure)


@pytest.fixture(scope="module")
def model() -> SmallPotential:
    return small_potential(torch.float64)


# The weights


def test_weights_are_small_and_data_only() -> None:
    assert WEIGHTS.stat().st_size < 300_000
    with np.load(WEIGHTS, allow_pickle=False) as archive:
        kinds = {archive[name].dtype.kind for name in archive.files}
    assert kinds == {"f", "U"}


@pytest.mark.parametrize(("number", "a", "cohesive"), [(29, 3.59, 3.51), (47, 4.06, 2.96), (79, 4.06, 3.80)])
def test_it_is_the_metal_it_was_trained_on(model: SmallPotential, number: int, a: float, cohesive: float) -> None:
    """Lattice constant and cohesive energy of effective-medium theory, of which ASE's documentation has a table."""
    scales = [0.96, 0.98, 1.0, 1.02, 1.04]
    energies = [FRONTEND.evaluate(model, fcc(number, a * s)).energy / 4 for s in scales]
    assert np.argmin(energies) == 2
    atom = Structure(np.array([number]), np.zeros((1, 3)), np.zeros((3, 3)), (False, False, False))
    assert FRONTEND.evaluate(model, atom).energy - energies[2] == pytest.approx(cohesive, abs=0.06)


def test_atoms_repel_down_to_small_distances(model: SmallPotential) -> None:
    for number in NUMBERS:
        for distance in np.linspace(1.3, 2.0, 8):
            pair = np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]])
            dimer = Structure(np.array([number, number]), pair, np.zeros((3, 3)), (False, False, False))
            assert FRONTEND.evaluate(model, dimer).forces[1, 0] > 1.0


def test_the_weights_are_the_same_everywhere(model: SmallPotential) -> None:
    """One number that both versions of e3nn have to give, and the dtypes have to share."""
    energy = FRONTEND.evaluate(model, PROBES[0]).energy
    assert energy == pytest.approx(ALLOY_ENERGY, abs=1e-9)
    assert FRONTEND.evaluate(small_potential(), PROBES[0]).energy == pytest.approx(energy, abs=1e-4)


ALLOY_ENERGY = 14.605238103928638  # eV, of the first probe structure


def test_dynamics_holds_together(model: SmallPotential) -> None:
    """400 fs of a copper crystal at 300 K: energy is conserved and every atom stays at its site."""
    rng = np.random.default_rng(0)
    crystal = fcc(29, 3.6, cells=2)
    sites, mass, dt, acceleration = crystal.positions, 63.546, 4.0, 9.648533e-3  # u, fs, 1 eV/(A u) in A/fs^2
    velocities = rng.normal(size=(32, 3)) * np.sqrt(2 * 8.617333e-5 * 300 * acceleration / mass)
    velocities -= velocities.mean(axis=0)
    here, totals = FRONTEND.evaluate(model, crystal), []
    for _ in range(100):
        velocities += 0.5 * dt * acceleration * here.forces / mass
        crystal = replace(crystal, positions=crystal.positions + dt * velocities)
        here = FRONTEND.evaluate(model, crystal)
        velocities += 0.5 * dt * acceleration * here.forces / mass
        totals.append(here.energy + 0.5 * mass * float((velocities**2).sum()) / acceleration)
    assert np.ptp(totals) / 32 < 1e-3
    assert 0.05 < np.abs(crystal.positions - sites).max() < 1.0


# The model


def test_physics(model: SmallPotential) -> None:
    evaluate, bounds = evaluator(model), TABLE["float64"]
    for structure in (PROBES[0], PROBES[1]):
        here = evaluate(structure)
        for name in SYMMETRIES:
            for quantity, error in symmetry_error(name, evaluate, structure, here).items():
                assert error <= bounds.symmetry[quantity].limit(abs(here.energy)), (structure.name, name, quantity)
        assert force_error(evaluate, structure, here)[0] < 1e-7
    assert stress_error(evaluate, PROBES[0], evaluate(PROBES[0]))[0] < 1e-8


def test_three_derivatives_vanish_at_the_cutoff(model: SmallPotential) -> None:
    """The energy is the fourth power of the distance to the cutoff: half the distance gives a sixteenth."""

    def binding(gap: float) -> float:
        pair = np.array([[0.0, 0.0, 0.0], [CUTOFF - gap, 0.0, 0.0]])
        dimer = Structure(np.array([29, 29]), pair, np.zeros((3, 3)), (False, False, False))
        apart = replace(dimer, positions=2.0 * pair)
        return FRONTEND.evaluate(model, dimer).energy - FRONTEND.evaluate(model, apart).energy

    assert binding(0.02) / binding(0.01) == pytest.approx(16.0, rel=0.05)
    assert binding(-0.01) == 0.0


def test_edges_beyond_the_cutoff_count_nothing(model: SmallPotential) -> None:
    near, far = (collate(PROBES, NUMBERS, cutoff, torch.float64) for cutoff in (CUTOFF, CUTOFF + 1.0))
    assert far["edge_index"].shape[1] > near["edge_index"].shape[1]
    torch.testing.assert_close(model(near)["forces"], model(far)["forces"], rtol=0, atol=1e-10)


def test_making_one_leaves_torch_as_it_was() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = build(Settings(NUMBERS, (0.0, 0.0, 0.0)), torch.float64)
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_default_dtype() == torch.float32
    second = build(Settings(NUMBERS, (0.0, 0.0, 0.0)), torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_foreign_species_is_refused(model: SmallPotential) -> None:
    data = collate(PROBES, NUMBERS, CUTOFF, torch.float64)
    with pytest.raises(ValueError, match="does not know"):
        model({**data, "numbers": data["numbers"] - 1})


# Files


def test_save_and_load(tmp_path: Path) -> None:
    made = build(Settings((1, 8), (-1.0, -2.0), cutoff=4.0, features="4x0e+2x1o", layers=1), torch.float64, seed=5)
    save(made, tmp_path / "a.npz")
    read = load(tmp_path / "a.npz")
    assert read.settings == made.settings
    probe = probe_structures((1, 8), 4.0)[0]
    assert FRONTEND.evaluate(read, probe).energy == FRONTEND.evaluate(made, probe).energy
    assert FRONTEND.evaluate(load(tmp_path / "a.npz", torch.float32), probe).dtype == "float32"


def test_save_leaves_a_file_as_it_is(model: SmallPotential, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        save(model, tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_text() == "mine"
    with pytest.raises(UsageError, match="cannot be written"):
        save(model, tmp_path / "no folder" / "a.npz")


def _members() -> dict[str, np.ndarray]:
    with np.load(WEIGHTS, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _text(path: Path) -> None:
    path.write_text("not a model")


def _truncated(path: Path) -> None:
    path.write_bytes(WEIGHTS.read_bytes()[:-3000])


def _altered(path: Path) -> None:
    data = bytearray(WEIGHTS.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def _other(path: Path) -> None:
    np.savez(path, positions=np.zeros((3, 3)))


def _newer(path: Path) -> None:
    np.savez(path, **{**_members(), "format": "fxpass small potential 2"})


def _without_a_weight(path: Path) -> None:
    members = _members()
    del members["readout.weight"]
    np.savez(path, **members)


def _wrong_shape(path: Path) -> None:
    np.savez(path, **{**_members(), "readout.weight": np.zeros(7)})


def _pickle(path: Path) -> None:
    np.savez(path, **{**_members(), "readout.weight": np.array([print], dtype=object)})


def _foreign_settings(path: Path) -> None:
    settings = {**asdict(Settings(NUMBERS, (0.0, 0.0, 0.0))), "colour": "red"}
    np.savez(path, **{**_members(), "settings": json.dumps(settings)})


@pytest.mark.parametrize(
    "write",
    [_text, _truncated, _altered, _other, _newer, _without_a_weight, _wrong_shape, _pickle, _foreign_settings],
)
def test_a_file_of_something_else_is_refused(write: object, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write(path)  # type: ignore[operator]
    with pytest.raises(UnsupportedModelError, match=r"a\.npz does not hold a small potential: \S"):
        FRONTEND.load(str(path))


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "a.npz")


# The frontend


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[SmallPotential, fxpass.Optimized]:
    """The model in one dtype, and its drop-in."""
    model = small_potential(request.param)
    return model, fxpass.optimize(model, "exact", verify=False)


@pytest.mark.slow
def test_the_receipt_passes() -> None:
    receipt = fxpass.optimize(WEIGHTS, "exact").report.receipt
    assert receipt is not None and receipt.passed


@pytest.mark.slow
def test_it_is_a_drop_in(pair: tuple[SmallPotential, fxpass.Optimized]) -> None:
    model, optimized = pair
    assert inspect.signature(optimized.forward) == inspect.signature(model.forward)
    dtype = next(model.parameters()).dtype
    # rounding of float32: TABLE is about two results that each differ from float64
    limits = {k: 2 * bound.limit(20.0) for k, bound in TABLE[str(dtype).removeprefix("torch.")].values.items()}
    limits |= {"energy": 70 * limits["energy"], "node_energy": 70 * limits["energy"]}
    for batch in (PROBES, PROBES[3:4], PROBES[3:5], PROBES[:1] * 7):
        data = collate(batch, NUMBERS, CUTOFF, dtype)
        for flags in ({}, {"compute_stress": True}, {"compute_forces": False}, {"training": True}):
            before = {name: tensor.clone() for name, tensor in data.items()}
            expected, found = model(data, **flags), optimized(data, **flags)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
                finite = torch.isfinite(value)
                assert torch.equal(torch.isfinite(found[name]), finite), (name, flags)
                error = (found[name] - value)[finite].detach().abs()
                assert error.numel() == 0 or error.max() <= limits[name], (name, flags)
                assert "training" in flags or not found[name].requires_grad
            assert all(torch.equal(data[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_the_drop_in_refuses_a_foreign_species(pair: tuple[SmallPotential, fxpass.Optimized]) -> None:
    model, optimized = pair
    data = collate(PROBES, NUMBERS, CUTOFF, next(model.parameters()).dtype)
    with pytest.raises(ValueError, match="does not know"):
        optimized({**data, "numbers": data["numbers"] - 1})


@pytest.mark.slow
def test_second_derivatives(pair: tuple[SmallPotential, fxpass.Optimized]) -> None:
    """Forces of ``training=True`` can be differentiated: a product of the Hessian with a vector."""
    model, optimized = pair
    products = []
    for each in (model, optimized):
        data = collate(PROBES[:1], NUMBERS, CUTOFF, next(model.parameters()).dtype)
        data["positions"].requires_grad_(True)
        forces = each(data, training=True)["forces"]
        direction = torch.linspace(-1, 1, forces.numel(), dtype=forces.dtype).view_as(forces)
        products.append(torch.autograd.grad((forces * direction).sum(), data["positions"])[0])
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-9 if forces.dtype == torch.float64 else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        Settings((6,), (-1.5,), features="4x0e", max_degree=0, layers=1),
        Settings((1, 6, 7, 8), (-1.0, -2.0, -3.0, -4.0), features="3x0o+6x0e+4x1o+2x1e+3x2e", max_degree=3, layers=3),
    ],
    ids=["scalars", "many irreps"],
)
def test_any_settings(settings: Settings) -> None:
    """Random weights: all that the frontend does not know beforehand."""
    model = build(settings, torch.float64, seed=2)
    optimized = fxpass.optimize(model, "exact", verify=False)
    for structure in probe_structures(settings.numbers, settings.cutoff):
        found, expected = (FRONTEND.evaluate(each, structure) for each in (optimized, model))
        for quantity, error in deviation(found, expected).items():
            assert error <= TABLE["float64"].values[quantity].limit(np.abs(expected.forces).max()), structure.name


def test_the_program(model: SmallPotential) -> None:
    program = FRONTEND.capture(model)
    calls = [str(node.target).removesuffix(".default") for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count("fxpass.tensor_product") == 6  # messages, self-connection and gate of two layers
    assert calls.count("fxpass.linear") == 6  # embedding, two a layer, readout
    assert calls.count("fxpass.polynomial") == 1
    assert calls.count("fxpass.scatter_sum") == 3  # messages of two layers, energies
    assert [spec.dims for spec in program.outputs] == [("graphs",), ("atoms",)]


def test_recognises_its_own_only(model: SmallPotential) -> None:
    class Derived(SmallPotential):
        pass

    assert FRONTEND.recognises(model)
    assert not FRONTEND.recognises(torch.nn.Linear(1, 1))
    FRONTEND.check(model)
    derived = Derived(Settings(NUMBERS, (0.0, 0.0, 0.0)))
    with pytest.raises(UnsupportedModelError, match="Derived derives from SmallPotential"):
        FRONTEND.check(derived)


@pytest.mark.slow
def test_torchscript(model: SmallPotential, tmp_path: Path) -> None:
    """The scripted drop-in gives what the model gives, for sizes it was not made with."""
    fxpass.optimize(model, "exact", target="torchscript", verify=False).save(tmp_path / "model.pt")
    scripted = torch.jit.load(tmp_path / "model.pt")
    for batch in (PROBES, PROBES[3:4]):
        data = collate(batch, NUMBERS, CUTOFF, torch.float64)
        for flags in ({"compute_stress": True}, {"compute_forces": False}):
            expected, found = model(data, **flags), scripted(data, **flags)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, equal_nan=True)


# The rule for Extract, which Gate is made of


@pytest.mark.parametrize("squeeze", [False, True])
def test_extract(squeeze: bool) -> None:
    from fxpass._torch_compat import o3

    o3()
    from e3nn.nn import Extract, ExtractIr

    x = torch.randn(5, 2 + 3 + 6 + 4)
    if squeeze:
        modules = [ExtractIr("2x0e+1x1o+2x1o+4x0e", "0e")]
    else:
        modules = [
            Extract("2x0e+1x1o+2x1o+4x0e", ["4x0e+1x1o", "2x1o", ""], [(3, 1), (2,), ()]),
            Extract("2x0e+1x1o+2x1o+4x0e", ["2x0e+1x1o+2x1o+4x0e"], [(0, 1, 2, 3)]),
        ]
    for module in modules:
        expected, found = module(x), prepare(torch.nn.Sequential(module))(x)
        assert type(found) is type(expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
