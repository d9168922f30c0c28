// Floats to 8-bit levels: round or floor of clip(x, -1, 1) * 127.5 + 127.5, NaN to 0.
//
// Compiled without contraction: product and sum are rounded one by one, as in PyTorch. Otherwise
// values close to the middle between two levels would go to the other level.
#include <algorithm>

#include "simd.h"

namespace {

constexpr int64_t kTile = 1024;       // elements of a tile
constexpr int64_t kSerialTiles = 16;  // with fewer, a second thread costs more than it brings

struct Call {
  const void* x;
  uint8_t* levels;
  int64_t size, channels, pixels, tiles;
};

// The level of each lane, in its low byte.
template <bool kFloor, class V>
INLINE Bits<V> levels(V x) {
  const float magic = 8388608.0f;  // 2**23: a sum with it has its integer in the low mantissa bits
  V clipped = x < -1.0f ? splat<V>(-1.0f) : x;
  clipped = clipped > 1.0f ? splat<V>(1.0f) : clipped;
  const V value = clipped * 127.5f + 127.5f;
  V whole = (value + magic) - magic;
  if (kFloor) whole = whole > value ? whole - 1.0f : whole;
  return x == x ? (Bits<V>)(whole + magic) & 0xffu : Bits<V>{};
}

template <class V, class T, bool kFloor>
INLINE void write_levels(const T* x, int64_t count, uint8_t* to) {
  // A pair of bfloat16 holds even and odd elements, one of float the first and the last.
  typename std::conditional<std::is_same<T, float>::value, uint32_t, uint16_t>::type wide[kPair<V>];
  for (int64_t i = 0; i < count; i += kPair<V>) {
    const int64_t part = std::min(kPair<V>, count - i);
    const Pair<V> pair = load_pair<V>(x + i, part);
    Bits<V> both[2] = {levels<kFloor>(pair.values[0]), levels<kFloor>(pair.values[1])};
    if (!std::is_same<T, float>::value) both[0] |= both[1] << 16;
    std::memcpy(wide, both, sizeof wide);
    uint8_t narrowed[kPair<V>];
    for (int64_t k = 0; k < kPair<V>; ++k) narrowed[k] = static_cast<uint8_t>(wide[k]);
    std::memcpy(to + i, narrowed, part);
  }
}

// In one order: a task is a tile.
template <class T, bool kFloor>
struct Flat {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    const Call& call = *static_cast<const Call*>(context);
    const int64_t first = begin * kTile, last = std::min(end * kTile, call.size);
    write_levels<V, T, kFloor>(static_cast<const T*>(call.x) + first, last - first,
                            call.levels + first);
  }
};

// Three planes to pixels. The compiler knows how to permute vectors of these.
INLINE void interleave(const uint8_t* red, const uint8_t* green, const uint8_t* blue, int64_t count,
                       uint8_t* __restrict to) {
  for (int64_t p = 0; p < count; ++p) {
    to[3 * p] = red[p];
    to[3 * p + 1] = green[p];
    to[3 * p + 2] = blue[p];
  }
}

// From planes to pixels: a task is a tile of the pixels of an image, with all channels.
template <class T, bool kFloor>
struct Planes {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    const Call& call = *static_cast<const Call*>(context);
    uint8_t planes[3][kTile];  // of neighboring channels
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / call.tiles * call.channels * call.pixels;
      const int64_t first = task % call.tiles * kTile;
      const int64_t count = std::min(kTile, call.pixels - first);
      uint8_t* to = call.levels + image + first * call.channels;
      for (int64_t c = 0; c < call.channels; c += 3) {
        const int64_t few = std::min<int64_t>(3, call.channels - c);
        for (int64_t i = 0; i < few; ++i) {
          const T* x = static_cast<const T*>(call.x) + image + (c + i) * call.pixels + first;
          write_levels<V, T, kFloor>(x, count, planes[i]);
        }
        if (call.channels == 3) {
          interleave(planes[0], planes[1], planes[2], count, to);
        } else {
          for (int64_t i = 0; i < few; ++i) {
            for (int64_t p = 0; p < count; ++p) to[p * call.channels + c + i] = planes[i][p];
          }
        }
      }
    }
  }
};

template <template <class, bool> class Kernel>
RangeFunction kernel_for(bool bfloat16_data, bool floor) {
  if (bfloat16_data) {
    return floor ? choose<Kernel<bfloat16, true>>() : choose<Kernel<bfloat16, false>>();
  }
  return floor ? choose<Kernel<float, true>>() : choose<Kernel<float, false>>();
}

}  // namespace

// x is [images, pixels, channels] (channels_last) or [images, channels, pixels], contiguous,
// float32 or bfloat16; levels [images, pixels, channels]. Returns 0, or the error code of the
// thread pool.
EXPORT int ds_quantize(const void* x, uint8_t* levels, int64_t images, int64_t channels,
                       int64_t pixels, bool floor, bool channels_last, bool bfloat16_data) {
  const int64_t size = images * channels * pixels, tiles = (pixels + kTile - 1) / kTile;
  Call call{x, levels, size, channels, pixels, tiles};
  if (channels_last) {
    return parallel_for((size + kTile - 1) / kTile, kSerialTiles,
                        kernel_for<Flat>(bfloat16_data, floor), &call);
  }
  return parallel_for(images * tiles, 1 + kSerialTiles / (1 + channels),
                      kernel_for<Planes>(bfloat16_data, floor), &call);
}
