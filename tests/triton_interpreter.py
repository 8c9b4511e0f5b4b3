"""Runs printed Triton kernels through Triton's interpreter and prints how far they are from the ops they stand for.

The interpreter has to be chosen before Triton is imported, so tests run this as a program of its own, with
``TRITON_INTERPRET=1``.  One JSON object: case -> the largest relative errors of its results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fxpass.algebra.multilinear import Path, TensorProduct
from fxpass.algebra.piecewise import Grid
from fxpass.ir.convolution import convolution, convolution_gradient, rows_by
from fxpass.kernels.convolution import FORWARD, ConvolutionKernel, pack
from fxpass.kernels.triton_launch import bind
from fxpass.kernels.triton_printer import TritonConvolution

DTYPES = {"float32": torch.float32, "float64": torch.float64}
GRIDS = {
    "weights": None,
    "table": Grid(5, 0.25, 3.0, 6),
    "flat": Grid(3, 0.5, 3.0, 5, flat=True),
    "coarse": Grid(5, 0.5, 2.0, 4, coarse=3),
}


def couplings(channels: int, other: int) -> TensorProduct:
    """Scalars and vectors of ``channels``, tensors of ``other`` channels; one path has no weight, two share theirs."""
    a, b = channels, other
    paths = (
        Path(0, 0, 0, "uvu", 0, 1.0),
        Path(0, 1, 1, "uvu", a, 0.7),
        Path(1, 0, 1, "uvuv", 2 * a, 1.1),
        Path(1, 1, 0, "uvu", 2 * a, 0.3),
        Path(1, 2, 1, "uvu", -1, 0.5),
        Path(2, 2, 2, "uvu", 3 * a + 1, 0.9),  # one weight in front of it belongs to nobody
    )
    irreps = f"{a}x0e+{a}x1o", f"{b}x2e"
    out = f"{irreps[0]}+{irreps[1]}+{b}x1e"  # nothing leads to the last
    return TensorProduct("+".join(irreps), "1x0e+1x1o+1x2e", out, paths, 3 * a + 1 + b, False)


@dataclass(frozen=True)
class Case:
    """One call: a product, its weights, a type, and sizes."""

    channels: int
    other: int
    weights: str
    species: bool
    dtype: str
    atoms: int
    size: int
    edges: int
    needs: tuple[bool, bool, bool] = FORWARD

    def __str__(self) -> str:
        wanted = "".join(name for name, need in zip("xyr", self.needs, strict=True) if need) or "forward"
        table = f"{self.weights}{' by species' if self.species else ''}"
        sizes = f"{self.atoms} atoms {self.size} rows {self.edges} edges"
        return f"{wanted} {self.channels}+{self.other} {table} {self.dtype} {sizes}"


def cases() -> Iterator[Case]:
    plain = Case(5, 3, "table", False, "float64", 4, 4, 9)
    for needs in product((False, True), repeat=3):
        yield replace(plain, needs=needs)
    for needs in (FORWARD, (True, True, True)):
        base = replace(plain, needs=needs)
        for sizes in ((1, 1, 0), (3, 3, 0), (1, 1, 4), (2, 5, 7), (5, 2, 7), (0, 0, 0)):
            yield replace(base, atoms=sizes[0], size=sizes[1], edges=sizes[2])
        for channels, other in ((1, 1), (8, 8), (16, 3), (7, 2)):
            yield replace(base, channels=channels, other=other)
        for weights, species, dtype in product(GRIDS, (False, True), DTYPES):
            if not (species and weights == "weights"):
                yield replace(base, weights=weights, species=species, dtype=dtype)


def error(case: Case) -> list[float]:
    """Of each result, relative to its largest element."""
    tp, grid, dtype = couplings(case.channels, case.other), GRIDS[case.weights], DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(case.edges + 10 * case.atoms)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    x, y, g = normal(case.atoms, tp.dims["x1"]), normal(case.edges, tp.dims["x2"]), normal(case.size, tp.dims["out"])
    sender, receiver = (torch.randint(max(n, 1), (case.edges,), generator=generator) for n in (case.atoms, case.size))
    species, coefficients, packed = None, None, None
    if grid is None:
        radial = normal(case.edges, tp.weights)
    else:
        radial = (4.0 * torch.rand(case.edges, dtype=torch.float64, generator=generator)).to(dtype)  # beyond both ends
        coefficients = normal(grid.order + 1, (1 + case.species) * grid.rows, tp.weights)
        packed = pack(coefficients, dtype)
        species = torch.randint(2, (case.edges,), generator=generator) if case.species else None
    kernel = bind(TritonConvolution(ConvolutionKernel(tp, grid, case.dtype, case.needs)))
    spec, text, found, expected = str(tp), "" if grid is None else str(grid), [], []
    if case.needs == FORWARD:
        order = rows_by(receiver, case.size)
        found = [kernel(x, y, radial, species, packed, sender, receiver, order, case.size)]
        expected = [
            convolution(x, y, radial, species, coefficients, sender, receiver, order, case.size, spec, text)
        ]
    else:
        order = rows_by(sender, case.atoms)
        found = kernel(x, y, g, radial, species, packed, sender, receiver, order)
        operands = (x, y, g, radial, species, coefficients, sender, receiver, order)
        expected = convolution_gradient(*operands, spec, text, list(case.needs))
    return [relative(a, b) for a, b in zip(found, expected, strict=True)]


def relative(found: Tensor, expected: Tensor) -> float:
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    scale = expected.abs().max().item() if expected.numel() else 0.0
    return (found - expected).abs().max().item() / (scale or 1.0) if expected.numel() else 0.0


def main() -> None:
    found: dict[str, Any] = {str(case): error(case) for case in cases()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
