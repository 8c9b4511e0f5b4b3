"""Straight-line programs over vector lanes: what a kernel does with one row, for all channels alike.

A value is either a vector, one number per lane (a channel), or uniform, the same number in every lane.  Programs
say what is computed and not how: a printer turns one into C++ over compiler vectors, another into Triton over a
block of channels.  Equal values are one value, and zeros and ones vanish while a program is built, so what is
printed is what is needed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Value = int
Operation = Literal["load", "scalar", "constant", "add", "mul", "fma", "store", "accumulate"]

#: arithmetic; an fma counts twice
FLOPS: Mapping[str, int] = {"add": 1, "mul": 1, "fma": 2, "accumulate": 1}


class Instruction(NamedTuple):
    """One step.

    Attributes:
        operation: what it does.
        operands: values that it reads.
        array: of loads, scalars, stores and accumulations.
        at: row of that array, or element for ``scalar``.
        number: of constants.
        uniform: the result is the same in every lane.
    """

    operation: Operation
    operands: tuple[Value, ...] = ()
    array: str = ""
    at: int = 0
    number: float = 0.0
    uniform: bool = False


@dataclass
class Lanes:
    """A program under construction; a value is the number of the instruction that makes it."""

    code: list[Instruction] = field(default_factory=list)
    _known: dict[Instruction, Value] = field(default_factory=dict, repr=False)

    def load(self, array: str, row: int) -> Value:
        """One number per lane: row ``row`` of ``array``."""
        return self._value(Instruction("load", (), array, row))

    def scalar(self, array: str, at: int) -> Value:
        """Element ``at`` of ``array``, in every lane."""
        return self._value(Instruction("scalar", (), array, at, uniform=True))

    def constant(self, number: float) -> Value:
        """``number`` in every lane."""
        return self._value(Instruction("constant", number=float(number), uniform=True))

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        if self._is(a, 0.0) or self._is(b, 0.0):
            return b if self._is(a, 0.0) else a
        return self._value(Instruction("add", tuple(sorted((a, b))), uniform=self._uniform(a, b)))

    def mul(self, a: Value, b: Value) -> Value:
        """a * b."""
        if self._is(a, 0.0) or self._is(b, 0.0):
            return self.constant(0.0)
        if self._is(a, 1.0) or self._is(b, 1.0):
            return b if self._is(a, 1.0) else a
        return self._value(Instruction("mul", tuple(sorted((a, b))), uniform=self._uniform(a, b)))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once where the machine can."""
        if self._is(c, 0.0):
            return self.mul(a, b)
        if any(self._is(v, n) for v in (a, b) for n in (0.0, 1.0)):
            return self.add(self.mul(a, b), c)
        first, second = sorted((a, b))
        return self._value(Instruction("fma", (first, second, c), uniform=self._uniform(a, b, c)))

    def dot(self, pairs: Iterable[tuple[Value, Value]]) -> Value:
        """Sum of a * b over the pairs; 0 where there are none."""
        total = self.constant(0.0)
        for a, b in pairs:
            total = self.fma(a, b, total)
        return total

    def store(self, array: str, row: int, value: Value) -> None:
        """Row ``row`` of ``array`` becomes ``value``; what is loaded from an array is not stored to it."""
        self.code.append(Instruction("store", (value,), array, row))

    def accumulate(self, array: str, row: int, value: Value) -> None:
        """``value`` is added to row ``row`` of ``array``."""
        if not self._is(value, 0.0):
            self.code.append(Instruction("accumulate", (value,), array, row))

    @property
    def flops(self) -> int:
        """Operations per lane of the vector part, a multiply-add counting two."""
        return sum(FLOPS.get(i.operation, 0) for i in self.live() if not i.uniform)

    def live(self) -> Iterator[Instruction]:
        """The instructions that some store needs, in order; operands keep their numbers in ``code``."""
        return (self.code[v] for v in self.needed())

    def needed(self) -> list[Value]:
        """Numbers of the live instructions, in order."""
        alive = [i.operation in ("store", "accumulate") for i in self.code]
        for at in range(len(self.code) - 1, -1, -1):
            if alive[at]:
                for operand in self.code[at].operands:
                    alive[operand] = True
        return [at for at, needed in enumerate(alive) if needed]

    def _value(self, made: Instruction) -> Value:
        if made not in self._known:
            self._known[made] = len(self.code)
            self.code.append(made)
        return self._known[made]

    def _is(self, value: Value, number: float) -> bool:
        made = self.code[value]
        return made.operation == "constant" and made.number == number

    def _uniform(self, *values: Value) -> bool:
        return all(self.code[v].uniform for v in values)


def cpp(
    lanes: Lanes,
    arrays: Mapping[str, str],
    *,
    uniform: bool | None = None,
    prefix: str = "t",
    registers: Mapping[str, str] | None = None,
    once: Container[str] = (),
    paired: Container[str] = (),
) -> list[str]:
    """C++ statements over ``V`` (a compiler vector of ``T``), one for each live instruction.

    Args:
        arrays: for each array the address of a row (or of an element, for ``scalar``) with ``{row}`` for its number,
            e.g. ``"x + {row} * 32 + c"``.  Addresses need no alignment.
        uniform: only those whose result is the same in every lane, which may go in front of a loop over lanes, or
            only the others; by default all.
        prefix: of the names of the values.
        registers: for each array that is only written to, and kept in variables, the name of one: ``"sum_{row}"``.
        once: arrays that are read once and where it is written: compilers rather read memory twice than keep a
            value that is used twice, and move what uses it apart.
        paired: arrays of bfloat16, two rows of which alternate (see :func:`storage`); their addresses are those of
            pairs of rows.
    """
    lines = []
    registers = registers or {}
    for at in lanes.needed():
        made = lanes.code[at]
        if uniform is not None and made.uniform is not uniform:
            continue
        name = f"{prefix}{at}"
        operands = [f"{prefix}{o}" for o in made.operands]
        kept = made.array in registers
        row = made.at // 2 if made.array in paired else made.at
        address = arrays[made.array].format(row=row) if made.array and not kept else ""
        match made.operation:
            case "load":
                kind = "const volatile V" if made.array in once else "const V"
                read = f"half<{made.at % 2}>({address})" if made.array in paired else f"*({kind}*)({address})"
                lines.append(f"const V {name} = {read};")
            case "scalar":
                lines.append(f"const T {name} = *({address});")
            case "constant":
                lines.append(f"const T {name} = T({made.number!r});")
            case "add":
                lines.append(f"const auto {name} = {operands[0]} + {operands[1]};")
            case "mul":
                lines.append(f"const auto {name} = {operands[0]} * {operands[1]};")
            case "fma":
                lines.append(f"const auto {name} = {operands[0]} * {operands[1]} + {operands[2]};")
            case "store" | "accumulate":
                place = registers[made.array].format(row=made.at) if kept else f"*(V*)({address})"
                sign = "=" if made.operation == "store" else "+="
                value = f"(V{{}} + {operands[0]})" if lanes.code[made.operands[0]].uniform else operands[0]
                lines.append(f"{place} {sign} {value};")
    return lines


#: at the head of every C++ file: T is the type of numbers, V of vectors as wide as the machine's, W lanes of them
def prelude(dtype: str) -> str:
    """Types of a C++ file for ``dtype``, ``"float32"`` or ``"float64"``."""
    number = {"float32": "float", "float64": "double"}[dtype]
    return f"""#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX512F__)
#define FXPASS_BYTES 64
#elif defined(__AVX__)
#define FXPASS_BYTES 32
#else
#define FXPASS_BYTES 16
#endif
typedef {number} T;
typedef T V __attribute__((vector_size(FXPASS_BYTES), aligned(sizeof(T)), may_alias));
static constexpr int64_t W = FXPASS_BYTES / sizeof(T);
static constexpr int64_t padded(int64_t channels) {{ return (channels + W - 1) / W * W; }}
"""


def storage(dtype: str) -> str:
    """The type ``S`` in which features and tables are stored, T unless ``dtype`` is ``"bfloat16"``.

    ``widened`` makes T of S; ``narrowed`` rounds to the nearest, ties to even; ``half`` reads the first or the second
    of two vectors of bfloat16 whose lanes alternate, which takes one operation where conversion takes four.
    """
    if dtype != "bfloat16":
        return """typedef T S;
static inline T widened(T x) { return x; }
static inline T narrowed(T x) { return x; }"""
    return """typedef uint16_t S;
static inline T widened(S x) { const uint32_t bits = uint32_t(x) << 16; T y; memcpy(&y, &bits, 4); return y; }
template <int second> static inline V half(const S* x) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  typedef uint32_t Bits __attribute__((vector_size(W * 4), aligned(2), may_alias));
  return (V)(second ? *(const Bits*)x & 0xffff0000 : *(const Bits*)x << 16);
}
static inline S narrowed(T x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x == x ? S((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : S(0x7fc0);
}"""
