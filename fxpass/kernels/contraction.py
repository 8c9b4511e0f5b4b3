"""C++ for the ops ``contraction`` and ``contraction_gradient``: channels are lanes, terms are straight-line code.

Each output is evaluated in Horner's form, so that the coefficient of a term is loaded once and used in one
multiply-add; the gradient is that program in reverse, two multiply-adds a term.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from ..algebra.contraction import Contraction, Nested
from ..errors import UsageError
from .lanes import Lanes, Value, cpp, prelude
from .transposes import TRANSPOSES

#: bytes of the coefficients that one function of the source reads: half of a first-level cache, because it is run
#: for each block of channels, and these share cache lines
PART_BYTES = 16384
#: terms of one function; below, Horner's form loses common factors, above, compilers slow down
PART_TERMS = (32, 256)
#: bytes of the variables and results of atoms that are evaluated together
GROUP_BYTES = 131072
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def value_of(lanes: Lanes, tree: Nested, x: Callable[[int], Value], coefficient: Callable[[int], Value]) -> Value:
    """Emit a nested polynomial; ``x`` and ``coefficient`` give variables and coefficients by number."""
    total = lanes.constant(0.0) if tree.coefficient is None else coefficient(tree.coefficient)
    for i, inner in reversed(tree.factors):
        total = lanes.fma(x(i), value_of(lanes, inner, x, coefficient), total)
    return total


def gradient_of(
    lanes: Lanes,
    tree: Nested,
    x: Callable[[int], Value],
    coefficient: Callable[[int], Value],
    by_value: Value,
    gradient: list[Value],
) -> Value:
    """Emit a nested polynomial and its derivatives, each multiplied by ``by_value`` and added to ``gradient``."""
    total = lanes.constant(0.0) if tree.coefficient is None else coefficient(tree.coefficient)
    for i, inner in reversed(tree.factors):
        factor = lanes.mul(by_value, x(i)) if inner.factors else by_value  # a coefficient asks for no derivative
        value = gradient_of(lanes, inner, x, coefficient, factor, gradient)
        gradient[i] = lanes.fma(by_value, value, gradient[i])
        total = lanes.fma(x(i), value, total)
    return total


@dataclass(frozen=True)
class ContractionKernel:
    """A compiled ``contraction`` or ``contraction_gradient`` for one number of channels.

    Attributes:
        contraction: the polynomials.
        channels: number of channels, at least 1.
        dtype: ``"float32"`` or ``"float64"``, of all floating arguments.
        gradient: the kernel of ``contraction_gradient``.
    """

    contraction: Contraction
    channels: int
    dtype: str
    gradient: bool

    @cached_property
    def name(self) -> str:
        """Name of the function, made from what the source says."""
        kind = "contraction_gradient" if self.gradient else "contraction"
        return f"{kind}_{sha256(self._text('').encode()).hexdigest()[:16]}"

    @cached_property
    def source(self) -> str:
        """C++ source with the one function ``name``."""
        return self._text(self.name)

    @property
    def arguments(self) -> tuple[tuple[str, str], ...]:
        """C types and names of the function's arguments; it returns 1 where an index is out of range, else 0."""
        g = (("const T*", "g"),) if self.gradient else ()
        tensors = (("const T*", "x"), ("const int64_t*", "index"), ("const T*", "terms"), *g, ("T*", "result"))
        return (*tensors, ("int64_t", "atoms"), ("int64_t", "species"), ("int", "threads"))

    @cached_property
    def parts(self) -> tuple[Lanes, ...]:
        """The program, in pieces that add to the same result."""
        terms = self.contraction.terms
        order = sorted(range(len(terms)), key=lambda n: (terms[n][1], terms[n][0]))
        least, most = PART_TERMS
        size = min(max(PART_BYTES // (self.channels * DTYPES[self.dtype].itemsize), least), most)
        return tuple(self._part(order[at : at + size]) for at in range(0, len(order), size))

    def _part(self, numbers: Sequence[int]) -> Lanes:
        lanes, terms = Lanes(), self.contraction.terms
        some = Contraction(self.contraction.variables, tuple(terms[n] for n in numbers), "", "")

        def x(i: int) -> Value:
            return lanes.load("x", i)

        def coefficient(n: int) -> Value:
            return lanes.load("terms", numbers[n])

        gradient = [lanes.constant(0.0)] * self.contraction.variables
        for k, tree in some.by_output().items():
            if self.gradient:
                gradient_of(lanes, tree, x, coefficient, lanes.load("g", k), gradient)
            else:
                lanes.accumulate("result", k, value_of(lanes, tree, x, coefficient))
        for i, value in enumerate(gradient):
            lanes.accumulate("result", i, value)
        return lanes

    def function(self, library: ctypes.CDLL) -> Callable[..., int]:
        """The function of a library built from ``source``, with its argument types."""
        function = getattr(library, self.name)
        kinds = {"int64_t": ctypes.c_int64, "int": ctypes.c_int}
        function.argtypes = [kinds.get(kind, ctypes.c_void_p) for kind, _ in self.arguments]
        function.restype = ctypes.c_int
        return function

    def call(self, function: Callable[..., int], *tensors: Tensor, threads: int = 1) -> Tensor:
        """Run the function on contiguous tensors on the CPU.

        Args:
            tensors: x [atoms, channels, variables], index [atoms] int64, terms [species, terms, channels] and, for
                the gradient, g [atoms, channels, outputs].

        Returns:
            [atoms, channels, outputs], or of the shape of x for the gradient.

        Raises:
            UsageError: a shape, a dtype or an index that the kernel was not made for.
        """
        x, _, terms = tensors[:3]
        self._check(tensors)
        columns = self.contraction.variables if self.gradient else self.contraction.outputs
        result = x.new_empty((x.shape[0], self.channels, columns))
        pointers = [t.data_ptr() for t in (*tensors, result)]
        if function(*pointers, x.shape[0], terms.shape[0], threads):
            raise UsageError(f"An index is not below {terms.shape[0]}, the number of species.")
        return result

    def _check(self, tensors: Sequence[Tensor]) -> None:
        names = [name for kind, name in self.arguments if kind.startswith("const")]
        rows = tensors[0].shape[0]
        shapes = {
            "x": (rows, self.channels, self.contraction.variables),
            "index": (rows,),
            "terms": (tensors[2].shape[0], len(self.contraction.terms), self.channels),
            "g": (rows, self.channels, self.contraction.outputs),
        }
        for name, tensor in zip(names, tensors, strict=True):
            dtype = torch.int64 if name == "index" else DTYPES[self.dtype]
            if tensor.shape != shapes[name] or tensor.dtype != dtype or not tensor.is_contiguous():
                raise UsageError(
                    f"The kernel takes {name} as contiguous {dtype} {list(shapes[name])}; "
                    f"it was given {tensor.dtype} {list(tensor.shape)} of strides {list(tensor.stride())}."
                )

    def _text(self, name: str) -> str:
        columns = self.contraction.variables if self.gradient else self.contraction.outputs
        arguments = ", ".join(f"{kind} {argument}" for kind, argument in self.arguments)
        places = {"x": "x + {row} * ROW", "terms": "c + {row} * CHANNELS"}
        places |= {"g": "g + {row} * ROW", "result": "result + {row} * ROW"}
        parts = "".join(
            _PART.format(number=number, body="\n    ".join(cpp(lanes, places)))
            for number, lanes in enumerate(self.parts)
        )
        each = "for (int64_t a = 0; a < count; ++a) part_{}(c[a], local[a].x, local[a].g, local[a].result);"
        calls = "\n    ".join(each.format(number) for number in range(len(self.parts)))
        return _FILE.format(
            about=str(self.contraction)[:80],
            prelude=prelude(self.dtype),
            channels=self.channels,
            variables=self.contraction.variables,
            outputs=self.contraction.outputs,
            columns=columns,
            terms=len(self.contraction.terms),
            group_bytes=GROUP_BYTES,
            transposes=TRANSPOSES,
            parts=parts,
            name=name,
            arguments=arguments,
            load="load<OUTPUTS>(g + atom * CHANNELS * OUTPUTS, local[a].g);" if self.gradient else "",
            calls=calls,
        )


_PART = """
static void part_{number}(const T* terms, const T* x, const T* g, T* result) {{
  typedef L V;
  for (int64_t block = 0; block < BLOCKS; ++block, x += LANES, g += LANES, result += LANES) {{
    const T* c = terms + first(block);
    {body}
  }}
}}
"""

_FILE = """// {about}
#include <algorithm>
#include <vector>
{prelude}
static constexpr int64_t CHANNELS = {channels}, VARIABLES = {variables}, OUTPUTS = {outputs}, COLUMNS = {columns};
static constexpr int64_t TERMS = {terms};
static constexpr int64_t power(int64_t n) {{ return n < 2 ? 1 : 2 * power(n / 2); }}
// the widest vector that the channels fill; the last block of channels may overlap the one before it
static constexpr int64_t LANES = CHANNELS < W ? power(CHANNELS) : W;
static constexpr int64_t BLOCKS = (CHANNELS + LANES - 1) / LANES, ROW = BLOCKS * LANES;
static inline int64_t first(int64_t block) {{ return block + 1 < BLOCKS ? block * LANES : CHANNELS - LANES; }}
{transposes}
// one atom: variables, derivatives by the outputs, results, each a row of all channels
struct Atom {{ T x[VARIABLES * ROW], g[OUTPUTS * ROW], result[COLUMNS * ROW]; }};
// atoms that pass through each part together, so that its code and coefficients are read from a near cache
static constexpr int64_t GROUP = std::clamp<int64_t>({group_bytes} / sizeof(Atom), 1, 8);
template <int64_t n> static void load(const T* from, T* rows) {{
  for (int64_t b = 0; b < BLOCKS; ++b) to_lanes<n>(from + first(b) * n, rows + b * LANES, ROW);
}}
template <int64_t n> static void store(const T* rows, T* to) {{
  for (int64_t b = 0; b < BLOCKS; ++b) from_lanes<n>(rows + b * LANES, to + first(b) * n, ROW);
}}
{parts}
extern "C" int {name}({arguments}) {{
  // atoms in the order of their species
  std::vector<int64_t> start(species + 1), order(atoms);
  for (int64_t n = 0; n < atoms; ++n) {{
    if (index[n] < 0 || index[n] >= species) return 1;
    ++start[index[n] + 1];
  }}
  for (int64_t s = 0; s < species; ++s) start[s + 1] += start[s];
  for (int64_t n = 0; n < atoms; ++n) order[start[index[n]]++] = n;
  const int64_t group = std::clamp<int64_t>(atoms / std::max(threads, 1), 1, GROUP);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && atoms > 1)
  for (int64_t n = 0; n < atoms; n += group) {{
    alignas(64) Atom local[GROUP];
    const T* c[GROUP];
    const int64_t count = std::min(group, atoms - n);
    for (int64_t a = 0; a < count; ++a) {{
      const int64_t atom = order[n + a];
      c[a] = terms + index[atom] * TERMS * CHANNELS;
      load<VARIABLES>(x + atom * CHANNELS * VARIABLES, local[a].x);
      {load}
      std::fill_n(local[a].result, COLUMNS * ROW, T(0));
    }}
    {calls}
    for (int64_t a = 0; a < count; ++a)
      store<COLUMNS>(local[a].result, result + order[n + a] * CHANNELS * COLUMNS);
  }}
  return 0;
}}
"""
