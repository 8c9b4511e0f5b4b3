"""Triton kernels: the text that is printed, what it computes in Triton's interpreter, what it takes of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.testing import FileCheck

from fxpass.algebra.multilinear import Path as Coupling
from fxpass.algebra.multilinear import TensorProduct
from fxpass.algebra.piecewise import Grid
from fxpass.errors import MissingExtraError
from fxpass.kernels.convolution import FORWARD, ConvolutionKernel
from fxpass.kernels.lanes import Lanes
from fxpass.kernels.triton_launch import bind, resources
from fxpass.kernels.triton_printer import Lane, TritonConvolution, statements
from triton_interpreter import cases

pytestmark = pytest.mark.once

ROUNDING = {"float64": 1e-13, "float32": 2e-6}
ALL = (True, True, True)


def product(channels: int, features: int = 1, harmonics: int = 3, degree: int = 3) -> TensorProduct:
    """The tensor product of a MACE layer: all paths to irreps of natural parity up to ``degree``."""

    def irreps(count: int, highest: int) -> str:
        return "+".join(f"{count}x{l}{'eo'[l % 2]}" for l in range(highest + 1))

    paths: list[Coupling] = []
    out: list[str] = []
    for a in range(features + 1):
        for b in range(harmonics + 1):
            for l in range(abs(a - b), min(a + b, degree) + 1, 2):
                paths.append(Coupling(a, b, len(out), "uvu", channels * len(out), 1.0))
                out.append(f"{channels}x{l}{'eo'[l % 2]}")
    first, second = irreps(channels, features), irreps(1, harmonics)
    return TensorProduct(first, second, "+".join(out), tuple(paths), channels * len(paths), False)


def printed(tp: TensorProduct, needs: tuple[bool, bool, bool] = FORWARD, grid: Grid | None = None) -> TritonConvolution:
    return TritonConvolution(ConvolutionKernel(tp, grid or Grid(5, 0.0, 5.0, 500, flat=True), "float32", needs))


# --- the text


def test_a_program_over_lanes_as_statements() -> None:
    lanes = Lanes()
    x, y, u = lanes.load("x", 2), lanes.scalar("y", 1), lanes.scalar("u", 0)
    lanes.accumulate("sum", 0, lanes.fma(lanes.mul(y, lanes.constant(0.5)), x, u))
    lanes.store("out", 3, lanes.add(x, lanes.load("kept", 1)))
    lanes.load("x", 7)  # nobody needs it
    where = {"x": "xe + {row} * 8", "y": "ye + {row}", "out": "o + {row} * 8"}
    lines = statements(lanes, where, {"sum": "sum_{row}", "u": "u", "kept": "kept_{row}"}, Lane(5))
    assert lines == [
        "t0 = tl.load(xe + 2 * 8 + c5, mask=c5 < 5, other=0.0)",
        "t1 = tl.load(ye + 1)",
        "t4 = t1 * 0.5",
        "t5 = t0 * t4 + u",
        "sum_0 += t5",
        "t8 = t0 + kept_1",
        "tl.store(o + 3 * 8 + c5, t8, mask=c5 < 5)",
    ]


def test_lanes_that_fill_a_block_need_no_mask() -> None:
    assert [Lane(n).width for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert Lane(64).load("x") == "tl.load(x + c64)" and Lane(64).store("x", "v", 3) == "tl.store(x + c64 * 3, v)"


def test_the_forward_kernel_sums_in_registers_and_writes_once() -> None:
    kernel = printed(product(6, features=0, harmonics=1, degree=1))
    compile(kernel.source, "kernel", "exec")
    checks = FileCheck().check(f"def {kernel.name}(x, y, radial, species, coefficients, sender, order, out, size):")
    checks.check("go1_2 = tl.zeros([8], tl.float32)").check("for a in range(").check("row += tl.load(species + e)")
    checks.check("go0_0 +=").check("tl.store(on + 0 + c6, go0_0, mask=c6 < 6)").run(kernel.source)
    assert "tl.atomic" not in kernel.source and kernel.source.count("tl.store") == 4


def test_a_gradient_computes_what_is_asked_for_alone() -> None:
    tp = product(4)
    by_x, by_radial = (printed(tp, needs).source for needs in ((True, False, False), (False, False, True)))
    assert "to_x + n" in by_x and "tl.sum" not in by_x and "to_y +" not in by_x
    assert "to_radial + e" in by_radial and "to_x +" not in by_radial and by_radial.count("tl.sum") == 1


def test_kernels_share_a_name_only_if_they_are_the_same() -> None:
    tp = product(4)
    kernels = [printed(tp), printed(tp, ALL), printed(product(8)), printed(tp, grid=Grid(5, 0.0, 5.0, 400, flat=True))]
    assert len({kernel.name for kernel in kernels}) == 4 and printed(product(4)).name == kernels[0].name


def test_printing_needs_no_triton_and_launching_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    kernel = printed(product(4))
    assert kernel.source
    with pytest.raises(MissingExtraError, match=r"pip install \"fxpass\[triton\]\""):
        bind(kernel)


# --- what it computes


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[float]]:
    """Errors of all cases, from one process in which Triton interprets."""
    script = Path(__file__).parent / "triton_interpreter.py"
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


@pytest.mark.triton
@pytest.mark.parametrize("case", sorted(set(cases()), key=str), ids=str)
def test_the_interpreter_agrees_with_the_op(case: Any, interpreted: dict[str, list[float]]) -> None:
    assert interpreted[str(case)] and max(interpreted[str(case)]) <= ROUNDING[case.dtype]


# --- what it takes of a GPU that need not be there


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("needs", "limit"), [(FORWARD, 96), (ALL, 176), ((False, True, True), 136)], ids=["forward", "gradient", "first"]
)
def test_nothing_spills_for_64_scalars_and_vectors(
    needs: tuple[bool, bool, bool], limit: int, capability: int, record_property: Any
) -> None:
    """64x0e+64x1o, l_max 3, a table by distance: the registers that are left decide how many atoms run at once."""
    found = resources(printed(product(64), needs), capability)
    record_property(f"sm_{capability}", str(found))
    print(f"sm_{capability}: {found}")
    assert found.spill_stores == found.spill_loads == 0 and found.registers <= limit


@pytest.mark.triton
def test_every_kind_of_weights_compiles(record_property: Any) -> None:
    tp = product(20, features=0)
    for kernel, species in (
        (TritonConvolution(ConvolutionKernel(tp, None, "float32", ALL)), False),
        (printed(tp, ALL, Grid(3, 0.0, 5.0, 100, coarse=4)), True),
        (TritonConvolution(ConvolutionKernel(tp, Grid(5, 0.0, 5.0, 100), "float64")), True),
    ):
        found = resources(kernel, 80, species=species)
        record_property(kernel.name, str(found))
        assert found.spill_stores == found.spill_loads == 0 and found.registers <= 128
