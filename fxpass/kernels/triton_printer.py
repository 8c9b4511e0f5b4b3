"""Triton for the same programs over lanes as the C++: a block of channels or rows, masked, in place of a vector.

No two programs of a grid write to one place, and none adds up in memory.  A printed kernel is text: nothing here, and
nothing in the modules that print the kernels, needs Triton.  Sizes of blocks are arguments of the text, so that a
:class:`Config` changes how a kernel is launched and not which kernel it is.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from .lanes import Lanes, Value

TYPES = {"float32": "tl.float32", "float64": "tl.float64", "bfloat16": "tl.bfloat16"}
WARPS = (1, 2, 4, 8)
THREADS = 32  # of one warp

#: number: of the type that tensors are stored in; wide: of the type that is computed in; index: int64
Kind = Literal["number", "wide", "index", "size", "block"]


class Argument(NamedTuple):
    """One argument of a kernel: tensors come first, then sizes, then sizes of blocks."""

    name: str
    kind: Kind


def arguments(*names: str, kind: Kind = "number") -> tuple[Argument, ...]:
    return tuple(Argument(name, kind) for name in names)


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        warps: of 32 threads, for each program of the grid.
        blocks: values of the arguments that are sizes of blocks.
    """

    warps: int
    blocks: tuple[tuple[str, int], ...] = ()

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]


class Launch(Protocol):
    """Runs a kernel over ``programs(config)`` programs; ``operands`` are its arguments less the sizes of blocks."""

    def __call__(self, programs: Callable[[Config], int], operands: Sequence[Any]) -> None: ...


class TritonKernel(ABC):
    """One printed kernel."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """First part of its name."""

    @property
    @abstractmethod
    def about(self) -> str:
        """One line of comment."""

    @property
    @abstractmethod
    def arguments(self) -> tuple[Argument, ...]:
        """In order."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Arguments that may be None."""
        return ()

    @property
    @abstractmethod
    def configs(self) -> tuple[Config, ...]:
        """How it may be launched; the first where nobody measured."""

    @property
    @abstractmethod
    def storage(self) -> str:
        """The type of numbers in memory: float32, float64, or bfloat16, which is computed with in float32."""

    @abstractmethod
    def inside(self) -> list[str]:
        """The statements."""

    @abstractmethod
    def run(self, launch: Launch, *operands: Any) -> Any:
        """Makes the results on the device of contiguous operands and launches the kernel that fills them."""

    @property
    def dtype(self) -> str:
        """The type that is computed in."""
        return "float32" if self.storage == "bfloat16" else self.storage

    @cached_property
    def name(self) -> str:
        """An identifier that two kernels share only if they are the same."""
        return f"{self.kind}_{hashlib.sha256(self._body.encode()).hexdigest()[:16]}"

    @cached_property
    def source(self) -> str:
        """A module with one function of this name; it wants ``triton`` and ``tl`` among its globals."""
        return self._body.replace("KERNEL", self.name)

    @cached_property
    def _body(self) -> str:
        given = [f"{a.name}: tl.constexpr" if a.kind == "block" else a.name for a in self.arguments]
        sizes = ", ".join(f'"{a.name}"' for a in self.arguments if a.kind == "size")
        return "\n".join(
            [
                f"# {self.about}, {self.storage}",
                f"@triton.jit(do_not_specialize=[{sizes}])",
                f"def KERNEL({', '.join(given)}):",
                *(f"    {line}" for line in self.inside()),
                "",
            ]
        )


@dataclass(frozen=True)
class Lane:
    """What a program of the grid holds at once.

    Attributes:
        name: of the variable with the numbers of the lanes.
        width: number of lanes, a power of two, or the argument that says it.
        storage: as of the kernel.
        mask: which lanes there are; empty where all.
    """

    name: str
    width: int | str
    storage: str
    mask: str = ""

    @classmethod
    def of(cls, channels: int, storage: str) -> Lane:
        """Lanes ``arange(0, width)`` for channels: the next power of two, of which ``channels`` exist."""
        width = 1 << max(channels - 1, 0).bit_length()
        return cls(f"c{channels}", width, storage, "" if width == channels else f"c{channels} < {channels}")

    @property
    def numbers(self) -> str:
        """The statement that defines the numbers of channels."""
        return f"{self.name} = tl.arange(0, {self.width})"

    @property
    def zeros(self) -> str:
        return f"tl.zeros([{self.width}], {self._type})"

    def constant(self, number: float) -> str:
        """``number`` in every lane; as a plain number it would be rounded to float32 on its own."""
        return f"tl.full([{self.width}], {number!r}, {self._type})"

    def load(self, address: str, stride: int = 1) -> str:
        """What is at ``address`` for lane 0, and for every other lane ``stride`` numbers further on."""
        masked = f", mask={self.mask}, other=0.0" if self.mask else ""
        return f"tl.load({address} + {self._apart(stride)}{masked}){self._widened}"

    def scalar(self, address: str) -> str:
        return f"tl.load({address}){self._widened}"

    def store(self, address: str, value: str, stride: int = 1) -> str:
        masked = f", mask={self.mask}" if self.mask else ""
        return f"tl.store({address} + {self._apart(stride)}, {value}{masked})"

    def _apart(self, stride: int) -> str:
        return self.name if stride == 1 else f"{self.name} * {stride}"

    @property
    def _type(self) -> str:
        return TYPES["float32" if self.storage == "bfloat16" else self.storage]

    @property
    def _widened(self) -> str:
        return f".to({self._type})" if self.storage == "bfloat16" else ""


def statements(
    lanes: Lanes,
    addresses: Mapping[str, tuple[str, int]],
    registers: Mapping[str, str],
    lane: Lane,
    prefix: str = "t",
) -> list[str]:
    """One Triton statement for each live instruction.

    Args:
        addresses: for each array in memory the address of a row for lane 0, or of an element for ``scalar``, with
            ``{row}`` for its number, e.g. ``"x + {row} * 32"``, and how many numbers lanes are apart.
        registers: for each array that is kept in variables the name of such a variable, e.g. ``"sum_{row}"``.
        lane: what a vector consists of.
        prefix: of the names of the values.
    """
    lines = []

    def read(value: Value) -> str:
        made = lanes.code[value]
        if made.operation == "constant":  # in place: a variable would be float32, whatever it meets
            return repr(made.number)
        if made.operation in ("load", "scalar") and made.array in registers:
            return registers[made.array].format(row=made.at)
        return f"{prefix}{value}"

    for at in lanes.needed():
        made = lanes.code[at]
        operands = [read(o) for o in made.operands]
        place, stride = addresses.get(made.array, ("", 1))
        place = place.format(row=made.at)
        match made.operation:
            case "load" if made.array not in registers:
                lines.append(f"{prefix}{at} = {lane.load(place, stride)}")
            case "scalar" if made.array not in registers:
                lines.append(f"{prefix}{at} = {lane.scalar(place)}")
            case "add":
                lines.append(f"{prefix}{at} = {operands[0]} + {operands[1]}")
            case "mul":
                lines.append(f"{prefix}{at} = {operands[0]} * {operands[1]}")
            case "fma":
                lines.append(f"{prefix}{at} = {operands[0]} * {operands[1]} + {operands[2]}")
            case "accumulate":
                lines.append(f"{registers[made.array].format(row=made.at)} += {operands[0]}")
            case "store":
                value = lanes.code[made.operands[0]]
                constant = value.operation == "constant"
                lines.append(lane.store(place, lane.constant(value.number) if constant else operands[0], stride))
    return lines


def by_width(width: int, each: int) -> tuple[Config, ...]:
    """Numbers of warps for blocks of ``width`` lanes; first the one that gives each thread ``each`` of them."""
    best = max(1, min(WARPS[-1], width // (THREADS * each)))
    return tuple(map(Config, sorted((w for w in WARPS if w * THREADS <= max(width, THREADS)), key=lambda w: w != best)))
