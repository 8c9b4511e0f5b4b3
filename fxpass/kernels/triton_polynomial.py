"""Triton for the op ``polynomial`` of one channel without weights, as of spherical harmonics: rows are lanes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .polynomial import PolynomialKernel
from .triton_printer import Argument, Config, Lane, Launch, TritonKernel, arguments, statements


@dataclass(frozen=True)
class TritonPolynomial(TritonKernel):
    """The Triton text of a polynomial or of its gradient.

    Attributes:
        kernel: what is computed, with the program of a row.
    """

    kernel: PolynomialKernel

    @property
    def kind(self) -> str:
        return "polynomial_gradient" if self.kernel.gradient else "polynomial"

    @property
    def about(self) -> str:
        found = self.kernel.polynomial
        what = "gradient of the polynomials" if self.kernel.gradient else "polynomials"
        return f"{what} of {found.irreps_in} to {found.irreps_out}, {len(found.monomials)} monomials"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        g = arguments("g") if self.kernel.gradient else ()
        sizes = (Argument("rows", "size"), Argument("BLOCK", "block"))
        return (*arguments("x"), *g, *arguments("result"), *sizes)

    @property
    def storage(self) -> str:
        return self.kernel.dtype

    @property
    def configs(self) -> tuple[Config, ...]:
        sizes = ((4, 128), (2, 64), (1, 32), (8, 256), (4, 256))
        return tuple(Config(warps, (("BLOCK", block),)) for warps, block in sizes)

    @property
    def _columns(self) -> int:
        return self.kernel.polynomial.variables if self.kernel.gradient else self.kernel.outputs

    def inside(self) -> list[str]:
        widths = {"x": self.kernel.polynomial.variables, "g": self.kernel.outputs, "result": self._columns}
        lane = Lane("r", "BLOCK", self.storage, "r < rows")
        return [
            "r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
            *statements(self.kernel.program, {k: (f"{k} + {{row}}", width) for k, width in widths.items()}, {}, lane),
        ]

    def run(self, launch: Launch, *operands: Any) -> Tensor:
        """x [rows, 1, variables] and, for the gradient, g [rows, 1, outputs] -> [rows, 1, columns]."""
        rows = operands[0].shape[0]
        result = operands[0].new_empty((rows, 1, self._columns))
        launch(lambda config: -(-rows // config["BLOCK"]), (*operands, result, rows))
        return result
