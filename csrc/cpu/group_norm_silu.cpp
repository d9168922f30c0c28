// GroupNorm, with SiLU or without: y = f(weight * (x - mean) / sqrt(var + eps) + bias). Wu & He
// 2018, arXiv:1803.08494, Eq. 1, 2, 6 and 7.
//
// Reads x three times (mean, variance, output) and writes y once.
//
// Statistics: the variance is taken about the mean of the first pass, the pivot. The second pass
// measures the error of the pivot (delta), which enters the output through the shift: y = f((x -
// pivot) * scale + shift). So rounding the mean to float32 costs nothing, even if |mean| is 10000
// standard deviations.
#include "group_norm_silu.h"

namespace {

struct Call {
  Shape shape;
  const void* x;
  Affine affine;
  void* y;
  float* mean;
  float* rstd;
  double eps;
};

// One value of each for every channel of a task.
struct Columns {
  explicit Columns(int64_t count) : sums(count), pivot(count), scale(count), shift(count) {}
  Sums sums;
  std::vector<float> pivot, scale, shift;
};

// Turns the sums of the second pass over a group into its statistics, and into scale and shift of
// its channels; `first` is the group's first channel in the task.
INLINE void finish_group(const Call& call, int64_t image, int64_t group, int64_t first, float pivot,
                         double sum, double squares, Columns& columns) {
  const Shape& shape = call.shape;
  const double delta = sum * shape.share;
  const double variance = squares * shape.share - delta * delta;
  // Written so that NaN stays NaN.
  const double rstd = 1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + call.eps);
  call.mean[image * shape.groups + group] = static_cast<float>(pivot + delta);
  call.rstd[image * shape.groups + group] = static_cast<float>(rstd);
  const Affine affine = call.affine.of(image, group * shape.per_group);
  for (int64_t c = 0; c < shape.per_group; ++c) {
    const double scale = rstd * affine.weight[c];
    columns.scale[first + c] = static_cast<float>(scale);
    columns.shift[first + c] = static_cast<float>(affine.bias[c] - delta * scale);
  }
}

template <bool kSilu, bool kIsSmall, class V>
INLINE V activate(V h) {
  return kSilu ? h / (exp<kIsSmall>(-h) + 1.0f) : h;
}

// Whether all of (x - pivot) * scale + shift are small: a column's x - pivot is at most the root of
// the sum of their squares.
INLINE bool is_small(const Columns& columns, int64_t width) {
  bool small = true;
  for (int64_t c = 0; c < width; ++c) {
    const float most = std::sqrt(static_cast<float>(columns.sums.second[c]));
    small &= std::fabs(columns.scale[c]) * most + std::fabs(columns.shift[c]) < kSmall;
  }
  return small;
}

template <class V, class T, bool kSilu, bool kIsSmall>
INLINE void write_slice(const T* x, T* y, int64_t pixels, int64_t width, int64_t stride,
                        const Columns& columns) {
  for_strips<V, 1>(width, [&](auto, int64_t column, int64_t count) INLINE_LAMBDA {
    const Pair<V> pivot = load_columns<V, T>(&columns.pivot[column]);
    const Pair<V> scale = load_columns<V, T>(&columns.scale[column]);
    const Pair<V> shift = load_columns<V, T>(&columns.shift[column]);
    for (int64_t p = 0; p < pixels; ++p) {
      Pair<V> pair = load_pair<V>(x + p * stride + column, count);
      for (int64_t i = 0; i < 2; ++i) {
        const V h = (pair.values[i] - pivot.values[i]) * scale.values[i] + shift.values[i];
        pair.values[i] = activate<kSilu, kIsSmall>(h);
      }
      prefetch_pair<V, kToWrite>(y + (p + kAhead) * stride + column);
      store_pair(pair, y + p * stride + column, count);
    }
  });
}

template <class V, class T, bool kSilu>
INLINE void run_slice(const Call& call, const Task& task, Columns& columns) {
  const Shape& shape = call.shape;
  const int64_t per_group = shape.per_group;
  const T* x = static_cast<const T*>(call.x) + task.offset;
  T* y = static_cast<T*>(call.y) + task.offset;
  float* pivot = columns.pivot.data();
  const double* sum = columns.sums.first.data();
  const double* squares = columns.sums.second.data();

  std::fill(columns.pivot.begin(), columns.pivot.end(), 0.0f);
  sum_slice<V, T, false>(x, shape.pixels, task.width, shape.channels, pivot, columns.sums);
  for (int64_t first = 0; first < task.width; first += per_group) {
    const double mean = total(sum + first, per_group) * shape.share;
    std::fill_n(pivot + first, per_group, static_cast<float>(mean));
  }
  sum_slice<V, T, true>(x, shape.pixels, task.width, shape.channels, pivot, columns.sums);
  for (int64_t g = 0; g < task.groups; ++g) {
    const int64_t first = g * per_group;
    finish_group(call, task.image, task.first_group + g, first, pivot[first],
                 total(sum + first, per_group), total(squares + first, per_group), columns);
  }
  if (is_small(columns, task.width)) {
    write_slice<V, T, kSilu, true>(x, y, shape.pixels, task.width, shape.channels, columns);
  } else {
    write_slice<V, T, kSilu, false>(x, y, shape.pixels, task.width, shape.channels, columns);
  }
}

template <class V, class T, bool kSilu>
INLINE void run_group(const Call& call, const Task& task, Columns& columns) {
  const int64_t pixels = call.shape.pixels, elements = task.width * pixels;
  const T* x = static_cast<const T*>(call.x) + task.offset;
  T* y = static_cast<T*>(call.y) + task.offset;
  const RunSums sums = sum_run<V, T, false>(x, elements, 0.0f);
  const float pivot = static_cast<float>(sums.first * call.shape.share);
  const RunSums centred = sum_run<V, T, true>(x, elements, pivot);
  finish_group(call, task.image, task.first_group, 0, pivot, centred.first, centred.second,
               columns);
  for (int64_t c = 0; c < task.width; ++c) {
    const float scale = columns.scale[c], shift = columns.shift[c];
    for (int64_t p = 0; p < pixels; p += kPair<V>) {
      const int64_t at = c * pixels + p, count = std::min(kPair<V>, pixels - p);
      Pair<V> pair = load_pair<V>(x + at, count);
      for (V& values : pair.values) {
        values = activate<kSilu, false>((values - pivot) * scale + shift);
      }
      store_pair(pair, y + at, count);
    }
  }
}

template <class T, bool kSilu>
struct Forward {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    const Call& call = *static_cast<const Call*>(context);
    Columns columns(call.shape.columns());
    for (int64_t index = begin; index < end; ++index) {
      const Task task(call.shape, index);
      if (call.shape.channels_last) {
        run_slice<V, T, kSilu>(call, task, columns);
      } else if (fills_pairs<V>(call.shape.pixels)) {
        run_group<V, T, kSilu>(call, task, columns);
      } else {
        run_group<Floats4, T, kSilu>(call, task, columns);
      }
    }
  }
};

}  // namespace

// x and y are [images, pixels, channels] (channels_last) or [images, channels, pixels], contiguous,
// float32 or bfloat16; weight and bias rows of [channels], from an image's to the next affine_stride
// floats, 0 for one row of all; mean and rstd [images, groups]. channels must be a multiple of
// groups. Returns 0, or the error code of the thread pool.
EXPORT int ds_group_norm_silu(const void* x, const float* weight, const float* bias, void* y,
                              float* mean, float* rstd, int64_t images, int64_t channels,
                              int64_t pixels, int64_t groups, double eps, bool silu,
                              bool channels_last, bool bfloat16_data, int64_t affine_stride) {
  const Shape shape(images, channels, pixels, groups, channels_last);
  Call call{shape, x, {weight, bias, affine_stride}, y, mean, rstd, eps};
  return shape.run(kernel_for<Forward>(bfloat16_data, silu), &call);
}
