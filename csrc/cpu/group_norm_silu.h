// What the forward and the backward of GroupNorm-SiLU share: how the work is cut, and sums.
//
// A task is a set of whole groups of one image, small enough to stay in the L2 cache between the
// passes over it. How an image is cut depends on its own shape only, so that the bits of the result
// depend neither on the batch nor on the number of threads.
//
// A task of channels_last data is a slice of channels, [pixels, width], and what is known of its
// channels is kept in columns. A task of other data is one group, [channels, pixels] without gaps.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace {

// The least channels of a channels_last task, and its elements, before both are rounded up to whole
// groups and pairs.
constexpr int64_t kSlice = 64;
constexpr int64_t kTaskElements = 32768;
// Pairs of vectors of a row that are read side by side.
constexpr int64_t kStrip = 2;
// Rows between the one that is prefetched and the one in use: the processor does not predict steps
// as wide as a row.
constexpr int64_t kAhead = 16;
// Rows summed in float32 before they join the float64 sums.
constexpr int64_t kBlock = 64;
// With fewer elements, a second thread costs more than it saves.
constexpr int64_t kSerialElements = 16384;

struct Shape {
  int64_t images, channels, pixels, groups;
  bool channels_last;

  // How the work is cut: channels of a group, groups of a task, tasks of an image.
  int64_t per_group, task_groups, image_tasks;
  double share;  // of an element in the mean of its group

  Shape(int64_t images, int64_t channels, int64_t pixels, int64_t groups, bool channels_last)
      : images(images),
        channels(channels),
        pixels(pixels),
        groups(groups),
        channels_last(channels_last),
        per_group(channels / groups),
        task_groups(1),
        share(1.0 / static_cast<double>(per_group * pixels)) {
    if (channels_last) {
      const int64_t slice = std::max(kSlice, kTaskElements / std::max<int64_t>(1, pixels));
      task_groups = (slice + per_group - 1) / per_group;
      while (task_groups < groups && task_groups * per_group % kPair<Floats16> != 0) ++task_groups;
      task_groups = std::min(groups, task_groups);
    }
    image_tasks = (groups + task_groups - 1) / task_groups;
  }
  // The columns of a task, to a whole number of pairs of any vector.
  int64_t columns() const { return task_groups * per_group + kPair<Floats16>; }

  // Runs the tasks. Returns 0, or the error code of the thread pool.
  int run(RangeFunction function, void* context) const {
    const int64_t elements = task_groups * per_group * pixels;
    const int64_t grain = 1 + kSerialElements / (1 + elements);
    return parallel_for(images * image_tasks, grain, function, context);
  }
};

struct Task {
  int64_t image, first_group, groups, width, first_channel, offset;

  INLINE Task(const Shape& shape, int64_t index)
      : image(index / shape.image_tasks),
        first_group(index % shape.image_tasks * shape.task_groups),
        groups(std::min(shape.task_groups, shape.groups - first_group)),
        width(groups * shape.per_group),
        first_channel(first_group * shape.per_group),
        offset(image * shape.channels * shape.pixels +
               first_channel * (shape.channels_last ? 1 : shape.pixels)) {}
};

// The parameters of a norm: one row of channels for all images, or one an image.
struct Affine {
  const float* weight;
  const float* bias;
  int64_t stride;  // from the row of an image to the next; 0 for one row of all

  INLINE Affine of(int64_t image, int64_t first_channel) const {
    const int64_t at = image * stride + first_channel;
    return {weight + at, bias + at, stride};
  }
};

// Two sums of each column of a slice.
struct Sums {
  explicit Sums(int64_t columns) : first(columns), second(columns) {}
  INLINE void clear(int64_t width) {
    std::fill_n(first.begin(), width, 0.0);
    std::fill_n(second.begin(), width, 0.0);
  }
  std::vector<double> first, second;
};

// Calls strip(pairs, column, count) for strips of kPairs pairs, then for single pairs, of which the
// last may have fewer elements: count of them.
template <class V, int64_t kPairs, class Strip>
INLINE void for_strips(int64_t width, Strip strip) {
  constexpr int64_t wide = kPairs * kPair<V>;
  int64_t c = 0;
  for (; c + wide <= width; c += wide) {
    strip(std::integral_constant<int64_t, kPairs>(), c, kPair<V>);
  }
  for (; c < width; c += kPair<V>) {
    strip(std::integral_constant<int64_t, 1>(), c, std::min(kPair<V>, width - c));
  }
}

template <class V>
INLINE double total(V values) {
  double sums[kLanes<V>];
  for (int64_t i = 0; i < kLanes<V>; ++i) sums[i] = static_cast<double>(values[i]);
  for (int64_t n = kLanes<V> / 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; ++i) sums[i] += sums[i + n];
  }
  return sums[0];
}

// The sum of `count` values, in four running sums: an addition waits for the one before it.
INLINE double total(const double* values, int64_t count) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t k = 0; k < 4; ++k) sums[k] += values[i + k];
  }
  for (; i < count; ++i) sums[0] += values[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Sums x - pivot by column, and its square.
template <class V, class T, bool kSquares>
INLINE void sum_slice(const T* x, int64_t pixels, int64_t width, int64_t stride,
                      const float* pivot, Sums& sums) {
  sums.clear(width + kPair<V>);
  for_strips<V, kStrip>(width, [&](auto pairs, int64_t column, int64_t count) INLINE_LAMBDA {
    Pair<V> pivots[pairs];
    for (int64_t k = 0; k < pairs; ++k) {
      pivots[k] = load_columns<V, T>(pivot + column + k * kPair<V>);
    }
    for (int64_t first = 0; first < pixels; first += kBlock) {
      Pair<V> part[pairs] = {}, squares[pairs] = {};
      const int64_t end = std::min(pixels, first + kBlock);
      for (int64_t p = first; p < end; ++p) {
        for (int64_t k = 0; k < pairs; ++k) {
          const T* from = x + p * stride + column + k * kPair<V>;
          prefetch_pair<V, kToRead>(from + kAhead * stride);
          const Pair<V> pair = load_pair<V>(from, count);
          for (int64_t i = 0; i < 2; ++i) {
            const V d = pair.values[i] - pivots[k].values[i];
            part[k].values[i] += d;
            if (kSquares) squares[k].values[i] += d * d;
          }
        }
      }
      for (int64_t k = 0; k < pairs; ++k) {
        add_columns<V, T>(part[k], &sums.first[column + k * kPair<V>]);
        if (kSquares) add_columns<V, T>(squares[k], &sums.second[column + k * kPair<V>]);
      }
    }
  });
}

// The kernel for this data on this processor.
template <template <class, bool> class Kernel>
RangeFunction kernel_for(bool bfloat16_data, bool silu) {
  if (bfloat16_data) {
    return silu ? choose<Kernel<bfloat16, true>>() : choose<Kernel<bfloat16, false>>();
  }
  return silu ? choose<Kernel<float, true>>() : choose<Kernel<float, false>>();
}

// Whether a run of this length is better read in pairs of V than of the narrowest vector: a pair
// that is not full is slow.
template <class V>
INLINE bool fills_pairs(int64_t length) {
  return length % kPair<V> == 0 || length >= 8 * kPair<V>;
}

// The sums of x - pivot, and of its square, over a run of elements.
struct RunSums {
  double first, second;
};

template <class V, class T, bool kSquares>
INLINE RunSums sum_run(const T* x, int64_t elements, float pivot) {
  constexpr int64_t row = kStrip * kPair<V>;
  RunSums sums{};
  int64_t done = 0;
  while (done + row <= elements) {
    V part[2 * kStrip] = {}, squares[2 * kStrip] = {};
    const int64_t end = std::min(elements - row, done + (kBlock - 1) * row);
    for (; done <= end; done += row) {
      for (int64_t v = 0; v < 2 * kStrip; v += 2) {
        const Pair<V> pair = load_pair<V>(x + done + v * kLanes<V>);
        for (int64_t i = 0; i < 2; ++i) {
          const V d = pair.values[i] - pivot;
          part[v + i] += d;
          if (kSquares) squares[v + i] += d * d;
        }
      }
    }
    sums.first += total((part[0] + part[1]) + (part[2] + part[3]));
    if (kSquares) sums.second += total((squares[0] + squares[1]) + (squares[2] + squares[3]));
  }
  for (; done < elements; ++done) {
    const float d = widen(x[done]) - pivot;
    sums.first += static_cast<double>(d);
    if (kSquares) sums.second += static_cast<double>(d) * static_cast<double>(d);
  }
  return sums;
}

}  // namespace
