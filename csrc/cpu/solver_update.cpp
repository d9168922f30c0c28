// One step of a solver that is linear in the network's outputs: x <- a x + b_1 h_1 + b_2 h_2 + ...
//
// Reads x and the terms once; writes x and, in the same pass, its copy in the type of the network.
#include <algorithm>

#include "simd.h"

namespace {

constexpr int64_t kTile = 1024;       // elements whose sums stay in the L1 cache
constexpr int64_t kSerialTiles = 16;  // with fewer, a second thread costs more than it brings

struct Call {
  float* x;
  void* copy;
  const void* const* terms;
  const bool* narrow_terms;
  const float* row;  // a, b_1, b_2, ...
  int64_t size, count;
};

template <class T>
INLINE void add_term(const void* term, int64_t first, int64_t count, float b, float* sums) {
  const T* h = static_cast<const T*>(term) + first;
  for (int64_t i = 0; i < count; ++i) sums[i] += b * widen(h[i]);
}

template <class T>
struct Update {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    const Call& call = *static_cast<const Call*>(context);
    float sums[kTile];
    for (int64_t first = begin * kTile; first < std::min(end * kTile, call.size); first += kTile) {
      const int64_t count = std::min(kTile, call.size - first);
      float* x = call.x + first;
      for (int64_t i = 0; i < count; ++i) sums[i] = call.row[0] * x[i];
      for (int64_t k = 0; k < call.count; ++k) {
        if (call.narrow_terms[k]) {
          add_term<bfloat16>(call.terms[k], first, count, call.row[1 + k], sums);
        } else {
          add_term<float>(call.terms[k], first, count, call.row[1 + k], sums);
        }
      }
      std::memcpy(x, sums, count * sizeof(float));
      if (call.copy == nullptr) continue;
      T* copy = static_cast<T*>(call.copy) + first;
      for (int64_t i = 0; i < count; ++i) narrow(sums[i], copy + i);
    }
  }
};

}  // namespace

// x, copy (or null) and the terms are [size] in one order; x is float32, the others float32 or
// bfloat16. row is the coefficients of x and of the `count` terms. Returns 0, or the error code of
// the thread pool.
EXPORT int ds_solver_update(float* x, void* copy, const void* const* terms,
                            const bool* narrow_terms, const float* row, int64_t size, int64_t count,
                            bool bfloat16_copy) {
  Call call{x, copy, terms, narrow_terms, row, size, count};
  const RangeFunction function = bfloat16_copy ? choose<Update<bfloat16>>() : choose<Update<float>>();
  return parallel_for((size + kTile - 1) / kTile, kSerialTiles, function, &call);
}
