"""Generated convolutions against the op's reference."""

from __future__ import annotations

from itertools import product
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpass.algebra.multilinear import Path, TensorProduct
from fxpass.algebra.piecewise import Grid
from fxpass.errors import KernelError
from fxpass.ir.convolution import convolution, convolution_gradient, rows_by
from fxpass.kernels.build import build, find_compiler
from fxpass.kernels.convolution import DTYPES, ConvolutionKernel, pack
from fxpass.kernels.lanes import Lanes, cpp
from fxpass.kernels.rows import RowsKernel

pytestmark = pytest.mark.once

GRIDS = {
    "order 5": Grid.fitted(5, 0.3, 3.0, 0.21),
    "order 3, flat": Grid(3, 0.25, 3.0, 11, flat=True),
    "coarse": Grid(5, 0.0, 1.5, 6, coarse=2),
}


def product_of(first: int, second: int) -> TensorProduct:
    """Two channel counts, a result segment with two paths, a path without weights, degrees up to 3."""
    paths = (
        Path(0, 0, 0, "uvu", 0, 1.0),
        Path(0, 3, 1, "uvu", first, 0.7),
        Path(2, 1, 2, "uvu", 2 * first, 1.1),
        Path(1, 1, 0, "uvu", 2 * first + second, 0.3),
        Path(1, 2, 3, "uvuv", -1, 0.5),
        Path(2, 2, 4, "uvu", 3 * first + second, -0.9),
    )
    irreps = f"{first}x0e+{first}x1o+{second}x2e"
    out = f"{first}x0e+{first}x3o+{second}x1o+{first}x1o+{second}x2e"
    return TensorProduct(irreps, "1x0e+1x1o+1x2e+1x3o", out, paths, 3 * first + 2 * second, False)


def inputs(tp: TensorProduct, grid: Grid | None, dtype: torch.dtype, edges: int, atoms: int, tables: int) -> list[Any]:
    generator = torch.Generator().manual_seed(edges + atoms)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    size = max(atoms - 1, 1)  # the results have rows of their own
    sender = torch.randint(0, atoms, (edges,), generator=generator)
    receiver = torch.randint(0, size, (edges,), generator=generator)
    x, y, g = random(atoms, tp.dims["x1"]), random(edges, tp.dims["x2"]), random(size, tp.dims["out"])
    radial, species, stored = random(edges, tp.weights), None, None
    if grid is not None:
        radial = torch.linspace(-0.2, 1.1 * grid.last, edges, dtype=torch.float64)
        stored = random(grid.order + 1, grid.rows * tables, tp.weights)
        species = torch.randint(0, tables, (edges,), generator=generator) if tables > 1 else None
    return [x.to(dtype), y.to(dtype), g.to(dtype), radial.to(dtype), species, stored, sender, receiver, size]


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=(3e-6 if dtype is torch.float32 else 2e-14) * scale)


def compare(tp: TensorProduct, grid: Grid | None, dtype: torch.dtype, folder: File, tables: int = 1) -> None:
    compiler = find_compiler()
    assert compiler is not None, "no C++ compiler was found"
    needs = [n for n in product([False, True], repeat=3) if any(n)] if grid is not GRIDS["coarse"] else [(True,) * 3]
    kernels = [ConvolutionKernel(tp, grid, DTYPES[dtype], n, tables) for n in [(False,) * 3, *needs]]
    libraries = build({k.name: k.source for k in kernels}, compiler, folder)
    forward, *gradients = [k.bind(libraries[k.name]) for k in kernels]
    spec, text = str(tp), "" if grid is None else str(grid)
    for edges, atoms in [(37, 9), (0, 4), (5, 1), (0, 1)]:
        x, y, g, radial, species, stored, sender, receiver, size = inputs(tp, grid, dtype, edges, atoms, tables)
        packed = None if stored is None else pack(stored, dtype)
        order = rows_by(receiver, size)
        expected = convolution(x, y, radial, species, stored, sender, receiver, order, size, spec, text)
        agree(forward(x, y, radial, species, packed, sender, receiver, order, size), expected, dtype)
        order = rows_by(sender, atoms)
        for asked, gradient in zip(needs, gradients, strict=True):
            right = convolution_gradient(
                x, y, g, radial, species, stored, sender, receiver, order, spec, text, list(asked)
            )
            found = gradient(x, y, g, radial, species, packed, sender, receiver, order)
            for a, b in zip(found, right, strict=True):
                assert a.shape == b.shape
                agree(a, b, dtype)


@pytest.mark.parametrize("channels", [(1, 3), (8, 5), (16, 24)])
def test_given_weights(channels: tuple[int, int], tmp_path: File) -> None:
    compare(product_of(*channels), None, torch.float64, tmp_path)


@pytest.mark.parametrize("name", GRIDS)
def test_tables(name: str, tmp_path: File) -> None:
    compare(product_of(6, 3), GRIDS[name], torch.float64, tmp_path)


def test_a_table_for_each_species(tmp_path: File) -> None:
    compare(product_of(4, 9), GRIDS["order 5"], torch.float32, tmp_path, tables=3)


def test_a_table_that_there_is_not_is_refused(tmp_path: File) -> None:
    tp, grid, compiler = product_of(4, 9), GRIDS["order 5"], find_compiler()
    assert compiler is not None
    kernels = [ConvolutionKernel(tp, grid, "float64", n, 3) for n in ((False,) * 3, (True,) * 3)]
    libraries = build({k.name: k.source for k in kernels}, compiler, tmp_path)
    forward, gradient = (k.bind(libraries[k.name]) for k in kernels)
    x, y, g, radial, species, stored, sender, receiver, size = inputs(tp, grid, torch.float64, 37, 9, 3)
    packed = pack(stored, torch.float64)
    for wrong in (3, -1, 10**7):
        species[20] = wrong
        with pytest.raises(KernelError, match="table"):
            forward(x, y, radial, species, packed, sender, receiver, rows_by(receiver, size), size)
        with pytest.raises(KernelError, match="table"):
            gradient(x, y, g, radial, species, packed, sender, receiver, rows_by(sender, 9))


@pytest.mark.parametrize("name", [None, "order 5"])
def test_bfloat16_features_and_tables_are_computed_with_in_float32(name: str | None, tmp_path: File) -> None:
    tp, grid, compiler = product_of(6, 11), GRIDS[name] if name else None, find_compiler()
    assert compiler is not None
    kernels = [ConvolutionKernel(tp, grid, "bfloat16", needs, 2) for needs in ((False,) * 3, (True,) * 3)]
    libraries = build({k.name: k.source for k in kernels}, compiler, tmp_path)
    forward, gradient = [k.bind(libraries[k.name]) for k in kernels]
    for edges, atoms in [(37, 9), (0, 4), (5, 1)]:
        x, y, g, radial, species, stored, sender, receiver, size = inputs(tp, grid, torch.float64, edges, atoms, 2)
        x, g = x.bfloat16(), g.bfloat16()
        y, radial = y.float(), radial.float()
        packed = None if stored is None else pack(stored, torch.bfloat16)
        found = [forward(x, y, radial, species, packed, sender, receiver, rows_by(receiver, size), size)]
        found += gradient(x, y, g, radial, species, packed, sender, receiver, rows_by(sender, atoms))
        exact = [radial.double(), species, None if stored is None else stored.bfloat16().double(), sender, receiver]
        texts = str(tp), "" if grid is None else str(grid)
        at = x.double(), y.double()
        expected = [convolution(*at, *exact, rows_by(receiver, size), size, *texts)]
        expected += convolution_gradient(*at, g.double(), *exact, rows_by(sender, atoms), *texts, [True] * 3)
        for value, right in zip(found, expected, strict=True):
            narrow = value.dtype is torch.bfloat16
            scale = max(right.abs().max().item(), 1.0) if right.numel() else 1.0
            torch.testing.assert_close(value.double(), right, rtol=2**-8 if narrow else 0.0, atol=3e-6 * scale)
        assert [value.dtype for value in found] == 2 * [torch.bfloat16] + 2 * [torch.float32]


def test_bfloat16_rounds_as_torch_does(tmp_path: File) -> None:
    """A convolution with one edge of weight 1 between scalars copies x times y, rounded once."""
    compiler, tp = find_compiler(), TensorProduct("1x0e", "1x0e", "1x0e", (Path(0, 0, 0, "uvu", -1, 1.0),), 0, False)
    assert compiler is not None
    kernel = ConvolutionKernel(tp, None, "bfloat16")
    forward = kernel.bind(build({kernel.name: kernel.source}, compiler, tmp_path)[kernel.name])
    y = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1.0039, -3.1416, 3e38, 3.4e38, 1e-40, torch.inf, torch.nan])
    one = torch.arange(len(y))
    x, order = torch.ones(len(y), 1, dtype=torch.bfloat16), rows_by(one, len(y))
    found = forward(x, y[:, None], y[:, None][:, :0], None, None, one, one, order, len(y))
    torch.testing.assert_close(found[:, 0], y.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_two_threads_write_what_one_writes(tmp_path: File) -> None:
    tp, grid = product_of(8, 8), GRIDS["order 5"]
    compiler = find_compiler()
    assert compiler is not None
    kernels = [ConvolutionKernel(tp, grid, "float64", needs) for needs in ((False,) * 3, (True,) * 3)]
    libraries = build({k.name: k.source for k in kernels}, compiler, tmp_path)
    forward, gradient = [k.bind(libraries[k.name]) for k in kernels]
    x, y, g, radial, _, stored, sender, receiver, size = inputs(tp, grid, torch.float64, 500, 40, 1)
    x, sender = x[:size], sender % size
    packed, before = pack(stored, torch.float64), torch.get_num_threads()

    def run() -> list[Tensor]:
        out = forward(x, y, radial, None, packed, sender, receiver, rows_by(receiver, size), size)
        return [out, *gradient(x, y, g, radial, None, packed, sender, receiver, rows_by(sender, size))]

    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(2)
        both = run()
        assert all(torch.equal(a, b) for a, b in zip(both, run(), strict=True))
        by_x = both.pop(1), alone.pop(1)  # of which each thread adds up its own part
        assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
        agree(*by_x, torch.float64)
    finally:
        torch.set_num_threads(before)


def test_a_distance_that_is_no_number_gives_none(tmp_path: File) -> None:
    tp, grid = product_of(2, 2), GRIDS["order 3, flat"]
    compiler = find_compiler()
    assert compiler is not None
    kernel = ConvolutionKernel(tp, grid, "float64")
    forward = kernel.bind(build({kernel.name: kernel.source}, compiler, tmp_path)[kernel.name])
    x, y, _, radial, _, stored, sender, receiver, size = inputs(tp, grid, torch.float64, 6, 3, 1)
    radial[2] = torch.nan
    out = forward(
        x, y, radial, None, pack(stored, torch.float64), sender, receiver, rows_by(receiver, size), size
    )
    assert out[receiver[2]].isnan().any() and out[1 - receiver[2]].isfinite().all()


def test_an_edge_of_no_atom_is_refused(tmp_path: File) -> None:
    tp, compiler = product_of(2, 2), find_compiler()
    assert compiler is not None
    kernels = [ConvolutionKernel(tp, None, "float64", needs) for needs in ((False,) * 3, (True,) * 3)]
    libraries = build({k.name: k.source for k in kernels}, compiler, tmp_path)
    forward, gradient = [k.bind(libraries[k.name]) for k in kernels]
    x, y, g, radial, _, _, sender, receiver, size = inputs(tp, None, torch.float64, 6, 3, 1)
    with pytest.raises(KernelError, match="names an atom"):
        forward(x, y, radial, None, None, sender + 3, receiver, rows_by(receiver, size), size)
    with pytest.raises(KernelError, match="names an atom"):
        gradient(x, y, g, radial, None, None, sender, receiver - 5, rows_by(sender, 3))


def test_names_follow_the_source() -> None:
    one, same = (ConvolutionKernel(product_of(4, 4), GRIDS["order 5"], "float32") for _ in range(2))
    other = ConvolutionKernel(product_of(4, 4), GRIDS["order 5"], "float64")
    assert one.name == same.name != other.name
    assert one.source == same.source and one.name in one.source


@pytest.mark.parametrize(("count", "size"), [(50, 7), (0, 3), (4, 1)])
def test_rows(count: int, size: int, tmp_path: File) -> None:
    compiler, kernel = find_compiler(), RowsKernel()
    assert compiler is not None
    run = kernel.bind(build({kernel.name: kernel.source}, compiler, tmp_path)[kernel.name])
    index = torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(index, size), rows_by(index, size))
    if count:
        with pytest.raises(KernelError, match="not below"):
            run(index + size, size)


# --- programs over lanes


def test_equal_values_are_one_value_and_zeros_vanish() -> None:
    lanes = Lanes()
    x, zero, one = lanes.load("x", 0), lanes.constant(0.0), lanes.constant(1.0)
    assert lanes.mul(x, one) == lanes.add(x, zero) == lanes.fma(x, one, zero) == lanes.load("x", 0) == x
    assert lanes.mul(x, zero) == zero and lanes.fma(zero, x, x) == x
    assert lanes.add(x, one) == lanes.add(one, x)
    lanes.accumulate("out", 0, zero)
    assert list(lanes.live()) == []


def test_what_nothing_needs_is_not_printed_and_uniform_values_go_in_front() -> None:
    lanes = Lanes()
    x, m = lanes.load("x", 1), lanes.mul(lanes.scalar("m", 3), lanes.constant(2.0))
    lanes.mul(x, x)
    lanes.store("out", 0, lanes.fma(m, x, lanes.load("x", 0)))
    arrays = {"x": "x + {row} * 8 + c", "m": "m + {row}", "out": "out + c"}
    front, inside = cpp(lanes, arrays, uniform=True), cpp(lanes, arrays, uniform=False)
    assert len(front) == 3 and "m + 3" in front[0] and "T(2.0)" in front[1]
    assert len(inside) == 4 and inside[-1].startswith("*(V*)(out + c) = ")
    assert sorted(cpp(lanes, arrays)) == sorted(front + inside)
    assert lanes.flops == 2
