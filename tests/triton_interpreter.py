"""Runs printed Triton kernels and prints how far they are from the ops they stand for, in float64.

    TRITON_INTERPRET=1 python tests/triton_interpreter.py cpu          through Triton's interpreter
    python tests/triton_interpreter.py cuda                            on the current GPU

The interpreter has to be chosen before Triton is imported, so tests run this as a program of its own.  One JSON object:
case -> the largest relative errors of its results.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations_with_replacement, product
from typing import Any, Protocol

import torch
from torch import Tensor

import fxpass
from fxpass.algebra.contraction import Contraction
from fxpass.algebra.irreps import segments
from fxpass.algebra.multilinear import Linear, LinearPath, Path, TensorProduct
from fxpass.algebra.piecewise import Grid
from fxpass.algebra.polynomial import Polynomial
from fxpass.algebra.spherical import spherical_harmonics
from fxpass.ir import ops, reference
from fxpass.ir.contraction import contraction, contraction_gradient
from fxpass.ir.convolution import convolution, convolution_gradient, rows_by
from fxpass.kernels.contraction import ContractionKernel
from fxpass.kernels.convolution import FORWARD, ConvolutionKernel, pack
from fxpass.kernels.linear import LinearKernel, ScalarProductKernel
from fxpass.kernels.polynomial import PolynomialKernel
from fxpass.kernels.triton_choice import choose, sorted_rows
from fxpass.kernels.triton_contraction import TritonContraction, one_after_another
from fxpass.kernels.triton_convolution import TritonConvolution
from fxpass.kernels.triton_launch import bind
from fxpass.kernels.triton_linear import TritonLinear
from fxpass.kernels.triton_polynomial import TritonPolynomial
from fxpass.models import Settings, build
from fxpass.targets.native import FUSED
from fxpass.targets.triton import OnDevice
from fxpass.testing import example_inputs

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
GRIDS = {
    "weights": None,
    "table": Grid(5, 0.25, 3.0, 6),
    "flat": Grid(3, 0.5, 3.0, 5, flat=True),
    "coarse": Grid(5, 0.5, 2.0, 4, coarse=3),
}


class Numbers:
    """Random operands on a device: of a narrow type for the kernel, and the same numbers in float64 for the op."""

    def __init__(self, dtype: str, device: str, seed: int) -> None:
        self.dtype, self.device = DTYPES[dtype], device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return self.rounded(torch.randn(*shape, dtype=torch.float64, generator=self.generator), self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Of a type that distances are kept in."""
        wide = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        return self.rounded(4.0 * torch.rand(*shape, dtype=torch.float64, generator=self.generator), wide)

    def index(self, below: int, *shape: int) -> Tensor:
        return torch.randint(max(below, 1), shape, generator=self.generator).to(self.device)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(self.device)


def exact(*tensors: Any) -> list[Any]:
    """The same numbers in float64."""
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


class Case(Protocol):
    """One call; its text names it."""

    dtype: str

    def errors(self, device: str) -> list[float]: ...


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
class ConvolutionCase:
    """A product, its weights, a type, and sizes."""

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
        return f"convolution {wanted} {self.channels}+{self.other} {table} {self.dtype} {sizes}"

    def errors(self, device: str) -> list[float]:
        tp, grid, dtype = couplings(self.channels, self.other), GRIDS[self.weights], self.dtype
        numbers = Numbers(dtype, device, self.edges + 10 * self.atoms)
        shapes = ((self.atoms, tp.dims["x1"]), (self.edges, tp.dims["x2"]), (self.size, tp.dims["out"]))
        x, y, g = (numbers.normal(*shape) for shape in shapes)
        sender, receiver = (numbers.index(n, self.edges) for n in (self.atoms, self.size))
        species, coefficients, packed = None, None, None
        if grid is None:
            radial = numbers.normal(self.edges, tp.weights)
        else:
            radial = numbers.uniform(self.edges)  # beyond both ends
            shape = (grid.order + 1, (1 + self.species) * grid.rows, tp.weights)
            coefficients = torch.randn(shape, dtype=torch.float64, generator=numbers.generator)
            coefficients = coefficients.to(radial.dtype).to(device)
            packed = pack(coefficients, radial.dtype)
            species = numbers.index(2, self.edges) if self.species else None
        narrow = dtype == "bfloat16"
        kernel = ConvolutionKernel(tp, grid, "float32" if narrow else dtype, self.needs)
        run = bind(TritonConvolution(kernel, narrow))
        spec, text = str(tp), "" if grid is None else str(grid)
        if self.needs == FORWARD:
            order = rows_by(receiver, self.size)
            found = [run(x, y, radial, species, packed, sender, receiver, order, self.size)]
            given = exact(x, y, radial, species, coefficients)
            expected = [convolution(*given, sender, receiver, order, self.size, spec, text)]
        else:
            order = rows_by(sender, self.atoms)
            found = run(x, y, g, radial, species, packed, sender, receiver, order)
            given = exact(x, y, g, radial, species, coefficients)
            expected = convolution_gradient(*given, sender, receiver, order, spec, text, list(self.needs))
        kinds = [x.dtype] if self.needs == FORWARD else [x.dtype, x.dtype, radial.dtype]
        return [relative(a, b, kind) for a, b, kind in zip(found, expected, kinds, strict=True)]


def convolutions() -> Iterator[ConvolutionCase]:
    plain = ConvolutionCase(5, 3, "table", False, "float64", 4, 4, 9)
    for needs in product((False, True), repeat=3):
        yield replace(plain, needs=needs)
    for needs in (FORWARD, (True, True, True)):
        base = replace(plain, needs=needs)
        for sizes in ((1, 1, 0), (3, 3, 0), (1, 1, 4), (2, 5, 7), (5, 2, 7), (0, 0, 0)):
            yield replace(base, atoms=sizes[0], size=sizes[1], edges=sizes[2])
        for channels, other in ((1, 1), (8, 8), (16, 3), (7, 2)):
            yield replace(base, channels=channels, other=other)
        for weights, species, dtype in product(GRIDS, (False, True), DTYPES):
            if not (species and weights == "weights") and not (dtype == "bfloat16" and weights in ("flat", "coarse")):
                yield replace(base, weights=weights, species=species, dtype=dtype)


def random_contraction(variables: int, degree: int, outputs: int, share: float, constant: bool = False) -> Contraction:
    """A random ``share`` of the pairs of a monomial up to ``degree`` and an output."""
    degrees = range(0 if constant else 1, degree + 1)
    names = list(chain.from_iterable(combinations_with_replacement(range(variables), d) for d in degrees))
    chosen = torch.rand(len(names), outputs, generator=torch.Generator().manual_seed(degree)) < share
    terms = [(m, k) for k in range(outputs) for n, m in enumerate(names) if chosen[n, k]]
    return Contraction(variables, tuple(terms), f"{variables}x0e", f"{outputs}x0e")


CONTRACTIONS = {
    "degree 1": random_contraction(4, 1, 2, share=1.0),
    "degree 3": random_contraction(4, 3, 3, share=0.5, constant=True),
    "parts": random_contraction(9, 3, 4, share=0.25),
    "constant": Contraction(2, (((), 1),), "2x0e", "2x0e"),
}


@dataclass(frozen=True)
class ContractionCase:
    """A contraction or its gradient."""

    which: str
    gradient: bool
    channels: int
    dtype: str
    atoms: int

    def __str__(self) -> str:
        op = "contraction gradient" if self.gradient else "contraction"
        return f"{op} {self.which} {self.channels} {self.dtype} {self.atoms} atoms"

    def errors(self, device: str) -> list[float]:
        found, numbers = CONTRACTIONS[self.which], Numbers(self.dtype, device, self.atoms)
        x, g = (numbers.normal(self.atoms, self.channels, n) for n in (found.variables, found.outputs))
        terms, index = numbers.normal(3, len(found.terms), self.channels), numbers.index(3, self.atoms)
        kernel = ContractionKernel(found, self.channels, self.dtype, self.gradient)
        run = one_after_another([bind(part) for part in TritonContraction.parts(kernel)])
        if self.gradient:
            return [relative(run(x, index, terms, g), contraction_gradient(*exact(x, index, terms, g), str(found)))]
        return [relative(run(x, index, terms), contraction(*exact(x, index, terms), str(found)))]


def contractions() -> Iterator[ContractionCase]:
    for gradient in (False, True):
        for which, dtype in product(CONTRACTIONS, ("float32", "float64")):
            yield ContractionCase(which, gradient, 5, dtype, 3)
        for channels, atoms in ((1, 1), (8, 2), (7, 0), (33, 1)):
            yield ContractionCase("degree 3", gradient, channels, "float64", atoms)


@dataclass(frozen=True)
class HarmonicsCase:
    """Y_lm up to a degree, or their gradient; or polynomials that are constant or zero."""

    highest: int
    gradient: bool
    dtype: str
    rows: int

    def __str__(self) -> str:
        op = "harmonics gradient" if self.gradient else "harmonics"
        return f"{op} {self.highest} {self.dtype} {self.rows} rows"

    def errors(self, device: str) -> list[float]:
        if self.highest < 0:
            poly, table = Polynomial(3, ((), (0,), (1, 2)), "3x0e", "3x0e"), torch.zeros(3, 3, dtype=torch.float64)
            table[0, 0], table[1, 2] = 0.3, -0.7
        else:
            poly, found = spherical_harmonics(tuple(range(self.highest + 1)), "component", -1)
            table = torch.tensor(found.tolist(), dtype=torch.float64)
        numbers = Numbers(self.dtype, device, self.rows)
        x, g = numbers.normal(self.rows, 1, 3), numbers.normal(self.rows, 1, table.shape[1])
        rows = tuple(map(tuple, table.tolist()))
        run = bind(TritonPolynomial(PolynomialKernel(poly, rows, self.dtype, self.gradient)))
        wrt = "direction" if self.gradient else "out"
        wide, by_out = exact(x, g if self.gradient else None)
        expected = reference.polynomial(wide, [], None, by_out, table.unsqueeze(1).to(device), str(poly), wrt)
        return [relative(run(x, g) if self.gradient else run(x), expected)]


def harmonics() -> Iterator[HarmonicsCase]:
    for gradient, dtype in product((False, True), ("float32", "float64")):
        for highest, rows in ((3, 5), (0, 1), (1, 0), (2, 128), (2, 129), (-1, 3)):
            yield HarmonicsCase(highest, gradient, dtype, rows)


@cache
def linear(irreps_in: str, irreps_out: str, gap: int = 0) -> Linear:
    """All blocks between segments of equal irreps, twice where ``gap`` is one, with a gap between their weights."""
    paths, at = [], 0
    for (i, (_, m, *kind)), (o, (_, n, *other)) in product(
        enumerate(segments(irreps_in)), enumerate(segments(irreps_out))
    ):
        if kind == other:
            for _ in range(1 + (gap == 1)):
                paths.append(LinearPath(i, o, at, 0.7 - 0.3 * len(paths)))
                at += m * n + gap
    return Linear(irreps_in, irreps_out, tuple(paths), at, shared=True)


LINEARS = {
    "square": linear("16x0e+16x1o", "16x0e+16x1o"),
    "odd": linear("5x0e+3x1o+7x2e+1x3o", "19x0e+33x1o+1x2e+5x3o", gap=3),
    "merging": linear("17x0e+4x0e+5x1o+3x1o", "4x0e+35x1o", gap=1),
    "unconnected": linear("4x0e+4x1e", "4x1o+6x0e+3x1e"),
}


@dataclass(frozen=True)
class LinearCase:
    """A linear map, shared or mixed by scalars that are one-hot or not, or its transpose."""

    which: str
    scalars: str
    back: bool
    dtype: str
    rows: int

    def __str__(self) -> str:
        op = "linear transposed" if self.back else "linear"
        return f"{op} {self.which} {self.scalars} {self.dtype} {self.rows} rows"

    def errors(self, device: str) -> list[float]:
        lin, numbers = LINEARS[self.which], Numbers(self.dtype, device, self.rows)
        x = numbers.normal(self.rows, lin.dims["out" if self.back else "x"])
        if self.scalars == "shared":
            printed = TritonLinear(LinearKernel(lin, DTYPES[self.dtype], "x" if self.back else "out"))
            weight = numbers.normal(lin.weights)
            found = bind(printed)(x, printed.pack(weight))
            wide, w = exact(x, weight)
            given = (None, w, wide, str(lin), "x") if self.back else (wide, w, None, str(lin), "out")
            return [relative(found, reference.linear(*given))]
        tp = by_scalars(lin)
        printed = TritonLinear(ScalarProductKernel(tp, DTYPES[self.dtype], "x1" if self.back else "out"))
        weight, mix = numbers.normal(tp.weights), numbers.normal(self.rows, tp.dims["x2"])
        if self.scalars == "one-hot":
            mix = torch.zeros_like(mix).scatter_(1, numbers.index(3, self.rows, 1), 1.0)
        found = bind(printed)(x, mix, printed.pack(weight))
        wide, v, w = exact(x, mix, weight)
        given = (None, v, w, wide, str(tp), "x1") if self.back else (wide, v, w, None, str(tp), "out")
        return [relative(found, reference.tensor_product(*given))]


def by_scalars(lin: Linear) -> TensorProduct:
    """The map with weights mixed by three scalars, and its first block by two more."""
    paths, at = [], 0
    for n, p in enumerate(lin.paths):
        for second, count in ((0, 3), (1, 2))[: 2 if n == 0 else 1]:
            paths.append(Path(p.i, second, p.o, "uvw", at, p.coefficient))
            at += segments(lin.irreps_in)[p.i][1] * count * segments(lin.irreps_out)[p.o][1]
    return TensorProduct(lin.irreps_in, "3x0e+2x0e", lin.irreps_out, tuple(paths), at, shared=True)


def linears() -> Iterator[LinearCase]:
    for which, back in product(LINEARS, (False, True)):
        for scalars in ("shared", "one-hot", "mixed"):
            yield LinearCase(which, scalars, back, "float64", 3)
        for rows, scalars in ((0, "shared"), (1, "one-hot"), (37, "shared")):
            yield LinearCase(which, scalars, back, "float32", rows)


@dataclass(frozen=True)
class RowsCase:
    """A sort of edges by an index; sizes are of the index, which has gaps."""

    edges: int
    size: int
    dtype: str = "float64"

    def __str__(self) -> str:
        return f"rows {self.edges} edges {self.size} rows"

    def errors(self, device: str) -> list[float]:
        index = Numbers("float64", device, self.edges).index(self.size, self.edges)
        return [relative(sorted_rows(index, self.size), rows_by(index, self.size), torch.int64)]


@dataclass(frozen=True)
class ChoiceCase:
    """A call as the target makes it, with the op's own arguments, weights constant or not."""

    op: str
    constant: bool
    dtype: str = "float64"

    def __str__(self) -> str:
        return f"choice {self.op} {'constant' if self.constant else 'given'} weights"

    def errors(self, device: str) -> list[float]:
        op, args, at = self.call(Numbers(self.dtype, device, 5))
        found = choose(op, args, {at: args[at]} if self.constant else {})
        if isinstance(found, str):  # coefficients of polynomials are part of the text
            return [0.0 if self.op.startswith("polynomial") and not self.constant else float("inf")]
        got, wanted = found.make(bind)(*args), op(*args)
        pairs = [(got, wanted)] if isinstance(wanted, Tensor) else zip(got, wanted, strict=True)
        return [relative(a, b, b.dtype) for a, b in pairs]

    def call(self, numbers: Numbers) -> tuple[Any, list[Any], int]:
        """The op, its arguments, and which of these are weights."""
        lin, device = LINEARS["odd"], numbers.device
        tp, grid = couplings(5, 3), Grid(5, 0.25, 3.0, 6)
        if self.op.startswith("convolution"):
            x, y, g = (numbers.normal(n, tp.dims[k]) for n, k in ((4, "x1"), (9, "x2"), (3, "out")))
            sender, receiver, radial = numbers.index(4, 9), numbers.index(3, 9), numbers.uniform(9)
            table = numbers.normal(grid.order + 1, grid.rows, tp.weights)
            if self.op == "convolution":
                order = rows_by(receiver, 3)
                return convolution, [x, y, radial, None, table, sender, receiver, order, 3, str(tp), str(grid)], 4
            order, needs = rows_by(sender, 4), [True, False, True]
            texts = [str(tp), str(grid), needs]
            return convolution_gradient, [x, y, g, radial, None, table, sender, receiver, order, *texts], 5
        if self.op.startswith("contraction"):
            whole = CONTRACTIONS["parts"]
            x, g = (numbers.normal(3, 5, n) for n in (whole.variables, whole.outputs))
            given = [x, numbers.index(2, 3), numbers.normal(2, len(whole.terms), 5)]
            if self.op == "contraction":
                return contraction, [*given, str(whole)], 2
            return contraction_gradient, [*given, g, str(whole)], 2
        if self.op.startswith("linear"):
            weight, back = numbers.normal(lin.weights), self.op.endswith("transposed")
            x, out = (numbers.normal(4, lin.dims[k]) for k in ("x", "out"))
            return ops.linear, [None if back else x, weight, out if back else None, str(lin), "x" if back else "out"], 1
        if self.op.startswith("tensor_product"):
            mixed, back = by_scalars(lin), self.op.endswith("transposed")
            x1, mix, out = (numbers.normal(4, mixed.dims[k]) for k in ("x1", "x2", "out"))
            weight, wrt = numbers.normal(mixed.weights), "x1" if back else "out"
            return ops.tensor_product, [None if back else x1, mix, weight, out if back else None, str(mixed), wrt], 2
        poly, found = spherical_harmonics((0, 1, 2), "component", -1)
        table, back = torch.tensor(found.tolist(), dtype=torch.float64, device=device), self.op.endswith("gradient")
        x, out = numbers.normal(4, 1, 3), numbers.normal(4, 1, 9) if back else None
        wrt = "direction" if back else "out"
        return ops.polynomial, [x, [], None, out, table.unsqueeze(1), str(poly), wrt], 4


OPS = (
    *("convolution", "convolution_gradient", "contraction", "contraction_gradient", "linear", "linear transposed"),
    *("tensor_product", "tensor_product transposed", "polynomial", "polynomial gradient"),
)


@dataclass(frozen=True)
class ModelCase:
    """A small potential's energies and edge gradients, by the target: kernels against one op after the other."""

    dtype: str
    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"model {self.dtype}"

    def errors(self, device: str) -> list[float]:
        settings = Settings((1, 8), (-1.0, -2.0), 4.0, "3x0e+2x1o", 1, 1, 3, 4)
        program = fxpass.run_passes(fxpass.capture(build(settings, DTYPES[self.dtype])), f"default,{FUSED}").program
        lowered = OnDevice(program, torch.device(device))
        if any(row.reason for row in lowered.manifest) or not lowered.sources:
            return [float("inf")]
        errors = []
        for atoms, edges in self.sizes:
            inputs = example_inputs(program, {"atoms": atoms, "edges": edges, "graphs": 1})
            found, expected = lowered(*inputs), lowered.eager(*(t.to(device) for t in inputs))
            errors += [relative(a, b.cpu(), b.dtype) for a, b in zip(found, expected, strict=True)]
        return errors + self.of_changed_weights(lowered, inputs)

    def of_changed_weights(self, lowered: OnDevice, inputs: Sequence[Tensor]) -> list[float]:
        """A copy runs kernels; with other weights neither runs the kernels of the old ones."""
        copied = deepcopy(lowered)
        before = copied(*inputs)
        with torch.no_grad():
            copied.weights[-1].mul_(2.0)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            after, kept = copied(*inputs), lowered(*inputs)
        if [str(w.message)[:27] for w in told] != ["fxpass: weights of this mod"]:
            return [float("inf")]
        expected = copied.eager(*(t.to(lowered.device) for t in inputs))
        pairs = [*zip(before, kept, strict=True), *zip(after, (t.cpu() for t in expected), strict=True)]
        return [relative(a, b, b.dtype) for a, b in pairs]


def cases() -> Iterator[Case]:
    yield ModelCase("float64", ((3, 8), (1, 0)))
    yield from (ChoiceCase(op, constant) for op, constant in product(OPS, (True, False)))
    yield from convolutions()
    yield from contractions()
    yield from harmonics()
    yield from linears()
    yield from (RowsCase(*sizes) for sizes in ((0, 0), (0, 3), (7, 1), (40, 9)))


def relative(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> float:
    """The largest error over the largest number; infinite where shape or type are others."""
    if found.shape != expected.shape or dtype not in (None, found.dtype):
        return float("inf")
    if not expected.numel():
        return 0.0
    error, scale = (found.double() - expected.double()).abs().max().item(), expected.double().abs().max().item()
    return error / (scale or 1.0)


def main(words: Sequence[str]) -> None:
    (device,) = words
    found = {str(case): case.errors(device) for case in cases()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
