// A step of Adam or AdamW on many tensors. The same pass over memory takes the norm of the
// gradients and updates a moving average of the weights and a copy of them in bfloat16.
//
//     g = scale * grad (+ weight_decay * p: Adam)       p *= 1 - lr * weight_decay (AdamW)
//     m += (1 - beta1) (g - m)                           v = beta2 v + (1 - beta2) g^2
//     p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//     average += (1 - decay) (p - average)               copy = p
//
// Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1, with eps where torch.optim.Adam has it;
// Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2. scale brings the norm of all gradients
// down to max_norm, as torch.nn.utils.clip_grad_norm_ does.
//
// Traffic, in bytes for each weight: 38 with everything (grad read; p, m, v and average read and
// written; copy written), and 4 more if the norm has to be known before the step.
//
// Addresses are arguments of the kernels, for as many tensors as there is room for. A table in
// device memory could go stale, or be freed under a CUDA graph. A block takes a chunk of a tensor.
// No atomics: chunks are summed one by one, in order. Not measured yet.
#include <cmath>

#include "launch.cuh"

namespace ds {
namespace {

constexpr int64_t kChunk = 8192;
constexpr int kTensors = 56;  // of one launch; its arguments may take 4096 bytes

// The part of a tensor that a block takes.
struct Chunk {
  int tensor;
  int64_t begin, end;
};

// Tensors of one launch. average and copy may be null.
template <class Grad>
struct Tensors {
  const Grad* grad[kTensors];
  float *param[kTensors], *exp_avg[kTensors], *exp_avg_sq[kTensors], *average[kTensors];
  __nv_bfloat16* copy[kTensors];
  int64_t size[kTensors];
  int end[kTensors];  // chunks up to and with this tensor
  bool whole[kTensors];  // whether all of it can be read in fours
  float* partial;     // of each chunk of the launch: the sum of squares of its gradients

  HOST_DEVICE Chunk chunk(int64_t index) const {
    int tensor = 0;
    while (end[tensor] <= index) ++tensor;
    const int64_t begin = (index - (tensor ? end[tensor - 1] : 0)) * kChunk;
    return {tensor, begin, size[tensor] < begin + kChunk ? size[tensor] : begin + kChunk};
  }
};

struct Rule {
  const float *step, *lr;
  const float* scale;  // of gradients; null for 1
  double beta1, beta2;
  float eps, weight_decay;
  bool decoupled;
  float average_weight;  // 1 - decay
};

// The factors that are the same for all weights of a step. Every block computes them once.
struct Factors {
  float step_size, root, shrink, scale;

  HOST_DEVICE explicit Factors(const Rule& rule) {
    const double step = *rule.step, lr = *rule.lr;
    step_size = static_cast<float>(lr / (1.0 - pow(rule.beta1, step)));
    root = static_cast<float>(sqrt(1.0 - pow(rule.beta2, step)));
    shrink = rule.decoupled ? static_cast<float>(1.0 - lr * rule.weight_decay) : 1.0f;
    scale = rule.scale ? *rule.scale : 1.0f;
  }
};

// As torch.lerp, which is exact at both ends.
HOST_DEVICE float lerp(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1.0f - weight);
}

HOST_DEVICE void update(const Rule& rule, const Factors& factors, float grad, float& param,
                        float& exp_avg, float& exp_avg_sq) {
  float g = grad * factors.scale;
  param *= factors.shrink;
  if (!rule.decoupled) g += rule.weight_decay * param;
  const float beta2 = static_cast<float>(rule.beta2);
  exp_avg = lerp(exp_avg, g, static_cast<float>(1.0 - rule.beta1));
  exp_avg_sq = beta2 * exp_avg_sq + static_cast<float>(1.0 - rule.beta2) * g * g;
  param -= factors.step_size * (exp_avg / (sqrtf(exp_avg_sq) / factors.root + rule.eps));
}

struct Shared {
  float *sums, *rows;
  Factors* factors;

  static constexpr int kRow = 16;
  static constexpr int64_t kBytes = sizeof(float) * (kThreads + kRow) + sizeof(Factors);

  HOST_DEVICE explicit Shared(char* memory)
      : sums(reinterpret_cast<float*>(memory)),
        rows(sums + kThreads),
        factors(reinterpret_cast<Factors*>(rows + kRow)) {}
};

// total(sum of what the threads left in shared.sums), in one order, by one thread.
template <class Cluster, class Total>
HOST_DEVICE void sum_threads(Cluster& cluster, Total total) {
  constexpr int kRow = Shared::kRow;
  cluster.phase([&](const Block& block, int thread) {
    if (thread >= kRow) return;
    const Shared shared(block.shared);
    float sum = 0.0f;
    for (int i = thread; i < kThreads; i += kRow) sum += shared.sums[i];
    shared.rows[thread] = sum;
  });
  cluster.phase([&](const Block& block, int thread) {
    if (thread > 0) return;
    const Shared shared(block.shared);
    float sum = 0.0f;
    for (int i = 0; i < kRow; ++i) sum += shared.rows[i];
    total(sum);
  });
}

// The sum of squares of every chunk.
template <class Grad>
struct SumSquares {
  Tensors<Grad> tensors;

  template <class Cluster>
  HOST_DEVICE void operator()(Cluster& cluster) const {
    const auto chunk = tensors.chunk(cluster.index());
    cluster.phase([&](const Block& block, int thread) {
      const bool whole = tensors.whole[chunk.tensor];
      Shared(block.shared).sums[thread] =
          whole ? sum(std::true_type(), chunk, thread) : sum(std::false_type(), chunk, thread);
    });
    sum_threads(cluster, [&](float sum) { tensors.partial[cluster.index()] = sum; });
  }

  template <class Whole>
  HOST_DEVICE float sum(Whole whole, const Chunk& chunk, int thread) const {
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t i = chunk.begin + thread * 4; i < chunk.end; i += kThreads * 4) {
      const auto grad = load_four(whole, tensors.grad[chunk.tensor], i, chunk.end);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum += widen(grad.values[k]) * widen(grad.values[k]);
    }
    return sum;
  }
};

// The norm of all gradients, and the factor that brings it down to max_norm.
struct Norm {
  const float* partial;
  int64_t count;
  float max_norm;
  float *norm, *scale;

  template <class Cluster>
  HOST_DEVICE void operator()(Cluster& cluster) const {
    cluster.phase([&](const Block& block, int thread) {
      double sum = 0.0;
      for (int64_t i = thread; i < count; i += kThreads) sum += partial[i];
      Shared(block.shared).sums[thread] = static_cast<float>(sum);
    });
    sum_threads(cluster, [&](float sum) {
      *norm = sqrtf(sum);
      const float down = max_norm / (*norm + 1e-6f);
      *scale = down > 1.0f ? 1.0f : down;  // NaN stays
    });
  }
};

// The step, and the sum of squares of every chunk.
template <class Grad>
struct Step {
  Tensors<Grad> tensors;
  Rule rule;

  template <class Cluster>
  HOST_DEVICE void operator()(Cluster& cluster) const {
    const auto chunk = tensors.chunk(cluster.index());
    cluster.phase([&](const Block& block, int thread) {
      if (thread == 0) *Shared(block.shared).factors = Factors(rule);
    });
    cluster.phase([&](const Block& block, int thread) {
      const Shared shared(block.shared);
      const Factors factors = *shared.factors;
      shared.sums[thread] = tensors.whole[chunk.tensor]
                                ? step(std::true_type(), chunk, factors, thread)
                                : step(std::false_type(), chunk, factors, thread);
    });
    sum_threads(cluster, [&](float sum) { tensors.partial[cluster.index()] = sum; });
  }

  template <class Whole>
  HOST_DEVICE float step(Whole whole, const Chunk& chunk, const Factors& factors,
                         int thread) const {
    const int tensor = chunk.tensor;
    const bool averaged = tensors.average[tensor] != nullptr;
    const bool copied = tensors.copy[tensor] != nullptr;
    float sum = 0.0f;
    for (int64_t i = chunk.begin + thread * 4; i < chunk.end; i += kThreads * 4) {
      const auto grad = load_four(whole, tensors.grad[tensor], i, chunk.end);
      auto param = load_four(whole, tensors.param[tensor], i, chunk.end);
      auto exp_avg = load_four(whole, tensors.exp_avg[tensor], i, chunk.end);
      auto exp_avg_sq = load_four(whole, tensors.exp_avg_sq[tensor], i, chunk.end);
      Four<float> average = {};
      if (averaged) average = load_four(whole, tensors.average[tensor], i, chunk.end);
      Four<__nv_bfloat16> copy;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float g = widen(grad.values[k]);
        sum += g * g;
        update(rule, factors, g, param.values[k], exp_avg.values[k], exp_avg_sq.values[k]);
        average.values[k] = lerp(average.values[k], param.values[k], rule.average_weight);
        narrow(param.values[k], copy.values[k]);
      }
      store_four(whole, param, tensors.param[tensor], i, chunk.end);
      store_four(whole, exp_avg, tensors.exp_avg[tensor], i, chunk.end);
      store_four(whole, exp_avg_sq, tensors.exp_avg_sq[tensor], i, chunk.end);
      if (averaged) store_four(whole, average, tensors.average[tensor], i, chunk.end);
      if (copied) store_four(whole, copy, tensors.copy[tensor], i, chunk.end);
    }
    return sum;
  }
};

int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

// Calls run(tensors, chunks) for as many tensors at a time as a launch has room for.
template <class Grad, class Run>
const char* for_launches(void* const* const* lists, const int64_t* sizes, int64_t count,
                         float* partial, Run run) {
  const auto pointer = [&](int list, int64_t i) { return lists[list] ? lists[list][i] : nullptr; };
  for (int64_t first = 0; first < count; first += kTensors) {
    Tensors<Grad> tensors = {};
    tensors.partial = partial;
    int64_t chunks = 0;
    for (int64_t i = first; i < std::min(count, first + kTensors); ++i) {
      const int64_t k = i - first;
      tensors.param[k] = static_cast<float*>(pointer(0, i));
      tensors.grad[k] = static_cast<const Grad*>(pointer(1, i));
      tensors.exp_avg[k] = static_cast<float*>(pointer(2, i));
      tensors.exp_avg_sq[k] = static_cast<float*>(pointer(3, i));
      tensors.average[k] = static_cast<float*>(pointer(4, i));
      tensors.copy[k] = static_cast<__nv_bfloat16*>(pointer(5, i));
      tensors.size[k] = sizes[i];
      chunks += chunks_of(sizes[i]);
      tensors.end[k] = static_cast<int>(chunks);
      tensors.whole[k] = sizes[i] % 4 == 0;
      for (int list = 0; list < 6; ++list) tensors.whole[k] &= starts_on(pointer(list, i), 16);
    }
    if (const char* error = run(tensors, chunks)) return error;
    partial += chunks;
  }
  return nullptr;
}

template <class Grad>
const char* adam(void* const* const* lists, const int64_t* sizes, int64_t count, Rule rule,
                 float* partial, int64_t chunks, float max_norm, float* norm, float* scale,
                 Place place) {
  static_assert(sizeof(Step<Grad>) <= 4096 - sizeof(int), "the arguments of a kernel");
  const auto run = [&](auto kernel, int64_t blocks) {
    return launch(kernel, blocks, 1, Shared::kBytes, place);
  };
  const auto find_norm = [&]() { return run(Norm{partial, chunks, max_norm, norm, scale}, 1); };
  const auto step = [&](const Tensors<Grad>& tensors, int64_t blocks) {
    return run(Step<Grad>{tensors, rule}, blocks);
  };
  if (std::isinf(max_norm)) {
    const char* error = for_launches<Grad>(lists, sizes, count, partial, step);
    return error ? error : find_norm();
  }
  rule.scale = scale;
  const char* error = for_launches<Grad>(
      lists, sizes, count, partial, [&](const Tensors<Grad>& tensors, int64_t blocks) {
        return run(SumSquares<Grad>{tensors}, blocks);
      });
  if (!error) error = find_norm();
  return error ? error : for_launches<Grad>(lists, sizes, count, partial, step);
}

}  // namespace
}  // namespace ds

// How many chunks the tensors have: the floats of `partial` below.
EXPORT int64_t ds_cuda_adam_chunks(const int64_t* sizes, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += ds::chunks_of(sizes[i]);
  return chunks;
}

// lists are six arrays, on the host, of `count` addresses each: params, grads, exp_avgs,
// exp_avg_sqs, and averages and copies, whose addresses may be null. All are float32 without gaps,
// except grads, of type grad_type (float32 or bfloat16), and copies, bfloat16. step (counted from
// 1) and lr are one float each on the device; norm and scale are written. Returns null or an error.
EXPORT const char* ds_cuda_adam(void* const* const* lists, const int64_t* sizes, int64_t count,
                                const float* step, const float* lr, float* partial, float* norm,
                                float* scale, double beta1, double beta2, double eps,
                                double weight_decay, bool decoupled, double decay, double max_norm,
                                int grad_type, int device, cudaStream_t stream) {
  const ds::Rule rule = {step,
                         lr,
                         nullptr,
                         beta1,
                         beta2,
                         static_cast<float>(eps),
                         static_cast<float>(weight_decay),
                         decoupled,
                         static_cast<float>(1.0 - decay)};
  const auto adam = grad_type == ds::kFloat32 ? ds::adam<float> : ds::adam<__nv_bfloat16>;
  return adam(lists, sizes, count, rule, partial, ds_cuda_adam_chunks(sizes, count),
              static_cast<float>(max_norm), norm, scale, {device, stream});
}
