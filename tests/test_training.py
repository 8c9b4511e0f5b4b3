"""``fxpass.trainable``: gradients by parameters of losses on energies, forces and stress are the original's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxpass
from fxpass.errors import CaptureError, UnsupportedModelError, UsageError
from fxpass.ir.convolution import convolution_gradient, rows_by
from fxpass.ir.program import Program
from fxpass.kernels.dispatch import Kernels
from fxpass.models import collate, small_potential
from fxpass.structures import Structure, neighbour_list, probe_structures
from fxpass.training import Differentiable, Trainable, trainable, with_parameters
from variants import chosen

F64 = torch.float64
RELATIVE = 1e-9
Call = Callable[[nn.Module], dict[str, Tensor]]


def loss(result: dict[str, Tensor], keys: Sequence[str]) -> Tensor:
    """Linear and quadratic in each result, with weights that are always the same."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=F64)
    for key in keys:
        weight = torch.randn(result[key].shape, generator=generator, dtype=F64)
        total = total + (weight * result[key]).sum() + 0.1 * result[key].square().mean()
    return total


def gradients(model: nn.Module, call: Call, keys: Sequence[str]) -> dict[str, Tensor]:
    """By name of the parameter; zeros where there is none."""
    model.zero_grad()
    loss(call(model), keys).backward()
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], least: int = 5) -> None:
    """Each gradient within 1e-9 of its largest number; ``least`` of them are not zero."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.numel():
            bound = RELATIVE * max(float(value.abs().max()), 1e-6)
            assert float((found[name] - value).abs().max()) <= bound, name
    assert sum(bool(value.any()) for value in expected.values()) >= least


# --- the bundled model, in both environments


@pytest.fixture(scope="module")
def model() -> Any:
    return small_potential(F64)


@pytest.fixture(scope="module")
def trained(model: Any) -> Trainable:
    return trainable(model)


def probes(model: Any, periodic: bool = False) -> list[Structure]:
    found = probe_structures(model.atomic_numbers.tolist(), model.cutoff)
    return [each for each in found if not periodic or all(each.pbc)]


def on(items: list[Structure], model: Any, **options: Any) -> Call:
    def call(function: nn.Module) -> dict[str, Tensor]:
        data = collate(items, model.atomic_numbers.tolist(), model.cutoff, F64, neighbour_list)
        return function(data, training=True, **options)

    return call


@pytest.mark.parametrize("keys", [("energy",), ("forces",), ("stress",), ("energy", "forces", "stress")])
def test_gradients_of_each_loss(model: Any, trained: Trainable, keys: tuple[str, ...]) -> None:
    call = on(probes(model, periodic="stress" in keys), model, compute_stress="stress" in keys)
    agree(gradients(trained, call, keys), gradients(model, call, keys))


@pytest.mark.once
def test_energies_alone(model: Any, trained: Trainable) -> None:
    call = on(probes(model), model, compute_forces=False)
    agree(gradients(trained, call, ["energy", "node_energy"]), gradients(model, call, ["energy", "node_energy"]))


@pytest.mark.once
@pytest.mark.parametrize("position", range(6))
def test_one_structure(model: Any, trained: Trainable, position: int) -> None:
    """Periodic and isolated, one atom, no edges: graphs serve all sizes."""
    call = on([probes(model)[position]], model)
    agree(gradients(trained, call, ["energy", "forces"]), gradients(model, call, ["energy", "forces"]), 1)


@pytest.mark.once
def test_parameters_are_the_originals(model: Any, trained: Trainable) -> None:
    ours, theirs = (dict(each.named_parameters()) for each in (trained, model))
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in theirs)
    assert trained.state_dict().keys() == model.state_dict().keys()
    assert trained.original is model and trained.cutoff == model.cutoff
    trained.load_state_dict(model.state_dict())


@pytest.mark.once
def test_an_optimiser_takes_the_same_steps(model: Any) -> None:
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    losses = []
    for each in (first, trainable(second)):
        optimiser = torch.optim.Adam(each.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(4):
            optimiser.zero_grad()
            value = loss(on(probes(model), model)(each), ["energy", "forces"])
            value.backward()
            optimiser.step()
            losses[-1].append(value.item())
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
    assert losses[0][3] < losses[0][0]
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.once
def test_frozen_parameters(model: Any) -> None:
    mine = copy.deepcopy(model)
    ours = trainable(mine)
    call, keys = on(probes(model), model), ["energy", "forces"]
    everything = gradients(model, call, keys)
    names = [name for name, _ in mine.named_parameters()]
    for frozen in (names[2:], names):  # after it was made, one after the other
        for name, parameter in mine.named_parameters():
            parameter.requires_grad_(name not in frozen)
        if len(frozen) == len(names):
            assert not any(value.requires_grad for value in call(ours).values())
            continue
        agree(gradients(ours, call, keys), {n: everything[n] for n in names if n not in frozen}, 1)


@pytest.mark.once
def test_gradients_by_positions_where_they_are_asked_for(model: Any, trained: Trainable) -> None:
    found = []
    for each in (model, trained):
        data = collate(probes(model), model.atomic_numbers.tolist(), model.cutoff, F64, neighbour_list)
        data["positions"].requires_grad_()
        loss(each(data, training=True), ["energy", "forces"]).backward()
        found.append(data["positions"].grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.once
def test_what_was_given_stays_as_it_was(model: Any, trained: Trainable) -> None:
    data = collate(probes(model), model.atomic_numbers.tolist(), model.cutoff, F64, neighbour_list)
    before = {name: (value.clone(), value.requires_grad) for name, value in data.items()}
    loss(trained(data, training=True), ["energy", "forces"]).backward()
    for name, value in data.items():
        assert torch.equal(value, before[name][0]) and value.requires_grad == before[name][1] and value.grad is None


@pytest.mark.once
def test_a_gradient_that_is_differentiated(model: Any, trained: Trainable) -> None:
    """Norm of the parameter gradient of a loss on forces, as a penalty: third derivatives of the energy."""
    call = on([probes(model)[0]], model)
    found = []
    for each in (model, trained):
        each.zero_grad()
        parameters = [p for p in each.parameters() if p.requires_grad]
        first = torch.autograd.grad(
            loss(call(each), ["energy", "forces"]), parameters, create_graph=True, allow_unused=True
        )
        sum(g.square().sum() for g in first if g is not None).backward()  # type: ignore[union-attr]
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in each.named_parameters()})
    agree(found[1], found[0])


@pytest.mark.once
def test_kernels_run_forward_and_backward(model: Any, trained: Trainable) -> None:
    gradients(trained, on(probes(model), model), ["energy", "forces"])
    part = trained.interface.forces_program
    assert isinstance(part, Differentiable)
    ran = " ".join(part.kernels.calls)
    assert "convolution" in ran and "rows_by" in ran and "linear" in ran
    names = [str(node.target) for each in part.made.values() for node in each.backward.graph.nodes]
    assert names.count("fxpass.convolution_gradient.default") >= 2, "double backward runs the same op"
    assert not any("tensor_product" in name and "conv" in name for name in names)


# --- what a caller may do with it besides


@pytest.mark.once
@pytest.mark.parametrize("differentiated", [False, True])
def test_inputs_that_depend_on_each_other(model: Any, trained: Trainable, differentiated: bool) -> None:
    """Shifts are made from the cell: what a strain does to the energy is counted once."""
    base = collate(probes(model)[:1], model.atomic_numbers.tolist(), model.cutoff, F64, neighbour_list)
    units = base["shifts"] @ torch.linalg.inv(base["cell"][0])
    found = []
    for each in (model, trained):
        strain = torch.zeros(3, 3, dtype=F64, requires_grad=True)
        data = {name: base[name] @ (torch.eye(3, dtype=F64) + strain) for name in ("positions", "cell")}
        data = {**base, **data, "shifts": units @ data["cell"][0]}
        energy = each(data, training=True, compute_forces=False)["energy"].sum()
        found.append(torch.autograd.grad(energy, strain, create_graph=differentiated)[0].detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.once
def test_a_parameter_of_two_modules(model: Any) -> None:
    mine = copy.deepcopy(model)
    ours, call = trainable(mine), on(probes(mine)[:1], mine)
    mine.layers[1].radial.layer0.weight = weight = mine.layers[0].radial.layer0.weight
    for differentiated in (False, True):
        one, other = (
            torch.autograd.grad(loss(call(f), ["energy", "forces"]), weight, create_graph=differentiated)[0].detach()
            for f in (ours, mine)
        )
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.once
def test_copies_and_pickles(model: Any) -> None:
    """Each is a model of its own, that trains alike."""
    ours, call, keys = trainable(copy.deepcopy(model)), on(probes(model), model), ["energy", "forces"]
    expected = gradients(ours, call, keys)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for again in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert dict(again.named_parameters())["readout.weight"] is again.original.readout.weight
        assert again.original is not ours.original
        agree(gradients(again, call, keys), expected)
        with torch.no_grad():
            again.original.readout.weight.mul_(2)
        assert not torch.allclose(call(again)["forces"], call(ours)["forces"])


@pytest.mark.once
def test_inside_another_module(model: Any, trained: Trainable) -> None:
    ours, theirs = (nn.ModuleDict({"model": each}) for each in (copy.deepcopy(trained), copy.deepcopy(model)))
    for names in (lambda m: m.state_dict().keys(), lambda m: dict(m.named_parameters()).keys()):
        assert names(ours) == names(theirs)
    assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys()
    with torch.no_grad():
        theirs["model"].readout.weight.mul_(2)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours["model"].original.readout.weight, theirs["model"].readout.weight)
    call = on(probes(model)[:1], model)
    torch.testing.assert_close(call(ours["model"])["forces"], call(theirs["model"])["forces"], rtol=1e-9, atol=1e-9)
    state = theirs.state_dict()
    state["model.atomic_energies"] = state["model.atomic_energies"] + 1
    with pytest.raises(UsageError, match="atomic_energies"):
        ours.load_state_dict(state)
    assert not ours.eval()["model"].original.training and ours.train()["model"].interface.training


@pytest.mark.once
def test_threads_share_one(model: Any, trained: Trainable) -> None:
    call = on(probes(model)[:1], model)
    expected = call(trained)["energy"].detach()  # traced once, before
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: call(trained)["energy"].detach(), range(12)):
            assert torch.equal(found, expected)


# --- families: each one's own model, data and results


def compare_family(model: Any, call: Call, keys: Sequence[str]) -> Trainable:
    ours = trainable(model).train()
    assert model.training
    agree(gradients(ours, call, keys), gradients(model, call, keys))
    return ours


def mace_call(model: Any, periodic: bool, **options: Any) -> Call:
    from fxpass.frontends.mace import mace_batch
    from mace_models import CUTOFF, NUMBERS

    items = [each for each in probe_structures(NUMBERS, CUTOFF) if not periodic or all(each.pbc)]
    heads = list(getattr(model, "heads", None) or ["Default"])

    def call(function: nn.Module) -> dict[str, Tensor]:
        return function(mace_batch(items, NUMBERS, CUTOFF, heads, F64), training=True, **options)

    return call


MACE_VARIANTS = (
    *("scale-shift", "mace", "attention", "density-residual", "nonlinear", "correlation-3-l3", "three-layers-l2"),
    *("heads-nonlinear", "zbl", "agnesi", "bias-readout", "agnostic-product", "hidden-l3", "correlation-4", "so3"),
)


@pytest.mark.mace
@pytest.mark.parametrize("name", chosen(MACE_VARIANTS, "scale-shift"))
def test_mace(name: str) -> None:
    from mace_models import VARIANTS, build

    model = build(**VARIANTS[name])
    ours = compare_family(model, mace_call(model, False), ["energy", "forces"])
    call, keys = mace_call(model, True, compute_stress=True), ["energy", "forces", "stress"]
    agree(gradients(ours, call, keys), gradients(model, call, keys))


@pytest.mark.mace
def test_hessians_of_mace() -> None:
    from mace_models import build

    model = build(layers=1, correlation=2, hidden="4x0e")
    call = mace_call(model, False, compute_hessian=True)
    found, expected = (call(each)["hessian"] for each in (trainable(model), model))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.mace
@pytest.mark.long
def test_a_basis_without_a_derivative_is_told() -> None:
    """Forces of the original are not the gradient of its energy: its energies train alike, and the user is told."""
    from mace_models import build

    model = build(radial_type="chebyshev", layers=1)
    with pytest.warns(UserWarning, match="Chebyshev"):
        ours = trainable(model)
    call = mace_call(model, False, compute_force=False)
    agree(gradients(ours, call, ["energy"]), gradients(model, call, ["energy"]))


@pytest.mark.mace
@pytest.mark.long
def test_mace_of_float32() -> None:
    from fxpass.frontends.base import converted
    from fxpass.frontends.mace import mace_batch
    from mace_models import CUTOFF, NUMBERS, build

    exact = build(correlation=3)
    model = converted(exact, torch.float32)
    items = list(probe_structures(NUMBERS, CUTOFF))

    def call(function: nn.Module) -> dict[str, Tensor]:
        dtype = next(function.parameters()).dtype
        return function(mace_batch(items, NUMBERS, CUTOFF, ["Default"], dtype), training=True)

    found = gradients(trainable(model), call, ["energy", "forces"])
    for name, value in gradients(exact, call, ["energy", "forces"]).items():
        assert float((found[name].double() - value).abs().max()) <= 1e-3 * float(value.abs().max()), name


@pytest.mark.nequip
@pytest.mark.parametrize("name", chosen(["trainable", "bessel"], "trainable"))
def test_nequip(name: str) -> None:
    import test_nequip as nequip

    model = nequip.build(**nequip.VARIANTS[name])
    data = nequip.frame(nequip.structures()[0])
    compare_family(model, lambda f: nequip.call(f, data), ["total_energy", "forces", "stress"])


@pytest.mark.nequip
def test_allegro() -> None:
    import test_allegro as allegro

    model = allegro.allegro()
    data = allegro.frame(allegro.structures()[0])
    compare_family(model, lambda f: allegro.call(f, data), ["total_energy", "forces", "stress"])


@pytest.mark.sevenn
@pytest.mark.parametrize("name", chosen(["like SevenNet-0", "trained denominator"], "like SevenNet-0"))
def test_sevennet(name: str) -> None:
    import test_sevennet as sevennet

    model = sevennet.build(**sevennet.VARIANTS[name])
    ours, original = trainable(model).train(), sevennet.reference(model).train()
    keys = ["inferred_total_energy", "inferred_force", "inferred_stress"]
    call: Call = lambda f: f(sevennet.graph(sevennet.structures()[:2], model))  # noqa: E731
    agree(gradients(ours, call, keys), gradients(original, call, keys))


@pytest.mark.schnetpack
@pytest.mark.parametrize("kind", chosen(["schnet", "painn"], "painn"))
def test_schnetpack(kind: str) -> None:
    import test_schnetpack as spk

    model = spk.build(**spk.VARIANTS[kind])
    items = spk.structures()
    compare_family(model, lambda f: spk.call(f, spk.batch(items)), ["energy", "forces"])
    compare_family(model, lambda f: spk.call(f, spk.batch(items[:1])), ["energy", "forces", "stress"])


# --- refusals


@pytest.mark.once
def test_modes_that_compute_something_else(model: Any) -> None:
    odd = copy.deepcopy(model)
    odd.extra = nn.Dropout(0.1)
    with pytest.raises(UnsupportedModelError, match="training"):
        trainable(odd)
    odd.extra = nn.Dropout(0.0)
    assert trainable(odd).train().training


@pytest.mark.once
def test_another_type_and_changed_buffers(model: Any) -> None:
    mine = copy.deepcopy(model)
    ours = trainable(mine)
    assert ours.to(F64) is ours
    with pytest.raises(UsageError, match="float32"):
        ours.float()
    state = copy.deepcopy(mine.state_dict())
    state["atomic_energies"] += 1
    with pytest.raises(UsageError, match="atomic_energies"):
        ours.load_state_dict(state)
    mine.atomic_energies += 1
    with pytest.raises(UsageError, match="atomic_energies"):
        on(probes(mine), mine)(ours)


@pytest.mark.once
def test_changed_buffers_whatever_changed_them(model: Any) -> None:
    mine = copy.deepcopy(model)
    ours, call = trainable(mine), on(probes(mine)[:1], mine)
    before, energy = copy.deepcopy(mine.state_dict()), call(ours)["energy"]

    def load() -> None:
        mine.load_state_dict({**before, "atomic_energies": before["atomic_energies"] + 1})

    def write() -> None:
        mine.atomic_energies.data.add_(1)

    def exchange() -> None:
        mine.atomic_energies = mine.atomic_energies + 1

    for change in (load, write, exchange):
        change()
        with pytest.raises(UsageError, match="atomic_energies"):
            call(ours)
        with pytest.raises(UsageError, match="atomic_energies"):
            ours.load_state_dict(mine.state_dict())
        ours.load_state_dict(before)
        assert torch.equal(call(ours)["energy"], energy)


def losing(program: Program) -> tuple[Program, dict[str, str]]:
    """As ``with_parameters``, but for one that the program keeps as a constant."""
    for value in program.graph_module.parameters():
        if getattr(value, "origin", "") == "readout.weight":
            del value.origin
    return with_parameters(program)


@pytest.mark.once
def test_frozen_parameters_that_are_constants(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No input of the program, like SevenNet's denominators that are not trained: it may be folded into anything."""
    mine = copy.deepcopy(model)
    constant = mine.readout.weight.requires_grad_(False)
    monkeypatch.setattr("fxpass.training.with_parameters", losing)
    ours, call = trainable(mine), on(probes(mine)[:1], mine)
    call(ours)
    constant.requires_grad_()
    with pytest.raises(UsageError, match=r"readout\.weight"):
        call(ours)
    constant.requires_grad_(False)
    with pytest.raises(UsageError, match=r"readout\.weight"):
        ours.load_state_dict({**mine.state_dict(), "readout.weight": torch.zeros_like(constant)})
    with torch.no_grad():
        constant.mul_(2)
    with pytest.raises(UsageError, match=r"readout\.weight"):
        call(ours)


@pytest.mark.once
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's own, of a trace cut short
def test_an_op_without_a_second_derivative() -> None:
    """Distances by ``pdist``, in an energy function of one cluster: forces there are, and none of it to train by."""
    from fxpass.frontends.energy import batch_of
    from fxpass.frontends.energy_interface import Potential

    class Cluster(nn.Module):
        numbers = (1,)

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.1, dtype=F64))
            self.examples = [each for each in probe_structures((1,), 4.0) if each.name == "cluster"]

        def forward(self, positions: Tensor) -> Tensor:
            return self.scale * torch.exp(-nn.functional.pdist(positions)).sum()

    mine = Potential(Cluster())
    with pytest.raises(UnsupportedModelError, match=r"no gradient by its parameters: .*pdist"):
        trainable(mine)(batch_of(mine.energy.examples, mine), training=True)


@pytest.mark.once
def test_a_frozen_parameter_of_no_use_may_change(model: Any) -> None:
    mine = copy.deepcopy(model)
    mine.extra = nn.Parameter(torch.ones(2, dtype=F64), requires_grad=False)
    ours, call = trainable(mine), on(probes(mine)[:1], mine)
    expected = call(ours)["energy"]
    with torch.no_grad():
        mine.extra.mul_(2)
    assert torch.equal(call(ours)["energy"], expected)
    ours.load_state_dict({**mine.state_dict(), "extra": torch.zeros(2, dtype=F64)})
    mine.extra.requires_grad_()
    loss(call(ours), ["energy"]).backward()
    assert mine.extra.grad is None


@pytest.mark.once
def test_parameters_that_the_program_lost(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found out on a copy: nothing is written to the caller's."""

    monkeypatch.setattr("fxpass.training.with_parameters", losing)
    before = model.readout.weight._version
    with pytest.raises(CaptureError, match=r"readout\.weight"):
        trainable(model)
    assert model.readout.weight._version == before


@pytest.mark.once
def test_parameters_that_are_gone(model: Any) -> None:
    mine = copy.deepcopy(model)
    ours = trainable(mine)
    parametrize.register_parametrization(mine.readout, "weight", nn.Tanh())
    with pytest.raises(UsageError, match="gone"):
        on(probes(mine)[:1], mine)(ours)
    with pytest.raises(UnsupportedModelError, match="readout"):
        trainable(mine)


@pytest.mark.once
def test_a_model_without_parameters(model: Any) -> None:
    mine = copy.deepcopy(model)
    for module in mine.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
    with pytest.raises(UsageError, match="no parameters"):
        trainable(mine)


@pytest.mark.once
def test_what_is_no_model() -> None:
    with pytest.raises(UsageError):
        trainable("no such file")
    with pytest.raises(UnsupportedModelError):
        trainable(nn.Linear(2, 2))


# --- the ops


@pytest.mark.once
def test_second_derivatives_of_a_convolution_with_weights() -> None:
    from test_kernel_dispatch import PRODUCT, inputs

    x, vectors, _, (sender, receiver) = inputs(4, 9)
    y = torch.cat([vectors[:, :1], vectors], 1)
    radial = torch.randn(9, 12, dtype=F64)
    g = torch.randn(4, 16, dtype=F64)
    order, text = rows_by(sender, 4), str(PRODUCT)
    given = tuple(t.requires_grad_() for t in (x, y, g, radial))

    def first(x: Tensor, y: Tensor, g: Tensor, radial: Tensor) -> tuple[Tensor, ...]:
        return convolution_gradient(x, y, g, radial, None, None, sender, receiver, order, text, "", [True] * 3)

    with Kernels() as kernels:
        assert torch.autograd.gradcheck(first, given)
        assert torch.autograd.gradgradcheck(first, given, atol=1e-4)
        assert not kernels.fallbacks


# --- programs


@pytest.mark.once
def test_a_parameter_that_nothing_depends_on() -> None:
    from fxpass.ir.program import TensorSpec
    from fxpass.ir.tracing import trace_program

    inputs = (TensorSpec("x", ("atoms", 3), F64), TensorSpec("weight", (2,), F64))
    output = (TensorSpec("energy", ("atoms",), F64),)
    program = trace_program(lambda x, weight: [x.square().sum(1)], inputs, output, {}, stage="energy")[0]
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.ones(2, dtype=F64))
    (energy,) = Differentiable(program, owner, ("weight",))(torch.ones(4, 3, dtype=F64))
    assert torch.equal(torch.autograd.grad(energy.sum(), owner.weight)[0], torch.zeros(2, dtype=F64))


# --- fuse-contraction{live=true}


def weighted(constant: bool) -> tuple[Program, Tensor, Tensor]:
    """A symmetric contraction whose weights by species are a constant, or an input."""
    from fxpass.algebra.polynomial import Polynomial
    from fxpass.ir import ops
    from fxpass.ir.program import TensorSpec
    from fxpass.ir.tracing import trace_program

    text = str(Polynomial(3, ((0,), (2,), (0, 1), (1, 1, 2)), "3x0e", "2x0e"))
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(4, 3, 2, dtype=F64, generator=generator)
    coefficients[0, :, 1] = 0  # no path: no term
    weights = torch.randn(2, 15, dtype=F64, generator=generator)
    inputs = (TensorSpec("x", ("atoms", 5, 3), F64), TensorSpec("species", ("atoms",), torch.int64))
    inputs += () if constant else (TensorSpec("weights", (2, 15), F64),)

    def body(x: Tensor, species: Tensor, weights: Tensor = weights) -> list[Tensor]:
        rows = ops.gather(weights, species).view(-1, 3, 5)
        return [ops.polynomial(x, [], rows, None, coefficients, text, "out").sum((1, 2))]

    named = {"weights": weights, "coefficients": coefficients}
    output = (TensorSpec("energy", ("atoms",), F64),)
    return trace_program(body, inputs, output, named, stage="energy")[0], weights, coefficients


@pytest.mark.once
def test_weights_that_live_in_a_contraction() -> None:
    program, weights, _ = weighted(constant=False)
    x, species = torch.randn(6, 5, 3, dtype=F64), torch.tensor([0, 1, 1, 0, 0, 1])
    refused = fxpass.run_passes(program.copy(), "fuse-contraction")
    assert not refused.records[0].modified and "not constants" in refused.records[0].refusals[0].reason
    done = fxpass.run_passes(program.copy(), "fuse-contraction{live=true},dead-code").program
    targets = [str(node.target) for node in done.graph.nodes]
    assert "fxpass.contraction.default" in targets and "fxpass.polynomial.default" not in targets
    torch.testing.assert_close(
        done.graph_module(x, species, weights), program.graph_module(x, species, weights), rtol=1e-12, atol=1e-12
    )
    assert torch.autograd.gradcheck(
        lambda x, w: done.graph_module(x, species, w)[0], (x.requires_grad_(), weights.clone().requires_grad_())
    )


@pytest.mark.once
def test_constant_weights_are_folded_all_the_same() -> None:
    program, _, _ = weighted(constant=True)
    texts = ("fuse-contraction{live=true},dead-code", "fuse-contraction,dead-code")
    live, folded = (fxpass.run_passes(program.copy(), text).program for text in texts)
    assert [str(n.target) for n in live.graph.nodes] == [str(n.target) for n in folded.graph.nodes]
