"""C++ text that several kernels share: blocks of rows to lanes and back."""

from __future__ import annotations

#: needs T and LANES, a power of two; defines L, a vector of LANES numbers
TRANSPOSES = """
#include <utility>
typedef T L __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FXPASS_SHUFFLE 1
#endif
#endif
#ifdef FXPASS_SHUFFLE
// exchanges the off-diagonal blocks of H x H numbers between the rows a and b
template <int64_t H, size_t... I> static inline void exchange(L& a, L& b, std::index_sequence<I...>) {
  const L upper = __builtin_shufflevector(a, b, (I & H ? LANES + I - H : I)...);
  b = __builtin_shufflevector(a, b, (I & H ? LANES + I : I + H)...);
  a = upper;
}
template <int64_t H = 1> static inline void transpose(L* rows) {
  if constexpr (H < LANES) {
    for (int64_t row = 0; row < LANES; ++row)
      if (!(row & H)) exchange<H>(rows[row], rows[row + H], std::make_index_sequence<LANES>());
    transpose<2 * H>(rows);
  }
}
static constexpr int64_t whole(int64_t n) { return n / LANES * LANES; }
#else
static inline void transpose(L*) {}
static constexpr int64_t whole(int64_t) { return 0; }
#endif

// LANES rows of n numbers, one after the other -> n vectors, `stride` numbers apart
template <int64_t n> static inline void to_lanes(const T* rows, T* vectors, int64_t stride) {
  for (int64_t i = 0; i < whole(n); i += LANES) {
    L block[LANES];
    for (int64_t lane = 0; lane < LANES; ++lane) block[lane] = *(const L*)(rows + lane * n + i);
    transpose(block);
    for (int64_t k = 0; k < LANES; ++k) *(L*)(vectors + (i + k) * stride) = block[k];
  }
  for (int64_t lane = 0; lane < LANES; ++lane)
    for (int64_t i = whole(n); i < n; ++i) vectors[i * stride + lane] = rows[lane * n + i];
}
template <int64_t n> static inline void from_lanes(const T* vectors, T* rows, int64_t stride) {
  for (int64_t i = 0; i < whole(n); i += LANES) {
    L block[LANES];
    for (int64_t k = 0; k < LANES; ++k) block[k] = *(const L*)(vectors + (i + k) * stride);
    transpose(block);
    for (int64_t lane = 0; lane < LANES; ++lane) *(L*)(rows + lane * n + i) = block[lane];
  }
  for (int64_t lane = 0; lane < LANES; ++lane)
    for (int64_t i = whole(n); i < n; ++i) rows[lane * n + i] = vectors[i * stride + lane];
}
"""
