// How a kernel is written, launched on a GPU, and run without one.
//
// A kernel is a struct of its arguments that is called with a cluster of blocks. What it does is a
// sequence of phases: in cluster.phase(f) every thread of every block calls f(block, thread), then
// all threads of a block wait for each other; after cluster.exchange(f) all blocks do. Phases share
// nothing but memory, so the same source also runs on a CPU, thread after thread. That is how the
// kernels are tested on machines without a GPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define HOST_DEVICE __host__ __device__ __forceinline__

// A kernel is written for a GPU's clusters and the CPU's alike, and only ever called with one that
// fits the side it is compiled for. nvcc warns of the calls that never happen.
#pragma nv_diag_suppress 20011, 20014

namespace ds {

constexpr int kThreads = 256;
constexpr int kLargestCluster = 8;  // what every GPU that has clusters can place

// Whether kernels run on the CPU, on its memory, and there in which order (ds_cuda_interpret).
enum Interpret { kOff = 0, kForwards = 1, kBackwards = 2 };
extern Interpret interpret;

// A block of a cluster, as a phase sees it.
struct Block {
  int rank;
  char* shared;
  char* const* all_shared;  // that of all blocks, where the CPU plays the cluster

  // The shared memory of another block, in distributed shared memory.
  HOST_DEVICE char* peer(int other) const {
#if !defined(__CUDA_ARCH__)
    return all_shared[other];
#elif __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(shared, other);
#else
    return shared;  // a cluster of one block
#endif
  }
};

class DeviceCluster {
 public:
  __device__ __forceinline__ DeviceCluster(int ranks, char* shared)
      : index_(blockIdx.x / static_cast<unsigned>(ranks)),
        block_{static_cast<int>(blockIdx.x % static_cast<unsigned>(ranks)), shared, nullptr} {}

  // Which cluster of the grid this is.
  __device__ __forceinline__ int64_t index() const { return index_; }

  template <class Phase>
  __device__ __forceinline__ void phase(Phase run) {
    run(block_, static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  template <class Phase>
  __device__ __forceinline__ void exchange(Phase run) {
    run(block_, static_cast<int>(threadIdx.x));
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
  }

 private:
  const int64_t index_;
  const Block block_;
};

class HostCluster {
 public:
  HostCluster(int64_t index, int ranks, size_t shared) : index_(index), memory_(ranks) {
    for (auto& bytes : memory_) {
      bytes.resize(shared / sizeof(uint4) + 1);
      std::memset(bytes.data(), 0xff, shared);  // NaN, so that it shows what reads it
      shared_.push_back(reinterpret_cast<char*>(bytes.data()));
    }
    for (int rank = 0; rank < ranks; ++rank) {
      blocks_.push_back({rank, shared_[rank], shared_.data()});
    }
  }

  int64_t index() const { return index_; }

  template <class Phase>
  void phase(Phase run) {
    const int threads = static_cast<int>(blocks_.size()) * kThreads;
    for (int i = 0; i < threads; ++i) {
      const int thread = interpret == kForwards ? i : threads - 1 - i;
      run(blocks_[thread / kThreads], thread % kThreads);
    }
  }

  template <class Phase>
  void exchange(Phase run) {
    phase(run);
  }

 private:
  const int64_t index_;
  std::vector<std::vector<uint4>> memory_;
  std::vector<char*> shared_;
  std::vector<Block> blocks_;
};

template <class Kernel>
__global__ void __launch_bounds__(kThreads, 2)
    kernel(const __grid_constant__ Kernel arguments, int ranks) {
  extern __shared__ uint4 shared[];
  DeviceCluster cluster(ranks, reinterpret_cast<char*>(shared));
  arguments(cluster);
}

// Where a kernel runs: torch's device and its current stream.
struct Place {
  int device;
  cudaStream_t stream;
};

// Launches `clusters` clusters of `ranks` blocks, each block with `shared` bytes of shared memory.
// Returns null, or what went wrong.
template <class Kernel>
const char* launch(const Kernel& arguments, int64_t clusters, int ranks, size_t shared,
                   Place place) {
  if (clusters == 0) return nullptr;
  if (interpret != kOff) {
    for (int64_t i = 0; i < clusters; ++i) {
      HostCluster cluster(i, ranks, shared);
      arguments(cluster);
    }
    return nullptr;
  }
  if (clusters * ranks > INT32_MAX) return "too many blocks for one launch";
  const auto run = [&]() {
    cudaError_t error = cudaSetDevice(place.device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = static_cast<unsigned>(clusters * ranks);
    config.blockDim = kThreads;
    config.dynamicSmemBytes = shared;
    config.stream = place.stream;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(ranks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = ranks > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel<Kernel>, arguments, ranks);
  };
  const cudaError_t launched = run(), pending = cudaGetLastError();
  const cudaError_t error = launched != cudaSuccess ? launched : pending;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The data types, as ds/ops/_native.py numbers them.
enum Type { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

HOST_DEVICE float widen(float value) { return value; }
HOST_DEVICE float widen(__half value) { return __half2float(value); }
HOST_DEVICE float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
HOST_DEVICE void narrow(float value, float& to) { to = value; }
HOST_DEVICE void narrow(float value, __half& to) { to = __float2half_rn(value); }
HOST_DEVICE void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

// Neighbors in memory, which one instruction reads or writes: of up to 16 bytes.
template <class T, int kElements = 16 / sizeof(T)>
struct alignas(kElements * sizeof(T)) Vector {
  static constexpr int kSize = kElements;
  T values[kSize];
};

template <class V, class T>
HOST_DEVICE V load(const T* from) {
  return *reinterpret_cast<const V*>(from);
}

// Stored by the instruction itself: out of elements, the compiler makes it one only at times. No
// kernel reads what it stored so: memory is not clobbered, which would hold back the next load.
#ifdef __CUDA_ARCH__
inline __device__ void store_words(uint4 words, void* to) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w));
}
inline __device__ void store_words(uint2 words, void* to) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words.x), "r"(words.y));
}
#endif

template <class V, class T>
HOST_DEVICE void store(const V& vector, T* to) {
#ifdef __CUDA_ARCH__
  typename std::conditional<sizeof(V) == 16, uint4, uint2>::type words;
  static_assert(sizeof(words) == sizeof(vector), "16 or 8 bytes");
  memcpy(&words, &vector, sizeof words);
  store_words(words, to);
#else
  *reinterpret_cast<V*>(to) = vector;
#endif
}

// Starts to copy a vector into shared memory. The thread that asked for it may read it after
// wait_for_copies, others after the phase.
template <class T>
HOST_DEVICE void copy_vector(T* shared, const T* from) {
#ifdef __CUDA_ARCH__
  __pipeline_memcpy_async(shared, from, 16);
#else
  std::memcpy(shared, from, 16);
#endif
}

HOST_DEVICE void wait_for_copies() {
#ifdef __CUDA_ARCH__
  __pipeline_commit();
  __pipeline_wait_prior(0);
#endif
}

// Four elements, the i-th of n and after, where Whole: n is a multiple of four, and they start on
// one. Else as many as there are. Whole is std::true_type or std::false_type: a condition inside of
// a loop would cost the wide instructions.
template <class T>
using Four = Vector<T, 4>;

template <class Whole, class T>
HOST_DEVICE Four<T> load_four(Whole, const T* from, int64_t i, int64_t n) {
  if constexpr (Whole::value) return load<Four<T>>(from + i);
  Four<T> four = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (i + k < n) four.values[k] = from[i + k];
  }
  return four;
}

template <class Whole, class T>
HOST_DEVICE void store_four(Whole, const Four<T>& four, T* to, int64_t i, int64_t n) {
  if constexpr (Whole::value) {
    store(four, to + i);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k < n) to[i + k] = four.values[k];
    }
  }
}

inline bool starts_on(const void* address, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

}  // namespace ds
