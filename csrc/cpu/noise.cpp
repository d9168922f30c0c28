// Standard normal noise: Philox4x32-10 (Salmon et al. 2011, section 3.3) and Box-Muller.
//
//   r = Philox(counter = (block, 0, index), key = seed)     u_k = (r_k + 1/2) / 2**32
//   z = sqrt(-2 ln u_0) (cos, sin)(2 pi u_1), sqrt(-2 ln u_2) (cos, sin)(2 pi u_3)
//
// A lane makes a block. Words become floats where nothing is lost: if u is close to 1, ln u is
// computed from the exact 1 - u, and an angle is measured from the nearest axis. So the relative
// error is at most 4 * 2**-23, near zeros as well (2.7 * 2**-23 was the largest of 25 million).
#include "noise.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace {

constexpr int64_t kSerialTiles = 4;  // with fewer, a second thread costs more than it brings

// The 64-bit products of the even lanes of a with a number of 32 bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
typedef int Ints4 __attribute__((vector_size(16)));
typedef int Ints8 __attribute__((vector_size(32)));
typedef int Ints16 __attribute__((vector_size(64)));

// GCC makes three multiplications of it if it is not told that one will do.
INLINE Longs<Floats4> multiply_even(Longs<Floats4> a, Longs<Floats4> by) {
  return (Longs<Floats4>)__builtin_ia32_pmuludq128((Ints4)a, (Ints4)by);
}

INLINE Longs<Floats8> multiply_even(Longs<Floats8> a, Longs<Floats8> by) {
  return (Longs<Floats8>)__builtin_ia32_pmuludq256((Ints8)a, (Ints8)by);
}

INLINE Longs<Floats16> multiply_even(Longs<Floats16> a, Longs<Floats16> by) {
  typedef long long Products __attribute__((vector_size(64)));
  return (Longs<Floats16>)__builtin_ia32_pmuludq512_mask((Ints16)a, (Ints16)by, Products{}, 0xff);
}
#else
template <class L>
INLINE L multiply_even(L a, L by) {
  return (a & 0xffffffffu) * by;
}
#endif

template <class V>
struct Words {
  Bits<V> word[4];
};

// One round: the two products, high and low words, mixed with the other words and the key.
template <class V>
INLINE Words<V> philox_round(const Words<V>& c, uint32_t key0, uint32_t key1) {
  const uint64_t multipliers[2] = {0xD2511F53u, 0xCD9E8D57u};
  Bits<V> high[2], low[2];
  for (int64_t i = 0; i < 2; ++i) {
    const Longs<V> a = (Longs<V>)c.word[2 * i], by = Longs<V>{} + multipliers[i];
    const Longs<V> even = multiply_even(a, by), odd = multiply_even(a >> 32, by);
    low[i] = (Bits<V>)((even & 0xffffffffu) | (odd << 32));
    high[i] = (Bits<V>)((even >> 32) | (odd & 0xffffffff00000000u));
  }
  return {{high[1] ^ c.word[1] ^ key0, low[1], high[0] ^ c.word[3] ^ key1, low[0]}};
}

template <class V>
INLINE Words<V> philox(Words<V> c, uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    c = philox_round<V>(c, key0, key1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

template <class V>
INLINE V square_root(V x) {
  float values[kLanes<V>];
  store(x, values);
  for (int64_t i = 0; i < kLanes<V>; ++i) values[i] = std::sqrt(values[i]);
  return load<V>(values);
}

// -2 ln u for u = (word + 1/2) / 2**32: with u = 2**e * (1 + f) and f between sqrt(1/2) - 1 and
// sqrt(2) - 1, ln u = e ln 2 + ln(1 + f), the latter by the polynomial of Cephes' logf.
template <class V>
INLINE V minus_two_log(Bits<V> word) {
  const uint32_t root_half = 0x3f3504f3u;  // the bits of sqrt(1/2)
  const V scaled = __builtin_convertvector(word, V) + 0.5f;
  const Bits<V> above = (Bits<V>)scaled - root_half;
  const Bits<V> exponent = above >> 23;
  const V rest = (__builtin_convertvector(~word, V) + 0.5f) * -0x1p-32f;  // u - 1
  const V mantissa = (V)((above & 0x7fffffu) + root_half);
  const V f = exponent == 32u ? rest : mantissa - 1.0f;
  const V e = __builtin_convertvector(exponent, V) - 32.0f;
  const V square = f * f;
  V p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * square - e * 2.12194440e-4f - 0.5f * square;
  return ((p + f) + e * 0.693359375f) * -2.0f;
}

// The two normals of a radius and an angle: the quarter turn nearest to the angle, and the
// polynomials of Cephes' sinf and cosf for the eighth of a turn at most that is left.
template <class V>
INLINE void box_muller(Bits<V> radius, Bits<V> angle, V* z) {
  typedef int32_t Signed __attribute__((vector_size(sizeof(V))));
  const V r = square_root(minus_two_log<V>(radius));
  const Bits<V> quarter = (angle + 0x20000000u) >> 30;
  const Signed left = (Signed)(angle - (quarter << 30));
  const V x = (__builtin_convertvector(left, V) + 0.5f) * 1.46291807926715968e-9f;  // 2 pi / 2**32
  const V square = x * x;
  V sine = square * -1.9515295891e-4f + 8.3321608736e-3f;
  sine = sine * square - 1.6666654611e-1f;
  sine = sine * square * x + x;
  V cosine = square * 2.443315711809948e-5f - 1.388731625493765e-3f;
  cosine = cosine * square + 4.166664568298827e-2f;
  cosine = cosine * square * square - 0.5f * square + 1.0f;
  const Bits<V> odd = quarter & 1u;
  const V along = odd != 0u ? sine : cosine, across = odd != 0u ? cosine : sine;
  z[0] = r * (V)((Bits<V>)along ^ ((quarter + 1u) & 2u) << 30);
  z[1] = r * (V)((Bits<V>)across ^ (quarter & 2u) << 30);
}

template <class T>
struct Tiles {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    constexpr int64_t lanes = kLanes<V>;
    const Normals& call = *static_cast<const Normals*>(context);
    T* out = static_cast<T*>(call.out);
    Bits<V> lane;
    for (int64_t i = 0; i < lanes; ++i) lane[i] = static_cast<uint32_t>(i);
    for (int64_t block = begin * kNoiseBlocks; block < end * kNoiseBlocks; block += lanes) {
      const Bits<V> zero{};
      const Words<V> r = philox<V>({{lane + static_cast<uint32_t>(block), zero,
                                     zero + static_cast<uint32_t>(call.index),
                                     zero + static_cast<uint32_t>(call.index >> 32)}},
                                   call.seed);
      V z[4];
      box_muller<V>(r.word[0], r.word[1], z);
      box_muller<V>(r.word[2], r.word[3], z + 2);
      float columns[4][lanes], rows[4 * lanes];
      for (int64_t k = 0; k < 4; ++k) store(z[k], columns[k]);
      for (int64_t i = 0; i < lanes; ++i) {
        for (int64_t k = 0; k < 4; ++k) rows[4 * i + k] = columns[k][i];
      }
      for (int64_t i = 0; i < 4 * lanes; ++i) narrow(rows[i], out + i);
      out += 4 * lanes;
    }
  }
};

// Makes the words of one counter and key in every lane.
struct OneCounter {
  template <class V>
  static INLINE void run(int64_t, int64_t, void* context) {
    uint32_t* words = static_cast<uint32_t*>(context);
    Words<V> c;
    for (int64_t k = 0; k < 4; ++k) c.word[k] = Bits<V>{} + words[k];
    c = philox<V>(c, uint64_t{words[5]} << 32 | words[4]);
    for (int64_t k = 0; k < 4; ++k) words[k] = c.word[k][kLanes<V> - 1];
  }
};

struct Call {
  RangeFunction make;
  const int64_t* indices;
  uint64_t seed;
  char* out;
  int64_t size, tiles, bytes;  // of a row, of a row, of an element
};

void run_tiles(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / call.tiles, tile = task % call.tiles;
    const int64_t count = std::min(kNoise, call.size - tile * kNoise);
    char* out = call.out + (row * call.size + tile * kNoise) * call.bytes;
    float whole[kNoise];
    Normals normals{call.seed, static_cast<uint64_t>(call.indices[row]), out};
    if (count < kNoise) normals.out = whole;
    call.make(tile, tile + 1, &normals);
    if (count < kNoise) std::memcpy(out, whole, count * call.bytes);
  }
}

}  // namespace

RangeFunction normals(bool bfloat16_data) {
  return bfloat16_data ? choose<Tiles<bfloat16>>() : choose<Tiles<float>>();
}

// out is [rows, size], float32 or bfloat16; indices [rows]. Returns 0, or the error code of the
// thread pool.
EXPORT int ds_noise(const int64_t* indices, void* out, int64_t seed, int64_t rows, int64_t size,
                    bool bfloat16_data) {
  const int64_t tiles = (size + kNoise - 1) / kNoise;
  Call call{normals(bfloat16_data), indices, static_cast<uint64_t>(seed), static_cast<char*>(out),
            size,                   tiles,   bfloat16_data ? 2 : 4};
  return parallel_for(rows * tiles, kSerialTiles, run_tiles, &call);
}

// Turns words[0 .. 3], a counter, into Philox's four words under the key words[4 .. 5] (tests
// compare them with the published ones).
EXPORT void ds_philox(uint32_t* words) { choose<OneCounter>()(0, 1, words); }
