"""C++ for ``fxpass::rows_by``: a counting sort of an index."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError

_SOURCE = """#include <cstdint>
#include <cstring>
// offsets [size + 1], then the stable permutation [count] that sorts index; 1 where an entry is not below size
extern "C" int rows_by(const int64_t* index, int64_t* order, int64_t count, int64_t size) {
  memset(order, 0, (size + 1) * sizeof(int64_t));
  for (int64_t n = 0; n < count; n++) {
    if (index[n] < 0 || index[n] >= size) return 1;
    order[index[n] + 1]++;
  }
  for (int64_t k = 0; k < size; k++) order[k + 1] += order[k];
  int64_t* permutation = order + size + 1;
  for (int64_t n = 0; n < count; n++) permutation[order[index[n]]++] = n;
  for (int64_t k = size; k > 0; k--) order[k] = order[k - 1];  // each offset had moved on to the next
  order[0] = 0;
  return 0;
}
"""


@dataclass(frozen=True)
class RowsKernel:
    """The source, and how it is called."""

    name: str = "rows_by"
    source: str = _SOURCE

    def bind(self, library: ctypes.CDLL) -> Callable[..., Any]:
        """``rows_by`` of the built library: (index [count] int64, size) -> [size + 1 + count] int64."""
        function = library.rows_by
        function.restype = ctypes.c_int
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]

        def rows_by(index: Tensor, size: int) -> Tensor:
            index = index.contiguous()
            order = torch.empty(size + 1 + index.shape[0], dtype=torch.int64, device="cpu")
            if function(index.data_ptr(), order.data_ptr(), index.shape[0], size):
                raise KernelError(f"an edge names an atom that is not below {size}, the number of atoms")
            return order

        return rows_by
