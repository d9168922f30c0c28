// The products of Winograd's convolution: of floats, or of pairs of 16-bit integers.
//
// A processor with VNNI multiplies and adds two pairs of integers where it multiplies and adds one
// pair of floats. Each row of a matrix is scaled to the norm kRowNorm, and each column of the
// weight to at most 66000 (ds/ops/conv/winograd_int16.py). By Cauchy and Schwarz no sum overflows
// 32 bits, and a rounding is 1e-4 of a value, a tenth of what it is in bfloat16.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "winograd.h"

constexpr float kRowNorm = 32000.0f;
constexpr int64_t kDepth = 256;  // input channels of a product; another goes on with its sums

// How values become factors of the products, how a step of them is added to the sums, and what the
// sums are worth.
struct Singles {
  using Factor = float;
  using Sum = float;
  template <class V>
  using Sums = V;
  static constexpr int64_t kChannels = 1;  // of a step
  static constexpr bool kScaled = false;

  template <class V>
  static INLINE V add(const float* factor, V weights, V sums) {
    return sums + *factor * weights;
  }

  template <class V>
  static INLINE V values(V sums) {
    return sums;
  }
};

struct Pairs {
  using Factor = int16_t;
  using Sum = int32_t;
  template <class V>
  using Sums = Ints<V>;
  static constexpr int64_t kChannels = 2;
  static constexpr bool kScaled = true;

  template <class V>
  static INLINE Ints<V> add(const int16_t* factors, Ints<V> weights, Ints<V> sums) {
    uint32_t pair;
    std::memcpy(&pair, factors, sizeof pair);
    const Bits<V> pairs = Bits<V>{} + pair;
    const Ints<V> first = (Ints<V>)(pairs << 16) >> 16, second = (Ints<V>)pairs >> 16;
    const Ints<V> even = (Ints<V>)((Bits<V>)weights << 16) >> 16, odd = weights >> 16;
    return (Ints<V>)((Bits<V>)sums + (Bits<V>)(first * even) + (Bits<V>)(second * odd));
  }

  template <class V>
  static INLINE V values(Ints<V> sums) {
    return __builtin_convertvector(sums, V);
  }

  // Scales the rows of all points to integers, of which every kDepth channels lie `apart`; `worth`
  // becomes what one of a row is worth.
  template <class V>
  static INLINE void narrow(const float* values, int64_t row, int64_t channels, int16_t* to,
                            int64_t plane, int64_t apart, float* worth) {
    float scales[kPoints];
    for (int64_t point = 0; point < kPoints; ++point) {
      V squares = {};
      for (int64_t c = 0; c < channels; c += kLanes<V>) {
        const V value = load<V>(values + point * row + c);
        squares += value * value;
      }
      worth[point] = total(squares);
    }
    for (int64_t point = 0; point < kPoints; ++point) {
      worth[point] = std::sqrt(worth[point]) / kRowNorm;
      scales[point] = 1.0f / std::max(worth[point], std::numeric_limits<float>::min());
    }
    // 1.5 * 2**23: a sum with it has the nearest integer in its low mantissa bits.
    const V magic = splat<V>(12582912.0f);
    for (int64_t point = 0; point < kPoints; ++point) {
      const V scale = splat<V>(scales[point]);
      for (int64_t c = 0; c < channels; c += kLanes<V>) {
        const V shifted = load<V>(values + point * row + c) * scale + magic;
        const Halves<V> integers = __builtin_convertvector((Bits<V>)shifted, Halves<V>);
        store(integers, to + point * plane + c / kDepth * apart + c % kDepth);
      }
    }
  }

  template <class V>
  static INLINE float total(V values) {
    for (int64_t half = kLanes<V> / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) values[i] += values[i + half];
    }
    return values[0];
  }
};

#if defined(__x86_64__)
struct VnniPairs : Pairs {
  typedef int32_t AnyPair __attribute__((may_alias));

  template <class V>
  static INLINE Ints<V> add(const int16_t* factors, Ints<V> weights, Ints<V> sums) {
    asm("vpdpwssd %2%{1to16%}, %1, %0"
        : "+v"(sums)
        : "v"(weights), "m"(*reinterpret_cast<const AnyPair*>(factors)));
    return sums;
  }
};
#endif
