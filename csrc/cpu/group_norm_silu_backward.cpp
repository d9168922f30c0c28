// The backward of GroupNorm, with SiLU or without: y = f(h), h = weight * xhat + bias, xhat =
// (x - mean) * rstd. With g = grad * f'(h), sums over pixels and means over the group:
//
//   dbias = sum g,  dweight = sum g * xhat,
//   dx = rstd * (weight * g - mean(weight * g) - xhat * mean(weight * g * xhat)).
//
// Reads x twice and grad once, writes dx once; g waits in the cache between the two passes.
//
// The saved mean, the pivot, is rounded to float32. If |mean| is so many standard deviations that
// this matters, one more pass measures the error of the pivot (delta), which is carried along
// separately, as in the forward.
//
// Every image writes its own row of sums for dweight and dbias. For parameters of all images the rows
// are added up in order: the bits do not depend on the number of threads.
#include <memory>

#include "group_norm_silu.h"

namespace {

// From this many standard deviations between the mean and zero, the mean's rounding matters.
constexpr float kFar = 4.0f;

struct Call {
  Shape shape;
  const void* grad;
  const void* x;
  Affine affine;
  const float* mean;
  const float* rstd;
  void* dx;
  double* rows;  // [2, images, channels]: sums of g and of g * xhat
  float* dweight;
  float* dbias;
};

// By channel of a task: h = (x - pivot) * scale + shift, dx = g * scale + (x - pivot) * slope +
// offset. The sums are those of g and of g * (x - pivot).
struct Columns {
  Columns(const Shape& shape, int64_t count)
      : sums(count),
        pivot(count),
        scale(count),
        shift(count),
        slope(count),
        offset(count),
        delta(shape.task_groups),
        g(new float[count * (shape.pixels + kPair<Floats16>)]) {}
  Sums sums;
  std::vector<float> pivot, scale, shift, slope, offset;
  std::vector<double> delta;  // by group
  std::unique_ptr<float[]> g;  // by strip, and in a strip by pixel
};

INLINE bool is_far(const Call& call, int64_t statistic) {
  return std::fabs(call.mean[statistic]) * call.rstd[statistic] > kFar;
}

// Sets scale and shift, from which h is computed again.
INLINE void set_group(const Call& call, const Task& task, int64_t g, double delta,
                      Columns& columns) {
  const int64_t first = g * call.shape.per_group;
  const double rstd = call.rstd[task.image * call.shape.groups + task.first_group + g];
  const Affine affine = call.affine.of(task.image, task.first_channel);
  columns.delta[g] = delta;
  for (int64_t c = first; c < first + call.shape.per_group; ++c) {
    const double scale = rstd * affine.weight[c];
    columns.scale[c] = static_cast<float>(scale);
    columns.shift[c] = static_cast<float>(affine.bias[c] - delta * scale);
  }
}

// Turns the sums into the image's row for dweight and dbias, and into slope and offset of dx.
INLINE void finish_group(const Call& call, const Task& task, int64_t g, Columns& columns) {
  const Shape& shape = call.shape;
  const int64_t first = g * shape.per_group;
  const double rstd = call.rstd[task.image * shape.groups + task.first_group + g];
  const double delta = columns.delta[g];
  double* row = call.rows + task.image * shape.channels + task.first_channel;
  double* product_row = row + shape.images * shape.channels;
  const float* weights = call.affine.of(task.image, task.first_channel).weight;
  double sum = 0.0, product = 0.0;
  for (int64_t c = first; c < first + shape.per_group; ++c) {
    const double weight = weights[c];
    row[c] = columns.sums.first[c];
    product_row[c] = (columns.sums.second[c] - delta * columns.sums.first[c]) * rstd;
    sum += weight * row[c];
    product += weight * product_row[c];
  }
  const double slope = -rstd * rstd * product * shape.share;
  const double offset = -rstd * sum * shape.share - delta * slope;
  std::fill_n(&columns.slope[first], shape.per_group, static_cast<float>(slope));
  std::fill_n(&columns.offset[first], shape.per_group, static_cast<float>(offset));
}

// grad * f'(h), with f' = s * (1 + h * (1 - s)) and s = sigmoid(h) for SiLU.
template <bool kSilu, bool kIsSmall, class V>
INLINE V chain(V grad, V h) {
  if (!kSilu) return grad;
  const V s = 1.0f / (exp<kIsSmall>(-h) + 1.0f);
  return grad * (s * (h * (1.0f - s) + 1.0f));
}

// Whether all h are small: a value is at most the root of their number from the mean, in standard
// deviations.
INLINE bool is_small(const Call& call, const Task& task) {
  const float most = static_cast<float>(std::sqrt(1.0 / call.shape.share));
  const Affine affine = call.affine.of(task.image, task.first_channel);
  uint32_t largest = 0;  // of positive numbers, as whose bits are ordered, and of NaN
  for (int64_t c = 0; c < task.width; ++c) {
    const float bound = std::fabs(affine.weight[c]) * most + std::fabs(affine.bias[c]);
    uint32_t bits;
    std::memcpy(&bits, &bound, sizeof bits);
    largest = std::max(largest, bits);
  }
  float bound;
  std::memcpy(&bound, &largest, sizeof bound);
  return bound < kSmall;
}

// Writes g, and sums g and g * (x - pivot) by column. dx is only prefetched.
template <class V, class T, bool kSilu, bool kIsSmall>
INLINE void gather_slice(const T* grad, const T* x, T* dx, int64_t pixels, int64_t width,
                         int64_t stride, Columns& columns) {
  columns.sums.clear(width + kPair<V>);
  for_strips<V, 1>(width, [&](auto, int64_t column, int64_t count) INLINE_LAMBDA {
    const Pair<V> pivot = load_columns<V, T>(&columns.pivot[column]);
    const Pair<V> scale = load_columns<V, T>(&columns.scale[column]);
    const Pair<V> shift = load_columns<V, T>(&columns.shift[column]);
    float* g = &columns.g[column * pixels];
    for (int64_t first = 0; first < pixels; first += kBlock) {
      Pair<V> sum{}, product{};
      const int64_t end = std::min(pixels, first + kBlock);
      for (int64_t p = first; p < end; ++p) {
        prefetch_pair<V, kToRead>(x + (p + kAhead) * stride + column);
        prefetch_pair<V, kToRead>(grad + (p + kAhead) * stride + column);
        prefetch_pair<V, kToWrite>(dx + p * stride + column);
        const Pair<V> xs = load_pair<V>(x + p * stride + column, count);
        Pair<V> gs = load_pair<V>(grad + p * stride + column, count);
        for (int64_t i = 0; i < 2; ++i) {
          const V d = xs.values[i] - pivot.values[i];
          const V h = d * scale.values[i] + shift.values[i];
          gs.values[i] = chain<kSilu, kIsSmall>(gs.values[i], h);
          sum.values[i] += gs.values[i];
          product.values[i] += gs.values[i] * d;
        }
        store_pair(gs, g + p * kPair<V>);
      }
      add_columns<V, T>(sum, &columns.sums.first[column]);
      add_columns<V, T>(product, &columns.sums.second[column]);
    }
  });
}

template <class V, class T>
INLINE void write_slice(const T* x, T* dx, int64_t pixels, int64_t width, int64_t stride,
                        const Columns& columns) {
  for_strips<V, 1>(width, [&](auto, int64_t column, int64_t count) INLINE_LAMBDA {
    const Pair<V> pivot = load_columns<V, T>(&columns.pivot[column]);
    const Pair<V> scale = load_columns<V, T>(&columns.scale[column]);
    const Pair<V> slope = load_columns<V, T>(&columns.slope[column]);
    const Pair<V> offset = load_columns<V, T>(&columns.offset[column]);
    const float* g = &columns.g[column * pixels];
    for (int64_t p = 0; p < pixels; ++p) {
      Pair<V> pair = load_pair<V>(x + p * stride + column, count);
      const Pair<V> gs = load_pair<V>(g + p * kPair<V>);
      for (int64_t i = 0; i < 2; ++i) {
        const V d = pair.values[i] - pivot.values[i];
        pair.values[i] = gs.values[i] * scale.values[i] + (d * slope.values[i] + offset.values[i]);
      }
      store_pair(pair, dx + p * stride + column, count);
    }
  });
}

template <class V, class T, bool kSilu>
INLINE void run_slice(const Call& call, const Task& task, Columns& columns) {
  const Shape& shape = call.shape;
  const T* grad = static_cast<const T*>(call.grad) + task.offset;
  const T* x = static_cast<const T*>(call.x) + task.offset;
  T* dx = static_cast<T*>(call.dx) + task.offset;
  const int64_t statistics = task.image * shape.groups + task.first_group;

  bool far = false;
  for (int64_t g = 0; g < task.groups; ++g) {
    far = far || is_far(call, statistics + g);
    std::fill_n(&columns.pivot[g * shape.per_group], shape.per_group, call.mean[statistics + g]);
  }
  if (far) {
    sum_slice<V, T, false>(x, shape.pixels, task.width, shape.channels, columns.pivot.data(),
                           columns.sums);
  }
  for (int64_t g = 0; g < task.groups; ++g) {
    const double* sums = &columns.sums.first[g * shape.per_group];
    set_group(call, task, g, far ? total(sums, shape.per_group) * shape.share : 0.0, columns);
  }
  const int64_t pixels = shape.pixels, width = task.width, stride = shape.channels;
  if (is_small(call, task)) {
    gather_slice<V, T, kSilu, true>(grad, x, dx, pixels, width, stride, columns);
  } else {
    gather_slice<V, T, kSilu, false>(grad, x, dx, pixels, width, stride, columns);
  }
  for (int64_t g = 0; g < task.groups; ++g) finish_group(call, task, g, columns);
  write_slice<V, T>(x, dx, shape.pixels, task.width, shape.channels, columns);
}

// Writes g of one channel and returns its sums.
template <class V, class T, bool kSilu>
INLINE RunSums gather_run(const T* grad, const T* x, int64_t pixels, float pivot, float scale,
                          float shift, float* g) {
  RunSums sums{};
  for (int64_t first = 0; first < pixels; first += kBlock * kPair<V>) {
    Pair<V> sum{}, product{};
    const int64_t end = std::min(pixels, first + kBlock * kPair<V>);
    for (int64_t p = first; p < end; p += kPair<V>) {
      const int64_t count = std::min(kPair<V>, end - p);
      const Pair<V> xs = load_pair<V>(x + p, count);
      Pair<V> gs = load_pair<V>(grad + p, count);
      for (int64_t i = 0; i < 2; ++i) {
        const V d = xs.values[i] - pivot;
        gs.values[i] = chain<kSilu, false>(gs.values[i], d * scale + shift);
        sum.values[i] += gs.values[i];
        product.values[i] += gs.values[i] * d;
      }
      store_pair(gs, g + p);
    }
    sums.first += total(sum.values[0] + sum.values[1]);
    sums.second += total(product.values[0] + product.values[1]);
  }
  return sums;
}

template <class V, class T>
INLINE void write_run(const T* x, T* dx, int64_t pixels, float pivot, float scale, float slope,
                      float offset, const float* g) {
  for (int64_t p = 0; p < pixels; p += kPair<V>) {
    const int64_t count = std::min(kPair<V>, pixels - p);
    Pair<V> pair = load_pair<V>(x + p, count);
    const Pair<V> gs = load_pair<V>(g + p);
    for (int64_t i = 0; i < 2; ++i) {
      pair.values[i] = gs.values[i] * scale + ((pair.values[i] - pivot) * slope + offset);
    }
    store_pair(pair, dx + p, count);
  }
}

template <class V, class T, bool kSilu>
INLINE void run_group(const Call& call, const Task& task, Columns& columns) {
  const Shape& shape = call.shape;
  const int64_t pixels = shape.pixels;
  const int64_t padded = (pixels + kPair<V> - 1) / kPair<V> * kPair<V>;
  const T* grad = static_cast<const T*>(call.grad) + task.offset;
  const T* x = static_cast<const T*>(call.x) + task.offset;
  T* dx = static_cast<T*>(call.dx) + task.offset;
  const int64_t statistic = task.image * shape.groups + task.first_group;
  const float pivot = call.mean[statistic];

  double delta = 0.0;
  if (is_far(call, statistic)) {
    delta = sum_run<V, T, false>(x, task.width * pixels, pivot).first * shape.share;
  }
  set_group(call, task, 0, delta, columns);
  for (int64_t c = 0; c < task.width; ++c) {
    const RunSums sums =
        gather_run<V, T, kSilu>(grad + c * pixels, x + c * pixels, pixels, pivot, columns.scale[c],
                                columns.shift[c], &columns.g[c * padded]);
    columns.sums.first[c] = sums.first;
    columns.sums.second[c] = sums.second;
  }
  finish_group(call, task, 0, columns);
  for (int64_t c = 0; c < task.width; ++c) {
    write_run<V>(x + c * pixels, dx + c * pixels, pixels, pivot, columns.scale[c],
                 columns.slope[c], columns.offset[c], &columns.g[c * padded]);
  }
}

template <class T, bool kSilu>
struct Backward {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    const Call& call = *static_cast<const Call*>(context);
    Columns columns(call.shape, call.shape.columns());
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

// Adds up the rows of all images, a few neighboring channels at a time.
void sum_rows(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  const int64_t channels = call.shape.channels, images = call.shape.images;
  constexpr int64_t few = 32;
  for (int64_t first = begin; first < end; first += few) {
    const int64_t count = std::min(few, end - first);
    double sums[2][few] = {};
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t i = 0; i < 2; ++i) {
        const double* row = call.rows + (i * images + n) * channels + first;
        for (int64_t c = 0; c < count; ++c) sums[i][c] += row[c];
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      call.dbias[first + c] = static_cast<float>(sums[0][c]);
      call.dweight[first + c] = static_cast<float>(sums[1][c]);
    }
  }
}

}  // namespace

// grad, x and dx are [images, pixels, channels] (channels_last) or [images, channels, pixels],
// contiguous, float32 or bfloat16; weight, bias and affine_stride, mean and rstd are those of
// ds_group_norm_silu. rows [2, images, channels] receives dbias and dweight of each image; dweight
// and dbias [channels] their sums, or are null. Returns 0, or the error code of the thread pool.
EXPORT int ds_group_norm_silu_backward(const void* grad, const void* x, const float* weight,
                                       const float* bias, const float* mean, const float* rstd,
                                       void* dx, float* dweight, float* dbias, double* rows,
                                       int64_t images, int64_t channels, int64_t pixels,
                                       int64_t groups, bool silu, bool channels_last,
                                       bool bfloat16_data, int64_t affine_stride) {
  const Shape shape(images, channels, pixels, groups, channels_last);
  const Affine affine{weight, bias, affine_stride};
  Call call{shape, grad, x, affine, mean, rstd, dx, rows, dweight, dbias};
  const int error = shape.run(kernel_for<Backward>(bfloat16_data, silu), &call);
  if (error || dweight == nullptr) return error;
  return parallel_for(channels, 1 + kSerialElements / (1 + images), sum_rows, &call);
}
