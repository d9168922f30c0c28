// A training batch: x0 = image / 127.5 - 1 and standard normal noise, both [N, H, W, C] in memory.
//
// Image and x0 are processed in the order of memory. Noise has an order of its own, one channel
// after the other: a tile of it is made in the cache and scattered from there.
#include <algorithm>

#include "noise.h"
#include "simd.h"

namespace {

constexpr int64_t kSerialTiles = 4;  // with fewer, a second thread costs more than it brings

template <class T>
struct Call {
  RangeFunction make;
  const uint8_t* images;
  const int64_t* indices;
  uint64_t seed;
  T* x0;
  T* noise;
  int64_t channels, pixels, tiles;
  T levels[256];
};

template <class T>
void run_tiles(int64_t begin, int64_t end, void* context) {
  const Call<T>& call = *static_cast<const Call<T>*>(context);
  const int64_t size = call.channels * call.pixels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / call.tiles, tile = task % call.tiles;
    const int64_t first = tile * kNoise, last = std::min(size, first + kNoise);
    for (int64_t i = row * size + first; i < row * size + last; ++i) {
      call.x0[i] = call.levels[call.images[i]];
    }
    T drawn[kNoise];
    Normals normals{call.seed, static_cast<uint64_t>(call.indices[row]), drawn};
    call.make(tile, tile + 1, &normals);
    for (int64_t i = first; i < last;) {
      const int64_t channel = i / call.pixels, end_of_run = std::min(last, (channel + 1) * call.pixels);
      T* to = call.noise + row * size + channel;
      for (; i < end_of_run; ++i) to[(i - channel * call.pixels) * call.channels] = drawn[i - first];
    }
  }
}

template <class T>
int prepare(const uint8_t* images, const int64_t* indices, int64_t seed, void* x0, void* noise,
            int64_t rows, int64_t channels, int64_t pixels, bool bfloat16_data) {
  const int64_t tiles = (channels * pixels + kNoise - 1) / kNoise;
  Call<T> call{normals(bfloat16_data), images, indices, static_cast<uint64_t>(seed),
               static_cast<T*>(x0), static_cast<T*>(noise), channels, pixels, tiles, {}};
  for (int level = 0; level < 256; ++level) {
    narrow(static_cast<float>(level) / 127.5f - 1.0f, &call.levels[level]);
  }
  return parallel_for(rows * tiles, kSerialTiles, run_tiles<T>, &call);
}

}  // namespace

// images, x0 and noise are [rows, pixels, channels], x0 and noise float32 or bfloat16; indices
// [rows]. Returns 0, or the error code of the thread pool.
EXPORT int ds_prepare_batch(const uint8_t* images, const int64_t* indices, void* x0, void* noise,
                            int64_t seed, int64_t rows, int64_t channels, int64_t pixels,
                            bool bfloat16_data) {
  const auto function = bfloat16_data ? prepare<bfloat16> : prepare<float>;
  return function(images, indices, seed, x0, noise, rows, channels, pixels, bfloat16_data);
}
