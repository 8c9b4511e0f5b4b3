"""C++ for ``fxpass::linear_by_species``: a matrix product for each species, on the rows where they lie.

Rows are counted and listed by species, then multiplied in chunks that stay in the cache, with weights that were packed
once into panels as wide as a tile: six rows by as many vectors as the registers hold.  Nothing is gathered or
scattered.  Every element is summed in one order, so that a result does not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .lanes import prelude
from .linear import TYPES

UNKNOWN = "the species of a row is not one of the weights'"


@dataclass(frozen=True)
class GroupedKernel:
    """The source for one shape of weights, and how it is called.

    Attributes:
        species, inputs, outputs: the weights are [species, inputs, outputs], or transposed [species, outputs, inputs].
        dtype: float32 or float64, of all operands.
        transposed: whether rows are multiplied by the transposed matrices.
    """

    species: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    transposed: bool

    @property
    def name(self) -> str:
        """A C identifier; one kernel serves both directions of equal shapes."""
        return f"linear_by_species_{self.species}_{self.inputs}_{self.outputs}_{TYPES[self.dtype]}"

    @property
    def source(self) -> str:
        sizes = f"SPECIES = {self.species}, IN = {self.inputs}, OUT = {self.outputs}"
        return f"{prelude(TYPES[self.dtype])}static constexpr int64_t {sizes};\n{_ENGINE}".replace("NAME", self.name)

    def pack(self, weight: Tensor, library: ctypes.CDLL) -> Tensor:
        """The weights as the kernel reads them: [species, panels, inputs, columns of a panel]."""
        matrix = weight.detach().transpose(1, 2) if self.transposed else weight.detach()
        wide = getattr(library, f"{self.name}_columns")()
        panels = -(-self.outputs // wide)
        padded = torch.nn.functional.pad(matrix, (0, panels * wide - self.outputs))
        return padded.reshape(self.species, self.inputs, panels, wide).transpose(1, 2).contiguous()

    def bind(self, library: ctypes.CDLL) -> Callable[..., Tensor]:
        """(x [rows, inputs], packed weights, species of rows [rows] int64) -> [rows, outputs]."""
        function = getattr(library, self.name)
        function.restype = ctypes.c_int
        function.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int]

        def run(x: Tensor, packed: Tensor, index: Tensor) -> Tensor:
            x, index = x.contiguous(), index.contiguous()
            if x.shape != (index.shape[0], self.inputs):
                raise KernelError(f"The kernel takes [{index.shape[0]}, {self.inputs}], not {list(x.shape)}.")
            made = x.new_empty((x.shape[0], self.outputs))
            pointers: list[Any] = [t.data_ptr() for t in (x, packed, index, made)]
            if function(*pointers, x.shape[0], torch.get_num_threads()):
                raise KernelError(UNKNOWN)
            return made

        return run


_ENGINE = """#include <algorithm>
#include <vector>
static constexpr int M = 6, J = FXPASS_BYTES == 64 ? 4 : 2;  // a tile: rows, vectors
static constexpr int64_t WIDE = J * W, PANELS = (OUT + WIDE - 1) / WIDE;
static constexpr int64_t DEPTH = 256;  // of a panel that stays in the first cache
static constexpr int64_t CHUNK = 96;  // rows that stay in the second

extern "C" int64_t NAME_columns() { return WIDE; }

// sums[r] += x[r][from .. to) times a panel
static inline void tile(const T* const* x, const T* panel, T* sums, int64_t from, int64_t to) {
  V made[M][J] = {};
  for (int64_t u = from; u < to; u++) {
    V column[J];
    #pragma GCC unroll 8
    for (int j = 0; j < J; j++) column[j] = *(const V*)(panel + u * WIDE + j * W);
    #pragma GCC unroll 32
    for (int r = 0; r < M; r++)
      #pragma GCC unroll 8
      for (int j = 0; j < J; j++) made[r][j] += x[r][u] * column[j];
  }
  #pragma GCC unroll 32
  for (int r = 0; r < M; r++)
    #pragma GCC unroll 8
    for (int j = 0; j < J; j++) *(V*)(sums + r * WIDE + j * W) += made[r][j];
}

struct Chunk { const int64_t* rows; int64_t count, species; };

static void product(const T* x, const T* packed, T* y, const Chunk& chunk, int64_t p) {
  const T* panel = packed + (chunk.species * PANELS + p) * IN * WIDE;
  alignas(64) T sums[CHUNK * WIDE];
  const T* rows[CHUNK];
  const int64_t tiles = (chunk.count + M - 1) / M;
  for (int64_t r = 0; r < tiles * M; r++) rows[r] = x + chunk.rows[std::min(r, chunk.count - 1)] * IN;
  memset(sums, 0, tiles * M * WIDE * sizeof(T));
  for (int64_t from = 0; from < IN; from += DEPTH)
    for (int64_t b = 0; b < tiles; b++)
      tile(rows + b * M, panel, sums + b * M * WIDE, from, std::min(from + DEPTH, IN));
  const int64_t columns = std::min(WIDE, OUT - p * WIDE);
  for (int64_t r = 0; r < chunk.count; r++)
    memcpy(y + chunk.rows[r] * OUT + p * WIDE, sums + r * WIDE, columns * sizeof(T));
}

// 1 where a species is not below SPECIES
extern "C" int NAME(const T* x, const T* packed, const int64_t* index, T* y, int64_t count, int threads) {
  int64_t starts[SPECIES + 1] = {};
  for (int64_t n = 0; n < count; n++) {
    if (uint64_t(index[n]) >= uint64_t(SPECIES)) return 1;
    starts[index[n] + 1]++;
  }
  for (int64_t s = 0; s < SPECIES; s++) starts[s + 1] += starts[s];
  std::vector<int64_t> rows(count);
  int64_t next[SPECIES];
  std::copy(starts, starts + SPECIES, next);
  for (int64_t n = 0; n < count; n++) rows[next[index[n]]++] = n;
  std::vector<Chunk> chunks;
  for (int64_t s = 0; s < SPECIES; s++)
    for (int64_t at = starts[s]; at < starts[s + 1];) {
      const int64_t left = starts[s + 1] - at, parts = (left + CHUNK - 1) / CHUNK;  // of equal size, in whole tiles
      const int64_t size = std::min(((left + parts - 1) / parts + M - 1) / M * M, left);
      chunks.push_back({rows.data() + at, size, s});
      at += size;
    }
  const int64_t all = int64_t(chunks.size()) * PANELS;
  #pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && count > 8)
  for (int64_t i = 0; i < all; i++) product(x, packed, y, chunks[i / PANELS], i % PANELS);
  return 0;
}
"""
