"""schnetpack's own models: the drop-in against the original, in every variant that the frontend covers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxpass
from fxpass.errors import UnsupportedModelError
from fxpass.frontends.schnetpack import SchNetPackFrontend, import_schnetpack
from fxpass.structures import Structure

pytestmark = pytest.mark.schnetpack

CUTOFF = 4.0
NUMBERS = (1, 6, 8, 14)
EXACT_ENERGY, EXACT_FORCES, EXACT_STRESS = 1e-10, 1e-9, 1e-10  # eV/atom, eV/A, eV/A^3
KINDS = ("SchNet", "PaiNN", "SO3net")


def build(
    kind: str = "SchNet",
    *,
    basis: str = "GaussianRBF",
    cutoff_fn: str = "CosineCutoff",
    layers: int = 2,
    dtype: torch.dtype = torch.float64,
    postprocessors: Any = (),
    nuclear: bool = False,
    aggregation: str = "sum",
    per_atom: str | None = None,
    zbl: bool = False,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A model with random weights, as schnetpack's configurations put them together."""
    spk = import_schnetpack()
    nn, atomistic = spk.nn, spk.atomistic
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "SO3net":
            options.setdefault("lmax", 2)
        representation = getattr(spk.representation, kind)(
            n_atom_basis=8,
            n_interactions=layers,
            radial_basis=getattr(nn, basis)(n_rbf=6, cutoff=CUTOFF),
            cutoff_fn=getattr(nn, cutoff_fn)(CUTOFF),
            nuclear_embedding=nn.NuclearEmbedding(101, 8, zero_init=False) if nuclear else None,
            **options,
        )
        key = "energy" if not zbl else "network"
        outputs = [
            atomistic.Atomwise(n_in=8, output_key=key, aggregation_mode=aggregation, per_atom_output_key=per_atom)
        ]
        if zbl:
            repulsion = atomistic.ZBLRepulsionEnergy("eV", "Ang", "zbl", cutoff_fn=nn.CosineCutoff(CUTOFF))
            outputs += [repulsion, atomistic.Aggregation(["network", "zbl"], output_key="energy")]
        outputs.append(atomistic.Forces(calc_stress=True))
        inputs = [atomistic.Strain(), atomistic.PairwiseDistances()]
        made = [getattr(spk.transform, name)(**arguments) for name, arguments in postprocessors]
        model = spk.model.NeuralNetworkPotential(representation, inputs, outputs, made).to(dtype).eval()
        for module in model.postprocessors:
            for buffer in module.buffers():
                buffer.copy_(torch.randn(buffer.shape))
    return model


OFFSETS = ("AddOffsets", {"property": "energy", "add_mean": True, "add_atomrefs": True})
#: name -> arguments of :func:`build`; every class and option that the frontend covers occurs
VARIANTS: dict[str, dict[str, Any]] = {
    "schnet": {},
    "schnet-shared": {"shared_interactions": True},
    "schnet-filters": {"n_filters": 5, "layers": 1},
    "schnet-bessel": {"basis": "BesselRBF", "layers": 1},
    "schnet-centred": {"basis": "GaussianRBFCentered", "cutoff_fn": "MollifierCutoff", "layers": 1},
    "schnet-nuclear": {"nuclear": True, "layers": 1},
    "schnet-zbl": {"zbl": True, "layers": 1},
    "schnet-mean": {"aggregation": "avg", "per_atom": "contributions", "layers": 1},
    "schnet-offsets": {"postprocessors": [("CastTo64", {}), OFFSETS], "layers": 1},
    "schnet-postprocessors": {
        "postprocessors": [
            ("ScaleProperty", {"input_key": "energy", "output_key": "scaled"}),
            ("AddOffsets", {"property": "energy", "add_atomrefs": True, "is_extensive": False}),
            ("RemoveOffsets", {"property": "energy", "remove_mean": True, "remove_atomrefs": True}),
            ("CastTo32", {}),
        ],
        "layers": 1,
    },
    "painn": {"kind": "PaiNN", "layers": 3},
    "painn-shared": {"kind": "PaiNN", "shared_interactions": True},
    "painn-shared-filters": {"kind": "PaiNN", "shared_filters": True, "basis": "BesselRBF"},
    "painn-one-layer": {"kind": "PaiNN", "layers": 1},
    "so3net": {"kind": "SO3net", "layers": 1},
    "so3net-shared": {"kind": "SO3net", "lmax": 1, "shared_interactions": True},
}


def structures(seed: int = 0) -> list[Structure]:
    """Periodic and isolated, 1 atom and 0 edges, all species, and one larger than the others."""
    rng = np.random.default_rng(seed)

    def random(n: int, box: float, pbc: bool, name: str) -> Structure:
        grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n]
        positions = grid * box / 3 + rng.normal(scale=0.15, size=(n, 3))
        cell = np.eye(3) * box + (np.tri(3, k=-1) * 0.3 if pbc else 0)
        return Structure(rng.choice(NUMBERS, n), positions, cell * pbc, (pbc,) * 3, name)

    dimer = np.array([[0.0, 0, 0], [0, 0, 1.6]])
    nothing, nowhere = np.zeros((3, 3)), (False,) * 3
    return [
        random(12, 6.6, True, "periodic"),
        random(5, 6.6, False, "cluster"),
        Structure(np.array([8]), np.zeros((1, 3)), nothing, nowhere, "atom"),
        Structure(np.array([6, 14]), dimer, nothing, nowhere, "dimer"),
        Structure(np.array([1, 8]), dimer * 5, nothing, nowhere, "no edges"),
        Structure(np.array([14]), np.zeros((1, 3)), np.eye(3) * 3.1, (True,) * 3, "one atom, its images"),
    ]


def batch(items: list[Structure], dtype: torch.dtype = torch.float64, reach: float = CUTOFF) -> dict[str, torch.Tensor]:
    """schnetpack's inputs by its own neighbour list, converter and collation."""
    spk = import_schnetpack()
    neighbours = spk.transform.MatScipyNeighborList(cutoff=reach)
    converter = spk.interfaces.AtomsConverter(neighbor_list=neighbours, dtype=dtype)
    return converter([item.to_ase() for item in items])


def call(model: Any, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return model({k: v.clone() for k, v in data.items()})


def compare(found: dict[str, Any], expected: dict[str, Any], data: dict[str, Any], *, scale: float = 1.0) -> None:
    """Same names, dtypes and shapes, and values within the exact tolerances times ``scale``."""
    assert set(found) == set(expected)
    limits = {"forces": EXACT_FORCES, "stress": EXACT_STRESS}
    periodic = data["_pbc"].view(-1, 3).all(1)
    for name, value in expected.items():
        other = found[name].detach()
        assert (other.shape, other.dtype) == (value.shape, value.dtype), name
        if name == "stress":
            assert not torch.isfinite(other[~periodic]).any()  # isolated: over a volume of zero, as in the original
            other, value = other[periodic], value[periodic]
        assert torch.isfinite(other).all(), name
        rounding = 1e-6 if other.dtype == torch.float32 else limits.get(name, EXACT_ENERGY)
        value = value.detach()
        error = (other - value).abs()
        assert error.numel() == 0 or error.max() <= rounding * scale * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_exact_in_float64(name: str) -> None:
    compare_variant(name, "eager")


@pytest.mark.parametrize("name", ["schnet", "painn", "so3net"])
def test_variant_in_kernels_is_exact_in_float64(name: str) -> None:
    optimised = compare_variant(name, "native")
    layers = VARIANTS[name].get("layers", 2)
    fused = [row.op for row in optimised.manifest if row.kernel]
    assert fused.count("convolution_gradient") == layers  # energies alone need none
    assert fused.count("convolution") == 2 * layers


def compare_variant(name: str, target: str) -> fxpass.Optimized:
    model = build(**VARIANTS[name])
    before = copy.deepcopy(model.state_dict())
    optimised = fxpass.optimize(model, "exact", verify=False, target=target)
    data = batch(structures())
    expected = call(model, data)
    assert expected["forces"].abs().max() > 1e-3, "the test would not see a wrong force"
    compare(call(optimised, data), expected, data)
    for item in structures():
        alone = batch([item])
        compare(call(optimised, alone), call(model, alone), alone)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"the original's {key} was changed"
    return optimised


@pytest.fixture(scope="module", params=KINDS[:2])
def pair(request: pytest.FixtureRequest) -> tuple[Any, fxpass.Optimized]:
    """A float32 model with schnetpack's usual postprocessors, and what the default preset makes of it."""
    model = build(request.param, dtype=torch.float32, postprocessors=[("CastTo64", {}), OFFSETS])
    return model, fxpass.optimize(model, "default", target="native")


def test_default_preset_tabulates_and_fuses_every_convolution(pair: tuple[Any, fxpass.Optimized]) -> None:
    model, optimised = pair
    receipt = optimised.report.receipt
    assert receipt is not None and receipt.passed
    fired = {record.name: [a.rule for a in record.applications] for record in optimised.report.records}
    assert fired["tabulate"] == ["table"] * 2
    assert sorted(set(fired["fuse-convolution"])) == ["convolution", "convolution-gradient"]
    assert len(fired["fuse-convolution"]) == 4
    reasons = [row.reason for row in optimised.manifest if not row.kernel]
    assert not reasons
    assert any("units" in warning for warning in optimised.report.warnings)
    data = batch(structures(), torch.float32)
    found, expected = call(optimised, data), call(model, data)
    assert found["energy"].dtype == torch.float64  # the offsets are added after CastTo64
    assert torch.allclose(found["energy"], expected["energy"], rtol=1e-6, atol=1e-5)
    assert torch.allclose(found["forces"], expected["forces"], rtol=1e-4, atol=1e-5)


def test_any_list_that_holds_all_neighbours_gives_the_same(pair: tuple[Any, fxpass.Optimized]) -> None:
    _, optimised = pair
    data = batch(structures()[:2], torch.float32)
    expected = call(optimised, data)
    wide = batch(structures()[:2], torch.float32, reach=CUTOFF + 0.5)
    assert len(wide["_idx_i"]) > len(data["_idx_i"])
    order = torch.randperm(len(wide["_idx_i"]), generator=torch.Generator().manual_seed(0))
    shuffled = {**wide, **{k: wide[k][order] for k in ("_idx_i", "_idx_j", "_offsets")}}
    for other in (wide, shuffled):
        for name, value in call(optimised, other).items():
            assert torch.equal(value[:1], expected[name][:1]), name


def test_masked_edges_change_nothing(pair: tuple[Any, fxpass.Optimized]) -> None:
    model, _ = pair
    masking = "fold-constants,preserve-sparsity{beyond_cutoff=mask},differentiate"
    optimised = fxpass.optimize(model, masking, verify=False)
    data = batch(structures()[:2], torch.float32)
    expected = call(model, data)
    pad = {"_idx_i": torch.tensor([-1, -1]), "_idx_j": torch.tensor([-1, -1]), "_offsets": torch.zeros(2, 3)}
    found = call(optimised, {**data, **{k: torch.cat([data[k], v]) for k, v in pad.items()}})
    assert torch.allclose(found["energy"], expected["energy"], rtol=1e-6)
    assert torch.allclose(found["forces"], expected["forces"], rtol=1e-4, atol=1e-6)


def test_package_and_calculator(pair: tuple[Any, fxpass.Optimized], tmp_path: Path) -> None:
    _, optimised = pair
    optimised.save(tmp_path / "model.fxp")
    loaded = fxpass.load(tmp_path / "model.fxp")
    item = structures()[0]
    data = batch([item], torch.float32)
    expected = call(optimised, data)
    for name, value in call(loaded, data).items():
        assert torch.equal(value[~value.isnan()], expected[name][~value.isnan()]), name
    atoms = item.to_ase()
    atoms.calc = loaded.calculator()
    assert atoms.get_potential_energy() == pytest.approx(float(expected["energy"][0]), rel=1e-6)
    assert np.allclose(atoms.get_forces(), expected["forces"], atol=1e-5)
    assert np.allclose(atoms.get_stress(voigt=False), expected["stress"][0], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_torchscript(kind: str, tmp_path: Path) -> None:
    model = build(kind, dtype=torch.float32, postprocessors=[("CastTo64", {}), OFFSETS])
    optimised = fxpass.optimize(model, "default", target="torchscript", verify=False)
    optimised.save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    for items in (structures()[:2], structures()[2:3]):
        data = batch(items, torch.float32)
        found, expected = call(loaded, data), call(model, data)
        assert torch.allclose(found["energy"], expected["energy"], rtol=1e-6, atol=1e-5)
        assert torch.allclose(found["forces"], expected["forces"], rtol=1e-4, atol=1e-5)


class TestSpkCalculator:
    """schnetpack's own calculators with the drop-in inside."""

    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # schnetpack 2.1.1 unpickles whole models
        path = tmp_path / "best_model"
        torch.save(build("PaiNN"), path)
        return path

    def test_drop_in_takes_the_place_of_the_model(self, path: Path) -> None:
        spk = import_schnetpack()
        neighbours = spk.transform.ASENeighborList(cutoff=CUTOFF)
        options = {"energy_unit": "kcal/mol", "stress_key": None, "dtype": torch.float64}
        calculators = [spk.interfaces.SpkCalculator(str(path), neighbours, **options) for _ in range(2)]
        calculators[1].model = fxpass.optimize(calculators[1].model, "exact", verify=False)
        atoms, moved = structures()[0].to_ase(), structures(seed=1)[0].to_ase()
        for one in (atoms, moved):
            energies, forces = [], []
            for calculator in calculators:
                one.calc = calculator
                energies.append(one.get_potential_energy())
                forces.append(one.get_forces())
            assert energies[0] == pytest.approx(energies[1], abs=1e-10)
            assert np.allclose(forces[0], forces[1], rtol=0, atol=1e-9)

    def test_stress_that_the_calculator_switches_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spk = import_schnetpack()
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        model = build()
        forces_only = spk.model.NeuralNetworkPotential(
            model.representation,
            [spk.atomistic.PairwiseDistances()],
            [model.output_modules[0], spk.atomistic.Forces()],
        )
        torch.save(forces_only, tmp_path / "best_model")
        calculator = spk.interfaces.SpkCalculator(
            str(tmp_path / "best_model"),
            spk.transform.ASENeighborList(cutoff=CUTOFF),
            stress_key="stress",
            energy_unit="eV",
            dtype=torch.float64,
        )
        atoms = structures()[0].to_ase()
        atoms.calc = calculator
        expected = atoms.get_stress(voigt=False)
        calculator.model = fxpass.optimize(calculator.model, "exact", verify=False)
        atoms.calc.reset()
        assert np.allclose(atoms.get_stress(voigt=False), expected, rtol=0, atol=EXACT_STRESS)

    def test_ase_interface(self, path: Path, tmp_path: Path) -> None:
        spk = import_schnetpack()
        structures()[1].to_ase().write(tmp_path / "cluster.xyz")
        found = []
        for optimise in (False, True):
            interface = spk.interfaces.AseInterface(
                str(tmp_path / "cluster.xyz"),
                str(tmp_path / f"run_{optimise}"),
                str(path),
                spk.transform.ASENeighborList(cutoff=CUTOFF),
                dtype=torch.float64,
            )
            calculator = interface.molecule.calc
            if optimise:
                calculator.model = fxpass.optimize(calculator.model, "exact", verify=False)
            interface.calculate_single_point()
            found.append((interface.molecule.energy, interface.molecule.forces))
        assert found[0][0] == pytest.approx(found[1][0], abs=1e-10)
        assert np.allclose(found[0][1], found[1][1], rtol=0, atol=1e-9)

    def test_checkpoint(self, path: Path) -> None:
        optimised = fxpass.optimize(path, "exact", verify=False)
        data = batch(structures()[:2])
        compare(call(optimised, data), call(build("PaiNN"), data), data)

    def test_scripted_for_schnetpacks_own_dynamics(self, path: Path) -> None:
        """What ``SchNetPackCalculator(script_model=True)`` does with a model."""
        model = build("PaiNN", postprocessors=[OFFSETS])
        optimised = fxpass.optimize(model, "exact", target="torchscript", verify=False)
        scripted = torch.jit.script(optimised.interface)
        scripted.do_postprocessing = model.do_postprocessing = False
        data = batch(structures()[:2])
        compare(call(scripted, data), call(model, data), data)


def test_second_derivatives_in_training_mode() -> None:
    model = build("PaiNN")
    optimised = fxpass.optimize(model, "exact", verify=False)
    data = batch(structures()[:2])
    rows = []
    for module in (model.train(), optimised.interface.train()):
        inputs = {k: v.clone() for k, v in data.items()}
        positions = inputs["_positions"]  # the original puts strained ones in their place
        forces = module(inputs)["forces"]
        rows.append(torch.autograd.grad(forces.square().sum(), positions)[0])
    assert rows[0].abs().max() > 1e-3
    assert torch.allclose(rows[0], rows[1], rtol=0, atol=1e-9)


def test_import_leaves_torch_as_it_was() -> None:
    import torch.utils.data.dataloader

    assert import_schnetpack().__version__ in SchNetPackFrontend.tested
    assert not hasattr(torch.utils.data.dataloader, "T_co")


def test_unknown_atomic_number(pair: tuple[Any, fxpass.Optimized]) -> None:
    _, optimised = pair
    data = batch(structures()[:1], torch.float32)
    for number in (-1, 100):
        data["_atomic_numbers"][0] = number
        with pytest.raises(RuntimeError, match="atomic numbers must be below 100"):
            call(optimised, data)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_inputs_of_a_float64_model(kind: str) -> None:
    model = build(kind, layers=1)
    optimised = fxpass.optimize(model, "exact", verify=False)
    data = batch(structures()[:1], torch.float32)
    found, expected = call(optimised, data), call(model, data)
    assert expected["forces"].dtype == torch.float32  # gradients are of the type of what they are by
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name


def test_repulsion_that_is_switched_off_within_the_cutoff() -> None:
    spk = import_schnetpack()
    model = build(zbl=True, layers=1)
    model.output_modules[1].cutoff_fn = spk.nn.SwitchFunction(1.0, CUTOFF - 1).double()
    data = batch(structures()[:2])
    compare(call(fxpass.optimize(model, "exact", verify=False), data), call(model, data), data)


def test_charges_of_one_name() -> None:
    spk = import_schnetpack()
    model = build(layers=1)
    charges = spk.atomistic.Atomwise(n_in=8, aggregation_mode=None, output_key="q", per_atom_output_key="q")
    offsets = spk.transform.RemoveOffsets("q", remove_mean=True, is_extensive=False)
    offsets.mean.fill_(2.0)
    model.output_modules.insert(0, charges.double())
    model.postprocessors.append(offsets.double())
    model.collect_outputs()
    data = batch(structures()[:2])
    compare(call(fxpass.optimize(model, "exact", verify=False), data), call(model, data), data)


def test_reads_its_own_files_alone(tmp_path: Path) -> None:
    frontend, path = SchNetPackFrontend(), str(tmp_path / "model")
    torch.save(build(layers=1), path)
    assert frontend.reads(path)
    torch.save({"config": ["schnetpack.model", "/data/schnetpack.model.base"]}, path)
    assert not frontend.reads(path)


def _without_strain(spk: Any, model: Any) -> Any:
    del model.input_modules[0]
    return model


def _with_electrons(spk: Any, model: Any) -> Any:
    embedding = spk.nn.ElectronicEmbedding("total_charge", 8, is_charged=True)
    model.representation.electronic_embeddings.append(embedding)
    return model


def _with_dipole(spk: Any, model: Any) -> Any:
    model.output_modules.insert(0, spk.atomistic.DipoleMoment(n_in=8))
    return model


def _with_filter(spk: Any, model: Any) -> Any:
    model.input_modules.append(spk.atomistic.FilterShortRange(2.0))
    return model


def _without_forces(spk: Any, model: Any) -> Any:
    del model.output_modules[-1]
    return model


def _other_energy(spk: Any, model: Any) -> Any:
    model.output_modules[-1].energy_key = "enthalpy"
    return model


def _field_schnet(spk: Any, model: Any) -> Any:
    model.representation = spk.representation.FieldSchNet(
        n_atom_basis=8, n_interactions=1, radial_basis=spk.nn.GaussianRBF(6, CUTOFF), external_fields=[],
        cutoff_fn=spk.nn.CosineCutoff(CUTOFF),
    )  # fmt: skip
    return model


def _derived(spk: Any, model: Any) -> Any:
    class Mine(spk.representation.SchNet):  # type: ignore[name-defined, misc]
        pass

    model.representation.__class__ = Mine
    return model


def _half(spk: Any, model: Any) -> Any:
    model.postprocessors.append(spk.transform.CastMap({"float32": "float16"}))
    return model


def _masses(spk: Any, model: Any) -> Any:
    model.postprocessors.append(spk.transform.SubtractCenterOfMass())
    return model


def _switched(spk: Any, model: Any) -> Any:
    model.representation.cutoff_fn = spk.nn.SwitchFunction(3.0, CUTOFF)
    return model


def _with_zbl(spk: Any, model: Any, cutoff_fn: Any) -> Any:
    model.output_modules.insert(0, spk.atomistic.ZBLRepulsionEnergy("eV", "Ang", "zbl", cutoff_fn=cutoff_fn))
    return model


def _long_repulsion(spk: Any, model: Any) -> Any:
    return _with_zbl(spk, model, spk.nn.CosineCutoff(CUTOFF + 2))


def _long_switched_repulsion(spk: Any, model: Any) -> Any:
    return _with_zbl(spk, model, spk.nn.SwitchFunction(CUTOFF, CUTOFF + 1))


def _endless_repulsion(spk: Any, model: Any) -> Any:
    return _with_zbl(spk, model, None)


def _energy_after_forces(spk: Any, model: Any) -> Any:
    model.output_modules.append(model.output_modules[0])
    del model.output_modules[0]
    return model


def _energy_again(spk: Any, model: Any) -> Any:
    model.output_modules.append(spk.atomistic.Aggregation(["energy", "energy"], output_key="energy"))
    return model


def _two_energies(spk: Any, model: Any) -> Any:
    model.output_modules.insert(0, spk.atomistic.Atomwise(n_in=8, output_key="energy"))
    return model


def _charges_of_two_names(spk: Any, model: Any) -> Any:
    charges = spk.atomistic.Atomwise(n_in=8, aggregation_mode=None, output_key="q", per_atom_output_key="qa")
    model.output_modules.insert(0, charges)
    model.postprocessors.append(spk.transform.RemoveOffsets("q", remove_mean=True, is_extensive=False))
    return model


def _task(spk: Any, model: Any) -> Any:
    return spk.task.AtomisticTask(model, outputs=[], optimizer_args={"lr": 1e-3})


REFUSED = [
    (_without_strain, "needs the input module Strain"),
    (_with_electrons, "electronic_embeddings"),
    (_with_dipole, "output module DipoleMoment is not covered.*one of .*Atomwise"),
    (_with_filter, "input module FilterShortRange is not covered.*one of PairwiseDistances, Strain"),
    (_without_forces, "0 modules Forces"),
    (_other_energy, "'enthalpy'.*energy_key= one of energy"),
    (_field_schnet, "representation FieldSchNet is not covered.*one of PaiNN, SO3net, SchNet"),
    (_derived, "representation Mine is not covered"),
    (_half, "float16"),
    (_masses, "postprocessor SubtractCenterOfMass is not covered"),
    (_switched, r"cutoff SwitchFunction is not covered.*representation\.cutoff_fn"),
    (_long_repulsion, r"a repulsion to 6, beyond the representation's cutoff of 4.*CosineCutoff\(4\)"),
    (_long_switched_repulsion, "a repulsion to 5, beyond the representation's cutoff of 4"),
    (_endless_repulsion, r"a repulsion without cutoff_fn.*CosineCutoff\(4\)"),
    (_energy_after_forces, "no output module before Forces computes one 'energy'"),
    (_energy_again, "the output 'energy', which a module before it computes too"),
    (_two_energies, "the output 'energy', which a module before it computes too"),
    (_charges_of_two_names, "q and qa are one tensor.*one name for output_key and per_atom_output_key"),
    (_task, "AtomisticTask is not covered.*its attribute model"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", "").strip("_") or None)
def test_refused_by_name(change: Any, message: str) -> None:
    model = change(import_schnetpack(), build(layers=1))
    with pytest.raises(UnsupportedModelError, match=message):
        fxpass.optimize(model)


def test_other_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpass.frontends.schnetpack.metadata.version", lambda name: "2.0.4")
    with pytest.raises(UnsupportedModelError, match=r"schnetpack 2\.0\.4 is not covered, only 2\.1\.1"):
        fxpass.optimize(build(layers=1))


def test_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    torch.save({"model": build(layers=1)}, path)
    with pytest.raises(UnsupportedModelError, match="holds a dict"):
        fxpass.optimize(path)
