// The weight of a 3x3 convolution by Winograd's F(4x4, 3x3): to the panels that the convolution
// takes, and its gradient.
//
// The gradient is the same algorithm read backwards: the sum over all tiles of (B^T d B) x
// (A e A^T) for tiles d of x and e of the gradient of y, 36 products, and G^T (...) G of it at the
// end. Tiles go through it in parts that a cache holds, in panels of 16 channels. The sums of the
// parts are added up in order, which rounds less than one long sum, and no number of threads moves
// a bit.
#include <algorithm>
#include <vector>

#include "winograd.h"

namespace {

// What the rows of G divide by.
constexpr float kAtZero = 1 / (kA2 * kB2);
constexpr float kAtA = 1 / (2 * kA2 * (kA2 - kB2)), kAtB = 1 / (2 * kB2 * (kB2 - kA2));

// One direction of G g: three weights to six points.
template <class V>
INLINE void to_points_of_weight(const V* g, int64_t step, V* out) {
  const V even_a = kAtA * (g[0] + kA2 * g[2 * step]), odd_a = kAtA * kA * g[step];
  const V even_b = kAtB * (g[0] + kB2 * g[2 * step]), odd_b = kAtB * kB * g[step];
  out[0] = kAtZero * g[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = g[2 * step];
}

// One direction of G^T u: six points to three weights.
template <class V>
INLINE void to_weights(const V* u, V* out) {
  const V sum_a = kAtA * (u[1] + u[2]), sum_b = kAtB * (u[3] + u[4]);
  out[0] = kAtZero * u[0] + sum_a + sum_b;
  out[1] = kAtA * kA * (u[1] - u[2]) + kAtB * kB * (u[3] - u[4]);
  out[2] = kA2 * sum_a + kB2 * sum_b + u[5];
}

// One direction of A e: four pixels to six points.
template <class V>
INLINE void to_points_of_result(const V* e, int64_t step, V* out) {
  const V even_a = e[0] + kA2 * e[2 * step], odd_a = kA * e[step] + kA3 * e[3 * step];
  const V even_b = e[0] + kB2 * e[2 * step], odd_b = kB * e[step] + kB3 * e[3 * step];
  out[0] = e[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = e[3 * step];
}

struct Weight {
  const float* weight;  // [out, 3, 3, channels]
  float* panels;
  int64_t out, channels;
  bool transposed;
};

struct Pack {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    const Weight& call = *static_cast<const Weight*>(context);
    const int64_t rows = call.transposed ? call.out : call.channels;
    const int64_t plane = call.out * call.channels;
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t row = 0; row < rows; row += kPanel) {
        float square[kPanel][9][kPanel];  // rows of the panel, taps, its columns
        read(call, panel * kPanel, row, square);
        for (int64_t r = 0; r < kPanel; ++r) {
          float* const to = call.panels + panel * rows * kPanel + (row + r) * kPanel;
          for (int64_t c = 0; c < kPanel; c += kLanes<V>) pack<V>(&square[r][0][c], to + c, plane);
        }
      }
    }
  }

  // Lines of the weight are read whole, since those of neighboring channels compete for the same
  // few places of a cache.
  static INLINE void read(const Weight& call, int64_t column, int64_t row,
                          float square[kPanel][9][kPanel]) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t out = (call.transposed ? row : column) + i;
        const int64_t channel = call.transposed ? column : row;
        const float* const line = call.weight + (out * 9 + tap) * call.channels + channel;
        for (int64_t k = 0; k < kPanel; ++k) {
          (call.transposed ? square[i][8 - tap][k] : square[k][tap][i]) = line[k];
        }
      }
    }
  }

  template <class V>
  static INLINE void pack(const float* taps, float* to, int64_t plane) {
    V across[18];  // [3, 6]
    for (int64_t i = 0; i < 3; ++i) {
      V g[3];
      for (int64_t j = 0; j < 3; ++j) g[j] = load<V>(taps + (3 * i + j) * kPanel);
      to_points_of_weight(g, 1, across + 6 * i);
    }
    for (int64_t j = 0; j < 6; ++j) {
      V points[6];
      to_points_of_weight(across + j, 6, points);
      for (int64_t i = 0; i < 6; ++i) store(points[i], to + (6 * i + j) * plane);
    }
  }
};

struct Gradient {
  const float* x;
  const float* dy;
  float* dweight;  // [out, 3, 3, channels]
  Images images;
  int64_t channels, out;
  int64_t part, first, count;             // tiles at a time, the first of them now, how many now
  std::vector<float> inputs, results;     // [36, channels / 16, part, 16], of y likewise
  std::vector<float> sums;                // [36, out / 16, channels / 16, 16, 16]

  int64_t panel() const { return part * kPanel; }
  int64_t input_plane() const { return part * channels + kLine; }
  int64_t result_plane() const { return part * out + kLine; }
  int64_t sums_plane() const { return out * channels + kLine; }
};

// The tiles of this part to points.
struct Transform {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    Gradient& call = *static_cast<Gradient*>(context);
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile(call.images, call.first + t);
      transform_input<V>(call.x, call.images, call.channels, false, tile,
                         &call.inputs[t * kPanel], call.input_plane(), kPanel, call.panel());
      transform_result<V>(call, tile, &call.results[t * kPanel]);
    }
  }

  template <class V>
  static INLINE void transform_result(const Gradient& call, const Tile& tile, float* to) {
    const Images& images = call.images;
    for (int64_t o = 0; o < call.out; o += kLanes<V>) {
      V across[24];  // [4, 6]
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t row = tile.image * images.height + tile.top + i;
        V pixels[4];
        for (int64_t j = 0; j < 4; ++j) {
          const bool inside = tile.top + i < images.height && tile.left + j < images.width;
          const int64_t at = (row * images.width + tile.left + j) * call.out + o;
          pixels[j] = inside ? load<V>(call.dy + at) : splat<V>(0.0f);
        }
        to_points_of_result(pixels, 1, across + 6 * i);
      }
      float* const at = to + o / kPanel * call.panel() + o % kPanel;
      for (int64_t j = 0; j < 6; ++j) {
        V points[6];
        to_points_of_result(across + j, 6, points);
        for (int64_t i = 0; i < 6; ++i) store(points[i], at + (6 * i + j) * call.result_plane());
      }
    }
  }
};

// Adds the products of this part; an item is a panel of y's channels at a point.
struct Multiply {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    Gradient& call = *static_cast<Gradient*>(context);
    const int64_t outs = call.out / kPanel, columns = call.channels / kPanel;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t point = item / outs, out = item % outs;
      const float* const results = &call.results[point * call.result_plane() + out * call.panel()];
      for (int64_t c = 0; c < columns; ++c) {
        const float* const inputs = &call.inputs[point * call.input_plane() + c * call.panel()];
        float* const sums =
            &call.sums[point * call.sums_plane() + (out * columns + c) * kPanel * kPanel];
        for (int64_t row = 0; row < kPanel; row += kRows<V>) {
          add<V>(results + row, inputs, call.count, call.first > 0, sums + row * kPanel);
        }
      }
    }
  }

  // Rows of sums that fit the registers.
  template <class V>
  static constexpr int64_t kRows = sizeof(V) == 64 ? 16 : sizeof(V) == 32 ? 4 : 2;

  template <class V>
  static INLINE void add(const float* results, const float* inputs, int64_t count, bool more,
                         float* to) {
    constexpr int64_t vectors = kPanel / kLanes<V>;
    V sums[kRows<V>][vectors] = {};
    for (int64_t t = 0; t < count; ++t) {
      V values[vectors];
      for (int64_t v = 0; v < vectors; ++v) {
        values[v] = load<V>(inputs + t * kPanel + v * kLanes<V>);
      }
      for (int64_t r = 0; r < kRows<V>; ++r) {
        const float factor = results[t * kPanel + r];
        for (int64_t v = 0; v < vectors; ++v) sums[r][v] += factor * values[v];
      }
    }
    for (int64_t r = 0; r < kRows<V>; ++r) {
      for (int64_t v = 0; v < vectors; ++v) {
        float* const at = to + r * kPanel + v * kLanes<V>;
        store(more ? load<V>(at) + sums[r][v] : sums[r][v], at);
      }
    }
  }
};

// The sums to weights; an item is a panel of y's channels.
struct Finish {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    Gradient& call = *static_cast<Gradient*>(context);
    for (int64_t out = begin * kPanel; out < end * kPanel; ++out) {
      for (int64_t c = 0; c < call.channels; c += kLanes<V>) {
        const int64_t block = out / kPanel * call.channels + c / kPanel * kPanel;
        const float* const sums = &call.sums[(block + out % kPanel) * kPanel + c % kPanel];
        V down[18];  // [3, 6]
        for (int64_t j = 0; j < 6; ++j) {
          V points[6], weights[3];
          for (int64_t i = 0; i < 6; ++i) {
            points[i] = load<V>(sums + (6 * i + j) * call.sums_plane());
          }
          to_weights(points, weights);
          for (int64_t i = 0; i < 3; ++i) down[6 * i + j] = weights[i];
        }
        for (int64_t i = 0; i < 3; ++i) {
          V weights[3];
          to_weights(down + 6 * i, weights);
          for (int64_t j = 0; j < 3; ++j) {
            store(weights[j], call.dweight + (out * 9 + 3 * i + j) * call.channels + c);
          }
        }
      }
    }
  }
};

}  // namespace

// weight [out, 3, 3, channels] to panels [36, out / 16, channels, 16]; if `transposed`, to those of
// the convolution that gives the gradient of x, [36, channels / 16, out, 16]. Channels and out are
// multiples of 16. Returns 0, or the error code of the thread pool.
EXPORT int ds_winograd_weight(const float* weight, float* panels, int64_t out, int64_t channels,
                              bool transposed) {
  Weight call{weight, panels, out, channels, transposed};
  return parallel_for((transposed ? channels : out) / kPanel, 1, choose<Pack>(), &call);
}

// x [images, height, width, channels] and dy [images, height, width, out] to the gradient of the
// weight, [out, 3, 3, channels]. Channels and out are multiples of 16; `part` tiles are taken at a
// time. Returns 0, or the error code of the thread pool.
EXPORT int ds_winograd_weight_gradient(const float* x, const float* dy, float* dweight,
                                       int64_t images, int64_t height, int64_t width,
                                       int64_t channels, int64_t out, int64_t part) {
  // Kept, since new memory costs a page fault every 4 kB.
  static thread_local Gradient call;
  call.x = x, call.dy = dy, call.dweight = dweight;
  call.images = {images, height, width};
  call.channels = channels, call.out = out, call.part = part;
  const auto reserve = [](std::vector<float>& values, int64_t plane) {
    values.resize(std::max<size_t>(values.size(), kPoints * plane));
  };
  reserve(call.inputs, call.input_plane());
  reserve(call.results, call.result_plane());
  reserve(call.sums, call.sums_plane());
  call.first = 0;
  do {  // once for no tiles, too, whose sums are zero
    call.count = std::min(part, call.images.tiles() - call.first);
    if (int error = parallel_for(call.count, 1, choose<Transform>(), &call)) return error;
    const int64_t items = kPoints * out / kPanel;
    if (int error = parallel_for(items, 1, choose<Multiply>(), &call)) return error;
    call.first += part;
  } while (call.first < call.images.tiles());
  return parallel_for(out / kPanel, 1, choose<Finish>(), &call);
}
