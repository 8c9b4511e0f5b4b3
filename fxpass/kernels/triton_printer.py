"""Triton for the same programs over lanes as the C++: a block of channels, masked, in place of a compiler vector.

One program of the grid does one row of atoms and loops over its edges; what it sums up stays in registers, and no two
programs write to one place.  This is text alone: nothing here needs Triton.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..algebra.irreps import dim, segments
from ..algebra.piecewise import COARSE, Grid
from .convolution import ConvolutionKernel
from .lanes import Lanes, Value

TYPES = {"float32": "tl.float32", "float64": "tl.float64"}


@dataclass(frozen=True)
class Lane:
    """The channels that a program of the grid holds at once: ``arange(0, width)``, of which ``channels`` exist."""

    channels: int

    @property
    def width(self) -> int:
        """The next power of two."""
        return 1 << max(self.channels - 1, 0).bit_length()

    @property
    def name(self) -> str:
        return f"c{self.channels}"

    def load(self, address: str, stride: int = 1) -> str:
        """What is at ``address`` for channel 0, and for every other channel ``stride`` numbers further on."""
        other = ", other=0.0" if self._mask else ""
        return f"tl.load({address} + {self._apart(stride)}{self._mask}{other})"

    def store(self, address: str, value: str, stride: int = 1) -> str:
        return f"tl.store({address} + {self._apart(stride)}, {value}{self._mask})"

    def _apart(self, stride: int) -> str:
        return self.name if stride == 1 else f"{self.name} * {stride}"

    @property
    def _mask(self) -> str:
        return "" if self.width == self.channels else f", mask={self.name} < {self.channels}"


def statements(
    lanes: Lanes, addresses: Mapping[str, str], registers: Mapping[str, str], lane: Lane, prefix: str = "t"
) -> list[str]:
    """One Triton statement for each live instruction.

    Args:
        addresses: for each array in memory the address of a row, without the lane, or of an element for ``scalar``,
            with ``{row}`` for its number, e.g. ``"x + {row} * 32"``.
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
        match made.operation:
            case "load" if made.array not in registers:
                lines.append(f"{prefix}{at} = {lane.load(addresses[made.array].format(row=made.at))}")
            case "scalar" if made.array not in registers:
                lines.append(f"{prefix}{at} = tl.load({addresses[made.array].format(row=made.at)})")
            case "add":
                lines.append(f"{prefix}{at} = {operands[0]} + {operands[1]}")
            case "mul":
                lines.append(f"{prefix}{at} = {operands[0]} * {operands[1]}")
            case "fma":
                lines.append(f"{prefix}{at} = {operands[0]} * {operands[1]} + {operands[2]}")
            case "accumulate":
                lines.append(f"{registers[made.array].format(row=made.at)} += {operands[0]}")
            case "store":
                lines.append(lane.store(addresses[made.array].format(row=made.at), operands[0]))
    return lines


@dataclass(frozen=True)
class TritonConvolution:
    """The Triton text of a convolution or of its gradient.

    Attributes:
        kernel: what is computed, with the programs of its edges.
    """

    kernel: ConvolutionKernel

    @cached_property
    def name(self) -> str:
        """An identifier that two kernels share only if they are the same."""
        return f"convolution_{hashlib.sha256(self._body.encode()).hexdigest()[:16]}"

    @cached_property
    def source(self) -> str:
        """A module with one function of this name; it wants ``triton`` and ``tl`` among its globals."""
        return self._body.replace("KERNEL", self.name)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments, in order; ``species`` and ``coefficients`` may be None."""
        operands = ("radial", "species", "coefficients")
        if self.kernel.gradient:
            return ("x", "y", "g", *operands, "receiver", "order", "to_x", "to_y", "to_radial", "atoms")
        return ("x", "y", *operands, "sender", "order", "out", "size")

    @property
    def warps(self) -> int:
        """Of 32 threads for each program of the grid.

        A thread holds one channel, which takes the fewest registers; in the gradient two, because what is summed over
        channels crosses from warp to warp through shared memory.
        """
        width = max(lane.width for lane in self._lanes)
        return max(1, min(8, width // (64 if self.kernel.gradient else 32)))

    @cached_property
    def _body(self) -> str:
        tp = self.kernel.product
        rows = "atoms" if self.kernel.gradient else "size"
        inside = [
            *(f"{lane.name} = tl.arange(0, {lane.width})" for lane in self._lanes),
            "n = tl.program_id(0).to(tl.int64)",
            *(self._gradient() if self.kernel.gradient else self._forward()),
        ]
        return "\n".join(
            [
                f"# {'gradient of the ' if self.kernel.gradient else ''}convolution of {tp.irreps1} with {tp.irreps2}",
                f"# to {tp.irreps_out}, {len(tp.paths)} paths, {tp.weights} weights for each edge, {self.kernel.dtype}",
                f'@triton.jit(do_not_specialize=["{rows}"])',
                f"def KERNEL({', '.join(self.arguments)}):",
                *(f"    {line}" for line in inside),
                "",
            ]
        )

    @cached_property
    def _lanes(self) -> tuple[Lane, ...]:
        tp = self.kernel.product
        counts = {channels for irreps in (tp.irreps1, tp.irreps_out) for _, channels, _, _ in segments(irreps)}
        return tuple(map(Lane, sorted(counts)))

    def _programs(self) -> Iterator[tuple[Lane, Lanes]]:
        """What an edge does: for each number of channels one program for all paths that have it."""
        kernel = self.kernel
        for channels, paths in kernel.paths().items():
            lanes = Lanes()
            for path in paths:
                (kernel.add_gradient if kernel.gradient else kernel.add_forward)(lanes, path)
            yield Lane(channels), lanes

    def _rows(self, letter: str, irreps: str) -> Iterator[tuple[str, Lane, int, int]]:
        """Of each component of each segment: its variable, its lane, and offset and stride of its channels in a row."""
        for s, (offset, channels, l, _) in enumerate(segments(irreps)):
            for k in range(2 * l + 1):
                yield f"{letter}{s}_{k}", Lane(channels), offset + k, 2 * l + 1

    def _load(self, letter: str, irreps: str, row: str) -> list[str]:
        """Variables with all components of a row of features."""
        found = self._rows(letter, irreps)
        return [f"{name} = {lane.load(f'{row} + {at}', stride)}" for name, lane, at, stride in found]

    def _zeros(self, lane: Lane) -> str:
        return f"tl.zeros([{lane.width}], {TYPES[self.kernel.dtype]})"

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

    def _addresses(self) -> dict[str, str]:
        tp = self.kernel.product
        weights = {path.weight for path in tp.paths if path.weight >= 0}
        return {"y": "ye + {row}", **{f"w{w}": f"we + {{row}} * {tp.weights} + {w}" for w in weights}}

    def _registers(self, lane: Lane) -> dict[str, str]:
        tp = self.kernel.product
        found = {"u": "u", "gy": f"gy{lane.channels}_{{row}}", "gr": f"gr{lane.channels}"}
        for letter, irreps in (("x", tp.irreps1), ("o", tp.irreps_out)):
            for s, _ in enumerate(segments(irreps)):
                found |= {f"{letter}{s}": f"{letter}{s}_{{row}}", f"g{letter}{s}": f"g{letter}{s}_{{row}}"}
        return found | {f"gw{path.weight}": f"gw{path.weight}" for path in tp.paths}

    def _forward(self) -> list[str]:
        tp = self.kernel.product
        edge = self._load("x", tp.irreps1, "xe")
        for lane, lanes in self._programs():
            edge += statements(lanes, self._addresses(), self._registers(lane), lane, f"t{lane.channels}_")
        out = list(self._rows("go", tp.irreps_out))
        return [
            *(f"{name} = {self._zeros(lane)}" for name, lane, _, _ in out),
            *self._loop("size", [f"xe = x + tl.load(sender + e) * {dim(tp.irreps1)}", *edge]),
            f"on = out + n * {dim(tp.irreps_out)}",
            *(lane.store(f"on + {at}", name, stride) for name, lane, at, stride in out),
        ]

    def _gradient(self) -> list[str]:
        tp, (by_x, by_y, by_radial) = self.kernel.product, self.kernel.needs
        edge, write = self._load("o", tp.irreps_out, "ge"), []
        columns: dict[int, list[str]] = {}
        slopes: list[str] = []
        for lane, lanes in self._programs():
            kept = {i.array: lane for i in lanes.live() if i.operation == "accumulate" and i.array.startswith("gw")}
            rows = sorted({i.at for i in lanes.live() if i.operation == "accumulate" and i.array == "gy"})
            radial = any(i.array == "gr" for i in lanes.live())
            names = [f"gy{lane.channels}_{row}" for row in rows] + [f"gr{lane.channels}"] * radial + list(kept)
            edge += [f"{name} = {self._zeros(lane)}" for name in names]
            edge += statements(lanes, self._addresses(), self._registers(lane), lane, f"t{lane.channels}_")
            for row in rows:
                columns.setdefault(row, []).append(f"tl.sum(gy{lane.channels}_{row}, axis=0)")
            slopes += [f"tl.sum(gr{lane.channels}, axis=0)"] * radial
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
            *(f"{name} = {self._zeros(lane)}" for name, lane, _, _ in sums_x),
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
