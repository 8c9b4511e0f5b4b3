"""C++ for the fused convolution and its gradient: one loop over the edges of each atom, channels as vector lanes.

For a receiver i, ``out_i = sum over its edges of TP(x_sender, Y, w(r))``.  With the Clebsch-Gordan coefficients C and
one channel count on either side, path p of an edge multiplies by a small matrix that all channels share,
``M_p[k, i] = sum_j C_p[i, j, k] Y_j``, and by its weight, which is read from the radial table.  The gradient runs
over the same edges, with the incoming gradient of one receiver at hand, and reads the table again: nothing of size
edges x channels x paths reaches memory.  By Y it makes the gradients by M, sums over channels, of which that by Y is a
combination.  By x each thread adds up its own, for a fixed part of the receivers, and these are added in the end: no
two threads write to one place, and a number of threads gives the same bits every time.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algebra.irreps import channels_last, clebsch_gordan, dim, segments
from ..algebra.multilinear import Path, TensorProduct
from ..algebra.piecewise import COARSE, Grid
from ..errors import KernelError
from .lanes import Lanes, Value, cpp, prelude, storage

FORWARD = (False, False, False)
ALIVE = 9  # sums over lanes that registers hold beside what else a loop needs
INCLUDES = (  # compilers that have OpenMP may lack its header
    "#include <algorithm>",
    "#include <vector>",
    'extern "C" int omp_get_thread_num();',
    'extern "C" int omp_get_num_threads();',
)
DTYPES = {torch.float32: "float32", torch.float64: "float64"}
#: features and tables may be narrower than what is computed: bfloat16 goes with float32 for y and radial
STORAGE = {**DTYPES, torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class ConvolutionKernel:
    """The source of one kernel, and how it is called.

    Attributes:
        product: paths of mode uvu or uvuv whose second operand has one channel; weights per edge.
        grid: of the radial table; None where the weights are given.
        dtype: of features, incoming gradients and tables, one of ``STORAGE``. What is computed, y, radial and their
            gradients are of the same type, but float32 for ``"bfloat16"``.
        needs: gradients by x, y and radial that are made; none for the convolution itself.
        tables: of how many species the grid's rows come one after the other in the coefficients.
    """

    product: TensorProduct
    grid: Grid | None
    dtype: str
    needs: tuple[bool, bool, bool] = FORWARD
    tables: int = 1

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
            *INCLUDES,
            prelude("float32" if self.dtype == "bfloat16" else self.dtype),
            storage(self.dtype),
            *_layout("X", tp.irreps1),
            *_layout("O", tp.irreps_out),
            f"static constexpr int64_t NY = {dim(tp.irreps2)}, NW = {tp.weights};",
            *([] if self.grid is None else _lookup(self.grid)),
        ]
        return "\n".join([*head, *(self._gradient() if self.gradient else self._forward())]) + "\n"

    def bind(self, library: ctypes.CDLL) -> Callable[..., Any]:
        """The function of the built library, with the arguments of the op less its texts.

        It takes contiguous tensors of the types of this kernel (indices int64) and ``coefficients`` as :func:`pack`
        makes them.
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
            weights = f"{{row}} * NW + {path.weight} + c"
            arrays[f"w{path.weight}"] = f"we + ({weights}) * 2" if self._paired else f"we + {weights}"
            arrays[f"gw{path.weight}"] = f"gw + GW{path.weight} + c"
        return arrays

    @property
    def _paired(self) -> set[str]:
        """Arrays in which two powers alternate, see :func:`pack`."""
        narrow = self.grid is not None and self.dtype == "bfloat16"
        return {f"w{path.weight}" for path in self.product.paths} if narrow else set()

    def _groups(self, build: Callable[[Lanes, Path], None]) -> list[str]:
        """Loops over the lanes of every group of paths; what all lanes share is computed in front of them."""
        lines = []
        for channels, paths in self.paths().items():
            lanes = Lanes()
            for path in paths:
                build(lanes, path)
            arrays = self._arrays(channels)
            inside = cpp(lanes, arrays, uniform=False, paired=self._paired)
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
        """What one path adds to the gradients of its sender and of its edge, for all components at once."""
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
            f"const S* __restrict__ we = coefficients + row * {self.grid.order + 1} * NW;",
        ]

    def _forward(self) -> list[str]:
        weights = [] if self.grid else ["T we[NW + W] = {};"]
        return [
            "// numbers of the type S that xt takes",
            'extern "C" int64_t KERNEL_scratch(int64_t rows) { return rows * XS * sizeof(T) / sizeof(S); }',
            'extern "C" int KERNEL(const S* x, const T* y, const T* radial, const int64_t* species,',
            "    const S* coefficients, const int64_t* sender, const int64_t* order, S* out, T* xt,",
            "    int64_t size, int64_t atoms, int64_t edges, int threads) {",
            *_check_index("sender", "atoms", self.tables),
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
        widest = max(self.paths(), default=0)
        local = [f"alignas(64) T oe[OS], wv[padded({widest})], wr[padded({widest})];"]
        local += [] if self.grid else ["T we[NW + W] = {};"]
        clear, write = [], []
        if by_y:
            local.append(f"alignas(64) T gm[{sum(map(len, self.entries))} * W];")
            write += self._by_y()
        if by_radial and self.grid:
            clear.append("V gr = {};")
            write.append("to_radial[e] = total(gr) * rise;")
        elif by_radial:
            places = {p.weight: self.product.sizes(p)["u"] for p in self.product.paths if p.weight >= 0}
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
            *TOTAL,
            "// numbers of the type S that xt and the sums of the first thread take, for as many senders as receivers",
            'extern "C" int64_t KERNEL_scratch(int64_t rows) { return rows * XS * 2 * sizeof(T) / sizeof(S); }',
            'extern "C" int KERNEL(const S* x, const T* y, const S* g, const T* radial, const int64_t* species,',
            "    const S* coefficients, const int64_t* receiver, const int64_t* order, S* to_x, T* to_y, T* to_radial,",
            "    T* xt, int64_t atoms, int64_t size, int64_t edges, int threads) {",
            *_check_index("receiver", "size", self.tables),
            *BY_RECEIVER,
            "if (threads < 1 || edges <= 64) threads = 1;",
            "std::vector<T> more;",
            "if (atoms > size) { more.resize(atoms * XS * 2); xt = more.data(); }",
            *(["std::vector<T*> parts(threads);"] if by_x else []),
            "#pragma omp parallel num_threads(threads) if (threads > 1)",
            "{",
            "const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();",
            "#pragma omp for",
            "for (int64_t n = 0; n < atoms; n++) into_X(x + n * NX, xt + n * XS);",
            *(OWN_SUMS if by_x else []),
            *local,
            "// receivers that have about as many edges as those of each other thread",
            "const auto part = [&](int64_t t) {",
            "return std::lower_bound(start.begin(), start.end(), edges * t / team) - start.begin();",
            "};",
            "const int64_t end = part(thread + 1);",
            "for (int64_t n = part(thread); n < end; n++) {",
            "into_O(g + n * NO, oe);",
            "for (int64_t a = start[n]; a < start[n + 1]; a++) {",
            "const int64_t e = sorted[a].edge;",
            "const T* __restrict__ xe = xt + sorted[a].sender * XS;",
            *(["T* __restrict__ gx = own + sorted[a].sender * XS;"] if by_x else []),
            *self._edge(),
            *clear,
            *(line for numbers in self._together() for line in self._path_gradient(numbers)),
            *write,
            "}",
            "}",
            *(ADD_SUMS if by_x else []),
            "}",
            "return 0;",
            "}",
        ]

    @cached_property
    def entries(self) -> list[list[tuple[int, int]]]:
        """Of each path the (i, k) for which M[i, k] is not zero for every Y."""
        found = [np.argwhere(np.any(self._coupling(path) != 0, axis=1)) for path in self.product.paths]
        return [[(int(i), int(k)) for i, k in each] for each in found]

    def _entry(self, number: int, i: int, k: int) -> int:
        """Row of the gradient by an entry of a path's M in the buffer ``gm``."""
        return sum(map(len, self.entries[:number])) + self.entries[number].index((i, k))

    def _together(self) -> list[list[int]]:
        """Numbers of paths that go through one loop: they read the same weights and segment of x."""
        groups: dict[tuple[int, ...], list[list[int]]] = {}
        for number, path in enumerate(self.product.paths):
            alone = (number,) if path.weight < 0 else ()
            found = groups.setdefault((path.weight, path.i1, self.product.sizes(path)["u"], *alone), [[]])
            if sum(len(self.entries[n]) for n in [*found[-1], number]) > ALIVE and found[-1]:
                found.append([])
            found[-1].append(number)
        return [numbers for found in groups.values() for numbers in found]

    def _path_gradient(self, numbers: Sequence[int]) -> list[str]:
        """What paths that share weights and x add to the gradients of their sender and of their edge.

        A loop over lanes for each component of x: so few values are alive in one that they stay in registers.
        """
        by_x, by_y, by_radial = self.needs
        paths, lines = [self.product.paths[n] for n in numbers], []
        first = paths[0]
        weighted, rows = first.weight >= 0, sorted({i for n in numbers for i, _ in self.entries[n]})
        stored = weighted and self.grid is not None and len(rows) > 1  # the table is read once for all components
        if stored:
            lanes = Lanes()
            weight, rise = self._weight(lanes, first, slope=by_radial)
            lanes.store("wv", 0, weight)
            if by_radial:
                lanes.store("wr", 0, rise)
            lines += self._loop(paths, lanes)
        for i in rows:
            lanes, sums = Lanes(), []
            matrices = [self._matrix(lanes, path) for path in paths]
            x = lanes.load(f"x{first.i1}", i)
            if stored:
                weight, rise = lanes.load("wv", 0), lanes.load("wr", 0)
            else:
                weight, rise = self._weight(lanes, first, slope=by_radial)
            heavy, back = lanes.mul(weight, x), lanes.constant(0.0)
            for number, path, matrix in zip(numbers, paths, matrices, strict=True):
                for k in (k for ii, k in self.entries[number] if ii == i):
                    g = lanes.load(f"o{path.io}", k)
                    back = lanes.fma(matrix[i, k], g, back)
                    if by_y:
                        sums.append(self._entry(number, i, k))
                        lanes.accumulate("gm", sums[-1], lanes.mul(heavy, g))
            if by_x:
                lanes.accumulate(f"gx{first.i1}", i, lanes.mul(weight, back))
            if by_radial and weighted:
                each = lanes.mul(x, back) if self.grid is None else lanes.mul(lanes.mul(rise, x), back)
                lanes.accumulate("gr" if self.grid else f"gw{first.weight}", 0, each)
            lines += self._loop(paths, lanes, sums)
        return lines

    def _loop(self, paths: Sequence[Path], lanes: Lanes, sums: Sequence[int] = ()) -> list[str]:
        """A program for all lanes of some paths; ``sums`` are the rows of ``gm`` that it makes."""
        channels = self.product.sizes(paths[0])["u"]
        arrays = self._arrays(channels) | {"wv": "wv + c", "wr": "wr + c"}
        registers = {"gr": "gr", "gm": "gm_{row}"}
        once = [f"o{path.io}" for path in paths]
        body = cpp(lanes, arrays, uniform=False, registers=registers, once=once, paired=self._paired)
        return [
            "{",
            *(f"V gm_{row} = {{}};" for row in sums),
            *cpp(lanes, arrays, uniform=True),
            "#pragma GCC unroll 1",  # unrolled, rows of g are moved out of the loop over edges, and spilled
            f"for (int64_t c = 0; c < {channels}; c += W) {{",
            *(f"  {line}" for line in body),
            "}",
            *(f"*(V*)(gm + {row} * W) = gm_{row};" for row in sums),
            "}",
        ]

    def _by_y(self) -> list[str]:
        """The gradient by Y from those by all M."""
        lanes, columns = Lanes(), range(dim(self.product.irreps2))
        terms: dict[int, list[tuple[Value, Value]]] = {j: [] for j in columns}
        for number, path in enumerate(self.product.paths):
            coupling, (at, _, _, _) = self._coupling(path), segments(self.product.irreps2)[path.i2]
            for i, j, k in np.argwhere(coupling != 0):
                by_entry = lanes.load("gm", self._entry(number, int(i), int(k)))
                terms[at + int(j)].append((lanes.constant(coupling[i, j, k]), by_entry))
        for j in columns:
            lanes.store("gy", j, lanes.dot(terms[j]))
        sums = cpp(lanes, {"gm": "gm + {row} * W"}, registers={"gy": "const V gy_{row}"})
        return ["{", *sums, *(f"to_y[e * NY + {j}] = total(gy_{j});" for j in columns), "}"]


TOTAL = [
    "// sum of the lanes",
    "template <int64_t n> static inline T total(const T* lanes) {",
    "typedef T H __attribute__((vector_size(n / 2 * sizeof(T)), aligned(sizeof(T)), may_alias));",
    "if constexpr (n == 2) return lanes[0] + lanes[1];",
    "else {",
    "const H half = *(const H*)lanes + *(const H*)(lanes + n / 2);",
    "return total<n / 2>((const T*)&half);",
    "}",
    "}",
    "static inline T total(const V& lanes) { return total<W>((const T*)&lanes); }",
]
BY_RECEIVER = [
    "// the edges, which come in the order of their senders, in that of their receivers",
    "struct Edge { int64_t edge, sender; };",
    "std::vector<int64_t> start(size + 1), next;",
    "std::vector<Edge> sorted(edges);",
    "for (int64_t e = 0; e < edges; e++) start[receiver[e] + 1]++;",
    "for (int64_t n = 0; n < size; n++) start[n + 1] += start[n];",
    "next = start;",
    "for (int64_t n = 0; n < atoms; n++)",
    "for (int64_t a = order[n]; a < order[n + 1]; a++) {",
    "const int64_t e = order[atoms + 1 + a];",
    "sorted[next[receiver[e]]++] = {e, n};",
    "}",
]
OWN_SUMS = [
    "std::vector<T> mine;",
    "if (thread) mine.resize(atoms * XS); else memset(xt + atoms * XS, 0, atoms * XS * sizeof(T));",
    "T* const own = parts[thread] = thread ? mine.data() : xt + atoms * XS;",
]
ADD_SUMS = [
    "#pragma omp barrier",
    "#pragma omp for",
    "for (int64_t n = 0; n < atoms; n++) {",
    "T* __restrict__ sum = parts[0] + n * XS;",
    "for (int64_t t = 1; t < team; t++) for (int64_t c = 0; c < XS; c++) sum[c] += parts[t][n * XS + c];",
    "from_X(sum, to_x + n * NX);",
    "}",
]


def pack(coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Coefficients of a table as kernels read them: all powers of a row together, and room to read beyond the last.

    Args:
        coefficients: [order + 1, rows, channels].

    Returns:
        [rows * (order + 1) * channels + 32], with zeros at the end. Those of one row come power after power; in
        bfloat16 the lanes of two powers alternate.
    """
    powers, rows, channels = coefficients.shape
    each = 2 if dtype is torch.bfloat16 else 1
    packed = coefficients.to(dtype).reshape(powers // each, each, rows, channels).permute(2, 0, 3, 1)
    return torch.cat([packed.flatten(), packed.new_zeros(32)])


def _check_index(index: str, rows: str, tables: int) -> list[str]:
    return [
        "uint64_t outside = 0;",
        f"for (int64_t e = 0; e < edges; e++) outside |= uint64_t({index}[e]) >= uint64_t({rows});",
        f"if (species) for (int64_t e = 0; e < edges; e++) outside |= uint64_t(species[e]) >= {tables};",
        "if (outside) return 1;",
    ]


def _check(code: int) -> None:
    if code:
        raise KernelError("an edge names an atom or a table that there is not")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _layout(letter: str, irreps: str) -> list[str]:
    """Where the segments of ``irreps`` are once components come first and channels, padded, are lanes."""
    lines, copies, at = [], [], "0"
    for s, (offset, channels, l, _) in enumerate(segments(irreps)):
        lines.append(f"static constexpr int64_t {letter}{s} = {at};")
        at, width = f"{letter}{s} + {2 * l + 1} * padded({channels})", 2 * l + 1
        loops = f"for (int64_t k = 0; k < {width}; k++)", f"for (int64_t u = 0; u < {channels}; u++)"
        of = f"row[{offset} + {f'k * {channels} + u' if channels_last(irreps) else f'u * {width} + k'}]"
        copies.append((loops, f"lanes[{letter}{s} + k * padded({channels}) + u]", of))
    return [
        *lines,
        f"static constexpr int64_t {letter}S = {at}, N{letter} = {dim(irreps)};",
        f"[[maybe_unused]] static void into_{letter}(const S* __restrict__ row, T* __restrict__ lanes) {{",
        f"memset(lanes, 0, {letter}S * sizeof(T));",
        *(f"{component} {channel} {to} = widened({of});" for (component, channel), to, of in copies),
        "}",
        f"[[maybe_unused]] static void from_{letter}(const T* __restrict__ lanes, S* __restrict__ row) {{",
        *(f"{channel} {component} {of} = narrowed({to});" for (component, channel), to, of in copies),
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
