"""C++ for the fused convolution and its gradient: one loop over the edges of each atom, channels as vector lanes.

For a receiver i, ``out_i = sum over its edges of TP(x_sender, Y, w(r))``.  With the Clebsch-Gordan coefficients C and
one channel count on either side, path p of an edge multiplies by a small matrix that all channels share,
``M_p[k, i] = sum_j C_p[i, j, k] Y_j``, and by its weight, which is read from the radial table.  The gradient runs
over the edges of each sender, reads the table again, and writes what belongs to the sender or to the edge: nothing
of size edges x channels x paths reaches memory, and no two threads write to one place.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algebra.irreps import clebsch_gordan, dim, segments
from ..algebra.multilinear import Path, TensorProduct
from ..algebra.piecewise import COARSE, Grid
from ..errors import KernelError
from .lanes import Lanes, Value, cpp, prelude

FORWARD = (False, False, False)
DTYPES = {torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True)
class ConvolutionKernel:
    """The source of one kernel, and how it is called.

    Attributes:
        product: paths of mode uvu or uvuv whose second operand has one channel; weights per edge.
        grid: of the radial table; None where the weights are given.
        dtype: ``"float32"`` or ``"float64"``.
        needs: gradients by x, y and radial that are made; none for the convolution itself.
    """

    product: TensorProduct
    grid: Grid | None
    dtype: str
    needs: tuple[bool, bool, bool] = FORWARD

    @property
    def gradient(self) -> bool:
        return self.needs != FORWARD

    @cached_property
    def name(self) -> str:
        """A C identifier that two kernels share only if they are the same."""
        return f"convolution_{hashlib.sha256(self.body.encode()).hexdigest()[:16]}"

    @cached_property
    def source(self) -> str:
        """The whole C++ file, with one function of this name."""
        return self.body.replace("KERNEL", self.name)

    @cached_property
    def body(self) -> str:
        tp = self.product
        head = [
            f"// {'gradient of the ' if self.gradient else ''}convolution of {tp.irreps1} with {tp.irreps2}",
            f"// to {tp.irreps_out}, {len(tp.paths)} paths, {tp.weights} weights for each edge",
            prelude(self.dtype),
            *_layout("X", tp.irreps1),
            *_layout("O", tp.irreps_out),
            f"static constexpr int64_t NY = {dim(tp.irreps2)}, NW = {tp.weights};",
            *([] if self.grid is None else _lookup(self.grid)),
        ]
        return "\n".join([*head, *(self._gradient() if self.gradient else self._forward())]) + "\n"

    def bind(self, library: ctypes.CDLL) -> Callable[..., Any]:
        """The function of the built library, with the arguments of the op less its texts.

        It takes contiguous tensors of ``dtype`` (indices int64) and ``coefficients`` as :func:`pack` makes them.
        """
        function = getattr(library, self.name)
        function.restype = ctypes.c_int
        function.argtypes = [ctypes.c_void_p] * (12 if self.gradient else 9) + [ctypes.c_int64] * 3 + [ctypes.c_int]
        scratch = getattr(library, f"{self.name}_scratch")  # torch allocates it, and counts it
        scratch.restype, scratch.argtypes = ctypes.c_int64, [ctypes.c_int64]
        columns = dim(self.product.irreps_out)

        def forward(
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
            out = x.new_empty((size, columns))
            lanes = x.new_empty(scratch(x.shape[0]))
            pointers = map(_address, (x, y, radial, species, coefficients, sender, order, out, lanes))
            _check(function(*pointers, size, x.shape[0], y.shape[0], torch.get_num_threads()))
            return out

        def gradient(
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
            slots = zip((x, y, radial), self.needs, strict=True)
            made = [torch.empty_like(t) if needed else x.new_empty(0) for t, needed in slots]
            lanes = x.new_empty(scratch(g.shape[0]))
            pointers = map(_address, (x, y, g, radial, species, coefficients, receiver, order, *made, lanes))
            _check(function(*pointers, x.shape[0], g.shape[0], y.shape[0], torch.get_num_threads()))
            return made[0], made[1], made[2]

        return gradient if self.gradient else forward

    # --- what an edge does

    def paths(self) -> dict[int, list[Path]]:
        """Paths by number of channels."""
        groups: dict[int, list[Path]] = {}
        for path in self.product.paths:
            groups.setdefault(self.product.sizes(path)["u"], []).append(path)
        return groups

    def _coupling(self, path: Path) -> np.ndarray:
        """C[i, j, k] with the coefficient of the path in it."""
        return clebsch_gordan(*self.product.degrees(path), self.product.rounding) * path.coefficient

    def _matrix(self, lanes: Lanes, path: Path) -> dict[tuple[int, int], Value]:
        """M[i, k], as far as it is not zero for every Y."""
        coupling, (at, _, _, _) = self._coupling(path), segments(self.product.irreps2)[path.i2]
        entries = {}
        for i, k in np.argwhere(np.any(coupling != 0, axis=1)):
            terms = [(lanes.constant(c), lanes.scalar("y", at + j)) for j, c in enumerate(coupling[i, :, k]) if c]
            entries[int(i), int(k)] = lanes.dot(terms)
        return entries

    def _weight(self, lanes: Lanes, path: Path, *, slope: bool) -> tuple[Value, Value]:
        """The weight of a path, and where asked for its derivative by u."""
        if path.weight < 0:
            return lanes.constant(1.0), lanes.constant(0.0)
        if self.grid is None:
            return lanes.load(f"w{path.weight}", 0), lanes.constant(0.0)
        u, value, rise = lanes.scalar("u", 0), lanes.constant(0.0), lanes.constant(0.0)
        for power in range(self.grid.order, -1, -1):  # Horner for the polynomial and its derivative at once
            if slope:
                rise = lanes.fma(rise, u, value)
            value = lanes.fma(value, u, lanes.load(f"w{path.weight}", power))
        return value, rise

    def _arrays(self, channels: int) -> dict[str, str]:
        """Addresses of what a group of paths reads and writes, for the lanes from c on."""
        width = f"padded({channels})"
        arrays = {"y": "ye + {row}", "u": "&u + {row}", "gy": "gy + {row} * W", "gr": "gr + {row}"}
        for prefix, irreps in (("x", self.product.irreps1), ("o", self.product.irreps_out)):
            for s, _ in enumerate(segments(irreps)):
                row = f"{prefix.upper()}{s} + {{row}} * {width} + c"
                arrays[f"{prefix}{s}"] = f"{prefix}e + {row}"
                arrays[f"g{prefix}{s}"] = f"g{prefix} + {row}"
        for path in self.product.paths:
            arrays[f"w{path.weight}"] = f"we + {{row}} * NW + {path.weight} + c"
            arrays[f"gw{path.weight}"] = f"gw + GW{path.weight} + c"
        return arrays

    def _groups(self, build: Callable[[Lanes, Path], None]) -> list[str]:
        """Loops over the lanes of every group of paths; what all lanes share is computed in front of them."""
        lines = []
        for channels, paths in self.paths().items():
            lanes = Lanes()
            for path in paths:
                build(lanes, path)
            arrays = self._arrays(channels)
            inside = cpp(lanes, arrays, uniform=False)
            lines += ["{", *cpp(lanes, arrays, uniform=True), f"for (int64_t c = 0; c < {channels}; c += W) {{"]
            lines += [f"  {line}" for line in inside] + ["}", "}"]
        return lines

    def add_forward(self, lanes: Lanes, path: Path) -> None:
        """What one path adds to its receiver."""
        matrix, (weight, _) = self._matrix(lanes, path), self._weight(lanes, path, slope=False)
        for k in sorted({k for _, k in matrix}):
            row = lanes.dot((m, lanes.load(f"x{path.i1}", i)) for (i, kk), m in matrix.items() if kk == k)
            lanes.accumulate(f"go{path.io}", k, lanes.mul(weight, row))

    def add_gradient(self, lanes: Lanes, path: Path) -> None:
        """What one path adds to the gradients of its sender and of its edge."""
        by_x, by_y, by_radial = self.needs
        coupling, (at, _, _, _) = self._coupling(path), segments(self.product.irreps2)[path.i2]
        weight, rise = self._weight(lanes, path, slope=by_radial)
        x = [lanes.load(f"x{path.i1}", i) for i in range(coupling.shape[0])]
        g = [lanes.load(f"o{path.io}", k) for k in range(coupling.shape[2])]
        if by_x or by_radial:
            matrix = self._matrix(lanes, path)
            back = {i: lanes.dot((m, g[k]) for (ii, k), m in matrix.items() if ii == i) for i in {i for i, _ in matrix}}
            if by_x:
                for i, value in sorted(back.items()):
                    lanes.accumulate(f"gx{path.i1}", i, lanes.mul(weight, value))
            if by_radial and path.weight >= 0:
                total = lanes.dot((x[i], value) for i, value in sorted(back.items()))
                if self.grid is None:
                    lanes.accumulate(f"gw{path.weight}", 0, total)
                else:
                    lanes.accumulate("gr", 0, lanes.mul(total, rise))
        if by_y:
            heavy = [lanes.mul(weight, value) for value in x]
            for j in range(coupling.shape[1]):
                pairs = np.argwhere(coupling[:, j, :] != 0)
                terms = [(lanes.constant(coupling[i, j, k]), lanes.mul(heavy[i], g[k])) for i, k in pairs]
                lanes.accumulate("gy", at + j, lanes.dot(terms))

    # --- the loops

    def _edge(self) -> list[str]:
        """What belongs to edge e: Y, and the row of the table or the weights."""
        y = "const T* __restrict__ ye = y + e * NY;"
        if self.grid is None:
            return [y, "memcpy(we, radial + e * NW, NW * sizeof(T));"]
        return [
            y,
            "int64_t row; T u, rise;",
            "cell(radial[e], row, u, rise);",
            "if (species) row += species[e] * ROWS;",
            f"const T* __restrict__ we = coefficients + row * {self.grid.order + 1} * NW;",
        ]

    def _forward(self) -> list[str]:
        weights = [] if self.grid else ["T we[NW + W] = {};"]
        return [
            'extern "C" int64_t KERNEL_scratch(int64_t rows) { return rows * XS; }  // numbers that xt takes',
            'extern "C" int KERNEL(const T* x, const T* y, const T* radial, const int64_t* species,',
            "    const T* coefficients, const int64_t* sender, const int64_t* order, T* out, T* xt,",
            "    int64_t size, int64_t atoms, int64_t edges, int threads) {",
            *_check_index("sender", "atoms"),
            "#pragma omp parallel num_threads(threads) if (threads > 1 && edges > 64)",
            "{",
            "#pragma omp for",
            "for (int64_t n = 0; n < atoms; n++) into_X(x + n * NX, xt + n * XS);",
            "alignas(64) T go[OS];",
            *weights,
            "#pragma omp for schedule(dynamic, 4)",
            "for (int64_t n = 0; n < size; n++) {",
            "memset(go, 0, sizeof go);",
            "for (int64_t a = order[n]; a < order[n + 1]; a++) {",
            "const int64_t e = order[size + 1 + a];",
            "const T* __restrict__ xe = xt + sender[e] * XS;",
            *self._edge(),
            *self._groups(self.add_forward),
            "}",
            "from_O(go, out + n * NO);",
            "}",
            "}",
            "return 0;",
            "}",
        ]

    def _gradient(self) -> list[str]:
        by_x, by_y, by_radial = self.needs
        weights = [p for p in self.product.paths if p.weight >= 0]
        local = [] if self.grid else ["T we[NW + W] = {};"]
        clear, write = [], []
        if by_y:
            local.append("alignas(64) T gy[NY * W];")
            clear.append("memset(gy, 0, sizeof gy);")
            write.append("for (int64_t j = 0; j < NY; j++) to_y[e * NY + j] = total(gy + j * W);")
        if by_radial and self.grid:
            local.append("alignas(64) T gr[W];")
            clear.append("memset(gr, 0, sizeof gr);")
            write.append("to_radial[e] = total(gr) * rise;")
        elif by_radial:
            places = {p.weight: self.product.sizes(p)["u"] for p in weights}
            lines, at = [], "0"
            for weight, channels in places.items():
                lines.append(f"static constexpr int64_t GW{weight} = {at};")
                at = f"GW{weight} + padded({channels})"
                write.append(f"memcpy(to_radial + e * NW + {weight}, gw + GW{weight}, {channels} * sizeof(T));")
            local = [*lines, f"alignas(64) T gw[{at}];", *local]
            clear.append("memset(gw, 0, sizeof gw);")
            gaps = self.product.weights - sum(places.values())
            write[:0] = ["memset(to_radial + e * NW, 0, NW * sizeof(T));"] if gaps else []
        return [
            "static inline T total(const T* lanes) {",
            "T sum = 0;",
            "for (int64_t c = 0; c < W; c++) sum += lanes[c];",
            "return sum;",
            "}",
            'extern "C" int64_t KERNEL_scratch(int64_t rows) { return rows * OS; }  // numbers that gt takes',
            'extern "C" int KERNEL(const T* x, const T* y, const T* g, const T* radial, const int64_t* species,',
            "    const T* coefficients, const int64_t* receiver, const int64_t* order, T* to_x, T* to_y, T* to_radial,",
            "    T* gt, int64_t atoms, int64_t size, int64_t edges, int threads) {",
            *_check_index("receiver", "size"),
            "#pragma omp parallel num_threads(threads) if (threads > 1 && edges > 64)",
            "{",
            "#pragma omp for",
            "for (int64_t n = 0; n < size; n++) into_O(g + n * NO, gt + n * OS);",
            "alignas(64) T xe[XS], gx[XS];",
            *local,
            "#pragma omp for schedule(dynamic, 4)",
            "for (int64_t n = 0; n < atoms; n++) {",
            "into_X(x + n * NX, xe);",
            "memset(gx, 0, sizeof gx);",
            "for (int64_t a = order[n]; a < order[n + 1]; a++) {",
            "const int64_t e = order[atoms + 1 + a];",
            "const T* __restrict__ oe = gt + receiver[e] * OS;",
            *self._edge(),
            *clear,
            *self._groups(self.add_gradient),
            *write,
            "}",
            *(["from_X(gx, to_x + n * NX);"] if by_x else []),
            "}",
            "}",
            "return 0;",
            "}",
        ]


def pack(coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Coefficients of a table as kernels read them: all powers of a row together, and room to read beyond the last.

    Args:
        coefficients: [order + 1, rows, channels].

    Returns:
        [rows * (order + 1) * channels + 16], with zeros at the end.
    """
    return torch.cat([coefficients.to(dtype).transpose(0, 1).flatten(), coefficients.new_zeros(16, dtype=dtype)])


def _check_index(index: str, rows: str) -> list[str]:
    return [
        "uint64_t outside = 0;",
        f"for (int64_t e = 0; e < edges; e++) outside |= uint64_t({index}[e]) >= uint64_t({rows});",
        "if (outside) return 1;",
    ]


def _check(code: int) -> None:
    if code:
        raise KernelError("an edge names an atom that there is not")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _layout(letter: str, irreps: str) -> list[str]:
    """Where the segments of ``irreps`` are once components come first and channels, padded, are lanes."""
    lines, copies, at = [], [], "0"
    for s, (offset, channels, l, _) in enumerate(segments(irreps)):
        lines.append(f"static constexpr int64_t {letter}{s} = {at};")
        at, width = f"{letter}{s} + {2 * l + 1} * padded({channels})", 2 * l + 1
        loop = f"for (int64_t k = 0; k < {width}; k++) for (int64_t u = 0; u < {channels}; u++)"
        copies.append((loop, f"lanes[{letter}{s} + k * padded({channels}) + u]", f"row[{offset} + u * {width} + k]"))
    return [
        *lines,
        f"static constexpr int64_t {letter}S = {at}, N{letter} = {dim(irreps)};",
        f"[[maybe_unused]] static void into_{letter}(const T* __restrict__ row, T* __restrict__ lanes) {{",
        f"memset(lanes, 0, {letter}S * sizeof(T));",
        *(f"{loop} {to} = {of};" for loop, to, of in copies),
        "}",
        f"[[maybe_unused]] static void from_{letter}(const T* __restrict__ lanes, T* __restrict__ row) {{",
        *(f"{loop} {of} = {to};" for loop, to, of in copies),
        "}",
    ]


def _lookup(grid: Grid) -> list[str]:
    """The row of a table that x falls into, the variable u within it, and du/dx; see ``ir.reference.table``."""
    numbers = {"START": grid.start, "END": grid.end, "LAST": grid.last, "STEP": grid.step}
    per_step = grid.cells / (grid.end - grid.start)
    numbers |= {"PER": per_step, "FAR": per_step / COARSE if grid.coarse else per_step}
    return [
        "static constexpr T " + ", ".join(f"{name} = T({value!r})" for name, value in numbers.items()) + ";",
        f"static constexpr int64_t CELLS = {grid.cells}, COARSE = {grid.coarse}, ROWS = {grid.rows};",
        "static inline void cell(T x, int64_t& row, T& u, T& rise) {",
        *(["if (x > LAST) x = LAST;"] if grid.flat else []),
        "const T local = x - START;",
        "T at = -1;",
        "if (x >= START) at = std::fmin(std::fmax(std::floor(local * PER), T(0)), T(CELLS - 1));",
        "u = (local - at * STEP) * PER;",
        "rise = PER;",
        "if (COARSE && x >= END) {",
        "const T far = (x - END) * FAR, within = std::fmin(std::fmax(std::floor(far), T(0)), T(COARSE - 1));",
        "at = within + CELLS; u = far - within; rise = FAR;",
        "}",
        "if (x >= LAST) { at = CELLS + COARSE; u = (x - LAST) * FAR; }",
        "row = int64_t(at) + 1;",
        "}",
    ]
