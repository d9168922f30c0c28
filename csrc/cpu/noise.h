// Standard normal noise by counter, as in ds/ops/noise.py. Its bits depend on the position alone:
// every normal is made in a lane of its own, by the same instructions.
#pragma once

#include <cstdint>

#include "parallel.h"

// Blocks of four normals that are made at a time, and the normals in them.
constexpr int64_t kNoiseBlocks = 256;
constexpr int64_t kNoise = 4 * kNoiseBlocks;

// What a row of noise depends on, and where its normals go: kNoise for each tile.
struct Normals {
  uint64_t seed, index;
  void* out;
};

// The function that makes tiles [begin, end) of kNoiseBlocks blocks, for a context of Normals.
RangeFunction normals(bool bfloat16_data);
