"""How C++ calls a kernel, as data: what is handed over in place of each argument of its function."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Operand:
    """Address of an argument of the op, contiguous, or null where there is none; position None is always null."""

    position: int | None


@dataclass(frozen=True)
class Constant:
    """Address of a constant argument of the op, packed as the kernel reads it."""

    position: int


@dataclass(frozen=True)
class Result:
    """Address of a result; the op has several where ``number`` is not 0."""

    number: int = 0


@dataclass(frozen=True)
class Rows:
    """First size of an argument of the op."""

    position: int


@dataclass(frozen=True)
class Number:
    """An argument of the op that is a size."""

    position: int


@dataclass(frozen=True)
class Scratch:
    """Address of room for as many numbers as the function ``NAME_scratch`` says for ``rows``."""

    rows: Rows


@dataclass(frozen=True)
class Threads:
    """How many threads to run on."""


Argument = Operand | Constant | Result | Rows | Number | Scratch | Threads


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        arguments: in the order of the C function.
        failure: what is wrong where the function returns 1; empty where it returns nothing.
    """

    arguments: tuple[Argument, ...]
    failure: str = ""
