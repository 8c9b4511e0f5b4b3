"""C++ for the search for pairs of atoms within a cutoff: images in boxes, in time proportional to their number."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import Bound


@dataclass(frozen=True)
class NeighboursKernel:
    """The source of the search."""

    name: str = "neighbours"

    @property
    def source(self) -> str:
        return _SOURCE

    def bind(self, library: ctypes.CDLL) -> BoundNeighbours:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        library.neighbours_search.argtypes = [*[pointer] * 3, ctypes.c_double, integer, ctypes.c_int]
        library.neighbours_search.restype = integer
        library.neighbours_take.argtypes, library.neighbours_take.restype = [pointer, pointer], None
        return BoundNeighbours(library)


class BoundNeighbours(Bound):
    """Those of :class:`NeighboursKernel`."""

    def pairs(self, positions: Tensor, cell: Tensor | None, cutoff: float) -> tuple[Tensor, Tensor] | None:
        """What :func:`fxpass.neighbours.pairs_within` returns, or None where torch must search.

        Pairs of one centre come by neighbour, the order of programs with sorted edges.  Torch must search where
        autograd records positions or cell, for other types than float64, for atoms so far apart that most boxes would
        be empty, and for cells so narrow that an atom has thousands of images.
        """
        given = [positions] if cell is None else [positions, cell]
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        if recorded or any(t.dtype != torch.float64 or not t.is_cpu for t in given):
            return None
        positions = positions.contiguous()
        lattice = inverse = None
        if cell is not None:
            lattice, inverse = cell.contiguous(), torch.linalg.inv(cell).contiguous()
        pointers = (None if t is None else t.data_ptr() for t in (positions, lattice, inverse))
        found = self.library.neighbours_search(*pointers, cutoff, positions.shape[0], torch.get_num_threads())
        if found < 0:
            return None
        index = torch.empty((2, found), dtype=torch.int64)
        vectors = torch.empty((found, 3), dtype=torch.float64)
        self.library.neighbours_take(index.data_ptr(), vectors.data_ptr())
        return index, vectors


_SOURCE = """#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct Image { double at[3]; int64_t owner; double shift[3]; };
struct Pair { int64_t neighbour, centre; double vector[3]; };
extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();

// what the last search of this thread found: pairs of some neighbours after those of others, and pairs by centre
static thread_local std::vector<std::vector<Pair>> found;
static thread_local std::vector<int64_t> place_of;

static void times(const double* row, const double* matrix, double* made) {
  for (int k = 0; k < 3; k++) made[k] = row[0] * matrix[k] + row[1] * matrix[3 + k] + row[2] * matrix[6 + k];
}

// the number of pairs, or -1 where boxes would be many and empty, or images very many
extern "C" int64_t neighbours_search(const double* positions, const double* cell, const double* inverse, double cutoff,
    int64_t atoms, int threads) {
  found.clear();
  place_of.assign(atoms + 1, 0);
  if (atoms == 0) return 0;
  std::vector<double> home(positions, positions + 3 * atoms), turns(3 * atoms);
  std::vector<Image> images;
  int64_t many[3] = {};
  double reach[3] = {};
  if (cell) for (int axis = 0; axis < 3; axis++) {
    const double *inv = inverse + axis;  // planes of the lattice are 1 / norm of this column apart
    reach[axis] = cutoff * std::sqrt(inv[0] * inv[0] + inv[3] * inv[3] + inv[6] * inv[6]);
    if (!(reach[axis] < 1000)) return -1;
    many[axis] = int64_t(std::ceil(reach[axis]));
  }
  for (int64_t n = 0; n < atoms; n++) {
    double fractions[3] = {};
    if (cell) {
      times(positions + 3 * n, inverse, fractions);
      for (int k = 0; k < 3; k++) fractions[k] -= turns[3 * n + k] = std::floor(fractions[k]);
      times(fractions, cell, &home[3 * n]);
    }
    const auto near = [&](int axis, int64_t step) {
      const double moved = fractions[axis] + step;
      return moved >= -reach[axis] && moved < 1 + reach[axis];
    };
    for (int64_t a = -many[0]; a <= many[0]; a++) {
      if (cell && !near(0, a)) continue;
      for (int64_t b = -many[1]; b <= many[1]; b++) {
        if (cell && !near(1, b)) continue;
        for (int64_t c = -many[2]; c <= many[2]; c++) {
          if (cell && !near(2, c)) continue;
          Image image = {{home[3 * n], home[3 * n + 1], home[3 * n + 2]}, n, {double(a), double(b), double(c)}};
          double offset[3] = {};
          if (cell) times(image.shift, cell, offset);
          for (int k = 0; k < 3; k++) image.at[k] += offset[k];
          images.push_back(image);
        }
      }
    }
  }

  const double width = cutoff / 2;  // 5 x 5 x 5 boxes hold a sphere in fewer candidates than 3 x 3 x 3 wider ones
  double low[3] = {INFINITY, INFINITY, INFINITY}, high[3] = {-INFINITY, -INFINITY, -INFINITY};
  for (const Image& image : images)
    for (int k = 0; k < 3; k++) low[k] = std::min(low[k], image.at[k]), high[k] = std::max(high[k], image.at[k]);
  double sizes[3], boxes = 1;
  for (int k = 0; k < 3; k++) boxes *= sizes[k] = std::floor((high[k] - low[k]) / width) + 5;  // two empty ones around
  if (!(boxes <= 64.0 * images.size() + 4096)) return -1;
  const int64_t rows = int64_t(sizes[1]), columns = int64_t(sizes[2]);
  const auto place = [&](const double* at, int k) { return int64_t(std::floor((at[k] - low[k]) / width)) + 2; };
  const auto box = [&](const double* at) { return (place(at, 0) * rows + place(at, 1)) * columns + place(at, 2); };
  std::vector<int64_t> start(int64_t(boxes) + 1), keys(images.size());
  for (size_t n = 0; n < images.size(); n++) start[(keys[n] = box(images[n].at)) + 1]++;
  for (size_t b = 1; b < start.size(); b++) start[b] += start[b - 1];
  std::vector<int64_t> next(start.begin(), start.end() - 1), order(images.size());
  std::vector<double> x(images.size()), y(images.size()), z(images.size());
  for (size_t n = 0; n < images.size(); n++) {
    const int64_t at = next[keys[n]]++;
    order[at] = n;
    x[at] = images[n].at[0], y[at] = images[n].at[1], z[at] = images[n].at[2];
  }

  // each atom looks for those that it is a neighbour of; listed by centre, they keep the order of neighbours
  std::vector<std::vector<Pair>> parts(threads < 1 ? 1 : threads);
  #pragma omp parallel num_threads(threads) if (threads > 1 && atoms > 64)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    std::vector<Pair>& mine = parts[thread];
    std::vector<int64_t> close(images.size());
    mine.reserve(64 * atoms / team);
    for (int64_t n = atoms * thread / team; n < atoms * (thread + 1) / team; n++) {
      const double *here = &home[3 * n], square = cutoff * cutoff;
      const int64_t middle = box(here);
      int64_t count = 0;
      for (int64_t a = -2; a <= 2; a++)
        for (int64_t b = -2; b <= 2; b++) {
          const int64_t row = middle + (a * rows + b) * columns;
          for (int64_t at = start[row - 2]; at < start[row + 3]; at++) {
            const double dx = here[0] - x[at], dy = here[1] - y[at], dz = here[2] - z[at];
            close[count] = order[at];  // without a branch, which nobody could foresee
            count += dx * dx + dy * dy + dz * dz <= square;
          }
        }
      for (int64_t i = 0; i < count; i++) {
        const Image& image = images[close[i]];
        const int64_t other = image.owner;
        if (other == n && image.shift[0] == 0 && image.shift[1] == 0 && image.shift[2] == 0) continue;
        Pair pair = {n, other, {}};
        double units[3], offset[3] = {};
        for (int k = 0; k < 3; k++) units[k] = image.shift[k] - turns[3 * other + k] + turns[3 * n + k];
        if (cell) times(units, cell, offset);
        for (int k = 0; k < 3; k++) pair.vector[k] = (positions[3 * other + k] - positions[3 * n + k]) + offset[k];
        mine.push_back(pair);
      }
    }
  }
  for (const auto& part : parts)
    for (const Pair& pair : part) place_of[pair.centre + 1]++;
  for (int64_t n = 0; n < atoms; n++) place_of[n + 1] += place_of[n];
  found.swap(parts);
  return place_of[atoms];
}

// writes them to index [2, pairs], (neighbour, centre), and vectors [pairs, 3], from the neighbour to the centre
extern "C" void neighbours_take(int64_t* index, double* vectors) {
  const int64_t count = place_of.back();
  for (const auto& part : found)
    for (const Pair& pair : part) {
      const int64_t at = place_of[pair.centre]++;
      index[at] = pair.neighbour, index[count + at] = pair.centre;
      memcpy(vectors + 3 * at, pair.vector, sizeof pair.vector);
    }
  found.clear();
}
"""
