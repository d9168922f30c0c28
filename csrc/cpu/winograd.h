// What the kernels of Winograd's F(4x4, 3x3) share: the points, and how images become tiles.
//
// The points are 0, +-a, +-b and infinity with a = 5/8 and b = 3/2 (ds/ops/conv/winograd.py); the
// constants of the images' transforms are exact in float32.
#pragma once

#include "simd.h"

constexpr float kA = 0.625f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB;
constexpr float kA3 = kA2 * kA, kB3 = kB2 * kB;
constexpr int64_t kPoints = 36;
constexpr int64_t kPanel = 16;  // channels of a panel
constexpr int64_t kLine = 16;   // floats; what keeps planes from competing for the same lines
constexpr int64_t kMostChannels = 4096;  // ds/ops/conv/winograd.py: MOST_CHANNELS

// The images that are cut into tiles of 4 x 4 pixels.
struct Images {
  int64_t count, height, width;

  int64_t rows() const { return (height + 3) / 4; }
  int64_t columns() const { return (width + 3) / 4; }
  int64_t tiles() const { return count * rows() * columns(); }
};

// Where a tile begins.
struct Tile {
  int64_t image, top, left;

  INLINE Tile(const Images& images, int64_t index)
      : image(index / (images.rows() * images.columns())),
        top(index / images.columns() % images.rows() * 4),
        left(index % images.columns() * 4) {}
};

// One direction of B^T d: six pixels to six points.
template <class V>
INLINE void to_points(const V* d, int64_t step, V* out) {
  const V d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
  const V even_a = d4 - kB2 * d2, odd_a = kA * (d3 - kB2 * d1);
  const V even_b = d4 - kA2 * d2, odd_b = kB * (d3 - kA2 * d1);
  out[0] = d4 - (kA2 + kB2) * d2 + kA2 * kB2 * d[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = d[5 * step] - (kA2 + kB2) * d3 + kA2 * kB2 * d1;
}

// A tile of x, with the pixels around it, to its row of each point; every `width` channels lie
// `apart`. If `doubled`, every pixel of x counts twice in both directions.
template <class V, class T>
INLINE void transform_input(const T* x, const Images& images, int64_t channels, bool doubled,
                            const Tile& tile, float* to, int64_t plane, int64_t width,
                            int64_t apart) {
  static const T zeros[kMostChannels] = {};
  const int64_t columns = images.width >> doubled, rows = images.height >> doubled;
  const T* pixels[kPoints];
  for (int64_t i = 0; i < 6; ++i) {
    const int64_t row = tile.top - 1 + i;
    for (int64_t j = 0; j < 6; ++j) {
      const int64_t column = tile.left - 1 + j;
      const bool inside = row >= 0 && row < images.height && column >= 0 && column < images.width;
      const int64_t pixel = (tile.image * rows + (row >> doubled)) * columns + (column >> doubled);
      pixels[6 * i + j] = inside ? x + pixel * channels : zeros;
    }
  }
  const int64_t next = (4 >> doubled) * channels;  // what the next tile adds to this one
  for (int64_t c = 0; c < channels; c += kLanes<V>) {
    V across[kPoints];
    for (int64_t i = 0; i < 6; ++i) {
      V d[6];
      for (int64_t j = 0; j < 6; ++j) d[j] = load<V>(pixels[6 * i + j] + c);
      for (int64_t j = 2; j < 6; ++j) __builtin_prefetch(pixels[6 * i + j] + next + c, kToRead);
      to_points(d, 1, across + 6 * i);
    }
    float* const at = to + c / width * apart + c % width;
    for (int64_t j = 0; j < 6; ++j) {
      V points[6];
      to_points(across + j, 6, points);
      for (int64_t i = 0; i < 6; ++i) store(points[i], at + (6 * i + j) * plane);
    }
  }
}
