"""SevenNet: the drop-in against the original, on sevenn's own graphs, and inside sevenn's own calculator."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import fxpass
from fxpass.capture.capture import copy_model
from fxpass.structures import Structure
from variants import chosen

if TYPE_CHECKING:
    from ase import Atoms

pytestmark = pytest.mark.sevenn

NUMBERS = (8, 14, 40)  # by symbol: O, Si, Zr, which is the order of sevenn's species
CUTOFF = 4.0
EXACT_ENERGY, EXACT_FORCES = 1e-10, 1e-9  # eV/atom, eV/A
XPLOR = {"cutoff_function_name": "XPLOR", "cutoff_on": 3.3}
MODAL = {
    "use_modality": True,
    "_number_of_modalities": 2,
    "_modal_map": {"pbe": 0, "r2scan": 1},
    "use_modal_wise_shift": True,
    "use_modal_wise_scale": False,
    "use_modal_self_inter_intro": True,
    "use_modal_self_inter_outro": True,
    "use_modal_output_block": True,
    "shift": [[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]],
}

#: name -> settings of sevenn that are not its defaults
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "like SevenNet-0": {
        "is_parity": False,
        "lmax": 2,
        "self_connection_type": "linear",
        "irreps_manual": ["8x0e", "8x0e+4x1e+2x2e", "8x0e"],
        "cutoff_function": XPLOR,
    },
    "l3": {"lmax": 3, "channel": 2},
    "three layers, degrees of their own": {"lmax": 2, "lmax_edge": 2, "lmax_node": 1, "num_convolution_layer": 3},
    "one layer, fixed basis, raw harmonics": {
        "num_convolution_layer": 1,
        "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 5, "trainable_coeff": False},
        "_normalize_sph": False,
    },
    "bias, network as readout": {
        "use_bias_in_linear": True,
        "self_connection_type": ["linear", "nequip"],
        "readout_as_fcn": True,
        "readout_fcn_activation": "silu",
    },
    "softplus, scaled alike": {
        "act_radial": "ssp",
        "act_scalar": {"e": "ssp", "o": "abs"},
        "act_gate": {"e": "ssp", "o": "tanh"},
        "shift": -1.5,
        "scale": 20.0,
    },
    "trained denominator": {"train_denominator": True, "train_shift_scale": True, "conv_denominator": [3.0, 4.0]},
    "modalities": MODAL,
    "modal embedding": {**MODAL, "use_modal_node_embedding": True, "use_modal_wise_scale": True, "scale": 15.0},
    "modal weights": {**MODAL, "use_modal_wise_shift": False, "shift": [-1.0, -2.0, -3.0], "use_bias_in_linear": True},
}


def build(dtype: torch.dtype = torch.float64, numbers: tuple[int, ...] = NUMBERS, **settings: Any) -> Any:
    """A model with random weights whose forces are of the order of 1 eV/Angstrom."""
    from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG as DEFAULTS
    from sevenn.model_build import build_E3_equivariant_model

    config: dict[str, Any] = {
        **copy.deepcopy(DEFAULTS),
        "cutoff": CUTOFF,
        "channel": 4,
        "num_convolution_layer": 2,
        "weight_nn_hidden_neurons": [8, 8],
        "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 6},
        "conv_denominator": 4.0,
        "shift": [-1.0 - k for k in range(len(numbers))],
        "scale": [10.0 + k for k in range(len(numbers))],
        "_number_of_species": len(numbers),
        "_type_map": {number: k for k, number in enumerate(numbers)},
    }
    config.update(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_E3_equivariant_model(config).to(dtype).eval()


def reference(model: Any) -> Any:
    """The model itself, which makes one-hot numbers in float32 whatever it computes in; here they follow it."""
    model = copy_model(model)
    dtype = next(model.parameters()).dtype

    def follow(module: Any, args: Any, data: Any) -> Any:
        for key in ("x", "node_attr", "modal_attr"):
            if key in data and data[key].is_floating_point():
                data[key] = data[key].to(dtype)
        return data

    for module in model:
        if type(module).__name__ == "OnehotEmbedding":
            module.register_forward_hook(follow)
    return model


def structures() -> list[Atoms]:
    """Periodic and isolated, 1 atom and 0 edges, all species, sizes that differ."""
    from ase import Atoms

    rng = np.random.default_rng(0)

    def random(n: int, box: float, pbc: bool) -> Atoms:
        grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n]
        positions = grid * box / 3 + rng.normal(scale=0.15, size=(n, 3))
        cell = np.eye(3) * box + np.tri(3, k=-1) * 0.3 if pbc else None
        return Atoms(rng.choice(NUMBERS, n), positions, cell=cell, pbc=pbc)

    pair = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.7]])
    return [
        random(12, 7.5, True),
        random(5, 7.0, False),
        Atoms([40], np.zeros((1, 3))),
        Atoms([8, 14], pair),
        Atoms([8, 40], pair * 4),
        Atoms([14], np.zeros((1, 3)), cell=np.eye(3) * 3.1, pbc=True),
    ]


def graph(items: Atoms | list[Atoms], model: Any, modal: str | list[str] | None = None) -> Any:
    """Sevenn's own graph, of one structure or of a batch, in the model's type."""
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.train.dataload import unlabeled_atoms_to_graph
    from torch_geometric.data import Batch

    dtype = next(model.parameters()).dtype

    def one(atoms: Atoms) -> Any:
        return AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, CUTOFF))

    data = Batch.from_data_list([one(atoms) for atoms in items]) if isinstance(items, list) else one(items)
    for key in ("edge_vec", "cell_volume", "pos"):
        data[key] = data[key].to(dtype)
    if modal is not None:
        data["data_modality"] = modal
    return data


RESULTS = (
    "inferred_total_energy",
    "atomic_energy",
    "scaled_atomic_energy",
    "inferred_force",
    "inferred_stress",
    "inferred_atomic_virial",
    "atom_type",
)


def compare(found: Any, expected: Any, atoms: int, *, scale: float = 1.0) -> None:
    """The results of both have one dtype, one shape and, within the exact tolerances, one value."""
    for name in RESULTS:
        assert (name in found) == (name in expected), name
        if name not in expected:
            continue
        a, b = found[name].detach(), expected[name].detach()
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        limit = EXACT_ENERGY * atoms if name == "inferred_total_energy" else EXACT_FORCES
        size = 1.0 if "stress" not in name else max(1.0, float(b.abs().max()))  # without a cell it is divided by 0.001
        assert torch.isfinite(a).all() and ((a - b).abs() <= limit * scale * size).all(), (name, (a - b).abs().max())


def modals(model: Any, count: int) -> list[str] | None:
    return None if not model.modal_map else [("pbe", "r2scan")[k % 2] for k in range(count)]


@pytest.fixture(scope="module")
def like_sevennet_0() -> tuple[Any, fxpass.Optimized]:
    model = build(**VARIANTS["like SevenNet-0"])
    return model, fxpass.optimize(model, "exact", verify=False)


@pytest.fixture(scope="module")
def multi_fidelity() -> tuple[Any, fxpass.Optimized]:
    model = build(**VARIANTS["modalities"])
    return model, fxpass.optimize(model, "exact", verify=False)


# --- exactness


def compare_variant(name: str, target: str) -> fxpass.Optimized:
    model = build(**VARIANTS[name])
    before = copy.deepcopy(model.state_dict())
    optimised = fxpass.optimize(model, "exact", verify=False, target=target)
    original, items = reference(model), structures()
    chosen = modals(model, len(items))
    expected = original(graph(items, model, chosen))
    assert expected["inferred_force"].abs().max() > 1e-2, "the test would not see a wrong force"
    compare(optimised(graph(items, model, chosen)), expected, 1)
    for k in (0, 2, 4):  # one by one, as sevenn's calculator does: a periodic one, one atom, no edges
        original.set_is_batch_data(False)
        optimised.set_is_batch_data(False)
        one = None if chosen is None else chosen[k]
        compare(optimised(graph(items[k], model, one)), original(graph(items[k], model, one)), len(items[k]))
    assert model.is_batch_data
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"the original's {key} was changed"
    return optimised


ALWAYS = ("default", "like SevenNet-0", "bias, network as readout", "modalities", "softplus, scaled alike")


@pytest.mark.parametrize("name", chosen(VARIANTS, *ALWAYS))
def test_variant_is_exact_in_float64(name: str) -> None:
    compare_variant(name, "eager")


@pytest.mark.parametrize("name", ["like SevenNet-0", "modalities"])
def test_variant_in_kernels_is_exact_in_float64(name: str) -> None:
    optimised = compare_variant(name, "native")
    fused = [row.op for row in optimised.manifest if row.kernel]
    assert fused.count("convolution_gradient") == 2  # one a layer, in the program of forces alone
    assert fused.count("convolution") == 4


def test_one_capture_serves_large_systems(like_sevennet_0: tuple[Any, fxpass.Optimized]) -> None:
    from ase.build import bulk

    model, optimised = like_sevennet_0
    large = bulk("Si", cubic=True).repeat(6)  # 1,728 atoms
    large.rattle(0.1, seed=1)
    data = graph([large], model)
    compare(optimised(data.clone()), reference(model)(data), 1728, scale=10)


def test_atomic_virials_where_the_model_is_asked_for_them() -> None:
    model = build()
    model.force_output.use_atomic_virial = True
    optimised = fxpass.optimize(model, "exact", verify=False)
    data = graph(structures(), model)
    expected = reference(model)(data.clone())
    assert "inferred_atomic_virial" in expected
    compare(optimised(data), expected, 1)


def test_in_training_forces_can_be_differentiated(like_sevennet_0: tuple[Any, fxpass.Optimized]) -> None:
    model, optimised = like_sevennet_0
    gradients = []
    for module in (reference(model).train(), copy.copy(optimised.interface)):
        module.train()
        data = graph(structures()[:1], model)
        vectors = data["edge_vec"]
        forces = module(data)["inferred_force"]
        gradients.append(torch.autograd.grad(forces.pow(2).sum(), vectors)[0])
    optimised.interface.eval()
    assert gradients[0].abs().max() > 1e-2
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-9)


def test_elements_by_the_hundred_take_little_room() -> None:
    """Tables, look-ups by species and specialised weights must not grow with pairs of species."""
    numbers = tuple(range(119))  # sevenn's "univ", with the dummy element
    model = build(numbers=numbers, dtype=torch.float32, shift=-1.0, scale=5.0, cutoff_function=XPLOR)
    optimised = fxpass.optimize(model, verify=False)
    size = sum(p.numel() for p in model.parameters())
    held = sum(t.numel() for t in optimised.program.graph_module.buffers())
    assert held < 4 * size, (held, size)


# --- presets, targets, files


def test_the_default_preset_has_a_full_receipt_and_tables_with_a_knot_where_the_envelope_sets_in() -> None:
    model = build(dtype=torch.float32, **VARIANTS["like SevenNet-0"])
    optimised = fxpass.optimize(model, target="native")
    receipt = optimised.report.receipt
    assert receipt is not None and receipt.passed and receipt.dtype == "float32"
    assert {"energy", "forces", "stress", "rotation", "finite differences"} <= {row.check for row in receipt.rows}
    (tabulate,) = (record for record in optimised.report.records if record.name == "tabulate")
    assert tabulate.modified
    grids = [str(n.args[3]) for n in optimised.graph_module.graph.nodes if str(n.target) == "fxpass.table.default"]
    for text in grids:
        start, end, cells = (float(number) for number in text.split("|")[2:5])
        steps = (XPLOR["cutoff_on"] - start) / (end - start) * cells
        assert end == CUTOFF and abs(steps - round(steps)) < 1e-9, text
    assert grids and optimised.report.warnings == ()


@pytest.mark.parametrize("target", ["native", "torchscript"])
def test_a_saved_model_returns_the_same(target: str, tmp_path: Path) -> None:
    model = build(num_convolution_layer=1, **{k: v for k, v in MODAL.items()})
    optimised = fxpass.optimize(model, "exact", target=target, verify=False)
    path = tmp_path / "model.fxp"
    optimised.save(path)
    loaded = fxpass.load(path)
    structure = Structure.from_ase(structures()[0])
    structure = Structure(structure.numbers, structure.positions, structure.cell, structure.pbc, head="r2scan")
    one, two = (m.frontend.evaluate(m, structure) for m in (optimised, loaded))
    assert one.energy == two.energy and np.array_equal(one.forces, two.forces)


def test_it_has_the_attributes_of_the_original(multi_fidelity: tuple[Any, fxpass.Optimized]) -> None:
    model, optimised = multi_fidelity
    for name in ("cutoff", "type_map", "modal_map", "eval_type_map", "eval_modal_map", "is_batch_data"):
        assert getattr(optimised, name) == getattr(model, name), name
    assert list(inspect.signature(optimised.forward).parameters) == list(inspect.signature(model.forward).parameters)


# --- modalities


def test_a_modality_must_be_named_and_the_choices_are_listed(multi_fidelity: tuple[Any, fxpass.Optimized]) -> None:
    model, optimised = multi_fidelity
    atoms = structures()[0]
    optimised.set_is_batch_data(True)
    with pytest.raises(RuntimeError, match=r"names no modality .*'pbe', 'r2scan'"):
        optimised(graph([atoms], model))
    with pytest.raises(RuntimeError, match=r"no modality 'scan'; one of \['pbe', 'r2scan'\]"):
        optimised(graph([atoms], model, ["scan"]))
    atoms.calc = optimised.calculator()
    with pytest.raises(fxpass.StructureError, match=r"names no modality.*one of pbe, r2scan"):
        atoms.get_potential_energy()
    atoms.calc = optimised.calculator(head="scan")
    with pytest.raises(fxpass.StructureError, match=r"'scan'.*one of pbe, r2scan"):
        atoms.get_potential_energy()
    energies = []
    for modal in ("pbe", "r2scan"):
        atoms.calc = optimised.calculator(head=modal)
        expected = reference(model)(graph([atoms], model, [modal]))
        energies.append(atoms.get_potential_energy())
        assert energies[-1] == pytest.approx(expected["inferred_total_energy"].item(), abs=1e-5)  # float32 edges there
    assert abs(energies[0] - energies[1]) > 1


def test_a_batch_names_one_modality_for_every_structure(multi_fidelity: tuple[Any, fxpass.Optimized]) -> None:
    model, optimised = multi_fidelity
    optimised.set_is_batch_data(True)
    for names in (["pbe"], ["pbe", "r2scan"], ["pbe"] * 4):
        with pytest.raises(RuntimeError, match=f"names {len(names)} modalities for 3 structures"):
            optimised(graph(structures()[:3], model, names))
    optimised.set_is_batch_data(False)
    with pytest.raises(RuntimeError, match="names 2 modalities for 1 structures"):
        optimised(graph(structures()[0], model, ["pbe", "r2scan"]))


def test_where_the_model_looks_up_no_names_the_number_counts() -> None:
    model = build(**{**MODAL, "num_convolution_layer": 1})
    model.eval_modal_map = False
    optimised = fxpass.optimize(model, "exact", verify=False)
    data = graph(structures()[:1], model, ["pbe"])
    with pytest.raises(RuntimeError, match=r"names no modality \(modal_type\)"):
        optimised(data.clone())
    data["modal_type"] = torch.tensor([1])
    compare(optimised(data.clone()), reference(model)(data), 12)
    assert not optimised.sequential().eval_modal_map


def test_the_receipt_covers_every_modality() -> None:
    model = build(dtype=torch.float32, **{**MODAL, "num_convolution_layer": 1})
    receipt = fxpass.optimize(model).report.receipt
    assert receipt is not None and receipt.passed
    assert any("head r2scan" in row.structure for row in receipt.rows)


def test_a_model_made_for_one_modality_needs_no_name() -> None:
    model = build(**MODAL)
    model.prepare_modal_deploy("r2scan")
    optimised = fxpass.optimize(model, "exact", verify=False)
    atoms = structures()[0]
    compare(optimised(graph(atoms, model)), reference(model)(graph(atoms, model)), len(atoms))
    assert optimised.facts["heads"] == ["Default"]


# --- calculators


def test_sevenns_own_calculator_takes_it() -> None:
    from sevenn.calculator import SevenNetCalculator

    model = build(dtype=torch.float32, **MODAL)
    optimised = fxpass.optimize(model, "exact", verify=False)
    for atoms in structures():
        results = []
        for module in (copy_model(model), optimised.sequential()):  # scripted functions cannot be copied
            atoms.calc = SevenNetCalculator(module, file_type="model_instance", modal="r2scan", device="cpu")
            atoms.get_potential_energy()
            results.append(atoms.calc.results)
        ours, theirs = results[1], results[0]
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            size = max(1.0, float(np.abs(value).max()))
            assert np.shape(ours[name]) == np.shape(value)
            assert np.abs(np.asarray(ours[name]) - value).max() <= 2e-5 * size, name


# --- refusals


def test_other_models_are_refused_by_name() -> None:
    model = build()
    model.add_module("extra", torch.nn.Linear(2, 2))
    with pytest.raises(fxpass.UnsupportedModelError, match=r"module Linear .*extra.*IrrepsConvolution"):
        fxpass.optimize(model)
    part = build()
    part.get_submodule("0_convolution").is_parallel = True
    with pytest.raises(fxpass.UnsupportedModelError, match=r"IrrepsConvolution .*0_convolution.*one of many processes"):
        fxpass.optimize(part)
    silent = build()
    silent.delete_module_by_key("force_output")
    with pytest.raises(fxpass.UnsupportedModelError, match="0 modules ForceStressOutputFromEdge"):
        fxpass.optimize(silent)
    cutoff = build()
    cutoff.edge_embedding.cutoff_function = torch.nn.Identity()
    with pytest.raises(fxpass.UnsupportedModelError, match=r"Identity is not covered.*XPLORCutoff"):
        fxpass.optimize(cutoff)


def refused(model: Any, match: str) -> None:
    with pytest.raises(fxpass.UnsupportedModelError, match=match):
        fxpass.api.open_model(model)


def test_classes_derived_from_known_ones_are_refused() -> None:
    model = build(num_convolution_layer=1)
    for path in ("", "onehot_to_feature_x.linear", "0_equivariant_gate.gate.mul", "force_output"):
        module = model.get_submodule(path)
        known = type(module)
        for package in ("e3nn.own", "own"):
            module.__class__ = type("Own", (known,), {"forward": lambda self, *args: None, "__module__": package})
            refused(model, rf"module Own is not covered .*{path or 'model'}.*{package}\.Own")
        module.__class__ = known
    fxpass.api.open_model(model)


def test_modules_that_read_or_write_something_else_are_refused() -> None:
    from fxpass.frontends.sevennet import SETTINGS

    seen = set()
    for settings in ({}, {"shift": -1.0, "scale": 2.0}, MODAL):
        model = build(**{"num_convolution_layer": 1, **settings})
        for path, module in model.named_modules():
            for name, built in SETTINGS.get(type(module).__name__, {}).items():
                seen.add((type(module).__name__, name))
                setattr(module, name, "mean")
                refused(model, rf"the {name} 'mean' of {type(module).__name__} .*{path or 'model'}.*'{built}'")
                setattr(module, name, built)
        fxpass.api.open_model(model)
    assert seen == {(kind, name) for kind, names in SETTINGS.items() for name in names}


def test_numbers_with_gaps_are_refused() -> None:
    model = build(num_convolution_layer=1)
    model.type_map = {8: 0, 40: 2}
    refused(model, r"type_map has the numbers 0, 2 for 3 classes.*onehot_idx_to_onehot.*all from 0 to 2")
    model = build(**{**MODAL, "num_convolution_layer": 1})
    model.modal_map = {"pbe": 0, "r2scan": 2}
    refused(model, r"modal_map has the numbers 0, 2 for 2 classes.*one_hot_modality.*all from 0 to 1")


def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxpass.frontends import sevennet

    def missing(name: str) -> str:
        raise sevennet.metadata.PackageNotFoundError(name)

    model = build(num_convolution_layer=1)
    monkeypatch.setattr(sevennet.metadata, "version", missing)
    refused(model, r"sevenn without a version is not covered, only 0\.13\.0")


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxpass.frontends import sevennet

    model = build()
    monkeypatch.setattr(sevennet.metadata, "version", lambda name: "0.14.1")
    with pytest.raises(fxpass.UnsupportedModelError, match=r"sevenn 0\.14\.1 is not covered, only 0\.13\.0"):
        fxpass.optimize(model)


def test_graphs_that_make_no_sense_are_refused(like_sevennet_0: tuple[Any, fxpass.Optimized]) -> None:
    model, optimised = like_sevennet_0
    unknown = graph(structures()[:1], model)
    unknown["atomic_numbers"][0] = 79
    with pytest.raises(RuntimeError, match="an atomic number that the model does not know"):
        optimised(unknown)


def test_names_and_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(fxpass.UsageError, match=r"there is no file 7net-omni\b.*7net-mf-0"):
        fxpass.optimize("7net-omni")
    broken = tmp_path / "broken.pth"
    torch.save({"config": {"_model_type": "E3_equivariant_model", "version": "0.13.0"}}, broken)
    with pytest.raises(fxpass.UnsupportedModelError, match=r"broken\.pth cannot be loaded"):
        fxpass.optimize(broken)


def test_a_file_is_read_though_a_checkpoint_of_the_wheel_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"config": {"_model_type": "E3_equivariant_model", "version": "0.13.0"}}, "7net-0")
    with pytest.raises(fxpass.UnsupportedModelError, match="7net-0 cannot be loaded"):
        fxpass.api.open_model("7net-0")


# --- what the wheel brings


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen(["7net-0", "7net-0_22may2024", "7net-l3i5", "7net-mf-0"], "7net-0"))
def test_checkpoints_of_the_wheel(name: str) -> None:
    from sevenn.util import load_checkpoint

    model = load_checkpoint(name).build_model().double().eval()
    optimised = fxpass.optimize(model, "exact", target="native", verify=False)
    items = [atoms for atoms in structures() if atoms.pbc.all()]
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.train.dataload import unlabeled_atoms_to_graph

    original = reference(model)
    for module in (original, optimised):
        module.set_is_batch_data(False)
    for modal in model.modal_map or [None]:
        for atoms in items:
            data = AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, model.cutoff))
            data["edge_vec"], data["cell_volume"] = data["edge_vec"].double(), data["cell_volume"].double()
            data["data_modality"] = modal
            compare(optimised(data.clone()), original(data), len(atoms))


@pytest.mark.slow
def test_a_checkpoint_is_opened_by_name_and_by_path() -> None:
    from sevenn.util import pretrained_name_to_path

    by_name, frontend = fxpass.api.open_model("7net-MF-0")
    by_path, _ = fxpass.api.open_model(pretrained_name_to_path("7net-mf-0"))
    assert frontend.name == "sevennet"
    for (name, one), two in zip(by_name.state_dict().items(), by_path.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
