"""Every MACE variant: the drop-in against the original, with all flags, at sizes other than the traced ones."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch

import fxpass
from fxpass.structures import Structure, neighbour_list
from mace_models import CUTOFF, NUMBERS, VARIANTS, build

pytestmark = pytest.mark.mace

HEADS = ["Default"]
EXACT_ENERGY, EXACT_FORCES, EXACT_STRESS = 1e-10, 1e-9, 1e-10  # eV/atom, eV/A, eV/A^3


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


def batch(items: list[Structure], model: torch.nn.Module, heads: list[int] | None = None) -> dict[str, torch.Tensor]:
    """MACE's data dict, written here and not taken from the code under test."""
    dtype = next(model.parameters()).dtype
    names = ("positions", "cell", "edge_index", "unit_shifts", "shifts", "attrs", "batch")
    rows: dict[str, list[Any]] = {k: [] for k in names}
    ptr = [0]
    for k, item in enumerate(items):
        edges, units = neighbour_list(item, CUTOFF)
        rows["positions"].append(item.positions)
        rows["cell"].append(item.cell)
        rows["edge_index"].append(edges + ptr[-1])
        rows["unit_shifts"].append(units)
        rows["shifts"].append(units @ item.cell)
        rows["attrs"].append(np.array([[float(z == s) for s in NUMBERS] for z in item.numbers]))
        rows["batch"].append(np.full(len(item.numbers), k))
        ptr.append(ptr[-1] + len(item.numbers))
    as_tensor = {k: torch.from_numpy(np.concatenate(v, axis=1 if k == "edge_index" else 0)) for k, v in rows.items()}
    floating = {k: as_tensor[k].to(dtype) for k in ("positions", "cell", "unit_shifts", "shifts")}
    return {
        **floating,
        "node_attrs": as_tensor["attrs"].to(dtype),
        "edge_index": as_tensor["edge_index"],
        "batch": as_tensor["batch"],
        "ptr": torch.tensor(ptr),
        "head": torch.tensor(heads if heads is not None else [0] * len(items)),
    }


def call(model: torch.nn.Module, data: dict[str, torch.Tensor], **flags: bool) -> dict[str, torch.Tensor | None]:
    return model({k: v.clone() for k, v in data.items()}, **flags)


def compare(found: dict[str, Any], expected: dict[str, Any], atoms: torch.Tensor, *, scale: float = 1.0) -> None:
    """Same names, presence, dtypes and shapes, and values within the exact tolerances times ``scale``."""
    assert set(found) == set(expected)
    limits = {"stress": EXACT_STRESS, "atomic_stresses": EXACT_STRESS}
    for name, value in expected.items():
        other = found[name]
        if value is None:
            assert other is None, name
            continue
        assert other is not None, name
        assert (other.shape, other.dtype) == (value.shape, value.dtype), name
        assert torch.isfinite(other).all(), name
        error = (other.detach() - value.detach()).abs()
        if name in ("energy", "interaction_energy"):
            assert (error / atoms).max() <= EXACT_ENERGY * scale, name
        elif value.numel():
            limit = limits.get(name, EXACT_FORCES) * scale * max(1.0, float(value.detach().abs().max()))
            assert error.max() <= limit, (name, float(error.max()))


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_exact_in_float64(name: str) -> None:
    compare_variant(name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "nonlinear", "correlation-3-l3", "three-layers-l2"])
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
    items = structures()
    heads = [k % len(model.heads) for k in range(len(items))]
    data = batch(items, model, heads)
    atoms = data["ptr"].diff()
    expected = call(model, data, compute_stress=True)
    assert expected["forces"].abs().max() > 1e-2, "the test would not see a wrong force"
    compare(call(optimised, data, compute_stress=True), expected, atoms)
    alone = batch([items[2]], model)
    compare(call(optimised, alone), call(model, alone), torch.ones(1))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"the original's {key} was changed"
    return optimised


def test_chebyshev_returns_the_gradient_that_the_original_lacks() -> None:
    model = build(radial_type="chebyshev", l_max=1, hidden="4x0e", correlation=1, layers=1)
    with torch.no_grad():  # the basis grows as 4^6 towards the cutoff: keep energies of the order of 1 eV
        model.scale_shift.scale.fill_(1e-6)
    optimised = fxpass.optimize(model, "exact")
    assert any("not the gradient" in warning for warning in optimised.report.warnings)
    data = batch(structures()[:2], model)
    found, original = call(optimised, data), call(model, data)
    assert torch.allclose(found["energy"], original["energy"], rtol=1e-12, atol=1e-12)
    step = 1e-5

    def energy(k: int, sign: float) -> torch.Tensor:
        moved = {name: value.clone() for name, value in data.items()}
        moved["positions"][k, 0] += sign * step
        return model(moved)["energy"].sum().detach()

    for k in (0, 5, 13):
        slope = -(energy(k, 1) - energy(k, -1)) / (2 * step)
        assert torch.allclose(found["forces"][k, 0], slope, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(original["forces"], found["forces"], rtol=1e-3)


FLAGS = [
    {},
    {"compute_force": False},
    {"compute_virials": True},
    {"compute_stress": True},
    {"compute_displacement": True},
    {"compute_edge_forces": True},
    {"compute_stress": True, "compute_edge_forces": True, "compute_atomic_stresses": True},
    {"compute_atomic_stresses": True},
    {"compute_force": False, "compute_edge_forces": True},
    {"training": True},
    {"compute_hessian": True},
]


@pytest.fixture(scope="module")
def pair() -> tuple[torch.nn.Module, fxpass.Optimized]:
    model = build()
    return model, fxpass.optimize(model, "exact", verify=False)


@pytest.fixture(scope="module")
def plain_pair() -> tuple[torch.nn.Module, fxpass.Optimized]:
    model = build("MACE")
    return model, fxpass.optimize(model, "exact", verify=False)


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: ",".join(f) or "none")
@pytest.mark.parametrize("kind", ["pair", "plain_pair"])
def test_flags(kind: str, flags: dict[str, bool], request: pytest.FixtureRequest) -> None:
    model, optimised = request.getfixturevalue(kind)
    data = batch(structures()[:2], model)
    compare(call(optimised, data, **flags), call(model, data, **flags), data["ptr"].diff(), scale=10)


def test_a_given_displacement_is_applied(pair: tuple[torch.nn.Module, fxpass.Optimized]) -> None:
    model, optimised = pair
    data = batch(structures()[:2], model)
    torch.manual_seed(1)
    strain = 0.02 * torch.randn(2, 3, 3, dtype=torch.float64)

    def run(module: torch.nn.Module) -> dict[str, Any]:
        inputs = {k: v.clone() for k, v in data.items()}
        # what MACE's calculator does: the displacement hangs on the positions
        inputs["positions"].requires_grad_(True)
        inputs["displacement"] = strain.clone().requires_grad_(True) + inputs["positions"].sum() * 0
        return module(inputs, compute_stress=True)

    found, expected = run(optimised), run(model)
    for name in ("energy", "forces", "virials", "stress"):
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-9), name


def test_training_outputs_differentiate_again(pair: tuple[torch.nn.Module, fxpass.Optimized]) -> None:
    model, optimised = pair
    data = batch(structures()[:1], model)
    grads = []
    for module in (model, optimised):
        inputs = {k: v.clone() for k, v in data.items()}
        positions = inputs["positions"].requires_grad_(True)
        forces = module(inputs, training=True)["forces"]
        grads.append(torch.autograd.grad(forces.pow(2).sum(), positions)[0])
    assert torch.allclose(grads[0], grads[1], rtol=1e-9, atol=1e-8)


def test_it_has_the_signature_and_attributes_of_the_original(pair: tuple[torch.nn.Module, fxpass.Optimized]) -> None:
    model, optimised = pair
    ours, theirs = inspect.signature(optimised.forward), inspect.signature(model.forward)
    both = [[(p.name, p.default) for p in s.parameters.values()] for s in (ours, theirs)]
    assert both[0] == both[1]
    assert float(optimised.r_max) == float(model.r_max)
    assert torch.equal(optimised.atomic_numbers, model.atomic_numbers)
    assert optimised.heads == model.heads
    attrs = torch.eye(3, dtype=torch.float64)
    assert torch.equal(optimised.atomic_energies_fn(attrs), model.atomic_energies_fn(attrs))
    assert isinstance(optimised.graph_module, torch.fx.GraphModule)


def test_float32_is_no_worse_than_the_original() -> None:
    model = build(dtype=torch.float32)
    receipt = fxpass.optimize(model).report.receipt
    assert receipt is not None and receipt.passed and receipt.dtype == "float32"
    checks = {row.check for row in receipt.rows}
    assert {"energy", "forces", "stress", "rotation", "inversion", "permutation", "finite differences"} <= checks


def test_double_recompiles_in_float64() -> None:
    model = build(dtype=torch.float32)
    optimised = fxpass.optimize(model, "exact", verify=False)
    optimised.double()
    reference = copy.deepcopy(model).double()
    data = batch(structures(), reference)
    compare(call(optimised, data, compute_stress=True), call(reference, data, compute_stress=True), data["ptr"].diff())


def test_one_capture_serves_large_systems(pair: tuple[torch.nn.Module, fxpass.Optimized]) -> None:
    model, optimised = pair
    rng = np.random.default_rng(3)
    side = 13  # 2,197 atoms
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3) * 2.6
    positions = grid + rng.normal(scale=0.1, size=grid.shape)
    large = Structure(rng.choice(NUMBERS, len(grid)), positions, np.eye(3) * side * 2.6, (True,) * 3, "large")
    data = batch([large], model)
    found, expected = (call(m, data, compute_stress=True) for m in (optimised, model))
    compare(found, expected, data["ptr"].diff(), scale=10)


def test_global_state_is_left_alone() -> None:
    model = build()
    torch.manual_seed(5)
    state = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.backends.opt_einsum.enabled,
        torch.get_rng_state(),
    )
    with torch.no_grad():
        fxpass.optimize(model, verify=False)
        assert not torch.is_grad_enabled()
    after = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.backends.opt_einsum.enabled,
        torch.get_rng_state(),
    )
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(state, after, strict=True))


def test_attributes_that_are_not_one_hot_are_refused(pair: tuple[torch.nn.Module, fxpass.Optimized]) -> None:
    model, optimised = pair
    data = batch(structures()[:1], model)
    data["node_attrs"] = data["node_attrs"] * 0.5 + 0.1
    with pytest.raises(RuntimeError, match="one-hot"):
        call(optimised, data)


REFUSED = {
    "dipoles": ("AtomicDipolesMACE", "the model class AtomicDipolesMACE"),
    "block": ("interaction", "interaction block Strange"),
    "readout": ("readout", "readout block Strange"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_uncovered_variants_are_refused_by_name_before_any_work(what: str) -> None:
    key, message = REFUSED[what]
    model = build()
    if key == "AtomicDipolesMACE":
        import mace.modules

        model.__class__ = mace.modules.AtomicDipolesMACE
    else:
        part = model.interactions[1] if key == "interaction" else model.readouts[1]
        part.__class__ = type("Strange", (type(part),), {})
    with pytest.raises(fxpass.UnsupportedModelError, match=message):
        fxpass.optimize(model)


def test_batches_equal_single_structures(pair: tuple[torch.nn.Module, fxpass.Optimized]) -> None:
    _, optimised = pair
    items = structures()
    together = call(optimised, batch(items, optimised))
    apart = [call(optimised, batch([item], optimised)) for item in items]
    assert torch.allclose(together["energy"], torch.cat([r["energy"] for r in apart]), rtol=0, atol=1e-10)
    assert torch.allclose(together["forces"], torch.cat([r["forces"] for r in apart]), rtol=0, atol=1e-10)


def test_the_default_preset_on_several_heads() -> None:
    """Head masks are made in torch's default type, not in the model's; the float64 twin makes them in float64."""
    model = build(heads=["pbe", "r2scan", "Default"], hidden="4x0e", l_max=1, correlation=1)
    report = fxpass.optimize(model).report
    assert report.receipt is not None and report.receipt.passed
    assert any(record.name == "tabulate" and record.modified for record in report.records)
