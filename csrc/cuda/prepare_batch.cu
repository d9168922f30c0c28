// A training batch: x0 = image / 127.5 - 1 and standard normal noise, both [N, H, W, C] in memory.
//
//     key     = (seed low, seed high)
//     counter = (block, 0, index low, index high)            one block makes four elements
//     u_k     = (r_k + 1/2) / 2^32
//     z       = sqrt(-2 ln u_0) (cos, sin)(2 pi u_1),  sqrt(-2 ln u_2) (cos, sin)(2 pi u_3)
//
// Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
//
// The integers are those of ds/ops/noise.py to the bit. Noise goes through the channels one by one,
// memory through the pixels: a block makes the noise of a tile of pixels in shared memory and writes
// it from there. Traffic, in bytes an element: 1 read, and x0 and noise written. Not measured yet.
#include <cmath>

#include "launch.cuh"

namespace ds {
namespace {

constexpr int64_t kTile = 4096;  // elements of a tile; no image may have more channels

struct Words {
  uint32_t values[4];
};

HOST_DEVICE Words philox(Words counter, uint32_t key0, uint32_t key1) {
  uint32_t* c = counter.values;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c[0], second = uint64_t{0xCD9E8D57} * c[2];
    counter = {{static_cast<uint32_t>(second >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(second),
                static_cast<uint32_t>(first >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(first)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// sqrt(-2 ln u) for u = (word + 1/2) / 2^32, through 1 - u where that is the more exact of the two.
HOST_DEVICE float radius(uint32_t word) {
  constexpr float kUnit = 1.0f / 4294967296.0f;
  const float log_u = word < 0x80000000u
                          ? logf((static_cast<float>(word) + 0.5f) * kUnit)
                          : log1pf((static_cast<float>(~word) + 0.5f) * -kUnit);
  return sqrtf(-2.0f * log_u);
}

// Cosine and sine of (word + 1/2) / 2^32 turns. The nearest quarter is taken off in integers, so
// that values near zero keep their digits.
HOST_DEVICE void turn(uint32_t word, float& cosine, float& sine) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(word - (quarter << 30));
  float s, c;
  sincospif((static_cast<float>(rest) + 0.5f) * (1.0f / 2147483648.0f), &s, &c);
  const bool swap = quarter % 2 == 1;
  cosine = swap ? -s : c;
  sine = swap ? c : s;
  if (quarter == 2 || quarter == 3) {
    cosine = -cosine;
    sine = -sine;
  }
}

template <class T>
struct PrepareBatch {
  const uint8_t* images;
  const int64_t* indices;
  T *x0, *noise;
  uint64_t seed;
  int64_t channels, pixels, tile_pixels, tiles;
  bool whole;  // whether every tile can be read and written four by four

  template <class Cluster>
  HOST_DEVICE void operator()(Cluster& cluster) const {
    const int64_t image = cluster.index() / tiles, first = cluster.index() % tiles * tile_pixels;
    const int64_t left = pixels - first, rows = left < tile_pixels ? left : tile_pixels;
    const uint64_t index = static_cast<uint64_t>(indices[image]);
    cluster.phase([&](const Block& block, int thread) {
      float* tile = reinterpret_cast<float*>(block.shared);
      const int blocks = static_cast<int>(rows / 4 + 2);  // a row may start and end inside of one
      for (int i = thread; i < channels * blocks; i += kThreads) {
        const int channel = i / blocks;
        const int64_t start = channel * pixels + first, number = start / 4 + i % blocks;
        float normals[4];
        draw(static_cast<uint32_t>(number), index, normals);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int64_t row = 4 * number + k - start;
          if (row >= 0 && row < rows) tile[row * channels + channel] = normals[k];
        }
      }
    });
    cluster.phase([&](const Block& block, int thread) {
      const float* tile = reinterpret_cast<const float*>(block.shared);
      const int64_t start = (image * pixels + first) * channels, count = rows * channels;
      if (whole) {
        write(std::true_type(), tile, start, count, thread);
      } else {
        write(std::false_type(), tile, start, count, thread);
      }
    });
  }

  template <class Whole>
  HOST_DEVICE void write(Whole whole, const float* tile, int64_t start, int64_t count,
                         int thread) const {
    for (int64_t i = thread * 4; i < count; i += kThreads * 4) {
      const auto levels = load_four(whole, images + start, i, count);
      const auto normals = load_four(whole, tile, i, count);
      Four<T> x, z;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        narrow(static_cast<float>(levels.values[k]) / 127.5f - 1.0f, x.values[k]);
        narrow(normals.values[k], z.values[k]);
      }
      store_four(whole, x, x0 + start, i, count);
      store_four(whole, z, noise + start, i, count);
    }
  }

  HOST_DEVICE void draw(uint32_t number, uint64_t index, float* normals) const {
    const Words words = philox(
        {{number, 0, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32)}},
        static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      float cosine, sine;
      turn(words.values[k + 1], cosine, sine);
      const float length = radius(words.values[k]);
      normals[k] = length * cosine;
      normals[k + 1] = length * sine;
    }
  }
};

template <class T>
const char* prepare_batch(const uint8_t* images, const int64_t* indices, void* x0, void* noise,
                          int64_t seed, int64_t count, int64_t channels, int64_t pixels,
                          Place place) {
  if (channels > kTile) return "too many channels";
  if (channels * pixels == 0) return nullptr;
  const int64_t tile = std::min(kTile / channels, pixels);
  const int64_t tile_pixels = tile > 4 ? tile / 4 * 4 : tile;
  const int64_t tiles = (pixels + tile_pixels - 1) / tile_pixels;
  const bool whole = channels * pixels % 4 == 0 && channels * tile_pixels % 4 == 0 &&
                     starts_on(images, 4) && starts_on(x0, 16) && starts_on(noise, 16);
  const PrepareBatch<T> kernel = {
      images, indices, static_cast<T*>(x0), static_cast<T*>(noise), static_cast<uint64_t>(seed),
      channels, pixels, tile_pixels, tiles, whole};
  return launch(kernel, count * tiles, 1, tile_pixels * channels * sizeof(float), place);
}

}  // namespace
}  // namespace ds

// images, x0 and noise are [count, pixels, channels], x0 and noise float32, float16 or bfloat16;
// indices [count]. An image has at most 2^34 elements and 4096 channels. Returns null, or what went
// wrong.
EXPORT const char* ds_cuda_prepare_batch(const uint8_t* images, const int64_t* indices, void* x0,
                                         void* noise, int64_t seed, int64_t count,
                                         int64_t channels, int64_t pixels, int type, int device,
                                         cudaStream_t stream) {
  const auto prepare = type == ds::kFloat32   ? ds::prepare_batch<float>
                       : type == ds::kFloat16 ? ds::prepare_batch<__half>
                                              : ds::prepare_batch<__nv_bfloat16>;
  return prepare(images, indices, x0, noise, seed, count, channels, pixels, {device, stream});
}
