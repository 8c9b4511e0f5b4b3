"""The target ``native``: kernels in place of semantic ops, the same numbers, and a manifest that says what runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxpass
from fxpass.ir.program import TensorSpec
from fxpass.ir.tracing import trace_program
from fxpass.kernels.build import find_compiler
from fxpass.models import collate, small_potential
from fxpass.structures import Structure, probe_structures
from fxpass.targets import native
from fxpass.targets.base import ATEN

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return small_potential(torch.float64)


@pytest.fixture(scope="module")
def fused(model: torch.nn.Module) -> fxpass.Optimized:
    return fxpass.optimize(model, target="native")


def probes(optimized: fxpass.Optimized) -> tuple[Structure, ...]:
    return probe_structures(optimized.facts["numbers"], optimized.facts["cutoff"])


def test_the_default_pipeline_runs_in_kernels_within_its_receipt(fused: fxpass.Optimized) -> None:
    receipt = fused.report.receipt
    assert receipt is not None and receipt.passed
    assert fused.report.warnings == ()
    assert {row.op for row in fused.manifest} >= {"convolution", "convolution_gradient", "linear", "rows_by"}
    kernels = [row for row in fused.manifest if row.kernel != ATEN]
    assert all(row.kernel and not row.reason for row in kernels)
    assert fused.kernels.keys() == {row.kernel for row in kernels}
    assert all(name in text for name, text in fused.kernels.items())


def test_exact_passes_in_kernels_are_exact(model: torch.nn.Module) -> None:
    exact = fxpass.optimize(model, "exact", target="native", verify=False)
    for structure in probes(exact):
        found, expected = (exact.frontend.evaluate(each, structure) for each in (exact, model))
        assert abs(found.energy - expected.energy) < 1e-10 * max(len(structure), 1)
        np.testing.assert_allclose(found.forces, expected.forces, rtol=0, atol=1e-9)
        if expected.stress is not None:
            np.testing.assert_allclose(found.stress, expected.stress, rtol=0, atol=1e-10)


def test_a_number_of_threads_gives_the_same_bits_every_time(fused: fxpass.Optimized) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append([fused.frontend.evaluate(fused, s).forces for s in probes(fused)])
    finally:
        torch.set_num_threads(before)
    one, two, again = results
    assert all((a == b).all() for a, b in zip(two, again, strict=True))
    for a, b in zip(one, two, strict=True):  # sums by sender are made by each thread and then joined
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1.0, float(np.abs(a).max(initial=0))))


def test_calls_that_record_autograd_have_derivatives(model: torch.nn.Module) -> None:
    exact = fxpass.optimize(model, "exact", target="native", verify=False)
    numbers = tuple(exact.facts["numbers"])
    found = []
    for each in (exact, model):
        data = collate(probes(exact)[1:2], numbers, exact.facts["cutoff"], torch.float64)
        data["positions"].requires_grad_()
        forces = each(data, training=True)["forces"]
        found.append(torch.autograd.grad(forces.square().sum(), data["positions"])[0])
    assert found[1].abs().max() > 1e-3
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_inputs_of_another_type_never_reach_a_kernel(fused: fxpass.Optimized) -> None:
    data = collate(probes(fused)[1:2], tuple(fused.facts["numbers"]), fused.facts["cutoff"], torch.float32)
    with pytest.raises(RuntimeError, match="type"):
        fused(data)


def test_changed_weights_are_used_and_told(model: torch.nn.Module) -> None:
    exact = fxpass.optimize(model, "exact", target="native", verify=False)
    copied = copy.deepcopy(exact)
    structure = probes(exact)[1]
    before = exact.frontend.evaluate(exact, structure).energy
    assert copied.frontend.evaluate(copied, structure).energy == before
    with torch.no_grad():
        for name, weight in copied.interface.named_parameters():
            if "program" in name:
                weight.mul_(1.1)
    again = copy.deepcopy(copied)
    for each in (copied, again):
        with pytest.warns(UserWarning, match="weights of this model have changed"):
            changed = each.frontend.evaluate(each, structure).energy
        assert abs(changed - before) > 1e-3
    assert exact.frontend.evaluate(exact, structure).energy == before


def test_an_op_that_runs_as_aten_between_kernels_is_told() -> None:
    inputs = (TensorSpec("x", ("atoms", 4), torch.float64),)
    outputs = (TensorSpec("y", ("atoms", 4), torch.float64),)
    program, _ = trace_program(lambda x: (torch.cumsum(x.exp() * 2 + x, 1),), inputs, outputs, {}, stage="energy")
    lowered = native.Native(program)
    (told,) = [row for row in lowered.manifest if row.kernel == ATEN]
    assert told.op == "aten.cumsum.default" and "no C++ is printed for aten.cumsum" in told.reason
    x = torch.rand(5, 4, dtype=torch.float64)
    torch.testing.assert_close(lowered(x)[0], torch.cumsum(x.exp() * 2 + x, 1))


def test_no_compiler(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    plain = fxpass.optimize(model, "exact", target="native", verify=False)
    assert plain.kernels == {} and {row.kernel for row in plain.manifest} == {""}
    assert any("no C++ compiler" in warning for warning in plain.report.warnings)
    structure = probes(plain)[0]
    found, expected = (plain.frontend.evaluate(each, structure) for each in (plain, model))
    np.testing.assert_allclose(found.forces, expected.forces, rtol=0, atol=1e-9)


def test_saved_and_loaded(fused: fxpass.Optimized, tmp_path: Path) -> None:
    fused.save(tmp_path / "native.fxp")
    again = fxpass.load(tmp_path / "native.fxp")
    assert again.report.target == "native" and again.manifest == fused.manifest
    for structure in probes(fused):
        ours, theirs = (fused.frontend.evaluate(each, structure) for each in (fused, again))
        assert ours.energy == theirs.energy and (ours.forces == theirs.forces).all()


def test_no_size_builds_a_kernel(fused: fxpass.Optimized, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*args: object) -> None:
        raise AssertionError("a kernel was built for a size")

    monkeypatch.setattr(native, "build", build)
    for structure in probes(fused):
        assert np.isfinite(fused.frontend.evaluate(fused, structure).forces).all()


def test_kernels_are_kept(model: torch.nn.Module, fused: fxpass.Optimized, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxpass.kernels import build as room

    def compiled(*args: object) -> None:
        raise AssertionError("a kernel was compiled that the cache holds")

    assert find_compiler() is not None
    monkeypatch.setattr(room, "_compile", compiled)
    fxpass.optimize(model, target="native", verify=False)


@pytest.mark.mace
@pytest.mark.slow
def test_the_alloy_model(alloy_model_path: Path, alloy_structures: list[Any]) -> None:
    fused = fxpass.optimize(alloy_model_path, target="native", example=alloy_structures[:2])
    assert fused.report.receipt.passed and fused.report.warnings == ()
    assert {row.op for row in fused.manifest} >= {"contraction", "contraction_gradient", "convolution_gradient"}
    assert all(row.kernel for row in fused.manifest)
