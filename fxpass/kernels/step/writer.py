"""Statements of a step in C++, the buffers that they read and write, and a plan of memory for these."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import sympy
import torch

from .values import Formula, Indices, Pieces, Place, Readable, Reshaped, Value, constant
from .views import TYPES, Shape, Size, Unsupported, View, numel, printed

#: elements from which a loop is worth the start of threads
MANY = 16384
#: where a buffer comes from: a tensor that each call gives, one that never changes, a result, or the arena
Source = Literal["given", "fixed", "made", "arena"]


@dataclass(frozen=True)
class Buffer:
    """Memory of one tensor.

    Attributes:
        number: among those of its source.
        bytes: how large it is.
    """

    source: Source
    number: int
    type: str
    bytes: Size


@dataclass(frozen=True)
class Statement:
    """Lines of C++, and buffers that they read and write."""

    lines: tuple[str, ...]
    reads: frozenset[int]
    writes: frozenset[int]


@dataclass
class Writer:
    """A step under construction.

    Attributes:
        failures: what the numbers that the function returns mean, from 1.
        functions: symbols of the kernels that it calls.
        scratch: calls, as C++, of the functions that tell how much room kernels need.
    """

    buffers: list[Buffer] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    scratch: list[str] = field(default_factory=list)
    _placed: dict[int, tuple[Value, View]] = field(default_factory=dict)

    def buffer(self, source: Source, dtype: torch.dtype, shape: Shape) -> View:
        """A new contiguous tensor.

        Raises:
            Unsupported: elements of a type that no C++ is printed for.
        """
        if dtype not in TYPES:
            raise Unsupported(f"elements of type {dtype}")
        number = sum(b.source == source for b in self.buffers)
        elements = numel(shape)
        printed(elements)
        self.buffers.append(Buffer(source, number, TYPES[dtype], elements * dtype.itemsize))
        return View.whole(len(self.buffers) - 1, dtype, shape)

    def emit(self, lines: Sequence[str], reads: frozenset[int], writes: frozenset[int] = frozenset()) -> None:
        self.statements.append(Statement(tuple(lines), reads, writes))

    def fail(self, what: str) -> int:
        """The number that stands for a failure."""
        if what not in self.failures:
            self.failures.append(what)
        return self.failures.index(what) + 1

    def function(self, name: str, type: str) -> str:
        """C++ of a kernel's function."""
        if name not in self.functions:
            self.functions.append(name)
        return f"(({type})functions[{self.functions.index(name)}])"

    # --- values into memory

    def readable(self, value: Value) -> Readable:
        """The value as something whose elements can be read one by one."""
        return value if isinstance(value, Place | Formula) else Place(self.place(value))

    def place(self, value: Value) -> View:
        """Where the value lies, once it is there."""
        if isinstance(value, Place):
            return value.view
        if id(value) not in self._placed:
            view = self.buffer("arena", value.dtype, value.shape)
            self.store(value, view)
            self._placed[id(value)] = (value, view)
        return self._placed[id(value)][1]

    def contiguous(self, value: Value) -> View:
        """Where the value lies without gaps and in order."""
        view = self.place(value)
        if view.contiguous:
            return view
        copy = self.buffer("arena", view.dtype, view.shape)
        self.store(value, copy)
        return copy

    def store(self, value: Value, to: View) -> None:
        """Write the value to a place of its shape and type."""
        match value:
            case Pieces():
                for start, part in value.parts:
                    self.store(part, to.narrow(value.dim, start, part.shape[value.dim]))
                for start, length in value.gaps():
                    gap = to.narrow(value.dim, start, length)
                    self.store(constant(gap.shape, gap.dtype, "0"), gap)
            case Reshaped():
                inside = to.reshape(value.inner.shape)
                if inside is not None:
                    self.store(value.inner, inside)
                else:
                    whole = self.contiguous(value.inner).reshape(value.shape)
                    if whole is None:
                        raise Unsupported(f"a reshape to {value.shape}")
                    self.store(Place(whole), to)
            case _:
                self._copy(value, to)

    def _copy(self, value: Readable, to: View) -> None:
        if to.contiguous and value.flat and value.at is not None:
            goal = Place(to)
            size = numel(to.shape)
            lines = loop("i", size, size, [f"{goal.at('i')} = {value.at('i')};"], inner=True)
        else:
            lines = self.loops(to.shape, lambda at: [f"{to.element(at)} = {value.element(at)};"])
        self.emit(lines, value.reads, frozenset({to.buffer}))

    def loops(self, shape: Shape, body: Callable[[Indices], Sequence[str]], *, simd: bool = True) -> list[str]:
        """``body`` for all indices of ``shape``."""
        indices = ["0" if n == 1 else f"i{d}" for d, n in enumerate(shape)]
        lines = list(body(indices))
        inner = simd
        for d in reversed(range(len(shape))):
            if shape[d] != 1:
                outermost = all(n == 1 for n in shape[:d])
                rows, lines = self._hoisted(lines, f"i{d}") if inner else ([], lines)
                lines = loop(f"i{d}", shape[d], numel(shape) if outermost else None, lines, inner=inner)
                lines = ["{", *rows, *lines, "}"] if rows else lines  # no loop may be around it, to end their names
                inner = False
        return lines

    def _hoisted(self, lines: Sequence[str], index: str) -> tuple[list[str], list[str]]:
        """Entries of integer buffers that do not depend on ``index``, read in front of its loop, and the loop's lines.

        A compiler that must take what the loop writes for what it reads would read them at every turn.
        """
        names: dict[str, str] = {}

        def name(read: re.Match[str]) -> str:
            varies = re.search(rf"\b{index}\b", read[2]) or self.buffers[int(read[1])].type != TYPES[torch.int64]
            return read[0] if varies else names.setdefault(read[0], f"row{len(names)}")

        inside = [re.sub(r"\bb(\d+)\[([^][]*)\]", name, line) for line in lines]
        return [f"const int64_t {own} = {text};" for text, own in names.items()], inside

    def check(self, index: Readable, size: Size, what: str) -> None:
        """Fail where an index [n] is not below ``size``."""
        lines = [
            "{ bool outside = false;",
            f"for (int64_t i = 0; i < {printed(index.shape[0])}; i++)",
            f"  outside |= uint64_t({index.element(['i'])}) >= uint64_t({printed(size)});",
            f"if (outside) return {self.fail(what)}; }}",
        ]
        self.emit(lines, index.reads)

    # --- the whole

    def slots(self) -> tuple[dict[int, int], list[Size]]:
        """A slot of the arena for each buffer in it, and the bytes of each slot.

        Buffers share a slot where none is read after another has been written and one size is a multiple of the other's
        at all sizes of the system: they grow with the same product of sizes.
        """
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for at, statement in enumerate(self.statements):
            for number in statement.writes | statement.reads:
                first.setdefault(number, at)
                last[number] = at
        sizes: list[tuple[sympy.Expr, sympy.Expr]] = []  # of each slot: coefficient, unit
        until: list[int] = []
        chosen: dict[int, int] = {}
        for number in sorted((n for n in first if self.buffers[n].source == "arena"), key=lambda n: first[n]):
            size = self.buffers[number].bytes
            coefficient, unit = (sympy.S.Zero, sympy.S.One) if size == 0 else size.primitive()
            free = [s for s, (_, u) in enumerate(sizes) if u == unit and until[s] < first[number]]
            enough = [s for s in free if sizes[s][0] >= coefficient]
            if enough:
                slot = min(enough, key=lambda s: sizes[s][0])
            elif free:
                slot = max(free, key=lambda s: sizes[s][0])
                sizes[slot] = (coefficient, unit)
            else:
                slot = len(sizes)
                sizes.append((coefficient, unit))
                until.append(-1)
            chosen[number], until[slot] = slot, last[number]
        return chosen, [coefficient * unit for coefficient, unit in sizes]

    def source(self, name: str, symbols: Sequence[str], about: Sequence[str]) -> str:
        """The C++ file: ``NAME``, and ``NAME_bytes``, the size of the arena.

        Args:
            symbols: names of the sizes, in the order of the argument ``sizes``.
        """
        chosen, slots = self.slots()
        used = {n for statement in self.statements for n in statement.reads | statement.writes}
        numbered = enumerate(symbols)
        sizes = "".join(f"  [[maybe_unused]] const int64_t {symbol} = sizes[{k}];\n" for k, symbol in numbered)
        layout = "".join(f"  at[{k + 1}] = at[{k}] + padded({printed(size)});\n" for k, size in enumerate(slots))
        scratch = "".join(f"  room = std::max<int64_t>(room, {call});\n" for call in dict.fromkeys(self.scratch))
        pointers = []
        for number, buffer in enumerate(self.buffers):
            if number not in used:
                continue
            where = f"arena + at[{chosen[number]}]" if buffer.source == "arena" else f"{buffer.source}[{buffer.number}]"
            const = "const " if buffer.source in ("given", "fixed") else ""
            pointers.append(f"  {const}{buffer.type}* const b{number} = ({const}{buffer.type}*)({where});\n")
        body = "".join(f"  {line}\n" for statement in self.statements for line in statement.lines)
        return (
            "".join(f"// {line}\n" for line in about)
            + _HEAD
            + (_FUNCTIONS if "fast_" in body else "")
            + f"""
static inline int64_t layout(const int64_t* sizes, [[maybe_unused]] void* const* functions, int64_t* at) {{
{sizes}  at[0] = 0;
{layout}  int64_t room = 0;
{scratch}  return at[{len(slots)}] + padded(room);
}}

extern "C" int64_t {name}_bytes(const int64_t* sizes, void* const* functions) {{
  int64_t at[{len(slots) + 1}];
  return layout(sizes, functions, at);
}}

extern "C" int {name}([[maybe_unused]] void* const* given, [[maybe_unused]] void* const* fixed, void* const* made,
    const int64_t* sizes, char* arena, void* const* functions, [[maybe_unused]] int threads) {{
{sizes}  int64_t at[{len(slots) + 1}];
  layout(sizes, functions, at);
  [[maybe_unused]] char* const scratch = arena + at[{len(slots)}];
{"".join(pointers)}{body}  return 0;
}}
"""
        )


def loop(index: str, size: Size, total: Size | None, body: Sequence[str], *, inner: bool) -> list[str]:
    """A loop.

    Args:
        total: elements that all of it handles, where it is the outermost one.
        inner: it is the innermost one.
    """
    simd = " simd" if inner and not (size.is_Integer and size < 8) else ""
    pragma = [f"#pragma omp{simd}"] if simd else []
    if total is not None and not total.is_Integer:
        condition = f"threads > 1 && {printed(total)} > {MANY}"
        pragma = [f"#pragma omp parallel for{simd} num_threads(threads) if (parallel : {condition})"]
    head = f"for (int64_t {index} = 0; {index} < {printed(size)}; {index}++) {{"
    return [*pragma, head, *(f"  {line}" for line in body), "}"]


_HEAD = """#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// every op rounds, as ATen's do: x * x - y * y is 0 where x is y
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

typedef double Float64 __attribute__((may_alias));
typedef float Float32 __attribute__((may_alias));
typedef int64_t Int64 __attribute__((may_alias));
typedef int32_t Int32 __attribute__((may_alias));
typedef bool Bool __attribute__((may_alias));

// memory of a tensor begins at a line of the cache
static constexpr int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
"""
#: exp and tanh without branches, so that loops over them become vectors; a few units in the last place, NaN and
#: infinities as in libm.  With x = k ln 2 + r, expm1(r) is its Taylor series, and 2^k is put together from its bits
_FUNCTIONS = """
template <typename T, typename I> struct Exponential {
  static constexpr bool wide = sizeof(T) == 8;
  static constexpr T shift = wide ? T(0x1.8p52) : T(0x1.8p23), largest = wide ? T(720) : T(90);
  static constexpr T smallest = wide ? T(-760) : T(-110);
  static inline T power(T k) {  // the last bits of k + shift are those of the integer k
    const T moved = k + shift;
    I bits;
    memcpy(&bits, &moved, sizeof bits);
    bits = I(uint64_t(bits) << (wide ? 52 : 23)) + (wide ? I(0x3ff0000000000000) : I(0x3f800000));
    T made;
    memcpy(&made, &bits, sizeof made);
    return made;
  }
  static inline T reduced(T x, T& k) {  // expm1(r)
    k = std::rint(x * T(1.4426950408889634));
    const T r = wide ? (x - k * T(0x1.62e42fee00000p-1)) - k * T(0x1.a39ef35793c76p-33)
                     : (x - k * T(0x1.62e400p-1)) - k * T(0x1.7f7d1cp-20);
    T sum = wide ? T(1 / 87178291200.0) : T(1 / 40320.0);
    if (wide) {
      sum = sum * r + T(1 / 6227020800.0);
      sum = sum * r + T(1 / 479001600.0);
      sum = sum * r + T(1 / 39916800.0);
      sum = sum * r + T(1 / 3628800.0);
      sum = sum * r + T(1 / 362880.0);
      sum = sum * r + T(1 / 40320.0);
    }
    sum = sum * r + T(1 / 5040.0);
    sum = sum * r + T(1 / 720.0);
    sum = sum * r + T(1 / 120.0);
    sum = sum * r + T(1 / 24.0);
    sum = sum * r + T(1 / 6.0);
    sum = sum * r + T(1 / 2.0);
    return r + r * r * sum;
  }
  static inline T exp(T x) {
    T k, within = x > largest ? largest : x;
    within = within < smallest ? smallest : within;
    const T small = reduced(within, k), half = std::rint(k * T(0.5));
    return (1 + small) * power(half) * power(k - half);
  }
  static inline T tanh(T x) {
    T k;
    const T twice = 2 * std::abs(x), small = reduced(twice > 40 ? T(40) : twice, k), scale = power(k);
    const T e = scale * small + (scale - 1);
    return std::copysign(e / (e + 2), x);
  }
};
static inline double fast_exp(double x) { return Exponential<double, int64_t>::exp(x); }
static inline float fast_exp(float x) { return Exponential<float, int32_t>::exp(x); }
static inline double fast_tanh(double x) { return Exponential<double, int64_t>::tanh(x); }
static inline float fast_tanh(float x) { return Exponential<float, int32_t>::tanh(x); }
"""
