"""Triton for equivariant linear maps and products with scalars: tiles of matrix products, on rows in e3nn's layout.

A row of the matrix is a component of an atom, (atom, k); a column is an output channel.  The tiles of all segments of
the result are one grid.  Scalars x2 that are zero for all atoms of a tile cost one test, so that one-hot species cost
as many products as a tile has species.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.irreps import dim, segments
from .linear import TYPES as NAMES
from .linear import LinearKernel, ScalarProductKernel
from .triton_printer import TYPES, Argument, Config, Launch, TritonKernel, arguments


@dataclass(frozen=True)
class Part:
    """What one segment of the result needs: the segments that it reads, one below the other, and their weights.

    Attributes:
        at, channels, components: of the segment of the result.
        reads: segments of x.
        weights: where its matrix [channels that it reads, channels] begins among the packed weights.
    """

    at: int
    channels: int
    components: int
    reads: tuple[int, ...]
    weights: int


@dataclass(frozen=True)
class TritonLinear(TritonKernel):
    """The Triton text of a linear map, or of a product with scalars; both have transposes.

    Attributes:
        kernel: what is computed.
    """

    kernel: LinearKernel | ScalarProductKernel

    @property
    def kind(self) -> str:
        return "scalar_product" if self.kernel.map.scalars else "linear"

    @property
    def about(self) -> str:
        found = self.kernel.map
        species = f", weights mixed by {found.scalars} scalars" if found.scalars else ""
        return f"linear map of {found.irreps_in} to {found.irreps_out}, {found.weights} weights{species}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        scalars = arguments("mix") if self.kernel.map.scalars else ()
        blocks = [Argument(name, "block") for name in "MNK"]
        return (*arguments("x"), *scalars, *arguments("packed", "y"), Argument("rows", "size"), *blocks)

    @property
    def storage(self) -> str:
        return NAMES[self.kernel.dtype]

    @property
    def configs(self) -> tuple[Config, ...]:
        sizes = ((4, 32, 32, 16), (4, 64, 32, 16), (4, 64, 64, 16), (8, 64, 64, 32), (2, 32, 32, 16), (2, 16, 32, 32))
        return tuple(Config(warps, (("M", m), ("N", n), ("K", k))) for warps, m, n, k in sizes)

    @property
    def parts(self) -> tuple[tuple[Part, ...], int]:
        """What each segment of the result needs, and the number of packed weights for one scalar."""
        found, at = [], 0
        ins = segments(self.kernel.map.irreps_in)
        for o, (first, channels, l, _) in enumerate(segments(self.kernel.map.irreps_out)):
            reads = tuple(sorted({b.i for b in self.kernel.map.blocks if b.o == o}))
            found.append(Part(first, channels, 2 * l + 1, reads, at))
            at += sum(ins[i][1] for i in reads) * channels
        return tuple(found), at

    def pack(self, weight: Tensor) -> Tensor:
        """The weights [weights] as the kernel reads them, [scalars or 1, packed], with their coefficients."""
        ins, (parts, count) = segments(self.kernel.map.irreps_in), self.parts
        weight = weight.detach().contiguous()
        packed = weight.new_zeros((self.kernel.map.scalars or 1, count))
        for b in self.kernel.map.blocks:
            part, channels = parts[b.o], ins[b.i][1]
            at = part.weights + sum(ins[i][1] for i in part.reads if i < b.i) * part.channels
            place = packed[b.first : b.first + b.columns, at : at + channels * part.channels]
            block = torch.as_strided(weight, (b.columns, channels, part.channels), (b.sv, b.su, b.sw), b.weight)
            place += (block * b.coefficient).flatten(1)
        return packed

    def inside(self) -> list[str]:
        parts, count = self.parts
        lines = ["tile = tl.program_id(0).to(tl.int64)", "rows = rows.to(tl.int64)"]
        lines += [f"{name.lower()} = tl.arange(0, {name})" for name in "MNK"]
        for number, part in enumerate(parts):
            tiles = f"tl.cdiv(rows * {part.components}, M) * tl.cdiv({part.channels}, N)"
            body = [line.replace("#", str(number)) for line in self._tile(part, count)]
            lines += [
                f"tiles{number} = {tiles}",
                f"if (tile >= 0) & (tile < tiles{number}):",
                *(f"    {line}" for line in body),
                f"tile -= tiles{number}",
            ]
        return lines

    def _tile(self, part: Part, count: int) -> list[str]:
        """One tile of a segment; ``#`` stands for its number."""
        found, ins = self.kernel.map, segments(self.kernel.map.irreps_in)
        dot, scalars, at, columns = [], found.scalars, part.weights, part.channels
        factor = " * z#[:, None]" if scalars else ""
        weights = f"packed + v# * {count}" if scalars else "packed"
        for i in part.reads:
            first, channels, _, _ = ins[i]
            dot += [
                f"for u# in range(0, {channels}, K):",
                f"    there# = u# + k < {channels}",
                f"    x# = x + (a# * {dim(found.irreps_in)} + part# + {first})[:, None]",
                f"    x# += ((u# + k) * {part.components})[None, :]",
                "    left# = tl.load(x#, mask=inside#[:, None] & there#[None, :], other=0.0)" + factor,
                f"    w# = {weights} + {at} + ((u# + k) * {columns})[:, None] + column#[None, :]",
                f"    right# = tl.load(w#, mask=there#[:, None] & (column# < {columns})[None, :], other=0.0)",
                # tensor cores would round float32 to ten bits
                f'    sum# = tl.dot(left#, right#, sum#, input_precision="ieee", out_dtype={TYPES[self.storage]})',
            ]
            at += channels * columns
        if scalars:
            dot = [
                f"for v# in range({scalars}):",
                f"    z# = tl.load(mix + a# * {scalars} + v#, mask=inside#, other=0.0)",
                "    if tl.max((z# != 0).to(tl.int32), axis=0) > 0:",
                *(f"        {line}" for line in dot),
            ]
        return [
            f"across# = tl.cdiv({columns}, N)",
            "row# = tile // across# * M + m",
            "column# = tile % across# * N + n",
            f"inside# = row# < rows * {part.components}",
            f"a# = row# // {part.components}",
            f"part# = row# % {part.components}",
            f"sum# = tl.zeros([M, N], {TYPES[self.storage]})",
            *(dot if part.reads else []),
            f"y# = y + (a# * {dim(found.irreps_out)} + part# + {part.at})[:, None]",
            f"y# += (column# * {part.components})[None, :]",
            f"tl.store(y#, sum#, mask=inside#[:, None] & (column# < {columns})[None, :])",
        ]

    def run(self, launch: Launch, *operands: Any) -> Tensor:
        """x [rows, columns], x2 [rows, scalars] where there are any, and packed weights -> [rows, columns]."""
        x = operands[0]
        rows, (parts, _) = x.shape[0], self.parts
        y = x.new_empty((rows, dim(self.kernel.map.irreps_out)))

        def programs(config: Config) -> int:
            return sum(-(-rows * p.components // config["M"]) * -(-p.channels // config["N"]) for p in parts)

        launch(programs, (*operands, y, rows))
        return y
