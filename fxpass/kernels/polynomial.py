"""C++ for the op ``polynomial`` of one channel without weights, as of spherical harmonics: rows are lanes.

Coefficients are constants of the source.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from torch import Tensor

from ..algebra.contraction import nested
from ..algebra.polynomial import Monomial, Polynomial
from ..errors import UsageError
from .contraction import DTYPES, gradient_of
from .lanes import Lanes, Value, cpp, prelude
from .transposes import TRANSPOSES


@dataclass(frozen=True)
class PolynomialKernel:
    """A compiled ``polynomial`` without directions and weights, of one channel.

    Attributes:
        polynomial: the monomials.
        coefficients: a row for each monomial, a number for each output.
        dtype: ``"float32"`` or ``"float64"``, of all arguments.
        gradient: the kernel of wrt ``"direction"`` rather than ``"out"``.
    """

    polynomial: Polynomial
    coefficients: tuple[tuple[float, ...], ...]
    dtype: str
    gradient: bool

    @cached_property
    def name(self) -> str:
        """Name of the function, made from what the source says."""
        kind = "polynomial_gradient" if self.gradient else "polynomial"
        return f"{kind}_{sha256(self._text('').encode()).hexdigest()[:16]}"

    @cached_property
    def source(self) -> str:
        """C++ source with the one function ``name``."""
        return self._text(self.name)

    @property
    def outputs(self) -> int:
        return len(self.coefficients[0])

    @property
    def arguments(self) -> tuple[tuple[str, str], ...]:
        """C types and names of the function's arguments; it returns nothing."""
        g = (("const T*", "g"),) if self.gradient else ()
        return (("const T*", "x"), *g, ("T*", "result"), ("int64_t", "rows"), ("int", "threads"))

    @cached_property
    def program(self) -> Lanes:
        """What is done with one row."""
        lanes, poly = Lanes(), self.polynomial

        def x(i: int) -> Value:
            return lanes.load("x", i)

        def monomial(m: Monomial) -> Value:
            return lanes.mul(monomial(m[:-1]), x(m[-1])) if m else lanes.constant(1.0)

        def dot(numbers: tuple[float, ...], values: list[Value]) -> Value:
            pairs = zip(numbers, values, strict=True)
            return lanes.dot((lanes.constant(number), value) for number, value in pairs if number)

        if self.gradient:
            given = [lanes.load("g", k) for k in range(self.outputs)]
            by_monomial = [dot(row, given) for row in self.coefficients]
            results = [lanes.constant(0.0)] * poly.variables
            tree = nested({m: n for n, m in enumerate(poly.monomials)})
            gradient_of(lanes, tree, x, by_monomial.__getitem__, lanes.constant(1.0), results)
        else:
            values = [monomial(m) for m in poly.monomials]
            results = [dot(column, values) for column in zip(*self.coefficients, strict=True)]
        for number, value in enumerate(results):
            lanes.store("result", number, value)
        return lanes

    def function(self, library: ctypes.CDLL) -> Callable[..., None]:
        """The function of a library built from ``source``, with its argument types."""
        function = getattr(library, self.name)
        kinds = {"int64_t": ctypes.c_int64, "int": ctypes.c_int}
        function.argtypes = [kinds.get(kind, ctypes.c_void_p) for kind, _ in self.arguments]
        function.restype = None
        return function

    def call(self, function: Callable[..., None], *tensors: Tensor, threads: int = 1) -> Tensor:
        """Run the function on contiguous tensors on the CPU.

        Args:
            tensors: x [rows, 1, variables] and, for the gradient, g [rows, 1, outputs].

        Returns:
            [rows, 1, outputs], or of the shape of x for the gradient.

        Raises:
            UsageError: a shape or a dtype that the kernel was not made for.
        """
        rows, widths = tensors[0].shape[0], (self.polynomial.variables, self.outputs)
        for name, width, tensor in zip("xg", widths, tensors, strict=False):
            shape, dtype = (rows, 1, width), DTYPES[self.dtype]
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                raise UsageError(
                    f"The kernel takes {name} as contiguous {dtype} {list(shape)}; "
                    f"it was given {tensor.dtype} {list(tensor.shape)} of strides {list(tensor.stride())}."
                )
        result = tensors[0].new_empty((rows, 1, widths[0] if self.gradient else widths[1]))
        function(*(t.data_ptr() for t in (*tensors, result)), rows, threads)
        return result

    def _text(self, name: str) -> str:
        places = {array: f"{array}s + {{row}} * W" for array in ("x", "g", "result")}  # xs, gs, results
        return _FILE.format(
            about=str(self.polynomial)[:80],
            prelude=prelude(self.dtype),
            transposes=TRANSPOSES,
            variables=self.polynomial.variables,
            outputs=self.outputs,
            columns=self.polynomial.variables if self.gradient else self.outputs,
            name=name,
            arguments=", ".join(f"{kind} {argument}" for kind, argument in self.arguments),
            load="load<OUTPUTS>(g + first * OUTPUTS, gs, count);" if self.gradient else "",
            body="\n    ".join(cpp(self.program, places)),
        )


_FILE = """// {about}
{prelude}
static constexpr int64_t VARIABLES = {variables}, OUTPUTS = {outputs}, COLUMNS = {columns};
static constexpr int64_t LANES = W;
{transposes}
// up to W rows of n numbers -> n vectors; lanes without a row are zero
template <int64_t n> static void load(const T* rows, T* vectors, int64_t count) {{
  T copy[n * W] = {{}};
  if (count < W) rows = static_cast<const T*>(std::memcpy(copy, rows, count * n * sizeof(T)));
  to_lanes<n>(rows, vectors, W);
}}
template <int64_t n> static void store(const T* vectors, T* rows, int64_t count) {{
  if (count == W) return from_lanes<n>(vectors, rows, W);
  T copy[n * W];
  from_lanes<n>(vectors, copy, W);
  std::memcpy(rows, copy, count * n * sizeof(T));
}}

extern "C" void {name}({arguments}) {{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows > 16 * W)
  for (int64_t first = 0; first < rows; first += W) {{
    const int64_t count = rows - first < W ? rows - first : W;
    alignas(64) T xs[VARIABLES * W], gs[OUTPUTS * W], results[COLUMNS * W];
    load<VARIABLES>(x + first * VARIABLES, xs, count);
    {load}
    {body}
    store<COLUMNS>(results, result + first * COLUMNS, count);
  }}
}}
"""
