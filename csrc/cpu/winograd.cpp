// A 3x3 convolution by Winograd's F(4x4, 3x3): image to tiles, 36 matrix products, tiles to image.
//
// A task is a block of tiles, and some of the output channels. It goes through all three steps
// while it is in a cache. Between them it is [36, tiles, C] and [36, tiles, O], with the tiles of
// an image in reading order. A cache line separates rows, and the 36 matrices: at distances of
// powers of two, all would compete for the same few lines.
//
// The products take the weight in panels of 16 output channels, of which kDepth input channels fit
// the L1 cache, and hold kRows<V> x 16 sums in registers. The order of a sum depends on C alone, so
// neither the block nor the batch nor the number of threads moves a bit.
#include <algorithm>
#include <vector>

#include "winograd_products.h"

namespace {

// Rows of a product: with a row of the panel and a factor they fill 16 registers, 32 of Floats16
// and of AArch64.
#if defined(__aarch64__)
constexpr int64_t kRowsOfFour = 4;
#else
constexpr int64_t kRowsOfFour = 2;
#endif
template <class V>
constexpr int64_t kRows = sizeof(V) == 64 ? 24 : sizeof(V) == 32 ? 6 : kRowsOfFour;
// Rows of the products at the end of a block: of most of them, and of the last.
template <class V>
constexpr int64_t kLeftRows = sizeof(V) == 64 ? 8 : 2;
template <class V>
constexpr int64_t kLastRows = sizeof(V) == 64 ? 4 : 2;
// The rows that so many tiles take.
template <class V>
constexpr int64_t whole_rows(int64_t tiles) {
  return (tiles + kLastRows<V> - 1) / kLastRows<V> * kLastRows<V>;
}
// Between the rows of a product's factors: a constant, so that all of them are at one address.
template <class Factor>
constexpr int64_t kStride = kDepth + 64 / sizeof(Factor);

template <class T, class Factor>
struct Call {
  const T* x;
  const Factor* weight;
  const float* scale;  // what a column of the weight is worth, [36, out], or null for 1
  const float* bias;   // or null
  const T* residual;   // or null
  T* y;
  Images images;  // of y
  int64_t channels, out;
  int64_t block, slice;  // tiles and output channels of a task
  bool doubled;          // every pixel of x counts twice in both directions

  int64_t blocks() const { return (images.tiles() + block - 1) / block; }
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

// Turns the row of each point into a tile of y; `worth` is what the sums of a row are worth.
template <class V, class Way, class T>
INLINE void transform_output(const Call<T, typename Way::Factor>& call, const Tile& tile,
                             int64_t begin, int64_t end, const typename Way::Sum* from,
                             int64_t plane, const float* worth) {
  using Sums = typename Way::template Sums<V>;
  const int64_t next = 4 * call.out;  // to the next tile
  for (int64_t c = begin; c < end; c += kLanes<V>) {
    V down[24];  // [6, 4]
    for (int64_t j = 0; j < 6; ++j) {
      V points[6];
      for (int64_t i = 0; i < 6; ++i) {
        const int64_t point = 6 * i + j;
        points[i] = Way::template values<V>(load<Sums>(from + point * plane + c - begin));
        if (Way::kScaled) points[i] *= worth[point] * load<V>(call.scale + point * call.out + c);
      }
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
        if (call.residual != nullptr) {
          value += load<V>(call.residual + at);
          __builtin_prefetch(call.residual + at + next, kToRead);
        }
        store(value, call.y + at);
        __builtin_prefetch(call.y + at + next, kToWrite);
      }
    }
  }
}

// rows x 16 sums of `steps` of a panel, added to what is there if `more`. Loops over rows are
// unrolled by name: GCC unrolls up to 16 turns, and the sums of the others would be in memory.
template <class V, class Way, int64_t rows>
INLINE void multiply(const typename Way::Factor* factors, const typename Way::Factor* panel,
                     int64_t steps, bool more, typename Way::Sum* to, int64_t out) {
  using Sums = typename Way::template Sums<V>;
  constexpr int64_t vectors = kPanel / kLanes<V>, step = kPanel * Way::kChannels;
  Sums sums[rows][vectors] = {};
  if (more) {
#pragma GCC unroll 24
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < vectors; ++v) sums[r][v] = load<Sums>(to + r * out + v * kLanes<V>);
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    Sums weights[vectors];
    __builtin_prefetch(panel + (steps + k) * step, kToRead, 2);  // what the next products take
    for (int64_t v = 0; v < vectors; ++v) {
      weights[v] = load<Sums>(panel + k * step + v * step / vectors);
    }
#pragma GCC unroll 24
    for (int64_t r = 0; r < rows; ++r) {
      const auto* const at = factors + r * kStride<typename Way::Factor> + k * Way::kChannels;
      for (int64_t v = 0; v < vectors; ++v) {
        sums[r][v] = Way::template add<V>(at, weights[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 24
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t v = 0; v < vectors; ++v) store(sums[r][v], to + r * out + v * kLanes<V>);
  }
}

// A tile to a row of factors of each point, of which every kDepth lie `apart`; `worth` is what those
// of a row are worth.
template <class V, class Way, class T>
INLINE void transform_factors(const Call<T, typename Way::Factor>& call, const Tile& tile,
                              typename Way::Factor* from, int64_t plane, int64_t apart,
                              float* worth) {
  if constexpr (Way::kScaled) {
    static thread_local std::vector<float> values;
    const int64_t row = call.channels + kLine;
    values.resize(std::max<size_t>(values.size(), kPoints * row));
    transform_input<V>(call.x, call.images, call.channels, call.doubled, tile, values.data(), row,
                       call.channels, 0);
    Way::template narrow<V>(values.data(), row, call.channels, from, plane, apart, worth);
  } else {
    transform_input<V>(call.x, call.images, call.channels, call.doubled, tile, from, plane, kDepth,
                       apart);
  }
}

// The product of the rows of one point with the weight's matrix.
template <class V, class Way, class T, class Factor>
INLINE void multiply_point(const Call<T, Factor>& call, const Factor* from, int64_t apart,
                           int64_t count, const Factor* weight, int64_t width,
                           typename Way::Sum* to, int64_t to_row) {
  for (int64_t o = 0; o < width; o += kPanel) {
    for (int64_t c = 0; c < call.channels; c += kDepth) {
      const int64_t steps = std::min(kDepth, call.channels - c) / Way::kChannels;
      const Factor* const factors = from + c / kDepth * apart;
      const Factor* const panel = weight + o * call.channels + c * kPanel;
      const auto multiply_rows = [&](auto rows, int64_t t, int64_t end) INLINE_LAMBDA {
        for (; t + rows <= end; t += rows) {
          multiply<V, Way, rows>(factors + t * kStride<Factor>, panel, steps, c > 0,
                                 to + t * to_row + o, to_row);
        }
        return t;
      };
      int64_t t = multiply_rows(std::integral_constant<int64_t, kRows<V>>(), 0, count);
      t = multiply_rows(std::integral_constant<int64_t, kLeftRows<V>>(), t, count);
      multiply_rows(std::integral_constant<int64_t, kLastRows<V>>(), t, whole_rows<V>(count));
    }
  }
}

template <class T, class Way>
struct Convolve {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    using Factor = typename Way::Factor;
    const Call<T, Factor>& call = *static_cast<const Call<T, Factor>*>(context);
    const int64_t rows = whole_rows<V>(call.block);
    const int64_t apart = rows * kStride<Factor>, to_row = call.slice + kLine;
    const int64_t from_plane = (call.channels + kDepth - 1) / kDepth * apart + kLine;
    const int64_t to_plane = rows * to_row + kLine;
    // Kept, since new memory costs a page fault every 4 kB.
    static thread_local std::vector<Factor> from;
    static thread_local std::vector<typename Way::Sum> to;
    static thread_local std::vector<float> worth;
    from.resize(std::max<size_t>(from.size(), kPoints * from_plane));
    to.resize(std::max<size_t>(to.size(), kPoints * to_plane));
    worth.resize(std::max<size_t>(worth.size(), kPoints * rows));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % call.blocks() * call.block;
      const int64_t count = std::min(call.block, call.images.tiles() - first);
      const int64_t out = task / call.blocks() * call.slice;
      const int64_t width = std::min(call.slice, call.out - out);
      for (int64_t t = 0; t < count; ++t) {
        transform_factors<V, Way>(call, Tile(call.images, first + t), &from[t * kStride<Factor>],
                                  from_plane, apart, &worth[t * kPoints]);
      }
      for (int64_t point = 0; point < kPoints; ++point) {
        multiply_point<V, Way>(call, &from[point * from_plane], apart, count,
                               call.weight + (point * call.out + out) * call.channels, width,
                               &to[point * to_plane], to_row);
      }
      for (int64_t t = 0; t < count; ++t) {
        transform_output<V, Way>(call, Tile(call.images, first + t), out, out + width,
                                 &to[t * to_row], to_plane, &worth[t * kPoints]);
      }
    }
  }
};

RangeFunction choose_pairs() {
#if defined(__x86_64__)
  if (simd_level() == kVnni) return run_avx512<Convolve<bfloat16, VnniPairs>>;
#endif
  return choose<Convolve<bfloat16, Pairs>>();
}

template <class T, class Factor>
int convolve(RangeFunction function, const void* x, const void* weight, const float* scale,
             const float* bias, const void* residual, void* y, const Images& images,
             int64_t channels, int64_t out, int64_t block, int64_t slice, bool doubled) {
  Call<T, Factor> call{static_cast<const T*>(x),
                       static_cast<const Factor*>(weight),
                       scale,
                       bias,
                       static_cast<const T*>(residual),
                       static_cast<T*>(y),
                       images,
                       channels,
                       out,
                       block,
                       slice,
                       doubled};
  return parallel_for(call.blocks() * ((out + slice - 1) / slice), 1, function, &call);
}

}  // namespace

// x [images, height, width, channels], or of half the height and width if doubled, and weight [36,
// out / 16, channels, 16] to y [images, height, width, out], plus bias [out] and residual, of the
// shape of y, each of which may be null. If `narrow`, x, residual and y are bfloat16. With a scale
// [36, out], which asks for `narrow`, weight holds 16-bit integers, [36, out / 16, channels / 2, 16,
// 2], and the scale is what they are worth; else scale is null. Channels and out are multiples of
// 16; `block` tiles of 4 x 4 pixels and `slice` channels of y, a multiple of 16, make a task. Returns
// 0, or the error code of the thread pool.
EXPORT int ds_winograd_conv(const void* x, const void* weight, const float* scale,
                            const float* bias, const void* residual, void* y, int64_t images,
                            int64_t height, int64_t width, int64_t channels, int64_t out,
                            int64_t block, int64_t slice, bool doubled, bool narrow) {
  const auto run = scale    ? convolve<bfloat16, int16_t>
                   : narrow ? convolve<bfloat16, float>
                            : convolve<float, float>;
  const RangeFunction function = scale    ? choose_pairs()
                                 : narrow ? choose<Convolve<bfloat16, Singles>>()
                                          : choose<Convolve<float, Singles>>();
  return run(function, x, weight, scale, bias, residual, y, {images, height, width}, channels, out,
             block, slice, doubled);
}
