"""Multi-scale deformable attention: a kernel that a tracer cannot see, and a file that needs none.

The layer is the example's, examples/deformable_attention.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from conftest import ROOT
from fxpass import jit
from fxpass.errors import CaptureError, FrozenTraceError, LoweringError
from fxpass.verify.devices import compare_kernels, devices
from fxpass_passes.legalize_custom_ops import LegalizeCustomOps

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]
CLEAN = "fold-constants,common-subexpressions,dead-code"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deformable_attention", ROOT / "examples" / "deformable_attention.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return loaded()


@pytest.fixture(scope="module")
def exported(example: ModuleType) -> fxpass.Optimized:
    """The layer that calls the registered kernel, for TorchScript; nothing of the tests changes it."""
    return example.optimized(example.attention("registered"))


def operands(batch: int, queries: int, seed: int) -> tuple[Any, ...]:
    """Of the kernel, for levels 3 x 5 and 2 x 1; some places are outside of the maps."""
    g = torch.Generator().manual_seed(seed)
    draw = [torch.rand(batch, *n, generator=g, dtype=torch.float64) for n in ((17, 2, 3), (queries, 2, 2, 4, 2))]
    return draw[0] - 0.5, [3, 2], [5, 1], 1.4 * draw[1] - 0.2, torch.rand(batch, queries, 2, 2, 4, generator=g).double()


def slopes(function: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in args]
    return torch.autograd.grad(function(*leaves).pow(3).sum(), [x for x in leaves if isinstance(x, Tensor)])


def test_the_three_ways_are_one_function(example: ModuleType) -> None:
    for args in (operands(2, 7, 0), operands(1, 1, 1)):
        expected = example.plain(*args)
        for way in (example.extension, example.registered):
            assert torch.allclose(way(*args), expected, rtol=1e-12, atol=1e-13)
        for a, b in zip(slopes(example.registered, args), slopes(example.plain, args), strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_the_op_is_registered_as_torch_asks(example: ModuleType) -> None:
    args = tuple(x.requires_grad_() if isinstance(x, Tensor) else x for x in operands(2, 3, 2))
    torch.library.opcheck(
        example.registered, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_a_trace_bakes_in_what_an_unregistered_kernel_returned(example: ModuleType) -> None:
    given, new = example.inputs(2, 5, seed=0), example.inputs(2, 5, seed=2)
    model = example.attention("extension")
    traced = torch.jit.trace(model, given, check_trace=False)
    with torch.no_grad():
        assert torch.allclose(traced(*given), model(*given), rtol=1e-12)  # right where it was recorded
        assert (traced(*new) - model(*new)).abs().max() > 0.3  # and silent elsewhere


def test_fxpass_refuses_what_it_cannot_see(example: ModuleType) -> None:
    model = nn.Sequential(Unpacked(example.attention("extension")))
    with pytest.raises(
        FrozenTraceError, match=r"the trace of DeformableAttention holds .* with other values"
    ) as caught:
        jit.trace(model, (example.inputs(2, 5, seed=0),))
    assert caught.value.where.module_path == "0.layer" and "deformable_attention.py:" in str(caught.value.where.source)
    with pytest.raises(CaptureError, match=r"deformable_attention\.py:\d+"):
        example.optimized(example.attention("extension"))


class Unpacked(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.layer(given[0], given[1], given[2])


def test_a_kernel_without_a_reference_does_not_pass_into_a_file(example: ModuleType) -> None:
    with pytest.raises(LoweringError, match=r"deformable\.sample\.default") as caught:
        fxpass.optimize(
            example.attention("registered"),
            CLEAN,
            example_inputs=example.inputs(2, 5, seed=0),
            dynamic=example.NAMES,
            target="torchscript",
        )
    assert "legalize-custom-ops" in str(caught.value)


def test_the_file_is_right_on_new_inputs_and_sizes(
    example: ModuleType, exported: fxpass.Optimized, tmp_path: Path
) -> None:
    model = example.attention("registered")
    exported.save(tmp_path / "attention.pt")
    file = torch.jit.load(tmp_path / "attention.pt")
    text = str(file.inlined_graph)
    assert "deformable" not in text and "aten::grid_sampler" in text
    for seed, (batch, queries) in enumerate(((1, 1), (1, 40), (4, 7), (2, 5))):
        args = example.inputs(batch, queries, seed=seed)
        for result in (exported(*args), file(*args)):
            assert torch.allclose(result, model(*args), rtol=1e-12, atol=1e-13)
    leaves = [x.requires_grad_() for x in example.inputs(3, 6, seed=9)]
    found, expected = (torch.autograd.grad(m(*leaves).square().sum(), leaves) for m in (exported, model))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_the_receipt_has_a_row_for_each_device(exported: fxpass.Optimized) -> None:
    receipt = exported.report.receipt
    assert receipt is not None and receipt.passed
    rows = {row.check: row for row in receipt.rows if " on " in row.check}
    assert set(rows) == {f"result on {device}" for device in devices()}
    assert all(row.passed and row.value < 1e-13 for row in rows.values())
    assert exported.report.warnings == ()  # the kernel agrees with its reference


def test_the_levels_are_numbers_of_the_program(example: ModuleType) -> None:
    torch.manual_seed(1)
    model = example.DeformableAttention(8, levels=((5, 2), (1, 3)), heads=2, points=3, way="registered").double()
    args = (torch.randn(2, 6, 8).double(), torch.rand(2, 6, 2).double(), torch.randn(2, 13, 8).double())
    passes = [LegalizeCustomOps(references={example.OP: example.plain}), CLEAN]
    found = fxpass.optimize(model, passes, example_inputs=args, dynamic=example.NAMES, verify=False)
    assert torch.allclose(found(*args), model(*args), rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="features"):
        found(args[0], args[1], args[2][:, :12])


def test_a_kernel_that_takes_corners_for_centres_is_found(example: ModuleType) -> None:
    """The mistake of conventions that such kernels make: off by half a pixel."""

    def half_a_pixel_off(value: Tensor, heights: Any, widths: Any, locations: Tensor, weights: Tensor) -> Tensor:
        sizes = locations.new_tensor(list(zip(widths, heights, strict=True))).unsqueeze(1)
        return example.plain(value, heights, widths, locations - 0.5 / sizes, weights)

    op = torch.ops.deformable.sample.default
    right, wrong = (
        compare_kernels(op, reference, operands(2, 5, 0)) for reference in (example.plain, half_a_pixel_off)
    )
    assert {row.check for row in right} >= {f"deformable.sample.default on {device}" for device in devices()}
    assert all(row.passed for row in right) and not any(row.passed for row in wrong)
    assert min(row.value for row in wrong) > 0.05


@pytest.mark.gpu
def test_one_numeric_path_on_a_gpu(example: ModuleType, exported: fxpass.Optimized, tmp_path: Path) -> None:
    exported.save(tmp_path / "attention.pt")
    file = torch.jit.load(tmp_path / "attention.pt").cuda()
    args = example.inputs(2, 9, seed=3)
    result = file(*(x.cuda() for x in args)).cpu()
    assert torch.allclose(result, example.attention("plain")(*args), rtol=1e-11, atol=1e-12)
    assert "result on cuda" in {row.check for row in exported.report.receipt.rows}
    checks = compare_kernels(torch.ops.deformable.sample.default, example.plain, operands(2, 5, 0))
    assert {row.check: row.passed for row in checks}["deformable.sample.default on cuda"]
