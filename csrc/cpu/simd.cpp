#include "simd.h"

#include "parallel.h"

static SimdLevel detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPortable;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512vnni") ? kVnni : kAvx512;
  }
  return kAvx2;
#else
  return kPortable;
#endif
}

static const SimdLevel detected = detect();
static SimdLevel limit = detected;

SimdLevel simd_level() { return limit; }

// Limits the instruction sets in use to `level` (tests run every one that the processor has);
// returns the one in use.
EXPORT int ds_limit_simd(int level) {
  limit = level < detected ? static_cast<SimdLevel>(level) : detected;
  return limit;
}

EXPORT int ds_simd_level() { return simd_level(); }
