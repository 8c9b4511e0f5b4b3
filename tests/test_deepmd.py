"""deepmd-kit's own models: the drop-in against the original, in every variant that the frontend covers."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxpass
from fxpass.errors import UnsupportedModelError
from fxpass.frontends.deepmd import DeepmdFrontend, import_deepmd
from fxpass.frontends.deepmd_neighbours import nearest_only
from fxpass.neighbours import pairs_within
from fxpass.structures import Structure

pytestmark = pytest.mark.deepmd

CUTOFF = 4.0
EXACT_ENERGY, EXACT_FORCES, EXACT_VIRIAL = 1e-10, 1e-9, 1e-9  # eV/atom, eV/A, eV
SMOOTH = {"type": "se_e2_a", "sel": [40, 60], "rcut": CUTOFF, "rcut_smth": 1.0, "neuron": [4, 8, 16], "axis_neuron": 4}
RADIAL = {name: value for name, value in SMOOTH.items() if name != "axis_neuron"} | {"type": "se_e2_r"}
TYPED = SMOOTH | {"type": "se_atten", "sel": 90, "attn_layer": 0, "tebd_dim": 4}
ANGULAR = {"type": "se_e3", "sel": [20, 30], "rcut": 3.0, "rcut_smth": 1.0, "neuron": [2, 4]}
FLOW = {"n_dim": 8, "e_dim": 6, "a_dim": 4, "nlayers": 2, "e_rcut": CUTOFF, "e_rcut_smth": 3.0, "e_sel": 60}
FLOW |= {"a_rcut": 3.0, "a_rcut_smth": 2.0, "a_sel": 20, "axis_neuron": 2}
FORMER = {"rcut": 3.0, "rcut_smth": 1.0, "nsel": 30, "nlayers": 2, "g1_dim": 8, "g2_dim": 6, "axis_neuron": 2}
FORMER |= {"attn2_hidden": 4, "attn2_nhead": 1, "attn1_hidden": 8, "attn1_nhead": 1, "update_g1_has_attn": True}
INITIAL = {"rcut": CUTOFF, "rcut_smth": 1.0, "nsel": 60, "neuron": [4, 8], "axis_neuron": 4, "tebd_dim": 4}

#: name -> descriptor, fitting net, and what else the model has
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "smooth": (SMOOTH, {}, {}),
    "smooth-pairs": (SMOOTH | {"type_one_side": False, "activation_function": "silu"}, {}, {}),
    "smooth-excluded": (
        SMOOTH | {"exclude_types": [[1, 1]], "resnet_dt": True, "activation_function": "gelu"},
        {"activation_function": "silu", "resnet_dt": False},
        {"pair_exclude_types": [[0, 0]], "atom_exclude_types": [1]},
    ),
    "radial": (RADIAL, {}, {"pair_exclude_types": [[1, 1]]}),
    "typed": (TYPED, {}, {}),
    "typed-strip": (TYPED | {"tebd_input_mode": "strip"}, {}, {}),
    "typed-v2": (SMOOTH | {"type": "se_atten_v2", "sel": 90, "attn_layer": 0, "tebd_dim": 4}, {}, {}),
    "attention": (TYPED | {"type": "dpa1", "sel": 60, "attn_layer": 1, "attn": 8}, {}, {}),
    "hybrid": ({"type": "hybrid", "list": [SMOOTH, RADIAL]}, {}, {}),
    "angular": (ANGULAR, {}, {}),
    "dpa2": ({"type": "dpa2", "repinit": INITIAL, "repformer": FORMER}, {}, {}),
    "dpa3": ({"type": "dpa3", "repflow": FLOW}, {}, {}),
    "dpa3-one-layer": ({"type": "dpa3", "repflow": FLOW | {"nlayers": 1}}, {}, {}),
}
SHORT = ("smooth", "smooth-excluded", "typed-strip", "attention")


def build(name: str = "smooth", precision: str = "float64", seed: int = 0) -> Any:
    """A model of ``get_model`` with random weights and statistics, such that forces are some 0.1 eV/A."""
    import_deepmd()
    from deepmd.pt.model.model import get_model

    descriptor, fitting, rest = copy.deepcopy(VARIANTS[name])
    for part in descriptor.get("list", [descriptor]):
        part |= {"precision": precision, "seed": seed}
    fitting = {"neuron": [12, 12, 12], "precision": precision, "seed": seed} | fitting
    model = get_model({"type_map": ["O", "H"], "descriptor": descriptor, "fitting_net": fitting, **rest}).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(getattr(module, "stddev", None), torch.Tensor):
            spread = torch.rand(len(module.stddev), 1, 1, generator=generator, dtype=torch.float64)
            module.stddev[...] = 0.1 + 0.1 * spread
            if type(module).__module__.endswith((".se_a", ".se_r")):
                module.mean[..., :1] = 0.02 + 0.02 * spread
    atomic = model.atomic_model
    atomic.out_bias[...] = torch.randn(atomic.out_bias.shape, generator=generator, dtype=torch.float64)
    for network in atomic.fitting_net.filter_layers.networks:
        network.layers[-1].matrix.data *= 5
    return model


def structures() -> list[Structure]:
    """Periodic and isolated, a cell narrower than the cutoff, 1 atom and 0 edges, and one larger than the others."""
    rng = np.random.default_rng(0)

    def random(n: int, box: float, pbc: bool, name: str) -> Structure:
        grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n]
        positions = grid * box / 3 + rng.normal(scale=0.15, size=(n, 3))
        cell = np.eye(3) * box + np.tri(3, k=-1) * 0.3 if pbc else np.zeros((3, 3))
        return Structure(rng.choice([1, 8], n), positions, cell, (pbc,) * 3, name)

    one = Structure(np.array([8]), np.zeros((1, 3)), np.zeros((3, 3)), (False,) * 3, "one atom")
    narrow = Structure(np.array([8, 1]), np.array([[0, 0, 0], [1.4, 1.5, 1.6]]), np.eye(3) * 3.1, (True,) * 3, "narrow")
    return [random(27, 8.0, True, "large"), random(9, 5.0, False, "isolated"), narrow, one]


def inputs(structure: Structure) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    types = torch.from_numpy(np.where(structure.numbers == 8, 0, 1)).unsqueeze(0)
    box = torch.from_numpy(structure.cell.copy()).view(1, 9) if any(structure.pbc) else None
    return torch.from_numpy(structure.positions.copy()).unsqueeze(0), types, box


@cache
def optimised(name: str) -> tuple[Any, Any]:
    model = build(name)
    return model, fxpass.optimize(model, passes="exact", verify=False)


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    assert set(ours) == set(theirs)
    atoms = theirs["mask"].shape[1]
    limits = {"energy": EXACT_ENERGY * atoms, "atom_energy": EXACT_ENERGY, "force": EXACT_FORCES, "mask": 0.5}
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape
        assert float((ours[name] - value).abs().max()) <= factor * limits.get(name, EXACT_VIRIAL), name


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in VARIANTS])
def test_the_drop_in_equals_the_original(name: str) -> None:
    model, fast = optimised(name)
    moved = 0.0
    for structure in structures():
        given = inputs(structure)
        atomic = not model.has_message_passing()
        theirs = model(*given, do_atomic_virial=atomic)
        compare(fast(*given, do_atomic_virial=atomic), theirs)
        moved = max(moved, float(theirs["force"].abs().max()))
    assert moved > 1e-4  # or equal forces would say little


def test_frames_and_placeholder_atoms() -> None:
    model, fast = optimised("smooth")
    coord, types, box = inputs(structures()[0])
    coords = torch.cat([coord, coord + 0.1 * torch.randn(coord.shape, generator=torch.Generator().manual_seed(0))])
    kinds, boxes = types.repeat(2, 1), box.repeat(2, 1)  # type: ignore[union-attr]
    compare(fast(coords, kinds, boxes, do_atomic_virial=True), model(coords, kinds, boxes, do_atomic_virial=True))
    kinds[1, 5:] = -1
    theirs = model(coords.flatten(1), kinds, boxes)
    compare(fast(coords.flatten(1), kinds, boxes), theirs)
    assert int(theirs["mask"].sum()) == 27 + 5
    single = fast(coord.to(torch.float32), types, None)
    assert single["force"].dtype == torch.float32 and single["energy"].dtype == torch.float64


def test_more_neighbours_than_places_are_left_out_as_the_original_leaves_them_out() -> None:
    model, fast = optimised("smooth")
    rng = np.random.default_rng(1)
    crowd = rng.uniform(0, 6.5, (160, 3))
    coord, types = torch.from_numpy(crowd).unsqueeze(0), torch.from_numpy(rng.integers(0, 2, (1, 160)))
    index, vectors = pairs_within(coord[0], None, CUTOFF)
    kept = nearest_only(vectors, index, types[0], 160, [40, 60], mixed=False)
    assert 0 < len(kept) < index.shape[1]
    compare(fast(coord, types), model(coord, types), factor=100.0)  # atoms come as near as 0.2 A


@pytest.mark.parametrize("name", ["smooth", pytest.param("dpa3", marks=pytest.mark.long)])
def test_the_lower_interface(name: str) -> None:
    model, fast = optimised(name)
    from deepmd.pt.utils.nlist import extend_input_and_build_neighbor_list

    coord, types, box = inputs(structures()[0])
    listed = (coord, types, CUTOFF, model.get_sel())
    where, kinds, mapping, nlist = extend_input_and_build_neighbor_list(*listed, mixed_types=True, box=box)
    compare(fast.forward_lower(where, kinds, nlist, mapping), model.forward_lower(where, kinds, nlist, mapping))


def test_the_energy_of_a_model_with_message_passing() -> None:
    model = build("dpa3-one-layer")
    program = DeepmdFrontend().capture(model)
    for structure in structures():
        coord, types, box = inputs(structure)
        index, vectors = pairs_within(coord[0], None if box is None else box.view(3, 3), CUTOFF)
        hot = torch.nn.functional.one_hot(types[0], 2).double()
        given = (vectors, index, hot, torch.zeros_like(types[0]), torch.tensor([len(structure)]))
        energy, _ = program.graph_module(*given)
        assert float((energy - model(coord, types, box)["energy"]).abs().max()) < EXACT_ENERGY * len(structure)


def test_default_preset_tables_and_kernels() -> None:
    model = build("smooth", "float32")
    fast = fxpass.optimize(model, target="native")
    assert fast.report.receipt is not None and fast.report.receipt.passed
    rows = {row.op: row for row in fast.manifest}
    assert rows["convolution"].kernel and rows["convolution_gradient"].kernel
    tables = [n for n in fast.graph_module.graph.nodes if n.target is torch.ops.fxpass.table.default]
    assert len(tables) == 2  # value and slope, by type of the neighbour
    given = inputs(structures()[0])
    theirs, ours = model(*given), fast(*given)
    assert float((ours["force"] - theirs["force"]).abs().max()) < 5e-6


def test_tables_of_the_default_budget_hold_where_bonds_are_short() -> None:
    """On structures that no table was measured on: probes of metals alone gave 90 times the budget here."""
    model = build("smooth")
    fast = fxpass.optimize(model, ["default"], target="eager", verify=False)
    rng = np.random.default_rng(5)
    for nearest, count in ((0.7, 24), (0.95, 16)):
        placed: list[Any] = []
        while len(placed) < count:
            tried = rng.uniform(0, 5.0, 3)
            if all(np.linalg.norm(tried - other) > nearest for other in placed):
                placed.append(tried)
        coord, types = torch.tensor(np.array(placed)).unsqueeze(0), torch.from_numpy(rng.integers(0, 2, (1, count)))
        ours, theirs = fast(coord, types)["force"], model(coord, types)["force"]
        assert 1e-14 < float((ours - theirs).abs().max()) < 1e-6  # tables there are


def test_files(tmp_path: Path) -> None:
    model = build("smooth")
    given = inputs(structures()[0])
    theirs = model(*given)
    from deepmd.pt.train.wrapper import ModelWrapper

    state = ModelWrapper(model).state_dict()
    state["_extra_state"] = {"model_params": json.loads(model.get_model_def_script()), "train_infos": {}}
    torch.save({"model": state}, tmp_path / "model.pt")
    torch.jit.save(torch.jit.script(model), tmp_path / "frozen.pth")
    for name in ("model.pt", "frozen.pth"):
        frontend = DeepmdFrontend()
        assert frontend.reads(str(tmp_path / name))
        compare(frontend.load(str(tmp_path / name))(*given), theirs)
    _, fast = optimised("smooth")
    fast.save(tmp_path / "fast.fxp")
    compare(fxpass.load(tmp_path / "fast.fxp")(*given), fast(*given))


def test_compressed_to_torchscript(tmp_path: Path) -> None:
    model = build("smooth")
    tables = "preserve-sparsity,tabulate{dx=0.01,order=5,over=length}"
    passes = f"fold-constants,specialize-species,dead-code,{tables},differentiate,fold-constants,dead-code"
    fast = fxpass.optimize(model, passes=passes, target="torchscript", verify=False)
    fast.save(tmp_path / "model.pt")
    script = torch.jit.load(tmp_path / "model.pt")
    for structure in structures():
        given = inputs(structure)
        theirs, ours = model(*given), script(*given)
        assert float((ours["force"] - theirs["force"]).abs().max()) < 1e-9
    assert script.get_rcut() == CUTOFF and script.get_type_map() == ["O", "H"]


def test_the_ase_calculator_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("ase")
    from deepmd.calculator import DP

    model, fast = optimised("smooth")
    torch.jit.save(torch.jit.script(model), tmp_path / "frozen.pth")
    atoms = structures()[0].to_ase()
    calculator = DP(str(tmp_path / "frozen.pth"), nlist_backend="native")
    atoms.calc = calculator
    theirs = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    calculator.dp.deep_eval.dp.model["Default"] = fast
    calculator.reset()
    ours = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    atoms.calc = fast.calculator()
    own = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    for energy, forces, stress in (ours, own):
        assert energy == pytest.approx(theirs[0], abs=1e-8)
        np.testing.assert_allclose(forces, theirs[1], atol=1e-9)
        np.testing.assert_allclose(stress, theirs[2], atol=1e-10)


def test_what_is_not_covered_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = DeepmdFrontend()
    model = build("smooth")
    with pytest.raises(UnsupportedModelError, match="DPEnergyAtomicModel is not covered"):
        frontend.check(model.atomic_model)
    model.atomic_model.fitting_net.numb_fparam = 2
    with pytest.raises(UnsupportedModelError, match="numb_fparam=2"):
        frontend.check(model)
    model = build("smooth")
    model.atomic_model.descriptor.compress = True
    with pytest.raises(UnsupportedModelError, match="compressed descriptor"):
        frontend.check(model)
    model = build("typed")
    model.atomic_model.descriptor.se_atten.mean[..., 0] = 0.1
    with pytest.raises(UnsupportedModelError, match="set_davg_zero"):
        frontend.check(model)
    model = build("smooth")
    model.atomic_model.type_map = ["O", "Q7"]
    with pytest.raises(UnsupportedModelError, match="Q7"):
        frontend.check(model)
    model = build("smooth")
    monkeypatch.setattr(frontend, "tested", ("0.1",))
    with pytest.raises(UnsupportedModelError, match=r"deepmd-kit 3\.2\.0 is not covered"):
        frontend.check(model)


def test_bad_input_at_run_time() -> None:
    _, fast = optimised("smooth")
    coord, types, box = inputs(structures()[0])
    with pytest.raises(RuntimeError, match="below 2"):
        fast(coord, types + 2, box)
    with pytest.raises(RuntimeError, match="fparam"):
        fast(coord, types, box, fparam=torch.zeros(1, 1))
    fast = copy.copy(fast.interface)
    fast.message_passing = True
    with pytest.raises(RuntimeError, match="message passing"):
        fast(coord, types, box, do_atomic_virial=True)
    with pytest.raises(RuntimeError, match="mapping"):
        fast.forward_lower(coord, types, torch.full((1, 27, 100), -1))
