// The thread pool of the host program. A second OpenMP runtime would fight PyTorch's for the cores,
// so loops run on the pool that ds_set_parallel_for was given (torch_parallel_for), or serially
// where none was given.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls function on disjoint ranges that cover [0, count), each of at least `grain` items where
// that is possible. Returns 0, or the error code of the pool.
int parallel_for(int64_t count, int64_t grain, RangeFunction function, void* context);
