"""Triton for the fused convolution and its gradient: one program for each atom, which loops over its edges.

Channels are lanes, and what is summed up stays in registers.  Features, Y_lm and given weights may be bfloat16; sums
and tables are then float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.irreps import dim, segments
from ..algebra.piecewise import COARSE, Grid
from ..errors import KernelError
from .convolution import ConvolutionKernel
from .lanes import Lanes
from .triton_printer import Argument, Config, Kind, Lane, Launch, TritonKernel, arguments, by_width, statements


@dataclass(frozen=True)
class TritonConvolution(TritonKernel):
    """The Triton text of a convolution or of its gradient.

    Attributes:
        kernel: what is computed, with the programs of its edges.
        narrow: features, Y_lm, given weights and results are bfloat16; the kernel's dtype is float32.
    """

    kernel: ConvolutionKernel
    narrow: bool = False

    def __post_init__(self) -> None:
        if self.narrow and self.kernel.dtype != "float32":
            raise KernelError(f"What is stored as bfloat16 is computed with in float32, not {self.kernel.dtype}.")

    @property
    def kind(self) -> str:
        return "convolution_gradient" if self.kernel.gradient else "convolution"

    @property
    def about(self) -> str:
        tp = self.kernel.product
        what = f"{'gradient of the ' if self.kernel.gradient else ''}convolution of {tp.irreps1} with {tp.irreps2}"
        return f"{what} to {tp.irreps_out}, {len(tp.paths)} paths, {tp.weights} weights for each edge"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        table: Kind = "number" if self.kernel.grid is None else "wide"
        operands = (
            *arguments("radial", kind=table),
            *arguments("species", kind="index"),
            *arguments("coefficients", kind="wide"),
        )
        if not self.kernel.gradient:
            indices = arguments("sender", "order", kind="index")
            return (*arguments("x", "y"), *operands, *indices, *arguments("out"), Argument("size", "size"))
        indices = arguments("receiver", "order", kind="index")
        results = (*arguments("to_x", "to_y"), *arguments("to_radial", kind=table))
        return (*arguments("x", "y", "g"), *operands, *indices, *results, Argument("atoms", "size"))

    @property
    def optional(self) -> tuple[str, ...]:
        return ("species", "coefficients")

    @property
    def storage(self) -> str:
        return "bfloat16" if self.narrow else self.kernel.dtype

    @property
    def configs(self) -> tuple[Config, ...]:
        """A thread holds one channel, which takes the fewest registers; in the gradient two, because what is summed
        over channels crosses from warp to warp through shared memory."""
        return by_width(max(int(lane.width) for lane in self._lanes), 2 if self.kernel.gradient else 1)

    def inside(self) -> list[str]:
        return [
            *(lane.numbers for lane in self._lanes),
            "n = tl.program_id(0).to(tl.int64)",
            *(self._gradient() if self.kernel.gradient else self._forward()),
        ]

    def run(self, launch: Launch, *operands: Any) -> Any:
        """With the arguments of the op less its texts, as ``ConvolutionKernel.bind`` gives it.

        Indices are int64, ``coefficients`` are as ``convolution.pack`` makes them, distances of their type.
        """
        return self._run_gradient(launch, *operands) if self.kernel.gradient else self._run_forward(launch, *operands)

    def _run_forward(
        self,
        launch: Launch,
        x: Tensor,
        y: Tensor,
        radial: Tensor,
        species: Tensor | None,
        coefficients: Tensor | None,
        sender: Tensor,
        receiver: Tensor,
        order: Tensor,
        size: int,
    ) -> Tensor:
        out = x.new_empty((size, dim(self.kernel.product.irreps_out)))
        launch(lambda config: size, (x, y, radial, species, coefficients, sender, order, out, size))
        return out

    def _run_gradient(
        self,
        launch: Launch,
        x: Tensor,
        y: Tensor,
        g: Tensor,
        radial: Tensor,
        species: Tensor | None,
        coefficients: Tensor | None,
        sender: Tensor,
        receiver: Tensor,
        order: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        makers = (torch.empty_like, torch.empty_like, torch.zeros_like)  # zeros: a weight may belong to no path
        slots = zip(makers, (x, y, radial), self.kernel.needs, strict=True)
        made = [make(t) if needed else t.new_empty(0) for make, t, needed in slots]
        atoms = x.shape[0]
        launch(lambda config: atoms, (x, y, g, radial, species, coefficients, receiver, order, *made, atoms))
        return made[0], made[1], made[2]

    @property
    def _lanes(self) -> tuple[Lane, ...]:
        tp = self.kernel.product
        counts = {channels for irreps in (tp.irreps1, tp.irreps_out) for _, channels, _, _ in segments(irreps)}
        return tuple(self._lane(channels) for channels in sorted(counts))

    def _lane(self, channels: int) -> Lane:
        return Lane.of(channels, self.storage)

    def _programs(self) -> Iterator[tuple[int, Lane, Lanes]]:
        """What an edge does: for each number of channels one program for all paths that have it."""
        kernel = self.kernel
        for channels, paths in kernel.paths().items():
            lanes = Lanes()
            for path in paths:
                (kernel.add_gradient if kernel.gradient else kernel.add_forward)(lanes, path)
            yield channels, self._lane(channels), lanes

    def _rows(self, letter: str, irreps: str) -> Iterator[tuple[str, Lane, int, int]]:
        """Of each component of each segment: its variable, its lane, and offset and stride of its channels in a row."""
        for s, (offset, channels, l, _) in enumerate(segments(irreps)):
            for k in range(2 * l + 1):
                yield f"{letter}{s}_{k}", self._lane(channels), offset + k, 2 * l + 1

    def _load(self, letter: str, irreps: str, row: str) -> list[str]:
        """Variables with all components of a row of features."""
        found = self._rows(letter, irreps)
        return [f"{name} = {lane.load(f'{row} + {at}', stride)}" for name, lane, at, stride in found]

    def _loop(self, rows: str, body: list[str]) -> list[str]:
        """``body`` for each edge e of atom n; the order of edges begins with ``rows`` + 1 offsets."""
        loop = ["for a in range(tl.load(order + n), tl.load(order + n + 1)):", f"e = tl.load(order + {rows} + 1 + a)"]
        return [loop[0], *(f"    {line}" for line in [loop[1], *self._edge(), *body])]

    def _edge(self) -> list[str]:
        """Addresses of what belongs to edge e, and its place in the table."""
        tp, grid = self.kernel.product, self.kernel.grid
        lines = [f"ye = y + e * {dim(tp.irreps2)}"]
        if grid is None:
            return [*lines, f"we = radial + e * {tp.weights}"]
        return [*lines, *_lookup(grid), f"we = coefficients + row * {(grid.order + 1) * tp.weights}"]

    def _addresses(self) -> dict[str, tuple[str, int]]:
        tp = self.kernel.product
        weights = {path.weight for path in tp.paths if path.weight >= 0}
        return {"y": ("ye + {row}", 1), **{f"w{w}": (f"we + {{row}} * {tp.weights} + {w}", 1) for w in weights}}

    def _registers(self, channels: int) -> dict[str, str]:
        tp = self.kernel.product
        found = {"u": "u", "gy": f"gy{channels}_{{row}}", "gr": f"gr{channels}"}
        for letter, irreps in (("x", tp.irreps1), ("o", tp.irreps_out)):
            for s, _ in enumerate(segments(irreps)):
                found |= {f"{letter}{s}": f"{letter}{s}_{{row}}", f"g{letter}{s}": f"g{letter}{s}_{{row}}"}
        return found | {f"gw{path.weight}": f"gw{path.weight}" for path in tp.paths}

    def _forward(self) -> list[str]:
        tp = self.kernel.product
        edge = self._load("x", tp.irreps1, "xe")
        for channels, lane, lanes in self._programs():
            edge += statements(lanes, self._addresses(), self._registers(channels), lane, f"t{channels}_")
        out = list(self._rows("go", tp.irreps_out))
        return [
            *(f"{name} = {lane.zeros}" for name, lane, _, _ in out),
            *self._loop("size", [f"xe = x + tl.load(sender + e) * {dim(tp.irreps1)}", *edge]),
            f"on = out + n * {dim(tp.irreps_out)}",
            *(lane.store(f"on + {at}", name, stride) for name, lane, at, stride in out),
        ]

    def _gradient(self) -> list[str]:
        tp, (by_x, by_y, by_radial) = self.kernel.product, self.kernel.needs
        edge, write = self._load("o", tp.irreps_out, "ge"), []
        columns: dict[int, list[str]] = {}
        slopes: list[str] = []
        for channels, lane, lanes in self._programs():
            kept = {i.array: lane for i in lanes.live() if i.operation == "accumulate" and i.array.startswith("gw")}
            rows = sorted({i.at for i in lanes.live() if i.operation == "accumulate" and i.array == "gy"})
            radial = any(i.array == "gr" for i in lanes.live())
            names = [f"gy{channels}_{row}" for row in rows] + [f"gr{channels}"] * radial + list(kept)
            edge += [f"{name} = {lane.zeros}" for name in names]
            edge += statements(lanes, self._addresses(), self._registers(channels), lane, f"t{channels}_")
            for row in rows:
                columns.setdefault(row, []).append(f"tl.sum(gy{channels}_{row}, axis=0)")
            slopes += [f"tl.sum(gr{channels}, axis=0)"] * radial
            write += [lane.store(f"to_radial + e * {tp.weights} + {name.removeprefix('gw')}", name) for name in kept]
        if by_y:
            sums = [" + ".join(columns.get(j, ["0.0"])) for j in range(dim(tp.irreps2))]
            write += [f"tl.store(to_y + e * {len(sums)} + {j}, {total})" for j, total in enumerate(sums)]
        if by_radial and self.kernel.grid is not None:
            total = f"({' + '.join(slopes)}) * rise" if slopes else "0.0"
            write.append(f"tl.store(to_radial + e, {total})")
        sums_x = list(self._rows("gx", tp.irreps1)) if by_x else []
        return [
            *self._load("x", tp.irreps1, f"x + n * {dim(tp.irreps1)}"),
            *(f"{name} = {lane.zeros}" for name, lane, _, _ in sums_x),
            *self._loop("atoms", [f"ge = g + tl.load(receiver + e) * {dim(tp.irreps_out)}", *edge, *write]),
            *(lane.store(f"to_x + n * {dim(tp.irreps1)} + {at}", name, s) for name, lane, at, s in sums_x),
        ]


def _lookup(grid: Grid) -> list[str]:
    """The row of the table that edge e falls into, the variable u within it, and du/dx; see ``ir.reference.table``."""
    per_step = grid.cells / (grid.end - grid.start)
    far = per_step / COARSE if grid.coarse else per_step
    lines = [
        "r = tl.load(radial + e)",
        *([f"r = tl.where(r > {grid.last!r}, {grid.last!r}, r)"] if grid.flat else []),
        f"cell = tl.minimum(tl.maximum(tl.floor((r - {grid.start!r}) * {per_step!r}), 0.0), {grid.cells - 1}.0)",
        f"cell = tl.where(r >= {grid.start!r}, cell, -1.0)",  # false for a NaN, which must not number a row
        f"u = ((r - {grid.start!r}) - cell * {grid.step!r}) * {per_step!r}",
        f"rise = r * 0.0 + {per_step!r}",
    ]
    if grid.coarse:
        lines += [
            f"beyond = (r - {grid.end!r}) * {far!r}",
            f"within = tl.minimum(tl.maximum(tl.floor(beyond), 0.0), {grid.coarse - 1}.0)",
            f"cell = tl.where(r >= {grid.end!r}, within + {grid.cells}.0, cell)",
            f"u = tl.where(r >= {grid.end!r}, beyond - within, u)",
            f"rise = tl.where(r >= {grid.end!r}, {far!r}, rise)",
        ]
    return [
        *lines,
        f"u = tl.where(r >= {grid.last!r}, (r - {grid.last!r}) * {far!r}, u)",
        f"row = tl.where(r >= {grid.last!r}, {grid.cells + grid.coarse}.0, cell).to(tl.int64) + 1",
        "if species is not None:",
        f"    row += tl.load(species + e) * {grid.rows}",
    ]
