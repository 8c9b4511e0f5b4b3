"""NequIP: the drop-in against the original, built, packaged and from a checkpoint, for every option that is covered."""

from __future__ import annotations

import copy
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxpass
from fxpass.errors import MissingExtraError, UnsupportedModelError
from fxpass.frontends.base import Frontend, converted
from fxpass.frontends.nequip import NequipFrontend
from fxpass.structures import Structure, neighbour_list
from variants import chosen

pytestmark = pytest.mark.nequip

CUTOFF = 4.0
NAMES = ("C", "O", "Si")
NUMBERS = (6, 8, 14)
BUILDER = "nequip.model.NequIPGNNModel"
SIZES: dict[str, Any] = {"num_layers": 2, "l_max": 1, "num_features": 4, "radial_mlp_width": 8, "num_bessels": 4}
TINY = {**SIZES, "num_layers": 1, "num_features": 2, "parity": False}
ZBL = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": list(NAMES)}
CUTOFFS = {"C": 3.0, "O": {"C": 3.5, "Si": 2.5}}
BY_TYPE = {"C": 5.0, "O": 9.0, "Si": 7.0}

#: name -> arguments of the builder beyond ``SIZES``
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no-parity-l2": {"parity": False, "l_max": 2, "num_layers": 3},
    "features-by-degree": {"l_max": 2, "parity": False, "num_features": [5, 3, 2], "type_embed_num_features": 6},
    "one-layer": {"num_layers": 1},
    "deep-radial": {"radial_mlp_depth": 3},
    "linear-radial": {"radial_mlp_depth": 0},
    "readout-network": {"readout_mlp_hidden_layers_depth": 2, "readout_mlp_nonlinearity": "mish"},
    "zbl": {"pair_potential": ZBL},
    "cutoffs-by-edge-type": {"per_edge_type_cutoff": CUTOFFS},
    "zbl-and-cutoffs": {"pair_potential": ZBL, "per_edge_type_cutoff": CUTOFFS},
    "neighbours-by-type": {"avg_num_neighbors": BY_TYPE},
    "scales-by-type": {"per_type_energy_scales": {"C": 1.5, "O": 0.5, "Si": 2.0}},
    "one-shift": {"per_type_energy_shifts": -3.0, "per_type_energy_scales": 2.0},
    "no-scales": {"per_type_energy_scales": None, "per_type_energy_shifts": None},
    "trainable": {"per_type_energy_scales_trainable": True, "per_type_energy_shifts_trainable": True},
    "bessel": {"bessel_trainable": True, "polynomial_cutoff_p": 4},
    "no-self-connection": {"convnet_sc": False},
    "residual": {"convnet_resnet": True, "num_layers": 3},
    "shifts-learnt": {"learnable_shift": True},
    "norm-activation": {"convnet_nonlinearity_type": "norm"},
}


def configuration(builder: str = BUILDER, sizes: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A model section of a NequIP configuration."""
    base = {"seed": 3, "model_dtype": "float64", "r_max": CUTOFF, "type_names": list(NAMES), "avg_num_neighbors": 8.0}
    energies = {
        "per_type_energy_scales": 3.0,
        "per_type_energy_shifts": {name: -1.0 - k for k, name in enumerate(NAMES)},
    }
    return {"_target_": builder, **base, **energies, **(SIZES if sizes is None else sizes), **options}


def build(builder: str = BUILDER, sizes: dict[str, Any] | None = None, **options: Any) -> Any:
    """A model with random weights, always the same ones."""
    from hydra.utils import get_method
    from nequip.utils.global_state import set_global_state

    set_global_state()
    torch.set_default_dtype(torch.float32)
    section = configuration(builder, sizes, **options)
    pair = section.get("pair_potential")
    function = get_method(section.pop("_target_"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(**{**section, **({} if pair is None else {"pair_potential": dict(pair)})}).eval()


def structures(seed: int = 0) -> list[Structure]:
    """Periodic and isolated, 1 atom and 0 edges, all species, and one larger than the others."""
    rng = np.random.default_rng(seed)

    def random(n: int, box: float, pbc: bool, name: str) -> Structure:
        grid = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n]
        positions = grid * box / 4 + rng.normal(scale=0.15, size=(n, 3))
        cell = np.eye(3) * box + (np.tri(3, k=-1) * 0.3 if pbc else 0)
        return Structure(rng.choice(NUMBERS, n), positions, cell * pbc, (pbc,) * 3, name)

    dimer = np.array([[0.0, 0, 0], [0, 0, 1.6]])
    return [
        random(12, 7.5, True, "periodic"),
        random(5, 8.0, False, "cluster"),
        Structure(np.array([8]), np.zeros((1, 3)), np.zeros((3, 3)), (False,) * 3, "atom"),
        Structure(np.array([6, 14]), dimer, np.zeros((3, 3)), (False,) * 3, "dimer"),
        Structure(np.array([6, 8]), dimer * 5, np.zeros((3, 3)), (False,) * 3, "no edges"),
        Structure(np.array([14]), np.zeros((1, 3)), np.eye(3) * 3.1, (True,) * 3, "one atom, its images"),
    ]


def frame(item: Structure) -> dict[str, torch.Tensor]:
    """NequIP's data for one structure, written here and not taken from the code under test; edges in no order."""
    edges, units = neighbour_list(item, CUTOFF)
    shuffled = np.random.default_rng(1).permutation(edges.shape[1])
    data = {
        "pos": torch.from_numpy(item.positions.copy()),
        "atom_types": torch.tensor([NUMBERS.index(z) for z in item.numbers]),
        # centre to neighbour: pos[edge_index[1]] - pos[edge_index[0]] + shift
        "edge_index": torch.from_numpy(edges[:, shuffled].copy()),
    }
    if any(item.pbc):
        data["cell"] = torch.from_numpy(item.cell.copy()).unsqueeze(0)
        data["edge_cell_shift"] = torch.from_numpy(units[shuffled])
    return data


def batch(items: list[Structure]) -> dict[str, torch.Tensor]:
    """NequIP's data for a batch; isolated structures get a cell without a volume."""
    frames = [frame(item) for item in items]
    starts = np.cumsum([0, *(len(f["pos"]) for f in frames)])
    shifts = [f.get("edge_cell_shift", torch.zeros(f["edge_index"].shape[1], 3).double()) for f in frames]
    return {
        "pos": torch.cat([f["pos"] for f in frames]),
        "atom_types": torch.cat([f["atom_types"] for f in frames]),
        "edge_index": torch.cat([f["edge_index"] + start for f, start in zip(frames, starts, strict=False)], 1),
        "cell": torch.cat([f.get("cell", torch.zeros(1, 3, 3).double()) for f in frames]),
        "edge_cell_shift": torch.cat(shifts),
        "batch": torch.repeat_interleave(torch.arange(len(frames)), torch.from_numpy(np.diff(starts))),
        "num_atoms": torch.from_numpy(np.diff(starts)),
    }


PREDICTIONS = ("total_energy", "atomic_energy", "forces", "virial", "stress")


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float = 1e-9) -> None:
    """Same shapes and dtypes; energies within 1e-10 eV an atom and the rest within ``limit``."""
    for name in PREDICTIONS:
        value, other = expected[name].detach(), found[name].detach()
        assert other.shape == value.shape and other.dtype == value.dtype, name
        if value.numel():
            assert torch.equal(other.isnan(), value.isnan()), name
            per = 0.1 * limit * (len(expected["forces"]) if name == "total_energy" else 1)
            bound = (per if "energy" in name else limit) * max(1.0, float(value.nan_to_num().abs().max()))
            assert (other - value).nan_to_num().abs().max() <= bound, name


def call(model: nn.Module, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return model({name: value.clone() for name, value in data.items()})


def captured(model: nn.Module, frontend: Frontend) -> nn.Module:
    """The drop-in over the captured graph and its derivative as they are, without passes and lowering."""
    frontend.check(model)
    program = fxpass.run_passes(frontend.capture(model), "differentiate").program
    return frontend.interface(nn.Identity(), program.graph_module, frontend.attributes(model)).eval()


def compare_variant(model: nn.Module, frontend: Frontend) -> None:
    before = copy.deepcopy(model.state_dict())
    optimised = captured(model, frontend)
    largest = 0.0
    for item in structures():
        expected = call(model, frame(item))
        largest = max(largest, float(expected["forces"].abs().max()))
        compare(call(optimised, frame(item)), expected)
    assert largest > 1e-2, "the test would not see a wrong force"
    together = batch(structures())
    compare(call(optimised, together), call(model, together))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"the original's {name} was changed"


ALWAYS = ("default", "no-parity-l2", "readout-network", "zbl-and-cutoffs", "neighbours-by-type", "norm-activation")


@pytest.mark.parametrize("name", chosen(VARIANTS, *ALWAYS))
def test_variant_is_exact_in_float64(name: str) -> None:
    compare_variant(build(**VARIANTS[name]), NequipFrontend())


def test_a_frame_of_another_size_or_without_edges_is_no_other_program() -> None:
    model = build()
    optimised = captured(model, NequipFrontend())
    for cells in (1, 2):
        item = structures()[0]
        repeated = np.concatenate([item.positions + k * item.cell[0] for k in range(cells)])
        cell = item.cell * np.array([[cells], [1], [1]])
        larger = Structure(np.tile(item.numbers, cells), repeated, cell, item.pbc, "repeated")
        compare(call(optimised, frame(larger)), call(model, frame(larger)))


def test_edge_vectors_in_place_of_positions() -> None:
    """What the ML-IAP interface of LAMMPS gives: forces are those of edges then."""
    model = build(pair_potential=ZBL)
    optimised = captured(model, NequipFrontend())
    data = frame(structures()[1])
    first, second = data["edge_index"]
    given = {
        "edge_vectors": data["pos"][second] - data["pos"][first],
        "edge_index": data["edge_index"],
        "atom_types": data["atom_types"],
    }
    expected, found = call(model, given), call(optimised, given)
    assert torch.allclose(found["total_energy"], expected["total_energy"], rtol=0, atol=1e-10)
    assert (found["edge_forces"] - expected["edge_forces"]).abs().max() < 1e-9 < expected["edge_forces"].abs().max()
    assert "forces" not in found


def test_what_is_given_comes_back_beside_the_predictions() -> None:
    model = build()
    optimised = captured(model, NequipFrontend())
    data = {**frame(structures()[0]), "pbc": torch.ones(1, 3, dtype=torch.bool)}
    found, expected = call(optimised, data), call(model, data)
    assert set(found) <= set(expected)  # what the original keeps of its own way there is not a result
    given = [name for name in data if name in expected]
    assert given and all(torch.equal(found[name], data[name]) for name in given)


def test_types_that_the_model_does_not_know_are_refused() -> None:
    optimised = captured(build(), NequipFrontend())
    with pytest.raises(RuntimeError, match="atom_types must be below 3"):
        optimised({**frame(structures()[1]), "atom_types": torch.tensor([0, 1, 2, 3, 0])})


def test_data_of_lammps_are_refused() -> None:
    optimised = captured(build(**TINY), NequipFrontend())
    with pytest.raises(RuntimeError, match="lmp_mliap_data is not covered"):
        optimised({**frame(structures()[1]), "lmp_mliap_data": object()})


def test_batch_or_num_atoms_alone_is_one_frame() -> None:
    model = build(**TINY)
    optimised = captured(model, NequipFrontend())
    data = frame(structures()[0])
    for more in ({"num_atoms": torch.tensor([8, 4])}, {"batch": torch.zeros(12, dtype=torch.int64)}):
        compare(call(optimised, data | more), call(model, data | more))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_energies_of_a_converted_model_stay_in_float64(name: str) -> None:
    """And with them the shifts, which are far larger than what the weights say."""
    dtype = getattr(torch, name)
    options = {**TINY, "per_type_energy_shifts": {"C": -1000.1, "O": -2000.2, "Si": -8000.3}}
    model = build(**options, model_dtype="float64" if name == "float32" else "float32")
    optimised = captured(converted(model, dtype), NequipFrontend())
    expected, found = (call(m, frame(structures()[0])) for m in (model, optimised))
    assert found["total_energy"].dtype == found["atomic_energy"].dtype == torch.float64
    assert (found["total_energy"] - expected["total_energy"]).abs().max() < 1e-4
    assert optimised.metadata["model_dtype"] == name
    assert optimised.metadata.keys() == model.metadata.keys()


# ----------------------------------------------------------------------------------------------------- a whole drop-in


@pytest.fixture(scope="module")
def single() -> Any:
    return build(model_dtype="float32", parity=False, pair_potential=ZBL)


@pytest.fixture(scope="module")
def native(single: Any) -> fxpass.Optimized:
    torch.set_num_threads(1)
    return fxpass.optimize(single, target="native")


@pytest.mark.slow
def test_the_default_pipeline_in_kernels_passes_its_receipt(native: fxpass.Optimized) -> None:
    receipt = native.report.receipt
    assert receipt is not None and receipt.passed and native.report.frontend == "nequip"
    assert native.facts["dtype"] == "float32"
    ops = [row.op for row in native.manifest if row.kernel]
    if ops:  # where there is a compiler
        assert ops.count("convolution") >= 2 and ops.count("convolution_gradient") >= 1
    tables = [application for record in native.report.records for application in record.applications]
    assert sum(application.rule == "table" for application in tables) >= 3  # two radial networks and the ZBL term


@pytest.mark.slow
def test_the_saved_drop_in_is_the_drop_in(native: fxpass.Optimized, tmp_path: Path) -> None:
    native.save(tmp_path / "model.fxp")
    loaded = fxpass.load(tmp_path / "model.fxp")
    data = frame(structures()[0])
    found, expected = call(loaded, data), call(native, data)
    assert all(torch.equal(found[name], expected[name]) for name in PREDICTIONS)


@pytest.mark.slow
def test_calculators_agree(single: Any, native: fxpass.Optimized) -> None:
    """NequIP's own calculator takes the drop-in in place of the model; ours gives the same."""
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms

    atoms = structures()[0].to_ase()

    def theirs(model: Any) -> Any:
        names = model.metadata["type_names"].split(" ")
        transforms = basic_transforms(model.metadata, CUTOFF, names, {name: name for name in names})
        return NequIPCalculator(model=model, device="cpu", transforms=transforms)

    torch.set_default_dtype(torch.float64)  # as NequIP's calculator finds it after it has loaded a model
    results = []
    for calculator in (theirs(single), theirs(native), native.calculator()):
        atoms.calc = calculator
        results.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
    original, *others = results
    for energy, forces, stress in others:
        assert abs(energy - original[0]) < 1e-4
        assert np.abs(forces - original[1]).max() < 1e-4 < np.abs(forces).max()
        assert np.abs(stress - original[2]).max() < 1e-5


@pytest.mark.slow
def test_a_scripted_drop_in() -> None:
    model = build(num_layers=1)
    scripted = fxpass.optimize(model, "exact", target="torchscript", verify=False)
    for item in (structures()[0], structures()[2]):
        compare(call(scripted, frame(item)), call(model, frame(item)))


# --------------------------------------------------------------------------------------------------------------- files


def checkpoint(path: Path, section: dict[str, Any]) -> Any:
    """A file as training writes it; returns the model in it."""
    import lightning
    from nequip.train import NequIPLightningModule
    from nequip.utils.global_state import set_global_state
    from nequip.utils.versions import get_current_code_versions

    set_global_state()
    information = {
        "versions": get_current_code_versions(verbose=False),
        "training_module": {"_target_": "nequip.train.NequIPLightningModule"},
    }
    counts = {"train": 1, "val": 0, "test": 0, "predict": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = NequIPLightningModule(model=section, num_datasets=counts, info_dict=information)
        trainer = lightning.Trainer(
            logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
        )
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path, weights_only=True)
    return module.model["sole_model"].eval()


def package(path: Path, models: dict[str, nn.Module], **versions: str) -> None:
    """A file as nequip-package writes it."""
    import yaml
    from nequip.scripts import _package_utils as parts
    from nequip.utils.versions import get_current_code_versions

    facts = {
        "versions": get_current_code_versions(verbose=False) | versions,
        "package_version_id": 2,
        "available_models": ["eager"],
        "atom_types": dict(enumerate(NAMES)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.package.PackageExporter(path) as exporter:
            exporter.mock([f"{name}.**" for name in parts._MOCK_MODULES])
            exporter.extern([f"{name}.**" for name in parts._EXTERNAL_MODULES])
            exporter.intern([f"{name}.**" for name in parts._INTERNAL_MODULES])
            exporter.save_text("model", "package_metadata.txt", yaml.dump(facts))
            exporter.save_pickle("model", "eager_model.pkl", nn.ModuleDict(models), dependencies=True)


def check_file(path: Path, original: nn.Module, frontend: Frontend) -> None:
    from fxpass.api import open_model

    model, found = open_model(path)
    assert found.name == frontend.name
    drop_in = captured(model, found)
    for item in structures()[:2]:
        compare(call(drop_in, frame(item)), call(original, frame(item)))


def test_a_checkpoint(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "last.ckpt", configuration())
    check_file(tmp_path / "last.ckpt", original, NequipFrontend())


def test_a_package(tmp_path: Path) -> None:
    original = build()
    package(tmp_path / "model.nequip.zip", {"sole_model": original})
    check_file(tmp_path / "model.nequip.zip", original, NequipFrontend())


def test_a_package_of_several_models_is_refused_with_their_names(tmp_path: Path) -> None:
    model = build()
    package(tmp_path / "two.nequip.zip", {"first": model, "second": copy.deepcopy(model)})
    with pytest.raises(UnsupportedModelError, match="2 models: first, second"):
        fxpass.optimize(tmp_path / "two.nequip.zip")


def test_a_package_with_the_code_of_another_version_is_refused(tmp_path: Path) -> None:
    package(tmp_path / "old.nequip.zip", {"sole_model": build(**TINY)}, nequip="0.7.1")
    model = NequipFrontend().load(str(tmp_path / "old.nequip.zip"))
    refused(model, "nequip 0.7.1 is not covered", "packaged by nequip 0.19.1")


def test_other_files_are_not_read(tmp_path: Path) -> None:
    frontend = NequipFrontend()
    named = {"training_module": {"data": "/data/nequip.extxyz"}, "path": "nequip.extxyz", "also": "schnetpack.model"}
    torch.save(named, tmp_path / "named.ckpt")
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.ckpt")
    (tmp_path / "text.nequip.zip").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "empty.nequip.zip", "w") as archive:
        archive.writestr("model/other.txt", "")
    assert not any(frontend.reads(str(path)) for path in tmp_path.iterdir())


def test_without_nequip_its_files_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nequip.model.saved_models.load_utils", None)
    with pytest.raises(MissingExtraError, match=r"fxpass\[nequip\]"):
        NequipFrontend().load("model.ckpt")


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(model: nn.Module, what: str, *more: str) -> None:
    with pytest.raises(UnsupportedModelError, match=what) as caught:
        fxpass.optimize(model)
    assert all(text in str(caught.value) for text in more), str(caught.value)


def test_variants_that_are_not_covered_are_refused_by_name() -> None:
    refused(build(do_derivatives=False), "computes no forces", "enable_ForceStressOutput")
    charges = [{"field": "charge", "num_features": 2, "min": -1, "max": 1}]
    embedded = build("nequip.model.FullNequIPGNNModel", full(), categorical_graph_field_embed=charges)
    refused(embedded, r"fields of the whole graph \(charge\)", "model.func.type_embed")
    model = build()
    names = model.type_names
    model.type_names = ["C", "water", "Si"]
    refused(model, "water are no chemical symbols")
    model.type_names = names
    model.model.func.add_module("extra", nn.Identity())
    refused(model, "the module Identity is not covered", "model.func.extra", "ConvNetLayer")


def test_another_version_of_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(num_layers=1)
    monkeypatch.setattr(NequipFrontend, "tested", ("0.6.2",))
    refused(model, r"nequip 0\.\d+\.\d+ is not covered", "0.6.2")


def test_a_package_without_metadata_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(**TINY)
    monkeypatch.setattr(NequipFrontend, "package", "nequip-from-a-checkout")
    refused(model, "of no known version", r'pip install "fxpass[nequip]"')


def test_classes_of_others_are_refused_by_name() -> None:
    """A subclass may compute anything; the stand-in would compute what its base does."""
    from e3nn.o3 import Linear
    from nequip.nn.norm import AvgNumNeighborsNorm

    def own(base: type, module: str) -> type:
        return type("Own", (base,), {"__module__": module})

    for base in (AvgNumNeighborsNorm, Linear, nn.SiLU):
        model = build(**TINY)
        path, module = next((path, module) for path, module in model.named_modules() if type(module) is base)
        module.__class__ = own(base, __name__)
        refused(model, "the class Own is not covered", path)
    module.__class__ = nn.SiLU
    model.model.func.layer0_convnet.conv.linear_1.__class__ = own(Linear, "nequip.nn.linear")
    refused(model, "the class Own is not covered", "layer0_convnet.conv.linear_1")
    model = build(**TINY)
    model.__class__ = own(type(model), "nequip.nn.graph_model")
    refused(model, "the model class Own, which derives from GraphModel, is not covered")


def test_a_model_made_for_lammps_is_refused() -> None:
    from nequip.nn._ghost_exchange_lmp_mliap import LAMMPSMLIAPGhostExchangeModule

    model = build(**TINY | {"num_layers": 2})
    block = model.model.func.layer1_convnet.conv
    block.ghost_exchange = LAMMPSMLIAPGhostExchangeModule(irreps_in=block.irreps_in)
    refused(model, "ghost atoms", "layer1_convnet.conv.ghost_exchange", "enable_LAMMPSMLIAPGhostExchange")


def test_accelerated_convolutions_are_refused_by_name() -> None:
    model = build()
    layer = model.model.func.layer0_convnet.conv
    faster = type("OpenEquivarianceTensorProductScatter", (nn.Module,), {"__module__": "nequip.nn._tp_scatter_oeq"})
    layer.tp_scatter = faster()
    refused(model, "OpenEquivarianceTensorProductScatter", "layer0_convnet.conv.tp_scatter")


def test_a_pair_potential_that_is_not_covered_is_refused() -> None:
    lennard_jones = {"_target_": "nequip.nn.pair_potential.LennardJones", "lj_sigma": 1.0, "lj_epsilon": 0.1}
    refused(build(pair_potential=lennard_jones), "LennardJones", "pair_potential", "ZBL")


def full() -> dict[str, Any]:
    """Arguments of ``FullNequIPGNNModel`` in place of ``SIZES``."""
    return {
        "radial_mlp_depth": [1, 1],
        "radial_mlp_width": [8, 8],
        "feature_irreps_hidden": ["4x0e+4x0o+3x1o+2x1e", "4x0e"],
        "irreps_edge_sh": "0e+1o",
        "type_embed_num_features": 5,
        "num_bessels": 4,
    }


def test_irreps_of_one_s_own_are_exact() -> None:
    compare_variant(build("nequip.model.FullNequIPGNNModel", full()), NequipFrontend())


def test_a_pair_potential_is_as_precise_as_the_originals() -> None:
    """NequIP adds ZBL in float64 to a float32 model, so edge vectors come in float64 there."""
    short = Structure(np.array([14, 14]), np.array([[0.0, 0, 0], [0, 0, 0.8]]), np.zeros((3, 3)), (False,) * 3, "short")
    model = build(model_dtype="float32", num_layers=1, pair_potential=ZBL)
    expected, found = call(model, frame(short)), call(captured(model, NequipFrontend()), frame(short))
    largest = expected["forces"].abs().max()
    assert largest > 100 and (found["forces"] - expected["forces"]).abs().max() < 1e-7 * largest
