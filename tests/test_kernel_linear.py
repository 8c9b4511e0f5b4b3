"""Kernels of linear maps against the references of the ops."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from fxpass.algebra.irreps import segments
from fxpass.algebra.multilinear import Linear, LinearPath, TensorProduct
from fxpass.algebra.multilinear import Path as ProductPath
from fxpass.errors import KernelError
from fxpass.ir import reference
from fxpass.kernels.build import build, find_compiler
from fxpass.kernels.linear import BoundKernel, LinearKernel, ScalarProductKernel

pytestmark = pytest.mark.once

ROWS = (0, 1, 2, 7, 108)
#: largest error relative to the largest element
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler on PATH"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def bound(kernel: LinearKernel | ScalarProductKernel, folder: Path) -> BoundKernel:
    compiler = find_compiler(folder=folder)
    assert compiler is not None
    return kernel.bind(build({kernel.name: kernel.source}, compiler, folder)[kernel.name])


def linear(irreps_in: str, irreps_out: str, gap: int = 0) -> Linear:
    """All paths between segments of equal irreps, with different coefficients, and ``gap`` weights unused between."""
    paths, at = [], 0
    for i, (_, m, *kind) in enumerate(segments(irreps_in)):
        for o, (_, n, *other) in enumerate(segments(irreps_out)):
            if kind == other:
                paths.append(LinearPath(i, o, at, 0.7 - 0.3 * len(paths)))
                at += m * n + gap
    return Linear(irreps_in, irreps_out, tuple(paths), at, shared=True)


def product(irreps1: str, scalars: str, irreps_out: str) -> TensorProduct:
    paths, at = [], 0
    for i, (_, m, *kind) in enumerate(segments(irreps1)):
        for j, (_, v, *_) in enumerate(segments(scalars)):
            for o, (_, n, *other) in enumerate(segments(irreps_out)):
                if kind == other:
                    paths.append(ProductPath(i, j, o, "uvw", at, 0.7 - 0.3 * len(paths)))
                    at += m * v * n
    return TensorProduct(irreps1, scalars, irreps_out, tuple(paths), at, shared=True)


def compare(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    scale = wanted.abs().max().item() if wanted.numel() else 1.0
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[got.dtype] * max(scale, 1e-30))


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


MAPS = {
    "square": linear("64x0e+64x1o", "64x0e+64x1o"),
    "merging": linear("16x0e+8x0e+16x1o+3x1o+16x2e+16x3o", "16x0e+16x1o+24x2e+16x3o"),
    "odd": linear("5x0e+3x1o+7x2e+1x3o", "19x0e+33x1o+1x2e+5x3o", gap=3),
    "readout": linear("64x0e+32x1o", "1x0e"),
    "unconnected": linear("4x0e+4x1e", "4x1o+6x0e+3x1e"),
    "nothing": linear("4x0e", "4x1o"),
    "large": linear("2x5e", "3x5e"),
    "parities": linear("4x0e+4x0o+4x1o+4x1e", "4x1e+4x0o+4x0e"),
}


@needs_compiler
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear(name: str, dtype: torch.dtype, folder: Path) -> None:
    lin = MAPS[name]
    weight = numbers(lin.weights, dtype=dtype)
    sides: tuple[tuple[Literal["out", "x"], str], ...] = (("out", "x"), ("x", "out"))
    for wrt, given in sides:
        kernel = bound(LinearKernel(lin, dtype, wrt), folder)
        packed = kernel.pack(weight)
        for rows in ROWS:
            x = numbers(rows, lin.dims[given], dtype=dtype)
            operands = (x, weight, None) if wrt == "out" else (None, weight, x)
            compare(kernel(x, packed), reference.linear(*operands, str(lin), wrt))


@needs_compiler
def test_paths_that_share_weights_or_ends_add_up(folder: Path) -> None:
    paths = (LinearPath(0, 0, 0, 1.0), LinearPath(0, 0, 6, -0.5), LinearPath(1, 0, 0, 2.0), LinearPath(1, 1, 0, 0.25))
    lin = Linear("2x1o+2x1o", "3x1o+3x1o", paths, 12, shared=True)
    weight, x = numbers(12), numbers(9, 12)
    kernel = bound(LinearKernel(lin, torch.float64, "out"), folder)
    compare(kernel(x, kernel.pack(weight)), reference.linear(x, weight, None, str(lin), "out"))
    kernel = bound(LinearKernel(lin, torch.float64, "x"), folder)
    out = numbers(9, 18)
    compare(kernel(out, kernel.pack(weight)), reference.linear(None, weight, out, str(lin), "x"))


PRODUCTS = {
    "mace": product("64x0e+64x1o", "5x0e", "64x0e"),
    "components": product("6x0e+6x1o+5x2e+3x3o", "3x0e", "9x0e+17x1o+6x2e+3x3o"),
    "scalars": product("4x0e+4x1o", "2x0e+3x0e", "4x0e+4x1o"),
}


def scalars_of(kind: str, rows: int, count: int, dtype: torch.dtype) -> Tensor:
    if kind == "one-hot":
        return torch.nn.functional.one_hot(torch.arange(rows) * 7 % count, count).to(dtype)
    return numbers(rows, count, dtype=dtype) * (numbers(rows, count) > -0.5)


@needs_compiler
@pytest.mark.parametrize("kind", ["one-hot", "mixed"])
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_product_with_scalars(name: str, kind: str, dtype: torch.dtype, folder: Path) -> None:
    tp = PRODUCTS[name]
    weight = numbers(tp.weights, dtype=dtype)
    sides: tuple[tuple[Literal["out", "x1"], str], ...] = (("out", "x1"), ("x1", "out"))
    for wrt, given in sides:
        kernel = bound(ScalarProductKernel(tp, dtype, wrt), folder)
        packed = kernel.pack(weight)
        for rows in ROWS:
            x, x2 = numbers(rows, tp.dims[given], dtype=dtype), scalars_of(kind, rows, tp.dims["x2"], dtype)
            operands = (x, x2, weight, None) if wrt == "out" else (None, x2, weight, x)
            compare(kernel(x, packed, x2), reference.tensor_product(*operands, str(tp), wrt))


@needs_compiler
def test_threads_change_no_bit(folder: Path) -> None:
    lin = MAPS["merging"]
    kernel = bound(LinearKernel(lin, torch.float32, "out"), folder)
    packed, x = kernel.pack(numbers(lin.weights).float()), numbers(53, lin.dims["x"]).float()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(kernel(x, packed))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


@needs_compiler
def test_numbers_that_are_no_numbers_stay_in_their_row(folder: Path) -> None:
    lin = MAPS["square"]
    kernel = bound(LinearKernel(lin, torch.float32, "out"), folder)
    x = numbers(8, lin.dims["x"]).float()
    x[3] = float("nan")
    y = kernel(x, kernel.pack(numbers(lin.weights).float()))
    assert y[3].isnan().all() and y[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@needs_compiler
def test_operands_need_not_be_contiguous(folder: Path) -> None:
    lin = MAPS["merging"]
    kernel = bound(LinearKernel(lin, torch.float64, "out"), folder)
    weight, x = numbers(2, lin.weights)[0], numbers(2 * lin.dims["x"], 14)[::2, ::2].T
    compare(kernel(x, kernel.pack(weight)), reference.linear(x.contiguous(), weight, None, str(lin), "out"))


@needs_compiler
def test_operands_that_a_kernel_cannot_read_are_refused(folder: Path) -> None:
    lin, tp = MAPS["readout"], PRODUCTS["scalars"]
    kernel = bound(LinearKernel(lin, torch.float32, "out"), folder)
    packed = kernel.pack(numbers(lin.weights).float())
    x = numbers(4, lin.dims["x"]).float()
    with pytest.raises(KernelError, match=r"takes torch.float32 \[rows, 160\] on cpu.* given torch.float64 \[4, 160\]"):
        kernel(x.double(), packed)
    with pytest.raises(KernelError, match=r"given torch.float32 \[4, 159\]"):
        kernel(x[:, 1:], packed)
    with pytest.raises(KernelError, match=r"takes torch.float32 \[64\].* given torch.float32 \[63\]"):
        kernel.pack(torch.zeros(63))
    with pytest.raises(KernelError, match="0 scalars"):
        kernel(x, packed, torch.zeros(4, 0))
    both = bound(ScalarProductKernel(tp, torch.float32, "out"), folder)
    packed = both.pack(numbers(tp.weights).float())
    with pytest.raises(KernelError, match="5 scalars for each"):
        both(torch.zeros(4, tp.dims["x1"]), packed)
    with pytest.raises(KernelError, match="maps 4 rows"):
        both(torch.zeros(4, tp.dims["x1"]), packed, torch.zeros(3, 5))


def test_maps_without_a_kernel_are_refused() -> None:
    lin, tp = MAPS["square"], PRODUCTS["mace"]
    with pytest.raises(KernelError, match="one vector per row"):
        LinearKernel(replace(lin, shared=False), torch.float32, "out")
    with pytest.raises(KernelError, match="bfloat16"):
        LinearKernel(lin, torch.bfloat16, "out")
    with pytest.raises(KernelError, match="weights that all rows share"):
        ScalarProductKernel(replace(tp, shared=False), torch.float32, "out")
    with pytest.raises(KernelError, match="paths uvw"):
        uvu = replace(tp, paths=(ProductPath(0, 0, 0, "uvu", 0, 1.0),))
        ScalarProductKernel(uvu, torch.float32, "out")
    with pytest.raises(KernelError, match="not 5x1o"):
        ScalarProductKernel(replace(tp, irreps2="5x1o"), torch.float32, "out")


def test_a_name_says_what_the_kernel_holds() -> None:
    lin = MAPS["square"]
    kernel = LinearKernel(lin, torch.float32, "out")
    others = [
        LinearKernel(lin, torch.float64, "out"),
        LinearKernel(lin, torch.float32, "x"),
        LinearKernel(replace(lin, paths=lin.paths[:1]), torch.float32, "out"),
    ]
    assert kernel.name == LinearKernel(lin, torch.float32, "out").name and kernel.name.isidentifier()
    assert len({kernel.name, *(other.name for other in others)}) == 4
    assert len({kernel.source, *(other.source for other in others)}) == 4
    assert f'extern "C" void {kernel.name}(' in kernel.source
