"""C++ for what stands between a host's edges and a program: vectors, a look at the list, and forces, one pass each."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import Bound

_TYPES = {torch.float32: "float", torch.float64: "double"}
#: bits of what a look at the list tells
PLAIN, IN_ORDER = 1, 2
#: an edge this near to a bound, relative to it, is left to torch, which rounds lengths: both must decide the same
MARGINS = {torch.float32: 1e-5, torch.float64: 1e-13}


@dataclass(frozen=True)
class EdgesKernel:
    """The source of the three functions for float32 and float64."""

    name: str = "edges"

    @property
    def source(self) -> str:
        functions = "".join(_FUNCTIONS.replace("TYPE", type) for type in _TYPES.values())
        return _HEAD + functions

    def bind(self, library: ctypes.CDLL) -> BoundEdges:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        kinds = {
            "vectors": ([pointer] * 4 + [integer] * 2, ctypes.c_int),
            "look": ([pointer] * 2 + [integer] * 2 + [ctypes.c_double] * 2, ctypes.c_int),
            "forces": ([pointer] * 3 + [integer] * 2, ctypes.c_int),
            "virial": ([pointer] * 3 + [integer], None),
        }
        for what, (arguments, result) in kinds.items():
            for type in _TYPES.values():
                function = getattr(library, f"{what}_{type}")
                function.argtypes, function.restype = arguments, result
        return BoundEdges(library)


class BoundEdges(Bound):
    """Those of :class:`EdgesKernel`; they say None where torch must have a look."""

    def vectors(self, positions: Tensor, index: Tensor, shifts: Tensor) -> Tensor | None:
        """``positions[index[1]] - positions[index[0]] + shifts``, [edges, 3]."""
        if not _plain(positions, positions, shifts) or not _index(index, shifts):
            return None
        made = torch.empty_like(shifts)
        function = getattr(self.library, f"vectors_{_TYPES[positions.dtype]}")
        pointers = (t.data_ptr() for t in (positions, index, shifts, made))
        return None if function(*pointers, shifts.shape[0], positions.shape[0]) else made

    def look(self, vectors: Tensor, index: Tensor, atoms: int, shortest: float, cutoff: float) -> int:
        """``PLAIN`` where no edge is padding, too short, too long or NaN, and ``IN_ORDER`` where all are in order."""
        if not _plain(vectors, vectors) or not _index(index, vectors):
            return 0
        function = getattr(self.library, f"look_{_TYPES[vectors.dtype]}")
        margin = MARGINS[vectors.dtype]
        low, high = shortest * (1 + margin), cutoff * (1 - margin)
        return function(vectors.data_ptr(), index.data_ptr(), vectors.shape[0], atoms, low, high)

    def forces(self, gradient: Tensor, index: Tensor, like: Tensor) -> Tensor | None:
        """Sums of ``gradient`` [edges, 3] over edges sent less those over edges received, of the shape of ``like``."""
        if not _plain(like, gradient) or not _index(index, gradient):
            return None
        made = torch.empty_like(like)
        function = getattr(self.library, f"forces_{_TYPES[like.dtype]}")
        failed = function(gradient.data_ptr(), index.data_ptr(), made.data_ptr(), gradient.shape[0], like.shape[0])
        return None if failed else made


    def virial(self, gradient: Tensor, vectors: Tensor) -> Tensor | None:
        """-sum of ``gradient`` (x) ``vectors`` over edges, [3, 3]."""
        if not _plain(gradient, vectors) or gradient.shape != vectors.shape:
            return None
        made = gradient.new_empty((3, 3))
        function = getattr(self.library, f"virial_{_TYPES[gradient.dtype]}")
        function(gradient.data_ptr(), vectors.data_ptr(), made.data_ptr(), gradient.shape[0])
        return made


def _plain(like: Tensor, *tensors: Tensor) -> bool:
    """Whether these are contiguous [rows, 3] on the CPU, of one type that there is a function for, without autograd."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (like, *tensors))
    return not recorded and all(
        t.dtype == like.dtype in _TYPES and t.is_cpu and t.is_contiguous() and t.dim() == 2 and t.shape[1] == 3
        for t in (like, *tensors)
    )


def _index(index: Tensor, edges: Tensor) -> bool:
    """Whether the index is [2, edges], as the functions read it."""
    plain = index.dtype == torch.int64 and index.is_cpu and index.is_contiguous()
    return plain and index.shape == (2, edges.shape[0])


_HEAD = """#include <cmath>
#include <cstdint>
#include <vector>

// 1 where an index is not below the number of atoms
static int outside(const int64_t* index, int64_t edges, int64_t atoms) {
  bool found = false;
  for (int64_t k = 0; k < 2 * edges; k++) found |= uint64_t(index[k]) >= uint64_t(atoms);
  return found;
}
"""

_FUNCTIONS = """
extern "C" int vectors_TYPE(const TYPE* positions, const int64_t* index, const TYPE* shifts, TYPE* vectors,
    int64_t edges, int64_t atoms) {
  if (outside(index, edges, atoms)) return 1;
  for (int64_t e = 0; e < edges; e++) {
    const TYPE *to = positions + 3 * index[edges + e], *from = positions + 3 * index[e];
    for (int k = 0; k < 3; k++) vectors[3 * e + k] = (to[k] - from[k]) + shifts[3 * e + k];
  }
  return 0;
}

// bit 1: no index is negative and every length is in [low, high); bit 2: strictly by receiver, then sender
extern "C" int look_TYPE(const TYPE* vectors, const int64_t* index, int64_t edges, int64_t atoms,
    double low, double high) {
  bool plain = true, ordered = true;
  const double least = low * low, most = high * high;
  int64_t last = -1;
  for (int64_t e = 0; e < edges; e++) {
    const double x = vectors[3 * e], y = vectors[3 * e + 1], z = vectors[3 * e + 2], square = x * x + y * y + z * z;
    plain &= square > 0 && square >= least && square < most && (index[e] | index[edges + e]) >= 0;
    const int64_t key = index[edges + e] * (atoms + 1) + index[e];
    ordered &= key > last;
    last = key;
  }
  return plain + 2 * ordered;
}

extern "C" int forces_TYPE(const TYPE* gradient, const int64_t* index, TYPE* forces, int64_t edges, int64_t atoms) {
  if (outside(index, edges, atoms)) return 1;
  std::vector<double> sums(3 * atoms);  // forces are small differences of large numbers
  for (int64_t e = 0; e < edges; e++) {
    double *to = sums.data() + 3 * index[edges + e], *from = sums.data() + 3 * index[e];
    for (int k = 0; k < 3; k++) {
      from[k] += gradient[3 * e + k];
      to[k] -= gradient[3 * e + k];
    }
  }
  for (int64_t k = 0; k < 3 * atoms; k++) forces[k] = sums[k];
  return 0;
}

extern "C" void virial_TYPE(const TYPE* gradient, const TYPE* vectors, TYPE* made, int64_t edges) {
  double sums[4][9] = {};  // four that do not wait for one another
  for (int64_t e = 0; e < edges; e++)
    for (int i = 0; i < 3; i++)
      for (int k = 0; k < 3; k++) sums[e % 4][3 * i + k] -= double(gradient[3 * e + i]) * double(vectors[3 * e + k]);
  for (int k = 0; k < 9; k++) made[k] = (sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]);
}
"""
