// One source, several instruction sets. A kernel is INLINE code on vectors that are as wide as a
// register; it is instantiated for each of the targets below, and choose() picks the one that this
// processor runs. (GCC would take wider vectors, too, but keeps them in memory.)
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "parallel.h"

#define INLINE_LAMBDA __attribute__((always_inline))
#define INLINE inline INLINE_LAMBDA

#if defined(__x86_64__)
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#endif

enum SimdLevel { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kVnni = 3 };  // kVnni: kAvx512 and VNNI

SimdLevel simd_level();

// The vectors of the targets. V stands for one of them.
typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));

template <class Kernel>
void run_portable(int64_t begin, int64_t end, void* context) {
  Kernel::template run<Floats4>(begin, end, context);
}

#if defined(__x86_64__)
template <class Kernel>
TARGET_AVX2 void run_avx2(int64_t begin, int64_t end, void* context) {
  Kernel::template run<Floats8>(begin, end, context);
}

template <class Kernel>
TARGET_AVX512 void run_avx512(int64_t begin, int64_t end, void* context) {
  Kernel::template run<Floats16>(begin, end, context);
}
#endif

template <class Kernel>
RangeFunction choose() {
#if defined(__x86_64__)
  if (simd_level() >= kAvx512) return run_avx512<Kernel>;
  if (simd_level() == kAvx2) return run_avx2<Kernel>;
#endif
  return run_portable<Kernel>;
}

template <class V>
struct BitsOf {
  typedef uint16_t halves __attribute__((vector_size(sizeof(V) / 2)));
  typedef uint32_t type __attribute__((vector_size(sizeof(V))));
  typedef int32_t ints __attribute__((vector_size(sizeof(V))));
  typedef uint64_t wide __attribute__((vector_size(2 * sizeof(V))));
  typedef uint64_t longs __attribute__((vector_size(sizeof(V))));
};
template <class V>
using Bits = typename BitsOf<V>::type;
template <class V>
using Ints = typename BitsOf<V>::ints;
template <class V>
using Halves = typename BitsOf<V>::halves;  // as many lanes, half as wide
template <class V>
using Wide = typename BitsOf<V>::wide;  // as many lanes, twice as wide
template <class V>
using Longs = typename BitsOf<V>::longs;  // half as many lanes, each of two

template <class V>
constexpr int64_t kLanes = sizeof(V) / sizeof(float);

struct bfloat16 {
  uint16_t bits;
};

INLINE float widen(float value) { return value; }

INLINE float widen(bfloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Converts one value to its type in memory, rounding to even. Loops over it are vectorized.
INLINE void narrow(float value, float* to) { *to = value; }

INLINE void narrow(float value, bfloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  to->bits = static_cast<uint16_t>((value == value ? rounded : 0x7fc00000u) >> 16);
}

template <class V>
INLINE V splat(float value) {
  return V{} + value;
}

template <class V, class T>
INLINE V load(const T* from) {
  V values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

template <class V, class T>
INLINE void store(V values, T* to) {
  std::memcpy(to, &values, sizeof values);
}

// Most data is read and written in pairs of vectors, because bfloat16 comes out of memory cheapest
// by its even elements and its odd ones.
template <class V>
struct Pair {
  V values[2];
};

template <class V>
constexpr int64_t kPair = 2 * kLanes<V>;

template <class V>
INLINE Pair<V> load_pair(const float* from) {
  return {{load<V>(from), load<V>(from + kLanes<V>)}};
}

template <class V>
INLINE Pair<V> load_pair(const bfloat16* from) {
  Bits<V> both;
  std::memcpy(&both, from, sizeof both);
  return {{(V)(both << 16), (V)(both & 0xffff0000u)}};
}

template <class V>
INLINE void store_pair(Pair<V> pair, float* to) {
  store(pair.values[0], to);
  store(pair.values[1], to + kLanes<V>);
}

enum Purpose { kToRead = 0, kToWrite = 1 };

// Prefetches a pair into the cache. Its address may lie outside of the data.
template <class V, Purpose kPurpose, class T>
INLINE void prefetch_pair(const T* pair) {
  const char* at = reinterpret_cast<const char*>(pair);
  for (uint64_t i = 0; i < kPair<V> * sizeof(T); i += 64) __builtin_prefetch(at + i, kPurpose);
}

// Rounds to bfloat16, to nearest even, in the upper half of each lane. The carry would turn some
// NaNs into infinity, so NaN is written explicitly.
template <class V>
INLINE Bits<V> round_to_bfloat16(V values) {
  const Bits<V> bits = (Bits<V>)values;
  const Bits<V> rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return values == values ? rounded : Bits<V>{} + 0x7fc00000u;
}

// One vector, its lanes in the order of memory.
template <class V>
INLINE V load(const bfloat16* from) {
  Halves<V> values;
  std::memcpy(&values, from, sizeof values);
  return (V)(__builtin_convertvector(values, Bits<V>) << 16);
}

template <class V>
INLINE void store(V values, bfloat16* to) {
  const Halves<V> upper = __builtin_convertvector(round_to_bfloat16(values) >> 16, Halves<V>);
  std::memcpy(to, &upper, sizeof upper);
}

template <class V>
INLINE void store_pair(Pair<V> pair, bfloat16* to) {
  const Bits<V> even = round_to_bfloat16(pair.values[0]), odd = round_to_bfloat16(pair.values[1]);
  const Bits<V> both = (even >> 16) | (odd & 0xffff0000u);
  std::memcpy(to, &both, sizeof both);
}

// The first `count` elements of a pair; reads zeros for the others.
template <class V, class T>
INLINE Pair<V> load_pair(const T* from, int64_t count) {
  if (count == kPair<V>) return load_pair<V>(from);
  T padded[kPair<V>] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load_pair<V>(padded);
}

template <class V, class T>
INLINE void store_pair(Pair<V> pair, T* to, int64_t count) {
  if (count == kPair<V>) return store_pair(pair, to);
  T padded[kPair<V>];
  store_pair(pair, padded);
  std::memcpy(to, padded, count * sizeof(T));
}

// The values of adjacent columns, in the order in which a pair of T holds the columns.
template <class V, class T>
INLINE Pair<V> load_columns(const float* from) {
  if (std::is_same<T, float>::value) return load_pair<V>(from);
  Wide<V> both;
  std::memcpy(&both, from, sizeof both);
  return {{(V)__builtin_convertvector(both, Bits<V>),
           (V)__builtin_convertvector(both >> 32, Bits<V>)}};
}

// Adds a pair of T to the sums of its columns.
template <class V, class T>
INLINE void add_columns(Pair<V> pair, double* sums) {
  float values[kPair<V>];
  if (std::is_same<T, float>::value) {
    store_pair(pair, values);
  } else {
    const Wide<V> both = __builtin_convertvector((Bits<V>)pair.values[0], Wide<V>) |
                         __builtin_convertvector((Bits<V>)pair.values[1], Wide<V>) << 32;
    std::memcpy(values, &both, sizeof both);
  }
  for (int64_t i = 0; i < kPair<V>; ++i) sums[i] += static_cast<double>(values[i]);
}

// e**x to 2 ulp: 2**(n + f) for x = (n + f) ln(2) with |f| <= 1/2, and a polynomial for 2**f whose
// relative error is 1e-7. Without fused products, 24 ulp at the ends of its range. Infinity from
// 88.4 on, at least e**-87, NaN for NaN. Arguments known to be small skip the limits, which take
// four of its instructions.
constexpr float kSmall = 86.0f;

template <bool kIsSmall, class V>
INLINE V exp(V x) {
  if (!kIsSmall) {
    x = x > splat<V>(89.0f) ? splat<V>(89.0f) : x;
    x = x < splat<V>(-87.0f) ? splat<V>(-87.0f) : x;
  }
  // 1.5 * 2**23: a sum with it has the nearest integer in its low mantissa bits.
  const float magic = 12582912.0f;
  const V shifted = x * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  const V f = x * 1.92596299e-8f + (x * 1.44269502163f - n);  // log2(e) in two parts
  V p = f * 1.3264726e-3f + 9.671513e-3f;
  p = p * f + 5.5507336e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.93147e-1f;
  p = p * f + 1.0f;
  return p * (V)(((Bits<V>)shifted + 127u) << 23);
}
