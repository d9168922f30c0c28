// A step of Adam or AdamW on many tensors, with the norm of the gradients, the moving average of the
// weights and a copy of them in bfloat16, in one pass over memory; in two where gradients are
// clipped. The formulas are those of csrc/cuda/adam.cu.
//
// Every rounding is that of torch.optim.Adam(fused=True) and of torch.lerp, so the compiler contracts
// nothing here (CMakeLists.txt). The norm is a sum in float64 over chunks, in order, whatever thread
// summed a chunk.
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t kChunk = 16384;  // weights of a task
constexpr int64_t kBlock = 256;    // weights that stay in the L1 cache from one loop to the next

// The part of a tensor that a task takes.
struct Chunk {
  int64_t tensor, begin, end;
};

// The factors that are the same for all weights.
struct Factors {
  float scale;  // of gradients
  float shrink, decay, first, beta2, second, root, eps, step_size, average;
};

struct Call {
  void* const* const* lists;  // params, grads, exp_avgs, exp_avg_sqs, averages, copies
  std::vector<Chunk> chunks;
  double* partial;  // of each chunk: the sum of squares of its gradients
  Factors factors;
  bool sums, steps;  // what to do now

  template <class T>
  T* at(int64_t list, const Chunk& chunk) const {
    T* const tensor = static_cast<T*>(lists[list][chunk.tensor]);
    return tensor == nullptr ? nullptr : tensor + chunk.begin;
  }
};

// a * b + c, rounded once where the target can.
template <class V>
INLINE float fused(float a, float b, float c) {
#if defined(__x86_64__)
  if (kLanes<V> == kLanes<Floats4>) return a * b + c;
#endif
  return __builtin_fmaf(a, b, c);
}

// As torch.lerp, which is exact at both ends.
template <class V>
INLINE float lerp(float from, float to, float weight) {
  return weight < 0.5f ? fused<V>(weight, to - from, from) : fused<V>(weight - 1.0f, to - from, to);
}

template <class G>
INLINE double sum_squares(const G* grad, int64_t count) {
  constexpr int64_t lanes = 16;
  double sums[lanes] = {};
  const auto add = [&](int64_t i, int64_t k) INLINE_LAMBDA {
    const double g = widen(grad[i + k]);
    sums[k] += g * g;
  };
  const int64_t whole = count - count % lanes;
  for (int64_t i = 0; i < whole; i += lanes) {
    for (int64_t k = 0; k < lanes; ++k) add(i, k);
  }
  for (int64_t i = whole; i < count; ++i) add(whole, i - whole);
  double sum = 0.0;
  for (int64_t k = 0; k < lanes; ++k) sum += sums[k];
  return sum;
}

// Steps weights begin to end. Those that are left over after eights round the other product of v, as
// PyTorch's do.
template <class V, bool kLeftOver, class G>
INLINE void step(const Call& call, const Chunk& block, int64_t begin, int64_t end) {
  float* __restrict const param = call.at<float>(0, block);
  const G* __restrict const grad = call.at<const G>(1, block);
  float* __restrict const exp_avg = call.at<float>(2, block);
  float* __restrict const exp_avg_sq = call.at<float>(3, block);
  const Factors f = call.factors;
  for (int64_t i = begin; i < end; ++i) {
    const float p = param[i] * f.shrink, scaled = widen(grad[i]) * f.scale;
    const float g = f.decay == 0.0f ? scaled : fused<V>(f.decay, p, scaled);
    const float m = lerp<V>(exp_avg[i], g, f.first);
    const float old = exp_avg_sq[i], part = f.second * g;
    const float v = kLeftOver ? fused<V>(f.beta2, old, part * g) : fused<V>(part, g, f.beta2 * old);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = p - f.step_size * m / (std::sqrt(v) / f.root + f.eps);
  }
}

template <class G>
struct Step {
  template <class V>
  static INLINE void run(int64_t begin, int64_t end, void* context) {
    const Call& call = *static_cast<const Call*>(context);
    for (int64_t index = begin; index < end; ++index) {
      Chunk block = call.chunks[index];
      const int64_t end_of_chunk = block.end;
      double sum = 0.0;
      for (; block.begin < end_of_chunk; block.begin = block.end) {
        block.end = std::min(end_of_chunk, block.begin + kBlock);
        const int64_t count = block.end - block.begin, whole = count - count % 8;
        if (call.sums) sum += sum_squares(call.at<const G>(1, block), count);
        if (!call.steps) continue;
        step<V, false, G>(call, block, 0, whole);
        step<V, true, G>(call, block, whole, count);
        follow<V>(call, block, count);
      }
      if (call.sums) call.partial[index] = sum;
    }
  }

  template <class V>
  static INLINE void follow(const Call& call, const Chunk& block, int64_t count) {
    const float* __restrict const param = call.at<float>(0, block);
    const float weight = call.factors.average;
    if (float* __restrict const average = call.at<float>(4, block)) {
      for (int64_t i = 0; i < count; ++i) average[i] = lerp<V>(average[i], param[i], weight);
    }
    if (bfloat16* __restrict const copy = call.at<bfloat16>(5, block)) {
      for (int64_t i = 0; i < count; ++i) narrow(param[i], copy + i);
    }
  }
};

}  // namespace

// How many chunks the tensors have: the numbers of `partial` below.
EXPORT int64_t ds_adam_chunks(const int64_t* sizes, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += (sizes[i] + kChunk - 1) / kChunk;
  return chunks;
}

// lists are six arrays of `count` addresses each: params, grads, exp_avgs, exp_avg_sqs, and averages
// and copies, whose addresses may be null. All are float32 without gaps, except grads, which are
// bfloat16 if `narrow`, and copies, bfloat16. step is counted from 1; norm is written. rates are beta1,
// beta2, eps, weight_decay, whether that is decoupled, ema_decay and max_norm. Returns 0, or the error
// code of the thread pool.
EXPORT int ds_adam(void* const* const* lists, const int64_t* sizes, int64_t count,
                   const float* step, const float* lr, double* partial, float* norm,
                   const double* rates, bool narrow) {
  const double beta1 = rates[0], beta2 = rates[1], weight_decay = rates[3], max_norm = rates[6];
  const bool decoupled = rates[4] != 0.0;
  Call call{};
  call.lists = lists, call.partial = partial;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t begin = 0; begin < sizes[i]; begin += kChunk) {
      call.chunks.push_back({i, begin, std::min(sizes[i], begin + kChunk)});
    }
  }
  const double rate = *lr, counted = *step;
  call.factors = Factors{
      1.0f,
      static_cast<float>(decoupled ? 1.0 - rate * weight_decay : 1.0),
      static_cast<float>(decoupled ? 0.0 : weight_decay),
      static_cast<float>(1.0 - beta1),
      static_cast<float>(beta2),
      static_cast<float>(1.0 - beta2),
      static_cast<float>(std::sqrt(1.0 - std::pow(beta2, counted))),
      static_cast<float>(rates[2]),
      static_cast<float>(rate / (1.0 - std::pow(beta1, counted))),
      static_cast<float>(1.0 - rates[5]),
  };

  const int64_t chunks = call.chunks.size();
  const auto pass = [&](bool sums, bool steps) {
    call.sums = sums, call.steps = steps;
    const auto function = narrow ? choose<Step<bfloat16>>() : choose<Step<float>>();
    return parallel_for(chunks, 4, function, &call);
  };
  const bool clips = !std::isinf(max_norm);
  if (int error = pass(true, !clips)) return error;
  double sum = 0.0;
  for (int64_t i = 0; i < chunks; ++i) sum += partial[i];
  *norm = static_cast<float>(std::sqrt(sum));
  if (!clips) return 0;
  const float down = static_cast<float>(max_norm) / (*norm + 1e-6f);
  call.factors.scale = down > 1.0f ? 1.0f : down;  // NaN stays
  return pass(false, true);
}
