// The two ends of a 3x3 convolution by Winograd's F(4x4, 3x3): images to tiles, tiles to images.
//
// Between them are 36 matrix products, which are left to the library that has them. Images are
// [N, H, W, C]; what is multiplied is [36, tiles, C], with the tiles of an image in reading order.
// The points are 0, +-a, +-b and infinity with a = 5/8 and b = 3/2 (ds/ops/winograd.py); all
// constants below are exact in float32.
#include "simd.h"

namespace {

constexpr float kA = 0.625f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB;
constexpr float kA3 = kA2 * kA, kB3 = kB2 * kB;
constexpr int64_t kSerialTiles = 4;  // with fewer, a second thread costs more than it brings

struct Call {
  const float* from;
  const float* bias;      // [C] or null
  const float* residual;  // as the image or null
  float* to;
  int64_t images, height, width, channels;  // of the image at the side of the tiles
  bool doubled;                             // every pixel read twice in both directions

  int64_t rows() const { return (height + 3) / 4; }
  int64_t columns() const { return (width + 3) / 4; }
  int64_t tiles() const { return images * rows() * columns(); }
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

// One direction of A^T m: six points to four pixels.
template <class V>
INLINE void to_pixels(const V* m, int64_t step, V* out) {
  const V sum_a = m[step] + m[2 * step], difference_a = m[step] - m[2 * step];
  const V sum_b = m[3 * step] + m[4 * step], difference_b = m[3 * step] - m[4 * step];
  out[0] = m[0] + sum_a + sum_b;
  out[1] = kA * difference_a + kB * difference_b;
  out[2] = kA2 * sum_a + kB2 * sum_b;
  out[3] = kA3 * difference_a + kB3 * difference_b + m[5 * step];
}

struct Input {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    const Call& call = *static_cast<const Call*>(context);
    const int64_t channels = call.channels, plane = call.tiles() * channels;
    const int64_t source_width = call.width >> call.doubled;
    const int64_t source_size = (call.height >> call.doubled) * source_width * channels;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t image = tile / (call.rows() * call.columns());
      const int64_t top = tile / call.columns() % call.rows() * 4 - 1;
      const int64_t left = tile % call.columns() * 4 - 1;
      const float* source = call.from + image * source_size;
      for (int64_t c = 0; c < channels; c += kLanes<V>) {
        V across[36];
        for (int64_t i = 0; i < 6; ++i) {
          const int64_t y = top + i;
          V pixels[6];
          for (int64_t j = 0; j < 6; ++j) {
            const int64_t x = left + j;
            const bool inside = y >= 0 && y < call.height && x >= 0 && x < call.width;
            const int64_t pixel = (y >> call.doubled) * source_width + (x >> call.doubled);
            pixels[j] = inside ? load<V>(source + pixel * channels + c) : splat<V>(0.0f);
          }
          to_points(pixels, 1, across + 6 * i);
        }
        for (int64_t j = 0; j < 6; ++j) {
          V points[6];
          to_points(across + j, 6, points);
          for (int64_t i = 0; i < 6; ++i) {
            store(points[i], call.to + (6 * i + j) * plane + tile * channels + c);
          }
        }
      }
    }
  }
};

struct Output {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    const Call& call = *static_cast<const Call*>(context);
    const int64_t channels = call.channels, plane = call.tiles() * channels;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t image = tile / (call.rows() * call.columns());
      const int64_t top = tile / call.columns() % call.rows() * 4;
      const int64_t left = tile % call.columns() * 4;
      for (int64_t c = 0; c < channels; c += kLanes<V>) {
        V down[24];  // [6, 4]
        for (int64_t j = 0; j < 6; ++j) {
          V points[6];
          for (int64_t i = 0; i < 6; ++i) {
            points[i] = load<V>(call.from + (6 * i + j) * plane + tile * channels + c);
          }
          to_pixels(points, 1, down + 4 * j);
        }
        const V bias = call.bias == nullptr ? splat<V>(0.0f) : load<V>(call.bias + c);
        for (int64_t i = 0; i < 4 && top + i < call.height; ++i) {
          V pixels[4];
          to_pixels(down + i, 4, pixels);
          for (int64_t j = 0; j < 4 && left + j < call.width; ++j) {
            const int64_t row = image * call.height + top + i;
            const int64_t at = (row * call.width + left + j) * channels + c;
            V value = pixels[j] + bias;
            if (call.residual != nullptr) value += load<V>(call.residual + at);
            store(value, call.to + at);
          }
        }
      }
    }
  }
};

}  // namespace

// x [images, height, width, channels], or of half the height and width if doubled, to
// tiles [36, count, channels]. Channels are a multiple of 16. Returns 0, or the error code of the
// thread pool.
EXPORT int ds_winograd_input(const float* x, float* tiles, int64_t images, int64_t height,
                             int64_t width, int64_t channels, bool doubled) {
  Call call{x, nullptr, nullptr, tiles, images, height, width, channels, doubled};
  return parallel_for(call.tiles(), kSerialTiles, choose<Input>(), &call);
}

// tiles [36, count, channels] to y [images, height, width, channels], plus bias [channels] and
// residual, of the shape of y, each of which may be null.
EXPORT int ds_winograd_output(const float* tiles, const float* bias, const float* residual,
                              float* y, int64_t images, int64_t height, int64_t width,
                              int64_t channels) {
  Call call{tiles, bias, residual, y, images, height, width, channels, false};
  return parallel_for(call.tiles(), kSerialTiles, choose<Output>(), &call);
}
