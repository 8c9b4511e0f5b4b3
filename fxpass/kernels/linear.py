"""C++ kernels of equivariant linear maps: blocked matrix products on rows as e3nn lays them out, [channels, 2l+1], or
with channels last.

Lanes are output channels.  A number of x is broadcast from where it lies, so x is never transposed; weights are packed
once into panels as wide as a tile; sums stay in registers over all segments that an output reads, and are transposed
on their way out.  A tile is six rows (atoms and components alike) by as many vectors as the registers hold.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..algebra.irreps import channels_last, dim, segments
from ..algebra.multilinear import Linear, TensorProduct
from ..errors import KernelError
from .lanes import prelude

TYPES = {torch.float32: "float32", torch.float64: "float64"}


class Block(NamedTuple):
    """Weights between two segments: element [u, v, w] lies at ``weight + u * su + v * sv + w * sw``.

    Attributes:
        i, o: segment that is read and segment that is written; u and w count their channels.
        first, columns: of the scalars x2 by which the weights are mixed; v counts them.
        coefficient: factor of the weights.
    """

    i: int
    o: int
    weight: int
    su: int
    sv: int
    sw: int
    first: int
    columns: int
    coefficient: float


@dataclass(frozen=True)
class _Map:
    """y[w, k] = sum over blocks, v, u of x2[v] x[u, k] weight[u, v, w]; without ``scalars`` x2 is 1."""

    irreps_in: str
    irreps_out: str
    blocks: tuple[Block, ...]
    weights: int
    scalars: int = 0

    def source(self, name: str, dtype: str) -> str:
        """Complete C++ text of the kernel ``name`` and of its packing, for ``dtype`` ``"float32"`` or ``"float64"``."""
        ins, outs = segments(self.irreps_in), segments(self.irreps_out)
        tables, calls, paths, packed = [], [], [], "0"
        for o, (at, channels, l, _) in enumerate(outs):
            blocks = [b for b in self.blocks if b.o == o]
            read = sorted({b.i for b in blocks})
            pieces = ", ".join(f"{{{ins[i][0]}, {ins[i][1]}}}" for i in read) or "{0, 0}"
            rows = {i: sum(ins[j][1] for j in read[:n]) for n, i in enumerate(read)}
            depth = sum(ins[i][1] for i in read)
            tables.append(f"static const Piece pieces_{o}[] = {{{pieces}}};")
            tables.append(f"static constexpr Out out_{o} = {{{at}, {channels}, {2 * l + 1}, {depth}, {packed}}};")
            calls.append(f"product<{2 * l + 1}>(rows, x2, packed, out_{o}, pieces_{o}, {len(read)}, y, atoms);")
            for b in blocks:
                numbers = (rows[b.i], ins[b.i][1], b.weight, b.su, b.sv, b.sw, b.first, b.columns, b.coefficient)
                paths.append(f"{{out_{o}, {', '.join(map(repr, numbers))}}},")
            packed += f" + {depth} * padded({channels})"
        return (
            prelude(dtype)
            + f"""
static constexpr int A = {1 if self.scalars else 6};  // atoms in a block
static constexpr int64_t IN = {dim(self.irreps_in)}, OUT = {dim(self.irreps_out)};  // columns
static constexpr int64_t WEIGHTS = {packed};  // packed, for one scalar
static constexpr int64_t SCALARS = {self.scalars or 1};
static constexpr bool X_LAST = {str(channels_last(self.irreps_in)).lower()};  // channels are last in a segment
static constexpr bool Y_LAST = {str(channels_last(self.irreps_out)).lower()};
"""
            + ENGINE
            + "\n".join(tables)
            + f"""
static const Path paths[] = {{
    {(chr(10) + "    ").join(paths) or "{Out{}, 0, 0, 0, 0, 0, 0, 0, 0, 0.0},"}
}};

static void block(const T* const* rows, const T* x2, const T* packed, T* y, int64_t atoms) {{
    {(chr(10) + "    ").join(calls)}
}}

extern "C" int64_t {name}_size() {{ return SCALARS * WEIGHTS; }}

extern "C" void {name}_pack(const T* weight, T* packed) {{
    memset(packed, 0, SCALARS * WEIGHTS * sizeof(T));
    for (const Path& path : paths) pack(path, weight, packed);
}}

extern "C" void {name}(const T* x, const T* x2, const T* packed, T* y, int64_t atoms, int threads) {{
    static const T one = 1;
    const int64_t blocks = (atoms + A - 1) / A;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && atoms > 8)
    for (int64_t b = 0; b < blocks; b++) {{
        const T* rows[A];
        for (int64_t a = 0; a < A; a++) rows[a] = x + (b * A + a < atoms ? b * A + a : atoms - 1) * IN;
        const int64_t left = atoms - b * A;
        block(rows, x2 ? x2 + b * SCALARS : &one, packed, y + b * A * OUT, left < A ? left : A);
    }}
}}
"""
        )


ENGINE = """#include <utility>
static constexpr int LARGE = FXPASS_BYTES == 64 ? 4 : 2;  // vectors in a tile of six rows
static constexpr int rows_in(int D) { return A == 1 ? D : 6; }
static constexpr int vectors(int D) { return A > 1 ? LARGE : D == 1 ? 8 : D == 3 ? 4 : D == 5 ? 2 : 1; }

struct Piece { int64_t at, channels; };  // a segment of x: first column, channels
struct Out { int64_t at, channels, D, depth, packed; };  // a segment of y: first column, channels, components;
                                                         // channels of x that it reads, offset of its packed weights
struct Path { Out out; int64_t row, channels, weight, su, sv, sw, first, count; double coefficient; };

// packed: [scalar][panel of vectors(D) * W columns][channel of x][column of the panel]
static void pack(const Path& path, const T* weight, T* packed) {
    const Out& out = path.out;
    const int64_t wide = vectors(out.D) * W, columns = padded(out.channels);
    for (int64_t v = 0; v < path.count; v++)
        for (int64_t w = 0; w < out.channels; w++) {
            const int64_t panel = w / wide * wide, width = columns - panel < wide ? columns - panel : wide;
            T* to = packed + (path.first + v) * WEIGHTS + out.packed + out.depth * panel + path.row * width + w - panel;
            const T* from = weight + path.weight + v * path.sv + w * path.sw;
            for (int64_t u = 0; u < path.channels; u++) to[u * width] += T(path.coefficient * from[u * path.su]);
        }
}

// buffer[row] += scale * sum over channels of x[row] * w, for tile B of the rows (atom, component) and J vectors
template <int D, int J, int B>
static inline void tiles(const T* const* rows, const Piece* pieces, int64_t count, const T* w, T scale, T* buffer) {
    constexpr int M = rows_in(D);
    V sums[M][J] = {};
    const T* panel = w;
    for (int64_t p = 0; p < count; p++) {
        const T* x[M];
        #pragma GCC unroll 32
        for (int r = 0; r < M; r++)
            x[r] = rows[(B * M + r) / D] + pieces[p].at + (B * M + r) % D * (X_LAST ? pieces[p].channels : 1);
        for (int64_t u = 0; u < pieces[p].channels; u++) {
            V column[J];
            #pragma GCC unroll 8
            for (int j = 0; j < J; j++) column[j] = *(const V*)(panel + j * W);
            #pragma GCC unroll 32
            for (int r = 0; r < M; r++) {
                const T number = x[r][X_LAST ? u : u * D];
                #pragma GCC unroll 8
                for (int j = 0; j < J; j++) sums[r][j] += number * column[j];
            }
            panel += J * W;
        }
    }
    #pragma GCC unroll 32
    for (int r = 0; r < M; r++)
        #pragma GCC unroll 8
        for (int j = 0; j < J; j++) *(V*)(buffer + ((B * M + r) * J + j) * W) += scale * sums[r][j];
    if constexpr ((B + 1) * M < A * D) tiles<D, J, B + 1>(rows, pieces, count, w, scale, buffer);
}

// m becomes its transpose, by exchanging blocks of S x S, then of half that size
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // before GCC 12 there is only this
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(V{} < V{}){__VA_ARGS__})
#endif
template <int S, int... L>
static inline void exchange(V& a, V& b, std::integer_sequence<int, L...>) {
    const V low = SHUFFLE(a, b, (L & S ? W + L - S : L)...);
    b = SHUFFLE(a, b, (L & S ? W + L : L + S)...);
    a = low;
}
template <int S = W / 2>
static inline void transpose(V (&m)[W]) {
    #pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (!(i & S)) exchange<S>(m[i], m[i + S], std::make_integer_sequence<int, W>());
    if constexpr (S > 1) transpose<S / 2>(m);
}

// y[w * D + k] = buffer[k][w] for a panel of J vectors
template <int D, int J>
static inline void interleave(const T* buffer, T* y, int64_t valid, int64_t channels) {
    if constexpr (Y_LAST) {
        for (int k = 0; k < D; k++) memcpy(y + k * channels, buffer + k * J * W, valid * sizeof(T));
        return;
    }
    constexpr int C = (D + W - 1) / W;
    T line[J * W * D + W];  // stores run over the end of a channel, where the next channel's follow
    if constexpr (D > 1)
        for (int w = 0; w < J * W; w += W) {
            V m[C][W];
            #pragma GCC unroll 16
            for (int k = 0; k < C * W; k++) m[k / W][k % W] = k < D ? *(const V*)(buffer + k * J * W + w) : V{};
            #pragma GCC unroll 16
            for (int c = 0; c < C; c++) transpose(m[c]);
            #pragma GCC unroll 64
            for (int k = 0; k < C * W; k++) *(V*)(line + (w + k / C) * D + k % C * W) = m[k % C][k / C];
        }
    const T* from = D > 1 ? line : buffer;
    if (valid == J * W) memcpy(y, from, J * W * D * sizeof(T));
    else memcpy(y, from, valid * D * sizeof(T));
}

// columns of one panel, for all atoms of a block
template <int D, int J>
static void columns(const T* const* rows, const T* x2, const T* packed, const Piece* pieces, int64_t count,
                    int64_t valid, T* y, int64_t atoms, int64_t channels) {
    T buffer[A * D * J * W] = {};
    for (int64_t v = 0; v < SCALARS; v++)
        if (x2[v] != 0) tiles<D, J, 0>(rows, pieces, count, packed + v * WEIGHTS, x2[v], buffer);
    for (int64_t a = 0; a < atoms; a++) interleave<D, J>(buffer + a * D * J * W, y + a * OUT, valid, channels);
}

template <int D, int J = vectors(D)>
static inline void product(const T* const* rows, const T* x2, const T* packed, const Out& out, const Piece* pieces,
                           int64_t count, T* y, int64_t atoms, int64_t column = 0) {
    const T* panel = packed + out.packed + out.depth * column;
    T* to = y + out.at + column * (Y_LAST ? 1 : D);
    for (; column + (J - 1) * W < out.channels; column += J * W) {
        const int64_t left = out.channels - column, valid = left < J * W ? left : J * W;
        columns<D, J>(rows, x2, panel, pieces, count, valid, to, atoms, out.channels);
        panel += out.depth * J * W;
        to += J * W * (Y_LAST ? 1 : D);
    }
    if constexpr (J > 1) if (column < out.channels)
        product<D, J - 1>(rows, x2, packed, out, pieces, count, y, atoms, column);
}

"""


@dataclass(frozen=True)
class BoundKernel:
    """A loaded kernel: packs weights once, then maps rows."""

    kernel: LinearKernel | ScalarProductKernel
    library: ctypes.CDLL

    def pack(self, weight: Tensor) -> Tensor:
        """The weights [weights] as the kernel reads them; they stay good as long as ``weight`` is not changed."""
        weight = _checked(weight.detach(), self.kernel.dtype, self.kernel.map.weights, 1)
        size, pack = (getattr(self.library, f"{self.kernel.name}_{what}") for what in ("size", "pack"))
        size.argtypes, size.restype = (), ctypes.c_int64
        pack.argtypes, pack.restype = (ctypes.c_void_p, ctypes.c_void_p), None
        packed = torch.empty(size(), dtype=weight.dtype, device="cpu")
        pack(weight.data_ptr(), packed.data_ptr())
        return packed

    def __call__(self, x: Tensor, packed: Tensor, x2: Tensor | None = None) -> Tensor:
        """Maps rows.

        Args:
            x: [rows, columns of the slot that is read].
            packed: what ``pack`` returned.
            x2: [rows, scalars], for a product with scalars.

        Returns:
            [rows, columns of ``wrt``].

        Raises:
            KernelError: an operand is not of the kernel's dtype, of its shape, or on the CPU.
        """
        dtype, (columns, wide, scalars) = self.kernel.dtype, self._columns
        x, second = _checked(x, dtype, columns), None
        rows = x.shape[0]
        if x2 is not None:
            x2 = _checked(x2, dtype, scalars)
            second = x2.data_ptr()
        if (x2 is None) != (scalars == 0) or (x2 is not None and x2.shape[0] != rows):
            raise KernelError(f"The kernel maps {rows} rows with {scalars} scalars for each, not others.")
        y = torch.empty(rows, wide, dtype=dtype, device="cpu")
        self.function(x.data_ptr(), second, packed.data_ptr(), y.data_ptr(), rows, torch.get_num_threads())
        return y

    @cached_property
    def _columns(self) -> tuple[int, int, int]:
        """Columns of x, of the result and of x2."""
        whole = self.kernel.map
        return dim(whole.irreps_in), dim(whole.irreps_out), whole.scalars

    @cached_property
    def function(self) -> Callable[..., None]:
        """The C function: addresses of x, x2 (or None), packed and y, rows, threads."""
        function = getattr(self.library, self.kernel.name)
        function.argtypes = (*(ctypes.c_void_p,) * 4, ctypes.c_int64, ctypes.c_int)
        function.restype = None
        return function


@dataclass(frozen=True)
class LinearKernel:
    """``fxpass::linear`` with weights shared by all rows.

    Attributes:
        linear: the map.
        dtype: float32 or float64, of all operands.
        wrt: ``"out"``, the map itself, or ``"x"``, the transposed map.

    Raises:
        KernelError: the weights are not shared, or the dtype has no kernel.
    """

    linear: Linear
    dtype: torch.dtype
    wrt: Literal["out", "x"]

    def __post_init__(self) -> None:
        if not self.linear.shared:
            raise KernelError("The linear kernel takes weights that all rows share; these are one vector per row.")
        _check_dtype(self.dtype)

    @cached_property
    def map(self) -> _Map:
        lin = self.linear
        outs = segments(lin.irreps_out)
        blocks = tuple(Block(p.i, p.o, p.weight, outs[p.o][1], 0, 1, 0, 1, p.coefficient) for p in lin.paths)
        return _oriented(_Map(lin.irreps_in, lin.irreps_out, blocks, lin.weights), self.wrt == "x")

    @property
    def name(self) -> str:
        return _name("linear", self.wrt, str(self.linear), self.dtype)

    @property
    def source(self) -> str:
        return self.map.source(self.name, TYPES[self.dtype])

    def bind(self, library: ctypes.CDLL) -> BoundKernel:
        return BoundKernel(self, library)


@dataclass(frozen=True)
class ScalarProductKernel:
    """``fxpass::tensor_product`` with shared weights, paths ``uvw``, and an x2 that holds scalars only.

    Zeros of x2 cost nothing, so that one-hot species cost one linear map for each row.

    Attributes:
        product: the tensor product.
        dtype: float32 or float64, of all operands.
        wrt: ``"out"``, the product itself, or ``"x1"``, its transpose.

    Raises:
        KernelError: the product has other weights, paths or operands, or the dtype has no kernel.
    """

    product: TensorProduct
    dtype: torch.dtype
    wrt: Literal["out", "x1"]

    def __post_init__(self) -> None:
        tp = self.product
        if not tp.shared or any(p.mode != "uvw" or p.weight < 0 for p in tp.paths):
            raise KernelError("The kernel of products with scalars takes paths uvw with weights that all rows share.")
        if any(l for _, _, l, _ in segments(tp.irreps2)):
            raise KernelError(f"The kernel of products with scalars takes scalars as x2, not {tp.irreps2}.")
        _check_dtype(self.dtype)

    @cached_property
    def map(self) -> _Map:
        tp = self.product
        blocks = []
        for p in tp.paths:
            s, (first, *_) = tp.sizes(p), segments(tp.irreps2)[p.i2]
            factor = p.coefficient / sqrt(s["i"])  # the coupling with a scalar is delta / sqrt(2l+1)
            blocks.append(Block(p.i1, p.io, p.weight, s["v"] * s["w"], s["w"], 1, first, s["v"], factor))
        whole = _Map(tp.irreps1, tp.irreps_out, tuple(blocks), tp.weights, tp.dims["x2"])
        return _oriented(whole, self.wrt == "x1")

    @property
    def name(self) -> str:
        return _name("scalar_product", self.wrt, str(self.product), self.dtype)

    @property
    def source(self) -> str:
        return self.map.source(self.name, TYPES[self.dtype])

    def bind(self, library: ctypes.CDLL) -> BoundKernel:
        return BoundKernel(self, library)


def _oriented(whole: _Map, transposed: bool) -> _Map:
    if not transposed:
        return whole
    blocks = tuple(b._replace(i=b.o, o=b.i, su=b.sw, sw=b.su) for b in whole.blocks)
    return _Map(whole.irreps_out, whole.irreps_in, blocks, whole.weights, whole.scalars)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in TYPES:
        raise KernelError(f"Kernels of linear maps compute in float32 or float64, not {dtype}.")


def _name(kind: str, wrt: str, spec: str, dtype: torch.dtype) -> str:
    return f"{kind}_{wrt}_{TYPES[dtype]}_{hashlib.sha256(spec.encode()).hexdigest()[:12]}"


def _checked(x: Tensor, dtype: torch.dtype, columns: int, dims: int = 2) -> Tensor:
    """``x``, contiguous, once it has the type and columns that a kernel reads."""
    if x.dtype != dtype or x.dim() != dims or x.shape[-1] != columns or not x.is_cpu:
        wanted = f"{dtype} {['rows', columns][-dims:]}".replace("'", "")
        given = f"{x.dtype} {list(x.shape)} on {x.device.type}"
        raise KernelError(f"The kernel takes {wanted} on cpu, and was given {given}.")
    return x.contiguous()
