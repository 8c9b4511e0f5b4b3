"""Every target computes the same numbers as the original, at any size; a TorchScript file needs torch alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import fxpass
from fxpass.errors import Location
from fxpass.frontends.mace import mace_batch
from fxpass.models import Settings, build, collate
from fxpass.registry import TARGETS, default_registry
from fxpass.structures import FCC, Structure, probe_structures
from mace_models import CUTOFF, NUMBERS
from mace_models import build as build_mace

EXACT = 1e-9  # eV, eV/A, eV/A^3
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """A small float64 model, and how structures become its input."""

    model: torch.nn.Module
    batch: Callable[[Sequence[Structure]], Batch]


def family(name: str, layers: int = 2) -> Family:
    if name == "mace":
        model = build_mace(l_max=1, layers=layers, correlation=2)
        make = partial(mace_batch, heads=["Default"], dtype=torch.float64, cutoff=CUTOFF, numbers=NUMBERS)
        return Family(model, make)
    settings = Settings(
        numbers=NUMBERS,
        atomic_energies=(0.5, -1.0, 0.25),
        cutoff=CUTOFF,
        features="4x0e+4x1o",
        max_degree=1,
        layers=layers,
        radial_functions=4,
        radial_neurons=8,
        average_neighbours=1.0,  # large messages make large forces
    )
    return Family(build(settings, torch.float64), partial(collate, numbers=NUMBERS, cutoff=CUTOFF, dtype=torch.float64))


def crystal(cells: int, seed: int = 0) -> Structure:
    """A rattled fcc crystal of ``4 cells^3`` atoms."""
    rng = np.random.default_rng(seed)
    corners = np.stack(np.meshgrid(*[np.arange(cells)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    positions = 3.6 * (corners + FCC).reshape(-1, 3) + rng.normal(scale=0.1, size=(4 * cells**3, 3))
    return Structure(
        rng.choice(NUMBERS, len(positions)), positions, 3.6 * cells * np.eye(3), (True, True, True), f"{cells} cells"
    )


ALLOY, CLUSTER, SLAB, ATOM, DIMER, TRICLINIC = probe_structures(NUMBERS, CUTOFF)
APART = Structure(np.array(NUMBERS[:2]), np.diag([0.0, 0.0, 50.0])[1:], np.zeros((3, 3)), (False,) * 3, "apart")
BATCHES: list[list[Structure]] = [
    [ALLOY],
    [ATOM],  # 1 atom, 0 edges
    [APART],  # 2 atoms, 0 edges
    [DIMER],
    [crystal(2)],
    [ALLOY, CLUSTER, SLAB, ATOM, DIMER, TRICLINIC],
    [ATOM, ATOM],
    [TRICLINIC, ATOM],
]


def flags(items: Sequence[Structure]) -> dict[str, bool]:
    """Stress where every structure has a volume: elsewhere there is none."""
    return {"compute_stress": all(all(item.pbc) for item in items)}


def call(model: torch.nn.Module, batch: Batch, **options: bool) -> dict[str, torch.Tensor | None]:
    return model({key: value.clone() for key, value in batch.items()}, **options)


def assert_same(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None], where: str) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        other = found[name]
        if value is None or other is None:
            assert value is other, (where, name)
            continue
        assert (other.shape, other.dtype) == (value.shape, value.dtype), (where, name)
        error = (other - value).detach().abs()
        assert not error.numel() or float(error.max()) <= EXACT, (where, name, float(error.max()))


@pytest.fixture(scope="module", params=["equivariant", pytest.param("mace", marks=pytest.mark.mace)])
def original(request: pytest.FixtureRequest) -> Family:
    return family(request.param)


@pytest.fixture(scope="module")
def eager(original: Family) -> fxpass.Optimized:
    return fxpass.optimize(original.model, "exact", verify=False)


@pytest.fixture(scope="module")
def scripted(original: Family) -> fxpass.Optimized:
    return fxpass.optimize(original.model, "exact", verify=False, target="torchscript")


@pytest.fixture(scope="module")
def native(original: Family) -> fxpass.Optimized:
    return fxpass.optimize(original.model, "exact", verify=False, target="native")


def test_shipped_targets() -> None:
    assert set(default_registry().names(TARGETS)) >= {"eager", "torchscript", "inductor", "native"}


@pytest.mark.parametrize("target", ["eager", "scripted", "native"])
def test_it_equals_the_original_at_any_size(target: str, original: Family, request: pytest.FixtureRequest) -> None:
    optimised = request.getfixturevalue(target)
    for items in BATCHES:
        batch, options = original.batch(items), flags(items)
        expected = call(original.model, batch, **options)
        name = f"{target}: {', '.join(item.name for item in items)}"
        assert_same(call(optimised, batch, **options), expected, name)
    # so that a wrong force, and a wrong stress, would have been seen
    expected = call(original.model, original.batch([ALLOY]), compute_stress=True)
    assert expected["forces"].abs().max() > 1e-2  # type: ignore[union-attr]
    assert expected["stress"].abs().max() > 1e-4  # type: ignore[union-attr]


def test_eager_is_aten_alone(eager: fxpass.Optimized) -> None:
    for module in (eager.energy_program, eager.forces_program):
        called = [node.target for node in module.graph.nodes if node.op == "call_function"]
        names = {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)}
        assert names == {"aten"}


def test_the_energy_program_does_not_compute_forces(original: Family, eager: fxpass.Optimized) -> None:
    assert len(eager.energy_program.graph.nodes) < len(eager.forces_program.graph.nodes)
    batch = original.batch([ALLOY])
    ran: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in [("energy", eager.energy_program), ("forces", eager.forces_program)]
    ]
    no_forces = {"compute_force": False} if "node_attrs" in batch else {"compute_forces": False}
    found = call(eager, batch, **no_forces)
    for hook in hooks:
        hook.remove()
    assert ran == ["energy"]
    assert torch.allclose(found["energy"], call(original.model, batch)["energy"], rtol=0, atol=EXACT)  # type: ignore[arg-type]


# TorchScript

ALONE = """
import sys
import torch

model = torch.jit.load(sys.argv[1])
found = [model(batch, **options) for batch, options in torch.load(sys.argv[2])]
torch.save(found, sys.argv[3])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_a_script_needs_torch_alone(original: Family, scripted: fxpass.Optimized, tmp_path: Path) -> None:
    scripted.save(tmp_path / "model.pt")
    cases = [(original.batch(items), flags(items)) for items in BATCHES]
    torch.save(cases, tmp_path / "cases.pt")
    files = [str(tmp_path / name) for name in ("model.pt", "cases.pt", "found.pt")]
    done = subprocess.run([sys.executable, "-c", ALONE, *files], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"fxpass", "fxpass_passes", "e3nn", "mace"} & set(done.stdout.split())
    for items, (batch, options), found in zip(BATCHES, cases, torch.load(tmp_path / "found.pt"), strict=True):
        assert_same(found, call(original.model, batch, **options), ", ".join(item.name for item in items))


def test_a_saved_script_loads_as_a_drop_in(original: Family, scripted: fxpass.Optimized, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    scripted.save(path)
    loaded = fxpass.load(path)
    assert loaded.report.target == "torchscript"
    batch = original.batch([TRICLINIC])
    assert_same(call(loaded, batch, compute_stress=True), call(scripted, batch, compute_stress=True), "loaded")
    with pytest.raises(fxpass.UsageError, match="loaded from a file"):
        loaded.float()


def test_an_op_that_torchscript_cannot_carry_is_refused_by_name() -> None:
    from fxpass.targets.torchscript import TorchScriptTarget

    program = fxpass.capture(family("equivariant", layers=1).model)  # not legalised
    with pytest.raises(fxpass.LoweringError, match=r"TorchScript cannot carry fxpass\.") as found:
        TorchScriptTarget().lower(program)
    assert found.value.where != Location() and found.value.hint


# Inductor


@pytest.mark.slow
@pytest.mark.parametrize("name", ["equivariant", pytest.param("mace", marks=pytest.mark.mace)])
def test_inductor_compiles_once_for_all_sizes(name: str) -> None:
    small = family(name, layers=1)
    optimised = fxpass.optimize(small.model, "exact", verify=False, target="inductor")
    compiled_calls: list[int] = []
    optimised.forces_program.compiled.register_forward_pre_hook(lambda *_: compiled_calls.append(1))
    torch._dynamo.reset()
    counters.clear()

    def check(items: list[Structure]) -> None:
        batch, options = small.batch(items), flags(items)
        assert_same(call(optimised, batch, **options), call(small.model, batch, **options), str(len(items)))

    check([ALLOY])  # one structure, the usual case, is not left to the eager program
    assert compiled_calls == [1]
    assert counters["stats"]["unique_graphs"] == 1

    others = [*BATCHES[1:], *([crystal(1), *[CLUSTER] * n] for n in range(1, 7))]
    others += [[SLAB], [CLUSTER], [TRICLINIC], [ATOM, CLUSTER], [crystal(3)], [crystal(2), crystal(1)], [SLAB, DIMER]]
    edges = {id(items): small.batch(items)["edge_index"].shape[1] for items in others}
    assert len({(len(items), sum(map(len, items)), edges[id(items)]) for items in others}) == 20
    with torch._dynamo.config.patch(error_on_recompile=True):
        for items in others:
            check(items)
    assert counters["stats"]["unique_graphs"] == 1
    assert len(compiled_calls) == 1 + sum(edges[id(items)] >= 2 for items in others)


def test_inductor_is_saved_as_a_package(tmp_path: Path) -> None:
    """Compiled code is not stored: it is made again where the package is loaded, at the first call."""
    small = family("equivariant", layers=1)
    optimised = fxpass.optimize(small.model, [], verify=False, target="inductor")
    optimised.save(tmp_path / "model.fxp")
    loaded = fxpass.load(tmp_path / "model.fxp")
    assert loaded.report.target == "inductor"
    assert type(loaded.forces_program) is type(optimised.forces_program)
    batch = small.batch([ATOM])  # too small to compile
    assert_same(call(loaded, batch), call(small.model, batch), "atom")
