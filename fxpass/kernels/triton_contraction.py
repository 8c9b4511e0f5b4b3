"""Triton for the ops ``contraction`` and ``contraction_gradient``: one program for each atom, channels are lanes.

Variables and results stay in registers; the coefficients of the atom's species are read once each, all channels side by
side, and programs of one species find them in a near cache.  Triton takes time that grows faster than the number of
reads of a kernel, so that long polynomials are several kernels, each of which adds to what the one before it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .contraction import PART_BYTES, ContractionKernel
from .lanes import Lanes
from .triton_printer import Argument, Config, Lane, Launch, TritonKernel, arguments, by_width, statements

#: of one kernel
MOST_TERMS = 128


@dataclass(frozen=True)
class TritonContraction(TritonKernel):
    """The Triton text of one part of a contraction or of its gradient.

    Attributes:
        kernel: what is computed.
        number: of the part.
    """

    kernel: ContractionKernel
    number: int = 0

    @classmethod
    def parts(cls, kernel: ContractionKernel) -> tuple[TritonContraction, ...]:
        """All parts, in order; one where there are no terms."""
        return tuple(cls(kernel, number) for number in range(max(len(_programs(kernel)), 1)))

    @property
    def kind(self) -> str:
        return "contraction_gradient" if self.kernel.gradient else "contraction"

    @property
    def about(self) -> str:
        found = self.kernel.contraction
        what = "gradient of the contraction" if self.kernel.gradient else "contraction"
        count = max(len(_programs(self.kernel)), 1)
        part = f", part {self.number + 1} of {count}" if count > 1 else ""
        return f"{what} of {found.irreps_in} to {found.irreps_out}, {len(found.terms)} terms{part}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        g = arguments("g") if self.kernel.gradient else ()
        before = arguments("before") if self.number else ()
        index = arguments("index", kind="index")
        return (*arguments("x"), *index, *arguments("terms"), *g, *before, *arguments("result"))

    @property
    def storage(self) -> str:
        return self.kernel.dtype

    @property
    def configs(self) -> tuple[Config, ...]:
        return by_width(int(self._lane.width), 1)

    @property
    def _lane(self) -> Lane:
        return Lane.of(self.kernel.channels, self.storage)

    @property
    def _columns(self) -> int:
        found = self.kernel.contraction
        return found.variables if self.kernel.gradient else found.outputs

    def inside(self) -> list[str]:
        found, channels, lane, columns = self.kernel.contraction, self.kernel.channels, self._lane, self._columns
        given = {"x": found.variables} | ({"g": found.outputs} if self.kernel.gradient else {})
        program = _programs(self.kernel)[self.number : self.number + 1]
        needed = {(i.array, i.at) for lanes in program for i in lanes.live() if i.operation == "load"}
        registers = {"x": "x_{row}", "g": "g_{row}", "result": "result_{row}"}
        addresses = {"terms": (f"terms_n + {{row}} * {channels}", 1)}
        row = f"n * {channels * columns}"
        return [
            lane.numbers,
            "n = tl.program_id(0).to(tl.int64)",
            f"terms_n = terms + tl.load(index + n) * {len(found.terms) * channels}",
            *(
                f"{name}_{i} = {lane.load(f'{name} + n * {channels * width} + {i}', width)}"
                for name, width in given.items()
                for i in range(width)
                if (name, i) in needed
            ),
            *(
                f"result_{i} = {lane.load(f'before + {row} + {i}', columns) if self.number else lane.zeros}"
                for i in range(columns)
            ),
            *(line for lanes in program for line in statements(lanes, addresses, registers, lane)),
            *(lane.store(f"result + {row} + {i}", f"result_{i}", columns) for i in range(columns)),
        ]

    def run(self, launch: Launch, *operands: Any) -> Tensor:
        """As the op: x [atoms, channels, variables], index, terms, g for the gradient, and what the part before made.

        The result is another tensor than that, so that a kernel may run again on the same operands.
        """
        atoms = operands[0].shape[0]
        result = operands[0].new_empty((atoms, self.kernel.channels, self._columns))
        launch(lambda config: atoms, (*operands, result))
        return result


def one_after_another(parts: Sequence[Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """The bound parts of one contraction as one function."""

    def run(*operands: Tensor) -> Tensor:
        result = parts[0](*operands)
        for part in parts[1:]:
            result = part(*operands, result)
        return result

    return run


def _programs(kernel: ContractionKernel) -> tuple[Lanes, ...]:
    # what is computed depends on no number of channels; this many make parts of so many terms
    return replace(kernel, channels=PART_BYTES // (4 * MOST_TERMS), dtype="float32").parts
