"""Triton kernels: the text that is printed, what it computes in Triton's interpreter, what it takes of a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import FileCheck

from fxpass.algebra.piecewise import Grid
from fxpass.errors import KernelError, MissingExtraError
from fxpass.kernels.contraction import ContractionKernel
from fxpass.kernels.convolution import FORWARD, ConvolutionKernel
from fxpass.kernels.lanes import Lanes
from fxpass.kernels.linear import LinearKernel
from fxpass.kernels.triton_compile import Resources, resources
from fxpass.kernels.triton_contraction import MOST_TERMS, TritonContraction
from fxpass.kernels.triton_convolution import TritonConvolution
from fxpass.kernels.triton_launch import bind
from fxpass.kernels.triton_linear import TritonLinear
from fxpass.kernels.triton_printer import Config, Lane, TritonKernel, by_width, statements
from fxpass.kernels.triton_report import (
    CAPABILITIES,
    MARKS,
    Named,
    everything,
    harmonics,
    linear,
    main,
    row,
    symmetric_contraction,
    tensor_product,
)
from fxpass.kernels.triton_tune import ENOUGH, Device, Tuner
from triton_interpreter import CONTRACTIONS, Case, cases

pytestmark = pytest.mark.once

#: the interpreter cuts bfloat16 off where it should round
ROUNDING = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2.0**-7}
ALL = (True, True, True)
PAGE = Path(__file__).parents[1] / "docs" / "triton.md"


def convolution(
    channels: int, features: int = 1, degree: int = 3, needs: tuple[bool, bool, bool] = FORWARD, **grid: Any
) -> TritonConvolution:
    made = Grid(5, 0.0, 5.0, **{"cells": 500, "flat": True} | grid)
    return TritonConvolution(
        ConvolutionKernel(tensor_product(channels, features, degree, degree), made, "float32", needs)
    )


# --- the text


def test_a_program_over_lanes_as_statements() -> None:
    lanes = Lanes()
    x, y, u = lanes.load("x", 2), lanes.scalar("y", 1), lanes.scalar("u", 0)
    lanes.accumulate("sum", 0, lanes.fma(lanes.mul(y, lanes.constant(0.5)), x, u))
    lanes.store("out", 3, lanes.add(x, lanes.load("kept", 1)))
    lanes.store("out", 4, lanes.constant(0.1))
    lanes.load("x", 7)  # nobody needs it
    where = {"x": ("xe + {row} * 8", 1), "y": ("ye + {row}", 1), "out": ("o + {row}", 5)}
    lines = statements(lanes, where, {"sum": "sum_{row}", "u": "u", "kept": "kept_{row}"}, Lane.of(5, "float64"))
    assert lines == [
        "t0 = tl.load(xe + 2 * 8 + c5, mask=c5 < 5, other=0.0)",
        "t1 = tl.load(ye + 1)",
        "t4 = t1 * 0.5",
        "t5 = t0 * t4 + u",
        "sum_0 += t5",
        "t8 = t0 + kept_1",
        "tl.store(o + 3 + c5 * 5, t8, mask=c5 < 5)",
        "tl.store(o + 4 + c5 * 5, tl.full([8], 0.1, tl.float64), mask=c5 < 5)",
    ]


def test_lanes_that_fill_a_block_need_no_mask() -> None:
    assert [Lane.of(n, "float32").width for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    lane = Lane.of(64, "float32")
    assert lane.load("x") == "tl.load(x + c64)" and lane.store("x", "v", 3) == "tl.store(x + c64 * 3, v)"


def test_what_is_stored_as_bfloat16_is_computed_with_in_float32() -> None:
    lane = Lane.of(64, "bfloat16")
    assert lane.load("x") == "tl.load(x + c64).to(tl.float32)" and lane.zeros == "tl.zeros([64], tl.float32)"
    kernel = convolution(8).kernel
    narrow = TritonConvolution(kernel, narrow=True)
    kinds = {a.name: a.kind for a in narrow.arguments}
    assert (kinds["x"], kinds["out"], kinds["radial"], kinds["coefficients"]) == ("number", "number", "wide", "wide")
    assert narrow.name != TritonConvolution(kernel).name
    double = ConvolutionKernel(kernel.product, kernel.grid, "float64")
    with pytest.raises(KernelError, match="float32, not float64"):
        TritonConvolution(double, narrow=True)


def test_the_forward_kernel_sums_in_registers_and_writes_once() -> None:
    kernel = convolution(6, features=0, degree=1)
    compile(kernel.source, "kernel", "exec")
    checks = FileCheck().check(f"def {kernel.name}(x, y, radial, species, coefficients, sender, order, out, size):")
    checks.check("go1_2 = tl.zeros([8], tl.float32)").check("for a in range(").check("row += tl.load(species + e)")
    checks.check("go0_0 +=").check("tl.store(on + 0 + c6, go0_0, mask=c6 < 6)").run(kernel.source)
    assert "tl.atomic" not in kernel.source and kernel.source.count("tl.store") == 4


def test_a_gradient_computes_what_is_asked_for_alone() -> None:
    by_x, by_radial = (convolution(4, needs=needs).source for needs in ((True, False, False), (False, False, True)))
    assert "to_x + n" in by_x and "tl.sum" not in by_x and "to_y +" not in by_x
    assert "to_radial + e" in by_radial and "to_x +" not in by_radial and by_radial.count("tl.sum") == 1


def test_a_long_contraction_is_several_kernels_that_read_every_term_once() -> None:
    kernel = ContractionKernel(CONTRACTIONS["parts"], 5, "float32", gradient=True)
    parts = TritonContraction.parts(kernel)
    assert len(parts) == -(-len(kernel.contraction.terms) // MOST_TERMS) > 1 and len({p.name for p in parts}) > 1
    reads = [int(at) for p in parts for at in re.findall(r"terms_n \+ (\d+)", p.source)]
    assert sorted(reads) == list(range(len(kernel.contraction.terms)))
    names = [[a.name for a in part.arguments] for part in parts]
    assert "before" not in names[0] and all("before" in found for found in names[1:])
    assert all(part.source.count("tl.store") == kernel.contraction.variables for part in parts)


def test_harmonics_are_straight_code_without_loops_or_reads_of_coefficients() -> None:
    source = harmonics("float32", gradient=False).source
    assert source.count("tl.load") == 3 and source.count("tl.store") == 16 and "for " not in source
    checks = FileCheck().check("def polynomial_").check("BLOCK: tl.constexpr").check("mask=r < rows")
    checks.check("tl.store(result + 0 + r * 16, tl.full([BLOCK], 1.0, tl.float32), mask=r < rows)").run(source)


def test_a_linear_map_never_rounds_to_fewer_bits() -> None:
    printed = TritonLinear(LinearKernel(linear("8x0e+4x1o", "3x1o+5x2e"), torch.float32, "out"))
    assert printed.source.count("tl.dot") == printed.source.count('input_precision="ieee"') == 1
    assert printed.source.count("tl.store") == 2  # 5x2e, to which nothing leads, is zero


@pytest.mark.parametrize("narrow", [False, True])
def test_packed_weights_are_the_blocks_with_their_coefficients(narrow: bool) -> None:
    printed = TritonLinear(LinearKernel(linear("2x0e+3x0e", "4x0e"), torch.float32, "x" if narrow else "out"))
    weight = torch.arange(20.0)
    wanted = 0.1 * weight.view(5, 4)  # the coefficient of the report's maps
    parts, count = printed.parts
    assert count == 20
    found = printed.pack(weight).flatten()
    if narrow:
        wanted = torch.cat([wanted[:2].t().flatten(), wanted[2:].t().flatten()])
    assert [p.weights for p in parts] == ([0, 8] if narrow else [0])
    torch.testing.assert_close(found, wanted.flatten())


def test_kernels_share_a_name_only_if_they_are_the_same() -> None:
    kernels = [named.printed for named in everything()]
    kernels += [convolution(4), convolution(4, needs=ALL), convolution(8), convolution(4, cells=400)]
    by_name = {kernel.name: kernel.source for kernel in kernels}
    assert len(by_name) == len({kernel.source for kernel in kernels}) == len(kernels)
    assert convolution(4).name in by_name
    for source in by_name.values():
        compile(source, "kernel", "exec")


def test_printing_needs_no_triton_and_launching_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    kernel = convolution(4)
    assert kernel.source
    with pytest.raises(MissingExtraError, match=r"pip install \"fxpass\[triton\]\""):
        bind(kernel)


def test_warps_are_those_that_a_block_fills() -> None:
    assert [[c.warps for c in by_width(width, 1)] for width in (1, 32, 64, 512)] == [[1], [1], [2, 1], [8, 1, 2, 4]]
    assert [by_width(width, 2)[0].warps for width in (32, 64, 256, 1024)] == [1, 1, 4, 8]


# --- how a kernel is launched


DEVICE = Device("A Device 80GB", 10)
MANY = ENOUGH * DEVICE.processors


class Measured:
    """A clock that lets the last configuration win, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: Callable[[], None]) -> float:
        call()
        self.calls += 1
        return 1.0 / self.calls


def choose(tuner: Tuner, programs: int = MANY, printed: TritonKernel | None = None) -> tuple[Config, list[Config]]:
    """What is chosen, and what was started for it."""
    started: list[Config] = []
    kernel = printed or harmonics("float32", gradient=False)
    return tuner.choose(kernel, torch.device("cpu"), programs, started.append), started


def tuner(folder: Path) -> tuple[Tuner, Measured]:
    clock = Measured()
    return Tuner(folder, clock, lambda device: DEVICE), clock


def test_the_fastest_configuration_is_chosen_once_and_kept_by_device(tmp_path: Path) -> None:
    configs = harmonics("float32", gradient=False).configs
    first, clock = tuner(tmp_path)
    assert choose(first) == (configs[-1], list(configs)) and clock.calls == len(configs)
    assert choose(first) == (configs[-1], [])
    (file,) = tmp_path.iterdir()
    assert file.name == "triton-A-Device-80GB.json"
    again, clock = tuner(tmp_path)
    assert choose(again, programs=1) == (configs[-1], []) and clock.calls == 0
    choose(again, printed=harmonics("float64", gradient=False))
    assert len(json.loads(file.read_text())) == 2
    elsewhere = Tuner(tmp_path, Measured(), lambda device: Device("Another", 10))
    assert choose(elsewhere)[1] == list(configs)


def test_a_call_that_leaves_the_device_idle_decides_nothing(tmp_path: Path) -> None:
    found, _ = tuner(tmp_path)
    configs = harmonics("float32", gradient=False).configs
    assert choose(found, programs=MANY - 1) == (configs[0], []) and not list(tmp_path.iterdir())
    assert choose(found) == (configs[-1], list(configs))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"NAME": {"config": {"warps": 3}}}', '{"NAME": {}}'])
def test_a_file_that_makes_no_sense_is_measured_anew(text: str, tmp_path: Path) -> None:
    name = harmonics("float32", gradient=False).name
    (tmp_path / "triton-A-Device-80GB.json").write_text(text.replace("NAME", name))
    found, clock = tuner(tmp_path)
    configs = harmonics("float32", gradient=False).configs
    assert choose(found)[0] == configs[-1] and clock.calls == len(configs)
    assert choose(tuner(tmp_path)[0]) == (configs[-1], [])


def test_a_folder_that_cannot_be_written_to_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found, _ = tuner(tmp_path / "file" / "below")
    assert choose(found)[1] and choose(found)[1] == []


@pytest.mark.triton
def test_a_configuration_that_the_device_has_no_room_for_is_passed_over(tmp_path: Path) -> None:
    from triton.runtime.errors import OutOfResources

    configs = harmonics("float32", gradient=False).configs

    def measure(call: Callable[[], None]) -> float:
        measure.calls += 1  # type: ignore[attr-defined]
        if measure.calls > 2:  # type: ignore[attr-defined]
            raise OutOfResources(2, 1, "shared memory")
        return 1.0 / measure.calls  # type: ignore[attr-defined]

    measure.calls = 0  # type: ignore[attr-defined]
    assert choose(Tuner(tmp_path, measure, lambda device: DEVICE))[0] == configs[1]


# --- what it computes


@cache
def interpreted() -> dict[str, list[float]]:
    """Errors of all cases, from one process in which Triton interprets."""
    script = Path(__file__).parent / "triton_interpreter.py"
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script), "cpu"], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


@pytest.mark.triton
def test_the_interpreter_agrees_with_the_ops() -> None:
    wrong = {str(case): interpreted()[str(case)] for case in cases() if not right(case, interpreted()[str(case)])}
    assert cases() and not wrong, "\n".join(f"{name}: {errors}" for name, errors in wrong.items())


def right(case: Case, errors: list[float]) -> bool:
    return bool(errors) and max(errors) <= ROUNDING[case.dtype]


# --- what it takes of a GPU that need not be there


@cache
def recorded() -> dict[str, tuple[int, list[Resources]]]:
    """The table of docs/triton.md: lines of each kernel, and what it takes of each capability, all spills as stores."""
    text = PAGE.read_text(encoding="utf-8").split(MARKS[0])[1].split(MARKS[1])[0]
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 3 and cells[1].isdigit():
            numbers = list(map(int, cells[3:]))
            triples = [numbers[k : k + 3] for k in range(0, len(numbers), 3)]
            found[cells[0]] = int(cells[1]), [Resources(r, spills, 0, shared) for r, spills, shared in triples]
    return found


def test_the_recorded_table_is_of_the_kernels_that_are_printed() -> None:
    """``python -m fxpass.kernels.triton_report --write docs/triton.md`` makes it."""
    assert recorded().keys() == {named.what for named in everything()}
    for named in everything():
        lines, found = recorded()[named.what]
        # the last bits of coupling coefficients decide which of them are one value
        assert named.printed.source.count("\n") == pytest.approx(lines, rel=0.03) and len(found) == len(CAPABILITIES)


def test_nothing_of_the_recorded_table_spills_in_float32() -> None:
    for what, (_, found) in recorded().items():
        assert what.endswith("float64") or not any(r.spill_stores for r in found), what


COMPILED = [named for named in everything() if named.printed.storage == "float32"]


@pytest.mark.triton
@pytest.mark.parametrize("named", COMPILED, ids=[named.what for named in COMPILED])
def test_a_kernel_takes_no_more_than_is_recorded(named: Named) -> None:
    """64x0e+64x1o, l_max 3: the registers that are left decide how many atoms run at once."""
    at = len(named.what) % len(CAPABILITIES)  # each kernel for one of them: half the time
    found, bound = resources(named.printed, CAPABILITIES[at], without=named.without), recorded()[named.what][1][at]
    assert found.spill_stores + found.spill_loads <= bound.spill_stores
    assert found.registers <= bound.registers + 8 and found.shared <= bound.shared


@pytest.mark.triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kind_of_weights_compiles(capability: int) -> None:
    tp = tensor_product(20, features=0)
    for kernel, without in (
        (TritonConvolution(ConvolutionKernel(tp, None, "float32", ALL)), ("species", "coefficients")),
        (TritonConvolution(ConvolutionKernel(tp, None, "float32"), narrow=True), ("species", "coefficients")),
        (TritonConvolution(ConvolutionKernel(tp, Grid(3, 0.0, 5.0, 100, coarse=4), "float32", ALL)), ()),
        (TritonConvolution(ConvolutionKernel(tp, Grid(5, 0.0, 5.0, 100), "float64")), ()),
    ):
        found = resources(kernel, capability, without=without)
        assert found.spill_stores == found.spill_loads == 0 and found.registers <= 128


@pytest.mark.triton
def test_every_configuration_of_a_linear_map_compiles() -> None:
    printed = TritonLinear(LinearKernel(linear("8x0e+4x1o", "3x1o+5x2e"), torch.float32, "out"))
    for config in printed.configs:
        found = resources(printed, 80, config=config)
        assert found.spill_stores == 0 and found.shared <= 160 * 1024


def test_the_report_writes_its_table_between_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}old\n{MARKS[1]}after\n")
    named = COMPILED[0]
    line = row(named, [Resources(40, 4, 8, 16), Resources(48, 0, 0, 16)])
    monkeypatch.setattr("fxpass.kernels.triton_report.table", lambda: line)
    assert main(["--write", str(page)]) == 0
    assert page.read_text() == f"before\n{MARKS[0]}{line}{MARKS[1]}after\n"
    lines = named.printed.source.count("\n")
    assert line == f"| {named.what} | {lines} | 2 | 40 | 12 | 16 | 48 | 0 | 16 |\n"


def test_the_contraction_of_the_report_is_equivariant() -> None:
    """Its terms are those that MACE has for the same irreps: 94 to a scalar of at most three factors."""
    assert len(symmetric_contraction(0).terms) == 94
    assert symmetric_contraction(1).irreps_out == "1x0e+1x1o" and len(symmetric_contraction(1).terms) > 3 * 94
