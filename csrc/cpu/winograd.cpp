// A 3x3 convolution by Winograd's F(4x4, 3x3): image to tiles, 36 matrix products, tiles to image.
//
// A task is a block of tiles, which goes through all three steps while it is in a cache. Between
// them it is [36, tiles, C] and [36, tiles, O], with the tiles of an image in reading order. A
// cache line separates rows, and the 36 matrices: at distances of powers of two, all would compete
// for the same few lines.
//
// The products take the weight in panels [C, 16], of which kDepth rows fit the L1 cache, and hold
// kRows<V> x 16 sums in registers. The order of a sum depends on C alone, so neither the block nor
// the batch nor the number of threads moves a bit.
#include <algorithm>
#include <vector>

#include "winograd.h"

namespace {

constexpr int64_t kDepth = 256;  // input channels of a product, whose sums another one goes on with

// Rows of a product: with a row of the panel and a factor they fill 16 registers, 32 of Floats16.
template <class V>
constexpr int64_t kRows = sizeof(V) == 64 ? 24 : sizeof(V) == 32 ? 6 : 2;

template <class T>
struct Call {
  const T* x;
  const float* weight;
  const float* bias;  // or null
  const T* residual;  // or null
  T* y;
  Images images;  // of y
  int64_t channels, out;
  int64_t block;  // tiles of a task
  bool doubled;   // every pixel of x counts twice in both directions
};

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

// Turns the row of each point into a tile of y.
template <class V, class T>
INLINE void transform_output(const Call<T>& call, const Tile& tile, const float* from,
                             int64_t plane) {
  for (int64_t c = 0; c < call.out; c += kLanes<V>) {
    V down[24];  // [6, 4]
    for (int64_t j = 0; j < 6; ++j) {
      V points[6];
      for (int64_t i = 0; i < 6; ++i) points[i] = load<V>(from + (6 * i + j) * plane + c);
      to_pixels(points, 1, down + 4 * j);
    }
    const V bias = call.bias == nullptr ? splat<V>(0.0f) : load<V>(call.bias + c);
    for (int64_t i = 0; i < 4 && tile.top + i < call.images.height; ++i) {
      V pixels[4];
      to_pixels(down + i, 4, pixels);
      for (int64_t j = 0; j < 4 && tile.left + j < call.images.width; ++j) {
        const int64_t row = tile.image * call.images.height + tile.top + i;
        const int64_t at = (row * call.images.width + tile.left + j) * call.out + c;
        V value = pixels[j] + bias;
        if (call.residual != nullptr) value += load<V>(call.residual + at);
        store(value, call.y + at);
      }
    }
  }
}

// kRows<V> rows of a product with `depth` rows of a panel, added to what is there if `more`. Loops
// over rows are unrolled by name: GCC unrolls up to 16 turns, and the sums of the others would be
// in memory.
template <class V>
INLINE void multiply(const float* rows, int64_t channels, const float* panel, int64_t depth,
                     bool more, float* to, int64_t out) {
  constexpr int64_t vectors = kPanel / kLanes<V>;
  V sums[kRows<V>][vectors] = {};
  if (more) {
#pragma GCC unroll 24
    for (int64_t r = 0; r < kRows<V>; ++r) {
      for (int64_t v = 0; v < vectors; ++v) sums[r][v] = load<V>(to + r * out + v * kLanes<V>);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    V weights[vectors];
    __builtin_prefetch(panel + (depth + k) * kPanel, kToRead, 2);  // what the next products take
    for (int64_t v = 0; v < vectors; ++v) weights[v] = load<V>(panel + k * kPanel + v * kLanes<V>);
#pragma GCC unroll 24
    for (int64_t r = 0; r < kRows<V>; ++r) {
      const float factor = rows[r * channels + k];
      for (int64_t v = 0; v < vectors; ++v) sums[r][v] += factor * weights[v];
    }
  }
#pragma GCC unroll 24
  for (int64_t r = 0; r < kRows<V>; ++r) {
    for (int64_t v = 0; v < vectors; ++v) store(sums[r][v], to + r * out + v * kLanes<V>);
  }
}

template <class T>
struct Convolve {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    const Call<T>& call = *static_cast<const Call<T>*>(context);
    const int64_t channels = call.channels, out = call.out;
    const int64_t rows = (call.block + kRows<V> - 1) / kRows<V> * kRows<V>;
    const int64_t from_row = channels + kLine, to_row = out + kLine;
    const int64_t from_plane = rows * from_row + kLine, to_plane = rows * to_row + kLine;
    // Kept, since new memory costs a page fault every 4 kB.
    static thread_local std::vector<float> from, to;
    from.resize(std::max<size_t>(from.size(), kPoints * from_plane));
    to.resize(std::max<size_t>(to.size(), kPoints * to_plane));
    for (int64_t first = begin * call.block; first < end * call.block; first += call.block) {
      const int64_t count = std::min(call.block, call.images.tiles() - first);
      for (int64_t t = 0; t < count; ++t) {
        transform_input<V>(call.x, call.images, channels, call.doubled,
                           Tile(call.images, first + t), &from[t * from_row], from_plane, kPanel);
      }
      for (int64_t point = 0; point < kPoints; ++point) {
        const float* a = &from[point * from_plane];
        for (int64_t o = 0; o < out; o += kPanel) {
          const float* panel = call.weight + (point * out + o) * channels;
          for (int64_t c = 0; c < channels; c += kDepth) {
            const int64_t depth = std::min(kDepth, channels - c);
            for (int64_t t = 0; t < count; t += kRows<V>) {
              multiply<V>(a + t * from_row + c, from_row, panel + c * kPanel, depth, c > 0,
                          &to[point * to_plane + t * to_row + o], to_row);
            }
          }
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        transform_output<V>(call, Tile(call.images, first + t), &to[t * to_row], to_plane);
      }
    }
  }
};

template <class T>
int convolve(const void* x, const float* weight, const float* bias, const void* residual, void* y,
             const Images& images, int64_t channels, int64_t out, int64_t block, bool doubled) {
  Call<T> call{static_cast<const T*>(x), weight, bias, static_cast<const T*>(residual),
               static_cast<T*>(y), images, channels, out, block, doubled};
  return parallel_for((images.tiles() + block - 1) / block, 1, choose<Convolve<T>>(), &call);
}

}  // namespace

// x [images, height, width, channels], or of half the height and width if doubled, and weight [36,
// out / 16, channels, 16] to y [images, height, width, out], plus bias [out] and residual, of the
// shape of y, each of which may be null. If `narrow`, x, residual and y are bfloat16. Channels and
// out are multiples of 16; `block` tiles of 4 x 4 pixels make a task. Returns 0, or the error code
// of the thread pool.
EXPORT int ds_winograd_conv(const void* x, const float* weight, const float* bias,
                            const void* residual, void* y, int64_t images, int64_t height,
                            int64_t width, int64_t channels, int64_t out, int64_t block,
                            bool doubled, bool narrow) {
  const auto function = narrow ? convolve<bfloat16> : convolve<float>;
  return function(x, weight, bias, residual, y, {images, height, width}, channels, out, block,
                  doubled);
}
